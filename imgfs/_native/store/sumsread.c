/* Comparing what is read with its sums. */
#define _GNU_SOURCE
#include "sums.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define AGAIN 1   /* something has changed: read it once more */

static uint64_t smaller(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* Which blocks of its region a range is in, that does not go beyond it. */
static unsigned first_bit(uint64_t offset)
{
	return (unsigned)(offset % REGION_BYTES >> SUM_SHIFT);
}

static unsigned last_bit(uint64_t offset, uint64_t length)
{
	return (unsigned)((offset % REGION_BYTES + length + SUM_BLOCK - 1) >> SUM_SHIFT);
}

/* ---- what is wrong ---- */

static _Thread_local struct {
	bool is_set;
	uint64_t offset;
	char name[4096];
} damage;

static int damaged(const struct sums *s, uint64_t block)
{
	damage.is_set = true;
	damage.offset = block * SUM_BLOCK;
	snprintf(damage.name, sizeof(damage.name), "%s", s->name);
	return -STORE_DAMAGED;
}

const char *store_damage(uint64_t *offset)
{
	if (!damage.is_set)
		return NULL;
	damage.is_set = false;
	*offset = damage.offset;
	return damage.name;
}

/* ---- with a region held alone ---- */

int region_load(struct store *st, struct region *r)
{
	struct sums *s = st->sums;
	uint64_t expected[REGION_WORDS] = { 0 };
	uint32_t entries[REGION_BLOCKS];
	unsigned i;
	int err;

	if (r->loaded)
		return 0;
	err = sums_read(s, r->number * REGION_BLOCKS, REGION_BLOCKS, entries, false);
	if (err)
		return err;
	for (i = 0; i < REGION_BLOCKS; i++)
		if (entries[i])
			bits_set(r->summed, i, i + 1);
	if (s->trust == SUMS_STRICT && s->expects)
		s->expects(s->of, r->number * REGION_BLOCKS, expected);
	for (i = 0; i < REGION_WORDS; i++)
		atomic_fetch_or(&r->summed[i], expected[i]);
	r->loaded = true;
	return 0;
}

void region_list(struct sums *s, struct region *r)
{
	struct region *head;

	if (atomic_load(&r->listed) || atomic_exchange(&r->listed, true))
		return;
	head = atomic_load(&s->listed);
	do
		r->next = head;
	while (!atomic_compare_exchange_weak(&s->listed, &head, r));
}

void region_written(struct sums *s, struct region *r, unsigned first, unsigned last)
{
	bits_set(r->verified, first, last);
	bits_set(r->fresh, first, last);
	atomic_store(&r->stamp, store_ticks());
	region_list(s, r);
}

/* It counts as it is, though its sum disagrees. */
static int accept(struct store *st, struct region *r, unsigned bit)
{
	struct sums *s = st->sums;
	int err = 0;

	if (s->writable)
		err = region_load(st, r);
	if (s->writable && !err)
		err = sums_zero(s, r->number * REGION_BLOCKS + bit, 1);
	if (err)
		return err;
	if (s->writable) {
		bits_clear(r->summed, bit, bit + 1);
		region_written(s, r, bit, bit + 1);
	}
	atomic_fetch_add(&s->accepted, 1);
	return 0;
}

int region_settle(struct store *st, struct region *r, unsigned bit)
{
	struct sums *s = st->sums;
	uint64_t block = r->number * REGION_BLOCKS + bit;
	uint32_t sum, entry;
	char bytes[SUM_BLOCK];
	int err;

	if (bit_at(r->verified, bit))
		return 0;
	err = sums_content(st, block, bytes, sizeof(bytes), false);
	if (!err)
		err = sums_read(s, block, 1, &entry, false);
	if (err)
		return err;
	sums_compute(s, block, 1, bytes, sizeof(bytes), &sum);
	/* Who only reads may have opened it before another began to change it, elsewhere in this block. */
	if (sum != entry && entry == 0 && s->trust == SUMS_STRICT && !s->writable &&
	    access(s->closed, F_OK))
		entry = sum;
	if (sum != entry && (entry || s->trust == SUMS_STRICT)) {
		if (s->trust != SUMS_DOUBT)
			return damaged(s, block);
		err = accept(st, r, bit);
	}
	if (!err)
		bits_set(r->verified, bit, bit + 1);
	return err;
}

/* ---- reading ---- */

/* Of the blocks that a range touches; what of them lies outside of it is read. */
static int compute(struct store *st, const char *bytes, uint64_t length, uint64_t offset, uint32_t *to,
		   bool nowait)
{
	struct sums *s = st->sums;
	uint64_t first = offset >> SUM_SHIFT, last = (offset + length - 1) >> SUM_SHIFT, size = st->size;
	uint64_t whole_from = first + (offset % SUM_BLOCK != 0);
	uint64_t whole_to = offset + length >= size ? last + 1 : (offset + length) >> SUM_SHIFT;
	uint64_t block;
	int err = 0;

	for (block = first; block <= last && !err; block++) {
		char edge[SUM_BLOCK];

		if (block >= whole_from && block < whole_to) {
			uint64_t at = block * SUM_BLOCK - offset;

			sums_compute(s, block, whole_to - block, bytes + at,
				     smaller(length - at, (whole_to - block) * SUM_BLOCK),
				     to + (block - first));
			block = whole_to - 1;
			continue;
		}
		err = sums_content(st, block, edge, sizeof(edge), nowait);
		if (!err)
			sums_compute(s, block, 1, edge, sizeof(edge), to + (block - first));
	}
	return err;
}

static int settle(struct store *st, struct region *r, unsigned bit, bool nowait)
{
	int err;

	if (nowait)
		return -EAGAIN;
	pthread_rwlock_wrlock(&r->lock);
	err = region_settle(st, r, bit);
	pthread_rwlock_unlock(&r->lock);
	return err ? err : AGAIN;
}

/* What was read when the region's count was `changes`. */
static int compare(struct store *st, struct region *r, const char *bytes, uint64_t length,
		   uint64_t offset, bool nowait, unsigned changes)
{
	unsigned first = first_bit(offset), last = last_bit(offset, length), bit, unsealed = last;
	uint32_t entries[REGION_BLOCKS], sums[REGION_BLOCKS];
	bool same;
	int err;

	err = sums_read(st->sums, offset >> SUM_SHIFT, last - first, entries, nowait);
	if (!err)
		err = compute(st, bytes, length, offset, sums, nowait);
	for (bit = first; bit < last && !err; bit++) {
		if (bit_at(r->verified, bit) || sums[bit - first] == entries[bit - first])
			continue;
		if (entries[bit - first] || st->sums->trust == SUMS_STRICT)
			return settle(st, r, bit, nowait);
		unsealed = bit;
	}
	if (err)
		return err;
	if (nowait && pthread_rwlock_tryrdlock(&r->lock))
		return unsealed < last ? -EAGAIN : 0;   /* somebody writes, and may wait for a disk */
	if (!nowait)
		pthread_rwlock_rdlock(&r->lock);
	same = atomic_load(&r->changes) == changes;
	if (same)
		bits_set(r->verified, first, last);
	pthread_rwlock_unlock(&r->lock);
	if (same)
		return 0;
	/* A sum that is 0 now may have said before that what was read is damaged. */
	return unsealed < last ? settle(st, r, unsealed, nowait) : 0;
}

/* Inside of one region. */
static int read_part(struct store *st, char *to, uint64_t length, uint64_t offset, bool nowait)
{
	struct region *r = sums_region(st->sums, offset / REGION_BYTES);
	int err;

	if (!r)
		return -ENOMEM;
	do {
		unsigned changes = atomic_load(&r->changes);

		if (bits_all(r->verified, first_bit(offset), last_bit(offset, length)))
			return store_pread_file(st, to, length, offset, nowait);
		err = store_pread_file(st, to, length, offset, nowait);
		if (!err)
			err = compare(st, r, to, length, offset, nowait, changes);
	} while (err == AGAIN);
	return err;
}

int sums_pread(struct store *st, char *to, uint64_t length, uint64_t offset, bool nowait)
{
	int err = 0;

	/* Mostly it was all compared before: then one call reads it. */
	if (sums_verified(st, offset, length))
		return store_pread_file(st, to, length, offset, nowait);
	while (length && !err) {
		uint64_t n = smaller(length, REGION_BYTES - offset % REGION_BYTES);

		err = read_part(st, to, n, offset, nowait);
		to += n;
		offset += n;
		length -= n;
	}
	return err;
}

bool sums_verified(struct store *st, uint64_t offset, uint64_t length)
{
	while (length) {
		uint64_t n = smaller(length, REGION_BYTES - offset % REGION_BYTES);
		struct region *r = sums_find(st->sums, offset / REGION_BYTES);

		if (!r || !bits_all(r->verified, first_bit(offset), last_bit(offset, n)))
			return false;
		offset += n;
		length -= n;
	}
	return true;
}

#define PIECE (256u << 10)

int store_verify(struct store *st, uint64_t length, uint64_t offset)
{
	char *buf = NULL;
	int err = 0;

	while (st->sums && length && !err) {
		uint64_t n = smaller(length, PIECE - offset % PIECE);

		if (!sums_verified(st, offset, n)) {
			if (!buf)
				buf = malloc(PIECE);
			err = buf ? sums_pread(st, buf, n, offset, false) : -ENOMEM;
		}
		offset += n;
		length -= n;
	}
	free(buf);
	return err;
}
