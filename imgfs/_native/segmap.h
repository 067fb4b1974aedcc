/* The segment map: [0, size) cut into segments, each of which says where its bytes are
 * and what lseek calls it.
 *
 * Segments stand in an array of chunks (a tree of height two), found by two binary searches.
 * They are contiguous, covering and coalesced: a segment's end is the next one's start.
 * One rwlock; no I/O under it, so that a publisher waits only for other look-ups.
 */
#ifndef IMGFS_SEGMAP_H
#define IMGFS_SEGMAP_H

#include "scan.h"
#include "store.h"

enum seg_kind { SEG_ASK, SEG_ZERO, SEG_LITERAL, SEG_STORE };
enum seg_seek { SEEK_IS_DATA, SEEK_IS_HOLE, SEEK_IS_UNKNOWN };

struct literal {
	atomic_uint refs;
	uint64_t base;         /* where in the map its first byte was published */
	char bytes[];
};

struct seg {
	uint64_t start;
	union {
		uint64_t offset;           /* SEG_STORE: of start, in the store */
		struct literal *literal;   /* SEG_LITERAL */
	};
	uint16_t store;            /* SEG_STORE: index in segmap.stores */
	uint8_t kind;
	uint8_t seek;
};

/* A watched range: a read that touches it is told to whoever waits on the map's eventfd, once.
 * So a sequential reader whose reads are all answered here can still be fetched ahead for. */
#define MAX_WATCHES 8
#define NO_WATCH UINT64_MAX

struct watch {
	atomic_uint_fast64_t start, end;   /* start is NO_WATCH when the slot is free */
};

#define CHUNK_SEGS 256

struct chunk {
	unsigned n;
	struct seg segs[CHUNK_SEGS];
};

struct segmap {
	uint64_t size;
	pthread_rwlock_t lock;
	struct chunk **chunks;
	uint64_t *firsts;      /* the start of each chunk's first segment */
	size_t n_chunks, cap_chunks;
	size_t count;
	struct store **stores; /* every store ever named; released with the map */
	unsigned n_stores;
	atomic_uint refs;
	/* Of the requests answered from here; the waited ones were parked for blocks first. */
	atomic_uint_fast64_t reads, reads_waited, bytes_served;
	struct watch watches[MAX_WATCHES];
	atomic_uint watching;  /* a bit for each slot in use */
	atomic_uint seen;      /* a bit for each slot whose range was read */
	int watch_fd;          /* eventfd, or -1 */
};

struct seg_view {
	uint64_t start, end;
	uint8_t kind, seek;
};

struct segmap *segmap_new(uint64_t size);
struct segmap *segmap_ref(struct segmap *map);
void segmap_unref(struct segmap *map);

/* All of these: 0, or -ENOMEM / -EINVAL (a range outside of the map) with nothing changed. */
int segmap_set(struct segmap *map, uint64_t start, uint64_t end, enum seg_kind kind,
	       enum seg_seek seek);
int segmap_set_store(struct segmap *map, uint64_t start, uint64_t end, struct store *st,
		     uint64_t store_offset, enum seg_seek seek);
int segmap_set_literal(struct segmap *map, uint64_t start, const void *bytes, uint64_t length,
		       enum seg_seek seek);
int segmap_load(struct segmap *map, const uint64_t *ends, const uint8_t *flags, size_t n,
		struct store *st);

/* What `from` says now of [from_start, from_start + length), at `start` of this map.  Where it says
 * ASK so does this one.  The maps differ. */
int segmap_copy(struct segmap *to, uint64_t start, struct segmap *from, uint64_t from_start,
		uint64_t length);

/* How segmap_read may wait for disks. */
enum seg_wait { SEG_WAIT, SEG_NOWAIT };

#define SEG_COMING 2

/* 1: buf holds the bytes.  0: only Python knows.  SEG_COMING: blocks are on their way, and what is
 * not has been seen to be local up to there.  -EAGAIN: a disk would have to be waited for
 * (SEG_NOWAIT only).  Other -errno: the store's file failed. */
int segmap_read(struct segmap *map, uint64_t offset, uint64_t length, char *buf,
		enum seg_wait wait);

/* 1: *found is lseek's answer.  0: only Python knows.  -ENXIO, -EINVAL. */
int segmap_seek(struct segmap *map, int64_t offset, int whence, uint64_t *found);

/* The eventfd, made at the first call, or -errno. */
int segmap_watch_fd(struct segmap *map);
/* start == NO_WATCH frees the slot. */
void segmap_watch(struct segmap *map, unsigned slot, uint64_t start, uint64_t end);
/* The slots whose ranges were read since the last call; each fires once. */
unsigned segmap_take_seen(struct segmap *map);

/* Up to `max` segments from `offset` on; returns how many. */
size_t segmap_segments(struct segmap *map, uint64_t offset, uint64_t end, struct seg_view *out,
		       size_t max);
/* [offset, end) as lseek sees it: holes, and the rest.  0 or -errno; the arrays are the caller's to
 * free either way. */
int segmap_extents(struct segmap *map, uint64_t offset, uint64_t end, struct scan *out);
size_t segmap_count(struct segmap *map);
uint64_t segmap_data_bytes(struct segmap *map);

#endif
