package record

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/tinevm/tine/internal/errdef"
)

// Bounds of what a record may hold.
const (
	// MaxBlob bounds one content: stdin, a stream, a file.
	MaxBlob = 128 << 20
	// MaxContent bounds the contents of one record together.
	MaxContent = 512 << 20
	// MaxText bounds argv, env and paths together.
	MaxText = 512 << 10
	// MaxFiles bounds each list of files.
	MaxFiles = 1024

	maxArgs = 16 << 10
	maxName = 256
	maxPath = 4096
)

// idForm is that of a UUID.
var idForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// firstDigest is the previous of a first record.
var firstDigest = digestPrefix + strings.Repeat("0", 64)

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: record: "+format, append([]any{errdef.ErrInvalid}, args...)...)
}

// firstOf returns the first error that there is.
func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// check sees that all of r is what a store would have signed.
func (r Record) check() error {
	hashes := []string{
		r.Chain.Previous, r.KeyID,
		r.Hashes.Tine.Input, r.Hashes.Tine.Output, r.Hashes.Tine.Canonical,
		r.Hashes.Forge.Input, r.Hashes.Forge.Output, r.Hashes.Forge.Canonical,
	}
	for _, h := range hashes {
		if err := checkDigest(h); err != nil {
			return err
		}
	}
	switch {
	case !idForm.MatchString(r.ID):
		return invalid("id %.80q is no UUID", r.ID)
	case r.Chain.Seq == 0 || (r.Chain.Seq == 1 && r.Chain.Previous != firstDigest):
		return invalid("number %d after %s", r.Chain.Seq, r.Chain.Previous)
	case r.Hashes.Forge.Input != r.Input.Stdin.Digest:
		return invalid("the forge-v1 hash of the input is not that of stdin")
	}
	return firstOf(checkTime("created", r.Created), r.checkRun())
}

// checkRun checks what is known before the record is signed.
func (r Record) checkRun() error {
	if r.Mode != Deterministic && r.Mode != Normal {
		return invalid("mode %.40q", r.Mode)
	}
	if r.Parent != "" && !idForm.MatchString(r.Parent) {
		return invalid("parent %.80q is no UUID", r.Parent)
	}
	return firstOf(
		checkName("block", r.Block), checkName("user", r.User), checkTime("started", r.Started),
		r.Environment.check(r.Mode), r.Input.check(), r.checkClock(), r.Output.check(r.Input.Collect),
		r.Rules.Validate(), r.checkSize(),
	)
}

// checkClock: a normal run was given no seed and no clock, and measures no time
// but the host's.
func (r Record) checkClock() error {
	if r.Mode == Deterministic {
		return checkTime("start", r.Input.Start)
	}
	if r.Input.Seed != 0 || !r.Input.Start.IsZero() || r.Output.Virtual != 0 {
		return invalid("a normal run has no seed, no start and no virtual time")
	}
	return nil
}

func (r Record) checkSize() error {
	var total int64
	for _, b := range r.Blobs() {
		if err := checkDigest(b.Digest); err != nil {
			return err
		}
		if b.Size < 0 || b.Size > MaxBlob {
			return invalid("content of %d bytes, at most %d", b.Size, MaxBlob)
		}
		if total += b.Size; total > MaxContent {
			return invalid("contents of more than %d bytes together", MaxContent)
		}
	}
	return nil
}

func (e Environment) check(mode Mode) error {
	for _, digest := range []string{e.Image, e.Kernel, e.Agent} {
		if digest == "" {
			continue
		}
		if err := checkDigest(digest); err != nil {
			return err
		}
	}
	if e.VCPUs < 0 || e.MemoryMiB < 0 || e.Engine == "" || (e.Icount != nil && (*e.Icount < 0 || *e.Icount > 10)) {
		return invalid("machine of %d processors and %d MiB, engine %.40q", e.VCPUs, e.MemoryMiB, e.Engine)
	}
	if mode == Deterministic && e.Icount == nil {
		return invalid("a deterministic run has an icount shift")
	}
	return firstOf(
		checkDigest(e.Snapshot), checkName("snapshot tag", e.SnapshotTag), checkName("engine", e.Engine),
		checkName("engine version", e.EngineVersion), checkName("machine", e.Machine), checkName("cpu", e.CPU),
	)
}

func (in RecordedInput) check() error {
	if len(in.Argv) == 0 || in.Argv[0] == "" {
		return invalid("no command")
	}
	if in.Cwd != "" && !isClean(in.Cwd) {
		return invalid("working directory %.200q is not absolute and clean", in.Cwd)
	}
	for _, e := range in.Env {
		if name, _, ok := strings.Cut(e, "="); !ok || name == "" {
			return invalid("variable %.40q is not NAME=VALUE", name)
		}
	}
	if len(in.Collect) > MaxFiles {
		return invalid("%d files to collect, at most %d", len(in.Collect), MaxFiles)
	}
	for i, p := range in.Collect {
		if !isClean(p) || slices.Contains(in.Collect[:i], p) {
			return invalid("file to collect %.200q is not absolute and clean, or there twice", p)
		}
	}
	if in.Limits.Virtual < 0 || in.Limits.Wall < 0 || in.Limits.Output < 0 {
		return invalid("negative limits")
	}
	texts := slices.Concat(in.Argv, in.Env, in.Collect)
	for _, f := range in.Files {
		texts = append(texts, f.Path)
	}
	return firstOf(checkTexts(texts), checkFiles(in.Files))
}

// Validate finds what of an input could not be recorded, so that it is refused
// before it is run: errdef.ErrInvalid.
func (in Input) Validate() error {
	r := RecordedInput{Argv: in.Argv, Env: in.Env, Cwd: in.Cwd, Collect: in.Collect, Limits: in.Limits}
	total, largest := len(in.Stdin), len(in.Stdin)
	for _, f := range in.Files {
		r.Files = append(r.Files, RecordedFile{Path: f.Path, Mode: f.Mode})
		total, largest = total+len(f.Data), max(largest, len(f.Data))
	}
	if largest > MaxBlob || total > MaxContent {
		return invalid("input of %d bytes, at most %d, and %d for stdin or one file", total, MaxContent, MaxBlob)
	}
	return r.check()
}

func (out RecordedOutput) check(collect []string) error {
	if err := firstOf(checkName("signal", out.Signal), checkName("failure", out.Failure), checkFiles(out.Files)); err != nil {
		return err
	}
	if out.Memory != "" {
		if err := checkDigest(out.Memory); err != nil {
			return err
		}
	}
	if out.Virtual < 0 || out.Wall < 0 || int(int32(out.Exit)) != out.Exit {
		return invalid("exit code %d after %s, %s of the host", out.Exit, out.Virtual, out.Wall)
	}
	rest := collect
	for _, f := range out.Files {
		at := slices.Index(rest, f.Path)
		if at < 0 {
			return invalid("file %.200q was not to be collected, or comes before another that was", f.Path)
		}
		rest = rest[at+1:]
	}
	return nil
}

// checkTexts sees that JSON can hold what a command is given: text without NUL.
func checkTexts(texts []string) error {
	total := 0
	for _, s := range texts {
		if !utf8.ValidString(s) || strings.ContainsRune(s, 0) {
			return invalid("argument, variable or path is not UTF-8 without NUL")
		}
		total += len(s)
	}
	if total > MaxText || len(texts) > maxArgs {
		return invalid("%d arguments, variables and paths of %d bytes, at most %d of %d", len(texts), total, maxArgs, MaxText)
	}
	return nil
}

func checkFiles(files []RecordedFile) error {
	if len(files) > MaxFiles {
		return invalid("%d files, at most %d", len(files), MaxFiles)
	}
	for _, f := range files {
		if !isClean(f.Path) || f.Mode > 0o7777 {
			return invalid("file %.200q of mode %o", f.Path, f.Mode)
		}
	}
	return nil
}

func isClean(p string) bool {
	return path.IsAbs(p) && path.Clean(p) == p && len(p) <= maxPath && utf8.ValidString(p) && !strings.ContainsRune(p, 0)
}

// checkName bounds what is shown to people: one short line of text.
func checkName(what, s string) error {
	control := func(r rune) bool { return r < ' ' || r == 0x7f || r == utf8.RuneError }
	if len(s) > maxName || strings.ContainsFunc(s, control) {
		return invalid("%s %.40q is no line of at most %d bytes", what, s, maxName)
	}
	return nil
}

// checkTime: what int64 can count in nanoseconds, in UTC.
func checkTime(what string, t time.Time) error {
	if t.Location() != time.UTC || t.Year() < 1970 || t.Year() > 2261 {
		return invalid("%s %s is not a time of 1970 to 2261 in UTC", what, t.Format(time.RFC3339))
	}
	return nil
}
