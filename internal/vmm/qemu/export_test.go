package qemu

import (
	"context"
	"encoding/json"
	"os"

	"github.com/tinevm/tine/internal/vmm"
)

// Execute runs one command of the control connection.
func Execute(ctx context.Context, vm vmm.VM, name string, args map[string]any) (json.RawMessage, error) {
	control, err := vm.(*machine).monitor(ctx)
	if err != nil {
		return nil, err
	}
	return control.execute(ctx, command{Execute: name, Arguments: args})
}

// OpenTap makes a tap that a machine's network card can be at, in the network
// namespace of the thread. It is there for as long as the file is open.
func OpenTap(name string) (*os.File, error) { return openTap(name, tapFlags) }
