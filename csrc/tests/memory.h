// Where the tests of CUDA kernels put tensors.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace memtl::tests {

// A copy of x that begins `shift` elements behind a place at 16 bytes, as a view may, in memory
// that ends where x does.
template <class T>
class Shifted {
 public:
  Shifted(const std::vector<T>& x, size_t shift) : all_(shift + x.size()), shift_(shift) {
    std::copy(x.begin(), x.end(), all_.begin() + static_cast<std::ptrdiff_t>(shift));
  }

  T* data() { return all_.data() + shift_; }

 private:
  std::vector<T> all_;
  size_t shift_;
};

// So many elements, 0 at first, of which only those that are touched take memory: for offsets
// beyond 32 bits.
template <class T>
class Huge {
 public:
  explicit Huge(int64_t numel) : bytes_(static_cast<size_t>(numel) * sizeof(T)) {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* data = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, kFlags, -1, 0);
    data_ = data == MAP_FAILED ? nullptr : static_cast<T*>(data);
  }
  Huge(const Huge&) = delete;
  Huge& operator=(const Huge&) = delete;
  ~Huge() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }

  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  size_t bytes_;
  T* data_;
};

}  // namespace memtl::tests
