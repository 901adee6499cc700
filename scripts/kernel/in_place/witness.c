// SPDX-License-Identifier: MIT
/*
 * A witness to conversion in place, independent of kvmpriv.
 *
 * It is built against the headers that the patched tree installs.  It makes
 * each request that the kernel must refuse, beside one that differs in one
 * field and succeeds, and walks through what the ABI promises: to user space,
 * to a guest, and to both at the same page.
 *
 *   make -C LINUX headers_install INSTALL_HDR_PATH=DIR
 *   cc -static -I DIR/include -o witness witness.c && ./witness
 *
 * It prints a line for each observation: "ok" or "BAD", a name, the value seen,
 * and for BAD the value that the ABI wants.  The module parameter decides what
 * is wanted.  Exit status: 0 all is as it should be, 1 something is not, 2 the
 * kernel does not have the parameter.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/kvm.h>

#define PARAMETER "/sys/module/kvm/parameters/gmem_in_place_conversion"
#define PAGE 4096ull
#define PAGES 16
#define BASE 0x40000000ull	/* where the slot is in the guest */
#define PRIVATE KVM_MEMORY_ATTRIBUTE_PRIVATE
#define UNTOUCHED 0x5a5a5a5a5a5a5a5aull

/* 32-bit code at 0x1000: mov (%ebx), %eax; hlt; and at 0x1010: mov %eax, (%ebx); hlt */
#define READ 0x1000
#define WRITE 0x1010

static int device, vm, vcpu, bad;
static struct kvm_run *run;
static sigjmp_buf back;

static void check(long long seen, long long wanted, const char *name, ...)
{
	va_list more;

	printf("%s ", seen == wanted ? "ok" : "BAD");
	va_start(more, name);
	vprintf(name, more);
	va_end(more);
	printf(" %lld", seen);
	if (seen != wanted) {
		printf(", not %lld", wanted);
		bad = 1;
	}
	putchar('\n');
	fflush(stdout);
}

static int must(int result, const char *what)
{
	if (result >= 0)
		return result;
	perror(what);
	exit(1);
}

static void on_sigbus(int number)
{
	siglongjmp(back, number);
}

/* The byte at an address, or -SIGBUS. */
static int look(volatile unsigned char *at)
{
	int number = sigsetjmp(back, 1);

	return number ? -number : *at;
}

static int put(volatile unsigned char *at, int value)
{
	int number = sigsetjmp(back, 1);

	if (!number)
		*at = value;
	return -number;
}

static struct kvm_memory_attributes2 request(uint64_t offset, uint64_t size,
					     uint64_t attributes)
{
	struct kvm_memory_attributes2 attrs;

	memset(&attrs, 0, sizeof(attrs));
	attrs.offset = offset;
	attrs.size = size;
	attrs.attributes = attributes;
	attrs.error_offset = UNTOUCHED;
	return attrs;
}

static int ask(int fd, void *attrs)
{
	return ioctl(fd, KVM_SET_MEMORY_ATTRIBUTES2, attrs) ? errno : 0;
}

/* Convert pages of the file; the errno. */
static int convert(int fd, int page, int pages, uint64_t attributes)
{
	struct kvm_memory_attributes2 attrs;

	attrs = request(page * PAGE, pages * PAGE, attributes);
	return ask(fd, &attrs);
}

static int make_file(int of, uint64_t size, uint64_t flags)
{
	struct kvm_create_guest_memfd args;

	memset(&args, 0, sizeof(args));
	args.size = size;
	args.flags = flags;
	return ioctl(of, KVM_CREATE_GUEST_MEMFD, &args);
}

static unsigned char *map(int fd, int pages)
{
	void *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	must(at == MAP_FAILED ? -1 : 0, "mmap");
	return at;
}

static int set_slot(unsigned int id, uint64_t gpa, uint64_t size, void *shared, int fd)
{
	struct kvm_userspace_memory_region2 region;

	memset(&region, 0, sizeof(region));
	region.slot = id;
	region.guest_phys_addr = gpa;
	region.memory_size = size;
	region.userspace_addr = (uintptr_t)shared;
	region.flags = fd < 0 ? 0 : KVM_MEM_GUEST_MEMFD;
	region.guest_memfd = fd < 0 ? 0 : fd;
	return ioctl(vm, KVM_SET_USER_MEMORY_REGION2, &region) ? errno : 0;
}

/* Run a routine: what it leaves in eax, or minus the exit reason. */
static long long go(uint32_t routine, uint32_t eax, uint32_t ebx)
{
	struct kvm_regs regs = { .rip = routine, .rax = eax, .rbx = ebx, .rflags = 2 };

	must(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
	if (ioctl(vcpu, KVM_RUN, 0) && run->exit_reason != KVM_EXIT_MEMORY_FAULT)
		return -1000 - errno;
	if (run->exit_reason != KVM_EXIT_HLT)
		return -(long long)run->exit_reason;
	must(ioctl(vcpu, KVM_GET_REGS, &regs), "KVM_GET_REGS");
	return (uint32_t)regs.rax;
}

static long long guest_reads(int page)
{
	return go(READ, 0, BASE + page * PAGE);
}

static void guest_writes(int page, uint32_t value)
{
	check(go(WRITE, value, BASE + page * PAGE), value, "guest.write.%d", page);
}

/* A counter of the VM, by its name in the binary statistics. */
static long long counter(const char *name)
{
	struct kvm_stats_header header;
	uint64_t value = -1;
	unsigned int i;
	int fd;

	fd = must(ioctl(vm, KVM_GET_STATS_FD, 0), "KVM_GET_STATS_FD");
	must(pread(fd, &header, sizeof(header), 0), "statistics");
	for (i = 0; i < header.num_desc; i++) {
		size_t size = sizeof(struct kvm_stats_desc) + header.name_size;
		struct kvm_stats_desc *desc = calloc(1, size + 1);

		must(pread(fd, desc, size, header.desc_offset + i * size), "descriptor");
		if (!strcmp(desc->name, name))
			must(pread(fd, &value, sizeof(value),
				   header.data_offset + desc->offset), "counter");
		free(desc);
	}
	close(fd);
	return value;
}

static void start_guest(void)
{
	static const unsigned char code[] = { 0x8b, 0x03, 0xf4 };
	static const unsigned char write_code[] = { 0x89, 0x03, 0xf4 };
	struct kvm_segment flat = {
		.limit = 0xffffffff, .selector = 8, .type = 3, .present = 1,
		.db = 1, .s = 1, .g = 1,
	};
	struct kvm_sregs sregs;
	unsigned char *low;

	low = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	must(low == MAP_FAILED ? -1 : 0, "mmap");
	memcpy(low + READ, code, sizeof(code));
	memcpy(low + WRITE, write_code, sizeof(write_code));
	check(set_slot(0, 0, 2 * PAGE, low, -1), 0, "slot.plain");

	vcpu = must(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	run = mmap(NULL, must(ioctl(device, KVM_GET_VCPU_MMAP_SIZE, 0), "size"),
		   PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	must(run == MAP_FAILED ? -1 : 0, "mmap of the vCPU");
	must(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = flat;
	flat.type = 11;
	sregs.cs = flat;
	sregs.cr0 |= 1;
	must(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
}

static void layout(void)
{
	typedef struct kvm_memory_attributes2 attrs2;

	check(KVM_SET_MEMORY_ATTRIBUTES2, 0xc080aed2, "request");
	check(sizeof(attrs2), 128, "sizeof");
	check(offsetof(attrs2, address), 0, "offsetof.address");
	check(offsetof(attrs2, offset), 0, "offsetof.offset");
	check(offsetof(attrs2, size), 8, "offsetof.size");
	check(offsetof(attrs2, attributes), 16, "offsetof.attributes");
	check(offsetof(attrs2, flags), 24, "offsetof.flags");
	check(offsetof(attrs2, error_offset), 32, "offsetof.error_offset");
	check(offsetof(attrs2, reserved), 40, "offsetof.reserved");
}

static void capabilities(int on)
{
	int fds[] = { device, vm }, i;

	for (i = 0; i < 2; i++) {
		check(ioctl(fds[i], KVM_CHECK_EXTENSION, KVM_CAP_MEMORY_ATTRIBUTES),
		      on ? 0 : PRIVATE, "cap.attributes.%d", i);
		check(ioctl(fds[i], KVM_CHECK_EXTENSION,
			    KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES),
		      on ? PRIVATE : 0, "cap.file.%d", i);
	}
	check(ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_GUEST_MEMFD_FLAGS), on ? 3 : 1,
	      "cap.flags");
}

static void refused(int fd, struct kvm_memory_attributes2 attrs, const char *name, int more)
{
	check(ask(fd, &attrs), EINVAL, "refused.%s.%d", name, more);
	check(attrs.error_offset, UNTOUCHED, "refused.%s.%d.error_offset", name, more);
}

static void refusals(int fd)
{
	const struct kvm_memory_attributes2 good = request(PAGE, PAGE, 0);
	struct kvm_memory_attributes2 attrs = good;
	int ordinary, other, i;
	char *page;

	check(ask(fd, &attrs), 0, "good");
	check(attrs.error_offset, UNTOUCHED, "good.error_offset");

	/* A struct that ends where nothing is mapped; all else is wrong, too. */
	page = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	must(page == MAP_FAILED ? -1 : munmap(page + PAGE, PAGE), "mmap");
	memset(page, 0xff, PAGE);
	check(ask(fd, page + PAGE - 127), EFAULT, "refused.pointer");
	check(ask(fd, page + PAGE - 128), EINVAL, "refused.pointer.twin");

	for (i = 0; i < 64; i++) {
		attrs = good;
		attrs.flags = 1ull << i;
		refused(fd, attrs, "flags", i);
		attrs = good;
		attrs.attributes = 1ull << i;
		if (attrs.attributes != PRIVATE)
			refused(fd, attrs, "attributes", i);
	}
	for (i = 0; i < 11; i++) {
		attrs = good;
		attrs.reserved[i] = 1ull << (i * 6);
		refused(fd, attrs, "reserved", i);
	}

	ordinary = must(ioctl(device, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	other = must(make_file(ordinary, 2 * PAGE, 3), "a default VM's file");
	refused(other, good, "default-vm", 0);
	close(other);
	close(ordinary);

	refused(fd, request(PAGE, 0, 0), "size", 0);
	refused(fd, request(-PAGE, PAGE, 0), "wrap", 0);
	refused(fd, request(-PAGE, 2 * PAGE, 0), "wrap", 1);
	refused(fd, request(PAGE, -PAGE, 0), "wrap", 2);
	refused(fd, request(PAGE + 1, PAGE, 0), "offset", 1);
	refused(fd, request(PAGE + 2048, PAGE, 0), "offset", 2048);
	refused(fd, request(PAGE, PAGE + 1, 0), "size", 1);
	refused(fd, request(PAGE, 2048, 0), "size", 2048);
	refused(fd, request(PAGES * PAGE, PAGE, 0), "beyond", 0);
	refused(fd, request((PAGES - 1) * PAGE, 2 * PAGE, 0), "beyond", 1);
	refused(fd, request(0, (PAGES + 1) * PAGE, 0), "beyond", 2);
	refused(fd, request(1ull << 62, PAGE, 0), "beyond", 62);
	check(convert(fd, PAGES - 1, 1, 0), 0, "twin.last");
	check(convert(fd, 0, PAGES, 0), 0, "twin.all");

	check(ioctl(fd, KVM_SET_MEMORY_ATTRIBUTES, &attrs) ? errno : 0, ENOTTY, "file.old");
	check(ioctl(vm, KVM_SET_MEMORY_ATTRIBUTES2, &attrs) ? errno : 0, ENOTTY, "vm.new");
	check(ioctl(vm, KVM_SET_MEMORY_ATTRIBUTES, &attrs) ? errno : 0, ENOTTY, "vm.old");
	check(ioctl(vm, KVM_SET_MEMORY_ATTRIBUTES, NULL) ? errno : 0, ENOTTY, "vm.old.null");
}

static void user_space(int fd, unsigned char *at)
{
	struct kvm_memory_attributes2 attrs;
	struct iovec one = { .iov_base = at + 3 * PAGE, .iov_len = PAGE };
	int pipes[2], child, status, i;
	unsigned char *locked;

	for (i = 0; i < PAGES; i++)
		check(put(at + i * PAGE, 0x10 + i), 0, "user.write.%d", i);

	/* A page, its neighbours, and back again with its content. */
	check(convert(fd, 5, 1, PRIVATE), 0, "private.5");
	for (i = 4; i < 7; i++)
		check(look(at + i * PAGE), i == 5 ? -SIGBUS : 0x10 + i, "private.look.%d", i);
	check(put(at + 5 * PAGE, 1), -SIGBUS, "private.put");
	must(pipe(pipes), "pipe");
	check(write(pipes[1], at + 5 * PAGE, 1) < 0 ? errno : 0, EFAULT, "private.gup");
	one.iov_base = at + 5 * PAGE;
	check(vmsplice(pipes[1], &one, 1, 0) < 0 ? errno : 0, EFAULT, "private.vmsplice");
	child = must(fork(), "fork");
	if (!child)
		_exit(look(at + 5 * PAGE) == -SIGBUS ? 7 : look(at + 5 * PAGE));
	waitpid(child, &status, 0);
	check(WEXITSTATUS(status), 7, "private.child");
	check(convert(fd, 5, 1, PRIVATE), 0, "private.again");
	check(convert(fd, 5, 1, 0), 0, "shared.5");
	check(look(at + 5 * PAGE), 0x15, "shared.look");

	/* A hole changes what is there, not of which kind it is. */
	check(convert(fd, 6, 1, PRIVATE), 0, "hole.private");
	check(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 6 * PAGE, 2 * PAGE), 0,
	      "hole");
	check(look(at + 6 * PAGE), -SIGBUS, "hole.look.private");
	check(look(at + 7 * PAGE), 0, "hole.look.shared");
	check(convert(fd, 6, 1, 0), 0, "hole.shared");
	check(look(at + 6 * PAGE), 0, "hole.look.converted");

	/* A page in a pipe: nothing changes, and its offset is told. */
	one.iov_base = at + 3 * PAGE;
	check(vmsplice(pipes[1], &one, 1, 0), PAGE, "pipe");
	attrs = request(PAGE, 4 * PAGE, PRIVATE);
	check(ask(fd, &attrs), EAGAIN, "pipe.private");
	check(attrs.error_offset, 3 * PAGE, "pipe.error_offset");
	for (i = 1; i < 5; i++)
		check(look(at + i * PAGE), 0x10 + i, "pipe.look.%d", i);
	check(convert(fd, 1, 2, PRIVATE), 0, "pipe.before");
	check(convert(fd, 4, 1, PRIVATE), 0, "pipe.behind");
	attrs = request(PAGE, 4 * PAGE, PRIVATE);
	check(ask(fd, &attrs), EAGAIN, "pipe.rest");
	check(attrs.error_offset, 3 * PAGE, "pipe.rest.error_offset");
	check(convert(fd, 3, 1, 0), 0, "pipe.shared");
	close(pipes[0]);
	close(pipes[1]);
	check(convert(fd, 1, 4, PRIVATE), 0, "pipe.closed");
	check(convert(fd, 0, PAGES, 0), 0, "pipe.shared.all");

	/* Pages that have just been touched, and that are locked. */
	locked = map(fd, PAGES);
	check(mlock(locked, PAGES * PAGE), 0, "locked");
	check(convert(fd, 0, PAGES, PRIVATE), 0, "locked.private");
	for (i = 0; i < PAGES; i += PAGES - 1)
		check(look(locked + i * PAGE), -SIGBUS, "locked.look.%d", i);
	check(convert(fd, 0, PAGES, 0), 0, "locked.shared");
	check(look(locked), 0x10, "locked.look.shared");
	munmap(locked, PAGES * PAGE);
}

static void both(int fd, unsigned char *at)
{
	long long mapped;
	int i;

	check(convert(fd, 0, PAGES, 0), 0, "both.shared");
	check(convert(fd, 8, 2, PRIVATE), 0, "both.no-slot");
	check(set_slot(1, BASE, PAGES * PAGE, at, fd), 0, "slot");
	for (i = 6; i < 12; i++)
		guest_writes(i, 0x1000 + i);
	for (i = 6; i < 12; i++)
		check(look(at + i * PAGE), i == 8 || i == 9 ? -SIGBUS : i, "both.look.%d", i);

	/* Only what gets another kind is unmapped from the guest. */
	mapped = counter("pages_4k");
	check(convert(fd, 8, 2, PRIVATE), 0, "both.again");
	check(counter("pages_4k") - mapped, 0, "both.again.unmapped");
	check(convert(fd, 7, 4, PRIVATE), 0, "both.private");
	check(counter("pages_4k") - mapped, -2, "both.private.unmapped");
	check(guest_reads(7), 0x1007, "both.private.content");
	guest_writes(7, 0x2007);
	mapped = counter("pages_4k");
	check(convert(fd, 6, 2, 0), 0, "both.back");
	check(counter("pages_4k") - mapped, -1, "both.back.unmapped");
	check(look(at + 7 * PAGE), 7, "both.back.look");
	check(look(at + 7 * PAGE + 1), 0x20, "both.back.content");
	check(guest_reads(7), 0x2007, "both.back.guest");

	/* The kind outlives the slot. */
	check(set_slot(1, BASE, 0, at, fd), 0, "slot.delete");
	check(look(at + 9 * PAGE), -SIGBUS, "slot.deleted.look");
	check(set_slot(1, BASE, PAGES * PAGE, at, fd), 0, "slot.again");
	check(look(at + 9 * PAGE), -SIGBUS, "slot.again.look");
	check(guest_reads(9), 0x1009, "slot.again.guest");

	/* Never touched, and converted before there is a page. */
	check(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 12 * PAGE, 2 * PAGE), 0,
	      "fresh");
	check(guest_reads(12), 0, "fresh.shared");
	check(convert(fd, 13, 1, PRIVATE), 0, "fresh.private");
	check(guest_reads(13), 0, "fresh.private.guest");
	check(set_slot(1, BASE, 0, at, fd), 0, "slot.delete.last");
}

/* A file that is private at first, that can't be mapped, and whose shared memory is its own. */
static void unmapped(void)
{
	int fd = must(make_file(vm, PAGES * PAGE, 0), "a file without flags");
	unsigned char *elsewhere;

	elsewhere = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
			 -1, 0);
	must(elsewhere == MAP_FAILED ? -1 : 0, "mmap");
	memset(elsewhere, 0x77, PAGES * PAGE);
	check(set_slot(1, BASE, PAGES * PAGE, elsewhere, fd), 0, "unmapped.slot");
	guest_writes(0, 0x3000);
	check(convert(fd, 0, 2, 0), 0, "unmapped.shared");
	check(guest_reads(0), 0x3000, "unmapped.content");
	check(guest_reads(1), 0, "unmapped.fresh");
	guest_writes(1, 0x3001);
	check(elsewhere[PAGE], 0x77, "unmapped.elsewhere");
	check(set_slot(1, BASE, 0, elsewhere, fd), 0, "unmapped.delete");
	close(fd);
}

/* With the parameter off all is as it was. */
static void old_way(void)
{
	struct kvm_memory_attributes attrs = { .address = BASE, .size = PAGE,
					       .attributes = PRIVATE };
	struct kvm_memory_attributes2 attrs2 = request(0, PAGE, PRIVATE);
	unsigned char *shared;
	int fd;

	check(make_file(vm, PAGES * PAGE, 3) < 0 ? errno : 0, EINVAL, "off.init-shared");
	fd = must(make_file(vm, PAGES * PAGE, 0), "a file");
	check(ask(fd, &attrs2), ENOTTY, "off.file");
	check(ask(fd, NULL), ENOTTY, "off.file.null");
	attrs2.flags = 1;
	check(ask(fd, &attrs2), ENOTTY, "off.file.flags");
	shared = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	must(shared == MAP_FAILED ? -1 : 0, "mmap");
	check(set_slot(1, BASE, PAGES * PAGE, shared, fd), 0, "off.slot");
	guest_writes(0, 0x1000);
	check(shared[1], 0x10, "off.shared");
	check(ioctl(vm, KVM_SET_MEMORY_ATTRIBUTES, &attrs), 0, "off.convert");
	check(guest_reads(0), 0, "off.private");
	guest_writes(0, 0x2000);
	check(shared[1], 0x10, "off.hidden");
	close(fd);
}

int main(void)
{
	unsigned char *at;
	char on = 0;
	int fd;

	fd = open(PARAMETER, O_RDONLY);
	if (fd < 0 || read(fd, &on, 1) != 1) {
		perror(PARAMETER);
		return 2;
	}
	close(fd);
	printf("parameter %c\n", on);
	signal(SIGBUS, on_sigbus);

	device = must(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	vm = must(ioctl(device, KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM), "KVM_CREATE_VM");
	layout();
	capabilities(on == 'Y');
	start_guest();
	if (on == 'Y') {
		fd = must(make_file(vm, PAGES * PAGE,
				    GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED),
			  "a shared file");
		at = map(fd, PAGES);
		refusals(fd);
		user_space(fd, at);
		both(fd, at);
		unmapped();
	} else {
		old_way();
	}
	printf("%s\n", bad ? "something is BAD" : "all is well");
	return bad;
}
