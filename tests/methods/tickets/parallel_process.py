"""One of two processes of test_apply.py: a model with a ticket, on half of each batch."""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from memtl import Ticket, TicketConfig, draw_ticket
from tests.methods.tickets.small import assert_zero, convs, loss

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
dist.destroy_process_group()
