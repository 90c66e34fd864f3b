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

// ---- body ----
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
