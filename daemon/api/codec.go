package api

import (
	"encoding/json"
	"fmt"

	"github.com/godbus/dbus/v5"
)

// Properties is a dictionary of the bus, a{sv}.
type Properties = map[string]dbus.Variant

type wireContent struct {
	Name  string
	Size  uint64
	Type  string
	Label string
}

type wireReason struct {
	Code, Text string
	Soft       bool
}

// wireMount has the mount point as bytes: a string of the bus must be UTF-8.
type wireMount struct {
	Device string
	Point  []byte
	Type   string
	ByUser bool
}

func contentsToWire(cs []Content) []wireContent {
	w := make([]wireContent, len(cs))
	for i, c := range cs {
		w[i] = wireContent{c.Name, uint64(c.Size), c.Type, c.Label}
	}
	return w
}

func reasonsToWire(rs []Reason) []wireReason {
	w := make([]wireReason, len(rs))
	for i, r := range rs {
		w[i] = wireReason(r)
	}
	return w
}

// load stores the value of key in dst; a missing key leaves dst as it is.
func load(p Properties, key string, dst any) error {
	v, ok := p[key]
	if !ok {
		return nil
	}
	if err := dbus.Store([]any{v.Value()}, dst); err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	return nil
}

type field struct {
	key string
	dst any
}

func loadAll(p Properties, fields ...field) error {
	for _, f := range fields {
		if err := load(p, f.key, f.dst); err != nil {
			return err
		}
	}
	return nil
}

func loadContents(p Properties, key string) ([]Content, error) {
	var w []wireContent
	if err := load(p, key, &w); err != nil {
		return nil, err
	}
	var cs []Content
	for _, c := range w {
		cs = append(cs, Content{c.Name, int64(c.Size), c.Type, c.Label})
	}
	return cs, nil
}

func loadReasons(p Properties, key string) ([]Reason, error) {
	var w []wireReason
	if err := load(p, key, &w); err != nil {
		return nil, err
	}
	var rs []Reason
	for _, r := range w {
		rs = append(rs, Reason(r))
	}
	return rs, nil
}

// Properties gives the device as the bus shows it.
func (d Device) Properties() Properties {
	return Properties{
		"Name":       dbus.MakeVariant(d.Name),
		"Path":       dbus.MakeVariant(d.Path),
		"Size":       dbus.MakeVariant(uint64(d.Size)),
		"SectorSize": dbus.MakeVariant(uint32(d.SectorSize)),
		"Vendor":     dbus.MakeVariant(d.Vendor),
		"Model":      dbus.MakeVariant(d.Model),
		"Serial":     dbus.MakeVariant(d.Serial),
		"Transport":  dbus.MakeVariant(d.Transport),
		"Removable":  dbus.MakeVariant(d.Removable),
		"ReadOnly":   dbus.MakeVariant(d.ReadOnly),
		"Contents":   dbus.MakeVariant(contentsToWire(d.Contents)),
		"Refused":    dbus.MakeVariant(reasonsToWire(d.Refused)),

		"Interrupted": dbus.MakeVariant(d.Interrupted),
	}
}

// DeviceFrom reads what [Device.Properties] made.
func DeviceFrom(p Properties) (d Device, err error) {
	var size uint64
	var sector uint32
	if err := loadAll(p, field{"Name", &d.Name}, field{"Path", &d.Path}, field{"Size", &size}, field{"SectorSize", &sector},
		field{"Vendor", &d.Vendor}, field{"Model", &d.Model}, field{"Serial", &d.Serial}, field{"Transport", &d.Transport},
		field{"Removable", &d.Removable}, field{"ReadOnly", &d.ReadOnly}, field{"Interrupted", &d.Interrupted}); err != nil {
		return Device{}, fmt.Errorf("device: %w", err)
	}
	d.Size, d.SectorSize = int64(size), int(sector)
	if d.Contents, err = loadContents(p, "Contents"); err != nil {
		return Device{}, fmt.Errorf("device: %w", err)
	}
	if d.Refused, err = loadReasons(p, "Refused"); err != nil {
		return Device{}, fmt.Errorf("device: %w", err)
	}
	return d, nil
}

// Dictionary gives the plan as the Plan method returns it.
func (p Plan) Dictionary() Properties {
	return Properties{
		"token":   dbus.MakeVariant(p.Token),
		"refused": dbus.MakeVariant(reasonsToWire(p.Refused)),
		"mounts":  dbus.MakeVariant(mountsToWire(p.Mounts)),
		"erases":  dbus.MakeVariant(contentsToWire(p.Erases)),

		"interrupted": dbus.MakeVariant(p.Interrupted),
		"agreed":      dbus.MakeVariant(p.Agreed),
	}
}

func mountsToWire(ms []Mount) []wireMount {
	w := make([]wireMount, len(ms))
	for i, m := range ms {
		w[i] = wireMount{m.Device, []byte(m.Point), m.Type, m.ByUser}
	}
	return w
}

// PlanFrom reads what [Plan.Dictionary] made.
func PlanFrom(p Properties) (plan Plan, err error) {
	if err := loadAll(p, field{"token", &plan.Token}, field{"interrupted", &plan.Interrupted}, field{"agreed", &plan.Agreed}); err != nil {
		return Plan{}, fmt.Errorf("plan: %w", err)
	}
	if plan.Refused, err = loadReasons(p, "refused"); err != nil {
		return Plan{}, fmt.Errorf("plan: %w", err)
	}
	var mounts []wireMount
	if err := load(p, "mounts", &mounts); err != nil {
		return Plan{}, fmt.Errorf("plan: %w", err)
	}
	for _, m := range mounts {
		plan.Mounts = append(plan.Mounts, Mount{m.Device, string(m.Point), m.Type, m.ByUser})
	}
	if plan.Erases, err = loadContents(p, "erases"); err != nil {
		return Plan{}, fmt.Errorf("plan: %w", err)
	}
	return plan, nil
}

// Properties gives the job as the bus shows it.
func (j Job) Properties() Properties {
	return Properties{
		"Id":         dbus.MakeVariant(j.ID),
		"Kind":       dbus.MakeVariant(j.Kind),
		"Owner":      dbus.MakeVariant(j.Owner),
		"Cancelable": dbus.MakeVariant(j.Cancelable),
		"State":      dbus.MakeVariant(j.State),
		"Phase":      dbus.MakeVariant(j.Phase),
		"Progress":   dbus.MakeVariant(j.Progress),
		"Bytes":      dbus.MakeVariant(j.Bytes),
		"Total":      dbus.MakeVariant(j.Total),
		"Rate":       dbus.MakeVariant(j.Rate),
		"Unit":       dbus.MakeVariant(j.Unit),
		"Message":    dbus.MakeVariant(j.Message),
		"Result":     dbus.MakeVariant(j.Result()),
	}
}

// ForOthers is the job as those may see it who are neither its owner nor root:
// without its report, which quotes boot files and says where logs lie, and without
// why it failed, which may quote a console, a compiler or what its owner gave.
func (j Job) ForOthers() Job {
	j.Report = nil
	switch j.State {
	case StateFailed:
		j.Message = "failed during " + j.Phase + "; its owner and root are told why"
	case StateCancelled:
		j.Message = "cancelled during " + j.Phase
	default:
		j.Message = ""
	}
	return j
}

// Result is the job's Result property: empty while it runs, afterwards its
// report and the name of the error that ended it, where there are such.
func (j Job) Result() Properties {
	r := Properties{}
	if j.State == StateRunning {
		return r
	}
	if j.Error != "" {
		r[ResultError] = dbus.MakeVariant(j.Error)
	}
	if j.Report != nil {
		// A Report is plain data: it can't fail to marshal.
		text, _ := json.Marshal(j.Report)
		r[ResultReport] = dbus.MakeVariant(string(text))
	}
	return r
}

// Update stores in j what p holds; keys that p lacks stay as they are, so that
// it serves GetAll and PropertiesChanged alike.
func (j *Job) Update(p Properties) error {
	var result Properties
	if err := loadAll(p, field{"Id", &j.ID}, field{"Kind", &j.Kind}, field{"Owner", &j.Owner}, field{"Cancelable", &j.Cancelable},
		field{"State", &j.State}, field{"Phase", &j.Phase}, field{"Progress", &j.Progress}, field{"Bytes", &j.Bytes},
		field{"Total", &j.Total}, field{"Rate", &j.Rate}, field{"Unit", &j.Unit}, field{"Message", &j.Message}, field{"Result", &result}); err != nil {
		return fmt.Errorf("job: %w", err)
	}
	var text string
	if err := loadAll(result, field{ResultError, &j.Error}, field{ResultReport, &text}); err != nil {
		return fmt.Errorf("job: %w", err)
	}
	if text == "" {
		return nil
	}
	j.Report = new(Report)
	if err := json.Unmarshal([]byte(text), j.Report); err != nil {
		return fmt.Errorf("job: report: %w", err)
	}
	return nil
}

// Properties gives an entry of ours as the bus shows it.
func (e BootEntry) Properties() Properties {
	return Properties{
		"Id":      dbus.MakeVariant(e.ID),
		"Title":   dbus.MakeVariant(e.Title),
		"Cmdline": dbus.MakeVariant(e.Cmdline),
		"Default": dbus.MakeVariant(e.Default),
		"Next":    dbus.MakeVariant(e.Next),
	}
}

// Dictionary gives the menu as the BootMenu method returns it.
func (m BootMenu) Dictionary() Properties {
	return Properties{
		"loader":    dbus.MakeVariant(m.Loader),
		"firmware":  dbus.MakeVariant(m.Firmware),
		"directory": dbus.MakeVariant(m.Directory),
		"entries":   dbus.MakeVariant(append([]BootEntry{}, m.Entries...)),
		"warnings":  dbus.MakeVariant(append([]string{}, m.Warnings...)),
	}
}

// BootMenuFrom reads what [BootMenu.Dictionary] made.
func BootMenuFrom(p Properties) (m BootMenu, err error) {
	if err := loadAll(p, field{"loader", &m.Loader}, field{"firmware", &m.Firmware}, field{"directory", &m.Directory},
		field{"entries", &m.Entries}, field{"warnings", &m.Warnings}); err != nil {
		return BootMenu{}, fmt.Errorf("boot menu: %w", err)
	}
	return m, nil
}
