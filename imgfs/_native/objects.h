/* The Python objects of imgfs._native._map, for the files that make up the module. */
#ifndef IMGFS_OBJECTS_H
#define IMGFS_OBJECTS_H

#include <Python.h>

#include "segmap.h"

typedef struct {
	PyObject_HEAD
	struct store *st;
} StoreObject;

extern PyTypeObject StoreType;

/* None, or NULL with ValueError (-EINVAL) or OSError set. */
PyObject *none_or(int err);
int no_init(PyObject *self, PyObject *args, PyObject *kw);

#endif
