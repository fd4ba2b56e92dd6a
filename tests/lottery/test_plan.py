import dataclasses
from collections import Counter

import pytest

from memtl.lottery import Cell, Plan
from memtl.lottery.experiments import TASKS

PLAN = Plan(("a", "b", "c"))


def test_what_there_is_to_do():
    cells = PLAN.cells()
    assert len(cells) == len(set(cells))
    # 3 tasks, 3 seeds, 5 sparsities, 3 of them with controls
    assert Counter(cell.scheme for cell in PLAN.schemes()) == {
        "iterative": 3 * 3 * 5 * 2,  # the task's own and the universal one
        "one-shot": 3 * 3 * 5,
        "random": 3 * 3 * 3,
        "shuffled": 3 * 3 * 3,
    }
    new = {*PLAN.transfers()} - {*PLAN.schemes()}
    assert {(cell.source, cell.task) for cell in new} == {
        (source, task) for source in "abc" for task in "abc" if source != task
    }
    assert {cell.sparsity for cell in new} == {70}
    assert len(cells) == 9 + 189 + 3 * 6
    assert [cell.scheme for cell in cells[:9]] == ["dense"] * 9
    assert PLAN.sources == ("a", "b", "c", "mlm")


def test_what_can_be_left_out_or_added():
    small = Plan(("a",), 1, (20,), (), 20, universal=False)
    assert small.cells() == [
        Cell("a", "dense", "", 0, 0),
        Cell("a", "iterative", "a", 20, 0),
        Cell("a", "one-shot", "", 20, 0),
    ]
    assert small.sources == ("a",)
    permuted = {*dataclasses.replace(PLAN, permuted=True).cells()} - {*PLAN.cells()}
    assert permuted == {
        Cell(task, "permuted", task, 70, seed) for task in "abc" for seed in range(3)
    }


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tasks": ()}, "one or more, each once"),
        ({"tasks": ("a", "a")}, "each once"),
        ({"seeds": 0}, "at least 1, got 0"),
        ({"sparsities": ()}, "must rise"),
        ({"sparsities": (50, 30)}, r"must rise, in 1 \.\. 99 %, got \[50, 30\]"),
        ({"sparsities": (0, 30, 70)}, r"1 \.\. 99"),
        ({"sparsities": (30, 100)}, r"1 \.\. 99"),
        ({"sparsities": (25, 30, 50, 70)}, r"rounds, 10, 20, ... %, got \[25\]"),
        ({"controls": (20,)}, "control sparsities must be among .* got 20"),
        ({"transfer": 80}, "transfer sparsities must be among .* got 80"),
        ({"controls": (), "permuted": True}, "at a control sparsity"),
    ],
)
def test_plans_that_cannot_be(wrong, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(PLAN, **wrong)


def test_the_last_sparsity_may_be_between_rounds():
    assert Plan(("a",), sparsities=(30, 35), controls=(), transfer=35).sparsities == (30, 35)


def test_no_run_has_the_head_that_its_ticket_was_drawn_with():
    seeds = {cell.seed for cell in Plan(("package",), seeds=20).cells()}
    assert seeds == set(range(20))
    assert not seeds & {recipe.drawing_seed for recipe in TASKS.values()}
