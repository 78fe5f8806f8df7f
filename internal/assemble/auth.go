package assemble

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/cli"
	"github.com/tinevm/tine/internal/daemon"
)

func authConfig(o cli.AuthOptions) auth.Config {
	return auth.Config{
		TokenFile: o.TokenFile, CertificateScope: auth.Scope(o.ClientScope), Window: o.SignWindow, Rate: o.Rate, Burst: o.Burst,
	}
}

// tokens are the named tokens of state directories.
func tokens() cli.TokenDeps {
	return cli.TokenDeps{
		Create: func(ctx context.Context, stateDir string, t cli.Token) (cli.Token, string, error) {
			dir, err := daemon.MakeStateDir(stateDir)
			if err != nil {
				return cli.Token{}, "", err
			}
			r, secret, err := auth.Create(ctx, auth.StorePath(dir), auth.Record{
				Name: t.Name, Scope: auth.Scope(t.Scope), MaxSandboxes: t.MaxSandboxes, MaxMemoryMiB: t.MaxMemoryMiB, MaxCPUs: t.MaxCPUs, Sign: t.Sign,
			})
			return tokenOf(r), secret, err
		},
		List: func(stateDir string) ([]cli.Token, error) {
			records, err := auth.List(auth.StorePath(stateDir))
			if err != nil {
				return nil, err
			}
			out := make([]cli.Token, 0, len(records))
			for _, r := range records {
				out = append(out, tokenOf(r))
			}
			return out, nil
		},
		Remove: func(ctx context.Context, stateDir, name string) error {
			return auth.Remove(ctx, auth.StorePath(stateDir), name)
		},
	}
}

func tokenOf(r auth.Record) cli.Token {
	return cli.Token{
		Name: r.Name, Scope: string(r.Scope), MaxSandboxes: r.MaxSandboxes, MaxMemoryMiB: r.MaxMemoryMiB, MaxCPUs: r.MaxCPUs,
		Sign: r.Sign, CreatedAt: r.CreatedAt,
	}
}

// onHangUp calls f at each SIGHUP until ctx ends or stop is called, which waits
// for a call that is under way.
func onHangUp(ctx context.Context, f func()) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	signals, done := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(signals, syscall.SIGHUP)
	go func() {
		defer close(done)
		for {
			select {
			case <-signals:
				f()
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() {
		signal.Stop(signals)
		cancel()
		<-done
	}
}
