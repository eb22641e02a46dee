/* cuda_shim.h: the part of CUDA that ckca_cuda.cu uses, emulated on the CPU, to test its kernels without a GPU.

       g++ -std=c++17 -O2 -x c++ -include tests/cuda_shim.h -I. -c ckca_cuda.cu

   Blocks run one after another, in reverse order in every other launch. A block's threads are fibres: one runs until it
   waits at a barrier or for its warp, then another, from the same warp if possible. Tensor-core instructions are
   functions on the fragments that the PTX documentation defines; the cuBLAS call is three nested loops; asynchronous
   copies to shared memory (cp.async) run when a thread waits for them. Hopper's wgmma reads its descriptors and the
   swizzled lines as the PTX documentation lays them out, when a thread waits for it; tensor copies (TMA) run at once or,
   in every other block, when a thread waits for their barrier. Slow: meant for small shapes.

   The shim is stricter than a GPU, to find mistakes. The host cannot access device memory (its pages are protected
   outside kernels and copies); new memory is filled with NaN and surrounded by protected pages or NaN; pointers among a
   kernel's arguments must be device memory; a captured graph keeps its arguments' values; copies from the host,
   allocations and waits fail during capture; pageable memory is read only when a copy runs. The process aborts with a
   message after a call in the child of a fork(), a deadlock of a block's threads, a kernel under programmatic dependent
   launch that does not wait for its predecessors, dynamic shared memory beyond the launch's size or opt-in, a tensor
   map, copy, descriptor or barrier that the documentation does not allow, and wgmma without a fence before it. */
#ifndef CUDA_SHIM_H
#define CUDA_SHIM_H
#ifndef CKCA_CUDA_SHIM
#define CKCA_CUDA_SHIM
#endif
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <tuple>
#include <type_traits>
#include <vector>
#ifndef __x86_64__
#include <ucontext.h>
#endif
#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wunused-function"
#endif

#define __global__ static
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return uint4{x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return float2{x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return float4{x, y, z, w}; }

static inline unsigned __float_as_uint(float v) {
    unsigned u;
    memcpy(&u, &v, 4);
    return u;
}
static inline float __uint_as_float(unsigned u) {
    float v;
    memcpy(&v, &u, 4);
    return v;
}
template <class T> static inline T __ldcg(const T *from) { return *from; }
static inline unsigned atomicInc(unsigned *at, unsigned most) { /* blocks and fibres take turns */
    const unsigned was = *at;
    *at = was >= most ? 0 : was + 1;
    return was;
}
static inline void __threadfence() {}
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }

/* Controls for tests: the "GPU" memory in bytes; which call fails (0: none, 1: the next one, ...); which streams defer
   their work until something waits for it (bits 0, 1, 2: a context's first, second, third stream). */
extern "C" {
size_t cuda_shim_memory = (size_t)1 << 30;
int cuda_shim_fail = 0, cuda_shim_lazy = 0;
int cuda_shim_last = 0; /* what cudaGetLastError returns */
long cuda_shim_allocations = 0;
long cuda_shim_launches = 0, cuda_shim_replays = 0, cuda_shim_waits = 0, cuda_shim_wgmma = 0;
}

namespace shim {

/* ---- fibres ---- */

enum { THREADS = 256, WARPS = THREADS / 32, STACK = 1 << 16 };

#ifdef __x86_64__
/* Saves the callee-saved registers, switches stacks, and resumes the other fibre. */
extern "C" void shim_switch(void **save, void *load);
asm(".text\n.globl shim_switch\n.type shim_switch,@function\nshim_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n.size shim_switch,.-shim_switch\n");
typedef void *fibre_context;
static inline void switch_fibre(fibre_context *from, fibre_context *to) { shim_switch(from, *to); }
static void prepare(fibre_context *p, char *stack, void (*start)()) {
    void **top = (void **)(stack + STACK - 64);
    *--top = nullptr; /* start must not return; aligns the stack as after a call */
    *--top = (void *)start;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    *p = top;
}
#else
typedef ucontext_t fibre_context;
static inline void switch_fibre(fibre_context *from, fibre_context *to) { swapcontext(from, to); }
static void prepare(fibre_context *p, char *stack, void (*start)()) {
    getcontext(p);
    p->uc_stack.ss_sp = stack;
    p->uc_stack.ss_size = STACK;
    p->uc_link = nullptr;
    makecontext(p, start, 0);
}
#endif

struct barrier { /* of the block, or of a warp */
    int alive, arrived;
    unsigned generation;
};
struct lane_data { /* data that lanes exchange; double-buffered, so that one barrier is enough */
    uint64_t value[2][32];
    unsigned a[2][32][4], b[2][32][2];
    const void *row[2][32];
};
struct mbarrier {
    barrier of;
    unsigned count, missing, phase;
    long bytes;
    std::vector<std::function<void()>> copies; /* which run when a thread waits */
};
struct product { /* a pending wgmma */
    float *sums;
    uint64_t a, b;
    int bf16, columns;
    unsigned group;
};
struct pending_copies { /* a thread's pending copies to shared memory, run when it waits for them */
    enum { MOST = 64 };
    struct {
        void *to;
        const void *from;
        bool there;
        unsigned group;
    } copy[MOST];
    unsigned first, last, group;
};

static fibre_context launcher, fibre[THREADS];
static char *stacks;
static bool done[THREADS], waited[THREADS];
static int threads = THREADS; /* of a block */
static bool dependent;        /* launched with programmatic dependent launch */
static struct {
    const struct barrier *at; /* NULL: it can run */
    unsigned generation;
} waits[THREADS];
static int current, direction; /* warps are tried in this direction, which alternates between blocks */
static barrier block, warp[WARPS];
static lane_data exchanged[WARPS];
static unsigned parity[THREADS];
static pending_copies copies[THREADS];
static std::map<const void *, mbarrier> mbarriers; /* of the block */
static std::deque<product> products[THREADS];
static unsigned product_group[THREADS];
static bool fenced[THREADS];
static const std::function<void()> *body;
static struct { unsigned x; } thread;
static dim3 block_index, block_count;

static bool can_run(int i) { return !done[i] && (!waits[i].at || waits[i].at->generation != waits[i].generation); }

/* Resumes another fibre, from the same warp while one is runnable, so that warps run as far ahead as barriers allow;
   returns to the launcher when all have ended. */
static void next() {
    const int from = current;
    int to = -1, i, left = 0;
    for (i = 1; i < 32 && to < 0; i++)
        if (can_run(from / 32 * 32 + (from + i) % 32)) to = from / 32 * 32 + (from + i) % 32;
    const int warps = threads / 32;
    for (i = 0; i < threads && to < 0; i++) {
        const int other = ((from / 32 + direction * (1 + i / 32) + 2 * warps) % warps) * 32 + i % 32;
        if (can_run(other)) to = other;
        left += !done[other];
    }
    if (to < 0 && left) {
        fprintf(stderr, "cuda_shim: the threads of a block wait for each other forever\n");
        abort();
    }
    if (to < 0) {
        switch_fibre(&fibre[from], &launcher);
        return;
    }
    current = to;
    thread.x = (unsigned)to;
    switch_fibre(&fibre[from], &fibre[to]);
}

static void release(barrier &m) {
    m.arrived = 0;
    m.generation++;
}
static void arrive_and_wait(barrier &m) {
    if (++m.arrived == m.alive) {
        release(m);
        return;
    }
    waits[current] = {&m, m.generation};
    next();
    waits[current].at = nullptr;
}
static void leave(barrier &m) {
    if (--m.alive && m.arrived == m.alive) release(m);
}
static void start() {
    (*body)();
    if (dependent && !waited[current]) {
        fprintf(stderr, "cuda_shim: a kernel that may start early does not wait\n");
        abort();
    }
    done[current] = true;
    leave(block);
    leave(warp[current / 32]);
    next();
    abort();
}

/* Dynamic shared memory ends at a protected page. */
enum { SHARED = 256 << 10 };
static char *shared_end, *shared;
static size_t shared_bytes;

static void run_block(dim3 index) {
    block_index = index;
    block = barrier{threads, 0, 0};
    for (auto &w : warp) w = barrier{32, 0, 0};
    memset(shared_end - shared_bytes, 0xff, shared_bytes);
    shared = shared_end - shared_bytes;
    mbarriers.clear();
    for (int i = 0; i < threads; i++) {
        done[i] = waited[i] = false;
        waits[i].at = nullptr;
        copies[i].first = copies[i].last = copies[i].group = product_group[i] = 0;
        products[i].clear();
        fenced[i] = false;
        prepare(&fibre[i], stacks + (size_t)i * STACK, start);
    }
    direction = direction == 1 ? -1 : 1;
    current = direction == 1 ? 0 : threads - 32;
    thread.x = (unsigned)current;
    switch_fibre(&launcher, &fibre[current]);
}

static void run(dim3 grid, unsigned count, size_t bytes, bool is_dependent, const std::function<void()> &kernel) {
    static bool backwards;
    const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
    if (!stacks) {
        stacks =
            (char *)mmap(nullptr, (size_t)THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        shared_end = (char *)mmap(nullptr, SHARED + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) +
                     SHARED;
        mprotect(shared_end, 4096, PROT_NONE);
    }
    body = &kernel;
    block_count = grid;
    threads = (int)count;
    dependent = is_dependent;
    shared_bytes = bytes;
    backwards = !backwards;
    for (uint64_t i = 0; i < blocks; i++) {
        const uint64_t b = backwards ? blocks - 1 - i : i;
        run_block(dim3((unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y)));
    }
}

/* ---- device memory ---- */

enum : size_t { ARENA = (size_t)4 << 30, PAGE = 4096 };
static char *arena;
static std::map<size_t, size_t> blocks; /* offset, bytes */
static size_t in_use, high;
static int opened, closings;
static bool is_open; /* its pages, up to high */

/* Pages are protected only once in several calls: protecting is slow, and a mistake recurs. */
static void open_arena() {
    if (!opened++ && !is_open && high) mprotect(arena, high, PROT_READ | PROT_WRITE);
    is_open = true;
}
static void close_arena() {
    if (--opened || !high || ++closings % (high < (size_t)32 << 20 ? 8 : 64)) return;
    mprotect(arena, high, PROT_NONE);
    is_open = false;
}
static bool on_device(const void *p) { return arena && (const char *)p >= arena && (const char *)p < arena + ARENA; }

template <class T> static void check_argument(const T &v) {
    if constexpr (std::is_pointer_v<T>)
        if (v && !on_device(v)) {
            fprintf(stderr, "cuda_shim: a kernel is given a host pointer\n");
            abort();
        }
}

/* ---- streams and graphs ---- */

typedef std::vector<std::function<void()>> graph;
static graph *capturing;

struct stream {
    std::deque<std::function<void()>> queue;
    long submitted, done;
    size_t number;
};
struct event {
    stream *of; /* nullptr: never recorded */
    long at;    /* operations submitted when it was recorded */
};
static std::vector<stream *> streams;

/* Runs a stream's pending operations up to a given one. */
static void run_until(stream *s, long until) {
    while (s->done < until) {
        const std::function<void()> work = std::move(s->queue.front());
        s->queue.pop_front();
        s->done++;
        open_arena();
        work();
        close_arena();
    }
}

static void submit(stream *s, std::function<void()> work) {
    if (capturing) {
        capturing->push_back(std::move(work));
        return;
    }
    s->queue.push_back(std::move(work));
    s->submitted++;
    if (!(cuda_shim_lazy >> s->number % 3 & 1)) run_until(s, s->submitted);
}

/* Freeing memory waits for all streams. */
static void finish_all() {
    for (stream *s : streams) run_until(s, s->submitted);
}

} // namespace shim

typedef int cudaError_t;
enum {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorUnknown = 999
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaStreamCaptureModeThreadLocal = 1 };
typedef shim::stream *cudaStream_t;
typedef shim::event *cudaEvent_t;
typedef shim::graph *cudaGraph_t, *cudaGraphExec_t;
struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount;
};

#define shim_last cuda_shim_last
/* Every emulated call starts with this. */
static void shim_process() {
    static const pid_t process = getpid();
    if (process == getpid()) return;
    fprintf(stderr, "cuda_shim: a call in the child of a fork()\n");
    abort();
}
/* Counts a call; returns true if it is the one the test makes fail. */
static bool shim_fails() {
    shim_process();
    return cuda_shim_fail && --cuda_shim_fail == 0;
}
#define SHIM_CALL()                                            \
    do {                                                       \
        if (shim_fails()) return shim_last = cudaErrorUnknown; \
    } while (0)

static cudaError_t cudaGetLastError() {
    cudaError_t last = shim_last;
    shim_last = cudaSuccess;
    return last;
}
static const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaErrorMemoryAllocation           ? "out of memory"
           : e == cudaErrorInvalidValue             ? "invalid argument"
           : e == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing"
                                                    : "unknown error";
}
static cudaError_t cudaRuntimeGetVersion(int *version) {
    SHIM_CALL();
    *version = 13000;
    return cudaSuccess;
}
static cudaError_t cudaDriverGetVersion(int *version) { return cudaRuntimeGetVersion(version); }
static cudaError_t cudaGetDevice(int *device) {
    SHIM_CALL();
    *device = 0;
    return cudaSuccess;
}
static cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    SHIM_CALL();
    strcpy(p->name, "shim");
    p->major = 9;
    p->minor = 0;
    p->multiProcessorCount = 2;
    return cudaSuccess;
}
static cudaError_t cudaMalloc(void **memory, size_t bytes) {
    using namespace shim;
    SHIM_CALL();
    cuda_shim_allocations++;
    if (capturing) return shim_last = cudaErrorStreamCaptureUnsupported;
    if (bytes > cuda_shim_memory || in_use + bytes > cuda_shim_memory) return shim_last = cudaErrorMemoryAllocation;
    if (!arena) {
        arena = (char *)mmap(nullptr, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (arena == MAP_FAILED) abort();
    }
    const size_t room = (bytes + 255) / 256 * 256 + 256; /* followed by 256 bytes of NaN */
    size_t at = 256;
    for (const auto &b : blocks) {
        if (at + room <= b.first) break;
        at = b.first + b.second;
    }
    if (at + room > ARENA) return shim_last = cudaErrorMemoryAllocation;
    blocks[at] = room;
    in_use += bytes;
    if (high < at + room) high = (at + room + PAGE - 1) / PAGE * PAGE, is_open = false;
    if (bytes < (size_t)8 << 20) { /* larger blocks are cuBLAS's workspace: never touched, so never paged in */
        open_arena();
        memset(arena + at, 0xff, room);
        close_arena();
    }
    *memory = arena + at;
    return cudaSuccess;
}
template <class T> static cudaError_t cudaMalloc(T **memory, size_t bytes) {
    return cudaMalloc((void **)memory, bytes);
}
static cudaError_t cudaFree(void *memory) {
    using namespace shim;
    SHIM_CALL();
    finish_all();
    auto b = blocks.find((size_t)((char *)memory - arena));
    if (b == blocks.end()) {
        fprintf(stderr, "cuda_shim: cudaFree of what cudaMalloc did not give\n");
        abort();
    }
    if (b->second < (size_t)8 << 20) {
        open_arena();
        memset(memory, 0xff, b->second);
        close_arena();
    }
    in_use -= b->second - 256 < in_use ? b->second - 256 : in_use;
    blocks.erase(b);
    return cudaSuccess;
}
static cudaError_t cudaMallocHost(void **memory, size_t bytes) {
    SHIM_CALL();
    *memory = malloc(bytes ? bytes : 1);
    return cudaSuccess;
}
static cudaError_t cudaFreeHost(void *memory) {
    shim_process();
    shim::finish_all();
    free(memory);
    return cudaSuccess;
}
static cudaError_t cudaMemGetInfo(size_t *room, size_t *total) {
    SHIM_CALL();
    *total = cuda_shim_memory;
    *room = cuda_shim_memory - (shim::in_use < cuda_shim_memory ? shim::in_use : cuda_shim_memory);
    return cudaSuccess;
}
static cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t s) {
    using namespace shim;
    SHIM_CALL();
    if (on_device(to) != (kind != cudaMemcpyDeviceToHost) || on_device(from) != (kind != cudaMemcpyHostToDevice)) {
        fprintf(stderr, "cuda_shim: a copy of kind %d from %p to %p\n", (int)kind, from, to);
        abort();
    }
    if (capturing && kind != cudaMemcpyDeviceToDevice) return shim_last = cudaErrorStreamCaptureUnsupported;
    submit(s, [=] { memcpy(to, from, bytes); });
    return cudaSuccess;
}
static cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t s) {
    SHIM_CALL();
    if (bytes) shim::submit(s, [=] { memset(to, value, bytes); });
    return cudaSuccess;
}
static cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, int) {
    SHIM_CALL();
    *stream = new shim::stream{{}, 0, 0, shim::streams.size()};
    shim::streams.push_back(*stream);
    return cudaSuccess;
}
static cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    shim_process();
    shim::finish_all();
    shim::streams.erase(std::find(shim::streams.begin(), shim::streams.end(), stream));
    delete stream;
    return cudaSuccess;
}
static cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    SHIM_CALL();
    if (shim::capturing) return shim_last = cudaErrorStreamCaptureUnsupported;
    shim::run_until(stream, stream->submitted);
    cuda_shim_waits++;
    return cudaSuccess;
}
static cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t e, unsigned) {
    const shim::event event = *e;
    SHIM_CALL();
    if (event.of) shim::submit(stream, [=] { shim::run_until(event.of, event.at); });
    return cudaSuccess;
}
static cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, int) {
    SHIM_CALL();
    *event = new shim::event{nullptr, 0};
    return cudaSuccess;
}
static cudaError_t cudaEventDestroy(cudaEvent_t event) {
    shim_process();
    delete event;
    return cudaSuccess;
}
static cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    SHIM_CALL();
    *event = shim::event{stream, stream->submitted};
    return cudaSuccess;
}
static cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    SHIM_CALL();
    if (shim::capturing) return shim_last = cudaErrorStreamCaptureUnsupported;
    if (event->of) shim::run_until(event->of, event->at);
    return cudaSuccess;
}
static cudaError_t cudaStreamBeginCapture(cudaStream_t, int) {
    SHIM_CALL();
    shim::capturing = new shim::graph;
    return cudaSuccess;
}
static cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph) {
    *graph = shim::capturing;
    shim::capturing = nullptr;
    if (shim_fails()) {
        delete *graph;
        *graph = nullptr;
        return cudaErrorUnknown;
    }
    return cudaSuccess;
}
static cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, int) {
    SHIM_CALL();
    *exec = new shim::graph(*graph);
    return cudaSuccess;
}
static cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    SHIM_CALL();
    cuda_shim_replays++;
    for (auto &work : *exec) shim::submit(stream, work);
    return cudaSuccess;
}
static cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    shim_process();
    delete graph;
    return cudaSuccess;
}
static cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    shim_process();
    delete exec;
    return cudaSuccess;
}

/* ---- launching, and what a kernel sees ---- */

static auto &threadIdx = shim::thread;
static dim3 &blockIdx = shim::block_index, &gridDim = shim::block_count;
static struct {
    struct {
        operator unsigned() const { return (unsigned)shim::threads; }
    } x;
} blockDim;
#define CKCA__DYNAMIC_SHARED(name) uint4 *const name = (uint4 *)shim::shared
static void ckca__wait_for_grids() { shim::waited[shim::current] = true; }

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    struct cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};
enum { cudaLaunchAttributeProgrammaticStreamSerialization = 6, cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchAttribute {
    int id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};
static std::map<const void *, size_t> shim_shared; /* kernels that opted in to more shared memory */
template <class F> static cudaError_t cudaFuncSetAttribute(F *kernel, int, int bytes) {
    SHIM_CALL();
    if (bytes > 227 << 10) return shim_last = cudaErrorInvalidValue;
    shim_shared[(const void *)kernel] = (size_t)bytes;
    return cudaSuccess;
}
template <class... P, class... A>
static cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(P...), A... v) {
    const std::tuple<P...> values(v...);
    const dim3 grid = config->gridDim;
    const unsigned threads = config->blockDim.x;
    const size_t shared = config->dynamicSmemBytes, opted = shim_shared[(const void *)kernel];
    const bool dependent = config->numAttrs && config->attrs->val.programmaticStreamSerializationAllowed;
    SHIM_CALL();
    (shim::check_argument(v), ...);
    if (shared > (opted ? opted : 48 << 10) || threads % 32 || threads > shim::THREADS)
        return shim_last = cudaErrorInvalidValue;
    cuda_shim_launches++;
    shim::submit(config->stream,
                 [=] { shim::run(grid, threads, shared, dependent, [&] { std::apply(kernel, values); }); });
    return cudaSuccess;
}

static void __syncthreads() { shim::arrive_and_wait(shim::block); }

template <class T> static T __shfl_xor_sync(unsigned, T v, int mask) {
    const int t = shim::current, lane = t % 32, buffer = (int)(shim::parity[t]++ & 1);
    shim::lane_data &d = shim::exchanged[t / 32];
    memcpy(&d.value[buffer][lane], &v, sizeof v);
    shim::arrive_and_wait(shim::warp[t / 32]);
    memcpy(&v, &d.value[buffer][lane ^ mask], sizeof v);
    return v;
}

/* ---- copies to shared memory ---- */

static void ckca__copy_chunk(void *to, const void *from, int there) {
    shim::pending_copies &u = shim::copies[shim::current];
    if (u.last - u.first == shim::pending_copies::MOST || (uintptr_t)to % 16 || (uintptr_t)from % 16) {
        fprintf(stderr, "cuda_shim: too many copies under way, or one of what is not aligned\n");
        abort();
    }
    u.copy[u.last++ % shim::pending_copies::MOST] = {to, from, there != 0, u.group};
}
static void ckca__copies_commit() { shim::copies[shim::current].group++; }
template <int LEFT> static void ckca__copies_wait() {
    shim::pending_copies &u = shim::copies[shim::current];
    for (; u.first < u.last; u.first++) {
        const auto &c = u.copy[u.first % shim::pending_copies::MOST];
        if (c.group + LEFT >= u.group) return;
        if (c.there)
            memcpy(c.to, c.from, 16);
        else
            memset(c.to, 0, 16);
    }
}

/* ---- tensor cores ---- */

/* ldmatrix.x4 (PTX ISA): lane 8 m + i passes the address of row i of matrix m; a lane receives word lane % 4 of row
   lane / 4 or, with .trans, bf16 value lane / 4 of rows 2 (lane % 4) and 2 (lane % 4) + 1. */
template <int TRANSPOSED> static void ckca__load_matrices(unsigned v[4], const void *row) {
    const int t = shim::current, lane = t % 32, buffer = (int)(shim::parity[t]++ & 1);
    shim::lane_data &d = shim::exchanged[t / 32];
    d.row[buffer][lane] = row;
    shim::arrive_and_wait(shim::warp[t / 32]);
    for (int m = 0; m < 4; m++) {
        const void *const *rows = d.row[buffer] + 8 * m;
        if (TRANSPOSED) {
            uint16_t low, high;
            memcpy(&low, (const char *)rows[lane % 4 * 2] + lane / 4 * 2, 2);
            memcpy(&high, (const char *)rows[lane % 4 * 2 + 1] + lane / 4 * 2, 2);
            v[m] = low | (unsigned)high << 16;
        } else
            memcpy(&v[m], (const char *)rows[lane / 4] + lane % 4 * 4, 4);
    }
}

static unsigned ckca__to_tf32(float v) { /* rounds to nearest, ties away from zero, keeping 10 mantissa bits */
    const unsigned u = __float_as_uint(v);
    return (u & 0x7f800000) == 0x7f800000 ? u : (u + 0x1000) & ~0x1fffu;
}
static unsigned shim_bf16(float v) { /* rounds to nearest even */
    const unsigned u = __float_as_uint(v);
    if ((u & 0x7fffffff) > 0x7f800000) return u >> 16 | 0x40;
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
static unsigned ckca__to_bf16x2(float low, float high) { return shim_bf16(low) | shim_bf16(high) << 16; }

/* D = A B + C by a warp. The fragments (PTX ISA, mma.m16n8k8 with .tf32 and mma.m16n8k16 with .bf16): A(row, k) is in
   lane row % 8 * 4 + K % 4, register row / 8 + K / 4 * 2; B(k, column) in lane column * 4 + K % 4, register K / 4;
   C(row, column) in lane row % 8 * 4 + column / 2, register column % 2 + row / 8 * 2. K is k for tf32, k / 2 for bf16.
   */
template <int BF16> static void shim_mma(float c[4], const unsigned a[4], const unsigned b[2]) {
    const int t = shim::current, lane = t % 32, buffer = (int)(shim::parity[t]++ & 1);
    shim::lane_data &d = shim::exchanged[t / 32];
    memcpy(d.a[buffer][lane], a, 16);
    memcpy(d.b[buffer][lane], b, 8);
    shim::arrive_and_wait(shim::warp[t / 32]);
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = c[i];
        for (int k = 0; k < 8; k++) {
            const unsigned x = d.a[buffer][row % 8 * 4 + k % 4][row / 8 + k / 4 * 2],
                           y = d.b[buffer][column * 4 + k % 4][k / 4];
            if (BF16)
                sum += (double)__uint_as_float(x << 16) * __uint_as_float(y << 16) +
                       (double)__uint_as_float(x & 0xffff0000) * __uint_as_float(y & 0xffff0000);
            else
                sum += (double)__uint_as_float(x & ~0x1fffu) * __uint_as_float(y & ~0x1fffu);
        }
        c[i] = (float)sum;
    }
}
static void ckca__mma_tf32(float *c, const unsigned *a, const unsigned *b) { shim_mma<0>(c, a, b); }
static void ckca__mma_bf16(float *c, const unsigned *a, const unsigned *b) { shim_mma<1>(c, a, b); }

/* ---- Hopper: barriers, tensor copies, wgmma ---- */

#define CKCA__HOPPER 1
static void shim_must(bool right, const char *what) {
    if (right) return;
    fprintf(stderr, "cuda_shim: %s\n", what);
    abort();
}
static unsigned ckca__shared_address(const void *p) { /* in a window of SHARED bytes */
    const size_t at = (size_t)((const char *)p - (shim::shared_end - shim::SHARED));
    shim_must(at < shim::SHARED, "an address that is not in dynamic shared memory");
    return (unsigned)at;
}
static const char *shim_shared_at(unsigned address) { return shim::shared_end - shim::SHARED + address; }
static unsigned shim_swizzle(unsigned address) { return address ^ (address >> 7 & 7) << 4; } /* bits 4-6 ^= 7-9 */

static shim::mbarrier &shim_mbarrier(uint64_t *p) {
    const auto found = shim::mbarriers.find(p);
    shim_must(found != shim::mbarriers.end(), "a barrier that was not initialised");
    return found->second;
}
static void shim_check_phase(shim::mbarrier &b) {
    if (b.missing || b.bytes) return;
    b.missing = b.count;
    b.phase++;
    b.of.generation++;
}
static void ckca__barrier_init(uint64_t *p, unsigned count) {
    shim_must((uintptr_t)p % 8 == 0 && count, "an mbarrier at an odd address, or for nobody");
    shim::mbarriers[p] = shim::mbarrier{{0, 0, 0}, count, count, 0, 0, {}};
}
static void ckca__barriers_ready() {}
static void ckca__barrier_arrive(uint64_t *p) {
    shim::mbarrier &b = shim_mbarrier(p);
    shim_must(b.missing > 0, "more arrivals at a barrier than it waits for");
    b.missing--;
    shim_check_phase(b);
}
static void ckca__barrier_expect(uint64_t *p, unsigned bytes) {
    shim_mbarrier(p).bytes += bytes;
    ckca__barrier_arrive(p);
}
static void ckca__barrier_wait(uint64_t *p, unsigned parity) {
    shim::mbarrier &b = shim_mbarrier(p);
    while ((b.phase & 1) == parity) {
        const auto copies = std::move(b.copies);
        b.copies.clear();
        for (const auto &copy : copies) copy();
        if ((b.phase & 1) != parity) return;
        shim::waits[shim::current] = {&b.of, b.of.generation};
        shim::next();
        shim::waits[shim::current].at = nullptr;
    }
}
static void __syncwarp() { shim::arrive_and_wait(shim::warp[shim::current / 32]); }

typedef int CUresult;
typedef uint32_t cuuint32_t;
typedef uint64_t cuuint64_t;
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9, CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 = 11 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
struct CUtensorMap {
    const char *memory;
    int rank, bytes;
    cuuint64_t sizes[4], strides[4]; /* in bytes, of dimension 0 as well */
    int lower[2], upper[2], steps[4], box[2];
};
typedef CUresult (*PFN_cuTensorMapEncodeTiled_v12000)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                                      const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                                      const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
typedef CUresult (*PFN_cuTensorMapEncodeIm2col_v12000)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                                       const cuuint64_t *, const cuuint64_t *, const int *, const int *,
                                                       cuuint32_t, cuuint32_t, const cuuint32_t *,
                                                       CUtensorMapInterleave, CUtensorMapSwizzle,
                                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* What both kinds of map must keep to (CUDA driver API, cuTensorMapEncode*). */
static CUresult shim_encode(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *memory,
                            const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *steps, int columns,
                            int rows, CUtensorMapSwizzle swizzle) {
    if (shim_fails()) return 1;
    *map = CUtensorMap{};
    map->memory = (const char *)memory;
    map->rank = (int)rank;
    map->bytes = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2 : 4;
    map->strides[0] = (cuuint64_t)map->bytes;
    shim_must(shim::on_device(memory) && (uintptr_t)memory % 16 == 0, "a tensor map of memory it cannot describe");
    for (cuuint32_t i = 0; i < rank; i++) {
        map->sizes[i] = sizes[i];
        map->steps[i] = (int)steps[i];
        if (i) map->strides[i] = strides[i - 1];
        if (!sizes[i] || sizes[i] >> 32 || !steps[i] || steps[i] > 8) return 1;
        if (i && (strides[i - 1] % 16 || strides[i - 1] >> 40)) return 1;
    }
    map->box[0] = columns;
    map->box[1] = rows;
    /* Only lines of 128 bytes in the 128-byte swizzle are emulated. */
    return columns * map->bytes == 128 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B && columns <= 256 ? 0 : 1;
}
static CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *memory,
                                       const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                       const cuuint32_t *steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    if (rank != 2 || !box[1] || box[1] > 256) return 1;
    return shim_encode(map, type, rank, memory, sizes, strides, steps, (int)box[0], (int)box[1], swizzle);
}
static CUresult cuTensorMapEncodeIm2col(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *memory,
                                        const cuuint64_t *sizes, const cuuint64_t *strides, const int *lower,
                                        const int *upper, cuuint32_t channels, cuuint32_t pixels,
                                        const cuuint32_t *steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                        CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    if (rank != 4 || pixels > 1024) return 1;
    const CUresult failed =
        shim_encode(map, type, rank, memory, sizes, strides, steps, (int)channels, (int)pixels, swizzle);
    for (int i = 0; i < 2; i++) {
        map->lower[i] = lower[i];
        map->upper[i] = upper[i];
        if (lower[i] < -128 || lower[i] > 127 || upper[i] < -128 || upper[i] > 127) return 1;
        if ((long)sizes[i + 1] - 1 + upper[i] < lower[i]) return 1; /* an empty box */
    }
    return failed;
}

/* One line of a box, at channel or column x of a row, or zeros, to a swizzled line. */
static void shim_copy_line(char *to, const CUtensorMap &map, const char *row, int x) {
    for (int i = 0; i < map.box[0]; i++) {
        uint32_t word = 0;
        if (row && x + i >= 0 && x + i < (long)map.sizes[0])
            memcpy(&word, row + (size_t)(x + i) * map.bytes, map.bytes);
        if (map.bytes == 4) word = ckca__to_tf32(__uint_as_float(word));
        memcpy((char *)shim_shared_at(shim_swizzle(ckca__shared_address(to + i * map.bytes))), &word, map.bytes);
    }
}
static void shim_tensor_copy(uint64_t *barrier, const CUtensorMap &map, void *to, std::function<void()> lines) {
    const auto copy = [&map, barrier, lines] {
        lines();
        shim_mbarrier(barrier).bytes -= 128 * map.box[1];
        shim_check_phase(shim_mbarrier(barrier));
    };
    shim_must(ckca__shared_address(to) % 1024 == 0, "a swizzled box at an address that is no multiple of 1024");
    shim_must(shim::waited[shim::current], "a tensor copy before the predecessors have ended");
    if (shim::direction == 1)
        copy();
    else {
        shim_mbarrier(barrier).copies.push_back(copy);
        shim_mbarrier(barrier).of.generation++; /* whoever waits runs it */
    }
}
static void ckca__copy_matrix(void *shared, const CUtensorMap *map, int x, int y, uint64_t *barrier) {
    shim_must(map->rank == 2, "a copy from a matrix with a map that is none");
    shim_tensor_copy(barrier, *map, shared, [=] {
        for (int i = 0; i < map->box[1]; i++) {
            const bool there = y + i >= 0 && y + i < (long)map->sizes[1];
            shim_copy_line((char *)shared + i * 128, *map, there ? map->memory + (y + i) * map->strides[1] : nullptr,
                           x);
        }
    });
}
/* PTX ISA, "im2col mode": the pixels under the first tap run through the bounding box, x first, in steps; the tap's
   offset is added to each; what lies outside of the tensor is 0. */
static void ckca__copy_pixels(void *shared, const CUtensorMap *map, int c, int w, int h, int n, int tap_x, int tap_y,
                              uint64_t *barrier) {
    const int last_w = (int)map->sizes[1] - 1 + map->upper[0], last_h = (int)map->sizes[2] - 1 + map->upper[1];
    shim_must(map->rank == 4, "a copy of pixels with a map that is no im2col map");
    shim_must(w >= map->lower[0] && w <= last_w && h >= map->lower[1] && h <= last_h, "pixels outside of their box");
    shim_must(tap_x >= 0 && tap_x < 256 && tap_y >= 0 && tap_y < 256, "an im2col offset of more than a byte");
    shim_tensor_copy(barrier, *map, shared, [=] {
        int x = w, y = h, picture = n;
        for (int i = 0; i < map->box[1]; i++) {
            const int at_x = x + tap_x, at_y = y + tap_y;
            const bool there = at_x >= 0 && at_x < (int)map->sizes[1] && at_y >= 0 && at_y < (int)map->sizes[2] &&
                               picture >= 0 && picture < (int)map->sizes[3];
            shim_copy_line((char *)shared + i * 128, *map,
                           there ? map->memory + at_x * (long)map->strides[1] + at_y * (long)map->strides[2] +
                                       picture * (long)map->strides[3]
                                 : nullptr,
                           c);
            if ((x += map->steps[1]) <= last_w) continue;
            x = map->lower[0];
            if ((y += map->steps[2]) <= last_h) continue;
            y = map->lower[1];
            picture++;
        }
    });
}

/* Value number k (of 32 bytes) of a line of a factor. PTX ISA, "Matrix Descriptor" and "Strides", K-major layouts. */
static float shim_factor(uint64_t descriptor, int line, int k, int bf16) {
    const unsigned start = (unsigned)(descriptor & 0x3fff) << 4, eight = (unsigned)(descriptor >> 32 & 0x3fff) << 4;
    const unsigned at =
        start + (unsigned)(line / 8) * eight + (unsigned)(line % 8) * 128 + (unsigned)k * (bf16 ? 2 : 4);
    uint32_t word = 0;
    memcpy(&word, shim_shared_at(shim_swizzle(at)), bf16 ? 2 : 4);
    return __uint_as_float(bf16 ? word << 16 : word & ~0x1fffu);
}
static void shim_multiply(const shim::product &p) {
    const int lane = shim::current % 32, warp = shim::current / 32 % 4, depth = p.bf16 ? 16 : 8;
    float a[2][16], b[16];
    for (int i = 0; i < 2; i++)
        for (int k = 0; k < depth; k++) a[i][k] = shim_factor(p.a, warp * 16 + i * 8 + lane / 4, k, p.bf16);
    for (int j = 0; j < p.columns / 4; j++) {
        for (int k = 0; k < depth; k++) b[k] = shim_factor(p.b, j / 2 * 8 + lane % 4 * 2 + j % 2, k, p.bf16);
        for (int i = 0; i < 2; i++) {
            float *to = p.sums + j / 2 * 4 + i * 2 + j % 2;
            double sum = *to;
            for (int k = 0; k < depth; k++) sum += (double)a[i][k] * b[k];
            *to = (float)sum;
        }
    }
}
static void ckca__wgmma_begin() { shim::fenced[shim::current] = true; }
static void ckca__wgmma_commit() {
    shim::product_group[shim::current]++;
    shim::fenced[shim::current] = false;
}
template <int LEFT> static void ckca__wgmma_wait() {
    auto &products = shim::products[shim::current];
    while (!products.empty() && products.front().group + LEFT < shim::product_group[shim::current]) {
        shim_multiply(products.front());
        products.pop_front();
    }
    __syncwarp(); /* .sync: when one lane is through, all are */
}
template <int BF16, int COLUMNS> static void ckca__wgmma(float *sums, uint64_t a, uint64_t b) {
    for (const uint64_t d : {a, b})
        shim_must(d >> 62 == 1 && !(d >> 49 & 7) && (d >> 46 & 7) == 0,
                  "a descriptor of another swizzle, or with an offset");
    shim_must(shim::fenced[shim::current], "wgmma without a fence before it");
    cuda_shim_wgmma++;
    shim::products[shim::current].push_back({sums, a, b, BF16, COLUMNS, shim::product_group[shim::current]});
}

#define CUDART_VERSION 13000
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
enum { cudaEnableDefault };
static cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult *found) {
    SHIM_CALL();
    *found = cudaDriverEntryPointSuccess;
    *function = strstr(name, "Tiled") ? (void *)cuTensorMapEncodeTiled : (void *)cuTensorMapEncodeIm2col;
    return cudaSuccess;
}
struct cudaFuncAttributes {
    size_t sharedSizeBytes;
};
template <class F> static cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, F *) {
    SHIM_CALL();
    attributes->sharedSizeBytes = 1; /* as if compiled for sm_90a */
    return cudaSuccess;
}

/* ---- cuBLAS ---- */

struct shim_blas {
    cudaStream_t stream;
    bool reduced; /* BF16 sums in two parts, each rounded before they are added, as cuBLAS may do */
};
typedef shim_blas *cublasHandle_t;
typedef int cublasStatus_t;
enum { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_EXECUTION_FAILED = 13 };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32 };
enum cudaDataType { CUDA_R_32F, CUDA_R_16BF };
enum { CUBLAS_GEMM_DEFAULT };
static const char *cublasGetStatusString(cublasStatus_t) { return "CUBLAS_STATUS_EXECUTION_FAILED"; }
static cublasStatus_t shim_blas_call() { return shim_fails() ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS; }
static cublasStatus_t cublasCreate(cublasHandle_t *blas) {
    *blas = nullptr;
    if (shim_blas_call()) return CUBLAS_STATUS_EXECUTION_FAILED;
    *blas = new shim_blas{nullptr, true};
    return CUBLAS_STATUS_SUCCESS;
}
static cublasStatus_t cublasDestroy(cublasHandle_t blas) {
    shim_process();
    delete blas;
    return CUBLAS_STATUS_SUCCESS;
}
static cublasStatus_t cublasSetStream(cublasHandle_t blas, cudaStream_t stream) {
    blas->stream = stream;
    return shim_blas_call();
}
enum { CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16 };
static cublasStatus_t cublasSetMathMode(cublasHandle_t blas, int mode) {
    blas->reduced = mode != CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    return shim_blas_call();
}
static cublasStatus_t cublasSetWorkspace(cublasHandle_t, void *, size_t) { return shim_blas_call(); }
/* c (m x n) = alpha op(a) (m x k) op(b) (k x n) + beta c, column by column. */
static cublasStatus_t cublasGemmEx(cublasHandle_t blas, cublasOperation_t transpose_a, cublasOperation_t transpose_b,
                                   int m, int n, int k, const float *alpha, const void *a, cudaDataType type_a, int lda,
                                   const void *b, cudaDataType type_b, int ldb, const float *beta, void *c,
                                   cudaDataType type_c, int ldc, cublasComputeType_t compute, int) {
    if (shim_blas_call() || type_a != type_b) return CUBLAS_STATUS_EXECUTION_FAILED;
    const float one = *alpha, add = *beta;
    const bool reduced = blas->reduced && type_c == CUDA_R_16BF;
    shim::check_argument(a), shim::check_argument(b), shim::check_argument(c);
    shim::submit(blas->stream, [=] {
        const auto value = [](const void *from, cudaDataType type, size_t i) {
            return type == CUDA_R_16BF ? __uint_as_float((unsigned)((const uint16_t *)from)[i] << 16)
                                       : ((const float *)from)[i];
        };
        const auto factor = [=](const void *from, cudaDataType type, size_t i) {
            const float v = value(from, type, i);
            return compute == CUBLAS_COMPUTE_32F_FAST_TF32 ? __uint_as_float(ckca__to_tf32(v)) : v;
        };
        for (int j = 0; j < n; j++)
            for (int i = 0; i < m; i++) {
                const size_t to = i + (size_t)j * ldc;
                double sum = 0;
                for (int l = 0; l < k; l++) {
                    if (reduced && l == k / 2) sum = __uint_as_float(shim_bf16((float)sum) << 16);
                    sum += (double)factor(a, type_a, transpose_a ? l + (size_t)i * lda : i + (size_t)l * lda) *
                           factor(b, type_b, transpose_b ? j + (size_t)l * ldb : l + (size_t)j * ldb);
                }
                const float v = (float)(one * sum) + (add != 0 ? add * value(c, type_c, to) : 0);
                if (type_c == CUDA_R_16BF)
                    ((uint16_t *)c)[to] = (uint16_t)shim_bf16(v);
                else
                    ((float *)c)[to] = v;
            }
    });
    return CUBLAS_STATUS_SUCCESS;
}
#endif
