// WKV-7 on a CPU: the recurrence, vectorised over the state, forward and backward. Every state stays in the
// L1 cache in fp32.
//
//   S_t = S_{t-1} diag(d_t) + sa_t b_t^T + v_t k_t^T       sa_t = S_{t-1} a_t       y_t = S_t r_t
//   log d = -exp(-1/2) sigmoid(w)
//
// S is [value i, key j]; its rows are independent of each other. Forward: lanes are values, so that no sum
// goes across lanes, and one pass over S makes S_t, y_t and already sa_{t+1}: 5 multiply-adds for each
// element of S.
//
// Backward: lanes are keys. dS is the gradient of S_t from y_t and all later tokens.
//   1. from the last token to the first, 7 multiply-adds for each element:
//      dS = dS diag(d_{t+1}) + e_{t+1} a_{t+1}^T + dy_t r_t^T,  e_t = dS b_t (the gradient of sa_t),
//      dv_t = dS k_t,  dk_t = dS^T v_t,  db_t = dS^T sa_t
//   2. from the first to the last, S again, with sa from the forward, 5 multiply-adds:
//      da_t = S_{t-1}^T e_t,  dr_t = S_t^T dy_t
//   3. d(log d): multiplying column j of S_t by a number and dividing by it what reads S_t leaves every y
//      as it is. Hence
//      dlog_t = dlog_{t+1} + r_t dr_t - k_t dk_t - b_t db_t + a_{t+1} da_{t+1},
//      from dlog_{T+1} = sum_i S_T dS_T. Nothing is divided and no state is kept, whatever the decay; the
//      sum is a long one.
// A reset before token t is d_t = 0 and a_t = 0.
//
// The C interface is that of wkv7.cu; `context` is the number of threads.
#include "cpu.h"

namespace {

constexpr float RATE = 0.60653066f;  // exp(-1/2)

struct Inputs : Call {
    const void *r, *w, *k, *v, *a, *b;
};

struct Outputs {
    void *dr, *dw, *dk, *dv, *da, *db;
    float* ds0;
};

// d_t, and where wanted d(log d)/dw. Returns NaN if some w is.
template <int W> float decays(const Inputs& in, long head, Rows w, float* decay, float* slope) {
    const auto one = fill<W>(1.f);
    Vec<W> bad = {};
    for (long t = 0; t < in.T; t++) {
        prefetch(t + 4 * AHEAD, in.T, in.N, w);
        for (long n = 0; n < in.N; n += W) {
            auto e = exponential<W>(-load<W>(w[t] + n)), s = one / (one + e);
            bad += s * 0.f;
            store<W>(decay + t * in.N + n, in.starts(head, t) ? Vec<W>{} : exponential<W>(-RATE * s));
            if (slope) store<W>(slope + t * in.N + n, -RATE * s * (s * e));
        }
    }
    return poison<W>(bad);
}

// R vectors of value rows through all tokens; S is [key][R * W]. Returns NaN if some y is not finite.
template <int W, int R> float forward_rows(const Inputs& in, long head, Rows r, Rows d, Rows k, Rows v,
    Rows a, Rows b, float* S, Rows y, Rows saved) {
    typedef Vec<W> V;
    V sa[R] = {}, bad = {};
    if (!in.starts(head, 0))
        for (long j = 0; j < in.N; j++)
            for (int l = 0; l < R; l++)
                sa[l] = multiply_add(load<W>(S + (j * R + l) * W), fill<W>(a[0][j]), sa[l]);
    for (long t = 0; t < in.T; t++) {
        prefetch(t + AHEAD, in.T, in.N, r, k, a, b);
        prefetch(t + AHEAD, in.T, R * W, v, y, saved);
        const float *rt = r[t], *dt = d[t], *kt = k[t], *bt = b[t];
        const float* after = t + 1 < in.T && !in.starts(head, t + 1) ? a[t + 1] : ZEROS;
        V vt[R], yt[R] = {}, next[R] = {};
        for (int l = 0; l < R; l++) {
            vt[l] = load<W>(v[t] + l * W);
            store<W>(saved[t] + l * W, sa[l]);
        }
        for (long j = 0; j < in.N; j++) {
            const V dj = fill<W>(dt[j]), bj = fill<W>(bt[j]), kj = fill<W>(kt[j]), rj = fill<W>(rt[j]),
                    aj = fill<W>(after[j]);
            for (int l = 0; l < R; l++) {
                float* p = S + (j * R + l) * W;
                const V s = multiply_add(load<W>(p), dj, multiply_add(vt[l], kj, sa[l] * bj));
                store<W>(p, s);
                yt[l] = multiply_add(s, rj, yt[l]);
                next[l] = multiply_add(s, aj, next[l]);
            }
        }
        for (int l = 0; l < R; l++) {
            store<W>(y[t] + l * W, yt[l]);
            bad += yt[l] * 0.f;
            sa[l] = next[l];
        }
    }
    return poison<W>(bad);
}

template <int W>
float forward_part(const Inputs& in, long head, long first, long last, void* y, float* sT, float* saved) {
    const long T = in.T, N = in.N;
    Buffer buffer(8 * T * N + N * N);
    float* free = buffer.data;
    auto next = [&] { return std::exchange(free, free + T * N); };
    auto input = [&](const void* x) { return in.input<W>(x, head, next()); };
    const Rows r = input(in.r), w = input(in.w), k = input(in.k), v = input(in.v), a = input(in.a),
               b = input(in.b), d{next(), N};
    const Rows out = in.output(y, head, next()), sa{saved + in.offset(head), in.stride()};
    float bad = decays<W>(in, head, w, d.data, nullptr), *S = free;
    for (long t = 0; t < T; t++)
        // an a_t that no y reads
        for (long n = 0; in.starts(head, t) && n < N; n += W) bad += poison<W>(load<W>(a[t] + n));
    in_vectors<W>(last - first, [&](auto R, long i) {
        i += first;
        auto at = [&](Rows x) { return Rows{x.data + i, x.stride}; };
        const long state = head * N * N + i * N;
        if (in.s0) transpose<W>(S, R * W, in.s0 + state, N, R * W, N);
        else memset(S, 0, sizeof(float) * N * R * W);
        bad += forward_rows<W, R()>(in, head, r, d, k, at(v), a, b, S, at(out), at(sa));
        transpose<W>(sT + state, N, S, R * W, N, R * W);
    });
    in.flush<W>(y, head, out, first, last);
    return bad;
}

// One head of the backward; dk, db, da, dr and end are sums over the value rows of one part only.
struct Head {
    Rows r, k, v, a, b, dy, sa, d, slope, e, dv, dk, db, da, dr;
    float *end, *S;
};

long head_floats(long T, long N) { return 15 * T * N + N + N * N; }

// Step 1 for one token, rows [first, last) and C vectors of keys from `key` on; decay, a and e are those of
// the token after it.
template <int W, int C> void reverse_token(const Head& g, long t, long first, long last, long key, long N,
    const float* decay, const float* a, const float* e, bool add) {
    typedef Vec<W> V;
    V dc[C], ac[C], rc[C], kc[C], bc[C], dk[C] = {}, db[C] = {};
    for (int l = 0; l < C; l++) {
        dc[l] = load<W>(decay + key + l * W);
        ac[l] = load<W>(a + key + l * W);
        rc[l] = load<W>(g.r[t] + key + l * W);
        kc[l] = load<W>(g.k[t] + key + l * W);
        bc[l] = load<W>(g.b[t] + key + l * W);
    }
    const float *dy = g.dy[t], *v = g.v[t], *sa = g.sa[t];
    float* S = g.S;
    for (long group = first; group < last; group += W) {
        V sums_v[W], sums_e[W];
        for (int n = 0; n < W; n++) {
            const long i = group + n;
            float* row = S + (i - first) * N + key;
            const V ei = fill<W>(e[i]), dyi = fill<W>(dy[i]), vi = fill<W>(v[i]), sai = fill<W>(sa[i]);
            V sum_v = {}, sum_e = {};
            for (int l = 0; l < C; l++) {
                const V s = multiply_add(load<W>(row + l * W), dc[l], multiply_add(rc[l], dyi, ac[l] * ei));
                store<W>(row + l * W, s);
                dk[l] = multiply_add(s, vi, dk[l]);
                db[l] = multiply_add(s, sai, db[l]);
                sum_v = multiply_add(s, kc[l], sum_v);
                sum_e = multiply_add(s, bc[l], sum_e);
            }
            sums_v[n] = sum_v;
            sums_e[n] = sum_e;
        }
        add_or_store<W>(g.dv[t] + group, row_sums<W>(sums_v), key > 0);
        add_or_store<W>(g.e[t] + group, row_sums<W>(sums_e), key > 0);
    }
    for (int l = 0; l < C; l++) {
        add_or_store<W>(g.dk[t] + key + l * W, dk[l], add);
        add_or_store<W>(g.db[t] + key + l * W, db[l], add);
    }
}

// Step 2, likewise
template <int W, int C>
void forward_token(const Head& g, long t, long first, long last, long key, long N, bool add) {
    typedef Vec<W> V;
    V dc[C], kc[C], bc[C], da[C] = {}, dr[C] = {};
    for (int l = 0; l < C; l++) {
        dc[l] = load<W>(g.d[t] + key + l * W);
        kc[l] = load<W>(g.k[t] + key + l * W);
        bc[l] = load<W>(g.b[t] + key + l * W);
    }
    const float *dy = g.dy[t], *v = g.v[t], *sa = g.sa[t], *e = g.e[t];
    float* S = g.S;
    for (long i = first; i < last; i++) {
        const V ei = fill<W>(e[i]), dyi = fill<W>(dy[i]), vi = fill<W>(v[i]), sai = fill<W>(sa[i]);
        float* row = S + (i - first) * N + key;
        for (int l = 0; l < C; l++) {
            const V before = load<W>(row + l * W),
                    s = multiply_add(before, dc[l], multiply_add(kc[l], vi, bc[l] * sai));
            store<W>(row + l * W, s);
            da[l] = multiply_add(before, ei, da[l]);
            dr[l] = multiply_add(s, dyi, dr[l]);
        }
    }
    for (int l = 0; l < C; l++) {
        add_or_store<W>(g.da[t] + key + l * W, da[l], add);
        add_or_store<W>(g.dr[t] + key + l * W, dr[l], add);
    }
}

// Steps 1 and 2 for rows [first, last); `add`: onto the sums of this part's earlier rows
template <int W> void backward_rows(const Inputs& in, const Head& g, long head, long first, long last,
    const float* dsT, float* ds0, bool add) {
    const long T = in.T, N = in.N, state = head * N * N + first * N,
               bytes = sizeof(float) * (last - first) * N;
    auto start_from = [&](const float* states) {
        states ? memcpy(g.S, states + state, bytes) : memset(g.S, 0, bytes);
    };
    float ones[256];
    std::fill(ones, ones + N, 1.f);
    auto a = [&](long t) { return t == T || in.starts(head, t) ? ZEROS : g.a[t]; };

    start_from(dsT);
    for (long t = T - 1; t >= 0; t--) {
        prefetch(t - AHEAD, T, N, g.r, g.k, g.a, g.b, g.v, g.dy, g.sa, g.dv, g.dk, g.db);
        const bool end = t + 1 == T;
        const float *decay = end ? ones : g.d[t + 1], *e = end ? ZEROS : g.e[t + 1];
        in_vectors<W>(N, [&](auto C, long key) {
            reverse_token<W, C()>(g, t, first, last, key, N, decay, a(t + 1), e, add);
        });
    }
    for (long i = first; i < last; i++)
        for (long j = 0; j < N; j += W)
            store<W>(ds0 + head * N * N + i * N + j,
                load<W>(g.S + (i - first) * N + j) * load<W>(g.d[0] + j) + load<W>(a(0) + j) * g.e[0][i]);

    start_from(in.s0);
    for (long t = 0; t < T; t++) {
        prefetch(t + AHEAD, T, N, g.k, g.b, g.v, g.dy, g.sa, g.da, g.dr);
        in_vectors<W>(N, [&](auto C, long key) { forward_token<W, C()>(g, t, first, last, key, N, add); });
    }
    for (long j = 0; j < N; j += W) {
        Vec<W> sum = {};
        for (long i = 0; dsT && i < last - first; i++)
            sum = multiply_add(load<W>(g.S + i * N + j), load<W>(dsT + state + i * N + j), sum);
        add_or_store<W>(g.end + j, sum, add);
    }
}

template <int W> Head backward_part(const Inputs& in, long head, long first, long last, const float* saved,
    const void* dy, const float* dsT, const Outputs& out, float* buffer) {
    const long T = in.T, N = in.N;
    const bool whole = last - first == N;
    auto next = [&] { return std::exchange(buffer, buffer + T * N); };
    auto input = [&](const void* x) { return in.input<W>(x, head, next()); };
    auto sums = [&](void* x) { return whole ? in.output(x, head, next()) : Rows{next(), N}; };
    Head g;
    g.r = input(in.r), g.k = input(in.k), g.v = input(in.v), g.a = input(in.a), g.b = input(in.b),
    g.dy = input(dy);
    const Rows w = input(in.w);
    g.sa = {const_cast<float*>(saved) + in.offset(head), in.stride()};
    g.d = {next(), N}, g.slope = {next(), N}, g.e = {next(), N}, g.dv = in.output(out.dv, head, next());
    g.dk = sums(out.dk), g.db = sums(out.db), g.da = sums(out.da), g.dr = sums(out.dr);
    g.end = buffer, g.S = buffer + N;
    decays<W>(in, head, w, g.d.data, g.slope.data);
    const long rows = cached_rows<W>(N);
    for (long i = first; i < last; i += rows)
        backward_rows<W>(in, g, head, i, std::min(i + rows, last), dsT, out.ds0, i > first);
    in.flush<W>(out.dv, head, g.dv, first, last);
    return g;
}

// The parts of a head added up, step 3, and everything rounded and written.
template <int W>
void finish(const Inputs& in, const std::vector<Head>& parts, long head, const Outputs& out) {
    const long N = in.N;
    const Head& g = parts[0];
    LongSum<W> log_decay[256 / W];
    for (auto& part : parts)
        for (long n = 0; n < N; n += W) log_decay[n / W].add(load<W>(part.end + n));
    for (long t = in.T - 1; t >= 0; t--) {
        prefetch(t - 2 * AHEAD, in.T, N, g.r, g.k, g.a, g.b, g.dr, g.dk, g.db, g.da);
        const bool empty = in.empty(head, t);
        for (long n = 0; n < N; n += W) {
            auto sum = [&](Rows Head::*x) { return total<W>(parts, x, t, n); };
            auto at = [&](Rows x) { return load<W>(x[t] + n); };
            const Vec<W> dr = sum(&Head::dr), dk = sum(&Head::dk), db = sum(&Head::db),
                         da = empty ? Vec<W>{} : sum(&Head::da);
            LongSum<W>& log = log_decay[n / W];
            log.add(at(g.r) * dr - at(g.k) * dk - at(g.b) * db);
            if (empty) log = {};
            in.store<W>(out.dw, head, t, n, at(g.slope) * log.value());
            log.add(at(g.a) * da);
            in.store<W>(out.dr, head, t, n, dr), in.store<W>(out.dk, head, t, n, dk);
            in.store<W>(out.db, head, t, n, db), in.store<W>(out.da, head, t, n, da);
        }
    }
}

template <int W> int forward(const Inputs& in, void* y, float* sT, float* saved) {
    const long parts = in.parts(), rows = in.N / parts;
    std::atomic<bool> finite{true};
    parallel(in.B * in.H * parts, in.threads, [&](long item, int) {
        const long first = item % parts * rows;
        if (forward_part<W>(in, item / parts, first, first + rows, y, sT, saved) != 0) finite = false;
    });
    return finite ? 0 : 1;
}

template <int W> void backward(const Inputs& in, const float* saved, const void* dy, const float* dsT,
    const Outputs& out, float* scratch) {
    in_parts<Head>(
        in, scratch, head_floats(in.T, in.N),
        [&](long head, long first, long last, float* buffer) {
            return backward_part<W>(in, head, first, last, saved, dy, dsT, out, buffer);
        },
        [&](const std::vector<Head>& parts, long head) { finish<W>(in, parts, head, out); });
}

}  // namespace

extern "C" {

int64_t wkv7_saved(int64_t B, int64_t T, int64_t H, int64_t N) { return B * T * H * N; }

int64_t wkv7_scratch(int64_t B, int64_t T, int64_t H, int64_t N, void* context) {
    return Call{nullptr, nullptr, B, T, H, N, kFloat32, (int)(intptr_t)context}.slots() * head_floats(T, N);
}

int wkv7_forward(const void* r, const void* w, const void* k, const void* v, const void* a, const void* b,
    const float* s0, const uint8_t* reset, void* y, float* sT, float* saved, int64_t B, int64_t T, int64_t H,
    int64_t N, int dtype, void* context) {
    const Inputs in{{s0, reset, B, T, H, N, (Dtype)dtype, (int)(intptr_t)context}, r, w, k, v, a, b};
    return N % WIDTH ? forward<NARROW>(in, y, sT, saved) : forward<WIDTH>(in, y, sT, saved);
}

int wkv7_backward(const void* r, const void* w, const void* k, const void* v, const void* a, const void* b,
    const float* s0, const uint8_t* reset, const float* saved, const void* dy, const float* dsT, void* dr,
    void* dw, void* dk, void* dv, void* da, void* db, float* ds0, float* scratch, int64_t B, int64_t T,
    int64_t H, int64_t N, int dtype, void* context) {
    const Inputs in{{s0, reset, B, T, H, N, (Dtype)dtype, (int)(intptr_t)context}, r, w, k, v, a, b};
    const Outputs out{dr, dw, dk, dv, da, db, ds0};
    N % WIDTH ? backward<NARROW>(in, saved, dy, dsT, out, scratch)
              : backward<WIDTH>(in, saved, dy, dsT, out, scratch);
    return 0;
}
}
