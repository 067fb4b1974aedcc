/* Many ranges at once: filling in what is not known yet, setting and taking what is.
 *
 * What is filled in was found out without a lock, so it may be late: a segment that is not SEG_ASK any
 * more has been written since, or somebody else was faster, and stays.
 */
#define _GNU_SOURCE
#include "segmap_walk.h"

#include <errno.h>
#include <stdlib.h>

/* ---- filling in ---- */

/* Under the write lock: `whole` is the segment that the range would be as a whole. */
static int fill(struct segmap *map, uint64_t start, uint64_t end, struct seg whole)
{
	uint64_t to;
	int err = 0;

	for (end = smaller(end, map->size); start < end && !err; start = to) {
		struct pos p = locate(map, start);
		struct seg seg = whole;

		to = smaller(seg_end(map, p), end);
		if (at(map, p)->kind != SEG_ASK)
			continue;
		if (seg.kind == SEG_STORE)
			seg.offset += start - whole.start;
		seg_hold(&seg);
		err = segs_put(map, start, to, seg);
		if (err)
			seg_drop(&seg);
	}
	return err;
}

static int fill_locked(struct segmap *map, uint64_t start, uint64_t end, struct seg seg)
{
	int err;

	if (start > end)
		return -EINVAL;
	seg.start = start;
	pthread_rwlock_wrlock(&map->lock);
	err = fill(map, start, end, seg);
	pthread_rwlock_unlock(&map->lock);
	return err;
}

int segmap_fill(struct segmap *map, uint64_t start, uint64_t end, enum seg_kind kind,
		enum seg_seek seek)
{
	return fill_locked(map, start, end, (struct seg){ .kind = kind, .seek = seek });
}

int segmap_fill_store(struct segmap *map, uint64_t start, uint64_t end, struct store *st,
		      uint64_t store_offset, enum seg_seek seek)
{
	struct seg seg = { .start = start, .kind = SEG_STORE, .seek = seek, .offset = store_offset };
	int index, err;

	if (start <= end && end > map->size)
		end = start > map->size ? start : (uint64_t)map->size;
	if (start > end || store_offset > st->size || end - start > st->size - store_offset)
		return -EINVAL;
	pthread_rwlock_wrlock(&map->lock);
	err = index = segs_store_index(map, st);
	if (index >= 0) {
		seg.store = (uint16_t)index;
		err = fill(map, start, end, seg);
	}
	pthread_rwlock_unlock(&map->lock);
	return err;
}

int segmap_fill_literal(struct segmap *map, uint64_t start, const void *bytes, uint64_t length,
			enum seg_seek seek)
{
	struct seg seg = { .kind = SEG_LITERAL, .seek = seek };
	int err;

	if (length > UINT64_MAX - start)
		return -EINVAL;
	seg.literal = literal_new(start, bytes, length);
	if (!seg.literal)
		return -ENOMEM;
	err = fill_locked(map, start, start + length, seg);
	seg_drop(&seg);   /* each segment that it became holds it too */
	return err;
}

/* As one of these does it. */
typedef int put_fn(struct segmap *, uint64_t, uint64_t, struct seg);

/* The store's index is found anew each time the lock was let go of: it may have been given away. */
static int put_ranges(struct segmap *map, const struct ranges *ranges, struct store *st, put_fn *put)
{
	size_t i = 0;
	int err = 0;

	while (i < ranges->n && !err) {
		size_t until = i + FILL_BATCH < ranges->n ? i + FILL_BATCH : ranges->n;
		int index = 0;

		pthread_rwlock_wrlock(&map->lock);
		if (st)
			index = segs_store_index(map, st);
		if (index < 0)
			err = index;
		for (; i < until && !err; i++) {
			struct seg seg = { .start = ranges->starts[i], .kind = ranges->kinds[i],
					   .seek = SEEK_IS_HOLE };

			if (seg.kind == SEG_ASK)
				seg.seek = SEEK_IS_UNKNOWN;
			if (seg.kind == SEG_STORE) {
				seg.store = (uint16_t)index;
				seg.offset = seg.start;
				seg.seek = SEEK_IS_DATA;
			}
			err = put(map, seg.start, ranges->ends[i], seg);
		}
		pthread_rwlock_unlock(&map->lock);
	}
	return err;
}

static bool can_be_put(const struct segmap *map, const struct ranges *ranges,
		       const struct store *st)
{
	size_t i;

	for (i = 0; i < ranges->n; i++) {
		uint64_t end = smaller(ranges->ends[i], map->size);

		if (ranges->starts[i] > ranges->ends[i])
			return false;
		switch (ranges->kinds[i]) {
		case SEG_ASK:
		case SEG_ZERO:
		case SEG_BELOW:
			break;
		case SEG_STORE:
			if (st && end <= st->size)
				break;
			return false;
		default:
			return false;
		}
	}
	return true;
}

int segmap_fill_ranges(struct segmap *map, const struct ranges *ranges, struct store *st)
{
	size_t i;

	for (i = 0; i < ranges->n; i++)
		if (ranges->kinds[i] == SEG_ASK)
			return -EINVAL;
	return can_be_put(map, ranges, st) ? put_ranges(map, ranges, st, fill) : -EINVAL;
}

static int replace(struct segmap *map, uint64_t start, uint64_t end, struct seg seg)
{
	end = smaller(end, map->size);
	return start < end ? segs_put(map, start, end, seg) : 0;
}

int segmap_set_ranges(struct segmap *map, const struct ranges *ranges, struct store *st)
{
	return can_be_put(map, ranges, st) ? put_ranges(map, ranges, st, replace) : -EINVAL;
}

/* ---- taking ---- */

void ranges_free(struct ranges *ranges)
{
	free(ranges->starts);
	free(ranges->ends);
	free(ranges->kinds);
	*ranges = (struct ranges){ NULL, NULL, NULL, 0 };
}

static int ranges_new(struct ranges *ranges, size_t n)
{
	size_t bytes = n * sizeof(uint64_t);

	*ranges = (struct ranges){ malloc(bytes), malloc(bytes), malloc(n), 0 };
	if (ranges->starts && ranges->ends && ranges->kinds)
		return 0;
	ranges_free(ranges);
	return -ENOMEM;
}

static void pack(struct segmap *map, struct ranges *out)
{
	struct pos p = { 0, 0 };

	do {
		struct seg *s = at(map, p);

		if (s->kind == SEG_ASK)
			continue;
		out->starts[out->n] = s->start;
		out->ends[out->n] = seg_end(map, p);
		out->kinds[out->n++] = s->kind;
	} while (step(map, &p));
}

static bool has_below(struct segmap *map)
{
	struct pos p = { 0, 0 };

	do
		if (at(map, p)->kind == SEG_BELOW)
			return true;
	while (step(map, &p));
	return false;
}

static int take(struct segmap *map, struct ranges *taken, bool own)
{
	struct segmap *fresh = segmap_new(1);   /* all of it is SEG_ASK, whatever the size */
	int err = 0;

	*taken = (struct ranges){ NULL, NULL, NULL, 0 };
	if (!fresh)
		return -ENOMEM;
	pthread_rwlock_wrlock(&map->lock);
	if (own && map->count && has_below(map)) {
		err = -EAGAIN;
	} else if (map->count) {
		/* First the place for it: nothing can be given back.  Writers wait for no more. */
		err = ranges_new(taken, map->count);
		if (!err) {
			segs_swap(map, fresh);
			fresh->size = map->size;
			atomic_store(&map->unsettled, true);
		}
	}
	pthread_rwlock_unlock(&map->lock);
	if (taken->starts)
		pack(fresh, taken);
	segmap_unref(fresh);
	return err;
}

int segmap_take(struct segmap *map, struct ranges *taken)
{
	return take(map, taken, false);
}

int segmap_take_own(struct segmap *map, struct ranges *taken)
{
	return take(map, taken, true);
}

int segmap_ranges(struct segmap *map, struct ranges *found)
{
	int err = 0;

	*found = (struct ranges){ NULL, NULL, NULL, 0 };
	pthread_rwlock_rdlock(&map->lock);
	if (map->count) {
		err = ranges_new(found, map->count);
		if (!err)
			pack(map, found);
	}
	pthread_rwlock_unlock(&map->lock);
	return err;
}
