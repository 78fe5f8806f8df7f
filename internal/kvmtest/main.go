// Command kvmtest is the first process of an outer guest: an emulated machine
// with a /dev/kvm, in which tests that need KVM run on hosts that have none.
//
// It brings the machine up, runs the test programs that the plan on its disk
// names, and reports over a port of its own what came of each. The tests of
// this package are the other side: they make the disk, start the machine and
// judge what it reports.
package main

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// The ways to start this program. The kernel starts it without arguments.
const (
	modeInit = "init" // again, in the root on the disk
	modeRun  = "run"  // the plan, as a child of the former
)

func main() {
	mode := ""
	if len(os.Args) > 1 {
		mode = os.Args[1]
	}
	if err := start(context.Background(), mode); err != nil {
		fmt.Fprintln(os.Stderr, "kvmtest:", err)
		if os.Getpid() != 1 {
			os.Exit(1) //nolint:forbidigo // this is main
		}
	}
	if os.Getpid() == 1 {
		unix.Sync()
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) // if it fails, PID 1 ends, and that ends the machine too
	}
}

func start(ctx context.Context, mode string) error {
	switch mode {
	case modeInit:
		return initialise(ctx)
	case modeRun:
		return runPlan(ctx)
	default:
		if os.Getpid() != 1 {
			return fmt.Errorf("this is the first process of a machine, and no program to run by hand")
		}
		return enterDisk()
	}
}
