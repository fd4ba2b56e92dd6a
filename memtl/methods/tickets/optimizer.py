"""An optimizer whose state is of the surviving weights alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...functional import count_bits

OPS = torch.ops.memtl


class CompactOptimizer(torch.optim.Optimizer):
    """Any element by element optimizer on the weights whose bit is set; the others become 0.

    The optimizer proper, ``inner``, sees of every parameter in ``masks`` a vector of its survivors.
    A step gathers weights and gradients, lets it step, and writes the weights back, so that weights
    that did not survive are exactly 0 after it, whatever momentum or weight decay do.
    ``param_groups`` holds the parameters themselves: gradient scalers, clipping and schedulers work
    on them, and options changed there hold from the next step on. (``state`` is inner's, by
    vector.) A parameter whose gradient is None is passed over, as torch does, and stays as it is.

    Args:
        params: parameters or groups, as torch's optimizers take them.
        masks: the bits of those that are pruned (:func:`memtl.functional.magnitude_masks`), uint8
            [ceil(numel / 8)] on the parameter's device; other parameters are trained whole.
        optimizer: a class of optimizers. An optimizer that looks at more than an element's own
            gradients (rows and columns in Adafactor) would train another network than it does on
            the whole, masked tensors; this is tried out once, on a few numbers.
        options: its options.

    Raises:
        TypeError: optimizer is no class of optimizers, or a mask no uint8.
        ValueError: a mask is of no parameter given, or of another size; or the optimizer is not
            of that kind, or wants to call a closure itself (LBFGS).

    Memory: lasting, the optimizer's state of the survivors (two numbers each in AdamW); within a
    step, twice the survivors, weights and gradients, and one parameter.
    """

    inner: torch.optim.Optimizer

    def __init__(
        self,
        params: Iterable[Any],
        masks: Mapping[torch.nn.Parameter, Tensor],
        optimizer: type[torch.optim.Optimizer],
        **options: Any,
    ) -> None:
        if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
            raise TypeError(f"optimizer must be a class of torch.optim.Optimizer, got {optimizer}")
        super().__init__(params, dict(options))
        self._masks = {p: _Survivors(p, bits) for p, bits in masks.items()}
        given = {p for group in self.param_groups for p in group["params"]}
        if strangers := [tuple(p.shape) for p in self._masks if p not in given]:
            raise ValueError(
                f"masks must be of parameters given to the optimizer, got some of {strangers}"
            )
        first = self.param_groups[0]["params"][0]
        _check_elementwise(optimizer, options, first.device)
        # Some make their state at once, so the vectors have their size now.
        self.inner = optimizer([self._compact(group) for group in self.param_groups], **options)
        for part in self._masks.values():
            part.release()
        self.defaults = self.inner.defaults
        self._adopt()

    def _compact(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group as the inner optimizer has it."""
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        compact = [self._masks[p].vector if p in self._masks else p for p in group["params"]]
        return options | {"params": compact}

    def _adopt(self) -> None:
        """What the inner optimizer has set: options, and a new mapping of states."""
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update({k: v for k, v in inner.items() if k != "params"})
        self.state = self.inner.state

    def _hand_on_options(self) -> None:
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({k: v for k, v in group.items() if k not in ("params", "param_names")})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; what is added later is trained whole."""
        super().add_param_group(param_group)
        if hasattr(self, "inner"):  # torch's own __init__ comes here as well
            self.inner.add_param_group(self._compact(self.param_groups[-1]))
            self._adopt()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the optimizer; ``closure``, if there is one, is called once, before it.

        Raises:
            TypeError: a gradient of a pruned parameter is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(p, p.grad, part) for p, part in self._masks.items() if p.grad is not None]
        for _, grad, _ in moved:
            if grad.layout != torch.strided:
                raise TypeError(f"gradients of pruned parameters must be dense, got {grad.layout}")
        self._hand_on_options()
        try:
            for p, grad, part in moved:
                part.vector.data, part.vector.grad = part.of(p), part.of(grad)
            self.inner.step()
            for p, _, part in moved:
                part.vector.grad = None
                p.copy_(OPS.bits_expand(part.vector, part.bits, p.shape))
        finally:
            for _, _, part in moved:
                part.release()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of the survivors, in the form of torch's own; parameters by number."""
        self._hand_on_options()
        return self.inner.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` of an optimizer of the same parameters and masks.

        Raises:
            ValueError: groups or numbers of survivors differ; nothing has changed then.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, state in state_dict["state"].items():
            part = self._masks.get(parameters[i]) if i < len(parameters) else None
            for name, value in state.items():
                sized = isinstance(value, Tensor) and value.dim() > 0
                if part is not None and sized and tuple(value.shape) != (part.count,):
                    raise ValueError(
                        f"{name} of parameter {i} must be [{part.count}], a number for each "
                        f"survivor, got {list(value.shape)}"
                    )
        self.inner.load_state_dict(state_dict)
        self._adopt()


class _Survivors:
    """Of one parameter; ``vector`` is the parameter that the inner optimizer knows.

    The vector is released between steps: the weights are in the parameter itself.
    """

    def __init__(self, parameter: torch.nn.Parameter, bits: Tensor) -> None:
        self.count = count_bits(bits)
        wanted = -(-parameter.numel() // 8)
        if tuple(bits.shape) != (wanted,) or bits.device != parameter.device:
            raise ValueError(
                f"expected a mask [{wanted}] on {parameter.device} for a parameter "
                f"{list(parameter.shape)}, got {list(bits.shape)} on {bits.device}"
            )
        self.bits = bits
        self.vector = torch.nn.Parameter(self.of(parameter))

    def of(self, x: Tensor) -> Tensor:
        return OPS.bits_select(x.detach(), self.bits, self.count)

    def release(self) -> None:
        self.vector.data = self.vector.detach().new_empty(0)
        self.vector.grad = None


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state, each storage once.

    A :class:`CompactOptimizer`'s masks, one bit a weight, are the caller's and not counted.
    """
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            for each in value.values():
                visit(each)
        elif isinstance(value, list | tuple):
            for each in value:
                visit(each)

    visit(optimizer.state)
    return sum(storages.values())


def _check_elementwise(
    optimizer: type[torch.optim.Optimizer], options: Mapping[str, Any], device: torch.device
) -> None:
    """That an optimizer does to the survivors of a masked matrix what it does to their vector."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"{optimizer.__name__} calls a closure itself and cannot be compact")
    given = dict(options)
    if "lr" in given:  # a schedule may begin with 0, which would tell nothing
        lr = given["lr"]
        given["lr"] = torch.full_like(lr, 1e-2) if isinstance(lr, Tensor) else 1e-2
    numbers = torch.arange(1.0, 49.0, device=device).view(2, 4, 6).sin()
    mask = numbers[0] > -0.3
    whole, gradient = numbers * mask
    results = []
    for start, grad in ((whole, gradient), (whole[mask], gradient[mask])):
        p = torch.nn.Parameter(start.clone())
        try:
            trial = optimizer([p], **given)
            for scale in (1.0, -0.7, 0.3):
                p.grad = grad * scale
                trial.step()
        except Exception as error:
            raise ValueError(f"{optimizer.__name__} cannot be compact: {error}") from error
        results.append(p.detach())
    if not torch.allclose(results[0][mask], results[1], rtol=1e-4, atol=1e-6):
        raise ValueError(
            f"{optimizer.__name__} does not update weights element by element: on a vector of the "
            "survivors it would train another network than on the masked tensor"
        )
