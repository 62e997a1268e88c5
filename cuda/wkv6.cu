// RWKV-6's WKV, forward and backward, token by token in fp32: exact for every decay, also an exact 0, and
// every T.
//
//     y_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)      S_t = diag(delta_t) S_{t-1} + k_t v_t^T
//     delta = exp(-exp(w))
//
// r, k, v, w, y (B, T, H, N) in fp32, bf16 or fp16, u fp32 (H, N), states fp32 (B, H, N, N) [key, value], N a
// multiple of 8 up to 256. reset (B, T) uint8 or null: not 0 where a document starts. Nothing is saved; the
// backward goes over time twice:
//     down, with dS:  dk' = dS v, dv = dS^T k + dy (r . u k);  dS = diag(delta) dS + r dy^T
//     up, with S:     dr' = S_{t-1} dy
// With c = v . dy: dk = dk' + c u r, dr = dr' + c u k, du = sum over t of c r k. And d log delta comes from
// these: y does not change when the rows of S_t are scaled by some g_t and r', k, delta by what undoes it, so
//     D_t = D_{t+1} + r_{t+1} dr'_{t+1} - k_t dk'_t
// Where delta < 2e-9, D is taken as 0 and starts anew, because dw = -exp(w) D enlarges its rounding error. In
// the test's decays near 0, T = 4096, this makes the error of dw 9e-6; with a new start at exact zeros only
// it is 8e-5, and with one at delta < 6e-4 already, 4e-3. recurrence.cuh says how this is laid out on the
// machine; its rows are the values, its columns the keys, as for RWKV-7.
//
//     nvcc -O3 -std=c++17 -arch=sm_90 -Xcompiler -fPIC -shared wkv6.cu -o wkv6.so
#include "recurrence.cuh"

namespace {

struct Rwkv6 {
    static constexpr bool KEY_FIRST = true;
    __device__ static float delta(float w) { return expf(-expf(w)); }
    __device__ static float slope(float w) { return -expf(w); }  // d log delta / dw
    __device__ static bool forgets(float w) { return w > 3; }    // delta < 2e-9
};

// this thread's columns of u
template <class Layout>
__device__ void read_bonus(float (&x)[Layout::COLUMNS], const float* u, const Place<Layout>& place) {
#pragma unroll
    for (int e = 0; e < Layout::COLUMNS; e++) {
        int n = place.column_of(place.column, e);
        x[e] = n < place.task.N ? u[place.h * place.task.N + n] : 0;
    }
}
// this thread's part of r . u k
template <int COLUMNS>
__device__ float bonus(const float (&r)[COLUMNS], const float (&u)[COLUMNS], const float (&k)[COLUMNS]) {
    float uk[COLUMNS];
#pragma unroll
    for (int e = 0; e < COLUMNS; e++) uk[e] = u[e] * k[e];
    return dot<COLUMNS>(r, uk);
}

template <class Layout> __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    forward(const void* r, const void* k, const void* v, const void* w, const float* u, const float* s0,
        const uint8_t* reset, void* y, float* sT, Task task) {
    constexpr int ROWS = Layout::ROWS_EACH, COLUMNS = Layout::COLUMNS;
    __shared__ Inputs<Layout, 3, 1> in;
    __shared__ RowResults<Layout, 1> results;
    const Place<Layout> place(task);
    Prefetch<Layout, 3, 1> next = {{w, r, k}, {v}, {task.dtype}, reset};
    float S[ROWS][COLUMNS], my_u[COLUMNS];
    place.template read_state<true>(S, s0);
    read_bonus(my_u, u, place);

    next.fetch(place, task.first);
    for (int group = task.first; group < task.last; group += Layout::TOKENS) {
        next.template put<Rwkv6>(in, place, group);
        __syncthreads();
        next.fetch(place, group + Layout::TOKENS);
#pragma unroll Layout::UNROLL
        for (int t = 0; t < Layout::TOKENS; t++) {
            if (in.starts[t]) place.clear(S);
            float delta[COLUMNS], r[COLUMNS], k[COLUMNS], v[ROWS], y[ROWS];
            in.read_columns(delta, 0, t, place);
            in.read_columns(r, 1, t, place);
            in.read_columns(k, 2, t, place);
            in.read_rows(v, 0, t, place);
            const float now = bonus(r, my_u, k);
#pragma unroll
            for (int m = 0; m < ROWS; m++) {
                y[m] = row_sum(dot<COLUMNS>(S[m], r) + now * v[m]);
#pragma unroll
                for (int e = 0; e < COLUMNS; e++) S[m][e] = S[m][e] * delta[e] + k[e] * v[m];
            }
            results.put(y, 0, t, place);
        }
        __syncthreads();
        results.flush(y, 0, task.dtype, place, group);
    }
    place.template write_state<true>(S, sT);
}

// dS: (B, H, N, N), from the gradient of the state after the slice to that of the state before; `dS_in` is
// null for zeros
template <class Layout> __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) backward_down(const void* r,
    const void* k, const void* v, const void* w, const float* u, const uint8_t* reset, const void* dy,
    const float* dS_in, float* dS_out, void* dv, float* partial, Task task) {
    constexpr int ROWS = Layout::ROWS_EACH, COLUMNS = Layout::COLUMNS;
    __shared__ Inputs<Layout, 3, 2> in;
    __shared__ RowResults<Layout, 1> results;
    __shared__ ColumnSums<Layout, 1> sums;
    const Place<Layout> place(task);
    Prefetch<Layout, 3, 2> next = {{w, r, k}, {v, dy}, {task.dtype, task.dtype}, reset};
    float dS[ROWS][COLUMNS], my_u[COLUMNS];
    place.template read_state<true>(dS, dS_in);
    read_bonus(my_u, u, place);

    int group = task.first + (task.last - task.first - 1) / Layout::TOKENS * Layout::TOKENS;
    next.fetch(place, group);
    for (; group >= task.first; group -= Layout::TOKENS) {
        next.template put<Rwkv6>(in, place, group);
        __syncthreads();
        if (group > task.first) next.fetch(place, group - Layout::TOKENS);
#pragma unroll Layout::UNROLL
        for (int t = Layout::TOKENS - 1; t >= 0; t--) {
            float delta[COLUMNS], r[COLUMNS], k[COLUMNS], v[ROWS], dy[ROWS], dv[ROWS], dk[COLUMNS] = {};
            in.read_columns(k, 2, t, place);
            in.read_columns(delta, 0, t, place);
            in.read_columns(r, 1, t, place);
            in.read_rows(v, 0, t, place);
            in.read_rows(dy, 1, t, place);
            const float now = bonus(r, my_u, k);
#pragma unroll
            for (int m = 0; m < ROWS; m++) {
                dv[m] = row_sum(dot<COLUMNS>(dS[m], k) + now * dy[m]);
#pragma unroll
                for (int e = 0; e < COLUMNS; e++) {
                    dk[e] += dS[m][e] * v[m];
                    dS[m][e] = dS[m][e] * delta[e] + r[e] * dy[m];
                }
            }
            if (in.starts[t]) place.clear(dS);
            results.put(dv, 0, t, place);
            sums.put(dk, 0, t, place);
        }
        __syncthreads();
        results.flush(dv, 0, task.dtype, place, group);
        sums.flush(partial, place, group);
    }
    place.template write_state<true>(dS, dS_out);
}

template <class Layout> __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    backward_up(const void* k, const void* v, const void* w, const uint8_t* reset, const void* dy,
        const float* S_in, float* S_out, float* partial, Task task) {
    constexpr int ROWS = Layout::ROWS_EACH, COLUMNS = Layout::COLUMNS;
    __shared__ Inputs<Layout, 2, 2> in;
    __shared__ ColumnSums<Layout, 1> sums;
    const Place<Layout> place(task);
    Prefetch<Layout, 2, 2> next = {{w, k}, {v, dy}, {task.dtype, task.dtype}, reset};
    float S[ROWS][COLUMNS];
    place.template read_state<true>(S, S_in);

    next.fetch(place, task.first);
    for (int group = task.first; group < task.last; group += Layout::TOKENS) {
        next.template put<Rwkv6>(in, place, group);
        __syncthreads();
        next.fetch(place, group + Layout::TOKENS);
#pragma unroll Layout::UNROLL
        for (int t = 0; t < Layout::TOKENS; t++) {
            if (in.starts[t]) place.clear(S);
            float delta[COLUMNS], k[COLUMNS], v[ROWS], dy[ROWS], dr[COLUMNS] = {};
            in.read_columns(delta, 0, t, place);
            in.read_columns(k, 1, t, place);
            in.read_rows(v, 0, t, place);
            in.read_rows(dy, 1, t, place);
#pragma unroll
            for (int m = 0; m < ROWS; m++)
#pragma unroll
                for (int e = 0; e < COLUMNS; e++) {
                    dr[e] += S[m][e] * dy[m];
                    S[m][e] = S[m][e] * delta[e] + k[e] * v[m];
                }
            sums.put(dr, 0, t, place);
        }
        __syncthreads();
        sums.flush(partial, place, group);
    }
    place.template write_state<true>(S, S_out);
}

// dk or dr from partial sums and the current token's own part, and the term of D; a warp has one token of one
// head.
enum Direction { DOWN, UP };
constexpr int HEADS_A_BLOCK = 8;
template <Direction DIRECTION> __global__ void finish(const void* r, const void* k, const void* v,
    const float* u, const void* dy, const float* partial, int parts, void* dr, void* dk, float* v_dy,
    float* here, float* before, Task task) {
    const int span = task.last - task.first, b = blockIdx.x / span, t = task.first + blockIdx.x % span,
              N = task.N;
    const int h = blockIdx.y * HEADS_A_BLOCK + threadIdx.y;
    if (h >= task.H) return;
    const int64_t token = ((int64_t)b * task.T + t) * task.H + h, i = task.at(b, t, h, 0),
                  from = task.slice_at(b, t, h, 0);
    float c = 0;
    if (DIRECTION == DOWN) {
        for (int n = threadIdx.x; n < N; n += 32)
            c += load(v, i + n, task.dtype) * load(dy, i + n, task.dtype);
        for (int lane = 1; lane < 32; lane *= 2) c += __shfl_xor_sync(0xffffffff, c, lane);
        if (threadIdx.x == 0) v_dy[token] = c;
    } else {
        c = v_dy[token];
    }
    for (int n = threadIdx.x; n < N; n += 32) {
        float r_n = load(r, i + n, task.dtype), k_n = load(k, i + n, task.dtype), cu = c * u[h * N + n];
        float past = sum_parts(partial, 0, parts, task.slice_size(), from + n);
        if (DIRECTION == DOWN) {
            store(dk, i + n, past + cu * r_n, task.dtype);
            here[i + n] = -k_n * past;
        } else {
            store(dr, i + n, past + cu * k_n, task.dtype);
            before[i + n] = r_n * past;
        }
    }
}

// du, (B, H, N): 32 columns of a head, and 32 warps that share its tokens
__global__ void __launch_bounds__(1024)
    bonus_gradient(const void* r, const void* k, const float* v_dy, float* du, Task task) {
    __shared__ float sums[32][32];
    const int blocks = (task.N + 31) / 32, head = blockIdx.x / blocks, b = head / task.H, h = head % task.H;
    const int n = blockIdx.x % blocks * 32 + threadIdx.x;
    float sum = 0;
    if (n < task.N)
        for (int t = threadIdx.y; t < task.T; t += 32) {
            int64_t i = task.at(b, t, h, n);
            sum += v_dy[((int64_t)b * task.T + t) * task.H + h] *
                   (load(r, i, task.dtype) * load(k, i, task.dtype));
        }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || n >= task.N) return;
    for (int warp = 1; warp < 32; warp++) sum += sums[warp][threadIdx.x];
    du[(int64_t)head * task.N + n] = sum;
}

}  // namespace

// the two terms of D; S between slices; v . dy; partial sums of one gradient of a slice
extern "C" int64_t wkv6_scratch(int64_t B, int64_t T, int64_t H, int64_t N, int, void*) {
    Task task(B, T, H, N, kFloat32);
    return with_layout(task, [&](auto layout) {
        Task slice = task.slice(0, T < SLICE ? T : SLICE);
        return 2 * task.size() + task.state_size() + B * T * H +
               blocks_a_head<decltype(layout)>(N) * slice.slice_size();
    });
}

extern "C" int wkv6_forward(const void* r, const void* k, const void* v, const void* w, const float* u,
    const float* s0, const uint8_t* reset, void* y, float* sT, int64_t B, int64_t T, int64_t H, int64_t N,
    int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    Task task(B, T, H, N, dtype);
    if (!task.valid()) return cudaErrorInvalidValue;
    with_layout(task, [&](auto layout) {
        using Layout = decltype(layout);
        unsigned blocks = task.heads() * blocks_a_head<Layout>(N);
        LAUNCH(forward<Layout>, blocks, THREADS, 0, stream, r, k, v, w, u, s0, reset, y, sT, task);
        return 0;
    });
    return cudaGetLastError();
}

extern "C" int wkv6_backward(const void* r, const void* k, const void* v, const void* w, const float* u,
    const float* s0, const uint8_t* reset, const void* dy, const float* dsT, void* dr, void* dk, void* dv,
    void* dw, float* du, float* ds0, float* scratch, int64_t B, int64_t T, int64_t H, int64_t N, int dtype,
    int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    Task task(B, T, H, N, dtype);
    if (!task.valid()) return cudaErrorInvalidValue;
    float *here = scratch, *before = here + task.size(), *state = before + task.size(),
          *v_dy = state + task.state_size();
    float* partial = v_dy + B * T * H;
    with_layout(task, [&](auto layout) {
        using Layout = decltype(layout);
        const int parts = blocks_a_head<Layout>(N);
        const unsigned blocks = task.heads() * parts;
        const dim3 warps(32, HEADS_A_BLOCK);
        for (int first = (T - 1) / SLICE * SLICE; first >= 0; first -= SLICE) {
            Task slice = task.slice(first, min(first + SLICE, task.T));
            const dim3 grid(B * (slice.last - first), (H + HEADS_A_BLOCK - 1) / HEADS_A_BLOCK);
            const float* dS = slice.last == T ? dsT : ds0;
            LAUNCH(backward_down<Layout>, blocks, THREADS, 0, stream, r, k, v, w, u, reset, dy, dS, ds0, dv,
                partial, slice);
            LAUNCH(finish<DOWN>, grid, warps, 0, stream, r, k, v, u, dy, partial, parts, dr, dk, v_dy, here,
                before, slice);
        }
        for (int first = 0; first < T; first += SLICE) {
            Task slice = task.slice(first, min(first + SLICE, task.T));
            const dim3 grid(B * (slice.last - first), (H + HEADS_A_BLOCK - 1) / HEADS_A_BLOCK);
            const float* S = first == 0 ? s0 : state;
            LAUNCH(backward_up<Layout>, blocks, THREADS, 0, stream, k, v, w, reset, dy, S, state, partial,
                slice);
            LAUNCH(finish<UP>, grid, warps, 0, stream, r, k, v, u, dy, partial, parts, dr, dk, v_dy, here,
                before, slice);
        }
        return 0;
    });
    LAUNCH(bonus_gradient, task.heads() * ((N + 31) / 32), dim3(32, 32), 0, stream, r, k, v_dy, du, task);
    launch_scan_decay<Rwkv6>(w, here, before, s0, state, dsT, reset, dw, task, stream);
    return cudaGetLastError();
}
