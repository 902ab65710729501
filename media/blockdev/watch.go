package blockdev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Watch sends a value whenever block devices came, went or changed, at most a
// few times a second, until ctx ends; then it closes the channel. It
// listens to the kernel's own uevents (netlink, NETLINK_KOBJECT_UEVENT), so it
// needs no udev; a container's network namespace gets none.
func Watch(ctx context.Context) (<-chan struct{}, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("listen for uevents: %w", err)
	}
	f := os.NewFile(uintptr(fd), "uevents")
	const kernelGroup = 1 // group 2 is udev's
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelGroup}); err != nil {
		_ = f.Close() // nothing was written
		return nil, fmt.Errorf("listen for uevents: %w", err)
	}

	raw := make(chan struct{}, 1)
	go func() {
		defer close(raw)
		buf := make([]byte, 64<<10)
		for {
			n, err := f.Read(buf)
			// ENOBUFS: more events than fit; what was lost could be ours.
			if err != nil && !errors.Is(err, unix.ENOBUFS) {
				return
			}
			if err != nil || isBlockEvent(buf[:n]) {
				select {
				case raw <- struct{}{}:
				default:
				}
			}
		}
	}()

	events := make(chan struct{}, 1)
	go func() {
		defer close(events)
		defer func() {
			_ = f.Close() // ends the reader
			for range raw {
			}
		}()
		for {
			select {
			case <-ctx.Done():
				return
			case _, ok := <-raw:
				if !ok {
					return
				}
			}
			// A disk's partitions follow it within moments: one message for all.
			select {
			case <-ctx.Done():
				return
			case <-time.After(200 * time.Millisecond):
			}
			select {
			case <-raw:
			default:
			}
			select {
			case events <- struct{}{}:
			default:
			}
		}
	}()
	return events, nil
}

// isBlockEvent reads a uevent: "ACTION@PATH" and then KEY=value, each ended by
// a zero byte.
func isBlockEvent(msg []byte) bool {
	return bytes.Contains(msg, []byte("\x00SUBSYSTEM=block\x00"))
}
