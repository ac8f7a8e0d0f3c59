/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Never leaves the guest by itself. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	jmp	guest_main
