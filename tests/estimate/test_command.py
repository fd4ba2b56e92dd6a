"""``memtl estimate``: the table, and what fits."""

import pytest

from memtl.cli import main

pytest.importorskip("timm")

VIT = ["estimate", "vit_tiny_patch16_224", "--size", "32", "--num-classes", "7"]


def rows(text):
    """Title -> cells, of the table."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("---"))
    end = next((i for i, line in enumerate(lines) if i > start and not line), len(lines))
    cells = [[cell for cell in line.split("  ") if cell.strip()] for line in lines[start + 1 : end]]
    return {first: [c.strip() for c in rest] for first, *rest in cells}


def test_a_table(capsys):
    assert main([*VIT, "--methods", "stock", "low-bit", "rep-net"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("vit_tiny_patch16_224, 7 classes, 32 x 32 pixels, batch 8, adamw\n")
    found = rows(text)
    assert list(found) == ["stock", "4 bits, once"]
    assert float(found["stock"][1]) > 3 * float(found["4 bits, once"][1])
    assert "Rep-Net does not apply: this VisionTransformer has no stages" in text


def test_what_fits(capsys):
    assert main([*VIT, "--memory", "150MiB", "--method", "stock", "low-bit", "vqt"]) == 0
    text = capsys.readouterr().out
    assert "The largest batch within 150MiB, by prediction:" in text
    batches = [int(cells[0]) for cells in rows(text).values()]
    assert len(batches) == 3 and batches == sorted(batches, reverse=True)
    assert all(float(cells[-1]) <= 150 for cells in rows(text).values())


def test_nothing_fits(capsys):
    assert main([*VIT, "--memory", "1MiB", "--method", "stock"]) == 0
    assert "Nothing fits.\n\nstock does not fit, not even one sample" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "timm has no model 'nope'"),
        (["hf:nope"], "nope"),
        (["resnet18", "--methods", "nope"], "--methods nope: unknown, known are stock,"),
        (["resnet18", "--methods", "vqt"], "has no attention blocks"),
        (["resnet18", "--memory", "8"], "as 8GiB or 8000MB, got '8'"),
        (["resnet18", "--memory", "8GB", "--batch-size", "3"], "goes without --batch-size"),
        (["resnet18", "--lm"], "it is no language model"),
        (["resnet18", "--analytic", "--memory", "8GB"], "--memory is no option of --analytic"),
        (["vit_tiny_patch16_224", "--size", "5", "--method", "stock"], "vit_tiny_patch16_224"),
    ],
)
def test_it_says_what_is_wrong(arguments, said, capsys):
    assert main(["estimate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("memtl estimate: ") and said in captured.err
    assert captured.out == ""
