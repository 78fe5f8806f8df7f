package audit

import "testing"

// BenchmarkAppend is what a line costs: alone, and where many write at once.
func BenchmarkAppend(b *testing.B) {
	rec := Record{
		Phase: Outcome, Action: "sandbox.exec", Actor: Token("ci"), Digest: Digest(nil), LatencyUS: 1234, Method: "POST", Object: "sb-k3v7xq2m4tza",
		Path: "/v1/sandboxes/sb-k3v7xq2m4tza/exec", Route: "POST /v1/sandboxes/{id}/exec", Status: 200, UA: "Python-urllib/3.11", Result: OK,
	}
	for _, policy := range []Sync{SyncAlways, SyncInterval, SyncNever} {
		log := func(b *testing.B) *Log {
			b.Helper()
			l := openLog(b, Config{Dir: b.TempDir(), Sync: policy})
			b.Cleanup(func() { shut(b, l) })
			b.ResetTimer()
			return l
		}
		b.Run(string(policy)+"/alone", func(b *testing.B) {
			l := log(b)
			for b.Loop() {
				if _, err := l.Append(b.Context(), rec); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(string(policy)+"/many", func(b *testing.B) {
			l := log(b)
			b.SetParallelism(32)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if _, err := l.Append(b.Context(), rec); err != nil {
						b.Error(err)
					}
				}
			})
		})
	}
}

// BenchmarkVerify is what reading a line again costs.
func BenchmarkVerify(b *testing.B) {
	dir := b.TempDir()
	l := openLog(b, Config{Dir: dir, Sync: SyncNever})
	const acts = 5000
	for range acts {
		act(b, l, "sb-k3v7xq2m4tza")
	}
	shut(b, l)
	for b.Loop() {
		wantGood(b, dir)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/(2*acts), "ns/line")
}
