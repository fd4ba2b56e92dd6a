// The shim itself: barriers, exchanges in a warp, shared memory; and that races and what CUDA
// leaves undefined do not go unseen.
#include "tests/host_shim.h"
// The shim stands before the device code.
#include <sys/wait.h>
#include <unistd.h>

#include "cuda/device.cuh"
#include "tests/check.h"

namespace {

using namespace memtl;
using namespace memtl::tests;

// How run() ends in a process of its own, whose messages nobody reads.
template <class Run>
int status_of(const Run& run) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    run();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status;
}

// out[block] = the sum of the block's numbers, by a tree in shared memory.
__global__ void tree_kernel(const unsigned* x, unsigned* out) {
  MEMTL_SHARED(unsigned, sums, [128]);
  const unsigned i = threadIdx.x;
  sums[i] = x[blockIdx.x * blockDim.x + i];
  __syncthreads();
  for (unsigned step = blockDim.x / 2; step > 0; step /= 2) {
    if (i < step) sums[i] += sums[i + step];
    __syncthreads();
  }
  if (i == 0) out[blockIdx.x] = sums[0];
}

// The same without the barrier between two steps.
__global__ void racing_kernel(const unsigned* x, unsigned* out) {
  MEMTL_SHARED(unsigned, sums, [128]);
  const unsigned i = threadIdx.x;
  sums[i] = x[blockIdx.x * blockDim.x + i];
  for (unsigned step = blockDim.x / 2; step > 0; step /= 2) {
    if (i < step) sums[i] += sums[i + step];
  }
  if (i == 0) out[blockIdx.x] = sums[0];
}

void test_barrier() {
  Random random(1);
  const std::vector<unsigned> x = [&] {
    std::vector<unsigned> numbers(5 * 128);
    for (unsigned& each : numbers) each = random() % 1000;
    return numbers;
  }();
  int wrong = 0;
  in_orders([&] {
    std::vector<unsigned> out(5), raced(5);
    launch(&tree_kernel, {{5}, {128}}, x.data(), out.data());
    if (!kSeesRaces) launch(&racing_kernel, {{5}, {128}}, x.data(), raced.data());
    for (int b = 0; b < 5; ++b) {
      const unsigned sum = std::accumulate(x.begin() + 128 * b, x.begin() + 128 * (b + 1), 0u);
      CHECK(out[static_cast<size_t>(b)] == sum, "block %d", b);
      wrong += raced[static_cast<size_t>(b)] != sum;
    }
  });
  CHECK(wrong > 0, "a race that no order shows");
  if (!kSeesRaces) return;
  const int status = status_of([&] {
    std::vector<unsigned> raced(5);
    launch(&racing_kernel, {{5}, {128}}, x.data(), raced.data());
    std::exit(0);
  });
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 66, "a race that the sanitiser does not see");
}

// Prefix sums of a warp; ballots of half of its lanes; a value that travels around.
__global__ void warp_kernel(const unsigned* x, unsigned* prefix, unsigned* odd, double* rotated) {
  const unsigned i = threadIdx.x, lane = i % 32;
  unsigned sum = x[i];
  for (unsigned step = 1; step < 32; step *= 2) {
    const unsigned below = __shfl_up_sync(cuda::kAllLanes, sum, step);
    if (lane >= step) sum += below;
  }
  prefix[i] = sum;
  const unsigned half = lane < 16 ? 0x0000ffff : 0xffff0000;
  odd[i] = __ballot_sync(half, x[i] & 1);
  double value = x[i] / 3.0;
  for (int turn = 0; turn < 3; ++turn) {
    value = __shfl_sync(cuda::kAllLanes, value, static_cast<int>(lane + 1));
  }
  rotated[i] = value;
}

void test_warp() {
  Random random(2);
  std::vector<unsigned> x(96);
  for (unsigned& each : x) each = random() % 1000;
  in_orders([&] {
    std::vector<unsigned> prefix(96), odd(96);
    std::vector<double> rotated(96);
    launch(&warp_kernel, {{1}, {96}}, x.data(), prefix.data(), odd.data(), rotated.data());
    for (size_t i = 0; i < 96; ++i) {
      const size_t warp = i / 32 * 32, half = i / 16 * 16;
      unsigned sum = 0, bits = 0;
      for (size_t j = warp; j <= i; ++j) sum += x[j];
      for (size_t j = half; j < half + 16; ++j) bits |= (x[j] & 1) << (j % 32);
      CHECK(prefix[i] == sum, "lane %zu: %u", i, prefix[i]);
      CHECK(odd[i] == bits, "lane %zu: %x", i, odd[i]);
      CHECK(rotated[i] == x[warp + (i + 3) % 32] / 3.0, "lane %zu: %g", i, rotated[i]);
    }
  });
}

__global__ void atomic_kernel(int* total, int* largest, int* voted) {
  atomicAdd(total, static_cast<int>(threadIdx.x));
  atomicMax(largest, static_cast<int>(blockIdx.x * 100 + threadIdx.x));
  const int votes = __syncthreads_count(threadIdx.x % 3 == 0);
  if (threadIdx.x == 0) atomicAdd(voted, votes);
}

void test_atomics() {
  in_orders([&] {
    int total = 0, largest = 0, voted = 0;
    launch(&atomic_kernel, {{2, 2}, {40}}, &total, &largest, &voted);
    CHECK(total == 4 * 780 && largest == 139 && voted == 4 * 14, "%d %d %d", total, largest, voted);
  });
}

// Some threads have returned when the others meet.
__global__ void early_kernel(int* out) {
  if (threadIdx.x >= 40) return;
  MEMTL_SHARED(int, x, [64]);
  x[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = x[39 - threadIdx.x];
}

void test_threads_that_have_returned() {
  in_orders([&] {
    std::vector<int> out(64, -1);
    launch(&early_kernel, {{1}, {64}}, out.data());
    for (int i = 0; i < 64; ++i) {
      CHECK(out[static_cast<size_t>(i)] == (i < 40 ? 39 - i : -1), "thread %d", i);
    }
  });
}

__global__ void uninitialised_kernel(uint64_t* out) {
  MEMTL_SHARED(uint64_t, x, [32]);
  MEMTL_DYNAMIC_SHARED(bytes);
  if (threadIdx.x == 0) {
    *out = x[3] ^ *reinterpret_cast<uint64_t*>(bytes);
    x[3] = 0;
  }
}

void test_shared_memory_is_random_at_first() {
  uint64_t first = 0, second = 0;
  launch(&uninitialised_kernel, {{1}, {32}, 64}, &first);
  launch(&uninitialised_kernel, {{1}, {32}, 64}, &second);
  CHECK(first != second, "%lu", static_cast<unsigned long>(first));
}

__global__ void waiting_for_the_dead_kernel() {
  if (threadIdx.x == 5) return;
  __ballot_sync(cuda::kAllLanes, 1);
}
__global__ void crossing_kernel() {
  if (threadIdx.x < 16) {
    __ballot_sync(cuda::kAllLanes, 1);
  } else {
    __shfl_sync(cuda::kAllLanes, 1, 0);
  }
}
__global__ void outside_kernel() { __syncwarp(0x0000ffff); }
__global__ void beyond_kernel() {
  if (cuda::lane_of_thread() < 16) __shfl_sync(0x0000ffff, 1, 20);
}

void test_what_is_undefined(const char* what, void (*kernel)()) {
  const int status = status_of([&] { launch(kernel, {{1}, {32}}); });
  CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT, "%s goes unseen", what);
}

}  // namespace

int main() {
  test_barrier();
  test_warp();
  test_atomics();
  test_threads_that_have_returned();
  test_shared_memory_is_random_at_first();
  test_what_is_undefined("waiting for a lane that has ended", &waiting_for_the_dead_kernel);
  test_what_is_undefined("two calls that meet", &crossing_kernel);
  test_what_is_undefined("a lane that is not among those it calls for", &outside_kernel);
  test_what_is_undefined("reading a lane that brings nothing", &beyond_kernel);
  return finish("test_host_shim");
}
