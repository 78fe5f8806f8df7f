//go:build !amd64

package guestmem

import (
	"fmt"
	"runtime"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
)

// injector needs to know the registers of the processor.
type injector struct{}

func newInjector(twinRequest) (*injector, error) {
	return nil, fmt.Errorf("%w: twin on %s", errdef.ErrUnsupported, runtime.GOARCH)
}

func (x *injector) twin(func() bool) (*linux.Tracee, error) { return nil, errdef.ErrUnsupported }
