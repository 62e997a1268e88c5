// Eight numbers of a lane: fp32 in registers, in memory 16 bytes in half precision and twice 16 in fp32.
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

}  // namespace
