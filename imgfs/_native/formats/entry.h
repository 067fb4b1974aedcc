/* Entries of tables. */
#ifndef IMGFS_ENTRY_H
#define IMGFS_ENTRY_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

/* One of 4 or 8 bytes. */
static inline uint64_t entry(const uint8_t *at, int width, int big_endian)
{
	uint32_t narrow;
	uint64_t wide;

	if (width == 4) {
		memcpy(&narrow, at, sizeof(narrow));
		return big_endian ? be32toh(narrow) : le32toh(narrow);
	}
	memcpy(&wide, at, sizeof(wide));
	return big_endian ? be64toh(wide) : le64toh(wide);
}

#endif
