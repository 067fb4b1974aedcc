/* The published names: a LOOKUP of one of them is answered natively.
 *
 * Of a directory of files that do not change, `ls -l` asks for each name, and each question costs Python
 * more than finding out what all of them are.  How often the kernel was given an inode so is counted
 * here, until the name is withdrawn.
 */
#include "fast.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct entry {
	struct entry *next;
	uint64_t parent, lookups;
	struct fuse_entry_out out;
	size_t length;
	char name[];
};

#define BUCKETS 16384

static struct entry *buckets[BUCKETS];
static pthread_mutex_t names_lock = PTHREAD_MUTEX_INITIALIZER;

static struct entry **find(uint64_t parent, const char *name, size_t length)
{
	uint64_t hash = parent * UINT64_C(0x9E3779B97F4A7C15);
	struct entry **link;
	size_t i;

	for (i = 0; i < length; i++)
		hash = (hash ^ (unsigned char)name[i]) * UINT64_C(0x100000001B3);
	link = &buckets[(hash ^ hash >> 32) % BUCKETS];
	while (*link && ((*link)->parent != parent || (*link)->length != length ||
			 memcmp((*link)->name, name, length)))
		link = &(*link)->next;
	return link;
}

int name_publish(uint64_t parent, const char *name, size_t length, const struct fuse_entry_out *out)
{
	struct entry **link, *e = malloc(sizeof(*e) + length);
	int err = -EEXIST;

	if (!e)
		return -ENOMEM;
	*e = (struct entry){ .parent = parent, .out = *out, .length = length };
	memcpy(e->name, name, length);
	pthread_mutex_lock(&names_lock);
	link = find(parent, name, length);
	if (!*link) {
		*link = e;
		err = 0;
	}
	pthread_mutex_unlock(&names_lock);
	if (err)
		free(e);
	return err;
}

uint64_t name_withdraw(uint64_t parent, const char *name, size_t length)
{
	struct entry **link, *e;
	uint64_t lookups = 0;

	pthread_mutex_lock(&names_lock);
	link = find(parent, name, length);
	e = *link;
	if (e) {
		*link = e->next;
		lookups = e->lookups;
	}
	pthread_mutex_unlock(&names_lock);
	free(e);
	return lookups;
}

void name_clear(void)
{
	struct entry *e;
	unsigned i;

	pthread_mutex_lock(&names_lock);
	for (i = 0; i < BUCKETS; i++) {
		while ((e = buckets[i])) {
			buckets[i] = e->next;
			free(e);
		}
	}
	pthread_mutex_unlock(&names_lock);
}

bool name_answer(uint64_t unique, uint64_t parent, const char *name, size_t length)
{
	struct entry *e;

	/* Held until the kernel has the answer, so that the count is right when the name is withdrawn. */
	pthread_mutex_lock(&names_lock);
	e = *find(parent, name, length);
	if (e && reply(unique, 0, &e->out, sizeof(e->out)) == 0)
		e->lookups++;
	pthread_mutex_unlock(&names_lock);
	return e != NULL;
}
