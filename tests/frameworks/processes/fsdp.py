"""Each of two processes of test_distributed.py: fully_shard (FSDP2), half of a batch in each."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)  # fmt: skip
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)  # fmt: skip

import memtl
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

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def mesh():
    return dist.init_device_mesh("cpu", (2,))


def half(t):
    return t.chunk(2)[dist.get_rank()]


def by_block(model, **options):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for block in base.blocks:
        fully_shard(block, mesh=mesh(), **options)
    return fully_shard(model, mesh=mesh(), **options)


def by_layer(model, **options):
    """Every layer by itself: what one layer gives is read when its parameters are gone again."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            fully_shard(module, mesh=mesh(), **options)
    return fully_shard(model, mesh=mesh(), **options)


def converted(config, model):
    memtl.apply(model, config)
    return model


def trained(model, steps=2):
    x, y = images()
    kept = train(model, half(x), half(y), steps)
    return weights(model), kept


def refused(call, error, words):
    try:
        call()
    except error as found:
        assert words in str(found), found
    else:
        raise AssertionError(f"{words!r} was expected")


def compare(shard, build=vit, least=5.0, orders=("before", "after"), **options):
    """Converted before and after: exact methods give what stock does, others keep little."""
    stock, kept = trained(shard(build(), **options))
    for order in orders:

        def apply(config, order=order):
            if order == "before":
                return shard(converted(config, build()), **options)
            return converted(config, shard(build(), **options))

        assert_as(trained(apply(memtl.FrozenConfig()))[0], stock)
        for config in FEW.values():
            assert kept >= least * trained(apply(config), steps=1)[1]
    return stock


def check_by_block():
    stock = compare(by_block, reshard_after_forward=True)
    alone = vit()
    train(alone, *images())
    assert_as(stock, weights(alone), ROUNDING)


def check_without_resharding():
    compare(by_block, orders=["before"], reshard_after_forward=False)


def check_by_layer():
    compare(by_layer, reshard_after_forward=True)


def check_bfloat16():
    compare(
        by_block, orders=["after"], mp_policy=BF16
    )  # of half the bytes that stock keeps in float32


def check_lora():
    compare(by_block, lambda: lora(vit()), orders=["after"])
    compare(by_block, lambda: lora(vit()), 4.0, ["before"], mp_policy=BF16)


def check_unconvert():
    for shard in (by_block, by_layer):
        first, last = vit(), vit()
        for model in (
            shard(converted(FEW["LowBit"], first)),
            converted(FEW["LowBit"], shard(last)),
        ):
            sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
            memtl.unconvert(model)
            assert sharded == [m for m in model.modules() if isinstance(m, FSDPModule)]
        assert_as(trained(first)[0], trained(shard(vit()))[0])


def check_checkpointing():
    model = converted(FEW["Back Razor"], vit())
    model.set_grad_checkpointing(True)
    _, kept = trained(by_block(model))
    assert kept < trained(by_block(converted(FEW["Back Razor"], vit())))[1]


def check_methods_that_train_a_part():
    vqt = memtl.VQTConfig(num_classes=10, dropout=0.0)
    on_top = memtl.VQTConfig(num_classes=10, dropout=0.0, train_backbone=True)
    for configs in (
        (vqt,),
        (memtl.FrozenConfig(), on_top),
        (memtl.VPTConfig(num_classes=10, dropout=0.0),),
        (memtl.BitFitConfig(num_classes=10),),
        (memtl.BitFitConfig(num_classes=10, weight_bits=8),),
    ):
        torch.manual_seed(3)
        model = vit()
        for config in configs:
            memtl.apply(model, config)
        twin = copy.deepcopy(model)
        found, _ = trained(by_block(model))
        train(twin, *images())
        assert_as(found, weights(twin), ROUNDING)


def check_checkpointed_blocks():
    exact = memtl.CheckpointConfig(bits=None)
    for options in ({"reshard_after_forward": True}, {"reshard_after_forward": False}):
        stock, kept = trained(by_block(vit(), **options))
        few = by_block(converted(memtl.CheckpointConfig(), vit()), **options)
        assert kept >= 5 * trained(few, steps=1)[1]
        for model in (
            by_block(converted(exact, vit()), **options),
            converted(exact, by_block(vit(), **options)),
        ):
            assert_as(trained(model)[0], stock)
        by_layers = by_layer(converted(exact, vit()), **options)
        assert_as(trained(by_layers)[0], stock, ROUNDING)


def check_save_and_load():
    x, _ = images()
    for configs in (
        (memtl.BitFitConfig(num_classes=10),),
        (memtl.VQTConfig(num_classes=10, dropout=0.0),),
        (FEW["Back Razor"], memtl.CheckpointConfig()),
    ):
        model, fresh, sharded = vit(), vit(), vit()
        for config in configs:
            memtl.apply(model, config)
            memtl.apply(sharded, config)
        trained(by_block(model))
        by_block(sharded)
        with one_folder() as folder:
            memtl.save(model, folder)
            memtl.load(fresh, folder)
            memtl.load(sharded, folder)
        for other in (fresh, sharded):
            assert_as(weights(other), weights(model))
        with torch.no_grad():
            assert torch.equal(fresh(x), sharded(x))


def check_queries_of_a_block_that_was_sharded_again():
    """Their gradients come to a block whose own output has none."""
    model = converted(memtl.VQTConfig(num_classes=10), converted(FEW["LowBit"], vit()))
    by_block(model, reshard_after_forward=True)
    x, y = images()
    loss_of(model, half(x), half(y)).backward()
    assert_gradients(model)
    for block in model.blocks:  # and nothing stays gathered behind them
        assert all(hasattr(p, "placements") for p in block.parameters())


def check_what_comes_too_late_is_refused():
    words = "apply the method first"
    for config in (memtl.VQTConfig(num_classes=10), memtl.BitFitConfig(num_classes=10)):
        model = by_block(vit())
        refused(lambda model=model, c=config: memtl.apply(model, c), ValueError, words)
    frozen = by_block(vit().requires_grad_(False))
    words = "compress the weights first"
    refused(lambda: memtl.nn.compress_weights(frozen), ValueError, words)


def check_distributed_checkpoint():
    x, y = images()

    def step(model, optimizer):
        loss_of(model, half(x), half(y)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    model = by_block(converted(FEW["LowBit"], vit()))
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_model_state_dict(model, options=options)
    assert dist.get_rank() or full.keys() == vit().state_dict().keys()
    both = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    other = converted(FEW["LowBit"], by_block(vit()))
    again = torch.optim.AdamW(other.parameters())
    loaded = dict(zip(("model", "optimizer"), get_state_dict(other, again), strict=True))
    with one_folder() as folder:
        dcp.save(both, checkpoint_id=folder)
        dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(
        other, again, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )
    assert_as(weights(other), weights(model))
    for pair in ((model, optimizer), (other, again)):
        step(*pair)
    assert_as(weights(other), weights(model))


def check_tensor_parallel():
    plan = {"mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()}

    def parallel(config):
        model = converted(config, vit())
        for block in model.blocks:
            parallelize_module(block, mesh(), plan)
        return model

    x, y = images()
    alone, exact = vit(), parallel(memtl.FrozenConfig())
    for model in (alone, exact):
        train(model, x, y)
    assert_as(weights(exact), weights(alone), ROUNDING)
    lossy = parallel(FEW["Back Razor"])
    refused(lambda: lossy(x), TypeError, "DTensor")
    left_out = memtl.BackRazorConfig(keep=0.1, exclude_modules=["mlp"])
    train(parallel(left_out), x, y)


if __name__ == "__main__":
    run_checks(globals())
