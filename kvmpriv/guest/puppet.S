/*
 * The puppet's agent: it executes the command in its mailbox, exits, and does so again.
 *
 * It runs in long mode; rbx points to its mailbox.  The page tables map the agent's memory at 0 and
 * a window at 1 GiB.  The agent writes the window's page directory itself, because a KVM that shadows
 * page tables does not notice when the host writes there.
 *
 * The absolute symbols (.set) are generated into ready.py, PUPPET_SYMBOLS, for mailbox.py.
 */
	.set	DONE_PORT, 0xf6

	.set	COMMAND, 0x00
	.set	ARGUMENTS, 0x08		/* rdi, rsi, rdx, rcx, r8 */
	.set	RESULT, 0x30
	.set	WINDOW, 0x38		/* where the window must begin: a multiple of 2 MiB */
	.set	PAGES, 0x40		/* how many pages of 2 MiB it must have */
	.set	OLD_WINDOW, 0x48	/* the agent's own: what the window shows now */
	.set	OLD_PAGES, 0x50
	.set	DIRECTORY, 0x58		/* the window's page directory */
	.set	LARGE, 0x83		/* present, writable, 2 MiB */

	.code64
	.globl	_start
_start:
	xor	%eax, %eax
1:	mov	%rax, RESULT(%rbx)
	out	%al, $DONE_PORT

	mov	WINDOW(%rbx), %rax
	mov	PAGES(%rbx), %rcx
	cmp	OLD_WINDOW(%rbx), %rax
	jne	2f
	cmp	OLD_PAGES(%rbx), %rcx
	je	5f
2:	mov	%rax, OLD_WINDOW(%rbx)
	mov	%rcx, OLD_PAGES(%rbx)
	mov	DIRECTORY(%rbx), %rdi
	or	$LARGE, %rax
	mov	$512, %edx
3:	test	%rcx, %rcx
	jz	4f
	mov	%rax, (%rdi)
	add	$0x200000, %rax
	add	$8, %rdi
	dec	%edx
	dec	%rcx
	jmp	3b
4:	test	%edx, %edx		/* clear the entries behind it, up to the first empty one */
	jz	6f
	cmpq	$0, (%rdi)
	je	6f
	movq	$0, (%rdi)
	add	$8, %rdi
	dec	%edx
	jmp	4b
6:	mov	%cr3, %rax
	mov	%rax, %cr3

5:	mov	COMMAND(%rbx), %rax
	lea	commands(%rip), %r10
	movslq	(%r10, %rax, 4), %r11
	add	%r10, %r11
	mov	ARGUMENTS(%rbx), %rdi
	mov	ARGUMENTS+8(%rbx), %rsi
	mov	ARGUMENTS+16(%rbx), %rdx
	mov	ARGUMENTS+24(%rbx), %rcx
	mov	ARGUMENTS+32(%rbx), %r8
	push	%rbx
	cld
	call	*%r11
	pop	%rbx
	jmp	1b

	.macro	command name
	.set	COMMAND_\name, (. - commands) / 4
	.long	do_\name - commands
	.endm

	.balign	4
commands:
	command copy
	command fill
	command checksum
	command span
	command touch
	command increment
	command load
	command store
	command out
	command in
	command vmcall
	command vmmcall
	command cpuid
	command rdtsc
	command rdmsr
	command wrmsr
	command run
	command halt

do_copy:				/* (to, from, bytes) */
	mov	%rdx, %rcx
	shr	$3, %rcx
	rep movsq
	mov	%edx, %ecx
	and	$7, %ecx
	rep movsb
	ret

do_fill:				/* (at, byte, bytes) */
	mov	$0x0101010101010101, %rax
	movzbl	%sil, %esi
	imul	%rsi, %rax
	mov	%rdx, %rcx
	shr	$3, %rcx
	rep stosq
	mov	%edx, %ecx
	and	$7, %ecx
	rep stosb
	ret

do_checksum:				/* (at, bytes, a multiple of 8): the sum of the words */
	xor	%eax, %eax
	shr	$3, %rsi
	jz	2f
1:	add	(%rdi), %rax
	add	$8, %rdi
	dec	%rsi
	jnz	1b
2:	ret

do_span:				/* (at, byte, bytes): how many bytes are `byte` from `at` on */
	mov	%rdx, %rcx
	mov	%esi, %eax
	cmp	%al, %al		/* for no bytes at all */
	repe scasb
	je	1f
	inc	%rcx
1:	mov	%rdx, %rax
	sub	%rcx, %rax
	ret

do_touch:				/* (at, stride, count, byte to write, or -1 to read) */
	test	%rdx, %rdx
	jz	3f
1:	test	%rcx, %rcx
	js	2f
	mov	%cl, (%rdi)
	jmp	4f
2:	mov	(%rdi), %al
4:	add	%rsi, %rdi
	dec	%rdx
	jnz	1b
3:	xor	%eax, %eax
	ret

do_increment:				/* (at, times): atomically, by compare and swap */
	mov	(%rdi), %rax
1:	test	%rsi, %rsi
	jz	3f
2:	lea	1(%rax), %rdx
	lock cmpxchg %rdx, (%rdi)
	jne	2b
	mov	%rdx, %rax
	dec	%rsi
	jmp	1b
3:	ret

do_load:				/* (at, size) */
	xor	%eax, %eax
	cmp	$2, %esi
	je	2f
	ja	3f
	mov	(%rdi), %al
	ret
2:	mov	(%rdi), %ax
	ret
3:	cmp	$4, %esi
	ja	4f
	mov	(%rdi), %eax
	ret
4:	mov	(%rdi), %rax
	ret

do_store:				/* (at, size, value) */
	cmp	$2, %esi
	je	2f
	ja	3f
	mov	%dl, (%rdi)
	ret
2:	mov	%dx, (%rdi)
	ret
3:	cmp	$4, %esi
	ja	4f
	mov	%edx, (%rdi)
	ret
4:	mov	%rdx, (%rdi)
	ret

do_out:					/* (value, size, port) */
	mov	%edi, %eax
	cmp	$2, %esi
	je	2f
	ja	4f
	out	%al, %dx
	ret
2:	out	%ax, %dx
	ret
4:	out	%eax, %dx
	ret

do_in:					/* (-, size, port) */
	xor	%eax, %eax
	cmp	$2, %esi
	je	2f
	ja	4f
	in	%dx, %al
	ret
2:	in	%dx, %ax
	ret
4:	in	%dx, %eax
	ret

	/* KVM's hypercalls take rax, rbx, rcx, rdx, rsi: (number, a0, a1, a2, a3) */
	.macro	hypercall instruction
	mov	%rdi, %rax
	mov	%rsi, %rbx
	mov	%rdx, %r9
	mov	%rcx, %rdx
	mov	%r9, %rcx
	mov	%r8, %rsi
	\instruction
	ret
	.endm
do_vmcall:
	hypercall vmcall
do_vmmcall:
	hypercall vmmcall

do_cpuid:				/* (leaf, index, where eax, ebx, ecx, edx go) */
	mov	%rdx, %r9
	mov	%edi, %eax
	mov	%esi, %ecx
	cpuid
	mov	%eax, (%r9)
	mov	%ebx, 4(%r9)
	mov	%ecx, 8(%r9)
	mov	%edx, 12(%r9)
	ret

do_rdtsc:
	rdtsc
	shl	$32, %rdx
	or	%rdx, %rax
	ret

do_rdmsr:				/* (index) */
	mov	%edi, %ecx
	rdmsr
	shl	$32, %rdx
	or	%rdx, %rax
	ret

do_wrmsr:				/* (index, value) */
	mov	%edi, %ecx
	mov	%rsi, %rax
	mov	%rsi, %rdx
	shr	$32, %rdx
	wrmsr
	ret

do_run:					/* (where, its argument) */
	mov	%rdi, %rax
	mov	%rsi, %rdi
	call	*%rax
	ret

do_halt:
	hlt
	ret
