#define _GNU_SOURCE
#include "log.h"
#include "segmap_walk.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

void seg_hold(struct seg *s)
{
	if (s->kind == SEG_LITERAL)
		atomic_fetch_add(&s->literal->refs, 1);
}

void literal_unref(struct literal *literal)
{
	if (atomic_fetch_sub(&literal->refs, 1) == 1)
		free(literal);
}

void seg_drop(struct seg *s)
{
	if (s->kind == SEG_LITERAL)
		literal_unref(s->literal);
}

/* Splitting changes nothing that can be seen, so it may be kept when a later step fails. */
int segs_split(struct segmap *map, uint64_t offset)
{
	struct seg upper;
	struct chunk *ch;
	struct pos p;
	int err;

	if (offset == 0 || offset >= map->size)
		return 0;
	p = locate(map, offset);
	if (at(map, p)->start == offset)
		return 0;
	if (map->chunks[p.c]->n == map->chunks[p.c]->cap) {
		/* Who publishes in order splits the last one each time, and comes back no more. */
		err = chunk_make_room(map, p.c, p.i == CHUNK_SEGS - 1 ? p.i : CHUNK_SEGS / 2);
		if (err)
			return err;
		p = locate(map, offset);
	}
	upper = *at(map, p);
	if (upper.kind == SEG_STORE)
		upper.offset += offset - upper.start;
	upper.start = offset;
	seg_hold(&upper);
	ch = map->chunks[p.c];
	memmove(ch->segs + p.i + 2, ch->segs + p.i + 1, (ch->n - p.i - 1) * sizeof(struct seg));
	ch->segs[p.i + 1] = upper;
	ch->n++;
	map->count++;
	return 0;
}

/* Remove the segments that start in (start, end); both are boundaries, one starts at start. */
static void remove_inside(struct segmap *map, uint64_t start, uint64_t end)
{
	struct pos p = locate(map, start);
	size_t dead_from = p.c + 1, dead = 0, c;
	unsigned from = p.i + 1;

	for (c = p.c; c < map->n_chunks; c++, from = 0) {
		struct chunk *ch = map->chunks[c];
		unsigned to = from, i;

		while (to < ch->n && ch->segs[to].start < end)
			to++;
		for (i = from; i < to; i++)
			seg_drop(&ch->segs[i]);
		memmove(ch->segs + from, ch->segs + to, (ch->n - to) * sizeof(struct seg));
		ch->n -= to - from;
		map->count -= to - from;
		if (c > p.c && ch->n == 0)
			dead++;
		else if (c > p.c)
			map->firsts[c] = ch->segs[0].start;
		if (ch->n > (c == p.c ? from : 0))
			break;   /* something from `end` on stands here */
	}
	chunk_remove(map, dead_from, dead);
}

static bool joins(const struct seg *a, const struct seg *b)
{
	if (a->kind != b->kind || a->seek != b->seek)
		return false;
	if (a->kind == SEG_STORE)
		return a->store == b->store && a->offset + (b->start - a->start) == b->offset;
	return a->kind != SEG_LITERAL || a->literal == b->literal;
}

/* Join the segment that starts at `boundary` to the one before it where they are alike. */
static void join_at(struct segmap *map, uint64_t boundary)
{
	struct pos right, left;
	struct chunk *ch;

	if (boundary == 0 || boundary >= map->size)
		return;
	left = locate(map, boundary - 1);
	right = left;
	if (!step(map, &right) || !joins(at(map, left), at(map, right)))
		return;
	seg_drop(at(map, right));
	ch = map->chunks[right.c];
	memmove(ch->segs + right.i, ch->segs + right.i + 1,
		(ch->n - right.i - 1) * sizeof(struct seg));
	ch->n--;
	map->count--;
	if (ch->n == 0)
		chunk_remove(map, right.c, 1);
	else if (right.i == 0)
		map->firsts[right.c] = ch->segs[0].start;
}

void segs_replace(struct segmap *map, uint64_t start, uint64_t end, struct seg seg)
{
	struct seg *first;

	remove_inside(map, start, end);
	first = at(map, locate(map, start));
	seg_drop(first);
	seg.start = start;
	*first = seg;
	join_at(map, end);
	join_at(map, start);
}

int segs_put(struct segmap *map, uint64_t start, uint64_t end, struct seg seg)
{
	int err = segs_split(map, start);

	if (!err)
		err = segs_split(map, end);
	if (!err)
		segs_replace(map, start, end, seg);
	return err;
}

/* Under the write lock. */
static int put(struct segmap *map, uint64_t start, uint64_t end, struct seg seg)
{
	if (start > end || end > map->size)
		return -EINVAL;
	return start < end ? segs_put(map, start, end, seg) : 0;
}

static int put_locked(struct segmap *map, uint64_t start, uint64_t end, struct seg seg)
{
	int err;

	pthread_rwlock_wrlock(&map->lock);
	err = put(map, start, end, seg);
	pthread_rwlock_unlock(&map->lock);
	return err;
}

struct segmap *segmap_new(uint64_t size)
{
	struct segmap *map = calloc(1, sizeof(*map));
	pthread_rwlockattr_t attr;

	if (!map)
		return NULL;
	map->size = size;
	atomic_init(&map->refs, 1);
	/* Readers never nest; without this a stream of them starves the publisher. */
	pthread_rwlockattr_init(&attr);
	pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&map->lock, &attr);
	pthread_rwlock_init(&map->write_lock, &attr);
	pthread_rwlockattr_destroy(&attr);
	if (size) {
		struct chunk *ch = chunk_new(FEW_SEGS);

		if (!ch || chunk_insert(map, 0, ch, 0)) {
			free(ch);
			segmap_unref(map);
			return NULL;
		}
		ch->n = 1;
		ch->segs[0] = (struct seg){ .kind = SEG_ASK, .seek = SEEK_IS_UNKNOWN };
		map->count = 1;
	}
	return map;
}

struct segmap *segmap_ref(struct segmap *map)
{
	atomic_fetch_add(&map->refs, 1);
	return map;
}

static void drop_chunks(struct segmap *map)
{
	size_t c;
	unsigned i;

	for (c = 0; c < map->n_chunks; c++)
		for (i = 0; i < map->chunks[c]->n; i++)
			seg_drop(&map->chunks[c]->segs[i]);
	chunk_remove(map, 0, map->n_chunks);
}

void segmap_unref(struct segmap *map)
{
	unsigned i;

	if (atomic_fetch_sub(&map->refs, 1) != 1)
		return;
	drop_chunks(map);
	for (i = 0; i < map->n_stores; i++)
		if (map->stores[i])
			store_unref(map->stores[i]);
	free(map->stores);
	free(map->chunks);
	free(map->firsts);
	if (map->dirty)
		segmap_unref(map->dirty);
	if (map->log)
		log_unref(map->log);
	pthread_rwlock_destroy(&map->lock);
	pthread_rwlock_destroy(&map->write_lock);
	free(map);
}

int segmap_set(struct segmap *map, uint64_t start, uint64_t end, enum seg_kind kind,
	       enum seg_seek seek)
{
	return put_locked(map, start, end, (struct seg){ .kind = kind, .seek = seek });
}

int segmap_set_store(struct segmap *map, uint64_t start, uint64_t end, struct store *st,
		     uint64_t store_offset, enum seg_seek seek)
{
	struct seg seg = { .kind = SEG_STORE, .seek = seek };
	int index, err;

	if (start > end || store_offset > st->size || end - start > st->size - store_offset)
		return -EINVAL;
	pthread_rwlock_wrlock(&map->lock);
	err = index = segs_store_index(map, st);
	if (index >= 0) {
		seg.store = (uint16_t)index;
		seg.offset = store_offset;
		err = put(map, start, end, seg);
	}
	pthread_rwlock_unlock(&map->lock);
	return err;
}

struct literal *literal_new(uint64_t base, const void *bytes, uint64_t length)
{
	struct literal *literal = malloc(sizeof(*literal) + length);

	if (!literal)
		return NULL;
	atomic_init(&literal->refs, 1);
	literal->base = base;
	memcpy(literal->bytes, bytes, length);
	return literal;
}

int segmap_set_literal(struct segmap *map, uint64_t start, const void *bytes, uint64_t length,
		       enum seg_seek seek)
{
	struct seg seg = { .kind = SEG_LITERAL, .seek = seek };
	int err;

	if (start > map->size || length > map->size - start)
		return -EINVAL;
	if (length == 0)
		return 0;
	seg.literal = literal_new(start, bytes, length);
	if (!seg.literal)
		return -ENOMEM;
	err = put_locked(map, start, start + length, seg);
	if (err)
		free(seg.literal);
	return err;
}

/* Chunks are left with room, so that the first publishes do not halve every one. */
#define LOAD_FILL (CHUNK_SEGS * 3 / 4)

int segs_append(struct segmap *map, struct seg seg)
{
	struct chunk *last = map->n_chunks ? map->chunks[map->n_chunks - 1] : NULL;

	if (last && joins(&last->segs[last->n - 1], &seg))
		return 0;
	if (!last || last->n >= LOAD_FILL) {
		last = chunk_new(last ? CHUNK_SEGS : FEW_SEGS);
		if (!last)
			return -ENOMEM;
		if (chunk_insert(map, map->n_chunks, last, seg.start)) {
			free(last);
			return -ENOMEM;
		}
	}
	if (last->n == last->cap) {
		int err = chunk_make_room(map, map->n_chunks - 1, CHUNK_SEGS / 2);

		if (err)
			return err;
		last = map->chunks[map->n_chunks - 1];
	}
	last->segs[last->n++] = seg;
	map->count++;
	return 0;
}

void segs_cut(struct segmap *map, uint64_t size)
{
	struct pos p = { 0, 0 };
	struct chunk *ch;
	unsigned i;

	if (!map->n_chunks)
		return;
	if (size)
		p = locate(map, size - 1);
	/* From here on nothing is needed but the segments up to p's; with size 0 not even that. */
	for (size_t c = p.c + 1; c < map->n_chunks; c++) {
		for (i = 0; i < map->chunks[c]->n; i++)
			seg_drop(&map->chunks[c]->segs[i]);
		map->count -= map->chunks[c]->n;
	}
	chunk_remove(map, p.c + 1, map->n_chunks - p.c - 1);
	ch = map->chunks[p.c];
	for (i = size ? p.i + 1 : 0; i < ch->n; i++)
		seg_drop(&ch->segs[i]);
	map->count -= ch->n - (size ? p.i + 1 : 0);
	ch->n = size ? p.i + 1 : 0;
	if (!size)
		chunk_remove(map, 0, 1);
}

void segs_swap(struct segmap *a, struct segmap *b)
{
	struct chunk **chunks = a->chunks;
	uint64_t *firsts = a->firsts;
	size_t n = a->n_chunks, cap = a->cap_chunks, count = a->count;

	a->chunks = b->chunks;
	a->firsts = b->firsts;
	a->n_chunks = b->n_chunks;
	a->cap_chunks = b->cap_chunks;
	a->count = b->count;
	b->chunks = chunks;
	b->firsts = firsts;
	b->n_chunks = n;
	b->cap_chunks = cap;
	b->count = count;
}

int segmap_load(struct segmap *map, const uint64_t *ends, const uint8_t *flags, size_t n,
		struct store *st)
{
	struct segmap *fresh;
	uint64_t start = 0;
	int index = 0, err = 0;
	size_t i;

	for (i = 0; i < n; i++) {
		if (ends[i] <= start)
			return -EINVAL;
		start = ends[i];
	}
	fresh = segmap_new(0);
	if (!fresh)
		return -ENOMEM;
	pthread_rwlock_wrlock(&map->lock);
	if (start != map->size || (st && st->size < map->size))
		err = -EINVAL;
	if (st && !err)
		index = segs_store_index(map, st);
	if (index < 0)
		err = index;
	for (i = 0, start = 0; i < n && !err; start = ends[i++]) {
		bool zero = flags[i] & 2;   /* Flags.ZERO */
		struct seg seg = { .start = start, .kind = SEG_ASK, .seek = SEEK_IS_DATA };

		if (zero) {
			seg.kind = SEG_ZERO;
			seg.seek = SEEK_IS_HOLE;
		} else if (st) {
			seg.kind = SEG_STORE;
			seg.store = (uint16_t)index;
			seg.offset = start;
		}
		err = segs_append(fresh, seg);
	}
	if (!err)
		segs_swap(map, fresh);
	pthread_rwlock_unlock(&map->lock);
	segmap_unref(fresh);
	return err;
}
