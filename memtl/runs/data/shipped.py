"""Tasks that need no download, as samples; they are not varied in training."""

from __future__ import annotations

from ... import assets
from ...tasks import docstrings, load_digits
from ..networks import Wants
from .samples import Data, Ink, Texts

NAMES = {"digits": "image", **dict.fromkeys(docstrings.TASKS, "text")}
"""Name -> what it has."""


def default_texts() -> Wants:
    """Texts as the shipped encoder takes them."""
    return Wants("text", tokenizer=assets.load_tokenizer())


def read(name: str, wants: Wants, tokens: int) -> Data:
    """The task of that name."""
    if name == "digits":
        task = load_digits(8, normalised=False)
        train, val, test = (
            Ink(part.images[:], part.labels.tolist(), wants)
            for part in (task.train, task.val, task.test)
        )
        return Data(train, val, test, tuple(map(str, range(task.num_classes))))
    tokens = min(tokens, wants.tokenizer.model_max_length)

    def texts(split: str) -> Texts:
        found = docstrings.texts(name, split)
        index = range(len(found.texts))
        return Texts(found.texts, index, found.labels, wants.tokenizer, tokens)

    return Data(texts("train"), texts("val"), texts("test"), docstrings.classes(name), kind="text")
