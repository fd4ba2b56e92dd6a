"""Adversarial examples: where they are, what they cost, and that the model is as it was."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memtl.memory import SavedTensors
from memtl.tasks import Split
from memtl.training import Adversarial, Attack, robust_accuracy
from memtl.training.attacks import fgsm, pgd, random_in_ball, trades_loss
from tests.helpers import assert_same, assert_within
from tests.training.small import CLASSES, images, network

NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
RADIUS = {"linf": 0.1, "l2": 0.7}


def norm_of(change: torch.Tensor, norm: str) -> torch.Tensor:
    """Of each sample, in float64."""
    return change.double().flatten(1).norm(dim=1, p=math.inf if norm == "linf" else 2)


def mean_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return F.cross_entropy(model.eval()(x), y).item()


def by_definition(model: nn.Module, x, y, attack: Attack) -> torch.Tensor:
    """Projected gradient ascent from the images, image by image, in float64."""
    found = []
    for image, label in zip(x, y, strict=True):
        now = image
        for _ in range(attack.steps):
            now = now.detach().requires_grad_()
            F.cross_entropy(model(now[None]), label[None]).backward()
            g = now.grad
            if attack.norm == "linf":
                change = now.detach() + attack.step * torch.sign(g) - image
                change = change.clip(-attack.eps, attack.eps)
            else:
                change = now.detach() + attack.step * g / g.pow(2).sum().sqrt() - image
                length = change.pow(2).sum().sqrt()
                change = change * attack.eps / length if length > attack.eps else change
            now = (image + change).clip(0, 1)
        found.append(now)
    return torch.stack(found)


@NORMS
@pytest.mark.parametrize("steps", [1, 4])
def test_is_the_definition(norm, steps):
    model, (x, y) = network().double(), images(dtype=torch.float64)
    attack = Attack(RADIUS[norm], steps, norm=norm, random_start=False)
    assert attack.step == RADIUS[norm] * (1.25 if steps == 1 else 2.5 / steps)
    found = attack(model, x, y)
    assert_within(found, by_definition(model.eval(), x, y, attack), 1e-12)
    same = pgd(model, x, y, RADIUS[norm], steps=steps, norm=norm, random_start=False)
    assert_same(same, found)


def test_fgsm_is_one_step():
    model, (x, y) = network().double().eval(), images(dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    F.cross_entropy(model(leaf), y).backward()
    found = fgsm(model, x, y, 0.05, random_start=False)
    assert_within(found, (x + 0.05 * leaf.grad.sign()).clamp(0, 1), 1e-15)
    generator = torch.Generator().manual_seed(3)
    found = fgsm(model, x, y, 0.05, generator=generator)
    assert_same(found, Attack(0.05, 1)(model, x, y, generator=generator.manual_seed(3)))


@NORMS
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_stays_in_the_ball_and_in_the_image(norm, random_start, dtype):
    model = network().to(dtype)
    for n in (1, 5):
        x, y = images(n, dtype)
        for steps in (1, 3):
            attack = Attack(RADIUS[norm], steps, norm=norm, random_start=random_start)
            found = attack(model, x, y)
            assert found.dtype == dtype and found.shape == x.shape and not found.requires_grad
            assert found.min() >= 0 and found.max() <= 1
            change = norm_of(found.double() - x.double(), norm)
            # Half a unit at 1 for each number, and some for the arithmetic.
            rounding = torch.finfo(dtype).eps * (1 if norm == "linf" else math.sqrt(x[0].numel()))
            assert (change <= attack.eps + rounding + 1e-6 * (dtype != torch.float64)).all()
            assert (change > 0.5 * attack.eps).all()  # and uses it


@NORMS
def test_starts_everywhere_in_the_ball(norm):
    x = torch.full((4000, 1, 1, 2), 0.5, dtype=torch.float64)
    attack = Attack(0.2, norm=norm)
    found = random_in_ball(x, attack, torch.Generator().manual_seed(0))
    part = norm_of(found - x, norm) / attack.eps
    assert part.max() <= 1 + 1e-12
    # The share within half the radius is a quarter in two dimensions, a square or a disc; of 4000
    # the deviation is 0.007.
    assert abs((part < 0.5).double().mean().item() - 0.25) < 0.03
    assert (found - x).flatten(1).mean(0).abs().max() < 0.01


@NORMS
def test_the_loss_rises_with_the_steps(norm):
    model, (x, y) = network(), images(32)
    start = random_in_ball(x, Attack(RADIUS[norm], norm=norm))
    losses = [mean_loss(model, x, y)]
    for steps in (1, 3, 20):
        attack = Attack(RADIUS[norm], steps, RADIUS[norm] / 8, norm)
        losses.append(mean_loss(model, attack(model, x, y, start=start), y))
    assert all(before < after for before, after in itertools.pairwise(losses))


def test_a_generator_decides_the_start():
    model, (x, y) = network(), images()
    first, again, other = (
        pgd(model, x, y, 0.1, steps=2, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert_same(again, first)
    assert not torch.equal(other, first)
    before = torch.get_rng_state()
    pgd(model, x, y, 0.1, steps=2, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_step_in_l2_does_not_depend_on_the_gradients_size(scale):
    model, (x, y) = network(), images()

    def scaled(by):
        return lambda logits, labels: by * F.cross_entropy(logits, labels, reduction="sum")

    options = {"steps": 2, "norm": "l2", "random_start": False}
    found = pgd(model, x, y, 0.7, loss=scaled(scale), **options)
    assert_within(found, pgd(model, x, y, 0.7, loss=scaled(1), **options), 1e-5)


@NORMS
def test_where_the_gradient_is_zero_nothing_moves(norm):
    model, (x, y) = network(), images()
    found = Attack(0.1, 3, norm=norm, random_start=False)(
        model, x, y, loss=lambda logits, labels: 0 * logits.sum()
    )
    assert_same(found, x)


def test_dense_predictions():
    model = nn.Conv2d(2, CLASSES, 3, padding=1).double()
    x, _ = images(dtype=torch.float64)
    y = torch.randint(CLASSES, (len(x), *x.shape[2:]))
    attack = Attack(0.05, 2, random_start=False)
    assert_within(attack(model, x, y), by_definition(model, x, y, attack), 1e-12)
    losses = trades_loss(model, x, y, 0.05, steps=1)
    assert losses.isfinite() and losses > F.cross_entropy(model(x), y)
    with pytest.raises(
        ValueError, match=r"one class for each image, \[6\], got labels \[6, 5, 7\]"
    ):
        pgd(model, x, y, 0.05, early_stop=True)


def test_early_stop_leaves_what_is_misclassified():
    model, (x, y) = network().double(), images(40, torch.float64)
    with torch.no_grad():
        guess = model.eval()(x).argmax(1)
    y = torch.where(torch.arange(40) < 10, (guess + 1) % CLASSES, guess)
    attack = Attack(0.05, 8, random_start=False)
    found, plain = attack(model, x, y, early_stop=True), attack(model, x, y)
    assert_same(found[:10], x[:10])
    with torch.no_grad():
        wrong, at_the_end = model(found).argmax(1) != y, model(plain).argmax(1) != y
    assert wrong[:10].all() and not wrong.all()
    assert (wrong | ~at_the_end).all()  # nothing is lost
    assert_within(found[~wrong], plain[~wrong], 1e-12)


def test_a_loss_of_ones_own():
    model, (x, y) = network().double(), images(dtype=torch.float64)

    def margin(logits, labels):  # of Carlini and Wagner
        return -logits.gather(1, labels[:, None]).sum()

    leaf = x.clone().requires_grad_()
    margin(model.eval()(leaf), y).backward()
    found = pgd(model, x, y, 0.02, 0.02, 1, random_start=False, loss=margin, early_stop=False)
    assert_within(found, (x + 0.02 * leaf.grad.sign()).clamp(0, 1), 1e-15)


def test_a_loss_of_ones_own_may_take_no_labels():
    model, (x, _) = network(), images()
    found = pgd(
        model, x, None, 0.1, 0.1, 1, random_start=False, loss=lambda logits, _: logits.sum()
    )
    assert 0 < (found - x).abs().max() <= 0.1 + 1e-6


def test_what_is_misclassified_already_is_copied():
    model, (x, _) = network(), images()
    with torch.no_grad():
        wrong = (model.eval()(x).argmax(1) + 1) % CLASSES
    before = x.clone()
    found = Attack(0.1, 2, random_start=False)(model, x, wrong, early_stop=True)
    assert_same(found, x)
    found.zero_()
    assert_same(x, before)


class Merges(nn.Linear):
    """Evaluates with a product merged into the weight, and takes it out again, as LoRA may."""

    def train(self, mode=True):
        if mode != self.training:
            with torch.no_grad():
                self.weight.mul_(0.5 if mode else 2.0)
        return super().train(mode)


def test_what_evaluation_merges_is_taken_out_again():
    model, (x, y) = nn.Sequential(nn.Flatten(), Merges(70, CLASSES), nn.Dropout()), images()
    model[2].eval()
    before = model[1].weight.clone()
    pgd(model, x, y, 0.1, steps=1)
    assert_same(model[1].weight.detach(), before.detach())
    assert [m.training for m in model] == [True, True, False]


def test_trades_is_written_out():
    model, (x, y) = network().double(), images(dtype=torch.float64)
    model[4].p = 0.0  # two passes of a dropout differ
    ours = copy.deepcopy(model)  # training counts in the running statistics
    torch.manual_seed(4)
    loss = trades_loss(ours, x, y, 0.1, 0.04, 3, beta=2.5, label_smoothing=0.1)

    torch.manual_seed(4)
    target = model.eval()(x).softmax(1).detach()
    moved = (x + 0.001 * torch.randn_like(x)).clamp(0, 1)
    for _ in range(3):
        moved = moved.detach().requires_grad_()
        logp = model(moved).log_softmax(1)
        (target * (target.log() - logp)).sum().backward()
        moved = moved.detach() + 0.04 * moved.grad.sign()
        moved = torch.maximum(torch.minimum(moved, x + 0.1), x - 0.1).clamp(0, 1)
    model.train()
    p, logq = model(x).softmax(1), model(moved).log_softmax(1)
    smooth = 0.9 * F.one_hot(y, CLASSES).double() + 0.1 / CLASSES
    expected = -(smooth * p.log()).sum(1).mean() + 2.5 * (p * (p.log() - logq)).sum(1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    found = torch.autograd.grad(loss, list(ours.parameters()))
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_works_without_gradients_around(around):
    model, (x, y) = network(), images()
    attack = Attack(0.1, 2, random_start=False)
    expected = attack(model, x, y)
    with around():
        found = attack(model, x * 1, y * 1)
    assert_same(found, expected)
    assert not found.is_inference() and not torch.is_inference_mode_enabled()


def test_images_that_require_a_gradient_get_none():
    model, (x, y) = network(), images()
    found = pgd(model, x.requires_grad_(), y, 0.1, steps=2)
    assert x.grad is None and not found.requires_grad


def test_layouts_do_not_matter():
    model, (x, y) = network().double(), images(dtype=torch.float64)
    attack = Attack(0.7, 2, norm="l2", random_start=False)
    expected = attack(model, x, y)
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    for other in (strided, x.contiguous(memory_format=torch.channels_last)):
        assert_within(attack(model, other, y), expected, 1e-12)
    assert attack(model, x[:0], y[:0]).shape == x[:0].shape


def test_under_autocast_images_are_float32():
    model, (x, y) = network(), images()
    with torch.autocast("cpu", torch.bfloat16):
        found = pgd(model, x, y, 0.1, steps=2)
    assert found.dtype == torch.float32
    assert (found - x).abs().max() <= 0.1 + 1e-6
    assert mean_loss(model, found, y) > mean_loss(model, x, y)


def test_compiled_models():
    model, (x, y) = network(), images()
    attack = Attack(0.1, 2, random_start=False)
    expected = attack(model, x, y)
    compiled = torch.compile(model, backend="eager")
    assert_same(attack(compiled, x, y), expected)
    assert model.training and all(p.requires_grad for p in model.parameters())


class Raises(nn.Module):
    """At its second call."""

    def __init__(self):
        super().__init__()
        self.model, self.calls = network(), 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("the second call")
        return self.model(x)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(fails):
    model, (x, y) = Raises() if fails else network(), images()
    list(model.modules())[-1].eval()
    frozen = list(model.parameters())[1].requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p is not frozen else None
    before = [
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        {k: v.clone() for k, v in model.state_dict().items()},
    ]
    if fails:
        with pytest.raises(RuntimeError, match="the second call"):
            pgd(model, x, y, 0.1, steps=3)
    else:
        pgd(model, x, y, 0.1, steps=3)
    assert [m.training for m in model.modules()] == before[0]
    assert [p.requires_grad for p in model.parameters()] == before[1]
    for p, grad in zip(model.parameters(), before[2], strict=True):
        assert (p.grad is None) if grad is None else torch.equal(p.grad, grad)
    assert all(torch.equal(v, before[3][k]) for k, v in model.state_dict().items())


def test_the_current_mode_counts_the_examples():
    model, (x, y) = network(), images()
    counted = model[1].num_batches_tracked.item()
    pgd(model, x, y, 0.1, steps=3, mode="current")
    assert model[1].num_batches_tracked == counted + 3
    with pytest.raises(ValueError, match='early_stop needs mode "eval"'):
        pgd(model, x, y, 0.1, mode="current", early_stop=True)


def test_nothing_is_kept_for_parameters():
    model, (x, y) = network(), images()
    with SavedTensors(model) as attacking:
        pgd(model, x, y, 0.1, steps=1)
    model.eval().requires_grad_(False)
    with SavedTensors(model) as frozen:
        F.cross_entropy(model(x.clone().requires_grad_()), y, reduction="sum")
    assert attacking.bytes == frozen.bytes > 0


class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = network()

    def forward(self, x):
        return self.model((x * 8).round().detach() / 8)


def test_refuses():
    model, (x, y) = network(), images()
    for bad, error, said in (
        (x.long(), TypeError, "floating-point tensor in .0, 1., got torch.int64"),
        (x.tolist(), TypeError, "in .0, 1., got list"),
        (x[0, 0, 0], ValueError, r"images must be \[n, ...\], got \[7\]"),
        (x * 2 - 0.5, ValueError, "are they normalised already"),
        (x + math.nan, ValueError, r"must be in \[0, 1\], got nan"),
    ):
        with pytest.raises(error, match=said):
            pgd(model, bad, y, 0.1, generator=torch.Generator())
    for bad, error, said in (
        (y.float(), TypeError, "labels must be int64, got torch.float32"),
        (y.tolist(), TypeError, "labels must be an int64 tensor, got list"),
        (y[:3], ValueError, r"need labels \[6\], got labels \[3\]"),
        (y + CLASSES, ValueError, r"labels must be in 0 .. 4"),
    ):
        for early_stop in (False, True):
            if early_stop and error is ValueError:
                continue
            with pytest.raises(error, match=said):
                pgd(model, x, bad, 0.1, early_stop=early_stop)
    with pytest.raises(ValueError, match="one class for each image"):
        pgd(model, x, y[:3], 0.1, early_stop=True)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got method"):
        pgd(model.forward, x, y, 0.1)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got method"):
        trades_loss(model.forward, x, y, 0.1)
    with pytest.raises(TypeError, match="a tensor of logits, got tuple"):
        pgd(nn.LSTM(7, 3), x[:, 0], y, 0.1)
    with pytest.raises(ValueError, match="generator must be on the device of the images, meta"):
        pgd(model, x.to("meta"), y, 0.1, generator=torch.Generator())
    with pytest.raises(ValueError, match="no gradient reaches the images"):
        pgd(Cut(), x, y, 0.1)
    with torch.no_grad():
        model[5].weight[0] = math.inf
    with pytest.raises(FloatingPointError, match="gradient of an image is not finite"):
        pgd(model, x, y, 0.1)


def test_refuses_attacks_and_weights_outside_their_range():
    for options, error, said in (
        ({"eps": 8}, ValueError, "pixel units of .0, 1., got 8: of 256 levels 8 are 8/255"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"eps": math.nan}, ValueError, "eps must be positive and finite"),
        ({"eps": "8/255"}, TypeError, "eps must be a number"),
        ({"eps": True}, TypeError, "eps must be a number"),
        ({"eps": 0.1, "step_size": 2}, ValueError, "step_size must be in pixel units of .0, 1."),
        ({"eps": 0.1, "steps": 0}, ValueError, "steps must be at least 1"),
        ({"eps": 0.1, "steps": 2.0}, TypeError, "steps must be an int"),
        ({"eps": 0.1, "step_size": -1.0}, ValueError, "step_size must be positive"),
        ({"eps": 0.1, "norm": "l1"}, ValueError, "norm must be one of"),
        ({"eps": 0.1, "mode": "train"}, ValueError, "mode must be one of"),
    ):
        with pytest.raises(error, match=said):
            Attack(**options)
    model, (x, y) = network(), images()
    with pytest.raises(ValueError, match="L2 distance is at most 8.367"):  # the root of 70
        pgd(model, x, y, 9, norm="l2")
    for beta, error in ((-1.0, ValueError), (math.nan, ValueError), ("6", TypeError)):
        with pytest.raises(error, match="beta must be"):
            trades_loss(model, x, y, 0.1, beta=beta)


def test_is_named():
    assert str(Attack(0.1, 20)) == "PGD-20, L-inf 0.1"
    assert str(Attack(0.5, 1, norm="l2")) == "FGSM, L2 0.5"


def test_data_parallel_models(tmp_path):
    """Examples are made, and robustness is measured, by each process on its own."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model, (x, y) = network(), images()
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        calls = []
        parallel.register_forward_hook(lambda *_: calls.append(1))
        attack = Attack(0.1, 3, random_start=False)
        assert_same(attack(parallel, x, y), attack(model, x, y))
        split = Split(x, y)
        assert robust_accuracy(parallel, split, attack) == robust_accuracy(model, split, attack)
        assert not calls
        for trained in (parallel, model):
            torch.manual_seed(7)  # of dropout
            Adversarial(attack)(trained, x, y).backward()
        assert len(calls) == 1
        for theirs, ours in zip(parallel.parameters(), model.parameters(), strict=True):
            assert_same(theirs.grad, ours.grad)
    finally:
        torch.distributed.destroy_process_group()
