"""What changes the graph itself: checkpointing, offloading, anomaly mode, no gradients at all."""

import copy
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from memtl.memory import saved_bytes
from tests.works.matrix import (
    COLUMNS,
    LOSSY,
    assert_follows,
    build,
    calling,
    on,
    plain_step,
    train,
    trained,
)

REBUILDS = ("small", "low-bit")
"""Where hooks see what is saved, nothing is shared: a rounding more, and other gradients."""

KEEP_LESS = ("rep-net", "checkpoint")
"""Whose blocks keep less than their inputs, which a library's checkpointing keeps."""


def assert_unchanged(case, change=plain_step, twin=None):
    """Trained by the step ``change`` the model of a method ends as its twin does without, to the
    bit."""
    twin = twin or copy.deepcopy(case.ours)
    plain = train(case, twin, steps=5)
    found = train(case, case.ours, change, steps=5)
    if case.column in REBUILDS:
        assert_follows(found, plain, case.column)
        return
    assert found == plain
    for (name, a), b in zip(trained(case.ours).items(), trained(twin).values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("early_stop", [True, False])
@on(*COLUMNS)
def test_checkpointing_of_the_whole_model(column, early_stop):
    case = build(column)

    def call(model, x):
        with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
            return checkpoint(model, x, use_reentrant=False, determinism_check="default")

    assert_unchanged(case, calling(call))


@on(*COLUMNS)
def test_checkpointing_by_timm(column):
    case = build(column)
    twin = copy.deepcopy(case.ours)
    before = saved_bytes(case.ours, case.x)
    case.ours.set_grad_checkpointing()
    if column == "vqt":  # the head reads what a block was given
        with pytest.raises(RuntimeError, match=r"set_grad_checkpointing\(False\)"):
            case.loss(case.ours).backward()
        return
    assert_unchanged(case, twin=twin)
    if column not in KEEP_LESS:
        assert saved_bytes(case.ours, case.x) < before


@pytest.mark.parametrize("reentrant", [True, False])
@on(*LOSSY, "frozen")
def test_checkpointing_by_transformers(column, reentrant):
    case = build(column, "bert")
    twin = copy.deepcopy(case.ours)
    before = saved_bytes(case.ours, case.x)
    inside = case.ours.inside
    inside.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        inside.enable_input_require_grads()
    assert_unchanged(case, twin=twin)
    if column not in KEEP_LESS:
        assert saved_bytes(case.ours, case.x) < before


@on(*COLUMNS)
def test_activations_kept_elsewhere(column):
    case = build(column)

    def call(model, x):
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    assert_unchanged(case, calling(call))


@on(*COLUMNS)
def test_anomaly_mode(column):
    case = build(column)

    def step(case, model, optimizer):
        optimizer.zero_grad()
        with warnings.catch_warnings(), torch.autograd.detect_anomaly():
            warnings.simplefilter("ignore")
            loss = case.loss(model)
            loss.backward()
        optimizer.step()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_unchanged(case, step)


@on(*(column for column in COLUMNS if column != "checkpoint"))
def test_a_second_derivative(column):
    case = build(column)
    loss = case.loss(case.ours)
    grads = torch.autograd.grad(loss, list(trained(case.ours).values()), create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        sum(g.square().sum() for g in grads).backward()


@on(*COLUMNS)
def test_without_gradients(column):
    case = build(column)
    model, x = case.ours.eval(), case.x
    expected = case.stock.eval()(x)
    for without in (torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)):
        with without():
            assert torch.equal(model(x), expected) or not case.exact
            assert saved_bytes(model, x) == 0
    with torch.no_grad(), torch.enable_grad():
        assert saved_bytes(model, x) > 0
    case.ours.train()
    assert train(case, case.ours)  # inference left nothing behind
