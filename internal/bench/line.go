package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// firstFD is the first descriptor that a child inherits beside the standard
// streams.
const firstFD = 3

// errLine: QEMU's command line is not one that a hand knows to repeat.
var errLine = fmt.Errorf("%w: QEMU's command line", errStrange)

// line is a command line of QEMU's, taken from one that ran, with what it says
// of the descriptors that come with it.
type line struct {
	argv   []string
	agent  int // the listening sockets
	qmp    int
	tap    int    // of the network card, or 0
	device int    // the device state: the first descriptor that nothing names
	memory string // the file of guest RAM, or ""
}

// lines are the command lines of a fork, of a machine with anonymous memory and
// of a template.
type lines struct{ fork, boot, template line }

// learnQEMU starts one machine of each kind through Tine and reads its command
// line.
func learnQEMU(ctx context.Context, t *tine) (_ monitor, err error) {
	l, err := learnLines(ctx, t)
	if err != nil {
		return nil, err
	}
	return &bareQEMU{dirs: t.dirs, device: t.snap.DevicePath(), lines: l}, nil
}

func learnLines(ctx context.Context, t *tine) (l lines, err error) {
	if l.fork, err = learnFork(ctx, t); err != nil {
		return l, err
	}
	if l.fork.tap != 0 {
		return l, fmt.Errorf("%w: a network card", errLine)
	}
	if !l.fork.waits() {
		return l, fmt.Errorf("%w: a fork without -incoming defer", errLine)
	}
	if l.boot, err = learnStart(ctx, t, ""); err != nil {
		return l, err
	}
	l.template, err = learnStart(ctx, t, filepath.Join(t.dirs.root, ramFile))
	if err == nil && l.template.memory == "" {
		err = fmt.Errorf("%w: a template without a file of memory", errLine)
	}
	return l, err
}

func learnFork(ctx context.Context, t *tine) (l line, err error) {
	m, err := t.raise(ctx, coldFork)
	if err != nil {
		return l, err
	}
	defer func() { err = errors.Join(err, m.end(ctx)) }()
	info, err := t.d.Sandboxes.Get(m.(*forked).id)
	if err != nil {
		return l, err
	}
	return lineOf(ctx, info.PID)
}

func learnStart(ctx context.Context, t *tine, memory string) (l line, err error) {
	m, err := t.startVM(ctx, memory)
	if err != nil {
		return l, err
	}
	defer func() {
		err = errors.Join(err, m.end(ctx))
		if memory != "" {
			err = errors.Join(err, removeIfExists(memory))
		}
	}()
	return lineOf(ctx, m.vm.PID())
}

// maxArgs bounds what is read of a command line: ARG_MAX is 2 MiB.
const maxArgs = 2 << 20

func lineOf(ctx context.Context, pid int) (line, error) {
	argv, err := argsOf(ctx, pid)
	if err != nil {
		return line{}, err
	}
	return parseLine(argv)
}

// argsOf reads the command line of a process. One that has only just been
// started shows none for a moment: exec closes descriptors, which is how its
// parent learns of it, before it has put the arguments in place.
func argsOf(ctx context.Context, pid int) ([]string, error) {
	// One that has died shows none for ever.
	ctx, cancel := context.WithTimeoutCause(ctx, time.Second, fmt.Errorf("%w: process %d shows no command line", errStrange, pid))
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		data, err := readArgs(pid)
		if err != nil {
			return nil, fmt.Errorf("read command line of process %d: %w", pid, err)
		}
		if len(data) > 0 {
			return splitArgs(data), nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func readArgs(pid int) ([]byte, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxArgs))
	return data, errors.Join(err, f.Close())
}

// splitArgs splits what the kernel shows, where a zero ends each argument.
func splitArgs(data []byte) []string {
	var argv []string
	for arg := range bytes.SplitSeq(bytes.TrimSuffix(data, []byte{0}), []byte{0}) {
		argv = append(argv, string(arg))
	}
	return argv
}

// mentionsFD matches an option that names a descriptor.
var mentionsFD = regexp.MustCompile(`(?:^|[,=])fd[=:](\d+)`)

// parseLine finds the descriptors that the command line names: those of the two
// sockets, known by the names of their character devices.
func parseLine(argv []string) (line, error) {
	l := line{argv: argv}
	for i, arg := range argv {
		option := ""
		if i > 0 {
			option = argv[i-1]
		}
		values := properties(arg)
		if option == "-object" && values["id"] == "ram" {
			l.memory = values["mem-path"]
		}
		found := mentionsFD.FindStringSubmatch(arg)
		if found == nil {
			continue
		}
		fd, err := strconv.Atoi(found[1])
		if err != nil || fd < firstFD {
			return line{}, fmt.Errorf("%w: descriptor %s", errLine, found[1])
		}
		switch {
		case option == "-chardev" && values["id"] == "agent" && l.agent == 0:
			l.agent = fd
		case option == "-chardev" && values["id"] == "qmp" && l.qmp == 0:
			l.qmp = fd
		case option == "-netdev" && l.tap == 0:
			l.tap = fd
		default:
			return line{}, fmt.Errorf("%w: %s %s names a descriptor of a purpose unknown", errLine, option, arg)
		}
	}
	if l.agent == 0 || l.qmp == 0 || l.agent == l.qmp || l.tap != 0 && (l.tap == l.agent || l.tap == l.qmp) {
		return line{}, fmt.Errorf("%w: agent, qmp and tap have the descriptors %d, %d and %d", errLine, l.agent, l.qmp, l.tap)
	}
	for l.device = firstFD; l.device == l.agent || l.device == l.qmp || l.device == l.tap; {
		l.device++
	}
	return l, nil
}

// properties reads "kind,name=value,...". Tine's values hold no commas.
func properties(arg string) map[string]string {
	values := map[string]string{}
	for part := range strings.SplitSeq(arg, ",") {
		if name, value, ok := strings.Cut(part, "="); ok {
			values[name] = value
		}
	}
	return values
}

// waits reports whether the machine waits for its device state.
func (l line) waits() bool {
	i := slices.Index(l.argv, "-incoming")
	return i >= 0 && i+1 < len(l.argv) && l.argv[i+1] == "defer"
}

// named returns the command line with another name and, for a template, with
// its memory in another file.
func (l line) named(name, memory string) []string {
	argv := slices.Clone(l.argv)
	for i := 1; i < len(argv); i++ {
		switch {
		case argv[i-1] == "-name":
			argv[i] = name
		case argv[i-1] == "-object" && memory != "" && properties(argv[i])["id"] == "ram":
			argv[i] = strings.Replace(argv[i], "mem-path="+l.memory, "mem-path="+memory, 1)
		}
	}
	return argv
}

// files puts the files where the command line has them, as exec.Cmd.ExtraFiles
// wants them.
func (l line) files(agent, qmp, device, tap *os.File) []*os.File {
	files := make([]*os.File, max(l.agent, l.qmp, l.device, l.tap)-firstFD+1)
	files[l.agent-firstFD] = agent
	files[l.qmp-firstFD] = qmp
	files[l.device-firstFD] = device
	if l.tap != 0 {
		files[l.tap-firstFD] = tap
	}
	return files
}
