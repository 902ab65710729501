package api

import (
	"bytes"
	"encoding/binary"
	"encoding/xml"
	"fmt"
	"strings"
	"testing"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"
)

func TestDevicePathRoundTrip(t *testing.T) {
	for name, want := range map[string]dbus.ObjectPath{
		"sda":        "/org/memlinux/Memlinux1/devices/sda",
		"nvme0n1":    "/org/memlinux/Memlinux1/devices/nvme0n1",
		"cciss!c0d0": "/org/memlinux/Memlinux1/devices/cciss_21c0d0",
		"a_b":        "/org/memlinux/Memlinux1/devices/a_5fb",
		"\xff":       "/org/memlinux/Memlinux1/devices/_ff",
	} {
		path := DevicePath(name)
		if path != want || !path.IsValid() {
			t.Errorf("DevicePath(%q) = %q, want %q", name, path, want)
		}
		if back, ok := DeviceName(path); !ok || back != name {
			t.Errorf("DeviceName(%q) = %q, %v", path, back, ok)
		}
	}
	for _, bad := range []dbus.ObjectPath{"/", ManagerPath, DevicePath(""), devicePath + "a/b", devicePath + "_zz", devicePath + "_6", devicePath + "_61"} {
		if name, ok := DeviceName(bad); ok {
			t.Errorf("DeviceName(%q) = %q: not the path of a device", bad, name)
		}
	}
}

func FuzzDeviceName(f *testing.F) {
	f.Add("/org/memlinux/Memlinux1/devices/sda_2f")
	f.Fuzz(func(t *testing.T, path string) {
		if name, ok := DeviceName(dbus.ObjectPath(path)); ok && DevicePath(name) != dbus.ObjectPath(path) {
			t.Errorf("%q is %q, but that is %q", path, name, DevicePath(name))
		}
	})
}

// overTheBus encodes p as a message and decodes that again.
func overTheBus(t *testing.T, p Properties) Properties {
	t.Helper()
	msg := &dbus.Message{Type: dbus.TypeSignal, Body: []any{p}, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldPath:      dbus.MakeVariant(ManagerPath),
		dbus.FieldInterface: dbus.MakeVariant(ManagerInterface),
		dbus.FieldMember:    dbus.MakeVariant("Test"),
		dbus.FieldSignature: dbus.MakeVariant(dbus.SignatureOf(p)),
	}}
	var buf bytes.Buffer
	if err := msg.EncodeTo(&buf, binary.LittleEndian); err != nil {
		t.Fatal(err)
	}
	back, err := dbus.DecodeMessage(&buf)
	if err != nil {
		t.Fatal(err)
	}
	return back.Body[0].(Properties)
}

func TestDeviceRoundTrip(t *testing.T) {
	d := Device{Name: "sdb", Path: "/dev/sdb", Size: 8 << 30, SectorSize: 512, Vendor: "V", Model: "M", Serial: "S", Transport: "usb", Removable: true,
		Contents: []Content{{"sdb1", 4 << 30, "vfat", "STICK"}}, Refused: []Reason{{"mounted", "sdb1 is mounted on /mnt", false}, {"too-large", "sdb is large", true}}, Interrupted: "1"}
	got, err := DeviceFrom(overTheBus(t, d.Properties()))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(d, got); diff != "" {
		t.Error(diff)
	}
	if _, err := DeviceFrom(Properties{"Size": dbus.MakeVariant("big")}); err == nil {
		t.Error("a size that is a string was taken")
	}
}

func TestPlanRoundTrip(t *testing.T) {
	p := Plan{Token: "t", Refused: []Reason{{"swap", "sdb2 is swap", false}}, Mounts: []Mount{{"sdb1", "/media/u/\xff", "vfat", true}}, Erases: []Content{{"sdb", 1, "gpt", ""}}, Interrupted: "1", Agreed: true}
	got, err := PlanFrom(overTheBus(t, p.Dictionary()))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(p, got); diff != "" {
		t.Error(diff)
	}
}

func TestJobRoundTrip(t *testing.T) {
	j := Job{ID: "1", Kind: KindWrite, Owner: 1000, Cancelable: true, State: StateFailed, Phase: "write", Progress: 0.5, Bytes: 1, Total: 2, Rate: 3,
		Message: "no", Error: ErrNoSpace, Report: &Report{Kind: KindWrite, Boots: []Boot{{Firmware: "bios", OK: true}}}}
	var got Job
	if err := got.Update(overTheBus(t, j.Properties())); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(j, got); diff != "" {
		t.Error(diff)
	}
	if err := got.Update(Properties{"Phase": dbus.MakeVariant("verify")}); err != nil || got.Phase != "verify" || got.Bytes != 1 {
		t.Errorf("a partial update gave %+v, %v", got, err)
	}
	if r := (Job{State: StateRunning, Error: "x"}).Result(); len(r) != 0 {
		t.Errorf("a running job has the result %v", r)
	}
}

// What others see of a job quotes nothing.
func TestForOthers(t *testing.T) {
	for _, state := range []string{StateRunning, StateSucceeded, StateFailed, StateCancelled} {
		j := Job{ID: "1", Kind: KindWrite, Owner: 1000, State: state, Phase: "boot BIOS", Error: ErrVerification, Message: "BIOS: the console's last lines: secret",
			Report: &Report{Boots: []Boot{{Firmware: "bios", Reason: "secret"}}}}
		if got := j.ForOthers(); strings.Contains(fmt.Sprint(got.Properties()), "secret") || got.Error != j.Error || got.Owner != j.Owner {
			t.Errorf("%s: %+v", state, got)
		}
	}
}

func TestIntrospectionIsXML(t *testing.T) {
	for _, iface := range []string{"", ManagerInterface, JobInterface, DeviceInterface} {
		var node struct {
			Interfaces []struct {
				Name string `xml:"name,attr"`
			} `xml:"interface"`
			Nodes []struct {
				Name string `xml:"name,attr"`
			} `xml:"node"`
		}
		if err := xml.Unmarshal([]byte(Introspect(iface, []string{"jobs"})), &node); err != nil {
			t.Fatalf("%q: %v", iface, err)
		}
		found := iface == ""
		for _, i := range node.Interfaces {
			found = found || i.Name == iface
		}
		if !found || len(node.Nodes) != 1 {
			t.Errorf("%q: interfaces %v, nodes %v", iface, node.Interfaces, node.Nodes)
		}
	}
}
