/* custom_net.c: a network and a loss of your own. The network is small, with one residual branch. The loss is the focal
   loss (Lin et al. 2017, equation 4), which gives less weight to pictures that are already classified well: with p the
   probability of the true class,

       loss = -(1 - p)^g log p,        dloss/dz_k = ((1 - p)^g - g (1 - p)^(g - 1) p log p) (softmax(z)_k - [k = y])

       cc -O2 -I. examples/custom_net.c -o custom_net -lm -pthread
       ./custom_net [EPOCHS] */
#define CKCA_IMPLEMENTATION
#include "ckca.h"

#include "shapes.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { COUNT = 2000, TESTS = 500, BATCH = 50, CLASSES = SHAPES_CLASSES };

/* 3x3 convolution, batch norm, ReLU. A failed call returns -1, the next ones pass it on, and finish reports it. */
static int block(ckca_model *net, const char *conv_name, const char *norm_name, int x, int out, int stride) {
    ckca_conv_desc conv = {0, 3, 0, 1, 0, 0}; /* kernel 3, padding 1, no bias */
    conv.out = out;
    conv.stride = stride;
    return ckca_layer_relu(net, ckca_layer_batchnorm(net, norm_name, ckca_layer_conv(net, conv_name, x, conv)));
}

static ckca_status build(ckca_context *ctx, ckca_model **net) {
    static const float mean[3] = {0.5f, 0.5f, 0.5f}, std[3] = {0.25f, 0.25f, 0.25f};
    ckca_model_desc desc;
    ckca_status status;
    int x, y;
    memset(&desc, 0, sizeof desc); /* 32 x 32 x 3 */
    desc.classes = CLASSES;
    desc.class_names = shapes_names;
    desc.mean = mean;
    desc.std = std;
    desc.seed = 1;
    status = ckca_model_create(ctx, net, &desc);
    if (status != CKCA_OK) return status;
    x = block(*net, "conv1", "norm1", ckca_layer_input(*net), 16, 1);
    x = block(*net, "conv2", "norm2", x, 32, 2);
    y = block(*net, "conv3", "norm3", x, 32, 1);
    x = ckca_layer_maxpool(*net, ckca_layer_relu(*net, ckca_layer_add(*net, x, y)), 2, 2, 0);
    x = block(*net, "conv4", "norm4", x, 64, 1);
    return ckca_model_finish(*net, ckca_layer_linear(*net, "fc", ckca_layer_avgpool(*net, x), CLASSES));
}

/* Mean focal loss of logits z (n x CLASSES); writes its gradient to dz (n x CLASSES). */
static double focal_loss(const float *z, const int *labels, int n, float *dz) {
    const double gamma = 2;
    double sum = 0;
    int i, k;
    for (i = 0; i < n; i++, z += CLASSES, dz += CLASSES) {
        double top = z[0], total = 0, p, slope;
        for (k = 1; k < CLASSES; k++) top = fmax(top, z[k]);
        for (k = 0; k < CLASSES; k++) total += exp(z[k] - top);
        p = fmax(exp(z[labels[i]] - top) / total, 1e-30);
        slope = pow(1 - p, gamma) - gamma * pow(1 - p, gamma - 1) * p * log(p);
        for (k = 0; k < CLASSES; k++) dz[k] = (float)(slope * (exp(z[k] - top) / total - (k == labels[i])) / n);
        sum -= pow(1 - p, gamma) * log(p);
    }
    return sum / n;
}

int main(int argc, char **argv) {
    static float pictures[BATCH * SHAPES_BYTES], logits[BATCH * CLASSES], dlogits[BATCH * CLASSES];
    static int order[COUNT], labels[BATCH];
    ckca_context *ctx = NULL;
    ckca_model *net = NULL;
    ckca_model_info info;
    ckca_data *train = NULL, *test = NULL;
    ckca_sgd_desc sgd;
    ckca_score score;
    ckca_status status = ckca_init(&ctx, NULL);
    int epoch, i, epochs = argc > 1 ? atoi(argv[1]) : 15, steps = epochs * (COUNT / BATCH);

    memset(&sgd, 0, sizeof sgd); /* Nesterov momentum 0.9, weight decay 5e-4 */
    if (status == CKCA_OK) status = shapes_open(ctx, &train, 1, 0, COUNT, NULL);
    if (status == CKCA_OK) status = shapes_open(ctx, &test, 2, 0, TESTS, NULL);
    if (status == CKCA_OK) status = build(ctx, &net);
    for (epoch = 0; epoch < epochs && status == CKCA_OK; epoch++) {
        double loss = 0;
        ckca_shuffle(1, epoch, COUNT, order);
        for (i = 0; i < COUNT && status == CKCA_OK; i += BATCH) {
            double done = (double)(epoch * (COUNT / BATCH) + i / BATCH) / steps;
            sgd.lr = (float)(0.05 * (1 + cos(3.14159265 * done)) * fmin(1, done * epochs + 0.05)); /* warm-up, cosine */
            ckca_model_info_get(net, &info);
            status = ckca_get_batch(net, train, order + i, BATCH, NULL, 1, epoch, pictures, labels);
            if (status == CKCA_OK) status = ckca_forward(net, pictures, BATCH, 1);
            if (status == CKCA_OK) status = ckca_node_read(net, info.logits, logits);
            if (status == CKCA_OK) loss += focal_loss(logits, labels, BATCH, dlogits);
            if (status == CKCA_OK) status = ckca_zero_gradients(net);
            if (status == CKCA_OK) status = ckca_backward(net, dlogits, NULL);
            if (status == CKCA_OK) status = ckca_sgd(net, &sgd);
        }
        if (status == CKCA_OK) status = ckca_evaluate(net, test, &score, NULL);
        if (status == CKCA_OK)
            printf("epoch %2d  focal loss %.4f  test accuracy %.1f%%\n", epoch + 1, loss / (COUNT / BATCH),
                   100 * score.top1);
        fflush(stdout);
    }
    if (status != CKCA_OK) fprintf(stderr, "custom_net: %s: %s\n", ckca_status_name(status), ckca_error(ctx));
    if (ferror(stdout)) {
        fprintf(stderr, "custom_net: standard output cannot be written\n");
        if (status == CKCA_OK) status = CKCA_EIO;
    }

    ckca_model_free(net);
    ckca_data_free(train);
    ckca_data_free(test);
    ckca_context_free(ctx);
    return status != CKCA_OK;
}
