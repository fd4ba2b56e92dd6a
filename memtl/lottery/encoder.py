"""The pre-trained encoder that every run starts from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import cached_property
from typing import Any

from .. import assets
from ..methods.vqt.cache import fingerprint
from ..training import seeded


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder that transformers loads.

    Args:
        name: of a folder, or of a model, which may mean a download.

    Raises:
        OSError, ValueError: transformers finds none; from whatever loads it first.
    """

    name: str

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return assets.load_tokenizer(self.name)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of its weights and of its configuration, which says what they are used for."""
        model = self.build("classifier", 2, 0).model.base_model
        settings = model.config.to_dict()
        for name in ("_name_or_path", "architectures", "transformers_version"):
            settings.pop(name, None)
        weights = fingerprint(sorted(model.state_dict().items()))
        text = json.dumps([weights, settings], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def build(self, head: str, num_classes: int, seed: int) -> Any:
        """A copy of it with a head of :func:`memtl.assets.load_encoder`; what is fresh ``seed``
        alone decides.

        Raises:
            ValueError: as :func:`memtl.assets.load_encoder`.
        """
        with seeded(seed):
            return assets.load_encoder(head, num_classes, self.name).float()
