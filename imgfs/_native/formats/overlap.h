/* Places in a file that several entries of a table claim. */
#ifndef IMGFS_OVERLAP_H
#define IMGFS_OVERLAP_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

PyObject *py_overlap(PyObject *self, PyObject *args);

#endif
