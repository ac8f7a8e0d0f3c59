/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Port reads of 1, 2 and 4 bytes, which the host answers with 0xAB, 0xABCD and 0xFFABCDEF; 5 bytes are
   INVALID_OPERAND. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	TDVMCALL_PORT_IN PORT_TEST, 1
	CHECK_TDVMCALL 1
	cmpq	$0xab, %r11
	CHECK_EQUAL 2
	TDVMCALL_PORT_IN PORT_TEST, 2
	CHECK_TDVMCALL 3
	cmpq	$0xabcd, %r11
	CHECK_EQUAL 4
	TDVMCALL_PORT_IN PORT_TEST, 4
	CHECK_TDVMCALL 5
	movl	$0xffabcdef, %ebx
	cmpq	%rbx, %r11
	CHECK_EQUAL 6
	TDVMCALL_PORT_IN PORT_TEST, 5
	CHECK_INVALID_OPERAND 7
	SUCCESS
	ret
