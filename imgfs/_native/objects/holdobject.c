/* Python buffers as ranges of a Store that are in memory, over storeheld.c. */
#define PY_SSIZE_T_CLEAN
#include "objects.h"

#include <errno.h>

static void release(Py_buffer *data)
{
	PyBuffer_Release(data);
	PyMem_Free(data);
}

void store_unhold_all(struct store *st)
{
	void *data;

	while ((data = store_unhold(st, ANY_HELD, 0)))
		release(data);
}

PyObject *store_py_hold(StoreObject *self, PyObject *args)
{
	struct store *st = self->st;
	unsigned long long offset;
	Py_buffer *data = PyMem_Malloc(sizeof(*data));
	bool fits, done = false;

	if (!data)
		return PyErr_NoMemory();
	if (!PyArg_ParseTuple(args, "Ky*", &offset, data)) {
		PyMem_Free(data);
		return NULL;
	}
	fits = data->len && offset <= st->size && (uint64_t)data->len <= st->size - offset;
	if (fits && !st->whole) {
		Py_BEGIN_ALLOW_THREADS
		done = store_hold(st, offset, data->buf, (uint64_t)data->len, data);
		Py_END_ALLOW_THREADS
	}
	if (!done)
		release(data);
	return fits ? PyBool_FromLong(done) : none_or(-EINVAL);
}

PyObject *store_py_unhold(StoreObject *self, PyObject *args)
{
	unsigned long long offset, length;
	void *data;

	if (!PyArg_ParseTuple(args, "KK", &offset, &length))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	data = offset == ANY_HELD ? NULL : store_unhold(self->st, offset, offset + length);
	Py_END_ALLOW_THREADS
	if (data)
		release(data);
	return PyBool_FromLong(data != NULL);
}

PyObject *store_py_held_left(StoreObject *self, PyObject *args)
{
	unsigned long long offset, length;

	if (!PyArg_ParseTuple(args, "KK", &offset, &length))
		return NULL;
	return PyLong_FromUnsignedLongLong(store_held_left(self->st, offset, offset + length));
}
