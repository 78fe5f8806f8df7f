package record

import (
	"fmt"
	"testing"
)

func BenchmarkAppend(b *testing.B) {
	s, err := Open(b.Context(), testConfig(b.TempDir()))
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	n := 0
	for b.Loop() {
		d := testDraft()
		d.Output.Stdout = fmt.Appendf(nil, "run %d\n", n)
		n++
		if _, err = s.Append(b.Context(), d); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	e, contents := testEnvelope(b)
	for b.Loop() {
		if v := Verify(e.Bytes, testTrust(), &Bundle{contents: contents}); !v.OK {
			b.Fatal(v)
		}
	}
}

func BenchmarkRules(b *testing.B) {
	data := make([]byte, 0, 1<<20)
	for len(data) < 1<<20-100 {
		data = append(data, "2026-11-21T12:00:01Z host sshd[17]: accepted 12 from /tmp/tmp.x1/y in 0.12s at 0x7ffd12345678\n"...)
	}
	for _, r := range rules {
		b.Run(r.name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				r.apply(data, testStart())
			}
		})
	}
}
