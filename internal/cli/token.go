package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
)

// maxCredential bounds the files that say who we are and whom we trust.
const maxCredential = 1 << 20

// connect makes a client of the daemon, which does not connect yet.
func (a *app) connect() (*client.Client, error) { return a.connectTo(a.address()) }

// connectTo makes a client of the daemon that cfg says.
func (a *app) connectTo(cfg client.Config) (*client.Client, error) {
	var err error
	if cfg.Token, err = a.token(cfg.Token); err != nil {
		return nil, err
	}
	if cfg.TLS, err = a.clientTLS(); err != nil {
		return nil, err
	}
	return client.New(cfg)
}

// token is what is sent, or signed with. There is no flag with the token
// itself: whoever is on this host can read command lines.
func (a *app) token(fromEnvironment string) (string, error) {
	path := a.flags.tokenFile
	if path == "" && fromEnvironment != "" {
		return fromEnvironment, nil
	}
	if path == "" {
		path = a.Getenv("TINE_TOKEN_FILE")
	}
	if path == "" {
		return "", nil
	}
	data, err := readCredential(path)
	if err != nil {
		return "", fmt.Errorf("token file: %w", err)
	}
	token := strings.TrimSpace(string(data))
	if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("%w: token file %s does not hold a token", errdef.ErrInvalid, path)
	}
	return token, nil
}

// clientTLS is how an https daemon is reached; nil means as this host does.
func (a *app) clientTLS() (*tls.Config, error) {
	ca := a.given(a.flags.caFile, "TINE_CA_FILE")
	cert := a.given(a.flags.certFile, "TINE_CERT_FILE")
	key := a.given(a.flags.keyFile, "TINE_KEY_FILE")
	if ca == "" && cert == "" && key == "" {
		return nil, nil //nolint:nilnil // nothing was asked for, and nothing is wrong
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if ca != "" {
		pem, err := readCredential(ca)
		if err != nil {
			return nil, fmt.Errorf("CA file: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%w: no certificate in CA file %s", errdef.ErrInvalid, ca)
		}
	}
	if cert == "" && key == "" {
		return cfg, nil
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("%w: client certificate: %w", errdef.ErrInvalid, err)
	}
	cfg.Certificates = []tls.Certificate{pair}
	return cfg, nil
}

// given is a flag's value, or the variable's.
func (a *app) given(flag, variable string) string {
	if flag != "" {
		return flag
	}
	return a.Getenv(variable)
}

func readCredential(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
	}
	defer func() { _ = f.Close() }() // it was only read
	data, err := io.ReadAll(io.LimitReader(f, maxCredential+1))
	if err == nil && len(data) > maxCredential {
		err = fmt.Errorf("%w: %s is too large", errdef.ErrInvalid, path)
	}
	return data, err
}

func (a *app) tokenCommand() *cobra.Command {
	cmd := noun("token", "Say who may use the daemon", a.tokenCreate(), a.tokenLs(), a.tokenRm())
	cmd.Long = `Token changes the named tokens of this host's daemon, through its socket, so
that its audit log says who did it. Where none answers it changes the state
directory, which the daemon notices and tells of once it runs. With --url it
asks that daemon.

While there is none, whoever reaches the daemon's loopback address may do
everything. From the first on, until the daemon ends, all but the owner of its
unix socket must show one.`
	cmd.Example = `  tine token create ci --scope fork --max-sandboxes 20
  tine token create agents --max-memory-mib 8192 --max-cpus 4
  tine token create deploy --sign
  tine token rm ci`
	return cmd
}

func (a *app) tokenCreate() *cobra.Command {
	var t Token
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Make a token, and print it once",
		Long: `Create makes a token and prints it. It is kept nowhere: only its SHA-256 is.

A token of scope read sees what there is, one of scope fork also makes and uses
sandboxes, one of scope admin does everything. With --sign it is never sent:
clients sign each request with it, so that nobody who saw one can send it again.`,
		Args: cobra.ExactArgs(1),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			t.Name = args[0]
			made, secret, err := a.createToken(ctx, t)
			if err != nil {
				return err
			}
			if a.flags.json {
				return a.printJSON(struct {
					Token
					Secret string `json:"token"`
				}{made, secret})
			}
			if !a.flags.quiet {
				a.notef("tine: this is the only time that the token of %s is shown", made.Name)
			}
			return a.printf("%s\n", secret)
		}),
	}
	f := cmd.Flags()
	f.StringVar(&t.Scope, "scope", "fork", "what it may do: `read|fork|admin`")
	f.IntVar(&t.MaxSandboxes, "max-sandboxes", 0, "how many sandboxes it may have at once (default no bound)")
	f.IntVar(&t.MaxMemoryMiB, "max-memory-mib", 0, "what the memory limits of its sandboxes may come to, in `MiB` (default no bound)")
	f.Float64Var(&t.MaxCPUs, "max-cpus", 0, "what their processor limits may come to, in `cores` (default no bound)")
	f.BoolVar(&t.Sign, "sign", false, "demand that every request is signed with it")
	return cmd
}

func (a *app) tokenLs() *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List the named tokens",
		Args:  cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			all, err := a.listTokens(ctx)
			if err != nil {
				return err
			}
			t := table{header: []string{"NAME", "SCOPE", "SANDBOXES", "MEMORY", "CPUS", "SIGNS", "AGE"}}
			for _, one := range all {
				limit := "-"
				if one.MaxSandboxes > 0 {
					limit = strconv.Itoa(one.MaxSandboxes)
				}
				memory, cpus := "-", "-"
				if one.MaxMemoryMiB > 0 {
					memory = strconv.Itoa(one.MaxMemoryMiB) + " MiB"
				}
				if one.MaxCPUs > 0 {
					cpus = strconv.FormatFloat(one.MaxCPUs, 'f', -1, 64)
				}
				signs := "-"
				if one.Sign {
					signs = "yes"
				}
				t.add(one.Name, one.Scope, limit, memory, cpus, signs, age(one.CreatedAt.Unix()))
			}
			if all == nil {
				all = []Token{}
			}
			return a.print(all, t)
		}),
	}
}

func (a *app) tokenRm() *cobra.Command {
	return &cobra.Command{
		Use:   "rm NAME...",
		Short: "Remove tokens; what was made with them stays",
		Args:  cobra.MinimumNArgs(1),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			for _, name := range args {
				if err := a.removeToken(ctx, name); err != nil {
					return err
				}
			}
			return nil
		}),
	}
}

// askDaemon calls f with a client of the daemon that tokens are for, and reports
// false when none answers. $TINE_URL is not asked: it may be where another's
// sandboxes are.
func (a *app) askDaemon(f func(*client.Client) error) (bool, error) {
	if a.flags.local {
		return false, nil
	}
	cfg := client.Config{Socket: a.flags.socket, URL: a.flags.url, Token: a.Getenv("TINE_TOKEN")}
	if cfg.Socket == "" && cfg.URL == "" {
		cfg.Socket = filepath.Join(a.stateDir(), "tine.sock")
	}
	c, err := a.connectTo(cfg)
	if err != nil {
		return true, err
	}
	defer c.Close()
	err = f(c)
	if _, nobody := errors.AsType[*client.UnreachableError](err); nobody && cfg.URL == "" {
		return false, nil
	}
	return true, err
}

func (a *app) createToken(ctx context.Context, t Token) (made Token, secret string, err error) {
	asked, err := a.askDaemon(func(c *client.Client) error {
		got, createErr := c.CreateToken(ctx, client.CreateTokenRequest{
			Name: t.Name, Scope: t.Scope, MaxSandboxes: t.MaxSandboxes, MaxMemoryMiB: t.MaxMemoryMiB, MaxCPUs: t.MaxCPUs, Sign: t.Sign,
		})
		made = Token{
			Name: got.Name, Scope: got.Scope, MaxSandboxes: got.MaxSandboxes, MaxMemoryMiB: got.MaxMemoryMiB, MaxCPUs: got.MaxCPUs,
			Sign: got.Sign, CreatedAt: got.CreatedAt,
		}
		secret = got.Token
		return createErr
	})
	if asked || err != nil {
		return made, secret, err
	}
	if a.Deps.Tokens.Create == nil {
		return Token{}, "", missing("tokens")
	}
	return a.Deps.Tokens.Create(ctx, a.stateDir(), t)
}

func (a *app) listTokens(ctx context.Context) (all []Token, err error) {
	asked, err := a.askDaemon(func(c *client.Client) error {
		tokens, listErr := c.Tokens(ctx)
		for _, t := range tokens {
			all = append(all, Token{
				Name: t.Name, Scope: t.Scope, MaxSandboxes: t.MaxSandboxes, MaxMemoryMiB: t.MaxMemoryMiB, MaxCPUs: t.MaxCPUs,
				Sign: t.Sign, CreatedAt: t.CreatedAt,
			})
		}
		return listErr
	})
	if asked || err != nil {
		return all, err
	}
	if a.Deps.Tokens.List == nil {
		return nil, missing("tokens")
	}
	return a.Deps.Tokens.List(a.stateDir())
}

func (a *app) removeToken(ctx context.Context, name string) error {
	asked, err := a.askDaemon(func(c *client.Client) error { return c.RemoveToken(ctx, name) })
	if asked || err != nil {
		return err
	}
	if a.Deps.Tokens.Remove == nil {
		return missing("tokens")
	}
	return a.Deps.Tokens.Remove(ctx, a.stateDir(), name)
}

// guardFlags are the flags of serve that say who is let in.
func (a *app) guardFlags(cmd *cobra.Command, o *AuthOptions) {
	f := cmd.Flags()
	f.StringVar(&o.TLSCert, "tls-cert", "", "PEM `FILE` of the certificate to serve TLS with")
	f.StringVar(&o.TLSKey, "tls-key", "", "PEM `FILE` of its key")
	f.StringVar(&o.ClientCA, "tls-client-ca", "", "let in whoever has a certificate that `FILE` has signed")
	f.StringVar(&o.ClientScope, "tls-client-scope", "admin", "what they may do: `read|fork|admin`")
	f.BoolVar(&o.Plain, "insecure-plain", false, "allow --listen on an address that other hosts reach without TLS")
	f.BoolVar(&o.Share, "share-sandboxes", false, "let tokens of scope fork see and use each other's sandboxes")
	f.DurationVar(&o.SignWindow, "sign-window", 0, "accept signed requests of so long ago (default 5m)")
	f.Float64Var(&o.Rate, "rate", 0, "refuse more than `N` requests a second of one token, in the long run (default no bound)")
	f.IntVar(&o.Burst, "burst", 0, "let so many of them come at once (default --rate)")
}
