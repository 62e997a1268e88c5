// Shared parts of the CPU kernels: vectors of W fp32 lanes by the compiler's vector extensions (one source for
// AVX-512, AVX2 and NEON), exp, transposes, rows of fp32 or bf16, and threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int WIDTH = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int WIDTH = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int WIDTH = 4, REGISTERS = 32;
#else
constexpr int WIDTH = 4, REGISTERS = 16;
#endif
constexpr int NARROW = WIDTH < 8 ? WIDTH : 8;  // head sizes are multiples of 8, not of 16

template <int W> struct Lanes {
    typedef float F __attribute__((vector_size(4 * W)));
    typedef int32_t I __attribute__((vector_size(4 * W)));
    typedef uint32_t U __attribute__((vector_size(4 * W)));
    typedef uint16_t H __attribute__((vector_size(2 * W)));
};
template <int W> using Vec = typename Lanes<W>::F;

template <int W> inline Vec<W> load(const float* p) {
    Vec<W> x;
    memcpy(&x, p, sizeof x);
    return x;
}
template <int W> inline void store(float* p, Vec<W> x) { memcpy(p, &x, sizeof x); }
template <int W> inline Vec<W> fill(float x) { return Vec<W>{} + x; }

template <int W> inline Vec<W> choose(typename Lanes<W>::I mask, Vec<W> yes, Vec<W> no) {
    return mask ? yes : no;
}

// a * b + c, of vectors or of floats. It is rounded once where the CPU has an instruction for that, else
// twice. The compiler fuses nothing by itself (-ffp-contract=off). It would do so in the body of a loop and
// not in its tail, as gcc does when it tunes for Zen or Sapphire Rapids. Then the bits of a number depend on
// the thread that computes it, and on the rows beside it.
// In a recurrence the state is a factor of the outermost call: it is the largest number, and is rounded once.
template <class V> inline V multiply_add(V a, V b, V c) {
#if defined(__FMA__) || defined(__aarch64__)
    if constexpr (std::is_same<V, float>()) return __builtin_fmaf(a, b, c);
#if defined(__AVX512F__)
    else if constexpr (sizeof(V) == 64)
        return reinterpret_cast<V>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
            reinterpret_cast<__m512>(c)));
#endif
#if defined(__FMA__)
    else if constexpr (sizeof(V) == 32)
        return reinterpret_cast<V>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b),
            reinterpret_cast<__m256>(c)));
#else
    else if constexpr (sizeof(V) == 16)
        return reinterpret_cast<V>(vfmaq_f32(reinterpret_cast<float32x4_t>(c),
            reinterpret_cast<float32x4_t>(a), reinterpret_cast<float32x4_t>(b)));
#endif
    else {
        for (size_t l = 0; l < sizeof(V) / sizeof(float); l++) c[l] = __builtin_fmaf(a[l], b[l], c[l]);
        return c;
    }
#else
    return a * b + c;
#endif
}

template <int W> inline typename Lanes<W>::U zero_extend(typename Lanes<W>::H half) {
#if defined(__AVX512F__)
    // else four instructions of gcc 12
    if constexpr (W == 16)
        return reinterpret_cast<typename Lanes<W>::U>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(half)));
#endif
    return __builtin_convertvector(half, typename Lanes<W>::U);
}

// fp32 <-> bf16, to nearest even; NaN stays NaN
template <int W> inline Vec<W> widen(const uint16_t* p) {
    typename Lanes<W>::H half;
    memcpy(&half, p, sizeof half);
    auto bits = zero_extend<W>(half) << 16;
    Vec<W> x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
template <int W> inline void narrow(uint16_t* p, Vec<W> x) {
    typename Lanes<W>::U bits;
    memcpy(&bits, &x, sizeof bits);
    bits = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40;
    auto half = __builtin_convertvector(bits, typename Lanes<W>::H);
    memcpy(p, &half, sizeof half);
}

// numbers of an activation, fp32 or bf16
template <int W> inline Vec<W> read(const float* p) { return load<W>(p); }
template <int W> inline Vec<W> read(const uint16_t* p) { return widen<W>(p); }
template <int W> inline void write(float* p, Vec<W> x) { store<W>(p, x); }
template <int W> inline void write(uint16_t* p, Vec<W> x) { narrow<W>(p, x); }

// W numbers of a row of V from i on; those behind the end are -inf
template <int W = WIDTH, class Number> inline Vec<W> numbers(const Number* row, long i, long V) {
    if (i + W <= V) return read<W>(row + i);
    Number part[W];
    Vec<W> x = fill<W>(-INFINITY);
    memcpy(part, row + i, (V - i) * sizeof(Number));
    for (long l = 0; l < V - i; l++) x[l] = read<1>(part + l)[0];
    return x;
}

// exp(x) to 1.5 ulp; 0 below -87.3, where fp32 has no normal numbers, and exp(88) above 88
template <int W> inline Vec<W> exponential(Vec<W> x) {
    typedef Vec<W> V;
    typedef typename Lanes<W>::I I;
    // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
    const float shift = 12582912.f;
    V low = fill<W>(-87.3f),
      clamped = choose<W>(x < low, low, choose<W>(x > fill<W>(88.f), fill<W>(88.f), x));
    V shifted = multiply_add(clamped, fill<W>(1.44269504f), fill<W>(shift)), n = shifted - shift;
    V r = multiply_add(n, fill<W>(2.12194440e-4f), multiply_add(n, fill<W>(-0.693359375f), clamped));
    V p = multiply_add(r, fill<W>(1.9875691500e-4f), fill<W>(1.3981999507e-3f));  // Cephes expf
    p = multiply_add(p, r, fill<W>(8.3334519073e-3f));
    p = multiply_add(p, r, fill<W>(4.1665795894e-2f));
    p = multiply_add(p, r, fill<W>(1.6666665459e-1f));
    p = multiply_add(p, r, fill<W>(5.0000001201e-1f));
    p = multiply_add(p, r * r, r) + 1.f;
    I power;
    memcpy(&power, &shifted, sizeof power);
    power = (power - 0x4b400000 + 127) << 23;
    V scale;
    memcpy(&scale, &power, sizeof scale);
    return choose<W>(x < low, V{}, p * scale);
}

template <int W> inline Vec<W> sigmoid(Vec<W> x) { return 1.f / (1.f + exponential<W>(-x)); }

// the sum of the lanes, by halves
template <int W> inline float sum(Vec<W> x) {
    if constexpr (W == 1) return x[0];
    else {
        Vec<W / 2> half[2];
        memcpy(half, &x, sizeof x);
        return sum<W / 2>(half[0] + half[1]);
    }
}
// NaN if a number of x is not finite; lane by lane, because by halves gcc 12 moved more through memory in
// wkv7's forward, 1.05 times its time
template <int W> inline float poison(Vec<W> x) {
    float total = 0;
    for (int l = 0; l < W; l++) total += x[l] * 0.f;
    return total;
}

// mean and 1 / standard deviation of n numbers, n a multiple of W; where the squares overflow NaN, as in
// torch, so that a run that diverges is noticed
template <int W, class Number> inline std::pair<float, float> moments(const Number* x, long n, float eps) {
    Vec<W> total = {}, squares = {};
    for (long i = 0; i < n; i += W) total += read<W>(x + i);
    const float mean = sum<W>(total) / n;
    for (long i = 0; i < n; i += W) {
        const auto centred = read<W>(x + i) - mean;
        squares = multiply_add(centred, centred, squares);
    }
    const float variance = sum<W>(squares) / n;
    return {mean, 1.f / std::sqrt(variance + eps) + variance * 0.f};
}

// lane l of the result is lane index(l) of x and y put side by side
#if defined(__clang__)
template <int W, class Index, int... L>
inline Vec<W> shuffle_lanes(Vec<W> x, Vec<W> y, Index, std::integer_sequence<int, L...>) {
    return __builtin_shufflevector(x, y, Index{}(L)...);
}
template <int W, class Index> inline Vec<W> shuffle(Vec<W> x, Vec<W> y, Index index) {
    return shuffle_lanes<W>(x, y, index, std::make_integer_sequence<int, W>());
}
#else
template <int W, class Index> inline Vec<W> shuffle(Vec<W> x, Vec<W> y, Index index) {
    typename Lanes<W>::I lanes{};
    for (int l = 0; l < W; l++) lanes[l] = index(l);
    return __builtin_shuffle(x, y, lanes);
}
#endif

// where bit D of the lane is clear, x, else y; each either in place (own) or from the lane D further on or
// back (other)
template <int W, int D> struct Own {
    constexpr int operator()(int l) const { return l & D ? W + l : l; }
};
template <int W, int D> struct Other {
    constexpr int operator()(int l) const { return l & D ? W + l - D : l + D; }
};
template <int W, int D> struct First {
    constexpr int operator()(int l) const { return l & D ? W + l - D : l; }
};
template <int W, int D> struct Second {
    constexpr int operator()(int l) const { return l & D ? W + l : l + D; }
};

// lane i of the result is what the lanes of rows[i] are together, by join(vector, vector)
template <int W, int D = W / 2, class Join> inline Vec<W> joined_rows(Vec<W>* rows, Join join) {
    for (int i = 0; i < D; i++) {
        Vec<W> x = rows[i], y = rows[i + D];
        rows[i] = join(shuffle<W>(x, y, Own<W, D>{}), shuffle<W>(x, y, Other<W, D>{}));
    }
    if constexpr (D > 1) return joined_rows<W, D / 2>(rows, join);
    return rows[0];
}

// lane i of the result is the sum of the lanes of rows[i]
template <int W> inline Vec<W> row_sums(Vec<W>* rows) {
    return joined_rows<W>(rows, [](Vec<W> x, Vec<W> y) { return x + y; });
}

// W rows of W lanes, transposed in place
template <int W, int D = W / 2> inline void transpose(Vec<W>* rows) {
    for (int i = 0; i < W; i++)
        if (!(i & D)) {
            Vec<W> x = rows[i], y = rows[i + D];
            rows[i] = shuffle<W>(x, y, First<W, D>{});
            rows[i + D] = shuffle<W>(x, y, Second<W, D>{});
        }
    if constexpr (D > 1) transpose<W, D / 2>(rows);
}

// to[j][i] = from[i][j] for i < rows, j < columns, both multiples of W
template <int W> inline void transpose(
    float* to, long to_stride, const float* from, long from_stride, long rows, long columns) {
    for (long i = 0; i < rows; i += W)
        for (long j = 0; j < columns; j += W) {
            Vec<W> block[W];
            for (int l = 0; l < W; l++) block[l] = load<W>(from + (i + l) * from_stride + j);
            transpose<W>(block);
            for (int l = 0; l < W; l++) store<W>(to + (j + l) * to_stride + i, block[l]);
        }
}

// One vector of N numbers per token, fp32: a view of a tensor (B, T, H, N) for one batch row and head, or of
// a buffer (T, N).
struct Rows {
    float* data;
    long stride;
    float* operator[](long t) const { return data + t * stride; }
};

// Asks the memory for token t of some vectors, two tokens before their use: a head's rows lie H * N numbers
// apart, which no hardware prefetcher follows, and the work on a token is longer than what a core looks
// ahead.
constexpr int AHEAD = 2;
template <class... Vectors> inline void prefetch(long t, long T, long N, const Vectors&... vectors) {
    if (t < 0 || t >= T) return;
    for (long n = 0; n < N; n += 16) (__builtin_prefetch(vectors[t] + n, 1), ...);
}

// Memory on a boundary of cache lines, not initialised.
struct Buffer {
    explicit Buffer(long floats)
        : data(static_cast<float*>(operator new(sizeof(float) * floats, std::align_val_t(64)))) {}
    ~Buffer() { operator delete(data, std::align_val_t(64)); }
    Buffer(const Buffer&) = delete;
    float* data;
};

// The pool of OpenMP that torch's own functions run on, in a process that has loaded it; otherwise null. Its
// threads are there and wait. A new thread begins when the caller has done most of such work already, and it
// shares its core with one of the pool that spins, unless OMP_WAIT_POLICY is passive.
#if defined(__linux__)
extern "C" __attribute__((weak)) void GOMP_parallel(
    void (*run)(void*), void* data, unsigned threads, unsigned flags);
#else
constexpr void (*GOMP_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
#endif

// work(item, thread) for every item below `items`, by `threads` threads that take the next item whenever they
// are free. A pool that is asked for fewer threads ends the others: `threads` is torch's number, or 1. Without
// POOL the threads are new ones, which end with the work.
template <bool POOL = true, class Work> inline void parallel(long items, int threads, Work work) {
    std::atomic<long> next{0};
    std::atomic<int> began{0};
    auto run = [&] {
        const int thread = began.fetch_add(1);
        for (long item; (item = next.fetch_add(1)) < items;) work(item, thread);
    };
    if (threads <= 1 || items <= 1) return run();
    if (POOL && GOMP_parallel)
        return GOMP_parallel([](void* all) { (*static_cast<decltype(run)*>(all))(); }, &run, threads, 0);
    std::vector<std::thread> others;
    for (int i = 1; i < threads && i < items; i++) others.emplace_back(run);
    run();
    for (auto& other : others) other.join();
}

// Arguments of every call, and the division of its work: one item is a head, or the same part of the value rows
// of every head.
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1 };

struct Call {
    const float* s0;
    const uint8_t* reset;
    long B, T, H, N;
    Dtype dtype;
    int threads;

    long stride() const { return H * N; }
    long offset(long head) const { return (head / H * T * H + head % H) * N; }
    // whether a document starts at token t; no token starts one at T
    bool starts(long head, long t) const { return reset && t < T && reset[head / H * T + t]; }
    // whether the state before token t is zero, so that its decay has no effect
    bool empty(long head, long t) const { return starts(head, t) || (t == 0 && !s0); }
    // as many parts as the threads need to share the work evenly
    long parts() const {
        long heads = B * H, parts = 1;
        while (heads * parts % threads && heads * parts < 4 * threads && N / parts % 32 == 0) parts *= 2;
        return parts;
    }

    // buffers of a backward: one for each thread, or one for each part, since the last part of a head reads
    // those of the others
    long slots() const { return parts() == 1 ? threads : B * H * parts(); }

    // fp32 activations are used where they lie, bf16 ones through a buffer (T, N)
    template <int W> Rows input(const void* tensor, long head, float* buffer) const {
        if (dtype == kFloat32)
            return {const_cast<float*>(static_cast<const float*>(tensor)) + offset(head), stride()};
        const uint16_t* from = static_cast<const uint16_t*>(tensor) + offset(head);
        for (long t = 0; t < T; t++)
            for (long n = 0; n < N; n += W) ::store<W>(buffer + t * N + n, widen<W>(from + t * stride() + n));
        return {buffer, N};
    }
    Rows output(void* tensor, long head, float* buffer) const {
        return dtype == kFloat32 ? Rows{static_cast<float*>(tensor) + offset(head), stride()}
                                 : Rows{buffer, N};
    }
    // W numbers of token t, from n on, rounded to the dtype
    template <int W> void store(void* tensor, long head, long t, long n, Vec<W> x) const {
        const long to = offset(head) + t * stride() + n;
        if (dtype == kFloat32) ::store<W>(static_cast<float*>(tensor) + to, x);
        else narrow<W>(static_cast<uint16_t*>(tensor) + to, x);
    }
    // columns [first, last) of a buffer, where there is one, to the tensor that it stands for
    template <int W> void flush(void* tensor, long head, Rows buffer, long first, long last) const {
        for (long t = 0; dtype != kFloat32 && t < T; t++)
            for (long n = first; n < last; n += W) store<W>(tensor, head, t, n, load<W>(buffer[t] + n));
    }
};

// work(head, first, last, buffer) -> Head for every part [first, last) of the value rows of every head, and
// once all parts of a head are there, on the thread of the last one, finish(parts, head)
template <class Head, class Work, class Finish>
inline void in_parts(const Call& call, float* scratch, long slot_floats, Work work, Finish finish) {
    const long parts = call.parts(), rows = call.N / parts, heads = call.B * call.H;
    std::vector<std::vector<Head>> done(heads, std::vector<Head>(parts));
    std::vector<std::atomic<long>> left(heads);
    for (auto& count : left) count = parts;
    parallel(heads * parts, call.threads, [&](long item, int thread) {
        const long head = item / parts, part = item % parts, slot = parts == 1 ? thread : item;
        done[head][part] = work(head, part * rows, part * rows + rows, scratch + slot * slot_floats);
        if (left[head].fetch_sub(1) == 1) finish(done[head], head);
    });
}

// the sum over the parts of a head of one of its vectors, W numbers from n on
template <int W, class Head>
inline Vec<W> total(const std::vector<Head>& parts, Rows Head::* vector, long t, long n) {
    Vec<W> sum = load<W>((parts[0].*vector)[t] + n);
    for (size_t p = 1; p < parts.size(); p++) sum += load<W>((parts[p].*vector)[t] + n);
    return sum;
}

// step(C, n) for n from 0 to N, in steps of C = 4, 2 or 1 vectors: the widest that fit into the registers and
// into what is left
template <int W, class Step> inline void in_vectors(long N, Step step) {
    for (long n = 0; n < N;) {
        if (N - n >= 4 * W && REGISTERS == 32) step(std::integral_constant<int, 4>(), n), n += 4 * W;
        else if (N - n >= 2 * W) step(std::integral_constant<int, 2>(), n), n += 2 * W;
        else step(std::integral_constant<int, 1>(), n), n += W;
    }
}

// A sum over many tokens that is as good as one in double: the second word holds what rounding took from the
// first.
template <int W> struct LongSum {
    Vec<W> high = {}, low = {};
    void add(Vec<W> x) {
        const Vec<W> sum = high + x, added = sum - high;
        low += (high - (sum - added)) + (x - added);
        high = sum;
    }
    Vec<W> value() const { return high + low; }
};

template <int W> inline void add_or_store(float* p, Vec<W> x, bool add) {
    store<W>(p, add ? load<W>(p) + x : x);
}

alignas(64) static const float ZEROS[256] = {};

// state rows of the backward that stay in the L1 cache: 32 KB
template <int W> inline long cached_rows(long N) { return std::max<long>(W, 8192 / N / W * W); }
