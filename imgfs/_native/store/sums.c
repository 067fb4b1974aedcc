/* The file of sums, and what is known of its regions. */
#define _GNU_SOURCE
#include "sums.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "crc32c.h"

/* ---- regions ---- */

#define FAN_BITS 14
#define FAN (1u << FAN_BITS)
#define LEVELS 3   /* 2^42 regions of 2^22 bytes */

typedef _Atomic(void *) slot;

static unsigned index_at(uint64_t number, unsigned level)
{
	return number >> (FAN_BITS * (LEVELS - 1 - level)) & (FAN - 1);
}

static struct region *region_new(uint64_t number)
{
	struct region *r = calloc(1, sizeof(*r));
	pthread_rwlockattr_t attr;

	if (!r)
		return NULL;
	/* Who needs it alone does so rarely, and must not wait for ever behind others' writes. */
	pthread_rwlockattr_init(&attr);
	pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&r->lock, &attr);
	pthread_rwlockattr_destroy(&attr);
	r->number = number;
	return r;
}

static void region_free(struct region *r)
{
	pthread_rwlock_destroy(&r->lock);
	free(r);
}

/* Put it there, unless another thread was first; what is there then. */
static void *settled(slot *at, void *fresh, bool *mine)
{
	void *none = NULL;

	*mine = atomic_compare_exchange_strong(at, &none, fresh);
	return *mine ? fresh : none;
}

static void *table_at(slot *at)
{
	void *found = atomic_load(at), *fresh;
	bool mine;

	if (found)
		return found;
	fresh = table_new(FAN * sizeof(slot));
	if (!fresh)
		return NULL;
	found = settled(at, fresh, &mine);
	if (!mine)
		munmap(fresh, FAN * sizeof(slot));
	return found;
}

struct region *sums_find(struct sums *s, uint64_t number)
{
	void *at = atomic_load(&s->top);
	unsigned level;

	for (level = 0; at && level < LEVELS; level++)
		at = atomic_load((slot *)at + index_at(number, level));
	return at;
}

struct region *sums_region(struct sums *s, uint64_t number)
{
	struct region *r = sums_find(s, number);
	slot *at = &s->top;
	unsigned level;
	bool mine;

	if (r)
		return r;
	for (level = 0; level < LEVELS; level++) {
		slot *table = table_at(at);

		if (!table)
			return NULL;
		at = table + index_at(number, level);
	}
	r = region_new(number);
	if (!r)
		return NULL;
	if (settled(at, r, &mine) != r) {
		region_free(r);
		r = atomic_load(at);
	}
	return r;
}

static struct region *next_in(slot *table, uint64_t number, unsigned level)
{
	unsigned i;

	for (i = index_at(number, level); i < FAN; i++) {
		void *at = atomic_load(&table[i]);

		if (at && level < LEVELS - 1)
			at = next_in(at, number, level + 1);
		if (at)
			return at;
		number = 0;   /* of what lies behind, the first one */
	}
	return NULL;
}

struct region *sums_next(struct sums *s, uint64_t number)
{
	slot *top = atomic_load(&s->top);

	return top && number >> (FAN_BITS * LEVELS) == 0 ? next_in(top, number, 0) : NULL;
}

static void free_table(slot *table, unsigned level)
{
	unsigned i;

	for (i = 0; i < FAN; i++) {
		void *at = atomic_load(&table[i]);

		if (at && level < LEVELS - 1)
			free_table(at, level + 1);
		else if (at)
			region_free(at);
	}
	munmap((void *)table, FAN * sizeof(slot));
}

/* ---- bits ---- */

static uint64_t mask_in(unsigned word, unsigned first, unsigned last)
{
	uint64_t mask = UINT64_MAX;

	if (first > word * 64)
		mask &= UINT64_MAX << (first % 64);
	if (last < (word + 1) * 64)
		mask &= ~(UINT64_MAX << (last % 64));
	return mask;
}

bool bits_all(_Atomic uint64_t *words, unsigned first, unsigned last)
{
	unsigned word;

	for (word = first / 64; word * 64 < last; word++) {
		uint64_t mask = mask_in(word, first, last);

		if ((atomic_load(&words[word]) & mask) != mask)
			return false;
	}
	return true;
}

bool bits_any(_Atomic uint64_t *words, unsigned first, unsigned last)
{
	unsigned word;

	for (word = first / 64; word * 64 < last; word++)
		if (atomic_load(&words[word]) & mask_in(word, first, last))
			return true;
	return false;
}

void bits_set(_Atomic uint64_t *words, unsigned first, unsigned last)
{
	unsigned word;

	for (word = first / 64; word * 64 < last; word++) {
		uint64_t mask = mask_in(word, first, last);

		if ((atomic_load(&words[word]) & mask) != mask)
			atomic_fetch_or(&words[word], mask);
	}
}

void bits_clear(_Atomic uint64_t *words, unsigned first, unsigned last)
{
	unsigned word;

	for (word = first / 64; word * 64 < last; word++) {
		uint64_t mask = mask_in(word, first, last);

		if (atomic_load(&words[word]) & mask)
			atomic_fetch_and(&words[word], ~mask);
	}
}

/* ---- sums ---- */

static uint32_t seed(const struct sums *s, uint64_t block)
{
	uint64_t place[2] = { htole64(s->key), htole64(block) };

	return crc32c(0, place, sizeof(place));
}

/* 0 says that there is none. */
static uint32_t never_zero(uint32_t sum)
{
	return sum ? sum : 1;
}

void sums_compute(const struct sums *s, uint64_t block, size_t n, const char *bytes, size_t length,
		  uint32_t *to)
{
	size_t whole = length / SUM_BLOCK, i = 0, j;

	for (; i + 3 <= n && i + 3 <= whole; i += 3) {
		const char *at = bytes + i * SUM_BLOCK;
		const void *three[3] = { at, at + SUM_BLOCK, at + 2 * SUM_BLOCK };

		for (j = 0; j < 3; j++)
			to[i + j] = seed(s, block + i + j);
		crc32c_three(&to[i], three, SUM_BLOCK);
		for (j = 0; j < 3; j++)
			to[i + j] = never_zero(to[i + j]);
	}
	for (; i < n; i++) {
		char padded[SUM_BLOCK] = { 0 };
		const char *at = bytes + i * SUM_BLOCK;

		if (i >= whole) {
			if (length > i * SUM_BLOCK)
				memcpy(padded, at, length - i * SUM_BLOCK);
			at = padded;
		}
		to[i] = never_zero(crc32c(seed(s, block + i), at, SUM_BLOCK));
	}
}

/* As much as there is; *done. */
static int read_upto(int fd, char *to, size_t length, uint64_t offset, bool nowait, size_t *done)
{
	*done = 0;
	while (*done < length) {
		struct iovec iov = { to + *done, length - *done };
		off_t at = (off_t)(offset + *done);
		ssize_t n = nowait ? preadv2(fd, &iov, 1, at, RWF_NOWAIT) :
				     pread(fd, iov.iov_base, iov.iov_len, at);

		if (n < 0 && errno == EINTR)
			continue;
		/* EPERM: a sandbox knows no preadv2(2). */
		if (n < 0 && nowait && (errno == EOPNOTSUPP || errno == ENOSYS || errno == EPERM))
			return -EAGAIN;
		if (n < 0)
			return -errno;
		if (n == 0)
			return 0;
		*done += (size_t)n;
	}
	return 0;
}

int sums_read(struct sums *s, uint64_t block, size_t n, uint32_t *to, bool nowait)
{
	size_t bytes = n * sizeof(*to), done, i;
	int err = read_upto(s->fd, (char *)to, bytes, block * sizeof(*to), nowait, &done);

	if (err)
		return err;
	memset((char *)to + done, 0, bytes - done);
	for (i = 0; i < n; i++)
		to[i] = le32toh(to[i]);
	return 0;
}

static int write_file(struct sums *s, const void *bytes, size_t n, uint64_t offset)
{
	atomic_store(&s->changed, true);
	return fd_write(s->fd, bytes, n, offset);
}

int sums_write(struct sums *s, uint64_t block, size_t n, const uint32_t *from)
{
	uint32_t little[REGION_BLOCKS];
	size_t i;

	for (i = 0; i < n; i++)
		little[i] = htole32(from[i]);
	return write_file(s, little, n * sizeof(*little), block * sizeof(*little));
}

int sums_zero(struct sums *s, uint64_t block, size_t n)
{
	static const uint32_t zeroes[REGION_BLOCKS];

	return write_file(s, zeroes, n * sizeof(*zeroes), block * sizeof(*zeroes));
}

int sums_content(struct store *st, uint64_t block, char *to, size_t length, bool nowait)
{
	uint64_t offset = block * SUM_BLOCK, size = st->size;
	size_t inside = offset >= size ? 0 : size - offset < length ? size - offset : length, done;
	int err = read_upto(st->fd, to, inside, offset, nowait, &done);

	if (!err)
		memset(to + done, 0, length - done);
	return err;
}

/* ---- what a store has of all this ---- */

int store_sums_attach(struct store *st, const struct sums_given *given)
{
	struct sums *s;

	if (!st->whole || st->sums)
		return -EINVAL;
	s = calloc(1, sizeof(*s));
	if (!s)
		return -ENOMEM;
	s->fd = fcntl(given->fd, F_DUPFD_CLOEXEC, 3);
	s->name = strdup(given->name);
	s->closed = strdup(given->closed);
	s->key = given->key;
	atomic_init(&s->trust, given->trust);
	atomic_init(&s->writable, given->writable);
	pthread_mutex_init(&s->sealing, NULL);
	if (s->fd < 0 || !s->name || !s->closed) {
		int err = s->fd < 0 ? -EMFILE : -ENOMEM;

		sums_free(s);
		return err;
	}
	st->sums = s;
	return 0;
}

void store_sums_expect(struct store *st, void (*expects)(void *, uint64_t, uint64_t *), void *of)
{
	if (st->sums) {
		st->sums->expects = expects;
		st->sums->of = of;
	}
}

void store_sums_done(struct store *st)
{
	if (!st->sums)
		return;
	atomic_store(&st->sums->trust, SUMS_STRICT);
	atomic_store(&st->sums->writable, false);
}

uint64_t store_sums_accepted(struct store *st)
{
	return st->sums ? atomic_load(&st->sums->accepted) : 0;
}

void sums_free(struct sums *s)
{
	if (s->top)
		free_table(s->top, 0);
	if (s->fd >= 0)
		close(s->fd);
	pthread_mutex_destroy(&s->sealing);
	free(s->name);
	free(s->closed);
	free(s);
}
