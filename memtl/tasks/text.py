"""Texts as token identifiers, which are all that the encoders of :mod:`memtl.models.bert` take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..training import evaluating
from . import docstrings
from .digits import Task
from .split import Split

MAX_LENGTH = 64
"""Tokens of a docstring, with the two or three special ones; what is beyond is cut off."""

CHUNK = 2000
"""Texts that are given to a tokenizer at once: what it returns takes a hundred times the room of
the identifiers."""

VAL_SHARE, VAL_SEED = 0.1, 0
"""What of a training set is kept for choices, where the task has no set for that."""


def encode(
    tokenizer: Any, texts: Sequence[str] | Sequence[tuple[str, str]], max_length: int = MAX_LENGTH
) -> Tensor:
    """The tokens of texts, or of pairs of texts.

    Args:
        tokenizer: one of transformers.
        texts: at least one; of a pair that is too long the longer text loses its end.
        max_length: tokens of a text with the special ones.

    Returns:
        ``[n, length]`` int64, filled up at the end with the tokenizer's padding to the longest.

    Raises:
        ValueError: If there is no text, or the tokenizer has no padding.
    """
    if not len(texts):
        raise ValueError("expected at least one text, got none")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"this {type(tokenizer).__name__} has no token for padding")
    pairs = not isinstance(texts[0], str)
    columns = list(map(list, zip(*texts, strict=True))) if pairs else [list(texts)]
    rows: list[Tensor] = []
    for start in range(0, len(texts), CHUNK):
        part = (column[start : start + CHUNK] for column in columns)
        coded = tokenizer(*part, truncation=True, max_length=max_length)
        rows += [torch.tensor(ids, dtype=torch.int64) for ids in coded["input_ids"]]
    return pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)


def load_docstrings(task: str, tokenizer: Any, max_length: int = MAX_LENGTH) -> Task:
    """A classification of the standard library's docstrings, in fixed splits.

    Args:
        task: ``"package"`` (24 classes), ``"kind"`` (4) or ``"pair"`` (2), as
            :mod:`memtl.tasks.docstrings` says.
        tokenizer: of the encoder; :func:`memtl.assets.load_tokenizer` has the shipped one's.
        max_length: as in :func:`encode`.

    Returns:
        A task whose ``images`` are token identifiers ``[n, length]`` int64.

    Raises:
        ValueError: If there is no such task, or this Python lacks a class of it.
    """

    def split(name: str) -> Split:
        found = docstrings.texts(task, name)
        return Split(encode(tokenizer, found.texts, max_length), torch.tensor(found.labels))

    return Task(task, len(docstrings.classes(task)), split("train"), split("val"), split("test"))


def load_docstrings_mlm(tokenizer: Any, max_length: int = MAX_LENGTH) -> Task:
    """Masked-language modelling of the same docstrings: a long one is several samples.

    Returns:
        A task whose ``images`` and ``labels`` are the token identifiers ``[n, max_length]``;
        which of them are masked is drawn when they are used (:class:`memtl.models.bert.MaskedLM`).
    """

    def split(name: str) -> Split:
        found = [document.text for document in docstrings.in_split(name)]
        coded = tokenizer(
            found,
            truncation=True,
            max_length=max_length,
            return_overflowing_tokens=True,
            padding="max_length",
        )
        ids = torch.tensor(coded["input_ids"], dtype=torch.int64)
        return Split(ids, ids)

    return Task(
        "mlm", tokenizer.vocab_size, split("train"), split("val"), split("test"), head="mlm"
    )


@torch.no_grad()
def outputs(model: nn.Module, images: Any, batch_size: int) -> list[Any]:
    """What ``model`` gives, in evaluation mode, a batch at a time."""
    device = next(model.parameters()).device
    with evaluating(model):
        return [model(batch.to(device)) for batch in images.split(batch_size)]


def check_finite(given: Tensor) -> None:
    """Raises FloatingPointError where an output, of which a score is made, is not finite."""
    if not given.isfinite().all():
        raise FloatingPointError("the model gives values that are not finite: they have no score")


def datasets_library() -> Any:
    """``datasets``.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "GLUE, SQuAD and datasets:NAME need the library datasets: pip install datasets"
        ) from error
    return datasets
