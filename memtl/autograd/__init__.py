"""``torch.autograd.Function``s, one file a layer kind: each decides what is saved for backward.

They take tensors and plain values that :mod:`memtl.functional` has checked. Forward results are
those of PyTorch's own function, bit for bit. A second derivative is refused: what is kept does not
determine it.
"""
