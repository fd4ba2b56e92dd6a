import re
from xml.etree import ElementTree

import pytest

from memtl.report import Page, Point, Table, curves, heatmap, lines, tradeoff
from memtl.report.plots import smooth

SVG = "{http://www.w3.org/2000/svg}"
POINTS = [
    Point("few & cheap", 30.0, (91.0,)),
    Point("all", 3200.0, (98.0, 98.4, 97.9)),
    Point("twin", 3200.0, (98.0, 98.4, 97.9)),
    Point("<kept>", 300.0, (97.0, 97.5)),
]


def scatter() -> str:
    return tradeoff(POINTS, title="Accuracy & memory", x_label="KiB", y_label="accuracy")


def losses() -> str:
    series = {"one": [2.0, 1.0, 0.5] * 5, "<two>": [2.1, 1.5, 0.9] * 5}
    return curves(series, title="Loss", x_label="step", y_label="loss")


def texts(svg: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(svg).iter(SVG + "text")]


@pytest.fixture
def page() -> str:
    page = Page("Title <1>", "Lead & more")
    page.heading("Section <2>")
    page.paragraph("<script>alert('no')</script>")
    page.tiles({"what <3>": "5x"})
    page.table(Table(("a", "b"), (("<4>", "1"),)), "caption <5>")
    page.figure(scatter(), "figure <6>")
    page.figure(losses(), "figure <7>")
    page.code("code <10>")
    page.definitions({"term <8>": "value <9>", "number": 10})
    return str(page)


def test_page_is_well_formed_and_escaped(page):
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    text = "".join(root.itertext())
    for n in range(1, 11):
        assert f"<{n}>" in text, "text arrives as it was given"
    assert "<script>alert('no')</script>" in text
    assert not list(root.iter("script"))


def test_page_is_self_contained(page):
    stripped = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(
        r"https?:|//\w|@import|url\((?!#)|<(script|link|img|iframe)|\bsrc=", stripped
    )


def test_identifiers_are_unique_and_references_resolve(page):
    identifiers = re.findall(r'\bid="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers)) > 10
    references = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page)
    labels = [
        name for value in re.findall(r'aria-labelledby="([^"]*)"', page) for name in value.split()
    ]
    used = {a or b for a, b in references} | set(labels)
    assert references and len(labels) == 4
    assert used <= set(identifiers)


def test_every_colour_is_of_the_style_sheet(page):
    used = set(re.findall(r"var\(--([\w-]+)", page))
    light, dark = page.split("prefers-color-scheme: dark", 1)
    for variable in used:
        assert f"--{variable}:" in light and f"--{variable}:" in dark.split("</style>")[0]
    assert "#a1b2" not in page


def test_page_is_written_as_utf8(tmp_path):
    page = Page("± µ", "lead")
    path = page.write(tmp_path / "page.html")
    assert path == tmp_path / "page.html"
    assert "± µ" in path.read_text(encoding="utf-8")


def test_tradeoff_names_and_describes_every_point():
    svg = scatter()
    assert {p.label for p in POINTS} <= set(texts(svg))
    root = ElementTree.fromstring(svg)
    assert root.find(SVG + "title").text == "Accuracy & memory"
    description = root.find(SVG + "desc").text
    assert "few & cheap: 91 at 30" in description and "all: 98.1 at 3200" in description
    assert {"30", "300", "3,000"} <= set(texts(svg)), "plain numbers on the logarithmic axis"


def test_labels_of_coinciding_points_are_apart():
    root = ElementTree.fromstring(scatter())
    places = {
        e.text: tuple(map(float, re.findall(r"-?[\d.]+", e.get("transform"))[:2]))
        for e in root.iter(SVG + "text")
        if e.text in ("all", "twin") and e.get("transform")
    }
    assert len(places) == 2
    (x1, y1), (x2, y2) = places.values()
    assert abs(x1 - x2) > 12 or abs(y1 - y2) > 10


def test_curves_name_and_describe_every_series():
    svg = losses()
    assert {"one", "<two>", "step", "loss"} <= set(texts(svg))
    assert "one: " in ElementTree.fromstring(svg).find(SVG + "desc").text


def test_curves_as_they_are():
    svg = curves({"one": [2.0, 1.0, 0.5]}, title="t", x_label="x", y_label="y", weight=0.0)
    assert "one: 0.5." in ElementTree.fromstring(svg).find(SVG + "desc").text


def test_tradeoff_on_two_logarithmic_axes():
    points = [Point("near", 10.0, (1e-5,)), Point("far", 300.0, (0.3,))]
    svg = tradeoff(points, title="t", x_label="x", y_label="y", log_y=True)
    assert {"1e-05", "0.001", "0.1"} <= set(texts(svg))


def test_smooth():
    assert smooth([2.0] * 4) == pytest.approx([2.0] * 4)
    first, second = smooth([1.0, 2.0])
    assert first == pytest.approx(1.0)
    assert second == pytest.approx((0.9 * 1 + 2) / 1.9)


def test_plots_are_reproducible():
    assert scatter() == scatter()


def test_lines_say_every_mean_and_the_level():
    series = {
        "one": [Point("", 30.0, (91.0, 93.0)), Point("", 70.0, (80.0,))],
        "<two>": [Point("", 30.0, (90.0,))],
    }
    level = Point("dense", 0.0, (94.0, 96.0))
    svg = lines(series, title="t & u", x_label="sparsity", y_label="score", level=level)
    root = ElementTree.fromstring(svg)
    described = root.find(SVG + "desc").text
    assert described == (
        "score against sparsity. dense: 95; one: 92 at 30, 80 at 70; <two>: 90 at 30."
    )
    assert {"one", "<two>", "dense", "sparsity", "score"} <= set(texts(svg))
    alone = lines(series, title="t", x_label="x", y_label="y")
    assert "dense" not in alone and alone.count("series-0") > 0


def test_a_heatmap_tells_above_from_below_and_leaves_gaps():
    values = {"<a>": {"x": 1.25, "y": -2.0}, "b": {"x": None, "y": 0.5}}
    svg = heatmap(values, title="t", x_label="to", y_label="from")
    assert [t for t in texts(svg) if t in ("+1.2", "-2.0", "+0.5")] == ["+1.2", "-2.0", "+0.5"]
    assert {"<a>", "b", "x", "y", "to", "from"} <= set(texts(svg))
    opacities = [float(o) for o in re.findall(r"series-[12][^>]*?opacity: ([\d.]+)", svg)]
    assert len(opacities) == 3 and max(opacities) == opacities[1], "the furthest from 0"
    assert svg.count("--series-2,") == 1 and svg.count("--series-1,") == 2
    described = ElementTree.fromstring(svg).find(SVG + "desc").text
    assert described == "from by to. <a>, x: +1.2; <a>, y: -2.0; b, y: +0.5."
