/* Requests on their way from the request threads to pyfuse3's loop, and the interrupts.
 *
 * The eventfd is readable while the queue holds something; the pop that empties it clears
 * it, under the same lock as the pushes, so no wake-up is lost.  After queue_end it stays
 * readable for good: a marker that the first waiter consumed would leave the others asleep.
 */
#define _GNU_SOURCE
#include "event.h"
#include "fast.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

size_t max_pending_writes = 64u << 20;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t drained = PTHREAD_COND_INITIALIZER;
static pthread_cond_t look_again = PTHREAD_COND_INITIALIZER;
static struct request *parked, **parked_tail = &parked;
static atomic_uint settled;
static unsigned looked;              /* at which count of `settled` the parked looked last */
static struct request *head, **tail = &head;
static size_t length, write_bytes;
static int event_fd = -1, interrupt_fd = -1;
static bool ended;
static int end_error;

static struct interrupt *interrupts;
static size_t n_interrupts, cap_interrupts;

int queue_open(void)
{
	event_fd = event_new();
	interrupt_fd = event_new();
	if (event_fd < 0 || interrupt_fd < 0) {
		int err = event_fd < 0 ? event_fd : interrupt_fd;

		queue_close();
		return err;
	}
	ended = false;
	end_error = 0;
	return 0;
}

void request_free(struct request *rq)
{
	free(rq->mem);
	free(rq);
}

static void free_all(struct request *rq)
{
	while (rq) {
		struct request *next = rq->next;

		request_free(rq);
		rq = next;
	}
}

void queue_close(void)
{
	free_all(head);
	free_all(parked);
	head = parked = NULL;
	tail = &head;
	parked_tail = &parked;
	length = write_bytes = 0;
	n_interrupts = 0;
	if (event_fd >= 0)
		close(event_fd);
	if (interrupt_fd >= 0)
		close(interrupt_fd);
	event_fd = interrupt_fd = -1;
}

int queue_event_fd(void)
{
	return event_fd;
}

int queue_interrupt_fd(void)
{
	return interrupt_fd;
}

static bool is_write(const void *buf)
{
	return ((const struct fuse_in_header *)buf)->opcode == FUSE_WRITE;
}

struct request *request_copy(const void *buf, size_t size)
{
	struct request *rq = malloc(sizeof(*rq));

	if (!rq)
		return NULL;
	rq->mem = malloc(size);
	if (!rq->mem) {
		free(rq);
		return NULL;
	}
	memcpy(rq->mem, buf, size);
	rq->size = size;
	rq->unique = ((const struct fuse_in_header *)buf)->unique;
	rq->next = NULL;
	return rq;
}

unsigned queue_settled(void)
{
	return atomic_load(&settled);
}

void queue_settle(void)
{
	pthread_mutex_lock(&lock);
	atomic_fetch_add(&settled, 1);
	if (parked)
		pthread_cond_signal(&look_again);
	pthread_mutex_unlock(&lock);
}

int queue_park(const void *buf, size_t size, unsigned seen)
{
	struct request *rq = request_copy(buf, size);
	int err = 0;

	if (!rq)
		return -ENOMEM;
	pthread_mutex_lock(&lock);
	if (atomic_load(&settled) != seen)
		err = -EAGAIN;
	if (!err) {
		*parked_tail = rq;
		parked_tail = &rq->next;
	}
	pthread_mutex_unlock(&lock);
	if (err)
		request_free(rq);
	return err;
}

struct request *queue_unpark(void)
{
	struct request *all = NULL;

	pthread_mutex_lock(&lock);
	while (!ended && (!parked || looked == atomic_load(&settled)))
		pthread_cond_wait(&look_again, &lock);
	looked = atomic_load(&settled);
	if (!ended) {
		all = parked;
		parked = NULL;
		parked_tail = &parked;
	}
	pthread_mutex_unlock(&lock);
	return all;
}

int queue_push(const void *buf, size_t size, bool wait)
{
	struct request *rq = request_copy(buf, size);

	if (!rq)
		return -ENOMEM;
	pthread_mutex_lock(&lock);
	while (wait && is_write(buf) && write_bytes + size > max_pending_writes && !ended)
		pthread_cond_wait(&drained, &lock);
	if (is_write(buf))
		write_bytes += size;
	*tail = rq;
	tail = &rq->next;
	if (length++ == 0)
		event_signal(event_fd);
	pthread_mutex_unlock(&lock);
	atomic_fetch_add_explicit(&stats.queued, 1, memory_order_relaxed);
	return 0;
}

/* Under the lock. */
static void forget_head(struct request *rq)
{
	if (is_write(rq->mem)) {
		write_bytes -= rq->size;
		pthread_cond_broadcast(&drained);
	}
	if (--length == 0 && !ended)
		event_clear(event_fd);
}

struct request *queue_pop(void)
{
	struct request *rq;

	pthread_mutex_lock(&lock);
	rq = head;
	if (rq) {
		head = rq->next;
		if (!head)
			tail = &head;
		forget_head(rq);
	}
	pthread_mutex_unlock(&lock);
	return rq;
}

void queue_end(int error)
{
	pthread_mutex_lock(&lock);
	ended = true;
	if (!end_error)
		end_error = error;
	event_signal(event_fd);
	event_signal(interrupt_fd);
	pthread_cond_broadcast(&drained);
	pthread_cond_broadcast(&look_again);
	pthread_mutex_unlock(&lock);
}

bool queue_ended(void)
{
	bool result;

	pthread_mutex_lock(&lock);
	result = ended;
	pthread_mutex_unlock(&lock);
	return result;
}

int queue_error(void)
{
	return end_error;
}

size_t queue_length(void)
{
	size_t result;

	pthread_mutex_lock(&lock);
	result = length;
	pthread_mutex_unlock(&lock);
	return result;
}

size_t queue_parked(struct waiting *out, size_t max)
{
	const struct request *rq;
	size_t n = 0;

	pthread_mutex_lock(&lock);
	for (rq = parked; rq && n < max; rq = rq->next)
		out[n++] = (struct waiting){ rq->unique,
					     ((const struct fuse_in_header *)rq->mem)->pid };
	pthread_mutex_unlock(&lock);
	return n;
}

bool queue_forget_parked(uint64_t unique)
{
	struct request **link, *rq;

	pthread_mutex_lock(&lock);
	for (link = &parked; (rq = *link); link = &rq->next)
		if (rq->unique == unique)
			break;
	if (rq) {
		*link = rq->next;
		if (parked_tail == &rq->next)
			parked_tail = link;
	}
	pthread_mutex_unlock(&lock);
	if (rq)
		request_free(rq);
	return rq != NULL;
}

void queue_interrupt(uint64_t target, uint64_t unique)
{
	pthread_mutex_lock(&lock);
	if (n_interrupts == cap_interrupts) {
		size_t cap = cap_interrupts ? cap_interrupts * 2 : 16;
		struct interrupt *more = realloc(interrupts, cap * sizeof(*more));

		if (more) {
			interrupts = more;
			cap_interrupts = cap;
		}
	}
	if (n_interrupts < cap_interrupts) {
		interrupts[n_interrupts++] = (struct interrupt){ target, unique };
		event_signal(interrupt_fd);
	}
	pthread_mutex_unlock(&lock);
}

size_t queue_take_interrupts(struct interrupt *out, size_t max)
{
	size_t n;

	pthread_mutex_lock(&lock);
	n = n_interrupts < max ? n_interrupts : max;
	memcpy(out, interrupts, n * sizeof(*out));
	n_interrupts -= n;
	memmove(interrupts, interrupts + n, n_interrupts * sizeof(*out));
	if (n_interrupts == 0 && !ended)
		event_clear(interrupt_fd);
	pthread_mutex_unlock(&lock);
	return n;
}
