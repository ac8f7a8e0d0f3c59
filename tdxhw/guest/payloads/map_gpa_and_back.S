/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Converts a page to shared and back to private: after accepting it again it reads as zero. */
	.include "tdx.inc"
	PAYLOAD
	/* The page is at the GPA in the first 8 bytes of the parameter page, or at 1 MiB. */
guest_main:
	movq	(%rsi), %rbx
	testq	%rbx, %rbx
	jnz	10f
	movl	$0x100000, %ebx
10:
	MAP_SHARED %rbx, 1
	movabsq	$SHARED_ALIAS, %rbp
	addq	%rbx, %rbp
	movq	$0xcafe, (%rbp)
20:	MAP_GPA	%rbx, $4096
	cmpq	$TDVMCALL_RETRY, %r10
	je	20b
	CHECK_TDVMCALL 2
	ACCEPT_PAGE %rbx
	CHECK_TDCALL 3
	cmpq	$0, (%rbx)
	CHECK_EQUAL 4
	SUCCESS
	ret
