/* The methods of SegmentMap that write; see _map.pyi for the contract. */
#define PY_SSIZE_T_CLEAN
#include "objects.h"

#include <errno.h>

static PyObject *bool_or(int result)
{
	return result < 0 ? none_or(result) : PyBool_FromLong(result);
}

PyObject *map_set_target(MapObject *self, PyObject *args)
{
	PyObject *store, *dirty = Py_None;
	struct store *st;
	int err;

	if (!PyArg_ParseTuple(args, "O|O", &store, &dirty) || optional_store(store, &st))
		return NULL;
	if (dirty != Py_None && !PyObject_TypeCheck(dirty, &MapType)) {
		PyErr_SetString(PyExc_TypeError, "dirty must be a SegmentMap or None");
		return NULL;
	}
	Py_BEGIN_ALLOW_THREADS
	err = segmap_set_target(self->map, st, dirty == Py_None ? NULL : ((MapObject *)dirty)->map);
	Py_END_ALLOW_THREADS
	return none_or(err);
}

PyObject *map_write(MapObject *self, PyObject *args)
{
	unsigned long long offset;
	Py_buffer data;
	int result;

	if (!PyArg_ParseTuple(args, "Ky*", &offset, &data))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	result = segmap_write(self->map, offset, (uint64_t)data.len, data.buf);
	Py_END_ALLOW_THREADS
	PyBuffer_Release(&data);
	return bool_or(result);
}

PyObject *map_copy_up(MapObject *self, PyObject *args)
{
	unsigned long long start;
	Py_buffer data;
	int result;

	if (!PyArg_ParseTuple(args, "Ky*", &start, &data))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	result = segmap_copy_up(self->map, start, (uint64_t)data.len, data.buf);
	Py_END_ALLOW_THREADS
	PyBuffer_Release(&data);
	return bool_or(result);
}

PyObject *map_zero(MapObject *self, PyObject *args)
{
	unsigned long long start, end;
	int result;

	if (!PyArg_ParseTuple(args, "KK", &start, &end))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	result = segmap_zero(self->map, start, end);
	Py_END_ALLOW_THREADS
	return bool_or(result);
}

PyObject *map_resize(MapObject *self, PyObject *size)
{
	unsigned long long bytes = PyLong_AsUnsignedLongLong(size);
	int err;

	if (PyErr_Occurred())
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	err = segmap_resize(self->map, bytes);
	Py_END_ALLOW_THREADS
	return none_or(err);
}

PyObject *map_sync(MapObject *self, PyObject *unused)
{
	int result;

	(void)unused;
	Py_BEGIN_ALLOW_THREADS
	result = segmap_sync(self->map);
	Py_END_ALLOW_THREADS
	return bool_or(result);
}

PyObject *map_settle(MapObject *self, PyObject *unused)
{
	(void)unused;
	segmap_settle(self->map);
	Py_RETURN_NONE;
}

static PyObject *tuple_of(struct ranges *found)
{
	PyObject *starts = array_of(found->starts, found->n), *ends = NULL, *result = NULL;

	ends = starts ? array_of(found->ends, found->n) : NULL;
	if (ends)
		result = Py_BuildValue("OOy#", starts, ends, found->n ? (const char *)found->kinds : "",
				       (Py_ssize_t)found->n);
	Py_XDECREF(starts);
	Py_XDECREF(ends);
	ranges_free(found);
	return result;
}

PyObject *map_take(MapObject *self, PyObject *unused)
{
	struct ranges taken;
	int err;

	(void)unused;
	Py_BEGIN_ALLOW_THREADS
	err = segmap_take(self->map, &taken);
	Py_END_ALLOW_THREADS
	return err ? none_or(err) : tuple_of(&taken);
}

PyObject *map_ranges(MapObject *self, PyObject *unused)
{
	struct ranges found;
	int err;

	(void)unused;
	Py_BEGIN_ALLOW_THREADS
	err = segmap_ranges(self->map, &found);
	Py_END_ALLOW_THREADS
	return err ? none_or(err) : tuple_of(&found);
}
