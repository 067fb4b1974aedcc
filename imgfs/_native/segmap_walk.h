/* Walking a segment map's chunks: for segmap.c, segread.c and segcopy.c, under the map's lock. */
#ifndef IMGFS_SEGMAP_WALK_H
#define IMGFS_SEGMAP_WALK_H

#include "segmap.h"

void literal_unref(struct literal *literal);

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

#endif
