// bf16_products.h on a CPU. Tiles of 4 weight rows and 4 activations have 16 sums; up to 3 activations take
// one weight row after the other. It was not timed on a CPU that has the instruction: a bench with tiles of
// this form was, on a Zen 4 with one thread and 2 MB pages. All matrices of RWKV-7 12 x 768 take 8.5 ms to
// read there. With hi + lo they took 10.2 ms for 4 rows and 38.9 ms for 16, with hi alone 11.4 and 22.8 ms.
//
//   bf16_fast()
//       1 if the CPU has the instruction; other CPUs compute the same numbers, slowly
//   bf16_multiply(matrix, rows, columns, x, parts, B, y, first, last)
//       y (B, rows) = x (B, columns) times the matrix's rows [first, last), transposed
#include "bf16_products.h"

namespace bf16 {
namespace {

constexpr int W = WIDTH;
constexpr long LINE = 64, AHEAD_BYTES = 4096;

using Pairs = Lanes<W>::U;

inline Pairs load_pairs(const uint16_t* p) {
    Pairs x;
    memcpy(&x, p, sizeof x);
    return x;
}

// sum + the products of the odd numbers of each lane, then + those of the even ones
#if defined(__AVX512BF16__)
constexpr bool FAST = true;
inline Vec<W> dot_bf16(Vec<W> sum, Pairs w, Pairs x) {
    return reinterpret_cast<Vec<W>>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x)));
}
#else
constexpr bool FAST = false;
// Subnormal numbers become 0, as in the instruction. Products of two bf16 are exact in fp32.
inline Vec<W> flushed(Pairs bits) {
    bits = (bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits;
    Vec<W> x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline Vec<W> flushed(Vec<W> x) {
    Pairs bits;
    memcpy(&bits, &x, sizeof bits);
    return flushed(bits);
}
inline Vec<W> dot_bf16(Vec<W> sum, Pairs w, Pairs x) {
    sum = flushed(flushed(sum) + flushed(w & 0xffff0000u) * flushed(x & 0xffff0000u));
    return flushed(sum + flushed(w << 16) * flushed(x << 16));
}
#endif

// Sums of lanes, of which W are added up at once.
struct Totals {
    Vec<W> sums[W] = {};
    float* places[W];
    int count = 0;
    void add(Vec<W> sum, float* place) {
        sums[count] = sum, places[count] = place;
        if (++count == W) finish();
    }
    void finish() {
        const Vec<W> totals = row_sums<W>(sums);
        for (int i = 0; i < count; i++) *places[i] = totals[i];
        std::fill(sums, sums + W, Vec<W>{});
        count = 0;
    }
};

// Prefetches of a pass over the weights of a tile, in the order of the addresses.
struct Ahead {
    const char* at;
    long lines;  // for each block of columns
    void step() {
        for (long line = 0; line < lines; line++, at += LINE) __builtin_prefetch(at, 0, 2);
    }
};

// R weight rows of n numbers from `weights` on, T rows of activations from x[0] on
template <int PARTS, int R, int T>
inline void tile(const uint16_t* weights, long n, float* const* x, Ahead ahead, Vec<W> (&sums)[R][T]) {
    const long whole = n / BLOCK * BLOCK, low = padded(n);
    auto add = [&](const uint16_t* rows, long stride, long k) {
        Pairs w[R];
        for (int r = 0; r < R; r++) w[r] = load_pairs(rows + r * stride);
        for (int t = 0; t < T; t++)
            for (int part = 0; part < PARTS; part++) {
                const Pairs numbers = load_pairs(reinterpret_cast<uint16_t*>(x[t]) + part * low + k);
                for (int r = 0; r < R; r++) sums[r][t] = dot_bf16(sums[r][t], w[r], numbers);
            }
    };
    for (long k = 0; k < whole; k += BLOCK) {
        ahead.step();
        add(weights + k, n, k);
    }
    if (whole == n) return;
    uint16_t rest[R][BLOCK] = {};
    for (int r = 0; r < R; r++) std::copy(weights + r * n + whole, weights + (r + 1) * n, rest[r]);
    add(rest[0], BLOCK, whole);
}

// The rows of a matrix in groups of R, each with T rows of activations at a time.
template <int PARTS, int R, int T> void multiply(const uint16_t* matrix, long n, float* const* x, long count,
    long first, long last, float* const* out) {
    const long passes = count / T, lines = (R * BLOCK * 2 / LINE + passes - 1) / passes;
    const long bytes = R * n * 2, distance = R == 1 ? AHEAD_BYTES : 2 * bytes;
    Totals totals;
    for (long row = first; row < last; row += R)
        for (long b = 0; b < count; b += T) {
            const char* next = reinterpret_cast<const char*>(matrix + row * n) + distance;
            Vec<W> sums[R][T] = {};
            tile<PARTS, R, T>(matrix + row * n, n, x + b, {next + b / T * (bytes / passes), lines}, sums);
            for (int t = 0; t < T; t++)
                for (int r = 0; r < R; r++) totals.add(sums[r][t], out[b + t] + row + r);
        }
    totals.finish();
}

template <int PARTS> void multiply(
    const uint16_t* matrix, long n, float* const* x, long count, long first, long last, float* const* out) {
    constexpr int R = 4, T = 4;
    const long tiles = count / T * T, end = first + (last - first) / R * R;
    if (tiles) {
        multiply<PARTS, R, T>(matrix, n, x, tiles, first, end, out);
        multiply<PARTS, 1, T>(matrix, n, x, tiles, end, last, out);
    }
    x += tiles, out += tiles, count -= tiles;
    if (count == 1) multiply<PARTS, 1, 1>(matrix, n, x, 1, first, last, out);
    else if (count == 2) multiply<PARTS, 1, 2>(matrix, n, x, 2, first, last, out);
    else if (count == 3) multiply<PARTS, 1, 3>(matrix, n, x, 3, first, last, out);
}

}  // namespace

void prepare(const float* x, long n, long from, long to, int parts, float* out) {
    uint16_t *high = reinterpret_cast<uint16_t*>(out), *low = high + padded(n);
    float numbers[W] = {};
    for (long i = from; i < to; i += W) {
        const long count = std::min<long>(W, to - i);
        std::copy(x + i, x + i + count, numbers);
        uint16_t rounded[W], rest[W];
        narrow<W>(rounded, load<W>(numbers));
        narrow<W>(rest, load<W>(numbers) - widen<W>(rounded));
        std::copy(rounded, rounded + count, high + i);
        if (parts == 2) std::copy(rest, rest + count, low + i);
    }
    if (to < n) return;
    std::fill(high + n, high + padded(n), 0);
    if (parts == 2) std::fill(low + n, low + padded(n), 0);
}

void multiply(const uint16_t* matrix, long columns, float* const* x, int parts, long count, long first,
    long last, float* const* out) {
    if (parts == 2) multiply<2>(matrix, columns, x, count, first, last, out);
    else multiply<1>(matrix, columns, x, count, first, last, out);
}

}  // namespace bf16

extern "C" {

int bf16_fast() { return bf16::FAST; }

void bf16_multiply(const uint16_t* matrix, int64_t rows, int64_t columns, const float* x, int64_t parts,
    int64_t B, float* y, int64_t first, int64_t last) {
    const long size = bf16::padded(columns);
    const Buffer prepared(B * size);
    std::vector<float*> from, to;
    for (int64_t b = 0; b < B; b++) {
        from.push_back(prepared.data + b * size);
        to.push_back(y + b * rows);
        bf16::prepare(x + b * columns, columns, 0, columns, static_cast<int>(parts), from[b]);
    }
    bf16::multiply(matrix, columns, from.data(), static_cast<int>(parts), B, first, last, to.data());
}

}
