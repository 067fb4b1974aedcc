"""Many images: a directory for each, and the plain files beside them.

Nothing is opened, and no image has nodes of its own, before somebody looks into its directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import trio

from imgfs.errors import ImgfsError
from imgfs.sources.listing import Listed, Listing
from imgfs.tree.idle import LookedAt
from imgfs.tree.image import ImageNodes
from imgfs.tree.names import directory_names, encode, is_image
from imgfs.tree.nodes import Node, Tree
from imgfs.tree.originals import Originals
from imgfs.views.through import ThroughView
from imgfs.views.view import View

log = logging.getLogger(__name__)

FRESH_S = 1.0  # so long a listing is not asked about again

#: What is known of an image before it is opened; two that are equal are the same image.
Spec = TypeVar("Spec")


@dataclass(slots=True, eq=False)
class IdleImage:
    """An image that can be closed when it is not used."""

    image: ImageNodes
    forget_name: Callable[[int, bytes], None]
    when_closed: Callable[[ImageNodes], None] | None
    name: tuple[int, bytes] | None = None  #: of its directory

    def is_used(self) -> bool:
        return self.image.is_used()

    def needs(self) -> list[View]:
        return list(self.image.needs())

    def forget_names(self) -> None:
        if not self.image.is_gone:
            self.image.withdraw()
            names = list(self.image.names()) + ([] if self.name is None else [self.name])
            for parent, name in names:
                self.forget_name(parent, name)

    async def rest(self) -> bool:
        if not await self.image.rest():
            return False
        if self.when_closed is not None:
            self.when_closed(self.image)
        return True


class StoredNames(Protocol):
    """The names, as URLs, by which files are open that are written through."""

    def moved(self, text: str, new_text: str) -> None:
        """The file of the one name has the other one now."""

    def removed(self, text: str) -> None:
        """The file of this name has none any more."""


class ImagesNodes(Generic[Spec]):
    """A directory of image directories, which can be given another set of images at any time.

    `make_image` gets the name of an image's directory, and gives an image that is not open.
    `forget_name(parent's inode, name)` lets the kernel know that the name means something else now.
    """

    def __init__(
        self,
        tree: Tree,
        root: Node,
        make_image: Callable[[str, Spec], ImageNodes],
        forget_name: Callable[[int, bytes], None],
        looked_at: LookedAt,
    ) -> None:
        self.tree = tree
        self._forget_name = forget_name
        self._looked_at = looked_at
        self.root = root
        self._make_image = make_image
        self._images: dict[str, tuple[Spec, ImageNodes]] = {}
        #: Images that are gone, but may still be read by who has them open.
        self._gone: list[ImageNodes] = []

    def __iter__(self) -> Iterator[ImageNodes]:
        """All images, also those that are gone."""
        for _, image in self._images.values():
            yield image
        yield from self._gone

    def set(self, wanted: Mapping[str, Spec]) -> None:
        """From now on these, by the names of their directories.  What stays is not disturbed."""
        for name in [n for n, (spec, _) in self._images.items() if wanted.get(n) != spec]:
            self._take_out(name)
        for name, spec in wanted.items():
            if name not in self._images:
                image = self._make_image(name, spec)
                self._images[name] = (spec, image)
                self._add_directory(name, spec, image)

    def _take_out(self, name: str) -> None:
        _, image = self._images.pop(name)
        self._gone.append(image)
        image.go()
        self._looked_at.gone(IdleImage(image, self._forget_name, self._gone.remove))
        self.tree.remove(self.root, encode(name))
        self._forget_name(self.root.inode, encode(name))

    def _add_directory(self, name: str, spec: Spec, image: ImageNodes) -> None:
        mtime_ns = spec.mtime_ns if isinstance(spec, Listed) else None
        node = self.tree.add(self.root, encode(name), children={}, mtime_ns=mtime_ns)
        image.directory = node
        self._follow(image, (self.root.inode, encode(name)))

        async def look_into() -> None:
            if not node.children:
                image.add_to(node)

        node.refresh = look_into

    def _follow(self, image: ImageNodes, name: tuple[int, bytes] | None = None) -> None:
        """Have it closed when nobody has looked at it for long."""
        idle = IdleImage(image, self._forget_name, None, name)
        image.used = partial(self._looked_at.used, idle)


class ListedImages(ImagesNodes[Listed]):
    """The images of a listing, and `originals/`, its files as they are; both follow it."""

    def __init__(
        self,
        tree: Tree,
        root: Node,
        listing: Listing,
        make_image: Callable[[str, Listed], ImageNodes],
        forget_name: Callable[[int, bytes], None],
        looked_at: LookedAt,
        names: StoredNames,
        *,
        write: bool = False,
    ) -> None:
        super().__init__(tree, root, make_image, forget_name, looked_at)
        self.listing = listing
        self._names = names
        self._files: dict[str, Listed] = {}
        self._plain: dict[str, ImageNodes] = {}
        self._token: str | None = None
        self._asked = -FRESH_S
        self._asking = trio.Lock()
        root.refresh = self._refresh_quietly
        self._originals = tree.add(root, b"originals", children={})
        self._originals.refresh = self._refresh_originals
        if write and listing.is_writable:
            self._originals.folder = Originals(self, self._originals)

    def __iter__(self) -> Iterator[ImageNodes]:
        yield from super().__iter__()
        yield from self._plain.values()

    async def refresh(self) -> None:
        """Ask what there is, if it was not asked just now.  Raises what the listing raises."""
        async with self._asking:
            if trio.current_time() - self._asked < FRESH_S:
                return
            token = await self.listing.token()
            if token is None or token != self._token:
                files = await self.listing.files()
                self._files = {file.name: file for file in files}
                names = directory_names(name for name in self._files if is_image(name))
                self.set({name: self._files[file] for name, file in names.items()})
            self._token = token
            self._asked = trio.current_time()

    async def _refresh_quietly(self) -> None:
        try:
            await self.refresh()
        except ImgfsError as exc:
            # What was there a moment ago is likelier than nothing; who opens it will see.
            log.warning("%s", exc)
            self._asked = trio.current_time()

    async def _refresh_changed(self) -> None:
        """We have changed it ourselves."""
        self._asked, self._token = -FRESH_S, None
        await self.refresh()
        await self._refresh_originals()

    async def _refresh_originals(self) -> None:
        await self._refresh_quietly()
        children = self._originals.children
        assert children is not None
        wanted = {encode(name): file for name, file in self._files.items()}
        for name in _missing(children, wanted):
            self._drop(os.fsdecode(name))
        missing = _missing(wanted, children)
        images = {f.name: image for f, image in self._images.values()} if missing else {}
        for name in missing:
            file = wanted[name]
            image = images.get(file.name) or self._plain.get(file.name) or self._plain_image(file)
            image.add_original(self._originals)

    def _image_of(self, name: str) -> ImageNodes | None:
        """Of a file in `originals/`."""
        found = (image for file, image in self._images.values() if file.name == name)
        return next(found, self._plain.get(name))

    def _made(self, file: Listed) -> ImageNodes:
        return self._image_of(file.name) or self._plain_image(file)

    def _plain_image(self, file: Listed) -> ImageNodes:
        image = self._plain[file.name] = self._make_image(file.name, file)
        self._follow(image)
        return image

    def _drop(self, name: str) -> None:
        """The file is not there any more."""
        image = self._image_of(name)
        if image is not None:
            image.leave(self._originals)
        self._plain.pop(name, None)
        self._files.pop(name, None)
        self.tree.remove(self._originals, encode(name))

    # What `originals/` is told to do.  Nobody else asks what there is meanwhile.

    async def create(self, name: str) -> None:
        await self.listing.create(name)
        await self._refresh_changed()

    async def unlink(self, name: str) -> None:
        async with self._asking:
            view = await self._written(name)

            async def change() -> None:
                await self.listing.unlink(name)
                await self._lose(name, view)

            await _with_names_of([view], change)
            self._forget_file(name)
        await self._refresh_changed()

    async def rename(self, name: str, new_name: str, *, replace: bool) -> None:
        async with self._asking:
            view = await self._written(name)
            other = await self._written(new_name) if replace else None

            async def change() -> None:
                await self.listing.rename(name, new_name, replace=replace)
                await self._lose(new_name, other)
                if view is not None:
                    await view.source.moved(self.listing.url_of(new_name))
                self._names.moved(self.listing.url_of(name), self.listing.url_of(new_name))

            await _with_names_of([other, view], change)
            self._forget_file(new_name)
            children = self._originals.children
            assert children is not None
            node, file = children.pop(encode(name), None), self._files.get(name)
            self._forget_file(name)
            if node is not None and file is not None:
                children[encode(new_name)] = node
                self._files[new_name] = dataclasses.replace(
                    file, name=new_name, url=self.listing.url_of(new_name)
                )
        await self._refresh_changed()
        # The node stays: who has the file open, and the kernel's pages of it, are not disturbed.
        if node is not None and children.get(encode(new_name)) is node:
            await self._made(self._files[new_name]).adopt(self._originals, node)

    async def _written(self, name: str) -> ThroughView | None:
        """The file's view, if it is open; its node in `originals/` is that of the view then."""
        image = self._image_of(name)
        view = image.written if image is not None else None
        node = (self._originals.children or {}).get(encode(name))
        if view is not None and node is not None and node.prepare is not None:
            with contextlib.suppress(ImgfsError):
                await node.prepare()
        return view if view is not None and view.stale is None and not view.is_nameless else None

    async def _lose(self, name: str, view: ThroughView | None) -> None:
        if view is not None:
            await view.source.lost_name()
        self._names.removed(self.listing.url_of(name))

    def _forget_file(self, name: str) -> None:
        """The name is not that file's any more, also where another one has it by now."""
        for directory, (file, _) in list(self._images.items()):
            if file.name == name:
                image = self._images[directory][1]
                image.leave(self._originals)
                self._take_out(directory)
        self._drop(name)


async def _with_names_of(
    views: Iterable[ThroughView | None], change: Callable[[], Awaitable[None]]
) -> None:
    """Do it while none of them is written; each is open in a way that needs no name then."""
    for view in views:
        if view is not None:
            change = partial(view.change_name, change)
    await change()


def _missing(names: Iterable[bytes], there: dict[bytes, Listed] | dict[bytes, Node]) -> list[bytes]:
    return [name for name in names if name not in there]
