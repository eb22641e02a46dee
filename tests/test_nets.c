/* test_nets.c: whole networks against PyTorch: logits, loss, every gradient, running statistics and one SGD step of CIFAR
   and ImageNet ResNets, from tests/reference/nets.safetensors (written by tests/torch_nets.py, which has the formula of
   the weights and pictures). Then the memory plan, the architectures' sizes and initial weights.

   Tolerances are relative to the norm of the compared tensor, about ten times the error of PyTorch's own float32 against
   the float64 reference, which torch_nets.py prints. */
#define CKCA_IMPLEMENTATION
#include "ckca.h"

#include "test.h"

/* ---- the formula of torch_nets.py ---- */

static uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= UINT32_C(0x7feb352d);
    x ^= x >> 15;
    x *= UINT32_C(0x846ca68b);
    return x ^ (x >> 16);
}

static uint32_t key(const char *name, uint32_t seed) {
    uint32_t h = UINT32_C(2166136261);
    for (; *name; name++) h = (h ^ (unsigned char)*name) * UINT32_C(16777619);
    return h + seed * UINT32_C(0x9e3779b1);
}

static uint32_t bits(uint32_t k, int64_t i) { return mix(k + (uint32_t)i * UINT32_C(0x9e3779b9)); }
static double draw(uint32_t k, int64_t i) { return bits(k, i) / 2147483648.0 - 1.0; }

static int ends_with(const char *s, const char *end) {
    size_t n = strlen(s), m = strlen(end);
    return n >= m && !strcmp(s + n - m, end);
}

static float formula(const ckca_tensor_info *t, uint32_t k, int64_t i) {
    double u = draw(k, i);
    if (ends_with(t->name, "running_var")) return (float)(1.0 + 0.3 * u);
    if (ends_with(t->name, "running_mean")) return (float)(0.1 * u);
    if (ends_with(t->name, "bias")) return (float)(0.2 * u);
    if (t->dims == 1) return (float)((0.8 + 0.2 * u) * (ends_with(t->name, "bn3.weight") ? 0.25 : 1.0));
    return (float)(sqrt((t->dims == 4 ? 6.0 : 3.0) / (double)(t->count / t->shape[0])) * u);
}

/* ---- a reader of just what is needed of the reference file, apart from the library's own ---- */

static unsigned char *file_bytes;
static uint64_t header_bytes;

static int open_reference(const char *path) {
    FILE *f = fopen(path, "rb");
    long size;
    int i, ok;
    if (!f || fseek(f, 0, SEEK_END) || (size = ftell(f)) < 8) return 0;
    rewind(f);
    file_bytes = (unsigned char *)malloc((size_t)size + 1);
    ok = file_bytes && fread(file_bytes, 1, (size_t)size, f) == (size_t)size;
    fclose(f);
    if (!ok) return 0;
    for (i = 7; i >= 0; i--) header_bytes = header_bytes << 8 | file_bytes[i];
    return header_bytes < (uint64_t)size;
}

/* The bytes of an entry and their number; a missing one is a failed check and an empty entry. */
static const void *entry(const char *net, const char *what, size_t *bytes) {
    char quoted[128];
    const char *at, *header = (const char *)file_bytes + 8;
    unsigned long from = 0, to = 0;
    snprintf(quoted, sizeof quoted, "\"%s.%s\":{", net, what);
    at = strstr(header, quoted);
    if (at) at = strstr(at, "\"data_offsets\":[");
    CHECK(at && sscanf(at, "\"data_offsets\":[%lu,%lu]", &from, &to) == 2, "reference has no %s.%s", net, what);
    *bytes = to - from;
    return header + header_bytes + from; /* safetensors 0.4 and later align this to 8 bytes */
}

/* ---- comparing ---- */

static double norm_of(const float *a, const float *b, size_t n) {
    double sum = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        double d = (double)a[i] - (b ? (double)b[i] : 0.0);
        sum += d * d;
    }
    return sqrt(sum);
}

static double compare_whole(const char *net, const char *what, const float *got, size_t n, double tolerance) {
    size_t bytes;
    const float *want = (const float *)entry(net, what, &bytes);
    double error;
    CHECK(bytes == n * sizeof(float), "%s.%s: %zu values, reference %zu", net, what, n, bytes / sizeof(float));
    if (bytes != n * sizeof(float)) return 0;
    error = norm_of(got, want, n) / norm_of(want, NULL, n);
    CHECK(error < tolerance, "%s.%s: relative error %.2e, allowed %.0e", net, what, error, tolerance);
    return error;
}

/* Every tensor of a slot: the norm, and the values at the agreed places against the tensor's root mean square. Returns the
   worst error. */
static double compare_slot(ckca_model *model, const char *net, const char *what, ckca_slot slot, int64_t keep,
                           double tolerance) {
    char name[64];
    size_t bytes, at = 0;
    const char *names, *end;
    const float *norms, *samples;
    double worst = 0;
    int trainable = 0, seen = 0, i;
    snprintf(name, sizeof name, "%s.samples", what);
    samples = (const float *)entry(net, name, &bytes);
    snprintf(name, sizeof name, "%s.norms", what);
    norms = (const float *)entry(net, name, &bytes);
    snprintf(name, sizeof name, "%s.names", what);
    names = (const char *)entry(net, name, &bytes);
    for (end = names + bytes; names < end; names = strchr(names, '\n') + 1, seen++) {
        ckca_tensor_info t;
        float *got;
        int64_t count, j;
        double norm, rms, error;
        snprintf(name, sizeof name, "%.*s", (int)(strchr(names, '\n') - names), names);
        i = ckca_tensor_find(model, name);
        CHECK(i >= 0, "%s: no tensor %s", net, name);
        if (i < 0) return 1;
        ckca_tensor_info_get(model, i, &t);
        got = (float *)malloc((size_t)t.count * sizeof *got);
        CHECK(got && ckca_tensor_read(model, i, slot, got) == CKCA_OK, "%s: %s unreadable", net, name);
        norm = norms[seen];
        rms = norm / sqrt((double)t.count);
        error = fabs(norm_of(got, NULL, (size_t)t.count) - norm) / norm;
        count = t.count <= keep ? t.count : keep;
        for (j = 0; j < count; j++) {
            int64_t place = t.count <= keep ? j : (int64_t)(bits(key(name, 77), j) % (uint64_t)t.count);
            double d = fabs((double)got[place] - (double)samples[at++]) / rms;
            if (!(d <= error)) error = d; /* a NaN gets through */
        }
        CHECK(error < tolerance, "%s: %s of %s: relative error %.2e, allowed %.0e", net, what, name, error, tolerance);
        if (!(error <= worst)) worst = error;
        free(got);
    }
    for (i = 0; i < ckca_tensor_count(model); i++) {
        ckca_tensor_info t;
        ckca_tensor_info_get(model, i, &t);
        trainable += t.trainable || slot == CKCA_SLOT_VALUE;
    }
    CHECK(seen == trainable, "%s: %d tensors, reference %d", net, trainable, seen);
    return worst;
}

/* ---- one network ---- */

typedef struct net_case {
    const char *net, *arch; /* as in NETS of torch_nets.py */
    int projection, width, classes, n, h, w;
    int64_t keep_gradient, keep_other;
    uint32_t seed;
    double tolerance, tolerance_gradient; /* of outputs; of gradients and what follows from them */
} net_case;

/* Every tensor's values, or the momentum of the trainable ones, by the formula. */
static void fill(ckca_model *model, ckca_slot slot, uint32_t seed) {
    int i;
    for (i = 0; i < ckca_tensor_count(model); i++) {
        ckca_tensor_info t;
        float *v;
        int64_t j;
        uint32_t k;
        ckca_tensor_info_get(model, i, &t);
        if (slot == CKCA_SLOT_MOMENTUM && !t.trainable) continue;
        k = key(t.name, seed);
        v = (float *)malloc((size_t)t.count * sizeof *v);
        for (j = 0; j < t.count; j++) v[j] = slot == CKCA_SLOT_VALUE ? formula(&t, k, j) : (float)(0.01 * draw(k, j));
        CHECK(ckca_tensor_write(model, i, slot, v) == CKCA_OK, "%s: not written", t.name);
        free(v);
    }
}

#define LR 0.1f
#define FEATURES 0.5 /* weight of the mean square of the features in the loss */

static void test_net(ckca_context *ctx, const net_case *c) {
    ckca_model_desc desc;
    ckca_model *model;
    ckca_model_info info;
    ckca_sgd_desc sgd;
    float *x, *z, *f, *dz, *df, loss;
    double before, logits, after, gradient, momentum, value, total = 0;
    int64_t j, pixels = (int64_t)c->n * c->h * c->w * 3;
    int i, k;
    memset(&desc, 0, sizeof desc);
    desc.height = c->h;
    desc.width = c->w;
    desc.classes = c->classes;
    desc.width_base = c->width;
    desc.projection = c->projection;
    if (ckca_resnet(ctx, &model, c->arch, &desc) != CKCA_OK) {
        CHECK(0, "%s: %s", c->net, ckca_error(ctx));
        return;
    }
    ckca_model_info_get(model, &info);
    fill(model, CKCA_SLOT_VALUE, c->seed);
    x = (float *)malloc((size_t)pixels * sizeof *x);
    z = (float *)malloc((size_t)(c->n * c->classes) * sizeof *z);
    dz = (float *)malloc((size_t)(c->n * c->classes) * sizeof *dz);
    f = (float *)malloc((size_t)(c->n * info.features) * sizeof *f);
    df = (float *)malloc((size_t)(c->n * info.features) * sizeof *df);
    for (j = 0; j < pixels; j++) x[j] = (float)(1.7 * draw(key("pictures", c->seed), j));

    CHECK(ckca_forward(model, x, c->n, 0) == CKCA_OK, "%s: %s", c->net, ckca_error(ctx));
    CHECK(ckca_node_read(model, info.logits, z) == CKCA_OK, "%s: %s", c->net, ckca_error(ctx));
    before = compare_whole(c->net, "eval_before", z, (size_t)(c->n * c->classes), c->tolerance);

    CHECK(ckca_forward(model, x, c->n, 1) == CKCA_OK, "%s: %s", c->net, ckca_error(ctx));
    CHECK(ckca_node_read(model, info.logits, z) == CKCA_OK, "%s: %s", c->net, ckca_error(ctx));
    /* the builders' last nodes are the pooled features and the logits */
    CHECK(ckca_node_read(model, info.logits - 1, f) == CKCA_OK, "%s: %s", c->net, ckca_error(ctx));
    logits = compare_whole(c->net, "logits", z, (size_t)(c->n * c->classes), c->tolerance);

    /* the loss of torch_nets.py: cross-entropy + FEATURES * mean of squared features */
    for (i = 0; i < c->n; i++) {
        const float *zi = z + i * c->classes;
        double top = zi[0], sum = 0;
        int label = (int)(bits(key("labels", c->seed), i) % (uint32_t)c->classes);
        for (k = 0; k < c->classes; k++) top = zi[k] > top ? zi[k] : top;
        for (k = 0; k < c->classes; k++) sum += exp(zi[k] - top);
        for (k = 0; k < c->classes; k++) {
            double p = exp(zi[k] - top) / sum;
            dz[i * c->classes + k] = (float)((p - (k == label)) / c->n);
        }
        total += (log(sum) + top - zi[label]) / c->n;
    }
    for (i = 0; i < c->n * info.features; i++) {
        double mean_of = (double)c->n * info.features;
        total += FEATURES * (double)f[i] * (double)f[i] / mean_of;
        df[i] = (float)(2 * FEATURES * (double)f[i] / mean_of);
    }
    loss = (float)total;
    compare_whole(c->net, "loss", &loss, 1, c->tolerance);

    CHECK(ckca_zero_gradients(model) == CKCA_OK, "%s: %s", c->net, ckca_error(ctx));
    CHECK(ckca_backward(model, dz, df) == CKCA_OK, "%s: %s", c->net, ckca_error(ctx));
    gradient = compare_slot(model, c->net, "gradient", CKCA_SLOT_GRADIENT, c->keep_gradient, c->tolerance_gradient);

    fill(model, CKCA_SLOT_MOMENTUM, c->seed + 1);
    memset(&sgd, 0, sizeof sgd);
    sgd.lr = LR;
    CHECK(ckca_sgd(model, &sgd) == CKCA_OK, "%s: %s", c->net, ckca_error(ctx));
    momentum = compare_slot(model, c->net, "momentum", CKCA_SLOT_MOMENTUM, c->keep_other, c->tolerance_gradient);
    value = compare_slot(model, c->net, "value", CKCA_SLOT_VALUE, c->keep_other, c->tolerance_gradient);

    CHECK(ckca_forward(model, x, c->n, 0) == CKCA_OK, "%s: %s", c->net, ckca_error(ctx));
    CHECK(ckca_node_read(model, info.logits, z) == CKCA_OK, "%s: %s", c->net, ckca_error(ctx));
    after = compare_whole(c->net, "eval_after", z, (size_t)(c->n * c->classes), c->tolerance_gradient);
    printf("%s on %s: errors: evaluation %.1e, training logits %.1e, gradients %.1e, momentum %.1e, weights and running "
           "statistics %.1e, evaluation after the step %.1e\n",
           c->net, ckca_device(ctx), before, logits, gradient, momentum, value, after);
    free(x);
    free(z);
    free(f);
    free(dz);
    free(df);
    ckca_model_free(model);
}

/* ---- sizes and initial weights ---- */

static void test_structure(ckca_context *ctx) {
    static const struct {
        const char *arch;
        int projection, classes, size, features;
        int64_t parameters; /* He et al.'s and torchvision's counts */
    } nets[] = {
        {"resnet8", 1, 10, 32, 64, 78042},          {"resnet20", 1, 10, 32, 64, 272474},
        {"resnet20", 0, 10, 32, 64, 269722},        {"resnet32", 0, 10, 32, 64, 464154},
        {"resnet44", 0, 10, 32, 64, 658586},        {"resnet56", 0, 10, 32, 64, 853018},
        {"resnet110", 0, 10, 32, 64, 1727962},      {"resnet18", 0, 1000, 224, 512, 11689512},
        {"resnet34", 0, 1000, 224, 512, 21797672},  {"resnet50", 0, 1000, 224, 2048, 25557032},
        {"resnet18-cifar", 0, 10, 32, 512, 11173962}, {"resnet34-cifar", 0, 10, 32, 512, 21282122},
        {"resnet50-cifar", 0, 10, 32, 2048, 23520842},
    };
    size_t i;
    for (i = 0; i < sizeof nets / sizeof *nets; i++) {
        ckca_model_desc desc;
        ckca_model *model;
        ckca_model_info info;
        memset(&desc, 0, sizeof desc);
        desc.height = desc.width = nets[i].size;
        desc.classes = nets[i].classes;
        desc.projection = nets[i].projection;
        if (ckca_resnet(ctx, &model, nets[i].arch, &desc) != CKCA_OK) {
            CHECK(0, "%s: %s", nets[i].arch, ckca_error(ctx));
            continue;
        }
        ckca_model_info_get(model, &info);
        CHECK(info.parameters == nets[i].parameters, "%s: %lld parameters, not %lld", nets[i].arch,
              (long long)info.parameters, (long long)nets[i].parameters);
        CHECK(info.features == nets[i].features, "%s: %d features, not %d", nets[i].arch, info.features,
              nets[i].features);
        CHECK(!strcmp(info.arch, nets[i].arch), "%s says it is %s", nets[i].arch, info.arch);
        CHECK(info.updates == 0, "%s: step %d", nets[i].arch, info.updates);
        ckca_model_free(model);
    }
}

/* Initial weights as torchvision's: convolutions normal with variance 2 / (K R S), batch norm 1 and 0, linear as
   nn.Linear's uniform of half-width 1 / sqrt(D). The bounds are five standard errors. */
static void test_initial(ckca_context *ctx, const char *arch, const char *last, int zero_residual) {
    ckca_model_desc desc;
    ckca_model *model, *other = NULL;
    int i, differs = 0, zeroed = 0;
    memset(&desc, 0, sizeof desc);
    desc.classes = 10;
    desc.seed = 7;
    desc.projection = 1;
    desc.zero_residual = zero_residual;
    CHECK(ckca_resnet(ctx, &model, arch, &desc) == CKCA_OK, "%s", ckca_error(ctx));
    desc.seed = 8;
    CHECK(ckca_resnet(ctx, &other, arch, &desc) == CKCA_OK, "%s", ckca_error(ctx));
    for (i = 0; i < ckca_tensor_count(model); i++) {
        ckca_tensor_info t;
        float *v, *w;
        double sum = 0, squares = 0, n, widest = 0;
        int64_t j;
        ckca_tensor_info_get(model, i, &t);
        v = (float *)malloc((size_t)t.count * sizeof *v);
        w = (float *)malloc((size_t)t.count * sizeof *w);
        ckca_tensor_read(model, i, CKCA_SLOT_VALUE, v);
        ckca_tensor_read(other, i, CKCA_SLOT_VALUE, w);
        n = (double)t.count;
        for (j = 0; j < t.count; j++) {
            sum += v[j];
            squares += (double)v[j] * v[j];
            widest = fabs(v[j]) > widest ? fabs(v[j]) : widest;
            differs += v[j] != w[j];
        }
        if (t.dims == 4) {
            double variance = 2.0 / ((double)t.shape[0] * t.shape[2] * t.shape[3]);
            CHECK(fabs(sum / n) < 5 * sqrt(variance / n), "%s %s: mean %g", arch, t.name, sum / n);
            CHECK(fabs(squares / n / variance - 1) < 5 * sqrt(2 / n), "%s %s: variance %g, not %g", arch, t.name,
                  squares / n, variance);
            CHECK(widest > sqrt(variance) * 2.5 && widest < sqrt(variance) * 7, "%s %s: greatest %g deviations", arch,
                  t.name, widest / sqrt(variance));
        } else if (!strncmp(t.name, "fc.", 3)) {
            ckca_tensor_info weight;
            double half;
            ckca_tensor_info_get(model, ckca_tensor_find(model, "fc.weight"), &weight);
            half = 1 / sqrt((double)weight.shape[1]);
            CHECK(widest <= half * 1.0001 && widest > 0.5 * half, "%s %s: greatest %g, bound %g", arch, t.name, widest,
                  half);
            CHECK(t.dims == 1 || fabs(squares / n / (half * half / 3) - 1) < 5 / sqrt(n), "%s %s: variance %g", arch,
                  t.name, squares / n);
        } else {
            int zero = ends_with(t.name, "bias") || ends_with(t.name, "running_mean");
            if (ends_with(t.name, last) && strncmp(t.name, last, strlen(last))) { /* in a block, not the stem's */
                zero = zero_residual;
                zeroed++;
            }
            for (j = 0; j < t.count && v[j] == (zero ? 0.0f : 1.0f); j++) {
            }
            CHECK(j == t.count, "%s %s[%lld] starts as %g", arch, t.name, (long long)j, v[j]);
        }
        free(v);
        free(w);
    }
    CHECK(differs > 1000, "%s: seeds 7 and 8 differ in %d weights only", arch, differs);
    CHECK(zeroed >= 3, "%s: %d residual branches", arch, zeroed);
    ckca_model_free(model);
    ckca_model_free(other);
}

/* ---- the memory plan: recomputed outputs, gradients in place ---- */

static int conv(ckca_model *m, const char *name, int input, int out, int kernel, int stride, int pad) {
    ckca_conv_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.out = out;
    desc.kernel = kernel;
    desc.stride = stride;
    desc.pad = pad;
    return ckca_layer_conv(m, name, input, desc);
}

/* An irregular graph: every case of the memory planner, useful as a network or not. */
static ckca_model *irregular(ckca_context *ctx) {
    ckca_model_desc desc;
    ckca_model *m;
    int x, y, z = 0, i;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = 12;
    desc.classes = 5;
    desc.seed = 3;
    CHECK(ckca_model_create(ctx, &m, &desc) == CKCA_OK, "%s", ckca_error(ctx));
    x = ckca_layer_batchnorm(m, "bn0", conv(m, "conv0", ckca_layer_input(m), 8, 3, 1, 1));
    x = ckca_layer_relu(m, x);
    for (i = 0; i < 6; i++) {
        char name[32];
        snprintf(name, sizeof name, "conv1.%d", i);
        y = conv(m, name, x, 8, 3, 1, 1);
        snprintf(name, sizeof name, "bn1.%d", i);
        x = ckca_layer_relu(m, ckca_layer_add(m, ckca_layer_batchnorm(m, name, y), i == 4 ? z : x));
        if (i == 1) z = x; /* is the residual of two blocks */
        if (i == 2) ckca_layer_stage(m, x);
    }
    y = ckca_layer_batchnorm(m, "bn2", x);                               /* reads what a ReLU gave, not a convolution */
    z = ckca_layer_relu(m, ckca_layer_add(m, ckca_layer_batchnorm(m, "bn3", y), y)); /* its own input is its residual */
    x = ckca_layer_add(m, ckca_layer_relu(m, ckca_layer_batchnorm(m, "bn4", conv(m, "conv4", z, 8, 1, 1, 0))), x);
    x = ckca_layer_relu(m, x);
    y = ckca_layer_batchnorm(m, "bn5", conv(m, "conv5", x, 16, 3, 1, 1));
    z = ckca_layer_batchnorm(m, "bn6", conv(m, "conv6", x, 16, 1, 1, 0));
    x = ckca_layer_relu(m, ckca_layer_add(m, y, z));
    ckca_layer_stage(m, x);
    /* A batch norm over r's reader s, with r as residual; then one over r, with s. */
    for (i = 0; i < 2; i++) {
        int r = ckca_layer_relu(m, ckca_layer_batchnorm(m, i ? "bn8" : "bn9", conv(m, i ? "conv8" : "conv9", x, 16, 1, 1, 0)));
        int s = ckca_layer_batchnorm(m, i ? "bn10" : "bn11", conv(m, i ? "conv10" : "conv11", r, 16, 1, 1, 0));
        s = ckca_layer_relu(m, ckca_layer_add(m, s, r));
        x = ckca_layer_relu(m, ckca_layer_add(m, ckca_layer_batchnorm(m, i ? "bn12" : "bn13", i ? r : s), i ? s : r));
    }
    /* Batch norms whose only reader can normalise for itself: a convolution, a sum; at last max pooling, and one whose
       output is wanted as a stage in one of the modes. */
    y = conv(m, "conv15", ckca_layer_relu(m, ckca_layer_batchnorm(m, "bn14", conv(m, "conv14", x, 16, 3, 1, 1))), 16, 3, 1, 1);
    z = ckca_layer_relu(m, ckca_layer_batchnorm(m, "bn16", conv(m, "conv16", x, 16, 1, 1, 0)));
    x = ckca_layer_relu(m, ckca_layer_add(m, ckca_layer_batchnorm(m, "bn15", y), z));
    /* Two recomputed outputs, as in a network that normalises before its convolutions; each is its last reader. */
    z = conv(m, "conv22", x, 16, 1, 1, 0);
    y = conv(m, "conv21", ckca_layer_relu(m, ckca_layer_batchnorm(m, "bn21", x)), 16, 3, 1, 1);
    x = ckca_layer_relu(m, ckca_layer_add(m, ckca_layer_batchnorm(m, "bn22", y), z));
    z = ckca_layer_batchnorm(m, "bn23", x);
    y = ckca_layer_relu(m, ckca_layer_batchnorm(m, "bn24", conv(m, "conv23", x, 16, 3, 1, 1)));
    x = ckca_layer_relu(m, ckca_layer_add(m, ckca_layer_batchnorm(m, "bn25", conv(m, "conv24", y, 16, 1, 1, 0)), z));
    /* Two that have to be run: for two readers, and for a sum without a batch norm. */
    y = ckca_layer_relu(m, ckca_layer_batchnorm(m, "bn17", conv(m, "conv17", x, 16, 1, 1, 0)));
    x = conv(m, "conv18", y, 16, 3, 1, 1);
    x = ckca_layer_add(m, x, ckca_layer_relu(m, ckca_layer_batchnorm(m, "bn26", conv(m, "conv19", y, 16, 1, 1, 0))));
    y = ckca_layer_batchnorm(m, "bn18", x);
    ckca_layer_stage(m, y);
    x = ckca_layer_relu(m, ckca_layer_batchnorm(m, "bn19", conv(m, "conv20", y, 16, 1, 1, 0)));
    x = ckca_layer_maxpool(m, x, 3, 2, 1);
    x = ckca_layer_relu(m, ckca_layer_batchnorm(m, "bn7", conv(m, "conv7", x, 16, 3, 1, 1)));
    x = ckca_layer_linear(m, "fc", ckca_layer_avgpool(m, x), 5);
    CHECK(ckca_model_finish(m, x) == CKCA_OK, "%s", ckca_error(ctx));
    return m;
}

/* Group norms in all places that a plan tells apart: over the pictures; before a ReLU, a sum, max pooling and a batch
   norm, which must not write over what a group norm reads; behind a batch norm, whose output is recomputed for it. */
static ckca_model *grouped(ckca_context *ctx) {
    ckca_model_desc desc;
    ckca_model *m;
    int x, y;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = 12;
    desc.classes = 5;
    desc.seed = 4;
    CHECK(ckca_model_create(ctx, &m, &desc) == CKCA_OK, "%s", ckca_error(ctx));
    x = ckca_layer_groupnorm(m, "gn0", ckca_layer_input(m), 3);
    x = ckca_layer_relu(m, ckca_layer_groupnorm(m, "gn1", conv(m, "conv1", x, 8, 3, 1, 1), 2));
    y = ckca_layer_groupnorm(m, "gn2", conv(m, "conv2", x, 8, 3, 1, 1), 8);
    x = ckca_layer_relu(m, ckca_layer_add(m, y, x));
    ckca_layer_stage(m, x);
    x = ckca_layer_relu(m, ckca_layer_add(m, ckca_layer_groupnorm(m, "gn6", x, 2), x)); /* its gradient is added */
    y = ckca_layer_groupnorm(m, "gn3", conv(m, "conv3", x, 8, 1, 1, 0), 4);
    x = ckca_layer_relu(m, ckca_layer_add(m, ckca_layer_batchnorm(m, "bn3", y), x));
    x = ckca_layer_relu(m, ckca_layer_batchnorm(m, "bn4", conv(m, "conv4", x, 8, 3, 1, 1)));
    x = ckca_layer_maxpool(m, ckca_layer_groupnorm(m, "gn4", x, 1), 3, 2, 1);
    x = ckca_layer_relu(m, ckca_layer_groupnorm(m, "gn5", conv(m, "conv5", x, 16, 3, 1, 1), 4));
    x = ckca_layer_linear(m, "fc", ckca_layer_avgpool(m, x), 5);
    CHECK(ckca_model_finish(m, x) == CKCA_OK, "%s", ckca_error(ctx));
    return m;
}

/* Gradients of every parameter after a step in a mode, from memory that is filled with NaN first; and the sum of the
   stages' outputs, where they are wanted. */
static float *gradients_in(ckca_model *m, int mode, int n, const float *x, const float *dz, size_t *count,
                           double *stages) {
    ckca_context *ctx = m->ctx;
    size_t floats, i;
    float *all, *nan;
    int j;
    CHECK(ckca__reserve(m, n, mode) == CKCA_OK, "%s", ckca_error(ctx));
    floats = m->activation_bytes / sizeof(float);
    nan = (float *)malloc(m->activation_bytes);
    for (i = 0; i < floats; i++) nan[i] = NAN;
    ckca__device_upload(ctx, m->activations, nan, floats * sizeof *nan);
    free(nan);
    ckca_zero_gradients(m);
    {
        float *input = ckca__input_buffer(m, n, mode);
        ckca__device_upload(ctx, input, x, (size_t)(n * m->height * m->width * m->channels) * sizeof *x);
        ckca__run_forward(m, n, mode, input);
    }
    for (j = 0, *stages = 0; j < m->nodes; j++) {
        const size_t values = ckca__rows(&m->node[j], n) * (size_t)m->node[j].c;
        float *out;
        if (!m->node[j].stage || !(mode & (CKCA__MODE_STAGES | CKCA__MODE_READABLE))) continue;
        out = (float *)malloc(values * sizeof *out);
        ckca__device_download(ctx, out, ckca__value(m, j), values * sizeof *out);
        for (i = 0; i < values; i++) *stages += out[i];
        free(out);
    }
    ckca__clear_has_grad(m);
    ckca__device_upload(ctx, ckca__grad(m, m->logits), dz, (size_t)(n * m->classes) * sizeof *dz);
    m->node[m->logits].has_grad = 1;
    for (j = 0; j < m->nodes; j++)
        if (m->node[j].stage && (mode & CKCA__MODE_STAGES)) {
            ckca__device_zero(ctx, ckca__grad(m, j), ckca__rows(&m->node[j], n) * (size_t)m->node[j].c * sizeof(float));
            m->node[j].has_grad = 1;
        }
    ckca__run_backward(m);
    m->n = 0;
    all = (float *)malloc(m->trainable * sizeof *all);
    ckca__device_download(ctx, all, m->gradients, m->trainable * sizeof *all);
    CHECK(ckca__device_status(ctx) == CKCA_OK, "%s", ckca_error(ctx));
    *count = m->trainable;
    return all;
}

#if defined(CKCA__SIMD)
enum { CONV_MAY_NORM = 1 };
#else
enum { CONV_MAY_NORM = 0 }; /* neither plain loops nor a GPU normalise a convolution's input while they read it */
#endif

/* A step gives the same gradients, bit by bit, whatever the plan keeps, recomputes or overwrites. merged: number of
   batch norms fused into their reader; merged_sums: those of them whose reader is a sum (on the GPU there are no others). */
static void test_plan(ckca_context *ctx, const char *net, int n, int size, int merged, int merged_sums) {
    static const int modes[] = {CKCA__MODE_TRAIN | CKCA__MODE_READABLE, CKCA__MODE_TRAIN, CKCA__MODE_TRAIN | CKCA__MODE_STAGES};
    ckca_model_desc desc;
    ckca_model *m;
    float *x, *dz, *all[3];
    double stages[3];
    size_t count = 0, i, most = 0;
    int mode, made = 0, j;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = size;
    desc.classes = 5;
    desc.seed = 1;
    if (!strcmp(net, "irregular")) m = irregular(ctx);
    else if (!strcmp(net, "grouped")) m = grouped(ctx);
    else CHECK(ckca_resnet(ctx, &m, net, &desc) == CKCA_OK, "%s", ckca_error(ctx));
    m->recompute_outputs = 1; /* a GPU does only where memory is short */
    x = (float *)malloc((size_t)(n * m->height * m->width * 3) * sizeof *x);
    dz = (float *)malloc((size_t)(n * 5) * sizeof *dz);
    for (i = 0; i < (size_t)(n * m->height * m->width * 3); i++) x[i] = (float)draw(7, (int64_t)i);
    for (i = 0; i < (size_t)(n * 5); i++) dz[i] = (float)draw(8, (int64_t)i);
    for (mode = 0; mode < 3; mode++) {
        all[mode] = gradients_in(m, modes[mode], n, x, dz, &count, &stages[mode]);
        for (i = 0, most = 0; i < count; i++)
            if (!(all[mode][i] == all[0][i])) most++;
        CHECK(!most, "%s: %d of %d gradients in mode %d are not those of mode %d", net, (int)most, (int)count,
              modes[mode], modes[0]);
    }
    CHECK(stages[2] == stages[0], "%s: its stages' outputs, added up: %g, not %g", net, stages[2], stages[0]);
    CHECK(m->plan_values[CKCA__MODE_TRAIN] < m->plan_values[CKCA__MODE_TRAIN | CKCA__MODE_READABLE] && m->recomputes[CKCA__MODE_TRAIN] > 0,
          "%s: nothing is recomputed", net);
    for (j = 0; j < m->recomputes[CKCA__MODE_TRAIN]; j++) made += m->recompute[CKCA__MODE_TRAIN][j].buffer_of != j;
    CHECK(made || strcmp(net, "resnet50"), "%s: no recomputed output overwrites its residual", net);
    for (j = made = 0; j < m->nodes; j++) made += m->node[j].fused_into_reader[CKCA__MODE_TRAIN];
    CHECK(made == (CONV_MAY_NORM ? merged : merged_sums), "%s: %d batch norms are fused into readers", net,
          made);
    for (mode = 0; mode < 3; mode++) free(all[mode]);
    free(x);
    free(dz);
    ckca_model_free(m);
}

/* What a step of ckca_update keeps of each picture, in bytes: as it was measured; less is welcome. */
static void test_plan_size(ckca_context *ctx, const char *net, int size, double most) {
    ckca_model_desc desc;
    ckca_model *m;
    ckca_bytes bytes;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = size;
    desc.classes = 10;
    CHECK(ckca_resnet(ctx, &m, net, &desc) == CKCA_OK, "%s", ckca_error(ctx));
    m->recompute_outputs = 1; /* a GPU keeps them while it has memory */
    CHECK(ckca_model_bytes(m, 1, 1, &bytes) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK((double)bytes.activations <= most, "%s: %.0f bytes a picture, once %.0f", net, (double)bytes.activations,
          most);
    ckca_model_free(m);
}

/* Logits in training or evaluation; the loss is their sum under weights dz. */
static double grouped_logits(ckca_model *m, const float *x, const float *dz, int training, float *z) {
    double loss = 0;
    int i;
    CHECK(ckca_forward(m, x, 3, training) == CKCA_OK, "%s", ckca_error(m->ctx));
    CHECK(ckca_node_read(m, m->logits, z) == CKCA_OK, "%s", ckca_error(m->ctx));
    for (i = 0; i < 15; i++) loss += (double)dz[i] * (double)z[i];
    return loss;
}

/* Group norm in a network: initial weights, gradients against the loss's differences along them, what decay reaches, a
   copy, the graph's text, a checkpoint, and texts that are refused. */
static void test_grouped(ckca_context *ctx) {
    static const char *const bad[] = {"input;gn g 0 2;avgpool 1;linear fc 2 5;logits 3",
                                      "input;gn g 0 0;avgpool 1;linear fc 2 5;logits 3",
                                      "input;gn g 0 -1;avgpool 1;linear fc 2 5;logits 3",
                                      "input;gn g 0;avgpool 1;linear fc 2 5;logits 3",
                                      "input;gn g 0 1 1;avgpool 1;linear fc 2 5;logits 3",
                                      "input;gn 0 1;avgpool 1;linear fc 2 5;logits 3"};
    static const char *const good = "input;gn g 0 3;avgpool 1;linear fc 2 5;logits 3";
    ckca_model *m = grouped(ctx), *copy = NULL, *loaded = NULL;
    float x[3 * 432], dz[15], z[15], other[15], *w, *g;
    double squares = 0, up, down, step;
    char text[600];
    size_t t, bytes, i;
    ckca_model_desc desc;
    ckca_bytes training;
    int k;
    for (i = 0; i < 3 * 432; i++) x[i] = (float)draw(9, (int64_t)i);
    for (i = 0; i < 15; i++) dz[i] = (float)draw(10, (int64_t)i);
    for (k = 0; k < ckca_tensor_count(m); k++) {
        ckca_tensor_info about;
        float v[16] = {0};
        ckca_tensor_info_get(m, k, &about);
        if (strncmp(about.name, "gn", 2)) continue;
        ckca_tensor_read(m, k, CKCA_SLOT_VALUE, v);
        for (i = 0; (int64_t)i < about.count && v[i] == (ends_with(about.name, ".bias") ? 0.0f : 1.0f); i++) {
        }
        CHECK((int64_t)i == about.count && about.trainable && about.dims == 1, "%s starts with %g", about.name,
              (double)v[i]);
        CHECK(m->parameter[k].offset >= m->decayed && m->parameter[k].offset < m->trainable, "%s is decayed",
              about.name);
        for (i = 0; (int64_t)i < about.count; i++) v[i] += 0.3f * (float)draw(11 + (uint32_t)k, (int64_t)i);
        ckca_tensor_write(m, k, CKCA_SLOT_VALUE, v);
    }
    w = (float *)malloc(m->trainable * sizeof *w), g = (float *)malloc(m->trainable * sizeof *g);
    grouped_logits(m, x, dz, 1, z);
    CHECK(!ckca_zero_gradients(m) && !ckca_backward(m, dz, NULL), "%s", ckca_error(ctx));
    ckca__device_download(ctx, g, m->gradients, m->trainable * sizeof *g);
    for (t = 0; t < 2; t++) { /* along all gradients, then along those of the group norms */
        float *moved = (float *)malloc(m->trainable * sizeof *moved), *along = (float *)calloc(m->trainable, sizeof *w);
        int side;
        for (k = 0; k < m->parameters; k++)
            if (m->parameter[k].offset < m->trainable && (!t || !strncmp(m->parameter[k].name, "gn", 2)))
                memcpy(along + m->parameter[k].offset, g + m->parameter[k].offset, m->parameter[k].count * sizeof *g);
        for (i = 0, squares = 0; i < m->trainable; i++) squares += (double)along[i] * (double)along[i];
        step = 2e-3 / sqrt(squares);
        ckca__device_download(ctx, w, m->values, m->trainable * sizeof *w);
        for (side = 0, up = down = 0; side < 2; side++) {
            for (i = 0; i < m->trainable; i++) moved[i] = w[i] + (float)((side ? -step : step) * (double)along[i]);
            ckca__device_upload(ctx, m->values, moved, m->trainable * sizeof *moved);
            *(side ? &down : &up) = grouped_logits(m, x, dz, 1, z);
        }
        ckca__device_upload(ctx, m->values, w, m->trainable * sizeof *w);
        CHECK(fabs((up - down) / (2 * step) / squares - 1) < 0.01,
              "grouped: the loss rises by %g along its gradient, not %g", (up - down) / (2 * step), squares);
        free(moved), free(along);
    }
    m->folded_valid = 0;
    grouped_logits(m, x, dz, 0, z);
    CHECK(ckca_model_copy(&copy, m) == CKCA_OK, "%s", ckca_error(ctx));
    grouped_logits(copy, x, dz, 0, other);
    CHECK(!memcmp(z, other, sizeof z), "grouped: a copy gives other logits");
    bytes = ckca__graph_write(m, text, sizeof text);
    CHECK(bytes < sizeof text && strstr(text, ";gn gn1 2 2;relu 3;"), "grouped: its text is %s", text);
    CHECK(!ckca_model_bytes(m, 3, 1, &training) && training.workspace >= 2 * 3 * 16 * sizeof(float),
          "grouped: %d bytes of workspace", (int)training.workspace);
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = 12;
    desc.classes = 5;
    for (t = 0; t <= sizeof bad / sizeof *bad; t++) {
        ckca_model *fresh = NULL;
        ckca_status status;
        CHECK(ckca_model_create(ctx, &fresh, &desc) == CKCA_OK, "%s", ckca_error(ctx));
        status = ckca__graph_read(fresh, t ? bad[t - 1] : good);
        CHECK(status == (t ? CKCA_EFORMAT : CKCA_OK), "\"%s\": %s", t ? bad[t - 1] : good,
              status ? ckca_error(ctx) : "taken");
        ckca_model_free(fresh);
    }
#ifndef CKCA_NO_STDIO
    test_enter();
    CHECK(ckca_save(m, "build/grouped.safetensors") == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(ckca_load(ctx, &loaded, "build/grouped.safetensors") == CKCA_OK, "%s", ckca_error(ctx));
    remove("build/grouped.safetensors");
    test_leave();
    if (loaded) {
        grouped_logits(loaded, x, dz, 0, other);
        CHECK(!memcmp(z, other, sizeof z), "grouped: its checkpoint gives other logits");
    }
#endif
    free(w), free(g);
    ckca_model_free(m), ckca_model_free(copy), ckca_model_free(loaded);
}

/* Every row of the tables is filled, and what lies behind a table's end is refused. */
static void test_tables(ckca_context *ctx) {
    static const char *const names[CKCA_ISA_COUNT] = {"best", "plain", "base", "avx2", "avx512"};
    ckca_model *m = grouped(ctx);
    ckca_context *none = NULL;
    ckca_data *data = NULL;
    ckca_array array;
    ckca_desc desc;
    float value[1024];
    unsigned char pixels[432] = {0};
    int i, label = 0;
    for (i = 0; i < CKCA__KIND_COUNT; i++) {
        const ckca__layer *layer = &ckca__layers[i];
        CHECK(ckca__kind_name[i] && ckca__kind_of(ckca__kind_name[i]) == i, "layer %d has no word of its own", i);
        CHECK(layer->build && layer->workspace && (!i || (layer->forward && layer->backward)),
              "layer %s has not all functions", ckca__kind_name[i]);
    }
    for (i = 1; i < CKCA_ISA_COUNT; i++) {
        char name[40];
        memset(&desc, 0, sizeof desc);
        desc.isa = (ckca_isa)i;
        CHECK(ckca_init(&none, &desc) == (ckca__isa_supported(desc.isa) ? CKCA_OK : CKCA_EINVAL), "instruction set %d",
              i);
        CHECK(!strcmp(ckca__isa_name(desc.isa), names[i]), "instruction set %d is called %s", i,
              ckca__isa_name(desc.isa));
        snprintf(name, sizeof name, "host %s x", names[i]);
        CHECK(!ckca__isa_supported(desc.isa) || !CKCA__DEVICE_IS_HOST ||
                  !strncmp(ckca_device(none), name, strlen(name)), "%s is not %s",
              ckca_device(none), name);
        ckca_context_free(none);
        none = NULL;
    }
    for (i = -1; i <= 1; i += 2) {
        memset(&desc, 0, sizeof desc);
        desc.isa = (ckca_isa)(i < 0 ? -1 : CKCA_ISA_COUNT);
        CHECK(ckca_init(&none, &desc) == CKCA_EINVAL, "instruction set %d is taken", (int)desc.isa);
        ckca_context_free(none);
        none = NULL;
        memset(&desc, 0, sizeof desc);
        desc.precision = (ckca_precision)(i < 0 ? -1 : CKCA_PRECISION_COUNT);
        CHECK(ckca_init(&none, &desc) == CKCA_EINVAL, "precision %d is taken", (int)desc.precision);
        ckca_context_free(none);
        none = NULL;
        CHECK(ckca_tensor_read(m, 0, (ckca_slot)(i < 0 ? -1 : CKCA_SLOT_COUNT), value) == CKCA_EINVAL &&
                  strstr(ckca_error(ctx), "slot is"),
              "a slot beyond the last is read: %s", ckca_error(ctx));
    }
    memset(&array, 0, sizeof array);
    array.pixels = pixels, array.labels = &label, array.count = 1, array.classes = 5;
    array.height = array.width = 12, array.channels = 3;
    CHECK(ckca_open_array(ctx, &data, &array, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    for (i = 0; i < 4; i++) {
        ckca_update_desc update;
        memset(&update, 0, sizeof update);
        update.epochs = 1;
        if (i == 0) update.method = CKCA_METHOD_COUNT;
        if (i == 1) update.adakd = CKCA_ADAKD_COUNT;
        if (i == 2) update.featreg = CKCA_FEATREG_COUNT;
        if (i == 3) update.schedule = CKCA_SCHEDULE_COUNT;
        CHECK(ckca_update(m, data, &update, NULL) == CKCA_EINVAL, "an update takes a value behind the last, case %d", i);
    }
    ckca_data_free(data);
    ckca_model_free(m);
}

int main(void) {
    static const net_case cases[] = {
        {"resnet20-a", "resnet20", 0, 4, 10, 4, 12, 10, (int64_t)1 << 30, 16, 15, 1e-5, 1e-4},
        {"resnet20-b", "resnet20", 1, 6, 10, 3, 16, 16, 64, 16, 10, 1e-5, 1e-4},
        {"resnet18-cifar", "resnet18-cifar", 1, 64, 10, 4, 16, 16, 16, 8, 3, 2e-5, 1e-4},
        {"resnet18", "resnet18", 1, 64, 37, 4, 48, 64, 16, 8, 3, 2e-5, 1e-4},
        {"resnet50", "resnet50", 1, 64, 1000, 3, 33, 33, 16, 8, 23, 2e-5, 1e-4},
    };
    /* every instruction set the processor has: the best on all nets, other vectors on three (the third has channels
       enough to fill them), plain C on the two small ones */
    static const ckca_isa isas[] = {CKCA_ISA_BEST, CKCA_ISA_PLAIN, CKCA_ISA_BASE, CKCA_ISA_AVX2};
    ckca_context *ctx;
    size_t i, j;
    if (!open_reference("tests/reference/nets.safetensors")) {
        CHECK(0, "tests/reference/nets.safetensors cannot be read (run from the repository's root)");
        return test_summary();
    }
    test_group("ResNets against PyTorch: logits, loss, gradients, statistics, an SGD step");
    for (i = 0; i < sizeof isas / sizeof *isas; i++) {
        ckca_desc desc;
        if (i && !CKCA__DEVICE_IS_HOST) break; /* instruction sets are the host's */
        memset(&desc, 0, sizeof desc);
        desc.isa = isas[i];
        if (ckca_init(&ctx, &desc) != CKCA_OK) { /* the processor lacks it */
            ckca_context_free(ctx);
            continue;
        }
        for (j = 0; j < sizeof cases / sizeof *cases; j++)
            if (isas[i] == CKCA_ISA_BEST || j < (isas[i] == CKCA_ISA_PLAIN ? 2u : 3u)) test_net(ctx, &cases[j]);
        ckca_context_free(ctx);
    }
    CHECK(ckca_init(&ctx, NULL) == CKCA_OK, "no context");
    test_group("memory plan: the same gradients whatever is kept");
    test_plan(ctx, "irregular", 6, 0, 8, 3);
    test_plan(ctx, "grouped", 6, 0, 0, 0);
    test_plan(ctx, "resnet20", 4, 16, 9, 0);
    test_plan(ctx, "resnet18", 2, 64, 8 + 1 + 3, 3);
    test_plan(ctx, "resnet50", 2, 32, 2 * 16 + 1 + 4, 4);
    test_group("memory plan: bytes of activations");
    test_plan_size(ctx, "resnet20", 32, CONV_MAY_NORM ? 0.865e6 : 0.885e6);
    test_plan_size(ctx, "resnet18", 224, CONV_MAY_NORM ? 11.85e6 : 11.95e6);
    test_plan_size(ctx, "resnet50", 224, 47.4e6);
    test_group("group norm in a network");
    test_grouped(ctx);
    test_group("one row per kind, form and instruction set");
    test_tables(ctx);
    test_group("architectures: parameter counts and features");
    test_structure(ctx);
    test_group("initial weights");
    test_initial(ctx, "resnet20", "bn2.weight", 0);
    test_initial(ctx, "resnet20", "bn2.weight", 1);
    test_initial(ctx, "resnet50-cifar", "bn3.weight", 1);
    ckca_context_free(ctx);
    free(file_bytes);
    return test_summary();
}
