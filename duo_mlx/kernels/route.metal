// route: RMSNorm, the router's logits and their argmax, one threadgroup a row.
//
// The logits are of the normalised values as they are rounded to T, which is what a router outside the kernel sees. All
// sums are in float. Both barriers are reached by every thread.

// ---- body ----
const int hidden = h_shape[1];
const int start = threadgroup_position_in_grid.x * hidden;
const int group = simdgroup_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int first = group * duo::LANES + lane;
threadgroup float squares[GROUPS];
threadgroup float parts[CHOICES * GROUPS];

float square = 0;
for (int i = first; i < hidden; i += GROUPS * duo::LANES) {
  const float value = static_cast<float>(h[start + i]);
  square += value * value;
}
square = simd_sum(square);
if (lane == 0) {
  squares[group] = square;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
square = simd_sum(lane < GROUPS ? squares[lane] : 0.0f);
const float factor = metal::precise::rsqrt(square / hidden + eps[0]);

float sums[CHOICES];
DUO_UNROLL
for (int choice = 0; choice < CHOICES; choice++) {
  sums[choice] = 0;
}
for (int i = first; i < hidden; i += GROUPS * duo::LANES) {
  const T value = static_cast<T>(static_cast<float>(norm[i]) * (static_cast<float>(h[start + i]) * factor));
  normed[start + i] = value;
  DUO_UNROLL
  for (int choice = 0; choice < CHOICES; choice++) {
    sums[choice] += static_cast<float>(value) * static_cast<float>(weight[choice * hidden + i]);
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
