/* Large READs and WRITEs without copying: a store's pages go by reference into a pipe, and from there
 * to the device, where the kernel copies them once; and who writes has its pages go into a pipe, and from
 * there they are copied once, into a store's file.  Through a buffer they would be copied twice, and
 * large buffers drive everything else out of the processor's caches.
 *
 * Not done: FUSE_NOTIFY_STORE of what a sequential reader will want next.  It takes the making of pages
 * off the reader's thread, which is the third of its time, and cp was a quarter faster; but the kernel
 * waits for each page's lock, and who has that lock may be a READ that is for us to answer.  The wait
 * cannot be killed: after kill -9 in it the device stays open, and the mount hangs for good. */
#define _GNU_SOURCE
#include "fast.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

/* The header has one page of a pipe for itself. */
#define PAGE 4096u

/* The kernel or a sandbox has refused it once: bytes are copied from then on, by all threads. */
static atomic_bool refused;

static bool is_refusal(int error)
{
	return error == EINVAL || error == EPERM || error == EACCES || error == ENOSYS ||
	       error == EOPNOTSUPP;
}

struct answer {
	struct channel *channel;
	struct segmap *map;
	uint64_t unique;
	size_t size;
	bool waited;
	int error;
};

void channel_open(struct channel *channel)
{
	int size;

	channel->bytes = 0;
	channel->takes_all = false;
	if (pipe2(channel->ends, O_CLOEXEC | O_NONBLOCK)) {
		channel->ends[0] = channel->ends[1] = -1;
		return;
	}
	size = fcntl(channel->ends[1], F_SETPIPE_SZ, 2 * MAX_PAYLOAD);
	if (size < 0)   /* this user has too many: large READs go through buffers */
		size = fcntl(channel->ends[1], F_GETPIPE_SZ);
	if (size > (int)PAGE)
		channel->bytes = (size_t)size - PAGE;
	channel->takes_all = channel->bytes >= MAX_REQUEST;
}

bool channel_is_open(const struct channel *channel)
{
	return channel->takes_all && !atomic_load_explicit(&refused, memory_order_relaxed);
}

void channel_close(struct channel *channel)
{
	if (channel->ends[0] < 0)
		return;
	close(channel->ends[0]);
	close(channel->ends[1]);
	channel->ends[0] = channel->ends[1] = -1;
}

static bool send(void *arg)
{
	struct answer *answer = arg;
	size_t size = sizeof(struct fuse_out_header) + answer->size;
	ssize_t n;

	count_read(answer->map, answer->size, answer->waited);
	atomic_fetch_add_explicit(&stats.spliced, 1, memory_order_relaxed);
	do
		n = splice(answer->channel->ends[0], NULL, device, NULL, size, 0);
	while (n < 0 && errno == EINTR);
	/* ENOENT: the request was given up in the meantime. */
	if (n == (ssize_t)size || (n < 0 && errno == ENOENT))
		return true;
	answer->channel->bytes = 0;   /* this kernel does not take it */
	answer->error = n < 0 ? errno : 0;
	return false;
}

/* What is left in it would stand in front of the next answer. */
void channel_empty(struct channel *channel)
{
	char rest[PAGE];

	while (read(channel->ends[0], rest, sizeof(rest)) > 0)
		;
}

bool channel_answer(struct channel *channel, uint64_t unique, struct segmap *map, uint64_t offset,
		    size_t size, char *buf, bool waited)
{
	struct fuse_out_header out = { (uint32_t)(sizeof(out) + size), 0, unique };
	struct answer answer = { channel, map, unique, size, waited, 0 };
	int err;

	if (size < MIN_SPLICE || size > channel->bytes ||
	    atomic_load_explicit(&refused, memory_order_relaxed))
		return false;
	if (write(channel->ends[1], &out, sizeof(out)) != (ssize_t)sizeof(out))
		err = -EAGAIN;
	else
		err = maps->splice(map, offset, size, buf, channel->ends[1], send, &answer);
	channel_empty(channel);
	if (is_refusal(-err) || is_refusal(answer.error))
		atomic_store(&refused, true);
	return err == 1;
}

ssize_t channel_receive(struct channel *channel, char *buf, size_t head, size_t max, bool *in_pipe)
{
	ssize_t n = splice(device, NULL, channel->ends[1], NULL, max, 0);

	*in_pipe = n > 0;
	/* Whatever it is: when something is wrong with the device read(2) says so. */
	if (n < 0 && errno != EINTR && errno != EAGAIN && errno != ENOENT && errno != ENODEV) {
		atomic_store(&refused, true);
		return read(device, buf, max);
	}
	if (n > 0 && !channel_read(channel, buf, (size_t)n < head ? (size_t)n : head)) {
		errno = EIO;
		return -1;
	}
	return n;
}

bool channel_read(struct channel *channel, char *buf, size_t size)
{
	while (size) {
		ssize_t n = read(channel->ends[0], buf, size);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return false;
		buf += n;
		size -= (size_t)n;
	}
	return true;
}
