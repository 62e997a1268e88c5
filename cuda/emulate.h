// CUDA on a CPU, for tests: g++ -x c++ compiles a .cu file against this header and runs it, slowly and
// deterministically.
//
// Every CUDA thread is a fiber with its own stack. The fibers of a block share one OS thread and hand over to
// each other, round robin, at __syncthreads (within the block) and at __syncwarp, shuffles and mma (within
// the warp); blocks are spread over OpenMP threads. Between two barriers a fiber runs alone, so a missing
// barrier shows as a wrong result in at least one of the two orders of emulate_order(). Not modelled: time,
// memory spaces, bank conflicts, barriers in divergent code, and how wide a real warp's lockstep is.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local /* one block at a time on an OS thread */
#define __syncthreads() cu::block_sync()
#define __syncwarp(...) cu::warp_sync()

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
template <class T> void __stcs(T* to, T x) { *to = x; }

typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline int current_device = 0, last_launch = -1;  // GPUs; the second is that of the last kernel
inline cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
    return device < 0 ? cudaErrorInvalidDevice : (current_device = device, cudaSuccess);
}

struct __nv_bfloat16 { uint16_t bits; };
struct __half { _Float16 value; };
inline float __bfloat162float(__nv_bfloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {(uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(__half x) { return (float)x.value; }
inline __half __float2half_rn(float f) { return {(_Float16)f}; }
inline __half __ushort_as_half(unsigned short bits) {
    __half x;
    memcpy(&x, &bits, 2);
    return x;
}
inline float __uint_as_float(unsigned bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline unsigned __float_as_uint(float f) {
    unsigned bits;
    memcpy(&bits, &f, 4);
    return bits;
}
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int min(int a, int b) { return a < b ? a : b; }

namespace cu {

constexpr size_t STACK = 128 << 10, DYNAMIC = 256 << 10, MAX_THREADS = 1024;

struct Fiber {
    void* sp;
    bool done;
};

struct Block {
    dim3 thread, block, block_size, grid_size;
    int count, current;
    void* scheduler;
    std::vector<Fiber> fibers;
    std::unique_ptr<char[]> stacks;
    const std::function<void()>* body;
    uint64_t exchange[MAX_THREADS];
    uint32_t fragments[MAX_THREADS][6];
    alignas(16) unsigned char dynamic[DYNAMIC];
};

inline thread_local Block* B;
inline bool reversed = false;

extern "C" void cu_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.weak cu_switch
.type cu_switch,@function
cu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
#else
#error "the emulation switches stacks in x86-64 assembly"
#endif

inline void run(int i) {
    Block* b = B;
    b->thread = dim3(
        i % b->block_size.x, i / b->block_size.x % b->block_size.y, i / (b->block_size.x * b->block_size.y));
    b->current = i;
}

// the next fiber of [first, last) that is not done, from `from` on in the order at hand; `from` itself if
// there is no other
inline int next(int from, int first, int last) {
    int i = from;
    do {
        i = reversed ? (i == first ? last : i) - 1 : (i + 1 == last ? first : i + 1);
    } while (B->fibers[i].done && i != from);
    return i;
}

__attribute__((noinline)) inline void hand_over(int first, int last) {
    Block* b = B;
    int me = b->current, other = next(me, first, last);
    if (other == me) return;
    run(other);
    cu_switch(&b->fibers[me].sp, b->fibers[other].sp);
}

inline void block_sync() { hand_over(0, B->count); }
inline void warp_sync() {
    int first = B->current & ~31;
    hand_over(first, std::min(first + 32, B->count));
}

template <class T> T shfl(T value, int source) {
    Block* b = B;
    int me = b->current;
    memcpy(&b->exchange[me], &value, sizeof(T));
    warp_sync();
    T result;
    memcpy(&result, &b->exchange[(me & ~31) + (source & 31)], sizeof(T));
    warp_sync();
    return result;
}

inline unsigned ballot(bool predicate) {
    unsigned bits = predicate ? 1u << (B->current & 31) : 0;
    for (int step = 1; step < 32; step *= 2) bits |= shfl(bits, (B->current & 31) ^ step);
    return bits;
}

extern "C" inline void cu_entry() {
    (*B->body)();
    Block* b = B;
    int me = b->current;
    b->fibers[me].done = true;
    void* unused;
    int other = next(me, 0, b->count);
    if (other != me) {
        run(other);
        cu_switch(&unused, b->fibers[other].sp);
    }
    cu_switch(&unused, b->scheduler);
    __builtin_unreachable();
}

inline void run_block(Block& b, dim3 block) {
    b.block = block;
    B = &b;
    for (int i = 0; i < b.count; i++) {
        void** sp = (void**)((uintptr_t)(b.stacks.get() + (i + 1) * STACK) & ~(uintptr_t)15);
        *--sp = nullptr;
        *--sp = (void*)(void (*)())cu_entry;
        for (int k = 0; k < 6; k++) *--sp = nullptr;
        b.fibers[i] = {sp, false};
    }
    int first = reversed ? b.count - 1 : 0;
    run(first);
    cu_switch(&b.scheduler, b.fibers[first].sp);
}

template <class F> void launch(dim3 grid, dim3 block, size_t shared_bytes, F kernel) {
    if (shared_bytes > DYNAMIC) abort();
    last_launch = current_device;
    std::function<void()> body = kernel;
    long blocks = (long)grid.x * grid.y * grid.z;
#pragma omp parallel
    {
        auto b = std::make_unique<Block>();
        b->block_size = block;
        b->grid_size = grid;
        b->count = block.x * block.y * block.z;
        b->fibers.resize(b->count);
        b->stacks.reset(new char[b->count * STACK + 64]);  // not cleared: a fiber touches little of its stack
        b->body = &body;
        // garbage, as on a GPU: NaN in every dtype
        memset(b->dynamic, 0xff, sizeof b->dynamic);
#pragma omp for schedule(dynamic)
        for (long i = 0; i < blocks; i++)
            run_block(*b, dim3(i % grid.x, i / grid.x % grid.y, i / ((long)grid.x * grid.y)));
    }
}

}  // namespace cu

// 0: fibers take turns from the first to the last; 1: from the last to the first
extern "C" inline __attribute__((used, visibility("default"))) void emulate_order(int reversed) {
    cu::reversed = reversed;
}

extern "C" inline __attribute__((used, visibility("default"))) void emulate_devices(int* current, int* launch) {
    *current = current_device;
    *launch = last_launch;
}

#define threadIdx (cu::B->thread)
#define blockIdx (cu::B->block)
#define blockDim (cu::B->block_size)
#define gridDim (cu::B->grid_size)
#define __shfl_sync(mask, value, lane, ...) cu::shfl((value), (lane))
#define __shfl_xor_sync(mask, value, lanes, ...) cu::shfl((value), (cu::B->current & 31) ^ (lanes))
#define __ballot_sync(mask, predicate) cu::ballot(predicate)
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    cu::launch((grid), (block), (shared_bytes), [=] { kernel(__VA_ARGS__); })
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(cu::B->dynamic)
