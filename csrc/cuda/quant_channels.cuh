// A number for each channel, where element i is of channel (i / inner) % channels.
#pragma once

#include "cuda/device.cuh"

namespace memtl::cuda {

// Divides by a number that the host knows: small dividends by a product, others the slow way.
class Division {
 public:
  explicit Division(int64_t divisor) : divisor_(divisor) {
    if (divisor > INT32_MAX) return;
    while (int64_t{1} << shift_ < divisor) ++shift_;
    const uint64_t power = uint64_t{1} << shift_;
    const auto d = static_cast<uint64_t>(divisor);
    factor_ = static_cast<uint32_t>(((power - d) << 32) / d + 1);
    small_ = INT32_MAX;
  }

  __device__ int64_t divisor() const { return divisor_; }

  __device__ int64_t quotient(int64_t x) const {
    if (x > small_) return x / divisor_;
    const auto part = static_cast<uint64_t>(x) * factor_ >> 32;
    return static_cast<uint32_t>(part + static_cast<uint64_t>(x)) >> shift_;
  }

 private:
  int64_t divisor_;
  int64_t small_ = -1;  // the largest dividend for which the product serves
  uint32_t factor_ = 0;
  int shift_ = 0;
};

// A channel's factor and summand; either may be null. Both begin at 16 bytes.
struct ChannelTables {
  const float* weight;
  const float* bias;
  Division channels;
  Division inner;
};

// Where four elements from a multiple of 4 on are among the channels.
class FourChannels {
 public:
  template <class Channels>
  __device__ FourChannels(const Channels& all, int64_t i)
      : channels_(all.channels.divisor()), inner_(all.inner.divisor()) {
    const int64_t plane = all.inner.quotient(i);
    within_ = i - plane * inner_;
    channel_ = plane - all.channels.quotient(plane) * channels_;
  }

  // Calls set(j, number) with the number that element j's channel has in a table.
  template <class T, class Set>
  __device__ void each(const T* __restrict__ table, const Set& set) const {
    if (within_ + 4 <= inner_) {
      const T one = table[channel_];
      for (int j = 0; j < 4; ++j) set(j, one);
      return;
    }
    if constexpr (sizeof(T) == 4) {
      if (inner_ == 1 && channels_ % 4 == 0) {  // so channel_ is a multiple of 4, as i is
        const auto four = load16(table + channel_);
        for (int j = 0; j < 4; ++j) set(j, four.at[j]);
        return;
      }
    }
    int64_t channel = channel_, within = within_;
    for (int j = 0; j < 4; ++j) {
      set(j, table[channel]);
      if (++within < inner_) continue;
      within = 0;
      channel = channel + 1 < channels_ ? channel + 1 : 0;
    }
  }

 private:
  int64_t channels_, inner_, channel_, within_;
};

}  // namespace memtl::cuda
