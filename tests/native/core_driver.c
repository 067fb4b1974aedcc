/* Drives the native core without Python, to be built with sanitizers:
 *
 *     core_driver model SEED STEPS DIRECTORY     the segment map against one cell a byte
 *     core_driver stress SEED STEPS DIRECTORY    readers against publish, retract and evict
 *     core_driver writes SEED STEPS DIRECTORY    writers against who fills in, takes, changes the target
 *     core_driver sums SEED STEPS DIRECTORY      writers and readers of blocks with sums, and who seals them
 *
 * Prints what was done and exits with 0; says what differs on stderr and aborts otherwise.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core.h"
#include "scan.h"
#include "segmap.h"
#include "store.h"

static int file_new(const char *directory, const char *name, uint64_t size)
{
	char path[4096];
	int fd;

	CHECK(snprintf(path, sizeof(path), "%s/%s", directory, name) < (int)sizeof(path));
	fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	CHECK(fd >= 0);
	CHECK(ftruncate(fd, (off_t)size) == 0);
	return fd;
}

/* ---- the model: one cell a byte ---- */

#define SIZE 16000u
#define BLOCK 512u
#define BLOCKS ((SIZE + BLOCK - 1) / BLOCK)

/* `owner` and `shift` tell apart what the map must not join: of a literal its number; of a
 * store which one, and how far its offset is from the map's. */
struct cell {
	uint8_t kind, seek;
	uint64_t owner;
	int64_t shift;
	uint8_t literal;
};

struct model {
	struct segmap *map;
	struct store *stores[2];       /* 0 is whole, 1 has present bits */
	uint8_t content[2][SIZE];
	bool present[BLOCKS], coming[BLOCKS];
	struct cell cells[SIZE];
	uint64_t literals;
	uint64_t rng;
};

static bool same(const struct cell *a, const struct cell *b)
{
	return a->kind == b->kind && a->seek == b->seek && a->owner == b->owner &&
	       a->shift == b->shift;
}

static void fill(struct model *m, uint64_t start, uint64_t end, struct cell cell)
{
	while (start < end)
		m->cells[start++] = cell;
}

/* -1 where only Python would know. */
static int value(const struct model *m, uint64_t at)
{
	const struct cell *c = &m->cells[at];
	uint64_t offset = at + (uint64_t)c->shift;

	if (c->kind == SEG_ZERO)
		return 0;
	if (c->kind == SEG_LITERAL)
		return c->literal;
	if (c->kind == SEG_ASK || (c->owner == 1 && !m->present[offset / BLOCK]))
		return -1;
	return m->content[c->owner][offset];
}

/* What segmap_read must answer: the first segment that is not all here decides. */
static int expected(const struct model *m, uint64_t start, uint64_t end)
{
	uint64_t from, at, block;

	for (from = start; from < end; from = at) {
		bool here = true, coming = true;

		for (at = from; at < end && same(&m->cells[from], &m->cells[at]); at++) {
			if (value(m, at) >= 0)
				continue;
			here = false;
			block = (at + (uint64_t)m->cells[at].shift) / BLOCK;
			if (m->cells[at].kind != SEG_STORE || !m->coming[block])
				coming = false;
		}
		if (!here)
			return coming ? SEG_COMING : 0;
	}
	return 1;
}

static void some_range(struct model *m, uint64_t *start, uint64_t *end)
{
	/* Mostly short ones, so that the map gets many segments; some that sweep them away. */
	uint64_t most = below(&m->rng, 40) ? 12 : SIZE;

	*start = below(&m->rng, SIZE + 1);
	*end = *start + below(&m->rng, most + 1);
	if (*end > SIZE)
		*end = SIZE;
}

static void do_store(struct model *m, uint64_t start, uint64_t end)
{
	unsigned which = (unsigned)below(&m->rng, 2);
	/* Often at the map's own offset, so that neighbours join. */
	uint64_t offset = below(&m->rng, 4) ? start : below(&m->rng, SIZE - (end - start) + 1);
	enum seg_seek seek = below(&m->rng, 4) ? SEEK_IS_DATA : SEEK_IS_UNKNOWN;

	CHECK(segmap_set_store(m->map, start, end, m->stores[which], offset, seek) == 0);
	fill(m, start, end, (struct cell){ SEG_STORE, seek, which, (int64_t)(offset - start), 0 });
}

static void do_literal(struct model *m, uint64_t start, uint64_t end)
{
	uint8_t *bytes = malloc(end - start + 1);
	uint64_t i;

	CHECK(bytes);
	m->literals++;
	for (i = start; i < end; i++) {
		bytes[i - start] = (uint8_t)draw(&m->rng);
		m->cells[i] = (struct cell){ SEG_LITERAL, SEEK_IS_DATA, m->literals, 0,
					     bytes[i - start] };
	}
	CHECK(segmap_set_literal(m->map, start, bytes, end - start, SEEK_IS_DATA) == 0);
	free(bytes);
}

static void do_load(struct model *m)
{
	static uint64_t ends[SIZE];
	static uint8_t flags[SIZE];
	uint64_t longest = 1 + below(&m->rng, 30), at = 0;
	bool with_store = below(&m->rng, 2);
	size_t n = 0;

	while (at < SIZE) {
		uint64_t end = at + 1 + below(&m->rng, longest);

		end = end < SIZE ? end : SIZE;
		flags[n] = (uint8_t)below(&m->rng, 4);
		if (flags[n] & 2)
			fill(m, at, end, (struct cell){ SEG_ZERO, SEEK_IS_HOLE, 0, 0, 0 });
		else if (with_store)
			fill(m, at, end, (struct cell){ SEG_STORE, SEEK_IS_DATA, 1, 0, 0 });
		else
			fill(m, at, end, (struct cell){ SEG_ASK, SEEK_IS_DATA, 0, 0, 0 });
		ends[n++] = at = end;
	}
	CHECK(segmap_load(m->map, ends, flags, n, with_store ? m->stores[1] : NULL) == 0);
	/* Refused lists change nothing: not forward, too short, too long. */
	CHECK(segmap_load(m->map, ends, flags, n - 1, NULL) == -EINVAL);
	ends[n - 1]++;
	CHECK(segmap_load(m->map, ends, flags, n, NULL) == -EINVAL);
	if (n > 1) {
		ends[n - 2] = ends[n - 1];
		CHECK(segmap_load(m->map, ends, flags, n, NULL) == -EINVAL);
	}
}

static void do_blocks(struct model *m)
{
	uint64_t first = below(&m->rng, BLOCKS), count = below(&m->rng, BLOCKS - first + 1), i;
	bool set = below(&m->rng, 3);
	uint64_t changed = 0;

	for (i = first; i < first + count; i++) {
		changed += m->present[i] != set;
		m->present[i] = set;
	}
	CHECK((set ? store_set : store_clear)(m->stores[1], first, count) == changed);
	first = below(&m->rng, BLOCKS);
	count = below(&m->rng, BLOCKS - first + 1);
	set = below(&m->rng, 2);
	for (i = first; i < first + count; i++)
		m->coming[i] = set;
	(set ? store_set_coming : store_settle)(m->stores[1], first, count);
}

static void do_refused(struct model *m)
{
	struct segmap *map = m->map;
	uint64_t past = SIZE + 1 + below(&m->rng, 100), found;
	char byte;

	CHECK(segmap_set(map, 0, past, SEG_ZERO, SEEK_IS_HOLE) == -EINVAL);
	CHECK(segmap_set(map, 2, 1, SEG_ZERO, SEEK_IS_HOLE) == -EINVAL);
	CHECK(segmap_set_literal(map, past, "x", 1, SEEK_IS_DATA) == -EINVAL);
	CHECK(segmap_set_literal(map, 1, "x", UINT64_MAX, SEEK_IS_DATA) == -EINVAL);
	CHECK(segmap_set_store(map, 0, 2, m->stores[0], SIZE - 1, SEEK_IS_DATA) == -EINVAL);
	CHECK(segmap_set_store(map, 0, 2, m->stores[0], UINT64_MAX, SEEK_IS_DATA) == -EINVAL);
	CHECK(segmap_read(map, past, 1, &byte, SEG_WAIT) == -EINVAL);
	CHECK(segmap_read(map, 1, UINT64_MAX, &byte, SEG_WAIT) == -EINVAL);
	CHECK(segmap_seek(map, SIZE, SEEK_DATA, &found) == -ENXIO);
	CHECK(segmap_seek(map, SIZE, SEEK_HOLE, &found) == -ENXIO);
	CHECK(segmap_seek(map, -1, SEEK_HOLE, &found) == -ENXIO);
	CHECK(segmap_seek(map, 0, SEEK_CUR, &found) == -EINVAL);
}

static void check_read(struct model *m)
{
	uint64_t start, end, i;
	char *buf;
	int got;

	some_range(m, &start, &end);
	if (below(&m->rng, 4) == 0 && start < end)
		end = start + 1 + below(&m->rng, SIZE - start);   /* over many pieces */
	buf = malloc(end - start + 1);   /* of that size: the sanitizer sees a byte too many */
	CHECK(buf);
	got = segmap_read(m->map, start, end - start, buf, below(&m->rng, 2) ? SEG_WAIT : SEG_NOWAIT);
	if (got != -EAGAIN) {
		CHECK(got == expected(m, start, end));
		for (i = start; i < end && got == 1; i++)
			CHECK((uint8_t)buf[i - start] == value(m, i));
	}
	free(buf);
}

struct taker {
	int pipe;
	char *buf;
	size_t length;
	bool called;
};

static bool take(void *arg)
{
	struct taker *t = arg;
	size_t done = 0;

	t->called = true;
	while (done < t->length) {
		ssize_t n = read(t->pipe, t->buf + done, t->length - done);

		CHECK(n > 0);
		done += (size_t)n;
	}
	return true;
}

static void check_splice(struct model *m)
{
	static struct seg_view views[SIZE + 1];
	uint64_t start, end, i;
	char *buf, *got, rest[4096];
	int pipes[2];
	bool done;
	struct taker t = { 0 };

	some_range(m, &start, &end);
	buf = malloc(end - start + 1);
	got = malloc(end - start + 1);
	CHECK(buf && got && pipe2(pipes, O_NONBLOCK) == 0);
	t = (struct taker){ pipes[0], got, end - start, false };
	done = segmap_splice(m->map, start, end - start, buf, pipes[1], take, &t) == 1;
	CHECK(done == t.called);
	if (start == end || expected(m, start, end) != 1)
		CHECK(!done);
	else if (segmap_segments(m->map, start, end, views, SIZE + 1) < 8)
		CHECK(done);   /* with more of them the pipe may be full */
	for (i = start; i < end && done; i++)
		CHECK((uint8_t)got[i - start] == value(m, i));
	CHECK(!done || (read(pipes[0], rest, 1) == -1 && errno == EAGAIN));
	CHECK(!segmap_splice(m->map, start, SIZE + 1 - start, buf, pipes[1], take, &t));
	CHECK(!segmap_splice(m->map, 1, UINT64_MAX, buf, pipes[1], take, &t));
	close(pipes[0]);
	close(pipes[1]);
	free(got);
	free(buf);
}

/* What the first of these cells that says something makes of all: data, or unknown; else a hole. */
static enum seg_seek seek_of(const struct model *m, uint64_t start, uint64_t end)
{
	while (start < end && m->cells[start].seek == SEEK_IS_HOLE)
		start++;
	return start < end ? m->cells[start].seek : SEEK_IS_HOLE;
}

static uint64_t next_block(uint64_t at)
{
	uint64_t next = (at / SEG_BLOCK + 1) * SEG_BLOCK;

	return next < SIZE ? next : SIZE;
}

static void check_seek(struct model *m, int whence, enum seg_seek wanted)
{
	uint64_t at = below(&m->rng, SIZE), found = 0;
	int got = segmap_seek(m->map, (int64_t)at, whence, &found);
	enum seg_seek is = seek_of(m, at / SEG_BLOCK * SEG_BLOCK, next_block(at));

	for (; is != wanted && is != SEEK_IS_UNKNOWN && at < SIZE; is = seek_of(m, at, next_block(at)))
		at = next_block(at);
	if (is == SEEK_IS_UNKNOWN && at < SIZE)
		CHECK(got == 0);
	else if (at == SIZE && wanted == SEEK_IS_DATA)
		CHECK(got == -ENXIO);
	else
		CHECK(got == 1 && found == at);
}

static void check_segments(struct model *m)
{
	static struct seg_view views[SIZE + 1];
	uint64_t start, end, at, data = 0, runs = 1;
	size_t n, i;

	some_range(m, &start, &end);
	if (below(&m->rng, 2)) {
		start = 0;
		end = SIZE;
	}
	n = segmap_segments(m->map, start, end, views, SIZE + 1);
	for (i = 0, at = start; i < n; i++) {
		CHECK(views[i].start == at && views[i].end > at && views[i].end <= end);
		for (; at < views[i].end; at++)
			CHECK(m->cells[at].kind == views[i].kind &&
			      m->cells[at].seek == views[i].seek);
	}
	CHECK(at == end || start == end);
	for (at = 0; at < SIZE; at++) {
		data += m->cells[at].seek != SEEK_IS_HOLE;
		runs += at && !same(&m->cells[at - 1], &m->cells[at]);
	}
	CHECK(segmap_data_bytes(m->map) == data);
	CHECK(segmap_count(m->map) == runs);   /* like neighbours are one */
}

static void run_model(uint64_t seed, uint64_t steps, const char *directory)
{
	struct model *m = calloc(1, sizeof(*m));
	uint64_t step, start, end, most = 0;
	unsigned which;

	CHECK(m);
	m->rng = seed;
	m->map = segmap_new(SIZE);
	CHECK(m->map);
	for (which = 0; which < 2; which++) {
		int fd = file_new(directory, which ? "blocks" : "whole", SIZE);

		for (step = 0; step < SIZE; step++)
			m->content[which][step] = (uint8_t)draw(&m->rng);
		m->stores[which] = store_new(fd, SIZE, BLOCK, which == 0);
		CHECK(m->stores[which]);
		CHECK(store_pwrite(m->stores[which], m->content[which], SIZE, 0) == 0);
		close(fd);   /* the store has its own */
	}
	fill(m, 0, SIZE, (struct cell){ SEG_ASK, SEEK_IS_UNKNOWN, 0, 0, 0 });
	for (step = 0; step < steps; step++) {
		enum seg_seek seek = below(&m->rng, 2) ? SEEK_IS_HOLE : SEEK_IS_DATA;

		some_range(m, &start, &end);
		switch (below(&m->rng, 100)) {
		case 0:
			do_load(m);
			break;
		case 1 ... 3:
			do_blocks(m);
			break;
		case 4:
			do_refused(m);
			break;
		case 5 ... 20:
			seek = (enum seg_seek)below(&m->rng, 3);
			CHECK(segmap_set(m->map, start, end, SEG_ASK, seek) == 0);
			fill(m, start, end, (struct cell){ SEG_ASK, seek, 0, 0, 0 });
			break;
		case 21 ... 40:
			CHECK(segmap_set(m->map, start, end, SEG_ZERO, seek) == 0);
			fill(m, start, end, (struct cell){ SEG_ZERO, seek, 0, 0, 0 });
			break;
		case 41 ... 65:
			do_literal(m, start, end);
			break;
		default:
			do_store(m, start, end);
		}
		check_read(m);
		check_splice(m);
		check_seek(m, SEEK_DATA, SEEK_IS_DATA);
		check_seek(m, SEEK_HOLE, SEEK_IS_HOLE);
		if (step % 8 == 0)
			check_segments(m);
		if (segmap_count(m->map) > most)
			most = segmap_count(m->map);
	}
	printf("model: %lu steps, at most %lu segments\n", (unsigned long)steps,
	       (unsigned long)most);
	segmap_unref(m->map);
	store_unref(m->stores[0]);
	store_unref(m->stores[1]);
	free(m);
}

/* scan_file finds what was written, and the holes between. */
static void run_scan(const char *directory)
{
	enum { AT = 4 << 20, LENGTH = 1 << 16, END = 10 << 20 };
	int fd = file_new(directory, "sparse", END);
	struct scan found = { 0 };
	char *bytes = calloc(1, LENGTH);

	CHECK(bytes && pwrite(fd, bytes, LENGTH, AT) == LENGTH);
	CHECK(scan_file(fd, END, &found) == 0);
	CHECK(found.n == 3 && found.ends[0] == AT && found.ends[1] == AT + LENGTH);
	CHECK(found.ends[2] == END && found.flags[0] == SCAN_HOLE && found.flags[1] == SCAN_DATA);
	free(found.ends);
	free(found.flags);
	free(bytes);
	close(fd);
}

int main(int argc, char **argv)
{
	uint64_t seed, steps;

	if (argc != 5) {
		fprintf(stderr, "usage: %s model|stress|writes|sums SEED STEPS DIRECTORY\n", argv[0]);
		return 2;
	}
	seed = strtoull(argv[2], NULL, 10) * 2 + 1;   /* the generator must not begin with 0 */
	steps = strtoull(argv[3], NULL, 10);
	if (strcmp(argv[1], "stress") == 0) {
		run_stress(seed, steps, file_new(argv[4], "stress", 0));
	} else if (strcmp(argv[1], "writes") == 0) {
		run_writes(seed, steps, argv[4]);
	} else if (strcmp(argv[1], "sums") == 0) {
		run_sums(seed, steps, argv[4]);
	} else {
		run_model(seed, steps, argv[4]);
		run_scan(argv[4]);
	}
	return 0;
}
