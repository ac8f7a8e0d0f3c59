/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Writes 4, 5 and 6 to the MSRs 0x200, 0x202 and 0x204; the second must be refused (a filter allows only
   its reads). */
	.include "tdx.inc"
	PAYLOAD
	/* IA32_MTRR_PHYSBASE0, 1 and 2 */
	.set	MSR_ALLOWED, 0x200
	.set	MSR_READ_ONLY, 0x202
	.set	MSR_WRITE_ONLY, 0x204
guest_main:
	TDVMCALL_WRITE_MSR MSR_ALLOWED, $4
	CHECK_TDVMCALL 1
	TDVMCALL_WRITE_MSR MSR_READ_ONLY, $5
	CHECK_INVALID_OPERAND 2
	TDVMCALL_WRITE_MSR MSR_WRITE_ONLY, $6
	CHECK_TDVMCALL 3
	SUCCESS
	ret
