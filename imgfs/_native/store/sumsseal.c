/* Giving blocks their sums: from the file, once nobody writes them any more. */
#define _GNU_SOURCE
#include "sums.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define RUN 64u   /* blocks that are read at once */

static uint64_t smaller(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* The next run of a region's fresh blocks, from `first` on; its length. */
static unsigned next_run(struct region *r, unsigned *first)
{
	unsigned n = 0;

	while (*first < REGION_BLOCKS && !bit_at(r->fresh, *first))
		++*first;
	while (*first + n < REGION_BLOCKS && n < RUN && bit_at(r->fresh, *first + n))
		n++;
	return n;
}

/* With the region held alone: these blocks have these sums. */
static int put_sums(struct store *st, struct region *r, const uint64_t *blocks, const uint32_t *fresh)
{
	uint64_t start = r->number * REGION_BLOCKS;
	uint32_t sums[REGION_BLOCKS];
	unsigned first = REGION_BLOCKS, last = 0, bit;
	int err;

	err = region_load(st, r);
	if (!err)
		err = sums_read(st->sums, start, REGION_BLOCKS, sums, false);
	if (err)
		return err;
	for (bit = 0; bit < REGION_BLOCKS; bit++) {
		if (!(blocks[bit / 64] >> (bit % 64) & 1))
			continue;
		sums[bit] = fresh[bit];
		first = bit < first ? bit : first;
		last = bit + 1;
	}
	err = sums_write(st->sums, start + first, last - first, sums + first);
	if (err)
		return err;
	for (bit = 0; bit < REGION_WORDS; bit++) {
		atomic_fetch_or(&r->summed[bit], blocks[bit]);
		atomic_fetch_and(&r->fresh[bit], ~blocks[bit]);
	}
	return 0;
}

/* The number of blocks that got a sum; 0 when somebody wrote meanwhile; or -errno. */
static int64_t seal_region(struct store *st, struct region *r, char *buf)
{
	unsigned changes = atomic_load(&r->changes), first = 0, n;
	uint64_t blocks[REGION_WORDS] = { 0 };
	uint32_t fresh[REGION_BLOCKS];
	int64_t sealed = 0;
	int err = 0;

	while ((n = next_run(r, &first)) && !err) {
		uint64_t block = r->number * REGION_BLOCKS + first;
		unsigned i;

		err = sums_content(st, block, buf, n * SUM_BLOCK, false);
		if (!err)
			sums_compute(st->sums, block, n, buf, n * SUM_BLOCK, fresh + first);
		for (i = first; i < first + n; i++)
			blocks[i / 64] |= UINT64_C(1) << (i % 64);
		first += n;
		sealed += n;
	}
	if (err || !sealed)
		return err;
	pthread_rwlock_wrlock(&r->lock);
	if (atomic_load(&r->changes) == changes)
		err = put_sums(st, r, blocks, fresh);
	else
		sealed = 0;
	pthread_rwlock_unlock(&r->lock);
	return err ? err : sealed;
}

static bool has_fresh(struct region *r)
{
	return bits_any(r->fresh, 0, REGION_BLOCKS);
}

int64_t store_seal(struct store *st, uint32_t age, unsigned regions)
{
	struct sums *s = st->sums;
	struct region *r, *next;
	int64_t sealed = 0, done = 0;
	char *buf;

	if (!s)
		return 0;
	buf = malloc(RUN * SUM_BLOCK);
	if (!buf)
		return -ENOMEM;
	pthread_mutex_lock(&s->sealing);
	for (r = atomic_exchange(&s->listed, NULL); r; r = next) {
		next = r->next;
		/* From now on who writes lists it again. */
		atomic_store(&r->listed, false);
		if (done >= 0 && regions && store_ticks() - atomic_load(&r->stamp) >= age) {
			done = seal_region(st, r, buf);
			sealed += done > 0 ? done : 0;
			regions--;
		}
		if (has_fresh(r))
			region_list(s, r);
	}
	pthread_mutex_unlock(&s->sealing);
	free(buf);
	return done < 0 ? done : sealed;
}

bool store_is_sealed(const struct store *st)
{
	return !st->sums || !atomic_load(&st->sums->listed);
}

/* ---- after a crash ---- */

static int renew_part(struct store *st, uint64_t length, uint64_t offset)
{
	struct region *r = sums_region(st->sums, offset / REGION_BYTES);
	unsigned bit = (unsigned)(offset % REGION_BYTES >> SUM_SHIFT);
	unsigned last = (unsigned)((offset % REGION_BYTES + length + SUM_BLOCK - 1) >> SUM_SHIFT);
	int err;

	if (!r)
		return -ENOMEM;
	pthread_rwlock_wrlock(&r->lock);
	err = region_load(st, r);
	for (; bit < last && !err; bit++) {
		if (!bit_at(r->summed, bit))
			region_written(st->sums, r, bit, bit + 1);
		else if (st->sums->trust == SUMS_DOUBT)
			err = region_settle(st, r, bit);
	}
	pthread_rwlock_unlock(&r->lock);
	return err;
}

int store_sums_renew(struct store *st, uint64_t length, uint64_t offset)
{
	int err = 0;

	while (st->sums && length && !err) {
		uint64_t n = smaller(length, REGION_BYTES - offset % REGION_BYTES);

		err = renew_part(st, n, offset);
		offset += n;
		length -= n;
	}
	return err;
}

/* ---- the end of the disk ---- */

int store_sums_before_cut(struct store *st, uint64_t size)
{
	uint64_t block = size / SUM_BLOCK;
	unsigned bit = block % REGION_BLOCKS;
	struct region *r;
	int err;

	if (!st->sums || size % SUM_BLOCK == 0)
		return 0;
	r = sums_region(st->sums, block / REGION_BLOCKS);
	if (!r)
		return -ENOMEM;
	pthread_rwlock_wrlock(&r->lock);
	err = region_load(st, r);
	if (!err && bit_at(r->summed, bit)) {
		err = region_settle(st, r, bit);
		atomic_fetch_add(&r->changes, 1);
		if (!err)
			err = sums_zero(st->sums, block, 1);
		if (!err) {
			bits_clear(r->summed, bit, bit + 1);
			region_written(st->sums, r, bit, bit + 1);
		}
	}
	pthread_rwlock_unlock(&r->lock);
	return err;
}

int store_sums_cut(struct store *st, uint64_t size)
{
	uint64_t blocks = (size + SUM_BLOCK - 1) / SUM_BLOCK;
	off_t end = (off_t)(blocks * sizeof(uint32_t));
	struct region *r;
	struct stat found;

	if (!st->sums)
		return 0;
	for (r = sums_next(st->sums, blocks / REGION_BLOCKS); r;
	     r = sums_next(st->sums, r->number + 1)) {
		uint64_t start = r->number * REGION_BLOCKS;
		unsigned first = blocks > start ? (unsigned)(blocks - start) : 0;

		pthread_rwlock_wrlock(&r->lock);
		atomic_fetch_add(&r->changes, 1);
		bits_clear(r->summed, first, REGION_BLOCKS);
		bits_clear(r->verified, first, REGION_BLOCKS);
		bits_clear(r->fresh, first, REGION_BLOCKS);
		pthread_rwlock_unlock(&r->lock);
	}
	if (fstat(st->sums->fd, &found))
		return -errno;
	if (found.st_size <= end)
		return 0;
	atomic_store(&st->sums->changed, true);
	return ftruncate(st->sums->fd, end) ? -errno : 0;
}

int store_sums_sync(struct store *st)
{
	if (!st->sums || !atomic_exchange(&st->sums->changed, false))
		return 0;
	if (fdatasync(st->sums->fd) == 0)
		return 0;
	atomic_store(&st->sums->changed, true);
	return -errno;
}
