// WKV-6 on a CPU: the recurrence, vectorised over the state, forward and backward. Every state stays in the
// L1 cache in fp32.
//
//   y_t = r_t S_{t-1} + (r_t . (u * k_t)) v_t       S_t = diag(d_t) S_{t-1} + k_t^T v_t       log d = -exp(w)
//
// S is [key i, value j]; its value columns are independent of each other. Forward: lanes are values; 3
// multiply-adds for each element.
//
// Backward: lanes are keys and S is held transposed. dS_t is the gradient of S_t, which only later tokens
// read. Primes: without u.
//   1. from the last token to the first, 4 multiply-adds for each element:
//      dS_t = diag(d_{t+1}) dS_{t+1} + r_{t+1}^T dy_{t+1},  dk'_t = dS_t v_t,  dv'_t = k_t dS_t
//   2. from the first to the last, S again, 3 multiply-adds:  dr'_t = S_{t-1} dy_t
//   3. d(log d): multiplying row i of S_t by a number and dividing by it what reads S_t leaves every y as
//      it is. Hence
//      dlog_t = dlog_{t+1} + r_{t+1} dr'_{t+1} - k_t dk'_t, from dlog_{T+1} = sum_j S_T dS_T.
//      Nothing is divided and no state is kept. The sum is a long one, and starts again from 0 where d_t is
//      as good as 0: there dlog_t is 0, and dw = -exp(w) dlog would blow up what rounding left of it.
//   The bonus u adds  g u k to dr,  g u r to dk,  (r . (u * k)) dy to dv,  g r k to du,  with g = v . dy.
// A reset before token t is S_{t-1} = 0.
//
// The C interface is that of wkv6.cu; `context` is the number of threads.
#include "cpu.h"

namespace {

constexpr float AS_GOOD_AS_ZERO = 7.5e-9f;  // 2^-27: less than rounding leaves of a sum

struct Inputs : Call {
    const void *r, *k, *v, *w;
    const float* u;
};

struct Outputs {
    void *dr, *dk, *dv, *dw;
    float *du, *ds0;
};

// d_t, and where wanted log d_t, which is also d(log d)/dw. Returns NaN if some w is.
template <int W> float decays(const Inputs& in, Rows w, float* decay, float* slope) {
    Vec<W> bad = {};
    for (long t = 0; t < in.T; t++) {
        prefetch(t + 4 * AHEAD, in.T, in.N, w);
        for (long n = 0; n < in.N; n += W) {
            auto log = -exponential<W>(load<W>(w[t] + n));
            store<W>(decay + t * in.N + n, exponential<W>(log));
            if (slope) store<W>(slope + t * in.N + n, log);
            bad += log * 0.f;
        }
    }
    return poison<W>(bad);
}

// r . (u * k)
template <int W> float bonus(const float* r, const float* u, const float* k, long N) {
    Vec<W> total = {};
    for (long n = 0; n < N; n += W)
        total = multiply_add(load<W>(r + n) * load<W>(u + n), load<W>(k + n), total);
    return sum<W>(total);
}

// R vectors of value columns through all tokens; S is [key][R * W]. Returns NaN if some y is not finite.
template <int W, int R> float forward_columns(
    const Inputs& in, long head, Rows r, Rows d, Rows k, Rows v, const float* u, float* S, Rows y) {
    typedef Vec<W> V;
    V bad = {};
    for (long t = 0; t < in.T; t++) {
        prefetch(t + AHEAD, in.T, in.N, r, k);
        prefetch(t + AHEAD, in.T, R * W, v, y);
        const bool cut = in.starts(head, t + 1);
        const float *rt = r[t], *dt = cut ? ZEROS : d[t], *kt = cut ? ZEROS : k[t];
        const float own = bonus<W>(rt, u, k[t], in.N);
        V vt[R], yt[R];
        for (int l = 0; l < R; l++) {
            vt[l] = load<W>(v[t] + l * W);
            yt[l] = vt[l] * own;
        }
        for (long i = 0; i < in.N; i++) {
            const V ri = fill<W>(rt[i]), di = fill<W>(dt[i]), ki = fill<W>(kt[i]);
            for (int l = 0; l < R; l++) {
                float* p = S + (i * R + l) * W;
                V s = load<W>(p);
                yt[l] = multiply_add(s, ri, yt[l]);
                store<W>(p, multiply_add(s, di, vt[l] * ki));
            }
        }
        for (int l = 0; l < R; l++) {
            store<W>(y[t] + l * W, yt[l]);
            bad += yt[l] * 0.f;
        }
    }
    for (long i = 0; i < in.N * R; i++) bad += load<W>(S + i * W) * 0.f;  // the last decay is in no y
    return poison<W>(bad);
}

template <int W> float forward_part(const Inputs& in, long head, long first, long last, void* y, float* sT) {
    const long T = in.T, N = in.N;
    Buffer buffer(6 * T * N + N * N);
    float* free = buffer.data;
    auto next = [&] { return std::exchange(free, free + T * N); };
    auto input = [&](const void* x) { return in.input<W>(x, head, next()); };
    const Rows r = input(in.r), w = input(in.w), k = input(in.k), v = input(in.v), d{next(), N},
               out = in.output(y, head, next());
    float bad = decays<W>(in, w, d.data, nullptr), *S = free;
    in_vectors<W>(last - first, [&](auto R, long j) {
        j += first;
        auto at = [&](Rows x) { return Rows{x.data + j, x.stride}; };
        const long state = head * N * N + j, bytes = sizeof(float) * R * W;
        const bool zero = !in.s0 || in.starts(head, 0);
        for (long i = 0; i < N; i++)
            zero ? memset(S + i * R * W, 0, bytes) : memcpy(S + i * R * W, in.s0 + state + i * N, bytes);
        bad += forward_columns<W, R()>(in, head, r, d, k, at(v), in.u + head % in.H * N, S, at(out));
        for (long i = 0; i < N; i++) memcpy(sT + state + i * N, S + i * R * W, bytes);
    });
    in.flush<W>(y, head, out, first, last);
    return bad;
}

// One head of the backward; dk, dr and end are sums over the value columns of one part only.
struct Head {
    Rows r, k, v, dy, d, slope, dv, dk, dr;
    float *end, *S;
};

long head_floats(long T, long N) { return 10 * T * N + N + N * N; }

// Step 1 for one token, value columns [first, last) and C vectors of keys from `key` on; decay, r and dy are
// those of the token after it.
template <int W, int C> void reverse_token(const Head& g, long t, long first, long last, long key, long N,
    const float* decay, const float* r, const float* dy, bool add) {
    typedef Vec<W> V;
    V dc[C], rc[C], kc[C], dk[C] = {};
    for (int l = 0; l < C; l++) {
        dc[l] = load<W>(decay + key + l * W);
        rc[l] = load<W>(r + key + l * W);
        kc[l] = load<W>(g.k[t] + key + l * W);
    }
    const float* v = g.v[t];
    float* S = g.S;
    for (long group = first; group < last; group += W) {
        V sums[W];
        for (int n = 0; n < W; n++) {
            const long j = group + n;
            const V dyj = fill<W>(dy[j]), vj = fill<W>(v[j]);
            float* row = S + (j - first) * N + key;
            V sum = {};
            for (int l = 0; l < C; l++) {
                V s = multiply_add(load<W>(row + l * W), dc[l], rc[l] * dyj);
                store<W>(row + l * W, s);
                dk[l] = multiply_add(s, vj, dk[l]);
                sum = multiply_add(s, kc[l], sum);
            }
            sums[n] = sum;
        }
        add_or_store<W>(g.dv[t] + group, row_sums<W>(sums), key > 0);
    }
    for (int l = 0; l < C; l++) add_or_store<W>(g.dk[t] + key + l * W, dk[l], add);
}

// Step 2, likewise, with the decay and k of this token
template <int W, int C> void forward_token(const Head& g, long t, long first, long last, long key, long N,
    const float* decay, const float* k, bool add) {
    typedef Vec<W> V;
    V dc[C], kc[C], dr[C] = {};
    for (int l = 0; l < C; l++) {
        dc[l] = load<W>(decay + key + l * W);
        kc[l] = load<W>(k + key + l * W);
    }
    const float *dy = g.dy[t], *v = g.v[t];
    float* S = g.S;
    for (long j = first; j < last; j++) {
        const V dyj = fill<W>(dy[j]), vj = fill<W>(v[j]);
        float* row = S + (j - first) * N + key;
        for (int l = 0; l < C; l++) {
            V s = load<W>(row + l * W);
            dr[l] = multiply_add(s, dyj, dr[l]);
            store<W>(row + l * W, multiply_add(s, dc[l], kc[l] * vj));
        }
    }
    for (int l = 0; l < C; l++) add_or_store<W>(g.dr[t] + key + l * W, dr[l], add);
}

// Steps 1 and 2 for value columns [first, last); `add`: onto the sums of this part's earlier columns
template <int W> void backward_columns(const Inputs& in, const Head& g, long head, long first, long last,
    const float* dsT, float* ds0, bool add) {
    const long T = in.T, N = in.N, columns = last - first, state = head * N * N + first;
    auto start_from = [&](const float* states) {
        if (states) transpose<W>(g.S, N, states + state, N, N, columns);
        else memset(g.S, 0, sizeof(float) * columns * N);
    };
    float ones[256];
    std::fill(ones, ones + N, 1.f);

    start_from(dsT);
    for (long t = T - 1; t >= 0; t--) {
        prefetch(t - AHEAD, T, N, g.r, g.k, g.v, g.dy, g.dv, g.dk);
        const bool end = t + 1 == T, cut = in.starts(head, t + 1);
        const float *decay = end   ? ones
                             : cut ? ZEROS
                                   : g.d[t + 1],
                    *r = end || cut ? ZEROS : g.r[t + 1], *dy = end ? ZEROS : g.dy[t + 1];
        in_vectors<W>(N,
            [&](auto C, long key) { reverse_token<W, C()>(g, t, first, last, key, N, decay, r, dy, add); });
        const float own = bonus<W>(g.r[t], in.u + head % in.H * N, g.k[t], N);
        for (long j = first; j < last; j++) g.dv[t][j] += own * g.dy[t][j];
    }
    const bool cut = in.starts(head, 0);
    const float *decay = cut ? ZEROS : g.d[0], *r = cut ? ZEROS : g.r[0];
    for (long j = 0; j < columns; j++)
        for (long i = 0; i < N; i += W) {
            float* p = g.S + j * N + i;
            store<W>(p, load<W>(p) * load<W>(decay + i) + load<W>(r + i) * g.dy[0][first + j]);
        }
    transpose<W>(ds0 + state, N, g.S, N, columns, N);

    start_from(cut ? nullptr : in.s0);
    for (long t = 0; t < T; t++) {
        prefetch(t + AHEAD, T, N, g.k, g.v, g.dy, g.dr);
        const bool cut = in.starts(head, t + 1);
        const float *decay = cut ? ZEROS : g.d[t], *k = cut ? ZEROS : g.k[t];
        in_vectors<W>(
            N, [&](auto C, long key) { forward_token<W, C()>(g, t, first, last, key, N, decay, k, add); });
    }
    for (long i = 0; i < N; i++) {
        float sum = 0;
        for (long j = 0; dsT && j < columns; j++) sum += g.S[j * N + i] * dsT[state + i * N + j];
        g.end[i] = add ? g.end[i] + sum : sum;
    }
}

template <int W> Head backward_part(const Inputs& in, long head, long first, long last, const void* dy,
    const float* dsT, const Outputs& out, float* buffer) {
    const long T = in.T, N = in.N;
    const bool whole = last - first == N;
    auto next = [&] { return std::exchange(buffer, buffer + T * N); };
    auto input = [&](const void* x) { return in.input<W>(x, head, next()); };
    auto sums = [&](void* x) { return whole ? in.output(x, head, next()) : Rows{next(), N}; };
    Head g;
    g.r = input(in.r), g.k = input(in.k), g.v = input(in.v), g.dy = input(dy);
    const Rows w = input(in.w);
    g.d = {next(), N}, g.slope = {next(), N}, g.dv = in.output(out.dv, head, next());
    g.dk = sums(out.dk), g.dr = sums(out.dr);
    g.end = buffer, g.S = buffer + N;
    decays<W>(in, w, g.d.data, g.slope.data);
    const long columns = cached_rows<W>(N);
    for (long j = first; j < last; j += columns)
        backward_columns<W>(in, g, head, j, std::min(j + columns, last), dsT, out.ds0, j > first);
    in.flush<W>(out.dv, head, g.dv, first, last);
    return g;
}

// The parts of a head added up, step 3, the bonus, and everything rounded and written.
template <int W>
void finish(const Inputs& in, const std::vector<Head>& parts, long head, const Outputs& out) {
    const long N = in.N;
    const Head& g = parts[0];
    const float* u = in.u + head % in.H * N;
    LongSum<W> log_decay[256 / W], du[256 / W];
    for (auto& part : parts)
        for (long n = 0; n < N; n += W) log_decay[n / W].add(load<W>(part.end + n));
    for (long t = in.T - 1; t >= 0; t--) {
        prefetch(t - 2 * AHEAD, in.T, N, g.r, g.k, g.v, g.dy, g.dr, g.dk);
        const bool empty = in.empty(head, t), cut = in.starts(head, t + 1);
        Vec<W> products = {};
        for (long n = 0; n < N; n += W) products += load<W>(g.v[t] + n) * load<W>(g.dy[t] + n);
        const float own = sum<W>(products);
        for (long n = 0; n < N; n += W) {
            const Vec<W> r = load<W>(g.r[t] + n), k = load<W>(g.k[t] + n), d = load<W>(g.d[t] + n),
                         bonus = own * load<W>(u + n);
            const Vec<W> dr = total<W>(parts, &Head::dr, t, n), dk = total<W>(parts, &Head::dk, t, n);
            LongSum<W>& log = log_decay[n / W];
            log.add(-k * dk);
            const auto kept = empty || cut ? typename Lanes<W>::I{} : d >= AS_GOOD_AS_ZERO;
            log = {choose<W>(kept, log.high, Vec<W>{}), choose<W>(kept, log.low, Vec<W>{})};
            in.store<W>(out.dw, head, t, n, choose<W>(kept, load<W>(g.slope[t] + n) * log.value(), Vec<W>{}));
            if (empty) log = {};
            else log.add(r * dr);
            in.store<W>(out.dr, head, t, n, dr + bonus * k);
            in.store<W>(out.dk, head, t, n, dk + bonus * r);
            du[n / W].add(own * r * k);
        }
    }
    for (long n = 0; n < N; n += W) store<W>(out.du + head * N + n, du[n / W].value());
}

template <int W> int forward(const Inputs& in, void* y, float* sT) {
    const long parts = in.parts(), columns = in.N / parts;
    std::atomic<bool> finite{true};
    parallel(in.B * in.H * parts, in.threads, [&](long item, int) {
        const long first = item % parts * columns;
        if (forward_part<W>(in, item / parts, first, first + columns, y, sT) != 0) finite = false;
    });
    return finite ? 0 : 1;
}

template <int W>
void backward(const Inputs& in, const void* dy, const float* dsT, const Outputs& out, float* scratch) {
    in_parts<Head>(
        in, scratch, head_floats(in.T, in.N),
        [&](long head, long first, long last, float* buffer) {
            return backward_part<W>(in, head, first, last, dy, dsT, out, buffer);
        },
        [&](const std::vector<Head>& parts, long head) { finish<W>(in, parts, head, out); });
}

}  // namespace

extern "C" {

int64_t wkv6_scratch(int64_t B, int64_t T, int64_t H, int64_t N, void* context) {
    return Call{nullptr, nullptr, B, T, H, N, kFloat32, (int)(intptr_t)context}.slots() * head_floats(T, N);
}

int wkv6_forward(const void* r, const void* k, const void* v, const void* w, const float* u, const float* s0,
    const uint8_t* reset, void* y, float* sT, int64_t B, int64_t T, int64_t H, int64_t N, int dtype,
    void* context) {
    const Inputs in{{s0, reset, B, T, H, N, (Dtype)dtype, (int)(intptr_t)context}, r, k, v, w, u};
    return N % WIDTH ? forward<NARROW>(in, y, sT) : forward<WIDTH>(in, y, sT);
}

int wkv6_backward(const void* r, const void* k, const void* v, const void* w, const float* u, const float* s0,
    const uint8_t* reset, const void* dy, const float* dsT, void* dr, void* dk, void* dv, void* dw, float* du,
    float* ds0, float* scratch, int64_t B, int64_t T, int64_t H, int64_t N, int dtype, void* context) {
    const Inputs in{{s0, reset, B, T, H, N, (Dtype)dtype, (int)(intptr_t)context}, r, k, v, w, u};
    const Outputs out{dr, dk, dv, dw, du, ds0};
    N % WIDTH ? backward<NARROW>(in, dy, dsT, out, scratch) : backward<WIDTH>(in, dy, dsT, out, scratch);
    return 0;
}
}
