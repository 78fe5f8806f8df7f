package image

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/progress"
)

// sourceDir is a small root tree.
func sourceDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "etc/motd"), "hello")
	writeFile(t, filepath.Join(dir, "usr/bin/python3"), "#!")
	if err := os.Chmod(filepath.Join(dir, "usr/bin/python3"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(dir, "etc/motd"), filepath.Join(dir, "etc/twin")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/motd", filepath.Join(dir, "etc/link")); err != nil {
		t.Fatal(err)
	}
	return dir
}

func request(t *testing.T, name string) BuildRequest {
	t.Helper()
	return BuildRequest{Name: name, Source: "dir:" + sourceDir(t), Kernel: "dir:" + kernelTree(t)}
}

func build(t *testing.T, s *Store, req BuildRequest) (Image, bool) {
	t.Helper()
	img, hit, err := s.Build(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return img, hit
}

func TestBuild(t *testing.T) {
	t.Parallel()
	s := openStore(t)
	req := request(t, "py")
	req.Warmup, req.Imports = []string{"true"}, []string{"json"}
	img, hit := build(t, s, req)
	if hit {
		t.Error("the first build was a hit")
	}
	m := img.Manifest
	m.Root, m.Kernel, m.Initrd = Blob{}, Blob{}, Blob{}
	want := Manifest{
		Version: manifestVersion, Source: req.Source, KernelVersion: "6.1.0-test", Config: RunConfig{Env: []string{defaultPath}},
		Warmup: []string{"true"}, Imports: []string{"json"}, Interpreters: []Interpreter{{Name: "python", Argv: []string{"/usr/bin/python3"}}},
	}
	if diff := cmp.Diff(want, m); diff != "" {
		t.Error(diff)
	}
	if size := img.Manifest.Root.Size; size == 0 || size%rootAlign != 0 {
		t.Errorf("root has %d bytes: not a multiple of %d", size, rootAlign)
	}
	if got := readFile(t, img.KernelPath()); got != string(elfKernel()) {
		t.Error("the kernel is not the one that was packed")
	}
	if entries, _ := readCPIO(t, []byte(readFile(t, img.InitrdPath()))); entries["init"].content != "agent" {
		t.Error("init is not the agent")
	}
	got := listing(t, extract(t, img))
	wantTree := []string{
		"dev/", "etc/", "etc/hosts = 127.0.0.1 localhost\n::1 localhost\n", "etc/link -> /etc/motd", "etc/motd = hello",
		"etc/tine/", "etc/tine/env = " + defaultPath + "\n", "etc/tine/fork.d/", "etc/twin = hello", "proc/", "run/", "sys/", "tmp/", "usr/", "usr/bin/", "usr/bin/python3 = #!",
	}
	if diff := cmp.Diff(wantTree, got); diff != "" {
		t.Error(diff)
	}
	if left, err := os.ReadDir(s.path(stagingDir)); err != nil || len(left) != 0 {
		t.Errorf("left in staging: %v, %v", left, err)
	}
}

// builds counts how often the parts of an image are really made.
func builds(t *testing.T, s *Store, req BuildRequest) (made []string, img Image, hit bool) {
	t.Helper()
	var mu sync.Mutex
	ctx := progress.With(t.Context(), func(e progress.Event) {
		mu.Lock()
		defer mu.Unlock()
		if e.Message == "writing the root filesystem" || e.Message == "unpacking the kernel" {
			made = append(made, e.Message)
		}
	})
	img, hit, err := s.Build(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(made)
	return made, img, hit
}

func TestBuildCache(t *testing.T) {
	t.Parallel()
	s := openStore(t)
	req := request(t, "a")
	all := []string{"unpacking the kernel", "writing the root filesystem"}
	made, first, hit := builds(t, s, req)
	if diff := cmp.Diff(all, made); diff != "" || hit {
		t.Error(diff, hit)
	}
	for _, tc := range []struct {
		name   string
		change func()
		made   []string
		hit    bool
		same   bool
	}{
		{"again", func() {}, nil, true, true},
		{"other_name", func() { req.Name = "b" }, nil, true, true},
		{"warmup", func() { req.Warmup = []string{"true"} }, nil, false, false},
		{"warmup_back", func() { req.Warmup = nil }, nil, true, true},
		{"refresh", func() { req.Refresh = true }, all, false, true},
		{"new_agent", func() { req.Refresh = false; writeFile(t, s.agent, "better agent") }, nil, false, false},
		{"old_agent", func() { writeFile(t, s.agent, "agent") }, nil, true, true},
		{"new_content", func() { writeFile(t, filepath.Join(req.Source[4:], "etc/motd"), "bye") }, all[1:], false, false},
		{"new_kernel", func() { writeFile(t, filepath.Join(req.Kernel[4:], "lib/modules/6.1.0-test/kernel/x.ko"), "x") }, all[:1], false, false},
	} {
		tc.change()
		made, img, hit := builds(t, s, req)
		if diff := cmp.Diff(tc.made, made); diff != "" || hit != tc.hit || (img.Digest == first.Digest) != tc.same {
			t.Errorf("%s: made %v, hit %v, same %v", tc.name, made, hit, img.Digest == first.Digest)
		}
	}
}

func TestBuildIsReproducible(t *testing.T) {
	t.Parallel()
	req := request(t, "a")
	one, _ := build(t, openStore(t), req)
	two, _ := build(t, openStore(t), req)
	if one.Digest != two.Digest {
		t.Errorf("two stores made %+v and %+v", one.Manifest, two.Manifest)
	}
}

func TestBuildAtOnce(t *testing.T) {
	t.Parallel()
	needMkfs(t)
	dir, req := t.TempDir(), request(t, "a")
	var made atomic.Int32
	ctx := progress.With(t.Context(), func(e progress.Event) {
		if e.Message == "writing the root filesystem" {
			made.Add(1)
		}
	})
	var all sync.WaitGroup
	for range 4 {
		s := openStoreAt(t, dir, "agent") // as another process has it
		all.Go(func() {
			if _, _, err := s.Build(ctx, req); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := made.Load(); n != 1 {
		t.Errorf("the root filesystem was made %d times", n)
	}
}

func TestBuildRefuses(t *testing.T) {
	t.Parallel()
	s := openStore(t)
	good := request(t, "a")
	for name, tc := range map[string]struct {
		change func(*BuildRequest)
		want   error
	}{
		"no_name":      {func(r *BuildRequest) { r.Name = "" }, errdef.ErrInvalid},
		"dots":         {func(r *BuildRequest) { r.Name = "../x" }, errdef.ErrInvalid},
		"slash":        {func(r *BuildRequest) { r.Name = "a/b" }, errdef.ErrInvalid},
		"long_name":    {func(r *BuildRequest) { r.Name = strings.Repeat("a", 65) }, errdef.ErrInvalid},
		"no_source":    {func(r *BuildRequest) { r.Source = "" }, errdef.ErrInvalid},
		"no_such_dir":  {func(r *BuildRequest) { r.Source = "dir:/nowhere" }, errdef.ErrNotFound},
		"file_as_dir":  {func(r *BuildRequest) { r.Source = "dir:" + s.agent }, errdef.ErrNotFound},
		"odd_kernel":   {func(r *BuildRequest) { r.Kernel = "x" }, errdef.ErrInvalid},
		"no_kernel":    {func(r *BuildRequest) { r.Kernel = r.Source }, errdef.ErrNotFound},
		"empty_warmup": {func(r *BuildRequest) { r.Warmup = []string{""} }, errdef.ErrInvalid},
		"many_warmups": {func(r *BuildRequest) { r.Warmup = slices.Repeat([]string{"x"}, maxWarmup+1) }, errdef.ErrInvalid},
		"long_import":  {func(r *BuildRequest) { r.Imports = []string{strings.Repeat("x", maxText+1)} }, errdef.ErrInvalid},
		"big_manifests": {func(r *BuildRequest) {
			r.Imports = slices.Repeat([]string{strings.Repeat("\x01", maxText)}, maxImports)
		}, errdef.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			req := good
			tc.change(&req)
			if _, _, err := s.Build(t.Context(), req); !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
}

func TestBuildOfChangingSource(t *testing.T) {
	t.Parallel()
	s := openStore(t)
	req := request(t, "a")
	ctx := progress.With(t.Context(), func(e progress.Event) {
		if e.Message == "writing the root filesystem" {
			writeFile(t, filepath.Join(req.Source[4:], "etc/late"), "x")
		}
	})
	if _, _, err := s.Build(ctx, req); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("got %v, want %v", err, errdef.ErrConflict)
	}
}

func TestBuildWithoutAgent(t *testing.T) {
	t.Parallel()
	s := openStore(t)
	s.agent += "-gone"
	_, _, err := s.Build(t.Context(), request(t, "a"))
	if !errors.Is(err, errdef.ErrUnavailable) || errdef.Hint(err) == "" {
		t.Errorf("got %v, hint %q", err, errdef.Hint(err))
	}
}

func TestFailedBuildLeavesNothing(t *testing.T) {
	t.Parallel()
	s := openStore(t)
	req := request(t, "a")
	writeFile(t, filepath.Join(req.Source[4:], "usr/lib/tine/x"), "reserved")
	if _, _, err := s.Build(t.Context(), req); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("got %v, want %v", err, errdef.ErrInvalid)
	}
	if images, err := s.List(); err != nil || len(images) != 0 {
		t.Errorf("listed: %v, %v", images, err)
	}
	if left, err := os.ReadDir(s.path(stagingDir)); err != nil || len(left) != 0 {
		t.Errorf("left in staging: %v, %v", left, err)
	}
}

func TestGet(t *testing.T) {
	t.Parallel()
	s := openStore(t)
	img, _ := build(t, s, request(t, "deadbeef"))
	hexed := strings.TrimPrefix(img.Digest, "sha256:")
	for ref, name := range map[string]string{"deadbeef": "deadbeef", img.Digest: "", hexed: "", hexed[:8]: ""} {
		got, err := s.Get(ref)
		if err != nil || got.Digest != img.Digest || got.Name != name || got.SizeBytes() == 0 || got.CreatedAt.IsZero() {
			t.Errorf("%s: %+v, %v", ref, got, err)
		}
	}
	for ref, want := range map[string]error{
		"nope": errdef.ErrNotFound, "0123456789": errdef.ErrNotFound, hexed[:7]: errdef.ErrNotFound, "": errdef.ErrInvalid,
		"../names/deadbeef": errdef.ErrInvalid, "sha256:../../names/deadbeef": errdef.ErrInvalid, "sha256:" + strings.Repeat("0", 64): errdef.ErrNotFound,
	} {
		if got, err := s.Get(ref); !errors.Is(err, want) {
			t.Errorf("%q: got %+v, %v, want %v", ref, got, err, want)
		}
	}
}

func TestGetFindsDamage(t *testing.T) {
	t.Parallel()
	s := openStore(t)
	img, _ := build(t, s, request(t, "a"))
	path, err := s.manifestPath(img.Digest)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, path, strings.Replace(readFile(t, path), "true", "false", 1)+" ")
	if got, err := s.Get("a"); err == nil {
		t.Errorf("got %+v", got)
	}
}

func TestRemoveAndGC(t *testing.T) {
	t.Parallel()
	s := openStore(t)
	req := request(t, "a")
	one, _ := build(t, s, req)
	req.Name, req.Source = "b", "dir:"+t.TempDir()
	two, _ := build(t, s, req)
	if images, err := s.List(); err != nil || len(images) != 2 || images[0].Name != "a" || images[1].Digest != two.Digest {
		t.Fatalf("listed: %+v, %v", images, err)
	}
	if err := s.Remove("a"); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]error{"a": errdef.ErrNotFound, "../names/b": errdef.ErrInvalid} {
		if err := s.Remove(name); !errors.Is(err, want) {
			t.Errorf("remove %s: got %v, want %v", name, err, want)
		}
	}
	freed, err := s.GC(t.Context(), func(digest string) bool { return digest == one.Digest })
	if err != nil || freed != 0 {
		t.Errorf("a kept image: freed %d, %v", freed, err)
	}
	freed, err = s.GC(t.Context(), nil)
	if err != nil || freed != one.Manifest.Root.Size {
		t.Errorf("freed %d, %v, want %d", freed, err, one.Manifest.Root.Size)
	}
	if _, err = s.Get(one.Digest); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("removed image: %v", err)
	}
	if _, hit := build(t, s, req); !hit {
		t.Error("the image that was left had to be built again")
	}
	if err = s.Remove("b"); err != nil {
		t.Fatal(err)
	}
	if _, err = s.GC(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{blobDir, manifestDir, rootDir, kernelDir, nameDir} {
		if left, err := os.ReadDir(s.path(d)); err != nil || len(left) != 0 {
			t.Errorf("left in %s: %v, %v", d, left, err)
		}
	}
}

func TestGCWaitsForNoBuild(t *testing.T) {
	t.Parallel()
	s := openStore(t)
	lock, err := s.lockShared(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err = s.GC(t.Context(), nil); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("got %v, want %v", err, errdef.ErrConflict)
	}
	if err = durable.Unlock(lock); err != nil {
		t.Fatal(err)
	}
	if _, err = s.GC(t.Context(), nil); err != nil {
		t.Error(err)
	}
}

func TestOpenRemovesLeftovers(t *testing.T) {
	t.Parallel()
	s := openStore(t)
	live, release, err := s.scratch(t.Context(), "roots-live")
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, s.path(stagingDir, "roots-dead/tree/x"), "x")
	again := openStoreAt(t, s.dir, "agent")
	if _, err = os.Stat(live); err != nil {
		t.Errorf("a live builder's directory: %v", err)
	}
	if _, err = os.Stat(again.path(stagingDir, "roots-dead")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a dead builder's directory: %v", err)
	}
	if err = release(); err != nil {
		t.Fatal(err)
	}
}

func TestDamagedCacheIsMended(t *testing.T) {
	t.Parallel()
	s := openStore(t)
	req := request(t, "a")
	img, _ := build(t, s, req)
	if err := os.Truncate(img.RootPath(), 10); err != nil {
		t.Fatal(err)
	}
	entries, err := filepath.Glob(s.path(kernelDir, "*"))
	if err != nil || len(entries) != 1 {
		t.Fatal(entries, err)
	}
	writeFile(t, entries[0], "{")
	again, _ := build(t, s, req)
	if again.Digest != img.Digest {
		t.Errorf("got %s, want %s", again.Digest, img.Digest)
	}
	if info, err := os.Stat(again.RootPath()); err != nil || info.Size() != again.Manifest.Root.Size {
		t.Errorf("root: %v, %v", info, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	for _, c := range []Config{{}, {Dir: "x", Limits: Limits{Bytes: -1}}} {
		if _, err := Open(c); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%+v: got %v", c, err)
		}
	}
}

// TestDebian builds the default image for real. It needs the network, and a
// minute.
func TestDebian(t *testing.T) {
	if os.Getenv("TINE_TEST_NETWORK") == "" {
		t.Skip("set TINE_TEST_NETWORK=1 to fetch Debian packages")
	}
	t.Parallel()
	s := openStore(t)
	ctx := progress.With(t.Context(), func(e progress.Event) { t.Log(e.Message) })
	req := BuildRequest{Name: "py", Source: "debian:bookworm+python3"}
	img, _, err := s.Build(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	tree := extract(t, img)
	for _, name := range []string{"usr/bin/python3", "bin/bash", "bin/ls", "usr/bin/env"} {
		if _, err = os.Stat(filepath.Join(tree, name)); err != nil {
			t.Error(err)
		}
	}
	if diff := cmp.Diff([]Interpreter{{Name: "python", Argv: []string{"/usr/bin/python3"}}}, img.Manifest.Interpreters); diff != "" {
		t.Error(diff)
	}
	if _, hit := build(t, s, req); !hit {
		t.Error("the second build was no hit")
	}
}
