package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/progress"
)

// ToolStatus says whether a program that builds need is on this host.
type ToolStatus struct {
	Name    string `json:"name"`
	Path    string `json:"path,omitempty"`
	Package string `json:"package"`
	Why     string `json:"why"`
	Err     error  `json:"-"`
}

type tool struct{ name, pkg, why string }

var (
	toolMkfs       = tool{"mkfs.erofs", "erofs-utils", "writes root filesystems"}
	toolMkfsExt4   = tool{"mkfs.ext4", "e2fsprogs", "formats scratch disks"}
	toolMmdebstrap = tool{"mmdebstrap", "mmdebstrap", "makes Debian systems and fetches Debian's kernel"}
)

// HostTools looks for the programs that builds run. Stored images need none,
// but for templates that are to have a scratch disk.
func HostTools() []ToolStatus {
	var all []ToolStatus
	for _, t := range []tool{toolMkfs, toolMkfsExt4, toolMmdebstrap} {
		path, err := t.find()
		all = append(all, ToolStatus{Name: t.name, Path: path, Package: t.pkg, Why: t.why, Err: err})
	}
	return all
}

func (t tool) find() (string, error) {
	path, err := exec.LookPath(t.name)
	if err != nil {
		if sbin, sbinErr := exec.LookPath("/sbin/" + t.name); sbinErr == nil {
			return sbin, nil // where only root looks
		}
		err = fmt.Errorf("%w: %s (%s): %w", errdef.ErrUnavailable, t.name, t.why, err)
		return "", errdef.WithHint(err, "install the package "+t.pkg)
	}
	return path, nil
}

// The time that a tool gets to clean up after it was told to stop.
const stopGrace = 10 * time.Second

// command prepares a tool. It runs in a process group of its own, is told to
// stop when ctx ends, and when this process dies. What it mounts is gone with
// it: mmdebstrap mounts /sys and /proc below scratch, where leftovers are
// removed with all that is in them.
func (t tool) command(ctx context.Context, scratch string, args ...string) (*exec.Cmd, error) {
	path, err := t.find()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(cmd.Environ(), "LC_ALL=C.UTF-8")
	if os.Geteuid() == 0 {
		// Without root mmdebstrap works as a range of other users, who may not
		// enter a directory of ours.
		cmd.Env = append(cmd.Env, "TMPDIR="+scratch)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if mayMount() {
		cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
	}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGTERM) }
	cmd.WaitDelay = stopGrace
	return cmd, nil
}

// mayMount says whether this process, and so a tool, has the right to mount.
func mayMount() bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData // of 32 capabilities each
	return unix.Capget(&hdr, &data[0]) == nil && data[0].Effective&(1<<unix.CAP_SYS_ADMIN) != 0
}

// tail keeps the last lines of a tool's output, for the error message. Those
// that tell of its progress it gives to report instead.
type tail struct {
	report func(news string)
	part   []byte
	lines  []string
}

const (
	tailLines = 12
	tailWidth = 400
)

// Write takes output as it comes.
func (t *tail) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		line, after, ended := bytes.Cut(rest, []byte("\n"))
		if room := tailWidth - len(t.part); room > 0 {
			t.part = append(t.part, line[:min(room, len(line))]...)
		}
		if rest = after; ended {
			t.endLine()
		}
	}
	return len(p), nil
}

func (t *tail) endLine() {
	line := strings.TrimSpace(string(t.part))
	t.part = t.part[:0]
	if line == "" {
		return
	}
	if news, ok := strings.CutPrefix(line, "I: "); ok {
		if news, ok = strings.CutSuffix(news, "..."); ok && !strings.ContainsAny(news, "/(") {
			t.report(news)
		}
		return
	}
	t.lines = append(t.lines, line)
	if len(t.lines) > tailLines {
		t.lines = t.lines[1:]
	}
}

func (t *tail) String() string {
	t.endLine()
	return strings.Join(t.lines, "\n")
}

// runTool runs a prepared tool, whose work is on what, and gives its output to
// consume if there is one to take it. The thread stays this goroutine's until the tool is gone,
// because a tool's death signal comes when the thread that started it ends.
func runTool(ctx context.Context, cmd *exec.Cmd, what string, consume func(io.Reader) error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	name := filepath.Base(cmd.Path)
	said := &tail{report: func(news string) { progress.Report(ctx, step, what+": "+news) }}
	cmd.Stderr = said
	if consume == nil {
		if err := cmd.Run(); err != nil {
			return toolError(ctx, name, err, said)
		}
		return nil
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("run %s: %w", name, err)
	}
	if err = cmd.Start(); err != nil {
		return fmt.Errorf("run %s: %w", name, err)
	}
	consumed := consume(out)
	if consumed == nil {
		_, consumed = io.Copy(io.Discard, out) // what follows the archive's end
	}
	cutShort := errors.Is(consumed, io.ErrUnexpectedEOF) // by the tool itself
	if consumed != nil && !cutShort {
		_ = cmd.Cancel() // Wait says how it ended
	}
	if err = cmd.Wait(); err != nil && (consumed == nil || cutShort || ctx.Err() != nil) {
		return toolError(ctx, name, err, said)
	}
	return consumed
}

// toolError says how a tool failed, in its own words.
func toolError(ctx context.Context, name string, err error, said *tail) error {
	if ctx.Err() != nil {
		return fmt.Errorf("run %s: %w", name, context.Cause(ctx))
	}
	return &outputError{err: fmt.Errorf("run %s: %w", name, err), output: said.String()}
}

// outputError is the failure of a tool and the last that it said.
type outputError struct {
	err    error
	output string
}

func (e *outputError) Error() string {
	if e.output == "" {
		return e.err.Error()
	}
	return e.err.Error() + ":\n" + e.output
}

func (e *outputError) Unwrap() error { return e.err }

// mmdebstrap makes a tree of Debian packages, for use as what, and gives it to
// consume as an archive.
func mmdebstrap(ctx context.Context, scratch, what string, args []string, suite string, consume func(context.Context, io.Reader) error) error {
	args = append(args,
		"--format=tar", "--architectures=amd64",
		`--aptopt=Acquire::Languages "none"`, "--dpkgopt=force-unsafe-io",
		"--", suite, "-")
	cmd, err := toolMmdebstrap.command(ctx, scratch, args...)
	if err != nil {
		return err
	}
	err = runTool(ctx, cmd, what, func(r io.Reader) error { return consume(ctx, r) })
	return debianError(err)
}

// debianError puts a failure of mmdebstrap in a category: it has one exit
// status for all.
func debianError(err error) error {
	var failed *outputError
	if !errors.As(err, &failed) {
		return err
	}
	for _, sign := range []string{"Unable to locate package", "has no installation candidate", "does not have a Release file"} {
		if strings.Contains(failed.output, sign) {
			err = fmt.Errorf("%w: suite or package: %w", errdef.ErrNotFound, err)
			return errdef.WithHint(err, "check the names in the image's source")
		}
	}
	err = fmt.Errorf("%w: %w", errdef.ErrUnavailable, err)
	if strings.Contains(failed.output, "chroot mode") {
		return errdef.WithHint(err, "apt-get install uidmap, or build the image as root")
	}
	return errdef.WithHint(err, "check that this host can reach Debian's archive")
}

const (
	// rootUUID makes equal trees equal images.
	rootUUID = "74696e65-0000-4000-8000-000000000001"
	// rootAlign is what a size must be a multiple of for an NVDIMM.
	rootAlign = 2 << 20
	// epoch is later than all times in trees, so that mkfs.erofs keeps those
	// and takes this one for the superblock instead of the present.
	epoch = "SOURCE_DATE_EPOCH=4294967295"
)

// makeEROFS writes the tree in dir as an uncompressed EROFS image, of which
// the guest maps every page: compression and tail packing would have it copy
// them. It returns the image's path, in scratch.
func makeEROFS(ctx context.Context, dir, scratch string) (string, error) {
	image := filepath.Join(scratch, "root.erofs")
	args := []string{"--quiet", "-Enoinline_data", "-U", rootUUID}
	if !privileged() {
		args = append(args, "--all-root")
	}
	cmd, err := toolMkfs.command(ctx, scratch, append(args, image, dir)...)
	if err != nil {
		return "", err
	}
	cmd.Env = append(cmd.Env, epoch)
	if err = runTool(ctx, cmd, "root", nil); err != nil {
		return "", err
	}
	return image, padFile(image, rootAlign)
}
