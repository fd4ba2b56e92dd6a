"""The recommendation obeys its rules, on made-up rows; and its code means what was measured."""

import math

import pytest

import memtl
from memtl.fidelity import Agreement, Row, Thresholds, choose, parse
from memtl.fidelity.names import DEFAULT, code
from memtl.storage import CenteredTopK, Quantized, SignMean, TopK


def made_up(label, bytes, worst=1.0, mean=1.0, reached=1.0, error=""):
    """A row of two weights and a bias that has such cosines."""
    weights = Agreement(mean, worst, "w", 0.1, 0.1, "w", {"w": worst, "v": 2 * mean - worst})
    vectors = Agreement(1.0, 1.0, "b", 0.0, 0.0, "b", {"b": 1.0})
    return Row(
        label, f"{label}()", "", error, bytes, 4.5, weights, vectors, reached, {"l": reached}
    )


def test_fewest_bytes_among_those_that_meet_the_thresholds():
    rows = [
        made_up("big", 4096),
        made_up("right", 3072, worst=0.97, mean=0.99, reached=0.97),
        made_up("one", 1024, worst=0.9, mean=0.995),
        made_up("two", 2048, worst=0.98, mean=0.9899),
        made_up("broken", math.nan, error="RuntimeError: no"),
    ]
    choice = choose(rows, Thresholds())
    assert choice.row is rows[1]
    assert choice.reason == (
        "right: fewest bytes (3.0 KiB a sample) among 2 of 5 that meet the thresholds; the "
        "next smaller, two (2.0 KiB), has a mean cosine of 0.9899 over weights."
    )
    assert choose(rows, Thresholds(worst=0.9)).row is rows[2]
    assert choose(rows, Thresholds(mean=0.98)).row is rows[3]


def test_the_gradient_at_the_first_layer_counts():
    rows = [made_up("near", 10, reached=0.96), made_up("far", 20)]
    choice = choose(rows, Thresholds(), "norm")
    assert choice.row is rows[1] and choice.role == "norm"
    assert "has a cosine of 0.9600 at the first layer's input" in choice.reason


def test_of_equal_bytes_the_closer_one():
    rows = [made_up("near", 10, worst=0.98), made_up("nearer", 10, worst=0.99)]
    choice = choose(rows, Thresholds())
    assert choice.row is rows[1]
    assert choice.reason.endswith("nothing that was measured is smaller.")


def test_where_none_meets_them_it_says_so():
    rows = [
        made_up("far", 10, worst=0.1),
        made_up("nearer", 20, worst=0.9),
        made_up("nan", 5, worst=math.nan),
        made_up("broken", math.nan, error="no"),
    ]
    choice = choose(rows, Thresholds())
    assert choice.row is None
    assert choice.reason == (
        "none of 4 meets the thresholds; the closest, nearer, has a cosine of 0.9000 at w."
    )
    assert "none" in str(choice)
    assert choose([], Thresholds()).row is None


def test_which_gradients_fall_short():
    row = made_up("it", 10, worst=0.5, mean=0.74)
    assert Thresholds(worst=0.97).short(row) == ["w"]
    assert Thresholds(worst=0.99).short(row) == ["w", "v"]


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("q4", Quantized(4)),
        ("topk10", TopK(0.1)),
        ("topk2.5", TopK(0.025)),
        ("centered3", CenteredTopK(0.03)),
        ("sign3", SignMean(0.03)),
    ],
)
def test_short_names(name, format):
    assert parse(name) == format
    assert eval(code(format), {"memtl": memtl}) == format


def test_every_default_name_is_known():
    assert len({parse(name) for name in DEFAULT}) == len(DEFAULT)


@pytest.mark.parametrize(
    "config",
    [
        memtl.LowBitConfig(),
        memtl.LowBitConfig(bits=2, norm=8),
        memtl.BackRazorConfig.preset("paper", keep=0.03),
        memtl.BackRazorConfig(linear=None, norm=Quantized(8, rebuild=True)),
    ],
)
def test_code_is_the_configuration(config):
    assert eval(code(config), {"memtl": memtl}) == config


def test_code_says_the_bits():
    assert code(memtl.LowBitConfig()) == "memtl.LowBitConfig(bits=4)"
