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

// up: inner = activation(x gate + bias) * (x up + bias) of the module that a row's route names, and zeros elsewhere.
//
// A module of two matrices has no gate: inner = activation(x up + bias).
//
// A simdgroup makes COLUMNS columns of all rows. It reads the weights of a module only if some row needs it, and then
// once for all of these. Simdgroups never wait for each other: there is no barrier.

namespace duo {

static constant constexpr const int SILU = 0;  // activations, in the order of duo_mlx.forms.ACTIVATIONS
static constant constexpr const int GELU_TANH = 1;
static constant constexpr const int GELU = 2;
static constant constexpr const int GELU_FAST = 3;
static constant constexpr const int RELU = 4;
static constant constexpr const int RELU2 = 5;

// As MLX's Sigmoid: the exponential is of a positive number, so that nothing becomes inf / inf.
inline float sigmoid(float x) {
  const float part = 1 / (1 + metal::precise::exp(metal::abs(x)));
  return x < 0 ? part : 1 - part;
}

// Polynomials as in MLX's erf.h.
inline float error_function(float x) {
  const float t = metal::abs(x);
  const float s = x * x;
  if (t > 0.927734375f) {
    float r = (-1.72853470e-5f * t + 3.83197126e-4f) * s + (-3.88396438e-3f * t + 2.42546219e-2f);
    r = ((r * t - 1.06777877e-1f) * t - 6.34846687e-1f) * t - 1.28717512e-1f;
    r = 1 - metal::precise::exp(r * t - t);
    return x < 0 ? -r : r;
  }
  float r = (-5.96761703e-4f * s + 4.99119423e-3f) * s - 2.67681349e-2f;
  r = ((r * s + 1.12819925e-1f) * s - 3.76125336e-1f) * s + 1.28379166e-1f;
  return r * x + x;
}

template <int ACTIVATION>
inline float activate(float x) {
  if constexpr (ACTIVATION == SILU) {
    return x * sigmoid(x);
  } else if constexpr (ACTIVATION == GELU_TANH) {
    return 0.5f * x * (1 + metal::precise::tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
  } else if constexpr (ACTIVATION == GELU) {
    return 0.5f * x * (1 + error_function(x * 0.7071067812f));
  } else if constexpr (ACTIVATION == GELU_FAST) {
    return x * sigmoid(1.702f * x);
  } else {
    static_assert(ACTIVATION == RELU || ACTIVATION == RELU2, "an activation that is known");
    const float positive = x < 0 ? 0.0f : x;  // NaN stays
    return ACTIVATION == RELU ? positive : positive * positive;
  }
}

template <
    typename T,
    int ACTIVATION,
    bool GATED,
    int BITS,
    int GROUP,
    bool BIAS,
    int ROWS,
    int COLUMNS,
    typename X,
    typename GW,
    typename GS,
    typename GB,
    typename W,
    typename S,
    typename B,
    typename Y>
inline void up_columns(
    X x,
    GW gate,
    GS gate_scales,
    GS gate_biases,
    GB gate_bias,
    W up,
    S up_scales,
    S up_biases,
    B up_bias,
    int hidden,
    int width,
    int column,
    uint needed,
    int lane,
    Y inner,
    int stride) {
  float ups[ROWS * COLUMNS];
  multiply<BITS, GROUP, ROWS, COLUMNS>(x, hidden, up, up_scales, up_biases, hidden, width, column, needed, lane, ups);
  float gates[GATED ? ROWS * COLUMNS : 1];
  if constexpr (GATED) {
    multiply<BITS, GROUP, ROWS, COLUMNS>(
        x, hidden, gate, gate_scales, gate_biases, hidden, width, column, needed, lane, gates);
  }
  if (lane != 0) {
    return;
  }
  DUO_UNROLL
  for (int row = 0; row < ROWS; row++) {
    DUO_UNROLL
    for (int i = 0; i < COLUMNS; i++) {
      if (has(needed, row) && column + i < width) {
        float value = ups[row * COLUMNS + i];
        if constexpr (BIAS) {
          value += static_cast<float>(up_bias[column + i]);
        }
        if constexpr (GATED) {
          float g = gates[row * COLUMNS + i];
          if constexpr (BIAS) {
            g += static_cast<float>(gate_bias[column + i]);
          }
          value *= activate<ACTIVATION>(g);
        } else {
          value = activate<ACTIVATION>(value);
        }
        inner[row * stride + column + i] = static_cast<T>(value);
      }
    }
  }
}

}  // namespace duo

template <typename T, int ROWS, int COLUMNS, bool SHARED, int BIG_BITS, int BIG_GROUP, bool BIG_BIAS, int SMALL_BITS, int SMALL_GROUP, bool SMALL_BIAS, int BIG_ACTIVATION, bool BIG_GATED, int SMALL_ACTIVATION, bool SMALL_GATED>
[[kernel]] void custom_kernel_duo_up__bfloat16_t_2_4_0_4_32_0_0_0_0_5_0_5_1_bfloat16_t_uint32_tc_bfloat16_tc_bfloat16_tc_bfloat16_tc_bfloat16_tc_uint32_t_bfloat16_t_bfloat16_t_bfloat16_tc_bfloat16_t_bfloat16_tc_bfloat16_tc_bfloat16_tc_bfloat16_t_bfloat16_tc_bfloat16_tc_bfloat16_tc_bfloat16_t(
  const device bfloat16_t* x [[buffer(0)]],
  const constant int* x_shape [[buffer(1)]],
  const constant uint32_t* route [[buffer(2)]],
  const constant bfloat16_t* big_gate [[buffer(3)]],
  const constant bfloat16_t* big_gate_scales [[buffer(4)]],
  const constant bfloat16_t* big_gate_biases [[buffer(5)]],
  const constant bfloat16_t* big_gate_bias [[buffer(6)]],
  const device uint32_t* big_up [[buffer(7)]],
  const constant int* big_up_shape [[buffer(8)]],
  const device bfloat16_t* big_up_scales [[buffer(9)]],
  const device bfloat16_t* big_up_biases [[buffer(10)]],
  const constant bfloat16_t* big_up_bias [[buffer(11)]],
  const device bfloat16_t* small_gate [[buffer(12)]],
  const constant bfloat16_t* small_gate_scales [[buffer(13)]],
  const constant bfloat16_t* small_gate_biases [[buffer(14)]],
  const constant bfloat16_t* small_gate_bias [[buffer(15)]],
  const device bfloat16_t* small_up [[buffer(16)]],
  const constant int* small_up_shape [[buffer(17)]],
  const constant bfloat16_t* small_up_scales [[buffer(18)]],
  const constant bfloat16_t* small_up_biases [[buffer(19)]],
  const constant bfloat16_t* small_up_bias [[buffer(20)]],
  device bfloat16_t* inner [[buffer(21)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
const int rows = x_shape[0];
const int hidden = x_shape[1];
const int big_width = big_up_shape[0];
const int small_width = small_up_shape[0];
const int lane = thread_index_in_simdgroup;
const int column = (threadgroup_position_in_grid.x * duo::SIMDGROUPS + simdgroup_index_in_threadgroup) * COLUMNS;
if (column >= big_width) {  // the same for all lanes
  return;
}
uint big = duo::rows_on<ROWS>(route, rows, duo::BIG);
uint small = duo::rows_on<ROWS>(route, rows, duo::SMALL);
if constexpr (SHARED) {  // small is another word for big
  big |= small;
  small = 0;
}
if (column >= small_width) {
  small = 0;
}
if (big != 0) {
  duo::up_columns<T, BIG_ACTIVATION, BIG_GATED, BIG_BITS, BIG_GROUP, BIG_BIAS, ROWS, COLUMNS>(
      x, big_gate, big_gate_scales, big_gate_biases, big_gate_bias, big_up, big_up_scales, big_up_biases, big_up_bias,
      hidden, big_width, column, big, lane, inner, big_width);
}
if (small != 0) {
  duo::up_columns<T, SMALL_ACTIVATION, SMALL_GATED, SMALL_BITS, SMALL_GROUP, SMALL_BIAS, ROWS, COLUMNS>(
      x, small_gate, small_gate_scales, small_gate_biases, small_gate_bias, small_up, small_up_scales, small_up_biases,
      small_up_bias, hidden, small_width, column, small, lane, inner, big_width);
}
if (lane == 0) {  // outputs come uninitialised
  for (int row = 0; row < rows; row++) {
    const int from = duo::has(big, row) ? big_width : duo::has(small, row) ? small_width : 0;
    for (int i = max(column, from); i < min(column + COLUMNS, big_width); i++) {
      inner[row * big_width + i] = static_cast<T>(0.0f);
    }
  }
}

}

template [[host_name("custom_kernel_duo_up__bfloat16_t_2_4_0_4_32_0_0_0_0_5_0_5_1_bfloat16_t_uint32_tc_bfloat16_tc_bfloat16_tc_bfloat16_tc_bfloat16_tc_uint32_t_bfloat16_t_bfloat16_t_bfloat16_tc_bfloat16_t_bfloat16_tc_bfloat16_tc_bfloat16_tc_bfloat16_t_bfloat16_tc_bfloat16_tc_bfloat16_tc_bfloat16_t")]] [[kernel]] decltype(custom_kernel_duo_up__bfloat16_t_2_4_0_4_32_0_0_0_0_5_0_5_1_bfloat16_t_uint32_tc_bfloat16_tc_bfloat16_tc_bfloat16_tc_bfloat16_tc_uint32_t_bfloat16_t_bfloat16_t_bfloat16_tc_bfloat16_t_bfloat16_tc_bfloat16_tc_bfloat16_tc_bfloat16_t_bfloat16_tc_bfloat16_tc_bfloat16_tc_bfloat16_t<bfloat16_t, 2, 4, 0, 4, 32, 0, 0, 0, 0, 5, 0, 5, 1>) custom_kernel_duo_up__bfloat16_t_2_4_0_4_32_0_0_0_0_5_0_5_1_bfloat16_t_uint32_tc_bfloat16_tc_bfloat16_tc_bfloat16_tc_bfloat16_tc_uint32_t_bfloat16_t_bfloat16_t_bfloat16_tc_bfloat16_t_bfloat16_tc_bfloat16_tc_bfloat16_tc_bfloat16_t_bfloat16_tc_bfloat16_tc_bfloat16_tc_bfloat16_t<bfloat16_t, 2, 4, 0, 4, 32, 0, 0, 0, 0, 5, 0, 5, 1>;

