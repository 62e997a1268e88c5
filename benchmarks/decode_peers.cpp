// What benchmarks/decode_limits.py measures: the read bandwidth, and multiply-adds in registers.
#include "../cuda/cpu.h"

extern "C" float read_bytes(const void* data, int64_t bytes, int64_t threads) {
    const long lines = bytes / 64;
    std::vector<float> sums(threads * 16);
    parallel(threads, threads, [&](long part, int) {
        typedef Lanes<16>::F Line;
        const Line* p = static_cast<const Line*>(data);
        Line total[8] = {};
        for (long i = lines * part / threads; i + 8 <= lines * (part + 1) / threads; i += 8)
            for (int l = 0; l < 8; l++) total[l] += p[i + l];
        for (int l = 1; l < 8; l++) total[0] += total[l];
        sums[16 * part] = total[0][0];
    });
    return sums[0];
}

namespace {
constexpr int CHAINS = REGISTERS == 32 ? 16 : 8;  // more than a core has multiply-adds under way

// `rounds` times step(chain) for every chain on each of the threads
template <class V, class Step> float chains(long rounds, long threads, Step step) {
    std::vector<float> sums(threads * 16);
    parallel(threads, threads, [&](long part, int) {
        V sum[CHAINS] = {};
        for (long round = 0; round < rounds; round++)
            for (int c = 0; c < CHAINS; c++) sum[c] = step(sum[c]);
        for (int c = 1; c < CHAINS; c++) sum[0] += sum[c];
        memcpy(&sums[16 * part], &sum[0], 4);
    });
    return sums[0];
}
}  // namespace

// multiply-adds of fp32 (kind 0), of bytes (1) or of bf16 (2); returns how many, 0 where there is no instruction
extern "C" int64_t multiply_adds(int64_t kind, int64_t rounds, int64_t threads) {
    volatile float keep;
    volatile float one = 1.f;
    const int64_t steps = rounds * threads * CHAINS;
    if (kind == 0) {
        const Vec<WIDTH> x = fill<WIDTH>(one * 0.999f), y = fill<WIDTH>(one);
        keep = chains<Vec<WIDTH>>(rounds, threads, [=](Vec<WIDTH> sum) { return sum * x + y; });
        return steps * WIDTH;
    }
#if defined(__AVX512VNNI__)
    if (kind == 1) {
        const __m512i x = _mm512_set1_epi8(char(one)), y = _mm512_set1_epi8(char(one + 1));
        keep = chains<__m512i>(rounds, threads, [=](__m512i sum) { return _mm512_dpbusd_epi32(sum, x, y); });
        return steps * 64;
    }
#endif
#if defined(__AVX512BF16__)
    if (kind == 2) {
        const __m512 one_vector = _mm512_set1_ps(one);
        const __m512bh x = _mm512_cvtne2ps_pbh(one_vector, one_vector);
        keep = chains<__m512>(rounds, threads, [=](__m512 sum) { return _mm512_dpbf16_ps(sum, x, x); });
        return steps * 32;
    }
#endif
    (void)keep;
    return 0;
}
