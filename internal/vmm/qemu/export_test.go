package qemu

import (
	"context"
	"encoding/json"

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

// AddDisk gives a machine the file of a node, and returns its name there.
func AddDisk(ctx context.Context, vm vmm.VM, node, path string) (string, error) {
	m := vm.(*machine)
	control, err := m.monitor(ctx)
	if err != nil {
		return "", err
	}
	return m.addDisk(ctx, control, node, path)
}
