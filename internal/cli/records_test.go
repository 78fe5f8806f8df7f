package cli_test

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/api/apitest"
	"github.com/tinevm/tine/internal/cli"
)

// shell runs command lines against a backend.
type shell struct {
	t   *testing.T
	url string
}

func newShell(t *testing.T) shell {
	t.Helper()
	return shell{t, apitest.New(t).Serve(spec).URL}
}

func (s shell) run(stdin string, args ...string) (stdout, stderr string, code int) {
	s.t.Helper()
	var out, errOut bytes.Buffer
	code = cli.Run(s.t.Context(), cli.Environment{
		Args: args, Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &errOut,
		Getenv: func(name string) string { return map[string]string{"TINE_URL": s.url}[name] },
	})
	return out.String(), errOut.String(), code
}

// want runs a command that must succeed.
func (s shell) want(stdin string, args ...string) string {
	s.t.Helper()
	out, errOut, code := s.run(stdin, args...)
	if code != 0 {
		s.t.Fatalf("tine %q: exit code %d, %s", args, code, errOut)
	}
	return out
}

// TestRecordExport: what is exported can be verified, from a pipe or a file,
// whole or as an envelope alone.
func TestRecordExport(t *testing.T) {
	t.Parallel()
	s, dir := newShell(t), t.TempDir()
	var result client.RunResult
	args := []string{"run", "--json", "--deterministic", "--snapshot", "py", "--", "echo", "a\x1b[31mb"}
	if err := json.Unmarshal([]byte(s.want("", args...)), &result); err != nil {
		t.Fatal(err)
	}
	short := result.ID[:6]
	show := s.want("", "record", "show", short)
	if !strings.Contains(show, result.OutputHash) || strings.Contains(show, "\x1b") || !strings.Contains(show, `echo a\x1b[31mb`) {
		t.Errorf("show: %s", show)
	}
	if list := s.want("", "record", "ls"); strings.Contains(list, "\x1b") {
		t.Errorf("ls: %q", list)
	}
	bundle, envelope, file := s.want("", "record", "export", short), s.want("", "record", "export", "--envelope", short), filepath.Join(dir, "a.tar")
	s.want("", "record", "export", short, "-o", file)
	data, err := os.ReadFile(file)
	if err != nil || string(data) != bundle {
		t.Errorf("%d bytes in the file, %d on stdout, %v", len(data), len(bundle), err)
	}
	for _, text := range []string{bundle, envelope} {
		if out := s.want(text, "verify", "-q", "-"); out != "verified\n" {
			t.Errorf("verify: %q", out)
		}
	}
	if out := s.want("", "verify", "-q", strings.ToUpper(short)); out != "verified\n" {
		t.Errorf("verify: %q", out)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

// TestRunLeavesNothing: a run that comes to nothing, or is interrupted, leaves
// no files.
func TestRunLeavesNothing(t *testing.T) {
	t.Parallel()
	b, dir := apitest.New(t), t.TempDir()
	url := b.Serve(spec).URL
	ctx, interrupt := context.WithCancel(t.Context())
	b.Fail = func(op string) error {
		if op == "run" {
			interrupt()
		}
		return nil
	}
	var stderr bytes.Buffer
	code := cli.Run(ctx, cli.Environment{
		Args: []string{
			"run", "--deterministic", "-q", "--snapshot", "py", "--record", filepath.Join(dir, "r"), "--collect", "/x=" + filepath.Join(dir, "x"), "--", "sleep",
		},
		Stdin: strings.NewReader(""), Stdout: &bytes.Buffer{}, Stderr: &stderr,
		Getenv: func(name string) string { return map[string]string{"TINE_URL": url}[name] },
	})
	left, err := os.ReadDir(dir)
	if code != 130 || err != nil || len(left) != 0 {
		t.Errorf("exit code %d, left %v, %v, stderr %q", code, left, err, stderr.String())
	}
}
