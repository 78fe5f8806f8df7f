package undo

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestRun(t *testing.T) {
	t.Parallel()
	cause, failed := errors.New("cause"), errors.New("a step failed")
	tests := map[string]struct {
		err     error
		release bool
		want    []string
		errs    []error
	}{
		"good-path":     {nil, false, nil, nil},
		"error":         {cause, false, []string{"third", "second", "first"}, []error{cause, failed}},
		"released":      {cause, true, nil, []error{cause}},
		"released-good": {nil, true, nil, nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var ran []string
			step := func(name string, err error) func() error {
				return func() error { ran = append(ran, name); return err }
			}
			var s Stack
			s.Add(step("first", nil))
			s.Add(step("second", failed))
			s.Add(step("third", nil))
			if tt.release {
				s.Release()
			}
			err := s.Run(tt.err)
			if diff := cmp.Diff(tt.want, ran); diff != "" {
				t.Errorf("steps (-want +got):\n%s", diff)
			}
			if (err == nil) != (len(tt.errs) == 0) {
				t.Errorf("got %v", err)
			}
			for _, want := range tt.errs {
				if !errors.Is(err, want) {
					t.Errorf("%v does not wrap %v", err, want)
				}
			}
		})
	}
}

// Steps run once, though Run is called twice.
func TestRunForgets(t *testing.T) {
	t.Parallel()
	n := 0
	var s Stack
	s.Add(func() error { n++; return nil })
	cause := errors.New("cause")
	if err := errors.Join(s.Run(cause), s.Run(cause)); !errors.Is(err, cause) || n != 1 {
		t.Errorf("ran %d times, %v", n, err)
	}
}
