"""The pre-trained encoder that every run starts from."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from ..methods.vqt.cache import fingerprint
from ..models.bert import Classifier, MaskedLM
from ..training import seeded


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder that transformers loads: a folder's, or one by name, which may mean a download.

    Args:
        name: of the folder or the model.

    Raises:
        OSError, ValueError: transformers finds none; from whatever loads it first.
    """

    name: str

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.name)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of its weights and of its configuration, which says what they are used for."""
        model: Any = self.classifier(2, 0).model.base_model
        settings = model.config.to_dict()
        for name in ("_name_or_path", "architectures", "transformers_version"):
            settings.pop(name, None)
        weights = fingerprint(sorted(model.state_dict().items()))
        text = json.dumps([weights, settings], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def classifier(self, num_classes: int, seed: int) -> Classifier:
        """A copy of it with a fresh head, which ``seed`` alone decides."""
        from transformers import AutoModelForSequenceClassification

        with seeded(seed):
            model = self._load(
                AutoModelForSequenceClassification.from_pretrained, num_labels=num_classes
            )
        return Classifier(model, self.tokenizer)

    def masked_lm(self) -> MaskedLM:
        """A copy of it with its own head for masked tokens, and with the pooler, which this
        objective does not use: so its weights are those of a classifier's encoder.

        Raises:
            ValueError: it has no such head, as BERT has.
        """
        from transformers import AutoModelForMaskedLM

        model = self._load(AutoModelForMaskedLM.from_pretrained)
        if not hasattr(model, "cls"):
            raise ValueError(
                f"masked-language modelling needs BERT's head, which {type(model).__name__} does "
                "not have: --mlm-steps 0 leaves the universal ticket out"
            )
        encoder: Any = self.classifier(2, 0).model.base_model
        model.base_model.pooler = getattr(encoder, "pooler", None)
        return MaskedLM(model, self.tokenizer)

    def _load(self, loader: Callable[..., Any], **options: Any) -> Any:
        with _quiet():
            return loader(self.name, **options).float()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and its remark, at every run, that the head is new."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
