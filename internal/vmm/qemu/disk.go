package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// A scratch disk is a chain of files: a raw one at the bottom, and overlays.
// QEMU calls those that a machine was restored from base-0, base-1 and so on;
// they are Handle.Disk. What it has made since is top-0, top-1 and so on, in its
// own directory. Which are in use, and in which order, QEMU itself says, so that
// a later process need not know; where they are, it is not asked.
const (
	basePrefix = "base-"
	topPrefix  = "top-"
	diskPrefix = "disk." // and the number: a file in the machine's directory
)

// How long chains get. Each file costs QEMU a look at what it holds.
const (
	maxOwnDisks = 16 // made in the life of one machine
	maxDisks    = 48 // in all
)

// disk gives the machine a disk whose files are given, oldest first; frozen
// ones are below a new overlay.
func (l *launcher) disk(files []string, frozen bool) error {
	size := int64(l.spec.Machine.DiskMiB) * bytesPerMiB
	if (size > 0) != (len(files) > 0) {
		return fmt.Errorf("%w: %d files for a disk of %d MiB", errdef.ErrInvalid, len(files), l.spec.Machine.DiskMiB)
	}
	if size == 0 {
		return nil
	}
	below := ""
	for i, file := range files {
		path, err := filepath.Abs(file)
		if err == nil {
			err = checkDisk(path, i, size)
		}
		if err != nil {
			return err
		}
		l.disks = append(l.disks, path)
		node := basePrefix + strconv.Itoa(i)
		if err = l.blockdev(node, path, below, frozen); err != nil {
			return err
		}
		below = node
	}
	if frozen {
		path, node := topFile(l.spec.Dir, 0), topPrefix+"0"
		if err := createOverlay(path, size); err != nil {
			return err
		}
		if err := l.blockdev(node, path, below, false); err != nil {
			return err
		}
		below = node
	}
	// A full host is the guest's error, and not a reason to stop its machine.
	l.device = "virtio-blk-pci,id=disk,drive=" + below + ",num-queues=1,discard=off,werror=report,rerror=report"
	return nil
}

func checkDisk(path string, i int, size int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // only read
	if i > 0 {
		err = checkOverlay(f, size)
	} else if info, statErr := f.Stat(); statErr != nil || info.Size() != size {
		err = errors.Join(fmt.Errorf("%w: not the raw file of a disk of %d bytes", errdef.ErrInvalid, size), statErr)
	}
	if err != nil {
		return fmt.Errorf("disk %s: %w", path, err)
	}
	return nil
}

func (l *launcher) blockdev(name, path, below string, readOnly bool) error {
	if l.engine.keeper.Jail != nil {
		set := diskSet(name)
		files, err := openDisk(path, readOnly)
		if err != nil {
			return err
		}
		l.opened = append(l.opened, files...)
		for _, f := range files {
			l.args = append(l.args, "-add-fd", fmt.Sprintf("fd=%d,set=%d", l.give(f), set))
		}
		path = setPath(set)
	}
	text, err := json.Marshal(diskNode(name, path, below, readOnly))
	l.args = append(l.args, "-blockdev", string(text))
	return err
}

// diskSet is the number of the set of descriptors that a node's file is in. In
// the jail QEMU opens no file of a disk by its path.
func diskSet(node string) int {
	if n, ok := number(node, topPrefix); ok {
		return firstTopSet + n
	}
	n, _ := number(node, basePrefix)
	return firstBaseSet + n
}

// The numbers of sets, above those that QEMU chooses itself.
const (
	firstBaseSet = 1 << 16
	firstTopSet  = 1 << 20
)

func setPath(set int) string { return "/dev/fdset/" + strconv.Itoa(set) }

// openDisk opens a file of a disk in each of the ways that QEMU may ask for: it
// takes the descriptor of a set that was opened as it wants to open it.
func openDisk(path string, readOnly bool) (files []*os.File, err error) {
	f, err := os.Open(path)
	if err != nil || readOnly {
		return []*os.File{f}, err
	}
	w, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return []*os.File{f, w}, nil
}

// addDisk gives a jailed QEMU the file of a node that it is to get, and returns
// the name to open it by.
func (m *machine) addDisk(ctx context.Context, control *monitor, node, path string) (_ string, err error) {
	if !m.handle.Jailed {
		return path, nil
	}
	files, err := openDisk(path, false)
	if err != nil {
		return "", err
	}
	set := diskSet(node)
	for _, f := range files {
		err = errors.Join(err, control.addFileTo(ctx, set, f), f.Close())
	}
	return setPath(set), err
}

// dropDisk takes it away again.
func (m *machine) dropDisk(ctx context.Context, control *monitor, node string) error {
	if !m.handle.Jailed {
		return nil
	}
	drop := command{Execute: "remove-fd", Arguments: map[string]any{"fdset-id": diskSet(node)}}
	if _, err := control.execute(ctx, drop); err != nil {
		return m.Ended(err)
	}
	return nil
}

// diskNode is the node of one file. Each says what it is and what is below, so
// that QEMU guesses nothing and follows no name in a file. It takes no locks:
// no two machines write to one file, but a copy-on-write twin of a QEMU holds
// the locks of files that are frozen by now. And it has nothing brought to the
// host's disk for the guest: a power cut ends the machine too.
func diskNode(name, path, below string, readOnly bool) map[string]any {
	node := map[string]any{
		"node-name": name, "driver": "qcow2", "read-only": readOnly,
		"cache": map[string]any{"no-flush": true},
		"file":  map[string]any{"driver": "file", "filename": path, "locking": "off"},
	}
	switch {
	case strings.HasSuffix(name, "-0") && strings.HasPrefix(name, basePrefix):
		node["driver"] = "raw"
	case below == "":
		node["backing"] = nil
	default:
		node["backing"] = below
	}
	return node
}

func topFile(dir string, n int) string { return filepath.Join(dir, diskPrefix+strconv.Itoa(n)) }

// diskFile is where the file of a node is.
func diskFile(h vmm.Handle, node string) (string, error) {
	if n, ok := number(node, topPrefix); ok {
		return topFile(h.Dir, n), nil
	}
	if n, ok := number(node, basePrefix); ok && n < len(h.Disk) {
		return h.Disk[n], nil
	}
	return "", fmt.Errorf("%w: QEMU has a disk %q", errdef.ErrUnavailable, node)
}

func number(node, prefix string) (n int, ok bool) {
	digits, ok := strings.CutPrefix(node, prefix)
	n, err := strconv.Atoi(digits)
	return n, ok && err == nil && n >= 0
}

// FreezeDisk puts an empty overlay on the disk, unless there is one already,
// and returns the files below. If it fails half-way it may leave an overlay that
// is not in use, for the next time.
func (m *machine) FreezeDisk(ctx context.Context) ([]string, error) {
	m.diskMu.Lock()
	defer m.diskMu.Unlock()
	files, err := m.freezeDisk(ctx)
	if err != nil {
		return nil, fmt.Errorf("freeze disk: %w", err)
	}
	return files, nil
}

func (m *machine) freezeDisk(ctx context.Context) ([]string, error) {
	paused, err := m.Paused(ctx)
	switch {
	case err != nil:
		return nil, err
	case !paused:
		return nil, fmt.Errorf("%w: the machine is not paused", errdef.ErrConflict)
	case len(m.handle.Disk) == 0:
		return nil, nil
	case m.handle.Memory == "":
		return nil, fmt.Errorf("%w: the machine was not restored", errdef.ErrUnsupported)
	}
	g, control, err := m.diskGraph(ctx)
	if err != nil {
		return nil, err
	}
	files := make([]string, len(g.chain))
	for i, node := range g.chain {
		if files[i], err = diskFile(m.handle, node); err != nil {
			return nil, err
		}
	}
	last := len(files) - 1
	top, err := os.Stat(files[last])
	if err != nil {
		return nil, err
	}
	raw, err := os.Stat(files[0])
	if err != nil {
		return nil, err
	}
	if top.Size() == emptyOverlay(raw.Size()) {
		return files[:last], nil // a paused QEMU holds nothing back
	}
	if g.spare == "" {
		if g.spare, err = m.addSpare(ctx, control, g); err != nil {
			return nil, err
		}
	}
	cover := command{Execute: "blockdev-snapshot", Arguments: map[string]any{"node": g.chain[last], "overlay": g.spare}}
	if _, err = control.execute(ctx, cover); err != nil {
		return nil, m.Ended(err)
	}
	return files, nil
}

// addSpare makes an overlay that is to be put on the disk, and is not yet.
func (m *machine) addSpare(ctx context.Context, control *monitor, g graph) (node string, err error) {
	raw, err := os.Stat(m.handle.Disk[0])
	if err != nil {
		return "", err
	}
	node, path := topPrefix+strconv.Itoa(g.next), topFile(m.handle.Dir, g.next)
	if err = removeIfExists(path); err != nil { // no node has it
		return "", err
	}
	if err = createOverlay(path, raw.Size()); err != nil {
		return "", err
	}
	name, err := m.addDisk(ctx, control, node, path)
	if err != nil {
		return "", m.Ended(err)
	}
	add := command{Execute: "blockdev-add", Arguments: diskNode(node, name, "", false)}
	if _, err = control.execute(ctx, add); err != nil {
		return "", m.Ended(err)
	}
	return node, nil
}

// PrepareDisk joins what was frozen in the machine's life when there is much of
// it: QEMU copies it into the overlay that is in use. And it makes the overlay
// that FreezeDisk will put on the disk.
func (m *machine) PrepareDisk(ctx context.Context) error {
	if len(m.handle.Disk) == 0 || m.handle.Memory == "" {
		return nil
	}
	m.diskMu.Lock()
	defer m.diskMu.Unlock()
	if err := m.prepareDisk(ctx); err != nil {
		return fmt.Errorf("prepare disk: %w", err)
	}
	return nil
}

func (m *machine) prepareDisk(ctx context.Context) error {
	g, control, err := m.diskGraph(ctx)
	if err != nil {
		return err
	}
	if own := len(g.chain) - g.bases; own > maxOwnDisks || len(g.chain) > maxDisks {
		if err = m.join(ctx, control, g); err != nil {
			return err
		}
		if g, control, err = m.diskGraph(ctx); err != nil {
			return err
		}
	}
	if err = m.sweep(ctx, control, g); err != nil || g.spare != "" {
		return err
	}
	_, err = m.addSpare(ctx, control, g)
	return err
}

// sweep removes what this machine has made and needs no more, newest first, as
// each may be below the next.
func (m *machine) sweep(ctx context.Context, control *monitor, g graph) error {
	for _, node := range g.unused {
		remove := command{Execute: "blockdev-del", Arguments: map[string]any{"node-name": node}}
		if _, err := control.execute(ctx, remove); err != nil {
			return m.Ended(err)
		}
		if err := m.dropDisk(ctx, control, node); err != nil {
			return err
		}
		if n, ok := number(node, topPrefix); ok {
			if err := removeIfExists(topFile(m.handle.Dir, n)); err != nil {
				return err
			}
		}
	}
	return nil
}

// joinJob is QEMU's name for the work of join.
const joinJob = "join"

// join has QEMU copy into the overlay in use what is in those below it: in this
// machine's own, and if that would leave the chain long still, in all.
func (m *machine) join(ctx context.Context, control *monitor, g graph) error {
	base := g.bases - 1
	if g.bases > maxDisks/2 {
		base = 0
	}
	start := command{Execute: "block-stream", Arguments: map[string]any{
		"job-id": joinJob, "device": g.chain[len(g.chain)-1], "base-node": g.chain[base],
		"backing-file": "", "auto-dismiss": false,
	}}
	if _, err := control.execute(ctx, start); err != nil {
		return m.Ended(err)
	}
	err := m.waitJoin(ctx, control)
	if ctx.Err() != nil {
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		stop := command{Execute: "job-cancel", Arguments: map[string]any{"id": joinJob}}
		_, stopErr := control.execute(late, stop)
		err = errors.Join(err, stopErr, m.waitJoin(late, control))
	}
	return err
}

// waitJoin waits until the work of join has ended, and has QEMU forget it.
func (m *machine) waitJoin(ctx context.Context, control *monitor) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		var jobs []struct {
			ID     string `json:"id"`
			Status string `json:"status"`
			Error  string `json:"error"`
		}
		if err := control.query(ctx, "query-jobs", &jobs); err != nil {
			return m.Ended(err)
		}
		if len(jobs) != 1 || jobs[0].ID != joinJob {
			return fmt.Errorf("QEMU has jobs %+v", jobs)
		}
		if jobs[0].Status == "concluded" {
			forget := command{Execute: "job-dismiss", Arguments: map[string]any{"id": joinJob}}
			if _, err := control.execute(ctx, forget); err != nil {
				return m.Ended(err)
			}
			if jobs[0].Error != "" {
				return fmt.Errorf("QEMU: join disks: %s", jobs[0].Error)
			}
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// graph is what QEMU has of a disk.
type graph struct {
	chain  []string // nodes that are in use, oldest first
	bases  int      // how many of these the machine was restored from
	spare  string   // the newest node that never was in use, if there is one
	unused []string // other nodes of ours, newest first
	next   int      // the number of the next overlay
}

// blockGraph is QEMU's answer: all its block nodes, and which is a child of
// which.
type blockGraph struct {
	Nodes []struct {
		ID   uint64 `json:"id"`
		Type string `json:"type"`
		Name string `json:"name"`
	} `json:"nodes"`
	Edges []struct {
		Parent uint64 `json:"parent"`
		Child  uint64 `json:"child"`
		Name   string `json:"name"`
	} `json:"edges"`
}

func (m *machine) diskGraph(ctx context.Context) (graph, *monitor, error) {
	control, err := m.monitor(ctx)
	if err != nil {
		return graph{}, nil, err
	}
	var all blockGraph
	if err = control.query(ctx, "x-debug-query-block-graph", &all); err != nil {
		return graph{}, nil, m.Ended(err)
	}
	g, err := all.disk()
	return g, control, err
}

// disk finds the chain: it begins at what the device has, and goes down.
func (b *blockGraph) disk() (graph, error) {
	names, devices := map[uint64]string{}, map[uint64]bool{}
	for _, n := range b.Nodes {
		names[n.ID] = n.Name
		devices[n.ID] = n.Type == "block-backend"
	}
	below := map[uint64]uint64{}
	top := uint64(0)
	for _, e := range b.Edges {
		if e.Name == "backing" {
			below[e.Parent] = e.Child
		}
		if devices[e.Parent] {
			top = e.Child
		}
	}
	var g graph
	for node, ok := top, true; ok && len(g.chain) <= len(b.Nodes); node, ok = below[node] {
		g.chain = append(g.chain, names[node])
	}
	slices.Reverse(g.chain)
	for i, node := range g.chain {
		if n, isBase := number(node, basePrefix); isBase && (i > 0) == (n > 0) {
			g.bases++
		} else if _, isTop := number(node, topPrefix); !isTop || i == 0 {
			return graph{}, fmt.Errorf("%w: QEMU's disk is made of %q", errdef.ErrUnavailable, g.chain)
		}
	}
	if g.bases == len(g.chain) {
		return graph{}, fmt.Errorf("%w: QEMU's disk is made of %q", errdef.ErrUnavailable, g.chain)
	}
	g.others(names)
	return g, nil
}

// others finds the nodes of ours that are not in the chain, and the next number.
// An overlay is newer than all that were in use before it.
func (g *graph) others(names map[uint64]string) {
	rank := func(node string) int { // overlays of this machine are above all that it was restored from
		if n, ok := number(node, topPrefix); ok {
			return math.MaxInt32 + n
		}
		n, _ := number(node, basePrefix)
		return n
	}
	for _, node := range names {
		n, isTop := number(node, topPrefix)
		if isTop {
			g.next = max(g.next, n+1)
		}
		_, isBase := number(node, basePrefix)
		if (isTop || isBase) && !slices.Contains(g.chain, node) {
			g.unused = append(g.unused, node)
		}
	}
	slices.SortFunc(g.unused, func(a, b string) int { return rank(b) - rank(a) })
	if len(g.unused) > 0 && rank(g.unused[0]) > rank(g.chain[len(g.chain)-1]) {
		g.spare, g.unused = g.unused[0], g.unused[1:]
	}
}
