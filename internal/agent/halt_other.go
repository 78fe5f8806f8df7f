//go:build !amd64

package agent

import "github.com/tinevm/tine/internal/errdef"

// machinePorts are the ports of a deterministic machine: so far only those of
// x86 have them.
type machinePorts struct{}

func (machinePorts) knock() error { return failf(errdef.ErrUnsupported, "this machine has no ports") }

func (machinePorts) stop() error { return failf(errdef.ErrUnsupported, "this machine has no ports") }
