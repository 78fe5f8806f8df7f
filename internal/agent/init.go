package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The kernel's command line words that concern the agent.
const (
	optLink    = "tine.link"    // virtio-serial (default) or vsock
	optRoot    = "tine.root"    // the root device, default /dev/pmem0
	optDisk    = "tine.disk"    // the scratch disk that takes what is written, if there is one
	optUpper   = "tine.upper"   // without a disk: the overlay's size as tmpfs takes it, default 50%: a full one is an error, not the end of a process
	optReserve = "tine.reserve" // MiB of memory kept from processes, default 24
	optMode    = "tine.mode"    // deterministic: the host is spoken to through the mailbox alone
	optMailbox = "tine.mailbox" // the guest-physical address of the mailbox
	optPIDs    = "tine.pids"    // processes and threads at most, default by memory
	optNet     = "tine.net"     // the network card's addresses, if there is one: see parseNet
)

const (
	childrenCgroup = "/sys/fs/cgroup/tine.slice"
	envFile        = "/etc/tine/env" // the image's own environment, NAME=value lines
	deviceTime     = 20 * time.Second
	maxCmdline     = 64 << 10
	maxEnvFile     = 256 << 10
)

// RunInit is the life of PID 1: it brings the machine up and serves the host
// until ctx ends. It returns only when something without which the machine is
// useless does not work.
func RunInit(ctx context.Context, log *slog.Logger) error {
	outliveSignals()
	b := boot{log: log}
	if err := b.up(); err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	a := New(Config{Log: log, Env: b.environment(), Upper: b.upper, card: b.card})
	defer a.Close()
	if b.deterministic() {
		return a.serveDeterministic(&b)
	}
	if b.vsock() {
		return a.serveVsock(ctx)
	}
	port, err := openPort(deviceTime)
	if err != nil {
		return err
	}
	return a.Serve(ctx, port)
}

// outliveSignals keeps the machine's processes from ending PID 1. The kernel
// shields it from signals without a handler, but Go's runtime has one for each.
// They are caught and dropped, not ignored: children would inherit that.
func outliveSignals() {
	dropped := make(chan os.Signal, 1)
	signal.Notify(dropped, unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGILL, unix.SIGTRAP, unix.SIGABRT,
		unix.SIGBUS, unix.SIGFPE, unix.SIGSEGV, unix.SIGTERM, unix.SIGSTKFLT, unix.SIGSYS)
}

// boot is the machine on its way up.
type boot struct {
	log     *slog.Logger
	cmdline []string
	upper   *os.File // see Config.Upper; nil if it could not be had
	card    *card    // nil if there is none
}

// up goes from the initramfs to a machine whose root is the image.
func (b *boot) up() error {
	unix.Umask(0o022)
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"mount kernel file systems", b.mountKernel},
		{"read command line", b.readCmdline},
		{"load modules", b.loadModules},
		{"mount root", b.mountRoot},
		{"keep overlay", b.keepUpper},
		{"empty initramfs", b.emptyInitramfs},
		{"enter root", b.enterRoot},
		{"mount run-time file systems", b.mountRuntime},
		{"limit processes", b.limitProcesses},
		{"name machine", b.nameMachine},
		{"bring loopback up", b.loopback},
		{"bring network up", b.network},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	return nil
}

// mount mounts a file system on a directory that it makes.
func mount(source, target, kind string, flags uintptr, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		return &os.PathError{Op: "mount " + kind, Path: target, Err: err}
	}
	return nil
}

const hardened = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

func (b *boot) mountKernel() error {
	return errors.Join(
		mount("proc", "/proc", "proc", hardened, ""),
		mount("sysfs", "/sys", "sysfs", hardened, ""),
		mount("devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"),
	)
}

func (b *boot) readCmdline() error {
	text, err := readSmall("/proc/cmdline", maxCmdline)
	b.cmdline = strings.Fields(string(text))
	return err
}

func (b *boot) deterministic() bool { return b.option(optMode, "") == "deterministic" }

// vsock: the machine's devices are on virtio-mmio, and the host speaks on vsock.
func (b *boot) vsock() bool { return b.option(optLink, "virtio-serial") == "vsock" }

func (b *boot) root() string { return b.option(optRoot, "/dev/pmem0") }

func (b *boot) option(name, otherwise string) string {
	for _, word := range b.cmdline {
		if v, ok := strings.CutPrefix(word, name+"="); ok && v != "" {
			return v
		}
	}
	return otherwise
}

// number is an option that must be a number; one that is not is as if absent.
func (b *boot) number(name string, otherwise int) int {
	if n, err := strconv.Atoi(b.option(name, "")); err == nil && n > 0 {
		return n
	}
	return otherwise
}

// loadModules loads what every machine needs, and what this one does.
func (b *boot) loadModules() error {
	errs := []error{b.loadList("/modules/order")}
	for _, feature := range b.features() {
		errs = append(errs, b.loadList("/modules/order.d/"+feature))
	}
	return errors.Join(errs...)
}

// features are what the machine has beyond what all have, in the order in which
// to load what they need: the bus comes before the devices on it.
func (b *boot) features() []string {
	var all []string
	if b.vsock() {
		all = append(all, "mmio", "rng", "vsock")
	}
	disk := b.option(optDisk, "") != ""
	if disk || strings.HasPrefix(b.root(), "/dev/vd") {
		all = append(all, "blk")
	}
	if disk {
		all = append(all, "ext4")
	}
	if b.option(optNet, "") != "" {
		all = append(all, "net")
	}
	if b.deterministic() {
		all = append(all, "e820") // its root is memory to the kernel
	}
	return all
}

// loadList loads the modules that a file lists. A module that does not load may
// be built in, or for another machine; what is really missing shows later.
func (b *boot) loadList(path string) error {
	list, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for line := range strings.Lines(string(list)) {
		module := strings.TrimSpace(line)
		if module == "" {
			continue
		}
		if merr := loadModule(filepath.Join("/modules", strings.TrimPrefix(module, "/modules/"))); merr != nil {
			b.log.Warn("load module", "path", module, "error", merr)
		}
	}
	return err
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // only read from
	flags := 0
	if !strings.HasSuffix(path, ".ko") {
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	err = unix.FinitModule(int(f.Fd()), "", flags)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

// mountRoot mounts the image, read only, and over it an overlay for what is
// written.
func (b *boot) mountRoot() error {
	device := b.root()
	if err := waitForDevice(device); err != nil {
		return err
	}
	if err := mountImage(device, "/lower"); err != nil {
		return err
	}
	options, err := b.mountUpper("/upper")
	if err != nil {
		return err
	}
	for _, dir := range []string{"/upper/upper", "/upper/work"} {
		if err = os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	return mount("tine", "/newroot", "overlay", 0, "lowerdir=/lower,upperdir=/upper/upper,workdir=/upper/work"+options)
}

// mountUpper mounts what holds all that is written: the scratch disk, or else
// memory. It returns what the overlay is to be told of it.
//
// The disk and the machine's memory are frozen at one instant, and are lost at
// one. So nothing need ever be brought from one to the other for safety: not by
// barriers, and not when a program asks for it, which makes many a program
// quicker. The kernel does so in its own time, to have memory free.
func (b *boot) mountUpper(target string) (options string, err error) {
	disk := b.option(optDisk, "")
	if disk == "" {
		return "", mount("tmpfs", target, "tmpfs", 0, "mode=0755,size="+b.option(optUpper, "50%"))
	}
	if err = waitForDevice(disk); err != nil {
		return "", err
	}
	return ",volatile", mount(disk, target, "ext4", unix.MS_NOATIME, "nobarrier,noinit_itable")
}

func waitForDevice(path string) error {
	return waitFor(path, deviceTime, func() bool {
		_, err := os.Stat(path)
		return err == nil
	})
}

// keepUpper keeps a view of the overlay's upper directory, to which no path
// leads once the root is entered: read-only and mounted nowhere, so that
// nobody finds it by chance or harms the overlay through it. Without it the
// machine is as good, but cannot tell what it has changed.
func (b *boot) keepUpper() error {
	const path = "/upper/upper"
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		b.log.Warn("keep overlay", "error", os.NewSyscallError("open_tree", err))
		return nil
	}
	b.upper = os.NewFile(uintptr(fd), path)
	err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{
		Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC,
	})
	if err != nil {
		b.log.Warn("keep overlay", "error", os.NewSyscallError("mount_setattr", err))
	}
	return nil
}

// mountImage tries the kinds of image there are; with dax, file pages are the
// device's own and take no memory of the guest's.
func mountImage(device, target string) error {
	var failed error
	for _, try := range []struct{ kind, data string }{
		{"erofs", "dax=always"},
		{"erofs", ""},
		{"ext4", "dax=always,noload"},
		{"ext4", "noload"},
		{"squashfs", ""},
	} {
		err := mount(device, target, try.kind, unix.MS_RDONLY|unix.MS_NOATIME, try.data)
		if err == nil {
			return nil
		}
		failed = errors.Join(failed, err)
	}
	return failed
}

// emptyInitramfs gives the memory of the initramfs's files back.
func (b *boot) emptyInitramfs() error {
	var fs unix.Statfs_t
	if err := unix.Statfs("/", &fs); err != nil {
		return err
	}
	if fs.Type != unix.RAMFS_MAGIC && fs.Type != unix.TMPFS_MAGIC {
		return nil
	}
	entries, err := os.ReadDir("/")
	if err != nil {
		return err
	}
	for _, e := range entries {
		switch e.Name() {
		case "proc", "sys", "dev", "lower", "upper", "newroot":
		default:
			err = errors.Join(err, os.RemoveAll("/"+e.Name()))
		}
	}
	return err
}

// enterRoot makes the overlay the root, in the way that an initramfs needs: it
// cannot be pivoted away from, only covered.
func (b *boot) enterRoot() error {
	for _, dir := range []string{"proc", "sys", "dev"} {
		target := "/newroot/" + dir
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("/"+dir, target, "", unix.MS_MOVE, ""); err != nil {
			return &os.PathError{Op: "move mount to", Path: target, Err: err}
		}
	}
	if err := unix.Chdir("/newroot"); err != nil {
		return os.NewSyscallError("chdir", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return os.NewSyscallError("move mount to /", err)
	}
	if err := unix.Chroot("."); err != nil {
		return os.NewSyscallError("chroot", err)
	}
	return os.NewSyscallError("chdir", unix.Chdir("/"))
}

func (b *boot) mountRuntime() error {
	err := errors.Join(
		mount("devpts", "/dev/pts", "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"),
		mount("tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"),
		mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"),
		mount("cgroup2", "/sys/fs/cgroup", "cgroup2", hardened, ""),
		os.MkdirAll(runDir, 0o755),
		os.MkdirAll("/tmp", 0o777),
		os.Chmod("/tmp", 0o777|os.ModeSticky),
	)
	for name, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		if lerr := os.Symlink(target, "/dev/"+name); !errors.Is(lerr, os.ErrExist) {
			err = errors.Join(err, lerr)
		}
	}
	return err
}

// limitProcesses makes the cgroup of the agent's children: whatever they do,
// the agent can still run, has memory, and gets its share of the processor,
// because to the scheduler all of them together are one.
func (b *boot) limitProcesses() error {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return os.NewSyscallError("sysinfo", err)
	}
	// What is free now is all that they could use; the kernel's own is not.
	free := int64(info.Freeram) * int64(info.Unit)
	memory := max(free-int64(b.number(optReserve, 24))<<20, free/2)
	// More processes than there is memory for would keep the kernel busy with
	// making room and nothing else.
	const perProcess, fewest, most = 512 << 10, 256, 4096
	pids := int(min(max(memory/perProcess, fewest), most))
	if err := os.Mkdir(childrenCgroup, 0o755); err != nil {
		return err
	}
	for _, set := range []struct{ file, value string }{
		{"/sys/fs/cgroup/cgroup.subtree_control", "+cpu +pids +memory"},
		// A list of all processes on the console at each kill takes seconds.
		{"/proc/sys/vm/oom_dump_tasks", "0"},
		{childrenCgroup + "/pids.max", strconv.Itoa(b.number(optPIDs, pids))},
		{childrenCgroup + "/memory.max", strconv.FormatInt(memory, 10)},
	} {
		if err := writeControl(set.file, set.value); err != nil {
			// A kernel without the controller has a less safe agent, no more.
			b.log.Warn("limit processes", "error", err)
		}
	}
	return nil
}

// writeControl writes to a file of the kernel's in one write.
func writeControl(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// nameMachine writes what every fork will write again, so that its files are
// in memory already, and lays a file over the kernel's boot id, which cannot
// be set.
func (b *boot) nameMachine() error {
	const name = "tine"
	bootID, err := readSmall("/proc/sys/kernel/random/boot_id", 64)
	if err != nil {
		return err
	}
	own := newOwnFiles("")
	defer own.close()
	err = errors.Join(
		os.NewSyscallError("sethostname", unix.Sethostname([]byte(name))),
		own.put("/etc/hostname", name+"\n"),
		own.put("/etc/hosts", hostsFile(name)),
		own.put("/etc/machine-id", string(bytes.ReplaceAll(bootID, []byte("-"), nil))),
		own.put(bootIDFile, string(bootID)),
		own.put(generationFile, "0\n"),
		os.MkdirAll(forkHookDir, 0o755), // to look it up is cheap then
	)
	if err != nil {
		return err
	}
	err = unix.Mount(bootIDFile, "/proc/sys/kernel/random/boot_id", "", unix.MS_BIND, "")
	return os.NewSyscallError("bind boot_id", err)
}

func (b *boot) loopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd) //nolint:errcheck // a socket that carried nothing
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return os.NewSyscallError("ioctl SIOCSIFFLAGS", unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo))
}

// environment is what the image wants in every process's environment.
func (b *boot) environment() []string {
	text, err := readSmall(envFile, maxEnvFile)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		b.log.Warn("read image environment", "error", err)
	}
	var env []string
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if name, _, ok := strings.Cut(line, "="); ok && name != "" && !strings.HasPrefix(line, "#") {
			env = append(env, line)
		}
	}
	return env
}

// waitFor waits until ready, looking whenever the kernel tells of a device.
func waitFor(what string, limit time.Duration, ready func() bool) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd) //nolint:errcheck // only read from
	if err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		return os.NewSyscallError("bind", err)
	}
	// Not every change is told, so it looks every now and then as well.
	pause := unix.NsecToTimeval(int64(20 * time.Millisecond))
	if err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &pause); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	end := time.Now().Add(limit)
	event := make([]byte, 8<<10)
	for !ready() {
		if time.Now().After(end) {
			return fmt.Errorf("%s is not there after %s", what, limit)
		}
		_, _ = unix.Read(fd, event) // an event or the pause: look again
	}
	return nil
}

// portName is the name of the virtio console port that the host speaks on.
const portName = "tine.agent"

// port is a virtio console port. Reads wait while no host is connected; writes
// do not, as those who write have more to do than to wait for a host.
type port struct {
	*os.File
	raw  syscall.RawConn
	gone bool // it was said that the host is gone
}

// openPort waits for the port and opens it.
func openPort(limit time.Duration) (*port, error) {
	var device string
	err := waitFor("port "+portName, limit, func() bool {
		device = findPort("/sys/class/virtio-ports")
		return device != ""
	})
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(device, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &port{File: f, raw: raw}, nil
}

func findPort(class string) string {
	names, _ := filepath.Glob(class + "/*/name")
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil || strings.TrimSpace(string(text)) != portName {
			continue
		}
		device := "/dev/" + filepath.Base(filepath.Dir(name))
		if _, err = os.Stat(device); err == nil {
			return device
		}
	}
	return ""
}

// goneGrace is how long a port may be without a host before it is said. News of
// a new host can come later than its first bytes.
const goneGrace = 200 * time.Millisecond

// Read reads what the host sent. When the host has gone away it returns
// errHostGone, once, and then waits for another.
func (p *port) Read(b []byte) (int, error) {
	n, err := p.wait(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		p.gone = true
		err = errHostGone
	}
	if n > 0 {
		p.gone = false
	}
	return n, errors.Join(err, p.SetReadDeadline(time.Time{}))
}

// wait waits for bytes. Without a host the kernel returns 0 bytes at once; the
// next event is then a new host, which ends the wait for goneGrace.
func (p *port) wait(b []byte) (n int, err error) {
	var rerr error
	waiting := false
	err = p.raw.Read(func(fd uintptr) bool {
		n, rerr = unix.Read(int(fd), b)
		switch {
		case n > 0:
			return true
		case errors.Is(rerr, unix.EAGAIN) && waiting:
			waiting = false
			_ = p.SetReadDeadline(time.Time{}) // the file was made for deadlines
		case rerr == nil && !waiting && !p.gone:
			waiting = true
			_ = p.SetReadDeadline(time.Now().Add(goneGrace))
		}
		return rerr != nil && !errors.Is(rerr, unix.EAGAIN) && !errors.Is(rerr, unix.EINTR)
	})
	if err == nil && rerr != nil {
		err = os.NewSyscallError("read", rerr)
	}
	return max(n, 0), err
}

// Write writes all of b. When there is no host to take it, it gives up with
// errHostGone: else a process would stand still because of the output that it
// had for a host that is gone. The next session begins with a delimiter, which
// ends what was written in part.
func (p *port) Write(b []byte) (int, error) {
	sent, waiting := 0, false
	var werr error
	err := p.raw.Write(func(fd uintptr) bool {
		for sent < len(b) {
			var n int
			n, werr = unix.Write(int(fd), b[sent:])
			sent += max(n, 0)
			if errors.Is(werr, unix.EAGAIN) {
				waiting = p.patience(int(fd), waiting)
				return false
			}
			if werr != nil && !errors.Is(werr, unix.EINTR) {
				return true
			}
		}
		werr = nil
		return true
	})
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = errHostGone
	case err == nil && werr != nil:
		err = os.NewSyscallError("write", werr)
	}
	if waiting {
		err = errors.Join(err, p.SetWriteDeadline(time.Time{}))
	}
	return sent, err
}

// patience bounds the wait of a write while there is no host, and lifts the
// bound when there is one. It returns whether there is a bound now.
func (p *port) patience(fd int, waiting bool) bool {
	fds := []unix.PollFd{{Fd: int32(fd)}}
	_, err := unix.Poll(fds, 0)
	gone := err == nil && fds[0].Revents&unix.POLLHUP != 0
	switch {
	case gone && !waiting:
		_ = p.SetWriteDeadline(time.Now().Add(goneGrace)) // the file was made for deadlines
	case !gone && waiting:
		_ = p.SetWriteDeadline(time.Time{})
	}
	return gone
}
