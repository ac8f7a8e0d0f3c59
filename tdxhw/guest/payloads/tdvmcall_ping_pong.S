/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Benchmark: as many 4-byte port writes as the first 8 bytes of the parameter page say (or 1000), counting
   down. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	movq	(%rsi), %rbx
	testq	%rbx, %rbx
	jnz	1f
	movl	$1000, %ebx
1:	TDVMCALL_PORT_OUT PORT_TEST, 4, %rbx
	decq	%rbx
	jnz	1b
	SUCCESS
	ret
