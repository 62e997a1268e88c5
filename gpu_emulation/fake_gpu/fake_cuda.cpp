// Two CUDA devices that have no memory and run nothing. The autograd engine asks the device guard for
// devices, streams and events; torch asks the hooks whether there is an accelerator. Loaded before torch is
// imported, these answer in the place of libtorch_cuda.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "numbers.h"

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;
constexpr c10::DeviceIndex DEVICES = 2;
thread_local c10::DeviceIndex current = 0;

c10::DeviceIndex index_of(c10::Device device) { return device.index() < 0 ? current : device.index(); }

c10::Stream default_stream(c10::Device device) {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(CUDA, index_of(device)));
}

struct Guard : c10::impl::NoOpDeviceGuardImpl<CUDA> {
    c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
    c10::Device getDevice() const override { return c10::Device(CUDA, current); }
    void setDevice(c10::Device device) const override { current = index_of(device); }
    void uncheckedSetDevice(c10::Device device) const noexcept override { current = index_of(device); }
    c10::Device exchangeDevice(c10::Device device) const override {
        auto before = getDevice();
        setDevice(device);
        return before;
    }
    c10::Stream getStream(c10::Device device) const noexcept override { return default_stream(device); }
    c10::Stream getDefaultStream(c10::Device device) const override { return default_stream(device); }
    c10::Stream getNewStream(c10::Device device, int) const override { return default_stream(device); }
    c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
    void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
    void block(void*, const c10::Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
    void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
    void synchronizeEvent(void*) const override { wait_for_copies(); }
    bool queryStream(const c10::Stream&) const override { return true; }
    void synchronizeStream(const c10::Stream&) const override { wait_for_copies(); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct CUDAHooks : at::CUDAHooksInterface {  // the name by which torch looks for it
    explicit CUDAHooks(at::CUDAHooksArgs) {}
    bool hasCUDA() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
    c10::DeviceIndex deviceCount() const override { return DEVICES; }
    c10::DeviceIndex getCurrentDevice() const override { return current; }
    c10::DeviceIndex current_device() const override { return current; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    void init() const override {}
    bool isPinnedPtr(const void* data) const override { return is_pinned_memory(data); }
    c10::Allocator* getPinnedMemoryAllocator() const override { return pinned_memory_allocator(); }
    at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
    void deviceSynchronize(c10::DeviceIndex) const override { wait_for_copies(); }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace

c10::Device current_device() { return c10::Device(CUDA, current); }
void set_current_device(c10::DeviceIndex index) { current = index; }
