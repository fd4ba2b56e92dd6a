"""What belongs to a channel beside its filter: biases, and batch norms that read it alone."""

from __future__ import annotations

from torch import nn

from .flow import Flow
from .scope import inner_model, named_weights

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Those whose weight has a filter for every output channel."""


def channel_vectors(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The vectors that a pruned output channel of a layer takes with it, so that it is zero behind
    them: the layer's bias, scale and shift of a batch norm that reads this layer and nothing else,
    and so on through activations that leave zero what it is, pooling and depthwise convolutions,
    whose biases and norms are the channel's too.

    In a network that torch.fx cannot trace, where it is not known what reads what, these are the
    layers' own biases alone.

    Args:
        model: any module.

    Returns:
        For every linear layer and convolution (not a transposed one, which has no filter for a
        channel) that has any: the name of its weight, and those of the vectors, in the backbone.
        Their entries are the layer's output channels, in that order.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: peft has put adapters into it, or parameters are not initialised yet.
    """
    model = inner_model(model)
    named = named_weights(model)
    known = {id(weight.parameter): name for name, weight in named.items()}
    modules = dict(model.named_modules())
    try:
        followers = Flow(model, {}).followers
    except ValueError:
        followers = {}
    found: dict[str, tuple[str, ...]] = {}
    for name, module in modules.items():
        weight = known.get(id(module._parameters.get("weight")))
        if not isinstance(module, LAYERS) or weight is None or named[weight].embedding:
            continue
        own = [module._parameters["bias"]]
        behind = [modules[follower] for follower in followers.get(name, ())]
        own += [m._parameters["bias"] for m in behind if isinstance(m, LAYERS)]
        norms = [m for m in behind if not isinstance(m, LAYERS)]
        own += [m._parameters.get(key) for m in norms for key in ("weight", "bias")]
        vectors = [known[id(p)] for p in own if id(p) in known]
        if vectors:
            found[weight] = tuple(dict.fromkeys((*found.get(weight, ()), *vectors)))
    return found
