"""Snapshots on disk: what was written over a base, in layers.  Each file says its version.

    ROOT/NAME-DIGEST/lock             held while anything below it is made, renamed or removed
    ROOT/NAME-DIGEST/merge-lock       held while layers are merged (merge.py)
    ROOT/NAME-DIGEST/base             JSON: which base, how large, and its identity (basefile.py)
    ROOT/NAME-DIGEST/snapshots        each snapshot's name, and its layers from the top down
    ROOT/NAME-DIGEST/committing       JSON: which of them is half written into the base (commit.py)
    ROOT/NAME-DIGEST/spare            room for `snapshots` when one is deleted on a full disk
    ROOT/NAME-DIGEST/layers/ID/data   bytes at the disk's own offsets; holes where there are none
    ROOT/NAME-DIGEST/layers/ID/log    which of them are the layer's
    ROOT/NAME-DIGEST/layers/ID/sums   a checksum for each block of `data` (sums.py)
    ROOT/NAME-DIGEST/layers/ID/boot   in which boot of the machine it was opened for writing last
    ROOT/NAME-DIGEST/layers/ID/lock   held by one process to write the layer, or by many to read it
    ROOT/NAME-DIGEST/layers/ID/closed what the log was when it was closed; absent after a crash

ROOT is $STATE_DIRECTORY, $XDG_STATE_HOME/imgfs or ~/.local/state/imgfs.  `base` and `snapshots` are
replaced by renaming, and so is `committing`.  They have checksums, of each line of `snapshots` by
itself (records.py), which also say whose they are: snapshots whose lines are damaged are refused,
the others can be used.  A layer that no snapshot names is removed when the directory is used next,
unless a line is damaged, which may name it.

Whoever opens a snapshot to read it holds all of its layers for reading (locks.py); to write it, the
first one for writing and the others for reading, which a process has open once (reading.py).  What
is held cannot be deleted.

A log is a header and batches (log.py): ranges, of whole blocks of 4 KiB but at the end of the disk,
each DATA (its bytes are in `data`), ZERO, or BELOW (the next layer's, or the base's: what is copied
from there to its own place is not stored; never behind the end of any layer below).  Later batches
stand over earlier ones.
A batch is written only after its bytes in `data` are durable, and counts when its checksum is
right.  Behind the last one there may be zeroes, which the next ones overwrite: forcing those out
changes neither the file's length nor its blocks, so it takes no turn of the file system's journal.
Who appends is native code (imgfs/_native/log.c): most fsyncs never reach Python.
At the end of the batches one may be torn by a crash: it is cut off, with the zeroes.  Anywhere else
a wrong checksum means that the file is damaged, and the snapshot is refused.

What is read of `data` is compared with its sum, once after each opening of the layer; what is
changed has no sum until nobody has written it for a while, or the layer is closed.  So whatever
happens to the files of a closed layer: right bytes, or an error that names the file.  The same
after a kill, but for what had no sum yet.  After a crash of the machine a block that was being
written cannot be told from a damaged one: of a layer that was open for writing then, what disagrees
is accepted, and counted.  A layer of version 1 has no sums; it gets them when it is written next.

What a crash leaves.  A block of `data` holds bytes of that same block of the disk, or a hole, so:

- a block that no batch names shows what is below, whatever `data` holds there;
- a block that a batch calls DATA shows what was written to it last, or an earlier write that was
  synced, sector by sector, as the disk below `data` leaves it;
- punching a block before the batch that calls it ZERO is there shows zeroes early, which is what
  was written later; data in a block that a batch still calls ZERO shows the zeroes, which were
  synced;
- what a batch calls BELOW is punched only once that batch is durable;
- `data` is never shorter than the log says: growing makes `data` longer before the log hears of it,
  shrinking makes it shorter afterwards;
- what of a layer is hidden by the one above it, which is written, may be made BELOW (trim.py): the
  log of the one above says so already;
- what lies in `data` and is not the layer's is punched at the next opening for writing.

So each sector is the base's, the last synced one, or one written later.
"""
