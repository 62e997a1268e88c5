// Products of bf16 weights where they lie with activations in bf16 (bf16_products_cpu.cpp), for CPUs whose
// vdpbf16ps multiplies two pairs of them and adds both to an fp32 sum. No weight has to be widened.
//
// A row of activations x is two rows of bf16: hi, x rounded, and lo, the rounding error of hi, rounded too.
// With both, a product's relative error is 2.5e-6; fp32 has 1e-7. With hi alone it is 2e-3, for half of the
// work. Both are padded with zeros to whole blocks; together they take at most padded(n) fp32 numbers.
//
// A sum of products has one accumulator of WIDTH lanes, in the order of the columns, whatever tile it is in.
// So the products of a row are the same bits beside any other rows and with any number of threads.
#pragma once
#include "cpu.h"

namespace bf16 {

constexpr long BLOCK = 2 * WIDTH;

inline long padded(long n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

// The activations [from, to) of the n of a row: hi [padded(n)], and lo after it where parts is 2.
void prepare(const float* x, long n, long from, long to, int parts, float* out);

// out[b][row] = the product of row b of `count` prepared ones with a row of the matrix, for its rows
// [first, last)
void multiply(const uint16_t* matrix, long columns, float* const* x, int parts, long count, long first,
    long last, float* const* out);

}
