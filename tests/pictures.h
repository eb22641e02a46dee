/* pictures.h: drawn pictures and the JPEG files of them, for tests and benchmarks that need many or large ones. Baseline,
   4:2:0, with Huffman codes of one length each, so that no tables need to be copied from the standard. */
#ifndef PICTURES_H
#define PICTURES_H
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Pixel (y, x) of drawn picture number k: waves of the class's direction and colour, with a little noise. */
static inline void drawn_pixel(int k, int classes, int y, int x, unsigned char *rgb) {
    const int label = k % classes;
    const double angle = 3.14159265 * label / classes, phase = 0.7 * k;
    const double wave = sin(phase + 0.15 * (x * cos(angle) + y * sin(angle)));
    const uint32_t noise = ((uint32_t)k * 2654435761u + (uint32_t)y * 40503u + (uint32_t)x * 30011u) >> 5;
    int j;
    for (j = 0; j < 3; j++)
        rgb[j] = (unsigned char)(110 + 80 * wave * cos(1.3 * j + label) + (double)((noise >> (3 * j)) % 24));
}

typedef struct jpeg_writer {
    unsigned char *out;
    size_t at;
    uint32_t bits;
    int count; /* bits that wait */
} jpeg_writer;

static inline void jpeg_put(jpeg_writer *w, unsigned value, int n) {
    w->bits = w->bits << n | (value & ((1u << n) - 1));
    for (w->count += n; w->count >= 8; w->count -= 8) {
        const unsigned char byte = (unsigned char)(w->bits >> (w->count - 8));
        w->out[w->at++] = byte;
        if (byte == 255) w->out[w->at++] = 0;
    }
}

/* A coefficient's size in bits, and those bits. */
static inline int jpeg_size(int v) {
    int n = 0;
    for (v = v < 0 ? -v : v; v; v >>= 1) n++;
    return n;
}

/* One block of 8 x 8 samples of component c (0: Y, 1: Cb, 2: Cr), step pixels apart. */
static inline void jpeg_block(jpeg_writer *w, const unsigned char *rgb, int h, int width, int y0, int x0, int step,
                              int c, int quantum, int *dc) {
    static const unsigned char zigzag[64] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,
                                             12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28,
                                             35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
                                             58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};
    static const double of[3][4] = {{0.299, 0.587, 0.114, -128}, {-0.168736, -0.331264, 0.5, 0}, {0.5, -0.418688, -0.081312, 0}};
    static double cosine[8][8];
    double v[8][8], half[8][8];
    int i, j, k, run = 0;
    if (cosine[0][0] == 0)
        for (i = 0; i < 8; i++)
            for (j = 0; j < 8; j++)
                cosine[i][j] = (i ? 0.5 : 0.35355339059327) * cos((2 * j + 1) * i * 3.14159265358979 / 16);
    for (i = 0; i < 8; i++)
        for (j = 0; j < 8; j++) {
            const int y = y0 + i * step < h ? y0 + i * step : h - 1, x = x0 + j * step < width ? x0 + j * step : width - 1;
            const unsigned char *p = rgb + 3 * ((size_t)y * (size_t)width + (size_t)x);
            v[i][j] = of[c][0] * p[0] + of[c][1] * p[1] + of[c][2] * p[2] + of[c][3];
        }
    for (i = 0; i < 8; i++)
        for (j = 0; j < 8; j++)
            for (k = 0, half[i][j] = 0; k < 8; k++) half[i][j] += v[i][k] * cosine[j][k];
    for (k = 0; k < 64; k++) {
        double sum = 0;
        int value, size;
        for (i = 0; i < 8; i++) sum += half[i][zigzag[k] % 8] * cosine[zigzag[k] / 8][i];
        value = (int)floor(sum / quantum + 0.5);
        if (k == 0) {
            const int difference = value - *dc;
            *dc = value;
            size = jpeg_size(difference);
            jpeg_put(w, (unsigned)size, 4);
            jpeg_put(w, (unsigned)(difference < 0 ? difference - 1 : difference), size);
            continue;
        }
        if (!value) {
            run++;
            continue;
        }
        for (; run > 15; run -= 16) jpeg_put(w, 161, 8);
        size = jpeg_size(value);
        jpeg_put(w, (unsigned)(1 + run * 10 + size - 1), 8);
        jpeg_put(w, (unsigned)(value < 0 ? value - 1 : value), size);
        run = 0;
    }
    if (run) jpeg_put(w, 0, 8);
}

/* Encodes h x w RGB pixels into out, of at least 1024 + 8 h w bytes (sides rounded up to 16); returns the size. */
static inline size_t jpeg_write(const unsigned char *rgb, int h, int w, int quantum, unsigned char *out) {
    jpeg_writer j;
    int y, x, k, dc[3] = {0, 0, 0};
    memset(&j, 0, sizeof j);
    j.out = out;
    memcpy(out, "\377\330\377\333\0\103\0", 7);
    memset(out + 7, quantum, 64);
    j.at = 71;
    memcpy(out + j.at, "\377\300\0\21\10\0\0\0\0\3\1\42\0\2\21\0\3\21\0", 19);
    out[j.at + 5] = (unsigned char)(h >> 8), out[j.at + 6] = (unsigned char)h;
    out[j.at + 7] = (unsigned char)(w >> 8), out[j.at + 8] = (unsigned char)w;
    j.at += 19;
    memcpy(out + j.at, "\377\304\0\37\0\0\0\0\14", 9); /* DC: 12 codes of 4 bits */
    memset(out + j.at + 9, 0, 12);
    for (k = 0; k < 12; k++) out[j.at + 21 + (size_t)k] = (unsigned char)k;
    j.at += 33;
    memcpy(out + j.at, "\377\304\0\265\20\0\0\0\0\0\0\0\242", 13); /* AC: 162 codes of 8 bits */
    memset(out + j.at + 13, 0, 8);
    out[j.at + 21] = 0; /* the end of a block */
    for (k = 0; k < 160; k++) out[j.at + 22 + (size_t)k] = (unsigned char)(k / 10 << 4 | (k % 10 + 1));
    out[j.at + 182] = 0xf0; /* 16 zeros */
    j.at += 183;
    memcpy(out + j.at, "\377\332\0\14\3\1\0\2\0\3\0\0\77\0", 14);
    j.at += 14;
    for (y = 0; y < h; y += 16)
        for (x = 0; x < w; x += 16) {
            for (k = 0; k < 4; k++) jpeg_block(&j, rgb, h, w, y + 8 * (k / 2), x + 8 * (k % 2), 1, 0, quantum, &dc[0]);
            jpeg_block(&j, rgb, h, w, y, x, 2, 1, quantum, &dc[1]);
            jpeg_block(&j, rgb, h, w, y, x, 2, 2, quantum, &dc[2]);
        }
    if (j.count) jpeg_put(&j, 0x7f, 8 - j.count);
    out[j.at++] = 255;
    out[j.at++] = 0xd9;
    return j.at;
}
#endif
