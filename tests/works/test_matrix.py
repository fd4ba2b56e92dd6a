"""That the comparisons of this folder tell a fault, and that docs/works.md says what is tested."""

import ast
import re

import pytest
import torch

from tests.helpers import ROOT
from tests.works.matrix import COLUMNS, LOSSY, assert_follows, build, on, plain_step, train

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


def decorators(path, name):
    """The literal columns of ``@on(...)`` over that test, or None where it has none."""
    module = ast.parse((ROOT / path).read_text())
    tests = {f.name: f for f in ast.walk(module) if isinstance(f, ast.FunctionDef)}
    assert name in tests, f"{path} has no {name}"
    for decorator in tests[name].decorator_list:
        if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "on":
            given = ast.unparse(ast.Tuple(decorator.args, ast.Load()))
            import tests.works.matrix as matrix

            return set(eval(given, vars(matrix)))
    return None


@pytest.mark.parametrize(("row", "cells", "path", "name"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_of_the_page_has_its_test(row, cells, path, name):
    columns = decorators(path, name)
    if columns is None:  # rows of other folders, whose tests are parametrised in their own way
        return
    assert tuple(cells) == COLUMNS
    said = {column for column, cell in cells.items() if not cell.startswith("n.a.")}
    assert said == columns


def test_every_test_of_the_folder_is_in_the_page():
    named = {(path, name) for _, _, path, name in ROWS}
    for file in sorted((ROOT / "tests" / "works").glob("test_*.py")):
        for function in ast.parse(file.read_text()).body:
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                if file.name != "test_matrix.py":
                    assert (f"tests/works/{file.name}", function.name) in named
