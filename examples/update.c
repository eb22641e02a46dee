/* update.c: the deployed case. A checkpoint is in use, new labelled pictures have arrived, the old ones are gone: one
   update improves the checkpoint from the new pictures alone.

       cc -O2 -I. examples/update.c -o update -lm -pthread
       ./update in-use.safetensors new-pictures better.safetensors

   new-pictures holds a folder per class, with the checkpoint's class names (some may be missing). The program writes
   better.safetensors.state every 30 seconds; after a stop or a kill the same command continues from it, to bitwise the
   same result. The old checkpoint is only read. Test both before you replace it: --test DIR.

   --memory FILE keeps some pictures of every update in FILE, at most --memory-size, and trains on them beside the new
   ones: more accurate, where old pictures may be kept at all. FILE is made by the first update and always written last,
   so after a kill the same command gives the same result. */
#define CKCA_IMPLEMENTATION
#include "ckca.h"

#include "tool.h"

static int show_progress(const ckca_progress *p, void *user) {
    char line[160], left[32];
    (void)user;
    snprintf(line, sizeof line,
             "epoch %d/%d  loss %.4f (distillation %.4f x %.2f, features %.4f)  accuracy %.1f%%  %s left", p->epoch + 1,
             p->epochs, p->loss, p->kd, p->w_kd, p->feat, 100 * p->accuracy,
             tool_duration(p->seconds_left, left, sizeof left));
    tool_status(line);
    return tool_signal;
}

int main(int argc, char **argv) {
    static ckca_update_desc update; /* static: zeroed */
    static ckca_desc desc;
    static tool_weights weights;
    static char state[4096];
    const char *test_folder = NULL, *unlabelled_folder = NULL, *memory_file = NULL;
    int augment = 0, memory_size = 0, words;
    const tool_flag flags[] = {
        {"--epochs", TOOL_INT, &update.epochs, 1, 100000, "N", "passes over the new pictures [40]", 0},
        {"--batch", TOOL_INT, &update.batch, 1, 65536, "N", "pictures per step [64]", 0},
        {"--lr", TOOL_FLOAT, &update.lr, 1e-9, 1000, "X", "peak learning rate [0.1]", 0},
        {"--adakd", TOOL_CHOICE, &update.adakd, 0, 0, "growth|constant|class", "the distillation's weight", 0},
        {"--w-kd", TOOL_FLOAT, &update.w_kd, 0, 1000, "X",
         "weight of the distillation, a factor of growth's, 0: off [1; class: 2]", 0},
        {"--teacher-pictures", TOOL_INT, &update.teacher_pictures, 1, 1e9, "N",
         "growth: pictures behind CHECKPOINT [as it says; if it does not, as many as are new]", 0},
        {"--featreg", TOOL_CHOICE, &update.featreg, 0, 0, "centroid|stages|cosine", "the feature term's distance", 0},
        {"--w-feat", TOOL_FLOAT, &update.w_feat, 0, 1000, "X", "weight of the feature term, 0: off [the library's]", 0},
        {"--unlabelled", TOOL_TEXT, &unlabelled_folder, 0, 0, "DIR",
         "pictures without labels to distil from as well, DIR/ANY/*.jpg or png [none]", 0},
        {"--augment", TOOL_SWITCH, &augment, 0, 0, NULL, "random crop with 4 pixels of padding, random flip", 0},
        {"--seconds", TOOL_FLOAT, &update.seconds, 0.01, 1e9, "X", "fewer epochs, so that it takes at most X [no limit]", 0},
        {"--memory-limit", TOOL_FLOAT, &update.memory_mb, 0.1, 1e9, "MB", "smaller batches, so that they fit [no limit]", 0},
        {"--seed", TOOL_SEED, &update.seed, 0, 0, "N", "of order and augmentation", 0},
        TOOL_WEIGHTS_FLAGS(weights),
        {"--memory", TOOL_TEXT, &memory_file, 0, 0, "FILE", "pictures kept of earlier updates, read and written [none]",
         0},
        {"--memory-size", TOOL_INT, &memory_size, 1, 1e7, "N", "pictures that a new memory keeps [200]", 0},
        TOOL_DEVICE_FLAGS(desc),
        {"--state-seconds", TOOL_FLOAT, &update.state_seconds, 0.001, 1e6, "X", "between training states [30]", 0},
        {"--test", TOOL_TEXT, &test_folder, 0, 0, "DIR", "labelled pictures to test both checkpoints on [none]", 0},
        {NULL, TOOL_HEADING, NULL, 0, 0, NULL, NULL, 0}};
    ckca_context *ctx = NULL;
    ckca_model *model;
    ckca_model_info info;
    ckca_data_desc like;
    ckca_data *pictures, *unlabelled = NULL, *test = NULL;
    ckca_data_info data_info;
    ckca_report report;
    ckca_score before, after;
    ckca_memory_desc memory_desc = {0, 0};
    ckca_memory_info memory_info;
    struct stat about;

    tool_name = "update";
    words = tool_parse(argc, argv,
                       "update CHECKPOINT.safetensors NEW_PICTURES_DIR OUT.safetensors [flags]\n"
                       "improves a checkpoint from new pictures (NEW_PICTURES_DIR/CLASS/*.jpg or png) alone.\n\n",
                       flags);
    if (words != 3)
        tool_fail(2, "usage: update CHECKPOINT.safetensors NEW_PICTURES_DIR OUT.safetensors (--help has more)");
    if ((size_t)snprintf(state, sizeof state, "%s.state", argv[2]) >= sizeof state)
        tool_fail(2, "the path is too long");
    if (memory_size && !memory_file) tool_fail(2, "--memory-size needs --memory, the file of the memory");
    tool_check_output(argv[2]);
    if (memory_file) tool_check_output(memory_file);

    ctx = tool_init(&desc);
    tool_load(ctx, &model, argv[0], &weights);
    like = ckca_data_like(model); /* its size, channels and classes */
    tool_check(ctx, ckca_open_folder(ctx, &pictures, argv[1], &like));
    tool_tell_left_out(pictures, argv[1]);
    ckca_model_info_get(model, &info);
    ckca_data_info_get(pictures, &data_info);
    printf("%s: %s after %d updates; %d new pictures, %d classes\n", argv[0], info.arch, info.updates, data_info.count,
           info.classes);
    if (unlabelled_folder) {
        ckca_data_desc any = like; /* its folders' names mean nothing */
        any.classes = 0;
        any.class_names = NULL;
        tool_check(ctx, ckca_open_folder(ctx, &unlabelled, unlabelled_folder, &any));
        tool_tell_left_out(unlabelled, unlabelled_folder);
        update.unlabelled = unlabelled;
    }
    if (test_folder) {
        tool_check(ctx, ckca_open_folder(ctx, &test, test_folder, &like));
        tool_tell_left_out(test, test_folder);
        tool_check(ctx, ckca_evaluate(model, test, &before, NULL));
    }

    if (memory_file && !stat(memory_file, &about)) {
        tool_check(ctx, ckca_memory_load(model, &update.memory, memory_file));
        ckca_memory_info_get(update.memory, &memory_info);
        if (memory_size && memory_size != memory_info.pictures)
            tool_fail(2, "%s keeps %d pictures, --memory-size says %d", memory_file, memory_info.pictures, memory_size);
        printf("%s: %d pictures of earlier updates\n", memory_file, memory_info.count);
    } else if (memory_file) {
        memory_desc.pictures = memory_size ? memory_size : 200;
        tool_check(ctx, ckca_memory_create(model, &update.memory, &memory_desc));
    }

    update.state = state;
    update.progress = show_progress;
    if (augment) update.augment.pad = 4, update.augment.flip = 1;
    tool_check(ctx, tool_update(ctx, model, pictures, &update, &report, "the same command"));
    tool_check(ctx, ckca_save(model, argv[2]));
    if (update.memory) tool_check(ctx, ckca_memory_save(update.memory, memory_file));
    tool_status(NULL);
    printf("%s: update %d, %d steps in %.1f s; weight of the distillation %.2f; accuracy on the new pictures %.1f%% before, "
           "%.1f%% in training\n",
           argv[2], report.updates, report.steps, report.seconds, report.w_kd, 100 * report.teacher_accuracy,
           100 * report.accuracy);
    if (test) {
        tool_check(ctx, ckca_evaluate(model, test, &after, NULL));
        printf("%s: accuracy %.2f%% before, %.2f%% after (%d pictures)\n", test_folder, 100 * before.top1,
               100 * after.top1, after.count);
    }

    ckca_memory_free(update.memory);
    ckca_model_free(model);
    ckca_data_free(pictures);
    ckca_data_free(unlabelled);
    ckca_data_free(test);
    ckca_context_free(ctx);
    return tool_end();
}
