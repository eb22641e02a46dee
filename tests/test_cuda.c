/* test_cuda.c: what only the GPU path has. Without CKCA_CUDA: that it is refused in words. With it, on a device or on
   the shim: TF32 and BF16 convolutions against the naive twins on factors that these formats hold exactly, so that
   nothing but the order of sums may differ; recorded steps against steps that run as they come; ops that no other test
   calls; training on pictures that come in a stream. On the shim also: every call of CUDA failing in turn; device memory
   running out; no waiting inside an epoch; streams that run behind, each for itself. */
#define CKCA_IMPLEMENTATION
#include "ckca.h"
#include "test.h"
#include "device.h"

#ifndef CKCA_CUDA
static void test_host(void) {
    ckca_desc desc;
    ckca_context *ctx = NULL;
    memset(&desc, 0, sizeof desc);
    for (desc.precision = CKCA_TF32; desc.precision <= CKCA_BF16; desc.precision = (ckca_precision)(desc.precision + 1))
        CHECK(ckca_init(&ctx, &desc) == CKCA_EINVAL && !ctx, "the host takes precision %d", (int)desc.precision);
}
int main(void) {
    test_host();
    return test_summary();
}
#else

#ifdef CKCA_CUDA_SHIM
extern size_t cuda_shim_memory;
extern int cuda_shim_fail, cuda_shim_lazy;
extern long cuda_shim_launches, cuda_shim_replays, cuda_shim_waits;
#endif

static ckca_context *context(ckca_precision precision) {
    ckca_desc desc;
    ckca_context *ctx = NULL;
    memset(&desc, 0, sizeof desc);
    desc.precision = precision;
    return ckca_init(&ctx, &desc) ? NULL : ctx;
}

/* ---- convolutions ---- */

/* Numbers in -1..1 of so few bits that BF16 holds them. */
static float *make(size_t count, uint64_t seed) {
    float *v = (float *)malloc((count + 1) * sizeof *v);
    size_t i;
    for (i = 0; i < count; i++) v[i] = (float)((int)(ckca__random(seed, 99, i) % 255) - 127) / 128;
    return v;
}

static void compare(const char *what, const ckca__conv *s, int precision, const float *got, const float *want,
                    size_t count, double terms) {
    double worst = 0;
    size_t i;
    for (i = 0; i < count; i++) {
        double error = fabs((double)got[i] - want[i]);
        if (!(error <= worst)) worst = error == error ? error : INFINITY;
    }
    CHECK(worst <= 2e-6 + 1.2e-7 * terms, "%s of %dx%dx%dx%d, %d of %dx%d, stride %d, pad %d, precision %d: off by %g",
          what, s->n, s->h, s->w, s->c, s->k, s->r, s->s, s->stride, s->pad, precision, worst);
}

static void test_conv(ckca_context *ctx, const ckca__conv *s) {
    const size_t nx = device_x(s), nw = device_w(s), ny = device_y(s);
    float *x = make(nx, 1), *w = make(nw, 2), *bias = make((size_t)s->k, 3), *residual = make(ny, 4), *dy = make(ny, 5);
    float *y = make(ny, 6), *dx = make(nx, 7), *dw = make(nw, 8), *db = make((size_t)s->k, 9);
    float *y2 = make(ny, 6), *dx2 = make(nx, 7), *dw2 = make(nw, 8), *db2 = make((size_t)s->k, 9);
    void *ws = malloc(ckca__conv_workspace(ctx, s) + nw * sizeof(float) + 1);
    const int taps = s->r * s->s;
    ckca__op_conv_forward(ctx, s, x, w, bias, residual, 1, y, ws);
    ckca__op_conv_backward_data(ctx, s, dy, w, dx, 1, ws);
    ckca__op_conv_backward_weight(ctx, s, x, dy, dw, db, ws);
    ckca__naive_conv_forward(ctx, s, x, w, bias, residual, 1, y2, (float *)ws);
    ckca__naive_conv_backward_data(ctx, s, dy, w, dx2, 1);
    ckca__naive_conv_backward_weight(ctx, s, x, dy, dw2, db2);
    compare("y", s, (int)ctx->precision, y, y2, ny, taps * s->c + 2);
    compare("dx", s, (int)ctx->precision, dx, dx2, nx, taps * s->k + 1);
    compare("dw", s, (int)ctx->precision, dw, dw2, nw, (double)s->n * s->p * s->q + 1);
    compare("dbias", s, (int)ctx->precision, db, db2, (size_t)s->k, (double)s->n * s->p * s->q + 1);
    ckca__op_conv_backward_data(ctx, s, dy, w, dx, 0, ws);
    ckca__naive_conv_backward_data(ctx, s, dy, w, dx2, 0);
    compare("dx, written", s, (int)ctx->precision, dx, dx2, nx, taps * s->k);
    free(x), free(w), free(bias), free(residual), free(dy), free(ws);
    free(y), free(dx), free(dw), free(db), free(y2), free(dx2), free(dw2), free(db2);
}

static void test_convs(ckca_context *ctx) {
    static const int table[][9] = {
        /* n  h  w  c  k  r  s stride pad */
        {3, 8, 8, 3, 16, 3, 3, 1, 1},   {2, 8, 8, 16, 16, 3, 3, 1, 1},  {3, 8, 8, 16, 32, 3, 3, 2, 1},
        {2, 6, 6, 32, 64, 3, 3, 1, 1},  {2, 8, 8, 32, 64, 1, 1, 2, 0},  {2, 7, 7, 20, 70, 1, 1, 1, 0},
        {1, 20, 20, 3, 64, 7, 7, 2, 3}, {2, 5, 5, 70, 24, 3, 3, 2, 1},  {2, 6, 5, 1, 1, 3, 3, 1, 1},
        {2, 9, 7, 17, 33, 3, 3, 1, 1},  {2, 7, 9, 31, 15, 3, 3, 2, 1},  {2, 9, 8, 18, 6, 5, 5, 3, 1},
        {2, 10, 9, 4, 6, 2, 3, 2, 1},   {1, 8, 8, 8, 8, 3, 3, 3, 0},    {1, 3, 3, 8, 8, 7, 7, 1, 3},
        {1, 4, 4, 64, 130, 3, 3, 1, 1}, {1, 3, 3, 160, 96, 3, 3, 2, 1}, {1, 4, 4, 48, 80, 3, 3, 1, 1},
        {3, 24, 24, 4, 8, 3, 3, 1, 1},  {5, 1, 1, 64, 10, 1, 1, 1, 0},  {1, 2, 1, 8, 8, 7, 7, 2, 3},
    };
    size_t i;
    for (i = 0; i < sizeof table / sizeof *table; i++) {
        const int *v = table[i];
        ckca__conv s;
        s.n = v[0], s.h = v[1], s.w = v[2], s.c = v[3], s.k = v[4], s.r = v[5], s.s = v[6], s.stride = v[7],
        s.pad = v[8];
        s.p = (s.h + 2 * s.pad - s.r) / s.stride + 1, s.q = (s.w + 2 * s.pad - s.s) / s.stride + 1;
        s.norm = NULL;
        test_conv(ctx, &s);
    }
}

/* Factors of more bits are rounded, not cut, so that their errors have no direction and do not add up. */
static void test_rounding(ckca_context *ctx) {
    enum { N = 4096 };
    ckca__conv s = {1, 1, 1, N, 1, 3, 3, 1, 1, 1, 1, NULL};
    float *x = (float *)malloc(N * sizeof *x), *w = (float *)calloc(9 * N, sizeof *w), y;
    void *ws = malloc(ckca__conv_workspace(ctx, &s));
    double sum = 0;
    int i;
    for (i = 0; i < N; i++) {
        x[i] = (float)(1 + ckca__uniform(3, 99, (uint64_t)i));
        w[4 * N + i] = 1;
        sum += x[i];
    }
    ckca__op_conv_forward(ctx, &s, x, w, NULL, NULL, 0, &y, ws);
    /* Cutting would lose half a unit in the last place of each: N 2^-11 (TF32), N 2^-8 (BF16). */
    CHECK(fabs(y - sum) < N * (ctx->precision == CKCA_BF16 ? 1.0 / 2048 : 1.0 / 8192),
          "precision %d: a sum of %g comes out as %g", (int)ctx->precision, sum, y);
    free(x), free(w), free(ws);
}

/* A NaN reaches the outputs and input gradients whose windows it is in, and no others: not even times a weight of 0 that
   fills up a slab. */
static void test_nan(ckca_context *ctx) {
    enum { SIDE = 8, C = 3, K = 5 };
    const ckca__conv s = {1, SIDE, SIDE, C, K, 3, 3, 1, 1, SIDE, SIDE, NULL};
    float *x = make(SIDE * SIDE * C, 1), *w = make(K * 9 * C, 2), *dy = make(SIDE * SIDE * K, 3);
    float *y = make(SIDE * SIDE * K, 4), *dx = make(SIDE * SIDE * C, 5);
    void *ws = malloc(ckca__conv_workspace(ctx, &s));
    int p, q, wrong = 0;
    x[(4 * SIDE + 3) * C + 1] = NAN;
    dy[(4 * SIDE + 3) * K + 4] = NAN;
    ckca__op_conv_forward(ctx, &s, x, w, NULL, NULL, 0, y, ws);
    ckca__op_conv_backward_data(ctx, &s, dy, w, dx, 0, ws);
    for (p = 0; p < SIDE; p++)
        for (q = 0; q < SIDE; q++) {
            const int near = p >= 3 && p <= 5 && q >= 2 && q <= 4;
            wrong += (isnan(y[(p * SIDE + q) * K]) != 0) != near;
            wrong += (isnan(dx[(p * SIDE + q) * C]) != 0) != near;
        }
    CHECK(!wrong, "precision %d: a NaN is at %d wrong places", (int)ctx->precision, wrong);
    free(x), free(w), free(dy), free(y), free(dx), free(ws);
}

static void test_small_ops(ckca_context *ctx) {
    static const float rows[12] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    static const int index[5] = {3, 0, 2, 2, 1}, hit[5] = {3, 2, 0, 2, 3};
    float *d = (float *)ckca__device_alloc(ctx, 4096), out[15];
    double sum = 4;
    int i, wrong = 0;
    ckca__device_upload(ctx, d, rows, sizeof rows);
    ckca__device_upload(ctx, d + 16, index, sizeof index);
    ckca__op_gather(ctx, 5, 3, d, (int *)(void *)(d + 16), d + 32);
    ckca__device_download(ctx, out, d + 32, sizeof out);
    for (i = 0; i < 15; i++) wrong += out[i] != rows[index[i / 3] * 3 + i % 3];
    CHECK(!wrong, "gather: %d of 15 wrong", wrong);
    ckca__device_upload(ctx, d + 16, hit, sizeof hit);
    ckca__device_upload(ctx, d, &sum, sizeof sum);
    ckca__op_count(ctx, 5, (int *)(void *)(d + 16), (double *)(void *)d);
    ckca__device_download(ctx, &sum, d, sizeof sum);
    CHECK(sum == 6, "count: %g, expected 6", sum);
    ckca__device_release(ctx, d, 4096);
}

/* ---- training ---- */

enum { SIZE = 8, CLASSES = 3, COUNT = 40 };

static ckca_data *pictures(ckca_context *ctx) {
    static unsigned char pixels[COUNT * SIZE * SIZE * 3];
    static int labels[COUNT];
    ckca_array array;
    ckca_data *data = NULL;
    int i;
    for (i = 0; i < (int)sizeof pixels; i++) pixels[i] = (unsigned char)ckca__random(5, 77, (uint64_t)i);
    for (i = 0; i < COUNT; i++) labels[i] = i % CLASSES;
    memset(&array, 0, sizeof array);
    array.pixels = pixels;
    array.labels = labels;
    array.count = COUNT;
    array.height = array.width = SIZE;
    array.channels = 3;
    array.classes = CLASSES;
    ckca_open_array(ctx, &data, &array, NULL);
    return data;
}

static ckca_model *net(ckca_context *ctx) {
    ckca_model_desc desc;
    ckca_model *m = NULL;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = SIZE;
    desc.classes = CLASSES;
    desc.width_base = 4;
    ckca_resnet(ctx, &m, "resnet8", &desc);
    return m;
}

static ckca_update_desc recipe(void) {
    ckca_update_desc d;
    memset(&d, 0, sizeof d);
    d.epochs = 4;
    d.batch = 16; /* 40 pictures: two whole batches and one of 8 */
    d.augment.pad = 1;
    d.augment.flip = 1;
    d.augment.jitter = 0.2f;
    d.w_feat = 1;
    return d;
}

static float *weights(const ckca_model *m) {
    float *all = (float *)malloc(m->all * sizeof(float));
    ckca__device_download(m->ctx, all, m->values, m->all * sizeof(float));
    return all;
}

/* The update's steps, none of them recorded. */
static ckca_status plain_update(ckca_model *m, const ckca_data *data, const ckca_update_desc *desc) {
    ckca__update update, *u = &update;
    ckca_status status;
    memset(u, 0, sizeof *u);
    u->ctx = m->ctx;
    u->m = m;
    u->data = data;
    status = ckca_model_copy(&u->old, m);
    if (!status) status = ckca__begin(u, desc);
    for (; !status && u->epoch < u->d.epochs; u->epoch++) {
        ckca_shuffle(u->d.seed, u->epoch, data->count, u->order);
        for (u->batch = 0; u->batch < u->batches; u->batch++) {
            const int first = u->batch * u->d.batch, left = data->count - first;
            const int n = left < u->d.batch ? left : u->d.batch;
            const int64_t step = (int64_t)u->epoch * u->batches + u->batch;
            ckca__send_batch(u->ctx, data, u->order + first, n, u->epoch, ckca__rate(&u->d, step, u->batches), &u->b);
            ckca__step_ops(u, n);
        }
    }
    m->step++;
    ckca__device_release(u->ctx, u->cache_z, u->cache_z_bytes);
    ckca__device_release(u->ctx, u->cache_f, u->cache_f_bytes);
    ckca__small_free(u->ctx, &u->b);
    ckca__release(u->ctx, u->order);
    ckca_model_free(u->old);
    return status ? status : ckca__device_status(m->ctx);
}

typedef struct {
    ckca_model *m;
    const ckca_data *data;
    unsigned char *squatter; /* takes the place of the workspace that moved; nobody may write to it */
    size_t bytes;
} watched;
static int look(const ckca_progress *p, void *user) { /* halfway, what the recorded steps used is used and moved */
    watched *w = (watched *)user;
    if (p->epoch != 2 || p->batch != 1) return 0;
    CHECK(!ckca_evaluate(w->m, w->data, NULL, NULL), "evaluated in an update: %s", ckca_error(w->m->ctx));
    w->bytes = w->m->workspace_bytes;
    ckca__arena(w->m->ctx, &w->m->workspace, &w->m->workspace_bytes, w->bytes + 4096);
    w->squatter = (unsigned char *)ckca__device_alloc(w->m->ctx, w->bytes);
    return 0;
}

static void test_recording(ckca_context *ctx) {
    ckca_data *data = pictures(ctx);
    ckca_model *a = net(ctx), *b = net(ctx), *c = net(ctx);
    ckca_update_desc d = recipe();
    ckca_report report;
    watched w;
    unsigned char *all;
    float *x, *y, *z;
    size_t i;
    int update;
    for (update = 0; update < 2; update++) {
        ckca_status status;
#ifdef CKCA_CUDA_SHIM
        long replays = cuda_shim_replays, waits = cuda_shim_waits;
#endif
        status = ckca_update(a, data, &d, &report);
        CHECK(!status, "update: %s", ckca_error(ctx));
#ifdef CKCA_CUDA_SHIM
        /* 4 epochs x (2 whole + 1 short): of each kind the first step runs, the others are launched as graphs. An epoch
           ends with one look; teacher, copies and the graphs' end wait a few times more, whatever the epochs. */
        replays = cuda_shim_replays - replays;
        waits = cuda_shim_waits - waits;
        CHECK(replays == 10, "%ld of 12 steps were replayed, 10 expected", replays);
        CHECK(waits <= 4 + 8, "update %d waits %ld times for the device", update, waits);
#endif
        CHECK(!plain_update(b, data, &d), "plain update: %s", ckca_error(ctx));
        d.progress = look;
        w.m = c;
        w.data = data;
        d.user = &w;
        CHECK(!ckca_update(c, data, &d, NULL), "update with reports: %s", ckca_error(ctx));
        d.progress = NULL;
        all = (unsigned char *)malloc(w.bytes);
        ckca__device_download(ctx, all, w.squatter, w.bytes);
        for (i = 0; i < w.bytes && !all[i]; i++) {
        }
        CHECK(i == w.bytes, "update %d: recorded steps write to memory that was given back", update);
        ckca__device_release(ctx, w.squatter, w.bytes);
        free(all);
        x = weights(a), y = weights(b), z = weights(c);
        CHECK(!memcmp(x, y, a->all * sizeof *x), "update %d: recorded and plain steps differ", update);
        CHECK(!memcmp(x, z, a->all * sizeof *x), "update %d: steps recorded twice differ from once", update);
        CHECK(a->batches_tracked == b->batches_tracked, "batches tracked: %d and %d", (int)a->batches_tracked,
              (int)b->batches_tracked);
        free(x), free(y), free(z);
    }
    ckca_model_free(a), ckca_model_free(b), ckca_model_free(c);
    ckca_data_free(data);
}

/* Pictures that the device has no room for come batch by batch: the same bits, and an epoch still waits only once. On
   the shim whatever may run late does. */
static void test_streaming(ckca_context *ctx) {
    int lazy;
    for (lazy = 0; lazy < 4; lazy++) {
        ckca_data *resident = pictures(ctx), *streaming = pictures(ctx);
        ckca_model *a = net(ctx), *b = net(ctx);
        ckca_update_desc d = recipe();
        ckca_score one, other;
        static const int index[5] = {39, 3, 3, 17, 0};
        const size_t batch = 5 * SIZE * SIZE * 3;
        float *x, *y, *made = (float *)malloc(2 * batch * sizeof *made);
        int update;
        streaming->store->streams = 1;
#ifdef CKCA_CUDA_SHIM
        cuda_shim_lazy = lazy;
#else
        if (lazy) break;
#endif
        for (update = 0; update < 2; update++) {
#ifdef CKCA_CUDA_SHIM
            long waits;
#endif
            CHECK(!ckca_update(a, resident, &d, NULL), "resident: %s", ckca_error(ctx));
#ifdef CKCA_CUDA_SHIM
            waits = cuda_shim_waits;
#endif
            CHECK(!ckca_update(b, streaming, &d, NULL), "streaming: %s", ckca_error(ctx));
#ifdef CKCA_CUDA_SHIM
            waits = cuda_shim_waits - waits;
            CHECK(waits <= 4 + 14, "update %d on a stream waits %ld times for the device", update, waits);
#endif
        }
        CHECK(resident->store->resident && !streaming->store->resident, "which pictures are on the device");
        x = weights(a), y = weights(b);
        CHECK(!memcmp(x, y, a->all * sizeof *x), "late streams %d: training on a stream gives other weights", lazy);
        CHECK(!ckca_evaluate(a, resident, &one, NULL) && !ckca_evaluate(a, streaming, &other, NULL) &&
                  one.loss == other.loss && one.top1 == other.top1,
              "late streams %d: evaluated on a stream: loss %g, not %g", lazy, other.loss, one.loss);
        CHECK(!ckca_get_batch(a, resident, index, 5, &d.augment, 4, 1, made, NULL) &&
                  !ckca_get_batch(a, streaming, index, 5, &d.augment, 4, 1, made + batch, NULL) &&
                  !memcmp(made, made + batch, batch * sizeof *made),
              "late streams %d: a batch from a stream differs", lazy);
        free(x), free(y), free(made);
        ckca_model_free(a), ckca_model_free(b);
        ckca_data_free(resident), ckca_data_free(streaming);
    }
#ifdef CKCA_CUDA_SHIM
    cuda_shim_lazy = 0;
    { /* and it is the room that decides */
        enum { MANY = 30000 };
        ckca_array array;
        ckca_data *many = NULL, *few = NULL, *small = pictures(ctx);
        ckca_model *m = net(ctx);
        int index[COUNT], i;
        memset(&array, 0, sizeof array);
        array.pixels = (unsigned char *)calloc(MANY, SIZE * SIZE * 3);
        array.labels = (int *)calloc(MANY, sizeof(int));
        array.count = MANY, array.height = array.width = SIZE, array.channels = 3, array.classes = CLASSES;
        ckca_open_array(ctx, &many, &array, NULL);
        for (i = 0; i < COUNT; i++) index[i] = i * (MANY / COUNT);
        ckca_subset(&few, many, index, COUNT);
        cuda_shim_memory -= ckca__device_room(ctx) - ((size_t)9 << 20); /* the pictures take 5.8 MB */
        CHECK(!ckca_evaluate(m, few, NULL, NULL), "evaluated in little memory: %s", ckca_error(ctx));
        CHECK(many->store->streams, "5.8 of 9 MB are taken for pictures");
        CHECK(!ckca_evaluate(m, small, NULL, NULL) && small->store->resident && !small->store->streams,
              "beside a set that streams, a small one does not stay: %s", ckca_error(ctx));
        cuda_shim_memory = (size_t)1 << 30;
        ckca_model_free(m);
        ckca_data_free(many), ckca_data_free(few), ckca_data_free(small);
        free((void *)(uintptr_t)array.pixels), free((void *)(uintptr_t)array.labels);
    }
#endif
}

/* The same training in every precision: losses near each other, and finite. */
static void test_precisions(void) {
    double loss[3] = {0, 0, 0};
    int p;
    for (p = CKCA_FLOAT32; p <= CKCA_BF16; p++) {
        ckca_context *ctx = context((ckca_precision)p);
        ckca_update_desc d = recipe();
        ckca_report report;
        ckca_data *data;
        ckca_model *m;
        if (!ctx) continue;
        data = pictures(ctx);
        m = net(ctx);
        d.lr = 0.02f;
        CHECK(!ckca_update(m, data, &d, &report), "precision %d: %s", p, ckca_error(ctx));
        loss[p] = report.loss;
        ckca_model_free(m);
        ckca_data_free(data);
        ckca_free(ctx);
        CHECK(fabs(loss[p] - loss[0]) < 0.05 && (!p || loss[p] != loss[0]), "loss %g in precision %d, %g in float32",
              loss[p], p, loss[0]);
    }
}

/* ---- failures ---- */

static void test_memory(ckca_context *ctx) {
    ckca_data *data = pictures(ctx);
    ckca_model *m = net(ctx), *large = NULL;
    ckca_model_desc desc;
    float *pictures_ = (float *)calloc(2 * SIZE * SIZE * 3, sizeof *pictures_);
    ckca_status status;
#ifdef CKCA_CUDA_SHIM
    cuda_shim_memory = (size_t)40 << 20;
    status = ckca_forward(m, pictures_, 1, 0);
    CHECK(!status, "one picture in 40 MB: %s", ckca_error(ctx));
#endif
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = 512;
    desc.classes = CLASSES;
    ckca_resnet(ctx, &large, "resnet8", &desc);
    status = ckca__reserve(large, 1000000, CKCA__TRAIN); /* about 50 TB */
    CHECK(status == CKCA_ENOMEM && strstr(ckca_error(ctx), "the GPU refused") && strstr(ckca_error(ctx), "are free"),
          "a batch of a million: %s, \"%s\"", ckca_status_name(status), ckca_error(ctx));
    status = ckca_forward(m, pictures_, 2, 0);
    CHECK(!status, "after memory ran out: %s", ckca_error(ctx));
    CHECK(!ckca_evaluate(m, data, NULL, NULL), "after memory ran out: %s", ckca_error(ctx));
#ifdef CKCA_CUDA_SHIM
    cuda_shim_memory = (size_t)1 << 30;
#endif
    free(pictures_);
    ckca_model_free(large);
    ckca_model_free(m);
    ckca_data_free(data);
}

#ifdef CKCA_CUDA_SHIM
/* Every call in turn fails: what comes back is a status with a sentence that names the call; nothing is left behind. */
static void test_failures(int streams) {
    int k, failed = 0, silent = 0, done = 0;
    for (k = 1; !done && k < 100000; k += 1 + k / 80) {
        ckca_context *ctx = NULL;
        ckca_data *data = NULL;
        ckca_model *m = NULL;
        ckca_update_desc d = recipe();
        ckca_status status;
        ckca_score score;
        d.epochs = 2;
        cuda_shim_fail = k;
        status = ckca_init(&ctx, NULL);
        if (!status) data = pictures(ctx), m = net(ctx);
        if (data) data->store->streams = streams;
        if (!status && m) status = ckca_update(m, data, &d, NULL);
        if (!status && m) status = ckca_update(m, data, &d, NULL);
        if (!status && m) status = ckca_evaluate(m, data, &score, NULL);
        done = cuda_shim_fail > 0; /* more calls were to come than there are */
        cuda_shim_fail = 0;
        if (!status && ctx && m) status = ckca__device_status(ctx);
        if (status) {
            failed++;
            CHECK(status == CKCA_ECUDA || status == CKCA_ENOMEM, "call %d fails: %s", k, ckca_status_name(status));
            if (ctx)
                CHECK(strchr(ckca_error(ctx), ':') || strstr(ckca_error(ctx), "memory"), "call %d fails: \"%s\"", k,
                      ckca_error(ctx));
        } else if (!done && m)
            silent++;
        ckca_model_free(m);
        ckca_data_free(data);
        ckca_free(ctx);
    }
    printf("%d calls failed one by one, %d without effect\n", failed, silent);
    CHECK(done && failed > 100 && !silent, "%d failures, %d silent", failed, silent);
}
#endif

int main(void) {
    int p;
    for (p = CKCA_FLOAT32; p <= CKCA_BF16; p++) {
        ckca_context *ctx = context((ckca_precision)p);
        if (!ctx) {
            printf("note: no context in precision %d (compute capability below 8.0?)\n", p);
            CHECK(p != CKCA_FLOAT32, "no context: %s", "is there a GPU?");
            continue;
        }
        printf("%s\n", ckca_device(ctx));
        test_convs(ctx);
        if (p) test_rounding(ctx);
        test_nan(ctx);
        test_small_ops(ctx);
        test_recording(ctx);
        test_streaming(ctx);
        test_memory(ctx);
        ckca_free(ctx);
    }
    test_precisions();
#ifdef CKCA_CUDA_SHIM
    test_failures(0);
    test_failures(1);
#endif
    return test_summary();
}
#endif
