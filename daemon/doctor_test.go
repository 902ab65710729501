package daemon

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/godbus/dbus/v5"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/testvm/need"
)

// Who asks again and again how the machine is has it looked at once, and root each
// time.
func TestDoctorLooksOnce(t *testing.T) {
	need.Root(t)
	// Each look starts grub-mkimage, for two firmwares.
	dir := t.TempDir()
	looks := filepath.Join(dir, "looks")
	if err := os.WriteFile(filepath.Join(dir, "grub-mkimage"), []byte("#!/bin/sh\necho >> "+looks+"\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(looks, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{dir, filepath.Dir(dir)} { // grub-mkimage has no rights
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(looks, 0o666); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	address := startBus(t)
	serve(t, address, func(context.Context, *dbus.Conn, Question) error { return nil })
	games, root := dialAs(t, address, "games"), dial(t, address)
	ask := func(conn *dbus.Conn) int64 {
		t.Helper()
		if err := invoke(conn, api.ManagerPath, api.ManagerInterface+".Doctor", map[string]dbus.Variant{}).Err; err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(looks)
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	first := ask(games)
	if again := ask(games); first == 0 || again != first {
		t.Errorf("%d programs were started for one look, and %d in all for two", first, again)
	}
	if again := ask(root); again != 2*first {
		t.Errorf("%d programs were started for one look, and %d in all with root's", first, again)
	}
}
