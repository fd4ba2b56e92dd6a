import pytest

from memtl.report import Table, mean_std, ratio


def test_columns_are_aligned():
    table = Table(("method", "s"), (("a", "10.5"), ("longer name", "2")))
    assert str(table).split("\n") == [
        "method          s",
        "-----------------",
        "a            10.5",
        "longer name     2",
    ]


def test_a_table_without_rows_is_its_header():
    assert str(Table(("one", "two"), ())).split("\n") == ["one  two", "--------"]


def test_rows_must_fit_the_header():
    with pytest.raises(ValueError, match="2 cells like the header"):
        Table(("a", "b"), (("1",),))


@pytest.mark.parametrize(
    ("value", "base", "expected"),
    [
        (268, 3202, "0.084x"),
        (1, 1, "1.0x"),
        (3, 10, "0.30x"),
        (123, 10, "12x"),
        (9.96, 10, "1.0x"),
        (1e-7, 1, "0.0000x"),
        (None, 1, "-"),
        (1, None, "-"),
        (1, 0, "-"),
    ],
)
def test_ratio(value, base, expected):
    assert ratio(value, base) == expected


def test_mean_and_standard_deviation():
    assert mean_std([97.84]) == "97.8"
    assert mean_std([97.0, 98.0, 99.0]) == "98.0 ± 1.0"
    assert mean_std([1.0, 2.0], digits=2) == "1.50 ± 0.71"


def test_html_is_escaped_and_marks_headings():
    html = Table(("<b>", "n"), (("a & b", "<1>"),)).html('"quoted" <caption>')
    assert '<th scope="col">&lt;b&gt;</th>' in html
    assert '<tr><th scope="row">a &amp; b</th><td>&lt;1&gt;</td></tr>' in html
    assert "&lt;caption&gt;" in html
