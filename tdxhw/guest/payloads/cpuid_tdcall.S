/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Sends what TDG.VP.VMCALL<CPUID> returns for leaf 1 in R12 to R15 to the test port. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	movl	$1, %r12d
	xorl	%r13d, %r13d
	TDVMCALL TDVMCALL_CPUID
	CHECK_TDVMCALL 1
	movq	%r12, %rbx
	movq	%r13, %rbp
	movq	%r14, %rsi
	movq	%r15, %rdi
	TDVMCALL_PORT_OUT PORT_TEST, 4, %rbx
	TDVMCALL_PORT_OUT PORT_TEST, 4, %rbp
	TDVMCALL_PORT_OUT PORT_TEST, 4, %rsi
	TDVMCALL_PORT_OUT PORT_TEST, 4, %rdi
	SUCCESS
	ret
