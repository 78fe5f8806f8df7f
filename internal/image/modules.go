package image

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/mikelolasagasti/xz"

	"github.com/tinevm/tine/internal/errdef"
)

// The modules that guests load, less those that the kernel has built in.
// Dependencies are not listed: the modules name them.
var (
	// bootModules are loaded at every boot. The driver of the root
	// filesystem's device may be missing: a machine may have it on another.
	bootModules = []struct {
		name     string
		required bool
	}{
		{"virtio_pci", true},
		{"virtio_console", true},
		{"virtio_pmem", false},
		{"nd_pmem", true},
		{"erofs", true},
		{"overlay", true},
	}
	// features are loaded when the machine has what they are for, and may be
	// missing.
	features = []struct{ name, module string }{
		{"blk", "virtio_blk"},
		{"e820", "nd_e820"},
		{"ext4", "ext4"},
		{"mmio", "virtio_mmio"},
		{"net", "virtio_net"},
		{"nvdimm", "nfit"},
		{"rng", "virtio_rng"},
		{"vsock", "vmw_vsock_virtio_transport"},
	}
)

// moreModules is the feature of the modules that a store's owner asks for.
const moreModules = "more"

// moduleNeeds is all that decides which modules of a kernel are taken.
func moduleNeeds(more []string) []string {
	var all []string
	for _, b := range bootModules {
		all = append(all, b.name)
	}
	for _, f := range features {
		all = append(all, f.name+":"+f.module)
	}
	for _, name := range more {
		all = append(all, moreModules+":"+name)
	}
	return all
}

// maxModule bounds one module, unpacked.
const maxModule = 64 << 20

// moduleSet is the modules of an initramfs and the orders to load them in.
type moduleSet struct {
	files   *bundle
	paths   map[string]string   // module name to name in the bundle
	built   map[string]bool     // built into the kernel
	content map[string][]byte   // of the modules in any order
	orders  map[string][]string // by feature; "" is the order of boot
}

// loadModules finds the modules that guests need, and more, and orders them so
// that each comes after those it depends on.
func loadModules(files *bundle, more []string) (*moduleSet, error) {
	m := &moduleSet{
		files: files, paths: map[string]string{}, built: map[string]bool{},
		content: map[string][]byte{}, orders: map[string][]string{},
	}
	for _, name := range files.names(isModuleFile) {
		if path.Base(name) != "modules.builtin" {
			m.paths[moduleName(name)] = name
			continue
		}
		list, err := files.read(name, maxManifest)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(list)) {
			m.built[moduleName(strings.TrimSpace(line))] = true
		}
	}
	if len(m.paths) == 0 && len(m.built) == 0 {
		return m, nil // a kernel without modules has everything built in
	}
	boot := map[string]bool{}
	for _, b := range bootModules {
		if err := m.loadIf(b.required, b.name, "", boot); err != nil {
			return nil, err
		}
	}
	for _, f := range features {
		if err := m.loadIf(false, f.module, f.name, maps.Clone(boot)); err != nil {
			return nil, err
		}
	}
	seen := maps.Clone(boot)
	for _, name := range more {
		if err := m.load(strings.ReplaceAll(name, "-", "_"), moreModules, seen); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// loadIf is load for a module that may be missing if it is not required.
func (m *moduleSet) loadIf(required bool, name, feature string, seen map[string]bool) error {
	if m.paths[name] == "" && !required {
		return nil
	}
	return m.load(name, feature, seen)
}

// moduleName is the name of the module in a file, or "" when it is not one.
// The kernel takes '-' and '_' for the same.
func moduleName(file string) string {
	base, _, found := strings.Cut(path.Base(file), ".ko")
	if !found {
		return ""
	}
	return strings.ReplaceAll(base, "-", "_")
}

// load appends a module to a feature's order, after all that it depends on.
// seen has the modules that are loaded by then; those under way are false.
func (m *moduleSet) load(name, feature string, seen map[string]bool) error {
	if done, begun := seen[name]; m.built[name] || done {
		return nil
	} else if begun {
		return fmt.Errorf("%w: module %s depends on itself", errdef.ErrInvalid, name)
	}
	seen[name] = false
	hard, soft, err := m.needs(name)
	if err != nil {
		return fmt.Errorf("read module %s: %w", name, err)
	}
	for _, dep := range slices.Concat(soft, hard) {
		// A soft dependency may be an alias, or not built at all.
		if err = m.loadIf(!slices.Contains(soft, dep), dep, feature, seen); err != nil {
			return fmt.Errorf("module %s needs: %w", name, err)
		}
	}
	seen[name] = true
	m.orders[feature] = append(m.orders[feature], name)
	return nil
}

// needs reads a module, keeps its content and returns its dependencies.
func (m *moduleSet) needs(name string) (hard, soft []string, err error) {
	file, ok := m.paths[name]
	if !ok {
		return nil, nil, fmt.Errorf("%w: kernel module %s", errdef.ErrNotFound, name)
	}
	content, err := m.read(file)
	if err != nil {
		return nil, nil, err
	}
	m.content[name] = content
	return dependencies(content)
}

// read returns a module's content, unpacked.
func (m *moduleSet) read(file string) ([]byte, error) {
	packed, err := m.files.read(file, maxModule)
	if err != nil {
		return nil, err
	}
	var r io.Reader
	switch path.Ext(file) {
	case ".ko":
		return packed, nil
	case ".gz":
		r, err = gzip.NewReader(bytes.NewReader(packed))
	case ".xz":
		r, err = xz.NewReader(bytes.NewReader(packed), maxModule)
	case ".zst":
		var z *zstd.Decoder
		if z, err = zstd.NewReader(bytes.NewReader(packed), zstd.WithDecoderMaxMemory(maxModule)); err == nil {
			defer z.Close()
			r = z
		}
	default:
		return nil, fmt.Errorf("%w: compression %s", errdef.ErrUnsupported, path.Ext(file))
	}
	if err != nil {
		return nil, err
	}
	content, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err == nil && len(content) > maxModule {
		return nil, fmt.Errorf("%w: more than %d bytes", errdef.ErrExhausted, maxModule)
	}
	return content, err
}

// dependencies reads from a module's own description which modules it needs,
// and which it wants loaded before it if they are there. The packages of
// distributions have no modules.dep: that is made when they are installed.
func dependencies(content []byte) (hard, soft []string, err error) {
	f, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
	}
	section := f.Section(".modinfo")
	if section == nil || section.Size > maxManifest {
		return nil, nil, fmt.Errorf("%w: no usable .modinfo section", errdef.ErrInvalid)
	}
	info, err := section.Data()
	if err != nil {
		return nil, nil, fmt.Errorf("%w: read .modinfo: %w", errdef.ErrInvalid, err)
	}
	for field := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(field, "depends="); ok {
			hard = append(hard, moduleNames(strings.Split(list, ","))...)
		}
		if list, ok := strings.CutPrefix(field, "softdep=pre: "); ok {
			list, _, _ = strings.Cut(list, "post:")
			soft = append(soft, moduleNames(strings.Fields(list))...)
		}
	}
	return hard, soft, nil
}

func moduleNames(list []string) []string {
	var names []string
	for _, name := range list {
		if name != "" {
			names = append(names, strings.ReplaceAll(name, "-", "_"))
		}
	}
	return names
}

func modulePath(name string) string { return "/modules/" + name + ".ko" }

// order is the load order of a feature, or of boot: one path a line.
func (m *moduleSet) order(feature string) string {
	var lines strings.Builder
	for _, name := range m.orders[feature] {
		lines.WriteString(modulePath(name) + "\n")
	}
	return lines.String()
}

// writeCPIO writes the modules and their orders, without end mark.
func (m *moduleSet) writeCPIO(w io.Writer) error {
	c := newCPIO(w)
	c.dir("modules")
	c.dir("modules/order.d")
	c.text("modules/order", m.order(""))
	for _, f := range features {
		c.text("modules/order.d/"+f.name, m.order(f.name))
	}
	if order := m.order(moreModules); order != "" {
		c.text("modules/order.d/"+moreModules, order)
	}
	for _, name := range slices.Sorted(maps.Keys(m.content)) {
		content := m.content[name]
		c.file(modulePath(name)[1:], 0o644, int64(len(content)), bytes.NewReader(content))
	}
	return c.err
}
