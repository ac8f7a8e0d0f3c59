/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Writes a TDREPORT over the report data 0, 1, 2, … 63 into a shared page and sends the GPA of that page
   to the test port. */
	.include "tdx.inc"
	PAYLOAD
	/* The page is at the GPA in the first 8 bytes of the parameter page, or at 1 MiB. */
guest_main:
	movq	(%rsi), %rbx
	testq	%rbx, %rbx
	jnz	10f
	movl	$0x100000, %ebx
10:
	REPORT_TO_SHARED %rbx, report_data
	TDVMCALL_PORT_OUT PORT_TEST, 4, %rbx
	CHECK_TDVMCALL 4
	SUCCESS
	ret

	PAYLOAD_DATA
	.balign	1024, 0
	.globl	td_report
td_report:
	.fill	1024, 1, 0
	.balign	64, 0
	.globl	report_data
report_data:
	.set	value, 0
	.rept	64
	.byte	value
	.set	value, value + 1
	.endr
