/* SPDX-License-Identifier: GPL-2.0-or-later */
/* TDG.VP.VMCALL<GetTdVmCallInfo> for leaf 0 must return zeros in R11 to R14. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	xorl	%r12d, %r12d
	movq	$-1, %r13
	movq	$-1, %r14
	TDVMCALL TDVMCALL_GET_TD_VM_CALL_INFO
	CHECK_TDVMCALL 1
	testq	%r11, %r11
	CHECK_EQUAL 2
	testq	%r12, %r12
	CHECK_EQUAL 3
	testq	%r13, %r13
	CHECK_EQUAL 4
	testq	%r14, %r14
	CHECK_EQUAL 5
	SUCCESS
	ret
