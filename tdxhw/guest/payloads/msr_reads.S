/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Sends the MSRs 0x200 and 0x202 to the test port; 0x204 must be refused (a filter allows only its
   writes). */
	.include "tdx.inc"
	PAYLOAD
	/* IA32_MTRR_PHYSBASE0, 1 and 2 */
	.set	MSR_ALLOWED, 0x200
	.set	MSR_READ_ONLY, 0x202
	.set	MSR_WRITE_ONLY, 0x204
guest_main:
	TDVMCALL_READ_MSR MSR_ALLOWED
	CHECK_TDVMCALL 1
	movq	%r11, %rbx
	TDVMCALL_PORT_OUT PORT_TEST, 4, %rbx
	TDVMCALL_READ_MSR MSR_READ_ONLY
	CHECK_TDVMCALL 2
	movq	%r11, %rbx
	TDVMCALL_PORT_OUT PORT_TEST, 4, %rbx
	TDVMCALL_READ_MSR MSR_WRITE_ONLY
	CHECK_INVALID_OPERAND 3
	SUCCESS
	ret
