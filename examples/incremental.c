/* incremental.c: the experiment behind ckca.h. A data set is cut into chunks that arrive one after another. After each
   chunk every method improves its own checkpoint from that chunk alone (scratch-all: from all chunks so far) and is
   tested on pictures that no method was trained on.

       cc -O2 -I. examples/incremental.c -o incremental -lm -pthread
       ./incremental                                    ten classes of drawn shapes, about a minute on two cores
       ./incremental --cifar10 cifar-10-batches-bin --chunks 10 --chunk-size 500 --out run
       ./incremental ... --out run --resume             continues a killed run, to bitwise the same results

       ./incremental ... --sweep                        warm, shrink-perturb, lwf and ewc at four or more settings

   With --out DIR, that folder holds the last checkpoint of every method (and its memory, if it has one), results.csv,
   results.svg and, while a network is being trained, state.safetensors. results.csv says what is done: a row follows
   once its checkpoint and memory are complete. */
#define CKCA_IMPLEMENTATION
#include "ckca.h"

#include "tool.h"

typedef struct method {
    const char *name;
    ckca_method method;
    int joined;           /* 1: trained on all chunks so far */
    int pictures, fisher; /* 1: its memory keeps pictures; the Fisher information */
    const char *colour;   /* after the palette of Okabe and Ito, for colour-blind readers too */
    const char *dash;
    int no_feat, no_growth; /* CKCA without its feature term; with lwf's constant weight instead of a growing one */
    const char *sweep;      /* the setting that --sweep varies, as in the column's name; NULL: none */
    size_t field;           /* it, in ckca_update_desc */
    float grid[5];          /* its values; 0: no more */
} method;

#define FIELD(field) offsetof(ckca_update_desc, field)
static const method methods[] = {
    {"scratch-chunk", CKCA_METHOD_SCRATCH, 0, 0, 0, "#8a8a8a", "2 4", 0, 0, NULL, 0, {0}},
    {"scratch-all", CKCA_METHOD_SCRATCH, 1, 0, 0, "#4d4d4d", "7 4", 0, 0, NULL, 0, {0}},
    {"warm", CKCA_METHOD_WARM, 0, 0, 0, "#d98b00", "", 0, 0, "lr", FIELD(lr), {0.025f, 0.05f, 0.1f, 0.2f}},
    {"shrink-perturb", CKCA_METHOD_SHRINK_PERTURB, 0, 0, 0, "#009e73", "", 0, 0, "s", FIELD(shrink), {.2f, .4f, .6f, .8f}},
    {"lwf", CKCA_METHOD_LWF, 0, 0, 0, "#c25e9a", "", 0, 0, "w", FIELD(w_kd), {0.25f, 0.5f, 1, 2}},
    {"ewc", CKCA_METHOD_EWC, 0, 0, 1, "#d55e00", "", 0, 0, "lambda", FIELD(ewc_lambda), {.1f, 1, 3, 10, 100}},
    {"replay", CKCA_METHOD_REPLAY, 0, 1, 0, "#56b4e9", "", 0, 0, NULL, 0, {0}},
    {"ckca-no-feat", CKCA_METHOD_CKCA, 0, 0, 0, "#0068ad", "1 3", 1, 0, NULL, 0, {0}},
    {"ckca-no-growth", CKCA_METHOD_CKCA, 0, 0, 0, "#0068ad", "2 4", 0, 1, NULL, 0, {0}},
    {"ckca", CKCA_METHOD_CKCA, 0, 0, 0, "#0068ad", "", 0, 0, NULL, 0, {0}},
    {"ckca-replay", CKCA_METHOD_CKCA, 0, 1, 0, "#0068ad", "6 3", 0, 0, NULL, 0, {0}}};
enum { METHODS = sizeof methods / sizeof *methods, GRID = 5, COLUMNS = METHODS * GRID };

/* A method at one setting: a column of the table. */
typedef struct column {
    method m; /* a copy; its name is text if --sweep varies it */
    char text[40];
    int base;    /* index of the method */
    float value; /* of the setting that --sweep varies; 0: as in run.update */
} column;

/* A method's results after a chunk. Accuracies are fractions. */
typedef struct row {
    int done, pictures;
    double accuracy, top5, loss;                                         /* on the test part */
    double train_loss, train_accuracy, kd, feat, teacher, w_kd, seconds; /* of the update's last epoch */
} row;

typedef struct run {
    /* settings */
    tool_source source;
    const char *arch, *method_list, *out;
    int projection, width, chunks, chunk_size, unlabelled, stratified, resume, augment, sweep, memory;
    uint64_t seed;
    float w_lwf;
    ckca_update_desc update;
    /* results */
    column column[COLUMNS];
    const method *method[COLUMNS]; /* of the columns */
    int columns;                   /* in use */
    row *rows;                     /* chunks x columns */
    const tool_flag *flags;
    char pictures[32], title[256]; /* the pictures' hash; the subtitle of the plot */
    char path[4096];
    /* the progress line */
    char label[64];
    double cost, cost_done, cost_left; /* picture visits of this job, of the jobs before it and of those after it */
    double seconds, shown;             /* of the jobs before this one; time of the last redraw */
} run;

static row *at(const run *r, int chunk, int column) { return r->rows + chunk * r->columns + column; }

/* DIR/name, or DIR/name-chunkNN.safetensors. All methods share the first chunk's checkpoint. */
static const char *path(run *r, const char *name) {
    int n = snprintf(r->path, sizeof r->path, "%s/%s", r->out, name);
    if (n < 0 || (size_t)n >= sizeof r->path) tool_fail(2, "--out: the path is too long");
    return r->path;
}

static const char *checkpoint(run *r, int chunk, int column) {
    char name[64];
    snprintf(name, sizeof name, "%s-chunk%02d.safetensors", chunk ? r->method[column]->name : "first", chunk + 1);
    return path(r, name);
}

/* The memory that belongs to it. */
static const char *memory_file(run *r, int chunk, int column) {
    char name[80];
    snprintf(name, sizeof name, "%s-chunk%02d.memory.safetensors", r->method[column]->name, chunk + 1);
    return path(r, name);
}

static int has_memory(const run *r, int column) { return r->method[column]->pictures || r->method[column]->fisher; }

/* 1 if the column is the best of its method's: after the last chunk that all of them have done. */
static int is_best(const run *r, int column) {
    int t, m, all = 0;
    for (t = r->chunks; !all && t > 0;)
        for (all = 1, t--, m = 0; m < r->columns; m++)
            all = all && (r->column[m].base != r->column[column].base || at(r, t, m)->done);
    for (m = 0; m < r->columns; m++)
        if (m != column && r->column[m].base == r->column[column].base &&
            (at(r, t, m)->accuracy > at(r, t, column)->accuracy ||
             (at(r, t, m)->accuracy == at(r, t, column)->accuracy && m < column)))
            return 0;
    return 1;
}

/* ---- results.csv ---------------------------------------------------------------------------------------------- */

static const char columns_line[] = "method,chunk,pictures,accuracy,top5,loss,train_loss,train_accuracy,kd,feat,"
                                   "teacher_accuracy,w_kd,seconds";

/* Every setting that the results depend on, as " --name=value": --resume must have the same ones. */
static void settings(const run *r, char *line, size_t size) {
    const tool_flag *flag;
    char value[512];
    size_t length = 0;
    for (flag = r->flags; flag->help; flag++) {
        if (flag->kind == TOOL_HEADING || flag->free || length >= size) continue;
        tool_print_value(flag, value, sizeof value);
        length += (size_t)snprintf(line + length, size - length, " %s=%s", flag->name, value);
    }
    if (length >= size) tool_fail(2, "the names in the flags are too long");
}

static void write_csv(const run *r, FILE *file) {
    char line[2048];
    int t, m;
    settings(r, line, sizeof line);
    fprintf(file, "# incremental, ckca.h %s, pictures %s\n#%s\n%s\n", CKCA_VERSION, r->pictures, line, columns_line);
    for (t = 0; t < r->chunks; t++)
        for (m = 0; m < r->columns; m++) {
            const row *a = at(r, t, m);
            if (a->done)
                fprintf(file, "%s,%d,%d,%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%.2f\n", r->method[m]->name, t + 1,
                        a->pictures, a->accuracy, a->top5, a->loss, a->train_loss, a->train_accuracy, a->kd, a->feat,
                        a->teacher, a->w_kd, a->seconds);
        }
}

/* Reads the rows of an earlier run, if there is one. Its settings must be the same. */
static void read_csv(run *r) {
    char line[2048], mine[2048], name[32];
    const char *csv = path(r, "results.csv"), *a = line + 1, *b = mine;
    FILE *file = fopen(csv, "rb");
    int i = 3, t, m, known = 0;
    if (!file) {
        if (errno != ENOENT) tool_fail(1, "%s: %s", csv, strerror(errno));
        return;
    }
    if (!r->resume) tool_fail(2, "%s exists: add --resume to continue that run, or name another folder", csv);
    snprintf(mine, sizeof mine, "# incremental, ckca.h %s, pictures %s\n", CKCA_VERSION, r->pictures);
    if (!fgets(line, sizeof line, file) || strncmp(line, mine, 14))
        tool_fail(1, "%s was not written by this program", csv);
    if (strcmp(line, mine))
        tool_fail(2, "%s was started with another ckca.h or other pictures: \"%.*s\" there, \"%.*s\" now", csv,
                  (int)strcspn(line, "\n") - 2, line + 2, (int)strcspn(mine, "\n") - 2, mine + 2);
    settings(r, mine, sizeof mine);
    if (!fgets(line, sizeof line, file) || line[0] != '#') tool_fail(1, "%s, line 2: the settings are missing", csv);
    line[strcspn(line, "\r\n")] = 0;
    while (*a || *b) { /* setting by setting */
        size_t n = *a ? 1 + strcspn(a + 1, " ") : 0, k = *b ? 1 + strcspn(b + 1, " ") : 0;
        if (n != k || strncmp(a, b, n))
            tool_fail(2, "%s was started with%.*s, this command has%.*s", csv, (int)n, a, (int)k, b);
        a += n;
        b += k;
    }
    if (!fgets(line, sizeof line, file) || strncmp(line, columns_line, strlen(columns_line)))
        tool_fail(1, "%s, line 3: the column names are missing", csv);
    while (i++, fgets(line, sizeof line, file)) {
        row now;
        memset(&now, 0, sizeof now);
        if (sscanf(line, "%31[^,],%d,%d,%lf,%lf,%lf,%lf,%lf,%lf,%lf,%lf,%lf,%lf", name, &t, &now.pictures,
                   &now.accuracy, &now.top5, &now.loss, &now.train_loss, &now.train_accuracy, &now.kd, &now.feat,
                   &now.teacher, &now.w_kd, &now.seconds) != 13)
            tool_fail(1, "%s, line %d: not a row of this table", csv, i);
        for (m = 0; m < r->columns && strcmp(r->method[m]->name, name); m++) continue;
        if (m == r->columns || t < 1 || t > r->chunks) tool_fail(1, "%s, line %d: no such method and chunk", csv, i);
        now.done = 1;
        *at(r, t - 1, m) = now;
        known++;
    }
    fclose(file);
    printf("%s has %d of %d rows\n", csv, known, r->chunks * r->columns);
}

/* ---- results.svg ---------------------------------------------------------------------------------------------- */

/* The smallest step of 1, 2 or 5 times a power of ten that divides range into at most count parts. */
static double tick_step(double range, int count) {
    double step = pow(10, floor(log10(range / count)));
    if (range / step > count) step *= 2;
    if (range / step > count) step *= 2.5;
    if (range / step > count) step *= 2;
    return step;
}

static void put_escaped(FILE *file, const char *text) {
    for (; *text; text++) {
        if (*text == '<')
            fputs("&lt;", file);
        else if (*text == '>')
            fputs("&gt;", file);
        else if (*text == '&')
            fputs("&amp;", file);
        else
            fputc(*text, file);
    }
}

/* 1: CKCA itself, drawn to stand out. */
static int whole(const method *a) { return a->method == CKCA_METHOD_CKCA && !a->no_feat && !a->no_growth; }

/* Accuracy over chunks: a line per method, labelled at its end. The plot sets its own colours and background, so that
   it looks the same in light and dark viewers. */
static void write_svg(const run *r, FILE *file) {
    const double left = 62, right = 690, top = 96, bottom = 448, gap = 19;
    double low = 100, high = 0, step, y_of[COLUMNS], label[COLUMNS];
    int last[COLUMNS], order[COLUMNS], lines = 0, t, m, i, tick, ticks;
    for (m = 0; m < r->columns; m++) {
        for (last[m] = -1, t = 0; t < r->chunks && at(r, t, m)->done && is_best(r, m); t++) {
            low = fmin(low, 100 * at(r, t, m)->accuracy);
            high = fmax(high, 100 * at(r, t, m)->accuracy);
            last[m] = t;
        }
        if (last[m] >= 0) order[lines++] = m;
    }
    if (!lines) low = 0, high = 100;
    step = tick_step(fmax(high - low, 4), 6);
    low = step * floor(low / step);
    high = fmin(100, step * ceil(high / step + 0.1));
    if (high - low < 3 * step) low = fmax(0, low - 2 * step);
    ticks = (int)((high - low) / step + 0.5);
#define X(chunk) (r->chunks < 2 ? (left + right) / 2 : left + 14 + (right - left - 28) * (chunk) / (r->chunks - 1.0))
#define Y(percent) (bottom - (bottom - top) * ((percent)-low) / (high - low))

    fprintf(file, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 860 510\" width=\"860\" height=\"510\" "
                  "font-family=\"system-ui, 'Segoe UI', 'Helvetica Neue', 'DejaVu Sans', sans-serif\">\n"
                  "<rect width=\"860\" height=\"510\" rx=\"10\" fill=\"#fcfcfa\"/>\n"
                  "<text x=\"28\" y=\"38\" font-size=\"20\" font-weight=\"600\" fill=\"#1c1c1c\">"
                  "Accuracy while pictures keep arriving</text>\n"
                  "<text x=\"28\" y=\"60\" font-size=\"13\" fill=\"#5c5c5c\">");
    put_escaped(file, r->title);
    fprintf(file, "</text>\n<text x=\"28\" y=\"84\" font-size=\"12\" fill=\"#5c5c5c\">test accuracy, %%</text>\n"
                  "<g font-size=\"12\" fill=\"#5c5c5c\" text-anchor=\"end\">\n");
    for (tick = 0; tick <= ticks; tick++)
        fprintf(file, "<path d=\"M%g %.1fH%g\" stroke=\"%s\"/><text x=\"%g\" y=\"%.1f\">%g</text>\n", left,
                Y(low + tick * step), right, tick ? "#e4e4df" : "#8a8a8a", left - 9, Y(low + tick * step) + 4,
                low + tick * step);
    fprintf(file, "</g>\n<g font-size=\"12\" fill=\"#5c5c5c\" text-anchor=\"middle\">\n");
    ticks = r->chunks <= 16 ? 1 : (int)tick_step(r->chunks, 10);
    for (t = 0; t < r->chunks; t++)
        if ((t + 1) % ticks == 0 || t == 0)
            fprintf(file, "<path d=\"M%.1f %gv5\" stroke=\"#8a8a8a\"/><text x=\"%.1f\" y=\"%g\">%d</text>\n", X(t),
                    bottom, X(t), bottom + 20, t + 1);
    fprintf(file, "<text x=\"%g\" y=\"%g\">chunks seen</text>\n</g>\n", (left + right) / 2, bottom + 44);

    /* Labels in the order of the line ends, moved apart where they would overlap, then kept inside the plot. */
    for (i = 0; i < lines; i++) y_of[order[i]] = Y(100 * at(r, last[order[i]], order[i])->accuracy);
    for (i = 1; i < lines; i++)
        for (t = i; t > 0 && y_of[order[t]] < y_of[order[t - 1]]; t--) {
            m = order[t];
            order[t] = order[t - 1];
            order[t - 1] = m;
        }
    for (i = 0; i < lines; i++) label[i] = y_of[order[i]];
    for (t = 0; t < 100; t++)
        for (i = 1; i < lines; i++)
            if (label[i] - label[i - 1] < gap) {
                double push = (gap - (label[i] - label[i - 1])) / 2;
                label[i - 1] -= push;
                label[i] += push;
            }
    if (lines && label[lines - 1] > bottom - 4)
        for (label[lines - 1] = bottom - 4, i = lines - 2; i >= 0; i--) label[i] = fmin(label[i], label[i + 1] - gap);

    for (i = 0; i < lines; i++) { /* the best at the end is drawn last */
        const method *a = r->method[m = order[lines - 1 - i]];
        double y = label[lines - 1 - i];
        fprintf(file,
                "<g stroke=\"%s\" fill=\"none\" stroke-width=\"%s\" stroke-linejoin=\"round\" "
                "stroke-linecap=\"round\"><path stroke-dasharray=\"%s\" d=\"",
                a->colour, whole(a) ? "3" : "2", *a->dash ? a->dash : "none");
        for (t = 0; t <= last[m]; t++)
            fprintf(file, "%c%.1f %.1f", t ? 'L' : 'M', X(t), Y(100 * at(r, t, m)->accuracy));
        fprintf(file, "\"/>");
        fprintf(file, "<path stroke-width=\"1\" stroke-opacity=\"0.5\" d=\"M%.1f %.1fL%g %.1f\"/></g>\n",
                X(last[m]) + 7, y_of[m], right + 10, y);
        fprintf(file, "<g fill=\"%s\">", a->colour);
        for (t = r->chunks > 40 ? last[m] : 0; t <= last[m]; t++) /* no points where they would hide the line */
            fprintf(file, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%s\" stroke=\"#fcfcfa\"/>", X(t),
                    Y(100 * at(r, t, m)->accuracy), whole(a) ? "4.2" : "3.4");
        fprintf(file, "<text x=\"%g\" y=\"%.1f\" font-size=\"13\" font-weight=\"%s\">%s %.1f</text></g>\n", right + 15,
                y + 4.5, whole(a) ? "700" : "500", a->name, 100 * at(r, last[m], m)->accuracy);
    }
    fprintf(file, "</svg>\n");
#undef X
#undef Y
}

/* Writes a temporary file and renames it, so that a kill leaves the old file or the new one. */
static void write_file(run *r, const char *name, void (*write)(const run *, FILE *)) {
    char temporary[sizeof r->path + 8];
    FILE *file;
    int good;
    snprintf(temporary, sizeof temporary, "%s.tmp", path(r, name));
    file = fopen(temporary, "wb");
    if (!file) tool_fail(1, "%s: %s", temporary, strerror(errno));
    write(r, file);
    good = !ferror(file);
    if (fclose(file) || !good) tool_fail(1, "%s: %s", temporary, strerror(errno));
    if (rename(temporary, r->path)) tool_fail(1, "%s: %s", r->path, strerror(errno));
}

static void write_results(run *r) {
    if (!r->out || tool_rank) return;
    write_file(r, "results.csv", write_csv);
    write_file(r, "results.svg", write_svg);
}

/* ---- The experiment ------------------------------------------------------------------------------------------- */

static int show_progress(const ckca_progress *p, void *user) {
    run *r = (run *)user;
    double part = ((double)p->epoch * p->batches + p->batch) / ((double)p->epochs * p->batches);
    double done = r->cost_done + part * r->cost, left = (1 - part) * r->cost + r->cost_left;
    char line[304], now[32], all[32], wait[48];
    if (p->seconds - r->shown < 0.1 && p->seconds > r->shown && part < 1) return tool_signal;
    r->shown = p->seconds;
    snprintf(line, sizeof line, "%s  epoch %d/%d  loss %.3f  accuracy %.1f%%  %s left, %s in total%s", r->label,
             p->epoch + 1, p->epochs, p->loss, 100 * p->accuracy, tool_duration(p->seconds_left, now, sizeof now),
             tool_duration((r->seconds + p->seconds) * left / done, all, sizeof all),
             tool_waiting(p->waiting, wait, sizeof wait));
    tool_status(line);
    return tool_signal;
}

/* Cost of an update in picture visits. The teacher's forward pass costs about a third of a step; it runs once per
   picture, or on every visit if augmentation changes the pictures or some have no labels, which take a visit more each. */
static double job_cost(const run *r, int chunk, int column, int pictures) {
    const method *a = r->method[column];
    double visits = (double)pictures * r->update.epochs * (a->joined ? chunk + 1 : 1);
    if (chunk == 0) return column ? 0 : visits;
    if (a->pictures) visits += (double)r->memory * r->update.epochs;
    if (a->fisher) visits += pictures;
    if (a->method != CKCA_METHOD_CKCA && a->method != CKCA_METHOD_LWF) return visits;
    if (r->unlabelled) visits *= 2;
    return visits + (r->augment || r->unlabelled ? visits : pictures) / 3.0;
}

/* Runs and tests one update of one method. model and memory (NULL: none) are its own after the previous chunk. */
static void do_job(ckca_context *ctx, run *r, ckca_model *model, ckca_memory *memory, ckca_data *const *chunks,
                   const ckca_data *test, const ckca_data *unlabelled, int t, int m) {
    const method *a = r->method[m];
    ckca_update_desc desc = r->update;
    ckca_data *joined = NULL;
    ckca_report report;
    ckca_score score;
    ckca_data_info info;
    ckca_status status;
    char state[sizeof r->path];
    row *result = at(r, t, m);

    desc.method = t ? a->method : CKCA_METHOD_WARM; /* the first chunk has no method yet */
    desc.memory = memory;
    if (a->method == CKCA_METHOD_LWF || a->no_growth) desc.w_kd = r->w_lwf;
    if (a->no_growth) desc.adakd = CKCA_ADAKD_CONSTANT;
    if (a->no_feat) desc.w_feat = CKCA_OFF;
    desc.unlabelled = unlabelled;
    if (t && a->sweep && r->sweep) memcpy((char *)&desc + a->field, &r->column[m].value, sizeof r->column[m].value);
    if (t == 0 || a->joined) desc.holdout = CKCA_OFF; /* nothing to lose, or pictures that the network has seen */
    desc.seed = r->seed * 1000 + (uint64_t)t;
    if (r->augment) desc.augment.pad = 4, desc.augment.flip = 1;
#ifdef CKCA_CUDA /* a GPU would stop for every report */
    if (isatty(2))
#endif
        desc.progress = show_progress, desc.user = r;
    if (r->out) desc.state = strcpy(state, path(r, "state.safetensors"));
    if (a->joined && t) tool_check(ctx, ckca_join(&joined, chunks, t + 1));
    ckca_data_info_get(joined ? joined : chunks[t], &info);

    snprintf(r->label, sizeof r->label, "chunk %d/%d  %s", t + 1, r->chunks, t ? a->name : "first");
    r->shown = 0;
    status = tool_update(ctx, model, joined ? joined : chunks[t], &desc, &report, "the same command with --resume");
    if (status == CKCA_ENAN && r->column[m].value > 0) { /* a setting of a sweep that diverges keeps its checkpoint */
        fprintf(stderr, "%s: %s, chunk %d: %s; its checkpoint stays as it was\n", tool_name, a->name, t + 1,
                ckca_error(ctx));
        if (r->out) remove(desc.state);
    } else
        tool_check(ctx, status);
    tool_check(ctx, ckca_evaluate(model, test, &score, NULL));
    ckca_data_free(joined);

    result->done = 1;
    result->pictures = info.count;
    result->accuracy = score.top1;
    result->top5 = score.top5;
    result->loss = score.loss;
    result->train_loss = report.loss;
    result->train_accuracy = report.accuracy;
    result->kd = report.kd;
    result->feat = report.feat;
    result->teacher = report.teacher_accuracy;
    result->w_kd = report.w_kd;
    result->seconds = report.seconds;
    r->seconds += report.seconds;
}

static void print_row(const run *r, int t, int m) {
    const row *a = at(r, t, m);
    printf("chunk %2d  %-19s test %5.1f%%  top-5 %5.1f%%  loss %6.3f    training loss %6.4f  accuracy %5.1f%%  AdaKD x "
           "%4.2f  %6.1f s\n",
           t + 1, r->method[m]->name, 100 * a->accuracy, 100 * a->top5, a->loss, a->train_loss, 100 * a->train_accuracy,
           a->w_kd, a->seconds);
    fflush(stdout);
}

/* best: 1: only the best column of each method. */
static void print_table(const run *r, int best) {
    int t, m, shown[COLUMNS];
    for (m = 0; m < r->columns; m++) shown[m] = !best || is_best(r, m);
    printf("\nTest accuracy after each chunk, %%%s\n\nchunk",
           best ? "; of every sweep the setting that is best on the test pictures after the last chunk" : "");
    for (m = 0; m < r->columns; m++)
        if (shown[m]) printf("  %19s", r->method[m]->name);
    for (t = 0; t < r->chunks; t++)
        for (printf("\n%5d", t + 1), m = 0; m < r->columns; m++)
            if (shown[m]) printf("  %19.1f", 100 * at(r, t, m)->accuracy);
    for (printf("\n mean"), m = 0; m < r->columns; m++) {
        double sum = 0;
        for (t = 0; t < r->chunks; t++) sum += at(r, t, m)->accuracy;
        if (shown[m]) printf("  %19.1f", 100 * sum / r->chunks);
    }
    printf("\n");
}

/* A column for a method or, with --sweep, for each of its settings. */
static void add_columns(run *r, int base) {
    int i, count = r->sweep && methods[base].sweep ? GRID : 1;
    for (i = 0; i < count && (count == 1 || methods[base].grid[i] > 0); i++) {
        column *c = &r->column[r->columns];
        c->base = base;
        c->m = methods[base];
        if (count > 1) {
            c->value = c->m.grid[i];
            snprintf(c->text, sizeof c->text, "%s-%s%g", c->m.name, c->m.sweep, c->value);
            c->m.name = c->text;
        }
        r->method[r->columns++] = &c->m;
    }
}

/* Parses --methods, as in "warm,ckca", into columns. */
static void choose_methods(run *r) {
    const char *text = r->method_list;
    while (*text || text == r->method_list) {
        int length = (int)strcspn(text, ","), i, m;
        for (m = 0; m < METHODS; m++)
            if ((int)strlen(methods[m].name) == length && !strncmp(methods[m].name, text, (size_t)length)) break;
        if (m == METHODS) {
            fprintf(stderr, "%s: --methods: \"%.*s\" is not one of", tool_name, length, text);
            for (m = 0; m < METHODS; m++) fprintf(stderr, " %s", methods[m].name);
            fprintf(stderr, "\n");
            exit(2);
        }
        for (i = 0; i < r->columns; i++)
            if (r->column[i].base == m) tool_fail(2, "--methods: %s is given twice", methods[m].name);
        add_columns(r, m);
        text += length + (text[length] == ',' && text[length + 1]);
    }
}

/* qsort's order of addresses. */
static int by_address(const void *a, const void *b) {
    const uintptr_t x = (uintptr_t) * (const unsigned char *const *)a,
                    y = (uintptr_t) * (const unsigned char *const *)b;
    return x < y ? -1 : x > y;
}

/* count pictures of train that are in no chunk, in train's order: they stand for pictures without labels. */
static ckca_data *set_aside(ckca_context *ctx, const ckca_data *train, ckca_data *const *chunks, int n, int count) {
    ckca_data_info info, part;
    const unsigned char **used;
    ckca_data *rest = NULL;
    int *index, i, t, taken = 0, found = 0;
    ckca_data_info_get(train, &info);
    used = (const unsigned char **)malloc((size_t)info.count * sizeof *used);
    index = (int *)malloc((size_t)info.count * sizeof *index);
    if (!used || !index) tool_fail(1, "out of memory");
    for (t = 0; t < n; t++) {
        ckca_data_info_get(chunks[t], &part);
        for (i = 0; i < part.count; i++) used[taken++] = ckca_pixels(chunks[t], i);
        if (part.count && !used[taken - 1]) tool_fail(2, "--unlabelled needs pictures that are held decoded (--storage)");
    }
    qsort(used, (size_t)taken, sizeof *used, by_address);
    for (i = 0; i < info.count && found < count; i++) {
        const unsigned char *picture = ckca_pixels(train, i);
        if (!bsearch(&picture, used, (size_t)taken, sizeof *used, by_address)) index[found++] = i;
    }
    if (found < count)
        tool_fail(2, "--unlabelled %d: %d training pictures are in no chunk (--chunk-size leaves more)", count, found);
    tool_check(ctx, ckca_subset(&rest, train, index, count));
    free(used);
    free(index);
    return rest;
}

int main(int argc, char **argv) {
    static run r; /* zeroed */
    static ckca_desc desc;
    static const char usage[] =
        "incremental [flags]: improves a checkpoint chunk by chunk with several methods and compares them.\n"
        "Flags are --name value or --name=value; [defaults in brackets].\n";
    const tool_flag flags[] = {
        TOOL_SOURCE_FLAGS(r.source),
        {"--chunks", TOOL_INT, &r.chunks, 1, 1000, "N", "number of chunks [10; shapes: 6]", 0},
        {"--chunk-size", TOOL_INT, &r.chunk_size, 1, 1e6, "N", "pictures per chunk [all / chunks; shapes: 250]", 0},
        {"--unlabelled", TOOL_INT, &r.unlabelled, 1, 1e6, "N",
         "lwf and ckca also distil from N pictures of no chunk, whose labels they do not see [none]", 0},
        {"--stratified", TOOL_SWITCH, &r.stratified, 0, 0, NULL, "the same class proportions in every chunk", 0},
        {NULL, TOOL_HEADING, NULL, 0, 0, NULL, "Network", 0},
        {"--arch", TOOL_TEXT, &r.arch, 0, 0, "NAME", "resnet8, 20, 32, 44, 56, 110, 18, 34, 50, 18-cifar ... 50-cifar",
         0},
        {"--width", TOOL_INT, &r.width, 1, 1024, "N", "channels of the first stage [16; resnet18 and larger: 64]", 0},
        {"--projection", TOOL_SWITCH, &r.projection, 0, 0, NULL, "shortcuts with 1x1 convolutions (resnet8 ... 110)",
         0},
        {NULL, TOOL_HEADING, NULL, 0, 0, NULL, "Methods", 0},
        {"--methods", TOOL_TEXT, &r.method_list, 0, 0, "A,B",
         "scratch-chunk, scratch-all, warm, shrink-perturb, lwf, ewc, replay, ckca, ckca-replay; ckca-no-feat: its "
         "distillation alone; ckca-no-growth: lwf's and its feature term",
         0},
        {"--sweep", TOOL_SWITCH, &r.sweep, 0, 0, NULL,
         "warm at 4 --lr, shrink-perturb at 4 --shrink, lwf at 4 --w-lwf, ewc at 5 --ewc-lambda; then each at its best",
         0},
        {"--adakd", TOOL_CHOICE, &r.update.adakd, 0, 0, "growth|constant|class", "ckca's distillation weight", 0},
        {"--w-kd", TOOL_FLOAT, &r.update.w_kd, 0, 1000, "X",
         "weight of ckca's distillation, a factor of growth's, 0: off [1; class: 2]", 0},
        {"--w-lwf", TOOL_FLOAT, &r.w_lwf, 0, 1000, "X", "weight of lwf's and ckca-no-growth's distillation, 0: off [1]",
         0},
        {"--temperature", TOOL_FLOAT, &r.update.temperature, 0.1, 100, "X", "of ckca's and lwf's distillation [2]", 0},
        {"--featreg", TOOL_CHOICE, &r.update.featreg, 0, 0, "centroid|stages|cosine", "ckca's feature distance", 0},
        {"--w-feat", TOOL_FLOAT, &r.update.w_feat, 0, 1000, "X", "weight of ckca's feature term, 0: off [1]", 0},
        {"--memory", TOOL_INT, &r.memory, 1, 1e7, "N", "pictures that replay and ckca-replay keep", 0},
        {"--ewc-lambda", TOOL_FLOAT, &r.update.ewc_lambda, 0, 1e9, "X", "weight of ewc's penalty, 0: off [1]", 0},
        {"--shrink", TOOL_FLOAT, &r.update.shrink, 0.001, 1, "X", "shrink-perturb: factor of the old weights [0.4]", 0},
        {"--perturb", TOOL_FLOAT, &r.update.perturb, 0.001, 1, "X", "shrink-perturb: factor of the fresh weights [0.1]",
         0},
        {NULL, TOOL_HEADING, NULL, 0, 0, NULL, "Training on each chunk", 0},
        {"--epochs", TOOL_INT, &r.update.epochs, 1, 100000, "N", "passes over a chunk [40; shapes: 20]", 0},
        {"--batch", TOOL_INT, &r.update.batch, 1, 65536, "N", "pictures per step [64; shapes: 16]", 0},
        {"--lr", TOOL_FLOAT, &r.update.lr, 1e-9, 1000, "X", "peak learning rate [0.1; shapes: 0.05]", 0},
        {"--schedule", TOOL_CHOICE, &r.update.schedule, 0, 0, "cosine|constant|step", "of the learning rate", 0},
        {"--warmup", TOOL_FLOAT, &r.update.warmup_epochs, 0, 100000, "X", "epochs of linear warm-up [1]", 0},
        {"--weight-decay", TOOL_FLOAT, &r.update.weight_decay, 0, 10, "X", "[0.0005]", 0},
        {"--momentum", TOOL_FLOAT, &r.update.momentum, 0, 0.9999, "X", "Nesterov momentum [0.9]", 0},
        {"--label-smoothing", TOOL_FLOAT, &r.update.label_smoothing, 1e-6, 0.99, "X", "[off]", 0},
        {"--holdout", TOOL_FLOAT, &r.update.holdout, 0, 0.9, "X",
         "part of every chunk but the first to test its update on; one that is not better is undone", 0},
        {"--clip", TOOL_FLOAT, &r.update.clip_norm, 1e-6, 1e6, "X", "largest gradient norm [off]", 0},
        {"--augment", TOOL_SWITCH, &r.augment, 0, 0, NULL, "random crop with 4 pixels of padding, random flip", 0},
        {"--seed", TOOL_SEED, &r.seed, 0, 0, "N", "of chunks, weights, order and shapes", 0},
        {NULL, TOOL_HEADING, NULL, 0, 0, NULL, "Running", 0},
        TOOL_DEVICE_FLAGS(desc),
        {"--out", TOOL_TEXT, &r.out, 0, 0, "DIR", "folder for checkpoints, results.csv and results.svg [none written]",
         1},
        {"--resume", TOOL_SWITCH, &r.resume, 0, 0, NULL, "continue the run in --out, killed or complete", 1},
        {"--state-seconds", TOOL_FLOAT, &r.update.state_seconds, 0.001, 1e6, "X",
         "between training states, which --resume continues from [30]", 1},
        {NULL, TOOL_HEADING, NULL, 0, 0, NULL, NULL, 0}};
    const char *folder;
    ckca_context *ctx = NULL;
    ckca_data *train, *test, *unlabelled = NULL, **chunks;
    ckca_data_info info;
    ckca_model_desc model_desc;
    ckca_model_info model_info;
    ckca_model *model[COLUMNS] = {0};
    ckca_memory *memory[COLUMNS] = {0};
    ckca_memory_desc memory_desc;
    ckca_split_desc split;
    int t, m, drawn, jobs = 0, best = 0;

    tool_name = "incremental";
    r.flags = flags;
    r.arch = "resnet8";
    r.method_list = "warm,shrink-perturb,lwf,ckca";
    r.memory = 200;
    r.update.holdout = CKCA_OFF; /* methods are compared on their own */
    r.seed = 1;
    if (tool_parse(argc, argv, usage, flags))
        tool_fail(2, "unexpected argument \"%s\" (--help lists the flags)", argv[0]);
    tool_check_source(&r.source);
    choose_methods(&r);
    if (r.resume && !r.out) tool_fail(2, "--resume needs --out, the folder of the run to continue");
    drawn = !r.source.folder && !r.source.cifar10 && !r.source.cifar100 && !r.source.idx;
    if (!r.chunks) r.chunks = drawn ? 6 : 10;
    if (drawn && !r.chunk_size) r.chunk_size = 250;
    if (drawn && (double)r.chunk_size * r.chunks + r.unlabelled > 1e6)
        tool_fail(2, "--chunks times --chunk-size, and --unlabelled: at most 1000000 shapes");
    if (!r.update.epochs) r.update.epochs = drawn ? 20 : 40;
    if (!r.update.batch) r.update.batch = drawn ? 16 : 64;
    if (drawn && r.update.lr == 0) r.update.lr = 0.05f;

    if (r.out) {
        if (!tool_rank && mkdir(r.out, 0777) && errno != EEXIST) tool_fail(1, "%s: %s", r.out, strerror(errno));
        tool_check_output(path(&r, "results.csv"));
    }

    /* Pictures, split into chunks. */
    ctx = tool_init(&desc);
    tool_open(ctx, &r.source, r.chunks * r.chunk_size + r.unlabelled, r.seed, &train, &test);
    ckca_data_info_get(test, &info);
    t = info.count;
    ckca_data_info_get(train, &info);
    chunks = (ckca_data **)calloc((size_t)r.chunks, sizeof *chunks);
    r.rows = (row *)calloc((size_t)(r.chunks * r.columns), sizeof *r.rows);
    if (!chunks || !r.rows) tool_fail(1, "out of memory");
    memset(&split, 0, sizeof split);
    split.size = r.chunk_size;
    split.stratified = r.stratified;
    split.seed = r.seed;
    tool_check(ctx, ckca_split(train, r.chunks, &split, chunks));
    if (r.unlabelled) unlabelled = set_aside(ctx, train, chunks, r.chunks, r.unlabelled);

    /* The untrained network. */
    memset(&model_desc, 0, sizeof model_desc);
    model_desc.height = info.height;
    model_desc.width = info.width;
    model_desc.channels = info.channels;
    model_desc.classes = info.classes;
    model_desc.class_names = info.class_names;
    model_desc.width_base = r.width;
    model_desc.projection = r.projection;
    model_desc.seed = r.seed;
    tool_check(ctx, ckca_resnet(ctx, &model[0], r.arch, &model_desc));
    ckca_model_info_get(model[0], &model_info);
    printf("%s: %lld parameters, on %s\n%d training pictures, %d test pictures, %dx%dx%d, %d classes; ", r.arch,
           (long long)model_info.parameters, ckca_device(ctx), info.count, t, info.height, info.width, info.channels,
           info.classes);

    /* Results of an earlier run. */
    folder = r.source.folder     ? r.source.folder
             : r.source.cifar10  ? "CIFAR-10"
             : r.source.cifar100 ? "CIFAR-100"
                                 : r.source.idx;
    for (m = folder ? (int)strlen(folder) : 0; m > 1 && folder[m - 1] == '/';) m--;
    for (t = m; folder && t > 0 && folder[t - 1] != '/';) t--;
    ckca_data_info_get(chunks[0], &info);
    printf("%d chunks of %d\n", r.chunks, info.count);
    snprintf(r.title, sizeof r.title, "%s on %.*s: %d chunks of %d pictures, %d epochs each", r.arch,
             folder ? m - t : 12, folder ? folder + t : "drawn shapes", r.chunks, info.count, r.update.epochs);
    if (r.out) {
        snprintf(r.pictures, sizeof r.pictures, "%016llx",
                 (unsigned long long)(31 * ckca_data_fingerprint(train) + ckca_data_fingerprint(test)));
        read_csv(&r);
        tool_check(ctx, ckca_agree(ctx, CKCA_OK)); /* before rank 0 writes what others read */
        write_results(&r);
    }

    /* Chunk by chunk. With --out, checkpoints are files and one network is in memory; without, all networks are. */
    for (t = 0; t < r.chunks; t++)
        for (m = 0; m < r.columns; m++)
            if (!at(&r, t, m)->done) r.cost_left += job_cost(&r, t, m, info.count);
    for (t = 0; t < r.chunks; t++) {
        for (m = 0; m < r.columns; m++) {
            if (at(&r, t, m)->done) continue;
            r.cost_left -= r.cost = job_cost(&r, t, m, info.count);
            if (t == 0 && m > 0) { /* every method trains the first chunk from scratch */
                *at(&r, t, m) = *at(&r, t, 0);
                if (!r.out)
                    tool_check(ctx, ckca_model_copy(&model[m], model[0]));
                else if (has_memory(&r, m))
                    tool_check(ctx, ckca_load(ctx, &model[m], checkpoint(&r, 0, m)));
            } else {
                if (r.out && t) tool_check(ctx, ckca_load(ctx, &model[m], checkpoint(&r, t - 1, m)));
                if (r.out && t && has_memory(&r, m))
                    tool_check(ctx, ckca_memory_load(model[m], &memory[m], memory_file(&r, t - 1, m)));
                do_job(ctx, &r, model[m], memory[m], chunks, test, unlabelled, t, m);
            }
            if (t == 0 && has_memory(&r, m)) {
                memory_desc.pictures = r.method[m]->pictures ? r.memory : 0;
                memory_desc.fisher = r.method[m]->fisher;
                tool_check(ctx, ckca_memory_create(model[m], &memory[m], &memory_desc));
                tool_check(ctx, ckca_memory_fill(memory[m], model[m], chunks[0]));
            }
            if (r.out) { /* the checkpoint last, for it removes the training state */
                if (memory[m]) tool_check(ctx, ckca_memory_save(memory[m], memory_file(&r, t, m)));
                if (t || !m) tool_check(ctx, ckca_save(model[m], checkpoint(&r, t, m)));
                ckca_memory_free(memory[m]);
                ckca_model_free(model[m]);
                memory[m] = NULL;
                model[m] = NULL;
            }
            r.cost_done += r.cost;
            write_results(&r);
            if (r.out && t > 1 && !tool_rank) remove(checkpoint(&r, t - 1, m));
            if (r.out && t && has_memory(&r, m) && !tool_rank) remove(memory_file(&r, t - 1, m));
            print_row(&r, t, m);
            jobs++;
        }
    }

    print_table(&r, 0);
    if (r.sweep) print_table(&r, 1);
    for (m = 1; m < r.columns; m++)
        if (at(&r, r.chunks - 1, m)->accuracy > at(&r, r.chunks - 1, best)->accuracy) best = m;
    printf("\nBest at the end: %s, %.1f%%.", r.method[best]->name, 100 * at(&r, r.chunks - 1, best)->accuracy);
    if (r.out) printf(" Plot: %s", path(&r, "results.svg"));
    printf("\n");

    for (m = 0; m < r.columns; m++) ckca_memory_free(memory[m]), ckca_model_free(model[m]);
    for (t = 0; t < r.chunks; t++) ckca_data_free(chunks[t]);
    ckca_data_free(unlabelled);
    ckca_data_free(train);
    ckca_data_free(test);
    free(chunks);
    free(r.rows);
    ckca_context_free(ctx);
    return tool_end();
}
