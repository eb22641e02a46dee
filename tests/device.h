/* device.h, after ckca.h: lets tests hand their own arrays to ops whose memory is a GPU's. Each op named here becomes a
   function that copies its arguments to the device, runs the op, copies the results back and checks that nothing beyond
   them, and none of the inputs, has changed. Without CKCA_CUDA there is nothing to do. */
#if defined(CKCA_CUDA) && !defined(DEVICE_H)
#define DEVICE_H
#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wunused-function"
#endif

enum { DEVICE_MARGIN = 256 }; /* bytes of NaN before and behind every argument */

static struct {
    const void *host;
    size_t bytes; /* on the device */
    char *device;
    int writable, bf16;
} device_argument[16];
static int device_arguments;

static void *device_place(ckca_context *ctx, const void *host, size_t bytes, int writable) {
    char *copy;
    int i;
    if (!host) return NULL;
    for (i = 0; i < device_arguments; i++)
        if (device_argument[i].host == host && device_argument[i].bytes == bytes) { /* an op in place */
            device_argument[i].writable |= writable;
            return device_argument[i].device + DEVICE_MARGIN;
        }
    copy = (char *)malloc(bytes + 2 * DEVICE_MARGIN);
    device_argument[i].host = host;
    device_argument[i].bytes = bytes;
    device_argument[i].writable = writable;
    device_argument[i].bf16 = 0;
    device_argument[i].device = (char *)ckca__device_alloc(ctx, bytes + 2 * DEVICE_MARGIN);
    if (!copy || !device_argument[i].device) {
        printf("no memory on the device\n");
        exit(2);
    }
    memset(copy, 0xff, bytes + 2 * DEVICE_MARGIN);
    if (bytes) memcpy(copy + DEVICE_MARGIN, host, bytes);
    ckca__device_upload(ctx, device_argument[i].device, copy, bytes + 2 * DEVICE_MARGIN);
    free(copy);
    device_arguments++;
    return device_argument[i].device + DEVICE_MARGIN;
}

/* The nearest bfloat16, of equally near ones the even; and back. */
static uint16_t device_to_half(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    if (v != v) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static float device_from_half(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* count values of a map. */
static void *device_map(ckca_context *ctx, const float *host, size_t count, int half, int writable) {
    const int known = device_arguments;
    uint16_t *halves;
    void *place;
    size_t i;
    if (!half || !host) return device_place(ctx, host, count * sizeof(float), writable);
    place = device_place(ctx, host, count * sizeof *halves, writable);
    if (device_arguments == known) return place; /* an op in place */
    device_argument[known].bf16 = 1;
    halves = (uint16_t *)malloc(count * sizeof *halves + 1);
    for (i = 0; i < count; i++) halves[i] = device_to_half(host[i]);
    ckca__device_upload(ctx, place, halves, count * sizeof *halves);
    free(halves);
    return place;
}

/* What the op reads; what it writes (or reads and writes). */
static const void *device_in(ckca_context *ctx, const void *host, size_t bytes) {
    return device_place(ctx, host, bytes, 0);
}
static void *device_out(ckca_context *ctx, void *host, size_t bytes) { return device_place(ctx, host, bytes, 1); }

static void device_done(ckca_context *ctx, const char *op) {
    ckca_status status = ckca__device_status(ctx);
    CHECK(!status, "%s: %s", op, ckca_error(ctx));
    while (device_arguments) {
        int i = --device_arguments, j, beyond = 0;
        const size_t bytes = device_argument[i].bytes;
        unsigned char *copy = (unsigned char *)malloc(bytes + 2 * DEVICE_MARGIN);
        ckca__device_download(ctx, copy, device_argument[i].device, bytes + 2 * DEVICE_MARGIN);
        for (j = 0; j < DEVICE_MARGIN; j++)
            beyond += copy[j] != 0xff || copy[DEVICE_MARGIN + bytes + (size_t)j] != 0xff;
        if (beyond) CHECK(0, "%s wrote beyond argument %d", op, i);
        if (device_argument[i].bf16) {
            float *host = (float *)(uintptr_t)device_argument[i].host;
            size_t e, changed = 0;
            for (e = 0; e < bytes / 2; e++) {
                uint16_t half;
                memcpy(&half, copy + DEVICE_MARGIN + 2 * e, 2);
                if (device_argument[i].writable)
                    host[e] = device_from_half(half);
                else
                    changed += half != device_to_half(host[e]);
            }
            if (changed) CHECK(0, "%s changed its input %d", op, i);
        } else if (device_argument[i].writable) {
            if (bytes) memcpy((void *)(uintptr_t)device_argument[i].host, copy + DEVICE_MARGIN, bytes);
        } else if (memcmp(device_argument[i].host, copy + DEVICE_MARGIN, bytes)) {
            CHECK(0, "%s changed its input %d", op, i);
        }
        free(copy);
        ckca__device_release(ctx, device_argument[i].device, bytes + 2 * DEVICE_MARGIN);
    }
}

#define FI(p, count) (const float *)device_in(ctx, p, (size_t)(count) * sizeof(float))
#define FO(p, count) (float *)device_out(ctx, p, (size_t)(count) * sizeof(float))
/* Maps: floats here, bfloat16 on the device where half. */
#define VI(p, count, half) (const float *)device_map(ctx, p, count, half, 0)
#define VO(p, count, half) (float *)device_map(ctx, p, count, half, 1)
#define II(p, count) (const int *)device_in(ctx, p, (size_t)(count) * sizeof(int))
#define IO(p, count) (int *)device_out(ctx, p, (size_t)(count) * sizeof(int))

static size_t device_x(const ckca__conv *s) { return (size_t)s->n * s->h * s->w * s->c; }
static size_t device_w(const ckca__conv *s) { return (size_t)s->k * s->r * s->s * ckca__group_inputs(s); }
static size_t device_y(const ckca__conv *s) { return (size_t)s->n * s->p * s->q * s->k; }
static size_t device_linear_workspace(ckca_context *ctx, int n, int d, int k) {
    ckca__conv s = {1, 1, 0, 0, 0, 1, 1, 1, 0, 1, 0, NULL, 0, 0, NULL, NULL, 0};
    s.w = s.q = n, s.c = d, s.k = k;
    return ckca__conv_workspace(ctx, &s);
}

static void device_conv_forward(ckca_context *ctx, const ckca__conv *s, const float *x, const float *w,
                                const float *bias, const float *residual, int relu, float *y, void *ws) {
    ckca__conv on = *s;
    ckca__statistics to;
    if (s->statistics) {
        to.mean = FO(s->statistics->mean, s->k);
        to.inv_std = FO(s->statistics->inv_std, s->k);
        to.running_mean = FO(s->statistics->running_mean, s->k);
        to.running_var = FO(s->statistics->running_var, s->k);
        on.statistics = &to;
    }
    ckca__op_conv_forward(ctx, &on, VI(x, device_x(s), s->bf16_x), FI(w, device_w(s)), FI(bias, s->k),
                          VI(residual, device_y(s), s->bf16), relu, VO(y, device_y(s), s->bf16),
                          device_out(ctx, ws, ckca__conv_workspace(ctx, s)));
    device_done(ctx, "conv_forward");
}
static void device_conv_backward_data(ckca_context *ctx, const ckca__conv *s, const float *dy, const float *w,
                                      float *dx, int accumulate, void *ws) {
    ckca__op_conv_backward_data(ctx, s, VI(dy, device_y(s), s->bf16), FI(w, device_w(s)),
                                VO(dx, device_x(s), s->bf16_x), accumulate,
                                device_out(ctx, ws, ckca__conv_workspace(ctx, s)));
    device_done(ctx, "conv_backward_data");
}
static void device_conv_backward_weight(ckca_context *ctx, const ckca__conv *s, const float *x, const float *dy,
                                        float *dw, float *dbias, void *ws) {
    ckca__op_conv_backward_weight(ctx, s, VI(x, device_x(s), s->bf16_x), VI(dy, device_y(s), s->bf16),
                                  FO(dw, device_w(s)), FO(dbias, s->k),
                                  device_out(ctx, ws, ckca__conv_workspace(ctx, s)));
    device_done(ctx, "conv_backward_weight");
}
static void device_linear_forward(ckca_context *ctx, int n, int d, int k, const float *x, const float *w,
                                  const float *bias, float *y, void *ws) {
    ckca__op_linear_forward(ctx, n, d, k, FI(x, n * d), FI(w, k * d), FI(bias, k), FO(y, n * k),
                            device_out(ctx, ws, device_linear_workspace(ctx, n, d, k)));
    device_done(ctx, "linear_forward");
}
static void device_linear_backward(ckca_context *ctx, int n, int d, int k, const float *x, const float *w,
                                   const float *dy, float *dx, int accumulate, float *dw, float *dbias, void *ws) {
    ckca__op_linear_backward(ctx, n, d, k, FI(x, n * d), FI(w, k * d), FI(dy, n * k), FO(dx, n * d), accumulate,
                             FO(dw, k * d), FO(dbias, k), device_out(ctx, ws, device_linear_workspace(ctx, n, d, k)));
    device_done(ctx, "linear_backward");
}
/* A norm with device pointers, in *copy; NULL if there is none. */
static const ckca__norm *device_norm(ckca_context *ctx, const ckca__norm *norm, int c, ckca__norm *copy) {
    if (!norm) return NULL;
    copy->mean = FI(norm->mean, c);
    copy->inv_std = FI(norm->inv_std, c);
    copy->gamma = FI(norm->gamma, c);
    copy->beta = FI(norm->beta, c);
    copy->relu = norm->relu;
    return copy;
}
static void device_batchnorm_forward(ckca_context *ctx, int half, size_t rows, int c, const float *x,
                                     const float *gamma, const float *beta, float *running_mean, float *running_var,
                                     const float *residual, const ckca__norm *residual_norm, int relu, float *y,
                                     float *mean, float *inv_std, void *ws) {
    ckca__norm other;
    ckca__op_batchnorm_forward(ctx, half, rows, c, VI(x, rows * c, half), FI(gamma, c), FI(beta, c),
                               FO(running_mean, c), FO(running_var, c), VI(residual, rows * c, half),
                               device_norm(ctx, residual_norm, c, &other), relu, VO(y, rows * c, half), FO(mean, c),
                               FO(inv_std, c), device_out(ctx, ws, ckca__op_workspace(ctx, rows, c)));
    device_done(ctx, "batchnorm_forward");
}
static void device_batchnorm_again(ckca_context *ctx, int half, size_t rows, int c, const float *x,
                                   const ckca__norm *norm, const float *residual, const ckca__norm *residual_norm,
                                   float *y) {
    ckca__norm own, other;
    ckca__op_batchnorm_recompute(ctx, half, rows, c, VI(x, rows * c, half), device_norm(ctx, norm, c, &own),
                             VI(residual, rows * c, half), device_norm(ctx, residual_norm, c, &other),
                             VO(y, rows * c, half));
    device_done(ctx, "batchnorm_again");
}
static void device_batchnorm_backward(ckca_context *ctx, int half, size_t rows, int c, const float *x, const float *y,
                                      const float *dy, const ckca__norm *norm, float *dx, float *dresidual,
                                      int accumulate_residual, float *dgamma, float *dbeta, void *ws) {
    ckca__norm own;
    ckca__op_batchnorm_backward(ctx, half, rows, c, VI(x, rows * c, half), VI(y, rows * c, half),
                                VI(dy, rows * c, half), device_norm(ctx, norm, c, &own), VO(dx, rows * c, half),
                                VO(dresidual, rows * c, half), accumulate_residual, FO(dgamma, c), FO(dbeta, c),
                                device_out(ctx, ws, ckca__op_workspace(ctx, rows, c)));
    device_done(ctx, "batchnorm_backward");
}
static void device_batchnorm_eval(ckca_context *ctx, int half, size_t rows, int c, const float *x, const float *gamma,
                                  const float *beta, const float *running_mean, const float *running_var,
                                  const float *residual, int relu, float *y) {
    ckca__op_batchnorm_eval(ctx, half, rows, c, VI(x, rows * c, half), FI(gamma, c), FI(beta, c), FI(running_mean, c),
                            FI(running_var, c), VI(residual, rows * c, half), relu, VO(y, rows * c, half));
    device_done(ctx, "batchnorm_eval");
}
static void device_fold(ckca_context *ctx, int k, size_t per, const float *w, const float *bias, const float *gamma,
                        const float *beta, const float *mean, const float *var, float *w_out, float *bias_out) {
    ckca__op_fold(ctx, k, per, FI(w, k * per), FI(bias, k), FI(gamma, k), FI(beta, k), FI(mean, k), FI(var, k),
                  FO(w_out, k * per), FO(bias_out, k));
    device_done(ctx, "fold");
}
static void device_add(ckca_context *ctx, int half, size_t count, const float *a, const float *b, int relu, float *y) {
    ckca__op_add(ctx, half, count, VI(a, count, half), VI(b, count, half), relu, VO(y, count, half));
    device_done(ctx, "add");
}
static void device_add_backward(ckca_context *ctx, int half, size_t count, const float *y, const float *dy, float *dx,
                                int accumulate) {
    ckca__op_add_backward(ctx, half, count, VI(y, count, half), VI(dy, count, half), VO(dx, count, half), accumulate);
    device_done(ctx, "add_backward");
}
static void device_maxpool_forward(ckca_context *ctx, const ckca__conv *s, const float *x, float *y,
                                   unsigned char *at) {
    ckca__op_maxpool_forward(ctx, s, VI(x, device_x(s), s->bf16_x), VO(y, device_y(s), s->bf16),
                             (unsigned char *)device_out(ctx, at, device_y(s)));
    device_done(ctx, "maxpool_forward");
}
static void device_maxpool_backward(ckca_context *ctx, const ckca__conv *s, const float *dy, const unsigned char *at,
                                    float *dx, int accumulate) {
    ckca__op_maxpool_backward(ctx, s, VI(dy, device_y(s), s->bf16),
                              (const unsigned char *)device_in(ctx, at, device_y(s)), VO(dx, device_x(s), s->bf16_x),
                              accumulate);
    device_done(ctx, "maxpool_backward");
}
static void device_avgpool_forward(ckca_context *ctx, int half, int n, int area, int c, const float *x, float *y) {
    ckca__op_avgpool_forward(ctx, half, n, area, c, VI(x, (size_t)n * area * c, half), FO(y, n * c));
    device_done(ctx, "avgpool_forward");
}
static void device_avgpool_backward(ckca_context *ctx, int half, int n, int area, int c, const float *dy, float *dx,
                                    int accumulate) {
    ckca__op_avgpool_backward(ctx, half, n, area, c, FI(dy, n * c), VO(dx, (size_t)n * area * c, half), accumulate);
    device_done(ctx, "avgpool_backward");
}
static void device_subsample_forward(ckca_context *ctx, const ckca__conv *s, const float *x, float *y) {
    ckca__op_subsample_forward(ctx, s, VI(x, device_x(s), s->bf16_x), VO(y, device_y(s), s->bf16));
    device_done(ctx, "subsample_forward");
}
static void device_subsample_backward(ckca_context *ctx, const ckca__conv *s, const float *dy, float *dx,
                                      int accumulate) {
    ckca__op_subsample_backward(ctx, s, VI(dy, device_y(s), s->bf16), VO(dx, device_x(s), s->bf16_x), accumulate);
    device_done(ctx, "subsample_backward");
}
static void device_groupnorm_forward(ckca_context *ctx, int half, int n, int area, int c, int groups, const float *x,
                                     const float *gamma, const float *beta, float *y, float *statistics) {
    const size_t count = (size_t)n * area * c;
    ckca__op_groupnorm_forward(ctx, half, n, area, c, groups, VI(x, count, half), FI(gamma, c), FI(beta, c),
                               VO(y, count, half), FO(statistics, 2 * n * groups));
    device_done(ctx, "groupnorm_forward");
}
static void device_groupnorm_backward(ckca_context *ctx, int half, int n, int area, int c, int groups, const float *x,
                                      const float *gamma, const float *statistics, const float *dy, float *dx,
                                      int accumulate, float *dgamma, float *dbeta, void *ws) {
    const size_t count = (size_t)n * area * c;
    ckca__op_groupnorm_backward(ctx, half, n, area, c, groups, VI(x, count, half), FI(gamma, c),
                                FI(statistics, 2 * n * groups), VI(dy, count, half), VO(dx, count, half), accumulate,
                                FO(dgamma, c), FO(dbeta, c), device_out(ctx, ws, 2 * (size_t)n * c * sizeof(float)));
    device_done(ctx, "groupnorm_backward");
}
static void device_cross_entropy(ckca_context *ctx, int n, int k, const float *z, const int *labels, float smoothing,
                                 float scale, float *dz, float *loss, int *hit) {
    ckca__op_cross_entropy(ctx, n, k, FI(z, n * k), II(labels, n), smoothing, scale, FO(dz, n * k), FO(loss, n), IO(hit, n));
    device_done(ctx, "cross_entropy");
}
static void device_softmax(ckca_context *ctx, int n, int k, const float *z, float *p) {
    ckca__op_softmax(ctx, n, k, FI(z, n * k), FO(p, n * k));
    device_done(ctx, "softmax");
}
static void device_adakd(ckca_context *ctx, int n, int k, const float *z, const float *zo, const int *labels,
                         const float *class_weight, float temperature, float scale, float *dz, float *loss) {
    ckca__op_adakd(ctx, n, k, FI(z, n * k), FI(zo, n * k), II(labels, n), FI(class_weight, k), temperature, scale,
                   FO(dz, n * k), FO(loss, n));
    device_done(ctx, "adakd");
}
static void device_featreg(ckca_context *ctx, int half, int bf16_teacher, int n, int d, const float *f, const float *fo,
                           float scale, float *df, int accumulate, float of_zero, float *loss) {
    ckca__op_featreg(ctx, half, bf16_teacher, n, d, VI(f, n * d, half), VI(fo, n * d, bf16_teacher), scale,
                     VO(df, n * d, half), accumulate, of_zero, FO(loss, n));
    device_done(ctx, "featreg");
}
static void device_sum(ckca_context *ctx, int n, const float *values, double *sum) {
    ckca__op_sum(ctx, n, FI(values, n), (double *)device_out(ctx, sum, sizeof *sum));
    device_done(ctx, "sum");
}
static void device_sgd(ckca_context *ctx, size_t count, size_t decayed, float *w, const float *g, float *v,
                       const float *lr, float factor, float momentum, float weight_decay, int nesterov,
                       const float *gscale) {
    ckca__op_sgd(ctx, count, decayed, FO(w, count), FI(g, count), FO(v, count), FI(lr, 1), factor, momentum,
                 weight_decay, nesterov, FI(gscale, 1));
    device_done(ctx, "sgd");
}
static void device_clip(ckca_context *ctx, size_t count, const float *g, float clip, float *gscale, void *ws) {
    ckca__op_clip(ctx, count, FI(g, count), clip, FO(gscale, 1),
                  device_out(ctx, ws, ckca__op_workspace(ctx, count, 1)));
    device_done(ctx, "clip");
}
static void device_shrink_perturb(ckca_context *ctx, size_t count, float *w, const float *fresh, float shrink,
                                  float perturb) {
    ckca__op_shrink_perturb(ctx, count, FO(w, count), FI(fresh, count), shrink, perturb);
    device_done(ctx, "shrink_perturb");
}
static void device_ewc(ckca_context *ctx, size_t count, const float *w, const float *old, const float *fisher,
                       float lambda, float *g, double scale, double *sum, void *ws) {
    ckca__op_ewc(ctx, count, FI(w, count), FI(old, count), FI(fisher, count), lambda, FO(g, count), scale,
                 (double *)device_out(ctx, sum, sizeof *sum), device_out(ctx, ws, ckca__op_workspace(ctx, count, 1)));
    device_done(ctx, "ewc");
}
static void device_add_squares(ckca_context *ctx, size_t count, const float *g, float scale, float *fisher) {
    ckca__op_add_squares(ctx, count, FI(g, count), scale, FO(fisher, count));
    device_done(ctx, "add_squares");
}
static void device_batch(ckca_context *ctx, int n, int h, int w, int c, const unsigned char *pixels, int gathered,
                         const int *index, const ckca_augment *augment, uint64_t seed, const int *epoch,
                         const float *mean, const float *std, float *out) {
    int i, pictures = gathered ? n : 0;
    for (i = 0; i < n && !gathered; i++) pictures = index[i] >= pictures ? index[i] + 1 : pictures;
    ckca__op_batch(ctx, n, h, w, c, (const unsigned char *)device_in(ctx, pixels, (size_t)(pictures * h * w * c)),
                   gathered, II(index, n), augment, seed, II(epoch, 1), mean, std, FO(out, n * h * w * c));
    device_done(ctx, "batch");
}
#undef FI
#undef FO
#undef VI
#undef VO
#undef II
#undef IO

#define ckca__op_conv_forward device_conv_forward
#define ckca__op_conv_backward_data device_conv_backward_data
#define ckca__op_conv_backward_weight device_conv_backward_weight
#define ckca__op_linear_forward device_linear_forward
#define ckca__op_linear_backward device_linear_backward
#define ckca__op_batchnorm_forward device_batchnorm_forward
#define ckca__op_batchnorm_recompute device_batchnorm_again
#define ckca__op_batchnorm_backward device_batchnorm_backward
#define ckca__op_batchnorm_eval device_batchnorm_eval
#define ckca__op_fold device_fold
#define ckca__op_add device_add
#define ckca__op_add_backward device_add_backward
#define ckca__op_maxpool_forward device_maxpool_forward
#define ckca__op_maxpool_backward device_maxpool_backward
#define ckca__op_avgpool_forward device_avgpool_forward
#define ckca__op_avgpool_backward device_avgpool_backward
#define ckca__op_subsample_forward device_subsample_forward
#define ckca__op_subsample_backward device_subsample_backward
#define ckca__op_groupnorm_forward device_groupnorm_forward
#define ckca__op_groupnorm_backward device_groupnorm_backward
#define ckca__op_cross_entropy device_cross_entropy
#define ckca__op_softmax device_softmax
#define ckca__op_adakd device_adakd
#define ckca__op_featreg device_featreg
#define ckca__op_sum device_sum
#define ckca__op_sgd device_sgd
#define ckca__op_clip device_clip
#define ckca__op_shrink_perturb device_shrink_perturb
#define ckca__op_ewc device_ewc
#define ckca__op_add_squares device_add_squares
#define ckca__op_batch device_batch
#endif
