"""One of two processes of test_save_wrapped.py: a model sharded over both is saved and loaded."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import memtl
from memtl.methods.base.record import unwrapped

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = dist.init_device_mesh("cpu", (2,))


def network(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 3))
    memtl.apply(model, memtl.BackRazorConfig(keep=0.5))
    return model


def sharded(seed):
    model = network(seed)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


def whole(model):
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


model = sharded(1)
model(torch.randn(6, 7)).sum().backward()
torch.optim.SGD(model.parameters(), 0.1).step()
expected = whole(model)
assert memtl.trainable_parameters(model) == (7 * 5 + 5 + 5 * 3 + 3,) * 2
save = folder / "save"
memtl.save(model, save)
assert (save / "memtl.json").exists()  # in both processes, when save has returned
assert len(os.listdir(save)) == 3

for other in (sharded(2), torch.compile(sharded(2), backend="eager")):
    memtl.load(other, save)
    assert equal(whole(unwrapped(other)), expected)
memtl.save(other, folder / "compiled")
plain = network(3)
memtl.load(plain, folder / "compiled")
assert equal(dict(plain.named_parameters()), expected)
if rank == 0:
    torch.save(expected, folder / "whole")

(folder / "file").touch()
try:
    memtl.save(model, folder / "file")
except (FileExistsError, RuntimeError) as error:
    wanted = FileExistsError if rank == 0 else RuntimeError
    assert type(error) is wanted and "File exists" in str(error), error
else:
    raise AssertionError("a file is no folder")

dist.barrier()  # a process that ends first would cut the other one's connection
dist.destroy_process_group()
os._exit(0)  # a thread of gloo's may still run, see tests/methods/tickets/parallel_process.py
