// The shim's tensor cores: a plain product of matrices, in fragments as PTX lays them out and in
// those that load_transposed gives; and copies that nobody waits for.
#include "tests/host_shim.h"
// The shim stands before its parts and the device code.
#include "tests/host_tensor_core.h"
// The parts stand before the device code.
#include "cuda/tensor_core.cuh"
#include "tests/check.h"

namespace {

using namespace memtl;
using namespace memtl::tests;

template <class T>
T small(Random& random) {
  return cuda::from_math<T>(static_cast<float>(static_cast<int>(random() % 17) - 8));
}

template <class T>
uint32_t pair(const T& low, const T& high) {
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

// c += a [16, 16] b [16, 8], fragments by the tables of the PTX manual.
template <class T>
__global__ void by_manual_kernel(const T* a, const T* b, float* c) {
  const unsigned lane = threadIdx.x, group = lane >> 2, in_group = lane % 4;
  uint32_t left[4], right[2];
  for (unsigned i = 0; i < 8; i += 2) {
    const unsigned row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
    const unsigned column = in_group * 2 + (i < 4 ? 0 : 8);
    left[i / 2] = pair(a[row * 16 + column], a[row * 16 + column + 1]);
  }
  for (unsigned i = 0; i < 4; i += 2) {
    const unsigned row = in_group * 2 + (i < 2 ? 0 : 8);
    right[i / 2] = pair(b[row * 8 + group], b[(row + 1) * 8 + group]);
  }
  float sums[4];
  for (unsigned i = 0; i < 4; ++i) {
    sums[i] = c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + i % 2];
  }
  cuda::mma_16x8x16(T{}, sums, left, right[0], right[1]);
  for (unsigned i = 0; i < 4; ++i) {
    c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + i % 2] = sums[i];
  }
}

// c = transposed(a) b, a and b [16, 16], through shared memory.
template <class T>
__global__ void by_loading_kernel(const T* a, const T* b, float* c) {
  MEMTL_SHARED(T, left, [16][16]);
  MEMTL_SHARED(T, right, [16][16]);
  const unsigned lane = threadIdx.x, row = lane / 2, column = lane % 2 * 8;
  cuda::copy16_async(&left[row][column], a + row * 16 + column, true);
  cuda::copy16_async(&right[row][column], b + row * 16 + column, true);
  cuda::await_copies();
  __syncwarp();
  uint32_t left_part[4], right_part[4];
  cuda::load_transposed(left_part, &left[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
  cuda::load_transposed(right_part, &right[lane % 16][lane / 16 * 8]);
  for (unsigned part = 0; part < 2; ++part) {
    float sums[4] = {};
    cuda::mma_16x8x16(T{}, sums, left_part, right_part[2 * part], right_part[2 * part + 1]);
    for (unsigned i = 0; i < 4; ++i) {
      c[(lane / 4 + i / 2 * 8) * 16 + part * 8 + lane % 4 * 2 + i % 2] = sums[i];
    }
  }
}

template <class T>
void test_products(const char* type) {
  Random random(3);
  std::vector<T> a(256), b(128), square(256);
  for (auto* x : {&a, &b, &square}) {
    for (T& each : *x) each = small<T>(random);
  }
  const std::vector<float> before = [&] {
    std::vector<float> x(128);
    for (float& each : x) each = static_cast<float>(random() % 100);
    return x;
  }();
  in_orders([&] {
    std::vector<float> c = before, product(256);
    launch(&by_manual_kernel<T>, {{1}, {32}}, a.data(), b.data(), c.data());
    launch(&by_loading_kernel<T>, {{1}, {32}}, a.data(), square.data(), product.data());
    for (size_t i = 0; i < 16; ++i) {
      for (size_t j = 0; j < 16; ++j) {
        float first = j < 8 ? before[i * 8 + j] : 0, second = 0;
        for (size_t k = 0; k < 16; ++k) {
          if (j < 8) first += cuda::to_math(a[i * 16 + k]) * cuda::to_math(b[k * 8 + j]);
          second += cuda::to_math(a[k * 16 + i]) * cuda::to_math(square[k * 16 + j]);
        }
        if (j < 8) CHECK(c[i * 8 + j] == first, "%s, sum %zu, %zu: %g", type, i, j, c[i * 8 + j]);
        CHECK(product[i * 16 + j] == second, "%s, loaded %zu, %zu", type, i, j);
      }
    }
  });
}

__global__ void copy_kernel(const uint16_t* x, uint16_t* early, uint16_t* late) {
  MEMTL_SHARED(uint16_t, copied, [32][8]);
  const unsigned i = threadIdx.x;
  for (unsigned j = 0; j < 8; ++j) copied[i][j] = 7;
  cuda::copy16_async(copied[i], x + 8 * i, i % 3 != 0);
  early[i] = copied[i][5];
  cuda::await_copies();
  late[i] = copied[i][5];
}

void test_copies() {
  alignas(16) uint16_t x[256];
  for (unsigned i = 0; i < 256; ++i) x[i] = static_cast<uint16_t>(1000 + i);
  uint16_t early[32], late[32];
  launch(&copy_kernel, {{1}, {32}}, x, early, late);
  for (unsigned i = 0; i < 32; ++i) {
    CHECK(early[i] == 7, "a copy that nobody waited for: %d", early[i]);
    CHECK(late[i] == (i % 3 == 0 ? 0 : 1000 + 8 * i + 5), "thread %u: %d", i, late[i]);
  }
}

}  // namespace

int main() {
  test_products<cuda::BFloat16>("bfloat16");
  test_products<cuda::Half>("half");
  test_copies();
  return finish("test_host_tensor_core");
}
