"""What a frozen backbone gives, computed once and kept on disk: later epochs train from it.

For images that are the same in every epoch. Keys and values of every block are
2 * blocks * tokens * width numbers an image (13.9 MiB for ViT-B/16 in float32).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...files import sha256_of, write_aside
from ...training import track
from ..backbone import classifier
from ..reading import ReadBlock
from .reader import Attended
from .tuning import VQTHead

if TYPE_CHECKING:
    from ...tasks import Images

INDEX = "cache.json"
SHARD_BYTES = 2**28
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
        self.model = model

    def forward(self, batch: CachedBatch | Tensor) -> Tensor:
        if isinstance(batch, Tensor):
            return self.model(batch)
        head = _head(self.model)
        reader, found = head.reader, []
        for index, block in enumerate(_blocks(self.model)):
            run = super(ReadBlock, block).forward  # type: ignore[misc]
            found.append(reader.read(index, run, len(batch), batch.block(index)))
        reader.armed, reader.gathered = True, found
        return head(batch.features)


class FeatureCache:
    """Images as their :class:`CachedBatch`, in files: in the place of ``Split.images``.

    ``build`` computes, ``open`` finds again. A cache knows the weights and the images that it was
    made of, and is refused for others; every file is checked against its sha256 when it is first
    read.
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
        dtype: str = "fp32",
        batch_size: int = 32,
        progress: bool | None = None,
    ) -> FeatureCache:
        """Compute and write the cache of ``images``.

        Args:
            directory: new or empty; the cache is in it when it is whole, and not before.
            model: to which VQT was applied.
            images: in the order in which they will be asked for.
            dtype: of keys and values: "fp32", or "bf16" for half the bytes, rounded.
            batch_size: images a forward pass.
            progress: as in :func:`memtl.training.track`.

        Raises:
            TypeError, ValueError: as :class:`FromCache`; ``dtype`` is neither; no images.
            FileExistsError: there is something in ``directory``.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {tuple(DTYPES)}, got {dtype!r}")
        if not len(images):
            raise ValueError("cannot cache an empty split")
        directory = Path(directory)
        if directory.exists() and any(directory.iterdir()):
            raise FileExistsError(f"{directory} is not empty: FeatureCache.open, or another place")
        directory.mkdir(parents=True, exist_ok=True)
        writer = _Writer(directory, _head(model), DTYPES[dtype])
        batches = images.split(batch_size)
        total = -(-len(images) // batch_size)
        for batch in track(batches, "caching features", progress=progress, total=total):
            writer.add(_read(model, batch))
        record = {
            "weights": fingerprint(_backbone_tensors(model)),
            "images": fingerprint_of_images(images),
            "dtype": dtype,
            **writer.finish(),
        }
        text = json.dumps(record, indent=1)
        write_aside(directory / INDEX, lambda path: path.write_text(text))
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
            record["shards"], record["constants"], record["scales"]
        except FileNotFoundError:
            raise FileNotFoundError(f"{directory} holds no finished cache: no {INDEX}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{directory / INDEX} is damaged: {error}") from error
        given = {
            "weights": fingerprint(_backbone_tensors(model)),
            "images": fingerprint_of_images(images),
        }
        for what, found in given.items():
            if found != made_of[what]:
                raise ValueError(
                    f"{directory} was made of other {what}: sha256 {made_of[what][:12]}..., these "
                    f"have {found[:12]}..."
                )
        return cls(directory, record)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: slice | Tensor) -> CachedBatch:
        """The images of a slice, or of an int64 tensor of positions.

        Raises:
            ValueError: a file is damaged, truncated or altered.
            IndexError: a position outside the cache.
        """
        if isinstance(index, slice):
            index = torch.arange(len(self))[index]
        if len(index) and not (0 <= int(index.min()) and int(index.max()) < len(self)):
            raise IndexError(f"positions must be in 0 .. {len(self) - 1}")
        shards = torch.searchsorted(self._starts, index, right=True) - 1
        rows = [
            [self._slice(shard, name, row) for name in ("features", "keys", "values")]
            for shard, row in zip(
                shards.tolist(), (index - self._starts[shards]).tolist(), strict=True
            )
        ]
        dtype = DTYPES["fp32"]
        features, keys, values = (torch.stack(t) for t in zip(*rows, strict=True))
        return CachedBatch(
            features, keys.to(dtype), values.to(dtype), self._masks, tuple(self._record["scales"])
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


def fingerprint_of_images(images: Images) -> str:
    """sha256 of what the images are; those that know it by themselves (files) are asked."""
    if hasattr(images, "fingerprint"):
        return images.fingerprint()
    return fingerprint(("", batch) for batch in images.split(256))


class _Writer:
    """Gathers what images gave until a shard is full, and writes it."""

    def __init__(self, directory: Path, head: VQTHead, dtype: torch.dtype) -> None:
        self.directory, self.dtype = directory, dtype
        self.depth = head.reader.depth
        self.waiting: list[dict[str, Tensor]] = []
        self.bytes = 0
        self.shards: list[dict[str, Any]] = []
        self.constants: CachedBatch | None = None

    def add(self, batch: CachedBatch) -> None:
        if self.constants is None:
            self.constants = batch
        tensors = {
            "features": batch.features.cpu(),
            "keys": batch.keys.to("cpu", self.dtype),
            "values": batch.values.to("cpu", self.dtype),
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
            f"mask.{i}": mask.cpu().contiguous()
            for i, mask in enumerate(self.constants.masks)
            if mask is not None
        }
        constants = self._write("constants.safetensors", masks)
        scales = list(self.constants.scales)
        return {"shards": self.shards, "constants": constants, "scales": scales}

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


def _backbone_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    name, _ = classifier(model)
    state = model.state_dict()
    return [(n, state[n]) for n in sorted(state) if not n.startswith(f"{name}.")]


@torch.no_grad()
def _read(model: nn.Module, images: Tensor) -> CachedBatch:
    """Run the backbone alone on some images."""
    head = _head(model)
    training = model.training
    model.eval()
    with head.reader.noting() as noted:
        model(images.to(head.queries.device))
    model.train(training)
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
