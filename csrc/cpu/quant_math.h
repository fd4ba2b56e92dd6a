// Activations and their derivatives on vectors of float: branch-free, the same in every instruction
// set. The error is below 5e-7 * max(1, |x|), in a derivative below 5e-7; NaN stays NaN, infinities
// give the limits.
#pragma once

#include "common/simd.h"
#include "quant_fused.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

MEMTL_INLINE Floats magnitude(Floats x) { return as_floats(bit_and(as_ints(x), ints(0x7fffffff))); }
MEMTL_INLINE Mask is_negative(Floats x) { return greater(ints(0), as_ints(x)); }

// c0 + c1 x + ...
template <int kCount>
MEMTL_INLINE Floats polynomial(Floats x, const float (&c)[kCount]) {
  Floats y = floats(c[kCount - 1]);
  for (int i = kCount - 2; i >= 0; --i) y = add(mul(y, x), floats(c[i]));
  return y;
}

// e^x for x <= 88, zero below -87.7.
MEMTL_INLINE Floats exp(Floats x) {
  // Added to this, a number leaves its nearest integer, and 127, in the lowest bits.
  constexpr float kRound = 0x1.8p23f + 127;
  x = max(floats(-88), x);  // NaN is the second one, and stays
  const Floats shifted = add(mul(x, floats(1.44269504f)), floats(kRound));
  const Floats n = sub(shifted, floats(kRound));
  Floats r = sub(x, mul(n, floats(0.693359375f)));
  r = add(r, mul(n, floats(2.12194440e-4f)));
  constexpr float kExp[] = {0.5f,           1.66666655e-1f, 4.16657959e-2f,
                            8.33345191e-3f, 1.39819995e-3f, 1.98756915e-4f};  // Cephes' expf
  const Floats y = add(add(mul(polynomial(r, kExp), mul(r, r)), r), floats(1));
  return mul(y, as_floats(shift_left<23>(as_ints(shifted))));
}

// 1 / (1 + e^-x) and, no less accurately, 1 minus that.
struct Sigmoid {
  Floats of, rest;
};

MEMTL_INLINE Sigmoid sigmoid(Floats x) {
  const Floats e = exp(sub(floats(0), magnitude(x)));
  const Floats upper = div(floats(1), add(floats(1), e)), lower = mul(e, upper);
  const Mask negative = is_negative(x);
  return {select(negative, lower, upper), select(negative, upper, lower)};
}

// The normal distribution function, and e^(-x^2 / 2).
struct Normal {
  Floats below, bell;
};

MEMTL_INLINE Normal normal(Floats x) {
  // What lies above |x| is the bell times t times this, a fit: off by 3e-8 of itself at most.
  constexpr float kTail[] = {0.10772018f,  0.10755051f, 0.10175916f,  0.0722403f,  0.10739941f,
                             -0.06862096f, 0.16929139f, -0.12625526f, 0.028915275f};
  const Floats size = magnitude(x);
  const Floats t = div(floats(1), add(floats(1), mul(size, floats(0.27f))));
  const Floats bell = exp(mul(mul(x, x), floats(-0.5f)));
  const Floats above = mul(mul(polynomial(t, kTail), t), bell);
  return {select(is_negative(x), above, sub(floats(1), above)), bell};
}

constexpr float kTanhRoot = 1.59576912f;  // 2 sqrt(2 / pi): tanh's argument, twice
constexpr float kTanhCube = 0.044715f;

// x is no less than -100, where all of them have come to zero.
template <Act kAct>
MEMTL_INLINE Floats activated(Floats x) {
  if constexpr (kAct == Act::gelu) return mul(x, normal(x).below);
  if constexpr (kAct == Act::gelu_tanh) {
    const Floats slope = add(mul(mul(x, x), floats(kTanhCube)), floats(1));
    return mul(x, sigmoid(mul(mul(x, slope), floats(kTanhRoot))).of);
  }
  if constexpr (kAct == Act::silu) return mul(x, sigmoid(x).of);
  if constexpr (kAct == Act::quick_gelu) return mul(x, sigmoid(mul(x, floats(1.702f))).of);
  if constexpr (kAct == Act::hardswish) {
    const Floats gate = min(floats(6), max(floats(0), add(x, floats(3))));
    return mul(x, mul(gate, floats(1.0f / 6)));
  }
  if constexpr (kAct == Act::mish) {  // tanh(log(1 + e^x)) = n / (n + 2), n = e^x (e^x + 2)
    const Floats e = exp(min(floats(20), x)), n = mul(e, add(e, floats(2)));
    return mul(x, div(n, add(n, floats(2))));
  }
}

// |x| is no more than 100, where all of them have come to 0 or 1.
template <Act kAct>
MEMTL_INLINE Floats derived(Floats x) {
  const Floats one = floats(1);
  if constexpr (kAct == Act::gelu) {
    const Normal at = normal(x);
    return add(at.below, mul(mul(x, floats(0.398942280f)), at.bell));
  }
  if constexpr (kAct == Act::gelu_tanh) {
    const Floats bent = mul(mul(x, x), floats(kTanhCube));
    const Floats argument = mul(x, floats(kTanhRoot));
    const Sigmoid s = sigmoid(mul(argument, add(bent, one)));
    const Floats slope = mul(argument, add(mul(bent, floats(3)), one));
    return mul(s.of, add(one, mul(slope, s.rest)));
  }
  if constexpr (kAct == Act::silu || kAct == Act::quick_gelu) {
    if constexpr (kAct == Act::quick_gelu) x = mul(x, floats(1.702f));
    const Sigmoid s = sigmoid(x);
    return mul(s.of, add(one, mul(x, s.rest)));
  }
  if constexpr (kAct == Act::hardswish) {  // at 3 and -3 torch has its 1 and 0
    const Mask outside = greater(as_ints(magnitude(x)), as_ints(floats(0x1.7ffffep1f)));
    const Floats inside = add(mul(x, floats(1.0f / 3)), floats(0.5f));
    const Floats y = select(outside, select(is_negative(x), floats(0), one), inside);
    return select(is_nan(x), x, y);
  }
  if constexpr (kAct == Act::mish) {
    const Floats e = exp(min(floats(20), x)), n = mul(e, add(e, floats(2)));
    const Floats inverse = div(one, add(n, floats(2)));
    const Floats bent = mul(mul(mul(x, floats(4)), mul(e, add(one, e))), mul(inverse, inverse));
    return add(mul(n, inverse), bent);
  }
}

}  // namespace
}  // namespace memtl::MEMTL_ISA_NS
