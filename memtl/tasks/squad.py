"""SQuAD 1.1 for encoders, through the library ``datasets``, split as GLUE is."""

from __future__ import annotations

import collections
import dataclasses
import re
import string
from typing import Any

import torch
from torch import Tensor, nn

from .digits import Task
from .split import Split
from .text import CHUNK, VAL_SEED, VAL_SHARE, check_finite, datasets_library, outputs


@dataclasses.dataclass(frozen=True)
class Questions(Split):
    """Windows of tokens over question and context, and what is needed to score answers in them.

    ``labels`` are ``[n, 2]``: the first and the last token of the answer, 0 (the class token) where
    a window does not have it.

    Attributes:
        examples: of each window, the question it belongs to.
        offsets: ``[n, length, 2]``, the place of each token in the context; -1 outside it.
        contexts, answers: of each question.
    """

    examples: list[int]
    offsets: Tensor
    contexts: list[str]
    answers: list[list[str]]


def load_squad(tokenizer: Any, max_length: int = 384, stride: int = 128) -> Task:
    """SQuAD 1.1: find the answer to a question in a text.

    Args:
        tokenizer: a fast one, of the encoder.
        max_length: tokens of a window over question and context.
        stride: tokens that two windows over a long context have in common.

    Raises:
        ImportError: If ``datasets`` is not installed.
    """
    found = datasets_library().load_dataset("rajpurkar/squad")
    parts = found["train"].train_test_split(VAL_SHARE, seed=VAL_SEED)
    splits = [
        windows(rows, tokenizer, max_length, stride)
        for rows in (parts["train"], parts["test"], found["validation"])
    ]
    train, val, test = splits
    return Task("squad", 2, train, val, test, "F1", span_f1, "spans")


def windows(rows: Any, tokenizer: Any, max_length: int, stride: int) -> Questions:
    """The windows over questions and contexts; ``rows`` has SQuAD's columns."""
    questions, contexts, answers = (list(rows[c]) for c in ("question", "context", "answers"))
    examples: list[int] = []
    parts = []
    for start in range(0, len(questions), CHUNK):
        part = slice(start, start + CHUNK)
        of, *tensors = _windows(
            questions[part], contexts[part], answers[part], tokenizer, max_length, stride
        )
        examples += [start + example for example in of]
        parts.append(tensors)
    ids, labels, offsets = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return Questions(ids, labels, examples, offsets, contexts, [a["text"] for a in answers])


def _windows(
    questions: list[str],
    contexts: list[str],
    answers: list[dict[str, Any]],
    tokenizer: Any,
    max_length: int,
    stride: int,
) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Of each window its question, tokens, label and offsets, as :class:`Questions` has them."""
    coded = tokenizer(
        questions, contexts, truncation="only_second", max_length=max_length, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True, padding="max_length",
    )  # fmt: skip
    examples = list(coded["overflow_to_sample_mapping"])
    offsets = torch.tensor(coded["offset_mapping"])
    in_context = torch.tensor(
        [[s == 1 for s in coded.sequence_ids(i)] for i in range(len(examples))]
    )
    offsets[~in_context] = -1
    labels = torch.zeros(len(examples), 2, dtype=torch.int64)
    for window, example in enumerate(examples):
        answer = answers[example]
        first = answer["answer_start"][0]
        last = first + len(answer["text"][0])
        begin = ((offsets[window, :, 0] <= first) & (offsets[window, :, 1] > first)).nonzero()
        end = ((offsets[window, :, 0] < last) & (offsets[window, :, 1] >= last)).nonzero()
        if len(begin) and len(end):
            labels[window] = torch.stack([begin[0, 0], end[0, 0]])
    return examples, torch.tensor(coded["input_ids"]), labels, offsets


@torch.no_grad()
def span_f1(
    model: nn.Module, split: Split, *, batch_size: int = 64, longest_answer: int = 30
) -> float:
    """SQuAD's F1, from 0 to 1: of the words of the best span of every question's windows.

    Raises:
        TypeError: the split is not one of questions.
        ValueError: there is none.
        FloatingPointError: an output is not finite.
    """
    if not isinstance(split, Questions):
        raise TypeError(f"expected the windows of questions, got a {type(split).__name__}")
    if not len(split):
        raise ValueError("cannot evaluate on an empty split")
    best: dict[int, tuple[float, str]] = {}
    window = 0
    for first, last in outputs(model, split.images, batch_size):
        check_finite(torch.stack([first, last]))
        for starts, ends in zip(first.float().cpu(), last.float().cpu(), strict=True):
            offsets = split.offsets[window, : len(starts)]
            outside = offsets[:, 0] < 0
            sums = starts.masked_fill(outside, -torch.inf)[:, None] + ends.masked_fill(
                outside, -torch.inf
            )
            sums = sums.masked_fill(~torch.ones_like(sums).triu().tril(longest_answer - 1).bool(),
                                    -torch.inf)  # fmt: skip
            place = int(sums.argmax())
            begin, end = divmod(place, len(starts))
            example = split.examples[window]
            found = sums[begin, end].item()
            if example not in best or found > best[example][0]:
                text = split.contexts[example][int(offsets[begin, 0]) : int(offsets[end, 1])]
                best[example] = (found, text)
            window += 1
    scores = [
        max(word_f1(text, answer) for answer in split.answers[example])
        for example, (_, text) in best.items()
    ]
    return sum(scores) / len(scores)


def word_f1(text: str, answer: str) -> float:
    """F1 of the words in common, without case, punctuation and articles, as SQuAD scores."""
    one, other = (collections.Counter(_normal(t).split()) for t in (text, answer))
    common = (one & other).total()
    if not one or not other:
        return float(one == other)
    return 2 * common / (one.total() + other.total())


def _normal(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text)
