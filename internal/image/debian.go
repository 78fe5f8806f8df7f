package image

import (
	"context"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/progress"
)

// debianSource is a Debian system of essential packages and some more.
type debianSource struct {
	suite    string
	packages []string
}

const maxPackages = 256

// A package name must not end in '-', which would tell apt to remove it.
var (
	suiteRE   = regexp.MustCompile(`^[a-z][a-z0-9]*(-[a-z0-9]+)*$`)
	packageRE = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]*[a-z0-9+]$`)
)

// parseDebian reads SUITE+PKG+PKG, or SUITE,PKG,PKG where a name has a '+'.
func parseDebian(text string) (debianSource, error) {
	sep := "+"
	if strings.Contains(text, ",") {
		sep = ","
	}
	parts := strings.Split(text, sep)
	if !suiteRE.MatchString(parts[0]) || len(parts[0]) > 64 {
		return debianSource{}, fmt.Errorf("%w: Debian suite %.100q", errdef.ErrInvalid, parts[0])
	}
	if len(parts) > maxPackages {
		return debianSource{}, fmt.Errorf("%w: %d packages: at most %d", errdef.ErrInvalid, len(parts)-1, maxPackages)
	}
	for _, p := range parts[1:] {
		if !packageRE.MatchString(p) || len(p) > 128 {
			err := fmt.Errorf("%w: Debian package %.200q", errdef.ErrInvalid, p)
			return debianSource{}, errdef.WithHint(err, "separate packages with commas where a name has a '+': debian:bookworm,g++,make")
		}
	}
	return debianSource{suite: parts[0], packages: parts[1:]}, nil
}

// identity does not ask the archive what is new there: that is for Refresh.
func (d debianSource) identity(context.Context) (string, error) {
	return "debian:" + strings.Join(append([]string{d.suite}, d.packages...), ","), nil
}

func (d debianSource) unpack(ctx context.Context, t *tree, scratch string) (RunConfig, error) {
	progress.Report(ctx, step, "making a Debian "+d.suite+" system")
	args := []string{"--variant=essential"}
	if len(d.packages) > 0 {
		args = append(args, "--include="+strings.Join(d.packages, ","))
	}
	err := mmdebstrap(ctx, scratch, "root", args, d.suite, func(ctx context.Context, r io.Reader) error {
		return t.unpack(ctx, r, unpackOptions{drop: dropDebian})
	})
	return RunConfig{Env: []string{defaultPath}}, err
}

// debianDropped are directories that no guest needs what is in.
var debianDropped = []string{
	"usr/share/doc/", "usr/share/man/", "usr/share/info/", "usr/share/locale/", "usr/share/lintian/", "dev/",
}

// debianEmptied are directories whose files are of no use but whose own
// directories programs expect.
var debianEmptied = []string{"var/cache/", "var/lib/apt/lists/", "var/log/"}

// dropDebian leaves out what guests do not need, and what mmdebstrap has put
// in from the host.
func dropDebian(name string, dir bool) bool {
	inside := func(parent string) bool { return strings.HasPrefix(name, parent) }
	return name == "etc/hostname" || name == "etc/resolv.conf" ||
		slices.ContainsFunc(debianDropped, inside) || !dir && slices.ContainsFunc(debianEmptied, inside)
}
