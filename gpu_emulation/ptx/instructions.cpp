// The table of instructions: what nvcc emits for the project's kernels, by the PTX ISA manual.
#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_map>

#include "machine.h"

Options options;

// ---- numbers ----
static f32 as_f32(u32 x) { f32 y; memcpy(&y, &x, 4); return y; }
static u32 as_u32(f32 x) { u32 y; memcpy(&y, &x, 4); return y; }
static f32 flush(f32 x) { return fabsf(x) < std::numeric_limits<f32>::min() ? copysignf(0, x) : x; }
static f32 canonical(f32 x) { return x != x ? as_f32(0x7fffffff) : x; }
static f32 from_bf16(u16 x) { return as_f32((u32)x << 16); }
static u16 to_bf16(f32 x) {
    const u32 bits = as_u32(x);
    return x != x ? 0x7fff : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static f32 from_f16(u16 x) { _Float16 h; memcpy(&h, &x, 2); return (f32)h; }
static u16 to_f16(f32 x) {
    const _Float16 h = (_Float16)x;
    u16 bits;
    memcpy(&bits, &h, 2);
    return x != x ? 0x7fff : bits;
}
static f32 fma_rm(f32 a, f32 b, f32 c) {  // rounded towards minus infinity
    const f32 y = fmaf(a, b, c);
    const double p = (double)a * b, s = p + c, t = s - p, rest = (p - (s - t)) + (c - t);
    const bool too_high = std::isfinite(y) && ((double)y > s || ((double)y == s && rest < 0));
    return too_high ? nextafterf(y, -INFINITY) : y;
}
static f32 max_f32(f32 a, f32 b) {
    if (a != a) return canonical(b);
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? b : a;
    return a > b ? a : b;
}
// off by the largest error of the manual: 2 ulp for ex2.approx.ftz (2^-22.5 in the newest), 1 for rcp
static f32 inexact(f32 x, int ulps) {
    if (!options.approx || !std::isfinite(x) || x == 0) return x;
    static u32 seed = 1;
    seed = seed * 1664525 + 1013904223;
    return as_f32(as_u32(x) + (seed >> 31 ? ulps : -ulps));
}
static s32 divide(s32 a, s32 b) { return !b ? -1 : b == -1 ? (s32)(0u - (u32)a) : a / b; }
static s32 remainder(s32 a, s32 b) { return !b ? a : b == -1 ? 0 : a % b; }
static u32 bfi(u32 a, u32 b, u32 at, u32 length) {
    if (at >= 32 || !length) return b;
    const u32 mask = (length >= 32 ? ~0u : (1u << length) - 1) << at;
    return (b & ~mask) | (a << at & mask);
}
static s32 bfe(s32 a, u32 at, u32 length) {
    if (!length) return 0;
    if (at > 31) return a >> 31;
    return length + at >= 32 ? a >> at : (s32)((u32)a << (32 - at - length)) >> (32 - length);
}

// ---- loads, stores, moves ----
template <class T> static T read_as(const u8* p) { T x; memcpy(&x, p, sizeof x); return x; }
static u64 number_at(const u8* p, int size, bool is_signed) {
    switch (size) {
        case 1: return is_signed ? (u64)(s64)(s8)*p : *p;
        case 2: return is_signed ? (u64)(s64)read_as<s16>(p) : read_as<u16>(p);
        case 4: return is_signed ? (u64)(s64)read_as<s32>(p) : read_as<u32>(p);
        default: return read_as<u64>(p);
    }
}
static void run_ld(Warp& w, const Instruction& i, u32 lanes) {  // {d...}, [a]
    const Operand& base = i.o[i.vector];
    if (options.traffic) count_traffic(w, i, base, lanes, i.vector * i.size, i.space);
    static const u64 garbage[2] = {~0ull, ~0ull};
    each(lanes, [&](int l) {
        const u8* p = access(w, i, l, i.space, address_of(w, base, l), i.vector * i.size, nullptr, i.used);
        if (!p) p = (const u8*)garbage;
        for (int k = 0; k < i.vector; k++, p += i.size) put(w, i.o[k], l, number_at(p, i.size, i.is_signed));
    });
}
static void run_st(Warp& w, const Instruction& i, u32 lanes) {  // [a], {b...}
    if (options.traffic) count_traffic(w, i, i.o[0], lanes, i.vector * i.size, i.space);
    each(lanes, [&](int l) {
        u8 bytes[16];
        for (int k = 0; k < i.vector; k++) {
            const u64 x = get(w, i.o[1 + k], l);
            memcpy(bytes + k * i.size, &x, i.size);
        }
        if (u8* p = access(w, i, l, i.space, address_of(w, i.o[0], l), i.vector * i.size, bytes))
            memcpy(p, bytes, i.vector * i.size);
    });
}
static void run_mov(Warp& w, const Instruction& i, u32 lanes) {
    if (i.o[0].width != 4) return each(lanes, [&](int l) { put(w, i.o[0], l, get(w, i.o[1], l)); });
    u32 *d = w.reg<u32>(i.o[0]), *a = w.reg<u32>(i.o[1]);
    each(lanes, [=](int l) { d[l] = a[l]; });
}
static void run_pack(Warp& w, const Instruction& i, u32 lanes) {  // mov.b32 d, {low, high}
    each(lanes, [&](int l) { put(w, i.o[0], l, get(w, i.o[1], l) | get(w, i.o[2], l) << 8 * i.o[1].width); });
}
static void run_unpack(Warp& w, const Instruction& i, u32 lanes) {  // mov.b32 {low, high}, a
    each(lanes, [&](int l) {
        const u64 x = get(w, i.o[2], l);
        put(w, i.o[0], l, x);
        put(w, i.o[1], l, x >> 8 * i.o[0].width);
    });
}
const Run ld = run_ld, st = run_st, mov = run_mov, pack = run_pack, unpack = run_unpack;

static void cp_async(Warp& w, const Instruction& i, u32 lanes) {  // [to], [from], 16, bytes to read
    Block& b = *w.block;
    if (options.traffic) count_traffic(w, i, i.o[0], lanes, 16, SHARED);
    each(lanes, [&](int l) {
        const u64 to = address_of(w, i.o[0], l), from = address_of(w, i.o[1], l);
        const u32 size = get(w, i.o[2], l), read = i.operands > 3 ? get(w, i.o[3], l) : size;
        if (size != 16 || (read != 0 && read != 16)) return report("cp.async of an unexpected size", w, i, l);
        const u8 garbage[16] = {};
        if (!access(w, i, l, SHARED, to, 16, garbage)) return;
        const u8* source = nullptr;
        u16 known = 0;
        if (from % 16) report("misaligned access", w, i, l, "source of cp.async");
        if (read && !(source = access(w, i, l, GLOBAL, from, 16, nullptr, ~0u, &known))) return;
        if (source && known != 0xffff)
            report("copy of uninitialised global memory", w, i, l, place_in_allocation(i, from));
        memset(&b.shared[to], 0xff, 16);
        for (int k = 0; k < 16; k++) b.written[to + k] |= ASYNC;
        w.open[l].push_back({(u32)to, source, source ? known : (u16)0xffff});
    });
}
static void cp_async_commit(Warp& w, const Instruction&, u32 lanes) {
    each(lanes, [&](int l) {
        w.groups[l].push_back(std::move(w.open[l]));
        w.open[l].clear();
    });
}
static void cp_async_wait(Warp& w, const Instruction& i, u32 lanes) {
    Block& b = *w.block;
    each(lanes, [&](int l) {
        const u64 pending = get(w, i.o[0], l);
        for (; w.groups[l].size() > pending; w.groups[l].erase(w.groups[l].begin()))
            for (const Copy& c : w.groups[l].front()) {
                if (c.from) memcpy(&b.shared[c.to], c.from, 16);
                else memset(&b.shared[c.to], 0, 16);
                for (int k = 0; k < 16; k++) b.written[c.to + k] = c.known >> k & 1 ? tag_of(w, l) : 0;
            }
    });
}

// ---- instructions of a whole warp; `lanes` have met at it ----
// d[|p], a, b, c, membermask
template <bool bfly> static void shfl(Warp& w, const Instruction& i, u32 lanes) {
    const Operand *a = &i.o[i.operands - 4], *p = i.operands == 6 ? &i.o[1] : nullptr;
    u32 from[32], result[32];
    memcpy(from, w.reg<u32>(a[0]), sizeof from);
    each(lanes, [&](int l) {
        const u32 b = w.reg<u32>(a[1])[l] & 31, c = w.reg<u32>(a[2])[l];
        const u32 segment = c >> 8 & 31, clamp = c & 31;
        const u32 most = (l & segment) | (clamp & ~segment), least = l & segment;
        u32 j = bfly ? (u32)l ^ b : least | (b & ~segment);
        const bool inside = j <= most;
        if (!inside) j = l;
        if (!(lanes >> j & 1))
            report("shfl from a lane that is not there", w, i, l, "lane " + std::to_string(j));
        result[l] = from[j];
        if (p) w.reg<u8>(*p)[l] = inside;
    });
    each(lanes, [&](int l) { w.reg<u32>(i.o[0])[l] = result[l]; });
}
static void ballot(Warp& w, const Instruction& i, u32 lanes) {  // d, p, membermask
    u32 bits = 0;
    each(lanes, [&](int l) { bits |= (u32)(w.reg<u8>(i.o[1])[l] != 0) << l; });
    each(lanes, [&](int l) { w.reg<u32>(i.o[0])[l] = bits; });
}

// One number of D of mma: c + sum of 16 products.
static f32 sum_of_products(const f32* a, const f32* b, f32 c) {
    if (!options.mma) {
        double sum = 0;
        for (int k = 0; k < 16; k++) sum += (double)a[k] * b[k];
        return canonical((f32)(sum + c));
    }
    // 8 products and the sum before them, each truncated 24 bits below the largest, and then their sum
    for (int part = 0; part < 16; part += 8) {
        double terms[9], largest = 0, plain = 0;
        for (int k = 0; k < 8; k++) terms[k] = (double)a[part + k] * b[part + k];
        terms[8] = c;
        for (double t : terms) largest = std::max(largest, std::fabs(t)), plain += t;
        if (!std::isfinite(plain)) return canonical((f32)plain);
        if (largest == 0) { c = 0; continue; }
        const double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
        double sum = 0;
        for (double t : terms) sum += std::trunc(t / unit) * unit;
        const double last = sum == 0 ? 1 : std::ldexp(1.0, std::max(std::ilogb(sum) - 23, -149));
        c = (f32)(std::trunc(sum / last) * last);
    }
    return c;
}
// The fragments of lane 4 g + q. A: row g or g + 8 in registers 0, 2 and 1, 3; columns 2q, 2q + 1, and 8 more
// in registers 2, 3. B: column g, rows 2q, 2q + 1, and 8 more in register 1. C, D: rows g, g, g + 8, g + 8,
// columns 2q, 2q + 1.
static void mma(Warp& w, const Instruction& i, u32) {
    f32 A[16][16], B[8][16], D[32][4];  // B by columns
    for (int l = 0; l < 32; l++) {
        const int g = l >> 2, q = l & 3;
        for (int h = 0; h < 2; h++) {
            for (int r = 0; r < 4; r++)
                A[g + r % 2 * 8][2 * q + h + r / 2 * 8] = from_bf16(w.reg<u32>(i.o[4 + r])[l] >> 16 * h);
            for (int r = 0; r < 2; r++)
                B[g][2 * q + h + r * 8] = from_bf16(w.reg<u32>(i.o[8 + r])[l] >> 16 * h);
        }
    }
    for (int l = 0; l < 32; l++)
        for (int e = 0; e < 4; e++) {
            const f32 c = w.reg<f32>(i.o[10 + e])[l];
            D[l][e] = sum_of_products(A[(l >> 2) + e / 2 * 8], B[2 * (l & 3) + e % 2], c);
        }
    for (int l = 0; l < 32; l++)
        for (int e = 0; e < 4; e++) w.reg<f32>(i.o[e])[l] = D[l][e];
}
template <bool trans> static void ldmatrix(Warp& w, const Instruction& i, u32) {  // {d0, d1, d2, d3}, [row]
    u16 rows[32][8];
    if (options.traffic) count_traffic(w, i, i.o[4], ~0u, 16, SHARED);
    for (int l = 0; l < 32; l++) {
        const u8* p = access(w, i, l, SHARED, address_of(w, i.o[4], l), 16, nullptr);
        if (p) memcpy(rows[l], p, 16);
        else memset(rows[l], 0xff, 16);
    }
    for (int l = 0; l < 32; l++)
        for (int k = 0; k < 4; k++) {
            const int g = l >> 2, q = l & 3;
            const u16 low = trans ? rows[8 * k + 2 * q][g] : rows[8 * k + g][2 * q];
            const u16 high = trans ? rows[8 * k + 2 * q + 1][g] : rows[8 * k + g][2 * q + 1];
            w.reg<u32>(i.o[k])[l] = low | (u32)high << 16;
        }
}
static void movmatrix(Warp& w, const Instruction& i, u32) {  // d, a: the transposed matrix
    u16 m[8][8];
    for (int l = 0; l < 32; l++)
        for (int h = 0; h < 2; h++) m[l >> 2][2 * (l & 3) + h] = (u16)(w.reg<u32>(i.o[1])[l] >> 16 * h);
    for (int l = 0; l < 32; l++)
        w.reg<u32>(i.o[0])[l] = m[2 * (l & 3)][l >> 2] | (u32)m[2 * (l & 3) + 1][l >> 2] << 16;
}

// ---- the table ----
// D, A, B, C: types of destination and sources a, b, c; y: the result
#define UNARY(D, A, y) TERNARY_(D, A, D, D, y, sizeof(D), sizeof(A))
#define BINARY(D, A, B, y) TERNARY_(D, A, B, D, y, sizeof(D), sizeof(A), sizeof(B))
#define TERNARY(D, A, B, C, y) TERNARY_(D, A, B, C, y, sizeof(D), sizeof(A), sizeof(B), sizeof(C))
#define TERNARY_(D, A, B, C, y, ...)                                                                     \
    Entry{[](Warp& w, const Instruction& i, u32 lanes) {                                                 \
              D* d_ = w.reg<D>(i.o[0]);                                                                  \
              const A* a_ = w.reg<A>(i.o[1]);                                                            \
              [[maybe_unused]] const B* b_ = w.reg<B>(i.o[2]);                                           \
              [[maybe_unused]] const C* c_ = w.reg<C>(i.o[3]);                                           \
              each(lanes, [=](int l) {                                                                   \
                  [[maybe_unused]] const A a = a_[l];                                                    \
                  [[maybe_unused]] const B b = b_[l];                                                    \
                  [[maybe_unused]] const C c = c_[l];                                                    \
                  d_[l] = (D)(y);                                                                        \
              });                                                                                        \
          }, {__VA_ARGS__}}
#define COMPARES(t, T)                                                                                   \
    {"setp.eq." t, BINARY(u8, T, T, a == b)}, {"setp.lt." t, BINARY(u8, T, T, a < b)},                   \
    {"setp.le." t, BINARY(u8, T, T, a <= b)}, {"setp.gt." t, BINARY(u8, T, T, a > b)},                   \
    {"setp.ge." t, BINARY(u8, T, T, a >= b)}
#define NOT_EQUAL(t, T) {"setp.ne." t, BINARY(u8, T, T, a != b)}
#define INTEGERS(t, U, S)                                                                                \
    {"add.s" t, BINARY(U, U, U, a + b)}, {"sub.s" t, BINARY(U, U, U, a - b)},                            \
    {"mul.lo.s" t, BINARY(U, U, U, a * b)}, {"mad.lo.s" t, TERNARY(U, U, U, U, a * b + c)},              \
    {"neg.s" t, UNARY(U, U, 0 - a)}, {"and.b" t, BINARY(U, U, U, a & b)},                                \
    {"or.b" t, BINARY(U, U, U, a | b)}, {"xor.b" t, BINARY(U, U, U, a ^ b)},                             \
    {"not.b" t, UNARY(U, U, ~a)}, {"min.s" t, BINARY(S, S, S, std::min(a, b))},                          \
    {"max.s" t, BINARY(S, S, S, std::max(a, b))}, {"min.u" t, BINARY(U, U, U, std::min(a, b))},          \
    {"shl.b" t, BINARY(U, U, u32, b < 8 * sizeof(U) ? (U)(a << b) : 0)},                                 \
    {"shr.u" t, BINARY(U, U, u32, b < 8 * sizeof(U) ? (U)(a >> b) : 0)},                                 \
    {"shr.s" t, BINARY(S, S, u32, a >> std::min<u32>(b, 8 * sizeof(U) - 1))},                            \
    {"selp.b" t, TERNARY(U, U, U, u8, c ? a : b)}, {"selp.u" t, TERNARY(U, U, U, u8, c ? a : b)},        \
    COMPARES("s" t, S), COMPARES("u" t, U), NOT_EQUAL("s" t, S), NOT_EQUAL("u" t, U),                    \
    {"setp.eq.b" t, BINARY(u8, U, U, a == b)}, {"setp.ne.b" t, BINARY(u8, U, U, a != b)}

static const std::unordered_map<string, Entry> table = {
    INTEGERS("16", u16, s16), INTEGERS("32", u32, s32), INTEGERS("64", u64, s64),
    {"mul.wide.s32", BINARY(s64, s32, s32, (s64)a * b)}, {"mul.wide.u32", BINARY(u64, u32, u32, (u64)a * b)},
    {"mul.wide.u16", BINARY(u32, u16, u16, (u32)a * b)},
    {"div.s32", BINARY(s32, s32, s32, divide(a, b))}, {"div.u32", BINARY(u32, u32, u32, b ? a / b : ~0u)},
    {"rem.s32", BINARY(s32, s32, s32, remainder(a, b))}, {"rem.u32", BINARY(u32, u32, u32, b ? a % b : a)},
    {"and.pred", BINARY(u8, u8, u8, a & b)}, {"or.pred", BINARY(u8, u8, u8, a | b)},
    {"xor.pred", BINARY(u8, u8, u8, a ^ b)}, {"not.pred", UNARY(u8, u8, !a)}, {"mov.pred", UNARY(u8, u8, a)},
    {"bfe.s32", TERNARY(s32, s32, u32, u32, bfe(a, b & 255, c & 255))},
    // floats: no flush to zero without .ftz; comparisons are false with a NaN
    {"add.f32", BINARY(f32, f32, f32, a + b)}, {"sub.f32", BINARY(f32, f32, f32, a - b)},
    {"mul.f32", BINARY(f32, f32, f32, a * b)}, {"mul.rn.f32", BINARY(f32, f32, f32, a * b)},
    {"fma.rn.f32", TERNARY(f32, f32, f32, f32, fmaf(a, b, c))},
    {"fma.rm.f32", TERNARY(f32, f32, f32, f32, fma_rm(a, b, c))},
    {"div.rn.f32", BINARY(f32, f32, f32, a / b)}, {"rcp.rn.f32", UNARY(f32, f32, 1.f / a)},
    {"sqrt.rn.f32", UNARY(f32, f32, sqrtf(a))}, {"neg.f32", UNARY(u32, u32, a ^ 0x80000000u)},
    {"abs.f32", UNARY(u32, u32, a & 0x7fffffffu)}, {"max.f32", BINARY(f32, f32, f32, max_f32(a, b))},
    {"ex2.approx.ftz.f32",
     UNARY(f32, f32, flush(a) == 0 ? 1 : flush(inexact(flush((f32)exp2((double)a)), 2)))},
    {"rcp.approx.ftz.f32", UNARY(f32, f32, flush(inexact(flush((f32)(1.0 / (double)flush(a))), 1)))},
    {"selp.f32", TERNARY(u32, u32, u32, u8, c ? a : b)},
    COMPARES("f32", f32), {"setp.ne.f32", BINARY(u8, f32, f32, a < b || a > b)},
    // conversions
    {"cvt.f32.bf16", UNARY(f32, u16, from_bf16(a))}, {"cvt.f32.f16", UNARY(f32, u16, from_f16(a))},
    {"cvt.rn.bf16.f32", UNARY(u16, f32, to_bf16(a))}, {"cvt.rn.f16.f32", UNARY(u16, f32, to_f16(a))},
    {"cvt.rn.bf16x2.f32", BINARY(u32, f32, f32, (u32)to_bf16(a) << 16 | to_bf16(b))},
    {"cvt.rn.f32.s16", UNARY(f32, s16, a)}, {"cvt.rn.f32.s32", UNARY(f32, s32, a)},
    {"cvt.rn.f32.u32", UNARY(f32, u32, a)}, {"cvt.s16.s8", UNARY(s16, u16, (s8)a)},
    {"cvt.s8.s32", UNARY(s16, s32, (s8)a)}, {"cvt.s64.s32", UNARY(s64, s32, a)},
    {"cvt.sat.f32.f32", UNARY(f32, f32, a > 0 ? (a < 1 ? a : 1.f) : 0.f)},
    {"cvt.u16.u32", UNARY(u16, u32, a)}, {"cvt.u16.u64", UNARY(u16, u64, a)},
    {"cvt.u32.u16", UNARY(u32, u16, a)}, {"cvt.u32.u64", UNARY(u32, u64, a)},
    {"cvt.u64.u32", UNARY(u64, u32, a)}, {"cvta.to.global.u64", UNARY(u64, u64, a)},
    {"bfi.b32", {[](Warp& w, const Instruction& i, u32 lanes) {
         each(lanes, [&](int l) {
             auto of = [&](int n) { return w.reg<u32>(i.o[n])[l]; };
             w.reg<u32>(i.o[0])[l] = bfi(of(1), of(2), of(3) & 255, of(4) & 255);
         });
     }, {4, 4, 4, 4, 4}}},
    {"cp.async.cg.shared.global", {cp_async, {4, 8, 4, 4}}},
    {"cp.async.commit_group", {cp_async_commit, {}}}, {"cp.async.wait_group", {cp_async_wait, {4}}},
    // control, barriers, and instructions of a whole warp
    {"ret", {nullptr, {}, RET}}, {"trap", {nullptr, {}, TRAP}}, {"bar.sync", {nullptr, {4}, BARRIER}},
    {"bar.warp.sync", {nullptr, {4}, MEMBERS}}, {"vote.sync.ballot.b32", {ballot, {4, 1, 4}, MEMBERS}},
    {"shfl.sync.bfly.b32", {shfl<true>, {4, 4, 4, 4, 4}, MEMBERS}},
    {"shfl.sync.idx.b32", {shfl<false>, {4, 4, 4, 4, 4}, MEMBERS}},
    {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", {mma, {4, 4, 4, 4}, ALIGNED}},
    {"ldmatrix.sync.aligned.m8n8.x4.shared.b16", {ldmatrix<false>, {4, 4}, ALIGNED}},
    {"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", {ldmatrix<true>, {4, 4}, ALIGNED}},
    {"movmatrix.sync.aligned.m8n8.trans.b16", {movmatrix, {4, 4}, ALIGNED}},
};

const Entry* find_instruction(const string& opcode) {
    auto it = table.find(opcode);
    return it == table.end() ? nullptr : &it->second;
}
