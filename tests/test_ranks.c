/* test_ranks.c: several processes train one model (ckca_ranks). The ranks are threads here, each with a context of its
   own; what connects them adds up in memory and waits at most 30 seconds for a rank. One process and several get the
   same gradients, to rounding; all ranks hold bitwise the same weights after every step; runs repeat and resume bitwise;
   evaluation is exact; a failure, a stop, a difference or a lost rank reaches all. No MPI is needed. On the GPU kernels
   (tests/cuda_shim.h) only one rank runs at a time. */
#define CKCA__BUCKET 64 /* floats: even these small networks have many buckets */
#define CKCA_IMPLEMENTATION
#include "ckca.h"
#include "test.h"
#ifndef CKCA__THREADS
int main(void) {
    printf("SKIPPED test_ranks: built without threads\n");
    return test_summary();
}
#else
#include <errno.h>
#include <pthread.h>
#include <time.h>

enum { SIZE = 8, CLASSES = 4, COUNT = 133, RANKS = 4, STEPS = 64, SUMS = 64 };
enum { QUICK = !CKCA__DEVICE_IS_HOST }; /* fewer cases on the GPU's kernels: the shim is slow */

/* ---- ranks in one process ---- */

typedef struct world {
    int size;
    pthread_mutex_t mutex;
    pthread_cond_t turn;
    int arrived, turns, broken;
    struct {
        float *values[SUMS];
        size_t count[SUMS];
        int sums; /* started and not waited for */
        int calls;
        void *bytes;
    } of[RANKS];
    int most_sums; /* under way at a time */
    int dies_at;   /* the call at which rank 1 is lost, from 1; 0: never */
} world;
static world the_world;

typedef struct rank {
    world *w;
    int number, allocations, fails_at, live; /* fails_at: the allocation that fails, from 1; 0: none */
    ckca_context *ctx;
    ckca_status status; /* of ckca_init, then the test's */
    char error[512];
    void (*run)(struct rank *r);
    void *test;
} rank;

/* The shim of CUDA is no match for threads: a rank runs until it waits for the others. */
static pthread_mutex_t running = PTHREAD_MUTEX_INITIALIZER;
static void start_running(void) {
    if (!CKCA__DEVICE_IS_HOST) pthread_mutex_lock(&running);
}
static void stop_running(void) {
    if (!CKCA__DEVICE_IS_HOST) pthread_mutex_unlock(&running);
}

/* Waits for all ranks; not 0: one is lost. */
static int meet(world *w) {
    struct timespec end;
    int turn, broken;
    stop_running();
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += 30;
    pthread_mutex_lock(&w->mutex);
    turn = w->turns;
    if (++w->arrived == w->size) {
        w->arrived = 0;
        w->turns++;
        pthread_cond_broadcast(&w->turn);
    }
    while (w->turns == turn && !w->broken)
        if (pthread_cond_timedwait(&w->turn, &w->mutex, &end) == ETIMEDOUT) w->broken = 2;
    if (w->broken) pthread_cond_broadcast(&w->turn);
    broken = w->broken;
    pthread_mutex_unlock(&w->mutex);
    start_running();
    return broken;
}

static int lost(rank *r) {
    world *w = r->w;
    if (w->dies_at && r->number == 1 && ++w->of[r->number].calls >= w->dies_at) {
        pthread_mutex_lock(&w->mutex);
        w->broken = 1;
        pthread_cond_broadcast(&w->turn);
        pthread_mutex_unlock(&w->mutex);
    }
    return 0;
}

static int sum_start(float *values, size_t count, void *user) {
    rank *r = (rank *)user;
    const int at = r->w->of[r->number].sums++;
    if (at >= SUMS) return 1;
    r->w->of[r->number].values[at] = values;
    r->w->of[r->number].count[at] = count;
    if (r->number == 0 && at >= r->w->most_sums) r->w->most_sums = at + 1;
    return lost(r);
}

static int sum_wait(void *user) {
    rank *r = (rank *)user;
    world *w = r->w;
    float *sum[SUMS];
    int i, k, wrong = 0;
    if (lost(r) || meet(w)) return 1;
    for (k = 0; k < w->of[r->number].sums; k++) {
        const size_t count = w->of[r->number].count[k];
        size_t j;
        sum[k] = (float *)calloc(count + 1, sizeof(float));
        for (i = 0; i < w->size; i++) {
            if (k >= w->of[i].sums || w->of[i].count[k] != count) wrong = 1;
            for (j = 0; !wrong && j < count; j++) sum[k][j] += w->of[i].values[k][j];
        }
    }
    if (wrong) printf("FAIL: rank %d sums something else than the others\n", r->number);
    if (wrong || meet(w)) w->broken = 1;
    for (k = 0; k < w->of[r->number].sums; k++) {
        memcpy(w->of[r->number].values[k], sum[k], w->of[r->number].count[k] * sizeof(float));
        free(sum[k]);
    }
    w->of[r->number].sums = 0;
    return w->broken || meet(w);
}

static int broadcast(void *bytes, size_t count, void *user) {
    rank *r = (rank *)user;
    world *w = r->w;
    w->of[r->number].bytes = bytes;
    if (lost(r) || meet(w)) return 1;
    if (r->number) memcpy(bytes, w->of[0].bytes, count);
    return meet(w);
}

static void *counted_alloc(size_t bytes, void *user) {
    rank *r = (rank *)user;
    if (++r->allocations == r->fails_at) return NULL;
    r->live++;
    return malloc(bytes);
}
static void counted_release(void *memory, size_t bytes, void *user) {
    (void)bytes;
    ((rank *)user)->live--;
    free(memory);
}

static void change_nothing(rank *r, ckca_desc *desc) { (void)r, (void)desc; }
static void (*change_desc)(rank *r, ckca_desc *desc) = change_nothing;

static void *rank_main(void *argument) {
    rank *r = (rank *)argument;
    ckca_ranks ranks;
    ckca_desc desc;
    memset(&desc, 0, sizeof desc);
    memset(&ranks, 0, sizeof ranks);
    ranks.rank = r->number;
    ranks.size = r->w->size;
    ranks.sum_start = sum_start;
    ranks.sum_wait = sum_wait;
    ranks.broadcast = broadcast;
    ranks.user = r;
    desc.threads = 1;
    desc.ranks = r->w->size > 1 ? &ranks : NULL;
    desc.alloc = counted_alloc;
    desc.release = counted_release;
    desc.user = r;
    change_desc(r, &desc);
    start_running();
    if (!(r->status = ckca_init(&r->ctx, &desc))) r->run(r);
    snprintf(r->error, sizeof r->error, "%s", ckca_error(r->ctx));
    ckca_context_free(r->ctx);
    stop_running();
    return NULL;
}

/* Runs a test on size ranks; r: size of them, with their results. */
static void run(int size, void (*test)(rank *r), void *what, rank *r) {
    world *w = &the_world;
    pthread_t thread[RANKS];
    int i, dies_at = w->dies_at;
    memset(w, 0, sizeof *w);
    w->size = size;
    w->dies_at = dies_at;
    pthread_mutex_init(&w->mutex, NULL);
    pthread_cond_init(&w->turn, NULL);
    for (i = 0; i < size; i++) {
        r[i].w = w;
        r[i].number = i;
        r[i].run = test;
        r[i].test = what;
        r[i].allocations = r[i].live = 0;
        r[i].ctx = NULL;
        if (pthread_create(&thread[i], NULL, rank_main, &r[i])) exit(2);
    }
    for (i = 0; i < size; i++) pthread_join(thread[i], NULL);
    for (i = 0; i < size; i++) CHECK(r[i].live == 0, "rank %d of %d keeps %d blocks of memory", i, size, r[i].live);
    CHECK(w->broken < 2, "a rank waits for the others for ever (%d ranks)", size);
    w->dies_at = 0;
}

/* ---- pictures and networks ---- */

static unsigned char pixels[COUNT * SIZE * SIZE * 3];
static int labels[COUNT];

static void draw_pictures(void) { /* a bright quarter, under noise */
    int i, y, x, c;
    uint64_t draw = 0;
    for (i = 0; i < COUNT; i++) {
        labels[i] = (int)(ckca__random(3, 77, draw++) % CLASSES);
        for (y = 0; y < SIZE; y++)
            for (x = 0; x < SIZE; x++)
                for (c = 0; c < 3; c++)
                    pixels[((i * SIZE + y) * SIZE + x) * 3 + c] =
                        (unsigned char)(ckca__random(3, 77, draw++) % 190 +
                                        (y / (SIZE / 2) * 2 + x / (SIZE / 2) == labels[i] ? 60u : 0u));
    }
}

static ckca_data *pictures(ckca_context *ctx, int first, int count) {
    ckca_array array;
    ckca_data *data = NULL;
    memset(&array, 0, sizeof array);
    array.pixels = pixels + (size_t)first * SIZE * SIZE * 3;
    array.labels = labels + first;
    array.count = count;
    array.height = array.width = SIZE;
    array.channels = 3;
    array.classes = CLASSES;
    ckca_open_array(ctx, &data, &array, NULL);
    return data;
}

/* Without batch norm: two stages of convolution and group norm. */
static ckca_model *plain_net(ckca_context *ctx, uint64_t seed) {
    ckca_model_desc desc;
    ckca_conv_desc conv;
    ckca_model *m = NULL;
    int x;
    memset(&desc, 0, sizeof desc);
    memset(&conv, 0, sizeof conv);
    desc.height = desc.width = SIZE;
    desc.channels = 3;
    desc.classes = CLASSES;
    desc.seed = seed;
    conv.out = 8;
    conv.pad = 1;
    conv.bias = 1;
    if (ckca_model_create(ctx, &m, &desc)) return NULL;
    x = ckca_layer_conv(m, "a", ckca_layer_input(m), conv);
    x = ckca_layer_stage(m, ckca_layer_relu(m, ckca_layer_groupnorm(m, "na", x, 2)));
    conv.stride = 2;
    x = ckca_layer_conv(m, "b", x, conv);
    x = ckca_layer_stage(m, ckca_layer_relu(m, ckca_layer_groupnorm(m, "nb", x, 4)));
    x = ckca_layer_linear(m, "c", ckca_layer_avgpool(m, x), CLASSES);
    if (ckca_model_finish(m, x)) {
        ckca_model_free(m);
        return NULL;
    }
    return m;
}

static ckca_model *resnet(ckca_context *ctx, uint64_t seed) { /* with batch norm */
    ckca_model_desc desc;
    ckca_model *m = NULL;
    memset(&desc, 0, sizeof desc);
    desc.height = desc.width = SIZE;
    desc.channels = 3;
    desc.classes = CLASSES;
    desc.seed = seed;
    desc.width_base = 4;
    ckca_resnet(ctx, &m, "resnet8", &desc);
    return m;
}

/* ---- a run of updates ---- */

typedef struct job {
    int batch_norm, count, batch, epochs, updates, augment;
    ckca_method method;
    ckca_adakd adakd;
    ckca_featreg featreg;
    float clip;
    const char *state, *save;
    int stops_rank, stops_at; /* this rank asks to stop after so many steps of an update; 0: never */
    /* results per rank */
    float *values[RANKS];
    size_t all, trainable;
    uint64_t hash[RANKS][STEPS];
    int steps[RANKS];
    ckca_report report[RANKS];
    ckca_score score[RANKS];
    float per_class[RANKS][CLASSES];
    ckca_model *model[RANKS]; /* under way */
} job;

typedef struct caller {
    rank *r;
    job *j;
} caller;

static int after_step(const ckca_progress *p, void *user) {
    const caller *c = (const caller *)user;
    const int i = c->r->number;
    const ckca_model *m = c->j->model[i];
    float *host = (float *)malloc(m->trainable * sizeof(float));
    (void)p;
    ckca__device_download(m->ctx, host, m->values, m->trainable * sizeof(float));
    if (c->j->steps[i] < STEPS) c->j->hash[i][c->j->steps[i]] = ckca__hash(0, host, m->trainable * sizeof(float));
    free(host);
    return ++c->j->steps[i] == c->j->stops_at && i == c->j->stops_rank;
}

static void train(rank *r) {
    job *j = (job *)r->test;
    const int i = r->number;
    ckca_data *data = pictures(r->ctx, 0, j->count), *test = pictures(r->ctx, 30, COUNT - 30);
    ckca_model *m = j->model[i] = j->batch_norm ? resnet(r->ctx, 1) : plain_net(r->ctx, 1);
    ckca_update_desc d;
    caller c;
    int update;
    c.r = r;
    c.j = j;
    j->steps[i] = 0;
    memset(&d, 0, sizeof d);
    d.batch = j->batch;
    d.epochs = j->epochs;
    d.clip_norm = j->clip;
    d.lr = 0.05f;
    d.seed = 5;
    d.adakd = j->adakd;
    d.featreg = j->featreg;
    d.augment.flip = j->augment;
    d.state = j->state;
    d.state_seconds = 1e6f;
    d.progress = after_step;
    d.user = &c;
    r->status = !data || !test || !m ? CKCA_ENOMEM : CKCA_OK;
    if (!r->status || r->w->size > 1) r->status = ckca_agree(r->ctx, r->status);
    for (update = 0; !r->status && update < j->updates; update++) {
        d.method = update ? j->method : CKCA_METHOD_CKCA;
        r->status = ckca_update(m, data, &d, &j->report[i]);
        if (!r->status && j->save) r->status = ckca_save(m, j->save);
    }
    if (!r->status) r->status = ckca_evaluate(m, test, &j->score[i], j->per_class[i]);
    free(j->values[i]);
    j->values[i] = NULL;
    if (m) {
        j->all = m->all;
        j->trainable = m->trainable;
        j->values[i] = (float *)malloc(m->all * sizeof(float));
        ckca__device_download(r->ctx, j->values[i], m->values, m->all * sizeof(float));
    }
    ckca_data_free(data);
    ckca_data_free(test);
    ckca_model_free(m);
}

static job simple_job(void) {
    job j;
    memset(&j, 0, sizeof j);
    j.count = 45;
    j.batch = 11; /* the last batch of an epoch has one picture */
    j.epochs = 2;
    j.updates = 1;
    return j;
}
static void job_free(job *j) {
    int i;
    for (i = 0; i < RANKS; i++) free(j->values[i]);
    memset(j->values, 0, sizeof j->values);
}

/* ||a - b|| / ||b|| over the first n values. */
static double distance(const float *a, const float *b, size_t n) {
    double sum = 0, square = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        sum += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        square += (double)b[i] * (double)b[i];
    }
    return sqrt(sum / square);
}

/* All ranks succeeded, with bitwise the same weights after every step and at the end, and the same results. */
static void check_same(const job *j, const rank *r, int size, const char *what) {
    int i, k;
    for (i = 0; i < size; i++) {
        CHECK(r[i].status == CKCA_OK, "%s: rank %d of %d: %s: %s", what, i, size, ckca_status_name(r[i].status),
              r[i].error);
        if (r[i].status || r[0].status) continue;
        for (k = 0; k < j->steps[0] && k < STEPS && j->hash[i][k] == j->hash[0][k]; k++) {
        }
        CHECK(j->steps[i] == j->steps[0] && k == j->steps[0],
              "%s: rank %d of %d: other weights than rank 0 after step %d of %d", what, i, size, k + 1, j->steps[0]);
        CHECK(!memcmp(j->values[i], j->values[0], j->all * sizeof(float)),
              "%s: rank %d of %d ends with other weights or running statistics than rank 0", what, i, size);
        CHECK(!memcmp(&j->score[i], &j->score[0], sizeof j->score[0]) &&
                  !memcmp(j->per_class[i], j->per_class[0], sizeof j->per_class[0]),
              "%s: rank %d of %d scores %g, rank 0 %g", what, i, size, j->score[i].top1, j->score[0].top1);
        CHECK(j->report[i].loss == j->report[0].loss && j->report[i].accuracy == j->report[0].accuracy &&
                  j->report[i].kd == j->report[0].kd && j->report[i].teacher_accuracy == j->report[0].teacher_accuracy,
              "%s: rank %d of %d reports loss %g, rank 0 %g", what, i, size, j->report[i].loss, j->report[0].loss);
    }
}

/* ---- one process and several ---- */

static void test_parity(void) {
    static const struct {
        const char *name;
        int updates, augment;
        ckca_method method;
        ckca_adakd adakd;
        ckca_featreg featreg;
        float clip;
    } cases[] = {
        {"cross-entropy", 1, 1, CKCA_METHOD_WARM, CKCA_ADAKD_CONSTANT, CKCA_FEATREG_STAGES, 0},
        {"clipped", 1, 0, CKCA_METHOD_WARM, CKCA_ADAKD_CONSTANT, CKCA_FEATREG_STAGES, 0.1f},
        {"LWF, the teacher's outputs kept", 2, 0, CKCA_METHOD_LWF, CKCA_ADAKD_CONSTANT, CKCA_FEATREG_STAGES, 0},
        {"class accuracies, COSINE", 2, 0, CKCA_METHOD_CKCA, CKCA_ADAKD_CLASS, CKCA_FEATREG_COSINE, 0},
        {"growth, class means, flipped", 2, 1, CKCA_METHOD_CKCA, CKCA_ADAKD_GROWTH, CKCA_FEATREG_CENTROID, 0},
        {"STAGES", 2, 0, CKCA_METHOD_CKCA, CKCA_ADAKD_CONSTANT, CKCA_FEATREG_STAGES, 0}};
    rank r[RANKS];
    int k, size;
    memset(r, 0, sizeof r);
    for (k = QUICK ? 3 : 0; k < (int)(sizeof cases / sizeof *cases); k += QUICK ? 3 : 1) {
        job alone = simple_job();
        alone.updates = cases[k].updates;
        alone.augment = cases[k].augment;
        alone.method = cases[k].method;
        alone.adakd = cases[k].adakd;
        alone.featreg = cases[k].featreg;
        alone.clip = cases[k].clip;
        run(1, train, &alone, r);
        CHECK(!r[0].status, "%s alone: %s", cases[k].name, r[0].error);
        for (size = 2; size <= (QUICK ? 3 : RANKS); size++) {
            job j = alone;
            memset(j.values, 0, sizeof j.values);
            run(size, train, &j, r);
            check_same(&j, r, size, cases[k].name);
            if (!r[0].status) {
                const double d = distance(j.values[0], alone.values[0], j.trainable);
                CHECK(d < 2e-5, "%s: %d ranks end %.2g away from one process", cases[k].name, size, d);
                CHECK(fabs(j.report[0].loss - alone.report[0].loss) < 1e-4 * alone.report[0].loss &&
                          fabs(j.report[0].kd - alone.report[0].kd) < 1e-4 &&
                          fabs(j.report[0].feat - alone.report[0].feat) < 1e-4 &&
                          j.report[0].teacher_accuracy == alone.report[0].teacher_accuracy,
                      "%s: %d ranks report loss %g, kd %g, feat %g; one process %g, %g, %g", cases[k].name, size,
                      j.report[0].loss, j.report[0].kd, j.report[0].feat, alone.report[0].loss, alone.report[0].kd,
                      alone.report[0].feat);
                CHECK(the_world.most_sums == (CKCA__DEVICE_IS_HOST ? 3 : 1), "%s: %d sums were under way at a time",
                      cases[k].name, the_world.most_sums);
            }
            job_free(&j);
        }
        job_free(&alone);
    }
}

/* The gradient of one batch in a training loop of one's own. */
static void own_loop(rank *r) {
    enum { N = 10 };
    job *j = (job *)r->test;
    const int i = r->number, from = ckca__part(r->ctx, N, i), n = ckca__part(r->ctx, N, i + 1) - from;
    static const int index[N] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
    float input[N * SIZE * SIZE * 3], logits[N * CLASSES];
    int label[N], k, c;
    ckca_data *data = pictures(r->ctx, 0, N);
    ckca_model *m = plain_net(r->ctx, 1);
    r->status = ckca_get_batch(m, data, index + from, n, NULL, 0, 0, input, label);
    if (!r->status) r->status = ckca_forward(m, input, n, 1);
    if (!r->status) r->status = ckca_node_read(m, m->logits, logits);
    for (k = 0; k < n; k++) { /* the gradient of the mean cross-entropy over n pictures */
        float *z = logits + k * CLASSES, sum = 0;
        for (c = 0; c < CLASSES; c++) sum += z[c] = expf(z[c]);
        for (c = 0; c < CLASSES; c++) z[c] = (z[c] / sum - (float)(c == label[k])) / (float)n;
    }
    if (!r->status) r->status = ckca_zero_gradients(m);
    if (!r->status) r->status = ckca_backward(m, logits, NULL);
    if (!r->status) r->status = ckca_sum_gradients(m, (float)n / N);
    j->all = j->trainable = m->trainable;
    j->values[i] = (float *)malloc(m->trainable * sizeof(float));
    if (!r->status) ckca__device_download(r->ctx, j->values[i], m->gradients, m->trainable * sizeof(float));
    ckca_data_free(data);
    ckca_model_free(m);
}

static void test_own_loop(void) {
    job alone = simple_job(), j = simple_job();
    rank r[RANKS];
    int size, i;
    memset(r, 0, sizeof r);
    run(1, own_loop, &alone, r);
    for (size = 2; size <= RANKS; size++) {
        run(size, own_loop, &j, r);
        for (i = 0; i < size; i++) {
            CHECK(!r[i].status, "rank %d: %s", i, r[i].error);
            CHECK(distance(j.values[i], alone.values[0], j.trainable) < 1e-6, "%d ranks: the gradient is %.2g away",
                  size, distance(j.values[i], alone.values[0], j.trainable));
        }
        job_free(&j);
    }
    job_free(&alone);
}

/* ---- the same bits: batch norm, repeated, stopped and resumed; files ---- */

static void test_bits(void) {
    static const ckca_method methods[2] = {CKCA_METHOD_CKCA, CKCA_METHOD_WARM};
    rank r[RANKS];
    int size, i, k;
    memset(r, 0, sizeof r);
    for (k = QUICK; k < 2; k++)
        for (size = 2; size <= (QUICK ? 2 : 3); size++) {
            job first = simple_job(), j;
            first.batch_norm = 1;
            first.count = 44;
            first.updates = 2;
            first.method = methods[k];
            first.adakd = CKCA_ADAKD_GROWTH;
            first.featreg = k ? CKCA_FEATREG_STAGES : CKCA_FEATREG_CENTROID;
            first.augment = 1;
            j = first;
            run(size, train, &first, r);
            check_same(&first, r, size, "with batch norm");
            run(size, train, &j, r);
            check_same(&j, r, size, "with batch norm, again");
            CHECK(!memcmp(j.values[0], first.values[0], j.all * sizeof(float)), "%d ranks: another run, other weights",
                  size);
            job_free(&j);
            /* One update; a rank other than 0 stops it in its second epoch. */
            first.updates = 1;
            run(size, train, &first, r);
            check_same(&first, r, size, "one update");
            j = first;
            memset(j.values, 0, sizeof j.values);
            j.state = "build/net.state";
            j.save = "build/net.safetensors";
            j.stops_rank = size - 1;
            j.stops_at = 6;
            run(size, train, &j, r);
            for (i = 0; i < size; i++)
                CHECK(r[i].status == CKCA_ESTOP && j.steps[i] == 6 &&
                          strstr(r[i].error, size == 2 ? "rank 1 of 2: update 1 was" : "rank 2 of 3: update 1 was"),
                      "rank %d, stopped by the last: %s: %s", i, ckca_status_name(r[i].status), r[i].error);
            for (i = 1; i < size; i++)
                CHECK(!memcmp(j.values[i], j.values[0], j.all * sizeof(float)), "rank %d stopped elsewhere", i);
            CHECK(ckca__file_exists("build/net.state"), "no state after the stop");
            j.stops_at = 0;
            if (size == 2) { /* with another number of ranks */
                run(3, train, &j, r);
                for (i = 0; i < 3; i++)
                    CHECK(r[i].status == CKCA_EINVAL &&
                              strstr(r[i].error, "net.state: it is the training state of another update"),
                          "3 ranks resume what 2 began: %s", r[i].error);
                job_free(&j);
            }
            run(size, train, &j, r);
            check_same(&j, r, size, "resumed");
            CHECK(j.steps[0] == 2, "resumed: %d steps", j.steps[0]);
            CHECK(!memcmp(j.values[0], first.values[0], j.all * sizeof(float)), "%d ranks: resumed to other weights",
                  size);
            CHECK(j.report[0].loss == first.report[0].loss && j.report[0].accuracy == first.report[0].accuracy,
                  "%d ranks: the resumed run reports loss %.17g, the other %.17g", size, j.report[0].loss,
                  first.report[0].loss);
            CHECK(!ckca__file_exists("build/net.state") && ckca__file_exists("build/net.safetensors"),
                  "files after the save");
            remove("build/net.safetensors");
            job_free(&first);
            job_free(&j);
        }
}

/* ---- failures, differences, a lost rank ---- */

static int differs; /* which difference rank 1 makes */

static void differ(rank *r) {
    ckca_data *data = pictures(r->ctx, differs == 1 && r->number == 1, 20);
    ckca_model *m = plain_net(r->ctx, differs == 2 && r->number == 1 ? 2 : 1);
    ckca_update_desc d;
    memset(&d, 0, sizeof d);
    d.epochs = 1;
    d.batch = 8;
    if (r->number == 1) {
        if (differs == 3) d.lr = 0.25f;
        if (differs == 4) d.seed = 1;
        if (differs == 5) data->index[3] = 4;
        if (differs == 7) d.lr = -3;
    }
    if (differs == 6 && r->number == 1)
        r->status = ckca_evaluate(m, data, NULL, NULL);
    else if (differs == 8)
        r->status = ckca_evaluate(m, r->number ? data : NULL, NULL, NULL);
    else if (differs == 9)
        r->status = ckca_save(m, r->number ? "elsewhere/x" : "no/such/folder/x");
    else if (differs == 10)
        r->status = ckca_agree(r->ctx, r->number ? ckca__fail(r->ctx, CKCA_EIO, "a.jpg: cannot be read") : CKCA_OK);
    else
        r->status = ckca_update(m, data, &d, NULL);
    ckca_data_free(data);
    ckca_model_free(m);
}

static void other_desc(rank *r, ckca_desc *desc) {
    if (r->number == 1) desc->no_winograd = 1;
}

static void test_differences(void) {
    static const struct {
        ckca_status status;
        const char *sentence;
    } expected[11] = {
        {CKCA_OK, ""},
        {CKCA_ERANKS, "rank 1 of 2: ckca_update: its pictures or labels differ from rank 0's"},
        {CKCA_ERANKS, "rank 1 of 2: ckca_update: its weights or running statistics differ from rank 0's"},
        {CKCA_ERANKS, "rank 1 of 2: ckca_update: its lr is 0.25, rank 0's is 0.100000001"},
        {CKCA_ERANKS, "rank 1 of 2: ckca_update: its seeds differ from rank 0's"},
        {CKCA_ERANKS, "rank 1 of 2: ckca_update: its pictures or labels differ from rank 0's"},
        {CKCA_ERANKS, "rank 1 of 2: it is in ckca_evaluate, rank 0 in ckca_update: all must make the same calls"},
        {CKCA_EINVAL, "rank 1 of 2: update: lr is -3"},
        {CKCA_EINVAL, "rank 0 of 2: ckca_evaluate: data is NULL"},
        {CKCA_EIO, "rank 0 of 2: "},
        {CKCA_EIO, "rank 1 of 2: a.jpg: cannot be read"}};
    rank r[RANKS];
    int i;
    memset(r, 0, sizeof r);
    for (differs = 0; differs <= 10; differs++) {
        run(2, differ, NULL, r);
        for (i = 0; i < 2; i++)
            CHECK(r[i].status == expected[differs].status &&
                      !strncmp(r[i].error, expected[differs].sentence, strlen(expected[differs].sentence)),
                  "difference %d, rank %d: %s: %s", differs, i, ckca_status_name(r[i].status), r[i].error);
    }
    change_desc = other_desc;
    run(2, differ, NULL, r);
    for (i = 0; i < 2; i++)
        CHECK(r[i].status == CKCA_ERANKS && strstr(r[i].error, "ckca_init: its no_winograd is 1, rank 0's is 0"),
              "init: %s: %s", ckca_status_name(r[i].status), r[i].error);
    change_desc = change_nothing;
}

static void test_descriptor(void) {
    ckca_ranks ranks;
    ckca_desc desc;
    ckca_context *ctx = NULL;
    memset(&desc, 0, sizeof desc);
    memset(&ranks, 0, sizeof ranks);
    desc.ranks = &ranks;
    CHECK(ckca_init(&ctx, &desc) == CKCA_EINVAL && strstr(ckca_error(ctx), "ranks.size is 0"), "%s", ckca_error(ctx));
    ckca_context_free(ctx);
    ranks.size = 2;
    ranks.rank = 2;
    CHECK(ckca_init(&ctx, &desc) == CKCA_EINVAL && strstr(ckca_error(ctx), "ranks.rank is 2"), "%s", ckca_error(ctx));
    ckca_context_free(ctx);
    ranks.rank = 1;
    ranks.sum_start = sum_start;
    CHECK(ckca_init(&ctx, &desc) == CKCA_EINVAL && strstr(ckca_error(ctx), "ranks.sum_wait is NULL"), "%s",
          ckca_error(ctx));
    ckca_context_free(ctx);
}

/* Every allocation of rank 1 fails once: all ranks get its status and sentence, and nobody waits. */
static void test_out_of_memory(void) {
    rank r[RANKS];
    job j = simple_job();
    int k, i, failures = 0;
    memset(r, 0, sizeof r);
    j.count = 12;
    j.batch = 8;
    j.epochs = 1;
    j.updates = 2;
    run(2, train, &j, r);
    check_same(&j, r, 2, "before any failure");
    for (k = 3; k < 400;
         k += QUICK ? 25 : 1) { /* the first two are ckca_init's: without them it cannot talk to the others */
        r[1].fails_at = k;
        run(2, train, &j, r);
        r[1].fails_at = 0;
        if (!r[1].status) break;
        failures++;
        for (i = 0; i < 2; i++)
            CHECK(r[i].status == CKCA_ENOMEM && !strncmp(r[i].error, "rank 1 of 2: ", 13),
                  "allocation %d, rank %d: %s: %s", k, i, ckca_status_name(r[i].status), r[i].error);
    }
    CHECK(failures > (QUICK ? 1 : 90) && k < 400, "%d allocations failed", failures);
    printf("%d allocations of rank 1 failed one by one\n", failures);
    job_free(&j);
}

/* Rank 1 is lost at one of its calls: the other gets CKCA_ERANKS, and the last training state can be resumed. */
static void test_lost(void) {
    rank r[RANKS];
    job j = simple_job(), whole;
    int at, resumed = 0;
    memset(r, 0, sizeof r);
    whole = j;
    run(2, train, &whole, r);
    for (at = 3; at < 1500; at = at * (QUICK ? 40 : 3) / 2) {
        j.state = "build/lost.state";
        j.stops_at = 5; /* writes a state */
        run(2, train, &j, r);
        j.stops_at = 0;
        the_world.dies_at = at;
        run(2, train, &j, r);
        if (!r[0].status) break;
        CHECK(r[0].status == CKCA_ERANKS && strstr(r[0].error, "connection of the ranks is broken"),
              "lost at call %d: %s: %s", at, ckca_status_name(r[0].status), r[0].error);
        CHECK(ckca__file_exists("build/lost.state"), "lost at call %d: the state is gone", at);
        run(2, train, &j, r);
        resumed += !r[0].status && !memcmp(j.values[0], whole.values[0], j.all * sizeof(float));
        CHECK(!r[0].status && !memcmp(j.values[0], whole.values[0], j.all * sizeof(float)),
              "lost at call %d: resumed: %s", at, r[0].error);
        remove("build/lost.state");
        job_free(&j);
    }
    CHECK(resumed > (QUICK ? 0 : 8), "%d resumed", resumed);
    remove("build/lost.state");
    job_free(&j);
    job_free(&whole);
}

/* ---- evaluation ---- */

static void evaluate(rank *r) {
    job *j = (job *)r->test;
    ckca_data *data = pictures(r->ctx, 0, COUNT);
    ckca_model *m = resnet(r->ctx, 1);
    r->status = ckca_evaluate(m, data, &j->score[r->number], j->per_class[r->number]);
    ckca_data_free(data);
    ckca_model_free(m);
}

static void test_evaluation(void) {
    job alone = simple_job(), j = simple_job();
    rank r[RANKS];
    int size, i;
    memset(r, 0, sizeof r);
    run(1, evaluate, &alone, r);
    for (size = 2; size <= RANKS; size++) { /* 133 pictures are three blocks: the fourth rank has none */
        run(size, evaluate, &j, r);
        for (i = 0; i < size; i++)
            CHECK(!r[i].status && j.score[i].count == COUNT && j.score[i].top1 == alone.score[0].top1 &&
                      j.score[i].top5 == alone.score[0].top5 &&
                      fabs(j.score[i].loss / alone.score[0].loss - 1) < 1e-12 &&
                      !memcmp(j.per_class[i], alone.per_class[0], sizeof j.per_class[0]),
                  "rank %d of %d: top-1 %g of %d, loss %.15g; one process %g, %.15g; %s", i, size, j.score[i].top1,
                  j.score[i].count, j.score[i].loss, alone.score[0].top1, alone.score[0].loss, r[i].error);
    }
}

static void sum_counts(rank *r) {
    int counts[4] = {0, 2047, 1 << 22, INT_MAX / 2 - 1};
    counts[0] = r->number * 1000000 + 4097;
    r->status = ckca__ranks_sum_counts(r->ctx, "sum", counts, 4);
    if (!r->status &&
        (counts[0] != 3000000 + 3 * 4097 || counts[1] != 3 * 2047 || counts[2] != 3 << 22 || counts[3] != INT_MAX))
        r->status = ckca__fail(r->ctx, CKCA_ENAN, "sums are %d %d %d %d", counts[0], counts[1], counts[2], counts[3]);
}

int main(void) {
    rank r[RANKS];
    int i;
    memset(r, 0, sizeof r);
    draw_pictures();
    test_group("sums of counts");
    run(3, sum_counts, NULL, r);
    for (i = 0; i < 3; i++) CHECK(!r[i].status, "rank %d: %s", i, r[i].error);
    test_group("the descriptor");
    test_descriptor();
    test_group("evaluation");
    test_evaluation();
    test_group("a training loop of one's own");
    test_own_loop();
    test_group("one process and several");
    test_parity();
    test_enter();
    test_group("the same bits: batch norm, repeated, stopped and resumed");
    test_bits();
    test_group("differences between ranks");
    test_differences();
    test_group("out of memory on one rank");
    test_out_of_memory();
    test_group("a lost rank");
    test_lost();
    test_leave();
    return test_summary();
}
#endif
