/* Watched ranges of a store. */
#define _GNU_SOURCE
#include "event.h"
#include "store.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

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

/* The table, made at the first call; NULL without memory. */
static struct watch *watches(struct store *st)
{
	struct watch *mine, *none = NULL;
	unsigned i;

	if (atomic_load(&st->watches))
		return atomic_load(&st->watches);
	mine = calloc(MAX_WATCHES, sizeof(*mine));
	for (i = 0; mine && i < MAX_WATCHES; i++)
		atomic_init(&mine[i].start, NO_WATCH);
	if (mine && !atomic_compare_exchange_strong(&st->watches, &none, mine)) {
		free(mine);   /* another thread was first */
		mine = none;
	}
	return mine;
}

int store_watch(struct store *st, unsigned slot, uint64_t start, uint64_t end)
{
	struct watch *w = watches(st);

	if (!w)
		return -ENOMEM;
	w += slot;
	/* A reader between these two stores sees an empty range. */
	atomic_store(&w->start, NO_WATCH);
	atomic_store(&w->end, end);
	atomic_store(&w->start, start);
	if (start == NO_WATCH)
		atomic_fetch_and(&st->watching, ~(1u << slot));
	else
		atomic_fetch_or(&st->watching, 1u << slot);
	return 0;
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
		struct watch *w = atomic_load(&st->watches) + slot;
		uint_fast64_t at = atomic_load(&w->start);

		if (at >= end || offset >= atomic_load(&w->end))
			continue;
		if (!atomic_compare_exchange_strong(&w->start, &at, NO_WATCH))
			continue;   /* another reader was first */
		atomic_fetch_or(&st->seen, 1u << slot);
		event_signal(atomic_load(&st->watch_fd));
	}
}
