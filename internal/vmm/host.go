package vmm

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// Host is what the device state that a hardware engine writes depends on beside
// the monitor. It is part of a snapshot, and what is read of one may come from
// anywhere: Validate it. docs/engines.md says which hosts accept which.
type Host struct {
	CPU CPU `json:"cpu"`
	// Template names the CPU template that machines are given, and all that is in
	// it: a template of the monitor's by its name there, as the monitor's version
	// is part of a snapshot too; one from a file by the file's name, "@" and the
	// SHA-256 of its bytes in hex. It is empty for machines that see the host's
	// own CPU.
	Template string `json:"template,omitempty"`
	// Kernel is the host's kernel release, "6.18.44-cloud".
	Kernel string `json:"kernel"`
}

// CPU is a processor as /proc/cpuinfo has it.
type CPU struct {
	Vendor   string `json:"vendor"` // "GenuineIntel"
	Family   int    `json:"family"`
	Model    int    `json:"model"`
	Stepping int    `json:"stepping"`
	// Name is for people, and may be any: hypervisors choose it.
	Name string `json:"name,omitempty"`
	// Flags is the SHA-256 of the names of the features, sorted and each followed
	// by a newline: "sha256:" and 64 hex digits.
	Flags string `json:"flags"`
}

// ThisHost says which host this is, by /proc/cpuinfo and uname(2). Of several
// processors the first speaks for all. It is without a Template. A host that
// does not say all that is needed is errdef.ErrUnsupported.
func ThisHost() (Host, error) {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return Host{}, fmt.Errorf("find out this host's CPU: %w", err)
	}
	defer func() { _ = f.Close() }() // only read
	var u unix.Utsname
	if err = unix.Uname(&u); err != nil {
		return Host{}, os.NewSyscallError("uname", err)
	}
	return hostOf(f, unix.ByteSliceToString(u.Release[:]))
}

// hostOf is ThisHost of a file like /proc/cpuinfo.
func hostOf(cpuinfo io.Reader, release string) (Host, error) {
	cpu, err := readCPU(cpuinfo)
	if err != nil {
		return Host{}, fmt.Errorf("find out this host's CPU: %w", err)
	}
	h := Host{CPU: cpu, Kernel: release}
	if err = h.Validate(); err != nil {
		return Host{}, fmt.Errorf("%w: this host: %s", errdef.ErrUnsupported, err.Error())
	}
	return h, nil
}

// maxCPUInfo bounds what is read of /proc/cpuinfo: the first processor's entry,
// of some 2 KiB, is enough.
const maxCPUInfo = 64 << 10

// readCPU reads the first processor's entry.
func readCPU(cpuinfo io.Reader) (CPU, error) {
	fields := map[string]string{}
	bounded := &io.LimitedReader{R: cpuinfo, N: maxCPUInfo}
	lines := bufio.NewScanner(bounded)
	ended := false
	for !ended && lines.Scan() {
		key, value, found := strings.Cut(lines.Text(), ":")
		if !found {
			ended = strings.TrimSpace(key) == "" && len(fields) > 0 // an empty line ends an entry
			continue
		}
		if key = strings.TrimSpace(key); fields[key] == "" {
			fields[key] = strings.Join(strings.Fields(value), " ")
		}
	}
	switch err := lines.Err(); {
	case err != nil:
		return CPU{}, err
	case !ended && bounded.N == 0:
		return CPU{}, fmt.Errorf("%w: an entry of more than %d bytes", errdef.ErrUnsupported, maxCPUInfo)
	}
	flags := strings.Fields(fields["flags"])
	if len(flags) == 0 {
		return CPU{}, fmt.Errorf("%w: it shows no flags", errdef.ErrUnsupported)
	}
	cpu := CPU{Vendor: fields["vendor_id"], Name: printable(fields["model name"]), Flags: digestOf(flags)}
	for key, into := range map[string]*int{"cpu family": &cpu.Family, "model": &cpu.Model, "stepping": &cpu.Stepping} {
		n, err := strconv.ParseUint(fields[key], 10, 16)
		if err != nil {
			return CPU{}, fmt.Errorf("%w: its %s is %.40q", errdef.ErrUnsupported, key, fields[key])
		}
		*into = int(n)
	}
	return cpu, nil
}

// digestOf is the same for the same features, in whatever order they come.
func digestOf(flags []string) string {
	flags = slices.Compact(slices.Sorted(slices.Values(flags)))
	sum := sha256.Sum256([]byte(strings.Join(flags, "\n") + "\n"))
	return flagsPrefix + hex.EncodeToString(sum[:])
}

const flagsPrefix = "sha256:"

// maxName bounds each string of a Host.
const maxName = 128

// printable makes a name of whatever a hypervisor says it is.
func printable(name string) string {
	name = strings.Map(func(r rune) rune {
		if isPrint(r) {
			return r
		}
		return '?'
	}, name)
	return name[:min(len(name), maxName)]
}

func isPrint(r rune) bool { return r >= ' ' && r < 0x7f }

func isName(s string) bool {
	return len(s) <= maxName && !strings.ContainsFunc(s, func(r rune) bool { return !isPrint(r) })
}

// maxNumber bounds what a processor has of numbers.
const maxNumber = 1<<16 - 1

// Validate returns errdef.ErrInvalid unless h is one that ThisHost could have
// returned, perhaps with a template: its strings are bounded and printable.
func (h Host) Validate() error {
	c := h.CPU
	_, kernel := series(h.Kernel)
	digest, prefixed := strings.CutPrefix(c.Flags, flagsPrefix)
	switch {
	case c.Vendor == "" || !isName(c.Vendor):
		return fmt.Errorf("%w: CPU vendor %.40q", errdef.ErrInvalid, c.Vendor)
	case min(c.Family, c.Model, c.Stepping) < 0 || max(c.Family, c.Model, c.Stepping) > maxNumber:
		return fmt.Errorf("%w: CPU family %d model %d stepping %d", errdef.ErrInvalid, c.Family, c.Model, c.Stepping)
	case !isName(c.Name):
		return fmt.Errorf("%w: CPU name %.40q", errdef.ErrInvalid, c.Name)
	case !prefixed || len(digest) != 2*sha256.Size || strings.Trim(digest, "0123456789abcdef") != "":
		return fmt.Errorf("%w: digest of CPU flags %.80q", errdef.ErrInvalid, c.Flags)
	case !isName(h.Template):
		return fmt.Errorf("%w: CPU template %.40q", errdef.ErrInvalid, h.Template)
	case !kernel || !isName(h.Kernel):
		return fmt.Errorf("%w: kernel %.40q", errdef.ErrInvalid, h.Kernel)
	}
	return nil
}

// series is what says whether two kernels are of one: "6.18" of 6.18.44-cloud.
func series(release string) (string, bool) {
	major, rest, found := strings.Cut(release, ".")
	end := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
	if end < 0 {
		end = len(rest)
	}
	minor := rest[:end]
	for _, number := range []string{major, minor} {
		if _, err := strconv.ParseUint(number, 10, 16); err != nil {
			return "", false
		}
	}
	return major + "." + minor, found
}

// The ways out for one whose snapshot a host does not accept.
const (
	makeAnew      = "make the snapshot anew on this host (tine snapshot create)"
	makePortable  = makeAnew + ", or make it with a CPU template, on an engine that has them"
	makeLikeIt    = makeAnew + ", or run the daemon with the CPU template, or without, as it was made"
	makeUnderThis = makeAnew + ", or boot this host with the kernel that it was made under"
)

// Accepts returns nil if device state that was written on the host made can be
// restored on h. Otherwise it is errdef.ErrUnsupported with the reason, of which
// "it" is the snapshot, and a hint. Both must be valid.
func (h Host) Accepts(made Host) error {
	if err := h.acceptsCPU(made); err != nil {
		return err
	}
	was, _ := series(made.Kernel)
	is, _ := series(h.Kernel)
	if was != is {
		return refuse(makeUnderThis, "it was made under Linux %s, and this host runs Linux %s", made.Kernel, h.Kernel)
	}
	return nil
}

// acceptsCPU compares what the machines see: under a template that is what the
// template makes of a vendor's CPUs, and not the one CPU.
func (h Host) acceptsCPU(made Host) error {
	was, is := made.CPU, h.CPU
	switch {
	case made.Template != h.Template:
		return refuse(makeLikeIt, "it was made with %s, and this host's machines have %s", template(made.Template), template(h.Template))
	case h.Template != "" && was.Vendor == is.Vendor:
		return nil
	case h.Template != "":
		return refuse(makeAnew, "it was made on %s; this host's CPU is %s, and no CPU template is for both", was, is)
	case !was.same(is):
		return refuse(makePortable, "it was made on %s; this host's CPU is %s", was, is)
	case was.Flags != is.Flags:
		return refuse(makePortable, "it was made on a CPU of this host's model, %s, with other features than this one shows: "+
			"microcode, the kernel's parameters or a hypervisor make that difference", is)
	}
	return nil
}

func template(name string) string {
	if name == "" {
		return "no CPU template"
	}
	return "the CPU template " + name
}

func (c CPU) same(other CPU) bool {
	return c.Vendor == other.Vendor && c.Family == other.Family && c.Model == other.Model && c.Stepping == other.Stepping
}

func refuse(hint, reason string, args ...any) error {
	return errdef.WithHint(fmt.Errorf("%w: %s", errdef.ErrUnsupported, fmt.Sprintf(reason, args...)), hint)
}

// String is "AMD EPYC (AuthenticAMD family 25 model 1 stepping 1)".
func (c CPU) String() string {
	id := fmt.Sprintf("%s family %d model %d stepping %d", c.Vendor, c.Family, c.Model, c.Stepping)
	if c.Name == "" {
		return id
	}
	return fmt.Sprintf("%s (%s)", c.Name, id)
}

// String is the CPU, or the CPU template and the vendor that it is for, and the
// kernel's series.
func (h Host) String() string {
	cpu := h.CPU.String()
	if h.Template != "" {
		cpu = fmt.Sprintf("CPU template %s on %s", h.Template, h.CPU.Vendor)
	}
	kernel, _ := series(h.Kernel)
	return cpu + ", Linux " + kernel
}
