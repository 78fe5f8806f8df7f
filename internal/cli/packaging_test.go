package cli_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/cli"
)

const packaging = "../../packaging"

func readPackaged(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(packaging, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// served runs tine serve with flags, and returns how it was asked to serve.
func served(t *testing.T, flags ...string) cli.ServeOptions {
	t.Helper()
	var got cli.ServeOptions
	var stderr bytes.Buffer
	code := cli.Run(t.Context(), cli.Environment{
		Args: append([]string{"serve"}, flags...), Stdin: strings.NewReader(""), Stdout: &stderr, Stderr: &stderr,
		Getenv: func(string) string { return "" },
		Deps:   cli.Deps{Serve: func(_ context.Context, o cli.ServeOptions) error { got = o; return nil }},
	})
	if code != 0 {
		t.Fatalf("tine serve %q: exit code %d: %s", flags, code, &stderr)
	}
	return got
}

// TestManifest: the daemon understands what the Kubernetes manifest asks of it,
// suspends what would end with the pod, and cannot start with the token that is
// in there.
func TestManifest(t *testing.T) {
	t.Parallel()
	text := readPackaged(t, "kubernetes/tine.yaml")
	var flags []string
	for _, m := range regexp.MustCompile(`(?m)^ +- (--\S+)$`).FindAllStringSubmatch(text, -1) {
		flags = append(flags, m[1])
	}
	if o := served(t, flags...); o.OnStop != "suspend" || o.Listen != "0.0.0.0:8889" {
		t.Errorf("%q: %+v", flags, o)
	}
	if !regexp.MustCompile(`(?m)^ +token: REPLACE_ME`).MatchString(text) {
		t.Error("its token is no placeholder")
	}
}

// TestUnit: systemd understands the unit, where there is one to ask, and the
// daemon its command line.
func TestUnit(t *testing.T) {
	t.Parallel()
	text := readPackaged(t, "systemd/tine.service")
	start := regexp.MustCompile(`(?m)^ExecStart=/usr/local/lib/tine/tine serve \$TINE_OPTS$`)
	if !start.MatchString(text) {
		t.Fatal("it starts something else")
	}
	if o := served(t); o.OnStop != "leave" {
		t.Errorf("a restart would %s sandboxes", o.OnStop)
	}
	for _, line := range []string{"KillMode=process", "OOMPolicy=continue", "User=tine", "StateDirectory=tine", "CapabilityBoundingSet=", "DeviceAllow=/dev/net/tun rw"} {
		if !strings.Contains(text, "\n"+line+"\n") {
			t.Errorf("it does not say %s", line)
		}
	}
	for _, line := range []string{"RestrictNamespaces", "ProtectControlGroups"} {
		if strings.Contains(text, "\n"+line+"=") {
			t.Errorf("with %s there is no jail", line)
		}
	}
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("no systemd-analyze")
	}
	unit := filepath.Join(t.TempDir(), "tine.service")
	text = start.ReplaceAllString(text, "ExecStart=/bin/true")
	if err = os.WriteFile(unit, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, verifyErr := exec.CommandContext(t.Context(), analyze, "verify", unit).CombinedOutput(); verifyErr != nil || strings.Contains(string(out), "tine.service") {
		t.Errorf("systemd-analyze verify: %v: %s", verifyErr, out)
	}
}
