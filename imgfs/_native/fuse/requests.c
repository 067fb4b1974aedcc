/* The request threads: read a request, answer it from a segment map, or queue it.
 *
 *     read ---> answered  <---------- (written) <-- handed over
 *       |  \---> parked ---> (its blocks have come, or will not) --+
 *       |            ^-------------- not all of them -------------|
 *       \--> queued for Python  <---------------------------------+
 *
 * Parked requests are looked at by a thread of their own, and what was handed over by others
 * (writes.c).
 *
 * The threads never touch Python.  One of them never waits, neither for a disk nor for Python to take a WRITE
 * off the full queue.  When all others do, or may, a read that would wait goes to Python, whose
 * worker threads wait instead, and a write is handed over: so a slow disk under one image, or
 * one that is written faster than Python can, does not stop the others.
 */
#define _GNU_SOURCE
#include "fast.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_READ MAX_PAYLOAD
#define WORKER_MEMORY (2 * MAX_REQUEST)
#define THREAD_STACK (256u << 10)

/* What a request thread answers from. */
struct worker {
	char *out;                   /* of MAX_READ */
	struct channel channel;
	bool expects_write;          /* the last request was such a one that the pipe is good for */
};

struct fast_stats stats;
const struct map_api *maps;

static pthread_t threads[MAX_THREADS], parker;
static unsigned n_threads;
static bool has_parker;
int device = -1;
static atomic_bool stopping;
static atomic_uint exited, waiting;

/* ---- replies ---- */

int reply(uint64_t unique, int error, const void *data, size_t size)
{
	struct fuse_out_header out = { (uint32_t)(sizeof(out) + size), error, unique };
	struct iovec iov[2] = { { &out, sizeof(out) }, { (void *)data, size } };

	/* ENOENT: the request was given up in the meantime.  Any other failure shows again
	 * at the next read of the device. */
	return writev(device, iov, size ? 2 : 1) < 0 ? -errno : 0;
}

int reply_error(uint64_t unique, int error)
{
	return reply(unique, -error, NULL, 0);
}

/* ---- the fast path ---- */

static bool may_wait(void)
{
	if (atomic_fetch_add(&waiting, 1) + 1 < n_threads)
		return true;
	atomic_fetch_sub(&waiting, 1);
	return false;
}

static void done_waiting(void)
{
	atomic_fetch_sub(&waiting, 1);
}

void count_read(struct segmap *map, uint64_t size, bool waited)
{
	atomic_fetch_add_explicit(&map->reads, 1, memory_order_relaxed);
	if (waited)
		atomic_fetch_add_explicit(&map->reads_waited, 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&map->bytes_served, size, memory_order_relaxed);
	atomic_fetch_add_explicit(&stats.reads, 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&stats.bytes, size, memory_order_relaxed);
}

static enum outcome try_read(const struct fuse_in_header *in, const struct fuse_read_in *arg,
		     struct segmap *map, struct worker *worker, bool waited)
{
	uint64_t size = arg->size;
	uint64_t end = map->size;
	char *out = worker->out;
	int result;

	if (arg->offset >= end)
		size = 0;
	else if (size > end - arg->offset)
		size = end - arg->offset;
	if (size > MAX_READ)
		return ASK_PYTHON;
	if (size >= MIN_SPLICE && may_wait()) {
		bool done = channel_answer(&worker->channel, in->unique, map, arg->offset, size,
					   out, waited);

		done_waiting();
		if (done)
			return ANSWERED;
	}
	result = size ? maps->read(map, arg->offset, size, out, SEG_NOWAIT) : 1;
	if (result == -EAGAIN) {
		if (may_wait()) {
			result = maps->read(map, arg->offset, size, out, SEG_WAIT);
			done_waiting();
		}
		atomic_fetch_add(&stats.slow, 1);
	}
	if (result != 1)   /* Python finds out what is wrong, and says so */
		return result == SEG_COMING ? COMING : ASK_PYTHON;
	count_read(map, size, waited);   /* before whoever reads can look at the counters */
	reply(in->unique, 0, out, size);
	return ANSWERED;
}

static enum outcome try_seek(const struct fuse_in_header *in, const struct fuse_lseek_in *arg,
		     struct segmap *map)
{
	struct fuse_lseek_out out = { 0 };
	int result;

	if (arg->offset > INT64_MAX)
		result = -ENXIO;
	else
		result = maps->seek(map, (int64_t)arg->offset, (int)arg->whence, &out.offset);
	if (result == 0 || result == -EINVAL)
		return ASK_PYTHON;
	if (result == 1)
		reply(in->unique, 0, &out, sizeof(out));
	else
		reply(in->unique, result, NULL, 0);
	atomic_fetch_add_explicit(&stats.seeks, 1, memory_order_relaxed);
	return ANSWERED;
}

/* A directory's handle is its inode, whether it is still there or not: readdir finds out. */
static enum outcome open_directory(const struct fuse_in_header *in)
{
	struct fuse_open_out out = { .fh = in->nodeid };

	reply(in->unique, 0, &out, sizeof(out));
	return ANSWERED;
}

static enum outcome try_lookup(const struct fuse_in_header *in, const char *name, size_t size)
{
	if (!name_answer(in->unique, in->nodeid, name, strnlen(name, size)))
		return ASK_PYTHON;
	atomic_fetch_add_explicit(&stats.lookups, 1, memory_order_relaxed);
	return ANSWERED;
}

static enum outcome try_fast(const char *buf, size_t size, struct worker *worker, bool waited)
{
	const struct fuse_in_header *in = (const struct fuse_in_header *)buf;
	const void *arg = in + 1;
	struct segmap *map;
	enum outcome done = ASK_PYTHON;

	if (in->opcode == FUSE_READ && size >= sizeof(*in) + sizeof(struct fuse_read_in)) {
		map = map_of(in->nodeid);
		if (map) {
			done = try_read(in, arg, map, worker, waited);
			maps->unref(map);
		}
	} else if (in->opcode == FUSE_LOOKUP) {
		done = try_lookup(in, arg, size - sizeof(*in));
	} else if (in->opcode == FUSE_OPENDIR) {
		done = open_directory(in);
	} else if (in->opcode == FUSE_RELEASEDIR) {
		reply(in->unique, 0, NULL, 0);
		done = ANSWERED;
	} else if (in->opcode == FUSE_LSEEK && size >= sizeof(*in) + sizeof(struct fuse_lseek_in)) {
		map = map_of(in->nodeid);
		if (map) {
			done = try_seek(in, arg, map);
			maps->unref(map);
		}
	}
	return done;
}

static void interrupt(const struct fuse_in_header *in, size_t size)
{
	const struct fuse_interrupt_in *arg = (const void *)(in + 1);

	if (size < sizeof(*in) + sizeof(*arg))
		return;
	atomic_fetch_add(&stats.interrupts, 1);
	queue_interrupt(arg->unique, in->unique);
}

/* A request thread has a request that changes something: it waits for a disk, or for room in
 * the queue. */
static void change(const char *buf, size_t size)
{
	const struct fuse_in_header *in = (const struct fuse_in_header *)buf;
	struct segmap *map = map_of(in->nodeid);
	bool native = map && atomic_load(&map->target), wait = may_wait();
	int err = 0;

	if (native && !wait)
		err = writes_hand_over(buf, size);
	else if (!native || !try_change(buf, size, map))
		err = queue_push(buf, size, wait);
	if (wait)
		done_waiting();
	if (map)
		maps->unref(map);
	if (err)
		reply_error(in->unique, -err);
}

/* The same for a large WRITE, if it can be written natively and by this thread. */
static bool change_from(char *buf, struct worker *worker)
{
	const struct fuse_in_header *in = (const struct fuse_in_header *)buf;
	struct segmap *map = map_of(in->nodeid);
	bool done = false;

	if (map && atomic_load(&map->target) && may_wait()) {
		done = try_write_from(buf, map, worker->channel.ends[0]);
		done_waiting();
	}
	if (map)
		maps->unref(map);
	return done;
}

/* Answer a request, or see that somebody will.  `waited`: it was parked before. */
static void settle(const char *buf, size_t size, struct worker *worker, bool waited)
{
	const struct fuse_in_header *in = (const struct fuse_in_header *)buf;
	enum outcome outcome;
	int err;

	do {
		unsigned settled = queue_settled();

		outcome = try_fast(buf, size, worker, waited);
		if (outcome == ANSWERED)
			return;
		err = outcome == COMING ? queue_park(buf, size, settled) :
					  queue_push(buf, size, false);
	} while (err == -EAGAIN);
	if (err)
		reply_error(in->unique, -err);
	else if (outcome == COMING)
		atomic_fetch_add_explicit(&stats.parked, 1, memory_order_relaxed);
}

static void handle(const char *buf, size_t size, struct worker *worker)
{
	const struct fuse_in_header *in = (const struct fuse_in_header *)buf;

	if (in->opcode == FUSE_INTERRUPT)
		interrupt(in, size);
	else if (in->opcode == FUSE_WRITE || in->opcode == FUSE_FALLOCATE ||
		 in->opcode == FUSE_FSYNC)
		change(buf, size);
	else
		settle(buf, size, worker, false);
}

#define WRITE_HEAD (sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in))

/* The kernel copies the pages of who writes past its page cache into new ones before they go into a pipe. */
static bool is_for_pipe(const char *buf, size_t size, const struct worker *worker)
{
	const struct fuse_in_header *in = (const struct fuse_in_header *)buf;
	const struct fuse_write_in *arg = (const void *)(in + 1);

	return in->opcode == FUSE_WRITE && size >= WRITE_HEAD + MIN_SPLICE &&
	       size <= WRITE_HEAD + worker->channel.bytes && !(arg->fh & DIRECT_HANDLE);
}

/* As read(2) of the device; the request may be answered already.  How it is to be taken must be known
 * before it can be looked at: the guess is that it is as the last one. */
static ssize_t receive(char *buf, struct worker *worker, bool *answered)
{
	bool in_pipe;
	ssize_t n;

	*answered = false;
	if (!worker->expects_write || !channel_is_open(&worker->channel))
		return read(device, buf, MAX_REQUEST);
	n = channel_receive(&worker->channel, buf, WRITE_HEAD, MAX_REQUEST, &in_pipe);
	if (n <= (ssize_t)WRITE_HEAD || !in_pipe)
		return n;
	if (is_for_pipe(buf, (size_t)n, worker) && change_from(buf, worker)) {
		channel_empty(&worker->channel);
		*answered = true;
		return n;
	}
	if (channel_read(&worker->channel, buf + WRITE_HEAD, (size_t)n - WRITE_HEAD))
		return n;
	errno = EIO;
	return -1;
}

static void *serve_parked(void *memory)
{
	struct request *rq, *next;
	struct worker worker = { .out = memory };

	channel_open(&worker.channel);
	while ((rq = queue_unpark())) {
		for (; rq; rq = next) {
			next = rq->next;
			settle(rq->mem, rq->size, &worker, true);
			request_free(rq);
		}
	}
	channel_close(&worker.channel);
	munmap(memory, WORKER_MEMORY);
	return NULL;
}

static void *serve(void *memory)
{
	char *buf = memory;
	struct worker worker = { .out = buf + MAX_REQUEST };

	channel_open(&worker.channel);
	while (!atomic_load(&stopping)) {
		bool answered;
		ssize_t n = receive(buf, &worker, &answered);

		if (answered)
			continue;
		if (n >= (ssize_t)sizeof(struct fuse_in_header)) {
			worker.expects_write = is_for_pipe(buf, (size_t)n, &worker);
			handle(buf, (size_t)n, &worker);
			continue;
		}
		if (n < 0 && (errno == EINTR || errno == EAGAIN || errno == ENOENT))
			continue;   /* ENOENT: the request was interrupted before we had it */
		queue_end(n < 0 && errno == ENODEV ? 0 : n < 0 ? errno : EIO);
		break;
	}
	channel_close(&worker.channel);
	munmap(buf, WORKER_MEMORY);
	atomic_fetch_add(&exited, 1);
	return NULL;
}

/* ---- start and stop ---- */

static void wake(int sig)
{
	(void)sig;   /* only makes read(2) return EINTR */
}

static int wake_signal(void)
{
	return SIGRTMIN + 7;
}

int thread_start(pthread_t *thread, void *(*run)(void *), void *arg)
{
	pthread_attr_t attr;
	int err;

	pthread_attr_init(&attr);
	/* The usual 8 MiB count against RLIMIT_AS. */
	pthread_attr_setstacksize(&attr, THREAD_STACK);
	err = pthread_create(thread, &attr, run, arg);
	pthread_attr_destroy(&attr);
	return err;
}

/* With memory to work in, so that none is needed for a request.  0 or an errno. */
static int start(pthread_t *thread, void *(*run)(void *))
{
	void *memory = mmap(NULL, WORKER_MEMORY, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int err;

	if (memory == MAP_FAILED)
		return ENOMEM;
	err = thread_start(thread, run, memory);
	if (err)
		munmap(memory, WORKER_MEMORY);
	return err;
}

int threads_start(struct fuse_session *se, unsigned count)
{
	struct sigaction sa = { .sa_handler = wake };
	sigset_t all, old;
	unsigned i;
	int err = 0;

	if (count < 1 || count > MAX_THREADS || device >= 0)
		return -EINVAL;
	device = fcntl(real_session_fd(se), F_DUPFD_CLOEXEC, 3);
	if (device < 0)
		return -errno;
	sigaction(wake_signal(), &sa, NULL);
	atomic_store(&stopping, false);
	atomic_store(&exited, 0);
	n_threads = 0;
	/* Signals are for Python's main thread. */
	sigfillset(&all);
	sigdelset(&all, wake_signal());
	pthread_sigmask(SIG_SETMASK, &all, &old);
	err = start(&parker, serve_parked);
	has_parker = !err;
	if (!err)
		err = writes_start();
	for (i = 0; i < count && !err; i++) {
		err = start(&threads[i], serve);
		if (!err)
			n_threads++;
	}
	/* With fewer it is slower, and no more: a thread may wait while another is left. */
	if (err && n_threads >= 2)
		err = 0;
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (err)
		threads_stop();
	return -err;
}

void threads_stop(void)
{
	const struct timespec pause = { 0, 2000000 };
	unsigned i;

	if (device < 0)
		return;
	atomic_store(&stopping, true);
	queue_end(0);
	/* A signal may fall just before a thread enters read(2): so again until all are out. */
	while (atomic_load(&exited) < n_threads) {
		for (i = 0; i < n_threads; i++)
			pthread_kill(threads[i], wake_signal());
		nanosleep(&pause, NULL);
	}
	for (i = 0; i < n_threads; i++)
		pthread_join(threads[i], NULL);
	n_threads = 0;
	if (has_parker)
		pthread_join(parker, NULL);
	has_parker = false;
	writes_stop();
	close(device);
	device = -1;
}
