package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"
)

// Mount is a place where a disk, or something on it, is mounted.
type Mount struct {
	Device string // sda1, dm-3
	Point  string // as the kernel has it, any bytes: Clean it before it is printed
	FSType string // vfat, ext4, …
	// ByUser: it is where desktops mount what is plugged in (udisks, usbmount:
	// below /media or /run/media), so it can be offered to unmount it.
	ByUser bool
}

// Mounts tells where the disk and what stands on it is mounted, in our own mount
// namespace and the first process's. It is ErrNoDevice if there is no such disk.
func (s System) Mounts(ctx context.Context, name string) ([]Mount, error) {
	v, n, err := s.lookAt(ctx, name)
	if err != nil {
		return nil, err
	}
	var all []Mount
	for _, p := range v.places(n) {
		m := Mount{Device: p.on, Point: p.point, FSType: p.fstype,
			ByUser: !isSystem(p.point) && (isBelow(p.point, "/media") || isBelow(p.point, "/run/media"))}
		if !slices.Contains(all, m) {
			all = append(all, m)
		}
	}
	return all, nil
}

// place is a mount of what stands on a disk, and the namespace that it is in.
type place struct {
	mount
	on    string // the node that is mounted
	space int    // in survey.spaces
}

// places lists all mounts of what stands on n, the first process's first and
// each namespace's in the kernel's order.
func (v *survey) places(n *node) []place {
	parts := standing(n.Name, v.above)
	var all []place
	for i, space := range v.spaces {
		for _, m := range space {
			for _, on := range v.mounted(m) {
				if slices.Contains(parts, on.Name) {
					all = append(all, place{m, on.Name, i})
					break
				}
			}
		}
	}
	return all
}

// forget takes the mounts at the points out of what speaks against n, as they
// will be once they are unmounted. The system's own stay.
func (v *survey) forget(n *node, points []string) {
	for _, name := range standing(n.Name, v.above) {
		v.mounts[name] = slices.DeleteFunc(slices.Clone(v.mounts[name]), func(m mount) bool { return slices.Contains(points, m.point) && !isSystem(m.point) })
	}
}

// unmount unmounts what of n is mounted at the points, where no program uses it;
// else the error names the programs. The system's mounts are left alone, and so
// are those of other disks. done tells whether any was unmounted.
//
// What is not yet written is flushed by that, which can take as long as a slow
// stick takes and can't be interrupted.
func (s System) unmount(ctx context.Context, name string, points []string) (done bool, err error) {
	w := newWait()
	for {
		v, n, err := s.lookAt(ctx, name)
		if err != nil {
			return done, err
		}
		all := slices.DeleteFunc(v.places(n), func(p place) bool { return isSystem(p.point) || !slices.Contains(points, p.point) })
		if len(all) == 0 {
			return done, nil
		}
		if err := v.covered(name, all); err != nil {
			return done, err
		}
		var mounts []mount
		for _, p := range all {
			mounts = append(mounts, p.mount)
		}
		users := s.usersOf(mounts)
		if len(users) == 0 {
			// The first process's mounts go first, since that takes ours along, and
			// the latest first, since it can be inside of an earlier one.
			last := slices.MaxFunc(all, func(a, b place) int {
				if a.space != b.space {
					return b.space - a.space
				}
				return slices.Index(mounts, a.mount) - slices.Index(mounts, b.mount)
			})
			err = v.undo(ctx, last)
			if err == nil {
				done = true
				continue
			}
			if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOENT) { // ENOENT: gone meanwhile, with its folder
				return done, fmt.Errorf("unmount %s from %s: %w", last.on, Clean(last.point), err)
			}
		}
		again, err := w.again(ctx)
		switch {
		case err != nil:
			return done, err
		case again:
		case len(users) > 0:
			return done, busy(name, "%s, mounted at %s, is in use by %s: close it and try again", name, Clean(all[0].point), several(users))
		default:
			return done, busy(name, "%s, mounted at %s, is in use by what can't be seen, perhaps a file server: stop it or unmount it yourself", name, Clean(all[0].point))
		}
	}
}

// covered refuses where something else is mounted inside of what is to be
// unmounted.
func (v *survey) covered(name string, all []place) error {
	for _, p := range all {
		for _, m := range v.spaces[p.space] {
			ours := slices.ContainsFunc(all, func(o place) bool { return o.id == m.id })
			if !ours && m.point != p.point && isBelow(m.point, p.point) {
				return busy(name, "%s is mounted inside of %s: unmount that first", Clean(m.point), Clean(p.point))
			}
		}
	}
	return nil
}

// undo unmounts one mount in its namespace, and nothing else that may have come
// to its path meanwhile.
func (v *survey) undo(ctx context.Context, p place) error {
	// The numbers tell whether it is in our own namespace: the two lists can also
	// differ because something was mounted between reading them.
	own := slices.ContainsFunc(v.spaces[len(v.spaces)-1], func(m mount) bool { return m.id == p.id })
	if !own && v.system.Unmount != nil {
		return v.ask(ctx, p)
	}
	return apart(func() error {
		if !own {
			f, err := os.Open(filepath.Join(v.system.proc(), "1/ns/mnt"))
			if err != nil {
				return err
			}
			defer f.Close()
			// Its mount points are told from its own root folder on, which need not
			// be the namespace's.
			root, err := os.OpenFile(filepath.Join(v.system.proc(), "1/root"), unix.O_PATH|unix.O_DIRECTORY, 0)
			if err != nil {
				return err
			}
			defer root.Close()
			err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNS)
			if err == nil {
				err = unix.Fchdir(int(root.Fd()))
			}
			if err == nil {
				err = unix.Chroot(".")
			}
			if err != nil {
				return fmt.Errorf("enter the first process's mount namespace: %w", err)
			}
		}
		// From the folder above no link can lead to another mount, and unlike a
		// descriptor of the mount itself it does not keep that busy.
		how := unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS}
		dir, err := unix.Openat2(unix.AT_FDCWD, filepath.Dir(p.point), &how)
		if err != nil {
			return err
		}
		defer unix.Close(dir)
		if err := unix.Fchdir(dir); err != nil {
			return err
		}
		base := filepath.Base(p.point)
		var st unix.Statx_t
		if err := unix.Statx(unix.AT_FDCWD, base, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st); err != nil {
			return err
		}
		if st.Mask&unix.STATX_MNT_ID == 0 { // since Linux 5.8
			return errors.New("the kernel does not tell mounts apart: unmount it yourself")
		}
		if st.Mnt_id != p.id {
			return unix.EBUSY // something was mounted over it, or it is gone: look again
		}
		return unix.Unmount(base, unix.UMOUNT_NOFOLLOW)
	})
}

// ask has the mount unmounted by System.Unmount. Unlike undo it can't tell what
// may have come to the path in the last moment.
func (v *survey) ask(ctx context.Context, p place) error {
	for _, m := range v.spaces[p.space] {
		if m.point == p.point && m.id != p.id {
			return fmt.Errorf("%s is mounted there, too: unmount them yourself", Clean(m.source))
		}
	}
	// What is dirty is written before, however long that takes: who is asked waits
	// for an unmount, but not for ever.
	f, err := os.Open(filepath.Join(v.system.proc(), "1/root", p.point))
	if err != nil {
		return err
	}
	err = unix.Syncfs(int(f.Fd()))
	f.Close()
	if err != nil {
		return fmt.Errorf("write what is not yet on it: %w", err)
	}
	return v.system.Unmount(ctx, p.point)
}

// apart runs do in a thread that has a working folder, and may take a mount
// namespace, of its own. The thread ends with it.
func apart(do func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked, so that the thread is thrown away
		if unix.Gettid() == unix.Getpid() {
			// The main thread can't be thrown away, and /proc/self is its view.
			// While it is locked here, another goroutine gets another thread.
			defer runtime.UnlockOSThread()
			result <- apart(do)
			return
		}
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = do()
		}
		result <- err
	}()
	return <-result
}
