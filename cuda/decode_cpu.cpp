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
//       the matrix at that place of `matrices` is another one from now on
//   decode_table(decoder, table, changes)
//       what an adapter adds to each of `matrices`
//   decode_close(decoder)
#include "decode_cpu.h"

#include <memory>

#include "decode_threads.h"

namespace {

// What an adapter adds to a matrix: scale * B A. A (rank, columns); B transposed, (rank, rows); fp32.
// Without A it is MiSS's, whose A x are the sums of strided shards, x[j] + x[j + rank] + ... Rank 0: nothing.
struct Change {
    int64_t rank;
    double scale;
    const float *A, *B;
};
Matrix fp32_matrix(const float* data, long rows, long columns) {
    return {data, nullptr, rows, columns, kFp32};
}

// A vector for each row.
struct Batch {
    std::vector<float*> rows;
    std::shared_ptr<Buffer> memory;
    Batch() = default;
    // not a multiple of 4096 bytes from one another, which would share few lines of a cache
    Batch(long count, long n) {
        const long stride = padded(n) + 16;
        memory = std::make_shared<Buffer>(count * stride);
        std::fill(memory->data, memory->data + count * stride, 0.f);
        for (long b = 0; b < count; b++) rows.push_back(memory->data + b * stride);
    }
    float* operator[](long b) const { return rows[b]; }
    float* const* data() const { return rows.data(); }
};

// The input of a product: as it is, in the order of the weights, and A x of adapters.
struct Site {
    Batch plain, ready, inner;
    long n;
};

// Rows that have the same adapter.
struct Group {
    const std::vector<Change>* changes;
    std::vector<long> rows;
};

struct Decoder {
    Decoder(long version, const int64_t* sizes, const Matrix* matrices, long count, int threads)
        : version(version),
          L(sizes[0]),
          C(sizes[1]),
          A(sizes[2]),
          H(sizes[3]),
          N(sizes[4]),
          F(sizes[5]),
          V(sizes[6]),
          room(sizes[7]),
          all(matrices, matrices + count),
          pool(threads) {
        model = reinterpret_cast<const Model*>(all.data());
        layers6 = reinterpret_cast<const Layer6*>(model + 1);
        layers7 = reinterpret_cast<const Layer7*>(model + 1);
        long rank = 1;
        for (long l = 0; l < L; l++)
            if (version == 6) rank = std::max({rank, layers6[l].maa_w1.columns, layers6[l].decay_w1.columns});
            else
                rank = std::max({rank, layers7[l].w1.columns, layers7[l].a1.columns, layers7[l].v1.columns,
                    layers7[l].g1.columns});
        parts = (C + CHANNELS - 1) / CHANNELS;
        auto batch = [&](long n) { return Batch(room, n); };
        for (Site* site : {&for_r, &for_k, &for_v, &for_g, &for_ffn_k, &for_ffn_r, &for_head})
            *site = {batch(C), batch(C), batch(0), C};
        for_output = {batch(A), batch(A), batch(0), A};
        for_ffn_value = {batch(F), batch(F), batch(0), F};
        for (Batch* vector : {&x, &z, &last, &gates, &added, &mix_w, &mix_a, &mix_g}) *vector = batch(C);
        for (Batch* vector : {&r, &k, &v, &g, &first, &w, &p, &q}) *vector = batch(A);
        for (long item = 0; item < 4 * parts; item++) partial.push_back(batch(rank));
        for (int t = 0; t < threads; t++) {
            own_.emplace_back();
            for (int map = 0; map < 4; map++) own_[t].inner.push_back(batch(rank));
        }
    }

    void replace(long place, const Matrix& matrix) {
        std::lock_guard<std::mutex> one_at_a_time(busy);
        all[place] = matrix;
    }

    void table(size_t number, const Change* changes) {
        std::lock_guard<std::mutex> one_at_a_time(busy);
        if (tables.size() <= number) tables.resize(number + 1);
        tables[number].assign(changes, changes + all.size());
        for (const Change& change : tables[number]) widest = std::max<long>(widest, change.rank);
    }

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
            for_rows(thread, [&](long b) { embed(tokens[b], b); });
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
    // What a thread has for itself: the inner activations of the low-rank maps, and room for the rows of a
    // group
    struct Own {
        std::vector<Batch> inner;
        std::vector<float*> from, to;
    };
    struct State {
        const float* const* before_;
        float* const* after_;
        long l, L;
        const float* before(long b, int part) const { return before_[(b * L + l) * 3 + part]; }
        float* after(long b, int part) const { return after_[(b * L + l) * 3 + part]; }
    };

    void group(const int64_t* numbers) {
        groups.clear();
        for (long b = 0; b < B; b++) {
            if (numbers[b] < 0) continue;
            const auto* changes = &tables[numbers[b]];
            auto found = std::find_if(
                groups.begin(), groups.end(), [&](const Group& group) { return group.changes == changes; });
            if (found == groups.end()) found = groups.insert(found, {changes, {}});
            found->rows.push_back(b);
        }
        if (groups.empty() || room_of_inner >= widest) return;
        for (Site* site : {&for_r, &for_k, &for_v, &for_g, &for_output, &for_ffn_k, &for_ffn_r,
                 &for_ffn_value, &for_head})
            site->inner = Batch(room, widest);
        room_of_inner = widest;
    }

    // work(b) for the thread's rows of activations
    template <class Work> void for_rows(int thread, Work work) {
        const auto [begin, end] = share(B, thread, pool.threads);
        for (long b = begin; b < end; b++) work(b);
    }
    // the thread's part of n numbers, in whole pieces
    std::pair<long, long> range(long n, int thread, long piece = 16) {
        const auto [begin, end] = share((n + piece - 1) / piece, thread, pool.threads);
        return {begin * piece, std::min(end * piece, n)};
    }

    bool all_finite(const std::vector<float*>& logits, long begin, long end) {
        Vec<WIDTH> bad = {};
        float rest = 0;
        for (const float* row : logits) {
            long i = begin;
            for (; i + WIDTH <= end; i += WIDTH) bad += load<WIDTH>(row + i) * 0.f;
            for (; i < end; i++) rest += row[i] * 0.f;
        }
        return sum<WIDTH>(bad) + rest == 0;
    }

    void embed(long token, long b) {
        float* own = z[b];
        for (long c = 0; c < C; c++)
            own[c] = model->emb.type == kFp32
                         ? model->emb.vector()[token * C + c]
                         : value(static_cast<const uint16_t*>(model->emb.data) + token * C + c);
        layer_norm(own, C, model->ln0_weight, model->ln0_bias, x[b]);
    }

    // row b of a site, which is there, for the product with a matrix
    void prepared(const Matrix& matrix, const Site& site, long b) {
        prepare(matrix.type, site.plain[b], site.n, 0, site.n, input(site), b);
    }
    Input input(const Site& site) { return {site.ready.data(), B}; }

    // the rows of a group, of a batch
    static float* const* chosen(const Group& group, const Batch& batch, std::vector<float*>& to) {
        to.clear();
        for (long b : group.rows) to.push_back(batch[b]);
        return to.data();
    }

    struct Product {
        const Matrix* matrix;
        const Site* site;
    };
    // strength * A x of the adapters beside matrices, for the rows that have one; the threads share it out,
    // and wait for each other if there was any
    void narrow(Own& own, int thread, std::initializer_list<Product> products) {
        bool any = false;
        long item = 0;
        for (const auto& [matrix, site] : products)
            for (const Group& group : groups) {
                const Change& change = (*group.changes)[matrix - all.data()];
                if (!change.rank) continue;
                any = true;
                const float scale = static_cast<float>(change.scale);
                if (change.A) {
                    const auto [begin, end] = range(change.rank, thread);
                    const Input plain{chosen(group, site->plain, own.from), static_cast<long>(group.rows.size())};
                    multiply(fp32_matrix(change.A, change.rank, site->n), plain, begin, end,
                        chosen(group, site->inner, own.to));
                    for (long b : group.rows)
                        for (long j = begin; j < end; j++) site->inner[b][j] *= scale * strength[b];
                    continue;
                }
                for (long b : group.rows)
                    if (item++ % pool.threads == thread)
                        sum_shards(site->plain[b], site->n, change.rank, scale * strength[b], site->inner[b]);
            }
        if (any) pool.barrier();
    }
    // out[j] = strength * (x[j] + x[j + rank] + ...)
    static void sum_shards(const float* x, long n, long rank, float strength, float* out) {
        std::fill(out, out + rank, 0.f);
        for (long start = 0; start < n; start += rank)
            for (long j = 0; j < std::min(rank, n - start); j++) out[j] += x[start + j];
        for (long j = 0; j < rank; j++) out[j] *= strength;
    }

    // out[b] = the product of a matrix, with what adapters add, in the thread's rows of it
    std::pair<long, long> rows(const Matrix& matrix, const Site& site, Own& own, int thread,
        float* const* out, long piece = 16) {
        const auto [begin, end] = range(matrix.rows, thread, piece);
        if (begin == end) return {begin, end};
        multiply(matrix, input(site), begin, end, out);
        for (const Group& group : groups) {
            const Change& change = (*group.changes)[&matrix - all.data()];
            if (!change.rank) continue;
            const float* const* inner = chosen(group, site.inner, own.from);
            add_columns(fp32_matrix(change.B, change.rank, matrix.rows), inner, group.rows.size(), 0,
                change.rank, begin, end, [&] {
                    own.to.clear();
                    for (long b : group.rows) own.to.push_back(out[b]);
                    return own.to.data();
                }());
        }
        return {begin, end};
    }

    // z = x of a row after its norm, the state it leaves, and `last`, the one that the token before left
    void enter(const Matrix& weight, const Matrix& bias, State state, int part, long b) {
        layer_norm(x[b], C, weight, bias, z[b]);
        memcpy(last[b], state.before(b, part), sizeof(float) * C);
        memcpy(state.after(b, part), z[b], sizeof(float) * C);
    }
    void mix(const Matrix& share, long b, float* out) {
        each(C, [&](long c) {
            const auto now = load<WIDTH>(z[b] + c);
            store<WIDTH>(out + c, now + (load<WIDTH>(last[b] + c) - now) * load<WIDTH>(share.vector() + c));
        });
    }
    void mix(const Matrix& share, long b, const Site& site, const Matrix& matrix) {
        mix(share, b, site.plain[b]);
        prepared(matrix, site, b);
    }

    // The first half of low-rank map `map` of `maps`, input @ matrix: parts of the sum over the channels,
    // which the threads share out
    void shrink(const Matrix& matrix, int map, int maps, const Batch& input, int thread) {
        const auto [begin, end] = share(maps * parts, thread, pool.threads);
        const long from = std::max(begin, map * parts), to = std::min(end, (map + 1) * parts);
        for (long item = from; item < to; item++) {
            const Batch& out = partial[item];
            for (long b = 0; b < B; b++) std::fill(out[b], out[b] + padded(matrix.columns), 0.f);
            const long channel = (item - map * parts) * CHANNELS;
            add_columns(matrix, input.data(), B, channel, std::min(channel + CHANNELS, C), 0, matrix.columns,
                out.data());
        }
    }
    // ... and the parts added up, through the activation between the halves
    template <class Activation>
    const Batch& inner(int map, long width, const Own& own, Activation activation) {
        const Batch& out = own.inner[map];
        for (long b = 0; b < B; b++)
            each(width, [&](long i) {
                Vec<WIDTH> sum = {};
                for (long part = map * parts; part < (map + 1) * parts; part++)
                    sum += load<WIDTH>(partial[part][b] + i);
                store<WIDTH>(out[b] + i, activation(sum));
            });
        return out;
    }
    // The second half for channels [from, to): base + inner @ matrix
    void widen_out(const Matrix& matrix, const Batch& inner, const float* base, long from, long to,
        const Batch& out) {
        for (long b = 0; b < B; b++)
            for (long c = from; c < to; c++) out[b][c] = base ? base[c] : 0.f;
        add_columns(matrix, inner.data(), B, 0, matrix.rows, from, to, out.data());
    }

    // work(b, c) for the thread's pairs of a row and a head, whose channels begin at c and whose output is
    // then prepared for the product with a matrix
    template <class Work> void heads(const Matrix& output, int thread, Work work) {
        const auto [begin, end] = share(B * H, thread, pool.threads);
        const bool in_pieces = N % unit(output.type) == 0;
        for (long pair = begin; pair < end; pair++) {
            const long b = pair / H, c = pair % H * N;
            work(b, c);
            if (in_pieces) prepare(output.type, for_output.plain[b], A, c, c + N, input(for_output), b);
        }
        pool.barrier();
        if (in_pieces) return;
        for_rows(thread, [&](long b) { prepared(output, for_output, b); });
        pool.barrier();
    }

    void add_to_x(const Matrix& matrix, const Site& site, Own& own, int thread, bool gated = false) {
        narrow(own, thread, {{&matrix, &site}});
        const auto [begin, end] = rows(matrix, site, own, thread, added.data());
        for (long b = 0; b < B; b++)
            for (long c = begin; c < end; c += WIDTH) {
                auto change = load<WIDTH>(added[b] + c);
                if (gated) change *= sigmoid<WIDTH>(load<WIDTH>(gates[b] + c));
                store<WIDTH>(x[b] + c, load<WIDTH>(x[b] + c) + change);
            }
        pool.barrier();
    }
    void relu_squared(const Matrix& matrix, const Matrix& next, Own& own, int thread) {
        const auto [begin, end] =
            rows(matrix, for_ffn_k, own, thread, for_ffn_value.plain.data(), std::max(16L, unit(next.type)));
        if (begin == end) return;
        for (long b = 0; b < B; b++) {
            float* h = for_ffn_value.plain[b];
            for (long i = begin; i < end; i += WIDTH) {
                const auto product = load<WIDTH>(h + i);
                store<WIDTH>(h + i, choose<WIDTH>(product > 0.f, product * product, product * 0.f));
            }
            prepare(next.type, h, F, begin, end, input(for_ffn_value), b);
        }
    }

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
        float *r = this->r[row] + c, *k = this->k[row] + c, *v = this->v[row] + c, *y = for_output.plain[row] + c;
        const float *w = this->w[row] + c, *p = this->p[row] + c, *q = this->q[row] + c, *g = this->g[row] + c;
        float* first = this->first[row] + c;
        Vec<W> square = {}, bonus = {};
        each<W>(N, [&](long n) {
            auto at = [&](const float* t) { return load<W>(t + n); };
            auto own = [&](const Matrix& vector) { return load<W>(vector.vector() + c + n); };
            if (l) store<W>(v + n, at(v) + (at(first) - at(v)) * sigmoid<W>(at(q)));
            else store<W>(first + n, at(v));
            const Vec<W> kappa = at(k) * own(layer.k_k), a = sigmoid<W>(at(p)),
                         key = at(k) * (1.f + (a - 1.f) * own(layer.k_a));
            square += kappa * kappa;
            bonus += at(r) * key * own(layer.r_k);
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

    const long version, L, C, A, H, N, F, V, room;
    std::vector<Matrix> all;
    const Model* model;
    const Layer6* layers6;
    const Layer7* layers7;
    long parts = 0;
    // by number; of a change's place in a table, the place of its matrix in `all`
    std::vector<std::vector<Change>> tables;
    long widest = 0, room_of_inner = 0;
    // of this step
    long B = 0;
    const float* strength = nullptr;
    std::vector<Group> groups;
    // of all threads: the residual stream, the inputs of products, the vectors of the time mix, the channel
    // mix's, and the parts of the low-rank maps
    Batch x, z, last, mix_w, mix_a, mix_g, r, k, v, g, first, w, p, q, gates, added;
    Site for_r, for_k, for_v, for_g, for_output, for_ffn_k, for_ffn_r, for_ffn_value, for_head;
    std::vector<Batch> partial;
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
