package snapshot

import (
	"fmt"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/vmm"
)

// CheckRoom returns errdef.ErrExhausted unless the disk of dir can take all of a
// template's memory: one that ran out of it while the machine writes would end
// the machine without a word.
func CheckRoom(dir string, m vmm.Machine) error {
	need := int64(m.MemoryMiB) << 20
	free, err := linux.FreeSpace(dir)
	if err != nil {
		return err
	}
	if free < need {
		err = fmt.Errorf("%w: %d MiB are free where snapshots are kept, and the template's memory may need %d", errdef.ErrExhausted, free>>20, need>>20)
		return errdef.WithHint(err, "free some space: tine snapshot gc, tine image rm")
	}
	return nil
}
