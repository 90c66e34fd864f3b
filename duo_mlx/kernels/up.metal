// up: inner = silu(x gate + bias) * (x up + bias) of the module that a row's route names, and zeros elsewhere.
//
// A simdgroup makes COLUMNS columns of all rows. It reads the weights of a module only if some row needs it, and then
// once for all of these. Simdgroups never wait for each other: there is no barrier.

namespace duo {

// As MLX's Sigmoid: the exponential is of a positive number, so that nothing becomes inf / inf.
inline float silu(float x) {
  const float part = 1 / (1 + metal::precise::exp(metal::abs(x)));
  return x * (x < 0 ? part : 1 - part);
}

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
inline void up_columns(
    X x,
    W gate,
    S gate_scales,
    S gate_biases,
    B gate_bias,
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
  float gates[ROWS * COLUMNS];
  float ups[ROWS * COLUMNS];
  multiply<BITS, GROUP, ROWS, COLUMNS>(
      x, hidden, gate, gate_scales, gate_biases, hidden, width, column, needed, lane, gates);
  multiply<BITS, GROUP, ROWS, COLUMNS>(x, hidden, up, up_scales, up_biases, hidden, width, column, needed, lane, ups);
  if (lane != 0) {
    return;
  }
  DUO_UNROLL
  for (int row = 0; row < ROWS; row++) {
    DUO_UNROLL
    for (int i = 0; i < COLUMNS; i++) {
      if (has(needed, row) && column + i < width) {
        float g = gates[row * COLUMNS + i];
        float u = ups[row * COLUMNS + i];
        if constexpr (BIAS) {
          g += static_cast<float>(gate_bias[column + i]);
          u += static_cast<float>(up_bias[column + i]);
        }
        inner[row * stride + column + i] = static_cast<T>(silu(g) * u);
      }
    }
  }
}

}  // namespace duo

// ---- body ----
const int rows = x_shape[0];
const int hidden = x_shape[1];
const int big_width = big_gate_shape[0];
const int small_width = small_gate_shape[0];
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
  duo::up_columns<T, BIG_BITS, BIG_GROUP, BIG_BIAS, ROWS, COLUMNS>(
      x, big_gate, big_gate_scales, big_gate_biases, big_gate_bias, big_up, big_up_scales, big_up_biases, big_up_bias,
      hidden, big_width, column, big, lane, inner, big_width);
}
if (small != 0) {
  duo::up_columns<T, SMALL_BITS, SMALL_GROUP, SMALL_BIAS, ROWS, COLUMNS>(
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
