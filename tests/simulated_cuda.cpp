// A CUDA device that is none: its memory is the host's, and torch's CPU kernels do its work, but tensors on it say "cuda",
// take the ways that torch and gradkeel take for CUDA, and let nobody read what a real device may not have sent yet.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <deque>
#include <mutex>
#include <set>
#include <unordered_map>
#include <vector>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::IValue;

const Device HOST(DeviceType::CPU), DEVICE(DeviceType::CUDA, 0);

std::recursive_mutex lock;
std::set<std::pair<const char*, size_t>> pinned;  // the host's memory that a device may read and write by itself
bool waiting_is_an_error = false;

// What the device has not done yet, as far as the host can know: copies to the host, of which only garbage is there, and
// copies from pinned memory, which must stay as it is until then. Both are settled by what the host waits for.
struct Travelling {
    uint64_t number;
    char* to;                 // of the host's; null for one that goes to the device
    const char* from;         // likewise, for one that comes from there
    std::vector<char> bytes;  // what arrives, or what was sent
    at::Tensor holds;
};
std::deque<Travelling> travelling;
uint64_t sent = 0;

void arrived(uint64_t until) {
    std::lock_guard<std::recursive_mutex> own(lock);
    while (!travelling.empty() && travelling.front().number <= until) {
        Travelling one = std::move(travelling.front());
        travelling.pop_front();
        if (one.to != nullptr) std::memcpy(one.to, one.bytes.data(), one.bytes.size());
        else if (std::memcmp(one.from, one.bytes.data(), one.bytes.size()) != 0)
            TORCH_CHECK(false, "simulated CUDA: pinned memory was written to while it was being sent to the device");
    }
}

void sync(const char* why) {
    TORCH_CHECK(!waiting_is_an_error, "called a synchronizing CUDA operation (simulated): ", why);
    arrived(sent);
}

// ---- memory ---------------------------------------------------------------------------------------------------------

void forget(void* held) { delete static_cast<c10::Storage*>(held); }

// The same bytes, said to be on another device.
c10::Storage moved(const c10::Storage& storage, Device device, bool resizable = true) {
    auto* held = new c10::Storage(storage);
    c10::DataPtr data(const_cast<void*>(storage.data()), held, &forget, device);
    return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(),
                        resizable);
}

at::Tensor shaped_like(const at::Tensor& like, c10::Storage storage, c10::DispatchKey key) {
    auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
    result.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    return result;
}

struct PinnedAllocator final : c10::Allocator {
    c10::DataPtr allocate(size_t size) override {
        char* data = new char[size + 64]();
        char* aligned = data + (64 - reinterpret_cast<uintptr_t>(data) % 64);
        std::lock_guard<std::recursive_mutex> own(lock);
        pinned.insert({aligned, size});
        return {aligned, new std::pair<char*, char*>(data, aligned), &release, HOST};
    }
    static void release(void* context) {
        auto* both = static_cast<std::pair<char*, char*>*>(context);
        std::lock_guard<std::recursive_mutex> own(lock);
        pinned.erase(pinned.lower_bound({both->second, 0}));
        delete[] both->first;
        delete both;
    }
    c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
    void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }
};

bool is_pinned(const void* data) {
    std::lock_guard<std::recursive_mutex> own(lock);
    auto* wanted = static_cast<const char*>(data);
    auto after = pinned.upper_bound({wanted, SIZE_MAX});
    if (after == pinned.begin()) return false;
    --after;
    return wanted < after->first + std::max<size_t>(after->second, 1);
}

struct Hooks final : at::CUDAHooksInterface {
    explicit Hooks(at::CUDAHooksArgs) {}
    void init() const override {}
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasCUDA() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    DeviceIndex deviceCount() const override { return 1; }
    DeviceIndex current_device() const override { return 0; }
    DeviceIndex getCurrentDevice() const override { return 0; }
    void setCurrentDevice(DeviceIndex) const override {}
    DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
    DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
    int getNumGPUs() const override { return 1; }
    bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
    Device getDeviceFromPtr(void*) const override { return DEVICE; }
    at::Allocator* getPinnedMemoryAllocator() const override {
        static PinnedAllocator allocator;
        return &allocator;
    }
    void deviceSynchronize(DeviceIndex) const override { arrived(sent); }
};

// ---- streams and events ---------------------------------------------------------------------------------------------

thread_local c10::StreamId current = 0;
std::atomic<c10::StreamId> streams{0};
const int LATENESS = 2;  // an event is asked so often before it has happened

struct Event {
    uint64_t number = 0;
    int asked = 0;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
    DeviceType type() const override { return DeviceType::CUDA; }
    Device exchangeDevice(Device) const override { return DEVICE; }
    Device getDevice() const override { return DEVICE; }
    void setDevice(Device) const override {}
    void uncheckedSetDevice(Device) const noexcept override {}
    c10::Stream named(c10::StreamId id) const { return c10::Stream(c10::Stream::UNSAFE, DEVICE, id); }
    c10::Stream getStream(Device) const override { return named(current); }
    c10::Stream getDefaultStream(Device) const override { return named(0); }
    c10::Stream getStreamFromGlobalPool(Device, bool) const override { return named(++streams); }
    c10::Stream getNewStream(Device, int) const override { return named(++streams); }
    c10::Stream exchangeStream(c10::Stream stream) const override {
        auto before = named(current);
        current = stream.id();
        return before;
    }
    void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
    void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
        if (*event == nullptr) *event = new Event;
        std::lock_guard<std::recursive_mutex> own(lock);
        *static_cast<Event*>(*event) = {sent, 0};
    }
    void block(void*, const c10::Stream&) const override {}
    bool queryEvent(void* event) const override {
        if (event == nullptr) return true;
        auto* own = static_cast<Event*>(event);
        if (own->asked++ < LATENESS) return false;
        arrived(own->number);
        return true;
    }
    void synchronizeEvent(void* event) const override {
        if (event == nullptr) return;
        static_cast<Event*>(event)->asked = INT_MAX / 2;
        arrived(static_cast<Event*>(event)->number);
    }
    DeviceIndex deviceCount() const noexcept override { return 1; }
    bool queryStream(const c10::Stream&) const override { return false; }
    void synchronizeStream(const c10::Stream&) const override { arrived(sent); }
    void synchronizeDevice(const DeviceIndex) const override { arrived(sent); }
};

// ---- operations -----------------------------------------------------------------------------------------------------

// Tensors of one call, as the host's kernels take them.
struct Aliases {
    std::vector<std::pair<at::Tensor, at::Tensor>> both;  // the device's, and the host's

    at::Tensor of(const at::Tensor& tensor) {
        if (!tensor.defined() || tensor.device().type() != DeviceType::CUDA) return tensor;
        for (auto& [own, alias] : both)
            if (own.is_same(tensor)) return alias;
        both.emplace_back(tensor, shaped_like(tensor, moved(tensor.storage(), HOST), c10::DispatchKey::CPU));
        return both.back().second;
    }

    at::Tensor back(const at::Tensor& found) {
        if (!found.defined() || found.device().type() != DeviceType::CPU) return found;
        for (auto& [own, alias] : both)
            if (alias.is_same(found)) return own;
        for (auto& [own, alias] : both)  // a view
            if (alias.storage().is_alias_of(found.storage()))
                return shaped_like(found, own.storage(), c10::DispatchKey::CUDA);
        return shaped_like(found, moved(found.storage(), DEVICE), c10::DispatchKey::CUDA);
    }

    // Where a kernel has resized what it was given.
    void settle() {
        for (auto& [own, alias] : both) {
            auto* impl = own.unsafeGetTensorImpl();
            if (alias.storage().data() != own.storage().data())
                impl->set_storage_keep_dtype(moved(alias.storage(), DEVICE));
            if (alias.sizes() != own.sizes() || alias.strides() != own.strides())
                impl->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
        }
    }
};

const std::set<std::string> WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::_unique2", "aten::is_nonzero",
};

void on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const auto& schema = op.schema();
    if (WAITING.count(schema.name())) sync(schema.name().c_str());
    Aliases aliases;
    auto arguments = torch::jit::last(*stack, schema.arguments().size());
    for (size_t i = 0; i < arguments.size(); ++i) {
        IValue& own = (*stack)[stack->size() - arguments.size() + i];
        if (own.isTensor()) own = aliases.of(own.toTensor());
        else if (own.isTensorList()) {
            c10::List<at::Tensor> list;
            for (const at::Tensor& one : own.toTensorVector()) list.push_back(aliases.of(one));
            own = list;
        } else if (own.isOptionalTensorList()) {
            c10::List<std::optional<at::Tensor>> list;
            for (auto one : own.toOptionalTensorVector())
                list.push_back(one.has_value() ? std::make_optional(aliases.of(*one)) : std::nullopt);
            own = list;
        } else if (own.isDevice() && own.toDevice().type() == DeviceType::CUDA) own = HOST;
    }
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    aliases.settle();
    const size_t results = schema.returns().size();
    for (size_t i = stack->size() - results; i < stack->size(); ++i) {
        IValue& own = (*stack)[i];
        if (own.isTensor()) own = aliases.back(own.toTensor());
        else if (own.isTensorList()) {
            c10::List<at::Tensor> list;
            for (const at::Tensor& one : own.toTensorVector()) list.push_back(aliases.back(one));
            own = list;
        }
    }
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
    const bool to_device = self.is_cuda(), from_device = source.is_cuda();
    Aliases aliases;
    auto to = aliases.of(self), from = aliases.of(source);
    if (to_device && from_device) {
        to.copy_(from);
        return self;
    }
    const auto& host = to_device ? source : self;
    const bool is_late = non_blocking && is_pinned(host.const_data_ptr());
    if (self.numel() == 0) return self;
    if (!non_blocking) sync(to_device ? "a copy to the device" : "a copy to the host");
    if (!is_late || !host.is_non_overlapping_and_dense()) {
        TORCH_CHECK(!(non_blocking && from_device), "simulated CUDA: a copy to memory that is not pinned waits");
        to.copy_(from);
        return self;
    }
    std::lock_guard<std::recursive_mutex> own(lock);
    const size_t size = host.nbytes();
    if (to_device) {
        to.copy_(from);
        const char* begin = static_cast<const char*>(host.const_data_ptr());
        travelling.push_back({++sent, nullptr, begin, std::vector<char>(begin, begin + size), host});
    } else {
        to.copy_(from);
        char* begin = static_cast<char*>(host.mutable_data_ptr());
        travelling.push_back({++sent, begin, nullptr, std::vector<char>(begin, begin + size), host});
        std::memset(begin, 0xA5, size);  // until it arrives
    }
    return self;
}

void record_stream(at::Tensor&, c10::Stream) {}

at::Tensor& set_(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef sizes,
                 c10::SymIntArrayRef strides) {
    auto* impl = self.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(std::move(storage));
    if (strides.size() == sizes.size()) {
        impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
    } else {
        impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(sizes));
    }
    impl->set_storage_offset(offset.guard_int(__FILE__, __LINE__));
    return self;
}

at::Tensor& set_whole(at::Tensor& self, at::Storage storage) {
    const c10::SymInt size = static_cast<int64_t>(storage.nbytes() / self.itemsize());
    return set_(self, std::move(storage), 0, {size}, {});
}

}  // namespace

namespace at {
using SimulatedHooks = Hooks;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", SimulatedHooks)
}  // namespace at

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}  // namespace c10::impl

TORCH_LIBRARY_IMPL(_, CUDA, library) {
    library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
    library.impl("copy_", &copy_);
    library.impl("set_.source_Storage", &set_whole);
    library.impl("set_.source_Storage_storage_offset", &set_);
    library.impl("record_stream", &record_stream);
}

extern "C" {

int simulated_cuda_works() { return at::detail::getCUDAHooks().hasCUDA(); }

// Returns how it was.
int simulated_cuda_forbids_waiting(int forbidden) {
    const int before = waiting_is_an_error;
    waiting_is_an_error = forbidden != 0;
    return before;
}

}
