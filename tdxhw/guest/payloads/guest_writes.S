/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Port writes of 1, 2 and 4 bytes; 5 bytes are INVALID_OPERAND. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	TDVMCALL_PORT_OUT PORT_TEST, 1, $0xab
	CHECK_TDVMCALL 1
	TDVMCALL_PORT_OUT PORT_TEST, 2, $0xabcd
	CHECK_TDVMCALL 2
	movl	$0xffabcdef, %ebx
	TDVMCALL_PORT_OUT PORT_TEST, 4, %rbx
	CHECK_TDVMCALL 3
	TDVMCALL_PORT_OUT PORT_TEST, 5, $4
	CHECK_INVALID_OPERAND 4
	SUCCESS
	ret
