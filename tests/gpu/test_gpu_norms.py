"""On an NVIDIA GPU: normalisations pack x-hat and take their gradients in one pass each."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memtl import functional as M
from memtl.storage import Dense, Quantized

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

NONE = (None, None)
NORMS = {
    "layer": ((16, 50, 192), 192, lambda x, *wb, **f: M.layer_norm(x, (192,), *wb, **f)),
    "rms": ((16, 50, 192), 192, lambda x, w, b, **f: M.rms_norm(x, (192,), w, **f)),
    "batch": ((8, 24, 28, 28), 24, lambda x, *wb, **f: M.batch_norm(x, None, None, *wb, True, **f)),
    "batch of vectors": ((512, 24), 24, lambda x, *wb, **f: M.batch_norm(x, *NONE, *wb, True, **f)),
}
FUSED = {"layer": "quant_norm_grad", "rms": "quant_norm_grad"}


class Watch(TorchDispatchMode):
    """The names of memtl's operators as they are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "memtl":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_norm(name, dtype):
    shape, features, norm = NORMS[name]
    generator = torch.Generator().manual_seed(0)
    x, grad_out = torch.randn(2, *shape, generator=generator).to(DEVICE, dtype)
    w, b = torch.randn(2, features, generator=generator).to(DEVICE, dtype)
    gradients = []
    for format, wide in ((Dense(), torch.float32), (Quantized(8), dtype)):
        leaves = [t.detach().to(wide).requires_grad_() for t in (x, w, b)]
        # In this thread, so that backward is watched too.
        with torch.autograd.set_multithreading_enabled(False), Watch() as watch:
            y = norm(*leaves, format=format)
            found = torch.autograd.grad(y, leaves, grad_out.to(wide), allow_unused=True)
        gradients.append([t.double() for t in found if t is not None])
    fused = FUSED.get(name, "quant_channel_norm_grad")
    assert watch.names == ["quant_pack_normalized", fused]
    for exact, lossy in zip(*gradients, strict=True):
        # A hundredth of a deviation is what x-hat is off, of each sum some root of its terms.
        assert (lossy - exact).norm() <= 0.03 * exact.norm()
