package record

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
)

func testBundle(t testing.TB) ([]byte, Envelope) {
	t.Helper()
	e, contents := testEnvelope(t)
	var b bytes.Buffer
	if err := WriteBundle(&b, e, testKey().Public(), &Bundle{contents: contents}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes(), e
}

func TestBundle(t *testing.T) {
	t.Parallel()
	data, e := testBundle(t)
	if again, _ := testBundle(t); !bytes.Equal(data, again) {
		t.Error("two bundles of one record differ")
	}
	b, err := ReadBundle(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	if v := Verify(b.Envelope.Bytes, testTrust(), b); !v.OK || len(v.Missing) > 0 || !b.Whole() || b.Key.ID() != e.Record.KeyID {
		t.Errorf("%+v", v)
	}
	out, err := LoadOutput(b.Envelope.Record, b)
	if diff := cmp.Diff(testDraft().Output, out); err != nil || diff != "" {
		t.Errorf("%v %s", err, diff)
	}
	alone, err := ReadBundle(bytes.NewReader(append(e.Bytes, '\n')))
	if err != nil || alone.Whole() || alone.Envelope.Digest != e.Digest {
		t.Errorf("an envelope by itself: %v", err)
	}
	if _, err = alone.Blob(e.Record.Output.Stdout); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("%v", err)
	}
	if err = WriteBundle(&bytes.Buffer{}, e, testKey().Public(), alone); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("a bundle without its contents: %v", err)
	}
}

// tar(1) reads it.
func TestBundleWithTar(t *testing.T) {
	t.Parallel()
	program, err := exec.LookPath("tar")
	if err != nil {
		t.Skip("there is no tar")
	}
	data, e := testBundle(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "b.tar")
	write(t, file, data)
	if out, runErr := exec.Command(program, "-xf", file, "-C", dir).CombinedOutput(); runErr != nil {
		t.Fatalf("%s: %v", out, runErr)
	}
	if got := read(t, filepath.Join(dir, bundleName(e.Record.Output.Stdout))); string(got) != "one\ntwo\nthree\n" {
		t.Errorf("%q", got)
	}
}

// A bundle with another byte is refused, or its record is, whatever the byte
// means to a tar.
func TestFlipAnyByteOfBundle(t *testing.T) {
	t.Parallel()
	data, _ := testBundle(t)
	for i := rand.IntN(32); i < len(data); i += 32 { // all of them, in several runs
		bad := bytes.Clone(data)
		bad[i] ^= 1
		b, err := ReadBundle(bytes.NewReader(bad))
		refused := errors.Is(err, errdef.ErrInvalid) || errors.Is(err, errdef.ErrUnsupported)
		if !refused && (err != nil || Verify(b.Envelope.Bytes, testTrust(), b).OK) {
			t.Fatalf("byte %d: accepted, %v", i, err)
		}
	}
	for _, more := range []string{"x", strings.Repeat("\x00", 100<<10)} {
		if _, err := ReadBundle(io.MultiReader(bytes.NewReader(data), strings.NewReader(more))); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%d bytes more: %v", len(more), err)
		}
	}
}

func TestBadBundles(t *testing.T) {
	t.Parallel()
	data, e := testBundle(t)
	type entry struct {
		name string
		data []byte
		kind byte
	}
	var good []entry
	_, contents := testEnvelope(t)
	good = append(good, entry{bundleRecord, append(bytes.Clone(e.Bytes), '\n'), tar.TypeReg}, entry{bundleKey, testKey().Public().PEM(), tar.TypeReg})
	for _, b := range e.Record.Blobs() {
		good = append(good, entry{bundleName(b), contents[b.Digest], tar.TypeReg})
	}
	pack := func(entries []entry) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, x := range entries {
			h := &tar.Header{Name: x.name, Size: int64(len(x.data)), Typeflag: x.kind, Mode: 0o644}
			if x.kind != tar.TypeReg {
				h.Size, h.Linkname = 0, "/etc/passwd"
			}
			if err := w.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
			if h.Size > 0 {
				if _, err := w.Write(x.data); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	if _, err := ReadBundle(bytes.NewReader(pack(good))); err != nil {
		t.Fatal(err)
	}
	with := func(i int, x entry) []entry { c := slices.Clone(good); c[i] = x; return c }
	tests := map[string][]byte{
		"empty":         nil,
		"cut":           data[:len(data)/2],
		"not-a-tar":     bytes.Repeat([]byte("x"), 2000),
		"no-record":     pack(good[1:]),
		"no-key":        pack(slices.Delete(slices.Clone(good), 1, 2)),
		"no-content":    pack(good[:len(good)-1]),
		"more":          pack(append(slices.Clone(good), entry{"../../etc/cron.d/x", []byte("x"), tar.TypeReg})),
		"other-order":   pack(append([]entry{good[0], good[1], good[3], good[2]}, good[4:]...)),
		"a-link":        pack(with(3, entry{good[3].name, nil, tar.TypeSymlink})),
		"other-content": pack(with(3, entry{good[3].name, []byte("something else"), tar.TypeReg})),
		"longer":        pack(with(3, entry{good[3].name, append(bytes.Clone(good[3].data), 0), tar.TypeReg})),
		"shorter":       pack(with(3, entry{good[3].name, good[3].data[:1], tar.TypeReg})),
		"bad-key":       pack(with(1, entry{bundleKey, []byte("key"), tar.TypeReg})),
		"big-key":       pack(with(1, entry{bundleKey, make([]byte, maxKey+1), tar.TypeReg})),
	}
	for name, bad := range tests {
		if _, err := ReadBundle(bytes.NewReader(bad)); !errors.Is(err, errdef.ErrInvalid) && !errors.Is(err, errdef.ErrConflict) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
