"""Caches of what a frozen network gives to VQT's queries, a folder for each network and split."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from torch import nn

from ..methods.vqt import FeatureCache
from ..methods.vqt.cache import fingerprint_of_backbone, fingerprint_of_images, read
from ..tasks import Split
from ..tasks.split import Images
from .backbone import line

GIB = 2**30
CACHE_GIB = 4
BATCH = 32


class Caches:
    """Those in one folder.

    Args:
        folder: of the caches; it is made with the first.
        limit: bytes that one may have, 2 * blocks * tokens * width numbers an image: a split that
            needs more is left as it is. With 0 every split is.
    """

    def __init__(self, folder: Path, limit: float = CACHE_GIB * GIB) -> None:
        self.folder = folder
        self.limit = limit
        self._said: set[str] = set()

    @property
    def nbytes(self) -> int:
        """Bytes on disk, of earlier commands' caches too."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def split(self, name: str, network: nn.Module, split: Split) -> Split:
        """``split`` from its cache, which is built where there is none, or none that is whole.

        Args:
            name: of the architecture, which the weights need not tell.
            network: to which VQT was applied.
        """
        if not self.limit:
            return split
        one = read(network, split.images[:1])
        size = len(split) * sum(t.nbytes for t in (one.features, one.keys, one.values))
        if size > self.limit:
            self._say(
                f"a cache for {len(split)} images would be {size / GIB:.3g} GiB, more than "
                f"--cache-gib {self.limit / GIB:g}: VQT is trained from the images"
            )
            return split
        weights = fingerprint_of_backbone(network)
        made_of = f"{name} {weights} {fingerprint_of_images(split.images)}"
        place = self.folder / hashlib.sha256(made_of.encode()).hexdigest()[:16]
        return Split(self._open(place, network, split.images), split.labels)

    def _open(self, place: Path, network: nn.Module, images: Images) -> FeatureCache:
        try:
            found = FeatureCache.open(place, network, images)
            for start in range(0, len(found), BATCH):  # reads, and so checks, every file
                found[start : start + 1]
            return found
        except FileNotFoundError:
            pass
        except ValueError as error:
            self._say(f"a cache is built anew: {line(error)}")
        if place.exists():
            shutil.rmtree(place)
        return FeatureCache.build(place, network, images, batch_size=BATCH)

    def _say(self, text: str) -> None:
        """Print it, once."""
        if text not in self._said:
            self._said.add(text)
            print(text, flush=True)
