package pc

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"

	"github.com/memlinux/memlinux/testvm/qmp"
)

// Stick is a USB stick: QEMU's usb-storage on an xHCI.
type Stick struct {
	Serial string // letters and digits; udev's name is usb-QEMU_QEMU_HARDDISK_SERIAL-0:0
	Image  string // path of the raw image
	// Rate is how many bytes are written in a second, 0 for as many as can be; a
	// stick that is slow enough is met in the middle of a write. What is read has no
	// limit.
	Rate int64
	Out  bool // it is not plugged in at power-on
}

// sticks are QEMU's arguments for them.
func (m *Machine) sticks(all []Stick) []string {
	args := []string{"-qmp", "unix:" + quoted(m.qmpSocket()) + ",server=on,wait=off", "-device", "qemu-xhci,id=usb"}
	for _, s := range all {
		args = append(args,
			"-object", fmt.Sprintf(`{"qom-type":"throttle-group","id":"rate-%s","limits":{"bps-write":%d}}`, s.Serial, s.Rate),
			"-blockdev", "driver=file,node-name=file-"+s.Serial+",filename="+quoted(s.Image),
			"-blockdev", fmt.Sprintf("driver=throttle,throttle-group=rate-%[1]s,node-name=limited-%[1]s,file=file-%[1]s", s.Serial),
			"-blockdev", fmt.Sprintf("driver=raw,node-name=disk-%[1]s,file=limited-%[1]s", s.Serial))
		if !s.Out {
			args = append(args, "-device", fmt.Sprintf("usb-storage,bus=usb.0,id=%[1]s,serial=%[1]s,drive=disk-%[1]s,removable=on", s.Serial))
		}
	}
	return args
}

func (m *Machine) qmpSocket() string { return filepath.Join(m.dir, "qmp") }

// qmp runs a command, and waits until QEMU has told that the device is deleted, if one
// is named.
func (m *Machine) qmp(deleted, command string, args any) {
	m.t.Helper()
	ctx, stop := context.WithTimeout(m.t.Context(), Patience)
	defer stop()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", m.qmpSocket())
	if err != nil {
		m.t.Fatal(err)
	}
	told := make(chan struct{}, 1)
	c, err := qmp.Open(ctx, conn.(*net.UnixConn), func(e qmp.Event) {
		var of struct{ Device string } // what is part of a device has a path only
		if e.Name == "DEVICE_DELETED" && json.Unmarshal(e.Data, &of) == nil && of.Device == deleted {
			told <- struct{}{}
		}
	})
	if err != nil {
		m.t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Run(ctx, command, args); err != nil {
		m.t.Fatal(err)
	}
	if deleted == "" {
		return
	}
	select {
	case <-told:
	case <-ctx.Done():
		m.t.Fatalf("QEMU did not delete %s", deleted)
	}
}

// Unplug pulls a stick out. The system is not asked: a USB device is not there any
// more from one moment to the next.
func (m *Machine) Unplug(s Stick) {
	m.t.Helper()
	m.qmp(s.Serial, "device_del", map[string]any{"id": s.Serial})
}

// Plug puts a stick that is out into a port, with what it held when it was pulled
// out, at another rate if that has changed.
func (m *Machine) Plug(s Stick) {
	m.t.Helper()
	m.qmp("", "qom-set", map[string]any{"path": "/objects/rate-" + s.Serial, "property": "limits", "value": map[string]any{"bps-write": s.Rate}})
	m.qmp("", "device_add", map[string]any{"driver": "usb-storage", "bus": "usb.0", "id": s.Serial, "serial": s.Serial, "drive": "disk-" + s.Serial, "removable": true})
}
