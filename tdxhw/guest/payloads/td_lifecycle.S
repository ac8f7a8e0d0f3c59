/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The whole life of a TD: one write to the success port, through TDG.VP.VMCALL. */
	.include "tdx.inc"
	PAYLOAD
guest_main:
	TDVMCALL_PORT_OUT PORT_SUCCESS, 4, $0
	CHECK_TDVMCALL 1
	ret
