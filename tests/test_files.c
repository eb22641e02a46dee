/* Data sets and files: every reader on files that this program writes into build/test_files, each of them truncated and
   corrupted too; resizing against Pillow; splitting; safetensors; and every allocation failing in turn. */
#define _POSIX_C_SOURCE 200809L
#include <stdlib.h>

#if !defined(CKCA_NO_STB_IMAGE) && !defined(CKCA_NO_STDIO)
/* stb_image's memory: the allocation number stb_fail (from 1) fails. */
static long stb_calls, stb_fail;
#define STBI_MALLOC(n) (++stb_calls == stb_fail ? NULL : calloc(1, n))
#define STBI_REALLOC(p, n) (++stb_calls == stb_fail ? NULL : realloc(p, n))
#define STBI_FREE(p) free(p)
#endif

#define CKCA_IMPLEMENTATION
#include "ckca.h"

#include "test.h"

#include "files.h"

/* ---- helpers ---- */

static uint32_t noise_state = 1;
static unsigned noise(void) {
    noise_state = noise_state * 1664525u + 1013904223u;
    return noise_state >> 16;
}

/* The pictures that resizing is tested on: byte i. */
static unsigned char pattern(int i) { return (unsigned char)(i * i * 7 + i * 37 + 11); }

/* ---- arrays, resizing ---- */

static void test_array(void) {
    static const char *const names[] = {"low", "high"};
    static const char *const twice[] = {"a", "b", "a"};
    unsigned char pixels[2 * 4 * 4 * 3];
    int labels[2] = {1, 0}, i;
    ckca_context *ctx = new_context(2);
    ckca_data *data = (ckca_data *)(void *)&labels;
    ckca_data_info info;
    ckca_data_desc desc;
    ckca_array array;
    for (i = 0; i < (int)sizeof pixels; i++) pixels[i] = pattern(i);
    memset(&array, 0, sizeof array);
    memset(&desc, 0, sizeof desc);
    array.pixels = pixels;
    array.labels = labels;
    array.count = 2;
    array.height = array.width = 4;
    array.channels = 3;
    array.classes = 2;
    array.class_names = names;
    CHECK(ckca_open_array(ctx, &data, &array, NULL) == CKCA_OK, "array: %s", ckca_error(ctx));
    ckca_data_info_get(data, &info);
    CHECK(info.count == 2 && info.height == 4 && info.width == 4 && info.channels == 3 && info.classes == 2,
          "array: %d pictures of %d x %d x %d, %d classes", info.count, info.height, info.width, info.channels,
          info.classes);
    CHECK(!strcmp(info.class_names[1], "high"), "class 1 is %s", info.class_names[1]);
    CHECK(ckca_label(data, 0) == 1 && ckca_label(data, 1) == 0, "labels %d %d", ckca_label(data, 0),
          ckca_label(data, 1));
    CHECK(!memcmp(ckca_pixels(data, 0), pixels, 48) && !memcmp(ckca_pixels(data, 1), pixels + 48, 48), "pixels differ");
    CHECK(ckca_label(data, 2) == -1 && ckca_label(data, -1) == -1 && !ckca_pixels(data, 2) && !ckca_pixels(data, -1),
          "a picture beyond the last");
    ckca_data_free(data);
    array.class_names = NULL;
    desc.channels = 1;
    CHECK(ckca_open_array(ctx, &data, &array, &desc) == CKCA_OK, "array: %s", ckca_error(ctx));
    ckca_data_info_get(data, &info);
    CHECK(!strcmp(info.class_names[1], "1") && info.channels == 1, "class 1 is %s, %d channels", info.class_names[1],
          info.channels);
    /* 0.299 r + 0.587 g + 0.114 b of 11, 55, 113 */
    CHECK(ckca_pixels(data, 0)[0] == 48, "grey is %d", ckca_pixels(data, 0)[0]);
    ckca_data_free(data);
    data = NULL; /* and so it stays: a failure leaves it alone */

    labels[1] = 2;
    expect(ctx, "label", ckca_open_array(ctx, &data, &array, NULL), CKCA_EINVAL, "labels[1] is 2, there are 2 classes");
    CHECK(data == NULL, "a failure wrote to data");
    labels[1] = -1;
    expect(ctx, "label", ckca_open_array(ctx, &data, &array, NULL), CKCA_EINVAL, "labels[1] is -1");
    labels[1] = 0;
    desc.channels = 2;
    expect(ctx, "channels", ckca_open_array(ctx, &data, &array, &desc), CKCA_EINVAL, "channels is 2");
    desc.channels = 0;
    desc.height = -1;
    expect(ctx, "height", ckca_open_array(ctx, &data, &array, &desc), CKCA_EINVAL, "height is -1");
    desc.height = 100000;
    expect(ctx, "height", ckca_open_array(ctx, &data, &array, &desc), CKCA_EINVAL, "height is 100000");
    desc.height = 0;
    desc.classes = 3;
    desc.class_names = twice;
    expect(ctx, "names", ckca_open_array(ctx, &data, &array, &desc), CKCA_EINVAL, "[0] and [2] are both \"a\"");
    array.count = 0;
    expect(ctx, "count", ckca_open_array(ctx, &data, &array, NULL), CKCA_EINVAL, "array: count is 0");
    array.count = 2;
    array.pixels = NULL;
    expect(ctx, "pixels", ckca_open_array(ctx, &data, &array, NULL), CKCA_EINVAL, "pixels is NULL");
    CHECK(ckca_open_array(NULL, &data, &array, NULL) == CKCA_EINVAL, "no context");
    ckca_data_free(NULL);
    ckca_context_free(ctx);
}

/* Pillow 13.0: ImageOps.fit(Image.fromarray(pattern), (width, height), Image.BILINEAR), in mode L where channels is 1.
   Pillow keeps the crop's corners in float32, which moves a value by one now and then. */
static void test_resize(void) {
    static const struct {
        int h, w, c, height, width, channels;
        unsigned char expected[36];
    } cases[] = {
        {5, 7, 3, 3, 3, 3, {155, 99,  130, 194, 124, 182, 140, 144, 107, 180, 149, 94,  159, 149,
                            140, 111, 146, 149, 130, 124, 128, 161, 97,  136, 148, 144, 153}},
        {4, 6, 1, 7, 5, 1, {76,  109, 149, 173, 76,  103, 153, 165, 160, 80,  147, 224, 190, 140, 87,  140, 172, 147,
                            115, 90,  132, 119, 103, 89,  92,  167, 180, 119, 60,  89,  188, 219, 129, 41,  88}},
        {9, 5, 3, 4, 4, 1, {186, 162, 151, 143, 146, 156, 125, 94, 149, 116, 122, 111, 157, 130, 161, 102}},
        {13,
         30,
         1,
         2,
         3,
         3,
         {124, 124, 124, 131, 131, 131, 139, 139, 139, 128, 128, 128, 137, 137, 137, 136, 136, 136}},
        {3, 3, 3, 3, 3, 1, {48, 77, 155, 104, 149, 93, 163, 103, 140}}};
    ckca_context *ctx = new_context(1);
    size_t i;
    int k;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        unsigned char in[512], out[64];
        int n = cases[i].height * cases[i].width * cases[i].channels, worst = 0;
        for (k = 0; k < cases[i].h * cases[i].w * cases[i].c; k++) in[k] = pattern(k);
        CHECK(ckca__fit(ctx, in, cases[i].h, cases[i].w, cases[i].c, 1, out, cases[i].height, cases[i].width,
                        cases[i].channels),
              "resizing failed");
        for (k = 0; k < n; k++)
            if (abs(out[k] - cases[i].expected[k]) > worst) worst = abs(out[k] - cases[i].expected[k]);
        CHECK(worst <= 1, "%d x %d x %d to %d x %d x %d: up to %d away from Pillow", cases[i].h, cases[i].w, cases[i].c,
              cases[i].height, cases[i].width, cases[i].channels, worst);
    }
    { /* grey is 0.299 r + 0.587 g + 0.114 b, rounded, whose coefficients here have 16 bits */
        int wrong = 0;
        for (i = 0; i < 2000; i++) {
            unsigned char in[3], out;
            for (k = 0; k < 3; k++) in[k] = (unsigned char)noise();
            ckca__pixel(in, 3, &out, 1);
            wrong += out != (int)(0.299 * in[0] + 0.587 * in[1] + 0.114 * in[2] + 0.5);
        }
        CHECK(wrong < 10, "%d of 2000 greys are wrong", wrong);
    }
    { /* a picture of one colour stays so, whatever the sizes */
        unsigned char in[40 * 40], out[40 * 40];
        for (i = 0; i < 200; i++) {
            int h = 1 + (int)(noise() % 40), w = 1 + (int)(noise() % 40), height = 1 + (int)(noise() % 40),
                width = 1 + (int)(noise() % 40), other = 0;
            memset(in, i % 2 ? 255 : 0, sizeof in);
            if (!ckca__fit(ctx, in, h, w, 1, 1, out, height, width, 1)) other = -1;
            for (k = 0; k < height * width; k++) other += out[k] != in[0];
            CHECK(other == 0, "%d x %d of %d to %d x %d: %d others", h, w, in[0], height, width, other);
        }
    }
    ckca_context_free(ctx);
}

/* ---- splitting ---- */

static ckca_data *numbered(ckca_context *ctx, int count,
                           int classes) { /* picture i is the bytes of i; uneven classes */
    unsigned char *pixels = (unsigned char *)malloc((size_t)count * 4);
    int *labels = (int *)malloc((size_t)count * sizeof(int)), i;
    ckca_data *data = NULL;
    ckca_array array;
    for (i = 0; i < count; i++) {
        pixels[4 * i] = (unsigned char)i;
        pixels[4 * i + 1] = (unsigned char)(i >> 8);
        pixels[4 * i + 2] = pixels[4 * i + 3] = 0;
        labels[i] = (int)(noise() % (unsigned)classes * (noise() % (unsigned)classes)) / classes;
    }
    memset(&array, 0, sizeof array);
    array.pixels = pixels;
    array.labels = labels;
    array.count = count;
    array.height = array.width = 2;
    array.channels = 1;
    array.classes = classes;
    ckca_open_array(ctx, &data, &array, NULL);
    free(pixels);
    free(labels);
    return data;
}

static int number(const ckca_data *data, int i) {
    const unsigned char *p = ckca_pixels(data, i);
    return p[0] + 256 * p[1];
}

static void test_split(void) {
    enum { COUNT = 1003, CLASSES = 7, PARTS = 10 };
    ckca_context *ctx = new_context(1);
    ckca_data *data = numbered(ctx, COUNT, CLASSES), *parts[PARTS], *again[PARTS], *joined, *subset;
    ckca_split_desc desc;
    ckca_data_info info;
    int form, i, j, k, total[CLASSES] = {0};
    for (i = 0; i < COUNT; i++) total[ckca_label(data, i)]++;
    for (form = 0; form < 4; form++) { /* stratified or not, all pictures or 10 x 77 */
        int seen[COUNT] = {0}, sum = 0, twice = 0, same = 0, least = COUNT, most = 0, moved = 0;
        int chosen[CLASSES] = {0};
        double worst = 0;
        memset(&desc, 0, sizeof desc);
        desc.stratified = form & 1;
        desc.size = form & 2 ? 77 : 0;
        desc.seed = 5;
        CHECK(ckca_split(data, PARTS, &desc, parts) == CKCA_OK, "split: %s", ckca_error(ctx));
        CHECK(ckca_split(data, PARTS, &desc, again) == CKCA_OK, "split: %s", ckca_error(ctx));
        for (i = 0; i < PARTS; i++) {
            int have[CLASSES] = {0};
            ckca_data_info_get(parts[i], &info);
            sum += info.count;
            if (info.count < least) least = info.count;
            if (info.count > most) most = info.count;
            for (j = 0; j < info.count; j++) {
                int id = number(parts[i], j);
                twice += seen[id]++ > 0;
                same += id == number(again[i], j);
                moved += id != i * info.count + j;
                have[ckca_label(parts[i], j)]++;
                chosen[ckca_label(parts[i], j)]++;
                CHECK(ckca_label(parts[i], j) == ckca_label(data, id), "picture %d changed its label", id);
            }
            for (k = 0; k < CLASSES; k++) {
                double off = fabs(have[k] - (double)info.count * total[k] / COUNT);
                if (off > worst) worst = off;
            }
        }
        CHECK(sum == (desc.size ? PARTS * 77 : COUNT), "form %d: %d pictures in all parts", form, sum);
        CHECK(desc.size ? least == 77 && most == 77 : most - least <= 1, "form %d: parts of %d to %d", form, least,
              most);
        CHECK(twice == 0, "form %d: %d pictures twice", form, twice);
        CHECK(same == sum, "form %d: %d of %d pictures the same with the same seed", form, same, sum);
        CHECK(moved > sum * 9 / 10, "form %d: only %d of %d pictures moved", form, moved, sum);
        for (k = 0; k < CLASSES && desc.stratified; k++)
            CHECK(fabs(chosen[k] - (double)sum * total[k] / COUNT) < 1, "form %d: %d pictures of class %d, %.2f due",
                  form, chosen[k], k, (double)sum * total[k] / COUNT);
        if (desc.stratified) CHECK(worst < 1, "form %d: a class is %.2f pictures off", form, worst);
        else CHECK(worst > 1, "form %d: not stratified, yet only %.2f off", form, worst);
        for (i = 0; i < PARTS; i++) ckca_data_free(again[i]);
        desc.seed = 6;
        CHECK(ckca_split(data, PARTS, &desc, again) == CKCA_OK, "split: %s", ckca_error(ctx));
        for (same = 0, j = 0; j < least; j++) same += number(parts[0], j) == number(again[0], j);
        CHECK(same < least / 2, "form %d: %d of %d pictures the same with another seed", form, same, least);
        for (i = 0; i < PARTS; i++) {
            ckca_data_free(again[i]);
            if (i || form < 3) ckca_data_free(parts[i]);
        }
    }
    { /* views outlive the data they were cut from, and are cut again */
        int index[3] = {5, 0, 5}, id = number(parts[0], 5);
        ckca_data_free(data);
        CHECK(ckca_subset(&subset, parts[0], index, 3) == CKCA_OK, "subset: %s", ckca_error(ctx));
        CHECK(number(subset, 0) == id && number(subset, 2) == id, "subset: %d, expected %d", number(subset, 0), id);
        index[1] = 77;
        expect(ctx, "subset", ckca_subset(&data, parts[0], index, 3), CKCA_EINVAL, "index[1] is 77, there are 77");
        index[1] = -1;
        expect(ctx, "subset", ckca_subset(&data, parts[0], index, 3), CKCA_EINVAL, "index[1] is -1");
        expect(ctx, "subset", ckca_subset(&data, parts[0], index, 0), CKCA_EINVAL, "n is 0");
        ckca_data_free(subset);
    }
    again[0] = again[2] = parts[0];
    expect(ctx, "split", ckca_split(parts[0], 3, &desc, again), CKCA_EINVAL,
           "3 parts of 77 pictures need 231 pictures, there are 77");
    CHECK(again[0] == parts[0] && again[2] == parts[0], "a failure wrote to parts");
    desc.size = INT_MAX;
    expect(ctx, "split", ckca_split(parts[0], INT_MAX, &desc, NULL), CKCA_EINVAL, "parts is NULL");
    expect(ctx, "split", ckca_split(parts[0], 2, &desc, again), CKCA_EINVAL, "need 4294967294 pictures");
    desc.size = 0;
    expect(ctx, "split", ckca_split(parts[0], 0, &desc, again), CKCA_EINVAL, "n is 0");
    { /* joining views of one store shares it, of two copies */
        ckca_data *two[3], *other = numbered(ctx, 20, CLASSES), *few = numbered(ctx, 20, CLASSES - 1);
        two[0] = parts[0];
        two[1] = parts[0];
        CHECK(ckca_join(&joined, two, 2) == CKCA_OK, "join: %s", ckca_error(ctx));
        ckca_data_info_get(joined, &info);
        CHECK(info.count == 154 && joined->store == parts[0]->store && number(joined, 80) == number(parts[0], 3),
              "join of one store's views: %d pictures, number 80 is %d", info.count, number(joined, 80));
        ckca_data_free(joined);
        two[1] = other;
        CHECK(ckca_join(&joined, two, 2) == CKCA_OK, "join: %s", ckca_error(ctx));
        ckca_data_info_get(joined, &info);
        CHECK(info.count == 97 && number(joined, 76) == number(parts[0], 76) && number(joined, 79) == 2 &&
                  ckca_label(joined, 79) == ckca_label(other, 2) && ckca_label(joined, 3) == ckca_label(parts[0], 3),
              "join of two stores: %d pictures, number 79 is %d", info.count, number(joined, 79));
        ckca_data_free(joined);
        joined = NULL;
        two[1] = few;
        expect(ctx, "join", ckca_join(&joined, two, 2), CKCA_ESHAPE, "parts[1] has 6 classes, parts[0] 7");
        CHECK(joined == NULL, "a failure wrote to joined");
        {
            static const char *const names[] = {"0", "1", "two", "3", "4", "5", "6"};
            static const unsigned char pixels[6] = {0};
            static const int label = 0;
            ckca_data *named = NULL;
            ckca_array array;
            memset(&array, 0, sizeof array);
            array.pixels = pixels;
            array.labels = &label;
            array.count = array.channels = 1;
            array.height = array.width = 2;
            array.classes = CLASSES;
            array.class_names = names;
            CHECK(ckca_open_array(ctx, &named, &array, NULL) == CKCA_OK, "%s", ckca_error(ctx));
            two[1] = named;
            expect(ctx, "join", ckca_join(&joined, two, 2), CKCA_EINVAL,
                   "class 2 is \"two\" in parts[1], \"2\" in parts[0]");
            ckca_data_free(named);
            array.width = 3;
            CHECK(ckca_open_array(ctx, &named, &array, NULL) == CKCA_OK, "%s", ckca_error(ctx));
            two[1] = named;
            expect(ctx, "join", ckca_join(&joined, two, 2), CKCA_ESHAPE,
                   "parts[1] has pictures of 2 x 3 x 1, parts[0] of");
            ckca_data_free(named);
        }
        two[1] = NULL;
        expect(ctx, "join", ckca_join(&joined, two, 2), CKCA_EINVAL, "parts[1] is NULL");
        ckca_data_free(other);
        ckca_data_free(few);
    }
    ckca_data_free(parts[0]);
    ckca_context_free(ctx);
}

#ifndef CKCA_NO_STDIO

/* ---- parsers on memory ---- */

static ckca_status parse_cifar(ckca_context *ctx, const unsigned char *bytes, size_t size, int label_bytes) {
    unsigned char *copy = (unsigned char *)malloc(size + 1);
    int label[100], i;
    ckca__store *store;
    ckca_data_desc none;
    ckca_status status;
    memset(&none, 0, sizeof none);
    for (i = 0; i < 100; i++) label[i] = i == 9 ? -1 : i;
    memcpy(copy, bytes, size);
    status = ckca__store_create(ctx, &store, size / 3073 + 1, 32, 32, 3, 10, NULL, &none);
    if (!status)
        status = ckca__parse_cifar(ctx, "x.bin", copy, size, label_bytes, label_bytes == 1 ? 10 : 100, label, store, 0);
    ckca__store_release(store);
    free(copy);
    return status;
}

static void test_parsers(void) {
    static unsigned char cifar[2 * 3074];
    unsigned char pictures[16 + 2 * 3 * 5], labels[8 + 2], copy[64];
    char lines[] = "\n a b \r\nc\n\nd", *end = lines + 7;
    const char *names[3];
    ckca_context *ctx = new_context(1);
    ckca_data *data = NULL;
    ckca_data_desc none;
    size_t size, i;
    int wrong = 0;
    memset(&none, 0, sizeof none);
    for (size = 0; size < 2 * 3073; size++) /* of truncated files only those of whole records are taken */
        wrong += parse_cifar(ctx, cifar, size, 1) != (size && size % 3073 == 0 ? CKCA_OK : CKCA_EFORMAT);
    CHECK(wrong == 0, "%d lengths of a CIFAR file judged wrongly", wrong);
    cifar[3073] = 10;
    expect(ctx, "cifar", parse_cifar(ctx, cifar, 2 * 3073, 1), CKCA_EFORMAT, "picture 1 has label 10");
    cifar[3073] = 9;
    expect(ctx, "cifar", parse_cifar(ctx, cifar, 2 * 3073, 1), CKCA_EINVAL, "picture 1 is of class 9");
    cifar[1] = 100; /* after the coarse label, which may be anything */
    expect(ctx, "cifar100", parse_cifar(ctx, cifar, 3074, 2), CKCA_EFORMAT, "picture 0 has label 100");
    cifar[1] = 99;
    cifar[0] = 255;
    CHECK(parse_cifar(ctx, cifar, 3074, 2) == CKCA_OK, "%s", ckca_error(ctx));

    memset(pictures, 0, sizeof pictures);
    memset(labels, 0, sizeof labels);
    pictures[2] = labels[2] = 8;
    pictures[3] = 3;
    labels[3] = 1;
    pictures[7] = labels[7] = 2;
    pictures[11] = 3;
    pictures[15] = 5;
    pictures[16 + 15 + 1] = 77;
    labels[9] = 4;
    CHECK(ckca__parse_idx_pair(ctx, &data, "i", pictures, sizeof pictures, "l", labels, sizeof labels, &none) ==
              CKCA_OK,
          "idx: %s", ckca_error(ctx));
    CHECK(data && data->count == 2 && ckca_label(data, 1) == 4 && ckca_pixels(data, 1)[1] == 77 &&
              data->store->classes == 10 && data->store->height == 3 && data->store->width == 5,
          "idx: wrong contents");
    ckca_data_free(data);
    for (wrong = 0, size = 0; size < sizeof pictures; size++) {
        wrong +=
            ckca__parse_idx_pair(ctx, &data, "i", pictures, size, "l", labels, sizeof labels, &none) != CKCA_EFORMAT;
        if (size < sizeof labels)
            wrong += ckca__parse_idx_pair(ctx, &data, "i", pictures, sizeof pictures, "l", labels, size, &none) !=
                     CKCA_EFORMAT;
    }
    CHECK(wrong == 0, "%d truncated IDX files taken", wrong);
    memcpy(copy, labels, sizeof labels);
    copy[sizeof labels] = 1;
    expect(ctx, "idx",
           ckca__parse_idx_pair(ctx, &data, "i", pictures, sizeof pictures, "l", copy, sizeof labels + 1, &none),
           CKCA_EFORMAT, "l: 3 bytes after the header, but its dimensions need 2");
    for (i = 0; i < 16; i++) { /* any change of a header is noticed */
        memcpy(copy, pictures, sizeof pictures);
        copy[i] ^= 0x81;
        CHECK(ckca__parse_idx_pair(ctx, &data, "i", copy, sizeof pictures, "l", labels, sizeof labels, &none) ==
                  CKCA_EFORMAT,
              "IDX with byte %d wrong: %s", (int)i, ckca_error(ctx));
    }
    memset(copy, 0xff, sizeof copy); /* 2^32 - 1 pictures of 2^32 - 1 squared: more than 64 bits */
    memcpy(copy, pictures, 4);
    expect(ctx, "idx", ckca__parse_idx_pair(ctx, &data, "i", copy, 46, "l", labels, sizeof labels, &none), CKCA_EFORMAT,
           "30 bytes after the header, but its dimensions need 18446744073709551616");
    memcpy(copy, pictures, sizeof pictures);
    copy[7] = 1;
    copy[11] = 6; /* one picture of 6 x 5, so its size is right, but not its number */
    expect(ctx, "idx", ckca__parse_idx_pair(ctx, &data, "i", copy, sizeof pictures, "l", labels, sizeof labels, &none),
           CKCA_EFORMAT, "i has 1 pictures, but its label file has 2 labels");
    labels[9] = 200;
    CHECK(ckca__parse_idx_pair(ctx, &data, "i", pictures, sizeof pictures, "l", labels, sizeof labels, &none) ==
                  CKCA_OK &&
              data->store->classes == 201,
          "201 classes: %s", ckca_error(ctx));
    ckca_data_free(data);
    none.classes = 200;
    expect(ctx, "idx",
           ckca__parse_idx_pair(ctx, &data, "i", pictures, sizeof pictures, "l", labels, sizeof labels, &none),
           CKCA_EINVAL, "picture 1 is of class 200, not one of the 200");

    CHECK(ckca__parse_lines(ctx, "n", lines, names, 3) == CKCA_OK && !strcmp(names[0], " a b ") &&
              !strcmp(names[1], "c") && !strcmp(names[2], "d"),
          "lines: %s", ckca_error(ctx));
    memcpy(end, "\nc", 3);
    expect(ctx, "lines", ckca__parse_lines(ctx, "n", end, names, 3), CKCA_EFORMAT, "n: 1 names for 3 classes");
    ckca_context_free(ctx);
}

/* ---- safetensors on memory ---- */

/* Parses a header and bytes of data behind it. */
static ckca_status parse_header(ckca_context *ctx, const char *header, size_t bytes) {
    static unsigned char file[200000];
    size_t n = strlen(header);
    ckca__st_file parsed;
    ckca_status status;
    memset(file, 0, 8 + n + bytes);
    file[0] = (unsigned char)n;
    file[1] = (unsigned char)(n >> 8);
    file[2] = (unsigned char)(n >> 16);
    memcpy(file + 8, header, n);
    status = ckca__st_parse(ctx, "x", file, 8 + n + bytes, &parsed);
    ckca__st_close(&parsed);
    return status;
}

static void test_hostile_headers(void) {
#define X(extra) "{\"dtype\":\"F32\",\"shape\":[1]," extra ",\"data_offsets\":[0,4]}" /* with another field */
#define T(dtype, shape, offsets) "{\"dtype\":\"" dtype "\",\"shape\":[" shape "],\"data_offsets\":[" offsets "]}"
    static const struct {
        const char *header;
        size_t bytes;
        const char *words;
    } bad[] = {
        {"", 0, "expected {"},
        {" {}", 0, "expected {"},
        {"{", 0, "expected a string at byte 1 of 1"},
        {"{}x", 0, "text after"},
        {"{}", 4, "tensors take 0 bytes, but 4 follow"},
        {"{\"a\":" T("F32", "1", "0,4") "}", 0,
         "a is at bytes 0 to 4 of 0, the tensor before it ends at 0 (truncated?)"},
        {"{\"a\":" T("F32", "1", "0,4") "}", 8, "tensors take 4 bytes, but 8 follow"},
        {"{\"a\":" T("F32", "2", "0,4") "}", 4, "a is at bytes 0 to 4, its shape and type (4 bytes a value) need 8"},
        {"{\"a\":" T("F32", "1", "4,0") "}", 4, "a is at bytes 4 to 0, its shape"},
        {"{\"a\":" T("F32", "1", "4,8") "}", 8, "a is at bytes 4 to 8 of 8, the tensor before it ends at 0"},
        {"{\"a\":" T("F32", "1", "0,4") ",\"b\":" T("F32", "1", "2,6") "}", 6, "b is at bytes 2 to 6"},
        {"{\"a\":" T("F32", "1", "0,4") ",\"b\":" T("F32", "1", "0,4") "}", 4, "ends at 4"},
        {"{\"a\":" T("F32", "1", "0,4") ",\"b\":" T("F32", "1", "8,12") "}", 12, "b is at bytes 8 to 12"},
        {"{\"a\":" T("F32", "1", "0,4") ",\"a\":" T("F32", "1", "4,8") "}", 8, "a appears twice"},
        {"{\"a\":" T("F32", "1", "0,4") ",\"\\u0061\":" T("F32", "1", "4,8") "}", 8, "a appears twice"},
        {"{\"a\":" T("F31", "1", "0,4") "}", 4, "a has the unknown type \"F31\""},
        {"{\"a\":" T("F32", "9223372036854775807,9223372036854775807", "0,4") "}", 4, "need 18446744073709551616"},
        {"{\"a\":" T("F32", "4611686018427387903", "4,0") "}", 4, "a is at bytes 4 to 0, its shape"},
        {"{\"a\":" T("F32", "4611686018427387905", "0,4") "}", 4, "need 18446744073709551616"},
        {"{\"a\":" T("F32", "4294967296,4294967296,0", "0,4") "}", 4, "a is at bytes 0 to 4"},
        {"{\"a\":" T("F32", "9223372036854775808", "0,4") "}", 4, "a number beyond 2^63 - 1"},
        {"{\"a\":" T("F32", "99999999999999999999", "0,4") "}", 4, "a number beyond 2^63 - 1"},
        {"{\"a\":" T("F32", "-1", "0,4") "}", 4, "expected a whole number"},
        {"{\"a\":" T("F32", "01", "0,4") "}", 4, "expected a whole number"},
        {"{\"a\":" T("F32", "1.0", "0,4") "}", 4, "expected , or ]"},
        {"{\"a\":" T("F32", "1e0", "0,4") "}", 4, "expected , or ]"},
        {"{\"a\":" T("F32", "1,", "0,4") "}", 4, "expected a whole number"},
        {"{\"a\":" T("F32", "1,1,1,1,1,1,1,1,1", "0,4") "}", 4, "a list that is too long"},
        {"{\"a\":" T("F32", "1", "0,4,8") "}", 4, "a list that is too long"},
        {"{\"a\":" T("F32", "1", "4") "}", 4, "lacks its dtype, shape or two data_offsets"},
        {"{\"a\":" T("F32", "1", "0,9223372036854775807") "}", 4, "a is at bytes 0 to"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "lacks its dtype"},
        {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "lacks its dtype"},
        {"{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "lacks its dtype"},
        {"{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "a duplicate field"},
        {"{\"a\":" X("\"shape\":[1]") "}", 4, "a duplicate field"},
        {"{\"a\":" X("\"x\":") "}", 4, "expected a value"},
        {"{\"a\":" X("\"x\":nul") "}", 4, "expected a value"},
        {"{\"a\":" X("\"x\":nulll") "}", 4, "expected , or }"},
        {"{\"a\":" X("\"x\":NaN") "}", 4, "expected a value"},
        {"{\"a\":" X("\"x\":+1") "}", 4, "expected a value"},
        {"{\"a\":" X("\"x\":01") "}", 4, "expected a value"},
        {"{\"a\":" X("\"x\":-") "}", 4, "expected a value"},
        {"{\"a\":" X("\"x\":.5") "}", 4, "expected a value"},
        {"{\"a\":" X("\"x\":1.") "}", 4, "expected a value"},
        {"{\"a\":" X("\"x\":1e") "}", 4, "expected a value"},
        {"{\"a\":" X("\"x\":[1,]") "}", 4, "expected a value"},
        {"{\"a\":" X("\"x\":[1}") "}", 4, "expected , or the end of the value"},
        {"{\"a\":" X("\"x\":{\"a\"}") "}", 4, "expected :"},
        {"{\"a\":" X("\"x\":{1:1}") "}", 4, "expected a string"},
        {"{\"a\":" X("\"x\":\"\\ud800\"") "}", 4, "an invalid escape"},
        {"{\"a\":" X("\"x\":\"\t\"") "}", 4, "a control character"},
        {"{\"a\":{\"dtype\":\"F32\",\"x\":[[{\"y\":", 0, "expected a value"},
        {"{\"__metadata__\":nul}", 0, "expected a value"},
        {"{\"__metadata__\":null,\"__metadata__\":null}", 0, "a second __metadata__"},
        {"{\"__metadata__\":{\"k\":null}}", 0, "expected a string"},
        {"{\"a\":{}}", 0, "expected a string"},
        {"{\"a\":[]}", 0, "a tensor that is not an object"},
        {"{\"a\"}", 0, "expected :"},
        {"{\"a\":" T("F32", "1", "0,4") ",}", 4, "expected a string"},
        {"{\"a\":" T("F32", "1", "0,4"), 4, "expected , or }"},
        {"{\"__metadata__\":{\"k\":1}}", 0, "expected a string"},
        {"{\"__metadata__\":{\"k\":{\"k\":\"v\"}}}", 0, "expected a string"},
        {"{\"__metadata__\":[]}", 0, "__metadata__ is not an object"},
        {"{\"__metadata__\":{\"k\":\"v\",\"k\":\"w\"}}", 0, "the metadata \"k\" appears twice"},
        {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "a second __metadata__"},
        {"{\"__metadata__\":{\"k\":\"v", 0, "an unterminated string"},
        {"{\"__metadata__\":{\"k\":\"\\", 0, "an invalid escape"},
        {"{\"__metadata__\":{\"k\":\"\\x\"}}", 0, "an invalid escape"},
        {"{\"__metadata__\":{\"k\":\"\\u00", 0, "an invalid escape"},
        {"{\"__metadata__\":{\"k\":\"\\u00g0\"}}", 0, "an invalid escape"},
        {"{\"__metadata__\":{\"k\":\"\\u0000\"}}", 0, "an invalid escape"},
        {"{\"__metadata__\":{\"k\":\"\\ud800\"}}", 0, "an invalid escape"},
        {"{\"__metadata__\":{\"k\":\"\\ud800\\u0041\"}}", 0, "an invalid escape"},
        {"{\"__metadata__\":{\"k\":\"\\udc00\"}}", 0, "an invalid escape"},
        {"{\"__metadata__\":{\"k\":\"\n\"}}", 0, "a control character"},
        {"{\"__metadata__\":{\"k\":\"\xff\"}}", 0, "not UTF-8"},
        {"{\"__metadata__\":{\"k\":\"\xc0\x80\"}}", 0, "not UTF-8"},
        {"{\"__metadata__\":{\"k\":\"\xed\xa0\x80\"}}", 0, "not UTF-8"},
        {"{\"__metadata__\":{\"k\":\"\xf4\x90\x80\x80\"}}", 0, "not UTF-8"}};
    static const struct {
        const char *header;
        size_t bytes;
    } good[] = {
        {"{}", 0},
        {"{} \t\r\n ", 0},
        {"{\"__metadata__\":{}}", 0},
        {"{\"__metadata__\":null}", 0}, /* as safetensors 0.8.0 takes these */
        {"{\"a\":" X("\"comment\":\"x\"") ",\"__metadata__\": null }", 4},
        {"{\"a\":" X("\"x\":0,\"x\" : -1.5e+3 , \"\":null") "}", 4},
        {"{\"a\":" X("\"x\":[ ],\"y\":{ },\"z\":[true,false,{\"dtype\":[0E-0,\"\\u0000\"]} , 10]") "}", 4},
        {"{ \"a\" : { \"shape\" : [ ] , \"data_offsets\" : [ 0 , 8 ] , \"dtype\" : \"I64\" } }", 8},
        {"{\"b\":" T("F32", "1", "4,8") ",\"a\":" T("F32", "1", "0,4") "}", 8},
        {"{\"b\":" T("F32", "0,5", "4,4") ",\"a\":" T("F32", "1", "0,4") "}", 4},
        {"{\"__metadata__\":{\"k\":\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\\u20ac\\ud83d\\ude00\xf0\x9f\x98\x80\"}}", 0}};
    static char deep[100001];
    unsigned char length[16];
    ckca_context *ctx = new_context(1);
    ckca__st_file file;
    size_t i, size;
    int wrong = 0;
    for (i = 0; i < sizeof bad / sizeof *bad; i++)
        expect(ctx, bad[i].header, parse_header(ctx, bad[i].header, bad[i].bytes), CKCA_EFORMAT, bad[i].words);
    for (i = 0; i < sizeof good / sizeof *good; i++)
        CHECK(parse_header(ctx, good[i].header, good[i].bytes) == CKCA_OK, "%s: %s", good[i].header, ckca_error(ctx));
    memset(deep, '[', sizeof deep - 1);
    memcpy(deep, "{\"a\":", 5);
    expect(ctx, "deep", parse_header(ctx, deep, 0), CKCA_EFORMAT, "a tensor that is not an object");
    for (i = 0; i + 5 < sizeof deep; i += 5) memcpy(deep + i, "{\"a\":", 5);
    expect(ctx, "deep", parse_header(ctx, deep, 0), CKCA_EFORMAT, "values nested too deeply");
    for (size = 124; size <= 125; size++) { /* an object in one field and so many lists */
        memset(deep, '[', 1000);
        memcpy(deep, "{\"a\":{\"x\":{\"y\":", 15);
        memset(deep + 15 + size, ']', size);
        strcpy(deep + 15 + 2 * size, "},\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}");
        CHECK((parse_header(ctx, deep, 4) == CKCA_OK) == (size == 124), "%d lists in each other: %s", (int)size,
              ckca_error(ctx));
    }
    for (i = 0; i < 64; i++) { /* lengths of every order of magnitude */
        uint64_t huge = UINT64_MAX >> i;
        int k;
        for (k = 0; k < 8; k++) length[k] = (unsigned char)(huge >> 8 * k);
        wrong += ckca__st_parse(ctx, "x", length, sizeof length, &file) != CKCA_EFORMAT;
        ckca__st_close(&file);
    }
    memset(length, 0, 8);
    for (size = 0; size < 8; size++) {
        wrong += ckca__st_parse(ctx, "x", length, size, &file) != CKCA_EFORMAT;
        ckca__st_close(&file);
    }
    CHECK(wrong == 0, "%d hopeless files taken", wrong);
    ckca_context_free(ctx);
#undef T
#undef X
}

static void test_names_json(void) {
    static const char *const names[] = {"cat", "", "a \"b\" \\ c,]", "\xc3\xa9\x01\n", "\xf0\x9f\x98\x80"};
    static const char *const bad[] = {
        "",    "x",         "[",          "[]x",           "[\"a\"",       "[\"a\",]", "[\"a\" \"b\"]",
        "[1]", "[[\"a\"]]", "[\"\xff\"]", "[\"\\u0000\"]", "{\"a\":\"b\"}"};
    ckca_context *ctx = new_context(1);
    char **parsed, *json = ckca__names_to_json(ctx, names, 5);
    int n, i;
    size_t k;
    CHECK(json &&
              !strcmp(json, "[\"cat\",\"\",\"a \\\"b\\\" \\\\ c,]\",\"\xc3\xa9\\u0001\\u000a\",\"\xf0\x9f\x98\x80\"]"),
          "names as JSON: %s", json);
    CHECK(ckca__names_from_json(ctx, "x", json, &parsed, &n) == CKCA_OK && n == 5, "%d names: %s", n, ckca_error(ctx));
    for (i = 0; i < n; i++) CHECK(!strcmp(parsed[i], names[i]), "name %d is \"%s\"", i, parsed[i]);
    ckca__free_names(ctx, parsed, n);
    ckca__release(ctx, json);
    CHECK(ckca__names_from_json(ctx, "x", " [ ] ", &parsed, &n) == CKCA_OK && n == 0, "%s", ckca_error(ctx));
    ckca__free_names(ctx, parsed, n);
    for (k = 0; k < sizeof bad / sizeof *bad; k++)
        CHECK(ckca__names_from_json(ctx, "x", bad[k], &parsed, &n) == CKCA_EFORMAT && !parsed, "\"%s\" was taken",
              bad[k]);
    CHECK(ckca__names_from_json(ctx, "x",
                                "[\"\\u00e9\\u20AC\\uabCD\\ud83d\\ude00\\udbff\\uDFFF\\u0041\\/\\b\\f\\r\\t\"]",
                                &parsed, &n) == CKCA_OK &&
              !strcmp(parsed[0], "\xc3\xa9\xe2\x82\xac\xea\xaf\x8d\xf0\x9f\x98\x80\xf4\x8f\xbf\xbf"
                                 "A/\b\f\r\t"),
          "escapes read as %s: %s", parsed ? parsed[0] : "nothing", ckca_error(ctx));
    ckca__free_names(ctx, parsed, n);
    { /* more than a growing list begins with */
        static char text[40][4];
        const char *many[40];
        for (i = 0; i < 40; i++) {
            snprintf(text[i], sizeof text[i], "n%d", i);
            many[i] = text[i];
        }
        json = ckca__names_to_json(ctx, many, 40);
        CHECK(ckca__names_from_json(ctx, "x", json, &parsed, &n) == CKCA_OK && n == 40, "%d names: %s", n,
              ckca_error(ctx));
        for (i = 0; i < n; i++) CHECK(!strcmp(parsed[i], many[i]), "name %d is \"%s\"", i, parsed[i]);
        ckca__free_names(ctx, parsed, n);
        ckca__release(ctx, json);
    }
    { /* a name that is not UTF-8 still gives a file that is */
        static const char *const latin[] = {"caf\xe9", "\xe9", "\xff\xfe!"};
        json = ckca__names_to_json(ctx, latin, 3);
        CHECK(!strcmp(json, "[\"caf\xef\xbf\xbd\",\"\xef\xbf\xbd\",\"\xef\xbf\xbd\xef\xbf\xbd!\"]"), "names: %s", json);
        ckca__release(ctx, json);
    }
    ckca_context_free(ctx);
}

static void test_half(void) {
    static const struct {
        unsigned bits;
        float value;
    } known[] = {{0x0000, 0.0f},
                 {0x3c00, 1.0f},
                 {0xc000, -2.0f},
                 {0x7bff, 65504.0f},
                 {0x0400, 6.103515625e-05f},
                 {0x0001, 5.9604644775390625e-08f},
                 {0x83ff, -6.097555160522461e-05f},
                 {0x3555, 0.333251953125f}};
    size_t i;
    for (i = 0; i < sizeof known / sizeof *known; i++)
        CHECK(ckca__float16(known[i].bits) == known[i].value, "half %04x is %g, expected %g", known[i].bits,
              ckca__float16(known[i].bits), known[i].value);
    CHECK(isinf(ckca__float16(0x7c00)) && ckca__float16(0xfc00) < 0 && isnan(ckca__float16(0x7e00)), "half: infinities and NaN");
}

/* ---- pictures on memory ---- */

#ifndef CKCA_NO_STB_IMAGE

static const struct {
    const char *name;
    const unsigned char *bytes;
    size_t size;
    int tolerance;
    unsigned char corner[4][3]; /* Pillow's: first row's first and last pixel, last row's */
} pictures[] = {
    {"rgb.jpg", rgb_jpg, sizeof rgb_jpg, 3, {{1, 1, 125}, {204, 1, 129}, {7, 211, 126}, {209, 210, 132}}},
    {"grey.jpg", grey_jpg, sizeof grey_jpg, 2, {{15, 15, 15}, {76, 76, 76}, {140, 140, 140}, {201, 201, 201}}},
    {"rgb.png", rgb_png, sizeof rgb_png, 0, {{0, 0, 128}, {210, 0, 128}, {0, 210, 128}, {210, 210, 128}}},
    {"grey_alpha.png",
     grey_alpha_png,
     sizeof grey_alpha_png,
     0,
     {{15, 15, 15}, {77, 77, 77}, {138, 138, 138}, {201, 201, 201}}},
    {"palette.png",
     palette_png,
     sizeof palette_png,
     0,
     {{30, 30, 128}, {150, 30, 128}, {105, 180, 128}, {105, 180, 128}}}};
enum { PICTURES = sizeof pictures / sizeof *pictures };

static void test_decode(void) {
    unsigned char out[8 * 8 * 3], copy[512];
    ckca_context *ctx = new_context(1);
    int i, k, c;
    size_t size, at;
    for (i = 0; i < PICTURES; i++) {
        int worst = 0, taken = 0, crashes = 0;
        ckca_status status = ckca__decode(ctx, "p", pictures[i].bytes, pictures[i].size, out, 8, 8, 3, 0);
        CHECK(status == CKCA_OK, "%s: %s", pictures[i].name, ckca_error(ctx));
        for (k = 0; k < 4; k++)
            for (c = 0; c < 3; c++) {
                int d = abs(out[((k / 2 * 7) * 8 + k % 2 * 7) * 3 + c] - pictures[i].corner[k][c]);
                if (d > worst) worst = d;
            }
        CHECK(worst <= pictures[i].tolerance, "%s: %d away from Pillow", pictures[i].name, worst);
        size_t end = pictures[i].size - (strstr(pictures[i].name, ".jpg") ? 2 : 0); /* a JPEG's end marker may lack */
        for (size = 0; size < end; size++) { /* copied to a block's end, where a sanitizer watches */
            unsigned char *part = (unsigned char *)malloc(size ? size : 1);
            memcpy(part, pictures[i].bytes, size);
            taken += ckca__decode(ctx, "p", part, size, out, 8, 8, 3, 0) != CKCA_EFORMAT ||
                     (size >= 8 && !strstr(ckca_error(ctx), "truncated"));
            free(part);
        }
        CHECK(taken == 0, "%s: %d of its beginnings taken for a picture", pictures[i].name, taken);
        for (at = 0; at < pictures[i].size; at++) {
            for (k = 0; k < 8; k++) {
                memcpy(copy, pictures[i].bytes, pictures[i].size);
                copy[at] ^= (unsigned char)(1 << k);
                status = ckca__decode(ctx, "p", copy, pictures[i].size, out, 8, 8, 3, 0);
                crashes += status != CKCA_OK && status != CKCA_EFORMAT;
                if (strstr(pictures[i].name, ".png")) taken += status == CKCA_OK;
            }
        }
        CHECK(taken == 0, "%s: %d of its corruptions taken for a picture", pictures[i].name, taken);
        CHECK(crashes == 0, "%s: %d corruptions with another status", pictures[i].name, crashes);
        memcpy(copy, pictures[i].bytes, pictures[i].size);
        memset(copy + pictures[i].size, 0, 20);
        CHECK(ckca__decode(ctx, "p", copy, pictures[i].size + 20, out, 8, 8, 3, 0) == CKCA_OK, "%s, padded: %s",
              pictures[i].name, ckca_error(ctx));
    }
    for (at = 0; memcmp(grey_jpg + at, "\xff\xc0", 2) != 0;) at++; /* the frame: length, depth, height, width */
    memcpy(copy, grey_jpg, sizeof grey_jpg);
    memset(copy + at + 5, 255, 4);
    expect(ctx, "huge", ckca__decode(ctx, "p", copy, sizeof grey_jpg, out, 8, 8, 3, 0), CKCA_EFORMAT,
           "65535 x 65535 pixels");
    for (at = 0; memcmp(grey_jpg + at, "\xff\xc4", 2) != 0;) at++; /* Huffman codes of each length, from 1 to 16 */
    memcpy(copy, grey_jpg, sizeof grey_jpg);
    copy[at + 5] = 200;
    expect(ctx, "codes", ckca__decode(ctx, "p", copy, sizeof grey_jpg, out, 8, 8, 3, 0), CKCA_EFORMAT,
           "bad Huffman tables");
    memcpy(copy, grey_jpg, at + 4); /* 257 codes, all of them there: one more than stb_image has room for */
    copy[at + 2] = (2 + 17 + 257) >> 8;
    copy[at + 3] = (2 + 17 + 257) & 255;
    memset(copy + at + 4, 0, 17 + 257);
    copy[at + 4 + 15] = 200;
    copy[at + 4 + 16] = 57;
    memcpy(copy + at + 4 + 17 + 257, "\xff\xd9", 2);
    expect(ctx, "codes", ckca__decode(ctx, "p", copy, at + 4 + 17 + 257 + 2, out, 8, 8, 3, 0), CKCA_EFORMAT,
           "bad Huffman tables");
    expect(ctx, "text", ckca__decode(ctx, "p", (const unsigned char *)"hello", 5, out, 8, 8, 3, 0), CKCA_EFORMAT,
           "p: cannot be decoded: neither JPEG nor PNG");
    expect(ctx, "empty", ckca__decode(ctx, "p", copy, 0, out, 8, 8, 3, 0), CKCA_EFORMAT, "an empty file");
    for (i = 0; i < PICTURES; i++) { /* stb_image without memory */
#ifdef CKCA_TURBOJPEG
        if (pictures[i].bytes[0] == 255) continue; /* TurboJPEG decodes it */
#endif
        for (stb_fail = 1;; stb_fail++) {
            ckca_status status;
            stb_calls = 0;
            status = ckca__decode(ctx, "p", pictures[i].bytes, pictures[i].size, out, 8, 8, 3, 0);
            if (stb_calls < stb_fail) break;
            CHECK(status == CKCA_ENOMEM, "%s, stb_image's allocation %ld fails: %s, %s", pictures[i].name, stb_fail,
                  ckca_status_name(status), ckca_error(ctx));
        }
        CHECK(stb_fail > 2, "%s: stb_image allocates %ld times", pictures[i].name, stb_fail - 1);
    }
    stb_fail = 0;
    ckca_context_free(ctx);
}

#endif

/* ---- files ---- */

#ifdef CKCA__POSIX

#include <signal.h>
#include <sys/resource.h>

#define DIR_ "build/test_files/"

static void put_cifar(const char *path, int label_bytes, int count, int first) { /* picture i: label i % 10, red i */
    static unsigned char bytes[4 * 3074];
    int i, k;
    for (i = 0; i < count; i++) {
        unsigned char *at = bytes + i * (3072 + label_bytes);
        at[0] = 0;
        at[label_bytes - 1] = (unsigned char)((first + i) % 10);
        for (k = 0; k < 3072; k++) at[label_bytes + k] = (unsigned char)(k < 1024 ? first + i : k < 2048 ? k : 200);
    }
    put(path, bytes, (size_t)count * (size_t)(3072 + label_bytes));
}

static void put_idx(const char *pictures_path, const char *labels_path) { /* 3 pictures of 4 x 5, labels 7, 8, 9 */
    unsigned char bytes[16 + 60] = {0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 5},
                             labels[11] = {0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9};
    int i;
    for (i = 0; i < 60; i++) bytes[16 + i] = (unsigned char)i;
    put(pictures_path, bytes, sizeof bytes);
    put(labels_path, labels, sizeof labels);
}

static void make_files(void) {
    static const char meta[] = "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n";
    char fine[1000], path[100];
    int i, at = 0;
#ifndef CKCA_NO_STB_IMAGE
    static unsigned char large[8000000];
#endif
    remove_all("build/test_files");
    for (i = 1; i <= 5; i++) {
        snprintf(path, sizeof path, DIR_ "cifar10/data_batch_%d.bin", i);
        put_cifar(path, 1, 2, i * 2);
    }
    put_cifar(DIR_ "cifar10/test_batch.bin", 1, 3, 0);
    put(DIR_ "cifar10/batches.meta.txt", meta, sizeof meta - 1);
    put_cifar(DIR_ "cifar100/train.bin", 2, 4, 0);
    put_cifar(DIR_ "cifar100/test.bin", 2, 1, 5);
    for (i = 0; i < 100; i++) at += snprintf(fine + at, sizeof fine - (size_t)at, "fine%d\n", i);
    put(DIR_ "cifar100/fine_label_names.txt", fine, (size_t)at);
    put_idx(DIR_ "idx/train-images-idx3-ubyte", DIR_ "idx/train-labels-idx1-ubyte");
    put_idx(DIR_ "idx/t10k-images.idx3-ubyte", DIR_ "idx/t10k-labels.idx1-ubyte");
    put(DIR_ "packed/train-images-idx3-ubyte.gz", "\x1f\x8b", 2);
#ifndef CKCA_NO_STB_IMAGE
    put(DIR_ "set/dog/b.PNG", rgb_png, sizeof rgb_png);
    put(DIR_ "set/dog/a.jpeg", grey_jpg, sizeof grey_jpg);
    put(DIR_ "set/dog/.hidden.jpg", "x", 1);
    put(DIR_ "set/dog/notes.txt", "x", 1);
    put(DIR_ "set/Cat/z.jpg", rgb_jpg, sizeof rgb_jpg);
    put(DIR_ "set/.cache/z.jpg", "x", 1);
    put(DIR_ "set/readme", "x", 1);
    put(DIR_ "bad/a/1.jpg", rgb_jpg, sizeof rgb_jpg);
    memcpy(large, rgb_jpg, 20);
    put(DIR_ "bad/a/2.jpg", large, sizeof large / 8); /* beginnings of a picture; one takes longer to fail */
    put(DIR_ "bad/a/3.jpg", large, sizeof large);
    put(DIR_ "bad/b/0.png", "not a picture", 13);
    put(DIR_ "hollow/a/1.jpg", rgb_jpg, sizeof rgb_jpg);
    put(DIR_ "hollow/b/readme", "x", 1);
    put(DIR_ "empty/readme", "x", 1);
    put(DIR_ "folder/a/x.jpg/y", "x", 1);
#endif
}

static void test_cifar(void) {
    static const char *const backwards[] = {"truck", "ship", "horse", "frog",       "dog",
                                            "deer",  "cat",  "bird",  "automobile", "airplane"};
    ckca_context *ctx = new_context(2);
    ckca_data *data = NULL;
    ckca_data_desc desc;
    ckca_data_info info;
    const unsigned char *p;
    memset(&desc, 0, sizeof desc);
    CHECK(ckca_open_cifar10(ctx, &data, DIR_ "cifar10", CKCA_PART_TRAIN, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    ckca_data_info_get(data, &info);
    CHECK(info.count == 10 && info.height == 32 && info.width == 32 && info.channels == 3 && info.classes == 10,
          "cifar10: %d pictures of %d x %d x %d", info.count, info.height, info.width, info.channels);
    CHECK(!strcmp(info.class_names[3], "cat"), "class 3 is %s", info.class_names[3]);
    p = ckca_pixels(data, 3);
    CHECK(ckca_label(data, 3) == 5 && p[0] == 5 && p[1] == 0 && p[2] == 200 && p[3 * 70 + 1] == 70,
          "picture 3: label %d, pixel %d %d %d", ckca_label(data, 3), p[0], p[1], p[2]);
    ckca_data_free(data);
    desc.height = desc.width = 16;
    desc.channels = 1;
    desc.classes = 10;
    desc.class_names = backwards;
    CHECK(ckca_open_cifar10(ctx, &data, DIR_ "cifar10", CKCA_PART_TEST, &desc) == CKCA_OK, "%s", ckca_error(ctx));
    ckca_data_info_get(data, &info);
    CHECK(info.count == 3 && info.height == 16 && info.channels == 1 && ckca_label(data, 1) == 8 &&
              !strcmp(info.class_names[8], "automobile"),
          "classes in another order: label %d", ckca_label(data, 1));
    ckca_data_free(data);
    data = NULL;
    desc.classes = 9; /* airplane, the class of picture 0, is not among them */
    expect(ctx, "cifar10", ckca_open_cifar10(ctx, &data, DIR_ "cifar10", CKCA_PART_TEST, &desc), CKCA_EINVAL,
           "picture 0 is of class 0, not one of the 9 requested");
    CHECK(data == NULL, "a failure wrote to data");
    CHECK(ckca_open_cifar100(ctx, &data, DIR_ "cifar100", CKCA_PART_TRAIN, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    ckca_data_info_get(data, &info);
    CHECK(info.count == 4 && info.classes == 100 && !strcmp(info.class_names[42], "fine42") && ckca_label(data, 2) == 2,
          "cifar100: %d pictures, %d classes, %s", info.count, info.classes, info.class_names[42]);
    ckca_data_free(data);
    remove(DIR_ "cifar100/fine_label_names.txt");
    CHECK(ckca_open_cifar100(ctx, &data, DIR_ "cifar100", CKCA_PART_TEST, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    ckca_data_info_get(data, &info);
    CHECK(info.count == 1 && !strcmp(info.class_names[42], "42"), "class 42 is %s", info.class_names[42]);
    ckca_data_free(data);
    put(DIR_ "cifar100/fine_label_names.txt", "apple\n", 6);
    expect(ctx, "names", ckca_open_cifar100(ctx, &data, DIR_ "cifar100", CKCA_PART_TRAIN, NULL), CKCA_EFORMAT,
           "fine_label_names.txt: 1 names for 100 classes");
    remove(DIR_ "cifar100/fine_label_names.txt");
    put(DIR_ "cifar100/test.bin", "short", 5);
    expect(ctx, "short", ckca_open_cifar100(ctx, &data, DIR_ "cifar100", CKCA_PART_TEST, NULL), CKCA_EFORMAT,
           "5 bytes, not a multiple of the record size 3074");
    put(DIR_ "cifar100/test.bin", "", 0);
    expect(ctx, "empty", ckca_open_cifar100(ctx, &data, DIR_ "cifar100", CKCA_PART_TEST, NULL), CKCA_EFORMAT,
           "0 bytes, not a multiple");
    expect(ctx, "missing", ckca_open_cifar10(ctx, &data, DIR_ "none", CKCA_PART_TEST, NULL), CKCA_EIO,
           "none/test_batch.bin: cannot be opened: No such file");
    expect(ctx, "part", ckca_open_cifar10(ctx, &data, DIR_ "cifar10", (ckca_part)7, NULL), CKCA_EINVAL, "part is 7, must be 0 to 1");
    expect(ctx, "dir", ckca_open_cifar10(ctx, &data, NULL, CKCA_PART_TEST, NULL), CKCA_EINVAL, "dir is NULL");
    ckca_context_free(ctx);
}

static void test_idx(void) {
    static const char *const digits[] = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight"};
    ckca_context *ctx = new_context(2);
    ckca_data *data = NULL;
    ckca_data_desc desc;
    ckca_data_info info;
    int part;
    memset(&desc, 0, sizeof desc);
    for (part = 0; part < 2; part++) {
        CHECK(ckca_open_idx(ctx, &data, DIR_ "idx", (ckca_part)part, NULL) == CKCA_OK, "%s", ckca_error(ctx));
        ckca_data_info_get(data, &info);
        CHECK(info.count == 3 && info.height == 4 && info.width == 5 && info.channels == 1 && info.classes == 10 &&
                  ckca_label(data, 1) == 8 && ckca_pixels(data, 1)[2] == 22 && !strcmp(info.class_names[9], "9"),
              "idx: %d pictures of %d x %d x %d", info.count, info.height, info.width, info.channels);
        ckca_data_free(data);
    }
    desc.channels = 3;
    desc.height = desc.width = 8;
    CHECK(ckca_open_idx(ctx, &data, DIR_ "idx", CKCA_PART_TRAIN, &desc) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(ckca_pixels(data, 2)[0] == ckca_pixels(data, 2)[1] && ckca_pixels(data, 2)[0] == ckca_pixels(data, 2)[2],
          "grey as colour: %d %d", ckca_pixels(data, 2)[0], ckca_pixels(data, 2)[1]);
    ckca_data_free(data);
    desc.classes = 9;
    desc.class_names = digits;
    expect(ctx, "idx", ckca_open_idx(ctx, &data, DIR_ "idx", CKCA_PART_TRAIN, &desc), CKCA_EINVAL,
           "picture 2 is of class 9, not one of the 9");
    expect(ctx, "packed", ckca_open_idx(ctx, &data, DIR_ "packed", CKCA_PART_TRAIN, NULL), CKCA_EIO,
           "unpack it with gunzip");
    expect(ctx, "missing", ckca_open_idx(ctx, &data, DIR_ "packed", CKCA_PART_TEST, NULL), CKCA_EIO,
           "packed: contains no t10k-images-idx3-ubyte");
    ckca_context_free(ctx);
}

#ifndef CKCA_NO_STB_IMAGE
static void test_folder(void) {
    static const char *const names[] = {"dog", "emu", "Cat"};
    ckca_context *ctx = new_context(3);
    ckca_data *data = NULL;
    ckca_data_desc desc;
    ckca_data_info info;
    unsigned char out[27];
    char deep[600];
    int i;
    memset(&desc, 0, sizeof desc);
    CHECK(ckca_open_folder(ctx, &data, DIR_ "set", NULL) == CKCA_OK, "%s", ckca_error(ctx));
    ckca_data_info_get(data, &info);
    CHECK(info.count == 3 && info.classes == 2 && info.height == 8 && info.width == 8 && info.channels == 3,
          "folder: %d pictures of %d classes, %d x %d x %d", info.count, info.classes, info.height, info.width,
          info.channels);
    CHECK(!strcmp(info.class_names[0], "Cat") && !strcmp(info.class_names[1], "dog"), "classes %s, %s",
          info.class_names[0], info.class_names[1]);
    CHECK(ckca_label(data, 0) == 0 && ckca_label(data, 1) == 1 && ckca_label(data, 2) == 1, "labels");
    CHECK(ckca_pixels(data, 1)[0] == ckca_pixels(data, 1)[1] && ckca_pixels(data, 2)[2] == 128,
          "the grey a.jpeg does not come before b.PNG");
    ckca_data_free(data);
    desc.classes = 3;
    desc.class_names = names;
    desc.height = 3;
    desc.width = 3;
    CHECK(ckca_open_folder(ctx, &data, DIR_ "set", &desc) == CKCA_OK, "%s", ckca_error(ctx));
    ckca_data_info_get(data, &info);
    CHECK(info.classes == 3 && ckca_label(data, 0) == 2 && ckca_label(data, 1) == 0 && info.width == 3,
          "classes in another order: labels %d %d", ckca_label(data, 0), ckca_label(data, 1));
    desc.channels = 3;
    CHECK(ckca_read_picture(ctx, DIR_ "set/Cat/z.jpg", &desc, out) == CKCA_OK && !memcmp(out, ckca_pixels(data, 0), 27),
          "ckca_read_picture gives another picture: %s", ckca_error(ctx));
    ckca_data_free(data);
    data = NULL;
    desc.classes = 2;
    expect(ctx, "class", ckca_open_folder(ctx, &data, DIR_ "set", &desc), CKCA_EINVAL,
           "set/Cat: not one of the 2 requested classes");
    desc.class_names = NULL;
    desc.classes = 4;
    expect(ctx, "class", ckca_open_folder(ctx, &data, DIR_ "set", &desc), CKCA_EINVAL,
           "has 2 class folders, but 4 classes were requested");
    desc.classes = -1;
    expect(ctx, "classes", ckca_open_folder(ctx, &data, DIR_ "set", &desc), CKCA_EINVAL, "classes is -1");
    for (i = 0; i < 10; i++) /* of three bad ones the first, whichever thread is first */
        expect(ctx, "bad", ckca_open_folder(ctx, &data, DIR_ "bad", NULL), CKCA_EFORMAT,
               "bad/a/2.jpg: cannot be decoded: truncated");
    CHECK(data == NULL, "a failure wrote to data");
    expect(ctx, "hollow", ckca_open_folder(ctx, &data, DIR_ "hollow", NULL), CKCA_EINVAL, "hollow/b: no .jpg");
    expect(ctx, "empty", ckca_open_folder(ctx, &data, DIR_ "empty", NULL), CKCA_EINVAL, "empty: no class folders");
    expect(ctx, "none", ckca_open_folder(ctx, &data, DIR_ "none", NULL), CKCA_EIO, "none: cannot be opened: No such");
    expect(ctx, "folder", ckca_open_folder(ctx, &data, DIR_ "folder", NULL), CKCA_EINVAL, "folder/a: no .jpg");
    desc.classes = 0;
    desc.channels = 0;
    expect(ctx, "read", ckca_read_picture(ctx, DIR_ "set/Cat/z.jpg", &desc, out), CKCA_EINVAL, "3 x 3 x 0, all three");
    memset(deep, 'a', sizeof deep); /* a long path: the sentence keeps its end and the reason */
    memcpy(deep + sizeof deep - 6, "z.jpg", 6);
    desc.channels = 3;
    expect(ctx, "long", ckca_read_picture(ctx, deep, &desc, out), CKCA_EIO,
           "z.jpg: cannot be opened: File name too long");
    ckca_context_free(ctx);
}
#endif

static const void *ask_item(void *user, int i) { return (const float *)user + 10 * i; }

static void test_safetensors(void) {
    static const char path[] = DIR_ "w.safetensors";
    static const ckca__st_pair meta[] = {{"zeta", "first"}, {"alpha", "\"quoted\" \\ \n \xc3\xa9"}};
    static const unsigned char bytes[3] = {1, 2, 3};
    float values[40];
    double doubles[2] = {0.1, -3};
    int64_t whole = INT64_C(1234567890123);
    ckca_context *ctx = new_context(1);
    ckca__st_item items[5];
    ckca__st_file file;
    const ckca__st_tensor *tensor;
    unsigned char *whole_file, *again;
    size_t size, again_size, cut;
    char temporary[100];
    float out[40];
    int i, wrong = 0;
    memset(items, 0, sizeof items);
    for (i = 0; i < 40; i++) values[i] = (float)i * 0.3f - 4;
    items[0].name = "bytes";
    items[0].dtype = "U8";
    items[0].dims = 1;
    items[0].shape[0] = 3;
    items[0].data = bytes;
    items[1].name = "layer.weight";
    items[1].dtype = "F32";
    items[1].dims = 4;
    items[1].shape[0] = 2;
    items[1].shape[1] = 5;
    items[1].shape[2] = items[1].shape[3] = 1;
    items[2].name = "count";
    items[2].dtype = "I64";
    items[2].data = &whole;
    items[3].name = "doubles";
    items[3].dtype = "F64";
    items[3].dims = 1;
    items[3].shape[0] = 2;
    items[3].data = doubles;
    items[4].name = "none";
    items[4].dtype = "F32";
    items[4].dims = 2;
    items[4].shape[1] = 4;
    items[4].data = values;
    CHECK(ckca__st_write(ctx, path, items, 5, meta, 2, ask_item, values) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(ckca__st_open(ctx, path, &file) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(file.tensors == 5 && file.metas == 2, "%d tensors, %d metadata", (int)file.tensors, (int)file.metas);
    CHECK(ckca__st_meta(&file, "alpha") && !strcmp(ckca__st_meta(&file, "alpha"), meta[1].value) &&
              !ckca__st_meta(&file, "beta"),
          "metadata %s", ckca__st_meta(&file, "alpha"));
    tensor = ckca__st_find(&file, "layer.weight");
    CHECK(tensor && tensor->dims == 4 && tensor->shape[1] == 5 && !strcmp(tensor->dtype, "F32") &&
              tensor->begin % 4 == 0,
          "layer.weight is lost");
    CHECK(!ckca__st_find(&file, "layer") && !ckca__st_find(&file, ""), "found what is not there");
    CHECK(ckca__st_read_floats(&file, tensor, out) == CKCA_OK && !memcmp(out, values + 10, 40), "floats differ");
    tensor = ckca__st_find(&file, "doubles");
    CHECK(ckca__st_read_floats(&file, tensor, out) == CKCA_OK && out[0] == 0.1f && out[1] == -3, "doubles differ");
    CHECK(tensor->begin % 8 == 0, "doubles begin at byte %d", (int)tensor->begin);
    tensor = ckca__st_find(&file, "count");
    CHECK(!memcmp(file.bytes + tensor->begin, &whole, 8), "count differs");
    expect(ctx, "count", ckca__st_read_floats(&file, tensor, out), CKCA_EFORMAT, "count has the type I64, not a float type");
    ckca__st_close(&file);

    CHECK(ckca__read_file(ctx, path, 1 << 20, &whole_file, &size) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(ckca__read_file(ctx, path, 100, &again, &again_size) == CKCA_EFORMAT && !again, "a file over the limit");
    for (cut = 0; cut < size; cut++) {
        wrong += ckca__st_parse(ctx, "x", whole_file, cut, &file) != CKCA_EFORMAT;
        ckca__st_close(&file);
    }
    CHECK(wrong == 0, "%d truncated files taken", wrong);
    for (cut = 0; cut < size; cut++) { /* whatever a wrong byte does, what is taken must be readable */
        for (i = 0; i < 8; i++) {
            size_t t;
            whole_file[cut] ^= (unsigned char)(1 << i);
            if (ckca__st_parse(ctx, "x", whole_file, size, &file) == CKCA_OK)
                for (t = 0; t < file.tensors; t++)
                    if (file.tensor[t].end - file.tensor[t].begin <= 40)
                        ckca__st_read_floats(&file, &file.tensor[t], out);
            ckca__st_close(&file);
            whole_file[cut] ^= (unsigned char)(1 << i);
        }
    }

    /* The old file stays. */
    snprintf(temporary, sizeof temporary, "%s.tmp", path);
    { /* a disk that fills up in the middle of a large file */
        static float large[300000];
        struct rlimit limit, old;
        void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
        ckca__st_item big;
        ckca_status status;
        memset(&big, 0, sizeof big);
        big.name = "big";
        big.dtype = "F32";
        big.dims = 1;
        big.shape[0] = 300000;
        big.data = large;
        getrlimit(RLIMIT_FSIZE, &old);
        limit = old;
        limit.rlim_cur = 1000000;
        setrlimit(RLIMIT_FSIZE, &limit);
        status = ckca__st_write(ctx, path, &big, 1, NULL, 0, NULL, NULL);
        setrlimit(RLIMIT_FSIZE, &old);
        signal(SIGXFSZ, handler);
        expect(ctx, "file too large", status, CKCA_EIO, "w.safetensors: cannot be written: File too large");
    }
    CHECK(access(temporary, F_OK) != 0, "%s was left behind", temporary);
    CHECK(ckca__read_file(ctx, path, 1 << 20, &again, &again_size) == CKCA_OK && again_size == size &&
              !memcmp(again, whole_file, size),
          "the old file did not survive");
    ckca__release(ctx, again);
    { /* a killed run's temporary file is written over; one that is being written is left alone */
        int lock;
        put(temporary, values, sizeof values);
        lock = ckca__lock_path(temporary);
        CHECK(lock >= 0, "no lock: %s", strerror(errno));
        expect(ctx, "locked", ckca__st_write(ctx, path, items, 5, NULL, 0, ask_item, values), CKCA_EIO,
               "w.safetensors: another process is writing it");
        CHECK(access(temporary, F_OK) == 0, "%s is gone while it is locked", temporary);
        close(lock);
    }
    CHECK(ckca__st_write(ctx, path, items, 5, meta, 2, ask_item, values) == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(access(temporary, F_OK) != 0, "%s was left behind", temporary);
    CHECK(ckca__read_file(ctx, path, 1 << 20, &again, &again_size) == CKCA_OK && again_size == size &&
              !memcmp(again, whole_file, size),
          "written twice, the files differ");
    ckca__release(ctx, again);
    ckca__release(ctx, whole_file);
    expect(ctx, "no folder", ckca__st_write(ctx, DIR_ "none/x", items, 5, meta, 2, ask_item, values), CKCA_EIO,
           "none/x: cannot be created: No such file");
    expect(ctx, "a folder", ckca__st_write(ctx, DIR_ "idx", items, 5, meta, 2, ask_item, values), CKCA_EIO,
           "idx: not a regular file");
    expect(ctx, "open", ckca__st_open(ctx, DIR_ "none", &file), CKCA_EIO, "none: cannot be opened");
    ckca__st_close(&file);
    expect(ctx, "open", ckca__st_open(ctx, DIR_ "idx", &file), CKCA_EIO, "idx: not a regular file");
    ckca__st_close(&file);
    ckca_context_free(ctx);
}

/* ---- every allocation fails in turn ---- */

static ckca_status job_cifar10(ckca_context *ctx) {
    ckca_data *data = NULL;
    ckca_data_desc desc;
    ckca_status status;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = 20;
    status = ckca_open_cifar10(ctx, &data, DIR_ "cifar10", CKCA_PART_TRAIN, &desc);
    ckca_data_free(data);
    return status;
}

static ckca_status job_cifar100(ckca_context *ctx) { /* with a file of names */
    ckca_data *data = NULL;
    ckca_status status = ckca_open_cifar100(ctx, &data, DIR_ "cifar100", CKCA_PART_TEST, NULL);
    ckca_data_free(data);
    return status;
}

static ckca_status job_idx(ckca_context *ctx) {
    ckca_data *data = NULL;
    ckca_status status = ckca_open_idx(ctx, &data, DIR_ "idx", CKCA_PART_TEST, NULL);
    ckca_data_free(data);
    return status;
}

#ifndef CKCA_NO_STB_IMAGE
static ckca_status job_folder(ckca_context *ctx) {
    ckca_data *data = NULL;
    ckca_data_desc desc;
    ckca_status status;
    memset(&desc, 0, sizeof desc);
    desc.height = 5;
    status = ckca_open_folder(ctx, &data, DIR_ "set", &desc);
    ckca_data_free(data);
    return status;
}
#endif

static ckca_status job_safetensors(ckca_context *ctx) {
    static const char path[] = DIR_ "job.safetensors";
    static const ckca__st_pair meta[] = {{"k", "[\"a\",\"b\"]"}};
    static const char *const names[] = {"a", "b"};
    float value = 1;
    char **parsed, *json;
    int n;
    ckca__st_item item;
    ckca__st_file file;
    ckca_status status;
    memset(&item, 0, sizeof item);
    item.name = "x";
    item.dtype = "F32";
    item.data = &value;
    status = ckca__st_write(ctx, path, &item, 1, meta, 1, NULL, NULL);
    if (status) return status;
    status = ckca__st_open(ctx, path, &file);
    if (!status) {
        status = ckca__names_from_json(ctx, path, ckca__st_meta(&file, "k"), &parsed, &n);
        ckca__free_names(ctx, parsed, n);
    }
    ckca__st_close(&file);
    json = ckca__names_to_json(ctx, names, 2);
    if (!json && !status) status = ckca__fail(ctx, CKCA_ENOMEM, "no memory");
    ckca__release(ctx, json);
    return status;
}

#endif /* CKCA__POSIX */
#endif /* CKCA_NO_STDIO */

static ckca_status job_views(ckca_context *ctx) {
    ckca_data *data = numbered(ctx, 30, 3), *other, *parts[4] = {NULL, NULL, NULL, NULL}, *joined = NULL,
              *subset = NULL, *two[2];
    ckca_split_desc desc;
    int index[2] = {0, 3};
    ckca_status status;
    if (!data) return CKCA_ENOMEM;
    memset(&desc, 0, sizeof desc);
    desc.stratified = 1;
    other = numbered(ctx, 5, 3);
    status = other ? ckca_split(data, 4, &desc, parts) : CKCA_ENOMEM;
    if (!status) status = ckca_subset(&subset, parts[0], index, 2);
    two[0] = subset;
    two[1] = other;
    if (!status) status = ckca_join(&joined, two, 2);
    ckca_data_free(data);
    ckca_data_free(other);
    ckca_data_free(subset);
    ckca_data_free(joined);
    for (index[0] = 0; index[0] < 4; index[0]++) ckca_data_free(parts[index[0]]);
    return status;
}

/* ---- checkpoints in memory ---- */

/* A small network with every kind of parameter; names are as torchvision's. */
static ckca_model *tiny_model(ckca_context *ctx, uint64_t seed) {
    ckca_model *model = NULL;
    ckca_model_desc desc;
    ckca_conv_desc conv;
    memset(&desc, 0, sizeof desc);
    memset(&conv, 0, sizeof conv);
    desc.height = desc.width = 4;
    desc.classes = 2;
    desc.seed = seed;
    conv.out = 5;
    conv.pad = 1;
    if (ckca_model_create(ctx, &model, &desc)) return NULL;
    if (ckca_model_finish(
            model, ckca_layer_linear(model, "fc",
                               ckca_layer_avgpool(model, ckca_layer_relu(model, ckca_layer_batchnorm(model, "bn1",
                                                                                   ckca_layer_conv(model, "conv1", ckca_layer_input(model), conv)))),
                               2))) {
        ckca_model_free(model);
        return NULL;
    }
    return model;
}

static unsigned char *saved(ckca_context *ctx, ckca_model *model, size_t *size) {
    unsigned char *bytes;
    CHECK(ckca_save_memory(model, NULL, 0, size) == CKCA_OK, "%s", ckca_error(ctx));
    bytes = (unsigned char *)malloc(*size);
    CHECK(ckca_save_memory(model, bytes, *size, size) == CKCA_OK, "%s", ckca_error(ctx));
    return bytes;
}

/* The file with its header changed: the first from behind after becomes to, every one where after is NULL. */
static unsigned char *edited(const unsigned char *bytes, size_t size, const char *after, const char *from,
                             const char *to, size_t *out_size) {
    const size_t header = bytes[0] + 256u * bytes[1];
    unsigned char *out = (unsigned char *)malloc(size + header * 20);
    char *text = (char *)malloc(header + 1), *at, *next;
    size_t n = 8;
    int changed = 0;
    memcpy(text, bytes + 8, header);
    text[header] = 0;
    at = text;
    if (after) {
        at = strstr(text, after);
        if (!at) abort();
        memcpy(out + n, text, (size_t)(at - text));
        n += (size_t)(at - text);
    }
    while ((next = strstr(at, from)) != NULL && !(after && changed)) {
        memcpy(out + n, at, (size_t)(next - at));
        n += (size_t)(next - at);
        memcpy(out + n, to, strlen(to));
        n += strlen(to);
        at = next + strlen(from);
        changed++;
    }
    if (!changed) abort();
    memcpy(out + n, at, strlen(at));
    n += strlen(at);
    out[0] = (unsigned char)(n - 8);
    out[1] = (unsigned char)((n - 8) >> 8);
    memset(out + 2, 0, 6);
    memcpy(out + n, bytes + 8 + header, size - 8 - header);
    *out_size = n + size - 8 - header;
    free(text);
    return out;
}

/* The file with its tensors' names changed: kind by kind, what stands in front of them. */
static unsigned char *renamed(const unsigned char *bytes, size_t size, const char *conv, const char *bn, const char *fc,
                              size_t *out_size) {
    char to[3][100];
    unsigned char *a, *b;
    snprintf(to[0], 100, "\"%sconv1.", conv);
    snprintf(to[1], 100, "\"%sbn1.", bn);
    snprintf(to[2], 100, "\"%sfc.", fc);
    a = edited(bytes, size, NULL, "\"conv1.", to[0], &size);
    b = edited(a, size, NULL, "\"bn1.", to[1], &size);
    free(a);
    a = edited(b, size, NULL, "\"fc.", to[2], out_size);
    free(b);
    return a;
}

static void test_memory(void) {
    static const char *const prefixes[] = {"module.", "_orig_mod.", "model.", "backbone.", "module.model.",
                                           "_orig_mod.module.backbone.", "module.module."};
    ckca_context *ctx = new_context(1);
    ckca_model *model = tiny_model(ctx, 1), *other = tiny_model(ctx, 2), *back = NULL;
    size_t size, again, cut;
    unsigned char *bytes = saved(ctx, model, &size), *copy, *changed, *untouched, *shifted;
    float value[200];
    size_t i;
    int k, wrong = 0;

    /* there and back: the same bytes, from any address */
    shifted = (unsigned char *)malloc(size + 1);
    memcpy(shifted + 1, bytes, size);
    CHECK(ckca_load_memory(ctx, &back, shifted + 1, size) == CKCA_OK, "%s", ckca_error(ctx));
    free(shifted);
    copy = saved(ctx, back, &again);
    CHECK(again == size && !memcmp(copy, bytes, size), "save, load, save: %d and %d bytes", (int)size, (int)again);
    free(copy);
    ckca_model_free(back);
    copy = (unsigned char *)malloc(size);
    memset(copy, 7, size);
    expect(ctx, "room", ckca_save_memory(model, copy, size - 1, &again), CKCA_EINVAL, "save: out has ");
    for (i = 0; i < size; i++) wrong += copy[i] != 7;
    CHECK(again == size && !wrong, "%d bytes needed, %d written all the same", (int)again, wrong);
    expect(ctx, "size", ckca_save_memory(model, copy, size, NULL), CKCA_EINVAL, "size is NULL");
    free(copy);
    expect(ctx, "bytes", ckca_load_weights_memory(other, NULL, 0), CKCA_EINVAL, "bytes is NULL");
    expect(ctx, "bytes", ckca_load_memory(ctx, &back, NULL, 0), CKCA_EINVAL, "bytes is NULL");
    untouched = saved(ctx, other, &again);
    for (cut = 0; cut < size; cut++) { /* truncated anywhere, in a block of just that size */
        copy = (unsigned char *)malloc(cut + !cut);
        memcpy(copy, bytes, cut);
        wrong += ckca_load_memory(ctx, &back, copy, cut) == CKCA_OK;
        wrong += ckca_load_weights_memory(other, copy, cut) == CKCA_OK;
        free(copy);
    }
    for (i = 0; i < size; i++) { /* and with a wrong byte, it loads or does not; the header's bytes alone */
        if (i >= 8 + bytes[0] + 256u * bytes[1]) break;
        bytes[i] ^= (unsigned char)(1 << i % 8);
        back = NULL;
        if (ckca_load_memory(ctx, &back, bytes, size) == CKCA_OK) ckca_model_free(back);
        bytes[i] ^= (unsigned char)(1 << i % 8);
    }
    CHECK(wrong == 0, "%d truncated files taken", wrong);

    /* prefixes */
    for (i = 0; i < sizeof prefixes / sizeof *prefixes; i++) {
        changed = renamed(bytes, size, prefixes[i], prefixes[i], prefixes[i], &again);
        CHECK(ckca_load_weights_memory(other, changed, again) == CKCA_OK, "%s: %s", prefixes[i], ckca_error(ctx));
        free(changed);
        copy = saved(ctx, other, &again);
        CHECK(again == size && !memcmp(copy, bytes, size), "%s: other weights", prefixes[i]);
        free(copy);
        CHECK(ckca_load_weights_memory(other, untouched, size) == CKCA_OK, "%s", ckca_error(ctx));
    }
    changed = renamed(bytes, size, "backbone.", "backbone.", "", &again); /* a head beside its backbone */
    CHECK(ckca_load_weights_memory(other, changed, again) == CKCA_OK, "%s", ckca_error(ctx));
    free(changed);
    CHECK(ckca_load_weights_memory(other, untouched, size) == CKCA_OK, "%s", ckca_error(ctx));
    changed = renamed(bytes, size, "", "model.", "_orig_mod.", &again); /* the order of the names changes */
    CHECK(ckca_load_weights_memory(other, changed, again) == CKCA_OK, "%s", ckca_error(ctx));
    free(changed);
    CHECK(ckca_load_weights_memory(other, untouched, size) == CKCA_OK, "%s", ckca_error(ctx));
    changed = renamed(bytes, size, "net.", "net.", "net.", &again);
    expect(ctx, "unknown prefix", ckca_load_weights_memory(other, changed, again), CKCA_EFORMAT,
           "memory: it has 8 tensors, but no conv1.weight. The nearest: net.conv1.weight, net.bn1.weight, "
           "net.fc.weight");
    CHECK(!strstr(ckca_error(ctx), "refix"), "%s", ckca_error(ctx));
    free(changed);
    changed = renamed(bytes, size, "module.", "module.", "module.head.", &again);
    expect(ctx, "too much", ckca_load_weights_memory(other, changed, again), CKCA_EFORMAT,
           "it has 8 tensors, but no conv1.weight. The nearest: module.conv1.weight");
    expect(ctx, "too much", CKCA_EFORMAT, CKCA_EFORMAT, "Without prefixes module.head.fc.bias would not fit either");
    free(changed);
    changed = edited(bytes, size, "fc.weight", "fc.weight", "module.fc.bias", &again);
    expect(ctx, "twice", ckca_load_weights_memory(other, changed, again), CKCA_EFORMAT,
           "Without prefixes there would be two of fc.bias");
    free(changed);
    changed = edited(bytes, size, "fc.weight", "fc.weight", "module.bn1.num_batches_tracked", &again);
    expect(ctx, "one less", ckca_load_weights_memory(other, changed, again), CKCA_EFORMAT,
           "Without prefixes fc.weight would still be missing");
    free(changed);

    /* shapes, numbers that are none, files of the future */
    changed = edited(bytes, size, "\"fc.weight", "[2,5]", "[5,2]", &again);
    expect(ctx, "shape", ckca_load_weights_memory(other, changed, again), CKCA_ESHAPE,
           "fc.weight is 5x2 in the file, 2x5 in the model");
    expect(ctx, "shape", ckca_load_memory(ctx, &back, changed, again), CKCA_ESHAPE, "fc.weight is 5x2 in the file");
    free(changed);
    changed = edited(bytes, size, "\"fc.weight", "[2,5]", "[1,2,1,5,1,1]", &again);
    expect(ctx, "shape", ckca_load_weights_memory(other, changed, again), CKCA_ESHAPE, "fc.weight is 1x2x1x5x1x1 in");
    free(changed);
    changed = edited(bytes, size, "ckca.format", "\"1\"", "\"2\"", &again);
    expect(ctx, "format 2", ckca_load_memory(ctx, &back, changed, again), CKCA_EFORMAT,
           "memory: a newer ckca.h wrote it: its ckca.format is 2, ckca.h " CKCA_VERSION " reads up to 1");
    expect(ctx, "format 2", ckca_load_weights_memory(other, changed, again), CKCA_EFORMAT, "a newer ckca.h");
    free(changed);
    changed = edited(bytes, size, "ckca.format", "\"1\"", "\"99999999999999999999\"", &again);
    expect(ctx, "format 1e20", ckca_load_memory(ctx, &back, changed, again), CKCA_EFORMAT, "a newer ckca.h");
    free(changed);
    changed = edited(bytes, size, "ckca.format", "\"1\"", "\"one\"", &again);
    expect(ctx, "format one", ckca_load_memory(ctx, &back, changed, again), CKCA_EFORMAT, "is not a whole number");
    free(changed);
    changed = edited(bytes, size, NULL, "\"ckca.format\":\"1\",", "", &again); /* as before there were numbers */
    back = NULL;
    CHECK(ckca_load_memory(ctx, &back, changed, again) == CKCA_OK, "%s", ckca_error(ctx));
    ckca_model_free(back);
    free(changed);
    for (k = 0; k < ckca_tensor_count(other); k++) {
        ckca_tensor_info tensor;
        const float bad[3] = {NAN, INFINITY, -INFINITY};
        const ckca__st_tensor *place;
        ckca__st_file file;
        float good;
        ckca_tensor_info_get(other, k, &tensor);
        ckca_tensor_read(other, k, CKCA_SLOT_VALUE, value);
        good = value[tensor.count - 1];
        value[tensor.count - 1] = bad[k % 3];
        ckca_tensor_write(other, k, CKCA_SLOT_VALUE, value);
        copy = (unsigned char *)malloc(size);
        expect(ctx, tensor.name, ckca_save_memory(other, copy, size, &again), CKCA_ENAN, tensor.name);
        CHECK(strstr(ckca_error(ctx), k % 3 ? "is infinite" : "is NaN"), "%s", ckca_error(ctx));
        value[tensor.count - 1] = good;
        ckca_tensor_write(other, k, CKCA_SLOT_VALUE, value);
        memcpy(copy, bytes, size);
        if (ckca__st_parse(ctx, "x", bytes, size, &file) || !(place = ckca__st_find(&file, tensor.name))) abort();
        memcpy(copy + place->end - 4, &bad[k % 3], 4);
        ckca__st_close(&file);
        expect(ctx, tensor.name, ckca_load_weights_memory(other, copy, size), CKCA_ENAN, tensor.name);
        back = NULL;
        expect(ctx, tensor.name, ckca_load_memory(ctx, &back, copy, size), CKCA_ENAN, "memory: ");
        free(copy);
    }
    copy = saved(ctx, other, &again);
    CHECK(again == size && !memcmp(copy, untouched, size), "the model is not as it was");
    free(copy);
    free(untouched);
    free(bytes);
    ckca_model_free(model);
    ckca_model_free(other);
    ckca_context_free(ctx);
}

/* The class means and the number of pictures in a checkpoint's metadata: there and back, hostile, missing. */
static void test_centroids(void) {
    static const struct {
        const char *after, *from, *to;
        ckca_status status;
        const char *words;
    } hostile[] = {
        {"ckca.pictures", "\"42\"", "\"\"", CKCA_EFORMAT, "ckca.pictures \"\" is not a whole number below 1e15"},
        {"ckca.pictures", "\"42\"", "\"-1\"", CKCA_EFORMAT, "ckca.pictures \"-1\" is"},
        {"ckca.pictures", "\"42\"", "\"4.2\"", CKCA_EFORMAT, "ckca.pictures \"4.2\" is"},
        {"ckca.pictures", "\"42\"", "\"1000000000000000\"", CKCA_EFORMAT, "ckca.pictures \"1000000000000000\" is"},
        {"ckca.class_counts", "BwAAAAAAAAA", "BwAAAAAAAIA", CKCA_EFORMAT, "ckca.class_counts has -92233720368547"},
        {"ckca.class_counts", "BwAAAAAAAAA", "BwAAAAAAAEA", CKCA_EFORMAT, "pictures of class 0"},
        {"ckca.class_counts", "\"BwAA", "\"Bw=A", CKCA_EFORMAT, "are not 2 and 2 x 5 numbers in base64"},
        {"ckca.class_counts", "\"BwAA", "\"BwA", CKCA_EFORMAT, "are not 2 and 2 x 5 numbers in base64"},
        {"ckca.class_counts", "\"BwAA", "\"BwAAA", CKCA_EFORMAT, "are not 2 and 2 x 5 numbers in base64"},
        {"ckca.class_counts", "\"BwAA", "\"Bw A", CKCA_EFORMAT, "are not 2 and 2 x 5 numbers in base64"},
        {"ckca.class_counts", "AA==\"", "AB==\"", CKCA_EFORMAT, "are not 2 and 2 x 5 numbers in base64"},
        {"ckca.class_counts", "AA==\"", "AAA=\"", CKCA_EFORMAT, "are not 2 and 2 x 5 numbers in base64"},
        {"ckca.class_counts", "ckca.class_counts", "ckca.class_count", CKCA_EFORMAT, "are not 2 and 2 x 5 numbers"},
        {"ckca.class_means", "ckca.class_means", "ckca.class_mean", CKCA_EFORMAT, "are not 2 and 2 x 5 numbers"},
        {"ckca.class_means", "AACAP6", "AACAf6", CKCA_ENAN, "ckca.class_means is not finite: feature 0 of class 0"},
        {"ckca.class_means", "AACAP6", "AADAf6", CKCA_ENAN, "ckca.class_means is not finite: feature 0 of class 0"},
        {"ckca.class_means", "AACAP6", "", CKCA_EFORMAT, "are not 2 and 2 x 5 numbers in base64"}};
    ckca_context *ctx = new_context(1);
    ckca_model *model = tiny_model(ctx, 1), *other = tiny_model(ctx, 2), *back = NULL;
    ckca_model_info info;
    size_t size, again, plain_size, i;
    unsigned char *bytes, *copy, *changed, *plain = saved(ctx, model, &plain_size);
    unsigned char out[8];
    if (!ckca__centroids_alloc(model, &model->centroids)) abort();
    model->pictures = 42;
    model->centroids.count[0] = 7; /* class 1 has none */
    for (i = 0; i < 5; i++) model->centroids.mean[i] = 1 + (float)i / 3;
    bytes = saved(ctx, model, &size);
    CHECK(ckca_load_memory(ctx, &back, bytes, size) == CKCA_OK, "%s", ckca_error(ctx));
    ckca_model_info_get(back, &info);
    CHECK(info.pictures == 42 && back->centroids.count &&
              !memcmp(back->centroids.count, model->centroids.count, ckca__centroid_bytes(model)),
          "%d pictures, or other means", (int)info.pictures);
    copy = saved(ctx, back, &again);
    CHECK(again == size && !memcmp(copy, bytes, size), "save, load, save: %d and %d bytes", (int)size, (int)again);
    free(copy);
    ckca_model_free(back);
    back = NULL;
    CHECK(ckca_load_weights_memory(other, bytes, size) == CKCA_OK && other->centroids.count && other->pictures == 42, "%s",
          ckca_error(ctx));
    for (i = 0; i < sizeof hostile / sizeof *hostile; i++) {
        changed = edited(bytes, size, hostile[i].after, hostile[i].from, hostile[i].to, &again);
        expect(ctx, hostile[i].to, ckca_load_memory(ctx, &back, changed, again), hostile[i].status, hostile[i].words);
        expect(ctx, hostile[i].to, ckca_load_weights_memory(other, changed, again), hostile[i].status,
               hostile[i].words);
        free(changed);
    }
    copy = saved(ctx, other, &again);
    CHECK(again == size && !memcmp(copy, bytes, size), "the model is not as it was");
    free(copy);
    /* a class without pictures has no mean, whatever the file says */
    changed = edited(bytes, size, "ckca.class_counts", "BwAAAAAAAAA", "AAAAAAAAAAA", &again);
    CHECK(ckca_load_memory(ctx, &back, changed, again) == CKCA_OK && back->centroids.mean[1] == 0, "%s", ckca_error(ctx));
    ckca_model_free(back);
    free(changed);
    /* the means were of the weights before: a file without them takes them away */
    CHECK(ckca_load_weights_memory(other, plain, plain_size) == CKCA_OK && !other->centroids.count && !other->pictures, "%s",
          ckca_error(ctx));
    /* base64 of every length */
    for (i = 0; i < 8; i++) {
        static const char *const text[] = {"", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"}; /* RFC 4648 */
        ckca__text built;
        memset(&built, 0, sizeof built);
        built.ctx = ctx;
        if (i == 7) { /* larger than any text */
            CHECK(!ckca__parse_base64("AAAA", out, SIZE_MAX), "a size beyond memory");
            break;
        }
        ckca__text_base64(&built, "foobar", i);
        CHECK(!strcmp(i ? built.bytes : "", text[i]), "%d bytes: %s", (int)i, built.bytes);
        CHECK(ckca__parse_base64(text[i], out, i) && !memcmp(out, "foobar", i), "\"%s\" is not %d bytes", text[i], (int)i);
        CHECK(!ckca__parse_base64(text[i], out, i + 1), "\"%s\" is %d bytes", text[i], (int)i + 1);
        ckca__release(ctx, built.bytes);
    }
    free(plain);
    free(bytes);
    ckca_model_free(model);
    ckca_model_free(other);
    ckca_context_free(ctx);
}

static ckca_status job_memory(ckca_context *ctx) { /* with prefixes, so that names are fitted */
    ckca_model *model = tiny_model(ctx, 1), *back = NULL;
    unsigned char *bytes = NULL, *changed = NULL;
    size_t size, again;
    ckca_status status = model ? CKCA_OK : CKCA_ENOMEM;
    if (!status && !ckca__centroids_alloc(model, &model->centroids))
        status = ckca__fail(ctx, CKCA_ENOMEM, "out of memory");
    if (!status) status = ckca_save_memory(model, NULL, 0, &size);
    if (!status) {
        bytes = (unsigned char *)malloc(size);
        status = ckca_save_memory(model, bytes, size, &size);
    }
    if (!status) {
        changed = renamed(bytes, size, "model.", "model.", "model.", &again);
        status = ckca_load_weights_memory(model, changed, again);
    }
    if (!status) status = ckca_load_memory(ctx, &back, bytes, size);
    ckca_model_free(back);
    ckca_model_free(model);
    free(bytes);
    free(changed);
    return status;
}

static void test_version(void) {
    char text[32];
    snprintf(text, sizeof text, "%d.%d.%d", CKCA_VERSION_MAJOR, CKCA_VERSION_MINOR, CKCA_VERSION_PATCH);
    CHECK(!strcmp(text, CKCA_VERSION), "CKCA_VERSION is %s, its numbers %s", CKCA_VERSION, text);
}

#ifdef CKCA__POSIX
/* A checkpoint replaces regular files only, follows links, keeps permissions; what it says can be read again. */
static void test_places(void) {
    ckca_context *ctx = new_context(1);
    ckca_model *model = tiny_model(ctx, 3), *back = NULL, *named = NULL;
    ckca_model_desc desc;
    const float mean[] = {-0.5f, 1e-38f, 1e6f}, std[] = {1e-35f, 0.5f, 1};
    ckca_model_info info;
    struct stat about;
    char text[64] = "";
    FILE *file;
    mkdir(DIR_ "places", 0777);
    CHECK(ckca_save(model, DIR_ "places/v1") == CKCA_OK && !chmod(DIR_ "places/v1", 0600), "%s", ckca_error(ctx));
    CHECK(!symlink("v1", DIR_ "places/current") && ckca_save(model, DIR_ "places/current") == CKCA_OK, "%s", ckca_error(ctx));
    CHECK(!lstat(DIR_ "places/current", &about) && S_ISLNK(about.st_mode), "the link is still one");
    CHECK(!stat(DIR_ "places/v1", &about) && (about.st_mode & 0777) == 0600, "permissions are %o", (unsigned)about.st_mode);
    expect(ctx, "pipe", mkfifo(DIR_ "places/pipe", 0600) ? CKCA_OK : ckca_save(model, DIR_ "places/pipe"), CKCA_EIO, "not a regular file");
    CHECK(!stat(DIR_ "places/pipe", &about) && S_ISFIFO(about.st_mode), "the pipe is still one");
    file = fopen(DIR_ "places/precious", "w");
    fputs("precious", file);
    fclose(file);
    CHECK(!symlink("precious", DIR_ "places/v2.tmp"), "link");
    expect(ctx, "v2.tmp", ckca_save(model, DIR_ "places/v2"), CKCA_EIO, "v2: cannot be created");
    file = fopen(DIR_ "places/precious", "r");
    CHECK(file && fgets(text, sizeof text, file) && !strcmp(text, "precious"), "a link in the place of .tmp is not followed: %s", text);
    fclose(file);
    memset(&desc, 0, sizeof desc);
    desc.classes = 2;
    desc.mean = mean, desc.std = std;
    CHECK(!ckca_resnet(ctx, &named, "resnet8", &desc) && !ckca_save(named, DIR_ "places/v3"), "%s", ckca_error(ctx));
    CHECK(!ckca_load(ctx, &back, DIR_ "places/v3"), "%s", ckca_error(ctx));
    ckca_model_info_get(back, &info);
    CHECK(info.mean && info.mean[0] == -0.5f && info.mean[2] == 1e6f && info.std[1] == 0.5f &&
              fabsf(info.std[0] / 1e-35f - 1) < 1e-6f, "mean %g %g %g, std %g", (double)info.mean[0], (double)info.mean[1],
          (double)info.mean[2], (double)info.std[0]);
    ckca_model_free(back), ckca_model_free(named), ckca_model_free(model);
    ckca_context_free(ctx);
    remove_all(DIR_ "places");
}
#endif

int main(void) {
    test_version();
    test_memory();
    test_centroids();
    fail_each_allocation("memory", job_memory);
    test_array();
    test_resize();
    test_split();
    fail_each_allocation("views", job_views);
#ifndef CKCA_NO_STDIO
    test_parsers();
    test_hostile_headers();
    test_names_json();
    test_half();
#ifndef CKCA_NO_STB_IMAGE
    test_decode();
#endif
#ifdef CKCA__POSIX
    test_enter();
    make_files();
    test_cifar();
    test_idx();
    test_safetensors();
    test_places();
    make_files();
    fail_each_allocation("cifar10", job_cifar10);
    fail_each_allocation("cifar100", job_cifar100);
    fail_each_allocation("idx", job_idx);
    fail_each_allocation("safetensors", job_safetensors);
#ifndef CKCA_NO_STB_IMAGE
    test_folder();
    fail_each_allocation("folder", job_folder);
#endif
    remove_all("build/test_files");
    test_leave();
#endif
#endif
    return test_summary();
}
