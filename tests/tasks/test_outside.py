"""Letters and noise: what is in them, what is not, always the same."""

import pytest
import torch

from memtl import assets
from memtl.tasks import Split, glyphs, letters, load_digits, noise
from memtl.tasks.digits import MEAN, STD, normalise
from memtl.tasks.glyphs import CLASSES, HELDOUT_FONTS, training_fonts
from memtl.tasks.outside import LETTERS, LOOKALIKES
from memtl.training import evaluate, quality


def test_letters_without_those_that_look_like_digits():
    split = letters(copies=2)
    assert split.images.shape == (2 * len(HELDOUT_FONTS) * len(LETTERS), 1, 32, 32)
    assert split.images.dtype == torch.float32 and split.labels.dtype == torch.int64
    found = [CLASSES[label] for label in split.labels.unique()]
    assert found == [*LETTERS] and not {*LETTERS} & {*LOOKALIKES}
    assert {*LETTERS, *LOOKALIKES} == {c for c in CLASSES if c.isalpha()}
    assert {*"OoIlZzSsBgq"} <= {*LOOKALIKES}
    assert split.labels.bincount()[split.labels.unique()].unique() == 2 * len(HELDOUT_FONTS)


def test_labels_match_what_is_drawn(monkeypatch):
    monkeypatch.setattr(glyphs, "augment", lambda ink, generator: ink[..., ::2, ::2])
    fonts = ("cmss10", "STIXGeneral")
    split = letters(fonts, copies=3, normalised=False)
    drawn = torch.stack([glyphs.render(font) for font in fonts])[..., ::2, ::2].float() / 255
    expected = [drawn[i, label] for _ in range(3) for i in range(2) for label in split.labels[:35]]
    assert torch.equal(split.images[:, 0], torch.stack(expected))


def test_letters_are_those_of_the_seed():
    first = letters("cmss10", copies=1, normalised=False)
    assert 0 <= first.images.min() and first.images.max() <= 1
    torch.manual_seed(9)
    assert torch.equal(letters("cmss10", copies=1, normalised=False).images, first.images)
    other = letters("cmss10", copies=1, seed=1, normalised=False)
    assert not torch.equal(other.images, first.images)
    assert torch.equal(letters(["cmss10"], copies=1).images, normalise(first.images))


def test_letters_of_another_size_and_a_font_that_was_seen():
    small = letters(training_fonts()[:1], copies=1, size=9, normalised=False)
    assert small.images.shape == (len(LETTERS), 1, 9, 9)
    assert 0 <= small.images.min() and small.images.max() <= 1
    large = letters(training_fonts()[:1], copies=1, normalised=False)
    ink = [split.images.mean((1, 2, 3)) for split in (small, large)]
    torch.testing.assert_close(*ink, atol=0.02, rtol=0.1)


def test_uniform_noise():
    split = noise(30, shape=(3, 20, 17), normalised=False)
    assert split.images.shape == (30, 3, 20, 17) and (split.labels == -1).all()
    x = split.images.double()
    assert 0 <= x.min() and x.max() <= 1
    bound = 5 / x.numel() ** 0.5  # five deviations of a mean, of what is spread by less than 1
    assert abs(x.mean() - 1 / 2) < bound and abs(x.square().mean() - 1 / 3) < bound
    # Pixels have nothing in common.
    assert abs((x[..., 1:] * x[..., :-1]).mean() - 1 / 4) < bound


def test_normal_noise():
    x = noise(40, "normal", normalised=False).images
    assert x.min() == 0 and x.max() == 1
    wanted = torch.distributions.Normal(MEAN, STD)
    below = (x < 0.5).double().mean()
    assert abs(below - wanted.cdf(torch.tensor(0.5))) < 5 / x.numel() ** 0.5
    assert abs((x == 0).double().mean() - wanted.cdf(torch.tensor(0.0))) < 5 / x.numel() ** 0.5


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_noise_is_that_of_the_seed(kind):
    first = noise(4, kind, normalised=False)
    torch.manual_seed(5)
    assert torch.equal(noise(4, kind, normalised=False).images, first.images)
    assert not torch.equal(noise(4, kind, seed=1, normalised=False).images, first.images)
    assert torch.equal(noise(4, kind).images, normalise(first.images))


def test_a_classifier_of_digits_is_asked():
    digits = load_digits().test
    digits = Split(digits.images[:64], digits.labels[:64])
    model = assets.load("cnn_glyphs").eval()  # of 62 classes: digits are the first ten
    model = torch.nn.Sequential(model, Digits())
    outside = {"letters": letters(copies=1), "noise": noise(32)}
    found = quality(model, digits, outside)
    assert found.accuracy > 0.7
    assert all(0.6 < auc <= 1 for auc in found.ood_auc.values()), found
    for split in outside.values():
        with pytest.raises(ValueError, match="labels must be in 0 .. 9"):
            evaluate(model, split)


class Digits(torch.nn.Module):
    def forward(self, logits):
        return logits[:, :10]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: letters([]), ValueError, "at least one font, got none"),
        (lambda: letters("Comic Sans"), ValueError, "font 'Comic Sans' is not usable"),
        (lambda: letters(size=0), ValueError, "size must be at least 1, got 0"),
        (lambda: letters(copies=1.0), TypeError, "copies must be an int, got float"),
        (lambda: letters(seed="a"), TypeError, "seed must be an int, got str"),
        (lambda: noise(0), ValueError, "n must be at least 1, got 0"),
        (lambda: noise(True), TypeError, "n must be an int, got bool"),
        (lambda: noise(1, "pink"), ValueError, "kind must be one of uniform, normal, got 'pink'"),
        (lambda: noise(1, shape=(8, 8)), ValueError, r"\(channels, height, width\), got \(8, 8\)"),
        (lambda: noise(1, shape=(1, 0, 8)), ValueError, "height must be at least 1, got 0"),
        (lambda: noise(1, shape=(1, 8, 8.0)), TypeError, "width must be an int, got float"),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
