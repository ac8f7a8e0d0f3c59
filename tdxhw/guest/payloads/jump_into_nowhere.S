/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Jumps to an address at which there is no memory. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	movl	$0xdead0000, %eax
	jmp	*%rax
