// WKV-6, head size 64, forward and backward, in chunks of 16 tokens on tensor cores (sm_80 and later). bf16
// or fp16 in and out.
//
// M is the state [key, value], all other matrices have the 16 tokens of a chunk as rows. A decay may be an
// exact 0, so nothing is divided by one: with D(i,t) = prod_{i<s<t} delta_s, start before and end after all
// tokens of the chunk,
//   G = r D(start,t)    Ke = k D(t,end)    F = D(start,end)
//   L[t,i] = sum_n r_t D(i,t) k_i for i < t, sum_n r_t u k_t on the diagonal
//   Y = G M + L V       M <- F M + Ke^T V
//   dV = Ke D + L^T dY  D <- F D + G^T dY              with the gradient D of the state after the chunk
// D(i,t) is a product of two factors at the boundary between the largest aligned block of 1, 2, 4 or 8 tokens
// that has i and not t and the next one, which has t: for each of these four sizes, `level`s, R = r D(start
// of block,t) for tokens in second blocks, K = k D(i,end of block) in first ones, zeros elsewhere, and L is
// the sum of R K^T, each kept where both tokens are in one block of twice the size.
//
// prepare, scan: the factors G, Ke, L, F, and the walk with them from chunk to chunk, forwards and backwards,
// for which see chunked.cuh
// gradients: dr, dk, dw and parts of du of each chunk by itself, with c_t = v_t . dy_t and
// drk = tril-(dY V^T), of which each level takes its pairs
//   dr = D(start,t) dG + sum over levels of D(start of block,t) drk K + c u k       dG = dY M^T
//   dk = D(t,end) dKe + sum over levels of D(t,end of block) drk^T R + c u r        dKe = V D^T
//   du = sum_t c r k
//   d log delta_t = F <M, D> + sum_{s>t} (G dG + R drk K) - sum_{s>=t} K drk^T R + sum_{s<t} Ke dKe
// The last line counts the pairs of tokens (or states) that t lies between.
//
// A document that starts inside a chunk parts what is before it from the rest: masked are L and drk, the rows
// of G and dG from the first start on, the rows of Ke before the last one, and F.
//
// Precision: operands of products are bf16 (also of fp16 inputs); sums, decays and the state of `scan` are
// fp32. Relative L2 error against float64 on the same bf16 inputs, T = 4096, any decay: at most 3e-3; writing
// y in bf16 alone makes 1.7e-3.
//
// KB for a chunk of a head, where an input has 2: forward 6 read and 5 written, 7 and 10 (2 if no backward
// follows); backward 6 and 5, 7 and 10, 26 and 6. Of these 87, 35 are factors and D, which L2 may keep: 3.5
// to 5.9 GB for B, T, H = 8, 4096, 32, of which inputs and results are 1.9. No GPU has run this yet.
//
// u is fp32 (H, 64), du fp32 (B, H, 64), states fp32 (B, H, 64 keys, 64 values); the other layouts are in
// chunked.cuh.
//
// Alone: nvcc -O3 -std=c++17 -arch=sm_90 -Xcompiler -fPIC -shared wkv6_chunked.cu -o wkv6_chunked.so
#include "chunked.cuh"

namespace {

constexpr int LEVELS = 4;
// from this w on delta < 2e-9, and dw, which has the factor exp(w), would be rounding error only
constexpr float FORGETS = 3;

// What `prepare` leaves for `scan`, in the names of the forward, as the 32 lanes of a warp hold it.
struct Factors {
    static constexpr bool DELTA_RULE = false, KEY_FIRST = true;
    static constexpr int FORWARD_ONLY = 0;
    uint4 G[4][32];    // 16 tokens x 16 keys
    uint4 Ket[4][32];  // transposed: 16 keys x 16 tokens
    uint4 L[32];       // 16 x 16 tokens
    float4 F[16];
};

template <class T> struct Inputs {
    const T *r, *k, *v, *w;
    const float* u;
    const uint8_t* reset;
};

// For each token the product of the decays in its block: of the tokens before it, after it, and of all.
struct Block {
    Sum before, after, all;

    __device__ explicit Block(const Sum& w) {
        for (int i = 0; i < 8; i++) before.x[i] = after.x[i] = 1, all.x[i] = exp_ftz(-exp_ftz(w.x[i]));
    }
    static __device__ bool second(int level, int i) { return token(i) >> level & 1; }
    // from blocks of 2^level tokens to twice that
    __device__ void join(int level) {
        const Sum half = all;
        for (int i = 0; i < 8; i++) {
            float other = level == 3 ? half.x[i ^ 2] : __shfl_xor_sync(~0u, half.x[i], 4 << level);
            if (second(level, i)) before.x[i] *= other;
            else after.x[i] *= other;
            all.x[i] *= other;
        }
    }
    // R and K of a level
    __device__ Sum queries(const Sum& r, int level) const {
        Sum s;
        for (int i = 0; i < 8; i++) s.x[i] = second(level, i) ? r.x[i] * before.x[i] : 0;
        return s;
    }
    __device__ Sum keys(const Sum& k, int level) const {
        Sum s;
        for (int i = 0; i < 8; i++) s.x[i] = second(level, i) ? 0 : k.x[i] * after.x[i];
        return s;
    }
};

// Only the pairs of tokens that part at this level.
__device__ __forceinline__ void keep_level(Sum& s, int level) {
    for (int i = 0; i < 8; i++)
        if ((token(i) ^ column(i)) >> level != 1) s.x[i] = 0;
}

__device__ __forceinline__ float4 bonus(const float* u, int h, int warp) {
    return *(const float4*)(u + h * N + warp * 16 + lane_id() % 4 * 4);
}

template <class T, bool backward>
__global__ void __launch_bounds__(32 * WARPS, 6) prepare(Inputs<T> in, Factors* factors, Segment segment) {
    __shared__ Matrix R[LEVELS], K[LEVELS];
    __shared__ SharedTile scores[LEVELS];
    __shared__ float diagonal[WARPS][CHUNK];  // r . u k over each warp's channels
    const int n = threadIdx.x / 32, l = lane_id(), chunk = blockIdx.x;
    const Head head;
    const Place at = place(segment, head, chunk, n);
    const uint32_t resets = find_resets(in.reset, segment, head, chunk);
    const Sum w = to_sum<T>(load_tile(in.w, at, -INFINITY)), r = to_sum<T>(load_tile(in.r, at)),
              k = to_sum<T>(load_tile(in.k, at));
    const float4 u4 = bonus(in.u, head.h, n);
    const float u[4] = {u4.x, u4.y, u4.z, u4.w};

    Block block(w);
#pragma unroll
    for (int level = 0; level < LEVELS; level++) {
        put(R[level][n], to_tile(block.queries(r, level)));
        put(K[level][n], to_tile(block.keys(k, level)));
        block.join(level);
    }
    float own[2] = {};
    for (int i = 0; i < 8; i++) own[i >> 1 & 1] += r.x[i] * u[channel(i)] * k.x[i];
    for (int h = 0; h < 2; h++) {
        own[h] += __shfl_xor_sync(~0u, own[h], 1);
        own[h] += __shfl_xor_sync(~0u, own[h], 2);
        if (l % 4 == 0) diagonal[n][l / 4 + 8 * h] = own[h];
    }
    Sum G, Ke;
    for (int i = 0; i < 8; i++) {
        G.x[i] = r.x[i] * block.before.x[i];
        Ke.x[i] = k.x[i] * block.after.x[i];
    }
    cut(G, resets);
    cut_end(Ke, resets);
    Factors& f = factors[head.index() * segment.count + chunk];
    f.G[n][l] = words(operand(to_tile(backward ? Ke : G)));
    f.Ket[n][l] = words(operand(transpose(to_tile(backward ? G : Ke))));
    if (l < 4) {
        const Sum& all = block.all;
        f.F[n * 4 + l] =
            resets ? make_float4(0, 0, 0, 0) : make_float4(all.x[0], all.x[1], all.x[4], all.x[5]);
    }
    __syncthreads();

    Sum pairs = score<true>(R[n], K[n], resets);
    keep_level(pairs, n);
    put(scores[n], to_tile(pairs));
    __syncthreads();

    if (n == 0) {
        Sum L = {};
        for (int level = 0; level < LEVELS; level++)
            for (int i = 0; i < 8; i++) L.x[i] += to_sum(get(scores[level])).x[i];
        for (int i = 0; i < 8; i++)
            if (token(i) == column(i))
                for (int warp = 0; warp < WARPS; warp++) L.x[i] += diagonal[warp][token(i)];
        const Tile tile = to_tile(L);
        f.L[l] = words(operand(backward ? transpose(tile) : tile));
    }
}

template <class T> __global__ void __launch_bounds__(32 * WARPS, 3) gradients(Inputs<T> in, const T* dy,
    const State* Ms, int64_t Ms_stride, const State* Ds, T* dr, T* dk, T* dw, float4* du, Segment segment) {
    __shared__ Matrix V, dY;
    __shared__ SharedTile drk[LEVELS];
    __shared__ float own[CHUNK];  // c
    const int n = threadIdx.x / 32, l = lane_id(), chunk = blockIdx.x;
    const Head head;
    const Place at = place(segment, head, chunk, n);
    const uint32_t resets = find_resets(in.reset, segment, head, chunk);
    const State& M = Ms[head.index() * Ms_stride + chunk];
    const State& D = Ds[head.index() * segment.count + chunk];
    const Tile ws = load_tile(in.w, at, -INFINITY);
    const Sum r = to_sum<T>(load_tile(in.r, at)), k = to_sum<T>(load_tile(in.k, at));
    put(V[n], to_bf16<T>(load_tile(in.v, at)));
    put(dY[n], to_bf16<T>(load_tile(dy, at)));
    __syncthreads();

    Sum pairs = score<false>(dY, V, resets);
    for (int i = 0; i < 8; i++)
        if (n == 0 && token(i) == column(i)) own[token(i)] = pairs.x[i];
    keep_level(pairs, n);
    put(drk[n], to_tile(pairs));
    Sum dG = {}, dKe = {};
    float MD[4] = {};  // <M, D> over values
#pragma unroll 1
    for (int i = 0; i < 4; i++) {
        const Tile Mi = tile(M.tile[i][n][l]), Di = tile(D.tile[i][n][l]);
        for (int e = 0; e < 8; e++) MD[channel(e)] += to_sum(Mi).x[e] * to_sum(Di).x[e];
        mma(dG, get(dY[i]), operand(transpose(Mi)));
        mma(dKe, get(V[i]), operand(transpose(Di)));
    }
    cut(dG, resets);
    cut_end(dKe, resets);
    __syncthreads();

    // `after`, `before`: the sums of d log delta over later and earlier tokens, with the token's `self` that
    // is not in them
    Sum drs = {}, dks = {}, after = {}, before, self = {};
    Block block(to_sum<T>(ws));
#pragma unroll
    for (int level = 0; level < LEVELS; level++) {
        // products of rounded operands, as in dk, so that what must cancel does
        const Tile R = to_tile(block.queries(r, level)), K = to_tile(block.keys(k, level));
        Sum dR = {}, dK = {};
        mma(dR, get(drk[level]), operand(transpose(K)));
        mma(dK, get_transposed(drk[level]), operand(transpose(R)));
        for (int i = 0; i < 8; i++) {
            float ends = to_sum(R).x[i] * dR.x[i];
            self.x[i] += ends;
            after.x[i] += ends - to_sum(K).x[i] * dK.x[i];
        }
        dR = block.queries(dR, level);
        dK = block.keys(dK, level);
        for (int i = 0; i < 8; i++) drs.x[i] += dR.x[i], dks.x[i] += dK.x[i];
        block.join(level);
    }
    const float4 u4 = bonus(in.u, head.h, n);
    const float u[4] = {u4.x, u4.y, u4.z, u4.w};
    float sum[4] = {};
    for (int i = 0; i < 8; i++) {
        float c = own[token(i)], from_start = block.before.x[i] * dG.x[i];
        float to_end = block.after.x[i] * dKe.x[i];
        after.x[i] += r.x[i] * from_start;
        before.x[i] = k.x[i] * to_end;
        self.x[i] += r.x[i] * from_start + before.x[i];
        drs.x[i] += from_start + c * u[channel(i)] * k.x[i];
        dks.x[i] += to_end + c * u[channel(i)] * r.x[i];
        sum[channel(i)] += c * r.x[i] * k.x[i];
    }
    store_tile(dr, at, to_tile<T>(drs));
    store_tile(dk, at, to_tile<T>(dks));
    after = running_sum<true>(after);
    before = running_sum<false>(before);
    for (int c = 0; c < 4; c++)
        for (int step = 4; step < 32; step *= 2) {
            MD[c] += __shfl_xor_sync(~0u, MD[c], step);
            sum[c] += __shfl_xor_sync(~0u, sum[c], step);
        }
    if (l < 4)
        du[(head.index() * Ms_stride + chunk) * (N / 4) + n * 4 + l] =
            make_float4(sum[0], sum[1], sum[2], sum[3]);
    const Sum w = to_sum<T>(ws);
    Sum dW;
    for (int i = 0; i < 8; i++) {
        float whole = resets ? 0 : block.all.x[i] * MD[channel(i)];
        dW.x[i] = w.x[i] > FORGETS ? 0 : -exp_ftz(w.x[i]) * (whole + after.x[i] + before.x[i] - self.x[i]);
    }
    store_tile(dw, at, to_tile<T>(dW));
}

// du out of the chunks' parts
__global__ void __launch_bounds__(4 * N) sum_bonus(const float* parts, float* du, int64_t chunks) {
    __shared__ float sums[4][N];
    const int n = threadIdx.x % N, first = threadIdx.x / N;
    float sum = 0;
#pragma unroll 8
    for (int64_t i = first; i < chunks; i += 4) sum += parts[(blockIdx.x * chunks + i) * N + n];
    sums[first][n] = sum;
    __syncthreads();
    if (first == 0) du[blockIdx.x * (int64_t)N + n] = sums[0][n] + sums[1][n] + sums[2][n] + sums[3][n];
}

template <class T, bool backward> void run_prepare(
    const Sizes& sizes, const Segment& segment, const Inputs<T>& in, Factors* factors, void* stream) {
    auto kernel = prepare<T, backward>;
    LAUNCH(kernel, sizes.grid(segment.count), 32 * WARPS, 0, stream, in, factors, segment);
}

template <class T> void forward(const Sizes& sizes, const Inputs<T>& in, const float* s0, void* y, float* sT,
    State* states, Factors* factors, void* stream) {
    for (int64_t begin = 0; begin < sizes.chunks; begin += sizes.segment) {
        Segment segment = sizes.at(begin);
        run_prepare<T, false>(sizes, segment, in, factors, stream);
        run_scan<T, false>(sizes, segment, factors, in.v, y, begin ? sT : s0, sT,
            states ? states + begin : nullptr, sizes.chunks, stream);
    }
}

template <class T> void backward(const Sizes& sizes, const Inputs<T>& in, const State* states, const void* dy,
    const float* dsT, void* dr, void* dk, void* dv, void* dw, float* du, float* ds0, Factors* factors,
    void* stream) {
    auto* Ds = (State*)(factors + sizes.heads * sizes.segment);
    auto* parts = (float*)(Ds + sizes.heads * sizes.segment);
    for (int64_t begin = sizes.last(); begin >= 0; begin -= sizes.segment) {
        Segment segment = sizes.at(begin);
        run_prepare<T, true>(sizes, segment, in, factors, stream);
        run_scan<T, true>(sizes, segment, factors, dy, dv, begin == sizes.last() ? dsT : ds0, ds0, Ds,
            segment.count, stream);
        auto kernel = gradients<T>;
        LAUNCH(kernel, sizes.grid(segment.count), 32 * WARPS, 0, stream, in, (const T*)dy, states + begin,
            sizes.chunks, Ds, (T*)dr, (T*)dk, (T*)dw, (float4*)(parts + begin * N), segment);
    }
    LAUNCH(sum_bonus, sizes.heads, 4 * N, 0, stream, parts, du, sizes.chunks);
}

// f(Inputs) for the element type
template <class F> void with_inputs(int dtype, const void* r, const void* k, const void* v, const void* w,
    const float* u, const uint8_t* reset, F f) {
    auto call = [&](auto* type) {
        typedef decltype(type) P;
        f(Inputs<std::remove_const_t<std::remove_pointer_t<P>>>{(P)r, (P)k, (P)v, (P)w, u, reset});
    };
    dtype == kBFloat16 ? call((const __nv_bfloat16*)nullptr) : call((const __half*)nullptr);
}

}  // namespace

// in floats: the states before all chunks, which only a backward needs (`saved` may be null); and the factors
// of a segment, while a forward runs
extern "C" int64_t wkv6_chunked_saved(int64_t B, int64_t T, int64_t H, int64_t) {
    Sizes sizes(B, T, H);
    return sizes.heads * sizes.chunks * sizeof(State) / 4;
}
extern "C" int64_t wkv6_chunked_forward_scratch(int64_t B, int64_t T, int64_t H, int64_t, int, void*) {
    Sizes sizes(B, T, H);
    return sizes.heads * sizes.segment * sizeof(Factors) / 4;
}
// factors and D of a segment, du of all chunks
extern "C" int64_t wkv6_chunked_scratch(int64_t B, int64_t T, int64_t H, int64_t, int, void*) {
    Sizes sizes(B, T, H);
    return sizes.heads * (sizes.segment * (sizeof(State) + sizeof(Factors)) / 4 + sizes.chunks * N);
}

extern "C" int wkv6_chunked_forward(const void* r, const void* k, const void* v, const void* w,
    const float* u, const float* s0, const uint8_t* reset, void* y, float* sT, float* saved,
    float* scratch, int64_t B,
    int64_t T, int64_t H, int64_t head_size, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    if (!valid(B, T, H, head_size, dtype, {r, k, v, w, u, s0, y, sT, saved, scratch}))
        return cudaErrorInvalidValue;
    with_inputs(dtype, r, k, v, w, u, reset,
        [&](auto in) { forward(Sizes(B, T, H), in, s0, y, sT, (State*)saved, (Factors*)scratch, stream); });
    return cudaGetLastError();
}

extern "C" int wkv6_chunked_backward(const void* r, const void* k, const void* v, const void* w,
    const float* u, const float* s0, const uint8_t* reset, const float* saved, const void* dy,
    const float* dsT, void* dr, void* dk, void* dv, void* dw, float* du, float* ds0, float* scratch,
    int64_t B, int64_t T, int64_t H, int64_t head_size, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    if (!valid(B, T, H, head_size, dtype, {r, k, v, w, u, saved, dy, dsT, dr, dk, dv, dw, du, ds0, scratch}))
        return cudaErrorInvalidValue;
    with_inputs(dtype, r, k, v, w, u, reset, [&](auto in) {
        backward(Sizes(B, T, H), in, (const State*)saved, dy, dsT, dr, dk, dv, dw, du, ds0, (Factors*)scratch,
            stream);
    });
    return cudaGetLastError();
}
