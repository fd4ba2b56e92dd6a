"""SyncBatchNorm: batch normalisation with the statistics of all processes."""

from __future__ import annotations

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from .calls import FunctionFormats
from .layers import Layer, layer

_BATCH_NORM = frozenset({F.batch_norm})


@layer("norm", "torch.nn.modules.batchnorm.SyncBatchNorm")
class SyncBatchNormLayer(Layer):
    def forward(self, input: Tensor) -> Tensor:
        group = self._synchronises(input)
        if group is None:  # then torch's calls F.batch_norm
            with FunctionFormats({"norm": self.memtl_format}, _BATCH_NORM):
                return super().forward(input)  # type: ignore[misc]
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        momentum = self.momentum
        statistics = (None, None)
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            statistics = (self.running_mean, self.running_var)
            if momentum is None:  # a cumulative average
                momentum = 1.0 / self.num_batches_tracked.item()
        return functional.sync_batch_norm(
            input, *statistics, self.weight, self.bias, momentum or 0.0, self.eps, group,
            format=self.memtl_format,
        )  # fmt: skip

    def _synchronises(self, input: Tensor):
        """The group whose statistics are to be shared, or None."""
        if not (self.training and input.is_cuda and dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None
