package systemd

import (
	"fmt"
	"os"

	"github.com/coreos/go-systemd/v22/journal"
)

// Priority is how urgent an entry of the journal is (syslog(3)).
type Priority = journal.Priority

// The priorities that are used.
const (
	Error   = journal.PriErr
	Warning = journal.PriWarning
	Notice  = journal.PriNotice
	Info    = journal.PriInfo
)

// Entry is an entry of the journal.
type Entry struct {
	Message  string // a line for people
	Priority Priority
	// ID is the MESSAGE_ID that all entries of this kind have, 32 hexadecimal
	// digits (systemd.journal-fields(7)).
	ID string
	// Fields are more for programs: names of capitals, digits and underscores to
	// their values, of which empty ones are left out.
	Fields map[string]string
}

// Journal writes entries into the journal, or, where standard error does not lead
// there, as lines on standard error. Nothing is written twice.
type Journal struct{ structured bool }

// OpenJournal looks where standard error leads (JOURNAL_STREAM, systemd.exec(5)).
func OpenJournal() Journal {
	structured, err := journal.StderrIsJournalStream()
	return Journal{structured: err == nil && structured}
}

// Write writes the entry. One that can't be had by the journal becomes a line.
func (j Journal) Write(e Entry) {
	if j.structured {
		fields := map[string]string{"SYSLOG_IDENTIFIER": "memlinuxd"}
		if e.ID != "" {
			fields["MESSAGE_ID"] = e.ID
		}
		for name, value := range e.Fields {
			if value != "" {
				fields[name] = value
			}
		}
		if journal.Send(e.Message, e.Priority, fields) == nil {
			return
		}
	}
	fmt.Fprintf(os.Stderr, "memlinuxd: %s\n", e.Message)
}
