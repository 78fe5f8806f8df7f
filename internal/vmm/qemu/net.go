package qemu

import (
	"context"
	"fmt"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/network"
	"github.com/tinevm/tine/internal/vmm"
)

// network gives the machine its network card, if it has one. It comes after all
// other devices, so that theirs is the same layout with it and without.
//
// The card has no ROM, as nothing boots from it, and one queue. QEMU itself
// moves packets: vhost would need another device of the host's. And a restored
// guest is not asked to announce itself to the link, where nobody else is.
func (l *launcher) network() {
	if !l.spec.Machine.Net {
		return
	}
	l.args = append(l.args,
		"-netdev", fmt.Sprintf("tap,id=net,fd=%d,vhost=off", l.give(l.tap)),
		"-device", fmt.Sprintf("virtio-net-pci,netdev=net,mac=%s,romfile=,mq=off,guest_announce=off", vmm.GuestNet().GuestMAC),
	)
}

// takeCell takes a cell for a jailed machine, and the tap of its network if it
// has a card.
func (l *launcher) takeCell(ctx context.Context) (err error) {
	switch {
	case l.spec.Machine.Net && !l.engine.Caps().Net:
		return l.engine.errNoNetwork()
	case l.engine.jail == nil:
		return nil
	}
	if l.cell, err = l.engine.jail.Take(ctx, l.spec.Machine.Net); err != nil {
		return err
	}
	if l.spec.Machine.Net {
		l.tap, l.link = l.cell.Link()[0], l.cell.Link()[1:]
	}
	return nil
}

func (e *Engine) errNoNetwork() error {
	err := fmt.Errorf("%w: a network card for a machine without a jail", errdef.ErrUnsupported)
	if e.jail != nil {
		err = fmt.Errorf("%w: a network card: %w", errdef.ErrUnsupported, e.jail.Level().NoLink)
	}
	return errdef.WithHint(err, "tine doctor says what this host lacks for it")
}

// Link opens the sockets that hear the guest. They are taken from QEMU, which has
// them for as long as it lives, so that any later daemon finds them there.
func (m *machine) Link() (vmm.Link, error) {
	if len(m.handle.Link) == 0 {
		return nil, fmt.Errorf("%w: machine in %s has no network card", errdef.ErrUnsupported, m.handle.Dir)
	}
	select {
	case <-m.done: // its PID may be another process's
		return nil, m.ended(nil)
	default:
	}
	link, err := network.Recover(m.handle.PID, m.handle.Link)
	if err != nil {
		return nil, m.ended(err)
	}
	return link, nil
}
