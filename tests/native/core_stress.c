/* The stress part of core_driver.c: readers without locks, and everyone who takes bytes away.
 *
 * Every block of the store is filled with one 64-bit word over and over: its number and a
 * generation.  A reader that gets words of two generations, of another block, or zeroes of a
 * punched one was let in where quiesce promised that nobody is.  Only the last quarter of the
 * map is ever published as zeroes, so in the rest a zero is an error.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core.h"
#include "segmap.h"
#include "store.h"

/* Long reads of few blocks: then an eviction that does not wait is caught at once. */
#define BLOCK 65536u
#define WORDS (BLOCK / 8)
#define BLOCKS 24u
#define ZERO_FROM (BLOCKS * 3 / 4)
#define READERS 4

struct shared {
	struct segmap *map;
	struct store *st;
	int fd;
	uint64_t seed, steps;
	atomic_bool stop;
	atomic_uint_fast64_t hits, asked, evicted;
};

static void fill_block(uint64_t *words, uint64_t block, uint64_t generation)
{
	unsigned i;

	for (i = 0; i < WORDS; i++)
		words[i] = block << 32 | generation;
}

static void check_block(const uint64_t *words, uint64_t block)
{
	CHECK(memcmp(words, words + 1, BLOCK - sizeof(*words)) == 0);
	if (block < ZERO_FROM || words[0] != 0) {
		CHECK(words[0] >> 32 == block);
		CHECK((uint32_t)words[0] != 0);
	}
}

struct taker {
	int pipe;
	char *words;
	size_t length;
};

static bool take(void *arg)
{
	struct taker *t = arg;
	size_t done = 0;

	while (done < t->length) {
		ssize_t n = read(t->pipe, t->words + done, t->length - done);

		CHECK(n > 0);
		done += (size_t)n;
	}
	return true;
}

/* As segmap_read. */
static int through_pipe(struct segmap *map, uint64_t offset, uint64_t length, char *words,
			const int *pipes)
{
	struct taker t = { pipes[0], words, length };
	char rest[4096];
	bool done = segmap_splice(map, offset, length, words, pipes[1], take, &t) == 1;

	while (read(pipes[0], rest, sizeof(rest)) > 0)
		CHECK(!done);
	return done;
}

static void *reader(void *arg)
{
	struct shared *s = arg;
	struct segmap *map = segmap_ref(s->map);
	uint64_t rng = s->seed ^ (uint64_t)(uintptr_t)&rng, found, *words;
	struct seg_view views[8];
	int pipes[2];

	CHECK(pipe2(pipes, O_NONBLOCK) == 0);
	CHECK(fcntl(pipes[1], F_SETPIPE_SZ, 16 * BLOCK) > 0);
	words = malloc(8 * BLOCK);
	CHECK(words);
	while (!atomic_load(&s->stop)) {
		uint64_t first = below(&rng, BLOCKS), count = 1 + below(&rng, 8), i;
		int got;

		if (count > BLOCKS - first)
			count = BLOCKS - first;
		if (below(&rng, 2))
			got = through_pipe(map, first * BLOCK, count * BLOCK, (char *)words, pipes);
		else
			got = segmap_read(map, first * BLOCK, count * BLOCK, (char *)words,
					  below(&rng, 2) ? SEG_WAIT : SEG_NOWAIT);
		CHECK(got == 1 || got == 0 || got == SEG_COMING || got == -EAGAIN);
		for (i = 0; i < count && got == 1; i++)
			check_block(words + i * WORDS, first + i);
		atomic_fetch_add(got == 1 ? &s->hits : &s->asked, 1);
		got = segmap_seek(map, (int64_t)(first * BLOCK), SEEK_HOLE, &found);
		CHECK(got == 0 || (got == 1 && found >= first * BLOCK && found % BLOCK == 0));
		CHECK(segmap_segments(map, 0, BLOCKS * BLOCK, views, 8) > 0 && views[0].start == 0);
	}
	close(pipes[0]);
	close(pipes[1]);
	free(words);
	segmap_unref(map);   /* one of the readers may be the last who holds it */
	return NULL;
}

/* Whose turn it is: any blocks that are present, as a source that changed takes them, or those
 * that were not used for longest, as the cache does; rarely the ones that are being read. */
static size_t victims(struct shared *s, uint64_t *rng, uint64_t *out, size_t most)
{
	size_t found = 0, i;
	uint64_t *oldest, block;

	if (below(rng, 4)) {
		block = below(rng, BLOCKS);
		for (i = 0; i < BLOCKS && found < most; i++, block = (block + 1) % BLOCKS)
			if (store_block_present(s->st, block))
				out[found++] = block;
		return found;
	}
	oldest = store_oldest(s->st, most, &found);
	CHECK(oldest && found && store_oldest_age(s->st) >= 0);
	memcpy(out, oldest, found * sizeof(*out));
	free(oldest);
	return found;
}

/* Readers have the block from memory for a while; when it is let go nobody looks there any more. */
static void hold_for_a_while(struct shared *s, uint64_t *words, uint64_t block)
{
	const struct timespec pause = { 0, 200000 };
	uint64_t i;

	CHECK(store_hold(s->st, block * BLOCK, words, BLOCK, words));
	CHECK(store_held_covers(s->st, block * BLOCK, (block + 1) * BLOCK));
	nanosleep(&pause, NULL);
	CHECK(store_held_left(s->st, block * BLOCK, (block + 1) * BLOCK) <= BLOCK);
	CHECK(store_unhold(s->st, block * BLOCK, (block + 1) * BLOCK) == words);
	for (i = 0; i < WORDS; i++)
		words[i] = i;
}

/* Fills absent blocks, each time with a new generation; evicts when most are present. */
static void *keeper(void *arg)
{
	struct shared *s = arg;
	uint64_t rng = s->seed + 1, step, *words = malloc(BLOCK), taken[6];

	CHECK(words);
	for (step = 1; atomic_load(&s->evicted) < s->steps; step++) {
		uint64_t block = below(&rng, BLOCKS);
		size_t found, i;

		if (!store_block_present(s->st, block)) {
			if (!below(&rng, 4)) {
				fill_block(words, block, step);
				hold_for_a_while(s, words, block);
			}
			fill_block(words, block, step);
			store_set_coming(s->st, block, 1);
			CHECK(store_pwrite(s->st, words, BLOCK, block * BLOCK) == 0);
			CHECK(store_set(s->st, block, 1) == 1);
			store_settle(s->st, block, 1);
		}
		if (atomic_load(&s->st->present) <= BLOCKS * 3 / 4)
			continue;
		found = victims(s, &rng, taken, 1 + below(&rng, 6));
		for (i = 0; i < found; i++)
			CHECK(store_clear(s->st, taken[i], 1) == 1);
		store_quiesce(s->st);
		for (i = 0; i < found; i++)
			CHECK(fallocate(s->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
					(off_t)(taken[i] * BLOCK), BLOCK) == 0);
		atomic_fetch_add(&s->evicted, found);
	}
	free(words);
	return NULL;
}

/* Retracts runs of blocks and publishes them again: in the store, as bytes, as zeroes. */
static void *publisher(void *arg)
{
	struct shared *s = arg;
	uint64_t rng = s->seed + 2, step, *words = malloc(BLOCK);

	CHECK(words);
	for (step = 1; step <= s->steps; step++) {
		uint64_t first = below(&rng, BLOCKS), count = 1 + below(&rng, 6), end;
		uint64_t all = BLOCKS * BLOCK;
		uint8_t data = 0;

		end = first + count < BLOCKS ? first + count : BLOCKS;
		switch (below(&rng, 8)) {
		case 0:
			CHECK(segmap_load(s->map, &all, &data, 1, s->st) == 0);
			break;
		case 1:
			CHECK(segmap_set(s->map, first * BLOCK, end * BLOCK, SEG_ASK,
					 SEEK_IS_DATA) == 0);
			break;
		case 2:
			first = ZERO_FROM + below(&rng, BLOCKS - ZERO_FROM);
			CHECK(segmap_set(s->map, first * BLOCK, BLOCKS * BLOCK, SEG_ZERO,
					 SEEK_IS_HOLE) == 0);
			break;
		case 3:
			fill_block(words, first, step);
			CHECK(segmap_set_literal(s->map, first * BLOCK, words, BLOCK,
						 SEEK_IS_DATA) == 0);
			break;
		default:
			CHECK(segmap_set_store(s->map, first * BLOCK, end * BLOCK, s->st,
					       first * BLOCK, SEEK_IS_DATA) == 0);
		}
	}
	free(words);
	return NULL;
}

struct waiting {
	struct store *st;
	atomic_bool over;
};

static void *quiescer(void *arg)
{
	struct waiting *w = arg;

	store_quiesce(w->st);
	atomic_store(&w->over, true);
	return NULL;
}

/* Quiesce waits for who was inside before it, and not for who came later. */
static void check_quiesce(struct store *st)
{
	struct waiting w = { .st = st };
	struct timespec pause = { 0, 20000000 };
	unsigned before = store_enter(st), epoch = atomic_load(&st->epoch), later;
	pthread_t thread;

	CHECK(pthread_create(&thread, NULL, quiescer, &w) == 0);
	while (atomic_load(&st->epoch) == epoch)
		sched_yield();
	later = store_enter(st);
	nanosleep(&pause, NULL);
	CHECK(!atomic_load(&w.over));
	store_leave(st, before);
	pthread_join(thread, NULL);
	CHECK(atomic_load(&w.over));
	store_leave(st, later);
}

void run_stress(uint64_t seed, uint64_t steps, int fd)
{
	struct shared s = { .fd = fd, .seed = seed, .steps = steps };
	pthread_t readers[READERS], writers[2];
	unsigned i;

	CHECK(ftruncate(fd, BLOCKS * BLOCK) == 0);
	s.st = store_new(fd, BLOCKS * BLOCK, BLOCK, false);
	s.map = segmap_new(BLOCKS * BLOCK);
	CHECK(s.st && s.map);
	check_quiesce(s.st);
	for (i = 0; i < READERS; i++)
		CHECK(pthread_create(&readers[i], NULL, reader, &s) == 0);
	CHECK(pthread_create(&writers[0], NULL, keeper, &s) == 0);
	CHECK(pthread_create(&writers[1], NULL, publisher, &s) == 0);
	for (i = 0; i < 2; i++)
		pthread_join(writers[i], NULL);
	store_unref(s.st);
	segmap_unref(s.map);
	atomic_store(&s.stop, true);
	for (i = 0; i < READERS; i++)
		pthread_join(readers[i], NULL);
	close(fd);
	printf("stress: %lu reads hit, %lu asked, %lu blocks evicted\n",
	       (unsigned long)s.hits, (unsigned long)s.asked,
	       (unsigned long)s.evicted);
	CHECK(s.hits && s.asked && s.evicted);
}
