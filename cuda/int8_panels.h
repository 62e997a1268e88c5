// Products of an int8 matrix with the int8 activations of B rows (int8_panels_cpu.cpp). VNNI's vpdpbusd
// multiplies four pairs of bytes and adds them to a sum, so no weight has to be widened.
//
// Weights are packed once, in panels of ROWS rows. A panel is a sequence of blocks of BLOCK columns, which is
// read from its beginning to its end: bytes [BLOCK / 4][row][4] of w + 128 (the instruction takes one factor
// without a sign), |w| <= 127, then the scale [row] of each row in bf16. What fills no panel is zeros.
//
// Activations are quantised for each token: of each block [B] records of a row's BLOCK bytes with a sign, the
// scale of each PART of them in fp32, and -128 times the sum of its bytes in int32. A sum of products starts
// from the latter, which takes the weights' 128 away. Parts are smaller than blocks because the activations'
// error is the larger one.
//
// Sums of integers are exact, and those of the parts are added up in their order. So the products of a row
// are the same bits beside any other rows and with any number of threads.
#pragma once
#include "cpu.h"

namespace panels {

constexpr long ROWS = 16, BLOCK = 64, PART = 32, PARTS = BLOCK / PART;

// A block of a row of activations.
struct Record {
    int8_t bytes[BLOCK];
    float scales[PARTS];
    int32_t starts[PARTS];
};

inline long blocks(long columns) { return (columns + BLOCK - 1) / BLOCK; }
// of a packed matrix, and of the n activations of B rows
inline long matrix_bytes(long rows, long columns) {
    return (rows + ROWS - 1) / ROWS * blocks(columns) * ROWS * (BLOCK + 2);
}
inline long activation_bytes(long B, long n) { return blocks(n) * B * sizeof(Record); }

// The activations [from, to) of the n of row `row` of B; from is a multiple of BLOCK, and so is to unless it
// is n.
void prepare(const float* x, long n, long from, long to, long row, long B, Record* activations);

// out[b][row] = the product of row b of the activations with a row of the matrix, for its rows [first, last);
// first is a multiple of ROWS, and so is last unless it is the matrix's.
void multiply(const uint8_t* matrix, long columns, const Record* activations, long B, long first, long last,
    float* const* out);

}
