/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Writes 0xAB to the test port and wants to read back one more. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	TDVMCALL_PORT_OUT PORT_TEST, 1, $0xab
	CHECK_TDVMCALL 1
	TDVMCALL_PORT_IN PORT_TEST, 1
	CHECK_TDVMCALL 2
	cmpq	$0xac, %r11
	CHECK_EQUAL 3
	SUCCESS
	ret
