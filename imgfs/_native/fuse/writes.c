/* Answering WRITE, FALLOCATE and FSYNC from a segment map that has a target.
 *
 * Writing waits for a disk when the kernel has too many dirty pages, or a file system's lock is
 * held; it cannot be asked whether it would (RWF_NOWAIT: ext4 refuses it for buffered writes).
 * So a request thread writes only while another is left that reads requests; else
 * it hands the request over to threads of ours, which are there for nothing else.
 */
#define _GNU_SOURCE
#include "fast.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define WRITERS 2

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t more = PTHREAD_COND_INITIALIZER;
static struct request *head, **tail = &head;
static bool ended;
static pthread_t writers[WRITERS];
static unsigned n_writers;

/* ---- answers ---- */

bool is_dsync(const struct fuse_write_in *arg)
{
	return (arg->flags & O_DSYNC) && (arg->fh & DIRECT_HANDLE);
}

/* It goes beyond the map, or not by blocks; or it failed: Python does it again, and if that fails too
 * it says why, and counts it. */
static bool only_python(int result)
{
	return result <= 0;
}

static bool answer_write(const struct fuse_in_header *in, const struct fuse_write_in *arg,
			 int result)
{
	struct fuse_write_out out = { .size = arg->size };

	if (only_python(result))
		return false;
	/* Counted before whoever wrote can look at the counters. */
	atomic_fetch_add_explicit(&stats.writes, 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&stats.bytes_written, arg->size, memory_order_relaxed);
	reply(in->unique, 0, &out, sizeof(out));
	return true;
}

static bool try_fallocate(const struct fuse_in_header *in, const struct fuse_fallocate_in *arg,
			  struct segmap *map)
{
	const uint32_t how = arg->mode & ~(uint32_t)FALLOC_FL_KEEP_SIZE;
	int result;

	/* A hole may be punched only with keep-size, and inside of the map the size stays anyway. */
	if (how != FALLOC_FL_ZERO_RANGE && arg->mode != (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE))
		return false;
	if (arg->length == 0 || arg->length > UINT64_MAX - arg->offset)
		return false;
	result = maps->zero(map, arg->offset, arg->offset + arg->length);
	if (only_python(result))
		return false;
	atomic_fetch_add_explicit(&stats.zeroes, 1, memory_order_relaxed);
	reply_error(in->unique, 0);
	return true;
}

/* What was written only onto blocks that were the target's before is safe with its file. */
static bool try_sync(const struct fuse_in_header *in, struct segmap *map)
{
	int result = maps->sync(map);

	if (only_python(result))
		return false;
	atomic_fetch_add_explicit(&stats.syncs, 1, memory_order_relaxed);
	reply_error(in->unique, 0);
	return true;
}

/* 0 also when the bytes are written, but only Python can make them safe: it writes them again. */
static int write_bytes(const struct fuse_write_in *arg, struct segmap *map)
{
	int result = maps->write(map, arg->offset, arg->size, arg + 1);

	if (result <= 0 || !is_dsync(arg))
		return result;
	atomic_fetch_add_explicit(&stats.syncs, 1, memory_order_relaxed);
	return maps->sync(map);
}

bool try_change(const char *buf, size_t size, struct segmap *map)
{
	const struct fuse_in_header *in = (const struct fuse_in_header *)buf;

	if (in->opcode == FUSE_WRITE) {
		const struct fuse_write_in *arg = (const void *)(in + 1);

		return size >= sizeof(*in) + sizeof(*arg) &&
		       size - sizeof(*in) - sizeof(*arg) >= arg->size &&
		       answer_write(in, arg, write_bytes(arg, map));
	}
	if (in->opcode == FUSE_FSYNC)
		return try_sync(in, map);
	return size >= sizeof(*in) + sizeof(struct fuse_fallocate_in) &&
	       try_fallocate(in, (const void *)(in + 1), map);
}

/* After a failure: the bytes that have left the pipe are in the target's file, and not the map's. */
static bool take_back(const struct fuse_write_in *arg, struct segmap *map, int pipe, char *to)
{
	size_t gone, at;
	int left = 0;

	if (ioctl(pipe, FIONREAD, &left) || left < 0 || (size_t)left > arg->size)
		return false;
	gone = arg->size - (size_t)left;
	if (gone && maps->read_target(map, arg->offset, gone, to))
		return false;
	for (at = gone; at < arg->size;) {
		ssize_t n = read(pipe, to + at, arg->size - at);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return false;
		at += (size_t)n;
	}
	return true;
}

bool try_write_from(char *buf, struct segmap *map, int pipe)
{
	const struct fuse_in_header *in = (const struct fuse_in_header *)buf;
	const struct fuse_write_in *arg = (const void *)(in + 1);
	const size_t head = sizeof(*in) + sizeof(*arg);

	int result = maps->write_from(map, arg->offset, arg->size, pipe);

	if (result < 0 && result != -EINVAL) {
		int err = -result;

		if (take_back(arg, map, pipe, buf + head))
			err = -queue_push(buf, head + arg->size, true);
		if (err)
			reply_error(in->unique, err);
		return true;
	}
	if (result > 0)
		atomic_fetch_add_explicit(&stats.writes_spliced, 1, memory_order_relaxed);
	return answer_write(in, arg, result);
}

/* ---- requests that were handed over ---- */

int writes_hand_over(const void *buf, size_t size)
{
	struct request *rq = request_copy(buf, size);

	if (!rq)
		return -ENOMEM;
	pthread_mutex_lock(&lock);
	*tail = rq;
	tail = &rq->next;
	pthread_cond_signal(&more);
	pthread_mutex_unlock(&lock);
	atomic_fetch_add_explicit(&stats.handed_over, 1, memory_order_relaxed);
	return 0;
}

/* NULL at the end. */
static struct request *next_request(void)
{
	struct request *rq = NULL;

	pthread_mutex_lock(&lock);
	while (!ended && !head)
		pthread_cond_wait(&more, &lock);
	if (!ended) {
		rq = head;
		head = rq->next;
		if (!head)
			tail = &head;
	}
	pthread_mutex_unlock(&lock);
	return rq;
}

static void *serve_writes(void *unused)
{
	struct request *rq;

	(void)unused;
	while ((rq = next_request())) {
		struct segmap *map = map_of(((const struct fuse_in_header *)rq->mem)->nodeid);

		/* Its target may have been taken away since. */
		if (!map || !try_change(rq->mem, rq->size, map)) {
			int err = queue_push(rq->mem, rq->size, true);

			if (err)
				reply_error(rq->unique, -err);
		}
		if (map)
			maps->unref(map);
		request_free(rq);
	}
	return NULL;
}

int writes_start(void)
{
	int err = 0;

	ended = false;
	while (n_writers < WRITERS && !err) {
		err = thread_start(&writers[n_writers], serve_writes, NULL);
		if (!err)
			n_writers++;
	}
	return err;
}

void writes_stop(void)
{
	pthread_mutex_lock(&lock);
	ended = true;
	pthread_cond_broadcast(&more);
	pthread_mutex_unlock(&lock);
	while (n_writers)
		pthread_join(writers[--n_writers], NULL);
	while (head) {
		struct request *next = head->next;

		request_free(head);
		head = next;
	}
	tail = &head;
}
