/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Extends RTMR[2] with 48 bytes of 0xA5, then reports as mr_report does (report data zero). RTMR index 4
   must be refused. */
	.include "tdx.inc"
	PAYLOAD
	/* The page is at the GPA in the first 8 bytes of the parameter page, or at 1 MiB. */
guest_main:
	movq	(%rsi), %rbx
	testq	%rbx, %rbx
	jnz	10f
	movl	$0x100000, %ebx
10:
	movl	$digest, %ecx
	movl	$2, %edx
	TDCALL_LEAF TDG_MR_RTMR_EXTEND
	CHECK_TDCALL 10
	REPORT_TO_SHARED %rbx, report_data
	TDVMCALL_PORT_OUT PORT_TEST, 4, %rbx
	CHECK_TDVMCALL 11
	movl	$digest, %ecx
	movl	$4, %edx
	TDCALL_LEAF TDG_MR_RTMR_EXTEND
	btq	$63, %rax
	jc	30f
	movl	$12, %edi
	jmp	guest_failed
30:	SUCCESS
	ret

	PAYLOAD_DATA
	.balign	1024, 0
	.globl	td_report
td_report:
	.fill	1024, 1, 0
	.balign	64, 0
	.globl	report_data
report_data:
	.fill	64, 1, 0
	.balign	64, 0
digest:
	.fill	48, 1, 0xa5
	.fill	16, 1, 0
