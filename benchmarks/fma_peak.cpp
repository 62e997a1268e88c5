// The most fused multiply-adds that a core issues: independent chains in registers, nothing else. For
// benchmarks/wkv.py. How many chains are fastest differs between CPUs, and not only by latency times width:
// every count is tried.
#include "../cuda/cpu.h"

#if defined(__aarch64__)
#define VECTOR_REGISTER "w"
#else
#define VECTOR_REGISTER "x"
#endif

template <int CHAINS> float run(long repeats) {
    Vec<WIDTH> chains[CHAINS], factor = fill<WIDTH>(0.999999f), term = fill<WIDTH>(1e-6f);
    for (int i = 0; i < CHAINS; i++) chains[i] = fill<WIDTH>(i);
#pragma GCC unroll 8
    for (long n = 0; n < repeats; n++)
#pragma GCC unroll 32
        for (int i = 0; i < CHAINS; i++) {
            chains[i] = chains[i] * factor + term;
            asm volatile("" : "+" VECTOR_REGISTER(chains[i]));  // keeps the chain as it is
        }
    float sum = 0;
    for (int i = 0; i < CHAINS; i++) sum += chains[i][0];
    return sum;
}

// `repeats` multiply-adds of WIDTH lanes in 8, 12, 16 or 20 chains
extern "C" float fma_run(int64_t repeats, int chains) {
    switch (chains) {
        case 8: return run<8>(repeats / 8);
        case 12: return run<12>(repeats / 12);
        case 16: return run<16>(repeats / 16);
        default: return run<20>(repeats / 20);
    }
}
extern "C" int fma_width() { return WIDTH; }
