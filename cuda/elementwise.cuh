// The frame of the functions in elementwise.cu: which lane has which channels of which tokens, 16 bytes at a
// time, sums over a head, and gradients of the model's vectors.
//
//     block (tile, columns)     TILE neighbouring tokens, and as many whole heads as 32 lanes hold
//     warp                      TOKENS of these tokens, one after the other
//     lane                      WIDTH neighbouring channels of each: 16 bytes, in fp32 twice 16
//
// Where an output may have shard sums, a block has one token, and its warps take turns at the heads.
//
// A head has a power of two of lanes, so that shuffles add up over it; those beyond its channels idle. What
// has no heads has columns of WIDTH channels instead, a lane each. A lane keeps the model's vectors in
// registers for all of its tokens.
//
// A vector's gradient is a sum over all tokens. Each block writes its part, (parts, vectors, C) in fp32, and
// `add_parts` adds these in one order: the same numbers in every run.
#pragma once
#include "vectors.cuh"

namespace {

constexpr int TOKENS = 4, WARPS = 8, THREADS = 32 * WARPS, TILE = TOKENS * WARPS;

// (B, T, C) activations of H heads. `lanes` of a head are a power of two.
struct Shape {
    int64_t B, T;
    int C, H, N, lanes;
    float eps;

    Shape(int64_t B, int64_t T, int64_t C, int64_t H, float eps)
        : B(B), T(T), C(C), H(H), N(H > 0 ? C / H : 0), lanes(1), eps(eps) {
        while (lanes * WIDTH < N) lanes *= 2;
    }
    static Shape columns(int64_t B, int64_t T, int64_t C) { return Shape(B, T, C, C / WIDTH, 0); }

    bool valid() const {
        return B > 0 && T > 0 && H > 0 && C == H * N && N > 0 && N % WIDTH == 0 && lanes <= 32;
    }
    // whether a lane has the same channels modulo `rank` in all groups of heads; 0: there are no shard sums
    bool summable(int rank) const {
        return !rank || rank >= WIDTH && rank <= 32 * WIDTH && !(rank & rank - 1) && lanes * WIDTH == N;
    }
    __host__ __device__ int64_t tiles() const { return (T + TILE - 1) / TILE; }
    __host__ __device__ int groups() const { return (H + 32 / lanes - 1) / (32 / lanes); }
    int64_t parts() const { return B * tiles(); }
    dim3 grid() const { return dim3((unsigned)parts(), (unsigned)groups()); }
    dim3 rows() const { return dim3((unsigned)(B * T)); }
    int threads_of_row() const { return groups() < WARPS ? 32 * groups() : THREADS; }
};

// Outputs or their gradients, one for each mix of a token shift, with the shard sums of those that have some.
struct Tensors {
    void *of[MOST_VECTORS], *sums[MOST_VECTORS];
    int rank;

    // `from`: `count` tensors, then with a rank the sums of each, or null
    Tensors(const void* const* from = nullptr, int64_t count = 0, int64_t rank = 0)
        : of(), sums(), rank((int)rank) {
        for (int i = 0; from && i < count && i < MOST_VECTORS; i++) {
            of[i] = const_cast<void*>(from[i]);
            if (rank) sums[i] = const_cast<void*>(from[count + i]);
        }
    }
};

// 1 / the deviation; NaN if the variance overflows
__device__ __forceinline__ float inverse_deviation(float variance, float eps) {
    return 1.f / sqrtf(variance + eps) + variance * 0.f;
}

// a lane's channels, and the token that its warp is at
template <class T> struct Place {
    const Shape& shape;
    int channel;          // the first of the lane's
    bool has;             // whether it has any
    int64_t b, t;         // the token
    int64_t here;         // index of its channel in an activation
    mutable Vec sum = 0;  // what the lane wrote of an output

    __device__ explicit Place(const Shape& shape) : shape(shape) {
        const unsigned tiles = shape.tiles();
        b = blockIdx.x / tiles;
        t = (int64_t)(blockIdx.x % tiles) * TILE + threadIdx.x / 32 * TOKENS;
        go_to_group(blockIdx.y);
    }
    // a token that all warps of the block share
    __device__ Place(const Shape& shape, unsigned token)
        : shape(shape), b(token / (unsigned)shape.T), t(token % (unsigned)shape.T) {}
    __device__ void go_to_group(int group) {
        const int lane = threadIdx.x % 32, part = lane % shape.lanes * WIDTH;
        const int head = group * (32 / shape.lanes) + lane / shape.lanes;
        has = part < shape.N && head < shape.H;
        channel = head * shape.N + part;
        go_to(t);
    }
    __device__ void go_to(int64_t token) {
        t = token;
        here = (b * shape.T + t) * shape.C + channel;
    }
    __device__ bool exists() const { return t < shape.T; }

    __device__ Vec read_at(const void* x, int64_t i) const {
        return has ? read_vec(static_cast<const T*>(x) + i) : Vec(0);
    }
    __device__ void write_at(void* x, int64_t i, const Vec& value) const {
        if (has) write_vec(static_cast<T*>(x) + i, value);
    }
    __device__ Vec read(const void* x) const { return read_at(x, here); }
    __device__ Vec rounded(const Vec& x) const { return ::rounded<T>(x); }
    __device__ void write(void* x, const Vec& value) const { write_at(x, here, value); }
    // output i
    __device__ void write(const Tensors& x, const Vec& value, int i = 0) const {
        write(x.of[i], value);
        if (has) sum += value;
    }
    // the gradient of output i of the j-th token from here on, and what its shard sums add
    __device__ Vec read(const Tensors& x, int i = 0, int j = 0) const {
        Vec g = read_at(x.of[i], here + j * shape.C);
        if (x.sums[i] && has) {
            const int64_t first = (b * shape.T + t + j) * x.rank;
            g += read_vec(static_cast<const T*>(x.sums[i]) + first + (channel & (x.rank - 1)));
        }
        return g;
    }
    __device__ Vec vector(const Vectors& from, int i) const {
        return has ? from.read(i, channel) : Vec(0);
    }

    // a number of the head: x (tokens, H), read by all of its lanes and written by the first
    __device__ int64_t of_head() const { return (b * shape.T + t) * shape.H + channel / shape.N; }
    __device__ float read_head(const float* x) const { return has ? x[of_head()] : 0; }
    __device__ void write_head(float* x, float number) const {
        if (has && channel % shape.N == 0) x[of_head()] = number;
    }

    // each of these summed over the head, in all of its lanes
    template <class... Floats> __device__ void sum_head(Floats&... x) const {
        for (int lanes = shape.lanes / 2; lanes; lanes /= 2)
            ((x += __shfl_xor_sync(0xffffffffu, x, lanes)), ...);
    }
    // y of this head with mean 0 and variance 1; *scale is 1 / its deviation
    __device__ Vec normalised(const Vec& y, float* scale) const {
        float mean = total(y);
        sum_head(mean);
        mean /= shape.N;
        const Vec centred = has ? y - mean : Vec(0);
        float variance = total(centred * centred);
        sum_head(variance);
        variance /= shape.N;
        *scale = inverse_deviation(variance, shape.eps);
        return centred * *scale;
    }

    // the shard sums of output i of the block's token, where they are asked for; all of its threads come here
    __device__ void write_sums(const Tensors& x, int i) const {
        __shared__ __align__(16) float shared[WARPS][32 * WIDTH];
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        if (x.sums[i]) {
            for (int lanes = 16; lanes * WIDTH >= x.rank; lanes /= 2)
#pragma unroll
                for (int e = 0; e < WIDTH; e++) sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], lanes);
            __syncthreads();
            if (lane * WIDTH < x.rank) write_vec(&shared[warp][lane * WIDTH], sum);
            __syncthreads();
            for (int shard = threadIdx.x; shard < x.rank; shard += blockDim.x) {
                float all = 0;
                for (int w = 0; w < blockDim.x / 32; w++) all += shared[w][shard];
                store(static_cast<T*>(x.sums[i]) + (b * shape.T + t) * x.rank + shard, all);
            }
        }
        sum = 0;
    }

    // partial[this block][i] = the sum over the block's warps; all of its threads come here
    __device__ void add_warps(const Vec& sum, float* partial, int i, int count) const {
        static_assert(WARPS == WIDTH, "a warp adds up one of a lane's channels");
        __shared__ float shared[WARPS][WIDTH][32];
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        __syncthreads();
#pragma unroll
        for (int e = 0; e < WIDTH; e++) shared[warp][e][lane] = sum[e];
        __syncthreads();
        float all = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) all += shared[w][warp][lane];
        if (has) partial[((int64_t)blockIdx.x * count + i) * shape.C + channel + warp] = all;
    }
};

// vectors of the model that are read where they are used
template <class T> struct Unread {
    const Place<T>& at;
    const Vectors& from;
    __device__ Vec operator[](int i) const { return at.vector(from, i); }
};

// f(place, vectors, sums) for every token; the first TRAINABLE vectors have gradients. The vectors lie in
// registers; but with SUMS their gradients do, and there is no room for both.
template <class T, bool SUMS, class Function> __global__ void __launch_bounds__(THREADS, 2)
    run(Function f, Vectors vectors, float* partial, Shape shape) {
    constexpr int COUNT = Function::VECTORS, TRAINABLE = Function::TRAINABLE;
    Place<T> at(shape);
    Vec values[COUNT + 1], sums[TRAINABLE + 1] = {};  // an array has at least one
    if (!SUMS)
#pragma unroll
        for (int i = 0; i < COUNT; i++) values[i] = at.vector(vectors, i);
#pragma unroll 1
    for (int token = 0; token < TOKENS && at.exists(); token++) {
        if constexpr (SUMS)
            f(at, Unread<T>{at, vectors}, sums);
        else
            f(at, values, sums);
        at.go_to(at.t + 1);
    }
    if (SUMS)
#pragma unroll
        for (int i = 0; i < TRAINABLE; i++) at.add_warps(sums[i], partial, i, TRAINABLE);
}

// f(place, vectors, nullptr) by a block for each token, and the shard sums of f.out
template <class T, class Function> __global__ void __launch_bounds__(THREADS, 2)
    run_rows(Function f, Vectors vectors, Shape shape) {
    Place<T> at(shape, blockIdx.x);
    for (int group = threadIdx.x / 32; group < shape.groups(); group += blockDim.x / 32) {
        at.go_to_group(group);
        Vec values[Function::VECTORS + 1];
#pragma unroll
        for (int i = 0; i < Function::VECTORS; i++) values[i] = at.vector(vectors, i);
        f(at, values, nullptr);
    }
    at.write_sums(f.out, 0);
}

// A block: 32 neighbouring channels of vector blockIdx.y; every warp takes every WARPS-th part.
__global__ void add_parts(const float* partial, int64_t parts, int C, Vectors to) {
    __shared__ float shared[WARPS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i = blockIdx.y;
    const int channel = blockIdx.x * 32 + lane;
    float sum = 0;
    if (channel < C)
        for (int64_t part = warp; part < parts; part += WARPS)
            sum += partial[(part * to.count + i) * C + channel];
    shared[warp][lane] = sum;
    __syncthreads();
    if (warp || channel >= C) return;
    sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += shared[w][lane];
    void* numbers = const_cast<void*>(to.numbers[i]);
    switch (to.dtype(i)) {
        case kFloat32: return store(static_cast<float*>(numbers) + channel, sum);
        case kBFloat16: return store(static_cast<__nv_bfloat16*>(numbers) + channel, sum);
        default: return store(static_cast<__half*>(numbers) + channel, sum);
    }
}
void launch_add_parts(const float* partial, const Shape& shape, const Vectors& to, void* stream) {
    const dim3 grid((unsigned)((shape.C + 31) / 32), (unsigned)to.count);
    LAUNCH(add_parts, grid, THREADS, 0, stream, partial, shape.parts(), shape.C, to);
}

// launch(T()) with the type of the activations
template <class Launch> int typed(int dtype, Launch launch) {
    switch (dtype) {
        case kFloat32: launch(float()); break;
        case kBFloat16: launch(__nv_bfloat16()); break;
        case kFloat16: launch(__half()); break;
        default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

// `f` over all tokens, and with `gradients` those of the vectors
template <class Function> int launch_run(const Function& f, const Shape& shape, const Vectors& vectors,
    const Vectors* gradients, float* partial, int dtype, void* stream) {
    if (!shape.valid()) return cudaErrorInvalidValue;
    return typed(dtype, [&](auto number) {
        using T = decltype(number);
        if constexpr (Function::TRAINABLE > 0)
            if (gradients) {
                LAUNCH(
                    (run<T, true, Function>), shape.grid(), THREADS, 0, stream, f, vectors, partial, shape);
                launch_add_parts(partial, shape, *gradients, stream);
                return;
            }
        LAUNCH((run<T, false, Function>), shape.grid(), THREADS, 0, stream, f, vectors, partial, shape);
    });
}

}  // namespace
