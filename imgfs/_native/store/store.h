/* A block store: one file, blocks of a power of two, each present or not.
 *
 * Readers never lock.  A reader enters (store_enter), only then looks at the present
 * bits, reads the file, and leaves.  Who takes a block away clears its bit first and then
 * calls store_quiesce, which returns when all who entered before have left: later ones
 * see the cleared bit.  Only after that may the bytes be punched or written anew.
 */
#ifndef IMGFS_STORE_H
#define IMGFS_STORE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

/* A watched range: a read that touches it, through whatever map, is told to whoever waits on the
 * store's eventfd, once.  So who reads in sequence, and finds all of it here, can still be fetched
 * ahead for. */
#define MAX_WATCHES 32
#define NO_WATCH UINT64_MAX

struct watch {
	atomic_uint_fast64_t start, end;   /* start is NO_WATCH when the slot is free */
};

/* Bytes of the file's range [start, end) that are in memory instead; `owner` is who holds them. */
#define MAX_HELD 128
#define ANY_HELD UINT64_MAX

struct held {
	uint64_t start, end;
	const char *bytes;
	void *owner;
	atomic_uint_fast64_t served;   /* how many of them were read */
};

struct sums;

struct store {
	int fd;                /* -1: none yet, or none any more */
	atomic_bool is_away;   /* of a whole store: its file is closed for now, and nothing is here */
	struct sums *sums;     /* of a whole store's blocks, if they have any; sums.h */
	bool whole;            /* every block present for good; bits and stamps are NULL */
	unsigned block_shift;
	_Atomic uint64_t size;      /* bytes; only of a whole store does it ever change */
	_Atomic uint64_t blocks;
	_Atomic uint64_t *bits;
	_Atomic uint64_t *coming;   /* absent, but somebody is about to make them present */
	_Atomic uint32_t *stamps;   /* when each block was last used, in ticks of 16 ms */
	atomic_size_t present;
	atomic_uint_fast64_t bytes_served;
	atomic_uint refs;
	atomic_uint epoch;
	atomic_uint readers[2];     /* who entered in an even and in an odd epoch */
	pthread_mutex_t quiesce_lock;
	struct watch *_Atomic watches;   /* MAX_WATCHES of them, from when one is set */
	atomic_uint watching;       /* a bit for each slot in use */
	atomic_uint seen;           /* a bit for each slot whose range was read */
	atomic_int watch_fd;        /* eventfd, or -1 */
	pthread_rwlock_t held_lock; /* of `held`; held for no longer than it takes to copy a read */
	atomic_uint n_held;
	struct held *held;          /* MAX_HELD of them, from when one is set */
};

/* The fd is duplicated; -1: there is no file yet, and no block is present before store_attach.  NULL
 * with errno set on failure. */
struct store *store_new(int fd, uint64_t size, uint64_t block_size, bool whole);
struct store *store_ref(struct store *st);
void store_unref(struct store *st);

unsigned store_enter(struct store *st);
void store_leave(struct store *st, unsigned token);
void store_quiesce(struct store *st);

/* Only of a whole store: -EINVAL otherwise.  Its file is the caller's to truncate. */
int store_resize(struct store *st, uint64_t size);

/* From now on the blocks are in this file, which is duplicated.  0, or -errno; -EINVAL when there
 * are blocks in another already.  Of a whole store it must be the file that was detached. */
int store_attach(struct store *st, int fd);
/* Close the file, if nobody reads it just now; false: somebody does, or there are blocks in it.  Until a
 * whole store is attached again store_covers says that nothing is here. */
bool store_detach(struct store *st);

/* After store_enter: are all blocks of [offset, offset+length) present, or what of them is in the
 * range held in memory?  Marks them used. */
bool store_covers(struct store *st, uint64_t offset, uint64_t length);
bool store_block_present(const struct store *st, uint64_t block);
/* Is what the range has of this block present, or held in memory? */
bool store_is_here(struct store *st, uint64_t block, uint64_t offset, uint64_t end);
uint64_t store_set(struct store *st, uint64_t first, uint64_t count);
uint64_t store_clear(struct store *st, uint64_t first, uint64_t count);

/* These blocks will be present, or settled as absent: a reader may wait for that.  So whoever calls
 * this must call store_settle for all of them afterwards, whatever went wrong in between: who
 * waits for a block that stays `coming` waits for ever. */
void store_set_coming(struct store *st, uint64_t first, uint64_t count);
/* They are not coming any more: present by now, or not.  Tells `store_settled_hook`. */
void store_settle(struct store *st, uint64_t first, uint64_t count);
/* Are all blocks of the range that are absent, and not held, on their way? */
bool store_is_coming(struct store *st, uint64_t offset, uint64_t length);
/* Who waits for blocks that come; set once, before any thread does. */
extern void (*store_settled_hook)(void);

/* The eventfd, made at the first call, or -errno. */
int store_watch_fd(struct store *st);
/* start == NO_WATCH frees the slot.  0, or -ENOMEM. */
int store_watch(struct store *st, unsigned slot, uint64_t start, uint64_t end);
/* The slots whose ranges were read since the last call; each fires once. */
unsigned store_take_seen(struct store *st);
/* The range was read. */
void store_tell(struct store *st, uint64_t offset, uint64_t length);

/* Up to `count` present blocks, least recently used first chosen, then in ascending order.
 * The array is malloc'ed; NULL with *found == 0 when there is none, or no memory. */
uint64_t *store_oldest(struct store *st, size_t count, size_t *found);
/* Ticks since the least recently used present block was used; -1 when none is present. */
int64_t store_oldest_age(struct store *st);

/* Read the range from memory while its blocks are absent: the bytes are the caller's until it has
 * them back.  False: there are too many ranges already.  storeheld.c. */
bool store_hold(struct store *st, uint64_t start, const void *bytes, uint64_t length, void *owner);
/* Takes a range away that was given so, or with ANY_HELD any one; the owner, or NULL when there is none.  When
 * it returns nobody reads the bytes any more. */
void *store_unhold(struct store *st, uint64_t start, uint64_t end);
bool store_held_covers(struct store *st, uint64_t offset, uint64_t end);
/* How many bytes of a range that was given so were not read yet. */
uint64_t store_held_left(struct store *st, uint64_t start, uint64_t end);

/* After store_enter and store_covers: the range's bytes, from the file or from memory.  As store_pread;
 * -ENODATA when a range is not held any more: ask again. */
int store_read_here(struct store *st, void *buf, uint64_t length, uint64_t offset, bool nowait);

/* The same in a pipe, by reference; the pipe does not block.  -ENODATA: it would be from both.
 * When the bytes are out of the pipe, call store_spliced if *locked. */
int store_splice_here(struct store *st, int pipe, uint64_t length, uint64_t offset, bool *locked);
void store_spliced(struct store *st);
/* 0 or -errno. */
int splice_memory(const char *from, uint64_t length, int pipe);

/* 0, or -errno; -EIO when the file is shorter than that.  nowait: -EAGAIN instead of
 * waiting for a disk (and the bytes so far are lost, the caller reads again). */
int store_pread(struct store *st, void *buf, uint64_t length, uint64_t offset, bool nowait);
/* The same, whatever its sums say. */
int store_pread_file(struct store *st, void *buf, uint64_t length, uint64_t offset, bool nowait);
/* The file's bytes in a pipe, by reference; the pipe does not block.  0 or -errno. */
int store_splice(struct store *st, int pipe, uint64_t length, uint64_t offset);
/* The pipe's next bytes, by reference, go into the file.  0 or -errno; then some of them may be left; -EINVAL: all
 * are, and may be read and written. */
int store_write_from(struct store *st, int pipe, uint64_t length, uint64_t offset);
/* Are these bytes all zero? */
bool all_zero(const void *buf, size_t length);
/* All of the bytes, by pwrite(2).  0 or -errno. */
int fd_write(int fd, const void *buf, uint64_t length, uint64_t offset);
int store_pwrite(struct store *st, const void *buf, uint64_t length, uint64_t offset);
/* The same in a store_io. */
int store_pwrite_file(struct store *st, const void *buf, uint64_t length, uint64_t offset);
/* Gives the range's disk space back: it reads as zeroes.  0 or -errno. */
int store_punch(struct store *st, uint64_t length, uint64_t offset);
/* The file's mtime becomes this, or the time now.  0 or -errno. */
int store_set_mtime(struct store *st, struct timespec mtime);
int store_touch(struct store *st);

/* Change the range's bytes, wherever they come from: `io` does it, perhaps in parts that follow each other. */
typedef int store_io(struct store *st, uint64_t length, uint64_t offset, void *arg);
int store_change(struct store *st, uint64_t length, uint64_t offset, store_io *io, void *arg);

/* Memory that costs nothing until it is touched; NULL: there is none. */
void *table_new(size_t bytes);
/* Now, in ticks of 16 ms. */
uint32_t store_ticks(void);

/* ---- sums: all of these are of a whole store.  Without sums they do nothing. ---- */

/* What reading or changing a block gives that does not fit its sum.  store_damage says which. */
#define STORE_DAMAGED EUCLEAN

/* What a sum that is 0, or disagrees, says.  STRICT: damage.  KILLED: 0 is a block that was not sealed.
 * DOUBT: the machine went down, and anything can be of before. */
enum sums_trust { SUMS_STRICT, SUMS_KILLED, SUMS_DOUBT };

struct sums_given {
	int fd;                  /* duplicated */
	uint64_t key;
	const char *name;        /* of the store's file, for people */
	const char *closed;      /* while there is no such file somebody else writes it */
	enum sums_trust trust;
	bool writable;
};

/* 0 or -errno. */
int store_sums_attach(struct store *st, const struct sums_given *given);
/* `expects` sets the bits of those of 1024 blocks from this one on that must have a sum. */
void store_sums_expect(struct store *st, void (*expects)(void *of, uint64_t block, uint64_t *bits),
		       void *of);
/* Compare all blocks of the range that have not been compared yet.  0, -STORE_DAMAGED, or -errno. */
int store_verify(struct store *st, uint64_t length, uint64_t offset);
/* Before the disk is made shorter: the last block will be another one.  As store_verify. */
int store_sums_before_cut(struct store *st, uint64_t size);
/* After it: drop the sums of what lies beyond.  0 or -errno. */
int store_sums_cut(struct store *st, uint64_t size);
/* Seal what was written at least so many ticks ago, of at most so many regions.  The number of blocks, or
 * -errno. */
int64_t store_seal(struct store *st, uint32_t age, unsigned regions);
/* Is nothing left to be sealed? */
bool store_is_sealed(const struct store *st);
/* What of the range has no sum is to be sealed, too; in DOUBT what disagrees is.  As store_verify. */
int store_sums_renew(struct store *st, uint64_t length, uint64_t offset);
/* All is sealed, and we write no more: from now on it is read as what was closed. */
void store_sums_done(struct store *st);
/* How many blocks of before were accepted in DOUBT though their sums disagree. */
uint64_t store_sums_accepted(struct store *st);
/* Force the sums out, if there is something.  0 or -errno. */
int store_sums_sync(struct store *st);
/* The name of the file, and where; of the call of this thread that gave STORE_DAMAGED last.  NULL: none. */
const char *store_damage(uint64_t *offset);

#endif
