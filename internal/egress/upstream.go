package egress

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/miekg/dns"

	"github.com/tinevm/tine/internal/errdef"
)

const (
	maxUpstream = 8
	// askRounds is how often each server is asked.
	askRounds = 2
)

// ask asks the name servers for the addresses of a name, one after the other,
// until one of them knows or says that there are none.
func (g *Gateway) ask(ctx context.Context, name string) (*dns.Msg, error) {
	servers := g.cfg.Upstream
	if len(servers) == 0 {
		return nil, fmt.Errorf("%w: no name server", errdef.ErrUnavailable)
	}
	ctx, cancel := context.WithTimeout(ctx, g.lim.upstream)
	defer cancel()
	each := g.lim.upstream / time.Duration(askRounds*len(servers))
	var failed error
	for range askRounds {
		for _, server := range servers {
			answer, err := askOne(ctx, server, name, each)
			if err == nil && answer.Rcode != dns.RcodeSuccess && answer.Rcode != dns.RcodeNameError {
				err = fmt.Errorf("%w: %s says %s", errdef.ErrUnavailable, server, dns.RcodeToString[answer.Rcode])
			}
			if err == nil {
				return answer, nil
			}
			failed = err
			if ctx.Err() != nil {
				return nil, failed
			}
		}
	}
	return nil, failed
}

// askOne asks one server by UDP, and again by TCP when the answer is too long.
func askOne(ctx context.Context, server, name string, timeout time.Duration) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	answer, err := exchange(ctx, "udp", server, name)
	if err == nil && answer.Truncated {
		answer, err = exchange(ctx, "tcp", server, name)
	}
	return answer, err
}

// exchange sends one query and waits for what answers it. Each has a socket, and
// so a port, of its own, and a random id; what comes from elsewhere the kernel
// drops, and what is for another query is passed over.
func exchange(ctx context.Context, network, server, name string) (*dns.Msg, error) {
	var q dns.Msg
	q.SetQuestion(dns.Fqdn(name), dns.TypeA)
	var id [2]byte
	_, _ = rand.Read(id[:]) // it never fails
	q.Id = binary.BigEndian.Uint16(id[:])
	q.SetEdns0(ednsSize, false)
	packed, err := q.Pack()
	if err != nil {
		return nil, fmt.Errorf("pack query for %s: %w", name, err)
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, network, server)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	if network == "tcp" {
		packed = append(binary.BigEndian.AppendUint16(nil, uint16(len(packed))), packed...)
	}
	if _, err := conn.Write(packed); err != nil {
		return nil, err
	}
	buf := make([]byte, maxPacket)
	for {
		n, err := readMessage(conn, buf, network)
		if err != nil {
			return nil, err
		}
		if answer := answerTo(&q, buf[:n]); answer != nil {
			return answer, nil
		}
		if network == "tcp" {
			return nil, errors.New("the answer is for another query")
		}
	}
}

func readMessage(conn net.Conn, buf []byte, network string) (int, error) {
	if network != "tcp" {
		return conn.Read(buf)
	}
	if _, err := io.ReadFull(conn, buf[:2]); err != nil {
		return 0, err
	}
	return io.ReadFull(conn, buf[:binary.BigEndian.Uint16(buf)])
}

// answerTo reads an answer; nil when it is none, or not to q.
func answerTo(q *dns.Msg, data []byte) *dns.Msg {
	var answer dns.Msg
	err := answer.Unpack(data)
	if err != nil && !answer.Truncated {
		return nil
	}
	if !answer.Response || answer.Id != q.Id || len(answer.Question) != 1 {
		return nil
	}
	asked, got := q.Question[0], answer.Question[0]
	if got.Qtype != asked.Qtype || got.Qclass != asked.Qclass || !sameName(got.Name, asked.Name) {
		return nil
	}
	return &answer
}
