// See emulator.h. Compiled without instrumentation in every build.
#include <sys/mman.h>

#include "launch.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

// Leaves one stack for another: what a call must keep is pushed, and the pointers change places. Inlined on
// x86-64, with a jump: a processor predicts that a return goes to the last call, which was on another stack.
#if defined(__x86_64__)
__attribute__((always_inline)) static inline void switch_stack(void** from, void* to) {
    asm volatile(R"(
        lea -128(%%rsp),%%rsp
        push %%rbp
        push %%rbx
        lea 1f(%%rip),%%rax
        push %%rax
        mov %%rsp,(%0)
        mov %1,%%rsp
        pop %%rax
        jmp *%%rax
        1:
        pop %%rbx
        pop %%rbp
        lea 128(%%rsp),%%rsp)"
                 : "+D"(from), "+S"(to)
                 :
                 : "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc", "xmm0", "xmm1",
                   "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14",
                   "xmm15");
}
#elif defined(__aarch64__)
extern "C" void emulated_switch(void** from, void* to);
static inline void switch_stack(void** from, void* to) { emulated_switch(from, to); }
asm(R"(.text
.globl emulated_switch
.type emulated_switch,@function
emulated_switch:
  sub sp,sp,#176
  stp x19,x20,[sp]
  stp x21,x22,[sp,#16]
  stp x23,x24,[sp,#32]
  stp x25,x26,[sp,#48]
  stp x27,x28,[sp,#64]
  stp x29,x30,[sp,#80]
  stp d8,d9,[sp,#96]
  stp d10,d11,[sp,#112]
  stp d12,d13,[sp,#128]
  stp d14,d15,[sp,#144]
  mov x2,sp
  str x2,[x0]
  mov sp,x1
  ldp x19,x20,[sp]
  ldp x21,x22,[sp,#16]
  ldp x23,x24,[sp,#32]
  ldp x25,x26,[sp,#48]
  ldp x27,x28,[sp,#64]
  ldp x29,x30,[sp,#80]
  ldp d8,d9,[sp,#96]
  ldp d10,d11,[sp,#112]
  ldp d12,d13,[sp,#128]
  ldp d14,d15,[sp,#144]
  add sp,sp,#176
  ret
)");
#endif

namespace emulated {
[[noreturn]] static void fail(const std::string& why);
namespace {

// No power of two: the tops of a warp's stacks would all lie in the same sets of a cache.
constexpr size_t kStack = (64 << 10) + 10 * 64, kMostThreads = 1024, kMostShared = 227 << 10, kGuard = 64 << 10;

// Who touched a byte last. Epochs count a thread's barriers, warp epochs its warp's; `block` is a number no other block of any
// launch has.
struct Mark {
    struct By {
        uint64_t block = 0;
        uint32_t epoch = 0, warp_epoch = 0;
        int16_t thread = 0;  // kOneWarp - w: several of warp w; kMany: of several warps
    } writer, reader;
    bool under_way = false;  // a copy ahead is going to write it
};
constexpr int16_t kOneWarp = -2, kMany = -64;

struct Region {
    size_t bytes;
    std::unique_ptr<Mark[]> marks;
};

struct Copy {
    unsigned char* to;
    size_t n;
    unsigned char bytes[16];
};

struct Fiber {
    void* stack = nullptr;
    dim3 thread;
    int index = 0, lane = 0, warp = 0;
    bool started = false, done = false;
    uint32_t barriers = 0, warp_barriers = 0, meetings = 0, whole = 0;
    std::vector<Copy> copies;    // under way, in order
    std::vector<size_t> groups;  // how many of them each committed group has
};

uint64_t random_state = 1;

uint32_t random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return uint32_t(random_state >> 11);
}

// An order of 0 .. n - 1 that a seed decides.
struct Order {
    unsigned n = 0, left = 0, start = 0, step = 1;
    Order() = default;
    explicit Order(unsigned count) : n(count), left(count), start(random() % count) {
        for (unsigned tried = random() % n; tried > 1; --tried)
            if (std::gcd(tried, n) == 1) {
                step = tried;
                break;
            }
    }
    unsigned next() {
        const unsigned at = start;
        --left;
        start = at < n - step ? at + step : at - (n - step);
        return at;
    }
};

struct Block {
    std::vector<Fiber> fibers = std::vector<Fiber>(kMostThreads);
    unsigned n = 0, alive = 0, waiting = 0, opened = 0, met[32] = {};
    uint64_t progress = 0, serial = 0, first_of_launch = 0;
    unsigned first = 0;  // of the warp whose turn it is
    Order turns;         // of its lanes
    dim3 grid, size, at;
    unsigned char* shared = nullptr;
    size_t shared_bytes = 0;
    Slot slots[32][2][32];  // of a warp, by the parity of a meeting, by lane
    const Kernel* kernel = nullptr;
    void** parameters = nullptr;
    void* scheduler = nullptr;
    bool sees_others = false;  // it came last, and reads what the launch's other blocks wrote
    std::string error;
};

Block block;
Fiber* now = nullptr;
char* stacks = nullptr;
std::map<uintptr_t, Region> regions;  // device memory, by address
std::vector<Mark> shared_marks;

#ifdef COBRA_CHECKED
constexpr bool kChecked = true;
#else
constexpr bool kChecked = false;
#endif
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kOwnHeap = false;  // AddressSanitizer guards what malloc gives
#else
constexpr bool kOwnHeap = true;
#endif

// An own range of addresses, never used twice while it lasts: what lies between allocations belongs to nobody.
constexpr size_t kHeap = size_t(1) << 40;
char* heap = nullptr;
size_t heap_used = 0;

void begin(Fiber& f);

// Returns the fiber of the next lane whose turn it is, or null: then the scheduler goes on.
Fiber* next_of_warp() {
    while (block.turns.left && block.error.empty()) {
        Fiber& f = block.fibers[block.first + block.turns.next()];
        if (f.done) continue;
        if (!f.started) begin(f);
        return &f;
    }
    return nullptr;
}

// From one lane straight to the next.
__attribute__((always_inline)) inline void yield() {
    Fiber* const me = now;
    now = next_of_warp();
    switch_stack(&me->stack, now ? now->stack : block.scheduler);
}

void entry() {  // a fiber lives on: each block of every launch begins where the one before ended
    for (;;) {
        block.kernel->call(block.kernel->function, block.parameters);
        if (!now->copies.empty()) fail("a thread ends while copies of its own are under way that nobody waited for");
        now->done = true;
        ++block.progress;
        --block.alive;
        yield();
    }
}

void begin(Fiber& f) {
    auto top = reinterpret_cast<void**>(stacks + size_t(f.index + 1) * kStack - 64);
#if defined(__x86_64__)
    *--top = nullptr;  // as if entry had been called
    *--top = reinterpret_cast<void*>(entry);
#else
    top -= 22;
    std::memset(top, 0, 176);
    top[11] = reinterpret_cast<void*>(entry);
#endif
    f.stack = top;
    f.started = true;
}

std::string where() {
    auto one = [](const dim3& d) {
        return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
    };
    return std::string(block.kernel->name) + ", block " + one(block.at) + ", thread " + one(now->thread);
}

// Whether what another thread did comes before what this one does now, whatever the order of threads.
bool ordered(const Mark::By& by, bool in_shared) {
    if (by.block < block.first_of_launch) return true;
    if (by.block != block.serial) return in_shared || block.sees_others;
    if (by.epoch != now->barriers) return true;
    if (by.thread == kMany) return false;
    const int warp = by.thread >= 0 ? by.thread / 32 : kOneWarp - by.thread;
    if (by.thread == now->index) return true;
    return warp == now->warp && by.warp_epoch != now->warp_barriers;
}

void note(Mark& m, bool writes, const void* p, bool in_shared) {
    const bool after_writer = ordered(m.writer, in_shared), after_reader = !writes || ordered(m.reader, in_shared);
    if (!after_writer || !after_reader) {
        const Mark::By& other = after_writer ? m.reader : m.writer;
        fail(
            std::string("a race: thread ") + std::to_string(other.thread) + (after_writer ? " reads" : " writes") +
            " what this one " + (writes ? "writes" : "reads") + ", with no barrier between, in " +
            (in_shared ? "shared memory at byte " + std::to_string((const unsigned char*)p - block.shared) : "device memory"));
    }
    const Mark::By me{block.serial, now->barriers, now->warp_barriers, int16_t(now->index)};
    if (writes) {
        m.writer = me;
        return;
    }
    Mark::By& r = m.reader;
    const bool same_time = r.block == me.block && r.epoch == me.epoch;
    if (!same_time || r.thread == me.thread) {
        r = me;
    } else if (r.thread != kMany) {
        const int warp = r.thread >= 0 ? r.thread / 32 : kOneWarp - r.thread;
        // Earlier readers of the same warp that a warp barrier separates from now stay readers for the other warps: the warp
        // is all that is kept.
        r = me;
        r.thread = warp == now->warp ? int16_t(kOneWarp - warp) : kMany;
    }
}

void set_under_way(const Copy& c, bool is) {
    if (!kChecked) return;
    for (size_t i = 0; i < c.n; ++i) shared_marks[c.to - block.shared + i].under_way = is;
}

}  // namespace

dim3 thread_index() { return now->thread; }
dim3 block_index() { return block.at; }
dim3 block_size() { return block.size; }
dim3 grid_size() { return block.grid; }
int lane() { return now->lane; }
unsigned char* shared_memory() { return block.shared; }

[[noreturn]] static void fail(const std::string& why) {
    if (block.error.empty()) block.error = where() + ": " + why;
    now->done = true;
    now->started = false;  // its stack is left as it is
    yield();
    std::abort();
}
void fail(const char* why) { fail(std::string(why)); }

void barrier() {
    Fiber& me = *now;
    ++me.barriers;
    ++block.progress;
    if (++block.waiting == block.n) {
        ++block.opened;
        block.waiting = 0;
    }
    while (block.opened < me.barriers) yield();
}

const Slot* meet(unsigned mask, const Slot& mine) {
    Fiber& me = *now;
    const unsigned first = me.warp * 32, lanes = std::min(32u, block.n - first);
    if (!(mask >> me.lane & 1)) fail("a lane is not in the mask that it names");
    if (lanes < 32 && mask >> lanes) fail("a mask names lanes that the block does not have");
    Slot* slots = block.slots[me.warp][me.meetings & 1];
    slots[me.lane] = mine;
    ++me.meetings;
    ++block.progress;
    if (mask == kWholeWarp) {  // the usual one is counted
        const unsigned arrived = ++me.whole;
        for (++block.met[me.warp]; block.met[me.warp] < arrived * 32; yield()) {
        }
        return slots;
    }
    for (;;) {
        bool all = true;
        for (unsigned l = 0; l < lanes; ++l) {
            const Fiber& other = block.fibers[first + l];
            if (!(mask >> l & 1) || other.meetings >= me.meetings) continue;
            if (other.done) fail("a mask names a lane that has ended");
            all = false;
        }
        if (all) return slots;
        yield();
    }
}

void warp_barrier() {
    meet(kWholeWarp, Slot{});
    ++now->warp_barriers;
}

void touch(const void* p, size_t n, bool writes) {
    if (!now) return;  // no kernel runs: kernels are being registered
    const auto at = reinterpret_cast<uintptr_t>(p);
    if (n && (n & (n - 1)) == 0 && at % n)
        fail("a misaligned access: " + std::to_string(n) + " bytes at an address that is no multiple of that");
    if (!kChecked) return;
    const auto base = reinterpret_cast<uintptr_t>(block.shared);
    if (at - (base - kGuard) < block.shared_bytes + 2 * kGuard) {
        const auto offset = at - base;
        if (offset > block.shared_bytes || n > block.shared_bytes - offset)
            fail("out of bounds: " + std::to_string(n) + " bytes at byte " + std::to_string(int64_t(offset)) + " of " +
                 std::to_string(block.shared_bytes) + " bytes of shared memory");
        for (size_t i = 0; i < n; ++i) {
            if (shared_marks[offset + i].under_way) fail("shared memory is touched that a copy under way is going to write");
            note(shared_marks[offset + i], writes, static_cast<const char*>(p) + i, true);
        }
        return;
    }
    const auto h = reinterpret_cast<uintptr_t>(heap);
    auto next = regions.upper_bound(at);
    if (next != regions.begin()) {
        auto& [start, region] = *std::prev(next);
        if (at - start < region.bytes && n <= region.bytes - (at - start)) {
            if (!region.marks) region.marks.reset(new Mark[region.bytes]);
            for (size_t i = 0; i < n; ++i) note(region.marks[at - start + i], writes, p, false);
            return;
        }
    }
    if (heap && at - h < kHeap) fail("out of bounds: " + std::to_string(n) + " bytes of device memory that nobody allocated");
}

void copy_ahead(void* shared, const void* global, size_t n, bool valid) {
    auto* to = static_cast<unsigned char*>(shared);
    if (reinterpret_cast<uintptr_t>(to) % n) fail("a copy ahead to a misaligned address");
    if (to < block.shared || to + n > block.shared + block.shared_bytes)
        fail("a copy ahead to what is not shared memory of the block");
    touch(to, n, true);
    Copy c{to, n, {}};
    if (valid) {
        touch(global, n, false);
        std::memcpy(c.bytes, global, n);
    }
    now->copies.push_back(c);
    set_under_way(c, true);
}

void commit_copies() {
    size_t committed = 0;
    for (size_t g : now->groups) committed += g;
    now->groups.push_back(now->copies.size() - committed);
}

void wait_copies(int left) {
    Fiber& me = *now;
    size_t n = 0;
    while (me.groups.size() > size_t(left)) {
        n += me.groups.front();
        me.groups.erase(me.groups.begin());
    }
    const std::vector<Copy> landed(me.copies.begin(), me.copies.begin() + n);
    me.copies.erase(me.copies.begin(), me.copies.begin() + n);
    for (const Copy& c : landed) {
        set_under_way(c, false);
        touch(c.to, c.n, true);
        std::memcpy(c.to, c.bytes, c.n);
    }
}

bool last_block(unsigned* counter, unsigned* flag) {
    barrier();
    if (now->index == 0) {
        touch(flag, 4, true);
        *flag = ++*counter == block.grid.x * block.grid.y * block.grid.z;
        if (*flag) *counter = 0;
    }
    barrier();
    touch(flag, 4, false);
    if (*flag) block.sees_others = true;
    return *flag != 0;
}

void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Slot mine{};
    std::memcpy(mine.words, a, 16);
    std::memcpy(mine.words + 4, b, 8);
    const Slot* s = meet(kWholeWarp, mine);
    auto half_at = [](uint32_t w, int i) {
        const uint16_t bits = uint16_t(w >> 16 * i);
        HostHalf h;
        std::memcpy(&h, &bits, 2);
        return float(h);
    };
    const int g = now->lane >> 2, t = now->lane & 3;
    for (int k = 0; k < 16; ++k) {
        const int from = k % 8 / 2, part = k % 2, upper = k / 8;  // which lane of four, which half, which register
        for (int r = 0; r < 2; ++r) {
            const float left = half_at(s[g * 4 + from].words[r + 2 * upper], part);
            for (int c = 0; c < 2; ++c) d[2 * r + c] += left * half_at(s[(2 * t + c) * 4 + from].words[4 + upper], part);
        }
    }
}

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
    touch(row, 16, false);
    const auto* at = static_cast<const unsigned char*>(row);
    if (at < block.shared || at + 16 > block.shared + block.shared_bytes)
        fail("a row of a matrix that is not in shared memory");
    Slot mine{};
    std::memcpy(mine.words, row, 16);
    const Slot* s = meet(kWholeWarp, mine);
    const int g = now->lane >> 2, t = now->lane & 3;
    for (int i = 0; i < 4; ++i) {
        uint16_t v[2];
        for (int c = 0; c < 2; ++c) {
            const int y = transposed ? 2 * t + c : g, x = transposed ? g : 2 * t + c;
            std::memcpy(&v[c], reinterpret_cast<const char*>(s[8 * i + y].words) + 2 * x, 2);
        }
        r[i] = uint32_t(v[1]) << 16 | v[0];
    }
}

namespace {
std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

void run_block() {
    auto& b = block;
    ++b.serial;
    b.sees_others = false;
    std::memset(b.shared, 0xff, b.shared_bytes);  // NaN as floats and halves, -1 as integers
    for (unsigned i = 0; i < b.n; ++i) {
        Fiber& f = b.fibers[i];
        f.thread = dim3(i % b.size.x, i / b.size.x % b.size.y, i / b.size.x / b.size.y);
        f.index = int(i);
        f.lane = int(i & 31);
        f.warp = int(i >> 5);
        f.done = false;
        f.barriers = f.warp_barriers = f.meetings = f.whole = 0;
        f.copies.clear();
        f.groups.clear();
    }
    const unsigned warps = (b.n + 31) / 32;
    b.alive = b.n;
    b.waiting = b.opened = 0;
    std::fill(b.met, b.met + 32, 0u);
    while (b.alive) {
        const auto before = b.progress;
        Order turns(warps);
        for (unsigned k = 0; k < warps && b.error.empty(); ++k) {  // warps in any order, the lanes of one until none gets on
            b.first = turns.next() * 32;
            for (uint64_t seen = ~uint64_t(0); seen != b.progress && b.error.empty();) {
                seen = b.progress;
                b.turns = Order(std::min(32u, b.n - b.first));
                now = next_of_warp();
                if (now) switch_stack(&b.scheduler, now->stack);
            }
        }
        const bool stuck = b.error.empty() && b.alive && before == b.progress;
        if (stuck)
            b.error = std::string(b.kernel->name) +
                      ": threads wait for one another for ever: a barrier or warp operation that not all of them reach";
        now = nullptr;
        if (!b.error.empty()) {
            for (auto& f : b.fibers) f.started = false;
            throw std::runtime_error(b.error);
        }
    }
}
}  // namespace

const Kernel* find(const char* name) {
    auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : &found->second;
}

void enlist(const Kernel& kernel) {
    if (!kernels().emplace(kernel.name, kernel).second) {
        std::fprintf(stderr, "two kernels are called %s\n", kernel.name);
        std::abort();
    }
}

void launch(const Kernel& kernel, dim3 grid, dim3 size, size_t shared_bytes, void** parameters) {
    auto& b = block;
    b.grid = grid;
    b.size = size;
    b.n = size.x * size.y * size.z;
    b.kernel = &kernel;
    b.parameters = parameters;
    b.error.clear();
    if (!b.n || b.n > kMostThreads || shared_bytes > kMostShared)
        throw std::runtime_error(std::string(kernel.name) + ": a block has 1 to 1024 threads and at most 227 KiB");
    if (!stacks) {
        stacks = static_cast<char*>(
            mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (stacks == MAP_FAILED) throw std::runtime_error("no memory for the emulator's stacks");
    }
    // Behind it lies what a sanitizer knows nobody may touch, and between guards what the checked build does.
    const std::unique_ptr<unsigned char[]> room(new unsigned char[shared_bytes + (kOwnHeap ? 2 * kGuard : 0) + 128]);
    auto start = reinterpret_cast<uintptr_t>(room.get()) + (kOwnHeap ? kGuard : 0);
    b.shared = reinterpret_cast<unsigned char*>((start + 127) & ~uintptr_t(127));
    b.shared_bytes = shared_bytes;
    if (kChecked) shared_marks.assign(shared_bytes, Mark());
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(b.shared + shared_bytes, room.get() + shared_bytes + 128 - (b.shared + shared_bytes));
#endif
    b.first_of_launch = b.serial + 1;
    const unsigned total = grid.x * grid.y * grid.z;
    if (!total) throw std::runtime_error(std::string(kernel.name) + ": a grid of no blocks");
    Order order(total);
    for (unsigned i = 0; i < total; ++i) {
        const unsigned k = order.next();
        b.at = dim3(k % grid.x, k / grid.x % grid.y, k / grid.x / grid.y);
        run_block();
    }
}

void* allocate(size_t n) {
    void* p = nullptr;
    if (kOwnHeap) {
        if (!heap) {
            heap = static_cast<char*>(
                mmap(nullptr, kHeap, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
            if (heap == MAP_FAILED) throw std::bad_alloc();
        }
        p = heap + heap_used;
        heap_used += (n + 2 * kGuard) / kGuard * kGuard;
        if (heap_used > kHeap) throw std::bad_alloc();
    } else if (posix_memalign(&p, 256, n)) {
        throw std::bad_alloc();
    }
    std::memset(p, 0xff, n);
    regions[reinterpret_cast<uintptr_t>(p)] = Region{n, nullptr};
    return p;
}

bool release(void* p) {
    auto found = regions.find(reinterpret_cast<uintptr_t>(p));
    if (found == regions.end()) return false;
    const size_t n = found->second.bytes;
    regions.erase(found);
    if (kOwnHeap) {
        madvise(p, (n + kGuard - 1) / kGuard * kGuard, MADV_DONTNEED);
    } else {
        std::free(p);
    }
    return true;
}

bool owns(const void* p, size_t n) {
    const auto at = reinterpret_cast<uintptr_t>(p);
    auto next = regions.upper_bound(at);
    if (next == regions.begin()) return false;
    const auto& [start, region] = *std::prev(next);
    return at - start <= region.bytes && n <= region.bytes - (at - start);
}

void seed(uint64_t s) { random_state = s * 2 + 1; }

}  // namespace emulated

#ifdef COBRA_CHECKED
// What g++ -fsanitize=thread calls at each access: this is used in place of its runtime.
extern "C" {
#define COBRA_ACCESS(n)                                            \
    void __tsan_read##n(void* p) { emulated::touch(p, n, false); } \
    void __tsan_write##n(void* p) { emulated::touch(p, n, true); }
COBRA_ACCESS(1)
COBRA_ACCESS(2)
COBRA_ACCESS(4)
COBRA_ACCESS(8)
COBRA_ACCESS(16)
#undef COBRA_ACCESS
#define COBRA_UNALIGNED(n)                                                   \
    void __tsan_unaligned_read##n(void* p) {                                 \
        for (int i = 0; i < n; ++i) emulated::touch((char*)p + i, 1, false); \
    }                                                                        \
    void __tsan_unaligned_write##n(void* p) {                                \
        for (int i = 0; i < n; ++i) emulated::touch((char*)p + i, 1, true);  \
    }
COBRA_UNALIGNED(2)
COBRA_UNALIGNED(4)
COBRA_UNALIGNED(8)
COBRA_UNALIGNED(16)
#undef COBRA_UNALIGNED
void __tsan_read_range(void* p, size_t n) {
    for (size_t i = 0; i < n; ++i) emulated::touch((char*)p + i, 1, false);
}
void __tsan_write_range(void* p, size_t n) {
    for (size_t i = 0; i < n; ++i) emulated::touch((char*)p + i, 1, true);
}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
#endif
