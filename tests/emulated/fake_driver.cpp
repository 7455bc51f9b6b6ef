// A stand-in for libcuda.so.1 under the real cuda-bindings: the calls that the runtime makes, kernels run by emulator.cpp. It
// is not CUDA.
//
// Device memory is the host's and begins as NaN. A stream does nothing until it is waited for: what is read before that is
// what was there before, so a forgotten synchronisation shows. Handles and addresses are checked. A module is whatever it is
// loaded from, unless told otherwise; its functions are all that the emulator knows by name. An error of a kernel stays, as a
// GPU's does: every later call returns it.
//
// What GPU there is says FAKE_GPU ("name;capability;total bytes;free bytes;multiprocessors;integrated;driver"), or fake_gpu();
// "" for none. FAKE_CUDA_FAIL ("7:2" or "cuMemAlloc_v2:3:2") or fake_fail() make the nth call, or the nth call of a name,
// return an error.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "launch.h"

namespace {

enum : int {
    kOk = 0,
    kInvalidValue = 1,
    kOutOfMemory = 2,
    kNotInitialized = 3,
    kNoDevice = 100,
    kInvalidImage = 200,
    kInvalidContext = 201,
    kNoBinary = 209,
    kInvalidPtx = 218,
    kUnsupportedPtx = 222,
    kInvalidHandle = 400,
    kNotFound = 500,
    kNotReady = 600,
    kIllegalAddress = 700,
    kLaunchFailed = 719,
    kCaptureInvalidated = 901,
};

struct Gpu {
    std::string name;
    int major = 0, minor = 0, multiprocessors = 0, integrated = 0, driver = 0;
    size_t total = 0, free = 0;
};

using Address = unsigned long long;
using Work = std::function<int()>;
struct Graph {
    std::vector<Work> work;
};
struct Executable {
    std::vector<Work> work;
};
struct Event {
    bool recorded = false;
};
struct Stream {
    std::deque<Work> work;
    std::unique_ptr<Graph> capturing;
};
struct Module {
    int id;
};
struct Function {
    const emulated::Kernel* kernel;
    int most_shared = 48 << 10;
};

std::recursive_mutex mutex;
std::string gpu_text = std::getenv("FAKE_GPU") ? std::getenv("FAKE_GPU") : "";
bool initialised = false;
int sticky = kOk;
size_t in_use = 0, peak = 0;
long calls = 0, launches = 0;
std::string failing_name, failed_name, last_name, last_error;
long failing_at = 0;
bool runs_kernels = true;
int failing_with = 0, module_error = kOk;
std::map<Address, size_t> blocks, pinned;
std::set<void*> streams, events, graphs, executables, modules, functions;

struct FromEnvironment {
    FromEnvironment() {
        const char* text = std::getenv("FAKE_CUDA_FAIL");
        if (!text) return;
        std::string s = text;
        const auto parts = std::count(s.begin(), s.end(), ':');
        if (parts == 2) {
            failing_name = s.substr(0, s.find(':'));
            s = s.substr(s.find(':') + 1);
        }
        failing_at = std::atol(s.c_str());
        failing_with = std::atoi(s.c_str() + s.find(':') + 1);
    }
} from_environment;

Gpu gpu() {
    Gpu g;
    std::stringstream in(gpu_text);
    std::string part;
    std::vector<std::string> parts;
    while (std::getline(in, part, ';')) parts.push_back(part);
    if (parts.size() < 6) return g;
    g.name = parts[0];
    std::sscanf(parts[1].c_str(), "%d.%d", &g.major, &g.minor);
    g.total = std::strtoull(parts[2].c_str(), nullptr, 10);
    g.free = std::strtoull(parts[3].c_str(), nullptr, 10);
    g.multiprocessors = std::atoi(parts[4].c_str());
    g.integrated = std::atoi(parts[5].c_str());
    g.driver = parts.size() > 6 ? std::atoi(parts[6].c_str()) : 12060;
    return g;
}

// What each call begins with: an error that was asked for, or that is there already.
int entering(const char* name, bool needs_device = true) {
    last_name = name;
    ++calls;
    if (failing_at && (failing_name.empty() || failing_name == name) && --failing_at == 0) {
        failed_name = name;
        if (failing_with >= kIllegalAddress && failing_with < 800) sticky = failing_with;
        return failing_with;
    }
    if (sticky != kOk) return sticky;
    if (needs_device && !initialised) return kNotInitialized;
    return kOk;
}

#define API extern "C" __attribute__((visibility("default"))) int
#define ENTER(name)                                            \
    const std::lock_guard<std::recursive_mutex> locked(mutex); \
    if (int code = entering(name)) return code
#define ENTER_FREELY(name)                                     \
    const std::lock_guard<std::recursive_mutex> locked(mutex); \
    if (int code = entering(name, false)) return code

int run(const Work& work) {
    const int code = work();
    if (code) sticky = code;
    return code;
}

int drain(Stream& s) {
    while (!s.work.empty()) {
        const Work next = std::move(s.work.front());
        s.work.pop_front();
        if (int code = run(next)) return code;
    }
    return sticky;
}

Stream* stream_of(void* handle) { return streams.count(handle) ? static_cast<Stream*>(handle) : nullptr; }

// Put work on a stream, or into the graph that it captures.
int enqueue(void* handle, Work work) {
    Stream* s = stream_of(handle);
    if (!s) return kInvalidHandle;
    if (s->capturing)
        s->capturing->work.push_back(std::move(work));
    else
        s->work.push_back(std::move(work));
    return kOk;
}

bool on_device(Address p, size_t n) { return emulated::owns(reinterpret_cast<void*>(p), n); }
bool is_pinned(const void* p, size_t n) {
    const auto at = Address(reinterpret_cast<uintptr_t>(p));
    auto next = pinned.upper_bound(at);
    if (next == pinned.begin()) return false;
    const auto& [start, size] = *std::prev(next);
    return at + n <= start + size;
}
template <class T>
int drop(std::set<void*>& all, void* p) {
    if (!all.erase(p)) return kInvalidHandle;
    delete static_cast<T*>(p);
    return kOk;
}

}  // namespace

// --- For tests ---

#define TEST(type) extern "C" __attribute__((visibility("default"))) type
// A new machine: everything is forgotten, and what was allocated is gone.
TEST(void) fake_gpu(const char* text) {
    const std::lock_guard<std::recursive_mutex> locked(mutex);
    gpu_text = text;
    initialised = false;
    sticky = kOk;
    module_error = kOk;
    runs_kernels = true;
    failing_at = 0;
    calls = launches = 0;
    last_error.clear();
    for (auto& [p, n] : blocks) emulated::release(reinterpret_cast<void*>(p));
    blocks.clear();
    in_use = peak = 0;
}
TEST(void) fake_fail(const char* name, long nth, int code) {
    const std::lock_guard<std::recursive_mutex> locked(mutex);
    failing_name = name;
    failing_at = nth;
    failing_with = code;
}
TEST(void) fake_module_error(int code) { module_error = code; }
// Whether kernels do anything; for tests of the host alone.
TEST(void) fake_runs_kernels(int yes) { runs_kernels = yes != 0; }
TEST(void) fake_seed(unsigned long long s) { emulated::seed(s); }
TEST(long) fake_calls() { return calls; }
TEST(long) fake_launches() { return launches; }
TEST(unsigned long long) fake_in_use() { return in_use; }
TEST(unsigned long long) fake_peak() { return peak; }
TEST(unsigned long long) fake_pinned() {
    unsigned long long sum = 0;
    for (const auto& [address, size] : pinned) sum += size;
    return sum;
}
TEST(unsigned long long) fake_handles() {
    return blocks.size() + pinned.size() + streams.size() + events.size() + graphs.size() + executables.size() +
           modules.size();
}
TEST(const char*) fake_last_call() { return last_name.c_str(); }
TEST(const char*) fake_failed_call() { return failed_name.c_str(); }
TEST(const char*) fake_last_error() { return last_error.c_str(); }

// --- Driver and device ---

// CUDA's own runtime library, which torch and cuda-bindings bring, is no concern of the fake: it finds no driver.
static bool called_by_runtime(void* from) {
    Dl_info library;
    if (!dladdr(from, &library) || !library.dli_fname) return false;
    return std::strstr(library.dli_fname, "cudart") || std::strstr(library.dli_fname, "runtime");
}

API cuInit(unsigned) {
    if (called_by_runtime(__builtin_return_address(0))) return kNoDevice;
    ENTER_FREELY("cuInit");
    if (gpu_text.empty()) return kNoDevice;
    initialised = true;
    return kOk;
}
API cuDriverGetVersion(int* v) {
    if (called_by_runtime(__builtin_return_address(0))) {
        *v = 0;
        return kOk;
    }
    ENTER_FREELY("cuDriverGetVersion");
    *v = gpu_text.empty() ? 12060 : gpu().driver;
    return kOk;
}
API cuDeviceGetCount(int* n) {
    ENTER("cuDeviceGetCount");
    *n = 1;
    return kOk;
}
API cuDeviceGet(int* d, int ordinal) {
    ENTER("cuDeviceGet");
    *d = 0;
    return ordinal == 0 ? kOk : 101;
}
API cuDeviceGetName(char* s, int n, int) {
    ENTER("cuDeviceGetName");
    std::snprintf(s, size_t(n), "%s", gpu().name.c_str());
    return kOk;
}
API cuDeviceTotalMem_v2(size_t* n, int) {
    ENTER("cuDeviceTotalMem_v2");
    *n = gpu().total;
    return kOk;
}
API cuDeviceGetAttribute(int* v, int attribute, int) {
    ENTER("cuDeviceGetAttribute");
    const Gpu g = gpu();
    const std::map<int, int> known{
        {1, 1024},          {8, 48 << 10},
        {10, 32},           {16, g.multiprocessors},
        {18, g.integrated}, {75, g.major},
        {76, g.minor},      {97, (g.major == 9 ? 227 : g.minor == 0 || g.minor == 7 ? 163 : 99) << 10}};
    const auto found = known.find(attribute);
    if (found == known.end()) return kInvalidValue;
    *v = found->second;
    return kOk;
}
API cuDevicePrimaryCtxRetain(void** c, int) {
    ENTER("cuDevicePrimaryCtxRetain");
    *c = reinterpret_cast<void*>(1);
    return kOk;
}
API cuDevicePrimaryCtxRelease_v2(int) {
    ENTER("cuDevicePrimaryCtxRelease_v2");
    return kOk;
}
API cuCtxSetCurrent(void*) {
    ENTER("cuCtxSetCurrent");
    return kOk;
}
API cuCtxPushCurrent_v2(void*) {
    ENTER("cuCtxPushCurrent_v2");
    return kOk;
}
API cuCtxPopCurrent_v2(void** c) {
    ENTER("cuCtxPopCurrent_v2");
    if (c) *c = reinterpret_cast<void*>(1);
    return kOk;
}
API cuCtxGetCurrent(void** c) {
    ENTER("cuCtxGetCurrent");
    *c = reinterpret_cast<void*>(1);
    return kOk;
}
API cuCtxSynchronize() {
    ENTER("cuCtxSynchronize");
    for (void* s : streams)
        if (int code = drain(*static_cast<Stream*>(s))) return code;
    return kOk;
}
API cuGetErrorName(int e, const char** s) {
    static const std::map<int, const char*> names{{0, "CUDA_SUCCESS"},
                                                  {1, "CUDA_ERROR_INVALID_VALUE"},
                                                  {2, "CUDA_ERROR_OUT_OF_MEMORY"},
                                                  {100, "CUDA_ERROR_NO_DEVICE"},
                                                  {200, "CUDA_ERROR_INVALID_IMAGE"},
                                                  {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
                                                  {218, "CUDA_ERROR_INVALID_PTX"},
                                                  {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"},
                                                  {400, "CUDA_ERROR_INVALID_HANDLE"},
                                                  {500, "CUDA_ERROR_NOT_FOUND"},
                                                  {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
                                                  {719, "CUDA_ERROR_LAUNCH_FAILED"}};
    const auto found = names.find(e);
    *s = found == names.end() ? "CUDA_ERROR_OF_THE_FAKE" : found->second;
    return kOk;
}
API cuGetErrorString(int e, const char** s) {
    *s = e == kLaunchFailed && !last_error.empty() ? last_error.c_str() : "what the fake driver was told to say";
    return kOk;
}

// --- Memory ---

API cuMemGetInfo_v2(size_t* free, size_t* total) {
    ENTER("cuMemGetInfo_v2");
    const Gpu g = gpu();
    *free = g.free > in_use ? g.free - in_use : 0;
    *total = g.total;
    return kOk;
}
API cuMemAlloc_v2(Address* p, size_t n) {
    ENTER("cuMemAlloc_v2");
    if (!n) return kInvalidValue;
    if (in_use + n > gpu().free) return kOutOfMemory;
    try {
        *p = reinterpret_cast<Address>(emulated::allocate(n));
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
    blocks[*p] = n;
    in_use += n;
    peak = std::max(peak, in_use);
    return kOk;
}
API cuMemFree_v2(Address p) {
    ENTER("cuMemFree_v2");
    const auto found = blocks.find(p);
    if (found == blocks.end()) return kInvalidValue;
    for (void* s : streams)  // freeing waits for all work
        if (int code = drain(*static_cast<Stream*>(s))) return code;
    in_use -= found->second;
    blocks.erase(found);
    emulated::release(reinterpret_cast<void*>(p));
    return kOk;
}
API cuMemHostAlloc(void** p, size_t n, unsigned) {
    ENTER("cuMemHostAlloc");
    if (posix_memalign(p, 4096, n)) return kOutOfMemory;
    std::memset(*p, 0xff, n);
    pinned[reinterpret_cast<Address>(*p)] = n;
    return kOk;
}
API cuMemAllocHost_v2(void** p, size_t n) {
    ENTER("cuMemAllocHost_v2");
    if (posix_memalign(p, 4096, n)) return kOutOfMemory;
    std::memset(*p, 0xff, n);
    pinned[reinterpret_cast<Address>(*p)] = n;
    return kOk;
}
API cuMemFreeHost(void* p) {
    ENTER("cuMemFreeHost");
    if (!pinned.erase(reinterpret_cast<Address>(p))) return kInvalidValue;
    std::free(p);
    return kOk;
}
API cuMemcpyHtoD_v2(Address d, const void* s, size_t n) {
    ENTER("cuMemcpyHtoD_v2");
    if (!on_device(d, n)) return kInvalidValue;
    std::memcpy(reinterpret_cast<void*>(d), s, n);
    return kOk;
}
API cuMemcpyDtoH_v2(void* d, Address s, size_t n) {
    ENTER("cuMemcpyDtoH_v2");
    if (!on_device(s, n)) return kInvalidValue;
    std::memcpy(d, reinterpret_cast<void*>(s), n);
    return kOk;
}
// From pinned memory the values are those of the time when the copy runs; from other memory those of the call.
API cuMemcpyHtoDAsync_v2(Address d, const void* s, size_t n, void* stream) {
    ENTER("cuMemcpyHtoDAsync_v2");
    if (!on_device(d, n)) return kInvalidValue;
    if (is_pinned(s, n))
        return enqueue(stream, [=] {
            std::memcpy(reinterpret_cast<void*>(d), s, n);
            return kOk;
        });
    auto held = std::make_shared<std::vector<char>>(static_cast<const char*>(s), static_cast<const char*>(s) + n);
    return enqueue(stream, [=] {
        std::memcpy(reinterpret_cast<void*>(d), held->data(), n);
        return kOk;
    });
}
// To memory that is not pinned the call waits.
API cuMemcpyDtoHAsync_v2(void* d, Address s, size_t n, void* stream) {
    ENTER("cuMemcpyDtoHAsync_v2");
    if (!on_device(s, n)) return kInvalidValue;
    if (int code = enqueue(stream, [=] {
            std::memcpy(d, reinterpret_cast<void*>(s), n);
            return kOk;
        }))
        return code;
    Stream* on = stream_of(stream);
    return is_pinned(d, n) || on->capturing ? kOk : drain(*on);
}
API cuMemcpyDtoDAsync_v2(Address d, Address s, size_t n, void* stream) {
    ENTER("cuMemcpyDtoDAsync_v2");
    if (!on_device(d, n) || !on_device(s, n)) return kInvalidValue;
    return enqueue(stream, [=] {
        std::memmove(reinterpret_cast<void*>(d), reinterpret_cast<void*>(s), n);
        return kOk;
    });
}
API cuMemsetD8Async(Address d, unsigned char v, size_t n, void* stream) {
    ENTER("cuMemsetD8Async");
    if (!on_device(d, n)) return kInvalidValue;
    return enqueue(stream, [=] {
        std::memset(reinterpret_cast<void*>(d), v, n);
        return kOk;
    });
}
API cuMemsetD32Async(Address d, unsigned v, size_t n, void* stream) {
    ENTER("cuMemsetD32Async");
    if (!on_device(d, 4 * n) || d % 4) return kInvalidValue;
    return enqueue(stream, [=] {
        std::fill_n(reinterpret_cast<unsigned*>(d), n, v);
        return kOk;
    });
}

// --- Modules and kernels ---

API cuModuleLoadData(void** m, const void*) {
    ENTER("cuModuleLoadData");
    if (module_error) return module_error;
    *m = new Module{0};
    modules.insert(*m);
    return kOk;
}
API cuModuleLoadDataEx(void** m, const void*, unsigned, int*, void**) {
    ENTER("cuModuleLoadDataEx");
    if (module_error) return module_error;
    *m = new Module{0};
    modules.insert(*m);
    return kOk;
}
API cuModuleUnload(void* m) {
    ENTER("cuModuleUnload");
    return drop<Module>(modules, m);
}
API cuModuleGetFunction(void** f, void* m, const char* name) {
    ENTER("cuModuleGetFunction");
    if (!modules.count(m)) return kInvalidHandle;
    const emulated::Kernel* kernel = emulated::find(name);
    if (!kernel) return kNotFound;
    *f = new Function{kernel};
    functions.insert(*f);
    return kOk;
}
API cuFuncSetAttribute(void* f, int attribute, int value) {
    ENTER("cuFuncSetAttribute");
    if (!functions.count(f)) return kInvalidHandle;
    if (attribute != 8) return kOk;
    const Gpu g = gpu();
    const int most = (g.major == 9 ? 227 : g.minor == 0 || g.minor == 7 ? 163 : 99) << 10;
    if (value > most) return kInvalidValue;
    static_cast<Function*>(f)->most_shared = value;
    return kOk;
}
API cuFuncGetAttribute(int* v, int attribute, void* f) {
    ENTER("cuFuncGetAttribute");
    if (!functions.count(f)) return kInvalidHandle;
    const std::map<int, int> known{{0, 1024}, {1, 0}, {3, 0}, {4, 64}, {8, static_cast<Function*>(f)->most_shared}};
    const auto found = known.find(attribute);
    if (found == known.end()) return kInvalidValue;
    *v = found->second;
    return kOk;
}
API cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void* stream, void** p, void**) {
    ENTER("cuLaunchKernel");
    if (!functions.count(f)) return kInvalidHandle;
    const auto* fn = static_cast<Function*>(f);
    if (!gx || !gy || !gz || !bx || !by || !bz || bx * by * bz > 1024 || gy > 65535 || gz > 65535 ||
        shared > unsigned(fn->most_shared))
        return kInvalidValue;
    auto arguments = std::make_shared<std::vector<std::vector<char>>>();
    const emulated::Kernel* kernel = fn->kernel;
    for (size_t i = 0; i < kernel->n_parameters; ++i)
        arguments->emplace_back(static_cast<char*>(p[i]), static_cast<char*>(p[i]) + kernel->sizes[i]);
    return enqueue(stream, [=] {
        std::vector<void*> pointers;
        for (auto& a : *arguments) pointers.push_back(a.data());
        ++launches;
        if (!runs_kernels) return int(kOk);
        try {
            emulated::launch(*kernel, dim3(gx, gy, gz), dim3(bx, by, bz), shared, pointers.data());
        } catch (const std::exception& e) {
            last_error = e.what();
            return int(kLaunchFailed);
        }
        return int(kOk);
    });
}

// --- Streams, events and graphs ---

API cuStreamCreate(void** s, unsigned) {
    ENTER("cuStreamCreate");
    *s = new Stream;
    streams.insert(*s);
    return kOk;
}
API cuStreamDestroy_v2(void* s) {
    ENTER("cuStreamDestroy_v2");
    if (Stream* on = stream_of(s)) drain(*on);
    return drop<Stream>(streams, s);
}
API cuStreamSynchronize(void* s) {
    ENTER("cuStreamSynchronize");
    Stream* on = stream_of(s);
    if (!on) return kInvalidHandle;
    return on->capturing ? 900 : drain(*on);
}
API cuStreamQuery(void* s) {
    ENTER("cuStreamQuery");
    Stream* on = stream_of(s);
    return !on ? int(kInvalidHandle) : on->work.empty() ? int(kOk) : int(kNotReady);
}
API cuStreamBeginCapture_v2(void* s, int) {
    ENTER("cuStreamBeginCapture_v2");
    Stream* on = stream_of(s);
    if (!on || on->capturing) return kInvalidHandle;
    on->capturing = std::make_unique<Graph>();
    return kOk;
}
API cuStreamEndCapture(void* s, void** g) {
    ENTER("cuStreamEndCapture");
    Stream* on = stream_of(s);
    if (!on || !on->capturing) return kCaptureInvalidated;
    *g = on->capturing.release();
    graphs.insert(*g);
    return kOk;
}
API cuGraphInstantiateWithFlags(void** e, void* g, unsigned long long) {
    ENTER("cuGraphInstantiateWithFlags");
    if (!graphs.count(g)) return kInvalidHandle;
    *e = new Executable{static_cast<Graph*>(g)->work};
    executables.insert(*e);
    return kOk;
}
API cuGraphUpload(void*, void*) {
    ENTER("cuGraphUpload");
    return kOk;
}
API cuGraphLaunch(void* e, void* stream) {
    ENTER("cuGraphLaunch");
    if (!executables.count(e)) return kInvalidHandle;
    Stream* on = stream_of(stream);
    if (!on || on->capturing) return kInvalidHandle;
    for (const Work& w : static_cast<Executable*>(e)->work) on->work.push_back(w);
    return kOk;
}
API cuGraphDestroy(void* g) {
    ENTER("cuGraphDestroy");
    return drop<Graph>(graphs, g);
}
API cuGraphExecDestroy(void* e) {
    ENTER("cuGraphExecDestroy");
    return drop<Executable>(executables, e);
}
API cuEventCreate(void** e, unsigned) {
    ENTER("cuEventCreate");
    *e = new Event;
    events.insert(*e);
    return kOk;
}
API cuEventDestroy_v2(void* e) {
    ENTER("cuEventDestroy_v2");
    return drop<Event>(events, e);
}
API cuEventRecord(void* e, void* stream) {
    ENTER("cuEventRecord");
    if (!events.count(e)) return kInvalidHandle;
    return enqueue(stream, [=] {
        static_cast<Event*>(e)->recorded = true;
        return kOk;
    });
}
API cuEventSynchronize(void* e) {
    ENTER("cuEventSynchronize");
    if (!events.count(e)) return kInvalidHandle;
    for (void* s : streams)
        while (!static_cast<Event*>(e)->recorded && !static_cast<Stream*>(s)->work.empty()) {
            const Work next = std::move(static_cast<Stream*>(s)->work.front());
            static_cast<Stream*>(s)->work.pop_front();
            if (int code = run(next)) return code;
        }
    return kOk;
}
API cuEventElapsedTime(float* ms, void* a, void* b) {
    ENTER("cuEventElapsedTime");
    if (!events.count(a) || !events.count(b)) return kInvalidHandle;
    *ms = 1.f;
    return kOk;
}
API cuEventElapsedTime_v2(float* ms, void* a, void* b) { return cuEventElapsedTime(ms, a, b); }
API cuStreamWaitEvent(void* s, void* e, unsigned) {
    ENTER("cuStreamWaitEvent");
    if (!events.count(e)) return kInvalidHandle;
    return enqueue(s, [] { return kOk; });
}

// What cuda-bindings asks for every call it knows, by the name without a version.
API cuGetProcAddress_v2(const char* name, void** p, int, unsigned long long, int* status) {
    static void* self = [] {
        Dl_info here;
        dladdr(reinterpret_cast<void*>(&cuInit), &here);
        return dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    }();
    const std::string plain = name;
    *p = nullptr;
    for (const auto& n : {plain + "_v2", plain})
        if ((*p = dlsym(self, n.c_str()))) break;
    if (status) *status = *p ? 0 : 1;
    return *p ? kOk : kNotFound;
}
API cuGetProcAddress(const char* name, void** p, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, p, version, flags, nullptr);
}

// --- One kernel without a driver, for tests/emulated/kernels.py ---

TEST(void*) kernel_allocate(size_t n) { return emulated::allocate(n); }
TEST(void) kernel_release(void* p) { emulated::release(p); }
// Returns what went wrong, or null.
TEST(const char*)
kernel_run(const char* name, const unsigned* shape, size_t shared, int n, void** parameters, const size_t* sizes) {
    const std::lock_guard<std::recursive_mutex> locked(mutex);
    const emulated::Kernel* kernel = emulated::find(name);
    last_error.clear();
    if (!kernel) {
        last_error = std::string("there is no kernel ") + name;
    } else if (std::vector<size_t>(sizes, sizes + n) !=
               std::vector<size_t>(kernel->sizes, kernel->sizes + kernel->n_parameters)) {
        last_error = std::string(name) + ": takes " + std::to_string(kernel->n_parameters) +
                     " parameters, other sizes of them or another number were given (" + std::to_string(n) + ")";
        for (size_t i = 0; i < kernel->n_parameters; ++i) last_error += " " + std::to_string(kernel->sizes[i]);
    } else {
        try {
            emulated::launch(*kernel, dim3(shape[0], shape[1], shape[2]), dim3(shape[3], shape[4], shape[5]), shared,
                             parameters);
        } catch (const std::exception& e) {
            last_error = e.what();
        }
    }
    return last_error.empty() ? nullptr : last_error.c_str();
}
