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
}

// NetState is what a sandbox may reach, and what it has tried.
type NetState struct {
	Net
	Stats   egress.Stats
	Denials []egress.Denial // the latest first
}

// outlet carries what one machine sends.
type outlet struct {
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
	policy, err := egress.Compile(reach.Rules, m.Net.Bounds)
	if err != nil {
		return nil, err
	}
	return policy, m.gatewayConfig("", policy, reach).Validate()
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
	o := &outlet{gateway: gateway, stop: stop, done: make(chan struct{})}
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
	b, done, err := m.turnOf(&ctx, id)
	if err != nil {
		return NetState{}, err
	}
	defer done()
	if err = b.setNet(rules); err != nil {
		return NetState{}, fmt.Errorf("set network of sandbox %s: %w", id, err)
	}
	return b.netState()
}

func (b *box) setNet(rules egress.Rules) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	var reach Net
	if b.record.Net != nil {
		reach = *b.record.Net
	}
	reach.Rules = rules
	policy, err := b.m.checkNet(&reach, b.record.Machine)
	if err != nil {
		return err
	}
	r := b.record
	reach.Rules = policy.Rules()
	r.Net = &reach
	if err = r.save(b.m.Dir); err != nil {
		return err
	}
	b.record = r
	if b.outlet != nil {
		b.outlet.gateway.SetPolicy(policy)
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
		return NetState{}, fmt.Errorf("%w: sandbox %s has no network card", errdef.ErrUnsupported, b.id)
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

// reconnect gives a machine that an earlier daemon started its network again.
func (b *box) reconnect(vm vmm.VM) (err error) {
	if b.record.Net != nil {
		if b.record.Net.Secrets, err = b.m.findSecrets(b.id); err != nil {
			return err
		}
	}
	return b.connect(vm)
}
