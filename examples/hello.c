// hello.c: trains a network, saves it, updates it when more pictures arrive, and classifies one.
#define CKCA_IMPLEMENTATION
#include "ckca.h"

// Draws grey pictures of faint stripes in noise. To open files: ckca_open_folder(ctx, data, "pictures", NULL)
static ckca_status draw(ckca_context *ctx, ckca_data **data, int count) {
    static unsigned char pixels[500 * 16 * 16];
    static int labels[500]; // 0: the stripes run across, 1: they run down
    ckca_array array = {pixels, labels, count, 16, 16, 1, 2, NULL};
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
    ckca_score before, after;
    float p[2]; // class probabilities
    if (ckca_init(&ctx, NULL) || ckca_resnet(ctx, &model, "resnet8", &net) || draw(ctx, &first, 30) ||
        draw(ctx, &more, 200) || draw(ctx, &test, 500) ||
        ckca_update(model, first, NULL, NULL) || // the first update trains the network
        ckca_save(model, "first.safetensors") || ckca_evaluate(model, test, &before, NULL) ||
        ckca_update(model, more, NULL, NULL) || // each later one improves it, from its own pictures alone
        ckca_save(model, "updated.safetensors") || ckca_evaluate(model, test, &after, NULL) ||
        ckca_predict(model, ckca_pixels(test, 0), 1, p))
        return fprintf(stderr, "hello: %s\n", ckca_error(ctx)), 1;
    printf("right: %.1f%% of the test pictures, %.1f%% after the update\n", 100 * before.top1, 100 * after.top1);
    printf("picture 0: %.1f%% across, %.1f%% down\n", 100 * p[0], 100 * p[1]);
    ckca_data_free(first), ckca_data_free(more), ckca_data_free(test), ckca_model_free(model), ckca_context_free(ctx);
    return 0;
}
