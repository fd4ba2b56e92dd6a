"""Text that needs no download: the docstrings of Python's standard library, read from its source.

Three tasks are made of them, and text to pre-train on. Whatever is drawn is drawn by a hash of the
text, so that splits are the same on every machine; another version of Python has other docstrings.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TASKS = ("package", "kind", "pair")
"""Which package a docstring belongs to, what kind of object it describes, and whether two sentences
come from the same docstring."""

KINDS = ("module", "class", "function", "method")

PACKAGES = (
    "asyncio", "collections", "ctypes", "datetime", "decimal", "doctest", "email", "enum", "http",
    "importlib", "inspect", "io", "ipaddress", "logging", "mailbox", "multiprocessing", "pathlib",
    "pydoc", "tarfile", "threading", "typing", "unittest", "urllib", "xml",
)  # fmt: skip
"""Classes of the task ``package``: those with most docstrings, of what every Python 3 has."""

_SHARES = (0.7, 0.8)
"""Of the range of the hash: up to the first is trained on, up to the second is for choices."""
_ELSEWHERE = {
    "_collections_abc": "collections",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
}
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload"}
_BLOCKS = (ast.stmt, ast.excepthandler, ast.match_case)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|\n\s*\n")


@dataclass(frozen=True)
class Docstring:
    """A docstring, the package or module of the standard library it is in, and one of
    :data:`KINDS`."""

    text: str
    package: str
    kind: str

    @property
    def split(self) -> str:
        """``"train"`` (70 % of all), ``"val"`` (10 %) or ``"test"``, by a hash of the text."""
        place = _hash(self.text) / 2**64
        return ("train", "val", "test")[sum(place >= share for share in _SHARES)]


@dataclass(frozen=True)
class Texts:
    """Texts ``[n]``, or pairs of texts, with a label each (an index of the task's classes)."""

    texts: list[str] | list[tuple[str, str]]
    labels: list[int]


@functools.cache
def docstrings() -> tuple[Docstring, ...]:
    """Every docstring of the standard library of this Python, each text once, in order of files.

    The tests of the library are left out; they are not installed everywhere.

    Raises:
        FileNotFoundError: If the library's source is not there.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Docstring] = {}
    with _no_collection():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if _LEFT_OUT.isdisjoint(parts):
                package = _ELSEWHERE.get(parts[0], parts[0])
                for text, kind in _read(path):
                    found.setdefault(text, Docstring(text, package, kind))
    if not found:
        raise FileNotFoundError(f"no docstrings in {root}: is Python's library there as source?")
    return tuple(found.values())


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Syntax trees have no cycles; looking for some among millions of nodes is half of the work."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read(path: Path) -> list[tuple[str, str]]:
    """The docstrings of a file, and what kind of object has them."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # of another Python: templates, tests of parsers
        return []
    found = []

    def visit(node: ast.AST, parent: ast.AST | None) -> None:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                found.append((text, _kind(node, parent)))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, _BLOCKS):  # expressions, most of a tree, hold none
                visit(child, node)

    visit(tree, None)
    return found


def _kind(node: ast.AST, parent: ast.AST | None) -> str:
    if isinstance(node, ast.Module):
        return "module"
    if isinstance(node, ast.ClassDef):
        return "class"
    return "method" if isinstance(parent, ast.ClassDef) else "function"


def classes(task: str) -> tuple[str, ...]:
    """The names of a task's classes.

    Raises:
        ValueError: If it is none of :data:`TASKS`.
    """
    named = {"package": PACKAGES, "kind": KINDS, "pair": ("different", "same")}
    if task not in named:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    return named[task]


def texts(task: str, split: str) -> Texts:
    """What a task has in a split.

    Args:
        task: One of :data:`TASKS`.
        split: ``"train"``, ``"val"`` or ``"test"``. What all three tasks train on is part of what
            the shipped encoder was pre-trained on; what they are tested on is not. No docstring is
            in two splits, but phrases that many have are: of the samples to be tested on, cut to
            the tokens that an encoder gets, about one in a hundred is one of those to train on.

    Raises:
        ValueError: If there is no such task or split, or a class of it has no docstring in this
            Python, which is then named.
    """
    names = classes(task)
    documents = in_split(split)
    if task == "pair":
        return _pairs(documents)
    documents = [d for d in documents if getattr(d, task) in names]
    labels = [names.index(getattr(d, task)) for d in documents]
    missing = sorted(set(range(len(names))) - set(labels))
    if missing:
        raise ValueError(
            f"this Python's library has no docstrings of {', '.join(names[i] for i in missing)} in "
            f"the split {split!r}"
        )
    return Texts([d.text for d in documents], labels)


def in_split(split: str) -> list[Docstring]:
    """The docstrings of a split.

    Raises:
        ValueError: If it is not ``"train"``, ``"val"`` or ``"test"``.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"split must be 'train', 'val' or 'test', got {split!r}")
    return [d for d in docstrings() if d.split == split]


def _pairs(documents: list[Docstring]) -> Texts:
    """Of every docstring of two sentences or more: two of them in a row, and the first of those
    with a sentence of another docstring."""
    found = [s for d in documents if len(s := _sentences(d.text)) > 1]
    pairs, labels = [], []
    for index, sentences in enumerate(found):
        place = _hash(" ".join(sentences))
        at = place % (len(sentences) - 1)
        other = found[(index + 1 + place // 7919 % max(1, len(found) - 1)) % len(found)]
        pairs += [
            (sentences[at], sentences[at + 1]),
            (sentences[at], other[place // 104729 % len(other)]),
        ]
        labels += [1, 0]
    return Texts(pairs, labels)


def _sentences(text: str) -> list[str]:
    """Sentences of 4 to 40 words, on one line each; no examples."""
    sentences = (" ".join(piece.split()) for piece in _SENTENCE_END.split(text))
    return [s for s in sentences if 4 <= len(s.split()) <= 40 and ">>>" not in s]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
