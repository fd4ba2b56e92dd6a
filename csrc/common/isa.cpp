#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace memtl {
namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512};
constexpr int kUnset = -1;
std::atomic<int> current{kUnset};

bool built(Isa wanted) {
  switch (wanted) {
    MEMTL_IF_AVX512(case Isa::avx512 : return true;)
    MEMTL_IF_AVX2(case Isa::avx2 : return true;)
    default:
      return wanted == Isa::portable;
  }
}

bool machine_runs(Isa wanted) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  switch (wanted) {
    case Isa::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
    case Isa::avx2:
      return avx2;
    default:
      return true;
  }
#else
  return wanted == Isa::portable;
#endif
}

std::string usable() {
  std::string names;
  for (Isa each : kAll) {
    if (available(each)) names += (names.empty() ? "" : ", ") + std::string(name(each));
  }
  return names;
}

Isa require(Isa wanted) {
  if (!available(wanted)) {
    throw std::invalid_argument(std::string("instruction set ") + name(wanted) +
                                (built(wanted) ? ": this machine lacks it" : " was not built") +
                                "; usable here: " + usable());
  }
  return wanted;
}

Isa initial() {
  const char* spelled = std::getenv("MEMTL_ISA");
  if (spelled == nullptr || *spelled == '\0') return detected();
  try {
    return require(parse_isa(spelled));
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string("MEMTL_ISA=") + spelled + ": " + error.what());
  }
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

Isa parse_isa(const char* spelled) {
  for (Isa each : kAll) {
    if (std::strcmp(spelled, name(each)) == 0) return each;
  }
  throw std::invalid_argument(std::string("expected portable, avx2 or avx512, got '") + spelled +
                              "'");
}

bool available(Isa wanted) { return built(wanted) && machine_runs(wanted); }

Isa detected() {
  if (available(Isa::avx512)) return Isa::avx512;
  return available(Isa::avx2) ? Isa::avx2 : Isa::portable;
}

Isa isa() {
  int value = current.load(std::memory_order_relaxed);
  if (value == kUnset) {
    const int first = static_cast<int>(initial());
    // A set_isa that came in between stays.
    if (current.compare_exchange_strong(value, first)) value = first;
  }
  return static_cast<Isa>(value);
}

void set_isa(Isa wanted) { current.store(static_cast<int>(require(wanted))); }

}  // namespace memtl
