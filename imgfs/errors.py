"""Every error imgfs raises on purpose: a class each, with its errno and a one-line message.

The exception proposes the errno and the text; only two places act on them, the
FUSE boundary (`imgfs.fuse.boundary`) and the command line (`imgfs.cli.main`).  Foreign
exceptions are translated once, at the edge where they enter.
"""

from __future__ import annotations

import errno as _errno
import os as _os
from typing import ClassVar, TypeVar


class ImgfsError(Exception):
    """Base of all of them.  `str()` is one line that says what is wrong and what to do."""

    errno: int = _errno.EIO
    #: whether trying the same thing again later may succeed
    temporary: ClassVar[bool] = False


class UsageError(ImgfsError):
    """A command line, an option or a URL that cannot be meant."""

    errno = _errno.EINVAL


class MountError(ImgfsError):
    """The mount point or the FUSE device cannot be used."""

    errno = _errno.ENODEV


class DeadMount(MountError):
    """The process behind a mount has ended, and left it."""


class CacheError(ImgfsError):
    """The cache's directory cannot be used; reads go on without it."""


class NoThread(ImgfsError):
    """The limit of processes, or of memory, lets no thread be started."""

    errno = _errno.EAGAIN
    temporary = True


class OutOfMemory(ImgfsError):
    """The limits in force give no memory for what was asked."""

    errno = _errno.ENOMEM


class SourceNotFound(ImgfsError):
    errno = _errno.ENOENT


class NotAnImage(ImgfsError):
    """The source exists but is a directory, a socket, or the like."""

    errno = _errno.EISDIR


class AccessDenied(ImgfsError):
    """The source's own permissions refuse us."""

    errno = _errno.EACCES


class LoginRefused(AccessDenied):
    """The server takes none of our keys or passwords."""


class HostKeyError(AccessDenied):
    """The server's key is unknown or is not the recorded one."""


class SourceUnreachable(ImgfsError):
    """No connection, or it broke; the source may be unharmed behind it."""

    temporary = True


class SourceTimeout(SourceUnreachable):
    """The source did not answer within the timeout."""


class SourceChanged(ImgfsError):
    """The source is not the one that was opened: its identity differs."""

    errno = _errno.ESTALE


class ShortRead(ImgfsError):
    """A source gave fewer bytes than its size promises, or a layer did."""


class ProtocolViolation(ImgfsError):
    """A server broke its protocol's rules."""


class CorruptImage(ImgfsError):
    """A format's own tables contradict themselves; names the field, its value and offset."""


class UnsupportedFeature(ImgfsError):
    """A feature bit, version or format that imgfs does not know."""

    errno = _errno.EOPNOTSUPP


class ReadOnlyView(ImgfsError):
    errno = _errno.EROFS


class Busy(ImgfsError):
    """Somebody else uses it in a way that forbids this one."""

    errno = _errno.EBUSY


class LayerHeld(Busy):
    """A layer is open in a way that forbids this; `who` has it open for `what`."""

    def __init__(self, layer: str, what: str, who: str) -> None:
        super().__init__(f"{layer}: is open for {what} in {who}; end that first")
        self.what = what
        self.who = who


class NoSpace(ImgfsError):
    """There is no room for what is written."""

    errno = _errno.ENOSPC


class OverQuota(NoSpace):
    """There is no room for what this user writes."""

    errno = _errno.EDQUOT


class StateReadOnly(ImgfsError):
    """Where snapshots are kept nothing can be written."""

    errno = _errno.EROFS


class TooLarge(ImgfsError):
    """What is written goes beyond an end that cannot be moved."""

    errno = _errno.EFBIG


class NotDurable(ImgfsError):
    """It cannot be said that what was written survives a crash."""


class NeverDurable(NotDurable):
    """The server has no means to promise that."""


class CopyDiffers(ImgfsError):
    """A copy does not hold what its source does."""


class AlreadyThere(ImgfsError):
    errno = _errno.EEXIST


class NotEmpty(ImgfsError):
    errno = _errno.ENOTEMPTY


class NotPermitted(ImgfsError):
    """What nobody may do there."""

    errno = _errno.EPERM


class NameTooLong(ImgfsError):
    errno = _errno.ENAMETOOLONG


class SnapshotNotFound(ImgfsError):
    errno = _errno.ENOENT


class CorruptSnapshot(ImgfsError):
    """A file that snapshots are kept in is damaged; names it, and what is wrong."""


class OtherVersion(CorruptSnapshot):
    """A file that snapshots are kept in was written by another imgfs; names it."""

    errno = _errno.EOPNOTSUPP


class StateGone(ImgfsError):
    """What snapshots are kept in was removed, moved or replaced while it was in use."""


class OutOfRange(ImgfsError):
    """A layer was asked for bytes outside of it: a bug in the caller."""

    errno = _errno.EINVAL


#: What the system says of these, and what to do.
_SYSTEM = {
    _errno.EMFILE: "too many files are open in imgfs; raise its limit (ulimit -n, LimitNOFILE=)",
    _errno.ENFILE: "too many files are open on this machine; raise fs.file-max",
    _errno.ENOMEM: "no memory is left; free some, or raise the limit (ulimit -v, MemoryMax=)",
    _errno.EIO: "Input/output error; the kernel's log (dmesg) tells more",
}

#: Errnos that a program may be given as they are.  ENXIO is not: of lseek it is the end of the
#: file; and ENOSYS makes the kernel never ask again.
_PASSED = {
    *(_errno.EIO, _errno.EREMOTEIO, _errno.ENODEV, _errno.ENOMEDIUM, _errno.EUCLEAN),
    *(_errno.EBADMSG, _errno.EILSEQ, _errno.ENOKEY, _errno.EKEYEXPIRED, _errno.EKEYREVOKED),
    *(_errno.EMFILE, _errno.ENFILE, _errno.ENOMEM, _errno.ENOSPC, _errno.EDQUOT, _errno.EROFS),
}

#: The filesystem is a network's, and its server is away.
_AWAY = {
    *(_errno.ETIMEDOUT, _errno.ENOLINK, _errno.EHOSTDOWN, _errno.EHOSTUNREACH, _errno.ENOTCONN),
    *(_errno.ENETDOWN, _errno.ENETUNREACH, _errno.ECONNRESET, _errno.ECONNREFUSED, _errno.ECOMM),
}


def system_error(name: str, exc: OSError) -> ImgfsError:
    """What the system refused, as one line about `name`, with the errno where that tells more
    than EIO."""
    number = exc.errno or 0
    text = _SYSTEM.get(number) or (_os.strerror(number) if number else str(exc))
    if number == _errno.ESTALE:
        return SourceChanged(f"{name}: is gone from its server; open it again")
    error = (SourceUnreachable if number in _AWAY else ImgfsError)(f"{name}: {text}")
    if number in _PASSED or number in _AWAY:
        error.errno = number
    return error


def is_out_of_files(exc: BaseException) -> bool:
    """Was it refused for want of a descriptor?"""
    return getattr(exc, "errno", None) in (_errno.EMFILE, _errno.ENFILE)


Error = TypeVar("Error", bound=ImgfsError)


def again(error: Error) -> Error:
    """The same error, to be raised for somebody else."""
    found = type(error).__new__(type(error))
    found.args = error.args
    found.__dict__.update(error.__dict__)
    return found


def sole(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The only exception in a nursery's group, however deep; the group when there are several."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup) and len(found.exceptions) == 1:
        found = found.exceptions[0]
    return group if isinstance(found, BaseExceptionGroup) else found
