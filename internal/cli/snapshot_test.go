package cli_test

import (
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/api/apitest"
	"github.com/tinevm/tine/internal/vmm"
)

// TestHostOfSnapshot: who looks at a snapshot sees which hosts it is for.
func TestHostOfSnapshot(t *testing.T) {
	t.Parallel()
	backend := apitest.New(t)
	s := shell{t, backend.Serve(spec).URL}
	host := vmm.Host{
		CPU:    vmm.CPU{Vendor: "AuthenticAMD", Family: 25, Model: 1, Stepping: 2, Name: "AMD EPYC", Flags: "sha256:" + strings.Repeat("a", 64)},
		Kernel: "6.1.112",
	}
	portable := host
	portable.Template = "T2A"
	for tag, tt := range map[string]struct {
		host *vmm.Host
		want string
	}{
		"soft":     {nil, ""},
		"hard":     {&host, "AMD EPYC (AuthenticAMD family 25 model 1 stepping 2), Linux 6.1.112"},
		"portable": {&portable, "CPU template T2A on AuthenticAMD, Linux 6.1.112"},
	} {
		backend.Host = tt.host
		if _, stderr, code := s.run("", "snapshot", "create", tag, "--image", "py"); code != 0 {
			t.Fatal(stderr)
		}
		shown := ""
		stdout, _, _ := s.run("", "snapshot", "info", tag)
		for line := range strings.Lines(stdout) {
			if rest, ok := strings.CutPrefix(line, "host "); ok {
				shown = strings.TrimSpace(rest)
			}
		}
		if shown != tt.want {
			t.Errorf("%s: host %q, want %q", tag, shown, tt.want)
		}
		stdout, _, _ = s.run("", "snapshot", "info", tag, "--json")
		if strings.Contains(stdout, `"kernel"`) != (tt.host != nil) {
			t.Errorf("%s: %s", tag, stdout)
		}
	}
}
