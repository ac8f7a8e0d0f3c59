/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Sends EAX, EBX, ECX and EDX of CPUID leaf 1 to the test port. (The instruction, not the TDVMCALL.) */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	movl	$1, %eax
	xorl	%ecx, %ecx
	cpuid
	movl	%eax, %esi
	movl	%ecx, %ebp
	movl	%edx, %edi
	PORT_OUT PORT_TEST, 4, %rsi
	PORT_OUT PORT_TEST, 4, %rbx
	PORT_OUT PORT_TEST, 4, %rbp
	PORT_OUT PORT_TEST, 4, %rdi
	SUCCESS
	ret
