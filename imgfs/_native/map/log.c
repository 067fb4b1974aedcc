#define _GNU_SOURCE
#include "log.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define BATCH_BYTES 36u          /* magic, count, sequence, size, checksum */
#define RECORD_BYTES 24u         /* start, end, kind */
#define TAIL_BYTES (64u << 10)   /* of zeroes, that are put behind the last batch at a time */

/* A log that is long, and as many times as long as it need be, is for Python to compact. */
#define COMPACT_BYTES (1u << 20)
#define COMPACT_SLACK 4u

/* Which of the 1024 blocks from this one on have bytes of the layer's, so that each has a sum. */
static void expects(void *of, uint64_t block, uint64_t *bits)
{
	struct segmap *state = of;
	uint64_t at = block * SEG_BLOCK, end = (block + 1024) * SEG_BLOCK, size = state->size;
	struct seg_view found[32];
	size_t n, i;

	end = end < size ? end : size;
	while (at < end && (n = segmap_segments(state, at, end, found, 32))) {
		for (i = 0; i < n; i++) {
			uint64_t bit = found[i].start / SEG_BLOCK - block;

			at = found[i].end;
			for (; found[i].kind == SEG_STORE && (block + bit) * SEG_BLOCK < at; bit++)
				bits[bit / 64] |= UINT64_C(1) << (bit % 64);
		}
	}
}

struct log *log_new(int fd, struct store *data, struct segmap *state, uint64_t end, uint64_t room,
		    uint64_t sequence)
{
	struct log *log = calloc(1, sizeof(*log));

	if (!log)
		return NULL;
	log->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	if (log->fd < 0) {
		free(log);
		return NULL;
	}
	atomic_init(&log->refs, 1);
	pthread_mutex_init(&log->lock, NULL);
	pthread_cond_init(&log->idle, NULL);
	log->data = store_ref(data);
	log->state = segmap_ref(state);
	log->size = state->size;
	log->end = end;
	log->room = room;
	log->sequence = sequence;
	store_sums_expect(data, expects, state);
	return log;
}

struct log *log_ref(struct log *log)
{
	atomic_fetch_add(&log->refs, 1);
	return log;
}

void log_unref(struct log *log)
{
	if (atomic_fetch_sub(&log->refs, 1) != 1)
		return;
	close(log->fd);
	store_sums_expect(log->data, NULL, NULL);
	store_unref(log->data);
	segmap_unref(log->state);
	pthread_cond_destroy(&log->idle);
	pthread_mutex_destroy(&log->lock);
	free(log);
}

/* ---- batches ---- */

static uint32_t crc_table[256];
static pthread_once_t crc_once = PTHREAD_ONCE_INIT;

static void make_crc_table(void)
{
	uint32_t i, bit;

	for (i = 0; i < 256; i++) {
		uint32_t crc = i;

		for (bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? UINT32_C(0xedb88320) : 0);
		crc_table[i] = crc;
	}
}

/* As zlib's, whose headers nothing else here needs; zero to begin with. */
static uint32_t crc32(uint32_t crc, const unsigned char *bytes, size_t n)
{
	pthread_once(&crc_once, make_crc_table);
	crc = ~crc;
	while (n--)
		crc = crc >> 8 ^ crc_table[(crc ^ *bytes++) & 0xff];
	return ~crc;
}

static unsigned char *put64(unsigned char *to, uint64_t number)
{
	number = htole64(number);
	memcpy(to, &number, sizeof(number));
	return to + sizeof(number);
}

/* log.py's numbers, by seg_kind. */
static uint64_t kind_in_log(uint8_t kind)
{
	return kind == SEG_STORE ? 1 : kind == SEG_ZERO ? 2 : 0;
}

/* malloc'ed; NULL: no memory. */
static unsigned char *encode(uint64_t sequence, uint64_t size, const struct ranges *ranges,
			     size_t *length)
{
	const size_t before = BATCH_BYTES - sizeof(uint32_t);
	unsigned char *batch, *to;
	uint32_t crc;
	size_t i;

	*length = BATCH_BYTES + ranges->n * RECORD_BYTES;
	batch = malloc(*length);
	if (!batch)
		return NULL;
	memcpy(batch, "imgfsbat", 8);
	to = put64(put64(put64(batch + 8, ranges->n), sequence), size) + sizeof(crc);
	for (i = 0; i < ranges->n; i++)
		to = put64(put64(put64(to, ranges->starts[i]), ranges->ends[i]),
			   kind_in_log(ranges->kinds[i]));
	crc = crc32(crc32(0, batch, before), batch + BATCH_BYTES, *length - BATCH_BYTES);
	crc = htole32(crc);
	memcpy(batch + before, &crc, sizeof(crc));
	return batch;
}

int log_cut(struct log *log)
{
	if (ftruncate(log->fd, (off_t)log->end))
		return -errno;
	log->room = log->end;
	return 0;
}

/* Let the next batches overwrite zeroes: what neither makes a file longer nor gets blocks for it is
 * forced out without a turn of the file system's journal, which would cost as much again.  On a
 * full disk the log grows batch by batch. */
static void extend(struct log *log, uint64_t end)
{
	static const char zeroes[TAIL_BYTES];
	struct stat found;

	fd_write(log->fd, zeroes, sizeof(zeroes), end);
	log->room = fstat(log->fd, &found) ? end : (uint64_t)found.st_size;
}

static int apply(struct log *log, uint64_t size, const struct ranges *ranges)
{
	int err = log->state->size == size ? 0 : segmap_resize(log->state, size);

	return err ? err : segmap_set_ranges(log->state, ranges, log->data);
}

int log_append(struct log *log, uint64_t size, const struct ranges *ranges)
{
	unsigned char *batch;
	size_t length;
	int err;

	batch = encode(log->sequence + 1, size, ranges, &length);
	if (!batch)
		return -ENOMEM;
	err = fd_write(log->fd, batch, length, log->end);
	free(batch);
	if (!err && log->end + length > log->room)
		extend(log, log->end + length);
	if (!err && fdatasync(log->fd))
		err = -errno;
	if (err) {
		log_cut(log);   /* what is there of it must not be taken for a damaged batch */
		return err;
	}
	log->end += length;
	log->sequence++;
	log->size = size;
	err = apply(log, size, ranges);
	if (err)
		atomic_store(&log->lost, true);   /* it says more than we know */
	return err;
}

int log_replace(struct log *log, int fd, uint64_t end)
{
	int mine = fcntl(fd, F_DUPFD_CLOEXEC, 3);

	if (mine < 0)
		return -errno;
	close(log->fd);
	log->fd = mine;
	log->end = log->room = end;
	log->sequence = 1;
	return 0;
}

/* ---- one at a time ---- */

void log_hold(struct log *log)
{
	pthread_mutex_lock(&log->lock);
	log->held++;
	while (log->busy)
		pthread_cond_wait(&log->idle, &log->lock);
	pthread_mutex_unlock(&log->lock);
}

void log_release(struct log *log)
{
	pthread_mutex_lock(&log->lock);
	if (log->held)
		log->held--;
	pthread_mutex_unlock(&log->lock);
}

/* False: Python holds it, and whoever comes now waits there for what it does. */
static bool begin(struct log *log)
{
	bool mine;

	pthread_mutex_lock(&log->lock);
	while (log->busy && !log->held)
		pthread_cond_wait(&log->idle, &log->lock);
	mine = !log->held;
	if (mine)
		log->busy = true;
	pthread_mutex_unlock(&log->lock);
	return mine;
}

static void end(struct log *log)
{
	pthread_mutex_lock(&log->lock);
	log->busy = false;
	pthread_cond_broadcast(&log->idle);
	pthread_mutex_unlock(&log->lock);
}

static bool is_for_python(struct log *log, struct segmap *dirty)
{
	return atomic_load(&log->lost) || atomic_load(&dirty->unsettled) ||
	       dirty->size != log->size ||
	       (log->end > COMPACT_BYTES &&
		log->end > (uint64_t)COMPACT_SLACK * RECORD_BYTES * segmap_count(log->state));
}

bool log_is_named(const struct log *log)
{
	struct stat found;

	return fstat(log->fd, &found) == 0 && found.st_nlink &&
	       fstat(log->data->fd, &found) == 0 && found.st_nlink;
}

static int commit(struct log *log, struct segmap *dirty)
{
	struct ranges taken;
	int err;

	/* What is below again is Python's: its space is given back afterwards. */
	if (is_for_python(log, dirty) || !log_is_named(log) || segmap_take_own(dirty, &taken))
		return 0;
	err = fdatasync(log->data->fd) ? -errno : 0;
	if (err)   /* Linux tells of it once, and takes the pages for clean from then on */
		atomic_store(&log->lost, true);
	else if (taken.n)
		err = log_append(log, log->size, &taken);
	/* If it is put back it stays unsettled, so that whoever comes next asks Python. */
	if (!err)
		segmap_settle(dirty);
	else if (segmap_fill_ranges(dirty, &taken, log->data))
		atomic_store(&log->lost, true);
	ranges_free(&taken);
	if (!err)
		atomic_fetch_add_explicit(&log->commits, 1, memory_order_relaxed);
	return !err;
}

int log_commit(struct log *log, struct segmap *dirty)
{
	int done = 0;

	if (begin(log)) {
		done = commit(log, dirty);
		end(log);
	}
	return done;
}
