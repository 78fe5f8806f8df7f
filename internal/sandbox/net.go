package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/egress"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// NetConfig is the operator's part of what sandboxes may reach.
type NetConfig struct {
	// Bounds are what no sandbox's rules reach beyond.
	Bounds egress.Bounds
	// Upstream are the name servers, as addresses and ports; see egress.Config.
	Upstream []string
	// Dial connects to what a sandbox may reach; see egress.Config. nil: by the
	// host's own network.
	Dial func(ctx context.Context, network string, dst netip.AddrPort) (net.Conn, error)
}

// Net is what a sandbox with a network card may reach. The zero Net is nothing.
type Net struct {
	Rules egress.Rules `json:"rules"`
	// UpBytes and DownBytes bound what it sends and gets in a second; 0: no bound.
	UpBytes   int64 `json:"up_bytes,omitempty"`
	DownBytes int64 `json:"down_bytes,omitempty"`
	// Secrets are added to requests on their way out. The guest never has them,
	// and nor do forks of this sandbox.
	Secrets []egress.Secret `json:"-"`

	// policy is Rules, ready to be asked; nil: not yet. Siblings share it: there
	// may be a thousand of them, with ten thousand rules.
	policy *egress.Policy
}

// NetState is what a sandbox may reach, and what it has tried.
type NetState struct {
	Net
	Stats   egress.Stats
	Denials []egress.Denial // the latest first
}

// outlet carries what one machine sends.
type outlet struct {
	all     *outlets // that it is among
	gateway *egress.Gateway
	stop    context.CancelFunc
	done    chan struct{}
}

// checkNet says whether what is to be reached can be on a machine of the shape.
func (m *Manager) checkNet(reach *Net, shape vmm.Machine) (*egress.Policy, error) {
	if reach == nil {
		reach = &Net{}
	} else if !shape.Net {
		err := fmt.Errorf("%w: a snapshot without a network card has forks without a network", errdef.ErrInvalid)
		return nil, errdef.WithHint(err, "make one with a card: tine snapshot create --net")
	}
	if reach.policy != nil {
		return reach.policy, nil // it has been here before
	}
	policy, err := egress.Compile(reach.Rules, m.Net.Bounds)
	if err != nil {
		return nil, err
	}
	if err = checkSize(policy.Rules()); err != nil {
		return nil, err
	}
	return policy, m.gatewayConfig("", policy, reach).Validate()
}

// compiled is reach with its rules in their normal form and ready to be asked;
// nil is nil.
func (m *Manager) compiled(reach *Net, shape vmm.Machine) (*Net, error) {
	policy, err := m.checkNet(reach, shape)
	if err != nil || reach == nil {
		return nil, err
	}
	made := *reach
	made.Rules, made.policy = policy.Rules(), policy
	return &made, nil
}

const (
	// maxRulesSize bounds rules as they are in a record, which has a bound itself.
	maxRulesSize = maxRecord / 2
	// maxRulesPorts bounds the ports and ranges of all rules together: each takes
	// some forty bytes of memory.
	maxRulesPorts = 1 << 16
)

func checkSize(rules egress.Rules) error {
	ports := 0
	for _, r := range rules.Allow {
		ports += len(r.Ports)
	}
	if ports > maxRulesPorts {
		return fmt.Errorf("%w: egress rules with %d ports and ranges in all, more than %d", errdef.ErrInvalid, ports, maxRulesPorts)
	}
	data, err := json.Marshal(rules)
	if err == nil && len(data) > maxRulesSize {
		err = fmt.Errorf("%w: egress rules of %d bytes, more than %d", errdef.ErrInvalid, len(data), maxRulesSize)
		err = errdef.WithHint(err, "allow prefixes and *.NAME in place of many single addresses and names")
	}
	return err
}

func noCard(id string) error {
	return errdef.WithHint(fmt.Errorf("%w: sandbox %s has no network card", errdef.ErrUnsupported, id),
		"its snapshot has none: tine snapshot create --net")
}

// NetTotals count what the networks of all machines did since the Manager was
// made, those that have ended included. No count ever falls but the open ones.
type NetTotals struct {
	Networks    int   // that carry something now
	Connections int64 // that are open, flows of UDP included
	BytesUp     uint64
	BytesDown   uint64
	Denied      uint64
}

func (t *NetTotals) add(s egress.Stats) {
	t.BytesUp, t.BytesDown, t.Denied = t.BytesUp+s.BytesUp, t.BytesDown+s.BytesDown, t.Denied+s.Denied
}

// outlets are those that are open, and what the others did.
type outlets struct {
	mu   sync.Mutex
	open map[*outlet]struct{}
	past NetTotals
}

func (all *outlets) opened(o *outlet) {
	all.mu.Lock()
	defer all.mu.Unlock()
	if all.open == nil {
		all.open = map[*outlet]struct{}{}
	}
	all.open[o] = struct{}{}
}

// closed notes that an outlet counts no more.
func (all *outlets) closed(o *outlet) {
	all.mu.Lock()
	defer all.mu.Unlock()
	if _, ok := all.open[o]; ok {
		delete(all.open, o)
		all.past.add(o.gateway.Stats())
	}
}

func (all *outlets) totals() NetTotals {
	all.mu.Lock()
	defer all.mu.Unlock()
	t := all.past
	t.Networks = len(all.open)
	for o := range all.open {
		s := o.gateway.Stats()
		t.add(s)
		t.Connections += s.ConnectionsOpen + s.FlowsOpen
	}
	return t
}

func (m *Manager) gatewayConfig(id string, policy *egress.Policy, reach *Net) egress.Config {
	return egress.Config{
		Policy: policy, Upstream: m.Net.Upstream, Secrets: reach.Secrets,
		UpBytesPerSecond: reach.UpBytes, DownBytesPerSecond: reach.DownBytes, Dial: m.Net.Dial,
		Denied: func(d egress.Denial) {
			m.Events.Add(EgressDenied, id, EventData{Reason: fmt.Sprintf("%s to %s: %s", d.Protocol, d.To, d.Reason)})
		},
	}
}

// newOutlet begins to carry what the machine of sandbox id sends. It is nil for a
// machine without a network card.
func (m *Manager) newOutlet(id string, vm vmm.VM, shape vmm.Machine, reach *Net) (*outlet, error) {
	if !shape.Net {
		return nil, nil //nolint:nilnil // nothing to carry, no error
	}
	policy, err := m.checkNet(reach, shape)
	if err != nil {
		return nil, err
	}
	if reach == nil {
		reach = &Net{}
	}
	gateway, err := egress.New(m.gatewayConfig(id, policy, reach))
	if err != nil {
		return nil, err
	}
	link, err := vm.Link()
	if err != nil {
		return nil, fmt.Errorf("open network: %w", err)
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(m.ctx))
	o := &outlet{all: &m.outlets, gateway: gateway, stop: stop, done: make(chan struct{})}
	m.outlets.opened(o)
	go func() {
		defer close(o.done)
		if err := gateway.Serve(ctx, link); err != nil && ctx.Err() == nil {
			m.Logger.WarnContext(ctx, "network of a sandbox ended", "sandbox", id, "error", err)
		}
	}()
	return o, nil
}

// close ends it, and what the machine has open. A nil outlet carries nothing.
func (o *outlet) close() {
	if o == nil {
		return
	}
	o.stop()
	<-o.done
	o.all.closed(o)
}

// connect gives the sandbox's machine its network, in place of the one that its
// last machine had.
func (b *box) connect(vm vmm.VM) error {
	b.mu.Lock()
	shape, reach := b.record.Machine, b.record.Net
	b.mu.Unlock()
	o, err := b.m.newOutlet(b.id, vm, shape, reach)
	if err != nil {
		return err
	}
	b.mu.Lock()
	old := b.outlet
	b.outlet = o
	b.mu.Unlock()
	old.close()
	return nil
}

// disconnect ends the sandbox's network.
func (b *box) disconnect() {
	b.mu.Lock()
	old := b.outlet
	b.outlet = nil
	b.mu.Unlock()
	old.close()
}

// SetNet changes what a sandbox may reach, at once: what it has open and may not
// reach any more is cut. Its secrets and rates stay.
func (m *Manager) SetNet(ctx context.Context, id string, rules egress.Rules) (NetState, error) {
	return m.EditNet(ctx, id, func(egress.Rules) (egress.Rules, error) { return rules, nil })
}

// EditNet is SetNet with what edit makes of the rules that there are, which it
// must not change: of two edits at once none is lost. edit must not block.
func (m *Manager) EditNet(ctx context.Context, id string, edit func(egress.Rules) (egress.Rules, error)) (NetState, error) {
	b, done, err := m.turnOf(&ctx, id)
	if err != nil {
		return NetState{}, err
	}
	defer done()
	if err = b.editNet(edit); err != nil {
		return NetState{}, fmt.Errorf("set network of sandbox %s: %w", id, err)
	}
	return b.netState()
}

func (b *box) editNet(edit func(egress.Rules) (egress.Rules, error)) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.record.Machine.Net {
		return noCard(b.id)
	}
	var is Net
	if b.record.Net != nil {
		is = *b.record.Net
	}
	rules, err := edit(is.Rules)
	if err != nil {
		return err
	}
	is.Rules, is.policy = rules, nil
	reach, err := b.m.compiled(&is, b.record.Machine)
	if err != nil {
		return err
	}
	r := b.record
	r.Net = reach
	if err = r.save(b.m.Dir); err != nil {
		return err
	}
	b.record = r
	if b.outlet != nil {
		b.outlet.gateway.SetPolicy(reach.policy)
	}
	return nil
}

// NetState says what a sandbox may reach and what it has tried, since its present
// machine came up or this daemon took it over.
func (m *Manager) NetState(id string) (NetState, error) {
	b, err := m.find(id)
	if err != nil {
		return NetState{}, err
	}
	return b.netState()
}

func (b *box) netState() (NetState, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.record.Machine.Net {
		return NetState{}, noCard(b.id)
	}
	var state NetState
	if b.record.Net != nil {
		state.Net = *b.record.Net
	}
	if b.outlet != nil {
		state.Stats, state.Denials = b.outlet.gateway.Stats(), b.outlet.gateway.Denials()
	}
	return state, nil
}

// secretsFile keeps a sandbox's egress secrets in its directory, for the next
// daemon. Nothing else has them.
const secretsFile = "egress-secrets.json"

// storedSecret is an egress.Secret with its value.
type storedSecret struct {
	egress.Secret
	Value string `json:"value"`
}

// keepSecrets writes the secrets of a sandbox into its directory.
func (m *Manager) keepSecrets(id string, secrets []egress.Secret) error {
	if len(secrets) == 0 {
		return nil
	}
	stored := make([]storedSecret, len(secrets))
	for i, s := range secrets {
		stored[i] = storedSecret{s, s.Value}
	}
	data, err := json.Marshal(stored)
	if err != nil {
		return err
	}
	return durable.Replace(filepath.Join(m.dir(id), secretsFile), data, 0o600)
}

// findSecrets reads them again.
func (m *Manager) findSecrets(id string) ([]egress.Secret, error) {
	data, err := os.ReadFile(filepath.Join(m.dir(id), secretsFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var stored []storedSecret
	if err == nil {
		err = json.Unmarshal(data, &stored)
	}
	if err != nil {
		return nil, fmt.Errorf("read egress secrets of sandbox %s: %w", id, err)
	}
	secrets := make([]egress.Secret, len(stored))
	for i, s := range stored {
		secrets[i] = s.Secret
		secrets[i].Value = s.Value
	}
	return secrets, nil
}

// recallSecrets completes the record of a sandbox that an earlier daemon had,
// whether it runs or is suspended.
func (m *Manager) recallSecrets(r *record) (err error) {
	if r.Net == nil {
		return nil
	}
	if r.Net.Secrets, err = m.findSecrets(r.ID); err != nil {
		r.Net = nil // what it may reach was for requests with them
	}
	return err
}
