/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Sends RCX, RDX, R8, R9, R10 and R11 of TDG.VP.INFO to the test port, each as two 32-bit halves, low half
   first. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	TDCALL_LEAF TDG_VP_INFO
	CHECK_TDCALL 1
	movq	%rcx, %rbx
	movq	%rdx, %rbp
	movq	%r10, %rsi
	movq	%r11, %rdi
	.irp	register, rbx, rbp, r8, r9, rsi, rdi
	TDVMCALL_PORT_OUT PORT_TEST, 4, %\register
	shrq	$32, %\register
	TDVMCALL_PORT_OUT PORT_TEST, 4, %\register
	.endr
	SUCCESS
	ret
