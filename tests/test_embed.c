/* The library in other people's programs: ONNX models, read back by a small protobuf reader and run by plain loops
   (tests/test_python.sh has ONNX Runtime run them); the sizes of structures; budgets of time and memory. */
#define _POSIX_C_SOURCE 200809L
#include <time.h>

/* The library's clock: a millisecond passes with every look at it, so that plans do not depend on the machine. */
static long clock_looks;
static int test_clock(struct timespec *now) {
    clock_looks++;
    now->tv_sec = clock_looks / 1000;
    now->tv_nsec = clock_looks % 1000 * 1000000;
    return 0;
}
#define clock_gettime(clock, now) test_clock(now)

#define CKCA_IMPLEMENTATION
#include "ckca.h"

#include "test.h"

#include "files.h"

static uint32_t noise_state = 1;
static float noise(void) { /* -1 to 1 */
    noise_state = noise_state * 1664525u + 1013904223u;
    return (float)(noise_state >> 8) / (float)(1 << 23) - 1;
}

/* ---- a reader of protobuf messages ---- */

typedef struct slice {
    const unsigned char *at;
    size_t size;
} slice;

typedef struct field {
    int number, wire;
    uint64_t value; /* of wire types 0 and 5 */
    slice bytes;    /* of wire type 2 */
} field;

static uint64_t varint(slice *s) {
    uint64_t value = 0;
    int shift = 0;
    while (s->size && shift < 64) {
        const unsigned char byte = *s->at++;
        s->size--;
        value |= (uint64_t)(byte & 127) << shift;
        if (!(byte & 128)) return value;
        shift += 7;
    }
    CHECK(0, "a number that does not end");
    s->size = 0;
    return 0;
}

/* Takes the next field of a message; 0 at its end. */
static int next(slice *s, field *f) {
    uint64_t key;
    if (!s->size) return 0;
    memset(f, 0, sizeof *f);
    key = varint(s);
    f->number = (int)(key >> 3);
    f->wire = (int)(key & 7);
    f->value = f->wire == 5 ? 4 : varint(s);
    if (f->wire == 0) return 1;
    if ((f->wire != 2 && f->wire != 5) || f->value > s->size) {
        CHECK(0, "field %d: wire type %d, %.0f of %.0f bytes", f->number, f->wire, (double)f->value, (double)s->size);
        s->size = 0;
        return 0;
    }
    f->bytes.at = s->at;
    f->bytes.size = (size_t)f->value;
    s->at += f->bytes.size;
    s->size -= f->bytes.size;
    return 1;
}

/* The first field of this number, all zeros if there is none. */
static field find(slice s, int number) {
    field f;
    while (next(&s, &f))
        if (f.number == number) return f;
    memset(&f, 0, sizeof f);
    return f;
}

static int is(slice s, const char *text) { return s.size == strlen(text) && !memcmp(s.at, text, s.size); }

/* ---- a graph, run by plain loops: values in a list, by name ---- */

enum { SLOTS = 6, VALUES = 600 };
typedef struct value {
    slice name;
    int dims, shape[4], integers; /* integers: 1: int64 */
    size_t count;
    float *f;
    int64_t i[8];
} value;
static value values[VALUES];
static int value_count;

static value *lookup(slice name) {
    int i;
    for (i = 0; i < value_count; i++)
        if (values[i].name.size == name.size && !memcmp(values[i].name.at, name.at, name.size)) return &values[i];
    return NULL;
}

static value *new_value(slice name, int dims, int a, int b, int c, int d) {
    value *v = &values[value_count];
    if (value_count == VALUES - 1 || lookup(name))
        CHECK(0, "value %d, %.*s, stands twice or is too many", value_count, (int)name.size, (const char *)name.at);
    if (value_count < VALUES - 1) value_count++;
    memset(v, 0, sizeof *v);
    v->name = name;
    v->dims = dims;
    v->shape[0] = a;
    v->shape[1] = b;
    v->shape[2] = c;
    v->shape[3] = d;
    v->count = (size_t)a * (size_t)b * (size_t)c * (size_t)d;
    v->f = (float *)calloc(v->count + 1, sizeof(float));
    return v;
}

static void forget_values(void) {
    while (value_count) free(values[--value_count].f);
}

/* An initialiser. */
static void read_tensor(slice s) {
    const field type = find(s, 2), raw = find(s, 9);
    int shape[4] = {1, 1, 1, 1}, dims = 0;
    slice rest = s;
    field f;
    value *v;
    while (next(&rest, &f))
        if (f.number == 1 && dims < 4) shape[dims++] = (int)f.value;
    v = new_value(find(s, 8).bytes, dims, shape[0], shape[1], shape[2], shape[3]);
    v->integers = type.value == 7;
    CHECK((type.value == 1 || type.value == 7) && raw.bytes.size == v->count * (v->integers ? 8 : 4),
          "%.*s: type %d, %.0f bytes for %.0f values", (int)v->name.size, (const char *)v->name.at, (int)type.value,
          (double)raw.bytes.size, (double)v->count);
    if (v->integers)
        memcpy(v->i, raw.bytes.at, raw.bytes.size < sizeof v->i ? raw.bytes.size : sizeof v->i);
    else if (raw.bytes.size == v->count * 4)
        memcpy(v->f, raw.bytes.at, raw.bytes.size);
}

/* Attribute name of a node, as integers, or the float as *real; returns their number. */
static int attribute(slice node, const char *name, int64_t *out, float *real) {
    field f, g;
    while (next(&node, &f)) {
        slice s = f.bytes;
        int n = 0;
        if (f.number != 5 || !is(find(s, 1).bytes, name)) continue;
        while (next(&s, &g)) {
            if ((g.number == 3 || g.number == 8) && n < 8) out[n++] = (int64_t)g.value;
            if (g.number == 2 && real) memcpy(real, g.bytes.at, 4);
        }
        return n;
    }
    return 0;
}

static size_t at4(const value *v, int n, int c, int h, int w) {
    return (((size_t)n * (size_t)v->shape[1] + (size_t)c) * (size_t)v->shape[2] + (size_t)h) * (size_t)v->shape[3] +
           (size_t)w;
}

/* b's value for element (n, c, h, w) of the result, as numpy broadcasts trailing dimensions. */
static float broadcast(const value *b, const int *p) {
    size_t at = 0;
    int i;
    for (i = 0; i < b->dims; i++) at = at * (size_t)b->shape[i] + (size_t)(b->shape[i] == 1 ? 0 : p[4 - b->dims + i]);
    return b->f[at];
}

/* Convolution (w) or max pooling (w NULL). */
static void window(slice node, const value *x, const value *w, const value *bias, slice name) {
    int64_t kernel[8] = {1, 1}, stride[8] = {1, 1}, pads[8] = {0}, group[8] = {1};
    int n, c, p, q, i, j, k, h, v, from, per;
    value *y;
    attribute(node, "kernel_shape", kernel, NULL);
    attribute(node, "strides", stride, NULL);
    attribute(node, "pads", pads, NULL);
    attribute(node, "group", group, NULL);
    per = w ? w->shape[1] : 1;
    y = new_value(name, 4, x->shape[0], w ? w->shape[0] : x->shape[1],
                  (int)((x->shape[2] + pads[0] + pads[2] - kernel[0]) / stride[0]) + 1,
                  (int)((x->shape[3] + pads[1] + pads[3] - kernel[1]) / stride[1]) + 1);
    CHECK(!w || (w->shape[2] == kernel[0] && w->shape[1] * group[0] == x->shape[1]), "a kernel of other size or depth");
    for (n = 0; n < y->shape[0]; n++)
        for (c = 0; c < y->shape[1]; c++)
            for (p = 0; p < y->shape[2]; p++)
                for (q = 0; q < y->shape[3]; q++) {
                    double sum = bias ? (double)bias->f[c] : 0, most = -INFINITY;
                    for (i = 0; i < kernel[0]; i++)
                        for (j = 0; j < kernel[1]; j++) {
                            h = (int)(p * stride[0] - pads[0]) + i;
                            v = (int)(q * stride[1] - pads[1]) + j;
                            if (h < 0 || v < 0 || h >= x->shape[2] || v >= x->shape[3]) continue;
                            from = w ? c / (y->shape[1] / (int)group[0]) * per : c;
                            if (!w && (double)x->f[at4(x, n, c, h, v)] > most) most = (double)x->f[at4(x, n, c, h, v)];
                            for (k = 0; w && k < per; k++)
                                sum += (double)w->f[at4(w, c, k, i, j)] * (double)x->f[at4(x, n, from + k, h, v)];
                        }
                    y->f[at4(y, n, c, p, q)] = (float)(w ? sum : most);
                }
}

/* Batch norm, or instance norm where mean is NULL: over dimensions 0 and 1 of x. */
static void norm(slice node, const value *x, const value *const *in, slice name) {
    const size_t rest = x->count / (size_t)(x->shape[0] * x->shape[1]);
    value *y = new_value(name, x->dims, x->shape[0], x->shape[1], x->shape[2], x->shape[3]);
    int64_t none[8];
    float epsilon = 0;
    size_t i, k, c;
    attribute(node, "epsilon", none, &epsilon);
    for (k = 0; k < (size_t)(x->shape[0] * x->shape[1]); k++) {
        double mean = 0, var = 0;
        c = k % (size_t)x->shape[1];
        for (i = 0; i < rest; i++) mean += (double)x->f[k * rest + i] / (double)rest;
        for (i = 0; i < rest; i++) var += pow((double)x->f[k * rest + i] - mean, 2) / (double)rest;
        if (in[3]) mean = (double)in[3]->f[c];
        if (in[4]) var = (double)in[4]->f[c];
        for (i = 0; i < rest; i++)
            y->f[k * rest + i] =
                (float)(((double)x->f[k * rest + i] - mean) / sqrt(var + (double)epsilon) * (double)in[1]->f[c] +
                        (double)in[2]->f[c]);
    }
}

/* Every element of y from x: kind 0: Slice (starts, steps of the last two dimensions), 1: Pad (in front, of channels),
   2: Transpose to N x H x W x C. */
static void move(const value *x, value *y, int kind, const int64_t *a, const int64_t *b) {
    int n, c, h, w;
    for (n = 0; n < y->shape[0]; n++)
        for (c = 0; c < y->shape[1]; c++)
            for (h = 0; h < y->shape[2]; h++)
                for (w = 0; w < y->shape[3]; w++) {
                    float *to = &y->f[at4(y, n, c, h, w)];
                    if (kind == 0)
                        *to = x->f[at4(x, n, c, (int)(a[0] + h * b[0]), (int)(a[1] + w * b[1]))];
                    else if (kind == 1)
                        *to = c < a[1] || c >= a[1] + x->shape[1] ? 0 : x->f[at4(x, n, c - (int)a[1], h, w)];
                    else
                        *to = x->f[at4(x, n, w, c, h)];
                }
}

static void run_node(slice node) {
    const slice op = find(node, 4).bytes, name = find(node, 2).bytes;
    const value *in[SLOTS] = {NULL}, *x;
    int64_t numbers[8] = {0};
    int inputs = 0, i, k, p[4];
    size_t e, d;
    slice rest = node;
    value *y;
    field f;
    while (next(&rest, &f)) {
        if (f.number != 1 || inputs == SLOTS) continue;
        in[inputs] = lookup(f.bytes);
        CHECK(in[inputs], "%.*s reads %.*s, which is not there yet", (int)name.size, (const char *)name.at,
              (int)f.bytes.size, (const char *)f.bytes.at);
        if (!in[inputs++]) return;
    }
    x = in[0];
    if (is(op, "Conv"))
        window(node, x, in[1], in[2], name);
    else if (is(op, "MaxPool"))
        window(node, x, NULL, NULL, name);
    else if (is(op, "BatchNormalization") || is(op, "InstanceNormalization"))
        norm(node, x, in, name);
    else if (is(op, "GlobalAveragePool")) {
        y = new_value(name, 4, x->shape[0], x->shape[1], 1, 1);
        for (e = 0, d = x->count / y->count; e < x->count; e++) y->f[e / d] += x->f[e] / (float)d;
    } else if (is(op, "Slice")) {
        CHECK(in[3]->i[0] == 2 && in[3]->i[1] == 3, "Slice along other dimensions");
        y = new_value(name, 4, x->shape[0], x->shape[1], (int)((in[2]->i[0] - in[1]->i[0] - 1) / in[4]->i[0]) + 1,
                      (int)((in[2]->i[1] - in[1]->i[1] - 1) / in[4]->i[1]) + 1);
        move(x, y, 0, in[1]->i, in[4]->i);
    } else if (is(op, "Pad")) {
        y = new_value(name, 4, x->shape[0], x->shape[1] + (int)(in[1]->i[1] + in[1]->i[5]), x->shape[2], x->shape[3]);
        move(x, y, 1, in[1]->i, NULL);
    } else if (is(op, "Transpose")) {
        CHECK(attribute(node, "perm", numbers, NULL) == 4 && numbers[1] == 2 && numbers[2] == 3 && numbers[3] == 1,
              "another permutation");
        y = new_value(name, 4, x->shape[0], x->shape[2], x->shape[3], x->shape[1]);
        move(x, y, 2, NULL, NULL);
    } else if (is(op, "Flatten") || is(op, "Reshape")) {
        const int n = x->shape[0], left = (int)(x->count / (size_t)n);
        if (is(op, "Flatten"))
            y = new_value(name, 2, n, left, 1, 1);
        else
            y = new_value(name, in[1]->shape[0], n, (int)in[1]->i[1],
                          in[1]->i[2] < 0 ? left / (int)in[1]->i[1] : (int)in[1]->i[2],
                          in[1]->shape[0] == 4 ? (int)in[1]->i[3] : 1);
        CHECK(y->count == x->count, "%.*s: %.0f values out of %.0f", (int)name.size, (const char *)name.at,
              (double)y->count, (double)x->count);
        if (y->count == x->count) memcpy(y->f, x->f, x->count * sizeof(float));
    } else if (is(op, "Gemm")) {
        CHECK(attribute(node, "transB", numbers, NULL) == 1 && numbers[0] == 1 && x->dims == 2 &&
                  in[1]->shape[1] == x->shape[1],
              "Gemm without transB, or of other shapes");
        y = new_value(name, 2, x->shape[0], in[1]->shape[0], 1, 1);
        for (e = 0; e < y->count; e++) {
            const size_t row = e / (size_t)y->shape[1], k1 = e % (size_t)y->shape[1], depth = (size_t)x->shape[1];
            double sum = (double)in[2]->f[k1];
            for (d = 0; d < depth; d++) sum += (double)x->f[row * depth + d] * (double)in[1]->f[k1 * depth + d];
            y->f[e] = (float)sum;
        }
    } else if (is(op, "Relu") || is(op, "Sub") || is(op, "Div") || is(op, "Mul") || is(op, "Add")) {
        y = new_value(name, x->dims, x->shape[0], x->shape[1], x->shape[2], x->shape[3]);
        for (e = 0; e < y->count; e++) {
            const float a = x->f[e];
            float b;
            for (i = 3, d = e; i >= 0; i--) {
                k = i < x->dims ? x->shape[i] : 1;
                p[i] = (int)(d % (size_t)k);
                d /= (size_t)k;
            }
            b = in[1] ? broadcast(in[1], p) : 0;
            y->f[e] = op.at[0] == 'R'   ? (a > 0 ? a : 0)
                      : op.at[0] == 'S' ? a - b
                      : op.at[0] == 'D' ? a / b
                      : op.at[0] == 'M' ? a * b
                                        : a + b;
        }
    } else
        CHECK(0, "%.*s: no plain loops for %.*s", (int)name.size, (const char *)name.at, (int)op.size,
              (const char *)op.at);
}

/* Runs the graph of a model on n pictures (n x C x H x W); its values stay in the list. */
static void run_graph(slice model, const float *input, int n, int c, int h, int w) {
    static const char name[] = "input";
    const slice graph = find(model, 7).bytes;
    slice rest = graph, id;
    value *x;
    field f;
    forget_values();
    id.at = (const unsigned char *)name;
    id.size = 5;
    x = new_value(id, 4, n, c, h, w);
    memcpy(x->f, input, x->count * sizeof(float));
    while (next(&rest, &f))
        if (f.number == 5) read_tensor(f.bytes);
    rest = graph;
    while (next(&rest, &f))
        if (f.number == 1) run_node(f.bytes);
}

/* ---- networks ---- */

/* Every kind of layer, none in its plainest form. */
static ckca_model *every_layer(ckca_context *ctx, const float *mean, const float *std) {
    ckca_model *m = NULL;
    ckca_model_desc desc;
    ckca_conv_desc conv;
    int x, y;
    memset(&desc, 0, sizeof desc);
    memset(&conv, 0, sizeof conv);
    desc.height = 11;
    desc.width = 14;
    desc.channels = 2;
    desc.classes = 5;
    desc.mean = mean;
    desc.std = std;
    if (ckca_model_create(ctx, &m, &desc)) return NULL;
    conv.out = 6;
    conv.kernel = 5;
    conv.stride = 2;
    conv.pad = 3;
    conv.bias = 1;
    x = ckca_layer_conv(m, "shape", ckca_layer_input(m), conv); /* named like a constant of the writer */
    x = ckca_layer_batchnorm(m, "input", x);
    x = ckca_layer_groupnorm(m, "logits", ckca_layer_relu(m, x), 3);
    x = ckca_layer_maxpool(m, x, 3, 2, 1);
    ckca_layer_relu(m, x); /* read by nothing: it is not written */
    y = ckca_layer_subsample(m, x, 2, 9);
    conv.out = 9;
    conv.kernel = 1;
    conv.pad = conv.bias = 0;
    x = ckca_layer_batchnorm(m, "b", ckca_layer_conv(m, "a", x, conv));
    x = ckca_layer_add(m, x, y);
    x = ckca_layer_batchnorm(m, "alone", x); /* no convolution to fold it into */
    y = ckca_layer_subsample(m, x, 1, 9);    /* nothing to do */
    x = ckca_layer_linear(m, "map", y, 7);   /* reads a map of 2 x 2 */
    x = ckca_layer_groupnorm(m, "g", ckca_layer_relu(m, x), 1);
    x = ckca_layer_linear(m, "fc", ckca_layer_avgpool(m, x), 5);
    if (ckca_model_finish(m, x)) printf("FAIL: %s\n", ckca_error(ctx)), exit(1);
    return m;
}

static void draw_tensors(ckca_model *m) {
    float *draw;
    int t, k;
    for (t = 0; t < ckca_tensor_count(m); t++) {
        ckca_tensor_info info;
        const char *suffix;
        ckca_tensor_info_get(m, t, &info);
        suffix = strrchr(info.name, '.');
        draw = (float *)malloc((size_t)info.count * sizeof(float));
        ckca_tensor_read(m, t, CKCA_SLOT_VALUE, draw);
        for (k = 0; k < (int)info.count; k++) {
            if (info.dims > 1) continue;
            draw[k] = 0.3f * noise();
            if (!strcmp(suffix, ".running_var") || !strcmp(suffix, ".weight")) draw[k] += 1;
        }
        ckca_tensor_write(m, t, CKCA_SLOT_VALUE, draw);
        free(draw);
    }
}

static unsigned char *saved(ckca_model *m, const ckca_onnx_desc *desc, size_t *size) {
    unsigned char *bytes;
    if (ckca_save_onnx_memory(m, desc, NULL, 0, size)) return NULL;
    bytes = (unsigned char *)malloc(*size);
    if (ckca_save_onnx_memory(m, desc, bytes, *size, size)) return NULL;
    return bytes;
}

/* Writes the network in all four ways and runs what was written. */
static void check_network(const char *what, ckca_model *m) {
    enum { N = 2 };
    ckca_model_info info;
    int way, n, h, w, c, i;
    size_t count, e, pixels;
    float *nhwc, *nchw, *bytes, logits[N * 16];
    ckca_context *ctx = m->ctx;
    draw_tensors(m);
    ckca_model_info_get(m, &info);
    pixels = (size_t)info.height * (size_t)info.width;
    count = N * pixels * (size_t)info.channels;
    nhwc = (float *)malloc(count * sizeof(float));
    nchw = (float *)malloc(count * sizeof(float));
    bytes = (float *)malloc(count * sizeof(float));
    for (n = 0; n < N; n++)
        for (h = 0; h < info.height; h++)
            for (w = 0; w < info.width; w++)
                for (c = 0; c < info.channels; c++) {
                    const size_t a = (((size_t)n * (size_t)info.height + (size_t)h) * (size_t)info.width + (size_t)w) *
                                         (size_t)info.channels +
                                     (size_t)c;
                    const size_t b = ((size_t)n * (size_t)info.channels + (size_t)c) * pixels +
                                     (size_t)h * (size_t)info.width + (size_t)w;
                    bytes[b] = (float)(int)(127.5f * (noise() + 1));
                    nchw[b] = nhwc[a] = (bytes[b] / 255 - info.mean[c]) / info.std[c];
                }
    CHECK(!ckca_forward(m, nhwc, N, 0) && !ckca_node_read(m, info.logits, logits), "%s: %s", what, ckca_error(ctx));
    for (way = 0; way < 4; way++) {
        ckca_onnx_desc desc;
        size_t size = 0;
        slice model, logits_name;
        double far = 0, largest = 0;
        const value *y;
        desc.fold_batchnorm = way & 1;
        desc.normalized_input = way >> 1;
        model.at = saved(m, &desc, &size);
        model.size = size;
        CHECK(model.at, "%s: %s", what, ckca_error(ctx));
        run_graph(model, way >> 1 ? nchw : bytes, N, info.channels, info.height, info.width);
        logits_name.at = (const unsigned char *)"logits";
        logits_name.size = 6;
        y = lookup(logits_name);
        CHECK(y && y->dims == 2 && y->shape[0] == N && y->shape[1] == info.classes, "%s, way %d: no logits", what, way);
        for (e = 0; y && e < y->count; e++) {
            far = fmax(far, fabs((double)(y->f[e] - logits[e])));
            largest = fmax(largest, fabs((double)logits[e]));
        }
        CHECK(far <= 2e-5 * largest, "%s, way %d: the logits are %g apart, the largest is %g", what, way, far, largest);
        for (i = 0; i < ckca_tensor_count(m) && !(way & 1); i++) { /* not folded: the checkpoint's tensors */
            ckca_tensor_info tensor;
            slice name;
            const value *v;
            float *values_;
            ckca_tensor_info_get(m, i, &tensor);
            name.at = (const unsigned char *)tensor.name;
            name.size = strlen(tensor.name);
            v = lookup(name);
            values_ = (float *)malloc((size_t)tensor.count * sizeof(float));
            ckca_tensor_read(m, i, CKCA_SLOT_VALUE, values_);
            CHECK(v && (int64_t)v->count == tensor.count && v->shape[0] == tensor.shape[0] &&
                      !memcmp(v->f, values_, v->count * sizeof(float)),
                  "%s: initialiser %s is missing or another", what, tensor.name);
            free(values_);
        }
        { /* every output is read */
            slice rest = find(model, 7).bytes, inner;
            field f, g;
            int read = 0, k;
            char seen_names[VALUES] = {0};
            while (next(&rest, &f)) {
                if (f.number != 1) continue;
                for (inner = f.bytes; next(&inner, &g);) {
                    const value *v = g.number == 1 ? lookup(g.bytes) : NULL;
                    if (v) seen_names[v - values] = 1;
                }
            }
            for (k = 0; k < value_count; k++) read += seen_names[k];
            CHECK(read == value_count - 1, "%s, way %d: only %d of %d values are read", what, way, read, value_count);
        }
        if (way & 1) { /* folded: no batch norm behind a convolution */
            slice rest = find(model, 7).bytes;
            int norms = 0, expected = 0;
            field f;
            while (next(&rest, &f)) norms += f.number == 1 && is(find(f.bytes, 4).bytes, "BatchNormalization");
            for (i = 0; i < m->nodes; i++)
                expected +=
                    m->node[i].kind == CKCA__KIND_BATCHNORM && m->node[m->node[i].in[0]].kind != CKCA__KIND_CONV;
            CHECK(norms == expected, "%s: %d batch norms, not %d", what, norms, expected);
        }
        free((void *)(uintptr_t)model.at);
    }
    forget_values();
    free(nhwc);
    free(nchw);
    free(bytes);
}

static const float three_means[3] = {0.48f, 0.46f, 0.4f}, three_stds[3] = {0.23f, 0.22f, 0.25f};

static ckca_model *resnet(ckca_context *ctx, const char *arch, int h, int w, int projection) {
    ckca_model *m = NULL;
    ckca_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.height = h;
    desc.width = w;
    desc.classes = 7;
    desc.width_base = 4;
    desc.projection = projection;
    desc.mean = three_means;
    desc.std = three_stds;
    if (ckca_resnet(ctx, &m, arch, &desc)) printf("FAIL: %s\n", ckca_error(ctx)), exit(1);
    return m;
}

static void test_graphs(void) {
    static const struct {
        const char *arch;
        int h, w, projection;
    } nets[] = {{"resnet8", 11, 9, 0}, {"resnet20", 8, 8, 1}, {"resnet18", 33, 41, 0}, {"resnet50-cifar", 9, 8, 0}};
    ckca_context *ctx = new_context(1);
    ckca_model *m;
    size_t i;
    for (i = 0; i < sizeof nets / sizeof *nets; i++) {
        m = resnet(ctx, nets[i].arch, nets[i].h, nets[i].w, nets[i].projection);
        check_network(nets[i].arch, m);
        ckca_model_free(m);
    }
    m = every_layer(ctx, three_means, three_stds);
    check_network("every layer", m);
    ckca_model_free(m);
    ckca_context_free(ctx);
}

/* What stands around the graph, what is refused, and that the model stays as it is. */
static void test_onnx_file(void) {
    static const char *const names[] = {"a\"b", "\xc3\xa9", "c"};
    ckca_context *ctx = new_context(1);
    ckca_model *m = NULL, *bare = NULL, *open = NULL;
    ckca_model_desc desc;
    ckca_onnx_desc onnx;
    unsigned char *bytes, *before, *after;
    size_t size, size2, read;
    slice model, rest;
    field f;
    FILE *file;
    float nan_ = NAN;
    int found = 0;
    memset(&desc, 0, sizeof desc);
    memset(&onnx, 0, sizeof onnx);
    desc.height = desc.width = 8;
    desc.classes = 3;
    CHECK(!ckca_resnet(ctx, &bare, "resnet8", &desc), "%s", ckca_error(ctx));
    desc.mean = three_means;
    desc.std = three_stds;
    desc.class_names = names;
    CHECK(!ckca_resnet(ctx, &m, "resnet8", &desc), "%s", ckca_error(ctx));
    ckca_save_memory(m, NULL, 0, &size);
    before = (unsigned char *)malloc(size);
    after = (unsigned char *)malloc(size);
    ckca_save_memory(m, before, size, &size);
    bytes = saved(m, NULL, &size2);
    ckca_save_memory(m, after, size, &size);
    CHECK(!memcmp(before, after, size), "writing ONNX changed the model");
    free(before);
    free(after);

    model.at = bytes;
    model.size = size2;
    CHECK(find(model, 1).value == 7 && find(find(model, 8).bytes, 2).value == 13, "IR version %d, opset %d",
          (int)find(model, 1).value, (int)find(find(model, 8).bytes, 2).value);
    CHECK(is(find(model, 3).bytes, CKCA_VERSION), "the producer's version is another");
    for (rest = model; next(&rest, &f);) {
        if (f.number != 14) continue;
        if (is(find(f.bytes, 1).bytes, "ckca.class_names"))
            found += is(find(f.bytes, 2).bytes, "[\"a\\\"b\",\"\xc3\xa9\",\"c\"]");
        if (is(find(f.bytes, 1).bytes, "ckca.mean"))
            found += is(find(f.bytes, 2).bytes, "0.479999989 0.460000008 0.400000006");
        if (is(find(f.bytes, 1).bytes, "ckca.arch")) found += is(find(f.bytes, 2).bytes, "resnet8");
    }
    CHECK(found == 3, "%d of 3 metadata", found);
    { /* N x 3 x 8 x 8 */
        const slice shape = find(find(find(find(find(model, 7).bytes, 11).bytes, 2).bytes, 1).bytes, 2).bytes;
        int i = 0, good = 0;
        for (rest = shape; next(&rest, &f); i++)
            good += i == 0 ? is(find(f.bytes, 2).bytes, "N") : find(f.bytes, 1).value == (i == 1 ? 3u : 8u);
        CHECK(i == 4 && good == 4, "the input has %d dimensions, %d are right", i, good);
    }

    CHECK(!ckca_save_onnx(m, "build/a.onnx", NULL), "%s", ckca_error(ctx));
    file = fopen("build/a.onnx", "rb");
    after = (unsigned char *)malloc(size2 + 1);
    read = file ? fread(after, 1, size2 + 1, file) : 0;
    CHECK(read == size2 && !memcmp(after, bytes, size2), "the file has %.0f bytes, memory %.0f", (double)read,
          (double)size2);
    if (file) fclose(file);
    free(after);
    remove("build/a.onnx");

    expect(ctx, "capacity", ckca_save_onnx_memory(m, NULL, bytes, size2 - 1, &size), CKCA_EINVAL, "the model needs");
    expect(ctx, "folder", ckca_save_onnx(m, "build/none/a.onnx", NULL), CKCA_EIO,
           "build/none/a.onnx: cannot be created");
    expect(ctx, "a folder", ckca_save_onnx(m, "build", NULL), CKCA_EIO, "not a regular file");
    expect(ctx, "mean", ckca_save_onnx_memory(bare, NULL, NULL, 0, &size), CKCA_EINVAL, "no mean and std");
    onnx.normalized_input = 1;
    CHECK(!ckca_save_onnx_memory(bare, &onnx, NULL, 0, &size) && size > 1000, "%s", ckca_error(ctx));
    onnx.normalized_input = 2;
    expect(ctx, "desc", ckca_save_onnx(m, "build/a.onnx", &onnx), CKCA_EINVAL, "normalized_input is 2");
    expect(ctx, "path", ckca_save_onnx(m, NULL, NULL), CKCA_EINVAL, "path is NULL");
    expect(ctx, "size", ckca_save_onnx_memory(m, NULL, bytes, size2, NULL), CKCA_EINVAL, "size is NULL");
    CHECK(ckca_save_onnx(NULL, "build/a.onnx", NULL) == CKCA_EINVAL, "no model");
    CHECK(ckca_save_onnx_memory(NULL, NULL, NULL, 0, &size) == CKCA_EINVAL, "no model");
    CHECK(!ckca_model_create(ctx, &open, &desc), "%s", ckca_error(ctx));
    expect(ctx, "unfinished", ckca_save_onnx(open, "build/a.onnx", NULL), CKCA_EINVAL, "not finished");
    m->values[0] = nan_;
    expect(ctx, "NaN", ckca_save_onnx(m, "build/a.onnx", NULL), CKCA_ENAN, "conv1.weight is not finite");
    CHECK(access("build/a.onnx", F_OK) && access("build/a.onnx.tmp", F_OK), "a refused model left a file");
    free(bytes);
    ckca_model_free(m);
    ckca_model_free(bare);
    ckca_model_free(open);
    ckca_context_free(ctx);
}

static ckca_status onnx_job(ckca_context *ctx) {
    ckca_model *m = NULL;
    ckca_model_desc desc;
    ckca_onnx_desc onnx;
    ckca_status status;
    memset(&desc, 0, sizeof desc);
    memset(&onnx, 0, sizeof onnx);
    desc.height = desc.width = 4;
    desc.classes = 2;
    desc.mean = three_means;
    desc.std = three_stds;
    onnx.fold_batchnorm = 1;
    if ((status = ckca_resnet(ctx, &m, "resnet8", &desc))) return status;
    status = ckca_save_onnx(m, "build/job.onnx", &onnx);
    if (status && (!access("build/job.onnx", F_OK) || !access("build/job.onnx.tmp", F_OK))) status = CKCA_EIO;
    remove("build/job.onnx");
    ckca_model_free(m);
    return status;
}

/* ---- the sizes of structures ---- */

static void test_sizes(void) {
    CHECK(ckca_struct_size("ckca_update_desc") == sizeof(ckca_update_desc), "ckca_update_desc has %.0f bytes",
          (double)ckca_struct_size("ckca_update_desc"));
    CHECK(ckca_struct_size("ckca_conv_desc") == sizeof(ckca_conv_desc), "ckca_conv_desc");
    CHECK(ckca_struct_size("ckca_model") == 0 && ckca_struct_size("") == 0 && ckca_struct_size(NULL) == 0,
          "a size for no public structure");
    CHECK(!strcmp(ckca_version(), CKCA_VERSION), "version %s", ckca_version());
}

/* ---- budgets ---- */

/* Memory of a context that knows its peak. */
typedef struct gauge {
    size_t live, peak;
} gauge;
static void *gauge_alloc(size_t bytes, void *user) {
    gauge *g = (gauge *)user;
    g->live += bytes;
    if (g->live > g->peak) g->peak = g->live;
    return malloc(bytes);
}
static void gauge_release(void *memory, size_t bytes, void *user) {
    ((gauge *)user)->live -= bytes;
    free(memory);
}

static ckca_data *stripes(ckca_context *ctx, int count) {
    static unsigned char pixels[64 * 8 * 8];
    static int labels[64];
    ckca_array array;
    ckca_data *data = NULL;
    int i;
    memset(&array, 0, sizeof array);
    for (i = 0; i < count * 64; i++) {
        const int down = labels[i / 64] = i / 64 % 2;
        pixels[i] = (unsigned char)(100 + 80 * noise() + (float)((down ? i : i / 8) % 2 * 50));
    }
    array.pixels = pixels;
    array.labels = labels;
    array.count = count;
    array.height = array.width = 8;
    array.channels = 1;
    array.classes = 2;
    if (ckca_open_array(ctx, &data, &array, NULL)) printf("FAIL: %s\n", ckca_error(ctx)), exit(1);
    return data;
}

static ckca_model *small(ckca_context *ctx) {
    ckca_model *m = NULL;
    ckca_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = 8;
    desc.channels = 1;
    desc.classes = 2;
    desc.width_base = 4;
    if (ckca_resnet(ctx, &m, "resnet8", &desc)) printf("FAIL: %s\n", ckca_error(ctx)), exit(1);
    return m;
}

static void test_memory(void) {
    static const struct {
        ckca_method method;
        ckca_featreg featreg;
        int pad;
    } cases[] = {{CKCA_METHOD_CKCA, CKCA_FEATREG_STAGES, 1},
                 {CKCA_METHOD_CKCA, CKCA_FEATREG_CENTROID, 0},
                 {CKCA_METHOD_LWF, CKCA_FEATREG_STAGES, 0},
                 {CKCA_METHOD_SHRINK_PERTURB, CKCA_FEATREG_STAGES, 0}};
    size_t i;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        gauge g = {0, 0};
        ckca_desc desc;
        ckca_context *ctx;
        ckca_data *data;
        ckca_model *m;
        ckca_update_desc d;
        ckca_status status;
        size_t before, bytes = 0, whole = 0, more = 0;
        memset(&desc, 0, sizeof desc);
        memset(&d, 0, sizeof d);
        desc.threads = 1;
        desc.alloc = gauge_alloc;
        desc.release = gauge_release;
        desc.user = &g;
        if (ckca_init(&ctx, &desc)) exit(1);
        data = stripes(ctx, 64);
        m = small(ctx);
        m->updates = 1; /* so that the method has a teacher */
        d.method = cases[i].method;
        d.featreg = cases[i].featreg;
        d.holdout = CKCA_OFF;
        d.augment.pad = cases[i].pad;
        d.epochs = 1;
        d.state = "build/memory.state";
        CHECK(!ckca_update_defaults(m, data, &d) && d.batch == 64, "batch %d: %s", d.batch, ckca_error(ctx));
        CHECK(!ckca__update_bytes(m, data, &d, 9, &bytes) && !ckca__update_bytes(m, data, &d, 10, &more) &&
                  !ckca__update_bytes(m, data, &d, 64, &whole),
              "%s", ckca_error(ctx));
        CHECK(bytes < more && more < whole, "%.0f, %.0f, %.0f bytes for 9, 10, 64", (double)bytes, (double)more,
              (double)whole);
        d.memory_mb = (float)((double)(bytes / 2 + more / 2) * 1e-6);
        CHECK(!ckca_update_defaults(m, data, &d) && d.batch == 9, "batch %d in %g MB: %s", d.batch, (double)d.memory_mb,
              ckca_error(ctx));
        d.batch = 0;
        before = g.live;
        g.peak = 0;
        CHECK(!ckca_update(m, data, &d, NULL), "%s", ckca_error(ctx));
        CHECK((double)(g.peak - before) <= (double)d.memory_mb * 1e6, "case %d: peak %.0f bytes, %g MB were allowed",
              (int)i, (double)(g.peak - before), (double)d.memory_mb);
        CHECK(!CKCA__DEVICE_IS_HOST || (double)(g.peak - before) >= 0.6 * (double)d.memory_mb * 1e6,
              "case %d: peak %.0f bytes, far below the %g MB allowed", (int)i, (double)(g.peak - before),
              (double)d.memory_mb);
        CHECK(m->evaluation_batch == 0, "the evaluations after an update are limited too");
        d.memory_mb = 0.02f;
        status = ckca_update(m, data, &d, NULL);
        expect(ctx, "memory", status, CKCA_EINVAL, "memory_mb is 0.02, but a batch of 1 needs");
        { /* a teacher that is refused */
            ckca_model *open = NULL;
            ckca_model_desc net;
            memset(&net, 0, sizeof net);
            net.classes = 2;
            CHECK(!ckca_model_create(ctx, &open, &net), "%s", ckca_error(ctx));
            d.memory_mb = 50;
            d.teacher = open;
            status = ckca_update(m, data, &d, NULL);
            CHECK(cases[i].method == CKCA_METHOD_SHRINK_PERTURB || status == CKCA_EINVAL, "an unfinished teacher: %s",
                  ckca_error(ctx));
            d.teacher = NULL;
            ckca_model_free(open);
        }
        d.memory_mb = -3;
        expect(ctx, "memory", ckca_update(m, data, &d, NULL), CKCA_EINVAL, "memory_mb is -3");
        remove("build/memory.state");
        ckca_model_free(m);
        ckca_data_free(data);
        ckca_context_free(ctx);
    }
}

typedef struct seen {
    int stop_at, calls, epochs;
    float lr;
} seen;
static int watch(const ckca_progress *p, void *user) {
    seen *s = (seen *)user;
    s->epochs = p->epochs;
    s->lr = p->lr;
    return ++s->calls == s->stop_at;
}

static int same_values(ckca_model *a, ckca_model *b) { return !memcmp(a->values, b->values, a->all * sizeof(float)); }

static void test_seconds(void) {
    static const char state[] = "build/seconds.state";
    ckca_context *ctx = new_context(1);
    ckca_data *data = stripes(ctx, 24);
    ckca_model *start = small(ctx), *m = NULL, *other = NULL;
    ckca_update_desc d, plain;
    ckca_report report, second;
    seen s = {0, 0, 0, 0};
    unsigned char *bytes;
    size_t size;
    FILE *file;
    char *plan;
    memset(&d, 0, sizeof d);
    d.epochs = 2;
    d.batch = 10;
    CHECK(!ckca_update(start, data, &d, NULL), "%s", ckca_error(ctx));

    /* time for everything: the update without a limit */
    ckca_model_copy(&m, start);
    ckca_model_copy(&other, start);
    d.seconds = 1000;
    plain = d;
    plain.seconds = 0;
    CHECK(!ckca_update(m, data, &d, &report) && !ckca_update(other, data, &plain, &second), "%s", ckca_error(ctx));
    CHECK(report.epochs == 2 && report.steps == 6 && same_values(m, other), "%d epochs, %d steps, or other bits",
          report.epochs, report.steps);
    CHECK(m->batches_tracked == other->batches_tracked, "%.0f passes are counted, not %.0f", (double)m->batches_tracked,
          (double)other->batches_tracked);
    ckca_model_free(m);
    ckca_model_free(other);

    /* time for part of it: a whole schedule of fewer epochs */
    ckca_model_copy(&m, start);
    ckca_model_copy(&other, start);
    d.epochs = 3000;
    d.warmup_epochs = 300;
    d.seconds = 0.03f; /* one look per SGD step: 30 steps, less what measuring took, less a tenth */
    d.progress = watch;
    d.user = &s;
    CHECK(!ckca_update(m, data, &d, &report), "%s", ckca_error(ctx));
    CHECK(report.epochs == 8 && report.steps == 3 * 8 && s.epochs == 8, "%d epochs, %d steps, %d epochs in progress",
          report.epochs, report.steps, s.epochs);
    CHECK(report.seconds <= 0.03 && report.seconds > 0.02, "it took %g s, 0.03 were allowed", report.seconds);
    CHECK(s.lr < 0.001f, "after %d epochs the learning rate is %g", report.epochs, (double)s.lr);
    plain = d;
    plain.seconds = 0;
    plain.progress = NULL;
    plain.epochs = report.epochs;
    plain.warmup_epochs *= (float)report.epochs / 3000.0f;
    CHECK(!ckca_update(other, data, &plain, NULL) && same_values(m, other), "other bits than %d epochs without a limit",
          report.epochs);
    ckca_model_free(m);
    ckca_model_free(other);

    /* stopped and resumed: the state's plan */
    ckca_model_copy(&m, start);
    ckca_model_copy(&other, start);
    d.state = state;
    s.calls = 0;
    s.stop_at = 5;
    expect(ctx, "stop", ckca_update(m, data, &d, NULL), CKCA_ESTOP, "was stopped");
    ckca_model_free(m);
    ckca_model_copy(&m, start);
    file = fopen(state, "rb");
    bytes = (unsigned char *)calloc(1, 1 << 20);
    size = file ? fread(bytes, 1, (1 << 20) - 1, file) : 0;
    if (file) fclose(file);
    plan = strstr((char *)bytes + 8, " plan=");
    CHECK(size && plan, "the state holds no plan");
    if (plan) { /* a plan that makes no sense */
        plan[6] = '0';
        put(state, bytes, size);
        expect(ctx, "plan", ckca_update(m, data, &d, NULL), CKCA_EFORMAT, "ckca.state plans 0 epochs of 3000");
        CHECK(same_values(m, start), "a refused state changed the model");
    }
    free(bytes);
    remove(state);
    ckca_model_free(m);
    ckca_model_copy(&m, start);
    s.calls = 0;
    s.stop_at = 5;
    CHECK(ckca_update(m, data, &d, NULL) == CKCA_ESTOP, "%s", ckca_error(ctx));
    ckca_model_free(m);
    ckca_model_copy(&m, start);
    plain.epochs = s.epochs;
    plain.warmup_epochs = d.warmup_epochs * ((float)s.epochs / 3000.0f);
    s.stop_at = 0;
    CHECK(!ckca_update(m, data, &d, &report) && report.epochs == plain.epochs, "%d epochs, the plan was %d: %s",
          report.epochs, plain.epochs, ckca_error(ctx));
    CHECK(!ckca_update(other, data, &plain, NULL) && same_values(m, other), "resumed, it has other bits");
    d.seconds = 0.04f;
    ckca_model_free(m);
    ckca_model_copy(&m, start);
    expect(ctx, "another", ckca_update(m, data, &d, NULL), CKCA_EINVAL, "its seconds was 0.03, now it is 0.04");
    remove(state);

    /* no time */
    d.state = NULL;
    d.seconds = 0.004f;
    expect(ctx, "no time", ckca_update(m, data, &d, NULL), CKCA_EINVAL,
           "the epoch of 24 pictures takes 0.003; there is time for one of");
    CHECK(same_values(m, start) && m->updates == start->updates, "a refused update changed the model");
    d.seconds = -2;
    expect(ctx, "seconds", ckca_update(m, data, &d, NULL), CKCA_EINVAL, "seconds is -2");
    d.seconds = NAN;
    expect(ctx, "seconds", ckca_update(m, data, &d, NULL), CKCA_EINVAL, "seconds");
    ckca_model_free(m);
    ckca_model_free(other);
    ckca_model_free(start);
    ckca_data_free(data);
    ckca_context_free(ctx);
}

int main(void) {
    test_enter();
    test_group("ONNX: graphs of every layer, run by plain loops");
    test_graphs();
    test_group("ONNX: metadata, files, refusals");
    test_onnx_file();
    test_group("ONNX: every allocation failing");
    fail_each_allocation("onnx", onnx_job);
    test_group("sizes of structures");
    test_sizes();
    test_group("memory budget");
    test_memory();
    test_group("time budget");
    test_seconds();
    test_leave();
    return test_summary();
}
