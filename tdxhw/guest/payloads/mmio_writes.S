/* SPDX-License-Identifier: GPL-2.0-or-later */
/* MMIO writes of 1, 2, 4 and 8 bytes at 0x80000000; 10 bytes, and 8 bytes across a page boundary
   of private GPAs, are INVALID_OPERAND. */
	.include "tdx.inc"
	PAYLOAD
	.set	MMIO, 0x80000000
guest_main:
	movl	$MMIO, %ebx
	TDVMCALL_MMIO_WRITE %rbx, 1, $0x12
	CHECK_TDVMCALL 1
	TDVMCALL_MMIO_WRITE %rbx, 2, $0x1234
	CHECK_TDVMCALL 2
	TDVMCALL_MMIO_WRITE %rbx, 4, $0x12345678
	CHECK_TDVMCALL 3
	movabsq	$0x1234567890abcdef, %rbp
	TDVMCALL_MMIO_WRITE %rbx, 8, %rbp
	CHECK_TDVMCALL 4
	TDVMCALL_MMIO_WRITE %rbx, 10, $0
	CHECK_INVALID_OPERAND 5
	/* Without the shared bit: v17 refuses it for the page boundary, mainline for the private GPA. */
	movq	%rbp, %r15
	leaq	4095(%rbx), %r14
	movl	$8, %r12d
	movl	$1, %r13d
	TDVMCALL TDVMCALL_MMIO
	CHECK_INVALID_OPERAND 6
	SUCCESS
	ret
