"""BERT and its kin, of transformers, as functions of token identifiers alone.

The training loop hands a model one tensor. What else an encoder takes follows from it: padding is
not attended to, what comes behind the first separator is the second text. Columns of padding alone
are cut off, so that a batch costs what its longest text does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training.metrics import count

MASKED = 0.15
"""Share of the tokens to be predicted, as in BERT: of these 80 % are masked, 10 % replaced by a
token at random, 10 % left."""


def inputs(ids: Tensor, tokenizer: Any, types: bool = True) -> dict[str, Tensor]:
    """What an encoder takes beside the tokens.

    Args:
        ids: ``[n, length]`` int64, padded at the end.
        tokenizer: has ``pad_token_id`` and ``sep_token_id``.
        types: whether the encoder tells a second text from the first.

    Returns:
        ``input_ids``, ``attention_mask`` and, with ``types``, ``token_type_ids``, all
        ``[n, longest]``.
    """
    there = ids != tokenizer.pad_token_id
    longest = max(1, int(there.sum(1).max())) if len(ids) else ids.shape[1]
    ids, there = ids[:, :longest], there[:, :longest]
    given = {"input_ids": ids, "attention_mask": there.to(torch.int64)}
    if types:
        ends = (ids == tokenizer.sep_token_id).to(torch.int64)
        given["token_type_ids"] = ((ends.cumsum(1) - ends) > 0) & there
        given["token_type_ids"] = given["token_type_ids"].to(torch.int64)
    return given


class Wrapped(nn.Module):
    """A model of transformers, ``model``, with timm's names for its classifier and for
    checkpointing its layers, and the backbone that it has itself."""

    base_model_prefix = "model"

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    @property
    def base_model(self) -> nn.Module:
        return self.model.base_model

    def get_classifier(self) -> Any:
        """The last linear layer of the head, or the head as it is; None where there is none."""
        head = getattr(self.model, "classifier", None)
        head = getattr(self.model, "score", None) if head is None else head
        if isinstance(head, nn.Sequential):
            return next((m for m in reversed(head) if isinstance(m, nn.Linear)), head)
        return head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the inputs of layers alone, and run each one's forward again in backward."""
        verb = "enable" if enable else "disable"
        name = f"activation_checkpointing_{verb}"  # gradient_... before transformers 5
        older = f"gradient_checkpointing_{verb}"
        switch = getattr(self.model, name if hasattr(self.model, name) else older)
        switch(*([{"use_reentrant": False}] if enable else []))


class _Encoder(Wrapped):
    """One with its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__(model)
        self.tokenizer = tokenizer

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        return inputs(ids, self.tokenizer, getattr(self.model.config, "type_vocab_size", 0) > 1)


class Classifier(_Encoder):
    """A sequence classifier of transformers whose input is token identifiers, its output logits.

    Args:
        model: a ``...ForSequenceClassification``.
        tokenizer: its tokenizer.
    """

    def forward(self, ids: Tensor) -> Tensor:
        """ids ``[n, length]`` -> logits ``[n, classes]``."""
        return self.model(**self.inputs(ids)).logits


class Regressor(_Encoder):
    """A sequence classifier of one output, trained by the squared error.

    Args:
        model: a ``...ForSequenceClassification`` with ``num_labels=1``.
        tokenizer: its tokenizer.
    """

    def forward(self, ids: Tensor) -> Tensor:
        """ids ``[n, length]`` -> ``[n]``."""
        return self.model(**self.inputs(ids)).logits[:, 0]

    def memtl_loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The mean squared error; labels ``[n]`` float32."""
        return F.mse_loss(self(ids), labels)


class SpanFinder(_Encoder):
    """A model that finds an answer in a text: scores of each token as its first and its last.

    Args:
        model: a ``...ForQuestionAnswering``.
        tokenizer: its tokenizer.
    """

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids ``[n, length]`` -> the scores of the first and of the last token, ``[n, longest]``
        both, ``longest`` being the tokens of the longest text."""
        found = self.model(**self.inputs(ids))
        return found.start_logits, found.end_logits

    def memtl_loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of both; labels ``[n, 2]`` or more: first and last token first."""
        first, last = self(ids)
        return (F.cross_entropy(first, labels[:, 0]) + F.cross_entropy(last, labels[:, 1])) / 2


class MaskedLM(_Encoder):
    """A masked-language model of transformers that is trained and scored by token identifiers.

    In training tokens are masked anew every time, by torch's global generator; in evaluation always
    the same ones. Logits are made of those places alone: of all places they would be most of the
    work and of the memory of a small encoder.

    Args:
        model: a ``BertForMaskedLM``, or another whose encoder is ``base_model`` and whose head is
            ``cls``.
        tokenizer: its tokenizer.

    Raises:
        ValueError: the model has no ``cls``.
    """

    def __init__(self, model: Any, tokenizer: Any):
        if not hasattr(model, "cls"):
            raise ValueError(
                f"masked words need BERT's head, `cls`, which {type(model).__name__} does not have"
            )
        super().__init__(model, tokenizer)

    def forward(self, ids: Tensor, chosen: Tensor) -> Tensor:
        """ids ``[n, length]``, chosen bool ``[n, length]`` -> logits ``[chosen, vocabulary]``."""
        hidden = self.model.base_model(**self.inputs(ids)).last_hidden_state
        return self.model.cls(hidden[chosen[:, : hidden.shape[1]]])

    def memtl_loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of masked tokens; ``labels`` are the true tokens, as ``ids``."""
        corrupted, chosen = corrupt(ids, self.tokenizer)
        return F.cross_entropy(self(corrupted, chosen), labels.to(ids.device)[chosen])

    def memtl_count(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Of every token, how often it is predicted rightly, is masked, and is predicted."""
        corrupted, chosen = corrupt(ids, self.tokenizer, torch.Generator().manual_seed(len(ids)))
        return count(self(corrupted, chosen), labels.to(ids.device)[chosen])


def corrupt(
    ids: Tensor, tokenizer: Any, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Mask tokens as BERT does (Devlin et al., NAACL 2019).

    Args:
        ids: ``[n, length]`` int64; special tokens are never chosen.
        tokenizer: has ``mask_token_id``, ``all_special_ids`` and ``vocab_size``.
        generator: of the choice; None for torch's own.

    Returns:
        The tokens, corrupted, and bool ``[n, length]``, which of them are to be predicted: at
        least one.
    """
    specials = torch.tensor(tokenizer.all_special_ids, device=ids.device)
    special = torch.isin(ids, specials)
    draw = torch.rand(ids.shape, generator=generator).to(ids.device).masked_fill(special, 2.0)
    chosen = draw < max(MASKED, draw.min().item() + 1e-7)
    way = torch.rand(ids.shape, generator=generator).to(ids.device)
    others = torch.randint(tokenizer.vocab_size, ids.shape, generator=generator).to(ids.device)
    # Padding and types are told by special tokens: chance must not put one anywhere.
    others = torch.where(torch.isin(others, specials), tokenizer.mask_token_id, others)
    corrupted = torch.where(chosen & (way < 0.8), tokenizer.mask_token_id, ids)
    return torch.where(chosen & (way >= 0.9), others, corrupted), chosen
