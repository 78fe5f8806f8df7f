package client

import (
	"context"
	"fmt"
	"net/http"
	"strings"

	"github.com/tinevm/tine/internal/wire"
)

// What sandboxes with a network card may reach.
type (
	// SandboxNet is what a sandbox may reach, and what it has tried.
	SandboxNet = wire.SandboxNet
	// EgressDenial is what was denied of one destination. The sandbox chose the
	// destination: do not write it to a terminal as it is.
	EgressDenial = wire.EgressDenial
	// NetRow is the network of one sandbox in a list.
	NetRow = wire.NetRow
	// NetGCReport says what came of CollectNets.
	NetGCReport = wire.NetGCReport
)

// Net is what forks of a snapshot with a network card may reach. The zero Net is
// nothing.
type Net struct {
	// Allow are rules in their short form, [tcp:|udp:]TARGET[:PORTS], as in
	// "*.example.com:443" and "10.1.0.0/16".
	Allow []string
	// Inspect has connections to ports 80 and 443 that only a domain rule opens
	// show an allowed name.
	Inspect bool
	// UpBytesPerSecond and DownBytesPerSecond bound what goes out and comes in; 0
	// is no bound.
	UpBytesPerSecond, DownBytesPerSecond int64
	// Secrets are added to requests on their way out.
	Secrets []EgressSecret
}

// EgressSecret is a header that the daemon adds to plain HTTP requests of a
// sandbox, to port 80 of a host of Hosts that a domain rule allows, and which it
// then sends over TLS. The sandbox never has it, and nor do its forks.
type EgressSecret struct {
	// Name is what people call it.
	Name string
	// Header is the header's name, and Value all that it says. What prints an
	// EgressSecret leaves Value out.
	Header, Value string
	// Hosts are names, and "*." with names.
	Hosts []string
	// Clear sends the request in clear, to port 80.
	Clear bool
}

// String is the secret without its value.
func (s EgressSecret) String() string {
	return fmt.Sprintf("secret %s: header %s of %s", s.Name, s.Header, strings.Join(s.Hosts, ", "))
}

// GoString is String, for %#v.
func (s EgressSecret) GoString() string { return s.String() }

// request is n as it is sent; nil is nothing.
func (n *Net) request() *wire.NetRequest {
	if n == nil {
		return nil
	}
	out := &wire.NetRequest{
		Allow: ruleForms(n.Allow), Inspect: n.Inspect, UpBytesPerSecond: n.UpBytesPerSecond, DownBytesPerSecond: n.DownBytesPerSecond,
	}
	for _, s := range n.Secrets {
		out.Secrets = append(out.Secrets, wire.EgressSecret{Name: s.Name, Header: s.Header, Value: s.Value, Hosts: s.Hosts, Clear: s.Clear})
	}
	return out
}

// EgressRules are rules in their short form as CreateSnapshotRequest has them.
func EgressRules(rules ...string) wire.EgressRules { return ruleForms(rules) }

func ruleForms(rules []string) wire.EgressRules {
	out := make(wire.EgressRules, 0, len(rules))
	for _, text := range rules {
		out = append(out, wire.RuleForm{Text: text})
	}
	return out
}

// NetChange says what is to change of what a sandbox may reach. Rules of Remove
// go first; one that is not there is an error, and nothing is changed.
type NetChange struct {
	Allow, Remove []string
	Inspect       *bool // nil: as it is
}

// Nets lists the sandboxes with a network card, oldest first.
func (c *Client) Nets(ctx context.Context) ([]NetRow, error) {
	return get[[]NetRow](ctx, c, "/v1/net", nil)
}

// Net says what a sandbox may reach, and what it has tried.
func (c *Client) Net(ctx context.Context, id string) (SandboxNet, error) {
	return get[SandboxNet](ctx, c, box(id, "net"), nil)
}

// SetNet sets what a sandbox may reach, at once: what it has open and may not
// reach any more is cut. A nil inspect leaves that as it is.
func (c *Client) SetNet(ctx context.Context, id string, allow []string, inspect *bool) (SandboxNet, error) {
	var out SandboxNet
	err := c.call(ctx, http.MethodPut, box(id, "net"), nil, wire.SetNetRequest{Allow: ruleForms(allow), Inspect: inspect}, &out)
	return out, err
}

// ChangeNet adds rules to what a sandbox may reach, and takes others away. Of two
// changes at once none is lost.
func (c *Client) ChangeNet(ctx context.Context, id string, change NetChange) (SandboxNet, error) {
	var out SandboxNet
	err := c.call(ctx, http.MethodPatch, box(id, "net"), nil, wire.ChangeNetRequest{
		Allow: ruleForms(change.Allow), Remove: ruleForms(change.Remove), Inspect: change.Inspect,
	}, &out)
	return out, err
}

// CollectNets removes what machines that ended have left on the daemon's host.
func (c *Client) CollectNets(ctx context.Context) (NetGCReport, error) {
	return post[NetGCReport](ctx, c, "/v1/net/gc", nil)
}
