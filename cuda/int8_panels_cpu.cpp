// int8_panels.h on a CPU.
//
// A tile is a panel and up to 16 rows of activations, whose integer sums stay in registers for a part of a
// block. On a Xeon with VNNI (family 6, model 85) all matrices of RWKV-7 12 x 768 take 12.8 ms for one row,
// which is what reading them takes there, 14.6 ms for 8 and 19.6 ms for 16; a row's activations 0.12 ms.
// Panels of 32 rows took 13.0, 14.8 and 23.6 ms; activations that lay [BLOCK / 4][B][4] 1.1 times as long for
// 16 rows, and their quantising twice.
//
//   panels_fast()
//       1 if the CPU has the instruction; other CPUs compute the same numbers, slowly
//   panels_bytes(rows, columns)
//   panels_pack(dtype, weights, rows, columns, matrix, threads)
//       weights: row by row, fp32 or bf16; matrix: panels_bytes() of them, at a multiple of 64 bytes
//   panels_multiply(matrix, rows, columns, x, B, y, first, last)
//       y (B, rows) = x (B, columns) times the matrix's rows [first, last), transposed
#include "int8_panels.h"

namespace panels {
namespace {

constexpr int W = WIDTH, VECTORS = ROWS / W;
constexpr long BLOCK_BYTES = ROWS * (BLOCK + 2), AHEAD_BYTES = 4096;
// rows of activations in a tile, by the number of registers
constexpr int MOST = REGISTERS == 32 && VECTORS == 1 ? 16 : 4;
// of a scale; its inverse is finite
constexpr float SMALLEST = 1e-30f;

using Ints = Lanes<W>::I;
using Unsigned = Lanes<W>::U;

// sums + the four products of bytes in each lane; w without a sign, x with one
#if defined(__AVX512VNNI__)
constexpr bool FAST = true;
inline Ints add_products(Ints sums, Ints w, Ints x) {
    return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(
        reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(w), reinterpret_cast<__m512i>(x)));
}
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
constexpr bool FAST = true;
inline Ints add_products(Ints sums, Ints w, Ints x) {
    return reinterpret_cast<Ints>(_mm256_dpbusd_avx_epi32(
        reinterpret_cast<__m256i>(sums), reinterpret_cast<__m256i>(w), reinterpret_cast<__m256i>(x)));
}
#else
constexpr bool FAST = false;
inline Ints add_products(Ints sums, Ints w, Ints x) {
    for (int byte = 0; byte < 32; byte += 8) sums += (w >> byte & 255) * (x << (24 - byte) >> 24);
    return sums;
}
#endif

inline float largest(Vec<W> x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(reinterpret_cast<__m512>(x));
#else
    float most = x[0];
    for (int lane = 1; lane < W; lane++) most = std::max(most, x[lane]);
    return most;
#endif
}
inline uint32_t total(Unsigned x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(x));
#else
    uint32_t sum = 0;
    for (int lane = 0; lane < W; lane++) sum += x[lane];
    return sum;
#endif
}
inline void store_bytes(int8_t* p, Unsigned x) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(x)));
#else
    for (int lane = 0; lane < W; lane++) p[lane] = static_cast<int8_t>(x[lane]);
#endif
}

// The scale with which the largest of n numbers becomes 127 or -127; NaN where one is not finite.
inline float scale_of(const float* x, long n) {
    Vec<W> top = {}, bad = {};
    for (long i = 0; i < n; i += W) {
        const Vec<W> v = load<W>(x + i), size = choose<W>(v < 0.f, -v, v);
        top = choose<W>(size > top, size, top);
        bad += v * 0.f;
    }
    const float most = largest(top);
    return (most < 127 * SMALLEST ? 0.f : most / 127) + sum<W>(bad);
}

// round(x / scale) of n numbers, and the sum of them; anything where the scale is NaN
inline uint32_t round_to_bytes(const float* x, long n, float scale, int8_t* out) {
    const float inverse = scale >= SMALLEST ? 1 / scale : 0.f;
    // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
    const float shift = 12582912.f;
    Unsigned sums = {};
    for (long i = 0; i < n; i += W) {
        const Vec<W> shifted = load<W>(x + i) * inverse + shift;
        Unsigned bits;
        memcpy(&bits, &shifted, sizeof bits);
        bits -= 0x4b400000u;
        store_bytes(out + i, bits);
        sums += bits;
    }
    return total(sums);
}

inline float number(const float* p) { return *p; }
inline float number(const uint16_t* p) {
    const uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// columns [64 block, ...) of a row: to its place `row` in a panel's block
template <class Number> void pack_row(const Number* weights, long count, long row, uint8_t* block) {
    float x[BLOCK] = {};
    int8_t bytes[BLOCK];
    for (long i = 0; i < count; i++) x[i] = number(weights + i);
    uint16_t* scales = reinterpret_cast<uint16_t*>(block + ROWS * BLOCK);
    const Vec<W> scale = fill<W>(scale_of(x, BLOCK));
    uint16_t rounded[W];
    narrow<W>(rounded, scale);
    scales[row] = rounded[0];
    round_to_bytes(x, BLOCK, number(rounded), bytes);
    for (long i = 0; i < BLOCK; i++)
        block[(i / 4 * ROWS + row) * 4 + i % 4] = static_cast<uint8_t>(bytes[i] + 128);
}

template <class Number>
void pack(const Number* weights, long rows, long columns, uint8_t* matrix, int threads) {
    parallel((rows + ROWS - 1) / ROWS, threads, [&](long panel, int) {
        uint8_t* block = matrix + panel * blocks(columns) * BLOCK_BYTES;
        for (long from = 0; from < columns; from += BLOCK, block += BLOCK_BYTES)
            for (long row = 0; row < ROWS; row++) {
                const long at = panel * ROWS + row, count = at < rows ? std::min(BLOCK, columns - from) : 0;
                pack_row(weights + at * columns + from, count, row, block);
            }
    });
}

// A panel and the activations of some rows: `activations`, `out` begin at the first of them.
struct Tile {
    const uint8_t* panel;
    const Record* activations;
    long columns, B;
    float* const* out;
    long row, rows;  // of the matrix: the panel's first one, and how many of the panel's are wanted
};

// The panel times T rows of activations. Every line is asked for in advance: 4 KB, into the L2 cache.
template <int T> void multiply(Tile tile) {
    Vec<W> totals[VECTORS][T] = {};
    for (long from = 0; from < tile.columns; from += BLOCK) {
        const uint16_t* weight_scales = reinterpret_cast<const uint16_t*>(tile.panel + ROWS * BLOCK);
        for (int part = 0; part < PARTS; part++) {
            Ints sums[VECTORS][T];
            for (int v = 0; v < VECTORS; v++)
                for (int t = 0; t < T; t++) sums[v][t] = Ints{} + tile.activations[t].starts[part];
            for (int i = part * PART; i < (part + 1) * PART; i += 4)
                for (int v = 0; v < VECTORS; v++, tile.panel += sizeof(Ints)) {
                    Ints weights;
                    memcpy(&weights, tile.panel, sizeof weights);
                    __builtin_prefetch(tile.panel + AHEAD_BYTES, 0, 2);
                    for (int t = 0; t < T; t++) {
                        int32_t four;
                        memcpy(&four, tile.activations[t].bytes + i, sizeof four);
                        sums[v][t] = add_products(sums[v][t], weights, Ints{} + four);
                    }
                }
            for (int v = 0; v < VECTORS; v++)
                for (int t = 0; t < T; t++)
                    totals[v][t] = multiply_add(
                        __builtin_convertvector(sums[v][t], Vec<W>) * tile.activations[t].scales[part],
                        widen<W>(weight_scales + v * W), totals[v][t]);
        }
        __builtin_prefetch(tile.panel + AHEAD_BYTES, 0, 2);
        tile.panel += ROWS * 2;
        tile.activations += tile.B;
    }
    for (int v = 0; v < VECTORS; v++)
        for (int t = 0; t < T; t++) {
            const long count = std::min<long>(W, tile.rows - v * W);
            if (count > 0) memcpy(tile.out[t] + tile.row + v * W, &totals[v][t], sizeof(float) * count);
        }
}

// ... times min(T, left) rows
template <int T> void multiply(const Tile& tile, long left) {
    if constexpr (T > 1)
        if (left < T) return multiply<T - 1>(tile, left);
    multiply<T>(tile);
}

}  // namespace

void prepare(const float* x, long n, long from, long to, long row, long B, Record* activations) {
    for (long start = from; start < to; start += BLOCK) {
        Record& record = activations[start / BLOCK * B + row];
        float padded[BLOCK] = {};
        const float* numbers = x + start;
        if (start + BLOCK > n) std::copy(numbers, x + n, padded), numbers = padded;
        for (int part = 0; part < PARTS; part++) {
            const float* of_part = numbers + part * PART;
            const float scale = record.scales[part] = scale_of(of_part, PART);
            record.starts[part] = -128u * round_to_bytes(of_part, PART, scale, record.bytes + part * PART);
        }
    }
}

void multiply(const uint8_t* matrix, long columns, const Record* activations, long B, long first, long last,
    float* const* out) {
    for (long row = first; row < last; row += ROWS) {
        const uint8_t* panel = matrix + matrix_bytes(row, columns);
        const long rows = std::min(ROWS, last - row);
        for (long b = 0; b < B; b += MOST)
            multiply<MOST>({panel, activations + b, columns, B, out + b, row, rows}, B - b);
    }
}

}  // namespace panels

extern "C" {

int panels_fast() { return panels::FAST; }

int64_t panels_bytes(int64_t rows, int64_t columns) { return panels::matrix_bytes(rows, columns); }

void panels_pack(int64_t dtype, const void* weights, int64_t rows, int64_t columns, uint8_t* matrix,
    int64_t threads) {
    if (dtype == kFloat32)
        panels::pack(static_cast<const float*>(weights), rows, columns, matrix, threads);
    else panels::pack(static_cast<const uint16_t*>(weights), rows, columns, matrix, threads);
}

void panels_multiply(const uint8_t* matrix, int64_t rows, int64_t columns, const float* x, int64_t B,
    float* y, int64_t first, int64_t last) {
    std::vector<panels::Record> activations(B * panels::blocks(columns));
    std::vector<float*> out(B);
    for (int64_t b = 0; b < B; b++) {
        panels::prepare(x + b * columns, columns, 0, columns, b, B, activations.data());
        out[b] = y + b * rows;
    }
    panels::multiply(matrix, columns, activations.data(), B, first, last, out.data());
}

}
