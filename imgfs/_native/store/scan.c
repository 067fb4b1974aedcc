#define _GNU_SOURCE
#include "scan.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

int scan_add(struct scan *out, uint64_t end, uint8_t flags)
{
	if (out->n && out->flags[out->n - 1] == flags) {
		out->ends[out->n - 1] = end;
		return 0;
	}
	if (out->n == out->cap) {
		size_t cap = out->cap ? out->cap * 2 : 64;
		uint64_t *ends = realloc(out->ends, cap * sizeof(*ends));
		uint8_t *kinds;

		if (!ends)
			return -ENOMEM;
		out->ends = ends;
		kinds = realloc(out->flags, cap);
		if (!kinds)
			return -ENOMEM;
		out->flags = kinds;
		out->cap = cap;
	}
	out->ends[out->n] = end;
	out->flags[out->n++] = flags;
	return 0;
}

int scan_file(int fd, uint64_t size, struct scan *out)
{
	uint64_t at = 0;
	int err = 0;

	while (at < size && !err) {
		off_t data = lseek(fd, (off_t)at, SEEK_DATA), hole;

		if (data < 0 && errno == ENXIO)
			return scan_add(out, size, SCAN_HOLE);
		if (data < 0 && (errno == EINVAL || errno == EOPNOTSUPP))
			return scan_add(out, size, SCAN_DATA);
		if (data < 0)
			return -errno;
		if ((uint64_t)data >= size)
			return scan_add(out, size, SCAN_HOLE);
		if ((uint64_t)data < at)
			return -EIO;
		if ((uint64_t)data > at)
			err = scan_add(out, (uint64_t)data, SCAN_HOLE);
		hole = lseek(fd, data, SEEK_HOLE);
		if (hole < 0)
			return -errno;
		if (hole <= data)
			return -EIO;   /* no progress: the file is being cut under us */
		at = (uint64_t)hole < size ? (uint64_t)hole : size;
		if (!err)
			err = scan_add(out, at, SCAN_DATA);
	}
	return err;
}
