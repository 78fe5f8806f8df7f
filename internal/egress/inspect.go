package egress

import (
	"net"
	"time"
)

// inspect carries a connection to a port of the web, once it has shown for whom
// it is: by the server name of its ClientHello, which is read and not answered,
// or by the Host of each of its requests.
func (r *relay) inspect(v verdict) {
	_ = r.guest.SetReadDeadline(time.Now().Add(r.g.lim.inspect))
	first := make([]byte, 1)
	if _, err := r.guest.Read(first); err != nil {
		r.nothingShown(v)
		return
	}
	guest := &replayed{Conn: r.guest, first: first}
	if first[0] != recordHandshake {
		_ = r.guest.SetReadDeadline(time.Time{})
		r.serveHTTP(guest, v)
		return
	}
	raw, name, err := readHello(guest)
	if err != nil || name == "" {
		if !v.inspect { // it was only for a secret that it was read
			r.carry(raw)
			return
		}
		r.nothingShown(v)
		return
	}
	if v.inspect && !r.showText(name) {
		r.deny(shown(name, r.dst.String()), WrongServerName)
		return
	}
	r.carry(raw)
}

func (r *relay) nothingShown(v verdict) {
	if v.inspect && r.ctx.Err() == nil {
		r.deny(r.dst.String(), NoServerName)
		return
	}
	reset(r.guest)
}

func (r *relay) showText(text string) bool {
	name, err := parseName(text)
	return err == nil && r.show(name)
}

// show says whether the guest may reach what it names, which from now on is the
// ground on which the connection stays.
func (r *relay) show(name string) bool {
	r.g.mu.Lock()
	defer r.g.mu.Unlock()
	if !r.g.policy.allowsName(TCP, name, r.dst.Port()) {
		return false
	}
	r.verdict.names = []string{name}
	return true
}

// shown is the name and address of a denial. The guest chose the name.
func shown(name, address string) string {
	if len(name) > maxName {
		name = name[:maxName]
	}
	return name + " (" + address + ")"
}

// replayed is a connection of which the beginning was read already.
type replayed struct {
	net.Conn
	first []byte
}

// Read is net.Conn's.
func (r *replayed) Read(p []byte) (int, error) {
	if len(r.first) > 0 && len(p) > 0 {
		n := copy(p, r.first)
		r.first = r.first[n:]
		return n, nil
	}
	return r.Conn.Read(p)
}

// CloseWrite tells the guest that no more comes.
func (r *replayed) CloseWrite() error { return closeWrite(r.Conn) }
