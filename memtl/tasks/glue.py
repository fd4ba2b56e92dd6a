"""GLUE for encoders, through the library ``datasets``: from its cache, a mirror or the hub.

There are labels for the training and validation sets alone. What is published on is the validation
set, so it is the test split here; a tenth of the training set is kept for choices.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from .digits import Task
from .split import Split
from .text import VAL_SEED, VAL_SHARE, check_finite, datasets_library, encode, outputs


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One of GLUE: its columns of text, classes (1: a number), score, and what it is tested on."""

    columns: tuple[str, ...]
    classes: int = 2
    metric: str = "accuracy"
    test: str = "validation"


GLUE = {
    "cola": Corpus(("sentence",), metric="matthews"),
    "mnli": Corpus(("premise", "hypothesis"), 3, test="validation_matched"),
    "mrpc": Corpus(("sentence1", "sentence2")),
    "qnli": Corpus(("question", "sentence")),
    "qqp": Corpus(("question1", "question2")),
    "rte": Corpus(("sentence1", "sentence2")),
    "sst2": Corpus(("sentence",)),
    "stsb": Corpus(("sentence1", "sentence2"), 1, metric="pearson"),
    "wnli": Corpus(("sentence1", "sentence2")),
}
"""Scored as in Chen et al. (NeurIPS 2020): Matthews' coefficient for CoLA, Pearson's for STS-B."""


def load_glue(name: str, tokenizer: Any, max_length: int = 128) -> Task:
    """A task of GLUE.

    Args:
        name: one of :data:`GLUE`.
        tokenizer: of the encoder.
        max_length: tokens of a text, or of a pair, with the special ones.

    Raises:
        ValueError: If there is no such task.
        ImportError: If ``datasets`` is not installed.
    """
    if name not in GLUE:
        raise ValueError(f"GLUE has {', '.join(GLUE)}, not {name!r}")
    corpus = GLUE[name]
    found = datasets_library().load_dataset("nyu-mll/glue", name)

    def split(rows: Any) -> Split:
        columns = [list(rows[column]) for column in corpus.columns]
        texts = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
        kind = torch.float32 if corpus.classes == 1 else torch.int64
        labels = torch.tensor(list(rows["label"]), dtype=kind)
        return Split(encode(tokenizer, texts, max_length), labels)

    parts = found["train"].train_test_split(VAL_SHARE, seed=VAL_SEED)
    splits = [split(rows) for rows in (parts["train"], parts["test"], found[corpus.test])]
    number = corpus.classes == 1
    return Task(
        f"glue:{name}",
        corpus.classes,
        splits[0],
        splits[1],
        splits[2],
        metric=corpus.metric,
        evaluate=pearson if number else None,
        head="regressor" if number else "classifier",
    )


@torch.no_grad()
def pearson(model: nn.Module, split: Split, *, batch_size: int = 256) -> float:
    """Pearson's correlation of what ``model`` gives, in evaluation mode, with the labels; 0 where
    either is constant.

    Raises:
        ValueError: there are fewer than two samples.
        FloatingPointError: an output is not finite.
    """
    if len(split) < 2:
        raise ValueError(f"a correlation needs at least 2 samples, got {len(split)}")
    given = torch.cat(outputs(model, split.images, batch_size)).double().cpu()
    check_finite(given)
    both = torch.stack([given, split.labels.double()])
    both = both - both.mean(1, keepdim=True)
    scale = both.norm(dim=1).prod()
    return (both.prod(0).sum() / scale).item() if scale > 0 else 0.0
