// What Metal supplies to a kernel, for C++17: one fibre a lane in server.cpp, in lock-step at simdgroup operations and
// barriers. A kernel is compiled with this in front (see emulator.py) and loaded by the server.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

using uint = unsigned int;
struct uint3 {
  uint x, y, z;
};

namespace emulator {

// One argument of a kernel, with a count of what happened to each element.
struct Buffer {
  char* data;
  long elements;
  uint8_t* touched;  // by element, whether it was read or written
  long reads;
  long writes;
};

struct Lane {
  uint3 threadgroup_position_in_grid;
  uint3 thread_position_in_grid;
  uint thread_index_in_threadgroup;
  uint simdgroup_index_in_threadgroup;
  uint thread_index_in_simdgroup;
};

// In server.cpp. `exchange` gives the 32 values that the lanes of a simdgroup brought to the same operation.
const Lane& lane();
void fault(const char* what, long at, long of);
const uint32_t* exchange(uint32_t value, int line);
void barrier(int line);

// Pointers whose every access is checked and counted; not inlined, which the compiler would take long over.
template <typename T>
class Pointer {
 public:
  explicit Pointer(Buffer& buffer, long start = 0) : buffer(&buffer), start(start) {}
  Pointer operator+(std::size_t by) const { return Pointer(*buffer, start + static_cast<long>(by)); }

 protected:
  T* element(long at) const {
    at += start;
    if (at < 0 || at >= buffer->elements) {
      return nullptr;
    }
    buffer->touched[at] = 1;
    return reinterpret_cast<T*>(buffer->data) + at;
  }
  Buffer* buffer;
  long start;
};

template <typename T>
class In : public Pointer<T> {
 public:
  using Pointer<T>::Pointer;
  In(Pointer<T> pointer) : Pointer<T>(pointer) {}
  In operator+(std::size_t by) const { return In(Pointer<T>::operator+(by)); }
  __attribute__((noinline)) T operator[](long at) const {
    this->buffer->reads++;
    if (const T* found = this->element(at)) {
      return *found;
    }
    fault("read", this->start + at, this->buffer->elements);
    return T();
  }
};

template <typename T>
class Out : public Pointer<T> {
 public:
  using Pointer<T>::Pointer;
  __attribute__((noinline)) T& operator[](long at) const {
    this->buffer->writes++;
    if (T* found = this->element(at)) {
      return *found;
    }
    fault("write", this->start + at, this->buffer->elements);
    static T nowhere;
    return nowhere;
  }
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

// Both 16-bit types convert explicitly only, which is stricter than Metal (half converts by itself).
struct half {
  uint16_t bits;
  half() = default;
  explicit half(float value) {
    const uint32_t given = emulator::bits_of(value);
    const uint32_t sign = (given >> 16) & 0x8000u;
    const uint32_t rest = given & 0x7fffffffu;
    uint32_t result;
    if (rest > 0x7f800000u) {
      result = 0x7e00u;  // NaN
    } else if (rest >= 0x477ff000u) {
      result = 0x7c00u;  // rounds to infinity
    } else if (rest >= 0x38800000u) {  // normal: rebias the exponent, round off 13 bits to nearest even
      result = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
    } else {  // subnormal: in units of 2^-24, which the addition of 1/2 rounds to; its unit in float is 2^-24
      result = emulator::bits_of(emulator::float_of(rest) + 0.5f) - 0x3f000000u;
    }
    bits = static_cast<uint16_t>(sign | result);
  }
  explicit operator float() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t exponent = (bits >> 10) & 0x1fu;
    const uint32_t fraction = bits & 0x3ffu;
    if (exponent == 0) {
      const float value = static_cast<float>(fraction) * 0x1p-24f;
      return sign ? -value : value;
    }
    const uint32_t high = exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23;
    return emulator::float_of(sign | high | (fraction << 13));
  }
};

struct bfloat {
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float value) {
    const uint32_t given = emulator::bits_of(value);
    if ((given & 0x7fffffffu) > 0x7f800000u) {
      bits = static_cast<uint16_t>((given >> 16) | 0x40u);  // NaN, and stays one
    } else {
      bits = static_cast<uint16_t>((given + 0x7fffu + ((given >> 16) & 1u)) >> 16);
    }
  }
  explicit operator float() const { return emulator::float_of(static_cast<uint32_t>(bits) << 16); }
};

using float16_t = half;
using bfloat16_t = bfloat;

namespace metal {

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline float abs(float x) { return std::fabs(x); }

namespace precise {
inline float exp(float x) { return std::exp(x); }
inline float tanh(float x) { return std::tanh(x); }
}  // namespace precise

// Summed in the order of the lanes, so that a result does not depend on the order in which lanes ran.
inline float simd_sum(float value, int line = __builtin_LINE()) {
  const uint32_t* values = emulator::exchange(emulator::bits_of(value), line);
  float sum = 0;
  for (int lane = 0; lane < 32; lane++) {
    sum += emulator::float_of(values[lane]);
  }
  return sum;
}

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
inline void threadgroup_barrier(mem_flags, int line = __builtin_LINE()) { emulator::barrier(line); }

}  // namespace metal

using namespace metal;

// Kernels' parameters become In and Out; helpers take pointers as template parameters. One threadgroup runs at a time,
// so a static variable is memory that its lanes share.
#define constant
#define device
#define thread
#define threadgroup static
