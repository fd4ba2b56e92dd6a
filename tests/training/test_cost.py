import torch
from torch import nn

from memtl import memory
from memtl.training import Way, costs


def test_costs_of_two_ways():
    images, labels = torch.randn(8, 64), torch.zeros(8, dtype=torch.int64)

    def build(frozen: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 3))
        if frozen:
            model[0].requires_grad_(False)
        return model

    ways = [Way(lambda frozen=f: build(frozen), images, labels) for f in (False, True)]
    full, head = costs(ways, 2, progress=False)
    assert full.trainable == 64 * 128 + 128 + 128 * 3 + 3
    assert head.trainable == 128 * 3 + 3
    assert head.saved_bytes == full.saved_bytes - images.nbytes  # the ReLU's output is kept by both
    model = build(False)
    kept = memory.saved_bytes(lambda: nn.functional.cross_entropy(model(images), labels))
    assert full.saved_bytes == kept
    for cost in (full, head):
        assert cost.seconds_per_step > 0
        assert cost.peak_bytes is None or cost.peak_bytes >= 0
