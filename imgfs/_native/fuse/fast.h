/* Shared state of the interposer: the queue towards pyfuse3, and the request threads.
 *
 * A request thread reads a request from /dev/fuse and either answers it (requests.c) or puts
 * it on the queue (queue.c), from which pyfuse3's own loop takes it, because the functions
 * of libfuse that it calls for that are ours (interpose.c).
 */
#ifndef IMGFS_FAST_H
#define IMGFS_FAST_H

#define FUSE_USE_VERSION 314

#include <fuse_lowlevel.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "api.h"

#define MAX_THREADS 32
/* Of one READ or WRITE, bytes.  Who is not root may have pipes of 256 pages at most, in which the answer to a
 * READ of a MiB has no place for its header. */
#define MAX_PAYLOAD (512u << 10)
#define HEADER_ROOM 8192
#define MAX_REQUEST (MAX_PAYLOAD + HEADER_ROOM)

/* ---- interpose.c ---- */

enum hook { HOOK_NEW = 1, HOOK_FD = 2, HOOK_RECEIVE = 4, HOOK_DIRENT = 8 };

extern atomic_bool armed;
extern atomic_uint hooks_called;
extern struct fuse_session *session;
extern unsigned max_background;      /* asked of the kernel in INIT */
extern atomic_uint max_write;        /* learnt from INIT; bytes */
extern uint64_t current_unique;      /* of the request that pyfuse3 took last */
extern uint32_t current_pid;         /* the thread that it is for; 0: in no namespace of ours */
extern bool current_dsync;           /* it is a WRITE that must be on the disk when it is answered */

/* Is each of them what an object that is loaded from now on binds to?  A libfuse that was loaded for all
 * before (LD_PRELOAD) would be found first. */
bool is_interposed(void);
int real_session_fd(struct fuse_session *se);
/* Implemented by fusemodule.c: hand an operation that pyfuse3 lacks to Python. */
void extra_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence, struct fuse_file_info *fi);
void extra_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length,
		     struct fuse_file_info *fi);
void extra_copy_file_range(fuse_req_t req, fuse_ino_t ino_in, off_t off_in,
			   struct fuse_file_info *fi_in, fuse_ino_t ino_out, off_t off_out,
			   struct fuse_file_info *fi_out, size_t len, int flags);

/* ---- queue.c ---- */

struct request {
	struct request *next;
	uint64_t unique;
	size_t size;
	char *mem;                   /* malloc'ed; passes to pyfuse3's buffer */
};

struct request *request_copy(const void *buf, size_t size);   /* NULL: no memory */
void request_free(struct request *rq);

struct waiting {
	uint64_t unique;
	uint32_t pid;                /* of the thread that it is for */
};

struct interrupt {
	uint64_t target, unique;     /* the request meant, and the INTERRUPT's own */
};

int queue_open(void);                /* 0 or -errno */
void queue_close(void);
int queue_event_fd(void);            /* readable while requests wait, and for good after the end */
int queue_interrupt_fd(void);
extern size_t max_pending_writes;    /* bytes */
/* Copies the request.  0, or -ENOMEM.  wait: while more than max_pending_writes wait, a WRITE is
 * kept until Python has taken some.  Who may not wait adds to them, up to what the kernel sends
 * at a time: its max_background, and one for each thread that writes. */
int queue_push(const void *buf, size_t size, bool wait);
struct request *queue_pop(void);     /* NULL when empty */

/* Parked requests wait for blocks that are coming.  `settled` is what `queue_settled` said before
 * the blocks were looked at: -EAGAIN when some have been settled since, look again; -ENOMEM. */
int queue_park(const void *buf, size_t size, unsigned settled);
unsigned queue_settled(void);
void queue_settle(void);             /* blocks were settled: the parked look again */
/* Waits until parked requests are to look again, and takes them all; NULL at the end. */
struct request *queue_unpark(void);
/* Up to `max` of the parked requests. */
size_t queue_parked(struct waiting *out, size_t max);
/* True when the request was parked, and is forgotten: the caller's to answer. */
bool queue_forget_parked(uint64_t unique);
/* The connection is over (or failed with this errno): wakes everyone, stays so. */
void queue_end(int error);
bool queue_ended(void);
int queue_error(void);
size_t queue_length(void);
/* An INTERRUPT came: what to do about it is for Python to say. */
void queue_interrupt(uint64_t target, uint64_t unique);
size_t queue_take_interrupts(struct interrupt *out, size_t max);

/* ---- requests.c ---- */

struct fast_stats {
	atomic_uint_fast64_t reads, bytes, spliced, seeks, lookups, queued, parked, interrupts, slow;
	atomic_uint_fast64_t writes, bytes_written, writes_spliced, zeroes, syncs, handed_over;
};

extern struct fast_stats stats;
extern const struct map_api *maps;

int thread_start(pthread_t *thread, void *(*run)(void *), void *arg);   /* 0 or an errno */
int threads_start(struct fuse_session *se, unsigned count);   /* 0 or -errno */
void threads_stop(void);                                      /* joins them */
/* Straight to the device. */
int reply(uint64_t unique, int error, const void *data, size_t size);   /* error: 0 or -errno */
int reply_error(uint64_t unique, int error);                            /* error: an errno */

extern int device;           /* ours of /dev/fuse; -1: no threads */

void count_read(struct segmap *map, uint64_t size, bool waited);        /* waited: was parked */

enum outcome { ASK_PYTHON, ANSWERED, COMING };

/* ---- splices.c ---- */

#define MIN_SPLICE (64u << 10)   /* bytes; less is copied sooner than it is referred to */

/* A request thread's pipe. */
struct channel {
	int ends[2];
	size_t bytes;                /* at most, of one READ or WRITE; 0: none */
	bool takes_all;              /* it has room for any request */
};

void channel_open(struct channel *channel);
void channel_close(struct channel *channel);
/* May requests be received by it?  One that finds no room in a pipe would be lost. */
bool channel_is_open(const struct channel *channel);
/* True when the READ is answered, and counted; false when it must be otherwise.  May wait for
 * disks.  `buf` has room for all of it. */
bool channel_answer(struct channel *channel, uint64_t unique, struct segmap *map, uint64_t offset,
		    size_t size, char *buf, bool waited);

/* As read(2) of the device, but what comes after the first `head` bytes stays in the pipe, so that a WRITE's
 * bytes need not be copied before they are written.  Not *in_pipe: all is in
 * `buf`. */
ssize_t channel_receive(struct channel *channel, char *buf, size_t head, size_t max, bool *in_pipe);
/* The next bytes that are in it. */
bool channel_read(struct channel *channel, char *buf, size_t size);
/* Throws away what is in it. */
void channel_empty(struct channel *channel);

/* ---- inodes.c ---- */

/* Which inode's requests may be answered natively, and from which map. */
int inode_publish(uint64_t inode, struct segmap *map);        /* 0 or -ENOMEM; takes a reference */
bool inode_retract(uint64_t inode);
void inode_clear(void);
struct segmap *map_of(uint64_t inode);                        /* with a reference; or NULL */

/* ---- names.c ---- */

/* The answer to a LOOKUP.  0, -ENOMEM, or -EEXIST: the name is published already. */
int name_publish(uint64_t parent, const char *name, size_t length, const struct fuse_entry_out *out);
/* How often it was answered. */
uint64_t name_withdraw(uint64_t parent, const char *name, size_t length);
void name_clear(void);
/* False: the name is not published. */
bool name_answer(uint64_t unique, uint64_t parent, const char *name, size_t length);

/* ---- writes.c ---- */

/* In the handle of a file that was opened with direct_io: its bytes go past the kernel's page cache.  The file's own
 * flags would not tell, for a program may change them later. */
#define DIRECT_HANDLE (UINT64_C(1) << 62)
/* Of those the kernel sends no FSYNC by itself, whether O_DSYNC is the file's or RWF_DSYNC the write's. */
bool is_dsync(const struct fuse_write_in *arg);
/* A WRITE, FALLOCATE or FSYNC: true when it is answered, false when Python must do it.  May wait for a
 * disk. */
bool try_change(const char *buf, size_t size, struct segmap *map);
/* The same of a WRITE whose bytes are in a pipe, and for which `buf` has room behind the header.  When it
 * is false, none of them are taken. */
bool try_write_from(char *buf, struct segmap *map, int pipe);
/* The same, in time, by a thread that is no request thread.  Copies the request.  0, or -ENOMEM. */
int writes_hand_over(const void *buf, size_t size);
int writes_start(void);                                       /* 0 or an errno */
void writes_stop(void);                                       /* joins its threads */

#endif
