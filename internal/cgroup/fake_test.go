package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// Processes of the fake host. Their numbers are higher than any that Linux
// gives, so that a test that goes wrong signals nobody.
const (
	child    = 2_000_000_001 // of this process
	stranger = 2_000_000_002
	boxed    = 2_000_000_003 // runs in a sandbox
)

// fake is a host whose control groups are ordinary directories. It is the
// kernel of the hierarchies that are opened on it, and keeps the rules that the
// package has to know of.
type fake struct {
	t       *testing.T
	dir     string
	mounts  map[string][]string // controllers by mount point; "v2" for that one
	refuse  map[string]error    // what to answer to changes below a directory
	without []string            // files that this kernel does not have
	cfg     Config

	mu     sync.Mutex
	writes []string // FILE=TEXT, below the group
}

func newFake(t *testing.T) *fake {
	t.Helper()
	f := &fake{t: t, dir: t.TempDir(), mounts: map[string][]string{}, refuse: map[string]error{}}
	f.cfg = Config{
		Root: filepath.Join(f.dir, "cgroup"), Proc: filepath.Join(f.dir, "proc"), Sys: filepath.Join(f.dir, "sys"), Name: "tine",
	}
	f.file("proc/self/mountinfo", "22 1 0:21 / /proc rw - proc proc rw\n")
	f.file("proc/self/cgroup", "")
	f.stat(os.Getpid(), 1)
	f.stat(child, os.Getpid())
	f.stat(stranger, 1)
	return f
}

func (f *fake) stat(pid, parent int) {
	f.file(fmt.Sprintf("proc/%d/stat", pid), fmt.Sprintf("%d (x) y) S %d 1 1", pid, parent))
}

// file appends to a file, which it makes.
func (f *fake) file(name, text string) {
	f.t.Helper()
	path := filepath.Join(f.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		f.t.Fatal(err)
	}
	old, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.t.Fatal(err)
	}
	if err = os.WriteFile(path, append(old, text...), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

// mount mounts a hierarchy with the controllers at cgroup/at. This process is
// in its group own; of it, what is below root can be seen.
func (f *fake) mount(at, root, own string, v2 bool, controllers ...string) {
	f.t.Helper()
	point := filepath.Join(f.cfg.Root, at)
	kind, options, names := "cgroup", strings.Join(controllers, ","), strings.Join(controllers, ",")
	f.mounts[point] = controllers
	if v2 {
		kind, options, names = "cgroup2", "nsdelegate", ""
		f.mounts[point] = []string{"v2"}
	}
	f.file("proc/self/mountinfo", fmt.Sprintf("%d 31 0:29 %s %s rw shared:1 - %s cgroup rw,%s\n", len(f.mounts), root, point, kind, options))
	f.file("proc/self/cgroup", fmt.Sprintf("%d:%s:%s\n", len(f.mounts)*map[bool]int{false: 1}[v2], names, own))
	if err := os.MkdirAll(point, 0o700); err != nil {
		f.t.Fatal(err)
	}
	f.populate(point, controllers)
	f.put(f.descend(point, strings.TrimPrefix(own, root), controllers), "cgroup.procs", strconv.Itoa(os.Getpid())+"\n")
}

// descend makes the groups on a path below point, and returns the last.
func (f *fake) descend(point, path string, controllers []string) string {
	f.t.Helper()
	dir := point
	for part := range strings.FieldsFuncSeq(path, func(r rune) bool { return r == '/' }) {
		if f.v2(point) {
			f.put(dir, "cgroup.subtree_control", strings.Join(controllers, " "))
		}
		dir = filepath.Join(dir, part)
		if err := f.mkdir(dir); err != nil && !errors.Is(err, fs.ErrExist) {
			f.t.Fatal(err)
		}
	}
	return dir
}

func (f *fake) put(dir, name, text string) {
	f.t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

// get reads a file of the fake, below its root; "-" when there is none.
func (f *fake) get(name string) string {
	f.t.Helper()
	data, err := os.ReadFile(filepath.Join(f.cfg.Root, name))
	if errors.Is(err, fs.ErrNotExist) {
		return "-"
	}
	if err != nil {
		f.t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

// point is the mount that a path lies below.
func (f *fake) point(path string) string {
	best := ""
	for p := range f.mounts {
		if within(p, path) && len(p) > len(best) {
			best = p
		}
	}
	return best
}

func (f *fake) v2(path string) bool { return slices.Contains(f.mounts[f.point(path)], "v2") }

// populate makes the files of a new group.
func (f *fake) populate(dir string, controllers []string) {
	f.t.Helper()
	files := map[string]string{"cgroup.procs": ""}
	if f.v2(dir) {
		files["cgroup.controllers"] = strings.Join(controllers, " ")
		files["cgroup.subtree_control"] = ""
		files["cpu.stat"] = "usage_usec 7000000\n"
		if dir != f.point(dir) {
			maps.Copy(files, map[string]string{"cgroup.events": "", "cgroup.kill": "", "cgroup.freeze": "0"})
		}
		f.enabled(dir, controllers, files)
	} else {
		for _, c := range controllers {
			maps.Copy(files, v1Files(c))
		}
	}
	for name, text := range files {
		if !slices.Contains(f.without, name) {
			f.put(dir, name, text)
		}
	}
}

// enabled adds the files that controllers of v2 have in a group.
func (f *fake) enabled(dir string, controllers []string, files map[string]string) {
	if dir == f.point(dir) && !slices.Contains(f.without, "root") {
		return // the root of all groups has none
	}
	for _, c := range controllers {
		maps.Copy(files, map[string]map[string]string{
			"memory": {
				"memory.max": "max", "memory.swap.max": "max", "memory.current": "100\n", "memory.peak": "200\n",
				"memory.stat": "anon 60\nfile 30\n", "memory.events": "oom 2\noom_kill 1\n",
			},
			"cpu":  {"cpu.max": "max 100000", "cpu.stat": "usage_usec 8000000\nthrottled_usec 5000\n"},
			"pids": {"pids.max": "max", "pids.current": "3\n"},
			"io":   {"io.max": "", "io.stat": "8:0 rbytes=10 wbytes=20\n9:0 rbytes=1 wbytes=2\n"},
		}[c])
	}
}

func v1Files(controller string) map[string]string {
	const none = "9223372036854771712"
	return map[string]map[string]string{
		"memory": {
			"memory.limit_in_bytes": none, "memory.memsw.limit_in_bytes": none, "memory.swappiness": "60",
			"memory.use_hierarchy": "0\n", "memory.usage_in_bytes": "100\n", "memory.max_usage_in_bytes": "200\n",
			"memory.stat":        "rss 1\ncache 1\ntotal_rss 60\ntotal_cache 30\n",
			"memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
		},
		"cpu":     {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "-1", "cpu.stat": "nr_throttled 1\nthrottled_time 5000000\n"},
		"cpuacct": {"cpuacct.usage": "8000000000\n"},
		"cpuset":  {"cpuset.cpus": "", "cpuset.mems": ""},
		"pids":    {"pids.max": "max", "pids.current": "3\n"},
		"blkio": {
			"blkio.throttle.read_bps_device": "", "blkio.throttle.write_bps_device": "",
			"blkio.throttle.io_service_bytes":           "8:0 Read 1\n8:0 Write 2\n9:0 Read 1\nTotal 4\n",
			"blkio.throttle.io_service_bytes_recursive": "8:0 Read 10\n8:0 Write 20\n9:0 Read 1\nTotal 31\n",
		},
		"freezer": {"freezer.state": "THAWED"},
	}[controller]
}

func refusal(op, path string, err error) error { return &fs.PathError{Op: op, Path: path, Err: err} }

func (f *fake) refused(op, path string) error {
	for below, err := range f.refuse {
		if within(below, path) {
			return refusal(op, path, err)
		}
	}
	return nil
}

func (f *fake) mkdir(dir string) error {
	if err := f.refused("mkdir", dir); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	controllers := f.mounts[f.point(dir)]
	if f.v2(dir) {
		data, err := os.ReadFile(filepath.Join(filepath.Dir(dir), "cgroup.subtree_control"))
		if err != nil {
			return err
		}
		controllers = strings.Fields(string(data))
	}
	f.populate(dir, controllers)
	if f.get(f.below(dir, summed)) == "0" {
		f.put(dir, summed, f.get(f.below(filepath.Dir(dir), summed))) // it is handed down
	}
	return nil
}

// summed is 1 where a group of v1 counts the memory of those in it as its own.
const summed = "memory.use_hierarchy"

// below is what get calls a file of a directory.
func (f *fake) below(dir, name string) string {
	return strings.TrimPrefix(filepath.Join(dir, name), f.cfg.Root)
}

func (f *fake) rmdir(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return refusal("rmdir", dir, unix.ENOENT)
	}
	procs, err := readPIDs(dir)
	if err != nil {
		return err
	}
	if len(procs) > 0 || slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.IsDir() }) {
		return refusal("rmdir", dir, unix.EBUSY)
	}
	return os.RemoveAll(dir)
}

func (f *fake) write(file, text string) error {
	f.mu.Lock()
	f.writes = append(f.writes, filepath.Base(file)+"="+text)
	f.mu.Unlock()
	if err := f.refused("write", file); err != nil {
		return err
	}
	old, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	dir, name := filepath.Split(file)
	switch name {
	case "cgroup.subtree_control":
		return f.handDown(filepath.Clean(dir), string(old), text)
	case "cgroup.procs":
		return f.move(filepath.Clean(dir), text)
	case "cgroup.kill":
		f.put(dir, "cgroup.procs", "")
	case summed:
		if inside, globErr := filepath.Glob(dir + "*/cgroup.procs"); globErr != nil || len(inside) > 0 {
			return refusal("write", file, errors.Join(globErr, unix.EBUSY))
		}
	case "memory.limit_in_bytes", "memory.memsw.limit_in_bytes":
		if err = swapRule(dir, name, text); err != nil {
			return refusal("write", file, err)
		}
		if text == "-1" {
			text = "9223372036854771712"
		}
	}
	return os.WriteFile(file, []byte(text), 0o600)
}

// handDown is a write to cgroup.subtree_control, of one controller.
func (f *fake) handDown(dir, old, text string) error {
	controller := strings.TrimPrefix(text, "+")
	offered, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	if !slices.Contains(strings.Fields(string(offered)), controller) {
		return refusal("write", dir, unix.ENOENT)
	}
	procs, err := readPIDs(dir)
	if err != nil {
		return err
	}
	if len(procs) > 0 && !isRoot(dir) {
		return refusal("write", dir, unix.EBUSY)
	}
	f.put(dir, "cgroup.subtree_control", strings.TrimSpace(old+" "+controller))
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			below := filepath.Join(dir, e.Name())
			f.put(below, "cgroup.controllers", f.get(f.below(dir, "cgroup.subtree_control")))
			files := map[string]string{}
			f.enabled(below, []string{controller}, files)
			for name, content := range files {
				if !slices.Contains(f.without, name) {
					f.put(below, name, content)
				}
			}
		}
	}
	return err
}

// move puts a process into a group, and takes it out of the one it is in.
func (f *fake) move(dir, pid string) error {
	if f.v2(dir) && f.get(f.below(dir, "cgroup.subtree_control")) != "" && !isRoot(dir) {
		return refusal("write", dir, unix.EBUSY)
	}
	err := filepath.WalkDir(f.point(dir), func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Name() == "cgroup.procs" {
			var data []byte
			data, err = os.ReadFile(path)
			f.put(filepath.Dir(path), "cgroup.procs", strings.ReplaceAll(string(data), pid+"\n", ""))
		}
		return err
	})
	if err != nil {
		return err
	}
	file, err := os.OpenFile(filepath.Join(dir, "cgroup.procs"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = file.WriteString(pid + "\n")
	return errors.Join(err, file.Close())
}

// swapRule is that memory with swap may not be bounded below memory.
func swapRule(dir, name, text string) error {
	limits := map[string]int64{}
	for _, other := range []string{"memory.limit_in_bytes", "memory.memsw.limit_in_bytes"} {
		data, err := os.ReadFile(filepath.Join(dir, other))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil {
			limits[other], err = parseNumber(data)
		}
		if err != nil {
			return err
		}
	}
	limits[name] = 9223372036854771712
	if text != "-1" {
		n, err := parseNumber([]byte(text))
		if err != nil {
			return err
		}
		limits[name] = n
	}
	if limits["memory.limit_in_bytes"] > limits["memory.memsw.limit_in_bytes"] {
		return unix.EINVAL
	}
	return nil
}

// open opens the fake's hierarchy and gives it a disk.
func (f *fake) open() *Hierarchy {
	f.t.Helper()
	h, err := open(f.cfg, f)
	if err != nil {
		f.t.Fatalf("%v (hint: %s)", err, errdef.Hint(err))
	}
	if h.by[blkio] != nil {
		h.device = "8:0"
		delete(h.missing, blkio)
	}
	f.writes = nil
	return h
}

// v1Host has all controllers of v1, some mounted together, and this process in
// the group /box of some.
func v1Host(f *fake) {
	f.mount("cpu,cpuacct", "/", "/", false, "cpu", "cpuacct")
	for _, c := range []string{"memory", "pids"} {
		f.mount(c, "/", "/box", false, c)
	}
	for _, c := range []string{"blkio", "freezer", "devices"} {
		f.mount(c, "/", "/", false, c)
	}
}

// v2Host has all of v2, and this process in the group own.
func v2Host(own string) func(*fake) {
	return func(f *fake) { f.mount(".", "/", own, true, "cpuset", "cpu", "io", "memory", "pids") }
}
