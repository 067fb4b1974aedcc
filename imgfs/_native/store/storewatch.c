/* Watched ranges of a store. */
#define _GNU_SOURCE
#include "event.h"
#include "store.h"

int store_watch_fd(struct store *st)
{
	int fd = atomic_load(&st->watch_fd), none = -1;

	if (fd >= 0)
		return fd;
	fd = event_new();
	if (fd < 0)
		return fd;
	if (atomic_compare_exchange_strong(&st->watch_fd, &none, fd))
		return fd;
	close(fd);   /* another thread was first */
	return none;
}

void store_watch(struct store *st, unsigned slot, uint64_t start, uint64_t end)
{
	struct watch *w = &st->watches[slot];

	/* A reader between these two stores sees an empty range. */
	atomic_store(&w->start, NO_WATCH);
	atomic_store(&w->end, end);
	atomic_store(&w->start, start);
	if (start == NO_WATCH)
		atomic_fetch_and(&st->watching, ~(1u << slot));
	else
		atomic_fetch_or(&st->watching, 1u << slot);
}

unsigned store_take_seen(struct store *st)
{
	int fd = atomic_load(&st->watch_fd);

	/* Drained first: who sets a bit after the exchange writes to it again. */
	if (fd >= 0)
		event_clear(fd);
	return atomic_exchange(&st->seen, 0);
}

void store_tell(struct store *st, uint64_t offset, uint64_t length)
{
	const uint64_t end = offset + length;
	unsigned bits = atomic_load_explicit(&st->watching, memory_order_relaxed);

	for (; bits; bits &= bits - 1) {
		unsigned slot = (unsigned)__builtin_ctz(bits);
		struct watch *w = &st->watches[slot];
		uint_fast64_t at = atomic_load(&w->start);

		if (at >= end || offset >= atomic_load(&w->end))
			continue;
		if (!atomic_compare_exchange_strong(&w->start, &at, NO_WATCH))
			continue;   /* another reader was first */
		atomic_fetch_or(&st->seen, 1u << slot);
		event_signal(atomic_load(&st->watch_fd));
	}
}
