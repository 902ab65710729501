package daemon

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync/atomic"

	"github.com/godbus/dbus/v5"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/media/blockdev"
)

// deviceList is the disks as the bus last saw them. They are looked at first when
// somebody asks: that takes time, and wakes those that sleep.
type deviceList struct {
	published[api.Device]
	system blockdev.System
	again  chan struct{} // asks the watch to look once more
	looked atomic.Bool
}

func newDeviceList(system blockdev.System, s *Server) *deviceList {
	return &deviceList{published: published[api.Device]{server: s, iface: api.DeviceInterface, path: api.DevicePath}, system: system, again: make(chan struct{}, 1)}
}

func (l *deviceList) get(name string) (api.Device, bool) {
	l.look()
	return l.published.get(name)
}

func (l *deviceList) all() map[dbus.ObjectPath]api.Properties {
	l.look()
	return l.published.all()
}

func (l *deviceList) look() {
	if l.looked.Load() {
		return
	}
	if err := l.refresh(l.server.ctx); err != nil && l.server.ctx.Err() == nil {
		fmt.Fprintf(os.Stderr, "memlinuxd: %v\n", err)
	}
}

// refresh looks at the machine and tells the bus what came, changed and went.
func (l *deviceList) refresh(ctx context.Context) error {
	return l.published.refresh(func() (map[string]api.Device, error) {
		found, err := l.system.Devices(ctx)
		if err != nil {
			return nil, fmt.Errorf("list the disks: %w", err)
		}
		now := map[string]api.Device{}
		for _, d := range found {
			shown := apiDevice(d)
			if job, _, void := l.server.interrupted(ctx, d); void {
				shown.Interrupted = job
			}
			now[d.Name] = shown
		}
		l.looked.Store(true)
		return now, nil
	})
}

// lookAgain has the list refreshed soon.
func (l *deviceList) lookAgain() {
	select {
	case l.again <- struct{}{}:
	default: // it will be already
	}
}

// watch refreshes the list as disks come and go, and when lookAgain asks for it,
// until ctx ends. Where the kernel's events can't be had (a container), the list
// is still fresh on every Devices and Plan call.
func (l *deviceList) watch(ctx context.Context) {
	events, err := blockdev.Watch(ctx)
	if err != nil {
		fmt.Fprintf(os.Stderr, "memlinuxd: disks are not watched: %v\n", err)
		events = nil
	}
	for {
		select {
		case _, ok := <-events:
			if !ok {
				return
			}
		case <-l.again:
		case <-ctx.Done():
			return
		}
		if err := l.refresh(ctx); err != nil && ctx.Err() == nil {
			fmt.Fprintf(os.Stderr, "memlinuxd: %v\n", err)
		}
	}
}

func apiDevice(d blockdev.Device) api.Device {
	out := api.Device{Name: d.Name, Path: d.Path, Size: d.Size, SectorSize: d.LogicalBlockSize, Vendor: d.Vendor, Model: d.Model,
		Serial: d.Serial, Transport: d.Transport, Removable: d.Removable, ReadOnly: d.ReadOnly}
	for _, c := range d.Contents {
		out.Contents = append(out.Contents, api.Content{Name: c.Name, Size: c.Size, Type: c.Type, Label: c.Label})
	}
	for _, r := range d.Reasons {
		out.Refused = append(out.Refused, api.Reason{Code: r.Code, Text: r.Text, Soft: r.Soft})
	}
	return out
}

// lookUp finds the device behind an object path, partitions too: their refusal
// says which disk to use.
func (s *Server) lookUp(ctx context.Context, path dbus.ObjectPath) (blockdev.Device, error) {
	name, ok := api.DeviceName(path)
	if !ok {
		return blockdev.Device{}, &api.Error{Name: api.ErrNoSuchDevice, Message: fmt.Sprintf("%s is not the path of a device; list them with GetManagedObjects", path)}
	}
	select {
	case s.looks <- struct{}{}:
		defer func() { <-s.looks }()
	case <-ctx.Done():
		return blockdev.Device{}, ctx.Err()
	}
	return s.devices.system.Device(ctx, name)
}

func (s *Server) listDevices(c *call) ([]any, error) {
	if err := c.options().end(); err != nil {
		return nil, err
	}
	if err := s.devices.refresh(c.ctx); err != nil {
		return nil, err
	}
	paths := []dbus.ObjectPath{}
	for path := range s.devices.all() {
		paths = append(paths, path)
	}
	return []any{paths}, nil
}

func (s *Server) plan(c *call) ([]any, error) {
	if err := c.options().end(); err != nil {
		return nil, err
	}
	d, err := s.lookUp(c.ctx, c.args[0].(dbus.ObjectPath))
	if err != nil {
		return nil, err
	}
	shown := apiDevice(d)
	plan := api.Plan{Refused: shown.Refused, Erases: shown.Contents}
	if job, surely, void := s.interrupted(c.ctx, d); surely || void {
		plan.Interrupted, plan.Agreed = job, surely && void
	}
	mounts, err := s.devices.system.Mounts(c.ctx, d.Name)
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		plan.Mounts = append(plan.Mounts, api.Mount{Device: m.Device, Point: m.Point, Type: m.FSType, ByUser: m.ByUser})
	}
	lasting := func(r api.Reason) bool { return !r.Soft && r.Code != api.ReasonMounted }
	if !slices.ContainsFunc(plan.Refused, lasting) {
		if plan.Token, err = s.token(c.ctx, d.Name); err != nil {
			return nil, err
		}
	}
	return []any{plan.Dictionary()}, nil
}

// token pins the device as it is now.
func (s *Server) token(ctx context.Context, name string) (string, error) {
	f, d, err := s.devices.system.OpenRead(ctx, name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return d.Token(f)
}
