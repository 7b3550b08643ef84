#include "pool.h"

#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace bimo {
namespace {

// A sleeping thread takes up to half a millisecond to come back, a tenth of a step; so it stays awake for a while after
// a step, but gives its core to anybody who asks for it.
constexpr auto AWAKE = std::chrono::milliseconds(2);

void rest(int& spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (++spins % 64 == 0) sched_yield();
}

class Pool {
   public:
    explicit Pool(int threads) : process_(getpid()) {
        for (int number = 1; number < threads; number++) threads_.emplace_back([this, number] { serve(number); });
    }
    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_.store(true);
        }
        wake_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }
    int threads() const { return int(threads_.size()) + 1; }
    bool is_here() const { return process_ == getpid(); }  // threads do not survive a fork

    // An error in one thread cannot be told to the others, who share the caller's memory: it ends the process.
    void run(void (*work)(void*, int), void* data) noexcept {
        work_ = work, data_ = data;
        state_.store(uint64_t(++step_) << 32 | OPEN);
        if (asleep_.load()) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        work(data, 0);
        state_.fetch_and(~OPEN);
        for (int spins = 0; state_.load(std::memory_order_acquire) & INSIDE;) rest(spins);
    }

   private:
    static constexpr uint64_t OPEN = uint64_t(1) << 31, INSIDE = OPEN - 1;

    void serve(int number) {
        uint32_t done = 0;
        for (uint64_t now; wait_for_work(done, now);) {
            if (!state_.compare_exchange_weak(now, now + 1)) continue;
            work_(data_, number);
            done = uint32_t(now >> 32);
            state_.fetch_sub(1);
        }
    }
    bool has_work(uint32_t done, uint64_t& now) const {
        now = state_.load();
        return (now & OPEN) && uint32_t(now >> 32) != done;
    }
    bool wait_for_work(uint32_t done, uint64_t& now) {
        const auto until = std::chrono::steady_clock::now() + AWAKE;
        for (int spins = 0; spins % 64 || std::chrono::steady_clock::now() < until; rest(spins))
            if (has_work(done, now)) return true;
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_++;  // before the state is looked at again, as `run` sets the state before it looks here
        wake_.wait(lock, [&] { return stop_.load() || has_work(done, now); });
        asleep_--;
        return !stop_.load();
    }

    const pid_t process_;
    uint32_t step_ = 0;
    void (*work_)(void*, int) = nullptr;
    void* data_ = nullptr;
    std::atomic<uint64_t> state_{0};  // step << 32 | OPEN while it may be joined | threads inside, but for the caller
    std::atomic<int> asleep_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> threads_;
};

std::atomic<long long> regions{0};

}  // namespace

long long parallel_regions() { return regions.load(); }

void in_parallel(int threads, void (*work)(void*, int), void* data) {
    regions.fetch_add(1, std::memory_order_relaxed);
    static thread_local std::unique_ptr<Pool> pool;  // each engine's thread has its own
    if (pool && !pool->is_here()) (void)pool.release();  // its threads stayed in the parent
    if (threads <= 1) return work(data, 0);
    if (!pool || pool->threads() != threads) {
        pool.reset();
        pool = std::make_unique<Pool>(threads);
    }
    pool->run(work, data);
}

}  // namespace bimo
