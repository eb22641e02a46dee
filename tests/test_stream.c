/* Pictures that are not held decoded: every form of a set gives the same bits; crops of the full-size picture against
   plain loops; lists, joins and splits without the files; files that vanish, change or are corrupt. */
#include <stdlib.h>
static long stb_calls; /* allocations by stb_image outside a decoder's own memory */
static void count_call(void) {
#ifdef __GNUC__
    __atomic_fetch_add(&stb_calls, 1, __ATOMIC_RELAXED); /* by any thread */
#endif
}
static void *stb_alloc(size_t bytes) { return count_call(), calloc(1, bytes); }
static void *stb_again(void *old, size_t bytes) { return count_call(), realloc(old, bytes); }
#define STBI_MALLOC(bytes) stb_alloc(bytes)
#define STBI_REALLOC(old, bytes) stb_again(old, bytes)
#define STBI_FREE(old) free(old)
#define CKCA_IMPLEMENTATION
#include "ckca.h"

#include "test.h"

#include "files.h"
#include "pictures.h"

#if !defined(CKCA__POSIX) || defined(CKCA_NO_STB_IMAGE)
int main(void) {
    printf("SKIPPED: needs POSIX and stb_image\n");
    return test_summary();
}
#else
#include <utime.h>

enum { SIDE = 16, COUNT = 22, BATCH = 5 };
#define DIR_ "build/set"

/* Writes drawn picture k of h x w; a file of it, as often as asked. */
static void put_drawn(const char *path, int k, int h, int w) {
    unsigned char *rgb = (unsigned char *)malloc((size_t)h * (size_t)w * 3);
    unsigned char *out = (unsigned char *)malloc(1024 + 8 * ((size_t)h + 16) * ((size_t)w + 16));
    int y, x;
    if (!rgb || !out) abort();
    for (y = 0; y < h; y++)
        for (x = 0; x < w; x++) drawn_pixel(k, 2, y, x, rgb + 3 * (y * w + x));
    put(path, out, jpeg_write(rgb, h, w, 12, out));
    free(rgb);
    free(out);
}

/* Eleven pictures of two classes each: of many sizes, one in five of the network's own, one turned, one PNG. */
static void put_set(void) {
    static const char exif[] = "\377\341\0\42Exif\0\0MM\0\52\0\0\0\10\0\1\1\22\0\3\0\0\0\1\0\6\0\0\0\0\0\0";
    char path[64];
    int k;
    for (k = 0; k < COUNT; k++) {
        snprintf(path, sizeof path, DIR_ "/%c/%02d.jpg", "ab"[k % 2], k);
        put_drawn(path, k, k % 5 == 2 ? SIDE : 40 + 7 * (k % 4), k % 5 == 2 ? SIDE : 70 - 5 * (k % 3));
    }
    put(DIR_ "/b/99.png", rgb_png, sizeof rgb_png);
    { /* the picture 00.jpg, turned */
        unsigned char bytes[20000];
        size_t size;
        FILE *file = fopen(DIR_ "/a/00.jpg", "rb");
        memcpy(bytes, "\377\330", 2);
        memcpy(bytes + 2, exif, 36);
        size = 38 + (file && fseek(file, 2, SEEK_SET) == 0 ? fread(bytes + 38, 1, sizeof bytes - 38, file) : 0);
        if (file) fclose(file);
        put(DIR_ "/a/turned.jpg", bytes, size);
    }
}

static ckca_data *open_set(ckca_context *ctx, ckca_storage storage, int short_side, int skip) {
    ckca_data *data = NULL;
    ckca_data_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = SIDE;
    desc.storage = storage;
    desc.short_side = short_side;
    desc.skip_unreadable = skip;
    if (ckca_open_folder(ctx, &data, DIR_, &desc)) printf("%s\n", ckca_error(ctx)), abort();
    return data;
}

static ckca_model *new_model(ckca_context *ctx) {
    ckca_model *model = NULL;
    ckca_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = SIDE;
    desc.classes = 2;
    desc.width_base = 4;
    desc.seed = 3;
    if (ckca_resnet(ctx, &model, "resnet8", &desc)) abort();
    return model;
}

/* ---- the same bits in every form ---- */

typedef struct setting {
    const char *name;
    int short_side;
    ckca_augment augment;
} setting;
static const setting settings[] = {{"plain", 0, {0, 0, 0, 0, 0}},
                                   {"padded, flipped, jittered", 0, {2, 1, 0, 0, 0.4f}},
                                   {"cropped, flipped, jittered", 0, {0, 1, 1, 0.1f, 0.4f}},
                                   {"short side 24", 24, {0, 0, 0, 0, 0}},
                                   {"short side 24, cropped", 24, {0, 1, 1, 0.3f, 0}}};
enum { VALUES = SIDE * SIDE * 3, ALL = COUNT + 2 };

/* Pictures of two epochs, in an order with a repeat. */
static void get_all(ckca_context *ctx, const ckca_data *data, const ckca_augment *augment, float *out) {
    ckca_model *model = new_model(ctx);
    int index[ALL], labels[ALL], i, epoch;
    for (i = 0; i < ALL; i++) index[i] = (7 * i + 3) % ALL;
    index[4] = index[9];
    for (epoch = 0; epoch < 2; epoch++, out += ALL * VALUES) {
        CHECK(!ckca_get_batch(model, data, index, ALL, augment, 5, epoch, out, labels), "get_batch: %s", ckca_error(ctx));
        for (i = 0; i < ALL; i++) CHECK(labels[i] == ckca_label(data, index[i]), "label %d of position %d", labels[i], i);
    }
    ckca_model_free(model);
}

static void test_forms(void) {
    static float want[2 * ALL * VALUES], got[2 * ALL * VALUES];
    size_t s;
    int storage, threads;
    for (s = 0; s < sizeof settings / sizeof *settings; s++)
        for (storage = CKCA_STORAGE_DECODED; storage < CKCA_STORAGE_COUNT; storage++)
            for (threads = 1; threads <= 3; threads += 2) {
                ckca_context *ctx = new_context(threads);
                ckca_data *data = open_set(ctx, (ckca_storage)storage, settings[s].short_side, 0);
                const int first = storage == CKCA_STORAGE_DECODED && threads == 1;
                ckca_data_info info;
                unsigned char copy[VALUES];
                ckca_data_info_get(data, &info);
                CHECK(info.count == ALL && info.storage == (ckca_storage)storage, "%d pictures, storage %d", info.count,
                      info.storage);
                CHECK(!!ckca_pixels(data, 3) == (storage == CKCA_STORAGE_DECODED), "pixels of storage %d", storage);
                CHECK(!ckca_copy_pixels(data, 3, copy) && (!ckca_pixels(data, 3) || !memcmp(copy, ckca_pixels(data, 3), VALUES)),
                      "copy: %s", ckca_error(ctx));
                expect(ctx, "copy", ckca_copy_pixels(data, ALL, copy), CKCA_EINVAL, "i is 24, there are 24 pictures");
                get_all(ctx, data, &settings[s].augment, first ? want : got);
                CHECK(first || !memcmp(want, got, sizeof want), "%s: storage %d with %d threads gives other bits",
                      settings[s].name, storage, threads);
                ckca_data_free(data);
                ckca_context_free(ctx);
            }
}

/* Trains three epochs of BATCH pictures; stops behind SGD step `stop` if it is not 0, and goes on from the state. */
typedef struct stopping {
    int steps, stop;
    double waiting;
} stopping;
static int on_step(const ckca_progress *p, void *user) {
    stopping *s = (stopping *)user;
    s->waiting = p->waiting;
    return ++s->steps == s->stop;
}
static void train(ckca_context *ctx, const ckca_data *data, int stop, unsigned char *out, size_t capacity, size_t *size) {
    ckca_model *model = new_model(ctx);
    ckca_update_desc desc;
    ckca_report report;
    ckca_score score;
    stopping s = {0, 0, -1};
    int round;
    memset(&desc, 0, sizeof desc);
    desc.epochs = 3;
    desc.batch = BATCH;
    desc.augment = settings[2].augment;
    desc.progress = on_step;
    desc.user = &s;
    desc.state = stop ? "build/net.state" : NULL;
    s.stop = stop;
    for (round = 0; round <= (stop > 0); round++) {
        const ckca_status expected = stop && !round ? CKCA_ESTOP : CKCA_OK;
        ckca_status status = ckca_update(model, data, &desc, &report);
        CHECK(status == expected, "update: %s", ckca_error(ctx));
        CHECK(s.waiting >= 0 && s.waiting <= 1 && report.waiting >= 0 && report.waiting <= 1, "waiting %g, %g", s.waiting,
              report.waiting);
        if (expected) {
            ckca_model_free(model);
            model = new_model(ctx);
        }
    }
    CHECK(!ckca_evaluate(model, data, &score, NULL) && score.count == ALL, "evaluate: %s", ckca_error(ctx));
    *size = 0;
    CHECK(!ckca_save_memory(model, out, capacity, size), "save: %s", ckca_error(ctx));
    if (stop) remove("build/net.state");
    ckca_model_free(model);
}

static void test_training(void) {
    static unsigned char want[400000], got[400000];
    size_t size = 0, other;
    int storage, threads;
    for (storage = CKCA_STORAGE_DECODED; storage < CKCA_STORAGE_COUNT; storage++)
        for (threads = 1; threads <= 3; threads++) {
            ckca_context *ctx = new_context(threads);
            ckca_data *data = open_set(ctx, (ckca_storage)storage, 0, 0);
            if (!size)
                train(ctx, data, 0, want, sizeof want, &size);
            else {
                train(ctx, data, threads == 2 ? 8 : 0, got, sizeof got, &other);
                CHECK(size == other && !memcmp(want, got, size), "storage %d, %d threads: other weights", storage, threads);
            }
            ckca_data_free(data);
            ckca_context_free(ctx);
        }
}

/* After the first batches, nothing is allocated: neither by the context nor by stb_image. */
static memory counted;
static long calls_at[32];
static int count_calls(const ckca_progress *p, void *user) {
    int *steps = (int *)user;
    (void)p;
    if (*steps < 32) calls_at[(*steps)++] = counted.calls + stb_calls;
    return 0;
}
static void test_no_allocation(void) {
    ckca_context *ctx = NULL;
    ckca_desc desc;
    ckca_update_desc update;
    ckca_model *model;
    ckca_data *data;
    int steps = 0, i;
    memset(&desc, 0, sizeof desc);
    memset(&update, 0, sizeof update);
    memset(&counted, 0, sizeof counted);
    desc.threads = 2;
    desc.alloc = test_alloc;
    desc.release = test_release;
    desc.user = &counted;
    if (ckca_init(&ctx, &desc)) abort();
    data = open_set(ctx, CKCA_STORAGE_STREAM, 0, 0);
    model = new_model(ctx);
    update.epochs = 3;
    update.batch = BATCH;
    update.augment = settings[2].augment;
    update.progress = count_calls;
    update.user = &steps;
    CHECK(!ckca_update(model, data, &update, NULL) && steps == 15, "update: %s", ckca_error(ctx));
    for (i = 1; i < steps; i++) CHECK(calls_at[i] == calls_at[0], "step %d allocates %ld times", i, calls_at[i] - calls_at[i - 1]);
    ckca_model_free(model);
    ckca_data_free(data);
    ckca_context_free(ctx);
    CHECK(counted.live == 0, "%.0f bytes are left", (double)counted.live);
}

/* ---- crops against plain loops ---- */

/* The triangle filter in doubles, one side: in[n values, step apart] to value x of `full`. */
static double filtered(const double *in, int n, int step, int full, int x) {
    const double scale = (double)n / full, support = scale > 1 ? scale : 1, center = (x + 0.5) * scale;
    double sum = 0, total = 0;
    int i;
    for (i = 0; i < n; i++) {
        double weight = 1 - fabs((i + 0.5 - center) / support);
        if (weight <= 0) continue;
        sum += weight * in[i * step];
        total += weight;
    }
    return sum / total;
}

/* Value (y, x, c) of the part [top, left, h, w] of a picture of `wide` pixels per row, resized to height x width. */
static double resized(const unsigned char *rgb, int wide, int top, int left, int h, int w, int height, int width, int y,
                      int x, int c) {
    static double row[512], column[512];
    int i, j;
    for (i = 0; i < h; i++) {
        for (j = 0; j < w; j++) row[j] = rgb[3 * ((top + i) * wide + left + j) + c];
        column[i] = filtered(row, w, 1, width, x);
    }
    return filtered(column, h, 1, height, y);
}

static void test_crops(ckca_context *ctx) {
    enum { H = 75, W = 98 };
    static unsigned char rgb[H * W * 3], out[8 * 300 * 300];
    static float got[VALUES];
    static const float mean[3] = {0, 0, 0}, std[3] = {1 / 255.0f, 1 / 255.0f, 1 / 255.0f};
    ckca_model_desc net;
    ckca_data_desc desc;
    ckca_augment augment;
    ckca_data *data = NULL;
    ckca_model *model = NULL;
    int epoch, y, x, c, index = 0;
    double worst, sum;
#ifdef CKCA_TURBOJPEG
    const double most = 12, most_mean = 2; /* reduced while it is decoded */
#else
    const double most = 1.01, most_mean = 0.4;
#endif
    put_drawn("build/one/a/x.jpg", 4, H, W);
    memset(&desc, 0, sizeof desc);
    desc.height = H, desc.width = W, desc.channels = 3;
    CHECK(!ckca_read_picture(ctx, "build/one/a/x.jpg", &desc, rgb), "%s", ckca_error(ctx));
    memset(&augment, 0, sizeof augment);
    augment.resized_crop = 1;
    augment.crop_min = 0.1f;
    desc.height = desc.width = SIDE;
    desc.storage = CKCA_STORAGE_STREAM;
    CHECK(!ckca_open_folder(ctx, &data, "build/one", &desc), "%s", ckca_error(ctx));
    memset(&net, 0, sizeof net);
    net.height = net.width = SIDE;
    net.classes = 1;
    net.mean = mean;
    net.std = std;
    CHECK(!ckca_resnet(ctx, &model, "resnet8", &net), "%s", ckca_error(ctx));
    for (epoch = 0; epoch < 8; epoch++) {
        ckca__framing f;
        ckca__augment_framing(&augment, 9, epoch, 0, H, W, &f);
        CHECK(!ckca_get_batch(model, data, &index, 1, &augment, 9, epoch, got, NULL), "%s", ckca_error(ctx));
        for (y = 0, worst = sum = 0; y < SIDE; y++)
            for (x = 0; x < SIDE; x++)
                for (c = 0; c < 3; c++) {
                    double d = fabs(got[(y * SIDE + x) * 3 + c] -
                                    resized(rgb, W, f.top, f.left, f.height, f.width, SIDE, SIDE, y, x, c));
                    sum += d;
                    if (d > worst) worst = d;
                }
        CHECK(worst < most && sum / VALUES < most_mean, "crop %d x %d at %d, %d: off by up to %g, mean %g", f.height,
              f.width, f.top, f.left, worst, sum / VALUES);
    }
    /* short side 20: 20 x 26, of which (2, 5) to (18, 21) are wanted */
    desc.short_side = 20;
    CHECK(!ckca_read_picture(ctx, "build/one/a/x.jpg", &desc, out), "%s", ckca_error(ctx));
    for (y = 0, worst = sum = 0; y < SIDE; y++)
        for (x = 0; x < SIDE; x++)
            for (c = 0; c < 3; c++) {
                double d = fabs(out[(y * SIDE + x) * 3 + c] - resized(rgb, W, 0, 0, H, W, 20, 26, y + 2, x + 5, c));
                sum += d;
                if (d > worst) worst = d;
            }
    CHECK(worst < most && sum / VALUES < most_mean, "short side: off by up to %g, mean %g", worst, sum / VALUES);
    desc.short_side = 12;
    expect(ctx, "short side", ckca_read_picture(ctx, "build/one/a/x.jpg", &desc, out), CKCA_EINVAL,
           "short_side is 12, too short to crop 16 x 16");
    desc.short_side = 15;
    expect(ctx, "short side", ckca_open_folder(ctx, &data, "build/one", &desc), CKCA_EINVAL, "short_side is 15");
    ckca_model_free(model);
    ckca_data_free(data);
    remove_all("build/one");
}

/* ---- which form, splits, joins, lists ---- */

static void test_budget(ckca_context *ctx) {
    ckca_data *data = NULL;
    ckca_data_desc desc;
    ckca_data_info info;
    int i;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = 160; /* 24 pictures of 76,800 bytes: 1.8 MiB */
    for (i = 0; i < 2; i++) {
        desc.budget_mb = 1 + i;
        CHECK(!ckca_open_folder(ctx, &data, DIR_, &desc), "%s", ckca_error(ctx));
        ckca_data_info_get(data, &info);
        CHECK(info.storage == (i ? CKCA_STORAGE_DECODED : CKCA_STORAGE_STREAM), "%d MiB: storage %d", 1 + i, info.storage);
        ckca_data_free(data);
    }
    data = NULL;
    desc.budget_mb = 1;
    desc.storage = CKCA_STORAGE_DECODED;
    expect(ctx, "budget", ckca_open_folder(ctx, &data, DIR_, &desc), CKCA_EINVAL,
           "24 pictures take 1.8 MiB decoded, budget_mb of ckca_data_desc allows 1");
    desc.budget_mb = -1;
    expect(ctx, "budget", ckca_open_folder(ctx, &data, DIR_, &desc), CKCA_EINVAL, "budget_mb is -1, must be 0 to 16777216");
    desc.budget_mb = 0;
    desc.storage = CKCA_STORAGE_COUNT;
    expect(ctx, "storage", ckca_open_folder(ctx, &data, DIR_, &desc), CKCA_EINVAL, "storage is 4, must be 0 to 3");
    CHECK(!data, "data was set");
}

static void test_views(ckca_context *ctx) {
    static float want[2 * ALL * VALUES], got[2 * ALL * VALUES];
    static unsigned char grey[VALUES];
    ckca_data *set[2], *parts[2][4], *joined, *more, *other[3];
    static const char *const names[2] = {"a", "b"};
    int label = 1, i, k;
    ckca_array array;
    ckca_split_desc split;
    ckca_data_info info;
    memset(&split, 0, sizeof split);
    split.stratified = 1;
    for (k = 0; k < VALUES; k++) grey[k] = (unsigned char)(5 * k);
    memset(&array, 0, sizeof array);
    array.pixels = grey;
    array.labels = &label;
    array.count = 1;
    array.height = array.width = SIDE;
    array.channels = 3;
    array.classes = 2;
    array.class_names = names;
    set[0] = open_set(ctx, CKCA_STORAGE_DECODED, 0, 0);
    set[1] = open_set(ctx, CKCA_STORAGE_STREAM, 0, 0);
    CHECK(!rename(DIR_, "build/away"), "rename"); /* nothing below may read a file */
    for (i = 0; i < 2; i++) CHECK(!ckca_split(set[i], 3, &split, parts[i]), "%s", ckca_error(ctx));
    for (k = 0; k < parts[0][1]->count; k++)
        CHECK(ckca_label(parts[0][1], k) == ckca_label(parts[1][1], k) && parts[0][1]->index[k] == parts[1][1]->index[k],
              "split: picture %d", k);
    CHECK(!ckca_join(&joined, parts[1], 3), "%s", ckca_error(ctx));
    CHECK(joined->store == set[1]->store, "a join of one store's views copies");
    ckca_data_free(joined);
    CHECK(!ckca_open_array(ctx, &parts[0][3], &array, NULL) && !ckca_open_array(ctx, &parts[1][3], &array, NULL), "array");
    CHECK(!rename("build/away", DIR_), "rename");
    parts[1][3]->store->height++;
    expect(ctx, "join", ckca_join(&joined, parts[1], 4), CKCA_ESHAPE, "parts[3] has pictures of 17 x 16 x 3");
    parts[1][3]->store->height--;
    /* a stream, a compressed set, a decoded folder and an array, joined: as the same four decoded */
    other[0] = open_set(ctx, CKCA_STORAGE_COMPRESSED, 0, 0);
    ckca_data_free(parts[1][1]);
    CHECK(!ckca_subset(&parts[1][1], other[0], parts[0][1]->index, parts[0][1]->count), "%s", ckca_error(ctx));
    ckca_data_free(other[0]);
    other[0] = open_set(ctx, CKCA_STORAGE_DECODED, 0, 0);
    ckca_data_free(parts[1][2]);
    CHECK(!ckca_subset(&parts[1][2], other[0], parts[0][2]->index, parts[0][2]->count), "%s", ckca_error(ctx));
    ckca_data_free(other[0]);
    CHECK(!rename(DIR_, "build/away"), "rename");
    CHECK(!ckca_join(&more, parts[0], 4) && !ckca_join(&joined, parts[1], 4), "%s", ckca_error(ctx));
    ckca_data_info_get(joined, &info);
    CHECK(info.storage == CKCA_STORAGE_STREAM && info.count == ALL + 1, "storage %d, %d pictures", info.storage, info.count);
    for (i = 0; i < 4; i++) ckca_data_free(parts[0][i]), ckca_data_free(parts[1][i]);
    ckca_data_free(set[0]), ckca_data_free(set[1]);
    CHECK(!rename("build/away", DIR_), "rename");
    for (i = 0; i < 2; i++) {
        get_all(ctx, more, &settings[2 * i].augment, want);
        get_all(ctx, joined, &settings[2 * i].augment, got);
        CHECK(!memcmp(want, got, sizeof want), "%s: the join has other bits", settings[2 * i].name);
    }
    ckca_data_free(more), ckca_data_free(joined);
}

static void test_lists(ckca_context *ctx) {
    static const struct {
        const char *text, *words;
        int size; /* 0: strlen */
    } bad[] = {{"", "lists no pictures", 0},
               {"\n\r\n", "lists no pictures", 0},
               {"set/a/00.jpg\t0\nset/a/02.jpg 1\n", "line 2 is not PATH<TAB>LABEL", 0},
               {"set/a/00.jpg\t\n", "line 1 is not PATH<TAB>LABEL", 0},
               {"set/a/00.jpg\t\r\n", "line 1 is not PATH<TAB>LABEL", 0},
               {"\t1\n", "line 1 is not PATH<TAB>LABEL", 0},
               {"set/a/00.jpg\t-1\n", "line 1: its label is not a number from 0", 0},
               {"set/a/00.jpg\t1x\n", "line 1: its label is not a number from 0", 0},
               {"set/a/00.jpg\t2\n", "line 1: its label is 2, there are 2 classes", 0},
               {"set/a/00.jpg\t99999999999999999999999\n", "line 1: its label is 99999999999999999999, there are 2", 0},
               {"set/a/0\0.jpg\t1\n", "line 1 has a zero byte", 15},
               {"set/a/00.jpg\t1\nset/none.jpg\t0", "set/none.jpg: cannot be opened", 0},
               {"set/a\t1\n", "set/a: not a regular file", 0}};
    static const char good[] = "set/a/00.jpg\t0\r\n\nset/b/01.jpg\t1\nset/b/03.jpg\t01";
    unsigned char one[VALUES], two[VALUES];
    ckca_data *data = NULL;
    ckca_data_desc desc;
    ckca_data_info info;
    size_t i;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = SIDE;
    desc.channels = 3;
    desc.storage = CKCA_STORAGE_STREAM;
    desc.classes = 2;
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        put("build/list.txt", bad[i].text, bad[i].size ? (size_t)bad[i].size : strlen(bad[i].text));
        CHECK(ckca_open_list(ctx, &data, "build/list.txt", &desc) && !data && strstr(ckca_error(ctx), bad[i].words),
              "list %d: \"%s\", not \"%s\"", (int)i, ckca_error(ctx), bad[i].words);
    }
    expect(ctx, "list", ckca_open_list(ctx, &data, "build/none.txt", &desc), CKCA_EIO, "build/none.txt: cannot be opened");
    expect(ctx, "list", ckca_open_list(ctx, &data, NULL, &desc), CKCA_EINVAL, "NULL");
    desc.classes = 0;
    for (i = 0; i < sizeof good; i++) { /* every beginning of it is refused or a shorter list */
        put("build/list.txt", good, i);
        if (ckca_open_list(ctx, &data, "build/list.txt", &desc)) {
            CHECK(!data && *ckca_error(ctx), "list of %d bytes", (int)i);
            continue;
        }
        ckca_data_info_get(data, &info);
        CHECK(info.count == 1 + (i > 30) + (i > 45), "list of %d bytes: %d pictures", (int)i, info.count);
        if (i + 1 < sizeof good) ckca_data_free(data), data = NULL;
    }
    CHECK(data && info.classes == 2 && !strcmp(info.class_names[1], "1") && ckca_label(data, 0) == 0 &&
              ckca_label(data, 2) == 1, "list: %s", ckca_error(ctx));
    desc.storage = CKCA_STORAGE_AUTO;
    CHECK(!ckca_copy_pixels(data, 1, one) && !ckca_read_picture(ctx, DIR_ "/b/01.jpg", &desc, two) &&
              !memcmp(one, two, VALUES), "%s", ckca_error(ctx));
    ckca_data_free(data);
    remove("build/list.txt");
}

static ckca_status job_stream(ckca_context *ctx) { /* open, join, a batch */
    ckca_data *data = NULL, *again = NULL, *joined = NULL, *parts[2];
    ckca_model *model = NULL;
    ckca_data_desc desc;
    ckca_model_desc net;
    static float pictures[4 * VALUES];
    static const float mean[3] = {0, 0, 0}, std[3] = {1, 1, 1};
    static const int index[4] = {0, 30, 7, 20};
    ckca_status status;
    memset(&desc, 0, sizeof desc);
    memset(&net, 0, sizeof net);
    desc.height = desc.width = net.height = net.width = SIDE;
    desc.storage = CKCA_STORAGE_STREAM;
    net.width_base = 1;
    net.classes = 2;
    net.mean = mean;
    net.std = std;
    status = ckca_open_folder(ctx, &data, DIR_, &desc);
    desc.storage = CKCA_STORAGE_COMPRESSED;
    if (!status) status = ckca_open_folder(ctx, &again, DIR_, &desc);
    parts[0] = data;
    parts[1] = again;
    if (!status) status = ckca_join(&joined, parts, 2);
    if (!status) status = ckca_resnet(ctx, &model, "resnet8", &net);
    if (!status) status = ckca_get_batch(model, joined, index, 4, &settings[2].augment, 1, 0, pictures, NULL);
    ckca_model_free(model);
    ckca_data_free(data), ckca_data_free(again), ckca_data_free(joined);
    return status;
}
static ckca_status job_list(ckca_context *ctx) {
    ckca_data *data = NULL;
    ckca_data_desc desc;
    ckca_status status;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = SIDE;
    desc.storage = CKCA_STORAGE_STREAM;
    status = ckca_open_list(ctx, &data, "build/list.txt", &desc);
    ckca_data_free(data);
    return status;
}

/* ---- files that vanish, change, or are corrupt ---- */

/* Changes one byte of a file, but not its size and time. */
static void damage(const char *path, long at, int value) {
    struct stat about;
    struct utimbuf times;
    FILE *file = fopen(path, "r+b");
    if (!file || stat(path, &about) || fseek(file, at, SEEK_SET)) abort();
    fputc(value, file);
    fclose(file);
    times.actime = times.modtime = about.st_mtime;
    utime(path, &times);
}
static void set_time(const char *path, long by) {
    struct stat about;
    struct utimbuf times;
    if (stat(path, &about)) abort();
    times.actime = times.modtime = about.st_mtime + by;
    utime(path, &times);
}

static void test_lost(int threads) {
    static const char *const path = DIR_ "/a/04.jpg";
    static unsigned char before[400000], after[400000];
    ckca_context *ctx = new_context(threads);
    ckca_model *model = new_model(ctx);
    ckca_data *data, *skipping;
    ckca_data_info info;
    ckca_update_desc desc;
    ckca_score score;
    size_t size, again;
    int round, i, of_a = -1;
    memset(&desc, 0, sizeof desc);
    desc.epochs = 2;
    desc.batch = BATCH;
    desc.augment = settings[2].augment;
    for (round = 0; round < 4; round++) { /* vanishes, grows, gets another time, is damaged with size and time kept */
        static const char *const words[4] = {"a/04.jpg: cannot be opened: No such file", "a/04.jpg: has changed since its set was opened",
                                             "a/04.jpg: has changed since its set was opened", "a/04.jpg: cannot be decoded"};
        const ckca_status expected = round < 3 ? CKCA_EIO : CKCA_EFORMAT;
        put_drawn(path, 4, 40, 65);
        data = open_set(ctx, CKCA_STORAGE_STREAM, 0, 0);
        skipping = open_set(ctx, CKCA_STORAGE_STREAM, 0, 1);
        if (round == 0) { /* class names, mean and std */
            CHECK(!ckca_evaluate(model, data, NULL, NULL), "%s", ckca_error(ctx));
            remove(path);
        }
        if (round == 1) put_drawn(path, 4, 41, 65);
        if (round == 2) set_time(path, -7);
        if (round == 3) damage(path, 1, 0);
        CHECK(!ckca_save_memory(model, before, sizeof before, &size), "%s", ckca_error(ctx));
        expect(ctx, "update", ckca_update(model, data, &desc, NULL), expected, words[round]);
        CHECK(!ckca_save_memory(model, after, sizeof after, &again) && size == again && !memcmp(before, after, size),
              "the model has changed");
        expect(ctx, "evaluate", ckca_evaluate(model, data, NULL, NULL), expected, words[round]);
        CHECK(!ckca_evaluate(model, skipping, &score, NULL) && score.count == ALL - 1, "evaluate: %d pictures, %s",
              score.count, ckca_error(ctx));
        ckca_data_info_get(skipping, &info);
        CHECK(info.unreadable == 1 && info.first_unreadable && strstr(info.first_unreadable, words[round]),
              "%d unreadable: %s", info.unreadable, info.first_unreadable ? info.first_unreadable : "none");
        if (round == 3) {
            int pick[3];
            float got[3 * VALUES];
            int labels[3];
            CHECK(!ckca_update(model, skipping, &desc, NULL), "%s", ckca_error(ctx));
            for (i = 0; i < ALL; i++)
                if (strstr(skipping->store->source[i].path, "a/04.jpg")) of_a = i;
            pick[0] = of_a, pick[1] = ALL - 1, pick[2] = of_a; /* it is replaced by its neighbours */
            CHECK(!ckca_get_batch(model, skipping, pick, 3, NULL, 0, 0, got, labels) && labels[0] == 1 && labels[2] == 1 &&
                      !memcmp(got, got + VALUES, VALUES * sizeof *got) && !memcmp(got, got + 2 * VALUES, VALUES * sizeof *got),
                  "substitutes: %s", ckca_error(ctx));
            expect(ctx, "nothing left", ckca_get_batch(model, skipping, pick, 1, NULL, 0, 0, got, NULL), CKCA_EFORMAT, words[3]);
        }
        ckca_data_free(data), ckca_data_free(skipping);
    }
    put_drawn(path, 4, 40, 65);
    ckca_model_free(model);
    ckca_context_free(ctx);
}

/* Another path, size or time of one file: another fingerprint, so that a state is refused. */
static void test_fingerprint(ckca_context *ctx) {
    ckca_data *data = open_set(ctx, CKCA_STORAGE_STREAM, 0, 0), *other;
    ckca_model *model = new_model(ctx);
    ckca_update_desc desc;
    stopping s = {0, 3, 0};
    const uint64_t first = ckca_data_fingerprint(data);
    memset(&desc, 0, sizeof desc);
    desc.batch = BATCH;
    desc.state = "build/net.state";
    desc.progress = on_step;
    desc.user = &s;
    CHECK(ckca_update(model, data, &desc, NULL) == CKCA_ESTOP, "%s", ckca_error(ctx));
    ckca_model_free(model);
    model = new_model(ctx);
    set_time(DIR_ "/b/11.jpg", -5);
    other = open_set(ctx, CKCA_STORAGE_STREAM, 0, 0);
    CHECK(first && ckca_data_fingerprint(other) != first, "another time, but not another fingerprint");
    expect(ctx, "resume", ckca_update(model, other, &desc, NULL), CKCA_EINVAL, "net.state");
    ckca_data_free(other);
    set_time(DIR_ "/b/11.jpg", 5);
    other = open_set(ctx, CKCA_STORAGE_STREAM, 0, 0);
    CHECK(ckca_data_fingerprint(other) == first && !ckca_data_fingerprint(NULL), "the same files, another fingerprint");
    ckca_data_free(other);
    other = open_set(ctx, CKCA_STORAGE_COMPRESSED, 0, 0);
    CHECK(ckca_data_fingerprint(other) != first, "bytes and paths have one fingerprint");
    ckca_data_free(other), ckca_data_free(data);
    ckca_model_free(model);
    remove("build/net.state");
    remove("build/net.state.lock");
}

int main(void) {
    ckca_context *ctx;
    test_enter();
    put_set();
    ctx = new_context(2);
    test_group("the same bits decoded, compressed and streamed, for every number of threads");
    test_forms();
    test_group("the same weights, also after a stop");
    test_training();
    test_group("no allocation after the first step");
    test_no_allocation();
    test_group("crops of the full-size picture, short side");
    test_crops(ctx);
    test_group("budget");
    test_budget(ctx);
    test_group("splits, subsets, joins");
    test_views(ctx);
    test_group("lists");
    test_lists(ctx);
    test_group("failing allocations");
    fail_each_allocation("stream", job_stream);
    put("build/list.txt", "set/a/00.jpg\t0\nset/b/01.jpg\t1\n", 30);
    fail_each_allocation("list", job_list);
    remove("build/list.txt");
    test_group("files that vanish, change or are corrupt");
    test_lost(1);
    test_lost(3);
    test_group("fingerprints");
    test_fingerprint(ctx);
    test_group(NULL);
    ckca_context_free(ctx);
    remove_all(DIR_);
    test_leave();
    return test_summary();
}
#endif
