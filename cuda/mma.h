// Tensor cores: D (16x8, fp32) += A (16x16, bf16) B (16x8, bf16), as PTX mma.sync.m16n8k16, and its emulation with the same fragments.
//
// Lane l = 4 g + q holds, in 32-bit registers of two bf16 (low half first):
//   A: a0 = (row g, columns 2q..2q+1), a1 = (row g+8, same), a2 = (row g, columns 2q+8..2q+9), a3 = (row g+8, columns 2q+8..2q+9)
//   B: b0 = (rows 2q..2q+1, column g), b1 = (rows 2q+8..2q+9, column g)
//   D: d0, d1 = (row g, columns 2q, 2q+1), d2, d3 = (row g+8, columns 2q, 2q+1)
#pragma once
#include "launch.h"

#ifdef __CUDACC__
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    int me = cu::B->current, warp = me & ~31, g = (me & 31) >> 2, q = me & 3;
    uint32_t(*registers)[6] = cu::B->fragments + warp;
    memcpy(registers[me & 31], a, 16);
    memcpy(registers[me & 31] + 4, b, 8);
    cu::warp_sync();
    auto half = [](uint32_t word, int high) {
        uint32_t bits = high ? word & 0xffff0000u : word << 16;
        float f;
        memcpy(&f, &bits, 4);
        return f;
    };
    for (int i = 0; i < 4; i++) {
        int row = g + (i >> 1) * 8, column = q * 2 + (i & 1);
        for (int k = 0; k < 16; k++) {
            uint32_t word_a = registers[(row & 7) * 4 + (k & 7) / 2][(row >> 3) + (k >> 3) * 2];
            uint32_t word_b = registers[column * 4 + (k & 7) / 2][4 + (k >> 3)];
            d[i] += half(word_a, k & 1) * half(word_b, k & 1);
        }
    }
    cu::warp_sync();
}
#endif
