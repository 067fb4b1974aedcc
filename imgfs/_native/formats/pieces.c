/* imgfs._native._pieces: packed lists of pieces, made and looked through.  See _pieces.pyi. */
#define PY_SSIZE_T_CLEAN
#include "array.h"
#include "entry.h"
#include "pieces.h"
#include "rules.h"
#include "scan.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* ---- tables as pieces ---- */

struct made {
	uint64_t *ends, *offsets;
	uint8_t *kinds;
	size_t count, room;
};

static bool make_room(struct made *made)
{
	size_t room = made->room ? 2 * made->room : 256;
	uint64_t *ends = PyMem_RawRealloc(made->ends, room * sizeof(*ends));
	uint64_t *offsets = NULL;
	uint8_t *kinds = NULL;

	if (ends)
		made->ends = ends;
	if (ends)
		offsets = PyMem_RawRealloc(made->offsets, room * sizeof(*offsets));
	if (offsets)
		made->offsets = offsets;
	if (offsets)
		kinds = PyMem_RawRealloc(made->kinds, room);
	if (!kinds)
		return false;
	made->kinds = kinds;
	made->room = room;
	return true;
}

/* How many entries from `at` on have the same bytes. */
static size_t alike(const uint8_t *table, size_t at, size_t entries, int width)
{
	const uint64_t first = entry(table + at * width, width, 0);
	size_t end = at + 1;

	while (end < entries && entry(table + end * width, width, 0) == first)
		end++;
	return end - at;
}

/* Returns how many entries became pieces, or -1 when there is no memory. */
static int64_t make(const uint8_t *table, size_t entries, int width, int big_endian,
		    const struct rule *rules, size_t n_rules, const struct place *place,
		    uint64_t start, uint64_t unit, uint64_t end, size_t most, struct made *made)
{
	uint64_t last_start = start;
	size_t at = 0;

	while (at < entries && start < end) {
		uint64_t value = entry(table + at * width, width, big_endian), offset = 0, to;
		const struct rule *rule = fitting(rules, n_rules, value);
		size_t count = 1, last = made->count - 1;
		bool goes_on;

		if (!rule)
			break;
		if (rule->kind != KIND_DATA)
			count = alike(table, at, entries, width);
		to = count <= (end - start) / unit ? start + count * unit : end;
		if (rule->kind == KIND_DATA && !find_place(place, value, to - start, &offset))
			break;
		goes_on = made->count && made->kinds[last] == rule->kind &&
			  (rule->kind != KIND_DATA ||
			   made->offsets[last] + (start - last_start) == offset);
		if (!goes_on) {
			if (made->count == most)
				break;
			if (made->count == made->room && !make_room(made))
				return -1;
			last = made->count++;
			made->kinds[last] = (uint8_t)rule->kind;
			made->offsets[last] = offset;
			last_start = start;
		}
		made->ends[last] = start = to;
		at += count;
	}
	return (int64_t)at;
}

static PyObject *py_entries(PyObject *self, PyObject *args)
{
	unsigned long long start, unit, end, most;
	unsigned long long mask, shift, scale, base, low, high;
	struct made made = { NULL, NULL, NULL, 0, 0 };
	PyObject *ends, *offsets, *result = NULL;
	int width, big_endian;
	Py_buffer table, rules;
	struct place place;
	int64_t done = -1;

	(void)self;
	if (!PyArg_ParseTuple(args, "y*ipy*(KKKKKK)KKKK", &table, &width, &big_endian, &rules,
			      &mask, &shift, &scale, &base, &low, &high, &start, &unit, &end,
			      &most))
		return NULL;
	if ((width != 4 && width != 8) || table.len % width || !unit || shift > 63 ||
	    rules.len % sizeof(struct rule)) {
		PyErr_SetString(PyExc_ValueError, "a table has whole entries of 4 or 8 bytes");
	} else {
		place = (struct place){ mask, shift, scale, base, low, high };
		Py_BEGIN_ALLOW_THREADS
		done = make(table.buf, (size_t)(table.len / width), width, big_endian, rules.buf,
			    (size_t)rules.len / sizeof(struct rule), &place, start, unit, end,
			    (size_t)most, &made);
		Py_END_ALLOW_THREADS
		if (done < 0)
			PyErr_NoMemory();
	}
	PyBuffer_Release(&table);
	PyBuffer_Release(&rules);
	ends = done < 0 ? NULL : array_of(made.ends, made.count);
	offsets = ends ? array_of(made.offsets, made.count) : NULL;
	if (offsets)
		result = Py_BuildValue("LOy#O", (long long)done, ends,
				       made.count ? (const char *)made.kinds : "",
				       (Py_ssize_t)made.count, offsets);
	Py_XDECREF(ends);
	Py_XDECREF(offsets);
	PyMem_RawFree(made.ends);
	PyMem_RawFree(made.offsets);
	PyMem_RawFree(made.kinds);
	return result;
}

/* ---- what pieces use of files ---- */

struct reach {
	uint64_t low, high;
};

static void find_reaches(const struct pieces *pieces, struct reach *found)
{
	uint64_t at = pieces->start;
	size_t i;

	for (i = 0; i < pieces->n; i++) {
		struct reach *reach = &found[pieces->files[i]];
		uint64_t length = pieces->ends[i] - at, offset = pieces->offsets[i];

		at = pieces->ends[i];
		if (pieces->kinds[i] != KIND_DATA)
			continue;
		if (!reach->high || offset < reach->low)
			reach->low = offset;
		if (offset + length > reach->high)
			reach->high = offset + length;
	}
}

static PyObject *py_reaches(PyObject *self, PyObject *packed)
{
	PyObject *result = PyDict_New(), *key, *value;
	struct reach *found = NULL;
	struct pieces pieces;
	size_t file, files = 1, i;

	(void)self;
	if (!result || pieces_take(packed, &pieces)) {
		Py_XDECREF(result);
		return NULL;
	}
	for (i = 0; i < pieces.n; i++)
		if (pieces.files[i] >= files)
			files = (size_t)pieces.files[i] + 1;
	found = PyMem_RawCalloc(files, sizeof(*found));
	if (!found) {
		PyErr_NoMemory();
		Py_CLEAR(result);
	} else {
		find_reaches(&pieces, found);
	}
	for (file = 0; result && file < files; file++) {
		if (!found[file].high)
			continue;
		key = PyLong_FromSize_t(file);
		value = Py_BuildValue("KK", (unsigned long long)found[file].low,
				      (unsigned long long)found[file].high);
		if (!key || !value || PyDict_SetItem(result, key, value))
			Py_CLEAR(result);
		Py_XDECREF(key);
		Py_XDECREF(value);
	}
	PyMem_RawFree(found);
	pieces_release(&pieces);
	return result;
}

/* ---- pieces as extents ---- */

/* Extents of a part of a file. */
struct known {
	uint64_t start;
	Py_buffer ends, flags;
};

#define ZERO_FLAG 2   /* Flags.ZERO */

static const uint64_t *ends_of(const struct known *known)
{
	return known->ends.buf;
}

/* The first extent that ends after `offset`. */
static size_t extent_at(const struct known *known, uint64_t offset)
{
	size_t low = 0, high = (size_t)known->flags.len;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (ends_of(known)[middle] <= offset)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

/* [at, end) of a disk is [offset, ...) of the file; what is not known of it is data. */
static int add_data(struct scan *out, const struct known *known, uint64_t at, uint64_t end,
		    uint64_t offset)
{
	uint64_t before = offset < known->start ? known->start - offset : 0;
	size_t index;
	int err = 0;

	if (before >= end - at)
		return scan_add(out, end, SCAN_DATA);
	if (before)
		err = scan_add(out, at + before, SCAN_DATA);
	at += before;
	offset += before;
	index = extent_at(known, offset);
	for (; at < end && !err && index < (size_t)known->flags.len; index++) {
		uint64_t length = ends_of(known)[index] - offset;
		bool zero = ((const uint8_t *)known->flags.buf)[index] & ZERO_FLAG;

		if (length > end - at)
			length = end - at;
		at += length;
		offset += length;
		err = scan_add(out, at, zero ? SCAN_HOLE : SCAN_DATA);
	}
	return at < end && !err ? scan_add(out, end, SCAN_DATA) : err;
}

static const struct known nothing_known;

static int add_extents(struct scan *out, const struct pieces *pieces, uint64_t start, uint64_t end,
		       const struct known *known, size_t n_known)
{
	uint64_t from = pieces->start;
	size_t i;
	int err = 0;

	for (i = 0; i < pieces->n && from < end && !err; from = pieces->ends[i++]) {
		uint64_t at = from > start ? from : start;
		uint64_t to = pieces->ends[i] < end ? pieces->ends[i] : end;
		uint16_t file = pieces->files[i];

		if (at >= to)
			continue;
		if (pieces->kinds[i] == KIND_ZERO)
			err = scan_add(out, to, SCAN_HOLE);
		else if (pieces->kinds[i] == KIND_DATA)
			err = add_data(out, file < n_known ? &known[file] : &nothing_known, at, to,
				       pieces->offsets[i] + (at - from));
		else
			err = scan_add(out, to, SCAN_DATA);
	}
	return err;
}

static void forget(struct known *known, size_t n)
{
	size_t i;

	for (i = 0; i < n; i++) {
		PyBuffer_Release(&known[i].ends);
		PyBuffer_Release(&known[i].flags);
	}
	PyMem_RawFree(known);
}

/* What is known of each file, by its number; NULL with an exception set. */
static struct known *know(PyObject *list, size_t *n)
{
	/* The list may change meanwhile: a buffer's owner may be any program. */
	PyObject *kept = PyList_Check(list) ? PyList_AsTuple(list) : PyTuple_New(0);
	size_t count = kept ? (size_t)PyTuple_GET_SIZE(kept) : 0;
	struct known *known = kept ? PyMem_RawCalloc(count + 1, sizeof(*known)) : NULL;
	unsigned long long start;

	for (*n = 0; known && *n < count; (*n)++) {
		struct known *one = &known[*n];

		if (!PyArg_ParseTuple(PyTuple_GET_ITEM(kept, (Py_ssize_t)*n), "Ky*y*", &start,
				      &one->ends, &one->flags)) {
			forget(known, *n);
			Py_DECREF(kept);
			return NULL;
		}
		one->start = start;
		if (one->ends.len != one->flags.len * (Py_ssize_t)sizeof(uint64_t)) {
			forget(known, *n + 1);
			Py_DECREF(kept);
			PyErr_SetString(PyExc_ValueError, "an extent has an end and flags");
			return NULL;
		}
	}
	Py_XDECREF(kept);
	if (!known && !PyErr_Occurred())
		PyErr_NoMemory();
	return known;
}

static PyObject *py_extents(PyObject *self, PyObject *args)
{
	struct scan found = { NULL, NULL, 0, 0 };
	PyObject *packed, *list, *ends = NULL, *result = NULL;
	unsigned long long start, end;
	struct pieces pieces;
	struct known *known;
	size_t n_known;
	int err;

	(void)self;
	if (!PyArg_ParseTuple(args, "OKKO", &packed, &start, &end, &list))
		return NULL;
	known = know(list, &n_known);
	if (!known)
		return NULL;
	if (pieces_take(packed, &pieces)) {
		forget(known, n_known);
		return NULL;
	}
	Py_BEGIN_ALLOW_THREADS
	err = add_extents(&found, &pieces, start, end, known, n_known);
	Py_END_ALLOW_THREADS
	pieces_release(&pieces);
	forget(known, n_known);
	if (err)
		PyErr_NoMemory();
	else
		ends = array_of(found.ends, found.n);
	if (ends)
		result = Py_BuildValue("Ny#", ends, found.n ? (const char *)found.flags : "",
				       (Py_ssize_t)found.n);
	free(found.ends);
	free(found.flags);
	return result;
}

static PyMethodDef functions[] = {
	{ "entries", py_entries, METH_VARARGS, NULL },
	{ "reaches", py_reaches, METH_O, NULL },
	{ "extents", py_extents, METH_VARARGS, NULL },
	{ NULL, NULL, 0, NULL },
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT, .m_name = "imgfs._native._pieces", .m_size = -1,
	.m_methods = functions,
};

PyMODINIT_FUNC PyInit__pieces(void)
{
	return PyModule_Create(&definition);
}
