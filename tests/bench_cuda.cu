/* Every op of ckca_cuda.cu alone, at the shapes of whole networks: right? how long? how near its floor?

       bench_cuda                                  the networks below, in every precision
       bench_cuda NET BATCH SIZE PRECISION [mma]   one: any name ckca_resnet knows, or stem; float32, tf32 or bf16;
                                                   mma: without Hopper's wgmma
       bench_cuda profile NET BATCH SIZE PRECISION STEPS
                                                   plain CKCA steps for a profiler, each step and op an NVTX range:
                                                   nsys profile build/bench_cuda profile resnet20 128 32 bf16 20

   Build and run: make CUDA=1 bench-cuda. Through the CPU shim, where times mean nothing: make shim.

   No shape is written here. The library itself runs CKCA updates, a shrink-and-perturb update and a prediction; the
   linker hands its calls of ops to the functions below (ld --wrap), which run the op as asked and, where it comes with
   shapes that are new,
       1. check it: at up to 1024 places of every output, drawn at random, a reference kernel of a few loops, a block a
          place, computes in double what must come out, before the op runs (which may overwrite its input);
       2. time it in a CUDA graph of many calls, launched five times ("warm": what fits stays in the L2 cache), and call
          by call behind a write of 256 MB ("cold": events add about 1 microsecond); then put back what it wrote;
       3. time each of its kernels alone in the same way, where it has several: the graph's nodes one by one.

   The floor is the greater of bytes over the memory's bandwidth and flops over the peak of the unit they run on; GB/s
   and TFLOP/s are of the cold time. Bytes and flops are those the op cannot do without, as ckca_cuda.cu states them.
   Exits with 1 if a check failed. */
#include "../ckca_cuda.cu"

#include <chrono>
#include <map>
#include <string>
#include <vector>
#include <algorithm>
#ifndef CKCA_CUDA_SHIM
#include <cxxabi.h>
#if defined(__has_include)
#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define RANGE_BEGIN(name) nvtxRangePushA(name)
#define RANGE_END() nvtxRangePop()
#endif
#endif
#endif
#ifndef RANGE_BEGIN
#define RANGE_BEGIN(name) (void)(name)
#define RANGE_END() (void)0
#endif

#ifdef CKCA_CUDA_SHIM
enum { PLACES = 20, CALLS_MS = 0, LAUNCHES = 1, COLD = 0, FLUSH = 0, WARM_UP_MS = 0 };
#else
enum { PLACES = 1024, CALLS_MS = 1, LAUNCHES = 5, COLD = 15, FLUSH = 256 << 20, WARM_UP_MS = 1500 };
#endif

static double now() { /* ms */
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/* ---- the device's peaks ---- */

/* Dense peaks from NVIDIA's data sheets, by a part of the name; the first that fits. TFLOP/s of FFMA, TF32, BF16. */
static const struct peaks {
    const char *name;
    double gbps, tflops[3];
} data_sheet[] = {
    {"H200 NVL", 4800, {60, 417.5, 835}},       {"H200", 4800, {66.9, 494.7, 989.4}},
    {"H100 PCIe", 2039, {51.2, 378, 756}},      {"H100 NVL", 3938, {60, 417.5, 835}},
    {"H100", 3352, {66.9, 494.7, 989.4}},       {"A100-SXM4-40GB", 1555, {19.5, 156, 312}},
    {"A100-PCIE-40GB", 1555, {19.5, 156, 312}}, {"A100-SXM4-80GB", 2039, {19.5, 156, 312}},
    {"A100 80GB PCIe", 1935, {19.5, 156, 312}},
};
static peaks peak;

/* ---- references ---- */

/* An array of any of the kinds ops have. */
enum kind { FLOAT, HALF, INT, DOUBLE };
struct array {
    const void *at;
    int kind;
    __device__ double operator[](size_t i) const {
        return kind == HALF     ? ckca__to_float(((const ckca__bf16 *)at)[i])
               : kind == INT    ? ((const int *)at)[i]
               : kind == DOUBLE ? ((const double *)at)[i]
                                : ((const float *)at)[i];
    }
};
static size_t bytes_of(int kind) { return kind == HALF ? 2 : kind == DOUBLE ? 8 : 4; }

/* A factor as it is multiplied. */
__device__ static double rounded(double v, int precision) {
    if (precision == CKCA_PRECISION_BF16) return __uint_as_float(ckca__to_bf16x2((float)v, 0) << 16);
    if (precision == CKCA_PRECISION_TF32) return __uint_as_float(ckca__to_tf32((float)v) & ~0x1fffu);
    return v;
}

/* The sum of term(0), ..., term(count - 1) by the whole block; the sum of what they measure is added to size. */
template <class F> __device__ static double total(size_t count, double *size, F term) {
    double sum = 0, measure = 0;
    for (size_t t = threadIdx.x; t < count; t += CKCA__THREADS) {
        const double v = term(t);
        sum += v;
        measure += fabs(v);
    }
    *size += ckca__block_sum(measure);
    return ckca__block_sum(sum);
}

/* The place that block b looks at: the first, the last, and any. */
__device__ static size_t place_of(size_t count, int b) {
    return b == 0 ? 0 : b == 1 ? count - 1 : count <= PLACES ? (size_t)b : ckca__random(3, count, b) % count;
}

/* f(i, size) is computed by a whole block: what must be at i; *size: what rounding errors are relative to, a NaN where
   nothing can be said. */
template <class F> __global__ void expected_kernel(F f, size_t count, double *value, double *size) {
    ckca__wait_for_grids();
    double measure = 0;
    const double v = f(place_of(count, (int)blockIdx.x), &measure);
    if (threadIdx.x == 0) value[blockIdx.x] = v, size[blockIdx.x] = measure;
}
/* How many times the tolerance the difference is. */
__global__ void compare_kernel(array out, size_t count, int places, double tolerance, double last, const double *value,
                               const double *size, double *excess) {
    ckca__wait_for_grids();
    CKCA__EACH(b, places) {
        const double got = out[place_of(count, (int)b)], off = fabs(got - value[b]);
        const double allowed = tolerance * size[b] + last * fabs(value[b]) + 1e-30;
        excess[b] = size[b] != size[b] ? 0 : off <= 1e6 * allowed ? off / allowed : 1e6;
    }
}

/* ---- rows of the table ---- */

struct row {
    std::string name, checked;
    double bytes, flops, warm, cold; /* ms */
    int unit, count;
    std::vector<std::string> kernels;
};
static std::vector<row> rows;
static std::map<std::string, size_t> known;
static enum { OFF, ON, PROFILE } mode;
static int in_step, failures, passed;
static char *flush;

static void give_up(const char *what) {
    fprintf(stderr, "bench_cuda: %s\n", what);
    exit(1);
}
static void must(ckca_context *ctx) {
    if (ckca__device_status(ctx)) give_up(ctx->error);
}
static double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}

#ifndef CKCA_CUDA_SHIM
static void must(cudaError_t status) {
    if (status != cudaSuccess) give_up(cudaGetErrorString(status));
}

/* ms between two moments of a stream. */
static double between(cudaStream_t stream, const std::function<void()> &before, const std::function<void()> &work) {
    static cudaEvent_t event[2];
    float ms;
    for (auto &e : event)
        if (!e) must(cudaEventCreate(&e));
    before();
    must(cudaEventRecord(event[0], stream));
    work();
    must(cudaEventRecord(event[1], stream));
    must(cudaEventSynchronize(event[1]));
    must(cudaEventElapsedTime(&ms, event[0], event[1]));
    return ms;
}

/* ms of one copy of a graph among many, one behind the other. */
static double time_graph(cudaStream_t stream, cudaGraph_t one) {
    std::vector<double> ms;
    cudaGraphExec_t run;
    int copies = 1;
    must(cudaGraphInstantiate(&run, one, 0));
    must(cudaGraphLaunch(run, stream));
    copies += (int)(CALLS_MS / between(
                                   stream, [] {}, [&] { must(cudaGraphLaunch(run, stream)); }));
    if (copies > 200) copies = 200;
    must(cudaGraphExecDestroy(run));
    cudaGraph_t many;
    cudaGraphNode_t last = NULL;
    must(cudaGraphCreate(&many, 0));
    for (int i = 0; i < copies; i++) {
        cudaGraphNode_t node;
        must(cudaGraphAddChildGraphNode(&node, many, i ? &last : NULL, i ? 1 : 0, one));
        last = node;
    }
    must(cudaGraphInstantiate(&run, many, 0));
    must(cudaGraphLaunch(run, stream));
    for (int i = 0; i < LAUNCHES; i++)
        ms.push_back(between(
                         stream, [] {}, [&] { must(cudaGraphLaunch(run, stream)); }) /
                     copies);
    must(cudaGraphExecDestroy(run));
    must(cudaGraphDestroy(many));
    return median(ms);
}

/* A kernel's name, grid, registers and bytes of local memory. */
static std::string describe(cudaGraphNode_t node) {
    cudaGraphNodeType type;
    cudaKernelNodeParams k;
    cudaFuncAttributes a;
    char text[300];
    const char *name = NULL;
    must(cudaGraphNodeGetType(node, &type));
    if (type != cudaGraphNodeTypeKernel) return type == cudaGraphNodeTypeMemset ? "memset" : "copy or other node";
    if (cudaGraphKernelNodeGetParams(node, &k) != cudaSuccess || cudaFuncGetAttributes(&a, k.func) != cudaSuccess) {
        cudaGetLastError();
        return "a kernel of cuBLAS";
    }
#if CUDART_VERSION >= 12030
    if (cudaFuncGetName(&name, k.func) != cudaSuccess) name = NULL, cudaGetLastError();
#endif
    char *plain = name ? abi::__cxa_demangle(name, NULL, NULL, NULL) : NULL;
    std::string said = plain ? plain : name ? name : "unnamed";
    free(plain);
    said = said.substr(said.compare(0, 5, "void ") == 0 ? 5 : 0);
    if (said.find("ckca__") == 0) said = said.substr(6);
    said = said.substr(0, said.find('('));
    snprintf(text, sizeof text, "%.200s, %u x %u x %u blocks, %d registers, %zu bytes local", said.c_str(), k.gridDim.x,
             k.gridDim.y, k.gridDim.z, a.numRegs, a.localSizeBytes);
    return text;
}

/* Each node of an op's graph alone. */
static void time_nodes(cudaStream_t stream, cudaGraph_t graph, row &r) {
    size_t count = 0;
    must(cudaGraphGetNodes(graph, NULL, &count));
    std::vector<cudaGraphNode_t> nodes(count);
    if (count) must(cudaGraphGetNodes(graph, nodes.data(), &count));
    for (size_t i = 0; i < count; i++) {
        cudaGraph_t alone;
        char text[400];
        double ms = r.warm;
        if (count > 1) {
            must(cudaGraphClone(&alone, graph));
            for (size_t j = 0; j < count; j++) {
                cudaGraphNode_t other;
                if (j == i) continue;
                must(cudaGraphNodeFindInClone(&other, nodes[j], alone));
                must(cudaGraphDestroyNode(other));
            }
            ms = time_graph(stream, alone);
            must(cudaGraphDestroy(alone));
        }
        snprintf(text, sizeof text, "%8.2f  %s", 1e3 * ms, describe(nodes[i]).c_str());
        r.kernels.push_back(text);
    }
}
#endif

/* One call of an op: say what it is, what must come out (expect), what it writes, then run it. */
struct call {
    ckca_context *ctx;
    int is_new;
    size_t at; /* row */
    struct output {
        array out;
        size_t count;
        int places, checked;
        double tolerance, last, *value;
    };
    std::vector<output> outputs;
    call(ckca_context *ctx_, int unit, double bytes, double flops, const char *format, ...) CKCA__PRINTF(6, 7);

    /* An output: count values, each computed by f as expected_kernel says; tolerance: relative to *size. */
    template <class F> void expect(const void *out, int kind, size_t count, double tolerance, F f) {
        if (!writes(out, kind, count)) return;
        output &o = outputs.back();
        o.places = (int)(count < (size_t)PLACES ? count : (size_t)PLACES);
        o.checked = 1;
        o.tolerance = tolerance;
        o.last = kind == HALF ? 1.0 / 256 : 1e-6;
        o.value = (double *)ckca__device_alloc(ctx, 3 * PLACES * sizeof(double));
        if (!o.value) give_up("no memory for a check");
        CKCA__LAUNCH(ctx, expected_kernel<F>, (unsigned)o.places, f, count, o.value, o.value + PLACES);
    }
    /* An output that is checked elsewhere. */
    int writes(const void *out, int kind, size_t count) {
        if (!is_new || !out || !count) return 0;
        outputs.push_back({{out, kind}, count, 0, 0, 0, 0, NULL});
        return 1;
    }
    template <class F> void run(F op) {
        if (mode == OFF) {
            op();
            return;
        }
        row &r = rows[at];
        r.count += in_step;
        if (mode == PROFILE) RANGE_BEGIN(r.name.c_str());
        if (is_new) time(op);
        if (is_new) must(ctx);
        op();
        if (mode == PROFILE) RANGE_END();
        if (is_new) compare(r);
    }

  private:
    template <class F> void time(F op);
    void compare(row &r);
};

call::call(ckca_context *ctx_, int unit, double bytes, double flops, const char *format, ...) : ctx(ctx_), is_new(0) {
    char name[200];
    va_list list;
    va_start(list, format);
    vsnprintf(name, sizeof name, format, list);
    va_end(list);
    at = rows.size();
    if (mode == OFF) return;
    const auto found = known.find(name);
    if (found != known.end()) {
        at = found->second;
        return;
    }
    known[name] = at;
    rows.push_back({name, "", bytes, flops, 0, 0, unit, 0, {}});
    is_new = mode == ON;
}

void call::compare(row &r) {
    double worst = 0;
    int seen = 0;
    for (auto &o : outputs) {
        double excess[PLACES];
        if (!o.checked) continue;
        CKCA__LAUNCH(ctx, compare_kernel, 1, o.out, o.count, o.places, o.tolerance, o.last, (const double *)o.value,
                     (const double *)o.value + PLACES, o.value + 2 * PLACES);
        ckca__device_download(ctx, excess, o.value + 2 * PLACES, o.places * sizeof *excess);
        must(ctx);
        for (int i = 0; i < o.places; i++)
            if (!(excess[i] <= worst)) worst = excess[i];
        ckca__device_release(ctx, o.value, 3 * PLACES * sizeof(double));
        seen += o.places;
    }
    char text[60] = "elsewhere";
    if (seen) snprintf(text, sizeof text, "%s %.2f", worst <= 1 ? "ok" : "WRONG", worst);
    r.checked = text;
    if (worst <= 1) {
        passed += seen > 0;
        return;
    }
    failures++;
    printf("WRONG: %s: off by %g times what rounding explains\n", r.name.c_str(), worst);
}

/* Before the op is run for good. Its outputs are kept meanwhile, as it may add to them. */
template <class F> void call::time(F op) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    row &r = rows[at];
    std::vector<char *> kept;
    for (auto &o : outputs) {
        const size_t bytes = o.count * bytes_of(o.out.kind);
        kept.push_back((char *)ckca__device_alloc(ctx, bytes));
        if (!kept.back()) give_up("no memory to keep an op's output while it is timed");
        ckca__device_copy(ctx, kept.back(), o.out.at, bytes);
    }
    must(ctx);
    cudaGraph_t graph;
    op();
    CKCA__CUDA(cuda, cudaStreamSynchronize(cuda->stream));
    must(ctx);
    CKCA__CUDA(cuda, cudaStreamBeginCapture(cuda->stream, cudaStreamCaptureModeThreadLocal));
    op();
    CKCA__CUDA(cuda, cudaStreamEndCapture(cuda->stream, &graph));
    must(ctx);
#ifdef CKCA_CUDA_SHIM
    cudaGraphExec_t run;
    const double begin = now();
    CKCA__CUDA(cuda, cudaGraphInstantiate(&run, graph, 0));
    CKCA__CUDA(cuda, cudaGraphLaunch(run, cuda->stream));
    CKCA__CUDA(cuda, cudaStreamSynchronize(cuda->stream));
    CKCA__CUDA(cuda, cudaGraphExecDestroy(run));
    r.warm = r.cold = now() - begin;
#else
    size_t nodes = 0;
    std::vector<double> cold;
    must(cudaGraphGetNodes(graph, NULL, &nodes));
    if (nodes) {
        r.warm = time_graph(cuda->stream, graph);
        time_nodes(cuda->stream, graph, r);
        for (int i = 0; i < COLD; i++)
            cold.push_back(between(
                cuda->stream, [&] { must(cudaMemsetAsync(flush, i, FLUSH, cuda->stream)); }, op));
        r.cold = median(cold);
    }
#endif
    CKCA__CUDA(cuda, cudaGraphDestroy(graph));
    for (size_t i = 0; i < outputs.size(); i++) {
        const size_t bytes = outputs[i].count * bytes_of(outputs[i].out.kind);
        ckca__device_copy(ctx, (void *)(uintptr_t)outputs[i].out.at, kept[i], bytes);
        ckca__device_release(ctx, kept[i], bytes);
    }
    must(ctx);
}

/* ---- the ops: what they cost at least, and what must come out ---- */

enum { TIGHT = 0, LOOSE = 1 }; /* TF32 of cuBLAS rounds in its own way */
static const double rounding[] = {2e-5, 2e-3};

static int map_kind(int bf16) { return bf16 ? HALF : FLOAT; }
static const char *map_name(int bf16) { return bf16 ? "bf16" : "float"; }
static double values(const ckca__conv *s, int output) {
    return output ? (double)s->n * s->p * s->q * s->k : (double)s->n * s->h * s->w * s->c;
}
static double weights_of(const ckca__conv *s) { return (double)s->k * s->r * s->s * s->c; }
static double map_bytes(const ckca__conv *s) {
    return values(s, 0) * bytes_of(map_kind(s->bf16_x)) + values(s, 1) * bytes_of(map_kind(s->bf16));
}
static std::string shape(const ckca__conv *s) {
    char text[120];
    snprintf(text, sizeof text, "%d x %dx%dx%d -> %d, %dx%d/%d, %s", s->n, s->h, s->w, s->c, s->k, s->r, s->s,
             s->stride, map_name(s->bf16));
    return text;
}
static double flops(const ckca__conv *s) { return 2 * values(s, 1) * s->r * s->s * s->c; }
static double exactness(const ckca_context *ctx, const ckca__conv *s) {
    return rounding[ckca__math(ctx, s) == CKCA_PRECISION_TF32 && ckca__is_product(s) ? LOOSE : TIGHT];
}

static void expect_conv_forward(call &it, const ckca__conv *shape, const float *x_, const float *w, const float *bias,
                                const float *residual_, int relu, float *y) {
    const ckca__conv s = *shape;
    const int math = ckca__math(it.ctx, shape);
    const array x = {x_, map_kind(s.bf16_x)}, residual = {residual_, map_kind(s.bf16)};
    it.expect(y, map_kind(s.bf16), (size_t)values(&s, 1), exactness(it.ctx, &s),
              [=] __device__(size_t i, double *size) -> double {
                  const int k = (int)(i % s.k), q = (int)(i / s.k % s.q), p = (int)(i / s.k / s.q % s.p);
                  const size_t n = i / s.k / s.q / s.p;
                  double v = total((size_t)s.r * s.s * s.c, size, [&](size_t t) -> double {
                      const int c = (int)(t % s.c), at_x = (int)(t / s.c % s.s), at_y = (int)(t / s.c / s.s);
                      const int h = p * s.stride - s.pad + at_y, l = q * s.stride - s.pad + at_x;
                      if (h < 0 || h >= s.h || l < 0 || l >= s.w) return 0;
                      return rounded(x[((n * s.h + h) * s.w + l) * s.c + c], math) *
                             rounded(w[(size_t)k * s.r * s.s * s.c + t], math);
                  });
                  if (bias) v += bias[k], *size += fabs(bias[k]);
                  if (residual_) v += residual[i], *size += fabs(residual[i]);
                  return relu && v <= 0 ? 0 : v;
              });
}
static void expect_conv_data(call &it, const ckca__conv *shape, const float *dy_, const float *w, float *dx,
                             int accumulate) {
    const ckca__conv s = *shape;
    const int math = ckca__math(it.ctx, shape);
    const array dy = {dy_, map_kind(s.bf16)}, before = {dx, map_kind(s.bf16_x)};
    it.expect(dx, map_kind(s.bf16_x), (size_t)values(&s, 0), exactness(it.ctx, &s),
              [=] __device__(size_t i, double *size) -> double {
                  const int c = (int)(i % s.c), x = (int)(i / s.c % s.w), y = (int)(i / s.c / s.w % s.h);
                  const size_t n = i / s.c / s.w / s.h;
                  double v = total((size_t)s.r * s.s * s.k, size, [&](size_t t) -> double {
                      const int k = (int)(t % s.k), at_x = (int)(t / s.k % s.s), at_y = (int)(t / s.k / s.s);
                      const int p = y + s.pad - at_y, q = x + s.pad - at_x;
                      if (p < 0 || q < 0 || p % s.stride || q % s.stride || p / s.stride >= s.p || q / s.stride >= s.q)
                          return 0;
                      return rounded(dy[((n * s.p + p / s.stride) * s.q + q / s.stride) * s.k + k], math) *
                             rounded(w[(((size_t)k * s.r + at_y) * s.s + at_x) * s.c + c], math);
                  });
                  if (accumulate) v += before[i], *size += fabs(before[i]);
                  return v;
              });
}
static void expect_conv_weight(call &it, const ckca__conv *shape, const float *x_, const float *dy_, float *dw,
                               float *dbias) {
    const ckca__conv s = *shape;
    const int math = ckca__math(it.ctx, shape);
    const size_t pixels = (size_t)s.n * s.p * s.q;
    const array x = {x_, map_kind(s.bf16_x)}, dy = {dy_, map_kind(s.bf16)};
    it.expect(dw, FLOAT, (size_t)weights_of(&s), exactness(it.ctx, &s),
              [=] __device__(size_t i, double *size) -> double {
                  const int c = (int)(i % s.c), at_x = (int)(i / s.c % s.s), at_y = (int)(i / s.c / s.s % s.r);
                  const size_t k = i / s.c / s.s / s.r;
                  *size += fabs(dw[i]);
                  return dw[i] + total(pixels, size, [&](size_t t) -> double {
                             const int h = (int)(t / s.q % s.p) * s.stride - s.pad + at_y,
                                       l = (int)(t % s.q) * s.stride - s.pad + at_x;
                             if (h < 0 || h >= s.h || l < 0 || l >= s.w) return 0;
                             return rounded(x[((t / s.q / s.p * s.h + h) * s.w + l) * s.c + c], math) *
                                    rounded(dy[t * s.k + k], math);
                         });
              });
    it.expect(dbias, FLOAT, (size_t)s.k, rounding[TIGHT], [=] __device__(size_t i, double *size) -> double {
        *size += fabs(dbias[i]);
        return dbias[i] + total(pixels, size, [&](size_t t) -> double { return dy[t * s.k + i]; });
    });
}

#define OP(name) extern "C" void __wrap_ckca__op_##name

OP(conv_forward)
(ckca_context *ctx, const ckca__conv *s, const float *x, const float *w, const float *bias, const float *residual,
 int relu, float *y, void *ws) {
    call it(ctx, ckca__math(ctx, s),
            map_bytes(s) + 4 * weights_of(s) + (residual ? values(s, 1) * bytes_of(map_kind(s->bf16)) : 0), flops(s),
            "conv forward %s%s%s%s", shape(s).c_str(), bias ? " +bias" : "", residual ? " +residual" : "",
            relu ? " relu" : "");
    expect_conv_forward(it, s, x, w, bias, residual, relu, y);
    it.run([&] { ckca__op_conv_forward(ctx, s, x, w, bias, residual, relu, y, ws); });
}
OP(conv_backward_data)
(ckca_context *ctx, const ckca__conv *s, const float *dy, const float *w, float *dx, int accumulate, void *ws) {
    call it(ctx, ckca__math(ctx, s),
            map_bytes(s) + 4 * weights_of(s) + (accumulate ? values(s, 0) * bytes_of(map_kind(s->bf16_x)) : 0),
            flops(s), "conv data    %s%s", shape(s).c_str(), accumulate ? " +=" : "");
    expect_conv_data(it, s, dy, w, dx, accumulate);
    it.run([&] { ckca__op_conv_backward_data(ctx, s, dy, w, dx, accumulate, ws); });
}
OP(conv_backward_weight)
(ckca_context *ctx, const ckca__conv *s, const float *x, const float *dy, float *dw, float *dbias, void *ws) {
    call it(ctx, ckca__math(ctx, s), map_bytes(s) + 8 * weights_of(s), flops(s), "conv weight  %s%s", shape(s).c_str(),
            dbias ? " +bias" : "");
    expect_conv_weight(it, s, x, dy, dw, dbias);
    it.run([&] { ckca__op_conv_backward_weight(ctx, s, x, dy, dw, dbias, ws); });
}
OP(linear_forward)
(ckca_context *ctx, int n, int d, int k, const float *x, const float *w, const float *bias, float *y, void *ws) {
    const ckca__conv s = ckca__linear_as_conv(n, d, k);
    call it(ctx, ckca__math(ctx, &s), map_bytes(&s) + 4 * weights_of(&s), flops(&s), "linear forward %d x %d -> %d", n,
            d, k);
    expect_conv_forward(it, &s, x, w, bias, NULL, 0, y);
    it.run([&] { ckca__op_linear_forward(ctx, n, d, k, x, w, bias, y, ws); });
}
OP(linear_backward)
(ckca_context *ctx, int n, int d, int k, const float *x, const float *w, const float *dy, float *dx, int accumulate,
 float *dw, float *dbias, void *ws) {
    const ckca__conv s = ckca__linear_as_conv(n, d, k);
    call it(ctx, ckca__math(ctx, &s),
            4 * (values(&s, 1) + (dx ? 2 : 1) * values(&s, 0) + (dx ? 3 : 2) * weights_of(&s)),
            flops(&s) * (dx ? 2 : 1), "linear backward %d x %d -> %d%s", n, d, k, accumulate ? " +=" : "");
    if (dx) expect_conv_data(it, &s, dy, w, dx, accumulate);
    expect_conv_weight(it, &s, x, dy, dw, dbias);
    it.run([&] { ckca__op_linear_backward(ctx, n, d, k, x, w, dy, dx, accumulate, dw, dbias, ws); });
}
/* No output of its own: convolutions that read it are checked. */
OP(ready)(ckca_context *ctx, int count, const ckca__conv *s, const float *const *w, int backward) {
    double bytes = 0;
    for (int i = 0; i < count; i++)
        bytes += (double)ckca__packed_bytes(ctx, s + i, backward) + (s[i].packed_weights ? 4 * weights_of(s + i) : 0);
    call it(ctx, 0, bytes, 0, "weights ready for %d convolutions%s, %.1f MB", count, backward ? ", both ways" : "",
            bytes * 1e-6);
    it.run([&] { ckca__op_pack_weights(ctx, count, s, w, backward); });
}

/* Of a channel: the mean of x, and 1 / its standard deviation. */
__device__ static void moments(const array &x, size_t rows, int channels, int c, double *mean, double *inv_std) {
    double unused = 0;
    const double m = total(rows, &unused, [&](size_t t) -> double { return x[t * channels + c]; }) / (double)rows;
    const double square = total(rows, &unused, [&](size_t t) -> double {
        const double d = x[t * channels + c] - m;
        return d * d;
    });
    *mean = m;
    *inv_std = 1 / sqrt(square / (double)rows + 1e-5);
}
/* (x - mean) inv_std gamma + beta, added to *size by parts. */
__device__ static double normed(double x, double mean, double scale, double beta, double *size) {
    *size += (fabs(x) + fabs(mean)) * fabs(scale) + fabs(beta);
    return (x - mean) * scale + beta;
}
struct residual_of {
    array value;
    int exists, normed_too;
    ckca__norm norm;
    __device__ double operator()(size_t i, int c, double *size) const {
        if (!exists) return 0;
        const double x = value[i];
        if (!normed_too) return *size += fabs(x), x;
        const double v = normed(x, norm.mean[c], (double)norm.gamma[c] * norm.inv_std[c], norm.beta[c], size);
        return norm.relu && v <= 0 ? 0 : v;
    }
};
static residual_of residual_at(const float *residual, const ckca__norm *norm, int bf16) {
    residual_of r = {{residual, map_kind(bf16)}, residual != NULL, norm != NULL, {}};
    if (norm) r.norm = *norm;
    return r;
}

OP(batchnorm_forward)
(ckca_context *ctx, int bf16, size_t rows, int c, const float *x_, const float *gamma, const float *beta,
 float *running_mean, float *running_var, const float *residual, const ckca__norm *residual_norm, int relu, float *y,
 float *mean, float *inv_std, void *ws) {
    const int kind = map_kind(bf16);
    const array x = {x_, kind};
    const residual_of other = residual_at(residual, residual_norm, bf16);
    call it(ctx, 0, (double)rows * c * bytes_of(kind) * (2 + (y != NULL) + (residual != NULL) - (y == NULL)), 0,
            "batch norm forward %zu x %d, %s%s%s%s", rows, c, map_name(bf16),
            residual ? residual_norm ? " +normed residual" : " +residual" : "", relu ? " relu" : "",
            y ? "" : ", statistics");
    it.expect(mean, FLOAT, (size_t)c, 2e-5, [=] __device__(size_t i, double *size) -> double {
        return total(rows, size, [&](size_t t) -> double { return x[t * c + i] / (double)rows; });
    });
    it.expect(inv_std, FLOAT, (size_t)c, 1e-4, [=] __device__(size_t i, double *size) -> double {
        double m, s;
        moments(x, rows, c, (int)i, &m, &s);
        return *size += s, s;
    });
    it.expect(y, kind, rows * c, 1e-4, [=] __device__(size_t i, double *size) -> double {
        const int at = (int)(i % c);
        double m, s;
        moments(x, rows, c, at, &m, &s);
        const double v = normed(x[i], m, s * gamma[at], beta[at], size) + other(i, at, size);
        return relu && v <= 0 ? 0 : v;
    });
    it.writes(running_mean, FLOAT, (size_t)c);
    it.writes(running_var, FLOAT, (size_t)c);
    it.run([&] {
        ckca__op_batchnorm_forward(ctx, bf16, rows, c, x_, gamma, beta, running_mean, running_var, residual,
                                   residual_norm, relu, y, mean, inv_std, ws);
    });
}
OP(batchnorm_again)
(ckca_context *ctx, int bf16, size_t rows, int c, const float *x_, const ckca__norm *norm, const float *residual,
 const ckca__norm *residual_norm, float *y) {
    const int kind = map_kind(bf16);
    const array x = {x_, kind};
    const ckca__norm own = *norm;
    const residual_of other = residual_at(residual, residual_norm, bf16);
    call it(ctx, 0, (double)rows * c * bytes_of(kind) * (2 + (residual != NULL)), 0, "batch norm again %zu x %d, %s%s",
            rows, c, map_name(bf16), residual ? residual_norm ? " +normed residual" : " +residual" : "");
    it.expect(y, kind, rows * c, 2e-5, [=] __device__(size_t i, double *size) -> double {
        const int at = (int)(i % c);
        const double v = normed(x[i], own.mean[at], (double)own.inv_std[at] * own.gamma[at], own.beta[at], size) +
                         other(i, at, size);
        return own.relu && v <= 0 ? 0 : v;
    });
    it.run([&] { ckca__op_batchnorm_recompute(ctx, bf16, rows, c, x_, norm, residual, residual_norm, y); });
}
OP(batchnorm_eval)
(ckca_context *ctx, int bf16, size_t rows, int c, const float *x_, const float *gamma, const float *beta,
 const float *running_mean, const float *running_var, const float *residual, int relu, float *y) {
    const int kind = map_kind(bf16);
    const array x = {x_, kind};
    const residual_of other = residual_at(residual, NULL, bf16);
    call it(ctx, 0, (double)rows * c * bytes_of(kind) * (2 + (residual != NULL)), 0, "batch norm eval %zu x %d, %s%s%s",
            rows, c, map_name(bf16), residual ? " +residual" : "", relu ? " relu" : "");
    it.expect(y, kind, rows * c, 2e-5, [=] __device__(size_t i, double *size) -> double {
        const int at = (int)(i % c);
        const double v = normed(x[i], running_mean[at], gamma[at] / sqrt(running_var[at] + 1e-5), beta[at], size) +
                         other(i, at, size);
        return relu && v <= 0 ? 0 : v;
    });
    it.run([&] {
        ckca__op_batchnorm_eval(ctx, bf16, rows, c, x_, gamma, beta, running_mean, running_var, residual, relu, y);
    });
}

/* dy where the ReLU let x pass: seen from y, or from x as the kernels see it, in float. */
struct gated {
    array x, y, dy;
    int relu, has_y;
    ckca__norm norm;
    __device__ double operator()(size_t i, int c) const {
        if (!relu) return dy[i];
        if (has_y) return y[i] > 0 ? dy[i] : 0;
        return ((float)x[i] - norm.mean[c]) * (norm.gamma[c] * norm.inv_std[c]) + norm.beta[c] > 0 ? dy[i] : 0;
    }
    /* The float is too near 0 to tell: the kernel may have contracted it otherwise. */
    __device__ int doubtful(size_t i, int c) const {
        const double v = (x[i] - norm.mean[c]) * norm.gamma[c] * norm.inv_std[c] + norm.beta[c];
        return relu && !has_y && fabs(v) < 1e-5 * (fabs((double)norm.beta[c]) + 1e-3);
    }
};

OP(batchnorm_backward)
(ckca_context *ctx, int bf16, size_t rows, int c, const float *x_, const float *y_, const float *dy_,
 const ckca__norm *norm, float *dx, float *dresidual, int accumulate, float *dgamma, float *dbeta, void *ws) {
    const int kind = map_kind(bf16);
    const array x = {x_, kind}, before = {dresidual, kind};
    const gated g = {x, {y_, kind}, {dy_, kind}, norm->relu, y_ != NULL, *norm};
    const ckca__norm own = *norm;
    call it(ctx, 0,
            (double)rows * c * bytes_of(kind) *
                (5 + (norm->relu && y_ ? 2 : 0) + (dresidual != NULL) + (dresidual && accumulate)),
            0, "batch norm backward %zu x %d, %s%s%s", rows, c, map_name(bf16),
            norm->relu ? y_ ? " relu" : " relu of x" : "", dresidual ? accumulate ? " residual +=" : " residual" : "");
    it.expect(dbeta, FLOAT, (size_t)c, 1e-4, [=] __device__(size_t i, double *size) -> double {
        *size += fabs(dbeta[i]);
        return dbeta[i] + total(rows, size, [&](size_t t) -> double { return g(t * c + i, (int)i); });
    });
    it.expect(dgamma, FLOAT, (size_t)c, 1e-4, [=] __device__(size_t i, double *size) -> double {
        *size += fabs(dgamma[i]);
        return dgamma[i] + total(rows, size, [&](size_t t) -> double {
                   return g(t * c + i, (int)i) * (x[t * c + i] - own.mean[i]) * own.inv_std[i];
               });
    });
    it.expect(dx, kind, rows * c, 1e-4, [=] __device__(size_t i, double *size) -> double {
        const int at = (int)(i % c);
        const double scale = (double)own.gamma[at] * own.inv_std[at], xhat = (x[i] - own.mean[at]) * own.inv_std[at];
        double first = 0, second = 0;
        const double sum = total(rows, &first, [&](size_t t) -> double { return g(t * c + at, at); });
        const double product = total(rows, &second, [&](size_t t) -> double {
            return g(t * c + at, at) * (x[t * c + at] - own.mean[at]) * own.inv_std[at];
        });
        *size = g.doubtful(i, at) ? NAN : fabs(scale) * (fabs(g(i, at)) + (first + fabs(xhat) * second) / (double)rows);
        return scale * (g(i, at) - sum / (double)rows - xhat * product / (double)rows);
    });
    it.expect(dresidual == dx ? NULL : dresidual, kind, rows * c, 1e-5,
              [=] __device__(size_t i, double *size) -> double {
                  const double v = g(i, (int)(i % c)), was = accumulate ? before[i] : 0;
                  *size = g.doubtful(i, (int)(i % c)) ? NAN : fabs(v) + fabs(was);
                  return v + was;
              });
    it.run([&] {
        ckca__op_batchnorm_backward(ctx, bf16, rows, c, x_, y_, dy_, norm, dx, dresidual, accumulate, dgamma, dbeta,
                                    ws);
    });
}
OP(fold)
(ckca_context *ctx, int k, size_t per, const float *w, const float *bias, const float *gamma, const float *beta,
 const float *mean, const float *var, float *w_out, float *bias_out) {
    call it(ctx, 0, 8.0 * k * (double)per, 0, "fold %d x %zu", k, per);
    it.expect(w_out, FLOAT, k * per, 1e-6, [=] __device__(size_t i, double *size) -> double {
        const double v = w[i] * (gamma[i / per] / sqrt(var[i / per] + 1e-5));
        return *size += fabs(v), v;
    });
    it.expect(bias_out, FLOAT, (size_t)k, 1e-6, [=] __device__(size_t i, double *size) -> double {
        const double v = ((bias ? bias[i] : 0) - (double)mean[i]) * (gamma[i] / sqrt(var[i] + 1e-5));
        *size += fabs(v) + fabs(beta[i]);
        return v + beta[i];
    });
    it.run([&] { ckca__op_fold(ctx, k, per, w, bias, gamma, beta, mean, var, w_out, bias_out); });
}

OP(add)(ckca_context *ctx, int bf16, size_t count, const float *a_, const float *b_, int relu, float *y) {
    const int kind = map_kind(bf16);
    const array a = {a_, kind}, b = {b_, kind};
    call it(ctx, 0, (double)count * bytes_of(kind) * (2 + (b_ != NULL)), 0, "add %zu, %s%s%s", count, map_name(bf16),
            b_ ? "" : " (one)", relu ? " relu" : "");
    it.expect(y, kind, count, 1e-6, [=] __device__(size_t i, double *size) -> double {
        const double v = a[i] + (b_ ? b[i] : 0);
        *size += fabs(v);
        return relu && v <= 0 ? 0 : v;
    });
    it.run([&] { ckca__op_add(ctx, bf16, count, a_, b_, relu, y); });
}
OP(add_backward)
(ckca_context *ctx, int bf16, size_t count, const float *y_, const float *dy_, float *dx, int accumulate) {
    const int kind = map_kind(bf16);
    const array y = {y_, kind}, dy = {dy_, kind}, before = {dx, kind};
    call it(ctx, 0, (double)count * bytes_of(kind) * (2 + (y_ != NULL) + accumulate), 0, "add backward %zu, %s%s%s",
            count, map_name(bf16), y_ ? " relu" : "", accumulate ? " +=" : "");
    it.expect(dx, kind, count, 1e-6, [=] __device__(size_t i, double *size) -> double {
        const double v = y_ && !(y[i] > 0) ? 0 : dy[i], was = accumulate ? before[i] : 0;
        *size += fabs(v) + fabs(was);
        return v + was;
    });
    it.run([&] { ckca__op_add_backward(ctx, bf16, count, y_, dy_, dx, accumulate); });
}
OP(maxpool_forward)(ckca_context *ctx, const ckca__conv *shape_, const float *x_, float *y, unsigned char *at) {
    const ckca__conv s = *shape_;
    const array x = {x_, map_kind(s.bf16)};
    call it(ctx, 0, (values(&s, 0) + values(&s, 1)) * bytes_of(x.kind) + (at ? values(&s, 1) : 0), 0, "max pool %s%s",
            shape(&s).c_str(), at ? "" : ", evaluation");
    it.expect(y, x.kind, (size_t)values(&s, 1), 0, [=] __device__(size_t i, double *) -> double {
        const int c = (int)(i % s.k), q = (int)(i / s.k % s.q), p = (int)(i / s.k / s.q % s.p);
        const size_t n = i / s.k / s.q / s.p;
        double most = -INFINITY;
        for (int r = 0; r < s.r; r++)
            for (int t = 0; t < s.s; t++) {
                const int h = p * s.stride - s.pad + r, l = q * s.stride - s.pad + t;
                if (h < 0 || h >= s.h || l < 0 || l >= s.w) continue;
                const double v = x[((n * s.h + h) * s.w + l) * s.c + c];
                if (v > most) most = v;
            }
        return most;
    });
    it.run([&] { ckca__op_maxpool_forward(ctx, shape_, x_, y, at); });
}
OP(maxpool_backward)
(ckca_context *ctx, const ckca__conv *shape_, const float *dy_, const unsigned char *at, float *dx, int accumulate) {
    const ckca__conv s = *shape_;
    const array dy = {dy_, map_kind(s.bf16)}, before = {dx, map_kind(s.bf16)};
    call it(ctx, 0, (values(&s, 0) * (1 + accumulate) + values(&s, 1)) * bytes_of(dy.kind) + values(&s, 1), 0,
            "max pool backward %s%s", shape(&s).c_str(), accumulate ? " +=" : "");
    it.expect(dx, dy.kind, (size_t)values(&s, 0), 1e-6, [=] __device__(size_t i, double *size) -> double {
        const int c = (int)(i % s.c), x = (int)(i / s.c % s.w), y = (int)(i / s.c / s.w % s.h);
        const size_t n = i / s.c / s.w / s.h;
        double sum = accumulate ? before[i] : 0;
        for (int r = 0; r < s.r; r++)
            for (int t = 0; t < s.s; t++) {
                const int p = y + s.pad - r, q = x + s.pad - t;
                if (p < 0 || q < 0 || p % s.stride || q % s.stride || p / s.stride >= s.p || q / s.stride >= s.q)
                    continue;
                const size_t from = ((n * s.p + p / s.stride) * s.q + q / s.stride) * s.k + c;
                if (at[from] == r * s.s + t) sum += dy[from], *size += fabs(dy[from]);
            }
        return sum;
    });
    it.run([&] { ckca__op_maxpool_backward(ctx, shape_, dy_, at, dx, accumulate); });
}
OP(avgpool_forward)(ckca_context *ctx, int bf16, int n, int area, int c, const float *x_, float *y) {
    const array x = {x_, map_kind(bf16)};
    call it(ctx, 0, (double)n * c * (area * bytes_of(x.kind) + 4), 0, "average pool %d x %d x %d, %s", n, area, c,
            map_name(bf16));
    it.expect(y, FLOAT, (size_t)n * c, 1e-5, [=] __device__(size_t i, double *size) -> double {
        return total((size_t)area, size, [&](size_t t) -> double { return x[(i / c * area + t) * c + i % c] / area; });
    });
    it.run([&] { ckca__op_avgpool_forward(ctx, bf16, n, area, c, x_, y); });
}
OP(avgpool_backward)(ckca_context *ctx, int bf16, int n, int area, int c, const float *dy, float *dx, int accumulate) {
    const array before = {dx, map_kind(bf16)};
    call it(ctx, 0, (double)n * c * (area * bytes_of(before.kind) * (1 + accumulate) + 4), 0,
            "average pool backward %d x %d x %d, %s%s", n, area, c, map_name(bf16), accumulate ? " +=" : "");
    it.expect(dx, before.kind, (size_t)n * area * c, 1e-6, [=] __device__(size_t i, double *size) -> double {
        const double v = (double)dy[i / c / area * c + i % c] / area, was = accumulate ? before[i] : 0;
        *size += fabs(v) + fabs(was);
        return v + was;
    });
    it.run([&] { ckca__op_avgpool_backward(ctx, bf16, n, area, c, dy, dx, accumulate); });
}
OP(subsample_forward)(ckca_context *ctx, const ckca__conv *shape_, const float *x_, float *y) {
    const ckca__conv s = *shape_;
    const array x = {x_, map_kind(s.bf16)};
    call it(ctx, 0, ((double)s.n * s.p * s.q * s.c + values(&s, 1)) * bytes_of(x.kind), 0, "subsample %s",
            shape(&s).c_str());
    it.expect(y, x.kind, (size_t)values(&s, 1), 0, [=] __device__(size_t i, double *) -> double {
        const int c = (int)(i % s.k) - (s.k - s.c) / 2, q = (int)(i / s.k % s.q), p = (int)(i / s.k / s.q % s.p);
        if (c < 0 || c >= s.c) return 0;
        return x[((i / s.k / s.q / s.p * s.h + p * s.stride) * s.w + q * s.stride) * s.c + c];
    });
    it.run([&] { ckca__op_subsample_forward(ctx, shape_, x_, y); });
}
OP(subsample_backward)(ckca_context *ctx, const ckca__conv *shape_, const float *dy_, float *dx, int accumulate) {
    const ckca__conv s = *shape_;
    const array dy = {dy_, map_kind(s.bf16)}, before = {dx, map_kind(s.bf16)};
    call it(ctx, 0, ((double)s.n * s.p * s.q * s.c + values(&s, 0) * (1 + accumulate)) * bytes_of(dy.kind), 0,
            "subsample backward %s%s", shape(&s).c_str(), accumulate ? " +=" : "");
    it.expect(dx, dy.kind, (size_t)values(&s, 0), 1e-6, [=] __device__(size_t i, double *size) -> double {
        const int c = (int)(i % s.c), x = (int)(i / s.c % s.w), y = (int)(i / s.c / s.w % s.h);
        const size_t n = i / s.c / s.w / s.h;
        const int p = y / s.stride, q = x / s.stride,
                  seen = y % s.stride == 0 && x % s.stride == 0 && p < s.p && q < s.q;
        const double v = seen ? dy[((n * s.p + p) * s.q + q) * s.k + (s.k - s.c) / 2 + c] : 0,
                     was = accumulate ? before[i] : 0;
        *size += fabs(v) + fabs(was);
        return v + was;
    });
    it.run([&] { ckca__op_subsample_backward(ctx, shape_, dy_, dx, accumulate); });
}

/* log sum_j exp(z_j / t) of a row, by the block. */
__device__ static double log_sum_exp(int k, const float *z, double t) {
    double unused = 0, most = z[0];
    for (int j = 1; j < k; j++)
        if (z[j] > most) most = z[j];
    return most / t + log(total((size_t)k, &unused, [&](size_t j) -> double { return exp((z[j] - most) / t); }));
}
OP(cross_entropy)
(ckca_context *ctx, int n, int k, const float *z, const int *labels, float smoothing, float scale, float *dz,
 float *loss, int *hit) {
    call it(ctx, 0, 4.0 * n * (k * (dz ? 2.0 : 1.0) + 3), 0, "cross-entropy %d x %d%s", n, k, dz ? "" : ", evaluation");
    it.expect(loss, FLOAT, (size_t)n, 1e-5, [=] __device__(size_t i, double *size) -> double {
        const float *row = z + i * k;
        const double lse = log_sum_exp(k, row, 1),
                     sum = total((size_t)k, size, [&](size_t j) -> double { return row[j]; });
        *size = fabs(lse) + fabs((double)row[labels[i]]) + *size / k;
        return lse - (1 - smoothing) * row[labels[i]] - smoothing * sum / k;
    });
    it.expect(dz, FLOAT, (size_t)n * k, 1e-5, [=] __device__(size_t i, double *size) -> double {
        const size_t picture = i / k;
        const int j = (int)(i % k);
        *size = scale / n;
        return scale *
               (exp(z[i] - log_sum_exp(k, z + picture * k, 1)) - (j == labels[picture] ? 1 - smoothing : 0) -
                smoothing / k) /
               n;
    });
    it.expect(hit, INT, (size_t)n, 0, [=] __device__(size_t i, double *) -> double {
        const float *row = z + i * k;
        const int label = labels[i];
        double unused = 0;
        const double rank = total((size_t)k, &unused, [&](size_t j) -> double {
            return row[j] > row[label] || (row[j] == row[label] && (int)j < label);
        });
        return (rank == 0) + 2 * (rank < 5);
    });
    it.run([&] { ckca__op_cross_entropy(ctx, n, k, z, labels, smoothing, scale, dz, loss, hit); });
}
OP(softmax)(ckca_context *ctx, int n, int k, const float *z, float *p) {
    call it(ctx, 0, 8.0 * n * k, 0, "softmax %d x %d", n, k);
    it.expect(p, FLOAT, (size_t)n * k, 1e-5, [=] __device__(size_t i, double *size) -> double {
        *size = 1e-3;
        return exp(z[i] - log_sum_exp(k, z + i / k * k, 1));
    });
    it.run([&] { ckca__op_softmax(ctx, n, k, z, p); });
}
OP(adakd)
(ckca_context *ctx, int n, int k, const float *z, const float *zo, const int *labels, const float *class_weight,
 float temperature, float scale, float *dz, float *loss) {
    const double t = temperature;
    call it(ctx, 0, 4.0 * n * (4.0 * k + 3), 0, "AdaKD %d x %d%s", n, k, class_weight ? ", by class" : "");
    it.expect(dz, FLOAT, (size_t)n * k, 1e-5, [=] __device__(size_t i, double *size) -> double {
        const size_t row = i / k * k;
        const double a = class_weight ? class_weight[labels[i / k]] : 1;
        const double p = exp(z[i] / t - log_sum_exp(k, z + row, t)), o = exp(zo[i] / t - log_sum_exp(k, zo + row, t));
        *size = fabs(dz[i]) + fabs(scale * t * a / n);
        return dz[i] + scale * t * a * (p - o) / n;
    });
    it.expect(loss, FLOAT, (size_t)n, 1e-5, [=] __device__(size_t i, double *size) -> double {
        const float *s = z + i * k, *o = zo + i * k;
        const double a = class_weight ? class_weight[labels[i]] : 1;
        const double lse_s = log_sum_exp(k, s, t), lse_o = log_sum_exp(k, o, t);
        const double kl = total((size_t)k, size, [&](size_t j) -> double {
            return exp(o[j] / t - lse_o) * (o[j] / t - lse_o - s[j] / t + lse_s);
        });
        *size *= t * t * a;
        return t * t * a * kl;
    });
    it.run([&] { ckca__op_adakd(ctx, n, k, z, zo, labels, class_weight, temperature, scale, dz, loss); });
}
OP(featreg)
(ckca_context *ctx, int bf16, int bf16_teacher, int n, int d, const float *f_, const float *fo_, float scale, float *df,
 int accumulate, float of_zero, float *loss) {
    const array f = {f_, map_kind(bf16)}, fo = {fo_, map_kind(bf16_teacher)}, before = {df, map_kind(bf16)};
    call it(ctx, 0, (double)n * d * (bytes_of(f.kind) * (2 + accumulate) + bytes_of(fo.kind)), 0,
            "FeatReg %d x %d, %s%s", n, d, map_name(bf16), accumulate ? " +=" : "");
    it.expect(df, f.kind, (size_t)n * d, 1e-5, [=] __device__(size_t i, double *size) -> double {
        const size_t row = i / d * d;
        double unused = 0;
        const double ff = total((size_t)d, &unused, [&](size_t j) -> double { return f[row + j] * f[row + j]; });
        const double oo = total((size_t)d, &unused, [&](size_t j) -> double { return fo[row + j] * fo[row + j]; });
        const double fofo = total((size_t)d, &unused, [&](size_t j) -> double { return f[row + j] * fo[row + j]; });
        const double inv_f = ff > 0 ? 1 / sqrt(ff) : 0, inv_o = oo > 0 ? 1 / sqrt(oo) : 0;
        const double a = scale / n * fofo * inv_f * inv_o * inv_f * inv_f * f[i], b = scale / n * inv_f * inv_o * fo[i];
        const double was = accumulate ? before[i] : 0;
        *size = fabs(a) + fabs(b) + fabs(was);
        return a - b + was;
    });
    it.writes(loss, FLOAT, (size_t)n);
    it.run([&] {
        ckca__op_featreg(ctx, bf16, bf16_teacher, n, d, f_, fo_, scale, df, accumulate, of_zero, loss);
    });
}
OP(sum)(ckca_context *ctx, int n, const float *values, double *sum) {
    call it(ctx, 0, 4.0 * n, 0, "sum of %d", n);
    it.expect(sum, DOUBLE, 1, 1e-12, [=] __device__(size_t, double *size) -> double {
        *size += fabs(*sum);
        return *sum + total((size_t)n, size, [&](size_t t) -> double { return values[t]; });
    });
    it.run([&] { ckca__op_sum(ctx, n, values, sum); });
}
OP(count)(ckca_context *ctx, int n, const int *hit, double *sum) {
    call it(ctx, 0, 4.0 * n, 0, "count of %d", n);
    it.expect(sum, DOUBLE, 1, 1e-12, [=] __device__(size_t, double *size) -> double {
        *size += fabs(*sum);
        return *sum + total((size_t)n, size, [&](size_t t) -> double { return hit[t] & 1; });
    });
    it.run([&] { ckca__op_count(ctx, n, hit, sum); });
}
OP(gather)(ckca_context *ctx, int n, int d, const float *rows, const int *index, float *out) {
    call it(ctx, 0, 8.0 * n * d, 0, "gather %d x %d", n, d);
    it.expect(out, FLOAT, (size_t)n * d, 0,
              [=] __device__(size_t i, double *) -> double { return rows[(size_t)index[i / d] * d + i % d]; });
    it.run([&] { ckca__op_gather(ctx, n, d, rows, index, out); });
}
OP(sgd)
(ckca_context *ctx, size_t count, size_t decayed, float *w, const float *g, float *v, const float *lr, float momentum,
 float weight_decay, int nesterov, const float *gscale) {
    call it(ctx, 0, 20.0 * (double)count, 0, "SGD %zu", count);
    it.expect(v, FLOAT, count, 1e-6, [=] __device__(size_t i, double *size) -> double {
        const double d = (double)g[i] * (gscale ? *gscale : 1) + (i < decayed ? weight_decay * (double)w[i] : 0);
        *size = fabs(momentum * v[i]) + fabs(g[i]) + fabs(weight_decay * w[i]);
        return momentum * (double)v[i] + d;
    });
    it.expect(w, FLOAT, count, 1e-6, [=] __device__(size_t i, double *size) -> double {
        const double d = (double)g[i] * (gscale ? *gscale : 1) + (i < decayed ? weight_decay * (double)w[i] : 0);
        const double next = momentum * (double)v[i] + d, step = *lr * (nesterov ? d + momentum * next : next);
        *size = fabs(w[i]) + fabs(step);
        return w[i] - step;
    });
    it.run([&] { ckca__op_sgd(ctx, count, decayed, w, g, v, lr, 1, momentum, weight_decay, nesterov, gscale); });
}
OP(clip)(ckca_context *ctx, size_t count, const float *g, float clip, float *gscale, void *ws) {
    call it(ctx, 0, 4.0 * (double)count, 0, "clip %zu", count);
    it.expect(gscale, FLOAT, 1, 1e-6, [=] __device__(size_t, double *size) -> double {
        const double square = total(count, size, [&](size_t t) -> double { return (double)g[t] * g[t]; });
        const double v = clip / (sqrt(square) + 1e-6);
        return *size = v > 1 ? 1 : v;
    });
    it.run([&] { ckca__op_clip(ctx, count, g, clip, gscale, ws); });
}
OP(shrink_perturb)(ckca_context *ctx, size_t count, float *w, const float *fresh, float shrink, float perturb) {
    call it(ctx, 0, 12.0 * (double)count, 0, "shrink and perturb %zu", count);
    it.expect(w, FLOAT, count, 1e-6, [=] __device__(size_t i, double *size) -> double {
        *size = fabs(shrink * w[i]) + fabs(perturb * fresh[i]);
        return (double)shrink * w[i] + (double)perturb * fresh[i];
    });
    it.run([&] { ckca__op_shrink_perturb(ctx, count, w, fresh, shrink, perturb); });
}
OP(ewc)
(ckca_context *ctx, size_t count, const float *w, const float *old, const float *fisher, float lambda, float *g,
 double scale, double *sum, void *ws) {
    call it(ctx, 0, 20.0 * (double)count, 0, "ewc %zu", count);
    it.expect(g, FLOAT, count, 1e-6, [=] __device__(size_t i, double *size) -> double {
        const double pull = (double)lambda * fisher[i] * ((double)w[i] - old[i]);
        *size = fabs(g[i]) + fabs((double)lambda * fisher[i]) * (fabs(w[i]) + fabs(old[i]));
        return g[i] + pull;
    });
    it.run([&] { ckca__op_ewc(ctx, count, w, old, fisher, lambda, g, scale, sum, ws); });
}
OP(add_squares)(ckca_context *ctx, size_t count, const float *g, float scale, float *fisher) {
    call it(ctx, 0, 12.0 * (double)count, 0, "add squares %zu", count);
    it.expect(fisher, FLOAT, count, 1e-6, [=] __device__(size_t i, double *size) -> double {
        const double added = (double)scale * g[i] * g[i];
        *size = fabs(fisher[i]) + fabs(added);
        return fisher[i] + added;
    });
    it.run([&] { ckca__op_add_squares(ctx, count, g, scale, fisher); });
}
struct colours {
    float mean[3], std[3];
};
OP(batch)
(ckca_context *ctx, int n, int h, int w, int c, const unsigned char *pixels, int gathered, const int *index,
 const ckca_augment *augment, uint64_t seed, const int *epoch, const float *mean, const float *std, float *out) {
    const size_t count = (size_t)n * h * w * c;
    call it(ctx, 0, 5.0 * (double)count, 0, "pictures %d x %dx%dx%d%s", n, h, w, c, augment ? ", augmented" : "");
    if (c == 3 && !(augment && (augment->resized_crop || augment->jitter > 0))) {
        colours norm;
        ckca_augment how = {};
        memcpy(norm.mean, mean, sizeof norm.mean);
        memcpy(norm.std, std, sizeof norm.std);
        if (augment) how = *augment;
        it.expect(out, FLOAT, count, 1e-6, [=] __device__(size_t i, double *size) -> double {
            const int j = (int)(i % c), x = (int)(i / c % w), y = (int)(i / c / w % h), picture = (int)(i / c / w / h);
            ckca__framing f;
            ckca__augment_framing(&how, seed, epoch ? *epoch : 0, index[picture], h, w, &f);
            const int from_y = f.top + y, from_x = f.left + (f.flip ? w - 1 - x : x);
            const size_t at = (size_t)(gathered ? picture : index[picture]) * h;
            const int there = from_y >= 0 && from_y < h && from_x >= 0 && from_x < w;
            const double v = there ? pixels[((at + from_y) * w + from_x) * c + j] / 255.0 : 0;
            *size = (v + fabs(norm.mean[j])) / norm.std[j];
            return (v - norm.mean[j]) / norm.std[j];
        });
    } else
        it.writes(out, FLOAT, count);
    it.run([&] { ckca__op_batch(ctx, n, h, w, c, pixels, gathered, index, augment, seed, epoch, mean, std, out); });
}

/* A step begins and ends here; while ops are looked at it is not recorded, so that all of them are called. */
extern "C" int __wrap_ckca__device_record(ckca_context *ctx, void **recording) {
    if (mode == OFF) return ckca__device_record(ctx, recording);
    in_step = 1;
    RANGE_BEGIN("step");
    return 1;
}
extern "C" void __wrap_ckca__device_recorded(ckca_context *ctx, void **recording) {
    if (mode == OFF) {
        ckca__device_recorded(ctx, recording);
        return;
    }
    in_step = 0;
    RANGE_END();
}

/* ---- networks ---- */

struct config {
    const char *net;
    int batch, size, precisions; /* bits */
};
#ifdef CKCA_CUDA_SHIM
static const config networks[] = {{"resnet8", 3, 8, 7}, {"stem", 3, 16, 7}};
#else
static const config networks[] = {{"resnet20", 128, 32, 7},
                                  {"resnet18-cifar", 512, 32, 7},
                                  {"resnet18", 32, 224, 7},
                                  {"resnet18", 128, 224, 7},
                                  {"resnet50", 128, 224, 7}};
#endif
static const char *const precision_name[] = {"float32", "tf32", "bf16"};

static void check_status(ckca_context *ctx, ckca_status status, const char *what) {
    if (!status) return;
    fprintf(stderr, "bench_cuda: %s: %s: %s\n", what, ckca_status_name(status), ckca_error(ctx));
    exit(1);
}

static ckca_data *random_pictures(ckca_context *ctx, int count, int size, int classes,
                                  std::vector<unsigned char> &pixels) {
    std::vector<int> labels(count);
    ckca_array array = {};
    ckca_data *data;
    pixels.resize((size_t)count * size * size * 3);
    for (size_t i = 0; i < pixels.size(); i++) pixels[i] = (unsigned char)(ckca__random(1, 99, i) >> 56);
    for (int i = 0; i < count; i++) labels[i] = (int)(ckca__random(2, 99, i) % classes);
    array.pixels = pixels.data();
    array.labels = labels.data();
    array.count = count;
    array.height = array.width = size;
    array.channels = 3;
    array.classes = classes;
    check_status(ctx, ckca_open_array(ctx, &data, &array, NULL), "pictures");
    return data;
}

/* A network of 7 x 7 stem, max pooling, one bottleneck and one block of basic kind: all that the large ones have. */
static ckca_status make_stem(ckca_context *ctx, ckca_model **m, const ckca_model_desc *desc) {
    const ckca_conv_desc seven = {8, 7, 2, 3, 0, 0}, one = {8, 1, 1, 0, 0, 0}, three = {8, 3, 1, 1, 0, 0},
                         wide = {16, 1, 1, 0, 0, 0};
    const ckca_status status = ckca_model_create(ctx, m, desc);
    if (status) return status;
    int x = ckca_layer_relu(*m, ckca_layer_batchnorm(*m, "bn1", ckca_layer_conv(*m, "conv1", ckca_layer_input(*m), seven)));
    x = ckca_layer_maxpool(*m, x, 3, 2, 1);
    int y = ckca_layer_relu(*m, ckca_layer_batchnorm(*m, "bn2", ckca_layer_conv(*m, "conv2", x, one)));
    y = ckca_layer_relu(*m, ckca_layer_batchnorm(*m, "bn3", ckca_layer_conv(*m, "conv3", y, three)));
    y = ckca_layer_batchnorm(*m, "bn4", ckca_layer_conv(*m, "conv4", y, wide));
    x = ckca_layer_batchnorm(*m, "down_bn", ckca_layer_conv(*m, "down", x, wide));
    x = ckca_layer_relu(*m, ckca_layer_add(*m, y, x));
    return ckca_model_finish(*m, ckca_layer_linear(*m, "fc", ckca_layer_avgpool(*m, x), desc->classes));
}

static int until(const ckca_progress *, void *end) { return now() > *(double *)end; }

/* What the memory does: a[i] = b[i] + s c[i] over 256 MB arrays; and cuBLAS's products of 8192 x 8192 matrices. */
__global__ void triad_kernel(size_t count, float *a, const float *b, const float *c) {
    ckca__wait_for_grids();
    CKCA__EACH(i, count / 4) {
        const ckca__lane<4> x(b + 4 * i), y(c + 4 * i);
        ckca__lane<4> z;
        for (int j = 0; j < 4; j++) z.v[j] = x.v[j] + 0.5f * y.v[j];
        z.store(a + 4 * i);
    }
}
static void find_peaks(ckca_context *ctx) {
#ifdef CKCA_CUDA_SHIM
    peak = {"shim", 1, {1, 1, 1}};
    (void)ctx;
#else
    enum { SIDE = 8192 };
    const size_t count = (size_t)SIDE * SIDE;
    cudaStream_t stream = ckca__cuda_of(ctx)->stream;
    float *arrays = (float *)ckca__device_alloc(ctx, 3 * count * sizeof(float));
    const peaks *known_peak = NULL;
    double best[4] = {1e30, 1e30, 1e30, 1e30};
    if (!arrays) give_up("no memory for 768 MB of matrices");
    ckca__device_zero(ctx, arrays, 3 * count * sizeof(float));
    const double end = now() + WARM_UP_MS;
    for (int i = 0; i < 10 || now() < end; i++) {
        best[3] = std::min(best[3], between(
                                        stream, [] {},
                                        [&] {
                                            CKCA__LAUNCH(ctx, triad_kernel, ckca__grid(ctx, count / 4, 1), count,
                                                         arrays, arrays + count, arrays + 2 * count);
                                        }));
        best[ctx->precision] =
            std::min(best[ctx->precision], between(
                                               stream, [] {},
                                               [&] {
                                                   ckca__product(ctx, SIDE, SIDE, SIDE, ctx->precision == CKCA_PRECISION_BF16,
                                                                 arrays, 0, arrays + count, 0,
                                                                 ctx->precision == CKCA_PRECISION_BF16, arrays + 2 * count, 0);
                                               }));
    }
    must(ctx);
    ckca__device_release(ctx, arrays, 3 * count * sizeof(float));
    for (const peaks &p : data_sheet)
        if (!known_peak && strstr(ckca_device(ctx), p.name) && !strstr(ckca_device(ctx), "GH200")) known_peak = &p;
    const double measured[2] = {12e-6 * (double)count / best[3], 2e-9 * SIDE * SIDE * SIDE / best[ctx->precision]};
    if (known_peak)
        peak = *known_peak;
    else /* what is not measured in this precision is not used either, but for TF32 behind the pooling of BF16 */
        peak = {"measured", measured[0], {measured[1], measured[1], measured[1]}};
    printf("%s: peaks %s: %.0f GB/s, %.1f TFLOP/s in %s; measured: triad %.0f GB/s, cuBLAS on zeros %.1f TFLOP/s\n",
           ckca_device(ctx), known_peak ? "of the data sheet" : "are the measured ones", peak.gbps,
           peak.tflops[ctx->precision], precision_name[ctx->precision], measured[0], measured[1]);
#endif
}

static void show(const char *net, int batch, int size, const char *precision) {
    double sums[3] = {0, 0, 0};
    printf("\n%s, batch %d of %d x %d, %s. Times in microseconds; n: calls in a CKCA step\n"
           "%4s %9s %9s %9s %6s %7s %8s  %-10s op\n",
           net, batch, size, size, precision, "n", "cold", "warm", "floor", "of it", "GB/s", "TFLOP/s", "check");
    for (const row &r : rows) {
        const double floor = std::max(r.bytes / (peak.gbps * 1e6), r.flops / (peak.tflops[r.unit] * 1e9));
        const double cold = r.cold > 0 ? r.cold : INFINITY;
        printf("%4d %9.2f %9.2f %9.2f %5.0f%% %7.0f %8.2f  %-10s %s\n", r.count, 1e3 * r.cold, 1e3 * r.warm,
               1e3 * floor, 100 * floor / cold, r.bytes / cold * 1e-6, r.flops / cold * 1e-9, r.checked.c_str(),
               r.name.c_str());
        for (const std::string &kernel : r.kernels) printf("%14s %s\n", "", kernel.c_str());
        sums[0] += r.count * r.cold, sums[1] += r.count * r.warm, sums[2] += r.count * floor;
    }
    printf("     ops of a CKCA step, one after the other: %.3f ms cold, %.3f warm, floors %.3f\n", sums[0], sums[1],
           sums[2]);
    fflush(stdout);
}

static void look_at(const char *net, int batch, int size, int precision, int wgmma, int profiled_steps) {
    static const float mean[3] = {0.5f, 0.5f, 0.5f}, deviation[3] = {0.25f, 0.25f, 0.25f};
    std::vector<unsigned char> pixels;
    ckca_desc desc = {};
    ckca_context *ctx;
    ckca_model_desc model = {};
    ckca_model *m;
    ckca_update_desc update = {};
    double end = now() + WARM_UP_MS;
    desc.precision = (ckca_precision)precision;
    if (ckca_init(&ctx, &desc)) give_up("no context: is there a GPU, and does it have this precision?");
    find_peaks(ctx);
    if (!wgmma) ckca__device_wgmma(ctx, 0);
    model.height = model.width = size;
    model.classes = strcmp(net, "resnet18") && strcmp(net, "resnet34") && strcmp(net, "resnet50") ? 10 : 1000;
    model.mean = mean;
    model.std = deviation;
    model.seed = 1;
    check_status(ctx, strcmp(net, "stem") ? ckca_resnet(ctx, &m, net, &model) : make_stem(ctx, &m, &model), net);
    ckca_data *data = random_pictures(ctx, batch, size, model.classes, pixels);
    update.batch = batch;
    update.lr = 0.001f;
    update.epochs = 1000000;
    update.progress = until;
    update.user = &end;
    mode = OFF; /* warms up; the update after it gives the next one a teacher */
    const ckca_status stopped = ckca_update(m, data, &update, NULL);
    if (stopped != CKCA_ESTOP) check_status(ctx, stopped, "warm-up");
    update.progress = NULL;
    update.epochs = 1;
    check_status(ctx, ckca_update(m, data, &update, NULL), "first update");
#ifndef CKCA_CUDA_SHIM
    flush = (char *)ckca__device_alloc(ctx, FLUSH);
    if (!flush) give_up("no memory for 256 MB to flush the cache with");
#endif
    rows.clear();
    known.clear();
    mode = profiled_steps ? PROFILE : ON;
    update.clip_norm = 1;
    update.augment.pad = 4; /* so that the teacher runs in every step */
    update.augment.flip = 1;
    update.epochs = profiled_steps ? profiled_steps : 1;
    check_status(ctx, ckca_update(m, data, &update, NULL), "CKCA update");
    if (!profiled_steps) { /* the ops that such a step has no use for */
        std::vector<float> p((size_t)batch * model.classes);
        std::vector<int> counts; /* of that step alone */
        for (const row &r : rows) counts.push_back(r.count);
        memset(&update.augment, 0, sizeof update.augment);
        update.featreg = CKCA_FEATREG_COSINE; /* of features alone: the teacher's answers are kept and gathered */
        check_status(ctx, ckca_update(m, data, &update, NULL), "CKCA update with answers that are kept");
        update.method = CKCA_METHOD_SHRINK_PERTURB;
        check_status(ctx, ckca_update(m, data, &update, NULL), "shrink and perturb");
        ckca_memory_desc kept = {0, 1};
        check_status(ctx, ckca_memory_create(m, &update.memory, &kept), "a memory");
        check_status(ctx, ckca_memory_fill(update.memory, m, data), "the Fisher information");
        update.method = CKCA_METHOD_EWC;
        check_status(ctx, ckca_update(m, data, &update, NULL), "EWC");
        ckca_memory_free(update.memory);
        check_status(ctx, ckca_predict(m, pixels.data(), batch, p.data()), "prediction");
        for (size_t i = 0; i < rows.size(); i++) rows[i].count = i < counts.size() ? counts[i] : 0;
        wgmma = ckca__device_wgmma(ctx, 1);
        show(net, batch, size, (std::string(precision_name[precision]) + (wgmma ? "" : ", without wgmma")).c_str());
    }
    mode = OFF;
    ckca__device_release(ctx, flush, FLUSH);
    flush = NULL;
    ckca_data_free(data);
    ckca_model_free(m);
    ckca_context_free(ctx);
}

int main(int argc, char **argv) {
    const int profile = argc > 1 && !strcmp(argv[1], "profile"), first = 1 + profile;
    const int wgmma = profile || argc != first + 5 || strcmp(argv[first + 4], "mma");
    int precision = 0, steps = 0;
    if (argc > 1) {
        if (argc != first + 4 + (profile || !wgmma)) give_up("[profile] NET BATCH SIZE PRECISION [STEPS or mma]");
        while (precision < 3 && strcmp(argv[first + 3], precision_name[precision])) precision++;
        if (precision == 3 || atoi(argv[first + 1]) < 1 || atoi(argv[first + 2]) < 1)
            give_up("the batch and the size are at least 1, the precision is float32, tf32 or bf16");
        if (profile && (steps = atoi(argv[first + 4])) < 1) give_up("STEPS is at least 1");
        look_at(argv[first], atoi(argv[first + 1]), atoi(argv[first + 2]), precision, wgmma, steps);
    } else
        for (const config &c : networks)
            for (precision = CKCA_PRECISION_FLOAT32; precision <= CKCA_PRECISION_BF16; precision++)
                if (c.precisions >> precision & 1) look_at(c.net, c.batch, c.size, precision, 1, 0);
    if (!profile) printf("%d passed, %d failed\n", passed, failures);
    return failures > 0;
}
