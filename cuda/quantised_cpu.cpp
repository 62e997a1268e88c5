// Quantised weights (rwkv_miss/quantised.py has the format) expanded to matrices on a CPU: one pass, and no
// memory beside the result.
//
// A row is the codes of its blocks of 64 weights, 64 bytes each in int8 and 32 in nf4, then their scales in
// bf16. The codes become fp32 numbers, of nf4 two with one look-up, and are multiplied by their scales in
// vectors and rounded once. That is done to several blocks in turn, because a vector that is loaded right
// after its parts were stored waits for them: with one block at a time nf4 took 1.45 times as long. To
// permute a register of 16 values instead takes 0.8 times as long where there is AVX-512, twice where there
// is not.
//
// The C interface is that of quantised.cu, in fp32 and bf16; `context` is the number of threads.
#include "cpu.h"

namespace {

constexpr int BLOCK = 64, TOGETHER = 8;
// weights that a thread takes at a time; fewer are done before another one has started
constexpr int64_t AT_ONCE = 1 << 19;

struct Int8 {
    static constexpr int BYTES = BLOCK;
    // in vectors, which gcc does not make of __builtin_convertvector of bytes
    static void decode(const uint8_t* codes, const float*, float* numbers, int64_t bytes) {
        for (int64_t n = 0; n < bytes; n++) numbers[n] = (int8_t)codes[n];
    }
};

struct Nf4 {
    static constexpr int BYTES = BLOCK / 2;
    static void decode(const uint8_t* codes, const float* pairs, float* numbers, int64_t bytes) {
        for (int64_t n = 0; n < bytes; n++) memcpy(numbers + 2 * n, pairs + 2 * codes[n], 2 * sizeof(float));
    }
};

inline void put(float* p, Vec<WIDTH> x) { store<WIDTH>(p, x); }
inline void put(uint16_t* p, Vec<WIDTH> x) { narrow<WIDTH>(p, x); }

inline float bf16(const uint8_t* p) {
    const uint32_t bits = (uint32_t)(p[0] | p[1] << 8) << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

template <class Kind, class T>
void expand_row(const uint8_t* row, const float* pairs, T* weight, int64_t width) {
    const int64_t blocks = (width + BLOCK - 1) / BLOCK;
    float numbers[TOGETHER * BLOCK];
    T last[BLOCK];
    for (int64_t first = 0; first < blocks; first += TOGETHER) {
        const int64_t end = std::min(blocks, first + TOGETHER);
        Kind::decode(row + first * Kind::BYTES, pairs, numbers, (end - first) * Kind::BYTES);
        for (int64_t b = first; b < end; b++) {
            const float scale = bf16(row + blocks * Kind::BYTES + 2 * b);
            const int64_t left = width - b * BLOCK;
            T* to = left < BLOCK ? last : weight + b * BLOCK;
            for (int n = 0; n < BLOCK; n += WIDTH)
                put(to + n, load<WIDTH>(numbers + (b - first) * BLOCK + n) * scale);
            if (left < BLOCK) memcpy(weight + b * BLOCK, last, left * sizeof(T));
        }
    }
}

template <class Kind, class T> void expand(
    const uint8_t* quantised, const float* pairs, T* weight, int64_t out, int64_t width, int threads) {
    const int64_t bytes = (width + BLOCK - 1) / BLOCK * (Kind::BYTES + 2),
                  rows = std::max<int64_t>(1, AT_ONCE / width);
    parallel((out + rows - 1) / rows, threads, [&](long item, int) {
        for (int64_t i = item * rows; i < std::min(out, (item + 1) * rows); i++)
            expand_row<Kind>(quantised + i * bytes, pairs, weight + i * width, width);
    });
}

template <class Kind> int run(const uint8_t* quantised, const float* pairs, void* weight, int64_t out,
    int64_t width, int dtype, void* context) {
    const int threads = (int)(intptr_t)context;
    if (dtype == kFloat32) expand<Kind>(quantised, pairs, static_cast<float*>(weight), out, width, threads);
    else expand<Kind>(quantised, pairs, static_cast<uint16_t*>(weight), out, width, threads);
    return 0;
}

}  // namespace

extern "C" {

int dequantise_int8(const uint8_t* quantised, const float* pairs, void* weight, int64_t out, int64_t width,
    int dtype, void* context) {
    return run<Int8>(quantised, pairs, weight, out, width, dtype, context);
}

int dequantise_nf4(const uint8_t* quantised, const float* pairs, void* weight, int64_t out, int64_t width,
    int dtype, void* context) {
    return run<Nf4>(quantised, pairs, weight, out, width, dtype, context);
}
}
