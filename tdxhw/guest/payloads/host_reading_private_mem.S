/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Fills a private page with 0x5A, tells where it is (two 32-bit halves), and checks it after the host has
   looked. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	movl	$private_page, %edi
	movl	$0x5a5a5a5a, %eax
	movl	$1024, %ecx
	rep stosl
	movl	$private_page, %ebx
	TDVMCALL_PORT_OUT PORT_TEST, 4, %rbx
	CHECK_TDVMCALL 1
	TDVMCALL_PORT_OUT PORT_TEST, 4, $0
	CHECK_TDVMCALL 2
	movl	$private_page, %edi
	movl	$0x5a5a5a5a, %eax
	movl	$1024, %ecx
	repe scasl
	CHECK_EQUAL 3
	SUCCESS
	ret

	PAYLOAD_DATA
	.balign	4096, 0
	.globl	private_page
private_page:
	.fill	4096, 1, 0
