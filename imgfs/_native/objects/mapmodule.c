/* imgfs._native._map: stores and segment maps for Python.  See _map.pyi for the contract. */
#define PY_SSIZE_T_CLEAN
#include "api.h"
#include "array.h"
#include "objects.h"
#include "scan.h"

#include <errno.h>

static PyObject *scan_result(const struct scan *found)
{
	PyObject *ends = array_of(found->ends, found->n);

	return ends ? Py_BuildValue("Ny#", ends, found->n ? (const char *)found->flags : "",
				    (Py_ssize_t)found->n) : NULL;
}

static PyObject *map_new(PyTypeObject *type, PyObject *args, PyObject *kw)
{
	static char *names[] = { "size", NULL };
	unsigned long long size;
	MapObject *self;

	if (!PyArg_ParseTupleAndKeywords(args, kw, "K", names, &size))
		return NULL;
	if (size > INT64_MAX) {
		PyErr_SetString(PyExc_ValueError, "size is larger than a file can be");
		return NULL;
	}
	self = (MapObject *)type->tp_alloc(type, 0);
	if (!self)
		return NULL;
	self->map = segmap_new(size);
	if (!self->map) {
		Py_DECREF(self);
		return PyErr_NoMemory();
	}
	return (PyObject *)self;
}

static void map_dealloc(MapObject *self)
{
	if (self->map)
		segmap_unref(self->map);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

#define BATCH 128

static PyObject *map_segments(MapObject *self, PyObject *args)
{
	unsigned long long offset, length;
	struct seg_view views[BATCH];
	PyObject *list;
	uint64_t end;
	size_t n, i;

	if (!PyArg_ParseTuple(args, "KK", &offset, &length))
		return NULL;
	if (offset > self->map->size || length > self->map->size - offset)
		return none_or(-EINVAL);
	end = offset + length;
	list = PyList_New(0);
	while (list && offset < end) {
		n = segmap_segments(self->map, offset, end, views, BATCH);
		for (i = 0; list && i < n; i++) {
			PyObject *t = Py_BuildValue("KKii", (unsigned long long)views[i].start,
						    (unsigned long long)views[i].end,
						    views[i].kind, views[i].seek);

			if (!t || PyList_Append(list, t))
				Py_CLEAR(list);
			Py_XDECREF(t);
		}
		if (n == 0)
			break;
		offset = views[n - 1].end;
	}
	return list;
}

static PyObject *map_extents(MapObject *self, PyObject *args)
{
	struct scan found = { NULL, NULL, 0, 0 };
	unsigned long long offset, length;
	PyObject *result;
	int err = -EINVAL;

	if (!PyArg_ParseTuple(args, "KK", &offset, &length))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	if (length <= self->map->size && offset <= self->map->size - length)
		err = segmap_extents(self->map, offset, offset + length, &found);
	Py_END_ALLOW_THREADS
	result = err ? none_or(err) : scan_result(&found);
	free(found.ends);
	free(found.flags);
	return result;
}

static PyObject *map_read(MapObject *self, PyObject *args)
{
	unsigned long long offset, length;
	PyObject *bytes;
	int result, nowait = 0;

	if (!PyArg_ParseTuple(args, "KK|p", &offset, &length, &nowait))
		return NULL;
	if (offset > self->map->size || length > self->map->size - offset)
		return none_or(-EINVAL);
	bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
	if (!bytes)
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	result = segmap_read(self->map, offset, length, PyBytes_AS_STRING(bytes),
			      nowait ? SEG_NOWAIT : SEG_WAIT);
	Py_END_ALLOW_THREADS
	if (result == 1)
		return bytes;
	Py_DECREF(bytes);
	return none_or(nowait && result == -EAGAIN ? 0 : result);
}

static PyObject *map_seek(MapObject *self, PyObject *args)
{
	long long offset;
	unsigned long long size = UINT64_MAX;
	uint64_t found;
	int whence, result;

	if (!PyArg_ParseTuple(args, "Li|K", &offset, &whence, &size))
		return NULL;
	result = segmap_seek_in(self->map, offset, whence, size, PyTuple_GET_SIZE(args) > 2, &found);
	if (result == 1)
		return PyLong_FromUnsignedLongLong(found);
	return none_or(result);
}

static PyObject *map_next_unknown(MapObject *self, PyObject *args)
{
	unsigned long long start, end;
	uint64_t found;

	if (!PyArg_ParseTuple(args, "KK", &start, &end))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	found = segmap_next_unknown(self->map, start, end);
	Py_END_ALLOW_THREADS
	return PyLong_FromUnsignedLongLong(found);
}

static PyObject *map_data_bytes(MapObject *self, PyObject *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLongLong(segmap_data_bytes(self->map));
}

static Py_ssize_t map_len(MapObject *self)
{
	return (Py_ssize_t)segmap_count(self->map);
}

static PyObject *map_get(MapObject *self, void *what)
{
	struct segmap *map = self->map;

	switch (*(const char *)what) {
	case 's':
		return PyLong_FromUnsignedLongLong(map->size);
	case 'r':
		return PyLong_FromUnsignedLongLong(atomic_load(&map->reads));
	case 'p':
		return PyLong_FromUnsignedLongLong(atomic_load(&map->reads_waited));
	case 't':
		return PyBool_FromLong(atomic_load(&map->target) != NULL);
	case 'w':
		return PyLong_FromUnsignedLongLong(atomic_load(&map->writes));
	case 'b':
		return PyLong_FromUnsignedLongLong(atomic_load(&map->bytes_written));
	case 'c':
		return PyLong_FromUnsignedLongLong(atomic_load(&map->changes));
	default:
		return PyLong_FromUnsignedLongLong(atomic_load(&map->bytes_served));
	}
}

#define KEYWORDS(f) (PyCFunction)(void (*)(void))(f), METH_VARARGS | METH_KEYWORDS, NULL

static PyMethodDef map_methods[] = {
	{ "load", (PyCFunction)map_load, METH_VARARGS, NULL },
	{ "set_zero", KEYWORDS(map_set_zero) },
	{ "set_ask", KEYWORDS(map_set_ask) },
	{ "set_store", KEYWORDS(map_set_store) },
	{ "set_literal", KEYWORDS(map_set_literal) },
	{ "copy", (PyCFunction)map_copy, METH_VARARGS, NULL },
	{ "fill_copy", (PyCFunction)map_fill_copy, METH_VARARGS, NULL },
	{ "put", (PyCFunction)map_put, METH_VARARGS, NULL },
	{ "fill", (PyCFunction)map_fill, METH_VARARGS, NULL },
	{ "set_ranges", (PyCFunction)map_set_ranges, METH_VARARGS, NULL },
	{ "replace_store", (PyCFunction)map_replace_store, METH_VARARGS, NULL },
	{ "fill_zero", KEYWORDS(map_fill_zero) },
	{ "fill_store", KEYWORDS(map_fill_store) },
	{ "fill_literal", KEYWORDS(map_fill_literal) },
	{ "set_target", (PyCFunction)map_set_target, METH_VARARGS, NULL },
	{ "write", (PyCFunction)map_write, METH_VARARGS, NULL },
	{ "copy_up", (PyCFunction)map_copy_up, METH_VARARGS, NULL },
	{ "zero", (PyCFunction)map_zero, METH_VARARGS, NULL },
	{ "below", (PyCFunction)map_below, METH_VARARGS, NULL },
	{ "reclaim", (PyCFunction)map_reclaim, METH_VARARGS, NULL },
	{ "move", (PyCFunction)map_move, METH_VARARGS, NULL },
	{ "stored", (PyCFunction)map_stored, METH_VARARGS, NULL },
	{ "origins", (PyCFunction)map_origins, METH_VARARGS, NULL },
	{ "resize", (PyCFunction)map_resize, METH_O, NULL },
	{ "settle", (PyCFunction)map_settle, METH_NOARGS, NULL },
	{ "sync", (PyCFunction)map_sync, METH_NOARGS, NULL },
	{ "take", (PyCFunction)map_take, METH_NOARGS, NULL },
	{ "ranges", (PyCFunction)map_ranges, METH_NOARGS, NULL },
	{ "segments", (PyCFunction)map_segments, METH_VARARGS, NULL },
	{ "next_unknown", (PyCFunction)map_next_unknown, METH_VARARGS, NULL },
	{ "extents", (PyCFunction)map_extents, METH_VARARGS, NULL },
	{ "data_bytes", (PyCFunction)map_data_bytes, METH_NOARGS, NULL },
	{ "read", (PyCFunction)map_read, METH_VARARGS, NULL },
	{ "seek", (PyCFunction)map_seek, METH_VARARGS, NULL },
	{ NULL, NULL, 0, NULL },
};

static PyGetSetDef map_getset[] = {
	{ "size", (getter)map_get, NULL, NULL, "s" },
	{ "reads", (getter)map_get, NULL, NULL, "r" },
	{ "reads_waited", (getter)map_get, NULL, NULL, "p" },
	{ "bytes_served", (getter)map_get, NULL, NULL, "n" },
	{ "writable", (getter)map_get, NULL, NULL, "t" },
	{ "writes", (getter)map_get, NULL, NULL, "w" },
	{ "bytes_written", (getter)map_get, NULL, NULL, "b" },
	{ "changes", (getter)map_get, NULL, NULL, "c" },
	{ NULL, NULL, NULL, NULL, NULL },
};

static PySequenceMethods map_sequence = { .sq_length = (lenfunc)map_len };

PyTypeObject MapType = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "imgfs._native._map.SegmentMap",
	.tp_basicsize = sizeof(MapObject),
	.tp_flags = Py_TPFLAGS_DEFAULT,
	.tp_new = map_new,
	.tp_init = no_init,
	.tp_dealloc = (destructor)map_dealloc,
	.tp_methods = map_methods,
	.tp_getset = map_getset,
	.tp_as_sequence = &map_sequence,
};

/* ---- module ---- */

static PyObject *scan_file_(PyObject *self, PyObject *args)
{
	struct scan found = { NULL, NULL, 0, 0 };
	unsigned long long size;
	PyObject *result;
	int fd, err;

	(void)self;
	if (!PyArg_ParseTuple(args, "iK", &fd, &size))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	err = scan_file(fd, size, &found);
	Py_END_ALLOW_THREADS
	result = err ? none_or(err) : scan_result(&found);
	free(found.ends);
	free(found.flags);
	return result;
}

static struct segmap *from_object(PyObject *obj)
{
	if (!PyObject_TypeCheck(obj, &MapType)) {
		PyErr_SetString(PyExc_TypeError, "a SegmentMap is needed");
		return NULL;
	}
	return ((MapObject *)obj)->map;
}

static const struct map_api api = { from_object, segmap_ref,   segmap_unref, segmap_read,
				    segmap_splice, segmap_seek, segmap_write,
				    segmap_write_from, segmap_read_target, segmap_zero,
				    segmap_sync, &store_settled_hook };

static PyMethodDef functions[] = {
	{ "scan_file", scan_file_, METH_VARARGS, NULL },
	{ NULL, NULL, 0, NULL },
};

static struct PyModuleDef module_def = {
	PyModuleDef_HEAD_INIT,
	.m_name = "imgfs._native._map",
	.m_size = -1,
	.m_methods = functions,
};

static int add_all(PyObject *m)
{
	PyObject *capsule;

	if (PyModule_AddType(m, &StoreType) || PyModule_AddType(m, &MapType) ||
	    PyModule_AddType(m, &LogType))
		return -1;
	if (PyModule_AddIntConstant(m, "ASK", SEG_ASK) ||
	    PyModule_AddIntConstant(m, "ZERO", SEG_ZERO) ||
	    PyModule_AddIntConstant(m, "LITERAL", SEG_LITERAL) ||
	    PyModule_AddIntConstant(m, "STORE", SEG_STORE) ||
	    PyModule_AddIntConstant(m, "DATA", SEEK_IS_DATA) ||
	    PyModule_AddIntConstant(m, "HOLE", SEEK_IS_HOLE) ||
	    PyModule_AddIntConstant(m, "UNKNOWN", SEEK_IS_UNKNOWN) ||
	    PyModule_AddIntConstant(m, "BELOW", SEG_BELOW) ||
	    PyModule_AddIntConstant(m, "OTHER", ORIGIN_OTHER) ||
	    PyModule_AddIntConstant(m, "ZEROES", ORIGIN_ZERO) ||
	    PyModule_AddIntConstant(m, "WATCHES", MAX_WATCHES) ||
	    PyModule_AddIntConstant(m, "BLOCK", SEG_BLOCK))
		return -1;
	capsule = PyCapsule_New((void *)&api, MAP_CAPSULE, NULL);
	if (PyModule_AddObjectRef(m, "_C_API", capsule)) {
		Py_XDECREF(capsule);
		return -1;
	}
	Py_DECREF(capsule);
	return 0;
}

PyMODINIT_FUNC PyInit__map(void)
{
	PyObject *m = PyModule_Create(&module_def);

	if (m && add_all(m))
		Py_CLEAR(m);
	return m;
}
