/*
 * The C side of the benchmarks: takes one request a line on stdin, answers with one line.
 *
 *   twin loop HEX   brings up a vCPU with the code HEX; "N" runs it for N exits and handles each,
 *                   answer: nanoseconds, sum of what the guest wrote
 *   twin spawn      "ARG\tARG…" runs a program, answer: nanoseconds to its first byte of output,
 *                   to its end, of CPU time, largest resident size in KiB, wait status
 *
 * Programs are started here and not by Python, since a child is charged with the resident size of
 * the process that it was forked from.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

enum { MEMORY = 0x2000, ENTRY = 0x1000, PORT = 0x3f8 }; /* as in guest.py */

static int64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int64_t nanoseconds(struct timeval t)
{
	return t.tv_sec * 1000000000LL + t.tv_usec * 1000LL;
}

static int check(int result, const char *what)
{
	if (result < 0)
		err(2, "%s", what);
	return result;
}

static void *map(size_t size, int flags, int fd)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);

	if (p == MAP_FAILED)
		err(2, "mmap");
	return p;
}

static void loop(const char *hex)
{
	int kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	int vm = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	unsigned char *memory = map(MEMORY, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	struct kvm_userspace_memory_region region = {
		.memory_size = MEMORY,
		.userspace_addr = (uintptr_t)memory,
	};
	struct kvm_regs regs = { .rip = ENTRY, .rdx = PORT, .rflags = 2 };
	struct kvm_sregs sregs;
	struct kvm_run *run;
	char *line = NULL;
	size_t room = 0;
	int vcpu;

	for (unsigned int byte, i = 0; sscanf(hex + 2 * i, "%2x", &byte) == 1; i++)
		memory[ENTRY + i] = byte;
	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
	vcpu = check(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	run = map(check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE"),
		  MAP_SHARED, vcpu);
	check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs.base = sregs.cs.selector = 0;
	check(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");

	while (getline(&line, &room, stdin) > 0) {
		long n = atol(line);
		uint64_t sum = 0;
		int64_t start = now();

		for (long i = 0; i < n; i++) {
			check(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
			if (run->exit_reason != KVM_EXIT_IO || run->io.port != PORT)
				errx(2, "unexpected exit %u", run->exit_reason);
			sum += ((unsigned char *)run)[run->io.data_offset];
		}
		printf("%lld %llu\n", (long long)(now() - start), (unsigned long long)sum);
		fflush(stdout);
	}
}

static void spawn_one(char *line)
{
	char *argv[64], buffer[4096];
	int argc = 0, out[2], status, error;
	int64_t start, first = 0, end;
	posix_spawn_file_actions_t actions;
	struct rusage usage;
	pid_t pid;

	line[strcspn(line, "\n")] = 0;
	for (char *arg; argc < 63 && (arg = strsep(&line, "\t")); argc++)
		argv[argc] = arg;
	argv[argc] = NULL;
	check(pipe2(out, O_CLOEXEC), "pipe2");
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
	posix_spawn_file_actions_adddup2(&actions, out[1], 1);

	start = now();
	error = posix_spawn(&pid, argv[0], &actions, NULL, argv, environ);
	if (error)
		errx(2, "%s: %s", argv[0], strerror(error));
	close(out[1]);
	while (read(out[0], buffer, sizeof(buffer)) > 0)
		if (!first)
			first = now() - start;
	check(wait4(pid, &status, 0, &usage), "wait4");
	end = now() - start;
	close(out[0]);
	posix_spawn_file_actions_destroy(&actions);
	printf("%lld %lld %lld %ld %d\n", (long long)first, (long long)end,
	       (long long)(nanoseconds(usage.ru_utime) + nanoseconds(usage.ru_stime)),
	       usage.ru_maxrss, status);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	char *line = NULL;
	size_t room = 0;

	if (argc == 3 && !strcmp(argv[1], "loop"))
		loop(argv[2]);
	else if (argc == 2 && !strcmp(argv[1], "spawn"))
		while (getline(&line, &room, stdin) > 0)
			spawn_one(line);
	else
		errx(2, "usage: twin loop HEX | twin spawn");
	return 0;
}
