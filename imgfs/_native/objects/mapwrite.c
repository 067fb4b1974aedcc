/* The methods of SegmentMap that write; see _map.pyi for the contract. */
#define PY_SSIZE_T_CLEAN
#include "array.h"
#include "objects.h"

#include <errno.h>

#define MAX_ORIGINS 1024   /* stores that are asked for, and runs that are told of, at once */

static PyObject *bool_or(int result)
{
	return result < 0 ? none_or(result) : PyBool_FromLong(result);
}

PyObject *map_set_target(MapObject *self, PyObject *args)
{
	PyObject *store, *dirty = Py_None;
	LogObject *log = NULL;
	struct store *st;
	int err;

	if (!PyArg_ParseTuple(args, "O|OO!", &store, &dirty, &LogType, &log) ||
	    optional_store(store, &st))
		return NULL;
	if (dirty != Py_None && !PyObject_TypeCheck(dirty, &MapType)) {
		PyErr_SetString(PyExc_TypeError, "dirty must be a SegmentMap or None");
		return NULL;
	}
	Py_BEGIN_ALLOW_THREADS
	err = segmap_set_target(self->map, st, dirty == Py_None ? NULL : ((MapObject *)dirty)->map,
				log ? log->log : NULL);
	Py_END_ALLOW_THREADS
	return none_or(err);
}

static PyObject *with_bytes(MapObject *self, PyObject *args,
			    int (*change)(struct segmap *, uint64_t, uint64_t, const void *))
{
	unsigned long long offset;
	Py_buffer data;
	int result;

	if (!PyArg_ParseTuple(args, "Ky*", &offset, &data))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	result = change(self->map, offset, (uint64_t)data.len, data.buf);
	Py_END_ALLOW_THREADS
	PyBuffer_Release(&data);
	return bool_or(result);
}

PyObject *map_write(MapObject *self, PyObject *args)
{
	return with_bytes(self, args, segmap_write);
}

PyObject *map_copy_up(MapObject *self, PyObject *args)
{
	return with_bytes(self, args, segmap_copy_up);
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

PyObject *map_below(MapObject *self, PyObject *args)
{
	unsigned long long start, end;
	MapObject *lower;
	int result;

	if (!PyArg_ParseTuple(args, "KKO!", &start, &end, &MapType, &lower))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	result = segmap_below(self->map, start, end, lower->map);
	Py_END_ALLOW_THREADS
	return bool_or(result);
}

PyObject *map_reclaim(MapObject *self, PyObject *args)
{
	unsigned long long start, end;
	StoreObject *store;
	MapObject *dirty;
	int err;

	if (!PyArg_ParseTuple(args, "KKO!O!", &start, &end, &StoreType, &store, &MapType, &dirty))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	err = segmap_reclaim(self->map, start, end, store->st, dirty->map);
	Py_END_ALLOW_THREADS
	return none_or(err);
}

PyObject *map_move(MapObject *self, PyObject *args)
{
	unsigned long long offset, from_offset, length;
	MapObject *from;
	uint64_t moved;
	int result;

	if (!PyArg_ParseTuple(args, "KO!KK", &offset, &MapType, &from, &from_offset, &length))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	result = segmap_move(self->map, offset, from->map, from_offset, length, &moved);
	Py_END_ALLOW_THREADS
	return result == 1 ? PyLong_FromUnsignedLongLong(moved) : none_or(result);
}

PyObject *map_stored(MapObject *self, PyObject *args)
{
	unsigned long long offset, length;
	uint64_t found;

	if (!PyArg_ParseTuple(args, "KK", &offset, &length))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	found = segmap_stored(self->map, offset, length);
	Py_END_ALLOW_THREADS
	return PyLong_FromUnsignedLongLong(found);
}

static PyObject *origins_list(const struct origin *found, size_t n)
{
	PyObject *list = PyList_New((Py_ssize_t)n);
	size_t i;

	for (i = 0; list && i < n; i++) {
		PyObject *t = Py_BuildValue("KKi", (unsigned long long)found[i].start,
					    (unsigned long long)found[i].end, found[i].which);

		if (!t)
			Py_CLEAR(list);
		else
			PyList_SET_ITEM(list, (Py_ssize_t)i, t);
	}
	return list;
}

PyObject *map_origins(MapObject *self, PyObject *args)
{
	struct store *stores[MAX_ORIGINS];
	struct origin found[MAX_ORIGINS];
	unsigned long long offset, length;
	Py_ssize_t n_stores, i;
	PyObject *list, *kept;
	size_t n = 0;
	bool good;

	if (!PyArg_ParseTuple(args, "KKO!", &offset, &length, &PyList_Type, &list))
		return NULL;
	/* References of our own: the list may change meanwhile. */
	kept = PyList_AsTuple(list);
	if (!kept)
		return NULL;
	n_stores = PyTuple_GET_SIZE(kept);
	good = n_stores <= MAX_ORIGINS && length <= UINT64_MAX - offset;
	if (!good)
		none_or(-EINVAL);
	for (i = 0; good && i < n_stores; i++)
		good = !optional_store(PyTuple_GET_ITEM(kept, i), &stores[i]);
	if (good) {
		Py_BEGIN_ALLOW_THREADS
		n = segmap_origins(self->map, offset, offset + length, stores, (size_t)n_stores,
				   found, MAX_ORIGINS);
		Py_END_ALLOW_THREADS
	}
	Py_DECREF(kept);
	return good ? origins_list(found, n) : NULL;
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

static PyObject *told(MapObject *self, int (*find)(struct segmap *, struct ranges *))
{
	struct ranges found;
	int err;

	Py_BEGIN_ALLOW_THREADS
	err = find(self->map, &found);
	Py_END_ALLOW_THREADS
	return err ? none_or(err) : tuple_of(&found);
}

PyObject *map_take(MapObject *self, PyObject *unused)
{
	(void)unused;
	return told(self, segmap_take);
}

PyObject *map_ranges(MapObject *self, PyObject *unused)
{
	(void)unused;
	return told(self, segmap_ranges);
}
