/* imgfs._native._heap: what the C library keeps of the memory that it was given back.  See _heap.pyi. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <malloc.h>

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
