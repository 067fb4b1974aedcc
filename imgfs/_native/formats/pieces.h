/* A packed list of pieces, as imgfs.pieces.PieceList has it. */
#ifndef IMGFS_PIECES_H
#define IMGFS_PIECES_H

#include <Python.h>

#include <stdint.h>

/* As imgfs.pieces.Kind; the others are Python's. */
enum { KIND_ZERO = 1, KIND_DATA = 2, KIND_LITERAL = 4 };

struct pieces {
	uint64_t start;
	size_t n;
	const uint64_t *ends, *offsets;
	const uint8_t *kinds;
	const uint16_t *files;
	Py_buffer buffers[4];
};

static inline void pieces_release(struct pieces *pieces)
{
	int i;

	for (i = 0; i < 4; i++)
		PyBuffer_Release(&pieces->buffers[i]);
}

/* From the tuple (start, ends, kinds, files, offsets): 0, or -1 with an exception set. */
static inline int pieces_take(PyObject *packed, struct pieces *pieces)
{
	Py_buffer *b = pieces->buffers;
	unsigned long long start;

	if (!PyTuple_Check(packed)) {
		PyErr_SetString(PyExc_TypeError, "packed pieces are a tuple");
		return -1;
	}
	if (!PyArg_ParseTuple(packed, "Ky*y*y*y*", &start, &b[0], &b[1], &b[2], &b[3]))
		return -1;
	pieces->start = start;
	pieces->n = (size_t)b[1].len;
	if (b[0].len != b[1].len * 8 || b[2].len != b[1].len * 2 || b[3].len != b[1].len * 8) {
		pieces_release(pieces);
		PyErr_SetString(PyExc_ValueError, "packed pieces have four lists of one length");
		return -1;
	}
	pieces->ends = b[0].buf;
	pieces->kinds = b[1].buf;
	pieces->files = b[2].buf;
	pieces->offsets = b[3].buf;
	return 0;
}

#endif
