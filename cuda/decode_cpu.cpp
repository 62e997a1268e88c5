// One token through a whole RWKV-6 or RWKV-7 on a CPU: weights in fp32, bf16 or int8 where they lie,
// everything else in fp32.
//
// A layer is a few products with matrices and little else, and the products are bound by the memory. Every
// thread takes its own rows of each matrix, or its own heads; what all of them need (norms, mixes) each works
// out for itself; between two products they wait for each other, 5 times in a layer of v7, 7 times in one of
// v6, and before each product that an adapter has a part in, of whose A x they have made rows each. No sum
// depends on the number of threads.
//
// State of a layer, as in src/model/rwkv.py: att_x (C), wkv (H, N, N), v6 [key, value], v7 [value, key],
// ffn_x (C). It is read in one place and written in another, so that the caller may keep what there was.
//
//   decode_open(version, sizes, matrices, count, threads)
//       sizes: L, C, A, H, N, F, V; matrices: Model, then Layer6 or Layer7 for every layer
//   decode_step(decoder, token, before, after, logits)
//       before, after: att_x, wkv, ffn_x of every layer; 1 if a logit is not finite
//   decode_replace(decoder, place, matrix)
//       the matrix at that place of `matrices` is another one from now on
//   decode_close(decoder)
#include "decode_cpu.h"

namespace {

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
            store<W>(y + i, load<W>(y + i) + rj * (s + now * vi));
            store<W>(after + j * N + i, s * d + kj * vi);
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
            each<W>(N, [&](long j) { sums[n] += load<W>(before + (i + n) * N + j) * load<W>(a + j); });
        const Vec<W> sa = row_sums<W>(sums);
        Vec<W> out[W] = {};
        for (int n = 0; n < W; n++)
            each<W>(N, [&](long j) {
                const Vec<W> s = load<W>(before + (i + n) * N + j) * load<W>(d + j) + sa[n] * load<W>(b + j) +
                                 v[i + n] * load<W>(k + j);
                store<W>(after + (i + n) * N + j, s);
                out[n] += s * load<W>(r + j);
            });
        store<W>(y + i, row_sums<W>(out));
    }
}

struct Decoder {
    Decoder(long version, const int64_t* sizes, const Matrix* matrices, int threads)
        : version(version),
          L(sizes[0]),
          C(sizes[1]),
          A(sizes[2]),
          H(sizes[3]),
          N(sizes[4]),
          F(sizes[5]),
          V(sizes[6]),
          pool(threads) {
        memcpy(&model, matrices, sizeof model);
        const Matrix* own = matrices + sizeof model / sizeof(Matrix);
        if (version == 6) layers6.resize(L), memcpy(layers6.data(), own, sizeof(Layer6) * L);
        else layers7.resize(L), memcpy(layers7.data(), own, sizeof(Layer7) * L);
        for (auto& layer : layers6) rank = std::max({rank, layer.maa_w1.columns, layer.decay_w1.columns});
        for (auto& layer : layers7)
            rank = std::max({rank, layer.w1.columns, layer.a1.columns, layer.v1.columns, layer.g1.columns});
        parts = (C + CHANNELS - 1) / CHANNELS;
        auto vector = [&](long n) { return buffer(padded(n)); };
        x = vector(C), r = vector(A), k = vector(A), v = vector(A), g = vector(A), first = vector(A),
        w = vector(A), p = vector(A), q = vector(A);
        y = vector(A), h = vector(F), gates = vector(C), partial = buffer(5 * parts * padded(rank));
        for (auto& m : mixed) m = vector(C);
        for (int t = 0; t < threads; t++)
            own_.push_back(
                {vector(C), vector(C), vector(C), vector(std::max({C, A, F})), buffer(5 * padded(rank))});
    }

    void replace(long place, const Matrix& matrix) {
        std::lock_guard<std::mutex> one_at_a_time(busy);
        constexpr long first = sizeof model / sizeof(Matrix);
        Matrix* layers = version == 6 ? &layers6[0].ln1_weight : &layers7[0].ln1_weight;
        (place < first ? &model.emb + place : layers + place - first)[0] = matrix;
    }

    int step(long token, const float* const* before, float* const* after, float* logits) {
        std::lock_guard<std::mutex> one_at_a_time(busy);
        std::atomic<bool> finite{true};
        pool.run([&](int thread) {
            const Own& own = own_[thread];
            if (thread == 0) embed(token);
            pool.barrier();
            for (long l = 0; l < L; l++) {
                const State state{before + 3 * l, after + 3 * l};
                if (version == 6) layer6(layers6[l], state, own, thread);
                else layer7(layers7[l], l, state, own, thread);
            }
            layer_norm(x, C, model.ln_out_weight, model.ln_out_bias, own.z);
            if (narrow(model.head, own.z, thread)) pool.barrier();
            float bad = 0;
            rows(model.head, own.z, C, own, thread,
                [&](long row, float logit) { logits[row] = logit, bad += logit * 0.f; });
            if (bad != 0) finite = false;
        });
        return finite ? 0 : 1;
    }

private:
    // What a thread has for itself: the input of the layer's half, the one of the token before, a mix of the
    // two, one in the order of the weights, and the inner activations of the low-rank maps
    struct Own {
        float *z, *last, *mix, *spread, *inner;
    };
    struct State {
        const float* const* before;
        float* const* after;
    };

    float* buffer(long floats) {
        buffers.emplace_back(new Buffer(floats));
        std::fill(buffers.back()->data, buffers.back()->data + floats, 0.f);
        return buffers.back()->data;
    }

    void embed(long token) {
        float* z = own_[0].z;
        for (long c = 0; c < C; c++)
            z[c] = model.emb.type == kFp32
                       ? model.emb.vector()[token * C + c]
                       : value(static_cast<const uint16_t*>(model.emb.data) + token * C + c);
        layer_norm(z, C, model.ln0_weight, model.ln0_bias, x);
    }

    // A x of the adapter beside a matrix, if there is one, whose rows the threads share out: they wait for
    // each other before rows()
    bool narrow(const Matrix& matrix, const float* input, int thread) {
        if (!matrix.rank) return false;
        const auto [begin, end] = share(matrix.rank, thread, pool.threads);
        multiply_A(matrix, input, begin, end);
        return true;
    }
    // emit(row, product) for the thread's rows of a matrix with a vector of n numbers
    template <class Emit>
    void rows(const Matrix& matrix, const float* input, long n, const Own& own, int thread, Emit emit) {
        spread(matrix.type, input, n, own.spread);
        const auto [begin, end] = share(matrix.rows, thread, pool.threads);
        multiply_rows(matrix, own.spread, begin, end, emit);
    }
    void rows(const Matrix& matrix, const float* input, long n, const Own& own, int thread, float* out) {
        rows(matrix, input, n, own, thread, [out](long row, float product) { out[row] = product; });
    }

    // x after its norm, the state it leaves, and the one that the token before left
    void enter(const Matrix& weight, const Matrix& bias, const float* before, float* after, const Own& own,
        int thread) {
        layer_norm(x, C, weight, bias, own.z);
        memcpy(own.last, before, sizeof(float) * C);
        if (thread == 0) memcpy(after, own.z, sizeof(float) * C);
    }
    const float* mix(const Matrix& share, const Own& own) {
        each(C, [&](long c) {
            const auto z = load<WIDTH>(own.z + c);
            store<WIDTH>(own.mix + c, z + (load<WIDTH>(own.last + c) - z) * load<WIDTH>(share.vector() + c));
        });
        return own.mix;
    }

    // The first half of low-rank map `map` of `maps`, input() @ matrix: parts of the sum over the channels,
    // which the threads share out
    template <class Input> void shrink(const Matrix& matrix, int map, int maps, Input input, int thread) {
        const auto [begin, end] = share(maps * parts, thread, pool.threads);
        const long from = std::max(begin, map * parts), to = std::min(end, (map + 1) * parts);
        if (from >= to) return;
        const float* vector = input();
        for (long item = from; item < to; item++) {
            float* out = partial + item * padded(rank);
            std::fill(out, out + padded(rank), 0.f);
            const long channel = (item - map * parts) * CHANNELS;
            add_columns(matrix, vector, channel, std::min(channel + CHANNELS, C), 0, matrix.columns, out);
        }
    }
    // ... and the parts added up, through the activation between the halves
    template <class Activation>
    const float* inner(int map, long width, const Own& own, Activation activation) {
        float* out = own.inner + map * padded(rank);
        each(width, [&](long i) {
            Vec<WIDTH> sum = {};
            for (long part = map * parts; part < (map + 1) * parts; part++)
                sum += load<WIDTH>(partial + part * padded(rank) + i);
            store<WIDTH>(out + i, activation(sum));
        });
        return out;
    }
    // The second half for channels [from, to): base + inner @ matrix
    void widen_out(
        const Matrix& matrix, const float* inner, const float* base, long from, long to, float* out) {
        for (long c = from; c < to; c++) out[c] = base ? base[c] : 0.f;
        add_columns(matrix, inner, 0, matrix.rows, from, to, out);
    }

    template <class Work> void heads(int thread, Work work) {
        const auto [begin, end] = share(H, thread, pool.threads);
        for (long head = begin; head < end; head++) work(head);
    }

    void add_to_x(const Matrix& matrix, const float* input, long n, const Own& own, int thread) {
        if (narrow(matrix, input, thread)) pool.barrier();
        rows(matrix, input, n, own, thread, [this](long row, float product) { x[row] += product; });
        pool.barrier();
    }
    void relu_squared(const Matrix& matrix, const float* input, const Own& own, int thread) {
        rows(matrix, input, C, own, thread,
            [this](long row, float product) { h[row] = product > 0 ? product * product : product * 0.f; });
    }

    void layer7(const Layer7& layer, long l, State state, const Own& own, int thread) {
        enter(layer.ln1_weight, layer.ln1_bias, state.before[0], state.after[0], own, thread);
        const int maps = l ? 4 : 3;
        bool adapted = narrow(layer.receptance, mix(layer.x_r, own), thread);
        adapted |= narrow(layer.key, mix(layer.x_k, own), thread);
        adapted |= narrow(layer.value, mix(layer.x_v, own), thread);
        if (adapted) pool.barrier();
        rows(layer.receptance, mix(layer.x_r, own), C, own, thread, r);
        rows(layer.key, mix(layer.x_k, own), C, own, thread, k);
        rows(layer.value, mix(layer.x_v, own), C, own, thread, v);
        shrink(layer.w1, 0, maps, [&] { return mix(layer.x_w, own); }, thread);
        shrink(layer.a1, 1, maps, [&] { return mix(layer.x_a, own); }, thread);
        shrink(layer.g1, 2, maps, [&] { return mix(layer.x_g, own); }, thread);
        if (l) shrink(layer.v1, 3, maps, [&] { return mix(layer.x_v, own); }, thread);
        pool.barrier();

        const auto [begin, end] = share(H, thread, pool.threads);
        const long from = begin * N, to = end * N;
        auto plain = [](Vec<WIDTH> s) { return s; };
        widen_out(layer.w2, inner(0, layer.w1.columns, own, hyperbolic_tangent<WIDTH>), layer.w0.vector(),
            from, to, w);
        widen_out(layer.a2, inner(1, layer.a1.columns, own, plain), layer.a0.vector(), from, to, p);
        widen_out(layer.g2, inner(2, layer.g1.columns, own, sigmoid<WIDTH>), nullptr, from, to, g);
        if (l) widen_out(layer.v2, inner(3, layer.v1.columns, own, plain), layer.v0.vector(), from, to, q);
        for (long head = begin; head < end; head++) {
            if (N % WIDTH) head7<NARROW>(layer, l, head * N, state);
            else head7<WIDTH>(layer, l, head * N, state);
        }
        pool.barrier();
        add_to_x(layer.output, y, A, own, thread);

        enter(layer.ln2_weight, layer.ln2_bias, state.before[2], state.after[2], own, thread);
        const float* mixed_k = mix(layer.ffn_x_k, own);
        if (narrow(layer.ffn_key, mixed_k, thread)) pool.barrier();
        relu_squared(layer.ffn_key, mixed_k, own, thread);
        pool.barrier();
        add_to_x(layer.ffn_value, h, F, own, thread);
    }

    // The head whose channels begin at c
    template <int W> void head7(const Layer7& layer, long l, long c, State state) {
        float decay[256], minus[256], b[256];
        Vec<W> square = {}, bonus = {};
        each<W>(N, [&](long n) {
            auto at = [&](const float* t) { return load<W>(t + c + n); };
            if (l) store<W>(v + c + n, at(v) + (at(first) - at(v)) * sigmoid<W>(at(q)));
            else store<W>(first + c + n, at(v));
            const Vec<W> kappa = at(k) * at(layer.k_k.vector()), a = sigmoid<W>(at(p)),
                         key = at(k) * (1.f + (a - 1.f) * at(layer.k_a.vector()));
            square += kappa * kappa;
            bonus += at(r) * key * at(layer.r_k.vector());
            store<W>(minus + n, -kappa);
            store<W>(b + n, kappa * a);
            store<W>(decay + n, exponential<W>(-RATE * sigmoid<W>(at(w))));
            store<W>(k + c + n, key);
        });
        const float scale = 1.f / std::max(std::sqrt(sum<W>(square)), 1e-12f), weight = sum<W>(bonus);
        each<W>(N, [&](long n) {
            store<W>(minus + n, load<W>(minus + n) * scale), store<W>(b + n, load<W>(b + n) * scale);
        });
        recur7<W>(
            r + c, decay, k + c, v + c, minus, b, state.before[1] + c * N, state.after[1] + c * N, y + c, N);
        group_norm<W>(y + c, N, layer.ln_x_weight.vector() + c, layer.ln_x_bias.vector() + c);
        each<W>(N, [&](long n) {
            auto at = [&](const float* t) { return load<W>(t + c + n); };
            store<W>(y + c + n, (at(y) + weight * at(v)) * at(g));
        });
    }

    void layer6(const Layer6& layer, State state, const Own& own, int thread) {
        enter(layer.ln1_weight, layer.ln1_bias, state.before[0], state.after[0], own, thread);
        shrink(layer.maa_w1, 0, 1, [&] { return mix(layer.maa_x, own); }, thread);
        pool.barrier();

        const float* inside = inner(0, layer.maa_w1.columns, own, hyperbolic_tangent<WIDTH>);
        const long rank = layer.maa_w2.rows / 5;
        const auto [begin, end] = share(padded(C) / WIDTH, thread, pool.threads);
        const long from = begin * WIDTH, to = std::min(end * WIDTH, C);
        for (int m = 0; m < 5; m++) {
            for (long c = from; c < to; c++) mixed[m][c] = layer.maa[m].vector()[c];
            add_columns(layer.maa_w2, inside, m * rank, (m + 1) * rank, from, to, mixed[m]);
            for (long c = from; c < to; c++) mixed[m][c] = own.z[c] + (own.last[c] - own.z[c]) * mixed[m][c];
        }
        pool.barrier();

        // the mixes in the order of the rows of maa_w2: w, k, v, r, g
        bool adapted = narrow(layer.key, mixed[1], thread);
        adapted |= narrow(layer.value, mixed[2], thread);
        adapted |= narrow(layer.receptance, mixed[3], thread);
        adapted |= narrow(layer.gate, mixed[4], thread);
        if (adapted) pool.barrier();
        shrink(layer.decay_w1, 0, 1, [&] { return mixed[0]; }, thread);
        rows(layer.key, mixed[1], C, own, thread, k);
        rows(layer.value, mixed[2], C, own, thread, v);
        rows(layer.receptance, mixed[3], C, own, thread, r);
        rows(layer.gate, mixed[4], C, own, thread, g);
        pool.barrier();

        const auto [head, last] = share(H, thread, pool.threads);
        widen_out(layer.decay_w2, inner(0, layer.decay_w1.columns, own, hyperbolic_tangent<WIDTH>),
            layer.decay.vector(), head * N, last * N, w);
        for (long c = head * N; c < last * N; c += N) {
            if (N % WIDTH) head6<NARROW>(layer, c, state);
            else head6<WIDTH>(layer, c, state);
        }
        pool.barrier();
        add_to_x(layer.output, y, A, own, thread);

        enter(layer.ln2_weight, layer.ln2_bias, state.before[2], state.after[2], own, thread);
        adapted = narrow(layer.ffn_key, mix(layer.ffn_maa_k, own), thread);
        adapted |= narrow(layer.ffn_receptance, mix(layer.ffn_maa_r, own), thread);
        if (adapted) pool.barrier();
        relu_squared(layer.ffn_key, mix(layer.ffn_maa_k, own), own, thread);
        rows(layer.ffn_receptance, mix(layer.ffn_maa_r, own), C, own, thread, gates);
        pool.barrier();
        each(C, [&](long c) { store<WIDTH>(own.mix + c, sigmoid<WIDTH>(load<WIDTH>(gates + c))); });
        if (narrow(layer.ffn_value, h, thread)) pool.barrier();
        rows(layer.ffn_value, h, F, own, thread,
            [&](long row, float product) { x[row] += own.mix[row] * product; });
        pool.barrier();
    }

    template <int W> void head6(const Layer6& layer, long c, State state) {
        float decay[256];
        each<W>(N, [&](long n) { store<W>(decay + n, exponential<W>(-exponential<W>(load<W>(w + c + n)))); });
        recur6<W>(r + c, k + c, v + c, decay, layer.bonus.vector() + c, state.before[1] + c * N,
            state.after[1] + c * N, y + c, N);
        group_norm<W>(y + c, N, layer.ln_x_weight.vector() + c, layer.ln_x_bias.vector() + c);
        each<W>(N, [&](long n) {
            const Vec<W> gate = load<W>(g + c + n);
            store<W>(y + c + n, load<W>(y + c + n) * gate * sigmoid<W>(gate));
        });
    }

    const long version, L, C, A, H, N, F, V;
    long rank = 1, parts = 0;
    Model model;
    std::vector<Layer6> layers6;
    std::vector<Layer7> layers7;
    std::vector<std::unique_ptr<Buffer>> buffers;
    // of all threads: the residual stream, the vectors of the time mix, the channel mix's, and the parts of
    // the low-rank maps
    float *x, *r, *k, *v, *g, *first, *w, *p, *q, *y, *h, *gates, *partial, *mixed[5];
    std::vector<Own> own_;
    std::mutex busy;
    Pool pool;
};

}  // namespace

extern "C" {

void* decode_open(
    int64_t version, const int64_t* sizes, const Matrix* matrices, int64_t count, int64_t threads) {
    const int64_t layer = version == 6 ? sizeof(Layer6) : sizeof(Layer7);
    if (count * static_cast<int64_t>(sizeof(Matrix)) !=
        static_cast<int64_t>(sizeof(Model)) + sizes[0] * layer)
        return nullptr;
    return new Decoder(version, sizes, matrices, static_cast<int>(threads));
}

int decode_step(
    void* decoder, int64_t token, const float* const* before, float* const* after, float* logits) {
    return static_cast<Decoder*>(decoder)->step(token, before, after, logits);
}

void decode_replace(void* decoder, int64_t place, const Matrix* matrix) {
    static_cast<Decoder*>(decoder)->replace(place, *matrix);
}

void decode_close(void* decoder) { delete static_cast<Decoder*>(decoder); }

}
