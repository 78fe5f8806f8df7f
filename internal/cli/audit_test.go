package cli_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/audit"
	"github.com/tinevm/tine/internal/cli"
)

// tineOn runs a command line on a state directory.
func tineOn(t *testing.T, stateDir string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = cli.Run(t.Context(), cli.Environment{
		Args: append([]string{"audit"}, args...), Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs,
		Getenv: func(name string) string { return map[string]string{"TINE_STATE_DIR": stateDir}[name] },
	})
	return code, out.String(), errs.String()
}

func TestAudit(t *testing.T) {
	t.Parallel()
	stateDir := t.TempDir()
	dir := filepath.Join(stateDir, "audit")
	if code, stdout, stderr := tineOn(t, stateDir, "verify"); code != 3 || stdout != "" || !strings.Contains(stderr, "not found") {
		t.Errorf("no log: %d %q %q", code, stdout, stderr)
	}
	log, err := audit.Open(audit.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		if err = log.Event(t.Context(), "sandbox.expired", fmt.Sprintf("sb-%d", i), ""); err != nil {
			t.Fatal(err)
		}
	}
	if err = log.Close(); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr := tineOn(t, stateDir, "verify")
	if code != 0 || !strings.HasPrefix(stdout, "ok: 20 lines in 1 files, 1 to 20, last hash ") || stderr != "" {
		t.Errorf("verify: %d %q %q", code, stdout, stderr)
	}
	_, stdout, _ = tineOn(t, stateDir, "verify", "--json")
	var report audit.Report
	if err = json.Unmarshal([]byte(stdout), &report); err != nil || !report.OK || report.Last != 20 {
		t.Errorf("verify --json: %v %s", err, stdout)
	}
	if code, stdout, stderr = tineOn(t, stateDir, "verify", "--anchor", "20:"+report.Hash); code != 0 {
		t.Errorf("the right anchor: %d %q %q", code, stdout, stderr)
	}
	if code, _, _ = tineOn(t, stateDir, "verify", "--anchor", "19:"+report.Hash); code != 1 {
		t.Errorf("a wrong anchor: %d", code)
	}
	for _, bad := range [][]string{{"verify", "--anchor", "x:y"}, {"tail", "-n", "-1"}, {"export", "--since", "yesterday"}} {
		if code, _, _ = tineOn(t, stateDir, bad...); code != 2 {
			t.Errorf("%q: %d", bad, code)
		}
	}
	if _, stdout, _ = tineOn(t, stateDir, "tail", "-n", "2"); strings.Count(stdout, "\n") != 2 || !strings.Contains(stdout, " event sandbox.expired sb-19 daemon\n") {
		t.Errorf("tail: %q", stdout)
	}
	data, err := os.ReadFile(filepath.Join(dir, "audit.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	for _, all := range [][]string{{"export"}, {"export", "--since", "1h"}, {"tail", "--json", "-n", "99", dir}} {
		if _, stdout, stderr = tineOn(t, stateDir, all...); stdout != string(data) {
			t.Errorf("%q: %q %q", all, stdout, stderr)
		}
	}
	for _, none := range [][]string{{"export", "--until", "1h"}, {"export", "--since", "2999-01-01T00:00:00Z"}, {"tail", "-n", "0"}} {
		if code, stdout, stderr = tineOn(t, stateDir, none...); code != 0 || stdout != "" {
			t.Errorf("%q: %d %q %q", none, code, stdout, stderr)
		}
	}
	damaged := strings.Replace(string(data), "sb-7", "sb-6", 1)
	if err = os.WriteFile(filepath.Join(dir, "audit.jsonl"), []byte(damaged), 0o600); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr = tineOn(t, stateDir, "verify")
	if code != 1 || !strings.HasPrefix(stdout, "audit.jsonl:8  seq 8  changed") || !strings.Contains(stderr, "not what was written") {
		t.Errorf("a changed line: %d %q %q", code, stdout, stderr)
	}
}
