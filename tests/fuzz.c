/* The parsers of files from outside, for libFuzzer. The first byte of an input chooses the parser, the rest is the
   file:

     clang -g -O1 -fsanitize=fuzzer,address,undefined -I. tests/fuzz.c -o build/fuzz -lm -pthread
     mkdir -p build/corpus
     FUZZ_SEEDS=build/corpus build/fuzz -max_len=6400 build/corpus

   FUZZ_SEEDS names a folder for seeds to be written into first; FUZZ_TARGET=0 or more keeps to one parser.

   Checksums of PNGs are not checked here, for no fuzzer guesses one. */
#define FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
#define CKCA__MAX_PIXELS ((int64_t)1 << 18) /* small pictures only: the time shall go into parsing */
#define CKCA_IMPLEMENTATION
#include "ckca.h"

/* To add a parser: a name here, a function, a line in run(), a seed in write_seeds(). */
enum { SAFETENSORS, NAMES, CIFAR, IDX, PICTURE, LINES, GRAPH, CHECKPOINT, MEMORY, TARGETS };

static void fuzz_safetensors(ckca_context *ctx, const unsigned char *bytes, size_t size) {
    ckca__st_file file;
    size_t i;
    int k;
    if (ckca__st_parse(ctx, "fuzz", bytes, size, &file) == CKCA_OK) {
        for (i = 0; i < file.tensors; i++) {
            const ckca__st_tensor *tensor = ckca__st_find(&file, file.tensor[i].name);
            size_t count = 1;
            float *values;
            if (!tensor || tensor->end > size) abort();
            for (k = 0; k < tensor->dims; k++) count *= (size_t)tensor->shape[k];
            values = (float *)malloc(count * sizeof *values + 1); /* as many as the shape says, and no more */
            ckca__st_read_floats(&file, tensor, values);
            free(values);
        }
        for (i = 0; i < file.metas; i++)
            if (ckca__st_meta(&file, file.meta[i].key) != file.meta[i].value) abort();
    }
    ckca__st_close(&file);
}

/* Names that were taken must survive being written and read again. */
static void fuzz_names(ckca_context *ctx, const char *text) {
    char **names, **again, *json;
    int n, m, i;
    if (ckca__names_from_json(ctx, "fuzz", text, &names, &n)) return;
    json = ckca__names_to_json(ctx, (const char *const *)names, n);
    if (!json || ckca__names_from_json(ctx, "fuzz", json, &again, &m) || m != n) abort();
    for (i = 0; i < n; i++)
        if (strcmp(names[i], again[i])) abort();
    ckca__free_names(ctx, again, m);
    ckca__free_names(ctx, names, n);
    ckca__release(ctx, json);
}

static void fuzz_cifar(ckca_context *ctx, unsigned char *bytes, size_t size) {
    int label[100], i, label_bytes = size && bytes[0] & 1 ? 2 : 1;
    ckca__store *store;
    ckca_data_desc desc;
    for (i = 0; i < 100; i++) label[i] = i % 7 == 6 ? -1 : i;
    memset(&desc, 0, sizeof desc);
    desc.height = size && bytes[0] & 2 ? 8 : 0;
    if (ckca__store_create(ctx, &store, size / 3073 + 1, 32, 32, 3, 100, NULL, &desc)) abort();
    ckca__parse_cifar(ctx, "fuzz", bytes, size, label_bytes, label_bytes == 1 ? 10 : 100, label, store, 0);
    ckca__store_release(store);
}

/* The pictures' file comes first, its length in the first two bytes. */
static void fuzz_idx(ckca_context *ctx, const unsigned char *bytes, size_t size) {
    ckca_data *data = NULL;
    ckca_data_desc desc;
    volatile unsigned char sink; /* reading the last byte shows that it is there */
    size_t split;
    int i;
    if (size < 2) return;
    split = (size_t)bytes[0] << 8 | bytes[1];
    if (split > size - 2) split = size - 2;
    memset(&desc, 0, sizeof desc);
    desc.channels = split & 1 ? 3 : 0;
    if (ckca__parse_idx_pair(ctx, &data, "fuzz", bytes + 2, split, "fuzz", bytes + 2 + split, size - 2 - split, &desc))
        return;
    for (i = 0; i < data->count; i++)
        if (ckca_label(data, i) < 0 || ckca_label(data, i) >= data->store->classes) abort();
    sink = ckca_pixels(data, data->count - 1)[ckca__picture_bytes(data->store) - 1];
    (void)sink;
    ckca_data_free(data);
}

static void fuzz_picture(ckca_context *ctx, const unsigned char *bytes, size_t size) {
#ifndef CKCA_NO_STB_IMAGE
    unsigned char out[9 * 7 * 3];
    ckca__decode(ctx, "fuzz", bytes, size, out, 9, 7, size & 1 ? 3 : 1, 0);
#else
    (void)ctx, (void)bytes, (void)size;
#endif
}

static void fuzz_lines(ckca_context *ctx, char *text) {
    const char *names[3];
    if (ckca__parse_lines(ctx, "fuzz", text, names, 3) == CKCA_OK && (!*names[0] || !*names[1] || !*names[2])) abort();
}

/* A network that was taken must be written as a text that is taken and written the same. */
static void fuzz_graph(ckca_context *ctx, const char *text) {
    ckca_model *model, *again;
    ckca_model_desc desc;
    ckca_bytes bytes;
    memset(&desc, 0, sizeof desc);
    desc.classes = 10;
    if (ckca_model_create(ctx, &model, &desc) || ckca_model_create(ctx, &again, &desc)) abort();
    if (ckca__graph_read(model, text) == CKCA_OK) {
        size_t length = ckca__graph_write(model, NULL, 0);
        char *first = (char *)malloc(length + 1), *second = (char *)malloc(length + 1);
        ckca__graph_write(model, first, length + 1);
        if (ckca__graph_read(again, first) || ckca__graph_write(again, second, length + 1) != length ||
            strcmp(first, second))
            abort();
        ckca_model_bytes(model, 2, 1, &bytes);
        ckca_model_bytes(model, 2, 0, &bytes);
        free(first);
        free(second);
    }
    ckca_model_free(model);
    ckca_model_free(again);
}

static void fuzz_checkpoint(ckca_context *ctx, const unsigned char *bytes, size_t size) {
    ckca__st_file file;
    ckca_model *model = NULL;
    ckca_model_info info;
    if (ckca__st_parse(ctx, "fuzz", bytes, size, &file) == CKCA_OK && ckca__load_file(ctx, &model, &file) == CKCA_OK) {
        ckca_model_info_get(model, &info);
        if (info.parameters * 4 > (int64_t)size) abort(); /* every weight came from the file */
    }
    ckca_model_free(model);
    ckca__st_close(&file);
}

static ckca_model *tiny(ckca_context *ctx);

/* A memory that was taken has pictures that can be read, and is written and read the same. */
static void fuzz_memory(ckca_context *ctx, const unsigned char *bytes, size_t size) {
    ckca_model *model = tiny(ctx);
    ckca_memory *memory = NULL, *again = NULL;
    if (ckca_memory_from_bytes(model, &memory, bytes, size) == CKCA_OK) {
        const ckca_data *data = ckca_memory_pictures(memory);
        volatile unsigned char sink = data ? ckca_pixels(data, data->count - 1)[63] : 0;
        unsigned char *file;
        size_t length;
        (void)sink;
        if (ckca_memory_to_bytes(memory, NULL, 0, &length)) abort();
        file = (unsigned char *)malloc(length);
        if (ckca_memory_to_bytes(memory, file, length, &length)) abort();
        if (ckca_memory_from_bytes(model, &again, file, length)) abort();
        free(file);
    }
    ckca_memory_free(again);
    ckca_memory_free(memory);
    ckca_model_free(model);
}

static void run(ckca_context *ctx, int target, unsigned char *bytes, size_t size) {
    if (target == SAFETENSORS) fuzz_safetensors(ctx, bytes, size);
    if (target == NAMES) fuzz_names(ctx, (const char *)bytes);
    if (target == CIFAR) fuzz_cifar(ctx, bytes, size);
    if (target == IDX) fuzz_idx(ctx, bytes, size);
    if (target == PICTURE) fuzz_picture(ctx, bytes, size);
    if (target == LINES) fuzz_lines(ctx, (char *)bytes);
    if (target == GRAPH) fuzz_graph(ctx, (const char *)bytes);
    if (target == CHECKPOINT) fuzz_checkpoint(ctx, bytes, size);
    if (target == MEMORY) fuzz_memory(ctx, bytes, size);
}

/* ---- seeds ---- */

/* The smallest network with every kind of node in it. */
static ckca_model *tiny(ckca_context *ctx) {
    static const char *const names[] = {"cat", "dog"};
    static const float mean[] = {0.5f}, std[] = {0.25f};
    ckca_model *model;
    ckca_model_desc desc;
    ckca_conv_desc conv;
    int x, y;
    memset(&desc, 0, sizeof desc);
    memset(&conv, 0, sizeof conv);
    desc.height = desc.width = 8;
    desc.channels = 1;
    desc.classes = 2;
    desc.class_names = names;
    desc.mean = mean;
    desc.std = std;
    if (ckca_model_create(ctx, &model, &desc)) abort();
    conv.out = 2;
    conv.pad = 1;
    conv.bias = 1;
    x = ckca_layer_input(model);
    x = ckca_layer_maxpool(model, ckca_layer_conv(model, "c", x, conv), 2, 2, 0);
    y = ckca_layer_batchnorm(model, "b", ckca_layer_conv(model, "d", x, conv));
    x = ckca_layer_stage(model, ckca_layer_relu(model, ckca_layer_add(model, x, y)));
    x = ckca_layer_avgpool(model, ckca_layer_subsample(model, x, 2, 4));
    if (ckca_model_finish(model, ckca_layer_linear(model, "fc", x, 2))) abort();
    return model;
}

static void seed(const char *folder, int target, int number, const void *bytes, size_t size) {
    char path[1000];
    FILE *file;
    snprintf(path, sizeof path, "%s/seed-%d-%d", folder, target, number);
    file = fopen(path, "wb");
    if (!file) return;
    fputc(target, file);
    fwrite(bytes, 1, size, file);
    fclose(file);
}

static void write_seeds(const char *folder) {
    static const char header[] = "{\"__metadata__\":{\"classes\":\"[\\\"cat\\\",\\\"d\\u00e9\\ud83d\\ude00\\\"]\"},"
                                 "\"a.weight\":{\"dtype\":\"F32\",\"shape\":[2,1],\"data_offsets\":[0,8]},"
                                 "\"b\":{\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[8,12]},"
                                 "\"c\":{\"dtype\":\"BF16\",\"shape\":[1],\"data_offsets\":[12,14]},"
                                 "\"d\":{\"dtype\":\"F64\",\"shape\":[1],\"data_offsets\":[14,22]},"
                                 "\"e\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[22,30]}}";
    static const char names[] = "[\"cat\", \"\\\"\\\\\\n\\u00e9\", \"\xf0\x9f\x98\x80\\ud83d\\ude00\"]";
    static const unsigned char idx[] = {0, 28, 0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2,
                                        3, 4,  5, 6, 7, 8, 9, 9, 8, 7, 0, 0, 8, 1, 0, 0, 0, 2, 3, 11};
    static unsigned char cifar[2 * 3074], file[1000];
    file[0] = (unsigned char)strlen(header);
    file[1] = (unsigned char)(strlen(header) >> 8);
    memcpy(file + 8, header, strlen(header));
    seed(folder, SAFETENSORS, 0, file, 8 + strlen(header) + 30);
    seed(folder, NAMES, 0, names, strlen(names));
    seed(folder, CIFAR, 0, cifar, 2 * 3073);
    cifar[0] = 3;
    seed(folder, CIFAR, 1, cifar, 2 * 3074);
    seed(folder, IDX, 0, idx, sizeof idx);
    seed(folder, LINES, 0, "cat\r\n\ndog\nemu\n", 14);
    {
        ckca_context *ctx;
        ckca_model *model;
        unsigned char *bytes;
        char path[1000];
        size_t size;
        if (ckca_init(&ctx, NULL)) abort();
        model = tiny(ctx);
        seed(folder, GRAPH, 0, file, ckca__graph_write(model, (char *)file, sizeof file));
        snprintf(path, sizeof path, "%s/checkpoint", folder);
        if (ckca_save(model, path) == CKCA_OK && ckca__read_file(ctx, path, 1 << 20, &bytes, &size) == CKCA_OK) {
            seed(folder, CHECKPOINT, 0, bytes, size);
            ckca__release(ctx, bytes);
            remove(path);
        }
        {
            static const unsigned char pixels[3 * 64] = {9};
            static const int labels[3] = {0, 1, 1};
            static const char *const classes[] = {"cat", "dog"};
            static unsigned char kept[4000];
            ckca_array array = {pixels, labels, 3, 8, 8, 1, 2, classes};
            ckca_memory_desc desc = {2, 1};
            ckca_memory *memory;
            ckca_data *data;
            model->updates = 1;
            if (ckca_open_array(ctx, &data, &array, NULL) || ckca_memory_create(model, &memory, &desc) ||
                ckca_memory_fill(memory, model, data) || ckca_memory_to_bytes(memory, kept, sizeof kept, &size))
                abort();
            seed(folder, MEMORY, 0, kept, size);
            ckca_memory_free(memory);
            ckca_data_free(data);
        }
        ckca_model_free(model);
        ckca_context_free(ctx);
    }
    { /* 9 x 10 pictures that Pillow wrote: JPEG in colour, grey, progressive; PNG in colour, grey with alpha,
           a palette, 16 and 1 bits; as hexadecimal */
        static const char *const pictures[] = {
            "ffd8ffe000104a46494600010100000100010000ffdb0043001b12141714111b1716171e1c1b2028422b28252528513a3d30"
            "42605565645f555d5b6a7899816a7190735b5d85b586909ea3abadab6780bcc9baa6c799a8aba4ffdb0043011c1e1e282328"
            "4e2b2b4ea46e5d6ea4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4"
            "a4a4a4a4a4a4a4a4ffc0001108000a000903012200021101031101ffc40014000100000000000000000000000000000004ff"
            "c4001c1000010305000000000000000000000000000104211114315161ffc400140101000000000000000000000000000000"
            "03ffc400191100030003000000000000000000000000000204031112ffda000c03010002110311003f0033665881965c16d9"
            "1220651341be66d892d0dc1fffd9",
            "ffd8ffe000104a46494600010100000100010000ffdb0043001b12141714111b1716171e1c1b2028422b28252528513a3d30"
            "42605565645f555d5b6a7899816a7190735b5d85b586909ea3abadab6780bcc9baa6c799a8aba4ffc0000b08000a00090101"
            "1100ffc40014000100000000000000000000000000000004ffc4001c10000103050000000000000000000000000001042111"
            "14315161ffda0008010100003f0033665881965c16d91220651347ffd9",
            "ffd8ffe000104a46494600010100000100010000ffdb0043001b12141714111b1716171e1c1b2028422b28252528513a3d30"
            "42605565645f555d5b6a7899816a7190735b5d85b586909ea3abadab6780bcc9baa6c799a8aba4ffc2000b08000a00090101"
            "1100ffc40014000100000000000000000000000000000003ffda00080101000000012666ffc4001710010101010000000000"
            "0000000000000002001012ffda000801010001050222e239ffc40014100100000000000000000000000000000020ffda0008"
            "010100063f021fffc40014100100000000000000000000000000000020ffda0008010100013f2101ffda0008010100000010"
            "cfffc4001a100002020300000000000000000000000000011121315171ffda0008010100013f10c74722aaa2168fffd9",
            "89504e470d0a1a0a0000000d49484452000000090000000a0802000000e967e3e90000001949444154789c63646068906360"
            "c08a581824197081e12e070012b002770a86ebd40000000049454e44ae426082",
            "89504e470d0a1a0a0000000d49484452000000090000000a0804000000cc0cbc350000002749444154789c63e4ffcfc9c0c9"
            "c0c9c0c1c009852c7c70265c881fb710d91a115a49d608d30a000ddc04841331347a0000000049454e44ae426082",
            "89504e470d0a1a0a0000000d49484452000000090000000a02030000001b6b9c2d0000000c504c544578bc80787180b42680"
            "2d26803bdcd7a30000002849444154789c63fcbffa1a1303030313030303d3bf030c4c3fde303031fc67607ac07080010900"
            "00e25908cfeb4fe0180000000049454e44ae426082",
            "89504e470d0a1a0a0000000d49484452000000090000000a100000000013fef7210000001849444154789c636460102f102f"
            "9040c24c0c1860b00a0100fe41044f38e015740000000049454e44ae426082",
            "89504e470d0a1a0a0000000d49484452000000090000000a01000000004e7e49130000002649444154789c63606860106560"
            "e1cd66f06260d40a63f066600cd5668a64605acbc014cd0000397f04107d784bc40000000049454e44ae426082"};
        size_t i, k;
        for (i = 0; i < sizeof pictures / sizeof *pictures; i++) {
            for (k = 0; pictures[i][2 * k]; k++) {
                char hex[3];
                memcpy(hex, pictures[i] + 2 * k, 2);
                hex[2] = 0;
                file[k] = (unsigned char)strtol(hex, NULL, 16);
            }
            seed(folder, PICTURE, (int)i, file, k);
        }
    }
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    if (getenv("FUZZ_SEEDS")) write_seeds(getenv("FUZZ_SEEDS"));
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    static int only = -2;
    ckca_context *ctx;
    ckca_desc desc;
    unsigned char *copy;
    int target;
    if (only == -2) only = getenv("FUZZ_TARGET") ? atoi(getenv("FUZZ_TARGET")) : -1;
    if (size < 1) return 0;
    target = only >= 0 ? only % TARGETS : bytes[0] % TARGETS;
    memset(&desc, 0, sizeof desc);
    desc.threads = 1;
    if (ckca_init(&ctx, &desc)) return 0;
    copy = (unsigned char *)malloc(size); /* exactly the file, and for the parsers of text a zero behind it */
    memcpy(copy, bytes + 1, size - 1);
    if (target == NAMES || target == LINES || target == GRAPH) copy[size - 1] = 0;
    else copy = (unsigned char *)realloc(copy, size > 1 ? size - 1 : 1);
    run(ctx, target, copy, size - 1);
    free(copy);
    ckca_context_free(ctx);
    return 0;
}
