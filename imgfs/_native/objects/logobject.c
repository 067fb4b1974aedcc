/* The Python type Log, over log.c. */
#define PY_SSIZE_T_CLEAN
#include "objects.h"

#include <errno.h>

static int log_fill(LogObject *self, PyObject *args)
{
	unsigned long long end, room, sequence;
	StoreObject *data;
	MapObject *state;
	int fd;

	if (!PyArg_ParseTuple(args, "iO!O!KKK", &fd, &StoreType, &data, &MapType, &state, &end,
			      &room, &sequence))
		return -1;
	self->log = log_new(fd, data->st, state->map, end, room, sequence);
	if (!self->log) {
		PyErr_SetFromErrno(PyExc_OSError);
		return -1;
	}
	return 0;
}

static void log_dealloc(LogObject *self)
{
	if (self->log)
		log_unref(self->log);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *log_append_(LogObject *self, PyObject *args)
{
	struct ranges_arg given;
	unsigned long long size;
	int err;

	if (!PyArg_ParseTuple(args, "Ky*y*y*", &size, &given.starts, &given.ends, &given.kinds))
		return NULL;
	err = ranges_of(&given);
	if (!err) {
		Py_BEGIN_ALLOW_THREADS
		err = log_append(self->log, size, &given.ranges);
		Py_END_ALLOW_THREADS
	}
	ranges_done(&given);
	return none_or(err);
}

static PyObject *log_cut_(LogObject *self, PyObject *unused)
{
	int err;

	(void)unused;
	Py_BEGIN_ALLOW_THREADS
	err = log_cut(self->log);
	Py_END_ALLOW_THREADS
	return none_or(err);
}

static PyObject *log_replace_(LogObject *self, PyObject *args)
{
	unsigned long long end;
	int fd;

	if (!PyArg_ParseTuple(args, "iK", &fd, &end))
		return NULL;
	return none_or(log_replace(self->log, fd, end));
}

static PyObject *log_hold_(LogObject *self, PyObject *unused)
{
	(void)unused;
	Py_BEGIN_ALLOW_THREADS
	log_hold(self->log);
	Py_END_ALLOW_THREADS
	Py_RETURN_NONE;
}

static PyObject *log_release_(LogObject *self, PyObject *unused)
{
	(void)unused;
	log_release(self->log);
	Py_RETURN_NONE;
}

static PyObject *log_set_lost(LogObject *self, PyObject *unused)
{
	(void)unused;
	atomic_store(&self->log->lost, true);
	Py_RETURN_NONE;
}

static PyObject *log_get(LogObject *self, void *what)
{
	switch (*(const char *)what) {
	case 's':
		return PyLong_FromUnsignedLongLong(self->log->size);
	case 'e':
		return PyLong_FromUnsignedLongLong(self->log->end);
	case 'n':
		return PyLong_FromUnsignedLongLong(self->log->sequence);
	case 'c':
		return PyLong_FromUnsignedLongLong(atomic_load(&self->log->commits));
	default:
		return PyBool_FromLong(atomic_load(&self->log->lost));
	}
}

static PyMethodDef log_methods[] = {
	{ "append", (PyCFunction)log_append_, METH_VARARGS, NULL },
	{ "cut", (PyCFunction)log_cut_, METH_NOARGS, NULL },
	{ "replace", (PyCFunction)log_replace_, METH_VARARGS, NULL },
	{ "hold", (PyCFunction)log_hold_, METH_NOARGS, NULL },
	{ "release", (PyCFunction)log_release_, METH_NOARGS, NULL },
	{ "mark_lost", (PyCFunction)log_set_lost, METH_NOARGS, NULL },
	{ NULL, NULL, 0, NULL },
};

static PyGetSetDef log_getset[] = {
	{ "size", (getter)log_get, NULL, NULL, "s" },
	{ "end", (getter)log_get, NULL, NULL, "e" },
	{ "sequence", (getter)log_get, NULL, NULL, "n" },
	{ "native_commits", (getter)log_get, NULL, NULL, "c" },
	{ "is_lost", (getter)log_get, NULL, NULL, "l" },
	{ NULL, NULL, NULL, NULL, NULL },
};

static PyObject *log_new_(PyTypeObject *type, PyObject *args, PyObject *kw)
{
	PyObject *self = type->tp_alloc(type, 0);

	(void)kw;
	if (self && log_fill((LogObject *)self, args)) {
		Py_DECREF(self);
		return NULL;
	}
	return self;
}

PyTypeObject LogType = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "imgfs._native._map.Log",
	.tp_basicsize = sizeof(LogObject),
	.tp_flags = Py_TPFLAGS_DEFAULT,
	.tp_new = log_new_,
	.tp_init = no_init,
	.tp_dealloc = (destructor)log_dealloc,
	.tp_methods = log_methods,
	.tp_getset = log_getset,
};
