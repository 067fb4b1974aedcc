/* Changing bytes that have sums: a sum is gone before its block changes. */
#define _GNU_SOURCE
#include "sums.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

/* Blocks [first, last) of a region. */
struct span {
	struct region *r;
	unsigned first, last;
};

static uint64_t smaller(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* Of a range inside of one region; r == NULL: no memory. */
static struct span span_of(struct store *st, uint64_t offset, uint64_t length)
{
	uint64_t from = offset % REGION_BYTES;

	return (struct span){ sums_region(st->sums, offset / REGION_BYTES),
			      (unsigned)(from >> SUM_SHIFT),
			      (unsigned)((from + length + SUM_BLOCK - 1) >> SUM_SHIFT) };
}

static uint64_t first_block(const struct span *span)
{
	return span->r->number * REGION_BLOCKS + span->first;
}

/* A block of which a part stays must be right: what is damaged would get a new sum. */
static int settle_edge(struct store *st, uint64_t block)
{
	struct region *r = sums_region(st->sums, block / REGION_BLOCKS);
	unsigned bit = block % REGION_BLOCKS;
	int err = 0;

	if (!r)
		return -ENOMEM;
	if (bit_at(r->verified, bit))
		return 0;
	pthread_rwlock_wrlock(&r->lock);
	err = region_load(st, r);
	if (!err && bit_at(r->summed, bit))
		err = region_settle(st, r, bit);
	pthread_rwlock_unlock(&r->lock);
	return err;
}

static int settle_edges(struct store *st, uint64_t offset, uint64_t length)
{
	uint64_t end = offset + length, first = offset >> SUM_SHIFT, last = (end - 1) >> SUM_SHIFT;
	bool cut = end % SUM_BLOCK && end < st->size;
	int err = 0;

	if (offset % SUM_BLOCK || (first == last && cut))
		err = settle_edge(st, first);
	if (!err && cut && first != last)
		err = settle_edge(st, last);
	return err;
}

/* With the region held alone: the blocks' sums are 0. */
static int forget(struct store *st, const struct span *span)
{
	unsigned first = span->first, last = span->last;
	int err;

	while (first < last && !bit_at(span->r->summed, first))
		first++;
	while (first < last && !bit_at(span->r->summed, last - 1))
		last--;
	if (first == last)
		return 0;
	err = sums_zero(st->sums, span->r->number * REGION_BLOCKS + first, last - first);
	if (!err)
		bits_clear(span->r->summed, first, last);
	return err;
}

/* Writing over blocks that nobody has compared has failed.  Such as are still what their sums say have
 * them back; of the others nobody can tell. */
static void bring_back(struct store *st, const struct span *span, const uint32_t *old)
{
	unsigned bit;

	for (bit = span->first; bit < span->last; bit++) {
		uint64_t block = span->r->number * REGION_BLOCKS + bit;
		uint32_t sum, was = old[bit - span->first];
		char bytes[SUM_BLOCK];

		if (bit_at(span->r->verified, bit) || !was ||
		    sums_content(st, block, bytes, sizeof(bytes), false))
			continue;
		sums_compute(st->sums, block, 1, bytes, sizeof(bytes), &sum);
		if (sum == was && sums_write(st->sums, block, 1, &was) == 0)
			bits_set(span->r->summed, bit, bit + 1);
	}
}

static bool has_unverified(const struct span *span)
{
	unsigned bit;

	for (bit = span->first; bit < span->last; bit++)
		if (bit_at(span->r->summed, bit) && !bit_at(span->r->verified, bit))
			return true;
	return false;
}

/* What was compared has a sum again later, whether it is written now or that fails. */
static void keep_verified(struct store *st, const struct span *span)
{
	unsigned bit;

	for (bit = span->first; bit < span->last; bit++)
		if (bit_at(span->r->verified, bit))
			region_written(st->sums, span->r, bit, bit + 1);
}

/* With the region held alone, and some of the blocks summed.  *done: the bytes have been changed, as
 * is needed when some of the blocks have not been compared: who reads one of them meanwhile finds that
 * its sum disagrees, and waits for the region. */
static int overwrite(struct store *st, const struct span *span, uint64_t length, uint64_t offset,
		     store_io *io, void *arg, bool *done)
{
	uint32_t old[REGION_BLOCKS];
	int err = 0;

	*done = has_unverified(span);
	if (*done)
		err = sums_read(st->sums, first_block(span), span->last - span->first, old, false);
	if (err)
		return err;
	atomic_fetch_add(&span->r->changes, 1);
	err = forget(st, span);
	keep_verified(st, span);
	if (!*done)
		return err;
	if (!err)
		err = io(st, length, offset, arg);
	if (err)
		bring_back(st, span, old);
	else
		region_written(st->sums, span->r, span->first, span->last);
	return err;
}

static int change_part(struct store *st, uint64_t length, uint64_t offset, store_io *io, void *arg)
{
	struct span span = span_of(st, offset, length);
	bool done = false;
	int err = 0;

	if (!span.r)
		return -ENOMEM;
	while (!done && !err) {
		pthread_rwlock_rdlock(&span.r->lock);
		if (span.r->loaded && !bits_any(span.r->summed, span.first, span.last)) {
			err = io(st, length, offset, arg);
			if (!err)
				region_written(st->sums, span.r, span.first, span.last);
			atomic_fetch_add(&span.r->changes, 1);
			pthread_rwlock_unlock(&span.r->lock);
			return err;
		}
		pthread_rwlock_unlock(&span.r->lock);
		pthread_rwlock_wrlock(&span.r->lock);
		err = region_load(st, span.r);
		if (!err && bits_any(span.r->summed, span.first, span.last))
			err = overwrite(st, &span, length, offset, io, arg, &done);
		pthread_rwlock_unlock(&span.r->lock);
	}
	return err;
}

int sums_change(struct store *st, uint64_t offset, uint64_t length, store_io *io, void *arg)
{
	int err = length ? settle_edges(st, offset, length) : 0;

	while (length && !err) {
		uint64_t n = smaller(length, REGION_BYTES - offset % REGION_BYTES);

		err = change_part(st, n, offset, io, arg);
		offset += n;
		length -= n;
	}
	return err;
}

/* ---- holes, and the end ---- */

/* The first region from this one on of which something is known, or has sums; UINT64_MAX: none. */
static uint64_t next_known(struct store *st, uint64_t number)
{
	struct region *r = sums_next(st->sums, number);
	off_t at = lseek(st->sums->fd, (off_t)(number * REGION_BLOCKS * sizeof(uint32_t)), SEEK_DATA);
	uint64_t in_file = UINT64_MAX;

	if (at >= 0)
		in_file = (uint64_t)at / (REGION_BLOCKS * sizeof(uint32_t));
	else if (errno != ENXIO)
		in_file = number;   /* this file system cannot tell */
	return r ? smaller(r->number, in_file) : in_file;
}

/* They read as zeroes from now on, or as they were: neither is to be sealed, and both are good. */
static int forget_part(struct store *st, const struct span *span)
{
	unsigned bit;
	int err;

	pthread_rwlock_wrlock(&span->r->lock);
	err = region_load(st, span->r);
	if (!err) {
		atomic_fetch_add(&span->r->changes, 1);
		bits_clear(span->r->fresh, span->first, span->last);
		for (bit = span->first; bit < span->last; bit++)
			if (bit_at(span->r->summed, bit))
				bits_set(span->r->verified, bit, bit + 1);
		err = forget(st, span);
	}
	pthread_rwlock_unlock(&span->r->lock);
	return err;
}

static int punch_file(struct store *st, uint64_t length, uint64_t offset, void *unused)
{
	(void)unused;
	return fallocate(st->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset,
			 (off_t)length) ? -errno : 0;
}

int sums_punch(struct store *st, uint64_t offset, uint64_t length)
{
	uint64_t end = offset + length, number;
	uint64_t from = smaller((offset + SUM_BLOCK - 1) / SUM_BLOCK * SUM_BLOCK, end);
	uint64_t to = end >= st->size ? end : end / SUM_BLOCK * SUM_BLOCK;
	int err = 0;

	/* A block of which a part stays is written, and may be the layer's still. */
	if (offset < from)
		err = sums_change(st, offset, from - offset, punch_file, NULL);
	if (!err && to < end && from <= to)
		err = sums_change(st, to, end - to, punch_file, NULL);
	if (err || from >= to)
		return err;
	for (number = next_known(st, from / REGION_BYTES); number <= (to - 1) / REGION_BYTES && !err;
	     number = next_known(st, number + 1)) {
		uint64_t start = number * REGION_BYTES > from ? number * REGION_BYTES : from;
		struct span span = span_of(st, start, smaller(to, (number + 1) * REGION_BYTES) - start);

		err = span.r ? forget_part(st, &span) : -ENOMEM;
	}
	return err ? err : punch_file(st, to - from, from, NULL);
}
