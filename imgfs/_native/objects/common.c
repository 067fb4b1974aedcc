/* What the Python objects have in common. */
#define PY_SSIZE_T_CLEAN
#include "objects.h"

#include <errno.h>

PyObject *none_or(int err)
{
	if (err == -EINVAL) {
		PyErr_SetString(PyExc_ValueError, "range outside of the map or the store");
		return NULL;
	}
	if (err == -STORE_DAMAGED)
		return raise_damage();
	if (err < 0) {
		errno = -err;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	Py_RETURN_NONE;
}

/* Everything is set up in __new__, so that no method ever meets a half-made object. */
int no_init(PyObject *self, PyObject *args, PyObject *kw)
{
	(void)self;
	(void)args;
	(void)kw;
	return 0;
}

int add_run(PyObject *list, uint64_t first, uint64_t count)
{
	PyObject *run = Py_BuildValue("KK", (unsigned long long)first, (unsigned long long)count);
	int err = run ? PyList_Append(list, run) : -1;

	Py_XDECREF(run);
	return err;
}
