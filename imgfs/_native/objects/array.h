/* array('Q'): how many numbers of 64 bits are handed to Python. */
#ifndef IMGFS_ARRAY_H
#define IMGFS_ARRAY_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

/* With the GIL; NULL with an exception set. */
static inline PyObject *array_of(const uint64_t *numbers, size_t n)
{
	static PyObject *type;

	if (!type) {
		PyObject *module = PyImport_ImportModule("array");

		if (module)
			type = PyObject_GetAttrString(module, "array");
		Py_XDECREF(module);
		if (!type)
			return NULL;
	}
	return PyObject_CallFunction(type, "sy#", "Q", n ? (const char *)numbers : "",
				     (Py_ssize_t)(n * sizeof(*numbers)));
}

#endif
