/* files.h: what the tests of files and of pictures share: contexts whose memory fails, sentences that are expected, files
   written and removed, small pictures. Include it after ckca.h and test.h. */
#ifndef FILES_H
#define FILES_H

/* Memory handed to a context: the allocation number fail (from 1) fails. */
typedef struct memory {
    long calls, fail;
    size_t live;
} memory;

static inline void *test_alloc(size_t bytes, void *user) {
    memory *m = (memory *)user;
    void *block = ++m->calls == m->fail ? NULL : malloc(bytes);
    if (block) m->live += bytes;
    return block;
}

static inline void test_release(void *block, size_t bytes, void *user) {
    ((memory *)user)->live -= bytes;
    free(block);
}

static inline ckca_context *new_context(int threads) {
    ckca_context *ctx;
    ckca_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.threads = threads;
    if (ckca_init(&ctx, &desc)) abort();
    return ctx;
}

/* Runs a job with every one of its allocations failing in turn. */
static inline void fail_each_allocation(const char *name, ckca_status (*job)(ckca_context *ctx)) {
    memory m;
    ckca_desc desc;
    long fail;
    memset(&desc, 0, sizeof desc);
    desc.threads = 1;
    desc.alloc = test_alloc;
    desc.release = test_release;
    desc.user = &m;
    for (fail = 2;; fail++) { /* the first is the context */
        ckca_context *ctx;
        ckca_status status;
        memset(&m, 0, sizeof m);
        m.fail = fail;
        if (ckca_init(&ctx, &desc)) abort();
        status = job(ctx);
        if (m.calls < fail) {
            CHECK(status == CKCA_OK, "%s without a failing allocation: %s", name, ckca_error(ctx));
            CHECK(fail > 3, "%s allocates %ld times only", name, m.calls);
            ckca_context_free(ctx);
            CHECK(m.live == 0, "%s leaves %.0f bytes", name, (double)m.live);
            return;
        }
        CHECK(status == CKCA_ENOMEM && strstr(ckca_error(ctx), "memory"), "%s, allocation %ld fails: %s, \"%s\"", name,
              fail, ckca_status_name(status), ckca_error(ctx));
        ckca_context_free(ctx);
        CHECK(m.live == 0, "%s, allocation %ld fails: %.0f bytes leaked", name, fail, (double)m.live);
    }
}

/* Checks that a call failed with this status and these words in its sentence. */
static inline void expect(ckca_context *ctx, const char *what, ckca_status status, ckca_status expected, const char *words) {
    CHECK(status == expected && strstr(ckca_error(ctx), words), "%s: expected %s, \"...%s...\", got %s, \"%s\"", what,
          ckca_status_name(expected), words, ckca_status_name(status), ckca_error(ctx));
}

#ifdef CKCA__POSIX
static inline void remove_all(const char *path) {
    DIR *dir = opendir(path);
    struct dirent *entry;
    char inside[1024];
    while (dir && (entry = readdir(dir)) != NULL) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        if (snprintf(inside, sizeof inside, "%s/%s", path, entry->d_name) >= (int)sizeof inside) continue;
        if (remove(inside) != 0) remove_all(inside);
    }
    if (dir) closedir(dir);
    remove(path);
}

/* Writes a file, its folders made where they lack. */
static inline void put(const char *path, const void *bytes, size_t size) {
    char folder[1024];
    size_t i;
    FILE *file;
    for (i = 0; path[i]; i++) {
        if (path[i] != '/') continue;
        memcpy(folder, path, i);
        folder[i] = 0;
        mkdir(folder, 0777);
    }
    file = fopen(path, "wb");
    if (!file || fwrite(bytes, 1, size, file) != size) {
        printf("FAIL: %s cannot be written\n", path);
        exit(1);
    }
    fclose(file);
}

#endif /* CKCA__POSIX */

#ifndef CKCA_NO_STB_IMAGE
/* 8 x 8 pictures that Pillow 13.0 wrote: red grows to the right by 30, green downwards, blue is 128. */
static const unsigned char rgb_jpg[304] = {
    255, 216, 255, 224, 0,   16, 74,  70,  73,  70,  0,   1,   1,   0,   0,   1,   0,  1,   0,   0,  255, 219, 0,  67,
    0,   8,   6,   6,   7,   6,  5,   8,   7,   7,   7,   9,   9,   8,   10,  12,  20, 13,  12,  11, 11,  12,  25, 18,
    19,  15,  20,  29,  26,  31, 30,  29,  26,  28,  28,  32,  36,  46,  39,  32,  34, 44,  35,  28, 28,  40,  55, 41,
    44,  48,  49,  52,  52,  52, 31,  39,  57,  61,  56,  50,  60,  46,  51,  52,  50, 255, 219, 0,  67,  1,   9,  9,
    9,   12,  11,  12,  24,  13, 13,  24,  50,  33,  28,  33,  50,  50,  50,  50,  50, 50,  50,  50, 50,  50,  50, 50,
    50,  50,  50,  50,  50,  50, 50,  50,  50,  50,  50,  50,  50,  50,  50,  50,  50, 50,  50,  50, 50,  50,  50, 50,
    50,  50,  50,  50,  50,  50, 50,  50,  50,  50,  50,  50,  50,  50,  255, 192, 0,  17,  8,   0,  8,   0,   8,  3,
    1,   17,  0,   2,   17,  1,  3,   17,  1,   255, 196, 0,   20,  0,   1,   0,   0,  0,   0,   0,  0,   0,   0,  0,
    0,   0,   0,   0,   0,   0,  5,   255, 196, 0,   25,  16,  0,   1,   5,   0,   0,  0,   0,   0,  0,   0,   0,  0,
    0,   0,   0,   0,   0,   5,  6,   35,  50,  161, 255, 196, 0,   21,  1,   1,   1,  0,   0,   0,  0,   0,   0,  0,
    0,   0,   0,   0,   0,   0,  0,   2,   4,   255, 196, 0,   25,  17,  0,   2,   3,  1,   0,   0,  0,   0,   0,  0,
    0,   0,   0,   0,   0,   0,  0,   5,   4,   33,  49,  97,  255, 218, 0,   12,  3,  1,   0,   2,  17,  3,   17, 0,
    63,  0,   45,  17,  147, 88, 176, 170, 83,  78,  133, 11,  156, 179, 255, 217};
static const unsigned char grey_jpg[168] = {
    255, 216, 255, 224, 0,   16,  74,  70,  73,  70, 0,  1,  1,  0,  0,  1,  0,  1,   0,   0,   255, 219, 0,   67,
    0,   8,   6,   6,   7,   6,   5,   8,   7,   7,  7,  9,  9,  8,  10, 12, 20, 13,  12,  11,  11,  12,  25,  18,
    19,  15,  20,  29,  26,  31,  30,  29,  26,  28, 28, 32, 36, 46, 39, 32, 34, 44,  35,  28,  28,  40,  55,  41,
    44,  48,  49,  52,  52,  52,  31,  39,  57,  61, 56, 50, 60, 46, 51, 52, 50, 255, 192, 0,   11,  8,   0,   8,
    0,   8,   1,   1,   17,  0,   255, 196, 0,   20, 0,  1,  0,  0,  0,  0,  0,  0,   0,   0,   0,   0,   0,   0,
    0,   0,   0,   5,   255, 196, 0,   25,  16,  0,  1,  5,  0,  0,  0,  0,  0,  0,   0,   0,   0,   0,   0,   0,
    0,   0,   5,   6,   35,  50,  161, 255, 218, 0,  8,  1,  1,  0,  0,  63, 0,  45,  17,  147, 88,  176, 255, 217};
static const unsigned char rgb_png[82] = {137, 80,  78, 71,  13, 10, 26,  10,  0,   0,  0,   13, 73,  72,  68, 82,  0,
                                          0,   0,   8,  0,   0,  0,  8,   8,   2,   0,  0,   0,  75,  109, 41, 220, 0,
                                          0,   0,   25, 73,  68, 65, 84,  120, 218, 99, 100, 96, 104, 144, 99, 96,  192,
                                          68,  44,  12, 114, 12, 88, 193, 224, 148, 0,  0,   88, 217, 2,   66, 76,  92,
                                          91,  203, 0,  0,   0,  0,  73,  69,  78,  68, 174, 66, 96,  130};
static const unsigned char grey_alpha_png[94] = {
    137, 80,  78,  71,  13,  10,  26,  10,  0,   0,  0,   13, 73, 72,  68, 82, 0,  0,   0,   8,  0,   0,   0,   8,
    8,   4,   0,   0,   0,   110, 6,   118, 0,   0,  0,   0,  37, 73,  68, 65, 84, 120, 218, 99, 228, 255, 207, 201,
    192, 201, 192, 201, 192, 193, 0,   161, 89,  4,  161, 12, 24, 100, 17, 66, 23, 32,  172, 2,  33,  192, 65,  164,
    22,  0,   58,  62,  3,   157, 186, 176, 219, 41, 0,   0,  0,  0,   73, 69, 78, 68,  174, 66, 96,  130};
static const unsigned char palette_png[107] = {
    137, 80,  78,  71,  13,  10,  26,  10,  0,   0,   0,   13,  73,  72, 68,  82,  0,   0,  0,  8,   0,   0,
    0,   8,   2,   3,   0,   0,   0,   185, 97,  86,  24,  0,   0,   0,  12,  80,  76,  84, 69, 105, 180, 128,
    105, 105, 128, 150, 30,  128, 30,  30,  128, 232, 192, 91,  145, 0,  0,   0,   26,  73, 68, 65,  84,  120,
    218, 99,  254, 167, 205, 196, 192, 192, 244, 159, 129, 233, 199, 6,  166, 7,   191, 25, 96, 0,   0,   86,
    69,  5,   183, 129, 39,  252, 135, 0,   0,   0,   0,   73,  69,  78, 68,  174, 66,  96, 130};
#endif

#endif
