/* test_contracts.c: what ckca.h promises of failing calls. Every public call gets NULL, absurd and untimely arguments:
   its sentence must be there and name what was wrong, and nothing that it was given may have changed. Prints the
   sentences, to be read. */
#define CKCA_IMPLEMENTATION
#include "ckca.h"
#include "test.h"

#define DIR "build/tmp_contracts"
enum { SIZE = 8, CLASSES = 2, COUNT = 6 };

static ckca_context *ctx;
static const ckca_model *sentinel_model; /* what the caller's pointers hold before a call that fails */
static const ckca_data *sentinel_data;

/* A call that must fail with this status and with words in its sentence. */
#define REFUSED(call, expected, words)                                                                           \
    do {                                                                                                         \
        ckca_status status_;                                                                                     \
        ctx->error[0] = 0;                                                                                       \
        status_ = (call);                                                                                        \
        CHECK(status_ == (expected) && strstr(ckca_error(ctx), words), "%s: %s, \"%s\", not \"...%s...\"", #call, \
              ckca_status_name(status_), ckca_error(ctx), words);                                                \
        printf("  %s\n", ckca_error(ctx));                                                                       \
    } while (0)
/* The same of a call that returns a node. */
#define NO_NODE(call, words)                                                                             \
    do {                                                                                                 \
        int node_;                                                                                       \
        ctx->error[0] = 0;                                                                               \
        node_ = (call);                                                                                  \
        CHECK(node_ == -1 && strstr(ckca_error(ctx), words), "%s: node %d, \"%s\", not \"...%s...\"", #call, \
              node_, ckca_error(ctx), words);                                                            \
        printf("  %s\n", ckca_error(ctx));                                                               \
    } while (0)
/* A creating call: besides, the pointer is as it was. */
#define NOT_MADE(call, pointer, sentinel, expected, words)                                        \
    do {                                                                                          \
        REFUSED(call, expected, words);                                                           \
        CHECK((pointer) == (sentinel), "%s: a failing call wrote to the caller's pointer", #call); \
    } while (0)

static unsigned char pixels[COUNT * SIZE * SIZE * 3];
static int labels[COUNT];

static ckca_array array(void) {
    ckca_array a;
    int i;
    for (i = 0; i < (int)sizeof pixels; i++) pixels[i] = (unsigned char)(i * 7 + i / 64 * 31);
    for (i = 0; i < COUNT; i++) labels[i] = i % CLASSES;
    memset(&a, 0, sizeof a);
    a.pixels = pixels;
    a.labels = labels;
    a.count = COUNT;
    a.height = a.width = SIZE;
    a.channels = 3;
    a.classes = CLASSES;
    return a;
}

static ckca_model_desc shape(void) {
    ckca_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = SIZE;
    desc.classes = CLASSES;
    desc.width_base = 2;
    return desc;
}

/* ---- contexts ---- */

static void no_context(const char *what, const ckca_desc *desc, const char *words) {
    ckca_context *made = NULL;
    ckca_model *model = (ckca_model *)(uintptr_t)sentinel_model;
    const ckca_model_desc net = shape();
    CHECK(ckca_init(&made, desc) == CKCA_EINVAL && made, "%s is taken", what);
    if (!made) return;
    printf("  %s\n", ckca_error(made));
    CHECK(strstr(ckca_error(made), words) == ckca_error(made) + strlen("ckca_init: "), "%s: \"%s\"", what, ckca_error(made));
    CHECK(ckca_resnet(made, &model, "resnet8", &net) == CKCA_EINVAL && model == sentinel_model &&
              strstr(ckca_error(made), words),
          "%s: the context can be used, or forgets its sentence: \"%s\"", what, ckca_error(made));
    CHECK(!strcmp(ckca_device(made), ""), "%s: it has a device", what);
    ckca_context_free(made);
}

static void *no_memory(size_t bytes, void *user) { return (void)bytes, (void)user, (void *)NULL; }
static void release(void *memory, size_t bytes, void *user) { (void)memory, (void)bytes, (void)user; }

static void test_init(void) {
    ckca_context *made = (ckca_context *)(void *)labels;
    ckca_desc desc;
    memset(&desc, 0, sizeof desc);
    CHECK(ckca_init(NULL, NULL) == CKCA_EINVAL, "no place for the context");
    desc.threads = -1;
    no_context("threads -1", &desc, "threads is -1, must be 0 to 4096");
    desc.threads = 5000;
    no_context("threads 5000", &desc, "threads is 5000");
    desc.threads = 0;
    desc.isa = (ckca_isa)9;
    no_context("isa 9", &desc, "isa is 9");
    desc.isa = CKCA_ISA_AVX512;
    if (ckca__best_isa() < CKCA_ISA_AVX512) no_context("isa avx512", &desc, "isa is avx512, but the best that this");
    desc.isa = CKCA_ISA_BEST;
    desc.no_winograd = CKCA_OFF;
    no_context("no_winograd -1", &desc, "no_winograd is -1, must be 0 to 1");
    desc.no_winograd = 0;
    desc.precision = (ckca_precision)7;
    no_context("precision 7", &desc, "precision is 7, must be 0 to 2");
    desc.precision = CKCA_PRECISION_TF32;
    if (CKCA__DEVICE_IS_HOST) no_context("precision TF32", &desc, "precision is CKCA_PRECISION_TF32, which needs a GPU");
    desc.precision = CKCA_PRECISION_FLOAT32;
    desc.alloc = no_memory;
    no_context("alloc alone", &desc, "release is NULL");
    desc.alloc = NULL;
    desc.release = release;
    no_context("release alone", &desc, "alloc is NULL");
    desc.alloc = no_memory;
    CHECK(ckca_init(&made, &desc) == CKCA_ENOMEM && !made && *ckca_error(made), "no memory for a context");
    CHECK(strstr(ckca_error(NULL), "no context"), "%s", ckca_error(NULL));
    CHECK(!strcmp(ckca_status_name((ckca_status)99), "unknown status"), "status 99");
    ckca_context_free(NULL);
}

/* ---- data ---- */

static void test_data(ckca_data *set) {
    const ckca_array good = array();
    ckca_array a = good;
    ckca_data_desc desc;
    ckca_data_info info;
    ckca_split_desc split;
    ckca_data *data = (ckca_data *)(uintptr_t)sentinel_data, *parts[3], *other = NULL;
    static const char *const hole[] = {"a", NULL};
    static const char *const twice[] = {"a", "a"};
    int index[2] = {0, COUNT}, i;
    unsigned char out[3];
    memset(&desc, 0, sizeof desc);
    memset(&split, 0, sizeof split);
#define BAD_ARRAY(change, words)                                                                                     \
    do {                                                                                                             \
        a = good;                                                                                                    \
        change;                                                                                                      \
        NOT_MADE(ckca_open_array(ctx, &data, &a, NULL), data, sentinel_data, CKCA_EINVAL, words); /* a, see above */ \
    } while (0)
    NOT_MADE(ckca_open_array(ctx, NULL, &a, NULL), data, sentinel_data, CKCA_EINVAL, "ckca_open_array: data is NULL");
    NOT_MADE(ckca_open_array(ctx, &data, NULL, NULL), data, sentinel_data, CKCA_EINVAL, "array is NULL");
    CHECK(ckca_open_array(NULL, &data, &a, NULL) == CKCA_EINVAL && data == sentinel_data, "no context");
    BAD_ARRAY(a.pixels = NULL, "array's pixels is NULL");
    BAD_ARRAY(a.labels = NULL, "array's labels is NULL");
    BAD_ARRAY(a.count = 0, "array: count is 0, must be 1 to 2147483647");
    BAD_ARRAY(a.height = 20000, "array: height is 20000, must be 1 to 16384");
    BAD_ARRAY(a.width = -1, "array: width is -1");
    BAD_ARRAY(a.channels = 2, "array: channels is 2, must be 1 or 3");
    BAD_ARRAY(a.classes = 0, "array: classes is 0");
    BAD_ARRAY(a.classes = INT_MAX, "array: classes is 2147483647, must be 1 to 1000000");
    BAD_ARRAY(a.class_names = hole, "class_names[1] is NULL");
    BAD_ARRAY(a.classes = 1, "labels[1] is 1, there are 1 classes");
    a = good;
#define BAD_DESC(change, words)                                                                                \
    do {                                                                                                       \
        memset(&desc, 0, sizeof desc);                                                                         \
        change;                                                                                                \
        NOT_MADE(ckca_open_array(ctx, &data, &a, &desc), data, sentinel_data, CKCA_EINVAL, words);             \
    } while (0)
    BAD_DESC(desc.height = -1, "desc: height is -1, must be 0 to 16384");
    BAD_DESC(desc.width = 16385, "desc: width is 16385");
    BAD_DESC(desc.channels = -1, "channels is -1");
    BAD_DESC(desc.classes = -5, "desc: classes is -5, must be 0 to 1000000");
    BAD_DESC(desc.class_names = twice, "classes is 0");
    BAD_DESC((desc.class_names = twice, desc.classes = 2), "both \"a\"");
    BAD_DESC((desc.class_names = hole, desc.classes = 2), "class_names[1] is NULL");
#ifndef CKCA_NO_STDIO
    memset(&desc, 0, sizeof desc);
    NOT_MADE(ckca_open_folder(ctx, &data, NULL, NULL), data, sentinel_data, CKCA_EINVAL, "dir is NULL");
    REFUSED(ckca_open_folder(ctx, NULL, DIR, NULL), CKCA_EINVAL, "data is NULL");
    NOT_MADE(ckca_open_cifar10(ctx, &data, NULL, CKCA_PART_TRAIN, NULL), data, sentinel_data, CKCA_EINVAL, "dir is NULL");
    NOT_MADE(ckca_open_cifar10(ctx, &data, DIR, (ckca_part)2, NULL), data, sentinel_data, CKCA_EINVAL, "part is 2");
    NOT_MADE(ckca_open_cifar10(ctx, &data, DIR "/no", CKCA_PART_TRAIN, NULL), data, sentinel_data, CKCA_EIO, "No such file");
    NOT_MADE(ckca_open_cifar100(ctx, &data, DIR "/no", CKCA_PART_TRAIN, NULL), data, sentinel_data, CKCA_EIO, "No such file");
    NOT_MADE(ckca_open_idx(ctx, &data, NULL, CKCA_PART_TRAIN, NULL), data, sentinel_data, CKCA_EINVAL, "dir is NULL");
    NOT_MADE(ckca_open_idx(ctx, &data, DIR "/no", CKCA_PART_TRAIN, NULL), data, sentinel_data, CKCA_EIO, "no train-images");
    REFUSED(ckca_read_picture(ctx, NULL, &desc, out), CKCA_EINVAL, "path is NULL");
#ifndef CKCA_NO_STB_IMAGE
    NOT_MADE(ckca_open_folder(ctx, &data, DIR "/no", NULL), data, sentinel_data, CKCA_EIO, "No such file");
    REFUSED(ckca_read_picture(ctx, DIR, NULL, out), CKCA_EINVAL, "desc is NULL");
    REFUSED(ckca_read_picture(ctx, DIR, &desc, NULL), CKCA_EINVAL, "out is NULL");
    REFUSED(ckca_read_picture(ctx, DIR, &desc, out), CKCA_EINVAL, "0 x 0 x 0, all three must be set");
#endif
#endif
    (void)out;
    for (i = 0; i < 3; i++) parts[i] = data;
    REFUSED(ckca_split(set, 2, NULL, NULL), CKCA_EINVAL, "parts is NULL");
    REFUSED(ckca_split(set, 0, NULL, parts), CKCA_EINVAL, "ckca_split: n is 0, must be 1 to");
    REFUSED(ckca_split(set, -3, NULL, parts), CKCA_EINVAL, "n is -3");
    split.size = -1;
    REFUSED(ckca_split(set, 3, &split, parts), CKCA_EINVAL, "size is -1");
    split.size = 3;
    REFUSED(ckca_split(set, 3, &split, parts), CKCA_EINVAL, "3 parts of 3 pictures need 9 pictures, there are 6");
    split.stratified = -1;
    REFUSED(ckca_split(set, 3, &split, parts), CKCA_EINVAL, "stratified is -1");
    CHECK(ckca_split(NULL, 3, NULL, parts) == CKCA_EINVAL, "no data to split");
    for (i = 0; i < 3; i++) CHECK(parts[i] == sentinel_data, "a failing ckca_split wrote to parts[%d]", i);
    REFUSED(ckca_subset(NULL, set, index, 1), CKCA_EINVAL, "subset is NULL");
    NOT_MADE(ckca_subset(&data, set, NULL, 1), data, sentinel_data, CKCA_EINVAL, "index is NULL");
    NOT_MADE(ckca_subset(&data, set, index, 0), data, sentinel_data, CKCA_EINVAL, "ckca_subset: n is 0");
    NOT_MADE(ckca_subset(&data, set, index, 2), data, sentinel_data, CKCA_EINVAL, "index[1] is 6, there are 6 pictures");
    parts[0] = NULL;
    parts[1] = set;
    REFUSED(ckca_join(NULL, &set, 1), CKCA_EINVAL, "joined is NULL");
    NOT_MADE(ckca_join(&data, parts, 2), data, sentinel_data, CKCA_EINVAL, "parts[0] is NULL");
    CHECK(ckca_join(&data, parts, 1) == CKCA_EINVAL && ckca_join(&data, NULL, 1) == CKCA_EINVAL &&
              ckca_join(&data, &set, 0) == CKCA_EINVAL && data == sentinel_data,
          "nothing to join");
    a.classes = 3;
    CHECK(ckca_open_array(ctx, &other, &a, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    parts[0] = other;
    NOT_MADE(ckca_join(&data, parts, 2), data, sentinel_data, CKCA_ESHAPE, "parts[1] has 2 classes, parts[0] 3");
    ckca_data_free(other);
    ckca_data_info_get(set, NULL);
    ckca_data_info_get(NULL, &info);
    CHECK(info.count == 0 && !info.class_names && ckca_label(NULL, 0) == -1 && !ckca_pixels(NULL, 0), "of no data");
    ckca_data_free(NULL);
}

/* ---- building ---- */

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

/* Each failing node in a model of its own: it tells at once, later nodes pass it on, and finishing tells it again. */
static void broken(int which, const char *words) {
    static const ckca_conv_desc none;
    const ckca_model_desc desc = shape();
    ckca_model *m = NULL;
    ckca_tensor_info tensor;
    int x, node = 0, h;
    if (ckca_model_create(ctx, &m, &desc)) return;
    x = which ? ckca_layer_input(m) : 0;
    ctx->error[0] = 0;
    switch (which) {
    case 0: node = ckca_layer_relu(m, 0); break;
    case 1: node = ckca_layer_input(m); break;
    case 2: node = ckca_layer_conv(m, NULL, x, conv(1, 0, 0, 0, 0)); break;
    case 3: node = ckca_layer_conv(m, "c", 5, none); break;
    case 4: node = ckca_layer_conv(m, "c", x, none); break;
    case 5: node = ckca_layer_conv(m, "c", x, conv(2, -1, 0, 0, 0)); break;
    case 6: node = ckca_layer_conv(m, "c", x, conv(2, 0, 256, 0, 0)); break;
    case 7: node = ckca_layer_conv(m, "c", x, conv(2, 0, 0, 3, 0)); break;
    case 8: node = ckca_layer_conv(m, "c", x, conv(2, 0, 0, 0, 2)); break;
    case 9: node = ckca_layer_conv(m, "c", x, conv(2, 9, 0, 0, 0)); break;
    case 10: node = ckca_layer_batchnorm(m, "", x); break;
    case 11: node = ckca_layer_batchnorm(m, NULL, -2); break;
    case 12: node = ckca_layer_add(m, x, 3); break;
    case 13: node = ckca_layer_maxpool(m, x, 16, 1, 0); break;
    case 14: node = ckca_layer_maxpool(m, x, 2, 0, 0); break;
    case 15: node = ckca_layer_maxpool(m, x, 2, 1, 2); break;
    case 16: node = ckca_layer_avgpool(m, 7); break;
    case 17: node = ckca_layer_subsample(m, x, 0, 3); break;
    case 18: node = ckca_layer_subsample(m, x, 1, 2); break;
    case 19: node = ckca_layer_linear(m, "fc", x, 0); break;
    case 20: node = ckca_layer_stage(m, 4); break;
    case 21: node = ckca_layer_stage(m, 0); break;
    default: break;
    }
    printf("  %s\n", ckca_error(ctx));
    CHECK(node == -1 && strstr(ckca_error(ctx), words), "node %d gives %d, \"%s\", not \"...%s...\"", which, node,
          ckca_error(ctx), words);
    CHECK(ckca_layer_relu(m, node) == -1 && strstr(ckca_error(ctx), words), "passing %d on: \"%s\"", which, ckca_error(ctx));
    ctx->error[0] = 0;
    CHECK(ckca_model_finish(m, 0) != CKCA_OK && strstr(ckca_error(ctx), words), "finishing %d: \"%s\"", which,
          ckca_error(ctx));
    REFUSED(ckca_tensor_info_get(m, 0, &tensor), CKCA_EINVAL, "not finished");
    CHECK(which == 0 || ckca_node_shape(m, 0, &h, NULL, NULL) == CKCA_OK, "a node's shape before the end");
    ckca_model_free(m);
}

static void test_building(void) {
    static const char *const words[] = {"relu: there is no node 0 (the model is empty: begin with ckca_layer_input)", "input: it must be the first node",
        "conv: the name \"\" needs", "conv c: there is no node 5 (nodes are 0 to 0)", "conv c: out is 0, must be 1 to",
        "conv c: kernel is -1, must be 0 to 255", "conv c: stride is 256", "conv c: pad is 3, must be 0 to 2",
        "conv c: bias is 2", "conv c: a kernel of 9", "bn: the name \"\"", "bn: there is no node -2",
        "add: there is no node 3", "maxpool: kernel is 16, must be 1 to 15", "maxpool: stride is 0",
        "maxpool: pad is 2, must be 0 to 1", "avgpool: there is no node 7", "subsample: stride is 0",
        "subsample: out is 2, must be 3 to", "linear fc: out is 0", "stage: there is no node 4 (nodes are 0 to 0)",
        "stage: node 0 is the pictures"};
    ckca_model *m = (ckca_model *)(uintptr_t)sentinel_model;
    const ckca_model_desc good = shape();
    ckca_model_desc desc;
    static const float some[3] = {0.5f, 0.5f, 0.5f}, zero[3] = {0.5f, 0, 0.5f};
    static const char *const hole[] = {"a", NULL}, *const twice[] = {"a", "a"}, *const bytes[] = {"a", "\xe8"};
    float nan[3] = {0.5f, 0.5f, 0};
    int i, x, fc;
    nan[2] = (float)NAN;
#define BAD_MODEL(change, words_)                                                                             \
    do {                                                                                                     \
        desc = good;                                                                                         \
        change;                                                                                              \
        NOT_MADE(ckca_model_create(ctx, &m, &desc), m, sentinel_model, CKCA_EINVAL, words_);                 \
        NOT_MADE(ckca_resnet(ctx, &m, "resnet8", &desc), m, sentinel_model, CKCA_EINVAL, words_);            \
    } while (0)
    BAD_MODEL(desc.height = -1, "height is -1, must be 0 to 65536");
    BAD_MODEL(desc.width = 70000, "width is 70000");
    BAD_MODEL(desc.channels = -1, "channels is -1");
    BAD_MODEL(desc.classes = 0, "classes is 0, must be 1 to 1000000");
    BAD_MODEL(desc.width_base = 5000, "width_base is 5000, must be 0 to 4096");
    BAD_MODEL(desc.projection = -1, "projection is -1");
    BAD_MODEL(desc.zero_residual = 2, "zero_residual is 2");
    BAD_MODEL(desc.class_names = hole, "class_names[1] is NULL");
    BAD_MODEL(desc.class_names = twice, "class_names[0] and [1] are both \"a\"");
    BAD_MODEL(desc.class_names = bytes, "not UTF-8");
    BAD_MODEL(desc.mean = some, "std is NULL");
    BAD_MODEL(desc.std = some, "mean is NULL");
    BAD_MODEL((desc.mean = some, desc.std = zero), "std[1] is 0");
    BAD_MODEL((desc.mean = nan, desc.std = some), "mean[2] is nan");
    REFUSED(ckca_model_create(ctx, NULL, &good), CKCA_EINVAL, "model is NULL");
    NOT_MADE(ckca_model_create(ctx, &m, NULL), m, sentinel_model, CKCA_EINVAL, "desc is NULL");
    CHECK(ckca_model_create(NULL, &m, &good) == CKCA_EINVAL && m == sentinel_model, "no context");
    REFUSED(ckca_resnet(ctx, NULL, "resnet8", &good), CKCA_EINVAL, "model is NULL");
    NOT_MADE(ckca_resnet(ctx, &m, "resnet8", NULL), m, sentinel_model, CKCA_EINVAL, "desc is NULL");
    NOT_MADE(ckca_resnet(ctx, &m, NULL, &good), m, sentinel_model, CKCA_EINVAL, "arch is NULL");
    NOT_MADE(ckca_resnet(ctx, &m, "vgg16", &good), m, sentinel_model, CKCA_EINVAL, "unknown network \"vgg16\"; known are resnet8");
    for (i = 0; i < (int)(sizeof words / sizeof *words); i++) broken(i, words[i]);
    CHECK(ckca_layer_input(NULL) == -1 && ckca_layer_relu(NULL, 0) == -1 && ckca_layer_stage(NULL, 0) == -1, "nodes of no model");

    m = NULL; /* out of order, and then in order */
    CHECK(ckca_model_create(ctx, &m, &good) == CKCA_OK, "%s", ckca_error(ctx));
    REFUSED(ckca_model_finish(m, 0), CKCA_EINVAL, "logits: there is no node 0 (the model is empty");
    x = ckca_layer_avgpool(m, ckca_layer_input(m));
    REFUSED(ckca_model_finish(m, 9), CKCA_EINVAL, "logits: there is no node 9 (nodes are 0 to 1)");
    REFUSED(ckca_model_finish(m, x), CKCA_EINVAL, "logits: node 1 is avgpool, not linear");
    fc = ckca_layer_linear(m, "five", x, 5);
    REFUSED(ckca_model_finish(m, fc), CKCA_ESHAPE, "five has 5 outputs, the model has 2 classes");
    fc = ckca_layer_linear(m, "fc", x, CLASSES);
    CHECK(ckca_model_finish(m, fc) == CKCA_OK, "after three failures: %s", ckca_error(ctx));
    REFUSED(ckca_model_finish(m, fc), CKCA_EINVAL, "already finished");
    NO_NODE(ckca_layer_input(m), "input: the model is finished");
    NO_NODE(ckca_layer_relu(m, x), "relu: the model is finished");
    NO_NODE(ckca_layer_linear(m, "more", x, 2), "linear: the model is finished");
    NO_NODE(ckca_layer_stage(m, x), "stage: the model is finished");
    REFUSED(ckca_model_finish(m, fc), CKCA_EINVAL, "already finished"); /* nothing of the above broke it */
    CHECK(ckca_model_finish(NULL, 0) == CKCA_EINVAL, "no model");
    ckca_model_free(m);
    ckca_model_free(NULL);
}

/* ---- a finished model, and one that is not ---- */

typedef struct { /* what can be seen of a model */
    ckca_model_info info;
    float *all;
} seen;

static seen see(ckca_model *m) {
    const ckca_slot slot[] = {CKCA_SLOT_VALUE, CKCA_SLOT_GRADIENT, CKCA_SLOT_MOMENTUM};
    seen s;
    size_t at = 0;
    int i, k;
    ckca_model_info_get(m, &s.info);
    s.all = (float *)calloc(m->all * 3, sizeof(float));
    for (k = 0; k < 3; k++)
        for (i = 0; i < ckca_tensor_count(m); i++) {
            ckca_tensor_info tensor;
            ckca_tensor_info_get(m, i, &tensor);
            if (k && !tensor.trainable) continue;
            ckca_tensor_read(m, i, slot[k], s.all + at);
            at += (size_t)tensor.count;
        }
    return s;
}

static void unchanged(ckca_model *m, seen *before, const char *by) {
    seen now = see(m);
    CHECK(!memcmp(now.all, before->all, m->all * 3 * sizeof(float)) && !memcmp(&now.info, &before->info, sizeof now.info),
          "%s changed the model", by);
    free(now.all);
}

static void test_model(ckca_model *m, ckca_model *raw, const ckca_data *set) {
    static float x[COUNT * SIZE * SIZE * 3], out[20000];
    ckca_model_info info;
    ckca_bytes bytes;
    ckca_tensor_info tensor;
    ckca_sgd_desc sgd;
    ckca_augment augment;
    ckca_score score;
    ckca_model *copy = (ckca_model *)(uintptr_t)sentinel_model;
    ckca_data_desc like;
    seen before;
    int h, mean, index[2] = {0, COUNT};
    memset(&sgd, 0, sizeof sgd);
    memset(&augment, 0, sizeof augment);
    sgd.lr = 0.1f;
    ckca_model_info_get(m, NULL);
    ckca_model_info_get(NULL, &info);
    like = ckca_data_like(NULL);
    CHECK(info.classes == 0 && like.height == 0 && ckca_tensor_count(NULL) == 0 && ckca_tensor_find(NULL, "fc.bias") == -1 &&
              ckca_tensor_find(m, NULL) == -1 && ckca_tensor_count(raw) == 0,
          "of no model");
    /* before any forward */
    REFUSED(ckca_node_read(m, 0, out), CKCA_EINVAL, "it needs a ckca_forward before it");
    REFUSED(ckca_backward(m, x, NULL), CKCA_EINVAL, "needs its own ckca_forward with training right before it");
    REFUSED(ckca_sgd(m, &sgd), CKCA_EINVAL, "there are no gradients yet");
    REFUSED(ckca_tensor_read(m, 0, CKCA_SLOT_GRADIENT, out), CKCA_EINVAL, "conv1.weight has no gradient yet");
    REFUSED(ckca_tensor_write(m, 0, CKCA_SLOT_MOMENTUM, out), CKCA_EINVAL, "conv1.weight has no momentum yet");
    REFUSED(ckca_predict(m, pixels, 1, out), CKCA_EINVAL, "has no mean and std");
    CHECK(ckca_forward(m, x, 2, 0) == CKCA_OK, "%s", ckca_error(ctx));
    REFUSED(ckca_backward(m, x, NULL), CKCA_EINVAL, "needs its own ckca_forward with training right before it");
    REFUSED(ckca_node_read(m, 1, out), CKCA_EINVAL, "only a ckca_forward with training keeps it");
    CHECK(ckca_forward(m, x, 2, 1) == CKCA_OK, "%s", ckca_error(ctx));
    REFUSED(ckca_node_read(m, 2, out), CKCA_EINVAL, "node 2 (bn) cannot be read: it is fused");
    REFUSED(ckca_backward(m, NULL, NULL), CKCA_EINVAL, "dlogits is NULL");
    x[0] = 1;
    CHECK(ckca_backward(m, x, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    REFUSED(ckca_backward(m, x, NULL), CKCA_EINVAL, "needs its own ckca_forward");
    CHECK(ckca_sgd(m, &sgd) == CKCA_OK, "%s", ckca_error(ctx));

    before = see(m); /* with gradients and momentum */
    mean = ckca_tensor_find(m, "bn1.running_mean");
    REFUSED(ckca_forward(m, NULL, 1, 0), CKCA_EINVAL, "pictures is NULL");
    REFUSED(ckca_forward(m, x, 0, 0), CKCA_EINVAL, "ckca_forward: n is 0, must be 1 to 1000000");
    REFUSED(ckca_forward(m, x, -1, 1), CKCA_EINVAL, "n is -1");
    REFUSED(ckca_node_shape(m, 99, &h, NULL, NULL), CKCA_EINVAL, "ckca_node_shape: there is no node 99 (nodes are 0 to");
    REFUSED(ckca_node_read(m, -1, out), CKCA_EINVAL, "there is no node -1");
    REFUSED(ckca_node_read(m, 0, NULL), CKCA_EINVAL, "ckca_node_read: out is NULL");
    REFUSED(ckca_model_bytes(m, 0, 1, &bytes), CKCA_EINVAL, "batch is 0, must be 1 to 1000000");
    REFUSED(ckca_model_bytes(m, 1, 1, NULL), CKCA_EINVAL, "bytes is NULL");
    REFUSED(ckca_tensor_info_get(m, 999, &tensor), CKCA_EINVAL, "there is no tensor 999 (they are 0 to");
    REFUSED(ckca_tensor_info_get(m, 3, NULL), CKCA_EINVAL, "ckca_tensor_info_get: tensor is NULL");
    REFUSED(ckca_tensor_read(m, 3, CKCA_SLOT_VALUE, NULL), CKCA_EINVAL, "ckca_tensor_read: out is NULL");
    REFUSED(ckca_tensor_write(m, 3, CKCA_SLOT_VALUE, NULL), CKCA_EINVAL, "ckca_tensor_write: in is NULL");
    REFUSED(ckca_tensor_write(m, -1, CKCA_SLOT_VALUE, x), CKCA_EINVAL, "there is no tensor -1");
    REFUSED(ckca_tensor_read(m, 0, (ckca_slot)3, out), CKCA_EINVAL, "slot is 3, must be 0 to 2");
    REFUSED(ckca_tensor_read(m, mean, CKCA_SLOT_MOMENTUM, out), CKCA_EINVAL, "bn1.running_mean is a running statistic");
    REFUSED(ckca_sgd(m, NULL), CKCA_EINVAL, "desc is NULL");
#define BAD_SGD(field, value, words)                        \
    do {                                                    \
        const ckca_sgd_desc good = sgd;                     \
        sgd.field = value;                                  \
        REFUSED(ckca_sgd(m, &sgd), CKCA_EINVAL, words);     \
        sgd = good;                                         \
    } while (0)
    BAD_SGD(lr, -1, "ckca_sgd: lr is -1, must be 0 to 1000000");
    BAD_SGD(lr, (float)NAN, "lr is nan");
    BAD_SGD(lr, (float)INFINITY, "lr is inf");
    BAD_SGD(momentum, 1.5f, "momentum is 1.5, must be 0 to 1, or CKCA_OFF");
    BAD_SGD(momentum, -0.5f, "momentum is -0.5");
    BAD_SGD(weight_decay, -2, "weight_decay is -2");
    BAD_SGD(clip_norm, -(float)INFINITY, "clip_norm is -inf");
    BAD_SGD(no_nesterov, -1, "no_nesterov is -1");
    REFUSED(ckca_model_copy(NULL, m), CKCA_EINVAL, "copy is NULL");
    REFUSED(ckca_predict(m, NULL, 1, out), CKCA_EINVAL, "pixels is NULL");
    REFUSED(ckca_predict(m, pixels, 1, NULL), CKCA_EINVAL, "out is NULL");
    REFUSED(ckca_predict(m, pixels, 0, out), CKCA_EINVAL, "n is 0");
    REFUSED(ckca_evaluate(m, NULL, &score, NULL), CKCA_EINVAL, "ckca_evaluate: data is NULL");
    REFUSED(ckca_get_batch(m, NULL, index, 1, NULL, 0, 0, x, NULL), CKCA_EINVAL, "data is NULL");
    REFUSED(ckca_get_batch(m, set, NULL, 1, NULL, 0, 0, x, NULL), CKCA_EINVAL, "index is NULL");
    REFUSED(ckca_get_batch(m, set, index, 1, NULL, 0, 0, NULL, NULL), CKCA_EINVAL, "pictures is NULL");
    REFUSED(ckca_get_batch(m, set, index, 0, NULL, 0, 0, x, NULL), CKCA_EINVAL, "ckca_get_batch: n is 0");
    REFUSED(ckca_get_batch(m, set, index, 2, NULL, 0, 0, x, NULL), CKCA_EINVAL, "index[1] is 6, there are 6 pictures");
    augment.jitter = (float)NAN;
    REFUSED(ckca_get_batch(m, set, index, 1, &augment, 0, 0, x, NULL), CKCA_EINVAL, "augment.jitter is nan, must be 0 to 1");
    augment.jitter = 0;
    augment.pad = -1;
    REFUSED(ckca_get_batch(m, set, index, 1, &augment, 0, 0, x, NULL), CKCA_EINVAL, "augment.pad is -1, must be 0 to 4096");
    REFUSED(ckca_update(m, NULL, NULL, NULL), CKCA_EINVAL, "ckca_update: data is NULL");
    REFUSED(ckca_update_defaults(m, set, NULL), CKCA_EINVAL, "desc is NULL");
#ifndef CKCA_NO_STDIO
    REFUSED(ckca_save(m, NULL), CKCA_EINVAL, "ckca_save: path is NULL");
    REFUSED(ckca_save(m, DIR "/no/such"), CKCA_EIO, "No such file");
    REFUSED(ckca_load_weights(m, NULL), CKCA_EINVAL, "ckca_load_weights: path is NULL");
    REFUSED(ckca_load_weights(m, DIR "/no"), CKCA_EIO, "No such file");
    NOT_MADE(ckca_load(ctx, &copy, NULL), copy, sentinel_model, CKCA_EINVAL, "ckca_load: path is NULL");
    NOT_MADE(ckca_load(ctx, &copy, DIR "/no"), copy, sentinel_model, CKCA_EIO, "No such file");
    REFUSED(ckca_load(ctx, NULL, DIR), CKCA_EINVAL, "model is NULL");
#endif
    unchanged(m, &before, "one of the refused calls");
    free(before.all);

    /* a model that is not finished */
    NOT_MADE(ckca_model_copy(&copy, raw), copy, sentinel_model, CKCA_EINVAL, "ckca_model_copy: the model is not finished");
    REFUSED(ckca_model_bytes(raw, 1, 1, &bytes), CKCA_EINVAL, "ckca_model_bytes: the model is not finished");
    REFUSED(ckca_tensor_info_get(raw, 0, &tensor), CKCA_EINVAL, "ckca_tensor_info_get: the model is not finished");
    REFUSED(ckca_tensor_read(raw, 0, CKCA_SLOT_VALUE, out), CKCA_EINVAL, "ckca_tensor_read: the model is not finished");
    REFUSED(ckca_tensor_write(raw, 0, CKCA_SLOT_VALUE, x), CKCA_EINVAL, "ckca_tensor_write: the model is not finished");
    REFUSED(ckca_forward(raw, x, 1, 1), CKCA_EINVAL, "ckca_forward: the model is not finished");
    REFUSED(ckca_zero_gradients(raw), CKCA_EINVAL, "ckca_zero_gradients: the model is not finished");
    REFUSED(ckca_node_read(raw, 0, out), CKCA_EINVAL, "ckca_node_read: the model is not finished");
    REFUSED(ckca_backward(raw, x, NULL), CKCA_EINVAL, "ckca_backward: the model is not finished");
    REFUSED(ckca_sgd(raw, &sgd), CKCA_EINVAL, "ckca_sgd: the model is not finished");
    REFUSED(ckca_evaluate(raw, set, &score, NULL), CKCA_EINVAL, "ckca_evaluate: the model is not finished");
    REFUSED(ckca_predict(raw, pixels, 1, out), CKCA_EINVAL, "ckca_predict: the model is not finished");
    REFUSED(ckca_get_batch(raw, set, index, 1, NULL, 0, 0, x, NULL), CKCA_EINVAL, "ckca_get_batch: the model is not finished");
    REFUSED(ckca_update(raw, set, NULL, NULL), CKCA_EINVAL, "ckca_update: the model is not finished");
#ifndef CKCA_NO_STDIO
    REFUSED(ckca_save(raw, DIR "/x"), CKCA_EINVAL, "ckca_save: the model is not finished");
    REFUSED(ckca_load_weights(raw, DIR "/x"), CKCA_EINVAL, "ckca_load_weights: the model is not finished");
#endif
    CHECK(ckca_forward(NULL, x, 1, 0) == CKCA_EINVAL && ckca_backward(NULL, x, NULL) == CKCA_EINVAL &&
              ckca_sgd(NULL, &sgd) == CKCA_EINVAL && ckca_zero_gradients(NULL) == CKCA_EINVAL &&
              ckca_node_read(NULL, 0, out) == CKCA_EINVAL && ckca_node_shape(NULL, 0, NULL, NULL, NULL) == CKCA_EINVAL &&
              ckca_model_bytes(NULL, 1, 0, &bytes) == CKCA_EINVAL && ckca_tensor_info_get(NULL, 0, &tensor) == CKCA_EINVAL &&
              ckca_tensor_read(NULL, 0, CKCA_SLOT_VALUE, out) == CKCA_EINVAL &&
              ckca_tensor_write(NULL, 0, CKCA_SLOT_VALUE, x) == CKCA_EINVAL && ckca_model_copy(&copy, NULL) == CKCA_EINVAL &&
              ckca_evaluate(NULL, set, &score, NULL) == CKCA_EINVAL && ckca_predict(NULL, pixels, 1, out) == CKCA_EINVAL &&
              ckca_get_batch(NULL, set, index, 1, NULL, 0, 0, x, NULL) == CKCA_EINVAL &&
              ckca_update(NULL, set, NULL, NULL) == CKCA_EINVAL && ckca_update_defaults(NULL, set, NULL) == CKCA_EINVAL &&
              copy == sentinel_model,
          "a call without a model");
    ckca_shuffle(1, 1, 5, NULL);
    ckca_shuffle(1, 1, -5, index);
    CHECK(index[0] == 0 && index[1] == COUNT, "a permutation of -5");
}

/* ---- ckca_update_desc, value by value ---- */

static void test_update_values(ckca_model *m, const ckca_data *set) {
    int i, k;
    seen before = see(m);
    for (i = 0; i < CKCA__SETTINGS; i++) {
        const ckca__setting *s = &ckca__settings[i];
        const float bad[] = {(float)s->most * 2 + 1, -0.5f, -2, (float)NAN, (float)INFINITY, -(float)INFINITY};
        ckca_update_desc desc, was;
        char words[80];
        ckca_status status;
        for (k = 0; k < 6; k++) {
            if (!s->real && (k == 1 || k > 2)) continue; /* an int holds none of these */
            memset(&desc, 0, sizeof desc);
            ckca__setting_set(&desc, s, bad[k]);
            was = desc;
            snprintf(words, sizeof words, "update: %s is ", s->name);
            ctx->error[0] = 0;
            status = ckca_update(m, set, &desc, NULL);
            CHECK(status == CKCA_EINVAL && !strncmp(ckca_error(ctx), words, strlen(words)), "%s %g: %s, \"%s\"", s->name,
                  (double)bad[k], ckca_status_name(status), ckca_error(ctx));
            if (k == 0) printf("  %s\n", ckca_error(ctx));
            CHECK(ckca_update_defaults(m, set, &desc) == CKCA_EINVAL && !memcmp(&desc, &was, sizeof desc),
                  "%s: a failing ckca_update_defaults wrote to desc", s->name);
        }
        memset(&desc, 0, sizeof desc);
        ckca__setting_set(&desc, s, CKCA_OFF);
        status = ckca_update_defaults(m, set, &desc);
        CHECK(status == (s->off ? CKCA_OK : CKCA_EINVAL) && ckca__setting_get(&desc, s) == -1, "%s CKCA_OFF: %s", s->name,
              ckca_status_name(status));
    }
    unchanged(m, &before, "a refused update");
    free(before.all);
}

/* Memory that fails while a model is finished leaves it to be finished later, to the same weights. */
static long left = LONG_MAX;
static void *scarce(size_t bytes, void *user) { return (void)user, left-- == 0 ? NULL : malloc(bytes); }
static void scarce_free(void *memory, size_t bytes, void *user) { (void)bytes, (void)user, free(memory); }

static void test_finish_again(void) {
    ckca_desc desc;
    ckca_context *own = NULL;
    ckca_model *m[2] = {NULL, NULL};
    const ckca_model_desc net = shape();
    int i, x, fc[2] = {0, 0}, failures = 0;
    float weight[2][2 * 3 * 9], y[2][CLASSES];
    static float picture[SIZE * SIZE * 3];
    memset(&desc, 0, sizeof desc);
    desc.alloc = scarce;
    desc.release = scarce_free;
    desc.threads = 1;
    ckca_init(&own, &desc);
    for (i = 0; i < SIZE * SIZE * 3; i++) picture[i] = (float)(i % 7) - 3;
    for (i = 0; i < 2; i++) {
        ckca_model_create(own, &m[i], &net);
        x = ckca_layer_relu(m[i], ckca_layer_batchnorm(m[i], "b", ckca_layer_conv(m[i], "c", ckca_layer_input(m[i]), conv(2, 0, 0, 1, 0))));
        fc[i] = ckca_layer_linear(m[i], "fc", ckca_layer_avgpool(m[i], x), CLASSES);
    }
    while (failures < 20) {
        ckca_status status;
        left = failures;
        status = ckca_model_finish(m[0], fc[0]);
        left = LONG_MAX;
        if (!status) break;
        failures++;
        CHECK(status == CKCA_ENOMEM && strstr(ckca_error(own), "out of memory"), "%s: %s", ckca_status_name(status),
              ckca_error(own));
        CHECK(ckca_tensor_count(m[0]) == 0, "a model that failed to finish is finished");
    }
    CHECK(ckca_model_finish(m[1], fc[1]) == CKCA_OK && failures >= 1, "%d failures: %s", failures, ckca_error(own));
    for (i = 0; i < 2; i++) {
        ckca_tensor_read(m[i], 0, CKCA_SLOT_VALUE, weight[i]);
        ckca_forward(m[i], picture, 1, 0);
        CHECK(ckca_node_read(m[i], fc[i], y[i]) == CKCA_OK, "%s", ckca_error(own));
    }
    for (i = 0; i < m[1]->nodes; i++)
        CHECK(m[0]->node[i].readers == m[1]->node[i].readers && m[0]->node[i].fused == m[1]->node[i].fused,
              "finished late, node %d has %d readers, not %d", i, m[0]->node[i].readers, m[1]->node[i].readers);
    CHECK(!memcmp(weight[0], weight[1], sizeof weight[0]) && !memcmp(y[0], y[1], sizeof y[0]), "finished late, it differs");
    ckca_model_free(m[0]);
    ckca_model_free(m[1]);
    ckca_context_free(own);
}

/* Whatever allocation of a creating call fails, the caller's pointers are as they were. */
static void test_made_or_not(void) {
    ckca_desc desc;
    ckca_context *own = NULL;
    ckca_data *set = NULL, *data;
    ckca_model *m = NULL, *model;
    ckca_array a = array();
    const ckca_model_desc net = shape();
    const int index[2] = {1, 3};
    int call, failures = 0;
    memset(&desc, 0, sizeof desc);
    desc.alloc = scarce;
    desc.release = scarce_free;
    desc.threads = 1;
    ckca_init(&own, &desc);
    ckca_open_array(own, &set, &a, NULL);
    ckca_resnet(own, &m, "resnet8", &net);
    for (call = 0; call < 6; call++) {
        long k;
        ckca_status status = CKCA_ENOMEM;
        for (k = 0; status && k < 1000; k++) {
            ckca_data *parts[2], *joined[2];
            data = parts[0] = parts[1] = (ckca_data *)(uintptr_t)sentinel_data;
            model = (ckca_model *)(uintptr_t)sentinel_model;
            joined[0] = joined[1] = set;
            left = k;
            if (call == 0) status = ckca_open_array(own, &data, &a, NULL);
            if (call == 1) status = ckca_subset(&data, set, index, 2);
            if (call == 2) status = ckca_join(&data, joined, 2);
            if (call == 3) status = ckca_split(set, 2, NULL, parts);
            if (call == 4) status = ckca_resnet(own, &model, "resnet8", &net);
            if (call == 5) status = ckca_model_copy(&model, m);
            left = LONG_MAX;
            if (status) {
                failures++;
                CHECK(status == CKCA_ENOMEM && data == sentinel_data && parts[0] == sentinel_data &&
                          parts[1] == sentinel_data && model == sentinel_model && strstr(ckca_error(own), "memory"),
                      "call %d, allocation %ld: %s, \"%s\", or it wrote to the caller's pointer", call, k,
                      ckca_status_name(status), ckca_error(own));
            } else {
                if (data != sentinel_data) ckca_data_free(data);
                if (parts[0] != sentinel_data) ckca_data_free(parts[0]), ckca_data_free(parts[1]);
                if (model != sentinel_model) ckca_model_free(model);
            }
        }
        CHECK(!status, "call %d: %s", call, ckca_error(own));
    }
    CHECK(failures > 20, "%d allocations failed", failures);
    ckca_model_free(m);
    ckca_data_free(set);
    ckca_context_free(own);
}

/* Who copies the one file has the licences with it. */
static void test_licence(void) {
    static char header[2 << 20], licence[1 << 16];
    FILE *h = fopen("ckca.h", "rb"), *l = fopen("LICENSE", "rb");
    size_t size = h ? fread(header, 1, sizeof header - 1, h) : 0, length = l ? fread(licence, 1, sizeof licence - 1, l) : 0;
    const char *at = length > 1 ? strstr(header, licence) : NULL;
    CHECK(size && at && header + size - (at + length) < 8, "ckca.h does not end with the text of LICENSE");
    if (h) fclose(h);
    if (l) fclose(l);
}

int main(void) {
    ckca_array a = array();
    ckca_model_desc desc = shape();
    ckca_data *set = NULL;
    ckca_model *m = NULL, *raw = NULL;
    sentinel_model = (const ckca_model *)(const void *)labels;
    sentinel_data = (const ckca_data *)(const void *)labels;
    test_licence();
    CHECK(ckca_init(&ctx, NULL) == CKCA_OK, "no context: %s", ckca_error(ctx));
    CHECK(ckca_open_array(ctx, &set, &a, NULL) == CKCA_OK && ckca_resnet(ctx, &m, "resnet8", &desc) == CKCA_OK &&
              ckca_model_create(ctx, &raw, &desc) == CKCA_OK && ckca_layer_input(raw) == 0,
          "%s", ckca_error(ctx));
    test_init();
    test_data(set);
    test_building();
    test_model(m, raw, set);
    test_update_values(m, set);
    if (CKCA__DEVICE_IS_HOST) test_finish_again(), test_made_or_not();
    ckca_model_free(m);
    ckca_model_free(raw);
    ckca_data_free(set);
    ckca_context_free(ctx);
    return test_summary();
}
