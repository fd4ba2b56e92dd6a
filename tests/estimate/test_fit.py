"""The largest batch."""

import pytest

from memtl.estimate import Prediction
from memtl.estimate.fit import largest_batch, memory


def of(peak, calls=None):
    def predict_at(size):
        if calls is not None:
            calls.append(size)
        return Prediction(1, 0, 0, 0, 0, peak(size), size)

    return predict_at


@pytest.mark.parametrize("budget", [11, 13, 21, 99, 100, 101, 12345, 10**6])
def test_it_is_the_largest(budget):
    def line(size):
        return 10 + 3 * size

    calls = []
    found = largest_batch(of(line, calls), budget)
    best = (budget - 10) // 3
    assert (found.batch_size if found else 0) == best
    assert best + 1 in calls and (not best or best in calls)
    assert len(calls) <= 7


@pytest.mark.parametrize("budget", [1000, 4567, 10**5])
def test_what_is_no_line(budget):
    def bent(size):
        return max(900, 7 * size, size * size // 50) + size % 3

    found = largest_batch(of(bent), budget)
    assert bent(found.batch_size) <= budget < bent(found.batch_size + 1)


def test_a_peak_that_does_not_grow():
    assert largest_batch(of(lambda size: 5), 10, most=100).batch_size == 100
    assert largest_batch(of(lambda size: 15), 10) is None


def test_a_batch_norm_takes_two_samples():
    def predict_at(size):
        if size == 1:
            raise ValueError("Expected more than 1 value per channel")
        return of(lambda n: 100 * n)(size)

    assert largest_batch(predict_at, 150) is None
    assert largest_batch(predict_at, 299).batch_size == 2


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("8GiB", 8 * 2**30), ("8GB", 8 * 10**9), ("8000MB", 8 * 10**9), ("1.5 KiB", 1536)],
)
def test_memory(text, bytes_):
    assert memory(text) == bytes_


@pytest.mark.parametrize("text", ["8", "8G", "GiB", "-1GB", "0GB", "8 gigabytes", "8GiB8", ""])
def test_what_is_no_memory(text):
    with pytest.raises(ValueError, match="must be a number and a unit, as 8GiB or 8000MB"):
        memory(text)
