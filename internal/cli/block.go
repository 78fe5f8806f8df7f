package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/block"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/record"
)

func (a *app) blockCommand() *cobra.Command {
	return noun("block", "Publish, run and judge blocks",
		a.blockLs(), a.blockShow(), a.blockAdd(), a.blockCheck(), a.blockRm(), a.blockRun(), a.blockTrust(), a.blockAudit())
}

const blockRefHelp = `REF is NAME, of which the highest version is meant, NAME@VERSION, or a digest.`

func (a *app) blockLs() *cobra.Command {
	return lister(a, "List blocks", (*client.Client).Blocks, blockTable)
}

func blockTable(blocks ...client.Block) table {
	t := table{header: []string{"BLOCK", "DIGEST", "LEVEL", "SCORE", "STATUS", "PROVIDES", "RUNS ON"}}
	for _, b := range blocks {
		var provides []string
		for _, p := range b.Provides {
			provides = append(provides, p.Name+" "+p.Version)
		}
		t.add(b.Name+"@"+b.Version, short(b.Digest), string(b.MinimumTrustLevel), scoreText(b.Score), string(b.Status),
			dash(strings.Join(provides, ", ")), targetOf(b))
	}
	return t
}

// targetOf is what a block runs on.
func targetOf(b client.Block) string {
	switch {
	case b.Source != "":
		return b.Source
	case b.Image != "":
		return "image " + b.Image
	}
	return "snapshot " + b.Snapshot
}

func scoreText(score float64) string { return fmt.Sprintf("%.4f", score) }

func (a *app) blockShow() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "show REF",
		Short: "Describe a block, or print its file",
		Long:  blockRefHelp,
		Example: `  tine block show git-env
  tine block show git-env@2.39.5 --format file
  tine block show git-env --format forge`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeFirst(a.completeBlocks),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.withClient(ctx, func(c *client.Client) error { return a.showBlock(ctx, c, args[0], format) })
		}),
	}
	cmd.Flags().StringVar(&format, "format", "", "`file`, its file byte for byte, or forge, the form that Forge exchanges")
	a.completeFlag(cmd, "format", cobra.FixedCompletions([]string{"file", "forge"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func (a *app) showBlock(ctx context.Context, c *client.Client, ref, format string) error {
	switch format {
	case "forge":
		b, err := c.ForgeBlock(ctx, ref)
		if err != nil {
			return err
		}
		return a.printJSON(b)
	case "", "file":
	default:
		return fmt.Errorf("%w: --format %q: file or forge", errdef.ErrInvalid, format)
	}
	b, err := c.Block(ctx, ref)
	if err != nil {
		return err
	}
	if format == "file" {
		return a.printf("%s", b.File)
	}
	return a.print(b, blockDetail(b))
}

func blockDetail(b client.BlockDetail) table {
	var t table
	t.add("block", b.Name+"@"+b.Version)
	t.add("digest", b.Digest)
	t.add("id", b.ID)
	t.add("description", b.Description)
	t.add("author", b.Author)
	t.add("publisher", strings.TrimSpace(b.Publisher+" "+b.AddedAt))
	t.add("trust level", string(b.MinimumTrustLevel))
	t.add("trust", scoreText(b.Score)+" "+string(b.Status))
	t.add("load", string(b.CognitiveLoad))
	for _, p := range b.Provides {
		t.add("provides", p.Name+" "+p.Version)
	}
	for _, r := range b.Requires {
		t.add("requires", r.Name+" "+r.Version+" ("+string(r.Kind)+")")
	}
	for _, part := range b.ComposedOf {
		t.add("made of", part)
	}
	t.add("runs on", targetOf(client.Block{Source: b.Source, Image: b.Image, Snapshot: b.Snapshot}))
	t.add("command", fmt.Sprintf("%q", b.Command))
	return t
}

func (a *app) blockAdd() *cobra.Command {
	return &cobra.Command{
		Use:   "add FILE...",
		Short: "Publish blocks",
		Long: `Add publishes blocks, each of a block.toml or a directory with one. That takes
trust level Three: a token of scope admin, or the daemon's unix socket.`,
		Example: `  tine block add examples/blocks/git-env`,
		Args:    cobra.MinimumNArgs(1),
		RunE: a.verb(func(ctx context.Context, paths []string) error {
			var files [][]byte
			for _, path := range paths {
				data, err := readBlock(path)
				if err != nil {
					return err
				}
				if _, err = block.NewEntry(data, checkRule); err != nil {
					return fmt.Errorf("%s: %w", path, err)
				}
				files = append(files, data)
			}
			return a.withClient(ctx, func(c *client.Client) error {
				var added []client.Block
				for i, data := range files {
					b, err := c.AddBlock(ctx, data)
					if err != nil {
						return errors.Join(a.printBlocks(added), fmt.Errorf("%s: %w", paths[i], err))
					}
					added = append(added, b)
				}
				return a.printBlocks(added)
			})
		}),
	}
}

func (a *app) printBlocks(blocks []client.Block) error {
	if len(blocks) == 0 {
		return nil
	}
	return a.print(blocks, blockTable(blocks...))
}

// readBlock reads the file of a block, or the one in a directory.
func readBlock(path string) (_ []byte, err error) {
	if info, statErr := os.Stat(path); statErr == nil && info.IsDir() {
		path = filepath.Join(path, block.FileName)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%w: read block: %w", errdef.ErrInvalid, err)
	}
	defer func() { _ = f.Close() }() // only read
	data, err := io.ReadAll(io.LimitReader(f, block.MaxFile+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: read block: %w", errdef.ErrInvalid, err)
	case len(data) > block.MaxFile:
		return nil, fmt.Errorf("%w: %s: more than %d bytes", errdef.ErrInvalid, path, block.MaxFile)
	}
	return data, nil
}

// checkRule knows the rules of canonicalisation.
func checkRule(name string) error { return record.Rules{Streams: []string{name}}.Validate() }

// checked is what blockCheck says of one file.
type checked struct {
	File   string `json:"file"`
	OK     bool   `json:"ok"`
	Block  string `json:"block,omitempty"`
	Digest string `json:"digest,omitempty"`
	Error  string `json:"error,omitempty"`
}

func (a *app) blockCheck() *cobra.Command {
	return &cobra.Command{
		Use:   "check FILE...",
		Short: "See that files of blocks are right, without a daemon",
		Long: `Check reads files, or directories with a block.toml, and says what is wrong with
each: the line, or the field. It exits with 1 if anything is.`,
		Example: `  tine block check examples/blocks/*`,
		Args:    cobra.MinimumNArgs(1),
		RunE: a.verb(func(_ context.Context, paths []string) error {
			var all []checked
			var t table
			bad := 0
			for _, path := range paths {
				c := checkBlock(path)
				all = append(all, c)
				if c.OK {
					t.add(path, "ok", c.Block, short(c.Digest))
				} else {
					bad++
					t.add(path, c.Error)
				}
			}
			if err := a.print(all, t); err != nil {
				return err
			}
			if bad > 0 {
				return fmt.Errorf("%d of %d blocks are wrong", bad, len(paths))
			}
			return nil
		}),
	}
}

func checkBlock(path string) checked {
	data, err := readBlock(path)
	var e block.Entry
	if err == nil {
		e, err = block.NewEntry(data, checkRule)
	}
	if err != nil {
		return checked{File: path, Error: err.Error()}
	}
	return checked{File: path, OK: true, Block: e.Ref.Name + "@" + e.Ref.Version.String(), Digest: e.Ref.Digest}
}

func (a *app) blockRm() *cobra.Command {
	return &cobra.Command{
		Use:   "rm REF...",
		Short: "Remove blocks",
		Long: blockRefHelp + ` A NAME that has several
versions is refused. What is known of a block stays, and counts again when the
same file is published again.`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeBlocks,
		RunE: a.verb(func(ctx context.Context, refs []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				return a.removeAll(refs, func(ref string) error { return c.RemoveBlock(ctx, ref) })
			})
		}),
	}
}

// blockRunFlags are the flags of block run.
type blockRunFlags struct {
	client.RunBlockOptions
	interactive bool
	seed        int64
	start       string
	bundle      string
}

func (a *app) blockRun() *cobra.Command {
	var flags blockRunFlags
	var cmd *cobra.Command
	cmd = &cobra.Command{
		Use:   "run [-i] REF|FILE",
		Short: "Run a block, and keep a record",
		Long: `Run runs a block deterministically, prints what its command prints and exits as
the command did: with its exit code, 128 plus the signal that ended it, 124 when
it ran out of time, 126 or 127 when it could not be started. The record's id
goes to standard error. What the block runs on is made the first time.

` + blockRefHelp + ` What has a
slash in it, or ends with .toml, is a FILE or a directory with one: a block that
is not published, which takes trust level Two.`,
		Example: `  tine block run git-env
  echo one two three | tine block run -i word-count
  tine block run examples/blocks/git-env --record git-env.tar`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeBlockOrFile,
		RunE: a.verb(func(ctx context.Context, args []string) error {
			if err := flags.read(a, cmd); err != nil {
				return err
			}
			return a.withClient(ctx, func(c *client.Client) error { return a.runBlock(ctx, c, args[0], flags) })
		}),
	}
	f := cmd.Flags()
	f.BoolVarP(&flags.interactive, "interactive", "i", false, "pass standard input on, in place of the block's own input")
	f.Int64Var(&flags.seed, "seed", 0, "the seed in place of the block's own")
	f.StringVar(&flags.start, "start", "", "the guest's clock in place of the block's own: a `TIME` as in 2026-01-01T00:00:00Z")
	f.BoolVar(&flags.Quarantined, "quarantined", false, "run it although it is in quarantine, to find out about it")
	f.StringVar(&flags.bundle, "record", "", "write the record with all that it takes to verify it to `FILE`")
	return cmd
}

func (f *blockRunFlags) read(a *app, cmd *cobra.Command) error {
	if cmd.Flags().Changed("seed") {
		f.Seed = &f.seed
	}
	if f.start != "" {
		at, err := time.Parse(time.RFC3339Nano, f.start)
		if err != nil {
			return fmt.Errorf("%w: --start %q is no time as in 2026-01-01T00:00:00Z", errdef.ErrInvalid, f.start)
		}
		f.Start = at
	}
	if !f.interactive {
		return nil
	}
	data, err := io.ReadAll(io.LimitReader(a.Stdin, block.MaxStdin+1))
	if err != nil {
		return fmt.Errorf("read stdin: %w", err)
	}
	if len(data) > block.MaxStdin {
		return fmt.Errorf("%w: more than %d bytes of stdin", errdef.ErrInvalid, block.MaxStdin)
	}
	f.Stdin = append([]byte{}, data...) // not nil
	return nil
}

// isBlockFile reports whether an argument is a file and no name of a block.
func isBlockFile(arg string) bool {
	return strings.ContainsRune(arg, filepath.Separator) || strings.HasSuffix(arg, ".toml") || arg == "." || arg == ".."
}

func (a *app) runBlock(ctx context.Context, c *client.Client, ref string, flags blockRunFlags) error {
	run := func(report func(client.Progress)) (client.BlockRun, error) {
		return c.RunBlock(ctx, ref, flags.RunBlockOptions, report)
	}
	if isBlockFile(ref) {
		if flags.Quarantined {
			return fmt.Errorf("%w: --quarantined is for blocks that are published", errdef.ErrInvalid)
		}
		data, err := readBlock(ref)
		if err != nil {
			return err
		}
		run = func(report func(client.Progress)) (client.BlockRun, error) {
			return c.RunBlockFile(ctx, data, flags.RunBlockOptions, report)
		}
	}
	var bundle *outFile
	if flags.bundle != "" {
		const mode = 0o600 // it has input and output
		var err error
		if bundle, err = createOut(flags.bundle, mode); err != nil {
			return err
		}
		defer bundle.discard()
	}
	news := a.newNews()
	res, err := run(news.report)
	news.close()
	if err != nil {
		return err
	}
	if err = a.printBlockRun(res); err != nil {
		return err
	}
	if bundle != nil {
		if err = fetchBundle(ctx, c, res.RecordID, bundle); err != nil {
			return err
		}
	}
	return blockOutcome(res)
}

func (a *app) printBlockRun(res client.BlockRun) error {
	if a.flags.json {
		return a.printJSON(res)
	}
	_, _ = a.Stderr.Write(res.Stderr) // nobody is left to tell
	if _, err := a.Stdout.Write(res.Stdout); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	if a.flags.quiet {
		return nil
	}
	if res.Failure != "" {
		a.notef("tine: %s", res.Failure)
	}
	a.notef("record: %s", res.RecordID)
	return nil
}

// blockOutcome is the error that makes this program exit as the command did.
func blockOutcome(res client.BlockRun) error {
	code := res.ExitCode
	switch signal := unix.SignalNum(res.Signal); {
	case res.Failure == record.TimedOut:
		code = exitTimeout
	case res.Failure == record.NotExecutable:
		code = exitNotExec
	case res.Failure == record.NotFound:
		code = exitNoCommand
	case signal > 0:
		code = exitSignal + int(signal)
	case code == 0 && string(res.Status) != client.BlockSucceeded, code < 0:
		code = exitError
	}
	if code == 0 {
		return nil
	}
	return &guestExit{code: code}
}

func (a *app) blockTrust() *cobra.Command {
	return &cobra.Command{
		Use:   "trust REF",
		Short: "Say how far a block can be trusted, and why",
		Long: `Trust prints a block's score, from 0 to 1, and every piece of evidence with what
it weighs. docs/blocks.md has the formula.`,
		Example:           `  tine block trust git-env`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeFirst(a.completeBlocks),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				trust, err := c.BlockTrust(ctx, args[0])
				if err != nil {
					return err
				}
				return a.printTrust(trust)
			})
		}),
	}
}

func (a *app) printTrust(trust client.BlockTrust) error {
	if a.flags.json {
		return a.printJSON(trust)
	}
	if a.flags.quiet {
		return a.printf("%s\n", scoreText(trust.Score))
	}
	if err := a.printf("%s  %s: %s, for %.2f, against %.2f\n", scoreText(trust.Score), trust.Status, trust.Block, trust.For, trust.Against); err != nil {
		return err
	}
	if len(trust.Evidence) == 0 {
		return nil
	}
	t := table{header: []string{"WEIGHT", "VERDICT", "BY", "OF", "AT", "NOTE"}}
	for _, e := range trust.Evidence {
		of := string(e.Kind)
		if e.Record != "" {
			of = fmt.Sprintf("record %s, %d runs", e.Record, e.Runs)
		}
		var notes []string
		for _, note := range []string{e.Note, e.Why} {
			if note != "" {
				notes = append(notes, note)
			}
		}
		if e.Lift {
			notes = append(notes, "lifts the quarantine")
		}
		t.add(fmt.Sprintf("%.4f", e.Weight), string(e.Verdict), e.Key, of, e.At, strings.Join(notes, "; "))
	}
	return a.print(trust, t)
}

func (a *app) blockAudit() *cobra.Command {
	var passed, rejected, lift bool
	var note string
	cmd := &cobra.Command{
		Use:   "audit REF --passed|--rejected [--note TEXT] [--lift]",
		Short: "Say what looking at a block has shown",
		Long: `Audit says that you have looked at a block, and what that has shown. It takes
trust level Three. Of what one auditor says the last counts; what its publisher
says weighs nothing. With --lift the mismatches so far are explained, and the
block's quarantine ends.`,
		Example: `  tine block audit git-env --passed --note 'read it, and ran it on two hosts'
  tine block audit git-env --passed --lift --note 'the mismatch was a bad memory module'`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeFirst(a.completeBlocks),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			verdict := client.AuditPassed
			if rejected {
				verdict = client.AuditRejected
			}
			return a.withClient(ctx, func(c *client.Client) error {
				trust, err := c.AuditBlock(ctx, args[0], verdict, note, lift)
				if err != nil {
					return err
				}
				return a.printTrust(trust)
			})
		}),
	}
	f := cmd.Flags()
	f.BoolVar(&passed, "passed", false, "nothing is wrong with it")
	f.BoolVar(&rejected, "rejected", false, "something is wrong with it")
	f.StringVar(&note, "note", "", "a line about it")
	f.BoolVar(&lift, "lift", false, "end its quarantine")
	cmd.MarkFlagsMutuallyExclusive("passed", "rejected")
	cmd.MarkFlagsOneRequired("passed", "rejected")
	cmd.MarkFlagsMutuallyExclusive("rejected", "lift")
	return cmd
}

func (a *app) completeBlocks(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return a.complete(cmd.Context(), func(ctx context.Context, c *client.Client) (refs []string) {
		blocks, err := c.Blocks(ctx)
		if err != nil {
			return nil // a shell has nowhere to show it
		}
		for _, b := range blocks {
			refs = append(refs, cobra.CompletionWithDesc(b.Name+"@"+b.Version, b.Description))
		}
		return refs
	})
}

// completeBlockOrFile completes what block run takes.
func (a *app) completeBlockOrFile(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	refs, _ := a.completeBlocks(cmd, args, word)
	return refs, cobra.ShellCompDirectiveDefault
}
