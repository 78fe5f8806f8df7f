package record

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"
)

func allBytes() []byte {
	var b []byte
	for i := range 256 {
		b = append(b, byte(i))
	}
	return b
}

// The vectors that Forge asserts, or that follow from its rule.
func TestForgeHash(t *testing.T) {
	t.Parallel()
	tests := []struct{ stdout, stderr, want string }{
		{"", "", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
		{"git-env\n", "", "3ceeb51d137868b2babb0b1c7ab153cc493b6e2b68e69507afbb416888344da0"},
		{"git version 2.43.0\n", "", "25f3602b5caaf92437be1e76b53698e8d73f14a6c71c2e91c8d5875f923ab29f"},
		{"out", "", "762069bc07a6e1b5df123a5ae7bd91c10daa04694fbaa17fba0cd6a8dcce8f22"},
		{"out", "err", "0db14a89d67977799dff485cc6419361e26b4b775037de1377bcf57e2efcf45f"},
		{"output1\n", "", "063b2c93c3c56028398bfb80b47a235b476a3473d270a909c9a2d7581faa61ce"},
		{"output2\n", "", "83e2db4bcc26f97050fea319d160fed0ea7c7decda281abc6670ec5c88390bd9"},
		{"hello stdout\n", "hello stderr\n", "41f0e76d9c3ca48806b17f31dc3aedf5da27868cd6bc6e402f109f5917789018"},
		{string(allBytes()), "", "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880"},
		{"x", "xx", "cd2eb0837c9b4c962c22d2ff8b5441b7b45805887f051d39bf133b583baf6860"},
		{"xx", "x", "cd2eb0837c9b4c962c22d2ff8b5441b7b45805887f051d39bf133b583baf6860"},
	}
	for _, tt := range tests {
		if got := ForgeHash([]byte(tt.stdout), []byte(tt.stderr)); got != digestPrefix+tt.want {
			t.Errorf("%.20q, %.20q: %s, want %s", tt.stdout, tt.stderr, got, tt.want)
		}
	}
}

// Every field that an outcome can depend on, and every part of an outcome, is
// covered; what only the host knows is not.
func TestEveryFieldCounts(t *testing.T) {
	t.Parallel()
	inputs := map[string]func(*Input){
		"argv":            func(in *Input) { in.Argv = []string{"python3", "/srv/job.p", "y"} },
		"argv-split":      func(in *Input) { in.Argv = []string{"python3/srv/job.py"} },
		"argv-to-env":     func(in *Input) { in.Argv, in.Env = in.Argv[:1], append(in.Argv[1:2:2], in.Env...) },
		"env-order":       func(in *Input) { in.Env = []string{"B=1", "A=1"} },
		"cwd":             func(in *Input) { in.Cwd = "/" },
		"stdin":           func(in *Input) { in.Stdin = []byte("1 2 3") },
		"file-path":       func(in *Input) { in.Files[0].Path = "/srv/job" },
		"file-mode":       func(in *Input) { in.Files[0].Mode = 0o755 },
		"file-data":       func(in *Input) { in.Files[0].Data = nil },
		"no-file":         func(in *Input) { in.Files = nil },
		"collect":         func(in *Input) { in.Collect = in.Collect[:1] },
		"seed":            func(in *Input) { in.Seed++ },
		"start":           func(in *Input) { in.Start = in.Start.Add(1) },
		"start-second":    func(in *Input) { in.Start = in.Start.Add(time.Second) },
		"virtual-limit":   func(in *Input) { in.Limits.Virtual++ },
		"output-limit":    func(in *Input) { in.Limits.Output++ },
		"wall-limit ok":   func(in *Input) { in.Limits.Wall++ },
		"other zone ok":   func(in *Input) { in.Start = in.Start.In(time.FixedZone("x", 3600)) },
		"nil or empty ok": func(in *Input) { in.Files = append([]File{}, in.Files...) },
	}
	same := HashInput("sha256:1", testDraft().Input)
	for name, change := range inputs {
		in := testDraft().Input
		change(&in)
		if got := HashInput("sha256:1", in) == same; got != (name[len(name)-2:] == "ok") {
			t.Errorf("input with another %s: same hash %t", name, got)
		}
	}
	if HashInput("sha256:2", testDraft().Input) == same {
		t.Error("another snapshot has the same hash")
	}
	outputs := map[string]func(*Output){
		"stdout":       func(o *Output) { o.Stdout = o.Stdout[:1] },
		"other-stream": func(o *Output) { o.Stdout, o.Stderr = nil, append(o.Stdout, o.Stderr...) },
		"exit":         func(o *Output) { o.Exit = -1 },
		"signal":       func(o *Output) { o.Signal = "SIGSEGV" },
		"failure":      func(o *Output) { o.Failure = "timed out" },
		"files":        func(o *Output) { o.Files = nil },
		"virtual":      func(o *Output) { o.Virtual++ },
		"wall ok":      func(o *Output) { o.Wall++ },
		"memory ok":    func(o *Output) { o.Memory = Digest(nil) },
	}
	same = HashOutput(testDraft().Output)
	for name, change := range outputs {
		out := testDraft().Output
		change(&out)
		if got := HashOutput(out) == same; got != (name[len(name)-2:] == "ok") {
			t.Errorf("output with another %s: same hash %t", name, got)
		}
	}
}

// unframer reads what a framer has written: that it can proves that no two
// values are written as the same bytes.
type unframer struct {
	t    *rapid.T
	data []byte
}

func (u *unframer) number() uint64 {
	if len(u.data) < 8 {
		u.t.Fatal("a number is cut off")
	}
	n := binary.BigEndian.Uint64(u.data)
	u.data = u.data[8:]
	return n
}

func (u *unframer) bytes() []byte {
	n := u.number()
	if n > uint64(len(u.data)) {
		u.t.Fatal("bytes are cut off")
	}
	b := u.data[:n]
	u.data = u.data[n:]
	return b
}

func (u *unframer) texts() []string {
	var list []string
	for range u.number() {
		list = append(list, string(u.bytes()))
	}
	return list
}

func (u *unframer) files() []File {
	var list []File
	for range u.number() {
		list = append(list, File{Path: string(u.bytes()), Mode: uint32(u.number()), Data: u.bytes()})
	}
	return list
}

func (u *unframer) end() {
	if len(u.data) > 0 {
		u.t.Fatal("there is more")
	}
}

func drawFiles(t *rapid.T, name string) []File {
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) File {
		return File{rapid.String().Draw(t, "path"), rapid.Uint32().Draw(t, "mode"), drawBytes(t, "data")}
	}), 0, 3).Draw(t, name)
}

func drawBytes(t *rapid.T, name string) []byte {
	return rapid.SliceOfN(rapid.Byte(), 0, 40).Draw(t, name)
}

func TestFramesCanBeReadBack(t *testing.T) {
	t.Parallel()
	texts := rapid.SliceOfN(rapid.String(), 0, 4)
	rapid.Check(t, func(t *rapid.T) {
		in := Input{
			Argv: texts.Draw(t, "argv"), Env: texts.Draw(t, "env"), Cwd: rapid.String().Draw(t, "cwd"), Stdin: drawBytes(t, "stdin"),
			Files: drawFiles(t, "files"), Collect: texts.Draw(t, "collect"), Seed: rapid.Uint64().Draw(t, "seed"),
			Start:  time.Unix(rapid.Int64Range(0, 1<<40).Draw(t, "start"), rapid.Int64Range(0, 999_999_999).Draw(t, "nanoseconds")),
			Limits: Limits{Virtual: time.Duration(rapid.Int64().Draw(t, "virtual")), Output: rapid.Int64().Draw(t, "output")},
		}
		out := Output{
			Stdout: drawBytes(t, "stdout"), Stderr: drawBytes(t, "stderr"), Exit: rapid.IntRange(-1, 255).Draw(t, "exit"),
			Signal: rapid.String().Draw(t, "signal"), Failure: rapid.String().Draw(t, "failure"), Files: drawFiles(t, "outputs"),
			Virtual: time.Duration(rapid.Int64().Draw(t, "took")),
		}
		var b bytes.Buffer
		frameInput(&b, "sha256:x", in)
		u := &unframer{t, b.Bytes()}
		if domain, snapshot := string(u.bytes()), string(u.bytes()); domain != inputDomain || snapshot != "sha256:x" {
			t.Fatalf("%q, %q", domain, snapshot)
		}
		gotIn := Input{Argv: u.texts(), Env: u.texts(), Cwd: string(u.bytes()), Stdin: u.bytes(), Files: u.files(), Collect: u.texts(), Seed: u.number()}
		gotIn.Start = time.Unix(int64(u.number()), int64(u.number()))
		gotIn.Limits = Limits{Virtual: time.Duration(u.number()), Output: int64(u.number())}
		u.end()
		var b2 bytes.Buffer
		frameOutput(&b2, out)
		u = &unframer{t, b2.Bytes()}
		if domain := string(u.bytes()); domain != outputDomain {
			t.Fatalf("%q", domain)
		}
		gotOut := Output{
			Stdout: u.bytes(), Stderr: u.bytes(), Exit: int(int64(u.number())), Signal: string(u.bytes()), Failure: string(u.bytes()),
			Files: u.files(), Virtual: time.Duration(u.number()),
		}
		u.end()
		if diff := cmp.Diff(in, gotIn, cmpopts.EquateEmpty()) + cmp.Diff(out, gotOut, cmpopts.EquateEmpty()); diff != "" {
			t.Fatal(diff)
		}
	})
}
