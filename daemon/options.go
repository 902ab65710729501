package daemon

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/memlinux/memlinux/daemon/api"
)

func invalidOption(format string, args ...any) error {
	return &api.Error{Name: api.ErrInvalidOption, Message: fmt.Sprintf(format, args...)}
}

// options reads the a{sv} that ends every method. The first error stays; end
// reports it, or a key that nobody has asked for.
type options struct {
	call  *call
	left  api.Properties
	known []string
	files []*os.File // taken, to be closed if the call fails
	err   error
}

func (c *call) options() *options {
	given := c.args[len(c.args)-1].(map[string]dbus.Variant)
	left := api.Properties{}
	for k, v := range given {
		left[k] = v
	}
	return &options{call: c, left: left}
}

// take removes the option from what is left and gives its value.
func (o *options) take(key string) (any, bool) {
	o.known = append(o.known, key)
	v, ok := o.left[key]
	delete(o.left, key)
	return v.Value(), ok
}

func (o *options) fail(format string, args ...any) {
	if o.err == nil {
		o.err = invalidOption(format, args...)
	}
}

// get is the option's value, or the zero value where it is not given.
func get[T any](o *options, key string) T {
	var zero T
	v, ok := o.take(key)
	if !ok {
		return zero
	}
	t, ok := v.(T)
	if !ok {
		o.fail("option %q must be of the D-Bus type %s, not %s", key, dbus.SignatureOf(zero), dbus.SignatureOf(v))
	}
	return t
}

// boolean is the option's value, or standard where it is not given.
func (o *options) boolean(key string, standard bool) bool {
	if _, ok := o.left[key]; !ok {
		o.known = append(o.known, key)
		return standard
	}
	return get[bool](o, key)
}

// oneOf is a string option that must be one of the values; the first is the
// standard.
func (o *options) oneOf(key string, values ...string) string {
	s := get[string](o, key)
	if s == "" {
		return values[0]
	}
	if !slices.Contains(values, s) {
		o.fail("option %q is %q; it can be %s", key, s, strings.Join(values, ", "))
	}
	return s
}

// own takes the descriptor out of the call, if it is what is wanted; what names
// it in an error.
func (o *options) own(v any, want kind, what string) *os.File {
	fd, ok := v.(dbus.UnixFDIndex)
	if !ok {
		o.fail("%s must be of the D-Bus type h, not %s", what, dbus.SignatureOf(v))
		return nil
	}
	if o.err != nil {
		return nil // nobody will want it
	}
	f, err := o.call.take(fd)
	if err != nil {
		o.err = err
		return nil
	}
	if err := examine(f, want, o.call.uid, o.call.looks); err != nil {
		o.call.looks.Go(func() { f.Close() }) // which may wait, too
		o.fail("%s: %v", what, err)
		return nil
	}
	o.files = append(o.files, f)
	return f
}

// argument takes the descriptor that is the call's first argument.
func (o *options) argument(want kind) *os.File {
	return o.own(o.call.args[0], want, "the descriptor argument")
}

// file is an option with a regular file to be read, nil where it is not given.
func (o *options) file(key string) *os.File { return o.fileOf(key, toBeRead) }

// stream is an option with what is read once, nil where it is not given.
func (o *options) stream(key string) *os.File { return o.fileOf(key, toBeStreamed) }

func (o *options) fileOf(key string, want kind) *os.File {
	v, ok := o.take(key)
	if !ok {
		return nil
	}
	return o.own(v, want, fmt.Sprintf("option %q", key))
}

// fileMap is an a{sv} option whose values are descriptors.
func (o *options) fileMap(key string, want kind) map[string]*os.File {
	files := map[string]*os.File{}
	for name, v := range get[map[string]dbus.Variant](o, key) {
		if f := o.own(v.Value(), want, fmt.Sprintf("option %q: %q", key, name)); f != nil {
			files[name] = f
		}
	}
	return files
}

// epoch is the time of every file in the result, zero where it is not given.
func (o *options) epoch() time.Time {
	if _, ok := o.left[api.OptSourceDateEpoch]; !ok {
		o.known = append(o.known, api.OptSourceDateEpoch)
		return time.Time{}
	}
	seconds := get[uint64](o, api.OptSourceDateEpoch)
	if seconds > 1<<32-1 {
		// The cpio header holds 32 bits.
		o.fail("option %q is %d; it must be before the year 2106", api.OptSourceDateEpoch, seconds)
		return time.Time{}
	}
	return time.Unix(int64(seconds), 0).UTC()
}

// end says whether all options were understood; if not, what was taken is
// closed.
func (o *options) end() error {
	if o.err == nil && len(o.left) > 0 {
		var unknown []string
		for k := range o.left {
			unknown = append(unknown, fmt.Sprintf("%q", k))
		}
		slices.Sort(unknown)
		known := "there are none"
		if len(o.known) > 0 {
			known = "known are " + strings.Join(o.known, ", ")
		}
		o.fail("unknown option %s; %s", strings.Join(unknown, ", "), known)
	}
	if o.err != nil {
		closeAll(o.files)
	}
	return o.err
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}
