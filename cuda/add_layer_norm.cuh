// The residual sum of a layer and the LayerNorm that reads it. A block has one token, or with gradients of the
// weight and the bias TILE of them, one after the other; a thread has WIDTH neighbouring channels.
//
// The normalised numbers are those of the sum as it is kept, rounded to its dtype: the backward makes the
// statistics again from it, which takes no memory and one sum over the block more.
#pragma once
#include "elementwise.cuh"

namespace {

constexpr int MOST_THREADS = 1024, MOST_NORMED = MOST_THREADS * WIDTH;  // of a block; channels

// a thread's channels of one token
template <class T> struct Row {
    int channel;
    bool has;
    int64_t here;

    __device__ Row(int64_t token, int C)
        : channel(threadIdx.x * WIDTH), has(channel < C), here(token * C + channel) {}
    __device__ Vec read(const void* x) const {
        return has ? read_vec(static_cast<const T*>(x) + here) : Vec(0);
    }
    __device__ void write(void* x, const Vec& value) const {
        if (has) write_vec(static_cast<T*>(x) + here, value);
    }
    __device__ Vec vector(const Vectors& from, int i) const {
        return has ? from.read(i, channel) : Vec(0);
    }
};

// each of these summed over the block, in all of its threads and in one order
template <int N> __device__ void sum_block(float (&x)[N]) {
    __shared__ float shared[N][MOST_THREADS / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    __syncthreads();  // the sums before these have been read
#pragma unroll
    for (int i = 0; i < N; i++) {
#pragma unroll
        for (int apart = 16; apart; apart /= 2) x[i] += __shfl_xor_sync(0xffffffffu, x[i], apart);
        if (lane == 0) shared[i][warp] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) {
        x[i] = lane < warps ? shared[i][lane] : 0;
#pragma unroll
        for (int apart = 16; apart; apart /= 2) x[i] += __shfl_xor_sync(0xffffffffu, x[i], apart);
    }
}

template <class T> __device__ Vec centred(const Row<T>& at, const Vec& x, int C) {
    float mean[] = {total(x)};
    sum_block(mean);
    return at.has ? x - mean[0] / C : Vec(0);
}

// vectors: weight, bias
template <class T> __global__ void __launch_bounds__(MOST_THREADS) add_layer_norm(
    const void* x, const void* mixed, Vectors vectors, void* sum, void* normed, int C, float eps) {
    const Row<T> at(blockIdx.x, C);
    const Vec kept = rounded<T>(at.read(x) + at.read(mixed));
    at.write(sum, kept);
    const Vec apart = centred(at, kept, C);
    float variance[] = {total(apart * apart)};
    sum_block(variance);
    at.write(normed, apart * inverse_deviation(variance[0] / C, eps) * at.vector(vectors, 0)
                         + at.vector(vectors, 1));
}

// dx is the gradient of both addends; dsum may be null
template <class T, bool SUMS> __global__ void __launch_bounds__(MOST_THREADS)
    add_layer_norm_grad(const void* sum, const void* dnormed, const void* dsum, Vectors vectors, void* dx,
        float* partial, int64_t tokens, int C, float eps) {
    constexpr int EACH = SUMS ? TILE : 1;
    Vec dweight = 0, dbias = 0;
#pragma unroll 1
    for (int i = 0; i < EACH; i++) {
        const int64_t token = (int64_t)blockIdx.x * EACH + i;
        if (token >= tokens) break;
        const Row<T> at(token, C);
        const Vec apart = centred(at, at.read(sum), C), above = at.read(dnormed);
        const Vec g = above * at.vector(vectors, 0);
        float sums[] = {total(apart * apart), total(g), total(g * apart)};
        sum_block(sums);
        const float scale = inverse_deviation(sums[0] / C, eps), mean = sums[1] / C;
        const float along = sums[2] / C * scale * scale;
        Vec found = scale * (g - mean - apart * along);
        if (dsum) found += at.read(dsum);
        at.write(dx, found);
        if (SUMS) dweight += above * apart * scale;
        if (SUMS) dbias += above;
    }
    const int channel = threadIdx.x * WIDTH;
    if (!SUMS || channel >= C) return;
    write_vec(partial + (2 * (int64_t)blockIdx.x) * C + channel, dweight);
    write_vec(partial + (2 * (int64_t)blockIdx.x + 1) * C + channel, dbias);
}

inline bool fits_block(int64_t tokens, int64_t C) {
    return tokens > 0 && tokens <= INT32_MAX && C > 0 && C % WIDTH == 0 && C <= MOST_NORMED;
}
inline int threads_of(int64_t C) { return (int)(C / WIDTH + 31) / 32 * 32; }

}  // namespace
