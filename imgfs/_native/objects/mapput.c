/* SegmentMap.put: what a plan says, put into the map as a whole; see _map.pyi for the contract. */
#define PY_SSIZE_T_CLEAN
#include "objects.h"
#include "pieces.h"

#include <errno.h>

static int put_piece(struct segmap *map, const struct pieces *pieces, size_t i, uint64_t start,
		     struct segmap **files, size_t n_files)
{
	uint64_t end = pieces->ends[i];

	if (end <= start)
		return -EINVAL;
	switch (pieces->kinds[i]) {
	case KIND_LITERAL:
		return 0;
	case KIND_ZERO:
		return segmap_set(map, start, end, SEG_ZERO, SEEK_IS_HOLE);
	case KIND_DATA:
		if (pieces->files[i] >= n_files)
			return -EINVAL;
		return segmap_copy(map, start, files[pieces->files[i]], pieces->offsets[i],
				   end - start, false);
	default:
		return segmap_set(map, start, end, SEG_ASK, SEEK_IS_DATA);
	}
}

static int put(struct segmap *map, const struct pieces *pieces, struct segmap **files,
	       size_t n_files)
{
	uint64_t start = pieces->start;
	size_t i;
	int err = 0;

	for (i = 0; i < pieces->n && !err; start = pieces->ends[i++])
		err = put_piece(map, pieces, i, start, files, n_files);
	return err;
}

/* References to the maps in a tuple; NULL with an exception set. */
static struct segmap **maps_of(PyObject *tuple)
{
	Py_ssize_t i, n = PyTuple_GET_SIZE(tuple);
	struct segmap **files = PyMem_RawCalloc((size_t)n + 1, sizeof(*files));

	if (!files) {
		PyErr_NoMemory();
		return NULL;
	}
	for (i = 0; i < n; i++) {
		if (!PyObject_TypeCheck(PyTuple_GET_ITEM(tuple, i), &MapType)) {
			PyMem_RawFree(files);
			PyErr_SetString(PyExc_TypeError, "files are SegmentMaps");
			return NULL;
		}
	}
	for (i = 0; i < n; i++)
		files[i] = segmap_ref(((MapObject *)PyTuple_GET_ITEM(tuple, i))->map);
	return files;
}

PyObject *map_put(MapObject *self, PyObject *args)
{
	PyObject *packed, *list, *kept;
	struct segmap **files;
	struct pieces pieces;
	size_t n, i;
	int err;

	if (!PyArg_ParseTuple(args, "OO!", &packed, &PyList_Type, &list))
		return NULL;
	if (pieces_take(packed, &pieces))
		return NULL;
	kept = PyList_AsTuple(list);   /* the list may change meanwhile */
	files = kept ? maps_of(kept) : NULL;
	n = files ? (size_t)PyTuple_GET_SIZE(kept) : 0;
	Py_XDECREF(kept);
	if (!files) {
		pieces_release(&pieces);
		return NULL;
	}
	Py_BEGIN_ALLOW_THREADS
	err = put(self->map, &pieces, files, n);
	for (i = 0; i < n; i++)
		segmap_unref(files[i]);
	Py_END_ALLOW_THREADS
	PyMem_RawFree(files);
	pieces_release(&pieces);
	return none_or(err);
}
