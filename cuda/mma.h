// Tensor cores as an algebra of 16x16 tiles, D += X Y^T with X, Y in bf16 and D in fp32, out of PTX
// instructions of sm_80 and later.
//
// Lane l = 4 g + q holds row g and columns 2q, 2q+1 of each 8x8 quarter of a tile, the quarters in the order
// top left, bottom left, top right, bottom right:
//   Tile.x[0..3]   in bf16, 32 bits a pair, low half first. As it stands this is operand A of mma.m16n8k16.
//                  (Activations on their way to or from memory may be tiles of fp16.)
//   Sum.x[0..7]    in fp32, operand D: element i is row g + 8 (i/2 % 2), column 8 (i/4) + 2q + i%2. A sum
//       becomes a tile in its own lane.
#pragma once
#include "launch.h"

struct Tile { uint32_t x[4]; };
struct Sum { float x[8]; };
// A tile as operand B: the quarters in the order top left, top right, bottom left, bottom right, so that the
// two registers of an instruction are neighbours, as they must be. From a Tile it takes up to four moves,
// from memory none.
struct Operand { uint32_t x[4]; };
// the quarters one after the other, each as 8 rows of 16 bytes: no bank conflicts, neither for rows nor for
// columns
struct __align__(16) SharedTile { uint32_t words[128]; };

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }

// two floats as a pair of bf16 or fp16, and back
template <class T> __device__ __forceinline__ uint32_t pack(float low, float high) {
    T pair[2];
    store(&pair[0], low);
    store(&pair[1], high);
    uint32_t word;
    memcpy(&word, pair, 4);
    return word;
}
template <class T> __device__ __forceinline__ float2 unpack(uint32_t word) {
    T pair[2];
    memcpy(pair, &word, 4);
    return make_float2(load(&pair[0]), load(&pair[1]));
}

// The sources are compiled for older GPUs too, where these kernels are never launched.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define PTX(...) __trap()
#else
#define PTX(...) asm volatile(__VA_ARGS__)
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
// one instruction where the generic form takes three
template <> __device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
#endif

// d (16x8, four elements of a Sum) += A (16x16) B (16x8)
__device__ __forceinline__ void mma_16816(float* d, const Tile& a, uint32_t b0, uint32_t b1) {
    PTX("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};" : "+f"(d[0]),
        "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0),
        "r"(b1));
}

// 2^x and 1/x in one instruction, denormals as 0; the forms of the library take three or four
__device__ __forceinline__ float exp2_ftz(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal_ftz(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// an 8x8 quarter transposed
__device__ __forceinline__ uint32_t movmatrix(uint32_t x) {
    uint32_t y = 0;
    PTX("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Four quarters; lane l gives the address of row l % 8 of quarter l / 8. What is read here must be separated
// by a barrier from what writes it, as for any other warp: the compiler is not told that this reads memory,
// so that it may move other loads ahead of it.
template <bool transposed> __device__ __forceinline__ Tile ldmatrix(const uint32_t* row) {
    Tile t = {};
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    if (transposed)
        PTX("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
            : "=r"(t.x[0]), "=r"(t.x[1]), "=r"(t.x[2]), "=r"(t.x[3]) : "r"(address));
    else
        PTX("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
            : "=r"(t.x[0]), "=r"(t.x[1]), "=r"(t.x[2]), "=r"(t.x[3]) : "r"(address));
    return t;
}

// 16 bytes of global memory to shared memory without waiting, zeros if !valid; the copies up to a commit are
// a group
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
    PTX("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
        "l"(global) : "memory");
}
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
    PTX("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
        "l"(global), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { PTX("cp.async.commit_group;" ::: "memory"); }
// until at most `pending` of this thread's groups are on their way; other threads see the copies after a
// barrier only
template <int pending> __device__ __forceinline__ void copy_wait() {
    PTX("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

template <class T = __nv_bfloat16> __device__ __forceinline__ Tile to_tile(const Sum& s) {
    Tile t;
    for (int i = 0; i < 4; i++) t.x[i] = pack<T>(s.x[2 * i], s.x[2 * i + 1]);
    return t;
}

template <class T = __nv_bfloat16> __device__ __forceinline__ Sum to_sum(const Tile& t) {
    Sum s;
    for (int i = 0; i < 4; i++) {
        float2 pair = unpack<T>(t.x[i]);
        s.x[2 * i] = pair.x;
        s.x[2 * i + 1] = pair.y;
    }
    return s;
}

// d += a b^T
__device__ __forceinline__ void mma(Sum& d, const Tile& a, const Operand& b) {
    mma_16816(d.x, a, b.x[0], b.x[1]);
    mma_16816(d.x + 4, a, b.x[2], b.x[3]);
}
__device__ __forceinline__ Operand operand(const Tile& t) { return {{t.x[0], t.x[2], t.x[1], t.x[3]}}; }

__device__ __forceinline__ Tile transpose(const Tile& t) {
    return {{movmatrix(t.x[0]), movmatrix(t.x[2]), movmatrix(t.x[1]), movmatrix(t.x[3])}};
}

__device__ __forceinline__ void put(SharedTile& s, const Tile& t) {
    for (int i = 0; i < 4; i++) s.words[32 * i + lane_id()] = t.x[i];
}

// Addresses for ldmatrix: the quarters in their order, and with the two off-diagonal ones exchanged.
__device__ __forceinline__ const uint32_t* in_order(const SharedTile& s) { return s.words + 4 * lane_id(); }
__device__ __forceinline__ const uint32_t* exchanged(const SharedTile& s) {
    int l = lane_id();
    return s.words + (l & 8) * 8 + (l & 16) * 2 + (l & 7) * 4;
}
__device__ __forceinline__ Tile get(const SharedTile& s) { return ldmatrix<false>(in_order(s)); }
__device__ __forceinline__ Tile get_transposed(const SharedTile& s) { return ldmatrix<true>(exchanged(s)); }
// the same as operands B
__device__ __forceinline__ Operand get_b(const SharedTile& s) {
    Tile t = ldmatrix<false>(exchanged(s));
    return {{t.x[0], t.x[1], t.x[2], t.x[3]}};
}
__device__ __forceinline__ Operand get_b_transposed(const SharedTile& s) {
    Tile t = ldmatrix<true>(in_order(s));
    return {{t.x[0], t.x[1], t.x[2], t.x[3]}};
}
