package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// search fills in a Hierarchy with what it finds on the host.
type search struct {
	h        *Hierarchy
	cfg      Config
	members  []membership
	denied   bool // something is there, and is not for this user
	occupied bool // other processes are in our group of v2
}

func (s *search) run() error {
	data, err := readFile(filepath.Join(s.cfg.Proc, "self/mountinfo"))
	if err != nil {
		return err
	}
	s.h.mounts = slices.DeleteFunc(parseMounts(data), func(m mount) bool { return !within(s.cfg.Root, m.point) })
	data, err = readFile(filepath.Join(s.cfg.Proc, "self/cgroup"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // without the file the kernel has none
		return err
	}
	if s.members, err = parseMemberships(data); err != nil {
		return err
	}
	for _, c := range []string{memory, cpu, cpuacct, pids, blkio, freezer} {
		if err = s.v1(c); err != nil {
			s.miss(c, err)
		}
	}
	if err = s.v2(); err != nil {
		for _, c := range limiters() {
			if s.h.by[c] == nil && !s.mountedV1(c) {
				s.miss(c, err)
			}
		}
	}
	s.disk()
	return nil
}

// miss notes why a controller cannot be used.
func (s *search) miss(controller string, why error) {
	s.denied = s.denied || errors.Is(why, fs.ErrPermission) || errors.Is(why, unix.EROFS)
	s.h.missing[controller] = why.Error()
}

// reasons says why no limit can be set, each reason once.
func (s *search) reasons() string {
	var order []string
	names := map[string][]string{}
	for _, c := range limiters() {
		why := s.h.missing[c]
		if names[why] == nil {
			order = append(order, why)
		}
		names[why] = append(names[why], v2Name(c))
	}
	for i, why := range order {
		order[i] = strings.Join(names[why], ", ") + ": " + why
	}
	return strings.Join(order, "; ")
}

// verdict is the error of a host where no limit can be set.
func (s *search) verdict() error {
	why := s.reasons()
	switch {
	case len(s.h.mounts) == 0:
		err := fmt.Errorf("%w: no control groups are mounted below %s", errdef.ErrUnsupported, s.cfg.Root)
		return errdef.WithHint(err, "mount -t cgroup2 cgroup2 "+s.cfg.Root)
	case s.denied:
		err := fmt.Errorf("%w: control groups: %s", errdef.ErrDenied, why)
		return errdef.WithHint(err, "run as root or, under cgroup v2, in a group that is delegated: "+
			"systemd-run --user --scope -p Delegate=yes COMMAND")
	case s.occupied:
		err := fmt.Errorf("%w: control groups: %s", errdef.ErrUnsupported, why)
		return errdef.WithHint(err, "run in a group of its own: systemd-run --scope -p Delegate=yes COMMAND, or Delegate=yes in the unit")
	default:
		err := fmt.Errorf("%w: control groups: %s", errdef.ErrUnsupported, why)
		return errdef.WithHint(err, "Delegate=yes in the systemd unit, or boot with cgroup_enable=memory")
	}
}

// mountedV1 reports whether v1 has the controller, so that v2 cannot.
func (s *search) mountedV1(controller string) bool {
	return slices.ContainsFunc(s.h.mounts, func(m mount) bool { return m.has(controller) })
}

var errNotMounted = errors.New("not mounted")

// v1 finds a controller in the hierarchies of v1.
func (s *search) v1(controller string) error {
	base, err := s.base(controller)
	if err != nil {
		return err
	}
	t := s.tree(base, controller)
	if !slices.Contains(s.h.trees, t) {
		if err = s.h.prepare(t); err != nil {
			return err
		}
		s.h.trees = append(s.h.trees, t)
	}
	return s.use(t, controller)
}

// tree returns the tree of the group base, which other controllers may share.
// With "" for a controller it is v2's.
func (s *search) tree(base, controller string) *tree {
	for _, t := range s.h.trees {
		if t.base == base {
			return t
		}
	}
	return &tree{v2: controller == "", key: controller, base: base, parent: filepath.Join(base, s.cfg.Name)}
}

// use takes a controller of t into use if the kernel has all of it.
func (s *search) use(t *tree, controller string) error {
	// One file tells: each can be left out when a kernel is built.
	file := map[string]string{
		memory: "memory.limit_in_bytes", cpu: "cpu.cfs_quota_us", pids: "pids.max",
		blkio: "blkio.throttle.read_bps_device", cpuacct: "cpuacct.usage",
	}[controller]
	if t.v2 {
		file = v2Name(controller) + ".max"
	}
	if file != "" { // the freezer's is only in groups
		if _, err := os.Stat(filepath.Join(t.parent, file)); err != nil {
			return fmt.Errorf("the kernel was built without it: %w", err)
		}
	}
	s.h.by[controller] = t
	t.controllers = append(t.controllers, controller)
	delete(s.h.missing, controller)
	return nil
}

// v2 finds the hierarchy of v2 and, in it, the controllers that v1 does not
// have. Where it has none, it still serves to end the processes of a group.
func (s *search) v2() error {
	base, err := s.base("")
	if err != nil {
		return err
	}
	own := base
	if filepath.Base(base) == s.cfg.Name+"-daemon" {
		base = filepath.Dir(base) // we, or who started us, have been here before
	}
	t := s.tree(base, "")
	data, err := readFile(filepath.Join(base, "cgroup.controllers"))
	if err != nil {
		return err
	}
	offered := strings.Fields(string(data))
	var wanted []string
	for _, c := range limiters() {
		switch {
		case s.mountedV1(c):
		case slices.Contains(offered, v2Name(c)):
			wanted = append(wanted, c)
		default:
			s.miss(c, fmt.Errorf("not among the controllers that %s has", base))
		}
	}
	if len(wanted) > 0 && own == base && !isRoot(base) {
		if err = s.vacate(base); err != nil {
			return err
		}
	}
	if err = s.h.prepare(t); err != nil {
		return err
	}
	s.h.trees = append(s.h.trees, t)
	for _, c := range wanted {
		if err = s.h.enable(t, c); err == nil {
			err = s.use(t, c)
		}
		if err != nil {
			s.miss(c, err)
		}
	}
	return nil
}

// isRoot reports whether dir is the root of all groups, which alone may have
// processes and give its controllers to others. A container's looks like it, by
// its path.
func isRoot(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "cgroup.events"))
	return errors.Is(err, fs.ErrNotExist)
}

// base finds the directory of the group that this process is in, under a
// controller of v1 or, with "", under v2.
func (s *search) base(controller string) (string, error) {
	path, ok := pathUnder(s.members, controller)
	if !ok {
		return "", errNotMounted
	}
	return s.h.directory(controller, path)
}

// pathUnder finds the group that a process is in under a controller of v1 or,
// with "", under v2.
func pathUnder(members []membership, controller string) (path string, ok bool) {
	i := slices.IndexFunc(members, func(m membership) bool { return m.has(controller) })
	if i < 0 {
		return "", false
	}
	return members[i].path, true
}

// directory finds where the group path can be seen, under a controller of v1
// or, with "", under v2.
func (h *Hierarchy) directory(controller, path string) (string, error) {
	err := errNotMounted
	for _, m := range slices.Backward(h.mounts) { // a later one hides what is below it
		if !m.has(controller) {
			continue
		}
		below, ok := relative(m.root, path)
		if dir := filepath.Join(m.point, below); ok {
			if _, err = os.Stat(dir); err == nil {
				return dir, nil
			}
			continue
		}
		err = fmt.Errorf("the group %s is not below that at %s", path, m.point)
	}
	return "", err
}

// relative is path as seen from root. What is outside of this process's
// namespace, and so has dots in front, cannot be told.
func relative(root, path string) (string, bool) {
	if strings.HasPrefix(root, "/..") || strings.HasPrefix(path, "/..") || !within(root, path) {
		return "", false
	}
	return strings.TrimPrefix(path, root), true
}

// within reports whether path is root or lies below it.
func within(root, path string) bool {
	return path == root || strings.HasPrefix(path, strings.TrimSuffix(root, "/")+"/")
}

// vacate moves this process and its children out of the group base, into a
// group of their own. It moves no process of others: these are not ours to move.
func (s *search) vacate(base string) error {
	leaf := filepath.Join(base, s.cfg.Name+"-daemon")
	const rounds = 10 // a process that is moved may have made another meanwhile
	for range rounds {
		all, err := readPIDs(base)
		if err != nil || len(all) == 0 {
			return err
		}
		for _, pid := range all {
			if !s.own(pid) {
				s.occupied = true
				return fmt.Errorf("process %d, which is not ours, is in the group %s too", pid, base)
			}
		}
		if err = s.h.kernel.mkdir(leaf); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		for _, pid := range all {
			err = s.h.kernel.write(filepath.Join(leaf, "cgroup.procs"), strconv.Itoa(pid))
			if err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		}
	}
	return fmt.Errorf("processes in the group %s do not come to rest", base)
}

// own reports whether pid is this process or descends from it, or has ended.
func (s *search) own(pid int) bool {
	const depth = 64
	for range depth {
		if pid == os.Getpid() {
			return true
		}
		if pid <= 1 {
			return false
		}
		data, err := readFile(filepath.Join(s.cfg.Proc, strconv.Itoa(pid), "stat"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			return true
		}
		if pid, err = parseParent(data); err != nil {
			return false
		}
	}
	return false
}

// disk finds the device that input and output are bounded on.
func (s *search) disk() {
	if !s.h.has(blkio) {
		return
	}
	device, err := blockDevice(s.cfg.Sys, s.cfg.Disk)
	if err != nil {
		s.miss(blkio, err)
	}
	s.h.device = device
}

// blockDevice returns the MAJOR:MINOR of the whole disk that path lies on.
func blockDevice(sys, path string) (string, error) {
	if path == "" {
		return "", errors.New("no disk was named")
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	major, minor := unix.Major(st.Dev), unix.Minor(st.Dev)
	if major == 0 {
		return "", fmt.Errorf("%s is on a filesystem without a block device of its own, such as tmpfs, overlay or btrfs", path)
	}
	return wholeDisk(sys, fmt.Sprintf("%d:%d", major, minor))
}

// wholeDisk returns the disk that device is a partition of, or device itself:
// the kernel bounds disks only.
func wholeDisk(sys, device string) (string, error) {
	dir, err := filepath.EvalSymlinks(filepath.Join(sys, "dev/block", device))
	if err != nil {
		return "", err
	}
	if _, err = os.Stat(filepath.Join(dir, "partition")); errors.Is(err, fs.ErrNotExist) {
		return device, nil
	}
	data, err := readFile(filepath.Join(filepath.Dir(dir), "dev"))
	if err != nil {
		return "", err
	}
	return parseDevice(data)
}
