/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Writes 0xAB to the test port, sends back one more than what it reads there, and halts. For a TD and for
   an ordinary VM. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	PORT_OUT PORT_TEST, 1, $0xab
	PORT_IN	PORT_TEST, 1
	leaq	1(%r11), %rbx
	PORT_OUT PORT_TEST, 1, %rbx
	SUCCESS
	ret
