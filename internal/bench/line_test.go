package bench

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// args splits a command line at its spaces.
func args(s string) []string { return strings.Fields(s) }

const (
	sockets = " -chardev ringbuf,id=console,size=65536 -chardev socket,id=agent,fd=%A,server=on,wait=off" +
		" -chardev socket,id=qmp,fd=%Q,server=on,wait=off -mon chardev=qmp,mode=control"
	forkLine     = "/usr/bin/qemu -object memory-backend-file,id=ram,size=256M,mem-path=/s/memory,share=off -S -incoming defer -name tine-sb-1" + sockets
	bootLine     = "/usr/bin/qemu -object memory-backend-ram,id=ram,size=256M -name tine-bench" + sockets
	templateLine = "/usr/bin/qemu -object memory-backend-file,id=ram,size=256M,mem-path=/work/ram,share=on -name tine-bench" +
		" -object memory-backend-file,id=root,size=4096,mem-path=/work/ram,share=on,readonly=on" + sockets
)

func at(l, agent, qmp string) []string {
	return args(strings.NewReplacer("%A", agent, "%Q", qmp).Replace(l))
}

func TestParseLine(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		argv []string
		want line // without argv
		bad  bool
	}{
		"fork":                {argv: at(forkLine, "5", "4"), want: line{agent: 5, qmp: 4, device: 3, memory: "/s/memory"}},
		"fork_device_between": {argv: at(forkLine, "5", "3"), want: line{agent: 5, qmp: 3, device: 4, memory: "/s/memory"}},
		"fork_device_last":    {argv: at(forkLine, "3", "4"), want: line{agent: 3, qmp: 4, device: 5, memory: "/s/memory"}},
		"boot":                {argv: at(bootLine, "4", "3"), want: line{agent: 4, qmp: 3, device: 5}},
		"template":            {argv: at(templateLine, "4", "3"), want: line{agent: 4, qmp: 3, device: 5, memory: "/work/ram"}},
		"tap":                 {argv: append(at(forkLine, "4", "5"), "-netdev", "tap,id=net,fd=3,vhost=off"), want: line{agent: 4, qmp: 5, tap: 3, device: 6, memory: "/s/memory"}},
		"two_taps":            {argv: append(at(forkLine, "4", "5"), "-netdev", "tap,fd=3", "-netdev", "tap,fd=6"), bad: true},
		"tap_and_agent":       {argv: append(at(forkLine, "4", "5"), "-netdev", "tap,fd=4"), bad: true},
		"no_agent":            {argv: args("qemu -chardev socket,id=qmp,fd=3"), bad: true},
		"no_qmp":              {argv: args("qemu -chardev socket,id=agent,fd=3"), bad: true},
		"one_for_both":        {argv: at(forkLine, "3", "3"), bad: true},
		"standard_stream":     {argv: at(forkLine, "2", "3"), bad: true},
		"huge":                {argv: at(forkLine, "99999999999999999999", "3"), bad: true},
		"two_agents":          {argv: append(at(forkLine, "3", "4"), "-chardev", "socket,id=agent,fd=5"), bad: true},
		"unknown_option":      {argv: append(at(forkLine, "3", "4"), "-add-fd", "fd=5,set=1"), bad: true},
		"unknown_colon":       {argv: append(at(bootLine, "3", "4"), "-incoming", "fd:5"), bad: true},
		"empty":               {bad: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := parseLine(tt.argv)
			if tt.bad {
				if !errors.Is(err, errLine) {
					t.Fatalf("error %v, want %v", err, errLine)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			tt.want.argv = tt.argv
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(line{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestWaits(t *testing.T) {
	t.Parallel()
	for l, want := range map[string]bool{
		"qemu -S -incoming defer": true, "qemu -incoming": false, "qemu -incoming tcp:0": false, "qemu": false,
	} {
		if got := (line{argv: args(l)}).waits(); got != want {
			t.Errorf("%q waits: %v", l, got)
		}
	}
}

func TestNamed(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		argv   []string
		memory string
		want   string
	}{
		"fork":     {argv: at(forkLine, "5", "4"), want: strings.Replace(forkLine, "tine-sb-1", "x", 1)},
		"boot":     {argv: at(bootLine, "5", "4"), want: strings.Replace(bootLine, "tine-bench", "x", 1)},
		"template": {argv: at(templateLine, "5", "4"), memory: "/b/7/ram", want: strings.Replace(strings.Replace(templateLine, "tine-bench", "x", 1), "/work/ram", "/b/7/ram", 1)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			before := strings.Join(tt.argv, " ")
			l, err := parseLine(tt.argv)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(at(tt.want, "5", "4"), l.named("x", tt.memory)); diff != "" {
				t.Error(diff)
			}
			if after := strings.Join(l.argv, " "); after != before {
				t.Errorf("the original has changed: %s", after)
			}
		})
	}
}

func TestFiles(t *testing.T) {
	t.Parallel()
	agent, qmp, device, tap := &os.File{}, &os.File{}, &os.File{}, &os.File{}
	for name, tt := range map[string]struct {
		line line
		want []*os.File
	}{
		"fork": {line{agent: 5, qmp: 4, device: 3}, []*os.File{device, qmp, agent}},
		"boot": {line{agent: 4, qmp: 3, device: 5}, []*os.File{qmp, agent, device}},
		"gap":  {line{agent: 6, qmp: 4, device: 3}, []*os.File{device, qmp, nil, agent}},
		"tap":  {line{agent: 4, qmp: 3, device: 5, tap: 7}, []*os.File{qmp, agent, device, nil, tap}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := tt.line.files(agent, qmp, device, tap)
			if len(got) != len(tt.want) {
				t.Fatalf("%d files, want %d", len(got), len(tt.want))
			}
			for i := range got {
				if got[i] != tt.want[i] {
					t.Errorf("another file at descriptor %d", firstFD+i)
				}
			}
		})
	}
}

func FuzzParseLine(f *testing.F) {
	for _, l := range []string{forkLine, bootLine, templateLine} {
		f.Add([]byte(strings.Join(at(l, "5", "4"), "\x00") + "\x00"))
	}
	f.Add([]byte("qemu\x00-chardev\x00fd=,id=agent"))
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := parseLine(splitArgs(data))
		if err != nil {
			return
		}
		if l.agent < firstFD || l.qmp < firstFD || l.device == l.agent || l.device == l.qmp || l.device == l.tap || l.agent == l.qmp {
			t.Errorf("descriptors of %q: %+v", data, l)
		}
		if got := len(l.named("x", "/ram")); got != len(l.argv) {
			t.Errorf("%d arguments became %d", len(l.argv), got)
		}
	})
}
