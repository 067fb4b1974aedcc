/* Which stores a segment map names: its segments know them by their places in a table. */
#define _GNU_SOURCE
#include "segmap_walk.h"

#include <errno.h>
#include <stdlib.h>

/* Under the write lock: the store's index, or a negative errno. */
int segs_store_index(struct segmap *map, struct store *st)
{
	struct store **stores;
	unsigned i, empty = map->n_stores;

	for (i = 0; i < map->n_stores; i++) {
		if (map->stores[i] == st)
			return (int)i;
		if (!map->stores[i])
			empty = i;
	}
	if (empty < map->n_stores) {
		map->stores[empty] = store_ref(st);
		return (int)empty;
	}
	if (map->n_stores > UINT16_MAX)
		return -ENOMEM;
	stores = realloc(map->stores, (map->n_stores + 1) * sizeof(*stores));
	if (!stores)
		return -ENOMEM;
	map->stores = stores;
	stores[map->n_stores] = store_ref(st);
	return (int)map->n_stores++;
}

int segmap_store_index(struct segmap *map, struct store *st)
{
	int index;

	pthread_rwlock_wrlock(&map->lock);
	index = segs_store_index(map, st);
	pthread_rwlock_unlock(&map->lock);
	return index;
}

/* Into `fresh`, an empty one: the map's segments, with `to` in the place of `from`. */
static int replace(struct segmap *map, struct segmap *fresh, uint16_t from, uint16_t to)
{
	struct pos p = { 0, 0 };
	int err = 0;

	if (!map->count)
		return 0;
	do {
		struct seg seg = *at(map, p);
		size_t before = fresh->count;

		if (seg.kind == SEG_STORE && seg.store == from) {
			seg.store = to;
			if (seg.offset + (seg_end(map, p) - seg.start) > map->stores[to]->size)
				return -EINVAL;
		}
		err = segs_append(fresh, seg);
		if (!err && fresh->count > before)
			seg_hold(&seg);
	} while (!err && step(map, &p));
	return err;
}

int segmap_replace_store(struct segmap *map, struct store *from, struct store *to)
{
	struct segmap *fresh = segmap_new(0);
	int old, index, err = 0;

	if (!fresh)
		return -ENOMEM;
	pthread_rwlock_rdlock(&map->write_lock);   /* the target stays what it is */
	pthread_rwlock_wrlock(&map->lock);
	for (old = 0; old < (int)map->n_stores && map->stores[old] != from;)
		old++;
	if (from == to || atomic_load(&map->target) == from) {
		err = -EINVAL;
	} else if (old < (int)map->n_stores) {
		index = segs_store_index(map, to);
		err = index < 0 ? index : replace(map, fresh, (uint16_t)old, (uint16_t)index);
		if (!err) {
			segs_swap(map, fresh);
			map->stores[old] = NULL;
			store_unref(from);   /* who calls this holds it */
		}
	}
	pthread_rwlock_unlock(&map->lock);
	pthread_rwlock_unlock(&map->write_lock);
	segmap_unref(fresh);
	return err;
}
