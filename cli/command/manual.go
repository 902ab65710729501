package command

import "github.com/spf13/cobra"

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
	{exitUnproven, "verification failed: what is on the medium differs, did not boot, or could not be booted here (the write stands)"},
	{exitCancelled, "cancelled (Ctrl-C), and nothing of it runs any more"},
}
