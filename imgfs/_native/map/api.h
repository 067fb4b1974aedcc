/* What imgfs._native._map lends to imgfs._native._fuse, through a capsule: the two are separate
 * shared objects, because only the second may be loaded RTLD_GLOBAL and needs libfuse. */
#ifndef IMGFS_API_H
#define IMGFS_API_H

#include <Python.h>

#include "segmap.h"

#define MAP_CAPSULE "imgfs._native._map._C_API"

struct map_api {
	/* Borrowed; NULL with TypeError set when it is not a SegmentMap. */
	struct segmap *(*from_object)(PyObject *obj);
	struct segmap *(*ref)(struct segmap *map);
	void (*unref)(struct segmap *map);
	int (*read)(struct segmap *map, uint64_t offset, uint64_t length, char *buf,
		    enum seg_wait wait);
	int (*splice)(struct segmap *map, uint64_t offset, uint64_t length, char *buf, int pipe,
		       bool (*take)(void *arg), void *arg);
	int (*seek)(struct segmap *map, int64_t offset, int whence, uint64_t *found);
	int (*write)(struct segmap *map, uint64_t offset, uint64_t length, const void *buf);
	int (*write_from)(struct segmap *map, uint64_t offset, uint64_t length, int pipe);
	int (*read_target)(struct segmap *map, uint64_t offset, uint64_t length, void *buf);
	int (*zero)(struct segmap *map, uint64_t start, uint64_t end);
	int (*sync)(struct segmap *map);
	/* Called, on any thread, when blocks that were coming are not coming any more. */
	void (**settled)(void);
};

#endif
