/* The Python objects of imgfs._native._map, for the files that make up the module. */
#ifndef IMGFS_OBJECTS_H
#define IMGFS_OBJECTS_H

#include <Python.h>

#include "log.h"

typedef struct {
	PyObject_HEAD
	struct store *st;
} StoreObject;

typedef struct {
	PyObject_HEAD
	struct segmap *map;
} MapObject;

typedef struct {
	PyObject_HEAD
	struct log *log;
} LogObject;

extern PyTypeObject StoreType, MapType, LogType;

/* Ranges as Python gives them: parsed as "y*y*y*". */
struct ranges_arg {
	Py_buffer starts, ends, kinds;
	struct ranges ranges;
};

int ranges_of(struct ranges_arg *given);   /* 0, or -EINVAL: they differ in length */
void ranges_done(struct ranges_arg *given);

/* holdobject.c: the methods of Store that hold buffers. */
PyObject *store_py_hold(StoreObject *self, PyObject *args);
PyObject *store_py_unhold(StoreObject *self, PyObject *args);
PyObject *store_py_held_left(StoreObject *self, PyObject *args);
/* With the GIL. */
void store_unhold_all(struct store *st);

/* sumsobject.c: the methods of Store that deal with sums. */
PyObject *store_py_attach_sums(StoreObject *self, PyObject *args);
PyObject *store_py_verify(StoreObject *self, PyObject *args);
PyObject *store_py_renew_sums(StoreObject *self, PyObject *args);
PyObject *store_py_seal(StoreObject *self, PyObject *args);
PyObject *store_py_before_cut(StoreObject *self, PyObject *size);
PyObject *store_py_cut_sums(StoreObject *self, PyObject *size);
PyObject *store_py_sums_done(StoreObject *self, PyObject *unused);
PyObject *store_py_sync_sums(StoreObject *self, PyObject *unused);
/* NULL with CorruptSnapshot set: what the last call of the store's gave as STORE_DAMAGED. */
PyObject *raise_damage(void);

/* storenonzero.c: the methods of Store that tell zeroes from data. */
PyObject *store_py_write_nonzero(StoreObject *self, PyObject *args);
PyObject *store_py_find_nonzero(StoreObject *self, PyObject *args);

/* mapset.c: the methods of SegmentMap that say what its segments are. */
PyObject *map_load(MapObject *self, PyObject *args);
PyObject *map_set_zero(MapObject *self, PyObject *args, PyObject *kw);
PyObject *map_fill_zero(MapObject *self, PyObject *args, PyObject *kw);
PyObject *map_set_ask(MapObject *self, PyObject *args, PyObject *kw);
PyObject *map_set_store(MapObject *self, PyObject *args, PyObject *kw);
PyObject *map_fill_store(MapObject *self, PyObject *args, PyObject *kw);
PyObject *map_set_literal(MapObject *self, PyObject *args, PyObject *kw);
PyObject *map_fill_literal(MapObject *self, PyObject *args, PyObject *kw);
PyObject *map_copy(MapObject *self, PyObject *args);
PyObject *map_fill_copy(MapObject *self, PyObject *args);
PyObject *map_fill(MapObject *self, PyObject *args);
PyObject *map_set_ranges(MapObject *self, PyObject *args);
PyObject *map_replace_store(MapObject *self, PyObject *args);

/* mapput.c */
PyObject *map_put(MapObject *self, PyObject *args);

/* mapwrite.c: the methods of SegmentMap that write. */
PyObject *map_set_target(MapObject *self, PyObject *args);
PyObject *map_write(MapObject *self, PyObject *args);
PyObject *map_copy_up(MapObject *self, PyObject *args);
PyObject *map_zero(MapObject *self, PyObject *args);
PyObject *map_below(MapObject *self, PyObject *args);
PyObject *map_reclaim(MapObject *self, PyObject *args);
PyObject *map_move(MapObject *self, PyObject *args);
PyObject *map_stored(MapObject *self, PyObject *args);
PyObject *map_origins(MapObject *self, PyObject *args);
PyObject *map_resize(MapObject *self, PyObject *size);
PyObject *map_sync(MapObject *self, PyObject *unused);
PyObject *map_settle(MapObject *self, PyObject *unused);
PyObject *map_take(MapObject *self, PyObject *unused);
PyObject *map_ranges(MapObject *self, PyObject *unused);

/* A Store's store, NULL for None; -1 with TypeError set for anything else. */
int optional_store(PyObject *obj, struct store **st);

/* common.c */
/* None, or NULL with ValueError (-EINVAL), CorruptSnapshot (-STORE_DAMAGED) or OSError set. */
PyObject *none_or(int err);
int no_init(PyObject *self, PyObject *args, PyObject *kw);
/* Append (first, count) to the list; -1 with an exception set. */
int add_run(PyObject *list, uint64_t first, uint64_t count);

#endif
