// What wkv6.cu and wkv7.cu share: how the state lies in threads, how inputs reach them, sums across threads,
// the gauge scan.
//
// A state has N value rows and N key columns, padded to WIDTH (32, 64, 128 or 256). Rows never meet, in
// neither sweep, so they are spread over threads and blocks: 8 lanes hold a row, a warp 4 x ROWS_EACH rows, a
// block of 4 warps 16 x ROWS_EACH rows of one (batch, head). Lane l of a row has columns 4 l .. 4 l + 3 of
// every 32, all in registers. Few blocks: one row a lane, because a token then is the shortest chain of
// instructions. Many, and N = 64, the size of released models: four, so that one load from shared memory
// serves four.
//
// Tokens come in groups of 512 / WIDTH. The vectors of the next group are on their way from memory to
// registers while the current one is read from shared memory, and there are two barriers a group:
//     put, barrier, fetch the next group, compute, barrier, flush results
// Missing tokens and columns are zeros with decay 1: they change no state, and every loop has a constant
// length.
//
// Sums over rows (dk, db, da, dr) leave a block as one partial sum each, in fp32 scratch; blocks are added
// later, always in the same order. The backward goes over time in slices of SLICE tokens, so that this
// scratch does not grow with T; the state waits in memory meanwhile.
#pragma once
#include "launch.h"

constexpr int LANES = 8, WARPS = 4, THREADS = 32 * WARPS, GROUP = 512, PASSES = GROUP / THREADS, SLICE = 512;
// With two blocks on a multiprocessor a lane can have all its 255 registers. Without a number ptxas sets
// itself a goal, and spills for it.
constexpr int MIN_BLOCKS = 2;
// About three blocks for each multiprocessor of a large card; by an estimate, from here on the issue of
// instructions is the limit and not their latency. Neither this number nor SLICE has been tuned on a GPU.
constexpr int64_t MANY_BLOCKS = 384;

template <int WIDTH_, int ROWS_EACH_> struct Layout {
    static constexpr int WIDTH = WIDTH_, ROWS_EACH = ROWS_EACH_;
    static constexpr int TOKENS = GROUP / WIDTH, COLUMNS = WIDTH / LANES, ROWS = ROWS_EACH * THREADS / LANES;
    // tokens: the loads of the next one should start before the sums of this one end
    static constexpr int UNROLL = COLUMNS <= 8 ? 2 : 1;
    static constexpr int ROW_ITEMS = TOKENS * ROWS, ROW_PASSES = (ROW_ITEMS + THREADS - 1) / THREADS;
};

// one call of the C interface; a launch covers the tokens [first, last)
struct Task {
    int B, T, H, N, dtype, first, last;

    Task(int64_t B, int64_t T, int64_t H, int64_t N, int dtype)
        : B(B), T(T), H(H), N(N), dtype(dtype), first(0), last(T) {}
    bool valid() const {
        return B > 0 && T > 0 && H > 0 && N >= 8 && N <= 256 && N % 8 == 0 && dtype >= kFloat32 &&
               dtype <= kFloat16;
    }
    Task slice(int from, int to) const {
        Task part = *this;
        part.first = from;
        part.last = to;
        return part;
    }
    __host__ __device__ int64_t heads() const { return (int64_t)B * H; }
    __host__ __device__ int64_t size() const { return heads() * T * N; }
    __host__ __device__ int64_t state_size() const { return heads() * N * N; }
    __host__ __device__ int64_t slice_size() const { return heads() * (last - first) * N; }
    // index of channel n of token t in an activation, and in a buffer of this launch's tokens only
    __host__ __device__ int64_t at(int b, int t, int h, int n) const {
        return (((int64_t)b * T + t) * H + h) * N + n;
    }
    __host__ __device__ int64_t slice_at(int b, int t, int h, int n) const {
        return (((int64_t)b * (last - first) + (t - first)) * H + h) * N + n;
    }
};

template <class Layout> int blocks_a_head(int N) { return (N + Layout::ROWS - 1) / Layout::ROWS; }

// f(Layout) with the layout for this shape
template <class F> auto with_layout(const Task& task, F f) {
    if (task.N <= 32) return f(Layout<32, 1>());
    if (task.N <= 64)
        return task.heads() * blocks_a_head<Layout<64, 1>>(task.N) > MANY_BLOCKS ? f(Layout<64, 4>())
                                                                                 : f(Layout<64, 1>());
    if (task.N <= 128) return f(Layout<128, 1>());
    return f(Layout<256, 1>());
}

// ---- elements whose dtype is known at run time; the bits of a load can wait in a register, undecoded, until
// the value has arrived

__device__ __forceinline__ uint32_t load_bits(const void* x, int64_t i, int dtype) {
    return dtype == kFloat32 ? __float_as_uint(((const float*)x)[i]) : ((const uint16_t*)x)[i];
}
__device__ __forceinline__ float decode(uint32_t bits, int dtype) {
    if (dtype == kFloat32) return __uint_as_float(bits);
    return dtype == kBFloat16 ? __uint_as_float(bits << 16)
                              : __half2float(__ushort_as_half((unsigned short)bits));
}
__device__ __forceinline__ float load(const void* x, int64_t i, int dtype) {
    return decode(load_bits(x, i, dtype), dtype);
}
__device__ __forceinline__ void store(void* x, int64_t i, float value, int dtype) {
    if (dtype == kFloat32) store((float*)x + i, value);
    else if (dtype == kBFloat16) store((__nv_bfloat16*)x + i, value);
    else store((__half*)x + i, value);
}

// ---- where a thread stands

template <class Layout> struct Place {
    Task task;
    int b, h, part, parts;  // which head, and which of the blocks that share it
    // lanes 8 quarter .. 8 quarter + 7 hold ROWS_EACH rows; the first of this lane's columns
    int quarter, column;
    int row;                // the first of its rows, counted from the block's first row

    __device__ explicit Place(const Task& task)
        : task(task), parts((task.N + Layout::ROWS - 1) / Layout::ROWS) {
        part = blockIdx.x % parts;
        int head = blockIdx.x / parts;
        b = head / task.H;
        h = head % task.H;
        quarter = threadIdx.x % 32 / LANES;
        column = threadIdx.x % LANES * 4;
        row = (threadIdx.x / 32 * 4 + quarter) * Layout::ROWS_EACH;
    }
    __device__ static int column_of(int column, int e) { return e / 4 * 32 + column + e % 4; }
    __device__ int value_row(int row) const { return part * Layout::ROWS + row; }

    // visits this thread's elements of a (B, H, N, N) state: f(m, e, index)
    template <bool KEY_FIRST, class F> __device__ void each_element(F f) const {
#pragma unroll
        for (int m = 0; m < Layout::ROWS_EACH; m++)
#pragma unroll
            for (int e = 0; e < Layout::COLUMNS; e++) {
                int i = value_row(row + m), j = column_of(column, e);
                if (i < task.N && j < task.N)
                    f(m, e,
                        (((int64_t)b * task.H + h) * task.N + (KEY_FIRST ? j : i)) * task.N +
                            (KEY_FIRST ? i : j));
            }
    }
    template <bool KEY_FIRST>
    __device__ void read_state(float (&S)[Layout::ROWS_EACH][Layout::COLUMNS], const float* states) const {
        clear(S);
        if (states) each_element<KEY_FIRST>([&](int m, int e, int64_t i) { S[m][e] = states[i]; });
    }
    template <bool KEY_FIRST>
    __device__ void write_state(const float (&S)[Layout::ROWS_EACH][Layout::COLUMNS], float* states) const {
        each_element<KEY_FIRST>([&](int m, int e, int64_t i) { states[i] = S[m][e]; });
    }
    __device__ static void clear(float (&S)[Layout::ROWS_EACH][Layout::COLUMNS]) {
#pragma unroll
        for (int m = 0; m < Layout::ROWS_EACH; m++)
#pragma unroll
            for (int e = 0; e < Layout::COLUMNS; e++) S[m][e] = 0;
    }
};

// one float, or four that are aligned to 16 bytes
template <int COUNT> __device__ __forceinline__ void copy(float* to, const float* from) {
    static_assert(COUNT == 1 || COUNT == 4);
    if constexpr (COUNT == 1) *to = *from;
    else *(float4*)to = *(const float4*)from;
}

// ---- inputs: K vectors over columns, of which the first is the raw decay, and R vectors over rows, for a
// group of tokens

template <class Layout, int K, int R> struct Inputs {  // in shared memory
    alignas(16) float columns[K][GROUP];
    alignas(16) float rows[R][Layout::ROW_ITEMS];
    bool starts[Layout::TOKENS];  // a document begins at this token

    __device__ void read_columns(
        float (&x)[Layout::COLUMNS], int k, int token, const Place<Layout>& place) const {
#pragma unroll
        for (int e = 0; e < Layout::COLUMNS; e += 4)
            copy<4>(x + e, columns[k] + token * Layout::WIDTH + e * 8 + place.column);
    }
    __device__ void read_rows(
        float (&x)[Layout::ROWS_EACH], int k, int token, const Place<Layout>& place) const {
        copy<Layout::ROWS_EACH>(x, rows[k] + token * Layout::ROWS + place.row);
    }
};

template <class Layout, int K, int R> struct Prefetch {  // in registers
    const void *columns[K], *rows[R];
    int row_dtype[R];
    const uint8_t* reset;
    uint32_t column_bits[K][PASSES], row_bits[R][Layout::ROW_PASSES];
    bool start;

    __device__ static bool inside(const Place<Layout>& place, int token, int n) {
        return token < place.task.last && n < place.task.N;
    }

    __device__ void fetch(const Place<Layout>& place, int group) {
        const Task& task = place.task;
#pragma unroll
        for (int p = 0; p < PASSES; p++) {
            int x = threadIdx.x + p * THREADS, t = group + x / Layout::WIDTH, n = x % Layout::WIDTH;
            bool valid = inside(place, t, n);
            int64_t i = task.at(place.b, t, place.h, n);
#pragma unroll
            for (int k = 0; k < K; k++) column_bits[k][p] = valid ? load_bits(columns[k], i, task.dtype) : 0;
        }
#pragma unroll
        for (int p = 0; p < Layout::ROW_PASSES; p++) {
            int x = threadIdx.x + p * THREADS, t = group + x / Layout::ROWS,
                n = place.value_row(x % Layout::ROWS);
            bool valid = x < Layout::ROW_ITEMS && inside(place, t, n);
            int64_t i = task.at(place.b, t, place.h, n);
#pragma unroll
            for (int k = 0; k < R; k++) row_bits[k][p] = valid ? load_bits(rows[k], i, row_dtype[k]) : 0;
        }
        int t = group + threadIdx.x;
        start =
            reset && threadIdx.x < Layout::TOKENS && t < task.last && reset[(int64_t)place.b * task.T + t];
    }
    // what fetch(place, group) has brought, the raw decay turned into delta
    template <class Rwkv>
    __device__ void put(Inputs<Layout, K, R>& to, const Place<Layout>& place, int group) const {
#pragma unroll
        for (int p = 0; p < PASSES; p++) {
            int x = threadIdx.x + p * THREADS;
            bool valid = inside(place, group + x / Layout::WIDTH, x % Layout::WIDTH);
            to.columns[0][x] = valid ? Rwkv::delta(decode(column_bits[0][p], place.task.dtype)) : 1;
#pragma unroll
            for (int k = 1; k < K; k++) to.columns[k][x] = decode(column_bits[k][p], place.task.dtype);
        }
#pragma unroll
        for (int p = 0; p < Layout::ROW_PASSES; p++) {
            int x = threadIdx.x + p * THREADS;
            if (x < Layout::ROW_ITEMS)
#pragma unroll
                for (int k = 0; k < R; k++) to.rows[k][x] = decode(row_bits[k][p], row_dtype[k]);
        }
        if (threadIdx.x < Layout::TOKENS) to.starts[threadIdx.x] = start;
    }
};

// ---- sums and results

template <int COUNT> __device__ __forceinline__ float dot(const float* x, const float* y) {
    // four short chains instead of a long one
    float sum[4] = {x[0] * y[0], x[1] * y[1], x[2] * y[2], x[3] * y[3]};
#pragma unroll
    for (int e = 4; e < COUNT; e++) sum[e % 4] += x[e] * y[e];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
// the sum over the lanes of a row, in each of them
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int lane = 1; lane < LANES; lane *= 2) x += __shfl_xor_sync(0xffffffff, x, lane);
    return x;
}
// Of two lanes, the lower one gets the sums of the first HALF values, the upper one those of the second.
template <int HALF> __device__ __forceinline__ void add_halves(float* x, int lane) {
    bool upper = threadIdx.x & lane;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        float give = upper ? x[i] : x[i + HALF], keep = upper ? x[i + HALF] : x[i];
        x[i] = keep + __shfl_xor_sync(0xffffffff, give, lane);
    }
}

template <class Layout, int COUNT> struct ColumnSums {  // in shared memory: sums over the rows of a warp
    alignas(16) float warps[COUNT][WARPS][GROUP];

    // x: sums over this thread's rows
    __device__ void put(const float (&x)[Layout::COLUMNS], int k, int token, const Place<Layout>& place) {
        constexpr int QUARTER = Layout::COLUMNS / 4;
        float of_quarter[Layout::COLUMNS];  // of every four neighbours each quarter stores one: 32 banks
#pragma unroll
        for (int e = 0; e < Layout::COLUMNS; e++) of_quarter[e % 4 * QUARTER + e / 4] = x[e];
        add_halves<2 * QUARTER>(of_quarter, 2 * LANES);
        add_halves<QUARTER>(of_quarter, LANES);
        float* to = warps[k][threadIdx.x / 32] + token * Layout::WIDTH + place.column + place.quarter;
#pragma unroll
        for (int i = 0; i < QUARTER; i++) to[32 * i] = of_quarter[i];
    }
    // adds the warps; partial is [COUNT][parts] of slices (see Task)
    __device__ void flush(float* partial, const Place<Layout>& place, int group) const {
#pragma unroll
        for (int p = 0; p < PASSES; p++) {
            int x = threadIdx.x + p * THREADS, t = group + x / Layout::WIDTH, n = x % Layout::WIDTH;
            if (t < place.task.last && n < place.task.N)
#pragma unroll
                for (int k = 0; k < COUNT; k++) {
                    float sum = 0;
#pragma unroll
                    for (int w = 0; w < WARPS; w++) sum += warps[k][w][x];
                    partial[(k * place.parts + place.part) * place.task.slice_size() +
                            place.task.slice_at(place.b, t, place.h, n)] = sum;
                }
        }
    }
};

// the sum over the blocks of a head, of what ColumnSums::flush wrote
__device__ __forceinline__ float sum_parts(
    const float* partial, int k, int parts, int64_t slice_size, int64_t i) {
    float sum = 0;
    for (int p = 0; p < parts; p++) sum += partial[(k * parts + p) * slice_size + i];
    return sum;
}

template <class Layout, int COUNT> struct RowResults {  // in shared memory
    alignas(16) float values[COUNT][Layout::ROW_ITEMS];

    // x: the same in all lanes of the rows
    __device__ void put(const float (&x)[Layout::ROWS_EACH], int k, int token, const Place<Layout>& place) {
        if (place.column == 0) copy<Layout::ROWS_EACH>(values[k] + token * Layout::ROWS + place.row, x);
    }
    __device__ void flush(void* to, int k, int dtype, const Place<Layout>& place, int group) const {
        for (int x = threadIdx.x; x < Layout::ROW_ITEMS; x += THREADS) {
            int t = group + x / Layout::ROWS, n = place.value_row(x % Layout::ROWS);
            if (t < place.task.last && n < place.task.N)
                store(to, place.task.at(place.b, t, place.h, n), values[k][x], dtype);
        }
    }
};

// ---- decay gradient

// fp32 with a second word for the rounding errors. On 4096 random tokens dw is as good as with double, to
// three digits; with plain fp32 its error is up to 1.3 times as large. Double would do too, but runs at 1/64
// of the speed of fp32 on consumer cards.
struct alignas(8) Sum {
    float high, low;
    __device__ void add(float x) {
        float sum = high + x, added = sum - high;
        low += (high - (sum - added)) + (x - added);
        high = sum;
    }
    __device__ float value() const { return high + low; }
};

// D_t, the gradient of log delta_t, from the end of time: D_t = D_{t+1} + before_{t+1} + here_t, starting
// with sum over rows of S_T dS_T, and anew with 0 where nothing goes through the decay, because a document
// starts or Rwkv::forgets: there the sum has only rounding errors left. 32 warps, each with its part of time
// and 32 columns, go over it twice: for the sum of the part, then, knowing the later ones, for D.
constexpr int SCAN_PARTS = 32;
template <class Rwkv> __global__ void __launch_bounds__(32 * SCAN_PARTS)
    scan_decay(const void* w, const float* here, const float* before, const float* s0, const float* sT,
        const float* dsT, const uint8_t* reset, void* dw, Task task) {
    __shared__ float start[SCAN_PARTS][33];  // written in columns where keys come first
    __shared__ Sum sums[SCAN_PARTS][32];
    __shared__ bool cuts[SCAN_PARTS][32];
    const int lane = threadIdx.x, part = threadIdx.y, N = task.N;
    const int blocks = (N + 31) / 32, head = blockIdx.x / blocks, b = head / task.H, h = head % task.H;
    const int first = blockIdx.x % blocks * 32, n = first + lane;
    const int length = (task.T + SCAN_PARTS - 1) / SCAN_PARTS;

    auto walk = [&](Sum& D, bool& cut, bool write) {
        for (int t = min(task.T, (part + 1) * length) - 1; t >= part * length; t--) {
            int64_t i = task.at(b, t, h, n);
            float raw = load(w, i, task.dtype);
            bool closed = Rwkv::forgets(raw) || (reset && reset[(int64_t)b * task.T + t]) || (t == 0 && !s0);
            D.add(here[i]);
            if (closed) D = {0, 0};
            if (write) store(dw, i, closed ? 0 : D.value() * Rwkv::slope(raw), task.dtype);
            cut |= closed;
            D.add(before[i]);
        }
    };
    Sum D = {0, 0};
    bool cut = false;
    float product = 0;
    if (n < N) walk(D, cut, false);
    // lanes are neighbours in a state: keys, or where keys come first the values of one key
    const int key = Rwkv::KEY_FIRST ? part : lane, value = Rwkv::KEY_FIRST ? lane : part;
    if (dsT && first + key < N)
        for (int i = value; i < N; i += SCAN_PARTS) {
            int row = Rwkv::KEY_FIRST ? first + key : i, column = Rwkv::KEY_FIRST ? i : first + key;
            int64_t at = ((int64_t)head * N + row) * N + column;
            product += sT[at] * dsT[at];
        }
    start[value][key] = product;
    sums[part][lane] = D;
    cuts[part][lane] = cut;
    __syncthreads();
    if (n >= N) return;
    D = {0, 0};
    for (int p = 0; p < SCAN_PARTS; p++) D.add(start[p][lane]);
    for (int p = SCAN_PARTS - 1; p > part; p--) {
        const Sum later = sums[p][lane];
        if (cuts[p][lane]) D = {0, 0};
        D.add(later.high);
        D.add(later.low);
    }
    walk(D, cut, true);
}
template <class Rwkv> void launch_scan_decay(const void* w, const float* here, const float* before,
    const float* s0, const float* sT, const float* dsT, const uint8_t* reset, void* dw, const Task& task,
    void* stream) {
    unsigned blocks = task.heads() * ((task.N + 31) / 32);
    LAUNCH(scan_decay<Rwkv>, blocks, dim3(32, SCAN_PARTS), 0, stream, w, here, before, s0, sT, dsT, reset, dw,
        task);
}
