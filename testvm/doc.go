// Package testvm runs QEMU machines: to prove that a disk boots ([Prove]), and
// to give a person the console of one ([Start]).
//
// It promises three things. QEMU runs without privileges: as the user nobody
// where the caller is root, under QEMU's own seccomp sandbox, with what it may
// read and write handed over as open descriptors. The disk is never written: its
// descriptor is read-only, and the guest's writes go to a throw-away overlay.
// And no QEMU is left behind: when ctx is cancelled it is killed and waited
// for, and when this process is killed the kernel kills QEMU with it. Where a
// [Launcher] starts QEMU, it keeps the first and the last of these.
package testvm
