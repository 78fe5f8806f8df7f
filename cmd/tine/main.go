// Command tine forks microVMs: it is the daemon and the client of it.
package main

import (
	"context"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"syscall"

	"github.com/tinevm/tine/internal/assemble"
	"github.com/tinevm/tine/internal/cli"
	"github.com/tinevm/tine/internal/forkd"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/jail"
)

func main() {
	switch {
	case slices.Equal(os.Args[1:], assemble.TwinRole()[1:]):
		os.Exit(twin())
	case slices.Equal(os.Args[1:], assemble.LaunchRole()[1:]):
		os.Exit(launch())
	}
	if filepath.Base(os.Args[0]) == "forkd" {
		os.Exit(asForkd())
	}
	os.Exit(run())
}

// twin is this program as the helper of a live branch; see guestmem.Freezer.
func twin() int {
	if err := guestmem.ServeTwin(os.Stdin, os.Stdout); err != nil {
		return 1 // it has been told to whoever started us
	}
	return 0
}

// launch is this program as the launcher of a jailed machine; see package jail.
func launch() int {
	if err := jail.Serve(); err != nil {
		return 1 // it has been told to whoever started us
	}
	return 0
}

// asForkd is this program under the name that forkd's Python SDK starts.
func asForkd() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return forkd.Run(ctx, forkd.Environment{
		Args: os.Args[1:], Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv, Connect: cli.Connect,
	})
}

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return cli.Run(ctx, cli.Environment{
		Args:    os.Args[1:],
		Stdin:   os.Stdin,
		Stdout:  os.Stdout,
		Stderr:  os.Stderr,
		Getenv:  os.Getenv,
		Version: version(),
		Deps:    assemble.Parts{Version: version()}.Deps(),
	})
}

// version is what the Go tool stamped into this program.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "devel"
	}
	return info.Main.Version
}
