/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Benchmark: as many rounds of a linear congruential generator as the first 8 bytes of the parameter page
   say (or 100 million); sends the last value. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	movq	(%rsi), %rbp
	testq	%rbp, %rbp
	jnz	1f
	movl	$100000000, %ebp
1:	movl	$1, %ebx
2:	imull	$1664525, %ebx, %ebx
	addl	$1013904223, %ebx
	movl	%ebx, %eax
	shrl	$16, %eax
	xorl	%eax, %ebx
	decq	%rbp
	jnz	2b
	PORT_OUT PORT_TEST, 4, %rbx
	SUCCESS
	ret
