"""What a frozen backbone gives, computed once and kept on disk: later epochs train from it.

For images that are the same in every epoch. Keys and values of every block are
2 * blocks * tokens * width numbers an image (13.9 MiB for ViT-B/16 in float32).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...files import sha256_of, write_aside
from ...training import evaluating, track
from ..base.backbone import classifier
from ..base.reading import ReadBlock
from .reader import Attended
from .tuning import VQTHead

if TYPE_CHECKING:
    from ...tasks import Images

INDEX = "cache.json"
SHARD_BYTES = 2**28
BUILDING = "building"
DTYPES = {None: None, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class CachedBatch:
    """What the head of VQT needs of some images.

    Attributes:
        features: [B, F], what the model's own classifier would read.
        keys, values: [B, blocks, H, N, d].
        masks: of each block, what its attention adds for the queries, or None.
        scales: of each block's scores.
    """

    features: Tensor
    keys: Tensor
    values: Tensor
    masks: tuple[Tensor | None, ...]
    scales: tuple[float | None, ...]

    def __len__(self) -> int:
        return len(self.features)

    def to(self, device: torch.device | str) -> CachedBatch:
        """The same on another device."""
        masks = tuple(None if m is None else m.to(device) for m in self.masks)
        features, keys, values = (t.to(device) for t in (self.features, self.keys, self.values))
        return CachedBatch(features, keys, values, masks, self.scales)

    def agrees_with(self, other: CachedBatch, rounding: float) -> bool:
        """Whether another computation gives the same, but for ``rounding``, relative to the largest
        entry, of keys and values and a thousandth for an order of summation."""
        if (self.scales, self.keys.dtype) != (other.scales, other.keys.dtype):
            return False
        pairs = [
            (self.features, other.features, 1e-3),
            (self.keys, other.keys, 1e-3 + rounding),
            (self.values, other.values, 1e-3 + rounding),
        ]
        for ours, theirs in zip(self.masks, other.masks, strict=True):
            if (ours is None) != (theirs is None):
                return False
            if ours is not None and theirs is not None:
                pairs.append((ours, theirs, 1e-3))
        return all(_close(a.cpu().float(), b.cpu().float(), bound) for a, b, bound in pairs)

    def block(self, index: int) -> list[Attended]:
        """What the queries of one block read."""
        key, value = self.keys[:, index], self.values[:, index]
        return [Attended(key, value, self.masks[index], self.scales[index])]


class FromCache(nn.Module):
    """A VQT model that takes a :class:`CachedBatch` in the place of images, or images: the queries
    and the head of ``model`` itself, whose training this is.

    Raises:
        TypeError: VQT was not applied to ``model``.
        ValueError: VQT was applied with ``train_backbone``: what it reads changes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        _head(model)
        self.module = model

    def get_classifier(self) -> VQTHead:
        """The model's own."""
        return _head(self.module)

    def forward(self, batch: CachedBatch | Tensor) -> Tensor:
        if isinstance(batch, Tensor):
            return self.module(batch)
        head = _head(self.module)
        reader, found = head.reader, []
        for block in _blocks(self.module):
            run = super(ReadBlock, block).forward  # type: ignore[misc]
            seen = batch.block(block.memtl_index)
            found.append(reader.read(block, run, len(batch), seen))
        reader.now.armed, reader.now.gathered = True, found
        return head(batch.features)


class FeatureCache:
    """Images as their :class:`CachedBatch`, in files: in the place of ``Split.images``.

    ``build`` computes, ``open`` finds again. A cache knows the weights and the images that it was
    made of, and is refused for others, and for a network that makes something else of the first
    image and the last; every file is checked against its sha256 when it is first read.
    """

    def __init__(self, directory: Path, record: dict[str, Any]) -> None:
        self.directory = directory
        self._record = record
        self._shards: dict[int, Any] = {}
        starts = [0]
        for shard in record["shards"]:
            starts.append(starts[-1] + shard["images"])
        self._starts = torch.tensor(starts)
        constants = self._load(directory / record["constants"]["file"], record["constants"])
        self._dtype: torch.dtype = getattr(torch, record["computed"])
        rounded = record["stored"] != record["computed"]
        self._rounding = torch.finfo(getattr(torch, record["stored"])).eps if rounded else 0.0
        self._masks = tuple(
            constants.get_tensor(name) if (name := f"mask.{i}") in constants.keys() else None
            for i in range(len(record["scales"]))
        )

    @classmethod
    def build(
        cls,
        directory: str | os.PathLike[str],
        model: nn.Module,
        images: Images,
        *,
        dtype: str | None = None,
        batch_size: int = 32,
        progress: bool | None = None,
    ) -> FeatureCache:
        """Compute and write the cache of ``images``.

        Args:
            directory: new or empty. The cache is built in a folder beside it, NAME.building, which
                takes its name when it is whole; what a build that was ended has left is replaced.
            model: to which VQT was applied.
            images: in the order in which they will be asked for.
            dtype: of keys and values: None for the one in which they are computed, or "bf16", half
                the bytes of float32, rounded.
            batch_size: images a forward pass.
            progress: as in :func:`memtl.training.track`.

        Raises:
            TypeError, ValueError: as :class:`FromCache`; ``dtype`` is neither; no images; masks of
                attention that differ from image to image.
            FileExistsError: there is something in ``directory``.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {tuple(DTYPES)}, got {dtype!r}")
        if not len(images):
            raise ValueError("cannot cache an empty split")
        directory = Path(directory)
        if directory.exists() and any(directory.iterdir()):
            raise FileExistsError(f"{directory} is not empty: FeatureCache.open, or another place")
        _head(model)
        building = directory.with_name(f"{directory.name}.{BUILDING}")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        writer = _Writer(building, DTYPES[dtype])
        batches = images.split(batch_size)
        total = -(-len(images) // batch_size)
        for batch in track(batches, "caching features", progress=progress, total=total):
            writer.add(read(model, batch))
        record = {
            "weights": fingerprint_of_backbone(model),
            "images": fingerprint_of_images(images),
            **writer.finish(),
        }
        text = json.dumps(record, indent=1)
        write_aside(building / INDEX, lambda path: path.write_text(text))
        os.replace(building, directory)
        return cls(directory, record)

    @classmethod
    def open(
        cls, directory: str | os.PathLike[str], model: nn.Module, images: Images
    ) -> FeatureCache:
        """The cache that was built there, for this model and these images.

        Raises:
            FileNotFoundError: there is none, or it was never finished.
            ValueError: it is damaged, or was made of other weights or of other images.
        """
        directory = Path(directory)
        try:
            record = json.loads((directory / INDEX).read_text())
            made_of = {what: record[what] for what in ("weights", "images")}
            for entry in ("shards", "constants", "scales", "computed", "stored"):
                record[entry]
        except FileNotFoundError:
            raise FileNotFoundError(f"{directory} holds no finished cache: no {INDEX}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{directory / INDEX} is damaged: {error}") from error
        given = {
            "weights": fingerprint_of_backbone(model),
            "images": fingerprint_of_images(images),
        }
        for what, found in given.items():
            if found != made_of[what]:
                raise ValueError(
                    f"{directory} was made of other {what}: sha256 {made_of[what][:12]}..., these "
                    f"have {found[:12]}..."
                )
        cache = cls(directory, record)
        # The same weights compute something else with another pooling, activation or precision.
        for index in {0, len(cache) - 1}:
            one = slice(index, index + 1)
            if not cache[one].agrees_with(read(model, images[one]), cache._rounding):
                raise ValueError(
                    f"{directory} was made by a network that computes something else from the same "
                    "weights: its pooling, an activation, its precision, a library's version"
                )
        return cache

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: slice | Tensor) -> CachedBatch:
        """The images of a slice, or of an int64 tensor of positions; one at least.

        Raises:
            TypeError: positions that are no integers.
            ValueError: a file is damaged, truncated or altered.
            IndexError: a position outside the cache, or none.
        """
        if isinstance(index, slice):
            index = torch.arange(len(self))[index]
        if index.dtype != torch.int64:
            raise TypeError(f"positions must be int64, got {index.dtype}")
        if not len(index):
            raise IndexError("no position was given")
        if not (0 <= int(index.min()) and int(index.max()) < len(self)):
            raise IndexError(f"positions must be in 0 .. {len(self) - 1}")
        shards = torch.searchsorted(self._starts, index, right=True) - 1
        rows = [
            [self._slice(shard, name, row) for name in ("features", "keys", "values")]
            for shard, row in zip(
                shards.tolist(), (index - self._starts[shards]).tolist(), strict=True
            )
        ]
        features, keys, values = (torch.stack(t) for t in zip(*rows, strict=True))
        return CachedBatch(
            features,
            keys.to(self._dtype),
            values.to(self._dtype),
            self._masks,
            tuple(self._record["scales"]),
        )

    def split(self, batch_size: int) -> Iterator[CachedBatch]:
        """All of them in order, ``batch_size`` at a time."""
        for start in range(0, len(self), batch_size):
            yield self[start : start + batch_size]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.directory.iterdir())

    def _slice(self, shard: int, name: str, row: int) -> Tensor:
        if shard not in self._shards:
            entry = self._record["shards"][shard]
            self._shards[shard] = self._load(self.directory / entry["file"], entry)
        return self._shards[shard].get_slice(name)[row]

    @staticmethod
    def _load(path: Path, entry: dict[str, Any]) -> Any:
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise ValueError(f"the cache lacks {path}")
        if sha256_of(path) != entry["sha256"]:
            raise ValueError(f"{path} is damaged, truncated or altered: its sha256 is another")
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, t in named:
        digest.update(f"{name} {tuple(t.shape)} {t.dtype};".encode())
        flat = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()


def fingerprint_of_backbone(model: nn.Module) -> str:
    """sha256 of the weights and buffers of a model, its classifier's left out."""
    name, _ = classifier(model)
    state = model.state_dict()
    return fingerprint((n, state[n]) for n in sorted(state) if not n.startswith(f"{name}."))


def fingerprint_of_images(images: Images) -> str:
    """sha256 of the images as a model takes them, all of which are read."""
    return fingerprint(("", batch) for batch in images.split(256))


class _Writer:
    """Gathers what images gave until a shard is full, and writes it."""

    def __init__(self, directory: Path, dtype: torch.dtype | None) -> None:
        self.directory, self.dtype = directory, dtype
        self.waiting: list[dict[str, Tensor]] = []
        self.bytes = 0
        self.shards: list[dict[str, Any]] = []
        self.constants: CachedBatch | None = None

    def add(self, batch: CachedBatch) -> None:
        if self.constants is None:
            self.constants = batch
        for index, (mask, first) in enumerate(zip(batch.masks, self.constants.masks, strict=True)):
            if mask is None or first is None:
                continue
            if (mask.dim() == 4 and len(mask) > 1) or not torch.equal(mask, first):
                raise ValueError(f"the mask of block {index} differs from image to image")
        tensors = {
            "features": batch.features.cpu(),
            "keys": batch.keys.to("cpu", self.dtype or batch.keys.dtype),
            "values": batch.values.to("cpu", self.dtype or batch.values.dtype),
        }
        self.waiting.append(tensors)
        self.bytes += sum(t.nbytes for t in tensors.values())
        if self.bytes >= SHARD_BYTES:
            self._flush()

    def finish(self) -> dict[str, Any]:
        """Write what is left; the rest of the record."""
        if self.waiting:
            self._flush()
        assert self.constants is not None
        masks = {
            f"mask.{i}": mask.cpu().contiguous().clone()
            for i, mask in enumerate(self.constants.masks)
            if mask is not None
        }
        constants = self._write("constants.safetensors", masks)
        computed = self.constants.keys.dtype
        return {
            "shards": self.shards,
            "constants": constants,
            "scales": list(self.constants.scales),
            "computed": _name(computed),
            "stored": _name(self.dtype or computed),
        }

    def _flush(self) -> None:
        tensors = {n: torch.cat([w[n] for w in self.waiting]) for n in self.waiting[0]}
        entry = self._write(f"{len(self.shards):05}.safetensors", tensors)
        self.shards.append({**entry, "images": len(tensors["features"])})
        self.waiting, self.bytes = [], 0

    def _write(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        from safetensors.torch import save_file

        digest = write_aside(self.directory / name, lambda path: save_file(tensors, path))
        return {"file": name, "sha256": digest}


def _head(model: nn.Module) -> VQTHead:
    _, head = classifier(model)
    if not isinstance(head, VQTHead):
        raise TypeError(f"VQT was not applied to this {type(model).__name__}")
    if head.reader.trains_backbone:
        raise ValueError("VQT with train_backbone reads what changes: there is nothing to cache")
    return head


def _blocks(model: nn.Module) -> list[ReadBlock]:
    return [module for module in model.modules() if isinstance(module, ReadBlock)]


@torch.no_grad()
def read(model: nn.Module, images: Tensor) -> CachedBatch:
    """What the backbone gives of some images; no query is sent."""
    head = _head(model)
    with evaluating(model), head.reader.noting() as noted:
        model(images.to(head.queries.device))
    if several := [i for i, seen in enumerate(noted.seen) if len(seen) != 1]:
        raise ValueError(
            f"block {several[0]} has {len(noted.seen[several[0]])} attentions, not one"
        )
    seen = [attended for (attended,) in noted.seen]
    assert noted.features is not None
    return CachedBatch(
        noted.features,
        torch.stack([a.key for a in seen], dim=1),
        torch.stack([a.value for a in seen], dim=1),
        tuple(a.mask for a in seen),
        tuple(a.scale for a in seen),
    )


def _close(a: Tensor, b: Tensor, bound: float) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= bound * b.abs().max()).all())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
