package tine_test

import (
	"bytes"
	"go/ast"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestNoBinaries sees that nothing is committed that cannot be read.
func TestNoBinaries(t *testing.T) {
	t.Parallel()
	const most = 1 << 20
	for _, path := range files(t) {
		data := read(t, path)
		if bytes.IndexByte(data, 0) >= 0 {
			t.Errorf("%s is binary: make it in a test, or write it as text", path)
		}
		if len(data) > most {
			t.Errorf("%s has %d bytes, more than %d", path, len(data), most)
		}
	}
}

// TestNoMirrors sees that no file names a package mirror or a registry: which
// one to use is for the machine's own configuration to say. The names are put
// together here, so that this file passes too.
func TestNoMirrors(t *testing.T) {
	t.Parallel()
	var hosts [][]byte
	for domain, names := range map[string]string{
		".debian.org":       "deb ftp security snapshot",
		".ubuntu.com":       "archive security ports",
		".golang.org":       "proxy sum",
		".npmjs.org":        "registry",
		".pythonhosted.org": "files",
		".org":              "pypi",
		".io":               "docker ghcr quay crates",
		".docker.com":       "hub",
		".googleapis.com":   "storage",
	} {
		for name := range strings.FieldsSeq(names) {
			hosts = append(hosts, []byte(name+domain))
		}
	}
	for _, path := range files(t) {
		data := read(t, path)
		for _, host := range hosts {
			if bytes.Contains(data, host) {
				t.Errorf("%s names %s", path, host)
			}
		}
	}
}

var (
	citation = regexp.MustCompile(`\bdocs/[a-z0-9/_-]+\.md\b`)
	link     = regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)
)

// TestDocs sees that pages which code or other pages name exist, and that each
// page on a format is named by the code that reads or writes it.
func TestDocs(t *testing.T) {
	t.Parallel()
	cited := map[string]bool{}
	for _, path := range files(t) {
		switch filepath.Ext(path) {
		case ".go":
			for _, page := range citation.FindAllString(string(read(t, path)), -1) {
				cited[page] = true
				exists(t, path, page)
			}
		case ".md":
			for _, found := range link.FindAllSubmatch(read(t, path), -1) {
				exists(t, path, filepath.Join(filepath.Dir(path), string(found[1])))
			}
		}
	}
	pages, err := filepath.Glob("docs/formats/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range pages {
		if !cited[page] {
			t.Errorf("no Go file names %s: it describes nothing", page)
		}
	}
}

func exists(t *testing.T, path, page string) {
	t.Helper()
	if _, err := os.Stat(page); err != nil {
		t.Errorf("%s names %s: %v", path, page, err)
	}
}

// TestTagOfVMTests sees that make finds the tests that boot machines, and that
// nothing else runs them.
func TestTagOfVMTests(t *testing.T) {
	t.Parallel()
	for _, s := range sources(t) {
		tagged := slices.ContainsFunc(s.syntax.Comments, func(c *ast.CommentGroup) bool {
			return c.Pos() < s.syntax.Package && c.List[0].Text == "//go:build vm"
		})
		if named := strings.HasSuffix(s.path, "_vm_test.go"); named != tagged {
			t.Errorf("%s: named as a test that boots machines: %v; tagged as one: %v", s.path, named, tagged)
		}
	}
}
