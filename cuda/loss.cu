// The cross entropy of a block of logits and its gradient in their place, on a GPU: a row is read once for its
// largest logit and the sum of the exponentials, which is scaled anew where a larger logit is found, and once
// more, mostly from the L2 cache, for the gradient. Arithmetic is fp32. src/model/loss.py has the formula in
// plain torch, cuda/loss_cpu.cpp the CPU's form.
//
// A gradient in half precision, which the products want, goes into the first half of its row's bytes. So a
// logit takes 4 bytes that are read, the same again, and 2 that are written, where a gradient in fp32 and a
// cast would take 8 more; and there is no memory beside the logits.
//
// A block has a row. Where the gradient is narrower than the logits, what it is written over must have been
// read by all threads: part c lies over logits of part c / 2, so a barrier after the reads of the parts 0, 1,
// 3, 7, ... is enough.
//
// C interface: logits (rows, V) fp32, contiguous; targets (rows) int64; weights (rows) fp32, which multiply
// loss and gradient, or null; loss (rows) fp32; l2wrap times the largest logit is added to its gradient;
// `dtype` is the gradient's, `device` and `stream` are as launch.h says. A target that is not in 0..V-1 makes
// loss and gradient of its row NaN: an error that is seen when the loss is read, for nothing here may wait.
#include <cfloat>

#include "launch.h"

namespace {

constexpr int THREADS = 512, WARPS = THREADS / 32, AT_ONCE = 8;  // logits of a thread between two barriers
constexpr unsigned LANES = 0xffffffffu;

// of some logits: the largest one, where the first of these is, and the sum of exp(logit - largest)
struct Softmax {
    float top;
    int where;
    float total;
};

__device__ __forceinline__ Softmax joined(Softmax a, Softmax b) {
    const bool first = a.top > b.top || (a.top == b.top && a.where < b.where);
    const float top = first ? a.top : b.top;
    return {top, first ? a.where : b.where, a.total * expf(a.top - top) + b.total * expf(b.top - top)};
}

// a thread's logits of a part of the row that begins at `start`; -inf behind the end
template <int VECTOR> __device__ __forceinline__ void read(
    float (&x)[AT_ONCE], const float* row, int64_t start, int64_t V) {
#pragma unroll
    for (int k = 0; k < AT_ONCE / VECTOR; k++) {
        const int64_t i = start + (k * THREADS + (int)threadIdx.x) * VECTOR;
        float* to = x + k * VECTOR;
        if (i >= V) {
#pragma unroll
            for (int l = 0; l < VECTOR; l++) to[l] = -INFINITY;
        } else if constexpr (VECTOR == 4) {
            const float4 four = *reinterpret_cast<const float4*>(row + i);
            to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        } else {
            to[0] = row[i];
        }
    }
}

template <class G, int VECTOR> __device__ __forceinline__ void write(
    G* row, const float (&x)[AT_ONCE], int64_t start, int64_t V) {
#pragma unroll
    for (int k = 0; k < AT_ONCE / VECTOR; k++) {
        const int64_t i = start + (k * THREADS + (int)threadIdx.x) * VECTOR;
        if (i >= V) continue;
        struct __align__(sizeof(G) * VECTOR) {
            G numbers[VECTOR];
        } vector;
#pragma unroll
        for (int l = 0; l < VECTOR; l++) store(vector.numbers + l, x[k * VECTOR + l]);
        *reinterpret_cast<decltype(vector)*>(row + i) = vector;
    }
}

// blocks of the grid: rows; G is the gradient's type, VECTOR the numbers of a load
template <class G, int VECTOR> __global__ void __launch_bounds__(THREADS) softmax(float* logits,
    const int64_t* targets, const float* weights, float* loss, int64_t V, float l2wrap) {
    constexpr int PART = THREADS * AT_ONCE;
    __shared__ Softmax of_warps[WARPS];
    float* row = logits + blockIdx.x * V;
    const int64_t target = targets[blockIdx.x];
    const bool known = target >= 0 && target < V;
    const float own = row[known ? target : 0];  // before anything is written

    float x[AT_ONCE];
    Softmax mine = {-FLT_MAX, 0, 0.f};  // finite, so that logits of -inf are not compared with it as equal
    for (int64_t start = 0; start < V; start += PART) {
        read<VECTOR>(x, row, start, V);
        const float before = mine.top;
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (x[k] > mine.top) {
                mine.top = x[k];
                mine.where = (int)start + (k / VECTOR * THREADS + (int)threadIdx.x) * VECTOR + k % VECTOR;
            }
        }
        mine.total *= expf(before - mine.top);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) mine.total += expf(x[k] - mine.top);
    }
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) {
        Softmax other;
        other.top = __shfl_xor_sync(LANES, mine.top, lanes);
        other.where = __shfl_xor_sync(LANES, mine.where, lanes);
        other.total = __shfl_xor_sync(LANES, mine.total, lanes);
        mine = joined(mine, other);
    }
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = mine;
    __syncthreads();
    Softmax all = of_warps[0];
#pragma unroll
    for (int warp = 1; warp < WARPS; warp++) all = joined(all, of_warps[warp]);

    const float weight = !known ? NAN : weights ? weights[blockIdx.x] : 1.f;
    const float scale = weight / all.total;
    G* gradient = reinterpret_cast<G*>(row);
    int part = 0;
    for (int64_t start = 0; start < V; start += PART, part++) {
        read<VECTOR>(x, row, start, V);
        if (sizeof(G) < sizeof(float) && (part & (part + 1)) == 0) __syncthreads();
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) x[k] = expf(x[k] - all.top) * scale;
        write<G, VECTOR>(gradient, x, start, V);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        // the largest logit and the target's have a term more
        const float pull = l2wrap * all.top, share = 1.f / all.total;
        const bool same = known && all.where == target;
        store(gradient + all.where, ((same ? share - 1.f : share) + pull) * weight);
        if (known && !same) store(gradient + target, (expf(own - all.top) * share - 1.f) * weight);
        loss[blockIdx.x] = (logf(all.total) + (all.top - own)) * weight;  // the difference loses nothing
    }
}

template <class G> int launch(float* logits, const int64_t* targets, const float* weights, float* loss,
    int64_t rows, int64_t V, float l2wrap, void* stream) {
    const dim3 grid((unsigned)rows);
    if (V % 4 || (uintptr_t)logits % 16) {
        LAUNCH((softmax<G, 1>), grid, THREADS, 0, stream, logits, targets, weights, loss, V, l2wrap);
    } else {
        LAUNCH((softmax<G, 4>), grid, THREADS, 0, stream, logits, targets, weights, loss, V, l2wrap);
    }
    return cudaGetLastError();
}

}  // namespace

extern "C" int softmax_loss(float* logits, const int64_t* targets, const float* weights, float* loss,
    int64_t rows, int64_t V, float l2wrap, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    if (!rows) return 0;
    switch (dtype) {
        case kFloat32: return launch<float>(logits, targets, weights, loss, rows, V, l2wrap, stream);
        case kBFloat16:
            return launch<__nv_bfloat16>(logits, targets, weights, loss, rows, V, l2wrap, stream);
        case kFloat16: return launch<__half>(logits, targets, weights, loss, rows, V, l2wrap, stream);
        default: return cudaErrorInvalidValue;
    }
}
