/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Writes 0x1234 to a page without accepting it, and sends what it then holds to the test port. */
	.include "tdx.inc"
	PAYLOAD
	/* The page is at the GPA in the first 8 bytes of the parameter page, or at 1 MiB. */
guest_main:
	movq	(%rsi), %rbx
	testq	%rbx, %rbx
	jnz	10f
	movl	$0x100000, %ebx
10:
	movq	$0x1234, (%rbx)
	movq	(%rbx), %rbp
	PORT_OUT PORT_TEST, 4, %rbp
	SUCCESS
	ret
