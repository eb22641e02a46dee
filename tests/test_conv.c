/* test_conv.c: the convolution and linear ops.
     1. the naive ops against central differences of a convolution in double (they are the reference for the rest);
     2. every op on every instruction set of this machine against the naive ops, on irregular shapes;
     3. the same bits for 1, 2 and 3 threads, and for a picture alone and in a batch (if both use the same algorithm);
     4. Winograd's algorithm against sums in double.
   Inputs lie between NaNs, outputs and workspace between sentinels, so that an access out of bounds is found. */
#define CKCA_IMPLEMENTATION
#define CKCA_STATIC
#include "ckca.h"
#include "test.h"
#include "device.h"

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wunused-function"
#endif

enum { MARGIN = 80 };

/* count floats with NaN on either side. */
static float *guarded(size_t count) {
    float *block = (float *)malloc((count + 2 * MARGIN) * sizeof *block);
    size_t i;
    if (!block) exit(2);
    for (i = 0; i < count + 2 * MARGIN; i++) block[i] = NAN;
    return block + MARGIN;
}

static void unguard(float *memory) { free(memory - MARGIN); }

static int untouched(const float *memory, size_t count) {
    int i;
    for (i = 0; i < MARGIN; i++)
        if (!isnan(memory[i - MARGIN]) || !isnan(memory[count + i])) return 0;
    return 1;
}

static void fill(float *to, size_t count, uint64_t seed) {
    size_t i;
    for (i = 0; i < count; i++) to[i] = (float)(2 * ckca__uniform(seed, 99, i) - 1);
}

static ckca__conv shape(int n, int h, int w, int c, int k, int r, int s, int stride, int pad) {
    ckca__conv v;
    v.n = n;
    v.h = h;
    v.w = w;
    v.c = c;
    v.k = k;
    v.r = r;
    v.s = s;
    v.stride = stride;
    v.pad = pad;
    v.p = (h + 2 * pad - r) / stride + 1;
    v.q = (w + 2 * pad - s) / stride + 1;
    v.norm = NULL;
    v.bf16_x = v.bf16 = 0;
    v.packed_weights = NULL;
    v.statistics = NULL;
    v.groups = 0;
    return v;
}

static const char *describe(const ckca__conv *s) {
    static char text[128];
    snprintf(text, sizeof text, "%dx%dx%dx%d, %d of %dx%d, stride %d, pad %d, groups %d", s->n, s->h, s->w, s->c, s->k,
             s->r, s->s, s->stride, s->pad, s->groups);
    return text;
}

static size_t x_count(const ckca__conv *s) { return (size_t)s->n * s->h * s->w * s->c; }
static size_t w_count(const ckca__conv *s) { return (size_t)s->k * s->r * s->s * ckca__group_inputs(s); }
static size_t y_count(const ckca__conv *s) { return (size_t)s->n * s->p * s->q * s->k; }

/* Everything the three passes read and write, for one shape. */
typedef struct passes {
    ckca__conv s;
    float *x, *w, *bias, *residual, *dy;             /* in */
    float *y, *y_relu, *dx, *dx_added, *dw, *dbias;  /* out */
} passes;

static void passes_create(passes *t, const ckca__conv *s) {
    t->s = *s;
    fill(t->x = guarded(x_count(s)), x_count(s), 1);
    fill(t->w = guarded(w_count(s)), w_count(s), 2);
    fill(t->bias = guarded(s->k), s->k, 3);
    fill(t->residual = guarded(y_count(s)), y_count(s), 4);
    fill(t->dy = guarded(y_count(s)), y_count(s), 5);
    t->y = guarded(y_count(s));
    t->y_relu = guarded(y_count(s));
    t->dx = guarded(x_count(s));
    fill(t->dx_added = guarded(x_count(s)), x_count(s), 6);
    fill(t->dw = guarded(w_count(s)), w_count(s), 7);
    fill(t->dbias = guarded(s->k), s->k, 8);
}

static void passes_free(passes *t) {
    unguard(t->x);
    unguard(t->w);
    unguard(t->bias);
    unguard(t->residual);
    unguard(t->dy);
    unguard(t->y);
    unguard(t->y_relu);
    unguard(t->dx);
    unguard(t->dx_added);
    unguard(t->dw);
    unguard(t->dbias);
}

/* naive: the twins, whatever the context's instruction set. linear: the linear ops, for 1 x 1 shapes of one pixel. */
static void passes_run(passes *t, ckca_context *ctx, int naive, int linear) {
    const ckca__conv *s = &t->s;
    size_t count = ckca__conv_workspace(ctx, s) / sizeof(float);
    float *ws = guarded(count > w_count(s) ? count : w_count(s));
    if (naive) {
        ckca__naive_conv_forward(ctx, s, t->x, t->w, NULL, NULL, 0, t->y, ws);
        ckca__naive_conv_forward(ctx, s, t->x, t->w, t->bias, t->residual, 1, t->y_relu, ws);
        ckca__naive_conv_backward_data(ctx, s, t->dy, t->w, t->dx, 0);
        ckca__naive_conv_backward_data(ctx, s, t->dy, t->w, t->dx_added, 1);
        ckca__naive_conv_backward_weight(ctx, s, t->x, t->dy, t->dw, t->dbias);
    } else if (linear) {
        size_t i;
        ckca__op_linear_forward(ctx, s->n, s->c, s->k, t->x, t->w, NULL, t->y, ws);
        ckca__op_linear_forward(ctx, s->n, s->c, s->k, t->x, t->w, t->bias, t->y_relu, ws);
        for (i = 0; i < y_count(s); i++) {
            t->y_relu[i] += t->residual[i];
            if (t->y_relu[i] < 0) t->y_relu[i] = 0;
        }
        ckca__op_linear_backward(ctx, s->n, s->c, s->k, t->x, t->w, t->dy, t->dx, 0, t->dw, t->dbias, ws);
        memset(t->dw, 0, w_count(s) * sizeof(float)); /* gradients are added to: once more, from the start */
        memset(t->dbias, 0, s->k * sizeof(float));
        fill(t->dw, w_count(s), 7);
        fill(t->dbias, s->k, 8);
        ckca__op_linear_backward(ctx, s->n, s->c, s->k, t->x, t->w, t->dy, t->dx_added, 1, t->dw, t->dbias, ws);
    } else {
        ckca__op_conv_forward(ctx, s, t->x, t->w, NULL, NULL, 0, t->y, ws);
        ckca__op_conv_forward(ctx, s, t->x, t->w, t->bias, t->residual, 1, t->y_relu, ws);
        ckca__op_conv_backward_data(ctx, s, t->dy, t->w, t->dx, 0, ws);
        ckca__op_conv_backward_data(ctx, s, t->dy, t->w, t->dx_added, 1, ws);
        ckca__op_conv_backward_weight(ctx, s, t->x, t->dy, t->dw, t->dbias, ws);
    }
    CHECK(untouched(ws, count > w_count(s) ? count : w_count(s)), "%s, isa %d: wrote beyond its scratch", describe(s),
          (int)ctx->isa);
    CHECK(untouched(t->y, y_count(s)) && untouched(t->y_relu, y_count(s)) && untouched(t->dx, x_count(s)) &&
              untouched(t->dx_added, x_count(s)) && untouched(t->dw, w_count(s)) && untouched(t->dbias, s->k),
          "%s, isa %d: wrote beyond an output", describe(s), (int)ctx->isa);
    unguard(ws);
}

/* Values are sums of `terms` products of numbers below 1, so about sqrt(terms) large, rounded to float as many times:
   two orders of summation differ by less than terms x 2^-23. One product forgotten or doubled makes about a third. */
static void compare(const char *what, const ckca__conv *s, int isa, const float *got, const float *want, size_t count,
                    double terms) {
    double tolerance = 2e-6 + 1.2e-7 * terms, worst = 0;
    size_t i, at = 0;
    for (i = 0; i < count; i++) {
        double error = fabs((double)got[i] - want[i]);
        if (!(error <= worst)) {
            worst = error;
            at = i;
            if (isnan(error)) break;
        }
    }
    CHECK(worst <= tolerance, "%s of %s, isa %d: [%lu] is %.9g, naive %.9g (difference %.3g, allowed %.3g)", what,
          describe(s), isa, (unsigned long)at, got[at], want[at], worst, tolerance);
}

static void compare_passes(const passes *got, const passes *want, int isa) {
    const ckca__conv *s = &got->s;
    double taps = (double)s->r * s->s;
    compare("y", s, isa, got->y, want->y, y_count(s), taps * s->c);
    compare("y with bias, residual, ReLU", s, isa, got->y_relu, want->y_relu, y_count(s), taps * s->c + 2);
    compare("dx", s, isa, got->dx, want->dx, x_count(s), taps * s->k);
    compare("dx accumulated", s, isa, got->dx_added, want->dx_added, x_count(s), taps * s->k + 1);
    compare("dw", s, isa, got->dw, want->dw, w_count(s), (double)s->n * s->p * s->q + 1);
    compare("dbias", s, isa, got->dbias, want->dbias, s->k, (double)s->n * s->p * s->q + 1);
}

static int same(const float *a, const float *b, size_t count) { return !memcmp(a, b, count * sizeof *a); }

static int same_passes(const passes *a, const passes *b) {
    const ckca__conv *s = &a->s;
    return same(a->y, b->y, y_count(s)) && same(a->y_relu, b->y_relu, y_count(s)) && same(a->dx, b->dx, x_count(s)) &&
           same(a->dx_added, b->dx_added, x_count(s)) && same(a->dw, b->dw, w_count(s)) &&
           same(a->dbias, b->dbias, s->k);
}

/* ---- 1. the naive twins ---- */

/* sum of g y, y the convolution of x with w, from the definition alone. */
static double weighted_output(const ckca__conv *s, const double *x, const double *w, const float *g) {
    const int groups = s->groups ? s->groups : 1, inputs = s->c / groups, outputs = s->k / groups;
    double total = 0;
    int n, p, q, k, r, t, c;
    for (n = 0; n < s->n; n++)
        for (p = 0; p < s->p; p++)
            for (q = 0; q < s->q; q++)
                for (k = 0; k < s->k; k++)
                    for (r = 0; r < s->r; r++)
                        for (t = 0; t < s->s; t++) {
                            int y = p * s->stride - s->pad + r, z = q * s->stride - s->pad + t;
                            if (y < 0 || y >= s->h || z < 0 || z >= s->w) continue;
                            for (c = 0; c < inputs; c++)
                                total += g[((n * s->p + p) * s->q + q) * s->k + k] *
                                         x[((n * s->h + y) * s->w + z) * s->c + k / outputs * inputs + c] *
                                         w[((k * s->r + r) * s->s + t) * inputs + c];
                        }
    return total;
}

/* y[i] is the change of (sum of g y) with g[i]; dx and dw by central differences, exact here but for rounding: the sum
   is linear in every single value. */
static void test_naive(ckca_context *ctx, const ckca__conv *s) {
    passes t;
    double *x, *w;
    float *one;
    size_t i;
    double worst_y = 0, worst_dx = 0, worst_dw = 0, tolerance = 1e-5;
    passes_create(&t, s);
    memset(t.dw, 0, w_count(s) * sizeof(float));
    passes_run(&t, ctx, 1, 0);
    x = (double *)malloc(x_count(s) * sizeof *x);
    w = (double *)malloc(w_count(s) * sizeof *w);
    one = (float *)calloc(y_count(s), sizeof *one);
    if (!x || !w || !one) exit(2);
    for (i = 0; i < x_count(s); i++) x[i] = t.x[i];
    for (i = 0; i < w_count(s); i++) w[i] = t.w[i];
    for (i = 0; i < y_count(s); i++) {
        double y, relu, error;
        one[i] = 1;
        y = weighted_output(s, x, w, one);
        one[i] = 0;
        relu = y + t.bias[i % s->k] + t.residual[i];
        if (relu < 0) relu = 0;
        error = fabs(t.y[i] - y) + fabs(t.y_relu[i] - relu);
        if (!(error <= worst_y)) worst_y = error;
    }
    for (i = 0; i < x_count(s); i++) {
        double keep = x[i], up, error;
        x[i] = keep + 0.5;
        up = weighted_output(s, x, w, t.dy);
        x[i] = keep - 0.5;
        up -= weighted_output(s, x, w, t.dy);
        x[i] = keep;
        error = fabs(t.dx[i] - up);
        if (!(error <= worst_dx)) worst_dx = error;
    }
    for (i = 0; i < w_count(s); i++) {
        double keep = w[i], up, error;
        w[i] = keep + 0.5;
        up = weighted_output(s, x, w, t.dy);
        w[i] = keep - 0.5;
        up -= weighted_output(s, x, w, t.dy);
        w[i] = keep;
        error = fabs(t.dw[i] - up);
        if (!(error <= worst_dw)) worst_dw = error;
    }
    CHECK(worst_y <= tolerance, "naive y of %s: off by %g", describe(s), worst_y);
    CHECK(worst_dx <= tolerance, "naive dx of %s: off by %g", describe(s), worst_dx);
    CHECK(worst_dw <= tolerance, "naive dw of %s: off by %g", describe(s), worst_dw);
    free(x);
    free(w);
    free(one);
    passes_free(&t);
}

/* ---- 2. and 3. ---- */

static ckca_context *context(ckca_isa isa, int threads) {
    ckca_context *ctx;
    ckca_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.isa = isa;
    desc.threads = threads;
    if (ckca_init(&ctx, &desc) == CKCA_OK) return ctx;
    ckca_context_free(ctx);
    return NULL;
}

/* Whether the forward pass and the gradients take Winograd's algorithm (of stride 2, not every weight gradient does): then
   a batch need not be what its pictures are alone, which may be too few tiles for it. */
static int winograd(const ckca_context *ctx, const ckca__conv *s) {
#ifdef CKCA__SIMD
    ckca__wino_job job;
    ckca__conv bundle;
    if (s->groups > 1) bundle = ckca__bundle_shape(s), s = &bundle;
    return ckca__wino_plan(ctx, &job, s, 0) && ckca__wino_plan(ctx, &job, s, 1) &&
           (ckca__wino_plan(ctx, &job, s, 2) || s->stride == 2);
#else
    (void)ctx;
    (void)s;
    return 0;
#endif
}

/* The three passes where a norm makes the input out of x: on the way in or before, to the same bits. */
static void test_norm(ckca_context *ctx, const ckca__conv *shape, int relu) {
    size_t count, c = (size_t)shape->c;
    float *values = guarded(4 * c), *ws, *x = guarded(x_count(shape));
    const ckca__norm norm = {values, values + c, values + 2 * c, values + 3 * c, relu};
    passes way, before;
    ckca__conv s = *shape;
    if (!ckca__may_norm(ctx, &s)) {
        unguard(values);
        unguard(x);
        return;
    }
    fill(values, 4 * c, 9);
    passes_create(&before, &s);
    ckca__op_batchnorm_recompute(ctx, 0, x_count(&s) / c, s.c, before.x, &norm, NULL, NULL, x);
    ws = guarded(count = ckca__conv_workspace(ctx, &s) / sizeof(float));
    ckca__op_conv_forward(ctx, &s, x, before.w, before.bias, NULL, 0, before.y, ws);
    ckca__op_conv_backward_weight(ctx, &s, x, before.dy, before.dw, NULL, ws);
    ckca__op_conv_backward_data(ctx, &s, before.dy, before.w, before.dx, 0, ws);
    unguard(ws);
    s.norm = &norm;
    passes_create(&way, &s);
    ws = guarded(count = ckca__conv_workspace(ctx, &s) / sizeof(float));
    ckca__op_conv_forward(ctx, &s, way.x, way.w, way.bias, NULL, 0, way.y, ws);
    ckca__op_conv_backward_weight(ctx, &s, way.x, way.dy, way.dw, NULL, ws);
    ckca__op_conv_backward_data(ctx, &s, way.dy, way.w, way.dx, 0, ws);
    CHECK(untouched(ws, count), "%s, isa %d: wrote beyond its scratch under a norm", describe(&s), (int)ctx->isa);
    CHECK(same(way.y, before.y, y_count(&s)), "%s, isa %d: y under a norm differs", describe(&s), (int)ctx->isa);
    CHECK(same(way.dw, before.dw, w_count(&s)), "%s, isa %d: dw under a norm differs", describe(&s), (int)ctx->isa);
    CHECK(same(way.dx, before.dx, x_count(&s)), "%s, isa %d: dx under a norm differs", describe(&s), (int)ctx->isa);
    unguard(ws);
    passes_free(&way);
    passes_free(&before);
    unguard(values);
    unguard(x);
}

/* most: compare 1 thread with that many. Beside vector kernels the plain loops, slow where they are emulated or
   sanitized, are looked at from all sides only where most is 3. */
static void test_shape(ckca_context *ctx[CKCA_ISA_AVX512 + 1][3], const ckca__conv *s, int most) {
    passes naive;
    int isa, threads, linear = s->h * s->w == 1 && s->r * s->s == 1 && s->stride == 1 && s->pad == 0;
    passes_create(&naive, s);
    passes_run(&naive, ctx[CKCA_ISA_PLAIN][0], 1, 0);
    for (isa = CKCA_ISA_PLAIN; isa <= CKCA_ISA_AVX512; isa++) {
        const int all = isa > CKCA_ISA_PLAIN || most > 2 || !ctx[CKCA_ISA_BASE][0];
        passes first;
        if (!ctx[isa][0]) continue;
        passes_create(&first, s);
        passes_run(&first, ctx[isa][0], 0, 0);
        compare_passes(&first, &naive, isa);
        if (all) test_norm(ctx[isa][s->n % 2], s, s->h % 2);
        for (threads = 1; threads < most && all; threads++) {
            passes other;
            passes_create(&other, s);
            passes_run(&other, ctx[isa][threads], 0, 0);
            CHECK(same_passes(&first, &other), "%s, isa %d: %d threads and 1 differ", describe(s), isa, threads + 1);
            passes_free(&other);
        }
        if (linear) {
            passes other;
            passes_create(&other, s);
            passes_run(&other, ctx[isa][0], 0, 1);
            compare_passes(&other, &naive, isa);
            passes_free(&other);
        }
        /* The first and the last picture by themselves, in scratch of no more than the batch's. */
        if (s->n > 1 && all && !(isa > CKCA_ISA_PLAIN && winograd(ctx[isa][0], s))) {
            int n, different = 0, larger = 0;
            for (n = 0; n < s->n; n += s->n > 2 ? s->n - 1 : 1) {
                size_t x = x_count(s) / s->n, y = y_count(s) / s->n;
                passes alone;
                ckca__conv one = *s;
                one.n = 1;
                passes_create(&alone, &one);
                memcpy(alone.x, first.x + n * x, x * sizeof(float));
                memcpy(alone.dy, first.dy + n * y, y * sizeof(float));
                memcpy(alone.residual, first.residual + n * y, y * sizeof(float));
                passes_run(&alone, ctx[isa][0], 0, 0);
                different += !same(alone.y, first.y + n * y, y) || !same(alone.y_relu, first.y_relu + n * y, y) ||
                             !same(alone.dx, first.dx + n * x, x);
                larger += ckca__conv_workspace(ctx[isa][0], &one) > ckca__conv_workspace(ctx[isa][0], s);
                passes_free(&alone);
            }
            /* cuBLAS, behind the GPU's 1 x 1 convolutions, may choose another way for another batch. */
            if (!CKCA__DEVICE_IS_HOST && s->r * s->s * s->stride == 1 && !s->pad) different = 0;
            CHECK(!different, "%s, isa %d: %d pictures differ alone and in the batch", describe(s), isa, different);
            CHECK(!larger, "%s, isa %d: a smaller batch wants more scratch", describe(s), isa);
        }
        passes_free(&first);
    }
    passes_free(&naive);
}

/* Root mean square of got - want over that of want, and the greatest difference over it. */
static void errors(const float *got, const double *want, size_t count, double *rms, double *worst) {
    double square = 0, wanted = 0;
    size_t i;
    *worst = 0;
    for (i = 0; i < count; i++) {
        double e = got[i] - want[i];
        square += e * e;
        wanted += want[i] * want[i];
        if (!(fabs(e) <= *worst)) *worst = fabs(e);
    }
    *rms = sqrt(square / wanted);
    *worst /= sqrt(wanted / (double)count);
}

/* Winograd's passes against the definition in double; beside them the direct ones, which must do better. */
static void test_winograd(ckca_context *ctx[CKCA_ISA_AVX512 + 1][3], const ckca__conv *s) {
    passes in;
    double *y = (double *)calloc(y_count(s), sizeof *y), *y_relu = (double *)calloc(y_count(s), sizeof *y);
    double *dx = (double *)calloc(x_count(s), sizeof *y), *dx_added = (double *)calloc(x_count(s), sizeof *y);
    double *dw = (double *)calloc(w_count(s), sizeof *y), rms[2][5], worst[2][5];
    int n, p, q, k, r, t, c, isa, direct, threads, i;
    size_t at;
    if (!y || !y_relu || !dx || !dx_added || !dw) exit(2);
    passes_create(&in, s);
    for (n = 0; n < s->n; n++)
        for (p = 0; p < s->p; p++)
            for (q = 0; q < s->q; q++)
                for (k = 0; k < s->k; k++) {
                    double dy = in.dy[at = (((size_t)n * s->p + p) * s->q + q) * s->k + k], sum = 0;
                    for (r = 0; r < 3; r++)
                        for (t = 0; t < 3; t++) {
                            int iy = p * s->stride - s->pad + r, ix = q * s->stride - s->pad + t;
                            size_t x = (((size_t)n * s->h + iy) * s->w + ix) * s->c, w = (((size_t)k * 3 + r) * 3 + t) * s->c;
                            if (iy < 0 || iy >= s->h || ix < 0 || ix >= s->w) continue;
                            for (c = 0; c < s->c; c++) {
                                sum += (double)in.x[x + c] * in.w[w + c];
                                dx[x + c] += dy * in.w[w + c];
                                dw[w + c] += dy * in.x[x + c];
                            }
                        }
                    y[at] = sum;
                    sum += (double)in.bias[k] + in.residual[at];
                    y_relu[at] = sum > 0 ? sum : 0;
                }
    for (at = 0; at < x_count(s); at++) dx_added[at] = dx[at] + in.dx_added[at];
    for (at = 0; at < w_count(s); at++) dw[at] += in.dw[at];
    passes_free(&in);
    for (isa = CKCA_ISA_BASE; isa <= CKCA_ISA_AVX512; isa++) {
        if (!ctx[isa][0]) continue;
        CHECK(winograd(ctx[isa][0], s), "%s, isa %d: not by Winograd's algorithm", describe(s), isa);
        for (direct = 0; direct < 2; direct++) {
            passes got;
            passes_create(&got, s);
            ctx[isa][0]->no_winograd = direct;
            passes_run(&got, ctx[isa][0], 0, 0);
            ctx[isa][0]->no_winograd = 0;
            errors(got.y, y, y_count(s), &rms[direct][0], &worst[direct][0]);
            errors(got.y_relu, y_relu, y_count(s), &rms[direct][1], &worst[direct][1]);
            errors(got.dx, dx, x_count(s), &rms[direct][2], &worst[direct][2]);
            errors(got.dx_added, dx_added, x_count(s), &rms[direct][3], &worst[direct][3]);
            errors(got.dw, dw, w_count(s), &rms[direct][4], &worst[direct][4]);
            for (threads = 1; threads < 3 && !direct; threads++) {
                passes other;
                passes_create(&other, s);
                passes_run(&other, ctx[isa][threads], 0, 0);
                CHECK(same_passes(&got, &other), "%s, isa %d: %d threads and 1 differ", describe(s), isa, threads + 1);
                passes_free(&other);
            }
            passes_free(&got);
        }
        for (i = 0; i < 5; i++) {
            static const char *const pass[] = {"y", "y with bias, residual, ReLU", "dx", "dx accumulated", "dw"};
            CHECK(rms[0][i] < 3e-6 && worst[0][i] < 3e-5, "%s of %s, isa %d: error %.3g rms, %.3g at worst", pass[i],
                  describe(s), isa, rms[0][i], worst[0][i]);
            CHECK(rms[1][i] < rms[0][i] * (s->stride == 1 ? 1 : 1.2), "%s of %s, isa %d: direct is no closer, %.3g and %.3g", pass[i], describe(s), isa,
                  rms[1][i], rms[0][i]);
        }
        printf("%s, isa %d: errors of y %.1e, dx %.1e, dw %.1e (direct %.1e, %.1e, %.1e)\n", describe(s), isa, rms[0][0],
               rms[0][2], rms[0][4], rms[1][0], rms[1][2], rms[1][4]);
    }
    free(y);
    free(y_relu);
    free(dx);
    free(dx_added);
    free(dw);
}

/* Scratch is reserved for a whole batch: a shorter one, which may be cut into other tasks, must never want more. */
static void test_scratch(const ckca_context *ctx) {
    static const int channels[] = {16, 48, 64, 1024};
    int i, threads, pad, h;
    for (i = 0; i < 4 * 4; i++)
        for (threads = 1; threads <= 64; threads *= 4)
            for (pad = -1; pad < 3; pad++) /* -1: of 1 x 1 */
                for (h = 4; h <= 8; h += 4) {
                    ckca_context many = *ctx;
                    size_t most = 0;
                    int n, more = 0;
                    many.threads = threads;
                    for (n = 1; n <= 300; n += n < 40 ? 1 : 13) {
                        ckca__conv s = pad < 0 ? shape(n, h, h, channels[i % 4], channels[i / 4], 1, 1, 1, 0)
                                               : shape(n, h, h, channels[i % 4], channels[i / 4], 3, 3, 1, pad);
                        size_t bytes = ckca__conv_workspace(&many, &s);
                        if (bytes < most) more = n;
                        else most = bytes;
                    }
                    CHECK(!more, "%d to %d channels at %d x %d, pad %d, %d threads, isa %d: %d pictures want less scratch "
                          "than fewer do", channels[i % 4], channels[i / 4], h, h, pad, threads, (int)ctx->isa, more);
                }
}

/* A NaN must come through ReLU, or a diverged model would look healthy. */
static void test_nan(ckca_context *ctx, int n, int c, int k) {
    ckca__conv s = shape(n, 4, 4, c, k, 3, 3, 1, 1);
    passes t;
    int i, lost = 0;
    passes_create(&t, &s);
    t.x[0] = NAN;
    passes_run(&t, ctx, 0, 0);
    for (i = 0; i < k; i++) lost += !isnan(t.y[i]) || !isnan(t.y_relu[i]);
    CHECK(!lost, "isa %d: %d of %d outputs of a NaN are numbers", (int)ctx->isa, lost, k);
    passes_free(&t);
}

/* With SLOW in the environment (an emulator, a sanitizer), shapes of more than 40 million multiply-adds are left out. */
static int too_slow(const ckca__conv *s) {
    return getenv("SLOW") && (double)s->n * s->p * s->q * s->k * s->r * s->s * s->c > 40e6;
}

int main(void) {
    static const int small[][9] = {
        /* n  h  w  c  k  r  s stride pad */
        {2, 5, 4, 3, 2, 3, 3, 1, 1}, {1, 6, 5, 2, 3, 3, 3, 2, 1}, {2, 4, 4, 3, 4, 1, 1, 1, 0},
        {1, 5, 5, 2, 2, 1, 1, 2, 0},
        {1, 7, 6, 1, 3, 5, 5, 2, 2}, {1, 4, 5, 2, 2, 2, 3, 1, 0}, {1, 5, 5, 1, 2, 3, 3, 3, 3},
        {1, 3, 3, 2, 2, 7, 7, 2, 3},
    };
    static const int table[][9] = {
        /* the layers of ResNets, cut down */
        {3, 8, 8, 3, 16, 3, 3, 1, 1}, {2, 8, 8, 16, 16, 3, 3, 1, 1}, {3, 8, 8, 16, 32, 3, 3, 2, 1},
        {5, 4, 4, 64, 64, 3, 3, 1, 1},
        {2, 8, 8, 32, 64, 1, 1, 2, 0}, {2, 7, 7, 64, 32, 1, 1, 1, 0}, {2, 7, 7, 24, 70, 1, 1, 1, 0},
        {1, 20, 20, 3, 64, 7, 7, 2, 3},
        {1, 33, 31, 16, 16, 3, 3, 1, 1}, {1, 14, 14, 70, 24, 3, 3, 2, 1}, {1, 30, 30, 40, 48, 3, 3, 1, 1},
        {2, 1, 1, 512, 256, 3, 3, 1, 1}, {2, 2, 2, 200, 180, 3, 3, 1, 1},
        /* many pictures to a task, more than a list of pixels; a region larger than one task's */
        {40, 4, 4, 20, 17, 3, 3, 1, 1}, {64, 2, 2, 8, 8, 3, 3, 1, 1}, {1, 40, 70, 64, 3, 3, 3, 1, 1},
        {17, 17, 17, 2, 5, 1, 1, 1, 0},
        {64, 6, 6, 40, 1, 3, 3, 1, 1},
        /* channels that fill no vector */
        {2, 6, 5, 1, 1, 3, 3, 1, 1}, {2, 6, 5, 3, 3, 3, 3, 1, 1}, {3, 5, 6, 1, 7, 3, 3, 1, 1},
        {3, 5, 6, 5, 1, 3, 3, 1, 1},
        {2, 9, 7, 17, 33, 3, 3, 1, 1}, {2, 7, 9, 31, 15, 3, 3, 2, 1}, {1, 6, 6, 70, 70, 3, 3, 1, 1},
        {2, 5, 5, 9, 13, 3, 3, 1, 1},
        {2, 5, 5, 4, 4, 3, 3, 1, 1}, {2, 5, 5, 2, 19, 3, 3, 2, 1}, {2, 5, 5, 47, 2, 3, 3, 2, 1},
        {4, 3, 3, 50, 61, 1, 1, 1, 0},
        /* kernels, strides and pads */
        {2, 9, 8, 5, 6, 5, 5, 1, 2}, {2, 9, 8, 5, 6, 5, 5, 2, 2}, {2, 9, 8, 18, 6, 5, 5, 3, 1},
        {1, 11, 13, 6, 20, 7, 7, 3, 3},
        {2, 7, 7, 6, 9, 1, 1, 3, 0}, {2, 7, 7, 6, 9, 1, 1, 1, 2}, {2, 7, 7, 20, 9, 1, 1, 2, 3},
        {2, 6, 6, 5, 18, 3, 3, 1, 3},
        {2, 6, 6, 5, 18, 3, 3, 2, 3}, {2, 6, 6, 5, 18, 3, 3, 3, 3}, {2, 6, 6, 18, 5, 3, 3, 1, 0},
        {2, 6, 6, 18, 5, 3, 3, 2, 0},
        {2, 10, 9, 4, 6, 2, 3, 2, 1}, {2, 9, 10, 20, 6, 3, 1, 1, 1}, {1, 12, 12, 3, 5, 4, 4, 4, 0},
        {1, 12, 12, 3, 5, 3, 3, 5, 0},
        {1, 23, 20, 6, 20, 3, 3, 9, 1}, {1, 20, 20, 6, 20, 3, 3, 8, 1}, {1, 3, 3, 8, 8, 7, 7, 1, 3},
        {1, 2, 1, 8, 8, 7, 7, 2, 3},
        {1, 1, 1, 16, 16, 3, 3, 2, 1}, {1, 5, 5, 16, 16, 5, 5, 1, 0}, {2, 40, 3, 7, 8, 3, 3, 1, 1},
        {2, 3, 300, 7, 8, 3, 3, 1, 1},
        {2, 5, 5, 6, 7, 2, 2, 2, 0}, {1, 8, 8, 8, 8, 3, 3, 3, 0},
        /* pixels 4 KiB apart, read or written, near and with a stride; tasks of several lists; sums too many to be kept
           for groups of pixels, cut by lanes and by rows */
        {2, 9, 7, 1024, 40, 1, 1, 1, 0}, {2, 9, 7, 1024, 24, 1, 1, 2, 0}, {2, 6, 5, 20, 1024, 1, 1, 1, 0},
        {2, 9, 8, 20, 1024, 1, 1, 2, 0}, {2, 90, 91, 5, 3, 1, 1, 1, 0}, {2, 18, 17, 1000, 530, 1, 1, 1, 0},
        {2, 17, 17, 200, 2630, 1, 1, 1, 0}, {1, 4, 5, 300, 200, 3, 3, 2, 1},
        /* linear layers */
        {5, 1, 1, 64, 10, 1, 1, 1, 0}, {70, 1, 1, 33, 100, 1, 1, 1, 0}, {1, 1, 1, 20, 3, 1, 1, 1, 0},
        {300, 1, 1, 3, 2, 1, 1, 1, 0},
        /* of whole vectors, without a border */
        {2, 6, 7, 32, 20, 2, 2, 1, 0}, {2, 9, 8, 48, 7, 3, 3, 3, 0},
    };
    static const int grouped[][9] = { /* n, h, w, c, k, kernel, stride, pad, groups */
        {2, 5, 4, 6, 4, 3, 1, 1, 2}, {1, 5, 6, 3, 6, 3, 2, 1, 3}, {2, 4, 4, 4, 8, 1, 1, 0, 4}, {1, 7, 5, 4, 4, 3, 9, 1, 2},
        {2, 9, 8, 32, 32, 3, 1, 1, 8}, {2, 9, 8, 64, 32, 3, 2, 1, 4}, {3, 8, 8, 96, 96, 3, 1, 1, 32},
        {2, 7, 7, 64, 128, 3, 2, 1, 2}, {2, 6, 7, 40, 24, 1, 1, 0, 8}, {17, 8, 8, 64, 64, 3, 1, 1, 4},
    };
    static const int winograds[][9] = {
        {16, 8, 8, 16, 16, 3, 3, 1, 1}, {4, 9, 11, 32, 48, 3, 3, 1, 1}, {4, 10, 12, 16, 32, 3, 3, 1, 0},
        {4, 7, 6, 48, 16, 3, 3, 1, 2}, {13, 32, 32, 16, 16, 3, 3, 1, 1}, {20, 4, 4, 64, 96, 3, 3, 1, 1},
        {3, 21, 14, 96, 80, 3, 3, 1, 1}, {5, 7, 7, 192, 208, 3, 3, 1, 1},
        {16, 8, 8, 32, 32, 3, 3, 2, 1}, {4, 28, 27, 48, 64, 3, 3, 2, 1}, {4, 21, 16, 96, 80, 3, 3, 2, 1},
        {7, 15, 13, 64, 32, 3, 3, 2, 1}, {5, 14, 14, 192, 208, 3, 3, 2, 1},
    };
    ckca_context *ctx[CKCA_ISA_AVX512 + 1][3];
    ckca__conv s;
    size_t i;
    int isa, threads, best = 0;
    for (isa = CKCA_ISA_PLAIN; isa <= CKCA_ISA_AVX512; isa++)
        for (threads = 0; threads < 3; threads++) {
            ctx[isa][threads] = isa <= (int)ckca__best_isa() ? context((ckca_isa)isa, threads + 1) : NULL;
            if (ctx[isa][threads]) best = isa;
        }
    printf("instruction sets up to %s\n", ckca_device(ctx[best][0]));
    test_group("NaN reaches the outputs; workspace for smaller batches");
    for (isa = CKCA_ISA_PLAIN; isa <= best; isa++) {
        test_nan(ctx[isa][0], 1, 2, 21);
        test_nan(ctx[isa][0], 16, 16, 32);
        test_scratch(ctx[isa][0]);
    }
    test_group("naive convolutions against central differences in double");
    for (i = 0; i < sizeof small / sizeof *small; i++) {
        const int *v = small[i];
        s = shape(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8]);
        test_naive(ctx[CKCA_ISA_PLAIN][0], &s);
    }
    for (i = 0; i < sizeof grouped / sizeof *grouped; i++) {
        const int *v = grouped[i];
        s = shape(v[0], v[1], v[2], v[3], v[4], v[5], v[5], v[6], v[7]);
        s.groups = v[8];
        if (i < 4) test_naive(ctx[CKCA_ISA_PLAIN][0], &s);
        test_shape(ctx, &s, 2);
    }
    test_group("every instruction set against the naive convolutions; 1 to 3 threads; one picture or a batch");
    for (i = 0; i < sizeof table / sizeof *table; i++) {
        const int *v = table[i];
        s = shape(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8]);
        if (!too_slow(&s)) test_shape(ctx, &s, i % 4 ? 2 : 3);
    }
    test_group("Winograd convolutions against sums in double");
    for (i = 0; best > CKCA_ISA_PLAIN && i < sizeof winograds / sizeof *winograds; i++) {
        const int *v = winograds[i];
        s = shape(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8]);
        if (!too_slow(&s)) test_winograd(ctx, &s);
    }
    test_group("the same for 40 random shapes");
    for (i = 0; i < 40; i++) {
        int n = 1 + (int)(ckca__random(1, 1, i) % 5), r = 1 + (int)(ckca__random(1, 2, i) % 5);
        int t = 1 + (int)(ckca__random(1, 3, i) % 5), pad = (int)(ckca__random(1, 4, i) % 4);
        int h = r + (int)(ckca__random(1, 5, i) % 12), w = t + (int)(ckca__random(1, 6, i) % 12);
        s = shape(n, h, w, 1 + (int)(ckca__random(1, 7, i) % 70), 1 + (int)(ckca__random(1, 8, i) % 70), r, t,
                  1 + (int)(ckca__random(1, 9, i) % 3), pad);
        test_shape(ctx, &s, 2);
    }
    for (isa = CKCA_ISA_PLAIN; isa <= CKCA_ISA_AVX512; isa++)
        for (threads = 0; threads < 3; threads++) ckca_context_free(ctx[isa][threads]);
    return test_summary();
}
