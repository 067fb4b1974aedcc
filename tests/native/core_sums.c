/* The sums part of core_driver.c: writers, readers, who seals, and who looks at the two files as a kill would
 * leave them, all at once; and each way to damage a block.
 *
 * Every writer has blocks of its own, so it knows what each must read as.  In each round the store is opened
 * anew, so that all blocks are to be compared again.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <unistd.h>

#include "core.h"
#include "crc32c.h"
#include "store.h"
#include "sums.h"

#define BLOCKS 2100u           /* of three regions */
#define TAIL 1000u             /* the last block is shorter */
#define SIZE ((uint64_t)(BLOCKS - 1) * SUM_BLOCK + TAIL)
#define WRITERS 3
#define READERS 2
#define ROUNDS 6

struct world {
	int data, sums;
	struct store *st;
	unsigned char model[SIZE];     /* each block its writer's */
	atomic_bool live[BLOCKS];      /* false: punched */
	uint64_t seed, steps;
	atomic_uint writes, reads, sealed, punched, seen;
	atomic_bool stop;
};

struct writer {
	struct world *w;
	unsigned number;
};

static uint64_t start_of(uint64_t block)
{
	return block * SUM_BLOCK;
}

static uint64_t length_of(uint64_t block)
{
	return block == BLOCKS - 1 ? TAIL : SUM_BLOCK;
}

static struct store *opened(struct world *w, enum sums_trust trust, bool writable)
{
	struct sums_given given = { w->sums, 12345, "data", "/proc/self", trust, writable };
	struct store *st = store_new(w->data, SIZE, SUM_BLOCK, true);

	CHECK(st && store_sums_attach(st, &given) == 0);
	return st;
}

/* ---- at once ---- */

static void read_own(struct world *w, uint64_t block)
{
	unsigned char bytes[SUM_BLOCK];

	if (!atomic_load(&w->live[block]))
		return;
	CHECK(store_pread(w->st, bytes, length_of(block), start_of(block), false) == 0);
	CHECK(memcmp(bytes, w->model + start_of(block), length_of(block)) == 0);
}

static void write_own(struct world *w, uint64_t block, uint64_t *rng)
{
	uint64_t from = 0, to = length_of(block);
	unsigned char *at = w->model + start_of(block);

	if (atomic_load(&w->live[block]) && below(rng, 2)) {
		from = below(rng, to);
		to = from + 1 + below(rng, to - from);
	}
	memset(at + from, (int)below(rng, 256), to - from);
	CHECK(store_pwrite(w->st, at + from, to - from, start_of(block) + from) == 0);
	atomic_store(&w->live[block], true);
	atomic_fetch_add(&w->writes, 1);
}

static void punch_own(struct world *w, uint64_t block)
{
	atomic_store(&w->live[block], false);
	memset(w->model + start_of(block), 0, length_of(block));
	CHECK(store_punch(w->st, length_of(block), start_of(block)) == 0);
	atomic_fetch_add(&w->punched, 1);
}

static void *writer(void *arg)
{
	struct writer *me = arg;
	struct world *w = me->w;
	uint64_t rng = w->seed * 31 + me->number, step;

	for (step = 0; step < w->steps; step++) {
		uint64_t blocks = (BLOCKS + WRITERS - 1 - me->number) / WRITERS;
		/* Mostly a few of them, so that they meet the others there. */
		uint64_t block = below(&rng, below(&rng, 4) ? 8 : blocks) * WRITERS + me->number;
		uint64_t what = below(&rng, 8);

		read_own(w, block);
		if (what == 0)
			punch_own(w, block);
		else
			write_own(w, block, &rng);
		read_own(w, block);
		if (step % 16 == 0)
			sched_yield();
	}
	return NULL;
}

/* Others' bytes, while they change: whatever they are, they are not damaged. */
static void *reader(void *arg)
{
	struct writer *me = arg;
	struct world *w = me->w;
	uint64_t rng = w->seed * 77 + me->number;
	char *bytes = malloc(64 * SUM_BLOCK);

	CHECK(bytes);
	while (!atomic_load(&w->stop)) {
		uint64_t block = below(&rng, below(&rng, 2) ? 24 : BLOCKS), n = 0, end;
		bool nowait = below(&rng, 2);
		int err;

		while (n < 64 && block + n < BLOCKS && atomic_load(&w->live[block + n]))
			n++;
		if (!n)
			continue;
		end = start_of(block + n - 1) + length_of(block + n - 1);
		err = store_pread(w->st, bytes, end - start_of(block), start_of(block), nowait);
		CHECK(err == 0 || (nowait && err == -EAGAIN));
		atomic_fetch_add(&w->reads, 1);
		if (below(&rng, 4) == 0)
			sched_yield();
	}
	free(bytes);
	return NULL;
}

static void *sealer(void *arg)
{
	struct world *w = arg;

	while (!atomic_load(&w->stop)) {
		int64_t sealed = store_seal(w->st, 0, 2);

		CHECK(sealed >= 0);
		atomic_fetch_add(&w->sealed, (unsigned)sealed);
		sched_yield();
	}
	return NULL;
}

/* A sum that is there before and after its block was read is the sum of these bytes. */
static void *killer(void *arg)
{
	struct world *w = arg;
	uint64_t rng = w->seed + 5;

	while (!atomic_load(&w->stop)) {
		uint64_t block = below(&rng, 24);
		unsigned char bytes[SUM_BLOCK] = { 0 };
		uint32_t before, after, sum;

		CHECK(sums_read(w->st->sums, block, 1, &before, false) == 0);
		CHECK(sums_content(w->st, block, (char *)bytes, sizeof(bytes), false) == 0);
		CHECK(sums_read(w->st->sums, block, 1, &after, false) == 0);
		if (before && before == after) {
			sums_compute(w->st->sums, block, 1, (char *)bytes, sizeof(bytes), &sum);
			CHECK(sum == before);
			atomic_fetch_add(&w->seen, 1);
		}
		sched_yield();
	}
	return NULL;
}

static void seal_all(struct store *st)
{
	while (store_seal(st, 0, 100) > 0)
		;
	CHECK(store_is_sealed(st));
}

static void check_all(struct world *w, enum sums_trust trust)
{
	struct store *st = opened(w, trust, false);
	unsigned char bytes[SUM_BLOCK];
	uint64_t block;

	for (block = 0; block < BLOCKS; block++) {
		if (!atomic_load(&w->live[block]))
			continue;
		CHECK(store_pread(st, bytes, length_of(block), start_of(block), false) == 0);
		CHECK(memcmp(bytes, w->model + start_of(block), length_of(block)) == 0);
	}
	store_unref(st);
}

static void run_round(struct world *w, bool seal)
{
	struct writer each[WRITERS + READERS];
	pthread_t threads[WRITERS + READERS + 2];
	unsigned i;

	for (i = 0; i < WRITERS + READERS; i++) {
		each[i] = (struct writer){ w, i };
		CHECK(pthread_create(&threads[i], NULL, i < WRITERS ? writer : reader, &each[i]) == 0);
	}
	CHECK(pthread_create(&threads[i++], NULL, sealer, w) == 0);
	CHECK(pthread_create(&threads[i++], NULL, killer, w) == 0);
	for (i = 0; i < WRITERS; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	atomic_store(&w->stop, true);
	for (; i < WRITERS + READERS + 2; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	atomic_store(&w->stop, false);
	if (seal) {
		CHECK(store_sums_renew(w->st, SIZE, 0) == 0);
		seal_all(w->st);
	}
}

/* ---- one after the other ---- */

static void flip(int fd, uint64_t at)
{
	unsigned char byte;

	CHECK(pread(fd, &byte, 1, (off_t)at) == 1);
	byte ^= 0x10;
	CHECK(pwrite(fd, &byte, 1, (off_t)at) == 1);
}

static void expect_damage(struct store *st, uint64_t block)
{
	char bytes[SUM_BLOCK];
	uint64_t where;

	CHECK(store_pread(st, bytes, length_of(block), start_of(block), false) == -STORE_DAMAGED);
	CHECK(strcmp(store_damage(&where), "data") == 0 && where == start_of(block));
	CHECK(!store_damage(&where));
	CHECK(store_pread(st, bytes, 1, start_of(block) + 7, true) == -EAGAIN);
	CHECK(store_verify(st, 1, start_of(block)) == -STORE_DAMAGED);
}

static int fail(struct store *st, uint64_t length, uint64_t offset, void *arg)
{
	(void)st, (void)length, (void)offset, (void)arg;
	return -ENOSPC;
}

static void check_damage(struct world *w)
{
	uint64_t block = 5;
	struct store *st;
	char byte;

	/* A damaged block is not given, nor written in part; written as a whole it is good again. */
	flip(w->data, start_of(block) + 99);
	st = opened(w, SUMS_STRICT, true);
	expect_damage(st, block);
	CHECK(store_pwrite(st, "x", 1, start_of(block) + 3) == -STORE_DAMAGED);
	CHECK(store_punch(st, 10, start_of(block) + 3) == -STORE_DAMAGED);
	CHECK(store_change(st, SUM_BLOCK, start_of(block), fail, NULL) == -ENOSPC);
	expect_damage(st, block);
	CHECK(store_pwrite(st, w->model + start_of(block), SUM_BLOCK, start_of(block)) == 0);
	CHECK(store_pread(st, &byte, 1, start_of(block), false) == 0);
	seal_all(st);
	store_unref(st);
	check_all(w, SUMS_STRICT);

	/* What failed to be written is what it was. */
	st = opened(w, SUMS_STRICT, true);
	CHECK(store_change(st, SUM_BLOCK, start_of(block), fail, NULL) == -ENOSPC);
	store_unref(st);
	check_all(w, SUMS_STRICT);

	/* A sum that is gone: damage, unless it was a kill. */
	st = opened(w, SUMS_STRICT, true);
	CHECK(sums_zero(st->sums, block, 1) == 0);
	expect_damage(st, block);
	store_unref(st);
	check_all(w, SUMS_KILLED);
	st = opened(w, SUMS_KILLED, true);
	CHECK(store_sums_renew(st, SIZE, 0) == 0);
	seal_all(st);
	store_unref(st);
	check_all(w, SUMS_STRICT);

	/* After a crash of the machine it is accepted as it is. */
	flip(w->data, start_of(block));
	w->model[start_of(block)] ^= 0x10;
	check_all(w, SUMS_DOUBT);
	st = opened(w, SUMS_DOUBT, true);
	CHECK(store_sums_renew(st, SIZE, 0) == 0 && store_sums_accepted(st) == 1);
	seal_all(st);
	store_unref(st);
	check_all(w, SUMS_STRICT);
}

/* The disk ends elsewhere, inside of a block. */
static void check_cut(struct world *w)
{
	struct store *st = opened(w, SUMS_STRICT, true);
	uint64_t size = start_of(BLOCKS - 3) + 100;
	uint32_t sum;

	CHECK(store_sums_before_cut(st, size) == 0);
	CHECK(store_resize(st, size) == 0 && store_sums_cut(st, size) == 0);
	CHECK(ftruncate(w->data, (off_t)size) == 0);
	seal_all(st);
	CHECK(store_resize(st, SIZE) == 0 && ftruncate(w->data, (off_t)SIZE) == 0);
	memset(w->model + size, 0, SIZE - size);
	store_unref(st);
	st = opened(w, SUMS_STRICT, true);
	CHECK(store_verify(st, 200, size - 100) == 0);
	CHECK(sums_read(st->sums, BLOCKS - 2, 1, &sum, false) == 0 && sum == 0);
	CHECK(store_pwrite(st, w->model + size, SIZE - size, size) == 0);
	seal_all(st);
	store_unref(st);
	check_all(w, SUMS_STRICT);
}

static void check_crc(void)
{
	unsigned char bytes[64];
	unsigned i, n;

	CHECK(crc32c(0, "123456789", 9) == 0xe3069283);
	for (i = 0; i < sizeof(bytes); i++)
		bytes[i] = (unsigned char)(i * 37);
	for (n = 0; n < sizeof(bytes); n++) {
		const void *three[3] = { bytes, bytes, bytes };
		uint32_t crcs[3] = { 0, 1, n };

		crc32c_three(crcs, three, n);
		for (i = 0; i < 3; i++)
			CHECK(crcs[i] == crc32c_table(i < 2 ? i : n, bytes, n) &&
			      crcs[i] == crc32c(i < 2 ? i : n, bytes, n));
	}
}

static int file_new(const char *directory, const char *name, uint64_t size)
{
	char path[4096];
	int fd;

	CHECK(snprintf(path, sizeof(path), "%s/%s", directory, name) < (int)sizeof(path));
	fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
	return fd;
}

void run_sums(uint64_t seed, uint64_t steps, const char *directory)
{
	struct world *w = calloc(1, sizeof(*w));
	unsigned round, block;

	CHECK(w);
	check_crc();
	w->seed = seed;
	w->steps = steps / ROUNDS + 1;
	w->data = file_new(directory, "summed", SIZE);
	w->sums = file_new(directory, "sums", 0);
	for (round = 0; round < ROUNDS; round++) {
		w->seed++;
		/* Unsealed, and let go of: as after a kill. */
		w->st = opened(w, round % 2 ? SUMS_STRICT : SUMS_KILLED, true);
		run_round(w, round % 2 == 0);
		if (round % 2)
			CHECK(store_sums_sync(w->st) == 0);
		store_unref(w->st);
		check_all(w, round % 2 ? SUMS_KILLED : SUMS_STRICT);
	}
	w->st = opened(w, SUMS_KILLED, true);
	for (block = 0; block < BLOCKS; block++)
		atomic_store(&w->live[block], true);
	CHECK(store_pwrite(w->st, w->model, SIZE, 0) == 0);
	seal_all(w->st);
	store_unref(w->st);
	check_damage(w);
	check_cut(w);
	printf("sums: %u writes, %u reads, %u punched, %u sealed, %u seen as by a kill\n", w->writes,
	       w->reads, w->punched, w->sealed, w->seen);
	CHECK(w->sealed && w->seen);
	close(w->data);
	close(w->sums);
	free(w);
}
