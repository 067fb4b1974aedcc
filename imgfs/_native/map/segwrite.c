/* Writing through a segment map: into the target, one of its stores, at the map's own offsets.
 *
 * A write puts its bytes into the target's file, then marks the range as the target's in the map
 * and, where it was not so already, in `dirty`, and only then is it answered.  A range that is the
 * target's already is dirty already, or whoever keeps the account has taken it from there since: it needs
 * the bytes only.  Map and dirty change in one step, under both locks (the map's first).
 */
#define _GNU_SOURCE
#include "log.h"
#include "segmap_walk.h"

#include <errno.h>
#include <unistd.h>

/* ---- the target ---- */

int segmap_set_target(struct segmap *map, struct store *st, struct segmap *dirty, struct log *log)
{
	struct segmap *old;
	struct log *old_log;
	int index = 0, in_dirty = 0;

	if ((st && !st->whole) || dirty == map || (dirty && !st) || (log && !dirty))
		return -EINVAL;
	pthread_rwlock_wrlock(&map->write_lock);
	if (dirty && dirty->size != map->size) {
		pthread_rwlock_unlock(&map->write_lock);
		return -EINVAL;
	}
	if (st)
		index = segmap_store_index(map, st);
	if (dirty && index >= 0)
		in_dirty = segmap_store_index(dirty, st);
	if (index < 0 || in_dirty < 0) {
		pthread_rwlock_unlock(&map->write_lock);
		return -ENOMEM;
	}
	old = map->dirty;
	map->dirty = dirty ? segmap_ref(dirty) : NULL;
	old_log = map->log;
	map->log = log ? log_ref(log) : NULL;
	map->target_index = (uint16_t)index;
	map->dirty_index = (uint16_t)in_dirty;
	atomic_store(&map->target, st);
	pthread_rwlock_unlock(&map->write_lock);
	if (old)
		segmap_unref(old);
	if (old_log)
		log_unref(old_log);
	return 0;
}

static bool is_targets(const struct segmap *map, const struct seg *s)
{
	return s->kind == SEG_STORE && s->store == map->target_index && s->offset == s->start;
}

/* Under the map's lock. */
static bool all_targets(struct segmap *map, uint64_t start, uint64_t end)
{
	struct pos p;

	if (start >= end)
		return true;
	for (p = locate(map, start); is_targets(map, at(map, p));)
		if (seg_end(map, p) >= end || !step(map, &p))
			return true;
	return false;
}

static bool all_holes(struct segmap *map, uint64_t start, uint64_t end)
{
	struct pos p = locate(map, start);

	while (at(map, p)->kind == SEG_ZERO && at(map, p)->seek == SEEK_IS_HOLE)
		if (seg_end(map, p) >= end || !step(map, &p))
			return true;
	return false;
}

/* start < end.  All that can fail comes first. */
static int mark(struct segmap *map, uint64_t start, uint64_t end, struct seg seg)
{
	struct segmap *dirty = map->dirty;
	int err;

	pthread_rwlock_wrlock(&map->lock);
	if (dirty)
		pthread_rwlock_wrlock(&dirty->lock);
	err = segs_split(map, start);
	if (!err)
		err = segs_split(map, end);
	if (!err && dirty)
		err = segs_split(dirty, start);
	if (!err && dirty)
		err = segs_split(dirty, end);
	if (!err) {
		segs_replace(map, start, end, seg);
		if (dirty) {
			seg.store = map->dirty_index;
			segs_replace(dirty, start, end, seg);
		}
	}
	if (dirty)
		pthread_rwlock_unlock(&dirty->lock);
	pthread_rwlock_unlock(&map->lock);
	return err;
}

static int mark_targets(struct segmap *map, uint64_t start, uint64_t end)
{
	return mark(map, start, end, (struct seg){ .kind = SEG_STORE, .seek = SEEK_IS_DATA,
						   .store = map->target_index, .offset = start });
}

int segs_mark_target(struct segmap *map, uint64_t start, uint64_t end)
{
	bool already;

	pthread_rwlock_rdlock(&map->lock);
	already = all_targets(map, start, end);
	pthread_rwlock_unlock(&map->lock);
	return already ? 0 : mark_targets(map, start, end);
}

/* ---- changing ---- */

static int write_shared(struct segmap *map, uint64_t offset, uint64_t length, const void *buf,
			int pipe)
{
	struct store *st = map->target;
	uint64_t size = map->size, end = offset + length, first, last;
	bool edges = true, rest;
	int err;

	if (!inside(map, offset, length))
		return -EINVAL;
	if (!st)
		return 0;
	if (length == 0)
		return 1;
	/* [first, last) are the blocks that are written whole: none, with first > last, when it all
	 * lies inside of one. */
	first = block_down(offset + SEG_BLOCK - 1);
	last = end == size ? end : block_down(end);
	pthread_rwlock_rdlock(&map->lock);
	if (offset % SEG_BLOCK)
		edges = all_targets(map, block_down(offset), smaller(first, size));
	if (last < end)
		edges = edges && all_targets(map, last, smaller(last + SEG_BLOCK, size));
	rest = all_targets(map, first, last);
	pthread_rwlock_unlock(&map->lock);
	if (!edges)
		return 0;
	err = buf ? store_pwrite(st, buf, length, offset) :
		    store_write_from(st, pipe, length, offset);
	if (!err && !rest)
		err = mark_targets(map, first, last);
	return err ? err : 1;
}

static int write_counted(struct segmap *map, uint64_t offset, uint64_t length, const void *buf,
			 int pipe)
{
	int result;

	pthread_rwlock_rdlock(&map->write_lock);
	result = write_shared(map, offset, length, buf, pipe);
	pthread_rwlock_unlock(&map->write_lock);
	if (result == 1) {
		atomic_fetch_add_explicit(&map->writes, 1, memory_order_relaxed);
		atomic_fetch_add_explicit(&map->bytes_written, length, memory_order_relaxed);
		segmap_changed(map);
	}
	return result;
}

int segmap_write(struct segmap *map, uint64_t offset, uint64_t length, const void *buf)
{
	return write_counted(map, offset, length, buf, -1);
}

int segmap_write_from(struct segmap *map, uint64_t offset, uint64_t length, int pipe)
{
	return write_counted(map, offset, length, NULL, pipe);
}

int segmap_read_target(struct segmap *map, uint64_t offset, uint64_t length, void *buf)
{
	int err = -ENOENT;

	pthread_rwlock_rdlock(&map->write_lock);
	if (map->target)
		err = store_pread_file(map->target, buf, length, offset, false);   /* it has no sums yet */
	pthread_rwlock_unlock(&map->write_lock);
	return err;
}

static int write_zeroes(struct store *st, uint64_t start, uint64_t end)
{
	static const char zeroes[SEG_BLOCK];
	int err = 0;

	for (; start < end && !err; start += SEG_BLOCK)
		err = store_pwrite(st, zeroes, smaller(end - start, SEG_BLOCK), start);
	return err;
}

static int copy_alone(struct segmap *map, uint64_t start, uint64_t length, const char *old)
{
	struct store *st = map->target;
	uint64_t end = start + length, from, to;
	bool copied = false;
	int err = 0;

	if (!inside(map, start, length) || !whole_blocks(map, start, end))
		return -EINVAL;
	if (!st)
		return 0;
	/* What was not the target's before stays so meanwhile: all others are kept out.  Only that
	 * something is no more unknown can happen, and then it is what the caller knows. */
	for (from = start; from < end && !err; from = to) {
		bool targets, zero;
		struct pos p;

		pthread_rwlock_rdlock(&map->lock);
		p = locate(map, from);
		targets = is_targets(map, at(map, p));
		zero = at(map, p)->kind == SEG_ZERO;
		to = smaller(seg_end(map, p), end);
		pthread_rwlock_unlock(&map->lock);
		if (targets)
			continue;
		copied = true;
		err = zero ? write_zeroes(st, from, to) :
			     store_pwrite(st, old + (from - start), to - from, from);
	}
	if (!err && copied)
		err = mark_targets(map, start, end);
	return err ? err : 1;
}

int segmap_copy_up(struct segmap *map, uint64_t start, uint64_t length, const void *old)
{
	int result;

	pthread_rwlock_wrlock(&map->write_lock);
	result = copy_alone(map, start, length, old);
	pthread_rwlock_unlock(&map->write_lock);
	return result;
}

static int zero_alone(struct segmap *map, uint64_t start, uint64_t end)
{
	struct store *st = map->target;
	bool already;
	int err;

	if (start > end || end > map->size || !whole_blocks(map, start, end))
		return -EINVAL;
	if (!st)
		return 0;
	if (start == end)
		return 1;
	pthread_rwlock_rdlock(&map->lock);
	already = all_holes(map, start, end);
	pthread_rwlock_unlock(&map->lock);
	err = already ? 0 : mark(map, start, end,
				 (struct seg){ .kind = SEG_ZERO, .seek = SEEK_IS_HOLE });
	if (err)
		return err;
	/* It reads as zeroes now, whatever the file says: a file system that cannot punch only keeps
	 * the space.  The punch sets the file's mtime, which is the disk's. */
	if (already || store_punch(st, end - start, start))
		store_touch(st);
	return 1;
}

int segmap_zero(struct segmap *map, uint64_t start, uint64_t end)
{
	int result;

	pthread_rwlock_wrlock(&map->write_lock);
	result = zero_alone(map, start, end);
	pthread_rwlock_unlock(&map->write_lock);
	if (result == 1)
		segmap_changed(map);
	return result;
}

/* Cutting cannot fail. */
static int resize(struct segmap *map, uint64_t size)
{
	int err = 0;

	pthread_rwlock_wrlock(&map->lock);
	if (size < map->size)
		segs_cut(map, size);
	else if (size > map->size)
		err = segs_append(map, (struct seg){ .start = map->size, .kind = SEG_ZERO,
						     .seek = SEEK_IS_HOLE });
	if (!err)
		atomic_store(&map->size, size);
	pthread_rwlock_unlock(&map->lock);
	return err;
}

int segmap_resize(struct segmap *map, uint64_t size)
{
	uint64_t before;
	int err = 0;

	if (size > INT64_MAX)
		return -EINVAL;
	pthread_rwlock_wrlock(&map->write_lock);
	before = map->size;
	if (map->dirty)
		err = resize(map->dirty, size);
	if (!err)
		err = resize(map, size);
	if (err && map->dirty)
		resize(map->dirty, before);
	else if (map->dirty)
		atomic_store(&map->dirty->unsettled, true);
	pthread_rwlock_unlock(&map->write_lock);
	segmap_changed(map);
	return err;
}

void segmap_changed(struct segmap *map)
{
	atomic_fetch_add_explicit(&map->changes, 1, memory_order_release);
}

/* ---- making safe ---- */

void segmap_settle(struct segmap *dirty)
{
	atomic_store(&dirty->unsettled, false);
}

static bool is_clean(struct segmap *dirty)
{
	bool clean;

	pthread_rwlock_rdlock(&dirty->lock);
	clean = !atomic_load(&dirty->unsettled) &&
		(dirty->count == 0 || (dirty->count == 1 && dirty->chunks[0]->segs[0].kind == SEG_ASK));
	pthread_rwlock_unlock(&dirty->lock);
	return clean;
}

/* A disk that failed once is never asked again: it would say that all is well. */
static int sync_data(struct store *st, struct log *log)
{
	if (log && (atomic_load(&log->lost) || !log_is_named(log)))
		return 0;
	if (fdatasync(st->fd) == 0)
		return 1;
	if (log)
		atomic_store(&log->lost, true);
	return log ? 0 : -errno;
}

int segmap_sync(struct segmap *map)
{
	struct segmap *dirty = NULL;
	struct store *st = NULL;
	struct log *log = NULL;
	int result = 0;

	pthread_rwlock_rdlock(&map->write_lock);
	if (map->dirty) {
		st = store_ref(map->target);
		dirty = segmap_ref(map->dirty);
		log = map->log ? log_ref(map->log) : NULL;
	}
	pthread_rwlock_unlock(&map->write_lock);
	if (!st)
		return 0;
	if (is_clean(dirty))
		result = sync_data(st, log);
	else if (log)
		result = log_commit(log, dirty);
	if (log)
		log_unref(log);
	segmap_unref(dirty);
	store_unref(st);
	return result;
}
