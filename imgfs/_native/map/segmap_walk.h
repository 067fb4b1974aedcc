/* Walking and changing a segment map's chunks: under the map's lock, for the seg*.c
 * files. */
#ifndef IMGFS_SEGMAP_WALK_H
#define IMGFS_SEGMAP_WALK_H

#include "segmap.h"

void literal_unref(struct literal *literal);

/* Chunks: `n` of them from `c` on, `cap` segments of room.  Errors are negative errnos. */
#define FEW_SEGS 4
struct chunk *chunk_new(unsigned cap);
int chunk_insert(struct segmap *map, size_t c, struct chunk *ch, uint64_t first);
void chunk_remove(struct segmap *map, size_t c, size_t n);
/* Of a full one; afterwards it may be another, or two, of which the first has `keep` segments. */
int chunk_make_room(struct segmap *map, size_t c, unsigned keep);

/* A place between or at segments: chunk and index in it. */
struct pos {
	size_t c;
	unsigned i;
};

static inline struct seg *at(struct segmap *map, struct pos p)
{
	return &map->chunks[p.c]->segs[p.i];
}

static inline bool step(struct segmap *map, struct pos *p)
{
	if (++p->i < map->chunks[p->c]->n)
		return true;
	if (p->c + 1 >= map->n_chunks)
		return false;
	p->c++;
	p->i = 0;
	return true;
}

static inline uint64_t seg_end(struct segmap *map, struct pos p)
{
	return step(map, &p) ? at(map, p)->start : map->size;
}

/* The segment that holds `offset`, which lies inside the map. */
static inline struct pos locate(struct segmap *map, uint64_t offset)
{
	size_t lo = 0, hi = map->n_chunks;
	struct chunk *ch;
	unsigned a, b;

	while (hi - lo > 1) {
		size_t mid = lo + (hi - lo) / 2;

		if (map->firsts[mid] <= offset)
			lo = mid;
		else
			hi = mid;
	}
	ch = map->chunks[lo];
	a = 0;
	b = ch->n;
	while (b - a > 1) {
		unsigned mid = a + (b - a) / 2;

		if (ch->segs[mid].start <= offset)
			a = mid;
		else
			b = mid;
	}
	return (struct pos){ lo, a };
}

static inline uint64_t smaller(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static inline uint64_t block_down(uint64_t offset)
{
	return offset & ~(uint64_t)(SEG_BLOCK - 1);
}

/* The map's last block may be shorter. */
static inline bool whole_blocks(const struct segmap *map, uint64_t start, uint64_t end)
{
	return start % SEG_BLOCK == 0 && (end % SEG_BLOCK == 0 || end == map->size);
}

static inline bool inside(const struct segmap *map, uint64_t offset, uint64_t length)
{
	uint64_t size = map->size;

	return offset <= size && length <= size - offset;
}

/* segmap.c: make `offset` a boundary; 0 or -ENOMEM.  It may be kept when a later step fails. */
int segs_split(struct segmap *map, uint64_t offset);
/* start < end, both are boundaries: cannot fail. */
void segs_replace(struct segmap *map, uint64_t start, uint64_t end, struct seg seg);
/* Both of these; 0 or -ENOMEM. */
int segs_put(struct segmap *map, uint64_t start, uint64_t end, struct seg seg);
/* At the map's end, from seg.start on. */
int segs_append(struct segmap *map, struct seg seg);
/* The segments from `size` on are gone. */
void segs_cut(struct segmap *map, uint64_t size);
/* The two maps change places, but for size, stores and all else. */
void segs_swap(struct segmap *a, struct segmap *b);
/* segwrite.c: the range, not empty, is the target's from now on; `write_lock` is held.  0 or -ENOMEM. */
int segs_mark_target(struct segmap *map, uint64_t start, uint64_t end);
void seg_hold(struct seg *s);
void seg_drop(struct seg *s);
struct literal *literal_new(uint64_t base, const void *bytes, uint64_t length);
/* The store's index, or -ENOMEM. */
int segs_store_index(struct segmap *map, struct store *st);
/* The same, without the lock. */
int segmap_store_index(struct segmap *map, struct store *st);

#endif
