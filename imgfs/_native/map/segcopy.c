/* Copying segments from one map to another, so that what is over an image can be read natively
 * wherever the image itself can. */
#define _GNU_SOURCE
#include "segmap_walk.h"

#include <errno.h>
#include <stdlib.h>

/* Small enough for a stack; between two batches both maps may change, as between two copies. */
#define COPY_BATCH 256

struct copied {
	uint64_t end;
	struct seg seg;
	struct store *st;      /* SEG_STORE: a reference */
};

/* Up to COPY_BATCH segments of [offset, end), with references to what they name. */
static size_t take(struct segmap *map, uint64_t offset, uint64_t end, struct copied *out)
{
	size_t n = 0;
	struct pos p;

	pthread_rwlock_rdlock(&map->lock);
	if (offset < end && end <= map->size) {
		p = locate(map, offset);
		do {
			struct copied *c = &out[n];
			uint64_t to = seg_end(map, p);

			c->seg = *at(map, p);
			if (c->seg.start >= end)
				break;
			c->end = to < end ? to : end;
			c->st = NULL;
			if (c->seg.start < offset) {
				if (c->seg.kind == SEG_STORE)
					c->seg.offset += offset - c->seg.start;
				c->seg.start = offset;
			}
			if (c->seg.kind == SEG_STORE)
				c->st = store_ref(map->stores[c->seg.store]);
			if (c->seg.kind == SEG_LITERAL)
				atomic_fetch_add(&c->seg.literal->refs, 1);
			n++;
		} while (n < COPY_BATCH && step(map, &p));
	}
	pthread_rwlock_unlock(&map->lock);
	return n;
}

static void let_go(struct copied *c)
{
	if (c->st)
		store_unref(c->st);
	seg_drop(&c->seg);
}

static int put_copy(struct segmap *to, uint64_t start, const struct copied *c, bool fill)
{
	const struct seg *s = &c->seg;
	uint64_t length = c->end - s->start;

	switch (s->kind) {
	case SEG_STORE:
		return (fill ? segmap_fill_store : segmap_set_store)(to, start, start + length,
								     c->st, s->offset, s->seek);
	case SEG_LITERAL:
		return (fill ? segmap_fill_literal : segmap_set_literal)(
			to, start, s->literal->bytes + (s->start - s->literal->base), length,
			s->seek);
	default:
		return (fill ? segmap_fill : segmap_set)(to, start, start + length, s->kind,
							 s->seek);
	}
}

/* Under the map's lock. */
static int put_now(struct segmap *map, const struct copied *c)
{
	struct seg seg = c->seg;
	uint64_t start = seg.start;
	int index = 0, err;

	if (seg.kind == SEG_STORE) {
		index = segs_store_index(map, c->st);
		seg.store = (uint16_t)index;
	}
	if (seg.kind == SEG_LITERAL) {
		seg.literal = literal_new(start, seg.literal->bytes + (start - seg.literal->base),
					  c->end - start);
		if (!seg.literal)
			return -ENOMEM;
	}
	err = index < 0 ? index : segs_put(map, start, c->end, seg);
	if (err)
		seg_drop(&seg);
	return err;
}

/* As long as all others are kept from writing.  The account changes with the map. */
static int put_below(struct segmap *map, const struct copied *c)
{
	static const struct seg below = { .kind = SEG_BELOW, .seek = SEEK_IS_DATA };
	struct segmap *dirty = map->dirty;
	int err = 0;

	pthread_rwlock_wrlock(&map->lock);
	if (dirty) {
		pthread_rwlock_wrlock(&dirty->lock);
		err = segs_split(dirty, c->seg.start);
		if (!err)
			err = segs_split(dirty, c->end);
	}
	if (!err)
		err = put_now(map, c);
	if (!err && dirty)
		segs_replace(dirty, c->seg.start, c->end, below);
	if (dirty)
		pthread_rwlock_unlock(&dirty->lock);
	pthread_rwlock_unlock(&map->lock);
	return err;
}

static int below_alone(struct segmap *map, uint64_t start, uint64_t end, struct segmap *lower)
{
	struct copied batch[COPY_BATCH];
	int err = 0;

	if (start > end || end > map->size || end > lower->size || lower == map ||
	    !whole_blocks(map, start, end))
		return -EINVAL;
	if (!atomic_load(&map->target))
		return 0;
	while (start < end && !err) {
		size_t n = take(lower, start, end, batch), i;

		if (n == 0)
			return -EINVAL;
		for (i = 0; i < n; i++) {
			if (!err)
				err = put_below(map, &batch[i]);
			start = batch[i].end;
			let_go(&batch[i]);
		}
	}
	if (!err)   /* the disk's mtime is the file's, which nothing was written to */
		store_touch(map->target);
	return err ? err : 1;
}

int segmap_below(struct segmap *map, uint64_t start, uint64_t end, struct segmap *lower)
{
	int result;

	pthread_rwlock_wrlock(&map->write_lock);
	result = below_alone(map, start, end, lower);
	pthread_rwlock_unlock(&map->write_lock);
	if (result == 1) {
		atomic_fetch_add_explicit(&map->writes, 1, memory_order_relaxed);
		segmap_changed(map);
	}
	return result;
}

int segmap_copy(struct segmap *to, uint64_t start, struct segmap *from, uint64_t from_start,
		uint64_t length, bool fill)
{
	uint64_t offset = from_start, end = from_start + length;
	struct copied batch[COPY_BATCH];
	int err = 0;

	if (length > from->size || from_start > from->size - length || length > to->size ||
	    start > to->size - length || to == from)
		return -EINVAL;
	while (offset < end && !err) {
		size_t n = take(from, offset, end, batch), i;

		if (n == 0)
			return -EINVAL;
		for (i = 0; i < n; i++) {
			struct copied *c = &batch[i];

			if (!err)
				err = put_copy(to, start + (c->seg.start - from_start), c, fill);
			offset = c->end;
			let_go(c);
		}
	}
	return err;
}
