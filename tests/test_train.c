/* test_train.c: the graph (shapes, fusion, gradients through every kind of node), ckca_update in every method and form,
   checkpoints, training states, failures injected at every allocation. Small nets on small pictures. */
#define CKCA_IMPLEMENTATION
#include "ckca.h"
#include "test.h"
#include "device.h"

#include <sys/stat.h>

#define DIR "build/tmp_train"
enum { SIZE = 8, CLASSES = 4, COUNT = 90 };

/* Pictures whose class is a bright quarter, under noise. first: another part of the same distribution. */
static ckca_data *pictures(ckca_context *ctx, int count, uint64_t seed) {
    static unsigned char pixels[400 * SIZE * SIZE * 3];
    static int labels[400];
    static const char *const names[CLASSES] = {"north-west", "north-east", "south \"west\"", "south-\xc3\xb6st"};
    ckca_array array;
    ckca_data *data = NULL;
    int i, y, x, c;
    uint64_t draw = 0;
    for (i = 0; i < count; i++) {
        labels[i] = (int)(ckca__random(seed, 77, draw++) % CLASSES);
        for (y = 0; y < SIZE; y++)
            for (x = 0; x < SIZE; x++)
                for (c = 0; c < 3; c++) {
                    const int bright = y / (SIZE / 2) * 2 + x / (SIZE / 2) == labels[i];
                    pixels[((i * SIZE + y) * SIZE + x) * 3 + c] =
                        (unsigned char)(ckca__random(seed, 77, draw++) % 190 + (bright ? 60 : 0));
                }
    }
    memset(&array, 0, sizeof array);
    array.pixels = pixels;
    array.labels = labels;
    array.count = count;
    array.height = array.width = SIZE;
    array.channels = 3;
    array.classes = CLASSES;
    array.class_names = names;
    ckca_open_array(ctx, &data, &array, NULL);
    return data;
}

static ckca_model *small_net(ckca_context *ctx, const char *arch, uint64_t seed) {
    ckca_model_desc desc;
    ckca_model *m = NULL;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = SIZE;
    desc.classes = CLASSES;
    desc.seed = seed;
    desc.width_base = 4;
    ckca_resnet(ctx, &m, arch, &desc);
    return m;
}

static ckca_update_desc quick(ckca_method method) {
    ckca_update_desc d;
    memset(&d, 0, sizeof d);
    d.method = method;
    d.epochs = 3;
    d.batch = 16; /* 90 pictures: the last batch of an epoch has 10 */
    d.holdout = CKCA_OFF;
    d.seed = 5;
    return d;
}

static float *weights(ckca_model *m) { /* all values in one block, to be freed */
    float *all = (float *)malloc(m->all * sizeof(float));
    ckca__device_download(m->ctx, all, m->values, m->all * sizeof(float));
    return all;
}

static double distance(const float *a, const float *b, size_t n) {
    double sum = 0;
    size_t i;
    for (i = 0; i < n; i++) sum += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
    return sqrt(sum);
}

static int same_weights(ckca_model *a, ckca_model *b) {
    float *x = weights(a), *y = weights(b);
    int same = a->all == b->all && !memcmp(x, y, a->all * sizeof(float));
    free(x);
    free(y);
    return same;
}

/* ---- graph ---- */

static ckca_conv_desc conv(int out, int kernel, int stride, int pad, int bias) {
    ckca_conv_desc d;
    d.out = out;
    d.kernel = kernel;
    d.stride = stride;
    d.pad = pad;
    d.bias = bias;
    d.groups = 0;
    return d;
}

/* Every kind of node; batch norm alone, before a ReLU, an add, an add and ReLU; maps with several readers, an add of a
   node to itself, a batch norm whose input others read, and one on a pooled map. */
static ckca_model *strange_net(ckca_context *ctx) {
    ckca_model_desc desc;
    ckca_model *m = NULL;
    int x, a, b, c, d;
    memset(&desc, 0, sizeof desc);
    desc.height = 9;
    desc.width = 7;
    desc.channels = 2;
    desc.classes = 3;
    desc.seed = 3;
    ckca_model_create(ctx, &m, &desc);
    x = ckca_layer_input(m);
    a = ckca_layer_relu(m, ckca_layer_batchnorm(m, "bn1", ckca_layer_conv(m, "conv1", x, conv(5, 3, 1, 1, 1))));
    b = ckca_layer_maxpool(m, a, 3, 2, 1);
    c = ckca_layer_conv(m, "conv2", b, conv(6, 5, 1, 2, 0));
    d = ckca_layer_add(m, ckca_layer_subsample(m, b, 1, 6), c);      /* plain add; c has two readers */
    d = ckca_layer_add(m, ckca_layer_batchnorm(m, "bn2", c), d);     /* batch norm into an add, without ReLU */
    d = ckca_layer_stage(m, d);
    c = ckca_layer_relu(m, d);                                 /* the add is marked, so this ReLU stands alone */
    d = ckca_layer_batchnorm(m, "bn3", c);                     /* c is read by bn3 and the add */
    d = ckca_layer_relu(m, ckca_layer_add(m, c, ckca_layer_batchnorm(m, "bn4", ckca_layer_conv(m, "conv3", d, conv(6, 1, 1, 0, 0)))));
    d = ckca_layer_add(m, d, d);
    d = ckca_layer_conv(m, "conv4", d, conv(4, 3, 3, 0, 1));
    d = ckca_layer_avgpool(m, d);
    ckca_model_finish(m, ckca_layer_linear(m, "head", d, 3));
    return m;
}

/* sum of r * logits + q * features: a scalar whose gradient at the outputs is (r, q). */
static double probe(ckca_model *m, const float *x, int n, const float *r, const float *q) {
    float z[64], f[64];
    double sum = 0;
    int i;
    ckca_forward(m, x, n, 1);
    ckca_node_read(m, m->logits, z);
    ckca_node_read(m, m->pooled, f);
    for (i = 0; i < n * m->classes; i++) sum += (double)r[i] * z[i];
    for (i = 0; i < n * m->features; i++) sum += (double)q[i] * f[i];
    return sum;
}

static void test_graph_gradients(ckca_context *ctx) {
    ckca_model *m = strange_net(ctx);
    const int n = 5;
    float x[5 * 9 * 7 * 2], r[15], q[20];
    int i, t;
    CHECK(m && m->finished, "the strange net builds: %s", ckca_error(ctx));
    if (!m || !m->finished) return;
    for (i = 0; i < n * 9 * 7 * 2; i++) x[i] = (float)(ckca__uniform(1, 9, (uint64_t)i) * 2 - 1);
    for (i = 0; i < 15; i++) r[i] = (float)(ckca__uniform(2, 9, (uint64_t)i) * 2 - 1);
    for (i = 0; i < 20; i++) q[i] = (float)(ckca__uniform(3, 9, (uint64_t)i) * 2 - 1);
    probe(m, x, n, r, q);
    ckca_zero_gradients(m);
    CHECK(ckca_backward(m, r, q) == CKCA_OK, "backward: %s", ckca_error(ctx));
    CHECK(ckca_backward(m, r, q) == CKCA_EINVAL, "a second backward without a forward is refused");
    for (t = 0; t < ckca_tensor_count(m); t++) { /* along a random direction per tensor: central difference against g . d */
        ckca_tensor_info info;
        float w[800], v[800], g[800];
        double expected = 0, seen, h = 2e-3, size = 0;
        ckca_tensor_info_get(m, t, &info);
        if (!info.trainable) continue;
        ckca_tensor_read(m, t, CKCA_SLOT_VALUE, w);
        ckca_tensor_read(m, t, CKCA_SLOT_GRADIENT, g);
        for (i = 0; i < info.count; i++) {
            const double d = ckca__uniform(4, (uint64_t)t, (uint64_t)i) * 2 - 1;
            v[i] = (float)d;
            expected += d * g[i];
            size += fabs(d * g[i]);
        }
        {
            float moved[800];
            for (i = 0; i < info.count; i++) moved[i] = w[i] + (float)h * v[i];
            ckca_tensor_write(m, t, CKCA_SLOT_VALUE, moved);
            seen = probe(m, x, n, r, q);
            for (i = 0; i < info.count; i++) moved[i] = w[i] - (float)h * v[i];
            ckca_tensor_write(m, t, CKCA_SLOT_VALUE, moved);
            seen = (seen - probe(m, x, n, r, q)) / (2 * h);
            ckca_tensor_write(m, t, CKCA_SLOT_VALUE, w);
        }
        CHECK(fabs(seen - expected) < 0.02 * size + 2e-2, "%s: directional derivative %g, by differences %g", info.name,
              expected, seen);
    }
    { /* evaluation, folded and planned otherwise, agrees with training batch norm fed with the same statistics */
        float z[15], e[15];
        double worst = 0;
        for (i = 0; i < 300; i++) ckca_forward(m, x, n, 1); /* running statistics settle on this batch's (unbiased) */
        ckca_node_read(m, m->logits, z);
        ckca_forward(m, x, n, 0);
        CHECK(ckca_node_read(m, 1, e) == CKCA_EINVAL, "an inner node cannot be read after evaluation");
        ckca_node_read(m, m->logits, e);
        for (i = 0; i < 15; i++) if (fabs(z[i] - e[i]) > worst) worst = fabs(z[i] - e[i]);
        CHECK(worst < 0.1, "evaluation with settled statistics is %g off training", worst);
        for (i = 0; i < n; i++) { /* a picture's logits do not depend on its batch */
            float one[3];
            ckca_forward(m, x + i * 9 * 7 * 2, 1, 0);
            ckca_node_read(m, m->logits, one);
            CHECK(!memcmp(one, e + 3 * i, sizeof one), "picture %d alone gives %g, in a batch %g", i, (double)one[0],
                  (double)e[3 * i]);
        }
    }
    ckca_model_free(m);
}

static void test_graph_errors(ckca_context *ctx) {
    ckca_model_desc desc;
    ckca_model *m;
    int x, y;
    memset(&desc, 0, sizeof desc);
    CHECK(ckca_model_create(ctx, &m, &desc) == CKCA_EINVAL && strstr(ckca_error(ctx), "classes is 0"), "%s", ckca_error(ctx));
    desc.classes = 3;
#define BROKEN(build, status, words)                                                                                      \
    do {                                                                                                                  \
        ckca_model_create(ctx, &m, &desc);                                                                                \
        x = ckca_layer_input(m);                                                                                                \
        y = build;                                                                                                        \
        y = ckca_layer_linear(m, "fc", ckca_layer_avgpool(m, y), 3); /* what follows a failure passes it on */                        \
        CHECK(ckca_model_finish(m, y) == status && strstr(ckca_error(ctx), words), #build ": \"%s\"", ckca_error(ctx)); \
        ckca_model_free(m);                                                                                               \
    } while (0)
    BROKEN(ckca_layer_conv(m, "c", x, conv(0, 3, 1, 1, 0)), CKCA_EINVAL, "conv c: out is 0");
    BROKEN(ckca_layer_conv(m, "c", x, conv(4, 3, 1, 3, 0)), CKCA_EINVAL, "pad is 3, must be 0 to 2");
    BROKEN(ckca_layer_conv(m, "c", x, conv(4, 40, 1, 0, 0)), CKCA_ESHAPE, "kernel of 40");
    BROKEN(ckca_layer_conv(m, "c", 7, conv(4, 3, 1, 1, 0)), CKCA_EINVAL, "no node 7");
    BROKEN(ckca_layer_conv(m, "a b", x, conv(4, 3, 1, 1, 0)), CKCA_EINVAL, "\"a b\"");
    BROKEN(ckca_layer_conv(m, NULL, x, conv(4, 3, 1, 1, 0)), CKCA_EINVAL, "name");
    BROKEN(ckca_layer_conv(m, "c", ckca_layer_conv(m, "c", x, conv(4, 3, 1, 1, 0)), conv(4, 3, 1, 1, 0)), CKCA_EINVAL, "node 1 already has the name");
    BROKEN(ckca_layer_add(m, x, ckca_layer_conv(m, "c", x, conv(4, 3, 1, 1, 0))), CKCA_ESHAPE, "32 x 32 x 4");
    BROKEN(ckca_layer_maxpool(m, x, 0, 1, 0), CKCA_EINVAL, "kernel is 0");
    BROKEN(ckca_layer_subsample(m, x, 2, 1), CKCA_EINVAL, "out is 1, must be 3 to");
    BROKEN(ckca_layer_conv(m, "c", x, conv(2000000000, 3, 1, 1, 0)), CKCA_ESHAPE, "too large");
    BROKEN(ckca_layer_input(m), CKCA_EINVAL, "input");
    ckca_model_create(ctx, &m, &desc);
    x = ckca_layer_avgpool(m, ckca_layer_input(m));
    CHECK(ckca_model_finish(m, x) == CKCA_EINVAL, "logits have to come from a linear node");
    y = ckca_layer_linear(m, "fc", x, 4);
    CHECK(ckca_model_finish(m, y) == CKCA_ESHAPE && strstr(ckca_error(ctx), "4 outputs"), "%s", ckca_error(ctx));
    ckca_model_free(m);
    CHECK(ckca_resnet(ctx, &m, "resnet21", &desc) == CKCA_EINVAL && strstr(ckca_error(ctx), "resnet21"), "%s", ckca_error(ctx));
    CHECK(ckca_resnet(ctx, &m, "resnet20-cifar", &desc) == CKCA_EINVAL, "resnet20 has that stem anyway");
    CHECK(ckca_resnet(ctx, &m, NULL, &desc) == CKCA_EINVAL, "no name");
}

static void test_bytes(ckca_context *ctx) {
    ckca_model *m = small_net(ctx, "resnet20", 1);
    ckca_bytes one, two, eval;
    ckca_model_bytes(m, 1, 1, &one);
    ckca_model_bytes(m, 2, 1, &two);
    ckca_model_bytes(m, 2, 0, &eval);
    CHECK(two.activations == 2 * one.activations, "activations grow with the batch: %zu, %zu", one.activations,
          two.activations);
    CHECK(eval.activations <= 6144 && eval.activations * 4 < two.activations,
          "evaluation keeps a few maps only: %zu, once 6144, against %zu", eval.activations, two.activations);
    CHECK(ckca_model_bytes(m, 0, 1, &one) == CKCA_EINVAL, "a batch of 0");
    CHECK(ckca_model_bytes(m, 1000000, 1, &one) == CKCA_OK, "sizes without allocating: %s", ckca_error(ctx));
    ckca_model_free(m);
}

/* ---- updates ---- */

static int never(const ckca_progress *p, void *user) {
    int *at = (int *)user; /* at[0]: SGD steps to go before it stops */
    CHECK(p->batch >= 1 && p->batch <= p->batches && p->epoch < p->epochs && isfinite(p->loss), "progress %d/%d of epoch %d",
          p->batch, p->batches, p->epoch);
    return --at[0] == 0;
}

/* The first step of a model on data, and what later tests start from. */
static ckca_model *first_step(ckca_context *ctx, const ckca_data *data) {
    ckca_model *m = small_net(ctx, "resnet8", 1);
    ckca_update_desc d = quick(CKCA_METHOD_CKCA);
    ckca_report report;
    d.epochs = 12;
    CHECK(ckca_update(m, data, &d, &report) == CKCA_OK, "first update: %s", ckca_error(ctx));
    CHECK(report.updates == 1 && report.teacher_accuracy == -1 && report.kd == 0 && report.steps == 72,
          "a fresh model trains plainly: step %d, kd %g, %d SGD steps", report.updates, report.kd, report.steps);
    return m;
}

static ckca_model *copy_of(ckca_model *m) {
    ckca_model *copy = NULL;
    CHECK(ckca_model_copy(&copy, m) == CKCA_OK, "%s", ckca_error(m->ctx));
    return copy;
}

static void test_learning(ckca_context *ctx, ckca_model *m, const ckca_data *test) {
    ckca_score score;
    float per_class[CLASSES], p[COUNT * CLASSES];
    double sum = 0, right = 0;
    int i, k;
    CHECK(ckca_evaluate(m, test, &score, per_class) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(score.count == COUNT && score.top1 > 0.6 && score.top5 == 1, "after 12 epochs top-1 is %g, top-5 %g", score.top1,
          score.top5);
    CHECK(ckca_predict(m, test->store->pixels, COUNT, p) == CKCA_OK, "%s", ckca_error(ctx));
    for (i = 0; i < COUNT; i++) {
        int best = 0;
        double total = 0;
        for (k = 0; k < CLASSES; k++) {
            total += p[i * CLASSES + k];
            if (p[i * CLASSES + k] > p[i * CLASSES + best]) best = k;
        }
        CHECK(fabs(total - 1) < 1e-5, "probabilities of picture %d sum to %g", i, total);
        sum -= log(p[i * CLASSES + ckca_label(test, i)]);
        right += best == ckca_label(test, i);
    }
    CHECK(fabs(score.loss - sum / COUNT) < 1e-4 && fabs(score.top1 - right / COUNT) < 1e-9,
          "evaluate says %g, %g; the probabilities %g, %g", score.loss, score.top1, sum / COUNT, right / COUNT);
}

static void test_methods(ckca_context *ctx, ckca_model *start, const ckca_data *data) {
    static const char *const name[] = {"ckca", "scratch", "warm", "shrink-perturb", "lwf"};
    ckca_model *result[5];
    int i, j;
    for (i = 0; i < 5; i++) {
        ckca_update_desc d = quick((ckca_method)i);
        ckca_report report;
        result[i] = copy_of(start);
        CHECK(ckca_update(result[i], data, &d, &report) == CKCA_OK, "%s: %s", name[i], ckca_error(ctx));
        CHECK(report.updates == 2 && report.loss > 0 && report.accuracy >= 0, "%s: step %d", name[i], report.updates);
        CHECK((report.teacher_accuracy >= 0) == (i == 0 || i == 4), "%s: teacher %g", name[i], report.teacher_accuracy);
        CHECK((report.kd > 0) == (i == 0 || i == 4), "%s: AdaKD is %g", name[i], report.kd);
    }
    for (i = 0; i < 5; i++)
        for (j = 0; j < i; j++) CHECK(!same_weights(result[i], result[j]), "%s and %s end differently", name[i], name[j]);
    { /* from scratch: nothing of the model it came with is left */
        ckca_model *other = copy_of(start);
        ckca_update_desc d = quick(CKCA_METHOD_SCRATCH);
        ckca__initialize(other, 99, other->values);
        ckca_update(other, data, &d, NULL);
        CHECK(same_weights(other, result[1]), "SCRATCH does not depend on the weights it finds");
        ckca_model_free(other);
    }
    { /* LWF is CKCA with CONSTANT, weight 1, no FeatReg (the default weight is another: GROWTH's 0.3) */
        ckca_model *other = copy_of(start);
        ckca_update_desc d = quick(CKCA_METHOD_CKCA);
        d.adakd = CKCA_ADAKD_CONSTANT;
        d.w_kd = 1;
        d.w_feat = CKCA_OFF;
        ckca_update(other, data, &d, NULL);
        CHECK(same_weights(other, result[4]), "LWF is constant distillation");
        ckca_model_free(other);
    }
    { /* and with both terms off it is a warm start */
        ckca_model *other = copy_of(start);
        ckca_update_desc d = quick(CKCA_METHOD_CKCA);
        d.w_kd = d.w_feat = CKCA_OFF;
        ckca_update(other, data, &d, NULL);
        CHECK(same_weights(other, result[2]), "CKCA without terms is WARM");
        ckca_model_free(other);
    }
    for (i = 0; i < 5; i++) ckca_model_free(result[i]);
}

/* Stronger terms keep the student closer to its teacher, on outputs (AdaKD) and features (FeatReg), in every form. */
static void test_forms(ckca_context *ctx, ckca_model *start, const ckca_data *data) {
    int form;
    for (form = 0; form < CKCA_ADAKD_COUNT + CKCA_FEATREG_COUNT; form++) {
        const int adakd = form < CKCA_ADAKD_COUNT;
        double term[2];
        int strong;
        for (strong = 0; strong < 2; strong++) {
            ckca_model *m = copy_of(start);
            ckca_update_desc d = quick(CKCA_METHOD_CKCA);
            ckca_report report;
            d.w_kd = d.w_feat = CKCA_OFF;
            if (adakd) {
                d.adakd = (ckca_adakd)form;
                d.w_kd = strong ? 4.0f : 1e-4f;
            } else {
                d.featreg = (ckca_featreg)(form - CKCA_ADAKD_COUNT);
                d.w_feat = strong ? 10.0f : 1e-4f;
            }
            d.lr = 0.01f;
            d.epochs = 8;
            CHECK(ckca_update(m, data, &d, &report) == CKCA_OK, "form %d: %s", form, ckca_error(ctx));
            term[strong] = adakd ? report.kd : report.feat;
            ckca_model_free(m);
        }
        CHECK(term[0] > 0 && term[1] < 0.85 * term[0], "form %d: the term is %g with a strong weight, %g with next to none", form,
              term[1], term[0]);
    }
}

/* The teacher's answers kept from the survey are those it gives per batch (which augmentation forces; the least jitter
   leaves pictures as they are, but for rounding). */
static void test_live_teacher(ckca_context *ctx, ckca_model *start, const ckca_data *data) {
    ckca_model *kept = copy_of(start), *live = copy_of(start);
    float *a, *b, *w0 = weights(start);
    double apart;
    ckca_update_desc d = quick(CKCA_METHOD_CKCA);
    d.featreg = CKCA_FEATREG_COSINE; /* STAGES needs a live teacher always */
    ckca_update(kept, data, &d, NULL);
    d.teacher = start; /* the same weights under another name */
    d.augment.jitter = 1e-30f;
    CHECK(ckca_update(live, data, &d, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    a = weights(kept);
    b = weights(live);
    apart = distance(a, b, kept->all) / distance(a, w0, kept->all);
    CHECK(apart < 1e-4, "kept and live answers end %g apart", apart);
    free(a);
    free(b);
    free(w0);
    ckca_model_free(kept);
    ckca_model_free(live);
}

static void test_other_teacher(ckca_context *ctx, ckca_model *start, const ckca_data *data) {
    ckca_model *big = small_net(ctx, "resnet20", 8), *m = copy_of(start), *wide;
    ckca_model_desc desc;
    ckca_update_desc d = quick(CKCA_METHOD_WARM);
    ckca_report report;
    ckca_update(big, data, &d, NULL);
    d = quick(CKCA_METHOD_CKCA);
    d.teacher = big;
    CHECK(ckca_update(m, data, &d, &report) == CKCA_EINVAL && strstr(ckca_error(ctx), "mean of channel 0"), "%s", ckca_error(ctx));
    memcpy(big->normalization, m->normalization, 6 * sizeof(float));
    d.w_feat = 1;
    CHECK(ckca_update(m, data, &d, &report) == CKCA_OK && report.feat > 0, "a resnet20 teaches a resnet8: %s", ckca_error(ctx));
    d.featreg = CKCA_FEATREG_STAGES;
    CHECK(ckca_update(m, data, &d, &report) == CKCA_OK && report.feat > 0, "stage by stage: %s", ckca_error(ctx));
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = SIZE;
    desc.classes = CLASSES;
    desc.width_base = 6;
    ckca_resnet(ctx, &wide, "resnet8", &desc);
    d.teacher = wide;
    CHECK(ckca_update(m, data, &d, &report) == CKCA_ESHAPE && strstr(ckca_error(ctx), "stage"), "%s", ckca_error(ctx));
    d.w_feat = 0;
    CHECK(ckca_update(m, data, &d, &report) == CKCA_OK && report.kd > 0 && report.feat == 0,
          "stages unlike the teacher's, not asked for: %s", ckca_error(ctx));
    d.featreg = CKCA_FEATREG_CENTROID;
    CHECK(ckca_update(m, data, &d, &report) == CKCA_OK && report.kd > 0 && report.feat == 0,
          "class means of other features, not asked for: %s", ckca_error(ctx));
    for (d.w_feat = 1; d.featreg <= CKCA_FEATREG_COSINE; d.featreg = (ckca_featreg)(d.featreg + 2))
        CHECK(ckca_update(m, data, &d, &report) == CKCA_ESHAPE && strstr(ckca_error(ctx), "24 features, the model 16"),
              "%s", ckca_error(ctx));
    ckca_model_free(big);
    ckca_model_free(wide);
    ckca_model_free(m);
}

static void test_shrink_perturb(ckca_context *ctx, ckca_model *start, const ckca_data *data) {
    ckca_model *m = copy_of(start), *fresh = small_net(ctx, "resnet8", 5);
    ckca_update_desc d = quick(CKCA_METHOD_SHRINK_PERTURB);
    float *w0 = weights(start), *p0 = weights(fresh), *w;
    size_t i;
    double worst = 0;
    d.epochs = 1;
    d.lr = 1e-30f;
    d.shrink = 0.5f;
    d.perturb = 0.25f;
    ckca_update(m, data, &d, NULL);
    w = weights(m);
    for (i = 0; i < m->trainable; i++) {
        const double expected = 0.5 * w0[i] + 0.25 * p0[i];
        if (fabs(w[i] - expected) > worst) worst = fabs(w[i] - expected);
    }
    CHECK(worst < 1e-6, "shrink 0.5, perturb 0.25: off by %g", worst);
    free(w0);
    free(p0);
    free(w);
    ckca_model_free(m);
    ckca_model_free(fresh);
}

static void test_schedule(void) {
    ckca_update_desc d;
    memset(&d, 0, sizeof d);
    d.lr = 1;
    d.epochs = 10;
    d.warmup_epochs = 1;
    CHECK(ckca__learning_rate(&d, 0, 4) == 0.25f && ckca__learning_rate(&d, 3, 4) == 1, "warm-up starts at %g, ends at %g",
          (double)ckca__learning_rate(&d, 0, 4), (double)ckca__learning_rate(&d, 3, 4));
    CHECK(ckca__learning_rate(&d, 4, 4) == 1 && fabsf(ckca__learning_rate(&d, 22, 4) - 0.5f) < 1e-6f && ckca__learning_rate(&d, 39, 4) < 0.002f,
          "cosine: %g half way, %g at the end", (double)ckca__learning_rate(&d, 22, 4), (double)ckca__learning_rate(&d, 39, 4));
    d.schedule = CKCA_SCHEDULE_CONSTANT;
    CHECK(ckca__learning_rate(&d, 39, 4) == 1, "constant: %g", (double)ckca__learning_rate(&d, 39, 4));
    d.schedule = CKCA_SCHEDULE_STEP;
    d.step_epochs = 3;
    d.step_factor = 0.1f;
    CHECK(fabsf(ckca__learning_rate(&d, 12, 4) - 0.1f) < 1e-7f && fabsf(ckca__learning_rate(&d, 36, 4) - 0.001f) < 1e-9f && ckca__learning_rate(&d, 11, 4) == 1,
          "step: %g, then %g", (double)ckca__learning_rate(&d, 12, 4), (double)ckca__learning_rate(&d, 36, 4));
}

static void test_shuffle(void) {
    int order[100], again[100], seen[100] = {0}, i, fixed = 0;
    ckca_shuffle(1, 0, 100, order);
    ckca_shuffle(1, 0, 100, again);
    CHECK(!memcmp(order, again, sizeof order), "an order is a function of seed and epoch");
    ckca_shuffle(1, 1, 100, again);
    CHECK(memcmp(order, again, sizeof order), "epochs differ");
    ckca_shuffle(2, 0, 100, again);
    CHECK(memcmp(order, again, sizeof order), "seeds differ");
    for (i = 0; i < 100; i++) {
        seen[order[i]]++;
        fixed += order[i] == i;
    }
    for (i = 0; i < 100; i++) CHECK(seen[i] == 1, "%d occurs %d times", i, seen[i]);
    CHECK(fixed < 10, "%d of 100 stayed in place", fixed);
}

/* ckca_forward, ckca_backward and ckca_sgd by hand are what ckca_update does. */
static void test_by_hand(ckca_context *ctx, ckca_model *start, const ckca_data *data) {
    ckca_model *a = copy_of(start), *b = copy_of(start);
    ckca_update_desc d = quick(CKCA_METHOD_WARM);
    ckca_sgd_desc sgd;
    float x[16 * SIZE * SIZE * 3], z[16 * CLASSES], dz[16 * CLASSES], loss[16], *wa, *wb;
    int order[COUNT], labels[16], hit[16], first;
    double apart;
    d.epochs = 1;
    d.warmup_epochs = CKCA_OFF;
    d.schedule = CKCA_SCHEDULE_CONSTANT;
    d.label_smoothing = 0.1f;
    d.clip_norm = 0.5f;
    d.augment.pad = 1;
    d.augment.flip = 1;
    ckca_update(a, data, &d, NULL);
    memset(&sgd, 0, sizeof sgd);
    sgd.lr = 0.1f;
    sgd.clip_norm = 0.5f;
    ckca_shuffle(d.seed, 0, COUNT, order);
    for (first = 0; first < COUNT; first += 16) {
        const int n = COUNT - first < 16 ? COUNT - first : 16;
        ckca_get_batch(b, data, order + first, n, &d.augment, d.seed, 0, x, labels);
        ckca_forward(b, x, n, 1);
        ckca_node_read(b, b->logits, z);
        ckca__op_cross_entropy(ctx, n, CLASSES, z, labels, 0.1f, 1, dz, loss, hit);
        ckca_zero_gradients(b);
        ckca_backward(b, dz, NULL);
        CHECK(ckca_sgd(b, &sgd) == CKCA_OK, "%s", ckca_error(ctx));
    }
    wa = weights(a);
    wb = weights(b);
    apart = distance(wa, wb, a->all);
    CHECK(apart == 0, "an epoch by hand is %g away from ckca_update's", apart);
    free(wa);
    free(wb);
    ckca_model_free(a);
    ckca_model_free(b);
}

/* ---- CKCA's own: class means, growing weights, pictures without labels ---- */

/* The features of all pictures added up per class (CLASSES x m->features), by m in evaluation; count: of each class. */
static double *class_sums(ckca_model *m, const ckca_data *data, int64_t *count) {
    double *sums = (double *)calloc((size_t)(CLASSES * m->features), sizeof *sums);
    float x[SIZE * SIZE * 3], f[64];
    int i, j, label;
    memset(count, 0, CLASSES * sizeof *count);
    for (i = 0; i < data->count; i++) {
        ckca_get_batch(m, data, &i, 1, NULL, 0, 0, x, &label);
        ckca_forward(m, x, 1, 0);
        ckca_node_read(m, m->pooled, f);
        for (j = 0; j < m->features; j++) sums[label * m->features + j] += f[j];
        count[label]++;
    }
    return sums;
}

/* How far the model's class means are from before's (NULL: none) and data's, by the model as it is. */
static double means_apart(ckca_model *m, const ckca__centroids *before, const ckca_data *data) {
    int64_t count[CLASSES];
    double *sums = class_sums(m, data, count), worst = m->centroids.count ? 0 : INFINITY;
    int i, j;
    for (i = 0; i < CLASSES && m->centroids.count; i++) {
        const int64_t was = before ? before->count[i] : 0;
        if (m->centroids.count[i] != was + count[i]) worst = INFINITY;
        for (j = 0; j < m->features; j++) {
            const int at = i * m->features + j;
            const double mean = (sums[at] + (was ? (double)was * before->mean[at] : 0)) / (double)(was + count[i]);
            if (fabs(mean - m->centroids.mean[at]) > worst) worst = fabs(mean - m->centroids.mean[at]);
        }
    }
    free(sums);
    return worst;
}

static void test_centroids(ckca_context *ctx, ckca_model *start, const ckca_data *first, const ckca_data *data) {
    ckca_model *m = copy_of(start), *foreign = copy_of(start), *scratch = copy_of(start), *measured = copy_of(start);
    ckca_update_desc d = quick(CKCA_METHOD_CKCA);
    ckca_report report;
    ckca_model_info info;
    ckca_model large;
    double apart = means_apart(start, NULL, first), *sums;
    int i;
    CHECK(apart < 1e-5, "after the first update the class means are %g off", apart);
    CHECK(ckca_update(m, data, &d, &report) == CKCA_OK && report.feat > 0, "%s", ckca_error(ctx));
    apart = means_apart(m, &start->centroids, data);
    CHECK(apart < 1e-5, "after the second they are %g off", apart);
    ckca_model_info_get(m, &info);
    CHECK(info.pictures == 2 * COUNT, "%d pictures after two chunks of %d", (int)info.pictures, COUNT);
    d = quick(CKCA_METHOD_SCRATCH);
    CHECK(ckca_update(scratch, data, &d, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    apart = means_apart(scratch, NULL, data);
    CHECK(apart < 1e-5 && scratch->pictures == COUNT, "from scratch, the means are %g off, of %d pictures", apart,
          (int)scratch->pictures);
    d = quick(CKCA_METHOD_WARM);
    ckca_model_free(scratch);
    scratch = copy_of(start);
    CHECK(ckca_update(scratch, data, &d, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    apart = means_apart(scratch, &start->centroids, data);
    CHECK(apart < 1e-5, "every method moves them; after WARM they are %g off", apart);

    /* a checkpoint without means: the teacher's of the new pictures serve this one update, and are not kept */
    ckca__release(ctx, foreign->centroids.count);
    foreign->centroids.count = NULL;
    foreign->pictures = 0;
    sums = class_sums(start, data, measured->centroids.count);
    for (i = 0; i < CLASSES * start->features; i++)
        measured->centroids.mean[i] = (float)(sums[i] / (double)measured->centroids.count[i / start->features]);
    free(sums);
    d = quick(CKCA_METHOD_CKCA);
    CHECK(ckca_update(foreign, data, &d, &report) == CKCA_OK && ckca_update(measured, data, &d, NULL) == CKCA_OK, "%s",
          ckca_error(ctx));
    {
        float *a = weights(foreign), *b = weights(measured), *c = weights(m), *w0 = weights(start);
        apart = distance(a, b, m->all) / distance(a, w0, m->all);
        CHECK(apart < 1e-4, "with measured means it ends %g away from an update that had them", apart);
        CHECK(distance(a, c, m->all) / distance(a, w0, m->all) > 1e-3, "the means do not matter");
        free(a), free(b), free(c), free(w0);
    }
    apart = means_apart(foreign, NULL, data);
    CHECK(apart < 1e-5 && foreign->pictures == 2 * COUNT && fabs(report.w_kd - 0.3 / 1.3) < 1e-6,
          "then its means are %g off, of %d pictures, AdaKD weighed %g", apart, (int)foreign->pictures, report.w_kd);

    /* too many values */
    memcpy(&large, start, sizeof large);
    large.features = CKCA_CENTROIDS_MAX / CLASSES;
    CHECK(ckca__fits_featreg(&large, &large, CKCA_FEATREG_CENTROID), "%d means of %d", CLASSES, large.features);
    large.features++;
    memset(&d, 0, sizeof d);
    CHECK(ckca_update_defaults(&large, data, &d) == CKCA_OK && d.w_feat == CKCA_OFF, "FeatReg is on: %g", (double)d.w_feat);
    {
        ckca__update u;
        memset(&u, 0, sizeof u);
        u.ctx = ctx, u.m = &large, u.d.w_feat = 1;
        CHECK(ckca__check_teacher(&u, &large) == CKCA_ESHAPE && strstr(ckca_error(ctx), "4 classes x 2097153 features"),
              "%s", ckca_error(ctx));
    }
    ckca_model_free(m);
    ckca_model_free(foreign);
    ckca_model_free(scratch);
    ckca_model_free(measured);
}

static void test_growth(ckca_context *ctx, ckca_model *start, const ckca_data *data) {
    static const struct {
        double old, now, steps, w, ce, kd;
    } grown[] = {{500, 500, 320, 1, 1, 0.3},  {4500, 500, 320, 1, 1, 2.7}, {4500, 500, 160, 1, 2 / 3.7, 5.4 / 3.7},
                 {4000, 125, 80, 1, 1 / 10.6, 9.6 / 10.6}, {4000, 125, 1, 1, 1 / 10.6, 9.6 / 10.6},
                 {1e9, 1, 1e9, 2, 4 / 6e8, 4}, {0, 50, 1, 1, 1, 0}, {500, 500, 1, 2, 1 / 1.6, 0.6 / 1.6}};
    ckca_model *m = copy_of(start), *other = copy_of(start);
    ckca_update_desc d = quick(CKCA_METHOD_CKCA);
    ckca_report report;
    size_t i;
    d.w_feat = 0.5f;
    for (i = 0; i < sizeof grown / sizeof *grown; i++) {
        ckca__factors f;
        d.adakd = CKCA_ADAKD_GROWTH;
        d.w_kd = (float)grown[i].w;
        f = ckca__growth(&d, grown[i].old, grown[i].now, grown[i].steps);
        CHECK(fabs((double)f.kd - grown[i].kd) < 1e-6 && fabs((double)f.ce - grown[i].ce) < 1e-6 &&
                  fabs((double)f.feat - 0.5 * grown[i].ce) < 1e-6,
              "%g old pictures, %g new: AdaKD weighs %g, cross-entropy %g, FeatReg %g", grown[i].old, grown[i].now,
              (double)f.kd, (double)f.ce, (double)f.feat);
        d.adakd = CKCA_ADAKD_CONSTANT;
        f = ckca__growth(&d, grown[i].old, grown[i].now, grown[i].steps);
        CHECK(f.kd == d.w_kd && f.ce == 1, "CONSTANT weighs %g", (double)f.kd);
    }
    /* chunk by chunk, as the checkpoint counts its pictures; and by the caller's word */
    d = quick(CKCA_METHOD_CKCA);
    for (i = 1; i < 3; i++) {
        CHECK(ckca_update(m, data, &d, &report) == CKCA_OK && fabs(report.w_kd - 0.3 * (double)i / (1 + 0.3 * (double)i)) < 1e-6,
              "update %d: AdaKD weighs %g", report.updates, report.w_kd);
        CHECK(m->pictures == COUNT * (int64_t)(i + 1), "%d pictures", (int)m->pictures);
    }
    d.teacher_pictures = 6 * COUNT;
    CHECK(ckca_update(m, data, &d, &report) == CKCA_OK && fabs(report.w_kd - 1.8 / 2.8) < 1e-6 && m->pictures == 4 * COUNT,
          "six chunks: AdaKD weighs %g; then %d pictures", report.w_kd, (int)m->pictures);
    other->pictures = 0; /* a checkpoint of another program: the caller's word is its count */
    CHECK(ckca_update(other, data, &d, &report) == CKCA_OK && other->pictures == 7 * COUNT, "%d pictures",
          (int)other->pictures);
    other->pictures = CKCA__COUNT_MAX;
    CHECK(ckca_update(other, data, &d, NULL) == CKCA_OK && other->pictures == CKCA__COUNT_MAX, "the count overflows");
    ckca_model_free(other);
    other = copy_of(start);
    ckca_model_free(m);
    m = copy_of(start);
    d = quick(CKCA_METHOD_CKCA);
    d.epochs = 18; /* 108 steps: 1 + 0.3 fits */
    CHECK(ckca_update(m, data, &d, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    d.adakd = CKCA_ADAKD_CONSTANT;
    d.w_kd = 0.3f;
    CHECK(ckca_update(other, data, &d, &report) == CKCA_OK && same_weights(m, other), "GROWTH is a constant in an update");
    ckca_model_free(m);
    ckca_model_free(other);
}

/* CKCA's step with all its terms, by hand: cross-entropy on the labelled half, AdaKD on both, CENTROID on the labelled
   half, one class without a mean, class means and the order of the unlabelled pictures by plain loops. */
static void test_ckca_by_hand(ckca_context *ctx, ckca_model *start, const ckca_data *data, const ckca_data *unlabelled) {
    enum { B = 16, PIXELS = SIZE * SIZE * 3 };
    ckca_model *a = copy_of(start), *b = copy_of(start);
    ckca_update_desc d = quick(CKCA_METHOD_CKCA);
    ckca_report report;
    ckca_sgd_desc sgd;
    ckca_bytes bytes;
    static float x[2 * B * PIXELS], z[2 * B * CLASSES], zo[2 * B * CLASSES], dz[2 * B * CLASSES], f[2 * B * 16],
        df[2 * B * 16], loss[B];
    float *wa, *wb, *w0 = weights(start);
    int order[COUNT], turn[400], place[B], labels[B], hit[B], epoch, first, at, n, i, j;
    double apart, feat = 0, kd = 0;
    memset(a->centroids.mean + 3 * 16, 0, 16 * sizeof(float)); /* no pictures of class 3 so far */
    a->centroids.count[3] = 0;
    d.epochs = 2;
    d.warmup_epochs = CKCA_OFF;
    d.schedule = CKCA_SCHEDULE_CONSTANT;
    d.augment.pad = 1;
    d.augment.flip = 1;
    d.teacher_pictures = 150;
    d.w_feat = 0.7f;
    d.unlabelled = unlabelled;
    CHECK(ckca_update(a, data, &d, &report) == CKCA_OK, "%s", ckca_error(ctx));
    ckca_model_bytes(b, 2 * B, 1, &bytes);
    CHECK(a->activation_bytes == bytes.activations, "activations: %zu bytes, ckca_model_bytes says %zu",
          a->activation_bytes, bytes.activations);
    memset(&sgd, 0, sizeof sgd);
    sgd.lr = 0.1f;
    for (at = 0; at < 2 * COUNT; at += n) {
        epoch = at / COUNT;
        first = at % COUNT;
        n = COUNT - first < B ? COUNT - first : B;
        if (first == 0) {
            ckca_shuffle(d.seed, epoch, COUNT, order);
            kd = feat = 0; /* of the last epoch */
        }
        for (i = 0; i < n; i++) {
            ckca_shuffle(~d.seed, (at + i) / unlabelled->count, unlabelled->count, turn);
            place[i] = turn[(at + i) % unlabelled->count];
        }
        ckca_get_batch(b, data, order + first, n, &d.augment, d.seed, epoch, x, labels);
        for (i = 0; i < n; i++) place[i] = unlabelled->index[place[i]];
        ckca__op_batch(ctx, n, SIZE, SIZE, 3, unlabelled->store->pixels, 0, place, &d.augment, d.seed, &epoch,
                       b->normalization, b->normalization + 3, x + n * PIXELS);
        ckca_forward(start, x, 2 * n, 0);
        ckca_node_read(start, start->logits, zo);
        ckca_forward(b, x, 2 * n, 1);
        ckca_node_read(b, b->logits, z);
        ckca_node_read(b, b->pooled, f);
        memset(dz, 0, sizeof dz);
        memset(df, 0, sizeof df);
        ckca__op_cross_entropy(ctx, n, CLASSES, z, labels, 0, 1 / 1.5f, dz, loss, hit);
        for (j = 0; j < 2; j++) {
            ckca__op_adakd(ctx, n, CLASSES, z + j * n * CLASSES, zo + j * n * CLASSES, NULL, NULL, 2, 0.5f / 1.5f,
                           dz + j * n * CLASSES, loss);
            for (i = 0; i < n; i++) kd += loss[i] / COUNT;
        }
        for (i = 0; i < n; i++) {
            const float *mu = start->centroids.mean + labels[i] * 16, *v = f + i * 16;
            double aa = 0, bb = 0, ab = 0;
            if (labels[i] == 3) continue;
            for (j = 0; j < 16; j++) aa += v[j] * v[j], bb += mu[j] * mu[j], ab += v[j] * mu[j];
            feat += (1 - ab / sqrt(aa * bb)) / COUNT;
            for (j = 0; j < 16; j++)
                df[i * 16 + j] = (float)(-0.7 / 1.5 / n * (mu[j] / sqrt(bb) - ab / sqrt(aa * bb) * v[j] / sqrt(aa)) / sqrt(aa));
        }
        ckca_zero_gradients(b);
        ckca_backward(b, dz, df);
        CHECK(ckca_sgd(b, &sgd) == CKCA_OK, "%s", ckca_error(ctx));
    }
    wa = weights(a);
    wb = weights(b);
    apart = distance(wa, wb, a->all) / distance(wa, w0, a->all);
    CHECK(apart < 1e-4, "two epochs of CKCA by hand are %g away from ckca_update's", apart);
    CHECK(fabs(report.feat - feat) < 1e-5 && fabs(report.kd - kd) < 1e-5 && fabs(report.w_kd - 0.5 / 1.5) < 1e-7,
          "FeatReg %g, by hand %g; AdaKD %g, by hand %g; weight %g", report.feat, feat, report.kd, kd, report.w_kd);
    free(wa), free(wb), free(w0);
    ckca_model_free(a);
    ckca_model_free(b);
}

/* The same pictures as another set, whose labels fit no model. */
static ckca_data *without_labels(ckca_context *ctx, const ckca_data *data, int count) {
    static int labels[400];
    ckca_array array;
    ckca_data *all = NULL;
    int i;
    for (i = 0; i < count; i++) labels[i] = 1000 + i;
    memset(&array, 0, sizeof array);
    array.pixels = data->store->pixels;
    array.labels = labels;
    array.count = count;
    array.height = array.width = SIZE;
    array.channels = 3;
    array.classes = 2000;
    ckca_open_array(ctx, &all, &array, NULL);
    return all;
}

static void test_unlabelled(ckca_context *ctx, ckca_model *start, const ckca_data *data, const ckca_data *more) {
    ckca_data *plain = NULL, *few = without_labels(ctx, more, 37), *wide = NULL, *far;
    ckca_model *m = copy_of(start), *other = copy_of(start), *fresh = small_net(ctx, "resnet8", 1);
    ckca_context *elsewhere = NULL;
    ckca_update_desc d = quick(CKCA_METHOD_CKCA);
    ckca_report report;
    ckca_array array;
    int index[37], i, form;
    unsigned char pixels[48] = {0};
    test_ckca_by_hand(ctx, start, data, few);
    for (i = 0; i < 37; i++) index[i] = i;
    ckca_subset(&plain, more, index, 37);
    d.unlabelled = plain;
    CHECK(ckca_update(m, data, &d, &report) == CKCA_OK && report.kd > 0, "%s", ckca_error(ctx));
    d.unlabelled = few;
    CHECK(ckca_update(other, data, &d, &report) == CKCA_OK && same_weights(m, other), "labels are read: %s",
          ckca_error(ctx));
    for (form = 0; form < CKCA_FEATREG_COUNT; form++) { /* and every other form takes them */
        d.featreg = (ckca_featreg)form;
        d.adakd = (ckca_adakd)form;
        d.w_feat = 1;
        CHECK(ckca_update(other, data, &d, &report) == CKCA_OK && report.kd > 0 && report.feat > 0, "form %d: %s", form,
              ckca_error(ctx));
    }
    ckca_model_free(other); /* without AdaKD they are left out */
    other = copy_of(start);
    ckca_model_free(m);
    m = copy_of(start);
    d = quick(CKCA_METHOD_WARM);
    CHECK(ckca_update(m, data, &d, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    d.unlabelled = few;
    CHECK(ckca_update(other, data, &d, NULL) == CKCA_OK && same_weights(m, other), "WARM reads them");
    CHECK(ckca_update(fresh, data, &d, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    /* sets that do not fit */
    memset(&array, 0, sizeof array);
    array.pixels = pixels, array.labels = index, array.count = 1, array.height = array.width = 4, array.channels = 3;
    array.classes = 1;
    ckca_open_array(ctx, &wide, &array, NULL);
    d = quick(CKCA_METHOD_CKCA);
    d.unlabelled = wide;
    CHECK(ckca_update(m, data, &d, NULL) == CKCA_ESHAPE &&
              strstr(ckca_error(ctx), "unlabelled: the pictures are 4 x 4 x 3, the labelled ones 8 x 8 x 3"),
          "%s", ckca_error(ctx));
    ckca_init(&elsewhere, NULL);
    far = pictures(elsewhere, 5, 1);
    d.unlabelled = far;
    CHECK(ckca_update(m, data, &d, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "another context"), "%s",
          ckca_error(ctx));
    CHECK(same_weights(m, other), "the model is not as it was");
    ckca_data_free(far);
    ckca_context_free(elsewhere);
    ckca_data_free(plain);
    ckca_data_free(few);
    ckca_data_free(wide);
    ckca_model_free(m);
    ckca_model_free(other);
    ckca_model_free(fresh);
}

/* A copy gives the same logits, and goes its own way. */
static void test_copy(ckca_context *ctx, ckca_model *start, const ckca_data *data) {
    ckca_model *copy;
    ckca_update_desc desc;
    ckca_score before, same, after;
    float *w;
    ckca_tensor_info tensor;
    CHECK(ckca_model_copy(&copy, start) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(ckca_evaluate(start, data, &before, NULL) == CKCA_OK && ckca_evaluate(copy, data, &same, NULL) == CKCA_OK &&
              before.loss == same.loss && before.top1 == same.top1, "a copy scores %g, its model %g", same.loss, before.loss);
    memset(&desc, 0, sizeof desc);
    desc.epochs = 1;
    desc.holdout = CKCA_OFF;
    CHECK(ckca_update(copy, data, &desc, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(ckca_evaluate(start, data, &after, NULL) == CKCA_OK && before.loss == after.loss,
          "training a copy moved its model from %g to %g", before.loss, after.loss);
    CHECK(ckca_evaluate(copy, data, &after, NULL) == CKCA_OK && after.loss != before.loss, "the copy learnt nothing");
    ckca_tensor_info_get(copy, 0, &tensor);
    w = (float *)malloc((size_t)tensor.count * sizeof *w);
    if (!w) exit(2);
    ckca_model_free(copy);
    CHECK(ckca_tensor_read(start, 0, CKCA_SLOT_VALUE, w) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(ckca_model_copy(NULL, start) == CKCA_EINVAL && ckca_model_copy(&copy, NULL) == CKCA_EINVAL, "no error");
    free(w);
}

static void test_update_errors(ckca_context *ctx, ckca_model *start, const ckca_data *data) {
    ckca_model *m = copy_of(start), *other;
    ckca_model_desc desc;
    ckca_update_desc d = quick(CKCA_METHOD_CKCA);
    ckca_report report;
    int stop = 7;
    d.lr = 1e20f;
    CHECK(ckca_update(m, data, &d, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "lr is 1e+20, must be 0 to 1000000"), "%s", ckca_error(ctx));
    d.lr = 9e5f;
    d.momentum = 0.99f;
    d.epochs = 30;
    CHECK(ckca_update(m, data, &d, NULL) == CKCA_ENAN && strstr(ckca_error(ctx), "update 2"), "%s", ckca_error(ctx));
    CHECK(same_weights(m, start) && m->updates == 1, "after a NaN the model is as it was");
    d = quick(CKCA_METHOD_CKCA);
    d.progress = never;
    d.user = &stop;
    CHECK(ckca_update(m, data, &d, &report) == CKCA_ESTOP && report.steps == 7 && m->updates == 1, "stopped after %d steps: %s",
          report.steps, ckca_error(ctx));
    CHECK(ckca_update(NULL, data, &d, NULL) == CKCA_EINVAL, "no model");
    CHECK(ckca_update(m, NULL, &d, NULL) == CKCA_EINVAL, "no data");
    d.epochs = -1;
    CHECK(ckca_update(m, data, &d, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "epochs is -1"), "%s", ckca_error(ctx));
    d = quick((ckca_method)9);
    CHECK(ckca_update(m, data, &d, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "method is 9"), "%s", ckca_error(ctx));
    d = quick(CKCA_METHOD_CKCA);
    d.augment.crop_min = 2;
    CHECK(ckca_update(m, data, &d, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "augment.crop_min is 2"), "%s", ckca_error(ctx));
    memset(&desc, 0, sizeof desc);
    desc.classes = CLASSES;
    ckca_resnet(ctx, &other, "resnet8", &desc);
    CHECK(ckca_update(other, data, NULL, NULL) == CKCA_ESHAPE && strstr(ckca_error(ctx), "8 x 8 x 3, the model takes 32"), "%s",
          ckca_error(ctx));
    ckca_model_free(other);
    desc.height = desc.width = SIZE;
    desc.classes = 5;
    ckca_resnet(ctx, &other, "resnet8", &desc);
    CHECK(ckca_update(other, data, NULL, NULL) == CKCA_ESHAPE && strstr(ckca_error(ctx), "4 classes, the model has 5"), "%s",
          ckca_error(ctx));
    CHECK(ckca_predict(other, data->store->pixels, 1, NULL) == CKCA_EINVAL, "predict without a result");
    ckca_model_free(other);
    {
        static const char *const names[CLASSES] = {"north-west", "north-east", "cat", "dog"};
        desc.classes = CLASSES;
        desc.class_names = names;
        ckca_resnet(ctx, &other, "resnet8", &desc);
        CHECK(ckca_update(other, data, NULL, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "\"cat\" in the model"), "%s",
              ckca_error(ctx));
        ckca_model_free(other);
    }
    ckca_model_free(m);
}

/* ---- contracts: what a failed update leaves, a teacher that is only read, the list of settings ---- */

typedef struct { /* all that a caller can see of a model, and what its next update depends on */
    ckca_model_info info;
    float *values, *gradients, *momentum, normalization[6];
    ckca__centroids centroids; /* the pointers: a failed update puts nothing in their place */
    int64_t batches_tracked, count, pictures;
    int names;
} state_of;

static float *arena(const ckca_model *m, const float *at, size_t n) {
    float *all = at ? (float *)malloc(n * sizeof(float)) : NULL;
    if (all) ckca__device_download(m->ctx, all, at, n * sizeof(float));
    return all;
}

static state_of state(ckca_model *m) {
    state_of s;
    memset(&s, 0, sizeof s);
    ckca_model_info_get(m, &s.info);
    s.values = arena(m, m->values, m->all);
    s.gradients = arena(m, m->gradients, m->trainable);
    s.momentum = arena(m, m->momentum, m->trainable);
    memcpy(s.normalization, m->normalization, sizeof s.normalization);
    s.batches_tracked = m->batches_tracked;
    s.centroids = m->centroids;
    s.count = m->centroids.count ? m->centroids.count[0] : 0;
    s.pictures = m->pictures;
    s.names = m->class_names != NULL;
    return s;
}

static void as_it_was(ckca_model *m, state_of *was, const char *after) {
    state_of now = state(m);
    CHECK(!memcmp(now.values, was->values, m->all * sizeof(float)), "%s: other weights or running statistics", after);
    CHECK(!now.gradients == !was->gradients &&
              (!now.gradients || !memcmp(now.gradients, was->gradients, m->trainable * sizeof(float))),
          "%s: other gradients", after);
    CHECK(!now.momentum == !was->momentum &&
              (!now.momentum || !memcmp(now.momentum, was->momentum, m->trainable * sizeof(float))),
          "%s: other momentum", after);
    CHECK(now.info.updates == was->info.updates && now.batches_tracked == was->batches_tracked && now.names == was->names &&
              !now.info.mean == !was->info.mean &&
              (!now.info.mean || !memcmp(now.normalization, was->normalization, sizeof now.normalization)),
          "%s: other step, names or normalisation", after);
    CHECK(now.centroids.count == was->centroids.count && now.count == was->count && now.pictures == was->pictures,
          "%s: other class means or number of pictures", after);
    free(now.values), free(now.gradients), free(now.momentum);
}

static void forget(state_of *s) { free(s->values), free(s->gradients), free(s->momentum); }

static void test_failed_update(ckca_context *ctx, ckca_model *start, const ckca_data *data) {
    ckca_model *fresh = small_net(ctx, "resnet8", 3), *m = copy_of(start), *other = copy_of(start);
    ckca_update_desc good = quick(CKCA_METHOD_CKCA), diverging = good, unwritable = good;
    state_of was;
    CHECK(ckca_update(m, data, &good, NULL) == CKCA_OK && m->momentum, "%s", ckca_error(ctx));
    diverging.lr = 9e5f;
    diverging.momentum = 0.99f;
    diverging.epochs = 30;
    was = state(m);
    CHECK(ckca_update(m, data, &diverging, NULL) == CKCA_ENAN, "%s", ckca_error(ctx));
    as_it_was(m, &was, "a loss that is not finite");
    unwritable.state = DIR "/no/such/folder/state";
    unwritable.state_seconds = 1e-9f;
    CHECK(ckca_update(m, data, &unwritable, NULL) == CKCA_EIO, "%s", ckca_error(ctx));
    as_it_was(m, &was, "a state that cannot be written");
    forget(&was);
    was = state(fresh); /* had no names, normalisation, gradients and momentum, and has none after */
    CHECK(ckca_update(fresh, data, &diverging, NULL) == CKCA_ENAN, "%s", ckca_error(ctx));
    as_it_was(fresh, &was, "a fresh model's failure");
    forget(&was);
    CHECK(ckca_update(m, data, &good, NULL) == CKCA_OK && ckca_update(other, data, &good, NULL) == CKCA_OK &&
              ckca_update(other, data, &good, NULL) == CKCA_OK && same_weights(m, other),
          "after failures it trains to other bits: %s", ckca_error(ctx));
    ckca_model_free(fresh);
    ckca_model_free(m);
    ckca_model_free(other);
}

/* Every byte of a teacher's bookkeeping, before and after; one student trains while another does, on the same teacher. */
typedef struct {
    ckca_model *student;
    const ckca_model *teacher;
    const ckca_data *data;
    int depth;
} shared_teacher;

static int train_another(const ckca_progress *p, void *user) {
    shared_teacher *s = (shared_teacher *)user;
    ckca_update_desc d = quick(CKCA_METHOD_CKCA);
    if (p->epoch != 1 || p->batch != 2 || s->depth++) return 0;
    d.batch = 30;
    d.w_feat = 1;
    d.teacher = s->teacher;
    return ckca_update(s->student, s->data, &d, NULL);
}

static void test_teacher_is_read(ckca_context *ctx, ckca_model *start, const ckca_data *data) {
    ckca_model *teacher = copy_of(start), *m[2][2], before;
    ckca_update_desc d = quick(CKCA_METHOD_CKCA);
    ckca__node *nodes = (ckca__node *)malloc((size_t)teacher->nodes * sizeof *nodes);
    shared_teacher s;
    float *w = weights(teacher);
    int i;
    memcpy(&before, teacher, sizeof before);
    memcpy(nodes, teacher->node, (size_t)teacher->nodes * sizeof *nodes);
    for (i = 0; i < 4; i++) m[i / 2][i % 2] = copy_of(start);
    d.teacher = teacher;
    d.w_feat = 1;
    CHECK(ckca_update(m[0][0], data, &d, NULL) == CKCA_OK, "%s", ckca_error(ctx)); /* one after the other */
    d.batch = 30;
    CHECK(ckca_update(m[0][1], data, &d, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    s.student = m[1][1];
    s.teacher = teacher;
    s.data = data;
    s.depth = 0;
    d.batch = 16;
    d.progress = train_another;
    d.user = &s;
    CHECK(ckca_update(m[1][0], data, &d, NULL) == CKCA_OK && s.depth, "%s", ckca_error(ctx)); /* one within the other */
    CHECK(same_weights(m[0][0], m[1][0]) && same_weights(m[0][1], m[1][1]), "students of one teacher disturb each other");
    CHECK(!memcmp(&before, teacher, sizeof before) && !memcmp(nodes, teacher->node, (size_t)teacher->nodes * sizeof *nodes),
          "an update writes to its teacher");
    { /* what of a teacher is wrong is told */
        ckca_context *elsewhere = NULL;
        ckca_model *far, *raw = NULL;
        ckca_model_desc desc;
        ckca_init(&elsewhere, NULL);
        far = small_net(elsewhere, "resnet8", 1);
        d.progress = NULL;
        d.teacher = far;
        CHECK(ckca_update(m[0][0], data, &d, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "another context"), "%s",
              ckca_error(ctx));
        memset(&desc, 0, sizeof desc);
        desc.height = desc.width = SIZE;
        desc.classes = CLASSES;
        ckca_model_create(ctx, &raw, &desc);
        d.teacher = raw;
        d.featreg = CKCA_FEATREG_COSINE;
        CHECK(ckca_update(m[0][0], data, &d, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "teacher: it is not finished"),
              "%s", ckca_error(ctx));
        ckca_model_free(raw);
        ckca_model_free(far);
        ckca_context_free(elsewhere);
    }
    {
        float *now = weights(teacher);
        CHECK(!memcmp(w, now, teacher->all * sizeof(float)), "the teacher's weights changed");
        free(now);
    }
    for (i = 0; i < 4; i++) ckca_model_free(m[i / 2][i % 2]);
    ckca_model_free(teacher);
    free(nodes);
    free(w);
}

/* The fields of a struct as ckca.h declares them: each has to be in the list of settings, with prefix before its name, or
   among the others. Returns how many it found. */
static int declared(const char *header, const char *name, const char *prefix, const char *others) {
    char start[64], field[64];
    const char *at, *end;
    int count = 0, i;
    snprintf(start, sizeof start, "typedef struct %s {", name);
    at = strstr(header, start);
    end = at ? strchr(at, '}') : NULL;
    CHECK(at && end, "ckca.h has no struct %s", name);
    for (at = at ? at + strlen(start) : NULL; at && at < end;) {
        size_t length;
        if (!strncmp(at, "/*", 2)) {
            at = strstr(at, "*/") + 2;
            continue;
        }
        if (*at == '(' && at[1] == '*') { /* a pointer to a function: its name, and no more of it */
            length = strcspn(at + 2, ")");
            snprintf(field, sizeof field, " %.*s ", (int)length, at + 2);
            CHECK(strstr(others, field) != NULL, "%s: what is%s?", name, field);
            at = strchr(at, ';') + 1;
            continue;
        }
        length = strspn(at, "abcdefghijklmnopqrstuvwxyz_0123456789");
        if (!length) {
            at++;
            continue;
        }
        if (at[length] == ',' || at[length] == ';') { /* the last word of a declarator */
            snprintf(field, sizeof field, " %.*s ", (int)length, at);
            if (!strstr(others, field)) {
                snprintf(field, sizeof field, "%s%.*s", prefix, (int)length, at);
                for (i = 0; i < CKCA__SETTINGS && strcmp(ckca__settings[i].name, field); i++) {
                }
                CHECK(i < CKCA__SETTINGS, "%s.%s is not in ckca__settings", name, field);
                count++;
            }
        }
        at += length;
    }
    return count;
}

/* Before test_enter, at the repository's root. */
static void test_settings_complete(void) {
    static char header[2 << 20];
    FILE *f = fopen("ckca.h", "rb");
    size_t size = f ? fread(header, 1, sizeof header - 1, f) : 0;
    int fields = declared(header, "ckca_update_desc", "", " teacher unlabelled memory augment seed holdout_data state progress user ");
    if (f) fclose(f);
    fields += declared(header, "ckca_augment", "augment.", " ");
    CHECK(size && fields == CKCA__SETTINGS, "%d fields are declared, %d are in the list", fields, (int)CKCA__SETTINGS);
}

static uint64_t fingerprint(ckca_model *m, const ckca_data *data, const ckca_update_desc *d) {
    ckca__update u;
    memset(&u, 0, sizeof u);
    u.ctx = m->ctx;
    u.m = u.old = m;
    u.data = data;
    u.d = *d;
    ckca__fingerprint(&u);
    return u.fingerprint;
}

static void test_settings(ckca_context *ctx, ckca_model *start, const ckca_data *data) {
    ckca_model *fresh = small_net(ctx, "resnet8", 1), *m[2];
    ckca_update_desc d, again, base;
    int i;
    memset(&base, 0, sizeof base);
    CHECK(ckca_update_defaults(start, data, &base) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(base.method == CKCA_METHOD_CKCA && base.w_kd == 1 && base.w_feat == 1 && base.temperature == 2 &&
              base.adakd == CKCA_ADAKD_GROWTH && base.featreg == CKCA_FEATREG_CENTROID &&
              base.teacher_pictures == COUNT &&
              base.shrink == 0.4f && base.perturb == 0.1f && base.epochs == 40 && base.batch == 64 && base.lr == 0.1f &&
              base.warmup_epochs == 1 && base.step_epochs == 40 / 3.0f && base.step_factor == 0.1f &&
              base.momentum == 0.9f && base.weight_decay == 5e-4f && base.clip_norm == 0 && base.state_seconds == 30,
          "defaults other than ckca.h says");
    again = base;
    CHECK(ckca_update_defaults(start, data, &again) == CKCA_OK && !memcmp(&again, &base, sizeof base),
          "defaults of defaults are others");
    memset(&d, 0, sizeof d);
    d.adakd = CKCA_ADAKD_CLASS;
    d.augment.resized_crop = 1;
    d.momentum = d.holdout = CKCA_OFF;
    d.batch = 1000;
    CHECK(ckca_update_defaults(start, data, &d) == CKCA_OK && d.w_kd == 2 && d.augment.crop_min == 0.25f &&
              d.momentum == CKCA_OFF && d.batch == COUNT,
          "w_kd %g, crop_min %g, momentum %g, batch %d", (double)d.w_kd, (double)d.augment.crop_min, (double)d.momentum,
          d.batch);
    memset(&d, 0, sizeof d);
    CHECK(ckca_update_defaults(fresh, data, &d) == CKCA_OK && d.method == CKCA_METHOD_WARM && d.w_kd == CKCA_OFF &&
              d.w_feat == CKCA_OFF,
          "a fresh model's update has terms");
    d = quick(CKCA_METHOD_LWF);
    CHECK(ckca_update_defaults(start, data, &d) == CKCA_OK && d.w_kd == 1 && d.w_feat == CKCA_OFF, "LwF's terms");
    d = quick(CKCA_METHOD_CKCA); /* the update of the defaults is the update */
    d.weight_decay = CKCA_OFF;
    for (i = 0; i < 2; i++) {
        m[i] = copy_of(start);
        if (i) ckca_update_defaults(m[i], data, &d);
        CHECK(ckca_update(m[i], data, &d, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    }
    CHECK(same_weights(m[0], m[1]), "defaults filled in train to other bits");
    for (i = 0; i < CKCA__SETTINGS; i++) {
        const ckca__setting *s = &ckca__settings[i];
        d = base;
        ckca__setting_set(&d, s, (float)ckca__setting_get(&d, s) + 1);
        CHECK((fingerprint(start, data, &d) != fingerprint(start, data, &base)) == !!strcmp(s->name, "state_seconds"),
              "%s: the fingerprint does not tell, or tells what does not matter", s->name);
    }
    ckca_model_free(m[0]);
    ckca_model_free(m[1]);
    ckca_model_free(fresh);
}

/* ---- bitwise: threads, resuming, files ---- */

static void test_threads(void) {
    ckca_model *m[3];
    ckca_context *ctx[3];
    int i;
    for (i = 0; i < 3; i++) {
        ckca_desc desc;
        ckca_update_desc d = quick(CKCA_METHOD_CKCA);
        ckca_data *data;
        memset(&desc, 0, sizeof desc);
        desc.threads = i + 1;
        ckca_init(&ctx[i], &desc);
        data = pictures(ctx[i], COUNT, 1);
        m[i] = small_net(ctx[i], "resnet20", 1);
        d.w_feat = 1;
        d.augment.pad = 1;
        d.unlabelled = data;
        ckca_update(m[i], data, &d, NULL);
        ckca_update(m[i], data, &d, NULL);
        ckca_data_free(data);
    }
    CHECK(m[0]->updates == 2 && same_weights(m[0], m[1]), "1 and 2 threads give the same bits");
    CHECK(!memcmp(m[0]->centroids.count, m[2]->centroids.count, ckca__centroid_bytes(m[0])), "the class means differ");
    CHECK(same_weights(m[0], m[2]), "1 and 3 threads give the same bits");
    for (i = 0; i < 3; i++) {
        ckca_model_free(m[i]);
        ckca_context_free(ctx[i]);
    }
}

static char *slurp(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    char *bytes = (char *)malloc(1 << 22);
    *size = f ? fread(bytes, 1, 1 << 22, f) : 0;
    if (f) fclose(f);
    return bytes;
}

static void spill(const char *path, const char *bytes, size_t size) {
    FILE *f = fopen(path, "wb");
    if (f) {
        fwrite(bytes, 1, size, f);
        fclose(f);
    }
}

/* Stopped after every number of SGD steps, also on the edge of an epoch, and resumed in a new model: the same bits. */
static void test_resume(ckca_context *ctx, ckca_model *start, const ckca_data *data, const ckca_data *unlabelled) {
    ckca_model *whole = copy_of(start), *m;
    ckca_update_desc d = quick(CKCA_METHOD_CKCA);
    ckca_report expected, report;
    int after, stop;
    d.w_feat = 1;
    d.augment.flip = 1;
    d.unlabelled = unlabelled;
    CHECK(ckca_update(whole, data, &d, &expected) == CKCA_OK, "%s", ckca_error(ctx));
    d.state = DIR "/state.safetensors";
    d.progress = never;
    d.user = &stop;
    remove(d.state);
    for (after = 1; after < 18; after += unlabelled ? 5 : 1) {
        FILE *left;
        m = copy_of(start);
        stop = after;
        CHECK(ckca_update(m, data, &d, NULL) == CKCA_ESTOP, "stop after %d: %s", after, ckca_error(ctx));
        ckca_model_free(m);
        m = copy_of(start);
        stop = 0;
        CHECK(ckca_update(m, data, &d, &report) == CKCA_OK, "resume after %d: %s", after, ckca_error(ctx));
        CHECK(same_weights(m, whole) && m->batches_tracked == whole->batches_tracked && m->updates == 2,
              "resumed after %d steps, the weights differ", after);
        CHECK(!memcmp(m->centroids.count, whole->centroids.count, ckca__centroid_bytes(m)) && m->pictures == 2 * COUNT,
              "resumed after %d steps, the class means differ", after);
        CHECK(report.loss == expected.loss && report.accuracy == expected.accuracy, "resumed after %d: loss %g, uninterrupted %g",
              after, report.loss, expected.loss);
        left = fopen(d.state, "rb");
        CHECK(left, "the state stays until the save");
        if (left) fclose(left);
        CHECK(ckca_save(m, DIR "/one.safetensors") == CKCA_OK, "%s", ckca_error(ctx));
        ckca_model_free(m);
        left = fopen(d.state, "rb");
        CHECK(!left, "the state is removed by the save");
        if (left) fclose(left);
    }
    { /* a state of another run is refused, and so is a broken one; the model stays as it is */
        size_t size;
        char *bytes;
        m = copy_of(start);
        stop = 4;
        ckca_update(m, data, &d, NULL);
        ckca_model_free(m);
        m = copy_of(start);
        stop = 0;
        d.lr = 0.05f;
        CHECK(ckca_update(m, data, &d, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "another update (its lr was 0.1, now it is 0.05)"), "%s",
              ckca_error(ctx));
        d.lr = 0;
        d.unlabelled = unlabelled ? NULL : data;
        CHECK(ckca_update(m, data, &d, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "another update (other pictures"),
              "%s", ckca_error(ctx));
        d.unlabelled = unlabelled;
        m->centroids.mean[0] += 1; /* the teacher's class means are others */
        CHECK(ckca_update(m, data, &d, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "another update (other pictures"),
              "%s", ckca_error(ctx));
        m->centroids.mean[0] = start->centroids.mean[0];
        bytes = slurp(d.state, &size);
        CHECK(size > 1000, "the state has %zu bytes", size);
        spill(d.state, bytes, size - 1);
        CHECK(ckca_update(m, data, &d, NULL) == CKCA_EFORMAT, "a truncated state: %s", ckca_error(ctx));
        CHECK(same_weights(m, start) && m->updates == 1, "the model is as it was");
        free(bytes);
        remove(d.state);
        d.state = DIR "/no/such/folder/state";
        d.progress = NULL;
        CHECK(ckca_update(m, data, &d, &report) == CKCA_EIO && report.steps == 0, "told after %d steps: %s",
              report.steps, ckca_error(ctx));
        CHECK(same_weights(m, start), "the model is as it was");
        ckca_model_free(m);
    }
    ckca_model_free(whole);
}

static int there(const char *path) {
    struct stat about;
    return stat(path, &about) == 0;
}

/* Between an update and its save: what a kill there leaves is the result. */
static void test_unsaved(ckca_context *ctx, ckca_model *start, const ckca_data *data, const ckca_data *next) {
    const char *one = DIR "/one.safetensors", *state = DIR "/a.state", *other = DIR "/b.state";
    ckca_model *whole = copy_of(start), *m = copy_of(start), *again;
    ckca_update_desc d = quick(CKCA_METHOD_WARM);
    ckca_report expected, report;
    int stop = 1;
    d.epochs = 2;
    CHECK(ckca_update(whole, data, &d, &expected) == CKCA_OK, "%s", ckca_error(ctx));
    d.state = state;
    spill(DIR "/a.state.tmp", "left by a killed run", 20);
    spill(DIR "/a.state.lock", "", 0);
    CHECK(ckca_update(m, data, &d, &report) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(there(state) && !there(DIR "/a.state.tmp") && !there(DIR "/a.state.lock"), "files of a killed run are left");
    ckca_model_free(m); /* all that remains is the file */
    m = copy_of(start);
    d.progress = never; /* stops at the first step, but there is none */
    d.user = &stop;
    CHECK(ckca_update(m, data, &d, &report) == CKCA_OK && same_weights(m, whole) && m->updates == whole->updates,
          "at once, the same: %s", ckca_error(ctx));
    CHECK(report.loss == expected.loss && report.accuracy == expected.accuracy && report.updates == expected.updates &&
              report.steps == expected.steps,
          "loss %g, uninterrupted %g", report.loss, expected.loss);
    again = copy_of(start); /* and nobody else's update may write over it */
    CHECK(ckca_update(again, next, &d, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "another update") && there(state),
          "%s", ckca_error(ctx));
    ckca_model_free(again);
    CHECK(ckca_save(m, DIR "/no/such/folder/x") == CKCA_EIO && there(state), "a save that fails keeps the state");

    /* the model itself goes on: with the same path, then another one; one save is for both */
    d.progress = NULL;
    CHECK(ckca_update(m, next, &d, NULL) == CKCA_OK && m->updates == 3, "%s", ckca_error(ctx));
    d.state = other;
    CHECK(ckca_update(m, data, &d, NULL) == CKCA_OK && m->updates == 4, "%s", ckca_error(ctx));
    CHECK(there(state) && there(other), "both states wait");
    again = copy_of(m);
    CHECK(ckca_save(again, one) == CKCA_OK && there(state) && there(other), "a copy's save leaves them alone");
    ckca_model_free(again);
    CHECK(ckca_save(m, one) == CKCA_OK && !there(state) && !there(other), "both are gone");

    /* a model that was stopped later does not hold the first one's result */
    d.state = state;
    CHECK(ckca_update(m, next, &d, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    d.state = other;
    d.progress = never;
    CHECK(ckca_update(m, data, &d, NULL) == CKCA_ESTOP, "%s", ckca_error(ctx));
    CHECK(ckca_save(m, one) == CKCA_OK && there(state) && there(other), "the states of what is not saved stay");
    remove(state);
    remove(other);

    /* a checkpoint in the state's own place is not removed, whatever the path is called */
    d.progress = NULL;
    d.state = state;
    CHECK(ckca_update(m, data, &d, NULL) == CKCA_OK && ckca_save(m, DIR "/./a.state") == CKCA_OK && there(state), "%s",
          ckca_error(ctx));
    remove(state);
    ckca_model_free(m);

#ifdef CKCA__POSIX
    { /* two at a time */
        int lock = ckca__lock_path(DIR "/a.state.lock");
        m = copy_of(start);
        CHECK(lock >= 0, "no lock: %s", strerror(errno));
        CHECK(ckca_update(m, data, &d, NULL) == CKCA_EIO && strstr(ckca_error(ctx), "a.state: another update is using it"),
              "%s", ckca_error(ctx));
        CHECK(there(DIR "/a.state.lock") && !there(state) && same_weights(m, start), "the other's files are as they were");
        close(lock);
        CHECK(ckca_update(m, data, &d, NULL) == CKCA_OK && same_weights(m, whole), "%s", ckca_error(ctx));
        CHECK(ckca_save(m, one) == CKCA_OK && !there(DIR "/a.state.lock"), "%s", ckca_error(ctx));
        ckca_model_free(m);
    }
#endif
    ckca_model_free(whole);
}

typedef struct spoiler {
    ckca_model *m;
    int tensor, at;
    float value;
} spoiler;

/* Puts a value into a tensor behind step at. */
static int spoil(const ckca_progress *p, void *user) {
    spoiler *s = (spoiler *)user;
    float *values;
    if (p->epoch * p->batches + p->batch != s->at) return 0;
    values = (float *)calloc(s->m->parameter[s->tensor].count, sizeof *values);
    values[s->m->parameter[s->tensor].count / 2] = s->value;
    ckca_tensor_write(s->m, s->tensor, CKCA_SLOT_VALUE, values);
    free(values);
    return 0;
}

/* A training whose weights or running statistics end as no numbers, though its losses were all finite. */
static void test_not_finite(ckca_context *ctx, ckca_model *start, const ckca_data *data) {
    const char *one = DIR "/one.safetensors", *state = DIR "/nan.state";
    ckca_update_desc d = quick(CKCA_METHOD_WARM);
    size_t size, again;
    char *before, *after;
    int i, with_state;
    spoiler s;
    CHECK(ckca_save(start, one) == CKCA_OK, "%s", ckca_error(ctx));
    before = slurp(one, &size);
    d.epochs = 1;
    d.progress = spoil;
    d.user = &s;
    s.at = (COUNT + d.batch - 1) / d.batch;
    for (i = 0; i < 2 * ckca_tensor_count(start); i += 3) {
        ckca_model *m = copy_of(start);
        char words[200];
        s.m = m;
        s.tensor = i % ckca_tensor_count(start);
        s.value = i % 2 ? INFINITY : NAN;
        with_state = i / ckca_tensor_count(start);
        d.state = with_state ? state : NULL;
        snprintf(words, sizeof words, "%s is not finite", m->parameter[s.tensor].name);
        CHECK(ckca_update(m, data, &d, NULL) == CKCA_ENAN && strstr(ckca_error(ctx), words), "%s: %s", words,
              ckca_error(ctx));
        CHECK(same_weights(m, start) && m->updates == start->updates, "%s: the model is not as it was", words);
        CHECK(!there(state), "a state that is not finite was written");
        spoil(&(ckca_progress){0, 0, 1, s.at, s.at, 0, 0, 0, 0, 0, 0, 0, 0, 0}, &s);
        CHECK(ckca_save(m, one) == CKCA_ENAN && strstr(ckca_error(ctx), words), "%s: %s", words, ckca_error(ctx));
        ckca_model_free(m);
    }
    after = slurp(one, &again);
    CHECK(again == size && !memcmp(before, after, size), "the checkpoint was written over");
    free(before);
    free(after);
}

static void test_files(ckca_context *ctx, ckca_model *m, const ckca_data *data) {
    const char *one = DIR "/one.safetensors", *two = DIR "/two.safetensors";
    ckca_model *back = NULL, *strange, *other;
    size_t size, again, cut;
    char *a, *b;
    int i;
    CHECK(ckca_save(m, one) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(ckca_load(ctx, &back, one) == CKCA_OK, "%s", ckca_error(ctx));
    if (!back) return;
    CHECK(ckca_save(back, two) == CKCA_OK, "%s", ckca_error(ctx));
    a = slurp(one, &size);
    b = slurp(two, &again);
    CHECK(size == again && !memcmp(a, b, size), "save, load, save: %zu and %zu bytes", size, again);
    free(b);
    CHECK(same_weights(m, back) && back->updates == m->updates && back->batches_tracked == m->batches_tracked, "step %d, %d batches",
          back->updates, (int)back->batches_tracked);
    CHECK(!memcmp(m->normalization, back->normalization, 6 * sizeof(float)), "mean %.9g, loaded %.9g", (double)m->normalization[0],
          (double)back->normalization[0]);
    for (i = 0; i < CLASSES; i++)
        CHECK(!strcmp(m->class_names[i], back->class_names[i]), "class %d is %s, loaded %s", i, m->class_names[i], back->class_names[i]);
    { /* and goes on as the original would */
        ckca_update_desc d = quick(CKCA_METHOD_CKCA);
        ckca_model *on = copy_of(m);
        CHECK(ckca_update(on, data, &d, NULL) == CKCA_OK && ckca_update(back, data, &d, NULL) == CKCA_OK, "%s", ckca_error(ctx));
        CHECK(same_weights(on, back), "a loaded checkpoint trains to the same bits");
        ckca_model_free(on);
    }
    for (cut = 0; cut < size; cut += cut < 600 ? 1 : 997) { /* truncated anywhere: refused */
        ckca_model *none = m;
        spill(two, a, cut);
        CHECK(ckca_load(ctx, &none, two) != CKCA_OK && none == m, "a file cut to %zu of %zu bytes loads", cut, size);
        CHECK(ckca_load_weights(back, two) != CKCA_OK, "weights from a file cut to %zu bytes", cut);
    }
    ckca_model_free(back);
    free(a);
    strange = strange_net(ctx);
    CHECK(ckca_save(strange, one) == CKCA_OK && ckca_load(ctx, &other, one) == CKCA_OK, "a net of one's own: %s", ckca_error(ctx));
    CHECK(same_weights(strange, other) && !strcmp(other->arch, "custom"), "it comes back whole");
    CHECK(ckca_load_weights(m, one) == CKCA_EFORMAT, "another network's weights: %s", ckca_error(ctx));
    ckca_model_free(other);
    ckca_model_free(strange);
    other = small_net(ctx, "resnet20", 1);
    ckca_save(other, one);
    CHECK(ckca_load_weights(m, one) == CKCA_EFORMAT && strstr(ckca_error(ctx), "not in this network"), "%s", ckca_error(ctx));
    ckca_model_free(other);
    other = NULL;
    CHECK(ckca_load(ctx, &other, DIR "/nothing") == CKCA_EIO && !other, "%s", ckca_error(ctx));
    CHECK(ckca_save(m, DIR "/no/such/folder/x") == CKCA_EIO, "%s", ckca_error(ctx));
}

static void test_graph_text(ckca_context *ctx) {
    static const char *const bad[] = {
        "", ";", "input", "input;", "logits 0", "input;logits 0", "input;input;logits 0", "input;relu;logits 1", "input;relu 0 0;x",
        "input;relu -1;logits 1", "input;relu 99999999999;logits 1", "conv c 0 1 1 1 0 0", "input;conv c 0 1 1 1;avgpool 1;linear f 2 3;logits 3",
        "input;conv c 0 2147483647 3 1 1 0;avgpool 1;linear f 2 3;logits 3", "input;avgpool 0;linear f 1 3;logits 2;relu 0",
        "input;conv c 0 8 255 1 254 0;logits 1", "input;avgpool 0;linear f 1 2;logits 2", "input;stage 5;logits 0", "input;relu  0;logits 1",
        "input;avgpool 0;linear a_name_of_more_than_sixty_three_bytes_that_does_not_fit_into_the_room_there_is 1 3;logits 2"};
    size_t i;
    for (i = 0; i <= sizeof bad / sizeof *bad; i++) {
        const int good = i == sizeof bad / sizeof *bad;
        const char *text = good ? "input;avgpool 0;linear 0.f 1 3;logits 2" : bad[i];
        ckca_model_desc desc;
        ckca_model *m;
        ckca_status status;
        memset(&desc, 0, sizeof desc);
        desc.classes = 3;
        ckca_model_create(ctx, &m, &desc);
        status = ckca__graph_read(m, text);
        CHECK((status == CKCA_OK) == good, "\"%s\": %s", text, status ? ckca_error(ctx) : "ok");
        ckca_model_free(m);
    }
}

/* ---- failing allocations ---- */

static long alloc_left, alloc_open;
static void *scarce(size_t bytes, void *user) {
    (void)user;
    if (alloc_left-- == 0) return NULL;
    alloc_open++;
    return malloc(bytes);
}
static void scarce_free(void *memory, size_t bytes, void *user) {
    (void)bytes;
    (void)user;
    alloc_open--;
    free(memory);
}

/* The whole job with allocation number k failing, for every k until none fails: an error each time, nothing left open. */
static void test_allocations(void) {
    long k, failures = 0;
    ckca_status status = CKCA_ENOMEM;
    for (k = 0; k < 100000 && status; k++) {
        ckca_desc desc;
        ckca_context *ctx = NULL;
        ckca_data *data = NULL;
        ckca_model *m = NULL, *back = NULL, *copy = NULL;
        ckca_update_desc d = quick(CKCA_METHOD_CKCA);
        ckca_model_desc model;
        memset(&desc, 0, sizeof desc);
        memset(&model, 0, sizeof model);
        model.height = model.width = SIZE;
        model.classes = CLASSES;
        model.width_base = 2;
        desc.threads = 1;
        desc.alloc = scarce;
        desc.release = scarce_free;
        d.epochs = 1;
        d.batch = 64;
        d.w_feat = 1;
        d.state = DIR "/scarce.state";
        d.state_seconds = 1e-9f;
        remove(d.state);
        alloc_left = k;
        status = ckca_init(&ctx, &desc);
        if (!status && !(data = pictures(ctx, COUNT, 1))) status = CKCA_ENOMEM;
        if (!status) status = ckca_resnet(ctx, &m, "resnet8", &model);
        if (!status) status = ckca_update(m, data, &d, NULL);
        if (!status) status = ckca_model_copy(&copy, m);
        if (!status) { /* over the state of the first; to a checkpoint without class means */
            ckca__release(ctx, m->centroids.count);
            m->centroids.count = NULL;
            d.unlabelled = data;
            status = ckca_update(m, data, &d, NULL);
        }
        if (!status) status = ckca_evaluate(m, data, NULL, NULL);
        if (!status) status = ckca_save(m, DIR "/scarce.safetensors");
        if (!status) status = ckca_load(ctx, &back, DIR "/scarce.safetensors");
        if (status) {
            failures++;
            CHECK(status == CKCA_ENOMEM, "allocation %ld fails with %s: %s", k, ckca_status_name(status), ckca_error(ctx));
        }
        ckca_model_free(copy);
        ckca_model_free(back);
        ckca_model_free(m);
        ckca_data_free(data);
        ckca_context_free(ctx);
        CHECK(alloc_open == 0, "allocation %ld failing leaves %ld blocks", k, alloc_open);
        alloc_open = 0;
    }
    CHECK(!status && failures > 100, "%ld allocations failed in turn", failures);
    printf("%ld allocations failed one by one\n", failures);
}

int main(void) {
    ckca_context *ctx;
    ckca_data *data, *next, *test;
    ckca_model *start;
    test_settings_complete();
    test_enter();
    mkdir(DIR, 0777);
    ckca_init(&ctx, NULL);
    data = pictures(ctx, COUNT, 1);
    next = pictures(ctx, COUNT, 2);
    test = pictures(ctx, COUNT, 3);
    test_graph_gradients(ctx);
    test_graph_errors(ctx);
    test_graph_text(ctx);
    test_bytes(ctx);
    test_schedule();
    test_shuffle();
    start = first_step(ctx, data);
    test_learning(ctx, start, test);
    test_methods(ctx, start, next);
    test_forms(ctx, start, next);
    test_live_teacher(ctx, start, next);
    test_other_teacher(ctx, start, next);
    test_shrink_perturb(ctx, start, next);
    test_by_hand(ctx, start, next);
    test_centroids(ctx, start, data, next);
    test_growth(ctx, start, next);
    test_unlabelled(ctx, start, next, test);
    test_copy(ctx, start, next);
    test_update_errors(ctx, start, next);
    test_failed_update(ctx, start, next);
    test_teacher_is_read(ctx, start, next);
    test_settings(ctx, start, next);
    test_resume(ctx, start, next, NULL);
    test_resume(ctx, start, next, test);
    test_unsaved(ctx, start, next, data);
    test_not_finite(ctx, start, next);
    test_files(ctx, start, next);
#ifndef CKCA_CUDA_SHIM /* slow there, and about the host alone */
    test_threads();
    test_allocations();
#endif
    ckca_model_free(start);
    ckca_data_free(data);
    ckca_data_free(next);
    ckca_data_free(test);
    ckca_context_free(ctx);
    unlink(DIR "/one.safetensors"), unlink(DIR "/two.safetensors"), unlink(DIR "/scarce.safetensors");
    rmdir(DIR);
    test_leave();
    return test_summary();
}
