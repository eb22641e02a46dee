/* test_transfer.c: starting from what others trained.
     1. grouped convolutions, and a network with some of its layers frozen, against PyTorch (tests/torch_transfer.py);
     2. frozen parts: memory, bits, what is refused, resuming;
     3. backbones: what fits is loaded, damaged files leave the model as it was;
     4. features, heads from class means, added classes. */
#define CKCA_IMPLEMENTATION
#define CKCA_STATIC
#include "ckca.h"
#include "test.h"
#include "device.h"

static ckca__st_file reference;
static ckca_context *ctx;

/* ---- helpers ---- */

static const float *wanted(const char *name, size_t *count) {
    const ckca__st_tensor *tensor = ckca__st_find(&reference, name);
    CHECK(tensor != NULL, "the reference has no %s", name);
    if (!tensor) exit(2);
    if (count) *count = (tensor->end - tensor->begin) / sizeof(float);
    return (const float *)(const void *)(reference.bytes + tensor->begin);
}

static void near(const char *name, const float *got, double tolerance) {
    size_t count, i;
    const float *want = wanted(name, &count);
    double error = 0, norm = 0;
    for (i = 0; i < count; i++) {
        error += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        norm += (double)want[i] * want[i];
    }
    error = sqrt(error / norm);
    CHECK(error < tolerance, "%s: relative error %.2e, allowed %.0e", name, error, tolerance);
}

static void refused(ckca_status status, ckca_status expected, const char *sentence) {
    CHECK(status == expected && strstr(ckca_error(ctx), sentence), "status %s, \"%s\"; expected %s, \"%s\"",
          ckca_status_name(status), ckca_error(ctx), ckca_status_name(expected), sentence);
}

#define OK(call)                                                            \
    do {                                                                    \
        ckca_status status_of_call = (call);                                \
        CHECK(status_of_call == CKCA_OK, "%s: %s", #call, ckca_error(ctx)); \
    } while (0)

/* All values of a model, of m->all floats; the caller frees them. */
static float *values_of(ckca_model *m) {
    float *host = (float *)malloc(m->all * sizeof *host);
    ckca__device_download(ctx, host, m->values, m->all * sizeof *host);
    return host;
}

/* 1 if two models have the same values in a tensor. */
static int tensor_equal(ckca_model *a, ckca_model *b, const char *name) {
    const size_t count = a->parameter[ckca_tensor_find(a, name)].count;
    float *values = (float *)malloc(2 * count * sizeof *values);
    int same;
    OK(ckca_tensor_read(a, ckca_tensor_find(a, name), CKCA_SLOT_VALUE, values));
    OK(ckca_tensor_read(b, ckca_tensor_find(b, name), CKCA_SLOT_VALUE, values + count));
    same = !memcmp(values, values + count, count * sizeof *values);
    free(values);
    return same;
}

static int tensor_same(ckca_model *m, const float *before, const char *name) {
    const ckca__parameter *p = &m->parameter[ckca_tensor_find(m, name)];
    float *now = values_of(m);
    const int same = !memcmp(now + p->offset, before + p->offset, p->count * sizeof *now);
    free(now);
    return same;
}

/* Pictures of 8 x 8 x 3: class k is brighter in channel k % 3 of rows from k on; noise. */
static ckca_data *draw(int count, int classes, int from, int only, const char *const *names) {
    unsigned char *pixels = (unsigned char *)malloc((size_t)count * 192);
    int *labels = (int *)malloc((size_t)count * sizeof *labels), i, j;
    ckca_array array = {pixels, labels, count, 8, 8, 3, classes, names};
    ckca_data *data = NULL;
    for (i = 0; i < count; i++) {
        labels[i] = from + i % only;
        for (j = 0; j < 192; j++) {
            const int bright = j % 3 == labels[i] % 3 && j / 24 >= labels[i];
            pixels[i * 192 + j] =
                (unsigned char)(ckca__random(5, (uint64_t)(i + 1000 * from), (uint64_t)j) % 120 + 110 * bright);
        }
    }
    OK(ckca_open_array(ctx, &data, &array, NULL));
    free(pixels), free(labels);
    return data;
}

static ckca_model *resnet(const char *arch, int classes, uint64_t seed, const char *const *names) {
    static const float mean[3] = CKCA_IMAGENET_MEAN, std[3] = CKCA_IMAGENET_STD;
    ckca_model *m = NULL;
    ckca_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = 8;
    desc.classes = classes;
    desc.class_names = names;
    desc.seed = seed;
    desc.mean = mean;
    desc.std = std;
    desc.width_base = strstr(arch, "resnext") ? 16 : 8;
    OK(ckca_resnet(ctx, &m, arch, &desc));
    return m;
}

/* ---- 1. against PyTorch ---- */

static void test_grouped(void) {
    int groups;
    for (groups = 2; groups <= 4; groups += 2) {
        ckca__conv s = {2, 7, 6, 8, 12, 3, 3, groups / 2, 1, 0, 0, NULL, 0, 0, NULL, NULL, 0};
        float out[2000], w[2000], b[12];
        char name[6][24];
        static const char *const what[6] = {"x", "w", "b", "dy", "d_w", "d_b"};
        void *ws;
        int i;
        s.groups = groups;
        s.p = (7 + 2 - 3) / s.stride + 1, s.q = (6 + 2 - 3) / s.stride + 1;
        for (i = 0; i < 6; i++) snprintf(name[i], sizeof name[i], "grouped%d.%s", groups, what[i]);
        ws = ckca__alloc(ctx, ckca__conv_workspace(ctx, &s));
        ckca__op_conv_forward(ctx, &s, wanted(name[0], NULL), wanted(name[1], NULL), wanted(name[2], NULL), NULL, 0,
                              out, ws);
        near(groups == 2 ? "grouped2.y" : "grouped4.y", out, 1e-5);
        ckca__op_conv_backward_data(ctx, &s, wanted(name[3], NULL), wanted(name[1], NULL), out, 0, ws);
        near(groups == 2 ? "grouped2.d_x" : "grouped4.d_x", out, 1e-5);
        memset(w, 0, sizeof w), memset(b, 0, sizeof b);
        ckca__op_conv_backward_weight(ctx, &s, wanted(name[0], NULL), wanted(name[3], NULL), w, b, ws);
        near(name[4], w, 1e-5);
        near(name[5], b, 1e-5);
        ckca__release(ctx, ws);
    }
}

/* The network of torch_transfer.py. */
static ckca_model *small_net(void) {
    ckca_model *m = NULL;
    ckca_model_desc desc;
    ckca_conv_desc conv;
    int x, y;
    memset(&desc, 0, sizeof desc), memset(&conv, 0, sizeof conv);
    desc.height = 7, desc.width = 6, desc.classes = 5;
    conv.out = 8, conv.pad = 1;
    OK(ckca_model_create(ctx, &m, &desc));
    x = ckca_layer_input(m);
    x = ckca_layer_relu(m, ckca_layer_batchnorm(m, "bn1", ckca_layer_conv(m, "conv1", x, conv)));
    conv.groups = 4;
    y = ckca_layer_relu(m, ckca_layer_batchnorm(m, "bn2", ckca_layer_conv(m, "conv2", x, conv)));
    conv.groups = 0, conv.bias = 1;
    y = ckca_layer_batchnorm(m, "bn3", ckca_layer_conv(m, "conv3", y, conv));
    x = ckca_layer_relu(m, ckca_layer_add(m, y, x));
    OK(ckca_model_finish(m, ckca_layer_linear(m, "fc", ckca_layer_avgpool(m, x), 5)));
    return m;
}

static void test_frozen_steps(void) {
    static const char *const frozen[8][7] = {
        {0}, {"conv1", "bn1"}, {"bn2", "conv3"}, {NULL}, {"bn1"}, {"conv1", "bn1", "conv2"}, {0}, {"fc"}};
    const int *labels = (const int *)(const void *)wanted("labels", NULL);
    int c, i, j, step;
    for (c = 0; c < 8; c++) {
        ckca_model *m = small_net();
        ckca_sgd_desc sgd;
        char name[64];
        float z[30], dz[30];
        memset(&sgd, 0, sizeof sgd);
        sgd.lr = 0.1f, sgd.weight_decay = 0.05f;
        for (i = 0; i < ckca_tensor_count(m); i++) {
            ckca_tensor_info about;
            ckca_tensor_info_get(m, i, &about);
            snprintf(name, sizeof name, "start.%s", about.name);
            OK(ckca_tensor_write(m, i, CKCA_SLOT_VALUE, wanted(name, NULL)));
        }
        if (c == 3) OK(ckca_freeze(m, NULL));
        if (c == 6) OK(ckca_learning_rate(m, NULL, 0.1f));
        for (i = 0; frozen[c][i]; i++) OK(ckca_freeze(m, frozen[c][i]));
        for (step = 0; step < 3; step++) {
            OK(ckca_forward(m, wanted("pictures", NULL), 6, 1));
            OK(ckca_node_read(m, m->logits, z));
            snprintf(name, sizeof name, "case%d.logits%d", c, step);
            near(name, z, 2e-5);
            for (i = 0; i < 6; i++) {
                double sum = 0;
                for (j = 0; j < 5; j++) sum += exp((double)z[5 * i + j]);
                for (j = 0; j < 5; j++)
                    dz[5 * i + j] = (float)((exp((double)z[5 * i + j]) / sum - (labels[i] == j)) / 6);
            }
            OK(ckca_zero_gradients(m));
            OK(ckca_backward(m, dz, NULL));
            OK(ckca_sgd(m, &sgd));
        }
        for (i = 0; i < ckca_tensor_count(m); i++) {
            ckca_tensor_info about;
            float values[600];
            ckca_tensor_info_get(m, i, &about);
            OK(ckca_tensor_read(m, i, CKCA_SLOT_VALUE, values));
            snprintf(name, sizeof name, "case%d.%s", c, about.name);
            near(name, values, 2e-5);
        }
        ckca_model_free(m);
    }
}

/* ---- 2. frozen parts ---- */

static void test_frozen(void) {
    ckca_model *m = resnet("resnet18-cifar", 3, 1, NULL), *other;
    ckca_data *data = draw(24, 3, 0, 3, NULL);
    ckca_bytes train, head, evaluate;
    ckca_update_desc d;
    ckca_tensor_info about;
    float *before, *after, number[512];
    size_t i;
    int method, moved = 0, updates = 0, still = 0;
    memset(&d, 0, sizeof d);
    d.epochs = 2, d.batch = 8, d.lr = 0.05f, d.augment.flip = 1;
    OK(ckca_model_bytes(m, 16, 1, &train));
    OK(ckca_model_bytes(m, 16, 0, &evaluate));
    OK(ckca_freeze(m, NULL));
    OK(ckca_model_bytes(m, 16, 1, &head));
    CHECK((double)head.total <= 1.3 * (double)evaluate.total && head.total < train.total,
          "bytes of a step: %zu of all layers, %zu of the head, %zu in evaluation", train.total, head.total,
          evaluate.total);
    /* every method leaves frozen layers as they are, running statistics included, and moves the head */
    for (method = 0; method < CKCA_METHOD_COUNT; method++) {
        d.method = (ckca_method)method;
        if (d.method == CKCA_METHOD_EWC || d.method == CKCA_METHOD_REPLAY) continue; /* they need a memory */
        updates++;
        before = values_of(m);
        OK(ckca_update(m, data, &d, NULL));
        after = values_of(m);
        for (i = 0; i < (size_t)m->parameters; i++) {
            const ckca__parameter *p = &m->parameter[i];
            if (!memcmp(before + p->offset, after + p->offset, p->count * sizeof *after))
                still++;
            else
                moved += p->node == m->logits ? 1 : 1000;
        }
        free(before), free(after);
    }
    CHECK(moved == 2 * updates, "%d tensors moved in %d updates of two each (1000: a frozen one)", moved, updates);
    /* without augmentation the features are computed once: the same as computing them again and again */
    memset(&d.augment, 0, sizeof d.augment);
    d.method = CKCA_METHOD_WARM;
    OK(ckca_model_copy(&other, m));
    OK(ckca_update(m, data, &d, NULL));
    d.augment.jitter = 1e-30f; /* counts as augmentation, and changes nothing */
    OK(ckca_update(other, data, &d, NULL));
    before = values_of(m), after = values_of(other);
    for (i = 0, moved = 0; i < m->all; i++) moved += !(fabsf(before[i] - after[i]) <= 1e-5f + 1e-4f * fabsf(after[i]));
    CHECK(!moved, "%d values differ between cached features and computed ones", moved);
    free(before), free(after);
    ckca_model_free(other);
    /* what is refused, and thawing */
    refused(ckca_tensor_read(m, 0, CKCA_SLOT_GRADIENT, number), CKCA_EINVAL, "conv1.weight is frozen");
    CHECK(ckca_freeze(NULL, "") == CKCA_EINVAL && ckca_learning_rate(NULL, "", 1) == CKCA_EINVAL &&
              ckca_imprint(NULL, data, 0) == CKCA_EINVAL && ckca_add_classes(NULL, NULL, 1) == CKCA_EINVAL &&
              ckca_features(NULL, NULL, 1, number) == CKCA_EINVAL && ckca_load_backbone(NULL, "x", NULL) == CKCA_EINVAL,
          "a call on no model");
    refused(ckca_freeze(m, "layer9"), CKCA_EINVAL, "no layer's name begins with \"layer9\" (they are conv1 to fc)");
    refused(ckca_freeze(m, "layer"), CKCA_EINVAL, "no layer's name begins with \"layer\"");
    refused(ckca_freeze(m, "fc.weight"), CKCA_EINVAL, "begins with \"fc.weight\"");
    refused(ckca_learning_rate(m, "fc", -1), CKCA_EINVAL, "factor is -1");
    refused(ckca_learning_rate(m, "fc", NAN), CKCA_EINVAL, "factor is");
    OK(ckca_freeze(m, ""));
    before = values_of(m);
    refused(ckca_update(m, data, &d, NULL), CKCA_EINVAL, "all layers are frozen");
    refused(ckca_forward(m, number, 1, 1), CKCA_EINVAL, "all layers are frozen");
    CHECK(tensor_same(m, before, "fc.weight"), "a refused update changed the model");
    OK(ckca_learning_rate(m, "layer4", 0.5f));
    OK(ckca_learning_rate(m, "fc", 1));
    OK(ckca_update(m, data, &d, NULL));
    CHECK(!tensor_same(m, before, "layer4.0.conv1.weight") && !tensor_same(m, before, "fc.bias") &&
              !tensor_same(m, before, "layer4.1.bn2.running_mean") &&
              tensor_same(m, before, "layer3.1.bn2.running_mean") && tensor_same(m, before, "layer3.1.conv2.weight") &&
              tensor_same(m, before, "conv1.weight"),
          "layer4 and fc are trained, the others not");
    OK(ckca_tensor_info_get(m, ckca_tensor_find(m, "layer4.0.bn1.weight"), &about));
    OK(ckca_tensor_read(m, ckca_tensor_find(m, about.name), CKCA_SLOT_MOMENTUM, number));
    free(before);
    ckca_data_free(data);
    ckca_model_free(m);
}

static int stop_at(const ckca_progress *p, void *user) { return p->epoch * 10 + p->batch == *(const int *)user; }

/* Stops an update after any SGD step and resumes it from its state: the same bits. Under other frozen layers: refused. */
static void test_resume(void) {
    const int frozen = 2;
    int way, at;
    ckca_data *data = draw(20, 3, 0, 3, NULL);
    for (way = 0; way < frozen; way++) {
        ckca_model *whole = resnet("resnet8", 3, 2, NULL), *part, *start;
        ckca_update_desc d;
        float *want, *got;
        memset(&d, 0, sizeof d);
        d.epochs = 3, d.batch = 8, d.lr = 0.05f, d.augment.flip = way;
        OK(ckca_freeze(whole, way ? "layer1" : NULL));
        if (way) {
            OK(ckca_freeze(whole, "conv1"));
            OK(ckca_learning_rate(whole, "layer2", 0.1f));
        }
        OK(ckca_model_copy(&start, whole));
        OK(ckca_update(whole, data, &d, NULL));
        want = values_of(whole);
        for (at = 2; at <= 13; at += 11) {
            OK(ckca_model_copy(&part, start));
            d.state = "build/transfer.state", d.progress = stop_at, d.user = &at;
            CHECK(ckca_update(part, data, &d, NULL) == CKCA_ESTOP, "not stopped: %s", ckca_error(ctx));
            ckca_model_free(part);
            OK(ckca_model_copy(&part, start));
            d.progress = NULL;
            OK(ckca_freeze(part, "fc"));
            if (!way) OK(ckca_learning_rate(part, "layer3", 1));
            refused(ckca_update(part, data, &d, NULL), CKCA_EINVAL, "frozen layers or settings");
            ckca_model_free(part);
            OK(ckca_model_copy(&part, start));
            OK(ckca_update(part, data, &d, NULL));
            got = values_of(part);
            CHECK(!memcmp(want, got, whole->all * sizeof *got), "way %d, stopped at %d: other bits", way, at);
            free(got);
            remove(d.state);
            d.state = NULL;
            ckca_model_free(part);
        }
        free(want);
        ckca_model_free(whole);
        ckca_model_free(start);
    }
    ckca_data_free(data);
}

/* ---- 3. backbones ---- */

static void *saved(ckca_model *m, size_t *size) {
    void *bytes;
    OK(ckca_save_memory(m, NULL, 0, size));
    bytes = malloc(*size);
    OK(ckca_save_memory(m, bytes, *size, size));
    return bytes;
}

static size_t budget;
static void *limited(size_t bytes, void *user) {
    (void)user;
    return budget && budget-- ? malloc(bytes) : NULL;
}
static void give_back(void *memory, size_t bytes, void *user) {
    (void)bytes, (void)user;
    free(memory);
}

static void test_backbone(void) {
    static const char *const archs[] = {"resnet18", "resnext50_32x4d", "wide_resnet50_2"};
    static const struct {
        const char *arch;
        int64_t parameters;
    } sizes[] = {
        {"resnet101", 2682906}, {"resnet152", 3669274}, {"wide_resnet50_2", 4196826}, {"resnext50_32x4d", 1455930}};
    ckca_model *m, *from, *loaded;
    ckca_backbone report;
    ckca_model_info info;
    size_t size, cut, i, at;
    unsigned char *bytes, *changed;
    float *before, *after;
    const char *header;
    int wrong = 0;
    /* a quarter of the width; at 64 and 1000 classes the formula behind these gives torchvision's 44549160, 60192808,
       68883240, 25028904 */
    for (i = 0; i < 4; i++) {
        ckca_model_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.classes = 10, desc.width_base = 16;
        m = NULL;
        OK(ckca_resnet(ctx, &m, sizes[i].arch, &desc));
        ckca_model_info_get(m, &info);
        CHECK(info.parameters == sizes[i].parameters && info.features == 512, "%s: %lld parameters, %d features",
              sizes[i].arch, (long long)info.parameters, info.features);
        ckca_model_free(m);
    }
    for (i = 0; i < 3; i++) {
        from = resnet(archs[i], 7, 3, NULL), m = resnet(archs[i], 3, 4, NULL);
        bytes = (unsigned char *)saved(from, &size);
        before = values_of(m);
        memset(&report, -1, sizeof report);
        OK(ckca_load_backbone_memory(m, bytes, size, &report));
        CHECK(report.taken == ckca_tensor_count(m) - 2 && !report.left && !report.missing && !*report.first_left &&
                  !*report.first_missing,
              "%s: %d taken, %d left (%s), %d missing (%s)", archs[i], report.taken, report.left, report.first_left,
              report.missing, report.first_missing);
        CHECK(tensor_same(m, before, "fc.weight") && tensor_same(m, before, "fc.bias") &&
                  tensor_equal(m, from, "conv1.weight") && tensor_equal(m, from, "layer4.1.conv2.weight"),
              "%s: the head stays, the rest comes", archs[i]);
        free(before);
        /* the graph's text: a checkpoint of it loads, with the same outputs */
        loaded = NULL;
        OK(ckca_load_memory(ctx, &loaded, bytes, size));
        if (loaded) {
            unsigned char pixels[192];
            float a[7], b[7];
            for (at = 0; at < 192; at++) pixels[at] = (unsigned char)(at * 37);
            OK(ckca_predict(loaded, pixels, 1, a));
            OK(ckca_predict(from, pixels, 1, b));
            CHECK(!memcmp(a, b, sizeof a), "%s: saved and loaded, other outputs", archs[i]);
            ckca_model_free(loaded);
        }
        ckca_model_free(m), ckca_model_free(from), free(bytes);
    }
    /* another network: what fits is taken, the rest is told */
    from = resnet("resnet34", 7, 3, NULL), m = resnet("resnet18", 7, 4, NULL);
    bytes = (unsigned char *)saved(from, &size);
    before = values_of(m);
    OK(ckca_load_backbone_memory(m, bytes, size, &report));
    CHECK(report.taken == 100 && report.left == 80 && !report.missing &&
              !strcmp(report.first_left, "layer1.2.bn1.bias") && tensor_same(m, before, "fc.weight"),
          "resnet34 into resnet18: %d taken, %d left (%s), %d missing", report.taken, report.left, report.first_left,
          report.missing);
    free(before), ckca_model_free(m), ckca_model_free(from);
    m = resnet("resnet20", 7, 4, NULL);
    before = values_of(m);
    refused(ckca_load_backbone_memory(m, bytes, 1000, NULL), CKCA_EFORMAT, "");
    OK(ckca_load_backbone_memory(m, bytes, size, &report));
    CHECK(report.missing > 0 && *report.first_missing, "resnet34 into resnet20: %d missing", report.missing);
    ckca_model_free(m), free(bytes), free(before);
    m = small_net(), from = resnet("resnet8", 7, 4, NULL);
    bytes = (unsigned char *)saved(from, &size);
    before = values_of(m);
    OK(ckca_load_backbone_memory(m, bytes, size, &report)); /* conv1 and bn1 have 8 channels in both */
    CHECK(report.taken == 5 && report.missing == 11 && !strcmp(report.first_missing, "conv2.weight"),
          "resnet8 into another network: %d taken, %d missing (%s)", report.taken, report.missing,
          report.first_missing);
    ckca_model_free(m), ckca_model_free(from), free(before), free(bytes);
    /* damaged files, names with prefixes, and allocations that fail: the model is as it was */
    from = resnet("resnet8", 7, 3, NULL), m = resnet("resnet8", 3, 4, NULL);
    bytes = (unsigned char *)saved(from, &size);
    changed = (unsigned char *)malloc(size + 100);
    before = values_of(m);
    for (cut = 0; cut < size; cut += cut < 9000 ? 61 : 2003) wrong += !ckca_load_backbone_memory(m, bytes, cut, NULL);
    for (i = 8; i < 7000; i += 13) {
        memcpy(changed, bytes, size);
        changed[i] = (unsigned char)(changed[i] ^ (1u << i % 7));
        memset(&report, 0, sizeof report);
        if (ckca_load_backbone_memory(m, changed, size, &report) == CKCA_OK) { /* a name, a number of no consequence */
            ckca__device_upload(ctx, m->values, before, m->all * sizeof *before);
            wrong += report.taken < 1;
        }
        after = values_of(m);
        wrong += memcmp(before, after, m->all * sizeof *after) != 0;
        free(after);
    }
    CHECK(!wrong, "%d damaged files were loaded, or changed the model", wrong);
    memcpy(changed, bytes, size);
    header = strstr((char *)changed + 8, "\"conv1.weight\"");
    if (header) ((char *)changed)[header - (char *)changed + 1] = 'k';
    OK(ckca_load_backbone_memory(m, changed, size, &report));
    CHECK(report.missing == 1 && report.left == 1 && !strcmp(report.first_left, "konv1.weight") &&
              !strcmp(report.first_missing, "conv1.weight"),
          "a tensor renamed: %d missing, %d left (%s)", report.missing, report.left, report.first_left);
    ckca__device_upload(ctx, m->values, before, m->all * sizeof *before);
    {
        const ckca_desc few = {1, CKCA_ISA_BEST, 0, CKCA_PRECISION_FLOAT32, limited, give_back, NULL, NULL};
        ckca_context *poor = NULL;
        ckca_model *n = NULL;
        ckca_model_desc desc;
        size_t most;
        memset(&desc, 0, sizeof desc);
        desc.height = desc.width = 8, desc.classes = 3, desc.width_base = 8;
        budget = 100000;
        if (ckca_init(&poor, &few) || ckca_resnet(poor, &n, "resnet8", &desc)) exit(2);
        for (most = 0, wrong = 0; most < 40; most++) {
            ckca_status status;
            budget = most;
            status = ckca_load_backbone_memory(n, bytes, size, NULL);
            wrong += status != CKCA_OK && status != CKCA_ENOMEM;
            if (!status) break;
        }
        CHECK(!wrong && most > 3 && most < 40, "%d allocations failed otherwise, of %zu", wrong, most);
        budget = 100000;
        ckca_model_free(n), ckca_context_free(poor);
    }
    refused(ckca_load_backbone_memory(m, NULL, 0, NULL), CKCA_EINVAL, "bytes is NULL");
    refused(ckca_load_backbone(m, NULL, NULL), CKCA_EINVAL, "path is NULL");
    refused(ckca_load_backbone(m, "build/no", NULL), CKCA_EIO, "No such file");
    free(before), free(changed), free(bytes), ckca_model_free(m), ckca_model_free(from);
    m = NULL;
    {
        ckca_model_desc desc;
        ckca_conv_desc conv;
        memset(&desc, 0, sizeof desc), memset(&conv, 0, sizeof conv);
        desc.classes = 2;
        conv.out = 6, conv.groups = 2;
        OK(ckca_model_create(ctx, &m, &desc));
        CHECK(ckca_layer_conv(m, "c", ckca_layer_input(m), conv) == -1 &&
                  strstr(ckca_error(ctx), "2 groups do not divide"),
              "%s", ckca_error(ctx));
        ckca_model_free(m);
    }
}

/* ---- 4. heads ---- */

static void test_heads(void) {
    static const char *const names[] = {"a", "b", "c", "d", "e"}, *const twice[] = {"d", "a"};
    ckca_model *m = resnet("resnet8", 3, 5, names), *old;
    ckca_data *data = draw(60, 3, 0, 3, names), *test = draw(90, 3, 0, 3, names), *two = draw(4, 3, 0, 2, names);
    ckca_data *fresh = draw(40, 5, 3, 2, names), *all = draw(100, 5, 0, 5, names);
    ckca_data_info info;
    ckca_score score, again;
    ckca_update_desc d;
    ckca_report report;
    float features[60 * 32], logits[2][60 * 5], *before, input[192];
    double mean[3][32], worst = 0;
    int i, j, k, hits = 0;
    memset(&d, 0, sizeof d);
    /* ckca_features is what the head reads */
    ckca_data_info_get(data, &info);
    OK(ckca_features(m, ckca_pixels(data, 0), 1, features));
    OK(ckca_get_batch(m, data, &hits, 1, NULL, 0, 0, input, NULL));
    OK(ckca_forward(m, input, 1, 0));
    OK(ckca_node_read(m, m->pooled, features + 32));
    CHECK(!memcmp(features, features + 32, 32 * sizeof *features), "features by two ways differ");
    refused(ckca_features(m, NULL, 1, features), CKCA_EINVAL, "ckca_features: pixels is NULL");
    /* the head of class means chooses the nearest one */
    before = values_of(m);
    refused(ckca_imprint(m, two, 0), CKCA_EINVAL, "class 2 (\"c\") has no picture");
    refused(ckca_imprint(m, data, 3), CKCA_EINVAL, "first is 3");
    CHECK(tensor_same(m, before, "fc.weight"), "a refused imprint changed the head");
    OK(ckca_imprint(m, data, 0));
    CHECK(!tensor_same(m, before, "fc.weight") && tensor_same(m, before, "conv1.weight"),
          "imprint sets the head alone");
    free(before);
    memset(mean, 0, sizeof mean);
    for (i = 0; i < 60; i++) OK(ckca_features(m, ckca_pixels(data, i), 1, features + 32 * i));
    for (i = 0; i < 60; i++)
        for (j = 0; j < 32; j++) mean[ckca_label(data, i)][j] += (double)features[32 * i + j] / 20;
    for (i = 0; i < 60; i++) {
        double least = 0;
        float p[3];
        int nearest = -1, most = 0;
        OK(ckca_predict(m, ckca_pixels(data, i), 1, p));
        for (k = 0; k < 3; k++) {
            double distance = 0;
            for (j = 0; j < 32; j++)
                distance += ((double)features[32 * i + j] - mean[k][j]) * ((double)features[32 * i + j] - mean[k][j]);
            if (nearest < 0 || distance < least) nearest = k, least = distance;
            if (p[k] > p[most]) most = k;
        }
        hits += most == nearest;
    }
    CHECK(hits == 60, "%d of 60 pictures get the class of the nearest mean", hits);
    OK(ckca_evaluate(m, test, &score, NULL));
    CHECK(score.top1 > 0.6 && score.loss < 1.05, "class means of random features: accuracy %.2f, loss %.3f", score.top1,
          score.loss);
    /* a linear probe improves on them */
    OK(ckca_freeze(m, NULL));
    d.epochs = 30, d.batch = 20, d.lr = 0.1f, d.method = CKCA_METHOD_WARM;
    OK(ckca_update(m, data, &d, &report));
    OK(ckca_evaluate(m, test, &again, NULL));
    CHECK(again.loss < score.loss && again.top1 >= score.top1 - 0.05, "linear probe: loss %.3f after %.3f", again.loss,
          score.loss);
    /* more classes */
    OK(ckca_learning_rate(m, "", 1));
    d.epochs = 8, d.lr = 0.05f;
    OK(ckca_update(m, data, &d, &report));
    OK(ckca_model_copy(&old, m));
    before = values_of(m);
    refused(ckca_add_classes(m, twice, 2), CKCA_EINVAL, "\"a\"");
    refused(ckca_add_classes(m, names, 0), CKCA_EINVAL, "count is 0");
    refused(ckca_add_classes(m, NULL, 1), CKCA_EINVAL, "names is NULL");
    CHECK(m->classes == 3 && tensor_same(m, before, "fc.weight"), "a refused call changed the model");
    free(before);
    OK(ckca_add_classes(m, names + 3, 2));
    CHECK(m->classes == 5 && !strcmp(m->class_names[4], "e") && ckca_data_like(m).classes == 5,
          "five classes with names");
    for (k = 0; k < 2; k++) { /* before and after ckca_imprint: the old logits are as they were */
        if (k) OK(ckca_imprint(m, fresh, 3));
        for (i = 0; i < 20; i++) {
            OK(ckca_get_batch(old, data, &i, 1, NULL, 0, 0, input, NULL));
            OK(ckca_forward(old, input, 1, 0));
            OK(ckca_node_read(old, old->logits, logits[0]));
            OK(ckca_forward(m, input, 1, 0));
            OK(ckca_node_read(m, m->logits, logits[1]));
            for (j = 0; j < 3; j++) worst = fmax(worst, fabs((double)logits[0][j] - (double)logits[1][j]));
        }
    }
    CHECK(worst < 1e-6, "old logits moved by %g", worst);
    CHECK(!memcmp(m->centroids.mean, old->centroids.mean, 3 * (size_t)m->features * sizeof(float)) &&
              m->centroids.count[2] == old->centroids.count[2] && m->centroids.count[3] == 0 && m->centroids.count[4] == 0,
          "the class means are not those of before, and none for the new classes");
    OK(ckca_evaluate(m, fresh, &score, NULL));
    CHECK(score.top1 > 0.5, "imprinted classes: %.2f right of new pictures", score.top1);
    d.method = CKCA_METHOD_CKCA;
    /* distillation over the old classes alone: the term is 0 where the old logits are the teacher's, whatever the new
       ones are, and its gradient reaches the old rows only */
    d.adakd = CKCA_ADAKD_CONSTANT, d.w_feat = CKCA_OFF, d.epochs = 1, d.batch = 40, d.lr = 1e-9f,
    d.warmup_epochs = CKCA_OFF;
    OK(ckca_freeze(m, NULL));
    OK(ckca_update(m, fresh, &d, &report));
    CHECK(report.kd >= 0 && report.kd < 1e-6, "AdaKD of the same old logits is %g", report.kd);
    CHECK(m->known == 0, "an update is the end of it");
    OK(ckca_evaluate(m, all, &score, NULL));
    printf("after adding two classes: %.2f of five\n", score.top1);
    ckca_data_free(data), ckca_data_free(test), ckca_data_free(two), ckca_data_free(fresh), ckca_data_free(all);
    ckca_model_free(old), ckca_model_free(m);
}

/* Two SGD steps of the head with AdaKD over the first classes, against the formula in double. separate: pictures of new
   classes alone, whose cross-entropy is over the new classes. */
static void test_known(int separate) {
    static const char *const names[] = {"a", "b", "c", "d", "e"};
    enum { K = 5, OLD = 3, N = 12 };
    ckca_model *m = resnet("resnet8", OLD, 6, names);
    ckca_data *first = draw(30, OLD, 0, OLD, names), *data;
    ckca_update_desc d;
    float features[N * 32], *before, *after, z[N * K];
    double dw[K * 32], db[K];
    size_t w, b;
    int i, j, e;
    memset(&d, 0, sizeof d);
    d.epochs = 3, d.batch = 10, d.lr = 0.05f;
    OK(ckca_update(m, first, &d, NULL));
    OK(ckca_add_classes(m, names + OLD, K - OLD));
    data = separate ? draw(N, K, OLD, K - OLD, names) : draw(N, K, 0, K, names);
    OK(ckca_imprint(m, data, OLD));
    OK(ckca_freeze(m, NULL));
    before = values_of(m);
    w = m->parameter[ckca_tensor_find(m, "fc.weight")].offset, b = m->parameter[ckca_tensor_find(m, "fc.bias")].offset;
    for (i = 0; i < N; i++) OK(ckca_features(m, ckca_pixels(data, i), 1, features + 32 * i));
    memset(&d, 0, sizeof d);
    d.epochs = 2, d.batch = N, d.lr = 0.5f, d.warmup_epochs = CKCA_OFF, d.w_kd = 3, d.weight_decay = CKCA_OFF;
    d.momentum = CKCA_OFF, d.no_nesterov = 1, d.schedule = CKCA_SCHEDULE_CONSTANT, d.adakd = CKCA_ADAKD_CONSTANT;
    OK(ckca_update(m, data, &d, NULL));
    after = values_of(m);
    for (e = 0; e < 2; e++) { /* the same two steps; before holds the weights, z the teacher's logits at first */
        static float teacher[N * K];
        memset(dw, 0, sizeof dw), memset(db, 0, sizeof db);
        for (i = 0; i < N; i++) {
            double sum = 0, s2 = 0, o2 = 0;
            for (j = 0; j < K; j++) {
                double v = (double)before[b + (size_t)j];
                int c;
                for (c = 0; c < 32; c++) v += (double)before[w + (size_t)(32 * j + c)] * (double)features[32 * i + c];
                z[i * K + j] = (float)v;
                if (!e) teacher[i * K + j] = (float)v;
            }
            for (j = separate ? OLD : 0; j < K; j++) sum += exp((double)z[i * K + j]);
            for (j = 0; j < OLD; j++) s2 += exp((double)z[i * K + j] / 2), o2 += exp((double)teacher[i * K + j] / 2);
            for (j = 0; j < K; j++) {
                double g = exp((double)z[i * K + j]) / sum - (ckca_label(data, i) == j);
                int c;
                if (separate && j < OLD) g = 0;
                if (j < OLD)
                    g += 3 * 2 * (exp((double)z[i * K + j] / 2) / s2 - exp((double)teacher[i * K + j] / 2) / o2);
                db[j] += g / N;
                for (c = 0; c < 32; c++) dw[32 * j + c] += g / N * (double)features[32 * i + c];
            }
        }
        for (j = 0; j < K; j++) before[b + (size_t)j] -= (float)(0.5 * db[j]);
        for (j = 0; j < 32 * K; j++) before[w + (size_t)j] -= (float)(0.5 * dw[j]);
    }
    for (i = 0; i < 32 * K; i++)
        if (fabsf(before[w + (size_t)i] - after[w + (size_t)i]) > 1e-4f * (1 + fabsf(after[w + (size_t)i]))) break;
    CHECK(i == 32 * K, "fc.weight[%d] is %g, expected %g", i, (double)after[w + (size_t)(i % (32 * K))],
          (double)before[w + (size_t)(i % (32 * K))]);
    free(before), free(after);
    ckca_data_free(first), ckca_data_free(data), ckca_model_free(m);
}

int main(void) {
    ckca_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.threads = 1;
    test_enter();
    if (ckca_init(&ctx, &desc) || ckca__st_open(ctx, "tests/reference/transfer.safetensors", &reference)) {
        printf("FAIL: %s\n", ckca_error(ctx));
        return 1;
    }
    test_group("grouped convolutions against PyTorch");
    test_grouped();
    test_group("a network with frozen layers against PyTorch");
    test_frozen_steps();
    test_group("frozen parts: memory, methods, cached features, refusals");
    test_frozen();
    test_group("resuming with frozen layers");
    test_resume();
    test_group("backbones");
    test_backbone();
    test_group("features, heads of class means, added classes");
    test_heads();
    test_known(0);
    test_known(1);
    ckca__st_close(&reference);
    ckca_context_free(ctx);
    test_leave();
    return test_summary();
}
