// Names and types of Metal's address spaces for clang's syntax check: each is a type of its own, as for Metal's
// compiler, which is a clang too. The source is what MLX prints, unchanged.

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup static __attribute__((address_space(3)))
#define thread

typedef unsigned int uint;
typedef unsigned int uint32_t;
typedef __SIZE_TYPE__ size_t;
typedef _Float16 half;
typedef _Float16 float16_t;
typedef _Float16 bfloat16_t;  // clang's own has no arithmetic
struct uint3 {
  uint x, y, z;
};

namespace metal {
template <typename T>
T min(T a, T b);
template <typename T>
T max(T a, T b);
float abs(float);
namespace precise {
float exp(float);
float tanh(float);
}  // namespace precise
float simd_sum(float);
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);
}  // namespace metal
using namespace metal;
