"""Copies, files, and what takes a model apart: export, functional_call, vmap."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import memtl
from memtl.memory import saved_bytes
from tests.works.matrix import (
    CLASSES,
    COLUMNS,
    LOSSY,
    build,
    on,
    train,
    trained,
)

PACKED = ("fast", "small", "low-bit")


def through_a_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def by_cloudpickle(model):
    return pickle.loads(pytest.importorskip("cloudpickle").dumps(model))


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_a_file,
    "cloudpickle": by_cloudpickle,
}


@pytest.mark.parametrize("way", WAYS)
@on(*COLUMNS)
def test_copies(column, way):
    case = build(column)
    model = case.ours
    twin = WAYS[way](model)
    assert saved_bytes(twin, case.x) == saved_bytes(model, case.x)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    first = train(case, twin, steps=3)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    if "running_mean" in str(before.keys()):
        model.load_state_dict(before)
    assert train(case, model, steps=3) == first


@on(*COLUMNS)
def test_export(column):
    case = build(column)
    model = case.ours.eval()
    expected = model(case.x)
    program = torch.export.export(model, (case.x,))
    torch.testing.assert_close(program.module()(case.x), expected)
    if column in (*LOSSY, "frozen"):  # and nothing is left of the conversion
        memtl.unconvert(model)
        program = torch.export.export(model, (case.x,))
        assert "memtl" not in str(program.graph)
        torch.testing.assert_close(program.module()(case.x), expected)


@on(*COLUMNS)
def test_trace(column):
    """Without gradients: torch.jit knows of no autograd.Function."""
    case = build(column)
    model = case.ours.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that become constants
        expected = model(case.x)
        program = torch.jit.trace(model, (case.x,))
        torch.testing.assert_close(program(case.x), expected)


@on(*COLUMNS)
def test_functional_call(column):
    case = build(column)
    model = case.ours.eval()
    other = {n: p.detach() + 0.1 * torch.randn_like(p) for n, p in model.named_parameters()}
    leaves = {n: t.requires_grad_(n in trained(model)) for n, t in other.items()}
    loss = case.loss(lambda x: torch.func.functional_call(model, leaves, (x,)))
    wanted = [t for t in leaves.values() if t.requires_grad]
    found = torch.autograd.grad(loss, wanted)
    model.load_state_dict(leaves, strict=False)
    expected = torch.autograd.grad(case.loss(model), list(trained(model).values()))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@on(*COLUMNS)
def test_gradients_by_torch_func(column):
    """Nothing is shared here either; what is rebuilt elsewhere is kept by itself."""
    case = build(column)
    model = case.ours.eval()
    params = {n: p.detach() for n, p in trained(model).items()}

    def loss(params):
        return case.loss(lambda x: torch.func.functional_call(model, params, (x,)))

    found = torch.func.grad(loss)(params)
    # Under torch.func a block is not run again: it keeps what its layers keep, here all.
    same = case.stock.eval() if column == "checkpoint" else model
    with torch.autograd.graph.save_on_cpu():  # nor here
        expected = torch.autograd.grad(case.loss(same), list(trained(same).values()))
    for a, b in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(a, b)


@on(*COLUMNS)
def test_an_ensemble_by_vmap(column):
    """Without gradients; with them see below."""
    models = [build(column).ours.eval() for _ in range(2)]
    x = build(column).x
    stacked = torch.func.stack_module_state(models)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators that torch runs one by one
        found = torch.func.vmap(lambda *state: torch.func.functional_call(models[0], state, (x,)))(
            *stacked
        )
        for model, out in zip(models, found, strict=True):
            torch.testing.assert_close(out, model(x), rtol=1e-3, atol=1e-4)


@on(*COLUMNS)
def test_gradients_of_each_sample_by_vmap(column):
    case = build(column)
    model = case.ours.eval()
    params = {n: p.detach() for n, p in trained(model).items()}

    def loss(params, x, label):
        out = torch.func.functional_call(model, params, (x[None],))
        return nn.functional.cross_entropy(out, label[None])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if column == "checkpoint":  # its layers are stock's, and nothing else is kept inside
            torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, case.x, case.labels)
            return
        with pytest.raises(RuntimeError, match=r"memtl: .*vmap .*memtl\.unconvert\(model\) first"):
            torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, case.x, case.labels)


@on(*COLUMNS)
def test_several_gradients_at_once(column):
    """The rows of a Jacobian: computed, where what is kept is exact, else refused by name."""
    case = build(column)
    model = case.ours.eval()
    wanted = list(trained(model).values())
    out = model(case.x).sum(0)
    rows = torch.eye(CLASSES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if column in PACKED:
            with pytest.raises(RuntimeError, match=r"memtl: .* several at a time .*unconvert"):
                torch.autograd.grad(out, wanted, rows, retain_graph=True, is_grads_batched=True)
            return
        found = torch.autograd.grad(out, wanted, rows, retain_graph=True, is_grads_batched=True)
    for i in range(CLASSES):
        expected = torch.autograd.grad(out, wanted, rows[i], retain_graph=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-3, atol=1e-4)
