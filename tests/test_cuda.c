/* test_cuda.c: tests of the CUDA backend. Without CKCA_CUDA: its precisions are refused with a message. With it, on a
   GPU or on the shim: TF32 and BF16 convolutions against the reference kernels on factors that these formats represent
   exactly, so that only the order of sums may differ; ops and networks with bfloat16 maps against float32; recorded
   steps against eager ones; ops that no other test calls; training on streamed pictures. On the shim only: each CUDA
   call fails in turn; device memory runs out; an epoch never waits inside; each stream runs late. */
#define CKCA_IMPLEMENTATION
#include "ckca.h"
#include "test.h"
#include "device.h"
#ifndef _WIN32
#include <sys/wait.h>
#include <unistd.h>
#endif

#ifndef CKCA_CUDA
static void test_host(void) {
    ckca_desc desc;
    ckca_context *ctx = NULL;
    memset(&desc, 0, sizeof desc);
    for (desc.precision = CKCA_PRECISION_TF32; desc.precision <= CKCA_PRECISION_BF16; desc.precision = (ckca_precision)(desc.precision + 1)) {
        CHECK(ckca_init(&ctx, &desc) == CKCA_EINVAL && strstr(ckca_error(ctx), "without CKCA_CUDA"),
              "the host takes precision %d: \"%s\"", (int)desc.precision, ckca_error(ctx));
        ckca_context_free(ctx);
    }
}
int main(void) {
    test_host();
    return test_summary();
}
#else

#ifdef CKCA_CUDA_SHIM
extern size_t cuda_shim_memory;
extern int cuda_shim_fail, cuda_shim_lazy, cuda_shim_last;
extern long cuda_shim_allocations, cuda_shim_launches, cuda_shim_replays, cuda_shim_waits, cuda_shim_wgmma;
#endif
int ckca__device_wgmma(ckca_context *ctx, int on); /* of ckca_cuda.cu */

static ckca_context *context(ckca_precision precision) {
    ckca_desc desc;
    ckca_context *ctx = NULL;
    memset(&desc, 0, sizeof desc);
    desc.precision = precision;
    if (!ckca_init(&ctx, &desc)) return ctx;
    ckca_context_free(ctx);
    return NULL;
}

/* ---- convolutions ---- */

/* Random numbers in -1..1 that BF16 represents exactly. */
static float *make(size_t count, uint64_t seed) {
    float *v = (float *)malloc((count + 1) * sizeof *v);
    size_t i;
    for (i = 0; i < count; i++) v[i] = (float)((int)(ckca__random(seed, 99, i) % 255) - 127) / 128;
    return v;
}

/* The largest error; with half, less the rounding error of want in BF16. */
static double worst_error(const float *got, const float *want, size_t count, int half) {
    double worst = 0;
    size_t i;
    for (i = 0; i < count; i++) {
        const double error = fabs((double)got[i] - want[i]) - (half ? fabs((double)want[i]) / 250 : 0);
        if (!(error <= worst)) worst = error == error ? error : INFINITY;
    }
    return worst;
}

static void compare(const char *what, const ckca__conv *s, int precision, const float *got, const float *want,
                    size_t count, int half, double terms) {
    const double worst = worst_error(got, want, count, half);
    CHECK(worst <= 2e-6 + 1.2e-7 * terms,
          "%s of %dx%dx%dx%d, %d of %dx%d, stride %d, pad %d, precision %d, half %d %d: off by %g", what, s->n, s->h,
          s->w, s->c, s->k, s->r, s->s, s->stride, s->pad, precision, s->bf16_x, s->bf16, worst);
}

static void test_conv(ckca_context *ctx, const ckca__conv *s) {
    const size_t nx = device_x(s), nw = device_w(s), ny = device_y(s);
    float *x = make(nx, 1), *w = make(nw, 2), *bias = make((size_t)s->k, 3), *residual = make(ny, 4), *dy = make(ny, 5);
    float *y = make(ny, 6), *dx = make(nx, 7), *dw = make(nw, 8), *db = make((size_t)s->k, 9);
    float *y2 = make(ny, 6), *dx2 = make(nx, 7), *dw2 = make(nw, 8), *db2 = make((size_t)s->k, 9);
    void *ws = malloc(ckca__conv_workspace(ctx, s) + nw * sizeof(float) + 1);
    const int taps = s->r * s->s;
    int add;
    ckca__op_conv_forward(ctx, s, x, w, bias, residual, 1, y, ws);
    ckca__op_conv_backward_weight(ctx, s, x, dy, dw, db, ws);
    ckca__naive_conv_forward(ctx, s, x, w, bias, residual, 1, y2, (float *)ws);
    ckca__naive_conv_backward_weight(ctx, s, x, dy, dw2, db2);
    compare("y", s, (int)ctx->precision, y, y2, ny, s->bf16, taps * s->c + 2);
    compare("dw", s, (int)ctx->precision, dw, dw2, nw, 0, (double)s->n * s->p * s->q + 1);
    compare("dbias", s, (int)ctx->precision, db, db2, (size_t)s->k, 0, (double)s->n * s->p * s->q + 1);
    ckca__op_conv_forward(ctx, s, x, w, NULL, NULL, 0, y, ws);
    ckca__naive_conv_forward(ctx, s, x, w, NULL, NULL, 0, y2, (float *)ws);
    compare("y alone", s, (int)ctx->precision, y, y2, ny, s->bf16, taps * s->c);
    for (add = 1; add >= 0 && s->bf16_x == s->bf16; add--) { /* pictures have no gradient */
        ckca__op_conv_backward_data(ctx, s, dy, w, dx, add, ws);
        ckca__naive_conv_backward_data(ctx, s, dy, w, dx2, add);
        compare(add ? "dx" : "dx, written", s, (int)ctx->precision, dx, dx2, nx, s->bf16, taps * s->k + 1);
    }
    free(x), free(w), free(bias), free(residual), free(dy), free(ws);
    free(y), free(dx), free(dw), free(db), free(y2), free(dx2), free(dw2), free(db2);
}

static void test_convs(ckca_context *ctx) {
    static const int table[][9] = {
        /* n  h  w  c  k  r  s stride pad */
        {3, 8, 8, 3, 16, 3, 3, 1, 1},    {2, 8, 8, 16, 16, 3, 3, 1, 1},  {3, 8, 8, 16, 32, 3, 3, 2, 1},
        {2, 6, 6, 32, 64, 3, 3, 1, 1},   {2, 8, 8, 32, 64, 1, 1, 2, 0},  {2, 7, 7, 20, 70, 1, 1, 1, 0},
        {1, 20, 20, 3, 64, 7, 7, 2, 3},  {2, 5, 5, 70, 24, 3, 3, 2, 1},  {2, 6, 5, 1, 1, 3, 3, 1, 1},
        {2, 9, 7, 17, 33, 3, 3, 1, 1},   {2, 7, 9, 31, 15, 3, 3, 2, 1},  {2, 9, 8, 18, 6, 5, 5, 3, 1},
        {2, 10, 9, 4, 6, 2, 3, 2, 1},    {1, 8, 8, 8, 8, 3, 3, 3, 0},    {1, 3, 3, 8, 8, 7, 7, 1, 3},
        {1, 4, 4, 64, 130, 3, 3, 1, 1},  {1, 3, 3, 160, 96, 3, 3, 2, 1}, {1, 4, 4, 48, 80, 3, 3, 1, 1},
        {3, 24, 24, 4, 8, 3, 3, 1, 1},   {5, 1, 1, 64, 10, 1, 1, 1, 0},  {1, 2, 1, 8, 8, 7, 7, 2, 3},
        {3, 64, 48, 4, 8, 3, 3, 1, 1},   {2, 7, 7, 24, 72, 1, 1, 1, 0},  {2, 9, 9, 8, 40, 3, 3, 2, 1},
        {1, 5, 4, 144, 136, 3, 3, 1, 1},
    };
    size_t i;
    int half;
    for (i = 0; i < sizeof table / sizeof *table; i++) {
        const int *v = table[i];
        ckca__conv s;
        s.n = v[0], s.h = v[1], s.w = v[2], s.c = v[3], s.k = v[4], s.r = v[5], s.s = v[6], s.stride = v[7],
        s.pad = v[8];
        s.p = (s.h + 2 * s.pad - s.r) / s.stride + 1, s.q = (s.w + 2 * s.pad - s.s) / s.stride + 1;
        s.norm = NULL;
        s.packed_weights = NULL;
        s.statistics = NULL;
        for (half = 0; half <= (ctx->precision == CKCA_PRECISION_BF16 ? 2 : 0); half++) { /* 2: float32 input */
            s.bf16_x = half == 1;
            s.bf16 = half > 0;
            test_conv(ctx, &s);
        }
    }
}

/* Hopper's wgmma at every kind of shape it takes (64 and 128 columns, one and more blocks, stages and taps; both
   strides, phases without pixels or taps); the first two also without it. */
static void test_wgmma(ckca_context *ctx) {
    static const int table[][9] = {
        /* n  h  w  c  k  r  s stride pad */
        {2, 10, 9, 64, 64, 3, 3, 1, 1}, {1, 7, 6, 128, 72, 3, 3, 2, 1},  {2, 5, 6, 64, 192, 1, 1, 2, 0},
        {3, 2, 1, 64, 64, 3, 3, 2, 1},  {1, 6, 5, 64, 128, 5, 2, 1, 2},  {1, 9, 8, 192, 64, 3, 3, 2, 0},
        {1, 4, 4, 64, 64, 1, 1, 1, 1},  {1, 9, 15, 64, 136, 1, 1, 1, 0}, {2, 3, 3, 64, 64, 3, 3, 1, 2},
    };
    size_t i;
    int on;
    for (i = 0; i < sizeof table / sizeof *table; i++)
        for (on = 1; on >= (i > 1); on--) {
            const int *v = table[i], half = ctx->precision == CKCA_PRECISION_BF16;
            const ckca__conv s = {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8],
                                  (v[1] + 2 * v[8] - v[5]) / v[7] + 1, (v[2] + 2 * v[8] - v[6]) / v[7] + 1,
                                  NULL, half, half, NULL, NULL, 0};
            ckca__device_wgmma(ctx, on);
#ifdef CKCA_CUDA_SHIM
            cuda_shim_wgmma = 0;
#endif
            test_conv(ctx, &s);
#ifdef CKCA_CUDA_SHIM
            CHECK((cuda_shim_wgmma > 0) == on, "%ld wgmma instructions of %dx%d on %d channels, precision %d, in use %d",
                  cuda_shim_wgmma, v[5], v[6], v[3], (int)ctx->precision, on);
#endif
        }
    ckca__device_wgmma(ctx, 1);
    if (ctx->precision == CKCA_PRECISION_TF32) { /* either factor is rounded, not truncated (see test_rounding) */
        enum { C = 512, K = 64 };
        const ckca__conv s = {1, 1, 1, C, K, 1, 1, 1, 0, 1, 1, NULL, 0, 0, NULL, NULL, 0};
        float *x = (float *)malloc(C * sizeof *x), *w = (float *)malloc(C * K * sizeof *w), y[K];
        void *ws = malloc(ckca__conv_workspace(ctx, &s));
        int factor, j;
        for (factor = 0; factor < 2; factor++) {
            double sum = 0;
            for (j = 0; j < C; j++) {
                const float v = (float)(1 + ckca__uniform(3, 99, (uint64_t)j));
                int column;
                sum += v;
                x[j] = factor ? 1 : v;
                for (column = 0; column < K; column++) w[column * C + j] = factor ? v : 1;
            }
            ckca__op_conv_forward(ctx, &s, x, w, NULL, NULL, 1, y, ws);
            CHECK(fabs(y[K - 1] - sum) < C / 8192.0, "wgmma, factor %d: a sum of %g comes out as %g", factor, sum,
                  y[K - 1]);
        }
        free(x), free(w), free(ws);
    }
}

/* A convolution's statistics are those of its stored output, even far from 0 and whichever block ends last. */
static void test_statistics(ckca_context *ctx) {
    static const int table[][7] = {
        /* n  h   w   c    k   r  bias */
        {3, 8, 8, 16, 16, 3, 0},  {2, 40, 41, 4, 20, 3, 1}, {1, 5, 5, 8, 130, 3, 1},  {2, 40, 40, 8, 72, 3, 0},
        {2, 33, 32, 24, 8, 1, 0}, {1, 9, 9, 264, 16, 1, 0}, {4, 60, 61, 1, 3, 3, 1}, {1, 1, 1, 8, 8, 1, 0},
    };
    size_t i;
    int half, c;
    for (i = 0; i < sizeof table / sizeof *table; i++)
        for (half = 0; half <= (ctx->precision == CKCA_PRECISION_BF16); half++) {
            const int *v = table[i], pad = v[5] / 2;
            const ckca__conv shape = {v[0], v[1], v[2], v[3],  v[4], v[5], v[5], 1,
                                      pad,  v[1], v[2], NULL, half, half, NULL, NULL, 0};
            ckca__conv s = shape;
            const size_t rows = (size_t)v[0] * (size_t)v[1] * (size_t)v[2], k = (size_t)v[4];
            float *x = make(device_x(&s), 1), *w = make(device_w(&s), 2), *bias = make(k, 3), *y = make(device_y(&s), 4);
            float *got = make(4 * k, 5);
            ckca__statistics to;
            void *ws = malloc(ckca__conv_workspace(ctx, &s));
            double mean_off = 0, std_off = 0, running_off = 0;
            to.mean = got, to.inv_std = got + k, to.running_mean = got + 2 * k, to.running_var = got + 3 * k;
            for (c = 0; c < v[4]; c++) bias[c] += half ? 3 : 500, to.running_mean[c] = to.running_var[c] = 0;
            s.statistics = &to;
            ckca__op_conv_forward(ctx, &s, x, w, v[6] ? bias : NULL, NULL, 0, y, ws);
            for (c = 0; c < v[4]; c++) {
                double mean = 0, square = 0, off;
                size_t j;
                for (j = 0; j < rows; j++) mean += y[j * k + (size_t)c];
                mean /= (double)rows;
                for (j = 0; j < rows; j++) square += (y[j * k + (size_t)c] - mean) * (y[j * k + (size_t)c] - mean);
                off = fabs(mean - to.mean[c]) / (1 + fabs(mean));
                mean_off = off > mean_off ? off : mean_off;
                off = fabs(to.inv_std[c] * sqrt(square / (double)rows + 1e-5) - 1);
                std_off = off > std_off ? off : std_off;
                off = fabs(to.running_mean[c] - 0.1 * mean) / (1 + fabs(mean)) +
                      fabs(to.running_var[c] / (0.1 * square / (double)(rows > 1 ? rows - 1 : 1) + 1e-9) - (rows > 1));
                running_off = off > running_off ? off : running_off;
            }
            CHECK(mean_off < 2e-7 && std_off < 1e-5 && running_off < 2e-5,
                  "precision %d, statistics of %d of %dx%d on %dx%dx%dx%d, half %d: off by %g, %g, %g",
                  (int)ctx->precision, v[4], v[5], v[5], v[0], v[1], v[2], v[3], half, mean_off, std_off, running_off);
            free(x), free(w), free(bias), free(y), free(got), free(ws);
        }
}

/* Factors with more bits are rounded, not truncated, so that their errors have no bias. */
static void test_rounding(ckca_context *ctx) {
    enum { N = 4096 };
    ckca__conv s = {1, 1, 1, N, 1, 3, 3, 1, 1, 1, 1, NULL, 0, 0, NULL, NULL, 0};
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
    /* Truncation would lose half a unit in the last place per term: N 2^-11. */
    CHECK(fabs(y - sum) < N / 8192.0, "precision %d: a sum of %g comes out as %g", (int)ctx->precision, sum, y);
    for (i = 0; i < N; i++) w[4 * N + i] = x[i]; /* the other factor */
    for (i = 0; i < N; i++) x[i] = 1;
    ckca__op_conv_forward(ctx, &s, x, w, NULL, NULL, 0, &y, ws);
    CHECK(fabs(y - sum) < N / 8192.0, "precision %d: a sum of %g weights comes out as %g", (int)ctx->precision, sum, y);
    for (i = 0; i < 2; i++) { /* either factor of a weight gradient: the middle tap covers all pixels */
        enum { SIDE = 32, AT_ONCE = 4 };
        const ckca__conv square = {1, SIDE, SIDE, AT_ONCE, AT_ONCE, 3, 3, 1, 1, SIDE, SIDE, NULL, 0, 0, NULL, NULL, 0};
        float *one = (float *)malloc(N * sizeof *one), dw[AT_ONCE * 9 * AT_ONCE];
        void *scratch = malloc(ckca__conv_workspace(ctx, &square));
        double total = 0;
        int j;
        memset(dw, 0, sizeof dw);
        for (j = 0; j < N; j++) one[j] = 1, total += j % AT_ONCE ? 0 : w[4 * N + j];
        ckca__op_conv_backward_weight(ctx, &square, i ? one : w + 4 * N, i ? w + 4 * N : one, dw, NULL, scratch);
        CHECK(fabs(dw[4 * AT_ONCE] - total) < N / AT_ONCE / 8192.0, "precision %d: factor %d of a weight's gradient: "
              "%g comes out as %g", (int)ctx->precision, i, total, dw[4 * AT_ONCE]);
        free(one), free(scratch);
    }
    for (i = 0; i < N; i++) x[i] = w[4 * N + i];
    if (ctx->precision == CKCA_PRECISION_BF16) { /* each weight on its own: dx = 1 w */
        int wrong = 0;
        s.bf16_x = s.bf16 = 1;
        for (i = 0; i < N; i++) w[4 * N + i] = x[i];
        y = 1;
        ckca__op_conv_backward_data(ctx, &s, &y, w, x, 0, ws);
        for (i = 0; i < N; i++) wrong += x[i] != device_from_half(device_to_half(w[4 * N + i]));
        CHECK(!wrong, "%d of %d weights are not the nearest bfloat16", wrong, N);
    }
    free(x), free(w), free(ws);
}

/* A NaN reaches the outputs and input gradients whose windows contain it, and no others: the zeros that pad a stage
   must not be multiplied by it. */
static void test_nan(ckca_context *ctx) {
    enum { SIDE = 8, C = 3, K = 5 };
    const ckca__conv s = {1, SIDE, SIDE, C, K, 3, 3, 1, 1, SIDE, SIDE, NULL, 0, 0, NULL, NULL, 0};
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

/* Ops on bfloat16 maps against the same ops on floats, which other tests compare with the reference kernels. */
typedef struct {
    float *got, *want;
    size_t count;
} twin;
static twin twins(size_t count, uint64_t seed) {
    twin t;
    t.count = count;
    t.got = make(count, seed);
    t.want = make(count, seed);
    return t;
}
static void twins_done(twin *t, const char *what, int n, int c, int half, double tolerance) {
    const double worst = worst_error(t->got, t->want, t->count, half);
    CHECK(worst <= tolerance, "%s in bfloat16, %d pictures, %d channels: off by %g", what, n, c, worst);
    free(t->got), free(t->want);
}

static void test_half_norms(ckca_context *ctx, size_t rows, int c) {
    const size_t count = rows * (size_t)c, channels = (size_t)c;
    float *x = make(count, 1), *residual = make(count, 2), *dy = make(count, 3), *other = make(count, 4);
    float *gamma = make(channels, 5), *beta = make(channels, 6), *mean = make(channels, 7), *std = make(channels, 8);
    void *ws = malloc(ckca__op_workspace(ctx, rows, c));
    int kind, n = (int)rows;
    size_t i;
    for (i = 0; i < channels; i++) std[i] = 1 + std[i] / 2; /* inv_std; var */
    for (kind = 0; kind < 4; kind++) { /* bit 0: a ReLU; bit 1: a residual, in kind 2 with its own norm */
        const int relu = kind & 1;
        const float *add = kind & 2 ? residual : NULL;
        const ckca__norm through = {mean, std, gamma, beta, 1}, *add_norm = kind == 2 ? &through : NULL;
        const ckca__norm norm = {mean, std, gamma, beta, relu};
        twin y = twins(count, 9), m = twins(channels, 10), v = twins(channels, 11), rm = twins(channels, 12);
        twin rv = twins(channels, 13), e = twins(count, 14), again = twins(count, 15), dx = twins(count, 16);
        twin dr = twins(count, 17), dg = twins(channels, 18), db = twins(channels, 19);
        ckca__op_batchnorm_forward(ctx, 1, rows, c, x, gamma, beta, rm.got, rv.got, add, add_norm, relu, y.got, m.got,
                                   v.got, ws);
        ckca__op_batchnorm_forward(ctx, 0, rows, c, x, gamma, beta, rm.want, rv.want, add, add_norm, relu, y.want,
                                   m.want, v.want, ws);
        ckca__op_batchnorm_recompute(ctx, 1, rows, c, x, &norm, add, add_norm, again.got);
        ckca__op_batchnorm_recompute(ctx, 0, rows, c, x, &norm, add, add_norm, again.want);
        ckca__op_batchnorm_eval(ctx, 1, rows, c, x, gamma, beta, mean, std, add, relu, e.got);
        ckca__op_batchnorm_eval(ctx, 0, rows, c, x, gamma, beta, mean, std, add, relu, e.want);
        ckca__op_batchnorm_backward(ctx, 1, rows, c, x, add ? other : NULL, dy, &norm, dx.got, add ? dr.got : NULL,
                                    relu, dg.got, db.got, ws);
        ckca__op_batchnorm_backward(ctx, 0, rows, c, x, add ? other : NULL, dy, &norm, dx.want, add ? dr.want : NULL,
                                    relu, dg.want, db.want, ws);
        twins_done(&y, "batchnorm_forward", n, c, 1, 1e-4), twins_done(&again, "batchnorm_again", n, c, 1, 1e-6);
        twins_done(&m, "mean", n, c, 0, 1e-6), twins_done(&v, "inv_std", n, c, 0, 2e-3);
        twins_done(&rm, "running_mean", n, c, 0, 1e-6), twins_done(&rv, "running_var", n, c, 0, 1e-6);
        twins_done(&e, "batchnorm_eval", n, c, 1, 1e-6), twins_done(&dx, "batchnorm's dx", n, c, 1, 1e-5);
        twins_done(&dr, "batchnorm's dresidual", n, c, 1, 1e-6);
        twins_done(&dg, "dgamma", n, c, 0, 1e-4), twins_done(&db, "dbeta", n, c, 0, 1e-4);
    }
    free(x), free(residual), free(dy), free(other), free(gamma), free(beta), free(mean), free(std), free(ws);
}

static void test_half_maps(ckca_context *ctx, int n, int c) {
    ckca__conv pool = {0, 9, 7, 0, 0, 3, 3, 2, 1, 5, 4, NULL, 0, 0, NULL, NULL, 0},
               sub = {0, 9, 7, 0, 0, 1, 1, 2, 0, 5, 4, NULL, 0, 0, NULL, NULL, 0};
    const size_t in = (size_t)n * 63 * (size_t)c, out = (size_t)n * 20 * (size_t)c;
    const size_t wide = (size_t)n * 20 * (size_t)(c + 4);
    float *x = make(in, 1), *b = make(in, 2), *dy = make(wide, 3), *fo = make(in, 4);
    unsigned char *at = (unsigned char *)malloc(2 * out);
    void *ws = malloc(ckca__op_workspace(ctx, (size_t)n, 63 * c + 2 * n));
    float *statistics = make(2 * (size_t)(n * c), 21), *parts = make(2 * (size_t)(n * c), 22);
    int flag;
    pool.n = sub.n = n;
    pool.c = pool.k = sub.c = c;
    sub.k = c + 4;
    for (flag = 0; flag < 2; flag++) {
        twin group = twins(in, 17), from_group = twins(in, 18), dgamma = twins((size_t)c, 19), dbeta = twins((size_t)c, 20);
        twin add = twins(in, 5), back = twins(in, 6), max = twins(out, 7), from_max = twins(in, 8),
             pick = twins(wide, 9);
        twin from_pick = twins(in, 10), mean = twins((size_t)n * (size_t)c, 11), from_mean = twins(in, 12);
        twin df = twins(in, 13), loss = twins((size_t)n, 14), df2 = twins(in, 15), df3 = twins(in, 16);
        int half;
        for (half = 0; half < 2; half++) {
#define SIDE_OF(t) (half ? (t).got : (t).want)
            pool.bf16_x = pool.bf16 = sub.bf16_x = sub.bf16 = half;
            ckca__op_add(ctx, half, in, x, flag ? b : NULL, flag, SIDE_OF(add));
            ckca__op_add_backward(ctx, half, in, flag ? NULL : x, b, SIDE_OF(back), flag);
            ckca__op_maxpool_forward(ctx, &pool, x, SIDE_OF(max), at + (half ? out : 0));
            ckca__op_maxpool_backward(ctx, &pool, dy, at, SIDE_OF(from_max), flag);
            ckca__op_subsample_forward(ctx, &sub, x, SIDE_OF(pick));
            ckca__op_subsample_backward(ctx, &sub, dy, SIDE_OF(from_pick), flag);
            ckca__op_avgpool_forward(ctx, half, n, 63, c, x, SIDE_OF(mean));
            ckca__op_avgpool_backward(ctx, half, n, 63, c, dy, SIDE_OF(from_mean), flag);
            ckca__op_groupnorm_forward(ctx, half, n, 63, c, flag ? c : 1, x, b, fo, SIDE_OF(group),
                                       flag ? statistics : NULL);
            if (flag)
                ckca__op_groupnorm_backward(ctx, half, n, 63, c, c, x, b, statistics, x, SIDE_OF(from_group), 1,
                                            SIDE_OF(dgamma), SIDE_OF(dbeta), parts);
            ckca__op_featreg(ctx, half, half, n, 63 * c, x, fo, 3, SIDE_OF(df), flag, 1, SIDE_OF(loss));
            ckca__op_featreg(ctx, half, 0, n, 63 * c, x, fo, 3, SIDE_OF(df2), flag, 1, SIDE_OF(loss));
            ckca__op_featreg(ctx, 0, half, n, 63 * c, x, fo, 3, SIDE_OF(df3), flag, 1, SIDE_OF(loss));
#undef SIDE_OF
        }
        CHECK(!memcmp(at, at + out, out), "maxpool in bfloat16: other places, %d channels", c);
        twins_done(&add, "add", n, c, 1, 1e-7), twins_done(&back, "add_backward", n, c, 1, 1e-7);
        twins_done(&max, "maxpool", n, c, 0, 0), twins_done(&from_max, "maxpool's dx", n, c, 1, 1e-7);
        twins_done(&pick, "subsample", n, c, 0, 0), twins_done(&from_pick, "subsample's dx", n, c, 1, 1e-7);
        twins_done(&mean, "avgpool", n, c, 0, 1e-6), twins_done(&from_mean, "avgpool's dx", n, c, 1, 1e-7);
        twins_done(&group, "group norm", n, c, 1, 1e-6), twins_done(&from_group, "group norm's dx", n, c, 1, 1e-5);
        twins_done(&dgamma, "group norm's dgamma", n, c, 0, 1e-5), twins_done(&dbeta, "dbeta", n, c, 0, 1e-5);
        twins_done(&df, "cosine", n, c, 1, 1e-7), twins_done(&df2, "cosine, teacher in float", n, c, 1, 1e-7);
        twins_done(&df3, "cosine, student in float", n, c, 0, 1e-6), twins_done(&loss, "cosine's loss", n, c, 0, 1e-6);
    }
    free(x), free(b), free(dy), free(fo), free(at), free(ws), free(statistics), free(parts);
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

/* A ReLU mask recomputed from x equals the forward pass's, even where batch norm gives 0 up to one rounding. */
static void test_gate(ckca_context *ctx) {
    enum { ROWS = 96, C = 12 };
    float *x = make(ROWS * C, 1), *dy = make(ROWS * C, 2), *y = make(ROWS * C, 3), dg[C], db[C];
    float *dx = make(ROWS * C, 4), *dx2 = make(ROWS * C, 5), mean[C], inv_std[C], gamma[C], beta[C];
    const ckca__norm norm = {mean, inv_std, gamma, beta, 1};
    void *ws = malloc(ckca__op_workspace(ctx, ROWS, C));
    int i, zeros = 0;
    for (i = 0; i < C; i++) {
        const double u = ckca__uniform(8, 99, (uint64_t)i);
        volatile float product; /* rounded */
        mean[i] = (float)u - 0.5f, inv_std[i] = 1 / (0.3f + (float)u), gamma[i] = 0.7f + (float)u / 3, db[i] = dg[i] = 0;
        x[i] = 0.1f + (float)u;
        product = (x[i] - mean[i]) * (gamma[i] * inv_std[i]);
        beta[i] = -product;
    }
    for (i = C; i < ROWS * C; i++) x[i] = x[i % C];
    ckca__op_batchnorm_recompute(ctx, 0, ROWS, C, x, &norm, NULL, NULL, y);
    ckca__op_batchnorm_backward(ctx, 0, ROWS, C, x, y, dy, &norm, dx, NULL, 0, dg, db, ws);
    memset(dg, 0, sizeof dg), memset(db, 0, sizeof db);
    ckca__op_batchnorm_backward(ctx, 0, ROWS, C, x, NULL, dy, &norm, dx2, NULL, 0, dg, db, ws);
    for (i = 0; i < C; i++) zeros += y[i] == 0;
    CHECK(zeros > 0 && zeros < C, "%d of %d outputs are 0", zeros, C);
    CHECK(!memcmp(dx, dx2, ROWS * C * sizeof *dx), "%s", "the gate recomputed from x is not the forward pass's");
    free(x), free(dy), free(y), free(dx), free(dx2), free(ws);
}

/* The caller may reuse the source of an upload after the call, however late the copy runs. */
static void test_upload(ckca_context *ctx) {
    enum { BYTES = 300000 };
    unsigned char *source = (unsigned char *)malloc(BYTES), *device;
    int i, size, wrong = 0;
    device = (unsigned char *)ckca__device_alloc(ctx, BYTES);
#ifdef CKCA_CUDA_SHIM
    cuda_shim_lazy = 7;
#endif
    for (size = BYTES; size > 100; size /= 10) {
        memset(source, 7, BYTES);
        ckca__device_upload(ctx, device, source, (size_t)size);
        memset(source, 9, BYTES);
        ckca__device_download(ctx, source, device, (size_t)size);
        for (i = 0; i < size; i++) wrong += source[i] != 7;
    }
#ifdef CKCA_CUDA_SHIM
    cuda_shim_lazy = 0;
#endif
    CHECK(!wrong, "%d bytes of uploads are what their source became later", wrong);
    ckca__device_release(ctx, device, BYTES);
    free(source);
}

#ifdef CKCA_CUDA_SHIM
/* An error left by other code is not reported as ours, and ours are not left for other code. */
static void test_latch(ckca_context *ctx) {
    float *d = (float *)ckca__device_alloc(ctx, 64);
    cuda_shim_last = 700;
    ckca__op_count(ctx, 1, (int *)(void *)d, (double *)(void *)(d + 8));
    CHECK(!ckca__device_status(ctx), "somebody's error: %s", ckca_error(ctx));
    cuda_shim_last = 0;
    cuda_shim_fail = 1;
    ckca__op_count(ctx, 1, (int *)(void *)d, (double *)(void *)(d + 8));
    CHECK(ckca__device_status(ctx) == CKCA_ECUDA && strstr(ckca_error(ctx), "count_kernel"), "our error: %s",
          ckca_error(ctx));
    CHECK(!cuda_shim_last, "an error of %d is left", cuda_shim_last);
    ckca__device_release(ctx, d, 64);
}
#endif

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

/* The update's steps, all eager. */
static ckca_status plain_update(ckca_model *m, const ckca_data *data, const ckca_update_desc *desc) {
    ckca__update update, *u = &update;
    ckca_status status;
    memset(u, 0, sizeof *u);
    u->ctx = m->ctx;
    u->m = m;
    u->data = u->chunk = data;
    status = ckca_model_copy(&u->old, m);
    if (!status) status = ckca__begin(u, desc);
    for (; !status && u->epoch < u->d.epochs; u->epoch++) {
        ckca_shuffle(u->d.seed, u->epoch, data->count, u->order);
        for (u->batch = 0; u->batch < u->batches; u->batch++) {
            const int first = u->batch * u->d.batch, left = data->count - first;
            const int n = left < u->d.batch ? left : u->d.batch;
            const int64_t step = (int64_t)u->epoch * u->batches + u->batch;
            ckca__send_batch(u->ctx, data, u->order + first, n, u->epoch, ckca__learning_rate(&u->d, step, u->batches), &u->buffers);
            ckca__step_ops(u, n);
        }
    }
    m->updates++;
    ckca__device_release(u->ctx, u->cache_logits, u->cache_logits_bytes);
    ckca__device_release(u->ctx, u->cache_features, u->cache_features_bytes);
    ckca__batch_buffers_free(u->ctx, &u->buffers);
    ckca__release(u->ctx, u->order);
    ckca_model_free(u->old);
    return status ? status : ckca__device_status(m->ctx);
}

typedef struct {
    ckca_model *m;
    const ckca_data *data;
    unsigned char *squatter; /* allocated where the workspace was; nothing may write to it */
    size_t bytes;
} watched;
static int look(const ckca_progress *p, void *user) { /* halfway, overwrites and moves the recorded steps' memory */
    watched *w = (watched *)user;
    if (p->epoch != 2 || p->batch != 1) return 0;
    CHECK(!ckca_evaluate(w->m, w->data, NULL, NULL), "evaluated in an update: %s", ckca_error(w->m->ctx));
    w->bytes = w->m->workspace_bytes;
    ckca__arena(w->m->ctx, &w->m->workspace, &w->m->workspace_bytes, w->bytes + 4096);
    w->squatter = (unsigned char *)ckca__device_alloc(w->m->ctx, w->bytes);
    ckca__device_zero(w->m->ctx, w->squatter, w->bytes);
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
        /* 4 epochs x (2 whole + 1 short): for each batch size the first step is eager, the others launch a graph. An
           epoch waits once, at its end; teacher, copies and freeing the graphs add a constant number of waits. */
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

/* Pictures that do not fit in device memory are streamed batch by batch: the results keep their bits, and an epoch
   still waits only once. On the shim, streams run as late as they may. */
static void test_streaming(ckca_context *ctx) {
    float *prompt = NULL; /* the weights if no stream runs late */
    int lazy;
    for (lazy = 0; lazy < 8; lazy += lazy < 4 ? 1 : 3) { /* 0 to 4, 7 */
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
            /* the last 3: the pass over the pictures for the class means */
            CHECK(waits <= 4 + 14 + 3, "update %d on a stream waits %ld times for the device", update, waits);
#endif
        }
        CHECK(resident->store->resident && !streaming->store->resident, "which pictures are on the device");
        x = weights(a), y = weights(b);
        CHECK(!memcmp(x, y, a->all * sizeof *x), "late streams %d: training on a stream gives other weights", lazy);
        if (!prompt) prompt = weights(a);
        CHECK(!memcmp(x, prompt, a->all * sizeof *x), "late streams %d: other weights than without", lazy);
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
    free(prompt);
#ifdef CKCA_CUDA_SHIM
    cuda_shim_lazy = 0;
    { /* free memory decides */
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
        cuda_shim_memory -= ckca__device_free_bytes(ctx) - ((size_t)9 << 20); /* the pictures take 5.8 MB */
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

/* The expected outputs of a network are bfloat16 and equal the float32 network's within bfloat16 precision. */
static double cosine_of(const float *a, const float *b, size_t count) {
    double aa = 0, bb = 0, ab = 0;
    size_t i;
    for (i = 0; i < count; i++) aa += (double)a[i] * a[i], bb += (double)b[i] * b[i], ab += (double)a[i] * b[i];
    return ab / sqrt(aa * bb);
}
static ckca_model *custom(ckca_context *ctx, int kind) {
    ckca_model_desc desc;
    ckca_conv_desc conv;
    ckca_model *m = NULL;
    int input, x, y;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = SIZE;
    desc.classes = CLASSES;
    desc.channels = 3;
    memset(&conv, 0, sizeof conv);
    conv.out = 8, conv.kernel = 3, conv.stride = 1, conv.pad = 1;
    if (ckca_model_create(ctx, &m, &desc)) return NULL;
    input = ckca_layer_input(m);
    x = ckca_layer_relu(m, ckca_layer_batchnorm(m, "bn", ckca_layer_conv(m, "conv", input, conv)));
    if (kind == 1) { /* average pooling, then a hidden layer */
        x = ckca_layer_avgpool(m, x);
        x = ckca_layer_relu(m, ckca_layer_linear(m, "hidden", x, 8));
    } else if (kind == 2) { /* a convolution with a 1 x 1 output is added to the pooled features */
        conv.kernel = SIZE, conv.pad = 0;
        y = ckca_layer_avgpool(m, x);
        x = ckca_layer_add(m, ckca_layer_conv(m, "squeeze", x, conv), y);
    } else if (kind == 4) {
        x = ckca_layer_conv(m, "conv2", ckca_layer_maxpool(m, x, 3, 2, 1), conv);
        x = ckca_layer_avgpool(m, ckca_layer_relu(m, ckca_layer_batchnorm(m, "bn2", x)));
    } else if (kind == 5) { /* group norm */
        x = ckca_layer_relu(m, ckca_layer_groupnorm(m, "gn", ckca_layer_conv(m, "conv2", x, conv), 2));
        x = ckca_layer_avgpool(m, x);
    } else if (kind == 3) { /* the pictures bypass the first convolution */
        conv.out = 3;
        x = ckca_layer_avgpool(m, ckca_layer_add(m, ckca_layer_conv(m, "back", x, conv), input));
    }
    return ckca_model_finish(m, ckca_layer_linear(m, "fc", x, CLASSES)) ? NULL : m;
}

static void test_half_nets(ckca_context *ctx) {
    ckca_context *plain = context(CKCA_PRECISION_FLOAT32);
    ckca_model *m = net(ctx), *twin_of = net(plain);
    float *input = make(6 * SIZE * SIZE * 3, 1), *a = make(1 << 16, 2), *b = make(1 << 16, 3);
    float dz[6 * CLASSES];
    ckca_bytes bytes, plain_bytes;
    int i, kind, read = 0, halves = 0;
    for (i = 0; i < 6 * CLASSES; i++) dz[i] = (float)(i % 5 - 2);
    for (i = 0; i < m->nodes; i++)
        CHECK(m->node[i].bf16 == (i > 0 && i < m->pooled), "node %d of resnet8: half %d", i, m->node[i].bf16);
    CHECK(!ckca_model_bytes(m, 64, 1, &bytes) && !ckca_model_bytes(twin_of, 64, 1, &plain_bytes) &&
              bytes.activations < 0.62 * (double)plain_bytes.activations,
          "activations of resnet8 take %.0f and %.0f bytes", (double)bytes.activations,
          (double)plain_bytes.activations);
    CHECK(!ckca_forward(m, input, 6, 1) && !ckca_forward(twin_of, input, 6, 1), "forward: %s", ckca_error(ctx));
    for (i = 1; i < m->nodes; i++) {
        const size_t count = 6 * (size_t)m->node[i].h * (size_t)m->node[i].w * (size_t)m->node[i].c;
        if (ckca_node_read(m, i, a)) continue;
        CHECK(!ckca_node_read(twin_of, i, b), "node %d: %s", i, ckca_error(plain));
        CHECK(cosine_of(a, b, count) > 0.9999, "node %d of resnet8 in bfloat16: cosine %g with float32", i,
              cosine_of(a, b, count));
        read++, halves += m->node[i].bf16;
    }
    CHECK(read > 10 && halves > 8, "%d nodes compared, %d of them bfloat16", read, halves);
    CHECK(!ckca_backward(m, dz, NULL) && !ckca_backward(twin_of, dz, NULL), "backward: %s", ckca_error(ctx));
    ckca__device_download(ctx, a, m->gradients, m->trainable * sizeof *a);
    ckca__device_download(plain, b, twin_of->gradients, m->trainable * sizeof *b);
    CHECK(cosine_of(a, b, m->trainable) > 0.99, "gradients of resnet8 in bfloat16: cosine %g with float32",
          cosine_of(a, b, m->trainable));
    ckca_model_free(m), ckca_model_free(twin_of);
    for (kind = 0; kind < 6; kind++) { /* no pooling; hidden layer; mixed; the pictures added; max pooling; group norm */
        m = custom(ctx, kind), twin_of = custom(plain, kind);
        CHECK(m && twin_of, "network %d: %s", kind, ckca_error(ctx));
        if (!m || !twin_of) continue;
        for (halves = i = 0; i < m->nodes; i++) halves += m->node[i].bf16;
        CHECK(halves == (kind == 1 ? 3 : kind == 4 ? 7 : kind == 5 ? 6 : 0), "network %d has %d maps in bfloat16", kind, halves);
        CHECK(!ckca_forward(m, input, 6, 1) && !ckca_forward(twin_of, input, 6, 1), "forward: %s", ckca_error(ctx));
        CHECK(!ckca_node_read(m, m->logits, a) && !ckca_node_read(twin_of, m->logits, b) &&
                  cosine_of(a, b, 6 * CLASSES) > 0.9999,
              "network %d: logits' cosine %g", kind, cosine_of(a, b, 6 * CLASSES));
        CHECK(!ckca_backward(m, dz, NULL) && !ckca_backward(twin_of, dz, NULL), "backward: %s", ckca_error(ctx));
        ckca__device_download(ctx, a, m->gradients, m->trainable * sizeof *a);
        ckca__device_download(plain, b, twin_of->gradients, m->trainable * sizeof *b);
        CHECK(cosine_of(a, b, m->trainable) > 0.995, "network %d: gradients' cosine %g", kind,
              cosine_of(a, b, m->trainable));
        ckca_model_free(m), ckca_model_free(twin_of);
    }
    ckca_context_free(plain);
    free(input), free(a), free(b);
}

/* The same training in every precision gives finite losses that are close to each other. */
static void test_precisions(void) {
    double loss[3] = {0, 0, 0};
    int p;
    for (p = CKCA_PRECISION_FLOAT32; p <= CKCA_PRECISION_BF16; p++) {
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
        ckca_context_free(ctx);
        CHECK(fabs(loss[p] - loss[0]) < 0.05 && (!p || loss[p] != loss[0]), "loss %g in precision %d, %g in float32",
              loss[p], p, loss[0]);
    }
}

/* A step of SGD allocates nothing. */
static void test_sgd(ckca_context *ctx) {
    ckca_model *m = net(ctx);
    ckca_sgd_desc d;
    float *input = make(2 * SIZE * SIZE * 3, 1), dz[2 * CLASSES] = {1, -1, 0, 0, 1, -1};
    memset(&d, 0, sizeof d);
    d.lr = 0.1f;
    CHECK(!ckca_forward(m, input, 2, 1) && !ckca_backward(m, dz, NULL), "backward: %s", ckca_error(ctx));
    {
#ifdef CKCA_CUDA_SHIM
        const long before = cuda_shim_allocations;
#endif
        CHECK(!ckca_sgd(m, &d) && !ckca_sgd(m, &d), "sgd: %s", ckca_error(ctx));
#ifdef CKCA_CUDA_SHIM
        CHECK(cuda_shim_allocations == before, "sgd allocates %ld times", cuda_shim_allocations - before);
#endif
    }
    ckca_model_free(m);
    free(input);
}

#ifndef _WIN32
/* In the child of a fork() every call fails except freeing, and the parent continues. */
static void test_fork(void) {
    ckca_context *ctx = context(CKCA_PRECISION_FLOAT32);
    ckca_data *data = pictures(ctx);
    ckca_model *m = net(ctx);
    ckca_update_desc d = recipe();
    int status = -1;
    pid_t child;
    d.epochs = 2;
    data->store->streams = 1;
    CHECK(!ckca_update(m, data, &d, NULL), "update: %s", ckca_error(ctx));
    fflush(stdout);
    child = fork();
    if (!child) {
        int wrong = !ckca_update(m, data, &d, NULL) || ckca_zero_gradients(m) != CKCA_ECUDA ||
                    !strstr(ckca_error(ctx), "fork");
        ckca_model_free(m);
        ckca_data_free(data);
        ckca_context_free(ctx);
        _exit(wrong);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0,
          "a forked child ends with status %d", status);
    CHECK(!ckca_update(m, data, &d, NULL), "update after a fork: %s", ckca_error(ctx));
    ckca_model_free(m);
    ckca_data_free(data);
    ckca_context_free(ctx);
}
#endif

/* ---- failures ---- */

static void test_memory(ckca_context *ctx) {
    ckca_data *data = pictures(ctx);
    ckca_model *m = net(ctx), *large = NULL;
    ckca_model_desc desc;
    float *pictures_ = (float *)calloc(2 * SIZE * SIZE * 3, sizeof *pictures_);
    ckca_status status;
#ifdef CKCA_CUDA_SHIM
    cuda_shim_memory = (size_t)80 << 20;
    status = ckca_forward(m, pictures_, 1, 0);
    CHECK(!status, "one picture in 80 MB: %s", ckca_error(ctx));
#endif
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = 512;
    desc.classes = CLASSES;
    ckca_resnet(ctx, &large, "resnet8", &desc);
    status = ckca__reserve(large, 1000000, CKCA__MODE_TRAIN); /* about 50 TB */
    CHECK(status == CKCA_ENOMEM && strstr(ckca_error(ctx), "the GPU could not allocate") && strstr(ckca_error(ctx), "are free"),
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
/* Batch-norm outputs are kept while memory allows and recomputed otherwise, with the same bits; recorded steps still
   work after the change. */
static void test_recompute(ckca_context *ctx) {
    ckca_data *data = pictures(ctx);
    ckca_model *a = net(ctx), *b = net(ctx);
    ckca_update_desc d = recipe();
    ckca_bytes kept, fewer;
    float *x, *y;
    CHECK(!ckca_update(a, data, &d, NULL) && !ckca_update(b, data, &d, NULL), "update: %s", ckca_error(ctx));
    CHECK(!ckca_update(a, data, &d, NULL) && !a->recompute_outputs, "update with memory: %s", ckca_error(ctx));
    CHECK(!ckca_model_bytes(b, 16, 1, &kept), "bytes: %s", ckca_error(ctx));
    ckca__device_release(ctx, b->activations, b->activation_bytes);
    b->activations = NULL;
    b->activation_bytes = 0;
    cuda_shim_memory -= ckca__device_free_bytes(ctx) - kept.activations * 7 / 4;
    CHECK(!ckca__reserve(b, 16, CKCA__MODE_TRAIN) && b->recompute_outputs, "reserve in little memory: %s", ckca_error(ctx));
    cuda_shim_memory = (size_t)1 << 30;
    CHECK(!ckca_update(b, data, &d, NULL), "update after that: %s", ckca_error(ctx));
    CHECK(!ckca_model_bytes(b, 16, 1, &fewer) && fewer.activations < 0.9 * (double)kept.activations,
          "%.0f bytes of activations, and %.0f where memory is short", (double)kept.activations,
          (double)fewer.activations);
    x = weights(a), y = weights(b);
    CHECK(!memcmp(x, y, a->all * sizeof *x), "%s", "recomputed outputs give other weights");
    free(x), free(y);
    ckca_model_free(a), ckca_model_free(b);
    ckca_data_free(data);
}

/* Memory for training runs out at any point; the network's predictions stay the same. */
static void test_less_memory(ckca_context *ctx) {
    float *input = make(4 * SIZE * SIZE * 3, 1), before[4 * CLASSES], after[4 * CLASSES];
    int step, refused = 0, wrong = 0;
    for (step = 0; step < 30; step++) {
        ckca_model *m = net(ctx);
        ckca_bytes bytes;
        CHECK(!ckca_model_bytes(m, 4, 1, &bytes) && !ckca_forward(m, input, 4, 0) &&
                  !ckca_node_read(m, m->logits, before),
              "forward: %s", ckca_error(ctx));
        cuda_shim_memory -= ckca__device_free_bytes(ctx) - bytes.total * (size_t)step / 30;
        refused += ckca_forward(m, input, 4, 1) == CKCA_ENOMEM;
        cuda_shim_memory = (size_t)1 << 30;
        if (!m->n || !m->mode) { /* it ran out (else the statistics have moved) */
            CHECK(!ckca_forward(m, input, 4, 0) && !ckca_node_read(m, m->logits, after), "after: %s", ckca_error(ctx));
            wrong += memcmp(before, after, sizeof before) != 0;
        }
        ckca_model_free(m);
    }
    CHECK(refused > 10 && !wrong, "memory ran out %d times of 30; %d times other logits came after it", refused, wrong);
    free(input);
}

/* Each call fails in turn: the status comes with a message that names the call, and nothing leaks. */
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
        done = cuda_shim_fail > 0; /* the failure lay past the last call */
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
        ckca_context_free(ctx);
    }
    printf("%d calls failed one by one, %d without effect\n", failed, silent);
    CHECK(done && failed > 100 && !silent, "%d failures, %d silent", failed, silent);
}
#endif

int main(void) {
    int p;
    for (p = CKCA_PRECISION_FLOAT32; p <= CKCA_PRECISION_BF16; p++) {
        ckca_context *ctx = context((ckca_precision)p);
        if (!ctx) {
            printf("note: no context in precision %d (compute capability below 8.0?)\n", p);
            CHECK(p != CKCA_PRECISION_FLOAT32, "no context: %s", "is there a GPU?");
            continue;
        }
        printf("%s\n", ckca_device(ctx));
        test_convs(ctx);
        if (p) test_wgmma(ctx);
        test_statistics(ctx);
        if (p) test_rounding(ctx);
        test_nan(ctx);
        if (p == CKCA_PRECISION_BF16) {
            static const int channels[] = {1, 3, 8, 16, 20, 64, 264};
            int i;
            for (i = 0; i < 7; i++) {
                test_half_norms(ctx, i % 2 ? 150 : 37, channels[i]);
                test_half_maps(ctx, 1 + i % 3, channels[i]);
            }
            test_half_nets(ctx);
        }
        test_small_ops(ctx);
        test_gate(ctx);
        test_upload(ctx);
        test_sgd(ctx);
#ifdef CKCA_CUDA_SHIM
        test_latch(ctx);
#endif
        test_recording(ctx);
        test_streaming(ctx);
        test_memory(ctx);
#ifdef CKCA_CUDA_SHIM
        test_recompute(ctx);
        test_less_memory(ctx);
#endif
        ckca_context_free(ctx);
    }
    test_precisions();
#ifndef _WIN32
    test_fork();
#endif
#ifdef CKCA_CUDA_SHIM
    test_failures(0);
    test_failures(1);
#endif
    return test_summary();
}
#endif
