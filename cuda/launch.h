// The one include of every .cu file here.
//
//   LAUNCH(kernel<...>, grid, block, shared_bytes, stream, arguments...)     instead of kernel<<<...>>>(...)
//   DYNAMIC_SHARED(type, name)      instead of extern __shared__ type name[]
//   OnDevice on(device); if (on.error) return on.error;             first in a function of the C interface
//
// The last arguments of such a function are `int dtype, int device, void* stream`: the tensors' element type,
// their GPU and CUDA's stream. It returns 0 or CUDA's error.
#pragma once
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    kernel<<<(grid), (block), (shared_bytes), (cudaStream_t)(stream)>>>(__VA_ARGS__)
#define DYNAMIC_SHARED(type, name)                            \
    extern __shared__ __align__(16) unsigned char name##_[];  \
    type* name = reinterpret_cast<type*>(name##_)

// While it lives, `device` is this thread's current GPU; afterwards the one before it is again. A stream
// belongs to one GPU, so a kernel that is launched from another's thread would be an error.
class OnDevice {
   public:
    explicit OnDevice(int device) {
        error = cudaGetDevice(&before);
        changed = error == cudaSuccess && before != device;
        if (changed) error = cudaSetDevice(device);
    }
    ~OnDevice() {
        if (changed) cudaSetDevice(before);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

    cudaError_t error;

   private:
    int before = 0;
    bool changed = false;
};

// element types of the C interface
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ __forceinline__ float load(const __half* p) { return __half2float(*p); }
__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store(__half* p, float x) { *p = __float2half_rn(x); }
