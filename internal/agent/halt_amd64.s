#include "textflag.h"

// func outb(port uint16, value uint8)
TEXT ·outb(SB), NOSPLIT, $0-3
	MOVW port+0(FP), DX
	MOVB value+2(FP), AX
	OUTB
	RET

// func outb2(first, second uint16)
TEXT ·outb2(SB), NOSPLIT, $0-4
	MOVW first+0(FP), DX
	MOVW second+2(FP), BX
	MOVB $1, AX
	OUTB
	MOVW BX, DX
	OUTB
	RET
