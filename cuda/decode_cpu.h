// Parts of the decoder's layers (decode_cpu.cpp) beside the products: their parameters, norms, and the
// recurrence of one token of a head.
#pragma once
#include "decode_products.h"

constexpr float RATE = 0.60653066f;       // exp(-1/2)
constexpr float LAYER_EPS = 1e-5f, GROUP_EPS = 64e-5f;  // src/model/layers.py
// of an input of a low-rank map, whose products are added up in this order by any number of threads
constexpr long CHANNELS = 256;

struct Model {
    Matrix emb, ln0_weight, ln0_bias, ln_out_weight, ln_out_bias, head;
};
struct Layer6 {
    Matrix ln1_weight, ln1_bias, ln2_weight, ln2_bias, ln_x_weight, ln_x_bias, maa_x, maa[5], decay, bonus,
        ffn_maa_k, ffn_maa_r;
    Matrix maa_w1, maa_w2, decay_w1, decay_w2, receptance, key, value, gate, output, ffn_key, ffn_receptance,
        ffn_value;
};
struct Layer7 {
    Matrix ln1_weight, ln1_bias, ln2_weight, ln2_bias, ln_x_weight, ln_x_bias, x_r, x_w, x_k, x_v, x_a, x_g,
        k_k, k_a, r_k, w0, a0, v0, ffn_x_k;
    Matrix w1, w2, a1, a2, v1, v2, g1, g2, receptance, key, value, output, ffn_key, ffn_value;
};

template <int W> inline Vec<W> hyperbolic_tangent(Vec<W> x) {
    const Vec<W> s = x * x, size = choose<W>(x < 0.f, -x, x);
    Vec<W> p = s * -5.70498872745e-3f + 2.06390887954e-2f;  // Cephes tanhf
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    return choose<W>(size < 0.625f, x + x * s * p, 1.f - 2.f / (exponential<W>(2.f * x) + 1.f));
}

// f(i) for every vector of W numbers of n
template <int W = WIDTH, class F> inline void each(long n, F f) {
    for (long i = 0; i < n; i += W) f(i);
}

inline void layer_norm(const float* x, long n, const Matrix& weight, const Matrix& bias, float* out) {
    const auto [mean, scale] = n % WIDTH ? moments<1>(x, n, LAYER_EPS) : moments<WIDTH>(x, n, LAYER_EPS);
    const float m = mean, s = scale;
    each(n, [&](long i) {
        store<WIDTH>(out + i,
            (load<WIDTH>(x + i) - m) * s * load<WIDTH>(weight.vector() + i) + load<WIDTH>(bias.vector() + i));
    });
}

// y of a head -> its group norm
template <int W> inline void group_norm(float* y, long N, const float* weight, const float* bias) {
    const auto [mean, scale] = moments<W>(y, N, GROUP_EPS);
    const float m = mean, s = scale;
    each<W>(N,
        [&](long n) { store<W>(y + n, (load<W>(y + n) - m) * s * load<W>(weight + n) + load<W>(bias + n)); });
}

// One head of v6: k, w, r, v (N) and the bonus u; y, and the state after the token.
template <int W> void recur6(const float* r, const float* k, const float* v, const float* decay,
    const float* u, const float* before, float* after, float* y, long N) {
    each<W>(N, [&](long i) { store<W>(y + i, Vec<W>{}); });
    for (long j = 0; j < N; j++) {
        const float d = decay[j], rj = r[j], kj = k[j], now = u[j] * k[j];
        each<W>(N, [&](long i) {
            const Vec<W> s = load<W>(before + j * N + i), vi = load<W>(v + i);
            store<W>(y + i, multiply_add(fill<W>(rj), multiply_add(fill<W>(now), vi, s), load<W>(y + i)));
            store<W>(after + j * N + i, multiply_add(s, fill<W>(d), kj * vi));
        });
    }
}

// One head of v7, whose rows are values: their sums over the keys, sa = S a and y = S r, are made for W rows
// at a time.
template <int W> void recur7(const float* r, const float* d, const float* k, const float* v, const float* a,
    const float* b, const float* before, float* after, float* y, long N) {
    for (long i = 0; i < N; i += W) {
        Vec<W> sums[W] = {};
        for (int n = 0; n < W; n++)
            each<W>(N, [&](long j) {
                sums[n] = multiply_add(load<W>(before + (i + n) * N + j), load<W>(a + j), sums[n]);
            });
        const Vec<W> sa = row_sums<W>(sums);
        Vec<W> out[W] = {};
        for (int n = 0; n < W; n++)
            each<W>(N, [&](long j) {
                const Vec<W> added =
                                 multiply_add(fill<W>(v[i + n]), load<W>(k + j), sa[n] * load<W>(b + j)),
                             s = multiply_add(load<W>(before + (i + n) * N + j), load<W>(d + j), added);
                store<W>(after + (i + n) * N + j, s);
                out[n] = multiply_add(s, load<W>(r + j), out[n]);
            });
        store<W>(y + i, row_sums<W>(out));
    }
}

