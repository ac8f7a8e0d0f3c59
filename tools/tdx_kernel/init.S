/*
 * The first program of the kernels that are meant to fail (build.py). No C library, so that any gcc can make it.
 * With -DEXITS it ends at once: "Kernel panic - not syncing: Attempted to kill init!". Without, it never ends and
 * nothing panics: a kernel that hangs.
 */

#include <asm/unistd_64.h>

	.globl _start
	.text
_start:
#ifdef EXITS
	movl	$__NR_exit, %eax
	xorl	%edi, %edi
	syscall
#else
	movl	$__NR_pause, %eax
	syscall
	jmp	_start
#endif
	.section .note.GNU-stack, "", @progbits
