/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Accepts a pending page with TDG.MEM.PAGE.ACCEPT; it must read as zero and keep what is written. */
	.include "tdx.inc"
	PAYLOAD
	/* The page is at the GPA in the first 8 bytes of the parameter page, or at 1 MiB. */
guest_main:
	movq	(%rsi), %rbx
	testq	%rbx, %rbx
	jnz	10f
	movl	$0x100000, %ebx
10:
	ACCEPT_PAGE %rbx
	CHECK_TDCALL 1
	cmpq	$0, (%rbx)
	CHECK_EQUAL 2
	movq	$0x1234, (%rbx)
	cmpq	$0x1234, (%rbx)
	CHECK_EQUAL 3
	SUCCESS
	ret
