/* mpi.h: several processes train one model, connected by MPI (Open MPI, MPICH). tool.h includes it if CKCA_MPI is
   defined:

       make MPI=1
       mpirun --bind-to none -n 4 build/train --cifar10 cifar-10-batches-bin --batch 256

   In a program of your own, include it after ckca.h and compile with mpicc:

       ckca_desc desc = {0};
       ckca_ranks ranks;
       mpi_begin(&ranks);
       desc.ranks = &ranks;
       desc.threads = mpi_threads();
       ... ckca_init(&ctx, &desc), the same calls on all ranks ...
       mpi_end(0);

   Sums are MPI_Iallreduce calls, which progress when MPI is called: sum_poll does so between layers. Both MPIs add up
   in an order that follows from the number of ranks and values alone, so runs repeat bitwise, and all ranks get the same
   bits; ckca_update checks that. A failing MPI call ends all processes with MPI's message, as does the death of one. */
#ifndef CKCA_MPI_H
#define CKCA_MPI_H

#include <mpi.h> /* the system's */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h> /* sysconf */

enum { MPI_SUMS = 256, MPI_VALUES = 1 << 26 /* per MPI call, whose counts are ints */ };

static struct {
    MPI_Request request[MPI_SUMS];
    int sums;                   /* under way */
    int local_rank, local_size; /* on this machine */
} mpi;

static inline int mpi_sum_wait(void *user) {
    const int sums = mpi.sums;
    (void)user;
    mpi.sums = 0;
    return MPI_Waitall(sums, mpi.request, MPI_STATUSES_IGNORE) != MPI_SUCCESS;
}

static inline int mpi_sum_start(float *values, size_t count, void *user) {
    size_t n;
    for (; count; values += n, count -= n) {
        n = count < MPI_VALUES ? count : MPI_VALUES;
        if (mpi.sums == MPI_SUMS && mpi_sum_wait(user)) return 1;
        if (MPI_Iallreduce(MPI_IN_PLACE, values, (int)n, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD,
                           &mpi.request[mpi.sums++]) != MPI_SUCCESS)
            return 1;
    }
    return 0;
}

static inline int mpi_sum_poll(void *user) {
    int done;
    (void)user;
    return mpi.sums && MPI_Testall(mpi.sums, mpi.request, &done, MPI_STATUSES_IGNORE) != MPI_SUCCESS;
}

static inline int mpi_broadcast(void *bytes, size_t count, void *user) {
    char *at = (char *)bytes;
    size_t n;
    (void)user;
    for (; count; at += n, count -= n) {
        n = count < MPI_VALUES ? count : MPI_VALUES;
        if (MPI_Bcast(at, (int)n, MPI_BYTE, 0, MPI_COMM_WORLD) != MPI_SUCCESS) return 1;
    }
    return 0;
}

/* Starts MPI and fills ranks for ckca_desc. Without mpirun it is one process. */
static inline void mpi_begin(ckca_ranks *ranks) {
    MPI_Comm local;
    MPI_Init(NULL, NULL);
    MPI_Comm_rank(MPI_COMM_WORLD, &ranks->rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks->size);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &local);
    MPI_Comm_rank(local, &mpi.local_rank);
    MPI_Comm_size(local, &mpi.local_size);
    MPI_Comm_free(&local);
    ranks->sum_start = mpi_sum_start;
    ranks->sum_wait = mpi_sum_wait;
    ranks->sum_poll = mpi_sum_poll;
    ranks->broadcast = mpi_broadcast;
    ranks->user = NULL;
}

/* Threads for each rank, so that those of one machine share its processors: for ckca_desc.threads. mpirun must not bind
   ranks to single processors (Open MPI: --bind-to none). */
static inline int mpi_threads(void) {
    const long processors = sysconf(_SC_NPROCESSORS_ONLN);
    return processors > mpi.local_size ? (int)(processors / mpi.local_size) : 1;
}

/* Ends MPI. failed: 1: this rank failed and the others do not know: ends them too. */
static inline void mpi_end(int failed) {
    int ended = 0;
    MPI_Finalized(&ended);
    if (ended) return;
    if (failed) MPI_Abort(MPI_COMM_WORLD, 1);
    MPI_Finalize();
}
#endif /* CKCA_MPI_H */
