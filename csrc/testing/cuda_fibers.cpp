#include "testing/cuda_fibers.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <queue>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "testing/cuda_shared.h"
#include "testing/cuda_stacks.h"

namespace cuda_on_cpu {

Current current;

namespace {

constexpr size_t kMostShared = 227 << 10;

struct NamedBarrier {
  int threads = 0, arrived = 0;
  std::vector<int> waiting;
};

struct Thread {
  std::unique_ptr<Stack> stack = std::make_unique<Stack>();
  uint3 index{};
  const Meeting* waits_for = nullptr;
  int named = -1;  // the barrier it waits for
  uint64_t priority = 0;
  bool done = false;
};

struct Machine {
  std::mutex in_use;
  uint64_t seed = 0;
  std::mt19937_64 random;
  std::vector<Thread> threads;                 // as many as a block has had
  std::vector<std::vector<Meeting*>> pending;  // by warp; the block's at the end
  std::vector<std::unique_ptr<Meeting>> meetings;
  std::vector<Meeting*> idle;  // those of them that nobody uses
  std::vector<NamedBarrier> named;
  using Key = std::pair<uint64_t, int>;
  std::priority_queue<Key, std::vector<Key>, std::greater<Key>> ready;
  uint64_t made_ready = 0;
  int size = 0, live = 0, running = -1;
  std::string error;
  void (*call)(const void*) = nullptr;
  const void* arguments = nullptr;
};
Machine machine;

// Behind all others and those that were made ready so before, if `last`.
void make_ready(int t, bool last = false) {
  Thread& thread = machine.threads[static_cast<size_t>(t)];
  thread.waits_for = nullptr;
  thread.named = -1;
  uint64_t key = machine.made_ready++;
  if (last) {
    key |= uint64_t{1} << 63;
  } else if (machine.seed != 0) {
    key = (machine.seed % 2 == 1 ? machine.random() : thread.priority) >> 1;
  }
  machine.ready.emplace(key, t);
}

void leave_to_scheduler(bool last = false) {
  machine.threads[static_cast<size_t>(machine.running)].stack->exit(last);
}

std::string at(Site site) {
  const std::string file = site.file;
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(site.line);
}

bool same(const Meeting& m, const char* what, Site site) {
  return strcmp(m.what, what) == 0 && m.site.line == site.line &&
         strcmp(m.site.file, site.file) == 0;
}

// The meeting of this call that is under way, or a new one.
Meeting* join(std::vector<Meeting*>* pending, const char* what, uint32_t mask, Site site) {
  for (Meeting* m : *pending) {
    if (m->mask != mask) continue;
    if (same(*m, what, site)) return m;
    const std::string text = std::string("others wait in ") + m->what + " at " + at(m->site) +
                             ", where this thread calls " + what;
    fail(text.c_str(), site);
  }
  if (machine.idle.empty()) {
    machine.meetings.push_back(std::make_unique<Meeting>());
    machine.idle.push_back(machine.meetings.back().get());
  }
  Meeting* m = machine.idle.back();
  machine.idle.pop_back();
  m->what = what;
  m->site = site;
  m->mask = mask;
  m->arrived = 0;
  m->threads = m->leaving = m->count = 0;
  pending->push_back(m);
  return m;
}

void release(std::vector<Meeting*>* pending, Meeting* m) {
  pending->erase(std::find(pending->begin(), pending->end(), m));
  m->leaving = m->threads;
  for (int t = 0; t < machine.size; ++t) {
    if (machine.threads[static_cast<size_t>(t)].waits_for == m) make_ready(t);
  }
}

void release_block_if_all_arrived() {
  std::vector<Meeting*>& pending = machine.pending.back();
  if (!pending.empty() && pending[0]->threads == machine.live) release(&pending, pending[0]);
}

const Meeting* wait(const Meeting* m) {
  leave_to_scheduler();
  return m;
}

void thread_main() {
  Thread& thread = machine.threads[static_cast<size_t>(machine.running)];
  thread.stack->begun();
  machine.call(machine.arguments);
  thread.done = true;
  --machine.live;
  release_block_if_all_arrived();
  leave_to_scheduler(true);
}

void resume(int t) {
  Thread& thread = machine.threads[static_cast<size_t>(t)];
  machine.running = t;
  current.thread = thread.index;
  current.lane = t % 32;
  thread.stack->enter();
}

// "threads 0-31, 64 in __syncthreads at a.cuh:3; threads 32-63 have ended"
std::string who_waits() {
  std::vector<std::pair<std::string, std::vector<int>>> groups;
  for (int t = 0; t < machine.size; ++t) {
    const Thread& thread = machine.threads[static_cast<size_t>(t)];
    std::ostringstream where;
    if (thread.done) {
      where << "have ended";
    } else if (thread.waits_for != nullptr) {
      const Meeting& m = *thread.waits_for;
      where << "wait in " << m.what << " at " << at(m.site);
      if (m.mask != 0) where << " for the lanes " << std::hex << "0x" << m.mask;
    } else {
      where << "wait at named barrier " << thread.named;
    }
    if (groups.empty() || groups.back().first != where.str()) groups.push_back({where.str(), {}});
    groups.back().second.push_back(t);
  }
  std::string text;
  for (const auto& [where, threads] : groups) {
    text += (text.empty() ? "threads " : "; threads ") + std::to_string(threads.front()) + "-" +
            std::to_string(threads.back()) + " " + where;
    if (text.size() > 2000) return text + "; ...";
  }
  return text;
}

void begin_block(const Shape& shape, uint64_t block) {
  current.block.x = static_cast<unsigned>(block % shape.grid.x);
  current.block.y = static_cast<unsigned>(block / shape.grid.x % shape.grid.y);
  current.block.z = static_cast<unsigned>(block / shape.grid.x / shape.grid.y);
  machine.live = machine.size;
  machine.ready = {};
  machine.error.clear();
  machine.pending.assign(static_cast<size_t>(machine.size + 31) / 32 + 1, {});
  machine.named.assign(16, {});
  machine.idle.clear();
  for (const auto& m : machine.meetings) machine.idle.push_back(m.get());
  for (int t = 0; t < machine.size; ++t) {
    Thread& thread = machine.threads[static_cast<size_t>(t)];
    const unsigned i = static_cast<unsigned>(t);
    thread.index = {i % shape.block.x, i / shape.block.x % shape.block.y,
                    i / shape.block.x / shape.block.y};
    thread.done = false;
    thread.priority = machine.random();
    thread.stack->reset(&thread_main);
    make_ready(t);
  }
}

// The text of what went wrong, or "".
std::string run_block(const Shape& shape, uint64_t block) {
  begin_block(shape, block);
  while (!machine.ready.empty()) {
    const int t = machine.ready.top().second;
    machine.ready.pop();
    resume(t);
    if (!machine.error.empty()) return machine.error;
  }
  return machine.live == 0 ? "" : "no thread can go on: " + who_waits();
}

void check_shape(const Shape& shape) {
  const uint64_t threads = uint64_t{1} * shape.block.x * shape.block.y * shape.block.z;
  if (threads < 1 || threads > 1024 || shape.block.z > 64) {
    throw std::invalid_argument("a block has 1 to 1024 threads");
  }
  if (shape.grid.x < 1 || shape.grid.x > 0x7fffffffu || shape.grid.y < 1 || shape.grid.z < 1 ||
      shape.grid.y > 65535 || shape.grid.z > 65535) {
    throw std::invalid_argument("a grid has 1 to 2^31 - 1 blocks in x, to 65535 in y and z");
  }
  if (shape.shared_bytes > kMostShared) throw std::invalid_argument("too much shared memory");
}

std::vector<uint64_t> block_order(uint64_t blocks) {
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (machine.seed != 0) std::shuffle(order.begin(), order.end(), machine.random);
  return order;
}

// "... [with auto kKernel = gemmascope_fast::f; ...]" -> "gemmascope_fast::f"
std::string kernel_name(const std::string& text) {
  const size_t begin = text.find("kKernel = ");
  if (begin == std::string::npos) return text;
  const size_t end = text.find_first_of(";]", begin);
  return text.substr(begin + 10, end - begin - 10);
}

}  // namespace

void run_grid(const char* kernel, const Shape& shape, void (*call)(const void*),
              const void* arguments) {
  check_shape(shape);
  const std::lock_guard<std::mutex> lock(machine.in_use);
  machine.random.seed(machine.seed);
  machine.size = static_cast<int>(shape.block.x * shape.block.y * shape.block.z);
  if (machine.threads.size() < static_cast<size_t>(machine.size)) {
    machine.threads.resize(static_cast<size_t>(machine.size));
  }
  machine.call = call;
  machine.arguments = arguments;
  void* dynamic = nullptr;
  if (posix_memalign(&dynamic, 1024, shape.shared_bytes) != 0) throw std::bad_alloc();
  const std::unique_ptr<void, decltype(&free)> freed(dynamic, &free);
  current = {};
  current.block_dim = shape.block;
  current.grid_dim = shape.grid;
  current.dynamic_shared = dynamic;
  current.dynamic_bytes = shape.shared_bytes;
  std::string error;
  {
    ThreadLocals shared;
    for (const uint64_t block :
         block_order(uint64_t{1} * shape.grid.x * shape.grid.y * shape.grid.z)) {
      shared.fill();
      if (shape.shared_bytes > 0) memset(dynamic, kUnwritten, shape.shared_bytes);
      error = run_block(shape, block);
      if (!error.empty()) break;
    }
  }
  if (!error.empty()) {
    throw std::runtime_error(kernel_name(kernel) + ", block (" + std::to_string(current.block.x) +
                             ", " + std::to_string(current.block.y) + ", " +
                             std::to_string(current.block.z) + "): " + error);
  }
}

void set_seed(uint64_t seed) { machine.seed = seed; }

const Meeting* meet_warp(const char* what, uint32_t mask, const void* payload, size_t bytes,
                         Site site) {
  const int lane = current.lane;
  if (!(mask >> lane & 1)) {
    fail((std::string(what) + " with a mask that does not name the caller").c_str(), site);
  }
  std::vector<Meeting*>& pending = machine.pending[static_cast<size_t>(machine.running) / 32];
  Meeting* m = join(&pending, what, mask, site);
  memcpy(m->payload[lane], payload, bytes);
  m->arrived |= 1u << lane;
  ++m->threads;
  machine.threads[static_cast<size_t>(machine.running)].waits_for = m;
  if (m->arrived == mask) release(&pending, m);
  return wait(m);
}

const Meeting* meet_block(const char* what, bool predicate, Site site) {
  Meeting* m = join(&machine.pending.back(), what, 0, site);
  m->count += predicate;
  ++m->threads;
  machine.threads[static_cast<size_t>(machine.running)].waits_for = m;
  release_block_if_all_arrived();
  return wait(m);
}

void arrive_named(int id, int threads, Site site) {
  if (id < 0 || id > 15) fail("there are 16 named barriers", site);
  NamedBarrier& barrier = machine.named[static_cast<size_t>(id)];
  if (barrier.arrived > 0 && barrier.threads != threads) {
    fail("others wait at this named barrier for another number of threads", site);
  }
  barrier.threads = threads;
  if (++barrier.arrived < threads) return;
  for (const int t : barrier.waiting) make_ready(t);
  barrier = {};
}

void meet_named(int id, int threads, Site site) {
  if (id < 0 || id > 15) fail("there are 16 named barriers", site);
  machine.named[static_cast<size_t>(id)].waiting.push_back(machine.running);
  machine.threads[static_cast<size_t>(machine.running)].named = id;
  arrive_named(id, threads, site);
  leave_to_scheduler();
}

void leave(const Meeting* meeting) {
  Meeting* m = const_cast<Meeting*>(meeting);
  if (--m->leaving == 0) machine.idle.push_back(m);
}

void yield() {
  make_ready(machine.running);
  leave_to_scheduler();
}

void give_way() {
  make_ready(machine.running, true);
  leave_to_scheduler();
}

void fail(const char* what, Site site) {
  machine.error = "thread " + std::to_string(machine.running) + " at " + at(site) + ": " + what;
  leave_to_scheduler(true);
  std::abort();  // it is not entered again
}

}  // namespace cuda_on_cpu
