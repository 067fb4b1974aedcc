/* Ranges of a store whose bytes are in memory, and in no file.
 *
 * A reader may find a range here when it asks what there is, and not find it any more when it
 * comes for the bytes: then it has to ask again (store_read_here says -ENODATA).  The bytes are copied,
 * or are in a pipe, under the lock, so nobody has them any more once store_unhold has returned.
 */
#define _GNU_SOURCE
#include "store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

static struct held *find(struct store *st, uint64_t offset)
{
	unsigned i, n = atomic_load(&st->n_held);

	for (i = 0; i < n; i++)
		if (st->held[i].start <= offset && offset < st->held[i].end)
			return &st->held[i];
	return NULL;
}

/* Several may begin at one place: a block of which only the first part was data may be held up to there, and later
 * be held with what follows. */
static bool is_range(const struct held *held, uint64_t start, uint64_t end)
{
	return held->start == start && held->end == end;
}

bool store_hold(struct store *st, uint64_t start, const void *bytes, uint64_t length, void *owner)
{
	unsigned n;

	pthread_rwlock_wrlock(&st->held_lock);
	if (!st->held)
		st->held = malloc(MAX_HELD * sizeof(*st->held));
	n = st->held ? atomic_load(&st->n_held) : MAX_HELD;
	if (n < MAX_HELD) {
		st->held[n] = (struct held){ start, start + length, bytes, owner, 0 };
		atomic_store(&st->n_held, n + 1);
	}
	pthread_rwlock_unlock(&st->held_lock);
	return n < MAX_HELD;
}

void *store_unhold(struct store *st, uint64_t start, uint64_t end)
{
	void *owner = NULL;
	unsigned i, n;

	pthread_rwlock_wrlock(&st->held_lock);
	n = atomic_load(&st->n_held);
	for (i = 0; i < n && !owner; i++) {
		if (start != ANY_HELD && !is_range(&st->held[i], start, end))
			continue;
		owner = st->held[i].owner;
		st->held[i] = st->held[n - 1];
		atomic_store(&st->n_held, n - 1);
	}
	pthread_rwlock_unlock(&st->held_lock);
	return owner;
}

bool store_held_covers(struct store *st, uint64_t offset, uint64_t end)
{
	const struct held *held;

	if (atomic_load(&st->n_held) == 0)
		return false;
	pthread_rwlock_rdlock(&st->held_lock);
	while (offset < end && (held = find(st, offset)))
		offset = held->end;
	pthread_rwlock_unlock(&st->held_lock);
	return offset >= end;
}

uint64_t store_held_left(struct store *st, uint64_t start, uint64_t end)
{
	uint64_t left = 0, served;
	unsigned i, n;

	pthread_rwlock_rdlock(&st->held_lock);
	n = atomic_load(&st->n_held);
	for (i = 0; i < n; i++) {
		if (!is_range(&st->held[i], start, end))
			continue;
		served = st->held[i].served;
		left = served < end - start ? end - start - served : 0;
		break;
	}
	pthread_rwlock_unlock(&st->held_lock);
	return left;
}

/* Copy what is held from `offset` on; how many bytes that were. */
static uint64_t copy(struct store *st, char *to, uint64_t length, uint64_t offset)
{
	struct held *held;

	if (atomic_load(&st->n_held) == 0)
		return 0;
	pthread_rwlock_rdlock(&st->held_lock);
	held = find(st, offset);
	if (held) {
		if (length > held->end - offset)
			length = held->end - offset;
		memcpy(to, held->bytes + (offset - held->start), length);
		atomic_fetch_add_explicit(&held->served, length, memory_order_relaxed);
		atomic_fetch_add_explicit(&st->bytes_served, length, memory_order_relaxed);
	}
	pthread_rwlock_unlock(&st->held_lock);
	return held ? length : 0;
}

static uint64_t present_length(const struct store *st, uint64_t offset, uint64_t length)
{
	uint64_t at = offset, end = offset + length;

	while (at < end && store_block_present(st, at >> st->block_shift))
		at = ((at >> st->block_shift) + 1) << st->block_shift;
	return (at < end ? at : end) - offset;
}

int store_read_here(struct store *st, void *buf, uint64_t length, uint64_t offset, bool nowait)
{
	char *to = buf;

	if (st->whole)
		return store_pread(st, buf, length, offset, nowait);
	while (length) {
		uint64_t n = copy(st, to, length, offset);
		int err = 0;

		if (!n) {
			n = present_length(st, offset, length);
			err = n ? store_pread(st, to, n, offset, nowait) : -ENODATA;
		}
		if (err)
			return err;
		to += n;
		offset += n;
		length -= n;
	}
	return 0;
}

int splice_memory(const char *from, uint64_t length, int pipe)
{
	while (length) {
		struct iovec iov = { (void *)from, length };
		ssize_t n = vmsplice(pipe, &iov, 1, SPLICE_F_NONBLOCK);

		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		from += n;
		length -= (uint64_t)n;
	}
	return 0;
}

/* Under the lock. */
static int splice_held(struct store *st, int pipe, uint64_t length, uint64_t offset)
{
	while (length) {
		struct held *held = find(st, offset);
		uint64_t n = length;
		int err;

		if (!held)
			return -ENODATA;
		if (n > held->end - offset)
			n = held->end - offset;
		err = splice_memory(held->bytes + (offset - held->start), n, pipe);
		if (err)
			return err;
		atomic_fetch_add_explicit(&held->served, n, memory_order_relaxed);
		atomic_fetch_add_explicit(&st->bytes_served, n, memory_order_relaxed);
		offset += n;
		length -= n;
	}
	return 0;
}

int store_splice_here(struct store *st, int pipe, uint64_t length, uint64_t offset, bool *locked)
{
	int err;

	*locked = false;
	if (st->whole || present_length(st, offset, length) == length)
		return store_splice(st, pipe, length, offset);
	/* No disk is waited for under this lock: some from here and some from there is -ENODATA. */
	pthread_rwlock_rdlock(&st->held_lock);
	err = splice_held(st, pipe, length, offset);
	*locked = !err;
	if (err)
		pthread_rwlock_unlock(&st->held_lock);
	return err;
}

void store_spliced(struct store *st)
{
	pthread_rwlock_unlock(&st->held_lock);
}
