package agent_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
)

const secretsDir = "run/tine/secrets"

// secrets reads all secrets of the machine.
func (m *machine) secrets() map[string]string {
	m.t.Helper()
	entries, err := os.ReadDir(m.path(secretsDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.t.Fatal(err)
	}
	all := map[string]string{}
	for _, e := range entries {
		all[e.Name()] = m.read(filepath.Join(secretsDir, e.Name()))
	}
	return all
}

func secret(name, value string) guest.Secret { return guest.Secret{Name: name, Value: []byte(value)} }

// entrust gives the machine an identity with secrets.
func entrust(t *testing.T, c *guest.Client, keep bool, secrets ...guest.Secret) error {
	t.Helper()
	id := guest.NewIdentity("fork", "gen")
	id.Secrets, id.KeepSecrets = secrets, keep
	return c.Identify(within(t), id)
}

func TestSecrets(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	c := m.dial()
	check := func(what string, want map[string]string) {
		t.Helper()
		if diff := cmp.Diff(want, m.secrets()); diff != "" {
			t.Errorf("%s: %s", what, diff)
		}
	}
	if err := entrust(t, c, false, secret("token", "one"), secret("API_KEY", "two")); err != nil {
		t.Fatal(err)
	}
	check("given", map[string]string{"token": "one", "API_KEY": "two"})
	for path, want := range map[string]os.FileMode{secretsDir: 0o700 | os.ModeDir, secretsDir + "/token": 0o400} {
		if st, err := os.Stat(m.path(path)); err != nil || st.Mode() != want {
			t.Errorf("%s: mode %v, %v", path, st.Mode(), err)
		}
	}
	if err := entrust(t, c, true, secret("token", "new"), secret("third", "3")); err != nil {
		t.Fatal(err)
	}
	check("kept", map[string]string{"token": "new", "API_KEY": "two", "third": "3"})
	// A parked machine has put on its identity before it is known who gets it.
	if err := c.Identify(within(t), guest.Identity{ClockOnly: true, Secrets: []guest.Secret{secret("late", "4")}}); err != nil {
		t.Fatal(err)
	}
	check("with the clock", map[string]string{"token": "new", "API_KEY": "two", "third": "3", "late": "4"})
	if err := entrust(t, c, false, secret("token", "mine")); err != nil {
		t.Fatal(err)
	}
	check("replaced", map[string]string{"token": "mine"})
	if err := entrust(t, c, true); err != nil {
		t.Fatal(err)
	}
	check("kept as they are", map[string]string{"token": "mine"})
	if err := entrust(t, c, false); err != nil {
		t.Fatal(err)
	}
	check("dropped", map[string]string{})
	if _, err := os.Stat(m.path(secretsDir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory is still there: %v", err)
	}
}

// TestSecretsAreWiped: whoever has the file open, as free memory has its pages,
// sees zeros.
func TestSecretsAreWiped(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	c := m.dial()
	if err := entrust(t, c, false, secret("dropped", "0123456789"), secret("replaced", "abc")); err != nil {
		t.Fatal(err)
	}
	m.write(secretsDir+"/by-others/x", "y", 0o644)
	if err := os.Symlink(m.path("etc/hostname"), m.path(secretsDir+"/link")); err != nil {
		t.Fatal(err)
	}
	open := func(name string) *os.File {
		f, err := os.Open(m.path(secretsDir + "/" + name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		return f
	}
	dropped, replaced := open("dropped"), open("replaced")
	if err := entrust(t, c, true, secret("replaced", "new")); err != nil {
		t.Fatal(err)
	}
	if err := entrust(t, c, false); err != nil {
		t.Fatal(err)
	}
	for f, size := range map[*os.File]int{dropped: 10, replaced: 3} {
		got := make([]byte, 100)
		if n, _ := f.ReadAt(got, 0); !bytes.Equal(got[:n], make([]byte, size)) {
			t.Errorf("%s holds %q", f.Name(), got[:n])
		}
	}
	if got := m.read("etc/hostname"); got != "fork" {
		t.Errorf("what a link led to is %q", got)
	}
	if all := m.secrets(); len(all) != 0 {
		t.Errorf("secrets are left: %v", all)
	}
}

func TestManySecrets(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	var all []guest.Secret
	want := map[string]string{}
	for i := range 64 {
		s := secret(fmt.Sprintf("secret-%d", i), strings.Repeat(string(rune('A'+i%26)), 4<<10))
		all = append(all, s)
		want[s.Name] = string(s.Value)
	}
	id := guest.NewIdentity("fork", "gen")
	id.Secrets = all
	c, err := guest.DialIdentity(within(t), m.pipe(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if diff := cmp.Diff(want, m.secrets()); diff != "" {
		t.Error(diff)
	}
	if err = entrust(t, c, true, secret("one-more", "x")); !errors.Is(err, errdef.ErrExhausted) {
		t.Errorf("one more: %v", err)
	}
}

func TestBadSecrets(t *testing.T) {
	t.Parallel()
	big := strings.Repeat("x", 64<<10)
	many := make([]guest.Secret, 65)
	for i := range many {
		many[i] = secret(fmt.Sprintf("s%d", i), "x")
	}
	for name, secrets := range map[string][]guest.Secret{
		"no-name":  {secret("", "x")},
		"path":     {secret("../x", "x")},
		"dot":      {secret(".", "x")},
		"hidden":   {secret(".x", "x")},
		"option":   {secret("-x", "x")},
		"equals":   {secret("a=b", "x")},
		"long":     {secret(strings.Repeat("n", 65), "x")},
		"twice":    {secret("a", "x"), secret("b", "x"), secret("a", "y")},
		"too-big":  {secret("a", big+"x")},
		"too-many": many,
		"too-much": {secret("a", big), secret("b", big), secret("c", big), secret("d", big), secret("e", "x")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t)
			if err := entrust(t, m.dial(), false, secrets...); !errors.Is(err, errdef.ErrInvalid) || strings.Contains(err.Error(), big) {
				t.Errorf("error is %v", err)
			}
		})
	}
}

func TestSecretEnv(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	c := m.dial()
	if err := entrust(t, c, false, secret("TOKEN", "s3cret"), secret("zero", "a\x00b")); err != nil {
		t.Fatal(err)
	}
	run := func(names []string, replace bool) (string, error) {
		spec := sh("echo $TOKEN")
		spec.Env, spec.ReplaceEnv, spec.SecretEnv = []string{"TOKEN=public"}, replace, names
		r, err := c.Run(within(t), spec, nil, 1000)
		return string(r.Stdout), err
	}
	for _, replace := range []bool{false, true} {
		if got, err := run([]string{"TOKEN"}, replace); got != "s3cret\n" || err != nil {
			t.Errorf("replace %t: %q, %v", replace, got, err)
		}
	}
	if got, err := run(nil, false); got != "public\n" || err != nil {
		t.Errorf("not asked for: %q, %v", got, err)
	}
	for name, want := range map[string]error{"other": errdef.ErrNotFound, "../../../etc/hostname": errdef.ErrInvalid, "": errdef.ErrInvalid, "zero": errdef.ErrInvalid} {
		if _, err := run([]string{name}, false); !errors.Is(err, want) || strings.Contains(err.Error(), "a\x00b") {
			t.Errorf("secret %q: %v", name, err)
		}
	}
	if list, err := c.Processes(within(t)); err != nil || strings.Contains(fmt.Sprint(list), "s3cret") {
		t.Errorf("%v, %v", list, err)
	}
}
