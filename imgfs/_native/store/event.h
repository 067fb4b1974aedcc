/* A descriptor that is readable once it was signalled, until it is cleared.  Include after _GNU_SOURCE. */
#ifndef IMGFS_EVENT_H
#define IMGFS_EVENT_H

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* An eventfd; where those are refused, a pipe whose two ends are one descriptor.  Or -errno. */
static inline int event_new(void)
{
	int ends[2], fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), err = -errno;
	char name[32];

	if (fd >= 0)
		return fd;
	if (err == -EMFILE || err == -ENFILE || pipe2(ends, O_CLOEXEC))
		return err;
	snprintf(name, sizeof(name), "/proc/self/fd/%d", ends[0]);
	fd = open(name, O_RDWR | O_CLOEXEC | O_NONBLOCK);
	close(ends[0]);
	close(ends[1]);
	return fd < 0 ? err : fd;
}

static inline void event_signal(int fd)
{
	const uint64_t one = 1;

	if (write(fd, &one, sizeof(one)) < 0)
		return;   /* it is full, so it is readable anyway */
}

static inline void event_clear(int fd)
{
	uint64_t counts[64];

	/* An eventfd gives one; a pipe may hold many. */
	while (read(fd, counts, sizeof(counts)) == (ssize_t)sizeof(counts))
		;
}

#endif
