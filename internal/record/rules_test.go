package record

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/errdef"
)

func TestRules(t *testing.T) {
	t.Parallel()
	tests := []struct{ rule, in, want string }{
		{"ansi", "\x1b[1;31mred\x1b[0m \x1b]0;title\x07x \x1b(B\x1b\x1b[0m[0m\x1b", "red x [0m"},
		{"timestamps", "at 2026-11-21T23:50:00Z, 2026-11-21 23:50:00.123+01:00, 2026-11-21 23:50!", "at <time>, <time>, <time>!"},
		{"timestamps", "Nov 21 23:50:00 host; Nov  1 00:00:00; Sat Nov 21 23:55:03 UTC 2026; Sat, 21 Nov 2026 23:55:03 GMT", "<time> host; <time>; <time>; <time>"},
		{"timestamps", "2026-11-21 and 23:50:00, 12026-11-21T23:50:00Z", "2026-11-21 and 23:50:00, 12026-11-21T23:50:00Z"},
		{"epoch", "1795262400 1795262400.25 1795262400123 1795262400123456 1795262400123456789", "<epoch> <epoch>.25 <epoch> <epoch> <epoch>"},
		{"epoch", "1695262400 11795262400 x1795262400 9999999999999999999", "1695262400 11795262400 x1795262400 9999999999999999999"},
		{"durations", "3 passed in 0.12s, 5 ms, 7µs, 1 second, 5 parsecs, 10 bytes", "3 passed in <duration>, <duration>, <duration>, <duration>, 5 parsecs, 10 bytes"},
		{"tmp", "/tmp/tmp.Xa8/x /var/tmp/b '/tmp/c' /tmp /tmp//d", "/tmp/<tmp>/x /var/tmp/<tmp> '/tmp/<tmp>' /tmp /tmp//d"},
		{"pids", "pid 12 pid=3 PID: 4 sshd[5]: x[6] /proc/7/fd stupid 8", "pid <pid> pid=<pid> PID: <pid> sshd[<pid>]: x[6] /proc/<pid>/fd stupid 8"},
		{"addresses", "at 0x7ffd1234abcd, 0xff, 0x12345678901234567", "at <address>, 0xff, 0x12345678901234567"},
		{"uuids", "f81d4fae-7dec-11d0-a765-00a0c91e6bf6 f81d4fae-7dec", "<uuid> f81d4fae-7dec"},
		{"trailing-space", "a \t\r\n b\n\n c  ", "a\n b\n\n c"},
		{"sort-lines", "b\na\n\nc\n", "\na\nb\nc\n"},
		{"sort-lines", "b\na", "a\nb"},
		{"sort-lines", "", ""},
	}
	tested := map[string]bool{}
	for _, tt := range tests {
		tested[tt.rule] = true
		out, err := Rules{Streams: []string{tt.rule}}.Apply(Output{Stdout: []byte(tt.in), Stderr: []byte(tt.in)}, testStart())
		if err != nil {
			t.Fatal(err)
		}
		if got := string(out.Stdout); got != tt.want || string(out.Stderr) != tt.want {
			t.Errorf("%s of %q:\n%q, want\n%q", tt.rule, tt.in, got, tt.want)
		}
	}
	for _, r := range AllRules() {
		if !tested[r.Name] {
			t.Errorf("rule %s has no test", r.Name)
		}
	}
}

func TestRulesOnFilesAndInOrder(t *testing.T) {
	t.Parallel()
	out := Output{Stdout: []byte("b 2\na 1 \n"), Files: []File{{"/f", 0o644, []byte("x \n")}}}
	got, err := Rules{Streams: []string{"sort-lines", "trailing-space"}, Files: []string{"trailing-space"}}.Apply(out, testStart())
	if err != nil || string(got.Stdout) != "a 1\nb 2\n" || string(got.Files[0].Data) != "x\n" {
		t.Errorf("%q, %v", got.Stdout, err)
	}
	if string(out.Files[0].Data) != "x \n" || string(out.Stdout) != "b 2\na 1 \n" {
		t.Error("the output was changed")
	}
	for _, r := range []Rules{{Streams: []string{"no-such"}}, {Files: []string{""}}, {Streams: strings.Split(strings.Repeat("ansi ", 17), " ")}} {
		if _, err = r.Apply(out, testStart()); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%v: %v", r, err)
		}
	}
}

// A rule finds nothing in what it has made.
func TestRulesAreIdempotent(t *testing.T) {
	t.Parallel()
	parts := []string{
		"2026-11-21", "T", " ", "23:50:00", ".5", "Z", "+01:00", "Nov", "Sat", ",", "21", "1", "UTC", "GMT", "2026", "1795262400", "000", "123456",
		"s", "ms", "µs", "5", ".", "/tmp/", "/proc/", "var", "pid", ":", "=", "[", "]:", "x", "0x", "deadbeef", "-", "f81d4fae-7dec-11d0-a765-00a0c91e6bf6",
		"\x1b", "[0m", "]0;", "\x07", "\\", "\t", "\r", "\n", "\xff", "<", ">", "<time>", "<pid>", "é", "",
	}
	for _, r := range rules {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			rapid.Check(t, func(t *rapid.T) {
				in := strings.Join(rapid.SliceOfN(rapid.SampledFrom(parts), 0, 24).Draw(t, "parts"), "")
				once := r.apply([]byte(in), testStart())
				again := r.apply(bytes.Clone(once), testStart())
				if !bytes.Equal(once, again) {
					t.Fatalf("%q became %q and then %q", in, once, again)
				}
			})
		})
	}
}

// A long row of what a rule almost matches must not take long.
func TestRulesAreLinear(t *testing.T) {
	t.Parallel()
	for _, r := range rules {
		for _, part := range []string{"2026-11-21T23:50:0", "\x1b]", "pid ", " ", "/tmp/", "0x0", "1"} {
			r.apply([]byte(strings.Repeat(part, 20_000/len(part))), testStart())
		}
	}
}
