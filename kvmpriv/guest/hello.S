/* The guest of `kvmpriv run --hello`, in long mode: it prints a greeting, CPUID's name of the
   hypervisor, and its arguments. */
	.set	SERIAL, 0x3f8
	.set	EXIT, 0xf4

	.code64
	.globl	_start
_start:
	mov	%rdi, %r12		/* argc */
	mov	%rsi, %r13		/* argv */
	mov	%rdx, %r14		/* memory, in bytes */
	cld
	lea	greeting(%rip), %rsi
	call	print
	mov	%r14, %rax
	shr	$20, %rax
	call	print_number
	lea	mebibytes(%rip), %rsi
	call	print

	mov	$0x40000000, %eax	/* the hypervisor's leaf: its name */
	cpuid
	lea	signature(%rip), %rdi
	mov	%ebx, (%rdi)
	mov	%ecx, 4(%rdi)
	mov	%edx, 8(%rdi)
	lea	hypervisor(%rip), %rsi
	call	print
	lea	newline(%rip), %rsi
	call	print

1:	test	%r12, %r12
	jz	2f
	lea	argument(%rip), %rsi
	call	print
	mov	(%r13), %rsi
	call	print
	lea	newline(%rip), %rsi
	call	print
	add	$8, %r13
	dec	%r12
	jmp	1b
2:	xor	%eax, %eax
	out	%al, $EXIT

/* Print the string at rsi, up to its zero byte. */
print:
	mov	$SERIAL, %dx
3:	lodsb
	test	%al, %al
	jz	4f
	out	%al, %dx
	jmp	3b
4:	ret

/* Print rax in decimal. */
print_number:
	xor	%edx, %edx
	mov	$10, %ecx
	div	%rcx
	push	%rdx
	test	%rax, %rax
	jz	5f
	call	print_number
5:	pop	%rax
	add	$'0', %al
	mov	$SERIAL, %dx
	out	%al, %dx
	ret

greeting:	.asciz	"Hello from a guest in long mode with "
mebibytes:	.asciz	" MiB of memory\n"
hypervisor:	.ascii	"CPUID says the hypervisor is "
signature:	.space	13
argument:	.asciz	"argument: "
newline:	.asciz	"\n"
