/* The writing part of core_driver.c: writers, who fills in what is known, who takes what is dirty,
 * and who changes the target, all at once.
 *
 * Every writer has blocks of its own, so it knows what each must read as at once after a change.
 * Who takes keeps a log for each layer; at the end the layers' files, read by their logs
 * alone, must say what the writers know.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core.h"
#include "log.h"
#include "segmap.h"
#include "store.h"

#define BLOCKS 1021u
#define TAIL 1000u             /* the last block is shorter */
#define SIZE ((BLOCKS - 1) * SEG_BLOCK + TAIL)
#define WRITERS 4
#define LAYERS 40
#define UNKNOWN 255

struct layer {
	struct store *st;
	struct segmap *dirty, *state;
	struct log *log;
	uint8_t own[BLOCKS];   /* SEG_STORE, SEG_ZERO or UNKNOWN: what is below; by the log's file */
};

struct world {
	struct segmap *map;
	struct store *base;
	struct layer layers[LAYERS];
	unsigned top;                /* of the layers; under top_lock */
	pthread_mutex_t top_lock;
	unsigned char model[SIZE];   /* each block its writer's */
	uint64_t seed, steps;
	atomic_uint writing, changes, copies, filled, taken, lowered, moved, synced;
	atomic_bool stop;
};

struct writer {
	struct world *w;
	unsigned number;
};

static uint64_t block_end(uint64_t block)
{
	return block == BLOCKS - 1 ? SIZE : (block + 1) * SEG_BLOCK;
}

/* written: it must be known what it reads as. */
static void check_block(struct world *w, uint64_t block, bool written, bool data)
{
	uint64_t start = block * SEG_BLOCK, length = block_end(block) - start, found;
	char *bytes = malloc(length);   /* of that size: the sanitizer sees a byte too many */
	int got;

	CHECK(bytes);
	got = segmap_read(w->map, start, length, bytes, SEG_WAIT);
	CHECK(got == 1 || (got == 0 && !written));
	if (got == 1)
		CHECK(memcmp(bytes, w->model + start, length) == 0);
	if (data)
		CHECK(segmap_seek(w->map, (int64_t)start, SEEK_HOLE, &found) == 0 ||
		      found >= start + length);
	free(bytes);
}

static void change_block(struct world *w, uint64_t block, uint64_t *rng)
{
	uint64_t start = block * SEG_BLOCK, end = block_end(block), from = start, to = end;
	unsigned char bytes[SEG_BLOCK];
	bool zero = below(rng, 4) == 0;
	int done;

	if (!zero && below(rng, 2)) {
		from = start + below(rng, end - start);
		to = from + 1 + below(rng, end - from);
	}
	check_block(w, block, false, false);
	memset(bytes, zero ? 0 : 1 + (int)below(rng, 255), sizeof(bytes));
	for (;;) {
		atomic_fetch_add(&w->writing, 1);
		done = zero ? segmap_zero(w->map, from, to) :
			      segmap_write(w->map, from, to - from, bytes);
		atomic_fetch_sub(&w->writing, 1);
		CHECK(done == 0 || done == 1);
		if (done == 1)
			break;
		if (zero || (from == start && to == end) || !atomic_load(&w->map->target)) {
			sched_yield();   /* there was no target */
			continue;
		}
		done = segmap_copy_up(w->map, start, end - start, w->model + start);
		CHECK(done == 0 || done == 1);
		atomic_fetch_add(&w->copies, 1);
	}
	memcpy(w->model + from, bytes, to - from);
	check_block(w, block, true, !zero);
	atomic_fetch_add(&w->changes, 1);
}

/* What the layers from this one down have of a block; NULL: zeroes. */
static struct store *block_store(struct world *w, int layer, uint64_t block)
{
	while (layer >= 0 && w->layers[layer].own[block] == UNKNOWN)
		layer--;
	if (layer < 0)
		return w->base;
	return w->layers[layer].own[block] == SEG_STORE ? w->layers[layer].st : NULL;
}

/* The block is what is below the top. */
static void lower_block(struct world *w, uint64_t block)
{
	uint64_t start = block * SEG_BLOCK, end = block_end(block);
	int done = 0;

	while (!done) {
		struct segmap *lower = segmap_new(SIZE);
		struct store *from;

		CHECK(lower);
		pthread_mutex_lock(&w->top_lock);
		from = block_store(w, (int)w->top - 1, block);
		if (from)
			CHECK(segmap_set_store(lower, start, end, from, start, SEEK_IS_DATA) == 0);
		else
			CHECK(segmap_set(lower, start, end, SEG_ZERO, SEEK_IS_HOLE) == 0);
		done = segmap_below(w->map, start, end, lower);
		CHECK(done == 0 || done == 1);
		if (done && from)
			CHECK(store_pread(from, w->model + start, end - start, start, false) == 0);
		if (done && !from)
			memset(w->model + start, 0, end - start);
		pthread_mutex_unlock(&w->top_lock);
		segmap_unref(lower);
		if (!done)
			sched_yield();
	}
	check_block(w, block, true, false);
	atomic_fetch_add(&w->lowered, 1);
}

/* From another block of the same writer's; both are whole. */
static void move_block(struct world *w, uint64_t block, uint64_t from)
{
	uint64_t start = block * SEG_BLOCK, moved = 0;
	int done;

	if (block == from || block == BLOCKS - 1 || from == BLOCKS - 1)
		return;
	do {
		done = segmap_move(w->map, start, w->map, from * SEG_BLOCK, SEG_BLOCK, &moved);
		CHECK(done == 0 || (done == 1 && (moved == 0 || moved == SEG_BLOCK)));
		if (!done)
			sched_yield();   /* there was no target */
	} while (!done);
	if (!moved)
		return;
	memcpy(w->model + start, w->model + from * SEG_BLOCK, SEG_BLOCK);
	check_block(w, block, true, true);
	atomic_fetch_add(&w->moved, 1);
}

static void *writer(void *arg)
{
	struct writer *me = arg;
	struct world *w = me->w;
	uint64_t rng = w->seed * 31 + me->number, step;

	for (step = 0; step < w->steps; step++) {
		uint64_t blocks = (BLOCKS + WRITERS - 1 - me->number) / WRITERS;
		uint64_t block = below(&rng, blocks) * WRITERS + me->number;
		uint64_t what = below(&rng, 8);

		if (what == 0)
			lower_block(w, block);
		else if (what == 1)
			move_block(w, block, below(&rng, blocks) * WRITERS + me->number);
		else
			change_block(w, block, &rng);
		if (step % 64 == 0)
			sched_yield();
	}
	return NULL;
}

/* Forgets nothing, and knows only the base: what was written must never be covered by it. */
static void *filler(void *arg)
{
	struct world *w = arg;
	uint64_t rng = w->seed + 77;

	while (!atomic_load(&w->stop)) {
		uint64_t start = below(&rng, SIZE), end = start + 1 + below(&rng, 9000);

		CHECK(segmap_fill_store(w->map, start, end, w->base, start, SEEK_IS_DATA) == 0);
		atomic_fetch_add(&w->filled, 1);
		sched_yield();
	}
	return NULL;
}

/* What Python does: in the log first, then in the file. */
static void take_into_log(struct world *w, struct layer *layer, bool fail)
{
	struct ranges found;
	uint8_t *kinds;
	size_t i;

	log_hold(layer->log);
	CHECK(segmap_take(layer->dirty, &found) == 0);
	kinds = malloc(found.n + 1);
	CHECK(kinds);
	for (i = 0; i < found.n; i++) {
		CHECK(found.starts[i] % SEG_BLOCK == 0 && found.starts[i] < found.ends[i]);
		CHECK(found.ends[i] % SEG_BLOCK == 0 || found.ends[i] == SIZE);
		kinds[i] = found.kinds[i];
		if (!fail && kinds[i] == SEG_BELOW)
			found.kinds[i] = SEG_ASK;
	}
	if (fail)
		CHECK(segmap_fill_ranges(layer->dirty, &found, layer->st) == 0);
	else
		CHECK(log_append(layer->log, SIZE, &found) == 0);
	segmap_settle(layer->dirty);
	for (i = 0; i < found.n && !fail; i++)
		if (kinds[i] == SEG_BELOW)
			CHECK(segmap_reclaim(w->map, found.starts[i], found.ends[i], layer->st,
					     layer->dirty) == 0);
	log_release(layer->log);
	atomic_fetch_add(&w->taken, (unsigned)found.n);
	free(kinds);
	ranges_free(&found);
}

/* Natively: they come at any moment, also while layers change. */
static void *syncer(void *arg)
{
	struct world *w = arg;

	while (!atomic_load(&w->stop)) {
		int done = segmap_sync(w->map);

		CHECK(done == 0 || done == 1);
		atomic_fetch_add(&w->synced, (unsigned)done);
		sched_yield();
	}
	return NULL;
}

/* What the log says, read from its file: batches one behind the other, of which the last one stands
 * over the others. */
static void read_log(struct layer *layer)
{
	uint64_t head[4], record[3], at, sequence, i, block;   /* little-endian, as we are */

	memset(layer->own, UNKNOWN, sizeof(layer->own));
	for (at = 0, sequence = 1; at < layer->log->end; sequence++) {
		CHECK(pread(layer->log->fd, head, sizeof(head), (off_t)at) == sizeof(head));
		CHECK(memcmp(head, "imgfsbat", 8) == 0);
		CHECK(head[2] == sequence && head[3] == SIZE);
		for (i = 0, at += 36; i < head[1]; i++, at += sizeof(record)) {
			CHECK(pread(layer->log->fd, record, sizeof(record), (off_t)at) ==
			      sizeof(record));
			CHECK(record[1] <= SIZE && record[2] <= 2);
			for (block = record[0] / SEG_BLOCK; block * SEG_BLOCK < record[1]; block++)
				layer->own[block] = record[2] == 0 ? UNKNOWN :
						    record[2] == 1 ? SEG_STORE : SEG_ZERO;
		}
	}
	CHECK(at == layer->log->end && sequence == layer->log->sequence + 1);
}

static void *taker(void *arg)
{
	struct world *w = arg;
	uint64_t rng = w->seed + 99;

	while (!atomic_load(&w->stop)) {
		pthread_mutex_lock(&w->top_lock);
		take_into_log(w, &w->layers[w->top], below(&rng, 3) == 0);
		pthread_mutex_unlock(&w->top_lock);
		sched_yield();
	}
	return NULL;
}

static struct store *file_store(const char *directory, const char *name, unsigned number)
{
	struct store *st;
	char path[4096];
	int fd;

	CHECK(snprintf(path, sizeof(path), "%s/%s%u", directory, name, number) < (int)sizeof(path));
	fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	CHECK(fd >= 0 && ftruncate(fd, SIZE) == 0);
	st = store_new(fd, SIZE, SEG_BLOCK, true);
	CHECK(st);
	close(fd);   /* the store has its own */
	return st;
}

static void add_layer(struct world *w, unsigned number, const char *directory)
{
	struct layer *layer = &w->layers[number];
	struct store *file;

	layer->st = file_store(directory, "layer", number);
	layer->dirty = segmap_new(SIZE);
	layer->state = segmap_new(SIZE);
	CHECK(layer->dirty && layer->state);
	file = file_store(directory, "log", number);
	layer->log = log_new(file->fd, layer->st, layer->state, 0, SIZE, 0);
	store_unref(file);
	CHECK(layer->log);
}

/* Freezes the top while they write. */
static void freeze(struct world *w, const char *directory)
{
	unsigned next;

	CHECK(segmap_set_target(w->map, NULL, NULL, NULL) == 0);
	pthread_mutex_lock(&w->top_lock);
	take_into_log(w, &w->layers[w->top], false);
	read_log(&w->layers[w->top]);
	next = ++w->top;
	add_layer(w, next, directory);
	pthread_mutex_unlock(&w->top_lock);
	CHECK(segmap_set_target(w->map, w->layers[next].st, w->layers[next].dirty,
				w->layers[next].log) == 0);
}

/* By the files and the logs alone. */
static void check_layers(struct world *w)
{
	unsigned char bytes[SEG_BLOCK];
	uint64_t block;

	read_log(&w->layers[w->top]);
	for (block = 0; block < BLOCKS; block++) {
		uint64_t start = block * SEG_BLOCK, length = block_end(block) - start;
		struct store *from = block_store(w, (int)w->top, block);

		memset(bytes, 0, sizeof(bytes));
		if (from)
			CHECK(store_pread(from, bytes, length, start, false) == 0);
		CHECK(memcmp(bytes, w->model + start, length) == 0);
		check_block(w, block, false, false);
	}
}

/* Old bytes that were right once change nothing that was written or zeroed since. */
static void check_copy_up(struct world *w)
{
	static unsigned char junk[2 * SEG_BLOCK], bytes[2 * SEG_BLOCK];

	memset(junk, 7, sizeof(junk));
	memset(w->model, 3, SEG_BLOCK);
	memset(w->model + SEG_BLOCK, 0, SEG_BLOCK);
	CHECK(segmap_write(w->map, 0, SEG_BLOCK, w->model) == 1);
	CHECK(segmap_zero(w->map, SEG_BLOCK, 2 * SEG_BLOCK) == 1);
	CHECK(segmap_write(w->map, SEG_BLOCK, 1, "x") == 0);
	CHECK(segmap_copy_up(w->map, 0, sizeof(junk), junk) == 1);
	CHECK(segmap_read(w->map, 0, sizeof(bytes), (char *)bytes, SEG_WAIT) == 1);
	CHECK(memcmp(bytes, w->model, sizeof(bytes)) == 0);
	CHECK(segmap_write(w->map, SEG_BLOCK, 1, "x") == 1);
}

/* Grown by holes, cut, refused: the account follows. */
static void check_sizes(struct world *w)
{
	struct segmap *map = w->map, *dirty = w->layers[w->top].dirty;
	struct ranges found;
	uint64_t at;
	char byte;

	CHECK(segmap_take(dirty, &found) == 0);
	ranges_free(&found);
	CHECK(segmap_resize(map, SIZE + 3 * SEG_BLOCK) == 0 && dirty->size == map->size);
	CHECK(segmap_take(dirty, &found) == 0 && found.n == 1);
	CHECK(found.starts[0] == SIZE && found.ends[0] == map->size && found.kinds[0] == SEG_ZERO);
	ranges_free(&found);
	CHECK(segmap_read(map, SIZE + 5, 1, &byte, SEG_WAIT) == 1 && byte == 0);
	/* The block that the old end was in is data as a whole. */
	CHECK(segmap_seek(map, SIZE, SEEK_HOLE, &at) == 1 && at == SIZE + SEG_BLOCK - TAIL);
	CHECK(segmap_write(map, SIZE + 3 * SEG_BLOCK, 1, "x") == -EINVAL);
	CHECK(segmap_write(map, UINT64_MAX, 2, "xx") == -EINVAL);
	CHECK(segmap_move(map, 0, map, UINT64_MAX, SEG_BLOCK, &at) == -EINVAL && at == 0);
	CHECK(segmap_move(map, 0, map, SIZE, 100, &at) == -EINVAL && at == 0);
	CHECK(segmap_below(map, 0, SEG_BLOCK, map) == -EINVAL);
	CHECK(segmap_below(map, 0, 100, dirty) == -EINVAL);
	CHECK(segmap_zero(map, 0, 100) == -EINVAL && segmap_zero(map, 8192, 4096) == -EINVAL);
	CHECK(segmap_copy_up(map, 1, SEG_BLOCK, w->model) == -EINVAL);
	CHECK(segmap_resize(map, 10) == 0 && segmap_count(map) == 1 && dirty->size == 10);
	CHECK(segmap_read(map, 10, 1, &byte, SEG_WAIT) == -EINVAL);
	CHECK(segmap_fill(map, 5, 100, SEG_ZERO, SEEK_IS_HOLE) == 0);
	CHECK(segmap_resize(map, 0) == 0 && segmap_count(map) == 0 && segmap_count(dirty) == 0);
	CHECK(segmap_seek(map, 0, SEEK_HOLE, &at) == -ENXIO);
	CHECK(segmap_take(dirty, &found) == 0 && found.n == 0);
	ranges_free(&found);
	CHECK(segmap_resize(map, 5000) == 0 && segmap_read(map, 4999, 1, &byte, SEG_WAIT) == 1);
	CHECK(segmap_set_target(map, w->base, map, NULL) == -EINVAL);
	CHECK(segmap_set_target(map, NULL, NULL, NULL) == 0 && segmap_write(map, 0, 5000, w->model) == 0);
}

void run_writes(uint64_t seed, uint64_t steps, const char *directory)
{
	struct world *w = calloc(1, sizeof(*w));
	struct writer writers[WRITERS];
	pthread_t threads[WRITERS], others[4];
	uint64_t rng = seed;
	unsigned i, commits = 0;

	CHECK(w);
	w->seed = seed;
	w->steps = steps;
	pthread_mutex_init(&w->top_lock, NULL);
	w->base = file_store(directory, "base", 0);
	for (i = 0; i < SIZE; i++)
		w->model[i] = (unsigned char)below(&rng, 256);
	CHECK(store_pwrite(w->base, w->model, SIZE, 0) == 0);
	add_layer(w, 0, directory);
	CHECK(store_pwrite(w->base, w->model, SIZE, 0) == 0);
	w->map = segmap_new(SIZE);
	CHECK(w->map && segmap_set_target(w->map, w->layers[0].st, w->layers[0].dirty,
					  w->layers[0].log) == 0);
	for (i = 0; i < WRITERS; i++) {
		writers[i] = (struct writer){ w, i };
		CHECK(pthread_create(&threads[i], NULL, writer, &writers[i]) == 0);
	}
	CHECK(pthread_create(&others[0], NULL, filler, w) == 0);
	CHECK(pthread_create(&others[1], NULL, taker, w) == 0);
	CHECK(pthread_create(&others[2], NULL, syncer, w) == 0);
	CHECK(pthread_create(&others[3], NULL, syncer, w) == 0);
	while (w->top < LAYERS - 1 && atomic_load(&w->changes) < WRITERS * steps / 2) {
		if (atomic_load(&w->changes) >= (w->top + 1) * WRITERS * steps / LAYERS / 2)
			freeze(w, directory);
		sched_yield();
	}
	for (i = 0; i < WRITERS; i++)
		pthread_join(threads[i], NULL);
	atomic_store(&w->stop, true);
	for (i = 0; i < 4; i++)
		pthread_join(others[i], NULL);
	CHECK(atomic_load(&w->writing) == 0);
	take_into_log(w, &w->layers[w->top], false);
	check_layers(w);
	check_copy_up(w);
	CHECK(segmap_sync(w->map) == 1);   /* those of the syncers may all have been Python's */
	check_sizes(w);
	for (i = 0; i <= w->top; i++)
		commits += w->layers[i].log->commits;
	printf("writes: %u changes, %u copies, %u layers, %u filled, %u taken, %u lowered, %u moved, "
	       "%u synced, %u committed\n", w->changes, w->copies, w->top + 1, w->filled, w->taken,
	       w->lowered, w->moved, w->synced, commits);
	CHECK(commits);
	CHECK(w->changes && w->copies && w->filled && w->taken && w->top && w->lowered && w->moved);
	segmap_unref(w->map);
	for (i = 0; i <= w->top; i++) {
		segmap_unref(w->layers[i].dirty);
		segmap_unref(w->layers[i].state);
		log_unref(w->layers[i].log);
		store_unref(w->layers[i].st);
	}
	store_unref(w->base);
	free(w);
}
