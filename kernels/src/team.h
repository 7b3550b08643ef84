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
#include <vector>

#include "pool.h"

namespace bimo {
namespace BIMO_ISA {

struct Team {
    struct alignas(64) Share {  // pieces that are one thread's own until another has none left
        std::atomic<uint64_t> taken{0};  // phase << 32 | how many of them
    };
    explicit Team(int64_t threads) : shares(threads) {}
    std::vector<Share> shares;
    alignas(64) std::atomic<int64_t> done{0};    // pieces of the phase that are complete
    alignas(64) std::atomic<uint64_t> phase{0};
};

// One thread's way through the phases; all threads call `run` with the same counts in the same order.
class Worker {
   public:
    Worker(Team& team, int64_t number, int64_t pieces) : team_(team), number_(number), pieces_(pieces) {}

    // Do work(first, end) over `count` things, in pieces; returns when all of them are done. A thread's own pieces lie
    // side by side, so that it reads its part of a matrix in one run: a fifth faster than pieces in turns.
    template <typename Work>
    void run(int64_t count, Work&& work) {
        const int64_t threads = int64_t(team_.shares.size()), size = (count + pieces_ * threads - 1) / (pieces_ * threads);
        const int64_t pieces = (count + size - 1) / size;
        for (int64_t i = 0; i < threads; i++) {
            const int64_t owner = (number_ + i) % threads;
            const int64_t begin = owner * pieces / threads, own = (owner + 1) * pieces / threads - begin;
            for (int64_t place; (place = take(team_.shares[owner], own)) >= 0;) {
                const int64_t piece = begin + place;
                work(piece * size, std::min(count, (piece + 1) * size));
                if (team_.done.fetch_add(1, std::memory_order_acq_rel) + 1 == pieces) finish();
            }
        }
        for (int spins = 0; team_.phase.load(std::memory_order_acquire) == phase_; spins++) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
            if (spins > 2000) sched_yield();
        }
        phase_++;
    }

   private:
    int64_t take(Team::Share& share, int64_t own) {
        uint64_t now = share.taken.load(std::memory_order_acquire);
        while (now >> 32 == phase_ && int64_t(now & 0xffffffff) < own)
            if (share.taken.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) return now & 0xffffffff;
        return -1;
    }
    void finish() {  // nobody takes from a share of the next phase before `phase` says so
        team_.done.store(0, std::memory_order_relaxed);
        for (Team::Share& share : team_.shares) share.taken.store((phase_ + 1) << 32, std::memory_order_relaxed);
        team_.phase.store(phase_ + 1, std::memory_order_release);
    }
    Team& team_;
    const int64_t number_, pieces_;
    uint64_t phase_ = 0;
};

// Pieces of each thread: what is left at the end of a phase is that much smaller. Of one row's products a piece is over
// in microseconds, and long runs of memory count; of many rows' the end counts.
constexpr int64_t PIECES = 6, PIECES_OF_MANY_ROWS = 18, MANY_ROWS = 128;

// Call work(worker) in every thread.
template <typename Work>
void as_a_team(int64_t rows, Work&& work) {
    struct Job {
        Team team;
        Work& work;
        int64_t pieces;
    } job{Team(omp_get_max_threads()), work, rows < MANY_ROWS ? PIECES : PIECES_OF_MANY_ROWS};
    in_parallel(
        int(job.team.shares.size()),
        [](void* data, int number) {
            Job& job = *static_cast<Job*>(data);
            Worker worker(job.team, number, job.pieces);
            job.work(worker);
        },
        &job);
}

}  // namespace BIMO_ISA
}  // namespace bimo
