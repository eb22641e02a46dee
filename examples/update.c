/* update.c: the deployed case. A checkpoint is in use, new labelled pictures have arrived, the old ones are gone: one
   update improves the checkpoint from the new pictures alone.

       cc -O2 -I. examples/update.c -o update -lm -pthread
       ./update in-use.safetensors new-pictures better.safetensors

   new-pictures holds a folder per class, with the checkpoint's class names (some may be missing). The program writes
   better.safetensors.state every 30 seconds; after a stop or a kill the same command continues from it, to bitwise the
   same result. The old checkpoint is only read. Test both before you replace it: --test DIR. */
#define CKCA_IMPLEMENTATION
#include "ckca.h"

#include "tool.h"

static int show_progress(const ckca_progress *p, void *user) {
    char line[160], left[32];
    (void)user;
    snprintf(line, sizeof line, "epoch %d/%d  loss %.4f (distillation %.4f, features %.4f)  accuracy %.1f%%  %s left",
             p->epoch + 1, p->epochs, p->loss, p->kd, p->feat, 100 * p->accuracy,
             tool_duration(p->seconds_left, left, sizeof left));
    tool_status(line);
    return tool_signal;
}

int main(int argc, char **argv) {
    static ckca_update_desc update; /* static: zeroed */
    static ckca_desc desc;
    static char state[4096];
    const char *test_folder = NULL;
    int augment = 0, words;
    const tool_flag flags[] = {
        {"--epochs", TOOL_INT, &update.epochs, 1, 100000, "N", "passes over the new pictures [40]", 0},
        {"--batch", TOOL_INT, &update.batch, 1, 65536, "N", "pictures per step [64]", 0},
        {"--lr", TOOL_FLOAT, &update.lr, 1e-9, 1000, "X", "peak learning rate [0.1]", 0},
        {"--w-kd", TOOL_FLOAT, &update.w_kd, 0, 1000, "X", "weight of the distillation, 0: off [the library's]", 0},
        {"--w-feat", TOOL_FLOAT, &update.w_feat, 0, 1000, "X", "weight of the feature term, 0: off [the library's]", 0},
        {"--augment", TOOL_SWITCH, &augment, 0, 0, NULL, "random crop with 4 pixels of padding, random flip", 0},
        {"--seed", TOOL_SEED, &update.seed, 0, 0, "N", "of order and augmentation", 0},
        TOOL_DEVICE_FLAGS(desc),
        {"--state-seconds", TOOL_FLOAT, &update.state_seconds, 0.001, 1e6, "X", "between training states [30]", 0},
        {"--test", TOOL_TEXT, &test_folder, 0, 0, "DIR", "labelled pictures to test both checkpoints on [none]", 0},
        {NULL, TOOL_HEADING, NULL, 0, 0, NULL, NULL, 0}};
    ckca_context *ctx = NULL;
    ckca_model *model;
    ckca_model_info info;
    ckca_data_desc like;
    ckca_data *pictures, *test = NULL;
    ckca_data_info data_info;
    ckca_report report;
    ckca_score before, after;
    char wait[48];

    tool_name = "update";
    words = tool_parse(argc, argv,
                       "update CHECKPOINT.safetensors NEW_PICTURES_DIR OUT.safetensors [flags]\n"
                       "improves a checkpoint from new pictures (NEW_PICTURES_DIR/CLASS/*.jpg or png) alone.\n\n",
                       flags);
    if (words != 3)
        tool_fail(2, "usage: update CHECKPOINT.safetensors NEW_PICTURES_DIR OUT.safetensors (--help has more)");
    if ((size_t)snprintf(state, sizeof state, "%s.state", argv[2]) >= sizeof state)
        tool_fail(2, "the path is too long");
    tool_check_output(argv[2]);

    ctx = tool_init(&desc);
    tool_check(ctx, ckca_load(ctx, &model, argv[0]));
    like = ckca_data_like(model); /* its size, channels and classes */
    tool_check(ctx, ckca_open_folder(ctx, &pictures, argv[1], &like));
    tool_tell_left_out(pictures, argv[1]);
    ckca_model_info_get(model, &info);
    ckca_data_info_get(pictures, &data_info);
    printf("%s: %s after %d updates; %d new pictures, %d classes\n", argv[0], info.arch, info.updates, data_info.count,
           info.classes);
    if (test_folder) {
        tool_check(ctx, ckca_open_folder(ctx, &test, test_folder, &like));
        tool_tell_left_out(test, test_folder);
        tool_check(ctx, ckca_evaluate(model, test, &before, NULL));
    }

    update.state = state;
    update.progress = show_progress;
    if (augment) update.augment.pad = 4, update.augment.flip = 1;
    tool_update(ctx, model, pictures, &update, &report, "the same command");
    tool_check(ctx, ckca_save(model, argv[2]));
    tool_status(NULL);
    printf("%s: update %d, %d steps in %.1f s%s; accuracy on the new pictures %.1f%% before, %.1f%% in training\n",
           argv[2], report.updates, report.steps, report.seconds, tool_waiting(report.waiting, wait, sizeof wait),
           100 * report.teacher_accuracy, 100 * report.accuracy);
    if (test) {
        tool_check(ctx, ckca_evaluate(model, test, &after, NULL));
        printf("%s: accuracy %.2f%% before, %.2f%% after (%d pictures)\n", test_folder, 100 * before.top1,
               100 * after.top1, after.count);
    }

    ckca_model_free(model);
    ckca_data_free(pictures);
    ckca_data_free(test);
    ckca_context_free(ctx);
    return tool_end();
}
