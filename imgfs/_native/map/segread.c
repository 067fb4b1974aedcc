#define _GNU_SOURCE
#include "segmap_walk.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

/* A piece of a read that must be read from a store's file, after the lock is let go. */
struct piece {
	struct store *st;
	unsigned token;
	uint64_t offset, length;
	char *to;
	bool locked;           /* while what is held in memory is in a pipe */
};

#define MAX_PIECES 32

/* Under the read lock: fill what needs no I/O, list what does; stops when `pieces` is full.
 * Returns how many bytes are settled so, or -1 when only Python knows some of them, or
 * -SEG_COMING when it need not be asked because they are on their way. */
static int64_t gather(struct segmap *map, uint64_t offset, uint64_t length, char *buf,
		      struct piece *pieces, unsigned *n)
{
	struct pos p = locate(map, offset);
	uint64_t done = 0;

	for (;;) {
		struct seg *s = at(map, p);
		uint64_t where = offset + done, end = seg_end(map, p), take = end - where;
		struct store *st;

		if (take > length - done)
			take = length - done;
		switch (s->kind) {
		case SEG_ZERO:
			memset(buf + done, 0, take);
			break;
		case SEG_LITERAL:
			memcpy(buf + done, s->literal->bytes + (where - s->literal->base), take);
			break;
		case SEG_STORE:
			if (*n == MAX_PIECES)
				return (int64_t)done;
			st = store_ref(map->stores[s->store]);
			pieces[*n] = (struct piece){ st, store_enter(st), s->offset + where - s->start,
						     take, buf + done, false };
			(*n)++;
			if (!store_covers(st, pieces[*n - 1].offset, take))
				return store_is_coming(st, pieces[*n - 1].offset, take) ?
					       -SEG_COMING : -1;
			break;
		default:
			return -1;
		}
		done += take;
		if (done == length || !step(map, &p))
			return (int64_t)done;
	}
}

int segmap_read(struct segmap *map, uint64_t offset, uint64_t length, char *buf,
		enum seg_wait wait)
{
	if (!inside(map, offset, length))
		return -EINVAL;
	while (length) {
		struct piece pieces[MAX_PIECES];
		unsigned n = 0, i;
		int64_t done;
		int err = 0;

		pthread_rwlock_rdlock(&map->lock);
		/* It may have been cut since the last piece. */
		done = inside(map, offset, length) ?
			       gather(map, offset, length, buf, pieces, &n) : -1;
		pthread_rwlock_unlock(&map->lock);
		for (i = 0; i < n; i++) {
			struct piece *p = &pieces[i];

			if (done >= 0 && !err)
				err = store_read_here(p->st, p->to, p->length, p->offset,
						wait == SEG_NOWAIT);
			if (done >= 0 && !err)
				store_tell(p->st, p->offset, p->length);
			store_leave(p->st, p->token);
			store_unref(p->st);
		}
		if (done < 0)
			return done == -SEG_COMING ? SEG_COMING : 0;
		if (err == -ENODATA)
			return 0;   /* it was taken away meanwhile */
		if (err)
			return err;
		offset += (uint64_t)done;
		length -= (uint64_t)done;
		buf += done;
	}
	return 1;
}

static int splice_pieces(struct piece *pieces, unsigned n, const char *buf, uint64_t length, int pipe)
{
	const char *at = buf;
	unsigned i;
	int err = 0;

	for (i = 0; i < n && !err; i++) {
		struct piece *p = &pieces[i];

		err = splice_memory(at, (uint64_t)(p->to - at), pipe);
		if (!err)
			err = store_splice_here(p->st, pipe, p->length, p->offset, &p->locked);
		if (!err)
			store_tell(p->st, p->offset, p->length);
		at = p->to + p->length;
	}
	return err ? err : splice_memory(at, (uint64_t)(buf + length - at), pipe);
}

int segmap_splice(struct segmap *map, uint64_t offset, uint64_t length, char *buf, int pipe,
		   bool (*take)(void *arg), void *arg)
{
	struct piece pieces[MAX_PIECES];
	unsigned n = 0, i;
	int64_t done;
	int err = 0;
	bool taken = false;

	if (!length || !inside(map, offset, length))
		return 0;
	pthread_rwlock_rdlock(&map->lock);
	done = inside(map, offset, length) ? gather(map, offset, length, buf, pieces, &n) : -1;
	pthread_rwlock_unlock(&map->lock);
	if (done == (int64_t)length)
		err = splice_pieces(pieces, n, buf, length, pipe);
	if (done == (int64_t)length && !err)
		taken = take(arg);
	for (i = 0; i < n; i++) {
		if (pieces[i].locked)
			store_spliced(pieces[i].st);
		store_leave(pieces[i].st, pieces[i].token);
		store_unref(pieces[i].st);
	}
	return err ? err : taken;
}

/* Holes are told of by whole blocks: with its cache off, qemu 7.2 aborts at a hole whose edge is not aligned to
 * 4096 bytes, as ext4 and xfs with their usual blocks never have one.  So a block is a hole when all of it is,
 * and data otherwise; the last block of a file ends where the file does. */

static uint64_t block_up(uint64_t offset)
{
	return offset > UINT64_MAX - SEG_BLOCK ? UINT64_MAX : block_down(offset + SEG_BLOCK - 1);
}

/* Under the read lock. */
static int find_data(struct segmap *map, uint64_t where, uint64_t size, bool complete, uint64_t *found)
{
	struct pos p = locate(map, block_down(where));

	while (at(map, p)->seek == SEEK_IS_HOLE && seg_end(map, p) < size && step(map, &p))
		;
	if (at(map, p)->seek == SEEK_IS_HOLE)
		return -ENXIO;
	if (at(map, p)->seek == SEEK_IS_UNKNOWN && !complete)
		return 0;
	*found = block_down(at(map, p)->start);
	if (*found < where)
		*found = where;
	return 1;
}

/* Under the read lock. */
static int find_hole(struct segmap *map, uint64_t where, uint64_t size, bool complete, uint64_t *found)
{
	uint64_t start = block_down(where);   /* all that is between here and the segment is a hole */
	struct pos p = locate(map, start);

	do {
		uint64_t end = smaller(seg_end(map, p), size);

		if (end <= start)
			continue;      /* its block is data already */
		if (at(map, p)->seek == SEEK_IS_UNKNOWN && !complete)
			return 0;
		if (at(map, p)->seek != SEEK_IS_HOLE)
			start = block_up(end);
		else if (end == size || end - start >= SEG_BLOCK)
			break;
	} while (seg_end(map, p) < size && step(map, &p));
	*found = start < where ? where : smaller(start, size);   /* the end of a file counts as a hole */
	return 1;
}

int segmap_seek_in(struct segmap *map, int64_t offset, int whence, uint64_t size, bool complete,
		   uint64_t *found)
{
	uint64_t where = (uint64_t)offset;
	int result;

	if (whence != SEEK_DATA && whence != SEEK_HOLE)
		return -EINVAL;
	pthread_rwlock_rdlock(&map->lock);
	size = smaller(size, map->size);
	if (offset < 0 || where >= size)
		result = -ENXIO;
	else if (whence == SEEK_DATA)
		result = find_data(map, where, size, complete, found);
	else
		result = find_hole(map, where, size, complete, found);
	pthread_rwlock_unlock(&map->lock);
	return result;
}

int segmap_seek(struct segmap *map, int64_t offset, int whence, uint64_t *found)
{
	return segmap_seek_in(map, offset, whence, UINT64_MAX, false, found);
}

size_t segmap_segments(struct segmap *map, uint64_t offset, uint64_t end, struct seg_view *out,
		       size_t max)
{
	size_t n = 0;
	struct pos p;

	pthread_rwlock_rdlock(&map->lock);
	if (offset >= end || end > map->size) {
		pthread_rwlock_unlock(&map->lock);
		return 0;
	}
	p = locate(map, offset);
	do {
		struct seg *s = at(map, p);
		uint64_t to = seg_end(map, p);

		if (s->start >= end || n == max)
			break;
		out[n++] = (struct seg_view){ s->start > offset ? s->start : offset,
					      to < end ? to : end, s->kind, s->seek };
	} while (step(map, &p));
	pthread_rwlock_unlock(&map->lock);
	return n;
}

uint64_t segmap_next_unknown(struct segmap *map, uint64_t start, uint64_t end)
{
	uint64_t found = end;
	struct pos p;

	pthread_rwlock_rdlock(&map->lock);
	if (start < end && start < map->size) {
		p = locate(map, start);
		while (at(map, p)->seek != SEEK_IS_UNKNOWN && seg_end(map, p) < end && step(map, &p))
			;
		if (at(map, p)->seek == SEEK_IS_UNKNOWN)
			found = at(map, p)->start > start ? at(map, p)->start : start;
	}
	pthread_rwlock_unlock(&map->lock);
	return found;
}

int segmap_extents(struct segmap *map, uint64_t offset, uint64_t end, struct scan *out)
{
	struct pos p;
	int err = 0;

	pthread_rwlock_rdlock(&map->lock);
	if (offset >= end || end > map->size) {
		err = offset == end && end <= map->size ? 0 : -EINVAL;
		pthread_rwlock_unlock(&map->lock);
		return err;
	}
	p = locate(map, offset);
	do {
		uint64_t to = seg_end(map, p);

		if (at(map, p)->start >= end)
			break;
		err = scan_add(out, to < end ? to : end,
			       at(map, p)->seek == SEEK_IS_HOLE ? SCAN_HOLE : SCAN_DATA);
	} while (!err && step(map, &p));
	pthread_rwlock_unlock(&map->lock);
	return err;
}

size_t segmap_count(struct segmap *map)
{
	size_t n;

	pthread_rwlock_rdlock(&map->lock);
	n = map->count;
	pthread_rwlock_unlock(&map->lock);
	return n;
}

uint64_t segmap_data_bytes(struct segmap *map)
{
	uint64_t total = 0;
	struct pos p = { 0, 0 };

	pthread_rwlock_rdlock(&map->lock);
	if (map->count) {
		do {
			if (at(map, p)->seek != SEEK_IS_HOLE)
				total += seg_end(map, p) - at(map, p)->start;
		} while (step(map, &p));
	}
	pthread_rwlock_unlock(&map->lock);
	return total;
}
