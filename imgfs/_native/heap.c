/* imgfs._native._heap: memory for large reads, and what the C library keeps of it.  See _heap.pyi. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <malloc.h>

static PyObject *uninitialized(PyObject *self, PyObject *arg)
{
	Py_ssize_t length = PyLong_AsSsize_t(arg);

	(void)self;
	if (PyErr_Occurred())
		return NULL;
	if (length < 0) {
		PyErr_SetString(PyExc_ValueError, "a length below zero");
		return NULL;
	}
	return PyByteArray_FromStringAndSize(NULL, length);
}

static PyObject *keep_large(PyObject *self, PyObject *args)
{
	int done = 0, free = 64 << 20;

	(void)self;
	if (!PyArg_ParseTuple(args, "|i", &free))
		return NULL;
#if defined(M_MMAP_THRESHOLD) && defined(M_TRIM_THRESHOLD)
	done = mallopt(M_MMAP_THRESHOLD, 32 << 20) && mallopt(M_TRIM_THRESHOLD, free);
#endif
	return PyBool_FromLong(done);
}

static PyObject *limit_arenas(PyObject *self, PyObject *arg)
{
	long most = PyLong_AsLong(arg);

	(void)self;
	if (PyErr_Occurred())
		return NULL;
#ifdef M_ARENA_MAX
	if (most > 0 && most <= INT_MAX)
		return PyBool_FromLong(mallopt(M_ARENA_MAX, (int)most));
#endif
	Py_RETURN_FALSE;
}

static PyObject *trim(PyObject *self, PyObject *unused)
{
	int done = 0;

	(void)self;
	(void)unused;
#ifdef __GLIBC__
	Py_BEGIN_ALLOW_THREADS
	done = malloc_trim(0);
	Py_END_ALLOW_THREADS
#endif
	return PyBool_FromLong(done);
}

static PyMethodDef functions[] = {
	{ "uninitialized", uninitialized, METH_O, NULL },
	{ "keep_large", keep_large, METH_VARARGS, NULL },
	{ "limit_arenas", limit_arenas, METH_O, NULL },
	{ "trim", trim, METH_NOARGS, NULL },
	{ NULL, NULL, 0, NULL },
};

static struct PyModuleDef module_def = {
	PyModuleDef_HEAD_INIT,
	.m_name = "imgfs._native._heap",
	.m_size = 0,
	.m_methods = functions,
};

PyMODINIT_FUNC PyInit__heap(void)
{
	return PyModule_Create(&module_def);
}
