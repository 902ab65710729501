// Command memlinuxd is memlinux's daemon. It serves the system bus, or with
// --private a bus of its own, whose address it prints.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"

	"github.com/memlinux/memlinux/daemon"
	"github.com/memlinux/memlinux/daemon/config"
	"github.com/memlinux/memlinux/daemon/privatebus"
	"github.com/memlinux/memlinux/systemd"
)

// version is set by the build.
var version = "devel"

// The main goroutine stays on the main thread: what it starts with a parent
// death signal then lives as long as the process.
func init() { runtime.LockOSThread() }

func main() { os.Exit(run()) }

// memoryLimit is where the garbage collector works harder (a soft limit): what
// the daemon streams through compressors is garbage soon, and a service should
// stay small. Measured: a peak of 50 MiB instead of 64 at the first import of
// a kernel's modules, for the same time. GOMEMLIMIT overrides it.
const memoryLimit = 40 << 20

func run() int {
	flags := flag.NewFlagSet("memlinuxd", flag.ContinueOnError)
	configPath := flags.String("config", envOr("MEMLINUX_CONFIG", config.DefaultPath), "the configuration `FILE`")
	private := flags.Bool("private", false, "start a bus of its own, print its address, and serve it until standard input ends")
	showVersion := flags.Bool("version", false, "print the version")
	switch err := flags.Parse(os.Args[1:]); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	case flags.NArg() > 0:
		fmt.Fprintf(os.Stderr, "memlinuxd: unexpected argument %q\n", flags.Arg(0))
		return 2
	case *showVersion:
		fmt.Println(version)
		return 0
	}
	c, err := config.Load(*configPath)
	if err != nil {
		fmt.Fprintf(os.Stderr, "memlinuxd: %v\n", err)
		return 2
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
	// What clients are to read (reports) is readable; all else has its own mode.
	syscall.Umask(0o022)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if *private {
		err = servePrivate(ctx, c)
	} else {
		err = serveSystem(ctx, *configPath, c)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "memlinuxd: %v\n", err)
		return 1
	}
	return 0
}

// serveSystem serves the system bus, and systemd where that runs us.
func serveSystem(ctx context.Context, configPath string, c config.Config) error {
	if !systemd.IsService() {
		return daemon.Serve(ctx, "", daemon.Polkit, c, version, func() error { return nil })
	}
	reloads := make(chan os.Signal, 1)
	signal.Notify(reloads, syscall.SIGHUP)
	return daemon.Serve(ctx, "", daemon.Polkit, c, version, systemd.NotifyReady,
		daemon.AsService(func() (config.Config, error) { return config.Load(configPath) }, reloads))
}

// servePrivate ends when standard input does: its other end is with the one
// command that this bus is for.
func servePrivate(ctx context.Context, c config.Config) error {
	bus, err := privatebus.Start(ctx)
	if err != nil {
		return err
	}
	defer bus.Stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // any end is the end
		cancel()
	}()
	return daemon.Serve(ctx, bus.Address, daemon.RootOnly, c, version, func() error {
		_, err := fmt.Println(bus.Address)
		return err
	})
}

func envOr(key, standard string) string {
	if v := os.Getenv(key); v != "" {
		return v
	}
	return standard
}
