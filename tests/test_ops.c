/* test_ops.c: every op but the convolution's fast paths (test_conv.c): on every instruction set against references in
   double written here, bitwise the same for 1, 2 and 3 threads; gradients against central differences of those
   references; values of PyTorch (tests/torch_ops.py); what augmentation draws; NaN.

   Run from the repository's root, or give the path of ops.safetensors. */
#define CKCA_IMPLEMENTATION
#include "ckca.h"
#include "test.h"
#include "device.h"

/* ---- tools ---- */

enum { ISAS = 4, THREADS = 3 };
static ckca_context *contexts[ISAS][THREADS]; /* of plain, base, AVX2, AVX-512; NULL where the processor lacks it */
static ckca_context *any;                     /* the best */
static const char *const isa_names[] = {"plain", "base", "avx2", "avx512"};

/* Numbers of their own for every call, about uniform in low..high; never exactly the same twice. */
static float *make(size_t count, double low, double high) {
    static uint64_t calls;
    float *v = (float *)malloc((count + 1) * sizeof *v);
    size_t i;
    for (i = 0; i < count; i++) v[i] = (float)(low + (high - low) * ckca__uniform(calls, 99, i));
    calls++;
    return v;
}
static double *doubles(size_t count, const float *v) {
    double *d = (double *)calloc(count + 1, sizeof *d);
    size_t i;
    for (i = 0; v && i < count; i++) d[i] = v[i];
    return d;
}

/* The greatest |a - b| / (1 + |b|), and infinity for a NaN that is not in both. */
static double difference(size_t count, const float *a, const double *b) {
    double most = 0;
    size_t i;
    for (i = 0; i < count; i++) {
        double d = fabs(a[i] - b[i]) / (1 + fabs(b[i]));
        if (a[i] != a[i] && b[i] != b[i]) continue;
        if (!(d <= most)) most = d == d ? d : INFINITY;
    }
    return most;
}

/* Runs an op, which writes count values to out, on every instruction set with 1, 2 and 3 threads. */
typedef void run_function(ckca_context *ctx, const void *args, float *out);
static void check_op(const char *what, run_function *run, const void *args, size_t count, const double *expected,
                     double tolerance) {
    float *out = (float *)malloc(count * sizeof *out), *again = (float *)malloc(count * sizeof *out);
    int isa, t;
    for (isa = 0; isa < ISAS; isa++) {
        double d;
        if (!contexts[isa][0]) continue;
        memset(out, 0xff, count * sizeof *out); /* NaN: what is not written shows */
        run(contexts[isa][0], args, out);
        d = difference(count, out, expected);
        CHECK(d <= tolerance, "%s on %s: off by %.3g, allowed %.3g", what, isa_names[isa], d, tolerance);
        for (t = 1; t < THREADS; t++) {
            memset(again, 0xff, count * sizeof *out);
            run(contexts[isa][t], args, again);
            CHECK(!memcmp(out, again, count * sizeof *out), "%s on %s: %d threads give other bits than 1", what,
                  isa_names[isa], t + 1);
        }
    }
    free(out);
    free(again);
}

/* The gradient of f at x (changed and restored) by central differences. */
typedef double scalar_function(const double *x, const void *args);
static double *central(scalar_function *f, size_t count, double *x, const void *args) {
    double *g = (double *)malloc((count + 1) * sizeof *g);
    size_t i;
    for (i = 0; i < count; i++) {
        const double x0 = x[i], h = 1e-6;
        double up, down;
        x[i] = x0 + h, up = f(x, args);
        x[i] = x0 - h, down = f(x, args);
        x[i] = x0;
        g[i] = (up - down) / (2 * h);
    }
    return g;
}

/* ---- batch norm ---- */

typedef struct {
    size_t rows;
    int c, relu, accumulate, in_place;
    const float *x, *gamma, *beta, *running_mean, *running_var, *residual, *y, *dy, *mean, *inv_std, *start;
} norm;

/* out: y, mean, inv_std, running_mean, running_var */
static void norm_forward(ckca_context *ctx, const void *args, float *out) {
    const norm *a = (const norm *)args;
    size_t n = a->rows * (size_t)a->c, c = (size_t)a->c;
    void *ws = malloc(ckca__op_workspace(ctx, a->rows, a->c));
    float *running = out + n + 2 * c;
    memcpy(running, a->running_mean, c * sizeof *running);
    memcpy(running + c, a->running_var, c * sizeof *running);
    ckca__op_batchnorm_forward(ctx, 0, a->rows, a->c, a->x, a->gamma, a->beta, running, running + c, a->residual, NULL,
                               a->relu, out, out + n, out + n + c, ws);
    free(ws);
}
static void norm_eval(ckca_context *ctx, const void *args, float *out) {
    const norm *a = (const norm *)args;
    ckca__op_batchnorm_eval(ctx, 0, a->rows, a->c, a->x, a->gamma, a->beta, a->running_mean, a->running_var,
                            a->residual, a->relu, out);
}
/* out: dx, dresidual (where there is a residual), dgamma, dbeta */
static void norm_backward(ckca_context *ctx, const void *args, float *out) {
    const norm *a = (const norm *)args;
    size_t n = a->rows * (size_t)a->c, c = (size_t)a->c, m = a->residual ? 2 * n : n;
    int over_dy = a->in_place == 2 && a->residual && !a->accumulate;
    const ckca__norm saved = {a->mean, a->inv_std, a->gamma, a->beta, a->relu};
    void *ws = malloc(ckca__op_workspace(ctx, a->rows, a->c));
    memcpy(out + m, a->start, 2 * c * sizeof *out);
    if (a->residual && a->accumulate) memcpy(out + n, a->residual, n * sizeof *out);
    if (a->in_place) memcpy(out, a->in_place == 1 ? a->dy : a->x, n * sizeof *out);
    if (over_dy) memcpy(out + n, a->dy, n * sizeof *out);
    ckca__op_batchnorm_backward(ctx, 0, a->rows, a->c, a->in_place == 2 ? out : a->x, a->y,
                                a->in_place == 1 ? out : over_dy ? out + n : a->dy, &saved, out,
                                a->residual ? out + n : NULL, a->accumulate, out + m, out + m + c, ws);
    free(ws);
}
/* out: y of the forward pass, then y recomputed over the residual (or into memory of its own): the same bits, also if
   the residual has a batch norm of its own, applied here or before. Statistics are the same where y is not wanted. */
static void norm_again(ckca_context *ctx, const void *args, float *out) {
    const norm *a = (const norm *)args;
    size_t n = a->rows * (size_t)a->c, c = (size_t)a->c, i;
    float *y = (float *)malloc((2 * n + 4 * c) * sizeof *y), *other = y + n + 4 * c;
    const ckca__norm saved = {y + n, y + n + c, a->gamma, a->beta, a->relu};
    const ckca__norm residuals = {a->running_mean, a->running_var, a->beta, a->gamma, !a->relu};
    void *ws = malloc(ckca__op_workspace(ctx, a->rows, a->c));
    norm_forward(ctx, args, y);
    memcpy(out, y, n * sizeof *out);
    if (a->residual) memcpy(out + n, a->residual, n * sizeof *out);
    ckca__op_batchnorm_recompute(ctx, 0, a->rows, a->c, a->x, &saved, a->residual ? out + n : NULL, NULL, out + n);
    for (i = 0; i < n && out[i] == out[n + i]; i++) {
    }
    CHECK(i == n, "%s: batch norm %dx%d recomputed differs at %d: %g, %g", ckca_device(ctx), (int)a->rows, a->c, (int)i,
          i < n ? (double)out[n + i] : 0.0, i < n ? (double)out[i] : 0.0);
    if (a->residual) {
        float *at_once = (float *)malloc((n + 4 * c) * sizeof *at_once), *stats = at_once + n;
        memcpy(stats + 2 * c, a->running_mean, c * sizeof *stats);
        memcpy(stats + 3 * c, a->running_var, c * sizeof *stats);
        ckca__op_batchnorm_forward(ctx, 0, a->rows, a->c, a->x, a->gamma, a->beta, stats + 2 * c, stats + 3 * c,
                                   a->residual, &residuals, a->relu, NULL, stats, stats + c, ws);
        CHECK(!memcmp(stats, y + n, 4 * c * sizeof *stats), "%s: batch norm %dx%d: statistics differ without y",
              ckca_device(ctx), (int)a->rows, a->c);
        ckca__op_batchnorm_recompute(ctx, 0, a->rows, a->c, a->residual, &residuals, NULL, NULL, other);
        ckca__op_batchnorm_recompute(ctx, 0, a->rows, a->c, a->x, &saved, other, NULL, other);
        ckca__op_batchnorm_forward(ctx, 0, a->rows, a->c, a->x, a->gamma, a->beta, stats + 2 * c, stats + 3 * c,
                                   a->residual, &residuals, a->relu, at_once, stats, stats + c, ws);
        CHECK(!memcmp(at_once, other, n * sizeof *other), "%s: batch norm %dx%d: forward with a normalised residual",
              ckca_device(ctx), (int)a->rows, a->c);
        memcpy(at_once, a->residual, n * sizeof *at_once);
        ckca__op_batchnorm_recompute(ctx, 0, a->rows, a->c, a->x, &saved, at_once, &residuals, at_once);
        CHECK(!memcmp(at_once, other, n * sizeof *other), "%s: batch norm %dx%d: recomputed with a normalised residual",
              ckca_device(ctx), (int)a->rows, a->c);
        free(at_once);
    }
    free(ws);
    free(y);
}

/* One channel at a time, two passes. */
static void norm_reference(size_t rows, int c, const double *x, const double *gamma, const double *beta,
                           const double *residual, int relu, double *y, double *mean, double *var) {
    size_t i, n = rows * (size_t)c;
    int j;
    for (j = 0; j < c; j++) {
        mean[j] = var[j] = 0;
        for (i = (size_t)j; i < n; i += (size_t)c) mean[j] += x[i] / (double)rows;
        for (i = (size_t)j; i < n; i += (size_t)c) var[j] += (x[i] - mean[j]) * (x[i] - mean[j]) / (double)rows;
        for (i = (size_t)j; i < n; i += (size_t)c) {
            y[i] = (x[i] - mean[j]) / sqrt(var[j] + 1e-5) * gamma[j] + beta[j] + (residual ? residual[i] : 0);
            if (relu && y[i] < 0) y[i] = 0;
        }
    }
}

/* sum dy y as a function of v = (x, gamma, beta, residual) */
static double norm_loss(const double *v, const void *args) {
    const norm *a = (const norm *)args;
    size_t n = a->rows * (size_t)a->c, c = (size_t)a->c, i;
    double *y = (double *)malloc((n + 2 * c) * sizeof *y), loss = 0;
    norm_reference(a->rows, a->c, v, v + n, v + n + c, a->residual ? v + n + 2 * c : NULL, a->relu, y, y + n,
                   y + n + c);
    for (i = 0; i < n; i++) loss += y[i] * a->dy[i];
    free(y);
    return loss;
}

static void test_norm_shape(size_t rows, int c, int with_residual, int relu, double x_mean) {
    size_t n = rows * (size_t)c, uc = (size_t)c, i, m;
    char what[120];
    float *x = make(n, x_mean - 2, x_mean + 2), *gamma = make(uc, 0.5, 1.5), *beta = make(uc, -0.5, 0.5);
    float *running_mean = make(uc, x_mean - 1, x_mean + 1), *running_var = make(uc, 0.5, 2), *dy = make(n, -1, 1);
    float *residual = make(n, -1, 1), *start = make(2 * uc, -1, 1);
    float *fy = (float *)malloc((n + 2 * uc) * sizeof *fy);
    double *expected = (double *)malloc((2 * n + 6 * uc) * sizeof *expected), *mean = expected + n, *var = mean + uc;
    double *dx = doubles(n, x), *dg = doubles(uc, gamma), *db = doubles(uc, beta), *dr = doubles(n, residual);
    /* A float near x_mean is off by half a digit of its own. */
    double tolerance = 2e-5 + fabs(x_mean) * 3e-7;
    int form;
    norm a;
    memset(&a, 0, sizeof a);
    a.rows = rows, a.c = c, a.relu = relu, a.x = x, a.gamma = gamma, a.beta = beta, a.dy = dy, a.start = start;
    a.running_mean = running_mean, a.running_var = running_var;
    a.residual = with_residual ? residual : NULL;

    norm_reference(rows, c, dx, dg, db, with_residual ? dr : NULL, relu, expected, mean, var);
    for (i = 0; i < uc; i++) {
        double unbiased = rows > 1 ? var[i] * (double)rows / (double)(rows - 1) : var[i];
        mean[2 * uc + i] = running_mean[i] + 0.1 * (mean[i] - running_mean[i]);
        mean[3 * uc + i] = running_var[i] + 0.1 * (unbiased - running_var[i]);
        var[i] = 1 / sqrt(var[i] + 1e-5);
        fy[n + i] = (float)mean[i];
        fy[n + uc + i] = (float)var[i];
    }
    snprintf(what, sizeof what, "batch norm forward %dx%d residual %d relu %d mean %g", (int)rows, c, with_residual,
             relu, x_mean);
    /* A single row has x - mean = 0 times 1 / sqrt(eps) = 316. */
    check_op(what, norm_forward, &a, n + 4 * uc, expected, rows == 1 ? tolerance * 30 : tolerance);
    {
        double *twice = (double *)malloc(2 * n * sizeof *twice);
        memcpy(twice, expected, n * sizeof *twice);
        memcpy(twice + n, expected, n * sizeof *twice);
        snprintf(what, sizeof what, "batch norm again %dx%d residual %d relu %d", (int)rows, c, with_residual, relu);
        check_op(what, norm_again, &a, 2 * n, twice, rows == 1 ? tolerance * 30 : tolerance);
        free(twice);
    }

    /* backward, from the reference's y, mean and inv_std; a second layout of expected: dx, (dresidual), dgamma, dbeta
     */
    for (i = 0; i < n; i++) fy[i] = (float)expected[i];
    a.mean = fy + n, a.inv_std = fy + n + uc;
    m = with_residual ? 2 * n : n;
    for (a.accumulate = 0; a.accumulate <= with_residual; a.accumulate++)
        for (form = 0; form < (relu && !with_residual ? 6 : 3); form++) {
            double *dgamma = expected + m, *dbeta = dgamma + uc;
            a.in_place = form % 3; /* 1: dx over dy, 2: dx over x and dresidual over dy */
            a.y = form < 3 ? fy : NULL;
            for (i = 0; i < uc; i++) dgamma[i] = dbeta[i] = 0;
            for (i = 0; i < n; i++) {
                size_t j = i % uc;
                double g = relu && !(fy[i] > 0) ? 0 : dy[i];
                dbeta[j] += g;
                dgamma[j] += g * ((double)x[i] - a.mean[j]) * a.inv_std[j];
            }
            for (i = 0; i < n; i++) {
                size_t j = i % uc;
                double g = relu && !(fy[i] > 0) ? 0 : dy[i], xhat = ((double)x[i] - a.mean[j]) * a.inv_std[j];
                expected[i] = gamma[j] * a.inv_std[j] * (g - dbeta[j] / (double)rows - xhat * dgamma[j] / (double)rows);
                if (with_residual) expected[n + i] = g + (a.accumulate ? residual[i] : 0);
            }
            for (i = 0; i < uc; i++) dgamma[i] += start[i], dbeta[i] += start[uc + i];
            snprintf(what, sizeof what,
                     "batch norm backward %dx%d residual %d relu %d accumulate %d in place %d y %d mean %g", (int)rows,
                     c, with_residual, relu, a.accumulate, a.in_place, a.y != NULL, x_mean);
            check_op(what, norm_backward, &a, m + 2 * uc, expected, rows == 1 ? 1e-3 : 1e-4);
        }

    for (i = 0; i < n; i++) {
        size_t j = i % uc;
        expected[i] = ((double)x[i] - running_mean[j]) / sqrt(running_var[j] + 1e-5) * gamma[j] + beta[j] +
                      (with_residual ? residual[i] : 0);
        if (relu && expected[i] < 0) expected[i] = 0;
    }
    snprintf(what, sizeof what, "batch norm eval %dx%d residual %d relu %d", (int)rows, c, with_residual, relu);
    check_op(what, norm_eval, &a, n, expected, tolerance);
    free(x), free(gamma), free(beta), free(running_mean), free(running_var), free(dy), free(residual), free(start);
    free(fy), free(expected), free(dx), free(dg), free(db), free(dr);
}

/* A smaller batch must fit where a greater one does. */
static void test_workspace(void) {
    static const int channels[] = {1, 3, 16, 100, 2048};
    size_t i, rows, most, bytes;
    for (i = 0; i < 5; i++)
        for (rows = 1, most = 0; rows < 20000; rows += 1 + rows / 50) {
            bytes = ckca__op_workspace(any, rows, channels[i]);
            CHECK(bytes >= most, "workspace of %d rows of %d is %d bytes, of fewer %d", (int)rows, channels[i],
                  (int)bytes, (int)most);
            most = bytes;
        }
}

static void test_norm(void) {
    static const int shapes[][2] = {{1, 5},    {2, 1},     {7, 3},     {50, 8},    {129, 10},   {1000, 16},
                                    {77, 100}, {33, 255},  {200, 64},  {20, 1030}, {130, 2048}, {70001, 1},
                                    {9001, 3}, {4000, 10}, {5000, 16}, {300, 513}, {8321, 130}};
    size_t s;
    int form;
    for (s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (form = 0; form < 4; form++) {
            if (form % 3 && shapes[s][0] > 4500) continue; /* big ones with neither or both of residual and ReLU */
            test_norm_shape((size_t)shapes[s][0], shapes[s][1], form & 1, form >> 1, 0);
        }
    test_norm_shape(3000, 3, 0, 0, 1000);
    test_norm_shape(3000, 64, 1, 1, -1000);
}

/* Variance to 1e-3 where the mean is 1000 standard deviations away, and where one row lies far from all others. */
static void test_norm_accuracy(void) {
    enum { ROWS = 20000, C = 3 };
    float *x = make(ROWS * C, 0, 1), *y = (float *)malloc(ROWS * C * sizeof *y);
    float one[C] = {1, 1, 1}, zero[C] = {0, 0, 0};
    int isa, kind, i, j;
    for (kind = 0; kind < 2; kind++) {
        double mean[C] = {0}, var[C] = {0};
        for (i = 0; i < ROWS * C; i++) {
            /* 12 x uniform variance 1/12 = 1 */
            x[i] = kind ? 0.01f * (float)ckca__uniform(5, 98, (uint64_t)i)
                        : (float)(1000 + sqrt(12) * (ckca__uniform(4, 98, (uint64_t)i) - 0.5));
            if (kind && i < C) x[i] = 1; /* 340 standard deviations off */
        }
        for (i = 0; i < ROWS * C; i++) mean[i % C] += (double)x[i] / ROWS;
        for (i = 0; i < ROWS * C; i++) var[i % C] += ((double)x[i] - mean[i % C]) * ((double)x[i] - mean[i % C]) / ROWS;
        for (isa = 0; isa < ISAS; isa++) {
            ckca_context *ctx = contexts[isa][1];
            float m[C], inv_std[C], rm[C] = {0}, rv[C] = {0};
            void *ws;
            if (!ctx) continue;
            ws = malloc(ckca__op_workspace(ctx, ROWS, C));
            ckca__op_batchnorm_forward(ctx, 0, ROWS, C, x, one, zero, rm, rv, NULL, NULL, 0, y, m, inv_std, ws);
            for (j = 0; j < C; j++) {
                double got = 1 / ((double)inv_std[j] * inv_std[j]) - 1e-5;
                CHECK(fabs(got - var[j]) < 1e-3 * var[j], "batch norm on %s: variance %.9g, is %.9g", isa_names[isa],
                      got, var[j]);
                CHECK(fabs(m[j] - mean[j]) < 1e-4 * sqrt(var[j]), "batch norm on %s: mean %.9g, is %.9g",
                      isa_names[isa], m[j], mean[j]);
            }
            free(ws);
        }
    }
    free(x), free(y);
}

static void test_norm_gradient(void) {
    enum { ROWS = 11, C = 5, N = ROWS * C, ALL = 2 * N + 2 * C };
    int residual, relu;
    for (residual = 0; residual < 2; residual++)
        for (relu = 0; relu < 2; relu++) {
            float *v = make(ALL, -2, 2), *dy = make(N, -1, 1), *zero = make(2 * C, 0, 0);
            float y[N + 4 * C], out[2 * N + 2 * C];
            double *at = doubles(ALL, v), *g, expected[ALL];
            norm a;
            int i;
            memset(&a, 0, sizeof a);
            a.rows = ROWS, a.c = C, a.relu = relu, a.x = v, a.gamma = v + N, a.beta = v + N + C, a.dy = dy;
            a.residual = residual ? v + N + 2 * C : NULL;
            a.start = zero, a.running_mean = zero, a.running_var = zero;
            g = central(norm_loss, residual ? ALL : N + 2 * C, at, &a);
            norm_forward(any, &a, y);
            a.y = y, a.mean = y + N, a.inv_std = y + N + C;
            norm_backward(any, &a, out);
            for (i = 0; i < N; i++) expected[i] = g[i];
            if (residual)
                for (i = 0; i < N; i++) expected[N + i] = g[N + 2 * C + i];
            for (i = 0; i < 2 * C; i++) expected[(residual ? 2 * N : N) + i] = g[N + i];
            CHECK(difference((residual ? 2 * N : N) + 2 * C, out, expected) < 2e-5,
                  "batch norm's gradient (residual %d, relu %d) is off the central differences by %.3g", residual, relu,
                  difference((residual ? 2 * N : N) + 2 * C, out, expected));
            free(v), free(dy), free(zero), free(at), free(g);
        }
}

/* A folded batch norm is the same as the batch norm: w x + bias, normalised. */
static void test_fold(void) {
    enum { K = 5, PER = 7 };
    float *w = make(K * PER, -1, 1), *bias = make(K, -1, 1), *gamma = make(K, 0.5, 1.5), *beta = make(K, -1, 1);
    float *mean = make(K, -1, 1), *var = make(K, 0.5, 2), *x = make(PER, -1, 1), w_out[K * PER], b_out[K];
    int with_bias, i, j;
    for (with_bias = 0; with_bias < 2; with_bias++) {
        ckca__op_fold(any, K, PER, w, with_bias ? bias : NULL, gamma, beta, mean, var, w_out, b_out);
        for (i = 0; i < K; i++) {
            double y = with_bias ? bias[i] : 0, folded = b_out[i];
            for (j = 0; j < PER; j++) y += (double)w[i * PER + j] * x[j], folded += (double)w_out[i * PER + j] * x[j];
            y = (y - mean[i]) / sqrt(var[i] + 1e-5) * gamma[i] + beta[i];
            CHECK(fabs(y - folded) < 1e-6, "fold (bias %d) channel %d: %.9g, expected %.9g", with_bias, i, folded, y);
        }
    }
    free(w), free(bias), free(gamma), free(beta), free(mean), free(var), free(x);
}

/* ---- element-wise, weights ---- */

typedef struct {
    size_t count;
    int flag, second; /* relu and whether b is there; accumulate and whether y is there; Nesterov */
    float lr, momentum, decay, gscale;
    const float *a, *b, *c;
} element;

static void element_add(ckca_context *ctx, const void *args, float *out) {
    const element *a = (const element *)args;
    ckca__op_add(ctx, 0, a->count, a->a, a->second ? a->b : NULL, a->flag, out);
}
static void element_add_backward(ckca_context *ctx, const void *args, float *out) {
    const element *a = (const element *)args;
    memcpy(out, a->c, a->count * sizeof *out);
    ckca__op_add_backward(ctx, 0, a->count, a->second ? a->a : NULL, a->b, out, a->flag);
}
static void element_sgd(ckca_context *ctx, const void *args, float *out) {
    const element *a = (const element *)args;
    int step;
    memcpy(out, a->a, a->count * sizeof *out);
    memset(out + a->count, 0, a->count * sizeof *out);
    for (step = 0; step < 3; step++)
        ckca__op_sgd(ctx, a->count, a->count / 2, out, step % 2 ? a->b : a->c, out + a->count, &a->lr, 1,
                     a->momentum, a->decay, a->flag, a->second ? &a->gscale : NULL);
}
static void element_clip(ckca_context *ctx, const void *args, float *out) {
    const element *a = (const element *)args;
    void *ws = malloc(ckca__op_workspace(ctx, a->count, 1));
    ckca__op_clip(ctx, a->count, a->a, a->lr, out, ws);
    free(ws);
}
static void element_shrink(ckca_context *ctx, const void *args, float *out) {
    const element *a = (const element *)args;
    memcpy(out, a->a, a->count * sizeof *out);
    ckca__op_shrink_perturb(ctx, a->count, out, a->b, a->lr, a->momentum);
}

/* EWC's penalty: a: the weights, b: the old ones, c: its F, above 0; lr: lambda. out: what it adds to ones, and the value
   times 3, added to 2. */
static void element_ewc(ckca_context *ctx, const void *args, float *out) {
    const element *a = (const element *)args;
    void *ws = malloc(ckca__op_workspace(ctx, a->count, 1));
    double sum = 2;
    size_t i;
    for (i = 0; i < a->count; i++) out[i] = 1;
    ckca__op_ewc(ctx, a->count, a->a, a->b, a->c, a->lr, out, 3, &sum, ws);
    out[a->count] = (float)sum;
    free(ws);
}
static double ewc_reference(const double *w, const void *args) {
    const element *a = (const element *)args;
    double sum = 0;
    size_t i;
    for (i = 0; i < a->count; i++) sum += a->c[i] * (w[i] - a->b[i]) * (w[i] - a->b[i]);
    return a->lr / 2 * sum;
}
static void element_squares(ckca_context *ctx, const void *args, float *out) {
    const element *a = (const element *)args;
    memcpy(out, a->c, a->count * sizeof *out);
    ckca__op_add_squares(ctx, a->count, a->a, a->lr, out);
}

static void test_ewc(void) {
    static const size_t counts[] = {1, 15, 1000, 32768, 100003};
    size_t s, i;
    for (s = 0; s < sizeof counts / sizeof *counts; s++) {
        const size_t n = counts[s];
        double *expected = (double *)calloc(n + 1, sizeof *expected), *w, *gradient;
        element a;
        memset(&a, 0, sizeof a);
        a.count = n, a.lr = 0.7f;
        a.a = make(n, -1, 1), a.b = make(n, -1, 1), a.c = make(n, 0, 2);
        w = doubles(n, a.a);
        for (i = 0; i < n; i++) expected[i] = 1 + (double)a.lr * a.c[i] * ((double)a.a[i] - a.b[i]);
        expected[n] = 2 + 3 * ewc_reference(w, &a);
        check_op("EWC's penalty", element_ewc, &a, n + 1, expected, 1e-6);
        if (n <= 1000) {
            gradient = central(ewc_reference, n, w, &a);
            for (i = 0; i < n; i++) expected[i] = 1 + gradient[i];
            check_op("EWC's penalty, by central differences", element_ewc, &a, n + 1, expected, 1e-4);
            free(gradient);
        }
        for (i = 0; i < n; i++) expected[i] = a.c[i] + (double)a.lr * a.a[i] * a.a[i];
        check_op("add squares", element_squares, &a, n, expected, 1e-6);
        free(expected), free(w), free((void *)a.a), free((void *)a.b), free((void *)a.c);
    }
}

static void test_elements(void) {
    static const size_t counts[] = {1, 15, 1000, 32768, 100003};
    size_t s, i;
    int form, step;
    for (s = 0; s < sizeof counts / sizeof *counts; s++)
        for (form = 0; form < 4; form++) {
            size_t n = counts[s];
            double *expected = (double *)calloc(2 * n, sizeof *expected), norm = 0;
            char what[80];
            element a;
            a.count = n, a.flag = form & 1, a.second = form >> 1;
            a.a = make(n, -1, 1), a.b = make(n, -1, 1), a.c = make(n, -1, 1);
            for (i = 0; i < n; i++) {
                expected[i] = (double)a.a[i] + (a.second ? a.b[i] : 0);
                if (a.flag && expected[i] < 0) expected[i] = 0;
            }
            snprintf(what, sizeof what, "add of %d, relu %d, b %d", (int)n, a.flag, a.second);
            check_op(what, element_add, &a, n, expected, 1e-7);

            for (i = 0; i < n; i++) {
                expected[i] = a.second && !(a.a[i] > 0) ? 0 : a.b[i];
                if (a.flag) expected[i] += a.c[i];
            }
            snprintf(what, sizeof what, "add backward of %d, accumulate %d, y %d", (int)n, a.flag, a.second);
            check_op(what, element_add_backward, &a, n, expected, 1e-7);

            a.lr = 0.1f, a.momentum = 0.9f, a.decay = 0.01f, a.gscale = 0.5f;
            for (i = 0; i < n; i++) {
                double w = a.a[i], v = 0;
                for (step = 0; step < 3; step++) {
                    double d = (step % 2 ? a.b : a.c)[i] * (a.second ? 0.5 : 1) + (i < n / 2 ? 0.01 * w : 0);
                    v = 0.9 * v + d;
                    w -= 0.1 * (a.flag ? d + 0.9 * v : v);
                }
                expected[i] = w, expected[n + i] = v;
            }
            snprintf(what, sizeof what, "sgd of %d, nesterov %d, gscale %d", (int)n, a.flag, a.second);
            check_op(what, element_sgd, &a, 2 * n, expected, 1e-6);

            for (i = 0; i < n; i++) norm += (double)a.a[i] * a.a[i];
            a.lr = form & 1 ? 0.3f : 1e6f;
            expected[0] = a.lr / (sqrt(norm) + 1e-6);
            if (expected[0] > 1) expected[0] = 1;
            snprintf(what, sizeof what, "clip of %d to %g", (int)n, a.lr);
            check_op(what, element_clip, &a, 1, expected, 1e-6);

            a.lr = 0.4f, a.momentum = 0.1f;
            for (i = 0; i < n; i++) expected[i] = (double)0.4f * a.a[i] + (double)0.1f * a.b[i];
            check_op("shrink and perturb", element_shrink, &a, n, expected, 1e-6);
            free(expected), free((void *)a.a), free((void *)a.b), free((void *)a.c);
        }
}

/* ReLU lets NaN through, so that a trainer sees it. */
static void test_nan_passes(void) {
    int isa, i;
    for (isa = 0; isa < ISAS; isa++) {
        float x[40], y[40], one = 1, zero = 0, large = 1e30f;
        void *ws;
        if (!contexts[isa][0]) continue;
        ws = malloc(ckca__op_workspace(contexts[isa][0], 40, 1));
        for (i = 0; i < 40; i++) x[i] = i == 3 || i == 37 ? NAN : -1.0f;
        ckca__op_add(contexts[isa][0], 0, 40, x, NULL, 1, y);
        CHECK(y[3] != y[3] && y[37] != y[37] && y[0] == 0, "relu on %s turns NaN into %g and %g", isa_names[isa], y[3],
              y[37]);
        ckca__op_batchnorm_eval(contexts[isa][0], 0, 40, 1, x, &one, &zero, &zero, &one, NULL, 1, y);
        CHECK(y[3] != y[3] && y[37] != y[37] && y[0] == 0, "batch norm's relu on %s turns NaN into %g and %g",
              isa_names[isa], y[3], y[37]);
        {
            float g[40] = {0};
            double sum = 0;
            ckca__op_ewc(contexts[isa][0], 40, x, y, x, 1, g, 1, &sum, ws);
            CHECK(g[3] != g[3] && g[37] != g[37] && g[0] == g[0] && sum != sum, "EWC on %s turns NaN into %g", isa_names[isa],
                  sum);
        }
        ckca__op_clip(contexts[isa][0], 40, x, 1, &large, ws);
        CHECK(large != large, "clip on %s makes %g of a NaN gradient", isa_names[isa], large);
        free(ws);
    }
}

static void test_device(void) {
    float in[3] = {1, 2, 3}, out[3] = {9, 9, 9};
    float *a = (float *)ckca__device_alloc(any, sizeof in), *b = (float *)ckca__device_alloc(any, sizeof in);
    CHECK(a && b && (uintptr_t)a % 64 == 0, "device memory is not aligned");
    ckca__device_upload(any, a, in, sizeof in);
    ckca__device_copy(any, b, a, sizeof in);
    ckca__device_download(any, out, b, sizeof in);
    CHECK(!memcmp(in, out, sizeof in), "device memory returns %g %g %g", out[0], out[1], out[2]);
    ckca__device_zero(any, b, sizeof in);
    ckca__device_download(any, out, b, sizeof in);
    CHECK(out[0] == 0 && out[2] == 0, "device_zero leaves %g", out[2]);
    ckca__device_release(any, a, sizeof in);
    ckca__device_release(any, b, sizeof in);
    CHECK(ckca__device_alloc(any, SIZE_MAX) == NULL, "device memory of SIZE_MAX bytes");
}

/* ---- pooling ---- */

typedef struct {
    ckca__conv s;
    int kind, accumulate; /* kind 0: max, 1: average, 2: subsample */
    const float *x, *dy;
    const unsigned char *at;
    size_t in, out;
} pool;

/* Max pooling of what a norm makes of x: the norm at once or before, to the same bits. */
static void pool_norm(ckca_context *ctx, const pool *a) {
    size_t c = (size_t)a->s.c, i;
    int different = 0;
    float *values = make(4 * c, 0.5, 1.5), *x = (float *)malloc(a->in * sizeof *x);
    float *y = (float *)malloc(2 * a->out * sizeof *y);
    unsigned char *at = (unsigned char *)malloc(2 * a->out);
    const ckca__norm norm = {values, values + c, values + 2 * c, values + 3 * c, a->s.n % 2};
    ckca__conv s = a->s;
    ckca__op_batchnorm_recompute(ctx, 0, a->in / c, a->s.c, a->x, &norm, NULL, NULL, x);
    ckca__op_maxpool_forward(ctx, &s, x, y, at);
    s.norm = &norm;
    ckca__op_maxpool_forward(ctx, &s, a->x, y + a->out, at + a->out);
    for (i = 0; i < a->out; i++) different += y[i] != y[i + a->out] || at[i] != at[i + a->out];
    CHECK(!different, "%s: max pooling of %d channels under a norm: %d of %d differ", ckca_device(ctx), a->s.c,
          different, (int)a->out);
    free(values), free(x), free(y), free(at);
}

static void pool_forward(ckca_context *ctx, const void *args, float *out) {
    const pool *a = (const pool *)args;
    unsigned char *at = ctx->threads == 1 ? NULL : (unsigned char *)malloc(a->out); /* evaluation wants no at */
    if (a->kind == 0) ckca__op_maxpool_forward(ctx, &a->s, a->x, out, at);
    if (a->kind == 0 && ckca__may_norm(ctx, &a->s)) pool_norm(ctx, a);
    if (a->kind == 1) ckca__op_avgpool_forward(ctx, 0, a->s.n, a->s.h * a->s.w, a->s.c, a->x, out);
    if (a->kind == 2) ckca__op_subsample_forward(ctx, &a->s, a->x, out);
    free(at);
}
static void pool_backward(ckca_context *ctx, const void *args, float *out) {
    const pool *a = (const pool *)args;
    memcpy(out, a->x, a->in * sizeof *out);
    if (a->kind == 0) ckca__op_maxpool_backward(ctx, &a->s, a->dy, a->at, out, a->accumulate);
    if (a->kind == 1) ckca__op_avgpool_backward(ctx, 0, a->s.n, a->s.h * a->s.w, a->s.c, a->dy, out, a->accumulate);
    if (a->kind == 2) ckca__op_subsample_backward(ctx, &a->s, a->dy, out, a->accumulate);
}

static double pixel(const ckca__conv *s, const double *x, int n, int h, int w, int c) {
    return h < 0 || w < 0 || h >= s->h || w >= s->w ? -INFINITY : x[((n * s->h + h) * s->w + w) * s->c + c];
}
static void pool_reference(const pool *a, const double *x, double *y) {
    const ckca__conv *s = &a->s;
    int n, p, q, k, i, j;
    for (n = 0; n < s->n; n++)
        for (p = 0; p < s->p; p++)
            for (q = 0; q < s->q; q++)
                for (k = 0; k < s->k; k++) {
                    double v = a->kind ? 0 : -INFINITY;
                    int c = k - (s->k - s->c) / 2;
                    for (i = 0; i < s->r && a->kind < 2; i++)
                        for (j = 0; j < s->s; j++) {
                            double from = pixel(s, x, n, p * s->stride - s->pad + i, q * s->stride - s->pad + j, k);
                            v = a->kind ? v + from / (s->h * s->w) : v > from ? v : from;
                        }
                    if (a->kind == 2) v = c < 0 || c >= s->c ? 0 : pixel(s, x, n, p * s->stride, q * s->stride, c);
                    *y++ = v;
                }
}
static double pool_loss(const double *x, const void *args) {
    const pool *a = (const pool *)args;
    double *y = (double *)malloc(a->out * sizeof *y), loss = 0;
    size_t i;
    pool_reference(a, x, y);
    for (i = 0; i < a->out; i++) loss += y[i] * a->dy[i];
    free(y);
    return loss;
}

static void test_pools(void) {
    /* kind, n, h, w, c, k, kernel, stride, pad */
    static const int shapes[][9] = {{0, 2, 9, 8, 5, 5, 3, 2, 1},   {0, 1, 7, 7, 16, 16, 2, 2, 0},
                                    {0, 3, 5, 6, 3, 3, 3, 1, 1},   {0, 1, 11, 4, 33, 33, 5, 3, 2},
                                    {0, 2, 3, 3, 70, 70, 1, 1, 0}, {1, 3, 5, 3, 7, 7, 0, 1, 0},
                                    {1, 2, 1, 1, 20, 20, 0, 1, 0}, {2, 2, 8, 6, 4, 8, 1, 2, 0},
                                    {2, 1, 7, 5, 3, 8, 1, 2, 0},   {2, 1, 5, 5, 2, 2, 1, 3, 0}};
    size_t t, i;
    for (t = 0; t < sizeof shapes / sizeof *shapes; t++) {
        const int *d = shapes[t];
        char what[100];
        pool a;
        double *x, *y, *g;
        unsigned char *at;
        memset(&a, 0, sizeof a);
        a.kind = d[0];
        a.s.n = d[1], a.s.h = d[2], a.s.w = d[3], a.s.c = d[4], a.s.k = d[5];
        a.s.r = a.kind == 1 ? a.s.h : d[6], a.s.s = a.kind == 1 ? a.s.w : d[6], a.s.stride = d[7], a.s.pad = d[8];
        a.s.p = (a.s.h + 2 * a.s.pad - a.s.r) / a.s.stride + 1, a.s.q = (a.s.w + 2 * a.s.pad - a.s.s) / a.s.stride + 1;
        a.in = (size_t)(a.s.n * a.s.h * a.s.w * a.s.c), a.out = (size_t)(a.s.n * a.s.p * a.s.q * a.s.k);
        a.x = make(a.in, -1, 1), a.dy = make(a.out, -1, 1);
        x = doubles(a.in, a.x), y = doubles(a.out, NULL);
        pool_reference(&a, x, y);
        snprintf(what, sizeof what, "pool %d of %dx%dx%d, kernel %d stride %d pad %d", d[0], d[2], d[3], d[4], d[6],
                 d[7], d[8]);
        check_op(what, pool_forward, &a, a.out, y, 1e-6);
        at = (unsigned char *)malloc(a.out);
        if (a.kind == 0) {
            float *out = make(a.out, 0, 0);
            ckca__op_maxpool_forward(any, &a.s, a.x, out, at);
            free(out);
        }
        a.at = at;
        g = central(pool_loss, a.in, x, &a);
        strcat(what, " backward");
        check_op(what, pool_backward, &a, a.in, g, 1e-6);
        for (i = 0; i < a.in; i++) g[i] += a.x[i];
        a.accumulate = 1;
        strcat(what, ", added");
        check_op(what, pool_backward, &a, a.in, g, 1e-6);
        free((void *)a.x), free((void *)a.dy), free(x), free(y), free(g), free(at);
    }
}

/* ---- group norm ---- */

typedef struct {
    int n, area, c, groups, accumulate;
    const float *x, *gamma, *beta, *dy, *statistics, *start;
} group_norm;

/* out: y, means, inv_std; with two threads y alone, as in evaluation. */
static void group_forward(ckca_context *ctx, const void *args, float *out) {
    const group_norm *a = (const group_norm *)args;
    const size_t count = (size_t)(a->n * a->area * a->c);
    ckca__op_groupnorm_forward(ctx, 0, a->n, a->area, a->c, a->groups, a->x, a->gamma, a->beta, out, out + count);
    if (ctx->threads == 2) {
        float *y = (float *)malloc(count * sizeof *y);
        ckca__op_groupnorm_forward(ctx, 0, a->n, a->area, a->c, a->groups, a->x, a->gamma, a->beta, y, NULL);
        CHECK(!memcmp(y, out, count * sizeof *y), "%s: group norm of %d channels: other bits in evaluation",
              ckca_device(ctx), a->c);
        free(y);
    }
}
/* out: dx, dgamma, dbeta; with two threads the latter also without dx. */
static void group_backward(ckca_context *ctx, const void *args, float *out) {
    const group_norm *a = (const group_norm *)args;
    const size_t count = (size_t)(a->n * a->area * a->c), c = (size_t)a->c;
    void *ws = malloc(2 * (size_t)a->n * c * sizeof(float));
    if (a->accumulate) memcpy(out, a->x, count * sizeof *out);
    memcpy(out + count, a->start, 2 * c * sizeof *out);
    ckca__op_groupnorm_backward(ctx, 0, a->n, a->area, a->c, a->groups, a->x, a->gamma, a->statistics, a->dy, out,
                                a->accumulate, out + count, out + count + c, ws);
    if (ctx->threads == 2) {
        float *d = (float *)malloc(2 * c * sizeof *d);
        memcpy(d, a->start, 2 * c * sizeof *d);
        ckca__op_groupnorm_backward(ctx, 0, a->n, a->area, a->c, a->groups, a->x, a->gamma, a->statistics, a->dy, NULL,
                                    0, d, d + c, ws);
        CHECK(!memcmp(d, out + count, 2 * c * sizeof *d), "%s: group norm of %d channels: other bits without dx",
              ckca_device(ctx), a->c);
        free(d);
    }
    free(ws);
}

/* y, then means and inv_std, one group at a time. v: x, gamma, beta. */
static void group_reference(const group_norm *a, const double *v, double *y) {
    const int per = a->c / a->groups, count = a->n * a->area * a->c;
    const double *gamma = v + count, *beta = gamma + a->c;
    int n, g, i, j;
    for (n = 0; n < a->n; n++)
        for (g = 0; g < a->groups; g++) {
            double mean = 0, var = 0;
#define AT ((n * a->area + i) * a->c + g * per + j)
#define EACH_OF_GROUP for (i = 0; i < a->area; i++) for (j = 0; j < per; j++)
            EACH_OF_GROUP mean += v[AT] / (a->area * per);
            EACH_OF_GROUP var += (v[AT] - mean) * (v[AT] - mean) / (a->area * per);
            EACH_OF_GROUP y[AT] = (v[AT] - mean) / sqrt(var + 1e-5) * gamma[g * per + j] + beta[g * per + j];
#undef AT
#undef EACH_OF_GROUP
            y[count + n * a->groups + g] = mean;
            y[count + (a->n + n) * a->groups + g] = 1 / sqrt(var + 1e-5);
        }
}
static double group_loss(const double *v, const void *args) {
    const group_norm *a = (const group_norm *)args;
    const int count = a->n * a->area * a->c;
    double *y = (double *)malloc((size_t)(count + 2 * a->n * a->groups) * sizeof *y), loss = 0;
    int i;
    group_reference(a, v, y);
    for (i = 0; i < count; i++) loss += y[i] * a->dy[i];
    free(y);
    return loss;
}

static void test_group_norm(void) {
    static const int shapes[][4] = {{2, 12, 6, 3}, {1, 5, 8, 2},    {3, 35, 16, 16}, {2, 20, 5, 1},
                                    {2, 9, 26, 2}, {1, 300, 7, 7},  {4, 1, 12, 3},   {40, 16, 32, 8}};
    size_t t, i, j;
    for (t = 0; t < sizeof shapes / sizeof *shapes; t++) {
        const int *d = shapes[t];
        const size_t count = (size_t)(d[0] * d[1] * d[2]), c = (size_t)d[2], groups = (size_t)(d[0] * d[3]);
        char what[100];
        group_norm a;
        double *v = (double *)malloc((count + 2 * c) * sizeof *v), *g;
        double *y = (double *)malloc((count + 2 * groups) * sizeof *y);
        float *x = make(count, t % 2 ? 99 : -2, t % 2 ? 103 : 2), *gamma = make(c, 0.5, 1.5), *beta = make(c, -1, 1);
        float *dy = make(count, -1, 1), *start = make(2 * c, -1, 1), *statistics = make(2 * groups, 0, 0);
        memset(&a, 0, sizeof a);
        a.n = d[0], a.area = d[1], a.c = d[2], a.groups = d[3];
        a.x = x, a.gamma = gamma, a.beta = beta, a.dy = dy, a.start = start, a.statistics = statistics;
        for (i = 0; i < count; i++) v[i] = x[i];
        for (i = 0; i < c; i++) v[count + i] = gamma[i], v[count + c + i] = beta[i];
        group_reference(&a, v, y);
        for (i = 0; i < 2 * groups; i++) statistics[i] = (float)y[count + i];
        snprintf(what, sizeof what, "group norm of %d x %d x %d in %d groups", d[0], d[1], d[2], d[3]);
        check_op(what, group_forward, &a, count + 2 * groups, y, t % 2 ? 3e-5 : 3e-6);
        g = doubles(count + 2 * c, NULL);
        for (i = 0; i < 2 * c; i++) g[count + i] = start[i];
        for (i = 0; i < (size_t)a.n; i++) { /* picture by picture: one does not depend on another */
            const size_t size = count / (size_t)a.n;
            double *one = (double *)malloc((size + 2 * c) * sizeof *one), *of_one;
            group_norm picture = a;
            picture.n = 1;
            picture.dy = dy + i * size;
            memcpy(one, v + i * size, size * sizeof *one);
            memcpy(one + size, v + count, 2 * c * sizeof *one);
            of_one = central(group_loss, size + 2 * c, one, &picture);
            memcpy(g + i * size, of_one, size * sizeof *g);
            for (j = 0; j < 2 * c; j++) g[count + j] += of_one[size + j];
            free(one), free(of_one);
        }
        strcat(what, " backward");
        check_op(what, group_backward, &a, count + 2 * c, g, t % 2 ? 2e-4 : 2e-5);
        for (i = 0; i < count; i++) g[i] += x[i];
        a.accumulate = 1;
        strcat(what, ", added");
        check_op(what, group_backward, &a, count + 2 * c, g, t % 2 ? 2e-4 : 2e-5);
        free(v), free(g), free(y), free(x), free(gamma), free(beta), free(dy), free(start), free(statistics);
    }
}

/* The first of equals wins; NaN wins over all, wherever it is; -inf is a value like any other. */
static void test_maxpool_edges(void) {
    enum { C = 21 };
    static const ckca__conv s = {1, 2, 2, C, C, 2, 2, 2, 0, 1, 1, NULL, 0, 0, NULL, NULL, 0};
    int isa, i, where;
    for (isa = 0; isa < ISAS; isa++) {
        float x[4 * C], y[C], dx[4 * C], one[C];
        unsigned char at[C];
        if (!contexts[isa][0]) continue;
        for (where = -2; where < 4; where++) { /* -2: all -inf, -1: all equal, 0..3: NaN there */
            int wrong = 0, first = where < 0 ? 0 : where;
            for (i = 0; i < 4 * C; i++) x[i] = where == -2 ? -INFINITY : i / C == where ? NAN : 2;
            for (i = 0; i < C; i++) one[i] = 1;
            ckca__op_maxpool_forward(contexts[isa][0], &s, x, y, at);
            ckca__op_maxpool_backward(contexts[isa][0], &s, one, at, dx, 0);
            for (i = 0; i < C; i++) wrong += at[i] != first || (where < 0 ? y[i] != x[0] : y[i] == y[i]);
            for (i = 0; i < 4 * C; i++) wrong += dx[i] != (i / C == first);
            CHECK(!wrong, "max pooling on %s, case %d: %d of %d outputs, winners and gradients are wrong",
                  isa_names[isa], where, wrong, 6 * C);
        }
    }
}

/* ---- losses ---- */

typedef struct {
    int form, n, k, accumulate; /* form: -1: cross-entropy, 0: AdaKD, 1: AdaKD with class weights */
    float smoothing, temperature, scale;
    const float *z, *zo, *class_weight, *start;
    const int *labels;
    size_t count; /* n k */
} loss_args;

/* log(sum(exp(z / t))) */
static double lse(int k, const double *z, double t) {
    double most = z[0], sum = 0;
    int j;
    for (j = 0; j < k; j++) most = z[j] > most ? z[j] : most;
    for (j = 0; j < k; j++) sum += exp((z[j] - most) / t);
    return most / t + log(sum);
}

/* The terms of the n pictures (NULL: none wanted); returns their mean. */
static double class_loss(const loss_args *a, const double *z, double *each) {
    double sum = 0, t = a->temperature, *zo = doubles(a->count, a->zo);
    int i, j, k = a->k;
    for (i = 0; i < a->n; i++) {
        double loss = 0, lse_s = lse(k, z + i * k, a->form < 0 ? 1 : t),
               lse_o = a->form < 0 ? 0 : lse(k, zo + i * k, t);
        for (j = 0; j < k; j++) {
            if (a->form < 0) {
                double target = (j == a->labels[i] ? 1.0 - a->smoothing : 0) + (double)a->smoothing / k;
                loss -= target * (z[i * k + j] - lse_s);
            } else {
                double log_o = zo[i * k + j] / t - lse_o, log_s = z[i * k + j] / t - lse_s;
                loss += t * t * exp(log_o) * (log_o - log_s) * (a->form ? a->class_weight[a->labels[i]] : 1);
            }
        }
        if (each) each[i] = loss;
        sum += loss;
    }
    free(zo);
    return sum / a->n;
}
static double class_loss_mean(const double *z, const void *args) {
    return class_loss((const loss_args *)args, z, NULL);
}
/* out: dz, loss, for cross-entropy also hit */
static void class_run(ckca_context *ctx, const void *args, float *out) {
    const loss_args *a = (const loss_args *)args;
    int i, *hit = (int *)malloc((size_t)a->n * sizeof *hit);
    if (a->form < 0) {
        ckca__op_cross_entropy(ctx, a->n, a->k, a->z, a->labels, a->smoothing, a->scale, out, out + a->count, hit);
        for (i = 0; i < a->n; i++) out[a->count + (size_t)(a->n + i)] = (float)hit[i];
    } else {
        memcpy(out, a->start, a->count * sizeof *out);
        ckca__op_adakd(ctx, a->n, a->k, a->z, a->zo, a->form ? a->labels : NULL, a->form ? a->class_weight : NULL,
                       a->temperature, a->scale, out, out + a->count);
    }
    free(hit);
}

static void test_class_losses(void) {
    static const int shapes[][2] = {{1, 2}, {5, 3}, {7, 10}, {3, 101}};
    size_t s, i;
    int form, smooth;
    for (s = 0; s < 4; s++)
        for (form = -1; form < 2; form++)
            for (smooth = 0; smooth < 2; smooth++) {
                loss_args a;
                double *z, *g, *expected;
                int *labels, j;
                char what[80];
                a.form = form, a.n = shapes[s][0], a.k = shapes[s][1], a.count = (size_t)(a.n * a.k);
                a.smoothing = smooth ? 0.1f : 0, a.temperature = smooth ? 2 : 1, a.scale = 1.5f;
                a.z = make(a.count, -4, 4), a.zo = make(a.count, -4, 4), a.class_weight = make((size_t)a.k, 0, 1);
                a.start = make(a.count, -1, 1);
                labels = (int *)malloc((size_t)a.n * sizeof *labels);
                for (j = 0; j < a.n; j++) labels[j] = (int)(ckca__random(s, 97, (uint64_t)j) % (uint64_t)a.k);
                a.labels = labels;
                z = doubles(a.count, a.z);
                g = central(class_loss_mean, a.count, z, &a);
                expected = doubles(a.count + 2 * (size_t)a.n, NULL);
                for (i = 0; i < a.count; i++) expected[i] = (form < 0 ? 0 : a.start[i]) + a.scale * g[i];
                class_loss(&a, z, expected + a.count);
                for (j = 0; j < a.n && form < 0; j++) {
                    int rank = 0, m;
                    for (m = 0; m < a.k; m++) rank += z[j * a.k + m] > z[j * a.k + labels[j]];
                    expected[a.count + (size_t)(a.n + j)] = (rank < 1) + 2 * (rank < 5);
                }
                snprintf(what, sizeof what, form < 0 ? "cross-entropy (%d) of %dx%d, %d" : "AdaKD form %d of %dx%d, %d",
                         form, a.n, a.k, smooth);
                check_op(what, class_run, &a, a.count + (size_t)(form < 0 ? 2 * a.n : a.n), expected, 2e-6);
                free((void *)a.z), free((void *)a.zo), free((void *)a.class_weight), free((void *)a.start);
                free(labels), free(z), free(g), free(expected);
            }
}

static void test_class_edges(void) {
    float z[6] = {1e4f, -1e4f, 0, 0, 0, 0}, dz[6], loss[2], p[6];
    int labels[2] = {1, 2}, hit[2], i, bad;
    ckca__op_cross_entropy(any, 2, 3, z, labels, 0, 1, dz, loss, hit);
    CHECK(loss[0] == 2e4f && fabs(loss[1] - log(3)) < 1e-6, "cross-entropy of 2e4 apart is %g, of equals %g", loss[0],
          loss[1]);
    CHECK(hit[0] == 2 && hit[1] == 2, "the lowest index of equals must be the arg max: hits %d %d", hit[0], hit[1]);
    labels[1] = 0;
    ckca__op_cross_entropy(any, 2, 3, z, labels, 0, 1, NULL, loss, hit);
    CHECK(hit[1] == 3, "label 0 of equals: hit %d", hit[1]);
    ckca__op_softmax(any, 2, 3, z, p);
    CHECK(p[0] == 1 && p[1] == 0 && fabs(p[3] - 1.0 / 3) < 1e-7, "softmax gives %g %g %g", p[0], p[1], p[3]);
    for (bad = 0; bad < 2; bad++)
        for (i = 0; i < 3; i++) { /* not a number at, before and after the label; overflowed logits */
            float row[3] = {0, 1, 2};
            int label = 1;
            row[i] = bad ? INFINITY : NAN;
            ckca__op_cross_entropy(any, 1, 3, row, &label, 0, 1, dz, loss, hit);
            CHECK(loss[0] != loss[0] && hit[0] == 0, "logit %d is %g: loss %g, hit %d", i, row[i], loss[0], hit[0]);
            memset(dz, 0, sizeof dz);
            ckca__op_adakd(any, 1, 3, row, z + 3, NULL, NULL, 2, 1, dz, loss);
            CHECK(loss[0] != loss[0], "logit %d is %g: AdaKD %g", i, row[i], loss[0]);
        }
    {
        float values[3] = {1, 1e-9f, 2};
        double sum = 5;
        ckca__op_sum(any, 3, values, &sum);
        CHECK(fabs(sum - (8 + 1e-9)) < 1e-13, "sum is %.17g", sum);
    }
}

/* The terms of FeatReg for f (n x k) against a->zo (n x k). */
static double cosine_of(int d, const double *a, const double *b) {
    double ab = 0, aa = 0, bb = 0;
    int j;
    for (j = 0; j < d; j++) ab += a[j] * b[j], aa += a[j] * a[j], bb += b[j] * b[j];
    return aa > 0 && bb > 0 ? ab / sqrt(aa * bb) : 0;
}
static double feature_loss(const loss_args *a, const double *f, double *each) {
    double *fo = doubles(a->count, a->zo), sum = 0;
    int i, j, absent;
    for (i = 0; i < a->n; i++) {
        double loss = 1 - cosine_of(a->k, f + i * a->k, fo + i * a->k);
        for (absent = 1, j = 0; j < a->k; j++) absent = absent && fo[i * a->k + j] == 0;
        if (absent) loss = a->smoothing; /* of_zero */
        if (each) each[i] = loss;
        sum += loss;
    }
    free(fo);
    return sum / a->n;
}
static double feature_loss_mean(const double *f, const void *args) {
    return feature_loss((const loss_args *)args, f, NULL);
}
static void feature_run(ckca_context *ctx, const void *args, float *out) {
    const loss_args *a = (const loss_args *)args;
    if (a->accumulate) memcpy(out, a->start, a->count * sizeof *out);
    ckca__op_featreg(ctx, 0, 0, a->n, a->k, a->z, a->zo, a->scale, out, a->accumulate, a->smoothing, out + a->count);
}

static void test_features(void) {
    static const int shapes[][2] = {{1, 5}, {2, 1}, {6, 17}, {9, 64}, {300, 3}, {2, 9003}};
    size_t s, i;
    int form, accumulate;
    for (s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (form = 0; form < 2; form++) /* 1: as CENTROID calls it: the last row of the teacher's is a class without mean */
            for (accumulate = 0; accumulate < 2; accumulate++) {
                loss_args a;
                double *f, *g, *expected;
                char what[80];
                if (shapes[s][0] == 300 && accumulate) continue; /* central differences of these take long */
                a.form = form, a.n = shapes[s][0], a.k = shapes[s][1], a.count = (size_t)(a.n * a.k);
                a.accumulate = accumulate, a.scale = 2.5f, a.smoothing = form ? 0 : 1;
                a.z = make(a.count, -1, 1), a.zo = make(a.count, -1, 1),
                a.start = make(a.count, -1, 1);
                if (a.n == 9)
                    memset((void *)a.z, 0, (size_t)a.k * sizeof(float)); /* a zero vector: cosine 0, no gradient */
                if (form) memset((void *)(a.zo + a.count - (size_t)a.k), 0, (size_t)a.k * sizeof(float));
                f = doubles(a.count, a.z);
                expected = doubles(a.count + (size_t)a.n, NULL);
                if (a.n < 300 && a.k < 9000) {
                    g = central(feature_loss_mean, a.count, f, &a);
                    if (a.n == 9) memset(g, 0, (size_t)a.k * sizeof *g);
                } else { /* only one value in so many */
                    double one = 1e-5;
                    g = doubles(a.count, NULL);
                    for (i = 0; i < a.count; i += a.count / 7) {
                        double up, down;
                        f[i] += one, up = feature_loss(&a, f, NULL), f[i] -= 2 * one, down = feature_loss(&a, f, NULL);
                        f[i] += one, g[i] = (up - down) / (2 * one);
                    }
                }
                if (a.n < 300 && a.k < 9000)
                    for (i = 0; i < a.count; i++) expected[i] = (accumulate ? a.start[i] : 0) + a.scale * g[i];
                else {
                    float *out = (float *)malloc((a.count + (size_t)a.n) * sizeof *out);
                    feature_run(any, &a, out);
                    for (i = 0; i < a.count; i++) expected[i] = out[i];
                    for (i = 0; i < a.count; i += a.count / 7) {
                        expected[i] = (accumulate ? a.start[i] : 0) + a.scale * g[i];
                        CHECK(fabs(out[i] - expected[i]) < 1e-6,
                              "FeatReg form %d of %dx%d: gradient %zu is %g, expected %g", form, a.n, a.k, i, out[i],
                              expected[i]);
                    }
                    free(out);
                }
                feature_loss(&a, f, expected + a.count);
                snprintf(what, sizeof what, "FeatReg form %d of %dx%d, accumulate %d", form, a.n, a.k, accumulate);
                check_op(what, feature_run, &a, a.count + (size_t)a.n, expected, 1e-5);
                free((void *)a.z), free((void *)a.zo), free((void *)a.start), free(f), free(g), free(expected);
            }
}

/* ---- pictures ---- */

typedef struct {
    int n, h, w, c, epoch;
    const unsigned char *pixels;
    const int *index;
    const ckca_augment *augment;
    uint64_t seed;
    const float *mean, *std;
} batch;
static void batch_run(ckca_context *ctx, const void *args, float *out) {
    const batch *a = (const batch *)args;
    const size_t size = (size_t)(a->h * a->w * a->c), all = (size_t)a->n * size;
    unsigned char *pixels = (unsigned char *)malloc(all);
    float *gathered = (float *)malloc(all * sizeof *gathered);
    int i;
    for (i = 0; i < a->n; i++) memcpy(pixels + (size_t)i * size, a->pixels + (size_t)a->index[i] * size, size);
    ckca__op_batch(ctx, a->n, a->h, a->w, a->c, pixels, 1, a->index, a->augment, a->seed, &a->epoch, a->mean, a->std,
                   gathered);
    ckca__op_batch(ctx, a->n, a->h, a->w, a->c, a->pixels, 0, a->index, a->augment, a->seed, &a->epoch, a->mean,
                   a->std, out);
    CHECK(!memcmp(out, gathered, all * sizeof *out), "%s: a batch of gathered pictures differs", ckca_device(ctx));
    free(pixels);
    free(gathered);
}

/* A second telling of what augmentation does with the draws that ckca__augment_framing made. */
static double byte_at(const batch *a, int picture, int y, int x, int c) {
    return y < 0 || x < 0 || y >= a->h || x >= a->w ? 0 : a->pixels[((picture * a->h + y) * a->w + x) * a->c + c];
}
static double limit(double v, double low, double high) { return v < low ? low : v > high ? high : v; }
static double grey_of(int c, const double *v) { return c == 3 ? 0.2989 * v[0] + 0.587 * v[1] + 0.114 * v[2] : v[0]; }
static void batch_reference(const batch *a, double *out) {
    int i, y, x, c, area = a->h * a->w;
    for (i = 0; i < a->n; i++, out += area * a->c) {
        ckca__framing f;
        double mean = 0;
        ckca__augment_framing(a->augment, a->seed, a->epoch, a->index[i], a->h, a->w, &f);
        for (y = 0; y < a->h; y++)
            for (x = 0; x < a->w; x++)
                for (c = 0; c < a->c; c++) {
                    int mirrored = f.flip ? a->w - 1 - x : x;
                    /* bilinear: the value at (v, u) of the framed rectangle, edges repeated */
                    double v = limit((y + 0.5) * f.height / a->h - 0.5, 0, f.height - 1);
                    double u = limit((mirrored + 0.5) * f.width / a->w - 0.5, 0, f.width - 1), sum = 0;
                    int p, q;
                    for (p = (int)v; p <= (int)v + 1; p++)
                        for (q = (int)u; q <= (int)u + 1; q++)
                            sum += (1 - fabs(v - p)) * (1 - fabs(u - q)) *
                                   byte_at(a, a->index[i], f.top + p, f.left + q, c);
                    out[(y * a->w + x) * a->c + c] = limit(sum * f.brightness, 0, 255);
                }
        for (x = 0; x < area; x++) mean += grey_of(a->c, out + x * a->c) / area;
        for (x = 0; x < area * a->c; x++) out[x] = limit(f.contrast * out[x] + (1 - f.contrast) * mean, 0, 255);
        for (x = 0; x < area; x++) {
            double grey = grey_of(a->c, out + x * a->c);
            for (c = 0; c < a->c; c++) {
                double *v = out + x * a->c + c;
                if (a->c == 3) *v = limit(f.saturation * *v + (1 - f.saturation) * grey, 0, 255);
                *v = (*v / 255 - a->mean[c]) / a->std[c];
            }
        }
    }
}

static void test_batch(void) {
    enum { STORE = 12, H = 9, W = 7 };
    static const float mean[5] = {0.5f, 0.4f, 0.3f, 0.1f, 0}, std[5] = {0.2f, 0.25f, 0.3f, 1, 0.7f};
    static const int index[6] = {3, 11, 0, 3, 7, 5};
    unsigned char pixels[STORE * H * W * 5];
    ckca_augment augments[7];
    int i, c, k;
    memset(augments, 0, sizeof augments);
    augments[1].pad = 2, augments[1].flip = 1;
    augments[2].resized_crop = 1, augments[2].flip = 1;
    augments[3].jitter = 0.4f;
    augments[4].resized_crop = 1, augments[4].crop_min = 0.05f, augments[4].jitter = 0.9f, augments[4].flip = 1;
    augments[5].pad = INT_MAX, augments[5].jitter = 1e9f; /* nonsense must do no harm */
    augments[6].resized_crop = 1, augments[6].crop_min = NAN, augments[6].jitter = NAN;
    for (i = 0; i < (int)sizeof pixels; i++) pixels[i] = (unsigned char)ckca__random(1, 96, (uint64_t)i);
    for (c = 1; c <= 5; c++)
        for (k = -1; k < 7; k++) {
            size_t count = (size_t)(6 * H * W * c);
            double *expected = doubles(count, NULL);
            char what[60];
            batch a;
            a.n = 6, a.h = H, a.w = W, a.c = c, a.epoch = 4, a.seed = 9, a.pixels = pixels, a.index = index;
            a.augment = k < 0 ? NULL : augments + k, a.mean = mean, a.std = std;
            batch_reference(&a, expected);
            snprintf(what, sizeof what, "batch of %d channels, augmentation %d", c, k);
            check_op(what, batch_run, &a, count, expected, 5e-6);
            free(expected);
        }
    { /* a pure function: picture 3 is at positions 0 and 3; alone; in another epoch, with another seed */
        enum { SIZE = H * W * 3 };
        float first[6 * SIZE], other[SIZE];
        batch a;
        a.n = 6, a.h = H, a.w = W, a.c = 3, a.epoch = 4, a.seed = 9, a.pixels = pixels, a.index = index;
        a.augment = augments + 4, a.mean = mean, a.std = std;
        batch_run(any, &a, first);
        CHECK(!memcmp(first, first + 3 * SIZE, SIZE * sizeof(float)),
              "a picture's augmentation depends on its position");
        a.n = 1;
        batch_run(any, &a, other);
        CHECK(!memcmp(first, other, SIZE * sizeof(float)), "a picture's augmentation depends on the batch");
        a.epoch = 5;
        batch_run(any, &a, other);
        CHECK(memcmp(first, other, SIZE * sizeof(float)), "epochs 4 and 5 augment alike");
        a.epoch = 4, a.seed = 10;
        batch_run(any, &a, other);
        CHECK(memcmp(first, other, SIZE * sizeof(float)), "seeds 9 and 10 augment alike");
    }
}

/* What is drawn over 4000 pictures: half are flipped, every crop comes up about as often, areas and aspects keep to
   their bounds, factors too. */
static void test_draws(void) {
    enum { N = 4000, PAD = 2, SIDE = 2 * PAD + 1 };
    int i, flips = 0, outside = 0, seen[SIDE * SIDE] = {0}, least = N, most = 0;
    double mean_area = 0, mean_aspect = 0, low_factor = 9, high_factor = -9, together = 0;
    ckca_augment pad = {0}, crop = {0};
    pad.pad = PAD, pad.flip = 1, pad.jitter = 0.3f;
    crop.resized_crop = 1;
    for (i = 0; i < N; i++) {
        ckca__framing f;
        ckca__augment_framing(&pad, 1, 2, i, 32, 32, &f);
        flips += f.flip;
        if (f.top < -PAD || f.top > PAD || f.left < -PAD || f.left > PAD || f.height != 32 || f.width != 32) outside++;
        else seen[(f.top + PAD) * SIDE + f.left + PAD]++;
        low_factor = fmin(low_factor, fmin(f.brightness, fmin(f.contrast, f.saturation)));
        high_factor = fmax(high_factor, fmax(f.brightness, fmax(f.contrast, f.saturation)));
        together += (f.brightness - 1) * (f.contrast - 1) / (0.09 / 3) / N;
        ckca__augment_framing(&crop, 1, 2, i, 40, 60, &f);
        if (f.top < 0 || f.left < 0 || f.top + f.height > 40 || f.left + f.width > 60) outside++;
        mean_area += (double)f.height * f.width / (40 * 60) / N;
        mean_aspect += log((double)f.width / f.height) / N;
        if (f.height * f.width < 0.22 * 40 * 60 || (double)f.width / f.height < 0.7 || (double)f.width / f.height > 1.4)
            outside++; /* rounding to pixels takes a little off */
    }
    for (i = 0; i < SIDE * SIDE; i++) least = seen[i] < least ? seen[i] : least, most = seen[i] > most ? seen[i] : most;
    CHECK(abs(flips - N / 2) < 160, "%d of %d flipped", flips, N); /* 5 standard deviations */
    CHECK(outside == 0, "%d crops out of bounds", outside);
    CHECK(least > 100 && most < 230, "crops come up %d to %d times, 160 expected", least, most);
    CHECK(low_factor > 0.7 - 1e-6 && low_factor < 0.705 && high_factor < 1.3 + 1e-6 && high_factor > 1.295,
          "jitter factors from %g to %g", low_factor, high_factor);
    CHECK(fabs(together) < 0.08, "brightness and contrast are correlated: %g", together);
    /* torchvision 0.29's RandomResizedCrop.get_params on 8000 pictures of this size: 0.4868 and 0.0436 */
    CHECK(fabs(mean_area - 0.487) < 0.015 && fabs(mean_aspect - 0.044) < 0.02, "mean area %g, mean log aspect %g",
          mean_area, mean_aspect);
    { /* no crop of allowed aspect fits in a 2 x 50 picture at full area: the fallback is centred */
        ckca__framing f;
        crop.crop_min = 1;
        ckca__augment_framing(&crop, 1, 2, 3, 2, 50, &f);
        CHECK(f.height == 2 && f.width == 3 && f.left == 23 && f.top == 0, "fallback crop is %dx%d at %d,%d", f.height,
              f.width, f.top, f.left);
        ckca__augment_framing(&crop, 1, 2, 3, 50, 2, &f);
        CHECK(f.height == 3 && f.width == 2 && f.left == 0 && f.top == 23, "fallback crop is %dx%d at %d,%d", f.height,
              f.width, f.top, f.left);
        ckca__augment_framing(&crop, 1, 2, 3, 1, 1, &f);
        CHECK(f.height == 1 && f.width == 1 && f.left == 0 && f.top == 0, "crop of one pixel is %dx%d", f.height,
              f.width);
    }
    for (i = 0; i < 200; i++) { /* what no descriptor should hold does no harm */
        ckca__framing f, g;
        pad.pad = INT_MAX;
        ckca__augment_framing(&pad, 1, 2, i, 5, 9, &f);
        CHECK(abs(f.top) <= 5 && abs(f.left) <= 9, "a pad of INT_MAX crops at %d,%d", f.top, f.left);
        crop.crop_min = 7;
        ckca__augment_framing(&crop, 1, 2, i, 9, 9, &f);
        crop.crop_min = 1;
        ckca__augment_framing(&crop, 1, 2, i, 9, 9, &g);
        CHECK(!memcmp(&f, &g, sizeof f), "a crop_min of 7 is not taken for 1: %dx%d", f.height, f.width);
    }
}

/* ---- PyTorch ---- */

static char *file;
static size_t file_size;

/* The values of a tensor of the safetensors file: an 8-byte length, a JSON header, the data. count may be NULL. */
static const float *torch(const char *name, size_t *count) {
    char key[80];
    const char *at;
    unsigned long long begin, end;
    uint64_t header;
    memcpy(&header, file, 8);
    snprintf(key, sizeof key, "\"%s\":{", name);
    at = strstr(file + 8, key);
    if (at) at = strstr(at, "\"data_offsets\":[");
    if (!at || sscanf(at + 16, "%llu,%llu", &begin, &end) != 2 || 8 + header + end > file_size) {
        CHECK(0, "ops.safetensors has no %s", name);
        exit(test_summary());
    }
    if (count) *count = (size_t)(end - begin) / 4;
    return (const float *)(const void *)(file + 8 + header + begin);
}
static void check_torch(const char *name, const float *got, double tolerance) {
    size_t count;
    const float *expected = torch(name, &count);
    double *d = doubles(count, expected), off = difference(count, got, d);
    CHECK(off <= tolerance, "%s is off PyTorch's by %.3g, allowed %.3g", name, off, tolerance);
    free(d);
}
static void check_torch_mean(const char *name, int n, const float *loss) {
    double sum = 0;
    float mean;
    ckca__op_sum(any, n, loss, &sum);
    mean = (float)(sum / n);
    check_torch(name, &mean, 2e-6);
}
static const float *tensor(const char *base, const char *what) {
    char name[80];
    snprintf(name, sizeof name, "%s.%s", base, what);
    return torch(name, NULL);
}
static void check_part(const char *base, const char *what, const float *got, double tolerance) {
    char name[80];
    snprintf(name, sizeof name, "%s.%s", base, what);
    check_torch(name, got, tolerance);
}

static void test_torch(const char *path) {
    static const int convs[][3] = {{3, 1, 1}, {3, 2, 1}, {1, 1, 0}, {1, 2, 0}, {7, 2, 3}};
    FILE *f = fopen(path, "rb");
    size_t i;
    int j, form;
    float *out = make(4096, 0, 0), *grad = make(4096, 0, 0), *dw = make(4096, 0, 0);
    float *loss = make(64, 0, 0);
    unsigned char at[4096];
    void *ws;
    CHECK(f != NULL, "cannot open %s", path);
    if (!f) return;
    fseek(f, 0, SEEK_END);
    file_size = (size_t)ftell(f);
    rewind(f);
    file = (char *)calloc(file_size + 1, 1);
    if (fread(file, 1, file_size, f) != file_size) file_size = 0;
    fclose(f);
    for (i = 0; i < 5; i++) {
        ckca__conv s = {2, 9, 8, 3, 5, 0, 0, 0, 0, 0, 0, NULL, 0, 0, NULL, NULL, 0};
        char name[20];
        float db[5] = {0};
        s.r = s.s = convs[i][0], s.stride = convs[i][1], s.pad = convs[i][2];
        s.p = (s.h + 2 * s.pad - s.r) / s.stride + 1, s.q = (s.w + 2 * s.pad - s.s) / s.stride + 1;
        snprintf(name, sizeof name, "conv%d_%d", convs[i][0], convs[i][1]);
        ws = ckca__alloc(any, ckca__conv_workspace(any, &s));
        ckca__op_conv_forward(any, &s, tensor(name, "x"), tensor(name, "w"), tensor(name, "b"), NULL, 0, out, ws);
        check_part(name, "y", out, 1e-5);
        ckca__op_conv_backward_data(any, &s, tensor(name, "dy"), tensor(name, "w"), out, 0, ws);
        check_part(name, "d_x", out, 1e-5);
        memset(dw, 0, 4096 * sizeof *dw);
        ckca__op_conv_backward_weight(any, &s, tensor(name, "x"), tensor(name, "dy"), dw, db, ws);
        check_part(name, "d_w", dw, 1e-5);
        check_part(name, "d_b", db, 1e-5);
        ckca__release(any, ws);
    }
    {
        ckca__conv as = {4, 1, 1, 6, 3, 1, 1, 1, 0, 1, 1, NULL, 0, 0, NULL, NULL, 0};
        float db[3] = {0};
        ws = ckca__alloc(any, ckca__conv_workspace(any, &as));
        ckca__op_linear_forward(any, 4, 6, 3, torch("linear.x", NULL), torch("linear.w", NULL), torch("linear.b", NULL),
                                out, ws);
        check_torch("linear.y", out, 1e-6);
        memset(dw, 0, 4096 * sizeof *dw);
        ckca__op_linear_backward(any, 4, 6, 3, torch("linear.x", NULL), torch("linear.w", NULL),
                                 torch("linear.dy", NULL), out, 0, dw, db, ws);
        check_torch("linear.d_x", out, 1e-6);
        check_torch("linear.d_w", dw, 1e-6);
        check_torch("linear.d_b", db, 1e-6);
        ckca__release(any, ws);
    }
    {
        float mean[5], inv_std[5], rm[5], rv[5], dgamma[5] = {0}, dbeta[5] = {0};
        const ckca__norm norm = {mean, inv_std, torch("bn.gamma", NULL), torch("bn.beta", NULL), 1};
        memcpy(rm, torch("bn.mean0", NULL), sizeof rm);
        memcpy(rv, torch("bn.var0", NULL), sizeof rv);
        ws = ckca__alloc(any, ckca__op_workspace(any, 72, 5));
        ckca__op_batchnorm_forward(any, 0, 72, 5, torch("bn.x", NULL), torch("bn.gamma", NULL), torch("bn.beta", NULL),
                                   rm, rv, torch("bn.residual", NULL), NULL, 1, out, mean, inv_std, ws);
        check_torch("bn.y", out, 2e-6);
        check_torch("bn.mean1", rm, 1e-6);
        check_torch("bn.var1", rv, 1e-6);
        ckca__op_batchnorm_backward(any, 0, 72, 5, torch("bn.x", NULL), out, torch("bn.dy", NULL), &norm, dw, grad, 0,
                                    dgamma, dbeta, ws);
        check_torch("bn.d_x", dw, 5e-6);
        check_torch("bn.d_residual", grad, 1e-6);
        check_torch("bn.d_gamma", dgamma, 5e-6);
        check_torch("bn.d_beta", dbeta, 5e-6);
        ckca__op_batchnorm_eval(any, 0, 72, 5, torch("bn.x", NULL), torch("bn.gamma", NULL), torch("bn.beta", NULL), rm,
                                rv, torch("bn.residual", NULL), 1, out);
        check_torch("bn.eval", out, 2e-6);
        ckca__release(any, ws);
    }
    {
        ckca__conv s = {2, 9, 8, 4, 4, 3, 3, 2, 1, 5, 4, NULL, 0, 0, NULL, NULL, 0};
        ckca__op_maxpool_forward(any, &s, torch("maxpool.x", NULL), out, at);
        check_torch("maxpool.y", out, 0);
        ckca__op_maxpool_backward(any, &s, torch("maxpool.dy", NULL), at, out, 0);
        check_torch("maxpool.d_x", out, 1e-6);
        ckca__op_avgpool_forward(any, 0, 2, 15, 4, torch("avgpool.x", NULL), out);
        check_torch("avgpool.y", out, 1e-6);
        ckca__op_avgpool_backward(any, 0, 2, 15, 4, torch("avgpool.dy", NULL), out, 0);
        check_torch("avgpool.d_x", out, 1e-6);
    }
    {
        const float *z = torch("loss.z", NULL), *zo = torch("loss.zo", NULL);
        const int *labels = (const int *)(const void *)torch("loss.labels", NULL);
        int hit[6];
        char name[40], base[30];
        for (j = 0; j < 2; j++) {
            ckca__op_cross_entropy(any, 6, 7, z, labels, j ? 0.1f : 0, 1, out, loss, hit);
            check_torch_mean(j ? "ce_smooth.loss" : "ce.loss", 6, loss);
            check_torch(j ? "ce_smooth.d_z" : "ce.d_z", out, 1e-6);
        }
        for (form = 0; form < 2; form++) {
            static const char *const names[2] = {"CONSTANT", "CLASS"};
            memset(out, 0, 42 * sizeof *out);
            ckca__op_adakd(any, 6, 7, z, zo, labels, form ? torch("loss.class_weight", NULL) : NULL, 3, 1, out, loss);
            snprintf(base, sizeof base, "adakd_%s", names[form]);
            snprintf(name, sizeof name, "%s.loss", base);
            check_torch_mean(name, 6, loss);
            check_part(base, "d_z", out, 1e-6);
        }
        for (form = 0; form < CKCA_FEATREG_COUNT; form++) {
            const int stages = ckca__featregs[form].stages, n = stages ? 2 : 5, d = stages ? 60 : 8;
            const float *teacher = torch(stages ? "feat.maps_o" : "feat.fo", NULL);
            float means[5 * 8];
            if (form == CKCA_FEATREG_CENTROID) {
                const int *of = (const int *)(const void *)torch("feat.labels", NULL);
                for (j = 0; j < 5; j++)
                    memcpy(means + 8 * j, torch("feat.means", NULL) + 8 * of[j], 8 * sizeof *means);
                teacher = means;
            }
            ckca__op_featreg(any, 0, 0, n, d, torch(stages ? "feat.maps" : "feat.f", NULL), teacher, 1, out, 0,
                             form == CKCA_FEATREG_CENTROID ? 0 : 1, loss);
            snprintf(base, sizeof base, "featreg_%s", ckca__featregs[form].name);
            snprintf(name, sizeof name, "%s.loss", base);
            check_torch_mean(name, n, loss);
            check_part(base, "d_f", out, 1e-6);
        }
    }
    for (j = 1; j <= 6; j = j == 1 ? 3 : j + 3) { /* groups */
        float dgamma[6] = {0}, dbeta[6] = {0}, statistics[2 * 3 * 6], parts[2 * 3 * 6];
        char name[20];
        snprintf(name, sizeof name, "gn%d", j);
        ckca__op_groupnorm_forward(any, 0, 3, 20, 6, j, tensor(name, "x"), tensor(name, "gamma"), tensor(name, "beta"),
                                   out, statistics);
        check_part(name, "y", out, 2e-6);
        ckca__op_groupnorm_backward(any, 0, 3, 20, 6, j, tensor(name, "x"), tensor(name, "gamma"), statistics,
                                    tensor(name, "dy"), dw, 0, dgamma, dbeta, parts);
        check_part(name, "d_x", dw, 5e-6);
        check_part(name, "d_gamma", dgamma, 5e-6);
        check_part(name, "d_beta", dbeta, 5e-6);
    }
    for (form = 0; form < 2; form++) {
        const float *g = torch("sgd.g", NULL);
        float w[37], v[37] = {0}, lr = 0.1f, gscale;
        memcpy(w, torch("sgd.w", NULL), sizeof w);
        for (j = 0; j < 3; j++) ckca__op_sgd(any, 37, 37, w, g + 37 * j, v, &lr, 1, 0.9f, 0.05f, form == 0, NULL);
        check_part(form ? "sgd.plain" : "sgd.nesterov", "w", w, 1e-6);
        check_part(form ? "sgd.plain" : "sgd.nesterov", "v", v, 1e-6);
        ws = ckca__alloc(any, ckca__op_workspace(any, 37, 1));
        ckca__op_clip(any, 37, g, form ? 100 : 0.5f, &gscale, ws);
        for (j = 0; j < 37; j++) w[j] = gscale * g[j];
        check_torch(form ? "clip_high" : "clip_low", w, 1e-6);
        ckca__release(any, ws);
    }
    {
        float g[37] = {0};
        double value = 0;
        ws = ckca__alloc(any, ckca__op_workspace(any, 37, 1));
        ckca__op_ewc(any, 37, torch("sgd.w", NULL), torch("ewc.old", NULL), torch("ewc.fisher", NULL), 0.7f, g, 1, &value, ws);
        loss[0] = (float)value;
        check_torch("ewc.loss", loss, 1e-6);
        check_torch("ewc.d_w", g, 1e-6);
        ckca__release(any, ws);
    }
    free(file), free(out), free(grad), free(dw), free(loss);
}

int main(int argc, char **argv) {
    int isa, t;
    for (isa = 0; isa < ISAS; isa++)
        for (t = 0; t < THREADS; t++) {
            ckca_desc desc;
            memset(&desc, 0, sizeof desc);
            desc.threads = t + 1;
            desc.isa = (ckca_isa)(CKCA_ISA_PLAIN + isa);
            if (ckca_init(&contexts[isa][t], &desc)) {
                ckca_context_free(contexts[isa][t]);
                contexts[isa][t] = NULL;
            } else any = contexts[isa][0];
        }
    test_group("workspace: a smaller batch never needs more");
    test_workspace();
    test_group("batch norm against double: training, evaluation, recomputed, in place");
    test_norm();
    test_group("batch norm: accuracy of the variance");
    test_norm_accuracy();
    test_group("batch norm: gradients against central differences");
    test_norm_gradient();
    test_group("batch norm folded into weights");
    test_fold();
    test_group("element-wise ops and SGD");
    test_elements();
    test_group("EWC's penalty and squares");
    test_ewc();
    test_group("NaN passes through every op");
    test_nan_passes();
    test_group("device memory");
    test_device();
    test_group("pooling: values and gradients");
    test_pools();
    test_group("group norm: values, gradients, accumulation, any number of threads");
    test_group_norm();
    test_group("max pooling: ties, NaN, infinities");
    test_maxpool_edges();
    test_group("cross-entropy and AdaKD");
    test_class_losses();
    test_group("cross-entropy and AdaKD: extreme logits");
    test_class_edges();
    test_group("FeatReg");
    test_features();
    test_group("batches: augmentation and normalisation");
    test_batch();
    test_group("augmentation: distribution of the draws");
    test_draws();
    test_group("values of PyTorch");
    test_torch(argc > 1 ? argv[1] : "tests/reference/ops.safetensors");
    for (isa = 0; isa < ISAS; isa++)
        for (t = 0; t < THREADS; t++) ckca_context_free(contexts[isa][t]);
    return test_summary();
}
