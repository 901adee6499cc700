// SPDX-License-Identifier: MIT
/*
 * A second witness to the v9 private-memory ABI.
 *
 * It shares nothing with the rest of the project: it is built against the
 * headers that the patched kernel tree installs, walks the ABI once (make a
 * file, bind it, convert, run, fault, punch a hole) and prints what it saw, one
 * observation a line: a name, a blank, a decimal number.  "errno" in what follows
 * means 0 for success.  It judges nothing, that is for whoever compares.
 *
 *   make -C LINUX headers_install INSTALL_HDR_PATH=DIR
 *   cc -static -I DIR/include -o witness witness.c && ./witness
 *
 * Exit status: 0 the whole walk was made, 1 it ended early (the last line says
 * where), 2 there is no such ABI here.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <asm/kvm_para.h>
#include <asm/unistd.h>
#include <linux/kvm.h>
#include <linux/kvm_para.h>
#include <linux/magic.h>

#define PAGE 4096ull
#define BASE 0x40000000ull	/* where the private slot is in the guest */
#define SIZE (16 * PAGE)
#define OFFSET (4 * PAGE)	/* where it begins in the file */

/* 32-bit code, one routine each: */
#define READ 0x1000		/*	mov (%ebx), %eax; hlt */
#define WRITE 0x1010		/*	mov %eax, (%ebx); hlt */
#define CALL 0x1020		/*	vmmcall; hlt, or vmcall */

static int kvm, vm, vcpu;
static struct kvm_run *run;

static void say(const char *name, long long value)
{
	printf("%s %lld\n", name, value);
	fflush(stdout);
}

static void need(const char *name, int ok)
{
	if (ok)
		return;
	say(name, -1);
	exit(1);
}

static int errno_of(long result)
{
	return result < 0 ? errno : 0;
}

static int memfd_restricted(unsigned int flags)
{
	return syscall(__NR_memfd_restricted, (long)flags, 0L, 0L, 0L, 0L, 0L);
}

static int slot(unsigned int id, unsigned int flags, uint64_t gpa,
		uint64_t size, void *shared, int fd, uint64_t offset)
{
	struct kvm_userspace_memory_region_ext ext;

	memset(&ext, 0, sizeof(ext));
	ext.region.slot = id;
	ext.region.flags = flags;
	ext.region.guest_phys_addr = gpa;
	ext.region.memory_size = size;
	ext.region.userspace_addr = (uintptr_t)shared;
	ext.restricted_fd = fd;
	ext.restricted_offset = offset;
	return errno_of(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &ext));
}

static int convert(unsigned long request, uint64_t gpa, uint64_t size)
{
	struct kvm_enc_region region = { .addr = gpa, .size = size };

	return errno_of(ioctl(vm, request, &region));
}

#define to_private(gpa, size) convert(KVM_MEMORY_ENCRYPT_REG_REGION, gpa, size)
#define to_shared(gpa, size) convert(KVM_MEMORY_ENCRYPT_UNREG_REGION, gpa, size)

/* The exit reason, or minus the errno; a vCPU that spins is EINTR. */
static int go_on(void)
{
	int result;

	alarm(3);
	result = ioctl(vcpu, KVM_RUN, 0) < 0 ? -errno : (int)run->exit_reason;
	alarm(0);
	return result;
}

static int go(uint32_t routine, uint32_t eax, uint32_t ebx, uint32_t ecx,
	      uint32_t edx)
{
	struct kvm_regs regs = {
		.rip = routine, .rax = eax, .rbx = ebx, .rcx = ecx, .rdx = edx,
		.rflags = 2,
	};

	need("guest.set_regs", !ioctl(vcpu, KVM_SET_REGS, &regs));
	return go_on();
}

static int eax(void)
{
	struct kvm_regs regs;

	need("guest.get_regs", !ioctl(vcpu, KVM_GET_REGS, &regs));
	return regs.rax;
}

/* What the guest reads there, or a million and something when it does not. */
static long long peek(uint32_t gpa)
{
	int reason = go(READ, 0, gpa, 0, 0);

	return reason == KVM_EXIT_HLT ? eax() : 1000000ll + reason;
}

static int poke(uint32_t gpa, uint32_t value)
{
	return go(WRITE, value, gpa, 0, 0);
}

static int wish(uint32_t gpa, uint32_t pages, uint32_t bits)
{
	int reason = go(CALL, KVM_HC_MAP_GPA_RANGE, gpa, pages, bits);

	return reason == KVM_EXIT_HLT ? eax() : 1000000 + reason;
}

static int hole(int fd, uint64_t offset, uint64_t size)
{
	return errno_of(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				  offset, size));
}

static void say_fault(const char *when, int reason)
{
	char name[80];

	snprintf(name, sizeof(name), "%s.exit", when);
	say(name, reason);
	if (reason != KVM_EXIT_MEMORY_FAULT)
		return;
	snprintf(name, sizeof(name), "%s.flags", when);
	say(name, run->memory.flags);
	snprintf(name, sizeof(name), "%s.padding", when);
	say(name, run->memory.padding);
	snprintf(name, sizeof(name), "%s.gpa", when);
	say(name, run->memory.gpa);
	snprintf(name, sizeof(name), "%s.size", when);
	say(name, run->memory.size);
}

static void layout(void)
{
	typedef struct kvm_userspace_memory_region_ext ext;

	say("nr.memfd_restricted", __NR_memfd_restricted);
	say("magic", RESTRICTEDMEM_MAGIC);
	say("KVM_MEM_PRIVATE", KVM_MEM_PRIVATE);
	say("KVM_CAP_PRIVATE_MEM", KVM_CAP_PRIVATE_MEM);
	say("KVM_EXIT_MEMORY_FAULT", KVM_EXIT_MEMORY_FAULT);
	say("KVM_MEMORY_EXIT_FLAG_PRIVATE", KVM_MEMORY_EXIT_FLAG_PRIVATE);
	say("KVM_SET_USER_MEMORY_REGION", KVM_SET_USER_MEMORY_REGION);
	say("KVM_MEMORY_ENCRYPT_REG_REGION", KVM_MEMORY_ENCRYPT_REG_REGION);
	say("KVM_MEMORY_ENCRYPT_UNREG_REGION", KVM_MEMORY_ENCRYPT_UNREG_REGION);
	say("sizeof.ext", sizeof(ext));
	say("offsetof.ext.region", offsetof(ext, region));
	say("offsetof.ext.restricted_offset", offsetof(ext, restricted_offset));
	say("offsetof.ext.restricted_fd", offsetof(ext, restricted_fd));
	say("offsetof.ext.pad1", offsetof(ext, pad1));
	say("offsetof.ext.pad2", offsetof(ext, pad2));
	say("offsetof.run.memory.flags", offsetof(struct kvm_run, memory.flags));
	say("offsetof.run.memory.padding",
	    offsetof(struct kvm_run, memory.padding));
	say("offsetof.run.memory.gpa", offsetof(struct kvm_run, memory.gpa));
	say("offsetof.run.memory.size", offsetof(struct kvm_run, memory.size));
}

static int make_file(void)
{
	struct statfs sfs;
	char byte = 0;
	int fd, error;

	error = errno_of(memfd_restricted(0xffffffff));
	say("fd.bad_flags", error);
	if (error != EINVAL)
		exit(2);

	fd = memfd_restricted(0);
	need("fd.make", fd >= 0);
	need("fd.fstatfs", !fstatfs(fd, &sfs));
	say("fd.f_type", sfs.f_type);
	if (sfs.f_type != RESTRICTEDMEM_MAGIC)
		exit(2);
	say("fd.getfl", fcntl(fd, F_GETFL));
	say("fd.getfd", fcntl(fd, F_GETFD));
	fcntl(fd, F_SETFD, FD_CLOEXEC);

	say("fd.read", errno_of(read(fd, &byte, 1)));
	say("fd.write", errno_of(write(fd, &byte, 1)));
	say("fd.pread", errno_of(pread(fd, &byte, 1, 0)));
	say("fd.lseek", errno_of(lseek(fd, 0, SEEK_END)));
	say("fd.mmap", mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0) ==
	    MAP_FAILED ? errno : 0);
	say("fd.ftruncate.unaligned", errno_of(ftruncate(fd, PAGE + 1)));
	say("fd.ftruncate", errno_of(ftruncate(fd, OFFSET + SIZE)));
	say("fd.ftruncate.again", errno_of(ftruncate(fd, OFFSET + SIZE)));
	say("fd.fallocate", errno_of(fallocate(fd, FALLOC_FL_KEEP_SIZE, OFFSET,
					       PAGE)));
	say("fd.hole.unaligned", hole(fd, OFFSET + 1, PAGE));
	say("fd.hole.beyond", hole(fd, 1ull << 32, PAGE));
	return fd;
}

static void make_vm(void)
{
	struct kvm_segment flat = {
		.limit = 0xffffffff, .selector = 16, .type = 3, .present = 1,
		.s = 1, .db = 1, .g = 1,
	};
	struct kvm_sregs sregs;
	unsigned int a = 0, b, c, d;
	uint8_t *low;
	int size;

	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	need("kvm.open", kvm >= 0);
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	need("vm.make", vm >= 0);
	say("cap.system", ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_PRIVATE_MEM));
	say("cap.vm", ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_PRIVATE_MEM));

	low = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE,
		   MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	need("vm.low", low != MAP_FAILED);
	memcpy(low + READ, "\x8b\x03\xf4", 3);
	memcpy(low + WRITE, "\x89\x03\xf4", 3);
	__asm__("cpuid" : "+a"(a), "=b"(b), "=c"(c), "=d"(d));
	/* "Genu"ineIntel, else AMD and those like it */
	memcpy(low + CALL, b == 0x756e6547 ? "\x0f\x01\xc1\xf4" :
	       "\x0f\x01\xd9\xf4", 4);
	need("vm.low_slot", !slot(0, 0, 0, 2 * PAGE, low, 0, 0));

	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	need("vcpu.make", vcpu >= 0 && size > 0);
	run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	need("vcpu.run", run != MAP_FAILED);

	need("vcpu.get_sregs", !ioctl(vcpu, KVM_GET_SREGS, &sregs));
	sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = flat;
	flat.type = 11;
	flat.selector = 8;
	sregs.cs = flat;
	sregs.cr0 |= 1;
	need("vcpu.set_sregs", !ioctl(vcpu, KVM_SET_SREGS, &sregs));
}

/* Returns whether this VM takes a private slot; leaves one in place if so. */
static int bind(int fd, void *shared)
{
	const unsigned int private = KVM_MEM_PRIVATE;
	int error;

	error = slot(1, private, BASE, SIZE, shared, fd, OFFSET);
	say("slot.bind", error);
	if (error)
		return 0;

	say("slot.again", slot(1, private, BASE, SIZE, shared, fd, OFFSET));
	say("slot.overlap", slot(2, private, BASE, SIZE, shared, fd, OFFSET));
	say("slot.overlap_and_bad_fd",
	    slot(2, private, BASE, SIZE, shared, -1, OFFSET));
	say("slot.bad_fd",
	    slot(2, private, 2 * BASE, SIZE, shared, -1, OFFSET));
	say("slot.other_fd",
	    slot(2, private, 2 * BASE, SIZE, shared, kvm, OFFSET));
	say("slot.unaligned_offset",
	    slot(2, private, 2 * BASE, SIZE, shared, fd, OFFSET + 1));
	say("slot.offset_wraps",
	    slot(2, private, 2 * BASE, SIZE, shared, fd, 0 - SIZE));
	say("slot.unknown_flag",
	    slot(2, private | 8, 2 * BASE, SIZE, shared, fd, OFFSET));
	say("slot.gpa_too_high",
	    slot(2, private, 1ull << 52, SIZE, shared, fd, OFFSET));
	say("slot.delete_none", slot(2, private, 0, 0, NULL, 0, 0));
	say("slot.delete", slot(1, private, 0, 0, NULL, 0, 0));
	say("slot.bind_again",
	    slot(1, private, BASE, SIZE, shared, fd, OFFSET));
	return 1;
}

static void walk(int fd, uint32_t *shared)
{
	const uint32_t gpa = BASE;

	say("private.write.exit", poke(gpa, 0x1234));
	say("private.read", peek(gpa));
	say("private.shared_bytes", shared[0]);

	say("convert.size_0", to_shared(BASE, 0));
	say("convert.unaligned", to_shared(BASE + 1, PAGE));
	say("convert.wraps", to_shared(0 - PAGE, PAGE));
	say("convert.to_shared", to_shared(BASE, PAGE));
	say("shared.read", peek(gpa));
	say("shared.write.exit", poke(gpa, 0x5678));
	say("shared.host_sees", shared[0]);
	say("convert.to_private", to_private(BASE, PAGE));
	say("private.read_again", peek(gpa));

	say("wish.unaligned", wish(gpa + 1, 1, KVM_MAP_GPA_RANGE_WANT_SHARED));
	say("wish.no_pages", wish(gpa, 0, KVM_MAP_GPA_RANGE_WANT_SHARED));
	say("wish.shared", wish(gpa, 1, KVM_MAP_GPA_RANGE_WANT_SHARED));
	say_fault("fault.shared", go(READ, 0, gpa + 8, 0, 0));
	say_fault("fault.unconverted", go_on());
	say("fault.convert", to_shared(BASE, PAGE));
	say("fault.then.exit", go_on());
	say("wish.private", wish(gpa, 1, KVM_MAP_GPA_RANGE_WANT_PRIVATE));
	say_fault("fault.private", go(WRITE, 0x9abc, gpa + 8, 0, 0));
	say("fault.private.host_sees", shared[2]);
	say("fault.convert_back", to_private(BASE, PAGE));
	say("fault.then.exit_again", go_on());
	say("fault.then.read", peek(gpa + 8));
	say("wish.unset", wish(gpa, 1, KVM_MAP_GPA_RANGE_WANT_PRIVATE |
			       KVM_MAP_GPA_RANGE_WANT_SHARED));

	say("hole.neighbour.write.exit", poke(gpa + PAGE, 0xdef0));
	say("hole.punch", hole(fd, OFFSET, PAGE));
	say("hole.read", peek(gpa));
	say("hole.neighbour.read", peek(gpa + PAGE));

	say("slot.delete_used", slot(1, KVM_MEM_PRIVATE, 0, 0, NULL, 0, 0));
	say("deleted.read.exit", go(READ, 0, gpa, 0, 0));
}

static void on_alarm(int signal)
{
	(void)signal;
}

int main(void)
{
	/* Without SA_RESTART, so that KVM_RUN comes back. */
	const struct sigaction action = { .sa_handler = on_alarm };
	uint32_t *shared;
	unsigned int i;
	int fd;

	sigaction(SIGALRM, &action, NULL);
	layout();
	fd = make_file();
	make_vm();

	shared = mmap(NULL, SIZE, PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	need("shared", shared != MAP_FAILED);
	for (i = 0; i < SIZE / sizeof(*shared); i++)
		shared[i] = 0x5a5a5a5a;

	if (bind(fd, shared))
		walk(fd, shared);
	else
		say("convert.refused", to_private(BASE, PAGE));

	say("done", 1);
	return 0;
}
