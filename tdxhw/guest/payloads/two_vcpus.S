/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Every vCPU sends its index; each waits until two have counted themselves, and reports success. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	movl	%edi, %ebx
	PORT_OUT PORT_TEST, 4, %rbx
	lock incl counter(%rip)
1:	pause
	cmpl	$2, counter(%rip)
	jb	1b
	SUCCESS
	ret

	PAYLOAD_DATA
	.globl	counter
counter:
	.long	0
