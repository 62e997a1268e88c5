// Quantised weights (rwkv_miss/quantised.py has the format) expanded to matrices on a GPU: one pass, and no
// memory beside the result.
//
// Eight lanes take a block of 64 weights, each lane eight neighbouring numbers: one store of 16 bytes in half
// precision. In nf4 a byte is two of them. What is read and written lies side by side, so that the time is
// that of the memory: half a byte or one, and the result. A row of odd width begins between two such stores,
// so its numbers are stored one by one; and bytes are read two at a time where a row's are no multiple of
// eight.
//
// C interface: quantised (out, bytes of a row), pairs (256, 2) the two numbers of every byte of nf4, weight
// (out, width); `device` and `stream` as launch.h says.
#include "vectors.cuh"

namespace {

constexpr int BLOCK = 64, LANES = BLOCK / WIDTH, THREADS = 256, BLOCKS = THREADS / LANES;

// the bytes of a lane's numbers; `wide`: they are at a multiple of their size
template <class Word> struct Codes {
    union {
        Word word;
        uint16_t halves[sizeof(Word) / 2];
        uint8_t bytes[sizeof(Word)];
    };
    __device__ Codes(const uint8_t* from, bool wide) {
        if (wide) {
            word = *reinterpret_cast<const Word*>(from);
        } else {
#pragma unroll
            for (int i = 0; i < (int)sizeof(Word) / 2; i++)
                halves[i] = reinterpret_cast<const uint16_t*>(from)[i];
        }
    }
};

struct Int8 {
    using Word = uint2;
    __device__ static Vec decode(const Codes<Word>& codes, const float*) {
        return each([&](int e) { return (float)(int8_t)codes.bytes[e]; });
    }
};

struct Nf4 {
    using Word = unsigned;
    __device__ static Vec decode(const Codes<Word>& codes, const float* pairs) {
        Vec x;
#pragma unroll
        for (int i = 0; i < WIDTH / 2; i++) {
            const float2 pair = reinterpret_cast<const float2*>(pairs)[codes.bytes[i]];
            x[2 * i] = pair.x;
            x[2 * i + 1] = pair.y;
        }
        return x;
    }
};

template <class Kind, class Number> struct Layout : Kind {
    using T = Number;
    static constexpr int BYTES = LANES * sizeof(typename Kind::Word);
};

// blocks of the grid: (rows, groups of BLOCKS blocks of a row)
template <class Layout> __global__ void expand(
    const uint8_t* quantised, const float* pairs, void* weight, int64_t width, int64_t blocks) {
    using T = typename Layout::T;
    using Word = typename Layout::Word;
    const int64_t row = blockIdx.x, block = (int64_t)blockIdx.y * BLOCKS + threadIdx.x / LANES;
    const int lane = threadIdx.x % LANES;
    const int64_t column = block * BLOCK + lane * WIDTH;
    if (column >= width) return;
    const uint8_t* codes = quantised + row * blocks * (Layout::BYTES + 2);
    const float scale = load(reinterpret_cast<const __nv_bfloat16*>(codes + blocks * Layout::BYTES) + block);
    const bool wide = reinterpret_cast<uintptr_t>(codes) % sizeof(Word) == 0;
    const Vec x =
        Layout::decode(Codes<Word>(codes + block * Layout::BYTES + lane * sizeof(Word), wide), pairs) * scale;
    T* to = static_cast<T*>(weight) + row * width + column;
    if (column + WIDTH <= width && reinterpret_cast<uintptr_t>(to) % 16 == 0) return write_vec(to, x);
#pragma unroll
    for (int e = 0; e < WIDTH; e++)
        if (column + e < width) store(to + e, x[e]);
}

template <class Layout> int launch(
    const uint8_t* quantised, const float* pairs, void* weight, int64_t out, int64_t width, void* stream) {
    const int64_t blocks = (width + BLOCK - 1) / BLOCK;
    const dim3 grid((unsigned)out, (unsigned)((blocks + BLOCKS - 1) / BLOCKS));
    LAUNCH(expand<Layout>, grid, THREADS, 0, stream, quantised, pairs, weight, width, blocks);
    return cudaGetLastError();
}

template <class Kind> int run(const uint8_t* quantised, const float* pairs, void* weight, int64_t out,
    int64_t width, int dtype, void* stream) {
    switch (dtype) {
        case kFloat32: return launch<Layout<Kind, float>>(quantised, pairs, weight, out, width, stream);
        case kBFloat16:
            return launch<Layout<Kind, __nv_bfloat16>>(quantised, pairs, weight, out, width, stream);
        case kFloat16: return launch<Layout<Kind, __half>>(quantised, pairs, weight, out, width, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace

extern "C" int dequantise_int8(const uint8_t* quantised, const float* pairs, void* weight, int64_t out,
    int64_t width, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    return run<Int8>(quantised, pairs, weight, out, width, dtype, stream);
}

extern "C" int dequantise_nf4(const uint8_t* quantised, const float* pairs, void* weight, int64_t out,
    int64_t width, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    return run<Nf4>(quantised, pairs, weight, out, width, dtype, stream);
}
