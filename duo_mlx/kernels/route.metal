// route: the logits of a router and their argmax, one threadgroup a row.
//
// All sums are in float. The barrier is reached by every thread.

// ---- body ----
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
