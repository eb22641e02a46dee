/* ckca_cuda.cu - the GPU path of ckca.h: its ops as CUDA kernels and cuBLAS calls. MIT or public domain, your choice.

   ckca.h declares the ops (section OPS, the seam) and has them for the host; this file has them for a GPU, with the
   same names and arguments. A program chooses when it is compiled, and changes nothing else:

       nvcc -O3 -std=c++17 -arch=native -c ckca_cuda.cu
       cc -O3 -DCKCA_CUDA -c program.c                        (program.c defines CKCA_IMPLEMENTATION as ever)
       nvcc program.o ckca_cuda.o -lcublas -o program

   A context lives on the CUDA device that is current when it is created (CUDA_VISIBLE_DEVICES chooses), which must be
   current when it is used. CUDA 12 or newer; GPUs from Turing (sm_75) on, TF32 and BF16 from Ampere (sm_80).

   CONTENTS, each a section under this name
       CONTEXT        stream, cuBLAS handle, errors that wait to be reported, launching
       MEMORY         device memory, copies, stages for what comes in a stream, recorded work (CUDA graphs)
       INSTRUCTIONS   what C++ has no name for: tensor cores, copies under way, roundings; and values of either kind
       GEMM           the one kernel behind the three passes of every convolution but plain 1 x 1
       CONVOLUTION    the ops that choose it, or cuBLAS
       CHANNELS       sums over all pixels: batch norm, bias gradients
       ELEMENTS       element-wise ops, pooling, group norm, gathering
       LOSSES
       WEIGHTS        SGD, clipping
       PICTURES       bytes to augmented, normalised floats

   HOW KERNELS ARE LAID OUT
       Everything runs in one stream, in order, but for the uploads of pictures that the GPU has no room to keep (see
       stages). Blocks are of 256 threads. Element-wise kernels are grids of at most 16 blocks a multiprocessor whose
       threads walk the array in strides, 16 bytes at a time where they can; where channels matter the stride is a
       multiple of the channels, so that each thread meets the same ones and loads their constants once. Sums are taken
       in two stages of fixed shape: a block sums its part in an order that depends on the sizes alone, then one block
       or warp adds the parts in theirs. There are no atomics: the same machine gives the same bits.

   FLOORS, what no kernel can beat: bytes through memory at its bandwidth, or multiply-adds at the peak of the unit used
       GEMM           2 N P Q K R S C flops on tensor cores (FLOAT32: on the FFMA units), or the bytes of x, w and y
                      once. 3 x 3 on 16 channels costs 288 flops and 8 bytes an output: memory is the floor there.
       batch norm     forward: read x twice, write y (12 bytes a value, 4 more with a residual); backward: read x and dy
                      twice, y twice where ReLU, write dx (20 to 28 bytes), dresidual 4 to 8 more. BF16: half of that.
       element-wise   the bytes of its arguments once; SGD 20 bytes a parameter.
       pictures       a byte in, a float out.
       losses         small; latency.

   PRECISION (ckca_desc.precision): FLOAT32 multiplies floats on the FFMA units. TF32 rounds both factors of
   convolutions and linear layers (as registers take them from shared memory; cuBLAS in its own way) and multiplies on
   tensor cores, summing in float32. BF16 keeps the maps between the pictures and the average pooling, and their
   gradients, as bfloat16 in memory and multiplies them by weights rounded to it, summing in float32; what is behind the
   pooling stays float32 and is multiplied as TF32. Weights, their gradients, statistics, losses and SGD are float32
   throughout.

   No GPU was at hand when this was written: it has been run on the CPU only, by tests/cuda_shim.h. */
#ifndef CKCA_CUDA
#define CKCA_CUDA
#endif
#define CKCA_CUDA_IMPLEMENTATION
#include "ckca.h"
#ifndef CKCA_CUDA_SHIM
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#endif

/* ------------------------------------------------------------------------------------------------------------------
   CONTEXT
   ------------------------------------------------------------------------------------------------------------------ */

enum {
    CKCA__THREADS = 256, /* in every block */
    CKCA__SLOTS = 4,     /* pinned buffers that uploads go through, in turn */
    CKCA__SLOT_BYTES = 1 << 18,
    CKCA__BLAS_BYTES = 32 << 20 /* cuBLAS's workspace: what it is advised to have on Hopper, and fixed for graphs */
};

typedef struct ckca__cuda {
    cudaStream_t stream, copies; /* all work; what a stage sends, meanwhile */
    cublasHandle_t blas;
    void *blas_workspace;
    int blocks;                    /* of an element-wise kernel, at most */
    double *scratch;               /* on the device: one double */
    char *slot[CKCA__SLOTS];       /* pinned host memory */
    cudaEvent_t sent[CKCA__SLOTS]; /* the slot's last upload is through */
    int next;                      /* slot */
    unsigned releases;             /* memory given back so far: what was recorded before may point to it */
    int failed;
    char error[400];
} ckca__cuda;

static ckca__cuda *ckca__cuda_of(const ckca_context *ctx) { return (ckca__cuda *)ctx->cuda; }

/* Notes the first failure: call is the source text of what failed, up to its arguments. */
static int ckca__cuda_note(ckca__cuda *cuda, const char *call, const char *message) {
    int length;
    call += *call == '('; /* around a kernel with template arguments */
    length = (int)strcspn(call, "(<");
    if (!cuda->failed) snprintf(cuda->error, sizeof cuda->error, "%.*s: %s", length, call, message);
    cuda->failed = 1;
    return 0;
}
static int ckca__cuda_check(ckca__cuda *cuda, const char *call, cudaError_t status) {
    return status == cudaSuccess ? 1 : ckca__cuda_note(cuda, call, cudaGetErrorString(status));
}
static int ckca__blas_check(ckca__cuda *cuda, const char *call, cublasStatus_t status) {
    return status == CUBLAS_STATUS_SUCCESS ? 1 : ckca__cuda_note(cuda, call, cublasGetStatusString(status));
}
#define CKCA__CUDA(cuda, call) ckca__cuda_check(cuda, #call, call)
#define CKCA__BLAS(cuda, call) ckca__blas_check(cuda, #call, call)

/* Every kernel starts here: CKCA__LAUNCH(ctx, kernel, blocks, arguments...). tests/cuda_shim.h has its own. */
#ifndef CKCA__LAUNCH
#define CKCA__LAUNCH(ctx, kernel, grid, ...)                                           \
    do {                                                                               \
        kernel<<<(grid), CKCA__THREADS, 0, ckca__cuda_of(ctx)->stream>>>(__VA_ARGS__); \
        ckca__cuda_check(ckca__cuda_of(ctx), #kernel, cudaGetLastError());             \
    } while (0)
#endif

CKCA__OP void ckca__device_free(ckca_context *ctx) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    int i;
    if (!cuda) return;
    if (cuda->stream) cudaStreamSynchronize(cuda->stream);
    if (cuda->copies) cudaStreamSynchronize(cuda->copies);
    if (cuda->blas) cublasDestroy(cuda->blas);
    for (i = 0; i < CKCA__SLOTS; i++) {
        if (cuda->sent[i]) cudaEventDestroy(cuda->sent[i]);
        if (cuda->slot[i]) cudaFreeHost(cuda->slot[i]);
    }
    if (cuda->blas_workspace) cudaFree(cuda->blas_workspace);
    if (cuda->scratch) cudaFree(cuda->scratch);
    if (cuda->copies) cudaStreamDestroy(cuda->copies);
    if (cuda->stream) cudaStreamDestroy(cuda->stream);
    free(cuda);
    ctx->cuda = NULL;
}

/* What a failure leaves is freed with the context. */
CKCA__OP ckca_status ckca__device_init(ckca_context *ctx) {
    ckca__cuda *cuda = (ckca__cuda *)calloc(1, sizeof *cuda);
    static const char *const precision[CKCA_PRECISION_COUNT] = {"float32", "tf32", "bf16"};
    cudaDeviceProp gpu;
    int device, ok, i;
    if (!cuda) {
        snprintf(ctx->error, sizeof ctx->error, "ckca_init: out of memory for the GPU's %d bytes", (int)sizeof *cuda);
        return CKCA_ENOMEM;
    }
    ctx->cuda = cuda;
    ok = CKCA__CUDA(cuda, cudaGetDevice(&device)) && CKCA__CUDA(cuda, cudaGetDeviceProperties(&gpu, device));
    if (!ok) return ckca__device_status(ctx);
    if (ctx->precision != CKCA_PRECISION_FLOAT32 && gpu.major < 8) { /* as an instruction set it lacks */
        snprintf(ctx->error, sizeof ctx->error,
                 "ckca_init: precision is %s, which needs compute capability 8.0; %.100s has %d.%d",
                 precision[ctx->precision], gpu.name, gpu.major, gpu.minor);
        return CKCA_EINVAL;
    }
    ok = CKCA__CUDA(cuda, cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking)) &&
         CKCA__CUDA(cuda, cudaStreamCreateWithFlags(&cuda->copies, cudaStreamNonBlocking)) &&
         CKCA__CUDA(cuda, cudaMalloc((void **)&cuda->scratch, sizeof *cuda->scratch)) &&
         CKCA__CUDA(cuda, cudaMalloc(&cuda->blas_workspace, CKCA__BLAS_BYTES)) &&
         CKCA__BLAS(cuda, cublasCreate(&cuda->blas)) && CKCA__BLAS(cuda, cublasSetStream(cuda->blas, cuda->stream)) &&
         CKCA__BLAS(cuda, cublasSetWorkspace(cuda->blas, cuda->blas_workspace, CKCA__BLAS_BYTES));
    for (i = 0; ok && i < CKCA__SLOTS; i++)
        ok = CKCA__CUDA(cuda, cudaMallocHost((void **)&cuda->slot[i], CKCA__SLOT_BYTES)) &&
             CKCA__CUDA(cuda, cudaEventCreateWithFlags(&cuda->sent[i], cudaEventDisableTiming));
    cuda->blocks = 16 * gpu.multiProcessorCount;
    snprintf(ctx->device, sizeof ctx->device, "cuda %.40s %s", gpu.name, precision[ctx->precision]);
    return ckca__device_status(ctx);
}

CKCA__OP ckca_status ckca__device_status(ckca_context *ctx) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    if (!cuda->failed) return CKCA_OK;
    cuda->failed = 0;
    snprintf(ctx->error, sizeof ctx->error, "%s", cuda->error);
    return CKCA_ECUDA;
}

/* ------------------------------------------------------------------------------------------------------------------
   MEMORY
   ------------------------------------------------------------------------------------------------------------------ */

/* Having no memory is no reason for later calls to fail; any other failure is noted. */
static int ckca__cuda_granted(ckca__cuda *cuda, const char *call, cudaError_t status) {
    if (status == cudaSuccess) return 1;
    cudaGetLastError();
    if (status != cudaErrorMemoryAllocation && status != cudaErrorInvalidValue) ckca__cuda_check(cuda, call, status);
    return 0;
}

/* For tests: the byte that new memory is filled with, 0xff (NaN) to see who relies on zeros; -1: none, for initcheck. */
#ifndef CKCA_FRESH
#define CKCA_FRESH 0
#endif

CKCA__OP void *ckca__device_alloc(ckca_context *ctx, size_t bytes) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    void *memory = NULL;
    size_t total;
    if (ckca__cuda_granted(cuda, "cudaMalloc", cudaMalloc(&memory, bytes ? bytes : 1))) {
        if (CKCA_FRESH >= 0) CKCA__CUDA(cuda, cudaMemsetAsync(memory, CKCA_FRESH, bytes, cuda->stream));
        return memory;
    }
    ctx->refused = bytes;
    if (cudaMemGetInfo(&ctx->free_bytes, &total) != cudaSuccess) ctx->free_bytes = 0;
    return NULL;
}

CKCA__OP void ckca__device_release(ckca_context *ctx, void *memory, size_t bytes) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    (void)bytes;
    if (!memory) return;
    cuda->releases++;
    CKCA__CUDA(cuda, cudaFree(memory));
}

/* Small things are copied to pinned memory first, so that the call returns while the GPU is still busy with the steps
   before; large ones (weights, a store of pictures) are left to the driver. */
CKCA__OP void ckca__device_upload(ckca_context *ctx, void *device, const void *host, size_t bytes) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    const void *from = host;
    const int slot = cuda->next, small = bytes <= CKCA__SLOT_BYTES;
    if (!bytes) return;
    if (small) {
        CKCA__CUDA(cuda, cudaEventSynchronize(cuda->sent[slot]));
        from = memcpy(cuda->slot[slot], host, bytes);
        cuda->next = (slot + 1) % CKCA__SLOTS;
    }
    CKCA__CUDA(cuda, cudaMemcpyAsync(device, from, bytes, cudaMemcpyHostToDevice, cuda->stream));
    if (small) CKCA__CUDA(cuda, cudaEventRecord(cuda->sent[slot], cuda->stream));
}

CKCA__OP void ckca__device_download(ckca_context *ctx, void *host, const void *device, size_t bytes) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    if (!bytes) return;
    CKCA__CUDA(cuda, cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, cuda->stream));
    CKCA__CUDA(cuda, cudaStreamSynchronize(cuda->stream));
}

CKCA__OP void ckca__device_copy(ckca_context *ctx, void *to, const void *from, size_t bytes) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    if (bytes) CKCA__CUDA(cuda, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cuda->stream));
}

CKCA__OP void ckca__device_zero(ckca_context *ctx, void *device, size_t bytes) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    if (bytes) CKCA__CUDA(cuda, cudaMemsetAsync(device, 0, bytes, cuda->stream));
}

CKCA__OP size_t ckca__device_free_bytes(const ckca_context *ctx) {
    size_t room = 0, total;
    return CKCA__CUDA(ckca__cuda_of(ctx), cudaMemGetInfo(&room, &total)) ? room : 0;
}

/* ---- stages ---- */

/* Two buffers on either side, by turns: while one is filled on the host, the other's upload and the work on the batch
   before that go on. Work finds its input where it always was, at the price of a copy on the device. */
typedef struct ckca__staging {
    size_t bytes;
    char *host[2], *device[2];     /* pinned memory; where it is uploaded to */
    cudaEvent_t sent[2], taken[2]; /* host's upload is through; device has been copied from */
    int next;
} ckca__staging;

CKCA__OP void ckca__device_staging_close(ckca_context *ctx, void *stage) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    ckca__staging *s = (ckca__staging *)stage;
    int i;
    CKCA__CUDA(cuda, cudaStreamSynchronize(cuda->copies));
    CKCA__CUDA(cuda, cudaStreamSynchronize(cuda->stream));
    for (i = 0; i < 2; i++) {
        if (s->sent[i]) cudaEventDestroy(s->sent[i]);
        if (s->taken[i]) cudaEventDestroy(s->taken[i]);
        if (s->host[i]) cudaFreeHost(s->host[i]);
        ckca__device_release(ctx, s->device[i], s->bytes);
    }
    free(s);
}

CKCA__OP void *ckca__device_staging_open(ckca_context *ctx, size_t bytes) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    ckca__staging *s = (ckca__staging *)calloc(1, sizeof *s);
    int i, ok = s != NULL;
    if (!ok) return NULL;
    s->bytes = bytes;
    for (i = 0; ok && i < 2; i++)
        ok = (s->device[i] = (char *)ckca__device_alloc(ctx, bytes)) != NULL &&
             ckca__cuda_granted(cuda, "cudaMallocHost", cudaMallocHost((void **)&s->host[i], bytes)) &&
             CKCA__CUDA(cuda, cudaEventCreateWithFlags(&s->sent[i], cudaEventDisableTiming)) &&
             CKCA__CUDA(cuda, cudaEventCreateWithFlags(&s->taken[i], cudaEventDisableTiming));
    /* The buffers are zeroed in one stream and written to in the other. */
    if (ok && CKCA__CUDA(cuda, cudaStreamSynchronize(cuda->stream))) return s;
    ckca__device_staging_close(ctx, s);
    return NULL;
}

CKCA__OP void *ckca__device_staging_buffer(ckca_context *ctx, void *stage) {
    const ckca__staging *s = (const ckca__staging *)stage;
    return CKCA__CUDA(ckca__cuda_of(ctx), cudaEventSynchronize(s->sent[s->next])) ? s->host[s->next] : NULL;
}

CKCA__OP void ckca__device_staging_send(ckca_context *ctx, void *stage, void *device, size_t bytes) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    ckca__staging *s = (ckca__staging *)stage;
    const int i = s->next;
    s->next = 1 - i;
    CKCA__CUDA(cuda, cudaStreamWaitEvent(cuda->copies, s->taken[i], 0));
    CKCA__CUDA(cuda, cudaMemcpyAsync(s->device[i], s->host[i], bytes, cudaMemcpyHostToDevice, cuda->copies));
    CKCA__CUDA(cuda, cudaEventRecord(s->sent[i], cuda->copies));
    CKCA__CUDA(cuda, cudaStreamWaitEvent(cuda->stream, s->sent[i], 0));
    CKCA__CUDA(cuda, cudaMemcpyAsync(device, s->device[i], bytes, cudaMemcpyDeviceToDevice, cuda->stream));
    CKCA__CUDA(cuda, cudaEventRecord(s->taken[i], cuda->stream));
}

/* ---- recorded work ---- */

/* The first time, work runs as it comes (so that what loads lazily is loaded); the second time it is captured as a CUDA
   graph, which is launched then and from then on. A graph whose memory may be gone is captured anew. */
typedef struct ckca__recording {
    cudaGraphExec_t graph; /* NULL: none yet */
    unsigned releases;     /* cuda->releases when it was captured */
    int seen, capturing;
} ckca__recording;

static void ckca__cuda_drop(ckca__cuda *cuda, ckca__recording *r) {
    if (!r->graph) return;
    CKCA__CUDA(cuda, cudaStreamSynchronize(cuda->stream)); /* it may be running */
    CKCA__CUDA(cuda, cudaGraphExecDestroy(r->graph));
    r->graph = NULL;
}

CKCA__OP int ckca__device_record(ckca_context *ctx, void **recording) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    ckca__recording *r = (ckca__recording *)*recording;
    if (!r) {
        *recording = calloc(1, sizeof *r);
        return 1;
    }
    if (r->graph && r->releases == cuda->releases) {
        CKCA__CUDA(cuda, cudaGraphLaunch(r->graph, cuda->stream));
        return 0;
    }
    ckca__cuda_drop(cuda, r);
    r->releases = cuda->releases;
    if (r->seen++)
        r->capturing = CKCA__CUDA(cuda, cudaStreamBeginCapture(cuda->stream, cudaStreamCaptureModeThreadLocal));
    return 1;
}

CKCA__OP void ckca__device_recorded(ckca_context *ctx, void **recording) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    ckca__recording *r = (ckca__recording *)*recording;
    cudaGraph_t graph = NULL;
    if (!r) return;
    if (!r->capturing) {
        r->seen = 1;
        return;
    }
    r->capturing = 0;
    if (!CKCA__CUDA(cuda, cudaStreamEndCapture(cuda->stream, &graph))) return;
    if (CKCA__CUDA(cuda, cudaGraphInstantiate(&r->graph, graph, 0)))
        CKCA__CUDA(cuda, cudaGraphLaunch(r->graph, cuda->stream));
    else
        r->graph = NULL;
    CKCA__CUDA(cuda, cudaGraphDestroy(graph));
}

CKCA__OP void ckca__device_forget(ckca_context *ctx, void **recording) {
    ckca__recording *r = (ckca__recording *)*recording;
    if (!r) return;
    ckca__cuda_drop(ckca__cuda_of(ctx), r);
    free(r);
    *recording = NULL;
}

/* ------------------------------------------------------------------------------------------------------------------
   INSTRUCTIONS
   ------------------------------------------------------------------------------------------------------------------ */

struct ckca__bf16 { /* the upper half of a float */
    unsigned short bits;
};

#ifndef CKCA_CUDA_SHIM
__device__ __forceinline__ unsigned ckca__to_bf16x2(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *(unsigned *)&pair;
}
__device__ __forceinline__ unsigned ckca__to_tf32(float v) {
    unsigned word = __float_as_uint(v);
#if __CUDA_ARCH__ >= 800
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(v));
#endif
    return word;
}

/* 16 bytes from memory to shared memory, or zeros where they are not there. Under way until ckca__copies_wait, which
   waits until at most so many of the groups that ckca__copies_commit closed are left. */
__device__ __forceinline__ void ckca__copy_chunk(uint4 *shared, const void *memory, int there) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
                 "l"(memory), "r"(there ? 16 : 0)
                 : "memory");
#else
    *shared = there ? *(const uint4 *)memory : make_uint4(0, 0, 0, 0);
#endif
}
__device__ __forceinline__ void ckca__copies_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int LEFT> __device__ __forceinline__ void ckca__copies_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

/* Four matrices of 8 rows of 16 bytes: lane i points to row i % 8 of matrix i / 8, and gets of each, in its order, the
   word lane % 4 of row lane / 4. TURNED: rows are of 8 halves, and a lane gets rows 2 (lane % 4) and the next of column
   lane / 4. */
template <int TURNED> __device__ __forceinline__ void ckca__load_matrices(unsigned v[4], const uint4 *row) {
    const unsigned at = (unsigned)__cvta_generic_to_shared(row);
    if constexpr (TURNED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                     : "r"(at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                     : "r"(at)
                     : "memory");
}

/* c += a b: 16 x 8 sums of 32 bytes of k. A *word* is one TF32, or two BF16 that are neighbours in k, the first in the
   low half; in words the fragments of both instructions are laid out alike (PTX ISA, "Matrix Fragments for mma.m16n8k8"
   and "m16n8k16"). With g = lane / 4 and t = lane % 4, of a's 16 x 8 words: a0 = (g, t), a1 = (g + 8, t), a2 = (g, t +
   4), a3 = (g + 8, t + 4); of b's 8 x 8: b0 = (t, g), b1 = (t + 4, g); of the sums: c0 = (g, 2t), c1 = (g, 2t + 1), c2
   and c3 eight rows below. */
__device__ __forceinline__ void ckca__mma_tf32(float c[4], const unsigned a[4], const unsigned b[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
__device__ __forceinline__ void ckca__mma_bf16(float c[4], const unsigned a[4], const unsigned b[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
#endif

/* n / by for n below 2^31 by a multiplication (Granlund and Montgomery 1994). */
typedef struct ckca__divisor {
    unsigned by, magic, shift;
} ckca__divisor;

CKCA__BOTH ckca__divisor ckca__divide_by(int by) {
    ckca__divisor d;
    d.by = (unsigned)by;
    for (d.shift = 0; (1u << d.shift) < d.by; d.shift++) {
    }
    d.magic = (unsigned)(((((uint64_t)1 << d.shift) - d.by) << 32) / d.by + 1);
    return d;
}
__device__ __forceinline__ int ckca__quotient(int n, ckca__divisor d) {
    return (int)((__umulhi((unsigned)n, d.magic) + (unsigned)n) >> d.shift);
}

/* ---- values: floats or bfloat16 in memory, floats in registers ---- */

__device__ __forceinline__ float ckca__to_float(float v) { return v; }
__device__ __forceinline__ float ckca__to_float(ckca__bf16 v) { return __uint_as_float((unsigned)v.bits << 16); }
__device__ __forceinline__ void ckca__put(float *to, float v) { *to = v; }
__device__ __forceinline__ void ckca__put(ckca__bf16 *to, float v) { to->bits = (unsigned short)ckca__to_bf16x2(v, 0); }
/* How many values are 16 bytes. */
template <class T> struct ckca__chunk {
    enum { VALUES = 16 / sizeof(T) };
};

/* WIDTH neighbours: as many as a chunk of either kind has (aligned like it), two (aligned together), or one. Kernels
   that go over values are written once for all. */
template <int WIDTH> struct ckca__lane {
    float v[WIDTH];
    __device__ __forceinline__ ckca__lane() {}
    __device__ __forceinline__ explicit ckca__lane(const float *from) {
        if constexpr (WIDTH >= 4)
            for (int j = 0; j < WIDTH; j += 4) {
                const float4 q = *(const float4 *)(from + j);
                v[j] = q.x, v[j + 1] = q.y, v[j + 2] = q.z, v[j + 3] = q.w;
            }
        else
            for (int j = 0; j < WIDTH; j++) v[j] = from[j];
    }
    __device__ __forceinline__ explicit ckca__lane(const ckca__bf16 *from) {
        if constexpr (WIDTH == 8) {
            const uint4 q = *(const uint4 *)from;
            const unsigned word[4] = {q.x, q.y, q.z, q.w};
            for (int j = 0; j < 4; j++) {
                v[2 * j] = __uint_as_float(word[j] << 16);
                v[2 * j + 1] = __uint_as_float(word[j] & 0xffff0000);
            }
        } else
            for (int j = 0; j < WIDTH; j++) v[j] = ckca__to_float(from[j]);
    }
    __device__ __forceinline__ void store(float *to) const {
        if constexpr (WIDTH >= 4)
            for (int j = 0; j < WIDTH; j += 4) *(float4 *)(to + j) = make_float4(v[j], v[j + 1], v[j + 2], v[j + 3]);
        else if constexpr (WIDTH == 2)
            *(float2 *)to = make_float2(v[0], v[1]);
        else
            *to = v[0];
    }
    __device__ __forceinline__ void store(ckca__bf16 *to) const {
        if constexpr (WIDTH == 8)
            *(uint4 *)to = make_uint4(ckca__to_bf16x2(v[0], v[1]), ckca__to_bf16x2(v[2], v[3]),
                                      ckca__to_bf16x2(v[4], v[5]), ckca__to_bf16x2(v[6], v[7]));
        else if constexpr (WIDTH == 2)
            *(unsigned *)to = ckca__to_bf16x2(v[0], v[1]);
        else
            for (int j = 0; j < WIDTH; j++) ckca__put(to + j, v[j]);
    }
};

/* Runs f with a value of the type that an op's maps are of. */
template <class F> static void ckca__typed(int bf16, F f) {
    if (bf16)
        f(ckca__bf16());
    else
        f(float());
}

/* ------------------------------------------------------------------------------------------------------------------
   GEMM: out (rows x columns) = the sum over k of A (rows x k) B (k x columns)

       pass       rows                 columns   k               A                            B
       FORWARD    output pixels        K         R S C           x under the taps             w
       DATA       input pixels         C         taps K          dy over the taps             w, turned to C x R x S x K
       WEIGHT     R S C                K         output pixels   x under tap and pixel        dy

   A is never stored: its elements are fetched from x or dy as they are needed (implicit GEMM). An input pixel of a
   convolution of stride s meets only the taps of its phase (every s-th); blockIdx.z walks the s x s phases, each a GEMM
   of its own, so nothing is multiplied by zeros. In WEIGHT blockIdx.z walks splits of the pixels, whose sums
   ckca__add_splits adds in their order.

   A block computes 128 rows x COLUMNS (16, 32, 64 or 128) columns in slabs of 64 bytes of k, 16 floats or 32 BF16.
   Three slabs are in shared memory: while one is multiplied, the next two are on their way there (cp.async). What
   travels is a *chunk*, 16 bytes that are neighbours in memory: along k in FORWARD and DATA, where a slab is lines (rows
   or columns) of 4 chunks; along rows or columns in WEIGHT, where it is k lines of 128 or COLUMNS values. Chunks of a
   line are exchanged (ckca__spot) such that whatever is fetched at once, 8 chunks on top of each other (ldmatrix) or a
   fragment's 32 words, meets all banks. Channels that are no multiple of a chunk are fetched one by one (WHOLE = 0).
   ------------------------------------------------------------------------------------------------------------------ */

enum { CKCA__FORWARD, CKCA__DATA, CKCA__ROLE_WEIGHT };
enum { CKCA__ROWS = 128, CKCA__SLABS = 3, CKCA__SLAB_CHUNKS = 4 };

typedef struct ckca__gemm {
    ckca__conv s;
    const void *a, *b;    /* as in the table */
    const float *bias;    /* FORWARD; or NULL */
    const void *residual; /* likewise */
    void *out;
    int relu, accumulate; /* adds to out */
    int split;            /* WEIGHT: pixels of a split */
    int wide;             /* how many blocks all columns take */
    ckca__divisor q, p;   /* of the output, DATA: of the input: pixels in a line, lines in a picture */
} ckca__gemm;

/* One axis of a phase: output i of count lies at at + spread i and meets tap first + step t of w, t < taps, in source
   pixel i stride + from + t (DATA: i + from + t). */
typedef struct ckca__phase {
    int taps, first, step, from, at, spread, count, stride;
} ckca__phase;

__device__ ckca__phase ckca__phase_of(int pass, int phase, int taps, int stride, int pad, int outputs) {
    ckca__phase v;
    if (pass == CKCA__DATA) {
        v.first = (phase + pad) % stride;
        v.taps = v.first < taps ? (taps - v.first + stride - 1) / stride : 0;
        v.first += stride * (v.taps - 1);
        v.step = -stride;
        v.from = (phase + pad) / stride - (v.taps - 1);
        v.at = phase;
        v.spread = stride;
        v.count = outputs > phase ? (outputs - phase + stride - 1) / stride : 0;
        v.stride = 1;
    } else {
        v.taps = taps;
        v.first = v.at = 0;
        v.step = v.spread = 1;
        v.from = -pad;
        v.count = outputs;
        v.stride = stride;
    }
    return v;
}

/* FORWARD and DATA: which pixel of its phase a row is; n is past the last picture where there is none. */
struct ckca__output {
    int n, y, x;
    __device__ ckca__output(const ckca__gemm &g, int pass, const ckca__phase &py, const ckca__phase &px, int row) {
        int line;
        if (pass == CKCA__DATA && g.s.stride > 1) {
            line = px.count ? row / px.count : 0;
            n = px.count && py.count ? line / py.count : g.s.n;
            y = line - n * py.count;
            x = row - line * px.count;
        } else {
            line = ckca__quotient(row, g.q);
            n = ckca__quotient(line, g.p);
            y = line - n * (int)g.p.by;
            x = row - line * (int)g.q.by;
        }
    }
};

/* What convolutions multiply in, and what their maps are stored as. */
template <int PRECISION> struct ckca__factor { typedef float type; };
template <> struct ckca__factor<CKCA_PRECISION_BF16> { typedef ckca__bf16 type; };

/* Where a chunk of a line lies in a slab, whose lines have CHUNKS each. WORDS: its words are fetched one by one, from 4
   neighbouring lines at once; else whole chunks from 8 lines. */
template <int CHUNKS, int WORDS> __device__ __forceinline__ int ckca__spot(int line, int chunk) {
    const int turn =
        WORDS ? (CHUNKS >= 8 ? line % 4 * 2 : line & 2) : (CHUNKS >= 8 ? line % 8 : line * CHUNKS / 8 % CHUNKS);
    return line * CHUNKS + (chunk ^ turn);
}

/* FORWARD and DATA: a place along k = (tap y, tap x, channel), and where it lies from what the first tap meets, in A's
   tensor and in the weights. */
struct ckca__place {
    int y, x, c;
    int source, weight;
};

/* How places follow each other. */
struct ckca__walk {
    int channels, taps_x;
    int next_row, weight_tap, weight_row; /* to be added where the next line of taps, another tap begins */

    __device__ ckca__walk(const ckca__gemm &g, const ckca__phase &py, const ckca__phase &px, int channels_, int width)
        : channels(channels_), taps_x(px.taps > 0 ? px.taps : 1) {
        next_row = (width - taps_x) * channels;
        weight_tap = (px.step - 1) * channels; /* taps are neighbours in the source, but may go back in the weights */
        weight_row = (py.step * g.s.s - px.step * taps_x) * channels;
    }
    __device__ __forceinline__ void advance(ckca__place &at, int by) const {
        at.source += by;
        at.weight += by;
        for (at.c += by; at.c >= channels; at.c -= channels) {
            at.weight += weight_tap;
            if (++at.x < taps_x) continue;
            at.x = 0;
            at.y++;
            at.source += next_row;
            at.weight += weight_row;
        }
    }
};

/* One value on its way to shared memory, from an array that may be of the other kind. */
template <class T> __device__ __forceinline__ void ckca__fetch_one(T *to, const void *from, int bf16, ptrdiff_t i) {
    if (sizeof(T) == sizeof(ckca__bf16) && bf16)
        *to = ((const T *)from)[i];
    else
        ckca__put(to, ((const float *)from)[i]);
}

/* FORWARD and DATA: this thread's part in bringing slabs to shared memory: one chunk of k in each of some lines of A
   and of B. */
template <class T, int COLUMNS, int WHOLE> struct ckca__along {
    enum {
        VALUES = ckca__chunk<T>::VALUES,
        APART = CKCA__THREADS / CKCA__SLAB_CHUNKS, /* lines that are fetched at once */
        ROWS = CKCA__ROWS / APART,
        LINES = (COLUMNS + APART - 1) / APART
    };
    const ckca__gemm &g;
    const ckca__walk walk;
    const int bf16, taps_y, h, w, columns, line, column;
    ptrdiff_t source[ROWS]; /* of each row: where the first tap's pixel lies, and its y and x */
    int y[ROWS], x[ROWS];
    ckca__place k;

    __device__ ckca__along(const ckca__gemm &g_, int pass, const ckca__phase &py, const ckca__phase &px, int row0,
                           int column0)
        : g(g_), walk(g_, py, px, pass == CKCA__DATA ? g_.s.k : g_.s.c, pass == CKCA__DATA ? g_.s.q : g_.s.w),
          bf16(pass == CKCA__DATA ? g.s.bf16 : g.s.bf16_x), taps_y(py.taps), h(pass == CKCA__DATA ? g.s.p : g.s.h),
          w(pass == CKCA__DATA ? g.s.q : g.s.w), columns(pass == CKCA__DATA ? g.s.c : g.s.k),
          line((int)threadIdx.x / CKCA__SLAB_CHUNKS), column(column0 + line) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const ckca__output at(g, pass, py, px, row0 + line + i * APART);
            y[i] = at.n < g.s.n ? at.y * py.stride + py.from : -(1 << 29); /* outside of everything */
            x[i] = at.x * px.stride + px.from;
            source[i] = (((ptrdiff_t)at.n * h + y[i]) * w + x[i]) * walk.channels;
        }
        k.y = k.x = k.c = k.source = 0;
        k.weight = (py.first * g.s.s + px.first) * walk.channels;
        walk.advance(k, (int)threadIdx.x % CKCA__SLAB_CHUNKS * VALUES);
    }
    __device__ __forceinline__ int is_inside(int i, const ckca__place &at) const {
        return at.y < taps_y && (unsigned)(y[i] + at.y) < (unsigned)h && (unsigned)(x[i] + at.x) < (unsigned)w;
    }
    __device__ __forceinline__ void fetch(uint4 *a, uint4 *b) {
        const int to = ckca__spot<CKCA__SLAB_CHUNKS, 0>(line, (int)threadIdx.x % CKCA__SLAB_CHUNKS);
        const ptrdiff_t weights = (ptrdiff_t)column * (g.s.r * g.s.s * walk.channels);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            uint4 *chunk = a + to + i * APART * CKCA__SLAB_CHUNKS;
            if constexpr (WHOLE) {
                ckca__copy_chunk(chunk, (const T *)g.a + source[i] + k.source, is_inside(i, k));
            } else {
                ckca__place at = k;
                for (int j = 0; j < VALUES; j++, walk.advance(at, 1))
                    if (is_inside(i, at))
                        ckca__fetch_one((T *)chunk + j, g.a, bf16, source[i] + at.source);
                    else
                        ckca__put((T *)chunk + j, 0);
            }
        }
#pragma unroll
        for (int i = 0; i < LINES; i++) {
            uint4 *chunk = b + to + i * APART * CKCA__SLAB_CHUNKS;
            const int is_column = column + i * APART < columns;
            const T *from = (const T *)g.b + weights + (ptrdiff_t)(i * APART) * (g.s.r * g.s.s * walk.channels);
            if (COLUMNS < APART && line >= COLUMNS) break;
            if constexpr (WHOLE) {
                ckca__copy_chunk(chunk, from + k.weight, is_column && k.y < taps_y);
            } else {
                ckca__place at = k;
                for (int j = 0; j < VALUES; j++, walk.advance(at, 1))
                    if (is_column && at.y < taps_y)
                        ((T *)chunk)[j] = from[at.weight];
                    else
                        ckca__put((T *)chunk + j, 0);
            }
        }
        walk.advance(k, CKCA__SLAB_CHUNKS * VALUES);
    }
};

/* WEIGHT: likewise, in some lines (pixels) one chunk of rows and one of columns. */
template <class T, int COLUMNS, int WHOLE> struct ckca__across {
    enum {
        VALUES = ckca__chunk<T>::VALUES,
        DEPTH = CKCA__SLAB_CHUNKS * VALUES, /* pixels in a slab */
        WORDS = sizeof(T) == 4,
        CHUNKS_A = CKCA__ROWS / VALUES,
        CHUNKS_B = COLUMNS / VALUES,
        APART_A = CKCA__THREADS / CHUNKS_A,
        APART_B = CKCA__THREADS / CHUNKS_B,
        ROWS = WHOLE ? 1 : VALUES /* that are fetched one by one: a whole chunk is under one tap */
    };
    const ckca__gemm &g;
    int pixel, end, column;
    int tap_y[ROWS], tap_x[ROWS], c[ROWS];
    __device__ ckca__across(const ckca__gemm &g_, int row0, int column0, int begin, int end_)
        : g(g_), pixel(begin), end(end_), column(column0 + (int)threadIdx.x % CHUNKS_B * VALUES) {
#pragma unroll
        for (int j = 0; j < ROWS; j++) {
            const int row = row0 + (int)threadIdx.x % CHUNKS_A * VALUES + j, tap = row / g.s.c;
            c[j] = row % g.s.c;
            tap_y[j] = tap < g.s.r * g.s.s ? tap / g.s.s - g.s.pad : -(1 << 29); /* no such row: outside of all */
            tap_x[j] = tap % g.s.s - g.s.pad;
        }
    }
    __device__ __forceinline__ void fetch(uint4 *a, uint4 *b) {
#pragma unroll
        for (int i = 0; i < DEPTH / APART_A; i++) {
            const int line = (int)threadIdx.x / CHUNKS_A + i * APART_A, k = pixel + line;
            const int above = ckca__quotient(k, g.q), n = ckca__quotient(above, g.p);
            const int y = (above - n * g.s.p) * g.s.stride, x = (k - above * g.s.q) * g.s.stride;
            uint4 *to = a + ckca__spot<CHUNKS_A, WORDS>(line, (int)threadIdx.x % CHUNKS_A);
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                const int sy = y + tap_y[j], sx = x + tap_x[j];
                const int there = k < end && (unsigned)sy < (unsigned)g.s.h && (unsigned)sx < (unsigned)g.s.w;
                const ptrdiff_t at = (((ptrdiff_t)n * g.s.h + sy) * g.s.w + sx) * g.s.c + c[j];
                if (WHOLE)
                    ckca__copy_chunk(to, (const T *)g.a + at, there);
                else if (there)
                    ckca__fetch_one((T *)to + j, g.a, g.s.bf16_x, at);
                else
                    ckca__put((T *)to + j, 0);
            }
        }
#pragma unroll
        for (int i = 0; i < (DEPTH + APART_B - 1) / APART_B; i++) {
            const int line = (int)threadIdx.x / CHUNKS_B + i * APART_B, k = pixel + line;
            uint4 *to = b + ckca__spot<CHUNKS_B, WORDS>(line, (int)threadIdx.x % CHUNKS_B);
            const T *from = (const T *)g.b + (size_t)k * g.s.k + column;
            if (DEPTH < APART_B && line >= DEPTH) break;
            if constexpr (WHOLE) {
                ckca__copy_chunk(to, from, k < end && column < g.s.k);
            } else {
                for (int j = 0; j < VALUES; j++)
                    if (k < end && column + j < g.s.k)
                        ((T *)to)[j] = from[j];
                    else
                        ckca__put((T *)to + j, 0);
            }
        }
        pixel += DEPTH;
    }
};

/* Where a row's sums go: the output's pixel; in WEIGHT the row itself; -1: nowhere. */
template <int PASS>
__device__ __forceinline__ ptrdiff_t ckca__gemm_line(const ckca__gemm &g, const ckca__phase &py, const ckca__phase &px,
                                                     int row) {
    if (PASS == CKCA__ROLE_WEIGHT) return row < g.s.r * g.s.s * g.s.c ? row : -1;
    if (PASS == CKCA__FORWARD || g.s.stride == 1) /* row by row, as in memory */
        return row < g.s.n * (int)(g.p.by * g.q.by) ? row : -1;
    const ckca__output at(g, PASS, py, px, row);
    return at.n < g.s.n ? ((ptrdiff_t)at.n * g.s.h + py.at + at.y * py.spread) * g.s.w + px.at + at.x * px.spread : -1;
}

/* WIDTH finished sums of neighbouring columns on their way out. */
template <class T, int PASS, int WIDTH>
__device__ __forceinline__ void ckca__gemm_store(const ckca__gemm &g, ptrdiff_t line, int column, const float *sums) {
    const int columns = PASS == CKCA__DATA ? g.s.c : g.s.k;
    if (line < 0 || column >= columns) return;
    if constexpr (PASS == CKCA__ROLE_WEIGHT) { /* a split's own K x R S C, or all there is of dw */
        const size_t apart = (size_t)g.s.r * g.s.s * g.s.c;
        float *to = (float *)g.out + ((size_t)blockIdx.z * g.s.k + column) * apart + line;
#pragma unroll
        for (int j = 0; j < WIDTH; j++, to += apart)
            if (column + j < columns) *to = g.accumulate ? *to + sums[j] : sums[j];
    } else if (WIDTH > 1 && columns % WIDTH) { /* not aligned together */
#pragma unroll
        for (int j = 0; j < WIDTH; j++) ckca__gemm_store<T, PASS, 1>(g, line, column + j, sums + j);
    } else {
        const size_t at = (size_t)line * columns + column;
        ckca__lane<WIDTH> v, was;
#pragma unroll
        for (int j = 0; j < WIDTH; j++) v.v[j] = sums[j];
        if (PASS == CKCA__DATA ? g.accumulate : g.residual != NULL) {
            was = ckca__lane<WIDTH>((const T *)(PASS == CKCA__DATA ? g.out : g.residual) + at);
#pragma unroll
            for (int j = 0; j < WIDTH; j++) v.v[j] += was.v[j];
        }
        if (PASS == CKCA__FORWARD) {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                if (g.bias) v.v[j] += g.bias[column + j];
                if (g.relu && v.v[j] <= 0) v.v[j] = 0; /* NaN stays NaN */
            }
        }
        v.store((T *)g.out + at);
    }
}

template <int PRECISION, int PASS, int COLUMNS, int WHOLE>
__global__ void __launch_bounds__(CKCA__THREADS, 2) ckca__gemm_kernel(ckca__gemm g) {
    typedef typename ckca__factor<PRECISION>::type T;
    enum {
        VALUES = ckca__chunk<T>::VALUES,
        DEPTH = CKCA__SLAB_CHUNKS * VALUES, /* k in a slab */
        /* Tensor cores: 8 warps, each of TALL x WIDE tiles of 16 x 8 sums. */
        BESIDE = COLUMNS >= 32 ? 2 : 1,
        TALL = CKCA__ROWS / (8 / BESIDE) / 16,
        WIDE = COLUMNS / BESIDE / 8,
        /* FFMA: 16 x 16 threads, each of 8 x EACH sums. */
        EACH = COLUMNS / 16,
        SUMS = PRECISION == CKCA_PRECISION_FLOAT32 ? 8 * EACH : TALL * WIDE * 4,
        /* WEIGHT's slabs. */
        WORDS = sizeof(T) == 4,
        CHUNKS_A = CKCA__ROWS / VALUES,
        CHUNKS_B = COLUMNS / VALUES
    };
    __shared__ uint4 slab_a[CKCA__SLABS][CKCA__ROWS * CKCA__SLAB_CHUNKS],
        slab_b[CKCA__SLABS][COLUMNS * CKCA__SLAB_CHUNKS];
    const int row0 = (int)blockIdx.x / g.wide * CKCA__ROWS, column0 = (int)blockIdx.x % g.wide * COLUMNS;
    const int z = (int)blockIdx.z, lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int warp_row = warp / BESIDE * TALL * 16, warp_column = warp % BESIDE * WIDE * 8;
    const int my_row = (int)threadIdx.x / 16 * 8; /* FFMA; its columns: every 16th, or neighbours */
    const int my_column = (int)threadIdx.x % 16 * (PASS == CKCA__ROLE_WEIGHT ? EACH : 1);
    const int next_column = PASS == CKCA__ROLE_WEIGHT ? 1 : 16;
    const ckca__phase py =
        ckca__phase_of(PASS, z / g.s.stride, g.s.r, g.s.stride, g.s.pad, PASS == CKCA__DATA ? g.s.h : g.s.p);
    const ckca__phase px =
        ckca__phase_of(PASS, z % g.s.stride, g.s.s, g.s.stride, g.s.pad, PASS == CKCA__DATA ? g.s.w : g.s.q);
    const int pixels = g.s.n * g.s.p * g.s.q;
    const int begin = PASS == CKCA__ROLE_WEIGHT ? z * g.split : 0;
    const int end = PASS != CKCA__ROLE_WEIGHT       ? py.taps * px.taps * (PASS == CKCA__DATA ? g.s.k : g.s.c)
                    : pixels - begin < g.split ? pixels
                                               : begin + g.split;
    const int slabs = end > begin ? (end - begin + DEPTH - 1) / DEPTH : 0;
    float sums[SUMS];
    ckca__along<T, COLUMNS, WHOLE> along(g, PASS, py, px, row0, column0); /* one of these is used; */
    ckca__across<T, COLUMNS, WHOLE> across(g, row0, column0, begin, end); /* the compiler drops the other */
#define CKCA__FETCH(slab)                                                             \
    do {                                                                              \
        if constexpr (PASS == CKCA__ROLE_WEIGHT)                                           \
            across.fetch(slab_a[(slab) % CKCA__SLABS], slab_b[(slab) % CKCA__SLABS]); \
        else                                                                          \
            along.fetch(slab_a[(slab) % CKCA__SLABS], slab_b[(slab) % CKCA__SLABS]);  \
    } while (0)

#pragma unroll
    for (int i = 0; i < SUMS; i++) sums[i] = 0;
    for (int slab = 0; slab < CKCA__SLABS - 1; slab++) {
        if (slab < slabs) CKCA__FETCH(slab);
        ckca__copies_commit();
    }
    for (int slab = 0; slab < slabs; slab++) {
        const uint4 *a = slab_a[slab % CKCA__SLABS], *b = slab_b[slab % CKCA__SLABS];
        ckca__copies_wait<CKCA__SLABS - 2>();
        __syncthreads(); /* everybody's part of this slab is there; and the slab before has been used by all */
        if (slab + CKCA__SLABS - 1 < slabs) CKCA__FETCH(slab + CKCA__SLABS - 1);
        ckca__copies_commit();
        if constexpr (PRECISION != CKCA_PRECISION_FLOAT32) {
#pragma unroll(PASS == CKCA__ROLE_WEIGHT && WORDS ? 1 : 2)
            for (int step = 0; step < CKCA__SLAB_CHUNKS / 2; step++) { /* 32 bytes of k */
                unsigned x[TALL][4];
#pragma unroll
                for (int i = 0; i < TALL; i++) {
                    const int row = warp_row + i * 16;
                    if constexpr (PASS != CKCA__ROLE_WEIGHT)
                        ckca__load_matrices<0>(
                            x[i], a + ckca__spot<CKCA__SLAB_CHUNKS, 0>(row + lane % 16, step * 2 + lane / 16));
                    else if constexpr (!WORDS)
                        ckca__load_matrices<1>(x[i], a + ckca__spot<CHUNKS_A, 0>(step * 16 + lane / 16 * 8 + lane % 8,
                                                                                 row / VALUES + lane / 8 % 2));
                    else
                        for (int j = 0; j < 4; j++) {
                            const int at = row + lane / 4 + j % 2 * 8;
                            x[i][j] = ((const unsigned *)(a + ckca__spot<CHUNKS_A, 1>(step * 8 + j / 2 * 4 + lane % 4,
                                                                                      at / VALUES)))[at % VALUES];
                        }
#pragma unroll
                    for (int j = 0; j < 4 && PRECISION == CKCA_PRECISION_TF32; j++)
                        x[i][j] = ckca__to_tf32(__uint_as_float(x[i][j]));
                }
#pragma unroll
                for (int pair = 0; pair < WIDE / 2; pair++) { /* of tiles: b0 and b1 of one, then of its neighbour */
                    const int column = warp_column + pair * 16;
                    unsigned y[4];
                    if constexpr (PASS != CKCA__ROLE_WEIGHT)
                        ckca__load_matrices<0>(y, b + ckca__spot<CKCA__SLAB_CHUNKS, 0>(
                                                          column + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
                    else if constexpr (!WORDS)
                        ckca__load_matrices<1>(
                            y, b + ckca__spot<CHUNKS_B, 0>(step * 16 + lane % 16, column / VALUES + lane / 16));
                    else
                        for (int j = 0; j < 4; j++) {
                            const int at = column + lane / 4 + j / 2 * 8;
                            y[j] = ((const unsigned *)(b + ckca__spot<CHUNKS_B, 1>(step * 8 + j % 2 * 4 + lane % 4,
                                                                                   at / VALUES)))[at % VALUES];
                        }
#pragma unroll
                    for (int j = 0; j < 4 && PRECISION == CKCA_PRECISION_TF32; j++) y[j] = ckca__to_tf32(__uint_as_float(y[j]));
#pragma unroll
                    for (int i = 0; i < TALL; i++)
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            float *tile = sums + (i * WIDE + pair * 2 + j) * 4;
                            if constexpr (PRECISION == CKCA_PRECISION_TF32)
                                ckca__mma_tf32(tile, x[i], y + j * 2);
                            else
                                ckca__mma_bf16(tile, x[i], y + j * 2);
                        }
                }
            }
        } else if constexpr (PASS != CKCA__ROLE_WEIGHT) {
#pragma unroll 1
            for (int chunk = 0; chunk < CKCA__SLAB_CHUNKS; chunk++) {
                float y[4][EACH];
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    const ckca__lane<4> four(
                        (const float *)(b + ckca__spot<CKCA__SLAB_CHUNKS, 0>(my_column + j * 16, chunk)));
                    for (int e = 0; e < 4; e++) y[e][j] = four.v[e];
                }
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const ckca__lane<4> x((const float *)(a + ckca__spot<CKCA__SLAB_CHUNKS, 0>(my_row + i, chunk)));
                    for (int e = 0; e < 4; e++)
                        for (int j = 0; j < EACH; j++) sums[i * EACH + j] += x.v[e] * y[e][j];
                }
            }
        } else {
#pragma unroll 4
            for (int k = 0; k < DEPTH; k++) {
                const ckca__lane<4> upper((const float *)(a + ckca__spot<CHUNKS_A, 1>(k, my_row / 4)));
                const ckca__lane<4> lower((const float *)(a + ckca__spot<CHUNKS_A, 1>(k, my_row / 4 + 1)));
                float y[EACH];
                for (int j = 0; j < EACH; j++)
                    y[j] = ((const float *)(b + ckca__spot<CHUNKS_B, 1>(k, (my_column + j) / 4)))[(my_column + j) % 4];
                for (int i = 0; i < 8; i++)
                    for (int j = 0; j < EACH; j++)
                        sums[i * EACH + j] += (i < 4 ? upper.v[i % 4] : lower.v[i % 4]) * y[j];
            }
        }
    }
#undef CKCA__FETCH
    /* Loops over sums have to be unrolled: an index that is not known puts them into memory. */
    if constexpr (PRECISION == CKCA_PRECISION_FLOAT32) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const ptrdiff_t line = ckca__gemm_line<PASS>(g, py, px, row0 + my_row + i);
#pragma unroll
            for (int j = 0; j < EACH; j++)
                ckca__gemm_store<T, PASS, 1>(g, line, column0 + my_column + j * next_column, sums + i * EACH + j);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2 * TALL; i++) { /* a tile's upper rows, its lower ones */
            const ptrdiff_t line =
                ckca__gemm_line<PASS>(g, py, px, row0 + warp_row + i / 2 * 16 + lane / 4 + i % 2 * 8);
#pragma unroll
            for (int j = 0; j < WIDE; j++)
                ckca__gemm_store<T, PASS, 2>(g, line, column0 + warp_column + j * 8 + lane % 4 * 2,
                                             sums + (i / 2 * WIDE + j) * 4 + i % 2 * 2);
        }
    }
}

/* dw += the splits' sums. A block's threads are so many slices of the splits (a power of two) times neighbouring
   values; each adds every slices-th split, and then one thread the slices, in an order that depends on the sizes
   alone. */
__global__ void __launch_bounds__(CKCA__THREADS)
    ckca__add_splits(size_t count, int splits, int slices, const float *parts, float *dw) {
    __shared__ float sums[CKCA__THREADS];
    const int wide = CKCA__THREADS / slices, me = (int)threadIdx.x, slice = me / wide;
    for (size_t first = blockIdx.x * (size_t)wide; first < count; first += gridDim.x * (size_t)wide) {
        const size_t i = first + me % wide;
        float sum = 0;
#pragma unroll 8
        for (int j = slice; j < splits; j += slices)
            if (i < count) sum += parts[j * count + i];
        __syncthreads(); /* whoever still reads the last round's */
        sums[me] = sum;
        __syncthreads();
        if (slice || i >= count) continue;
        for (int j = 1; j < slices; j++) sum += sums[j * wide + me];
        dw[i] += sum;
    }
}

/* Weights as passes read them: rounded to BF16; turned from k x taps x c to c x taps x k. Of many convolutions at once:
   a block takes 32 x 32 of a tap. */
enum { CKCA__TILE = 32, CKCA__ARRANGED = 32 };
typedef struct ckca__arrange {
    int count, tiles;
    struct {
        const float *w;
        void *cast, *turned; /* or NULL */
        int bf16, k, taps, c;
        int first; /* tile */
    } of[CKCA__ARRANGED];
} ckca__arrange;

__global__ void __launch_bounds__(CKCA__THREADS) ckca__arrange_kernel(ckca__arrange a) {
    __shared__ float tile[CKCA__TILE][CKCA__TILE + 1];
    const int x = (int)threadIdx.x % CKCA__TILE, y = (int)threadIdx.x / CKCA__TILE;
    int i = 0;
    while (i + 1 < a.count && a.of[i + 1].first <= (int)blockIdx.x) i++;
    const auto &o = a.of[i];
    const int wide = (o.c + CKCA__TILE - 1) / CKCA__TILE, at = (int)blockIdx.x - o.first;
    const int c0 = at % wide * CKCA__TILE, tap = at / wide % o.taps, k0 = at / wide / o.taps * CKCA__TILE;
    for (int j = y; j < CKCA__TILE; j += CKCA__THREADS / CKCA__TILE)
        if (k0 + j < o.k && c0 + x < o.c) {
            const size_t from = ((size_t)(k0 + j) * o.taps + tap) * o.c + c0 + x;
            tile[j][x] = o.w[from];
            if (o.cast) ckca__put((ckca__bf16 *)o.cast + from, tile[j][x]);
        }
    if (!o.turned) return;
    __syncthreads();
    for (int j = y; j < CKCA__TILE; j += CKCA__THREADS / CKCA__TILE)
        if (c0 + j < o.c && k0 + x < o.k) {
            const size_t to = ((size_t)(c0 + j) * o.taps + tap) * o.k + k0 + x;
            if (o.bf16)
                ckca__put((ckca__bf16 *)o.turned + to, tile[x][j]);
            else
                ((float *)o.turned)[to] = tile[x][j];
        }
}

/* ------------------------------------------------------------------------------------------------------------------
   CHANNELS: sums over all pixels of a tensor, channel by channel

   Rows (pixels) are cut into at most 256 parts. A block takes one part of up to 32 chunks of neighbouring channels: its
   threads walk rows, several at a time, and then add up in order. A warp per channel adds the parts.
   ------------------------------------------------------------------------------------------------------------------ */

enum { CKCA__PARTS = 256 };

/* How many parts rows are cut into, and how many rows there are in each but the last. Never fewer for more rows. */
static int ckca__parts(size_t rows) { return rows / 64 + 1 < CKCA__PARTS ? (int)(rows / 64 + 1) : CKCA__PARTS; }
static size_t ckca__part_rows(size_t rows) { return (rows + ckca__parts(rows) - 1) / ckca__parts(rows); }

/* Threads along channels: a power of two, so that few channels leave no thread idle. */
static int ckca__lanes(int chunks) {
    int lanes = 1;
    while (lanes < 32 && lanes < chunks) lanes *= 2;
    return lanes;
}

typedef struct ckca__moments {
    size_t rows, per; /* in all, in a part */
    int c, lanes;
    const void *x, *y, *dy;                     /* see below; values of the kernel's type */
    const float *mean, *gamma, *beta, *inv_std; /* KIND 2; the last three with a ReLU but no y: it is told from x */
    float *part;                                /* parts x KIND x c */
} ckca__moments;

/* What a ReLU's gradient asks: y > 0, as ckca__batchnorm_apply made y from x when there was no residual. */
__device__ __forceinline__ int ckca__gate(float x, float mean, float scale, float beta) {
    return (x - mean) * scale + beta > 0;
}

/* Per part, KIND 3: a shift (its first row), the sums of d and of d^2 with d = x - shift, so that a mean far from 0
   costs no digits. KIND 2: the sums of g and of g (x - mean), g being dy where y > 0. KIND 1: the sum of dy. */
template <class T, int KIND, int WIDTH>
__global__ void __launch_bounds__(CKCA__THREADS) ckca__channel_sums(ckca__moments m) {
    __shared__ __align__(16) float first[CKCA__THREADS * WIDTH], second[CKCA__THREADS * WIDTH];
    __shared__ float some[2][CKCA__THREADS];
    const int at_once = CKCA__THREADS / m.lanes, wide = m.lanes * WIDTH, me = (int)threadIdx.x;
    const int c0 = (int)blockIdx.x * wide, c = c0 + me % m.lanes * WIDTH;
    const size_t begin = blockIdx.y * m.per, end = m.rows - begin < m.per ? m.rows : begin + m.per;
    const int there = c < m.c && begin < m.rows;
    ckca__lane<WIDTH> shift, scale, beta, a, b;
    for (int j = 0; j < WIDTH; j++) shift.v[j] = scale.v[j] = a.v[j] = b.v[j] = 0, beta.v[j] = 1; /* the gate is open */
    if (there && KIND == 3) shift = ckca__lane<WIDTH>((const T *)m.x + begin * m.c + c);
    if (there && KIND == 2) shift = ckca__lane<WIDTH>(m.mean + c);
    if (there && KIND == 2 && m.beta)
        for (int j = 0; j < WIDTH; j++) scale.v[j] = m.gamma[c + j] * m.inv_std[c + j], beta.v[j] = m.beta[c + j];
#pragma unroll(KIND == 2 ? 2 : 4)
    for (size_t row = there ? begin + me / m.lanes : end; row < end; row += at_once) {
        const size_t i = row * m.c + c;
        ckca__lane<WIDTH> x, y, g;
        if (KIND > 1) x = ckca__lane<WIDTH>((const T *)m.x + i);
        if (KIND < 3) g = ckca__lane<WIDTH>((const T *)m.dy + i);
        if (KIND == 2 && m.y) y = ckca__lane<WIDTH>((const T *)m.y + i);
        for (int j = 0; j < WIDTH; j++) {
            if (KIND == 3) {
                const float d = x.v[j] - shift.v[j];
                a.v[j] += d;
                b.v[j] += d * d;
            } else {
                if (KIND == 2 && !(m.y ? y.v[j] > 0 : ckca__gate(x.v[j], shift.v[j], scale.v[j], beta.v[j])))
                    g.v[j] = 0;
                a.v[j] += g.v[j];
                if (KIND == 2) b.v[j] += g.v[j] * (x.v[j] - shift.v[j]);
            }
        }
    }
    /* Each thread adds WIDTH rows of a channel, then one thread the sums of these. */
    a.store(first + me * WIDTH);
    b.store(second + me * WIDTH);
    __syncthreads();
    float sum = 0, square = 0;
    for (int i = 0; i < WIDTH; i++) {
        const int from = (me / wide * WIDTH + i) * wide + me % wide;
        sum += first[from];
        square += second[from];
    }
    some[0][me] = sum;
    some[1][me] = square;
    __syncthreads();
    if (me >= wide || c0 + me >= m.c) return;
    for (int i = me + wide; i < CKCA__THREADS; i += wide) {
        sum += some[0][i];
        square += some[1][i];
    }
    float *to = m.part + (size_t)blockIdx.y * KIND * m.c + c0 + me;
    if (KIND == 3) {
        *to = begin < m.rows ? ckca__to_float(((const T *)m.x)[begin * m.c + c0 + me]) : 0;
        to += m.c;
    }
    to[0] = sum;
    if (KIND > 1) to[m.c] = square;
}

/* The sum of v over a warp, in a fixed order, in every lane. */
template <class T> __device__ __forceinline__ T ckca__warp_sum(T v) {
    for (int step = 16; step; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
}

/* The sum of v over the block, in a fixed order, in every thread. */
__device__ double ckca__block_sum(double v) {
    __shared__ double sums[CKCA__THREADS / 32];
    v = ckca__warp_sum(v);
    __syncthreads(); /* whoever still reads the last call's sums */
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    for (int i = 0; i < CKCA__THREADS / 32; i++) v += sums[i];
    return v;
}

/* Joins the parts of KIND 3 (Chan, Golub, LeVeque 1979) to mean and inv_std, and moves the running statistics. */
__global__ void ckca__batchnorm_finish(ckca__moments m, int parts, float *running_mean, float *running_var, float *mean,
                                       float *inv_std) {
    const int c = (int)(blockIdx.x * (CKCA__THREADS / 32) + threadIdx.x / 32), lane = (int)threadIdx.x % 32;
    double total = 0, square = 0;
    if (c >= m.c) return; /* a whole warp */
    for (int i = lane; i < parts; i += 32) {
        const float *p = m.part + (size_t)i * 3 * m.c + c;
        const size_t begin = (size_t)i * m.per;
        if (begin < m.rows) total += (double)(m.rows - begin < m.per ? m.rows - begin : m.per) * p[0] + p[m.c];
    }
    total = ckca__warp_sum(total) / (double)m.rows;
    for (int i = lane; i < parts; i += 32) {
        const float *p = m.part + (size_t)i * 3 * m.c + c;
        const size_t begin = (size_t)i * m.per;
        if (begin >= m.rows) continue;
        const double n = (double)(m.rows - begin < m.per ? m.rows - begin : m.per), d = p[m.c] / n,
                     e = p[0] + d - total;
        square += p[2 * m.c] - n * d * d + n * e * e;
    }
    square = ckca__warp_sum(square);
    if (lane) return;
    const double var = square < 0 ? 0 : square / (double)m.rows;
    const double unbiased = m.rows > 1 ? var * (double)m.rows / (double)(m.rows - 1) : var;
    mean[c] = (float)total;
    inv_std[c] = (float)(1 / sqrt(var + 1e-5));
    running_mean[c] += (float)(0.1 * (total - running_mean[c]));
    running_var[c] += (float)(0.1 * (unbiased - running_var[c]));
}

/* Adds the parts of KIND 2 to dbeta and dgamma, and leaves in table (2 x c) what the last pass needs of them; or those
   of KIND 1 to dbeta alone (dgamma NULL). */
__global__ void ckca__channel_gradients(ckca__moments m, int parts, const float *inv_std, float *dgamma, float *dbeta,
                                        float *table) {
    const int c = (int)(blockIdx.x * (CKCA__THREADS / 32) + threadIdx.x / 32), lane = (int)threadIdx.x % 32;
    const int kind = dgamma ? 2 : 1;
    double sum = 0, product = 0;
    if (c >= m.c) return;
    for (int i = lane; i < parts; i += 32) {
        if (i * m.per >= m.rows) continue;
        sum += m.part[(size_t)i * kind * m.c + c];
        if (dgamma) product += m.part[((size_t)i * 2 + 1) * m.c + c];
    }
    sum = ckca__warp_sum(sum);
    product = ckca__warp_sum(product);
    if (lane) return;
    dbeta[c] += (float)sum;
    if (!dgamma) return;
    product *= inv_std[c];
    dgamma[c] += (float)product;
    table[c] = (float)(sum / (double)m.rows);
    table[m.c + c] = (float)(product / (double)m.rows);
}

typedef struct ckca__normed {
    size_t count; /* values */
    int c;
    ckca__norm norm, residual_norm; /* norm.inv_std NULL: from var */
    const float *var, *table;
    const void *x, *y, *dy, *residual; /* values of the kernel's type; so are the next two */
    void *out, *dresidual;
    int accumulate;
} ckca__normed;

/* WIDTH channels of a norm from at on. */
template <int WIDTH> struct ckca__affine {
    ckca__lane<WIDTH> mean, scale, beta;
    __device__ ckca__affine(const ckca__norm &norm, const float *var, size_t at)
        : mean(norm.mean + at), scale(norm.gamma + at), beta(norm.beta + at) {
        for (int j = 0; j < WIDTH; j++)
            scale.v[j] *= norm.inv_std ? norm.inv_std[at + j] : (float)(1 / sqrt(var[at + j] + 1e-5));
    }
    __device__ float operator()(int j, float x, int relu) const {
        const float v = (x - mean.v[j]) * scale.v[j] + beta.v[j];
        return relu && v <= 0 ? 0 : v; /* NaN stays NaN */
    }
};

/* out = relu?(norm(x) + residual), the residual through a norm of its own where NORMED. */
template <class T, int WIDTH, int NORMED> __global__ void ckca__batchnorm_apply(ckca__normed n) {
    const size_t c = (size_t)n.c / WIDTH, threads = (size_t)gridDim.x * blockDim.x, stride = threads / c * c;
    const size_t id = (size_t)blockIdx.x * blockDim.x + threadIdx.x, at = id % c * WIDTH;
    if (id >= stride) return;
    const ckca__affine<WIDTH> norm(n.norm, n.var, at), residual_norm(NORMED ? n.residual_norm : n.norm, n.var, at);
    for (size_t i = id * WIDTH; i < n.count; i += stride * WIDTH) {
        ckca__lane<WIDTH> x((const T *)n.x + i), add;
        if (n.residual) add = ckca__lane<WIDTH>((const T *)n.residual + i);
        for (int j = 0; j < WIDTH; j++) {
            float v = norm(j, x.v[j], 0);
            if (n.residual) v += NORMED ? residual_norm(j, add.v[j], n.residual_norm.relu) : add.v[j];
            x.v[j] = n.norm.relu && v <= 0 ? 0 : v;
        }
        x.store((T *)n.out + i);
    }
}

/* With g = dy where y > 0 and xhat = (x - mean) inv_std: out = gamma inv_std (g - mean of g - xhat mean of g xhat). */
template <class T, int WIDTH> __global__ void ckca__batchnorm_backward(ckca__normed n) {
    const size_t c = (size_t)n.c / WIDTH, threads = (size_t)gridDim.x * blockDim.x, stride = threads / c * c;
    const size_t id = (size_t)blockIdx.x * blockDim.x + threadIdx.x, at = id % c * WIDTH;
    if (id >= stride) return;
    const ckca__lane<WIDTH> mean(n.norm.mean + at), beta(n.norm.beta + at), mean_g(n.table + at);
    ckca__lane<WIDTH> scale(n.norm.gamma + at), slope(n.table + n.c + at); /* gamma inv_std; inv_std mean of g xhat */
    for (int j = 0; j < WIDTH; j++) {
        const float inv_std = n.norm.inv_std[at + j];
        scale.v[j] *= inv_std;
        slope.v[j] *= inv_std;
    }
    for (size_t i = id * WIDTH; i < n.count; i += stride * WIDTH) {
        const ckca__lane<WIDTH> x((const T *)n.x + i);
        ckca__lane<WIDTH> g((const T *)n.dy + i), to;
        if (n.y) {
            const ckca__lane<WIDTH> y((const T *)n.y + i);
            for (int j = 0; j < WIDTH; j++) g.v[j] = y.v[j] > 0 ? g.v[j] : 0;
        } else if (n.norm.relu)
            for (int j = 0; j < WIDTH; j++) g.v[j] = ckca__gate(x.v[j], mean.v[j], scale.v[j], beta.v[j]) ? g.v[j] : 0;
        if (n.dresidual) {
            to = g;
            if (n.accumulate) {
                const ckca__lane<WIDTH> was((const T *)n.dresidual + i);
                for (int j = 0; j < WIDTH; j++) to.v[j] += was.v[j];
            }
            to.store((T *)n.dresidual + i);
        }
        for (int j = 0; j < WIDTH; j++)
            to.v[j] = scale.v[j] * (g.v[j] - mean_g.v[j] - (x.v[j] - mean.v[j]) * slope.v[j]);
        to.store((T *)n.out + i);
    }
}

/* Blocks for an element-wise kernel over count items, each of at least so many threads altogether. */
static unsigned ckca__grid(const ckca_context *ctx, size_t count, size_t least) {
    size_t blocks = (count + CKCA__THREADS - 1) / CKCA__THREADS, most = (size_t)ckca__cuda_of(ctx)->blocks;
    least = (least + CKCA__THREADS - 1) / CKCA__THREADS;
    if (blocks > most) blocks = most;
    return (unsigned)(blocks < least ? least : blocks ? blocks : 1);
}

/* Runs f with a value of the maps' type and (as a constant) how many values of channels are taken at once. */
template <int N> struct ckca__constant {
    enum { VALUE = N };
};
template <class F> static void ckca__typed_wide(int bf16, int c, F f) {
    if (bf16 && c % 8 == 0)
        f(ckca__bf16(), ckca__constant<8>());
    else if (bf16)
        f(ckca__bf16(), ckca__constant<1>());
    else if (c % 4 == 0)
        f(float(), ckca__constant<4>());
    else
        f(float(), ckca__constant<1>());
}

static void ckca__run_channel_sums(ckca_context *ctx, int bf16, int kind, ckca__moments *m) {
    const int parts = ckca__parts(m->rows);
    m->per = ckca__part_rows(m->rows);
    ckca__typed_wide(bf16, m->c, [&](auto type, auto wide) {
        typedef decltype(type) T;
        enum { WIDTH = decltype(wide)::VALUE };
        m->lanes = ckca__lanes(m->c / WIDTH);
        const dim3 grid((m->c + m->lanes * WIDTH - 1) / (m->lanes * WIDTH), parts);
        if (kind == 3)
            CKCA__LAUNCH(ctx, (ckca__channel_sums<T, 3, WIDTH>), grid, *m);
        else if (kind == 2)
            CKCA__LAUNCH(ctx, (ckca__channel_sums<T, 2, WIDTH>), grid, *m);
        else
            CKCA__LAUNCH(ctx, (ckca__channel_sums<T, 1, WIDTH>), grid, *m);
    });
}

static unsigned ckca__warps(int c) { return (unsigned)((c + CKCA__THREADS / 32 - 1) / (CKCA__THREADS / 32)); }

CKCA__OP size_t ckca__op_workspace(const ckca_context *ctx, size_t rows, int c) {
    (void)ctx; /* batch norm's parts and table; clipping's sums; RELATION asks for channels enough for its norms */
    return ckca__sum(CKCA__PARTS * sizeof(double),
                     ckca__mul((size_t)c, (3 * (size_t)ckca__parts(rows) + 4) * sizeof(float)));
}

static void ckca__run_apply(ckca_context *ctx, int bf16, size_t rows, int c, const float *x, const ckca__norm &norm,
                            const float *var, const float *residual, const ckca__norm *residual_norm, float *y) {
    ckca__normed n = {};
    n.count = rows * (size_t)c;
    n.c = c;
    n.norm = norm;
    if (residual_norm) n.residual_norm = *residual_norm;
    n.x = x;
    n.var = var;
    n.residual = residual;
    n.out = y;
    ckca__typed_wide(bf16, c, [&](auto type, auto wide) {
        enum { WIDTH = decltype(wide)::VALUE };
        typedef decltype(type) T;
        const unsigned grid = ckca__grid(ctx, n.count / WIDTH, (size_t)c / WIDTH);
        if (residual_norm)
            CKCA__LAUNCH(ctx, (ckca__batchnorm_apply<T, WIDTH, 1>), grid, n);
        else
            CKCA__LAUNCH(ctx, (ckca__batchnorm_apply<T, WIDTH, 0>), grid, n);
    });
}

CKCA__OP void ckca__op_batchnorm_forward(ckca_context *ctx, int bf16, size_t rows, int c, const float *x,
                                         const float *gamma, const float *beta, float *running_mean, float *running_var,
                                         const float *residual, const ckca__norm *residual_norm, int relu, float *y,
                                         float *mean, float *inv_std, void *ws) {
    const ckca__norm norm = {mean, inv_std, gamma, beta, relu};
    ckca__moments m = {};
    m.rows = rows;
    m.c = c;
    m.x = x;
    m.part = (float *)ws;
    ckca__run_channel_sums(ctx, bf16, 3, &m);
    CKCA__LAUNCH(ctx, ckca__batchnorm_finish, ckca__warps(c), m, ckca__parts(rows), running_mean, running_var, mean,
                 inv_std);
    if (y) ckca__run_apply(ctx, bf16, rows, c, x, norm, NULL, residual, residual_norm, y);
}

CKCA__OP void ckca__op_batchnorm_eval(ckca_context *ctx, int bf16, size_t rows, int c, const float *x,
                                      const float *gamma, const float *beta, const float *running_mean,
                                      const float *running_var, const float *residual, int relu, float *y) {
    const ckca__norm norm = {running_mean, NULL, gamma, beta, relu};
    ckca__run_apply(ctx, bf16, rows, c, x, norm, running_var, residual, NULL, y);
}

CKCA__OP void ckca__op_batchnorm_recompute(ckca_context *ctx, int bf16, size_t rows, int c, const float *x,
                                       const ckca__norm *norm, const float *residual, const ckca__norm *residual_norm,
                                       float *y) {
    ckca__run_apply(ctx, bf16, rows, c, x, *norm, NULL, residual, residual_norm, y);
}

CKCA__OP void ckca__op_batchnorm_backward(ckca_context *ctx, int bf16, size_t rows, int c, const float *x,
                                          const float *y, const float *dy, const ckca__norm *norm, float *dx,
                                          float *dresidual, int accumulate_residual, float *dgamma, float *dbeta,
                                          void *ws) {
    ckca__moments m = {};
    ckca__normed n = {};
    float *table = (float *)ws + (size_t)ckca__parts(rows) * 2 * c;
    m.rows = rows;
    m.c = c;
    m.x = x;
    m.y = norm->relu ? y : NULL;
    m.dy = dy;
    m.mean = norm->mean;
    if (norm->relu && !y) m.gamma = norm->gamma, m.beta = norm->beta, m.inv_std = norm->inv_std;
    m.part = (float *)ws;
    ckca__run_channel_sums(ctx, bf16, 2, &m);
    CKCA__LAUNCH(ctx, ckca__channel_gradients, ckca__warps(c), m, ckca__parts(rows), norm->inv_std, dgamma, dbeta,
                 table);
    n.count = rows * (size_t)c;
    n.c = c;
    n.x = x;
    n.y = m.y;
    n.dy = dy;
    n.norm = *norm;
    n.table = table;
    n.out = dx;
    n.dresidual = dresidual;
    n.accumulate = accumulate_residual;
    ckca__typed_wide(bf16, c, [&](auto type, auto wide) {
        enum { WIDTH = decltype(wide)::VALUE };
        CKCA__LAUNCH(ctx, (ckca__batchnorm_backward<decltype(type), WIDTH>),
                     ckca__grid(ctx, n.count / WIDTH, (size_t)c / WIDTH), n);
    });
}

__global__ void ckca__fold_kernel(int k, size_t per, const float *w, const float *bias, const float *gamma,
                                  const float *beta, const float *mean, const float *var, float *w_out,
                                  float *bias_out) {
    const size_t stride = (size_t)gridDim.x * blockDim.x, id = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (size_t i = id; i < (size_t)k * per; i += stride) {
        const size_t c = i / per;
        w_out[i] = (float)(w[i] * (gamma[c] / sqrt(var[c] + 1e-5)));
    }
    for (size_t c = id; c < (size_t)k; c += stride)
        bias_out[c] = (float)(beta[c] + ((bias ? bias[c] : 0) - mean[c]) * (gamma[c] / sqrt(var[c] + 1e-5)));
}

CKCA__OP void ckca__op_fold(ckca_context *ctx, int k, size_t per, const float *w, const float *bias, const float *gamma,
                            const float *beta, const float *running_mean, const float *running_var, float *w_out,
                            float *bias_out) {
    CKCA__LAUNCH(ctx, ckca__fold_kernel, ckca__grid(ctx, (size_t)k * per, 1), k, per, w, bias, gamma, beta,
                 running_mean, running_var, w_out, bias_out);
}

/* ------------------------------------------------------------------------------------------------------------------
   CONVOLUTION
   ------------------------------------------------------------------------------------------------------------------ */

/* Blocks that WEIGHT is cut into, if possible: two for each multiprocessor of a large GPU. Not the one at hand's: with
   it the order of sums, and so the bits, would change. */
enum { CKCA__WEIGHT_BLOCKS = 264, CKCA__LEAST_SPLIT = 512 };

/* What a convolution or linear layer multiplies in: BF16 only where its output is stored so. */
static ckca_precision ckca__math(const ckca_context *ctx, const ckca__conv *s) {
    return ctx->precision == CKCA_PRECISION_BF16 && !s->bf16 ? CKCA_PRECISION_TF32 : ctx->precision;
}

/* 1: a pass fetches whole chunks: all channels that lie along them fill them, and nothing has to be converted. */
static int ckca__is_whole(const ckca_context *ctx, int pass, const ckca__conv *s) {
    const int values = ckca__math(ctx, s) == CKCA_PRECISION_BF16 ? 8 : 4;
    return (pass == CKCA__DATA || (s->c % values == 0 && s->bf16_x == s->bf16)) &&
           (pass == CKCA__FORWARD || s->k % values == 0);
}

/* Columns of a block: no more than there are; 128 only on tensor cores, which are so fast that every fetch should serve
   as many sums as registers hold, and where fetching is simple enough to leave them to the sums. */
static int ckca__columns(const ckca_context *ctx, int pass, const ckca__conv *s) {
    const int columns = pass == CKCA__DATA ? s->c : s->k;
    if (columns > 64 && ctx->precision != CKCA_PRECISION_FLOAT32 && ckca__is_whole(ctx, pass, s)) return 128;
    return columns <= 16 ? 16 : columns <= 32 ? 32 : 64;
}
static int ckca__ceil(int a, int b) { return (a + b - 1) / b; }

/* A 1 x 1 convolution is a plain matrix product, which cuBLAS knows best (while nothing is done to the sums). */
static int ckca__is_product(const ckca__conv *s) {
    return s->r == 1 && s->s == 1 && s->stride == 1 && !s->pad && s->bf16_x == s->bf16;
}

static int ckca__weight_splits(const ckca_context *ctx, const ckca__conv *s) {
    const int blocks =
        ckca__ceil(s->r * s->s * s->c, CKCA__ROWS) * ckca__ceil(s->k, ckca__columns(ctx, CKCA__ROLE_WEIGHT, s));
    const int most = s->n * s->p * s->q / CKCA__LEAST_SPLIT, wanted = CKCA__WEIGHT_BLOCKS / blocks;
    const int splits = most < wanted ? most : wanted;
    return splits > 1 ? splits : 1;
}

/* Of weights rounded or turned, of splits, or of parts of the bias's gradient: never two at a time. (Rounding up to
   CKCA__ALIGN aside, the first are no larger than the weights.) */
CKCA__OP size_t ckca__conv_workspace(const ckca_context *ctx, const ckca__conv *s) {
    const double pixels = (double)s->n * s->p * s->q;
    const size_t weights = ckca__mul(ckca__mul((size_t)s->r * s->s, (size_t)s->c), (size_t)s->k);
    const size_t bias = (size_t)ckca__parts(pixels < 1e9 ? (size_t)pixels : 1000000000) * s->k;
    size_t floats = weights;
    if (!ckca__is_product(s) && pixels <= INT_MAX) floats = ckca__mul(weights, (size_t)ckca__weight_splits(ctx, s));
    if (floats < bias) floats = bias;
    return ckca__mul(floats, sizeof(float));
}

/* Pixels and taps are counted in ints, and so is what lies between a window's first value and its last. */
static int ckca__conv_fits(ckca_context *ctx, const ckca__conv *s) {
    const double most = INT_MAX - 4096, lines = s->r + 1.0;
    if ((double)s->n * s->h * s->w < most && (double)s->n * s->p * s->q < most && lines * (s->s + 1.0) * s->c < most &&
        lines * (s->s + 1.0) * s->k < most && lines * s->w * s->c < most && lines * s->q * s->k < most)
        return 1;
    char what[200];
    snprintf(what, sizeof what, "%d x %d x %d x %d by %d x %d x %d: 2^31 pixels, or values in a window's reach", s->n,
             s->h, s->w, s->c, s->k, s->r, s->s);
    return ckca__cuda_note(ckca__cuda_of(ctx), "convolution", what);
}

template <int PRECISION, int PASS, int WHOLE>
static void ckca__launch_gemm(ckca_context *ctx, dim3 grid, int columns, const ckca__gemm *g) {
    if (columns == 16)
        CKCA__LAUNCH(ctx, (ckca__gemm_kernel<PRECISION, PASS, 16, WHOLE>), grid, *g);
    else if (columns == 32)
        CKCA__LAUNCH(ctx, (ckca__gemm_kernel<PRECISION, PASS, 32, WHOLE>), grid, *g);
    else if (columns == 64)
        CKCA__LAUNCH(ctx, (ckca__gemm_kernel<PRECISION, PASS, 64, WHOLE>), grid, *g);
    else if constexpr (PRECISION != CKCA_PRECISION_FLOAT32 && WHOLE)
        CKCA__LAUNCH(ctx, (ckca__gemm_kernel<PRECISION, PASS, 128, WHOLE>), grid, *g);
}

template <int PRECISION, int PASS>
static void ckca__launch_gemm(ckca_context *ctx, dim3 grid, int columns, const ckca__gemm *g) {
    if (ckca__is_whole(ctx, PASS, &g->s))
        ckca__launch_gemm<PRECISION, PASS, 1>(ctx, grid, columns, g);
    else
        ckca__launch_gemm<PRECISION, PASS, 0>(ctx, grid, columns, g);
}

template <int PASS> static void ckca__run_gemm(ckca_context *ctx, ckca__gemm *g) {
    const ckca__conv *s = &g->s;
    const int columns = PASS == CKCA__DATA ? s->c : s->k, width = ckca__columns(ctx, PASS, s);
    int rows = s->n * s->p * s->q, layers = 1;
    if (PASS == CKCA__DATA) { /* phase 0 has the most pixels */
        rows = s->n * ckca__ceil(s->h, s->stride) * ckca__ceil(s->w, s->stride);
        layers = s->stride * s->stride;
    }
    if (PASS == CKCA__ROLE_WEIGHT) {
        rows = s->r * s->s * s->c;
        layers = ckca__weight_splits(ctx, s);
        g->split = ckca__ceil(s->n * s->p * s->q, layers);
    }
    g->p = ckca__divide_by(PASS == CKCA__DATA ? s->h : s->p);
    g->q = ckca__divide_by(PASS == CKCA__DATA ? s->w : s->q);
    g->wide = ckca__ceil(columns, width);
    const dim3 grid((unsigned)ckca__ceil(rows, CKCA__ROWS) * g->wide, 1, layers);
    switch (ckca__math(ctx, s)) {
    case CKCA_PRECISION_FLOAT32:
        ckca__launch_gemm<CKCA_PRECISION_FLOAT32, PASS>(ctx, grid, width, g);
        break;
    case CKCA_PRECISION_TF32:
        ckca__launch_gemm<CKCA_PRECISION_TF32, PASS>(ctx, grid, width, g);
        break;
    case CKCA_PRECISION_BF16:
        ckca__launch_gemm<CKCA_PRECISION_BF16, PASS>(ctx, grid, width, g);
        break;
    case CKCA_PRECISION_COUNT: /* not a value */
        break;
    }
}

/* Bytes of a convolution's weights rounded, and turned, as far as anybody reads them so. */
static size_t ckca__cast_bytes(const ckca_context *ctx, const ckca__conv *s) {
    const size_t count = ckca__mul(ckca__mul((size_t)s->r * s->s, (size_t)s->c), (size_t)s->k);
    return ckca__math(ctx, s) == CKCA_PRECISION_BF16 ? ckca__round_up(ckca__mul(count, sizeof(ckca__bf16)), CKCA__ALIGN) : 0;
}
static size_t ckca__turned_bytes(const ckca_context *ctx, const ckca__conv *s) {
    const size_t count = ckca__mul(ckca__mul((size_t)s->r * s->s, (size_t)s->c), (size_t)s->k);
    if (ckca__is_product(s)) return 0;
    return ckca__math(ctx, s) == CKCA_PRECISION_BF16 ? ckca__cast_bytes(ctx, s)
                                           : ckca__round_up(ckca__mul(count, sizeof(float)), CKCA__ALIGN);
}
CKCA__OP size_t ckca__packed_bytes(const ckca_context *ctx, const ckca__conv *s, int backward) {
    return ckca__sum(ckca__cast_bytes(ctx, s), backward ? ckca__turned_bytes(ctx, s) : 0);
}

/* One convolution more to arrange: cast and turned as in ckca__arrange. */
static void ckca__arrange_add(const ckca_context *ctx, ckca__arrange *a, const ckca__conv *s, const float *w,
                              void *cast, void *turned) {
    auto &o = a->of[a->count++];
    o.w = w;
    o.cast = cast;
    o.turned = turned;
    o.bf16 = ckca__math(ctx, s) == CKCA_PRECISION_BF16;
    o.k = s->k;
    o.taps = s->r * s->s;
    o.c = s->c;
    o.first = a->tiles;
    a->tiles += ckca__ceil(s->k, CKCA__TILE) * ckca__ceil(s->c, CKCA__TILE) * o.taps;
}
static void ckca__arrange_run(ckca_context *ctx, ckca__arrange *a) {
    if (a->tiles) CKCA__LAUNCH(ctx, ckca__arrange_kernel, (unsigned)a->tiles, *a);
    a->count = a->tiles = 0;
}

CKCA__OP void ckca__op_pack_weights(ckca_context *ctx, int count, const ckca__conv *s, const float *const *w, int backward) {
    ckca__arrange a = {};
    for (int i = 0; i < count; i++) {
        const size_t cast = ckca__cast_bytes(ctx, &s[i]), turned = backward ? ckca__turned_bytes(ctx, &s[i]) : 0;
        char *to = (char *)s[i].packed_weights;
        if (cast || turned) ckca__arrange_add(ctx, &a, &s[i], w[i], cast ? to : NULL, turned ? to + cast : NULL);
        if (a.count == CKCA__ARRANGED) ckca__arrange_run(ctx, &a);
    }
    ckca__arrange_run(ctx, &a);
}

/* The weights as a pass reads them: as they are, ready, or made so in ws. */
static const void *ckca__weights(ckca_context *ctx, const ckca__conv *s, int turned, const float *w, void *ws) {
    const size_t cast = ckca__cast_bytes(ctx, s);
    ckca__arrange a = {};
    if (!turned && !cast) return w;
    if (s->packed_weights) return (char *)s->packed_weights + (turned ? cast : 0);
    ckca__arrange_add(ctx, &a, s, w, turned ? NULL : ws, turned ? ws : NULL);
    ckca__arrange_run(ctx, &a);
    return ws;
}

/* c (rows x columns) = (or +=) a b, all row-major; a is stored transposed (summed x rows) where turn_a, b (columns x
   summed) where turn_b. half: a and b are BF16; half_c: c is. cuBLAS counts columns first, so it is asked for c^T = b^T
   a^T. */
static void ckca__product(ckca_context *ctx, int rows, int columns, int summed, int bf16, const void *a, int turn_a,
                          const void *b, int turn_b, int half_c, void *c, int accumulate) {
    const float one = 1, beta = accumulate ? 1.0f : 0.0f;
    const cublasComputeType_t compute =
        bf16 || ctx->precision == CKCA_PRECISION_FLOAT32 ? CUBLAS_COMPUTE_32F : CUBLAS_COMPUTE_32F_FAST_TF32;
    const cudaDataType type = bf16 ? CUDA_R_16BF : CUDA_R_32F;
    CKCA__BLAS(ckca__cuda_of(ctx),
               cublasGemmEx(ckca__cuda_of(ctx)->blas, turn_b ? CUBLAS_OP_T : CUBLAS_OP_N,
                            turn_a ? CUBLAS_OP_T : CUBLAS_OP_N, columns, rows, summed, &one, b, type,
                            turn_b ? summed : columns, a, type, turn_a ? rows : summed, &beta, c,
                            half_c ? CUDA_R_16BF : CUDA_R_32F, columns, compute, CUBLAS_GEMM_DEFAULT));
}

/* Not here: 1 x 1 convolutions are cuBLAS's, which reads what lies in memory. */
CKCA__OP int ckca__may_norm(const ckca_context *ctx, const ckca__conv *s) {
    (void)ctx;
    (void)s;
    return 0;
}

CKCA__OP void ckca__op_conv_forward(ckca_context *ctx, const ckca__conv *s, const float *x, const float *w,
                                    const float *bias, const float *residual, int relu, float *y, void *ws) {
    ckca__gemm g = {};
    if (!ckca__conv_fits(ctx, s)) return;
    g.s = *s;
    g.a = x;
    g.b = ckca__weights(ctx, s, 0, w, ws);
    g.bias = bias;
    g.residual = residual;
    g.relu = relu;
    g.out = y;
    if (ckca__is_product(s) && !bias && !residual && !relu)
        ckca__product(ctx, s->n * s->p * s->q, s->k, s->c, s->bf16, x, 0, g.b, 1, s->bf16, y, 0);
    else /* what comes after the sums costs no pass over y here */
        ckca__run_gemm<CKCA__FORWARD>(ctx, &g);
}

CKCA__OP void ckca__op_conv_backward_data(ckca_context *ctx, const ckca__conv *s, const float *dy, const float *w,
                                          float *dx, int accumulate, void *ws) {
    ckca__gemm g = {};
    if (!ckca__conv_fits(ctx, s)) return;
    g.s = *s;
    g.a = dy;
    g.b = ckca__weights(ctx, s, !ckca__is_product(s), w, ws);
    g.out = dx;
    g.accumulate = accumulate;
    if (ckca__is_product(s))
        ckca__product(ctx, s->n * s->p * s->q, s->c, s->k, s->bf16, dy, 0, g.b, 0, s->bf16, dx, accumulate);
    else
        ckca__run_gemm<CKCA__DATA>(ctx, &g);
}

CKCA__OP void ckca__op_conv_backward_weight(ckca_context *ctx, const ckca__conv *s, const float *x, const float *dy,
                                            float *dw, float *dbias, void *ws) {
    const size_t weights = (size_t)s->r * s->s * s->c * s->k;
    ckca__gemm g = {};
    int splits;
    if (!ckca__conv_fits(ctx, s)) return;
    splits = ckca__weight_splits(ctx, s);
    if (ckca__is_product(s)) {
        ckca__product(ctx, s->k, s->c, s->n * s->p * s->q, s->bf16, dy, 1, x, 0, 0, dw, 1);
    } else {
        g.s = *s;
        g.a = x;
        g.b = dy;
        g.accumulate = splits == 1;
        g.out = splits == 1 ? dw : (float *)ws;
        ckca__run_gemm<CKCA__ROLE_WEIGHT>(ctx, &g);
        if (splits > 1) {
            int slices = 1;
            while (slices < 32 && slices * 8 <= splits) slices *= 2;
            CKCA__LAUNCH(ctx, ckca__add_splits, ckca__grid(ctx, weights * slices, 1), weights, splits, slices,
                         (const float *)ws, dw);
        }
    }
    if (dbias) {
        ckca__moments m = {};
        m.rows = (size_t)s->n * s->p * s->q;
        m.c = s->k;
        m.dy = dy;
        m.part = (float *)ws;
        ckca__run_channel_sums(ctx, s->bf16, 1, &m);
        CKCA__LAUNCH(ctx, ckca__channel_gradients, ckca__warps(s->k), m, ckca__parts(m.rows), (const float *)NULL,
                     (float *)NULL, dbias, (float *)NULL);
    }
}

/* A linear layer is a 1 x 1 convolution over n pictures of one pixel. */
static ckca__conv ckca__linear_as_conv(int n, int d, int k) {
    const ckca__conv s = {n, 1, 1, d, k, 1, 1, 1, 0, 1, 1, NULL, 0, 0, NULL};
    return s;
}

CKCA__OP void ckca__op_linear_forward(ckca_context *ctx, int n, int d, int k, const float *x, const float *w,
                                      const float *bias, float *y, void *ws) {
    const ckca__conv s = ckca__linear_as_conv(n, d, k);
    ckca__op_conv_forward(ctx, &s, x, w, bias, NULL, 0, y, ws);
}

CKCA__OP void ckca__op_linear_backward(ckca_context *ctx, int n, int d, int k, const float *x, const float *w,
                                       const float *dy, float *dx, int accumulate, float *dw, float *dbias, void *ws) {
    const ckca__conv s = ckca__linear_as_conv(n, d, k);
    if (dx) ckca__op_conv_backward_data(ctx, &s, dy, w, dx, accumulate, ws);
    ckca__op_conv_backward_weight(ctx, &s, x, dy, dw, dbias, ws);
}

/* ------------------------------------------------------------------------------------------------------------------
   ELEMENTS
   ------------------------------------------------------------------------------------------------------------------ */

/* for (every i below count that is this thread's) */
#define CKCA__EACH(i, count)                                                            \
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)(count); \
         i += (size_t)gridDim.x * blockDim.x)

/* The same of a function that is written for WIDTH neighbours of an array of T: in chunks, then what is left. */
#define CKCA__IN_CHUNKS(T, count, function, ...)                                                 \
    do {                                                                                         \
        enum { WIDTH_ = ckca__chunk<T>::VALUES };                                                \
        CKCA__EACH(i, (count) / WIDTH_) function<WIDTH_>(i * WIDTH_, __VA_ARGS__);               \
        CKCA__EACH(i, (count) % WIDTH_) function<1>((count) / WIDTH_ * WIDTH_ + i, __VA_ARGS__); \
    } while (0)

template <int WIDTH, class T>
__device__ __forceinline__ void ckca__add_at(size_t i, const T *a, const T *b, int relu, T *y) {
    ckca__lane<WIDTH> v(a + i), other;
    if (b) other = ckca__lane<WIDTH>(b + i);
    for (int j = 0; j < WIDTH; j++) {
        if (b) v.v[j] += other.v[j];
        if (relu && v.v[j] <= 0) v.v[j] = 0; /* NaN stays NaN */
    }
    v.store(y + i);
}
template <class T> __global__ void ckca__add_kernel(size_t count, const T *a, const T *b, int relu, T *y) {
    CKCA__IN_CHUNKS(T, count, ckca__add_at, a, b, relu, y);
}

template <int WIDTH, class T>
__device__ __forceinline__ void ckca__add_backward_at(size_t i, const T *y, const T *dy, T *dx, int accumulate) {
    ckca__lane<WIDTH> g(dy + i), other;
    if (y) other = ckca__lane<WIDTH>(y + i);
    for (int j = 0; j < WIDTH; j++)
        if (y && !(other.v[j] > 0)) g.v[j] = 0;
    if (accumulate) other = ckca__lane<WIDTH>(dx + i);
    for (int j = 0; j < WIDTH; j++)
        if (accumulate) g.v[j] += other.v[j];
    g.store(dx + i);
}
template <class T>
__global__ void ckca__add_backward_kernel(size_t count, const T *y, const T *dy, T *dx, int accumulate) {
    CKCA__IN_CHUNKS(T, count, ckca__add_backward_at, y, dy, dx, accumulate);
}
CKCA__OP void ckca__op_add(ckca_context *ctx, int bf16, size_t count, const float *a, const float *b, int relu,
                           float *y) {
    ckca__typed(bf16, [&](auto type) {
        typedef decltype(type) T;
        CKCA__LAUNCH(ctx, ckca__add_kernel<T>, ckca__grid(ctx, count / ckca__chunk<T>::VALUES, 1), count, (const T *)a,
                     (const T *)b, relu, (T *)y);
    });
}
CKCA__OP void ckca__op_add_backward(ckca_context *ctx, int bf16, size_t count, const float *y, const float *dy,
                                    float *dx, int accumulate) {
    ckca__typed(bf16, [&](auto type) {
        typedef decltype(type) T;
        CKCA__LAUNCH(ctx, ckca__add_backward_kernel<T>, ckca__grid(ctx, count / ckca__chunk<T>::VALUES, 1), count,
                     (const T *)y, (const T *)dy, (T *)dx, accumulate);
    });
}

/* Where item i of n x h x w x c / WIDTH lies. There are fewer than 2^32 pixels, if not values. */
struct ckca__pixel {
    int n, y, x, c;
    __device__ __forceinline__ ckca__pixel(size_t i, unsigned h, unsigned w, unsigned chunks, int width) {
        unsigned at = (unsigned)(i / chunks);
        c = (int)(i - (size_t)at * chunks) * width;
        x = (int)(at % w);
        at /= w;
        y = (int)(at % h);
        n = (int)(at / h);
    }
};

/* WIDTH channels of an output each. The first of equals wins, NaN over all. */
template <class T, int WIDTH> __global__ void ckca__maxpool_kernel(ckca__conv s, const T *x, T *y, unsigned char *at) {
    CKCA__EACH(i, (size_t)s.n * s.p * s.q * s.c / WIDTH) {
        const ckca__pixel o(i, s.p, s.q, s.c / WIDTH, WIDTH);
        ckca__lane<WIDTH> most;
        int where[WIDTH];
        for (int j = 0; j < WIDTH; j++) most.v[j] = -INFINITY, where[j] = -1;
        for (int r = 0; r < s.r; r++)
            for (int t = 0; t < s.s; t++) {
                const int h = o.y * s.stride - s.pad + r, w = o.x * s.stride - s.pad + t;
                if (h < 0 || h >= s.h || w < 0 || w >= s.w) continue;
                const ckca__lane<WIDTH> v(x + (((size_t)o.n * s.h + h) * s.w + w) * s.c + o.c);
                for (int j = 0; j < WIDTH; j++)
                    if (v.v[j] > most.v[j] || v.v[j] != v.v[j]) most.v[j] = v.v[j], where[j] = r * s.s + t;
            }
        most.store(y + i * WIDTH);
        for (int j = 0; j < WIDTH && at; j++) at[i * WIDTH + j] = (unsigned char)(where[j] < 0 ? 0 : where[j]);
    }
}
/* WIDTH channels of an input each: they collect from the few windows that cover it. */
template <class T, int WIDTH>
__global__ void ckca__maxpool_backward_kernel(ckca__conv s, const T *dy, const unsigned char *at, T *dx,
                                              int accumulate) {
    CKCA__EACH(i, (size_t)s.n * s.h * s.w * s.c / WIDTH) {
        const ckca__pixel o(i, s.h, s.w, s.c / WIDTH, WIDTH);
        const int w = o.x + s.pad, h = o.y + s.pad; /* in the padded input, where window p starts at p stride */
        const int p0 = h < s.r ? 0 : (h - s.r) / s.stride + 1, p1 = h / s.stride < s.p ? h / s.stride : s.p - 1;
        const int q0 = w < s.s ? 0 : (w - s.s) / s.stride + 1, q1 = w / s.stride < s.q ? w / s.stride : s.q - 1;
        ckca__lane<WIDTH> sum;
        for (int j = 0; j < WIDTH; j++) sum.v[j] = 0;
        if (accumulate) sum = ckca__lane<WIDTH>(dx + i * WIDTH);
        for (int p = p0; p <= p1; p++)
            for (int q = q0; q <= q1; q++) {
                const size_t from = (((size_t)o.n * s.p + p) * s.q + q) * s.c + o.c;
                const ckca__lane<WIDTH> g(dy + from);
                for (int j = 0; j < WIDTH; j++)
                    if (at[from + j] == (h - p * s.stride) * s.s + w - q * s.stride) sum.v[j] += g.v[j];
            }
        sum.store(dx + i * WIDTH);
    }
}
CKCA__OP void ckca__op_maxpool_forward(ckca_context *ctx, const ckca__conv *s, const float *x, float *y,
                                       unsigned char *at) {
    ckca__typed_wide(s->bf16, s->c, [&](auto type, auto wide) {
        typedef decltype(type) T;
        enum { WIDTH = decltype(wide)::VALUE };
        CKCA__LAUNCH(ctx, (ckca__maxpool_kernel<T, WIDTH>),
                     ckca__grid(ctx, (size_t)s->n * s->p * s->q * s->c / WIDTH, 1), *s, (const T *)x, (T *)y, at);
    });
}
CKCA__OP void ckca__op_maxpool_backward(ckca_context *ctx, const ckca__conv *s, const float *dy,
                                        const unsigned char *at, float *dx, int accumulate) {
    ckca__typed_wide(s->bf16, s->c, [&](auto type, auto wide) {
        typedef decltype(type) T;
        enum { WIDTH = decltype(wide)::VALUE };
        CKCA__LAUNCH(ctx, (ckca__maxpool_backward_kernel<T, WIDTH>),
                     ckca__grid(ctx, (size_t)s->n * s->h * s->w * s->c / WIDTH, 1), *s, (const T *)dy, at, (T *)dx,
                     accumulate);
    });
}

/* WIDTH means each, of values c apart: neighbouring threads read neighbouring channels. */
template <class T, int WIDTH> __global__ void ckca__avgpool_kernel(int n, int area, int c, const T *x, float *y) {
    CKCA__EACH(i, (size_t)n * c / WIDTH) {
        const ckca__pixel o(i, 1, 1, c / WIDTH, WIDTH);
        const T *from = x + (size_t)o.n * area * c + o.c;
        ckca__lane<WIDTH> sum;
        for (int j = 0; j < WIDTH; j++) sum.v[j] = 0;
#pragma unroll 8
        for (int a = 0; a < area; a++) {
            const ckca__lane<WIDTH> v(from + (size_t)a * c);
            for (int j = 0; j < WIDTH; j++) sum.v[j] += v.v[j];
        }
        for (int j = 0; j < WIDTH; j++) sum.v[j] /= (float)area;
        sum.store(y + i * WIDTH);
    }
}
template <class T, int WIDTH>
__global__ void ckca__avgpool_backward_kernel(int n, int area, int c, const float *dy, T *dx, int accumulate) {
    CKCA__EACH(i, (size_t)n * area * c / WIDTH) {
        const ckca__pixel o(i, 1, area, c / WIDTH, WIDTH);
        ckca__lane<WIDTH> g(dy + (size_t)o.n * c + o.c), was;
        if (accumulate) was = ckca__lane<WIDTH>(dx + i * WIDTH);
        for (int j = 0; j < WIDTH; j++) g.v[j] = g.v[j] / (float)area + (accumulate ? was.v[j] : 0);
        g.store(dx + i * WIDTH);
    }
}
CKCA__OP void ckca__op_avgpool_forward(ckca_context *ctx, int bf16, int n, int area, int c, const float *x, float *y) {
    ckca__typed_wide(bf16, c, [&](auto type, auto wide) {
        typedef decltype(type) T;
        enum { WIDTH = decltype(wide)::VALUE };
        CKCA__LAUNCH(ctx, (ckca__avgpool_kernel<T, WIDTH>), ckca__grid(ctx, (size_t)n * c / WIDTH, 1), n, area, c,
                     (const T *)x, y);
    });
}
CKCA__OP void ckca__op_avgpool_backward(ckca_context *ctx, int bf16, int n, int area, int c, const float *dy, float *dx,
                                        int accumulate) {
    ckca__typed_wide(bf16, c, [&](auto type, auto wide) {
        typedef decltype(type) T;
        enum { WIDTH = decltype(wide)::VALUE };
        CKCA__LAUNCH(ctx, (ckca__avgpool_backward_kernel<T, WIDTH>), ckca__grid(ctx, (size_t)n * area * c / WIDTH, 1),
                     n, area, c, dy, (T *)dx, accumulate);
    });
}

template <class T> __global__ void ckca__subsample_kernel(ckca__conv s, const T *x, T *y) {
    CKCA__EACH(i, (size_t)s.n * s.p * s.q * s.k) {
        const ckca__pixel o(i, s.p, s.q, s.k, 1);
        const int c = o.c - (s.k - s.c) / 2;
        if (c < 0 || c >= s.c)
            ckca__put(y + i, 0);
        else
            y[i] = x[(((size_t)o.n * s.h + o.y * s.stride) * s.w + o.x * s.stride) * s.c + c];
    }
}
template <class T> __global__ void ckca__subsample_backward_kernel(ckca__conv s, const T *dy, T *dx, int accumulate) {
    CKCA__EACH(i, (size_t)s.n * s.h * s.w * s.c) {
        const ckca__pixel o(i, s.h, s.w, s.c, 1);
        const int p = o.y / s.stride, q = o.x / s.stride,
                  seen = o.y % s.stride == 0 && o.x % s.stride == 0 && p < s.p && q < s.q;
        const float g =
            seen ? ckca__to_float(dy[(((size_t)o.n * s.p + p) * s.q + q) * s.k + (s.k - s.c) / 2 + o.c]) : 0;
        ckca__put(dx + i, accumulate ? ckca__to_float(dx[i]) + g : g);
    }
}
CKCA__OP void ckca__op_subsample_forward(ckca_context *ctx, const ckca__conv *s, const float *x, float *y) {
    ckca__typed(s->bf16, [&](auto type) {
        typedef decltype(type) T;
        CKCA__LAUNCH(ctx, ckca__subsample_kernel<T>, ckca__grid(ctx, (size_t)s->n * s->p * s->q * s->k, 1), *s,
                     (const T *)x, (T *)y);
    });
}
CKCA__OP void ckca__op_subsample_backward(ckca_context *ctx, const ckca__conv *s, const float *dy, float *dx,
                                          int accumulate) {
    ckca__typed(s->bf16, [&](auto type) {
        typedef decltype(type) T;
        CKCA__LAUNCH(ctx, ckca__subsample_backward_kernel<T>, ckca__grid(ctx, (size_t)s->n * s->h * s->w * s->c, 1), *s,
                     (const T *)dy, (T *)dx, accumulate);
    });
}

/* Group norm, a block for each picture's group in turn. The values of a group lie c / groups at a time, c apart. */
struct ckca__group {
    int c, per, channel; /* channels in all, in the group; its first */
    size_t first;        /* where its values begin */
    float count;         /* of its values */
    __device__ __forceinline__ ckca__group(size_t b, int area, int channels, int groups)
        : c(channels), per(channels / groups), channel((int)(b % groups) * per),
          first(b / groups * area * channels + channel), count((float)area * (float)per) {}
    /* Where value i is; its channel. */
    __device__ __forceinline__ size_t at(size_t i) const { return first + i / per * c + i % per; }
    __device__ __forceinline__ int channel_of(size_t i) const { return channel + (int)(i % per); }
};

template <class T>
__global__ void ckca__groupnorm_kernel(size_t all, int area, int c, int groups, const T *x, const float *gamma,
                                       const float *beta, T *y, float *statistics) {
    for (size_t b = blockIdx.x; b < all; b += gridDim.x) {
        const ckca__group group(b, area, c, groups);
        const size_t values = (size_t)area * group.per;
        float sum = 0, square = 0;
        for (size_t i = threadIdx.x; i < values; i += CKCA__THREADS) sum += ckca__to_float(x[group.at(i)]);
        const float mean = (float)(ckca__block_sum(sum) / group.count);
        for (size_t i = threadIdx.x; i < values; i += CKCA__THREADS) {
            const float d = ckca__to_float(x[group.at(i)]) - mean;
            square += d * d;
        }
        const float inv_std = (float)(1 / sqrt(ckca__block_sum(square) / group.count + 1e-5));
        for (size_t i = threadIdx.x; i < values; i += CKCA__THREADS) {
            const int j = group.channel_of(i);
            ckca__put(y + group.at(i), (ckca__to_float(x[group.at(i)]) - mean) * (inv_std * gamma[j]) + beta[j]);
        }
        if (statistics && threadIdx.x == 0) {
            statistics[b] = mean;
            statistics[all + b] = inv_std;
        }
    }
}
template <class T>
__global__ void ckca__groupnorm_backward_kernel(size_t all, int area, int c, int groups, const T *x, const float *gamma,
                                                const float *statistics, const T *dy, T *dx, int accumulate) {
    for (size_t b = blockIdx.x; b < all; b += gridDim.x) {
        const ckca__group group(b, area, c, groups);
        const size_t values = (size_t)area * group.per;
        const float mean = statistics[b], inv_std = statistics[all + b];
        float sum = 0, product = 0;
        for (size_t i = threadIdx.x; i < values; i += CKCA__THREADS) {
            const size_t at = group.at(i);
            const float g = ckca__to_float(dy[at]) * gamma[group.channel_of(i)];
            sum += g;
            product += g * ((ckca__to_float(x[at]) - mean) * inv_std);
        }
        const float shift = (float)(ckca__block_sum(sum) / group.count);
        const float slope = (float)(ckca__block_sum(product) / group.count);
        for (size_t i = threadIdx.x; i < values; i += CKCA__THREADS) {
            const size_t at = group.at(i);
            const float xhat = (ckca__to_float(x[at]) - mean) * inv_std;
            const float d = inv_std * (ckca__to_float(dy[at]) * gamma[group.channel_of(i)] - shift - xhat * slope);
            ckca__put(dx + at, accumulate ? ckca__to_float(dx[at]) + d : d);
        }
    }
}
/* part (n x 2 x c): each picture's sums of dy xhat and of dy; then their sums over the pictures. */
template <class T>
__global__ void ckca__groupnorm_parts(int n, int area, int c, int groups, const T *x, const float *statistics,
                                      const T *dy, float *part) {
    CKCA__EACH(i, (size_t)n * c) {
        const size_t picture = i / c, j = i % c, group = picture * groups + j / (c / groups);
        const float mean = statistics[group], inv_std = statistics[(size_t)n * groups + group];
        float sum = 0, product = 0;
        for (size_t at = picture * area * c + j, end = (picture + 1) * area * c; at < end; at += c) {
            const float g = ckca__to_float(dy[at]);
            sum += g;
            product += g * ((ckca__to_float(x[at]) - mean) * inv_std);
        }
        part[picture * 2 * c + j] = product;
        part[picture * 2 * c + c + j] = sum;
    }
}
__global__ void ckca__groupnorm_gradients(int n, int c, const float *part, float *dgamma, float *dbeta) {
    CKCA__EACH(i, 2 * (size_t)c) {
        double sum = 0;
        for (int picture = 0; picture < n; picture++) sum += part[(size_t)picture * 2 * c + i];
        *(i < (size_t)c ? dgamma + i : dbeta + (i - c)) += (float)sum;
    }
}
CKCA__OP void ckca__op_groupnorm_forward(ckca_context *ctx, int bf16, int n, int area, int c, int groups,
                                         const float *x, const float *gamma, const float *beta, float *y,
                                         float *statistics) {
    ckca__typed(bf16, [&](auto type) {
        typedef decltype(type) T;
        const size_t all = (size_t)n * groups;
        CKCA__LAUNCH(ctx, ckca__groupnorm_kernel<T>, ckca__grid(ctx, all * CKCA__THREADS, 1), all, area, c, groups,
                     (const T *)x, gamma, beta, (T *)y, statistics);
    });
}
CKCA__OP void ckca__op_groupnorm_backward(ckca_context *ctx, int bf16, int n, int area, int c, int groups,
                                          const float *x, const float *gamma, const float *statistics, const float *dy,
                                          float *dx, int accumulate, float *dgamma, float *dbeta, void *ws) {
    ckca__typed(bf16, [&](auto type) {
        typedef decltype(type) T;
        const size_t all = (size_t)n * groups;
        CKCA__LAUNCH(ctx, ckca__groupnorm_parts<T>, ckca__grid(ctx, (size_t)n * c, 1), n, area, c, groups,
                     (const T *)x, statistics, (const T *)dy, (float *)ws);
        if (dx)
            CKCA__LAUNCH(ctx, ckca__groupnorm_backward_kernel<T>, ckca__grid(ctx, all * CKCA__THREADS, 1), all, area, c,
                         groups, (const T *)x, gamma, statistics, (const T *)dy, (T *)dx, accumulate);
    });
    CKCA__LAUNCH(ctx, ckca__groupnorm_gradients, ckca__grid(ctx, 2 * (size_t)c, 1), n, c, (const float *)ws, dgamma,
                 dbeta);
}

__global__ void ckca__gather_kernel(int n, int d, const float *rows, const int *index, float *out) {
    CKCA__EACH(i, (size_t)n * d) out[i] = rows[(size_t)index[i / d] * d + i % d];
}
CKCA__OP void ckca__op_gather(ckca_context *ctx, int n, int d, const float *rows, const int *index, float *out) {
    CKCA__LAUNCH(ctx, ckca__gather_kernel, ckca__grid(ctx, (size_t)n * d, 1), n, d, rows, index, out);
}

/* ------------------------------------------------------------------------------------------------------------------
   LOSSES: a warp per picture, or a block where features are long. Exponentials and sums are in double, as on the host.
   ------------------------------------------------------------------------------------------------------------------ */

/* log sum_j exp(z_j / t), by the whole warp. NaN or +inf in z gives NaN. */
__device__ double ckca__log_sum_exp(int k, const float *logits, double t) {
    double most = -INFINITY, sum = 0;
    for (int j = (int)threadIdx.x % 32; j < k; j += 32)
        if (logits[j] > most) most = logits[j];
    for (int step = 16; step; step /= 2) {
        const double other = __shfl_xor_sync(0xffffffffu, most, step);
        if (other > most) most = other;
    }
    for (int j = (int)threadIdx.x % 32; j < k; j += 32) sum += exp((logits[j] - most) / t);
    return most / t + log(ckca__warp_sum(sum));
}

/* This warp's picture; its lanes go over the classes. */
__device__ __forceinline__ int ckca__warp_row() { return (int)(blockIdx.x * (CKCA__THREADS / 32) + threadIdx.x / 32); }

__global__ void ckca__cross_entropy_kernel(int n, int k, const float *z, const int *labels, float smoothing, float *dz,
                                           float *loss, int *hit) {
    const int i = ckca__warp_row(), lane = (int)threadIdx.x % 32;
    if (i >= n) return;
    const float *row = z + (size_t)i * k;
    const double lse = ckca__log_sum_exp(k, row, 1);
    const int label = labels[i];
    double sum = 0;
    int rank = 0;
    for (int j = lane; j < k; j += 32) {
        sum += row[j];
        rank += row[j] > row[label] || (row[j] == row[label] && j < label);
        if (dz)
            dz[(size_t)i * k + j] = (float)((exp(row[j] - lse) - (j == label ? 1 - smoothing : 0) - smoothing / k) / n);
    }
    sum = ckca__warp_sum(sum);
    rank = ckca__warp_sum(rank);
    if (lane) return;
    loss[i] = (float)(lse - (1 - smoothing) * row[label] - smoothing * (sum / k));
    hit[i] = lse == lse ? (rank == 0) | (rank < 5) << 1 : 0;
}
CKCA__OP void ckca__op_cross_entropy(ckca_context *ctx, int n, int k, const float *logits, const int *labels,
                                     float smoothing, float *dlogits, float *loss, int *hit) {
    CKCA__LAUNCH(ctx, ckca__cross_entropy_kernel, ckca__warps(n), n, k, logits, labels, smoothing, dlogits, loss, hit);
}

__global__ void ckca__softmax_kernel(int n, int k, const float *z, float *p) {
    const int i = ckca__warp_row();
    if (i >= n) return;
    const double lse = ckca__log_sum_exp(k, z + (size_t)i * k, 1);
    for (int j = (int)threadIdx.x % 32; j < k; j += 32) p[(size_t)i * k + j] = (float)exp(z[(size_t)i * k + j] - lse);
}
CKCA__OP void ckca__op_softmax(ckca_context *ctx, int n, int k, const float *logits, float *p) {
    CKCA__LAUNCH(ctx, ckca__softmax_kernel, ckca__warps(n), n, k, logits, p);
}

/* One block. *sum = (or +=) the sum of values, over n where mean. */
__global__ void ckca__sum_kernel(int n, const float *values, int mean, double *sum) {
    double v = 0;
    for (int i = (int)threadIdx.x; i < n; i += CKCA__THREADS) v += values[i];
    v = ckca__block_sum(v);
    if (threadIdx.x == 0) *sum = mean ? v / n : *sum + v;
}
CKCA__OP void ckca__op_sum(ckca_context *ctx, int n, const float *values, double *sum) {
    CKCA__LAUNCH(ctx, ckca__sum_kernel, 1, n, values, 0, sum);
}
__global__ void ckca__count_kernel(int n, const int *hit, double *sum) {
    double v = 0;
    for (int i = (int)threadIdx.x; i < n; i += CKCA__THREADS) v += hit[i] & 1;
    v = ckca__block_sum(v);
    if (threadIdx.x == 0) *sum += v;
}
CKCA__OP void ckca__op_count(ckca_context *ctx, int n, const int *hit, double *sum) {
    CKCA__LAUNCH(ctx, ckca__count_kernel, 1, n, hit, sum);
}

/* AdaKD's a_i for TRUTH and DOUBT, before division by their mean, into weight. 1 - p_o[y] is summed from the other
   classes: near 0 a difference from 1 has no digits left. */
__global__ void ckca__adakd_weights(ckca_adakd form, int n, int k, const float *zo, const int *labels, float *weight) {
    const int i = ckca__warp_row(), lane = (int)threadIdx.x % 32;
    if (i >= n) return;
    const float *row = zo + (size_t)i * k;
    const double lse = ckca__log_sum_exp(k, row, 1);
    double doubt = 0;
    for (int j = lane; j < k; j += 32)
        if (j != labels[i]) doubt += exp(row[j] - lse);
    doubt = ckca__warp_sum(doubt);
    if (!lane) weight[i] = (float)(form == CKCA_ADAKD_TRUTH ? exp(row[labels[i]] - lse) : doubt);
}

/* loss holds the weights of TRUTH and DOUBT when this starts; each warp reads its own and then replaces it. */
__global__ void ckca__adakd_kernel(ckca_adakd form, int n, int k, const float *z, const float *zo, const int *labels,
                                   const float *class_weight, double t, float scale, const double *mean, float *dz,
                                   float *loss) {
    const int i = ckca__warp_row(), lane = (int)threadIdx.x % 32;
    if (i >= n) return;
    const float *s = z + (size_t)i * k, *o = zo + (size_t)i * k;
    const double lse_s = ckca__log_sum_exp(k, s, t), lse_o = ckca__log_sum_exp(k, o, t);
    double kl = 0, a = 1;
    if (form == CKCA_ADAKD_CLASS)
        a = class_weight[labels[i]];
    else if (form != CKCA_ADAKD_CONSTANT && *mean != 0)
        a = loss[i] / *mean; /* all weights 0: 1 each */
    for (int j = lane; j < k; j += 32) {
        const double log_s = s[j] / t - lse_s, log_o = o[j] / t - lse_o, p_o = exp(log_o);
        kl += p_o * (log_o - log_s);
        dz[(size_t)i * k + j] += (float)(scale * t * a * (exp(log_s) - p_o) / n);
    }
    kl = ckca__warp_sum(kl);
    if (!lane) loss[i] = (float)(t * t * a * kl);
}
CKCA__OP void ckca__op_adakd(ckca_context *ctx, ckca_adakd form, int n, int k, const float *student_logits, const float *teacher_logits,
                             const int *labels, const float *class_weight, float temperature, float scale, float *dlogits,
                             float *loss) {
    double *mean = ckca__cuda_of(ctx)->scratch;
    if (ckca__adakds[form].over_mean) {
        CKCA__LAUNCH(ctx, ckca__adakd_weights, ckca__warps(n), form, n, k, teacher_logits, labels, loss);
        CKCA__LAUNCH(ctx, ckca__sum_kernel, 1, n, (const float *)loss, 1, mean);
    }
    CKCA__LAUNCH(ctx, ckca__adakd_kernel, ckca__warps(n), form, n, k, student_logits, teacher_logits, labels, class_weight, (double)temperature,
                 scale, (const double *)mean, dlogits, loss);
}

/* a . b by the whole block. */
__device__ double ckca__block_dot(int d, const float *a, const float *b) {
    double sum = 0;
    for (int j = (int)threadIdx.x; j < d; j += CKCA__THREADS) sum += (double)a[j] * b[j];
    return ckca__block_sum(sum);
}
__device__ __forceinline__ double ckca__inverse_norm(double square) { return square > 0 ? 1 / sqrt(square) : square; }

/* A block per picture: loss = 1 - cos; d cos / d f = (fo / |fo| - cos f / |f|) / |f|. */
template <class T, class TEACHER, int WIDTH>
__global__ void ckca__cosine_kernel(int d, const T *f, const TEACHER *fo, double scale, T *df, int accumulate,
                                    float *loss) {
    const size_t row = (size_t)blockIdx.x * d, end = row + d;
    double square = 0, square_o = 0, product = 0;
#pragma unroll 2
    for (size_t j = row + threadIdx.x * WIDTH; j < end; j += CKCA__THREADS * WIDTH) {
        const ckca__lane<WIDTH> a(f + j), b(fo + j);
        for (int e = 0; e < WIDTH; e++) {
            square += (double)a.v[e] * a.v[e];
            square_o += (double)b.v[e] * b.v[e];
            product += (double)a.v[e] * b.v[e];
        }
    }
    const double inv_f = ckca__inverse_norm(ckca__block_sum(square));
    const double inv_o = ckca__inverse_norm(ckca__block_sum(square_o));
    const double cosine = ckca__block_sum(product) * inv_f * inv_o;
    const float alpha = (float)(scale * cosine * inv_f * inv_f), beta = (float)(-scale * inv_f * inv_o);
    for (size_t j = row + threadIdx.x * WIDTH; j < end; j += CKCA__THREADS * WIDTH) {
        ckca__lane<WIDTH> a(f + j), was;
        const ckca__lane<WIDTH> b(fo + j);
        if (accumulate) was = ckca__lane<WIDTH>(df + j);
        for (int e = 0; e < WIDTH; e++) a.v[e] = alpha * a.v[e] + beta * b.v[e] + (accumulate ? was.v[e] : 0);
        a.store(df + j);
    }
    if (threadIdx.x == 0) loss[blockIdx.x] = (float)(1 - cosine);
}

__global__ void ckca__l2_kernel(int d, const float *f, const float *fo, double scale, float *df, int accumulate,
                                float *loss) {
    const size_t row = (size_t)blockIdx.x * d;
    double sum = 0;
    for (size_t j = row + threadIdx.x; j < row + d; j += CKCA__THREADS) {
        const double e = (double)f[j] - fo[j];
        sum += e * e;
        df[j] = (float)(scale * e) + (accumulate ? df[j] : 0);
    }
    sum = ckca__block_sum(sum);
    if (threadIdx.x == 0) loss[blockIdx.x] = (float)(sum / d);
}

/* inverse[i] = 1 / |f_i|; a block per picture. */
__global__ void ckca__norms_kernel(int d, const float *f, double *inverse) {
    const float *row = f + (size_t)blockIdx.x * d;
    const double square = ckca__block_dot(d, row, row);
    if (threadIdx.x == 0) inverse[blockIdx.x] = ckca__inverse_norm(square);
}

/* A block per picture i, which meets the others j in tiles: first each warp takes j's of its own and finds what f_j
   counts for, then the threads go over the features. Formulas as on the host (ckca__featreg_relation). */
__global__ void ckca__relation_kernel(int n, int d, int d_teacher, const float *f, const float *fo, const double *inv_f,
                                      const double *inv_o, double scale, float *df, int accumulate, float *loss) {
    enum { TILE = CKCA__THREADS };
    __shared__ double weight[TILE];
    const int i = (int)blockIdx.x, lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const float *fi = f + (size_t)i * d, *oi = fo + (size_t)i * d_teacher;
    float *to = df + (size_t)i * d;
    double sum = 0, own = 0; /* of this warp: of e^2; of what f_i itself counts for */
    for (int c = (int)threadIdx.x; c < d && !accumulate; c += CKCA__THREADS) to[c] = 0;
    for (int first = 0; first < n; first += TILE) {
        const int count = n - first < TILE ? n - first : TILE;
        for (int j = warp; j < count; j += CKCA__THREADS / 32) {
            const float *fj = f + (size_t)(first + j) * d, *oj = fo + (size_t)(first + j) * d_teacher;
            double cosine = 0, other = 0;
            for (int c = lane; c < d; c += 32) cosine += (double)fi[c] * fj[c];
            for (int c = lane; c < d_teacher; c += 32) other += (double)oi[c] * oj[c];
            cosine = ckca__warp_sum(cosine) * inv_f[i] * inv_f[first + j];
            const double e = first + j == i ? 0 : cosine - ckca__warp_sum(other) * inv_o[i] * inv_o[first + j];
            const double g = n > 1 ? scale * 4 / ((double)n * (n - 1)) * e * inv_f[i] : 0;
            if (lane == 0) weight[j] = g * inv_f[first + j];
            sum += e * e;
            own -= g * cosine * inv_f[i];
        }
        __syncthreads();
        for (int c = (int)threadIdx.x; c < d; c += CKCA__THREADS) {
            double v = 0;
            for (int j = 0; j < count; j++) v += weight[j] * f[(size_t)(first + j) * d + c];
            to[c] += (float)v;
        }
        __syncthreads();
    }
    sum = ckca__block_sum(lane == 0 ? sum : 0);
    own = ckca__block_sum(lane == 0 ? own : 0);
    for (int c = (int)threadIdx.x; c < d; c += CKCA__THREADS) to[c] += (float)(own * fi[c]);
    if (threadIdx.x == 0) loss[i] = (float)(n > 1 ? sum / (n - 1) : 0);
}

CKCA__OP void ckca__op_featreg(ckca_context *ctx, ckca_featreg form, int bf16, int bf16_teacher, int n, int d,
                               int d_teacher, const float *student_features, const float *teacher_features, float scale, float *dfeatures, int accumulate,
                               float *loss, void *ws) {
    if (form == CKCA_FEATREG_RELATION) {
        double *inv_f = (double *)ws, *inv_o = inv_f + n;
        CKCA__LAUNCH(ctx, ckca__norms_kernel, n, d, student_features, inv_f);
        CKCA__LAUNCH(ctx, ckca__norms_kernel, n, d_teacher, teacher_features, inv_o);
        CKCA__LAUNCH(ctx, ckca__relation_kernel, n, n, d, d_teacher, student_features, teacher_features, (const double *)inv_f,
                     (const double *)inv_o, (double)scale, dfeatures, accumulate, loss);
    } else if (form == CKCA_FEATREG_L2) {
        CKCA__LAUNCH(ctx, ckca__l2_kernel, n, d, student_features, teacher_features, scale * 2 / ((double)n * d), dfeatures, accumulate, loss);
    } else {
        ckca__typed_wide(bf16, d, [&](auto type, auto wide) {
            ckca__typed(bf16_teacher, [&](auto teacher) {
                typedef decltype(type) T;
                typedef decltype(teacher) TEACHER;
                CKCA__LAUNCH(ctx, (ckca__cosine_kernel<T, TEACHER, decltype(wide)::VALUE>), n, d, (const T *)student_features,
                             (const TEACHER *)teacher_features, (double)scale / n, (T *)dfeatures, accumulate, loss);
            });
        });
    }
}

/* ------------------------------------------------------------------------------------------------------------------
   WEIGHTS
   ------------------------------------------------------------------------------------------------------------------ */

template <int WIDTH>
__device__ __forceinline__ void ckca__sgd_at(size_t i, size_t decayed, float *w, const float *g, float *v, float rate,
                                             float momentum, float weight_decay, int nesterov, float scale) {
    const ckca__lane<WIDTH> gradient(g + i);
    ckca__lane<WIDTH> weight(w + i), velocity(v + i);
    for (int j = 0; j < WIDTH; j++) {
        const float d = gradient.v[j] * scale + (i + j < decayed ? weight_decay * weight.v[j] : 0);
        velocity.v[j] = momentum * velocity.v[j] + d;
        weight.v[j] -= rate * (nesterov ? d + momentum * velocity.v[j] : velocity.v[j]);
    }
    velocity.store(v + i);
    weight.store(w + i);
}
__global__ void ckca__sgd_kernel(size_t count, size_t decayed, float *w, const float *g, float *v, const float *lr,
                                 float momentum, float weight_decay, int nesterov, const float *gscale) {
    const float rate = *lr, scale = gscale ? *gscale : 1;
    CKCA__IN_CHUNKS(float, count, ckca__sgd_at, decayed, w, g, v, rate, momentum, weight_decay, nesterov, scale);
}
CKCA__OP void ckca__op_sgd(ckca_context *ctx, size_t count, size_t decayed, float *w, const float *g, float *v,
                           const float *lr, float momentum, float weight_decay, int nesterov, const float *gscale) {
    CKCA__LAUNCH(ctx, ckca__sgd_kernel, ckca__grid(ctx, count / 4, 1), count, decayed, w, g, v, lr, momentum,
                 weight_decay, nesterov, gscale);
}

/* sums[block] = the block's share of g . g, of 256 blocks. */
__global__ void ckca__squares_kernel(size_t count, const float *g, double *sums) {
    double sum = 0;
    CKCA__EACH(i, count) sum += (double)g[i] * g[i];
    sum = ckca__block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
__global__ void ckca__clip_kernel(const double *sums, float clip, float *gscale) {
    const double coefficient = clip / (sqrt(ckca__block_sum(sums[threadIdx.x])) + 1e-6);
    if (threadIdx.x == 0) *gscale = coefficient > 1 ? 1 : (float)coefficient;
}
CKCA__OP void ckca__op_clip(ckca_context *ctx, size_t count, const float *g, float clip, float *gscale, void *ws) {
    CKCA__LAUNCH(ctx, ckca__squares_kernel, CKCA__THREADS, count, g, (double *)ws);
    CKCA__LAUNCH(ctx, ckca__clip_kernel, 1, (const double *)ws, clip, gscale);
}

__global__ void ckca__shrink_perturb_kernel(size_t count, float *w, const float *fresh, float shrink, float perturb) {
    CKCA__EACH(i, count) w[i] = shrink * w[i] + perturb * fresh[i];
}
CKCA__OP void ckca__op_shrink_perturb(ckca_context *ctx, size_t count, float *w, const float *fresh, float shrink,
                                      float perturb) {
    CKCA__LAUNCH(ctx, ckca__shrink_perturb_kernel, ckca__grid(ctx, count, 1), count, w, fresh, shrink, perturb);
}

/* ------------------------------------------------------------------------------------------------------------------
   PICTURES
   ------------------------------------------------------------------------------------------------------------------ */

/* At most this many channels in one launch: their mean and std travel as arguments. */
enum { CKCA__PICTURE_CHANNELS = 8 };

typedef struct ckca__pictures {
    int h, w, c, first, channels; /* channels first, ... of c */
    const unsigned char *pixels;
    int gathered;
    const int *index, *epoch;
    int augmented;
    ckca_augment augment;
    uint64_t seed;
    float mean[CKCA__PICTURE_CHANNELS], std[CKCA__PICTURE_CHANNELS];
    float *out;
} ckca__pictures;

/* The framed picture's byte values at (y, x), of m channels from channel j on: shifted and mirrored, black outside; or
   the framed rectangle enlarged, bilinearly between pixel centres. */
__device__ void ckca__look(const ckca__pictures &p, const ckca__framing &f, const unsigned char *pixels, int y, int x,
                           int j, int m, float *v) {
    if (f.flip) x = p.w - 1 - x;
    if (f.height == p.h && f.width == p.w) {
        const int at_y = f.top + y, at_x = f.left + x, inside = at_y >= 0 && at_y < p.h && at_x >= 0 && at_x < p.w;
        for (int i = 0; i < m; i++) v[i] = inside ? pixels[((size_t)at_y * p.w + at_x) * p.c + j + i] : 0;
        return;
    }
    const double sy = (y + 0.5) * f.height / p.h - 0.5, sx = (x + 0.5) * f.width / p.w - 0.5;
    const int y0 = sy > 0 ? (int)sy : 0, x0 = sx > 0 ? (int)sx : 0;
    const float a = sy > 0 ? (float)(sy - y0) : 0, b = sx > 0 ? (float)(sx - x0) : 0;
    const unsigned char *top = pixels + ((size_t)(f.top + y0) * p.w + f.left + x0) * p.c + j;
    const unsigned char *bottom = y0 + 1 < f.height ? top + (size_t)p.w * p.c : top;
    const int right = x0 + 1 < f.width ? p.c : 0;
    for (int i = 0; i < m; i++) {
        const float upper = top[i] + b * (float)(top[right + i] - top[i]);
        const float lower = bottom[i] + b * (float)(bottom[right + i] - bottom[i]);
        v[i] = upper + a * (lower - upper);
    }
}

/* A block per picture. Jitter's contrast needs the picture's mean grey, so with it pixels are looked at twice. */
__global__ void ckca__pictures_kernel(ckca__pictures p) {
    __shared__ ckca__framing framing;
    const int picture = p.index[blockIdx.x], area = p.h * p.w;
    const unsigned char *pixels = p.pixels + (size_t)(p.gathered ? (int)blockIdx.x : picture) * area * p.c;
    float *out = p.out + (size_t)blockIdx.x * area * p.c + p.first;
    const int jitter = p.augmented && p.augment.jitter > 0;
    float mean = 0;
    if (threadIdx.x == 0)
        ckca__augment_framing(p.augmented ? &p.augment : NULL, p.seed, p.epoch ? *p.epoch : 0, picture, p.h, p.w,
                              &framing);
    __syncthreads();
    const ckca__framing f = framing;
    if (jitter) {
        double sum = 0;
        for (int i = (int)threadIdx.x; i < area; i += CKCA__THREADS) {
            float v[3];
            ckca__look(p, f, pixels, i / p.w, i % p.w, 0, p.c == 3 ? 3 : 1, v);
            for (int j = 0; j < (p.c == 3 ? 3 : 1); j++) v[j] = ckca__augment_clamp(v[j] * f.brightness);
            sum += ckca__augment_grey(p.c, v);
        }
        mean = (float)(ckca__block_sum(sum) / area);
    }
    for (int i = (int)threadIdx.x; i < area; i += CKCA__THREADS) {
        float v[CKCA__PICTURE_CHANNELS];
        ckca__look(p, f, pixels, i / p.w, i % p.w, p.first, p.channels, v);
        if (jitter) {
            for (int j = 0; j < p.channels; j++)
                v[j] = ckca__augment_clamp(f.contrast * ckca__augment_clamp(v[j] * f.brightness) +
                                           (1 - f.contrast) * mean);
            if (p.c == 3) {
                const float grey = ckca__augment_grey(3, v);
                for (int j = 0; j < 3; j++) v[j] = ckca__augment_clamp(f.saturation * v[j] + (1 - f.saturation) * grey);
            }
        }
        for (int j = 0; j < p.channels; j++) out[(size_t)i * p.c + j] = (v[j] / 255 - p.mean[j]) / p.std[j];
    }
}

CKCA__OP void ckca__op_batch(ckca_context *ctx, int n, int h, int w, int c, const unsigned char *pixels, int gathered,
                             const int *index, const ckca_augment *augment, uint64_t seed, const int *epoch,
                             const float *mean, const float *std, float *out) {
    ckca__pictures p = {};
    p.h = h;
    p.w = w;
    p.c = c;
    p.pixels = pixels;
    p.gathered = gathered;
    p.index = index;
    p.epoch = epoch;
    p.seed = seed;
    p.out = out;
    if (augment) {
        p.augmented = 1;
        p.augment = *augment;
    }
    for (p.first = 0; p.first < c; p.first += CKCA__PICTURE_CHANNELS) {
        p.channels = c - p.first < CKCA__PICTURE_CHANNELS ? c - p.first : CKCA__PICTURE_CHANNELS;
        memcpy(p.mean, mean + p.first, (size_t)p.channels * sizeof *mean);
        memcpy(p.std, std + p.first, (size_t)p.channels * sizeof *std);
        CKCA__LAUNCH(ctx, ckca__pictures_kernel, (unsigned)n, p);
    }
}
