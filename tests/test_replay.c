/* test_replay.c: memories of earlier chunks: herding and its places against plain loops, the Fisher information, what
   REPLAY, CKCA and EWC train with a memory, killed runs, files that are cut and corrupt, what is refused, failing
   allocations. */
#define CKCA_IMPLEMENTATION
#include "ckca.h"
#include "test.h"
#include "device.h"
#include "files.h"

enum { SIZE = 8, CLASSES = 4, COUNT = 60, AREA = SIZE * SIZE * 3 };

/* Pictures whose class is a bright quarter, under noise: of class k, counts[k]; in random order. */
static ckca_data *drawn(ckca_context *ctx, const int *counts, uint64_t seed) {
    static unsigned char pixels[200 * AREA];
    static int labels[200], order[200];
    static const char *const names[CLASSES] = {"cat", "d\xc3\xb6g", "\"emu\"", "fox"};
    ckca_array array;
    ckca_data *data = NULL, *sorted = NULL;
    int i, j, k, n = 0;
    for (k = 0; k < CLASSES; k++)
        for (i = 0; i < counts[k]; i++, n++)
            for (labels[n] = k, j = 0; j < AREA; j++) {
                const int y = j / 3 / SIZE, x = j / 3 % SIZE, bright = y / (SIZE / 2) * 2 + x / (SIZE / 2) == k;
                pixels[n * AREA + j] = (unsigned char)(ckca__random(seed, 77, (uint64_t)(n * AREA + j)) % 190 +
                                                       (bright ? 60 : 0));
            }
    memset(&array, 0, sizeof array);
    array.pixels = pixels;
    array.labels = labels;
    array.count = n;
    array.height = array.width = SIZE;
    array.channels = 3;
    array.classes = CLASSES;
    array.class_names = names;
    if (ckca_open_array(ctx, &sorted, &array, NULL)) return NULL;
    ckca_shuffle(seed, 0, n, order);
    ckca_subset(&data, sorted, order, n);
    ckca_data_free(sorted);
    return data;
}
static ckca_data *pictures(ckca_context *ctx, uint64_t seed) {
    static const int counts[CLASSES] = {15, 15, 15, 15};
    return drawn(ctx, counts, seed);
}

static ckca_model *net(ckca_context *ctx, const char *arch, int classes, int size, int channels) {
    ckca_model_desc desc;
    ckca_model *m = NULL;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = size;
    desc.channels = channels;
    desc.classes = classes;
    desc.seed = 1;
    desc.width_base = 2;
    ckca_resnet(ctx, &m, arch, &desc);
    return m;
}

static ckca_update_desc quick(ckca_method method, ckca_memory *memory) {
    ckca_update_desc d;
    memset(&d, 0, sizeof d);
    d.method = method;
    d.memory = memory;
    d.adakd = CKCA_ADAKD_CONSTANT; /* GROWTH's weight depends on the chunk alone, not on what joins it */
    d.holdout = CKCA_OFF;
    d.epochs = 2;
    d.batch = 16;
    d.seed = 5;
    d.augment.flip = 1;
    return d;
}

static ckca_memory *create(const ckca_model *m, int count, int fisher) {
    ckca_memory_desc desc;
    ckca_memory *memory = NULL;
    desc.pictures = count;
    desc.fisher = fisher;
    ckca_memory_create(m, &memory, &desc);
    return memory;
}

/* A memory's file, to be freed. */
static unsigned char *bytes_of(ckca_memory *memory, size_t *size) {
    unsigned char *bytes;
    ckca_memory_to_bytes(memory, NULL, 0, size);
    bytes = (unsigned char *)malloc(*size + 1);
    CHECK(ckca_memory_to_bytes(memory, bytes, *size, size) == CKCA_OK, "%s", ckca_error(memory->ctx));
    return bytes;
}

static int same_memory(ckca_memory *a, ckca_memory *b) {
    size_t n, k;
    unsigned char *x = bytes_of(a, &n), *y = bytes_of(b, &k);
    const int same = n == k && !memcmp(x, y, n);
    free(x), free(y);
    return same;
}

static int same_model(ckca_model *a, ckca_model *b) {
    return a->all == b->all && a->updates == b->updates && !memcmp(a->values, b->values, a->all * sizeof(float));
}

static ckca_model *copy_of(const ckca_model *m) {
    ckca_model *copy = NULL;
    ckca_model_copy(&copy, m);
    return copy;
}

static ckca_memory *memory_copy(ckca_memory *memory, const ckca_model *m) {
    size_t size;
    unsigned char *bytes = bytes_of(memory, &size);
    ckca_memory *copy = NULL;
    CHECK(ckca_memory_from_bytes(m, &copy, bytes, size) == CKCA_OK, "%s", ckca_error(memory->ctx));
    free(bytes);
    return copy;
}

/* ---- herding ---- */

/* iCaRL's algorithm 4 as printed: p_k = argmin |mean - (f(x) + sum_{j<k} f(p_j)) / k|. */
static void herd_reference(int n, int d, const float *f, const double *mean, int keep, int *chosen) {
    int i, j, k, l;
    for (k = 0; k < keep; k++) {
        double least = INFINITY;
        chosen[k] = -1;
        for (i = 0; i < n; i++) {
            double norm = 0;
            int used = 0;
            for (l = 0; l < k; l++) used |= chosen[l] == i;
            if (used) continue;
            for (j = 0; j < d; j++) {
                double sum = f[i * d + j];
                for (l = 0; l < k; l++) sum += f[chosen[l] * d + j];
                norm += pow(mean[j] - sum / (k + 1), 2);
            }
            if (sqrt(norm) < least - 1e-12) least = sqrt(norm), chosen[k] = i;
        }
    }
}

static void test_herding(void) {
    enum { N = 30, D = 7 };
    float f[N * D];
    double mean[D], sum[D];
    unsigned char taken[N];
    int expected[N], chosen[N], trial, i, j, keep;
    for (trial = 0; trial < 20; trial++) {
        memset(mean, 0, sizeof mean);
        for (i = 0; i < N; i++)
            for (j = 0; j < D; j++) {
                f[i * D + j] = (float)ckca__uniform((uint64_t)trial, 99, (uint64_t)(i * D + j)) - (trial % 2 ? 0.5f : 0);
                mean[j] += f[i * D + j] / (double)N;
            }
        herd_reference(N, D, f, mean, N, expected);
        for (keep = 1; keep <= N; keep += 29 - trial) {
            memset(sum, 0, sizeof sum), memset(taken, 0, sizeof taken);
            ckca__herd(N, D, f, mean, keep, taken, sum, chosen);
            CHECK(!memcmp(chosen, expected, (size_t)keep * sizeof *chosen), "trial %d: %d of %d are others than iCaRL's",
                  trial, keep, N);
        }
    }
    for (i = 0; i < N * D; i++) f[i] = NAN; /* features of a broken network: any choice, but one */
    memset(sum, 0, sizeof sum), memset(taken, 0, sizeof taken);
    ckca__herd(N, D, f, mean, N, taken, sum, chosen);
    for (i = 0; i < N; i++) CHECK(chosen[i] == i, "choice %d of NaN is %d", i, chosen[i]);
}

/* A refill by plain loops: features one picture at a time, and the class means as ckca.h defines them. */
static void check_refill(ckca_model *m, const ckca_data *before, const int64_t *seen, const ckca_data *chunk,
                         ckca_memory *memory, const int *keep) {
    const int d = m->features, old = before ? before->count : 0, count = old + chunk->count;
    float *f = (float *)malloc((size_t)(count * d) * sizeof *f);
    int *index = (int *)malloc((size_t)count * sizeof *index), *chosen = (int *)malloc((size_t)count * sizeof *chosen);
    const ckca_data *after = ckca_memory_pictures(memory);
    int i, j, k, n, at, kept;
    for (k = 0; k < CLASSES; k++) {
        double *mean = (double *)calloc((size_t)d, sizeof *mean), total;
        for (i = n = kept = 0; i < count; i++) {
            const ckca_data *from = i < old ? before : chunk;
            const int place = i < old ? i : i - old;
            float x[AREA], *out = f + n * d;
            double norm = 0;
            if (ckca_label(from, place) != k) continue;
            ckca_get_batch(m, from, &place, 1, NULL, 0, 0, x, NULL);
            ckca_forward(m, x, 1, 0);
            ckca_node_read(m, m->pooled, out);
            for (j = 0; j < d; j++) norm += (double)out[j] * out[j];
            for (j = 0; j < d; j++) out[j] = (float)(out[j] / sqrt(norm));
            kept += i < old;
            index[n++] = i;
        }
        total = (kept ? (double)seen[k] : 0) + n - kept;
        for (i = 0; i < n; i++)
            for (j = 0; j < d; j++) mean[j] += f[i * d + j] * (i < kept ? (double)seen[k] / kept : 1) / total;
        herd_reference(n, d, f, mean, keep[k], chosen);
        for (i = 0; i < keep[k]; i++) { /* choice i of class k comes after all choices before it, and those of its round */
            const int expected = index[chosen[i]];
            for (at = j = 0; j < CLASSES; j++) at += j < k ? (keep[j] < i + 1 ? keep[j] : i + 1) : (keep[j] < i ? keep[j] : i);
            CHECK(ckca_label(after, at) == k && !memcmp(ckca_pixels(after, at),
                                                        expected < old ? ckca_pixels(before, expected)
                                                                       : ckca_pixels(chunk, expected - old),
                                                        AREA),
                  "place %d: choice %d of class %d is another picture", at, i, k);
        }
        free(mean);
    }
    free(f), free(index), free(chosen);
}

static void test_fill(ckca_context *ctx, ckca_model *start) {
    static const int first[CLASSES] = {2, 30, 9, 20}, second[CLASSES] = {14, 3, 40, 0};
    static const int keep_first[CLASSES] = {2, 7, 6, 6}, keep_second[CLASSES] = {6, 5, 5, 5};
    ckca_data *one = drawn(ctx, first, 11), *two = drawn(ctx, second, 12), *before = NULL, *held[1];
    ckca_memory *memory = create(start, 21, 0), *small = create(start, 100, 0), *again;
    ckca_memory_info info;
    int64_t seen[CLASSES] = {0, 0, 0, 0};
    size_t size, later;
    int k;
    float *was = (float *)malloc(start->all * sizeof(float));
    memcpy(was, start->values, start->all * sizeof(float));
    ckca_memory_info_get(memory, &info);
    CHECK(info.pictures == 21 && !info.fisher && !info.count && !info.updates && !ckca_memory_pictures(memory),
          "a new memory holds %d pictures", info.count);
    CHECK(ckca_memory_fill(memory, start, one) == CKCA_OK, "%s", ckca_error(ctx));
    check_refill(start, NULL, seen, one, memory, keep_first);
    ckca_memory_info_get(memory, &info);
    CHECK(info.count == 21 && info.updates == start->updates, "%d pictures after update %d", info.count, info.updates);
    free(bytes_of(memory, &size));
    held[0] = memory->data;
    ckca_join(&before, held, 1);
    for (k = 0; k < CLASSES; k++) seen[k] = first[k];
    again = memory_copy(memory, start);
    CHECK(ckca_memory_fill(memory, start, two) == CKCA_OK && ckca_memory_fill(again, start, two) == CKCA_OK, "%s",
          ckca_error(ctx));
    CHECK(same_memory(memory, again), "a memory that was saved and loaded is filled otherwise");
    check_refill(start, before, seen, two, memory, keep_second);
    for (k = 0; k < CLASSES; k++)
        CHECK(memory->seen[k] == first[k] + second[k], "%d of class %d seen", (int)memory->seen[k], k);
    free(bytes_of(memory, &later));
    CHECK(size == later, "the file grows from %d to %d bytes", (int)size, (int)later);
    CHECK(ckca_memory_fill(small, start, one) == CKCA_OK, "%s", ckca_error(ctx));
    ckca_memory_info_get(small, &info);
    CHECK(info.count == 61, "of 61 pictures a memory of 100 holds %d", info.count);
    CHECK(!memcmp(was, start->values, start->all * sizeof(float)), "filling a memory changes the model");
    ckca_data_free(one), ckca_data_free(two), ckca_data_free(before);
    ckca_memory_free(memory), ckca_memory_free(again), ckca_memory_free(small);
    free(was);
}

/* ---- the Fisher information ---- */

static void test_fisher(ckca_context *ctx, ckca_model *start, const ckca_data *chunk) {
    enum { N = 2, K = 3, DRAWS = 20000 };
    static const float logits[N * K] = {1, 0, -1, 0.5f, 2, -3};
    static const int index[N] = {7, 9};
    double square[N * K] = {0}, mean[N * K] = {0};
    float dz[N * K], *whole;
    ckca_memory *memory = create(start, 0, 1), *twice;
    ckca_model *moved = copy_of(start);
    const float *fisher;
    size_t j;
    int i, k, positive = 0;
    for (k = 0; k < DRAWS; k++) {
        ckca__fisher_gradient(N, K, logits, (uint64_t)k, index, dz);
        for (i = 0; i < N * K; i++) mean[i] += dz[i] / (double)DRAWS, square[i] += (double)dz[i] * dz[i] / DRAWS;
    }
    for (i = 0; i < N * K; i++) { /* of (p - onehot) / n: mean 0, variance p (1 - p) / n^2 */
        const float *z = logits + i / K * K;
        const double p = exp(logits[i]) / (exp(z[0]) + exp(z[1]) + exp(z[2])), variance = p * (1 - p) / (N * N);
        CHECK(fabs(mean[i]) < 4 * sqrt(variance / DRAWS) && fabs(square[i] / variance - 1) < 0.1,
              "drawn gradient %d: mean %g, square %g, expected 0 and %g", i, mean[i], square[i], variance);
    }
    CHECK(ckca_memory_fill(memory, start, chunk) == CKCA_OK && same_model(moved, start) &&
              moved->batches_tracked == start->batches_tracked,
          "taking the Fisher information moves the model: %s", ckca_error(ctx));
    fisher = ckca__memory_fisher(memory);
    for (j = 0; j < start->trainable; j++) {
        positive += fisher[j] > 0;
        CHECK(fisher[j] >= 0, "F is %g", fisher[j]);
    }
    CHECK(positive > 200, "F is above 0 in %d places", positive);
    { /* whole batches of 16 of 60 pictures: three, each weighing 16 / 3 of its squared gradient */
        double *expected = (double *)calloc(start->trainable, sizeof *expected), apart = 0, most = 0;
        float x[16 * AREA], z[16 * CLASSES], dlogits[16 * CLASSES];
        int order[COUNT], b;
        ckca_shuffle((uint64_t)start->updates, 0, COUNT, order);
        for (b = 0; b < 3; b++) {
            ckca_get_batch(moved, chunk, order + 16 * b, 16, NULL, 0, 0, x, NULL);
            ckca_forward(moved, x, 16, 1);
            ckca_node_read(moved, moved->logits, z);
            ckca__fisher_gradient(16, CLASSES, z, (uint64_t)start->updates, order + 16 * b, dlogits);
            ckca_zero_gradients(moved);
            ckca_backward(moved, dlogits, NULL);
            for (j = 0; j < start->trainable; j++)
                expected[j] += 16.0 / 3 * (double)moved->gradients[j] * moved->gradients[j];
        }
        for (j = 0; j < start->trainable; j++) apart = fmax(apart, fabs(expected[j] - fisher[j])), most = fmax(most, fisher[j]);
        CHECK(apart < 1e-5 * most, "F is %g away from its definition, its greatest value is %g", apart, most);
        free(expected);
    }
    whole = (float *)malloc(start->trainable * sizeof *whole);
    memcpy(whole, fisher, start->trainable * sizeof *whole);
    twice = memory_copy(memory, start);
    CHECK(!memcmp(whole, ckca__memory_fisher(twice), start->trainable * sizeof *whole), "F read from its file is another");
    ckca_memory_fill(twice, start, chunk);
    for (j = 0; j < start->trainable; j++)
        CHECK(fabs(ckca__memory_fisher(twice)[j] - 2 * whole[j]) <= 1e-5 * whole[j], "F of two chunks is %g, not twice %g",
              ckca__memory_fisher(twice)[j], whole[j]);
    ckca_memory_free(memory), ckca_memory_free(twice), ckca_model_free(moved);
    free(whole);
}

/* ---- training ---- */

/* With a memory, every method trains on the joined pictures; an empty memory changes nothing but is filled. */
static void test_methods(ckca_context *ctx, ckca_model *start, const ckca_data *before, const ckca_data *chunk) {
    static const ckca_method methods[2] = {CKCA_METHOD_REPLAY, CKCA_METHOD_CKCA};
    int i;
    for (i = 0; i < 2; i++) {
        const ckca_method plain = i ? CKCA_METHOD_CKCA : CKCA_METHOD_WARM;
        ckca_model *a = copy_of(start), *b = copy_of(start), *c = copy_of(start), *d = copy_of(start);
        ckca_memory *memory = create(start, 12, 0), *expected;
        ckca_update_desc desc = quick(plain, NULL);
        ckca_data *parts[2], *joined = NULL;
        ckca_report report, same;
        CHECK(ckca_update(a, chunk, &desc, NULL) == CKCA_OK, "%s", ckca_error(ctx));
        desc = quick(methods[i], memory);
        CHECK(ckca_update(b, chunk, &desc, NULL) == CKCA_OK && same_model(a, b), "an empty memory changes the training: %s",
              ckca_error(ctx));
        CHECK(ckca__memory_count(memory) == 12 && memory->updates == b->updates, "it is not filled");
        ckca_memory_free(memory);
        memory = create(start, 12, 0);
        ckca_memory_fill(memory, start, before);
        expected = memory_copy(memory, start);
        parts[0] = memory->data, parts[1] = (ckca_data *)chunk;
        ckca_join(&joined, parts, 2);
        desc = quick(plain, NULL);
        desc.batch = 1000;
        CHECK(ckca_update_defaults(c, joined, &desc) == CKCA_OK && desc.batch == COUNT + 12, "%s", ckca_error(ctx));
        desc.batch = 16;
        CHECK(ckca_update(c, joined, &desc, &report) == CKCA_OK, "%s", ckca_error(ctx));
        desc = quick(methods[i], memory);
        desc.batch = 1000;
        CHECK(ckca_update_defaults(d, chunk, &desc) == CKCA_OK && desc.batch == COUNT + 12, "batch %d: %s", desc.batch,
              ckca_error(ctx));
        desc.batch = 16;
        CHECK(ckca_update(d, chunk, &desc, &same) == CKCA_OK && same_model(c, d) && !same_model(b, d) &&
                  report.steps == same.steps && report.loss == same.loss,
              "not the update on the joined pictures: %s", ckca_error(ctx));
        ckca_memory_fill(expected, d, chunk);
        CHECK(same_memory(memory, expected), "the update fills its memory otherwise than ckca_memory_fill");
        ckca_model_free(a), ckca_model_free(b), ckca_model_free(c), ckca_model_free(d);
        ckca_memory_free(memory), ckca_memory_free(expected), ckca_data_free(joined);
    }
}

/* Three SGD steps of EWC by hand, F from the memory's file. */
static void test_ewc(ckca_context *ctx, ckca_model *start, const ckca_data *before, const ckca_data *chunk) {
    const float lambda = 30;
    ckca_model *a = copy_of(start), *b = copy_of(start), *off = copy_of(start), *warm = copy_of(start);
    ckca_memory *memory = create(start, 0, 1), *used;
    ckca_update_desc d = quick(CKCA_METHOD_EWC, NULL);
    ckca_report report;
    ckca_sgd_desc sgd;
    ckca__st_file file;
    float x[COUNT * AREA], z[COUNT * CLASSES], dz[COUNT * CLASSES], loss[COUNT];
    double apart = 0, moved = 0, moved_warm = 0, penalty = 0, entropy = 0;
    int order[COUNT], labels[COUNT], hit[COUNT], epoch, i;
    size_t size, j;
    unsigned char *bytes;
    ckca_memory_fill(memory, start, before);
    used = memory_copy(memory, start);
    bytes = bytes_of(memory, &size);
    CHECK(ckca__st_parse(ctx, "memory", bytes, size, &file) == CKCA_OK, "%s", ckca_error(ctx));
    d.memory = used;
    d.epochs = 3;
    d.batch = COUNT;
    d.warmup_epochs = CKCA_OFF;
    d.schedule = CKCA_SCHEDULE_CONSTANT;
    d.ewc_lambda = lambda;
    d.clip_norm = 0.5f;
    CHECK(ckca_update(a, chunk, &d, &report) == CKCA_OK, "%s", ckca_error(ctx));
    memset(&sgd, 0, sizeof sgd);
    sgd.lr = 0.1f;
    sgd.clip_norm = 0.5f;
    for (epoch = 0; epoch < 3; epoch++) {
        ckca_shuffle(d.seed, epoch, COUNT, order);
        ckca_get_batch(b, chunk, order, COUNT, &d.augment, d.seed, epoch, x, labels);
        ckca_forward(b, x, COUNT, 1);
        ckca_node_read(b, b->logits, z);
        ckca__op_cross_entropy(ctx, COUNT, CLASSES, z, labels, 0, 1, dz, loss, hit);
        for (entropy = 0, i = 0; i < COUNT; i++) entropy += loss[i] / (double)COUNT;
        ckca_zero_gradients(b);
        ckca_backward(b, dz, NULL);
        for (penalty = 0, i = 0; i < ckca_tensor_count(b); i++) {
            ckca_tensor_info tensor;
            char name[100];
            float w[1000], old[1000], g[1000], f[1000];
            ckca_tensor_info_get(b, i, &tensor);
            if (!tensor.trainable || tensor.count > 1000) {
                CHECK(!tensor.trainable, "%s has %d values", tensor.name, (int)tensor.count);
                continue;
            }
            snprintf(name, sizeof name, "fisher.%s", tensor.name);
            if (!ckca__st_find(&file, name)) {
                CHECK(0, "the file has no %s", name);
                continue;
            }
            ckca__st_read_floats(&file, ckca__st_find(&file, name), f);
            ckca_tensor_read(b, i, CKCA_SLOT_VALUE, w);
            ckca_tensor_read(start, i, CKCA_SLOT_VALUE, old);
            ckca_tensor_read(b, i, CKCA_SLOT_GRADIENT, g);
            for (j = 0; j < (size_t)tensor.count; j++) {
                g[j] += lambda * f[j] * (w[j] - old[j]);
                penalty += 0.5 * lambda * f[j] * (w[j] - old[j]) * (w[j] - old[j]);
            }
            ckca_tensor_write(b, i, CKCA_SLOT_GRADIENT, g);
        }
        CHECK(ckca_sgd(b, &sgd) == CKCA_OK, "%s", ckca_error(ctx));
    }
    for (j = 0; j < a->all; j++) apart = fmax(apart, fabs(a->values[j] - b->values[j]));
    CHECK(apart < 1e-5, "three steps by hand are %g away from ckca_update's", apart);
    CHECK(penalty > 1e-4 && fabs(report.loss - entropy - penalty) < 1e-5, "the loss is %g, not %g and a penalty of %g",
          report.loss, entropy, penalty);
    ckca_memory_free(used);
    used = memory_copy(memory, start);
    d.memory = used;
    d.ewc_lambda = CKCA_OFF;
    ckca_update(off, chunk, &d, NULL);
    d.method = CKCA_METHOD_WARM;
    d.memory = NULL;
    ckca_update(warm, chunk, &d, NULL);
    CHECK(same_model(off, warm) && !same_model(off, a), "EWC without its penalty is no warm start");
    for (j = 0; j < a->trainable; j++) {
        const double f = ckca__memory_fisher(memory)[j];
        moved += f * pow(a->values[j] - start->values[j], 2);
        moved_warm += f * pow(warm->values[j] - start->values[j], 2);
    }
    CHECK(moved < moved_warm, "F-weighted, EWC moves by %g, warm start by %g", moved, moved_warm);
    ckca__st_close(&file);
    free(bytes);
    ckca_memory_free(memory), ckca_memory_free(used);
    ckca_model_free(a), ckca_model_free(b), ckca_model_free(off), ckca_model_free(warm);
}

static int stop_at; /* SGD steps left */
static int stopping(const ckca_progress *p, void *user) {
    (void)p, (void)user;
    return --stop_at == 0;
}

/* A killed update resumes to the same bits, memory included, from any step and from behind the last. */
static void test_resume(ckca_context *ctx, ckca_model *start, const ckca_data *before, const ckca_data *chunk) {
    static const struct {
        ckca_method method;
        int pictures, fisher;
    } kinds[] = {{CKCA_METHOD_REPLAY, 12, 0}, {CKCA_METHOD_EWC, 0, 1}, {CKCA_METHOD_CKCA, 12, 1}};
    size_t i;
    int stop;
    for (i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        ckca_model *whole = copy_of(start);
        ckca_memory *memory = create(start, kinds[i].pictures, kinds[i].fisher), *used;
        ckca_update_desc d;
        ckca_memory_fill(memory, start, before);
        used = memory_copy(memory, start);
        d = quick(kinds[i].method, used);
        d.ewc_lambda = 10;
        CHECK(ckca_update(whole, chunk, &d, NULL) == CKCA_OK, "%s", ckca_error(ctx));
        d.state = "net.state";
        d.state_seconds = 1e-9f;
        d.progress = stopping;
        for (stop = 1; stop < 9; stop += 3) {
            ckca_model *m = copy_of(start), *again = copy_of(start);
            ckca_memory *kept = memory_copy(memory, start);
            d.memory = kept;
            stop_at = stop;
            CHECK(ckca_update(m, chunk, &d, NULL) == CKCA_ESTOP && same_memory(kept, memory),
                  "a stopped update changes its memory: %s", ckca_error(ctx));
            stop_at = -1;
            CHECK(ckca_update(again, chunk, &d, NULL) == CKCA_OK && same_model(again, whole) && same_memory(kept, used),
                  "method %d stopped at step %d: other bits: %s", (int)d.method, stop, ckca_error(ctx));
            ckca_model_free(m), ckca_model_free(again);
            again = copy_of(start); /* killed before it was saved: the state has the result, the memory's file is old */
            ckca_memory_free(kept);
            d.memory = kept = memory_copy(memory, start);
            stop_at = 1; /* no step is left to do */
            CHECK(ckca_update(again, chunk, &d, NULL) == CKCA_OK && same_model(again, whole) && same_memory(kept, used),
                  "method %d, done but not saved: other bits: %s", (int)d.method, ckca_error(ctx));
            ckca_model_free(again);
            ckca_memory_free(kept);
            remove(d.state);
        }
        { /* another memory is another update */
            ckca_model *m = copy_of(start), *other = copy_of(start);
            ckca_memory *kept = memory_copy(memory, start), *grown = memory_copy(memory, start);
            ckca_memory_fill(grown, start, chunk);
            d.memory = kept;
            stop_at = 2;
            ckca_update(m, chunk, &d, NULL);
            d.memory = grown;
            stop_at = -1;
            expect(ctx, "another memory", ckca_update(other, chunk, &d, NULL), CKCA_EINVAL, "teacher, memory, number of ranks");
            CHECK(same_model(other, start), "a refused update changes the model");
            remove(d.state);
            ckca_model_free(m), ckca_model_free(other);
            ckca_memory_free(kept), ckca_memory_free(grown);
        }
        ckca_model_free(whole);
        ckca_memory_free(memory), ckca_memory_free(used);
    }
}

/* ---- files ---- */

/* The file with each `from` in its header replaced by `to`, of the same length. */
static unsigned char *edited(const unsigned char *bytes, size_t size, const char *from, const char *to) {
    unsigned char *copy = (unsigned char *)malloc(size);
    size_t i, n = strlen(from);
    int found = 0;
    memcpy(copy, bytes, size);
    for (i = 8; i + n <= size && i < 8 + 4000; i++)
        if (!memcmp(copy + i, from, n)) memcpy(copy + i, to, n), found++;
    CHECK(found && n == strlen(to), "%s is not in the header, or %s is longer", from, to);
    return copy;
}

static size_t place(ckca_context *ctx, const unsigned char *bytes, size_t size, const char *name) {
    ckca__st_file file;
    size_t at = 0;
    if (ckca__st_parse(ctx, "memory", bytes, size, &file) == CKCA_OK) at = ckca__st_find(&file, name)->begin;
    ckca__st_close(&file);
    return at;
}

static void test_files(ckca_context *ctx, ckca_model *start, const ckca_data *chunk) {
    static const struct {
        const char *from, *to;
        ckca_status status;
        const char *words;
    } edits[] = {{"\"dtype\":\"I32\"", "\"dtype\":\"U32\"", CKCA_EFORMAT, "are U8, U32 and I64, not U8, I32 and I64"},
                 {"\"seen\"", "\"sent\"", CKCA_EFORMAT, "it lacks pictures, labels, seen"},
                 {"ckca.memory", "ckca.mammal", CKCA_EFORMAT, "it is not a memory"},
                 {"\"12 1 1\"", "\"12 1x1\"", CKCA_EFORMAT, "ckca.memory \"12 1x1\" cannot be read"},
                 {"\"12 1 1\"", "\"12 2 1\"", CKCA_EFORMAT, "cannot be read"},
                 {"\"12 1 1\"", "\"11 1 1\"", CKCA_EFORMAT, "12 pictures with 12 labels in a memory of at most 11"},
                 {"\"12 1 1\"", "\"03 1 1\"", CKCA_ESHAPE, "it keeps 3 pictures"},
                 {"\"12 1 1\"", "\"12 0 1\"", CKCA_EFORMAT, "tensors, a memory of this model has 3"},
                 {"\"12 1 1\"", "\"12 1 0\"", CKCA_EFORMAT, "tensors, a memory of this model has"},
                 {"\"ckca.format\":\"1\"", "\"ckca.format\":\"9\"", CKCA_EFORMAT, "a newer ckca.h wrote it"},
                 {"fisher.conv1.weight", "fisher.conv1.wight_", CKCA_EFORMAT, "it has no tensor fisher.conv1.weight"},
                 {"[12,8,8,3]", "[12,8,3,8]", CKCA_ESHAPE, "its pictures are 12x8x3x8, the model takes Nx8x8x3"},
                 {"[\\\"cat\\\"", "[\\\"cow\\\"", CKCA_EINVAL, "class 0 is \"cow\" in the memory, \"cat\" in the model"},
                 {"[\\\"cat\\\",", "[\\\"cat\\\"]", CKCA_EFORMAT, ""}};
    ckca_memory *memory = create(start, 12, 1), *back = NULL;
    unsigned char *bytes, *copy;
    size_t size, i, at, header = 0;
    char small[8];
    ckca_memory_fill(memory, start, chunk);
    bytes = bytes_of(memory, &size);
    expect(ctx, "too little memory", ckca_memory_to_bytes(memory, small, 8, &i), CKCA_EINVAL, "out has 8 bytes");
    CHECK(ckca_memory_save(memory, "net.memory") == CKCA_OK && ckca_memory_load(start, &back, "net.memory") == CKCA_OK &&
              same_memory(memory, back),
          "through a file: %s", ckca_error(ctx));
    CHECK(ckca_memory_save(back, "net.memory") == CKCA_OK, "over the file: %s", ckca_error(ctx));
    ckca_memory_free(back);
    for (i = 8; i-- > 0;) header = header << 8 | bytes[i];
    for (i = 0; i < size; i += i < header + 16 ? 1 : 97) {
        back = NULL;
        copy = (unsigned char *)malloc(i ? i : 1); /* exactly as long: reading behind its end shows */
        memcpy(copy, bytes, i);
        CHECK(ckca_memory_from_bytes(start, &back, copy, i) == CKCA_EFORMAT && !back, "cut to %d bytes it is read",
              (int)i);
        free(copy);
    }
    copy = (unsigned char *)malloc(size);
    for (i = 0; i < size; i += i < header + 8 ? 1 : 131) { /* another byte: refused, or read; no harm */
        memcpy(copy, bytes, size);
        copy[i] ^= (unsigned char)(1 + i % 255);
        back = NULL;
        if (ckca_memory_from_bytes(start, &back, copy, size) == CKCA_OK) {
            ckca_model *m = copy_of(start);
            CHECK(back && ckca_memory_fill(back, m, chunk) == CKCA_OK, "byte %d: %s", (int)i, ckca_error(ctx));
            ckca_model_free(m);
        }
        ckca_memory_free(back);
    }
    free(copy);
    for (i = 0; i < sizeof edits / sizeof *edits; i++) {
        copy = edited(bytes, size, edits[i].from, edits[i].to);
        back = NULL;
        expect(ctx, edits[i].to, ckca_memory_from_bytes(start, &back, copy, size), edits[i].status, edits[i].words);
        CHECK(!back, "a failing call wrote to the caller's pointer");
        free(copy);
    }
    for (i = 0; i < 5; i++) {
        static const struct {
            const char *tensor, *words;
            ckca_status status;
            float value;
        } bad[] = {{"labels", "label 0 is -1, must be 0 to 3", CKCA_EFORMAT, 0},
                   {"labels", "label 0 is 4, must be 0 to 3", CKCA_EFORMAT, 0},
                   {"seen", "it has 3 pictures of class 0, of 2 that were seen", CKCA_EFORMAT, 0},
                   {"fisher.fc.weight", "fisher.fc.weight has the negative value -1", CKCA_EFORMAT, -1},
                   {"fisher.fc.weight", "fisher.fc.weight is not finite", CKCA_ENAN, NAN}};
        const int32_t label = i ? 4 : -1;
        const int64_t seen = 2;
        at = place(ctx, bytes, size, bad[i].tensor);
        copy = (unsigned char *)malloc(size);
        memcpy(copy, bytes, size);
        if (i < 2) memcpy(copy + at, &label, sizeof label);
        if (i == 2) memcpy(copy + at, &seen, sizeof seen);
        if (i > 2) memcpy(copy + at, &bad[i].value, sizeof bad[i].value);
        back = NULL;
        expect(ctx, bad[i].tensor, ckca_memory_from_bytes(start, &back, copy, size), bad[i].status, bad[i].words);
        free(copy);
    }
    expect(ctx, "no file", ckca_memory_load(start, &back, "nothing"), CKCA_EIO, "nothing: cannot be opened");
    expect(ctx, "a folder", ckca_memory_save(memory, "build"), CKCA_EIO, "not a regular file");
    ckca_save(start, "net.safetensors");
    expect(ctx, "a checkpoint", ckca_memory_load(start, &back, "net.safetensors"), CKCA_EFORMAT, "it is not a memory");
    ckca_memory_free(memory);
    memory = create(start, 12, 1); /* an empty one can be saved too */
    back = memory_copy(memory, start);
    CHECK(back && !back->data && back->updates == 0 && same_memory(memory, back), "an empty memory through its file");
    ckca_memory_free(back), ckca_memory_free(memory);
    remove("net.memory"), remove("net.safetensors");
    free(bytes);
}

/* ---- what is refused ---- */

static void test_refused(ckca_context *ctx, ckca_model *start, const ckca_data *chunk) {
    ckca_context *elsewhere = new_context(1);
    ckca_model *m = copy_of(start), *wide = net(ctx, "resnet8", CLASSES, 16, 3), *grey = net(ctx, "resnet8", CLASSES, 8, 1);
    ckca_model *five = net(ctx, "resnet8", 5, 8, 3), *deep = net(ctx, "resnet20", CLASSES, 8, 3);
    ckca_model *foreign = net(elsewhere, "resnet8", CLASSES, 8, 3), *fresh = net(ctx, "resnet8", CLASSES, 8, 3), *other = NULL;
    ckca_model_desc bottle;
    ckca_memory *kept = create(start, 12, 0), *fisher = create(start, 0, 1), *none = NULL, *far = create(foreign, 12, 0);
    ckca_memory_desc desc = {3, 0};
    ckca_update_desc d;
    ckca_memory_info info;
    ckca_memory *before;
    expect(ctx, "3 pictures", ckca_memory_create(start, &none, &desc), CKCA_EINVAL, "one per class, and there are 4");
    desc.pictures = -1;
    expect(ctx, "-1 pictures", ckca_memory_create(start, &none, &desc), CKCA_EINVAL, "pictures is -1");
    desc.pictures = 0;
    expect(ctx, "nothing", ckca_memory_create(start, &none, &desc), CKCA_EINVAL, "there is nothing to keep");
    desc.fisher = 2;
    expect(ctx, "fisher 2", ckca_memory_create(start, &none, &desc), CKCA_EINVAL, "fisher is 2");
    expect(ctx, "no desc", ckca_memory_create(start, &none, NULL), CKCA_EINVAL, "desc is NULL");
    expect(ctx, "no memory", ckca_memory_fill(NULL, m, chunk), CKCA_EINVAL, "memory is NULL");
    expect(ctx, "no chunk", ckca_memory_fill(kept, m, NULL), CKCA_EINVAL, "chunk is NULL");
    expect(ctx, "no path", ckca_memory_save(kept, NULL), CKCA_EINVAL, "path is NULL");
    expect(ctx, "no path", ckca_memory_load(start, &none, NULL), CKCA_EINVAL, "path is NULL");
    expect(ctx, "no size", ckca_memory_to_bytes(kept, NULL, 0, NULL), CKCA_EINVAL, "size is NULL");
    expect(ctx, "no bytes", ckca_memory_from_bytes(start, &none, NULL, 9), CKCA_EINVAL, "bytes is NULL");
    CHECK(ckca_memory_create(NULL, &none, &desc) == CKCA_EINVAL && ckca_memory_fill(kept, NULL, chunk) == CKCA_EINVAL &&
              ckca_memory_save(NULL, "x") == CKCA_EINVAL && ckca_memory_load(NULL, &none, "x") == CKCA_EINVAL &&
              ckca_memory_to_bytes(NULL, NULL, 0, NULL) == CKCA_EINVAL &&
              ckca_memory_from_bytes(NULL, &none, "x", 1) == CKCA_EINVAL && !none && !ckca_memory_pictures(NULL),
          "calls without an object");
    ckca_memory_free(NULL);
    ckca_memory_info_get(NULL, &info);
    CHECK(!info.pictures && !info.updates, "the info of NULL");
    expect(ctx, "an untrained model", ckca_memory_fill(kept, fresh, chunk), CKCA_EINVAL, "untrained");

    ckca_memory_fill(kept, start, chunk);
    ckca_memory_fill(fisher, start, chunk);
    before = memory_copy(kept, start);
    d = quick(CKCA_METHOD_REPLAY, NULL);
    expect(ctx, "REPLAY without", ckca_update(m, chunk, &d, NULL), CKCA_EINVAL, "REPLAY needs a memory with pictures");
    d.memory = fisher;
    expect(ctx, "REPLAY without", ckca_update(m, chunk, &d, NULL), CKCA_EINVAL, "REPLAY needs a memory with pictures");
    d = quick(CKCA_METHOD_EWC, kept);
    expect(ctx, "EWC without", ckca_update(m, chunk, &d, NULL), CKCA_EINVAL, "EWC needs a memory with fisher");
    expect(ctx, "EWC without", ckca_update_defaults(m, chunk, &d), CKCA_EINVAL, "EWC needs a memory with fisher");
    d = quick(CKCA_METHOD_CKCA, kept);
    m->updates = 0;
    expect(ctx, "a later memory", ckca_update(m, chunk, &d, NULL), CKCA_EINVAL,
           "it has taken in the chunk of update 1, but the model has had 0 updates");
    m->updates = start->updates;
    d.memory = far;
    expect(ctx, "another context", ckca_update(m, chunk, &d, NULL), CKCA_EINVAL, "belongs to another context");
    wide->updates = grey->updates = five->updates = deep->updates = 1;
    ckca_memory_free(far);
    far = create(wide, 12, 0);
    d.memory = far;
    expect(ctx, "another size", ckca_update(m, chunk, &d, NULL), CKCA_ESHAPE,
           "its pictures are 16 x 16 x 3 in 4 classes, the model takes 8 x 8 x 3 and has 4 classes");
    ckca_memory_free(far);
    far = create(grey, 12, 0);
    d.memory = far;
    expect(ctx, "other channels", ckca_update(m, chunk, &d, NULL), CKCA_ESHAPE, "8 x 8 x 1 in 4 classes");
    ckca_memory_free(far);
    far = create(five, 12, 0);
    d.memory = far;
    expect(ctx, "other classes", ckca_update(m, chunk, &d, NULL), CKCA_ESHAPE, "8 x 8 x 3 in 5 classes");
    expect(ctx, "other classes", ckca_memory_fill(far, m, chunk), CKCA_ESHAPE, "8 x 8 x 3 in 5 classes");
    ckca_memory_free(far);
    far = create(deep, 0, 1);
    d.memory = far;
    expect(ctx, "another network", ckca_update(m, chunk, &d, NULL), CKCA_ESHAPE, "it is of a network of");
    memset(&bottle, 0, sizeof bottle);
    bottle.height = bottle.width = 8;
    bottle.classes = CLASSES;
    bottle.width_base = 3;
    ckca_resnet(ctx, &other, "resnet8", &bottle);
    ckca_memory_free(far);
    far = create(other, 0, 1);
    d.memory = far;
    expect(ctx, "a wider network", ckca_update(m, chunk, &d, NULL), CKCA_ESHAPE, "differs from the model's");
    ckca_memory_free(far);
    far = memory_copy(fisher, start);
    CHECK(ckca_memory_save(far, "net.memory") == CKCA_OK, "%s", ckca_error(ctx));
    expect(ctx, "a wider network", ckca_memory_load(other, &none, "net.memory"), CKCA_ESHAPE,
           "in the file, 3x3x3x3 in the model");
    remove("net.memory");
    d.memory = kept;
    d.lr = 9e5f; /* diverges */
    d.momentum = 0.99f;
    d.epochs = 30;
    expect(ctx, "a diverging update", ckca_update(m, chunk, &d, NULL), CKCA_ENAN, "finite");
    CHECK(same_model(m, start) && same_memory(kept, before), "a refused update changes model or memory");
    d = quick(CKCA_METHOD_REPLAY, kept); /* the first update of a model: from scratch, and the memory begins */
    ckca_memory_free(kept);
    d.memory = kept = create(fresh, 12, 0);
    CHECK(ckca_update(fresh, chunk, &d, NULL) == CKCA_OK && kept->updates == 1 && ckca__memory_count(kept) == 12, "%s",
          ckca_error(ctx));
    ckca_memory_free(kept), ckca_memory_free(fisher), ckca_memory_free(far), ckca_memory_free(before);
    ckca_model_free(m), ckca_model_free(wide), ckca_model_free(grey), ckca_model_free(five), ckca_model_free(deep);
    ckca_model_free(foreign), ckca_model_free(fresh), ckca_model_free(other);
    ckca_context_free(elsewhere);
}

/* ---- threads, allocations ---- */

static void test_threads(void) {
    unsigned char *bytes[2];
    size_t size[2];
    int i;
    for (i = 0; i < 2; i++) {
        ckca_context *ctx = new_context(1 + 2 * i);
        ckca_model *m = net(ctx, "resnet8", CLASSES, SIZE, 3);
        ckca_data *one = pictures(ctx, 1), *two = pictures(ctx, 2);
        ckca_memory *memory = create(m, 12, 1);
        ckca_update_desc d = quick(CKCA_METHOD_EWC, memory);
        CHECK(ckca_update(m, one, &d, NULL) == CKCA_OK && ckca_update(m, two, &d, NULL) == CKCA_OK, "%s", ckca_error(ctx));
        bytes[i] = bytes_of(memory, &size[i]);
        ckca_memory_free(memory);
        ckca_data_free(one), ckca_data_free(two);
        ckca_model_free(m);
        ckca_context_free(ctx);
    }
    CHECK(size[0] == size[1] && !memcmp(bytes[0], bytes[1], size[0]), "1 and 3 threads leave other memories");
    free(bytes[0]), free(bytes[1]);
}

/* A new model and memory, two updates, the file. Whatever fails, the memory is as before the update. */
static ckca_status whole_job(ckca_context *ctx) {
    static const int counts[CLASSES] = {4, 3, 3, 2};
    ckca_model *m = NULL;
    ckca_data *data = NULL;
    ckca_memory *memory = NULL, *back = NULL;
    ckca_memory_desc desc = {6, 1};
    ckca_model_desc shape;
    ckca_update_desc d = quick(CKCA_METHOD_EWC, NULL);
    ckca_status status;
    memset(&shape, 0, sizeof shape);
    shape.height = shape.width = SIZE;
    shape.classes = CLASSES;
    shape.width_base = 1;
    status = ckca_resnet(ctx, &m, "resnet8", &shape);
    if (!status && !(data = drawn(ctx, counts, 3))) status = CKCA_ENOMEM;
    if (!status) status = ckca_memory_create(m, &memory, &desc);
    d.memory = memory;
    d.epochs = 1;
    if (!status) status = ckca_update(m, data, &d, NULL);
    if (!status) {
        status = ckca_update(m, data, &d, NULL);
        CHECK(memory->updates == m->updates && m->updates == (status ? 1 : 2), "memory of update %d, model of %d",
              memory->updates, m->updates);
    }
    if (!status) status = ckca_memory_fill(memory, m, data);
    if (!status) status = ckca_memory_save(memory, "net.memory");
    if (!status) status = ckca_memory_load(m, &back, "net.memory");
    ckca_memory_free(memory), ckca_memory_free(back);
    ckca_data_free(data);
    ckca_model_free(m);
    return status;
}

int main(void) {
    ckca_context *ctx = new_context(1);
    ckca_data *first = pictures(ctx, 1), *before = pictures(ctx, 2), *chunk = pictures(ctx, 3);
    ckca_model *start = net(ctx, "resnet8", CLASSES, SIZE, 3);
    ckca_update_desc d = quick(CKCA_METHOD_WARM, NULL);
    test_enter();
    d.epochs = 6;
    CHECK(ckca_update(start, first, &d, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    test_group("herding against iCaRL's formula in plain loops");
    test_herding();
    test_group("a memory's places, class means and order");
    test_fill(ctx, start);
    test_group("the Fisher information");
    test_fisher(ctx, start, chunk);
    test_group("REPLAY and CKCA train on chunk and memory");
    test_methods(ctx, start, before, chunk);
    test_group("EWC by hand");
    test_ewc(ctx, start, before, chunk);
    test_group("killed updates resume to the same bits");
    test_resume(ctx, start, before, chunk);
    test_group("files: written, read, cut, corrupt, of other models");
    test_files(ctx, start, chunk);
    test_group("what is refused leaves model and memory as they were");
    test_refused(ctx, start, chunk);
    test_group("any number of threads");
    test_threads();
    test_group("every allocation fails in turn");
    fail_each_allocation("two updates with a memory", whole_job);
    remove("net.memory");
    ckca_data_free(first), ckca_data_free(before), ckca_data_free(chunk);
    ckca_model_free(start);
    ckca_context_free(ctx);
    test_leave();
    return test_summary();
}
