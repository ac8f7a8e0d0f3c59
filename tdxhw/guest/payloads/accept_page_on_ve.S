/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Touches a pending page: the #VE handler accepts it. The TD must have SEPT_VE_DISABLE clear. */
	.include "tdx.inc"
	PAYLOAD
	/* The page is at the GPA in the first 8 bytes of the parameter page, or at 1 MiB. */
guest_main:
	movq	(%rsi), %rbx
	testq	%rbx, %rbx
	jnz	10f
	movl	$0x100000, %ebx
10:
	cmpq	$0, (%rbx)
	CHECK_EQUAL 1
	cmpq	$1, ve_count(%rip)
	CHECK_EQUAL 2
	movq	$0x1234, (%rbx)
	cmpq	$0x1234, (%rbx)
	CHECK_EQUAL 3
	cmpq	$1, ve_count(%rip)
	CHECK_EQUAL 4
	SUCCESS
	ret
