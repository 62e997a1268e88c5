// The next tokens of many answers, on a CPU: penalties, top-k, top-p, temperature, the draw, and logprobs.
// src/inference/sampling.py says what they mean and has the same in NumPy.
//
// Tokens are ordered by their logit, the largest first, and equal ones by their id. Few of them are looked at
// more than once: the largest logit of each block of 64 tells where the k largest of all are, and those are
// sorted. Where they don't hold enough probability the distribution is flat, and sorting would take longer
// than a small model's logits. Then the probability is added up in bins of the logit, and only the bin
// in which the sum reaches its goal is looked into.
//
// The C interface: logits (rows, V) fp32, `stride` numbers from row to row; a Choice for each row.
#include <numeric>

#include "cpu.h"

namespace {

constexpr int W = WIDTH;
constexpr long BLOCK = 64, BINS = 1024;
typedef Lanes<W>::I Index;

struct Choice {
    double temperature, top_p, uniform;  // a temperature of 0 is greedy; uniform is in [0, 1)
    int64_t top_k;                       // 0: all
    int64_t penalised, logprobs;         // how many tokens have penalties; of how many ln p is wanted, or -1
    const int64_t* ids;
    const float* penalties;
    int64_t* likeliest;  // (logprobs) the likeliest tokens, in their order
    double* likeliest_logprobs;
    // results
    double logprob;
    int64_t token;  // -1 where the largest logit is not finite
    float largest;
};

// ascending keys are tokens in their order
uint64_t key(float logit, long id) {
    uint32_t bits;
    logit += 0.f;  // -0 is 0
    memcpy(&bits, &logit, sizeof bits);
    bits = bits >> 31 ? bits : ~bits & 0x7fffffffu;
    return uint64_t(bits) << 32 | uint64_t(id);
}
long id_of(uint64_t key) { return long(key & 0xffffffffu); }

Vec<W> larger(Vec<W> x, Vec<W> y) { return choose<W>(x > y, x, y); }

// memory that a thread keeps between calls
struct Scratch {
    std::vector<float> values, weights, maxima, sorted_maxima, sums;
    std::vector<uint64_t> keys;
    std::vector<double> shares, mass;
};

class Row {
public:
    Row(const float* logits, long V, Scratch& scratch)
        : x(logits), V(V), blocks((V + BLOCK - 1) / BLOCK), s(scratch) {
        Index nan{};
        by_block(s.maxima, -INFINITY, larger, [&](long i, Vec<W> before) {
            const Vec<W> now = numbers(x, i, V);
            nan |= now != now;
            return larger(now, before);
        });
        most = *std::max_element(s.maxima.begin(), s.maxima.end());
        for (int l = 0; l < W; l++)
            if (nan[l]) most = NAN;
    }

    long first_of_largest() const {
        const long block = std::find(s.maxima.begin(), s.maxima.end(), most) - s.maxima.begin();
        return std::find(x + block * BLOCK, x + V, most) - x;
    }

    // weights = exp((logit - most) / temperature) up to the token `last`, and behind it 0; their sum
    double weigh(double temperature, uint64_t last = END) {
        // not 0, which would make NaN of -inf
        const float colder = std::max(float(1 / temperature), 1e-30f);
        const float limit = last == END ? -INFINITY : x[id_of(last)];
        const int last_id = last == END ? INT32_MAX : int(id_of(last));
        s.weights.resize((V + W - 1) / W * W);
        Index lane{};
        for (int l = 0; l < W; l++) lane[l] = l;
        by_block(s.sums, 0.f, plus, [&](long i, Vec<W> before) {
            const Vec<W> now = numbers(x, i, V);
            const Index kept = (now > limit) | ((now == limit) & (lane + int(i) <= last_id));
            const Vec<W> weight = choose<W>(kept, exponential<W>((now - most) * colder), Vec<W>{});
            store<W>(s.weights.data() + i, weight);
            return before + weight;
        });
        return std::accumulate(s.sums.begin(), s.sums.end(), 0.0);
    }

    // keys of the first `count` tokens, or of all, in their order
    std::vector<uint64_t>& first(long count) {
        float threshold = -INFINITY;
        if (count < blocks) {
            // as many blocks have a token that is at least as large
            s.sorted_maxima = s.maxima;
            const auto place = s.sorted_maxima.begin() + std::max(0L, count - 1);
            std::nth_element(s.sorted_maxima.begin(), place, s.sorted_maxima.end(), std::greater<float>());
            threshold = *place;
        }
        s.keys.clear();
        for (long b = 0; b < blocks; b++) {
            if (!(s.maxima[b] >= threshold)) continue;
            for (long i = b * BLOCK; i < std::min(V, (b + 1) * BLOCK); i++)
                if (x[i] >= threshold) s.keys.push_back(key(x[i], i));
        }
        if (count < long(s.keys.size())) {
            std::nth_element(s.keys.begin(), s.keys.begin() + count, s.keys.end());
            s.keys.resize(count);
        }
        std::sort(s.keys.begin(), s.keys.end());
        return s.keys;
    }

    long draw(const Choice& choice) {
        if (choice.top_k) {
            auto& order = first(std::min<int64_t>(choice.top_k, V));
            double sum = 0;
            for (uint64_t key : order) sum += weight(key);
            const long kept = reaching(order, choice.top_p * sum);
            return among(order, kept ? kept : long(order.size()), choice);
        }
        if (choice.top_p >= 1) return among_weights(weigh(choice.temperature), choice);
        const double goal = choice.top_p * weigh(1);
        for (long count : {64L, 512L}) {
            auto& order = first(count);
            if (const long kept = reaching(order, goal)) return among(order, kept, choice);
            double sum = 0;
            for (uint64_t key : order) sum += weight(key);
            // the next 448 have at most 7 times as much
            if (8 * sum < goal) break;
        }
        return among_weights(weigh(choice.temperature, reaching_key(goal)), choice);
    }

private:
    static constexpr uint64_t END = ~0ull;
    static constexpr auto plus = [](Vec<W> x, Vec<W> y) { return x + y; };

    // reduces the vectors of each block to one number: vector(i, the vectors before), then join(lane, lane)
    template <class Join, class Vector>
    void by_block(std::vector<float>& result, float start, Join join, Vector vector) {
        result.resize((blocks + W - 1) / W * W);
        for (long b = 0; b < blocks; b += W) {
            Vec<W> rows[W];
            for (int l = 0; l < W; l++) {
                rows[l] = fill<W>(start);
                for (long i = (b + l) * BLOCK; i < std::min(V, (b + l + 1) * BLOCK); i += W)
                    rows[l] = vector(i, rows[l]);
            }
            store<W>(result.data() + b, joined_rows<W>(rows, join));
        }
        result.resize(blocks);
    }

    float weight(uint64_t key) const { return exponential<1>(Vec<1>{x[id_of(key)] - most})[0]; }

    // how many of the tokens it takes to reach a sum of weights; 0 if all do not
    long reaching(const std::vector<uint64_t>& order, double goal) const {
        double sum = 0;
        for (size_t i = 0; i < order.size(); i++)
            if ((sum += weight(order[i])) >= goal) return i + 1;
        return 0;
    }

    // one of the first `kept` tokens
    long among(std::vector<uint64_t>& order, long kept, const Choice& choice) {
        double sum = 0;
        s.shares.resize(kept);
        const auto by_id = [](uint64_t a, uint64_t b) { return id_of(a) < id_of(b); };
        std::sort(order.begin(), order.begin() + kept, by_id);
        for (long i = 0; i < kept; i++)
            s.shares[i] = sum +=
                std::exp((double(x[id_of(order[i])]) - double(most)) / choice.temperature);
        const auto drawn = std::upper_bound(s.shares.begin(), s.shares.end() - 1, choice.uniform * sum);
        return id_of(order[drawn - s.shares.begin()]);
    }

    // one of the tokens that have a weight; rounding may leave the goal behind the last of them
    long among_weights(double sum, const Choice& choice) const {
        const double goal = choice.uniform * sum;
        double before = 0;
        long found = 0;
        for (long b = 0, block = -1; b < blocks; b++) {
            if (s.sums[b] > 0) block = b;
            if (before + s.sums[b] <= goal && b + 1 < blocks) {
                before += s.sums[b];
                continue;
            }
            for (long i = block * BLOCK; i < std::min(V, (block + 1) * BLOCK); i++) {
                if (s.weights[i] > 0) found = i;
                if ((before += s.weights[i]) > goal) break;
            }
            break;
        }
        return found;
    }

    // the first token, in their order, at which the sum of the weights reaches a goal; the last one if
    // rounding leaves all below it
    uint64_t reaching_key(double goal) {
        fill_bins();
        double before = 0, sum = 0;
        long bin = 0;
        for (long b = 0; b < BINS && sum < goal; b++) {
            const double more = s.mass[2 * b] + s.mass[2 * b + 1];
            if (more > 0) bin = b, before = sum, sum += more;
        }
        collect(bin);
        // by halves, as thousands may be in one bin
        auto first = s.keys.begin(), last = s.keys.end();
        while (last - first > 32) {
            const auto middle = first + (last - first) / 2;
            std::nth_element(first, middle, last);
            double half = before;
            for (auto k = first; k < middle; k++) half += s.weights[id_of(*k)];
            if (half >= goal) last = middle;
            else first = middle, before = half;
        }
        std::sort(first, last);
        while ((before += s.weights[id_of(*first)]) < goal && first + 1 < last) first++;
        return *first;
    }

    // the bins divide the logits that have a weight
    Index bins(Vec<W> logits) const {
        const Vec<W> place = (most - logits) * bins_per_unit, end = fill<W>(BINS - 1);
        return __builtin_convertvector(choose<W>(place < end, place, end), Index);
    }

    void fill_bins() {
        Vec<W> lowest = fill<W>(most);
        for (long i = 0; i < V; i += W) {
            const Vec<W> now = numbers(x, i, V);
            lowest = choose<W>((load<W>(s.weights.data() + i) > 0.f) & (now < lowest), now, lowest);
        }
        float range = 0;
        for (int l = 0; l < W; l++) range = std::max(range, most - lowest[l]);
        bins_per_unit = range > 0 ? std::min(float(BINS) / range, 1e30f) : 0.f;
        // neighbours are often in the same bin: they add to different sums, and wait for none
        s.mass.assign(2 * BINS, 0.0);
        for (long block = 0; block < V; block += BLOCK) {
            int32_t bin[BLOCK];
            const long end = std::min(V, block + BLOCK);
            for (long i = block; i < end; i += W) {
                const Index found = bins(numbers(x, i, V));
                memcpy(bin + i - block, &found, sizeof found);
            }
            for (long i = block; i < end; i++) s.mass[2 * bin[i - block] + (i & 1)] += s.weights[i];
        }
    }

    // keys of the tokens of a bin
    void collect(long bin) {
        s.keys.clear();
        for (long block = 0; block < V; block += BLOCK) {
            const long end = std::min(V, block + BLOCK);
            Index here{};
            for (long i = block; i < end; i += W) here |= bins(numbers(x, i, V)) == int(bin);
            int32_t any = 0;
            for (int l = 0; l < W; l++) any |= here[l];
            if (!any) continue;
            for (long i = block; i < end; i += W) {
                const Index bin_of = bins(numbers(x, i, V));
                for (int l = 0; l < W && i + l < end; l++)
                    if (bin_of[l] == bin && s.weights[i + l] > 0) s.keys.push_back(key(x[i + l], i + l));
            }
        }
    }

    const float* x;
    const long V, blocks;
    Scratch& s;
    float bins_per_unit = 0;

public:
    float most;  // the largest logit; NaN where one is
};

void add_logprobs(Row& raw, const float* logits, Choice& choice) {
    const double log_total = std::log(raw.weigh(1));
    auto logprob = [&](long id) { return double(logits[id]) - double(raw.most) - log_total; };
    choice.logprob = logprob(choice.token);
    if (!choice.logprobs) return;
    auto& order = raw.first(choice.logprobs);
    for (size_t i = 0; i < order.size(); i++) {
        choice.likeliest[i] = id_of(order[i]);
        choice.likeliest_logprobs[i] = logprob(id_of(order[i]));
    }
}

void choose_token(const float* logits, long V, Choice& choice) {
    thread_local Scratch scratch;
    const float* values = logits;
    if (choice.penalised) {
        scratch.values.assign(logits, logits + V);
        for (long i = 0; i < choice.penalised; i++) scratch.values[choice.ids[i]] -= choice.penalties[i];
        values = scratch.values.data();
    }
    Row row(values, V, scratch);
    choice.largest = row.most;
    choice.token = -1;
    if (!std::isfinite(row.most)) return;
    choice.token = choice.temperature == 0 ? row.first_of_largest() : row.draw(choice);
    if (choice.logprobs < 0) return;
    if (values == logits) return add_logprobs(row, logits, choice);
    Row raw(logits, V, scratch);
    add_logprobs(raw, logits, choice);
}

}  // namespace

extern "C" int choose_tokens(
    const float* logits, int64_t stride, int64_t V, Choice* choices, int64_t rows, int threads) {
    // the pool's threads may spin on after it, on the cores where the decoder's compute the next token
    parallel<false>(rows, threads, [&](long i, int) { choose_token(logits + i * stride, V, choices[i]); });
    return 0;
}
