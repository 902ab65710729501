package daemon

import (
	"context"
	"fmt"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/jobs"
	"github.com/memlinux/memlinux/media"
)

const phaseCapacity = "capacity"

// checkCapacity finds out whether a disk holds what it says, and leaves its
// content as it is.
func (s *Server) checkCapacity(c *call) ([]any, error) {
	o := c.options()
	terms := termsOf(o)
	if err := o.end(); err != nil {
		return nil, err
	}
	dev, disk, err := s.openDevice(c, terms)
	if err != nil {
		return nil, err
	}
	ret, err := s.start(c, api.KindCapacity, []jobs.Phase{{Name: phaseCapacity, Weight: 1}}, nil, func(ctx context.Context, j *jobs.Job) (*api.Report, error) {
		defer disk.Close()
		report := &api.Report{Kind: api.KindCapacity, Target: deviceTarget(dev)}
		j.Begin(phaseCapacity)
		found, err := media.ProbeCapacity(ctx, disk, disk.Size())
		if err != nil {
			return report, err
		}
		report.Capacity = &api.Capacity{Claimed: found.Claimed, Real: found.Real, Fault: string(found.Fault), At: found.At, Places: found.Places}
		if !found.Genuine() {
			return report, &api.Error{Name: api.ErrVerification,
				Message: fmt.Sprintf("%s says that it holds %d MiB and holds %d (%s from byte %d on): it is a fake or faulty, return it", dev.Path, found.Claimed>>20, found.Real>>20, found.Fault, found.At)}
		}
		report.Verified = true
		return report, nil
	})
	if err != nil {
		disk.Close()
	}
	return ret, err
}
