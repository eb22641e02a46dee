// hello.c: trains a network, saves it, updates it when more pictures arrive, and classifies one.
#define CKCA_IMPLEMENTATION
#include "ckca.h"

// Draws grey pictures of faint stripes in noise. To open files: ckca_open_folder(ctx, data, "pictures", NULL)
static ckca_status draw(ckca_context *ctx, ckca_data **data, int count, unsigned seed) {
    static unsigned char pixels[500 * 16 * 16];
    static int labels[500];
    static const char *const names[] = {"across", "down"};
    ckca_array array = {pixels, labels, count, 16, 16, 1, 2, names};
    srand(seed);
    for (int i = 0; i < count * 16 * 16; i++) {
        int down = labels[i / 256] = i / 256 % 2, line = down ? i % 16 : i / 16 % 16;
        pixels[i] = (unsigned char)(rand() % 236 + line / 2 % 2 * 20);
    }
    return ckca_open_array(ctx, data, &array, NULL);
}

int main(void) {
    ckca_context *ctx = NULL;
    ckca_model *model = NULL;
    ckca_data *first = NULL, *more = NULL, *test = NULL;
    ckca_model_desc net = {.height = 16, .width = 16, .channels = 1, .classes = 2};
    ckca_score old, now;
    float p[2];
    if (ckca_init(&ctx, NULL) || ckca_resnet(ctx, &model, "resnet8", &net) || draw(ctx, &first, 40, 1) ||
        draw(ctx, &more, 200, 2) || draw(ctx, &test, 500, 3) ||
        ckca_update(model, first, NULL, NULL) || // the first update trains the network
        ckca_save(model, "first.safetensors") || ckca_evaluate(model, test, &old, NULL) ||
        ckca_update(model, more, NULL, NULL) || // the next ones improve it, each from its own pictures alone
        ckca_save(model, "updated.safetensors") || ckca_evaluate(model, test, &now, NULL) ||
        ckca_predict(model, ckca_pixels(test, 0), 1, p)) { // class probabilities
        fprintf(stderr, "hello: %s\n", ckca_error(ctx));
        return 1;
    }
    printf("right: %.1f%% of the test pictures, %.1f%% after the update\n", 100 * old.top1, 100 * now.top1);
    printf("picture 0: %.1f%% across, %.1f%% down\n", 100 * p[0], 100 * p[1]);
    ckca_data_free(first), ckca_data_free(more), ckca_data_free(test), ckca_model_free(model), ckca_context_free(ctx);
    return 0;
}
