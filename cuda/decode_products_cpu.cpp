// A product with a matrix is bound by the memory that it streams, up to about four rows of activations, and
// by the multiplications above.
//
// One row of activations: every thread reads rows of its own from the first to the last, one at a time. The
// hardware looks ahead within a page and stops at its end, so the beginning of a page is asked for two pages
// before (5 to 7 % faster). Rows of more than 6000 numbers reach 60 % of the bandwidth, because their
// activations do not stay in the L1 cache.
//
// More: tiles of ROWS weight rows and 4 activations, whose weights are loaded and widened once for 4. They
// read several streams, which the hardware does not follow: each line of the rows after these is asked for
// by hand, in the order of their addresses.
//
// A weight is loaded as whole lanes of 32 bits, which hold one fp32, two bf16 or four int8, and the
// activations lie in that order: widening is then one operation, a shift or a mask, and bf16 weights in the
// cache are multiplied 2.6 times as fast as by widening halves.
//
// The order of a sum: 4 accumulators of WIDTH lanes, each of the blocks and the part of the lanes that are
// its own. A tile has no registers for the 4 of all its sums, so it goes over its weights, in the L1 cache,
// once for each.
#include "decode_products.h"

#include "bf16_products.h"
#include "int8_panels.h"

namespace {

constexpr int W = WIDTH;
// of a tile, by the number of registers
constexpr int ROWS = REGISTERS == 32 ? 4 : 2, COLUMNS = 4;
// rows of a matrix of low rank after which its sums are stored
constexpr long BLOCK = 16;
constexpr long LINE = 64;

// Keeps a load from being done once for each use of it.
template <class T> inline void in_register(T& x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
}

// part p of the lanes of a block of weights: the elements p, p + share, p + 2 share ... of it
inline Vec<W> part(const float*, Lanes<W>::U lanes, int) {
    Vec<W> x;
    memcpy(&x, &lanes, sizeof x);
    return x;
}
inline Vec<W> part(const uint16_t*, Lanes<W>::U lanes, int p) {
    return part(static_cast<const float*>(nullptr), p ? lanes & 0xffff0000u : lanes << 16, 0);
}
inline Vec<W> part(const int8_t*, Lanes<W>::U lanes, int p) {
    Lanes<W>::I top;
    lanes <<= 24 - 8 * p;
    memcpy(&top, &lanes, sizeof top);
    return __builtin_convertvector(top >> 24, Vec<W>);
}

struct Even {
    constexpr int operator()(int l) const { return 2 * l; }
};
struct Odd {
    constexpr int operator()(int l) const { return 2 * l + 1; }
};

// share vectors of numbers -> the vector of each part
template <int share> inline void spread_block(const float* x, float* out) {
    Vec<W> in[share], mid[share];
    for (int i = 0; i < share; i++) in[i] = load<W>(x + i * W);
    if constexpr (share == 1) store<W>(out, in[0]);
    else {
        for (int i = 0; i < share; i += 2) {
            mid[i / 2] = shuffle<W>(in[i], in[i + 1], Even{});
            mid[share / 2 + i / 2] = shuffle<W>(in[i], in[i + 1], Odd{});
        }
        if constexpr (share == 2) store<W>(out, mid[0]), store<W>(out + W, mid[1]);
        else
            for (int odd = 0; odd < 2; odd++) {
                store<W>(out + odd * W, shuffle<W>(mid[2 * odd], mid[2 * odd + 1], Even{}));
                store<W>(out + (odd + 2) * W, shuffle<W>(mid[2 * odd], mid[2 * odd + 1], Odd{}));
            }
    }
}
// a rest that fills no block keeps its place
template <int share> void spread(const float* x, long n, long from, long to, float* out) {
    constexpr long block = share * W;
    const long whole = n / block * block;
    for (long i = from; i < to;) {
        if (i >= whole) {
            std::copy(x + i, x + to, out + i);
            return;
        }
        const long start = i / block * block;
        if (i == start && i + block <= to) {
            spread_block<share>(x + i, out + i);
            i += block;
            continue;
        }
        for (const long end = std::min(start + block, to); i < end; i++)
            out[start + (i - start) % share * W + (i - start) / share] = x[i];
    }
}

inline void ask_for(const char* line) { __builtin_prefetch(line, 0, 2); }

// Asks for the beginnings of the pages that lie two pages behind those that begin in [from, to).
inline void look_ahead(const void* from, const void* to) {
    constexpr uintptr_t PAGE = 4096;
    for (uintptr_t page = (reinterpret_cast<uintptr_t>(from) + PAGE - 1) / PAGE * PAGE;
         page < reinterpret_cast<uintptr_t>(to); page += PAGE)
        for (uintptr_t line = 0; line < 2; line++)
            __builtin_prefetch(reinterpret_cast<const void*>(page + 2 * PAGE + line * LINE), 0, 1);
}

// The lines of the next weight rows, of which every step of a tile asks for some.
struct Ahead {
    const char* at;
    long bytes, lines;
    // `bytes` from `from` on, in that many steps
    Ahead(const void* from, long total, long steps)
        : at(static_cast<const char*>(from)),
          bytes(steps ? (total + steps - 1) / steps : 0),
          lines((bytes + LINE - 1) / LINE) {}
    void step() {
        for (long line = 0; line < lines; line++) ask_for(at + line * LINE);
        at += bytes;
    }
};

inline Lanes<W>::U lanes_at(const void* p) {
    Lanes<W>::U lanes;
    memcpy(&lanes, p, sizeof lanes);
    in_register(lanes);
    return lanes;
}

// The accumulators [FIRST, FIRST + COUNT) of R weight rows of n numbers with X rows of activations: sums[a]
// of weight row r and activations t is at [a][r * X + t]. The loops over what is in registers are unrolled by
// hand, else gcc 12 keeps it in memory.
template <class T, int R, int X, int FIRST, int COUNT>
inline void accumulate(
    const T* weights, const float* const* x, long n, Ahead& ahead, Vec<W> (&sums)[COUNT][R * X]) {
    constexpr int share = sizeof(float) / sizeof(T), together = 4 / share, last = FIRST + COUNT;
    Vec<W> own[COUNT * R * X];
#pragma GCC unroll 16
    for (auto& sum : own) sum = Vec<W>{};
    const float* from[X];
    for (int t = 0; t < X; t++) from[t] = x[t];
    // block b of those that are added up side by side
    auto block = [&](long i, int b) __attribute__((always_inline)) {
        if ((b + 1) * share <= FIRST || b * share >= last) return;
        Lanes<W>::U lanes[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) lanes[r] = lanes_at(weights + r * n + i);
#pragma GCC unroll 16
        for (int p = 0; p < share; p++) {
            const int a = b * share + p;
            if (a < FIRST || a >= last) continue;
            Vec<W> wide[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) wide[r] = part(weights, lanes[r], p);
#pragma GCC unroll 16
            for (int t = 0; t < X; t++) {
                const Vec<W> activations = load<W>(from[t] + i + p * W);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++)
                    own[(a - FIRST) * R * X + r * X + t] =
                        multiply_add(wide[r], activations, own[(a - FIRST) * R * X + r * X + t]);
            }
        }
    };
    long i = 0;
    Ahead lines = ahead;  // in registers
    for (; i + 4 * W <= n; i += 4 * W) {
        lines.step();
#pragma GCC unroll 16
        for (int b = 0; b < together; b++) block(i + b * share * W, b);
    }
    for (; i + share * W <= n; i += share * W) block(i, 0);
    ahead = lines;
    memcpy(sums, own, sizeof sums);
    if (FIRST) return;
    for (; i < n; i++)
        for (int r = 0; r < R; r++)
            for (int t = 0; t < X; t++) {
                float& sum = reinterpret_cast<float*>(&sums[0][r * X + t])[0];
                sum = multiply_add(value(weights + r * n + i), from[t][i], sum);
            }
}

// W sums whose sum is the product, for each of R weight rows and X rows of activations
template <class T, int R, int X>
inline void products(const T* weights, const float* const* x, long n, Ahead& ahead, Vec<W>* out) {
    if constexpr (X == 1) {
        Vec<W> all[4][R];
        accumulate<T, R, 1, 0, 4>(weights, x, n, ahead, all);
        for (int i = 0; i < R; i++) out[i] = (all[0][i] + all[1][i]) + (all[2][i] + all[3][i]);
    } else if constexpr (X == 2) {
        Vec<W> two[2][R * X];
        accumulate<T, R, X, 0, 2>(weights, x, n, ahead, two);
        for (int i = 0; i < R * X; i++) out[i] = two[0][i] + two[1][i];
        accumulate<T, R, X, 2, 2>(weights, x, n, ahead, two);
        for (int i = 0; i < R * X; i++) out[i] += two[0][i] + two[1][i];
    } else {
        Vec<W> one[1][R * X], third[R * X];
        accumulate<T, R, X, 0, 1>(weights, x, n, ahead, one);
        for (int i = 0; i < R * X; i++) out[i] = one[0][i];
        accumulate<T, R, X, 1, 1>(weights, x, n, ahead, one);
        for (int i = 0; i < R * X; i++) out[i] += one[0][i];
        accumulate<T, R, X, 2, 1>(weights, x, n, ahead, one);
        for (int i = 0; i < R * X; i++) third[i] = one[0][i];
        accumulate<T, R, X, 3, 1>(weights, x, n, ahead, one);
        for (int i = 0; i < R * X; i++) out[i] += third[i] + one[0][i];
    }
}

// the sums of `count` vectors, R * X of a tile from `row` on, to their places
template <class T, int X>
inline void finish(const Matrix& matrix, long row, Vec<W>* sums, int count, float* const* out) {
    for (int start = 0; start < count; start += W) {
        Vec<W> rows[W] = {};
        for (int i = 0; i < W && start + i < count; i++) rows[i] = sums[start + i];
        const Vec<W> totals = row_sums<W>(rows);
        for (int i = 0; i < W && start + i < count; i++) {
            const int r = (start + i) / X, t = (start + i) % X;
            out[t][row + r] = std::is_same<T, int8_t>() ? totals[i] * matrix.scale[row + r] : totals[i];
        }
    }
}

template <class T, int R, int X>
inline void tile(const Matrix& matrix, long row, const float* const* x, Ahead& ahead, float* const* out) {
    Vec<W> sums[R * X];
    products<T, R, X>(
        static_cast<const T*>(matrix.data) + row * matrix.columns, x, matrix.columns, ahead, sums);
    finish<T, X>(matrix, row, sums, R * X, out);
}

// one row of activations
template <class T>
void stream(const Matrix& matrix, const float* const* x, long first, long last, float* const* out) {
    const T* data = static_cast<const T*>(matrix.data);
    Ahead nothing(nullptr, 0, 0);
    for (long row = first; row < last; row += W) {
        const long count = std::min<long>(W, last - row);
        Vec<W> sums[W] = {};
        for (long r = 0; r < count; r++) {
            const T* weights = data + (row + r) * matrix.columns;
            look_ahead(weights, weights + matrix.columns);
            products<T, 1, 1>(weights, x, matrix.columns, nothing, sums + r);
        }
        finish<T, 1>(matrix, row, sums, count, out);
    }
}

template <class T>
void multiply_as(const Matrix& matrix, const Input& input, long first, long last, float* const* out) {
    const float* const* x = input.rows;
    const long bytes = ROWS * matrix.columns * static_cast<long>(sizeof(T)),
               passes = input.count / COLUMNS * 4 + input.count % COLUMNS / 2 * 2 + input.count % 2,
               steps = passes * (matrix.columns / (4 * W));
    if (input.count == 1) return stream<T>(matrix, x, first, last, out);
    long row = first;
    for (; row + ROWS <= last; row += ROWS) {
        // one group of rows ahead, or two small ones
        const T* next = static_cast<const T*>(matrix.data) + (row + (bytes < 4096 ? 2 : 1) * ROWS) * matrix.columns;
        Ahead ahead(next, bytes, steps);
        long b = 0;
        for (; b + COLUMNS <= input.count; b += COLUMNS)
            tile<T, ROWS, COLUMNS>(matrix, row, x + b, ahead, out + b);
        if (b + 2 <= input.count) tile<T, ROWS, 2>(matrix, row, x + b, ahead, out + b), b += 2;
        if (b < input.count) tile<T, ROWS, 1>(matrix, row, x + b, ahead, out + b);
    }
    for (long b = 0; row < last && b < input.count; b++) stream<T>(matrix, x + b, row, last, out + b);
}

// the vector at p of which `count` numbers are there
template <class T> inline Vec<W> widened(const T* p, long count) {
    T whole[W] = {};
    if (count < W) memcpy(whole, p, sizeof(T) * count), p = whole;
    if constexpr (std::is_same<T, float>()) return load<W>(p);
    else return widen<W>(p);
}

// out[t][c] += x[t][row] rows[row][c] for rows [first, last) and V vectors of c; the last one has `count`
template <class T, int V, int X> inline void add_tile(const T* rows, long columns, const float* const* x,
    long first, long last, long c, long count, float* const* out) {
    Vec<W> sums[V][X];
    for (int v = 0; v < V; v++)
        for (int t = 0; t < X; t++) sums[v][t] = widened(out[t] + c + v * W, v < V - 1 ? W : count);
    for (long row = first; row < last; row++) {
        const T* weights = rows + row * columns + c;
        Vec<W> wide[V];
        for (int v = 0; v < V; v++) wide[v] = widened(weights + v * W, v < V - 1 ? W : count);
        for (int t = 0; t < X; t++)
            for (int v = 0; v < V; v++) sums[v][t] = multiply_add(wide[v], fill<W>(x[t][row]), sums[v][t]);
    }
    for (int v = 0; v < V; v++)
        for (int t = 0; t < X; t++)
            memcpy(out[t] + c + v * W, &sums[v][t], sizeof(float) * (v < V - 1 ? W : count));
}

// ... for c in [from, to), V vectors at a time where there are so many
template <class T, int V, int X> inline void add_vectors(const T* rows, long columns, const float* const* x,
    long first, long last, long from, long to, float* const* out) {
    for (; from + V * W <= to; from += V * W)
        add_tile<T, V, X>(rows, columns, x, first, last, from, W, out);
    if constexpr (V > 1) add_vectors<T, V / 2, X>(rows, columns, x, first, last, from, to, out);
    else if (from < to) add_tile<T, 1, X>(rows, columns, x, first, last, from, to - from, out);
}

template <class T> void add_columns_as(const Matrix& matrix, const float* const* x, long count, long first,
    long last, long from, long to, float* const* out) {
    const T* data = static_cast<const T*>(matrix.data);
    constexpr int sums = ROWS * COLUMNS;
    for (long row = first; row < last; row += BLOCK) {
        const long end = std::min(row + BLOCK, last);
        look_ahead(data + row * matrix.columns, data + end * matrix.columns);
        long b = 0;
        for (; b + 4 <= count; b += 4)
            add_vectors<T, sums / 4, 4>(data, matrix.columns, x + b, row, end, from, to, out + b);
        for (; b < count; b++)
            add_vectors<T, sums / 2, 1>(data, matrix.columns, x + b, row, end, from, to, out + b);
    }
}

}  // namespace

long unit(int64_t type) { return type == kPanels ? panels::BLOCK : 1; }

static int bf16_parts(int64_t type) { return type == kBf16Pairs ? 2 : 1; }

static panels::Record* records(const Input& input) {
    return reinterpret_cast<panels::Record*>(input.rows[0]);
}

void prepare(int64_t type, const float* x, long n, long from, long to, const Input& input, long row) {
    float* out = input.rows[row];
    if (type == kFp32) spread<1>(x, n, from, to, out);
    else if (type == kBf16) spread<2>(x, n, from, to, out);
    else if (type == kInt8) spread<4>(x, n, from, to, out);
    else if (type != kPanels) bf16::prepare(x, n, from, to, bf16_parts(type), out);
    else panels::prepare(x, n, from, to, row, input.count, records(input));
}

void multiply(const Matrix& matrix, const Input& input, long first, long last, float* const* out) {
    if (matrix.type == kFp32) multiply_as<float>(matrix, input, first, last, out);
    else if (matrix.type == kBf16) multiply_as<uint16_t>(matrix, input, first, last, out);
    else if (matrix.type == kInt8) multiply_as<int8_t>(matrix, input, first, last, out);
    else if (matrix.type == kPanels)
        panels::multiply(static_cast<const uint8_t*>(matrix.data), matrix.columns, records(input),
            input.count, first, last, out);
    else
        bf16::multiply(static_cast<const uint16_t*>(matrix.data), matrix.columns, input.rows,
            bf16_parts(matrix.type), input.count, first, last, out);
}

void add_columns(const Matrix& matrix, const float* const* x, long count, long first, long last, long from,
    long to, float* const* out) {
    if (matrix.type == kFp32) add_columns_as<float>(matrix, x, count, first, last, from, to, out);
    else add_columns_as<uint16_t>(matrix, x, count, first, last, from, to, out);
}
