// WKV-7, head size 64, forward and backward, in chunks of 16 tokens on tensor cores (sm_80 and later). bf16
// or fp16 in and out.
//
// M is the state [key, value], the transpose of the interface's, all other matrices have the 16 tokens of a
// chunk as rows. With P_t = sum_{s<=t} log delta_s inside the chunk, and tril- strictly lower:
//   A = a e^{P - log delta}    B = b e^{-P}              K = k e^{-P}              R = r e^{P}
//                              Be = b e^{P_end - P}      Ke = k e^{P_end - P}      F = e^{P_end}
//   ab = tril-(A B^T)    ak = tril-(A K^T)    rb = tril(R B^T)    rk = tril(R K^T)    I = (1 - ab)^-1
// A chunk is linear in its incoming state M and in V:
//   U = W M + Q V       W = I A           Q = I ak      U_t = S_{t-1} a_t, what the delta rule reads
//   Y = G M + L V       G = R + rb I A    L = rk + rb I ak
//   M <- F M + Be^T U + Ke^T V
// and so is its adjoint, out of the same factors, in dY and the gradient D of the outgoing state:
//   E = Be D            dV = (Ke + Q^T Be) D + L^T dY
//   D <- F D + W^T E + G^T dY
//
// prepare, scan: the factors above, and the walk with them from chunk to chunk, forwards and backwards, for
// which see chunked.cuh
// gradients: dr, dw, dk, da, db of each chunk by itself
//   X = A M + ak V      U = I X           dU = rb^T dY + Be D      Z = I^T dU
//   dab = tril-(Z U^T)  dak = tril-(Z V^T)    drb = tril(dY U^T)   drk = tril(dY V^T)
//   dR = dY M^T + drb B + drk K               dA = Z M^T + dab B + dak K
//   dB = dab^T A + drb^T R    dBe = U D^T     dK = dak^T A + drk^T R    dKe = V D^T
//   d log delta_t = F <M, D> + sum_{s>=t} (R dR - B dB - K dK) + sum_{s>t} A dA + sum_{s<t} (Be dBe + Ke dKe)
// The last line counts the pairs of tokens (or states) that t lies between. No decay is divided by that
// another has not multiplied: e^{-P} <= e^{0.6065 * 16} = 1.6e4.
//
// A document that starts inside a chunk parts what is before it from the rest: masked are the four score
// matrices and their gradients, the rows of W, G, A M, dY M^T, Z M^T from the first start on, the rows of Be
// and Ke before the last one, and F. After the last token of a sequence r = k = v = a = b = log delta = 0.
//
// Precision: operands of products are bf16 (also of fp16 inputs); sums, decays, the inverse and the state of
// `scan` are fp32. Relative L2 error against float64 on the same bf16 inputs, T = 4096, any decay: y 3.6e-3,
// gradients 2.9e-3 to 4.8e-3; writing y in bf16 alone makes 1.7e-3. Where much is written and removed again
// (alike keys, learning rates and decays near 1), da and db have 1e-2.
//
// KB for a chunk of a head, where an input has 2: forward 10 read and 9 written, 11 and 10 (2 if no backward
// follows); backward 10 and 9, 11 and 10, 30 and 10. Of these 120, 53 are factors and D, which L2 may keep:
// 4.5 to 8 GB for B, T, H = 8, 4096, 32, of which inputs and results are 2.7. No GPU has run this yet.
//
// States are fp32 (B, H, 64 values, 64 keys); the other layouts are in chunked.cuh.
//
// Alone: nvcc -O3 -std=c++17 -arch=sm_90 -Xcompiler -fPIC -shared wkv7_chunked.cu -o wkv7_chunked.so
#include "chunked.cuh"
#include "vectors.cuh"

namespace {

constexpr float LOWEST = 0.60653066f;  // exp(-1/2), minus the log of the smallest decay

// What `prepare` leaves for `scan`, in the names of the forward, as the 32 lanes of a warp hold it.
struct Factors {
    static constexpr bool DELTA_RULE = true, KEY_FIRST = false;
    static constexpr int FORWARD_ONLY = 32;  // of its words of 16 bytes, at the end
    uint4 W[4][32], G[4][32];      // 16 tokens x 16 keys
    uint4 Bet[4][32], Ket[4][32];  // transposed: 16 keys x 16 tokens
    uint4 L[32];                   // 16 x 16 tokens
    float4 F[16];
    uint4 Q[32];                   // 16 x 16 tokens, of the forward only
};

// With `vectors` k_k, k_a, r_k there is no b: k and a are the raw ones that delta_inputs of elementwise.cu has,
// and key, alpha and beta are made of them where they are read, with the same bits. `bonus` (tokens, H) gets
// r . key r_k, for the readout.
template <class T> struct Inputs {
    const T *r, *w, *k, *v, *a, *b;
    const uint8_t* reset;
    Vectors vectors;
    float* bonus;
};

// key, alpha and beta of the block's chunk: tile n has 16 channels as rows of 32 bytes, in pieces of 16 whose
// numbers are exclusive-ored with 2 n, so that eight threads of a store meet in no bank. A thread makes 8
// channels of a token, as a lane of elementwise.cu does.
template <class T> __device__ __forceinline__ void make_inputs(
    const Inputs<T>& in, const Segment& segment, const Head& head, int chunk, Matrix& K, Matrix& A, Matrix& B) {
    const int row = threadIdx.x / 8, part = threadIdx.x % 8, channel = head.h * N + part * WIDTH;
    const int64_t t = (int64_t)(segment.begin + chunk) * CHUNK + row, token = head.row * segment.T + t;
    const int64_t here = token * head.heads * N + channel;
    const bool has = t < segment.T;
    const auto read = [&](const T* x) { return has ? read_vec(x + here) : Vec(0); };
    const auto sum_head = [](float& x) {
#pragma unroll
        for (int lanes = 4; lanes; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    };
    const DeltaRule rule = delta_rule(
        read(in.k), read(in.a), in.vectors.read(0, channel), in.vectors.read(1, channel), sum_head);
    const int n = part / 2, place = n * CHUNK * CHUNK + ((row * 2 + part % 2) ^ 2 * n) * WIDTH;
    write_vec((T*)K + place, rule.key);
    write_vec((T*)A + place, rule.remove);
    write_vec((T*)B + place, rule.replace);
    if (!in.bonus) return;
    float sum = total(read(in.r) * rounded<T>(rule.key) * in.vectors.read(2, channel));
    sum_head(sum);
    if (has && part == 0) in.bonus[token * head.heads + head.h] = sum;
}
// the lane's part of such a tile, as load_tile reads it
__device__ __forceinline__ Tile made_tile(const Matrix& rows, int n) {
    const uint2 *from = (const uint2*)rows[n].words + (lane_id() ^ 4 * n), first = from[0], second = from[32];
    return {{first.x, second.x, first.y, second.y}};
}

// to base 2, as are all logarithms of decays from here on
__device__ __forceinline__ float log_delta(float w) {
    return -LOWEST * LOG2_E * reciprocal_ftz(1 + exp_ftz(-w));
}

// The scaled inputs of 16 channels.
struct Scaled {
    Sum A, B, K, R, P;
    float F[4];  // of the lane's channels
};
template <class T> __device__ __forceinline__ Scaled scale(const Inputs<T>& in, const Place& at,
    const Segment& segment, const Head& head, int chunk, Matrix& A, Matrix& B, Matrix& K) {
    const int n = threadIdx.x / 32;
    const Sum w = to_sum<T>(load_tile(in.w, at, -INFINITY));
    Scaled s;
    s.R = to_sum<T>(load_tile(in.r, at));
    if (in.vectors.count) {
        make_inputs(in, segment, head, chunk, K, A, B);
        __syncthreads();
        s.A = to_sum<T>(made_tile(A, n));
        s.B = to_sum<T>(made_tile(B, n));
        s.K = to_sum<T>(made_tile(K, n));
        __syncwarp();  // before this warp puts others in their place
    } else {
        s.A = to_sum<T>(load_tile(in.a, at));
        s.B = to_sum<T>(load_tile(in.b, at));
        s.K = to_sum<T>(load_tile(in.k, at));
    }
    for (int i = 0; i < 8; i++) s.P.x[i] = log_delta(w.x[i]);
    s.P = running_sum<false>(s.P);
    for (int i = 0; i < 8; i++) {
        if (i & 2) s.F[channel(i)] = exp2_ftz(__shfl_sync(~0u, s.P.x[i], 28 + lane_id() % 4));
        float grow = exp2_ftz(-s.P.x[i]);
        s.A.x[i] *= exp2_ftz(s.P.x[i] - log_delta(w.x[i]));
        s.B.x[i] *= grow;
        s.K.x[i] *= grow;
        s.R.x[i] *= exp2_ftz(s.P.x[i]);
    }
    return s;
}

// (1 - ab)^-1 by forward substitution, transposed: lane c < 16 has column c, which it stores as a row. By one
// warp; `columns` is its workspace.
// Columns are 20 floats apart: with 16, four lanes of a store would meet in each bank.
typedef float Columns[CHUNK][20];
__device__ __forceinline__ void invert(SharedTile& transposed, const Sum& ab, Columns& columns) {
    int c = lane_id();
    for (int e = 0; e < 8; e++) columns[column(e)][token(e)] = ab.x[e];
    __syncwarp();
    if (c < CHUNK) {
        float x[CHUNK];
#pragma unroll
        for (int t = 0; t < CHUNK; t++) x[t] = t == c;
#pragma unroll
        for (int i = 0; i < CHUNK; i++)
#pragma unroll
            for (int t = i + 1; t < CHUNK; t++) x[t] += columns[i][t] * x[i];
        auto* rows = (uint4*)transposed.words;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t pairs[4];
            const float* of = x + 8 * h;
#pragma unroll
            for (int i = 0; i < 4; i++) pairs[i] = pack<__nv_bfloat16>(of[2 * i], of[2 * i + 1]);
            rows[c + 16 * h] = {pairs[0], pairs[1], pairs[2], pairs[3]};
        }
    }
}

template <class T, bool backward>
__global__ void __launch_bounds__(32 * WARPS, 6) prepare(Inputs<T> in, Factors* factors, Segment segment) {
    __shared__ Matrix A, B, K, R;
    __shared__ SharedTile ak, rb, rk, inverse_t;
    __shared__ __align__(16) Columns columns;
    const int n = threadIdx.x / 32, l = lane_id(), chunk = blockIdx.x;
    const Head head;
    const uint32_t resets = find_resets(in.reset, segment, head, chunk);
    const Scaled s = scale(in, place(segment, head, chunk, n), segment, head, chunk, A, B, K);
    put(A[n], to_tile(s.A));
    put(B[n], to_tile(s.B));
    put(K[n], to_tile(s.K));
    put(R[n], to_tile(s.R));
    __syncthreads();

    if (n == 0) invert(inverse_t, score<true>(A, B, resets), columns);
    if (n == 1) put(ak, to_tile(score<true>(A, K, resets)));
    if (n == 2) put(rb, to_tile(score<false>(R, B, resets)));
    if (n == 3) put(rk, to_tile(score<false>(R, K, resets)));
    __syncthreads();

    const Operand At = get_b_transposed(A[n]), akt = get_b_transposed(ak);
    const Tile inverse = get_transposed(inverse_t);
    Sum rbI = {}, Q = {}, W = {}, G = s.R, L = to_sum(get(rk)), Be, Ke;
    mma(rbI, get(rb), get_b(inverse_t));
    mma(Q, inverse, akt);
    mma(L, to_tile(rbI), akt);
    mma(W, inverse, At);
    mma(G, to_tile(rbI), At);
    cut(W, resets);
    cut(G, resets);

    for (int i = 0; i < 8; i++) {
        Be.x[i] = s.B.x[i] * s.F[channel(i)];
        Ke.x[i] = s.K.x[i] * s.F[channel(i)];
    }
    cut_end(Be, resets);
    cut_end(Ke, resets);

    Factors& f = factors[head.index() * segment.count + chunk];
    const Operand Bet = operand(transpose(to_tile(Be)));
    if (backward) {
        mma(Ke, transpose(to_tile(Q)), Bet);
        f.W[n][l] = words(operand(to_tile(Be)));
        f.G[n][l] = words(operand(to_tile(Ke)));
        f.Bet[n][l] = words(operand(transpose(to_tile(W))));
        f.Ket[n][l] = words(operand(transpose(to_tile(G))));
        if (n == 0) f.L[l] = words(operand(transpose(to_tile(L))));
    } else {
        f.W[n][l] = words(operand(to_tile(W)));
        f.G[n][l] = words(operand(to_tile(G)));
        f.Bet[n][l] = words(Bet);
        f.Ket[n][l] = words(operand(transpose(to_tile(Ke))));
        if (n == 0) f.Q[l] = words(operand(to_tile(Q))), f.L[l] = words(operand(to_tile(L)));
    }
    if (l < 4)
        f.F[n * 4 + l] = resets ? make_float4(0, 0, 0, 0) : make_float4(s.F[0], s.F[1], s.F[2], s.F[3]);
}

template <class T> __global__ void __launch_bounds__(32 * WARPS, 4) gradients(Inputs<T> in, const T* dy,
    const State* Ms, int64_t Ms_stride, const State* Ds, T* dr, T* dw, T* dk, T* da, T* db, Segment segment) {
    __shared__ Matrix A, B, K, R, Be, V, dY, U, Z;
    __shared__ SharedTile ak, rb, inverse_t, dab, dak, drb, drk;
    __shared__ __align__(16) Columns columns;
    const int n = threadIdx.x / 32, l = lane_id(), chunk = blockIdx.x;
    const Head head;
    const Place at = place(segment, head, chunk, n);
    const uint32_t resets = find_resets(in.reset, segment, head, chunk);
    const State& M = Ms[head.index() * Ms_stride + chunk];
    const State& D = Ds[head.index() * segment.count + chunk];
    put(V[n], to_bf16<T>(load_tile(in.v, at)));
    put(dY[n], to_bf16<T>(load_tile(dy, at)));
    const Scaled s = scale(in, at, segment, head, chunk, A, B, K);
    put(A[n], to_tile(s.A));
    put(B[n], to_tile(s.B));
    put(K[n], to_tile(s.K));
    put(R[n], to_tile(s.R));
    Sum ends;
    for (int i = 0; i < 8; i++) ends.x[i] = s.B.x[i] * s.F[channel(i)];
    cut_end(ends, resets);
    put(Be[n], to_tile(ends));
    uint4 m[4], g[4];  // on their way while the scores are made
    for (int i = 0; i < 4; i++) m[i] = M.tile[n][i][l], g[i] = D.tile[n][i][l];
    __syncthreads();

    if (n == 0) invert(inverse_t, score<true>(A, B, resets), columns);
    if (n == 1) put(ak, to_tile(score<true>(A, K, resets)));
    if (n == 2) put(rb, to_tile(score<false>(R, B, resets)));
    if (n == 3) put(drk, to_tile(score<false>(dY, V, resets)));
    Sum X = {}, dU = {};
    for (int i = 0; i < 4; i++) {
        mma(X, get(A[i]), operand(tile(m[i])));
        mma(dU, get(Be[i]), operand(tile(g[i])));
    }
    cut(X, resets);
    __syncthreads();

    mma(X, get(ak), get_b_transposed(V[n]));
    mma(dU, get_transposed(rb), get_b_transposed(dY[n]));
    Sum Us = {}, Zs = {};
    mma(Us, get_transposed(inverse_t), operand(transpose(to_tile(X))));
    mma(Zs, get(inverse_t), operand(transpose(to_tile(dU))));
    put(U[n], to_tile(Us));
    put(Z[n], to_tile(Zs));
    __syncthreads();

    if (n == 0) put(dab, to_tile(score<true>(Z, U, resets)));
    if (n == 1) put(dak, to_tile(score<true>(Z, V, resets)));
    if (n == 2) put(drb, to_tile(score<false>(dY, U, resets)));
    Sum dR = {}, dA = {}, dBe = {}, dKe = {};
    float MD[4] = {};  // <M, D> over values
#pragma unroll 1  // four at once would take more registers than four blocks a multiprocessor leave
    for (int i = 0; i < 4; i++) {
        const Tile Mi = tile(M.tile[i][n][l]), Di = tile(D.tile[i][n][l]);
        const Operand Mt = operand(transpose(Mi)), Dt = operand(transpose(Di));
        for (int e = 0; e < 8; e++) MD[channel(e)] += to_sum(Mi).x[e] * to_sum(Di).x[e];
        mma(dR, get(dY[i]), Mt);
        mma(dA, get(Z[i]), Mt);
        mma(dBe, get(U[i]), Dt);
        mma(dKe, get(V[i]), Dt);
    }
    cut(dR, resets);
    cut(dA, resets);
    __syncthreads();

    mma(dR, get(drb), get_b_transposed(B[n]));
    mma(dR, get(drk), get_b_transposed(K[n]));
    mma(dA, get(dab), get_b_transposed(B[n]));
    mma(dA, get(dak), get_b_transposed(K[n]));
    const Sum w = to_sum<T>(load_tile(in.w, at, -INFINITY)), As = to_sum(get(A[n])), Rs = to_sum(get(R[n]));
    // the three sums of d log delta: pairs that end at this token or after, that begin there, that begin
    // before
    Sum after, own, before;
    for (int i = 0; i < 8; i++) {
        own.x[i] = As.x[i] * dA.x[i];
        after.x[i] = Rs.x[i] * dR.x[i] + own.x[i];
        dR.x[i] *= exp2_ftz(s.P.x[i]);
        dA.x[i] *= exp2_ftz(s.P.x[i] - log_delta(w.x[i]));
    }
    store_tile(dr, at, to_tile<T>(dR));
    store_tile(da, at, to_tile<T>(dA));

    Sum dB = {}, dK = {};
    mma(dB, get_transposed(dab), get_b_transposed(A[n]));
    mma(dB, get_transposed(drb), get_b_transposed(R[n]));
    mma(dK, get_transposed(dak), get_b_transposed(A[n]));
    mma(dK, get_transposed(drk), get_b_transposed(R[n]));
    const Sum Bs = to_sum(get(B[n])), Ks = to_sum(get(K[n]));
    cut_end(dBe, resets);
    cut_end(dKe, resets);
    for (int i = 0; i < 8; i++) {
        float end = s.F[channel(i)], grow = exp2_ftz(-s.P.x[i]);
        after.x[i] -= Bs.x[i] * dB.x[i] + Ks.x[i] * dK.x[i];
        before.x[i] = (Bs.x[i] * dBe.x[i] + Ks.x[i] * dKe.x[i]) * end;
        own.x[i] += before.x[i];
        dB.x[i] = (dB.x[i] + dBe.x[i] * end) * grow;
        dK.x[i] = (dK.x[i] + dKe.x[i] * end) * grow;
    }
    store_tile(db, at, to_tile<T>(dB));
    store_tile(dk, at, to_tile<T>(dK));

    after = running_sum<true>(after);
    before = running_sum<false>(before);
    for (int c = 0; c < 4; c++) {
        for (int step = 4; step < 32; step *= 2) MD[c] += __shfl_xor_sync(~0u, MD[c], step);
        MD[c] = resets ? 0 : MD[c] * s.F[c];
    }
    Sum dW;
    for (int i = 0; i < 8; i++) {
        // the derivative of the sigmoid, without the cancellation in 1 - sigmoid
        float tail = exp_ftz(-fabsf(w.x[i]));
        dW.x[i] = (MD[channel(i)] + after.x[i] + before.x[i] - own.x[i]) * -LOWEST *
                  tail * reciprocal_ftz((1 + tail) * (1 + tail));
    }
    store_tile(dw, at, to_tile<T>(dW));
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
    const float* dsT, void* dr, void* dw, void* dk, void* dv, void* da, void* db, float* ds0,
    Factors* factors, void* stream) {
    auto* Ds = (State*)(factors + sizes.heads * sizes.segment);
    for (int64_t begin = sizes.last(); begin >= 0; begin -= sizes.segment) {
        Segment segment = sizes.at(begin);
        run_prepare<T, true>(sizes, segment, in, factors, stream);
        run_scan<T, true>(sizes, segment, factors, dy, dv, begin == sizes.last() ? dsT : ds0, ds0, Ds,
            segment.count, stream);
        auto kernel = gradients<T>;
        LAUNCH(kernel, sizes.grid(segment.count), 32 * WARPS, 0, stream, in, (const T*)dy, states + begin,
            sizes.chunks, Ds, (T*)dr, (T*)dw, (T*)dk, (T*)da, (T*)db, segment);
    }
}

// f(Inputs) for the element type
template <class F> void with_inputs(int dtype, const void* r, const void* w, const void* k, const void* v,
    const void* a, const void* b, const uint8_t* reset, const Vectors& vectors, float* bonus, F f) {
    auto call = [&](auto* type) {
        typedef decltype(type) P;
        f(Inputs<std::remove_const_t<std::remove_pointer_t<P>>>{
            (P)r, (P)w, (P)k, (P)v, (P)a, (P)b, reset, vectors, bonus});
    };
    dtype == kBFloat16 ? call((const __nv_bfloat16*)nullptr) : call((const __half*)nullptr);
}

int run_forward(const void* r, const void* w, const void* k, const void* v, const void* a, const void* b,
    const Vectors& vectors, const float* s0, const uint8_t* reset, void* y, float* sT, float* saved,
    float* bonus, float* scratch, int64_t B, int64_t T, int64_t H, int64_t head_size, int dtype,
    void* stream) {
    if (!valid(B, T, H, head_size, dtype, {r, w, k, v, a, b, s0, y, sT, saved, scratch}))
        return cudaErrorInvalidValue;
    with_inputs(dtype, r, w, k, v, a, b, reset, vectors, bonus,
        [&](auto in) { forward(Sizes(B, T, H), in, s0, y, sT, (State*)saved, (Factors*)scratch, stream); });
    return cudaGetLastError();
}

int run_backward(const void* r, const void* w, const void* k, const void* v, const void* a, const void* b,
    const Vectors& vectors, const uint8_t* reset, const float* saved, const void* dy, const float* dsT,
    void* dr, void* dw, void* dk, void* dv, void* da, void* db, float* ds0, float* scratch, int64_t B,
    int64_t T, int64_t H, int64_t head_size, int dtype, void* stream) {
    if (!valid(B, T, H, head_size, dtype,
            {r, w, k, v, a, b, saved, dy, dsT, dr, dw, dk, dv, da, db, ds0, scratch}))
        return cudaErrorInvalidValue;
    with_inputs(dtype, r, w, k, v, a, b, reset, vectors, nullptr, [&](auto in) {
        backward(Sizes(B, T, H), in, (const State*)saved, dy, dsT, dr, dw, dk, dv, da, db, ds0,
            (Factors*)scratch, stream);
    });
    return cudaGetLastError();
}

}  // namespace

// in floats: the states before all chunks, which only a backward needs (`saved` may be null); and the factors
// of a segment, while a forward runs
extern "C" int64_t wkv7_chunked_saved(int64_t B, int64_t T, int64_t H, int64_t) {
    Sizes sizes(B, T, H);
    return sizes.heads * sizes.chunks * sizeof(State) / 4;
}
extern "C" int64_t wkv7_chunked_forward_scratch(int64_t B, int64_t T, int64_t H, int64_t, int, void*) {
    Sizes sizes(B, T, H);
    return sizes.heads * sizes.segment * sizeof(Factors) / 4;
}
extern "C" int64_t wkv7_chunked_scratch(int64_t B, int64_t T, int64_t H, int64_t, int, void*) {
    Sizes sizes(B, T, H);
    return sizes.heads * sizes.segment * (sizeof(State) + sizeof(Factors)) / 4;
}

extern "C" int wkv7_chunked_forward(const void* r, const void* w, const void* k, const void* v, const void* a,
    const void* b, const float* s0, const uint8_t* reset, void* y, float* sT, float* saved, float* scratch,
    int64_t B, int64_t T, int64_t H, int64_t head_size, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    return run_forward(r, w, k, v, a, b, Vectors(nullptr, 0, 0), s0, reset, y, sT, saved, nullptr, scratch, B,
        T, H, head_size, dtype, stream);
}

extern "C" int wkv7_chunked_backward(const void* r, const void* w, const void* k, const void* v,
    const void* a, const void* b, const float* s0, const uint8_t* reset, const float* saved, const void* dy,
    const float* dsT, void* dr, void* dw, void* dk, void* dv, void* da, void* db, float* ds0, float* scratch,
    int64_t B, int64_t T, int64_t H, int64_t head_size, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    return run_backward(r, w, k, v, a, b, Vectors(nullptr, 0, 0), reset, saved, dy, dsT, dr, dw, dk, dv, da,
        db, ds0, scratch, B, T, H, head_size, dtype, stream);
}

// The same of the raw k and a; vectors: k_k, k_a, r_k. dk, da and db are the gradients of key, alpha and beta.
extern "C" int mix7_chunked_forward(const void* r, const void* w, const void* k, const void* v, const void* a,
    const void* const* vectors, const float* s0, const uint8_t* reset, void* y, float* sT, float* saved,
    float* bonus, float* scratch, int64_t vector_dtypes, int64_t B, int64_t T, int64_t H, int64_t head_size,
    int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    return run_forward(r, w, k, v, a, nullptr, Vectors(vectors, vector_dtypes, 3), s0, reset, y, sT, saved,
        bonus, scratch, B, T, H, head_size, dtype, stream);
}

extern "C" int mix7_chunked_backward(const void* r, const void* w, const void* k, const void* v,
    const void* a, const void* const* vectors, const float* s0, const uint8_t* reset, const float* saved,
    const void* dy, const float* dsT, void* dr, void* dw, void* dk, void* dv, void* da, void* db, float* ds0,
    float* scratch, int64_t vector_dtypes, int64_t B, int64_t T, int64_t H, int64_t head_size, int dtype,
    int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    return run_backward(r, w, k, v, a, nullptr, Vectors(vectors, vector_dtypes, 3), reset, saved, dy, dsT, dr,
        dw, dk, dv, da, db, ds0, scratch, B, T, H, head_size, dtype, stream);
}
