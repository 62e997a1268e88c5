// Kernels that are wrong on purpose, one or more for each check of the interpreter, and one that is right.
// gpu_emulation/test_ptx_checks.py expects the finding of each from the table at the end.
#include <cuda_runtime.h>

#include <cstdint>

__global__ void good(const float* in, float* out) {
    __shared__ float s[64];
    int t = threadIdx.x;
    s[t] = in[t];
    __syncwarp();
    float a = s[t ^ 1];
    __syncthreads();
    out[t] = a + s[63 - t];
    if (t < 16) out[t] += __shfl_sync(0xffff, a, 15 - t);
}
__global__ void global_end(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }
__global__ void shared_end(const float* in, float* out) {
    __shared__ float s[64], other[64];
    s[threadIdx.x + (in[0] > 0)] = 1;  // in[0] is 1
    other[threadIdx.x] = 2;
    __syncthreads();
    out[threadIdx.x] = s[63 - threadIdx.x / 2] + other[63 - threadIdx.x];
}
__global__ void misaligned(const float* in, float* out) {
    float4 x = *(const float4*)(in + threadIdx.x / 2 * 2);
    out[threadIdx.x] = x.x + x.y + x.z + x.w;
}
__global__ void shared_unknown(const float* in, float* out) {
    __shared__ float s[64];
    if (threadIdx.x < 63) s[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = s[63 - threadIdx.x];
}
__global__ void global_unknown(const float*, float* out) { out[threadIdx.x] += 1; }
__global__ void race_block(const float* in, float* out) {
    __shared__ float s[64];
    s[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = s[threadIdx.x ^ 32];
}
__global__ void race_block_late(const float* in, float* out) {  // write after read
    __shared__ float s[64];
    s[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    float x = s[threadIdx.x ^ 32];
    s[threadIdx.x] = x;
    __syncthreads();
    out[threadIdx.x] = s[threadIdx.x ^ 1];
}
__global__ void race_warp(const float* in, float* out) {
    __shared__ float s[64];
    s[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = s[threadIdx.x ^ 1];
}
__global__ void race_blocks(const float* in, float* out) {
    if (blockIdx.x < 2) out[threadIdx.x] = in[blockIdx.x];
}
__global__ void race_global(const float* in, float* out) {
    out[threadIdx.x] = in[threadIdx.x];
    float x = out[threadIdx.x ^ 32];
    __syncthreads();
    out[threadIdx.x] = x;
}
__global__ void part_of_a_warp(const float* in, float* out) {
    if (threadIdx.x % 32 < (in[0] > 0)) return;
    __syncthreads();
    out[threadIdx.x] = 1;
}
__global__ void other_barriers(const float* in, float* out) {
    if (threadIdx.x < 32) {
        out[threadIdx.x] = in[threadIdx.x];
        __syncthreads();
        out[threadIdx.x] += 3;
    } else {
        __syncthreads();
        out[threadIdx.x] = 2;
    }
}
__global__ void mask_too_wide(const float* in, float* out) {
    if (threadIdx.x % 32 >= 16 * (in[0] > 0)) return;
    out[threadIdx.x] = __shfl_sync(~0u, in[threadIdx.x], 0);
}
__global__ void lane_not_there(const float* in, float* out) {
    if (threadIdx.x % 32 < 16 * (in[0] > 0)) out[threadIdx.x] = __shfl_sync(0xffff, in[threadIdx.x], 20);
}
__global__ void no_wait(const float* in, float* out) {
    __shared__ __align__(16) float s[64 * 4];
    uint32_t to = (uint32_t)__cvta_generic_to_shared(s + 4 * threadIdx.x);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(in) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
    out[threadIdx.x] = s[4 * threadIdx.x];
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}
__global__ void no_barrier_after_wait(const float* in, float* out) {
    __shared__ __align__(16) float s[64 * 4];
    uint32_t to = (uint32_t)__cvta_generic_to_shared(s + 4 * threadIdx.x);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(in) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    out[threadIdx.x] = s[4 * (threadIdx.x ^ 32)];
}
__global__ void not_waited_for(const float* in, float*) {
    __shared__ __align__(16) float s[64 * 4];
    uint32_t to = (uint32_t)__cvta_generic_to_shared(s + 4 * threadIdx.x);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(in) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
}
__global__ void writes_an_input(const float* in, float*) { ((float*)in)[threadIdx.x] = 1; }
__global__ void __launch_bounds__(32) few_threads(const float* in, float* out) {
    out[threadIdx.x] = in[threadIdx.x];
}
__global__ void much_shared(const float* in, float* out) {
    extern __shared__ float s[];
    s[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = s[threadIdx.x];
}

struct Fault {
    void (*kernel)(const float* in, float* out);
    const char* finding;
    int blocks = 1, shared = 0;
};
static const Fault faults[] = {
    {good, ""},
    {global_end, "global memory out of bounds"},
    {shared_end, "shared memory out of bounds"},
    {misaligned, "misaligned access"},
    {shared_unknown, "read of uninitialised shared memory"},
    {global_unknown, "read of uninitialised global memory"},
    {race_block, "race: read after write in shared memory"},
    {race_block_late, "race: write after read in shared memory"},
    {race_warp, "race: read after write in shared memory"},
    {race_blocks, "race: write after write in global memory", 2},
    {race_global, "race: read after write in global memory"},
    {part_of_a_warp, "barrier in a warp of which lanes have ended"},
    {other_barriers, "threads wait at different barriers"},
    {mask_too_wide, "mask names lanes that have ended"},
    {lane_not_there, "shfl from a lane that is not there"},
    {no_wait, "access to a cp.async on its way in shared memory"},
    {no_barrier_after_wait, "race: read after write in shared memory"},
    {not_waited_for, "a thread ends before its cp.async"},
    {writes_an_input, "write to an input"},
    {few_threads, "launch: more threads than __launch_bounds__"},
    {much_shared, "launch: more than 48 KB of shared memory", 1, (48 << 10) + 16},
};

extern "C" int fault_count() { return sizeof faults / sizeof faults[0]; }
// Runs a kernel of 64 threads a block; returns the finding that it has to have.
extern "C" const char* run_fault(int n, const float* in, float* out, void* stream) {
    const Fault& f = faults[n];
    f.kernel<<<f.blocks, 64, f.shared, (cudaStream_t)stream>>>(in, out);
    return f.finding;
}
