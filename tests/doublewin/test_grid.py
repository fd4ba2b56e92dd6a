"""The grid and what follows from its figures, on figures that are made up."""

import dataclasses
from collections import Counter

import pytest

from memtl.doublewin import DRAWINGS, Cell, Plan, Results, Run
from memtl.doublewin.plan import Draw, sparsity

PLAN = Plan(("standard", "pgd"), ("one-shot", "iterative", "learned"), (2, 5), seeds=2)


def test_what_there_is_to_do():
    cells = PLAN.cells()
    assert len(cells) == len(set(cells))
    places = 2 * 2 * 3 * 2  # pre-trainings, regimes, parts of the data, seeds
    assert Counter(cell.drawing for cell in cells) == {
        "dense": places, "one-shot": 2 * places, "iterative": 2 * places, "learned": 2 * places
    }  # fmt: skip
    assert [cell.level for cell in cells[:places]] == [0] * places
    assert {cell.level for cell in cells[places:]} == {2, 5}


def test_what_is_drawn():
    draws = PLAN.draws()
    assert Counter(draw.drawing for draw in draws) == {
        "iterative": 2,  # on the source, whatever the transfer, and through all levels
        "learned": 2 * 3 * 2,  # on the part of the target that there is, each level by itself
    }
    assert Draw("pgd", "iterative", 5, 0) in draws
    assert Draw("pgd", "learned", 2, 10) in draws
    target = dataclasses.replace(PLAN, drawings=("iterative-target",))
    assert {(draw.level, draw.percent) for draw in target.draws()} == {(5, 100), (5, 10), (5, 1)}
    for cell in PLAN.cells():
        assert (PLAN.draw(cell) is None) == (cell.drawing in ("dense", "one-shot"))


def test_levels_are_those_of_the_paper():
    found = [round(100 * sparsity(level), 2) for level in (6, 7, 8, 10, 11, 19)]
    assert found == [73.79, 79.03, 83.22, 89.26, 91.41, 98.56]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"pretrainings": ()}, "one or more, got none"),
        ({"pretrainings": ("a", "a")}, "once each"),
        ({"drawings": ("omp",)}, f"drawings are {', '.join(DRAWINGS)}, got 'omp'"),
        ({"drawings": ()}, "give both, or neither"),
        ({"levels": ()}, "give both, or neither"),
        ({"levels": (5, 2)}, r"at least 1 and rise, got \[5, 2\]"),
        ({"levels": (0, 2)}, "at least 1 and rise"),
        ({"regimes": ("robust",)}, "regimes are standard, adversarial, got 'robust'"),
        ({"percents": (100, 0)}, r"percents must be in \(0, 100\], got 0"),
        ({"percents": (101,)}, "got 101"),
        ({"seeds": 0}, "at least 1, got 0"),
    ],
)
def test_plans_that_cannot_be(wrong, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(PLAN, **wrong)


def test_networks_alone():
    plan = dataclasses.replace(PLAN, drawings=(), levels=())
    assert {cell.drawing for cell in plan.cells()} == {"dense"}
    assert plan.draws() == []


def results(change=lambda cell: {}, tolerance=0.01) -> Results:
    """Of made-up runs: the further down the grid, the worse, and the second seed a bit better."""

    def run(cell: Cell) -> Run:
        found = {
            "accuracy": 0.95 - 0.01 * cell.level + 0.004 * cell.seed,
            "robust": 0.60 - 0.01 * cell.level + 0.004 * cell.seed,
            "nll": 0.1, "ece": 0.02, "auc_noise": 0.9, "auc_letters": 0.8, "error": None,
        }  # fmt: skip
        return Run(cell, **found | change(cell), seconds=1.0)

    return Results(PLAN, {cell: run(cell) for cell in PLAN.cells()}, tolerance)


PLACE = Cell("pgd", "one-shot", 2, "standard", 100, 0)
DENSE_PLACE = dataclasses.replace(PLACE, drawing="dense", level=0)


def test_means_are_over_seeds():
    found = results()
    assert found.values("accuracy", PLACE) == pytest.approx((0.93, 0.934))
    assert found.mean("robust", PLACE) == pytest.approx(0.582)
    assert found.values("accuracy", dataclasses.replace(PLACE, level=3)) == ()


@pytest.mark.parametrize(("tolerance", "level"), [(0.019, 0), (0.021, 2), (0.051, 5)])
def test_a_win_is_within_the_tolerance(tolerance, level):
    found = results(tolerance=tolerance)
    assert found.win("pgd", "one-shot", 100).level == level
    assert found.best()["pgd"][0] == found.win("pgd", "one-shot", 100)
    said = f"the highest double-win sparsity is {100 * sparsity(level):.1f} % (one-shot)"
    text = found.verdicts()[1]
    assert text.startswith(
        f"pgd, with 100 % of the data: {said if level else 'no ticket is a double win'}; "
    )
    assert f"within {100 * tolerance:g} points" in text


def test_just_within_the_tolerance_is_within():
    # 0.93 - 0.95 is a bit less than -0.02 in floating point
    assert results(tolerance=0.02).win("pgd", "one-shot", 100).level == 2


@pytest.mark.parametrize("regime", ["standard", "adversarial"])
@pytest.mark.parametrize("metric", ["accuracy", "robust"])
def test_each_of_four_figures_can_spoil_it(regime, metric):
    def worse(cell):
        hit = cell.regime == regime and cell.level == 5 and cell.drawing == "one-shot"
        return {metric: 0.1} if hit else {}

    found = results(worse, tolerance=0.06)
    assert found.win("pgd", "one-shot", 100).level == 2
    assert found.win("pgd", "iterative", 100).level == 5
    win, drawing = found.best()["pgd"]
    assert (win.level, drawing) == (5, "iterative")
    margins = found.win("pgd", "one-shot", 100).margins[5]
    assert [pair for pair, margin in margins.items() if margin < -0.06] == [(regime, metric)]


def test_a_run_that_diverged_is_no_win():
    nothing = dict.fromkeys(("accuracy", "robust", "nll", "ece", "auc_noise", "auc_letters"))

    def lost(cell):
        hit = cell == dataclasses.replace(PLACE, level=5, seed=1)
        return nothing | {"error": "the loss is nan"} if hit else {}

    found = results(lost, tolerance=0.06)
    win = found.win("pgd", "one-shot", 100)
    assert (win.level, win.open, str(win)) == (2, 0, "36.0 %")
    assert len(found.diverged()) == 1
    row = found.table("accuracy", "standard", 100).rows[3]
    assert row[0] == "pgd: one-shot" and row[-1] == "diverged" and row[1] == "95.2 ± 0.3"


def unfinished(*gone, tolerance=0.06) -> Results:
    """Without the runs at places of pgd: (drawing, level)."""
    whole = results(tolerance=tolerance)
    kept = {
        cell: run
        for cell, run in whole._runs.items()
        if cell.pretraining != "pgd" or (cell.drawing, cell.level) not in gone
    }
    return Results(PLAN, kept, tolerance)


@pytest.mark.parametrize(
    ("gone", "tolerance", "shown", "said"),
    [
        ([("one-shot", 5)], 0.06, "at least 36.0 %", "is 67.2 % (iterative); a"),
        ([("one-shot", 2)], 0.06, "67.2 %", "is 67.2 % (one-shot); a"),
        ([("dense", 0)], 0.06, "-", "no ticket is a double win so far, up to 67.2 % is open; a"),
        ([("one-shot", 5)], 0.03, "at least 36.0 %", "is 36.0 % (one-shot) so far, up to 67.2 %"),
        ([("one-shot", 5)], 0.01, "-", "no ticket is a double win so far, up to 67.2 % is open; a"),
        ([("one-shot", 2)], 0.01, "-", "no ticket is a double win so far, up to 36.0 % is open; a"),
    ],
)
def test_what_is_missing_is_not_lost(gone, tolerance, shown, said):
    found = unfinished(*gone, tolerance=tolerance)
    assert str(found.win("pgd", "one-shot", 100)) == shown
    assert found.wins().rows[3] == ("pgd: one-shot", *[shown] * 3)
    assert said in found.verdicts()[1]
    assert "open" not in found.verdicts()[0]


def test_a_ticket_that_lost_once_is_lost_whatever_is_missing():
    whole = results(tolerance=0.01)
    gone = dataclasses.replace(PLACE, regime="adversarial")
    kept = {cell: run for cell, run in whole._runs.items() if cell != gone}
    win = Results(PLAN, kept, 0.01).win("pgd", "one-shot", 100)
    assert (win.level, win.open) == (0, 0) and win.margins[2]["adversarial", "robust"] is None


def test_a_dense_network_that_diverged_decides_nothing():
    nothing = dict.fromkeys(("accuracy", "robust", "nll", "ece", "auc_noise", "auc_letters"))

    def lost(cell):
        return nothing | {"error": "nan"} if cell == DENSE_PLACE else {}

    win = results(lost, tolerance=0.06).win("pgd", "one-shot", 100)
    assert (win.level, win.open, str(win)) == (0, 5, "-")


def test_one_regime_has_no_double_wins():
    plan = dataclasses.replace(PLAN, regimes=("standard",))
    whole = results(tolerance=0.06)._runs
    found = Results(plan, {cell: whole[cell] for cell in plan.cells()}, 0.06)
    assert not found.double and found.best() == {} and found.verdicts() == []
    assert found.wins().rows[0] == ("standard: one-shot", *["67.2 %"] * 3)


def test_what_robust_pretraining_brings():
    def better(cell):
        return {"robust": 0.9} if cell.pretraining == "pgd" and cell.percent == 1 else {}

    found = results(better)
    gains = found.gains("pgd", "one-shot")
    assert gains["accuracy", "standard", 100] == [0, 0]
    assert gains["robust", "standard", 1] == pytest.approx([0.9 - 0.582, 0.9 - 0.552])
    text = next(line for line in found.sentences() if "robust accuracy" in line)
    assert text.startswith("one-shot tickets of pgd pre-training, standard transfer")
    assert "above that of standard in 2 of 6 places, +11.1 points on average" in text
    header, row = found.transfer().header, found.transfer().rows[0]
    assert row[header.index("robust, standard, 1 %")] == "+33.3"
    assert row[header.index("accuracy, standard, 1 %")] == "+0.0"


def test_bad_tolerance_and_reference():
    with pytest.raises(ValueError, match="tolerance must be at least 0, got -1"):
        Results(PLAN, {}, -1)
    with pytest.raises(ValueError, match="reference must be one of standard, pgd, got 'fast'"):
        Results(PLAN, {}, 0.01, "fast")
