/* A file's extents by SEEK_DATA and SEEK_HOLE. */
#ifndef IMGFS_SCAN_H
#define IMGFS_SCAN_H

#include <stddef.h>
#include <stdint.h>

struct scan {
	uint64_t *ends;
	uint8_t *flags;
	size_t n, cap;
};

#define SCAN_DATA 0
#define SCAN_HOLE 3   /* Flags.HOLE | Flags.ZERO */

/* The next extent ends there: 0 or -ENOMEM.  One that is like the last is joined to it. */
int scan_add(struct scan *out, uint64_t end, uint8_t flags);

/* 0 or -errno; the arrays are the caller's to free either way.  A file system that knows
 * no holes gives one extent of data. */
int scan_file(int fd, uint64_t size, struct scan *out);

#endif
