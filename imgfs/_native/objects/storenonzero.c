/* The methods of Store that tell zeroes from data. */
#define PY_SSIZE_T_CLEAN
#include "objects.h"

#include <errno.h>
#include <stdlib.h>

/* For each block that the data touches: is its part all zero?  Writes the others, run by run, if
 * they are to be written. */
static int find_parts(struct store *st, const char *data, uint64_t length, uint64_t offset,
		      bool *zero, size_t n, bool write)
{
	uint64_t block_size = UINT64_C(1) << st->block_shift, at = 0, run = 0;
	size_t i;
	int err;

	for (i = 0; i < n; i++) {
		uint64_t step = block_size - ((offset + at) & (block_size - 1));

		if (step > length - at)
			step = length - at;
		zero[i] = all_zero(data + at, step);
		if (write && zero[i] && at > run) {
			err = store_pwrite(st, data + run, at - run, offset + run);
			if (err)
				return err;
		}
		at += step;
		if (zero[i])
			run = at;
	}
	return write && at > run ? store_pwrite(st, data + run, at - run, offset + run) : 0;
}

static PyObject *parts_result(struct store *st, uint64_t offset, uint64_t length, const bool *zero,
			      size_t n)
{
	uint64_t first = offset >> st->block_shift, end = offset + length;
	PyObject *written = PyList_New(0), *zeroes = PyList_New(0);
	size_t i, next;

	for (i = 0; written && zeroes && i < n; i = next) {
		uint64_t from = (first + i) << st->block_shift, to;

		for (next = i + 1; next < n && zero[next] == zero[i];)
			next++;
		if (!zero[i]) {
			if (add_run(written, first + i, next - i))
				Py_CLEAR(written);
			continue;
		}
		to = (first + next) << st->block_shift;
		if (add_run(zeroes, from > offset ? from : offset, to < end ? to : end))
			Py_CLEAR(zeroes);
	}
	if (!written || !zeroes) {
		Py_XDECREF(written);
		Py_XDECREF(zeroes);
		return NULL;
	}
	return Py_BuildValue("NN", written, zeroes);
}

static PyObject *nonzero(StoreObject *self, PyObject *args, bool write)
{
	struct store *st = self->st;
	unsigned long long offset;
	PyObject *result = NULL;
	bool *zero = NULL;
	Py_buffer data;
	size_t n = 0;
	int err = -EINVAL;

	if (!PyArg_ParseTuple(args, "Ky*", &offset, &data))
		return NULL;
	if (data.len && offset <= st->size && (uint64_t)data.len <= st->size - offset) {
		n = ((offset + (uint64_t)data.len - 1) >> st->block_shift) -
		    (offset >> st->block_shift) + 1;
		zero = malloc(n * sizeof(*zero));
		err = zero ? 0 : -ENOMEM;
	}
	if (!err) {
		Py_BEGIN_ALLOW_THREADS
		err = find_parts(st, data.buf, (uint64_t)data.len, offset, zero, n, write);
		Py_END_ALLOW_THREADS
	}
	result = err ? none_or(err) : parts_result(st, offset, (uint64_t)data.len, zero, n);
	free(zero);
	PyBuffer_Release(&data);
	return result;
}

PyObject *store_py_write_nonzero(StoreObject *self, PyObject *args)
{
	return nonzero(self, args, true);
}

PyObject *store_py_find_nonzero(StoreObject *self, PyObject *args)
{
	return nonzero(self, args, false);
}
