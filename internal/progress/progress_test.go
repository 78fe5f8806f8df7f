package progress

import (
	"context"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestReport(t *testing.T) {
	t.Parallel()
	var got, outer []Event
	ctx := With(t.Context(), func(e Event) { outer = append(outer, e) })
	ctx = With(ctx, func(e Event) { got = append(got, e) })
	child, cancel := context.WithCancel(ctx)
	cancel() // news of the end of the work is news too
	Report(ctx, "image", "downloading packages")
	ReportAmount(child, "snapshot", "reading memory", 1, 2)
	want := []Event{
		{Step: "image", Message: "downloading packages"},
		{Step: "snapshot", Message: "reading memory", Done: 1, Total: 2},
	}
	if diff := cmp.Diff(want, got); diff != "" || len(outer) > 0 {
		t.Errorf("outer %v, inner (-want +got):\n%s", outer, diff)
	}
}

// Work reports whether or not anyone listens.
func TestReportToNobody(t *testing.T) {
	t.Parallel()
	Report(t.Context(), "image", "building")
	Report(With(t.Context(), nil), "image", "building")
}
