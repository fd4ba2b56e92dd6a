import sys
import types

import pytest
import torch

from memtl.tasks import Split
from memtl.tasks import squad as module
from memtl.tasks.glue import GLUE, load_glue, pearson
from memtl.tasks.squad import load_squad, span_f1, windows, word_f1

pytest.importorskip("transformers")
from memtl.models.bert import SpanFinder

from . import encoders

WORDS = encoders.tokenizer()


class Rows(dict):
    """What is used of ``datasets.Dataset``."""

    def train_test_split(self, test_size, seed):
        n = len(next(iter(self.values())))
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
        cut = round(n * (1 - test_size))
        return {
            name: Rows({column: [values[i] for i in chosen] for column, values in self.items()})
            for name, chosen in (("train", order[:cut]), ("test", order[cut:]))
        }


@pytest.fixture
def datasets(monkeypatch):
    """What is used of the library; its loader gives what a test puts in ``has``."""
    library = types.ModuleType("datasets")
    library.has, library.asked = {}, []

    def load_dataset(*name):
        library.asked.append(name)
        return {split: Rows(rows) for split, rows in library.has.items()}

    library.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", library)
    return library


def rows(name, n):
    corpus = GLUE[name]
    texts = {column: [f"the cat is {i}" for i in range(n)] for column in corpus.columns}
    labels = [i / 2 if corpus.classes == 1 else i % corpus.classes for i in range(n)]
    return texts | {"label": labels}


@pytest.mark.parametrize("name", GLUE)
def test_a_task_of_glue(name, datasets):
    datasets.has.update({"train": rows(name, 20), GLUE[name].test: rows(name, 6)})
    task = load_glue(name, WORDS, 16)
    assert datasets.asked == [("nyu-mll/glue", name)]
    assert task.num_classes == GLUE[name].classes
    assert (len(task.train), len(task.val), len(task.test)) == (18, 2, 6)
    assert task.test.labels.tolist() == rows(name, 6)["label"]
    assert sorted([*task.train.labels.tolist(), *task.val.labels.tolist()]) == sorted(
        rows(name, 20)["label"]
    )
    separators = (task.test.images == WORDS.sep_token_id).sum(1)
    assert separators.tolist() == [len(GLUE[name].columns)] * 6


def test_glue_unknown():
    with pytest.raises(ValueError, match="GLUE has cola, .*, not 'ax'"):
        load_glue("ax", WORDS)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load_glue("rte", WORDS)


def test_pearson():
    class Noisy(torch.nn.Linear):
        def forward(self, x):
            return 3 * x[:, 0] + noise[: len(x)]

    torch.manual_seed(0)
    x, noise = torch.randn(50, 1), torch.randn(50)
    labels = 1 - x[:, 0]
    expected = torch.corrcoef(torch.stack([3 * x[:, 0] + noise, labels]))[0, 1]
    model = Noisy(1, 1)
    assert pearson(model, Split(x, labels)) == pytest.approx(expected.item(), abs=1e-6)
    assert pearson(model, Split(x, torch.ones(50))) == 0.0
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        pearson(model, Split(x[:1], labels[:1]))


def test_what_is_not_finite_has_no_score():
    x = torch.full((4, 1), torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        pearson(Column(1, 1), Split(x, x[:, 0]))
    split = windows(squad("what is it ?", "small dog"), WORDS, 16, 4)
    with pytest.raises(FloatingPointError, match="not finite"):
        span_f1(Column(1, 1), split)


class Column(torch.nn.Linear):
    """Gives NaN for numbers, and for tokens."""

    def forward(self, x):
        nan = torch.full(x.shape, torch.nan)
        return (nan, nan) if x.dtype == torch.int64 else nan[:, 0]


CONTEXT = "the big cat sat on the red mat . the small dog ran in the blue house ."


def squad(question, text):
    answer = {"text": [text], "answer_start": [CONTEXT.index(text)]}
    return {"question": [question], "context": [CONTEXT], "answers": [answer]}


@pytest.mark.parametrize("text", ["red mat", "small dog", "blue house"])
def test_windows_hold_the_answer(text):
    found = windows(squad("what is it ?", text), WORDS, 16, 4)
    assert len(found) > 1
    assert found.examples == [0] * len(found)
    held = 0
    for ids, (first, last), offsets in zip(
        found.images, found.labels.tolist(), found.offsets, strict=True
    ):
        if last:
            held += 1
            assert WORDS.convert_ids_to_tokens(ids[first : last + 1].tolist()) == text.split()
            assert CONTEXT[offsets[first, 0] : offsets[last, 1]] == text
        question = (offsets[:, 0] < 0).nonzero()[:, 0].tolist()
        assert question[:6] == [0, 1, 2, 3, 4, 5]
    assert held >= 1


def test_windows_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    several = [squad("what is it ?", text) for text in ("red mat", "small dog", "blue house")]
    rows = {column: [row[column][0] for row in several] for column in several[0]}
    whole = windows(rows, WORDS, 16, 4)
    monkeypatch.setattr(module, "CHUNK", 2)
    found = windows(rows, WORDS, 16, 4)
    for name in ("images", "labels", "offsets"):
        assert torch.equal(getattr(found, name), getattr(whole, name))
    assert found.examples == whole.examples and {*found.examples} == {0, 1, 2}


def test_the_best_span_of_all_windows_is_scored():
    split = windows(squad("what is it ?", "small dog"), WORDS, 16, 4)
    torch.manual_seed(0)

    class Oracle(torch.nn.Linear):
        def forward(self, ids):
            first = torch.randn(ids.shape)
            last = torch.randn(ids.shape)
            first[ids == WORDS.convert_tokens_to_ids("small")] = 50.0
            last[ids == WORDS.convert_tokens_to_ids("dog")] = 50.0
            last[:, 0] = 500.0  # no part of the context
            return first, last

    assert span_f1(Oracle(1, 1), split, batch_size=2) == 1.0
    with pytest.raises(TypeError, match="windows of questions, got a Split"):
        span_f1(Oracle(1, 1), Split(split.images, split.labels))


def test_squad_end_to_end(datasets):
    one = squad("what is it ?", "red mat")
    many = {column: values * 10 for column, values in one.items()}
    datasets.has.update({"train": many, "validation": one})
    task = load_squad(WORDS, 32, 8)
    assert datasets.asked == [("rajpurkar/squad",)]
    model = SpanFinder(encoders.span_finder(), WORDS)
    assert 0 <= task.evaluate(model, task.test) <= 1
    loss = model.memtl_loss(task.train.images, task.train.labels)
    loss.backward()
    assert loss.isfinite() and model.model.qa_outputs.weight.grad.abs().sum() > 0


def test_word_f1():
    assert word_f1("The red mat.", "red mat") == 1.0
    assert word_f1("red house", "the red mat") == pytest.approx(0.5)
    assert word_f1("dog", "cat") == 0.0
    assert word_f1("", "the") == 1.0
    assert word_f1("", "cat") == 0.0
