/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Executes a VEX-encoded addition: right where the CPU has AVX, a clear stop where an engine has not. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	movl	$1, %eax
	movd	%eax, %xmm1
	movd	%eax, %xmm2
	vpaddd	%xmm2, %xmm1, %xmm0
	movd	%xmm0, %ebx
	PORT_OUT PORT_TEST, 4, %rbx
	SUCCESS
	ret
