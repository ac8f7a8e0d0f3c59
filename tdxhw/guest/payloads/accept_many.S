/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Benchmark: a port write, then TDG.MEM.PAGE.ACCEPT of as many 4 KiB pages from GPA 0 on as the first 8 bytes of
   the parameter page say, then another port write. Each page faults to the host once. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	movq	(%rsi), %rbp
	xorl	%ebx, %ebx
	TDVMCALL_PORT_OUT PORT_TEST, 4, $0
1:	movq	%rbx, %rcx
	TDCALL_LEAF TDG_MEM_PAGE_ACCEPT
	CHECK_TDCALL 1
	addq	$4096, %rbx
	decq	%rbp
	jnz	1b
	TDVMCALL_PORT_OUT PORT_SUCCESS, 4, $0
	ret
