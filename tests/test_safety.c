/* test_safety.c: an update never makes a network worse: the hold-out, McNemar's test, the rule of keep_better and what it
   gives over 20 updates, the best epoch; all of it through kills, damaged training states and failing allocations. */
#define CKCA_IMPLEMENTATION
#include "ckca.h"
#include "test.h"

#define DIR "build/tmp_safety"
enum { SIZE = 8, CLASSES = 4, MOST = 400 };

/* Pictures whose class is a bright quarter under noise of up to noise grey levels; class k has every CLASSES-th one. */
static ckca_data *pictures(ckca_context *ctx, int count, int noise, uint64_t seed) {
    static unsigned char pixels[MOST * SIZE * SIZE * 3];
    static int labels[MOST];
    ckca_array array;
    ckca_data *data = NULL;
    int i, at;
    uint64_t draw = 0;
    for (i = 0; i < count; i++) {
        labels[i] = i % CLASSES;
        for (at = 0; at < SIZE * SIZE * 3; at++) {
            const int y = at / 3 / SIZE, x = at / 3 % SIZE;
            const int bright = y / (SIZE / 2) * 2 + x / (SIZE / 2) == labels[i];
            pixels[i * SIZE * SIZE * 3 + at] =
                (unsigned char)(ckca__random(seed, 77, draw++) % (uint64_t)noise + (bright ? 250 - (uint64_t)noise : 0));
        }
    }
    memset(&array, 0, sizeof array);
    array.pixels = pixels;
    array.labels = labels;
    array.count = count;
    array.height = array.width = SIZE;
    array.channels = 3;
    array.classes = CLASSES;
    ckca_open_array(ctx, &data, &array, NULL);
    return data;
}

static ckca_update_desc quick(void) {
    ckca_update_desc d;
    memset(&d, 0, sizeof d);
    d.epochs = 3;
    d.batch = 16;
    d.seed = 5;
    return d;
}

static ckca_model *copy_of(const ckca_model *m) {
    ckca_model *copy = NULL;
    CHECK(ckca_model_copy(&copy, m) == CKCA_OK, "%s", ckca_error(m->ctx));
    return copy;
}

static int same_weights(const ckca_model *a, const ckca_model *b) {
    float *x = (float *)malloc(a->all * sizeof(float)), *y = (float *)malloc(a->all * sizeof(float));
    int same;
    if (!x || !y || a->all != b->all) exit(2);
    ckca__device_download(a->ctx, x, a->values, a->all * sizeof(float));
    ckca__device_download(b->ctx, y, b->values, b->all * sizeof(float));
    same = !memcmp(x, y, a->all * sizeof(float));
    free(x);
    free(y);
    return same;
}

static int there(const char *path) {
    struct stat about;
    return !stat(path, &about);
}

static int same_report(const ckca_report *a, const ckca_report *b) {
    ckca_report x = *a, y = *b;
    x.seconds = y.seconds = 0;
    return x.updates == y.updates && x.steps == y.steps && x.loss == y.loss && x.accuracy == y.accuracy &&
           x.best_epoch == y.best_epoch && x.verdict == y.verdict && x.kept_old == y.kept_old && x.won == y.won &&
           x.lost == y.lost && x.p == y.p && x.before.count == y.before.count && x.before.top1 == y.before.top1 &&
           x.before.loss == y.before.loss && x.after.top1 == y.after.top1 && x.after.loss == y.after.loss;
}

/* ---- McNemar's test, and the rule over 20 updates ---- */

static void test_mcnemar(void) {
    static const struct {
        int won, lost;
        double p;
    } known[] = {/* exact: sums of binomials as fractions */
                 {0, 0, 1},      {1, 0, 1},          {3, 0, 0.25},          {6, 0, 0.03125},
                 {5, 5, 1},      {2, 10, 0.03857421875}, {10, 2, 0.03857421875}, {20, 10, 0.098737147},
                 {60, 40, 0.056887934}, {1000, 900, 0.023108845}};
    size_t i;
    int n, won, k;
    for (i = 0; i < sizeof known / sizeof *known; i++)
        CHECK(fabs(ckca__mcnemar(known[i].won, known[i].lost) - known[i].p) < 2e-9, "won %d, lost %d: p is %.9g, not %.9g",
              known[i].won, known[i].lost, ckca__mcnemar(known[i].won, known[i].lost), known[i].p);
    for (n = 1; n <= 30; n++) /* against Pascal's triangle */
        for (won = 0; won <= n; won++) {
            double row[32] = {1}, sum = 0, p;
            int j;
            for (k = 1; k <= n; k++)
                for (j = k; j > 0; j--) row[j] += row[j - 1];
            for (k = 0; k <= n; k++)
                if (abs(2 * k - n) >= abs(2 * won - n)) sum += row[k];
            p = sum / pow(2, n);
            CHECK(fabs(ckca__mcnemar(won, n - won) - p) < 1e-12, "won %d, lost %d: p is %.12g, not %.12g", won, n - won,
                  ckca__mcnemar(won, n - won), p);
        }
    CHECK(ckca__mcnemar(1000000, 0) == 0 && ckca__mcnemar(1000000, 1000000) == 1, "a million pictures");
}

/* How often 20 updates that each make the network worse by fall, a fraction of all pictures, leave it worse by more than
   resolution in all. discordant: the fraction that one of both networks alone is right on. */
static double often_worse(int held, double discordant, double fall, double resolution, double level) {
    enum { TRIALS = 800 };
    static double p[200][200];
    int trial, update, i, worse = 0;
    uint64_t draw = 0;
    for (i = 0; i < (held + 1) * (held + 1); i++) p[i / (held + 1)][i % (held + 1)] = ckca__mcnemar(i / (held + 1), i % (held + 1));
    for (trial = 0; trial < TRIALS; trial++) {
        double total = 0;
        for (update = 0; update < 20; update++) {
            int won = 0, lost = 0;
            for (i = 0; i < held; i++) {
                const double u = ckca__uniform(9, 9, draw++);
                won += u < (discordant - fall) / 2;
                lost += u > 1 - (discordant + fall) / 2;
            }
            if (won > lost && p[won][lost] <= level) total += fall;
        }
        worse += total > resolution;
    }
    return (double)worse / TRIALS;
}

/* The manual's statement, for updates of 60 pictures and of 300. */
static void test_rule(void) {
    static const int held[2] = {12, 60};
    int i;
    double size, any = 0;
    for (i = 0; i < 2; i++) {
        const double error = sqrt(0.2 / held[i]), resolution = 1.96 * error;
        double worst = 0;
        for (size = 0.3; size < 2.2; size += 0.35) {
            double often;
            if (size * error > 0.2) continue;
            often = often_worse(held[i], 0.2, size * error, resolution, 0.25);
            if (often > worst) worst = often;
        }
        size = often_worse(held[i], 0.2, 0.4 * error, resolution, 1);
        if (size > any) any = size;
        printf("20 updates, %d held out: worse by more than %.1f points in %.1f%% of the trials, %.0f%% if any lead counts\n",
               held[i], 100 * resolution, 100 * worst, 100 * size);
        CHECK(worst <= 0.025, "%d held out: worse in %.3f of the trials", held[i], worst);
    }
    CHECK(any > 0.4, "if any lead counted, only %.3f would be worse: the test tests nothing", any);
}

/* ---- the hold-out ---- */

static void test_holdout(ckca_context *ctx) {
    ckca_data *data = pictures(ctx, 103, 100, 1), *train = NULL, *held = NULL, *other = NULL, *rest = NULL, *few, *set;
    ckca_data *const unset = NULL;
    int i, k, count[2][CLASSES] = {{0}}, seen[103] = {0}, same = 1;
    float fraction;
    CHECK(ckca_holdout(data, 0.2f, 7, &train, &held) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(held->count == 21 && train->count == 82, "%d held out, %d left", held->count, train->count);
    for (i = 0; i < held->count; i++) seen[held->index[i]]++, count[1][ckca_label(held, i)]++;
    for (i = 0; i < train->count; i++) seen[train->index[i]]++, count[0][ckca_label(train, i)]++;
    for (i = 0; i < 103; i++) CHECK(seen[i] == 1, "picture %d is in the parts %d times", i, seen[i]);
    for (i = 1; i < train->count; i++) CHECK(train->index[i] > train->index[i - 1], "the order of the rest changed at %d", i);
    for (k = 0; k < CLASSES; k++) CHECK(count[1][k] == 5 || count[1][k] == 6, "class %d: %d held out", k, count[1][k]);
    CHECK(ckca_holdout(data, 0.2f, 7, &rest, &other) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(!memcmp(held->index, other->index, 21 * sizeof(int)), "the same seed, another hold-out");
    ckca_data_free(rest), ckca_data_free(other);
    CHECK(ckca_holdout(data, 0.2f, 8, &rest, &other) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(memcmp(held->index, other->index, 21 * sizeof(int)), "another seed, the same hold-out");
    ckca_data_free(rest), ckca_data_free(other), ckca_data_free(train), ckca_data_free(held);
    { /* repeats stay on one side; a class of one picture stays in training */
        int index[40];
        for (i = 0; i < 40; i++) index[i] = i < 39 ? i / 3 * 4 : 1; /* 13 pictures of class 0, each three times; one of class 1 */
        CHECK(ckca_subset(&few, data, index, 40) == CKCA_OK, "%s", ckca_error(ctx));
        for (fraction = 0.1f; fraction < 0.95f; fraction += 0.2f) {
            CHECK(ckca_holdout(few, fraction, 3, &train, &held) == CKCA_OK, "%s", ckca_error(ctx));
            CHECK(held->count == (int)(fraction * 14 + 0.5f) - (fraction > 0.89f) && train->count == 40 - 3 * held->count,
                  "%g: %d held out, %d left", (double)fraction, held->count, train->count);
            for (i = 0; i < held->count; i++) {
                CHECK(ckca_label(held, i) == 0, "the only picture of class 1 is held out");
                for (k = 0; k < train->count; k++) same = same && train->index[k] != held->index[i];
            }
            ckca_data_free(train), ckca_data_free(held);
        }
        CHECK(same, "a picture is on both sides");
        ckca_data_free(few);
    }
    { /* one or two of each class: spread evenly, never the last one */
        int index[8] = {0, 1, 2, 3, 4, 5, 6, 7};
        CHECK(ckca_subset(&few, data, index, 4) == CKCA_OK && ckca_subset(&set, data, index, 8) == CKCA_OK, "%s", ckca_error(ctx));
        train = held = NULL;
        CHECK(ckca_holdout(few, 0.5f, 3, &train, &held) == CKCA_EINVAL && strstr(ckca_error(ctx), "a hold-out of 0.5 of 4 pictures is none") &&
                  !train && !held, "%s", ckca_error(ctx));
        CHECK(ckca_holdout(set, 0.9f, 3, &train, &held) == CKCA_OK && held->count == 4, "%s", ckca_error(ctx));
        for (i = 0; i < 4; i++) CHECK(ckca_label(held, i) == i, "picture %d is of class %d", i, ckca_label(held, i));
        ckca_data_free(train), ckca_data_free(held);
        CHECK(ckca_holdout(set, 0.25f, 3, &train, &held) == CKCA_OK && held->count == 2 && ckca_label(held, 1) > ckca_label(held, 0),
              "%s", ckca_error(ctx));
        ckca_data_free(train), ckca_data_free(held), ckca_data_free(few), ckca_data_free(set);
    }
    train = held = unset;
    CHECK(ckca_holdout(data, 0, 3, &train, &held) == CKCA_EINVAL && ckca_holdout(data, 0.95f, 3, &train, &held) == CKCA_EINVAL &&
              strstr(ckca_error(ctx), "fraction is 0.95, must be 0 to 0.9") && ckca_holdout(data, (float)NAN, 3, &train, &held) == CKCA_EINVAL &&
              ckca_holdout(NULL, 0.5f, 3, &train, &held) == CKCA_EINVAL && ckca_holdout(data, 0.5f, 3, NULL, &held) == CKCA_EINVAL &&
              ckca_holdout(data, 0.5f, 3, &train, NULL) == CKCA_EINVAL && !train && !held, "%s", ckca_error(ctx));
    ckca_data_free(data);
}

/* ---- one update ---- */

/* Pictures of data that m is right on: right (data->count). Returns their number. */
static int by_hand(ckca_model *m, const ckca_data *data, int *right) {
    int i, k, sum = 0;
    for (i = 0; i < data->count; i++) {
        float p[CLASSES];
        CHECK(ckca_predict(m, ckca_pixels(data, i), 1, p) == CKCA_OK, "%s", ckca_error(m->ctx));
        right[i] = 1;
        for (k = 0; k < CLASSES; k++)
            if (p[k] > p[ckca_label(data, i)]) right[i] = 0;
        sum += right[i];
    }
    return sum;
}

/* The report and the weights of an update against the same done by hand; then the rule at levels around its p. */
static void check_update(ckca_model *start, const ckca_data *data, ckca_update_desc d, ckca_verdict expected) {
    ckca_context *ctx = start->ctx;
    ckca_model *hand = copy_of(start), *m = copy_of(start);
    ckca_data *train = NULL, *held = NULL;
    ckca_update_desc none = d;
    ckca_report report, again;
    static int old_right[MOST], new_right[MOST];
    int i, won = 0, lost = 0, before, after;
    none.holdout = CKCA_OFF;
    CHECK(ckca_holdout(data, 0.2f, d.seed, &train, &held) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(ckca_update(hand, train, &none, &report) == CKCA_OK && report.verdict == CKCA_VERDICT_UNTESTED && !report.kept_old &&
              report.before.count == 0 && report.after.count == 0 && report.p == 1 && hand->updates == 2, "%s", ckca_error(ctx));
    before = by_hand(start, held, old_right);
    after = by_hand(hand, held, new_right);
    for (i = 0; i < held->count; i++) won += new_right[i] > old_right[i], lost += new_right[i] < old_right[i];
    d.keep_better = CKCA_OFF;
    CHECK(ckca_update(m, data, &d, &report) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(same_weights(m, hand) && m->updates == 2 && !report.kept_old, "a hold-out trains to other bits than its rest alone");
    CHECK(report.won == won && report.lost == lost && report.before.count == held->count && report.after.count == held->count &&
              fabs(report.before.top1 * held->count - before) < 1e-9 && fabs(report.after.top1 * held->count - after) < 1e-9,
          "won %d (by hand %d), lost %d (%d), right %g (%d) and %g (%d) of %d", report.won, won, report.lost, lost,
          report.before.top1 * held->count, before, report.after.top1 * held->count, after, report.before.count);
    CHECK(report.p == ckca__mcnemar(won, lost) && report.verdict == expected && report.best_epoch == d.epochs - 1,
          "verdict %d, not %d: won %d, lost %d, p %g", report.verdict, expected, won, lost, report.p);
    printf("   won %d, lost %d of %d: p %.3g\n", won, lost, held->count, report.p);
    for (i = 0; i < 4; i++) { /* 0: the default; 1, 2: just below and above p; 3: any lead */
        ckca_model *kept;
        const int leads = won > lost, kept_new = i == 0 ? leads && report.p <= 0.25 : i == 1 ? 0 : leads;
        if ((i == 1 || i == 2) && report.p > 0.99) continue;
        kept = copy_of(start);
        d.keep_better = i == 0 ? 0 : i == 3 ? 1 : (float)(report.p * (i == 1 ? 0.99 : 1.01));
        CHECK(ckca_update(kept, data, &d, &again) == CKCA_OK, "%s", ckca_error(ctx));
        CHECK(again.kept_old == !kept_new && same_weights(kept, kept_new ? hand : start) && kept->updates == 1 + kept_new &&
                  again.updates == kept->updates && kept->batches_tracked == (kept_new ? hand : start)->batches_tracked,
              "keep_better %g, p %g: kept the %s network", (double)d.keep_better, again.p, again.kept_old ? "old" : "new");
        CHECK((again.verdict == CKCA_VERDICT_BETTER) == kept_new && again.won == won && again.lost == lost, "verdict %d", again.verdict);
        ckca_model_free(kept);
    }
    ckca_model_free(hand), ckca_model_free(m), ckca_data_free(train), ckca_data_free(held);
}

static void test_updates(ckca_model *weak, ckca_model *good, const ckca_data *clear) {
    ckca_update_desc d = quick();
    d.epochs = 8;
    check_update(weak, clear, d, CKCA_VERDICT_BETTER);
    d.epochs = 1;
    d.lr = 3; /* breaks the network */
    check_update(good, clear, d, CKCA_VERDICT_WORSE);
    d.lr = 1e-9f; /* changes nothing: a tie */
    check_update(good, clear, d, CKCA_VERDICT_UNDECIDED);
}

static void test_defaults(ckca_context *ctx, const ckca_model *good, const ckca_model *fresh, const ckca_data *clear) {
    static const struct {
        int count, trained, patience;
        ckca_method method;
        float holdout, expected;
    } cases[] = {{47, 1, 0, CKCA_METHOD_CKCA, 0, CKCA_OFF},     {48, 1, 0, CKCA_METHOD_CKCA, 0, 0.2f},
                 {97, 1, 3, CKCA_METHOD_CKCA, 0, CKCA_OFF},     {98, 1, 3, CKCA_METHOD_CKCA, 0, 0.2f},
                 {200, 0, 0, CKCA_METHOD_CKCA, 0, CKCA_OFF},    {200, 1, 0, CKCA_METHOD_SCRATCH, 0, CKCA_OFF},
                 {200, 1, 0, CKCA_METHOD_WARM, 0, 0.2f},        {200, 1, 0, CKCA_METHOD_SHRINK_PERTURB, 0, 0.2f},
                 {200, 1, 0, CKCA_METHOD_CKCA, CKCA_OFF, CKCA_OFF}, {20, 0, 0, CKCA_METHOD_SCRATCH, 0.3f, 0.3f}};
    size_t i;
    int index[200], k;
    for (k = 0; k < 200; k++) index[k] = k;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        const ckca_model *m = cases[i].trained ? good : fresh;
        ckca_update_desc d, own;
        ckca_data *data = NULL;
        memset(&d, 0, sizeof d);
        d.method = cases[i].method;
        d.holdout = cases[i].holdout;
        d.patience = cases[i].patience;
        d.batch = 1000;
        CHECK(ckca_subset(&data, clear, index, cases[i].count) == CKCA_OK, "%s", ckca_error(ctx));
        CHECK(ckca_update_defaults(m, data, &d) == CKCA_OK && d.holdout == cases[i].expected && d.keep_better == 0.25f &&
                  d.batch == cases[i].count - (d.holdout > 0 ? (int)(d.holdout * (float)cases[i].count + 0.5f) : 0),
              "case %d: holdout %g, batch %d", (int)i, (double)d.holdout, d.batch);
        memset(&own, 0, sizeof own);
        own.holdout_data = clear;
        CHECK(ckca_update_defaults(m, data, &own) == CKCA_OK && own.holdout == CKCA_OFF, "a set of one's own, and %g", (double)own.holdout);
        ckca_data_free(data);
    }
}

static void test_own_set(ckca_context *ctx, ckca_model *good, const ckca_data *clear, const ckca_data *other) {
    ckca_model *m = copy_of(good);
    ckca_update_desc d = quick();
    ckca_report report;
    ckca_data *tiny = NULL, *part = NULL;
    int index[9];
    ckca_score score;
    for (index[8] = 0; index[8] < 8; index[8]++) index[index[8]] = index[8];
    d.holdout_data = other;
    d.lr = 3;
    CHECK(ckca_subset(&tiny, clear, index, 8) == CKCA_OK && ckca_evaluate(m, other, &score, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(ckca_update(m, tiny, &d, &report) == CKCA_OK && report.verdict == CKCA_VERDICT_WORSE && report.kept_old &&
              report.before.count == other->count && report.before.top1 == score.top1 && report.before.loss == score.loss &&
              same_weights(m, good) && report.steps == 3, "8 pictures and a set of one's own: verdict %d, %s", report.verdict, ckca_error(ctx));
    /* what makes no sense */
    d.holdout = 0.2f;
    CHECK(ckca_update(m, clear, &d, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "holdout is 0.2, but holdout_data is set too"), "%s", ckca_error(ctx));
    d.holdout = 0;
    d.holdout_data = tiny;
    CHECK(ckca_update(m, clear, &d, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "picture 0 of holdout_data is in data too"), "%s", ckca_error(ctx));
    d.holdout_data = NULL;
    d.holdout = 0.05f;
    CHECK(ckca_update(m, tiny, &d, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "a hold-out of 0.05 of 8 pictures is none"), "%s", ckca_error(ctx));
    d.holdout = CKCA_OFF;
    d.patience = 2;
    CHECK(ckca_update(m, clear, &d, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "patience is 2, but 0 pictures are held out"), "%s", ckca_error(ctx));
    CHECK(ckca_subset(&part, other, index, 1) == CKCA_OK, "%s", ckca_error(ctx));
    d.holdout = 0;
    d.holdout_data = part;
    CHECK(ckca_update(m, clear, &d, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "but 1 pictures are held out"), "%s", ckca_error(ctx));
    {
        static unsigned char pixels[SIZE * SIZE * 3];
        static const int label = 0;
        static const char *const names[CLASSES] = {"0", "1", "2", "cat"};
        ckca_array array = {pixels, &label, 1, SIZE, SIZE, 3, CLASSES, names};
        ckca_data *odd = NULL;
        ckca_context *elsewhere = NULL;
        d.patience = 0;
        ckca_open_array(ctx, &odd, &array, NULL);
        d.holdout_data = odd;
        CHECK(ckca_update(m, clear, &d, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "update: holdout_data: class 3 is \"cat\""), "%s", ckca_error(ctx));
        ckca_data_free(odd);
        array.class_names = NULL, array.classes = 3, odd = NULL;
        ckca_open_array(ctx, &odd, &array, NULL);
        d.holdout_data = odd;
        CHECK(ckca_update(m, clear, &d, NULL) == CKCA_ESHAPE && strstr(ckca_error(ctx), "update: holdout_data: the data has 3 classes"), "%s", ckca_error(ctx));
        ckca_data_free(odd);
        ckca_init(&elsewhere, NULL);
        array.classes = 4, odd = NULL;
        ckca_open_array(elsewhere, &odd, &array, NULL);
        d.holdout_data = odd;
        CHECK(ckca_update(m, clear, &d, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "holdout_data belongs to another context"), "%s", ckca_error(ctx));
        ckca_data_free(odd), ckca_context_free(elsewhere);
    }
    CHECK(same_weights(m, good) && m->updates == 1, "a refused update changed the model");
    ckca_data_free(tiny), ckca_data_free(part), ckca_model_free(m);
}

/* ---- the best epoch ---- */

static ckca_update_desc patient(void) {
    ckca_update_desc d = quick();
    d.epochs = 10;
    d.schedule = CKCA_SCHEDULE_CONSTANT; /* so that k epochs are the first k of more */
    d.adakd = CKCA_ADAKD_CONSTANT;       /* likewise: GROWTH depends on the number of steps */
    d.lr = 0.4f;
    d.patience = 3;
    d.keep_better = CKCA_OFF;
    return d;
}

static void test_patience(ckca_context *ctx, ckca_model *weak, const ckca_data *data) {
    ckca_data *train = NULL, *held = NULL, *half[2] = {NULL, NULL};
    ckca_model *m = copy_of(weak), *best = NULL;
    ckca_update_desc d = patient(), none = d;
    ckca_report report;
    ckca_score score, best_score = {0, 0, 0, 0};
    int index[2][MOST], i, epochs, stopped = 0;
    CHECK(ckca_holdout(data, 0.2f, d.seed, &train, &held) == CKCA_OK, "%s", ckca_error(ctx));
    for (i = 0; i < held->count; i++) index[i % 2][i / 2] = i;
    for (i = 0; i < 2; i++)
        CHECK(ckca_subset(&half[i], held, index[i], (held->count + 1 - i) / 2) == CKCA_OK, "%s", ckca_error(ctx));
    none.patience = 0;
    none.holdout = CKCA_OFF;
    for (epochs = 1; epochs <= d.epochs && !stopped; epochs++) { /* by hand: every number of epochs, until none was better for 3 */
        ckca_model *now = copy_of(weak);
        none.epochs = epochs;
        CHECK(ckca_update(now, train, &none, NULL) == CKCA_OK && ckca_evaluate(now, half[1], &score, NULL) == CKCA_OK, "%s", ckca_error(ctx));
        if (!best || score.top1 > best_score.top1 || (score.top1 == best_score.top1 && score.loss < best_score.loss)) {
            ckca_model_free(best);
            best = now;
            best_score = score;
            i = epochs - 1;
        } else
            ckca_model_free(now);
        stopped = epochs - 1 - i >= d.patience;
    }
    CHECK(ckca_update(m, data, &d, &report) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(report.best_epoch == i && i > 0 && stopped && epochs - 1 < d.epochs, "epoch %d, by hand %d of %d: choose another seed", report.best_epoch, i, epochs - 1);
    CHECK(report.steps == (epochs - 1) * ((train->count + d.batch - 1) / d.batch), "%d steps in %d epochs", report.steps, epochs - 1);
    CHECK(same_weights(m, best), "not the weights of the best epoch");
    CHECK(ckca_evaluate(m, half[0], &score, NULL) == CKCA_OK && report.after.count == half[0]->count && report.after.top1 == score.top1 &&
              report.after.loss == score.loss, "tested on %d pictures: %g, by hand %g", report.after.count, report.after.top1, score.top1);
    printf("   epoch %d of %d is the best\n", report.best_epoch, epochs - 1);
    ckca_model_free(m), ckca_model_free(best);
    ckca_data_free(train), ckca_data_free(held), ckca_data_free(half[0]), ckca_data_free(half[1]);
}

/* ---- kills and damaged files ---- */

static int stop_at(const ckca_progress *p, void *user) {
    return (void)p, --*(int *)user == 0;
}

static char *slurp(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    char *bytes = (char *)malloc(1 << 20);
    if (!f || !bytes) exit(2);
    *size = fread(bytes, 1, 1 << 20, f);
    fclose(f);
    return bytes;
}

static void spill(const char *path, const char *bytes, size_t size) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, size, f) != size) exit(2);
    fclose(f);
}

/* Stopped after every few steps and resumed, an update gives the same weights and the same report. */
static void check_resume(ckca_model *start, const ckca_data *data, ckca_update_desc d, int every, const char *what) {
    const char *state = DIR "/a.state";
    ckca_context *ctx = start->ctx;
    ckca_model *whole = copy_of(start);
    ckca_report expected, report;
    int left, stops = 0;
    CHECK(ckca_update(whole, data, &d, &expected) == CKCA_OK, "%s", ckca_error(ctx));
    d.state = state;
    d.state_seconds = 1e9f;
    d.progress = stop_at;
    d.user = &left;
    for (;;) { /* the state goes from process to process; the model is loaded anew */
        ckca_model *m = copy_of(start);
        ckca_status status;
        left = every;
        status = ckca_update(m, data, &d, &report);
        CHECK(status == CKCA_OK || (status == CKCA_ESTOP && there(state)), "%s: %s", what, ckca_error(ctx));
        if (status == CKCA_ESTOP && ++stops < 200) {
            ckca_model_free(m);
            continue;
        }
        CHECK(same_weights(m, whole) && same_report(&report, &expected), "%s: %d stops change the result", what, stops);
        CHECK(there(state) == !expected.kept_old, "%s: the state of a network that was%s kept is%s there", what,
              expected.kept_old ? " not" : "", there(state) ? "" : " not");
        if (!expected.kept_old) { /* killed before ckca_save: the result is still in the state */
            ckca_model *late = copy_of(start);
            left = 1 << 30;
            CHECK(ckca_update(late, data, &d, &report) == CKCA_OK && same_weights(late, whole) && report.steps == expected.steps &&
                      report.won == expected.won && report.best_epoch == expected.best_epoch, "%s: after the end: %s", what, ckca_error(ctx));
            ckca_model_free(late);
            CHECK(ckca_save(m, DIR "/a.safetensors") == CKCA_OK && !there(state), "%s", ckca_error(ctx));
            unlink(DIR "/a.safetensors");
        }
        ckca_model_free(m);
        break;
    }
    CHECK(stops > 2, "%s: %d stops", what, stops);
    ckca_model_free(whole);
}

static void test_resume(ckca_context *ctx, ckca_model *weak, ckca_model *good, const ckca_data *clear, const ckca_data *other) {
    const char *state = DIR "/b.state";
    ckca_update_desc d = quick();
    ckca_model *m;
    char *bytes, *best;
    size_t size, cut;
    int left, i;
    d.epochs = 8;
    check_resume(weak, clear, d, 9, "better");
    d.epochs = 2;
    d.lr = 3;
    check_resume(good, clear, d, 5, "worse");
    check_resume(weak, clear, patient(), 7, "patience");
    d = patient();
    d.holdout_data = other;
    check_resume(weak, clear, d, 11, "patience with a set of one's own");
    /* the state of an update with patience, damaged */
    left = 30;
    d.state = state;
    d.progress = stop_at;
    d.user = &left;
    m = copy_of(weak);
    CHECK(ckca_update(m, clear, &d, NULL) == CKCA_ESTOP, "%s", ckca_error(ctx));
    ckca_model_free(m);
    m = NULL;
    CHECK(ckca_load(ctx, &m, state) == CKCA_OK, "a training state is a checkpoint too: %s", ckca_error(ctx));
    ckca_model_free(m);
    bytes = slurp(state, &size);
    m = copy_of(weak);
    for (cut = 0; cut < size; cut += cut < 400 ? 97 : 4099) {
        spill(state, bytes, cut);
        left = 1;
        CHECK(ckca_update(m, clear, &d, NULL) == CKCA_EFORMAT, "cut to %d of %d bytes: %s", (int)cut, (int)size, ckca_error(ctx));
    }
    for (best = bytes; best < bytes + size - 8 && memcmp(best, " best=", 6);) best++;
    CHECK(best < bytes + size - 8, "no best epoch in the state");
    for (i = 0; i < 4; i++) { /* another name, another digit, an epoch and a number of pictures that cannot be */
        static const int at[4] = {2, 6 + 15, 6 + 3, 6 + 17 + 2};
        static const char with[4] = {'B', 'g', '1', '1'};
        const char was = best[at[i]];
        best[at[i]] = with[i];
        spill(state, bytes, size);
        best[at[i]] = was;
        CHECK(ckca_update(m, clear, &d, NULL) == CKCA_EFORMAT && strstr(ckca_error(ctx), "b.state: its best epoch cannot be read"), "case %d: %s", i, ckca_error(ctx));
    }
    for (best = bytes; best < bytes + size - 8 && memcmp(best, "\"best.", 6);) best++;
    best[1] = 'B';
    spill(state, bytes, size);
    best[1] = 'b';
    CHECK(ckca_update(m, clear, &d, NULL) == CKCA_EFORMAT && strstr(ckca_error(ctx), "b.state: it has no tensor best."), "%s", ckca_error(ctx));
    CHECK(same_weights(m, weak), "a refused state changed the model");
    spill(state, bytes, size);
    d.holdout_data = NULL; /* other pictures choose the epoch */
    CHECK(ckca_update(m, clear, &d, NULL) == CKCA_EINVAL && strstr(ckca_error(ctx), "another update"), "%s", ckca_error(ctx));
    ckca_model_free(m);
    free(bytes);
    unlink(state);
}

/* ---- failing allocations ---- */

static long alloc_left = 1 << 30, alloc_open;
static void *scarce(size_t bytes, void *user) {
    (void)user;
    if (alloc_left-- == 0) return NULL;
    alloc_open++;
    return malloc(bytes);
}
static void scarce_free(void *memory, size_t bytes, void *user) {
    (void)bytes, (void)user;
    alloc_open--;
    free(memory);
}

static void test_allocations(void) {
    ckca_desc desc;
    ckca_context *ctx = NULL;
    ckca_model *start = NULL;
    ckca_model_desc net;
    ckca_update_desc d = patient();
    ckca_data *data;
    ckca_status status = CKCA_ENOMEM;
    long k, open;
    memset(&desc, 0, sizeof desc);
    memset(&net, 0, sizeof net);
    desc.threads = 1;
    desc.alloc = scarce;
    desc.release = scarce_free;
    net.height = net.width = SIZE;
    net.classes = CLASSES;
    net.width_base = 2;
    CHECK(ckca_init(&ctx, &desc) == CKCA_OK && ckca_resnet(ctx, &start, "resnet8", &net) == CKCA_OK, "%s", ckca_error(ctx));
    data = pictures(ctx, 30, 100, 1);
    d.epochs = 2;
    d.holdout = 0.3f;
    CHECK(ckca_update(start, data, &(ckca_update_desc){.epochs = 1}, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    open = alloc_open;
    for (k = 0; k < 1000 && status; k++) {
        ckca_model *m = NULL;
        ckca_data *train = NULL, *held = NULL;
        d.keep_better = k % 2 ? 0 : CKCA_OFF;
        CHECK(ckca_model_copy(&m, start) == CKCA_OK, "%s", ckca_error(ctx));
        alloc_left = k;
        status = ckca_holdout(data, 0.2f, 1, &train, &held);
        if (!status) status = ckca_update(m, data, &d, NULL);
        alloc_left = 1 << 30;
        CHECK(!status || (status == CKCA_ENOMEM && same_weights(m, start)), "allocation %ld: %s", k, ckca_error(ctx));
        ckca_model_free(m), ckca_data_free(train), ckca_data_free(held);
        CHECK(alloc_open == open, "allocation %ld failing leaves %ld blocks", k, alloc_open - open);
    }
    CHECK(!status && k > 50, "%ld allocations failed in turn", k);
    printf("   %ld allocations failed one by one\n", k - 1);
    ckca_model_free(start), ckca_data_free(data), ckca_context_free(ctx);
    CHECK(alloc_open == 0, "%ld blocks are left", alloc_open);
}

int main(void) {
    ckca_context *ctx = NULL;
    ckca_model_desc net;
    ckca_model *fresh = NULL, *weak, *good;
    ckca_data *clear, *other, *noisy;
    ckca_update_desc d = quick();
    test_enter();
    mkdir(DIR, 0777);
    memset(&net, 0, sizeof net);
    net.height = net.width = SIZE;
    net.classes = CLASSES;
    net.width_base = 2;
    net.seed = 1;
    ckca_init(&ctx, NULL);
    clear = pictures(ctx, 200, 170, 1);
    other = pictures(ctx, 60, 170, 2);
    noisy = pictures(ctx, 24, 225, 3);
    test_group("McNemar's test");
    test_mcnemar();
    test_group("20 updates under the rule");
    test_rule();
    test_group("the hold-out");
    test_holdout(ctx);
    CHECK(ckca_resnet(ctx, &fresh, "resnet8", &net) == CKCA_OK, "%s", ckca_error(ctx));
    weak = copy_of(fresh), good = copy_of(fresh);
    CHECK(ckca_update(weak, noisy, &d, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    d.epochs = 20;
    CHECK(ckca_update(good, other, &d, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    test_group("what zero means");
    test_defaults(ctx, good, fresh, clear);
    test_group("updates, better, worse and the same");
    test_updates(weak, good, clear);
    test_group("a hold-out of one's own, and mistakes");
    test_own_set(ctx, good, clear, noisy);
    test_group("the best epoch");
    test_patience(ctx, weak, clear);
    test_group("kills and damaged training states");
    test_resume(ctx, weak, good, clear, other);
    test_group("failing allocations");
    test_allocations();
    ckca_model_free(fresh), ckca_model_free(weak), ckca_model_free(good);
    ckca_data_free(clear), ckca_data_free(other), ckca_data_free(noisy), ckca_context_free(ctx);
    rmdir(DIR);
    test_leave();
    return test_summary();
}
