// What the decoder is made of: the products of one token's activations with the weights of a model where they
// lie, and the threads that share them out.
//
// A product with a matrix is bound by the memory it streams. Every thread reads rows of its own from the
// first to the last, one at a time: two or four at a time get 60 to 75 % of the bandwidth, and so do pieces
// of rows. The hardware looks ahead within a page and stops at its end, so the beginning of a page is asked
// for two pages before (5 to 7 % faster); to ask for more takes requests away from the hardware's. Rows of
// more than 6000 numbers reach 60 %, because their activations do not stay in the L1 cache.
//
// A weight is loaded as whole lanes of 32 bits, which hold one fp32, two bf16 or four int8, and the
// activations lie in that order (`spread`): widening is then one operation, a shift or a mask, and bf16
// weights in the cache are multiplied 2.6 times as fast as by widening halves.
#pragma once
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>

#include "cpu.h"

enum Type : int64_t { kFp32 = 0, kBf16 = 1, kInt8 = 2 };

// A matrix as it lies in a tensor, row by row; int8 ones have a scale for each row. Vectors are fp32 with
// zeros up to whole lanes. Of rank > 0: with the change strength * B A of an adapter beside it, A (rank,
// columns), B (rows, rank) and room for A x in `inner`, all fp32; without A it is MiSS's, whose A x are the
// sums of strided shards, x[j] + x[j + rank] + ...
struct Matrix {
    const void* data;
    const float* scale;
    int64_t rows, columns, type, rank;
    const float *A, *B;
    float* inner;
    double strength;
    const float* vector() const { return static_cast<const float*>(data); }
};

inline long padded(long n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

// Keeps a load from being done once for each use of it.
template <class T> inline void in_register(T& x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
}

// part p of the lanes of a block of weights: the elements p, p + share, p + 2 share ... of it
template <int W> inline Vec<W> part(const float*, typename Lanes<W>::U lanes, int) {
    Vec<W> x;
    memcpy(&x, &lanes, sizeof x);
    return x;
}
template <int W> inline Vec<W> part(const uint16_t*, typename Lanes<W>::U lanes, int p) {
    return part<W>(static_cast<const float*>(nullptr), p ? lanes & 0xffff0000u : lanes << 16, 0);
}
template <int W> inline Vec<W> part(const int8_t*, typename Lanes<W>::U lanes, int p) {
    typename Lanes<W>::I top;
    lanes <<= 24 - 8 * p;
    memcpy(&top, &lanes, sizeof top);
    return __builtin_convertvector(top >> 24, Vec<W>);
}
inline float value(const float* p) { return *p; }
inline float value(const int8_t* p) { return *p; }
inline float value(const uint16_t* p) {
    const uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// n activations in the order in which a row of weights of that type is read; what fills no block keeps its
// place
inline void spread(int64_t type, const float* x, long n, float* out) {
    const long share = type == kFp32   ? 1
                       : type == kBf16 ? 2
                                       : 4,
               block = share * WIDTH, whole = n / block * block;
    for (long start = 0; start < whole; start += block)
        for (long p = 0; p < share; p++)
            for (long lane = 0; lane < WIDTH; lane++)
                out[start + p * WIDTH + lane] = x[start + lane * share + p];
    std::copy(x + whole, x + n, out + whole);
}

// Asks for the beginnings of the pages that lie two pages behind those that begin in [from, to).
inline void look_ahead(const void* from, const void* to) {
    constexpr uintptr_t PAGE = 4096, LINE = 64;
    for (uintptr_t page = (reinterpret_cast<uintptr_t>(from) + PAGE - 1) / PAGE * PAGE;
        page < reinterpret_cast<uintptr_t>(to); page += PAGE)
        for (uintptr_t line = 0; line < 2; line++)
            __builtin_prefetch(reinterpret_cast<const void*>(page + 2 * PAGE + line * LINE), 0, 1);
}

// W sums whose sum is the product of n weights of a row with the activations
template <class T> inline Vec<WIDTH> product(const T* row, const float* x, long n) {
    constexpr int W = WIDTH, share = sizeof(float) / sizeof(T), together = 4 / share;
    Vec<W> sums[4] = {};
    auto block = [&](long i, int first) {
        typename Lanes<W>::U lanes;
        memcpy(&lanes, row + i, sizeof lanes);
        in_register(lanes);
        for (int p = 0; p < share; p++) sums[first + p] += part<W>(row, lanes, p) * load<W>(x + i + p * W);
    };
    long i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
        for (int b = 0; b < together; b++) block(i + b * share * W, b * share);
    for (; i + share * W <= n; i += share * W) block(i, 0);
    for (; i < n; i++) sums[0][0] += value(row + i) * x[i];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// emit(row, product) for the rows [first, last), x spread
template <class T, class Emit>
inline void rows_of(const Matrix& matrix, const float* x, long first, long last, Emit emit) {
    constexpr long W = WIDTH;
    const T* data = static_cast<const T*>(matrix.data);
    for (long row = first; row < last; row += W) {
        const long count = std::min(W, last - row);
        Vec<W> sums[W] = {}, added[W] = {};
        for (long r = 0; r < count; r++) {
            const T* weights = data + (row + r) * matrix.columns;
            look_ahead(weights, weights + matrix.columns);
            if (matrix.rank) {
                const float* B = matrix.B + (row + r) * matrix.rank;
                look_ahead(B, B + matrix.rank);
                added[r] = product(B, matrix.inner, matrix.rank);
            }
            sums[r] = product(weights, x, matrix.columns);
        }
        Vec<W> totals = row_sums<W>(sums), changes = {};
        if (matrix.rank) changes = row_sums<W>(added) * static_cast<float>(matrix.strength);
        for (long r = 0; r < count; r++)
            emit(row + r,
                (std::is_same<T, int8_t>() ? totals[r] * matrix.scale[row + r] : totals[r]) + changes[r]);
    }
}
template <class Emit>
inline void multiply_rows(const Matrix& matrix, const float* x, long first, long last, Emit emit) {
    if (matrix.type == kFp32) rows_of<float>(matrix, x, first, last, emit);
    else if (matrix.type == kBf16) rows_of<uint16_t>(matrix, x, first, last, emit);
    else rows_of<int8_t>(matrix, x, first, last, emit);
}

// rows [first, last) of A x
inline void multiply_A(const Matrix& matrix, const float* x, long first, long last) {
    if (matrix.A) {
        const Matrix A{
            matrix.A, nullptr, matrix.rank, matrix.columns, kFp32, 0, nullptr, nullptr, nullptr, 0};
        rows_of<float>(A, x, first, last, [&](long row, float product) { matrix.inner[row] = product; });
        return;
    }
    std::fill(matrix.inner + first, matrix.inner + last, 0.f);
    for (long start = 0; start < matrix.columns; start += matrix.rank)
        for (long j = first; j < std::min(last, matrix.columns - start); j++) matrix.inner[j] += x[start + j];
}

template <class T> inline Vec<WIDTH> widened(const T* p) {
    if constexpr (std::is_same<T, float>()) return load<WIDTH>(p);
    else return widen<WIDTH>(p);
}

// out[c] += x[0] rows[0][c] + ... for `count` rows of `columns` each and c in [from, to)
template <int count, class T>
inline void add_rows(const T* rows, long columns, const float* x, long from, long to, float* out) {
    look_ahead(rows, rows + count * columns);
    long c = from;
    for (; c + WIDTH <= to; c += WIDTH) {
        Vec<WIDTH> sum = load<WIDTH>(out + c);
        for (int r = 0; r < count; r++) sum += widened(rows + r * columns + c) * x[r];
        store<WIDTH>(out + c, sum);
    }
    for (; c < to; c++)
        for (int r = 0; r < count; r++) out[c] += value(rows + r * columns + c) * x[r];
}

// out[c] += the sum of x[r] matrix[r][c] over the rows [first, last), for c in [from, to)
template <class T> inline void columns_of(
    const Matrix& matrix, const float* x, long first, long last, long from, long to, float* out) {
    const T* data = static_cast<const T*>(matrix.data);
    long row = first;
    for (; row + 8 <= last; row += 8)
        add_rows<8>(data + row * matrix.columns, matrix.columns, x + row, from, to, out);
    for (; row < last; row++)
        add_rows<1>(data + row * matrix.columns, matrix.columns, x + row, from, to, out);
}
inline void add_columns(
    const Matrix& matrix, const float* x, long first, long last, long from, long to, float* out) {
    if (matrix.type == kFp32) columns_of<float>(matrix, x, first, last, from, to, out);
    else columns_of<uint16_t>(matrix, x, first, last, from, to, out);
}

// Threads that live as long as the decoder. Within a token they wait for each other many times, for
// microseconds, so they spin; where a core is wanted by another thread they let it have it, and between
// tokens they sleep: a chat waits for its user.
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
