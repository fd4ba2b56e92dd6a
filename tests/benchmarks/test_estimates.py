"""Predictions against measurements in processes of their own."""

import json
import sys

import pytest

from benchmarks.models import estimates
from benchmarks.models.estimates import Case, compare, error, table

pytest.importorskip("timm")
VIT = Case("vit_tiny_patch16_224", 32, {"options": {"depth": 2}}, ("stock", "low-bit"))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is Linux's")
def test_what_is_predicted_is_measured(tmp_path):
    rows = compare([VIT], "cpu")
    for row in rows:
        assert row["predicted"].keys() == row["measured"].keys() == set(estimates.FIGURES)
        for name in ("saved", "weights", "gradients", "optimizer"):
            assert row["predicted"][name] == row["measured"][name]
        assert abs(error(row, "peak")) < 0.05
    assert rows[0]["measured"]["peak"] > 2 * rows[1]["measured"]["peak"]
    assert "4 bits, once" in table(rows)
    known = [{**row, "measured": {**row["measured"], "saved": 1}} for row in rows]
    again = compare([VIT], "cpu", json.loads(json.dumps(known)))
    assert [row["measured"]["saved"] for row in again] == [1, 1]


def test_a_measurement_that_fails():
    with pytest.raises(RuntimeError, match="(?s)vit_tiny_patch16_224, rep-net: .*has no stages"):
        estimates.in_a_process(VIT, "rep-net", "cpu")
