// Parts of the decoder (decode_cpu.cpp) beside its layers: its vectors, the division of the rows of matrices
// and of activations among threads, products with the changes of adapters, and low-rank maps.
#pragma once
#include <memory>

#include "decode_cpu.h"
#include "decode_threads.h"

// Change of a matrix by an adapter: scale * B A. A (rank, columns); B transposed, (rank, rows); fp32.
// Of the embedding A has `rank` int64 instead: the tokens whose rows those of B are added to.
// Without A it is MiSS's, whose A x are the sums of strided shards, x[j] + x[j + rank] + ... Rank 0: nothing.
struct Change {
    int64_t rank;
    double scale;
    const float *A, *B;
};
inline Matrix fp32_matrix(const float* data, long rows, long columns) {
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

// All of the decoder but the layers.
class DecoderParts {
public:
    DecoderParts(long version, const int64_t* sizes, const Matrix* matrices, long count, int threads)
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

protected:
    // Memory of one thread: the inner activations of the low-rank maps, and room for the rows of a
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

    void embed(long token, long number, long b) {
        float* own = z[b];
        for (long c = 0; c < C; c++)
            own[c] = model->emb.type == kFp32
                         ? model->emb.vector()[token * C + c]
                         : value(static_cast<const uint16_t*>(model->emb.data) + token * C + c);
        if (number >= 0) add_row(tables[number][&model->emb - all.data()], token, strength[b], own);
        layer_norm(own, C, model->ln0_weight, model->ln0_bias, x[b]);
    }

    void add_row(const Change& change, long token, float strength, float* own) {
        const auto* ids = reinterpret_cast<const int64_t*>(change.A);
        for (long i = 0; i < change.rank; i++) {
            if (ids[i] != token) continue;
            const float scale = static_cast<float>(change.scale) * strength;
            for (long c = 0; c < C; c++) own[c] += scale * change.B[i * C + c];
        }
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
                    const long count = group.rows.size();
                    const Input plain{chosen(group, site->plain, own.from), count};
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
