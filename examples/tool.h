/* tool.h: shared by the command-line examples: strict flags with a help text, pictures named by flags, an update that
   signals stop, a progress line. Include it after ckca.h. The library does not need it. */
#ifndef TOOL_H
#define TOOL_H

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h> /* isatty */

#include "shapes.h"
#ifdef CKCA_MPI
#include "mpi.h"
#endif

static const char *tool_name = "tool"; /* precedes every message */

/* With CKCA_MPI, under mpirun: rank 0 alone writes files and prints; a message that all ranks have is printed by rank 0,
   one of a single rank by that rank, which then ends the others. */
static int tool_rank;   /* this process; 0 without MPI */
static int tool_agreed; /* 1: all ranks are ending for the same reason */

/* Prints one line on stderr and exits: with 2 for a mistake on the command line, 1 for any later failure. */
#define tool_fail(code, ...)                    \
    do {                                        \
        fflush(stdout);                         \
        if (tool_rank == 0 || !tool_agreed) {   \
            fprintf(stderr, "%s: ", tool_name); \
            fprintf(stderr, __VA_ARGS__);       \
            fputc('\n', stderr);                \
        }                                       \
        exit(code);                             \
    } while (0)

static inline void tool_check(const ckca_context *ctx, ckca_status status) {
    if (status != CKCA_OK) tool_agreed = !strncmp(ckca_error(ctx), "rank ", 5); /* so begins what all ranks have */
    if (status != CKCA_OK)
        tool_fail(1, "%s", ctx && *ckca_error(ctx) ? ckca_error(ctx) : ckca_status_name(status));
}

#ifdef CKCA_MPI
static ckca_ranks tool_ranks;
static inline void tool_leave_ranks(void) { mpi_end(!tool_agreed); }
static inline void tool_join_ranks(void) {
    mpi_begin(&tool_ranks);
    atexit(tool_leave_ranks);
    tool_rank = tool_ranks.rank;
    if (tool_rank && !freopen("/dev/null", "w", stdout)) tool_fail(1, "/dev/null: %s", strerror(errno));
#ifdef CKCA_CUDA /* each rank of a machine takes a GPU of its own */
    {
        char gpu[16];
        snprintf(gpu, sizeof gpu, "%d", mpi.local_rank);
        if (mpi.local_size > 1) setenv("CUDA_VISIBLE_DEVICES", gpu, 0);
    }
#endif
}
#else
static inline void tool_join_ranks(void) {}
#endif

static inline ckca_context *tool_init(const ckca_desc *desc) {
    ckca_desc all;
    ckca_context *ctx = NULL;
    ckca_status status;
    memset(&all, 0, sizeof all);
    if (desc) all = *desc;
#ifdef CKCA_MPI
    all.ranks = &tool_ranks;
    if (!all.threads) all.threads = mpi_threads();
#endif
    status = ckca_init(&ctx, &all);
    tool_check(ctx, status);
    if (all.ranks && all.ranks->size > 1) printf("%d ranks; ", all.ranks->size);
    return ctx;
}

/* The end of every program: 0, or a failure if its output could not all be written. */
static inline int tool_end(void) {
    if (fflush(stdout) || ferror(stdout)) tool_fail(1, "standard output cannot be written");
    tool_agreed = 1;
    return 0;
}

/* ---- Flags ---------------------------------------------------------------------------------------------------- */

typedef enum tool_kind {
    TOOL_HEADING, /* a heading in the help text */
    TOOL_SWITCH,  /* int: 1 if given */
    TOOL_INT,     /* int in low..high */
    TOOL_SEED,    /* uint64_t */
    TOOL_FLOAT,   /* float in low..high; a given 0 becomes CKCA_OFF (0 in a descriptor means the default) */
    TOOL_CHOICE,  /* an enum: index of the word in arg, "this|that" */
    TOOL_TEXT     /* const char *, points into argv */
} tool_kind;

typedef struct tool_flag {
    const char *name; /* with its dashes */
    tool_kind kind;
    void *value; /* holds the default */
    double low, high;
    const char *arg, *help; /* the default is printed unless help has one in brackets */
    int free;               /* 1: may change when a run is resumed */
} tool_flag;

/* Flags for the fields of a ckca_desc. */
#define TOOL_THREADS_FLAG(desc)                                                                                        \
    {"--threads", TOOL_INT, &(desc).threads, 0, 1024, "N", "[one per processor]; results are the same for any N", 1}
#ifdef CKCA_CUDA
#define TOOL_DEVICE_FLAGS(desc)                                                                                        \
    TOOL_THREADS_FLAG(desc),                                                                                           \
        {"--precision", TOOL_CHOICE, &(desc).precision, 0, 0, "float32|tf32|bf16",                                     \
         "of the GPU's multiplications (bf16: of its maps too)", 0}
#else
#define TOOL_DEVICE_FLAGS(desc) TOOL_THREADS_FLAG(desc)
#endif

/* Index of text among the words "a|b|c", or -1. */
static inline int tool_choice(const char *words, const char *text) {
    size_t length = strlen(text);
    int i;
    for (i = 0; *words; i++) {
        size_t word = strcspn(words, "|");
        if (word == length && !strncmp(words, text, word)) return i;
        words += word + (words[word] == '|');
    }
    return -1;
}

/* The value of a flag as a user would type it; "" if it is the library's default or a text that was not given. */
static inline void tool_print_value(const tool_flag *flag, char *out, size_t size) {
    const char *words = flag->arg, *text;
    float number;
    int i;
    out[0] = 0;
    switch (flag->kind) {
    case TOOL_SWITCH:
    case TOOL_INT: snprintf(out, size, "%d", *(const int *)flag->value); break;
    case TOOL_SEED: snprintf(out, size, "%llu", (unsigned long long)*(const uint64_t *)flag->value); break;
    case TOOL_FLOAT:
        number = *(const float *)flag->value;
        if (number == CKCA_OFF) snprintf(out, size, "0");
        else if (number != 0) /* the fewest digits that read back as this float */
            for (i = 6; i < 10 && (i == 6 || strtof(out, NULL) != number); i++) snprintf(out, size, "%.*g", i, number);
        break;
    case TOOL_CHOICE:
        for (i = *(const int *)flag->value; i > 0; i--) words = strchr(words, '|') + 1;
        snprintf(out, size, "%.*s", (int)strcspn(words, "|"), words);
        break;
    case TOOL_TEXT:
        text = *(const char *const *)flag->value;
        if (text) snprintf(out, size, "%s", text);
        break;
    default: break;
    }
}

static inline void tool_help(const char *usage, const tool_flag *flags) {
    char left[80], value[512];
    printf("%s", usage);
    for (; flags->help; flags++) {
        if (flags->kind == TOOL_HEADING) {
            printf("\n%s\n", flags->help);
            continue;
        }
        snprintf(left, sizeof left, "%s %s", flags->name,
                 flags->kind == TOOL_CHOICE ? "WORD" : flags->arg ? flags->arg : "");
        tool_print_value(flags, value, sizeof value);
        printf("  %-22s %s", left, flags->help);
        if (flags->kind == TOOL_CHOICE) printf(": %s", flags->arg);
        if (*value && flags->kind != TOOL_SWITCH && !strchr(flags->help, '[')) printf(" [%s]", value);
        putchar('\n');
    }
    printf("  %-22s %s\n", "--help", "this text");
}

static inline void tool_set(const tool_flag *flag, const char *text) {
    char *end = NULL;
    double number;
    size_t i;
    errno = 0;
    switch (flag->kind) {
    case TOOL_CHOICE:
        *(int *)flag->value = tool_choice(flag->arg, text);
        if (*(int *)flag->value < 0) tool_fail(2, "%s %s: it must be one of %s", flag->name, text, flag->arg);
        break;
    case TOOL_TEXT:
        for (i = 0; text[i]; i++)
            if ((unsigned char)text[i] < 32) tool_fail(2, "%s: a control character in its value", flag->name);
        if (!*text) tool_fail(2, "%s: its value is empty", flag->name);
        *(const char **)flag->value = text;
        break;
    case TOOL_SEED:
        *(uint64_t *)flag->value = strtoull(text, &end, 10);
        if (!*text || *end || errno || *text == '-')
            tool_fail(2, "%s %s: it must be a whole number of 0 or more, below 2^64", flag->name, text);
        break;
    default:
        number = strtod(text, &end);
        if (!*text || *end || !isfinite(number)) tool_fail(2, "%s %s: it is not a number", flag->name, text);
        if (flag->kind == TOOL_INT && number != floor(number))
            tool_fail(2, "%s %s: it must be a whole number", flag->name, text);
        if (number < flag->low || number > flag->high)
            tool_fail(2, "%s %s: it must be between %.9g and %.9g", flag->name, text, flag->low, flag->high);
        if (flag->kind == TOOL_INT) *(int *)flag->value = (int)number;
        else *(float *)flag->value = number == 0 ? CKCA_OFF : (float)number;
    }
}

/* Parses argv (--flag value or --flag=value; -- ends the flags) into the flags' values, moves the other arguments to the
   front of argv and returns their number. flags ends with an entry whose help is NULL. */
static inline int tool_parse(int argc, char **argv, const char *usage, const tool_flag *flags) {
    int i, words = 0, ended = 0;
    tool_join_ranks();
    tool_agreed = 1; /* all ranks have the same command line */
    for (i = 1; i < argc; i++) {
        const char *text = argv[i];
        size_t length = strcspn(text, "=");
        const tool_flag *flag = flags;
        if (ended || text[0] != '-' || !text[1]) {
            argv[words++] = argv[i];
            continue;
        }
        if (!strcmp(text, "--")) {
            ended = 1;
            continue;
        }
        if (!strcmp(text, "--help") || !strcmp(text, "-h")) {
            tool_help(usage, flags);
            exit(tool_end());
        }
        while (flag->help && (!flag->name || strlen(flag->name) != length || strncmp(flag->name, text, length))) flag++;
        if (!flag->help) tool_fail(2, "unknown flag %s (--help lists them)", text);
        if (flag->kind == TOOL_SWITCH) {
            if (text[length]) tool_fail(2, "%s takes no value", flag->name);
            *(int *)flag->value = 1;
        } else if (text[length]) {
            tool_set(flag, text + length + 1);
        } else {
            if (i + 1 == argc || !strncmp(argv[i + 1], "--", 2)) tool_fail(2, "%s needs a value", flag->name);
            tool_set(flag, argv[++i]);
        }
    }
    tool_agreed = 0;
    return words;
}

/* ---- Pictures ------------------------------------------------------------------------------------------------- */

typedef struct tool_source {
    const char *folder, *cifar10, *cifar100, *idx; /* at most one; none: the shapes */
    int size, short_side, storage;                 /* see ckca_data_desc; size 0: original size */
} tool_source;

#define TOOL_SOURCE_FLAGS(source)                                                                                      \
    {NULL, TOOL_HEADING, NULL, 0, 0, NULL, "Pictures (default: drawn shapes of ten classes)", 0},\
    {"--data", TOOL_TEXT, &(source).folder, 0, 0, "DIR", "folders DIR/{train,test}/CLASS of JPEG or PNG files", 1},    \
    {"--cifar10", TOOL_TEXT, &(source).cifar10, 0, 0, "DIR", "CIFAR-10, binary version, unpacked", 1},                 \
    {"--cifar100", TOOL_TEXT, &(source).cifar100, 0, 0, "DIR", "CIFAR-100, binary version, unpacked", 1},              \
    {"--idx", TOOL_TEXT, &(source).idx, 0, 0, "DIR", "MNIST's or Fashion-MNIST's four files, unpacked", 1},            \
    {"--size", TOOL_INT, &(source).size, 8, 1024, "N", "resize pictures to N x N [original size]", 0},                 \
    {"--short-side", TOOL_INT, &(source).short_side, 8, 4096, "N", "resize to this short side, then crop --size", 0},  \
    {"--storage", TOOL_CHOICE, &(source).storage, 0, 0, "auto|decoded|compressed|stream",                              \
     "how folders are kept; auto: decoded up to 4 GiB, else on disk", 0}

static inline void tool_check_source(const tool_source *source) {
    if (!!source->folder + !!source->cifar10 + !!source->cifar100 + !!source->idx > 1)
        tool_fail(2, "only one of --data, --cifar10, --cifar100 and --idx can be given");
}

/* One line about what the folder has that was not read, if it has anything. */
static inline void tool_tell_left_out(const ckca_data *data, const char *folder) {
    ckca_data_info info;
    ckca_data_info_get(data, &info);
    if (info.left_out && tool_rank == 0)
        fprintf(stderr, "%s: %s: %d file%s left out (not JPEG or PNG by name, or in no class folder)\n", tool_name,
                folder, info.left_out, info.left_out == 1 ? "" : "s");
}

/* Opens the training part and the test part; shapes is the number of shapes to draw for training. The test part gets
   the size of the training part, and its classes in the same order. */
static inline void tool_open(ckca_context *ctx, const tool_source *source, int shapes, uint64_t seed, ckca_data **train,
                      ckca_data **test) {
    ckca_data_desc desc;
    ckca_data **data[2];
    int part;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = source->size;
    desc.short_side = source->short_side;
    desc.storage = (ckca_storage)source->storage;
    data[0] = train;
    data[1] = test;
    for (part = 0; part < 2; part++) {
        ckca_part which = part ? CKCA_PART_TEST : CKCA_PART_TRAIN;
        ckca_data_info info;
        if (source->folder) {
            static char path[4096];
            int n = snprintf(path, sizeof path, "%s/%s", source->folder, part ? "test" : "train");
            if (n < 0 || (size_t)n >= sizeof path) tool_fail(2, "--data: the path is too long");
            tool_check(ctx, ckca_open_folder(ctx, data[part], path, &desc));
            tool_tell_left_out(*data[part], path);
        } else if (source->cifar10) {
            tool_check(ctx, ckca_open_cifar10(ctx, data[part], source->cifar10, which, &desc));
        } else if (source->cifar100) {
            tool_check(ctx, ckca_open_cifar100(ctx, data[part], source->cifar100, which, &desc));
        } else if (source->idx) {
            tool_check(ctx, ckca_open_idx(ctx, data[part], source->idx, which, &desc));
        } else {
            seed += (uint64_t)part * 1000003;
            tool_check(ctx, shapes_open(ctx, data[part], seed, 0, part ? 1000 : shapes, &desc));
        }
        ckca_data_info_get(*train, &info);
        desc.height = info.height;
        desc.width = info.width;
        desc.channels = info.channels;
        desc.classes = info.classes;
        desc.class_names = info.class_names;
    }
}

static inline void tool_status(const char *line);

/* ---- Weights of others ----------------------------------------------------------------------------------------- */

typedef struct tool_weights {
    const char *arch, *classes; /* --arch and --classes */
    int size;
} tool_weights;

#define TOOL_WEIGHTS_FLAGS(weights)                                                                                    \
    {"--arch", TOOL_TEXT, &(weights).arch, 0, 0, "NAME",                                                               \
     "the checkpoint is torchvision's, of this network (resnet18, say); needs --classes", 0},                          \
    {"--classes", TOOL_TEXT, &(weights).classes, 0, 0, "FILE", "its classes' names in order, one per line (a file's own go before)", 0},        \
    {"--size", TOOL_INT, &(weights).size, 8, 1024, "N", "side of the pictures for --arch [224]", 0}

/* The lines of a file, without the last if it is empty; ends the program on failure. */
static inline char **tool_read_lines(const char *path, int *count) {
    char **lines = NULL, *text, *at;
    size_t size = 0, room = 1 << 16;
    FILE *file = fopen(path, "rb");
    if (!file) tool_fail(1, "%s: cannot be opened: %s", path, strerror(errno));
    text = (char *)malloc(room);
    while (text && (size += fread(text + size, 1, room - size - 1, file)) + 1 == room && room < (64u << 20))
        text = (char *)realloc(text, room *= 2);
    if (text && ferror(file)) tool_fail(1, "%s: cannot be read: %s", path, strerror(errno));
    if (text && size + 1 == room) tool_fail(1, "%s: it is too large for a list of names", path);
    fclose(file);
    *count = 0;
    if (!text) tool_fail(1, "%s: out of memory", path);
    text[size] = 0;
    if (strlen(text) != size) tool_fail(1, "%s: it is not text", path);
    for (at = text; *at; at += strcspn(at, "\n") + (at[strcspn(at, "\n")] == '\n')) ++*count;
    lines = (char **)malloc(((size_t)*count + 1) * sizeof *lines);
    if (!lines) tool_fail(1, "%s: out of memory", path);
    *count = 0;
    for (at = text; *at;) {
        char *end = at + strcspn(at, "\n");
        const int more = *end == '\n';
        *end = 0;
        if (end > at && end[-1] == '\r') end[-1] = 0;
        lines[(*count)++] = at;
        at = end + more;
    }
    if (!*count) tool_fail(1, "%s: it has no names", path);
    return lines;
}

/* Loads a checkpoint of ours or, with --arch, weights in torchvision's names. */
static inline void tool_load(ckca_context *ctx, ckca_model **model, const char *path, const tool_weights *weights) {
    static const float mean[3] = CKCA_IMAGENET_MEAN, std[3] = CKCA_IMAGENET_STD;
    static ckca_model_desc desc;
    char **names;
    if (!weights->arch != !weights->classes) tool_fail(2, "--arch and --classes go together");
    if (!weights->arch && weights->size) tool_fail(2, "--size needs --arch: a checkpoint of ckca.h has its size");
    if (!weights->arch) {
        tool_check(ctx, ckca_load(ctx, model, path));
        return;
    }
    names = tool_read_lines(weights->classes, &desc.classes);
    desc.class_names = (const char *const *)names;
    desc.height = desc.width = weights->size ? weights->size : 224;
    desc.mean = mean;
    desc.std = std;
    tool_check(ctx, ckca_resnet(ctx, model, weights->arch, &desc));
    tool_check(ctx, ckca_load_weights(*model, path));
    free(names[0]);
    free(names);
}

/* ---- Updates -------------------------------------------------------------------------------------------------- */

/* Fails now, not after hours of training, if a file cannot be written at this path. */
static inline void tool_check_output(const char *path) {
    static char probe[4200];
    struct stat about;
    FILE *file;
    if (tool_rank) return; /* rank 0 writes it */
    if (!stat(path, &about) && S_ISDIR(about.st_mode)) tool_fail(1, "%s: it is a folder, not a file to write", path);
    if (!stat(path, &about) && !S_ISREG(about.st_mode)) tool_fail(1, "%s: not a regular file", path);
    snprintf(probe, sizeof probe, "%s.tmp", path);
    if (!stat(probe, &about) && !S_ISREG(about.st_mode)) tool_fail(1, "%s: in the way of the new file", probe);
    snprintf(probe, sizeof probe, "%s.%ld", path, (long)getpid());
    file = fopen(probe, "wb");
    if (!file) tool_fail(1, "%s: cannot be created: %s", path, strerror(errno));
    fclose(file);
    remove(probe);
}

static volatile sig_atomic_t tool_signal; /* the one that asked the update to stop, or 0: progress callbacks return it */

static inline void tool_catch(int number) {
    tool_signal = number;
    signal(SIGINT, SIG_DFL); /* another one ends the program at once */
    signal(SIGTERM, SIG_DFL);
}

/* ckca_update, which SIGINT and SIGTERM stop behind an SGD step: then desc->state has what is needed to go on, and the
   program ends. hint: how to go on. Whoever ignores a signal (nohup) goes on ignoring it. Returns CKCA_OK, or CKCA_ENAN if
   the training diverged. */
static inline ckca_status tool_update(const ckca_context *ctx, ckca_model *model, const ckca_data *data,
                                      const ckca_update_desc *desc, ckca_report *report, const char *hint) {
    static const int caught[2] = {SIGINT, SIGTERM};
    void (*before[2])(int);
    ckca_status status;
    int i;
    for (i = 0; i < 2; i++) {
        before[i] = signal(caught[i], desc->progress ? tool_catch : SIG_DFL);
        if (before[i] == SIG_IGN) signal(caught[i], SIG_IGN);
    }
    status = ckca_update(model, data, desc, report);
    for (i = 0; i < 2; i++) signal(caught[i], before[i]);
    tool_status(NULL);
    if (status == CKCA_ESTOP) {
        tool_agreed = 1;
        if (!tool_signal) tool_signal = SIGTERM; /* another rank was stopped */
    }
    if (status == CKCA_ESTOP && desc->state)
        tool_fail(128 + tool_signal, "%s; it is kept in %s: %s goes on", ckca_error(ctx), desc->state, hint);
    if (status == CKCA_ESTOP) tool_fail(128 + tool_signal, "%s; nothing was kept", ckca_error(ctx));
    if (status != CKCA_ENAN) tool_check(ctx, status);
    if (tool_signal) raise(tool_signal); /* it came behind the last step; a state holds the result */
    return status;
}

/* ---- Progress ------------------------------------------------------------------------------------------------- */

/* "12 s", "3 min 05 s", "2 h 10 min". */
static inline const char *tool_duration(double seconds, char *out, size_t size) {
    long s = seconds < 0 || seconds > 1e8 ? 0 : (long)(seconds + 0.5);
    if (s < 60) snprintf(out, size, "%ld s", s);
    else if (s < 3600) snprintf(out, size, "%ld min %02ld s", s / 60, s % 60);
    else snprintf(out, size, "%ld h %02ld min", s / 3600, s / 60 % 60);
    return out;
}

/* ", 12% waiting for pictures" if pictures come from disk, else "". */
static inline const char *tool_waiting(double waiting, char *out, size_t size) {
    *out = 0;
    if (waiting > 0) snprintf(out, size, ", %.0f%% waiting for pictures", 100 * waiting);
    return out;
}

/* Prints a line that the next call overwrites, if stderr is a terminal. NULL clears it. */
static inline void tool_status(const char *line) {
    if (tool_rank || !isatty(2)) return;
    fprintf(stderr, "\r%s\033[K", line ? line : "");
    fflush(stderr);
}

#endif /* TOOL_H */
