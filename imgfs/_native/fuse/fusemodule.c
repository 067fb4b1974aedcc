/* imgfs._native._fuse: the interposer and its request threads for Python.  See _fuse.pyi. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "fast.h"

#include <errno.h>

static PyObject *extra_handler;   /* called as handler(name, request, inode, handle, arguments) */

static PyObject *none_or_oserror(int err)
{
	if (err < 0) {
		errno = -err;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	Py_RETURN_NONE;
}

/* ---- operations that pyfuse3 lacks: Python answers later, with reply_* ---- */

static void call_extra(fuse_req_t req, const char *name, fuse_ino_t ino,
		       const struct fuse_file_info *fi, PyObject *args)
{
	PyObject *result = NULL;

	if (args && extra_handler)
		result = PyObject_CallFunction(extra_handler, "sKKKO", name,
					       (unsigned long long)(uintptr_t)req,
					       (unsigned long long)ino,
					       (unsigned long long)(fi ? fi->fh : 0), args);
	if (!result) {
		if (PyErr_Occurred())
			PyErr_WriteUnraisable(extra_handler);
		fuse_reply_err(req, EIO);
	}
	Py_XDECREF(result);
	Py_XDECREF(args);
}

void extra_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence, struct fuse_file_info *fi)
{
	PyGILState_STATE gil = PyGILState_Ensure();

	call_extra(req, "lseek", ino, fi, Py_BuildValue("(Li)", (long long)off, whence));
	PyGILState_Release(gil);
}

void extra_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length,
		     struct fuse_file_info *fi)
{
	PyGILState_STATE gil = PyGILState_Ensure();

	call_extra(req, "fallocate", ino, fi,
		   Py_BuildValue("(iLL)", mode, (long long)offset, (long long)length));
	PyGILState_Release(gil);
}

void extra_copy_file_range(fuse_req_t req, fuse_ino_t ino_in, off_t off_in,
			   struct fuse_file_info *fi_in, fuse_ino_t ino_out, off_t off_out,
			   struct fuse_file_info *fi_out, size_t len, int flags)
{
	PyGILState_STATE gil = PyGILState_Ensure();

	call_extra(req, "copy_file_range", ino_in, fi_in,
		   Py_BuildValue("(LKKLKi)", (long long)off_in, (unsigned long long)ino_out,
				 (unsigned long long)(fi_out ? fi_out->fh : 0), (long long)off_out,
				 (unsigned long long)len, flags));
	PyGILState_Release(gil);
}

static PyObject *set_extra_handler(PyObject *self, PyObject *handler)
{
	(void)self;
	Py_INCREF(handler);
	Py_XSETREF(extra_handler, handler);
	Py_RETURN_NONE;
}

static PyObject *reply_lseek(PyObject *self, PyObject *args)
{
	unsigned long long req;
	long long offset;

	(void)self;
	if (!PyArg_ParseTuple(args, "KL", &req, &offset))
		return NULL;
	return PyLong_FromLong(fuse_reply_lseek((fuse_req_t)(uintptr_t)req, offset));
}

static PyObject *reply_err(PyObject *self, PyObject *args)
{
	unsigned long long req;
	int error;

	(void)self;
	if (!PyArg_ParseTuple(args, "Ki", &req, &error))
		return NULL;
	return PyLong_FromLong(fuse_reply_err((fuse_req_t)(uintptr_t)req, error));
}

static PyObject *reply_write(PyObject *self, PyObject *args)
{
	unsigned long long req, count;

	(void)self;
	if (!PyArg_ParseTuple(args, "KK", &req, &count))
		return NULL;
	return PyLong_FromLong(fuse_reply_write((fuse_req_t)(uintptr_t)req, (size_t)count));
}

/* ---- session ---- */

static PyObject *arm(PyObject *self, PyObject *args)
{
	int err;

	(void)self;
	if (!PyArg_ParseTuple(args, "|In", &max_background, &max_pending_writes))
		return NULL;
	if (atomic_load(&armed))
		return none_or_oserror(-EALREADY);
	err = queue_open();
	if (!err) {
		atomic_store(&hooks_called, 0);
		atomic_store(&armed, true);
	}
	return none_or_oserror(err);
}

static PyObject *hooked(PyObject *self, PyObject *unused)
{
	unsigned called = atomic_load(&hooks_called);

	(void)self;
	(void)unused;
	return PyBool_FromLong((called & (HOOK_NEW | HOOK_FD)) == (HOOK_NEW | HOOK_FD) &&
			       is_interposed());
}

static PyObject *start(PyObject *self, PyObject *args)
{
	unsigned count;

	(void)self;
	if (!PyArg_ParseTuple(args, "I", &count))
		return NULL;
	return none_or_oserror(session ? threads_start(session, count) : -ENOTCONN);
}

static PyObject *stop(PyObject *self, PyObject *unused)
{
	(void)self;
	(void)unused;
	Py_BEGIN_ALLOW_THREADS
	threads_stop();
	Py_END_ALLOW_THREADS
	inode_clear();
	name_clear();
	Py_RETURN_NONE;
}

static PyObject *disarm(PyObject *self, PyObject *unused)
{
	(void)self;
	(void)unused;
	atomic_store(&armed, false);
	queue_close();
	session = NULL;
	Py_RETURN_NONE;
}

static PyObject *status(PyObject *self, PyObject *unused)
{
	(void)self;
	(void)unused;
	return Py_BuildValue("{s:O,s:i,s:n,s:I,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:K}",
			     "ended", queue_ended() ? Py_True : Py_False,
			     "error", queue_error(),
			     "queue_length", (Py_ssize_t)queue_length(),
			     "max_write", atomic_load(&max_write),
			     "reads", (unsigned long long)atomic_load(&stats.reads),
			     "bytes", (unsigned long long)atomic_load(&stats.bytes),
			     "spliced", (unsigned long long)atomic_load(&stats.spliced),
			     "seeks", (unsigned long long)atomic_load(&stats.seeks),
			     "lookups", (unsigned long long)atomic_load(&stats.lookups),
			     "queued", (unsigned long long)atomic_load(&stats.queued),
			     "parked", (unsigned long long)atomic_load(&stats.parked),
			     "interrupts", (unsigned long long)atomic_load(&stats.interrupts),
			     "waited_for_disk", (unsigned long long)atomic_load(&stats.slow),
			     "writes", (unsigned long long)atomic_load(&stats.writes),
			     "bytes_written", (unsigned long long)atomic_load(&stats.bytes_written),
			     "writes_spliced",
			     (unsigned long long)atomic_load(&stats.writes_spliced),
			     "zeroes", (unsigned long long)atomic_load(&stats.zeroes),
			     "syncs", (unsigned long long)atomic_load(&stats.syncs),
			     "handed_over", (unsigned long long)atomic_load(&stats.handed_over));
}

/* ---- interrupts ---- */

static PyObject *interrupt_fd(PyObject *self, PyObject *unused)
{
	(void)self;
	(void)unused;
	return PyLong_FromLong(queue_interrupt_fd());
}

static PyObject *take_interrupts(PyObject *self, PyObject *unused)
{
	struct interrupt found[64];
	size_t n = queue_take_interrupts(found, 64), i;
	PyObject *list = PyList_New((Py_ssize_t)n);

	(void)self;
	(void)unused;
	for (i = 0; list && i < n; i++) {
		PyObject *t = Py_BuildValue("KK", (unsigned long long)found[i].target,
					    (unsigned long long)found[i].unique);

		if (!t)
			Py_CLEAR(list);
		else
			PyList_SET_ITEM(list, (Py_ssize_t)i, t);
	}
	return list;
}

static PyObject *parked(PyObject *self, PyObject *unused)
{
	struct waiting found[1024];
	size_t n = queue_parked(found, sizeof(found) / sizeof(*found)), i;
	PyObject *dict = PyDict_New();

	(void)self;
	(void)unused;
	for (i = 0; dict && i < n; i++) {
		PyObject *unique = PyLong_FromUnsignedLongLong(found[i].unique);
		PyObject *pid = PyLong_FromUnsignedLong(found[i].pid);

		if (!unique || !pid || PyDict_SetItem(dict, unique, pid))
			Py_CLEAR(dict);
		Py_XDECREF(unique);
		Py_XDECREF(pid);
	}
	return dict;
}

static PyObject *interrupt_parked(PyObject *self, PyObject *unique)
{
	unsigned long long which = PyLong_AsUnsignedLongLong(unique);
	bool there;

	(void)self;
	if (PyErr_Occurred())
		return NULL;
	there = queue_forget_parked(which);
	if (there)
		reply_error(which, EINTR);
	return PyBool_FromLong(there);
}

static PyObject *retry_interrupt(PyObject *self, PyObject *unique)
{
	unsigned long long u = PyLong_AsUnsignedLongLong(unique);

	(void)self;
	if (PyErr_Occurred())
		return NULL;
	/* The kernel sends it again if the request is still on its way, and drops it if not. */
	return PyLong_FromLong(reply_error(u, EAGAIN));
}

static PyObject *current_unique_(PyObject *self, PyObject *unused)
{
	(void)self;
	(void)unused;
	return PyLong_FromUnsignedLongLong(current_unique);
}

static PyObject *current_pid_(PyObject *self, PyObject *unused)
{
	(void)self;
	(void)unused;
	return PyLong_FromUnsignedLong(current_pid);
}

static PyObject *current_dsync_(PyObject *self, PyObject *unused)
{
	(void)self;
	(void)unused;
	return PyBool_FromLong(current_dsync);
}

/* ---- inodes ---- */

static PyObject *publish(PyObject *self, PyObject *args)
{
	unsigned long long inode;
	struct segmap *map;
	PyObject *obj;

	(void)self;
	if (!PyArg_ParseTuple(args, "KO", &inode, &obj))
		return NULL;
	map = maps->from_object(obj);
	if (!map)
		return NULL;
	return none_or_oserror(inode_publish(inode, map));
}

static PyObject *retract(PyObject *self, PyObject *inode)
{
	unsigned long long number = PyLong_AsUnsignedLongLong(inode);

	(void)self;
	if (PyErr_Occurred())
		return NULL;
	return PyBool_FromLong(inode_retract(number));
}

static PyObject *publish_name(PyObject *self, PyObject *args)
{
	unsigned long long parent, inode, generation, size, blocks;
	struct fuse_entry_out out = { 0 };
	const char *name;
	Py_ssize_t length;
	int err;

	(void)self;
	if (!PyArg_ParseTuple(args, "Ky#(KKKKIIIII)(KI)(KI)(KK)", &parent, &name, &length, &inode,
			      &generation, &size, &blocks, &out.attr.mode, &out.attr.nlink,
			      &out.attr.uid, &out.attr.gid, &out.attr.blksize, &out.attr.mtime,
			      &out.attr.mtimensec, &out.attr.ctime, &out.attr.ctimensec,
			      &out.entry_valid, &out.attr_valid))
		return NULL;
	out.nodeid = out.attr.ino = inode;
	out.generation = generation;
	out.attr.size = size;
	out.attr.blocks = blocks;
	out.attr.atime = out.attr.mtime;
	out.attr.atimensec = out.attr.mtimensec;
	err = name_publish(parent, name, (size_t)length, &out);
	if (err == -EEXIST)
		Py_RETURN_FALSE;
	if (err)
		return none_or_oserror(err);
	Py_RETURN_TRUE;
}

static PyObject *withdraw_name(PyObject *self, PyObject *args)
{
	unsigned long long parent;
	const char *name;
	Py_ssize_t length;

	(void)self;
	if (!PyArg_ParseTuple(args, "Ky#", &parent, &name, &length))
		return NULL;
	return PyLong_FromUnsignedLongLong(name_withdraw(parent, name, (size_t)length));
}

static PyMethodDef functions[] = {
	{ "set_extra_handler", set_extra_handler, METH_O, NULL },
	{ "reply_lseek", reply_lseek, METH_VARARGS, NULL },
	{ "reply_err", reply_err, METH_VARARGS, NULL },
	{ "reply_write", reply_write, METH_VARARGS, NULL },
	{ "arm", arm, METH_VARARGS, NULL },
	{ "hooked", hooked, METH_NOARGS, NULL },
	{ "start", start, METH_VARARGS, NULL },
	{ "stop", stop, METH_NOARGS, NULL },
	{ "disarm", disarm, METH_NOARGS, NULL },
	{ "status", status, METH_NOARGS, NULL },
	{ "interrupt_fd", interrupt_fd, METH_NOARGS, NULL },
	{ "take_interrupts", take_interrupts, METH_NOARGS, NULL },
	{ "retry_interrupt", retry_interrupt, METH_O, NULL },
	{ "parked", parked, METH_NOARGS, NULL },
	{ "interrupt_parked", interrupt_parked, METH_O, NULL },
	{ "current_unique", current_unique_, METH_NOARGS, NULL },
	{ "current_pid", current_pid_, METH_NOARGS, NULL },
	{ "current_dsync", current_dsync_, METH_NOARGS, NULL },
	{ "publish", publish, METH_VARARGS, NULL },
	{ "publish_name", publish_name, METH_VARARGS, NULL },
	{ "withdraw_name", withdraw_name, METH_VARARGS, NULL },
	{ "retract", retract, METH_O, NULL },
	{ NULL, NULL, 0, NULL },
};

static struct PyModuleDef module_def = {
	PyModuleDef_HEAD_INIT,
	.m_name = "imgfs._native._fuse",
	.m_size = -1,
	.m_methods = functions,
};

PyMODINIT_FUNC PyInit__fuse(void)
{
	PyObject *module, *number;

	maps = PyCapsule_Import(MAP_CAPSULE, 0);
	if (!maps)
		return NULL;
	*maps->settled = queue_settle;
	module = PyModule_Create(&module_def);
	number = PyLong_FromUnsignedLongLong(DIRECT_HANDLE);
	if (module && PyModule_AddObjectRef(module, "DIRECT_HANDLE", number))
		Py_CLEAR(module);
	Py_XDECREF(number);
	return module;
}
