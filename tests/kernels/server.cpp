// Runs kernels that were compiled as shared objects: one fibre a lane, threadgroup after threadgroup. A lane runs until
// it meets a simdgroup operation or a barrier and goes on when all lanes that must meet it have; if one of them ended or
// waits elsewhere, that is a fault. Lanes, simdgroups and threadgroups run forwards, backwards or shuffled, a simdgroup
// as far as it can before the next one moves: what depends on that is a race. Requests come on stdin and answers go to stdout (see emulator.py); the process ends with stdin.

#include <dlfcn.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "metal.h"

namespace {

constexpr int SIMD = 32;
constexpr std::size_t STACK = 256 * 1024;

enum class State { ready, simd, barrier, done };

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  void* fake_stack = nullptr;
  State state = State::done;
  int line = 0;  // of the operation that it waits at
  emulator::Lane lane;
};

using Kernel = void (*)(emulator::Buffer*);

ucontext_t scheduler;
const void* scheduler_bottom = nullptr;
std::size_t scheduler_size = 0;
std::vector<std::unique_ptr<Fibre>> fibres;
Fibre* current = nullptr;
Kernel running = nullptr;
emulator::Buffer* arguments = nullptr;
uint32_t brought[1024];  // to a simdgroup operation, by lane
uint32_t given[1024];  // back from it
std::string error;

void fail(const std::string& what) {
  if (error.empty()) {
    error = what;
  }
}

void leave(State state, int line) {
  Fibre* self = current;
  self->state = state;
  self->line = line;
  void** keep = state == State::done ? nullptr : &self->fake_stack;
  __sanitizer_start_switch_fiber(keep, scheduler_bottom, scheduler_size);
  swapcontext(&self->context, &scheduler);
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
}

void begin() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
  running(arguments);
  leave(State::done, 0);
}

void resume(Fibre& fibre) {
  current = &fibre;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fibre.stack.get(), STACK);
  swapcontext(&scheduler, &fibre.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  current = nullptr;
}

std::string describe(const Fibre& fibre) {
  const std::string lane = "lane " + std::to_string(fibre.lane.thread_index_in_threadgroup);
  switch (fibre.state) {
    case State::simd:
      return lane + " waits at a simdgroup operation (line " + std::to_string(fibre.line) + ")";
    case State::barrier:
      return lane + " waits at a barrier (line " + std::to_string(fibre.line) + ")";
    default:
      return lane + " has ended";
  }
}

// Lets lanes [from, to) go on if all of them wait at the same operation of a kind.
bool release(int from, int to, State kind) {
  for (int i = from; i < to; i++) {
    if (fibres[i]->state != kind || fibres[i]->line != fibres[from]->line) {
      return false;
    }
  }
  for (int i = from; i < to; i++) {
    given[i] = brought[i];
    fibres[i]->state = State::ready;
  }
  return true;
}

void start(Fibre& fibre, int index, uint3 position, uint3 size) {
  const uint i = static_cast<uint>(index);
  const uint x = i % size.x, y = i / size.x % size.y, z = i / size.x / size.y;
  fibre.lane = {
      position,
      {position.x * size.x + x, position.y * size.y + y, position.z * size.z + z},
      i,
      i / SIMD,
      i % SIMD,
  };
  fibre.state = State::ready;
  ASAN_UNPOISON_MEMORY_REGION(fibre.stack.get(), STACK);  // of a lane that was given up
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack.get();
  fibre.context.uc_stack.ss_size = STACK;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, begin, 0);
}

// 0 to count - 1: forwards, backwards, or shuffled.
std::vector<int> ordered(int count, int order, std::mt19937& random) {
  std::vector<int> indices(count);
  for (int i = 0; i < count; i++) {
    indices[i] = order == 1 ? count - 1 - i : i;
  }
  if (order == 2) {
    std::shuffle(indices.begin(), indices.end(), random);
  }
  return indices;
}

// One simdgroup until it cannot go on by itself; shuffled, for one step only. Whether it moved at all.
bool advance(int simdgroup, int lanes, int order, std::mt19937& random) {
  const int from = simdgroup * SIMD, to = std::min(from + SIMD, lanes);
  bool moved = false;
  do {
    for (int i : ordered(to - from, order, random)) {
      if (fibres[from + i]->state == State::ready) {
        resume(*fibres[from + i]);
        moved = true;
      }
    }
  } while (release(from, to, State::simd) && order != 2);
  return moved;
}

void run_threadgroup(uint3 position, uint3 size, int order, std::mt19937& random) {
  const int lanes = static_cast<int>(size.x * size.y * size.z);
  for (int i = 0; i < lanes; i++) {
    start(*fibres[i], i, position, size);
  }
  bool moved = true;
  while (moved) {
    moved = false;
    for (int simdgroup : ordered((lanes + SIMD - 1) / SIMD, order, random)) {
      moved = advance(simdgroup, lanes, order, random) || moved;
    }
    moved = release(0, lanes, State::barrier) || moved;
  }
  // nobody can go on: all have ended, or lanes have diverged
  for (int i = 0; i < lanes; i++) {
    for (int j = 0; j < lanes; j++) {
      const Fibre &waiting = *fibres[i], &other = *fibres[j];
      if (waiting.state != State::done && (other.state != waiting.state || other.line != waiting.line)) {
        return fail("divergence: " + describe(waiting) + ", " + describe(other));
      }
    }
  }
}

void run(uint3 grid, uint3 size, int order, uint seed) {
  std::mt19937 random(seed);
  while (fibres.size() < size.x * size.y * size.z) {
    fibres.push_back(std::make_unique<Fibre>());
  }
  const uint3 groups{grid.x / size.x, grid.y / size.y, grid.z / size.z};
  for (int index : ordered(static_cast<int>(groups.x * groups.y * groups.z), order, random)) {
    const uint i = static_cast<uint>(index);
    const uint3 position{i % groups.x, i / groups.x % groups.y, i / groups.x / groups.y};
    run_threadgroup(position, size, order, random);
    if (!error.empty()) {
      return;
    }
  }
}

void read_exactly(void* into, std::size_t bytes) {
  if (bytes != 0 && std::fread(into, bytes, 1, stdin) != 1) {
    std::exit(0);
  }
}

template <typename T>
T read_value() {
  T value;
  read_exactly(&value, sizeof value);
  return value;
}

template <typename T>
void write_value(T value) {
  std::fwrite(&value, sizeof value, 1, stdout);
}

uint3 read_uint3() {
  uint3 value;
  read_exactly(&value, sizeof value);
  return value;
}

Kernel load(const std::string& path) {
  static std::map<std::string, Kernel> loaded;
  if (loaded.find(path) == loaded.end()) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      std::fprintf(stderr, "%s\n", dlerror());
      std::abort();
    }
    loaded[path] = reinterpret_cast<Kernel>(dlsym(library, "emulated_kernel"));
  }
  return loaded[path];
}

void serve_one() {
  std::string path(read_value<uint32_t>(), ' ');
  read_exactly(&path[0], path.size());
  const int order = static_cast<int>(read_value<uint32_t>());
  const uint seed = read_value<uint32_t>();
  const uint3 grid = read_uint3();
  const uint3 size = read_uint3();
  const uint32_t count = read_value<uint32_t>();
  // Each buffer is an allocation of its exact size, so that the address sanitiser guards its ends too.
  std::vector<std::unique_ptr<char[]>> data;
  std::vector<std::unique_ptr<uint8_t[]>> touched;
  std::vector<emulator::Buffer> buffers;
  std::vector<std::size_t> outputs;  // bytes, 0 for an input
  for (uint32_t i = 0; i < count; i++) {
    const bool output = read_value<uint32_t>() != 0;
    const std::size_t bytes = read_value<uint64_t>();
    const long elements = static_cast<long>(read_value<uint64_t>());
    data.emplace_back(new char[bytes]);
    touched.emplace_back(new uint8_t[elements]());
    if (output) {
      std::memset(data.back().get(), 0xff, bytes);  // NaN in every float type
    } else {
      read_exactly(data.back().get(), bytes);
    }
    buffers.push_back({data.back().get(), elements, touched.back().get(), 0, 0});
    outputs.push_back(output ? bytes : 0);
  }
  error.clear();
  arguments = buffers.data();
  running = load(path);
  run(grid, size, order, seed);

  write_value(static_cast<uint32_t>(error.size()));
  std::fwrite(error.data(), 1, error.size(), stdout);
  for (uint32_t i = 0; i < count; i++) {
    const emulator::Buffer& buffer = buffers[i];
    write_value(static_cast<uint64_t>(std::count(buffer.touched, buffer.touched + buffer.elements, 1)));
    write_value(static_cast<uint64_t>(buffer.reads));
    write_value(static_cast<uint64_t>(buffer.writes));
    std::fwrite(buffer.data, 1, outputs[i], stdout);
  }
  std::fflush(stdout);
}

}  // namespace

namespace emulator {

const Lane& lane() { return current->lane; }

void fault(const char* what, long at, long of) {
  fail(std::string("out of bounds: ") + what + " of element " + std::to_string(at) + " of " + std::to_string(of));
}

const uint32_t* exchange(uint32_t value, int line) {
  const uint index = current->lane.thread_index_in_threadgroup;
  brought[index] = value;
  leave(State::simd, line);
  return given + index / SIMD * SIMD;
}

void barrier(int line) { leave(State::barrier, line); }

}  // namespace emulator

int main() {
  for (;;) {
    serve_one();
  }
}
