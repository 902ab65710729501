package command

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/memlinux/memlinux/daemon/api"
)

// finalEvent is the last object of --json.
type finalEvent struct {
	Event   string      `json:"event"`
	Job     string      `json:"job,omitempty"`
	State   string      `json:"state"`
	Exit    int         `json:"exit"`
	Error   string      `json:"error,omitempty"`
	Message string      `json:"message,omitempty"`
	Output  string      `json:"output,omitempty"` // the file or folder that was made
	Report  *api.Report `json:"report,omitempty"`
}

func printJSONReport(w io.Writer, j api.Job, output string, err error) error {
	e := finalEvent{Event: "report", Job: j.ID, State: j.State, Exit: exitCode(err), Output: output, Report: j.Report}
	if e.State == "" || err != nil && e.State == api.StateSucceeded {
		e.State = api.StateFailed // what came before or after the job failed
	}
	if err != nil {
		e.Error, e.Message = api.ErrorName(err), err.Error()
	}
	return json.NewEncoder(w).Encode(e)
}

// printReport prints a report for people. output is the file or folder that
// was made.
func printReport(w io.Writer, r *api.Report, output string) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(key, format string, args ...any) { fmt.Fprintf(t, "%s\t%s\n", key, fmt.Sprintf(format, args...)) }
	if r.Resumed != "" {
		row("resumed", "the write of job %s", r.Resumed)
	}
	if s := r.System; s != nil {
		row("system", "build %s, Linux %s (%s), initramfs %s", s.ID, s.KernelRelease, size(s.KernelSize), size(s.InitramfsSize))
		row("memory", "at least %d MiB, with UEFI %d MiB", s.MemoryBIOS, s.MemoryUEFI)
	}
	switch {
	case r.Target != nil && r.Target.Kind == "device":
		row("device", "%s", strings.Join(nonEmpty("/dev/"+r.Target.Name, r.Target.Model, serial(r.Target.Serial), r.Target.Transport, size(r.Target.Size),
			fmt.Sprintf("%d-byte sectors", r.Target.SectorSize)), ", "))
	case r.Target != nil && output != "":
		row("file", "%s, %s", output, size(r.Target.Size))
	case output != "":
		row("written to", "%s", output)
	}
	if im := r.Image; im != nil {
		switch {
		case im.Source != nil:
			rowsOfSource(im, row)
		case len(im.Extents) > 0:
			row("image", "%s in %d extents, volume %s", size(im.Bytes), len(im.Extents), im.VolumeID)
		default:
			row("image", "partition table, file system and %s of files are as they were written, volume %s", size(im.Bytes), im.VolumeID)
		}
		if im.SHA256Written != "" && im.Source == nil {
			row("", "sha256 %s", im.SHA256Written)
		}
		if im.Unchanged > 0 {
			row("", "%s were so already, %s were written", size(im.Unchanged), size(im.Written))
		}
		meant := im.SHA256Planned
		if im.Source != nil {
			meant = im.SHA256Written
		}
		switch im.SHA256Read {
		case "":
		case meant:
			row("read back", "the same, from the medium")
		default:
			row("read back", "DIFFERENT: sha256 %s", im.SHA256Read)
		}
	}
	if c := r.Capacity; c != nil {
		switch c.Fault {
		case "":
			row("capacity", "%s, as it says (%d places hold what they are given); its content is as it was", size(c.Real), c.Places)
		default:
			row("capacity", "%s, and it says %s: %s from byte %d on", size(c.Real), size(c.Claimed), c.Fault, c.At)
		}
	}
	if r.Entry != nil {
		rowsOfEntry(r.Kind, r.Entry, row)
	}
	for _, b := range r.Boots {
		name := "boot " + strings.ToUpper(b.Firmware)
		switch {
		case b.Skipped:
			row(name, "left out: %s", b.Reason)
		case !b.OK:
			row(name, "FAILED: %s", b.Reason)
		case b.Reached != "":
			row(name, "OK, seen as far as the %s: %s(%s)", b.Reached, seenAfter("boot loader", b.GRUB)+seenAfter("kernel", b.Kernel), b.Accel)
		default:
			row(name, "OK: GRUB %.1f s, kernel %.1f s, ready %.1f s (%s, %d MiB)", b.GRUB, b.Kernel, b.Ready, b.Accel, b.RAM)
		}
		if b.ConsoleLog != "" {
			row("", "%s", b.ConsoleLog)
		}
		if b.Screenshot != "" {
			row("", "%s", b.Screenshot)
		}
	}
	for _, warning := range r.Warnings {
		row("warning", "%s", warning)
	}
	row("took", "%.1f s", r.Seconds)
	_ = t.Flush() // the terminal is gone if this fails
	if r.Entry != nil && r.Entry.DryRun {
		for _, f := range r.Entry.Changes {
			fmt.Fprint(w, f.Diff)
		}
	}
}

func nonEmpty(parts ...string) []string {
	var out []string
	for _, p := range parts {
		if p != "" {
			out = append(out, p)
		}
	}
	return out
}

func serial(s string) string {
	if s == "" {
		return ""
	}
	return "serial " + s
}
