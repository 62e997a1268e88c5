// What lies between the matrix products of a layer, on a GPU: each function reads its inputs and writes its
// outputs once, in one kernel, and a backward makes again from the inputs what it needs.
// src/ops/elementwise_reference.py has the formulas, elementwise_cpu.cpp the same functions for a CPU.
// Arithmetic is fp32 whatever the dtype. elementwise.cuh says how tensors are laid out on the machine.
//
// No function goes over time: what token t + 1 gives to the gradient of t is computed where t is. That reads
// one token in TOKENS twice, from the cache, and lets all tokens run at once. The token shift reads z for
// each of its outputs, again from the cache: registers are too few to keep it.
//
// C interface: activations are contiguous (B, T, C) of one dtype, fp32, bf16 or fp16; C and the head size
// C / H are multiples of 8, a head has at most 256 channels; reset (B, T) is uint8 or null, not 0 where a
// document starts. Vectors of the model are (C), each of its own dtype: `vectors` are their pointers,
// `vector_dtypes` has two bits for each. Where `dvectors` is not null a backward also writes their gradients,
// each in its vector's dtype, and needs `partial`: elementwise_parts(B, T) x vectors x C floats. All pointers
// to numbers are multiples of 16 bytes. The last arguments and the result are as launch.h says.
//
// A linear with MiSS also reads the shard sums of its input, (B, T, rank): S[j] is the sum of the x[i] with
// i = j (mod rank). Where `rank` is not 0, a list `out` has outputs, then the sums of each, or null; they are
// made from the numbers in registers. A list `dout` has the gradients of both: those of the sums are added
// where those of the outputs are read. The rank is a power of two from 8 to 256, and so is the head size.
//
// A backward launches one kernel, and one more for the gradients of vectors.
#include "add_layer_norm.cuh"

namespace {

// ---- token shift ----

// out_i = z + (z_before - z) mix_i, with mix_i (C); PER_TOKEN: with mix_i + m_i, m_i (B, T, C)

struct Shift {
    const void *z, *last;
    const uint8_t* reset;
    Vectors mixes;

    __device__ bool starts(const Shape& shape, int64_t b, int64_t t) const {
        return reset && reset[b * shape.T + t];
    }
    // z_before - z of the j-th token from a place on
    template <class T> __device__ Vec difference(const Place<T>& at, int j = 0) const {
        const int64_t here = at.here + j * at.shape.C;
        const Vec before = starts(at.shape, at.b, at.t + j) ? Vec(0)
                           : at.t + j > 0                   ? at.read_at(z, here - at.shape.C)
                                          : at.read_at(last, at.b * at.shape.C + at.channel);
        return before - at.read_at(z, here);
    }
};

// a block for each token, whose warps share the channels
template <class T, bool PER_TOKEN> __global__ void __launch_bounds__(THREADS, 2)
    shift_forward(Shift in, Tensors m, Tensors out, Shape shape) {
    Place<T> at(shape, blockIdx.x);
    for (int i = 0; i < in.mixes.count; i++) {
        for (int group = threadIdx.x / 32; group < shape.groups(); group += blockDim.x / 32) {
            at.go_to_group(group);
            const Vec mix = at.vector(in.mixes, i), share = PER_TOKEN ? mix + at.read(m.of[i]) : mix;
            at.write(out, at.read(in.z) + in.difference(at) * share, i);
        }
        at.write_sums(out, i);
    }
}

// dm_i = dout_i (z_before - z), and its sum over all tokens is the gradient of mix_i
template <class T, bool PER_TOKEN, bool SUMS> __global__ void __launch_bounds__(THREADS, 2) shift_backward(
    Shift in, Tensors m, Tensors dout, void* dz, void* dlast, Tensors dm, float* partial, Shape shape) {
    Place<T> at(shape);
    // gradients of the token before the warp's first, and of the warp's
    Vec found[TOKENS + 1] = {};
    for (int i = 0; i < in.mixes.count; i++) {
        const Vec mix = at.vector(in.mixes, i);
        Vec sum = 0;
#pragma unroll
        for (int j = 0; j <= TOKENS; j++) {
            const int64_t t = at.t + j, here = at.here + j * shape.C;
            if (t >= shape.T) break;
            const Vec g = at.read(dout, i, j);
            if ((PER_TOKEN || SUMS) && j < TOKENS) {
                const Vec d = g * in.difference(at, j);
                if (PER_TOKEN) at.write_at(dm.of[i], here, d);
                if (SUMS) sum += d;
            }
            const Vec shifted = g * (PER_TOKEN ? mix + at.read_at(m.of[i], here) : mix);
            if (!in.starts(shape, at.b, t)) found[j] += shifted;
            if (j < TOKENS) found[j + 1] += g - shifted;
        }
        if (SUMS) at.add_warps(sum, partial, i, in.mixes.count);
    }
    if (at.t == 0) at.write_at(dlast, at.b * shape.C + at.channel, found[0]);
#pragma unroll
    for (int j = 0; j < TOKENS; j++)
        if (at.t + j < shape.T) at.write_at(dz, at.here + j * shape.C, found[j + 1]);
}

template <bool PER_TOKEN> int launch_shift_forward(
    const Shift& in, const Tensors& m, const Tensors& out, const Shape& shape, int dtype, void* stream) {
    if (!shape.valid() || !shape.summable(out.rank) || in.mixes.count > MOST_VECTORS)
        return cudaErrorInvalidValue;
    return typed(dtype, [&](auto number) {
        using T = decltype(number);
        LAUNCH((shift_forward<T, PER_TOKEN>), shape.rows(), shape.threads_of_row(), 0, stream, in, m, out,
            shape);
    });
}

template <bool PER_TOKEN> int launch_shift_backward(const Shift& in, const Tensors& m, const Tensors& dout,
    void* dz, void* dlast, const Tensors& dm, const Vectors* gradients, float* partial, const Shape& shape,
    int dtype, void* stream) {
    if (!shape.valid() || in.mixes.count > MOST_VECTORS) return cudaErrorInvalidValue;
    return typed(dtype, [&](auto number) {
        using T = decltype(number);
        if (gradients) {
            LAUNCH((shift_backward<T, PER_TOKEN, true>), shape.grid(), THREADS, 0, stream, in, m, dout, dz,
                dlast, dm, partial, shape);
            launch_add_parts(partial, shape, *gradients, stream);
        } else {
            LAUNCH((shift_backward<T, PER_TOKEN, false>), shape.grid(), THREADS, 0, stream, in, m, dout, dz,
                dlast, dm, partial, shape);
        }
    });
}

// ---- one token's channels by themselves ----

struct ReluSquared {
    static constexpr int VECTORS = 0;
    const void* x;
    Tensors out;
    template <class At> __device__ void operator()(const At& at, const Vec*, Vec*) const {
        const Vec a = at.read(x);
        at.write(out, each([&](int e) { return a[e] < 0 ? 0 : a[e] * a[e]; }));
    }
};

struct ReluSquaredBackward {
    static constexpr int VECTORS = 0;
    static constexpr int TRAINABLE = 0;
    const void* y;
    Tensors dy;
    void* dx;
    template <class At> __device__ void operator()(const At& at, const Vec*, Vec*) const {
        const Vec a = at.read(y), g = at.read(dy);
        at.write(dx, each([&](int e) { return 2 * sqrtf(a[e]) * g[e]; }));
    }
};

struct Gated {
    static constexpr int VECTORS = 0;
    static constexpr int TRAINABLE = 0;
    const void *x, *gate;
    void* y;
    template <class At> __device__ void operator()(const At& at, const Vec*, Vec*) const {
        at.write(y, at.read(x) * sigmoid(at.read(gate)));
    }
};

struct GatedBackward {
    static constexpr int VECTORS = 0;
    static constexpr int TRAINABLE = 0;
    const void *x, *gate, *dy;
    void *dx, *dgate;
    template <class At> __device__ void operator()(const At& at, const Vec*, Vec*) const {
        const Vec s = sigmoid(at.read(gate)), d = at.read(dy) * s;
        at.write(dgate, d * (1 - s) * at.read(x));
        at.write(dx, d);
    }
};

struct ValueResidual {
    static constexpr int VECTORS = 0;
    static constexpr int TRAINABLE = 0;
    const void *v, *first, *gate;
    void* y;
    template <class At> __device__ void operator()(const At& at, const Vec*, Vec*) const {
        const Vec own = at.read(v);
        at.write(y, own + (at.read(first) - own) * sigmoid(at.read(gate)));
    }
};

// dlater, or null: what the later layers make of the gradient of `first`. A sum of tensors has the same bits.
struct OfValueResidual {
    const void *v, *first, *gate, *dlater;
    void *dv, *dfirst, *dgate;
    template <class At> __device__ void write(const At& at, const Vec& g) const {
        const Vec s = sigmoid(at.read(gate)), d = g * s;
        at.write(dgate, d * (1 - s) * (at.read(first) - at.read(v)));
        at.write(dfirst, dlater ? at.read(dlater) + at.rounded(d) : d);
        at.write(dv, g - d);
    }
};
struct ValueResidualBackward {
    static constexpr int VECTORS = 0;
    static constexpr int TRAINABLE = 0;
    OfValueResidual of;
    const void* dy;
    template <class At> __device__ void operator()(const At& at, const Vec*, Vec*) const {
        of.write(at, at.read(dy));
    }
};

// ---- one head of one token ----

// READ: for the readout also `bonus` (tokens, H), r . key r_k of every head, which v is multiplied by
template <bool READ> struct DeltaInputs {
    static constexpr int VECTORS = READ ? 3 : 2;
    static constexpr int TRAINABLE = 0;
    const void *k, *a, *r;
    void *key, *remove, *replace;
    float* bonus;
    template <class At> __device__ void operator()(const At& at, const Vec* vectors, Vec*) const {
        const DeltaRule rule = delta_rule(at.read(k), at.read(a), vectors[0], vectors[1],
            [&](float& x) { at.sum_head(x); });
        at.write(key, rule.key);
        at.write(remove, rule.remove);
        at.write(replace, rule.replace);
        if constexpr (READ) {
            float sum = total(at.read(r) * at.rounded(rule.key) * vectors[2]);
            at.sum_head(sum);
            at.write_head(bonus, sum);
        }
    }
};

// What of the readout's backward is left for the kernel after the recurrence's backward, with the gradient of
// `bonus`. dr, dv and dkey then get their second part where they are read anyway, and that part is never
// written or rounded.
struct OfReadout {
    const void *r, *g;
    Tensors dout;
    const float *bonus, *dbonus;
    void *dr, *dv;
};

// READ: k_k, k_a, r_k are the vectors, and dr and dv are completed in place
template <bool READ> struct DeltaInputsBackward {
    static constexpr int VECTORS = READ ? 3 : 2;
    static constexpr int TRAINABLE = 2;
    const void *k, *a, *dkey, *dremove, *dreplace;
    void *dk, *da;
    OfReadout of;
    OfValueResidual residual;  // of v, where the layer has one; then dv is that of its result, and read only
    template <class At, class V>
    __device__ void operator()(const At& at, const V& vectors, Vec* dvectors) const {
        const Vec &k_k = vectors[0], &k_a = vectors[1];
        const Vec own = at.read(k), s = sigmoid(at.read(a)), u = own * k_k;
        Vec g = at.read(dkey);
        if constexpr (READ) {
            const Vec scaled = at.read_head(of.dbonus) * vectors[2];
            g += scaled * at.read(of.r);
            at.write(of.dr, at.read(of.dr) + scaled * own * (1 + (s - 1) * k_a));
            const Vec dv = at.read(of.dv) + at.read_head(of.bonus) * at.read(of.dout) * at.read(of.g);
            if (residual.v)
                residual.write(at, at.rounded(dv));
            else
                at.write(of.dv, dv);
        }
        const Vec replaced = at.read(dreplace), dkappa = replaced * s - at.read(dremove);
        float squares = total(u * u), dots = total(u * dkappa);
        at.sum_head(squares, dots);
        const float norm = sqrtf(squares), scale = 1 / fmaxf(norm, 1e-12f);
        // a norm that is held at its least has no gradient
        const float along = norm > 1e-12f ? dots * scale * scale : 0;
        const Vec du = (dkappa - u * along) * scale, ds = replaced * u * scale + g * own * k_a;
        at.write(dk, du * k_k + g * (1 + (s - 1) * k_a));
        at.write(da, ds * s * (1 - s));
        dvectors[0] += du * own;
        dvectors[1] += g * own * (s - 1);
    }
};

// (group_norm(y) + (r . k r_k) v) g. GIVEN: r . k r_k is `bonus` (tokens, H)
template <bool GIVEN> struct Readout7 {
    static constexpr int VECTORS = GIVEN ? 2 : 3;
    const void *y, *r, *k, *v, *g;
    const float* given;
    Tensors out;
    template <class At> __device__ void operator()(const At& at, const Vec* vectors, Vec*) const {
        const Vec &weight = vectors[VECTORS - 2], &bias = vectors[VECTORS - 1];
        float bonus, scale;
        if constexpr (GIVEN) {
            bonus = at.read_head(given);
        } else {
            bonus = total(at.read(r) * at.read(k) * vectors[0]);
            at.sum_head(bonus);
        }
        const Vec normed = at.normalised(at.read(y), &scale) * weight + bias;
        at.write(out, (normed + bonus * at.read(v)) * at.read(g));
    }
};

// GIVEN: r . k r_k is `bonus`, whose gradient is written in the place of dr, dk and dv. Then k is the one
// before delta_inputs; it, r and a are read for the gradient of r_k only.
template <bool GIVEN> struct Readout7Backward {
    static constexpr int VECTORS = GIVEN ? 4 : 3;
    static constexpr int TRAINABLE = 3;
    const void *y, *r, *k, *a, *v, *g;
    const float* given;
    Tensors dout;
    void *dy, *dr, *dk, *dv, *dg;
    float* dgiven;
    template <class At, class V>
    __device__ void operator()(const At& at, const V& vectors, Vec* dvectors) const {
        const Vec value = at.read(v), above = at.read(dout), d = above * at.read(g);
        float bonus, dbonus = total(d * value), mean = total(d * vectors[1]), along, scale;
        if constexpr (GIVEN) {
            bonus = at.read_head(given);
            at.sum_head(dbonus, mean);
            at.write_head(dgiven, dbonus);
            const Vec key = at.rounded(at.read(k) * (1 + (sigmoid(at.read(a)) - 1) * vectors[3]));
            dvectors[0] += dbonus * at.read(r) * key;
        } else {
            const Vec receptance = at.read(r), key = at.read(k);
            bonus = total(receptance * key * vectors[0]);
            at.sum_head(bonus, dbonus, mean);
            at.write(dr, dbonus * vectors[0] * key);
            at.write(dk, dbonus * vectors[0] * receptance);
            at.write(dv, bonus * d);
            dvectors[0] += dbonus * receptance * key;
        }
        const Vec normed = at.normalised(at.read(y), &scale);
        along = total(d * vectors[1] * normed);
        at.sum_head(along);
        at.write(dg, above * (normed * vectors[1] + vectors[2] + bonus * value));
        at.write(dy, scale * (d * vectors[1] - mean / at.shape.N - normed * (along / at.shape.N)));
        dvectors[1] += d * normed;
        dvectors[2] += d;
    }
};

// group_norm(y) silu(g)
struct Readout6 {
    static constexpr int VECTORS = 2;
    const void *y, *g;
    Tensors out;
    template <class At> __device__ void operator()(const At& at, const Vec* vectors, Vec*) const {
        const Vec &weight = vectors[0], &bias = vectors[1], gate = at.read(g);
        float scale;
        at.write(out, (at.normalised(at.read(y), &scale) * weight + bias) * gate * sigmoid(gate));
    }
};

struct Readout6Backward {
    static constexpr int VECTORS = 2;
    static constexpr int TRAINABLE = 2;
    const void *y, *g;
    Tensors dout;
    void *dy, *dg;
    template <class At, class V>
    __device__ void operator()(const At& at, const V& vectors, Vec* dvectors) const {
        const Vec &weight = vectors[0], &bias = vectors[1];
        const Vec gate = at.read(g), s = sigmoid(gate), above = at.read(dout), d = above * gate * s;
        float scale;
        const Vec normed = at.normalised(at.read(y), &scale), dnormed = d * weight;
        float mean = total(dnormed), along = total(dnormed * normed);
        at.sum_head(mean, along);
        mean /= at.shape.N;
        along /= at.shape.N;
        at.write(dg, above * (normed * weight + bias) * s * (1 + gate * (1 - s)));
        at.write(dy, scale * (dnormed - mean - normed * along));
        dvectors[0] += d * normed;
        dvectors[1] += d;
    }
};

// one after the other, whatever row they are of
template <class Function> int launch_tokens(const Function& f, const void* const* vectors,
    int64_t vector_dtypes, void* const* dvectors, float* partial, int64_t tokens, int64_t C, int64_t H,
    float eps, int dtype, void* stream) {
    const Vectors values(vectors, vector_dtypes, Function::VECTORS),
        gradients(dvectors, vector_dtypes, Function::TRAINABLE);
    return launch_run(
        f, Shape(1, tokens, C, H, eps), values, dvectors ? &gradients : nullptr, partial, dtype, stream);
}
// with the shard sums of f.out, if it has some
template <class Function> int launch_rows(const Function& f, const void* const* vectors,
    int64_t vector_dtypes, int64_t tokens, int64_t C, int64_t H, float eps, int dtype, void* stream) {
    const Shape shape(1, tokens, C, H, eps);
    if (!shape.valid() || !shape.summable(f.out.rank)) return cudaErrorInvalidValue;
    return typed(dtype, [&](auto number) {
        LAUNCH((run_rows<decltype(number), Function>), shape.rows(), shape.threads_of_row(), 0, stream, f,
            Vectors(vectors, vector_dtypes, Function::VECTORS), shape);
    });
}
template <class Function> int launch_each(
    const Function& f, int64_t tokens, int64_t C, int dtype, void* stream) {
    return launch_tokens(f, nullptr, 0, nullptr, nullptr, tokens, C, C / WIDTH, 0, dtype, stream);
}

}  // namespace

// the parts of a sum over B rows of T tokens; functions without a token shift see one row of all tokens
extern "C" int64_t elementwise_parts(int64_t B, int64_t T) { return Shape(B, T, WIDTH, 1, 0).parts(); }

extern "C" int shift_mix_forward(const void* z, const void* last, const uint8_t* reset,
    const void* const* vectors, void* const* out, int64_t count, int64_t rank, int64_t vector_dtypes,
    int64_t B, int64_t T, int64_t C, int64_t H, float eps, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    return launch_shift_forward<false>({z, last, reset, Vectors(vectors, vector_dtypes, count)},
        Tensors(nullptr, count), Tensors(out, count, rank), Shape::columns(B, T, C), dtype, stream);
}

// z and last may be null without dvectors
extern "C" int shift_mix_backward(const void* z, const void* last, const uint8_t* reset,
    const void* const* vectors, const void* const* dout, void* dz, void* dlast, void* const* dvectors,
    float* partial, int64_t count, int64_t rank, int64_t vector_dtypes, int64_t B, int64_t T, int64_t C,
    int64_t H, float eps, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    const Vectors gradients(dvectors, vector_dtypes, count);
    const Tensors none(nullptr, count);
    return launch_shift_backward<false>({z, last, reset, Vectors(vectors, vector_dtypes, count)}, none,
        Tensors(dout, count, rank), dz, dlast, none, dvectors ? &gradients : nullptr, partial,
        Shape::columns(B, T, C), dtype, stream);
}

// out may be m
extern "C" int shift_mix_token_forward(const void* z, const void* last, const uint8_t* reset,
    const void* const* vectors, const void* const* m, void* const* out, int64_t count, int64_t rank,
    int64_t vector_dtypes, int64_t B, int64_t T, int64_t C, int64_t H, float eps, int dtype, int device,
    void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    return launch_shift_forward<true>({z, last, reset, Vectors(vectors, vector_dtypes, count)},
        Tensors(m, count), Tensors(out, count, rank), Shape::columns(B, T, C), dtype, stream);
}

// dm may not be m: a token's share is read where the token before is, too
extern "C" int shift_mix_token_backward(const void* z, const void* last, const uint8_t* reset,
    const void* const* vectors, const void* const* m, const void* const* dout, void* dz, void* dlast,
    void* const* dm, void* const* dvectors, float* partial, int64_t count, int64_t rank,
    int64_t vector_dtypes, int64_t B, int64_t T, int64_t C, int64_t H, float eps, int dtype, int device,
    void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    const Vectors gradients(dvectors, vector_dtypes, count);
    return launch_shift_backward<true>({z, last, reset, Vectors(vectors, vector_dtypes, count)},
        Tensors(m, count), Tensors(dout, count, rank), dz, dlast, Tensors(dm, count),
        dvectors ? &gradients : nullptr, partial, Shape::columns(B, T, C), dtype, stream);
}

extern "C" int relu_squared_forward(const void* x, void* const* y, int64_t rank, int64_t B, int64_t T,
    int64_t C, int64_t H, float eps, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    const ReluSquared f{x, Tensors(y, 1, rank)};
    return launch_rows(f, nullptr, 0, B * T, C, C / WIDTH, 0, dtype, stream);
}

extern "C" int relu_squared_backward(const void* y, const void* const* dy, void* dx, int64_t rank, int64_t B,
    int64_t T, int64_t C, int64_t H, float eps, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    return launch_each(ReluSquaredBackward{y, Tensors(dy, 1, rank), dx}, B * T, C, dtype, stream);
}

extern "C" int gated_forward(const void* x, const void* gate, void* y, int64_t B, int64_t T, int64_t C,
    int64_t H, float eps, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    return launch_each(Gated{x, gate, y}, B * T, C, dtype, stream);
}

extern "C" int gated_backward(const void* x, const void* gate, const void* dy, void* dx, void* dgate,
    int64_t B, int64_t T, int64_t C, int64_t H, float eps, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    return launch_each(GatedBackward{x, gate, dy, dx, dgate}, B * T, C, dtype, stream);
}

extern "C" int value_residual_forward(const void* v, const void* first, const void* gate, void* y, int64_t B,
    int64_t T, int64_t C, int64_t H, float eps, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    return launch_each(ValueResidual{v, first, gate, y}, B * T, C, dtype, stream);
}

extern "C" int value_residual_backward(const void* v, const void* first, const void* gate, const void* dy,
    const void* dlater, void* dv, void* dfirst, void* dgate, int64_t B, int64_t T, int64_t C, int64_t H,
    float eps, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    return launch_each(
        ValueResidualBackward{{v, first, gate, dlater, dv, dfirst, dgate}, dy}, B * T, C, dtype, stream);
}

// vectors: k_k, k_a
extern "C" int delta_inputs_forward(const void* k, const void* a, const void* const* vectors, void* key,
    void* remove, void* replace, int64_t vector_dtypes, int64_t B, int64_t T, int64_t C, int64_t H, float eps,
    int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    const DeltaInputs<false> f{k, a, nullptr, key, remove, replace, nullptr};
    return launch_tokens(
        f, vectors, vector_dtypes, nullptr, nullptr, B * T, C, H, eps, dtype, stream);
}

extern "C" int delta_inputs_backward(const void* k, const void* a, const void* const* vectors,
    const void* dkey, const void* dremove, const void* dreplace, void* dk, void* da, void* const* dvectors,
    float* partial, int64_t vector_dtypes, int64_t B, int64_t T, int64_t C, int64_t H, float eps, int dtype,
    int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    return launch_tokens(DeltaInputsBackward<false>{k, a, dkey, dremove, dreplace, dk, da, {}, {}}, vectors,
        vector_dtypes, dvectors, partial, B * T, C, H, eps, dtype, stream);
}

// vectors: r_k, weight, bias
extern "C" int readout7_forward(const void* y, const void* r, const void* k, const void* v, const void* g,
    const void* const* vectors, void* const* out, int64_t rank, int64_t vector_dtypes, int64_t B, int64_t T,
    int64_t C, int64_t H, float eps, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    const Readout7<false> f{y, r, k, v, g, nullptr, Tensors(out, 1, rank)};
    return launch_rows(f, vectors, vector_dtypes, B * T, C, H, eps, dtype, stream);
}

extern "C" int readout7_backward(const void* y, const void* r, const void* k, const void* v, const void* g,
    const void* const* vectors, const void* const* dout, void* dy, void* dr, void* dk, void* dv, void* dg,
    void* const* dvectors, float* partial, int64_t rank, int64_t vector_dtypes, int64_t B, int64_t T,
    int64_t C, int64_t H, float eps, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    const Tensors above(dout, 1, rank);
    const Readout7Backward<false> f{y, r, k, nullptr, v, g, nullptr, above, dy, dr, dk, dv, dg, nullptr};
    return launch_tokens(
        f, vectors, vector_dtypes, dvectors, partial, B * T, C, H, eps, dtype, stream);
}

// mix7 as one function: delta_inputs, with what the readout needs of the key, the recurrence and the readout.
// On tensor cores the recurrence makes these inputs itself (wkv7_chunked.cu). bonus, dbonus: (tokens, H)
// floats. vectors: k_k, k_a, r_k
extern "C" int mix7_inputs_forward(const void* k, const void* a, const void* r, const void* const* vectors,
    void* key, void* remove, void* replace, float* bonus, int64_t vector_dtypes, int64_t B, int64_t T,
    int64_t C, int64_t H, float eps, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    const DeltaInputs<true> f{k, a, r, key, remove, replace, bonus};
    return launch_tokens(
        f, vectors, vector_dtypes, nullptr, nullptr, B * T, C, H, eps, dtype, stream);
}

// vectors: weight, bias
extern "C" int mix7_readout_forward(const void* y, const void* v, const void* g, const float* bonus,
    const void* const* vectors, void* const* out, int64_t rank, int64_t vector_dtypes, int64_t B, int64_t T,
    int64_t C, int64_t H, float eps, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    const Readout7<true> f{y, nullptr, nullptr, v, g, bonus, Tensors(out, 1, rank)};
    return launch_rows(f, vectors, vector_dtypes, B * T, C, H, eps, dtype, stream);
}

// vectors: r_k, weight, bias, k_a; dvectors: of the first three. r, k and a may be null without dvectors
extern "C" int mix7_readout_backward(const void* y, const void* v, const void* g, const float* bonus,
    const void* r, const void* k, const void* a, const void* const* vectors, const void* const* dout,
    void* dy, void* dg, float* dbonus, void* const* dvectors, float* partial, int64_t rank,
    int64_t vector_dtypes, int64_t B, int64_t T, int64_t C, int64_t H, float eps, int dtype, int device,
    void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    const Tensors above(dout, 1, rank);
    const Readout7Backward<true> f{
        y, r, k, a, v, g, bonus, above, dy, nullptr, nullptr, nullptr, dg, dbonus};
    return launch_tokens(
        f, vectors, vector_dtypes, dvectors, partial, B * T, C, H, eps, dtype, stream);
}

// then delta_inputs', which completes dr and dv in place, and value_residual's: where `own` is not null, v was
// its result, and dv is only read. vectors: k_k, k_a, r_k; dvectors: of the first two
extern "C" int mix7_inputs_backward(const void* k, const void* a, const void* r, const void* g,
    const void* const* vectors, const void* const* dout, const float* bonus, const float* dbonus,
    const void* dkey, const void* dremove, const void* dreplace, const void* own, const void* first,
    const void* gate, const void* dlater, void* dr, void* dv, void* dk, void* da, void* down, void* dfirst,
    void* dgate, void* const* dvectors, float* partial, int64_t rank, int64_t vector_dtypes, int64_t B,
    int64_t T, int64_t C, int64_t H, float eps, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    const OfReadout of{r, g, Tensors(dout, 1, rank), bonus, dbonus, dr, dv};
    const OfValueResidual residual{own, first, gate, dlater, down, dfirst, dgate};
    return launch_tokens(DeltaInputsBackward<true>{k, a, dkey, dremove, dreplace, dk, da, of, residual},
        vectors, vector_dtypes, dvectors, partial, B * T, C, H, eps, dtype, stream);
}

// vectors: weight, bias
extern "C" int readout6_forward(const void* y, const void* g, const void* const* vectors, void* const* out,
    int64_t rank, int64_t vector_dtypes, int64_t B, int64_t T, int64_t C, int64_t H, float eps, int dtype,
    int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    return launch_rows(Readout6{y, g, Tensors(out, 1, rank)}, vectors, vector_dtypes, B * T, C, H, eps,
        dtype, stream);
}

extern "C" int readout6_backward(const void* y, const void* g, const void* const* vectors,
    const void* const* dout, void* dy, void* dg, void* const* dvectors, float* partial, int64_t rank,
    int64_t vector_dtypes, int64_t B, int64_t T, int64_t C, int64_t H, float eps, int dtype, int device,
    void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    return launch_tokens(Readout6Backward{y, g, Tensors(dout, 1, rank), dy, dg}, vectors, vector_dtypes,
        dvectors, partial, B * T, C, H, eps, dtype, stream);
}

// sum = x + mixed, and its LayerNorm. vectors: weight, bias; C is at most 8192
extern "C" int add_layer_norm_forward(const void* x, const void* mixed, const void* const* vectors, void* sum,
    void* normed, int64_t vector_dtypes, int64_t B, int64_t T, int64_t C, int64_t H, float eps, int dtype,
    int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    if (!fits_block(B * T, C)) return cudaErrorInvalidValue;
    return typed(dtype, [&](auto number) {
        LAUNCH((add_layer_norm<decltype(number)>), dim3((unsigned)(B * T)), threads_of(C), 0, stream, x,
            mixed, Vectors(vectors, vector_dtypes, 2), sum, normed, (int)C, eps);
    });
}

// dx is the gradient of x and that of mixed; dsum may be null
extern "C" int add_layer_norm_backward(const void* sum, const void* dnormed, const void* dsum,
    const void* const* vectors, void* dx, void* const* dvectors, float* partial, int64_t vector_dtypes,
    int64_t B, int64_t T, int64_t C, int64_t H, float eps, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    if (!fits_block(B * T, C)) return cudaErrorInvalidValue;
    const Vectors values(vectors, vector_dtypes, 2), gradients(dvectors, vector_dtypes, 2);
    const Shape shape = Shape::columns(1, B * T, C);
    return typed(dtype, [&](auto number) {
        using N = decltype(number);
        if (dvectors) {
            LAUNCH((add_layer_norm_grad<N, true>), dim3((unsigned)shape.parts()), threads_of(C), 0, stream,
                sum, dnormed, dsum, values, dx, partial, shape.T, shape.C, eps);
            launch_add_parts(partial, shape, gradients, stream);
        } else {
            LAUNCH((add_layer_norm_grad<N, false>), dim3((unsigned)shape.T), threads_of(C), 0, stream, sum,
                dnormed, dsum, values, dx, partial, shape.T, shape.C, eps);
        }
    });
}

// add_layer_norm, then shift_mix of its norm z, which is not written: z (B, T, C) may be null, z_last (B, C) has
// its last tokens. vectors: weight, bias, then `count` mixes, at most 30
extern "C" int norm_shift_forward(const void* x, const void* mixed, const void* last, const uint8_t* reset,
    const void* const* vectors, void* sum, void* z_last, void* z, void* const* out, int64_t count,
    int64_t rank, int64_t vector_dtypes, int64_t B, int64_t T, int64_t C, int64_t H, float eps, int dtype,
    int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    if (!fits_block(B * T, C) || count > MOST_VECTORS - 2 || !Shape::columns(B, T, C).summable((int)rank))
        return cudaErrorInvalidValue;
    const Vectors norm(vectors, vector_dtypes, 2), mixes(vectors + 2, vector_dtypes >> 4, count);
    return typed(dtype, [&](auto number) {
        LAUNCH((norm_shift<decltype(number)>), dim3((unsigned)(B * T)), threads_of(C),
            rank ? threads_of(C) * sizeof(Vec) : 0, stream, x, mixed, last, reset, norm, mixes, sum, z_last,
            z, Tensors(out, count, rank), (int)T, (int)C, eps);
    });
}

// dx is the gradient of x and that of mixed; dsum and dz_last may be null, dvectors is
extern "C" int norm_shift_backward(const void* sum, const void* dsum, const void* dz_last,
    const uint8_t* reset, const void* const* vectors, const void* const* dout, void* dx, void* dlast,
    void* const* dvectors, float* partial, int64_t count, int64_t rank, int64_t vector_dtypes, int64_t B,
    int64_t T, int64_t C, int64_t H, float eps, int dtype, int device, void* stream) {
    OnDevice on(device);
    if (on.error) return on.error;
    if (!fits_block(B * T, C) || count > MOST_VECTORS - 2 || dvectors) return cudaErrorInvalidValue;
    const Vectors norm(vectors, vector_dtypes, 2), mixes(vectors + 2, vector_dtypes >> 4, count);
    return typed(dtype, [&](auto number) {
        LAUNCH((norm_shift_grad<decltype(number)>), dim3((unsigned)(B * T)), threads_of(C), 0, stream, sum,
            dsum, dz_last, reset, norm, mixes, Tensors(dout, count, rank), dx, dlast, (int)T, (int)C, eps);
    });
}
