/* What the parts of core_driver.c share. */
#ifndef CORE_H
#define CORE_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(what)                                                                            \
	do {                                                                                   \
		if (!(what)) {                                                                 \
			fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #what);     \
			abort();                                                               \
		}                                                                              \
	} while (0)

/* splitmix64: each thread has its own state, so a seed gives the same choices. */
static inline uint64_t draw(uint64_t *state)
{
	uint64_t z = *state += UINT64_C(0x9E3779B97F4A7C15);

	z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
	z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
	return z ^ (z >> 31);
}

static inline uint64_t below(uint64_t *state, uint64_t limit)
{
	return draw(state) % limit;
}

/* core_stress.c, core_writes.c, core_sums.c */
void run_stress(uint64_t seed, uint64_t steps, int fd);
void run_writes(uint64_t seed, uint64_t steps, const char *directory);
void run_sums(uint64_t seed, uint64_t steps, const char *directory);

#endif
