/* test_threads.c: ckca__parallel runs each task once, with thread numbers that are each running task's own; threads go
   through their own runs of tasks, in order, then help others from the far end; it waits for claimed tasks and for
   nothing else; workers do come; contexts of several threads do not meddle with each other; what contexts take is
   given back; a forked child can go on; too few threads will do. */
#ifndef CKCA_NO_THREADS
#include <pthread.h>

static int creations = -1; /* how many more threads the system grants; -1: all */
static int create_thread(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument) {
    if (creations == 0) return 11;
    if (creations > 0) creations--;
    return pthread_create(thread, attributes, start, argument);
}
#define pthread_create create_thread
#endif

#define CKCA_IMPLEMENTATION
#include "ckca.h"
#undef pthread_create

#include "test.h"

#ifdef CKCA__THREADS
#include <errno.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
static pthread_mutex_t watch = PTHREAD_MUTEX_INITIALIZER; /* guards what tasks note down */
static pthread_cond_t arrival = PTHREAD_COND_INITIALIZER;
static void watch_lock(void) { pthread_mutex_lock(&watch); }
static void watch_unlock(void) { pthread_mutex_unlock(&watch); }
#else
static void watch_lock(void) {}
static void watch_unlock(void) {}
#endif

enum { MOST_TASKS = 1000, MOST_THREADS = 8 };

static ckca_context *context(int threads) {
    ckca_context *ctx;
    ckca_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.threads = threads;
    if (ckca_init(&ctx, &desc)) exit(2);
    return ctx;
}

typedef struct notes {
    int threads; /* of the context */
    int runs[MOST_TASKS], working[MOST_THREADS];
    unsigned result[MOST_TASKS]; /* written without a lock: the return must make it visible */
    int clashes, strange, inside;
} notes;

static void note(void *job, int task, int thread) {
    notes *n = (notes *)job;
    volatile unsigned sum = 0;
    unsigned i, turns = (unsigned)ckca__random(7, 7, (uint64_t)task) % 200;
    watch_lock();
    n->runs[task]++;
    n->inside++;
    if (thread < 0 || thread >= n->threads) n->strange++;
    else n->clashes += n->working[thread]++;
    watch_unlock();
    for (i = 0; i < turns; i++) sum += i;
#ifdef CKCA__THREADS
    if (turns == 0) sched_yield();
#endif
    n->result[task] = (unsigned)task * 3 + 1;
    watch_lock();
    if (thread >= 0 && thread < n->threads) n->working[thread]--;
    n->inside--;
    watch_unlock();
}

/* One call, looked at from all sides; 0 if all is well. */
static int call(ckca_context *ctx, notes *n, int tasks) {
    int task, wrong;
    memset(n, 0, sizeof *n);
    n->threads = ctx->threads;
    ckca__parallel(ctx, tasks, note, n);
    wrong = n->inside | n->clashes | n->strange; /* no lock: nothing may be running any more */
    for (task = 0; task < MOST_TASKS; task++)
        wrong |= n->runs[task] != (task < tasks) || n->result[task] != (task < tasks ? (unsigned)task * 3 + 1 : 0);
    return wrong;
}

static void test_tasks(int threads, int times) {
    static const int counts[] = {0, 1, 2, 3, 4, 7, 8, 9, 16, 64, 65, MOST_TASKS};
    ckca_context *ctx = context(threads);
    notes n;
    int wrong = 0, i, j;
    for (i = 0; i < (int)(sizeof counts / sizeof *counts); i++)
        for (j = 0; j < 20; j++) wrong += call(ctx, &n, counts[i]) != 0;
    CHECK(!wrong, "%d threads: %d of %d calls went wrong", threads, wrong, 20 * i);
    for (i = wrong = 0; i < times; i++) wrong += call(ctx, &n, (int)(ckca__random(3, 3, (uint64_t)i) % 12)) != 0;
    CHECK(!wrong, "%d threads: %d of %d short calls went wrong", threads, wrong, times);
    ckca_context_free(ctx);
}

#ifdef CKCA__THREADS
/* As many tasks as threads, each of which waits for all: done only if that many threads come. Gives up in the end. */
typedef struct meeting {
    int expected, here, failed;
    int left; /* linger's tasks that ended */
} meeting;

static void meet(void *job, int task, int thread) {
    meeting *m = (meeting *)job;
    struct timespec end;
    (void)task;
    (void)thread;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += 20;
    watch_lock();
    if (++m->here == m->expected) pthread_cond_broadcast(&arrival);
    while (m->here < m->expected && !m->failed)
        if (pthread_cond_timedwait(&arrival, &watch, &end) == ETIMEDOUT) m->failed = 1;
    watch_unlock();
}

static int meeting_fails(ckca_context *ctx) {
    meeting m;
    memset(&m, 0, sizeof m);
    m.expected = ctx->threads;
    ckca__parallel(ctx, ctx->threads, meet, &m);
    return m.failed;
}

static void test_meetings(int threads, int times) {
    ckca_context *ctx = context(threads);
    int i, failed = 0;
    for (i = 0; i < times && !failed; i++) failed = meeting_fails(ctx);
    CHECK(!failed, "%d threads did not come to the %d. call of as many tasks", threads, i);
    ckca_context_free(ctx);
}

/* The caller has run out of tasks, the worker's takes long: the call must not return before. */
static void linger(void *job, int task, int thread) {
    struct timespec moment = {0, 2000000};
    meeting *m = (meeting *)job;
    meet(job, task, thread);
    if (thread) nanosleep(&moment, NULL);
    watch_lock();
    m->left++;
    watch_unlock();
}

static void test_lingering(void) {
    ckca_context *ctx = context(2);
    int i, early = 0;
    for (i = 0; i < 20; i++) {
        meeting m;
        memset(&m, 0, sizeof m);
        m.expected = 2;
        ckca__parallel(ctx, 2, linger, &m);
        watch_lock();
        early += m.left != 2;
        watch_unlock();
    }
    CHECK(!early, "%d of 20 calls returned before their last task ended", early);
    ckca_context_free(ctx);
}

/* Who ran what, in which order. In step: a task ends when every thread has come to its task of the same place in its
   order, so that none gets ahead and helps. Otherwise the worker stays in its first task until all others are done. */
typedef struct order {
    int threads, tasks, in_step, failed, begun, done;
    int ran[3], task[3][16];
} order;

static void keep_order(void *job, int task, int thread) {
    order *o = (order *)job;
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += 20;
    watch_lock();
    o->task[thread][o->ran[thread]++] = task;
    o->begun++;
    pthread_cond_broadcast(&arrival);
    while (!o->failed && (o->in_step ? o->begun < o->threads * o->ran[thread]
                                     : thread ? o->done < o->tasks - 1 : o->begun < 2))
        if (pthread_cond_timedwait(&arrival, &watch, &end) == ETIMEDOUT) o->failed = 1;
    o->done++;
    pthread_cond_broadcast(&arrival);
    watch_unlock();
}

static void test_order(void) {
    static const int helping[2][7] = {{0, 1, 2, 3, 7, 6, 5}, {3, 2, 1, 0, 4, 5, 6}};
    ckca_context *three = context(3), *two = context(2);
    int back, i, j, times;
    for (times = 0; times < 50; times++)
        for (back = 0; back < 2; back++) {
            order o;
            int wrong = 0;
            memset(&o, 0, sizeof o);
            o.threads = 3;
            o.tasks = 15;
            o.in_step = 1;
            ckca__parallel_run(three, o.tasks, 0, back, keep_order, &o);
            for (i = 0; i < 3; i++)
                for (j = 0; j < 5; j++) wrong |= o.ran[i] != 5 || o.task[i][j] != 5 * i + (back ? 4 - j : j);
            CHECK(!o.failed && !wrong, "back %d: threads did not go through their own runs (timeout: %d)", back,
                  o.failed);
            memset(&o, 0, sizeof o);
            o.threads = 2;
            o.tasks = 8;
            ckca__parallel_run(two, o.tasks, 0, back, keep_order, &o);
            wrong = o.ran[1] != 1 || o.task[1][0] != (back ? 7 : 4);
            for (i = 0; i < 7; i++) wrong |= o.task[0][i] != helping[back][i];
            CHECK(!o.failed && !wrong, "back %d: the caller did not help from the far end (timeout: %d)", back,
                  o.failed);
        }
    ckca_context_free(three);
    ckca_context_free(two);
}

static void call_alone(void *job, int task, int thread) {
    order *o = (order *)job;
    o->failed |= thread;
    o->task[0][o->ran[0]++] = task;
}

static void test_alone(void) {
    ckca_context *ctx = context(3);
    int back, i, wrong = 0;
    for (back = 0; back < 2; back++) {
        order o;
        memset(&o, 0, sizeof o);
        ckca__parallel_run(ctx, 9, 1, back, call_alone, &o);
        wrong |= o.failed || o.ran[0] != 9;
        for (i = 0; i < 9; i++) wrong |= o.task[0][i] != (back ? 8 - i : i);
    }
    CHECK(!wrong && ctx->pool->workers == 0, "a call that is the caller's alone was not");
    ckca_context_free(ctx);
}

/* A user's own threads, a context each. */
static void *user(void *argument) {
    int *wrong = (int *)argument, i;
    ckca_context *ctx = context(3);
    notes *n = (notes *)malloc(sizeof *n);
    if (!n) exit(2);
    for (i = 0; i < 1000; i++) *wrong += call(ctx, n, 1 + i % 9) != 0;
    free(n);
    ckca_context_free(ctx);
    return NULL;
}

static void test_users(void) {
    pthread_t thread[2];
    int wrong[2] = {0, 0}, i;
    for (i = 0; i < 2; i++)
        if (pthread_create(&thread[i], NULL, user, &wrong[i])) exit(2);
    for (i = 0; i < 2; i++) pthread_join(thread[i], NULL);
    CHECK(!wrong[0] && !wrong[1], "two contexts at once: %d and %d of 1000 calls went wrong", wrong[0], wrong[1]);
}

/* A worker that is kept from coming (its thread stands still in a signal's handler) is not waited for, and the other
   one comes as ever. */
static int gate[2];
static volatile sig_atomic_t caught;
static void stand_still(int number) {
    char c;
    (void)number;
    caught = 1;
    while (read(gate[0], &c, 1) < 0) {}
}

static void test_absent_worker(void) {
    ckca_context *ctx = context(3);
    struct timespec moment = {0, 1000000};
    struct sigaction action, before;
    meeting m;
    notes n;
    int i, wrong = 0;
    if (pipe(gate)) exit(2);
    memset(&action, 0, sizeof action);
    action.sa_handler = stand_still;
    sigaction(SIGUSR1, &action, &before);
    if (meeting_fails(ctx)) exit(2); /* the worker is there, and goes to sleep */
    nanosleep(&moment, NULL);
    pthread_kill(ctx->pool->worker[0].thread, SIGUSR1); /* the first that calls would wake */
    for (i = 0; i < 10000 && !caught; i++) nanosleep(&moment, NULL);
    for (i = 0; i < 100; i++) wrong += call(ctx, &n, 1 + i % 9) != 0;
    CHECK(caught && !wrong, "without a worker %d of 100 calls went wrong", wrong);
    for (i = wrong = 0; i < 100; i++) {
        memset(&m, 0, sizeof m);
        m.expected = 2;
        ckca__parallel(ctx, 2, meet, &m);
        wrong += m.failed;
    }
    CHECK(!wrong, "without a worker the other one stayed away from %d of 100 calls", wrong);
    if (write(gate[1], "x", 1) != 1) exit(2);
    CHECK(!meeting_fails(ctx), "the worker did not come back");
    sigaction(SIGUSR1, &before, NULL);
    close(gate[0]);
    close(gate[1]);
    ckca_context_free(ctx);
}

static void test_fork(void) {
    ckca_context *used = context(3), *fresh = context(3);
    notes n;
    int i, status = -1, wrong = call(used, &n, 50);
    pid_t child;
    fflush(stdout);
    for (i = 0; i < 20 && !wrong; i++) {
        wrong = meeting_fails(used);
        child = fork();
        if (child == 0) {
            alarm(30);
            status = meeting_fails(used) || call(used, &n, 50) || meeting_fails(fresh);
            if (i % 2) ckca_context_free(used); /* and the other half leave their parent's behind */
            ckca_context_free(fresh);
            _exit(status);
        }
        wrong |= child < 0 || waitpid(child, &status, 0) != child || status;
    }
    CHECK(!wrong, "a forked child ended with status %d, or its parent went wrong", status);
    CHECK(!meeting_fails(used), "the parent's threads did not come after a fork");
    child = fork(); /* one that only frees what it never used */
    if (child == 0) {
        alarm(30);
        ckca_context_free(used);
        ckca_context_free(fresh);
        _exit(0);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child && !status, "a child freeing ended with status %d", status);
    ckca_context_free(used);
    ckca_context_free(fresh);
}

static void test_few_threads(void) {
    int granted;
    for (granted = 0; granted < 3; granted++) {
        ckca_context *ctx = context(8);
        notes n;
        int i, wrong = 0;
        creations = granted;
        for (i = 0; i < 200; i++) wrong += call(ctx, &n, 1 + i % 20) != 0;
        creations = -1;
        CHECK(!wrong && ctx->pool->workers == granted, "with %d of 7 threads granted, %d of 200 calls went wrong",
              granted, wrong);
        ckca_context_free(ctx);
    }
}

/* Threads of this process; 0 where /proc does not say. */
static int threads_now(void) {
    char line[256];
    int count = 0;
    FILE *file = fopen("/proc/self/status", "r");
    if (!file) return 0;
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "Threads: %d", &count) == 1) break;
    fclose(file);
    return count;
}
#endif

static void *count_alloc(size_t bytes, void *balance) {
    *(size_t *)balance += bytes;
    return malloc(bytes);
}
static void count_release(void *memory, size_t bytes, void *balance) {
    *(size_t *)balance -= bytes;
    free(memory);
}

static void test_lives(void) {
    size_t balance = 0;
    int i, wrong = 0;
    notes n;
    ckca_desc desc;
#ifdef CKCA__THREADS
    int before = threads_now(), after;
#endif
    memset(&desc, 0, sizeof desc);
    desc.alloc = count_alloc;
    desc.release = count_release;
    desc.user = &balance;
    for (i = 0; i < 300; i++) {
        ckca_context *ctx;
        desc.threads = i % 9;
        if (ckca_init(&ctx, &desc)) exit(2);
        n.threads = ctx->threads;
        if (i % 3 && ctx->threads <= MOST_THREADS) wrong += call(ctx, &n, i % 5) != 0;
        ckca_context_free(ctx);
    }
    CHECK(!wrong && balance == 0, "300 contexts: %d wrong calls, %.0f bytes kept", wrong, (double)balance);
#ifdef CKCA__THREADS
    after = threads_now();
    CHECK(after <= before, "300 contexts left %d threads behind", after - before);
#endif
}

int main(void) {
    static const int threads[] = {1, 2, 3, 8};
    ckca_context *ctx = context(0);
    int i;
    printf("%s\n", ckca_device(ctx));
    test_group("default number of threads");
#ifdef CKCA__THREADS
    alarm(300); /* a call that never returns is a failure too */
    CHECK(ctx->threads == ckca__pool_threads(0), "%d threads, %d processors", ctx->threads, ckca__pool_threads(0));
#else
    CHECK(ctx->threads == 1, "%d threads without threads", ctx->threads);
#endif
    ckca_context_free(ctx);
    test_group("each task runs once, on a thread number of its own");
    for (i = 0; i < 4; i++) test_tasks(threads[i], 5000);
    test_group("creating and freeing contexts");
    test_lives();
#ifdef CKCA__THREADS
    test_group("workers come");
    for (i = 1; i < 4; i++) test_meetings(threads[i], 500);
    test_group("the call waits for claimed tasks");
    test_lingering();
    test_group("order of tasks");
    test_order();
    test_group("one thread alone");
    test_alone();
    test_group("contexts in threads of the user");
    test_users();
    test_group("the system grants fewer threads");
    test_few_threads();
#ifndef __SANITIZE_THREAD__ /* allows neither threads after a fork nor such signals */
    test_group("a stopped worker is not waited for");
    test_absent_worker();
    test_group("a forked child goes on");
    test_fork();
#endif
#endif
    return test_summary();
}
