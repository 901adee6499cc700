/* Connects to a port of the host over vsock, from a port of its own (0: any), and copies standard
 * input there and what comes back to standard output.  The exit status is the errno of what failed.
 *
 *	vsock_connect OWN-PORT HOST-PORT
 */

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>
#include <unistd.h>

static void copy(int from, int to)
{
	char data[65536];
	ssize_t size;

	while ((size = read(from, data, sizeof(data))) > 0)
		for (ssize_t at = 0, done; at < size; at += done)
			if ((done = write(to, data + at, size - at)) <= 0)
				exit(errno);
}

int main(int count, char **words)
{
	struct sockaddr_vm ours = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY };
	struct sockaddr_vm host = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST };
	int made = socket(AF_VSOCK, SOCK_STREAM, 0);
	pid_t child;

	if (made < 0 || count != 3)
		return made < 0 ? errno : EINVAL;
	ours.svm_port = strtoul(words[1], 0, 10);
	host.svm_port = strtoul(words[2], 0, 10);
	if (ours.svm_port && bind(made, (struct sockaddr *)&ours, sizeof(ours)))
		return errno;
	if (connect(made, (struct sockaddr *)&host, sizeof(host)))
		return errno;
	child = fork();
	if (!child) {
		copy(0, made);
		pause();
	}
	copy(made, 1);
	kill(child, SIGKILL);
	return 0;
}
