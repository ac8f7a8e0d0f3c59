/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Converts a page to shared, writes 0xCAFE there, and sends what the host has put in its place to the test
   port. */
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
	TDVMCALL_PORT_OUT PORT_TEST, 4, %rbx
	CHECK_TDVMCALL 2
	movq	(%rbp), %rdi
	TDVMCALL_PORT_OUT PORT_TEST, 4, %rdi
	CHECK_TDVMCALL 3
	SUCCESS
	ret
