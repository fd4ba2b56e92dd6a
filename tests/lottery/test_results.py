import json

import pytest

from memtl.lottery import Plan, Results
from memtl.lottery.page import _tiles

PLAN = Plan(("a", "b"), 2, (50, 70), (50,), 70)
BASE = {"dense": 0.80, "iterative": 0.79, "one-shot": 0.5, "random": 0.4, "shuffled": 0.45}


def score(cell):
    """Dense runs have 0.78 and 0.82; the universal ticket loses a point, another task's ten."""
    value = BASE[cell.scheme] + (0.02 if cell.seed else -0.02)
    if cell.scheme == "iterative" and cell.source == "mlm":
        return value - 0.01 if cell.task == "a" else value
    if cell.scheme == "iterative" and cell.source != cell.task:
        return value - 0.10
    return value


@pytest.fixture
def results():
    return Results(PLAN, {cell: score(cell) for cell in PLAN.cells()})


def test_scores_by_scheme_and_sparsity(results):
    table = results.accuracies("a")
    assert table.header == ("a", "0 %", "50 %", "70 %")
    assert table.rows == (
        ("dense", "80.0 ± 2.8", "-", "-"),
        ("iterative", "-", "79.0 ± 2.8", "79.0 ± 2.8"),
        ("one-shot", "-", "50.0 ± 2.8", "50.0 ± 2.8"),
        ("universal (mlm)", "-", "78.0 ± 2.8", "78.0 ± 2.8"),
        ("shuffled", "-", "45.0 ± 2.8", "-"),
        ("random", "-", "40.0 ± 2.8", "-"),
    )


def test_verdicts(results):
    rows = {row[0]: row[1:] for row in results.matching().rows}
    assert rows["a: iterative"] == ("80.0 ± 2.8", "77.2", "50 70", "70 %", "79.0 ± 2.8")
    assert rows["b: one-shot"] == ("80.0 ± 2.8", "77.2", "none", "-", "-")
    assert results.figures()["sparsest_matching"]["a"] == {
        "iterative": 70, "one-shot": None, "universal (mlm)": 70, "shuffled": None, "random": None,
    }  # fmt: skip


def test_transfer(results):
    matrix = results.transfer()
    assert matrix["a"] == {"a": pytest.approx(-0.01), "b": pytest.approx(-0.11)}
    assert results.elsewhere() == {
        "a": pytest.approx(-0.11),
        "b": pytest.approx(-0.11),
        "universal (mlm)": pytest.approx(-0.015),
        "one-shot": pytest.approx(-0.30),
    }
    assert results.transfer_table().rows[0] == ("a", "-1.0", "-11.0", "-11.0")
    assert results.universal() == [
        "Over all tasks, the universal ticket (-1.5) is above the one-shot one (-30.0).",
        "Over all tasks, the universal ticket (-1.5) is above the mean of other tasks' (-11.0).",
        "On tasks but a, the universal ticket (-1.0) is above that of a (-11.0).",
        "On tasks but b, the universal ticket (-2.0) is above that of b (-11.0).",
        "On a, the universal ticket (-2.0) is above the mean of other tasks' (-11.0).",
        "On b, the universal ticket (-1.0) is above the mean of other tasks' (-11.0).",
    ]


def test_a_run_that_diverged_is_no_score(results):
    scores = {cell: score(cell) for cell in PLAN.cells()}
    gone = next(c for c in scores if (c.task, c.source, c.sparsity) == ("a", "mlm", 70))
    scores[gone] = None
    results = Results(PLAN, scores)
    assert results.accuracies("a").rows[3][-1] == "diverged"
    assert [*results.diverged()] == [gone]
    assert results.transfer()["universal (mlm)"]["a"] is None
    assert results.transfer_table().rows[2] == ("universal (mlm)", "-", "-1.0", "-")
    assert "not decided" in results.universal()[0]
    assert not any(
        v["matching"]
        for v in results.figures()["verdicts"]
        if (v["task"], v["scheme"], v["sparsity"]) == ("a", "universal (mlm)", 70)
    )


def test_one_task_has_no_other():
    plan = Plan(("a",), 2, (70,), (), 70)
    assert Results(plan, {cell: score(cell) for cell in plan.cells()}).universal() == [
        "Over all tasks, the universal ticket (-2.0) is above the one-shot one (-30.0)."
    ]


@pytest.mark.parametrize(("seeds", "said"), [(1, "not decided"), (2, "70 %")])
def test_what_one_run_does_not_decide(seeds, said):
    plan = Plan(("a",), seeds, (70,), (), 70)
    results = Results(plan, {cell: score(cell) for cell in plan.cells()})
    assert _tiles(results)["sparsest matching ticket, a"] == said


def test_figures_are_ready_for_json(results):
    figures = json.loads(json.dumps(results.figures()))
    assert len(figures["scores"]) == len(PLAN.cells())
    assert figures["transfer_means"]["one-shot"] == pytest.approx(-0.30)
