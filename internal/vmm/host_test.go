package vmm

import (
	"errors"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/errdef"
)

// An entry of /proc/cpuinfo, shortened.
const epyc = `processor	: 0
vendor_id	: AuthenticAMD
cpu family	: 25
model		: 1
model name	: AMD   EPYC
stepping	: 1
cpu MHz		: 2445.404
flags		: fpu vme svm
vmx flags	: none
bugs		: sysret_ss_attrs
power management:

`

// printf 'fpu\nsvm\nvme\n' | sha256sum
const epycFlags = "sha256:7e6a01619edb4aea208f6be73ad1d06707a23d3d640572f2f07969bb0b001f80"

func host(t testing.TB, cpuinfo, release string) Host {
	t.Helper()
	h, err := hostOf(strings.NewReader(cpuinfo), release)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func TestThisHost(t *testing.T) {
	t.Parallel()
	h, err := ThisHost()
	if err != nil {
		t.Fatal(err)
	}
	again, err := ThisHost()
	if err != nil || again != h || h.Accepts(again) != nil {
		t.Errorf("%+v, and then %+v, %v", h, again, err)
	}
	t.Log(h)
}

func TestHostOf(t *testing.T) {
	t.Parallel()
	want := Host{
		CPU:    CPU{Vendor: "AuthenticAMD", Family: 25, Model: 1, Stepping: 1, Name: "AMD EPYC", Flags: epycFlags},
		Kernel: "6.18.44-cloud",
	}
	other := strings.NewReplacer("0\n", "1\n", "AuthenticAMD", "GenuineIntel", " svm", " vmx").Replace(epyc)
	for name, cpuinfo := range map[string]string{
		"one":                    epyc,
		"another_core_differs":   epyc + other,
		"flags_in_another_order": strings.Replace(epyc, "fpu vme svm", "svm fpu  vme fpu", 1),
		"no_empty_line":          strings.TrimSpace(epyc),
		"empty_lines_first":      "\n\n" + epyc,
		"lines_without_a_colon":  "hello\n" + epyc,
		"a_field_twice":          strings.Replace(epyc, "vmx flags", "flags", 1),
		"many_cores":             epyc + strings.Repeat(other, 1000),
	} {
		if got := host(t, cpuinfo, "6.18.44-cloud"); got != want {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
	}
	noisy := strings.Replace(epyc, "AMD   EPYC", "\x1b[31mEvil é "+strings.Repeat("x", 500), 1)
	if got := host(t, noisy, "6.18"); !strings.HasPrefix(got.CPU.Name, "?[31mEvil ? xxx") || len(got.CPU.Name) != maxName {
		t.Errorf("name %q", got.CPU.Name)
	}
}

func TestHostOfRefuses(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct{ cpuinfo, release, text string }{
		"empty":           {"", "6.18", "flags"},
		"no_flags":        {strings.Replace(epyc, "flags\t\t: fpu vme svm\n", "", 1), "6.18", "flags"},
		"no_vendor":       {strings.Replace(epyc, "vendor_id", "vendor", 1), "6.18", "vendor"},
		"long_vendor":     {strings.Replace(epyc, "AuthenticAMD", strings.Repeat("A", 1000), 1), "6.18", "vendor"},
		"no_family":       {strings.Replace(epyc, "cpu family", "family", 1), "6.18", "cpu family"},
		"negative_model":  {strings.Replace(epyc, "model\t\t: 1", "model\t\t: -1", 1), "6.18", "model"},
		"no_stepping":     {strings.Replace(epyc, "stepping\t: 1", "stepping\t: unknown", 1), "6.18", "stepping"},
		"huge_stepping":   {strings.Replace(epyc, "stepping\t: 1", "stepping\t: 99999999999999999999", 1), "6.18", "stepping"},
		"endless_entry":   {strings.Repeat("x\t: y\n", maxCPUInfo) + epyc, "6.18", "65536 bytes"},
		"endless_line":    {strings.Repeat("x", 2*maxCPUInfo), "6.18", ""},
		"no_kernel":       {epyc, "", "kernel"},
		"kernel_of_words": {epyc, "six.eighteen", "kernel"},
		"kernel_of_one":   {epyc, "6", "kernel"},
		"kernel_signed":   {epyc, "+6.18", "kernel"},
		"kernel_minus":    {epyc, "6.-18", "kernel"},
		"kernel_escape":   {epyc, "6.18.\x1b[2J", "kernel"},
		"kernel_endless":  {epyc, "6." + strings.Repeat("1", 200), "kernel"},
	} {
		h, err := hostOf(strings.NewReader(tt.cpuinfo), tt.release)
		if err == nil || !strings.Contains(err.Error(), tt.text) || len(err.Error()) > 500 {
			t.Errorf("%s: %+v, %v", name, h, err)
		}
	}
}

func TestHostAccepts(t *testing.T) {
	t.Parallel()
	here := host(t, epyc, "6.18.44")
	change := func(f func(*Host)) Host {
		h := here
		f(&h)
		return h
	}
	portable := change(func(h *Host) { h.Template = "T2A" })
	for name, tt := range map[string]struct {
		host, made Host
		text, hint string
	}{
		"itself":          {here, here, "", ""},
		"another_name":    {here, change(func(h *Host) { h.CPU.Name = "EPYC 7763" }), "", ""},
		"another_release": {here, change(func(h *Host) { h.Kernel = "6.18.3-generic" }), "", ""},
		"short_release":   {here, change(func(h *Host) { h.Kernel = "6.18" }), "", ""},
		"candidate":       {here, change(func(h *Host) { h.Kernel = "6.18-rc3" }), "", ""},
		"vendor": {
			here, change(func(h *Host) { h.CPU.Vendor, h.CPU.Name = "GenuineIntel", "Intel(R) Xeon(R)" }),
			"it was made on Intel(R) Xeon(R) (GenuineIntel family 25 model 1 stepping 1); " +
				"this host's CPU is AMD EPYC (AuthenticAMD family 25 model 1 stepping 1)", makePortable,
		},
		"family":   {here, change(func(h *Host) { h.CPU.Family = 23 }), "family 23 model 1", makePortable},
		"model":    {here, change(func(h *Host) { h.CPU.Model = 17 }), "model 17", makePortable},
		"stepping": {here, change(func(h *Host) { h.CPU.Stepping = 2 }), "stepping 2", makePortable},
		"flags":    {here, change(func(h *Host) { h.CPU.Flags = digestOf([]string{"fpu"}) }), "other features", makePortable},
		"kernel":   {here, change(func(h *Host) { h.Kernel = "6.1.112" }), "it was made under Linux 6.1.112, and this host runs Linux 6.18.44", makeUnderThis},
		"major":    {here, change(func(h *Host) { h.Kernel = "7.18.44" }), "Linux 7.18.44", makeUnderThis},

		"same_template": {portable, portable, "", ""},
		"template_on_another_model": {
			portable, change(func(h *Host) { h.Template, h.CPU.Family, h.CPU.Flags = "T2A", 26, digestOf([]string{"fpu"}) }), "", "",
		},
		"template_of_another_vendor": {
			portable, change(func(h *Host) { h.Template, h.CPU.Vendor = "T2A", "GenuineIntel" }), "no CPU template is for both", makeAnew,
		},
		"template_under_another_kernel": {
			portable, change(func(h *Host) { h.Template, h.Kernel = "T2A", "6.1.1" }), "Linux 6.1.1", makeUnderThis,
		},
		"another_template": {portable, change(func(h *Host) { h.Template = "T2" }), "it was made with the CPU template T2, and this host's machines have the CPU template T2A", makeLikeIt},
		"no_template_here": {here, portable, "it was made with the CPU template T2A, and this host's machines have no CPU template", makeLikeIt},
		"made_without":     {portable, here, "it was made with no CPU template, and", makeLikeIt},
	} {
		err := tt.host.Accepts(tt.made)
		switch {
		case tt.text == "":
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		case !errors.Is(err, errdef.ErrUnsupported) || !strings.Contains(err.Error(), tt.text) || errdef.Hint(err) != tt.hint:
			t.Errorf("%s: %v, hint %q", name, err, errdef.Hint(err))
		}
		if back := tt.made.Accepts(tt.host); (back == nil) != (err == nil) {
			t.Errorf("%s: the other way round: %v", name, back)
		}
	}
}

func TestHostValidate(t *testing.T) {
	t.Parallel()
	good := host(t, epyc, "6.18.44")
	good.Template = "custom.json@" + strings.Repeat("a", 64)
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	long := strings.Repeat("x", maxName+1)
	for name, spoil := range map[string]func(*Host){
		"zero":            func(h *Host) { *h = Host{} },
		"no_vendor":       func(h *Host) { h.CPU.Vendor = "" },
		"long_vendor":     func(h *Host) { h.CPU.Vendor = long },
		"escape_in_name":  func(h *Host) { h.CPU.Name = "\x1b[2J" },
		"long_name":       func(h *Host) { h.CPU.Name = long },
		"not_utf8":        func(h *Host) { h.CPU.Name = "\xff" },
		"negative":        func(h *Host) { h.CPU.Stepping = -1 },
		"huge":            func(h *Host) { h.CPU.Family = maxNumber + 1 },
		"no_flags":        func(h *Host) { h.CPU.Flags = "" },
		"flags_in_words":  func(h *Host) { h.CPU.Flags = "fpu" },
		"flags_too_long":  func(h *Host) { h.CPU.Flags += "0" },
		"flags_in_upper":  func(h *Host) { h.CPU.Flags = strings.ToUpper(h.CPU.Flags) },
		"long_template":   func(h *Host) { h.Template = long },
		"line_template":   func(h *Host) { h.Template = "a\nb" },
		"no_kernel":       func(h *Host) { h.Kernel = "" },
		"kernel_of_words": func(h *Host) { h.Kernel = "linux" },
		"long_kernel":     func(h *Host) { h.Kernel = "6.18." + long },
	} {
		h := good
		spoil(&h)
		if err := h.Validate(); !errors.Is(err, errdef.ErrInvalid) || len(err.Error()) > 200 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzHostOf: whatever a host says of itself, what comes of it is valid, or an
// error.
func FuzzHostOf(f *testing.F) {
	f.Add(epyc, "6.18.44")
	f.Add("flags:\n", "6.")
	f.Add("flags: a\nmodel name: \xff\n\n", "06.01")
	f.Fuzz(func(t *testing.T, cpuinfo, release string) {
		h, err := hostOf(strings.NewReader(cpuinfo), release)
		if err != nil {
			return
		}
		if err = errors.Join(h.Validate(), h.Accepts(h)); err != nil {
			t.Errorf("%+v: %v", h, err)
		}
	})
}
