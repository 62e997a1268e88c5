// The cross entropy of a block of logits and its gradient in their place, on a CPU: a row is read three times
// while it is in the cache, for its largest logit, for the sum of the exponentials and for the gradient,
// which takes them again. Arithmetic is fp32. src/model/loss.py has the formula in plain torch.
//
// The C interface: logits (rows, V), contiguous, dtype 0 fp32 or 1 bf16; targets (rows) int64, each below V;
// weights (rows) fp32, which multiply loss and gradient, or null; loss (rows) fp32.
#include "cpu.h"

namespace {

constexpr int W = WIDTH;
typedef Lanes<W>::I Index;

template <class Number> float row_loss(Number* row, long V, long target, float weight, float l2wrap) {
    Vec<W> top = fill<W>(-INFINITY);
    Index where{}, lane{};
    for (int l = 0; l < W; l++) lane[l] = l;
    for (long i = 0; i < V; i += W) {
        const Vec<W> x = numbers(row, i, V);
        const Index larger = x > top;
        top = choose<W>(larger, x, top);
        where = larger ? lane + int(i) : where;
    }
    long first = where[0];
    float most = top[0];
    for (int l = 1; l < W; l++)
        if (top[l] > most || (top[l] == most && where[l] < first)) most = top[l], first = where[l];

    LongSum<W> total;
    for (long i = 0; i < V; i += W) total.add(exponential<W>(numbers(row, i, V) - most));
    const float all = sum<W>(total.value()), own = read<1>(row + target)[0];
    for (long i = 0; i < V; i += W) {
        const Vec<W> x = exponential<W>(numbers(row, i, V) - most) * (weight / all);
        if (i + W <= V) write<W>(row + i, x);
        else
            for (long l = 0; l < V - i; l++) write<1>(row + i + l, Vec<1>{x[l]});
    }
    auto add = [&](long i, float logit, float more) {
        write<1>(row + i, (exponential<1>(Vec<1>{logit - most}) * (1.f / all) + more) * weight);
    };
    const float pull = l2wrap * most;
    add(first, most, first == target ? pull - 1.f : pull);
    if (first != target) add(target, own, -1.f);
    return (std::log(all) + most - own) * weight;
}

}  // namespace

extern "C" int softmax_loss(void* logits, const int64_t* targets, const float* weights, float* loss,
    int64_t rows, int64_t V, float l2wrap, int dtype, int threads) {
    parallel(rows, threads, [&](long i, int) {
        const float weight = weights ? weights[i] : 1.f;
        auto one = [&](auto* all) { return row_loss(all + i * V, V, targets[i], weight, l2wrap); };
        loss[i] = dtype == kFloat32 ? one(static_cast<float*>(logits)) : one(static_cast<uint16_t*>(logits));
    });
    return 0;
}
