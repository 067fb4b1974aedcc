#include "segmap_walk.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static int chunks_reserve(struct segmap *map, size_t n)
{
	size_t cap = map->cap_chunks ? map->cap_chunks : 4;
	struct chunk **chunks;
	uint64_t *firsts;

	if (n <= map->cap_chunks)
		return 0;
	while (cap < n)
		cap *= 2;
	chunks = realloc(map->chunks, cap * sizeof(*chunks));
	if (!chunks)
		return -ENOMEM;
	map->chunks = chunks;
	firsts = realloc(map->firsts, cap * sizeof(*firsts));
	if (!firsts)
		return -ENOMEM;
	map->firsts = firsts;
	map->cap_chunks = cap;
	return 0;
}

int chunk_insert(struct segmap *map, size_t c, struct chunk *ch, uint64_t first)
{
	int err = chunks_reserve(map, map->n_chunks + 1);

	if (err)
		return err;
	memmove(map->chunks + c + 1, map->chunks + c, (map->n_chunks - c) * sizeof(*map->chunks));
	memmove(map->firsts + c + 1, map->firsts + c, (map->n_chunks - c) * sizeof(*map->firsts));
	map->chunks[c] = ch;
	map->firsts[c] = first;
	map->n_chunks++;
	return 0;
}

struct chunk *chunk_new(unsigned cap)
{
	struct chunk *ch = malloc(sizeof(*ch) + cap * sizeof(struct seg));

	if (ch) {
		ch->n = 0;
		ch->cap = cap;
	}
	return ch;
}

static int chunk_grow(struct segmap *map, size_t c)
{
	struct chunk *ch = map->chunks[c];
	unsigned cap = ch->cap * 4 < CHUNK_SEGS ? ch->cap * 4 : CHUNK_SEGS;

	ch = realloc(ch, sizeof(*ch) + cap * sizeof(struct seg));
	if (!ch)
		return -ENOMEM;
	ch->cap = cap;
	map->chunks[c] = ch;
	return 0;
}

/* The first `keep` segments stay. */
static int chunk_cut(struct segmap *map, size_t c, unsigned keep)
{
	struct chunk *low = map->chunks[c], *high = chunk_new(CHUNK_SEGS);
	int err;

	if (!high)
		return -ENOMEM;
	high->n = low->n - keep;
	memcpy(high->segs, low->segs + keep, high->n * sizeof(struct seg));
	err = chunk_insert(map, c + 1, high, high->segs[0].start);
	if (err)
		free(high);
	else
		low->n = keep;
	return err;
}

void chunk_remove(struct segmap *map, size_t c, size_t n)
{
	size_t i, rest = map->n_chunks - c - n;

	if (n == 0)
		return;
	for (i = c; i < c + n; i++)
		free(map->chunks[i]);
	memmove(map->chunks + c, map->chunks + c + n, rest * sizeof(*map->chunks));
	memmove(map->firsts + c, map->firsts + c + n, rest * sizeof(*map->firsts));
	map->n_chunks -= n;
}

int chunk_make_room(struct segmap *map, size_t c, unsigned keep)
{
	return map->chunks[c]->cap < CHUNK_SEGS ? chunk_grow(map, c) : chunk_cut(map, c, keep);
}
