package bench

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestSummarize(t *testing.T) {
	t.Parallel()
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[i] = float64(100 - i)
	}
	for name, tt := range map[string]struct {
		samples []float64
		want    Summary
	}{
		"none":    {nil, Summary{}},
		"one":     {[]float64{7}, Summary{Samples: 1, Min: 7, Median: 7, P95: 7}},
		"even":    {[]float64{4, 1, 3, 2}, Summary{Samples: 4, Min: 1, Median: 2.5, P95: 4}},
		"odd":     {[]float64{9, 1, 5}, Summary{Samples: 3, Min: 1, Median: 5, P95: 9}},
		"twenty":  {hundred[80:], Summary{Samples: 20, Min: 1, Median: 10.5, P95: 19}},
		"hundred": {hundred, Summary{Samples: 100, Min: 1, Median: 50.5, P95: 95}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			before := append([]float64{}, tt.samples...)
			if diff := cmp.Diff(tt.want, summarize(tt.samples)); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(before, append([]float64{}, tt.samples...)); diff != "" {
				t.Errorf("samples were reordered: %s", diff)
			}
		})
	}
}

func TestRatio(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ a, b, want float64 }{{3, 2, 1.5}, {0, 2, 0}, {3, 0, 0}, {-1, 2, 0}} {
		if got := ratio(tt.a, tt.b); got != tt.want {
			t.Errorf("ratio(%v, %v) = %v, want %v", tt.a, tt.b, got, tt.want)
		}
	}
}

func TestUnits(t *testing.T) {
	t.Parallel()
	if got := ms(1234567 * time.Nanosecond); got != 1.234 {
		t.Errorf("ms: %v", got)
	}
	if got := mib(3 << 19); got != 1.5 {
		t.Errorf("mib: %v", got)
	}
}
