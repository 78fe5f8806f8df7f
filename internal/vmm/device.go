package vmm

import (
	"errors"
	"os"
)

// WriteDevice makes the file of device state at path, as VM.SaveDevice and
// VM.Freeze promise: it must not exist, which is os.ErrExist, and on any error
// there is none. It does not sync the file.
func WriteDevice(path string, state []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(state)
	if err = errors.Join(err, f.Close()); err != nil {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}
