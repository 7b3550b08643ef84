// The threads of one parallel region, and the point where they wait for each other.
//
// A decode step meets some two hundred times; OpenMP's own barrier is built for longer waits. Here threads spin, and
// after a while let others run: beside a busy neighbour a spinning thread would otherwise use up its time slice.
#pragma once
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>

namespace bimo {

struct Team {
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> round{0};
    alignas(64) std::atomic<int64_t> next{0};  // the next task of a list that is handed out one by one
    int size = 1;

    void wait() {
        if (size == 1) {
            next.store(0, std::memory_order_relaxed);
            return;
        }
        const int now = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            arrived.store(0, std::memory_order_relaxed);
            next.store(0, std::memory_order_relaxed);  // every meeting begins a new list
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
            if (spins > 4000) sched_yield();
        }
    }
};

// The part of `count` things that falls to thread `number` of `size`.
struct Share {
    int64_t first, end;
    Share(int64_t count, int number, int size) : first(count * number / size), end(count * (number + 1) / size) {}
};

}  // namespace bimo
