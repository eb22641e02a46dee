/* finetune.c: a network for classes of your own from one that others trained. The head is set from class means, then
   trained alone, then everything is, the backbone at a tenth of the learning rate.

       cc -O3 -I. examples/finetune.c -o finetune -lm -pthread
       ./finetune resnet18 resnet18.safetensors pictures mine.safetensors     (pictures/CLASS/x.jpg)

   torchvision's weights, in Python: import torchvision, safetensors.torch
       safetensors.torch.save_file(torchvision.models.resnet18(weights="DEFAULT").state_dict(), "resnet18.safetensors") */
#define CKCA_IMPLEMENTATION
#include "ckca.h"

int main(int argc, char **argv) {
    static const float mean[3] = CKCA_IMAGENET_MEAN, std[3] = CKCA_IMAGENET_STD;
    static ckca_data_desc size; /* static: zeroed */
    static ckca_model_desc net;
    static ckca_update_desc update;
    static ckca_split_desc split;
    ckca_context *ctx = NULL;
    ckca_model *model = NULL;
    ckca_data *all = NULL, *parts[5] = {NULL, NULL, NULL, NULL, NULL}, *train = NULL;
    ckca_data_info info;
    ckca_backbone loaded;
    ckca_score means, head, whole;
    int i;
    if (argc != 5) return fprintf(stderr, "usage: finetune ARCH WEIGHTS.safetensors PICTURES_DIR OUT.safetensors\n"), 2;
    size.height = size.width = 224;
    if (ckca_init(&ctx, NULL) || ckca_open_folder(ctx, &all, argv[3], &size)) goto failed;
    split.stratified = 1; /* four fifths to learn from, one fifth to test on */
    if (ckca_split(all, 5, &split, parts) || ckca_join(&train, parts, 4)) goto failed;

    ckca_data_info_get(all, &info);
    net.height = net.width = 224;
    net.classes = info.classes;
    net.mean = mean;
    net.std = std;
    if (ckca_resnet(ctx, &model, argv[1], &net) || ckca_load_backbone(model, argv[2], &loaded)) goto failed;
    printf("%s: %d tensors taken, %d left, %d missing %s\n", argv[2], loaded.taken, loaded.left, loaded.missing,
           loaded.first_missing);

    if (ckca_imprint(model, train, 0) || ckca_evaluate(model, parts[4], &means, NULL)) goto failed;
    update.epochs = 30;
    update.lr = 0.01f;
    if (ckca_freeze(model, NULL) || ckca_update(model, train, &update, NULL) || /* features are computed once */
        ckca_evaluate(model, parts[4], &head, NULL))
        goto failed;
    update.method = CKCA_METHOD_WARM; /* the same pictures again: nothing to preserve by distillation */
    update.epochs = 10;
    update.augment.flip = 1;
    if (ckca_learning_rate(model, NULL, 0.1f) || ckca_update(model, train, &update, NULL) ||
        ckca_evaluate(model, parts[4], &whole, NULL) || ckca_save(model, argv[4]))
        goto failed;
    printf("%d pictures to test on: %.1f%% right by class means, %.1f%% with a trained head, %.1f%% all trained\n",
           whole.count, 100 * means.top1, 100 * head.top1, 100 * whole.top1);
    for (i = 0; i < 5; i++) ckca_data_free(parts[i]);
    ckca_data_free(train), ckca_data_free(all), ckca_model_free(model), ckca_context_free(ctx);
    return 0;
failed:
    return fprintf(stderr, "finetune: %s\n", ckca_error(ctx)), 1;
}
