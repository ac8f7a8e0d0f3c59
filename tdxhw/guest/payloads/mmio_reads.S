/* SPDX-License-Identifier: GPL-2.0-or-later */
/* MMIO reads of 1, 2, 4 and 8 bytes at 0x80000000, answered with leading bytes of 0x1234567890ABCDEF's
   digits; 10 bytes are INVALID_OPERAND. */
	.include "tdx.inc"
	PAYLOAD
	.set	MMIO, 0x80000000
guest_main:
	movl	$MMIO, %ebx
	TDVMCALL_MMIO_READ %rbx, 1
	CHECK_TDVMCALL 1
	cmpq	$0x12, %r11
	CHECK_EQUAL 2
	TDVMCALL_MMIO_READ %rbx, 2
	CHECK_TDVMCALL 3
	cmpq	$0x1234, %r11
	CHECK_EQUAL 4
	TDVMCALL_MMIO_READ %rbx, 4
	CHECK_TDVMCALL 5
	cmpq	$0x12345678, %r11
	CHECK_EQUAL 6
	TDVMCALL_MMIO_READ %rbx, 8
	CHECK_TDVMCALL 7
	movabsq	$0x1234567890abcdef, %rbp
	cmpq	%rbp, %r11
	CHECK_EQUAL 8
	TDVMCALL_MMIO_READ %rbx, 10
	CHECK_INVALID_OPERAND 9
	SUCCESS
	ret
