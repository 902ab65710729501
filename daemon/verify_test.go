package daemon

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/godbus/dbus/v5"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/media/blockdev"
	"github.com/memlinux/memlinux/testvm/need"
)

// A disk that was exchanged while somebody was asked is not read by the permission
// for another one.
func TestVerifyOfAnExchangedDisk(t *testing.T) {
	need.Root(t)
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	fixed := filepath.Base(need.Loop(t, file, "512"))
	s := &Server{looks: make(chan struct{}, 1), devices: &deviceList{system: blockdev.System{}}}
	call := func(action string) *call {
		return &call{ctx: t.Context(), action: action, args: []any{api.DevicePath(fixed), map[string]dbus.Variant{}}}
	}
	if _, err := s.verify(call(actionVerify)); api.ErrorName(err) != api.ErrDeviceChanged {
		t.Errorf("a fixed disk, where a removable one was allowed: %v", err)
	}
	disk, err := s.openToVerify(call(actionVerifyFixed))
	if err != nil {
		t.Fatal(err)
	}
	disk.file.Close()
}
