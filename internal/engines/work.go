package engines

import "bytes"

// workAnswer is what work returns.
const workAnswer = 0x2a

// work is a function in 64-bit code, for any address, that returns workAnswer in
// %eax if the processor does what it should: it fills 4 KiB at 0x4000 with the
// number 21, adds them all up, and doubles the sum in a vector register. It needs
// the first 2 MiB mapped, a stack, and vector instructions enabled in %cr4.
func work() []byte {
	return bytes.Join([][]byte{
		{0x53},                                     // pushq %rbx
		{0xb8, 0x00, 0x00, 0x00, 0x00},             // movl $0, %eax
		{0x0f, 0xa2},                               // cpuid
		{0xbf, 0x00, 0x40, 0x00, 0x00},             // movl $0x4000, %edi
		{0xb9, 0x00, 0x02, 0x00, 0x00},             // movl $512, %ecx
		{0x48, 0xc7, 0xc0, 0x15, 0x00, 0x00, 0x00}, // movq $21, %rax
		{0xf3, 0x48, 0xab},                         // rep stosq
		{0xbe, 0x00, 0x40, 0x00, 0x00},             // movl $0x4000, %esi
		{0xb9, 0x00, 0x02, 0x00, 0x00},             // movl $512, %ecx
		{0x31, 0xd2},                               // xorl %edx, %edx
		{0x48, 0xad},                               // sum: lodsq
		{0x48, 0x01, 0xc2},                         // addq %rax, %rdx
		{0xe2, 0xf9},                               // loop sum
		{0x81, 0xfa, 0x00, 0x2a, 0x00, 0x00},       // cmpl $10752, %edx
		{0x75, 0x27},                               // jne bad
		{0x66, 0x48, 0x0f, 0x6e, 0xc2},             // movq %rdx, %xmm0
		{0x66, 0x0f, 0xd4, 0xc0},                   // paddq %xmm0, %xmm0
		{0x66, 0x48, 0x0f, 0x7e, 0xc0},             // movq %xmm0, %rax
		{0x48, 0x3d, 0x00, 0x54, 0x00, 0x00},       // cmpq $21504, %rax
		{0x75, 0x11},                               // jne bad
		{0xf0, 0x48, 0x0f, 0xb1, 0x14, 0x25, 0x00, 0x40, 0x00, 0x00}, // lock cmpxchgq %rdx, 0x4000
		{0xb8, workAnswer, 0x00, 0x00, 0x00},                         // movl $0x2a, %eax
		{0xeb, 0x02},                                                 // jmp out
		{0x31, 0xc0},                                                 // bad: xorl %eax, %eax
		{0x5b},                                                       // out: popq %rbx
		{0xc3},                                                       // ret
	}, nil)
}
