package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/undo"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/process"
)

// Names in a machine's directory.
const (
	controlSocket = "qmp.sock"
	agentSocket   = "agent.sock"
	logFile       = "vmm.log"
)

// pmemAlign is what virtio-pmem wants the size of its image to be a multiple of.
const pmemAlign = 2 << 20

// launcher gathers a command line and the descriptors that go with it.
type launcher struct {
	engine *Engine
	spec   vmm.Common
	args   []string
	image  string              // what guest RAM maps privately, if it does
	disks  []string            // the files of the disk, oldest first
	device string              // the disk itself, if there is one
	gate   *gate               // of a deterministic machine
	bare   bool                // device state comes without configuration
	files  []*os.File          // handed down from Keeper.FirstFile on
	opened []*os.File          // those of files that are ours to close
	names  map[string]*os.File // what QEMU opens by name, ours to close
	cell   *jail.Cell          // where it is to run; nil without a jail
	tap    *os.File            // of its network, the cell's
	link   []*os.File          // the sockets there, the cell's
	links  []int               // and their descriptors in QEMU
}

func newLauncher(e *Engine, spec vmm.Common) *launcher {
	return &launcher{engine: e, spec: spec, names: map[string]*os.File{}}
}

// give hands f down and returns the descriptor it will have in the child.
func (l *launcher) give(f *os.File) int {
	l.files = append(l.files, f)
	return l.engine.keeper.FirstFile() + len(l.files) - 1
}

// open opens a file that QEMU is to open by its name. In the jail it gets what is
// opened here, and can do with it no more than flags say.
func (l *launcher) open(path string, flags int) error {
	if l.engine.keeper.Jail == nil {
		return nil // it has the daemon's rights
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return err
	}
	l.names[path] = f
	return nil
}

// memory makes guest RAM of the file at path, written through; of anonymous
// memory when path is empty.
func (l *launcher) memory(path string) error {
	size := strconv.Itoa(l.spec.Machine.MemoryMiB) + "M"
	if path == "" {
		l.args = append(l.args, "-object", "memory-backend-ram,id=ram,size="+size)
		return nil
	}
	l.args = append(l.args, "-object", "memory-backend-file,id=ram,share=on,size="+size+",mem-path="+path)
	return l.open(path, os.O_RDWR|os.O_CREATE|os.O_EXCL)
}

// mapImage makes guest RAM of the file at path, copied on write.
func (l *launcher) mapImage(path string) (err error) {
	// The kernel names mappings by absolute paths without links, and
	// Memory looks for this one by its name.
	if path, err = filepath.Abs(path); err != nil {
		return err
	}
	if l.image, err = filepath.EvalSymlinks(path); err != nil {
		return err
	}
	if err = checkPath(l.image); err != nil {
		return err
	}
	l.args = append(l.args, "-object",
		fmt.Sprintf("memory-backend-file,id=ram,share=off,size=%dM,mem-path=%s", l.spec.Machine.MemoryMiB, l.image))
	return l.open(l.image, os.O_RDONLY)
}

// incoming hands down the file of device state that load will name.
func (l *launcher) incoming(device string) (fd int, err error) {
	f, err := os.Open(device)
	if err != nil {
		return 0, err
	}
	l.opened = append(l.opened, f)
	if l.bare, err = bareState(f); err != nil {
		return 0, fmt.Errorf("read %s: %w", device, err)
	}
	if l.bare {
		l.args = append(l.args, "-global", "migration.send-configuration=off")
	}
	// QEMU takes over the frozen machine's run state too, so only "cont" makes
	// it run; -S says so.
	l.args = append(l.args, "-S", "-incoming", "defer")
	return l.give(f), nil
}

// launch starts QEMU and returns at once, but for a jailed one, which it waits
// for until that has opened its files: the sockets exist already.
func (l *launcher) launch(ctx context.Context) (_ *machine, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	u.Add(func() error { l.gate.close(); return nil })

	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if l.cell, err = l.engine.keeper.TakeCell(ctx, l.spec.Machine.Net); err != nil {
		return nil, err
	}
	out, err := l.complete()
	if err != nil {
		return nil, errors.Join(err, process.LeaveCell(l.cell))
	}
	p, err := l.engine.keeper.Start(ctx, process.Launch{
		Handle: vmm.Handle{Dir: l.spec.Dir, Memory: l.image, Disk: l.disks, Link: l.links},
		Binary: l.engine.binary, Args: l.args, Cell: l.cell, Output: out, Files: l.files, Opens: l.names,
		FileBytes: l.largestFile(), Limits: l.spec.Limits, DieWithParent: l.spec.DieWithParent,
	})
	l.closeOpened() // also when it has started: a QEMU that dies must not leave its sockets with us
	if err != nil {
		return nil, err
	}
	u.Release() // what comes now is the machine's
	m := &machine{handle: p.Handle(), gate: l.gate}
	m.Process = p.Watch(m.hooks())
	if err = m.settle(ctx, p); err != nil {
		return nil, errors.Join(err, m.Kill(context.WithoutCancel(ctx)))
	}
	return m, nil
}

// complete adds to the command line what depends on the cell, and the files that
// are handed down, and returns the one that takes what QEMU says.
func (l *launcher) complete() (out *os.File, err error) {
	if l.cell != nil && l.spec.Machine.Net {
		l.tap, l.link = l.cell.Link()[0], l.cell.Link()[1:]
	}
	if err = l.machine(); err != nil {
		return nil, err
	}
	for _, lease := range l.spec.Leases {
		l.give(lease)
	}
	for _, f := range l.link {
		l.links = append(l.links, l.give(f))
	}
	if l.engine.keeper.Jail != nil && l.engine.accel == KVM {
		if err = l.open(kvmDevice, os.O_RDWR); err != nil {
			return nil, err
		}
	}
	out, err = os.OpenFile(filepath.Join(l.spec.Dir, logFile), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err == nil {
		l.opened = append(l.opened, out)
	}
	return out, err
}

// machine adds what every machine has. The same list must stand in front of a
// freeze and of its restores, as it determines the layout of device state.
func (l *launcher) machine() error {
	root, err := os.Stat(l.spec.Root)
	if err != nil {
		return err
	}
	if root.Size() == 0 || root.Size()%pmemAlign != 0 {
		return fmt.Errorf("root image %s: size %d is not a multiple of %d", l.spec.Root, root.Size(), pmemAlign)
	}
	if err = l.open(l.spec.Root, os.O_RDONLY); err != nil {
		return err
	}
	control, err := l.listen(controlSocket)
	if err != nil {
		return err
	}
	shape := "pc,hpet=off,vmport=off,usb=off,smm=off,graphics=off,i8042=off,memory-backend=ram"
	if l.bare {
		shape += ",suppress-vmdesc=on" // QEMU would miss the description that such a state lacks
	}
	name := "tine-" + l.spec.ID
	if l.spec.Machine.Deterministic {
		shape += ",nvdimm=on"
		name += ",debug-threads=on" // delayMain finds one by its name
	}
	ram := l.spec.Machine.MemoryMiB
	room := root.Size()>>20 + 1024 // address space for the root image, and its alignment to 1 GiB
	l.args = append(l.args,
		"-name", name,
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-M", shape)
	l.args = append(l.args, l.cpu()...)
	l.args = append(l.args,
		"-smp", strconv.Itoa(l.spec.Machine.VCPUs),
		"-m", fmt.Sprintf("%dM,slots=1,maxmem=%dM", ram, int64(ram)+room),
		"-object", fmt.Sprintf("memory-backend-file,id=root,size=%d,mem-path=%s,share=on,readonly=on", root.Size(), l.spec.Root),
		// A console in a ring keeps the end of what the kernel said, and no
		// guest can fill a disk with it.
		"-chardev", "ringbuf,id=console,size=65536", "-serial", "chardev:console",
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d,server=on,wait=off", control),
		"-mon", "chardev=qmp,mode=control",
	)
	if l.spec.Machine.Deterministic {
		return l.deterministic()
	}
	agent, err := l.listen(agentSocket)
	if err != nil {
		return err
	}
	l.args = append(l.args,
		// virtio-pmem and not nvdimm: only it gives the guest's block device
		// page structures, and with them DAX, so that files are read in place
		// from the host's page cache and take no guest memory.
		"-device", "virtio-pmem-pci,memdev=root",
		"-device", "virtio-serial-pci",
		"-chardev", fmt.Sprintf("socket,id=agent,fd=%d,server=on,wait=off", agent),
		"-device", "virtserialport,chardev=agent,name=tine.agent",
	)
	if l.device != "" {
		l.args = append(l.args, "-device", l.device)
	}
	l.network()
	return nil
}

// listen makes a listening socket in the machine's directory and gives it.
func (l *launcher) listen(name string) (fd int, err error) {
	path := filepath.Join(l.spec.Dir, name)
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return 0, err
	}
	defer func() { _ = ln.Close() }()
	ln.SetUnlinkOnClose(false)
	f, err := ln.File()
	if err != nil {
		return 0, err
	}
	l.opened = append(l.opened, f)
	return l.give(f), nil
}

func (l *launcher) closeOpened() {
	for _, f := range l.opened {
		_ = f.Close() // the child has its own copy
	}
	l.opened = nil
}

// close closes all that is ours.
func (l *launcher) close() {
	l.closeOpened()
	for _, f := range l.names {
		_ = f.Close() // the child has its own copy
	}
}

func (l *launcher) cpu() []string {
	if l.spec.Machine.Deterministic {
		return deterministicCPU(l.spec.Machine.ClockShift)
	}
	if l.engine.accel == KVM {
		return []string{"-accel", "kvm", "-cpu", "host"}
	}
	// 64 MiB hold the translations of any guest that Tine runs; QEMU would
	// reserve up to a gigabyte. Five-level page tables only make emulated page
	// walks longer.
	return []string{"-accel", "tcg,tb-size=64", "-cpu", "max,la57=off"}
}
