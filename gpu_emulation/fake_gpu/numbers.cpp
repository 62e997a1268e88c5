// Numbers for the stub's devices: their memory is the CPU's, and every operator runs the CPU's kernel on it.
//
// While an operator runs, its storages say that they are the CPU's, and it gets tensors of the CPU that share
// them. What it returns, new or a view, is labelled back. A copy that does not wait is one whose numbers are
// there, or whose source may be written, only after a wait: see Pending.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/library.h>

#include <cstring>
#include <deque>
#include <map>
#include <mutex>

#include "numbers.h"

namespace {

constexpr auto CPU = c10::DeviceType::CPU;
constexpr auto CUDA = c10::DeviceType::CUDA;
constexpr int NAN_BYTE = 0xFF;  // a NaN in every dtype

// ---- memory ----

// What executes our kernels is told where the device's memory begins and ends.
struct Kernels {
    void (*take)(uint64_t, uint64_t, const char*, int, int) = nullptr;
    void (*forget)(uint64_t, uint64_t) = nullptr;
    std::mutex lock;
} kernels;

struct Block {
    c10::DataPtr memory;
    size_t size;

    uint64_t start() const { return reinterpret_cast<uint64_t>(memory.get()); }
    static void free(void* block) {
        std::unique_ptr<Block> mine(static_cast<Block*>(block));
        std::lock_guard guard(kernels.lock);
        if (kernels.forget) kernels.forget(mine->start(), mine->size);
    }
    static c10::DataPtr of(c10::DataPtr memory, size_t size, c10::Device device) {
        if (!size) {
            memory.unsafe_set_device(device);
            return memory;
        }
        auto* block = new Block{std::move(memory), size};
        std::lock_guard guard(kernels.lock);
        if (kernels.take) kernels.take(block->start(), size, "a tensor of the device", true, false);
        return {block->memory.get(), block, &free, device};
    }
};

struct DeviceMemory final : c10::Allocator {
    c10::DataPtr allocate(size_t size) override {
        void* data = c10::alloc_cpu(size);
        if (size) std::memset(data, NAN_BYTE, size);
        return Block::of({data, data, &c10::free_cpu, CPU}, size, current_device());
    }
    c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
    void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
} device_memory;
REGISTER_ALLOCATOR(CUDA, &device_memory)

std::mutex lock;
std::map<const char*, size_t> pinned;  // start -> bytes

struct PinnedMemory final : c10::Allocator {
    static void free(void* data) {
        std::lock_guard guard(lock);
        pinned.erase(static_cast<const char*>(data));
        c10::free_cpu(data);
    }
    c10::DataPtr allocate(size_t size) override {
        void* data = c10::alloc_cpu(size);
        std::lock_guard guard(lock);
        if (size) pinned[static_cast<const char*>(data)] = size;
        return {data, data, &free, CPU};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &free; }
    void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
} pinned_memory;

constexpr c10::DispatchKeySet OF_CUDA(c10::DispatchKey::CUDA);

at::Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
    c10::OptionalDeviceGuard guard(device);
    return at::detail::empty_generic(size, &device_memory, OF_CUDA, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
    c10::OptionalDeviceGuard guard(device);
    return at::detail::empty_strided_generic(
        size, stride, &device_memory, OF_CUDA, c10::dtype_or_default(dtype));
}

// ---- tensors of the device as the CPU's ----

class AsCpu {
  public:
    ~AsCpu() {
        for (auto& [storage, device] : devices) {
            label(storage, device);
            auto* impl = storage.unsafeGetStorageImpl();
            if (impl->nbytes() && impl->data_ptr().get_deleter() != &Block::free)
                impl->set_data_ptr_noswap(
                    Block::of(std::move(impl->_mutable_data_ptr_no_checks()), impl->nbytes(), device));
        }
    }
    at::Tensor operator()(const at::Tensor& tensor) {
        if (!tensor.defined() || !tensor.is_cuda()) return tensor;
        (*this)(tensor.storage());
        auto found = make(tensor.storage(), c10::DispatchKey::CPU, tensor);
        pairs.emplace_back(tensor, found);
        return found;
    }
    void operator()(const c10::Storage& storage) {
        if (storage.device_type() != CUDA) return;
        devices.emplace(storage, storage.device());
        label(storage, CPU);
    }
    // To be called once when the operator has run: its arguments take what it made of their shapes.
    void settle(c10::Device device) {
        for (auto& [mine, its] : pairs) {
            auto* tensor = mine.unsafeGetTensorImpl();
            if (!its.storage().is_alias_of(mine.storage())) {
                devices.emplace(its.storage(), device);
                label(its.storage(), device);
                tensor->set_storage_keep_dtype(its.storage());
                label(its.storage(), CPU);
            }
            if (mine.sizes() != its.sizes() || mine.strides() != its.strides() ||
                mine.storage_offset() != its.storage_offset())
                tensor->set_sizes_and_strides(its.sizes(), its.strides(), its.storage_offset());
        }
    }
    // The tensor of the device for one that the operator returned.
    at::Tensor back(const at::Tensor& result, c10::Device device) {
        if (!result.defined() || !result.is_cpu()) return result;
        for (auto& [mine, its] : pairs)
            if (its.is_same(result)) return mine;
        auto storage = result.storage();
        for (auto& [known, of] : devices)
            if (known.is_alias_of(storage)) device = of;
        devices.emplace(storage, device);
        label(storage, device);
        auto made = make(storage, c10::DispatchKey::CUDA, result);
        label(storage, CPU);
        return made;
    }

  private:
    struct Less {
        bool operator()(const c10::Storage& a, const c10::Storage& b) const {
            return a.unsafeGetStorageImpl() < b.unsafeGetStorageImpl();
        }
    };
    static void label(const c10::Storage& storage, c10::Device device) {
        storage.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().unsafe_set_device(device);
    }
    static at::Tensor make(const c10::Storage& storage, c10::DispatchKey key, const at::Tensor& like) {
        auto made = at::detail::make_tensor<c10::TensorImpl>(
            c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
        made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
        if (like.is_conj()) made._set_conj(true);
        if (like.is_neg()) made._set_neg(true);
        return made;
    }

    std::map<c10::Storage, c10::Device, Less> devices;
    std::vector<std::pair<at::Tensor, at::Tensor>> pairs;
};

template <class F>
c10::IValue each_tensor(const c10::IValue& value, const F& change) {
    if (value.isTensor()) return change(value.toTensor());
    if (value.isTensorList()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(change(tensor));
        return list;
    }
    if (value.isOptionalTensorList()) {
        c10::List<std::optional<at::Tensor>> list;
        for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
            list.push_back(tensor ? std::optional(change(*tensor)) : std::nullopt);
        return list;
    }
    if (value.isList() && !value.isIntList() && !value.isDoubleList() && !value.isBoolList()) {
        auto list = value.toList().copy();
        for (size_t i = 0; i < list.size(); ++i) list.set(i, each_tensor(list.get(i), change));
        return list;
    }
    return value;
}

// The CPU may hand in numbers, and indices.
void same_device(const c10::OperatorHandle& op, const at::Tensor& tensor, c10::Device device) {
    auto name = op.schema().name();
    bool may = name.find("aten::index") == 0 || name.find("aten::_index") == 0 || name.find("aten::copy_") == 0 ||
        name.find("aten::_unsafe_index") == 0 || name.find("aten::set_") == 0;
    TORCH_CHECK(
        may || !tensor.defined() || !tensor.dim() || tensor.device() == device, name, ": expected all tensors on ",
        device, ", found one of ", tensor.sizes(), " on ", tensor.device());
}

void on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
    AsCpu as_cpu;
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto given = op.schema().arguments().size();
    auto arguments = torch::jit::last(*stack, given).vec();
    std::optional<c10::Device> device;
    for (auto& argument : arguments) {
        if (argument.isDevice()) {
            if (argument.toDevice().type() == CUDA) {
                auto asked = argument.toDevice();
                device = asked.has_index() ? asked : current_device();
            }
        } else {
            each_tensor(argument, [&](const at::Tensor& tensor) {
                if (tensor.defined() && tensor.is_cuda() && !device) device = tensor.device();
                return tensor;
            });
        }
    }
    torch::jit::drop(*stack, given);
    for (auto& argument : arguments) {
        if (argument.isDevice()) {
            stack->emplace_back(c10::Device(CPU));
        } else if (argument.isStorage()) {
            as_cpu(argument.toStorage());
            stack->push_back(argument);
        } else {
            stack->push_back(each_tensor(argument, [&](const at::Tensor& tensor) {
                if (device) same_device(op, tensor, *device);
                return as_cpu(tensor);
            }));
        }
    }
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    if (!device) return;
    as_cpu.settle(*device);
    auto returned = op.schema().returns().size();
    auto results = torch::jit::last(*stack, returned).vec();
    torch::jit::drop(*stack, returned);
    for (auto& result : results)
        stack->push_back(each_tensor(result, [&](const at::Tensor& t) { return as_cpu.back(t, *device); }));
}

// ---- copies between the device and the CPU ----

// A copy that nobody waited for, from or to pinned memory. The CPU must not write or read that before a wait.
struct Pending {
    at::Tensor host;
    at::Tensor values;  // what the device reads there, or will have written
    bool to_device;

    void finish() {
        if (host.defined() && !to_device) host.copy_(values);
        if (host.defined() && to_device) {
            auto bytes = [](const at::Tensor& t) { return t.contiguous().view(-1).view(at::kByte); };
            TORCH_CHECK(
                at::equal(bytes(host), bytes(values)), "pinned memory of ", host.sizes(),
                " was written to before its copy to the device was waited for");
        }
        host.reset();
    }
};
std::deque<Pending> pending;
int64_t sent = 0;  // how many there were

// For the copies before a position, as an event knows it.
void wait_for(int64_t position) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    while (sent - static_cast<int64_t>(pending.size()) < position) {
        auto copy = std::move(pending.front());
        pending.pop_front();
        copy.finish();
    }
}

void wait() { wait_for(sent); }

void send(const at::Tensor& host, at::Tensor values, bool to_device) {
    pending.push_back({host, std::move(values), to_device});
    ++sent;
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
    AsCpu as_cpu;
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    bool between = self.is_cuda() != source.is_cuda();
    const at::Tensor& host = self.is_cuda() ? source : self;
    bool pinned = between && host.is_pinned() && host.numel();
    // the driver copies unpinned memory before it returns
    if (between && (!non_blocking || (source.is_cuda() && !pinned))) wait();
    if (!between || !non_blocking || !pinned) {
        as_cpu(self).copy_(as_cpu(source));
        return self;
    }
    // the device does one copy after the other
    for (auto& copy : pending)
        if (copy.host.defined() && copy.host.is_alias_of(host)) copy.finish();
    if (self.is_cuda()) {
        send(source, source.clone(), true);
        as_cpu(self).copy_(source);
    } else {
        auto values = at::empty(source.sizes(), self.options().pinned_memory(false));
        send(self, values.copy_(as_cpu(source)), false);
        if (self.is_floating_point()) self.fill_(std::numeric_limits<double>::quiet_NaN());
        else self.fill_(self.scalar_type() == at::kBool ? 1 : 0x55);
    }
    return self;
}

c10::Scalar number(const at::Tensor& self) {
    wait();
    AsCpu as_cpu;
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return as_cpu(self).item();
}

// ---- operators that only a GPU has ----

at::Tensor mm_as(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
    return at::mm(a.to(dtype), b.to(dtype));
}

at::Tensor& mm_as_out(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype, at::Tensor& out) {
    return at::mm_out(out, a.to(dtype), b.to(dtype));
}

at::Tensor& addmm_as_out(const at::Tensor& self, const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype,
    const at::Scalar& beta, const at::Scalar& alpha, at::Tensor& out) {
    TORCH_CHECK(self.scalar_type() == dtype && out.scalar_type() == dtype, "CUDA's addmm has one dtype for its sums");
    return at::addmm_out(out, self, a.to(dtype), b.to(dtype), beta, alpha);
}

at::Tensor bmm_as(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
    return at::bmm(a.to(dtype), b.to(dtype));
}

}  // namespace

bool is_pinned_memory(const void* data) {
    std::lock_guard guard(lock);
    auto at = static_cast<const char*>(data);
    auto next = pinned.upper_bound(at);
    return next != pinned.begin() && at < (--next)->first + next->second;
}
c10::Allocator* pinned_memory_allocator() { return &pinned_memory; }
void wait_for_copies() { wait(); }

TORCH_LIBRARY_IMPL(_, CUDA, library) {
    library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
    library.impl("empty.memory_format", empty);
    library.impl("empty_strided", empty_strided);
    library.impl("copy_", copy_);
    library.impl("_local_scalar_dense", number);
    library.impl("mm.dtype", mm_as);
    library.impl("mm.dtype_out", mm_as_out);
    library.impl("addmm.dtype_out", addmm_as_out);
    library.impl("bmm.dtype", bmm_as);
}

// What processes send each other goes through the CPU's memory, too, and there by gloo.
TORCH_LIBRARY_IMPL(c10d, CUDA, library) {
    for (auto name :
         {"broadcast_", "allreduce_", "allreduce_coalesced_", "reduce_", "allgather_", "_allgather_base_",
          "allgather_into_tensor_coalesced_", "reduce_scatter_", "_reduce_scatter_base_",
          "reduce_scatter_tensor_coalesced_", "barrier"})
        library.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

struct Timer final : c10d::Timer {  // DDP wants one
    explicit Timer(c10::Device) {}
    std::optional<int64_t> measureDifference(Event, Event) override { return std::nullopt; }
};
namespace c10d {
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, ::Timer)
}

TORCH_LIBRARY(fake_gpu, library) {
    library.def("sent() -> int", [] { return sent; });
    library.def("wait(int position) -> ()", &wait_for);
    library.def("kernels(int take, int forget) -> ()", [](int64_t take, int64_t forget) {
        kernels.take = reinterpret_cast<decltype(kernels.take)>(take);
        kernels.forget = reinterpret_cast<decltype(kernels.forget)>(forget);
    });
    library.def("device() -> int", [] { return int64_t(current_device().index()); });
    library.def("set_device(int index) -> ()", [](int64_t index) { set_current_device(index); });
}
