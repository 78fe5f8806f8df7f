package image

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/progress"
)

func TestParseSource(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"debian:bookworm":                 "debian:bookworm",
		"debian:bookworm+python3+gcc-12":  "debian:bookworm,python3,gcc-12",
		"debian:bookworm,g++,libstdc++6":  "debian:bookworm,g++,libstdc++6",
		"debian:bookworm-backports+a1":    "debian:bookworm-backports,a1",
		"docker:python:3.12":              "docker:" + name.DefaultRegistry + "/library/python:3.12",
		"registry.example/foo:tag":        "docker:registry.example/foo:tag",
		"localhost/foo":                   "docker:localhost/foo:latest",
		"":                                "",
		"python":                          "",
		"user/python":                     "",
		"debian:":                         "",
		"debian:Bookworm":                 "",
		"debian:--help":                   "",
		"debian:bookworm+":                "",
		"debian:bookworm+g++":             "",
		"debian:bookworm+--setup-hook=id": "",
		"debian:bookworm+python3-":        "",
		"debian:bookworm+a b":             "",
		"debian:bookworm+a/../b":          "",
		"debian:bookworm+?essential":      "",
		"debian:book/worm":                "",
		"debian:bookworm" + strings.Repeat("+aa", 300): "",
		"docker:UPPER CASE":                            "",
		"dir:":                                         "",
		"ext4:":                                        "",
		"oci:":                                         "",
		"docker-archive:":                              "",
		"dir:/a\x00b":                                  "",
		"ftp:something":                                "",
	} {
		t.Run(strings.ReplaceAll(text, " ", "_"), func(t *testing.T) {
			t.Parallel()
			src, err := parseSource(text, Limits{})
			if want == "" {
				if !errors.Is(err, errdef.ErrInvalid) {
					t.Errorf("got %v, %v, want %v", src, err, errdef.ErrInvalid)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got, err := src.identity(t.Context()); err != nil || got != want {
				t.Errorf("got %q, %v, want %q", got, err, want)
			}
		})
	}
}

func TestParseKernelSource(t *testing.T) {
	t.Parallel()
	for text, ok := range map[string]bool{
		"": true, "debian:trixie": true, "dir:/k": true, "debian:": false, "debian:-x": false, "/k": false, "oci:/x": false,
	} {
		if _, err := parseKernelSource(text); (err == nil) != ok || err != nil && !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func FuzzParseSource(f *testing.F) {
	f.Add("debian:bookworm+python3")
	f.Add("debian:bookworm,g++")
	f.Fuzz(func(t *testing.T, text string) {
		src, err := parseSource(text, Limits{})
		d, ok := src.(debianSource)
		if err != nil || !ok {
			return
		}
		for _, arg := range append([]string{d.suite}, d.packages...) {
			if strings.HasPrefix(arg, "-") || strings.HasSuffix(arg, "-") || strings.ContainsAny(arg, " ,/=?~!*\n'\"") {
				t.Errorf("%q lets %q through to the tool", text, arg)
			}
		}
	})
}

func TestDropDebian(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]bool{
		"usr/share/doc": false, "usr/share/doc/bash/README": true, "usr/share/docs": false, "etc/hostname": true,
		"etc/resolv.conf": true, "var/cache/apt/pkgcache.bin": true, "usr/lib/python3.11/__pycache__/ast.cpython-311.pyc": false,
	} {
		if dropDebian(name, false) != want {
			t.Errorf("%s: dropped is not %v", name, want)
		}
	}
	if dropDebian("var/cache/apt/archives", true) {
		t.Error("programs expect the directories of /var/cache")
	}
}

// sh is a tool that tests can make do anything.
var sh = tool{"sh", "dash", "runs tests"}

func TestRunTool(t *testing.T) {
	t.Parallel()
	var news []string
	ctx := progress.With(t.Context(), func(e progress.Event) { news = append(news, e.Message) })
	cmd, err := sh.command(ctx, t.TempDir(), "-c", `echo "I: doing..." >&2; echo "I: at /tmp..." >&2; echo why >&2; printf last >&2; exit 3`)
	if err != nil {
		t.Fatal(err)
	}
	err = runTool(ctx, cmd, "root", nil)
	if err == nil || !strings.HasSuffix(err.Error(), "exit status 3:\nwhy\nlast") {
		t.Errorf("got %v", err)
	}
	if diff := cmp.Diff([]string{"root: doing"}, news); diff != "" {
		t.Error(diff)
	}
}

func TestRunToolOutput(t *testing.T) {
	t.Parallel()
	refuse := errors.New("refuse")
	for name, tc := range map[string]struct {
		script  string
		consume func(io.Reader) error
		want    string
	}{
		"all":     {"echo hello", func(r io.Reader) error { _, err := io.ReadAll(r); return err }, ""},
		"part":    {"head -c 200000 /dev/zero", func(r io.Reader) error { _, err := r.Read(make([]byte, 10)); return err }, ""},
		"refused": {"cat /dev/zero", func(io.Reader) error { return refuse }, "refuse"},
		"failed":  {"echo why >&2; exit 1", func(io.Reader) error { return io.ErrUnexpectedEOF }, "run sh: exit status 1:\nwhy"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd, err := sh.command(t.Context(), t.TempDir(), "-c", tc.script)
			if err != nil {
				t.Fatal(err)
			}
			got := ""
			if err = runTool(t.Context(), cmd, "root", tc.consume); err != nil {
				got = err.Error()
			}
			if got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func TestRunToolStops(t *testing.T) {
	t.Parallel()
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cmd, err := sh.command(ctx, t.TempDir(), "-c", "echo started; cat /dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	err = runTool(ctx, cmd, "root", func(r io.Reader) error {
		_, readErr := r.Read(make([]byte, 1))
		cancel(cause)
		return readErr
	})
	if !errors.Is(err, cause) {
		t.Errorf("got %v, want %v", err, cause)
	}
}

func TestDebianError(t *testing.T) {
	t.Parallel()
	plain := errors.New("plain")
	for output, want := range map[string]error{
		"E: Unable to locate package foo": errdef.ErrNotFound, "E: no route to host": errdef.ErrUnavailable,
	} {
		if err := debianError(&outputError{err: plain, output: output}); !errors.Is(err, want) || errdef.Hint(err) == "" {
			t.Errorf("got %v, want %v", err, want)
		}
	}
	if err := debianError(plain); !errors.Is(err, plain) || errdef.Code(err) != "internal" {
		t.Errorf("got %v", err)
	}
	if err := debianError(nil); err != nil {
		t.Errorf("got %v", err)
	}
}

func TestHostTools(t *testing.T) {
	t.Parallel()
	for _, tool := range HostTools() {
		if tool.Name == "" || tool.Package == "" || tool.Why == "" || (tool.Err == nil) != (tool.Path != "") {
			t.Errorf("%+v", tool)
		}
	}
	_, err := tool{"tine-no-such-tool", "nothing", "tests"}.find()
	if !errors.Is(err, errdef.ErrUnavailable) || errdef.Hint(err) != "install the package nothing" {
		t.Errorf("got %v, hint %q", err, errdef.Hint(err))
	}
}
