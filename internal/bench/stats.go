package bench

import (
	"math"
	"slices"
	"time"
)

// Summary is what is kept of a number of samples.
type Summary struct {
	Samples int     `json:"samples"`
	Min     float64 `json:"min"`
	Median  float64 `json:"median"` // of an even number: the mean of the middle two
	P95     float64 `json:"p95"`    // nearest rank
}

// summarize returns the summary of samples, the zero one if there are none.
func summarize(samples []float64) Summary {
	n := len(samples)
	if n == 0 {
		return Summary{}
	}
	sorted := slices.Sorted(slices.Values(samples))
	return Summary{
		Samples: n,
		Min:     sorted[0],
		Median:  (sorted[(n-1)/2] + sorted[n/2]) / 2,
		P95:     sorted[int(math.Ceil(0.95*float64(n)))-1],
	}
}

// ratio returns how many times b goes into a, and 0 when that has no answer.
func ratio(a, b float64) float64 {
	if a <= 0 || b <= 0 {
		return 0
	}
	return a / b
}

// ms is a duration in milliseconds, to the microsecond.
func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// mib is a number of bytes in MiB.
func mib(n int64) float64 { return float64(n) / (1 << 20) }
