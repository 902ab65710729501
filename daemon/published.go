package daemon

import (
	"reflect"
	"sync"

	"github.com/godbus/dbus/v5"

	"github.com/memlinux/memlinux/daemon/api"
)

// published is the objects of one interface as the bus last saw them, by name.
type published[T interface{ Properties() api.Properties }] struct {
	server *Server
	iface  string
	path   func(name string) dbus.ObjectPath

	setting sync.Mutex // one change after the other, so that signals come in order
	mu      sync.Mutex
	known   map[string]T
}

func (p *published[T]) get(name string) (T, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	v, ok := p.known[name]
	return v, ok
}

func (p *published[T]) all() map[dbus.ObjectPath]api.Properties {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := map[dbus.ObjectPath]api.Properties{}
	for name, v := range p.known {
		all[p.path(name)] = v.Properties()
	}
	return all
}

// refresh reads the objects anew and tells the bus what came, changed and went.
func (p *published[T]) refresh(read func() (map[string]T, error)) error {
	p.setting.Lock()
	defer p.setting.Unlock()
	now, err := read()
	if err != nil {
		return err
	}
	p.mu.Lock()
	before := p.known
	p.known = now
	p.mu.Unlock()

	for name := range before {
		if _, ok := now[name]; !ok {
			p.server.emitRemoved(p.path(name), p.iface)
		}
	}
	for name, v := range now {
		old, ok := before[name]
		switch {
		case !ok:
			p.server.emitAdded(p.path(name), p.iface, v.Properties())
		case !reflect.DeepEqual(old, v):
			p.server.emitChanged(p.path(name), p.iface, v.Properties())
		}
	}
	return nil
}
