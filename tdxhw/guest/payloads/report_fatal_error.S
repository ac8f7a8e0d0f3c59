/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Reports a fatal error with the code 0x0BAAAAAD00000000 and no GPA. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	movabsq	$0x0baaaaad00000000, %rbx
	REPORT_FATAL_ERROR %rbx
	ret
