/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Asks to be notified by an interrupt of vector 0x20, then takes one that the host sends while it has the vCPU (port
 * value 1), one that wakes it from HLT (2), and one that it sends itself (3), and reports how many came.
 */
	.include "tdx.inc"

	.set	IDT, IMAGE + 0x2000
	.set	EXCEPTIONS, 32
	.set	NOTIFY_VECTOR, 0x20
	.set	MSR_X2APIC_EOI, 0x80b
	.set	MSR_X2APIC_SPIV, 0x80f
	.set	MSR_X2APIC_SELF_IPI, 0x83f
	.set	SPIV_ENABLED, 0x1ff

/* Wait, in HLT with interrupts disabled, until RBX interrupts were counted; enable them in between. */
.macro WAIT_FOR_INTERRUPTS
779:	cli
	cmpq	%rbx, interrupts(%rip)
	jae	778f
	TDVMCALL_HALT 0
	CHECK_TDVMCALL 3
	sti
	nop
	jmp	779b
778:
.endm

	PAYLOAD
guest_main:
	/* The boot code's 32 gates, and one more. */
	movl	$IDT, %esi
	movl	$idt, %edi
	movl	$(EXCEPTIONS * 2), %ecx
	rep movsq
	lidt	idtr_33(%rip)

	/* The host delivers nothing to an APIC that is not software-enabled. */
	TDVMCALL_WRITE_MSR MSR_X2APIC_SPIV, $SPIV_ENABLED
	CHECK_TDVMCALL 1
	movl	$NOTIFY_VECTOR, %r12d
	TDVMCALL TDVMCALL_SETUP_EVENT_NOTIFY_INTERRUPT
	CHECK_TDVMCALL 2

	movl	$1, %ebx
	sti
	PORT_OUT PORT_TEST, 4, %rbx
	cli
	cmpq	%rbx, interrupts(%rip)
	CHECK_EQUAL 4

	incl	%ebx
	PORT_OUT PORT_TEST, 4, %rbx
	WAIT_FOR_INTERRUPTS

	incl	%ebx
	movl	$MSR_X2APIC_SELF_IPI, %ecx
	movl	$NOTIFY_VECTOR, %eax
	xorl	%edx, %edx
	wrmsr
	cmpq	$2, interrupts(%rip)
	CHECK_EQUAL 5
	sti
	nop
	cli
	cmpq	%rbx, interrupts(%rip)
	CHECK_EQUAL 6
	PORT_OUT PORT_TEST, 4, %rbx
	SUCCESS
	ret

notify_interrupt:
	pushq	%rax
	pushq	%rcx
	pushq	%rdx
	incq	interrupts(%rip)
	movl	$MSR_X2APIC_EOI, %ecx
	xorl	%eax, %eax
	xorl	%edx, %edx
	wrmsr
	popq	%rdx
	popq	%rcx
	popq	%rax
	iretq

	PAYLOAD_DATA
	.globl	interrupts
interrupts:
	.quad	0
idtr_33:
	.word	(EXCEPTIONS + 1) * 16 - 1
	.quad	idt
	.balign	16, 0
idt:
	.fill	EXCEPTIONS * 16, 1, 0
	/* An interrupt gate of the 64-bit code segment; the payload's code is at IMAGE + 0xa000. */
	.word	PAYLOAD_CODE_LOW + (notify_interrupt - guest_main), 8, 0x8e00, 0xffff
	.long	0, 0
	.set	PAYLOAD_CODE_LOW, 0xa000
