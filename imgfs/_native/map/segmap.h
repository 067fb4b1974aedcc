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

/* SEG_BELOW is only in a `dirty`: the range is not the target's any more. */
enum seg_kind { SEG_ASK, SEG_ZERO, SEG_LITERAL, SEG_STORE, SEG_BELOW };
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

/* What a native write marks. */
#define SEG_BLOCK 4096u

#define CHUNK_SEGS 256

struct log;

struct chunk {
	unsigned n, cap;       /* cap grows to CHUNK_SEGS: most maps are of files nobody opens */
	struct seg segs[];
};

struct segmap {
	_Atomic uint64_t size;
	pthread_rwlock_t lock;
	struct chunk **chunks;
	uint64_t *firsts;      /* the start of each chunk's first segment */
	size_t n_chunks, cap_chunks;
	size_t count;
	struct store **stores; /* every store that is named, and NULL where one was replaced */
	unsigned n_stores;
	atomic_uint refs;
	/* Of the requests answered from here; the waited ones were parked for blocks first. */
	atomic_uint_fast64_t reads, reads_waited, bytes_served;
	atomic_uint_fast64_t writes, bytes_written;
	atomic_uint_fast64_t changes;       /* of any kind, through any of the functions for writing */
	/* Who writes the target's bytes holds this shared; who takes them away, or changes which
	 * file is the target, holds it alone.  Taken before `lock`, and held during I/O. */
	pthread_rwlock_t write_lock;
	_Atomic(struct store *) target;     /* where native writes go; NULL: nowhere; one of stores */
	uint16_t target_index, dirty_index; /* the target's in stores, and in dirty->stores */
	struct segmap *dirty;               /* what was written since it was taken; may be NULL */
	struct log *log;                    /* which is told of that; may be NULL */
	atomic_bool unsettled; /* of a `dirty`: what was taken, or a new size, is not safe yet */
};

/* What a map's lock is released for, so that readers get in. */
#define FILL_BATCH 1024

/* Ranges that were taken or are to be filled in: n of each. */
struct ranges {
	uint64_t *starts, *ends;
	uint8_t *kinds;
	size_t n;
};

struct seg_view {
	uint64_t start, end;
	uint8_t kind, seek;
};

/* A run of bytes of one origin: that of a list of stores which has it at its own offset, or one of
 * these. */
enum { ORIGIN_OTHER = -1, ORIGIN_ZERO = -2 };

struct origin {
	uint64_t start, end;
	int which;
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
 * ASK so does this one.  fill: but only where this one says ASK.  The maps differ. */
int segmap_copy(struct segmap *to, uint64_t start, struct segmap *from, uint64_t from_start,
		uint64_t length, bool fill);

/* The conditional ones: they replace only what is SEG_ASK, so that what Python found out is
 * never put over what was written meanwhile.  What lies beyond the map's end is left out. */
int segmap_fill(struct segmap *map, uint64_t start, uint64_t end, enum seg_kind kind,
		enum seg_seek seek);
int segmap_fill_store(struct segmap *map, uint64_t start, uint64_t end, struct store *st,
		      uint64_t store_offset, enum seg_seek seek);
int segmap_fill_literal(struct segmap *map, uint64_t start, const void *bytes, uint64_t length,
			enum seg_seek seek);
/* SEG_ZERO, or SEG_STORE in `st` at the range's own offset. */
int segmap_fill_ranges(struct segmap *map, const struct ranges *ranges, struct store *st);
/* Replaces whatever is there, by what segmap_fill_ranges takes, or SEG_ASK. */
int segmap_set_ranges(struct segmap *map, const struct ranges *ranges, struct store *st);
/* What is not SEG_ASK; the arrays are malloc'ed.  0 or -ENOMEM. */
int segmap_ranges(struct segmap *map, struct ranges *found);
/* Whatever is in `from` is at the same place in `to`: the map names `from` no more.  -EINVAL: `to`
 * is too short, or `from` is the target. */
int segmap_replace_store(struct segmap *map, struct store *from, struct store *to);

/* ---- writing ---- */

/* Returns when no write to the target so far is under way; a commit to its log may be. */
int segmap_set_target(struct segmap *map, struct store *st, struct segmap *dirty, struct log *log);
/* The range becomes the target's.  1: done.  0: no target, or it begins or ends inside a block
 * that is not the target's.  -EINVAL: outside of the map.  Other -errno: the file's, and neither
 * the map nor the account of what is dirty has changed. */
int segmap_write(struct segmap *map, uint64_t offset, uint64_t length, const void *buf);
/* The same with the next bytes of a pipe.  0, -EINVAL: none of them are taken; other -errno: some. */
int segmap_write_from(struct segmap *map, uint64_t offset, uint64_t length, int pipe);
/* What the target's file has there, whether it is the map's or not.  0 or -errno. */
int segmap_read_target(struct segmap *map, uint64_t offset, uint64_t length, void *buf);
/* The old bytes of whole blocks become the target's, except what is by now, and zero where the
 * map says so by now.  Results as of segmap_write. */
int segmap_copy_up(struct segmap *map, uint64_t start, uint64_t length, const void *old);
/* Whole blocks become zero, and a hole.  Results as of segmap_write. */
int segmap_zero(struct segmap *map, uint64_t start, uint64_t end);
/* Whole blocks become what `lower` says, and are SEG_BELOW in `dirty`.  The target's bytes stay in its
 * file, until segmap_reclaim.  Results as of segmap_write; -ENOMEM: a first part is done. */
int segmap_below(struct segmap *map, uint64_t start, uint64_t end, struct segmap *lower);
/* Gives back the space that a range has in the store's file, but for what `dirty` says is newer; the
 * file's mtime stays.  0 or -errno. */
int segmap_reclaim(struct segmap *map, uint64_t start, uint64_t end, struct store *st,
		   struct segmap *dirty);
/* How many bytes, from a range's beginning, are in stores now. */
uint64_t segmap_stored(struct segmap *map, uint64_t offset, uint64_t length);
/* Copies from file to file as much of a range from its beginning as is in `from`'s stores: whole blocks
 * of this map become the target's.  1: *moved bytes are, perhaps none.  Other results as of segmap_write:
 * nothing is. */
int segmap_move(struct segmap *map, uint64_t offset, struct segmap *from, uint64_t from_offset,
		uint64_t length, uint64_t *moved);
/* One more change is counted; all that change something count it themselves. */
void segmap_changed(struct segmap *map);
/* Grows by zeroes, or cuts.  0 or -errno. */
int segmap_resize(struct segmap *map, uint64_t size);
/* The target's file is on its disk, and its log says what is in `dirty`.  1: done.  0: there is
 * more, or no target or log, or something is wrong, of which the log tells Python. */
int segmap_sync(struct segmap *map);
/* Of a `dirty`: what was taken from it is safe, or put back. */
void segmap_settle(struct segmap *dirty);
/* Makes all SEG_ASK, and gives what was not; *taken's arrays are malloc'ed.  0 or -ENOMEM with
 * nothing changed. */
int segmap_take(struct segmap *map, struct ranges *taken);
/* The same, or -EAGAIN with nothing changed: some of it is SEG_BELOW. */
int segmap_take_own(struct segmap *map, struct ranges *taken);
void ranges_free(struct ranges *ranges);

/* How segmap_read may wait for disks. */
enum seg_wait { SEG_WAIT, SEG_NOWAIT };

#define SEG_COMING 2

/* 1: buf holds the bytes.  0: only Python knows.  SEG_COMING: blocks are on their way, and what is
 * not has been seen to be local up to there.  -EAGAIN: a disk would have to be waited for
 * (SEG_NOWAIT only).  Other -errno: the store's file failed. */
int segmap_read(struct segmap *map, uint64_t offset, uint64_t length, char *buf,
		enum seg_wait wait);

/* The same bytes in the pipe `pipe`, the stores' by reference: they are copied once, by `take`, which
 * is called as soon as all are in it, and before anybody may take them away.  `buf` has room for all of
 * them, and is for what is in no store; the pipe does not block.  May wait for disks.  1: `take` was
 * called and said so.  Else the pipe may hold some of the bytes; -errno: they cannot be put there. */
int segmap_splice(struct segmap *map, uint64_t offset, uint64_t length, char *buf, int pipe,
		   bool (*take)(void *arg), void *arg);

/* 1: *found is lseek's answer, a multiple of SEG_BLOCK, `offset` itself or the end.  0: only Python knows.
 * -ENXIO, -EINVAL. */
int segmap_seek(struct segmap *map, int64_t offset, int whence, uint64_t *found);
/* The same of a file that ends at `size`, if that is before the map's end.  complete: what is unknown is data. */
int segmap_seek_in(struct segmap *map, int64_t offset, int whence, uint64_t size, bool complete,
		   uint64_t *found);

/* Up to `max` segments from `offset` on; returns how many. */
size_t segmap_segments(struct segmap *map, uint64_t offset, uint64_t end, struct seg_view *out,
		       size_t max);
/* Whose bytes those from `offset` on are: up to `max` runs, which may end before `end`; returns how many. */
size_t segmap_origins(struct segmap *map, uint64_t offset, uint64_t end, struct store *const *stores,
		      size_t n_stores, struct origin *out, size_t max);
/* The first byte of [start, end) of which nothing is known; else `end`. */
uint64_t segmap_next_unknown(struct segmap *map, uint64_t start, uint64_t end);
/* [offset, end) as lseek sees it: holes, and the rest.  0 or -errno; the arrays are the caller's to
 * free either way. */
int segmap_extents(struct segmap *map, uint64_t offset, uint64_t end, struct scan *out);
size_t segmap_count(struct segmap *map);
uint64_t segmap_data_bytes(struct segmap *map);

#endif
