"""Each of two processes of test_distributed.py: DistributedDataParallel, half of a batch each."""

from __future__ import annotations

import contextlib
import copy

import accelerate
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import memtl
from memtl.memory import SavedTensors
from tests.frameworks.small import (
    FEW,
    ROUNDING,
    assert_as,
    assert_gradients,
    images,
    lora,
    loss_of,
    one_folder,
    run_checks,
    train,
    vit,
    weights,
)  # fmt: skip
from tests.methods import convnets


def half(t):
    return t.chunk(2)[dist.get_rank()]


def assert_same_in_all(model):
    for name, t in weights(model).items():
        first = t.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, t), name


def trained(model, steps=2, **options):
    """The weights after training it in both processes, and the bytes kept in this one."""
    x, y = images()
    parallel = DistributedDataParallel(model, **options)
    kept = train(parallel, half(x), half(y), steps)
    assert_same_in_all(parallel)
    return weights(parallel), kept


def alone(model):
    """The weights after training it on whole batches in one process."""
    train(model, *images())
    return weights(model)


def converted(config, build=vit):
    model = build()
    memtl.apply(model, config)
    return model


def checkpointed():
    model = vit()
    model.set_grad_checkpointing(True)
    return model


def compare(build=vit, least=5.0, **options):
    stock, kept = trained(build(), **options)
    exact, _ = trained(converted(memtl.FrozenConfig(), build), **options)
    assert_as(exact, stock)
    assert_as(exact, alone(converted(memtl.FrozenConfig(), build)), ROUNDING)
    for config in FEW.values():
        assert kept >= least * trained(converted(config, build), 1, **options)[1]


def check_find_unused_parameters():
    compare(find_unused_parameters=True)

    def build():
        model = vit()
        model.unused = nn.Linear(3, 3)
        return model

    x, y = images()
    for config in FEW.values():
        model = converted(config, build)
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
        for _ in range(2):  # the second is refused where a parameter was not accounted for
            loss_of(parallel, half(x), half(y)).backward()
        assert model.unused.weight.grad is None
        del model.unused
        assert_gradients(model)


def check_static_graph():
    compare(static_graph=True)


def check_gradient_as_bucket_view():
    compare(gradient_as_bucket_view=True)


def check_checkpointing_in_a_static_graph():
    compare(checkpointed, 1.5, static_graph=True)  # what is left are the blocks' inputs


def check_lora():
    stock, kept = trained(lora(vit()))
    exact = memtl.FrozenConfig()
    for build in (lambda: lora(converted(exact)), lambda: converted(exact, lambda: lora(vit()))):
        assert_as(trained(build())[0], stock)
        assert_as(alone(build()), stock, ROUNDING)
    for config in FEW.values():
        assert kept >= 5 * trained(converted(config, lambda: lora(vit())), 1)[1]


def check_no_sync():
    x, y = images()
    quarters = [(half(x)[i : i + 1], half(y)[i : i + 1]) for i in (0, 1)]

    def accumulated(model):
        parallel = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(parallel.parameters(), 0.1, 0.9)
        for _ in range(2):
            for place, (x, y) in enumerate(quarters):
                with parallel.no_sync() if place == 0 else contextlib.nullcontext():
                    with SavedTensors(parallel) as saved:
                        loss = loss_of(parallel, x, y) / 2
                    loss.backward()
            assert_gradients(parallel)
            optimizer.step()
            optimizer.zero_grad()
        assert_same_in_all(parallel)
        return weights(parallel), saved.bytes

    stock, kept = accumulated(vit())
    exact, _ = accumulated(converted(memtl.FrozenConfig()))
    assert_as(exact, stock)
    assert_as(exact, alone(converted(memtl.FrozenConfig())), ROUNDING)
    for config in FEW.values():
        assert kept >= 5 * accumulated(converted(config))[1]


def check_methods_that_train_a_part():
    for config in (
        memtl.VQTConfig(num_classes=10, dropout=0.0),
        memtl.VPTConfig(num_classes=10, dropout=0.0),
        memtl.BitFitConfig(num_classes=10),
        memtl.BitFitConfig(num_classes=10, weight_bits=8),
    ):
        torch.manual_seed(3)
        model = converted(config)
        twin = copy.deepcopy(model)
        assert_as(trained(model)[0], alone(twin), ROUNDING)


def check_rep_net():
    torch.manual_seed(4)
    model = convnets.build()
    memtl.apply(model, memtl.RepNetConfig(num_classes=10, image_size=64))
    convnets.moved(model.rep_net)  # at first the modules add nothing, and most gradients are zero
    model.eval()  # batch norms of the halves would not be those of the whole
    twin = copy.deepcopy(model)
    x, y = images()
    parallel = DistributedDataParallel(model)
    train(parallel, half(x), half(y), rate=1e-6)
    assert_same_in_all(parallel)
    train(twin, x, y, rate=1e-6)
    assert_as(weights(parallel), weights(twin), ROUNDING)


def check_methods_after_the_wrapper_are_refused():
    for config in (memtl.VQTConfig(num_classes=10), memtl.BitFitConfig(num_classes=10)):
        try:
            memtl.apply(DistributedDataParallel(vit()), config)
        except ValueError as error:
            assert "apply the method first" in str(error)
        else:
            raise AssertionError("parameters were added that no process would exchange")


def check_accelerate():
    """The processes are those that ``accelerate launch`` would start."""
    it = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert it.num_processes == 2

    def accumulated(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        loader = DataLoader(TensorDataset(*images()), batch_size=1)
        parallel, optimizer, loader = it.prepare(model, optimizer, loader)
        assert isinstance(parallel, DistributedDataParallel)
        for x, y in loader:
            with it.accumulate(parallel):
                with SavedTensors(parallel) as saved:
                    loss = loss_of(parallel, x, y)
                it.backward(loss)
                assert_gradients(parallel)
                optimizer.step()
                optimizer.zero_grad()
        assert_same_in_all(parallel)
        return weights(parallel), saved.bytes

    stock, kept = accumulated(vit())
    assert_as(accumulated(converted(memtl.FrozenConfig()))[0], stock)
    for config in FEW.values():
        assert kept >= 5 * accumulated(converted(config))[1]


def converted_and_checkpointed(model, bits=None):
    memtl.apply(model, memtl.BackRazorConfig(keep=0.1))
    memtl.apply(model, memtl.CheckpointConfig(bits=bits))
    return model


def check_checkpointed_blocks():
    exact = memtl.CheckpointConfig(bits=None)
    for options in ({}, {"static_graph": True}):
        stock, kept = trained(vit(), **options)
        assert_as(trained(converted(exact), **options)[0], stock)
        few = converted(memtl.CheckpointConfig())
        assert kept >= 5 * trained(few, 1, **options)[1]
    assert_as(alone(converted(exact)), stock, ROUNDING)
    fast = trained(converted(memtl.BackRazorConfig(keep=0.1)))
    both = trained(converted_and_checkpointed(vit()))
    assert_as(both[0], fast[0])  # what is packed in the second run is what the first would have
    assert trained(converted_and_checkpointed(vit(), bits=8), 1)[1] < fast[1]


def check_save_and_load_through_the_wrapper():
    x, _ = images()
    for apply in (
        lambda: converted(memtl.BitFitConfig(num_classes=10)),
        lambda: converted_and_checkpointed(vit()),
    ):
        model, fresh = apply(), apply()
        trained(model)
        with one_folder() as folder:
            memtl.save(DistributedDataParallel(model), folder)
            memtl.load(DistributedDataParallel(fresh), folder)
        assert torch.equal(fresh(x), model(x))


if __name__ == "__main__":
    run_checks(globals())
