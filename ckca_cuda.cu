/* ckca_cuda.cu - the CUDA backend of ckca.h: its ops as kernels and cuBLAS calls. MIT or public domain, your choice.

   No GPU has run this file yet. It has been tested on the CPU only, through tests/cuda_shim.h; every statement about
   speed below is a model, not a measurement.

   ckca.h declares the ops (section BACKEND) and implements them for the host; this file implements the same functions
   for a GPU. The choice is made at compile time, and the program's source does not change:

       nvcc -O3 -std=c++17 -arch=native -c ckca_cuda.cu       (on Hopper -arch=sm_90a: wgmma needs the a)
       cc -O3 -DCKCA_CUDA -c program.c                        (program.c defines CKCA_IMPLEMENTATION as usual)
       nvcc program.o ckca_cuda.o -lcublas -o program

   Several processes (ckca_desc.ranks), one GPU each: with -DCKCA_NCCL for nvcc, and -lnccl, gradients are summed by NCCL
   from GPU to GPU while the backward pass runs on; ckca_desc.ranks then carries only small messages, NCCL's address
   among them. Without it they pass through host memory and ckca_desc.ranks, and nothing overlaps. Both wait for the GPU
   once per step. No two GPUs have run it yet.

   A context uses the CUDA device that is current at its creation (select it with CUDA_VISIBLE_DEVICES); that device
   must be current whenever the context is used. Needs CUDA 12 or newer and a GPU from Turing (sm_75) on; TF32 and BF16
   need Ampere (sm_80).

   CONTENTS, one section each
       CONTEXT        streams, cuBLAS handles, deferred errors, kernel launches
       MEMORY         device memory, copies, staging of streamed input, recorded work (CUDA graphs)
       INSTRUCTIONS   wrappers for PTX: tensor cores, asynchronous copies, rounding; values as float or bfloat16
       GEMM           the kernel behind all three passes of every convolution except plain 1 x 1; its form for Hopper
       CHANNELS       reductions over all pixels: batch norm, bias gradients
       CONVOLUTION    the convolution and linear ops, which choose the GEMM kernel or cuBLAS
       ELEMENTS       element-wise ops, pooling, group norm, gather
       LOSSES         cross-entropy, softmax, distillation and feature losses
       WEIGHTS        SGD, gradient clipping, shrink and perturb
       RANKS          sums over processes: NCCL, or through host memory
       PICTURES       bytes to augmented, normalised floats

   EXECUTION
       All work runs in order in one stream, with two exceptions: uploads of pictures that do not fit in GPU memory (see
       staging), and weight gradients, which overlap the gradient of the same convolution's input. Kernels use
       programmatic dependent launch: one may start while its predecessor ends, and waits before it touches memory.
       Blocks have 256 threads, or 128 where a GEMM uses tensor cores. Element-wise kernels use grid-stride loops over
       at most 16 blocks per multiprocessor, with 16-byte accesses where possible; where channels matter, the stride is
       a multiple of the channel count, so each thread keeps the same channels and loads their constants once.
       Batch-norm kernels load several rows before they use the first.
       Grid-wide sums are deterministic: each block sums its part in an order that depends only on the sizes, and the
       last block to finish (found by a ticket, an integer atomic) adds the parts in a fixed order. Which block finishes
       last does not matter: the same machine always gives the same bits.

   LOWER BOUNDS on a kernel's time: its bytes at memory bandwidth, or its multiply-adds at the peak of the unit it uses
       GEMM           2 N P Q K R S C flops on tensor cores (FLOAT32: on the FFMA units), or the bytes of x, w and y
                      once. 3 x 3 on 16 channels costs 288 flops and 8 bytes per output: it is bound by memory.
       batch norm     forward: read x once, write y (8 bytes a value, 4 more with a residual), since the convolution
                      computes the statistics; backward: read x and dy twice, write dx (20 bytes), read y twice as well
                      with a residual, dresidual 4 to 8 more. BF16: half of that.
       element-wise   the bytes of its arguments once; SGD 20 bytes a parameter.
       pictures       one byte in, one float out per value; the first convolution pads their channels to a whole chunk.
       losses         small: bound by launch latency.

   PRECISION (ckca_desc.precision): FLOAT32 multiplies floats on the FFMA units. TF32 rounds both factors of
   convolutions and linear layers (after the load from shared memory, or in TMA; cuBLAS uses its own rounding) and
   multiplies on tensor cores, accumulating in float32. BF16 stores the feature maps between the pictures and the average
   pooling, and their gradients, as bfloat16 and multiplies them by weights rounded to bfloat16, accumulating in float32;
   everything after the pooling is stored as float32 and multiplied as TF32. Weights, their gradients, statistics, losses
   and SGD are always float32. */
#ifndef CKCA_CUDA
#define CKCA_CUDA
#endif
#define CKCA_CUDA_IMPLEMENTATION
#include "ckca.h"
#ifndef CKCA_CUDA_SHIM
#include <cublas_v2.h>
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#ifdef CKCA_NCCL
#include <nccl.h>
#endif
#endif
#ifdef _WIN32
#define CKCA__PROCESS() 0L /* Windows has no fork() */
#else
#include <unistd.h>
#define CKCA__PROCESS() ((long)getpid())
#endif

/* ------------------------------------------------------------------------------------------------------------------
   CONTEXT
   ------------------------------------------------------------------------------------------------------------------ */

enum {
    CKCA__THREADS = 256, /* per block, except in tensor-core GEMMs */
    CKCA__SLOTS = 4,     /* pinned buffers for small uploads, used round-robin */
    CKCA__SLOT_BYTES = 1 << 18,
    CKCA__SHARED_BYTES = 48 << 10, /* per block, unless a kernel opts in to more */
    CKCA__TICKETS = 1 << 14,
    CKCA__RANKS_VALUES = 1 << 18, /* summed over ranks at a time, through host memory */
    CKCA__BLAS_BYTES = 32 << 20 /* cuBLAS's workspace: its recommended size on Hopper; CUDA graphs need a fixed one */
};

typedef struct ckca__cuda {
    cudaStream_t stream, copies; /* all work; staged uploads, which overlap it */
    cublasHandle_t blas;
    void *blas_workspace;
    struct {
        cudaStream_t stream; /* weight gradients, overlapping input gradients */
        cublasHandle_t blas;
        void *blas_workspace;
        cudaEvent_t forked, done;
        int active, pending, overlap; /* 1: work is issued here; the main stream must still wait; may skip it */
    } side;
    int blocks;                    /* maximum grid of an element-wise kernel */
    unsigned *tickets;             /* on the device: 0 between kernels, see ckca__is_last */
    int dependent_launch;          /* 1: use programmatic dependent launch */
    int wgmma;                     /* 1: use Hopper's wgmma where it pays, see ckca__wgmma_kernel */
    PFN_cuTensorMapEncodeTiled_v12000 encode_tiled; /* of the driver; both are set if wgmma is */
    PFN_cuTensorMapEncodeIm2col_v12000 encode_im2col;
    char *slot[CKCA__SLOTS];       /* pinned host memory */
    cudaEvent_t sent[CKCA__SLOTS]; /* the slot's last upload has finished */
    int next;                      /* slot */
    unsigned releases;             /* frees so far: a graph captured before the last one may point to freed memory */
    long process;                  /* the creator: a CUDA context does not survive fork() */
    float *ranks_buffer;           /* pinned: CKCA__RANKS_VALUES; without NCCL */
#ifdef CKCA_NCCL
    struct {
        ncclComm_t comm;
        cudaStream_t stream;
        cudaEvent_t ready, done;
    } ranks;
#endif
    int failed;
    char error[400];
} ckca__cuda;

static ckca__cuda *ckca__cuda_of(const ckca_context *ctx) { return (ckca__cuda *)ctx->cuda; }

/* Records the first failure. call: the source text of the failed call; only its name is kept. */
static int ckca__cuda_note(ckca__cuda *cuda, const char *call, const char *message) {
    int length;
    call += *call == '('; /* a kernel with template arguments is parenthesised */
    length = (int)strcspn(call, "(<");
    if (!cuda->failed) snprintf(cuda->error, sizeof cuda->error, "%.*s: %s", length, call, message);
    cuda->failed = 1;
    return 0;
}
/* Records a failure and clears it from cudaGetLastError, where other users of CUDA in this thread would find it. */
static int ckca__cuda_check(ckca__cuda *cuda, const char *call, cudaError_t status) {
    if (status == cudaSuccess) return 1;
    cudaGetLastError();
    return ckca__cuda_note(cuda, call, cudaGetErrorString(status));
}
static int ckca__blas_check(ckca__cuda *cuda, const char *call, cublasStatus_t status) {
    return status == CUBLAS_STATUS_SUCCESS ? 1 : ckca__cuda_note(cuda, call, cublasGetStatusString(status));
}
static int ckca__cuda_same_process(const ckca__cuda *cuda) { return cuda->process == CKCA__PROCESS(); }
static int ckca__cuda_usable(ckca__cuda *cuda, const char *call) {
    return ckca__cuda_same_process(cuda) ||
           ckca__cuda_note(cuda, call, "the child of a fork() cannot use its parent's GPU");
}
#define CKCA__CUDA(cuda, call) (ckca__cuda_usable(cuda, #call) && ckca__cuda_check(cuda, #call, call))
#define CKCA__BLAS(cuda, call) (ckca__cuda_usable(cuda, #call) && ckca__blas_check(cuda, #call, call))

/* The stream to issue work to. The main stream first waits for pending side-stream work, unless overlap is allowed. */
static cudaStream_t ckca__cuda_stream(ckca__cuda *cuda) {
    if (cuda->side.active) return cuda->side.stream;
    if (cuda->side.pending && !cuda->side.overlap) {
        cuda->side.pending = 0;
        CKCA__CUDA(cuda, cudaStreamWaitEvent(cuda->stream, cuda->side.done, 0));
    }
    return cuda->stream;
}

/* Work issued between these two calls overlaps the main stream's work until the end of the next convolution's input
   gradient. The streams share neither scratch memory nor tickets. */
static void ckca__side_begin(ckca__cuda *cuda) {
    cuda->side.active = CKCA__CUDA(cuda, cudaEventRecord(cuda->side.forked, ckca__cuda_stream(cuda))) &&
                        CKCA__CUDA(cuda, cudaStreamWaitEvent(cuda->side.stream, cuda->side.forked, 0));
}
static void ckca__side_end(ckca__cuda *cuda) {
    if (!cuda->side.active) return;
    cuda->side.active = 0;
    cuda->side.pending = CKCA__CUDA(cuda, cudaEventRecord(cuda->side.done, cuda->side.stream));
}
static unsigned *ckca__tickets(const ckca__cuda *cuda) {
    return cuda->tickets + (cuda->side.active ? CKCA__TICKETS : 0);
}

/* Grid, threads per block, and bytes of dynamic shared memory. */
typedef struct ckca__launch_shape {
    dim3 grid;
    unsigned threads;
    size_t shared;
    ckca__launch_shape(dim3 grid_, unsigned threads_ = CKCA__THREADS, size_t shared_ = 0)
        : grid(grid_), threads(threads_), shared(shared_) {}
    ckca__launch_shape(unsigned blocks) : ckca__launch_shape(dim3(blocks)) {}
} ckca__launch_shape;

/* Launches every kernel: CKCA__LAUNCH(ctx, kernel, blocks, arguments...). With programmatic dependent launch a kernel
   may start while its predecessor finishes, so every kernel must call ckca__wait_for_grids. */
template <class... P, class... A>
static void ckca__launch(ckca_context *ctx, const char *name, void (*kernel)(P...), ckca__launch_shape shape,
                         A... arguments) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute dependent_launch = {};
    if (!ckca__cuda_usable(cuda, name)) return;
    dependent_launch.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    dependent_launch.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = shape.grid;
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared;
    config.stream = ckca__cuda_stream(cuda);
    config.attrs = &dependent_launch;
    config.numAttrs = (unsigned)cuda->dependent_launch;
    if (shape.shared > CKCA__SHARED_BYTES &&
        !ckca__cuda_check(cuda, name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                           (int)shape.shared)))
        return;
    ckca__cuda_check(cuda, name, cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...));
}
#define CKCA__LAUNCH(ctx, kernel, ...) ckca__launch(ctx, #kernel, kernel, __VA_ARGS__)

CKCA__OP void ckca__device_free(ckca_context *ctx) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    int i;
    if (!cuda) return;
    ctx->cuda = NULL;
    if (!ckca__cuda_same_process(cuda)) {
        free(cuda);
        return;
    }
    if (cuda->side.stream) cudaStreamSynchronize(cuda->side.stream);
    if (cuda->stream) cudaStreamSynchronize(cuda->stream);
    if (cuda->copies) cudaStreamSynchronize(cuda->copies);
#ifdef CKCA_NCCL
    if (cuda->ranks.comm && ctx->ranks_broken) ncclCommAbort(cuda->ranks.comm);
    else if (cuda->ranks.comm) ncclCommDestroy(cuda->ranks.comm);
    if (cuda->ranks.ready) cudaEventDestroy(cuda->ranks.ready);
    if (cuda->ranks.done) cudaEventDestroy(cuda->ranks.done);
    if (cuda->ranks.stream) cudaStreamDestroy(cuda->ranks.stream);
#endif
    if (cuda->ranks_buffer) cudaFreeHost(cuda->ranks_buffer);
    if (cuda->blas) cublasDestroy(cuda->blas);
    if (cuda->side.blas) cublasDestroy(cuda->side.blas);
    if (cuda->side.forked) cudaEventDestroy(cuda->side.forked);
    if (cuda->side.done) cudaEventDestroy(cuda->side.done);
    if (cuda->side.blas_workspace) cudaFree(cuda->side.blas_workspace);
    if (cuda->side.stream) cudaStreamDestroy(cuda->side.stream);
    for (i = 0; i < CKCA__SLOTS; i++) {
        if (cuda->sent[i]) cudaEventDestroy(cuda->sent[i]);
        if (cuda->slot[i]) cudaFreeHost(cuda->slot[i]);
    }
    if (cuda->blas_workspace) cudaFree(cuda->blas_workspace);
    if (cuda->tickets) cudaFree(cuda->tickets);
    if (cuda->copies) cudaStreamDestroy(cuda->copies);
    if (cuda->stream) cudaStreamDestroy(cuda->stream);
    free(cuda);
}

static int ckca__blas_create(ckca__cuda *cuda, cudaStream_t stream, cublasHandle_t *blas, void **workspace) {
    return CKCA__CUDA(cuda, cudaMalloc(workspace, CKCA__BLAS_BYTES)) && CKCA__BLAS(cuda, cublasCreate(blas)) &&
           CKCA__BLAS(cuda, cublasSetStream(*blas, stream)) &&
           CKCA__BLAS(cuda, cublasSetWorkspace(*blas, *workspace, CKCA__BLAS_BYTES)) &&
           /* Split-K sums stay in float32 even for BF16 results. */
           CKCA__BLAS(cuda, cublasSetMathMode(*blas, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
}

static void ckca__wgmma_init(ckca__cuda *cuda, const cudaDeviceProp *gpu);

/* On failure, ckca__device_free releases what was created. */
CKCA__OP ckca_status ckca__device_init(ckca_context *ctx) {
    ckca__cuda *cuda = (ckca__cuda *)calloc(1, sizeof *cuda);
    static const char *const precision[CKCA_PRECISION_COUNT] = {"float32", "tf32", "bf16"};
    cudaDeviceProp gpu;
    int device, ok, i, runtime = 0, driver = 0;
    if (!cuda) {
        snprintf(ctx->error, sizeof ctx->error, "ckca_init: out of memory for the GPU's %d bytes", (int)sizeof *cuda);
        return CKCA_ENOMEM;
    }
    ctx->cuda = cuda;
    cuda->process = CKCA__PROCESS();
    ok = CKCA__CUDA(cuda, cudaGetDevice(&device)) && CKCA__CUDA(cuda, cudaGetDeviceProperties(&gpu, device));
    if (!ok) return ckca__device_status(ctx);
    if (ctx->precision != CKCA_PRECISION_FLOAT32 && gpu.major < 8) {
        snprintf(ctx->error, sizeof ctx->error,
                 "ckca_init: precision is %s, which needs compute capability 8.0; %.100s has %d.%d",
                 precision[ctx->precision], gpu.name, gpu.major, gpu.minor);
        return CKCA_EINVAL;
    }
    ok = CKCA__CUDA(cuda, cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking)) &&
         CKCA__CUDA(cuda, cudaStreamCreateWithFlags(&cuda->copies, cudaStreamNonBlocking)) &&
         CKCA__CUDA(cuda, cudaStreamCreateWithFlags(&cuda->side.stream, cudaStreamNonBlocking)) &&
         CKCA__CUDA(cuda, cudaMalloc((void **)&cuda->tickets, 2 * CKCA__TICKETS * sizeof *cuda->tickets)) &&
         CKCA__CUDA(cuda, cudaMemsetAsync(cuda->tickets, 0, 2 * CKCA__TICKETS * sizeof *cuda->tickets, cuda->stream)) &&
         CKCA__CUDA(cuda, cudaRuntimeGetVersion(&runtime)) && CKCA__CUDA(cuda, cudaDriverGetVersion(&driver)) &&
         CKCA__CUDA(cuda, cudaEventCreateWithFlags(&cuda->side.forked, cudaEventDisableTiming)) &&
         CKCA__CUDA(cuda, cudaEventCreateWithFlags(&cuda->side.done, cudaEventDisableTiming)) &&
         ckca__blas_create(cuda, cuda->stream, &cuda->blas, &cuda->blas_workspace) &&
         ckca__blas_create(cuda, cuda->side.stream, &cuda->side.blas, &cuda->side.blas_workspace);
    for (i = 0; ok && i < CKCA__SLOTS; i++)
        ok = CKCA__CUDA(cuda, cudaMallocHost((void **)&cuda->slot[i], CKCA__SLOT_BYTES)) &&
             CKCA__CUDA(cuda, cudaEventCreateWithFlags(&cuda->sent[i], cudaEventDisableTiming));
    cuda->dependent_launch = gpu.major >= 9 && runtime >= 12030 && driver >= 12030; /* since 12.3 in graphs, too */
    cuda->blocks = 16 * gpu.multiProcessorCount;
    if (ok) ckca__wgmma_init(cuda, &gpu);
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

/* 1: the allocation succeeded. Running out of memory leaves the context usable; any other failure is recorded. */
static int ckca__cuda_allocated(ckca__cuda *cuda, const char *call, cudaError_t status) {
    if (status == cudaSuccess) return 1;
    cudaGetLastError();
    if (status != cudaErrorMemoryAllocation && status != cudaErrorInvalidValue) ckca__cuda_check(cuda, call, status);
    return 0;
}

/* For tests: the fill byte of new memory. 0xff (NaN) exposes code that relies on zeros; -1 (none) is for initcheck. */
#ifndef CKCA_FRESH
#define CKCA_FRESH 0
#endif

CKCA__OP void *ckca__device_alloc(ckca_context *ctx, size_t bytes) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    void *memory = NULL;
    size_t total;
    if (!ckca__cuda_usable(cuda, "cudaMalloc")) return NULL;
    if (ckca__cuda_allocated(cuda, "cudaMalloc", cudaMalloc(&memory, bytes ? bytes : 1))) {
        if (CKCA_FRESH >= 0) CKCA__CUDA(cuda, cudaMemsetAsync(memory, CKCA_FRESH, bytes, ckca__cuda_stream(cuda)));
        return memory;
    }
    ctx->refused = bytes;
    if (cudaMemGetInfo(&ctx->free_bytes, &total) != cudaSuccess) ctx->free_bytes = 0, cudaGetLastError();
    return NULL;
}

CKCA__OP void ckca__device_release(ckca_context *ctx, void *memory, size_t bytes) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    (void)bytes;
    if (!memory || !ckca__cuda_same_process(cuda)) return;
    cuda->releases++;
    CKCA__CUDA(cuda, cudaFree(memory));
}

/* Small uploads are copied to pinned memory first, so the call returns while the GPU still runs earlier steps. Large
   ones (weights, a store of pictures) are rare and synchronous, so the caller may reuse host on return. */
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
    CKCA__CUDA(cuda, cudaMemcpyAsync(device, from, bytes, cudaMemcpyHostToDevice, ckca__cuda_stream(cuda)));
    if (small)
        CKCA__CUDA(cuda, cudaEventRecord(cuda->sent[slot], ckca__cuda_stream(cuda)));
    else
        CKCA__CUDA(cuda, cudaStreamSynchronize(ckca__cuda_stream(cuda)));
}

CKCA__OP void ckca__device_download(ckca_context *ctx, void *host, const void *device, size_t bytes) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    if (!bytes) return;
    CKCA__CUDA(cuda, cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, ckca__cuda_stream(cuda)));
    CKCA__CUDA(cuda, cudaStreamSynchronize(ckca__cuda_stream(cuda)));
}

CKCA__OP void ckca__device_copy(ckca_context *ctx, void *to, const void *from, size_t bytes) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    if (bytes) CKCA__CUDA(cuda, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, ckca__cuda_stream(cuda)));
}

CKCA__OP void ckca__device_zero(ckca_context *ctx, void *device, size_t bytes) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    if (bytes) CKCA__CUDA(cuda, cudaMemsetAsync(device, 0, bytes, ckca__cuda_stream(cuda)));
}

CKCA__OP size_t ckca__device_free_bytes(const ckca_context *ctx) {
    size_t free_bytes = 0, total;
    return CKCA__CUDA(ckca__cuda_of(ctx), cudaMemGetInfo(&free_bytes, &total)) ? free_bytes : 0;
}

/* ---- staging ---- */

/* Double buffering on host and device: the host fills one buffer while the other uploads and the GPU works on the batch
   before. A copy on the device keeps the input's address fixed, as CUDA graphs require. */
typedef struct ckca__staging {
    size_t bytes;
    char *host[2], *device[2];      /* pinned memory; its copy on the device */
    cudaEvent_t sent[2], copied[2]; /* the upload from host has finished; so has the copy from device */
    int next;
} ckca__staging;

CKCA__OP void ckca__device_staging_close(ckca_context *ctx, void *stage) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    ckca__staging *s = (ckca__staging *)stage;
    int i;
    if (!ckca__cuda_same_process(cuda)) {
        free(s);
        return;
    }
    CKCA__CUDA(cuda, cudaStreamSynchronize(cuda->copies));
    CKCA__CUDA(cuda, cudaStreamSynchronize(ckca__cuda_stream(cuda)));
    for (i = 0; i < 2; i++) {
        if (s->sent[i]) cudaEventDestroy(s->sent[i]);
        if (s->copied[i]) cudaEventDestroy(s->copied[i]);
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
             ckca__cuda_allocated(cuda, "cudaMallocHost", cudaMallocHost((void **)&s->host[i], bytes)) &&
             CKCA__CUDA(cuda, cudaEventCreateWithFlags(&s->sent[i], cudaEventDisableTiming)) &&
             CKCA__CUDA(cuda, cudaEventCreateWithFlags(&s->copied[i], cudaEventDisableTiming));
    /* The main stream zeroes the buffers; the copy stream writes them. */
    if (ok && CKCA__CUDA(cuda, cudaStreamSynchronize(ckca__cuda_stream(cuda)))) return s;
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
    CKCA__CUDA(cuda, cudaStreamWaitEvent(cuda->copies, s->copied[i], 0));
    CKCA__CUDA(cuda, cudaMemcpyAsync(s->device[i], s->host[i], bytes, cudaMemcpyHostToDevice, cuda->copies));
    CKCA__CUDA(cuda, cudaEventRecord(s->sent[i], cuda->copies));
    CKCA__CUDA(cuda, cudaStreamWaitEvent(ckca__cuda_stream(cuda), s->sent[i], 0));
    CKCA__CUDA(cuda, cudaMemcpyAsync(device, s->device[i], bytes, cudaMemcpyDeviceToDevice, ckca__cuda_stream(cuda)));
    CKCA__CUDA(cuda, cudaEventRecord(s->copied[i], ckca__cuda_stream(cuda)));
}

/* ---- recorded work ---- */

/* The first run executes eagerly (which triggers lazy loading); the second is captured as a CUDA graph, which is
   launched then and in every later run. After any device memory is freed, the graph is captured again. */
typedef struct ckca__recording {
    cudaGraphExec_t graph; /* NULL: not captured */
    unsigned releases;     /* cuda->releases when it was captured */
    int seen, capturing;
} ckca__recording;

static void ckca__graph_destroy(ckca__cuda *cuda, ckca__recording *r) {
    if (!r->graph || !ckca__cuda_same_process(cuda)) return;
    CKCA__CUDA(cuda, cudaStreamSynchronize(ckca__cuda_stream(cuda))); /* it may be running */
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
        CKCA__CUDA(cuda, cudaGraphLaunch(r->graph, ckca__cuda_stream(cuda)));
        return 0;
    }
    ckca__graph_destroy(cuda, r);
    r->releases = cuda->releases;
    if (r->seen++)
        r->capturing =
            CKCA__CUDA(cuda, cudaStreamBeginCapture(ckca__cuda_stream(cuda), cudaStreamCaptureModeThreadLocal));
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
    if (!CKCA__CUDA(cuda, cudaStreamEndCapture(ckca__cuda_stream(cuda), &graph))) return;
    if (CKCA__CUDA(cuda, cudaGraphInstantiate(&r->graph, graph, 0)))
        CKCA__CUDA(cuda, cudaGraphLaunch(r->graph, ckca__cuda_stream(cuda)));
    else
        r->graph = NULL;
    CKCA__CUDA(cuda, cudaGraphDestroy(graph));
}

CKCA__OP void ckca__device_forget(ckca_context *ctx, void **recording) {
    ckca__recording *r = (ckca__recording *)*recording;
    if (!r) return;
    ckca__graph_destroy(ckca__cuda_of(ctx), r);
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
#if __CUDA_ARCH__ >= 900 /* a single instruction; rna compiles to four */
    asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(word) : "f"(v));
#elif __CUDA_ARCH__ >= 800
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(v));
#endif
    return word;
}

/* Copies 16 bytes from global to shared memory asynchronously, or writes zeros unless there. ckca__copies_wait<LEFT>
   waits until at most LEFT of the groups closed by ckca__copies_commit are in flight. */
__device__ __forceinline__ void ckca__copy_chunk(uint4 *shared, const void *memory, int in_range) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
                 "l"(memory), "r"(in_range ? 16 : 0)
                 : "memory");
#else
    *shared = in_range ? *(const uint4 *)memory : make_uint4(0, 0, 0, 0);
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

/* A kernel may start before its predecessors in the stream have ended (see ckca__launch): it waits here before it reads
   or writes memory. */
__device__ __forceinline__ void ckca__wait_for_grids() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Declares name as the dynamic shared memory of the launch. */
#define CKCA__DYNAMIC_SHARED(name) extern __shared__ __align__(128) uint4 name[]

/* Loads four matrices of 8 rows of 16 bytes. Lane i passes the address of row i % 8 of matrix i / 8; v[m] receives word
   lane % 4 of row lane / 4 of matrix m. TRANSPOSED: rows hold 8 bf16 values, and v[m] receives column lane / 4 of rows
   2 (lane % 4) and 2 (lane % 4) + 1. */
template <int TRANSPOSED> __device__ __forceinline__ void ckca__load_matrices(unsigned v[4], const uint4 *row) {
    const unsigned at = (unsigned)__cvta_generic_to_shared(row);
    if constexpr (TRANSPOSED)
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

/* c += a b: a 16 x 8 tile of sums over 32 bytes of k. A *word* is one TF32 value, or two BF16 values adjacent in k, the
   first in the low 16 bits; counted in words, both instructions have the same fragment layout (PTX ISA, "Matrix
   Fragments for mma.m16n8k8" and "m16n8k16"). With g = lane / 4 and t = lane % 4, of a's 16 x 8 words: a0 = (g, t),
   a1 = (g + 8, t), a2 = (g, t + 4), a3 = (g + 8, t + 4); of b's 8 x 8: b0 = (t, g), b1 = (t + 4, g); of the sums:
   c0 = (g, 2t), c1 = (g, 2t + 1), c2 and c3 eight rows below. */
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

/* ---- Hopper only: barriers in shared memory, tensor copies (TMA), warpgroup products (wgmma) ---- */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) /* code for sm_90a */
#define CKCA__HOPPER 1
#else
#define CKCA__HOPPER 0
#endif

__device__ __forceinline__ unsigned ckca__shared_address(const void *shared) {
    return (unsigned)__cvta_generic_to_shared(shared);
}

#if CKCA__HOPPER
/* A barrier's phase ends when `arrivals` threads have arrived and all expected bytes have been copied. Phases count
   from 0; ckca__barrier_wait returns when the current phase of this parity has ended. ckca__barriers_ready makes
   new barriers visible to copies; the other threads need a __syncthreads as well. */
__device__ __forceinline__ void ckca__barrier_init(uint64_t *barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(ckca__shared_address(barrier)), "r"(arrivals)
                 : "memory");
}
__device__ __forceinline__ void ckca__barriers_ready() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void ckca__barrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(ckca__shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void ckca__barrier_expect(uint64_t *barrier, unsigned bytes) { /* and arrives */
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(ckca__shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void ckca__barrier_wait(uint64_t *barrier, unsigned parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::
            "r"(ckca__shared_address(barrier)),
        "r"(parity)
        : "memory");
}

/* Copies the box at column x and row y of a matrix (2 dimensions), or the box of pixels that starts at (w, h, n) of
   NHWC maps, shifted by a tap, from channel c on (im2col), to shared memory; then tells the barrier. One thread calls. */
__device__ __forceinline__ void ckca__copy_matrix(void *shared, const CUtensorMap *map, int x, int y,
                                                  uint64_t *barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(ckca__shared_address(shared)),
        "l"(map), "r"(x), "r"(y), "r"(ckca__shared_address(barrier))
        : "memory");
}
__device__ __forceinline__ void ckca__copy_pixels(void *shared, const CUtensorMap *map, int c, int w, int h, int n,
                                                  int tap_x, int tap_y, uint64_t *barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, "
        "%4, %5}], [%8], {%6, %7};" ::"r"(ckca__shared_address(shared)),
        "l"(map), "r"(c), "r"(w), "r"(h), "r"(n), "h"((unsigned short)tap_x), "h"((unsigned short)tap_y),
        "r"(ckca__shared_address(barrier))
        : "memory");
}

/* Products of a warpgroup (4 warps): begin after its sums' registers were written, then any number of ckca__wgmma, then
   commit closes the group; ckca__wgmma_wait<LEFT> waits until at most LEFT groups run. Until then neither the sums nor
   the factors in shared memory may change. */
__device__ __forceinline__ void ckca__wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void ckca__wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void ckca__wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

/* sums += a b: 64 rows x COLUMNS over 32 bytes of k; a and b are ckca__matrix_descriptors. Warp w of the warpgroup has
   rows 16 w to 16 w + 15; its COLUMNS / 8 tiles of 16 x 8 are distributed as in ckca__mma_tf32. */
#define CKCA__SUMS_8(s) \
    "+f"((s)[0]), "+f"((s)[1]), "+f"((s)[2]), "+f"((s)[3]), "+f"((s)[4]), "+f"((s)[5]), "+f"((s)[6]), "+f"((s)[7])
#define CKCA__SUMS_32(s) CKCA__SUMS_8(s), CKCA__SUMS_8((s) + 8), CKCA__SUMS_8((s) + 16), CKCA__SUMS_8((s) + 24)
#define CKCA__NAMES_32                                                                                               \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
    "%30,%31"
#define CKCA__NAMES_64                                                                                          \
    CKCA__NAMES_32                                                                                              \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
    "%58,%59,%60,%61,%62,%63"
#define CKCA__WGMMA_32(shape, types, major)                                                                        \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\nwgmma.mma_async.sync.aligned." shape ".f32." types \
                 " {" CKCA__NAMES_32 "}, %32, %33, add, 1, 1" major ";\n}"                                         \
                 : CKCA__SUMS_32(sums)                                                                             \
                 : "l"(a), "l"(b), "r"(1))
#define CKCA__WGMMA_64(shape, types, major)                                                                        \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\nwgmma.mma_async.sync.aligned." shape ".f32." types \
                 " {" CKCA__NAMES_64 "}, %64, %65, add, 1, 1" major ";\n}"                                         \
                 : CKCA__SUMS_32(sums), CKCA__SUMS_32(sums + 32)                                                   \
                 : "l"(a), "l"(b), "r"(1))
template <int BF16, int COLUMNS> __device__ __forceinline__ void ckca__wgmma(float *sums, uint64_t a, uint64_t b) {
    if constexpr (BF16 && COLUMNS == 128) {
        CKCA__WGMMA_64("m64n128k16", "bf16.bf16", ", 0, 0");
    } else if constexpr (BF16) {
        CKCA__WGMMA_32("m64n64k16", "bf16.bf16", ", 0, 0");
    } else if constexpr (COLUMNS == 128) {
        CKCA__WGMMA_64("m64n128k8", "tf32.tf32", "");
    } else {
        CKCA__WGMMA_32("m64n64k8", "tf32.tf32", "");
    }
}
#endif
#endif

/* Describes a factor of wgmma in shared memory: lines of 128 bytes along k, in the 128-byte swizzle (the 16-byte chunks
   of a line are XORed with the line modulo 8), which begin at a multiple of 1024 bytes, plus 32 per step along k. PTX
   ISA, "Matrix Descriptor": bits 0 to 13 the address / 16; 32 to 45 the bytes from 8 lines to the next 8, / 16; 62 and
   63 the swizzle, 1: 128 bytes; bits 16 to 29 are ignored with it. */
__device__ __forceinline__ uint64_t ckca__matrix_descriptor(unsigned address) {
    return (uint64_t)(address >> 4 & 0x3fff) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

/* Computes n / by for 0 <= n < 2^31 with a multiplication and a shift (Granlund and Montgomery 1994). */
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
/* VALUES: values of T in 16 bytes. */
template <class T> struct ckca__chunk {
    enum { VALUES = 16 / sizeof(T) };
};

/* A compile-time integer that can be passed to a generic lambda. */
template <int N> struct ckca__constant {
    enum { VALUE = N };
};

/* WIDTH adjacent values in registers: a 16-byte chunk of floats (4) or bf16 values (8), two, or one; memory must be
   aligned to WIDTH values. Kernels are written once for all widths and both types. */
template <int WIDTH> struct ckca__lane {
    float v[WIDTH];
    __device__ __forceinline__ ckca__lane() {}
    __device__ __forceinline__ explicit ckca__lane(const float *from) {
        if constexpr (WIDTH >= 4) {
            for (int j = 0; j < WIDTH; j += 4) {
                const float4 q = *(const float4 *)(from + j);
                v[j] = q.x, v[j + 1] = q.y, v[j + 2] = q.z, v[j + 3] = q.w;
            }
        } else if constexpr (WIDTH == 2) {
            const float2 q = *(const float2 *)from;
            v[0] = q.x, v[1] = q.y;
        } else {
            for (int j = 0; j < WIDTH; j++) v[j] = from[j];
        }
    }
    __device__ __forceinline__ explicit ckca__lane(const ckca__bf16 *from) {
        if constexpr (WIDTH == 8) {
            const uint4 q = *(const uint4 *)from;
            const unsigned word[4] = {q.x, q.y, q.z, q.w};
            for (int j = 0; j < 4; j++) {
                v[2 * j] = __uint_as_float(word[j] << 16);
                v[2 * j + 1] = __uint_as_float(word[j] & 0xffff0000);
            }
        } else {
            for (int j = 0; j < WIDTH; j++) v[j] = ckca__to_float(from[j]);
        }
    }
    __device__ __forceinline__ void store(float *to) const {
        if constexpr (WIDTH >= 4) {
            for (int j = 0; j < WIDTH; j += 4) *(float4 *)(to + j) = make_float4(v[j], v[j + 1], v[j + 2], v[j + 3]);
        } else if constexpr (WIDTH == 2) {
            *(float2 *)to = make_float2(v[0], v[1]);
        } else {
            *to = v[0];
        }
    }
    __device__ __forceinline__ void store(ckca__bf16 *to) const {
        if constexpr (WIDTH == 8) {
            *(uint4 *)to = make_uint4(ckca__to_bf16x2(v[0], v[1]), ckca__to_bf16x2(v[2], v[3]),
                                      ckca__to_bf16x2(v[4], v[5]), ckca__to_bf16x2(v[6], v[7]));
        } else if constexpr (WIDTH == 2) {
            *(unsigned *)to = ckca__to_bf16x2(v[0], v[1]);
        } else {
            for (int j = 0; j < WIDTH; j++) ckca__put(to + j, v[j]);
        }
    }
};

/* The same, not yet converted, so that several loads are in flight before the first value is used. */
template <class T, int WIDTH> struct ckca__raw {
    uint4 chunk;
    __device__ __forceinline__ ckca__raw() {}
    __device__ __forceinline__ explicit ckca__raw(const T *from) : chunk(*(const uint4 *)from) {}
    __device__ __forceinline__ ckca__lane<WIDTH> values() const {
        const unsigned word[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
        ckca__lane<WIDTH> v;
        for (int j = 0; j < WIDTH; j++) {
            if constexpr (sizeof(T) == sizeof(float)) {
                v.v[j] = __uint_as_float(word[j]);
            } else {
                v.v[j] = __uint_as_float(j % 2 ? word[j / 2] & 0xffff0000 : word[j / 2] << 16);
            }
        }
        return v;
    }
};
template <class T> struct ckca__raw<T, 1> {
    T value;
    __device__ __forceinline__ ckca__raw() {}
    __device__ __forceinline__ explicit ckca__raw(const T *from) : value(*from) {}
    __device__ __forceinline__ ckca__lane<1> values() const { return ckca__lane<1>(&value); }
};

/* Batch norm of one value, scale = gamma inv_std. Forward and backward share it, so that a ReLU mask recomputed from x
   equals the forward pass's bit for bit. */
__device__ __forceinline__ float ckca__normalise(float x, float mean, float scale, float beta) {
    return fmaf(x - mean, scale, beta);
}

/* v rounded to T, as a later load would return it. */
template <class T> __device__ __forceinline__ float ckca__stored(float v) {
    T to;
    ckca__put(&to, v);
    return ckca__to_float(to);
}

/* Loads floats written by other blocks of the same kernel, from L2: L1 is not coherent between multiprocessors. */
template <int WIDTH> __device__ __forceinline__ ckca__lane<WIDTH> ckca__load_l2(const float *from) {
    ckca__lane<WIDTH> v;
    if constexpr (WIDTH == 4) {
        const float4 q = __ldcg((const float4 *)from);
        v.v[0] = q.x, v.v[1] = q.y, v.v[2] = q.z, v.v[3] = q.w;
    } else {
        for (int j = 0; j < WIDTH; j++) v.v[j] = __ldcg(from + j);
    }
    return v;
}

/* Each of `blocks` blocks calls this once, after it has written its part of a result. Returns 1 in the last block,
   which can then read all parts; the result must not depend on which block that is. Resets the ticket to 0. */
__device__ __forceinline__ int ckca__is_last(unsigned *ticket, unsigned blocks) {
    __shared__ unsigned taken;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) taken = atomicInc(ticket, blocks - 1);
    __syncthreads();
    __threadfence();
    return taken == blocks - 1;
}

/* ---- statistics of a tensor's channels ---- */

/* Merges the statistics of count parts of per rows each, fewer in the last ones, rows in all (Chan, Golub, LeVeque
   1979). part[i * apart] is part i's mean of this thread's channel, part[i * apart + squares] its sum of (x - mean)^2.
   Threads with equal threadIdx.x % channels share a channel; the first `channels` threads return the result. scratch: 3
   doubles per thread. */
template <int THREADS>
__device__ __forceinline__ void ckca__merge_statistics(const float *part, size_t stride, size_t squares, int channels,
                                                       int count, double per, double rows, double *scratch,
                                                       double *mean, double *square) {
    const int me = (int)threadIdx.x;
    const double shift = __ldcg(part);
    double d = 0, dd = 0, q = 0;
#pragma unroll 4
    for (int i = me / channels; i < count; i += THREADS / channels) {
        const double left = rows - i * per, n = left < per ? (left > 0 ? left : 0) : per;
        const double off = __ldcg(part + i * stride) - shift;
        d += n * off;
        dd += n * off * off;
        q += __ldcg(part + i * stride + squares);
    }
    __syncthreads(); /* scratch may still be in use */
    scratch[me] = d;
    scratch[THREADS + me] = dd;
    scratch[2 * THREADS + me] = q;
    __syncthreads();
    for (int i = me + channels; i < THREADS && me < channels; i += channels) {
        d += scratch[i];
        dd += scratch[THREADS + i];
        q += scratch[2 * THREADS + i];
    }
    *mean = shift + d / rows;
    *square = q + dd - d * d / rows;
}

__device__ __forceinline__ void ckca__store_statistics(const ckca__statistics &s, int c, double mean, double square,
                                                       double rows) {
    const double var = square < 0 ? 0 : square / rows, unbiased = rows > 1 ? var * rows / (rows - 1) : var;
    s.mean[c] = (float)mean;
    s.inv_std[c] = (float)(1 / sqrt(var + 1e-5));
    s.running_mean[c] += (float)(0.1 * (mean - s.running_mean[c]));
    s.running_var[c] += (float)(0.1 * (unbiased - s.running_var[c]));
}

/* Calls f with a value of the feature maps' type. */
template <class F> static void ckca__dispatch_type(int bf16, F f) {
    if (bf16)
        f(ckca__bf16());
    else
        f(float());
}

/* ------------------------------------------------------------------------------------------------------------------
   GEMM: out (rows x columns) = the sum over k of A (rows x k) B (k x columns)

       pass       rows                 columns   k               A                            B
       FORWARD    output pixels        K         R S C           x under the taps             w
       DATA       input pixels         C         taps K          dy over the taps             w, as C x R x S x K
       WEIGHT     R S C                K         output pixels   x under tap and pixel        dy

   A is never stored: its elements are loaded from x or dy on demand (implicit GEMM). At stride s an input pixel depends
   only on the taps of its phase (every s-th tap); in DATA, blockIdx.z selects one of the s x s phases, each a GEMM of
   its own, so no work is spent on zeros. In WEIGHT, blockIdx.z selects a split of the pixels.

   A block computes 128 rows x COLUMNS (16, 32, 64 or 128) columns in stages of k. It has three parts:
       loader      ckca__along (FORWARD, DATA) or ckca__across (WEIGHT) copies stages to shared memory (cp.async), two
                   stages ahead of the multiplication
       main loop   ckca__multiply_tensor or ckca__multiply_floats adds a stage's products to the sums in registers; at
                   128 columns each warp holds 64 x 64 sums
       epilogue    ckca__sums_to_tile writes the sums to shared memory in the output's layout; ckca__finish_rows or
                   ckca__finish_weights reads them back 16 bytes at a time. ckca__finish adds residual and bias and
                   applies ReLU.

   The loader copies 16-byte *chunks*, contiguous in memory. In FORWARD and DATA a chunk runs along k, and a stage holds
   one line of CHUNKS chunks per row of A and column of B; in WEIGHT a chunk runs along rows or columns, and a stage
   holds DEPTH lines of 128 values of A and of COLUMNS values of B. The chunks of a line are swizzled to avoid bank
   conflicts. Channels of x that do not fill whole chunks are first padded with zeros (ckca__pad_channels); where K does
   not fill whole chunks, DATA and WEIGHT load value by value (WHOLE = 0).
   ------------------------------------------------------------------------------------------------------------------ */

enum { CKCA__PASS_FORWARD, CKCA__PASS_DATA, CKCA__PASS_WEIGHT };
enum { CKCA__ROWS = 128, CKCA__GEMM_STAGES = 3 };

typedef struct ckca__gemm {
    ckca__conv s;
    const void *a, *b;    /* the tensors behind A and B in the table above */
    const float *bias;    /* FORWARD: K, or NULL */
    const void *residual; /* FORWARD: as the output, or NULL */
    void *out;            /* the output; WEIGHT: the splits' partial sums, K x R S C each */
    float *dw;            /* WEIGHT: K x R S x channels, channels <= C */
    int channels;
    int relu, accumulate;        /* FORWARD; DATA: add to out */
    int split, splits, group;    /* WEIGHT: pixels per split; splits. Parts per group of a two-level sum */
    int column_blocks;           /* blocks along the columns */
    ckca__divisor q, p;          /* width and height of the output (DATA: of the input) */
    ckca__statistics statistics; /* FORWARD: of the output, if part is not NULL */
    float *part;                 /* per block of rows: mean and sum of squared deviations, K each */
    unsigned *tickets;
} ckca__gemm;

/* One axis of a phase. It has count outputs; output i has coordinate at + spread i and sums over t < taps the products
   of source pixel i stride + from + t with tap first + step t of w. */
typedef struct ckca__phase {
    int taps, first, step, from, at, spread, count, stride;
} ckca__phase;

CKCA__BOTH ckca__phase ckca__phase_of(int pass, int phase, int taps, int stride, int pad, int outputs) {
    ckca__phase v;
    if (pass == CKCA__PASS_DATA) {
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

/* FORWARD and DATA: the pixel of its phase that a row stands for; n >= g.s.n where the row is past the last pixel. */
struct ckca__output {
    int n, y, x;
    __device__ ckca__output(const ckca__gemm &g, int pass, const ckca__phase &py, const ckca__phase &px, int row) {
        int line;
        if (pass == CKCA__PASS_DATA && g.s.stride > 1) {
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

/* The type of a convolution's feature maps and of its factors in shared memory. */
template <int PRECISION> struct ckca__factor { typedef float type; };
template <> struct ckca__factor<CKCA_PRECISION_BF16> { typedef ckca__bf16 type; };

/* Compile-time shape of a block and its stages. */
template <int PRECISION_, int PASS_, int COLUMNS_, int WHOLE_> struct ckca__block {
    typedef typename ckca__factor<PRECISION_>::type T;
    static constexpr int
        PRECISION = PRECISION_,
        PASS = PASS_,
        COLUMNS = COLUMNS_,
        WHOLE = WHOLE_,
        TENSOR = PRECISION != CKCA_PRECISION_FLOAT32,
        THREADS = TENSOR ? 128 : 256,
        BLOCKS = TENSOR && COLUMNS < 64 ? 3 : 2, /* minimum per multiprocessor */
        VALUES = ckca__chunk<T>::VALUES,
        CHUNKS = TENSOR && COLUMNS >= 64 ? 8 : 4, /* along k in a stage (FORWARD, DATA) */
        DEPTH = CHUNKS * VALUES,
        CHUNKS_A = CKCA__ROWS / VALUES, /* WEIGHT: chunks in a line of A and of B */
        CHUNKS_B = COLUMNS / VALUES,
        WARPS_ACROSS = COLUMNS >= 64 ? 2 : 1, /* tensor cores: of 4 warps, each of ROW_TILES x COLUMN_TILES mma tiles */
        ROW_TILES = CKCA__ROWS * WARPS_ACROSS / 64,
        COLUMN_TILES = COLUMNS / WARPS_ACROSS / 8,
        THREAD_COLUMNS = COLUMNS / 16, /* FFMA: each of 16 x 16 threads has 8 x THREAD_COLUMNS sums */
        SUMS = TENSOR ? ROW_TILES * COLUMN_TILES * 4 : 8 * THREAD_COLUMNS,
        WORDS = TENSOR && VALUES == 4 && PASS == CKCA__PASS_WEIGHT, /* fragments gather words from several lines */
        STAGE_A = CKCA__ROWS * CHUNKS,
        STAGE = STAGE_A + COLUMNS * CHUNKS, /* chunks */
        LINES = PASS == CKCA__PASS_WEIGHT ? COLUMNS : CKCA__ROWS, /* the epilogue's tile: LINES x LENGTH floats */
        LENGTH = PASS == CKCA__PASS_WEIGHT ? CKCA__ROWS : COLUMNS,
        PITCH = LENGTH + 8,
        BYTES =
            CKCA__GEMM_STAGES * STAGE * 16 > LINES * PITCH * 4 ? CKCA__GEMM_STAGES * STAGE * 16 : LINES * PITCH * 4;
    /* The swizzle: a line's value is XORed into its chunk indices. lines_of serves reads of one chunk column over 8
       lines; words_of serves WORDS, where a read covers 4 lines of k. */
    static __device__ __forceinline__ int lines_of(int chunks, int line) {
        return chunks >= 8 ? line % 8 : line * chunks / 8 % chunks;
    }
    static __device__ __forceinline__ int words_of(int vectors, int line) {
        return vectors == 2 ? (line & 1) | (line & 2) << 1 : vectors == 1 ? line % 4 * 2 : line & 2;
    }
    static __device__ __forceinline__ int swizzle_a(int line) {
        if (PASS != CKCA__PASS_WEIGHT) return lines_of(CHUNKS, line);
        return WORDS ? words_of(ROW_TILES / 2, line) : TENSOR ? lines_of(CHUNKS_A, line) : 0;
    }
    static __device__ __forceinline__ int swizzle_b(int line) {
        if (PASS != CKCA__PASS_WEIGHT) return lines_of(CHUNKS, line);
        return WORDS ? words_of(COLUMN_TILES / 4, line) : TENSOR ? lines_of(CHUNKS_B, line) : 0;
    }
};

/* ---- loader ---- */

/* FORWARD and DATA: a position along k = (tap y, tap x, channel), with its offset in A's tensor from the pixel under
   the first tap, and its offset in the weights of a column. */
struct ckca__k_position {
    int y, x, c;
    int source, weight;
};

/* Advances a position along k. */
struct ckca__k_iterator {
    int channels, taps_x;
    int next_row, weight_tap, weight_row; /* extra offsets at the start of a row of taps (source), tap, row (weights) */

    __device__ ckca__k_iterator(const ckca__gemm &g, const ckca__phase &py, const ckca__phase &px, int channels_,
                                int width)
        : channels(channels_), taps_x(px.taps > 0 ? px.taps : 1) {
        next_row = (width - taps_x) * channels;
        weight_tap = (px.step - 1) * channels; /* taps ascend in the source, but may descend in the weights */
        weight_row = (py.step * g.s.s - px.step * taps_x) * channels;
    }
    __device__ __forceinline__ void advance(ckca__k_position &at, int by) const {
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

/* FORWARD and DATA: one thread's share of the loader: a chunk along k in every LINE_STRIDE-th line of A and B. */
template <class B> struct ckca__along {
    typedef typename B::T T;
    enum {
        LINE_STRIDE = B::THREADS / B::CHUNKS, /* lines that the block loads at once */
        ROWS = CKCA__ROWS / LINE_STRIDE,
        LINES = (B::COLUMNS + LINE_STRIDE - 1) / LINE_STRIDE
    };
    const ckca__gemm &g;
    const ckca__k_iterator walk;
    const int taps_y, h, w, columns, line, column, to;
    int pixel[ROWS], y[ROWS], x[ROWS]; /* per row: the pixel under the first tap, its y and x */
    ckca__k_position k;

    __device__ ckca__along(const ckca__gemm &g_, const ckca__phase &py, const ckca__phase &px, int row0, int column0)
        : g(g_),
          walk(g_, py, px, B::PASS == CKCA__PASS_DATA ? g_.s.k : g_.s.c, B::PASS == CKCA__PASS_DATA ? g_.s.q : g_.s.w),
          taps_y(py.taps), h(B::PASS == CKCA__PASS_DATA ? g.s.p : g.s.h), w(B::PASS == CKCA__PASS_DATA ? g.s.q : g.s.w),
          columns(B::PASS == CKCA__PASS_DATA ? g.s.c : g.s.k), line((int)threadIdx.x / B::CHUNKS),
          column(column0 + line), to(line * B::CHUNKS + ((int)threadIdx.x % B::CHUNKS ^ B::swizzle_a(line))) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const ckca__output at(g, B::PASS, py, px, row0 + line + i * LINE_STRIDE);
            y[i] = at.n < g.s.n ? at.y * py.stride + py.from : -(1 << 29); /* always outside */
            x[i] = at.x * px.stride + px.from;
            pixel[i] = at.n < g.s.n ? (at.n * h + y[i]) * w + x[i] : 0;
        }
        k.y = k.x = k.c = k.source = 0;
        k.weight = (py.first * g.s.s + px.first) * walk.channels;
        walk.advance(k, (int)threadIdx.x % B::CHUNKS * B::VALUES);
    }
    __device__ __forceinline__ int is_inside(int i, const ckca__k_position &at) const {
        return at.y < taps_y && (unsigned)(y[i] + at.y) < (unsigned)h && (unsigned)(x[i] + at.x) < (unsigned)w;
    }
    /* LINE_STRIDE is a multiple of 8, so all lines of a thread have the same swizzle. */
    __device__ __forceinline__ void fetch(uint4 *stage) {
        const ptrdiff_t taps = (ptrdiff_t)g.s.r * g.s.s * walk.channels;
        const T *source = (const T *)g.a + k.source, *from = (const T *)g.b + column * taps;
        uint4 *a = stage + to, *b = a + B::STAGE_A;
#pragma unroll
        for (int i = 0; i < ROWS; i++, a += LINE_STRIDE * B::CHUNKS) {
            if constexpr (B::WHOLE) {
                ckca__copy_chunk(a, source + (ptrdiff_t)pixel[i] * walk.channels, is_inside(i, k));
            } else {
                ckca__k_position at = k;
#pragma unroll 1 /* rarely run: compiles in a fraction of the time */
                for (int j = 0; j < B::VALUES; j++, walk.advance(at, 1)) {
                    if (is_inside(i, at)) {
                        ((T *)a)[j] = ((const T *)g.a)[(ptrdiff_t)pixel[i] * walk.channels + at.source];
                    } else {
                        ckca__put((T *)a + j, 0);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < LINES; i++, b += LINE_STRIDE * B::CHUNKS, from += LINE_STRIDE * taps) {
            const int is_column = column + i * LINE_STRIDE < columns;
            if (B::COLUMNS < LINE_STRIDE && line >= B::COLUMNS) break;
            if constexpr (B::WHOLE) {
                ckca__copy_chunk(b, from + k.weight, is_column && k.y < taps_y);
            } else {
                ckca__k_position at = k;
#pragma unroll 1 /* rarely run: compiles in a fraction of the time */
                for (int j = 0; j < B::VALUES; j++, walk.advance(at, 1)) {
                    if (is_column && at.y < taps_y) {
                        ((T *)b)[j] = from[at.weight];
                    } else {
                        ckca__put((T *)b + j, 0);
                    }
                }
            }
        }
        walk.advance(k, B::DEPTH);
    }
};

/* WEIGHT: one thread's share of the loader: one chunk of rows and one of columns in some lines (pixels). */
template <class B> struct ckca__across {
    typedef typename B::T T;
    enum {
        LINE_STRIDE_A = B::THREADS / B::CHUNKS_A,
        LINE_STRIDE_B = B::THREADS / B::CHUNKS_B,
        ROWS = B::WHOLE ? 1 : B::VALUES /* loaded one by one; a whole chunk lies under a single tap */
    };
    const ckca__gemm &g;
    int pixel, end, column;
    int tap_y[ROWS], tap_x[ROWS], c[ROWS];
    __device__ ckca__across(const ckca__gemm &g_, int row0, int column0, int begin, int end_)
        : g(g_), pixel(begin), end(end_), column(column0 + (int)threadIdx.x % B::CHUNKS_B * B::VALUES) {
#pragma unroll
        for (int j = 0; j < ROWS; j++) {
            const int row = row0 + (int)threadIdx.x % B::CHUNKS_A * B::VALUES + j, tap = row / g.s.c;
            c[j] = row % g.s.c;
            tap_y[j] = tap < g.s.r * g.s.s ? tap / g.s.s - g.s.pad : -(1 << 29); /* past the last row: always outside */
            tap_x[j] = tap % g.s.s - g.s.pad;
        }
    }
    __device__ __forceinline__ void fetch(uint4 *stage) {
#pragma unroll(B::WHOLE ? B::DEPTH / LINE_STRIDE_A : 1)
        for (int i = 0; i < B::DEPTH / LINE_STRIDE_A; i++) {
            const int line = (int)threadIdx.x / B::CHUNKS_A + i * LINE_STRIDE_A, k = pixel + line;
            const int above = ckca__quotient(k, g.q), n = ckca__quotient(above, g.p);
            const int y = (above - n * g.s.p) * g.s.stride, x = (k - above * g.s.q) * g.s.stride;
            uint4 *to = stage + line * B::CHUNKS_A + ((int)threadIdx.x % B::CHUNKS_A ^ B::swizzle_a(line));
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                const int sy = y + tap_y[j], sx = x + tap_x[j];
                const int in_range = k < end && (unsigned)sy < (unsigned)g.s.h && (unsigned)sx < (unsigned)g.s.w;
                const ptrdiff_t at = (((ptrdiff_t)n * g.s.h + sy) * g.s.w + sx) * g.s.c + c[j];
                if constexpr (B::WHOLE) {
                    ckca__copy_chunk(to, (const T *)g.a + at, in_range);
                } else if (!in_range) {
                    ckca__put((T *)to + j, 0);
                } else if (sizeof(T) == sizeof(ckca__bf16) && g.s.bf16_x) {
                    ((T *)to)[j] = ((const T *)g.a)[at];
                } else {
                    ckca__put((T *)to + j, ((const float *)g.a)[at]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < (B::DEPTH + LINE_STRIDE_B - 1) / LINE_STRIDE_B; i++) {
            const int line = (int)threadIdx.x / B::CHUNKS_B + i * LINE_STRIDE_B, k = pixel + line;
            const T *from = (const T *)g.b + (size_t)k * g.s.k + column;
            uint4 *to =
                stage + B::STAGE_A + line * B::CHUNKS_B + ((int)threadIdx.x % B::CHUNKS_B ^ B::swizzle_b(line));
            if (B::DEPTH < LINE_STRIDE_B && line >= B::DEPTH) break;
            if constexpr (B::WHOLE) {
                ckca__copy_chunk(to, from, k < end && column < g.s.k);
            } else {
#pragma unroll 1
                for (int j = 0; j < B::VALUES; j++) {
                    if (k < end && column + j < g.s.k) {
                        ((T *)to)[j] = from[j];
                    } else {
                        ckca__put((T *)to + j, 0);
                    }
                }
            }
        }
        pixel += B::DEPTH;
    }
};

/* ---- main loop ---- */

/* Adds a stage's products to this thread's sums. A fragment's word is 4 bytes along k, see ckca__mma_tf32. */
template <class B> __device__ __forceinline__ void ckca__multiply_tensor(const uint4 *a, const uint4 *b, float *sums) {
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int row = warp / B::WARPS_ACROSS * B::ROW_TILES * 16, column = warp % B::WARPS_ACROSS * B::COLUMN_TILES * 8;
#pragma unroll
    for (int step = 0; step < B::CHUNKS / 2; step++) { /* 32 bytes of k */
        unsigned x[B::ROW_TILES][4], y[B::COLUMN_TILES][2];
        if constexpr (B::WORDS) { /* a lane's rows are adjacent, and so are its columns: see ckca__sums_to_tile */
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int line = step * 8 + half * 4 + lane % 4;
                const uint4 *from_a = a + line * B::CHUNKS_A, *from_b = b + line * B::CHUNKS_B;
#pragma unroll
                for (int q = 0; q < B::ROW_TILES / 2; q++) {
                    const int chunk = row / 4 + lane / 4 * (B::ROW_TILES / 2) + q;
                    const uint4 v = from_a[chunk ^ B::swizzle_a(lane % 4)];
                    x[2 * q][half * 2] = v.x, x[2 * q][half * 2 + 1] = v.y;
                    x[2 * q + 1][half * 2] = v.z, x[2 * q + 1][half * 2 + 1] = v.w;
                }
                if constexpr (B::COLUMN_TILES >= 4) {
#pragma unroll
                    for (int q = 0; q < B::COLUMN_TILES / 4; q++) {
                        const int chunk = column / 4 + lane / 4 * (B::COLUMN_TILES / 4) + q;
                        const uint4 v = from_b[chunk ^ B::swizzle_b(lane % 4)];
                        y[4 * q][half] = v.x, y[4 * q + 1][half] = v.y;
                        y[4 * q + 2][half] = v.z, y[4 * q + 3][half] = v.w;
                    }
                } else {
                    const int chunk = column / 4 + lane / 8;
                    const uint2 v =
                        ((const uint2 *)(from_b + (chunk ^ B::swizzle_b(lane % 4))))[lane / 4 % 2];
                    y[0][half] = v.x, y[1][half] = v.y;
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < B::ROW_TILES; i++) {
                if constexpr (B::PASS == CKCA__PASS_WEIGHT) {
                    const int chunk = (row + i * 16) / B::VALUES + lane / 8 % 2;
                    ckca__load_matrices<1>(x[i], a + (step * 16 + lane / 16 * 8 + lane % 8) * B::CHUNKS_A +
                                                     (chunk ^ B::swizzle_a(lane % 8)));
                } else {
                    ckca__load_matrices<0>(x[i], a + (row + i * 16 + lane % 16) * B::CHUNKS +
                                                     ((step * 2 + lane / 16) ^ B::swizzle_a(lane % 8)));
                }
            }
#pragma unroll
            for (int j = 0; j < B::COLUMN_TILES; j += 2) { /* both words of tile j, then of tile j + 1 */
                if constexpr (B::PASS == CKCA__PASS_WEIGHT) {
                    const int chunk = (column + j * 8) / B::VALUES + lane / 16;
                    ckca__load_matrices<1>(
                        y[j], b + (step * 16 + lane % 16) * B::CHUNKS_B + (chunk ^ B::swizzle_b(lane % 8)));
                } else {
                    ckca__load_matrices<0>(y[j], b + (column + j * 8 + lane / 16 * 8 + lane % 8) * B::CHUNKS +
                                                     ((step * 2 + lane / 8 % 2) ^ B::swizzle_b(lane % 8)));
                }
            }
        }
        if constexpr (B::PRECISION == CKCA_PRECISION_TF32) {
#pragma unroll
            for (int i = 0; i < B::ROW_TILES * 4; i++)
                x[i / 4][i % 4] = ckca__to_tf32(__uint_as_float(x[i / 4][i % 4]));
#pragma unroll
            for (int j = 0; j < B::COLUMN_TILES * 2; j++)
                y[j / 2][j % 2] = ckca__to_tf32(__uint_as_float(y[j / 2][j % 2]));
        }
#pragma unroll
        for (int i = 0; i < B::ROW_TILES; i++) {
#pragma unroll
            for (int j = 0; j < B::COLUMN_TILES; j++) {
                if constexpr (B::PRECISION == CKCA_PRECISION_TF32) {
                    ckca__mma_tf32(sums + (i * B::COLUMN_TILES + j) * 4, x[i], y[j]);
                } else {
                    ckca__mma_bf16(sums + (i * B::COLUMN_TILES + j) * 4, x[i], y[j]);
                }
            }
        }
    }
}

/* In FORWARD and DATA a thread has every 16th row and column, so that a warp reads two adjacent lines of A at once; in
   WEIGHT its rows and its columns are adjacent. */
template <class B> __device__ __forceinline__ void ckca__multiply_floats(const uint4 *a, const uint4 *b, float *sums) {
    const int thread_row = (int)threadIdx.x / 16, thread_column = (int)threadIdx.x % 16;
    if constexpr (B::PASS != CKCA__PASS_WEIGHT) {
        const uint4 *from_a = a + thread_row * B::CHUNKS, *from_b = b + thread_column * B::CHUNKS;
        const int swizzle_a = B::swizzle_a(thread_row),
                  swizzle_b = B::swizzle_b(thread_column); /* the same in every 16th line */
#pragma unroll 2
        for (int chunk = 0; chunk < B::CHUNKS; chunk++) {
            float y[4][B::THREAD_COLUMNS];
#pragma unroll
            for (int j = 0; j < B::THREAD_COLUMNS; j++) {
                const ckca__lane<4> four((const float *)(from_b + j * 16 * B::CHUNKS + (chunk ^ swizzle_b)));
                for (int e = 0; e < 4; e++) y[e][j] = four.v[e];
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const ckca__lane<4> x((const float *)(from_a + i * 16 * B::CHUNKS + (chunk ^ swizzle_a)));
                for (int e = 0; e < 4; e++)
                    for (int j = 0; j < B::THREAD_COLUMNS; j++) sums[i * B::THREAD_COLUMNS + j] += x.v[e] * y[e][j];
            }
        }
    } else {
#pragma unroll 4
        for (int k = 0; k < B::DEPTH; k++) {
            const ckca__lane<8> x((const float *)(a + k * B::CHUNKS_A) + thread_row * 8);
            const ckca__lane<B::THREAD_COLUMNS> y((const float *)(b + k * B::CHUNKS_B) +
                                                  thread_column * B::THREAD_COLUMNS);
            for (int i = 0; i < 8; i++)
                for (int j = 0; j < B::THREAD_COLUMNS; j++) sums[i * B::THREAD_COLUMNS + j] += x.v[i] * y.v[j];
        }
    }
}

/* ---- epilogue ---- */

/* Writes the sums to the shared tile, LINES lines of PITCH floats. Loops over sums must be fully unrolled: a run-time
   index would move them from registers to local memory. */
template <class B> __device__ __forceinline__ void ckca__sums_to_tile(const float *sums, float *tile) {
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int row = warp / B::WARPS_ACROSS * B::ROW_TILES * 16, column = warp % B::WARPS_ACROSS * B::COLUMN_TILES * 8;
    const int thread_row = (int)threadIdx.x / 16, thread_column = (int)threadIdx.x % 16;
    if constexpr (!B::TENSOR) {
#pragma unroll
        for (int i = 0; i < 8 * B::THREAD_COLUMNS; i++) {
            if constexpr (B::PASS == CKCA__PASS_WEIGHT) {
                tile[(thread_column * B::THREAD_COLUMNS + i % B::THREAD_COLUMNS) * B::PITCH + thread_row * 8 +
                     i / B::THREAD_COLUMNS] = sums[i];
            } else {
                tile[(thread_row + i / B::THREAD_COLUMNS * 16) * B::PITCH + thread_column +
                     i % B::THREAD_COLUMNS * 16] = sums[i];
            }
        }
    } else if constexpr (B::WORDS) { /* a lane's row r is row r % 2 * 8 + lane / 4 of tile r / 2; columns likewise */
#pragma unroll
        for (int j = 0; j < 2 * B::COLUMN_TILES; j++) {
            float *to =
                tile +
                (column + (lane % 4 * 2 + j / B::COLUMN_TILES) * B::COLUMN_TILES + j % B::COLUMN_TILES) * B::PITCH +
                row + lane / 4 * 2 * B::ROW_TILES;
#pragma unroll
            for (int r = 0; r < 2 * B::ROW_TILES; r++)
                to[r] = sums[(r / 2 * B::COLUMN_TILES + j % B::COLUMN_TILES) * 4 + r % 2 * 2 + j / B::COLUMN_TILES];
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2 * B::ROW_TILES * B::COLUMN_TILES; i++) { /* a tile's upper 8 rows, then its lower 8 */
            const int y = row + i / 2 / B::COLUMN_TILES * 16 + i % 2 * 8 + lane / 4;
            const int x = column + i / 2 % B::COLUMN_TILES * 8 + lane % 4 * 2;
            if constexpr (B::PASS == CKCA__PASS_WEIGHT) {
                tile[x * B::PITCH + y] = sums[i * 2];
                tile[(x + 1) * B::PITCH + y] = sums[i * 2 + 1];
            } else {
                *(float2 *)(tile + y * B::PITCH + x) = make_float2(sums[i * 2], sums[i * 2 + 1]);
            }
        }
    }
}

/* FORWARD and DATA: the output pixel of a row, counted in memory order; -1: the row is past the last pixel. */
template <int PASS>
__device__ __forceinline__ ptrdiff_t ckca__gemm_line(const ckca__gemm &g, const ckca__phase &py, const ckca__phase &px,
                                                     int row) {
    if (PASS == CKCA__PASS_FORWARD || g.s.stride == 1) /* rows are in memory order */
        return row < g.s.n * (int)(g.p.by * g.q.by) ? row : -1;
    const ckca__output at(g, PASS, py, px, row);
    return at.n < g.s.n ? ((ptrdiff_t)at.n * g.s.h + py.at + at.y * py.spread) * g.s.w + px.at + at.x * px.spread : -1;
}

/* FORWARD and DATA: adds residual or previous gradient and bias, applies ReLU to WIDTH values for output index at. */
template <class T, int PASS, int WIDTH>
__device__ __forceinline__ void ckca__finish(const ckca__gemm &g, ckca__lane<WIDTH> &v, size_t at, int column) {
    if (PASS == CKCA__PASS_DATA ? g.accumulate : g.residual != NULL) {
        const ckca__lane<WIDTH> previous((const T *)(PASS == CKCA__PASS_DATA ? g.out : g.residual) + at);
        for (int j = 0; j < WIDTH; j++) v.v[j] += previous.v[j];
    }
    if (PASS == CKCA__PASS_FORWARD && g.bias)
        for (int j = 0; j < WIDTH; j++) v.v[j] += g.bias[column + j];
    if (PASS == CKCA__PASS_FORWARD && g.relu)
        for (int j = 0; j < WIDTH; j++) v.v[j] = v.v[j] <= 0 ? 0 : v.v[j]; /* NaN stays NaN */
}

/* Merges the blocks' statistics in two levels: each group's last block merges the group, the last block of all merges
   the groups. */
template <int THREADS, int COLUMNS>
__device__ __forceinline__ void ckca__finish_statistics(const ckca__gemm &g, int rows, int column0, double *scratch) {
    const int block = (int)blockIdx.x / g.column_blocks, blocks = (rows + CKCA__ROWS - 1) / CKCA__ROWS;
    const int groups = (blocks + g.group - 1) / g.group, first = block / g.group * g.group;
    const int members = blocks - first < g.group ? blocks - first : g.group, me = (int)threadIdx.x;
    const int column = column0 + me % COLUMNS, in_range = column < g.s.k, left = rows - first * CKCA__ROWS;
    const size_t pitch = 2 * (size_t)g.s.k;
    unsigned *tickets = g.tickets + (size_t)((int)blockIdx.x % g.column_blocks) * (groups + 1);
    float *part = g.part + (in_range ? column : 0);
    double mean, square;
    if (!ckca__is_last(tickets + block / g.group, members)) return;
    ckca__merge_statistics<THREADS>(part + first * pitch, pitch, (size_t)g.s.k, COLUMNS, members, CKCA__ROWS,
                                    left < members * CKCA__ROWS ? left : members * CKCA__ROWS, scratch, &mean, &square);
    if (groups > 1) {
        if (me < COLUMNS && in_range) part[first * pitch] = (float)mean, part[first * pitch + g.s.k] = (float)square;
        if (!ckca__is_last(tickets + groups, groups)) return;
        ckca__merge_statistics<THREADS>(part, g.group * pitch, (size_t)g.s.k, COLUMNS, groups,
                                        (double)g.group * CKCA__ROWS, rows, scratch, &mean, &square);
    }
    if (me < COLUMNS && in_range) ckca__store_statistics(g.statistics, column, mean, square, rows);
}

/* Writes the tile's rows to the output and, in FORWARD with g.part, computes the statistics of its columns. A thread
   has the same columns in all its rows. */
template <class B, int WIDTH>
__device__ __forceinline__ void ckca__finish_rows(const ckca__gemm &g, const ckca__phase &py, const ckca__phase &px,
                                                  int row0, int column0, float *tile) {
    typedef typename B::T T;
    enum { PIECES = B::COLUMNS / WIDTH, SLICES = B::THREADS / PIECES };
    const int columns = B::PASS == CKCA__PASS_DATA ? g.s.c : g.s.k, me = (int)threadIdx.x;
    const int piece = me % PIECES * WIDTH, column = column0 + piece,
              statistics = B::PASS == CKCA__PASS_FORWARD && g.part;
    ckca__lane<WIDTH> shift, sum, square; /* of stored values, relative to the first row to avoid cancellation */
    const auto first = [&](int i) { return tile[i] + (g.bias && column0 + i < columns ? g.bias[column0 + i] : 0); };
    for (int j = 0; j < WIDTH; j++) shift.v[j] = first(piece + j), sum.v[j] = square.v[j] = 0;
    for (int i = me / PIECES; i < CKCA__ROWS && column < columns; i += SLICES) {
        const ptrdiff_t line = ckca__gemm_line<B::PASS>(g, py, px, row0 + i);
        const size_t at = (size_t)line * columns + column;
        ckca__lane<WIDTH> v(tile + i * B::PITCH + piece);
        if (line < 0) continue;
        ckca__finish<T, B::PASS, WIDTH>(g, v, at, column);
        v.store((T *)g.out + at);
        for (int j = 0; j < WIDTH && statistics; j++) {
            const float d = ckca__stored<T>(v.v[j]) - shift.v[j];
            sum.v[j] += d;
            square.v[j] += d * d;
        }
    }
    if (!statistics) return; /* DATA always returns here */
    const float about = me < B::COLUMNS ? first(me) : 0;
    const int rows = g.s.n * (int)(g.p.by * g.q.by), count = rows - row0 < CKCA__ROWS ? rows - row0 : CKCA__ROWS;
    __syncthreads(); /* all threads have read the tile */
    for (int j = 0; j < WIDTH; j++) {
        tile[me / PIECES * B::COLUMNS + piece + j] = sum.v[j];
        tile[(SLICES + me / PIECES) * B::COLUMNS + piece + j] = square.v[j];
    }
    __syncthreads();
    if (me < B::COLUMNS && column0 + me < columns) {
        float *part = g.part + (size_t)(row0 / CKCA__ROWS) * 2 * columns + column0 + me;
        double s = 0, q = 0;
        for (int i = 0; i < SLICES; i++) s += tile[i * B::COLUMNS + me], q += tile[(SLICES + i) * B::COLUMNS + me];
        part[0] = (float)(about + s / count);
        part[columns] = (float)(q - s * s / count);
    }
    ckca__finish_statistics<B::THREADS, B::COLUMNS>(g, rows, column0, (double *)tile);
}

/* Adds WIDTH adjacent rows of a column to dw. */
template <int WIDTH>
__device__ __forceinline__ void ckca__add_weights(const ckca__gemm &g, int row, int column,
                                                  const ckca__lane<WIDTH> &v) {
    float *to = g.dw + (size_t)column * g.s.r * g.s.s * g.channels;
    if (WIDTH > 1 && g.channels == g.s.c) {
        ckca__lane<WIDTH> previous(to + row);
        for (int j = 0; j < WIDTH; j++) previous.v[j] += v.v[j];
        previous.store(to + row);
        return;
    }
    for (int j = 0; j < WIDTH; j++) {
        const int tap = (row + j) / g.s.c, c = row + j - tap * g.s.c;
        if (c < g.channels) to[tap * g.channels + c] += v.v[j];
    }
}

/* WEIGHT: adds the tile to dw or, with more than one split, writes it to this split's partial sums. The last block of a
   group of splits adds the group, the last block of all adds the groups, always in a fixed order. */
template <class B, int WIDTH>
__device__ __forceinline__ void ckca__finish_weights(const ckca__gemm &g, int row0, int column0, const float *tile) {
    enum { PIECES = CKCA__ROWS / WIDTH, ITEMS = B::COLUMNS * PIECES };
    const int rows = g.s.r * g.s.s * g.s.c, me = (int)threadIdx.x, z = (int)blockIdx.z;
    const int groups = (g.splits + g.group - 1) / g.group, first = z / g.group * g.group;
    const int members = g.splits - first < g.group ? g.splits - first : g.group;
    const size_t count = (size_t)rows * g.s.k;
    unsigned *tickets = g.tickets + (size_t)blockIdx.x * (groups + 1);
    for (int level = 0; level < 3; level++) { /* 0: the tile; 1: a group; 2: all groups */
        const int last = level == 2 || (level == 1 && groups == 1) || g.splits == 1;
        const int from = level == 2 ? 0 : first, step = level == 2 ? g.group : 1;
        const int terms = level == 2 ? groups : members;
        for (int i = me; i < ITEMS; i += B::THREADS) {
            const int row = row0 + i % PIECES * WIDTH, column = column0 + i / PIECES;
            float *part = (float *)g.out + (size_t)column * rows + row;
            ckca__lane<WIDTH> v;
            if (row >= rows || column >= g.s.k) continue;
            if (level == 0) {
                v = ckca__lane<WIDTH>(tile + i / PIECES * B::PITCH + i % PIECES * WIDTH);
            } else {
                for (int j = 0; j < WIDTH; j++) v.v[j] = 0;
#pragma unroll 4
                for (int t = 0; t < terms; t++) {
                    const ckca__lane<WIDTH> other = ckca__load_l2<WIDTH>(part + (size_t)(from + t * step) * count);
                    for (int j = 0; j < WIDTH; j++) v.v[j] += other.v[j];
                }
            }
            if (last) {
                ckca__add_weights(g, row, column, v);
            } else {
                v.store(part + (size_t)(level == 0 ? z : first) * count);
            }
        }
        if (last ||
            !ckca__is_last(level == 0 ? tickets + z / g.group : tickets + groups, level == 0 ? members : groups))
            return;
    }
}

template <class B> __global__ void __launch_bounds__(B::THREADS, B::BLOCKS) ckca__gemm_kernel(ckca__gemm g) {
    CKCA__DYNAMIC_SHARED(stages);
    const int row0 = (int)blockIdx.x / g.column_blocks * CKCA__ROWS,
              column0 = (int)blockIdx.x % g.column_blocks * B::COLUMNS;
    const int z = (int)blockIdx.z, pixels = g.s.n * g.s.p * g.s.q;
    const ckca__phase py =
        ckca__phase_of(B::PASS, z / g.s.stride, g.s.r, g.s.stride, g.s.pad, B::PASS == CKCA__PASS_DATA ? g.s.h : g.s.p);
    const ckca__phase px =
        ckca__phase_of(B::PASS, z % g.s.stride, g.s.s, g.s.stride, g.s.pad, B::PASS == CKCA__PASS_DATA ? g.s.w : g.s.q);
    const int begin = B::PASS == CKCA__PASS_WEIGHT ? z * g.split : 0;
    const int end = B::PASS != CKCA__PASS_WEIGHT ? py.taps * px.taps * (B::PASS == CKCA__PASS_DATA ? g.s.k : g.s.c)
                    : pixels - begin < g.split   ? pixels
                                                 : begin + g.split;
    const int count = end > begin ? (end - begin + B::DEPTH - 1) / B::DEPTH : 0;
    float sums[B::SUMS];
    ckca__along<B> along(g, py, px, row0, column0);       /* only one is used: */
    ckca__across<B> across(g, row0, column0, begin, end); /* the compiler drops the other */
    const auto fetch = [&](uint4 *to) {
        if constexpr (B::PASS == CKCA__PASS_WEIGHT) {
            across.fetch(to);
        } else {
            along.fetch(to);
        }
    };
    uint4 *read = stages, *write = stages;
    ckca__wait_for_grids();
#pragma unroll
    for (int i = 0; i < B::SUMS; i++) sums[i] = 0;
    for (int i = 0; i < CKCA__GEMM_STAGES - 1; i++, write += B::STAGE) {
        if (i < count) fetch(write);
        ckca__copies_commit();
    }
#pragma unroll 1
    for (int i = 0; i < count; i++) {
        ckca__copies_wait<CKCA__GEMM_STAGES - 2>();
        __syncthreads(); /* this stage is complete, and all threads have finished with the previous one */
        if (i + CKCA__GEMM_STAGES - 1 < count) fetch(write);
        ckca__copies_commit();
        if constexpr (B::TENSOR) {
            ckca__multiply_tensor<B>(read, read + B::STAGE_A, sums);
        } else {
            ckca__multiply_floats<B>(read, read + B::STAGE_A, sums);
        }
        read = read == stages + (CKCA__GEMM_STAGES - 1) * B::STAGE ? stages : read + B::STAGE;
        write = write == stages + (CKCA__GEMM_STAGES - 1) * B::STAGE ? stages : write + B::STAGE;
    }
    ckca__copies_wait<0>();
    __syncthreads(); /* the tile reuses the stages' memory */
    float *tile = (float *)stages;
    ckca__sums_to_tile<B>(sums, tile);
    __syncthreads();
    if constexpr (B::PASS == CKCA__PASS_WEIGHT) {
        if (g.s.r * g.s.s * g.s.c % 4 == 0) {
            ckca__finish_weights<B, 4>(g, row0, column0, tile);
        } else {
            ckca__finish_weights<B, 1>(g, row0, column0, tile);
        }
    } else if ((B::PASS == CKCA__PASS_DATA ? g.s.c : g.s.k) % B::VALUES == 0) {
        ckca__finish_rows<B, B::VALUES>(g, py, px, row0, column0, tile);
    } else {
        ckca__finish_rows<B, 1>(g, py, px, row0, column0, tile);
    }
}

/* ---- the same with wgmma and TMA ---- */

/* Hopper's form of FORWARD and DATA, where k's channels fill whole stages of 128 bytes: 256 threads, two warpgroups of
   64 rows each. One thread asks TMA for whole stages: A by an im2col map of x or dy (one per phase), which writes zeros
   outside of the picture; B by a map of the weights as a matrix. TMA swizzles the lines as ckca__block does, and rounds
   floats to TF32 (type TFLOAT32). Nothing but TMA writes a stage, and nothing but wgmma reads it; the epilogue is the
   other kernel's. Barrier full[i]: stage i has arrived; empty[i]: all warps have multiplied it. */
template <int PRECISION_, int PASS_, int COLUMNS_>
struct ckca__wgmma_block : ckca__block<PRECISION_, PASS_, COLUMNS_, 1> {
    typedef ckca__block<PRECISION_, PASS_, COLUMNS_, 1> BASE;
    static constexpr int
        THREADS = 256,
        BLOCKS = 2,
        DEPTH = 8 * BASE::VALUES,
        STEPS = 4, /* 32 bytes of k each */
        WARPS_ACROSS = 1,
        ROW_TILES = 1,
        COLUMN_TILES = COLUMNS_ / 8,
        SUMS = COLUMNS_ / 2,
        STAGES = COLUMNS_ == 128 ? 3 : 4,
        STAGE_A = CKCA__ROWS * 128, /* bytes */
        STAGE = STAGE_A + COLUMNS_ * 128,
        TILE = BASE::LINES * BASE::PITCH * 4,
        BYTES = 1024 + (STAGES * STAGE > TILE ? STAGES * STAGE : TILE);
};

enum { CKCA__WGMMA_PHASES = 4 }; /* stride 2 at most */
typedef struct ckca__wgmma_maps {
    CUtensorMap pixels[CKCA__WGMMA_PHASES], weights;
} ckca__wgmma_maps;

/* Compiled for other architectures than sm_90a, it is empty and uses no shared memory: see ckca__wgmma_init. */
template <class B>
__global__ void __launch_bounds__(B::THREADS, B::BLOCKS)
    ckca__wgmma_kernel(const __grid_constant__ ckca__wgmma_maps maps, ckca__gemm g) {
#if CKCA__HOPPER
    CKCA__DYNAMIC_SHARED(memory);
    __shared__ __align__(8) uint64_t full[B::STAGES], empty[B::STAGES];
    const int row0 = (int)blockIdx.x / g.column_blocks * CKCA__ROWS,
              column0 = (int)blockIdx.x % g.column_blocks * B::COLUMNS;
    const int z = (int)blockIdx.z, me = (int)threadIdx.x, channels = B::PASS == CKCA__PASS_DATA ? g.s.k : g.s.c;
    const ckca__phase py =
        ckca__phase_of(B::PASS, z / g.s.stride, g.s.r, g.s.stride, g.s.pad, B::PASS == CKCA__PASS_DATA ? g.s.h : g.s.p);
    const ckca__phase px =
        ckca__phase_of(B::PASS, z % g.s.stride, g.s.s, g.s.stride, g.s.pad, B::PASS == CKCA__PASS_DATA ? g.s.w : g.s.q);
    const ckca__output at(g, B::PASS, py, px, row0);
    const int count = at.n < g.s.n ? py.taps * px.taps * (channels / B::DEPTH) : 0;
    char *stages = (char *)memory + (1024 - ckca__shared_address(memory) % 1024) % 1024;
    int tap_y = 0, tap_x = 0, c = 0; /* of the next stage to load */
    const auto load = [&](int stage) {
        const int tap = (py.first + py.step * tap_y) * g.s.s + px.first + px.step * tap_x;
        char *to = stages + stage * B::STAGE;
        ckca__barrier_expect(&full[stage], B::STAGE);
        ckca__copy_pixels(to, &maps.pixels[z], c, at.x * px.stride + px.from, at.y * py.stride + py.from, at.n, tap_x,
                          tap_y, &full[stage]);
        ckca__copy_matrix(to + B::STAGE_A, &maps.weights, tap * channels + c, column0, &full[stage]);
        if ((c += B::DEPTH) < channels) return;
        c = 0;
        if (++tap_x < px.taps) return;
        tap_x = 0;
        tap_y++;
    };
    float sums[B::SUMS];
    if (me == 0) {
        for (int i = 0; i < B::STAGES; i++) {
            ckca__barrier_init(&full[i], 1);
            ckca__barrier_init(&empty[i], B::THREADS / 32);
        }
        ckca__barriers_ready();
    }
    __syncthreads();
    ckca__wait_for_grids();
    if (me == 0)
        for (int i = 0; i < B::STAGES - 1 && i < count; i++) load(i);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < B::SUMS; i++) sums[i] = 0;
    int stage = 0, previous = B::STAGES - 1;
    unsigned parity = 0, previous_parity = 1; /* of their phases */
#pragma unroll 1
    for (int i = 0; i < count; i++) {
        const unsigned a = ckca__shared_address(stages + stage * B::STAGE + me / 128 * 64 * 128);
        const unsigned b = ckca__shared_address(stages + stage * B::STAGE + B::STAGE_A);
        ckca__barrier_wait(&full[stage], parity);
        ckca__wgmma_begin();
#pragma unroll
        for (int step = 0; step < B::STEPS; step++)
            ckca__wgmma<B::PRECISION == CKCA_PRECISION_BF16, B::COLUMNS>(sums, ckca__matrix_descriptor(a + step * 32),
                                                                         ckca__matrix_descriptor(b + step * 32));
        ckca__wgmma_commit();
        ckca__wgmma_wait<1>(); /* the previous stage's products are in the sums */
        if (i > 0 && me % 32 == 0) ckca__barrier_arrive(&empty[previous]);
        if (me == 0 && i + B::STAGES - 1 < count) {
            if (i > 0) ckca__barrier_wait(&empty[previous], previous_parity);
            load(previous);
        }
        __syncwarp();
        previous = stage;
        previous_parity = parity;
        if (++stage == B::STAGES) stage = 0, parity ^= 1;
    }
    ckca__wgmma_wait<0>();
    __syncthreads(); /* the tile reuses the stages' memory */
    float *tile = (float *)stages;
    ckca__sums_to_tile<B>(sums, tile);
    __syncthreads();
    ckca__finish_rows<B, B::VALUES>(g, py, px, row0, column0, tile);
#endif
}

/* Pads the channels of x with zeros from c to padded_c, a multiple of a chunk. Each thread writes whole chunks. */
template <class FROM, class T>
__global__ void ckca__pad_channels_kernel(size_t pixels, int c, int padded_c, const FROM *x, T *to) {
    enum { VALUES = ckca__chunk<T>::VALUES };
    ckca__wait_for_grids();
    const size_t stride = (size_t)gridDim.x * blockDim.x;
    const unsigned chunks = (unsigned)(padded_c / VALUES);
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < pixels * chunks; i += stride) {
        const size_t pixel = i / chunks;
        const int first = (int)(i - pixel * chunks) * VALUES;
        ckca__lane<VALUES> v;
        for (int j = 0; j < VALUES; j++) v.v[j] = first + j < c ? ckca__to_float(x[pixel * c + first + j]) : 0;
        v.store(to + i * VALUES);
    }
}

/* Packs the weights (k x taps x c) of up to CKCA__PACK_MAX convolutions in one launch: cast is k x taps x padded_c,
   transposed is c x taps x k, both rounded to bf16 if bf16 is set. Each block handles a 32 x 32 tile of one tap. */
enum { CKCA__TILE = 32, CKCA__PACK_MAX = 32 };
typedef struct ckca__pack_batch {
    int count, tiles;
    struct {
        const float *w;
        void *cast, *transposed;        /* each may be NULL */
        int bf16, k, taps, c, padded_c; /* padded_c: channels of cast */
        int first;                      /* its first tile, which is its first block */
    } of[CKCA__PACK_MAX];
} ckca__pack_batch;

__global__ void __launch_bounds__(CKCA__THREADS) ckca__pack_kernel(ckca__pack_batch a) {
    __shared__ float tile[CKCA__TILE][CKCA__TILE + 1];
    const int x = (int)threadIdx.x % CKCA__TILE, y = (int)threadIdx.x / CKCA__TILE;
    int i = 0;
    ckca__wait_for_grids();
    while (i + 1 < a.count && a.of[i + 1].first <= (int)blockIdx.x) i++;
    const auto &o = a.of[i];
    const int tiles = (o.c + CKCA__TILE - 1) / CKCA__TILE, at = (int)blockIdx.x - o.first;
    const int c0 = at % tiles * CKCA__TILE, tap = at / tiles % o.taps, k0 = at / tiles / o.taps * CKCA__TILE;
    const auto put = [&](void *to, size_t place, float v) {
        if (o.bf16) {
            ckca__put((ckca__bf16 *)to + place, v);
        } else {
            ((float *)to)[place] = v;
        }
    };
    for (int j = y; j < CKCA__TILE; j += CKCA__THREADS / CKCA__TILE) {
        if (k0 + j >= o.k) continue;
        tile[j][x] = c0 + x < o.c ? o.w[((size_t)(k0 + j) * o.taps + tap) * o.c + c0 + x] : 0;
        if (o.cast && c0 + x < o.padded_c)
            put(o.cast, ((size_t)(k0 + j) * o.taps + tap) * o.padded_c + c0 + x, tile[j][x]);
    }
    if (!o.transposed) return;
    __syncthreads();
    for (int j = y; j < CKCA__TILE; j += CKCA__THREADS / CKCA__TILE)
        if (c0 + j < o.c && k0 + x < o.k)
            put(o.transposed, ((size_t)(c0 + j) * o.taps + tap) * o.k + k0 + x, tile[x][j]);
}

/* ------------------------------------------------------------------------------------------------------------------
   CHANNELS: per-channel sums over all pixels of a tensor

   The rows (pixels) are divided into at most 256 parts. A block processes one part of up to 8 chunks of adjacent
   channels: its threads accumulate several rows at a time, then combine their sums in a fixed order. The last block of
   these channels adds the parts.
   ------------------------------------------------------------------------------------------------------------------ */

enum { CKCA__PARTS = 256, CKCA__CHANNEL_BLOCKS = 1024 };

/* Number of parts, non-decreasing in rows: workspace is sized by the largest batch. With more groups of channels, fewer
   parts fill the GPU, and fewer are quicker to add. */
static int ckca__parts(size_t rows, int groups) {
    const int most = CKCA__CHANNEL_BLOCKS / groups < CKCA__PARTS ? CKCA__CHANNEL_BLOCKS / groups : CKCA__PARTS;
    const size_t parts = rows / 64 + 1;
    return parts < (size_t)most ? (int)parts : most > 0 ? most : 1;
}

/* Threads along channels: a power of two, so it divides the block; 8 threads x 16 bytes read whole 128-byte lines. */
static int ckca__lanes(int chunks) {
    int lanes = 1;
    while (lanes < 8 && lanes < chunks) lanes *= 2;
    return lanes;
}

typedef struct ckca__moments {
    size_t rows, per;                           /* in total; per part */
    int first, c, lanes;                        /* this launch starts at channel first */
    const void *x, *y, *dy;                     /* see below; of the kernel's type */
    const float *mean, *gamma, *beta, *inv_std; /* KIND 2; gamma and beta if the ReLU mask is recomputed from x */
    float *part;                                /* parts x 2 x c */
    unsigned *tickets;                          /* one per group of channels */
    ckca__statistics statistics;                /* KIND 3: the results */
    float *dgamma, *dbeta, *table;              /* KIND 2; KIND 1: dbeta only */
} ckca__moments;

/* Computes per part: for KIND 3 (statistics), the mean and the sum of squared deviations, from the sums of d and d^2
   with d = x - the part's first row, to avoid cancellation; for KIND 2 (batch norm backward), the sums of g and
   g (x - mean), where g = dy masked by the ReLU; for KIND 1 (bias), the sum of dy. The last block of a group of
   channels adds the parts and writes the statistics, or dgamma, dbeta and table (2 x c: the means over rows that
   ckca__batchnorm_backward needs). */
template <class T, int KIND, int WIDTH>
__global__ void __launch_bounds__(CKCA__THREADS, KIND == 2 ? 2 : sizeof(T) == 2 ? 4 : 5)
    ckca__channel_sums(ckca__moments m) {
    /* Loaded before the first is used. Without the number of blocks, ptxas puts loads and use in turn to save registers. */
    enum { ROWS = KIND == 2 ? 2 : 4 };
    __shared__ __align__(16) float first[CKCA__THREADS * WIDTH], second[CKCA__THREADS * WIDTH];
    __shared__ float partial[2][CKCA__THREADS];
    __shared__ double scratch[3 * CKCA__THREADS];
    const int at_once = CKCA__THREADS / m.lanes, channels = m.lanes * WIDTH, me = (int)threadIdx.x;
    const int c0 = m.first + (int)blockIdx.x * channels, c = c0 + me % m.lanes * WIDTH;
    const size_t begin = blockIdx.y * m.per, left = begin < m.rows ? m.rows - begin : 0;
    const size_t end = begin + (left < m.per ? left : m.per);
    const int in_range = c < m.c && left;
    ckca__lane<WIDTH> shift, scale, beta, a, b;
    ckca__wait_for_grids();
    for (int j = 0; j < WIDTH; j++) shift.v[j] = scale.v[j] = a.v[j] = b.v[j] = 0, beta.v[j] = 1; /* mask 1 */
    if (in_range && KIND == 3) shift = ckca__lane<WIDTH>((const T *)m.x + begin * m.c + c);
    if (in_range && KIND == 2) shift = ckca__lane<WIDTH>(m.mean + c);
    if (in_range && KIND == 2 && m.beta)
        for (int j = 0; j < WIDTH; j++) scale.v[j] = m.gamma[c + j] * m.inv_std[c + j], beta.v[j] = m.beta[c + j];
    const auto add = [&](size_t i,
                         auto rows) { /* issues the loads of all N rows first */
                                      enum { N = decltype(rows)::VALUE };
                                      ckca__raw<T, WIDTH> x[N], y[N], g[N];
#pragma unroll
                                      for (int r = 0; r < N; r++, i += (size_t)at_once * m.c) {
                                          if (KIND > 1) x[r] = ckca__raw<T, WIDTH>((const T *)m.x + i);
                                          if (KIND < 3) g[r] = ckca__raw<T, WIDTH>((const T *)m.dy + i);
                                          if (KIND == 2 && m.y) y[r] = ckca__raw<T, WIDTH>((const T *)m.y + i);
                                      }
#pragma unroll
                                      for (int r = 0; r < N; r++) {
                                          ckca__lane<WIDTH> v, gate, dy;
                                          if (KIND > 1) v = x[r].values();
                                          if (KIND < 3) dy = g[r].values();
                                          if (KIND == 2 && m.y) gate = y[r].values();
                                          for (int j = 0; j < WIDTH; j++) {
                                              const float d = KIND > 1 ? v.v[j] - shift.v[j] : 0;
                                              if (KIND == 2 && !((m.y ? gate.v[j]
                                                                      : ckca__normalise(v.v[j], shift.v[j], scale.v[j],
                                                                                        beta.v[j])) > 0))
                                                  dy.v[j] = 0;
                                              a.v[j] += KIND == 3 ? d : dy.v[j];
                                              if (KIND > 1) b.v[j] += d * (KIND == 3 ? d : dy.v[j]);
                                          }
                                      }
    };
    size_t row = in_range ? begin + me / m.lanes : end;
    for (; row + (ROWS - 1) * at_once < end; row += ROWS * at_once) add(row * m.c + c, ckca__constant<ROWS>());
    for (; row < end; row += at_once) add(row * m.c + c, ckca__constant<1>());
    /* Each thread adds WIDTH partial sums of one channel, then one thread per channel adds those. */
    a.store(first + me * WIDTH);
    b.store(second + me * WIDTH);
    __syncthreads();
    float sum = 0, square = 0;
    for (int i = 0; i < WIDTH; i++) {
        const int from = (me / channels * WIDTH + i) * channels + me % channels;
        sum += first[from];
        square += second[from];
    }
    partial[0][me] = sum;
    partial[1][me] = square;
    __syncthreads();
    const int channel = c0 + me % channels, is_channel = channel < m.c;
    if (me < channels && is_channel) {
        float *to = m.part + (size_t)blockIdx.y * 2 * m.c + channel;
        for (int i = me + channels; i < CKCA__THREADS; i += channels) {
            sum += partial[0][i];
            square += partial[1][i];
        }
        if (KIND == 3 && left) {
            const double n = (double)(end - begin), s = sum;
            square = (float)(square - s * s / n);
            sum = (float)(ckca__to_float(((const T *)m.x)[begin * m.c + channel]) + s / n);
        }
        to[0] = sum;
        to[m.c] = square;
    }
    if (!ckca__is_last(m.tickets + blockIdx.x, gridDim.y)) return;
    const float *part = m.part + (is_channel ? channel : 0);
    if (KIND == 3) {
        double mean, squares;
        ckca__merge_statistics<CKCA__THREADS>(part, 2 * (size_t)m.c, (size_t)m.c, channels, (int)gridDim.y,
                                              (double)m.per, (double)m.rows, scratch, &mean, &squares);
        if (me < channels && is_channel) ckca__store_statistics(m.statistics, channel, mean, squares, (double)m.rows);
        return;
    }
    double total = 0, product = 0;
#pragma unroll 4
    for (int i = me / channels; i < (int)gridDim.y; i += CKCA__THREADS / channels) {
        total += __ldcg(part + (size_t)i * 2 * m.c);
        if (KIND == 2) product += __ldcg(part + ((size_t)i * 2 + 1) * m.c);
    }
    scratch[me] = total;
    scratch[CKCA__THREADS + me] = product;
    __syncthreads();
    if (me >= channels || !is_channel) return;
    for (int i = me + channels; i < CKCA__THREADS; i += channels) {
        total += scratch[i];
        product += scratch[CKCA__THREADS + i];
    }
    m.dbeta[channel] += (float)total;
    if (KIND == 1) return;
    product *= m.inv_std[channel];
    m.dgamma[channel] += (float)product;
    m.table[channel] = (float)(total / (double)m.rows);
    m.table[m.c + channel] = (float)(product / (double)m.rows);
}

/* Returns the sum of v over the warp to every lane, added in a fixed order. */
template <class T> __device__ __forceinline__ T ckca__warp_sum(T v) {
    for (int step = 16; step; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
}

/* Returns the sum of v over the block to every thread, added in a fixed order. */
__device__ double ckca__block_sum(double v) {
    __shared__ double sums[CKCA__THREADS / 32];
    v = ckca__warp_sum(v);
    __syncthreads(); /* sums may still be in use by the previous call */
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    for (int i = 0; i < CKCA__THREADS / 32; i++) v += sums[i];
    return v;
}

typedef struct ckca__normed {
    size_t count; /* values */
    int c;
    ckca__norm norm, residual_norm; /* norm.inv_std NULL: computed from var */
    const float *var, *table;
    const void *x, *y, *dy, *residual; /* of the kernel's type, as out and dresidual are */
    void *out, *dresidual;
    int accumulate;
} ckca__normed;

/* Batch norm of WIDTH channels, starting at channel at. */
template <int WIDTH> struct ckca__affine {
    ckca__lane<WIDTH> mean, scale, beta;
    __device__ ckca__affine(const ckca__norm &norm, const float *var, size_t at)
        : mean(norm.mean + at), scale(norm.gamma + at), beta(norm.beta + at) {
        for (int j = 0; j < WIDTH; j++)
            scale.v[j] *= norm.inv_std ? norm.inv_std[at + j] : (float)(1 / sqrt(var[at + j] + 1e-5));
    }
    __device__ float operator()(int j, float x, int relu) const {
        const float v = ckca__normalise(x, mean.v[j], scale.v[j], beta.v[j]);
        return relu && v <= 0 ? 0 : v; /* NaN stays NaN */
    }
};

/* Calls body(i, n) for this thread's indices i, i + apart, ... below count, n = N at a time, then 1 at a time, so that
   body can issue n independent loads. */
template <int N, class F> __device__ __forceinline__ void ckca__places(size_t i, size_t count, size_t pitch, F body) {
    for (; i + (N - 1) * pitch < count; i += N * pitch) body(i, ckca__constant<N>());
    for (; i < count; i += pitch) body(i, ckca__constant<1>());
}

/* out = relu?(norm(x) + residual). NORMED: the residual has a batch norm of its own. */
template <class T, int WIDTH, int NORMED> __global__ void ckca__batchnorm_apply(ckca__normed n) {
    const size_t c = (size_t)n.c / WIDTH, threads = (size_t)gridDim.x * blockDim.x, stride = threads / c * c;
    const size_t id = (size_t)blockIdx.x * blockDim.x + threadIdx.x, at = id % c * WIDTH, pitch = stride * WIDTH;
    ckca__wait_for_grids();
    if (id >= stride) return;
    const ckca__affine<WIDTH> norm(n.norm, n.var, at), residual_norm(NORMED ? n.residual_norm : n.norm, n.var, at);
    ckca__places<4>(id * WIDTH, n.count, pitch, [&](size_t i, auto places) {
        enum { N = decltype(places)::VALUE };
        ckca__raw<T, WIDTH> x[N], residual[N];
#pragma unroll
        for (int p = 0; p < N; p++) {
            x[p] = ckca__raw<T, WIDTH>((const T *)n.x + i + p * pitch);
            if (n.residual) residual[p] = ckca__raw<T, WIDTH>((const T *)n.residual + i + p * pitch);
        }
#pragma unroll
        for (int p = 0; p < N; p++) {
            ckca__lane<WIDTH> y = x[p].values(), add;
            if (n.residual) add = residual[p].values();
            for (int j = 0; j < WIDTH; j++) {
                float v = norm(j, y.v[j], 0);
                if (n.residual) v += NORMED ? residual_norm(j, add.v[j], n.residual_norm.relu) : add.v[j];
                y.v[j] = n.norm.relu && v <= 0 ? 0 : v;
            }
            y.store((T *)n.out + i + p * pitch);
        }
    });
}

/* With g = dy where y > 0 and xhat = (x - mean) inv_std: out = gamma inv_std (g - mean of g - xhat mean of g xhat). */
template <class T, int WIDTH> __global__ void ckca__batchnorm_backward(ckca__normed n) {
    const size_t c = (size_t)n.c / WIDTH, threads = (size_t)gridDim.x * blockDim.x, stride = threads / c * c;
    const size_t id = (size_t)blockIdx.x * blockDim.x + threadIdx.x, at = id % c * WIDTH, pitch = stride * WIDTH;
    ckca__wait_for_grids();
    if (id >= stride) return;
    const ckca__lane<WIDTH> mean(n.norm.mean + at), beta(n.norm.beta + at), mean_g(n.table + at);
    ckca__lane<WIDTH> scale(n.norm.gamma + at), slope(n.table + n.c + at); /* gamma inv_std; inv_std mean of g xhat */
    for (int j = 0; j < WIDTH; j++) {
        const float inv_std = n.norm.inv_std[at + j];
        scale.v[j] *= inv_std;
        slope.v[j] *= inv_std;
    }
    ckca__places<2>(id * WIDTH, n.count, pitch, [&](size_t i, auto places) {
        enum { N = decltype(places)::VALUE };
        ckca__raw<T, WIDTH> x[N], dy[N], y[N], previous[N];
#pragma unroll
        for (int p = 0; p < N; p++) {
            x[p] = ckca__raw<T, WIDTH>((const T *)n.x + i + p * pitch);
            dy[p] = ckca__raw<T, WIDTH>((const T *)n.dy + i + p * pitch);
            if (n.y) y[p] = ckca__raw<T, WIDTH>((const T *)n.y + i + p * pitch);
            if (n.dresidual && n.accumulate) previous[p] = ckca__raw<T, WIDTH>((const T *)n.dresidual + i + p * pitch);
        }
#pragma unroll
        for (int p = 0; p < N; p++) {
            const ckca__lane<WIDTH> v = x[p].values();
            ckca__lane<WIDTH> g = dy[p].values(), to;
            if (n.y) {
                const ckca__lane<WIDTH> gate = y[p].values();
                for (int j = 0; j < WIDTH; j++) g.v[j] = gate.v[j] > 0 ? g.v[j] : 0;
            } else if (n.norm.relu) {
                for (int j = 0; j < WIDTH; j++)
                    g.v[j] = ckca__normalise(v.v[j], mean.v[j], scale.v[j], beta.v[j]) > 0 ? g.v[j] : 0;
            }
            if (n.dresidual) {
                to = g;
                if (n.accumulate) {
                    const ckca__lane<WIDTH> before = previous[p].values();
                    for (int j = 0; j < WIDTH; j++) to.v[j] += before.v[j];
                }
                to.store((T *)n.dresidual + i + p * pitch);
            }
            for (int j = 0; j < WIDTH; j++)
                to.v[j] = scale.v[j] * (g.v[j] - mean_g.v[j] - (v.v[j] - mean.v[j]) * slope.v[j]);
            to.store((T *)n.out + i + p * pitch);
        }
    });
}

/* Grid of an element-wise kernel over count items, of at least `least` threads in total. */
static unsigned ckca__grid(const ckca_context *ctx, size_t count, size_t least) {
    size_t blocks = (count + CKCA__THREADS - 1) / CKCA__THREADS, most = (size_t)ckca__cuda_of(ctx)->blocks;
    least = (least + CKCA__THREADS - 1) / CKCA__THREADS;
    if (blocks > most) blocks = most;
    return (unsigned)(blocks < least ? least : blocks ? blocks : 1);
}

/* Calls f with a value of the feature maps' type and, as a ckca__constant, the channels to access at once. */
template <class F> static void ckca__dispatch_channels(int bf16, int c, F f) {
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
    ckca__dispatch_channels(bf16, m->c, [&](auto type, auto width) {
        typedef decltype(type) T;
        enum { WIDTH = decltype(width)::VALUE };
        m->lanes = ckca__lanes(m->c / WIDTH);
        const int channels = m->lanes * WIDTH, groups = (m->c + channels - 1) / channels;
        const int parts = ckca__parts(m->rows, groups);
        m->per = (m->rows + parts - 1) / parts;
        m->tickets = ckca__tickets(ckca__cuda_of(ctx));
        for (m->first = 0; m->first < m->c; m->first += CKCA__TICKETS * channels) {
            const int left = groups - m->first / channels;
            const dim3 grid(left < CKCA__TICKETS ? left : CKCA__TICKETS, parts);
            if (kind == 3)
                CKCA__LAUNCH(ctx, (ckca__channel_sums<T, 3, WIDTH>), grid, *m);
            else if (kind == 2)
                CKCA__LAUNCH(ctx, (ckca__channel_sums<T, 2, WIDTH>), grid, *m);
            else
                CKCA__LAUNCH(ctx, (ckca__channel_sums<T, 1, WIDTH>), grid, *m);
            if (m->c - m->first <= CKCA__TICKETS * channels) break;
        }
    });
}

/* Computes mean, inv_std and running statistics of x (rows x c). ws: ckca__parts x 2 x c floats. */
static void ckca__take_statistics(ckca_context *ctx, int bf16, size_t rows, int c, const void *x,
                                  const ckca__statistics *statistics, void *ws) {
    ckca__moments m = {};
    m.rows = rows;
    m.c = c;
    m.x = x;
    m.part = (float *)ws;
    m.statistics = *statistics;
    ckca__run_channel_sums(ctx, bf16, 3, &m);
}

static unsigned ckca__warps(int c) { return (unsigned)((c + CKCA__THREADS / 32 - 1) / (CKCA__THREADS / 32)); }

CKCA__OP size_t ckca__op_workspace(const ckca_context *ctx, size_t rows, int c) {
    (void)ctx; /* batch norm's parts and table; clipping's sums */
    return ckca__sum(CKCA__PARTS * sizeof(double),
                     ckca__mul((size_t)c, (2 * (size_t)ckca__parts(rows, 1) + 2) * sizeof(float)));
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
    ckca__dispatch_channels(bf16, c, [&](auto type, auto width) {
        enum { WIDTH = decltype(width)::VALUE };
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
    const ckca__statistics statistics = {mean, inv_std, running_mean, running_var};
    ckca__take_statistics(ctx, bf16, rows, c, x, &statistics, ws);
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
    float *table = (float *)ws + (size_t)ckca__parts(rows, 1) * 2 * c;
    m.rows = rows;
    m.c = c;
    m.x = x;
    m.y = norm->relu ? y : NULL;
    m.dy = dy;
    m.mean = norm->mean;
    m.inv_std = norm->inv_std;
    if (norm->relu && !y) m.gamma = norm->gamma, m.beta = norm->beta;
    m.dgamma = dgamma;
    m.dbeta = dbeta;
    m.table = table;
    m.part = (float *)ws;
    if (dgamma)
        ckca__run_channel_sums(ctx, bf16, 2, &m);
    else
        ckca__device_zero(ctx, table, 2 * (size_t)c * sizeof *table);
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
    ckca__dispatch_channels(bf16, c, [&](auto type, auto width) {
        enum { WIDTH = decltype(width)::VALUE };
        CKCA__LAUNCH(ctx, (ckca__batchnorm_backward<decltype(type), WIDTH>),
                     ckca__grid(ctx, n.count / WIDTH, (size_t)c / WIDTH), n);
    });
}

__global__ void ckca__fold_kernel(int k, size_t per, const float *w, const float *bias, const float *gamma,
                                  const float *beta, const float *mean, const float *var, float *w_out,
                                  float *bias_out) {
    ckca__wait_for_grids();
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

/* Blocks per wave: two on each multiprocessor of a large GPU. A constant, not the current GPU's count, which would
   change the order of sums and so the bits. CKCA__LEAST_SPLIT: fewest pixels per split. */
enum { CKCA__WAVE = 264, CKCA__LEAST_SPLIT = 512 };

/* The precision a convolution or linear layer multiplies in: BF16 only where its output is stored as bfloat16. */
static ckca_precision ckca__math(const ckca_context *ctx, const ckca__conv *s) {
    return ctx->precision == CKCA_PRECISION_BF16 && !s->bf16 ? CKCA_PRECISION_TF32 : ctx->precision;
}
static int ckca__chunk_values(const ckca_context *ctx, const ckca__conv *s) {
    return ckca__math(ctx, s) == CKCA_PRECISION_BF16 ? 8 : 4;
}
static size_t ckca__value_bytes(const ckca_context *ctx, const ckca__conv *s) {
    return 16 / (size_t)ckca__chunk_values(ctx, s);
}

/* 1: the pass loads whole chunks: always in FORWARD, whose channels are padded; in DATA and WEIGHT if K fills them. */
static int ckca__is_whole(const ckca_context *ctx, int pass, const ckca__conv *s) {
    return pass == CKCA__PASS_FORWARD || s->k % ckca__chunk_values(ctx, s) == 0;
}
static int ckca__padded_channels(const ckca_context *ctx, const ckca__conv *s) {
    return (int)ckca__round_up((size_t)s->c, (size_t)ckca__chunk_values(ctx, s));
}
static int ckca__is_padded(const ckca_context *ctx, const ckca__conv *s) {
    return s->c % ckca__chunk_values(ctx, s) || s->bf16_x != s->bf16;
}

/* Columns of a block: the smallest size that covers them, up to 64; 128 only on tensor cores, which need the most reuse
   of each load, and only with whole chunks, whose loader leaves enough registers for the sums. */
static int ckca__columns(const ckca_context *ctx, int pass, const ckca__conv *s) {
    const int columns = pass == CKCA__PASS_DATA ? s->c : s->k;
    if (columns > 64 && ctx->precision != CKCA_PRECISION_FLOAT32 && ckca__is_whole(ctx, pass, s)) return 128;
    return columns <= 16 ? 16 : columns <= 32 ? 32 : 64;
}
static int ckca__ceil(int a, int b) { return (a + b - 1) / b; }

/* 1: a plain matrix product (1 x 1, stride 1, no padding), left to cuBLAS unless it has an epilogue. */
static int ckca__is_product(const ckca__conv *s) {
    return s->r == 1 && s->s == 1 && s->stride == 1 && !s->pad && s->bf16_x == s->bf16;
}

/* The number of splits that fills its waves of blocks best; fewer on a tie, since each split costs a pass over the
   weights. */
static int ckca__weight_splits(const ckca_context *ctx, const ckca__conv *s) {
    const int blocks = ckca__ceil(s->r * s->s * ckca__padded_channels(ctx, s), CKCA__ROWS) *
                       ckca__ceil(s->k, ckca__columns(ctx, CKCA__PASS_WEIGHT, s));
    const int pixels = s->n * s->p * s->q / CKCA__LEAST_SPLIT, wanted = ckca__ceil(2 * CKCA__WAVE, blocks);
    const int most = blocks >= 2 * CKCA__WAVE ? 1 : pixels < wanted ? pixels : wanted;
    int best = 1, splits;
    double least = 1e30;
    for (splits = 1; splits <= most; splits++) { /* time ~ waves / splits */
        const double waves = ckca__ceil(blocks * splits, CKCA__WAVE), time = waves / splits * (1 + splits * 1e-3);
        if (time < least * 0.999) least = time, best = splits;
    }
    return best;
}
/* Parts per group of a two-level sum: about the square root of parts; all of them if they are few. */
static int ckca__group(int parts) {
    int group = 1;
    if (parts <= 16) return parts;
    while (group * group < parts) group++;
    return group;
}

/* Bytes of a convolution's weights packed for FORWARD (rounded, padded) and for DATA (transposed), and of x padded to
   whole chunks; 0 where the original is read as it is. */
static size_t ckca__cast_bytes(const ckca_context *ctx, const ckca__conv *s) {
    const int product = ckca__is_product(s), padded_c = product ? s->c : ckca__padded_channels(ctx, s);
    const size_t count = ckca__mul(ckca__mul((size_t)s->r * s->s, (size_t)padded_c), (size_t)s->k);
    return ckca__math(ctx, s) == CKCA_PRECISION_BF16 || padded_c > s->c
               ? ckca__round_up(ckca__mul(count, ckca__value_bytes(ctx, s)), CKCA__ALIGN)
               : 0;
}
static size_t ckca__transposed_bytes(const ckca_context *ctx, const ckca__conv *s) {
    const size_t count = ckca__mul(ckca__mul((size_t)s->r * s->s, (size_t)s->c), (size_t)s->k);
    return ckca__is_product(s) ? 0 : ckca__round_up(ckca__mul(count, ckca__value_bytes(ctx, s)), CKCA__ALIGN);
}
static size_t ckca__padded_bytes(const ckca_context *ctx, const ckca__conv *s) {
    const size_t pixels = ckca__mul(ckca__mul((size_t)s->n, (size_t)s->h), (size_t)s->w);
    const size_t bytes = ckca__mul(pixels, ckca__mul((size_t)ckca__padded_channels(ctx, s), ckca__value_bytes(ctx, s)));
    return ckca__is_padded(ctx, s) ? ckca__round_up(bytes, CKCA__ALIGN) : 0;
}
CKCA__OP size_t ckca__packed_bytes(const ckca_context *ctx, const ckca__conv *s, int backward) {
    if (s->groups > 1) return 0;
    return ckca__sum(ckca__cast_bytes(ctx, s), backward ? ckca__transposed_bytes(ctx, s) : 0);
}

/* The largest of the three passes' needs. FORWARD: packed weights, padded x, parts of the statistics. DATA: packed
   weights. WEIGHT: padded x and the splits' sums; then, in the same memory, the bias gradient's parts. */
CKCA__OP size_t ckca__conv_workspace(const ckca_context *ctx, const ckca__conv *s) {
    const double pixels = (double)s->n * s->p * s->q;
    const size_t rows = pixels < 1e9 ? (size_t)pixels : 1000000000;
    const size_t weights =
        ckca__mul(ckca__mul((size_t)s->r * s->s, (size_t)ckca__padded_channels(ctx, s)), (size_t)s->k);
    const size_t parts = ckca__mul((rows / CKCA__ROWS + CKCA__PARTS + 1) * 2 * sizeof(float), (size_t)s->k);
    if (s->groups > 1) return parts; /* the bias gradient's */
    const size_t cast = ckca__round_up(ckca__mul(weights, sizeof(float)), CKCA__ALIGN);
    const size_t padded = ckca__padded_bytes(ctx, s);
    size_t most = ckca__sum(cast, ckca__sum(padded, parts)), splits = weights;
    if (pixels <= INT_MAX) splits = ckca__mul(weights, (size_t)ckca__weight_splits(ctx, s));
    splits = ckca__sum(padded, ckca__mul(splits, sizeof(float)));
    return most < splits ? splits : most;
}

/* Pixels, taps, and offsets within a window must fit in an int. */
static int ckca__conv_fits(ckca_context *ctx, const ckca__conv *s) {
    const double most = INT_MAX - 4096, lines = s->r + 1.0;
    if ((double)s->n * s->h * s->w < most && (double)s->n * s->p * s->q < most &&
        lines * (s->s + 1.0) * (s->c + 8.0) < most && lines * (s->s + 1.0) * s->k < most &&
        lines * s->w * (s->c + 8.0) < most && lines * s->q * s->k < most)
        return 1;
    char what[200];
    snprintf(what, sizeof what, "%d x %d x %d x %d by %d x %d x %d: 2^31 pixels, or values in a window's reach", s->n,
             s->h, s->w, s->c, s->k, s->r, s->s);
    return ckca__cuda_note(ckca__cuda_of(ctx), "convolution", what);
}

template <int PRECISION, int PASS, int WHOLE>
static void ckca__launch_gemm(ckca_context *ctx, dim3 grid, int columns, const ckca__gemm *g) {
    const auto launch = [&](auto width) {
        typedef ckca__block<PRECISION, PASS, decltype(width)::VALUE, WHOLE> B;
        ckca__launch(ctx, "ckca__gemm_kernel", ckca__gemm_kernel<B>, ckca__launch_shape(grid, B::THREADS, B::BYTES),
                     *g);
    };
    if (columns == 16)
        launch(ckca__constant<16>());
    else if (columns == 32)
        launch(ckca__constant<32>());
    else if (columns == 64)
        launch(ckca__constant<64>());
    else if constexpr (PRECISION != CKCA_PRECISION_FLOAT32 && WHOLE)
        launch(ckca__constant<128>());
}

template <int PRECISION, int PASS>
static void ckca__launch_gemm(ckca_context *ctx, dim3 grid, int columns, const ckca__gemm *g) {
    if (PASS == CKCA__PASS_FORWARD || ckca__is_whole(ctx, PASS, &g->s))
        ckca__launch_gemm<PRECISION, PASS, 1>(ctx, grid, columns, g);
    else
        ckca__launch_gemm<PRECISION, PASS, PASS == CKCA__PASS_FORWARD>(ctx, grid, columns, g);
}

/* Uses wgmma on GPUs of compute capability 9.0, if the binary has code for sm_90a, whose kernel has static shared
   memory. Newer GPUs have no wgmma. */
static void ckca__wgmma_init(ckca__cuda *cuda, const cudaDeviceProp *gpu) {
    typedef ckca__wgmma_block<CKCA_PRECISION_BF16, CKCA__PASS_FORWARD, 64> B;
    void *const to[2] = {&cuda->encode_tiled, &cuda->encode_im2col};
    static const char *const name[2] = {"cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col"};
    cudaFuncAttributes kernel;
    cuda->wgmma = gpu->major == 9 && gpu->minor == 0 &&
                  CKCA__CUDA(cuda, cudaFuncGetAttributes(&kernel, ckca__wgmma_kernel<B>)) && kernel.sharedSizeBytes > 0;
    for (int i = 0; i < 2 && cuda->wgmma; i++) {
        cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        cuda->wgmma = CKCA__CUDA(
            cuda, cudaGetDriverEntryPointByVersion(name[i], (void **)to[i], 12000, cudaEnableDefault, &found));
#else
        cuda->wgmma = CKCA__CUDA(cuda, cudaGetDriverEntryPoint(name[i], (void **)to[i], cudaEnableDefault, &found));
#endif
        if (found != cudaDriverEntryPointSuccess) cuda->wgmma = 0;
    }
}

/* For tests and benchmarks: 0 leaves wgmma out, 1 uses it again where the GPU and the binary have it. Returns whether
   it was in use. */
CKCA__OP int ckca__device_wgmma(ckca_context *ctx, int on) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    const int was = cuda->wgmma;
    cuda->wgmma = on && cuda->encode_im2col != NULL;
    return was;
}

/* 1: the pass runs on wgmma. Fewer than 64 columns would leave it idle for want of bytes. The bounds are TMA's. */
static int ckca__uses_wgmma(ckca_context *ctx, int pass, const ckca__conv *s, int width) {
    const int channels = pass == CKCA__PASS_DATA ? s->k : s->c, columns = pass == CKCA__PASS_DATA ? s->c : s->k;
    const int values = ckca__chunk_values(ctx, s);
    return ckca__cuda_of(ctx)->wgmma && ckca__math(ctx, s) != CKCA_PRECISION_FLOAT32 && pass != CKCA__PASS_WEIGHT &&
           width >= 64 && channels % (8 * values) == 0 && columns % values == 0 &&
           s->stride * s->stride <= CKCA__WGMMA_PHASES && s->r <= 16 && s->s <= 16 && s->pad <= 16;
}

/* Makes the tensor maps of a pass. */
template <int PASS>
static int ckca__wgmma_encode(ckca_context *ctx, const ckca__gemm *g, int width, ckca__wgmma_maps *maps) {
    const ckca__conv *s = &g->s;
    const ckca__cuda *cuda = ckca__cuda_of(ctx);
    const int is_data = PASS == CKCA__PASS_DATA, channels = is_data ? s->k : s->c,
              depth = 8 * ckca__chunk_values(ctx, s);
    const cuuint64_t bytes = 16 / ckca__chunk_values(ctx, s), taps = (cuuint64_t)s->r * s->s;
    const cuuint64_t w = is_data ? s->q : s->w, h = is_data ? s->p : s->h, line = channels * bytes;
    const cuuint64_t sizes[4] = {(cuuint64_t)channels, w, h, (cuuint64_t)s->n},
                     strides[3] = {line, line * w, line * w * h};
    const cuuint64_t matrix[2] = {taps * channels, (cuuint64_t)(is_data ? s->c : s->k)}, pitch[1] = {taps * line};
    const cuuint32_t box[2] = {(cuuint32_t)depth, (cuuint32_t)width}, ones[2] = {1, 1};
    const CUtensorMapDataType type = bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
    CUresult failed = cuda->encode_tiled(&maps->weights, type, 2, (void *)g->b, matrix, pitch, box, ones,
                                         CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                         CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    for (int z = 0; z < (is_data ? s->stride * s->stride : 1) && !failed; z++) {
        const ckca__phase py = ckca__phase_of(PASS, z / s->stride, s->r, s->stride, s->pad, is_data ? s->h : s->p);
        const ckca__phase px = ckca__phase_of(PASS, z % s->stride, s->s, s->stride, s->pad, is_data ? s->w : s->q);
        /* The box of the pixels under the first tap; upper is relative to the last pixel. */
        const int lower[2] = {px.from, py.from};
        const int upper[2] = {px.from + (px.count - 1) * px.stride - ((int)w - 1),
                              py.from + (py.count - 1) * py.stride - ((int)h - 1)};
        const cuuint32_t steps[4] = {1, (cuuint32_t)px.stride, (cuuint32_t)py.stride, 1};
        if (!px.taps || !py.taps || !px.count || !py.count) continue; /* nothing is loaded */
        failed = cuda->encode_im2col(&maps->pixels[z], type, 4, (void *)g->a, sizes, strides, lower, upper,
                                     (cuuint32_t)depth, CKCA__ROWS, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                     CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    }
    if (failed) ckca__cuda_note(ckca__cuda_of(ctx), "cuTensorMapEncode", "the driver makes no map of a tensor");
    return !failed;
}

template <int PASS> static void ckca__launch_wgmma(ckca_context *ctx, dim3 grid, int width, const ckca__gemm *g) {
    ckca__wgmma_maps maps = {};
    const auto launch = [&](auto precision, auto columns) {
        typedef ckca__wgmma_block<decltype(precision)::VALUE, PASS, decltype(columns)::VALUE> B;
        ckca__launch(ctx, "ckca__wgmma_kernel", ckca__wgmma_kernel<B>, ckca__launch_shape(grid, B::THREADS, B::BYTES),
                     maps, *g);
    };
    const auto dispatch = [&](auto precision) {
        if (width == 64)
            launch(precision, ckca__constant<64>());
        else
            launch(precision, ckca__constant<128>());
    };
    if (!ckca__wgmma_encode<PASS>(ctx, g, width, &maps)) return;
    if (ckca__math(ctx, &g->s) == CKCA_PRECISION_BF16)
        dispatch(ckca__constant<CKCA_PRECISION_BF16>());
    else
        dispatch(ckca__constant<CKCA_PRECISION_TF32>());
}

template <int PASS> static void ckca__run_gemm(ckca_context *ctx, ckca__gemm *g) {
    const ckca__conv *s = &g->s;
    const int columns = PASS == CKCA__PASS_DATA ? s->c : s->k, width = ckca__columns(ctx, PASS, s);
    int rows = s->n * s->p * s->q, layers = 1;
    if (PASS == CKCA__PASS_DATA) { /* phase 0 has the most pixels and sizes the grid */
        rows = s->n * ckca__ceil(s->h, s->stride) * ckca__ceil(s->w, s->stride);
        layers = s->stride * s->stride;
    }
    if (PASS == CKCA__PASS_FORWARD) g->group = ckca__group(ckca__ceil(rows, CKCA__ROWS));
    if (PASS == CKCA__PASS_WEIGHT) {
        rows = s->r * s->s * s->c;
        layers = g->splits;
        g->split = ckca__ceil(s->n * s->p * s->q, layers);
        g->group = ckca__group(layers);
    }
    g->p = ckca__divide_by(PASS == CKCA__PASS_DATA ? s->h : s->p);
    g->q = ckca__divide_by(PASS == CKCA__PASS_DATA ? s->w : s->q);
    g->column_blocks = ckca__ceil(columns, width);
    g->tickets = ckca__tickets(ckca__cuda_of(ctx));
    const dim3 grid((unsigned)ckca__ceil(rows, CKCA__ROWS) * g->column_blocks, 1, layers);
    if constexpr (PASS != CKCA__PASS_WEIGHT) {
        if (ckca__uses_wgmma(ctx, PASS, s, width)) {
            ckca__launch_wgmma<PASS>(ctx, grid, width, g);
            return;
        }
    }
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

/* Adds a convolution to the launch; cast and transposed as in ckca__pack_batch. */
static void ckca__pack_add(const ckca_context *ctx, ckca__pack_batch *a, const ckca__conv *s, const float *w,
                           void *cast, int padded_c, void *transposed) {
    auto &o = a->of[a->count++];
    o.w = w;
    o.cast = cast;
    o.transposed = transposed;
    o.bf16 = ckca__math(ctx, s) == CKCA_PRECISION_BF16;
    o.k = s->k;
    o.taps = s->r * s->s;
    o.c = s->c;
    o.padded_c = padded_c;
    o.first = a->tiles;
    a->tiles += ckca__ceil(s->k, CKCA__TILE) * ckca__ceil(s->c, CKCA__TILE) * o.taps;
}
static void ckca__pack_run(ckca_context *ctx, ckca__pack_batch *a) {
    if (a->tiles) CKCA__LAUNCH(ctx, ckca__pack_kernel, (unsigned)a->tiles, *a);
    a->count = a->tiles = 0;
}

CKCA__OP void ckca__op_pack_weights(ckca_context *ctx, int count, const ckca__conv *s, const float *const *w,
                                    int backward) {
    ckca__pack_batch a = {};
    for (int i = 0; i < count; i++) {
        if (s[i].groups > 1) continue; /* read in place */
        const size_t cast = ckca__cast_bytes(ctx, &s[i]),
                     transposed = backward ? ckca__transposed_bytes(ctx, &s[i]) : 0;
        const int padded_c = ckca__is_product(&s[i]) ? s[i].c : ckca__padded_channels(ctx, &s[i]);
        char *to = (char *)s[i].packed_weights;
        if (cast || transposed)
            ckca__pack_add(ctx, &a, &s[i], w[i], cast ? to : NULL, padded_c, transposed ? to + cast : NULL);
        if (a.count == CKCA__PACK_MAX) ckca__pack_run(ctx, &a);
    }
    ckca__pack_run(ctx, &a);
}

/* Returns the weights as a pass reads them, with padded_c channels (transposed: K): w, the prepacked weights, or
   weights packed into ws. */
static const void *ckca__weights(ckca_context *ctx, const ckca__conv *s, int transposed, int padded_c, const float *w,
                                 void *ws) {
    const size_t cast = ckca__cast_bytes(ctx, s);
    const int as_packed = ckca__is_product(s) ? s->c : ckca__padded_channels(ctx, s);
    ckca__pack_batch a = {};
    if (!transposed && padded_c == s->c && ckca__math(ctx, s) != CKCA_PRECISION_BF16) return w;
    if (s->packed_weights && (transposed || padded_c == as_packed))
        return (char *)s->packed_weights + (transposed ? cast : 0);
    ckca__pack_add(ctx, &a, s, w, transposed ? NULL : ws, padded_c, transposed ? ws : NULL);
    ckca__pack_run(ctx, &a);
    return ws;
}

/* Returns x as FORWARD and WEIGHT read it: x, or a padded copy in ws. */
static const void *ckca__pad_channels(ckca_context *ctx, const ckca__conv *s, const void *x, void *ws) {
    const size_t pixels = (size_t)s->n * s->h * s->w;
    const int padded_c = ckca__padded_channels(ctx, s);
    if (!ckca__is_padded(ctx, s)) return x;
    const unsigned grid = ckca__grid(ctx, pixels * (padded_c / ckca__chunk_values(ctx, s)), 1);
    ckca__dispatch_type(s->bf16_x, [&](auto from) {
        typedef decltype(from) FROM;
        ckca__dispatch_type(ckca__math(ctx, s) == CKCA_PRECISION_BF16, [&](auto to) {
            typedef decltype(to) T;
            CKCA__LAUNCH(ctx, (ckca__pad_channels_kernel<FROM, T>), grid, pixels, s->c, padded_c, (const FROM *)x,
                         (T *)ws);
        });
    });
    return ws;
}

/* c (rows x columns) = (or +=) a b, all row-major. transpose_a: a is stored as summed x rows; transpose_b: b as
   columns x summed. bf16: a and b are bfloat16; bf16_c: c is. cuBLAS is column-major, so the call computes
   c^T = b^T a^T. */
static void ckca__product(ckca_context *ctx, int rows, int columns, int summed, int bf16, const void *a,
                          int transpose_a, const void *b, int transpose_b, int bf16_c, void *c, int accumulate) {
    const float one = 1, beta = accumulate ? 1.0f : 0.0f;
    const cublasComputeType_t compute =
        bf16 || ctx->precision == CKCA_PRECISION_FLOAT32 ? CUBLAS_COMPUTE_32F : CUBLAS_COMPUTE_32F_FAST_TF32;
    const cudaDataType type = bf16 ? CUDA_R_16BF : CUDA_R_32F;
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    const cublasHandle_t blas = cuda->side.active ? cuda->side.blas : cuda->blas;
    ckca__cuda_stream(cuda); /* waits for the side stream */
    CKCA__BLAS(cuda, cublasGemmEx(blas, transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N,
                                  transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, columns, rows, summed, &one, b, type,
                                  transpose_b ? summed : columns, a, type, transpose_a ? rows : summed, &beta, c,
                                  bf16_c ? CUDA_R_16BF : CUDA_R_32F, columns, compute, CUBLAS_GEMM_DEFAULT));
}

/* Never: cuBLAS computes 1 x 1 convolutions and cannot normalise its input on load. */
CKCA__OP int ckca__may_norm(const ckca_context *ctx, const ckca__conv *s) {
    (void)ctx;
    (void)s;
    return 0;
}

CKCA__OP int ckca__may_take_statistics(const ckca_context *ctx, const ckca__conv *s) {
    (void)ctx;
    return s->groups < 2;
}

/* Behind the poolings, whose indexing they use: */
static void ckca__grouped_forward(ckca_context *ctx, const ckca__conv *s, const float *x, const float *w,
                                  const float *bias, const float *residual, int relu, float *y);
static void ckca__grouped_backward_data(ckca_context *ctx, const ckca__conv *s, const float *dy, const float *w,
                                        float *dx, int accumulate);
static void ckca__grouped_backward_weight(ckca_context *ctx, const ckca__conv *s, const float *x, const float *dy,
                                          float *dw);

/* 1: a 1 x 1 convolution with statistics uses our GEMM, whose epilogue computes them, not cuBLAS and another pass over
   the output. A model, not a measurement (H100, our GEMM at half of tensor-core peak, cuBLAS at four fifths): for small
   C, whose products are cheap, the slower GEMM costs less than that pass; on the FFMA units it never does. */
static int ckca__fuses_statistics(const ckca_context *ctx, const ckca__conv *s) {
    return ctx->precision != CKCA_PRECISION_FLOAT32 && s->c <= 256;
}

/* 1: there are enough tickets to compute the output's statistics in the epilogue. */
static int ckca__has_tickets(const ckca_context *ctx, const ckca__conv *s) {
    const int blocks = ckca__ceil(s->n * s->p * s->q, CKCA__ROWS), groups = ckca__ceil(blocks, ckca__group(blocks));
    return (double)(groups + 1) * ckca__ceil(s->k, ckca__columns(ctx, CKCA__PASS_FORWARD, s)) <= CKCA__TICKETS;
}

CKCA__OP void ckca__op_conv_forward(ckca_context *ctx, const ckca__conv *s, const float *x, const float *w,
                                    const float *bias, const float *residual, int relu, float *y, void *ws) {
    const int padded_c = ckca__padded_channels(ctx, s), plain = !bias && !residual && !relu;
    const int product = ckca__is_product(s) && plain && !(s->statistics && ckca__fuses_statistics(ctx, s));
    char *cursor = (char *)ws;
    ckca__gemm g = {};
    int taken = 0;
    if (!ckca__conv_fits(ctx, s)) return;
    if (s->groups > 1) {
        ckca__grouped_forward(ctx, s, x, w, bias, residual, relu, y);
        return;
    }
    g.s = *s;
    g.b = ckca__weights(ctx, s, 0, product ? s->c : padded_c, w, ws);
    if (g.b == ws)
        cursor += ckca__round_up((size_t)s->r * s->s * padded_c * s->k * ckca__value_bytes(ctx, s), CKCA__ALIGN);
    if (product) {
        ckca__product(ctx, s->n * s->p * s->q, s->k, s->c, s->bf16, x, 0, g.b, 1, s->bf16, y, 0);
    } else { /* the epilogue saves a pass over y */
        g.a = ckca__pad_channels(ctx, s, x, cursor);
        g.s.c = padded_c;
        g.bias = bias;
        g.residual = residual;
        g.relu = relu;
        g.out = y;
        if (g.a == cursor) cursor += ckca__padded_bytes(ctx, s);
        if (s->statistics && ckca__has_tickets(ctx, s)) {
            taken = 1;
            g.statistics = *s->statistics;
            g.part = (float *)cursor;
        }
        ckca__run_gemm<CKCA__PASS_FORWARD>(ctx, &g);
    }
    if (s->statistics && !taken)
        ckca__take_statistics(ctx, s->bf16, (size_t)s->n * s->p * s->q, s->k, y, s->statistics, cursor);
}

CKCA__OP void ckca__op_conv_backward_data(ckca_context *ctx, const ckca__conv *s, const float *dy, const float *w,
                                          float *dx, int accumulate, void *ws) {
    ckca__gemm g = {};
    if (!ckca__conv_fits(ctx, s)) return;
    if (s->groups > 1) {
        ckca__grouped_backward_data(ctx, s, dy, w, dx, accumulate);
        return;
    }
    g.s = *s;
    g.a = dy;
    ckca__cuda_of(ctx)->side.overlap = s->packed_weights != NULL; /* then this pass does not use ws */
    g.b = ckca__weights(ctx, s, !ckca__is_product(s), s->c, w, ws);
    g.out = dx;
    g.accumulate = accumulate;
    if (ckca__is_product(s))
        ckca__product(ctx, s->n * s->p * s->q, s->c, s->k, s->bf16, dy, 0, g.b, 0, s->bf16, dx, accumulate);
    else
        ckca__run_gemm<CKCA__PASS_DATA>(ctx, &g);
    ckca__cuda_of(ctx)->side.overlap = 0;
}

CKCA__OP void ckca__op_conv_backward_weight(ckca_context *ctx, const ckca__conv *s, const float *x, const float *dy,
                                            float *dw, float *dbias, void *ws) {
    ckca__gemm g = {};
    if (!ckca__conv_fits(ctx, s)) return;
    if (s->packed_weights && s->groups < 2) ckca__side_begin(ckca__cuda_of(ctx));
    if (s->groups > 1) {
        ckca__grouped_backward_weight(ctx, s, x, dy, dw);
    } else if (ckca__is_product(s)) {
        ckca__product(ctx, s->k, s->c, s->n * s->p * s->q, s->bf16, dy, 1, x, 0, 0, dw, 1);
    } else {
        char *cursor = (char *)ws;
        g.s = *s;
        g.channels = s->c;
        g.a = x;
        g.splits = ckca__weight_splits(ctx, s);
        if (ckca__is_whole(ctx, CKCA__PASS_WEIGHT, s)) {
            g.a = ckca__pad_channels(ctx, s, x, cursor);
            g.s.c = ckca__padded_channels(ctx, s);
            if (g.a == cursor) cursor += ckca__padded_bytes(ctx, s);
        }
        g.b = dy;
        g.dw = dw;
        g.out = cursor;
        ckca__run_gemm<CKCA__PASS_WEIGHT>(ctx, &g);
    }
    if (dbias) {
        ckca__moments m = {};
        m.rows = (size_t)s->n * s->p * s->q;
        m.c = s->k;
        m.dy = dy;
        m.dbeta = dbias;
        m.part = (float *)ws;
        ckca__run_channel_sums(ctx, s->bf16, 1, &m);
    }
    ckca__side_end(ckca__cuda_of(ctx));
}

/* A linear layer is a 1 x 1 convolution over n pictures of one pixel. */
static ckca__conv ckca__linear_as_conv(int n, int d, int k) {
    const ckca__conv s = {n, 1, 1, d, k, 1, 1, 1, 0, 1, 1, NULL, 0, 0, NULL, NULL, 0};
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
    if (dw) ckca__op_conv_backward_weight(ctx, &s, x, dy, dw, dbias, ws);
}

/* ------------------------------------------------------------------------------------------------------------------
   ELEMENTS
   ------------------------------------------------------------------------------------------------------------------ */

/* A grid-stride loop: i runs over this thread's share of 0 .. count - 1. */
#define CKCA__EACH(i, count)                                                            \
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)(count); \
         i += (size_t)gridDim.x * blockDim.x)

/* The same for a function template over WIDTH adjacent values of T: whole chunks, then the remainder value by value. */
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
    ckca__wait_for_grids();
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
    ckca__wait_for_grids();
    CKCA__IN_CHUNKS(T, count, ckca__add_backward_at, y, dy, dx, accumulate);
}
CKCA__OP void ckca__op_add(ckca_context *ctx, int bf16, size_t count, const float *a, const float *b, int relu,
                           float *y) {
    ckca__dispatch_type(bf16, [&](auto type) {
        typedef decltype(type) T;
        CKCA__LAUNCH(ctx, ckca__add_kernel<T>, ckca__grid(ctx, count / ckca__chunk<T>::VALUES, 1), count, (const T *)a,
                     (const T *)b, relu, (T *)y);
    });
}
CKCA__OP void ckca__op_add_backward(ckca_context *ctx, int bf16, size_t count, const float *y, const float *dy,
                                    float *dx, int accumulate) {
    ckca__dispatch_type(bf16, [&](auto type) {
        typedef decltype(type) T;
        CKCA__LAUNCH(ctx, ckca__add_backward_kernel<T>, ckca__grid(ctx, count / ckca__chunk<T>::VALUES, 1), count,
                     (const T *)y, (const T *)dy, (T *)dx, accumulate);
    });
}

/* The coordinates of item i of n x h x w x c / WIDTH. There are fewer than 2^32 pixels; values may be more. */
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

/* Each thread computes WIDTH channels of an output. The first of equal values wins; NaN beats any number. */
template <class T, int WIDTH> __global__ void ckca__maxpool_kernel(ckca__conv s, const T *x, T *y, unsigned char *at) {
    ckca__wait_for_grids();
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
/* Each thread gathers WIDTH channels of an input's gradient from the windows that cover it. */
template <class T, int WIDTH>
__global__ void ckca__maxpool_backward_kernel(ckca__conv s, const T *dy, const unsigned char *at, T *dx,
                                              int accumulate) {
    ckca__wait_for_grids();
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
    ckca__dispatch_channels(s->bf16, s->c, [&](auto type, auto width) {
        typedef decltype(type) T;
        enum { WIDTH = decltype(width)::VALUE };
        CKCA__LAUNCH(ctx, (ckca__maxpool_kernel<T, WIDTH>),
                     ckca__grid(ctx, (size_t)s->n * s->p * s->q * s->c / WIDTH, 1), *s, (const T *)x, (T *)y, at);
    });
}
CKCA__OP void ckca__op_maxpool_backward(ckca_context *ctx, const ckca__conv *s, const float *dy,
                                        const unsigned char *at, float *dx, int accumulate) {
    ckca__dispatch_channels(s->bf16, s->c, [&](auto type, auto width) {
        typedef decltype(type) T;
        enum { WIDTH = decltype(width)::VALUE };
        CKCA__LAUNCH(ctx, (ckca__maxpool_backward_kernel<T, WIDTH>),
                     ckca__grid(ctx, (size_t)s->n * s->h * s->w * s->c / WIDTH, 1), *s, (const T *)dy, at, (T *)dx,
                     accumulate);
    });
}

/* Each thread computes WIDTH means; adjacent threads read adjacent channels. */
template <class T, int WIDTH> __global__ void ckca__avgpool_kernel(int n, int area, int c, const T *x, float *y) {
    ckca__wait_for_grids();
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
    ckca__wait_for_grids();
    CKCA__EACH(i, (size_t)n * area * c / WIDTH) {
        const ckca__pixel o(i, 1, area, c / WIDTH, WIDTH);
        ckca__lane<WIDTH> g(dy + (size_t)o.n * c + o.c), previous;
        if (accumulate) previous = ckca__lane<WIDTH>(dx + i * WIDTH);
        for (int j = 0; j < WIDTH; j++) g.v[j] = g.v[j] / (float)area + (accumulate ? previous.v[j] : 0);
        g.store(dx + i * WIDTH);
    }
}
CKCA__OP void ckca__op_avgpool_forward(ckca_context *ctx, int bf16, int n, int area, int c, const float *x, float *y) {
    ckca__dispatch_channels(bf16, c, [&](auto type, auto width) {
        typedef decltype(type) T;
        enum { WIDTH = decltype(width)::VALUE };
        CKCA__LAUNCH(ctx, (ckca__avgpool_kernel<T, WIDTH>), ckca__grid(ctx, (size_t)n * c / WIDTH, 1), n, area, c,
                     (const T *)x, y);
    });
}
CKCA__OP void ckca__op_avgpool_backward(ckca_context *ctx, int bf16, int n, int area, int c, const float *dy, float *dx,
                                        int accumulate) {
    ckca__dispatch_channels(bf16, c, [&](auto type, auto width) {
        typedef decltype(type) T;
        enum { WIDTH = decltype(width)::VALUE };
        CKCA__LAUNCH(ctx, (ckca__avgpool_backward_kernel<T, WIDTH>), ckca__grid(ctx, (size_t)n * area * c / WIDTH, 1),
                     n, area, c, dy, (T *)dx, accumulate);
    });
}

template <class T> __global__ void ckca__subsample_kernel(ckca__conv s, const T *x, T *y) {
    ckca__wait_for_grids();
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
    ckca__wait_for_grids();
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
    ckca__dispatch_type(s->bf16, [&](auto type) {
        typedef decltype(type) T;
        CKCA__LAUNCH(ctx, ckca__subsample_kernel<T>, ckca__grid(ctx, (size_t)s->n * s->p * s->q * s->k, 1), *s,
                     (const T *)x, (T *)y);
    });
}
CKCA__OP void ckca__op_subsample_backward(ckca_context *ctx, const ckca__conv *s, const float *dy, float *dx,
                                          int accumulate) {
    ckca__dispatch_type(s->bf16, [&](auto type) {
        typedef decltype(type) T;
        CKCA__LAUNCH(ctx, ckca__subsample_backward_kernel<T>, ckca__grid(ctx, (size_t)s->n * s->h * s->w * s->c, 1), *s,
                     (const T *)dy, (T *)dx, accumulate);
    });
}

/* Grouped convolutions: one thread per output (or input) value, one block per weight, whose sum has a fixed order.
   Simple, not fast: a group has few channels, so there is little to share. */
template <class X, class Y>
__global__ void ckca__grouped_forward_kernel(ckca__conv s, const X *x, const float *w, const float *bias,
                                             const Y *residual, int relu, Y *y) {
    ckca__wait_for_grids();
    const int inputs = s.c / s.groups, outputs = s.k / s.groups;
    CKCA__EACH(i, (size_t)s.n * s.p * s.q * s.k) {
        const ckca__pixel o(i, s.p, s.q, s.k, 1);
        const float *weight = w + (size_t)o.c * s.r * s.s * inputs;
        float sum = 0;
        for (int r = 0; r < s.r; r++)
            for (int t = 0; t < s.s; t++, weight += inputs) {
                const int iy = o.y * s.stride - s.pad + r, ix = o.x * s.stride - s.pad + t;
                if (iy < 0 || iy >= s.h || ix < 0 || ix >= s.w) continue;
                const X *from = x + (((size_t)o.n * s.h + iy) * s.w + ix) * s.c + o.c / outputs * inputs;
                for (int c = 0; c < inputs; c++) sum += ckca__to_float(from[c]) * weight[c];
            }
        if (bias) sum += bias[o.c];
        if (residual) sum += ckca__to_float(residual[i]);
        ckca__put(y + i, relu && sum < 0 ? 0 : sum);
    }
}
template <class T>
__global__ void ckca__grouped_data_kernel(ckca__conv s, const T *dy, const float *w, T *dx, int accumulate) {
    ckca__wait_for_grids();
    const int inputs = s.c / s.groups, outputs = s.k / s.groups;
    CKCA__EACH(i, (size_t)s.n * s.h * s.w * s.c) {
        const ckca__pixel o(i, s.h, s.w, s.c, 1);
        const int group = o.c / inputs;
        float sum = 0;
        for (int r = 0; r < s.r; r++)
            for (int t = 0; t < s.s; t++) {
                const int top = o.y + s.pad - r, left = o.x + s.pad - t, p = top / s.stride, q = left / s.stride;
                if (top < 0 || top % s.stride || p >= s.p || left < 0 || left % s.stride || q >= s.q) continue;
                const T *from = dy + (((size_t)o.n * s.p + p) * s.q + q) * s.k + group * outputs;
                const float *weight = w + (((size_t)group * outputs * s.r + r) * s.s + t) * inputs + o.c % inputs;
                for (int k = 0; k < outputs; k++)
                    sum += ckca__to_float(from[k]) * weight[(size_t)k * s.r * s.s * inputs];
            }
        ckca__put(dx + i, accumulate ? ckca__to_float(dx[i]) + sum : sum);
    }
}
template <class X, class Y>
__global__ void ckca__grouped_weight_kernel(ckca__conv s, const X *x, const Y *dy, float *dw) {
    ckca__wait_for_grids();
    const int inputs = s.c / s.groups, outputs = s.k / s.groups;
    for (size_t b = blockIdx.x; b < (size_t)s.k * s.r * s.s * inputs; b += gridDim.x) {
        const ckca__pixel o(b, s.r, s.s, inputs, 1); /* n is the output channel, y and x the tap */
        const int channel = o.n / outputs * inputs + o.c;
        float sum = 0;
        for (size_t i = threadIdx.x; i < (size_t)s.n * s.p * s.q; i += CKCA__THREADS) {
            const ckca__pixel at(i, s.p, s.q, 1, 1);
            const int iy = at.y * s.stride - s.pad + o.y, ix = at.x * s.stride - s.pad + o.x;
            if (iy < 0 || iy >= s.h || ix < 0 || ix >= s.w) continue;
            sum += ckca__to_float(x[(((size_t)at.n * s.h + iy) * s.w + ix) * s.c + channel]) *
                   ckca__to_float(dy[i * s.k + o.n]);
        }
        const float total = ckca__block_sum(sum);
        if (threadIdx.x == 0) dw[b] += total;
    }
}
static void ckca__grouped_forward(ckca_context *ctx, const ckca__conv *s, const float *x, const float *w,
                                  const float *bias, const float *residual, int relu, float *y) {
    ckca__dispatch_type(s->bf16_x, [&](auto in) {
        typedef decltype(in) X;
        ckca__dispatch_type(s->bf16, [&](auto out) {
            typedef decltype(out) Y;
            CKCA__LAUNCH(ctx, (ckca__grouped_forward_kernel<X, Y>),
                         ckca__grid(ctx, (size_t)s->n * s->p * s->q * s->k, 1), *s, (const X *)x, w, bias,
                         (const Y *)residual, relu, (Y *)y);
        });
    });
}
static void ckca__grouped_backward_data(ckca_context *ctx, const ckca__conv *s, const float *dy, const float *w,
                                        float *dx, int accumulate) {
    ckca__dispatch_type(s->bf16, [&](auto type) {
        typedef decltype(type) T;
        CKCA__LAUNCH(ctx, ckca__grouped_data_kernel<T>, ckca__grid(ctx, (size_t)s->n * s->h * s->w * s->c, 1), *s,
                     (const T *)dy, w, (T *)dx, accumulate);
    });
}
static void ckca__grouped_backward_weight(ckca_context *ctx, const ckca__conv *s, const float *x, const float *dy,
                                          float *dw) {
    ckca__dispatch_type(s->bf16_x, [&](auto in) {
        typedef decltype(in) X;
        ckca__dispatch_type(s->bf16, [&](auto out) {
            typedef decltype(out) Y;
            CKCA__LAUNCH(ctx, (ckca__grouped_weight_kernel<X, Y>),
                         ckca__grid(ctx, (size_t)s->k * s->r * s->s * (s->c / s->groups) * CKCA__THREADS, 1), *s,
                         (const X *)x, (const Y *)dy, dw);
        });
    });
}

/* Group norm: each block processes whole groups of a picture. A group is runs of c / groups values, c apart. */
struct ckca__norm_group {
    int c, per, channel; /* channels of the tensor, of the group; its first channel */
    size_t first;        /* index of its first value */
    float count;         /* number of its values */
    __device__ __forceinline__ ckca__norm_group(size_t b, int area, int channels, int groups)
        : c(channels), per(channels / groups), channel((int)(b % groups) * per),
          first(b / groups * area * channels + channel), count((float)area * (float)per) {}
    /* The index of the group's value i, and its channel. */
    __device__ __forceinline__ size_t at(size_t i) const { return first + i / per * c + i % per; }
    __device__ __forceinline__ int channel_of(size_t i) const { return channel + (int)(i % per); }
};

template <class T>
__global__ void ckca__groupnorm_kernel(size_t all, int area, int c, int groups, const T *x, const float *gamma,
                                       const float *beta, T *y, float *statistics) {
    ckca__wait_for_grids();
    for (size_t b = blockIdx.x; b < all; b += gridDim.x) {
        const ckca__norm_group group(b, area, c, groups);
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
    ckca__wait_for_grids();
    for (size_t b = blockIdx.x; b < all; b += gridDim.x) {
        const ckca__norm_group group(b, area, c, groups);
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
/* part (n x 2 x c): each picture's sums of dy xhat and of dy. ckca__groupnorm_gradients adds them over the pictures. */
template <class T>
__global__ void ckca__groupnorm_parts(int n, int area, int c, int groups, const T *x, const float *statistics,
                                      const T *dy, float *part) {
    ckca__wait_for_grids();
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
    ckca__wait_for_grids();
    CKCA__EACH(i, 2 * (size_t)c) {
        double sum = 0;
        for (int picture = 0; picture < n; picture++) sum += part[(size_t)picture * 2 * c + i];
        *(i < (size_t)c ? dgamma + i : dbeta + (i - c)) += (float)sum;
    }
}
CKCA__OP void ckca__op_groupnorm_forward(ckca_context *ctx, int bf16, int n, int area, int c, int groups,
                                         const float *x, const float *gamma, const float *beta, float *y,
                                         float *statistics) {
    ckca__dispatch_type(bf16, [&](auto type) {
        typedef decltype(type) T;
        const size_t all = (size_t)n * groups;
        CKCA__LAUNCH(ctx, ckca__groupnorm_kernel<T>, ckca__grid(ctx, all * CKCA__THREADS, 1), all, area, c, groups,
                     (const T *)x, gamma, beta, (T *)y, statistics);
    });
}
CKCA__OP void ckca__op_groupnorm_backward(ckca_context *ctx, int bf16, int n, int area, int c, int groups,
                                          const float *x, const float *gamma, const float *statistics, const float *dy,
                                          float *dx, int accumulate, float *dgamma, float *dbeta, void *ws) {
    ckca__dispatch_type(bf16, [&](auto type) {
        typedef decltype(type) T;
        const size_t all = (size_t)n * groups;
        if (dgamma)
            CKCA__LAUNCH(ctx, ckca__groupnorm_parts<T>, ckca__grid(ctx, (size_t)n * c, 1), n, area, c, groups,
                         (const T *)x, statistics, (const T *)dy, (float *)ws);
        if (dx)
            CKCA__LAUNCH(ctx, ckca__groupnorm_backward_kernel<T>, ckca__grid(ctx, all * CKCA__THREADS, 1), all, area, c,
                         groups, (const T *)x, gamma, statistics, (const T *)dy, (T *)dx, accumulate);
    });
    if (dgamma)
        CKCA__LAUNCH(ctx, ckca__groupnorm_gradients, ckca__grid(ctx, 2 * (size_t)c, 1), n, c, (const float *)ws, dgamma,
                     dbeta);
}

__global__ void ckca__gather_kernel(int n, int d, const float *rows, const int *index, float *out) {
    ckca__wait_for_grids();
    CKCA__EACH(i, (size_t)n * d) out[i] = rows[(size_t)index[i / d] * d + i % d];
}
CKCA__OP void ckca__op_gather(ckca_context *ctx, int n, int d, const float *rows, const int *index, float *out) {
    CKCA__LAUNCH(ctx, ckca__gather_kernel, ckca__grid(ctx, (size_t)n * d, 1), n, d, rows, index, out);
}

/* ------------------------------------------------------------------------------------------------------------------
   LOSSES: one warp per picture, one block for feature losses. Exponentials and sums are in double, as on the host.
   ------------------------------------------------------------------------------------------------------------------ */

/* log sum_j exp(logits[j] / t), computed by the whole warp. NaN or +inf among the logits gives NaN. */
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

/* This warp's picture; its lanes loop over the classes. */
__device__ __forceinline__ int ckca__warp_row() { return (int)(blockIdx.x * (CKCA__THREADS / 32) + threadIdx.x / 32); }

__global__ void ckca__cross_entropy_kernel(int n, int k, const float *logits, const int *labels, float smoothing,
                                           float scale, float *dlogits, float *loss, int *hit) {
    ckca__wait_for_grids();
    const int i = ckca__warp_row(), lane = (int)threadIdx.x % 32;
    if (i >= n) return;
    const float *row = logits + (size_t)i * k;
    const double lse = ckca__log_sum_exp(k, row, 1);
    const int label = labels[i];
    double sum = 0;
    int rank = 0;
    for (int j = lane; j < k; j += 32) {
        sum += row[j];
        rank += row[j] > row[label] || (row[j] == row[label] && j < label);
        if (dlogits)
            dlogits[(size_t)i * k + j] =
                (float)(scale * ((exp(row[j] - lse) - (j == label ? 1 - smoothing : 0) - smoothing / k) / n));
    }
    sum = ckca__warp_sum(sum);
    rank = ckca__warp_sum(rank);
    if (lane) return;
    loss[i] = (float)(lse - (1 - smoothing) * row[label] - smoothing * (sum / k));
    hit[i] = lse == lse ? (rank == 0) | (rank < 5) << 1 : 0;
}
CKCA__OP void ckca__op_cross_entropy(ckca_context *ctx, int n, int k, const float *logits, const int *labels,
                                     float smoothing, float scale, float *dlogits, float *loss, int *hit) {
    CKCA__LAUNCH(ctx, ckca__cross_entropy_kernel, ckca__warps(n), n, k, logits, labels, smoothing, scale, dlogits, loss,
                 hit);
}

__global__ void ckca__softmax_kernel(int n, int k, const float *logits, float *p) {
    ckca__wait_for_grids();
    const int i = ckca__warp_row();
    if (i >= n) return;
    const double lse = ckca__log_sum_exp(k, logits + (size_t)i * k, 1);
    for (int j = (int)threadIdx.x % 32; j < k; j += 32)
        p[(size_t)i * k + j] = (float)exp(logits[(size_t)i * k + j] - lse);
}
CKCA__OP void ckca__op_softmax(ckca_context *ctx, int n, int k, const float *logits, float *p) {
    CKCA__LAUNCH(ctx, ckca__softmax_kernel, ckca__warps(n), n, k, logits, p);
}

/* One block. */
__global__ void ckca__sum_kernel(int n, const float *values, double *sum) {
    ckca__wait_for_grids();
    double v = 0;
    for (int i = (int)threadIdx.x; i < n; i += CKCA__THREADS) v += values[i];
    v = ckca__block_sum(v);
    if (threadIdx.x == 0) *sum += v;
}
CKCA__OP void ckca__op_sum(ckca_context *ctx, int n, const float *values, double *sum) {
    CKCA__LAUNCH(ctx, ckca__sum_kernel, 1, n, values, sum);
}
__global__ void ckca__count_kernel(int n, const int *hit, double *sum) {
    ckca__wait_for_grids();
    double v = 0;
    for (int i = (int)threadIdx.x; i < n; i += CKCA__THREADS) v += hit[i] & 1;
    v = ckca__block_sum(v);
    if (threadIdx.x == 0) *sum += v;
}
CKCA__OP void ckca__op_count(ckca_context *ctx, int n, const int *hit, double *sum) {
    CKCA__LAUNCH(ctx, ckca__count_kernel, 1, n, hit, sum);
}

__global__ void ckca__adakd_kernel(int n, int k, const float *student_logits, const float *teacher_logits,
                                   const int *labels, const float *class_weight, double t, float scale, float *dlogits,
                                   float *loss) {
    ckca__wait_for_grids();
    const int i = ckca__warp_row(), lane = (int)threadIdx.x % 32;
    if (i >= n) return;
    const float *s = student_logits + (size_t)i * k, *o = teacher_logits + (size_t)i * k;
    const double lse_s = ckca__log_sum_exp(k, s, t), lse_o = ckca__log_sum_exp(k, o, t);
    const double a = class_weight ? class_weight[labels[i]] : 1;
    double kl = 0;
    for (int j = lane; j < k; j += 32) {
        const double log_s = s[j] / t - lse_s, log_o = o[j] / t - lse_o, p_o = exp(log_o);
        kl += p_o * (log_o - log_s);
        dlogits[(size_t)i * k + j] += (float)(scale * t * a * (exp(log_s) - p_o) / n);
    }
    kl = ckca__warp_sum(kl);
    if (!lane) loss[i] = (float)(t * t * a * kl);
}
CKCA__OP void ckca__op_adakd(ckca_context *ctx, int n, int k, const float *student_logits, const float *teacher_logits,
                             const int *labels, const float *class_weight, float temperature, float scale,
                             float *dlogits, float *loss) {
    CKCA__LAUNCH(ctx, ckca__adakd_kernel, ckca__warps(n), n, k, student_logits, teacher_logits, labels, class_weight,
                 (double)temperature, scale, dlogits, loss);
}

__device__ __forceinline__ double ckca__inverse_norm(double square) { return square > 0 ? 1 / sqrt(square) : square; }

/* One block per picture: loss = 1 - cos; d cos / d student = (teacher / |teacher| - cos student / |student|)
   / |student|. */
template <class T, class TEACHER, int WIDTH>
__global__ void ckca__cosine_kernel(int d, const T *student_features, const TEACHER *teacher_features, double scale,
                                    T *dfeatures, int accumulate, float of_zero, float *loss) {
    ckca__wait_for_grids();
    const size_t row = (size_t)blockIdx.x * d, end = row + d;
    double square = 0, square_o = 0, product = 0;
#pragma unroll 2
    for (size_t j = row + threadIdx.x * WIDTH; j < end; j += CKCA__THREADS * WIDTH) {
        const ckca__lane<WIDTH> a(student_features + j), b(teacher_features + j);
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
        ckca__lane<WIDTH> a(student_features + j), previous;
        const ckca__lane<WIDTH> b(teacher_features + j);
        if (accumulate) previous = ckca__lane<WIDTH>(dfeatures + j);
        for (int e = 0; e < WIDTH; e++) a.v[e] = alpha * a.v[e] + beta * b.v[e] + (accumulate ? previous.v[e] : 0);
        a.store(dfeatures + j);
    }
    if (threadIdx.x == 0) loss[blockIdx.x] = inv_o == 0 ? of_zero : (float)(1 - cosine);
}

CKCA__OP void ckca__op_featreg(ckca_context *ctx, int bf16, int bf16_teacher, int n, int d,
                               const float *student_features, const float *teacher_features, float scale,
                               float *dfeatures, int accumulate, float of_zero, float *loss) {
    ckca__dispatch_channels(bf16, d, [&](auto type, auto width) {
        ckca__dispatch_type(bf16_teacher, [&](auto teacher) {
            typedef decltype(type) T;
            typedef decltype(teacher) TEACHER;
            CKCA__LAUNCH(ctx, (ckca__cosine_kernel<T, TEACHER, decltype(width)::VALUE>), n, d,
                         (const T *)student_features, (const TEACHER *)teacher_features, (double)scale / n,
                         (T *)dfeatures, accumulate, of_zero, loss);
        });
    });
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
                                 float factor, float momentum, float weight_decay, int nesterov, const float *gscale) {
    ckca__wait_for_grids();
    const float rate = *lr * factor, scale = gscale ? *gscale : 1;
    CKCA__IN_CHUNKS(float, count, ckca__sgd_at, decayed, w, g, v, rate, momentum, weight_decay, nesterov, scale);
}
CKCA__OP void ckca__op_sgd(ckca_context *ctx, size_t count, size_t decayed, float *w, const float *g, float *v,
                           const float *lr, float factor, float momentum, float weight_decay, int nesterov,
                           const float *gscale) {
    CKCA__LAUNCH(ctx, ckca__sgd_kernel, ckca__grid(ctx, count / 4, 1), count, decayed, w, g, v, lr, factor, momentum,
                 weight_decay, nesterov, gscale);
}

/* sums[block] = the block's part of g . g, in 256 blocks. */
__global__ void ckca__squares_kernel(size_t count, const float *g, double *sums) {
    ckca__wait_for_grids();
    double sum = 0;
    CKCA__EACH(i, count) sum += (double)g[i] * g[i];
    sum = ckca__block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
__global__ void ckca__clip_kernel(const double *sums, float clip, float *gscale) {
    ckca__wait_for_grids();
    const double coefficient = clip / (sqrt(ckca__block_sum(sums[threadIdx.x])) + 1e-6);
    if (threadIdx.x == 0) *gscale = coefficient > 1 ? 1 : (float)coefficient;
}
CKCA__OP void ckca__op_clip(ckca_context *ctx, size_t count, const float *g, float clip, float *gscale, void *ws) {
    CKCA__LAUNCH(ctx, ckca__squares_kernel, CKCA__THREADS, count, g, (double *)ws);
    CKCA__LAUNCH(ctx, ckca__clip_kernel, 1, (const double *)ws, clip, gscale);
}

__global__ void ckca__shrink_perturb_kernel(size_t count, float *w, const float *fresh, float shrink, float perturb) {
    ckca__wait_for_grids();
    CKCA__EACH(i, count) w[i] = shrink * w[i] + perturb * fresh[i];
}
CKCA__OP void ckca__op_shrink_perturb(ckca_context *ctx, size_t count, float *w, const float *fresh, float shrink,
                                      float perturb) {
    CKCA__LAUNCH(ctx, ckca__shrink_perturb_kernel, ckca__grid(ctx, count, 1), count, w, fresh, shrink, perturb);
}

/* Adds the penalty's gradient to g; sums[block] = the block's part of twice its value, in 256 blocks. */
__global__ void ckca__ewc_kernel(size_t count, const float *w, const float *old, const float *fisher, float lambda,
                                 float *g, double *sums) {
    ckca__wait_for_grids();
    double sum = 0;
    CKCA__EACH(i, count) {
        const float apart = w[i] - old[i], pull = lambda * fisher[i] * apart;
        g[i] += pull;
        sum += (double)pull * apart;
    }
    sum = ckca__block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
__global__ void ckca__ewc_sum_kernel(const double *sums, double scale, double *sum) {
    ckca__wait_for_grids();
    const double total = ckca__block_sum(sums[threadIdx.x]);
    if (threadIdx.x == 0) *sum += scale * total / 2;
}
CKCA__OP void ckca__op_ewc(ckca_context *ctx, size_t count, const float *w, const float *old, const float *fisher,
                           float lambda, float *g, double scale, double *sum, void *ws) {
    CKCA__LAUNCH(ctx, ckca__ewc_kernel, CKCA__THREADS, count, w, old, fisher, lambda, g, (double *)ws);
    CKCA__LAUNCH(ctx, ckca__ewc_sum_kernel, 1, (const double *)ws, scale, sum);
}

__global__ void ckca__add_squares_kernel(size_t count, const float *g, float scale, float *fisher) {
    ckca__wait_for_grids();
    CKCA__EACH(i, count) fisher[i] += scale * g[i] * g[i];
}
CKCA__OP void ckca__op_add_squares(ckca_context *ctx, size_t count, const float *g, float scale, float *fisher) {
    CKCA__LAUNCH(ctx, ckca__add_squares_kernel, ckca__grid(ctx, count, 1), count, g, scale, fisher);
}

/* ------------------------------------------------------------------------------------------------------------------
   RANKS
   ------------------------------------------------------------------------------------------------------------------ */

__global__ void ckca__scale_kernel(size_t count, float factor, float *x) {
    ckca__wait_for_grids();
    CKCA__EACH(i, count) x[i] *= factor;
}

#ifdef CKCA_NCCL
static int ckca__nccl_check(ckca__cuda *cuda, const char *call, ncclResult_t status) {
    return status == ncclSuccess ? 1 : ckca__cuda_note(cuda, call, ncclGetErrorString(status));
}
#define CKCA__NCCL(cuda, call) (ckca__cuda_usable(cuda, #call) && ckca__nccl_check(cuda, #call, call))

CKCA__OP ckca_status ckca__device_ranks_init(ckca_context *ctx) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    ncclUniqueId id;
    memset(&id, 0, sizeof id);
    if (ctx->ranks.rank == 0) CKCA__NCCL(cuda, ncclGetUniqueId(&id));
    ctx->ranks_broken = ctx->ranks.broadcast(&id, sizeof id, ctx->ranks.user) != 0;
    if (!ctx->ranks_broken &&
        CKCA__NCCL(cuda, ncclCommInitRank(&cuda->ranks.comm, ctx->ranks.size, id, ctx->ranks.rank)) &&
        CKCA__CUDA(cuda, cudaStreamCreateWithFlags(&cuda->ranks.stream, cudaStreamNonBlocking)) &&
        CKCA__CUDA(cuda, cudaEventCreateWithFlags(&cuda->ranks.ready, cudaEventDisableTiming)))
        CKCA__CUDA(cuda, cudaEventCreateWithFlags(&cuda->ranks.done, cudaEventDisableTiming));
    return ckca__device_status(ctx);
}

/* In a stream of its own, behind the work so far. */
CKCA__OP void ckca__device_ranks_sum(ckca_context *ctx, size_t count, float share, float *x) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    if (share < 1 && count) CKCA__LAUNCH(ctx, ckca__scale_kernel, ckca__grid(ctx, count, 1), count, share, x);
    if (CKCA__CUDA(cuda, cudaEventRecord(cuda->ranks.ready, ckca__cuda_stream(cuda))) &&
        CKCA__CUDA(cuda, cudaStreamWaitEvent(cuda->ranks.stream, cuda->ranks.ready, 0)))
        CKCA__NCCL(cuda, ncclAllReduce(x, x, count, ncclFloat, ncclSum, cuda->ranks.comm, cuda->ranks.stream));
}
CKCA__OP void ckca__device_ranks_poll(ckca_context *ctx) { (void)ctx; }
CKCA__OP void ckca__device_ranks_wait(ckca_context *ctx) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    if (CKCA__CUDA(cuda, cudaEventRecord(cuda->ranks.done, cuda->ranks.stream)))
        CKCA__CUDA(cuda, cudaStreamWaitEvent(ckca__cuda_stream(cuda), cuda->ranks.done, 0));
}
#else
CKCA__OP ckca_status ckca__device_ranks_init(ckca_context *ctx) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    CKCA__CUDA(cuda, cudaMallocHost((void **)&cuda->ranks_buffer, CKCA__RANKS_VALUES * sizeof(float)));
    return ckca__device_status(ctx);
}

/* Through host memory. A rank whose GPU has failed takes part all the same: the others wait for it. */
CKCA__OP void ckca__device_ranks_sum(ckca_context *ctx, size_t count, float share, float *x) {
    ckca__cuda *cuda = ckca__cuda_of(ctx);
    size_t n;
    if (share < 1 && count) CKCA__LAUNCH(ctx, ckca__scale_kernel, ckca__grid(ctx, count, 1), count, share, x);
    for (; count && !ctx->ranks_broken; x += n, count -= n) {
        n = count < CKCA__RANKS_VALUES ? count : (size_t)CKCA__RANKS_VALUES;
        ckca__device_download(ctx, cuda->ranks_buffer, x, n * sizeof(float));
        ctx->ranks_broken = ctx->ranks.sum_start(cuda->ranks_buffer, n, ctx->ranks.user) ||
                            ctx->ranks.sum_wait(ctx->ranks.user);
        CKCA__CUDA(cuda, cudaMemcpyAsync(x, cuda->ranks_buffer, n * sizeof(float), cudaMemcpyHostToDevice,
                                         ckca__cuda_stream(cuda)));
        CKCA__CUDA(cuda, cudaStreamSynchronize(ckca__cuda_stream(cuda)));
    }
}
CKCA__OP void ckca__device_ranks_poll(ckca_context *ctx) { (void)ctx; }
CKCA__OP void ckca__device_ranks_wait(ckca_context *ctx) { (void)ctx; }
#endif

/* ------------------------------------------------------------------------------------------------------------------
   PICTURES
   ------------------------------------------------------------------------------------------------------------------ */

/* Maximum channels per launch: their mean and std are kernel arguments. */
enum { CKCA__PICTURE_CHANNELS = 8 };

typedef struct ckca__pictures {
    int h, w, c, first, channels; /* channels first .. first + channels - 1 of c */
    const unsigned char *pixels;
    int gathered;
    const int *index, *epoch;
    int augmented;
    ckca_augment augment;
    uint64_t seed;
    float mean[CKCA__PICTURE_CHANNELS], std[CKCA__PICTURE_CHANNELS];
    float *out;
} ckca__pictures;

/* v = the augmented picture's values at (y, x), channels j .. j + m - 1, in 0 to 255: shifted and mirrored, black
   outside; or the cropped rectangle enlarged by bilinear interpolation between pixel centres. */
__device__ void ckca__sample_pixel(const ckca__pictures &p, const ckca__framing &f, const unsigned char *pixels, int y,
                                   int x, int j, int m, float *v) {
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

/* One block per picture. Jitter's contrast needs the picture's mean grey value, so jitter samples every pixel twice. */
__global__ void ckca__pictures_kernel(ckca__pictures p) {
    ckca__wait_for_grids();
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
            ckca__sample_pixel(p, f, pixels, i / p.w, i % p.w, 0, p.c == 3 ? 3 : 1, v);
            for (int j = 0; j < (p.c == 3 ? 3 : 1); j++) v[j] = ckca__augment_clamp(v[j] * f.brightness);
            sum += ckca__augment_grey(p.c, v);
        }
        mean = (float)(ckca__block_sum(sum) / area);
    }
    for (int i = (int)threadIdx.x; i < area; i += CKCA__THREADS) {
        float v[CKCA__PICTURE_CHANNELS];
        ckca__sample_pixel(p, f, pixels, i / p.w, i % p.w, p.first, p.channels, v);
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
