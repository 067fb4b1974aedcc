/* The end of a layer's log: batches are appended here, by Python and by native commits.
 *
 * imgfs/overlays/__init__.py describes the file, imgfs/overlays/log.py reads it.  Who appends, or
 * replaces the file, does it alone: a native commit is `busy`, Python holds the log meanwhile.
 */
#ifndef IMGFS_LOG_H
#define IMGFS_LOG_H

#include "segmap.h"

struct log {
	atomic_uint refs;
	pthread_mutex_t lock;      /* of busy and held */
	pthread_cond_t idle;
	bool busy;                 /* a native commit is under way */
	unsigned held;             /* by Python: no native commit begins */
	int fd;
	struct store *data;        /* the layer's bytes */
	struct segmap *state;      /* what the log says */
	_Atomic uint64_t size;     /* of the disk, as it says */
	_Atomic uint64_t end;      /* of its batches */
	uint64_t room;             /* up to there the file has blocks already */
	_Atomic uint64_t sequence; /* the last batch's */
	atomic_bool lost;          /* what was written may be gone */
	atomic_uint_fast64_t commits;   /* native ones */
};

/* Of these files and maps, which it takes references to; errno at NULL.  `size`: what `state` has. */
struct log *log_new(int fd, struct store *data, struct segmap *state, uint64_t end, uint64_t room,
		    uint64_t sequence);
struct log *log_ref(struct log *log);
void log_unref(struct log *log);

/* A batch of these ranges, of any kind that segmap_set_ranges takes, durable and in `state`.
 * 0, or -errno and the log is as it was, or `lost`. */
int log_append(struct log *log, uint64_t size, const struct ranges *ranges);
/* Take away what is behind the last batch.  0 or -errno. */
int log_cut(struct log *log);
/* From now on another file, which has one batch, up to `end`.  0 or -errno. */
int log_replace(struct log *log, int fd, uint64_t end);

/* Returns when no native commit is under way; none begins before as many releases. */
void log_hold(struct log *log);
void log_release(struct log *log);

/* Have its files names?  What is made durable in others is gone with the process. */
bool log_is_named(const struct log *log);

/* All that is in `dirty` is durable.  1: it is.  0: Python must do it, and says what is wrong. */
int log_commit(struct log *log, struct segmap *dirty);

#endif
