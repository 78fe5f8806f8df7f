package qemu

import (
	"fmt"

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
