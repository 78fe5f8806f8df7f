package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
)

// maxRulesFile bounds a file of rules, and one of secrets.
const maxRulesFile = 4 << 20

// ruleFlags are the flags with rules.
type ruleFlags struct {
	rules []string
	files []string
}

// add adds them. who is what the rules are for, as in "let the sandbox".
func (r *ruleFlags) add(cmd *cobra.Command, who string) {
	f := cmd.Flags()
	f.StringArrayVar(&r.rules, "allow", nil, who+" reach what a `RULE` says, [tcp:|udp:]TARGET[:PORTS], as in *.example.com:443; may be repeated (default nothing)")
	f.StringArrayVar(&r.files, "allow-file", nil, "the same with the rules in a `FILE`, one on a line; lines with # at their beginning are comments; may be repeated")
}

// read returns the rules of the flags and the files.
func (r *ruleFlags) read() ([]string, error) {
	rules := r.rules
	for _, name := range r.files {
		text, err := readBounded(name, maxRulesFile)
		if err != nil {
			return nil, fmt.Errorf("%w: --allow-file: %w", errdef.ErrInvalid, err)
		}
		for line := range strings.Lines(string(text)) {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
				rules = append(rules, line)
			}
		}
	}
	return rules, nil
}

// netFlags are the flags that say what forks may reach.
type netFlags struct {
	ruleFlags

	inspect bool
	rate    string
	secrets []string
}

func (n *netFlags) add(cmd *cobra.Command) {
	n.ruleFlags.add(cmd, "with a network card: let the sandbox")
	f := cmd.Flags()
	f.BoolVar(&n.inspect, "inspect", false, "have connections to ports 80 and 443 that a rule by name opens show such a name")
	f.StringVar(&n.rate, "net-rate", "", "let so many `BYTES` out in a second, and as many in, as in 1M (default no bound)")
	f.StringArrayVar(&n.secrets, "egress-secret", nil,
		"`VARIABLE:HOST[,HOST]:HEADER[:SCHEME]`: add a header to requests to those hosts, with the value of that variable of our environment; or @FILE, JSON as the API has it; may be repeated")
}

// askNet puts the flags into a request, if there are any.
func (a *app) askNet(cmd *cobra.Command, n netFlags, req *client.ForkRequest) error {
	asked := false
	for _, name := range []string{"allow", "allow-file", "inspect", "net-rate", "egress-secret"} {
		asked = asked || cmd.Flags().Changed(name)
	}
	if !asked {
		return nil
	}
	rules, err := n.read()
	if err != nil {
		return err
	}
	rate, err := parseBytes("net-rate", n.rate)
	if err != nil {
		return err
	}
	secrets, err := a.readEgressSecrets(n.secrets)
	req.Net = &client.Net{Allow: rules, Inspect: n.inspect, UpBytesPerSecond: rate, DownBytesPerSecond: rate, Secrets: secrets}
	return err
}

// readEgressSecrets reads what --egress-secret flags say. No value is on the
// command line, where others on this host could read it, and what was put there
// all the same is in no error.
func (a *app) readEgressSecrets(flags []string) (all []client.EgressSecret, err error) {
	for i, flag := range flags {
		var some []client.EgressSecret
		if name, isFile := strings.CutPrefix(flag, "@"); isFile {
			some, err = readEgressFile(name)
		} else {
			some, err = a.egressSecret(flag)
		}
		if err != nil {
			return nil, fmt.Errorf("%w: --egress-secret, number %d: %w", errdef.ErrInvalid, i+1, err)
		}
		all = append(all, some...)
	}
	return all, nil
}

func (a *app) egressSecret(flag string) ([]client.EgressSecret, error) {
	parts := strings.Split(flag, ":")
	if len(parts) != 3 && len(parts) != 4 || parts[0] == "" || parts[1] == "" || parts[2] == "" {
		return nil, errors.New("it is not VARIABLE:HOST[,HOST]:HEADER[:SCHEME], as in API_TOKEN:api.example.com:Authorization:Bearer, nor @FILE")
	}
	value := strings.TrimRight(a.Getenv(parts[0]), "\r\n")
	if value == "" {
		return nil, errors.New("there is no such variable in the environment")
	}
	if len(parts) == 4 {
		value = parts[3] + " " + value
	}
	return []client.EgressSecret{{Name: parts[0], Header: parts[2], Value: value, Hosts: strings.Split(parts[1], ",")}}, nil
}

// egressFile is a secret as the API has it.
type egressFile struct {
	Name   string   `json:"name"`
	Header string   `json:"header"`
	Value  string   `json:"value"`
	Hosts  []string `json:"hosts"`
	Clear  bool     `json:"clear"`
}

// readEgressFile reads one secret, or an array of them. An error of the JSON
// might have a part of a value.
func readEgressFile(name string) ([]client.EgressSecret, error) {
	data, err := readBounded(name, maxRulesFile)
	if err != nil {
		return nil, err
	}
	var files []egressFile
	if json.Unmarshal(data, &files) != nil {
		files = make([]egressFile, 1)
		if json.Unmarshal(data, &files[0]) != nil {
			return nil, fmt.Errorf("%s is not JSON of the form [{\"name\", \"header\", \"value\", \"hosts\": []}]", name)
		}
	}
	var all []client.EgressSecret
	for _, f := range files {
		all = append(all, client.EgressSecret{Name: f.Name, Header: f.Header, Value: f.Value, Hosts: f.Hosts, Clear: f.Clear})
	}
	return all, nil
}

func readBounded(name string, most int64) ([]byte, error) {
	info, err := os.Stat(name)
	if err == nil && info.Mode().IsRegular() && info.Size() > most {
		return nil, fmt.Errorf("%s is larger than %d bytes", name, most)
	}
	if err != nil {
		return nil, err
	}
	return os.ReadFile(name)
}

func (a *app) netCommand() *cobra.Command {
	cmd := noun("net", "Say what sandboxes may reach", a.netLs(), a.netShow(), a.netAllow(), a.netDeny(), a.netSet(), a.netGC())
	cmd.Long = `Net says what sandboxes may reach. Only those whose snapshot has a network card
(tine snapshot create --net) reach anything, and nothing that no rule allows:

  [tcp:|udp:]TARGET[:PORTS]

TARGET is an IPv4 address, a prefix (10.1.0.0/16), a name (example.com), all names
below one (*.example.com, which is not example.com itself) or *. PORTS are ports
and ranges (443,8000-8010); none means all. Names that a rule is for resolve, and
no others. The host itself and, unless the operator says otherwise, private
networks cannot be reached whatever the rules say. docs/isolation.md has it all.`
	cmd.Example = `  tine net ls
  tine net show sb-1
  tine net allow sb-1 api.example.com '*.example.org:443'
  tine net deny sb-1 api.example.com
  tine net set sb-1 --allow 203.0.113.0/24:5432`
	return cmd
}

func netTable(all ...client.NetRow) table {
	t := table{header: []string{"ID", "SNAPSHOT", "RULES", "INSPECT", "OPEN", "CONNECTIONS", "UP", "DOWN", "DENIED"}}
	for _, n := range all {
		t.add(n.ID, n.SnapshotTag, strconv.Itoa(n.Rules), yesNo(n.Inspect), count(n.ConnectionsOpen), count(n.ConnectionsTotal),
			mib(n.BytesUp), mib(n.BytesDown), count(n.Denied))
	}
	return t
}

func count(n int64) string { return strconv.FormatInt(n, 10) }

func yesNo(yes bool) string {
	if yes {
		return "yes"
	}
	return "no"
}

func (a *app) netLs() *cobra.Command {
	cmd := lister(a, "List sandboxes with a network card", (*client.Client).Nets, netTable)
	cmd.Example = `  tine net ls`
	return cmd
}

func (a *app) netShow() *cobra.Command {
	return &cobra.Command{
		Use:   "show SANDBOX",
		Short: "Show what a sandbox may reach, and what it was denied",
		Long: `Show tells what a sandbox may reach, what it has sent and got, and what it was
denied, with the reason, the latest first. It is counted since the sandbox's
present machine came up, or since the daemon started.`,
		Example:           `  tine net show sb-1`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeEach(a.completeSandboxes),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				n, err := c.Net(ctx, args[0])
				if err != nil {
					return err
				}
				return a.printNet(args[0], n)
			})
		}),
	}
}

func (a *app) printNet(id string, n client.SandboxNet) error {
	if err := a.print(n, shownNet(id, n)); err != nil || a.flags.json || a.flags.quiet {
		return err
	}
	for _, d := range n.Denials {
		if rule := ruleFor(d); rule != "" {
			a.notef("hint: to allow the latest that a rule can: tine net allow %s '%s'", id, rule)
			return nil
		}
	}
	return nil
}

func shownNet(id string, n client.SandboxNet) table {
	var t table
	t.add("sandbox", id)
	t.add("inspect", yesNo(n.Inspect))
	t.add("rate", "up "+rateOf(n.UpBytesPerSecond)+", down "+rateOf(n.DownBytesPerSecond))
	for _, s := range n.Secrets {
		how := ""
		if s.Clear {
			how = ", in clear"
		}
		t.add("secret", fmt.Sprintf("%s: header %s of %s%s", plain(s.Name), plain(s.Header), plain(strings.Join(s.Hosts, ", ")), how))
	}
	for _, rule := range n.Allow {
		t.add("allow", rule)
	}
	if len(n.Allow) == 0 {
		t.add("allow", "nothing")
	}
	s := n.Stats
	t.add("connections", fmt.Sprintf("%d open, %d in all, %d did not come about", s.ConnectionsOpen+s.FlowsOpen, s.ConnectionsTotal+s.FlowsTotal, s.DialFailed))
	t.add("sent", fmt.Sprintf("%s, got %s", mib(s.BytesUp), mib(s.BytesDown)))
	t.add("names", fmt.Sprintf("%d asked for", s.DNSQueries))
	t.add("denied", strconv.FormatInt(s.Denied, 10))
	for _, d := range n.Denials {
		t.add("", strings.TrimSpace(d.Protocol+" "+plain(d.To)), reasonOf(d.Reason), fmt.Sprintf("%d times", d.Count), ago(d.Last))
	}
	return t
}

func rateOf(bytes int64) string {
	if bytes == 0 {
		return "unbounded"
	}
	return mib(bytes) + " a second"
}

func ago(when string) string {
	at, err := time.Parse(time.RFC3339Nano, when)
	if err != nil {
		return ""
	}
	return age(at.Unix()) + " ago"
}

// plain is text of a sandbox's for a terminal.
func plain(text string) string {
	if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) || r > unicode.MaxASCII }) {
		return strconv.QuoteToASCII(text)
	}
	return text
}

// reasonOf says in words why something was denied.
func reasonOf(reason string) string {
	words := map[string]string{
		"no_rule":              "no rule allows it",
		"unknown_name":         "no rule is for that name",
		"query_type":           "only addresses are looked up",
		"unspecified":          "never: not an address to connect to",
		"loopback":             "never: loopback",
		"link_local":           "never: link-local",
		"multicast":            "never: multicast or reserved",
		"private":              "a private network that the operator keeps (serve --net-private)",
		"host":                 "never: the host itself",
		"not_ipv4":             "not IPv4",
		"no_server_name":       "inspected, and it showed no name",
		"wrong_server_name":    "inspected, and no rule allows the name it showed",
		"cannot_inspect":       "UDP where connections are inspected",
		"too_many_connections": "too many connections at once",
		"too_many_flows":       "too many UDP flows at once",
		"overflow":             "others, for which there is no room here",
	}
	if said, ok := words[reason]; ok {
		return said
	}
	return plain(reason)
}

// ruleFor is a rule that would have allowed what was denied, or "".
func ruleFor(d client.EgressDenial) string {
	target := d.To
	switch d.Reason {
	case "no_rule":
		target = d.Protocol + ":" + target
	case "unknown_name":
		target = strings.TrimSuffix(target, ".")
	default:
		return ""
	}
	if target == "" || strings.Trim(target, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.:-_") != "" {
		return "" // it is for a shell, and the sandbox chose it
	}
	return target
}

// changeNet is a command that changes rules.
func (a *app) changeNet(ctx context.Context, id string, change func(*client.Client) (client.SandboxNet, error)) error {
	return a.withClient(ctx, func(c *client.Client) error {
		n, err := change(c)
		if err != nil {
			return err
		}
		t := table{}
		for _, rule := range n.Allow {
			t.add(rule)
		}
		if err = a.print(n, t); err == nil && len(n.Allow) == 0 && !a.flags.json && !a.flags.quiet {
			a.notef("sandbox %s reaches nothing", id)
		}
		return err
	})
}

func (a *app) netAllow() *cobra.Command {
	return &cobra.Command{
		Use:   "allow SANDBOX RULE...",
		Short: "Add rules to what a sandbox may reach, and print them all",
		Example: `  tine net allow sb-1 api.example.com
  tine net allow sb-1 'tcp:*.example.org:80,443' 203.0.113.7`,
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: a.completeEach(a.completeSandboxes),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.changeNet(ctx, args[0], func(c *client.Client) (client.SandboxNet, error) {
				return c.ChangeNet(ctx, args[0], client.NetChange{Allow: args[1:]})
			})
		}),
	}
}

func (a *app) netDeny() *cobra.Command {
	return &cobra.Command{
		Use:   "deny SANDBOX RULE...",
		Short: "Take rules away, and print those that stay",
		Long: `Deny takes rules away, each as tine net show has it, and cuts what the sandbox has
open and may not reach any more. It adds none: what no rule allows is denied.`,
		Example:           `  tine net deny sb-1 api.example.com`,
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: a.completeEach(a.completeSandboxes, a.completeRules),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.changeNet(ctx, args[0], func(c *client.Client) (client.SandboxNet, error) {
				return c.ChangeNet(ctx, args[0], client.NetChange{Remove: args[1:]})
			})
		}),
	}
}

// completeRules completes the rules of the sandbox that is named before.
func (a *app) completeRules(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return a.complete(cmd.Context(), func(ctx context.Context, c *client.Client) []string {
		n, err := c.Net(ctx, args[0])
		if err != nil {
			return nil // a shell has nowhere to show it
		}
		return n.Allow
	})
}

func (a *app) netSet() *cobra.Command {
	var rules ruleFlags
	var inspect bool
	var cmd *cobra.Command
	cmd = &cobra.Command{
		Use:   "set SANDBOX [--allow RULE]... [--allow-file FILE]... [--inspect=false]",
		Short: "Set what a sandbox may reach, and print the rules",
		Long: `Set has the rules take the place of those that there were; without any the
sandbox reaches nothing. What it has open and may not reach any more is cut. Its
egress secrets and rates stay, and so does --inspect unless it is given.`,
		Example: `  tine net set sb-1 --allow api.example.com --allow 203.0.113.0/24
  tine net set sb-1 --allow-file rules.txt --inspect
  tine net set sb-1`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeEach(a.completeSandboxes),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			allow, err := rules.read()
			if err != nil {
				return err
			}
			var given *bool
			if cmd.Flags().Changed("inspect") {
				given = &inspect
			}
			return a.changeNet(ctx, args[0], func(c *client.Client) (client.SandboxNet, error) {
				return c.SetNet(ctx, args[0], allow, given)
			})
		}),
	}
	rules.add(cmd, "let the sandbox")
	cmd.Flags().BoolVar(&inspect, "inspect", false, "have connections to ports 80 and 443 that a rule by name opens show such a name (default as it is)")
	return cmd
}

func (a *app) netGC() *cobra.Command {
	return &cobra.Command{
		Use:   "gc",
		Short: "Remove what machines that ended have left on the host",
		Long: `Gc removes what machines that ended have left on the daemon's host. Networks are
no part of that: a sandbox's network is in a namespace that ends with its machine,
and there is nothing of it in the host's own network. What can be left, when a
daemon was killed, are control groups. A daemon that starts removes them, too.`,
		Example: `  tine net gc`,
		Args:    cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				report, err := c.CollectNets(ctx)
				if err != nil {
					return err
				}
				if a.flags.json {
					return a.printJSON(report)
				}
				if a.flags.quiet {
					return nil
				}
				return a.printf("nothing is left of machines that ended; %d sandboxes have a network\n", report.Networks)
			})
		}),
	}
}
