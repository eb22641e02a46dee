/* classify.c: the five most probable classes of each picture, with their probabilities.

       cc -O2 -I. examples/classify.c -o classify -lm -pthread
       ./classify resnet20.safetensors cat.jpg dog.png
       ./classify --arch resnet18 --classes imagenet.txt resnet18.safetensors cat.jpg      (torchvision's weights) */
#define CKCA_IMPLEMENTATION
#include "ckca.h"

#include "tool.h"

int main(int argc, char **argv) {
    static tool_weights weights; /* static: zeroed */
    const tool_flag flags[] = {TOOL_WEIGHTS_FLAGS(weights), {NULL, TOOL_HEADING, NULL, 0, 0, NULL, NULL, 0}};
    ckca_context *ctx = NULL;
    ckca_model *model = NULL;
    ckca_model_info info;
    ckca_data_desc like;
    unsigned char *pixels;
    float *probability;
    int i, k, best, shown, words, failed = 0;

    tool_name = "classify";
    words = tool_parse(argc, argv,
                       "classify CHECKPOINT.safetensors PICTURE...\n"
                       "prints the five most probable classes of each picture (JPEG or PNG).\n\n",
                       flags);
    if (words < 2) tool_fail(2, "usage: classify CHECKPOINT.safetensors PICTURE...");
    ctx = tool_init(NULL);
    tool_load(ctx, &model, argv[0], &weights);
    ckca_model_info_get(model, &info);
    like = ckca_data_like(model); /* the size and channels that the network takes */
    pixels = (unsigned char *)malloc((size_t)like.height * (size_t)like.width * (size_t)like.channels);
    probability = (float *)malloc((size_t)info.classes * sizeof *probability);

    for (i = 1; i < words && pixels && probability; i++) {
        if (ckca_read_picture(ctx, argv[i], &like, pixels) != CKCA_OK ||
            ckca_predict(model, pixels, 1, probability) != CKCA_OK) {
            fprintf(stderr, "classify: %s\n", ckca_error(ctx));
            failed = 1;
            continue;
        }
        printf("%s\n", argv[i]);
        for (shown = 0; shown < 5 && shown < info.classes; shown++) {
            for (best = 0, k = 1; k < info.classes; k++)
                if (probability[k] > probability[best]) best = k;
            if (info.class_names)
                printf("  %6.2f%%  %s\n", 100 * probability[best], info.class_names[best]);
            else
                printf("  %6.2f%%  class %d\n", 100 * probability[best], best);
            probability[best] = -1; /* shown */
        }
    }
    if (!pixels || !probability) {
        fprintf(stderr, "classify: out of memory\n");
        failed = 1;
    }

    if (fflush(stdout) || ferror(stdout)) {
        fprintf(stderr, "classify: standard output cannot be written\n");
        failed = 1;
    }

    free(pixels);
    free(probability);
    ckca_model_free(model);
    ckca_context_free(ctx);
    return failed;
}
