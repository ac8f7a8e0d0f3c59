/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Halts with interrupts blocked; the host must wake it by making it runnable. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	TDVMCALL_HALT 1
	CHECK_TDVMCALL 1
	SUCCESS
	ret
