package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/record"
)

const (
	// maxRunInput bounds the standard input of a recorded run, and its files.
	maxRunInput = 64 << 20

	noNet = "what a recorded run depends on is in its record, and a network is not"

	plainMode      = 0o644
	executableMode = 0o755
)

// recordFlags are the flags of run about the record of it.
type recordFlags struct {
	deterministic, recorded bool

	seed           uint64
	start          string
	bundle         string
	files, collect []string
	virtual, wall  time.Duration
	maxOutput      int64
	rules          []string
	fileRules      []string
	memoryDigest   bool
}

func (r *recordFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.BoolVar(&r.deterministic, "deterministic", false, "have the outcome depend on nothing but the snapshot and this command line, and record it")
	f.BoolVar(&r.recorded, "recorded", false, "record an ordinary run")
	f.Uint64Var(&r.seed, "seed", 0, "what random numbers are made of, with --deterministic")
	f.StringVar(&r.start, "start", "", "the clock's `TIME` when the command starts, with --deterministic (default 2025-01-01T00:00:00Z)")
	f.StringVar(&r.bundle, "record", "", "write the record, with all that it takes to verify it, to `FILE`")
	f.StringArrayVar(&r.files, "file", nil, "copy a file of ours to the guest: `GUESTPATH=FILE`; may be repeated")
	f.StringArrayVar(&r.collect, "collect", nil, "record a file of the guest, and copy it here: `GUESTPATH[=FILE]`; may be repeated")
	f.DurationVar(&r.virtual, "virtual-limit", 0, "end the command after so long by its own clock (default 5m), with --deterministic")
	f.DurationVar(&r.wall, "limit", 0, "give the run up after so long by our clock (default 10m)")
	f.Int64Var(&r.maxOutput, "max-output", 0, "end the command when it has written so many `BYTES` (default 8 MiB)")
	f.StringSliceVar(&r.rules, "rule", nil, "`RULE` for what of the output does not count; may be repeated")
	f.StringSliceVar(&r.fileRules, "file-rule", nil, "`RULE` for what of collected files does not count; may be repeated")
	f.BoolVar(&r.memoryDigest, "memory-digest", false, "record the digest of the guest's memory at the end, with --deterministic")
	cmd.MarkFlagsMutuallyExclusive("deterministic", "recorded")
	for _, flag := range []string{"rule", "file-rule"} {
		_ = cmd.RegisterFlagCompletionFunc(flag, completeRules) // the flags were added above
	}
}

func completeRules(*cobra.Command, []string, string) (names []cobra.Completion, _ cobra.ShellCompDirective) {
	for _, r := range record.AllRules() {
		names = append(names, cobra.CompletionWithDesc(r.Name, r.Does))
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// on reports whether there is to be a record. It refuses flags that do not go
// with the kind of run.
func (r *recordFlags) on(cmd *cobra.Command) (bool, error) {
	on := r.deterministic || r.recorded
	own := []string{
		"seed", "start", "record", "file", "collect", "virtual-limit", "limit", "max-output", "rule", "file-rule", "memory-digest",
	}
	for _, name := range own {
		if !on && cmd.Flags().Changed(name) {
			return false, errdef.WithHint(fmt.Errorf("%w: --%s is for runs that are recorded", errdef.ErrInvalid, name), "add --deterministic, or --recorded")
		}
	}
	for _, flag := range []struct{ name, hint string }{
		{"tty", "all input of a recorded run is there before it starts: leave -t out, and use -i"},
		{"user", "the command runs as root; start it with su or setpriv"},
		{"timeout", "use --virtual-limit, which is exact, or --limit"},
		{"secret", "a record keeps what a run was given, for everybody to read"},
		{"label", "there is no sandbox to have it"},
		{"idle-ttl", "there is no sandbox to have it"},
		{"lifetime", "there is no sandbox to have it"},
		{"pool", "there is no sandbox to take from it"},
		{"memory-limit", "--limit, --virtual-limit and --max-output bound a run"},
		{"cpus", "--limit, --virtual-limit and --max-output bound a run"},
		{"pids-limit", "--limit, --virtual-limit and --max-output bound a run"},
		{"io-limit", "--limit, --virtual-limit and --max-output bound a run"},
		{"allow", noNet},
		{"allow-file", noNet},
		{"inspect", noNet},
		{"net-rate", noNet},
		{"egress-secret", noNet},
	} {
		if on && cmd.Flags().Changed(flag.name) {
			return false, errdef.WithHint(fmt.Errorf("%w: --%s does not go with --deterministic or --recorded", errdef.ErrInvalid, flag.name), flag.hint)
		}
	}
	return on, nil
}

// request is what the flags ask for, but standard input.
func (r *recordFlags) request(getenv func(string) string, e execFlags) (client.RunRequest, error) {
	req := client.RunRequest{
		Mode: client.RunDeterministic, Dir: e.dir, Seed: r.seed, StreamRules: r.rules, FileRules: r.fileRules, MemoryDigest: r.memoryDigest,
		Limits: client.RunLimits{Virtual: r.virtual, Wall: r.wall, Output: r.maxOutput},
	}
	if r.recorded {
		req.Mode = client.RunNormal
	}
	for name, d := range map[string]time.Duration{"virtual-limit": r.virtual, "limit": r.wall} {
		if d < 0 || d%time.Millisecond != 0 {
			return req, fmt.Errorf("%w: --%s %s is not a number of milliseconds", errdef.ErrInvalid, name, d)
		}
	}
	if r.maxOutput < 0 {
		return req, fmt.Errorf("%w: --max-output %d", errdef.ErrInvalid, r.maxOutput)
	}
	var err error
	if req.Env, err = e.environ(getenv); err != nil {
		return req, err
	}
	if r.start != "" {
		if req.Start, err = time.Parse(time.RFC3339Nano, r.start); err != nil {
			return req, fmt.Errorf("%w: --start %q is no time as in 2025-01-31T12:00:00Z", errdef.ErrInvalid, r.start)
		}
	}
	req.Files, err = readFiles(r.files)
	return req, err
}

// readFiles reads the files that --file flags name. Of their modes only one bit
// goes with them: the outcome must not depend on a umask.
func readFiles(flags []string) ([]client.RunFile, error) {
	var files []client.RunFile
	room := int64(maxRunInput)
	for _, flag := range flags {
		guest, name, found := strings.Cut(flag, "=")
		if !found || name == "" || !path.IsAbs(guest) {
			return nil, fmt.Errorf("%w: --file %q is not /GUESTPATH=FILE", errdef.ErrInvalid, flag)
		}
		data, info, err := readRegular(name, room)
		if err != nil {
			return nil, fmt.Errorf("--file %s: %w", flag, err)
		}
		room -= int64(len(data))
		f := client.RunFile{Path: path.Clean(guest), Mode: plainMode, Data: data}
		if info.Mode().Perm()&0o111 != 0 {
			f.Mode = executableMode
		}
		files = append(files, f)
	}
	return files, nil
}

// readRegular reads a file of at most limit bytes.
func readRegular(name string, limit int64) (_ []byte, info os.FileInfo, err error) {
	f, err := os.Open(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil, fmt.Errorf("%w: file %s", errdef.ErrNotFound, name)
	}
	if err != nil {
		return nil, nil, err
	}
	defer f.Close() //nolint:errcheck // it was only read
	if info, err = f.Stat(); err != nil {
		return nil, nil, err
	}
	if info.IsDir() {
		return nil, nil, fmt.Errorf("%w: %s is a directory", errdef.ErrInvalid, name)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%w: %s has more than the %d bytes that are left", errdef.ErrInvalid, name, limit)
	}
	return data, info, err
}

// targets are the files that a run is to write here, by what they are of.
type targets struct {
	bundle    *outFile
	collected map[string]*outFile // by the path in the guest
}

// prepare adds to req what is to be collected, and makes sure that what comes of
// the run can be written.
func (r *recordFlags) prepare(req *client.RunRequest) (_ *targets, err error) {
	t := &targets{collected: map[string]*outFile{}}
	defer func() {
		if err != nil {
			t.discard()
		}
	}()
	for _, flag := range r.collect {
		guest, name, _ := strings.Cut(flag, "=")
		if !path.IsAbs(guest) {
			return nil, fmt.Errorf("%w: --collect %q is not /GUESTPATH or /GUESTPATH=FILE", errdef.ErrInvalid, flag)
		}
		guest = path.Clean(guest)
		if slices.Contains(req.Collect, guest) {
			return nil, fmt.Errorf("%w: --collect %s is there twice", errdef.ErrInvalid, guest)
		}
		req.Collect = append(req.Collect, guest)
		if name == "" {
			continue
		}
		if t.collected[guest], err = createOut(name, 0o666); err != nil {
			delete(t.collected, guest)
			return nil, err
		}
	}
	if r.bundle != "" {
		t.bundle, err = createOut(r.bundle, 0o600) // it has everything, in the clear
	}
	return t, err
}

// discard removes what was not committed.
func (t *targets) discard() {
	for _, o := range t.collected {
		o.discard()
	}
	if t.bundle != nil {
		t.bundle.discard()
	}
}

// outFile is a file that appears when it is whole.
type outFile struct {
	*os.File
	path string
	done bool
}

// createOut begins a file that is to be at path.
func createOut(path string, mode os.FileMode) (*outFile, error) {
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is there, and no file", errdef.ErrInvalid, path)
	}
	for try := 0; ; try++ {
		f, err := os.OpenFile(fmt.Sprintf("%s.part%d-%d", path, os.Getpid(), try), os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
		if err == nil {
			return &outFile{File: f, path: path}, nil
		}
		const tries = 100
		if !errors.Is(err, os.ErrExist) || try == tries {
			return nil, fmt.Errorf("%w: write %s: %w", errdef.ErrInvalid, path, err)
		}
	}
}

// commit lets the file appear.
func (o *outFile) commit() error {
	err := o.Close()
	if err == nil {
		err = os.Rename(o.Name(), o.path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", o.path, err)
	}
	o.done = true
	return nil
}

func (o *outFile) discard() {
	if !o.done {
		_ = o.Close()           // it may be closed
		_ = os.Remove(o.Name()) // nobody is left to tell
	}
}

// runRecorded runs a command for the record, and ends as it did.
func (a *app) runRecorded(ctx context.Context, snapshot string, args []string, flags execFlags, rec recordFlags) error {
	if len(args) == 0 {
		return fmt.Errorf("%w: no command to run", errdef.ErrInvalid)
	}
	req, err := rec.request(a.Getenv, flags)
	if err != nil {
		return err
	}
	req.Snapshot, req.Args = snapshot, args
	out, err := rec.prepare(&req)
	if err != nil {
		return err
	}
	defer out.discard()
	if flags.interactive {
		if req.Stdin, err = io.ReadAll(io.LimitReader(a.Stdin, maxRunInput+1)); err != nil {
			return fmt.Errorf("read stdin: %w", err)
		}
		if len(req.Stdin) > maxRunInput {
			return fmt.Errorf("%w: more than %d bytes of stdin", errdef.ErrInvalid, maxRunInput)
		}
	}
	return a.withClient(ctx, func(c *client.Client) error {
		result, err := a.runAlong(ctx, c, req)
		if err != nil {
			return err
		}
		if err = keep(ctx, c, result, out); err != nil {
			return err
		}
		return a.recordedOutcome(result)
	})
}

// runAlong runs, and shows the output as it comes.
func (a *app) runAlong(ctx context.Context, c *client.Client, req client.RunRequest) (client.RunResult, error) {
	news := a.newNews()
	defer news.close()
	req.Report = news.report
	if !a.flags.json {
		req.Stdout, req.Stderr = after{news, a.Stdout}, after{news, a.Stderr}
		return c.Run(ctx, req)
	}
	var stdout, stderr bytes.Buffer // the daemon tells of progress only where it streams the output
	req.Stdout, req.Stderr = &stdout, &stderr
	result, err := c.Run(ctx, req)
	if err != nil {
		return result, err
	}
	result.Stdout, result.StdoutBase64 = textOf(stdout.Bytes())
	result.Stderr, result.StderrBase64 = textOf(stderr.Bytes())
	return result, a.printJSON(result)
}

// textOf is data as text, or as it is where it is none.
func textOf(data []byte) (text string, binary []byte) {
	if utf8.Valid(data) {
		return string(data), nil
	}
	return "", data
}

// after is a writer that takes news off the terminal first.
type after struct {
	*news
	w io.Writer
}

func (a after) Write(p []byte) (int, error) {
	a.close()
	return a.w.Write(p)
}

// keep writes what came of a run to where it was asked for.
func keep(ctx context.Context, c *client.Client, result client.RunResult, out *targets) error {
	for _, f := range result.Files {
		o := out.collected[f.Path]
		if o == nil {
			continue
		}
		if _, err := o.Write(f.Data); err != nil {
			return fmt.Errorf("write %s: %w", o.path, err)
		}
		if err := o.commit(); err != nil {
			return err
		}
	}
	if out.bundle == nil {
		return nil
	}
	return fetchBundle(ctx, c, result.ID, out.bundle)
}

func fetchBundle(ctx context.Context, c *client.Client, id string, o *outFile) error {
	r, err := c.RecordBundle(ctx, id)
	if err != nil {
		return err
	}
	_, err = io.Copy(o, r)
	if err = errors.Join(err, r.Close()); err != nil {
		return fmt.Errorf("write %s: %w", o.path, err)
	}
	return o.commit()
}

// recordedOutcome says which record there is, and what ended the command.
func (a *app) recordedOutcome(r client.RunResult) error {
	if !a.flags.json && !a.flags.quiet {
		a.notef("record: %s", r.ID)
	}
	switch r.Failure {
	case "":
	case record.TimedOut:
		a.notef("tine: the command ran out of time")
	case record.OutputLimit:
		a.notef("tine: the command wrote more than its limit, and was ended")
	default:
		a.notef("tine: the command: %s", r.Failure)
	}
	return guestOutcome(client.Exit{Code: int(r.ExitCode), Signal: r.Signal})
}
