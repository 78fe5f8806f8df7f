package cli

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/tinevm/tine/client"
)

// stateDir is where the daemon of this host keeps everything.
func (a *app) stateDir() string {
	if a.flags.stateDir != "" {
		return a.flags.stateDir
	}
	if dir := a.Getenv("TINE_STATE_DIR"); dir != "" {
		return dir
	}
	if os.Geteuid() == 0 {
		return "/var/lib/tine"
	}
	if dir := a.Getenv("XDG_STATE_HOME"); dir != "" {
		return filepath.Join(dir, "tine")
	}
	return filepath.Join(a.Getenv("HOME"), ".local", "state", "tine")
}

// Connect makes a client of the daemon that a command line without flags means.
func Connect(getenv func(string) string) (*client.Client, error) {
	return (&app{Environment: Environment{Getenv: getenv}}).connect()
}

// address is where the daemon is.
func (a *app) address() client.Config {
	cfg := client.Config{Token: a.Getenv("TINE_TOKEN")}
	switch url := a.Getenv("TINE_URL"); {
	case a.flags.socket != "":
		cfg.Socket = a.flags.socket
	case a.flags.url != "":
		cfg.URL = a.flags.url
	case url != "":
		cfg.URL = url
	default:
		cfg.Socket = filepath.Join(a.stateDir(), "tine.sock")
	}
	return cfg
}

// withClient calls f with a client of the daemon, which with --local is one
// that lives as long as the call.
func (a *app) withClient(ctx context.Context, f func(c *client.Client) error) error {
	if a.flags.local {
		return a.withLocal(ctx, f)
	}
	c, err := a.connect()
	if err != nil {
		return err
	}
	defer c.Close()
	return f(c)
}

// withLocal is withClient for a daemon of this process's own.
func (a *app) withLocal(ctx context.Context, f func(c *client.Client) error) (err error) {
	if a.Deps.Local == nil {
		return missing("local daemon")
	}
	news := a.newNews()
	c, end, err := a.Deps.Local(news.context(ctx), a.hostOptions())
	news.close()
	if err != nil {
		return err
	}
	defer func() {
		after, cancel := detached(ctx)
		defer cancel()
		err = errors.Join(err, end(after))
	}()
	return f(c)
}
