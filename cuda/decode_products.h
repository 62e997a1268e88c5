// The products of the decoder (decode_cpu.cpp): matrices where they lie, times the activations of some rows.
//
// Every sum is made in one order, whatever the number of rows is, and whatever the number of threads that
// share out the rows of a matrix. So what a row gets does not depend on the others.
#pragma once
#include "cpu.h"

enum Type : int64_t { kFp32 = 0, kBf16 = 1, kInt8 = 2, kPanels = 3, kBf16Pairs = 4, kBf16Single = 5 };

// A matrix as it lies in a tensor, row by row; int8 ones have a scale for each row. Panels are those of
// int8_panels.h. Pairs and single are bf16, for activations in two parts or one (bf16_products.h). Vectors
// are fp32 with zeros up to whole lanes.
struct Matrix {
    const void* data;
    const float* scale;
    int64_t rows, columns, type;
    const float* vector() const { return static_cast<const float*>(data); }
};

// Activations of `count` rows in the order of prepare() for one type of weights. The rows lie in one piece
// with room for padded(n) + 16 numbers each: those for panels, which take less, are side by side from rows[0]
// on.
struct Input {
    float* const* rows;
    long count;
};

// prepare() takes pieces that begin at multiples of this
long unit(int64_t type);

// The activations [from, to) of the n of a row -> their places in the order in which a row of weights of that
// type is read.
void prepare(int64_t type, const float* x, long n, long from, long to, const Input& input, long row);

// out[b][row] = the product of row b of the input with a row of the matrix, for its rows [first, last)
void multiply(const Matrix& matrix, const Input& input, long first, long last, float* const* out);

// out[b][c] += the sum of x[b][r] matrix[r][c] over the matrix's rows [first, last), in their order, for
// count rows b and c in [from, to); fp32 or bf16
void add_columns(const Matrix& matrix, const float* const* x, long count, long first, long last, long from,
    long to, float* const* out);

inline long padded(long n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

inline float value(const float* p) { return *p; }
inline float value(const int8_t* p) { return *p; }
inline float value(const uint16_t* p) {
    const uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
