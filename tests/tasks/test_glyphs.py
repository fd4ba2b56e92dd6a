import sys
from pathlib import Path

import matplotlib
import pytest
import torch

from memtl.tasks import Glyphs, glyphs
from memtl.tasks.digits import MEAN, STD
from memtl.tasks.glyphs import (
    CLASSES,
    HELDOUT_FONTS,
    augment,
    fonts_left_out,
    render,
    training_fonts,
)


@pytest.fixture(scope="module")
def source() -> Glyphs:
    return Glyphs()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_font_is_accounted_for_once():
    shipped = Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf")
    accounted = [*training_fonts(), *HELDOUT_FONTS, *fonts_left_out()]
    assert sorted(accounted) == sorted(path.stem for path in shipped)


def test_fonts_left_out_have_reasons():
    reasons = fonts_left_out()
    assert reasons["STIXSizOneSymReg"] == "has no glyph for '0'"
    # These three claim in their charset to have every alphanumeric, and draw something else.
    assert reasons["cmsy10"] == "draws 'prime' for '0'"
    assert reasons["cmex10"] == "draws 'parenlefttp' for '0'"
    assert reasons["LastResortHE-Regular"] == "draws 'lastresortlatin' for '0'"
    assert "DejaVuSans" not in reasons


@pytest.mark.parametrize("font", ["DejaVuSans-Bold", "cmtt10", "STIXGeneral", "cmss10"])
def test_rendered_glyphs_are_whole_and_distinct(font):
    sheet = render(font)
    assert sheet.shape == (62, 64, 64) and sheet.dtype == torch.uint8
    assert len({bytes(glyph.flatten().tolist()) for glyph in sheet}) == 62
    ink = sheet.float() / 255
    assert (ink.sum(dim=(1, 2)) > 60).all()
    border = torch.cat([ink[:, 0], ink[:, -1], ink[:, :, 0], ink[:, :, -1]], dim=1)
    assert border.max() < 0.5  # nothing is cut off
    # On one scale, so that case can be told from size.
    heights = (ink.amax(dim=2) > 0.5).sum(dim=1)
    assert heights[CLASSES.index("S")] > 1.2 * heights[CLASSES.index("s")]


def test_training_never_draws_a_heldout_font(source, monkeypatch):
    assert not set(source.fonts) & set(HELDOUT_FONTS)
    drawn = []
    monkeypatch.setattr(glyphs, "render", lambda font: drawn.append(font) or render(font))
    fresh = Glyphs()
    fresh.batch(16, seeded(0))
    assert drawn == training_fonts()
    drawn.clear()
    assert len(fresh.heldout) > 0
    assert drawn == list(HELDOUT_FONTS)


def test_batch(source):
    images, labels = source.batch(620, seeded(0))
    assert images.shape == (620, 1, 32, 32) and images.dtype == torch.float32
    assert labels.shape == (620,) and labels.dtype == torch.int64
    assert set(labels.tolist()) == set(range(62))
    ink = images * STD + MEAN
    assert ink.min() >= -1e-6 and ink.max() <= 1 + 1e-6
    assert (ink.amax(dim=(1, 2, 3)) > 0.2).all()  # every glyph can be seen
    assert ink.mean() < 0.4  # and is bright on dark


def test_batch_is_decided_by_the_generator_alone(source):
    torch.manual_seed(1)
    images, labels = source.batch(32, seeded(5))
    torch.manual_seed(2)
    again, labels_again = Glyphs().batch(32, seeded(5))
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    generator = seeded(5)
    first, second = source.batch(32, generator)[0], source.batch(32, generator)[0]
    assert torch.equal(first, images) and not torch.equal(second, images)


def test_labels_match_what_is_drawn(source, monkeypatch):
    # Without distortion, the batch must hold the rendered glyph of its label in some font.
    monkeypatch.setattr(glyphs, "augment", lambda ink, generator: ink)
    images, labels = Glyphs(["DejaVuSans"]).batch(40, seeded(3))
    wanted = render("DejaVuSans")[labels].unsqueeze(1).float() / 255
    assert torch.allclose(images * STD + MEAN, wanted, atol=1e-6)


def test_augment_distorts_each_image_differently():
    ink = render("DejaVuSans")[CLASSES.index("R")].float().expand(64, 1, 64, 64) / 255
    out = augment(ink, seeded(0))
    assert out.shape == (64, 1, 32, 32)
    distance = torch.cdist(out.flatten(1), out.flatten(1)) + 1e3 * torch.eye(64)
    assert distance.min() > 0.5
    # Thick and thin, bright and dim: total ink differs by a factor of two or more.
    total = out.sum(dim=(1, 2, 3))
    assert total.max() > 2 * total.min()


def test_augment_leaves_its_input_alone():
    ink = render("cmr10").unsqueeze(1).float() / 255
    before = ink.clone()
    augment(ink, seeded(0))
    assert torch.equal(ink, before)


def test_half_of_the_images_have_the_resolution_of_the_digits(source):
    images, _ = source.batch(400, seeded(0))
    coarse = torch.nn.functional.adaptive_avg_pool2d(images, 8)
    smooth = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    detail = (images - smooth).pow(2).mean(dim=(1, 2, 3)) / images.var(dim=(1, 2, 3))
    assert detail.quantile(0.2) < 0.1
    assert detail.quantile(0.8) > 0.25


def test_heldout_is_fixed_and_balanced(source):
    split = source.heldout
    assert split.images.shape == (2480, 1, 32, 32)
    assert split.labels.bincount().tolist() == [8 * len(HELDOUT_FONTS)] * 62
    torch.manual_seed(7)
    again = Glyphs(["DejaVuSans"]).heldout
    assert torch.equal(split.images, again.images)
    assert torch.equal(split.labels, again.labels)


@pytest.mark.parametrize("font", ["Comic Sans", "cmsy10"])
def test_unusable_font(font):
    with pytest.raises(ValueError, match=f"font '{font}' is not usable .*DejaVuSans"):
        Glyphs([font])


def test_no_fonts():
    with pytest.raises(ValueError, match="at least one font"):
        Glyphs([])


@pytest.mark.parametrize(
    ("n", "generator", "error", "message"),
    [
        (0, seeded(0), ValueError, "n must be at least 1, got 0"),
        (1.5, seeded(0), TypeError, "n must be an int, got float"),
        (True, seeded(0), TypeError, "n must be an int, got bool"),
        (4, 0, TypeError, "generator must be a torch.Generator, got int"),
    ],
)
def test_bad_batch_arguments(source, n, generator, error, message):
    with pytest.raises(error, match=message):
        source.batch(n, generator)


def test_missing_matplotlib_names_the_extra(monkeypatch):
    glyphs._survey.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install memtl\[demo\]"):
        training_fonts()
