package testvm

import (
	"context"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// The screen of a PC in its text mode: 25 rows of 80 characters, each two
// bytes in memory, of which the second is the colour.
const (
	screenAddress = 0xb8000
	screenColumns = 80
	screenBytes   = 25 * screenColumns * 2
)

// memoryFile is a file without a name. QEMU's user may open it again by the
// descriptor that it inherits, as one on a disk of ours it may not.
func memoryFile() (*os.File, error) {
	fd, err := unix.MemfdCreate("screen", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	return os.NewFile(uintptr(fd), "screen"), nil
}

// readScreen is what the machine's screen says, in lines, if it is in text
// mode; in a graphics mode there is nothing at that address, and so with UEFI.
func (vm *VM) readScreen(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, monitorLimit)
	defer cancel()
	args := map[string]any{"val": screenAddress, "size": screenBytes, "filename": vm.screenPath}
	if _, err := vm.monitor.Run(ctx, "pmemsave", args); err != nil {
		return nil, err
	}
	memory := make([]byte, screenBytes)
	if _, err := vm.screen.ReadAt(memory, 0); err != nil {
		return nil, err
	}
	return screenLines(memory), nil
}

// screenLines are the lines of a text screen that have any of ASCII on them; a
// line that fills its row goes on in the next.
func screenLines(memory []byte) []string {
	var lines []string
	var line strings.Builder
	end := func() {
		if text := quotable([]byte(line.String())); text != "" {
			lines = append(lines, text)
		}
		line.Reset()
	}
	for i := 0; i+1 < len(memory); i += 2 {
		c := memory[i]
		if c < 0x20 || c > 0x7e { // a frame's lines, arrows, or no text
			c = ' '
		}
		line.WriteByte(c)
		if (i/2+1)%screenColumns == 0 && c == ' ' {
			end()
		}
	}
	end()
	return lines
}
