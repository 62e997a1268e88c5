// The residual sum of a layer and the LayerNorm that reads it, by itself or with the token shift that reads the
// norm. A block has one token, or with gradients of the weight and the bias TILE of them, one after the other;
// a thread has WIDTH neighbouring channels.
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

// of x; vectors: weight, bias
template <class T>
__device__ Vec layer_norm(const Row<T>& at, const Vec& x, const Vectors& vectors, int C, float eps) {
    const Vec apart = centred(at, x, C);
    float variance[] = {total(apart * apart)};
    sum_block(variance);
    return apart * inverse_deviation(variance[0] / C, eps) * at.vector(vectors, 0) + at.vector(vectors, 1);
}

template <class T> __global__ void __launch_bounds__(MOST_THREADS) add_layer_norm(
    const void* x, const void* mixed, Vectors vectors, void* sum, void* normed, int C, float eps) {
    const Row<T> at(blockIdx.x, C);
    const Vec kept = rounded<T>(at.read(x) + at.read(mixed));
    at.write(sum, kept);
    at.write(normed, layer_norm(at, kept, vectors, C, eps));
}

// The shard sums of a thread's channels of output i, in the order of Place::write_sums: eight warps take turns
// at the groups of 256 channels. `shared` has a Vec for each thread.
template <class T> __device__ void write_sums(const Tensors& x, int i, Vec sum, Vec* shared) {
    if (!x.sums[i]) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (warp < WARPS) {
        for (int other = threadIdx.x + THREADS; other < blockDim.x; other += THREADS) sum += shared[other];
        for (int lanes = 16; lanes * WIDTH >= x.rank; lanes /= 2)
#pragma unroll
            for (int e = 0; e < WIDTH; e++) sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], lanes);
    }
    __syncthreads();
    if (warp < WARPS && lane * WIDTH < x.rank) shared[threadIdx.x] = sum;
    __syncthreads();
    for (int shard = threadIdx.x; shard < x.rank; shard += blockDim.x) {
        float all = 0;
#pragma unroll 1
        for (int w = 0; w < WARPS && w * 32 < blockDim.x; w++)
            all += shared[w * 32 + shard / WIDTH][shard % WIDTH];
        store(static_cast<T*>(x.sums[i]) + blockIdx.x * (int64_t)x.rank + shard, all);
    }
}

// z is the norm; the one of the token before is made again, from the cache. z may be null, and is written for
// the last token of each row in any case.
template <class T> __global__ void __launch_bounds__(MOST_THREADS) norm_shift(const void* x, const void* mixed,
    const void* last, const uint8_t* reset, Vectors vectors, Vectors mixes, void* sum, void* z_last, void* z,
    Tensors out, int tokens, int C, float eps) {
    DYNAMIC_SHARED(Vec, shared);
    const Row<T> at(blockIdx.x, C);
    const int row = blockIdx.x / tokens, t = blockIdx.x % tokens;
    const Vec kept = rounded<T>(at.read(x) + at.read(mixed));
    at.write(sum, kept);
    const Vec here = rounded<T>(layer_norm(at, kept, vectors, C, eps));
    Vec before = 0;
    if (reset && reset[blockIdx.x]) {
    } else if (t > 0) {
        const Row<T> other((int64_t)blockIdx.x - 1, C);
        const Vec added = rounded<T>(other.read(x) + other.read(mixed));
        before = rounded<T>(layer_norm(other, added, vectors, C, eps));
    } else {
        before = Row<T>(row, C).read(last);
    }
    if (z) at.write(z, here);
    if (t == tokens - 1) Row<T>(row, C).write(z_last, here);
    const Vec difference = before - here;
    for (int i = 0; i < mixes.count; i++) {
        const Vec y = here + difference * at.vector(mixes, i);
        at.write(out.of[i], y);
        write_sums<T>(out, i, at.has ? y : Vec(0), shared);
    }
}

// the gradient of the norm's input, of that of the norm
struct NormGrad {
    Vec apart, dx;
    float scale;
};
template <class T> __device__ NormGrad norm_grad(
    const Row<T>& at, const void* sum, const Vec& above, const Vectors& vectors, int C, float eps) {
    const Vec apart = centred(at, at.read(sum), C);
    const Vec g = above * at.vector(vectors, 0);
    float sums[] = {total(apart * apart), total(g), total(g * apart)};
    sum_block(sums);
    const float scale = inverse_deviation(sums[0] / C, eps), mean = sums[1] / C;
    const float along = sums[2] / C * scale * scale;
    return {apart, scale * (g - mean - apart * along), scale};
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
        const Vec above = at.read(dnormed);
        const NormGrad found = norm_grad(at, sum, above, vectors, C, eps);
        at.write(dx, dsum ? found.dx + at.read(dsum) : found.dx);
        if (SUMS) dweight += above * found.apart * found.scale;
        if (SUMS) dbias += above;
    }
    const int channel = threadIdx.x * WIDTH;
    if (!SUMS || channel >= C) return;
    write_vec(partial + (2 * (int64_t)blockIdx.x) * C + channel, dweight);
    write_vec(partial + (2 * (int64_t)blockIdx.x + 1) * C + channel, dbias);
}

// Without gradients of vectors. dz, that of the norm, is summed as shift_backward of elementwise.cu does, and
// rounded as a tensor would be; then dz_last is added, that of z_last. dsum and dz_last may be null. Products
// are rounded before they are added, as there, where a branch lies between.
template <class T> __global__ void __launch_bounds__(MOST_THREADS) norm_shift_grad(const void* sum,
    const void* dsum, const void* dz_last, const uint8_t* reset, Vectors vectors, Vectors mixes, Tensors dout,
    void* dx, void* dlast, int tokens, int C, float eps) {
    const Row<T> at(blockIdx.x, C);
    const int row = blockIdx.x / tokens, t = blockIdx.x % tokens;
    const bool next = t + 1 < tokens && !(reset && reset[blockIdx.x + 1]);
    const Row<T> after((int64_t)blockIdx.x + 1, C);
    const auto gradient = [&](const Row<T>& of, int64_t token, int i) {
        Vec g = of.read(dout.of[i]);
        if (dout.sums[i] && of.has)
            g += read_vec(static_cast<const T*>(dout.sums[i]) + token * dout.rank
                          + (of.channel & (dout.rank - 1)));
        return g;
    };
    const auto times = [](const Vec& g, const Vec& mix) {
        return each([&](int e) { return __fmul_rn(g[e], mix[e]); });
    };
    Vec dz = 0, first = 0;
    for (int i = 0; i < mixes.count; i++) {
        const Vec mix = at.vector(mixes, i), g = gradient(at, blockIdx.x, i), shifted = times(g, mix);
        dz += g - shifted;
        if (next) dz += times(gradient(after, (int64_t)blockIdx.x + 1, i), mix);
        if (t == 0 && !(reset && reset[blockIdx.x])) first += shifted;
    }
    if (t == 0) Row<T>(row, C).write(dlast, first);
    dz = rounded<T>(dz);
    if (dz_last && t == tokens - 1) dz = rounded<T>(dz + Row<T>(row, C).read(dz_last));
    const NormGrad found = norm_grad(at, sum, dz, vectors, C, eps);
    at.write(dx, dsum ? found.dx + at.read(dsum) : found.dx);
}

inline bool fits_block(int64_t tokens, int64_t C) {
    return tokens > 0 && tokens <= INT32_MAX && C > 0 && C % WIDTH == 0 && C <= MOST_NORMED;
}
inline int threads_of(int64_t C) { return (int)(C / WIDTH + 31) / 32 * 32; }

}  // namespace
