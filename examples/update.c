/* update.c: the deployed case. A checkpoint is in use, new labelled pictures have arrived, the old ones are gone: one
   update improves the checkpoint from the new pictures alone, and is written only if it is better.

       cc -O2 -I. examples/update.c -o update -lm -pthread
       ./update in-use.safetensors new-pictures better.safetensors

   new-pictures holds a folder per class, with the checkpoint's class names (some may be missing). A fifth of them is
   held out to compare both networks on (or use pictures of your own: --test DIR); NEVER WORSE in ckca.h has the rule.
   The program writes better.safetensors.state every 30 seconds; after a stop or a kill the same command continues from
   it, to bitwise the same result. The old checkpoint is only read, so that both paths may also be the same.

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

/* The new pictures of each class, how many of them the checkpoint is right on, and a warning where there are few. */
static void show_classes(const ckca_data *pictures, const ckca_score *score, const float *accuracy) {
    ckca_data_info info;
    int i, k, *count, present = 0, few = 0;
    char list[200] = "";
    size_t at = 0;
    ckca_data_info_get(pictures, &info);
    count = (int *)calloc((size_t)info.classes, sizeof *count);
    if (!count) tool_fail(1, "out of memory for %d classes", info.classes);
    for (i = 0; i < info.count; i++) present += count[ckca_label(pictures, i)]++ == 0;
    printf("new pictures, and how many of them the checkpoint gets right:\n");
    for (k = 0; k < info.classes; k++) {
        if (!count[k]) continue;
        printf("  %5d  %5.1f%%  %s\n", count[k], 100 * accuracy[k], info.class_names[k]);
        if (count[k] >= 10) continue;
        few++;
        if (at < 160) at += (size_t)snprintf(list + at, sizeof list - at, "%s%.30s", at ? ", " : "", info.class_names[k]);
    }
    printf("  %5d  %5.1f%%  in all, of %d of the %d classes it knows\n", score->count, 100 * score->top1, present,
           info.classes);
    if (few)
        printf("warning: fewer than ten pictures of %s%s: too few to learn a class from\n", list,
               at < 160 ? "" : " and others");
    free(count);
}

/* Accuracy by class of the old and the new network: the five classes that the new one does worst on. */
static void show_worst(const float *before, const float *after, const ckca_data_info *info) {
    unsigned char *shown = (unsigned char *)calloc((size_t)info->classes, 1);
    int k, n, worst;
    if (!shown) tool_fail(1, "out of memory for %d classes", info->classes);
    printf("accuracy of the old and the new network, its worst five classes:\n");
    for (n = 0; n < 5; n++) {
        for (worst = -1, k = 0; k < info->classes; k++)
            if (after[k] >= 0 && !shown[k] && (worst < 0 || after[k] < after[worst])) worst = k;
        if (worst < 0) break;
        shown[worst] = 1;
        printf("  %5.1f%% -> %5.1f%%  %s\n", 100 * before[worst], 100 * after[worst], info->class_names[worst]);
    }
    free(shown);
}

/* What the network calls the pictures of each class: a row per class, only the classes that occur. */
static void show_confusion(const ckca_context *ctx, ckca_model *model, const ckca_data *test) {
    ckca_data_info info;
    float *p;
    int *table, i, k, row, best;
    size_t classes;
    ckca_data_info_get(test, &info);
    classes = (size_t)info.classes;
    if (info.classes > 1000) tool_fail(1, "--confusion: for at most 1000 classes, these are %d", info.classes);
    p = (float *)calloc(classes, sizeof *p);
    table = (int *)calloc(classes * classes, sizeof *table);
    if (!p || !table) tool_fail(1, "out of memory for %d classes", info.classes);
    for (i = 0; i < info.count; i++) {
        tool_check(ctx, ckca_predict(model, ckca_pixels(test, i), 1, p));
        for (best = 0, k = 1; k < info.classes; k++)
            if (p[k] > p[best]) best = k;
        table[(size_t)ckca_label(test, i) * classes + (size_t)best]++;
    }
    printf("confusion: a row per class, and what the new network takes its pictures for:\n");
    for (row = 0; row < info.classes; row++) {
        const int *of = table + (size_t)row * classes;
        int others = 0;
        for (k = 0; k < info.classes; k++) others += of[k];
        if (!others) continue;
        printf("  %-20s %5d right", info.class_names[row], of[row]);
        for (k = 0; k < info.classes; k++)
            if (k != row && of[k]) printf(", %d %s", of[k], info.class_names[k]);
        printf("\n");
    }
    free(p);
    free(table);
}

static void show_verdict(const ckca_report *r, const char *out) {
    static const char *const word[CKCA_VERDICT_COUNT] = {"untested", "better", "undecided", "worse"};
    printf("%s: ", word[r->verdict]);
    if (r->before.count)
        printf("%.1f%% -> %.1f%% on %d held-out pictures, p = %.2g; ", 100 * r->before.top1, 100 * r->after.top1,
               r->before.count, r->p);
    if (r->verdict == CKCA_VERDICT_UNTESTED || r->verdict == CKCA_VERDICT_BETTER)
        printf("written to %s\n", out);
    else if (r->verdict == CKCA_VERDICT_WORSE)
        printf("%s not written\n", out);
    else
        printf("%s not written: leave these pictures in the folder and add the next ones\n", out);
}

int main(int argc, char **argv) {
    static ckca_update_desc update; /* static: zeroed */
    static ckca_desc desc;
    static tool_weights weights;
    static char state[4096];
    const char *test_folder = NULL, *unlabelled_folder = NULL, *memory_file = NULL;
    int augment = 0, dry_run = 0, confusion = 0, memory_size = 0, words, better;
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
        {NULL, TOOL_HEADING, NULL, 0, 0, NULL, "Old against new", 0},
        {"--holdout", TOOL_FLOAT, &update.holdout, 0, 0.9, "X",
         "part of the new pictures to compare on, 0: none, the result is written untested [0.2]", 0},
        {"--test", TOOL_TEXT, &test_folder, 0, 0, "DIR", "compare on these labelled pictures instead [none]", 0},
        {"--patience", TOOL_INT, &update.patience, 1, 100000, "N",
         "keep the best epoch, stop after N without a better one [off]", 0},
        {"--dry-run", TOOL_SWITCH, &dry_run, 0, 0, NULL, "only measure the checkpoint on the new pictures", 0},
        {"--confusion", TOOL_SWITCH, &confusion, 0, 0, NULL, "print which classes are taken for which", 0},
        {NULL, TOOL_HEADING, NULL, 0, 0, NULL, NULL, 0}};
    ckca_context *ctx = NULL;
    ckca_model *model;
    ckca_model_info info;
    ckca_data_desc like;
    ckca_data *pictures, *train = NULL, *test = NULL, *unlabelled = NULL;
    ckca_data_info data_info;
    ckca_report report;
    ckca_score score;
    ckca_memory_desc memory_desc = {0, 0};
    ckca_memory_info memory_info;
    struct stat about;
    float *before, *after; /* accuracy by class */
    char wait[48];

    tool_name = "update";
    words = tool_parse(argc, argv,
                       "update CHECKPOINT.safetensors NEW_PICTURES_DIR OUT.safetensors [flags]\n"
                       "improves a checkpoint from new pictures (NEW_PICTURES_DIR/CLASS/*.jpg or png) alone, and writes\n"
                       "OUT.safetensors only if that is better on pictures held out of training.\n"
                       "exit status: 0 written (with --dry-run: measured), 1 failed, 2 wrong usage, 3 not written: not\n"
                       "better, or too few pictures to tell; 130 and 143 stopped by SIGINT and SIGTERM.\n\n",
                       flags);
    if (words != 3 && !(dry_run && words == 2))
        tool_fail(2, "usage: update CHECKPOINT.safetensors NEW_PICTURES_DIR OUT.safetensors (--help has more)");
    if (test_folder && update.holdout > 0) tool_fail(2, "only one of --holdout and --test can be given");
    if (!dry_run && (size_t)snprintf(state, sizeof state, "%s.state", argv[2]) >= sizeof state)
        tool_fail(2, "the path is too long");
    if (memory_size && !memory_file) tool_fail(2, "--memory-size needs --memory, the file of the memory");
    if (!dry_run) tool_check_output(argv[2]);
    if (memory_file && !dry_run) tool_check_output(memory_file);

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
    }
    before = (float *)calloc((size_t)info.classes, sizeof *before);
    after = (float *)calloc((size_t)info.classes, sizeof *after);
    if (!before || !after) tool_fail(1, "out of memory for %d classes", info.classes);
    tool_check(ctx, ckca_evaluate(model, pictures, &score, before));
    show_classes(pictures, &score, before);
    if (dry_run) {
        if (test) tool_check(ctx, ckca_evaluate(model, test, &score, NULL));
        if (test) printf("%s: %.1f%% of %d pictures\n", test_folder, 100 * score.top1, score.count);
        if (confusion) show_confusion(ctx, model, test ? test : pictures);
        return tool_end();
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
    { /* decided here rather than in ckca_update, so that both networks can be looked at by class */
        ckca_update_desc resolved = update;
        tool_check(ctx, ckca_update_defaults(model, pictures, &resolved));
        if (resolved.holdout > 0 && !test) {
            tool_check(ctx, ckca_holdout(pictures, resolved.holdout, update.seed, &train, &test));
            update.holdout = 0;
        } else if (!test && update.holdout == 0 && info.updates) { /* a first update has nothing to lose */
            fprintf(stderr,
                    "%s: %d new pictures are too few to hold out a fifth, %d or more: collect more, compare on pictures of "
                    "your own (--test DIR), or write an untested checkpoint (--holdout 0)\n",
                    tool_name, data_info.count, update.patience ? 20 : 10);
            tool_end();
            return 3;
        }
    }
    update.holdout_data = test;
    update.keep_better = CKCA_OFF;
    if (test) tool_check(ctx, ckca_evaluate(model, test, NULL, before));
    tool_check(ctx, tool_update(ctx, model, train ? train : pictures, &update, &report, "the same command"));
    if (test) tool_check(ctx, ckca_evaluate(model, test, NULL, after));
    better = report.verdict == CKCA_VERDICT_BETTER || report.verdict == CKCA_VERDICT_UNTESTED;
    if (better) {
        tool_check(ctx, ckca_save(model, argv[2]));
        if (update.memory) tool_check(ctx, ckca_memory_save(update.memory, memory_file)); /* last: see above */
    } else remove(state);
    tool_status(NULL);
    printf("update %d, %d steps in %.1f s%s; weight of the distillation %.2f; accuracy on the pictures trained on %.1f%% before, "
           "%.1f%% in training\n",
           report.updates, report.steps, report.seconds, tool_waiting(report.waiting, wait, sizeof wait), report.w_kd, 100 * report.teacher_accuracy,
           100 * report.accuracy);
    if (update.patience) printf("epoch %d was the best\n", report.best_epoch + 1);
    if (test) show_worst(before, after, &data_info);
    if (confusion) show_confusion(ctx, model, test ? test : pictures);
    show_verdict(&report, argv[2]);

    ckca_memory_free(update.memory);
    free(before);
    free(after);
    ckca_model_free(model);
    ckca_data_free(pictures);
    ckca_data_free(train);
    ckca_data_free(unlabelled);
    ckca_data_free(test);
    ckca_context_free(ctx);
    tool_end();
    return better ? 0 : 3;
}
