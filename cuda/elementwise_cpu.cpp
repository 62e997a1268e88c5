// Functions between the matrix products of a layer, on a CPU: each reads its inputs and writes its outputs
// once, and a backward recomputes from the inputs what it needs. src/ops/elementwise_reference.py
// has the formulas; arithmetic is fp32 here whatever the dtype.
//
// The C interface: activations are contiguous (B, T, C) of one dtype; C and the head size are multiples of 8,
// a head has at most 256 channels; vectors of the model are fp32 (C). No pointer need be aligned.
#include "cpu.h"

namespace {

struct Shape {
    long B, T, C, H;
    float eps;
    int dtype, threads;
    long N() const { return C / H; }
    long numbers() const { return B * T * C; }
};

template <int W> inline Vec<W> square_root(Vec<W> x) {
    for (int l = 0; l < W; l++) x[l] = __builtin_sqrtf(x[l]);
    return x;
}

// run(lanes, number): the widest vectors that `width` is a multiple of, and the type of the activations
template <class Run> inline void typed(long width, int dtype, Run run) {
    auto with = [&](auto lanes) { dtype == kFloat32 ? run(lanes, float()) : run(lanes, uint16_t()); };
    width % WIDTH ? with(std::integral_constant<int, NARROW>()) : with(std::integral_constant<int, WIDTH>());
}

// work(first, last) over parts of `total`, each a multiple of `unit`. Fewer than SMALL numbers are not shared
// out: waking the threads takes as long as the work on about that many.
constexpr long SMALL = 1 << 16;
template <class Work> inline void shared_out(long total, long unit, long numbers, int threads, Work work) {
    const long units = total / unit, parts = std::min<long>(units, numbers < SMALL ? 1 : 4 * threads);
    parallel(parts, threads,
        [&](long part, int) { work(units * part / parts * unit, units * (part + 1) / parts * unit); });
}

// run(lanes, number, index) for every vector of an elementwise function of the whole tensor
template <class Run> inline void each(const Shape& s, Run run) {
    typed(s.C, s.dtype, [&](auto lanes, auto number) {
        constexpr int W = lanes;
        shared_out(s.numbers(), W, s.numbers(), s.threads, [&](long first, long last) {
            for (long i = first; i < last; i += W) run(lanes, number, i);
        });
    });
}

// run(lanes, number, row, head) for every head of every token; both are offsets, into activations and into
// vectors of the model
template <class Run> inline void each_head(const Shape& s, Run run) {
    typed(s.N(), s.dtype, [&](auto lanes, auto number) {
        shared_out(s.B * s.T, 1, s.numbers(), s.threads, [&](long first, long last) {
            for (long row = first; row < last; row++)
                for (long head = 0; head < s.C; head += s.N()) run(lanes, number, row * s.C + head, head);
        });
    });
}

// ---- token shift: out_i = z + (z_before - z) mix_i, with mix_i (C), or for every token mix_i + m_i, m_i (B,
// T, C) ----

constexpr long TOKENS = 8;

struct Shift {
    const void *z, *last;
    const uint8_t* reset;
    const float* mix;
    int64_t count;
    bool starts(const Shape& s, long b, long t) const { return reset && reset[b * s.T + t]; }
};

// run(lanes, number, b, first, last): columns of one row of the batch, all tokens; `tensors` are
// written or read
template <class Run> inline void each_column(const Shape& s, long tensors, Run run) {
    typed(s.C, s.dtype, [&](auto lanes, auto number) {
        for (long b = 0; b < s.B; b++)
            shared_out(s.C, lanes, s.T * s.C * tensors, s.threads,
                [&](long first, long last) { run(lanes, number, b, first, last); });
    });
}

template <bool PER_TOKEN> void shift_forward(const Shift& in, void* const* out, const Shape& s) {
    each_column(s, in.count, [&](auto lanes, auto number, long b, long first, long last) {
        constexpr int W = lanes;
        typedef decltype(number) Number;
        // some tokens of one output before those of the next: longer runs of stores, and z stays in the L1
        // cache
        for (long block = 0; block < s.T; block += TOKENS)
            for (int i = 0; i < in.count; i++)
                for (long t = block; t < std::min(block + TOKENS, s.T); t++) {
                    const long row = (b * s.T + t) * s.C;
                    const Number* z = (const Number*)in.z + row;
                    const Number* before = t ? z - s.C : (const Number*)in.last + b * s.C;
                    const bool starts = in.starts(s, b, t);
                    Number* to = (Number*)out[i] + row;
                    for (long c = first; c < last; c += W) {
                        const auto now = read<W>(z + c);
                        auto mix = load<W>(in.mix + i * s.C + c);
                        if (PER_TOKEN) mix += read<W>(to + c);
                        write<W>(to + c, multiply_add(starts ? -now : read<W>(before + c) - now, mix, now));
                    }
                }
    });
}

template <bool PER_TOKEN> void shift_backward(
    const Shift& in, void* const* m, const void* const* dout, void* dz, void* dlast, const Shape& s) {
    each_column(s, in.count, [&](auto lanes, auto number, long b, long first, long last) {
        constexpr int W = lanes;
        typedef decltype(number) Number;
        Buffer buffer(s.C);
        float* after = buffer.data;  // the next token's share of this token's gradient
        std::fill(after + first, after + last, 0.f);
        for (long t = s.T - 1; t >= 0; t--) {
            const long row = (b * s.T + t) * s.C;
            const Number* z = (const Number*)in.z + row;
            const Number* before = t ? z - s.C : (const Number*)in.last + b * s.C;
            const bool starts = in.starts(s, b, t);
            for (long c = first; c < last; c += W) {
                Vec<W> own = load<W>(after + c), shifted = {}, d = {};
                if (PER_TOKEN) d = (starts ? Vec<W>{} : read<W>(before + c)) - read<W>(z + c);
                for (int i = 0; i < in.count; i++) {
                    const auto g = read<W>((const Number*)dout[i] + row + c);
                    auto mix = load<W>(in.mix + i * s.C + c);
                    if (PER_TOKEN) {
                        Number* p = (Number*)m[i] + row + c;
                        mix += read<W>(p);
                        write<W>(p, g * d);
                    }
                    own += g;
                    shifted = multiply_add(g, mix, shifted);
                }
                write<W>((Number*)dz + row + c, own - shifted);
                store<W>(after + c, starts ? Vec<W>{} : shifted);
            }
        }
        for (long c = first; c < last; c += W) write<W>((Number*)dlast + b * s.C + c, load<W>(after + c));
    });
}

// ---- one head of one token ----

template <int W> struct HeadVectors {
    Vec<W> x[256 / W];
    Vec<W>& operator[](long c) { return x[c / W]; }
};

}  // namespace

#define SIZES int64_t B, int64_t T, int64_t C, int64_t H, float eps, int dtype, int threads
#define SHAPE Shape{B, T, C, H, eps, dtype, threads}
#define IN(x) ((const decltype(number)*)(x))
#define OUT(x) ((decltype(number)*)(x))

extern "C" {

void shift_mix_forward(const void* z, const void* last, const uint8_t* reset, const float* mix,
    void* const* out, int64_t count, SIZES) {
    shift_forward<false>({z, last, reset, mix, count}, out, SHAPE);
}

void shift_mix_backward(const uint8_t* reset, const float* mix, const void* const* dout, void* dz,
    void* dlast, int64_t count, SIZES) {
    shift_backward<false>({nullptr, nullptr, reset, mix, count}, nullptr, dout, dz, dlast, SHAPE);
}

// m becomes out, in place
void shift_mix_token_forward(const void* z, const void* last, const uint8_t* reset, const float* mix,
    void* const* m, int64_t count, SIZES) {
    shift_forward<true>({z, last, reset, mix, count}, m, SHAPE);
}

// m becomes its gradient, in place
void shift_mix_token_backward(const void* z, const void* last, const uint8_t* reset, const float* mix,
    void* const* m, const void* const* dout, void* dz, void* dlast, int64_t count, SIZES) {
    shift_backward<true>({z, last, reset, mix, count}, m, dout, dz, dlast, SHAPE);
}

void relu_squared_forward(const void* x, void* y, SIZES) {
    each(SHAPE, [=](auto lanes, auto number, long i) {
        constexpr int W = lanes;
        const auto p = read<W>(IN(x) + i), positive = choose<W>(p < 0.f, Vec<W>{}, p);
        write<W>(OUT(y) + i, positive * positive);
    });
}

void relu_squared_backward(const void* y, const void* dy, void* dx, SIZES) {
    each(SHAPE, [=](auto lanes, auto number, long i) {
        constexpr int W = lanes;
        write<W>(OUT(dx) + i, 2.f * square_root<W>(read<W>(IN(y) + i)) * read<W>(IN(dy) + i));
    });
}

void value_residual_forward(const void* v, const void* first, const void* gate, void* y, SIZES) {
    each(SHAPE, [=](auto lanes, auto number, long i) {
        constexpr int W = lanes;
        const auto own = read<W>(IN(v) + i);
        write<W>(OUT(y) + i,
            multiply_add(read<W>(IN(first) + i) - own, sigmoid<W>(read<W>(IN(gate) + i)), own));
    });
}

// dlater, or null: what the later layers make of the gradient of `first`. A sum of tensors has the same bits.
void value_residual_backward(const void* v, const void* first, const void* gate, const void* dy,
    const void* dlater, void* dv, void* dfirst, void* dgate, SIZES) {
    each(SHAPE, [=](auto lanes, auto number, long i) {
        constexpr int W = lanes;
        const auto s = sigmoid<W>(read<W>(IN(gate) + i)), g = read<W>(IN(dy) + i), d = g * s;
        write<W>(OUT(dgate) + i, d * (1.f - s) * (read<W>(IN(first) + i) - read<W>(IN(v) + i)));
        write<W>(OUT(dfirst) + i, d);
        if (dlater) write<W>(OUT(dfirst) + i, read<W>(IN(dlater) + i) + read<W>(IN(dfirst) + i));
        write<W>(OUT(dv) + i, g - d);
    });
}

// kappa = normalize(k k_k), s = sigmoid(a): k (1 + (s - 1) k_a), -kappa, kappa s
void delta_inputs_forward(const void* k, const void* a, const float* k_k, const float* k_a, void* key,
    void* remove, void* replace, SIZES) {
    const Shape shape = SHAPE;
    each_head(shape, [=](auto lanes, auto number, long row, long head) {
        constexpr int W = lanes;
        const long N = shape.N();
        Vec<W> squares = {};
        for (long c = 0; c < N; c += W) {
            const auto u = read<W>(IN(k) + row + c) * load<W>(k_k + head + c);
            squares = multiply_add(u, u, squares);
        }
        const float scale = 1.f / std::max(std::sqrt(sum<W>(squares)), 1e-12f);
        for (long c = 0; c < N; c += W) {
            const auto own = read<W>(IN(k) + row + c), s = sigmoid<W>(read<W>(IN(a) + row + c)),
                       kappa = own * load<W>(k_k + head + c) * scale;
            write<W>(OUT(key) + row + c, own * (1.f + (s - 1.f) * load<W>(k_a + head + c)));
            write<W>(OUT(remove) + row + c, -kappa);
            write<W>(OUT(replace) + row + c, kappa * s);
        }
    });
}

void delta_inputs_backward(const void* k, const void* a, const float* k_k, const float* k_a, const void* dkey,
    const void* dremove, const void* dreplace, void* dk, void* da, SIZES) {
    const Shape shape = SHAPE;
    each_head(shape, [=](auto lanes, auto number, long row, long head) {
        constexpr int W = lanes;
        const long N = shape.N();
        HeadVectors<W> dkappa, s;
        Vec<W> squares = {}, dots = {};
        for (long c = 0; c < N; c += W) {
            const auto u = read<W>(IN(k) + row + c) * load<W>(k_k + head + c);
            s[c] = sigmoid<W>(read<W>(IN(a) + row + c));
            dkappa[c] = read<W>(IN(dreplace) + row + c) * s[c] - read<W>(IN(dremove) + row + c);
            squares = multiply_add(u, u, squares);
            dots = multiply_add(u, dkappa[c], dots);
        }
        const float norm = std::sqrt(sum<W>(squares)), scale = 1.f / std::max(norm, 1e-12f);
        // a norm that is held at its least has no gradient
        const float along = norm > 1e-12f ? sum<W>(dots) * scale * scale : 0.f;
        for (long c = 0; c < N; c += W) {
            const auto own = read<W>(IN(k) + row + c), kk = load<W>(k_k + head + c),
                       ka = load<W>(k_a + head + c), u = own * kk;
            const auto g = read<W>(IN(dkey) + row + c),
                       ds = read<W>(IN(dreplace) + row + c) * u * scale + g * own * ka;
            write<W>(OUT(dk) + row + c, (dkappa[c] - u * along) * scale * kk + g * (1.f + (s[c] - 1.f) * ka));
            write<W>(OUT(da) + row + c, ds * s[c] * (1.f - s[c]));
        }
    });
}

void readout7_forward(const void* y, const void* r, const void* k, const void* v, const void* g,
    const float* r_k, const float* weight, const float* bias, void* out, SIZES) {
    const Shape shape = SHAPE;
    each_head(shape, [=](auto lanes, auto number, long row, long head) {
        constexpr int W = lanes;
        const long N = shape.N();
        const auto [mean, scale] = moments<W>(IN(y) + row, N, eps);
        Vec<W> products = {};
        for (long c = 0; c < N; c += W)
            products = multiply_add(
                read<W>(IN(r) + row + c) * read<W>(IN(k) + row + c), load<W>(r_k + head + c), products);
        const float bonus = sum<W>(products);
        for (long c = 0; c < N; c += W) {
            const auto normed = multiply_add((read<W>(IN(y) + row + c) - mean) * scale,
                load<W>(weight + head + c), load<W>(bias + head + c));
            write<W>(
                OUT(out) + row + c, (normed + bonus * read<W>(IN(v) + row + c)) * read<W>(IN(g) + row + c));
        }
    });
}

void readout7_backward(const void* y, const void* r, const void* k, const void* v, const void* g,
    const float* r_k, const float* weight, const float* bias, const void* dout, void* dy, void* dr, void* dk,
    void* dv, void* dg, SIZES) {
    const Shape shape = SHAPE;
    each_head(shape, [=](auto lanes, auto number, long row, long head) {
        constexpr int W = lanes;
        const long N = shape.N();
        const auto [mean, scale] = moments<W>(IN(y) + row, N, eps);
        HeadVectors<W> normed, dnormed, d;
        Vec<W> products = {}, dproducts = {}, sums = {}, dots = {};
        for (long c = 0; c < N; c += W) {
            products = multiply_add(
                read<W>(IN(r) + row + c) * read<W>(IN(k) + row + c), load<W>(r_k + head + c), products);
            d[c] = read<W>(IN(dout) + row + c) * read<W>(IN(g) + row + c);
            dproducts = multiply_add(d[c], read<W>(IN(v) + row + c), dproducts);
            normed[c] = (read<W>(IN(y) + row + c) - mean) * scale;
            dnormed[c] = d[c] * load<W>(weight + head + c);
            sums += dnormed[c];
            dots = multiply_add(dnormed[c], normed[c], dots);
        }
        const float bonus = sum<W>(products), dbonus = sum<W>(dproducts), mean_d = sum<W>(sums) / N,
                    mean_dot = sum<W>(dots) / N;
        for (long c = 0; c < N; c += W) {
            const auto value = read<W>(IN(v) + row + c), rk = dbonus * load<W>(r_k + head + c);
            const auto gated =
                normed[c] * load<W>(weight + head + c) + load<W>(bias + head + c) + bonus * value;
            const auto receptance = read<W>(IN(r) + row + c), key = read<W>(IN(k) + row + c);
            write<W>(OUT(dg) + row + c, read<W>(IN(dout) + row + c) * gated);
            write<W>(OUT(dv) + row + c, bonus * d[c]);
            write<W>(OUT(dr) + row + c, rk * key);
            write<W>(OUT(dk) + row + c, rk * receptance);
            write<W>(OUT(dy) + row + c, scale * (dnormed[c] - mean_d - normed[c] * mean_dot));
        }
    });
}

void readout6_forward(
    const void* y, const void* g, const float* weight, const float* bias, void* out, SIZES) {
    const Shape shape = SHAPE;
    each_head(shape, [=](auto lanes, auto number, long row, long head) {
        constexpr int W = lanes;
        const long N = shape.N();
        const auto [mean, scale] = moments<W>(IN(y) + row, N, eps);
        for (long c = 0; c < N; c += W) {
            const auto normed = multiply_add((read<W>(IN(y) + row + c) - mean) * scale,
                load<W>(weight + head + c), load<W>(bias + head + c));
            const auto gate = read<W>(IN(g) + row + c);
            write<W>(OUT(out) + row + c, normed * gate * sigmoid<W>(gate));
        }
    });
}

void readout6_backward(const void* y, const void* g, const float* weight, const float* bias, const void* dout,
    void* dy, void* dg, SIZES) {
    const Shape shape = SHAPE;
    each_head(shape, [=](auto lanes, auto number, long row, long head) {
        constexpr int W = lanes;
        const long N = shape.N();
        const auto [mean, scale] = moments<W>(IN(y) + row, N, eps);
        HeadVectors<W> normed, dnormed;
        Vec<W> sums = {}, dots = {};
        for (long c = 0; c < N; c += W) {
            const auto gate = read<W>(IN(g) + row + c), s = sigmoid<W>(gate), d = read<W>(IN(dout) + row + c),
                       w = load<W>(weight + head + c);
            normed[c] = (read<W>(IN(y) + row + c) - mean) * scale;
            write<W>(OUT(dg) + row + c,
                d * (normed[c] * w + load<W>(bias + head + c)) * s * (1.f + gate * (1.f - s)));
            dnormed[c] = d * gate * s * w;
            sums += dnormed[c];
            dots = multiply_add(dnormed[c], normed[c], dots);
        }
        const float mean_d = sum<W>(sums) / N, mean_dot = sum<W>(dots) / N;
        for (long c = 0; c < N; c += W)
            write<W>(OUT(dy) + row + c, scale * (dnormed[c] - mean_d - normed[c] * mean_dot));
    });
}
}
