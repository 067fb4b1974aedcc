/* The published inodes: which segment map answers for which. */
#include "fast.h"

#include <errno.h>
#include <stdlib.h>

struct entry {
	struct entry *next;
	uint64_t inode;
	struct segmap *map;
};

#define BUCKETS 1024

static struct entry *buckets[BUCKETS];
static pthread_rwlock_t inodes_lock = PTHREAD_RWLOCK_INITIALIZER;

static struct entry **find(uint64_t inode)
{
	struct entry **link = &buckets[(inode * UINT64_C(0x9E3779B97F4A7C15)) >> 54];

	while (*link && (*link)->inode != inode)
		link = &(*link)->next;
	return link;
}

int inode_publish(uint64_t inode, struct segmap *map)
{
	struct entry **link, *e = malloc(sizeof(*e));
	struct segmap *old = NULL;

	if (!e)
		return -ENOMEM;
	maps->ref(map);
	pthread_rwlock_wrlock(&inodes_lock);
	link = find(inode);
	if (*link) {
		old = (*link)->map;
		(*link)->map = map;
		free(e);
	} else {
		*e = (struct entry){ NULL, inode, map };
		*link = e;
	}
	pthread_rwlock_unlock(&inodes_lock);
	if (old)
		maps->unref(old);
	return 0;
}

bool inode_retract(uint64_t inode)
{
	struct entry **link, *e;

	pthread_rwlock_wrlock(&inodes_lock);
	link = find(inode);
	e = *link;
	if (e)
		*link = e->next;
	pthread_rwlock_unlock(&inodes_lock);
	if (e) {
		maps->unref(e->map);
		free(e);
	}
	return e != NULL;
}

void inode_clear(void)
{
	unsigned i;

	for (i = 0; i < BUCKETS; i++)
		while (buckets[i])
			inode_retract(buckets[i]->inode);
}

struct segmap *map_of(uint64_t inode)
{
	struct entry *e;
	struct segmap *map = NULL;

	pthread_rwlock_rdlock(&inodes_lock);
	e = *find(inode);
	if (e)
		map = maps->ref(e->map);
	pthread_rwlock_unlock(&inodes_lock);
	return map;
}
