/* Places in a file that several entries of a table claim: no two may, in a file that is whole.
 *
 * Entries are sorted by their places, by radix; those that ascend already, as most do, are not. */
#include "overlap.h"
#include "entry.h"
#include "pieces.h"
#include "rules.h"

#include <stdlib.h>

#define DIGIT 11
#define BUCKETS (1u << DIGIT)

struct claim {
	uint64_t start, index;
	bool alone; /* what it has nobody else may */
};

struct found {
	int64_t first, second; /* the second: of what was taken before, as -1 - its number */
};

/* Sorted in `claims` or in `spare`; which is returned. */
static struct claim *sorted(struct claim *claims, struct claim *spare, size_t n, uint64_t most)
{
	size_t at[BUCKETS], i, sum, count;
	struct claim *other;
	unsigned shift;

	for (shift = 0; shift < 64 && most >> shift; shift += DIGIT) {
		memset(at, 0, sizeof(at));
		for (i = 0; i < n; i++)
			at[claims[i].start >> shift & (BUCKETS - 1)]++;
		for (i = sum = 0; i < BUCKETS; i++) {
			count = at[i];
			at[i] = sum;
			sum += count;
		}
		for (i = 0; i < n; i++)
			spare[at[claims[i].start >> shift & (BUCKETS - 1)]++] = claims[i];
		other = claims;
		claims = spare;
		spare = other;
	}
	return claims;
}

/* The first two that overlap. */
static bool compare(const struct claim *claims, size_t n, uint64_t unit, const uint64_t *taken,
		    size_t n_taken, struct found *found)
{
	size_t i, j = 0;

	for (i = 0; i < n; i++) {
		if (i && claims[i].start - claims[i - 1].start < unit &&
		    (claims[i].alone || claims[i - 1].alone)) {
			*found = (struct found){ (int64_t)claims[i - 1].index,
						 (int64_t)claims[i].index };
			return true;
		}
		while (j < n_taken && taken[2 * j + 1] <= claims[i].start)
			j++;
		if (j < n_taken && taken[2 * j] < claims[i].start + unit) {
			*found = (struct found){ (int64_t)claims[i].index, -1 - (int64_t)j };
			return true;
		}
	}
	return false;
}

/* 1: found, 0: not, -1: no memory. */
static int look(const uint8_t *table, size_t entries, int width, int big_endian,
		const struct rule *rules, size_t n_rules, const struct place *place, uint64_t unit,
		uint64_t alone, const uint64_t *taken, size_t n_taken, struct found *found)
{
	struct claim *claims = malloc(2 * (entries + 1) * sizeof(*claims)), *in_order = claims;
	uint64_t most = 0, offset;
	bool ascends = true;
	size_t i, n = 0;
	int result;

	if (!claims)
		return -1;
	for (i = 0; i < entries; i++) {
		uint64_t value = entry(table + i * width, width, big_endian);
		const struct rule *rule = fitting(rules, n_rules, value);

		if (!rule || rule->kind != KIND_DATA || !find_place(place, value, 1, &offset))
			continue;
		ascends = ascends && (!n || offset >= most);
		most = offset > most ? offset : most;
		claims[n++] = (struct claim){ offset, i, !alone || value & alone };
	}
	if (!ascends)
		in_order = sorted(claims, claims + n, n, most);
	result = compare(in_order, n, unit, taken, n_taken, found);
	free(claims);
	return result;
}

PyObject *py_overlap(PyObject *self, PyObject *args)
{
	unsigned long long mask, shift, scale, base, low, high, unit, alone;
	Py_buffer table, rules, taken;
	int width, big_endian, result;
	struct found found;
	struct place place;

	(void)self;
	if (!PyArg_ParseTuple(args, "y*ipy*(KKKKKK)KKy*", &table, &width, &big_endian, &rules, &mask,
			      &shift, &scale, &base, &low, &high, &unit, &alone, &taken))
		return NULL;
	if ((width != 4 && width != 8) || table.len % width || !unit || shift > 63 ||
	    rules.len % sizeof(struct rule) || taken.len % (2 * sizeof(uint64_t))) {
		PyErr_SetString(PyExc_ValueError, "a table has whole entries of 4 or 8 bytes");
		result = -2;
	} else {
		place = (struct place){ mask, shift, scale, base, low, high };
		Py_BEGIN_ALLOW_THREADS
		result = look(table.buf, (size_t)(table.len / width), width, big_endian, rules.buf,
			      (size_t)rules.len / sizeof(struct rule), &place, unit, alone, taken.buf,
			      (size_t)taken.len / (2 * sizeof(uint64_t)), &found);
		Py_END_ALLOW_THREADS
	}
	PyBuffer_Release(&table);
	PyBuffer_Release(&rules);
	PyBuffer_Release(&taken);
	if (result == -1)
		return PyErr_NoMemory();
	if (result == -2)
		return NULL;
	if (!result)
		Py_RETURN_NONE;
	return Py_BuildValue("LL", (long long)found.first, (long long)found.second);
}
