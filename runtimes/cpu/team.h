// A thread pool whose threads run one function together, as ranks, and synchronize at barriers inside it.
//
// A decoder layer has six barriers, a few microseconds apart. So threads spin at a barrier for about as long as it takes if
// each has its own core, and then sleep: on a busy machine the late thread may need that core. A thread that had to sleep
// spins less the next time. Between two runs all sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace cobra_edge {

class Team {
   public:
    explicit Team(int size);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }

    // Run work(rank) on every thread; the caller is rank 0. `work` must not throw. One run at a time.
    void run(const std::function<void(int)>& work);

    // Wait until every thread has arrived. Only inside `run`.
    void barrier();

   private:
    void serve(int rank);
    void sleep_until_past(uint64_t phase);

    const int size_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const std::function<void(int)>* work_ = nullptr;
    uint64_t round_ = 0;
    bool stopping_ = false;
    std::atomic<int> arrived_{0};
    std::atomic<uint64_t> phase_{0};
    std::mutex barrier_mutex_;
    std::condition_variable passed_;
    std::atomic<int> sleepers_{0};
};

}  // namespace cobra_edge
