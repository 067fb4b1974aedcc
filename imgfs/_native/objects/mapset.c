/* The methods of SegmentMap that say what its segments are; see _map.pyi for the contract. */
#define PY_SSIZE_T_CLEAN
#include "objects.h"

#include <errno.h>

int optional_store(PyObject *obj, struct store **st)
{
	*st = NULL;
	if (obj == Py_None)
		return 0;
	if (!PyObject_TypeCheck(obj, &StoreType)) {
		PyErr_SetString(PyExc_TypeError, "store must be a Store or None");
		return -1;
	}
	*st = ((StoreObject *)obj)->st;
	return 0;
}

PyObject *map_load(MapObject *self, PyObject *args)
{
	Py_buffer ends, flags;
	struct store *st;
	PyObject *store;
	int err = -EINVAL;

	if (!PyArg_ParseTuple(args, "y*y*O", &ends, &flags, &store))
		return NULL;
	if (optional_store(store, &st)) {
		PyBuffer_Release(&ends);
		PyBuffer_Release(&flags);
		return NULL;
	}
	if (ends.len == flags.len * 8) {
		Py_BEGIN_ALLOW_THREADS
		err = segmap_load(self->map, ends.buf, flags.buf, (size_t)flags.len, st);
		Py_END_ALLOW_THREADS
	}
	PyBuffer_Release(&ends);
	PyBuffer_Release(&flags);
	return none_or(err);
}

/* The set_ methods replace whatever is there, the fill_ methods only what is not known yet. */
typedef int set_fn(struct segmap *, uint64_t, uint64_t, enum seg_kind, enum seg_seek);
typedef int set_store_fn(struct segmap *, uint64_t, uint64_t, struct store *, uint64_t,
			 enum seg_seek);
typedef int set_literal_fn(struct segmap *, uint64_t, const void *, uint64_t, enum seg_seek);

static PyObject *zero_with(set_fn *set, MapObject *self, PyObject *args, PyObject *kw)
{
	static char *names[] = { "start", "end", "data", NULL };
	unsigned long long start, end;
	int data = 0;

	if (!PyArg_ParseTupleAndKeywords(args, kw, "KK|$p", names, &start, &end, &data))
		return NULL;
	return none_or(set(self->map, start, end, SEG_ZERO, data ? SEEK_IS_DATA : SEEK_IS_HOLE));
}

PyObject *map_set_zero(MapObject *self, PyObject *args, PyObject *kw)
{
	return zero_with(segmap_set, self, args, kw);
}

PyObject *map_fill_zero(MapObject *self, PyObject *args, PyObject *kw)
{
	return zero_with(segmap_fill, self, args, kw);
}

PyObject *map_set_ask(MapObject *self, PyObject *args, PyObject *kw)
{
	static char *names[] = { "start", "end", "kind", NULL };
	unsigned long long start, end;
	unsigned kind = SEEK_IS_UNKNOWN;

	if (!PyArg_ParseTupleAndKeywords(args, kw, "KK|I", names, &start, &end, &kind))
		return NULL;
	if (kind > SEEK_IS_UNKNOWN)
		return none_or(-EINVAL);
	return none_or(segmap_set(self->map, start, end, SEG_ASK, kind));
}

static PyObject *store_with(set_store_fn *set, MapObject *self, PyObject *args, PyObject *kw)
{
	static char *names[] = { "start", "end", "store", "store_offset", "hole", NULL };
	unsigned long long start, end, store_offset;
	StoreObject *store;
	int hole = 0;

	if (!PyArg_ParseTupleAndKeywords(args, kw, "KKO!K|$p", names, &start, &end, &StoreType,
					 &store, &store_offset, &hole))
		return NULL;
	return none_or(set(self->map, start, end, store->st, store_offset,
			   hole ? SEEK_IS_HOLE : SEEK_IS_DATA));
}

PyObject *map_set_store(MapObject *self, PyObject *args, PyObject *kw)
{
	return store_with(segmap_set_store, self, args, kw);
}

PyObject *map_fill_store(MapObject *self, PyObject *args, PyObject *kw)
{
	return store_with(segmap_fill_store, self, args, kw);
}

static PyObject *literal_with(set_literal_fn *set, MapObject *self, PyObject *args, PyObject *kw)
{
	static char *names[] = { "start", "data", "hole", NULL };
	unsigned long long start;
	Py_buffer data;
	int hole = 0, err;

	if (!PyArg_ParseTupleAndKeywords(args, kw, "Ky*|$p", names, &start, &data, &hole))
		return NULL;
	err = set(self->map, start, data.buf, (uint64_t)data.len,
		  hole ? SEEK_IS_HOLE : SEEK_IS_DATA);
	PyBuffer_Release(&data);
	return none_or(err);
}

PyObject *map_set_literal(MapObject *self, PyObject *args, PyObject *kw)
{
	return literal_with(segmap_set_literal, self, args, kw);
}

PyObject *map_fill_literal(MapObject *self, PyObject *args, PyObject *kw)
{
	return literal_with(segmap_fill_literal, self, args, kw);
}

static PyObject *copy_with(bool fill, MapObject *self, PyObject *args)
{
	unsigned long long start, from_start, length;
	MapObject *from;
	int err;

	if (!PyArg_ParseTuple(args, "KO!KK", &start, &MapType, &from, &from_start, &length))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	err = segmap_copy(self->map, start, from->map, from_start, length, fill);
	Py_END_ALLOW_THREADS
	return none_or(err);
}

PyObject *map_copy(MapObject *self, PyObject *args)
{
	return copy_with(false, self, args);
}

PyObject *map_fill_copy(MapObject *self, PyObject *args)
{
	return copy_with(true, self, args);
}

int ranges_of(struct ranges_arg *given)
{
	const Py_ssize_t n = given->kinds.len;

	if (given->starts.len != n * 8 || given->ends.len != n * 8)
		return -EINVAL;
	given->ranges = (struct ranges){ given->starts.buf, given->ends.buf, given->kinds.buf,
					 (size_t)n };
	return 0;
}

void ranges_done(struct ranges_arg *given)
{
	PyBuffer_Release(&given->starts);
	PyBuffer_Release(&given->ends);
	PyBuffer_Release(&given->kinds);
}

typedef int ranges_fn(struct segmap *, const struct ranges *, struct store *);

static PyObject *ranges_with(ranges_fn *set, MapObject *self, PyObject *args)
{
	struct ranges_arg given;
	PyObject *store = Py_None;
	struct store *st;
	int err = 0;

	if (!PyArg_ParseTuple(args, "y*y*y*|O", &given.starts, &given.ends, &given.kinds, &store))
		return NULL;
	if (optional_store(store, &st) == 0)   /* else the exception is there */
		err = ranges_of(&given);
	if (!err && !PyErr_Occurred()) {
		Py_BEGIN_ALLOW_THREADS
		err = set(self->map, &given.ranges, st);
		Py_END_ALLOW_THREADS
	}
	ranges_done(&given);
	return PyErr_Occurred() ? NULL : none_or(err);
}

PyObject *map_fill(MapObject *self, PyObject *args)
{
	return ranges_with(segmap_fill_ranges, self, args);
}

PyObject *map_set_ranges(MapObject *self, PyObject *args)
{
	return ranges_with(segmap_set_ranges, self, args);
}

PyObject *map_replace_store(MapObject *self, PyObject *args)
{
	StoreObject *from, *to;
	int err;

	if (!PyArg_ParseTuple(args, "O!O!", &StoreType, &from, &StoreType, &to))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	err = segmap_replace_store(self->map, from->st, to->st);
	Py_END_ALLOW_THREADS
	return none_or(err);
}
