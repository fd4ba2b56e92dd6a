// What the operators of every family need of torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <string>

#include "common/layout.h"

#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)  // its name in torch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace memtl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// What was given, for an error message: "float32 [2, 3]".
inline std::string describe(const Tensor& x) {
  std::string text = torch::headeronly::toString(x.scalar_type());
  text += " [";
  for (int64_t i = 0; i < x.dim(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(x.size(i));
  }
  return text + "]";
}

inline DType floating(const char* op, const char* tensor, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, op, ": expected ", tensor,
                      " in float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(dtype));
  }
  return DType::f32;
}

// bits_apply's bits: a byte for 8 elements of x, beside it.
inline void check_bits_of(const char* op, const Tensor& x, const Tensor& bits) {
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Byte, op, ": expected bits of uint8, got ",
                  describe(bits));
  STD_TORCH_CHECK(bits.is_cpu() == x.is_cpu() && bits.get_device_index() == x.get_device_index(),
                  op, ": expected bits on the device of x");
  STD_TORCH_CHECK(bits.numel() == ceil_div(x.numel(), 8), op, ": x ", describe(x), " needs ",
                  ceil_div(x.numel(), 8), " bytes of bits, got ", describe(bits));
}

// Elements a thread should have at least, so that starting it pays.
constexpr int64_t kGrain = 1 << 15;

// Calls run(i) for every i in [0, tasks), in parallel; who is free takes the next.
template <class Run>
void for_tasks(int64_t tasks, const Run& run) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) run(i);
  });
}

}  // namespace memtl
