package engines

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
)

const (
	// elfAddress is where kernels are loaded and entered: the lowest address that
	// Firecracker takes for one (HIMEM_START in src/vmm/src/arch/x86_64/layout.rs).
	elfAddress = 1 << 20
	elfHeaders = 64 + 56 // of the file and of its one segment
	// elfWords is what our kernel says when all is well.
	elfWords = "tine: the probe machine works"
)

// elfImage is a kernel for monitors that enter an ELF file by Linux's 64-bit boot
// protocol. It has no PVH note, which would have it entered in 32-bit mode.
func elfImage() []byte { return elfFile(elfProgram(work())) }

// elfFile is an ELF file with a program that is entered at its first byte.
func elfFile(program []byte) []byte {
	var image bytes.Buffer
	size := uint64(elfHeaders + len(program))
	header := elf.Header64{
		Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Entry: elfAddress + elfHeaders, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1,
	}
	segment := elf.Prog64{
		Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_W | elf.PF_X),
		Vaddr: elfAddress, Paddr: elfAddress, Filesz: size, Memsz: size, Align: 4096,
	}
	for _, part := range []any{header, segment, program} {
		_ = binary.Write(&image, binary.LittleEndian, part) // a buffer takes all
	}
	return image.Bytes()
}

// elfProgram is code for the processor as Firecracker leaves it: in 64-bit mode,
// with the first GiB mapped to itself, its tables between 0x9000 and 0xc000, and
// without vector instructions (src/vmm/src/arch/x86_64/regs.rs). It calls work,
// says elfWords on the first serial port if that is done well, and resets the
// machine by its keyboard controller, which ends Firecracker with status 0. So
// does a machine that breaks down, but without the words.
func elfProgram(work []byte) []byte {
	words := elfWords + "\n"
	return bytes.Join([][]byte{
		{0xfa},                         // cli
		{0xfc},                         // cld
		{0xbc, 0x00, 0x80, 0x00, 0x00}, // movl $0x8000, %esp
		{0xb8, 0x20, 0x06, 0x00, 0x00}, // movl $0x620, %eax (PAE, OSFXSR, OSXMMEXCPT)
		{0x0f, 0x22, 0xe0},             // movq %rax, %cr4
		{0xb8, 0x03, 0x00, 0x00, 0x80}, // movl $0x80000003, %eax (PG, MP, PE)
		{0x0f, 0x22, 0xc0},             // movq %rax, %cr0
		{0xe8, 0x20, 0x00, 0x00, 0x00}, // call work
		{0x83, 0xf8, workAnswer},       // cmpl $0x2a, %eax
		{0x75, 0x14},                   // jne leave
		// One byte at a time: Firecracker's serial port takes no string.
		{0x48, 0x8d, 0x35, byte(0x14 + len(work)), 0x00, 0x00, 0x00}, // leaq words(%rip), %rsi
		{0xb9, byte(len(words)), 0x00, 0x00, 0x00},                   // movl $..., %ecx
		{0x66, 0xba, 0xf8, 0x03},                                     // movw $0x3f8, %dx
		{0xac},                                                       // say: lodsb
		{0xee},                                                       // outb %al, %dx
		{0xe2, 0xfc},                                                 // loop say
		{0xb0, 0xfe},                                                 // leave: movb $0xfe, %al
		{0xe6, 0x64},                                                 // outb %al, $0x64
		{0xf4},                                                       // stop: hlt
		{0xeb, 0xfd},                                                 // jmp stop
		work,
		[]byte(words),
	}, nil)
}
