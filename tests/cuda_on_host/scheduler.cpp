// The fibers of a grid and their turns. A few blocks are at work at once, and take turns too.
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace cuda_on_host {
namespace {

constexpr size_t kStackBytes = size_t{256} << 10;
constexpr unsigned char kGarbage = 0xa7;

enum class State { runnable, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  State state;
  bool vote;
  uint32_t mask;
  uint64_t value;
  uint64_t gathered[kLanes];
  int votes;
  bool started = false;
  jmp_buf here;
  ucontext_t context;
};

struct Counters {
  long launches, memsets, syncs;
} counters;

class Block {
 public:
  void start(dim3 index, dim3 threads, size_t shared_bytes, void (*body)(void*), void* argument);
  // Runs some of its threads a little further; false when all have ended.
  bool go_on(uint64_t turns);

  int wait_for_block(bool vote) {
    Fiber& fiber = *current_;
    fiber.vote = vote;
    leave(State::at_block_barrier);
    return fiber.votes;
  }
  const uint64_t* wait_for_warp(uint32_t mask, uint64_t value) {
    Fiber& fiber = *current_;
    fiber.mask = mask;
    fiber.value = value;
    leave(State::at_warp_barrier);
    return fiber.gathered;
  }
  void let_others_run() {
    if (random() % 4 == 0) {
      leave(State::runnable);
    }
  }
  void* shared() { return shared_.data(); }
  void seed(uint64_t seed) { random_ = seed * 0x9e3779b97f4a7c15u + 1; }

 private:
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<unsigned> runnable_;
  std::vector<unsigned char> shared_;
  std::vector<char> statics_;  // its static shared memory, while others have it
  dim3 index_, dimensions_;
  Fiber* current_ = nullptr;
  unsigned threads_ = 0, alive_ = 0, at_barrier_ = 0;
  uint64_t random_ = 1;
  jmp_buf scheduler_;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;

  uint64_t random() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return random_ >> 11;
  }

  __attribute__((noinline)) void leave(State state) {
    Fiber& fiber = *current_;
    fiber.state = state;
    if (_setjmp(fiber.here) == 0) {
      _longjmp(scheduler_, 1);
    }
  }

  // A fiber lives as long as its block's threads are needed: it runs one body after the other.
  static void enter(unsigned high, unsigned low) {
    auto* block = reinterpret_cast<Block*>(uintptr_t{high} << 32 | low);
    for (;;) {
      block->body_(block->argument_);
      block->leave(State::done);
    }
  }

  __attribute__((noinline)) void resume(unsigned index) {
    Fiber& fiber = *fibers_[index];
    current_ = &fiber;
    threadIdx = dim3(index);
    if (_setjmp(scheduler_) != 0) {
      return;
    }
    if (fiber.started) {
      _longjmp(fiber.here, 1);
    }
    fiber.started = true;
    setcontext(&fiber.context);
  }

  void add_fiber() {
    auto fiber = std::make_unique<Fiber>();
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED) {
      throw std::runtime_error("CUDA on the host: no memory for another thread");
    }
    getcontext(&fiber->context);
    fiber->context.uc_stack = {stack, 0, kStackBytes};
    fiber->context.uc_link = nullptr;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&fiber->context, reinterpret_cast<void (*)()>(&Block::enter), 2,
                static_cast<unsigned>(self >> 32), static_cast<unsigned>(self));
    fibers_.push_back(std::move(fiber));
  }

  void wake(unsigned index) {
    fibers_[index]->state = State::runnable;
    runnable_.push_back(index);
  }

  void open_barrier() {
    int votes = 0;
    for (unsigned i = 0; i < threads_; ++i) {
      votes += fibers_[i]->state == State::at_block_barrier && fibers_[i]->vote;
    }
    for (unsigned i = 0; i < threads_; ++i) {
      if (fibers_[i]->state == State::at_block_barrier) {
        fibers_[i]->votes = votes;
        wake(i);
      }
    }
    at_barrier_ = 0;
  }

  void open_warp(unsigned index) {
    const uint32_t mask = fibers_[index]->mask;
    const unsigned first = index / kLanes * kLanes;
    const unsigned lanes = std::min<unsigned>(kLanes, threads_ - first);
    if ((mask >> (index - first) & 1) == 0) {
      throw std::runtime_error("CUDA on the host: a lane waits for others without itself");
    }
    for (unsigned lane = 0; lane < lanes; ++lane) {
      const Fiber& fiber = *fibers_[first + lane];
      if ((mask >> lane & 1) == 0) {
        continue;
      }
      if (fiber.state == State::done) {
        throw std::runtime_error("CUDA on the host: a warp waits for a lane that has ended");
      }
      if (fiber.state != State::at_warp_barrier || fiber.mask != mask) {
        return;
      }
    }
    uint64_t values[kLanes];
    std::fill_n(values, kLanes, 0xa7a7a7a7a7a7a7a7u);
    for (unsigned lane = 0; lane < lanes; ++lane) {
      if ((mask >> lane & 1) != 0) {
        values[lane] = fibers_[first + lane]->value;
      }
    }
    for (unsigned lane = 0; lane < lanes; ++lane) {
      if ((mask >> lane & 1) != 0) {
        std::copy_n(values, kLanes, fibers_[first + lane]->gathered);
        wake(first + lane);
      }
    }
  }
};

// The static shared memory: all thread-local variables of this library.
struct Statics {
  char* data;
  size_t bytes;
} statics;

int find_statics(dl_phdr_info* library, size_t, void* inside) {
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const size_t bytes = library->dlpi_phdr[i].p_memsz;
    auto* data = static_cast<char*>(library->dlpi_tls_data);
    const size_t offset = static_cast<char*>(inside) - data;
    if (library->dlpi_phdr[i].p_type == PT_TLS && data != nullptr && offset < bytes) {
      statics = {data, bytes};
    }
  }
  return 0;
}

void Block::start(dim3 index, dim3 threads, size_t shared_bytes, void (*body)(void*),
                  void* argument) {
  index_ = index;
  dimensions_ = threads;
  threads_ = alive_ = threads.x;
  at_barrier_ = 0;
  body_ = body;
  argument_ = argument;
  statics_.assign(statics.bytes, static_cast<char>(kGarbage));
  shared_.assign(shared_bytes, kGarbage);
  runnable_.clear();
  while (fibers_.size() < threads_) {
    add_fiber();
  }
  for (unsigned i = 0; i < threads_; ++i) {
    wake(i);
  }
}

bool Block::go_on(uint64_t turns) {
  blockIdx = index_;
  blockDim = dimensions_;
  std::copy(statics_.begin(), statics_.end(), statics.data);
  for (; turns > 0 && alive_ > 0; --turns) {
    if (runnable_.empty()) {
      throw std::runtime_error("CUDA on the host: threads wait for each other for ever");
    }
    std::swap(runnable_[random() % runnable_.size()], runnable_.back());
    const unsigned next = runnable_.back();
    runnable_.pop_back();
    resume(next);
    switch (fibers_[next]->state) {
      case State::runnable:
        runnable_.push_back(next);
        break;
      case State::at_warp_barrier:
        open_warp(next);
        break;
      case State::at_block_barrier:
        ++at_barrier_;
        break;
      case State::done:
        --alive_;
        break;
    }
    if (at_barrier_ > 0 && at_barrier_ == alive_) {
      open_barrier();
    }
  }
  std::copy_n(statics.data, statics_.size(), statics_.begin());
  return alive_ > 0;
}

Block* running = nullptr;
std::mutex one_at_a_time;
std::map<const void*, size_t> granted;

}  // namespace

void* dynamic_shared() { return running->shared(); }
int wait_for_block(bool vote) { return running->wait_for_block(vote); }
const uint64_t* wait_for_warp(uint32_t mask, uint64_t value) {
  return running->wait_for_warp(mask, value);
}
void let_others_run() { running->let_others_run(); }
void count_memset() { ++counters.memsets; }
void count_sync() { ++counters.syncs; }

size_t granted_to(const void* kernel) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  return granted.try_emplace(kernel, size_t{44} << 10).first->second;
}
void grant(const void* kernel, size_t bytes) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  granted[kernel] = bytes;
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument) {
  constexpr size_t kResident = 3;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  static thread_local char inside;
  dl_iterate_phdr(find_statics, &inside);
  // a failed grid leaves fibers in the middle of their work: the next one gets others
  static auto& idle = *new std::vector<std::unique_ptr<Block>>();
  std::vector<unsigned> order(size_t{grid.x} * grid.y);
  std::iota(order.begin(), order.end(), 0u);
  std::minstd_rand random(static_cast<unsigned>(++counters.launches));
  std::shuffle(order.begin(), order.end(), random);
  std::vector<std::unique_ptr<Block>> resident;
  gridDim = grid;
  while (!order.empty() || !resident.empty()) {
    if (!order.empty() && resident.size() < kResident) {
      resident.push_back(idle.empty() ? std::make_unique<Block>() : std::move(idle.back()));
      if (!idle.empty()) {
        idle.pop_back();
      }
      resident.back()->seed(random());
      const dim3 index(order.back() % grid.x, order.back() / grid.x);
      resident.back()->start(index, block, shared_bytes, body, argument);
      order.pop_back();
      continue;
    }
    auto& next = resident[random() % resident.size()];
    running = next.get();
    if (!next->go_on(1 + random() % (4 * block.x))) {
      std::swap(next, resident.back());
      idle.push_back(std::move(resident.back()));
      resident.pop_back();
    }
  }
}

}  // namespace cuda_on_host

#define EXPORT __attribute__((visibility("default")))
extern "C" {
EXPORT long cuda_on_host_launches() { return cuda_on_host::counters.launches; }
EXPORT long cuda_on_host_memsets() { return cuda_on_host::counters.memsets; }
EXPORT long cuda_on_host_syncs() { return cuda_on_host::counters.syncs; }
}
