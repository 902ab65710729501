package api

import "github.com/godbus/dbus/v5"

// Check is one thing that making and proving a system needs of this machine, and
// how it is with it.
type Check struct {
	Name  string `json:"name"`
	State string `json:"state"`          // one of the states of a check
	Text  string `json:"text"`           // what was found, without a full stop
	Mend  string `json:"mend,omitempty"` // what to do about it: a command, or a sentence
}

// Dictionary is the check on the bus.
func (c Check) Dictionary() Properties {
	return Properties{
		"Name":  dbus.MakeVariant(c.Name),
		"State": dbus.MakeVariant(c.State),
		"Text":  dbus.MakeVariant(c.Text),
		"Mend":  dbus.MakeVariant(c.Mend),
	}
}

// CheckFrom is the check that [Check.Dictionary] put on the bus.
func CheckFrom(p Properties) (c Check, err error) {
	err = loadAll(p, field{"Name", &c.Name}, field{"State", &c.State}, field{"Text", &c.Text}, field{"Mend", &c.Mend})
	return c, err
}
