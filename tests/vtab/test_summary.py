import pytest

from memtl.tasks.vtab import DATASETS
from memtl.vtab import Outcome
from memtl.vtab.summary import Summary


def outcome(dataset: str, *accuracies: float | None, method: str = "m") -> Outcome:
    group = DATASETS.get(dataset, ("other", 0))[0]
    return Outcome(method, dataset, group, (0.1, 0.0), 0.5, accuracies, 0)


def values(summary: Summary, method: str = "m") -> dict[str, float | None]:
    return {mean.label: mean.values[method] for mean in summary.means()}


def test_all_nineteen():
    # natural .7 (of 7), specialized .5 (of 4), structured .3 (of 8)
    score = {"natural": 0.7, "specialized": 0.5, "structured": 0.3}
    found = [outcome(d, score[g] - 0.1, score[g] + 0.1) for d, (g, _) in DATASETS.items()]
    summary = Summary(found)
    assert values(summary) == pytest.approx(
        {
            "natural, mean of 7": 0.7,
            "specialized, mean of 4": 0.5,
            "structured, mean of 8": 0.3,
            "mean of the three groups": 0.5,
            "mean of the 19 datasets": (7 * 0.7 + 4 * 0.5 + 8 * 0.3) / 19,
        }
    )
    overall = summary.overall.values["m"]
    assert summary.by_seed("m") == pytest.approx((overall - 0.1, overall + 0.1))
    table = summary.table()
    assert [row[0] for row in table.rows[:19]] == [*DATASETS]
    assert table.rows[0][1] == "70.0 ± 14.1"


def test_another_dataset_is_not_in_the_mean_of_the_nineteen():
    found = [outcome(d, 0.5) for d in DATASETS] + [outcome("mine", 1.0)]
    summary = Summary(found)
    assert summary.overall.label == "mean of the 19 datasets"
    assert summary.overall.values == {"m": 0.5}
    assert summary.by_seed("m") == (0.5,)
    assert [row[0] for row in summary.table().rows][19] == "mine"


def test_some_of_them():
    found = [
        outcome("svhn", 0.5),
        outcome("dtd", 0.7),
        outcome("eurosat", 0.9),
        outcome("mine", 0.1),
    ]
    summary = Summary(found)
    assert values(summary) == pytest.approx(
        {
            "natural, mean of the 2 run of 7": 0.6,
            "specialized, mean of the 1 run of 4": 0.9,
            "structured, mean of the 0 run of 8": None,
            "mean of the three groups": None,
            "mean of the 4 datasets run": 0.55,
        }
    )
    cells = dict(row for row in summary.table().rows)
    assert cells["cifar"] == cells["structured, mean of the 0 run of 8"] == "missing"
    assert cells["svhn"] == "50.0" and cells["mine"] == "10.0"
    assert cells["mean of the three groups"] == "missing"


def test_none_of_them():
    summary = Summary([outcome("digits", 0.25, 0.75)])
    assert values(summary) == {"mean of the 1 dataset run": 0.5}
    assert [row[0] for row in summary.table().rows] == ["digits", "mean of the 1 dataset run"]


def test_a_method_that_diverged_somewhere_has_no_mean_over_fewer():
    found = [outcome(d, 0.5, method=m) for d in ("dtd", "svhn") for m in "ab"]
    found[1] = outcome("dtd", 0.5, None, method="b")
    summary = Summary(found)
    assert summary.overall.values == {"a": 0.5, "b": None}
    assert summary.by_seed("b") == ()
    cells = {row[0]: row[1:] for row in summary.table().rows}
    assert cells["dtd"] == ("50.0", "diverged") and cells["svhn"] == ("50.0", "50.0")
    assert cells["mean of the 2 datasets run"] == ("50.0", "missing")


def test_what_was_chosen():
    failed = Outcome("b", "dtd", "natural", None, None, (None,), 3)
    summary = Summary([outcome("dtd", 0.5, method="a"), failed])
    assert summary.chosen().rows == (("dtd", "0.1, 0: 50.0", "diverged"),)
