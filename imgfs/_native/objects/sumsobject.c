/* The methods of Store that deal with its blocks' sums, and the error that reading damaged ones is. */
#define PY_SSIZE_T_CLEAN
#include "objects.h"

#include <errno.h>

PyObject *raise_damage(void)
{
	uint64_t offset;
	const char *name = store_damage(&offset);
	PyObject *errors, *kind;

	if (!name) {   /* the file system's own word for something else */
		errno = EUCLEAN;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	errors = PyImport_ImportModule("imgfs.errors");
	kind = errors ? PyObject_GetAttrString(errors, "CorruptSnapshot") : NULL;
	if (kind)
		PyErr_Format(kind, "%s: the 4 KiB at byte %llu do not fit their checksum in `sums` "
			     "beside it, so one of the two is damaged; bring both files back, or "
			     "delete the snapshot", name, (unsigned long long)offset);
	Py_XDECREF(kind);
	Py_XDECREF(errors);
	return NULL;
}

PyObject *store_py_attach_sums(StoreObject *self, PyObject *args)
{
	struct sums_given given;
	unsigned long long key;
	int trust, writable;

	if (!PyArg_ParseTuple(args, "iKssip", &given.fd, &key, &given.name, &given.closed, &trust,
			      &writable))
		return NULL;
	if (trust < SUMS_STRICT || trust > SUMS_DOUBT)
		return none_or(-EINVAL);
	given.key = key;
	given.trust = (enum sums_trust)trust;
	given.writable = writable;
	return none_or(store_sums_attach(self->st, &given));
}

static PyObject *with_range(StoreObject *self, PyObject *args,
			    int (*what)(struct store *, uint64_t, uint64_t))
{
	unsigned long long offset, length;
	int err;

	if (!PyArg_ParseTuple(args, "KK", &offset, &length))
		return NULL;
	if (offset > self->st->size || length > self->st->size - offset)
		return none_or(-EINVAL);
	Py_BEGIN_ALLOW_THREADS
	err = what(self->st, length, offset);
	Py_END_ALLOW_THREADS
	return none_or(err);
}

PyObject *store_py_verify(StoreObject *self, PyObject *args)
{
	return with_range(self, args, store_verify);
}

PyObject *store_py_renew_sums(StoreObject *self, PyObject *args)
{
	return with_range(self, args, store_sums_renew);
}

PyObject *store_py_seal(StoreObject *self, PyObject *args)
{
	unsigned age_ms, regions;
	int64_t sealed;

	if (!PyArg_ParseTuple(args, "II", &age_ms, &regions))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	sealed = store_seal(self->st, age_ms / 16, regions);
	Py_END_ALLOW_THREADS
	return sealed < 0 ? none_or((int)sealed) : PyLong_FromLongLong(sealed);
}

static PyObject *with_size(StoreObject *self, PyObject *size,
			   int (*what)(struct store *, uint64_t))
{
	unsigned long long bytes = PyLong_AsUnsignedLongLong(size);
	int err;

	if (PyErr_Occurred())
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	err = what(self->st, bytes);
	Py_END_ALLOW_THREADS
	return none_or(err);
}

PyObject *store_py_before_cut(StoreObject *self, PyObject *size)
{
	return with_size(self, size, store_sums_before_cut);
}

PyObject *store_py_cut_sums(StoreObject *self, PyObject *size)
{
	return with_size(self, size, store_sums_cut);
}

PyObject *store_py_sums_done(StoreObject *self, PyObject *unused)
{
	(void)unused;
	store_sums_done(self->st);
	Py_RETURN_NONE;
}

PyObject *store_py_sync_sums(StoreObject *self, PyObject *unused)
{
	int err;

	(void)unused;
	Py_BEGIN_ALLOW_THREADS
	err = store_sums_sync(self->st);
	Py_END_ALLOW_THREADS
	return none_or(err);
}
