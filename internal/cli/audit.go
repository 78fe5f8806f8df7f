package cli

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/audit"
	"github.com/tinevm/tine/internal/errdef"
)

// AuditOptions say what the daemon remembers of who did what.
type AuditOptions struct {
	// Dir is the log's directory; "" means audit in the state directory, and
	// "none" that there is no log.
	Dir string
	// Sync is always, interval or never.
	Sync string
	// Reads has requests that change nothing remembered, too.
	Reads bool
}

// auditFlags are the flags of serve about the audit log.
func auditFlags(cmd *cobra.Command, o *AuditOptions) {
	f := cmd.Flags()
	f.StringVar(&o.Dir, "audit-log", "", "keep the audit log in `DIR`, or none (default STATE-DIR/audit)")
	f.StringVar(&o.Sync, "audit-sync", "interval", "wait for the disk `always|interval|never`: before each act, five times a second, or not at all")
	f.BoolVar(&o.Reads, "audit-reads", false, "log requests that change nothing, too")
}

func (a *app) auditCommand() *cobra.Command {
	return noun("audit", "Read and verify the audit log", a.auditVerify(), a.auditTail(), a.auditExport(), a.auditRotate())
}

// auditDir is the log's directory: an argument, or that of the daemon of this
// host.
func (a *app) auditDir(args []string) string {
	if len(args) > 0 {
		return args[0]
	}
	return filepath.Join(a.stateDir(), "audit")
}

func (a *app) auditVerify() *cobra.Command {
	var anchors []string
	var opts audit.VerifyOptions
	cmd := &cobra.Command{
		Use:   "verify [DIR]",
		Short: "See that nobody has changed the audit log",
		Long: `Verify reads the whole log, also while the daemon writes to it, and names each
place where a line was changed, removed, moved, inserted or cut off. It exits
with 1 if there is one.

The chain has no key: whoever can write to the directory can write the log anew.
Keep the last line's number and hash elsewhere, and give them to a later verify
as --anchor: then that is found, too.`,
		Example: `  tine audit verify
  tine audit verify --json --anchor 4711:5f2c…
  tine audit verify --trimmed /backup/audit`,
		Args: cobra.MaximumNArgs(1),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			var err error
			if opts.Anchors, err = parseAnchors(anchors); err != nil {
				return err
			}
			report, err := audit.Verify(ctx, a.auditDir(args), opts)
			if err != nil {
				return err
			}
			return a.printReport(report)
		}),
	}
	f := cmd.Flags()
	f.StringArrayVar(&anchors, "anchor", nil, "what a line's hash was: `SEQ:HASH`; may be repeated")
	f.BoolVar(&opts.Trimmed, "trimmed", false, "the oldest files were moved elsewhere")
	return cmd
}

// parseAnchors reads SEQ:HASH.
func parseAnchors(flags []string) (map[uint64]string, error) {
	anchors := map[uint64]string{}
	for _, flag := range flags {
		number, hash, _ := strings.Cut(flag, ":")
		seq, err := strconv.ParseUint(number, 10, 64)
		if sum, hexErr := hex.DecodeString(hash); err != nil || hexErr != nil || len(sum) != 32 {
			return nil, fmt.Errorf("%w: --anchor %q is not SEQ:HASH", errdef.ErrInvalid, flag)
		}
		anchors[seq] = strings.ToLower(hash)
	}
	return anchors, nil
}

func (a *app) printReport(r audit.Report) error {
	var t table
	for _, p := range r.Problems {
		place := p.File
		if p.Line > 0 {
			place += ":" + strconv.Itoa(p.Line)
		}
		t.add(place, "seq "+strconv.FormatUint(p.Seq, 10), p.Kind, p.Detail)
	}
	if r.OK {
		t.add(fmt.Sprintf("ok: %d lines in %d files, %d to %d, last hash %s", r.Lines, r.Files, r.First, r.Last, r.Hash))
	}
	err := a.print(r, t)
	if err == nil && !r.OK {
		err = fmt.Errorf("the audit log is not what was written: places found: %d", len(r.Problems))
	}
	return err
}

func (a *app) auditTail() *cobra.Command {
	var n int
	var follow bool
	cmd := &cobra.Command{
		Use:   "tail [DIR]",
		Short: "Print the last lines of the audit log",
		Long:  `Tail prints the last lines for people to read, or with --json as they are.`,
		Example: `  tine audit tail
  tine audit tail -f -n 0 --json`,
		Args: cobra.MaximumNArgs(1),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			if n < 0 {
				return fmt.Errorf("%w: -n %d", errdef.ErrInvalid, n)
			}
			return a.tail(ctx, a.auditDir(args), n, follow)
		}),
	}
	cmd.Flags().IntVarP(&n, "lines", "n", 10, "how many")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what is written from now on")
	return cmd
}

func (a *app) tail(ctx context.Context, dir string, n int, follow bool) error {
	lines, err := audit.Tail(ctx, dir, max(n, 1)) // with -n 0 it tells where to begin
	if err != nil {
		return err
	}
	var last uint64
	for i, l := range lines {
		last = l.Seq
		if i >= len(lines)-n {
			if err = a.printLine(l); err != nil {
				return err
			}
		}
	}
	if !follow {
		return nil
	}
	return audit.Follow(ctx, dir, last, a.printLine)
}

// printLine prints a line as it is, or what a person wants to know of it.
func (a *app) printLine(l audit.Line) error {
	if a.flags.json {
		return a.printf("%s\n", l.Text)
	}
	text := []string{l.TS, l.Phase, l.Action, l.Object, l.Actor, l.Result}
	if l.Status > 0 {
		text = append(text, strconv.Itoa(l.Status))
	}
	for _, more := range []string{l.Code, strings.Join(l.Made, " "), l.Note} {
		if more != "" {
			text = append(text, more)
		}
	}
	for i := range text {
		if text[i] == "" {
			text[i] = "-"
		}
	}
	return a.printf("%d %s\n", l.Seq, strings.TrimRight(strings.Join(text, " "), " -"))
}

func (a *app) auditExport() *cobra.Command {
	var since, until string
	cmd := &cobra.Command{
		Use:   "export [DIR]",
		Short: "Print lines of the audit log, as they are",
		Long: `Export prints the lines of a time as they are: JSON, one object a line. A time
is RFC 3339, or how long ago it was. It does not verify: use tine audit verify.`,
		Example: `  tine audit export --since 24h >audit.jsonl
  tine audit export --since 2026-11-01T00:00:00Z --until 2026-12-01T00:00:00Z`,
		Args: cobra.MaximumNArgs(1),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			from, err := parseTime("--since", since, time.Time{})
			if err != nil {
				return err
			}
			to, err := parseTime("--until", until, time.Unix(1<<40, 0))
			if err != nil {
				return err
			}
			return a.export(ctx, a.auditDir(args), from, to)
		}),
	}
	cmd.Flags().StringVar(&since, "since", "", "not before this `TIME`")
	cmd.Flags().StringVar(&until, "until", "", "before this `TIME`")
	return cmd
}

func (a *app) auditRotate() *cobra.Command {
	return &cobra.Command{
		Use:   "rotate",
		Short: "Have the daemon begin a new file of its audit log",
		Long: `Rotate has the daemon seal the active file of its audit log and go on in the
next, whose first line carries the chain on, and prints the name of the sealed
one. Nothing is added to that file any more: it can be copied or moved away.`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				sealed, err := c.RotateAudit(ctx)
				if err != nil {
					return err
				}
				if a.flags.json {
					return a.printJSON(sealed)
				}
				return a.printf("%s\n", sealed.File)
			})
		}),
	}
}

// errEnough ends a read: times never go back, so there is no more.
var errEnough = errors.New("enough")

func (a *app) export(ctx context.Context, dir string, from, to time.Time) error {
	_, err := audit.Read(ctx, dir, 0, func(l audit.Line) error {
		switch at := l.Time(); {
		case at.Before(from):
			return nil
		case !at.Before(to):
			return errEnough
		}
		return a.printf("%s\n", l.Text)
	})
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}

// parseTime reads a time, or how long ago it was.
func parseTime(flag, value string, unset time.Time) (time.Time, error) {
	if value == "" {
		return unset, nil
	}
	if ago, err := time.ParseDuration(value); err == nil && ago >= 0 {
		return time.Now().Add(-ago), nil
	}
	t, err := time.Parse(time.RFC3339Nano, value)
	if err != nil {
		return time.Time{}, fmt.Errorf("%w: %s %q is no time", errdef.ErrInvalid, flag, value)
	}
	return t, nil
}
