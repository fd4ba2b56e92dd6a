import pytest
import torch
from torch import nn

import memtl
from memtl import assets
from memtl.models import Normalized
from memtl.tasks import load_digits
from memtl.tasks.digits import MEAN, STD
from tests.helpers import assert_same, assert_within


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 3])
def test_normalises(dtype, channels):
    mean, std = [0.4, 0.5, 0.3][:channels], [0.2, 0.3, 0.25][:channels]
    x = torch.rand(2, channels, 5, 7).to(dtype)
    y = Normalized(nn.Identity(), mean, std)(x)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))
    expected = (x.double() - mean) / std
    # The mean, the difference and the quotient are rounded, and the deviation in front of it; the
    # buffers are float32.
    unit = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) / 2
    assert y.dtype == dtype
    assert_within(y, expected, unit * (mean / std + 4 * expected.abs()) * 1.1)


def test_takes_ink_where_the_model_took_what_is_normalised():
    ink, normalised = load_digits(normalised=False).test, load_digits().test
    model = assets.load("cnn_glyphs", 10).eval()
    whole = Normalized(model, MEAN, STD)
    with torch.no_grad():
        found, expected = whole(ink.images[:4]), model(normalised.images[:4])
    torch.testing.assert_close(found, expected)
    assert whole.get_classifier() is model.get_classifier()


def test_only_the_model_is_saved_and_buffers_move_along():
    model = nn.Conv2d(2, 3, 3)
    whole = Normalized(model, 0.5, [0.1])
    assert set(whole.state_dict()) == {"model.weight", "model.bias"}
    assert whole.double().mean.dtype == torch.float64
    assert whole.to("meta").std.is_meta


@pytest.mark.parametrize("wrapped", [False, True])
def test_methods_are_applied_to_the_model_or_to_all(wrapped):
    model = assets.load("cnn_glyphs", 10)
    whole = Normalized(model, MEAN, STD)
    x = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        expected = whole.eval()(x)
    memtl.apply(whole if wrapped else model, memtl.BackRazorConfig(keep=0.1))
    assert_same(whole(x).detach(), expected)
    config = memtl.TicketConfig(sparsity=0.5)
    ticket = memtl.draw_ticket(whole if wrapped else model, config)
    prefix = "model." if wrapped else ""
    assert f"{prefix}conv_stem.weight" in ticket.masks
    assert f"{prefix}classifier.weight" not in ticket.masks


def test_there_is_a_classifier_only_where_the_model_has_one():
    assert not hasattr(Normalized(nn.Conv2d(1, 1, 1), 0.5, 0.5), "get_classifier")


def test_refuses():
    model = nn.Conv2d(3, 1, 1)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got function"):
        Normalized(lambda x: x, 0.5, 0.5)
    with pytest.raises(TypeError, match="mean must be a number, or one a channel, got 'half'"):
        Normalized(model, "half", 0.5)
    with pytest.raises(ValueError, match="normalises its input already"):
        Normalized(nn.Sequential(Normalized(model, 0.5, 0.5)), 0.5, 0.5)
    with pytest.raises(ValueError, match="as many channels"):
        Normalized(model, [0.5, 0.5], [0.5])
    with pytest.raises(ValueError, match="as many channels"):
        Normalized(model, [], [])
    for mean, std in ((0.5, 0.0), (0.5, -1.0), (float("nan"), 1.0), (0.5, float("inf"))):
        with pytest.raises(ValueError, match="finite and std positive"):
            Normalized(model, mean, std)
    whole = Normalized(model, [0.5] * 3, [0.5] * 3)
    with pytest.raises(ValueError, match=r"\[n, 3, H, W\], got \[2, 1, 4, 4\]"):
        whole(torch.rand(2, 1, 4, 4))
    with pytest.raises(TypeError, match=r"floating-point dtype in \[0, 1\], got torch.uint8"):
        whole(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\[n, C, H, W\], got \[3, 4, 4\]"):
        Normalized(model, 0.5, 0.5)(torch.rand(3, 4, 4))
