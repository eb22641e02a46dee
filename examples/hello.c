// hello.c: trains a network, improves it when more pictures arrive, keeps the better one, and classifies a picture.
#define CKCA_IMPLEMENTATION
#include "ckca.h"

int main(void) {
    static unsigned char pixels[308 * 256]; // 16 x 16, grey: faint stripes in noise
    static int labels[308];                 // 0: the stripes run across, 1: they run down
    ckca_array few = {pixels, labels, 8, 16, 16, 1, 2, NULL};
    ckca_array many = {pixels + 8 * 256, labels + 8, 300, 16, 16, 1, 2, NULL};
    ckca_model_desc net = {.height = 16, .width = 16, .channels = 1, .classes = 2};
    ckca_context *ctx = NULL;
    ckca_model *model = NULL;
    ckca_data *first = NULL, *more = NULL; // from files: ckca_open_folder(ctx, &more, "pictures", NULL)
    ckca_report report;
    float p[2]; // class probabilities
    for (int i = 0; i < 308 * 256; i++) {
        int down = labels[i / 256] = i / 256 % 2, line = down ? i % 16 : i / 16 % 16;
        pixels[i] = (unsigned char)(rand() % 236 + line / 2 % 2 * 20);
    }
    if (ckca_init(&ctx, NULL) || ckca_open_array(ctx, &first, &few, NULL) ||
        ckca_open_array(ctx, &more, &many, NULL) || ckca_resnet(ctx, &model, "resnet8", &net) ||
        ckca_update(model, first, NULL, NULL) || ckca_save(model, "net.safetensors") || // trains the network
        ckca_update(model, more, NULL, &report) || ckca_save(model, "new.safetensors") || // never makes it worse
        ckca_predict(model, pixels, 1, p))
        return fprintf(stderr, "hello: %s\n", ckca_error(ctx)), 1;
    if (report.verdict == CKCA_VERDICT_BETTER) rename("new.safetensors", "net.safetensors");
    printf("%.1f%% right, %.1f%% after the update\n", 100 * report.before.top1, 100 * report.after.top1);
    printf("picture 0: %.1f%% across, %.1f%% down\n", 100 * p[0], 100 * p[1]);
    ckca_data_free(first), ckca_data_free(more), ckca_model_free(model), ckca_context_free(ctx);
}
