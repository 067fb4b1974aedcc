/* Changing a store's bytes. */
#define _GNU_SOURCE
#include "store.h"
#include "sums.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

int store_change(struct store *st, uint64_t length, uint64_t offset, store_io *io, void *arg)
{
	return st->sums ? sums_change(st, offset, length, io, arg) : io(st, length, offset, arg);
}

int fd_write(int fd, const void *buf, uint64_t length, uint64_t offset)
{
	const char *from = buf;

	while (length) {
		ssize_t n = pwrite(fd, from, length, (off_t)offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		from += n;
		offset += (uint64_t)n;
		length -= (uint64_t)n;
	}
	return 0;
}

int store_pwrite_file(struct store *st, const void *buf, uint64_t length, uint64_t offset)
{
	return fd_write(st->fd, buf, length, offset);
}

/* `arg` is what of a buffer is left. */
static int write_buffer(struct store *st, uint64_t length, uint64_t offset, void *arg)
{
	const char **left = arg;

	*left += length;
	return store_pwrite_file(st, *left - length, length, offset);
}

int store_pwrite(struct store *st, const void *buf, uint64_t length, uint64_t offset)
{
	return store_change(st, length, offset, write_buffer, &buf);
}

/* EPERM and the like: of the file, or of a sandbox that refuses splice(2).  pwrite(2) then tells. */
static bool may_be_written_otherwise(int error)
{
	return error == EPERM || error == EACCES || error == ENOSYS || error == EOPNOTSUPP ||
	       error == ENOMEM;
}

struct from_pipe {
	int pipe;
	bool has_begun;        /* some of its bytes are taken */
};

static int write_pipe(struct store *st, uint64_t length, uint64_t offset, void *arg)
{
	struct from_pipe *from = arg;
	off_t to = (off_t)offset;

	while (length) {
		ssize_t n = splice(from->pipe, NULL, st->fd, &to, length, 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && !from->has_begun && may_be_written_otherwise(errno))
			return -EINVAL;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		from->has_begun = true;
		length -= (uint64_t)n;
	}
	return 0;
}

int store_write_from(struct store *st, int pipe, uint64_t length, uint64_t offset)
{
	struct from_pipe from = { pipe, false };

	return store_change(st, length, offset, write_pipe, &from);
}

int store_set_mtime(struct store *st, struct timespec mtime)
{
	const struct timespec times[2] = { { .tv_nsec = UTIME_OMIT }, mtime };

	return futimens(st->fd, times) ? -errno : 0;
}

int store_touch(struct store *st)
{
	return store_set_mtime(st, (struct timespec){ .tv_nsec = UTIME_NOW });
}

int store_punch(struct store *st, uint64_t length, uint64_t offset)
{
	if (length == 0)
		return 0;
	if (st->sums)
		return sums_punch(st, offset, length);
	/* File systems give whole pages back: also of the one in which the file ends.  But a whole
	 * store's file may be growing: what somebody writes behind the end meanwhile is to stay. */
	if (!st->whole && offset + length == st->size)
		length += -st->size & ((UINT64_C(1) << st->block_shift) - 1);
	if (fallocate(st->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset,
		      (off_t)length))
		return -errno;
	return 0;
}
