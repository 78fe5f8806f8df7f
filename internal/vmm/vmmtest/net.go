package vmmtest

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// refusesNetwork: a tap is given if the shape says so, and is one.
func (h *harness) refusesNetwork(t *testing.T) {
	h.networks(t, func(net bool, nic *os.File) (vmm.VM, error) {
		spec := vmm.StartSpec{Common: h.common(t), Boot: h.Boot}
		spec.Machine.Net, spec.NIC = net, nic
		return h.Engine.Start(within(t, time.Minute), spec)
	})
}

func (h *harness) restoreRefusesNetwork(t *testing.T) {
	h.networks(t, func(net bool, nic *os.File) (vmm.VM, error) {
		spec := h.restoreSpec(t)
		spec.Machine.Net, spec.NIC = net, nic
		return h.Engine.Restore(within(t, time.Minute), spec)
	})
}

func (h *harness) networks(t *testing.T, bring func(net bool, nic *os.File) (vmm.VM, error)) {
	null := open(t, os.DevNull)
	for name, tc := range map[string]struct {
		net bool
		nic *os.File
	}{
		"no tap": {true, nil}, "no card": {false, null}, "no tap but a file": {true, null},
	} {
		want := errdef.ErrInvalid
		switch {
		case tc.net && h.Engine.Name() == "fake":
			continue // it needs no tap
		case tc.net && !h.Engine.Caps().Net:
			want = errdef.ErrUnsupported
		}
		if vm, err := bring(tc.net, tc.nic); !errors.Is(err, want) {
			t.Errorf("%s: vm %v, error %v, want %v", name, vm, err, want)
		}
	}
}
