"""Activations and their derivatives in float32, as _ops.ACTIVATIONS names them.

The error is below 5e-7 * max(1, |x|), of a derivative below 5e-7; NaN stays NaN, infinities give
the limits. Kernels that use them are compiled without fused products and sums; where those serve,
they are asked for.
"""

import triton
import triton.language as tl

TANH_ROOT = tl.constexpr(1.59576912)  # 2 sqrt(2 / pi): tanh's argument, twice
TANH_CUBE = tl.constexpr(0.044715)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """f(x)."""
    x = tl.maximum(x, -100.0, propagate_nan=tl.PropagateNan.ALL)  # where all have come to zero
    if ACTIVATION == "gelu":
        below, _ = _normal(x)
        y = x * below
    elif ACTIVATION == "gelu_tanh":
        of, _ = _sigmoid(x * tl.fma(x * x, TANH_CUBE, 1.0) * TANH_ROOT)
        y = x * of
    elif ACTIVATION == "silu":
        of, _ = _sigmoid(x)
        y = x * of
    elif ACTIVATION == "quick_gelu":
        of, _ = _sigmoid(x * 1.702)
        y = x * of
    elif ACTIVATION == "hardswish":
        y = x * (tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) * (1.0 / 6.0))
    else:
        tl.static_assert(ACTIVATION == "mish")
        n, _ = _mish(x)
        y = x * (n / (n + 2.0))
    return y


@triton.jit
def derived(x, ACTIVATION: tl.constexpr):
    """f'(x)."""
    x = tl.maximum(x, -100.0, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, 100.0, propagate_nan=tl.PropagateNan.ALL)  # where all have come to 0 or 1
    if ACTIVATION == "gelu":
        below, bell = _normal(x)
        y = tl.fma(x * 0.398942280, bell, below)
    elif ACTIVATION == "gelu_tanh":
        bent, argument = x * x * TANH_CUBE, x * TANH_ROOT
        of, rest = _sigmoid(argument * (bent + 1.0))
        y = of * tl.fma(argument * tl.fma(bent, 3.0, 1.0), rest, 1.0)
    elif ACTIVATION == "silu":
        y = _sigmoid_slope(x)
    elif ACTIVATION == "quick_gelu":
        y = _sigmoid_slope(x * 1.702)
    elif ACTIVATION == "hardswish":  # at 3 and -3 torch has its 1 and 0
        y = tl.where(x >= 3.0, 1.0, tl.where(x <= -3.0, 0.0, tl.fma(x, 1.0 / 3.0, 0.5)))
    else:
        tl.static_assert(ACTIVATION == "mish")
        n, e = _mish(x)
        inverse = 1.0 / (n + 2.0)
        y = tl.fma(x * 4.0 * (e * (e + 1.0)), inverse * inverse, n * inverse)
    return y


@triton.jit
def _sigmoid(x):
    """1 / (1 + e^-x) and, no less accurately, 1 minus that."""
    e = tl.exp(-tl.abs(x))
    upper = 1.0 / (1.0 + e)
    lower = e * upper
    return tl.where(x < 0, lower, upper), tl.where(x < 0, upper, lower)


@triton.jit
def _sigmoid_slope(x):
    """The derivative of x * sigmoid(x)."""
    of, rest = _sigmoid(x)
    return of * tl.fma(x, rest, 1.0)


@triton.jit
def _normal(x):
    """The normal distribution function, and e^(-x^2 / 2)."""
    t = 1.0 / tl.fma(tl.abs(x), 0.27, 1.0)
    bell = tl.exp(x * x * -0.5)
    # What lies above |x| is the bell times t times this, a fit: off by 3e-8 of itself at most.
    tail = tl.fma(t, 0.028915275, -0.12625526)
    tail = tl.fma(tail, t, 0.16929139)
    tail = tl.fma(tail, t, -0.06862096)
    tail = tl.fma(tail, t, 0.10739941)
    tail = tl.fma(tail, t, 0.0722403)
    tail = tl.fma(tail, t, 0.10175916)
    tail = tl.fma(tail, t, 0.10755051)
    tail = tl.fma(tail, t, 0.10772018)
    above = tail * t * bell
    return tl.where(x < 0, above, 1.0 - above), bell


@triton.jit
def _mish(x):
    """n and e^x: tanh(log(1 + e^x)) = n / (n + 2)."""
    e = tl.exp(tl.minimum(x, 20.0))
    return e * (e + 2.0), e
