/* imgfs._native._tables: tables of formats and bitmaps of filesystems as runs.  See _tables.pyi. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "array.h"
#include "entry.h"
#include "overlap.h"

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

struct runs {
	uint64_t *items;
	size_t count, room;
};

static bool append(struct runs *runs, uint64_t item)
{
	if (runs->count == runs->room) {
		size_t room = runs->room ? 2 * runs->room : 64;
		uint64_t *items = PyMem_RawRealloc(runs->items, room * sizeof(*items));

		if (!items)
			return false;
		runs->items = items;
		runs->room = room;
	}
	runs->items[runs->count++] = item;
	return true;
}

/* Takes the runs; NULL with an exception set. */
static PyObject *finish(struct runs *runs, bool ok)
{
	PyObject *array = ok ? array_of(runs->items, runs->count) : PyErr_NoMemory();

	PyMem_RawFree(runs->items);
	return array;
}

static bool find_runs(const uint8_t *table, size_t entries, int width, int big_endian,
		      uint64_t step, struct runs *runs)
{
	size_t at = 0;

	while (at < entries) {
		uint64_t first = entry(table + at * width, width, big_endian), last = first;
		uint64_t stride = 0;
		size_t end = at + 1;

		for (; end < entries; end++) {
			uint64_t next = entry(table + end * width, width, big_endian);

			if (end == at + 1 && next == last + step)
				stride = step;
			if (next != last + stride)
				break;
			last = next;
		}
		if (!append(runs, end - at) || !append(runs, first) || !append(runs, stride))
			return false;
		at = end;
	}
	return true;
}

static PyObject *py_runs(PyObject *self, PyObject *args)
{
	Py_buffer table;
	int width, big_endian;
	unsigned long long step;
	struct runs runs = { NULL, 0, 0 };
	bool ok;

	(void)self;
	if (!PyArg_ParseTuple(args, "y*ipK", &table, &width, &big_endian, &step))
		return NULL;
	if ((width != 4 && width != 8) || table.len % width) {
		PyBuffer_Release(&table);
		PyErr_SetString(PyExc_ValueError, "a table has whole entries of 4 or 8 bytes");
		return NULL;
	}
	Py_BEGIN_ALLOW_THREADS
	ok = find_runs(table.buf, (size_t)(table.len / width), width, big_endian, step, &runs);
	Py_END_ALLOW_THREADS
	PyBuffer_Release(&table);
	return finish(&runs, ok);
}

/* The first bit at or after `at`, and before `end`, that is `value`; else `end`. */
static uint64_t next_bit(const uint8_t *bits, uint64_t at, uint64_t end, bool value)
{
	const uint64_t flip = value ? 0 : UINT64_MAX;

	while (at < end) {
		if (at % 8 == 0 && end - at >= 64) {
			uint64_t word;

			memcpy(&word, bits + at / 8, sizeof(word));
			word = le64toh(word) ^ flip;
			if (word)
				return at + (uint64_t)__builtin_ctzll(word);
			at += 64;
		} else {
			if (((bits[at / 8] >> (at % 8)) & 1) == value)
				return at;
			at++;
		}
	}
	return end;
}

static bool find_clear(const uint8_t *bits, uint64_t count, struct runs *runs)
{
	uint64_t start, end = 0;

	while ((start = next_bit(bits, end, count, false)) < count) {
		end = next_bit(bits, start, count, true);
		if (!append(runs, start) || !append(runs, end))
			return false;
	}
	return true;
}

static PyObject *py_clear_runs(PyObject *self, PyObject *args)
{
	Py_buffer bitmap;
	unsigned long long count;
	struct runs runs = { NULL, 0, 0 };
	bool ok;

	(void)self;
	if (!PyArg_ParseTuple(args, "y*K", &bitmap, &count))
		return NULL;
	if (count > (unsigned long long)bitmap.len * 8) {
		PyBuffer_Release(&bitmap);
		PyErr_SetString(PyExc_ValueError, "the bitmap has fewer bits than that");
		return NULL;
	}
	Py_BEGIN_ALLOW_THREADS
	ok = find_clear(bitmap.buf, count, &runs);
	Py_END_ALLOW_THREADS
	PyBuffer_Release(&bitmap);
	return finish(&runs, ok);
}

static PyMethodDef functions[] = {
	{ "runs", py_runs, METH_VARARGS, NULL },
	{ "clear_runs", py_clear_runs, METH_VARARGS, NULL },
	{ "overlap", py_overlap, METH_VARARGS, NULL },
	{ NULL, NULL, 0, NULL },
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT, .m_name = "imgfs._native._tables", .m_size = -1,
	.m_methods = functions,
};

PyMODINIT_FUNC PyInit__tables(void)
{
	return PyModule_Create(&definition);
}
