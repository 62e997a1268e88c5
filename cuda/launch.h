// The one include of every .cu file here. Under nvcc it is CUDA; under g++ (-x c++) it is the emulation in
// emulate.h, so that each kernel can be run, and compared with float64, on a machine without a GPU.
//
//   LAUNCH(kernel<...>, grid, block, shared_bytes, stream, arguments...)     instead of kernel<<<...>>>(...)
//   DYNAMIC_SHARED(type, name)      instead of extern __shared__ type name[]
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    kernel<<<(grid), (block), (shared_bytes), (cudaStream_t)(stream)>>>(__VA_ARGS__)
#define DYNAMIC_SHARED(type, name)                            \
    extern __shared__ __align__(16) unsigned char name##_[];  \
    type* name = reinterpret_cast<type*>(name##_)
#else
#include "emulate.h"
#endif

// element types of the C interface
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ __forceinline__ float load(const __half* p) { return __half2float(*p); }
__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store(__half* p, float x) { *p = __float2half_rn(x); }
