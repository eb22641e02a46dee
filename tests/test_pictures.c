/* Pictures in files: what is refused and with which words, what is turned, what folders hold, and mutated files by the
   thousand. With a number as its argument the program does nothing but mutate: so many JPEGs, and as many PNGs whose
   checksums are mended (build/asan/test_pictures 100000; another stb_image comes with -I). */
#define _POSIX_C_SOURCE 200809L
#include <stdint.h>
#include <stdlib.h>

#ifndef CKCA_NO_STB_IMAGE
static int64_t most_pixels = (int64_t)1 << 26;
#define CKCA__MAX_PIXELS most_pixels
#endif
#define CKCA_IMPLEMENTATION
#include "ckca.h"

#include "test.h"

#include "files.h"

#if !defined(CKCA_NO_STB_IMAGE) && defined(CKCA__POSIX)

/* 24 x 16 pictures that Pillow wrote: with a restart every two MCUs; progressive, with and without; CMYK. */
static const unsigned char restarts_jpg[464] = {
    255, 216, 255, 224, 0,   16,  74,  70,  73,  70,  0,   1,   1,   0,   0,   1,   0,   1,   0,   0,   255, 219, 0,
    67,  0,   14,  10,  11,  13,  11,  9,   14,  13,  12,  13,  16,  15,  14,  17,  22,  36,  23,  22,  20,  20,  22,
    44,  32,  33,  26,  36,  52,  46,  55,  54,  51,  46,  50,  50,  58,  65,  83,  70,  58,  61,  78,  62,  50,  50,
    72,  98,  73,  78,  86,  88,  93,  94,  93,  56,  69,  102, 109, 101, 90,  108, 83,  91,  93,  89,  255, 219, 0,
    67,  1,   15,  16,  16,  22,  19,  22,  42,  23,  23,  42,  89,  59,  50,  59,  89,  89,  89,  89,  89,  89,  89,
    89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,
    89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  255, 192, 0,
    17,  8,   0,   16,  0,   24,  3,   1,   17,  0,   2,   17,  1,   3,   17,  1,   255, 196, 0,   23,  0,   0,   3,
    1,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   3,   4,   5,   6,   255, 196, 0,   33,  16,
    0,   2,   1,   3,   3,   5,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   1,   2,   17,  0,   3,   4,   18,
    33,  97,  5,   34,  49,  50,  129, 255, 196, 0,   24,  1,   0,   3,   1,   1,   0,   0,   0,   0,   0,   0,   0,
    0,   0,   0,   0,   0,   4,   5,   6,   3,   7,   255, 196, 0,   37,  17,  0,   1,   4,   1,   3,   2,   7,   0,
    0,   0,   0,   0,   0,   0,   0,   0,   2,   1,   3,   4,   17,  0,   5,   33,  49,  65,  97,  18,  19,  50,  51,
    81,  129, 209, 255, 221, 0,   4,   0,   2,   255, 218, 0,   12,  3,   1,   0,   2,   17,  3,   17,  0,   63,  0,
    206, 218, 193, 64,  59,  193, 226, 41,  246, 171, 61,  198, 20,  80,  43,  123, 231, 235, 10,  209, 163, 132, 180,
    63,  26,  174, 213, 199, 123, 252, 195, 166, 18,  159, 81,  181, 41,  9,   100, 232, 41,  22,  49,  144, 35,  25,
    212, 1,   94,  151, 159, 255, 208, 154, 152, 28,  80,  146, 30,  202, 102, 31,  202, 203, 211, 193, 242, 160, 252,
    170, 25,  68,  7,   234, 75,  206, 111, 18,  115, 173, 123, 100, 169, 127, 11,  89,  255, 209, 109, 112, 52,  35,
    21,  77,  192, 152, 2,   178, 121, 196, 20,  161, 219, 1,   89,  142, 56,  42,  74,  74,  171, 93,  119, 194, 97,
    226, 92,  184, 91,  93,  182, 88,  136, 149, 138, 75,  33,  218, 78,  112, 189, 54,  75,  196, 165, 230, 246, 173,
    171, 63,  255, 217};
static const unsigned char progressive_jpg[627] = {
    255, 216, 255, 224, 0,   16,  74,  70,  73,  70,  0,   1,   1,   0,   0,   1,   0,   1,   0,   0,   255, 219, 0,
    67,  0,   14,  10,  11,  13,  11,  9,   14,  13,  12,  13,  16,  15,  14,  17,  22,  36,  23,  22,  20,  20,  22,
    44,  32,  33,  26,  36,  52,  46,  55,  54,  51,  46,  50,  50,  58,  65,  83,  70,  58,  61,  78,  62,  50,  50,
    72,  98,  73,  78,  86,  88,  93,  94,  93,  56,  69,  102, 109, 101, 90,  108, 83,  91,  93,  89,  255, 219, 0,
    67,  1,   15,  16,  16,  22,  19,  22,  42,  23,  23,  42,  89,  59,  50,  59,  89,  89,  89,  89,  89,  89,  89,
    89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,
    89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  255, 194, 0,
    17,  8,   0,   16,  0,   24,  3,   1,   34,  0,   2,   17,  1,   3,   17,  1,   255, 196, 0,   23,  0,   0,   3,
    1,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   2,   5,   4,   255, 196, 0,   23,  1,
    0,   3,   1,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   1,   3,   4,   5,   255, 218, 0,
    12,  3,   1,   0,   2,   16,  3,   16,  0,   0,   1,   156, 244, 29,  227, 9,   64,  202, 187, 255, 196, 0,   24,
    16,  1,   0,   3,   1,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   1,   2,   18,  19,  255,
    218, 0,   8,   1,   1,   0,   1,   5,   2,   138, 48,  195, 155, 10,  86,  101, 255, 196, 0,   27,  17,  0,   1,
    4,   3,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   17,  0,   2,   3,   4,   18,  19,  33,  255,
    218, 0,   8,   1,   3,   1,   1,   63,  1,   138, 211, 53,  129, 213, 21,  156, 154, 87,  255, 196, 0,   26,  17,
    0,   2,   2,   3,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   2,   1,   3,   17,  18,  33,
    255, 218, 0,   8,   1,   2,   1,   1,   63,  1,   189, 219, 105, 156, 143, 111, 79,  255, 196, 0,   22,  16,  0,
    3,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   32,  49,  255, 218, 0,   8,   1,
    1,   0,   6,   63,  2,   88,  127, 255, 196, 0,   25,  16,  1,   1,   1,   1,   1,   1,   0,   0,   0,   0,   0,
    0,   0,   0,   0,   0,   1,   0,   17,  65,  97,  129, 255, 218, 0,   8,   1,   1,   0,   1,   63,  33,  30,  192,
    228, 83,  196, 100, 112, 181, 53,  31,  47,  255, 218, 0,   12,  3,   1,   0,   2,   0,   3,   0,   0,   0,   16,
    80,  239, 255, 196, 0,   25,  17,  0,   2,   3,   1,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,
    0,   1,   17,  33,  65,  113, 255, 218, 0,   8,   1,   3,   1,   1,   63,  16,  136, 90,  116, 129, 74,  233, 255,
    196, 0,   23,  17,  1,   0,   3,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   1,   16,  33,
    81,  255, 218, 0,   8,   1,   2,   1,   1,   63,  16,  19,  105, 145, 255, 0,   255, 196, 0,   26,  16,  0,   3,
    1,   1,   1,   1,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   1,   17,  33,  49,  97,  129, 255, 218,
    0,   8,   1,   1,   0,   1,   63,  16,  85,  101, 249, 7,   184, 195, 204, 67,  234, 63,  133, 118, 169, 88,  144,
    211, 17,  37,  131, 255, 217};
static const unsigned char progressive_restarts_jpg[695] = {
    255, 216, 255, 224, 0,   16,  74,  70,  73,  70,  0,   1,   1,   0,   0,   1,   0,   1,   0,   0,   255, 219, 0,
    67,  0,   14,  10,  11,  13,  11,  9,   14,  13,  12,  13,  16,  15,  14,  17,  22,  36,  23,  22,  20,  20,  22,
    44,  32,  33,  26,  36,  52,  46,  55,  54,  51,  46,  50,  50,  58,  65,  83,  70,  58,  61,  78,  62,  50,  50,
    72,  98,  73,  78,  86,  88,  93,  94,  93,  56,  69,  102, 109, 101, 90,  108, 83,  91,  93,  89,  255, 219, 0,
    67,  1,   15,  16,  16,  22,  19,  22,  42,  23,  23,  42,  89,  59,  50,  59,  89,  89,  89,  89,  89,  89,  89,
    89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,
    89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  89,  255, 194, 0,
    17,  8,   0,   16,  0,   24,  3,   1,   34,  0,   2,   17,  1,   3,   17,  1,   255, 196, 0,   23,  0,   0,   3,
    1,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   2,   5,   4,   255, 196, 0,   22,  1,
    1,   1,   1,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   4,   1,   3,   255, 221, 0,   4,
    0,   1,   255, 218, 0,   12,  3,   1,   0,   2,   16,  3,   16,  0,   0,   1,   156, 244, 31,  121, 255, 208, 204,
    80,  2,   223, 255, 196, 0,   24,  16,  1,   0,   3,   1,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,
    0,   0,   1,   2,   18,  19,  255, 218, 0,   8,   1,   1,   0,   1,   5,   2,   138, 63,  255, 208, 195, 255, 209,
    195, 255, 210, 230, 255, 211, 195, 255, 212, 165, 102, 95,  255, 196, 0,   27,  17,  0,   1,   4,   3,   0,   0,
    0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   17,  0,   2,   3,   4,   18,  19,  33,  255, 218, 0,   8,   1,
    3,   1,   1,   63,  1,   138, 211, 53,  129, 213, 255, 208, 138, 206, 77,  43,  255, 196, 0,   26,  17,  0,   2,
    2,   3,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   2,   1,   3,   17,  18,  33,  255, 218,
    0,   8,   1,   2,   1,   1,   63,  1,   189, 219, 105, 156, 159, 255, 208, 123, 122, 127, 255, 196, 0,   21,  16,
    1,   1,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   49,  255, 218, 0,   8,   1,
    1,   0,   6,   63,  2,   127, 255, 208, 127, 255, 209, 127, 255, 210, 127, 255, 211, 127, 255, 212, 143, 255, 196,
    0,   25,  16,  1,   1,   1,   1,   1,   1,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   1,   0,   17,  65,
    97,  129, 255, 218, 0,   8,   1,   1,   0,   1,   63,  33,  30,  223, 255, 208, 7,   47,  255, 209, 47,  255, 210,
    60,  95,  255, 211, 50,  56,  95,  255, 212, 212, 212, 124, 191, 255, 218, 0,   12,  3,   1,   0,   2,   0,   3,
    0,   0,   0,   16,  83,  255, 208, 59,  255, 196, 0,   25,  17,  0,   2,   3,   1,   0,   0,   0,   0,   0,   0,
    0,   0,   0,   0,   0,   0,   0,   1,   17,  33,  65,  113, 255, 218, 0,   8,   1,   3,   1,   1,   63,  16,  136,
    90,  116, 255, 208, 129, 74,  233, 255, 196, 0,   23,  17,  0,   3,   1,   0,   0,   0,   0,   0,   0,   0,   0,
    0,   0,   0,   0,   0,   0,   1,   33,  81,  255, 218, 0,   8,   1,   2,   1,   1,   63,  16,  73,  216, 195, 255,
    208, 63,  255, 196, 0,   26,  16,  0,   3,   1,   1,   1,   1,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,
    0,   1,   17,  33,  49,  97,  129, 255, 218, 0,   8,   1,   1,   0,   1,   63,  16,  85,  101, 249, 15,  255, 208,
    123, 140, 63,  255, 209, 243, 63,  255, 210, 67,  234, 63,  135, 255, 211, 174, 213, 43,  18,  63,  255, 212, 105,
    136, 146, 193, 255, 217};
static const unsigned char cmyk_jpg[460] = {
    255, 216, 255, 238, 0,   14,  65,  100, 111, 98,  101, 0,   100, 0,   0,   0,   0,   0,   255, 219, 0,   67,  0,
    14,  10,  11,  13,  11,  9,   14,  13,  12,  13,  16,  15,  14,  17,  22,  36,  23,  22,  20,  20,  22,  44,  32,
    33,  26,  36,  52,  46,  55,  54,  51,  46,  50,  50,  58,  65,  83,  70,  58,  61,  78,  62,  50,  50,  72,  98,
    73,  78,  86,  88,  93,  94,  93,  56,  69,  102, 109, 101, 90,  108, 83,  91,  93,  89,  255, 192, 0,   20,  8,
    0,   16,  0,   24,  4,   67,  17,  0,   77,  17,  0,   89,  17,  0,   75,  17,  0,   255, 196, 0,   26,  0,   0,
    2,   3,   1,   1,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   6,   2,   5,   7,   3,   4,   255,
    196, 0,   40,  16,  0,   1,   3,   4,   0,   6,   1,   5,   1,   0,   0,   0,   0,   0,   0,   0,   1,   2,   3,
    17,  0,   4,   5,   18,  6,   19,  49,  65,  81,  97,  33,  20,  21,  34,  98,  113, 145, 255, 218, 0,   14,  4,
    67,  0,   77,  0,   89,  0,   75,  0,   0,   63,  0,   173, 224, 44,  13,  174, 105, 23,  102, 229, 199, 144, 88,
    211, 94,  89,  2,   103, 105, 153, 7,   192, 164, 171, 203, 17,  107, 164, 164, 126, 83,  215, 213, 91,  113, 198,
    106, 231, 16,  187, 81,  110, 134, 148, 30,  223, 110, 96,  38,  35,  88,  136, 35,  205, 105, 52,  193, 144, 198,
    179, 138, 200, 54,  195, 10,  113, 72,  45,  133, 202, 200, 38,  100, 142, 192, 120, 169, 89,  227, 197, 203, 69,
    97,  35,  225, 81,  241, 75,  214, 183, 238, 228, 108, 86,  243, 201, 66,  84,  22,  83,  8,   4,   8,   128, 123,
    159, 116, 85,  198, 55,  181, 122, 62,  205, 250, 213, 30,  75,  189, 21,  149, 225, 47,  46,  173, 1,   22,  215,
    47,  48,  23,  27,  114, 214, 83,  180, 116, 152, 254, 154, 208, 93,  192, 52,  244, 115, 88,  67,  145, 211, 100,
    131, 21,  171, 102, 173, 45,  174, 72,  55,  22,  237, 60,  81,  58,  243, 16,  21,  19,  214, 38,  138, 101, 250,
    155, 167, 173, 157, 116, 186, 235, 207, 165, 179, 161, 81,  43,  84,  193, 128, 39,  221, 73,  156, 19,  76,  192,
    67,  41,  74,  38,  74,  82,  152, 159, 242, 148, 114, 12,  183, 110, 195, 137, 183, 105, 13,  136, 36,  37,  9,
    0,   76,  120, 20,  85,  167, 5,   220, 100, 223, 93,  200, 201, 37,  208, 19,  167, 47,  118, 180, 243, 49,  240,
    39,  181, 117, 119, 16,  218, 163, 150, 214, 190, 122, 210, 165, 233, 81,  65,  43,  153, 246, 40,  175, 255, 217};

typedef struct file {
    unsigned char bytes[4096];
    size_t size;
} file;

static void add(file *f, const void *bytes, size_t size) {
    if (f->size + size > sizeof f->bytes) abort();
    memcpy(f->bytes + f->size, bytes, size);
    f->size += size;
}

static file copy_of(const unsigned char *bytes, size_t size) {
    file f;
    f.size = 0;
    add(&f, bytes, size);
    return f;
}

/* The place of a marker, searched for from a place on; aborts where there is none. */
static size_t find(const file *f, size_t from, int marker) {
    for (; from + 1 < f->size; from++)
        if (f->bytes[from] == 0xff && f->bytes[from + 1] == marker) return from;
    abort();
}

static void cut(file *f, size_t from, size_t size) {
    memmove(f->bytes + from, f->bytes + from + size, f->size - from - size);
    f->size -= size;
}

static void insert(file *f, size_t at, const void *bytes, size_t size) {
    if (f->size + size > sizeof f->bytes) abort();
    memmove(f->bytes + at + size, f->bytes + at, f->size - at);
    memcpy(f->bytes + at, bytes, size);
    f->size += size;
}

/* Without its segments of a marker, before the data. */
static file without(const unsigned char *bytes, size_t size, int marker) {
    file f = copy_of(bytes, size);
    size_t at = 2;
    while (f.bytes[at + 1] != 0xda) {
        size_t length = 2 + ((size_t)f.bytes[at + 2] << 8 | f.bytes[at + 3]);
        if (f.bytes[at + 1] == marker)
            cut(&f, at, length);
        else
            at += length;
    }
    return f;
}

static void add_chunk(file *f, const char *name, const void *bytes, size_t size) {
    unsigned char number[4] = {0, 0, (unsigned char)(size >> 8), (unsigned char)size};
    uint32_t crc;
    int i;
    add(f, number, 4);
    add(f, name, 4);
    add(f, bytes, size);
    crc = ckca__crc(f->bytes + f->size - size - 4, size + 4);
    for (i = 0; i < 4; i++) number[i] = (unsigned char)(crc >> (24 - 8 * i));
    add(f, number, 4);
}

/* A PNG of a header (width, height, bits, type of colour), then chunks of the caller's. */
static file png(int width, int height, int bits, int type) {
    unsigned char header[13] = {0};
    file f;
    f.size = 0;
    header[2] = (unsigned char)(width >> 8);
    header[3] = (unsigned char)width;
    header[6] = (unsigned char)(height >> 8);
    header[7] = (unsigned char)height;
    header[8] = (unsigned char)bits;
    header[9] = (unsigned char)type;
    add(&f, "\x89PNG\r\n\x1a\n", 8);
    add_chunk(&f, "IHDR", header, 13);
    return f;
}

static unsigned char decoded[64 * 64 * 3];
static ckca_status decode(ckca_context *ctx, const file *f, int height, int width, int as_stored) {
    unsigned char *exact = (unsigned char *)malloc(f->size ? f->size : 1); /* a sanitizer watches its end */
    ckca_data_desc desc;
    ckca_status status;
    memset(&desc, 0, sizeof desc);
    desc.height = height;
    desc.width = width;
    desc.channels = 3;
    desc.as_stored = as_stored;
    memcpy(exact, f->bytes, f->size);
    status = ckca_read_picture_memory(ctx, exact, f->size, &desc, decoded);
    free(exact);
    return status;
}

static const struct {
    const char *name;
    const unsigned char *bytes;
    size_t size;
} jpegs[] = {{"restarts", restarts_jpg, sizeof restarts_jpg},
             {"progressive", progressive_jpg, sizeof progressive_jpg},
             {"progressive, restarts", progressive_restarts_jpg, sizeof progressive_restarts_jpg},
             {"cmyk", cmyk_jpg, sizeof cmyk_jpg}};
enum { JPEGS = sizeof jpegs / sizeof *jpegs };

/* Each beginning of a JPEG is refused as truncated, but for the one that lacks nothing but its end marker. */
static void test_truncated(ckca_context *ctx) {
    unsigned char whole[24 * 16 * 3];
    int i;
    size_t size;
    for (i = 0; i < JPEGS; i++) {
        file f = copy_of(jpegs[i].bytes, jpegs[i].size);
        int wrong = 0, junk;
        CHECK(decode(ctx, &f, 16, 24, 0) == CKCA_OK, "%s: %s", jpegs[i].name, ckca_error(ctx));
        memcpy(whole, decoded, sizeof whole);
        for (size = 3; size < jpegs[i].size - 2; size++) {
            f.size = size;
            wrong += decode(ctx, &f, 16, 24, 0) != CKCA_EFORMAT || !strstr(ckca_error(ctx), "truncated");
        }
        CHECK(wrong == 0, "%s: %d of its beginnings are not truncated", jpegs[i].name, wrong);
        for (junk = 0; junk < 4; junk++) { /* nothing, half a marker, zeros, a segment behind the data */
            static const char *const behind[] = {"", "\xff", "\0\0\0\0\0\0\0\0", "\xff\xfe\0\4ab"};
            static const size_t lengths[] = {0, 1, 8, 6};
            f = copy_of(jpegs[i].bytes, jpegs[i].size - 2);
            add(&f, behind[junk], lengths[junk]);
            memset(decoded, 0, sizeof decoded);
            CHECK(decode(ctx, &f, 16, 24, 0) == CKCA_OK && !memcmp(decoded, whole, sizeof whole),
                  "%s without its end marker, %d behind: %s", jpegs[i].name, junk, ckca_error(ctx));
        }
    }
}

static void refused(ckca_context *ctx, const char *what, const file *f, const char *words) {
    ckca_status status = decode(ctx, f, 16, 24, 0);
    expect(ctx, what, status, CKCA_EFORMAT, words);
    CHECK(!strstr(ckca_error(ctx), "Not a PNG"), "%s: %s", what, ckca_error(ctx));
}

static void test_broken_jpegs(ckca_context *ctx) {
    static const struct {
        int marker;
        const char *words;
    } kinds[] = {{0xc3, "lossless JPEG"},
                 {0xc5, "hierarchical JPEG"},
                 {0xc9, "arithmetic-coded JPEG"},
                 {0xca, "arithmetic-coded progressive JPEG"},
                 {0xcb, "arithmetic-coded lossless JPEG"},
                 {0xf7, "JPEG-LS is not supported"}};
    const unsigned char *bytes = rgb_jpg;
    const size_t size = sizeof rgb_jpg;
    file f;
    size_t at, i;
    for (i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        f = copy_of(bytes, size);
        f.bytes[find(&f, 0, 0xc0) + 1] = (unsigned char)kinds[i].marker;
        refused(ctx, "kind", &f, kinds[i].words);
    }
    f = copy_of(bytes, size);
    f.bytes[find(&f, 0, 0xc0) + 4] = 12;
    refused(ctx, "12 bits", &f, "12 bits per sample");
    f = copy_of(bytes, size);
    at = find(&f, 0, 0xda);
    cut(&f, at, f.size - at - 2);
    refused(ctx, "no scan", &f, "no pixel data");
    f = copy_of(bytes, size);
    at = find(&f, 0, 0xda) + 14; /* behind the scan's header */
    cut(&f, at, f.size - at - 2);
    refused(ctx, "no data", &f, "its data ends before its last pixel");
    f = without(bytes, size, 0xdb);
    refused(ctx, "no DQT", &f, "missing quantization table");
    f = without(bytes, size, 0xc4);
    refused(ctx, "no DHT", &f, "missing Huffman table");
    f = without(cmyk_jpg, sizeof cmyk_jpg, 0xee);
    refused(ctx, "no Adobe", &f, "4 components");
    f = copy_of(bytes, size);
    f.bytes[find(&f, 0, 0xda) + 5] = 9; /* the first component's number in the scan */
    refused(ctx, "component", &f, "a scan of an undefined component");
    f = copy_of(bytes, size);
    f.bytes[find(&f, 0, 0xdb) + 3] = 5;
    f.bytes[find(&f, 0, 0xdb) + 2] = 0;
    refused(ctx, "DQT's length", &f, "bad quantization tables");
    f = copy_of(bytes, size);
    insert(&f, find(&f, 0, 0xda) + 16, "\xff\xd0", 2);
    refused(ctx, "restart", &f, "restart marker without a restart interval");
    f = copy_of(bytes, size);
    insert(&f, find(&f, 0, 0xda), "abc", 3);
    refused(ctx, "bytes", &f, "extra bytes between segments");
    for (i = 0; i < JPEGS; i += 2) { /* both with restarts */
        const char *name = jpegs[i].name;
        size_t first, data;
        f = copy_of(jpegs[i].bytes, jpegs[i].size);
        data = find(&f, 0, 0xda);
        first = find(&f, data, 0xd0);
        insert(&f, first, "\0\0\0\0\0\0\0\0", 8);
        refused(ctx, name, &f, "extra bytes before a restart marker");
        cut(&f, first, 8);
        CHECK(decode(ctx, &f, 16, 24, 0) == CKCA_OK, "%s: %s", name, ckca_error(ctx));
        insert(&f, first, "\xff\xff", 2); /* padding in front of a marker is allowed */
        CHECK(decode(ctx, &f, 16, 24, 0) == CKCA_OK, "%s, padded: %s", name, ckca_error(ctx));
        cut(&f, first, 2);
        f.bytes[first + 1] = 0xd3;
        refused(ctx, name, &f, "out of order");
        f.bytes[first + 1] = 0xd0;
        cut(&f, first, 2);
        refused(ctx, name, &f, "restart markers");
        f = copy_of(jpegs[i].bytes, jpegs[i].size);
        cut(&f, first - 1, 1);
        refused(ctx, name, &f, "its data ");
        f = without(jpegs[i].bytes, jpegs[i].size, 0xdd);
        refused(ctx, name, &f, "restart marker without a restart interval");
    }
}

static void test_broken_pngs(ckca_context *ctx) {
    static const unsigned char type3[] = {0x78, 0x9c, 7, 0, 0, 0, 0, 0, 0, 0, 0}; /* a block of a kind that is not */
    file f = png(24, 16, 8, 2);
    add_chunk(&f, "IDAT", type3, sizeof type3);
    add_chunk(&f, "IEND", "", 0);
    refused(ctx, "type 3", &f, "invalid pixel data");
    f = png(24, 16, 8, 2);
    add_chunk(&f, "IEND", "", 0);
    refused(ctx, "no data", &f, "no pixel data");
    f = png(24, 16, 8, 2);
    add_chunk(&f, "IDAT", "", 0);
    add_chunk(&f, "IDAT", "", 0);
    add_chunk(&f, "IEND", "", 0);
    refused(ctx, "empty data", &f, "no pixel data");
    f = png(24, 16, 8, 3);
    add_chunk(&f, "IDAT", type3, sizeof type3);
    refused(ctx, "palette", &f, "no palette");
    f = png(24, 16, 4, 2);
    refused(ctx, "bits", &f, "colour type does not allow its bit depth");
    f = png(24, 16, 8, 2);
    add_chunk(&f, "CgBI", "", 0);
    refused(ctx, "CgBI", &f, "CgBI");
    f = png(24, 16, 8, 2);
    add_chunk(&f, "ABCD", "", 0);
    refused(ctx, "critical", &f, "unknown critical chunk");
    f = png(0, 16, 8, 2);
    add_chunk(&f, "IDAT", type3, sizeof type3);
    add_chunk(&f, "IEND", "", 0);
    refused(ctx, "width 0", &f, "16 x 0 pixels");
}

/* A PNG of 8 x 1 pixels, which its single, stored block of data lists; bits: of a pixel, 1 to 8. */
static void add_pixels(file *f, const unsigned char *row, size_t size) {
    unsigned char data[64] = {0x78, 1, 1};
    uint32_t a = 1, b = 1; /* Adler-32, with the filter's byte 0 */
    size_t i;
    data[3] = (unsigned char)(size + 1);
    data[5] = (unsigned char)~data[3];
    data[6] = 0xff;
    memcpy(data + 8, row, size);
    for (i = 0; i < size; i++) {
        a = (a + row[i]) % 65521;
        b = (b + a) % 65521;
    }
    for (i = 0; i < 4; i++) data[8 + size + i] = (unsigned char)((b << 16 | a) >> (24 - 8 * i));
    add_chunk(f, "IDAT", data, 12 + size);
}

/* A pixel beyond the palette is black, as in Pillow, and not whatever lay in memory. */
static void test_palettes(ckca_context *ctx) {
    static const unsigned char colours[] = {10, 20, 30, 40, 50, 60, 70, 80, 90};
    static const unsigned char rows[4][8] = {{0x42}, {0x1e, 0x1e}, {0x01, 0x2f, 0x01, 0x2f}, {0, 1, 2, 255, 0, 1, 2, 3}};
    static const int pixels[4][8] = {{0, 1, 0, 0, 0, 0, 1, 0}, /* 3: beyond */
                                     {0, 1, 3, 2, 0, 1, 3, 2},
                                     {0, 1, 2, 3, 0, 1, 2, 3},
                                     {0, 1, 2, 3, 0, 1, 2, 3}};
    int depth, transparent, x, k;
    for (depth = 0; depth < 4; depth++)
        for (transparent = 0; transparent < 2; transparent++) {
            int wrong = 0, known = depth == 0 ? 1 : 3; /* colours in the palette */
            file f = png(8, 1, 1 << depth, 3);
            add_chunk(&f, "PLTE", colours, (size_t)known * 3);
            if (transparent) add_chunk(&f, "tRNS", "\x7f", 1);
            add_chunk(&f, "IDAT", "", 0); /* allowed; UBSan watches stb_image */
            add_pixels(&f, rows[depth], (size_t)1 << depth);
            add_chunk(&f, "IDAT", "", 0);
            add_chunk(&f, "IEND", "behind", 0);
            memset(decoded, 99, sizeof decoded);
            CHECK(decode(ctx, &f, 1, 8, 0) == CKCA_OK, "%s", ckca_error(ctx));
            for (x = 0; x < 8; x++)
                for (k = 0; k < 3; k++)
                    wrong += decoded[x * 3 + k] != (pixels[depth][x] < known ? colours[pixels[depth][x] * 3 + k] : 0);
            CHECK(wrong == 0, "%d bits: %d wrong bytes", 1 << depth, wrong);
        }
}

/* ---- orientation ---- */

/* EXIF with an orientation in either byte order, behind another entry. */
static size_t exif(unsigned char *out, int orientation, int big, int type) {
    static const unsigned char little_tiff[] = {'I', 'I', 42, 0,    8, 0, 0, 0, 2, 0, 0x0f, 1, 2, 0, 4, 0, 0, 0, 'a',
                                                'b', 'c', 0,  0x12, 1, 3, 0, 1, 0, 0, 0,    0, 0, 0, 0, 0, 0, 0, 0};
    static const unsigned char big_tiff[] = {'M', 'M', 0, 42, 0,    0, 0, 8, 0, 2, 1, 0x0f, 0, 2, 0, 0, 0, 4, 'a',
                                             'b', 'c', 0, 1,  0x12, 0, 3, 0, 0, 0, 1, 0,    0, 0, 0, 0, 0, 0, 0};
    memcpy(out, big ? big_tiff : little_tiff, sizeof big_tiff);
    out[big ? 25 : 24] = (unsigned char)type;
    out[big ? (type == 3 ? 31 : 33) : 30] = (unsigned char)orientation;
    return sizeof big_tiff;
}

static file jpeg_with_exif(int orientation, int big, int type) {
    unsigned char segment[64] = {0xff, 0xe1, 0, 0, 'E', 'x', 'i', 'f', 0, 0};
    size_t n = exif(segment + 10, orientation, big, type);
    file f = without(restarts_jpg, sizeof restarts_jpg, 0xdd); /* its EXIF alone is looked at here */
    f = copy_of(restarts_jpg, sizeof restarts_jpg);
    segment[3] = (unsigned char)(8 + n);
    insert(&f, 2, segment, 10 + n);
    return f;
}

static file png_with_exif(int orientation, int big, size_t prefix) {
    unsigned char block[64] = "Exif\0";
    size_t n = prefix + exif(block + prefix, orientation, big, 3), end = sizeof rgb_png - 12;
    file f = copy_of(rgb_png, end); /* behind the data */
    add_chunk(&f, "eXIf", block, n);
    add_chunk(&f, "IEND", "", 0);
    return f;
}

/* Whether decoded is the stored picture turned so that its first row and first column lie where TIFF 6.0 says. */
static int is_turned(const unsigned char *stored, int h, int w, int orientation) {
    static const char *const sides[] = {"TL", "TR", "BR", "BL", "LT", "RT", "RB", "LB"}; /* row 0, column 0 */
    const char *side = sides[orientation - 1];
    int height = orientation > 4 ? w : h, width = orientation > 4 ? h : w, r, c, k;
    for (r = 0; r < h; r++)
        for (c = 0; c < w; c++) {
            int y = 0, x = 0;
            for (k = 0; k < 2; k++) {
                int along = k ? c : r;
                if (side[k] == 'T') y = along;
                if (side[k] == 'B') y = height - 1 - along;
                if (side[k] == 'L') x = along;
                if (side[k] == 'R') x = width - 1 - along;
            }
            if (memcmp(decoded + (y * width + x) * 3, stored + (r * w + c) * 3, 3) != 0) return 0;
        }
    return 1;
}

static void test_orientation(ckca_context *ctx) {
    unsigned char stored[24 * 16 * 3], small[8 * 8 * 3];
    file f = copy_of(rgb_png, sizeof rgb_png);
    int o, big;
    CHECK(decode(ctx, &f, 8, 8, 0) == CKCA_OK, "%s", ckca_error(ctx));
    memcpy(small, decoded, sizeof small);
    f = copy_of(restarts_jpg, sizeof restarts_jpg);
    CHECK(decode(ctx, &f, 16, 24, 0) == CKCA_OK, "%s", ckca_error(ctx));
    memcpy(stored, decoded, sizeof stored);
    for (o = 1; o <= 8; o++)
        for (big = 0; big < 2; big++) {
            int h = o > 4 ? 24 : 16, w = o > 4 ? 16 : 24;
            f = jpeg_with_exif(o, big, 3);
            CHECK(decode(ctx, &f, h, w, 0) == CKCA_OK && is_turned(stored, 16, 24, o), "JPEG, orientation %d: %s", o,
                  ckca_error(ctx));
            CHECK(decode(ctx, &f, 16, 24, 1) == CKCA_OK && is_turned(stored, 16, 24, 1), "as stored, orientation %d",
                  o);
            f = jpeg_with_exif(o, big, 4); /* written as a number of four bytes */
            CHECK(decode(ctx, &f, h, w, 0) == CKCA_OK && is_turned(stored, 16, 24, o), "long orientation %d: %s", o,
                  ckca_error(ctx));
            f = png_with_exif(o, big, 0);
            CHECK(decode(ctx, &f, 8, 8, 0) == CKCA_OK && is_turned(small, 8, 8, o), "PNG, orientation %d: %s", o,
                  ckca_error(ctx));
            f = png_with_exif(o, big, 6); /* as JPEG has it */
            CHECK(decode(ctx, &f, 8, 8, 0) == CKCA_OK && is_turned(small, 8, 8, o), "prefixed, orientation %d: %s", o,
                  ckca_error(ctx));
        }
    for (o = 0; o < 256; o += o == 0 ? 9 : 246) { /* 0, 9, 255 mean nothing */
        f = jpeg_with_exif(o, 0, 3);
        CHECK(decode(ctx, &f, 16, 24, 0) == CKCA_OK && is_turned(stored, 16, 24, 1), "orientation %d", o);
    }
    { /* shrunk after it is turned: the crop of 16 x 16 is the upright picture's */
        unsigned char turned[16 * 16 * 3];
        f = jpeg_with_exif(6, 0, 3);
        CHECK(decode(ctx, &f, 24, 16, 0) == CKCA_OK, "%s", ckca_error(ctx));
        CHECK(ckca__fit(ctx, decoded, 24, 16, 3, 1, turned, 10, 12, 3) && decode(ctx, &f, 10, 12, 0) == CKCA_OK &&
                  !memcmp(turned, decoded, 10 * 12 * 3),
              "resized before it is turned");
    }
    { /* every beginning of EXIF, to a block's end */
        unsigned char block[64];
        size_t n = exif(block, 6, 0, 3), k;
        for (k = 0; k <= n; k++) {
            unsigned char *part = (unsigned char *)malloc(k ? k : 1);
            int turn;
            memcpy(part, block, k);
            turn = ckca__exif_orientation(part, k);
            CHECK(turn == 1 || k > 30, "%d bytes of EXIF: %d", (int)k, turn);
            free(part);
        }
        memset(block + 4, 255, 4);
        CHECK(ckca__exif_orientation(block, n) == 1, "an offset beyond its end");
    }
}

/* ---- folders ---- */

#define DIR_ "build/test_pictures/"

static void test_folders(ckca_context *ctx) {
    static const char *const names[] = {"cat", "dog"};
    static const char *const letters[] = {"a", "b"};
    static const char *const accents[] = {"caf\xc3\xa9", "dog"};
    static const char large[] = DIR_ "large/a/1.png";
    ckca_data *data, *part;
    ckca_data_desc desc;
    ckca_data_info info;
    file f;
    int i, index[1] = {0};
    memset(&desc, 0, sizeof desc);
    remove_all("build/test_pictures");
    put(DIR_ "nested/cat/2.jpg", grey_jpg, sizeof grey_jpg);
    put(DIR_ "nested/cat/siamese/1.JPE", rgb_jpg, sizeof rgb_jpg);
    put(DIR_ "nested/cat/siamese/.hidden/1.jpg", "x", 1);
    put(DIR_ "nested/cat/9.jfif", rgb_jpg, sizeof rgb_jpg);
    put(DIR_ "nested/cat/4.webp", "x", 1);
    put(DIR_ "nested/cat/siamese/notes.txt", "x", 1);
    put(DIR_ "nested/cat/Album.jpg/3.jpg", grey_jpg, sizeof grey_jpg);
    put(DIR_ "nested/cat/Thumbs.db", "x", 1);
    put(DIR_ "nested/cat/.DS_Store", "x", 1);
    put(DIR_ "nested/dog/1.png", rgb_png, sizeof rgb_png);
    put(DIR_ "nested/classes.txt", "x", 1);
    put(DIR_ "nested/lost.jpg", "x", 1);
    CHECK(symlink("nowhere", DIR_ "nested/bird") == 0, "link"); /* a class that is gone must not vanish silently */
    CHECK(symlink("..", DIR_ "nested/cat/siamese/up") == 0 && symlink("siamese", DIR_ "nested/cat/again") == 0, "link");
    CHECK(ckca_open_folder(ctx, &data, DIR_ "nested", NULL) == CKCA_OK, "%s", ckca_error(ctx));
    ckca_data_info_get(data, &info);
    CHECK(info.count == 5 && info.left_out == 5 && info.classes == 2 && !info.unreadable && !info.first_unreadable,
          "nested: %d pictures, %d left out", info.count, info.left_out);
    CHECK(data && ckca_label(data, 3) == 0 && ckca_label(data, 4) == 1 &&
              ckca_pixels(data, 0)[0] == ckca_pixels(data, 0)[1] && /* 2.jpg, grey, before 9.jfif and those below */
              ckca_pixels(data, 1)[2] > 100 && ckca_pixels(data, 2)[0] == ckca_pixels(data, 2)[1] &&
              ckca_pixels(data, 3)[2] > 100,
          "nested: another order");
    CHECK(ckca_subset(&part, data, index, 1) == CKCA_OK, "%s", ckca_error(ctx));
    ckca_data_info_get(part, &info);
    CHECK(info.left_out == 5, "a view's folder left %d out", info.left_out);
    ckca_data_free(part);
    ckca_data_free(data);

    put(DIR_ "loop/cat/1.jpg", rgb_jpg, sizeof rgb_jpg); /* links upwards would make every dog a cat */
    put(DIR_ "loop/dog/1.jpg", rgb_jpg, sizeof rgb_jpg);
    CHECK(symlink("..", DIR_ "loop/cat/up") == 0 && symlink("../../..", DIR_ "loop/cat/far") == 0 &&
              symlink("/", DIR_ "loop/cat/root") == 0 && symlink(".", DIR_ "loop/cat/self") == 0 &&
              symlink(".", DIR_ "loop/here") == 0,
          "link");
    for (i = 0; i < 2; i++) {
        CHECK(ckca_open_folder(ctx, &data, i ? DIR_ "loop/cat/../" : DIR_ "loop", NULL) == CKCA_OK, "%s",
              ckca_error(ctx));
        ckca_data_info_get(data, &info);
        CHECK(info.count == 2 && info.classes == 2 && info.left_out == 4, "loop: %d pictures of %d classes, %d left out",
              info.count, info.classes, info.left_out);
        ckca_data_free(data);
    }

    put(DIR_ "hollow/cat/1.jpg", rgb_jpg, sizeof rgb_jpg);
    put(DIR_ "hollow/dog/deep/4.webp", "x", 1);
    desc.classes = 2;
    desc.class_names = names;
    CHECK(ckca_open_folder(ctx, &data, DIR_ "hollow", &desc) == CKCA_OK, "%s", ckca_error(ctx));
    ckca_data_info_get(data, &info);
    CHECK(info.count == 1 && info.classes == 2 && info.left_out == 1, "hollow: %d pictures", info.count);
    ckca_data_free(data);
    expect(ctx, "hollow", ckca_open_folder(ctx, &data, DIR_ "hollow", NULL), CKCA_EINVAL, "hollow/dog: no .jpg");
    remove(DIR_ "hollow/cat/1.jpg");
    expect(ctx, "hollow", ckca_open_folder(ctx, &data, DIR_ "hollow", &desc), CKCA_EINVAL, "hollow: no .jpg");

    put(DIR_ "bytes/caf\xe8/1.jpg", rgb_jpg, sizeof rgb_jpg);
    put(DIR_ "bytes/caf\xe9/1.jpg", rgb_jpg, sizeof rgb_jpg);
    expect(ctx, "bytes", ckca_open_folder(ctx, &data, DIR_ "bytes", NULL), CKCA_EINVAL, "\"caf\\xe8\" is not UTF-8");
    put(DIR_ "forms/cafe\xcc\x81/1.jpg", rgb_jpg, sizeof rgb_jpg);
    desc.class_names = accents;
    expect(ctx, "forms", ckca_open_folder(ctx, &data, DIR_ "forms", &desc), CKCA_EINVAL,
           "not one of the 2 requested classes: caf\xc3\xa9, dog (names are compared byte by byte; the folder's name is "
           "cafe\\xcc\\x81)");

    memset(&desc, 0, sizeof desc);
    desc.as_stored = 2;
    expect(ctx, "as_stored", ckca_open_folder(ctx, &data, DIR_ "nested", &desc), CKCA_EINVAL,
           "desc: as_stored is 2, must be 0 to 1");
    desc.as_stored = 0;
    desc.skip_unreadable = -1;
    expect(ctx, "skip_unreadable", ckca_open_folder(ctx, &data, DIR_ "nested", &desc), CKCA_EINVAL,
           "desc: skip_unreadable is -1, must be 0 to 1");
    memset(&desc, 0, sizeof desc);
    for (i = 0; i < 9; i++) {
        char path[100];
        snprintf(path, sizeof path, DIR_ "bad/%s/%d.png", i < 5 ? "a" : "b", i);
        put(path, i % 2 ? grey_alpha_png : rgb_png, i % 2 ? sizeof grey_alpha_png : sizeof rgb_png);
    }
    put(DIR_ "bad/a/0.jpg", rgb_jpg, 150);
    put(DIR_ "bad/a/3.jpg", "", 0);
    put(DIR_ "bad/b/x.jpg", "hello", 5);
    expect(ctx, "bad", ckca_open_folder(ctx, &data, DIR_ "bad", NULL), CKCA_EFORMAT, "a/0.jpg: cannot be decoded");
    desc.skip_unreadable = 1;
    CHECK(ckca_open_folder(ctx, &data, DIR_ "bad", &desc) == CKCA_OK, "%s", ckca_error(ctx));
    ckca_data_info_get(data, &info);
    CHECK(info.count == 9 && info.unreadable == 3 && info.height == 8 && info.first_unreadable &&
              strstr(info.first_unreadable, "a/0.jpg: cannot be decoded: truncated"),
          "bad: %d pictures, %d unreadable, %s", info.count, info.unreadable, info.first_unreadable);
    for (i = 0; data && i < 9; i++)
        CHECK(ckca_label(data, i) == (i >= 5) && (ckca_pixels(data, i)[2] == 128) == (i % 2 == 0), "bad: picture %d",
              i);
    ckca_data_free(data);
    f = png(24, 16, 8, 2); /* a good header, but its data is not: no size for the set */
    add_chunk(&f, "IDAT", "x", 1);
    add_chunk(&f, "IEND", "", 0);
    put(DIR_ "bad/a/!.png", f.bytes, f.size);
    CHECK(ckca_open_folder(ctx, &data, DIR_ "bad", &desc) == CKCA_OK, "%s", ckca_error(ctx));
    ckca_data_info_get(data, &info);
    CHECK(info.count == 9 && info.unreadable == 4 && info.height == 8 && info.width == 8 && info.first_unreadable &&
              strstr(info.first_unreadable, "a/!.png: cannot be decoded: corrupt: invalid pixel data"),
          "bad first: %d pictures of %d x %d, %s", info.count, info.height, info.width, info.first_unreadable);
    ckca_data_free(data);
    for (i = 5; i < 9; i++) {
        char path[100];
        snprintf(path, sizeof path, DIR_ "bad/b/%d.png", i);
        put(path, "x", 1);
    }
    data = NULL;
    expect(ctx, "bad class", ckca_open_folder(ctx, &data, DIR_ "bad", &desc), CKCA_EINVAL,
           "bad/b: none of its 5 pictures can be read");
    CHECK(!data, "a set without pictures of a class");
    desc.classes = 2;
    desc.class_names = letters;
    CHECK(ckca_open_folder(ctx, &data, DIR_ "bad", &desc) == CKCA_OK, "%s", ckca_error(ctx));
    ckca_data_info_get(data, &info);
    CHECK(info.count == 5 && info.unreadable == 8, "bad class: %d pictures", info.count);
    ckca_data_free(data);
    desc.classes = 0;
    desc.class_names = NULL;
    put(DIR_ "worse/a/1.jpg", rgb_jpg, 150);
    put(DIR_ "worse/a/2.jpg", rgb_jpg, 140);
    expect(ctx, "worse", ckca_open_folder(ctx, &data, DIR_ "worse", &desc), CKCA_EFORMAT,
           "a/1.jpg: cannot be decoded: truncated");
    desc.height = desc.width = 8;
    expect(ctx, "worse", ckca_open_folder(ctx, &data, DIR_ "worse", &desc), CKCA_EFORMAT, "a/1.jpg: cannot be decoded");

    f = png(4000, 3000, 8, 2);
    add_chunk(&f, "IDAT", "x", 1);
    add_chunk(&f, "IEND", "", 0);
    put(large, f.bytes, f.size);
    expect(ctx, "large", ckca_open_folder(ctx, &data, DIR_ "large", NULL), CKCA_EINVAL,
           "a/1.png: as the first picture it gives the set its size, but 3000 x 4000 is too large: set height and width of "
           "ckca_data_desc (in the programs: --size)");
    f = jpeg_with_exif(6, 0, 3); /* the first picture's size is the turned one's */
    put(large, f.bytes, f.size);
    CHECK(ckca_open_folder(ctx, &data, DIR_ "large", NULL) == CKCA_OK, "%s", ckca_error(ctx));
    ckca_data_info_get(data, &info);
    CHECK(info.height == 24 && info.width == 16, "turned, it has %d x %d pixels", info.height, info.width);
    ckca_data_free(data);
}

/* Class names that the caller gives: refused if missing, not UTF-8 or twice there. */
static void test_names(ckca_context *ctx) {
    static const struct {
        const char *names[4], *words;
    } cases[] = {{{"b", "a", "c", NULL}, "class_names[3] is NULL"},
                 {{"b", "caf\xe9", "c", "d"}, "class_names[1] is \"caf\\xe9\", which is not UTF-8"},
                 {{"b", "c", "a", "c"}, "class_names[1] and [3] are both \"c\""},
                 {{"caf\xc3\xa9", "c", "", "d"}, NULL}};
    static const unsigned char pixels[3] = {1, 2, 3};
    static const int labels[1] = {3};
    size_t i;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        ckca_array array = {NULL, NULL, 1, 1, 1, 3, 4, NULL};
        ckca_data_desc desc;
        ckca_data *data = NULL;
        char words[100];
        memset(&desc, 0, sizeof desc);
        array.pixels = pixels;
        array.labels = labels;
        array.class_names = cases[i].names;
        if (!cases[i].words) {
            CHECK(ckca_open_array(ctx, &data, &array, NULL) == CKCA_OK, "%s", ckca_error(ctx));
            ckca_data_free(data);
            continue;
        }
        snprintf(words, sizeof words, "array: %s", cases[i].words);
        expect(ctx, "array", ckca_open_array(ctx, &data, &array, NULL), CKCA_EINVAL, words);
        desc.classes = 4;
        desc.class_names = cases[i].names;
        array.class_names = NULL;
        snprintf(words, sizeof words, "desc: %s", cases[i].words);
        expect(ctx, "desc", ckca_open_array(ctx, &data, &array, &desc), CKCA_EINVAL, words);
    }
}

static void test_join(ckca_context *ctx) {
    static const unsigned char pixels[3] = {1, 2, 3};
    static const int labels[1] = {0};
    ckca_context *other = new_context(1);
    ckca_array array = {NULL, NULL, 1, 1, 1, 3, 1, NULL};
    ckca_data *parts[2] = {NULL, NULL}, *joined = NULL;
    array.pixels = pixels;
    array.labels = labels;
    CHECK(!ckca_open_array(ctx, &parts[0], &array, NULL) && !ckca_open_array(other, &parts[1], &array, NULL), "open");
    expect(ctx, "join", ckca_join(&joined, parts, 2), CKCA_EINVAL,
           "ckca_join: parts[1] belongs to another context than parts[0]");
    CHECK(ckca_join(&joined, parts, 0) == CKCA_EINVAL && ckca_join(&joined, parts, -1) == CKCA_EINVAL && !joined,
          "no parts");
    ckca_data_free(parts[0]);
    ckca_data_free(parts[1]);
    ckca_context_free(other);
}

static ckca_status job_folders(ckca_context *ctx) {
    ckca_data *data = NULL;
    ckca_data_desc desc;
    ckca_status status;
    memset(&desc, 0, sizeof desc);
    desc.skip_unreadable = 1;
    desc.height = 20;
    status = ckca_open_folder(ctx, &data, DIR_ "jobs", &desc);
    ckca_data_free(data);
    return status;
}

/* ---- CIFAR and IDX where something is not as it should be ---- */

static void test_sets(ckca_context *ctx) {
    static unsigned char record[3074];
    static const unsigned char pictures[16 + 4] = {0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 2, 1, 2, 3, 4},
                                             labels[9] = {0, 0, 8, 1, 0, 0, 0, 1, 5};
    static const struct {
        const char *file, *dir, *words;
        int set; /* 10, 100; 0: IDX */
    } cases[] = {{"python/batches.meta", NULL, NULL, 0},
                 {"python/test_batch", "python", "the Python version of CIFAR-10: the binary version is needed", 10},
                 {"above/cifar-10-batches-py/x", "above", "contains cifar-10-batches-py, which is the Python version", 10},
                 {"tar/cifar-10-binary.tar.gz", "tar", "an archive: unpack it with tar -xzf", 10},
                 {"gz/test_batch.bin.gz", "gz", "gz/test_batch.bin.gz: compressed: unpack it with gunzip", 10},
                 {"python100/meta", "python100", "the Python version of CIFAR-100", 100},
                 {"tar100/cifar-100-binary.tar.gz", "tar100", "an archive", 100},
                 {"other/train.bin", "other", "contains train.bin, which is a file of CIFAR-100", 10},
                 {"fine/cifar-10-batches-bin/sub/x", "fine/cifar-10-batches-bin/sub", "is in the folder above", 10},
                 {"digits/MNIST/raw/sub/x", "digits/MNIST/raw/sub", "is in the folder above", 0},
                 {"file/test_batch.bin", "file/test_batch.bin", "is a file: pass the folder that contains it", 10}};
    char path[200];
    size_t i;
    ckca_data *data = NULL;
    put(DIR_ "fine/cifar-10-batches-bin/test_batch.bin", record, 3073);
    put(DIR_ "fine/cifar-100-binary/test.bin", record, 3074);
    put(DIR_ "digits/MNIST/raw/t10k-images-idx3-ubyte", pictures, sizeof pictures);
    put(DIR_ "digits/MNIST/raw/t10k-labels-idx1-ubyte", labels, sizeof labels);
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        snprintf(path, sizeof path, DIR_ "%s", cases[i].file);
        put(path, record, 3073);
        if (!cases[i].dir) continue;
        snprintf(path, sizeof path, DIR_ "%s", cases[i].dir);
        expect(ctx, cases[i].dir,
               cases[i].set == 10    ? ckca_open_cifar10(ctx, &data, path, CKCA_PART_TEST, NULL)
               : cases[i].set == 100 ? ckca_open_cifar100(ctx, &data, path, CKCA_PART_TEST, NULL)
                                     : ckca_open_idx(ctx, &data, path, CKCA_PART_TEST, NULL),
               CKCA_EIO, cases[i].words);
    }
    put(DIR_ "inside/test_batch.bin", "\x1f\x8bxyz", 5);
    expect(ctx, "gzip inside", ckca_open_cifar10(ctx, &data, DIR_ "inside", CKCA_PART_TEST, NULL), CKCA_EFORMAT,
           "inside/test_batch.bin: gzip-compressed: rename it to end in .gz and unpack it with gunzip");
    CHECK(ckca_open_cifar10(ctx, &data, DIR_ "fine", CKCA_PART_TEST, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    ckca_data_free(data);
    CHECK(ckca_open_cifar100(ctx, &data, DIR_ "fine", CKCA_PART_TEST, NULL) == CKCA_OK, "%s", ckca_error(ctx));
    ckca_data_free(data);
    CHECK(ckca_open_idx(ctx, &data, DIR_ "digits", CKCA_PART_TEST, NULL) == CKCA_OK && ckca_label(data, 0) == 5, "%s",
          ckca_error(ctx));
    ckca_data_free(data);
}

/* ---- mutation ---- */

static uint32_t state = 1;
static size_t draw(size_t below) {
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % below;
}

/* Rewrites lengths that lead beyond the end, and every checksum. */
static void mend(file *f) {
    size_t at, k;
    for (at = 8; at + 12 <= f->size;) {
        size_t length = ckca__big_endian(f->bytes + at);
        uint32_t crc;
        if (length > f->size - at - 12) {
            length = f->size - at - 12;
            for (k = 0; k < 4; k++) f->bytes[at + k] = (unsigned char)(length >> (24 - 8 * k));
        }
        crc = ckca__crc(f->bytes + at + 4, length + 4);
        for (k = 0; k < 4; k++) f->bytes[at + 8 + length + k] = (unsigned char)(crc >> (24 - 8 * k));
        at += 12 + length;
    }
}

static void mutate(file *f, int is_png) {
    static const unsigned char odd[] = {0,    1,    2,    0x7f, 0x80, 0xff, 0xd0, 0xd8,
                                        0xd9, 0xda, 0xc0, 0xc2, 0xc4, 0xdb, 0xdd};
    int changes = 1 + (int)draw(draw(4) ? 3 : 12);
    while (changes-- && f->size > 16) {
        size_t at = draw(f->size), n = 1 + draw(8), from;
        if (is_png && at < 8 && draw(8)) continue;
        if (n > f->size - at) n = f->size - at;
        switch (draw(6)) {
        case 0:
            f->bytes[at] ^= (unsigned char)(1u << draw(8));
            break;
        case 1:
            f->bytes[at] = (unsigned char)draw(256);
            break;
        case 2:
            f->bytes[at] = odd[draw(sizeof odd)];
            break;
        case 3:
            cut(f, at, n);
            break;
        case 4: /* a piece once more, elsewhere */
            n = 1 + draw(40);
            from = draw(f->size);
            if (n > f->size - from) n = f->size - from;
            if (f->size + n < sizeof f->bytes) {
                unsigned char piece[40];
                memcpy(piece, f->bytes + from, n);
                insert(f, at, piece, n);
            }
            break;
        default:
            if (draw(4) == 0)
                f->size = at + 1;
            else
                f->bytes[at] = (unsigned char)(f->bytes[at] + (draw(2) ? 1 : -1));
        }
    }
    if (is_png) mend(f);
}

/* So many mutated JPEGs and as many PNGs, through ckca_read_picture one by one and ckca_open_folder by the dozen. */
static void test_mutations(ckca_context *ctx, long count) {
    enum { BATCH = 12 };
    const struct {
        const unsigned char *bytes;
        size_t size;
    } seeds[] = {{rgb_jpg, sizeof rgb_jpg},
                 {grey_jpg, sizeof grey_jpg},
                 {restarts_jpg, sizeof restarts_jpg},
                 {progressive_jpg, sizeof progressive_jpg},
                 {progressive_restarts_jpg, sizeof progressive_restarts_jpg},
                 {cmyk_jpg, sizeof cmyk_jpg},
                 {rgb_png, sizeof rgb_png},
                 {grey_alpha_png, sizeof grey_alpha_png},
                 {palette_png, sizeof palette_png}};
    static const char *const digits[] = {"0", "1"};
    long done, taken = 0, whole = 0, other = 0;
    int is_png, k;
    most_pixels = 1 << 14; /* the time shall go into parsing */
    for (done = 0; done < count; done += BATCH)
        for (is_png = 0; is_png < 2; is_png++) {
            ckca_data *data = NULL;
            ckca_data_desc desc;
            ckca_status status;
            int read = 0;
            memset(&desc, 0, sizeof desc);
            desc.height = desc.width = 1 + (int)draw(20);
            desc.channels = draw(2) ? 3 : 1;
            desc.as_stored = (int)draw(2);
            for (k = 0; k < BATCH; k++) {
                static unsigned char out[20 * 20 * 3];
                size_t which = is_png ? 6 + draw(3) : draw(6);
                file f = copy_of(seeds[which].bytes, seeds[which].size);
                char path[100];
                if (is_png && draw(3) == 0) f = png_with_exif((int)draw(10), (int)draw(2), 0);
                if (!is_png && draw(4) == 0) f = jpeg_with_exif((int)draw(10), (int)draw(2), 3 + (int)draw(2));
                mutate(&f, is_png);
                snprintf(path, sizeof path, DIR_ "mutated/%d/%02d.%s", k & 1, k, is_png ? "png" : "jpg");
                put(path, f.bytes, f.size);
                status = ckca_read_picture(ctx, path, &desc, out);
                read += status == CKCA_OK;
                other += status != CKCA_OK && status != CKCA_EFORMAT;
            }
            taken += read;
            desc.skip_unreadable = 1;
            desc.classes = 2; /* named: a class may lose all its pictures */
            desc.class_names = digits;
            if (draw(2)) desc.height = desc.width = 0;
            data = NULL; /* a failing call leaves it alone */
            status = ckca_open_folder(ctx, &data, DIR_ "mutated", &desc);
            if (status == CKCA_OK) {
                ckca_data_info info;
                ckca_data_info_get(data, &info);
                whole++;
                if (info.count != read || info.count + info.unreadable != BATCH) other++;
            } else {
                other += read > 0 || status != CKCA_EFORMAT;
            }
            ckca_data_free(data);
            remove_all(DIR_ "mutated");
        }
    most_pixels = (int64_t)1 << 26;
    CHECK(other == 0, "%ld mutated pictures or folders with another end than OK or a bad file", other);
    CHECK(taken > count / 20 && taken < count * 2, "%ld of %ld mutated pictures taken", taken, done * 2);
    if (count > 1000) printf("%ld JPEGs and %ld PNGs mutated: %ld read, %ld folders\n", done, done, taken, whole);
}

int main(int argc, char **argv) {
    ckca_context *ctx = new_context(2);
    test_enter();
    if (argc > 1) {
        if (argc > 2) state = (uint32_t)atol(argv[2]);
        test_mutations(ctx, atol(argv[1]));
    } else {
        test_truncated(ctx);
        test_broken_jpegs(ctx);
        test_broken_pngs(ctx);
        test_palettes(ctx);
        test_orientation(ctx);
        test_folders(ctx);
        test_names(ctx);
        test_join(ctx);
        test_sets(ctx);
        put(DIR_ "jobs/a/b/1.jpg", progressive_restarts_jpg, sizeof progressive_restarts_jpg - 2);
        put(DIR_ "jobs/a/2.jpg", "x", 1);
        fail_each_allocation("folders", job_folders);
        test_mutations(ctx, 300);
    }
    remove_all("build/test_pictures");
    test_leave();
    ckca_context_free(ctx);
    return test_summary();
}

#else /* no JPEG and PNG: calls are there, and say so */

int main(void) {
    ckca_context *ctx = new_context(1);
#ifdef CKCA_NO_STB_IMAGE
    unsigned char out[3];
    ckca_data_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = 1;
    desc.channels = 3;
    expect(ctx, "memory", ckca_read_picture_memory(ctx, "x", 1, &desc, out), CKCA_EINVAL,
           "built without JPEG and PNG (CKCA_NO_STB_IMAGE)");
#else
    unsigned char out[8 * 8 * 3];
    ckca_data_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = 8;
    desc.channels = 3;
    CHECK(ckca_read_picture_memory(ctx, rgb_jpg, sizeof rgb_jpg, &desc, out) == CKCA_OK, "%s", ckca_error(ctx));
#endif
    ckca_context_free(ctx);
    return test_summary();
}

#endif
