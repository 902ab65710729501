package daemon

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/busguard"
	"github.com/memlinux/memlinux/daemon/config"
	"github.com/memlinux/memlinux/media/blockdev"
)

func callFrom(sender string) *dbus.Message {
	return &dbus.Message{Type: dbus.TypeMethodCall, Headers: map[dbus.HeaderField]dbus.Variant{dbus.FieldSender: dbus.MakeVariant(sender)}}
}

func TestGateBoundsWhatIsInWork(t *testing.T) {
	isFull := func(err error) bool { return api.ErrorName(err) == api.ErrLimitsExceeded }
	t.Run("a connection's calls", func(t *testing.T) {
		g := newGate()
		var first *dbus.Message
		for i := range callsPerClient {
			msg := callFrom(":1.1")
			if i == 0 {
				first = msg
			}
			if err := g.enter(t.Context(), msg, 100, nil); err != nil {
				t.Fatal(err)
			}
		}
		var pipe [2]int
		if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		r := os.NewFile(uintptr(pipe[0]), "pipe")
		defer r.Close()
		if err := g.enter(t.Context(), callFrom(":1.1"), 100, []int{pipe[1]}); !isFull(err) {
			t.Errorf("one more: %v", err)
		}
		// Nobody waits for its end.
		if _, err := io.Copy(io.Discard, r); err != nil {
			t.Errorf("the refused call's descriptor: %v", err)
		}
		if err := g.enter(t.Context(), callFrom(":1.2"), 100, nil); err != nil {
			t.Errorf("another's: %v", err)
		}
		g.answered(first)
		if err := g.enter(t.Context(), callFrom(":1.1"), 100, nil); err != nil {
			t.Errorf("after an answer: %v", err)
		}
	})
	t.Run("a user's calls, bytes and descriptors", func(t *testing.T) {
		for name, l := range map[string]load{"calls": {1, 1, 0}, "bytes": {1, bytesPerUser/4 + 1, 0}, "descriptors": {1, 1, filesPerUser/4 + 1}} {
			g := newGate()
			enter := func(i int, uid uint32) error {
				a := &arrival{client: g.hold(t.Context(), ":1.1"), load: l}
				return g.count(a, uid)
			}
			n, err := 0, error(nil)
			for ; n < 2*callsPerUser && err == nil; n++ {
				err = enter(n, 1000)
			}
			if want := map[string]int{"calls": callsPerUser + 1, "bytes": 4, "descriptors": 4}[name]; !isFull(err) || n != want {
				t.Errorf("%s: full after %d, want %d: %v", name, n, want, err)
			}
			if err := enter(0, 1001); err != nil {
				t.Errorf("%s: another user: %v", name, err)
			}
			if err := enter(0, 0); err != nil {
				t.Errorf("%s: root: %v", name, err)
			}
		}
	})
	t.Run("too large a call", func(t *testing.T) {
		if err := newGate().enter(t.Context(), callFrom(":1.1"), busguard.MaxMessage+1, nil); !isFull(err) {
			t.Error(err)
		}
	})
	t.Run("nothing is left of who came and went", func(t *testing.T) {
		g := newGate()
		msg := callFrom(":1.1")
		if err := g.enter(t.Context(), msg, 100, nil); err != nil {
			t.Fatal(err)
		}
		a := g.taken(msg)
		if err := g.count(a, 1000); err != nil {
			t.Fatal(err)
		}
		leave := g.stay(a.client)
		g.left(":1.1")
		if a.client.ctx.Err() == nil {
			t.Error("its calls go on")
		}
		g.answered(msg)
		leave()
		if len(g.clients)+len(g.users)+len(g.arrived) > 0 || g.all != (load{}) {
			t.Errorf("left: %+v", g)
		}
	})
}

func TestDetailsOfADevice(t *testing.T) {
	for name, c := range map[string]struct {
		device blockdev.Device
		action string
		drive  string
	}{
		"a stick":    {blockdev.Device{Path: "/dev/sdb", Vendor: "SanDisk ", Model: "Ultra", Serial: "4C53", Removable: true}, "removable", "SanDisk Ultra (serial 4C53, /dev/sdb)"},
		"no names":   {blockdev.Device{Path: "/dev/vda"}, "fixed", "the disk (/dev/vda)"},
		"bad names":  {blockdev.Device{Path: "/dev/sdc", Vendor: "$(user)\x1b[2J\u202e\xff", Model: strings.Repeat("x", 500)}, "fixed", "?(user)?[2J?? " + strings.Repeat("x", 64) + "… (/dev/sdc)"},
		"a new line": {blockdev.Device{Path: "/dev/sdc", Model: "a\nb", Serial: "\n"}, "fixed", "a?b (/dev/sdc)"},
	} {
		if got := deviceAction(c.device, "removable", "fixed"); got != c.action {
			t.Errorf("%s: %s", name, got)
		}
		if got := deviceDetails(c.device)["drive"]; got != c.drive {
			t.Errorf("%s: %q, want %q", name, got, c.drive)
		}
	}
}

// Whatever options a client sends, they are understood or refused.
func FuzzOptions(f *testing.F) {
	seed := func(options map[string]dbus.Variant) {
		var raw bytes.Buffer
		msg := &dbus.Message{Type: dbus.TypeMethodCall, Body: []any{options}, Headers: map[dbus.HeaderField]dbus.Variant{dbus.FieldPath: dbus.MakeVariant(api.ManagerPath),
			dbus.FieldMember: dbus.MakeVariant("Build"), dbus.FieldSignature: dbus.MakeVariant(dbus.SignatureOf(options))}}
		if err := msg.EncodeTo(&raw, binary.LittleEndian); err != nil {
			f.Fatal(err)
		}
		f.Add(raw.Bytes())
	}
	v := dbus.MakeVariant
	seed(map[string]dbus.Variant{api.OptRecipe: v("kernel = \"debian:linux\"\n[[file]]\nto = \"/a\"\n"), api.OptModules: v([]string{"all"}), api.OptAppend: v("quiet")})
	seed(map[string]dbus.Variant{api.OptPayload: index(0), api.OptKernelConfigs: v(map[string]dbus.Variant{"config-1": index(7)}), api.OptKernel: index(0)})
	seed(map[string]dbus.Variant{api.OptRAM: v(uint64(1) << 63), api.OptUnmount: v([][]byte{[]byte("/media/a\x00")}), api.OptSourceDateEpoch: v(uint64(1) << 40)})
	s := &Server{ctx: context.Background()}
	s.configuration.Store(&config.Config{Kernel: "auto"})
	f.Fuzz(func(t *testing.T, data []byte) {
		msg, err := dbus.DecodeMessage(bytes.NewReader(data))
		if err != nil || len(msg.Body) == 0 {
			return
		}
		if _, ok := msg.Body[len(msg.Body)-1].(map[string]dbus.Variant); !ok {
			return // the dispatcher refuses it
		}
		null, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		c := &call{args: msg.Body, files: []int{null}, looks: new(sync.WaitGroup), uid: 1000}
		defer func() {
			c.looks.Wait()
			if c.files[0] >= 0 {
				unix.Close(null)
			}
		}()
		o := c.options()
		_ = s.recipeOf(o)
		_ = termsOf(o)
		_ = o.fileMap(api.OptFiles, toBeWritten)
		_ = o.stream(api.OptData)
		if err := o.end(); err != nil && api.ErrorName(err) != api.ErrInvalidOption {
			t.Errorf("%v", err)
		}
	})
}
