/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Raises an exception with an empty IDT. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	pushq	$0
	pushq	$0
	lidt	(%rsp)
	ud2
