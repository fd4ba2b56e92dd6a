"""One of two processes of test_apply.py: a model with a ticket, on half of each batch; whole in
each process, and sharded over both."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from memtl import Ticket, TicketConfig, draw_ticket
from tests.methods.tickets.small import assert_zero, convs, loss, pruned

store, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(5)
model = convs()
ticket = draw_ticket(model, TicketConfig(sparsity=0.7))
ticket.apply(model)
parallel = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(parallel.parameters(), 1e-2, weight_decay=0.1)
torch.manual_seed(rank)
for _ in range(2):
    optimizer.zero_grad()
    with parallel.no_sync():
        loss(parallel, torch.randn(2, 3, 8, 8)).backward()
    loss(parallel, torch.randn(2, 3, 8, 8)).backward()
    assert_zero(model)
    optimizer.step()
    assert_zero(model)
assert Ticket.of(parallel) == ticket
torch.save({name: p.detach() for name, p in model.named_parameters()}, f"{store}.{rank}")

sharded = convs()
ticket.apply(sharded)
where = {name: positions for name, (_, positions) in pruned(sharded).items()}
mesh = dist.init_device_mesh("cpu", (2,))
for layer in (sharded[0], sharded[8], sharded):
    fully_shard(layer, mesh=mesh)
optimizer = torch.optim.AdamW(sharded.parameters(), 1e-2, weight_decay=0.1)
for _ in range(2):
    optimizer.zero_grad()
    for _ in range(2):
        loss(sharded, torch.randn(2, 3, 8, 8)).backward()
    optimizer.step()
    for name, positions in where.items():
        weight = sharded.get_parameter(name)
        assert weight.to_local().numel() < positions.numel()
        whole, gradient = weight.full_tensor(), weight.grad.full_tensor()
        for t in (whole, gradient):
            assert (t[positions] == 0).all() and (t[~positions] != 0).float().mean() > 0.9, name
assert Ticket.of(sharded) == ticket
dist.barrier()  # a process that ends first would cut the other one's connection
dist.destroy_process_group()
# Everything is checked and written. At the interpreter's end a thread of gloo's that still runs
# would abort the process ("terminate called without an active exception"), now and then.
os._exit(0)
