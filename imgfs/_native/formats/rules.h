/* What the entries of a table mean, as a few rules have it. */
#ifndef IMGFS_RULES_H
#define IMGFS_RULES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct rule {
	uint64_t mask, value, kind;
};

/* What an entry that is data says: where its bytes begin, and where they must be. */
struct place {
	uint64_t mask, shift, scale, base, low, high;
};

static inline const struct rule *fitting(const struct rule *rules, size_t n, uint64_t value)
{
	size_t i;

	for (i = 0; i < n; i++)
		if ((value & rules[i].mask) == rules[i].value)
			return &rules[i];
	return NULL;
}

static inline bool find_place(const struct place *place, uint64_t value, uint64_t length,
		       uint64_t *offset)
{
	uint64_t number = (value & place->mask) >> place->shift;

	if (__builtin_mul_overflow(number, place->scale, &number) ||
	    __builtin_add_overflow(number, place->base, offset))
		return false;
	return *offset >= place->low && *offset <= place->high &&
	       length <= place->high - *offset;
}

#endif
