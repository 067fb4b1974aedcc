/* The Python type Store, over store.c. */
#define PY_SSIZE_T_CLEAN
#include "objects.h"

#include <errno.h>

static int store_fill(StoreObject *self, PyObject *args, PyObject *kw)
{
	static char *names[] = { "fd", "size", "block_size", "whole", NULL };
	unsigned long long size, block_size = 65536;
	int fd, whole = 0;

	if (!PyArg_ParseTupleAndKeywords(args, kw, "iK|K$p", names, &fd, &size, &block_size, &whole))
		return -1;
	self->st = store_new(fd, size, block_size, whole);
	if (!self->st) {
		PyErr_SetFromErrno(errno == EINVAL ? PyExc_ValueError : PyExc_OSError);
		return -1;
	}
	return 0;
}

static void store_dealloc(StoreObject *self)
{
	if (self->st) {
		store_unhold_all(self->st);
		store_unref(self->st);
	}
	Py_TYPE(self)->tp_free((PyObject *)self);
}

static int blocks_arg(StoreObject *self, PyObject *args, unsigned long long *first,
		      unsigned long long *count)
{
	if (!PyArg_ParseTuple(args, "KK", first, count))
		return -1;
	if (*first > self->st->blocks || *count > self->st->blocks - *first) {
		PyErr_SetString(PyExc_ValueError, "blocks outside of the store");
		return -1;
	}
	return 0;
}

static int range_arg(StoreObject *self, PyObject *args, unsigned long long *offset,
		     unsigned long long *length)
{
	if (!PyArg_ParseTuple(args, "KK", offset, length))
		return -1;
	if (*offset > self->st->size || *length > self->st->size - *offset) {
		PyErr_SetString(PyExc_ValueError, "range outside of the store");
		return -1;
	}
	return 0;
}

static PyObject *store_set_present(StoreObject *self, PyObject *args)
{
	unsigned long long first, count;

	if (blocks_arg(self, args, &first, &count))
		return NULL;
	return PyLong_FromUnsignedLongLong(self->st->whole ? 0 : store_set(self->st, first, count));
}

static PyObject *store_clear_present(StoreObject *self, PyObject *args)
{
	unsigned long long first, count;

	if (blocks_arg(self, args, &first, &count))
		return NULL;
	return PyLong_FromUnsignedLongLong(self->st->whole ? 0 : store_clear(self->st, first, count));
}

static PyObject *store_set_coming_(StoreObject *self, PyObject *args)
{
	unsigned long long first, count;

	if (blocks_arg(self, args, &first, &count))
		return NULL;
	if (!self->st->whole)
		store_set_coming(self->st, first, count);
	Py_RETURN_NONE;
}

static PyObject *store_settle_(StoreObject *self, PyObject *args)
{
	unsigned long long first, count;

	if (blocks_arg(self, args, &first, &count))
		return NULL;
	if (!self->st->whole)
		store_settle(self->st, first, count);
	Py_RETURN_NONE;
}

static PyObject *store_is_present(StoreObject *self, PyObject *args)
{
	unsigned long long offset, length;

	if (range_arg(self, args, &offset, &length))
		return NULL;
	return PyBool_FromLong(store_covers(self->st, offset, length));
}

static PyObject *store_missing(StoreObject *self, PyObject *args)
{
	unsigned long long offset, length;
	uint64_t block, last, run = 0;
	PyObject *list;

	if (range_arg(self, args, &offset, &length))
		return NULL;
	list = PyList_New(0);
	if (!list || length == 0 || self->st->whole)
		return list;
	last = (offset + length - 1) >> self->st->block_shift;
	for (block = offset >> self->st->block_shift; block <= last; block++) {
		if (!store_is_here(self->st, block, offset, offset + length)) {
			run++;
		} else if (run) {
			if (add_run(list, block - run, run))
				goto error;
			run = 0;
		}
	}
	if (run && add_run(list, block - run, run))
		goto error;
	return list;
error:
	Py_DECREF(list);
	return NULL;
}

static PyObject *store_oldest_runs(StoreObject *self, PyObject *args)
{
	Py_ssize_t count;
	size_t found, i, start;
	uint64_t *blocks;
	PyObject *list;

	if (!PyArg_ParseTuple(args, "n", &count))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	blocks = store_oldest(self->st, count < 0 ? 0 : (size_t)count, &found);
	Py_END_ALLOW_THREADS
	list = PyList_New(0);
	for (i = 0; list && i < found; i = start) {
		for (start = i + 1; start < found && blocks[start] == blocks[start - 1] + 1;)
			start++;
		if (add_run(list, blocks[i], start - i))
			Py_CLEAR(list);
	}
	free(blocks);
	return list;
}

static PyObject *store_age(StoreObject *self, PyObject *unused)
{
	int64_t age;

	(void)unused;
	Py_BEGIN_ALLOW_THREADS
	age = store_oldest_age(self->st);
	Py_END_ALLOW_THREADS
	return PyLong_FromLongLong(age);
}

static PyObject *store_attach_(StoreObject *self, PyObject *fd)
{
	long number = PyLong_AsLong(fd);

	if (PyErr_Occurred())
		return NULL;
	return none_or(store_attach(self->st, (int)number));
}

static PyObject *store_detach_(StoreObject *self, PyObject *unused)
{
	(void)unused;
	return PyBool_FromLong(store_detach(self->st));
}

static PyObject *store_fileno(StoreObject *self, PyObject *unused)
{
	(void)unused;
	return PyLong_FromLong(self->st->fd);
}

/* A whole store's file, for as long as it is used; -ENOTCONN: it is detached. */
static int enter(struct store *st, unsigned *token)
{
	*token = store_enter(st);
	if (!st->whole || !atomic_load(&st->is_away))
		return 0;
	store_leave(st, *token);
	return -ENOTCONN;
}

static PyObject *store_read(StoreObject *self, PyObject *args)
{
	unsigned long long offset, length;
	PyObject *bytes;
	unsigned token;
	int err;

	if (range_arg(self, args, &offset, &length))
		return NULL;
	bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
	if (!bytes)
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	err = enter(self->st, &token);
	if (!err) {
		err = store_pread(self->st, PyBytes_AS_STRING(bytes), length, offset, false);
		store_leave(self->st, token);
	}
	Py_END_ALLOW_THREADS
	if (err) {
		Py_DECREF(bytes);
		return none_or(err);
	}
	return bytes;
}

static PyObject *store_write(StoreObject *self, PyObject *args)
{
	unsigned long long offset;
	Py_buffer data;
	unsigned token;
	int err = -EINVAL;

	if (!PyArg_ParseTuple(args, "Ky*", &offset, &data))
		return NULL;
	if (offset <= self->st->size && (uint64_t)data.len <= self->st->size - offset) {
		Py_BEGIN_ALLOW_THREADS
		err = enter(self->st, &token);
		if (!err) {
			err = store_pwrite(self->st, data.buf, (uint64_t)data.len, offset);
			store_leave(self->st, token);
		}
		Py_END_ALLOW_THREADS
	}
	PyBuffer_Release(&data);
	return none_or(err);
}

static PyObject *store_punch_(StoreObject *self, PyObject *args)
{
	unsigned long long offset, length;
	int err;

	if (range_arg(self, args, &offset, &length))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	err = store_punch(self->st, length, offset);
	Py_END_ALLOW_THREADS
	/* The range is right: EINVAL is the device's, which punches whole sectors only. */
	if (err == -STORE_DAMAGED)
		return raise_damage();
	if (err) {
		errno = -err;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	Py_RETURN_NONE;
}

static PyObject *store_resize_(StoreObject *self, PyObject *size)
{
	unsigned long long bytes = PyLong_AsUnsignedLongLong(size);

	if (PyErr_Occurred())
		return NULL;
	return none_or(store_resize(self->st, bytes));
}

static PyObject *store_quiesce_(StoreObject *self, PyObject *unused)
{
	(void)unused;
	Py_BEGIN_ALLOW_THREADS
	store_quiesce(self->st);
	Py_END_ALLOW_THREADS
	Py_RETURN_NONE;
}

static PyObject *store_get(StoreObject *self, void *what)
{
	switch (*(const char *)what) {
	case 's':
		return PyLong_FromUnsignedLongLong(self->st->size);
	case 'b':
		return PyLong_FromUnsignedLongLong(UINT64_C(1) << self->st->block_shift);
	case 'p':
		return PyLong_FromSize_t(atomic_load(&self->st->present));
	case 'f':
		return PyBool_FromLong(store_is_sealed(self->st));
	case 'a':
		return PyLong_FromUnsignedLongLong(store_sums_accepted(self->st));
	default:
		return PyLong_FromUnsignedLongLong(atomic_load(&self->st->bytes_served));
	}
}

static PyObject *store_watch_(StoreObject *self, PyObject *args)
{
	unsigned long long start, end;
	unsigned slot;
	int fd;

	if (!PyArg_ParseTuple(args, "IKK", &slot, &start, &end))
		return NULL;
	if (slot >= MAX_WATCHES || start > end)
		return none_or(-EINVAL);
	fd = store_watch_fd(self->st);
	if (fd < 0)
		return none_or(fd);
	return none_or(store_watch(self->st, slot, start == end ? NO_WATCH : start, end));
}

static PyObject *store_watch_fd_(StoreObject *self, PyObject *unused)
{
	int fd = store_watch_fd(self->st);

	(void)unused;
	return fd < 0 ? none_or(fd) : PyLong_FromLong(fd);
}

static PyObject *store_take_seen_(StoreObject *self, PyObject *unused)
{
	unsigned seen = store_take_seen(self->st), slot;
	PyObject *list = PyList_New(0);

	(void)unused;
	for (slot = 0; list && seen; slot++, seen >>= 1) {
		PyObject *number = seen & 1 ? PyLong_FromLong((long)slot) : NULL;

		if (seen & 1 && (!number || PyList_Append(list, number)))
			Py_CLEAR(list);
		Py_XDECREF(number);
	}
	return list;
}

static PyMethodDef store_methods[] = {
	{ "set_present", (PyCFunction)store_set_present, METH_VARARGS, NULL },
	{ "clear_present", (PyCFunction)store_clear_present, METH_VARARGS, NULL },
	{ "set_coming", (PyCFunction)store_set_coming_, METH_VARARGS, NULL },
	{ "settle", (PyCFunction)store_settle_, METH_VARARGS, NULL },
	{ "is_present", (PyCFunction)store_is_present, METH_VARARGS, NULL },
	{ "missing", (PyCFunction)store_missing, METH_VARARGS, NULL },
	{ "oldest", (PyCFunction)store_oldest_runs, METH_VARARGS, NULL },
	{ "oldest_age", (PyCFunction)store_age, METH_NOARGS, NULL },
	{ "attach", (PyCFunction)store_attach_, METH_O, NULL },
	{ "detach", (PyCFunction)store_detach_, METH_NOARGS, NULL },
	{ "fileno", (PyCFunction)store_fileno, METH_NOARGS, NULL },
	{ "read", (PyCFunction)store_read, METH_VARARGS, NULL },
	{ "write", (PyCFunction)store_write, METH_VARARGS, NULL },
	{ "write_nonzero", (PyCFunction)store_py_write_nonzero, METH_VARARGS, NULL },
	{ "find_nonzero", (PyCFunction)store_py_find_nonzero, METH_VARARGS, NULL },
	{ "hold", (PyCFunction)store_py_hold, METH_VARARGS, NULL },
	{ "unhold", (PyCFunction)store_py_unhold, METH_VARARGS, NULL },
	{ "held_left", (PyCFunction)store_py_held_left, METH_VARARGS, NULL },
	{ "resize", (PyCFunction)store_resize_, METH_O, NULL },
	{ "punch", (PyCFunction)store_punch_, METH_VARARGS, NULL },
	{ "quiesce", (PyCFunction)store_quiesce_, METH_NOARGS, NULL },
	{ "attach_sums", (PyCFunction)store_py_attach_sums, METH_VARARGS, NULL },
	{ "verify", (PyCFunction)store_py_verify, METH_VARARGS, NULL },
	{ "renew_sums", (PyCFunction)store_py_renew_sums, METH_VARARGS, NULL },
	{ "seal", (PyCFunction)store_py_seal, METH_VARARGS, NULL },
	{ "before_cut", (PyCFunction)store_py_before_cut, METH_O, NULL },
	{ "cut_sums", (PyCFunction)store_py_cut_sums, METH_O, NULL },
	{ "sums_done", (PyCFunction)store_py_sums_done, METH_NOARGS, NULL },
	{ "sync_sums", (PyCFunction)store_py_sync_sums, METH_NOARGS, NULL },
	{ "watch", (PyCFunction)store_watch_, METH_VARARGS, NULL },
	{ "watch_fd", (PyCFunction)store_watch_fd_, METH_NOARGS, NULL },
	{ "take_seen", (PyCFunction)store_take_seen_, METH_NOARGS, NULL },
	{ NULL, NULL, 0, NULL },
};

static PyGetSetDef store_getset[] = {
	{ "size", (getter)store_get, NULL, NULL, "s" },
	{ "block_size", (getter)store_get, NULL, NULL, "b" },
	{ "present", (getter)store_get, NULL, NULL, "p" },
	{ "bytes_served", (getter)store_get, NULL, NULL, "r" },
	{ "is_sealed", (getter)store_get, NULL, NULL, "f" },
	{ "accepted", (getter)store_get, NULL, NULL, "a" },
	{ NULL, NULL, NULL, NULL, NULL },
};

static PyObject *store_new_(PyTypeObject *type, PyObject *args, PyObject *kw)
{
	PyObject *self = type->tp_alloc(type, 0);

	if (self && store_fill((StoreObject *)self, args, kw)) {
		Py_DECREF(self);
		return NULL;
	}
	return self;
}

PyTypeObject StoreType = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "imgfs._native._map.Store",
	.tp_basicsize = sizeof(StoreObject),
	.tp_flags = Py_TPFLAGS_DEFAULT,
	.tp_new = store_new_,
	.tp_init = no_init,
	.tp_dealloc = (destructor)store_dealloc,
	.tp_methods = store_methods,
	.tp_getset = store_getset,
};

