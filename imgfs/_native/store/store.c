#define _GNU_SOURCE
#include "store.h"
#include "sums.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define WORD_BITS 64

/* Untouched pages of these tables cost nothing, so a store for a 64 TiB disk starts small. */
void *table_new(size_t bytes)
{
	void *mem = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return mem == MAP_FAILED ? NULL : mem;
}

static size_t bits_bytes(const struct store *st)
{
	return (st->blocks / WORD_BITS + 1) * sizeof(uint64_t);
}

static size_t stamps_bytes(const struct store *st)
{
	return (st->blocks + 1) * sizeof(uint32_t);
}

uint32_t store_ticks(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC_COARSE, &ts);
	return (uint32_t)(((uint64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000) >> 4);
}

static void set_size(struct store *st, uint64_t size)
{
	uint64_t rest = size & ((UINT64_C(1) << st->block_shift) - 1);

	atomic_store(&st->size, size);
	atomic_store(&st->blocks, (size >> st->block_shift) + (rest != 0));
}

int store_resize(struct store *st, uint64_t size)
{
	if (!st->whole || size > INT64_MAX)
		return -EINVAL;
	set_size(st, size);
	return 0;
}

struct store *store_new(int fd, uint64_t size, uint64_t block_size, bool whole)
{
	struct store *st;

	if (block_size < 512 || (block_size & (block_size - 1))) {
		errno = EINVAL;
		return NULL;
	}
	st = calloc(1, sizeof(*st));
	if (!st)
		return NULL;
	st->fd = fd < 0 && !whole ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 3);
	if (st->fd < 0 && (fd >= 0 || whole)) {
		free(st);
		return NULL;
	}
	st->whole = whole;
	st->block_shift = (unsigned)__builtin_ctzll(block_size);
	set_size(st, size);
	atomic_init(&st->refs, 1);
	pthread_mutex_init(&st->quiesce_lock, NULL);
	pthread_rwlock_init(&st->held_lock, NULL);
	atomic_init(&st->watch_fd, -1);
	if (!whole) {
		st->bits = table_new(bits_bytes(st));
		st->coming = table_new(bits_bytes(st));
		st->stamps = table_new(stamps_bytes(st));
		if (!st->bits || !st->coming || !st->stamps) {
			store_unref(st);
			errno = ENOMEM;
			return NULL;
		}
	}
	return st;
}

int store_attach(struct store *st, int fd)
{
	int mine;

	if (st->whole ? !atomic_load(&st->is_away) : atomic_load(&st->present) != 0)
		return -EINVAL;
	mine = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	if (mine < 0)
		return -errno;
	if (st->fd >= 0)
		close(st->fd);
	st->fd = mine;
	atomic_store(&st->is_away, false);
	return 0;
}

bool store_detach(struct store *st)
{
	if (st->fd < 0)
		return true;
	if (!st->whole && atomic_load(&st->present))
		return false;
	/* Whoever enters from now on sees that it is away, or has no blocks; who entered before is counted. */
	atomic_store(&st->is_away, st->whole);
	if (atomic_load(&st->readers[0]) || atomic_load(&st->readers[1])) {
		atomic_store(&st->is_away, false);
		return false;
	}
	close(st->fd);
	st->fd = -1;
	return true;
}

struct store *store_ref(struct store *st)
{
	atomic_fetch_add(&st->refs, 1);
	return st;
}

void store_unref(struct store *st)
{
	if (atomic_fetch_sub(&st->refs, 1) != 1)
		return;
	if (st->bits)
		munmap((void *)st->bits, bits_bytes(st));
	if (st->coming)
		munmap((void *)st->coming, bits_bytes(st));
	if (st->stamps)
		munmap((void *)st->stamps, stamps_bytes(st));
	if (st->watch_fd >= 0)
		close(st->watch_fd);
	if (st->sums)
		sums_free(st->sums);
	if (st->fd >= 0)
		close(st->fd);
	free(st->held);
	free(st->watches);
	pthread_mutex_destroy(&st->quiesce_lock);
	pthread_rwlock_destroy(&st->held_lock);
	free(st);
}

unsigned store_enter(struct store *st)
{
	for (;;) {
		unsigned epoch = atomic_load(&st->epoch) & 1;

		atomic_fetch_add(&st->readers[epoch], 1);
		/* Between the load and the add quiesce may have flipped the epoch
		 * and already found this counter at zero. */
		if ((atomic_load(&st->epoch) & 1) == epoch)
			return epoch;
		atomic_fetch_sub(&st->readers[epoch], 1);
	}
}

void store_leave(struct store *st, unsigned token)
{
	atomic_fetch_sub(&st->readers[token], 1);
}

void store_quiesce(struct store *st)
{
	struct timespec pause = { 0, 20000 };
	unsigned old;

	pthread_mutex_lock(&st->quiesce_lock);
	old = atomic_fetch_add(&st->epoch, 1) & 1;
	while (atomic_load(&st->readers[old]) != 0) {
		nanosleep(&pause, NULL);
		if (pause.tv_nsec < 1000000)
			pause.tv_nsec *= 2;
	}
	pthread_mutex_unlock(&st->quiesce_lock);
}

bool store_block_present(const struct store *st, uint64_t block)
{
	if (st->whole)
		return true;
	return atomic_load(&st->bits[block / WORD_BITS]) >> (block % WORD_BITS) & 1;
}

bool store_is_here(struct store *st, uint64_t block, uint64_t offset, uint64_t end)
{
	uint64_t from = block << st->block_shift, to = (block + 1) << st->block_shift;

	return store_block_present(st, block) ||
	       store_held_covers(st, from > offset ? from : offset, to < end ? to : end);
}

bool store_covers(struct store *st, uint64_t offset, uint64_t length)
{
	uint64_t first, last, block;
	uint32_t now;

	if (offset > st->size || length > st->size - offset)
		return false;
	if (st->whole)
		return !atomic_load(&st->is_away);
	if (length == 0)
		return true;
	first = offset >> st->block_shift;
	last = (offset + length - 1) >> st->block_shift;
	for (block = first; block <= last; block++)
		if (!store_is_here(st, block, offset, offset + length))
			return false;
	now = store_ticks();
	for (block = first; block <= last; block++)
		atomic_store_explicit(&st->stamps[block], now, memory_order_relaxed);
	return true;
}

uint64_t store_set(struct store *st, uint64_t first, uint64_t count)
{
	uint64_t changed = 0, block;
	uint32_t now = store_ticks();

	for (block = first; block < first + count; block++) {
		uint64_t mask = UINT64_C(1) << (block % WORD_BITS);

		atomic_store_explicit(&st->stamps[block], now, memory_order_relaxed);
		if (!(atomic_fetch_or(&st->bits[block / WORD_BITS], mask) & mask))
			changed++;
	}
	atomic_fetch_add(&st->present, changed);
	return changed;
}

uint64_t store_clear(struct store *st, uint64_t first, uint64_t count)
{
	uint64_t changed = 0, block;

	for (block = first; block < first + count; block++) {
		uint64_t mask = UINT64_C(1) << (block % WORD_BITS);

		if (atomic_fetch_and(&st->bits[block / WORD_BITS], ~mask) & mask)
			changed++;
	}
	atomic_fetch_sub(&st->present, changed);
	return changed;
}

void (*store_settled_hook)(void);

void store_set_coming(struct store *st, uint64_t first, uint64_t count)
{
	uint64_t block;

	for (block = first; block < first + count; block++)
		atomic_fetch_or(&st->coming[block / WORD_BITS], UINT64_C(1) << (block % WORD_BITS));
}

void store_settle(struct store *st, uint64_t first, uint64_t count)
{
	uint64_t block;

	for (block = first; block < first + count; block++)
		atomic_fetch_and(&st->coming[block / WORD_BITS],
				 ~(UINT64_C(1) << (block % WORD_BITS)));
	if (store_settled_hook)
		store_settled_hook();
}

bool store_is_coming(struct store *st, uint64_t offset, uint64_t length)
{
	uint64_t block, last = (offset + length - 1) >> st->block_shift;

	if (st->whole)
		return false;
	for (block = offset >> st->block_shift; block <= last; block++)
		if (!store_is_here(st, block, offset, offset + length) &&
		    !(atomic_load(&st->coming[block / WORD_BITS]) >> (block % WORD_BITS) & 1))
			return false;
	return true;
}

struct aged {
	uint32_t stamp;
	uint64_t block;
};

static int by_stamp(const void *a, const void *b)
{
	const struct aged *x = a, *y = b;

	if (x->stamp != y->stamp)
		return x->stamp < y->stamp ? -1 : 1;
	return x->block < y->block ? -1 : x->block > y->block;
}

static int by_number(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

/* Calls fn for every present block until it says stop. */
static void each_present(struct store *st, bool (*fn)(void *, uint64_t, uint32_t), void *arg)
{
	uint64_t words = st->blocks / WORD_BITS + 1, w;

	for (w = 0; w < words; w++) {
		uint64_t bits = atomic_load_explicit(&st->bits[w], memory_order_relaxed);

		for (; bits; bits &= bits - 1) {
			uint64_t block = w * WORD_BITS + (uint64_t)__builtin_ctzll(bits);

			if (!fn(arg, block, atomic_load_explicit(&st->stamps[block],
								 memory_order_relaxed)))
				return;
		}
	}
}

struct gather {
	struct aged *items;
	size_t n, cap;
};

static bool gather_one(void *arg, uint64_t block, uint32_t stamp)
{
	struct gather *g = arg;

	if (g->n == g->cap)
		return false;   /* blocks that appeared meanwhile are not old */
	g->items[g->n++] = (struct aged){ stamp, block };
	return true;
}

uint64_t *store_oldest(struct store *st, size_t count, size_t *found)
{
	struct gather g = { NULL, 0, atomic_load(&st->present) };
	uint64_t *out = NULL;
	size_t i;

	*found = 0;
	if (st->whole || count == 0 || g.cap == 0)
		return NULL;
	g.items = malloc(g.cap * sizeof(*g.items));
	if (!g.items)
		return NULL;
	each_present(st, gather_one, &g);
	qsort(g.items, g.n, sizeof(*g.items), by_stamp);
	if (count > g.n)
		count = g.n;
	if (count)
		out = malloc(count * sizeof(*out));
	if (out) {
		for (i = 0; i < count; i++)
			out[i] = g.items[i].block;
		qsort(out, count, sizeof(*out), by_number);
		*found = count;
	}
	free(g.items);
	return out;
}

static bool lowest(void *arg, uint64_t block, uint32_t stamp)
{
	int64_t *min = arg;

	(void)block;
	if (*min < 0 || stamp < *min)
		*min = stamp;
	return true;
}

int64_t store_oldest_age(struct store *st)
{
	int64_t min = -1;

	if (st->whole)
		return -1;
	each_present(st, lowest, &min);
	return min < 0 ? -1 : (int64_t)store_ticks() - min;
}

int store_pread(struct store *st, void *buf, uint64_t length, uint64_t offset, bool nowait)
{
	return st->sums ? sums_pread(st, buf, length, offset, nowait) :
			  store_pread_file(st, buf, length, offset, nowait);
}

int store_pread_file(struct store *st, void *buf, uint64_t length, uint64_t offset, bool nowait)
{
	char *to = buf;

	while (length) {
		struct iovec iov = { to, length };
		ssize_t n = nowait ? preadv2(st->fd, &iov, 1, (off_t)offset, RWF_NOWAIT) :
				     pread(st->fd, to, length, (off_t)offset);

		if (n < 0) {
			if (errno == EINTR)
				continue;
			/* EPERM: a sandbox knows no preadv2(2). */
			if (nowait && (errno == EOPNOTSUPP || errno == ENOSYS || errno == EPERM))
				return -EAGAIN;
			return -errno;
		}
		if (n == 0)
			return -EIO;   /* shorter than it was: never zeroes */
		atomic_fetch_add_explicit(&st->bytes_served, (uint64_t)n, memory_order_relaxed);
		to += n;
		offset += (uint64_t)n;
		length -= (uint64_t)n;
	}
	return 0;
}

int store_splice(struct store *st, int pipe, uint64_t length, uint64_t offset)
{
	/* Nobody can look at what is in a pipe. */
	if (st->sums && !sums_verified(st, offset, length))
		return -EAGAIN;
	while (length) {
		loff_t at = (loff_t)offset;
		ssize_t n = splice(st->fd, &at, pipe, NULL, length, SPLICE_F_NONBLOCK);

		if (n < 0) {
			if (errno == EINTR)
				continue;
			return -errno;
		}
		if (n == 0)
			return -EIO;   /* shorter than it was: never zeroes */
		atomic_fetch_add_explicit(&st->bytes_served, (uint64_t)n, memory_order_relaxed);
		offset += (uint64_t)n;
		length -= (uint64_t)n;
	}
	return 0;
}

bool all_zero(const void *buf, size_t length)
{
	const char *bytes = buf;
	const size_t head = length < 16 ? length : 16;
	size_t i;

	for (i = 0; i < head; i++)
		if (bytes[i])
			return false;
	/* Each byte equals the one 16 before it, so all equal the head's. */
	return memcmp(bytes, bytes + head, length - head) == 0;
}
