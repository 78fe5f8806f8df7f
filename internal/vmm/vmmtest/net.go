package vmmtest

import (
	"errors"
	"net"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// network: a machine has a link if, and only if, it has a network card; and
// closing the link ends the waiting for what comes.
func (h *harness) network(t *testing.T) {
	plain := h.restore(t, h.restoreSpec(t))
	if link, err := plain.Link(); !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("link of a machine without a card: %v, %v", link, err)
	}
	if !h.Engine.Caps().Net {
		return
	}
	spec := vmm.StartSpec{Common: h.common(t), Boot: h.Boot}
	spec.Machine.Net = true
	vm, err := h.Engine.Start(within(t, time.Minute), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kill(t, vm) })
	link, err := vm.Link()
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan error, 1)
	go func() {
		_, _, acceptErr := link.Accept()
		accepted <- acceptErr
	}()
	for range 2 {
		if err := link.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	if err := <-accepted; !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept on a link that is closed: %v", err)
	}
}
