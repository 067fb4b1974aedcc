"""Many images: a directory for each, and the plain files beside them.

Nothing is opened, and no image has nodes of its own, before somebody looks into its directory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import trio

from imgfs.errors import ImgfsError
from imgfs.sources.listing import Listed, Listing
from imgfs.tree.idle import LookedAt
from imgfs.tree.image import ImageNodes
from imgfs.tree.names import directory_names, encode, is_image
from imgfs.tree.nodes import Node, Tree
from imgfs.tree.originals import Originals
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
            _, image = self._images.pop(name)
            self._gone.append(image)
            image.go()
            self._looked_at.gone(IdleImage(image, self._forget_name, self._gone.remove))
            self.tree.remove(self.root, encode(name))
            self._forget_name(self.root.inode, encode(name))
        for name, spec in wanted.items():
            if name not in self._images:
                image = self._make_image(name, spec)
                self._images[name] = (spec, image)
                self._add_directory(name, spec, image)

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
        *,
        write: bool = False,
    ) -> None:
        super().__init__(tree, root, make_image, forget_name, looked_at)
        self.listing = listing
        self._files: dict[str, Listed] = {}
        self._plain: dict[str, ImageNodes] = {}
        self._token: str | None = None
        self._asked = -FRESH_S
        self._asking = trio.Lock()
        root.refresh = self._refresh_quietly
        self._originals = tree.add(root, b"originals", children={})
        self._originals.refresh = self._refresh_originals
        if write and listing.is_writable:
            self._originals.folder = Originals(
                listing, self._originals, self._refresh_changed, forget_name
            )

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
            self.tree.remove(self._originals, name)
            self._plain.pop(os.fsdecode(name), None)
        missing = _missing(wanted, children)
        images = {f.name: image for f, image in self._images.values()} if missing else {}
        for name in missing:
            file = wanted[name]
            image = images.get(file.name) or self._plain.get(file.name)
            if image is None:
                image = self._plain[file.name] = self._make_image(file.name, file)
                self._follow(image)
            image.add_original(self._originals)


def _missing(names: Iterable[bytes], there: dict[bytes, Listed] | dict[bytes, Node]) -> list[bytes]:
    return [name for name in names if name not in there]
