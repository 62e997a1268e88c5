// Quantised weights (rwkv_miss/quantised.py has the format) expanded to matrices on a GPU: one pass, and no
// memory beside the result.
//
// A warp takes a block of 64 weights: lane l the two numbers 2 l and 2 l + 1, which in nf4 are the halves of
// byte l. What is read and written lies side by side, so that the time is that of the memory: half a byte or
// one, and the result.
//
// C interface: quantised (out, bytes of a row), pairs (256, 2) the two numbers of every byte of nf4, weight
// (out, width); `device` and `stream` as launch.h says.
#include "launch.h"

namespace {

constexpr int BLOCK = 64, THREADS = 256, WARPS = THREADS / 32;

struct Int8 {
    static constexpr int BYTES = BLOCK;
    __device__ static float2 decode(const uint8_t* codes, const float*, int lane) {
        return make_float2((int8_t)codes[2 * lane], (int8_t)codes[2 * lane + 1]);
    }
};

struct Nf4 {
    static constexpr int BYTES = BLOCK / 2;
    __device__ static float2 decode(const uint8_t* codes, const float* pairs, int lane) {
        const float* pair = pairs + 2 * codes[lane];
        return make_float2(pair[0], pair[1]);
    }
};

template <class Kind, class Number> struct Layout : Kind {
    using T = Number;
};

// blocks of the grid: (rows, groups of WARPS blocks of a row)
template <class Layout> __global__ void expand(
    const uint8_t* quantised, const float* pairs, void* weight, int64_t width, int64_t blocks) {
    using T = typename Layout::T;
    const int64_t row = blockIdx.x, block = (int64_t)blockIdx.y * WARPS + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (block >= blocks) return;
    const uint8_t* codes = quantised + row * blocks * (Layout::BYTES + 2);
    const float scale = load(reinterpret_cast<const __nv_bfloat16*>(codes + blocks * Layout::BYTES) + block);
    const float2 x = Layout::decode(codes + block * Layout::BYTES, pairs, lane);
    const int64_t column = block * BLOCK + 2 * lane;
    T* to = static_cast<T*>(weight) + row * width + column;
    if (column < width) store(to, x.x * scale);
    if (column + 1 < width) store(to + 1, x.y * scale);
}

template <class Layout> int launch(
    const uint8_t* quantised, const float* pairs, void* weight, int64_t out, int64_t width, void* stream) {
    const int64_t blocks = (width + BLOCK - 1) / BLOCK;
    const dim3 grid((unsigned)out, (unsigned)((blocks + WARPS - 1) / WARPS));
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
