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

// ---- body ----
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
