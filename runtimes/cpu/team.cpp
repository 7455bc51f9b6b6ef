#include "team.h"

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cobra_edge {
namespace {

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Some tens of microseconds: longer than any barrier if every thread has its own core. After a barrier that took longer, a
// thread spins a quarter as long, down to about the time it takes to fall asleep; shorter barriers double it again.
constexpr int kMostSpins = 4000, kLeastSpins = 60;
thread_local int spins_allowed = kMostSpins;

}  // namespace

Team::Team(int size) : size_(size) {
    try {
        for (int rank = 1; rank < size_; ++rank) threads_.emplace_back([this, rank] { serve(rank); });
    } catch (...) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (auto& t : threads_) t.join();
        throw;
    }
}

Team::~Team() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
    }
    wake_.notify_all();
    for (auto& t : threads_) t.join();
}

void Team::run(const std::function<void(int)>& work) {
    if (size_ > 1) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            work_ = &work;
            ++round_;
        }
        wake_.notify_all();
    }
    work(0);
    barrier();
}

void Team::barrier() {
    if (size_ == 1) return;
    const uint64_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1);
        // Sequentially consistent, like the other side: a thread not yet counted as a sleeper will see the new phase.
        if (sleepers_.load() == 0) return;
        {
            const std::lock_guard<std::mutex> lock(barrier_mutex_);
        }
        passed_.notify_all();
        return;
    }
    for (int spins = 0; spins < spins_allowed; ++spins) {
        if (phase_.load(std::memory_order_acquire) != phase) {
            spins_allowed = std::min(2 * spins_allowed, kMostSpins);
            return;
        }
        pause();
    }
    spins_allowed = std::max(spins_allowed / 4, kLeastSpins);
    sleep_until_past(phase);
}

void Team::sleep_until_past(uint64_t phase) {
    std::unique_lock<std::mutex> lock(barrier_mutex_);
    sleepers_.fetch_add(1);
    passed_.wait(lock, [&] { return phase_.load() != phase; });
    sleepers_.fetch_sub(1);
}

void Team::serve(int rank) {
    uint64_t seen = 0;
    for (;;) {
        const std::function<void(int)>* work;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return stopping_ || round_ != seen; });
            if (stopping_) return;
            seen = round_;
            work = work_;
        }
        (*work)(rank);
        barrier();
    }
}

}  // namespace cobra_edge
