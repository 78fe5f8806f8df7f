// Package tine_test holds the rules of the whole repository: which package may
// import which, and what may lie in the tree. It parses sources and runs no
// other program.
package tine_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/tinevm/tine/"

// mayImport is the whole import policy: what a package may import of this
// module. A package without a row fails, so adding one is a decision; so does
// a row that allows what nobody uses. ARCHITECTURE.md explains the tiers.
var mayImport = map[string][]string{
	// Tier 0: leaves.
	"internal/deadline":   {},
	"internal/durable":    {"internal/errdef"},
	"internal/errdef":     {},
	"internal/guestproto": {},
	"internal/linux":      {"internal/errdef"},
	"internal/progress":   {},
	"internal/relink":     {"internal/errdef"},
	"internal/undo":       {},

	// Tier 1: mechanisms, which know nothing of sandboxes.
	"internal/agent":    {"internal/errdef", "internal/guestproto", "internal/relink"},
	"internal/audit":    {"internal/durable", "internal/errdef", "internal/undo"},
	"internal/auth":     {"internal/durable", "internal/errdef"},
	"internal/cgroup":   {"internal/errdef", "internal/undo"},
	"internal/egress":   {"internal/errdef"},
	"internal/ext4":     {"internal/errdef"},
	"internal/guest":    {"internal/deadline", "internal/errdef", "internal/guestproto"},
	"internal/guestmem": {"internal/errdef", "internal/linux", "internal/undo"},
	"internal/image":    {"internal/durable", "internal/errdef", "internal/ext4", "internal/progress"},
	"internal/jail":     {"internal/cgroup", "internal/durable", "internal/errdef", "internal/linux", "internal/network", "internal/undo"},
	"internal/metrics":  {},
	"internal/network":  {"internal/errdef", "internal/vmm"},
	"internal/publish":  {"internal/errdef"},
	"internal/record":   {"internal/durable", "internal/errdef", "internal/undo"},
	"internal/snapshot": {
		"internal/durable", "internal/errdef", "internal/guestmem", "internal/linux", "internal/progress", "internal/vmm",
	},
	"internal/vmm": {"internal/errdef", "internal/guestmem"},
	"internal/vmm/firecracker": {
		"internal/errdef", "internal/guestmem", "internal/jail", "internal/linux", "internal/network", "internal/relink", "internal/undo",
		"internal/vmm", "internal/vmm/firecracker/api", "internal/vmm/process",
	},
	"internal/vmm/firecracker/api": {"internal/errdef"},
	"internal/vmm/process": {
		"internal/cgroup", "internal/errdef", "internal/guestmem", "internal/jail", "internal/linux", "internal/network", "internal/undo",
		"internal/vmm",
	},
	"internal/vmm/qemu": {
		"internal/errdef", "internal/guestmem", "internal/jail", "internal/undo", "internal/vmm", "internal/vmm/process",
	},

	// Tier 2: the domain.
	"internal/attest": {
		"internal/block", "internal/deterministic", "internal/errdef", "internal/guest", "internal/image", "internal/progress",
		"internal/record", "internal/sandbox", "internal/snapshot", "internal/vmm",
	},
	"internal/block": {"internal/durable", "internal/errdef", "internal/record"},
	"internal/deterministic": {
		"internal/durable", "internal/errdef", "internal/guestproto", "internal/image", "internal/progress", "internal/record",
		"internal/snapshot", "internal/vmm",
	},
	"internal/sandbox": {
		"internal/durable", "internal/egress", "internal/errdef", "internal/guest", "internal/guestmem", "internal/guestproto",
		"internal/image", "internal/linux", "internal/progress", "internal/snapshot", "internal/undo", "internal/vmm",
	},
	"internal/workspace": {"internal/durable", "internal/errdef", "internal/sandbox", "internal/vmm"},

	// Tier 3: delivery.
	"client": {"internal/deadline", "internal/errdef", "internal/wire"},
	"internal/api": {
		"internal/api/forge", "internal/attest", "internal/audit", "internal/auth", "internal/block", "internal/deterministic",
		"internal/egress", "internal/errdef", "internal/guest", "internal/guestproto", "internal/image", "internal/metrics", "internal/progress",
		"internal/publish", "internal/record", "internal/sandbox", "internal/snapshot", "internal/vmm", "internal/wire", "internal/workspace",
	},
	"internal/api/forge": {"internal/errdef", "internal/guest", "internal/sandbox", "internal/snapshot", "internal/wire"},
	"internal/cli":       {"client", "internal/audit", "internal/block", "internal/errdef", "internal/progress", "internal/publish", "internal/record"},
	"internal/forkd":     {"client", "internal/errdef"},
	"internal/wire":      {},

	// Tier 4: assembly.
	"cmd/tine":       {"internal/assemble", "internal/cli", "internal/forkd", "internal/guestmem", "internal/jail"},
	"cmd/tine-agent": {"internal/agent"},
	"internal/assemble": {
		"client", "internal/audit", "internal/auth", "internal/bench", "internal/cgroup", "internal/cli", "internal/daemon",
		"internal/demo", "internal/doctor", "internal/egress", "internal/engines", "internal/errdef", "internal/image",
		"internal/jail", "internal/network", "internal/sandbox", "internal/undo", "internal/wire",
	},
	"internal/bench": {
		"internal/attest", "internal/cgroup", "internal/daemon", "internal/deterministic", "internal/egress", "internal/errdef",
		"internal/guest", "internal/guestmem", "internal/image", "internal/jail", "internal/linux", "internal/progress", "internal/record",
		"internal/relink", "internal/sandbox", "internal/snapshot", "internal/undo", "internal/vmm", "internal/vmm/firecracker/api",
	},
	"internal/daemon": {
		"client", "internal/api", "internal/attest", "internal/audit", "internal/auth", "internal/deterministic",
		"internal/durable", "internal/errdef", "internal/guestmem",
		"internal/image", "internal/metrics", "internal/publish", "internal/sandbox", "internal/snapshot", "internal/undo", "internal/vmm",
		"internal/wire", "internal/workspace",
	},
	"internal/demo": {
		"internal/daemon", "internal/errdef", "internal/guest", "internal/image", "internal/progress",
		"internal/sandbox", "internal/snapshot",
	},
	"internal/doctor": {"internal/engines", "internal/errdef", "internal/image", "internal/linux", "internal/vmm"},
	"internal/engines": {
		"internal/durable", "internal/errdef", "internal/jail", "internal/linux", "internal/vmm", "internal/vmm/firecracker",
		"internal/vmm/process", "internal/vmm/qemu",
	},

	// Only for tests.
	"internal/api/apitest": {
		"internal/agent", "internal/api", "internal/attest", "internal/deterministic", "internal/egress", "internal/errdef", "internal/guest",
		"internal/guestmem", "internal/image", "internal/metrics", "internal/progress", "internal/publish", "internal/record", "internal/sandbox",
		"internal/snapshot", "internal/vmm", "internal/vmm/fake", "internal/wire", "internal/workspace",
	},
	"internal/kvmtest": {},
	"internal/vmm/fake": {
		"internal/agent", "internal/errdef", "internal/guestmem", "internal/linux", "internal/undo", "internal/vmm",
	},
	"internal/vmm/firecracker/apitest": {"internal/vmm/firecracker/api"},
	"internal/vmm/vmmtest":             {"internal/errdef", "internal/guest", "internal/guestmem", "internal/vmm"},
	"internal/vmtest": {
		"internal/cgroup", "internal/deterministic", "internal/durable", "internal/errdef", "internal/image", "internal/jail",
		"internal/sandbox", "internal/snapshot", "internal/vmm", "internal/vmm/firecracker", "internal/vmm/qemu",
	},
}

// onlyForTests are packages that no program may contain. Any test may import
// them, and they may import each other.
var onlyForTests = []string{
	"internal/api/apitest", "internal/kvmtest", "internal/vmm/fake", "internal/vmm/firecracker/apitest", "internal/vmm/vmmtest", "internal/vmtest",
}

// testsMayImport is what a package's tests may import beside the package, its
// row and what is only for tests.
var testsMayImport = map[string][]string{
	"client":                 {"internal/api"},
	"cmd/tine":               {"client", "internal/durable", "internal/linux"},
	"internal/api/forge":     {"internal/api"},
	"internal/agent":         {"internal/guest", "internal/vmm"},
	"internal/bench":         {"internal/vmm/firecracker", "internal/vmm/qemu"},
	"internal/cli":           {"internal/vmm"},
	"internal/daemon":        {"internal/guest", "internal/linux"},
	"internal/deterministic": {"internal/agent", "internal/guest", "internal/sandbox"},
	"internal/guest":         {"internal/agent"},
	"internal/kvmtest":       {"internal/image", "internal/jail"},
	"internal/sandbox":       {"internal/network", "internal/vmm/firecracker", "internal/vmm/qemu"},

	"internal/vmm/firecracker": {"internal/guest", "internal/image"},
	"internal/vmm/qemu":        {"internal/guest", "internal/image", "internal/linux"},
	"internal/workspace":       {"internal/guest", "internal/snapshot"},
}

// plain are the packages that use no other module than x/sys: leaves that
// everything stands on, and what goes into the guest.
var plain = []string{
	"cmd/tine-agent", "internal/agent", "internal/cgroup", "internal/deadline", "internal/durable", "internal/errdef",
	"internal/guest",
	"internal/guestproto", "internal/kvmtest", "internal/linux", "internal/progress", "internal/relink", "internal/undo", "internal/vmm",
}

// source is one Go file.
type source struct {
	path, dir string
	test      bool
	syntax    *ast.File
}

// sources parses the imports and comments of every Go file of the module.
func sources(t *testing.T) []source {
	t.Helper()
	var all []source
	for _, path := range files(t) {
		if filepath.Ext(path) != ".go" || strings.Contains(path, "testdata/") {
			continue
		}
		syntax, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, source{path, filepath.Dir(path), strings.HasSuffix(path, "_test.go"), syntax})
	}
	return all
}

// files lists the repository's files, without what make builds.
func files(t *testing.T) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && slices.Contains([]string{".git", ".cache", "bin"}, path):
			return filepath.SkipDir
		case entry.Type().IsRegular():
			all = append(all, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// imports are the paths that a file imports.
func (s source) imports(t *testing.T) []string {
	t.Helper()
	var paths []string
	for _, spec := range s.syntax.Imports {
		path, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, path)
	}
	return paths
}

// ours are the packages of this module that a file imports.
func (s source) ours(t *testing.T) []string {
	t.Helper()
	var dirs []string
	for _, path := range s.imports(t) {
		if dir, ok := strings.CutPrefix(path, module); ok {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

func TestImportsGoOneWay(t *testing.T) {
	t.Parallel()
	used := map[string]bool{}
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		row, known := mayImport[s.dir]
		if !known {
			t.Errorf("%s: package %s has no row in mayImport", s.path, s.dir)
			continue
		}
		used[s.dir] = true
		for _, dir := range s.ours(t) {
			used[s.dir+" "+dir] = true
			if !slices.Contains(row, dir) {
				t.Errorf("%s: %s may not import %s", s.path, s.dir, dir)
			}
		}
	}
	for dir, row := range mayImport {
		if !used[dir] {
			t.Errorf("mayImport has a row for %s, which does not exist", dir)
		}
		for _, other := range row {
			if !used[dir+" "+other] {
				t.Errorf("mayImport lets %s import %s, which it does not", dir, other)
			}
			if slices.Contains(onlyForTests, other) && !slices.Contains(onlyForTests, dir) {
				t.Errorf("mayImport lets %s import %s, which is only for tests", dir, other)
			}
		}
	}
}

func TestImportsOfTests(t *testing.T) {
	t.Parallel()
	for _, s := range sources(t) {
		if !s.test {
			continue
		}
		allowed := slices.Concat([]string{s.dir}, mayImport[s.dir], testsMayImport[s.dir], onlyForTests)
		for _, dir := range s.ours(t) {
			if !slices.Contains(allowed, dir) {
				t.Errorf("%s: tests of %s may not import %s", s.path, s.dir, dir)
			}
		}
	}
}

func TestPlainPackages(t *testing.T) {
	t.Parallel()
	for _, s := range sources(t) {
		if s.test || !slices.Contains(plain, s.dir) {
			continue
		}
		for _, path := range s.imports(t) {
			host, _, _ := strings.Cut(path, "/")
			foreign := strings.Contains(host, ".") && !strings.HasPrefix(path, module)
			if foreign && !strings.HasPrefix(path, "golang.org/x/sys/") {
				t.Errorf("%s: %s may not import %s", s.path, s.dir, path)
			}
		}
	}
}

func TestPackageComments(t *testing.T) {
	t.Parallel()
	comments := map[string]int{}
	for _, s := range sources(t) {
		if s.test || ast.IsGenerated(s.syntax) {
			continue
		}
		comments[s.dir] += 0
		if s.syntax.Doc == nil {
			continue
		}
		comments[s.dir]++
		want := "Package " + s.syntax.Name.Name + " "
		if s.syntax.Name.Name == "main" {
			want = "Command " + filepath.Base(s.dir) + " "
		}
		if !strings.HasPrefix(s.syntax.Doc.Text(), want) {
			t.Errorf("%s: the package comment does not start with %q", s.path, want)
		}
	}
	for dir, n := range comments {
		if n != 1 {
			t.Errorf("%s has %d package comments, want one", dir, n)
		}
	}
}
