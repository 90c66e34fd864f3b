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

// down: out = inner down (+ bias) of the module that a row's route names, and zeros where it skips.
//
// Divided up as up.metal is: a simdgroup makes COLUMNS columns of all rows, and there is no barrier.

namespace duo {

template <
    typename T,
    int BITS,
    int GROUP,
    bool BIAS,
    int ROWS,
    int COLUMNS,
    typename X,
    typename W,
    typename S,
    typename B,
    typename Y>
inline void down_columns(
    X inner,
    int stride,
    W weight,
    S scales,
    S biases,
    B bias,
    int inputs,
    int hidden,
    int column,
    uint needed,
    int lane,
    Y out) {
  float sums[ROWS * COLUMNS];
  multiply<BITS, GROUP, ROWS, COLUMNS>(
      inner, stride, weight, scales, biases, inputs, hidden, column, needed, lane, sums);
  if (lane != 0) {
    return;
  }
  DUO_UNROLL
  for (int row = 0; row < ROWS; row++) {
    DUO_UNROLL
    for (int i = 0; i < COLUMNS; i++) {
      if (has(needed, row) && column + i < hidden) {
        float sum = sums[row * COLUMNS + i];
        if constexpr (BIAS) {
          sum += static_cast<float>(bias[column + i]);
        }
        out[row * hidden + column + i] = static_cast<T>(sum);
      }
    }
  }
}

}  // namespace duo

template <typename T, int ROWS, int COLUMNS, bool SHARED, int BIG_BITS, int BIG_GROUP, bool BIG_BIAS, int SMALL_BITS, int SMALL_GROUP, bool SMALL_BIAS>
[[kernel]] void custom_kernel_duo_down__float16_t_8_2_0_8_32_0_0_0_0_float16_t_uint32_t_uint32_t_float16_t_float16_t_float16_tc_float16_t_float16_tc_float16_tc_float16_tc_float16_t(
  const device float16_t* inner [[buffer(0)]],
  const constant int* inner_shape [[buffer(1)]],
  const device uint32_t* route [[buffer(2)]],
  const device uint32_t* big_down [[buffer(3)]],
  const constant int* big_down_shape [[buffer(4)]],
  const device float16_t* big_down_scales [[buffer(5)]],
  const device float16_t* big_down_biases [[buffer(6)]],
  const constant float16_t* big_down_bias [[buffer(7)]],
  const device float16_t* small_down [[buffer(8)]],
  const constant int* small_down_shape [[buffer(9)]],
  const constant float16_t* small_down_scales [[buffer(10)]],
  const constant float16_t* small_down_biases [[buffer(11)]],
  const constant float16_t* small_down_bias [[buffer(12)]],
  device float16_t* out [[buffer(13)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
const int rows = inner_shape[0];
const int big_width = inner_shape[1];
const int small_width = SMALL_BITS == 0 ? small_down_shape[1] : small_down_shape[1] * 32 / max(SMALL_BITS, 1);
const int hidden = big_down_shape[0];
const int lane = thread_index_in_simdgroup;
const int column = (threadgroup_position_in_grid.x * duo::SIMDGROUPS + simdgroup_index_in_threadgroup) * COLUMNS;
if (column >= hidden) {  // the same for all lanes
  return;
}
uint big = duo::rows_on<ROWS>(route, rows, duo::BIG);
uint small = duo::rows_on<ROWS>(route, rows, duo::SMALL);
if constexpr (SHARED) {  // small is another word for big
  big |= small;
  small = 0;
}
if (big != 0) {
  duo::down_columns<T, BIG_BITS, BIG_GROUP, BIG_BIAS, ROWS, COLUMNS>(
      inner, big_width, big_down, big_down_scales, big_down_biases, big_down_bias, big_width, hidden, column, big, lane,
      out);
}
if (small != 0) {
  duo::down_columns<T, SMALL_BITS, SMALL_GROUP, SMALL_BIAS, ROWS, COLUMNS>(
      inner, big_width, small_down, small_down_scales, small_down_biases, small_down_bias, small_width, hidden, column,
      small, lane, out);
}
if (lane == 0) {  // outputs come uninitialised
  for (int row = 0; row < rows; row++) {
    if (!duo::has(big | small, row)) {
      for (int at = row * hidden + column; at < row * hidden + min(column + COLUMNS, hidden); at++) {
        out[at] = static_cast<T>(0.0f);
      }
    }
  }
}

}

template [[host_name("custom_kernel_duo_down__float16_t_8_2_0_8_32_0_0_0_0_float16_t_uint32_t_uint32_t_float16_t_float16_t_float16_tc_float16_t_float16_tc_float16_tc_float16_tc_float16_t")]] [[kernel]] decltype(custom_kernel_duo_down__float16_t_8_2_0_8_32_0_0_0_0_float16_t_uint32_t_uint32_t_float16_t_float16_t_float16_tc_float16_t_float16_tc_float16_tc_float16_tc_float16_t<float16_t, 8, 2, 0, 8, 32, 0, 0, 0, 0>) custom_kernel_duo_down__float16_t_8_2_0_8_32_0_0_0_0_float16_t_uint32_t_uint32_t_float16_t_float16_t_float16_tc_float16_t_float16_tc_float16_tc_float16_tc_float16_t<float16_t, 8, 2, 0, 8, 32, 0, 0, 0, 0>;

