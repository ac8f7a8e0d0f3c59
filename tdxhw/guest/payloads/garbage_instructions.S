/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Executes bytes that are no instruction: #UD, which the exception handler reports as 0xEC000006. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	.byte	0x0f, 0x04, 0xd6, 0xff, 0xff
	ret
