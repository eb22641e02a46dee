/* How fast and how big: one line of figures for a network on random pictures.

       bench train NET BATCH SIZE THREADS STEPS [ISA]                SGD steps: forward, loss, backward, SGD
       bench infer NET BATCH SIZE THREADS STEPS [ISA]                evaluation: logits of a batch
       bench distill STUDENT TEACHER BATCH SIZE THREADS STEPS [ISA]  CKCA steps, the teacher running live on
                                                                     augmented pictures
       bench peak THREADS [ISA]                                      what the machine can do at all: multiply-adds in
                                                                     registers, a[i] = b[i] + s c[i] in memory
       bench pictures DIR COUNT SIZE                  writes COUNT drawn JPEGs of SIZE x SIZE into DIR/0 ... DIR/9
       bench load DIR BATCH SIZE THREADS EPOCHS       reads the pictures of DIR/CLASS from disk: decoding, random
                                                      resized crop, flip, floats; no training
       bench stream DIR NET BATCH SIZE THREADS EPOCHS [ISA]  trains on them, read from disk, augmented in the same way

   NET is any name ckca_resnet knows; ISA one of plain, base, avx2, avx512. Three steps warm up, STEPS are timed.
   Built for a GPU, in place of ISA a PRECISION (float32, tf32, bf16); warming up takes at least a second, so that the
   clocks have settled, and STEPS at least two. Each of those is waited for. unsynced_ms is a step's time where none is
   waited for but the last of two seconds' worth; device_mb what the GPU's free memory fell by since the context was
   made (the context's own buffers, 33 MB, and CUDA's are not in it).
   load and stream print pictures per second of all epochs, waiting, the share of that time that the trainer (of load:
   the loop that takes the batches) waited for pictures, and the peak memory.
   gflop and mbyte are what a step asks for at least when convolutions are direct (see cost below); over bench peak's
   rates they give the floor of its time. tests/torch_bench.py is the same in PyTorch; tests/bench_peers.py compares. */
#define CKCA_IMPLEMENTATION
#include "ckca.h"

#include "pictures.h"

#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { WARM_UP = 3, MARKS = 200000 };
#ifdef CKCA_CUDA_SHIM /* tries this program, measures nothing */
enum { WARM_UP_MS = 1, TIMED_MS = 1 };
#elif defined(CKCA_CUDA)
enum { WARM_UP_MS = 1000, TIMED_MS = 2000 };
#else
enum { WARM_UP_MS = 0, TIMED_MS = 0 };
#endif

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static void die(const char *what, ckca_context *ctx) {
    fprintf(stderr, "bench: %s: %s\n", what, ckca_error(ctx));
    exit(1);
}

/* When each step ended: ms[0] is the end of the last step of warm-up, ms[count] that of the last one. */
typedef struct clock_marks {
    ckca_context *ctx;
    double *ms, begin;
    int steps, seen, warm, count; /* to be timed at least; done so far; warmed up; timed so far */
    size_t room, left;            /* bytes of the GPU that were free before, and once everything was there */
} clock_marks;

/* After every step: 1 if that was the last. */
static int mark(clock_marks *marks) {
    double at = now();
    if (!marks->seen++) marks->begin = at;
    if (!marks->warm) {
        marks->warm = marks->seen >= WARM_UP && at - marks->begin >= WARM_UP_MS;
        if (!marks->warm) return 0;
        marks->left = ckca__device_free_bytes(marks->ctx);
        marks->ms[0] = now();
        return 0;
    }
    marks->ms[++marks->count] = at;
    return (marks->count >= marks->steps && at - marks->ms[0] >= TIMED_MS) || marks->count == marks->steps + MARKS;
}

static int on_progress(const ckca_progress *progress, void *user) {
    (void)progress;
    return mark((clock_marks *)user);
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static ckca_model *make_net(ckca_context *ctx, const char *net, int size) {
    ckca_model_desc desc;
    ckca_model *model;
    static const float mean[3] = {0.5f, 0.5f, 0.5f}, deviation[3] = {0.25f, 0.25f, 0.25f};
    int i;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = size;
    desc.classes = strcmp(net, "resnet18") && strcmp(net, "resnet34") && strcmp(net, "resnet50") ? 10 : 1000;
    desc.mean = mean;
    desc.std = deviation;
    desc.seed = 1;
    if (ckca_resnet(ctx, &model, net, &desc) != CKCA_OK) die(net, ctx);
    /* Residual branches start small, so that an untrained teacher's activations stay of order one. */
    for (i = 0; i < ckca_tensor_count(model); i++) {
        ckca_tensor_info t;
        ckca_tensor_info_get(model, i, &t);
        if (strstr(t.name, "layer") && strstr(t.name, strstr(net, "50") ? ".bn3.weight" : ".bn2.weight")) {
            float *gamma = (float *)malloc((size_t)t.count * sizeof *gamma);
            int64_t j;
            if (!gamma) die("no memory", ctx);
            for (j = 0; j < t.count; j++) gamma[j] = 0.2f;
            ckca_tensor_write(model, i, CKCA_SLOT_VALUE, gamma);
            free(gamma);
        }
    }
    return model;
}

/* One batch of random pictures with random labels. */
static ckca_data *make_data(ckca_context *ctx, int batch, int size, int classes) {
    ckca_data *data;
    ckca_array array;
    size_t bytes = (size_t)batch * (size_t)size * (size_t)size * 3, i;
    unsigned char *pixels = (unsigned char *)malloc(bytes);
    int *labels = (int *)malloc((size_t)batch * sizeof *labels);
    if (!pixels || !labels) die("no memory", ctx);
    for (i = 0; i < bytes; i++) pixels[i] = (unsigned char)(ckca__random(1, 99, i) >> 56);
    for (i = 0; i < (size_t)batch; i++) labels[i] = (int)(ckca__random(2, 99, i) % (uint64_t)classes);
    memset(&array, 0, sizeof array);
    array.pixels = pixels;
    array.labels = labels;
    array.count = batch;
    array.height = array.width = size;
    array.channels = 3;
    array.classes = classes;
    if (ckca_open_array(ctx, &data, &array, NULL) != CKCA_OK) die("data", ctx);
    free(pixels);
    free(labels);
    return data;
}

/* Runs steps and notes their marks; on a GPU returns what a step takes where none is waited for. */
static double train(ckca_context *ctx, ckca_model *student, const ckca_model *teacher, int batch, int size,
                    clock_marks *marks) {
    double unsynced = 0;
    ckca_model_info info;
    ckca_update_desc desc;
    ckca_data *data;
    ckca_model_info_get(student, &info);
    data = make_data(ctx, batch, size, info.classes);
    memset(&desc, 0, sizeof desc);
    desc.batch = batch;
    desc.holdout = CKCA_OFF; /* every step on the same number of pictures */
    desc.epochs = 1;
    desc.lr = 0.01f;
    desc.method = CKCA_METHOD_WARM;
    if (teacher) { /* the first update of a fresh network has no teacher: let that pass */
        if (ckca_update(student, data, &desc, NULL) != CKCA_OK) die("first update", ctx);
        desc.method = CKCA_METHOD_CKCA;
        desc.teacher = teacher;
        desc.adakd = CKCA_ADAKD_CLASS;
        desc.w_kd = 2;
        desc.featreg = CKCA_FEATREG_COSINE;
        desc.w_feat = 1;
        desc.augment.pad = 4;
        desc.augment.flip = 1;
    }
    desc.epochs = 1000000; /* of one step each, until there are marks enough */
    desc.progress = on_progress;
    desc.user = marks;
    if (ckca_update(student, data, &desc, NULL) != CKCA_ESTOP) die("update", ctx);
#ifdef CKCA_CUDA
    { /* An epoch ends with a wait, so here it has many steps; what two epochs take longer than one is theirs alone. */
        const double step = (marks->ms[marks->count] - marks->ms[0]) / marks->count;
        const int steps = (int)(TIMED_MS / step) + 1;
        int *index = (int *)malloc((size_t)steps * (size_t)batch * sizeof *index), i;
        double took[2];
        ckca_data *many;
        if (!index) die("no memory", ctx);
        for (i = 0; i < steps * batch; i++) index[i] = i % batch;
        if (ckca_subset(&many, data, index, steps * batch) != CKCA_OK) die("subset", ctx);
        desc.progress = NULL;
        for (i = 0; i < 2; i++) {
            desc.epochs = i + 1;
            took[i] = now();
            if (ckca_update(student, many, &desc, NULL) != CKCA_OK) die("update without reports", ctx);
            took[i] = now() - took[i];
        }
        unsynced = (took[1] - took[0]) / steps;
        ckca_data_free(many);
        free(index);
    }
#endif
    ckca_data_free(data);
    return unsynced;
}

static double infer(ckca_context *ctx, ckca_model *model, int batch, int size, clock_marks *marks) {
    double unsynced = 0;
    ckca_model_info info;
    size_t count = (size_t)batch * (size_t)size * (size_t)size * 3, i;
    float *pictures = (float *)malloc(count * sizeof *pictures), *logits;
    int done = 0;
    ckca_model_info_get(model, &info);
    logits = (float *)malloc((size_t)batch * (size_t)info.classes * sizeof *logits);
    if (!pictures || !logits) die("no memory", ctx);
    for (i = 0; i < count; i++) pictures[i] = (float)(4 * ckca__uniform(1, 99, i) - 2);
    while (!done) {
        if (ckca_forward(model, pictures, batch, 0) != CKCA_OK) die("forward", ctx);
        if (ckca_node_read(model, info.logits, logits) != CKCA_OK) die("logits", ctx);
        done = mark(marks);
    }
#ifdef CKCA_CUDA
    {
        const int steps = (int)(TIMED_MS / ((marks->ms[marks->count] - marks->ms[0]) / marks->count)) + 1;
        const double begin = now();
        int step;
        for (step = 0; step < steps; step++)
            if (ckca_forward(model, pictures, batch, 0) != CKCA_OK) die("forward", ctx);
        if (ckca_node_read(model, info.logits, logits) != CKCA_OK) die("logits", ctx);
        unsynced = (now() - begin) / steps;
    }
#endif
    free(pictures);
    free(logits);
    return unsynced;
}

/* Adds what one forward pass (training: with backward and SGD) costs at least. Nominal flops: 2 per multiply-add, three
   passes in training. Bytes: a convolution's output is written and read once; in training 4 passes over it are enough
   (8 for a block of two: it, then its normalised form, then the two gradients on the way back); a weight is read once,
   in training 7 times counting its gradient and momentum. */
static void cost(const ckca_model *m, int batch, int training, double *gflop, double *mbyte) {
    ckca_model_info info;
    double macs = 0, bytes = 0; /* bytes: of outputs */
    int i;
    ckca_model_info_get(m, &info);
    for (i = 0; i < m->nodes; i++) {
        const ckca__node *node = &m->node[i], *in = node->in[0] >= 0 ? &m->node[node->in[0]] : NULL;
        double values = (double)node->h * node->w * node->c;
        if (node->kind == CKCA__KIND_LINEAR) macs += values * in->h * in->w * in->c;
        if (node->kind != CKCA__KIND_CONV) continue;
        macs += values * node->kernel * node->kernel * in->c;
        bytes += values * (node->bf16 ? 2 : 4);
    }
    *gflop += 2e-9 * macs * batch * (training ? 3 : 1);
    *mbyte += 1e-6 * (bytes * batch * (training ? 4 : 2) + 4.0 * (double)info.parameters * (training ? 7 : 1));
}

/* ---- what the machine can do ---- */

/* Twelve independent chains hide the latency of a multiply-add (4 cycles, two units at most) and fit 16 registers. */
enum { CHAINS = 12, TRIAD = 32 << 20 /* floats: arrays of 128 MiB, beyond any cache */, WINDOWS = 6 };
static volatile float sink; /* so that results are wanted */

#ifndef CKCA__UNROLL
#define CKCA__UNROLL
#endif
#define CHAINS_OF(name, target, vector, lanes, set, fma)                                      \
    target static double name(int rounds) {                                                   \
        const vector factor = set(0.999f), term = set(0.001f);                                \
        vector chain[CHAINS];                                                                 \
        int i, r;                                                                             \
        CKCA__UNROLL for (i = 0; i < CHAINS; i++) chain[i] = set((float)i);                   \
        for (r = 0; r < rounds; r++) {                                                        \
            CKCA__UNROLL for (i = 0; i < CHAINS; i++) chain[i] = fma(chain[i], factor, term); \
        }                                                                                     \
        for (i = 0; i < CHAINS; i++) {                                                        \
            float value[lanes];                                                               \
            memcpy(value, &chain[i], sizeof value);                                           \
            sink = value[0];                                                                  \
        }                                                                                     \
        return 2.0 * lanes * CHAINS * rounds;                                                 \
    }
#if defined(CKCA__SIMD) && defined(__x86_64__)
#define SSE_MULTIPLY_ADD(a, b, c) _mm_add_ps(_mm_mul_ps(a, b), c)
CHAINS_OF(chains_base, , __m128, 4, _mm_set1_ps, SSE_MULTIPLY_ADD)
CHAINS_OF(chains_avx2, __attribute__((target("avx2,fma"))), __m256, 8, _mm256_set1_ps, _mm256_fmadd_ps)
CHAINS_OF(chains_avx512, __attribute__((target("avx512f"))), __m512, 16, _mm512_set1_ps, _mm512_fmadd_ps)
#elif defined(CKCA__SIMD)
#define NEON_MULTIPLY_ADD(a, b, c) vfmaq_f32(c, a, b)
CHAINS_OF(chains_base, , float32x4_t, 4, vdupq_n_f32, NEON_MULTIPLY_ADD)
#else
#define SAME(x) (x)
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
CHAINS_OF(chains_base, , float, 1, SAME, MULTIPLY_ADD)
#endif

static double chains(ckca_isa isa) { /* flops done */
#if defined(CKCA__SIMD) && defined(__x86_64__)
    if (isa == CKCA_ISA_AVX512) return chains_avx512(100000);
    if (isa == CKCA_ISA_AVX2) return chains_avx2(100000);
#endif
    (void)isa;
    return chains_base(100000);
}

static double triad(float *a, const float *b, const float *c) { /* bytes moved */
    int i;
    for (i = 0; i < TRIAD; i++) a[i] = b[i] + 0.5f * c[i];
    sink = a[TRIAD / 2];
    return 12.0 * TRIAD;
}

/* Processes rather than threads, so that this owes nothing to the library's threading: each works through the same
   windows of time and reports its rates; the best window's sum counts. The first WINDOWS are for chains, the others for
   triad. */
static void peak(ckca_context *ctx, int threads) {
    double total[2 * WINDOWS] = {0}, start = now() + 300 + 100 * threads, best[2] = {0, 0};
    int reports[2], i, w;
    if (pipe(reports)) die("pipe", ctx);
    for (i = 0; i < threads; i++) {
        pid_t child = fork();
        if (child < 0) die("fork", ctx);
        if (!child) {
            double rate[2 * WINDOWS];
            float *memory = (float *)ckca__alloc(ctx, sizeof(float) * 3 * TRIAD); /* zeroed: touched */
            if (!memory) _exit(1);
            for (w = 0; w < 2 * WINDOWS; w++) {
                double begin = start + 250 * w, work = 0;
                while (now() < begin) {
                }
                begin = now();
                while (now() < start + 250 * (w + 1) - 10)
                    work += w < WINDOWS ? chains(ctx->isa) : triad(memory, memory + TRIAD, memory + 2 * TRIAD);
                rate[w] = work / (now() - begin);
            }
            _exit(write(reports[1], rate, sizeof rate) != (ssize_t)sizeof rate);
        }
    }
    for (i = 0; i < threads; i++) {
        double rate[2 * WINDOWS];
        int status;
        if (wait(&status) < 0 || status || read(reports[0], rate, sizeof rate) != (ssize_t)sizeof rate) {
            fprintf(stderr, "bench: a process of peak failed\n");
            exit(1);
        }
        for (w = 0; w < 2 * WINDOWS; w++) total[w] += rate[w];
    }
    for (w = 0; w < 2 * WINDOWS; w++)
        if (total[w] > best[w / WINDOWS]) best[w / WINDOWS] = total[w];
    printf("threads=%d fma_gflops=%.1f triad_gbps=%.1f\n", threads, best[0] * 1e-6, best[1] * 1e-6);
}

/* ---- pictures on disk ---- */

/* Writes count JPEGs of size x size. 512 are drawn and encoded, the others repeat them. */
static int write_pictures(const char *dir, int count, int size) {
    enum { DRAWN = 512 };
    static unsigned char *file[DRAWN];
    static size_t bytes[DRAWN];
    unsigned char *rgb = (unsigned char *)malloc((size_t)size * (size_t)size * 3);
    unsigned char *out = (unsigned char *)malloc(1024 + 8 * ((size_t)size + 16) * ((size_t)size + 16));
    char path[4096];
    int i, k, y, x;
    if (!rgb || !out) return 1;
    mkdir(dir, 0777);
    for (i = 0; i < 10; i++) {
        snprintf(path, sizeof path, "%s/%d", dir, i);
        mkdir(path, 0777);
    }
    for (i = 0; i < count; i++) {
        FILE *to;
        k = i % DRAWN;
        if (!file[k]) {
            for (y = 0; y < size; y++)
                for (x = 0; x < size; x++) drawn_pixel(k, 10, y, x, rgb + 3 * (y * size + x));
            bytes[k] = jpeg_write(rgb, size, size, 16, out);
            file[k] = (unsigned char *)malloc(bytes[k]);
            if (!file[k]) return 1;
            memcpy(file[k], out, bytes[k]);
        }
        snprintf(path, sizeof path, "%s/%d/%07d.jpg", dir, k % 10, i);
        to = fopen(path, "wb");
        if (!to || fwrite(file[k], 1, bytes[k], to) != bytes[k] || fclose(to)) {
            fprintf(stderr, "bench: %s cannot be written\n", path);
            return 1;
        }
    }
    for (k = 0; k < DRAWN; k++) free(file[k]);
    free(rgb);
    free(out);
    return 0;
}

static ckca_data *open_pictures(ckca_context *ctx, const char *dir, int size) {
    ckca_data *data = NULL;
    ckca_data_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = size;
    desc.storage = CKCA_STORAGE_STREAM;
    if (ckca_open_folder(ctx, &data, dir, &desc) != CKCA_OK) die("pictures", ctx);
    return data;
}

static void print_stream(ckca_context *ctx, const char *what, int batch, int size, int epochs, int count,
                         double seconds, double waiting) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    printf("%s batch=%d size=%d threads=%d pictures=%d epochs=%d seconds=%.2f images_per_s=%.1f waiting=%.3f "
           "cpu_s=%.2f peak_rss_mb=%.0f\n",
           what, batch, size, ctx->threads, count, epochs, seconds, (double)count * epochs / seconds, waiting,
           (double)usage.ru_utime.tv_sec + (double)usage.ru_stime.tv_sec +
               1e-6 * (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec),
           (double)usage.ru_maxrss / 1024);
}

static void load(ckca_context *ctx, const char *dir, int batch, int size, int epochs) {
    ckca_model *model = make_net(ctx, "resnet8", size);
    ckca_data *data = open_pictures(ctx, dir, size);
    const int count = data->count;
    float *input = (float *)ckca__device_alloc(ctx, (size_t)batch * (size_t)size * (size_t)size * 3 * sizeof *input);
    int *position = (int *)malloc((size_t)batch * sizeof *position), epoch, unused, n;
    ckca__batch_buffers b;
    ckca_augment augment;
    double start = now(), waited = 0;
    memset(&augment, 0, sizeof augment);
    augment.resized_crop = augment.flip = 1;
    augment.crop_min = 0.08f; /* torchvision's */
    if (!input || !position) die("no memory", ctx);
    for (epoch = 0; epoch < epochs; epoch++) {
        ckca__sequence ahead, done;
        ahead.next = done.next = 0;
        ahead.count = done.count = count;
        ahead.size = done.size = batch;
        if (ckca__batch_buffers_alloc(ctx, &b, batch, 1, 1) ||
            ckca__prepare_data(ctx, data, batch, &augment, (uint64_t)epoch, ckca__plan_sequence, &ahead, &b))
            die("load", ctx);
        while ((n = ckca__plan_sequence(&done, position, &unused)) > 0) {
            if (ckca__send_batch(ctx, data, position, n, 0, 0, &b)) die("load", ctx);
            ckca__make_batch(model, data, n, &augment, (uint64_t)epoch, &b, input);
        }
        if (ckca__device_status(ctx)) die("load", ctx);
        waited += b.feed->waited;
        ckca__batch_buffers_free(ctx, &b);
    }
    start = (now() - start) * 1e-3;
    print_stream(ctx, "load", batch, size, epochs, count, start, waited / start);
    ckca__device_release(ctx, input, (size_t)batch * (size_t)size * (size_t)size * 3 * sizeof *input);
    free(position);
    ckca_data_free(data);
    ckca_model_free(model);
}

static void stream(ckca_context *ctx, const char *dir, const char *net, int batch, int size, int epochs) {
    static const float mean[3] = {0.5f, 0.5f, 0.5f}, deviation[3] = {0.25f, 0.25f, 0.25f};
    ckca_data *data = open_pictures(ctx, dir, size);
    const int count = data->count;
    ckca_model *model = NULL;
    ckca_model_desc desc;
    ckca_update_desc update;
    ckca_report report;
    char what[80];
    memset(&desc, 0, sizeof desc);
    memset(&update, 0, sizeof update);
    desc.height = desc.width = size;
    desc.classes = data->store->classes;
    desc.mean = mean;
    desc.std = deviation;
    if (ckca_resnet(ctx, &model, net, &desc) != CKCA_OK) die(net, ctx);
    update.batch = batch;
    update.epochs = epochs;
    update.lr = 0.05f;
    update.augment.resized_crop = update.augment.flip = 1;
    if (ckca_update(model, data, &update, &report) != CKCA_OK) die("stream", ctx);
    snprintf(what, sizeof what, "net=%s loss=%.3f accuracy=%.3f", net, report.loss, report.accuracy);
    print_stream(ctx, what, batch, size, epochs, count, report.seconds, report.waiting);
    ckca_model_free(model);
    ckca_data_free(data);
}

int main(int argc, char **argv) {
    static const char *const isa_name[] = {"best", "plain", "base", "avx2", "avx512"};
    static const char *const precision_name[] = {"float32", "tf32", "bf16"};
    const char *mode = argc > 1 ? argv[1] : "";
    int peaks = !strcmp(mode, "peak"), distill = !strcmp(mode, "distill"), inference = !strcmp(mode, "infer");
    int loads = !strcmp(mode, "load"), streams = !strcmp(mode, "stream");
    int known = peaks || distill || inference || loads || streams || !strcmp(mode, "train");
    int numbers = peaks ? 2 : 3 + (distill || streams), count = peaks ? 1 : 4; /* where the numbers start; how many */
    int batch = 1, size = 1, steps = 1, i;
    char device[64], *blank;
    ckca_desc desc;
    ckca_context *ctx;
    ckca_model *model, *teacher = NULL;
    clock_marks marks;
    struct rusage usage;
    double median, unsynced, gflop = 0, mbyte = 0;
    if (!strcmp(mode, "pictures") && argc == 5 && atoi(argv[3]) > 0 && atoi(argv[4]) > 0 && atoi(argv[4]) <= 4096)
        return write_pictures(argv[2], atoi(argv[3]), atoi(argv[4]));
    if (!known || argc < numbers + count || argc > numbers + count + 1) {
        fprintf(stderr, "usage: bench train|infer NET BATCH SIZE THREADS STEPS [ISA or PRECISION]\n"
                        "       bench distill STUDENT TEACHER BATCH SIZE THREADS STEPS [ISA or PRECISION]\n"
                        "       bench peak THREADS [ISA]\n"
                        "       bench pictures DIR COUNT SIZE\n"
                        "       bench load DIR BATCH SIZE THREADS EPOCHS\n"
                        "       bench stream DIR NET BATCH SIZE THREADS EPOCHS [ISA or PRECISION]\n");
        return 2;
    }
    memset(&desc, 0, sizeof desc);
    if (!peaks) {
        batch = atoi(argv[numbers]);
        size = atoi(argv[numbers + 1]);
        steps = atoi(argv[numbers + 3]);
    }
    desc.threads = atoi(argv[numbers + (peaks ? 0 : 2)]);
    if (argc > numbers + count) {
        for (i = 0; i < 5 && strcmp(argv[numbers + count], isa_name[i]); i++) {
        }
        if (i < 5) desc.isa = (ckca_isa)i;
        else {
            for (i = 0; i < 3 && strcmp(argv[numbers + count], precision_name[i]); i++) {
            }
            desc.precision = (ckca_precision)i;
        }
    }
    if (batch < 1 || size < 1 || steps < 1 || ckca_init(&ctx, &desc) != CKCA_OK) {
        fprintf(stderr, "bench: a number is out of range, or this machine lacks the instruction set, precision or GPU\n");
        return 2;
    }
    if (peaks) {
        peak(ctx, desc.threads > 0 ? desc.threads : 1);
        ckca_context_free(ctx);
        return 0;
    }
    if (loads || streams) {
        if (loads)
            load(ctx, argv[2], batch, size, steps);
        else
            stream(ctx, argv[2], argv[3], batch, size, steps);
        ckca_context_free(ctx);
        return 0;
    }
    memset(&marks, 0, sizeof marks);
    marks.ctx = ctx;
    marks.steps = steps;
    marks.room = ckca__device_free_bytes(ctx);
    marks.ms = (double *)malloc(((size_t)steps + MARKS + 1) * sizeof *marks.ms);
    if (!marks.ms) die("no memory", ctx);
    model = make_net(ctx, argv[2], size);
    if (distill) teacher = make_net(ctx, argv[3], size);
    cost(model, batch, !inference, &gflop, &mbyte);
    if (distill) cost(teacher, batch, 0, &gflop, &mbyte);
    unsynced = inference ? infer(ctx, model, batch, size, &marks) : train(ctx, model, teacher, batch, size, &marks);
    steps = marks.count;

    for (i = 0; i < steps; i++) marks.ms[i] = marks.ms[i + 1] - marks.ms[i];
    qsort(marks.ms, (size_t)steps, sizeof *marks.ms, by_size);
    median = 0.5 * (marks.ms[(steps - 1) / 2] + marks.ms[steps / 2]);
    getrusage(RUSAGE_SELF, &usage);
    snprintf(device, sizeof device, "%s", ckca_device(ctx)); /* a word, as every value of the line is */
    while ((blank = strchr(device, ' ')) != NULL) *blank = '_';
    printf("net=%s ", argv[2]);
    if (distill) printf("teacher=%s ", argv[3]);
    printf("batch=%d size=%d threads=%d steps=%d median_ms=%.3f min_ms=%.3f max_ms=%.3f images_per_s=%.1f "
           "peak_rss_mb=%.0f gflop=%.3f mbyte=%.0f device=%s",
           batch, size, desc.threads, steps, median, marks.ms[0], marks.ms[steps - 1], batch * 1e3 / median,
           (double)usage.ru_maxrss / 1024, gflop, mbyte, device);
    if (unsynced > 0) /* on a GPU */
        printf(" unsynced_ms=%.3f device_mb=%.0f", unsynced,
               marks.room > marks.left ? (double)(marks.room - marks.left) * 1e-6 : 0.0);
    printf("\n");
    ckca_model_free(teacher);
    ckca_model_free(model);
    ckca_context_free(ctx);
    free(marks.ms);
    return 0;
}
