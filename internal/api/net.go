package api

import (
	"context"
	"fmt"
	"slices"

	"github.com/tinevm/tine/internal/egress"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/wire"
)

// rulesOf reads rules, and returns them in their normal form.
func rulesOf(forms wire.EgressRules) ([]egress.Rule, error) {
	rules := make([]egress.Rule, 0, len(forms))
	for i, f := range forms {
		rule, err := ruleOf(f)
		if err != nil {
			return nil, errdef.WithHint(fmt.Errorf("rule %d: %w", i+1, err), errorHint(err, "a rule is [tcp:|udp:]TARGET[:PORTS], as in *.example.com:443"))
		}
		rules = append(rules, rule)
	}
	return rules, nil
}

func ruleOf(f wire.RuleForm) (egress.Rule, error) {
	parts := egress.Rule{CIDR: f.CIDR, Domain: f.Domain, Ports: f.Ports, Protocol: f.Protocol}
	if f.Text != "" {
		return egress.ParseRule(f.Text)
	}
	return parts.Normal()
}

// netOf reads what forks may reach; nil is nothing.
func netOf(n *wire.NetRequest) (*sandbox.Net, error) {
	if n == nil {
		return nil, nil //nolint:nilnil // nothing is asked for, no error
	}
	rules, err := rulesOf(n.Allow)
	if err != nil {
		return nil, err
	}
	out := &sandbox.Net{
		Rules: egress.Rules{Allow: rules, Inspect: n.Inspect}, UpBytes: n.UpBytesPerSecond, DownBytes: n.DownBytesPerSecond,
	}
	for _, secret := range n.Secrets {
		out.Secrets = append(out.Secrets, egress.Secret{
			Name: secret.Name, Header: secret.Header, Value: secret.Value, Hosts: secret.Hosts, Clear: secret.Clear,
		})
	}
	return out, nil
}

// GetNet answers GET /v1/sandboxes/{id}/net.
func (s *server) GetNet(_ context.Context, r wire.GetNetRequestObject) (wire.GetNetResponseObject, error) {
	state, err := s.Sandboxes.NetState(r.ID)
	if err != nil {
		return nil, err
	}
	return wire.GetNet200JSONResponse(sandboxNet(state)), nil
}

// SetNet answers PUT /v1/sandboxes/{id}/net.
func (s *server) SetNet(ctx context.Context, r wire.SetNetRequestObject) (wire.SetNetResponseObject, error) {
	if r.Body.Allow == nil {
		return nil, errdef.WithHint(fmt.Errorf("%w: allow is missing", errdef.ErrInvalid), "an empty list allows nothing")
	}
	allow, err := rulesOf(r.Body.Allow)
	if err != nil {
		return nil, err
	}
	state, err := s.Sandboxes.EditNet(ctx, r.ID, func(rules egress.Rules) (egress.Rules, error) {
		return egress.Rules{Allow: allow, Inspect: or(r.Body.Inspect, rules.Inspect)}, nil
	})
	return wire.SetNet200JSONResponse(sandboxNet(state)), err
}

// ChangeNet answers PATCH /v1/sandboxes/{id}/net.
func (s *server) ChangeNet(ctx context.Context, r wire.ChangeNetRequestObject) (wire.ChangeNetResponseObject, error) {
	if len(r.Body.Allow)+len(r.Body.Remove) == 0 && r.Body.Inspect == nil {
		return nil, errdef.WithHint(fmt.Errorf("%w: there is nothing to change", errdef.ErrInvalid), "send allow, remove or inspect")
	}
	allow, err := rulesOf(r.Body.Allow)
	if err != nil {
		return nil, err
	}
	remove, err := rulesOf(r.Body.Remove)
	if err != nil {
		return nil, err
	}
	state, err := s.Sandboxes.EditNet(ctx, r.ID, func(rules egress.Rules) (egress.Rules, error) {
		rules.Inspect = or(r.Body.Inspect, rules.Inspect)
		rules.Allow, err = change(rules.Allow, remove, allow)
		return rules, err
	})
	return wire.ChangeNet200JSONResponse(sandboxNet(state)), err
}

// change returns rules without those of remove, and with those of allow.
func change(rules, remove, allow []egress.Rule) ([]egress.Rule, error) {
	place := make(map[string]bool, len(rules))
	for _, rule := range rules {
		place[rule.String()] = true
	}
	gone := make(map[string]bool, len(remove))
	for _, rule := range remove {
		text := rule.String()
		if !place[text] {
			return nil, errdef.WithHint(fmt.Errorf("egress rule %.80s: %w", text, errdef.ErrNotFound), "tine net show has the rules as they are")
		}
		gone[text] = true
	}
	out := slices.DeleteFunc(slices.Clone(rules), func(rule egress.Rule) bool { return gone[rule.String()] })
	for _, rule := range allow {
		text := rule.String()
		if !place[text] || gone[text] {
			out = append(out, rule)
			place[text], gone[text] = true, false
		}
	}
	return out, nil
}

// sandboxNet is what is told of a network: all but the values of secrets.
func sandboxNet(state sandbox.NetState) wire.SandboxNet {
	out := wire.SandboxNet{
		Allow: make([]string, 0, len(state.Rules.Allow)), Inspect: state.Rules.Inspect, UpBytesPerSecond: state.UpBytes, DownBytesPerSecond: state.DownBytes,
		Secrets: make([]wire.KnownSecret, 0, len(state.Secrets)), Denials: make([]wire.EgressDenial, 0, len(state.Denials)),
		Stats: egressStats(state.Stats),
	}
	for _, rule := range state.Rules.Allow {
		out.Allow = append(out.Allow, rule.String())
	}
	for _, secret := range state.Secrets {
		out.Secrets = append(out.Secrets, wire.KnownSecret{Name: secret.Name, Header: secret.Header, Hosts: secret.Hosts, Clear: secret.Clear})
	}
	for _, d := range state.Denials {
		out.Denials = append(out.Denials, wire.EgressDenial{
			Protocol: d.Protocol, To: d.To, Reason: string(d.Reason), Count: int64(d.Count), First: rfc3339(d.First), Last: rfc3339(d.Last),
		})
	}
	return out
}

func egressStats(s egress.Stats) wire.EgressStats {
	return wire.EgressStats{
		ConnectionsOpen: s.ConnectionsOpen, ConnectionsTotal: int64(s.ConnectionsTotal), FlowsOpen: s.FlowsOpen, FlowsTotal: int64(s.FlowsTotal),
		BytesUp: int64(s.BytesUp), BytesDown: int64(s.BytesDown), PacketsUp: int64(s.PacketsUp), PacketsDown: int64(s.PacketsDown),
		PacketsDropped: int64(s.PacketsDropped), DNSQueries: int64(s.DNSQueries), DNSDropped: int64(s.DNSDropped), DialFailed: int64(s.DialFailed),
		Denied: int64(s.Denied), DenialsOverflow: int64(s.DenialsOverflow), DenialsUnreported: int64(s.DenialsUnreported),
	}
}

// ListNets answers GET /v1/net.
func (s *server) ListNets(ctx context.Context, _ wire.ListNetsRequestObject) (wire.ListNetsResponseObject, error) {
	out := wire.ListNets200JSONResponse{}
	for _, box := range s.boxes(ctx) {
		if !box.Machine.Net {
			continue
		}
		state, err := s.Sandboxes.NetState(box.ID)
		if err != nil {
			continue // it has just ended
		}
		out = append(out, wire.NetRow{
			ID: box.ID, SnapshotTag: box.SnapshotTag, Rules: len(state.Rules.Allow), Inspect: state.Rules.Inspect,
			ConnectionsOpen:  state.Stats.ConnectionsOpen + state.Stats.FlowsOpen,
			ConnectionsTotal: int64(state.Stats.ConnectionsTotal + state.Stats.FlowsTotal),
			BytesUp:          int64(state.Stats.BytesUp), BytesDown: int64(state.Stats.BytesDown), Denied: int64(state.Stats.Denied),
		})
	}
	return out, nil
}

// CollectNets answers POST /v1/net/gc.
func (s *server) CollectNets(ctx context.Context, _ wire.CollectNetsRequestObject) (wire.CollectNetsResponseObject, error) {
	if s.Sweep == nil {
		return nil, fmt.Errorf("%w: this daemon has nothing to remove", errdef.ErrUnsupported)
	}
	if err := s.Sweep(ctx); err != nil {
		return nil, err
	}
	report := wire.CollectNets200JSONResponse{}
	for _, box := range s.Sandboxes.List() {
		if box.Machine.Net && box.State == sandbox.Running {
			report.Networks++
		}
	}
	return report, nil
}
