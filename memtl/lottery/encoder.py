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

        Where the head does not use the pooler the encoder has it all the same, so that a ticket is
        about the same weights whatever it was drawn on.

        Raises:
            ValueError: masked words need BERT's head, which it does not have.
        """
        with seeded(seed):
            found = assets.load_encoder(head, num_classes, self.name)
            base = found.model.base_model
            if getattr(base, "pooler", base) is None:
                whole = assets.load_encoder("classifier", 2, self.name)
                base.pooler = whole.model.base_model.pooler
        if head == "mlm" and not hasattr(found.model, "cls"):
            raise ValueError(
                f"masked-language modelling needs BERT's head, which {type(found.model).__name__} "
                "does not have: --mlm-steps 0 leaves the universal ticket out"
            )
        return found.float()
