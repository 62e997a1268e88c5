// What wkv6_chunked.cu and wkv7_chunked.cu share: the walk from chunk to chunk, and how activations,
// documents and states meet the tiles.
//
// Head size 64, chunks of 16 tokens, a block of 4 warps for a chunk, each with 16 of the 64 channels. Each
// version has three kernels:
//   prepare    each chunk by itself: Factors, which make a chunk linear in the state M = [key, value] before
//              it and in V (16 x 64):
//                U = W M + Q V       Y = G M + L V       M <- F M + Be^T U + Ke^T V
//              (without the delta rule there is no U)
//   scan       from chunk to chunk, M in fp32 registers, a warp for 16 of the 64 values, which never meet;
//              writes Y and, where a backward follows, in bf16 the state before each chunk. The backward has
//              this form too, in the gradient D of the state after the chunk, dY and dV.
//   gradients  each chunk by itself: all but dV, out of the inputs, dY, M and D
// Time goes in segments, so that `scan` and `gradients` find factors and D in L2, and no memory but the
// states grows with T.
//
// Layouts: activations (B, T, H, 64), aligned to 16 bytes. In a 16 x 16 tile, column 8j + 2q + e stands for
// channel 4q + 2j + e, so that a lane's four channels are neighbours in memory; products do not care. Tokens
// after the last one are zeros with decay 1.
#pragma once
#include "mma.h"

#include <initializer_list>
#include <type_traits>

namespace {

constexpr int N = 64, CHUNK = 16, WARPS = 4, STAGES = 4;
// 1024 chunks of one head have 16 MB of factors and D; with fewer than 16 chunks of time, launches would cost
// more than L2 saves.
constexpr int64_t SEGMENT_HEADS = 1024, SEGMENT_CHUNKS = 16;

// the state before a chunk, by value tile and key tile
struct State { uint4 tile[4][4][32]; };

// chunks [begin, begin + count) of sequences of T tokens
struct Segment {
    int64_t T;
    int begin, count;
};

// The head of a block, of one row of the batch. A grid is (blocks of a head, heads, rows), so that no block
// has to divide.
struct Head {
    int64_t row;
    int h, heads;
    __device__ Head() : row(blockIdx.z), h(blockIdx.y), heads(gridDim.y) {}
    __device__ int64_t index() const { return row * heads + h; }
};

constexpr float LOG2_E = 1.44269504f;
__device__ __forceinline__ float exp_ftz(float x) { return exp2_ftz(x * LOG2_E); }

typedef SharedTile Matrix[4];  // 16 tokens x 64 channels

__device__ __forceinline__ uint4 words(const Tile& t) { return {t.x[0], t.x[1], t.x[2], t.x[3]}; }
__device__ __forceinline__ uint4 words(const Operand& b) { return {b.x[0], b.x[1], b.x[2], b.x[3]}; }
__device__ __forceinline__ Tile tile(const uint4& w) { return {{w.x, w.y, w.z, w.w}}; }
__device__ __forceinline__ Operand operand(const uint4& w) { return {{w.x, w.y, w.z, w.w}}; }

// Element i of a Sum whose rows are tokens belongs to this token of the chunk and to this one of the lane's
// four channels; if columns are tokens too, to this one.
__device__ __forceinline__ int token(int i) { return lane_id() / 4 + (i & 2) * 4; }
__device__ __forceinline__ int channel(int i) { return (i >> 2) * 2 + (i & 1); }
__device__ __forceinline__ int column(int i) { return (i >> 2) * 8 + lane_id() % 4 * 2 + (i & 1); }

// Where a lane finds its part of a tile of activations, which is four channels of two tokens.
struct Place {
    int64_t offset;  // of its first channel in the first of its tokens
    int half;        // from there to the other token
    int left;        // tokens from the first one to the end of the sequence
};
__device__ __forceinline__ Place place(const Segment& s, const Head& head, int chunk, int warp) {
    int64_t t = (int64_t)(s.begin + chunk) * CHUNK + lane_id() / 4;
    int64_t vector = (head.row * s.T + t) * head.heads + head.h;
    return {vector * N + warp * 16 + lane_id() % 4 * 4, 8 * head.heads * N, (int)(s.T - t)};
}

template <class T> __device__ __forceinline__ Tile load_tile(const T* x, const Place& at, float fill = 0) {
    uint2 first = {pack<T>(fill, fill), pack<T>(fill, fill)}, second = first;
    const T* from = x + at.offset;
    if (at.left > 0) first = *(const uint2*)from;
    if (at.left > 8) second = *(const uint2*)(from + at.half);
    return {{first.x, second.x, first.y, second.y}};
}
// As an assignment a store would become two of 4 bytes; streaming, so that L2 keeps the factors.
template <class T> __device__ __forceinline__ void store_tile(T* x, const Place& at, const Tile& t) {
    T* to = x + at.offset;
    if (at.left > 0) __stcs((uint2*)to, make_uint2(t.x[0], t.x[2]));
    if (at.left > 8) __stcs((uint2*)(to + at.half), make_uint2(t.x[1], t.x[3]));
}
template <class T> __device__ __forceinline__ Tile to_bf16(const Tile& t) {
    return std::is_same<T, __nv_bfloat16>::value ? t : to_tile(to_sum<T>(t));
}

// Bit t: a document starts at token t of the chunk. Most chunks have no such token and branch around what
// documents would cut; all lanes have the same bits.
__device__ __forceinline__ uint32_t find_resets(
    const uint8_t* reset, const Segment& s, const Head& head, int chunk) {
    if (!reset) return 0;
    int64_t t = (int64_t)(s.begin + chunk) * CHUNK + lane_id();
    return __ballot_sync(~0u, lane_id() < CHUNK && t < s.T && reset[head.row * s.T + t]);
}
// Whether no document starts after token i, up to and including token t. The incoming state is before all
// tokens.
constexpr int START = -1, END = CHUNK - 1;
__device__ __forceinline__ bool linked(uint32_t resets, int i, int t) {
    return ((resets & ((2u << t) - 1)) >> (i + 1)) == 0;
}

// X Y^T of tokens against tokens, lower triangle, within documents.
template <bool strict>
__device__ __forceinline__ Sum score(const Matrix& x, const Matrix& y, uint32_t resets) {
    Sum s = {};
    for (int i = 0; i < 4; i++) mma(s, get(x[i]), get_b(y[i]));
    for (int i = 0; i < 8; i++)
        if (column(i) > token(i) || (strict && column(i) == token(i))) s.x[i] = 0;
    if (resets) {
        for (int i = 0; i < 8; i++)
            if (!linked(resets, column(i), token(i))) s.x[i] = 0;
    }
    return s;
}

// Zeros in the rows that the incoming state does not reach.
__device__ __forceinline__ void cut(Sum& s, uint32_t resets) {
    if (resets) {
        for (int i = 0; i < 8; i++)
            if (!linked(resets, START, token(i))) s.x[i] = 0;
    }
}
// Zeros in the rows that do not reach the end of the chunk.
__device__ __forceinline__ void cut_end(Sum& s, uint32_t resets) {
    if (resets) {
        for (int i = 0; i < 8; i++)
            if (!linked(resets, token(i), END)) s.x[i] = 0;
    }
}

// For each token the sum over it and those before it, or those after it.
template <bool after> __device__ __forceinline__ Sum running_sum(Sum s) {
    int l = lane_id();
    for (int i = 0; i < 8; i++)
        for (int step = 4; step < 32; step *= 2) {
            int source = after ? l + step : l - step;
            float other = __shfl_sync(~0u, s.x[i], source);
            if (source >= 0 && source < 32) s.x[i] += other;
        }
    // the other half's total
    for (int i = 0; i < 8; i++)
        if (((i & 2) == 0) == after) s.x[i] += __shfl_sync(~0u, s.x[i ^ 2], after ? l % 4 : 28 + l % 4);
    return s;
}

// v and y are dy and dv in the backward, where time runs backwards too. The block's warps are a constant, so
// that the loop over the factors' words is unrolled.
template <class T, class Factors, bool backward, int warps>
__global__ void __launch_bounds__(32 * warps, 16 / warps)
    scan(const Factors* factors, const T* v, T* y, const float* from, float* to, State* states,
        int64_t states_stride, Segment segment) {
    struct Values { uint2 of[CHUNK][4]; };  // 16 tokens x 16 values
    DYNAMIC_SHARED(unsigned char, shared);
    auto* ring = (Factors*)shared;
    auto* values = (Values*)(ring + STAGES);
    constexpr int size = sizeof(Factors) / 16, direction = backward ? -1 : 1;
    constexpr int count = size - (backward ? Factors::FORWARD_ONLY : 0);  // of which it copies
    const int l = lane_id(), q = l % 4, n = blockIdx.x * warps + threadIdx.x / 32;
    const Head block;
    const int64_t head = block.index(), next = (int64_t)direction * CHUNK * block.heads * N;  // chunk
    const int begin = backward ? segment.count - 1 : 0;
    Values* mine = values + threadIdx.x / 32 * STAGES;

    // what moves from chunk to chunk: for the next one to fetch ...
    auto* source = (const uint4*)&factors[head * segment.count + begin] + threadIdx.x;
    Place at = place(segment, block, begin, n);
    const T* row = v + at.offset + (int64_t)(l / 2 - l / 4) * block.heads * N + l % 2 * 8 - q * 4;
    int left = at.left + l / 4 - l / 2;
    // ... and for the present one
    State* state = states + head * states_stride + begin;
    y += at.offset;

    auto fetch = [&](int step) {
        if (step < segment.count) {
            auto* local = (uint4*)&ring[step % STAGES] + threadIdx.x;
#pragma unroll
            for (int i = 0; i < count; i += 32 * warps)
                if (i + 32 * warps <= count || i + (int)threadIdx.x < count)
                    copy_async(local + i, source + i);
            copy_async(&mine[step % STAGES].of[l / 2][l % 2 * 2], row, left > 0);
        }
        copy_commit();  // an empty group at the end keeps the count
        source += direction * size;
        row += next;
        left -= direction * CHUNK;
    };

    Sum S[4] = {};
    // f(x, index) with four neighbouring keys of a value, and where the first is in the interface's layout
    auto each_value = [&](auto f) {
        for (int i = 0; i < 4; i++)
            for (int e = 0; e < 4; e += 2) {
                int value = n * 16 + l / 8 * 4 + e + l / 4 % 2, key = i * 16 + q * 4;
                float* const x[4] = {&S[i].x[e], &S[i].x[e + 1], &S[i].x[e + 4], &S[i].x[e + 5]};
                f(x, head * N * N + (Factors::KEY_FIRST ? key * N + value : value * N + key));
            }
    };
    if (from)
        each_value([&](float* const(&x)[4], int64_t at) {
            if constexpr (Factors::KEY_FIRST) {
                for (int c = 0; c < 4; c++) *x[c] = from[at + c * N];
            } else {
                float4 keys = *(const float4*)(from + at);
                *x[0] = keys.x, *x[1] = keys.y, *x[2] = keys.z, *x[3] = keys.w;
            }
        });

    for (int step = 0; step < STAGES - 1; step++) fetch(step);
    for (int step = 0; step < segment.count; step++) {
        copy_wait<STAGES - 2>();
        // this step's stage has arrived for all, and all have left the stage of the step before, which is
        // next to fill
        __syncthreads();
        fetch(step + STAGES - 1);
        const Factors& f = ring[step % STAGES];
        Tile V;
        for (int h = 0; h < 2; h++) {
            uint2 pairs = mine[step % STAGES].of[l / 4 + 8 * h][q];
            V.x[h] = pairs.x, V.x[h + 2] = pairs.y;
        }
        const Tile Vt = transpose(to_bf16<T>(V));

        // all of this is transposed: 16 values x tokens, 16 values x keys
        Sum U = {}, Y = {};
        if constexpr (Factors::DELTA_RULE && !backward) mma(U, Vt, operand(f.Q[l]));
        mma(Y, Vt, operand(f.L[l]));
        for (int i = 0; i < 4; i++) {
            Tile s = to_tile(S[i]);
            if (backward || states) state->tile[n][i][l] = words(s);
            if constexpr (Factors::DELTA_RULE) mma(U, s, operand(f.W[i][l]));
            mma(Y, s, operand(f.G[i][l]));
            float4 F = f.F[i * 4 + q];
            float decay[4] = {F.x, F.y, F.z, F.w};
            for (int e = 0; e < 8; e++) S[i].x[e] *= decay[channel(e)];
            mma(S[i], Vt, operand(f.Ket[i][l]));
        }
        if constexpr (Factors::DELTA_RULE) {
            const Tile Ut = to_tile(U);
            for (int i = 0; i < 4; i++) mma(S[i], Ut, operand(f.Bet[i][l]));
        }

        store_tile(y, {0, at.half, at.left}, transpose(to_tile<T>(Y)));
        state += direction;
        y += next;
        at.left -= direction * CHUNK;
    }

    each_value([&](float* const(&x)[4], int64_t at) {
        if constexpr (Factors::KEY_FIRST) {
            for (int c = 0; c < 4; c++) to[at + c * N] = *x[c];
        } else {
            *(float4*)(to + at) = make_float4(*x[0], *x[1], *x[2], *x[3]);
        }
    });
}

struct Sizes {
    int64_t B, T, H, heads, chunks, segment;
    Sizes(int64_t B, int64_t T, int64_t H)
        : B(B),
          T(T),
          H(H),
          heads(B * H),
          chunks((T + CHUNK - 1) / CHUNK) {
        int64_t most = std::max(SEGMENT_CHUNKS, SEGMENT_HEADS / heads), segments = (chunks + most - 1) / most;
        segment = (chunks + segments - 1) / segments;  // all of one length, or the last is shorter by a few
    }
    Segment at(int64_t begin) const {
        return {T, (int)begin, (int)std::min(segment, chunks - begin)};
    }
    dim3 grid(int blocks) const { return dim3(blocks, H, B); }  // of every head
    int64_t last() const { return (chunks - 1) / segment * segment; }
};

template <class T, bool backward, class Factors> void run_scan(const Sizes& sizes, const Segment& segment,
    const Factors* factors, const void* v, void* y, const float* from, float* to, State* states,
    int64_t states_stride, void* stream) {
    // few heads: a block for each warp, to reach more multiprocessors; many: factors are fetched once for
    // four warps
    auto launch = [&](auto kernel, int warps) {
        LAUNCH(kernel, sizes.grid(WARPS / warps), 32 * warps, STAGES * (sizeof(Factors) + warps * 512),
            stream, factors, (const T*)v, (T*)y, from, to, states, states_stride, segment);
    };
    if (sizes.heads >= 128) launch(scan<T, Factors, backward, 4>, 4);
    else if (sizes.heads >= 64) launch(scan<T, Factors, backward, 2>, 2);
    else launch(scan<T, Factors, backward, 1>, 1);
}

bool valid(int64_t B, int64_t T, int64_t H, int64_t head_size, int dtype,
    std::initializer_list<const void*> pointers) {
    uintptr_t bits = 0;
    for (const void* p : pointers) bits |= (uintptr_t)p;
    constexpr int64_t GRID = 65535;  // the largest y and z
    return B > 0 && B <= GRID && T > 0 && H > 0 && H <= GRID && head_size == N &&
           (dtype == kBFloat16 || dtype == kFloat16) && bits % 16 == 0;
}

}  // namespace
