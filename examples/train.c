/* train.c: trains a ResNet from scratch, tests it and saves it. The first update of a network is ordinary training.

       cc -O2 -I. examples/train.c -o train -lm -pthread
       ./train                                            ResNet-8 on drawn shapes
       ./train --cifar10 cifar-10-batches-bin --arch resnet20 --projection --augment --save net.safetensors

       ./train --from resnet18.safetensors --arch resnet18 --freeze backbone --data pictures --size 224
                                                          the head alone, on torchvision's weights

   With --save FILE, FILE.state is written every 30 seconds and removed once FILE is written. After a kill or a stop, the
   same command with --resume continues from it, to bitwise the same weights. */
#define CKCA_IMPLEMENTATION
#include "ckca.h"

#include "tool.h"

/* Called after every SGD step: prints a line per epoch and, on a terminal, the progress within the epoch. */
static int report_epoch(const ckca_progress *p, void *user) {
    double *epoch_start = (double *)user;
    char line[160], left[32], wait[48];
    if (p->batch == p->batches) {
        tool_status(NULL);
        printf("epoch %3d/%d  loss %.4f  accuracy %5.1f%%  lr %.4f  %.1f s%s\n", p->epoch + 1, p->epochs, p->loss,
               100 * p->accuracy, p->lr, p->seconds - *epoch_start, tool_waiting(p->waiting, wait, sizeof wait));
        fflush(stdout);
        *epoch_start = p->seconds;
    } else {
        snprintf(line, sizeof line, "epoch %3d/%d  step %d/%d  loss %.4f  %s left", p->epoch + 1, p->epochs, p->batch,
                 p->batches, p->loss, tool_duration(p->seconds_left, left, sizeof left));
        tool_status(line);
    }
    return tool_signal;
}

int main(int argc, char **argv) {
    static tool_source source; /* static: zeroed */
    static ckca_update_desc update;
    static ckca_model_desc model_desc;
    static ckca_desc desc;
    static char state[4096], wait[48];
    static const float mean[3] = CKCA_IMAGENET_MEAN, std[3] = CKCA_IMAGENET_STD;
    const char *arch = "resnet8", *save = NULL, *from = NULL, *freeze = NULL;
    float backbone_lr = 1;
    int augment = 0, resume = 0, count = 3000;
    uint64_t seed = 1;
    const tool_flag flags[] = {
        TOOL_SOURCE_FLAGS(source),
        {"--count", TOOL_INT, &count, 1, 1e6, "N", "number of shapes to draw for training", 0},
        {NULL, TOOL_HEADING, NULL, 0, 0, NULL, "Network", 0},
        {"--arch", TOOL_TEXT, &arch, 0, 0, "NAME",
         "resnet8, 20, 32, 44, 56, 110, 18, 34, 50, 101, 152, wide_resnet50_2, resnext50_32x4d, 18-cifar ...", 0},
        {"--width", TOOL_INT, &model_desc.width_base, 1, 1024, "N",
         "channels of the first stage [16; resnet18 and larger: 64]", 0},
        {"--projection", TOOL_SWITCH, &model_desc.projection, 0, 0, NULL,
         "shortcuts with 1x1 convolutions (resnet8 ... 110)", 0},
        {"--from", TOOL_TEXT, &from, 0, 0, "FILE",
         "weights to start from, all but the head: torchvision's as safetensors, or a checkpoint [fresh ones]", 0},
        {"--freeze", TOOL_TEXT, &freeze, 0, 0, "LAYERS",
         "layers that are not trained: prefixes of their names, with commas between; backbone: all but the head", 0},
        {"--backbone-lr", TOOL_FLOAT, &backbone_lr, 1e-6, 1000, "X",
         "factor of the learning rate of all layers but the head", 0},
        {NULL, TOOL_HEADING, NULL, 0, 0, NULL, "Training", 0},
        {"--epochs", TOOL_INT, &update.epochs, 1, 100000, "N", "passes over the pictures", 0},
        {"--batch", TOOL_INT, &update.batch, 1, 65536, "N", "pictures per step", 0},
        {"--lr", TOOL_FLOAT, &update.lr, 1e-9, 1000, "X", "peak learning rate [0.1]", 0},
        {"--schedule", TOOL_CHOICE, &update.schedule, 0, 0, "cosine|constant|step", "of the learning rate", 0},
        {"--warmup", TOOL_FLOAT, &update.warmup_epochs, 0, 100000, "X", "epochs of linear warm-up [1]", 0},
        {"--weight-decay", TOOL_FLOAT, &update.weight_decay, 0, 10, "X", "[0.0005]", 0},
        {"--label-smoothing", TOOL_FLOAT, &update.label_smoothing, 1e-6, 0.99, "X", "[off]", 0},
        {"--augment", TOOL_SWITCH, &augment, 0, 0, NULL, "random crop with 4 pixels of padding, random flip", 0},
        {"--crop", TOOL_SWITCH, &update.augment.resized_crop, 0, 0, NULL,
         "random resized crop of the full-size picture, random flip", 0},
        {"--seed", TOOL_SEED, &seed, 0, 0, "N", "of weights, order, augmentation and shapes", 0},
        {NULL, TOOL_HEADING, NULL, 0, 0, NULL, "Running", 0},
        TOOL_DEVICE_FLAGS(desc),
        {"--save", TOOL_TEXT, &save, 0, 0, "FILE", "checkpoint to write (safetensors) [none]", 0},
        {"--resume", TOOL_SWITCH, &resume, 0, 0, NULL, "continue from FILE.state, which a stopped run left", 0},
        {"--state-seconds", TOOL_FLOAT, &update.state_seconds, 0.001, 1e6, "X", "between training states [30]", 0},
        {NULL, TOOL_HEADING, NULL, 0, 0, NULL, NULL, 0}};
    ckca_context *ctx = NULL;
    ckca_data *train, *test;
    ckca_data_info info;
    ckca_model *model;
    ckca_model_info model_info;
    ckca_report report;
    ckca_score score;
    double epoch_start = 0;
    FILE *file;

    tool_name = "train";
    update.epochs = 20;
    update.batch = 128;
    if (tool_parse(argc, argv, "train [flags]: trains a ResNet and tests it. [Defaults in brackets.]\n", flags))
        tool_fail(2, "unexpected argument \"%s\" (--help lists the flags)", argv[0]);
    tool_check_source(&source);
    if (resume && !save) tool_fail(2, "--resume needs --save FILE: FILE.state holds the run to continue");
    if (save) {
        if ((size_t)snprintf(state, sizeof state, "%s.state", save) >= sizeof state)
            tool_fail(2, "--save: the path is too long");
        if (!resume && (file = fopen(state, "rb")) != NULL)
            tool_fail(2, "%s exists: add --resume to continue that run, or remove the file", state);
        update.state = state;
        tool_check_output(save);
    }

    ctx = tool_init(&desc);
    tool_open(ctx, &source, count, seed, &train, &test);
    ckca_data_info_get(train, &info);
    model_desc.height = info.height;
    model_desc.width = info.width;
    model_desc.channels = info.channels;
    model_desc.classes = info.classes;
    model_desc.seed = seed;
    if (from && info.channels == 3) model_desc.mean = mean, model_desc.std = std; /* unless the file has its own */
    tool_check(ctx, ckca_resnet(ctx, &model, arch, &model_desc));
    if (from) {
        ckca_backbone loaded;
        tool_check(ctx, ckca_load_backbone(model, from, &loaded));
        printf("%s: %d tensors taken", from, loaded.taken);
        if (loaded.left) printf(", %d left (%s ...)", loaded.left, loaded.first_left);
        if (loaded.missing) printf(", %d missing (%s ...)", loaded.missing, loaded.first_missing);
        putchar('\n');
    }
    if (backbone_lr != 1) tool_check(ctx, ckca_learning_rate(model, NULL, backbone_lr));
    while (freeze && *freeze) {
        char prefix[128];
        const size_t length = strcspn(freeze, ",");
        snprintf(prefix, sizeof prefix, "%.*s", (int)(length < sizeof prefix ? length : sizeof prefix - 1), freeze);
        tool_check(ctx, ckca_freeze(model, strcmp(prefix, "backbone") ? prefix : NULL));
        freeze += length + (freeze[length] == ',');
    }
    ckca_model_info_get(model, &model_info);
    printf("%s: %lld parameters, on %s; %d pictures of %dx%dx%d, %d classes\n", arch, (long long)model_info.parameters,
           ckca_device(ctx), info.count, info.height, info.width, info.channels, info.classes);

    update.seed = seed;
    update.progress = report_epoch;
    update.user = &epoch_start;
    if (augment) update.augment.pad = 4;
    update.augment.flip = augment || update.augment.resized_crop;
    tool_check(ctx, tool_update(ctx, model, train, &update, &report, "the same command with --resume"));
    if (save) tool_check(ctx, ckca_save(model, save));
    tool_check(ctx, ckca_evaluate(model, test, &score, NULL));
    printf("test: accuracy %.2f%%, top-5 %.2f%%, loss %.4f on %d pictures; trained in %.1f s (%.0f pictures/s%s)\n",
           100 * score.top1, 100 * score.top5, score.loss, score.count, report.seconds,
           (double)info.count * update.epochs / report.seconds, tool_waiting(report.waiting, wait, sizeof wait));

    ckca_model_free(model);
    ckca_data_free(train);
    ckca_data_free(test);
    ckca_context_free(ctx);
    return tool_end();
}
