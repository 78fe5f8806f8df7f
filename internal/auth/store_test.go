package auth

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
)

func TestStore(t *testing.T) {
	t.Parallel()
	path := StorePath(filepath.Join(t.TempDir(), "state"))
	if list, err := List(path); len(list) != 0 || err != nil {
		t.Errorf("nothing there: %v, %v", list, err)
	}
	if err := Remove(t.Context(), path, "ci"); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("remove: %v", err)
	}
	if _, err := os.Stat(filepath.Dir(path)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("looking has made a directory: %v", err)
	}
	b, secret, err := Create(t.Context(), path, Record{Name: "b", Scope: Fork, MaxSandboxes: 7, Sign: true})
	if err != nil {
		t.Fatal(err)
	}
	a, other, err := Create(t.Context(), path, Record{Name: "a", Scope: Read})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(secret, "tinesign_b_") || !strings.HasPrefix(other, "tine_a_") || len(other) != len("tine_a_")+52 {
		t.Errorf("tokens %q, %q", secret, other)
	}
	if _, _, err = Create(t.Context(), path, Record{Name: "a", Scope: Read}); !errors.Is(err, errdef.ErrExists) {
		t.Errorf("again: %v", err)
	}
	list, err := List(path)
	if diff := cmp.Diff([]Record{a, b}, list); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	data, err := os.ReadFile(path)
	if err != nil || bytes.Contains(data, []byte(secret)) || bytes.Contains(data, []byte(other)) {
		t.Errorf("the file has a token: %s, %v", data, err)
	}
	if info, statErr := os.Stat(path); statErr != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), statErr)
	}
	if err = Remove(t.Context(), path, "b"); err != nil {
		t.Error(err)
	}
	if err = Remove(t.Context(), path, "b"); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("again: %v", err)
	}
	if list, err = List(path); cmp.Diff([]Record{a}, list) != "" || err != nil {
		t.Errorf("left: %v, %v", list, err)
	}
}

func TestStoreRace(t *testing.T) {
	t.Parallel()
	path := StorePath(t.TempDir())
	var work sync.WaitGroup
	for i := range 20 {
		work.Go(func() {
			if _, _, err := Create(t.Context(), path, Record{Name: fmt.Sprintf("t%d", i), Scope: Fork}); err != nil {
				t.Error(err)
			}
			if i%2 == 0 {
				if err := Remove(t.Context(), path, fmt.Sprintf("t%d", i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	work.Wait()
	if list, err := List(path); len(list) != 10 || err != nil {
		t.Errorf("%d tokens, %v", len(list), err)
	}
}

func TestBadRecords(t *testing.T) {
	t.Parallel()
	path := StorePath(t.TempDir())
	for name, r := range map[string]Record{
		"no_name": {Scope: Fork}, "upper": {Name: "CI", Scope: Fork}, "underscore": {Name: "a_b", Scope: Fork},
		"slash": {Name: "a/b", Scope: Fork}, "newline": {Name: "a\n", Scope: Fork}, "long": {Name: strings.Repeat("a", 33), Scope: Fork},
		"digit": {Name: "1a", Scope: Fork}, "ours": {Name: "token-file", Scope: Fork}, "local": {Name: "local", Scope: Fork},
		"no_scope": {Name: "a"}, "scope": {Name: "a", Scope: "root"},
		"cap": {Name: "a", Scope: Fork, MaxSandboxes: -1}, "large_cap": {Name: "a", Scope: Fork, MaxSandboxes: maxCap + 1},
	} {
		if _, secret, err := Create(t.Context(), path, r); !errors.Is(err, errdef.ErrInvalid) || secret != "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("something was written: %v", err)
	}
}

func TestTooManyTokens(t *testing.T) {
	t.Parallel()
	path := StorePath(t.TempDir())
	records := make([]Record, maxTokens)
	for i := range records {
		records[i] = Record{Name: fmt.Sprintf("t%d", i), Scope: Fork, SHA256: fmt.Sprintf("%064x", i)}
	}
	data, err := encodeRecords(records)
	if err != nil {
		t.Fatal(err)
	}
	write(t, path, string(data))
	if _, _, err = Create(t.Context(), path, Record{Name: "more", Scope: Fork}); !errors.Is(err, errdef.ErrExhausted) {
		t.Errorf("one more: %v", err)
	}
}

func TestDecodeRecords(t *testing.T) {
	t.Parallel()
	hash := strings.Repeat("a", 64)
	good := `{"version":1,"tokens":[{"name":"a","scope":"fork","sha256":"` + hash + `","created_at":"2026-11-21T18:00:00Z"}]}`
	for text, want := range map[string]error{
		good:                                     nil,
		`{"version":1,"tokens":[]}`:              nil,
		``:                                       errdef.ErrInvalid,
		good + good:                              errdef.ErrInvalid,
		`{"version":2,"tokens":[]}`:              errdef.ErrUnsupported,
		`{"tokens":[]}`:                          errdef.ErrUnsupported,
		`{"version":1,"more":1}`:                 errdef.ErrInvalid,
		`{"version":1,"tokens":[{}]}`:            errdef.ErrInvalid,
		strings.ReplaceAll(good, `fork`, `root`): errdef.ErrInvalid,
		strings.ReplaceAll(good, hash, hash[1:]): errdef.ErrInvalid,
		strings.ReplaceAll(good, hash, strings.ToUpper(hash)):                                errdef.ErrInvalid,
		strings.ReplaceAll(good, `"scope"`, `"secret":"x","scope"`):                          errdef.ErrInvalid,
		strings.ReplaceAll(good, `}]`, `},{"name":"b","scope":"fork","sha256":"`+hash+`"}]`): errdef.ErrInvalid,
	} {
		if _, err := decodeRecords([]byte(text)); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", text, err, want)
		}
	}
}

func FuzzDecodeRecords(f *testing.F) {
	f.Add([]byte(`{"version":1,"tokens":[{"name":"a","scope":"fork","sha256":"` + strings.Repeat("a", 64) + `","max_sandboxes":3,"sign":true,"created_at":"2026-11-21T18:00:00Z"}]}`))
	f.Add([]byte(`{"version":1,"tokens":[]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		records, err := decodeRecords(data)
		if err != nil {
			return
		}
		for _, r := range records {
			if rank(r.Scope) == 0 || !validName(r.Name) || r.token().hash == [32]byte{} && r.SHA256 != strings.Repeat("0", 64) {
				t.Errorf("accepted %+v", r)
			}
		}
		again, err := encodeRecords(records)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := decodeRecords(again); err != nil || (len(records) > 0 && cmp.Diff(records, back) != "") {
			t.Errorf("%v became %v, %v", records, back, err)
		}
	})
}
