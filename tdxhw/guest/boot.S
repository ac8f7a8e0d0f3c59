/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * From reset to guest_main, in a TD and in an ordinary VM. The image is 16 pages and ends at 4 GiB:
 *
 *	0xffff0000	PML4
 *	0xffff1000	PDPT: entries 0-3 identity (low 4 GiB), 4-7 the same through the shared bit
 *	0xffff2000	IDT, GDT, and what the boot code found out
 *	0xffff3000	parameter page: the harness may write it before the image is measured
 *	0xffff4000	16 stacks of 512 bytes, by vCPU index
 *	0xffff6000	two page directories, for an ordinary VM (1 GiB pages need a CPUID bit there)
 *	0xffff8000	payload data
 *	0xffffa000	payload code
 *	0xfffff000	this code; vector n is at 0xfffff800 + 16 n; the reset vector
 *
 * A TD starts in flat 32-bit protected mode with EBX = GPAW, ESI = vCPU index, RCX = R8 = what
 * KVM_TDX_INIT_VCPU handed over, and IA32_EFER.LME set (TDX Module Base Spec, "Initial State of TD
 * Guest VCPU"). An ordinary VM starts in real mode at the same address. The first instructions
 * encode the same in both modes.
 */
	.include "tdx.inc"

	.set	CODE_SELECTOR, 0x08	/* 64-bit */
	.set	DATA_SELECTOR, 0x10
	.set	CODE32_SELECTOR, 0x18
	.set	VECTORS, 0xfffff800
	.set	STACKS, 0xffff4000
	.set	STACK_BYTES, 512
	.set	DIRECTORIES, 0xffff6000

	.set	CR0_TD, 0x80010033	/* PG, WP, NE, ET, MP, PE */
	.set	CR4_TD, 0x660		/* OSXMMEXCPT, OSFXSR, MCE, PAE */
	.set	MSR_EFER, 0xc0000080
	.set	EFER_LME_NXE, 0x900

	.section .tables, "aw", @progbits
pml4:
	.quad	pdpt + 0x3
	.fill	511, 8, 0
pdpt:
	.quad	0x00000083, 0x40000083, 0x80000083, 0xc0000083
	.quad	0x00000083, 0x40000083, 0x80000083, 0xc0000083
	.fill	504, 8, 0

	.section .descriptors, "aw", @progbits
	/* 32 interrupt gates: the vectors are where arithmetic finds them. */
	.set	vector, 0
	.rept	32
	.word	(VECTORS + 16 * vector) & 0xffff, CODE_SELECTOR, 0x8e00, 0xffff
	.long	0, 0
	.set	vector, vector + 1
	.endr
gdt:
	.quad	0
	.quad	0x00af9b000000ffff	/* 64-bit code */
	.quad	0x00cf93000000ffff	/* data */
	.quad	0x00cf9b000000ffff	/* 32-bit code */
gdt_end:
gdtr:
	.word	gdt_end - gdt - 1
	.long	gdt
	.long	0
idtr:
	.word	32 * 16 - 1
	.quad	IMAGE + 0x2000
	.balign	8, 0
	.globl	shared_bit
shared_bit:	/* of a GPA; zero in an ordinary VM */
	.quad	0
	.globl	is_td
is_td:
	.byte	0
	.balign	8, 0
	.globl	ve_count
ve_count:	/* #VEs handled so far */
	.quad	0
	.org	0x1000, 0

	.section .parameters, "aw", @progbits
	.globl	parameters
parameters:
	.fill	0x1000, 1, 0

	.section .stacks, "aw", @progbits
	.fill	0x2000, 1, 0

	.section .directories, "aw", @progbits
	.fill	0x2000, 1, 0

	.section .boot, "awx", @progbits
	.code32
protected_start:
	/* ---- TD: flat 32-bit; RCX and R8 must survive ---- */
	lgdtl	gdtr
	movl	$(SHARED_BIT_48 >> 32), %eax
	andl	$0x3f, %ebx
	cmpl	$48, %ebx
	je	1f
	movl	$(SHARED_BIT_52 >> 32), %eax
1:	movl	%eax, shared_bit + 4
	movl	%eax, pdpt + 4 * 8 + 4
	movl	%eax, pdpt + 5 * 8 + 4
	movl	%eax, pdpt + 6 * 8 + 4
	movl	%eax, pdpt + 7 * 8 + 4
	movb	$1, is_td
	movl	%esi, %edi
enable_paging:
	movl	$CR4_TD, %eax
	movl	%eax, %cr4
	movl	$pml4, %eax
	movl	%eax, %cr3
	movl	$CR0_TD, %eax
	movl	%eax, %cr0
	ljmpl	$CODE_SELECTOR, $long_mode

	/* ---- Ordinary VM ---- */
	.code16
real_mode:
	lgdtl	%cs:(gdtr - IMAGE)
	orb	$1, %al
	movl	%eax, %cr0
	ljmpl	$CODE32_SELECTOR, $protected_mode
	.code32
protected_mode:
	movl	$DATA_SELECTOR, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	/* 2 MiB pages for the first and the last GiB of the low four. */
	movl	$DIRECTORIES, %edi
	movl	$0x83, %eax
1:	movl	%eax, (%edi)
	leal	0xc0000000(%eax), %edx
	movl	%edx, 0x1000(%edi)
	addl	$0x200000, %eax
	addl	$8, %edi
	cmpl	$DIRECTORIES + 0x1000, %edi
	jne	1b
	movl	$DIRECTORIES + 0x3, pdpt
	movl	$DIRECTORIES + 0x1003, pdpt + 3 * 8
	movl	$DIRECTORIES + 0x3, pdpt + 4 * 8
	movl	$DIRECTORIES + 0x1003, pdpt + 7 * 8
	movl	$1, %eax
	cpuid
	movl	%ebx, %edi
	shrl	$24, %edi	/* initial APIC ID */
	movl	$CR4_TD, %eax
	movl	%eax, %cr4
	movl	$MSR_EFER, %ecx
	rdmsr
	orl	$EFER_LME_NXE, %eax
	wrmsr
	xorl	%ecx, %ecx
	jmp	enable_paging

	/* ---- 64-bit mode: EDI is the vCPU index ---- */
	.code64
long_mode:
	movl	$DATA_SELECTOR, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	xorl	%eax, %eax
	movl	%eax, %fs
	movl	%eax, %gs
	cmpb	$0, is_td(%rip)
	jne	1f
	xorl	%r8d, %r8d
1:	movl	%edi, %eax
	incl	%eax
	imull	$STACK_BYTES, %eax, %eax
	addl	$STACKS, %eax
	movl	%eax, %esp
	lidt	idtr(%rip)
	movl	$PARAMETERS, %esi
	movl	$guest_main, %eax
	call	*%rax
halt_for_good:
	cmpb	$0, is_td(%rip)
	jne	1f
	hlt
	jmp	halt_for_good
1:	TDVMCALL_HALT 1
	jmp	halt_for_good

	/* R14 port, R12 size, R15 value. */
	.globl	port_out
port_out:
	cmpb	$0, is_td(%rip)
	je	1f
	movl	$1, %r13d
	TDVMCALL TDVMCALL_IO
	ret
1:	movl	%r14d, %edx
	movl	%r15d, %eax
	xorl	%r10d, %r10d
	cmpl	$2, %r12d
	je	2f
	ja	4f
	outb	%al, %dx
	ret
2:	outw	%ax, %dx
	ret
4:	outl	%eax, %dx
	ret

	/* R14 port, R12 size; R11 is the value. */
	.globl	port_in
port_in:
	cmpb	$0, is_td(%rip)
	je	1f
	xorl	%r13d, %r13d
	xorl	%r15d, %r15d
	TDVMCALL TDVMCALL_IO
	ret
1:	movl	%r14d, %edx
	xorl	%eax, %eax
	xorl	%r10d, %r10d
	cmpl	$2, %r12d
	je	2f
	ja	4f
	inb	%dx, %al
	jmp	5f
2:	inw	%dx, %ax
	jmp	5f
4:	inl	%dx, %eax
5:	movl	%eax, %r11d
	ret

	/* EDI is the number of the check that failed; R10 and RAX say what came instead. */
	.globl	guest_failed
guest_failed:
	movq	%rax, %rbp
	movl	%edi, %ebx
	orl	$0xbad0000, %ebx
	cmpb	$0, is_td(%rip)
	je	1f
	movq	%rbp, %r14
	movq	%r10, %r15
	REPORT_FATAL_ERROR %rbx
	jmp	halt_for_good
1:	PORT_OUT PORT_FAILURE, 4, %rbx
	jmp	halt_for_good

	/* ---- Exceptions: the stack holds vector, error code, RIP, CS, RFLAGS, RSP, SS ---- */
exception:
	pushq	%rax
	pushq	%rcx
	pushq	%rdx
	pushq	%rbx
	pushq	%rbp
	pushq	%rsi
	pushq	%rdi
	pushq	%r8
	pushq	%r9
	pushq	%r10
	pushq	%r11
	pushq	%r12
	pushq	%r13
	pushq	%r14
	pushq	%r15
	.set	SAVED_R11, 4 * 8
	.set	SAVED_RBX, 11 * 8
	.set	SAVED_RDX, 12 * 8
	.set	SAVED_RCX, 13 * 8
	.set	SAVED_RAX, 14 * 8
	.set	VECTOR, 15 * 8
	.set	ERROR_CODE, 16 * 8
	.set	SAVED_RIP, 17 * 8
	cmpl	$20, VECTOR(%rsp)
	je	virtualization_exception
unhandled:
	movq	VECTOR(%rsp), %rbx
	orl	$0xec000000, %ebx
	cmpb	$0, is_td(%rip)
	je	1f
	movq	SAVED_RIP(%rsp), %r14
	movq	ERROR_CODE(%rsp), %r15
	REPORT_FATAL_ERROR %rbx
	jmp	halt_for_good
1:	PORT_OUT PORT_FAILURE, 4, %rbx
	jmp	halt_for_good

virtualization_exception:
	TDCALL_LEAF	TDG_VP_VEINFO_GET
	testq	%rax, %rax
	jnz	unhandled
	incq	ve_count(%rip)
	movq	%r10, %rbp		/* instruction length */
	cmpl	$EXIT_EPT_VIOLATION, %ecx
	je	ve_ept_violation
	cmpl	$EXIT_CPUID, %ecx
	je	ve_cpuid
	cmpl	$EXIT_RDMSR, %ecx
	je	ve_rdmsr
	cmpl	$EXIT_WRMSR, %ecx
	je	ve_wrmsr
	cmpl	$EXIT_HLT, %ecx
	je	ve_hlt
	cmpl	$EXIT_IO, %ecx
	je	ve_io
	jmp	unhandled

ve_ept_violation:
	testq	%r9, shared_bit(%rip)	/* MMIO is not decoded here */
	jnz	unhandled
	andq	$-0x1000, %r9
	ACCEPT_PAGE %r9
	testq	%rax, %rax
	jnz	unhandled
	jmp	resume

ve_cpuid:
	movl	SAVED_RAX(%rsp), %r12d
	movl	SAVED_RCX(%rsp), %r13d
	TDVMCALL TDVMCALL_CPUID
	testq	%r10, %r10
	jnz	unhandled
	movq	%r12, SAVED_RAX(%rsp)
	movq	%r13, SAVED_RBX(%rsp)
	movq	%r14, SAVED_RCX(%rsp)
	movq	%r15, SAVED_RDX(%rsp)
	jmp	skip_instruction

ve_rdmsr:
	movl	SAVED_RCX(%rsp), %r12d
	TDVMCALL TDVMCALL_RDMSR
	testq	%r10, %r10
	jnz	unhandled
	movl	%r11d, %eax
	shrq	$32, %r11
	movq	%rax, SAVED_RAX(%rsp)
	movq	%r11, SAVED_RDX(%rsp)
	jmp	skip_instruction

ve_wrmsr:
	movl	SAVED_RCX(%rsp), %r12d
	movl	SAVED_RAX(%rsp), %r13d
	movq	SAVED_RDX(%rsp), %rax
	shlq	$32, %rax
	orq	%rax, %r13
	TDVMCALL TDVMCALL_WRMSR
	testq	%r10, %r10
	jnz	unhandled
	jmp	skip_instruction

ve_hlt:
	TDVMCALL_HALT 0
	jmp	skip_instruction

ve_io:	/* EDX: bits 2:0 size - 1, 3 IN, 4 string, 31:16 port */
	testb	$0x10, %dl
	jnz	unhandled
	movl	%edx, %r12d
	andl	$7, %r12d
	incl	%r12d
	movl	%edx, %r13d
	shrl	$3, %r13d
	notl	%r13d
	andl	$1, %r13d		/* 1: write */
	movl	%edx, %r14d
	shrl	$16, %r14d
	movl	%r12d, %ecx
	shll	$3, %ecx
	movl	$1, %ebx
	shlq	%cl, %rbx
	decq	%rbx			/* mask of the operand */
	movq	SAVED_RAX(%rsp), %r15
	andq	%rbx, %r15
	movl	%r13d, %r9d
	TDVMCALL TDVMCALL_IO
	testq	%r10, %r10
	jnz	unhandled
	testl	%r9d, %r9d
	jnz	skip_instruction
	andq	%rbx, %r11
	notq	%rbx
	andq	%rbx, SAVED_RAX(%rsp)
	orq	%r11, SAVED_RAX(%rsp)

skip_instruction:
	movl	%ebp, %ebp
	addq	%rbp, SAVED_RIP(%rsp)
resume:
	popq	%r15
	popq	%r14
	popq	%r13
	popq	%r12
	popq	%r11
	popq	%r10
	popq	%r9
	popq	%r8
	popq	%rdi
	popq	%rsi
	popq	%rbp
	popq	%rbx
	popq	%rdx
	popq	%rcx
	popq	%rax
	addq	$16, %rsp
	iretq

	/* ---- One stub for each vector ---- */
	.org	0x800, 0xcc
	.set	vector, 0
	.rept	32
	.if	vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21
	.else
	pushq	$0
	.endif
	pushq	$vector
	jmp	exception
	.set	vector, vector + 1
	.org	0x800 + 16 * vector, 0xcc
	.endr

	/* ---- Both modes: CR0.PE tells which. Only short jumps encode the same ---- */
	.org	0xfc0, 0xcc
	.code32
reset_target:
	cli
	cld
	movl	%cr0, %eax
	testb	$1, %al
	jz	1f
	jmp	protected_start
	.code16
1:	jmp	real_mode

	.org	0xff0, 0xcc
	.code32
	.globl	reset_vector
reset_vector:
	jmp	reset_target
	.org	0x1000, 0xcc
