package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
)

func (a *app) recordCommand() *cobra.Command {
	return noun("record", "List, show, export and check the records of runs",
		a.recordLs(), a.recordShow(), a.recordExport(), a.recordCheck(), a.recordKey())
}

func (a *app) recordLs() *cobra.Command {
	var f client.RecordFilter
	var since string
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List records, the newest first",
		Example: `  tine record ls --snapshot py -n 20
  tine record ls --since 24h --mode deterministic`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			var err error
			if f.Since, err = parseTime("--since", since, time.Time{}); err != nil {
				return err
			}
			return a.withClient(ctx, func(c *client.Client) error {
				page, err := c.Records(ctx, f)
				if err != nil {
					return err
				}
				if err = a.print(page, recordTable(page.Records)); err != nil || a.flags.json || a.flags.quiet {
					return err
				}
				for _, name := range page.Unreadable {
					a.notef("tine: record %s cannot be read: see tine record check", name)
				}
				if page.NextBefore > 0 {
					a.notef("there are more: --before %d", page.NextBefore)
				}
				return nil
			})
		}),
	}
	flags := cmd.Flags()
	flags.StringVar(&f.Block, "block", "", "only those of a `BLOCK`")
	flags.StringVarP(&f.Snapshot, "snapshot", "s", "", "only those of a snapshot, by digest or the tag that it had")
	flags.StringVar(&f.Mode, "mode", "", "only `deterministic|normal` ones")
	flags.StringVar(&f.User, "user", "", "only those that `USER` asked for")
	flags.StringVar(&since, "since", "", "only those from `TIME` on, or so long ago")
	flags.IntVarP(&f.Limit, "number", "n", 100, "how many at most")
	flags.Int64Var(&f.Before, "before", 0, "only those before record number `SEQ`")
	a.completeFlag(cmd, "snapshot", a.completeSnapshots)
	return cmd
}

func recordTable(records []client.Record) table {
	t := table{header: []string{"ID", "SEQ", "MODE", "SNAPSHOT", "EXIT", "USER", "AGE", "COMMAND"}}
	for _, r := range records {
		created, _ := time.Parse(time.RFC3339Nano, r.CreatedAt) // of the daemon
		what := r.Block
		if what == "" {
			what = commandLine(r.Args)
		}
		t.add(r.ID, strconv.FormatInt(r.Seq, 10), r.Mode, dash(r.SnapshotTag), exitText(r.ExitCode, r.Failure), dash(r.User), age(created.Unix()), dash(what))
	}
	return t
}

// commandLine is a command in a line that is not too long, and fit for a
// terminal.
func commandLine(args []string) string {
	const most = 48
	line := []rune(strconv.Quote(strings.Join(args, " ")))
	if line = line[1 : len(line)-1]; len(line) > most {
		line = append(line[:most:most], '…')
	}
	return string(line)
}

func exitText(code int64, failure string) string {
	if failure != "" {
		return failure
	}
	return strconv.FormatInt(code, 10)
}

func (a *app) recordShow() *cobra.Command {
	return &cobra.Command{
		Use:   "show RECORD",
		Short: "Say what a record says",
		Long: `Show prints what a record says, and with --json its envelope, too. It proves
nothing of it: see tine verify.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeFirst(a.completeRecords),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				r, err := c.Record(ctx, args[0])
				if err != nil {
					return err
				}
				return a.print(r, recordDetail(r))
			})
		}),
	}
}

func recordDetail(r client.Record) table {
	var t table
	add := func(name, value string) {
		if value != "" {
			t.add(name, value)
		}
	}
	add("id", r.ID)
	add("number", strconv.FormatInt(r.Seq, 10))
	add("digest", r.Digest)
	add("mode", r.Mode)
	add("block", r.Block)
	add("user", r.User)
	add("parent", r.Parent)
	add("snapshot", strings.TrimSpace(r.SnapshotTag+" "+r.Snapshot))
	add("engine", r.Engine+" "+r.EngineVersion)
	add("command", strings.Trim(strconv.Quote(strings.Join(r.Args, " ")), `"`))
	add("seed", r.Seed)
	add("start", r.Start)
	add("exit code", exitText(r.ExitCode, ""))
	add("signal", r.Signal)
	add("failure", r.Failure)
	add("output", fmt.Sprintf("%d bytes of stdout, %d of stderr", r.StdoutBytes, r.StderrBytes))
	for _, f := range r.Files {
		add("file", strings.Trim(strconv.Quote(f), `"`))
	}
	if r.Mode == client.RunDeterministic {
		add("virtual time", time.Duration(r.VirtualNS).String())
	}
	add("wall time", millis(r.WallMS)+" ms")
	add("input hash", r.InputHash)
	add("output hash", r.OutputHash)
	if r.CanonicalOutputHash != r.OutputHash {
		add("canonical", r.CanonicalOutputHash)
	}
	add("forge-v1", r.ForgeOutputHash)
	add("memory", r.MemoryDigest)
	add("started", r.StartedAt)
	add("created", r.CreatedAt)
	add("key", r.KeyID)
	return t
}

func (a *app) recordExport() *cobra.Command {
	var to string
	var envelope bool
	cmd := &cobra.Command{
		Use:   "export RECORD [-o FILE]",
		Short: "Write a record, to be verified elsewhere",
		Long: `Export writes a record with all contents and the public key: a tar file, for
tine verify. It holds input and output in the clear. With --envelope it writes
the signed record alone, a line of JSON, which has digests of contents.`,
		Example: `  tine record export 5f2c -o answer.tar
  tine record export 5f2c --envelope | jq -r .payload | base64 -d | jq .predicate`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeFirst(a.completeRecords),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				write := exportBundle(ctx, c, args[0])
				if envelope {
					write = exportEnvelope(ctx, c, args[0])
				}
				return a.writeTo(to, !envelope, write)
			})
		}),
	}
	cmd.Flags().StringVarP(&to, "output", "o", "-", "`FILE` to write; - is standard output")
	cmd.Flags().BoolVar(&envelope, "envelope", false, "only the signed record")
	return cmd
}

func exportBundle(ctx context.Context, c *client.Client, id string) func(io.Writer) error {
	return func(w io.Writer) error {
		r, err := c.RecordBundle(ctx, id)
		if err != nil {
			return err
		}
		_, err = io.Copy(w, r)
		return errors.Join(err, r.Close())
	}
}

func exportEnvelope(ctx context.Context, c *client.Client, id string) func(io.Writer) error {
	return func(w io.Writer) error {
		r, err := c.Record(ctx, id)
		if err != nil {
			return err
		}
		if len(r.Envelope) == 0 {
			return fmt.Errorf("%w: the envelope of record %s needs scope fork", errdef.ErrDenied, r.ID)
		}
		_, err = fmt.Fprintf(w, "%s\n", r.Envelope)
		return err
	}
}

// writeTo has a file written, which appears when it is whole, or standard output.
func (a *app) writeTo(name string, binary bool, write func(io.Writer) error) error {
	if name == "-" {
		if f, isFile := a.Stdout.(*os.File); binary && isFile && term.IsTerminal(int(f.Fd())) {
			return errdef.WithHint(fmt.Errorf("%w: a tar file is not for a terminal", errdef.ErrInvalid), "name a file: -o FILE")
		}
		return write(a.Stdout)
	}
	out, err := createOut(name, 0o600) // it may hold what was secret
	if err != nil {
		return err
	}
	defer out.discard()
	if err = write(out); err != nil {
		return err
	}
	return out.commit()
}

func (a *app) recordCheck() *cobra.Command {
	var contents bool
	var anchors []string
	cmd := &cobra.Command{
		Use:   "check",
		Short: "See that nobody has changed or removed a record",
		Long: `Check walks along the chain of the daemon's records, and names each place where
one was changed, removed, moved, inserted or cut off. It exits with 1 if there is
one. It runs nothing: see tine verify.

Whoever has the key can write another chain. Keep the last record's number and
digest elsewhere, and give them to a later check as --anchor: then that is found,
too.`,
		Example: `  tine record check
  tine record check --contents --anchor 4711:sha256:5f2c…`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				r, err := c.CheckRecords(ctx, contents, anchors...)
				if err != nil {
					return err
				}
				return a.printRecordCheck(r)
			})
		}),
	}
	cmd.Flags().BoolVar(&contents, "contents", false, "read and hash all contents, too; needs scope admin")
	cmd.Flags().StringArrayVar(&anchors, "anchor", nil, "what a record's digest was: `SEQ:sha256:HEX`; may be repeated")
	return cmd
}

func (a *app) printRecordCheck(r client.RecordCheck) error {
	var t table
	for _, p := range r.Problems {
		t.add(p.File, "seq "+strconv.FormatInt(p.Seq, 10), p.Kind, p.Detail)
	}
	if r.OK {
		t.add(fmt.Sprintf("ok: %d records, the last is %d:%s", r.Records, r.LastSeq, r.LastDigest))
	}
	err := a.print(r, t)
	if err == nil && !r.OK {
		err = fmt.Errorf("the records are not what was written: places found: %d", len(r.Problems))
	}
	return err
}

func (a *app) recordKey() *cobra.Command {
	return &cobra.Command{
		Use:   "key",
		Short: "Print the public key that records are verified with",
		Long: `Key prints the daemon's public key in PEM, for those who verify its records, and
on standard error its id, which records name. With --quiet it prints the id.

Without tine, a signature is checked with openssl:

  tine record export 5f2c --envelope >record.json
  jq -r .payload record.json | base64 -d >payload
  jq -r '.signatures[0].sig' record.json | base64 -d >signature
  { printf 'DSSEv1 28 application/vnd.in-toto+json %d ' "$(wc -c <payload)"; cat payload; } >signed
  openssl pkeyutl -verify -rawin -pubin -inkey key.pem -in signed -sigfile signature`,
		Example: `  tine record key >key.pem`,
		Args:    cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				key, err := c.RecordKey(ctx)
				switch {
				case err != nil:
					return err
				case a.flags.json:
					return a.printJSON(key)
				case a.flags.quiet:
					return a.printf("%s\n", key.ID)
				}
				a.notef("key: %s", key.ID)
				return a.printf("%s", key.Pem)
			})
		}),
	}
}

func (a *app) completeRecords(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return a.complete(cmd.Context(), func(ctx context.Context, c *client.Client) (ids []string) {
		page, err := c.Records(ctx, client.RecordFilter{})
		if err != nil {
			return nil // a shell has nowhere to show it
		}
		for _, r := range page.Records {
			what := r.Block
			if what == "" {
				what = commandLine(r.Args)
			}
			ids = append(ids, cobra.CompletionWithDesc(r.ID, what))
		}
		return ids
	})
}

// completeRecordOrFile completes what verify takes.
func (a *app) completeRecordOrFile(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ids, _ := a.completeRecords(cmd, args, word)
	return ids, cobra.ShellCompDirectiveDefault
}
