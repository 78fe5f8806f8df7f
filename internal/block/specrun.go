package block

import (
	"encoding/base64"
	"fmt"
	"path"
	"regexp"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/record"
)

const (
	// maxOutput bounds what a block may allow itself to print: as much as a run
	// takes.
	maxOutput = 256 << 20
	// minYear and maxYear bound a guest's clock.
	minYear, maxYear = 1971, 2168
	// maxWords bounds arguments, variables, warm-up commands and the like.
	maxWords = 1024
	// maxRules is as many as a record takes.
	maxRules = 16
	// maxTarget bounds the name of what a block runs on.
	maxTarget = 4096
	fileMode  = 0o644
)

var (
	ruleRE     = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,63}$`)
	variableRE = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*=`)
	keyRE      = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:+/=-]{0,127}$`)
	digestRE   = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
)

// Validate finds what is wrong with s; rule is as for Decode.
func (s Spec) Validate(rule func(name string) error) error {
	if s.Format != format {
		return manifestError("format", "%d: want %d", s.Format, format)
	}
	if err := s.Manifest().Validate(); err != nil {
		return err
	}
	if (s.Version == SemVer{}) {
		return manifestError("version", "it is missing, or 0.0.0")
	}
	for _, c := range s.Provides {
		if (c.Version == SemVer{}) {
			return manifestError("provides", "%s has no version, or 0.0.0", c.Name)
		}
	}
	if s.Author == "" {
		return manifestError("author", "it is missing")
	}
	if err := checkText("author", s.Author, maxAuthor); err != nil {
		return err
	}
	if err := checkDerivation(s.NixDerivation); err != nil {
		return err
	}
	if s.AuthorKey != "" && !keyRE.MatchString(s.AuthorKey) {
		return manifestError("author_key", "%.80q is not the id of a key", s.AuthorKey)
	}
	if s.ID != "" {
		if _, err := ParseUUID(s.ID); err != nil {
			return idError("block", err.Error())
		}
	}
	if err := checkRefs(s.ComposedOf); err != nil {
		return err
	}
	return s.Run.validate(rule)
}

func checkRefs(refs []Ref) error {
	if len(refs) > maxListed {
		return manifestError("composed_of", "%d of them: at most %d", len(refs), maxListed)
	}
	seen := map[string]bool{}
	for _, r := range refs {
		if r.Digest == "" {
			return manifestError("composed_of", "%s has no digest", r)
		}
		if seen[r.Name] {
			return manifestError("composed_of", "%s is there twice", r.Name)
		}
		seen[r.Name] = true
	}
	return nil
}

func (r Run) validate(rule func(name string) error) error {
	if err := r.validateTarget(); err != nil {
		return err
	}
	if len(r.Command) == 0 || r.Command[0] == "" {
		return manifestError("run.command", "it is missing")
	}
	if err := checkWords("run.command", r.Command); err != nil {
		return err
	}
	if err := checkWords("run.env", r.Env); err != nil {
		return err
	}
	for _, e := range r.Env {
		if !variableRE.MatchString(e) {
			name, _, _ := strings.Cut(e, "=") // the value may be a secret
			return manifestError("run.env", "%.80q: want NAME=VALUE", name)
		}
	}
	if r.Cwd != "" {
		if err := checkPath("run.cwd", r.Cwd); err != nil {
			return err
		}
	}
	if r.Limits.Output < 0 || r.Limits.Output > maxOutput {
		return manifestError("run.limits.output", "%d bytes: want up to %d", r.Limits.Output, maxOutput)
	}
	for _, span := range []Span{r.Limits.Virtual, r.Limits.Wall} {
		if span < 0 {
			return manifestError("run.limits", "%s is less than nothing", time.Duration(span))
		}
	}
	if r.Start != nil {
		if year := time.Time(*r.Start).UTC().Year(); year < minYear || year > maxYear {
			return manifestError("run.start", "want a time from %d to %d", minYear, maxYear)
		}
	}
	if err := checkPaths("run.collect", r.Collect); err != nil {
		return err
	}
	if err := r.validateFiles(); err != nil {
		return err
	}
	if err := checkRules("run.canonical", r.Canonical, rule); err != nil {
		return err
	}
	return checkRules("run.canonical_files", r.CanonicalFiles, rule)
}

func (r Run) validateTarget() error {
	var named []string
	for _, t := range []struct{ field, value string }{{"source", r.Source}, {"image", r.Image}, {"snapshot", r.Snapshot}} {
		if t.value == "" {
			continue
		}
		named = append(named, t.field)
		if err := checkText("run."+t.field, t.value, maxTarget); err != nil {
			return err
		}
		// Where these become paths they are checked again.
		if t.field != "source" && !nameRE.MatchString(t.value) && !digestRE.MatchString(t.value) {
			return manifestError("run."+t.field, "%.80q is not a name or a digest", t.value)
		}
	}
	switch {
	case len(named) == 0:
		return manifestError("run", "it says not what it runs on: want source, image or snapshot")
	case len(named) > 1:
		return manifestError("run", "it has %s: want one of them", strings.Join(named, " and "))
	case r.Snapshot != "" && len(r.Warmup) > 0:
		return manifestError("run.warmup", "a snapshot has had its own")
	}
	return checkWords("run.warmup", r.Warmup)
}

func (r Run) validateFiles() error {
	if len(r.Files) > maxWords {
		return manifestError("run.files", "%d of them: at most %d", len(r.Files), maxWords)
	}
	var paths []string
	for _, f := range r.Files {
		paths = append(paths, f.Path)
		if f.Mode > 0o777 {
			return manifestError("run.files", "%s: mode %#o has more than permissions", f.Path, f.Mode)
		}
		if f.Path == "/" {
			return manifestError("run.files", "/ is no file")
		}
		if f.Text != "" && f.Base64 != "" {
			return manifestError("run.files", "%s has both text and base64", f.Path)
		}
		if _, err := f.data(); err != nil {
			return manifestError("run.files", "%s: it is not base64", f.Path)
		}
	}
	return checkPaths("run.files", paths)
}

// checkRules accepts the names of rules that rule knows, if it is not nil.
func checkRules(field string, names []string, rule func(name string) error) error {
	if len(names) > maxRules {
		return manifestError(field, "%d of them: at most %d", len(names), maxRules)
	}
	seen := map[string]bool{}
	for _, name := range names {
		switch {
		case !ruleRE.MatchString(name):
			return manifestError(field, "%.80q is not the name of a rule", name)
		case seen[name]:
			return manifestError(field, "%s is there twice", name)
		}
		seen[name] = true
		if rule == nil {
			continue
		}
		if err := rule(name); err != nil {
			return manifestError(field, "%s: %v", name, err)
		}
	}
	return nil
}

// checkWords accepts what can be handed to a program.
func checkWords(field string, words []string) error {
	if len(words) > maxWords {
		return manifestError(field, "%d of them: at most %d", len(words), maxWords)
	}
	for i, w := range words {
		if strings.ContainsRune(w, 0) || !utf8.ValidString(w) {
			return manifestError(field, "number %d holds a zero byte or is not UTF-8", i+1)
		}
	}
	return nil
}

func checkPaths(field string, paths []string) error {
	if len(paths) > maxWords {
		return manifestError(field, "%d of them: at most %d", len(paths), maxWords)
	}
	seen := map[string]bool{}
	for _, p := range paths {
		if err := checkPath(field, p); err != nil {
			return err
		}
		if seen[p] {
			return manifestError(field, "%s is there twice", p)
		}
		seen[p] = true
	}
	return nil
}

func checkPath(field, p string) error {
	if !path.IsAbs(p) || path.Clean(p) != p || len(p) > maxTarget {
		return manifestError(field, "%.80q: want an absolute path without . and ..", p)
	}
	return checkText(field, p, maxTarget)
}

func (f RunFile) data() ([]byte, error) {
	if f.Base64 == "" {
		return []byte(f.Text), nil
	}
	return base64.StdEncoding.DecodeString(f.Base64)
}

// Input is what s hands to its command, with stdin in place of its own when it
// is not nil.
func (r Run) Input(stdin []byte) (record.Input, error) {
	in := record.Input{
		Argv: r.Command, Env: r.Env, Cwd: r.Cwd, Stdin: stdin, Collect: r.Collect, Seed: r.Seed, Start: DefaultStart(),
		Limits: record.Limits{Virtual: time.Duration(r.Limits.Virtual), Wall: time.Duration(r.Limits.Wall), Output: r.Limits.Output},
	}
	if stdin == nil {
		in.Stdin = []byte(r.Stdin)
	}
	if r.Start != nil {
		in.Start = time.Time(*r.Start).UTC()
	}
	for _, f := range r.Files {
		data, err := f.data()
		if err != nil {
			return record.Input{}, fmt.Errorf("%w: file %s: %w", errdef.ErrInvalid, f.Path, err)
		}
		mode := f.Mode
		if mode == 0 {
			mode = fileMode
		}
		in.Files = append(in.Files, record.File{Path: f.Path, Mode: mode, Data: data})
	}
	return in, nil
}
