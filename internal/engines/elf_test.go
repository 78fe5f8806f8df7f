package engines

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"testing"
)

// The kernel is what a loader takes, and its jumps go where they should.
func TestELFImage(t *testing.T) {
	t.Parallel()
	image := elfImage()
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		t.Fatal(err)
	}
	if f.Type != elf.ET_EXEC || f.Machine != elf.EM_X86_64 || len(f.Progs) != 1 {
		t.Fatalf("%+v with %d segments", f.FileHeader, len(f.Progs))
	}
	segment := f.Progs[0].ProgHeader
	if segment.Type != elf.PT_LOAD || segment.Paddr != elfAddress || segment.Filesz != uint64(len(image)) || segment.Filesz != segment.Memsz {
		t.Errorf("segment %+v", segment)
	}
	if segment.Paddr+segment.Memsz > 2<<20 || f.Entry != elfAddress+elfHeaders {
		t.Errorf("entered at %#x of %+v", f.Entry, segment)
	}

	code := image[elfHeaders:]
	target := func(at int, instruction ...byte) int { // of a jump with 1 or 4 bytes of distance
		size := 1
		if instruction[0] == 0xe8 || len(instruction) == 3 {
			size = 4
		}
		begin := at + len(instruction)
		if !bytes.Equal(code[at:begin], instruction) {
			t.Fatalf("no % x at %#x", instruction, at)
		}
		if size == 1 {
			return begin + 1 + int(int8(code[begin]))
		}
		return begin + 4 + int(int32(binary.LittleEndian.Uint32(code[begin:])))
	}
	if at := target(0x17, 0xe8); !bytes.HasPrefix(code[at:], work()) {
		t.Errorf("work is not at %#x", at)
	}
	if at := target(0x1f, 0x75); !bytes.HasPrefix(code[at:], []byte{0xb0, 0xfe, 0xe6, 0x64}) {
		t.Errorf("the end is not at %#x", at)
	}
	words := target(0x21, 0x48, 0x8d, 0x35)
	if string(code[words:]) != elfWords+"\n" || int(code[0x29]) != len(code)-words {
		t.Errorf("%d bytes of %q are said", code[0x29], code[words:])
	}
	if at := target(0x33, 0xe2); code[at] != 0xac {
		t.Errorf("it goes on at %#x", at)
	}
}
