package jail

import (
	"bytes"
	"debug/elf"
	"errors"
	"io"
	"os"
)

// loaderOf is the loader that an ELF file names, or for a shared library the one
// of its architecture. It is empty for a static program and for what is no ELF
// file.
func loaderOf(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }() // only read
	var magic [4]byte
	if _, err = io.ReadFull(f, magic[:]); err != nil || !bytes.Equal(magic[:], []byte(elf.ELFMAG)) {
		return "", nil //nolint:nilerr // firmware may be of any size
	}
	e, err := elf.NewFile(f)
	if _, bad := errors.AsType[*elf.FormatError](err); bad {
		return "", nil // firmware may be of any form
	}
	if err != nil {
		return "", err
	}
	for _, p := range e.Progs {
		if p.Type == elf.PT_INTERP {
			name, err := io.ReadAll(io.LimitReader(p.Open(), 4096))
			return string(bytes.TrimRight(name, "\x00")), err
		}
	}
	if e.Machine == elf.EM_X86_64 && e.Type == elf.ET_DYN && e.Section(".dynamic") != nil && e.Class == elf.ELFCLASS64 {
		libs, err := e.ImportedLibraries()
		if err == nil && len(libs) > 0 {
			return "/lib64/ld-linux-x86-64.so.2", nil // of the System V ABI for x86-64
		}
	}
	return "", nil
}
