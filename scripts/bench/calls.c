/*
 * ioctls issued and timed by C, in the process that measures Python's: a VM's ioctls are refused to
 * any other.  Each function returns nanoseconds, or -1 when an ioctl failed.
 */
#include <stdint.h>
#include <sys/ioctl.h>
#include <time.h>

static int64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int64_t timed(int fd, unsigned long request, void *argument)
{
	int64_t start = now();

	return ioctl(fd, request, argument) < 0 ? -1 : now() - start;
}

/* Two ioctls that undo each other, some times over. */
int64_t timed_cycle(int fd, unsigned long first, void *first_argument, unsigned long second,
		    void *second_argument, int times)
{
	int64_t start = now();

	for (int i = 0; i < times; i++)
		if (ioctl(fd, first, first_argument) < 0 || ioctl(fd, second, second_argument) < 0)
			return -1;
	return now() - start;
}
