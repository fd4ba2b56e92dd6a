"""What is known of every channel of every tensor in a network: whether it is a constant, which
filters it comes from, and which channels can only go together."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .numbering import Numbering
from .tracing import layer_kind, pads_with_zeros, trace

POINTWISE = frozenset(
    "relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ celu selu silu gelu mish hardtanh hardtanh_ "
    "hardswish hardsigmoid logsigmoid softplus softsign tanh tanh_ sigmoid sigmoid_ clamp clamp_ "
    "clip abs neg square sqrt exp".split()
)
SAME = frozenset(
    "contiguous clone detach max_pool1d max_pool2d max_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d interpolate".split()
)
ZEROS = frozenset(
    "avg_pool1d avg_pool2d avg_pool3d dropout dropout1d dropout2d dropout3d feature_dropout "
    "stochastic_depth drop_path".split()
)
SUMS = {"add": torch.add, "add_": torch.add, "iadd": torch.add, "sub": torch.sub}
PRODUCTS = {"mul": torch.mul, "mul_": torch.mul, "imul": torch.mul}
QUOTIENTS = {"truediv": torch.true_divide, "div": torch.div, "div_": torch.div}
ARITHMETIC: dict[str, Callable[..., Tensor]] = {**SUMS, **PRODUCTS, **QUOTIENTS}
IN_PLACE = frozenset(("iadd", "imul"))
READS = frozenset("size dim".split())
ATTRIBUTES = frozenset("shape ndim dtype device".split())
LIBRARIES = ("torch", "_operator", "torchvision", "timm", "builtins", "math")

NAN = math.nan


@dataclasses.dataclass(eq=False)
class Channels:
    """The channels of one tensor.

    Attributes:
        ids: int64 [C], the numbers of the channels; layers may be tied to them.
        value: float64 [C], what a channel is everywhere in the tensor; NaN where it varies.
        axis: which dimension they are, counted from the end.
        dims: how many dimensions there are; None if that is not known.
        sources: the layers whose pruned filters are zeros here.
        spread: whether each is several numbers one after another, of a map that was flattened.
    """

    ids: Tensor
    value: Tensor
    axis: int
    dims: int | None
    sources: frozenset[str] = frozenset()
    spread: bool = False


class Fold(NamedTuple):
    """The constants that reach a layer: its name, channels, and 0 where there is none."""

    layer: str
    ids: Tensor
    value: Tensor


class Flow:
    """A walk through the graph of ``model`` in evaluation mode.

    Args:
        model: any module; its weights are zero where they are pruned.
        surviving: by name of a parameter, where it is not pruned, bool of its shape.

    Attributes:
        tied: by the names of a module, of its parameter or buffer, and a dimension: whose numbers
            are along that.
        sizes: by the names of a module and an attribute: the channels that the attribute counts.
        folds: the constants that reach layers.
        followers: by layer, the norms and the depthwise convolutions that read nothing else.

    Raises:
        ValueError: the model cannot be traced.
    """

    def __init__(self, model: nn.Module, surviving: Mapping[str, Tensor]) -> None:
        self.tied: dict[tuple[str, str, int], Tensor] = {}
        self.sizes: dict[tuple[str, str], Tensor] = {}
        self.folds: list[Fold] = []
        self.followers: dict[str, list[str]] = {}
        self._numbers = Numbering()
        self._surviving = surviving
        model, graph = trace(model)
        self._modules = dict(model.named_modules())
        self._calls = Counter(str(n.target) for n in graph.nodes if n.op == "call_module")
        held = Counter(id(p) for m in model.modules() for p in m._parameters.values())
        read = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
        named = model.named_parameters(remove_duplicate=False)
        self._shared = {i for i, count in held.items() if count > 1}
        self._shared |= {id(p) for name, p in named if name in read}
        self._known: dict[fx.Node, Channels | None] = {}
        with torch.no_grad():
            for node in graph.nodes:
                self._known[node] = self._visit(node)
        self._kept = self._numbers.settle(self.tied.values())

    def _block(self, *tensors: Channels | None) -> Channels | None:
        """What reads these is not known: their channels stay, and may be anything."""
        for x in tensors:
            if x is not None:
                self._numbers.keep(x.ids)
                x.value.fill_(NAN)
        return None

    def _tie(self, name: str, key: str, dim: int, ids: Tensor) -> None:
        module = self._modules[name]
        tensor = {**module._buffers, **module._parameters}.get(key)
        if tensor is None:
            return
        if id(tensor) in self._shared:
            self._numbers.keep(ids)
        before = self.tied.setdefault((name, key, dim), ids)
        if before is not ids:  # it is called again
            self._numbers.unite(before, ids)

    def _size(self, name: str, attribute: str, ids: Tensor) -> None:
        self.sizes.setdefault((name, attribute), ids)

    def kept(self, ids: Tensor) -> Tensor:
        """Which of the channels stay, bool [C]."""
        return self._kept[ids]

    # One node of the graph.

    def _visit(self, node: fx.Node) -> Channels | None:
        given = [self._known[n] for n in node.all_input_nodes]
        if not any(given) and node.op != "call_module":
            return None
        x = given[0] if given else None
        if node.op == "call_module":
            name = str(node.target)
            kind = layer_kind(self._modules[name])
            if len(node.args) == 1 and not node.kwargs and len(given) == 1 and kind is not None:
                return getattr(self, f"_{kind}")(name, x)
            return self._block(*given)
        if node.op not in ("call_function", "call_method"):
            return self._block(*given)
        name = node.target if isinstance(node.target, str) else node.target.__name__
        if not isinstance(node.target, str):
            library = (getattr(node.target, "__module__", None) or "torch").split(".")[0]
            if library not in LIBRARIES:
                return self._block(*given)
        if name in READS or (name == "getattr" and node.args[1] in ATTRIBUTES):
            return None
        if name == "cat":
            return self._cat(node)
        if name in ARITHMETIC:
            return self._arithmetic(name, node)
        if len(given) == 1 and x is not None and node.args and self._argument(node, 0) is x:
            rest: Any = node.args[1:]
            options: Any = node.kwargs
            if name in POINTWISE:
                return self._call(node, name, x)
            if name in SAME:
                return dataclasses.replace(x)
            if name in ZEROS:
                return self._zeros(name, x)
            if name in ("mean", "sum", "amax"):
                return self._reduced(name, x, *rest, **options)
            if name == "flatten":
                return self._flattened(x, *rest, **options)
        if name in ("view", "reshape") and x is not None and self._is_flatten(node):
            return self._flattened(x, 1)
        return self._block(*given)

    def _argument(self, node: fx.Node, i: int) -> Channels | None:
        argument = node.args[i]
        return self._known[argument] if isinstance(argument, fx.Node) else None

    # Layers that mix channels.

    def _alive(self, name: str, weight: Tensor) -> Tensor:
        found = self._surviving.get(name)
        return torch.ones(weight.shape, dtype=torch.bool) if found is None else found

    def _mix(
        self, name: str, x: Channels | None, groups: int, padded: bool
    ) -> tuple[Tensor, Tensor, frozenset[str]]:
        """Ids, values and sources of what a layer gives, having said what it needs of ``x``."""
        layer: Any = self._modules[name]
        weight, bias = layer.weight, layer.bias
        outputs, inputs = weight.shape[0], weight.shape[1] * groups
        value = torch.full((inputs,), NAN, dtype=torch.float64) if x is None else x.value
        varies = value.isnan() | ((value != 0) & padded)  # at the border it is another sum
        constant = value.where(~varies, 0.0)
        taps = weight.detach().reshape(groups, outputs // groups, weight.shape[1], -1)
        alive = self._alive(f"{name}.weight", weight).reshape(taps.shape).any(3)
        sums = (taps.double().sum(3).cpu() * constant.view(groups, 1, -1)).sum(2).view(-1)
        if bias is not None:
            sums += bias.detach().double().cpu()
        ids = self._numbers.new(outputs)
        sources = {name}
        if groups > 1:
            before = self._numbers.new(inputs) if x is None else x.ids
            if x is None:
                self._numbers.keep(before)
            # The channels of a group stay or go together: depthwise, one with its own.
            first = before.view(groups, -1)[:, :1]
            self._numbers.unite(before, first.expand(-1, inputs // groups).flatten())
            self._numbers.unite(ids, first.expand(-1, outputs // groups).flatten())
            if x is not None and groups == inputs == outputs:
                self._follow(name, x)
                sources |= x.sources
        elif x is not None:
            # A constant that is not zero goes into the bias, where there is one for it alone.
            fixed = torch.ones(outputs, dtype=torch.bool)
            alone = bias is not None and self._calls[name] == 1 and id(bias) not in self._shared
            if alone:
                fixed = ~self._alive(f"{name}.bias", bias)
            needed = alive[0] & (varies | (fixed[:, None] & (value != 0)))
            self._numbers.keep(x.ids[needed.any(0)])
            self._tie(name, "weight", 1, x.ids)
            self.folds.append(Fold(name, x.ids, constant))
        self._tie(name, "weight", 0, ids)
        self._tie(name, "bias", 0, ids)
        unsteady = (alive & varies.view(groups, 1, -1)).any(2).view(-1)
        return ids, sums.where(~unsteady, NAN), frozenset(sources)

    def _convolution(self, name: str, x: Channels | None) -> Channels | None:
        layer: Any = self._modules[name]
        dims = layer.weight.dim()
        if x is not None and (x.axis != 1 - dims or len(x.ids) != layer.in_channels):
            x = self._block(x)
        ids, value, sources = self._mix(name, x, layer.groups, pads_with_zeros(layer))
        if x is not None:
            self._size(name, "in_channels", x.ids)
        self._size(name, "out_channels", ids)
        return Channels(ids, value, 1 - dims, dims, sources)

    def _linear(self, name: str, x: Channels | None) -> Channels | None:
        layer: Any = self._modules[name]
        dims = None if x is None else x.dims
        if x is not None:
            x = self._unspread(x, layer.in_features)
            if x.axis != -1 or len(x.ids) != layer.in_features:
                x = self._block(x)
        ids, value, sources = self._mix(name, x, 1, False)
        if x is not None:
            self._size(name, "in_features", x.ids)
        self._size(name, "out_features", ids)
        return Channels(ids, value, -1, dims, sources)

    # Layers that treat every channel by itself.

    def _follow(self, name: str, x: Channels) -> None:
        if self._calls[name] == 1:
            for source in x.sources:
                self.followers.setdefault(source, []).append(name)

    def _norm(self, name: str, x: Channels | None) -> Channels | None:
        module: Any = self._modules[name]
        tensors = {**module._buffers, **module._parameters}
        sized = {k: t for k, t in tensors.items() if t is not None and t.dim() == 1}
        like = next(iter(sized.values()), None)
        if x is None or like is None:
            return self._block(x)
        x = self._unspread(x, len(like))
        second = 1 - (2 if x.dims is None else x.dims)
        if len(x.ids) != len(like) or x.axis != second:
            return self._block(x)
        for key in sized:
            self._tie(name, key, 0, x.ids)
        if hasattr(module, "num_features"):
            self._size(name, "num_features", x.ids)
        self._follow(name, x)
        value = x.value
        if (weight := module._parameters.get("weight")) is not None:  # 0 leaves the shift alone
            value = value.where(self._alive(f"{name}.weight", weight), 0.0)
        apart = (2, len(like), *[2] * (-1 - second))
        after = module(value.to(like).view(-1, *[1] * (-1 - second)).expand(apart))
        after = after.reshape(2, len(like), -1)[0, :, 0].double().cpu()
        act = getattr(module, "act", None)
        # Of zeros it makes its shift, which is pruned only if it is a parameter.
        leaves_zero = module._parameters.get("bias") is not None and (
            act is None or not act(torch.zeros(1)).any()
        )
        sources = x.sources if leaves_zero else frozenset()
        return dataclasses.replace(x, value=after.where(~value.isnan(), NAN), sources=sources)

    def _pointwise(self, name: str, x: Channels | None) -> Channels | None:
        module = self._modules[name]
        parameters = list(module.parameters())
        if x is None or any(p.numel() > 1 for p in parameters):  # a slope for each channel
            return self._block(x)
        like = parameters[0] if parameters else x.value
        inplace = getattr(module, "inplace", False)
        return self._mapped(lambda v: module(v.to(like)).double().cpu(), x, inplace)

    def _call(self, node: fx.Node, name: str, x: Channels) -> Channels:
        target: Any = node.target
        function = getattr(Tensor, target) if isinstance(target, str) else target
        rest, options = node.args[1:], node.kwargs
        inplace = name.endswith("_") or any(a is True for a in (*rest, *options.values()))
        return self._mapped(lambda v: function(v, *rest, **options), x, inplace)

    def _mapped(
        self, function: Callable[[Tensor], Tensor], x: Channels, inplace: bool = False
    ) -> Channels:
        value = function(x.value.clone()).where(~x.value.isnan(), NAN)
        zero = function(torch.zeros(1, dtype=torch.float64))
        return self._became(x, value, frozenset() if zero.any() else x.sources, inplace)

    def _became(
        self, x: Channels, value: Tensor, sources: frozenset[str], inplace: bool
    ) -> Channels:
        after = dataclasses.replace(x, value=value, sources=sources)
        if inplace:  # whoever reads x after this, or a view of it, has one or the other
            x.value[x.value != value] = NAN
        return after

    def _identity(self, name: str, x: Channels | None) -> Channels | None:
        return x

    def _pool(self, name: str, x: Channels | None) -> Channels | None:
        return None if x is None else dataclasses.replace(x)

    def _zeros(self, name: str, x: Channels | None) -> Channels | None:
        if x is None:
            return None
        return dataclasses.replace(x, value=x.value.where(x.value == 0, NAN))

    # Several tensors.

    def _arithmetic(self, name: str, node: fx.Node) -> Channels | None:
        if len(node.args) != 2 or node.kwargs:
            return self._block(*(self._known[n] for n in node.all_input_nodes))
        a, b = node.args
        function = ARITHMETIC[name]
        inplace = name.endswith("_") or name in IN_PLACE
        if isinstance(a, fx.Node) and isinstance(b, (int, float)):
            x = self._known[a]
            assert x is not None
            return self._mapped(lambda v: function(v, b), x, inplace)
        if isinstance(b, fx.Node) and isinstance(a, (int, float)):
            x = self._known[b]
            assert x is not None
            return self._mapped(lambda v: function(torch.full_like(v, a), v), x)
        x, y = self._argument(node, 0), self._argument(node, 1)
        if x is None or y is None or name in QUOTIENTS:
            return self._block(x, y)
        if (len(x.ids), x.axis, x.spread) != (len(y.ids), y.axis, y.spread):
            return self._block(x, y)
        self._numbers.unite(x.ids, y.ids)
        value = function(x.value, y.value)
        sources = x.sources & y.sources
        if name in PRODUCTS:
            value = value.where((x.value != 0) & (y.value != 0), 0.0)
            sources = x.sources | y.sources
        after = self._became(x, value, sources, inplace)
        return dataclasses.replace(after, dims=max(x.dims or 0, y.dims or 0) or None)

    def _cat(self, node: fx.Node) -> Channels | None:
        tensors = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        known = [self._known[n] for n in node.all_input_nodes]
        parts = [x for x in known if x is not None]
        if not isinstance(tensors, (list, tuple)) or len(parts) != len(tensors):
            return self._block(*parts)
        first = parts[0]
        alike = all((x.axis, x.dims, x.spread) == (first.axis, first.dims, False) for x in parts)
        if not alike or first.dims is None or dim not in (first.axis, first.axis + first.dims):
            return self._block(*parts)
        ids, value = torch.cat([x.ids for x in parts]), torch.cat([x.value for x in parts])
        return Channels(ids, value, first.axis, first.dims)

    # Other shapes.

    def _flatten(self, name: str, x: Channels | None) -> Channels | None:
        module: Any = self._modules[name]
        return None if x is None else self._flattened(x, module.start_dim, module.end_dim)

    def _flattened(self, x: Channels, start_dim: Any = 0, end_dim: Any = -1) -> Channels | None:
        if x.dims is None or x.axis != 1 - x.dims or start_dim != 1:
            return self._block(x)
        if end_dim not in (-1, x.dims - 1):
            return self._block(x)
        return dataclasses.replace(x, axis=-1, dims=2, spread=x.spread or x.dims > 2)

    def _unspread(self, x: Channels, count: int) -> Channels:
        """A map that was flattened as its reader, of ``count`` numbers, sees it."""
        if not x.spread or count % len(x.ids):
            return x
        each = count // len(x.ids)
        ids, value = x.ids.repeat_interleave(each), x.value.repeat_interleave(each)
        sources = x.sources if each == 1 else frozenset()
        return Channels(ids, value, -1, 2, sources)

    def _is_flatten(self, node: fx.Node) -> bool:
        """Whether a view is to [batch, the rest]."""
        sizes = node.args[1:]
        if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)):
            sizes = tuple(sizes[0])
        if len(sizes) != 2 or sizes[1] != -1 or not isinstance(sizes[0], fx.Node):
            return False
        batch = sizes[0]
        if batch.target == "size":
            return batch.args == (node.args[0], 0)
        if getattr(batch.target, "__name__", "") != "getitem" or batch.args[1] != 0:
            return False
        shape: Any = batch.args[0]
        return shape.target in ("size", getattr) and shape.args[0] is node.args[0]

    def _reduced(
        self, name: str, x: Channels, dim: Any = None, keepdim: bool = False, **options: Any
    ) -> Channels | None:
        given = dim if isinstance(dim, (list, tuple)) else (dim,)
        if x.dims is None or x.spread or options or not all(isinstance(d, int) for d in given):
            return self._block(x)
        dims = x.dims
        gone = {d if d < 0 else d - dims for d in given}
        if x.axis in gone or -x.dims in gone:
            return self._block(x)
        if name == "sum":
            x = dataclasses.replace(x, value=x.value.where(x.value == 0, NAN))
        if keepdim:
            return dataclasses.replace(x)
        axis = x.axis + sum(d > x.axis for d in gone)
        return dataclasses.replace(x, axis=axis, dims=dims - len(gone))
