package daemon

import (
	"encoding/binary"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// reportDir is where a job leaves console logs, screenshots and compilers' logs.
// It is there as long as the job runs, and after that if there is something in it.
func (s *Server) reportDir(job string) string { return s.stateDir("reports", job) }

// makeReportDir makes it. Only root and the job's owner can enter it: what a
// system says when it boots is no other user's business.
func (s *Server) makeReportDir(job string, owner uint32) (string, error) {
	dir := s.reportDir(job)
	if err := os.MkdirAll(s.stateDir("reports"), 0o755); err != nil { //nolint:gosec // on the way to them
		return "", fmt.Errorf("keep the job's logs: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", fmt.Errorf("keep the job's logs: %w", err)
	}
	if owner != 0 {
		if err := grant(dir, owner); err != nil {
			// Not worth failing for: then root can show them.
			fmt.Fprintf(os.Stderr, "memlinuxd: %s is root's alone: %v\n", dir, err)
		}
	}
	return dir, nil
}

// Names of access control lists (acl(5)), as the kernel takes them:
// linux/posix_acl_xattr.h, version 2.
const (
	aclName = "system.posix_acl_access"
	aclUser = 2 // the tag of a user by number
)

// grant lets the user enter the folder, who need not become its owner for that,
// and read the names in it.
func grant(dir string, uid uint32) error {
	const (
		userObj, groupObj, mask, other = 1, 4, 0x10, 0x20
		nobody                         = ^uint32(0) // where a tag names none
	)
	list := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{userObj, 7, nobody}, {aclUser, 5, uid}, {groupObj, 0, nobody}, {mask, 5, nobody}, {other, 0, nobody}} {
		list = binary.LittleEndian.AppendUint16(list, e.tag)
		list = binary.LittleEndian.AppendUint16(list, e.perm)
		list = binary.LittleEndian.AppendUint32(list, e.id)
	}
	return unix.Setxattr(dir, aclName, list, 0)
}

// ownerOf is the user whom grant let in, or 0. Where that can't be had, the folder is
// root's alone.
func ownerOf(dir string) uint32 {
	list := make([]byte, 1<<10)
	n, err := unix.Getxattr(dir, aclName, list)
	if err != nil || n < 4 {
		return 0
	}
	for e := list[4:n]; len(e) >= 8; e = e[8:] {
		if binary.LittleEndian.Uint16(e) == aclUser {
			return binary.LittleEndian.Uint32(e[4:])
		}
	}
	return 0
}

// How many jobs' console logs and screenshots are kept, of root and of each other
// user: nobody's push out another's.
const (
	keepReports       = 50
	keepReportsOfUser = 20
)

// dropOldReports removes the oldest: job IDs sort by time.
func (s *Server) dropOldReports() {
	entries, err := os.ReadDir(s.stateDir("reports"))
	if err != nil {
		return // none yet
	}
	of := map[uint32]int{}
	for _, e := range slices.Backward(entries) {
		owner := ownerOf(s.reportDir(e.Name()))
		of[owner]++
		if of[owner] <= keepReportsOfUser || owner == 0 && of[owner] <= keepReports {
			continue
		}
		if _, known := s.jobs.Job(e.Name()); known {
			continue
		}
		if err := os.RemoveAll(s.reportDir(e.Name())); err != nil {
			fmt.Fprintf(os.Stderr, "memlinuxd: %v\n", err)
		}
	}
}
