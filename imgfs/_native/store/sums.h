/* Checksums of a whole store's blocks, in a file beside it.
 *
 * At 4*n of that file stands the sum of block n, of 4 KiB, or 0: it has none.  A sum is the CRC-32C
 * of the file's key, the block's number, and its bytes, with zeroes behind the end of the disk; so
 * a block, or a sum, that came to lie elsewhere is noticed too.
 *
 *     written ---> fresh (0 in the file) ---> sealed (its sum is in the file) ---> written again
 *
 * A sum is set to 0 before its block's bytes change, in the page cache: so after kill -9 each that
 * is not 0 is right.  It is computed later, from the file: when the layer is closed, and meanwhile
 * of what nobody has written for some seconds.
 *
 * What is known of the blocks is kept by regions, of as many blocks as have their sums in a page.
 * Who writes holds a region shared, who sets sums to 0 or writes them holds it alone: so a sum is
 * never one of bytes that changed since.  Who reads holds nothing, unless a sum disagrees.
 */
#ifndef IMGFS_SUMS_H
#define IMGFS_SUMS_H

#include "store.h"

#define SUM_BLOCK 4096u
#define SUM_SHIFT 12
#define REGION_BLOCKS 1024u
#define REGION_BYTES ((uint64_t)REGION_BLOCKS * SUM_BLOCK)
#define REGION_WORDS (REGION_BLOCKS / 64)

struct region {
	pthread_rwlock_t lock;
	uint64_t number;
	struct region *next;         /* in the list of those that have something fresh */
	atomic_bool listed;
	bool loaded;                 /* `summed` is what the file says; under the lock */
	atomic_uint changes;         /* counted whenever a block or a sum changes, under the lock */
	atomic_uint stamp;           /* when a block was written last, in ticks */
	_Atomic uint64_t summed[REGION_WORDS];     /* the sum in the file is not 0 */
	_Atomic uint64_t verified[REGION_WORDS];   /* compared, or written by us, since it was opened */
	_Atomic uint64_t fresh[REGION_WORDS];      /* written by us, and not sealed */
};

struct sums {
	int fd;
	atomic_bool writable;
	atomic_int trust;            /* enum sums_trust */
	uint64_t key;
	char *name, *closed;         /* of the store's file, and of the one that says so; see closing.py */
	_Atomic(void *) top;         /* the regions, by three levels of tables */
	_Atomic(struct region *) listed;
	pthread_mutex_t sealing;
	atomic_bool changed;         /* the file, since it was asked */
	atomic_uint_fast64_t accepted;
	void (*expects)(void *of, uint64_t block, uint64_t *bits);
	void *of;
};

/* ---- regions; sums.c ---- */

struct region *sums_find(struct sums *s, uint64_t number);
/* The same, made if need be; NULL: no memory. */
struct region *sums_region(struct sums *s, uint64_t number);
/* The first one from this number on that there is in memory. */
struct region *sums_next(struct sums *s, uint64_t number);

/* Bits [first, last) of a region. */
bool bits_all(_Atomic uint64_t *words, unsigned first, unsigned last);
bool bits_any(_Atomic uint64_t *words, unsigned first, unsigned last);
void bits_set(_Atomic uint64_t *words, unsigned first, unsigned last);
void bits_clear(_Atomic uint64_t *words, unsigned first, unsigned last);

static inline bool bit_at(_Atomic uint64_t *words, unsigned bit)
{
	return atomic_load(&words[bit / 64]) >> (bit % 64) & 1;
}

/* ---- sums; sums.c ---- */

/* Of `n` blocks, one behind the other in memory; the last one may end early, and is padded. */
void sums_compute(const struct sums *s, uint64_t block, size_t n, const char *bytes, size_t length,
		  uint32_t *to);
int sums_read(struct sums *s, uint64_t block, size_t n, uint32_t *to, bool nowait);
int sums_write(struct sums *s, uint64_t block, size_t n, const uint32_t *from);
int sums_zero(struct sums *s, uint64_t block, size_t n);
/* The file's bytes of a range that begins with a block; what lies behind its end is zero. */
int sums_content(struct store *st, uint64_t block, char *to, size_t length, bool nowait);

/* ---- with a region held alone; sumsread.c ---- */

int region_load(struct store *st, struct region *r);
/* Compare a block with its sum, unless that was done.  0: it is verified.  Else -STORE_DAMAGED, or what
 * reading it gave. */
int region_settle(struct store *st, struct region *r, unsigned bit);
/* It has something fresh.  No lock is needed. */
void region_list(struct sums *s, struct region *r);
/* The blocks have been written, by us. */
void region_written(struct sums *s, struct region *r, unsigned first, unsigned last);

/* ---- sumsread.c ---- */

int sums_pread(struct store *st, char *to, uint64_t length, uint64_t offset, bool nowait);
bool sums_verified(struct store *st, uint64_t offset, uint64_t length);

/* ---- sumswrite.c ---- */

int sums_change(struct store *st, uint64_t offset, uint64_t length, store_io *io, void *arg);
int sums_punch(struct store *st, uint64_t offset, uint64_t length);

void sums_free(struct sums *s);

#endif
