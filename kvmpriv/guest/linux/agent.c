/* The agent: a program in a Linux guest that runs commands and copies files for its host.
 *
 * It is one static program without a libc, so that a root file system of nothing but busybox can
 * carry it.  `make cdefs` compiles it into agent_ready.py.  protocol.py is the other end; it defines
 * the frames, and archive.py the stream in which files travel.
 *
 *	agent		as PID 1: starts the agent, and reaps processes that have lost their parents
 *	init		as PID 1: starts the agent, and executes the guest's own init ($kvmpriv_init or
 *			/init)
 *	agent -		serves the socket that is its standard input (for tests on the host)
 *
 * The agent is one process that never waits for anything but poll.  It uses nothing of the root file
 * system: it reads sysfs and proc through mounts of its own, which have no place in the tree.  A
 * command begins in the root directory of PID 1, so that it finds what init has mounted, also after
 * switch_root.  argv[0] begins with '@': systemd then lets the agent live when it leaves the initrd.
 *
 * As PID 1 it first loads the modules /.kvmpriv/modules/0, 1, ... that the initrd brings along.  It
 * answers the host when there is a /bin/sh; with $kvmpriv_wait_for_root not before PID 1 has another
 * root directory than the initrd's.  The module virtio_console may be on that one.
 *
 * With $kvmpriv_vsock it connects to that port of the host over vsock, if the kernel has vsock by
 * then; else it opens the port of the virtio console.  The bytes are the same.
 */

#include <errno.h>
#include <fcntl.h>
#include <linux/reboot.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>	/* needs sys/socket.h */
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

enum { VERSION = 1 };
enum { START = 1, DATA, END, CREDIT, SIGNAL, RESIZE, CLOSE, POWER_OFF };	/* from the host */
enum { HELLO = 64, STARTED, FAILED, EXITED };		/* to the host; DATA, END and CREDIT, too */
enum { COMMAND, GET, PUT };				/* what START starts */
enum { ON_TERMINAL = 1, WITH_ENVIRONMENT = 2 };		/* flags of START */
enum { IN_CHDIR = 1, IN_EXEC, IN_START };		/* where FAILED happened */

#define PAYLOAD_MAX (64 << 10)
#define STDIN_WINDOW (256 << 10)
#define OUTPUT_WINDOW (256 << 10)
#define PIECE ((32 << 10) - 12)	/* the most in a DATA frame to the host: Linux writes 32 KiB at once */
#define JOBS 64
#define SYSTEMD_POWER_OFF 38	/* glibc's SIGRTMIN + 4: systemd(1), "Signals" */
#define PORT_WAIT 20000	/* ms after which a missing port is reported */
#define ANSWER_MAX 4096	/* the least room for the answers to one frame, and for all EXITED */
#define PATH_SIZE 4096
#define PORT_NAME "kvmpriv.agent\n"
#define VSOCK_DRIVER "bus/virtio/drivers/vmw_vsock_virtio_transport"
#define OWN_VSOCK_PORT 1023	/* for root only: the host takes no other program's connection */
#define DEFAULT_PATH "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

struct frame {
	uint8_t kind, stream;
	uint16_t zero;
	uint32_t channel, size;
};

struct start {
	uint32_t what, flags, arguments, variables;
	uint16_t rows, columns;
};	/* then strings, each with its 0: the working directory, the arguments, the environment */

struct failure {
	uint32_t where, error;
};

struct job {
	int used, running, closed, terminal;
	uint32_t channel;
	int pid, status;
	int report;			/* where the child writes struct failure; it is closed by exec */
	int in, out[2];			/* -1: closed; a terminal has in == out[0] */
	int in_ends;
	uint32_t credit[2], owed;
	uint32_t at, held;		/* of the ring */
	uint8_t ring[STDIN_WINDOW];
};

static struct job jobs[JOBS];
static uint8_t received[sizeof(struct frame) + PAYLOAD_MAX + 4096];
static size_t received_size;
static uint8_t sending[128 << 10];
static size_t sending_at, sending_end;
static int port, signals = -1, proc = -1, in_guest;
static int ends;	/* whether the other end of `port` can be closed for good */
static unsigned turn;
static char **environment;

/* -- what a libc would have -------------------------------------------------------------------- */

static inline long syscall6(long n, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall" : "=a"(result)
			 : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

#define SIX(n, a, b, c, d, e, f, ...) \
	syscall6(n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
#define sys(name, ...) SIX(SYS_##name, ##__VA_ARGS__, 0, 0, 0, 0, 0, 0)

void *memcpy(void *to, const void *from, size_t size)
{
	void *start = to;
	size_t words = size / 8;

	size %= 8;	/* an emulated CPU takes as long for a byte as for a word */
	__asm__ volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(words) : : "memory");
	__asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
	return start;
}

void *memmove(void *to, const void *from, size_t size)
{
	if ((uintptr_t)to <= (uintptr_t)from || (uint8_t *)to >= (const uint8_t *)from + size)
		return memcpy(to, from, size);
	while (size--)
		((uint8_t *)to)[size] = ((const uint8_t *)from)[size];
	return to;
}

void *memset(void *to, int value, size_t size)
{
	void *start = to;

	__asm__ volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(value) : "memory");
	return start;
}

static size_t length(const char *text)
{
	size_t size = 0;

	while (text[size])
		size++;
	return size;
}

static int same(const char *a, const char *b, size_t size)
{
	while (size--)
		if (*a++ != *b++)
			return 0;
	return 1;
}

static char *variable(char **list, const char *name)
{
	for (; *list; list++)
		if (same(*list, name, length(name)))
			return *list + length(name);
	return 0;
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		sys(close, *fd);
	*fd = -1;
}

static void nonblocking(int fd)
{
	long flags = sys(fcntl, fd, F_GETFL);

	sys(fcntl, fd, F_SETFL, flags | O_NONBLOCK);
}

static void sleep_ms(long ms)
{
	struct { long seconds, ns; } time = { ms / 1000, ms % 1000 * 1000000 };

	sys(nanosleep, &time, 0);
}

/* To the kernel's log, as a line that `quiet` lets through: there may be no /dev/console. */
static void say(const char *text)
{
	long log;

	sys(mkdir, "/.kvmpriv", 0700);
	sys(mknod, "/.kvmpriv/log", S_IFCHR | 0600, 1 << 8 | 11);
	log = sys(open, "/.kvmpriv/log", O_WRONLY | O_CLOEXEC);
	sys(unlink, "/.kvmpriv/log");
	sys(write, log, text, length(text));
	sys(close, log);
}

/* systemd ends its services first, unless it is asked for the second time; any other init is not
 * asked.
 */
static void power_off(void)
{
	static int asked;
	struct stat found;

	sys(sync);
	if (!asked && proc >= 0 && !sys(newfstatat, proc, "1/root/run/systemd/system", &found, 0)) {
		asked = 1;
		if (!sys(kill, 1, SYSTEMD_POWER_OFF))
			return;
	}
	sys(reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_POWER_OFF, 0);
}

/* A guest without memory kills a command, not the agent. */
static void set_oom_score(const char *score)
{
	long fd = sys(openat, proc, "self/oom_score_adj", O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return;
	sys(write, fd, score, length(score));
	sys(close, fd);
}

/* -- frames to the host ------------------------------------------------------------------------ */

static size_t room(void)
{
	if (sending_at) {
		memmove(sending, sending + sending_at, sending_end - sending_at);
		sending_end -= sending_at;
		sending_at = 0;
	}
	return sizeof(sending) - sending_end;
}

static void send_frame(uint8_t kind, uint8_t stream, uint32_t channel, const void *data, uint32_t size)
{
	struct frame frame = { kind, stream, 0, channel, size };

	memcpy(sending + sending_end, &frame, sizeof(frame));
	memcpy(sending + sending_end + sizeof(frame), data, size);
	sending_end += sizeof(frame) + size;
}

static void flush(void)
{
	while (sending_at < sending_end) {
		/* A port of virtio takes nothing, and returns 0, while it has no bounce buffers. */
		long done = sys(write, port, sending + sending_at, sending_end - sending_at);

		if (done <= 0)
			return;
		sending_at += done;
	}
	sending_at = sending_end = 0;
}

/* -- files ------------------------------------------------------------------------------------- */

struct record {
	uint8_t kind, zero;
	uint16_t name_size;
	uint32_t mode;
	uint64_t size;
};	/* then the name, and `size` bytes: of content, or a symbolic link's target */

enum { NOT_A_FILE = 0x10000 };	/* an error of ours: then the type of the file is in the mode */

static uint8_t stream[32 << 10];
static size_t stream_size;
static char path[PATH_SIZE];	/* of the file that is copied; the part after `base` is sent */
static size_t path_size, base;

static void stream_flush(void)
{
	size_t at = 0;

	while (at < stream_size) {
		long done = sys(write, 1, stream + at, stream_size - at);

		if (done <= 0)
			sys(exit_group, 1);
		at += done;
	}
	stream_size = 0;
}

static void record(uint8_t kind, const char *name, size_t name_size, uint32_t mode, const void *data,
		   size_t size)
{
	struct record record = { kind, 0, name_size, mode, size };

	if (stream_size + sizeof(record) + name_size + size > sizeof(stream))
		stream_flush();
	memcpy(stream + stream_size, &record, sizeof(record));
	memcpy(stream + stream_size + sizeof(record), name, name_size);
	memcpy(stream + stream_size + sizeof(record) + name_size, data, size);
	stream_size += sizeof(record) + name_size + size;
}

static void refuse(uint32_t error, uint32_t mode)
{
	uint32_t both[2] = { error, mode };

	record('!', path, path_size, 0, both, sizeof(both));
	stream_flush();
	sys(exit_group, 1);
}

static long checked(long result)
{
	if (result < 0)
		refuse(-result, 0);
	return result;
}

static void append(const char *name, size_t size)
{
	if (path_size + 1 + size >= PATH_SIZE)
		refuse(ENAMETOOLONG, 0);
	path[path_size++] = '/';
	memcpy(path + path_size, name, size);
	path_size += size;
	path[path_size] = 0;
}

static void get_one(int in, const char *name, int flags);

static void get_folder(int folder)
{
	struct entry {
		uint64_t inode, offset;
		uint16_t size;
		uint8_t type;
		char name[];
	};
	uint8_t entries[2048] __attribute__((aligned(8)));
	size_t before = path_size;
	long size;

	while ((size = checked(sys(getdents64, folder, entries, sizeof(entries)))) > 0) {
		struct entry *entry;

		for (long at = 0; at < size; at += entry->size) {
			entry = (struct entry *)(entries + at);
			if (same(entry->name, ".", 2) || same(entry->name, "..", 3))
				continue;
			append(entry->name, length(entry->name));
			get_one(folder, entry->name, AT_SYMLINK_NOFOLLOW);
			path[path_size = before] = 0;
		}
	}
}

static void get_one(int in, const char *name, int flags)
{
	static uint8_t piece[16 << 10];
	struct stat found;	/* the kernel's struct is the same on x86-64 */
	const char *relative = path + base + (path_size > base);	/* without its slash */
	size_t relative_size = path + path_size - relative;
	uint32_t mode;
	long fd, size;

	checked(sys(newfstatat, in, name, &found, flags));
	mode = found.st_mode & 07777;
	if (S_ISLNK(found.st_mode)) {
		size = checked(sys(readlinkat, in, name, piece, sizeof(piece)));
		record('l', relative, relative_size, 0777, piece, size);
		return;
	}
	if (!S_ISREG(found.st_mode) && !S_ISDIR(found.st_mode))
		refuse(NOT_A_FILE, found.st_mode);
	fd = checked(sys(openat, in, name, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK |
			 (flags ? O_NOFOLLOW : 0)));
	checked(sys(fstat, fd, &found));
	if (!S_ISREG(found.st_mode) && !S_ISDIR(found.st_mode))
		refuse(NOT_A_FILE, found.st_mode);
	if (S_ISDIR(found.st_mode)) {
		record('d', relative, relative_size, mode, 0, 0);
		get_folder(fd);
	} else {
		/* To the end, whatever the size: that of a file in /proc is 0. */
		record('f', relative, relative_size, mode, 0, 0);
		sys(fcntl, fd, F_SETFL, 0);
		while ((size = checked(sys(read, fd, piece, sizeof(piece)))) > 0)
			record('c', 0, 0, 0, piece, size);
		record('e', 0, 0, 0, 0, 0);
	}
	sys(close, fd);
}

static void set_path(const char *name)
{
	path_size = base = 0;
	if (length(name) >= PATH_SIZE - 1)
		refuse(ENAMETOOLONG, 0);
	memcpy(path, name, length(name) + 1);
	path_size = length(name);
	base = path_size;
}

static void get(const char *name)
{
	set_path(name);
	get_one(AT_FDCWD, name, 0);
	record('z', 0, 0, 0, 0, 0);
	stream_flush();
}

static void take(void *to, size_t size)
{
	size_t at = 0;

	while (at < size) {
		long done = sys(read, 0, (uint8_t *)to + at, size - at);

		if (done <= 0)	/* the host has given up */
			sys(exit_group, 1);
		at += done;
	}
}

static void put(const char *name)
{
	static uint8_t piece[PAYLOAD_MAX + 1];
	struct record next;
	uint32_t mode = 0;
	int fd = -1;

	set_path(name);
	for (;;) {
		char entry[PATH_SIZE];

		take(&next, sizeof(next));
		if (next.name_size >= PATH_SIZE - 1 || next.size > PAYLOAD_MAX)
			refuse(EPROTO, 0);
		take(entry, next.name_size);
		take(piece, next.size);
		if (next.kind == 'f' || next.kind == 'd' || next.kind == 'l') {
			path[path_size = base] = 0;
			if (next.name_size)
				append(entry, next.name_size);
		}
		switch (next.kind) {
		case 'f':
			mode = next.mode;
			fd = checked(sys(open, path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC |
					 O_NOCTTY, 0600));
			break;
		case 'c':
			for (size_t at = 0; at < next.size;)
				at += checked(sys(write, fd, piece + at, next.size - at));
			break;
		case 'e':
			checked(sys(fchmod, fd, mode));
			checked(sys(close, fd));
			break;
		case 'd': {
			long made = sys(mkdir, path, 0700);
			long opened;

			if (made != -EEXIST)
				checked(made);
			opened = checked(sys(open, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
			checked(sys(fchmod, opened, next.mode));
			sys(close, opened);
			break;
		}
		case 'l':
			piece[next.size] = 0;
			sys(unlink, path);
			checked(sys(symlink, piece, path));
			break;
		case 'z':
			record('z', 0, 0, 0, 0, 0);
			stream_flush();
			return;
		default:
			refuse(EPROTO, 0);
		}
	}
}

/* -- commands ---------------------------------------------------------------------------------- */

static void fail(int report, uint32_t where, long error)
{
	struct failure failure = { where, -error };

	sys(write, report, &failure, sizeof(failure));
	sys(exit_group, 127);
}

/* execvp with the PATH of the command's own environment. */
static long execute(char **arguments, char **variables)
{
	const char *name = arguments[0], *folder = variable(variables, "PATH=");
	long error = -ENOENT, result;

	for (const char *at = name; *at; at++)
		if (*at == '/')
			return sys(execve, name, arguments, variables);
	if (!folder)
		folder = DEFAULT_PATH + 5;
	while (*name) {
		size_t size = 0;
		char whole[PATH_SIZE];

		while (folder[size] && folder[size] != ':')
			size++;
		if (size + length(name) + 2 <= sizeof(whole)) {
			memcpy(whole, folder, size);
			whole[size] = '/';	/* an empty entry is the working directory */
			memcpy(whole + size + !!size, name, length(name) + 1);
			result = sys(execve, whole, arguments, variables);
			if (result == -EACCES)
				error = result;
			else if (result != -ENOENT && result != -ENOTDIR)
				return result;
		}
		if (!folder[size])
			break;
		folder += size + 1;
	}
	return error;
}

/* In the child.  fds: its standard streams; they are above 2. */
static void become(const struct start *start, char *strings, const int *fds, int report)
{
	static char *arguments[PAYLOAD_MAX + 1], *variables[PAYLOAD_MAX + 2];
	uint64_t none = 0;
	char *directory = strings, *at = strings + length(strings) + 1;
	uint32_t count = 0;
	long result;

	for (; count < start->arguments; at += length(at) + 1)
		arguments[count++] = at;
	if (start->flags & WITH_ENVIRONMENT) {
		for (count = 0; count < start->variables; at += length(at) + 1)
			variables[count++] = at;
	} else {
		for (count = 0; environment[count] && count < PAYLOAD_MAX; count++)
			variables[count] = environment[count];
		if (!variable(environment, "PATH="))
			variables[count] = DEFAULT_PATH;
	}
	sys(setsid);
	for (int number = 0; number < 3; number++)
		sys(dup2, fds[number], number);
	if (start->flags & ON_TERMINAL)
		sys(ioctl, 0, TIOCSCTTY, 0);
	sys(rt_sigprocmask, SIG_SETMASK, &none, 0, sizeof(none));
	if (proc >= 0) {
		long root = sys(openat, proc, "1/root", O_PATH | O_DIRECTORY | O_CLOEXEC);

		set_oom_score("0");
		if (root >= 0 && !sys(fchdir, root))
			sys(chroot, ".");
	}
	if (in_guest)
		sys(chdir, "/");
	if (*directory && (result = sys(chdir, directory)))
		fail(report, IN_CHDIR, result);
	if (start->what != COMMAND) {
		sys(close, report);
		(start->what == GET ? get : put)(arguments[0]);
		sys(exit_group, 0);
	}
	fail(report, IN_EXEC, execute(arguments, variables));
}

static long open_terminal(int *fds, const struct start *start)
{
	static int pts = -1;
	struct winsize size = { start->rows, start->columns, 0, 0 };
	int unlocked = 0;
	long master = -ENOENT, slave;

	if (in_guest && proc >= 0)
		master = sys(openat, proc, "1/root/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
	else if (!in_guest)
		master = sys(open, "/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (master < 0) {	/* the guest's init has not mounted devpts */
		if (pts < 0) {
			sys(mkdir, "/.kvmpriv", 0700);
			sys(mkdir, "/.kvmpriv/pts", 0700);
			master = sys(mount, "devpts", "/.kvmpriv/pts", "devpts", 0, "ptmxmode=0600");
			if (master < 0)
				return master;
			pts = sys(open, "/.kvmpriv/pts", O_PATH | O_DIRECTORY | O_CLOEXEC);
			sys(umount2, "/.kvmpriv/pts", MNT_DETACH);
		}
		master = sys(openat, pts, "ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
	}
	if (master < 0)
		return master;
	sys(ioctl, master, TIOCSPTLCK, &unlocked);
	sys(ioctl, master, TIOCSWINSZ, &size);
	slave = sys(ioctl, master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (slave < 0) {
		sys(close, master);
		return slave;
	}
	fds[0] = slave;
	return master;
}

static struct job *find(uint32_t channel)
{
	for (struct job *job = jobs; job < jobs + JOBS; job++)
		if (job->used && job->channel == channel)
			return job;
	return 0;
}

static void failed(uint32_t channel, uint32_t where, long error)
{
	struct failure failure = { where, -error };

	send_frame(FAILED, 0, channel, &failure, sizeof(failure));
}

/* The end of the life of a job: its process has ended, and nobody waits for its streams. */
static void release(struct job *job)
{
	if (job->running || job->report >= 0 || job->out[0] >= 0 || job->out[1] >= 0)
		return;
	sys(wait4, job->pid, 0, 0, 0);	/* until now its number could not go to another process */
	if (job->in >= 0)
		close_fd(&job->in);
	job->used = 0;
}

static void start_job(uint32_t channel, const uint8_t *payload, uint32_t size)
{
	struct start start;
	char *strings = (char *)payload + sizeof(start);
	uint32_t count = 0;
	int reports[2], pipes[3][2], theirs[3] = { -1, -1, -1 };
	struct job *job = jobs;
	long error = 0, pid = 0;

	memcpy(&start, payload, size < sizeof(start) ? size : sizeof(start));
	for (uint32_t at = sizeof(start); at < size; at++)
		count += !payload[at];
	if (size <= sizeof(start) || payload[size - 1] || !start.arguments ||
	    count != (uint64_t)1 + start.arguments + start.variables)
		return failed(channel, IN_START, -EPROTO);
	while (job < jobs + JOBS && job->used)
		job++;
	if (job == jobs + JOBS)
		return failed(channel, IN_START, -EAGAIN);

	for (int number = 0; number < 3; number++)
		pipes[number][0] = pipes[number][1] = -1;
	job->in = job->out[0] = job->out[1] = -1;
	if (sys(pipe2, reports, O_CLOEXEC))
		return failed(channel, IN_START, -EMFILE);
	if (start.flags & ON_TERMINAL) {
		error = open_terminal(theirs, &start);
		if (error >= 0) {
			job->in = job->out[0] = error;
			theirs[1] = theirs[2] = theirs[0];
			error = 0;
		}
	} else {
		for (int number = 0; number < 3 && !error; number++)
			error = sys(pipe2, pipes[number], O_CLOEXEC);
		theirs[0] = pipes[0][0], job->in = pipes[0][1];
		for (int number = 1; number < 3; number++)
			theirs[number] = pipes[number][1], job->out[number - 1] = pipes[number][0];
	}
	if (!error) {
		pid = sys(fork);
		if (pid == 0)
			become(&start, strings, theirs, reports[1]);
		if (pid < 0)
			error = pid;
	}
	sys(close, reports[1]);
	if (start.flags & ON_TERMINAL)
		theirs[1] = theirs[2] = -1;
	for (int number = 0; number < 3; number++)
		close_fd(&theirs[number]);
	if (error) {
		sys(close, reports[0]);
		if (start.flags & ON_TERMINAL)
			job->out[0] = -1;
		close_fd(&job->in), close_fd(&job->out[0]), close_fd(&job->out[1]);
		return failed(channel, IN_START, error);
	}
	job->used = job->running = 1;
	job->closed = job->in_ends = 0;
	job->terminal = !!(start.flags & ON_TERMINAL);
	job->channel = channel, job->pid = pid;
	job->report = reports[0];
	job->credit[0] = job->credit[1] = OUTPUT_WINDOW;
	job->owed = job->at = job->held = 0;
	nonblocking(job->report), nonblocking(job->in), nonblocking(job->out[0]);
	if (job->out[1] >= 0)
		nonblocking(job->out[1]);
}

static void end_input(struct job *job)
{
	if (job->terminal)
		job->in = -1;	/* the terminal itself is closed with its output */
	else
		close_fd(&job->in);
}

static void end_output(struct job *job, int number)
{
	if (job->out[number] < 0)
		return;
	if (job->terminal && job->in >= 0)
		job->in = -1;
	close_fd(&job->out[number]);
	if (!job->closed)
		send_frame(END, number + 1, job->channel, 0, 0);
}

static void write_input(struct job *job)
{
	while (job->held) {
		uint32_t size = STDIN_WINDOW - job->at;
		long done;

		done = sys(write, job->in, job->ring + job->at, size < job->held ? size : job->held);
		if (done == -EAGAIN)
			break;
		if (done <= 0) {	/* it has closed its standard input */
			end_input(job);
			job->held = 0;
			return send_frame(END, 0, job->channel, 0, 0);
		}
		job->at = (job->at + done) % STDIN_WINDOW;
		job->held -= done;
		job->owed += done;
	}
	if (job->owed && (!job->held || job->owed > STDIN_WINDOW / 4)) {
		send_frame(CREDIT, 0, job->channel, &job->owed, sizeof(job->owed));
		job->owed = 0;
	}
	if (!job->held && job->in_ends) {
		if (job->terminal)
			sys(write, job->in, "\4", 1);	/* Ctrl-D */
		end_input(job);
	}
}

static void read_output(struct job *job, int number)
{
	uint32_t most = job->credit[number] < PIECE ? job->credit[number] : PIECE;
	uint8_t *place = sending + sending_end + sizeof(struct frame);
	long size = sys(read, job->out[number], place, most);

	if (size == -EAGAIN)
		return;
	if (size <= 0)		/* EIO: a terminal that no process has open any more */
		return end_output(job, number);
	job->credit[number] -= size;
	if (!job->closed) {
		struct frame frame = { DATA, number + 1, 0, job->channel, size };

		memcpy(place - sizeof(frame), &frame, sizeof(frame));
		sending_end += sizeof(frame) + size;
	}
}

static void read_report(struct job *job)
{
	struct failure failure;
	long size = sys(read, job->report, &failure, sizeof(failure));
	uint32_t pid = job->pid;

	if (size == -EAGAIN)
		return;
	close_fd(&job->report);
	if (size == sizeof(failure)) {
		job->closed = 1;	/* for the host it never began */
		send_frame(FAILED, 0, job->channel, &failure, sizeof(failure));
		end_input(job);
		end_output(job, 0);
		end_output(job, 1);
	} else {
		send_frame(STARTED, 0, job->channel, &pid, sizeof(pid));
		if (job->terminal)
			send_frame(END, 2, job->channel, 0, 0);	/* all comes on the first */
	}
}

static void look_for_ends(void)
{
	for (struct job *job = jobs; job < jobs + JOBS; job++) {
		siginfo_t found;
		uint32_t status;

		if (!job->used || !job->running || job->report >= 0)
			continue;	/* the host is told of the start first */
		found.si_pid = 0;
		if (sys(waitid, P_PID, job->pid, &found, WNOHANG | WEXITED | WNOWAIT, 0) ||
		    !found.si_pid)
			continue;
		job->running = 0;
		status = found.si_code == CLD_EXITED ? found.si_status & 0xff : -found.si_status;
		if (!job->closed)
			send_frame(EXITED, 0, job->channel, &status, sizeof(status));
	}
}

/* -- frames from the host ---------------------------------------------------------------------- */

static void serve(const struct frame *frame, const uint8_t *payload)
{
	struct job *job = find(frame->channel);
	uint32_t value = 0, other = 0;

	if (frame->kind == START && !job)
		return start_job(frame->channel, payload, frame->size);
	if (frame->kind == POWER_OFF)
		return power_off();
	if (!job)
		return;		/* it has ended, and the host does not know yet */
	if (frame->size >= 4)
		memcpy(&value, payload, 4);
	if (frame->size >= 8)
		memcpy(&other, payload + 4, 4);
	switch (frame->kind) {
	case DATA:
		if (job->in < 0 || frame->size > STDIN_WINDOW - job->held)
			break;
		value = 0;	/* how much of it is done */
		if (!job->held) {	/* most often: past the ring */
			long size = sys(write, job->in, payload, frame->size);

			value = size > 0 ? size : 0;
			job->owed += value;
		}
		while (value < frame->size) {
			uint32_t at = (job->at + job->held) % STDIN_WINDOW;
			uint32_t size = STDIN_WINDOW - at;

			if (size > frame->size - value)
				size = frame->size - value;
			memcpy(job->ring + at, payload + value, size);
			job->held += size;
			value += size;
		}
		write_input(job);
		break;
	case END:
		job->in_ends = 1;
		if (job->in >= 0)
			write_input(job);
		break;
	case CREDIT:
		if (frame->stream == 1 || frame->stream == 2)
			job->credit[frame->stream - 1] += value;
		break;
	case SIGNAL:		/* 1: to all of its process group */
		if (!other || sys(kill, -job->pid, value))	/* it has no group before setsid */
			sys(kill, job->pid, value);
		break;
	case RESIZE: {
		struct winsize size = { value, other, 0, 0 };

		if (job->terminal && job->out[0] >= 0)
			sys(ioctl, job->out[0], TIOCSWINSZ, &size);
		break;
	}
	case CLOSE:		/* nobody reads it any more: one stream, or all, and the status */
		if (frame->stream == 1 || frame->stream == 2) {
			end_output(job, frame->stream - 1);
			break;
		}
		job->closed = 1;
		end_input(job);
		end_output(job, 0);
		end_output(job, 1);
		break;
	}
}

/* Serves what has arrived as long as there is room for the answers. */
static void serve_received(void)
{
	size_t at = 0;

	while (room() >= ANSWER_MAX) {
		struct frame frame;

		if (received_size - at < sizeof(frame))
			break;
		memcpy(&frame, received + at, sizeof(frame));
		if (frame.size > PAYLOAD_MAX)
			sys(exit_group, 1);	/* this is not our host */
		if (received_size - at < sizeof(frame) + frame.size)
			break;
		serve(&frame, received + at + sizeof(frame));
		at += sizeof(frame) + frame.size;
	}
	if (at)
		memmove(received, received + at, received_size - at);
	received_size -= at;
}

/* Returns 0 at the end of the port. */
static int receive(void)
{
	long size = sys(read, port, received + received_size, sizeof(received) - received_size);

	if (size > 0)
		received_size += size;
	return size > 0 || size == -EAGAIN;
}

static void loop(void)
{
	static struct pollfd polled[2 + 4 * JOBS];
	static struct { uint8_t job, which; } of[2 + 4 * JOBS];
	struct { uint64_t magic; uint32_t version, zero; } hello = { 0x766972706d766bULL, VERSION, 0 };

	send_frame(HELLO, 0, 0, &hello, sizeof(hello));
	for (;;) {
		unsigned count = 2;
		int can_read;

		flush();
		serve_received();
		for (struct job *job = jobs; job < jobs + JOBS; job++)
			if (job->used)
				release(job);
		flush();
		can_read = room() >= sizeof(sending) / 2;
		polled[0] = (struct pollfd){
			port,
			(received_size < sizeof(received) ? POLLIN : 0) | (sending_end ? POLLOUT : 0),
			0
		};
		polled[1] = (struct pollfd){ signals, POLLIN, 0 };
		turn = (turn + 1) % JOBS;
		for (unsigned number = 0; number < JOBS; number++) {
			struct job *job = &jobs[(number + turn) % JOBS];
			int reads[3] = { job->report, job->out[0], job->out[1] };

			if (!job->used)
				continue;
			for (unsigned which = 0; which < 3; which++) {
				if (reads[which] < 0 || !can_read || (which && !job->credit[which - 1]))
					continue;
				of[count].job = job - jobs, of[count].which = which;
				polled[count++] = (struct pollfd){ reads[which], POLLIN, 0 };
			}
			if (job->in >= 0 && (job->held || !job->terminal)) {
				/* No event: poll reports that the command has closed its end. */
				of[count].job = job - jobs, of[count].which = 3;
				polled[count++] = (struct pollfd){ job->in, job->held ? POLLOUT : 0, 0 };
			}
		}
		if (sys(poll, polled, count, -1) < 0)
			continue;
		if (polled[1].revents) {
			uint8_t information[128];

			while (sys(read, signals, information, sizeof(information)) > 0)
				;
		}
		for (unsigned at = 2; at < count; at++) {
			struct job *job = &jobs[of[at].job];

			if (!polled[at].revents)
				continue;
			if (room() < sizeof(sending) / 4)
				break;
			if (of[at].which == 0 && job->report >= 0)
				read_report(job);
			else if (of[at].which < 3 && of[at].which && job->out[of[at].which - 1] >= 0)
				read_output(job, of[at].which - 1);
			else if (of[at].which == 3 && job->in >= 0 && job->held)
				write_input(job);
			else if (of[at].which == 3 && job->in >= 0) {
				end_input(job);
				send_frame(END, 0, job->channel, 0, 0);
			}
		}
		look_for_ends();
		if (polled[0].revents & (POLLIN | POLLHUP | POLLERR) &&
		    received_size < sizeof(received) && !receive()) {
			if (ends)
				return;
			sleep_ms(5);	/* the host does not listen yet */
		}
	}
}

/* -- the start --------------------------------------------------------------------------------- */

/* The root of a file system that is mounted nowhere. */
static int mounted(const char *kind)
{
	int fd;

	sys(mkdir, "/.kvmpriv", 0700);
	sys(mkdir, "/.kvmpriv/mount", 0700);
	if (sys(mount, kind, "/.kvmpriv/mount", kind, 0, 0))
		return -1;
	fd = sys(open, "/.kvmpriv/mount", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	sys(umount2, "/.kvmpriv/mount", MNT_DETACH);
	sys(rmdir, "/.kvmpriv/mount");
	return fd;
}

/* "major:minor" -> a device number, 0 if it is none. */
static uint64_t device_number(const char *text, long size)
{
	uint64_t numbers[2] = { 0, 0 };
	int which = 0;

	for (long at = 0; at < size && text[at] != '\n'; at++) {
		if (text[at] == ':')
			which = 1;
		else
			numbers[which] = numbers[which] * 10 + (text[at] - '0');
	}
	return numbers[0] << 8 | (numbers[1] & 0xff) | (numbers[1] & ~0xffULL) << 12;
}

static long read_attribute(int folder, const char *port_name, const char *name, char *to, size_t size)
{
	char relative[PATH_SIZE];
	size_t port_size = length(port_name);
	long fd, done;

	memcpy(relative, port_name, port_size);
	relative[port_size] = '/';
	memcpy(relative + port_size + 1, name, length(name) + 1);
	fd = sys(openat, folder, relative, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return fd;
	done = sys(read, fd, to, size);
	sys(close, fd);
	return done;
}

/* Opens our port if the kernel has found it; -1 if not. */
static int open_port(int sysfs)
{
	uint8_t entries[2048] __attribute__((aligned(8)));
	int folder = sys(openat, sysfs, "class/virtio-ports", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	int found = -1;
	long size;

	if (folder < 0)
		return -1;
	while (found < 0 && (size = sys(getdents64, folder, entries, sizeof(entries))) > 0) {
		for (long at = 0; at < size; at += *(uint16_t *)(entries + at + 16)) {
			const char *name = (char *)entries + at + 19;
			char value[64];

			if (*name == '.' || length(name) > 64 ||
			    read_attribute(folder, name, "name", value, sizeof(value)) !=
			    sizeof(PORT_NAME) - 1 || !same(value, PORT_NAME, sizeof(PORT_NAME) - 1))
				continue;
			size = read_attribute(folder, name, "dev", value, sizeof(value));
			sys(mkdir, "/.kvmpriv", 0700);
			sys(mknod, "/.kvmpriv/port", S_IFCHR | 0600, device_number(value, size));
			found = sys(open, "/.kvmpriv/port", O_RDWR | O_CLOEXEC | O_NONBLOCK);
			sys(unlink, "/.kvmpriv/port");
			break;
		}
	}
	sys(close, folder);
	return found;
}

/* Connects to `host_port` of the host; -1 if the kernel can't, or has not found its device yet.
 * What fails otherwise is not tried again: `host_port` is 0 then.
 */
static int connect_to_host(int sysfs, uint32_t *host_port)
{
	struct sockaddr_vm ours = {
		.svm_family = AF_VSOCK, .svm_port = OWN_VSOCK_PORT, .svm_cid = VMADDR_CID_ANY
	};
	struct sockaddr_vm host = {
		.svm_family = AF_VSOCK, .svm_port = *host_port, .svm_cid = VMADDR_CID_HOST
	};
	struct stat found;
	long made, error;

	/* Without a driver, each socket would make the kernel start /sbin/modprobe. */
	if (!*host_port || sys(newfstatat, sysfs, VSOCK_DRIVER, &found, 0))
		return -1;
	made = sys(socket, AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (made < 0)
		return -1;
	error = sys(bind, made, &ours, sizeof(ours));
	if (!error)
		error = sys(connect, made, &host, sizeof(host));	/* waits 2 s at most */
	if (!error) {
		nonblocking(made);
		ends = 1;
		return made;
	}
	sys(close, made);
	if (error != -ENODEV)
		*host_port = 0;
	return -1;
}

static uint32_t decimal(const char *text)
{
	uint32_t value = 0;

	while (text && *text >= '0' && *text <= '9')
		value = value * 10 + (*text++ - '0');
	return value;
}

/* Loads what the initrd has brought along, in the order of ASCII; what fails is built in, or missed
 * by find_port. */
static void load_modules(void)
{
	char name[] = "/.kvmpriv/modules/0";
	char *digit = name + sizeof(name) - 2;

	for (; *digit <= 'z'; ++*digit) {
		long module = sys(open, name, O_RDONLY | O_CLOEXEC);

		if (module < 0)
			return;
		sys(finit_module, module, "", 0);
		sys(close, module);
	}
}

/* Whether PID 1 has another root directory than the agent, whose own is the initrd's. */
static int has_left_initrd(void)
{
	struct stat ours, theirs;

	return proc < 0 || (!sys(newfstatat, AT_FDCWD, "/", &ours, 0) &&
			    !sys(newfstatat, proc, "1/root/", &theirs, 0) &&
			    (ours.st_dev != theirs.st_dev || ours.st_ino != theirs.st_ino));
}

/* Waits until init has made /bin/sh, as an initrd with busybox does; 10 s at most. */
static void wait_for_shell(void)
{
	struct stat found;

	for (int tries = 0; tries < 1000; tries++) {
		if (proc < 0 || !sys(newfstatat, proc, "1/root/bin/sh", &found, AT_SYMLINK_NOFOLLOW))
			return;
		sleep_ms(10);
	}
}

/* Waits for a way to the host.  A guest that is nothing but the agent can't get one later: it ends. */
static void find_port(int wait_for_root, int alone, uint32_t host_port)
{
	int sysfs = mounted("sysfs");
	long passed = 0, settled = 0, step;

	proc = mounted("proc");
	set_oom_score("-1000");
	port = -1;
	for (;;) {
		int there = !wait_for_root || has_left_initrd();

		if (port < 0)
			port = connect_to_host(sysfs, &host_port);
		if (port < 0)
			port = open_port(sysfs);
		if (there && port >= 0)
			break;
		step = passed < 2000 ? 2 : 100;
		sleep_ms(step);
		passed += step;
		if (!there || port >= 0)
			continue;
		settled += step;
		if (settled - step < PORT_WAIT && settled >= PORT_WAIT) {
			say("<2>kvmpriv: the agent finds no port: this kernel needs the drivers virtio_mmio"
			    " and virtio_console, built in, or as modules that the initrd or the root file"
			    " system has and loads\n");
			if (alone)
				power_off();
		}
	}
	sys(close, sysfs);
}

static int is_init(const char *name)
{
	return length(name) > 5 && same(name + length(name) - 5, "/init", 6);
}

static void be_init(char **arguments, char **variables)
{
	char *wanted = variable(variables, "kvmpriv_init=");

	if (!is_init(arguments[0])) {
		sys(rmdir, "/.kvmpriv");
		for (;;)
			if (sys(wait4, -1, 0, 0, 0) < 0)
				sleep_ms(1000);
	}
	arguments[0] = wanted ? wanted : "/init";
	sys(execve, arguments[0], arguments, variables);
	say("<2>kvmpriv: the initrd has no /init that can be executed: give the initrd that belongs to"
	    " the kernel\n");
	sys(exit_group, 127);
}

__attribute__((noreturn, used)) static void begin(long *stack)
{
	char **arguments = (char **)(stack + 1), **variables = arguments + *stack + 1;
	uint64_t all = ~0ULL;
	int alone;

	environment = variables;
	if (*stack == 2 && same(arguments[1], "-", 2)) {
		port = 0;
		ends = 1;
		nonblocking(0);
	} else {
		if (sys(getpid) == 1) {
			load_modules();
			if (!is_init(arguments[0])) {	/* ours: quicker than two more programs */
				sys(mkdir, "/dev/pts", 0755);
				sys(mount, "devpts", "/dev/pts", "devpts", 0, "ptmxmode=0666");
			}
			if (sys(fork))
				be_init(arguments, variables);
		}
		in_guest = 1;
		sys(setsid);
		while (sys(open, "/", O_RDONLY | O_CLOEXEC) < 3)	/* 0 to 2 are not ours, also if they are closed */
			;
		alone = !is_init(arguments[0]);
		arguments[0][0] = '@';
		find_port(!!variable(variables, "kvmpriv_wait_for_root="), alone,
			  decimal(variable(variables, "kvmpriv_vsock=")));
		wait_for_shell();
		for (char **at = variables; *at; at++)
			if (same(*at, "kvmpriv_", 8)) {
				char **next = at;

				do
					next[0] = next[1];
				while (*next++);
				at--;
			}
	}
	sys(rt_sigprocmask, SIG_SETMASK, &all, 0, sizeof(all));
	all = 1ULL << (SIGCHLD - 1);
	signals = sys(signalfd4, -1, &all, sizeof(all), O_CLOEXEC | O_NONBLOCK);
	loop();
	for (struct job *job = jobs; job < jobs + JOBS; job++)
		if (job->used)
			sys(kill, -job->pid, SIGKILL);
	sys(exit_group, 0);
	__builtin_unreachable();
}

__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall begin\n");
