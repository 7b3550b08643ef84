// The threads of one parallel region, and how a step's phases are shared among them.
//
// A decode step has some two hundred phases, each to be complete before the next begins. A barrier would wait for every
// thread; beside a busy neighbour one of them is always off its core, and each meeting costs a time slice: 40 ms a step
// instead of 4. Here a phase is a list of pieces that whoever is running takes one by one, and it is over when all
// pieces are done: a thread that was away finds the others further on, and joins them there.
#pragma once
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace bimo {

struct Team {
    alignas(64) std::atomic<uint64_t> state{0};  // phase << 32 | pieces of it that were taken
    alignas(64) std::atomic<int64_t> done{0};    // pieces of it that are complete
    int64_t threads = 1;
};

// One thread's way through the phases; all threads call `run` with the same counts in the same order.
class Worker {
   public:
    explicit Worker(Team& team) : team_(team) {}

    // Do work(first, end) over `count` things, in pieces of at least `least`; returns when all of them are done.
    template <typename Work>
    void run(int64_t count, int64_t least, Work&& work) {
        const int64_t size = std::max(least, (count + 6 * team_.threads - 1) / (6 * team_.threads));
        const int64_t pieces = std::max<int64_t>(1, (count + size - 1) / size);
        for (int64_t piece; (piece = take(pieces)) >= 0;) {
            work(piece * size, std::min(count, (piece + 1) * size));
            if (team_.done.fetch_add(1, std::memory_order_acq_rel) + 1 == pieces) {
                team_.done.store(0, std::memory_order_relaxed);
                team_.state.store((phase_ + 1) << 32, std::memory_order_release);
            }
        }
        for (int spins = 0; team_.state.load(std::memory_order_acquire) >> 32 == phase_; spins++) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
            if (spins > 2000) sched_yield();
        }
        phase_++;
    }

   private:
    int64_t take(int64_t pieces) {
        uint64_t now = team_.state.load(std::memory_order_acquire);
        while (now >> 32 == phase_ && int64_t(now & 0xffffffff) < pieces)
            if (team_.state.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) return now & 0xffffffff;
        return -1;
    }
    Team& team_;
    uint64_t phase_ = 0;
};

}  // namespace bimo
