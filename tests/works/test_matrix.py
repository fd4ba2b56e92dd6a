"""That the comparisons of this folder tell a fault, and that docs/works.md says what is tested."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT
from tests.works.matrix import COLUMNS, LOSSY, assert_follows, build, on, plain_step, train

FOLDER = "tests/works/"
PAGE = (ROOT / "docs" / "works.md").read_text()


@pytest.mark.parametrize("wrong", ["zero", "elsewhere", "opposite"])
@on(*LOSSY)
def test_wrong_gradients_are_noticed(column, wrong):
    case = build(column)

    def step(case, model, optimizer):
        optimizer.zero_grad()
        loss = case.loss(model)
        loss.backward()
        for p in model.parameters():
            if wrong == "zero":
                p.grad.zero_()
            elif wrong == "opposite":
                p.grad.neg_()
            else:
                p.grad.copy_(torch.randn_like(p) * p.grad.std(correction=0))
        optimizer.step()
        return loss

    stock = train(case, case.stock, plain_step)
    with pytest.raises(AssertionError, match="of the way of stock"):
        assert_follows(train(case, case.ours, step), stock, column)


def rows():
    """Of every table of the page: the row's name, its cells by column, the test that it names."""
    header = []
    for line in PAGE.splitlines():
        if not line.startswith("| "):
            header = header if line.startswith("|--") else []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not header:
            header = cells
            continue
        found = re.fullmatch(r"\[`(test_\w+)`\]\(\.\./(tests/[\w/]+\.py)\)", cells[-1])
        assert found, f"{cells[0]}: no link to a test in {cells[-1]!r}"
        yield cells[0], dict(zip(header[1:-1], cells[1:-1], strict=True)), found[2], found[1]


ROWS = list(rows())


def names_in(path):
    """The names of the tests of a file."""
    body = ast.parse((ROOT / path).read_text()).body
    return [f.name for f in body if isinstance(f, ast.FunctionDef) and f.name.startswith("test_")]


def columns_of(path, name):
    """What ``@on(...)`` was given for that test."""
    test = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    given = [m.args for m in test.pytestmark if m.name == "parametrize" and m.args[0] == "column"]
    return set(given[0][1])


@pytest.mark.parametrize(("row", "cells", "path", "name"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_of_the_page_has_its_test(row, cells, path, name):
    assert name in names_in(path)
    if path.startswith(FOLDER):  # tests elsewhere are parametrised in their own way
        assert tuple(cells) == COLUMNS
        run = {column for column, cell in cells.items() if not cell.startswith("n.a.")}
        assert run == columns_of(path, name)


def test_every_test_of_the_folder_is_in_the_page():
    named = {(path, name) for _, _, path, name in ROWS}
    assert len(named) > 25
    for file in sorted((ROOT / FOLDER).glob("test_*.py")):
        path = f"{FOLDER}{file.name}"
        if (ROOT / path) != Path(__file__).resolve():
            assert {(path, name) for name in names_in(path)} <= named
