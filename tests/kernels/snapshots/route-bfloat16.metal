// What the kernels share: the rows that a module serves, and the product of these rows with its weights.
//
// MLX puts its own utils.h in front (metal_stdlib, `using namespace metal`, bfloat16_t), and after this text the kernel:
// a signature that it writes itself and the body from up.metal, down.metal or route.metal. An input of fewer than 8
// elements arrives in the address space `constant`, any other in `device`, so helpers take pointers as template
// parameters and never name the address space.

#define DUO_UNROLL _Pragma("clang loop unroll(full)")

namespace duo {

static constant constexpr const int LANES = 32;  // of a simdgroup
static constant constexpr const int SIMDGROUPS = 2;  // of a threadgroup that multiplies
static constant constexpr const uint SMALL = 1;  // routes; every other value skips
static constant constexpr const uint BIG = 2;

// The rows that take a route, one bit each. ROWS is the number of rows rounded up to a power of two.
template <int ROWS, typename R>
inline uint rows_on(R route, int rows, uint which) {
  uint bits = 0;
  DUO_UNROLL
  for (int row = 0; row < ROWS; row++) {
    if (row < rows && route[row] == which) {
      bits |= 1u << row;
    }
  }
  return bits;
}

inline bool has(uint rows, int row) {
  return ((rows >> row) & 1u) != 0;
}

// As above for a product, which is made for some row: with a single one there is no question, and no branch.
template <int ROWS>
inline bool takes_part(uint rows, int row) {
  return ROWS == 1 || has(rows, row);
}

// One lane's share of the products with a float matrix [outputs, inputs], as below.
template <int ROWS, int COLUMNS, typename X, typename W>
inline void multiply_floats(X x, int stride, W weight, int inputs, int last, uint needed, int lane, thread float* sums) {
  constexpr int STEP = 4;
  int k = lane * STEP;
  for (; k + STEP <= inputs; k += LANES * STEP) {
    float weights[COLUMNS * STEP];  // read once, whatever the number of rows
    DUO_UNROLL
    for (int column = 0; column < COLUMNS; column++) {
      DUO_UNROLL
      for (int i = 0; i < STEP; i++) {
        weights[column * STEP + i] = static_cast<float>(weight[min(column, last) * inputs + k + i]);
      }
    }
    DUO_UNROLL
    for (int row = 0; row < ROWS; row++) {
      if (takes_part<ROWS>(needed, row)) {
        DUO_UNROLL
        for (int i = 0; i < STEP; i++) {
          const float value = static_cast<float>(x[row * stride + k + i]);
          DUO_UNROLL
          for (int column = 0; column < COLUMNS; column++) {
            sums[row * COLUMNS + column] += value * weights[column * STEP + i];
          }
        }
      }
    }
  }
  for (; k < inputs; k++) {  // what is left, less than a step, meets a single lane
    DUO_UNROLL
    for (int column = 0; column < COLUMNS; column++) {
      const float one = static_cast<float>(weight[min(column, last) * inputs + k]);
      DUO_UNROLL
      for (int row = 0; row < ROWS; row++) {
        if (takes_part<ROWS>(needed, row)) {
          sums[row * COLUMNS + column] += static_cast<float>(x[row * stride + k]) * one;
        }
      }
    }
  }
}

// One lane's share of the products with an affine matrix of 4 or 8 bits: w = scale * q + bias in groups of GROUP inputs,
// q from the lowest bits of a word upwards. A lane takes two words at a time, which lie within one group, so scale and
// bias are applied to sums: scale * (x . q) + bias * sum(x). q stays where it is in its word (a mask, no shift); x is
// divided by the power of two that this multiplies q by, which is exact.
template <int BITS, int GROUP, int ROWS, int COLUMNS, typename X, typename W, typename S>
inline void multiply_quantised(
    X x, int stride, W weight, S scales, S biases, int inputs, int last, uint needed, int lane, thread float* sums) {
  constexpr int WORDS = 2;
  constexpr int PER_WORD = 32 / BITS;
  constexpr int STEP = WORDS * PER_WORD;
  constexpr uint LOWEST = (1u << BITS) - 1;
  static_assert(GROUP % STEP == 0, "a lane's step lies within one group");
  const int words = inputs / PER_WORD;
  const int groups = inputs / GROUP;
  // inputs are whole groups, so whole steps
  for (int k = lane * STEP; k < inputs; k += LANES * STEP) {
    uint packed[COLUMNS * WORDS];  // read once, whatever the number of rows
    float scale[COLUMNS];
    float bias[COLUMNS];
    DUO_UNROLL
    for (int column = 0; column < COLUMNS; column++) {
      const int from = min(column, last);
      DUO_UNROLL
      for (int word = 0; word < WORDS; word++) {
        packed[column * WORDS + word] = weight[from * words + k / PER_WORD + word];
      }
      scale[column] = static_cast<float>(scales[from * groups + k / GROUP]);
      bias[column] = static_cast<float>(biases[from * groups + k / GROUP]);
    }
    DUO_UNROLL
    for (int row = 0; row < ROWS; row++) {
      if (takes_part<ROWS>(needed, row)) {
        float values[STEP];
        float total = 0;
        DUO_UNROLL
        for (int i = 0; i < STEP; i++) {
          const float value = static_cast<float>(x[row * stride + k + i]);
          total += value;
          values[i] = value * (1.0f / static_cast<float>(1u << (BITS * (i % PER_WORD))));
        }
        DUO_UNROLL
        for (int column = 0; column < COLUMNS; column++) {
          float dot = 0;
          DUO_UNROLL
          for (int i = 0; i < STEP; i++) {
            const uint q = packed[column * WORDS + i / PER_WORD] & (LOWEST << (BITS * (i % PER_WORD)));
            dot += values[i] * static_cast<float>(q);
          }
          sums[row * COLUMNS + column] += scale[column] * dot + bias[column] * total;
        }
      }
    }
  }
}

// sums[row * COLUMNS + i] = x[row] . weight[column + i], in every lane of the simdgroup, for the rows in `needed`, of
// which there is at least one; zero for others. BITS 0 is a float matrix. `x` has `stride` values a row; the matrix has
// `outputs` rows of `inputs`. Where fewer than COLUMNS rows are left of it, the last one is read in place of those that
// are not there (as in MLX's qmv_fast_impl), and their sums are for nobody.
template <int BITS, int GROUP, int ROWS, int COLUMNS, typename X, typename W, typename S>
inline void multiply(
    X x,
    int stride,
    W weight,
    S scales,
    S biases,
    int inputs,
    int outputs,
    int column,
    uint needed,
    int lane,
    thread float* sums) {
  const int last = min(COLUMNS, outputs - column) - 1;
  DUO_UNROLL
  for (int i = 0; i < ROWS * COLUMNS; i++) {
    sums[i] = 0;
  }
  if constexpr (BITS == 0) {
    auto from = weight + static_cast<size_t>(column) * inputs;
    multiply_floats<ROWS, COLUMNS>(x, stride, from, inputs, last, needed, lane, sums);
  } else {
    const size_t group = static_cast<size_t>(column) * (inputs / GROUP);
    auto from = weight + static_cast<size_t>(column) * (inputs / (32 / BITS));
    multiply_quantised<BITS, GROUP, ROWS, COLUMNS>(
        x, stride, from, scales + group, biases + group, inputs, last, needed, lane, sums);
  }
  DUO_UNROLL
  for (int row = 0; row < ROWS; row++) {
    if (takes_part<ROWS>(needed, row)) {  // the same for all lanes
      DUO_UNROLL
      for (int i = 0; i < COLUMNS; i++) {
        sums[row * COLUMNS + i] = simd_sum(sums[row * COLUMNS + i]);
      }
    }
  }
}

}  // namespace duo

// route: the logits of a router and their argmax, one threadgroup a row.
//
// All sums are in float. The barrier is reached by every thread.

template <int GROUPS, int CHOICES>
[[kernel]] void custom_kernel_duo_route__3_2_bfloat16_t_bfloat16_t_floatc_uint32_tc_uint32_t(
  const device bfloat16_t* x [[buffer(0)]],
  const constant int* x_shape [[buffer(1)]],
  const device bfloat16_t* weight [[buffer(2)]],
  const constant float* offsets [[buffer(3)]],
  const constant uint32_t* choices [[buffer(4)]],
  device uint32_t* route [[buffer(5)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
const int hidden = x_shape[1];
const int start = threadgroup_position_in_grid.x * hidden;
const int group = simdgroup_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
threadgroup float parts[CHOICES * GROUPS];

float sums[CHOICES];
DUO_UNROLL
for (int choice = 0; choice < CHOICES; choice++) {
  sums[choice] = 0;
}
for (int i = group * duo::LANES + lane; i < hidden; i += GROUPS * duo::LANES) {
  const float value = static_cast<float>(x[start + i]);
  DUO_UNROLL
  for (int choice = 0; choice < CHOICES; choice++) {
    sums[choice] += value * static_cast<float>(weight[choice * hidden + i]);
  }
}
DUO_UNROLL
for (int choice = 0; choice < CHOICES; choice++) {
  const float sum = simd_sum(sums[choice]);
  if (lane == 0) {
    parts[choice * GROUPS + group] = sum;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (group != 0) {
  return;
}
int taken = 0;
float best = 0;
for (int choice = 0; choice < CHOICES; choice++) {
  const float logit = simd_sum(lane < GROUPS ? parts[choice * GROUPS + lane] : 0.0f) + offsets[choice];
  if (choice == 0 || logit > best) {  // the first of equals, as mx.argmax
    best = logit;
    taken = choice;
  }
}
if (lane == 0) {
  route[threadgroup_position_in_grid.x] = choices[taken];
}

}

template [[host_name("custom_kernel_duo_route__3_2_bfloat16_t_bfloat16_t_floatc_uint32_tc_uint32_t")]] [[kernel]] decltype(custom_kernel_duo_route__3_2_bfloat16_t_bfloat16_t_floatc_uint32_tc_uint32_t<3, 2>) custom_kernel_duo_route__3_2_bfloat16_t_bfloat16_t_floatc_uint32_tc_uint32_t<3, 2>;

