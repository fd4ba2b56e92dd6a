// Activations and their derivatives. The error is below 5e-7 * max(1, |x|), in a derivative below
// 5e-7; NaN stays NaN, infinities give the limits.
#pragma once

#include "cpu/quant_fused.h"
#include "cuda/quant_codes.cuh"

namespace memtl::cuda {

// 1 / b and a / b: CUDA's fast ones are off by 2 units, which is too much here, before a Newton
// step.
__device__ inline float reciprocal(float b) {
  const float y = __fdividef(1, b);
  return fmaf(y, fmaf(-b, y, 1), y);
}

__device__ inline float quotient(float a, float b) {
  const float inverse = reciprocal(b), y = a * inverse;
  return fmaf(inverse, fmaf(-b, y, a), y);
}

// 1 / (1 + e^-x) and, no less accurately, 1 minus that.
struct Sigmoid {
  float of, rest;
};

__device__ inline Sigmoid sigmoid(float x) {
  const float e = __expf(-fabsf(x));
  const float upper = reciprocal(1 + e), lower = e * upper;
  return x < 0 ? Sigmoid{lower, upper} : Sigmoid{upper, lower};
}

// The normal distribution function, and e^(-x^2 / 2).
struct Normal {
  float below, bell;
};

__device__ inline Normal normal(float x) {
  // What lies above |x| is the bell times t times this, a fit: off by 3e-8 of itself at most.
  constexpr float kTail[] = {0.10772018f,  0.10755051f, 0.10175916f,  0.0722403f,  0.10739941f,
                             -0.06862096f, 0.16929139f, -0.12625526f, 0.028915275f};
  const float t = reciprocal(fmaf(least(fabsf(x), 110), 0.27f, 1));
  const float bell = __expf(x * x * -0.5f);
  float tail = kTail[8];
  for (int i = 7; i >= 0; --i) tail = fmaf(tail, t, kTail[i]);
  const float above = tail * t * bell;
  return {x < 0 ? above : 1 - above, bell};
}

constexpr float kTanhRoot = 1.59576912f;  // 2 sqrt(2 / pi): tanh's argument, twice
constexpr float kTanhCube = 0.044715f;

// x is no less than -110, where all of them have come to zero.
template <Act kAct>
__device__ inline float activated(float x) {
  if constexpr (kAct == Act::gelu) return x * normal(x).below;
  if constexpr (kAct == Act::gelu_tanh) {
    return x * sigmoid(x * fmaf(x * x, kTanhCube, 1) * kTanhRoot).of;
  }
  if constexpr (kAct == Act::silu) return x * sigmoid(x).of;
  if constexpr (kAct == Act::quick_gelu) return x * sigmoid(x * 1.702f).of;
  if constexpr (kAct == Act::hardswish) return x * (fminf(6, fmaxf(0, x + 3)) * (1.0f / 6));
  if constexpr (kAct == Act::mish) {  // tanh(log(1 + e^x)) = n / (n + 2), n = e^x (e^x + 2)
    const float e = __expf(fminf(20, x)), n = e * (e + 2);
    return x * quotient(n, n + 2);
  }
}

// |x| is no more than 110, where all of them have come to 0 or 1.
template <Act kAct>
__device__ inline float derived(float x) {
  if constexpr (kAct == Act::gelu) {
    const Normal at = normal(x);
    return fmaf(x * 0.398942280f, at.bell, at.below);
  }
  if constexpr (kAct == Act::gelu_tanh) {
    const float bent = x * x * kTanhCube, argument = x * kTanhRoot;
    const Sigmoid s = sigmoid(fmaf(argument, bent, argument));
    const float slope = argument * fmaf(bent, 3, 1);
    return s.of * fmaf(slope, s.rest, 1);
  }
  if constexpr (kAct == Act::silu || kAct == Act::quick_gelu) {
    if constexpr (kAct == Act::quick_gelu) x *= 1.702f;
    const Sigmoid s = sigmoid(x);
    return s.of * fmaf(x, s.rest, 1);
  }
  if constexpr (kAct == Act::hardswish) {  // at 3 and -3 torch has its 1 and 0
    const float inside = x * (1.0f / 3) + 0.5f;
    return x >= 3 ? 1 : x <= -3 ? 0 : inside;
  }
  if constexpr (kAct == Act::mish) {
    const float e = __expf(fminf(20, x)), n = e * (e + 2), inverse = reciprocal(n + 2);
    return quotient(n, n + 2) + x * 4 * (e * (1 + e)) * (inverse * inverse);
  }
}

template <Act kAct, bool kDerived>
struct Curve {
  __device__ float operator()(float x) const {
    x = most(x, -110);
    return kDerived ? derived<kAct>(least(x, 110)) : activated<kAct>(x);
  }
};

// Calls run with the curve as a function of one number.
template <bool kDerived, class Run>
__device__ inline void with_curve(Act act, const Run& run) {
  switch (act) {
    case Act::gelu:
      return run(Curve<Act::gelu, kDerived>{});
    case Act::gelu_tanh:
      return run(Curve<Act::gelu_tanh, kDerived>{});
    case Act::silu:
      return run(Curve<Act::silu, kDerived>{});
    case Act::quick_gelu:
      return run(Curve<Act::quick_gelu, kDerived>{});
    case Act::hardswish:
      return run(Curve<Act::hardswish, kDerived>{});
    case Act::mish:
      return run(Curve<Act::mish, kDerived>{});
  }
}

}  // namespace memtl::cuda
