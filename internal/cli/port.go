package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"

	"github.com/spf13/cobra"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/publish"
)

func (a *app) portCommand() *cobra.Command {
	var hostPort int
	cmd := &cobra.Command{
		Use:   "port ID GUEST-PORT [--host-port N]",
		Short: "Forward a port of this host to a port of a sandbox",
		Long: `Port listens on 127.0.0.1 and passes every connection on to a port of the
sandbox, which needs no network for that. It prints the address, and goes on until
it is interrupted. Connections go through the daemon, wherever that is.

Whoever is on this host can connect for as long: nobody asks for a token there.
In the sandbox, the program has to listen on 127.0.0.1 or on all addresses.

With publish it is the daemon that listens, on its own host, until the sandbox
or the daemon ends.`,
		Example: `  tine exec -d sb-1 -- python3 -m http.server 8000
  tine port sb-1 8000
  tine port sb-1 5432 --host-port 15432
  tine port publish sb-1 8000
  tine port ls sb-1
  tine port rm sb-1 8000`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeEach(a.completeSandboxes),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			port, err := parsePort(args[1])
			if err != nil {
				return err
			}
			return a.withClient(ctx, func(c *client.Client) error { return a.forward(ctx, c, args[0], port, hostPort) })
		}),
	}
	hostPortFlag(cmd, &hostPort)
	cmd.AddCommand(a.portPublish(), a.portLs(), a.portRm())
	return cmd
}

func hostPortFlag(cmd *cobra.Command, port *int) {
	cmd.Flags().IntVarP(port, "host-port", "p", 0, "listen on port `N` of 127.0.0.1 (default a free one)")
}

// parsePort reads a port of a sandbox.
func parsePort(text string) (int, error) {
	port, err := strconv.Atoi(text)
	if err != nil || port < 1 || port > 65535 {
		return 0, fmt.Errorf("%w: port %q is none of 1 to 65535", errdef.ErrInvalid, text)
	}
	return port, nil
}

func portTable(all ...client.PublishedPort) table {
	t := table{header: []string{"ADDRESS", "HOST PORT", "GUEST PORT"}}
	for _, p := range all {
		t.add(p.Address, strconv.Itoa(p.HostPort), strconv.Itoa(p.GuestPort))
	}
	return t
}

// forward listens until the user has enough, or the sandbox is gone.
func (a *app) forward(ctx context.Context, c *client.Client, id string, port, hostPort int) error {
	if _, err := c.Sandbox(ctx, id); err != nil {
		return err
	}
	live, end := context.WithCancelCause(ctx)
	defer end(nil)
	f := &forwarder{app: a, client: c, id: id, port: port, end: end}
	l, err := publish.Listen(ctx, hostPort, publish.MaxConns, f.connect, nil)
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }() // it never fails
	if err = a.printAddress(client.PublishedPort{Address: l.Address(), GuestPort: port, HostPort: l.Port()}); err != nil {
		return err
	}
	<-live.Done()
	if ctx.Err() != nil {
		return nil // that is how it is meant to end
	}
	return context.Cause(live)
}

// printAddress prints where a port is, and nothing else.
func (a *app) printAddress(p client.PublishedPort) error {
	if a.flags.json {
		return a.printJSON(p)
	}
	return a.printf("%s\n", p.Address)
}

// forwarder connects to one port of a sandbox.
type forwarder struct {
	app    *app
	client *client.Client
	id     string
	port   int
	end    context.CancelCauseFunc

	mu sync.Mutex // held while something is told
}

func (f *forwarder) connect(ctx context.Context, use func(context.Context, net.Conn) error) error {
	conn, err := f.client.DialPort(ctx, f.id, f.port)
	if err != nil {
		f.failed(ctx, err)
		return err
	}
	defer func() { _ = conn.Close() }() // use may have closed it
	return use(ctx, conn)
}

// failed tells why a connection was not passed on: whoever made it only sees
// that it ends. Without a sandbox there is nothing more to do.
func (f *forwarder) failed(ctx context.Context, err error) {
	switch {
	case ctx.Err() != nil:
	case errors.Is(err, errdef.ErrNotFound):
		f.end(err)
	default:
		f.mu.Lock()
		defer f.mu.Unlock()
		f.app.notef("tine: %v", err)
	}
}

func (a *app) portPublish() *cobra.Command {
	var hostPort int
	cmd := &cobra.Command{
		Use:   "publish ID GUEST-PORT [--host-port N]",
		Short: "Have the daemon listen for a port of a sandbox",
		Long: `Publish has the daemon listen on 127.0.0.1 of its host, and prints the address.
It ends with the sandbox, by rm, or when the daemon ends; the next daemon has
none. Whoever is on the daemon's host can connect: nobody asks for a token there.`,
		Example: `  tine port publish sb-1 8000
  tine port publish sb-1 5432 --host-port 15432`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeEach(a.completeSandboxes),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			port, err := parsePort(args[1])
			if err != nil {
				return err
			}
			return a.withClient(ctx, func(c *client.Client) error {
				p, err := c.PublishPort(ctx, args[0], port, hostPort)
				if err != nil {
					return err
				}
				return a.printAddress(p)
			})
		}),
	}
	hostPortFlag(cmd, &hostPort)
	return cmd
}

func (a *app) portLs() *cobra.Command {
	return &cobra.Command{
		Use:               "ls ID",
		Aliases:           []string{"list"},
		Short:             "List the ports of a sandbox that the daemon listens for",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeEach(a.completeSandboxes),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				all, err := c.PublishedPorts(ctx, args[0])
				if err != nil {
					return err
				}
				return a.print(all, portTable(all...))
			})
		}),
	}
}

func (a *app) portRm() *cobra.Command {
	return &cobra.Command{
		Use:               "rm ID GUEST-PORT...",
		Short:             "Have the daemon listen no more for ports of a sandbox",
		Example:           `  tine port rm sb-1 8000`,
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: a.completeEach(a.completeSandboxes),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				return a.removeAll(args[1:], func(text string) error {
					port, err := parsePort(text)
					if err != nil {
						return err
					}
					return c.UnpublishPort(ctx, args[0], port)
				})
			})
		}),
	}
}
