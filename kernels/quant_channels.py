"""Numbers by channel for the elements of groups: flat element i is of channel (i // inner) % C.

Elements of one channel that lie side by side are a run, of ``inner`` elements. Where runs are as
long as a group or longer, a group reaches into two at most: two numbers are read for it, of which
elements choose. Where runs are shorter (NARROW) every element reads its own.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from memtl._ops import GROUP


@triton.jit
def first_run(group, channels, inner, INDEX: tl.constexpr):
    """Of each group: the channel of its first element, and that one's place in its run."""
    element = group.to(INDEX) * 64
    return element // inner % channels, element % inner


@triton.jit
def by_channel(table_ptr, channel, place, channels, inner, NARROW: tl.constexpr):
    """float32, for both halves of the groups whose first element that is; there are 64 channels at
    least where runs are NARROW."""
    lane = tl.arange(0, 32)[None, :]
    if NARROW:
        low = _gathered(table_ptr, channel[:, None], place[:, None] + lane, channels, inner)
        high = _gathered(table_ptr, channel[:, None], place[:, None] + lane + 32, channels, inner)
    else:
        following = tl.where(channel + 1 < channels, channel + 1, 0)
        own = tl.load(table_ptr + channel).to(tl.float32)[:, None]
        other = tl.load(table_ptr + following).to(tl.float32)[:, None]
        left = tl.minimum(inner - place, 64).to(tl.int32)[:, None]
        low, high = tl.where(lane < left, own, other), tl.where(lane + 32 < left, own, other)
    return low, high


@triton.jit
def _gathered(table_ptr, channel, place, channels, inner):
    # place // inner, exactly: of numbers below 128 by numbers below 64
    channel += (place.to(tl.int32) * (65536 // inner + 1)) >> 16
    return tl.load(table_ptr + tl.where(channel < channels, channel, channel - channels)).to(
        tl.float32
    )


def channel_options(numel: int, inner: int) -> dict[str, Any]:
    """What kernels that read by channel are compiled with."""
    return {
        "NARROW": inner < GROUP,
        "INDEX": tl.int32 if numel < 2**31 - 2**16 else tl.int64,  # a tile beyond it counts as well
    }


def channel_table(t: Tensor, inner: int) -> Tensor:
    """As by_channel reads it: fewer than 64 channels that alternate quickly stand there again and
    again."""
    t = t.reshape(-1).contiguous()
    return t.repeat(triton.cdiv(GROUP, len(t))) if inner < GROUP and len(t) < GROUP else t
