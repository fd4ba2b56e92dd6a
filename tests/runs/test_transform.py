"""From images to tensors: what is cut out, and how images of every kind look."""

import numpy as np
import pytest
import torch
from PIL import Image

from memtl.runs.data.transform import Transform, at_random, middle, to_eight_bits
from memtl.runs.networks import Wants

PLAIN = Wants(size=8, mean=(0.0,) * 3, std=(1.0,) * 3, crop=1.0)


def picture(width=20, height=14, mode="RGB"):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (height, width, len(Image.new(mode, (1, 1)).getbands())))
    return Image.fromarray(pixels.astype(np.uint8).squeeze(), mode=None).convert(mode)


def test_in_evaluation_the_middle_is_resized_and_normalised():
    wants = Wants(size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), crop=0.5)
    image = picture(20, 16)
    pixels = np.array(image.crop((6, 4, 14, 12))) / 255  # 8 x 8: nothing to resize
    expected = torch.from_numpy((pixels - wants.mean) / wants.std).permute(2, 0, 1)
    found = Transform(wants)(image, None)
    torch.testing.assert_close(found, expected.float())
    assert found.shape == (3, 8, 8) and found.is_contiguous()


@pytest.mark.parametrize(("channels", "mode"), [(1, "RGB"), (3, "L"), (1, "1"), (3, "P")])
def test_channels_are_those_of_the_network(channels, mode):
    wants = Wants(channels=channels, size=5, mean=(0.5,) * channels, std=(0.5,) * channels)
    found = Transform(wants)(picture().convert(mode), 3)
    assert found.shape == (channels, 5, 5) and found.dtype == torch.float32


def test_a_seed_says_everything():
    transform, image = Transform(PLAIN), picture(40, 30)
    torch.manual_seed(1)
    first = transform(image, 5)
    torch.manual_seed(2)
    assert torch.equal(first, transform(image, 5))
    found = {transform(image, seed).numpy().tobytes() for seed in range(20)}
    assert len(found) == 20
    transform(image, 2**63 - 1)


def test_mirrored_and_whole():
    image = picture(8, 8)
    always, never = (Transform(PLAIN, min_scale=1.0, flip=flip) for flip in (1.0, 0.0))
    whole = never(image, None)
    boxes = {tuple(at_random(8, 8, 1.0, torch.Generator().manual_seed(s))) for s in range(10)}
    assert boxes == {(0, 0, 8, 8)}  # of all of the area only the square fits
    assert torch.equal(always(image, 0), whole.flip(-1)) and torch.equal(never(image, 0), whole)


def test_boxes_lie_inside():
    generator = torch.Generator().manual_seed(0)
    shares = []
    for width, height in ((1, 1), (1, 90), (90, 1), (37, 23), (224, 224)):
        for _ in range(200):
            left, top, right, bottom = at_random(width, height, 0.08, generator)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            if min(width, height) > 100:
                shares.append((right - left) * (bottom - top) / (width * height))
    assert 0.07 < min(shares) < 0.2 and 0.8 < max(shares) <= 1
    assert middle(10, 3, 0.1) == (4, 1, 5, 2)


def test_sixteen_bits():
    deep = np.array([[0, 256, 65535], [32768, 511, 255]], np.uint16)
    expected = [[0, 1, 255], [128, 1, 0]]
    assert np.array(to_eight_bits(Image.fromarray(deep))).tolist() == expected
    assert np.array(to_eight_bits(Image.fromarray(deep.astype(np.int32)))).tolist() == expected


def test_transparent_is_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    rows = [[[255, 255, 255], [10, 20, 30]]]
    assert np.array(to_eight_bits(image).convert("RGB")).tolist() == rows
    grey = to_eight_bits(image.convert("LA")).convert("L")
    assert grey.getpixel((0, 0)) == 255
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 0
    assert np.array(to_eight_bits(palette).convert("RGB")).tolist() == rows


def test_other_kinds():
    cmyk = Transform(PLAIN)(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), None)
    assert torch.equal(cmyk, torch.ones(3, 8, 8))
    with pytest.raises(ValueError, match=r"floats \(mode F\)"):
        to_eight_bits(Image.new("F", (2, 2)))
    turned = Image.new("L", (4, 2))
    turned.getexif()[0x0112] = 6
    assert to_eight_bits(turned).size == (2, 4)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"min_scale": 0}, ValueError, r"min_scale must be in \(0, 1\], got 0"),
        ({"flip": 1.5}, ValueError, r"flip must be in \[0, 1\], got 1.5"),
        ({"flip": True}, TypeError, "flip must be a number, got True"),
    ],
)
def test_wrong_numbers(options, error, said):
    with pytest.raises(error, match=said):
        Transform(PLAIN, **options)
