"""score_weights: what a model computes with, its gradients, what is kept, and that it is undone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memtl.functional import magnitude_masks
from memtl.memory import saved_bytes
from memtl.nn import convert, unconvert
from memtl.nn.scored import Scores, score_weights
from memtl.reference.bits import bits_unpack
from memtl.storage import Dense, TopK
from tests.helpers import assert_same, grad_like

EXACT = {"linear": Dense(), "convolution": Dense(), "attention": Dense()}


class Small(nn.Module):
    """Layers of several kinds, one of which is there twice, and a weight of its own."""

    def __init__(self):
        super().__init__()
        self.image = nn.Conv2d(2, 6, 3, bias=False)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.table = nn.Parameter(torch.randn(5, 4))
        self.hidden = nn.Linear(4, 4)
        self.same = nn.Linear(4, 4)
        self.same.weight = self.hidden.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.up(torch.relu(self.image(x))).flatten(2).transpose(1, 2)
        x = x + self.mix(x, x, x, need_weights=False)[0] @ self.table.t() @ self.table
        return self.head(torch.relu(self.same(torch.relu(self.hidden(x)))).mean(1))


PLACES = {
    "image.weight": ("image.weight",),
    "up.weight": ("up.weight",),
    "mix.in_proj_weight": ("mix.in_proj_weight",),
    "mix.out_proj.weight": ("mix.out_proj.weight",),
    "table": ("table",),
    "hidden.weight": ("hidden.weight", "same.weight"),
}


def choose(scores):
    """Half of each."""
    return {name: magnitude_masks([s], s.numel() // 2)[0] for name, s in scores.items()}


def small() -> Small:
    model = Small()
    model.requires_grad_(False).head.requires_grad_(True)
    return model


def holders(model):
    found = {}
    for name, places in PLACES.items():
        split = [place.rpartition(".") for place in places]
        found[name] = tuple((model.get_submodule(inside), key) for inside, _, key in split)
    return found


def score(model) -> Scores:
    generator = torch.Generator().manual_seed(5)
    scores = {
        name: torch.randn(model.get_parameter(name).shape, generator=generator) for name in PLACES
    }
    return score_weights(model, holders(model), scores, choose)


def masks_of(model, made):
    return {
        name: bits_unpack(bits, made.values()[name].numel()).view(made.values()[name].shape)
        for name, bits in choose(made.values()).items()
    }


def plain(model, made) -> Small:
    """A model of parameters, those of ``model`` where they are chosen; all of them train."""
    other = Small()
    state = {n: t for n, t in model.state_dict().items() if "memtl" not in n}
    for name, mask in masks_of(model, made).items():
        for place in PLACES[name]:
            state[place] = state[place].masked_fill(~mask, 0)
    other.load_state_dict(state)
    return other


def images():
    return torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(6), requires_grad=True)


def results(model, x):
    """Output and gradients of the input and of whatever trains, by name."""
    out = model(x)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(out, [x, *named.values()], grad_like(out))
    return [out.detach(), grads[0]], dict(zip(named, grads[1:], strict=True))


def parameter_of(made, name):
    module, key = made.holders[name][0]
    return getattr(module, f"memtl_{key}_scores")


def assert_as_plain(model, made, x, cast=False):
    stock = plain(model, made)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        ours, grads = results(model, x)
        theirs, expected = results(stock, x)
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)
    assert grads.keys() == {"head.weight", "head.bias"} | {
        f"{inside}{'.' if inside else ''}memtl_{key}_scores"
        for inside, _, key in (name.rpartition(".") for name in PLACES)
    }
    for name, grad in grads.items():
        if "memtl" not in name:
            assert_same(grad, expected[name])
    frozen = dict(model.named_parameters())
    for name, scores in made.values().items():
        inside, _, key = name.rpartition(".")
        grad = grads[f"{inside}{'.' if inside else ''}memtl_{key}_scores"]
        slope = frozen[name] * torch.where(scores < 0, -1.0, 1.0)
        wanted = expected[name] * slope
        if cast and len(PLACES[name]) > 1:  # stock sums the two gradients in bfloat16
            torch.testing.assert_close(grad, wanted, rtol=0.02, atol=0.02)
        else:
            torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cast", [False, True])
def test_a_scored_model_is_that_of_the_chosen_weights(cast):
    model, x = small(), images()
    made = score(model)
    assert_as_plain(model, made, x, cast)
    with torch.no_grad():
        for name in PLACES:
            parameter_of(made, name).neg_().add_(0.1)  # others are chosen now
        assert_as_plain_without_gradients(model, made, x)
    assert_as_plain(model, made, x, cast)


def assert_as_plain_without_gradients(model, made, x):
    model.eval()  # attention and its fast path
    assert_same(model(x), plain(model, made).eval()(x))
    model.train()


@pytest.mark.parametrize("first", [True, False])
def test_conversion_before_and_after(first):
    model, x = small(), images()
    if first:
        convert(model, EXACT)
    made = score(model)
    if not first:
        convert(model, EXACT)
    assert_as_plain(model, made, x)
    made.remove()
    assert unconvert(model) > 0
    assert [type(m) for m in model.modules()] == [type(m) for m in Small().modules()]


def test_conversion_decides_what_is_kept_of_the_input():
    layer, x = nn.Linear(512, 8).requires_grad_(False), torch.randn(16, 512)
    made = score_weights(
        layer, {"w": [(layer, "weight")]}, {"w": layer.weight.detach().clone()}, choose
    )
    assert saved_bytes(layer, x) == x.nbytes  # weight, scores and bits are the layer's own
    convert(layer, {"linear": TopK(0.1)})
    assert saved_bytes(layer, x) == TopK(0.1).nbytes(x.shape, x.dtype)
    made.remove()


def test_nothing_is_kept_of_the_weights():
    model, x = small(), images()
    made = score(model)
    for name in ("image", "up", "hidden"):
        layer = model.get_submodule(name)
        x = torch.randn({"image": (2, 2, 5, 5), "up": (2, 6, 3, 3), "hidden": (7, 4)}[name])
        x.requires_grad_()
        assert saved_bytes(layer, x) == x.nbytes
        made.renew()
        parameter_of(made, f"{name}.weight").requires_grad_(False)
        assert saved_bytes(layer, x) == 0


def test_scores_choose_before_a_forward_of_the_model_alone():
    model, x = small(), images()
    made = score(model)
    first = model.image.weight.detach()
    with torch.no_grad():
        parameter_of(made, "image.weight").neg_().add_(0.5)
    assert not made.chose
    assert_same(model.image.weight.detach(), first)
    one = model(x)
    assert made.chose and not torch.equal(model.image.weight, first)
    two = model(2 * x)  # the masks of the first graph are as they were
    (one.sum() + two.sum()).backward()
    assert parameter_of(made, "image.weight").grad.abs().sum() > 0


def test_two_backward_passes_accumulate():
    model, x = small(), images()
    made = score(model)
    _, once = results(model, x)
    for _ in range(2):
        out = model(x)
        out.backward(grad_like(out))
    named = dict(model.named_parameters())
    for name, grad in once.items():
        assert_same(named[name].grad, 2 * grad)
    assert made.chose


def test_checkpointed_and_compiled():
    model, x = small(), images()
    score(model)
    ours, grads = results(model, x)
    again, checkpointed = results_of(lambda x: checkpoint(model, x, use_reentrant=False), model, x)
    torch._dynamo.reset()
    traced, compiled = results_of(torch.compile(model, backend="aot_eager"), model, x)
    for a, b, c in zip(ours, again, traced, strict=True):
        assert_same(b, a)
        torch.testing.assert_close(c, a, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        assert_same(checkpointed[name], grad)
        torch.testing.assert_close(compiled[name], grad, rtol=1e-4, atol=1e-5)


def results_of(function, model, x):
    out = function(x)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(out, [x, *named.values()], grad_like(out))
    return [out.detach(), grads[0]], dict(zip(named, grads[1:], strict=True))


def test_compiled_scores_choose_at_every_step():
    model, x = small(), images()
    made = score(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        out = compiled(x)
        torch.testing.assert_close(out, plain(model, made)(x), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for name in PLACES:
                parameter_of(made, name).neg_().add_(0.3)


def test_copies_and_pickles_have_scores_of_their_own():
    model, x = small(), images()
    made = score(model)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(other(x), expected)
        with torch.no_grad():
            other.image.memtl_weight_scores.neg_().add_(0.5)
        assert not torch.equal(other(x), expected)
    assert_same(model(x), expected)
    made.remove()


def test_dtypes():
    model, x = small(), images()
    made = score(model)
    model.double()
    assert made.values()["table"].dtype == torch.float64
    assert model(x.double()).dtype == model.image.weight.dtype == torch.float64


def test_all_of_it_is_undone():
    model, stock = small(), small()
    stock.load_state_dict(model.state_dict())
    before = dict(model.named_parameters())
    made = score(model)
    assert len(list(model.named_parameters())) == len(before) + len(PLACES)
    assert model.hidden.memtl_weight_scores is model.same.memtl_weight_scores
    assert not any("bits" in name for name in model.state_dict())
    assert model.hidden._parameters["weight"] is before["hidden.weight"]
    model(images()).sum().backward()
    made.remove()
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[n] is before[n] for n in before)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert list(dict(model.named_buffers())) == list(dict(stock.named_buffers()))
    for ours, theirs in zip(model.modules(), stock.modules(), strict=True):
        assert type(ours) is type(theirs) and ours.__dict__.keys() == theirs.__dict__.keys()
        assert not ours._forward_pre_hooks and not ours._non_persistent_buffers_set
    for name, tensor in stock.state_dict().items():
        assert_same(model.state_dict()[name], tensor)
    assert not hasattr(model, "memtl_scored")


def test_nothing_is_changed_where_nothing_can_be_chosen():
    model = small()

    def fails(scores):
        raise RuntimeError("no choice")

    names, hidden = [n for n, _ in model.named_parameters()], dict(model.hidden.__dict__)
    scores = {name: torch.randn(model.get_parameter(name).shape) for name in PLACES}
    with pytest.raises(RuntimeError, match="no choice"):
        score_weights(model, holders(model), scores, fails)
    assert [n for n, _ in model.named_parameters()] == names
    assert type(model.hidden) is nn.Linear and model.hidden.__dict__ == hidden
    assert not model._forward_pre_hooks
