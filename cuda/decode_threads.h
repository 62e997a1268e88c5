// The threads of the decoder (decode_cpu.cpp), and how they share the work.
#pragma once
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>

#include "cpu.h"

// Threads that live as long as the decoder. Within a token they wait for each other many times, for
// microseconds, so they spin. They yield a core that another thread wants, and between tokens they sleep: a
// chat waits for its user.
class Pool {
public:
    explicit Pool(int threads) : threads(threads) {
        for (int i = 1; i < threads; i++) others.emplace_back([this, i] { serve(i); });
    }
    ~Pool() {
        run(nullptr);
        for (auto& other : others) other.join();
    }

    // work(thread) on every thread, the caller's is 0; an empty one ends the others
    void run(std::function<void(int)> work) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            job = std::move(work);
            jobs.fetch_add(1, std::memory_order_release);
        }
        wake.notify_all();
        if (!job) return;
        job(0);
        barrier();
    }

    // returns once all threads have come here
    void barrier() {
        const unsigned now = phase.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            phase.store(now + 1, std::memory_order_release);
            return;
        }
        for (long tries = 0; phase.load(std::memory_order_acquire) == now; tries++) {
            if (tries < SPINS) pause();
            else if (tries < SPINS + YIELDS) std::this_thread::yield();
            else std::this_thread::sleep_for(std::chrono::microseconds(50));
        }
    }

    const int threads;

private:
    // 20 to 80 microseconds, and as long as it takes the others
    static constexpr long SPINS = 2000, YIELDS = 200;

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    void serve(int thread) {
        for (unsigned seen = 0;;) {
            for (long tries = 0; tries < SPINS && jobs.load(std::memory_order_acquire) == seen; tries++)
                pause();
            {
                std::unique_lock<std::mutex> lock(mutex);
                wake.wait(lock, [&] { return jobs.load(std::memory_order_relaxed) != seen; });
                seen = jobs.load(std::memory_order_relaxed);
            }
            if (!job) return;
            job(thread);
            barrier();
        }
    }

    std::vector<std::thread> others;
    std::function<void(int)> job;
    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<unsigned> jobs{0}, phase{0};
    std::atomic<int> arrived{0};
};

// the part of `total` that belongs to a thread
inline std::pair<long, long> share(long total, int thread, int threads) {
    return {total * thread / threads, total * (thread + 1) / threads};
}
