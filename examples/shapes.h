/* shapes.h: draws 32x32 colour pictures of ten classes, for examples and tests that work without a download. No two
   pictures of a class are alike: pose, size, colour, contrast and noise vary, the outline is blended with another
   class's, and other objects lie behind and in front. Each class has a preferred colour, a weak cue.

   A picture is a pure function of (seed, i), so a set can be drawn in any order and in parts. Every class is a signed
   distance: a function of a point, negative inside the shape; divided by the pixel size, it gives the share of the
   pixel that the shape covers. Include it after ckca.h to get shapes_open too. */
#ifndef SHAPES_H
#define SHAPES_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define SHAPES_SIZE 32
#define SHAPES_CLASSES 10
#define SHAPES_BYTES (SHAPES_SIZE * SHAPES_SIZE * 3)

static const char *const shapes_names[SHAPES_CLASSES] = {"cross",  "crescent", "disc",  "ell", "ring",
                                                         "square", "star",     "stripes", "tee", "triangle"};

/* A stream of random numbers: SplitMix64 (Steele, Lea, Flood 2014). */
typedef struct shapes_random {
    uint64_t key, counter;
} shapes_random;

static inline float shapes_uniform(shapes_random *random, float low, float high) {
    uint64_t z = random->key + ++random->counter * UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    z ^= z >> 31;
    return low + (high - low) * (float)(z >> 40) * (1.0f / 16777216.0f);
}

/* Rectangle with half sides a and b around (cx, cy). */
static inline float shapes_box(float x, float y, float cx, float cy, float a, float b) {
    return fmaxf(fabsf(x - cx) - a, fabsf(y - cy) - b);
}

/* n tips at distance 1, valleys between them at distance inner: 3, 0.5 is a triangle; 4, 0.71 a square; 5, 0.45 a star.
   The angle is folded into half a tip, where the outline is one straight line. */
static inline float shapes_spikes(float x, float y, int n, float inner) {
    float half = 3.14159265f / (float)n, r = sqrtf(x * x + y * y), a = atan2f(y, x);
    float ix = inner * cosf(half), iy = inner * sinf(half), length = sqrtf((1 - ix) * (1 - ix) + iy * iy);
    a = fabsf(a - 2 * half * floorf(a / (2 * half) + 0.5f));
    return ((r * cosf(a) - 1) * iy + r * sinf(a) * (1 - ix)) / length;
}

/* Signed distance of (x, y) from the outline of a class, the shape within about 1 of the origin. */
static inline float shapes_distance(int label, float x, float y) {
    float r = sqrtf(x * x + y * y);
    switch (label) {
    case 0: return fminf(shapes_box(x, y, 0, 0, 0.95f, 0.3f), shapes_box(x, y, 0, 0, 0.3f, 0.95f));
    case 1: return fmaxf(r - 0.9f, 0.72f - sqrtf((x - 0.42f) * (x - 0.42f) + y * y));
    case 2: return r - 0.85f;
    case 3: return fminf(shapes_box(x, y, -0.35f, 0, 0.25f, 0.85f), shapes_box(x, y, 0.1f, 0.6f, 0.7f, 0.25f));
    case 4: return fabsf(r - 0.65f) - 0.23f;
    case 5: return shapes_spikes(x, y, 4, 0.7071f);
    case 6: return shapes_spikes(x, y, 5, 0.45f);
    case 7: return fmaxf(r - 0.95f, 0.16f - fabsf(x / 0.62f - floorf(x / 0.62f) - 0.5f) * 0.62f);
    case 8: return fminf(shapes_box(x, y, 0, -0.55f, 0.85f, 0.25f), shapes_box(x, y, 0, 0.15f, 0.25f, 0.75f));
    default: return shapes_spikes(x, y, 3, 0.5f);
    }
}

/* A colour that changes across the picture: value c at (x, y) is base[c] + x along[c] + y across[c]. */
typedef struct shapes_paint {
    float base[3], along[3], across[3];
} shapes_paint;

static inline shapes_paint shapes_mix(shapes_random *random, float low, float high, float slope) {
    shapes_paint paint;
    int c;
    for (c = 0; c < 3; c++) {
        paint.base[c] = shapes_uniform(random, low, high);
        paint.along[c] = shapes_uniform(random, -slope, slope);
        paint.across[c] = shapes_uniform(random, -slope, slope);
    }
    return paint;
}

/* A figure: the outline of class label, blended with a share of class other's; centre and radius in pixels; scaled
   along its axes by stretch and 1 / stretch, then rotated by angle; opacity in 0..1. Label -1 is a bar. */
typedef struct shapes_figure {
    int label, other;
    float share, cx, cy, radius, stretch, angle, opacity;
    shapes_paint paint;
} shapes_figure;

/* Draws a figure over picture (32 x 32 x 3 floats in 0..1). */
static inline void shapes_stamp(float *picture, const shapes_figure *f) {
    float co = cosf(f->angle), si = sinf(f->angle);
    int px, py, c;
    for (py = 0; py < SHAPES_SIZE; py++) {
        for (px = 0; px < SHAPES_SIZE; px++) {
            float dx = ((float)px - f->cx) / f->radius, dy = ((float)py - f->cy) / f->radius;
            float x = (co * dx + si * dy) / f->stretch, y = (co * dy - si * dx) * f->stretch, d, cover;
            if (x * x + y * y > 2.5f) continue;
            d = f->label < 0 ? shapes_box(x, y, 0, 0, 1.2f, 0.2f) : shapes_distance(f->label, x, y);
            if (f->share > 0) d += f->share * (shapes_distance(f->other, x, y) - d);
            cover = f->opacity * fminf(fmaxf(0.5f - d * f->radius, 0), 1);
            for (c = 0; c < 3 && cover > 0; c++) {
                float u = (float)px / SHAPES_SIZE - 0.5f, v = (float)py / SHAPES_SIZE - 0.5f;
                float *out = picture + (py * SHAPES_SIZE + px) * 3 + c;
                *out += cover * (f->paint.base[c] + u * f->paint.along[c] + v * f->paint.across[c] - *out);
            }
        }
    }
}

/* The figure that the picture is labelled by. */
static inline shapes_figure shapes_subject(shapes_random *random, int label, const shapes_paint *ground) {
    shapes_figure f;
    float gap;
    int c;
    f.label = label;
    f.other = (int)shapes_uniform(random, 0, 9.999f);
    f.share = shapes_uniform(random, 0, 0.4f);
    f.cx = shapes_uniform(random, 13, 18);
    f.cy = shapes_uniform(random, 13, 18);
    f.radius = shapes_uniform(random, 10, 15);
    f.stretch = shapes_uniform(random, 0.85f, 1.18f);
    f.angle = shapes_uniform(random, -0.4f, 0.4f);
    f.opacity = shapes_uniform(random, 0.35f, 1);
    do { /* a colour near the class's own, drawn until it differs from the background's */
        f.paint = shapes_mix(random, 0, 1, 0.3f);
        for (gap = 0, c = 0; c < 3; c++) {
            float own = 0.5f + 0.5f * cosf(6.2831853f * ((float)label / SHAPES_CLASSES + (float)c / 3));
            f.paint.base[c] += 0.4f * (own - f.paint.base[c]);
            gap += fabsf(f.paint.base[c] - ground->base[c]);
        }
    } while (gap < 0.5f);
    return f;
}

/* A distractor: a bar, or a small figure of any class. */
static inline shapes_figure shapes_thing(shapes_random *random) {
    shapes_figure f;
    f.label = (int)fmaxf(-1, floorf(shapes_uniform(random, -10, 9.999f)));
    f.other = 0;
    f.share = 0;
    f.cx = shapes_uniform(random, 0, SHAPES_SIZE - 1);
    f.cy = shapes_uniform(random, 0, SHAPES_SIZE - 1);
    f.radius = f.label < 0 ? shapes_uniform(random, 4, 8) : shapes_uniform(random, 2, 4.5f);
    f.stretch = 1;
    f.angle = shapes_uniform(random, 0, 6.2831853f);
    f.opacity = 0.9f;
    f.paint = shapes_mix(random, 0, 1, 0.2f);
    return f;
}

/* Draws picture i of the set of a seed: writes 32 x 32 x 3 bytes and returns the label, i % 10. */
static inline int shapes_draw(uint64_t seed, int i, unsigned char *pixels) {
    float picture[SHAPES_BYTES], slope_x, slope_y, phase, height, noise;
    int label = i % SHAPES_CLASSES, behind, before, k, c;
    shapes_random random;
    shapes_paint ground;
    shapes_figure figure;
    random.key = (seed * UINT64_C(0xd1342543de82ef95) + (uint64_t)i) * UINT64_C(0x2545f4914f6cdd1d) + 1;
    random.counter = 0;

    /* Background: a gradient with a soft wave. */
    ground = shapes_mix(&random, 0.25f, 0.75f, 0.3f);
    slope_x = shapes_uniform(&random, -0.6f, 0.6f);
    slope_y = shapes_uniform(&random, -0.6f, 0.6f);
    phase = shapes_uniform(&random, 0, 6.2831853f);
    height = shapes_uniform(&random, 0, 0.12f);
    for (k = 0; k < SHAPES_SIZE * SHAPES_SIZE; k++) {
        float x = (float)(k % SHAPES_SIZE), y = (float)(k / SHAPES_SIZE);
        float u = x / SHAPES_SIZE - 0.5f, v = y / SHAPES_SIZE - 0.5f,
              wave = height * sinf(slope_x * x + slope_y * y + phase);
        for (c = 0; c < 3; c++) picture[3 * k + c] = ground.base[c] + u * ground.along[c] + v * ground.across[c] + wave;
    }

    behind = (int)shapes_uniform(&random, 0, 4);
    before = (int)shapes_uniform(&random, 0, 1.6f);
    for (k = 0; k < behind + 1 + before; k++) {
        figure = k == behind ? shapes_subject(&random, label, &ground) : shapes_thing(&random);
        if (k > behind) figure.radius *= 0.7f; /* figures in front are smaller, to hide little */
        shapes_stamp(picture, &figure);
    }

    /* Noise: the sum of three uniform draws approximates a normal distribution. */
    noise = shapes_uniform(&random, 0.01f, 0.08f);
    for (k = 0; k < SHAPES_BYTES; k++) {
        float bell = 0;
        for (c = 0; c < 3; c++) bell += shapes_uniform(&random, -1, 1);
        pixels[k] = (unsigned char)(255 * fminf(fmaxf(picture[k] + noise * bell, 0), 1) + 0.5f);
    }
    return label;
}

#ifdef CKCA_H
/* Opens pictures [first, first + count) of the set; desc may be NULL. Free data with ckca_data_free. */
static inline ckca_status shapes_open(ckca_context *ctx, ckca_data **data, uint64_t seed, int first, int count,
                               const ckca_data_desc *desc) {
    ckca_array array = {NULL, NULL, count, SHAPES_SIZE, SHAPES_SIZE, 3, SHAPES_CLASSES, shapes_names};
    unsigned char *pixels = (unsigned char *)malloc((size_t)count * SHAPES_BYTES);
    int *labels = (int *)malloc((size_t)count * sizeof *labels), i;
    ckca_status status = CKCA_ENOMEM;
    *data = NULL;
    if (pixels && labels) {
        for (i = 0; i < count; i++) labels[i] = shapes_draw(seed, first + i, pixels + (size_t)i * SHAPES_BYTES);
        array.pixels = pixels;
        array.labels = labels;
        status = ckca_open_array(ctx, data, &array, desc);
    }
    free(pixels);
    free(labels);
    return status;
}
#endif

#endif /* SHAPES_H */
