/* How fast and how big: one line of figures for a network on random pictures.

       bench train NET BATCH SIZE THREADS STEPS [ISA]                SGD steps: forward, loss, backward, SGD
       bench infer NET BATCH SIZE THREADS STEPS [ISA]                evaluation: logits of a batch
       bench distill STUDENT TEACHER BATCH SIZE THREADS STEPS [ISA]  CKCA steps, the teacher running live on
                                                                     augmented pictures

   NET is any name ckca_resnet knows; ISA one of plain, base, avx2, avx512. Three steps warm up, STEPS are timed.
   tests/torch_bench.py is the same in PyTorch. */
#define CKCA_IMPLEMENTATION
#include "ckca.h"

#include <sys/resource.h>
#include <time.h>

enum { WARM_UP = 3 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static void die(const char *what, ckca_context *ctx) {
    fprintf(stderr, "bench: %s: %s\n", what, ckca_error(ctx));
    exit(1);
}

/* When each step ended: ms[0] is the end of the last step of warm-up. */
typedef struct clock_marks {
    double *ms;
    int steps, seen; /* steps in all, warm-up included */
} clock_marks;

static void mark(clock_marks *marks) {
    marks->seen++;
    if (marks->seen >= WARM_UP && marks->seen <= marks->steps) marks->ms[marks->seen - WARM_UP] = now();
}

static int on_progress(const ckca_progress *progress, void *user) {
    (void)progress;
    mark((clock_marks *)user);
    return 0;
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
    for (i = 0; i < ckca_tensors(model); i++) {
        ckca_tensor t;
        ckca_tensor_info(model, i, &t);
        if (strstr(t.name, "layer") && strstr(t.name, strstr(net, "50") ? ".bn3.weight" : ".bn2.weight")) {
            float *gamma = (float *)malloc((size_t)t.count * sizeof *gamma);
            int64_t j;
            if (!gamma) die("no memory", ctx);
            for (j = 0; j < t.count; j++) gamma[j] = 0.2f;
            ckca_tensor_write(model, i, CKCA_VALUE, gamma);
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

static void train(ckca_context *ctx, ckca_model *student, const ckca_model *teacher, int batch, int size,
                  clock_marks *marks) {
    ckca_model_info info;
    ckca_update_desc desc;
    ckca_data *data;
    ckca_model_info_get(student, &info);
    data = make_data(ctx, batch, size, info.classes);
    memset(&desc, 0, sizeof desc);
    desc.batch = batch;
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
    desc.epochs = marks->steps; /* of one step each */
    desc.progress = on_progress;
    desc.user = marks;
    if (ckca_update(student, data, &desc, NULL) != CKCA_OK) die("update", ctx);
    ckca_data_free(data);
}

static void infer(ckca_context *ctx, ckca_model *model, int batch, int size, clock_marks *marks) {
    ckca_model_info info;
    size_t count = (size_t)batch * (size_t)size * (size_t)size * 3, i;
    float *pictures = (float *)malloc(count * sizeof *pictures), *logits;
    int step;
    ckca_model_info_get(model, &info);
    logits = (float *)malloc((size_t)batch * (size_t)info.classes * sizeof *logits);
    if (!pictures || !logits) die("no memory", ctx);
    for (i = 0; i < count; i++) pictures[i] = (float)(4 * ckca__uniform(1, 99, i) - 2);
    for (step = 0; step < marks->steps; step++) {
        if (ckca_forward(model, pictures, batch, 0) != CKCA_OK) die("forward", ctx);
        if (ckca_node_read(model, info.logits, logits) != CKCA_OK) die("logits", ctx);
        mark(marks);
    }
    free(pictures);
    free(logits);
}

int main(int argc, char **argv) {
    static const char *const isa_name[] = {"best", "plain", "base", "avx2", "avx512"};
    int distill = argc > 1 && !strcmp(argv[1], "distill"), inference = argc > 1 && !strcmp(argv[1], "infer");
    int known = distill || inference || (argc > 1 && !strcmp(argv[1], "train")), numbers = 3 + distill;
    static const char *const precision_name[] = {"float32", "tf32", "bf16"};
    int batch, size, steps, i;
    char device[64], *blank;
    ckca_desc desc;
    ckca_context *ctx;
    ckca_model *model, *teacher = NULL;
    clock_marks marks;
    struct rusage usage;
    double median;
    if (!known || argc < numbers + 4 || argc > numbers + 5) {
        fprintf(stderr, "usage: bench train|infer NET BATCH SIZE THREADS STEPS [ISA or PRECISION]\n"
                        "       bench distill STUDENT TEACHER BATCH SIZE THREADS STEPS [ISA or PRECISION]\n");
        return 2;
    }
    memset(&desc, 0, sizeof desc);
    batch = atoi(argv[numbers]);
    size = atoi(argv[numbers + 1]);
    desc.threads = atoi(argv[numbers + 2]);
    steps = atoi(argv[numbers + 3]);
    if (argc > numbers + 4) {
        for (i = 0; i < 5 && strcmp(argv[numbers + 4], isa_name[i]); i++) {
        }
        if (i < 5) desc.isa = (ckca_isa)i;
        else {
            for (i = 0; i < 3 && strcmp(argv[numbers + 4], precision_name[i]); i++) {
            }
            desc.precision = (ckca_precision)i;
        }
    }
    if (batch < 1 || size < 1 || steps < 1 || ckca_init(&ctx, &desc) != CKCA_OK) {
        fprintf(stderr, "bench: a number is out of range, or this machine lacks the instruction set, precision or GPU\n");
        return 2;
    }
    marks.steps = WARM_UP + steps;
    marks.seen = 0;
    marks.ms = (double *)malloc((size_t)(steps + 1) * sizeof *marks.ms);
    if (!marks.ms) die("no memory", ctx);
    model = make_net(ctx, argv[2], size);
    if (distill) teacher = make_net(ctx, argv[3], size);
    if (inference) infer(ctx, model, batch, size, &marks);
    else train(ctx, model, teacher, batch, size, &marks);

    for (i = 0; i < steps; i++) marks.ms[i] = marks.ms[i + 1] - marks.ms[i];
    qsort(marks.ms, (size_t)steps, sizeof *marks.ms, by_size);
    median = 0.5 * (marks.ms[(steps - 1) / 2] + marks.ms[steps / 2]);
    getrusage(RUSAGE_SELF, &usage);
    snprintf(device, sizeof device, "%s", ckca_device(ctx)); /* a word, as every value of the line is */
    while ((blank = strchr(device, ' ')) != NULL) *blank = '_';
    printf("net=%s ", argv[2]);
    if (distill) printf("teacher=%s ", argv[3]);
    printf("batch=%d size=%d threads=%d steps=%d median_ms=%.2f min_ms=%.2f max_ms=%.2f images_per_s=%.1f "
           "peak_rss_mb=%.0f device=%s\n",
           batch, size, desc.threads, steps, median, marks.ms[0], marks.ms[steps - 1], batch * 1e3 / median,
           (double)usage.ru_maxrss / 1024, device);
    ckca_model_free(teacher);
    ckca_model_free(model);
    ckca_free(ctx);
    free(marks.ms);
    return 0;
}
