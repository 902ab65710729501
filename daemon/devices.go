package daemon

import (
	"context"
	"fmt"
	"os"
	"reflect"
	"sync"

	"github.com/godbus/dbus/v5"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/media/blockdev"
)

// deviceList is the disks as the bus last saw them.
type deviceList struct {
	system blockdev.System
	server *Server

	refreshing sync.Mutex // one scan after the other, so that signals come in order
	mu         sync.Mutex
	known      map[string]api.Device
}

func newDeviceList(system blockdev.System, s *Server) *deviceList {
	return &deviceList{system: system, server: s, known: map[string]api.Device{}}
}

func (l *deviceList) get(name string) (api.Device, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	d, ok := l.known[name]
	return d, ok
}

func (l *deviceList) all() []api.Device {
	l.mu.Lock()
	defer l.mu.Unlock()
	list := make([]api.Device, 0, len(l.known))
	for _, d := range l.known {
		list = append(list, d)
	}
	return list
}

// refresh looks at the machine and tells the bus what came, changed and went.
func (l *deviceList) refresh(ctx context.Context) error {
	l.refreshing.Lock()
	defer l.refreshing.Unlock()
	found, err := l.system.Devices(ctx)
	if err != nil {
		return fmt.Errorf("list the disks: %w", err)
	}
	now := map[string]api.Device{}
	for _, d := range found {
		now[d.Name] = apiDevice(d)
	}
	l.mu.Lock()
	before := l.known
	l.known = now
	l.mu.Unlock()

	for name := range before {
		if _, ok := now[name]; !ok {
			l.server.emitRemoved(api.DevicePath(name), api.DeviceInterface)
		}
	}
	for name, d := range now {
		old, ok := before[name]
		switch {
		case !ok:
			l.server.emitAdded(api.DevicePath(name), api.DeviceInterface, d.Properties())
		case !reflect.DeepEqual(old, d):
			l.server.emitChanged(api.DevicePath(name), api.DeviceInterface, d.Properties())
		}
	}
	return nil
}

// watch refreshes the list as disks come and go, until ctx ends. Where the
// kernel's events can't be had (a container), the list is still fresh on every
// Devices and Plan call.
func (l *deviceList) watch(ctx context.Context) {
	events, err := blockdev.Watch(ctx)
	if err != nil {
		fmt.Fprintf(os.Stderr, "memlinuxd: disks are not watched: %v\n", err)
		return
	}
	for range events {
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
		out.Refused = append(out.Refused, api.Reason{Code: r.Code, Text: r.Text})
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
	for _, d := range s.devices.all() {
		paths = append(paths, api.DevicePath(d.Name))
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
	if len(plan.Refused) == 0 {
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
