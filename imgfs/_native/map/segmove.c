/* Copying from one map's files to the target of another, or of the same one; and what becomes of the
 * bytes in a target's file that are nobody's any more. */
#define _GNU_SOURCE
#include "segmap_walk.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define BUFFER (256u << 10)
#define MAX_PIECES 64
#define MAX_LOOKED (1u << 16)   /* segments that are looked at under one lock */

struct piece {
	struct store *st;
	unsigned token;
	uint64_t offset, length;
};

/* ---- from file to file ---- */

/* Of what was verified. */
static int copy_by_hand(struct store *to, uint64_t to_offset, struct store *from, uint64_t offset,
			uint64_t length)
{
	char *buf = malloc(BUFFER);
	int err = buf ? 0 : -ENOMEM;

	while (length && !err) {
		uint64_t n = smaller(length, BUFFER);

		err = from->sums ? store_pread_file(from, buf, n, offset, false) :
				   store_read_here(from, buf, n, offset, false);
		if (!err)
			err = store_pwrite_file(to, buf, n, to_offset);
		offset += n;
		to_offset += n;
		length -= n;
	}
	free(buf);
	return err;
}

/* Are the bytes in the store's file, and not held in memory?  After store_covers. */
static bool in_file(const struct store *st, uint64_t offset, uint64_t length)
{
	uint64_t block = offset >> st->block_shift, last = (offset + length - 1) >> st->block_shift;

	if (st->whole)
		return true;
	while (block <= last && store_block_present(st, block))
		block++;
	return block > last;
}

struct copying {
	struct store *from;
	uint64_t offset;       /* of what comes next */
};

static int copy_in_file(struct store *to, uint64_t length, uint64_t to_offset, void *arg)
{
	struct copying *copying = arg;
	struct store *from = copying->from;
	uint64_t offset = copying->offset;

	copying->offset += length;
	while (length) {
		off_t in = (off_t)offset, out = (off_t)to_offset;
		ssize_t n = copy_file_range(from->fd, &in, to->fd, &out, length, 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)   /* not between these two; or it is a full disk, which is told then */
			return copy_by_hand(to, to_offset, from, offset, length);
		atomic_fetch_add_explicit(&from->bytes_served, (uint64_t)n, memory_order_relaxed);
		offset += (uint64_t)n;
		to_offset += (uint64_t)n;
		length -= (uint64_t)n;
	}
	return 0;
}

static int copy_held(struct store *to, uint64_t length, uint64_t to_offset, void *arg)
{
	struct copying *copying = arg;

	copying->offset += length;
	return copy_by_hand(to, to_offset, copying->from, copying->offset - length, length);
}

/* By the kernel, which may let both files have the same blocks.  -ENODATA: what was held in memory is
 * there no more. */
static int copy(struct store *to, uint64_t to_offset, struct store *from, uint64_t offset,
		uint64_t length)
{
	struct copying copying = { from, offset };
	bool is_in_file = in_file(from, offset, length);
	/* Before `to` is held: both may be one store. */
	int err = store_verify(from, length, offset);

	return err ? err : store_change(to, length, to_offset, is_in_file ? copy_in_file : copy_held,
					&copying);
}

/* What of the range, from its beginning, is in stores: entered, and held. */
static size_t stored(struct segmap *map, uint64_t offset, uint64_t length, struct piece *pieces)
{
	size_t n = 0;
	struct pos p;

	pthread_rwlock_rdlock(&map->lock);
	if (length && inside(map, offset, length)) {
		p = locate(map, offset);
		while (length && n < MAX_PIECES && at(map, p)->kind == SEG_STORE) {
			struct seg *s = at(map, p);
			uint64_t take = smaller(seg_end(map, p) - offset, length);
			struct store *st = store_ref(map->stores[s->store]);

			pieces[n] = (struct piece){ st, store_enter(st), s->offset + offset - s->start,
						    take };
			if (!store_covers(st, pieces[n].offset, take)) {
				store_leave(st, pieces[n].token);
				store_unref(st);
				break;
			}
			n++;
			offset += take;
			length -= take;
			if (!step(map, &p))
				break;
		}
	}
	pthread_rwlock_unlock(&map->lock);
	return n;
}

static void let_go(const struct piece *p)
{
	store_leave(p->st, p->token);
	store_unref(p->st);
}

uint64_t segmap_stored(struct segmap *map, uint64_t offset, uint64_t length)
{
	struct piece pieces[MAX_PIECES];
	uint64_t found = 0;
	size_t n, i;

	do {
		n = stored(map, offset + found, length - found, pieces);
		for (i = 0; i < n; i++) {
			found += pieces[i].length;
			let_go(&pieces[i]);
		}
	} while (n);
	return found;
}

/* Copies the first `usable` bytes of the pieces, and lets go of them all; adds to *moved what has been
 * copied. */
static int copy_pieces(struct store *to, uint64_t offset, const struct piece *pieces, size_t n,
		       uint64_t usable, uint64_t *moved)
{
	int err = 0;
	size_t i;

	for (i = 0; i < n; i++) {
		const struct piece *p = &pieces[i];
		uint64_t length = smaller(p->length, usable);

		if (!err && length)
			err = copy(to, offset + *moved, p->st, p->offset, length);
		if (!err && length) {
			*moved += length;
			usable -= length;
			store_tell(p->st, p->offset, length);
		}
		let_go(p);
	}
	return err;
}

/* *moved is what has been copied, even when it fails then.  A block of which only a part can be had is
 * not touched: it may be the target's, and then all of it is seen. */
static int move_bytes(struct store *to, uint64_t offset, struct segmap *from, uint64_t from_offset,
		      uint64_t length, uint64_t *moved)
{
	struct piece pieces[MAX_PIECES];
	uint64_t usable;
	int err;

	*moved = 0;
	do {
		size_t n = stored(from, from_offset + *moved, length - *moved, pieces), i;
		uint64_t end = offset + *moved;

		for (i = 0; i < n; i++)
			end += pieces[i].length;
		if (end < offset + length)
			end = block_down(end);
		usable = end > offset + *moved ? end - offset - *moved : 0;
		err = copy_pieces(to, offset, pieces, n, usable, moved);
	} while (!err && usable);
	return err == -ENODATA ? 0 : err;   /* whoever reads asks again */
}

static int move_shared(struct segmap *map, uint64_t offset, struct segmap *from,
		       uint64_t from_offset, uint64_t length, uint64_t *moved)
{
	struct store *to = map->target;
	uint64_t end;
	int err;

	*moved = 0;
	if (!inside(map, offset, length) || !whole_blocks(map, offset, offset + length) ||
	    !inside(from, from_offset, length))
		return -EINVAL;
	if (!to)
		return 0;
	err = move_bytes(to, offset, from, from_offset, length, moved);
	end = *moved == length ? offset + length : block_down(offset + *moved);
	*moved = end - offset;
	if (*moved) {
		err = segs_mark_target(map, offset, end);
		if (err)
			*moved = 0;
	}
	return err ? err : 1;
}

int segmap_move(struct segmap *map, uint64_t offset, struct segmap *from, uint64_t from_offset,
		uint64_t length, uint64_t *moved)
{
	int result;

	pthread_rwlock_rdlock(&map->write_lock);
	result = move_shared(map, offset, from, from_offset, length, moved);
	pthread_rwlock_unlock(&map->write_lock);
	if (*moved) {
		atomic_fetch_add_explicit(&map->writes, 1, memory_order_relaxed);
		atomic_fetch_add_explicit(&map->bytes_written, *moved, memory_order_relaxed);
		segmap_changed(map);
	}
	return result;
}

/* ---- whose bytes ---- */

static int origin_of(const struct segmap *map, const struct seg *s, struct store *const *stores,
		     size_t n)
{
	size_t i;

	if (s->kind == SEG_ZERO)
		return ORIGIN_ZERO;
	if (s->kind == SEG_STORE && s->offset == s->start)
		for (i = 0; i < n; i++)
			if (map->stores[s->store] == stores[i])
				return (int)i;
	return ORIGIN_OTHER;
}

size_t segmap_origins(struct segmap *map, uint64_t offset, uint64_t end, struct store *const *stores,
		      size_t n_stores, struct origin *out, size_t max)
{
	size_t n = 0, looked = 0;
	struct pos p;

	pthread_rwlock_rdlock(&map->lock);
	if (offset < end && end <= map->size) {
		p = locate(map, offset);
		do {
			int which = origin_of(map, at(map, p), stores, n_stores);

			if (at(map, p)->start >= end)
				break;
			if (n == 0 || out[n - 1].which != which) {
				if (n == max)
					break;
				out[n++] = (struct origin){ offset, offset, which };
			}
			offset = out[n - 1].end = smaller(seg_end(map, p), end);
		} while (++looked < MAX_LOOKED && step(map, &p));
	}
	pthread_rwlock_unlock(&map->lock);
	return n;
}

/* ---- bytes that are nobody's ---- */

/* The next part of the range that nothing newer is in; false: there is none. */
static bool next_free(struct segmap *dirty, uint64_t *start, uint64_t *to, uint64_t end)
{
	bool newer = true;

	pthread_rwlock_rdlock(&dirty->lock);
	while (newer && *start < smaller(end, dirty->size)) {
		struct pos p = locate(dirty, *start);

		newer = at(dirty, p)->kind == SEG_STORE;
		*to = smaller(seg_end(dirty, p), end);
		if (newer)
			*start = *to;
	}
	pthread_rwlock_unlock(&dirty->lock);
	return !newer;
}

int segmap_reclaim(struct segmap *map, uint64_t start, uint64_t end, struct store *st,
		   struct segmap *dirty)
{
	uint64_t to = start;
	struct stat before;
	int err = 0;

	/* Readers who know it as the target's are to find it so; and no write is between its bytes and
	 * its mark. */
	store_quiesce(st);
	pthread_rwlock_wrlock(&map->write_lock);
	if (fstat(st->fd, &before))
		err = -errno;
	for (; !err && next_free(dirty, &start, &to, end); start = to)
		err = store_punch(st, to - start, start);
	/* No byte of the disk has changed with that. */
	if (!err)
		store_set_mtime(st, before.st_mtim);
	pthread_rwlock_unlock(&map->write_lock);
	return err;
}
