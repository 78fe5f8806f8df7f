package agent

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
)

// Where the agent keeps what concerns forks.
const (
	runDir         = "/run/tine"
	generationFile = "/run/tine/generation"
	bootIDFile     = "/run/tine/boot_id" // bound over /proc/sys/kernel/random/boot_id
	secretsDir     = "/run/tine/secrets" // one file for each
	forkSignalDir  = "/run/tine/fork-signal.d"
	forkHookDir    = "/etc/tine/fork.d"
)

const (
	defaultIdentityTime = 5 * time.Second
	maxIdentityTime     = time.Minute
	maxHooks            = 64
	maxHookOutput       = 2 << 10
)

// putOnIdentity answers VerbIdentity. It either does every step, or names the
// one that failed.
func (a *Agent) putOnIdentity(ctx context.Context, _ *guestproto.Stream, request []byte) (guestproto.Message, error) {
	var id guestproto.Identity
	if err := decode(request, &id); err != nil {
		return nil, err
	}
	if err := checkIdentity(&id); err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	if !a.identityIsQuick() {
		limit := min(id.Deadline, maxIdentityTime)
		if limit <= 0 {
			limit = defaultIdentityTime
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, limit, failf(errdef.ErrTimeout, "it took longer than %s", limit))
		defer cancel()
	}
	a.identity.Lock()
	defer a.identity.Unlock()
	done := &guestproto.IdentityDone{Generation: id.Generation}
	for _, step := range a.identitySteps(&id, done) {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("identity: %s: %w", step.name, context.Cause(ctx))
		}
		if err := step.do(ctx, &id); err != nil {
			return nil, fmt.Errorf("identity: %s: %w", step.name, err)
		}
	}
	return done, nil
}

// identityIsQuick reports whether nothing in an identity has to be waited for:
// no hook, and no interpreter that is anything but still.
func (a *Agent) identityIsQuick() bool {
	hooks, err := a.own.names(forkHookDir, maxHooks)
	return err == nil && len(hooks) == 0 && a.interps.still()
}

type identityStep struct {
	name string
	do   func(context.Context, *guestproto.Identity) error
}

func (a *Agent) identitySteps(id *guestproto.Identity, done *guestproto.IdentityDone) []identityStep {
	clock := identityStep{"clock", a.stepClock}
	secrets := identityStep{"secrets", func(context.Context, *guestproto.Identity) (err error) {
		done.Secrets, err = a.putOnSecrets(id)
		return err
	}}
	if id.ClockOnly {
		return []identityStep{clock, secrets}
	}
	return []identityStep{
		{"entropy", a.stepEntropy},
		clock,
		{"hostname", a.stepHostname},
		{"machine-id", a.stepMachineID},
		{"boot-id", a.stepBootID},
		{"network", a.stepNetwork},
		secrets,
		{"generation", a.stepGeneration},
		{"interpreters", func(ctx context.Context, id *guestproto.Identity) (err error) {
			done.Signaled, err = a.interps.forked(ctx, id.Generation)
			return err
		}},
		{"signals", a.stepSignals},
		{"hooks", a.stepHooks},
	}
}

// checkIdentity refuses what would not make the machine unique.
func checkIdentity(id *guestproto.Identity) error {
	if err := guestproto.CheckSecrets(id.Secrets); err != nil {
		return fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
	}
	if id.ClockOnly {
		if id.Clock <= 0 {
			return fmt.Errorf("%w: no clock", errdef.ErrInvalid)
		}
		return nil
	}
	const minEntropy, maxEntropy = 32, 1 << 10
	switch {
	case len(id.Entropy) < minEntropy || len(id.Entropy) > maxEntropy:
		return fmt.Errorf("%w: %d bytes of entropy", errdef.ErrInvalid, len(id.Entropy))
	case id.Clock <= 0:
		return fmt.Errorf("%w: no clock", errdef.ErrInvalid)
	case !plain(id.Hostname, 63):
		return fmt.Errorf("%w: hostname %q", errdef.ErrInvalid, id.Hostname)
	case len(id.MachineID) != 32 || !plain(id.MachineID, 32):
		return fmt.Errorf("%w: machine id %q", errdef.ErrInvalid, id.MachineID)
	case len(id.BootID) != 36 || !plain(id.BootID, 36):
		return fmt.Errorf("%w: boot id %q", errdef.ErrInvalid, id.BootID)
	case !plain(id.Generation, 128):
		return fmt.Errorf("%w: generation %q", errdef.ErrInvalid, id.Generation)
	}
	return nil
}

// plain reports whether s is 1 to most letters, digits, dots, dashes and
// underscores, so that it means nothing to any parser.
func plain(s string, most int) bool {
	if s == "" || len(s) > most {
		return false
	}
	for i := range len(s) {
		c := s[i]
		letter := 'a' <= c|0x20 && c|0x20 <= 'z'
		if !letter && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.' {
			return false
		}
	}
	return true
}

func (a *Agent) stepEntropy(_ context.Context, id *guestproto.Identity) error {
	return a.sys.addEntropy(id.Entropy)
}

func (a *Agent) stepClock(_ context.Context, id *guestproto.Identity) error {
	return a.sys.setClock(time.Unix(0, id.Clock))
}

func (a *Agent) stepHostname(_ context.Context, id *guestproto.Identity) error {
	if err := a.sys.setHostname(id.Hostname); err != nil {
		return err
	}
	if err := a.own.put("/etc/hostname", id.Hostname+"\n"); err != nil {
		return err
	}
	return a.own.put("/etc/hosts", hostsFile(id.Hostname))
}

func hostsFile(hostname string) string {
	return "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 " + hostname + "\n"
}

func (a *Agent) stepMachineID(_ context.Context, id *guestproto.Identity) error {
	return a.own.put("/etc/machine-id", id.MachineID+"\n")
}

func (a *Agent) stepBootID(_ context.Context, id *guestproto.Identity) error {
	return a.own.put(bootIDFile, id.BootID+"\n")
}

// stepGeneration says in a file, in one write so that it can be watched, which
// fork this is.
func (a *Agent) stepGeneration(_ context.Context, id *guestproto.Identity) error {
	if err := a.own.put(generationFile, id.Generation+"\n"); err != nil {
		return err
	}
	generation := id.Generation
	a.generation.Store(&generation)
	return nil
}

// stepSignals signals the processes that asked to be told of a fork: a file
// named by pid holds the name or number of the signal.
func (a *Agent) stepSignals(context.Context, *guestproto.Identity) error {
	names, err := a.own.names(forkSignalDir, maxProcesses)
	if err != nil {
		return err
	}
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || pid <= 1 {
			continue
		}
		sig, err := a.forkSignal(name)
		if err != nil {
			return err
		}
		if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("signal process %d: %w", pid, err)
		}
	}
	return nil
}

func (a *Agent) forkSignal(name string) (syscall.Signal, error) {
	const longest = 32
	text, err := readSmall(a.path(forkSignalDir+"/"+name), longest)
	if err != nil {
		return 0, err
	}
	word := strings.ToUpper(strings.TrimSpace(string(text)))
	if n, err := strconv.Atoi(word); err == nil && n > 0 && n < 65 {
		return syscall.Signal(n), nil
	}
	if sig := unix.SignalNum("SIG" + strings.TrimPrefix(word, "SIG")); sig != 0 {
		return sig, nil
	}
	return 0, fmt.Errorf("%w: %s/%s names no signal: %q", errdef.ErrInvalid, forkSignalDir, name, word)
}

// stepHooks runs the image's own hooks, in the order of their names.
func (a *Agent) stepHooks(ctx context.Context, id *guestproto.Identity) error {
	names, err := a.own.names(forkHookDir, maxHooks)
	if err != nil {
		return err
	}
	if _, bounded := ctx.Deadline(); !bounded && len(names) > 0 {
		return failf(errdef.ErrConflict, "%s has just appeared", names[0])
	}
	for _, name := range names {
		if err := a.runHook(ctx, name, id); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func (a *Agent) runHook(ctx context.Context, name string, id *guestproto.Identity) error {
	path := a.path(forkHookDir + "/" + name)
	if err := executable(path); err != nil {
		return err
	}
	pr, err := a.run(&guestproto.ExecRequest{
		Argv: []string{path}, Dir: "/",
		Env: []string{"TINE_GENERATION=" + id.Generation, "TINE_HOSTNAME=" + id.Hostname},
	})
	if err != nil {
		return err
	}
	select {
	case <-pr.done:
	case <-ctx.Done():
		pr.kill()
		return context.Cause(ctx)
	}
	a.procs.told(pr)
	if pr.exit.Code != 0 {
		return fmt.Errorf("exit status %d, signal %d: %s", pr.exit.Code, pr.exit.Signal, pr.ring.tail(maxHookOutput))
	}
	return nil
}

// tail returns the last bytes that were kept, for people to read.
func (r *ring) tail(most int) string {
	var text []byte
	for _, p := range r.pieces {
		text = append(text, p.Data...)
	}
	return strings.TrimSpace(string(text[max(0, len(text)-most):]))
}
