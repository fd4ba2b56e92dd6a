import asyncio.futures
import collections
import inspect

import pytest

from memtl.tasks import docstrings


def test_every_text_once_and_named():
    found = docstrings.docstrings()
    assert len(found) > 5000
    assert len({d.text for d in found}) == len(found)
    assert {d.kind for d in found} == set(docstrings.KINDS)
    assert not {"test", "tests"} & {d.package for d in found}
    named = {d.text: d for d in found}
    assert named[inspect.getdoc(asyncio.futures._PyFuture)].package == "asyncio"
    assert named[inspect.getdoc(asyncio.futures._PyFuture)].kind == "class"


def test_what_a_file_says(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(
        '"""Of the module."""\n'
        "class A:\n"
        '    """Of the class."""\n'
        "    def f(self):\n"
        '        """Of the method.\n\n'
        '        More.\n        """\n'
        '        def g():\n            """Of a function inside."""\n'
        "def h(): pass\n"
        "async def i():\n"
        '    """Of the coroutine."""\n'
    )
    assert docstrings._read(path) == [
        ("Of the module.", "module"),
        ("Of the class.", "class"),
        ("Of the method.\n\nMore.", "method"),
        ("Of a function inside.", "function"),
        ("Of the coroutine.", "function"),
    ]
    path.write_text(
        "try:\n    import a\nexcept ImportError:\n    def f():\n        'Of a way out.'\n"
        "match 1:\n    case 1:\n        class A:\n            'Of a case.'\n"
    )
    assert docstrings._read(path) == [("Of a way out.", "function"), ("Of a case.", "class")]
    path.write_text("print 'of another Python'")
    assert docstrings._read(path) == []


def test_splits_are_of_the_text_alone():
    counts = collections.Counter(d.split for d in docstrings.docstrings())
    total = sum(counts.values())
    for name, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        assert abs(counts[name] / total - share) < 0.02
    assert docstrings.Docstring("Return True.", "any", "method").split == "train"
    assert docstrings.Docstring("Close the file.", "any", "method").split == "test"


@pytest.mark.parametrize("task", docstrings.TASKS)
def test_a_task_has_its_classes_in_every_split(task):
    names = docstrings.classes(task)
    for split in ("train", "val", "test"):
        found = docstrings.texts(task, split)
        assert len(found.texts) == len(found.labels) > 300
        assert set(found.labels) == set(range(len(names)))


def test_no_text_of_the_test_split_is_trained_on():
    train, test = (set(docstrings.texts("kind", split).texts) for split in ("train", "test"))
    assert not train & test


def test_pairs():
    found = docstrings.texts("pair", "val")
    assert sum(found.labels) * 2 == len(found.labels)
    documents = [" ".join(d.text.split()) for d in docstrings.in_split("val")]
    together = [
        any(a in text and b in text for text in documents)
        for (a, b), label in zip(found.texts, found.labels, strict=True)
        if label
    ]
    assert all(together)
    (first, _), (again, other) = found.texts[:2]
    assert first == again
    assert not any(first in text and other in text for text in documents)


def test_wrong_names():
    with pytest.raises(ValueError, match="task must be one of package, kind, pair, got 'nli'"):
        docstrings.texts("nli", "train")
    with pytest.raises(ValueError, match="split must be 'train', 'val' or 'test', got 'dev'"):
        docstrings.texts("kind", "dev")


def test_a_class_that_this_python_lacks_is_named(monkeypatch):
    monkeypatch.setattr(docstrings, "PACKAGES", ("asyncio", "cobol"))
    with pytest.raises(ValueError, match="no docstrings of cobol in the split 'val'"):
        docstrings.texts("package", "val")
