package vmm

import "testing"

// TestGuestNet: snapshots hold these addresses, so they never change.
func TestGuestNet(t *testing.T) {
	t.Parallel()
	n := GuestNet()
	if got, want := n.Option(), "tine.net=172.30.0.2/30,172.30.0.1,02:74:69:6e:65:01"; got != want {
		t.Errorf("option %q, want %q", got, want)
	}
	if got, want := n.GuestMAC.String(), "02:74:69:6e:65:02"; got != want {
		t.Errorf("guest's MAC %s, want %s", got, want)
	}
	if !n.Guest.Contains(n.Gateway) || n.Guest.Addr() == n.Gateway {
		t.Errorf("guest %s cannot have gateway %s", n.Guest, n.Gateway)
	}
}
