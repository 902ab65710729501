package command

import (
	"reflect"
	"strings"

	"github.com/spf13/cobra"

	"github.com/memlinux/memlinux/daemon/api"
)

// Trees are the commands memlinux and memlinux-write with all that they can do,
// for manual pages and shell completions.
func Trees() []*cobra.Command { return []*cobra.Command{newRoot(), newWriteRoot()} }

// ExitCode is how a command ends.
type ExitCode struct {
	Code    int
	Meaning string
}

// ExitCodes are all that there are.
var ExitCodes = []ExitCode{
	{exitDone, "done, and proven where that was asked for"},
	{exitFailed, "failed"},
	{exitUsage, "the command line, the configuration, the recipe or what it names can't be used"},
	{exitRefused, "refused for safety, or because this PC's boot loader can't be given it"},
	{exitNotAllowed, "not authorized"},
	{exitUnproven, "verification failed: what is on the medium differs, did not boot, or could not be booted here. A write that was read back stands; with a wrong sum or read-back the stick is void; a failed install leaves nothing"},
	{exitCancelled, "cancelled (Ctrl-C), and nothing of it runs any more"},
}

// Item is something with a name, and what there is to say of it.
type Item struct{ Name, Text string }

// Environment are the variables that the commands look at.
var Environment = []Item{
	{"SOURCE_DATE_EPOCH", "Seconds since 1970: the time that all files of the system have."},
	{"NO_COLOR", "If it is not empty, doctor prints words in place of colored signs."},
	{"TERM", "If it is dumb, so does doctor, and progress is lines in place of bars."},
	{"DBUS_SYSTEM_BUS_ADDRESS", "The address of another system bus."},
	{"MEMLINUX_*, http_proxy, https_proxy, no_proxy", "Of a memlinuxd that is started for the one command, as with --private: see memlinux.toml(5). The service has an environment of its own. sudo drops all of these but TERM: write them behind it, as in sudo MEMLINUX_MEMORY=1024 memlinux."},
}

// JSONAbout says what --json prints, and JSON the objects of a job.
var (
	JSONAbout = `With --json a command that does a job prints an object a line: progress, and at the
end a report, one for each disk. recipe prints problems and a report. devices, jobs,
entries, doctor and diff print what they list, an object a line; cancel, explain and
version print one object. These have no report, and vm prints no JSON. What is wrong
before a job is asked for is told on stderr only. Sizes are bytes.`

	JSON = []Item{
		{"event progress", fields(progressEvent{}) + ". progress is the whole job's, 0 to 1; bytes and total are the phase's (a total of 0 is not known), rate is per second; unit is bytes, or objects where files are compiled."},
		{"event problem", fields(problemEvent{}) + ". A line of 0 is none."},
		{"event report", fields(finalEvent{}) + ". state is succeeded, failed or cancelled; error is a name like " + api.ErrNoSpace + "; output is the file or folder that was made. What does not apply is left out."},
	}
)

// fields names the fields of a JSON object, and in braces those of objects in it.
func fields(object any) string { return fieldsOf(reflect.TypeOf(object)) }

func fieldsOf(t reflect.Type) string {
	var names []string
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		inner := f.Type
		for inner.Kind() == reflect.Pointer || inner.Kind() == reflect.Slice {
			inner = inner.Elem()
		}
		switch {
		case f.Anonymous:
			name = fieldsOf(inner)
		case inner.Kind() == reflect.Struct:
			name += " {" + fieldsOf(inner) + "}"
		}
		names = append(names, name)
	}
	return strings.Join(names, ", ")
}
