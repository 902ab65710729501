// Command memlinux is a thin client of memlinuxd.
package main

import (
	"os"

	"github.com/memlinux/memlinux/cli/command"
)

func main() { os.Exit(command.Main()) }
