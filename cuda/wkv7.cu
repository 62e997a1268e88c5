// RWKV-7's WKV, forward and backward, token by token in fp32: exact for every decay and every T, the backward
// without saved states.
//
//     S_t = S_{t-1} diag(delta_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T      y_t = S_t r_t
//     log delta = -exp(-1/2) sigmoid(w)
//
// r, w, k, v, a, b, y (B, T, H, N) in fp32, bf16 or fp16, states fp32 (B, H, N, N) [value, key], N a multiple
// of 8 up to 256. reset (B, T) uint8 or null: not 0 where a document starts. The forward saves q_t = S_{t-1}
// a_t in fp32, unless `saved` is null. The backward goes over time twice:
//     down, with dS:  dS += dy r^T;  dk = dS^T v, db = dS^T q, dv = dS k, e = dS b;
//                     dS = dS diag(delta) + e a^T
//     up, with S again, which needs no sum now that q is known:  da_t = S_{t-1}^T e_t, dr_t = S_t^T dy_t
// d log delta comes from these: y does not change when the columns of S_t are scaled by some g_t and r, k, b,
// a, delta by what undoes it, so
//     D_t = D_{t+1} + a_{t+1} da_{t+1} + r_t dr_t - k_t dk_t - b_t db_t
// No decay is divided by, so none is too small. recurrence.cuh says how this is laid out on the machine.
//
//     nvcc -O3 -std=c++17 -arch=sm_90 -Xcompiler -fPIC -shared wkv7.cu -o wkv7.so
#include "recurrence.cuh"

namespace {

constexpr float LOG_FLOOR = 0.606530660f;  // exp(-1/2)

struct Rwkv7 {
    static constexpr bool KEY_FIRST = false;
    __device__ static float delta(float w) { return expf(-LOG_FLOOR / (1 + expf(-w))); }
    // d log delta / dw; 1 - sigmoid(w) is sigmoid(-w), which does not cancel
    __device__ static float slope(float w) { return -LOG_FLOOR / (1 + expf(-w)) / (1 + expf(w)); }
    __device__ static bool forgets(float) { return false; }
};

template <class Layout> __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) forward(
    const void* r, const void* w, const void* k, const void* v, const void* a, const void* b,
    const float* s0, const uint8_t* reset, void* y, float* sT, float* saved, Task task) {
    constexpr int ROWS = Layout::ROWS_EACH, COLUMNS = Layout::COLUMNS;
    __shared__ Inputs<Layout, 5, 1> in;
    __shared__ RowResults<Layout, 2> results;
    const Place<Layout> place(task);
    Prefetch<Layout, 5, 1> next = {{w, r, k, a, b}, {v}, {task.dtype}, reset};
    float S[ROWS][COLUMNS];
    place.template read_state<false>(S, s0);

    next.fetch(place, task.first);
    for (int group = task.first; group < task.last; group += Layout::TOKENS) {
        next.template put<Rwkv7>(in, place, group);
        __syncthreads();
        next.fetch(place, group + Layout::TOKENS);
#pragma unroll Layout::UNROLL
        for (int t = 0; t < Layout::TOKENS; t++) {
            if (in.starts[t]) place.clear(S);
            float delta[COLUMNS], r[COLUMNS], k[COLUMNS], a[COLUMNS], b[COLUMNS], v[ROWS], q[ROWS], y[ROWS];
            in.read_columns(a, 3, t, place);
            in.read_columns(delta, 0, t, place);
            in.read_columns(b, 4, t, place);
            in.read_columns(k, 2, t, place);
            in.read_columns(r, 1, t, place);
            in.read_rows(v, 0, t, place);
#pragma unroll
            for (int m = 0; m < ROWS; m++) q[m] = row_sum(dot<COLUMNS>(S[m], a));
#pragma unroll
            for (int m = 0; m < ROWS; m++) {
#pragma unroll
                for (int e = 0; e < COLUMNS; e++) S[m][e] = S[m][e] * delta[e] + (q[m] * b[e] + v[m] * k[e]);
                y[m] = row_sum(dot<COLUMNS>(S[m], r));
            }
            results.put(y, 0, t, place);
            results.put(q, 1, t, place);
        }
        __syncthreads();
        results.flush(y, 0, task.dtype, place, group);
        if (saved) results.flush(saved, 1, kFloat32, place, group);
    }
    place.template write_state<false>(S, sT);
}

// dS: (B, H, N, N), from the gradient of the state after the slice to that of the state before; `dS_in` is
// null for zeros
template <class Layout> __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    backward_down(const void* r, const void* w, const void* k, const void* v, const void* a, const void* b,
        const uint8_t* reset, const float* saved, const void* dy, const float* dS_in, float* dS_out, void* dv,
        float* e, float* partial, Task task) {
    constexpr int ROWS = Layout::ROWS_EACH, COLUMNS = Layout::COLUMNS;
    __shared__ Inputs<Layout, 5, 3> in;
    __shared__ RowResults<Layout, 2> results;
    __shared__ ColumnSums<Layout, 2> sums;
    const Place<Layout> place(task);
    Prefetch<Layout, 5, 3> next = {
        {w, r, k, a, b}, {v, dy, saved}, {task.dtype, task.dtype, kFloat32}, reset};
    float dS[ROWS][COLUMNS];
    place.template read_state<false>(dS, dS_in);

    int group = task.first + (task.last - task.first - 1) / Layout::TOKENS * Layout::TOKENS;
    next.fetch(place, group);
    for (; group >= task.first; group -= Layout::TOKENS) {
        next.template put<Rwkv7>(in, place, group);
        __syncthreads();
        if (group > task.first) next.fetch(place, group - Layout::TOKENS);
#pragma unroll Layout::UNROLL
        for (int t = Layout::TOKENS - 1; t >= 0; t--) {
            float delta[COLUMNS], r[COLUMNS], k[COLUMNS], a[COLUMNS], b[COLUMNS], v[ROWS], dy[ROWS], q[ROWS],
                dv[ROWS], e[ROWS];
            in.read_columns(r, 1, t, place);
            in.read_columns(b, 4, t, place);
            in.read_columns(k, 2, t, place);
            in.read_columns(delta, 0, t, place);
            in.read_columns(a, 3, t, place);
            in.read_rows(v, 0, t, place);
            in.read_rows(dy, 1, t, place);
            in.read_rows(q, 2, t, place);
            float dk[COLUMNS] = {}, db[COLUMNS] = {};
#pragma unroll
            for (int m = 0; m < ROWS; m++) {
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) dS[m][j] += dy[m] * r[j];
                e[m] = row_sum(dot<COLUMNS>(dS[m], b));
                dv[m] = row_sum(dot<COLUMNS>(dS[m], k));
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) {
                    dk[j] += dS[m][j] * v[m];
                    db[j] += dS[m][j] * q[m];
                    dS[m][j] = dS[m][j] * delta[j] + e[m] * a[j];
                }
            }
            if (in.starts[t]) place.clear(dS);
            results.put(dv, 0, t, place);
            results.put(e, 1, t, place);
            sums.put(dk, 0, t, place);
            sums.put(db, 1, t, place);
        }
        __syncthreads();
        results.flush(dv, 0, task.dtype, place, group);
        results.flush(e, 1, kFloat32, place, group);
        sums.flush(partial, place, group);
    }
    place.template write_state<false>(dS, dS_out);
}

template <class Layout> __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) backward_up(const void* w,
    const void* k, const void* v, const void* b, const uint8_t* reset, const float* saved, const void* dy,
    const float* e, const float* S_in, float* S_out, float* partial, Task task) {
    constexpr int ROWS = Layout::ROWS_EACH, COLUMNS = Layout::COLUMNS;
    __shared__ Inputs<Layout, 3, 4> in;
    __shared__ ColumnSums<Layout, 2> sums;
    const Place<Layout> place(task);
    Prefetch<Layout, 3, 4> next = {
        {w, k, b}, {v, saved, dy, e}, {task.dtype, kFloat32, task.dtype, kFloat32}, reset};
    float S[ROWS][COLUMNS];
    place.template read_state<false>(S, S_in);

    next.fetch(place, task.first);
    for (int group = task.first; group < task.last; group += Layout::TOKENS) {
        next.template put<Rwkv7>(in, place, group);
        __syncthreads();
        next.fetch(place, group + Layout::TOKENS);
#pragma unroll Layout::UNROLL
        for (int t = 0; t < Layout::TOKENS; t++) {
            if (in.starts[t]) place.clear(S);
            float delta[COLUMNS], k[COLUMNS], b[COLUMNS], v[ROWS], q[ROWS], dy[ROWS], e[ROWS];
            in.read_columns(delta, 0, t, place);
            in.read_columns(k, 1, t, place);
            in.read_columns(b, 2, t, place);
            in.read_rows(v, 0, t, place);
            in.read_rows(q, 1, t, place);
            in.read_rows(dy, 2, t, place);
            in.read_rows(e, 3, t, place);
            float dr[COLUMNS] = {}, da[COLUMNS] = {};
#pragma unroll
            for (int m = 0; m < ROWS; m++)
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) {
                    da[j] += S[m][j] * e[m];
                    S[m][j] = S[m][j] * delta[j] + (q[m] * b[j] + v[m] * k[j]);
                    dr[j] += S[m][j] * dy[m];
                }
            sums.put(dr, 0, t, place);
            sums.put(da, 1, t, place);
        }
        __syncthreads();
        sums.flush(partial, place, group);
    }
    place.template write_state<false>(S, S_out);
}

// dk and db, or dr and da, from their partial sums, and what they contribute to D. A block has the tokens of
// one row of the grid.
enum Direction { DOWN, UP };
constexpr int FINISH_THREADS = 256;
template <Direction DIRECTION> __global__ void finish(const void* x0, const void* x1, const float* partial,
    int parts, void* dx0, void* dx1, float* here, float* before, Task task) {
    int span = task.last - task.first, b = blockIdx.x / span, t = task.first + blockIdx.x % span;
    int n = blockIdx.y * FINISH_THREADS + threadIdx.x;
    if (n >= task.H * task.N) return;
    int64_t i = task.at(b, t, 0, n), from = task.slice_at(b, t, 0, n);
    float d0 = sum_parts(partial, 0, parts, task.slice_size(), from),
          d1 = sum_parts(partial, 1, parts, task.slice_size(), from);
    store(dx0, i, d0, task.dtype);
    store(dx1, i, d1, task.dtype);
    float term0 = load(x0, i, task.dtype) * d0, term1 = load(x1, i, task.dtype) * d1;
    if (DIRECTION == DOWN) {
        here[i] = -(term0 + term1);
    } else {
        here[i] += term0;
        before[i] = term1;
    }
}
template <Direction DIRECTION> void launch_finish(const void* x0, const void* x1, const float* partial,
    int parts, void* dx0, void* dx1, float* here, float* before, const Task& task, void* stream) {
    dim3 grid(task.B * (task.last - task.first), (task.H * task.N + FINISH_THREADS - 1) / FINISH_THREADS);
    LAUNCH(finish<DIRECTION>, grid, FINISH_THREADS, 0, stream, x0, x1, partial, parts, dx0, dx1, here, before,
        task);
}

}  // namespace

extern "C" int64_t wkv7_saved(int64_t B, int64_t T, int64_t H, int64_t N) { return B * T * H * N; }

// e, later a da; the terms of D at its own token; S between slices; partial sums of two gradients of a slice
extern "C" int64_t wkv7_scratch(int64_t B, int64_t T, int64_t H, int64_t N, int, void*) {
    Task task(B, T, H, N, kFloat32);
    return with_layout(task, [&](auto layout) {
        Task slice = task.slice(0, T < SLICE ? T : SLICE);
        return 2 * task.size() + task.state_size() +
               2 * blocks_a_head<decltype(layout)>(N) * slice.slice_size();
    });
}

extern "C" int wkv7_forward(const void* r, const void* w, const void* k, const void* v, const void* a,
    const void* b, const float* s0, const uint8_t* reset, void* y, float* sT, float* saved, int64_t B,
    int64_t T, int64_t H, int64_t N, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    Task task(B, T, H, N, dtype);
    if (!task.valid()) return cudaErrorInvalidValue;
    with_layout(task, [&](auto layout) {
        using Layout = decltype(layout);
        unsigned blocks = task.heads() * blocks_a_head<Layout>(N);
        LAUNCH(forward<Layout>, blocks, THREADS, 0, stream, r, w, k, v, a, b, s0, reset, y, sT, saved, task);
        return 0;
    });
    return cudaGetLastError();
}

extern "C" int wkv7_backward(const void* r, const void* w, const void* k, const void* v, const void* a,
    const void* b, const float* s0, const uint8_t* reset, const float* saved, const void* dy,
    const float* dsT, void* dr, void* dw, void* dk, void* dv, void* da, void* db, float* ds0, float* scratch,
    int64_t B, int64_t T, int64_t H, int64_t N, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    Task task(B, T, H, N, dtype);
    if (!task.valid()) return cudaErrorInvalidValue;
    float *e = scratch, *before = e, *here = e + task.size(), *state = here + task.size(),
          *partial = state + task.state_size();
    with_layout(task, [&](auto layout) {
        using Layout = decltype(layout);
        const int parts = blocks_a_head<Layout>(N);
        const unsigned blocks = task.heads() * parts;
        for (int first = (T - 1) / SLICE * SLICE; first >= 0; first -= SLICE) {
            Task slice = task.slice(first, min(first + SLICE, task.T));
            const float* dS = slice.last == T ? dsT : ds0;
            LAUNCH(backward_down<Layout>, blocks, THREADS, 0, stream, r, w, k, v, a, b, reset, saved, dy, dS,
                ds0, dv, e, partial, slice);
            launch_finish<DOWN>(k, b, partial, parts, dk, db, here, before, slice, stream);
        }
        for (int first = 0; first < T; first += SLICE) {
            Task slice = task.slice(first, min(first + SLICE, task.T));
            const float* S = first == 0 ? s0 : state;
            LAUNCH(backward_up<Layout>, blocks, THREADS, 0, stream, w, k, v, b, reset, saved, dy, e, S, state,
                partial, slice);
            launch_finish<UP>(r, a, partial, parts, dr, da, here, before, slice, stream);
        }
        return 0;
    });
    launch_scan_decay<Rwkv7>(w, here, before, s0, state, dsT, reset, dw, task, stream);
    return cudaGetLastError();
}
