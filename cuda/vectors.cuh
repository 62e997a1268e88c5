// Eight numbers of a lane: fp32 in registers, in memory 16 bytes in half precision and twice 16 in fp32. The
// vectors of a model, and what its delta rule is given.
#pragma once
#include "launch.h"

namespace {

constexpr int WIDTH = 8;

struct Vec {
    float x[WIDTH];
    Vec() = default;
    __device__ __forceinline__ Vec(float value) {
#pragma unroll
        for (int e = 0; e < WIDTH; e++) x[e] = value;
    }
    __device__ __forceinline__ float& operator[](int e) { return x[e]; }
    __device__ __forceinline__ float operator[](int e) const { return x[e]; }
};

template <class F> __device__ __forceinline__ Vec each(F f) {
    Vec y;
#pragma unroll
    for (int e = 0; e < WIDTH; e++) y[e] = f(e);
    return y;
}

__device__ __forceinline__ Vec operator+(const Vec& a, const Vec& b) {
    return each([&](int e) { return a[e] + b[e]; });
}
__device__ __forceinline__ Vec operator-(const Vec& a, const Vec& b) {
    return each([&](int e) { return a[e] - b[e]; });
}
__device__ __forceinline__ Vec operator*(const Vec& a, const Vec& b) {
    return each([&](int e) { return a[e] * b[e]; });
}
__device__ __forceinline__ Vec& operator+=(Vec& a, const Vec& b) { return a = a + b; }
__device__ __forceinline__ Vec sigmoid(const Vec& a) {
    return each([&](int e) { return 1.f / (1.f + expf(-a[e])); });
}
__device__ __forceinline__ float total(const Vec& a) {
    float sum = 0;
#pragma unroll
    for (int e = 0; e < WIDTH; e++) sum += a[e];
    return sum;
}

template <class T> constexpr int PIECES = WIDTH * sizeof(T) / 16;
template <class T> union Packed {
    uint4 pieces[PIECES<T>];
    T numbers[WIDTH];
    __device__ Packed() {}
};
// p is a multiple of 16 bytes
template <class T> __device__ __forceinline__ Vec read_vec(const T* p) {
    Packed<T> packed;
#pragma unroll
    for (int i = 0; i < PIECES<T>; i++) packed.pieces[i] = reinterpret_cast<const uint4*>(p)[i];
    return each([&](int e) { return load(&packed.numbers[e]); });
}
template <class T> __device__ __forceinline__ void write_vec(T* p, const Vec& x) {
    Packed<T> packed;
#pragma unroll
    for (int e = 0; e < WIDTH; e++) store(&packed.numbers[e], x[e]);
#pragma unroll
    for (int i = 0; i < PIECES<T>; i++) reinterpret_cast<uint4*>(p)[i] = packed.pieces[i];
}
// as they are in memory
template <class T> __device__ __forceinline__ Vec rounded(const Vec& x) {
    return each([&](int e) {
        T number;
        store(&number, x[e]);
        return load(&number);
    });
}

constexpr int MOST_VECTORS = 32;  // two bits of 64 for the dtype of each

// Vectors of the model, or their gradients: each (C) and of its own dtype, which a base and what is trained
// of it need not share.
struct Vectors {
    const void* numbers[MOST_VECTORS];
    int64_t dtypes;  // two bits each
    int count;

    Vectors(const void* const* from, int64_t dtypes, int64_t count)
        : numbers(), dtypes(dtypes), count(count) {
        for (int i = 0; from && i < count && i < MOST_VECTORS; i++) numbers[i] = from[i];
    }
    __device__ int dtype(int i) const { return (int)(dtypes >> 2 * i) & 3; }
    __device__ Vec read(int i, int channel) const {
        switch (dtype(i)) {
            case kFloat32: return read_vec(static_cast<const float*>(numbers[i]) + channel);
            case kBFloat16: return read_vec(static_cast<const __nv_bfloat16*>(numbers[i]) + channel);
            default: return read_vec(static_cast<const __half*>(numbers[i]) + channel);
        }
    }
};

// A lane's channels of the key k (1 + (s - 1) k_a), of -kappa and of kappa s, with kappa = normalize(k k_k) and
// s = sigmoid(a). sum_head(x) adds x over the head, in all of its lanes.
struct DeltaRule { Vec key, remove, replace; };
template <class SumHead> __device__ __forceinline__ DeltaRule delta_rule(
    const Vec& k, const Vec& a, const Vec& k_k, const Vec& k_a, SumHead sum_head) {
    const Vec s = sigmoid(a), u = k * k_k;
    float squares = total(u * u);
    sum_head(squares);
    const Vec kappa = u * (1 / fmaxf(sqrtf(squares), 1e-12f));
    return {k * (1 + (s - 1) * k_a), 0 - kappa, kappa * s};
}

}  // namespace
