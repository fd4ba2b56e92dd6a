// Compiles a .cuh file as C++ and runs its kernels on the CPU. Include it before the .cuh.
//
// The threads of a block are fibers; each runs until it waits for others, at a barrier or where a
// warp exchanges something. Whoever comes next is chosen by the order in force: forward, backward,
// or by chance. A result that depends on it is a race, so a test runs in every order (in_orders).
// Blocks run one after the other, in that order too; no block may wait for another.
//
// What CUDA leaves undefined ends the program and says why: a warp's lanes that meet in different
// calls, a lane that is waited for and has ended, threads that wait for ever. Shared memory and
// what it holds at first (random bytes) are checked by the sanitisers, being memory of its own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <tuple>
#include <vector>

#include "tests/fiber.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// The two ways in which device code declares shared memory; see cuda/device.cuh.
#define MEMTL_SHARED(type, name, extents) \
  using name##_type = type extents;       \
  name##_type& name = memtl::tests::shared<name##_type>([] {})
#define MEMTL_DYNAMIC_SHARED(name) unsigned char* name = memtl::tests::dynamic_shared()

namespace memtl::tests {

struct Dim3 {
  unsigned x = 1;
  unsigned y = 1;
  unsigned z = 1;

  unsigned count() const { return x * y * z; }
  Dim3 at(unsigned i) const { return {i % x, i / x % y, i / x / y}; }
};

enum class Order { forward, backward, random };

}  // namespace memtl::tests

inline memtl::tests::Dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace memtl::tests {

inline Order order = Order::forward;
inline std::mt19937 chance(7);

// Calls run() once for every order in which threads and blocks may take turns.
template <class Run>
void in_orders(const Run& run) {
  for (Order each : {Order::forward, Order::backward, Order::random}) {
    order = each;
    run();
  }
  order = Order::forward;
}

inline std::vector<unsigned> turns(unsigned count) {
  std::vector<unsigned> all(count);
  std::iota(all.begin(), all.end(), 0u);
  if (order == Order::backward) std::reverse(all.begin(), all.end());
  if (order == Order::random) std::shuffle(all.begin(), all.end(), chance);
  return all;
}

[[noreturn]] inline void undefined(const char* what) {
  std::fprintf(stderr, "block (%u, %u, %u), thread (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y,
               blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, what);
  std::abort();
}

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

// Lanes of a warp that exchange something. What each has brought stays until all have taken it.
struct Meeting {
  unsigned mask;
  unsigned arrived = 0;
  unsigned left = 0;
  const char* call = nullptr;
  uint64_t brought[kWarp] = {};
};

inline char begun, ended, fence;  // where threads are ordered: by a launch, by fences

// The block that is running.
class Block {
 public:
  // Runs body() as every thread of a block.
  void run(Dim3 size, size_t dynamic_bytes, const std::function<void()>& body) {
    threads_ = size.count();
    live_ = threads_;
    body_ = &body;
    while (fibers_.size() < threads_) fibers_.push_back(std::make_unique<Fiber>());
    meetings_.clear();
    meetings_.resize((threads_ + kWarp - 1) / kWarp);
    barrier_ = {};
    pieces_.clear();
    dynamic_ = random_bytes(dynamic_bytes);
    for (unsigned i = 0; i < threads_; ++i) {
      fibers_[i]->start([](void* block) { static_cast<Block*>(block)->work(); }, this);
    }
    // By chance some warps are late: they have a turn only where all others wait.
    const uint32_t late = order == Order::random ? static_cast<uint32_t>(chance()) : 0;
    for (bool everyone = true; live_ > 0; everyone = !moved_) {
      moved_ = false;
      for (unsigned i : turns(threads_)) {
        if (fibers_[i]->ended() || (!everyone && late >> (i / kWarp % 32) & 1)) continue;
        thread_ = i;
        threadIdx = size.at(i);
        fibers_[i]->resume();
        if (fibers_[i]->ended()) {
          --live_;
          moved_ = true;
          open_barrier();
        }
      }
      if (!moved_ && everyone) {
        undefined("it and all others wait for a thread that has ended, or for ever");
      }
    }
  }

  ~Block() {
    const Unseen shim;
    fibers_.clear();
  }

  unsigned thread() const { return thread_; }
  unsigned char* dynamic() { return dynamic_.get(); }

  // Memory of this block, the same for all threads, told apart by key.
  void* piece(const void* key, size_t bytes) {
    const Unseen shim;
    for (auto& [known, memory] : pieces_) {
      if (known == key) return memory.get();
    }
    pieces_.emplace_back(key, random_bytes(bytes));
    return pieces_.back().second.get();
  }

  // Waits for all threads that have not ended; returns how many of them brought `true`.
  unsigned synchronize(bool brought) {
    const Unseen shim;
    const unsigned round = barrier_.round;
    publish(&rounds_[round % 2]);
    ++barrier_.arrived;
    barrier_.counted += brought;
    moved_ = true;
    open_barrier();
    wait([&] { return barrier_.round != round; });
    observe(&rounds_[round % 2]);
    return barrier_.result;
  }

  // Brings a value to the lanes of a mask and takes take(what each of them brought).
  template <class Take>
  auto meet(const char* call, unsigned mask, uint64_t value, const Take& take,
            bool orders = false) {
    const Unseen shim;
    const unsigned lane = thread_ % kWarp, bit = 1u << lane;
    if (!(mask & bit)) undefined("a lane calls for others and is not among them");
    Meeting& meeting = find(mask);
    wait([&] { return !(meeting.arrived & bit); });
    if (meeting.arrived == 0) meeting.call = call;
    if (std::strcmp(meeting.call, call) != 0) undefined("lanes of a warp meet in different calls");
    if (orders) publish(&meeting);
    meeting.brought[lane] = value;
    meeting.arrived |= bit;
    moved_ = true;
    wait([&] { return meeting.arrived == mask; });
    if (orders) observe(&meeting);
    const auto taken = take(meeting.brought);
    meeting.left |= bit;
    if (meeting.left == mask) meeting.arrived = meeting.left = 0;
    moved_ = true;
    return taken;
  }

 private:
  struct Barrier {
    unsigned arrived = 0, counted = 0, result = 0, round = 0;
  };

  void work() {
    observe(&begun);
    (*body_)();
    publish(&ended);
  }

  template <class Condition>
  void wait(const Condition& condition) {
    const unsigned self = thread_;
    const Dim3 index = threadIdx;
    while (!condition()) {
      Fiber::suspend();
      thread_ = self;
      threadIdx = index;
    }
  }

  void open_barrier() {
    if (barrier_.arrived == 0 || barrier_.arrived != live_) return;
    barrier_.result = barrier_.counted;
    barrier_.arrived = barrier_.counted = 0;
    ++barrier_.round;
  }

  Meeting& find(unsigned mask) {
    // Pointers to meetings are held while others are added.
    auto& all = meetings_[thread_ / kWarp];
    for (auto& each : all) {
      if (each->mask == mask) return *each;
    }
    all.push_back(std::make_unique<Meeting>(Meeting{mask}));
    return *all.back();
  }

  static std::unique_ptr<unsigned char[]> random_bytes(size_t count) {
    auto bytes = std::make_unique_for_overwrite<unsigned char[]>(count);
    for (size_t i = 0; i < count; ++i) bytes[i] = static_cast<unsigned char>(chance() >> 8);
    return bytes;
  }

  char rounds_[2] = {};  // where threads are ordered by a barrier
  unsigned threads_ = 0, live_ = 0, thread_ = 0;
  bool moved_ = false;
  const std::function<void()>* body_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::vector<std::unique_ptr<Meeting>>> meetings_;  // of each warp
  Barrier barrier_;
  std::vector<std::pair<const void*, std::unique_ptr<unsigned char[]>>> pieces_;
  std::unique_ptr<unsigned char[]> dynamic_;
};

inline Block running;

template <class Tag>
inline char shared_key = 0;

template <class T, class Tag>
T& shared(Tag) {
  return *static_cast<T*>(running.piece(&shared_key<Tag>, sizeof(T)));
}

inline unsigned char* dynamic_shared() { return running.dynamic(); }

struct Launch {
  Dim3 grid;
  Dim3 block;
  size_t shared_bytes = 0;  // dynamic ones
};

template <class... Parameters, class... Arguments>
void run_block(void (*kernel)(Parameters...), Launch launch, Dim3 index, Arguments... arguments) {
  gridDim = launch.grid;
  blockDim = launch.block;
  blockIdx = index;
  const std::function<void()> body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  running.run(launch.block, launch.shared_bytes, body);
}

// Calls run(), which runs blocks: after what was done before, and before what is done afterwards.
template <class Run>
void ordered(const Run& run) {
  publish(&begun);
  {
    const Unseen shim;
    run();
  }
  observe(&ended);
}

// One block of kernel<<<grid, block, shared_bytes>>>(arguments...), of however large a grid.
template <class... Parameters, class... Arguments>
void launch_block(void (*kernel)(Parameters...), Launch launch, Dim3 index,
                  Arguments... arguments) {
  ordered([&] { run_block(kernel, launch, index, arguments...); });
}

// kernel<<<grid, block, shared_bytes>>>(arguments...)
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Launch launch, Arguments... arguments) {
  ordered([&] {
    for (unsigned b : turns(launch.grid.count())) {
      run_block(kernel, launch, launch.grid.at(b), arguments...);
    }
  });
}

// What is not an integer of 64 bits travels in one.
template <class T>
uint64_t packed(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T unpacked(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T, class Source>
T shuffled(const char* call, unsigned mask, T value, const Source& source) {
  const unsigned self = running.thread() % kWarp, lane = source(self);
  if (lane < kWarp && !(mask & (1u << lane))) undefined("a lane reads one that brings nothing");
  return running.meet(call, mask, packed(value), [&](const uint64_t* brought) {
    return unpacked<T>(brought[lane < kWarp ? lane : self]);
  });
}

template <class T, class Join>
T joined(const char* call, unsigned mask, T value, const Join& join) {
  return running.meet(call, mask, packed(value), [&](const uint64_t* brought) {
    T all{};
    bool any = false;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(mask & (1u << lane))) continue;
      all = any ? join(all, unpacked<T>(brought[lane])) : unpacked<T>(brought[lane]);
      any = true;
    }
    return all;
  });
}

}  // namespace memtl::tests

// ------------------------------------------------------------------------- CUDA's own names

inline void __syncthreads() { memtl::tests::running.synchronize(false); }
inline int __syncthreads_count(int x) {
  return static_cast<int>(memtl::tests::running.synchronize(x != 0));
}
inline int __syncthreads_or(int x) { return __syncthreads_count(x) != 0; }
inline void __threadfence() {
  memtl::tests::publish(&memtl::tests::fence);
  memtl::tests::observe(&memtl::tests::fence);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return memtl::tests::running.meet("ballot", mask, predicate != 0, [&](const uint64_t* brought) {
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (mask >> lane & 1) bits |= static_cast<unsigned>(brought[lane]) << lane;
    }
    return bits;
  });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}
inline void __syncwarp(unsigned mask = 0xffffffff) {
  memtl::tests::running.meet("syncwarp", mask, 0, [](const uint64_t*) { return 0; }, true);
}

// As in CUDA, lanes are counted within segments of `width`, and a lane beyond gives one's own.
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return memtl::tests::shuffled("shfl", mask, value, [&](unsigned self) {
    const auto size = static_cast<unsigned>(width);
    return self / size * size + static_cast<unsigned>(lane) % size;
  });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return memtl::tests::shuffled("shfl_xor", mask, value, [&](unsigned self) {
    const auto size = static_cast<unsigned>(width);
    const unsigned lane = self ^ static_cast<unsigned>(bits);
    return lane / size == self / size ? lane : self;
  });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return memtl::tests::shuffled("shfl_up", mask, value, [&](unsigned self) {
    return self % static_cast<unsigned>(width) >= delta ? self - delta : self;
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return memtl::tests::shuffled("shfl_down", mask, value, [&](unsigned self) {
    const auto size = static_cast<unsigned>(width);
    return self % size + delta < size ? self + delta : self;
  });
}

template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return memtl::tests::joined("reduce_add", mask, value, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return memtl::tests::joined("reduce_max", mask, value, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return memtl::tests::joined("reduce_min", mask, value, [](T a, T b) { return a < b ? a : b; });
}

// Nobody comes in between.
template <class T, class U>
T atomicAdd(T* at, U value) {
  const memtl::tests::Unseen shim;
  const T before = *at;
  *at = static_cast<T>(before + static_cast<T>(value));
  return before;
}
template <class T, class U>
T atomicMax(T* at, U value) {
  const memtl::tests::Unseen shim;
  const T before = *at;
  *at = std::max(before, static_cast<T>(value));
  return before;
}
template <class T, class U>
T atomicOr(T* at, U value) {
  const memtl::tests::Unseen shim;
  const T before = *at;
  *at = before | static_cast<T>(value);
  return before;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __uint_as_float(unsigned x) {
  return memtl::tests::unpacked<float>(memtl::tests::packed(x));
}
inline unsigned __float_as_uint(float x) {
  return memtl::tests::unpacked<unsigned>(memtl::tests::packed(x));
}
template <class T>
T __ldg(const T* at) {
  return *at;
}

// As far off as CUDA's documentation lets them be, by chance to either side.
namespace memtl::tests {
inline float off_by(float x, float units) {
  const Unseen shim;
  if (x == 0 || !std::isfinite(x)) return x;
  return x + x * (chance() % 2 ? units : -units) * 0x1p-23f;
}
}  // namespace memtl::tests
inline float __expf(float x) {
  return memtl::tests::off_by(std::exp(x), 2 + std::floor(std::fabs(1.173f * x)));
}
inline float __fdividef(float x, float y) { return memtl::tests::off_by(x / y, 2); }

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// A sum, which may wrap around, and a choice.
inline int __viaddmin_s32_relu(int a, int b, int c) {
  const auto sum = static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
  return std::max(std::min(sum, c), 0);
}

namespace memtl::tests {
template <class Choose>
unsigned of_halves(unsigned a, unsigned b, unsigned c, const Choose& choose) {
  unsigned both = 0;
  for (int shift : {0, 16}) {
    const auto half = [&](unsigned x) { return static_cast<int16_t>(x >> shift); };
    const auto sum = static_cast<int16_t>(half(a) + half(b));
    both |= static_cast<unsigned>(static_cast<uint16_t>(choose(sum, half(c)))) << shift;
  }
  return both;
}
}  // namespace memtl::tests
inline unsigned __viaddmax_s16x2(unsigned a, unsigned b, unsigned c) {
  return memtl::tests::of_halves(a, b, c, [](int x, int y) { return std::max(x, y); });
}
inline unsigned __viaddmin_s16x2_relu(unsigned a, unsigned b, unsigned c) {
  return memtl::tests::of_halves(a, b, c, [](int x, int y) { return std::max(std::min(x, y), 0); });
}
