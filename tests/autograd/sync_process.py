"""One of two processes of test_channel_norm.py: sync_batch_norm on half of a batch."""

import os
import sys

import torch
import torch.distributed as dist

from memtl import functional as M
from memtl.storage import Dense

store, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
generator = torch.Generator().manual_seed(3)
x, g = (torch.randn(5, 4, 3, 6, generator=generator) * 2 + 1 for _ in range(2))
weight, bias = (torch.randn(4, generator=generator).requires_grad_() for _ in range(2))
mine = slice(0, 2) if rank == 0 else slice(2, 5)  # halves of different sizes
part = x[mine].clone().requires_grad_()
mean, var = torch.zeros(4), torch.ones(4)
y = M.sync_batch_norm(part, mean, var, weight, bias, 0.1, 1e-5, dist.group.WORLD, format=Dense())
y.backward(g[mine])
torch.save(
    {"y": y.detach(), "x": part.grad, "weight": weight.grad, "bias": bias.grad, "mean": mean,
     "var": var},
    f"{store}.{rank}",
)  # fmt: skip
dist.barrier()  # a process that ends first would cut the other one's connection
dist.destroy_process_group()
# Everything is checked and written. At the interpreter's end a thread of gloo's that still runs
# would abort the process ("terminate called without an active exception"), now and then.
os._exit(0)
