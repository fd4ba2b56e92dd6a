import statistics

import pytest

from memtl.lottery import Verdict, sparsest
from memtl.lottery.verdict import mean

DENSE = (0.80, 0.84, 0.82)  # mean 0.82, sample standard deviation 0.02


@pytest.mark.parametrize(
    ("ticket", "matching"),
    [
        ((0.80, 0.80, 0.81), True),  # 0.8033, bound 0.80
        ((0.79, 0.80, 0.80), False),
        ((0.9,), True),
        ((), False),  # one diverged
    ],
)
def test_a_ticket_matches_within_one_deviation_of_the_dense_runs(ticket, matching):
    verdict = Verdict(50, ticket, DENSE)
    assert verdict.bound == pytest.approx(0.80)
    assert verdict.mean == (pytest.approx(statistics.fmean(ticket)) if ticket else None)
    assert verdict.matching is matching


def test_on_the_bound_it_matches():
    dense = (0.25, 0.75)
    bound = Verdict(10, (0.5,), dense).bound
    assert Verdict(10, (bound, bound), dense).matching is True


@pytest.mark.parametrize("dense", [(), (0.8,)])
def test_without_a_deviation_nothing_is_decided(dense):
    verdict = Verdict(50, (0.9, 0.9), dense)
    assert (verdict.decided, verdict.bound, verdict.matching) == (False, None, None)


def test_the_sparsest_matching_one():
    good, bad = (0.82, 0.82, 0.82), (0.1, 0.1, 0.1)
    verdicts = [
        Verdict(30, good, DENSE),
        Verdict(40, bad, DENSE),
        Verdict(50, good, DENSE),
        Verdict(60, bad, DENSE),
    ]
    assert sparsest(verdicts) is verdicts[2]
    assert sparsest([verdicts[1]]) is None
    assert sparsest([Verdict(30, good, (0.8,))]) is None


def test_a_mean_is_of_all_or_none():
    assert mean([1.0, 2.0]) == 1.5
    assert mean([1.0, None]) is None
    assert mean([]) is None
