/* The C half of tests/torch_interop.py.

       interop save ARCH CLASSES SIZE OUT.safetensors      a network with weights and running statistics of our own
       interop logits ARCH CLASSES SIZE WEIGHTS.safetensors N IN.bin OUT.bin
                                                           WEIGHTS into a network, N pictures (float32, N x H x W x 3)
                                                           through it, logits (N x CLASSES) out
       interop load N IN.bin OUT.bin WEIGHTS.safetensors   the same with a network made from the file alone */
#define CKCA_IMPLEMENTATION
#include "ckca.h"

static int fail(ckca_context *ctx) {
    fprintf(stderr, "interop: %s\n", ckca_error(ctx));
    return 1;
}

/* Random pictures in training mode, so that running statistics are not the initial ones. */
static ckca_status settle(ckca_model *model, int size) {
    enum { N = 4, PASSES = 3 };
    size_t count = (size_t)N * (size_t)size * (size_t)size * 3, i;
    float *x = (float *)malloc(count * sizeof *x);
    ckca_status status = CKCA_OK;
    int pass;
    if (!x) return CKCA_ENOMEM;
    for (pass = 0; pass < PASSES && status == CKCA_OK; pass++) {
        for (i = 0; i < count; i++) x[i] = (float)(4 * ckca__uniform(5, (uint64_t)pass, i) - 2);
        status = ckca_forward(model, x, N, 1);
    }
    free(x);
    return status;
}

static int logits(ckca_context *ctx, ckca_model *model, int n, const char *in, const char *out) {
    ckca_model_info info;
    size_t count, outputs;
    float *x, *z;
    FILE *f;
    ckca_model_info_get(model, &info);
    count = (size_t)n * (size_t)info.height * (size_t)info.width * 3;
    outputs = (size_t)n * (size_t)info.classes;
    x = (float *)malloc(count * sizeof *x);
    z = (float *)malloc(outputs * sizeof *z);
    if (!x || !z || !(f = fopen(in, "rb"))) return 1;
    if (fread(x, sizeof *x, count, f) != count) return 1;
    fclose(f);
    if (ckca_forward(model, x, n, 0) != CKCA_OK || ckca_node_read(model, info.logits, z) != CKCA_OK) return fail(ctx);
    if (!(f = fopen(out, "wb")) || fwrite(z, sizeof *z, outputs, f) != outputs || fclose(f)) return 1;
    free(x);
    free(z);
    return 0;
}

int main(int argc, char **argv) {
    ckca_context *ctx;
    ckca_model *model;
    ckca_model_desc desc;
    int result = 2;
    if (ckca_init(&ctx, NULL) != CKCA_OK) return 1;
    memset(&desc, 0, sizeof desc);
    if (argc == 6 && !strcmp(argv[1], "load")) {
        if (ckca_load(ctx, &model, argv[5]) != CKCA_OK) return fail(ctx);
        result = logits(ctx, model, atoi(argv[2]), argv[3], argv[4]);
        ckca_model_free(model);
    } else if ((argc == 6 && !strcmp(argv[1], "save")) || (argc == 9 && !strcmp(argv[1], "logits"))) {
        desc.classes = atoi(argv[3]);
        desc.height = desc.width = atoi(argv[4]);
        desc.seed = 11;
        if (ckca_resnet(ctx, &model, argv[2], &desc) != CKCA_OK) return fail(ctx);
        if (argc == 6) {
            if (settle(model, desc.height) != CKCA_OK || ckca_save(model, argv[5]) != CKCA_OK) return fail(ctx);
            result = 0;
        } else {
            if (ckca_load_weights(model, argv[5]) != CKCA_OK) return fail(ctx);
            result = logits(ctx, model, atoi(argv[6]), argv[7], argv[8]);
        }
        ckca_model_free(model);
    }
    ckca_context_free(ctx);
    return result;
}
