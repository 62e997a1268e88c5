// One token of each of some rows through a whole RWKV-6 or RWKV-7 on a CPU: weights in fp32, bf16 or int8
// where they lie, everything else in fp32.
//
// A layer is a few products with matrices and little else. Every thread takes its own rows of each matrix,
// for all rows of activations, so that a weight is read once; of norms and mixes its own rows of activations,
// and of the recurrence its own pairs of row and head. Between these they wait for each other, 8 times in a
// layer of v7, 11 times in one of v6, and before each product that an adapter has a part in, for its A x. No
// sum depends on the number of threads, nor on the number of rows.
//
// State of a layer, as in src/model/rwkv.py: att_x (C), wkv (H, N, N), v6 [key, value], v7 [value, key],
// ffn_x (C). It is read in one place and written in another, which may be the same.
//
//   decode_open(version, sizes, matrices, count, threads)
//       sizes: L, C, A, H, N, F, V and the most rows; matrices: Model, then Layer6 or Layer7 for every layer
//   decode_step(decoder, count, tokens, tables, strengths, before, after, logits)
//       of each of `count` rows its token, the number of its adapter's table, or -1, and the adapter's
//       strength; before, after: att_x, wkv, ffn_x of every layer of every row; logits (count, V); 1 if a
//       logit is not finite
//   decode_replace(decoder, place, matrix)
//       replaces the matrix at that place of `matrices`
//   decode_table(decoder, table, changes)
//       sets the changes of an adapter to each of `matrices`
//   decode_close(decoder)
#include "decode_parts.h"

namespace {

class Decoder : public DecoderParts {
public:
    using DecoderParts::DecoderParts;

    int step(long count, const int64_t* tokens, const int64_t* numbers, const float* strengths,
        const float* const* before, float* const* after, float* logits) {
        std::lock_guard<std::mutex> one_at_a_time(busy);
        B = count, strength = strengths;
        group(numbers);
        std::vector<float*> rows_of_logits;
        for (long b = 0; b < B; b++) rows_of_logits.push_back(logits + b * V);
        std::atomic<bool> finite{true};
        pool.run([&](int thread) {
            Own& own = own_[thread];
            for_rows(thread, [&](long b) { embed(tokens[b], numbers[b], b); });
            for (long l = 0; l < L; l++) {
                const State state{before, after, l, L};
                if (version == 6) layer6(layers6[l], state, own, thread);
                else layer7(layers7[l], l, state, own, thread);
            }
            for_rows(thread, [&](long b) {
                layer_norm(x[b], C, model->ln_out_weight, model->ln_out_bias, for_head.plain[b]);
                prepared(model->head, for_head, b);
            });
            pool.barrier();
            narrow(own, thread, {{&model->head, &for_head}});
            const auto [begin, end] = rows(model->head, for_head, own, thread, rows_of_logits.data());
            if (!all_finite(rows_of_logits, begin, end)) finite = false;
        });
        return finite ? 0 : 1;
    }

private:
    void layer7(const Layer7& layer, long l, State state, Own& own, int thread) {
        for_rows(thread, [&](long b) {
            enter(layer.ln1_weight, layer.ln1_bias, state, 0, b);
            mix(layer.x_r, b, for_r, layer.receptance);
            mix(layer.x_k, b, for_k, layer.key);
            mix(layer.x_v, b, for_v, layer.value);
            mix(layer.x_w, b, mix_w[b]);
            mix(layer.x_a, b, mix_a[b]);
            mix(layer.x_g, b, mix_g[b]);
        });
        pool.barrier();
        narrow(own, thread,
            {{&layer.receptance, &for_r}, {&layer.key, &for_k}, {&layer.value, &for_v}});
        rows(layer.receptance, for_r, own, thread, r.data());
        rows(layer.key, for_k, own, thread, k.data());
        rows(layer.value, for_v, own, thread, v.data());
        const int maps = l ? 4 : 3;
        shrink(layer.w1, 0, maps, mix_w, thread);
        shrink(layer.a1, 1, maps, mix_a, thread);
        shrink(layer.g1, 2, maps, mix_g, thread);
        if (l) shrink(layer.v1, 3, maps, for_v.plain, thread);
        pool.barrier();

        const auto [from, to] = range(A, thread);
        auto plain = [](Vec<WIDTH> s) { return s; };
        widen_out(layer.w2, inner(0, layer.w1.columns, own, hyperbolic_tangent<WIDTH>), layer.w0.vector(),
            from, to, w);
        widen_out(layer.a2, inner(1, layer.a1.columns, own, plain), layer.a0.vector(), from, to, p);
        widen_out(layer.g2, inner(2, layer.g1.columns, own, sigmoid<WIDTH>), nullptr, from, to, g);
        if (l) widen_out(layer.v2, inner(3, layer.v1.columns, own, plain), layer.v0.vector(), from, to, q);
        pool.barrier();
        heads(layer.output, thread, [&](long b, long c) {
            if (N % WIDTH) head7<NARROW>(layer, l, b, c, state);
            else head7<WIDTH>(layer, l, b, c, state);
        });
        add_to_x(layer.output, for_output, own, thread);

        for_rows(thread, [&](long b) {
            enter(layer.ln2_weight, layer.ln2_bias, state, 2, b);
            mix(layer.ffn_x_k, b, for_ffn_k, layer.ffn_key);
        });
        pool.barrier();
        narrow(own, thread, {{&layer.ffn_key, &for_ffn_k}});
        relu_squared(layer.ffn_key, layer.ffn_value, own, thread);
        pool.barrier();
        add_to_x(layer.ffn_value, for_ffn_value, own, thread);
    }

    // The head of row `row` whose channels begin at c
    template <int W> void head7(const Layer7& layer, long l, long row, long c, State state) {
        float decay[256], minus[256], b[256];
        float *r = this->r[row] + c, *k = this->k[row] + c, *v = this->v[row] + c,
              *y = for_output.plain[row] + c;
        const float *w = this->w[row] + c, *p = this->p[row] + c, *q = this->q[row] + c,
                    *g = this->g[row] + c;
        float* first = this->first[row] + c;
        Vec<W> square = {}, bonus = {};
        each<W>(N, [&](long n) {
            auto at = [&](const float* t) { return load<W>(t + n); };
            auto own = [&](const Matrix& vector) { return load<W>(vector.vector() + c + n); };
            if (l) store<W>(v + n, at(v) + (at(first) - at(v)) * sigmoid<W>(at(q)));
            else store<W>(first + n, at(v));
            const Vec<W> kappa = at(k) * own(layer.k_k), a = sigmoid<W>(at(p)),
                         key = at(k) * (1.f + (a - 1.f) * own(layer.k_a));
            square = multiply_add(kappa, kappa, square);
            bonus = multiply_add(at(r) * key, own(layer.r_k), bonus);
            store<W>(minus + n, -kappa);
            store<W>(b + n, kappa * a);
            store<W>(decay + n, exponential<W>(-RATE * sigmoid<W>(at(w))));
            store<W>(k + n, key);
        });
        const float scale = 1.f / std::max(std::sqrt(sum<W>(square)), 1e-12f), weight = sum<W>(bonus);
        each<W>(N, [&](long n) {
            store<W>(minus + n, load<W>(minus + n) * scale), store<W>(b + n, load<W>(b + n) * scale);
        });
        recur7<W>(r, decay, k, v, minus, b, state.before(row, 1) + c * N, state.after(row, 1) + c * N, y, N);
        group_norm<W>(y, N, layer.ln_x_weight.vector() + c, layer.ln_x_bias.vector() + c);
        each<W>(N, [&](long n) {
            auto at = [&](const float* t) { return load<W>(t + n); };
            store<W>(y + n, (at(y) + weight * at(v)) * at(g));
        });
    }

    void layer6(const Layer6& layer, State state, Own& own, int thread) {
        for_rows(thread, [&](long b) {
            enter(layer.ln1_weight, layer.ln1_bias, state, 0, b);
            mix(layer.maa_x, b, mix_a[b]);
        });
        pool.barrier();
        shrink(layer.maa_w1, 0, 1, mix_a, thread);
        pool.barrier();
        mix6(layer, own, thread);
        pool.barrier();

        narrow(own, thread,
            {{&layer.key, &for_k}, {&layer.value, &for_v}, {&layer.receptance, &for_r},
                {&layer.gate, &for_g}});
        shrink(layer.decay_w1, 0, 1, mix_w, thread);
        rows(layer.key, for_k, own, thread, k.data());
        rows(layer.value, for_v, own, thread, v.data());
        rows(layer.receptance, for_r, own, thread, r.data());
        rows(layer.gate, for_g, own, thread, g.data());
        pool.barrier();

        const auto [from, to] = range(A, thread);
        widen_out(layer.decay_w2, inner(0, layer.decay_w1.columns, own, hyperbolic_tangent<WIDTH>),
            layer.decay.vector(), from, to, w);
        pool.barrier();
        heads(layer.output, thread, [&](long b, long c) {
            if (N % WIDTH) head6<NARROW>(layer, b, c, state);
            else head6<WIDTH>(layer, b, c, state);
        });
        add_to_x(layer.output, for_output, own, thread);

        for_rows(thread, [&](long b) {
            enter(layer.ln2_weight, layer.ln2_bias, state, 2, b);
            mix(layer.ffn_maa_k, b, for_ffn_k, layer.ffn_key);
            mix(layer.ffn_maa_r, b, for_ffn_r, layer.ffn_receptance);
        });
        pool.barrier();
        narrow(own, thread, {{&layer.ffn_key, &for_ffn_k}, {&layer.ffn_receptance, &for_ffn_r}});
        relu_squared(layer.ffn_key, layer.ffn_value, own, thread);
        rows(layer.ffn_receptance, for_ffn_r, own, thread, gates.data());
        pool.barrier();
        add_to_x(layer.ffn_value, for_ffn_value, own, thread, true);
    }

    // The five mixes of v6, whose shares depend on the token, in the thread's channels
    void mix6(const Layer6& layer, Own& own, int thread) {
        const Batch& inside = inner(0, layer.maa_w1.columns, own, hyperbolic_tangent<WIDTH>);
        const long rank = layer.maa_w2.rows / 5;
        // in the order of the rows of maa_w2: w, k, v, r, g
        const Site* sites[] = {nullptr, &for_k, &for_v, &for_r, &for_g};
        const Matrix* products[] = {nullptr, &layer.key, &layer.value, &layer.receptance, &layer.gate};
        long piece = 16;
        for (int m = 1; m < 5; m++) piece = std::max(piece, unit(products[m]->type));
        const auto [from, to] = range(C, thread, piece);
        if (from == to) return;
        for (int m = 0; m < 5; m++) {
            const Batch& out = m ? sites[m]->plain : mix_w;
            for (long b = 0; b < B; b++)
                std::copy(layer.maa[m].vector() + from, layer.maa[m].vector() + to, out[b] + from);
            add_columns(layer.maa_w2, inside.data(), B, m * rank, (m + 1) * rank, from, to, out.data());
            for (long b = 0; b < B; b++) {
                for (long c = from; c < to; c += WIDTH) {
                    const auto now = load<WIDTH>(z[b] + c);
                    store<WIDTH>(
                        out[b] + c, now + (load<WIDTH>(last[b] + c) - now) * load<WIDTH>(out[b] + c));
                }
                if (m) prepare(products[m]->type, out[b], C, from, to, input(*sites[m]), b);
            }
        }
    }

    template <int W> void head6(const Layer6& layer, long row, long c, State state) {
        float decay[256];
        float* y = for_output.plain[row] + c;
        each<W>(N, [&](long n) {
            store<W>(decay + n, exponential<W>(-exponential<W>(load<W>(w[row] + c + n))));
        });
        recur6<W>(r[row] + c, k[row] + c, v[row] + c, decay, layer.bonus.vector() + c,
            state.before(row, 1) + c * N, state.after(row, 1) + c * N, y, N);
        group_norm<W>(y, N, layer.ln_x_weight.vector() + c, layer.ln_x_bias.vector() + c);
        each<W>(N, [&](long n) {
            const Vec<W> gate = load<W>(g[row] + c + n);
            store<W>(y + n, load<W>(y + n) * gate * sigmoid<W>(gate));
        });
    }
};

}  // namespace

extern "C" {

void* decode_open(
    int64_t version, const int64_t* sizes, const Matrix* matrices, int64_t count, int64_t threads) {
    const int64_t layer = version == 6 ? sizeof(Layer6) : sizeof(Layer7);
    if (count * static_cast<int64_t>(sizeof(Matrix)) !=
        static_cast<int64_t>(sizeof(Model)) + sizes[0] * layer)
        return nullptr;
    return new Decoder(version, sizes, matrices, count, static_cast<int>(threads));
}

int decode_step(void* decoder, int64_t count, const int64_t* tokens, const int64_t* tables,
    const float* strengths, const float* const* before, float* const* after, float* logits) {
    return static_cast<Decoder*>(decoder)->step(count, tokens, tables, strengths, before, after, logits);
}

void decode_replace(void* decoder, int64_t place, const Matrix* matrix) {
    static_cast<Decoder*>(decoder)->replace(place, *matrix);
}

void decode_table(void* decoder, int64_t table, const Change* changes) {
    static_cast<Decoder*>(decoder)->table(table, changes);
}

void decode_close(void* decoder) { delete static_cast<Decoder*>(decoder); }

}
