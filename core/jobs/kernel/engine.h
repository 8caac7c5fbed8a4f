#ifndef INTENTD_JOBS_ENGINE_H
#define INTENTD_JOBS_ENGINE_H

#include "kernel.h"

typedef struct { /* everything one run changes; one block of memory, see engine_layout */
    Policy policy;
    Jobs jobs;
    State state;
    View view;
    Grants grants;
    int32_t *klass, *run;
    double *rate, *stall, *since, *saved; /* saved: time of the last checkpoint */
    double *area0, *submitted;
    int runs, next, target;
    double lease_at, lease_growth, begin, area, random; /* begin: of a play-out */
    const double *failure; /* (failures, 2): time, change of capacity in GPUs; rising times */
    int failures, next_failure;
    uint64_t seed;
    double *finish, *start, *fair, *resizes, *preemptions; /* answers, may be NULL in a play-out */
    long decisions;
    const int32_t *owner; /* (n,): whose quota binds the job, -1: nobody's; NULL: there are none */
    const int32_t *most;  /* (n,): largest grants as given; jobs.gmax: within the quotas, now */
    const double *quota;  /* (owners,): GPUs at once */
    int owners, held, n_owned, loading;
    int32_t *gmax, *owned; /* owned: admitted jobs that some quota binds, by index */
    double *used, *left;   /* (owners,): GPUs of the smallest grants; scratch */
    int review_every; /* every so many arrivals, the finish of all active jobs is predicted anew */
    double *reviews;  /* (n / review_every, n) */
} Engine;

size_t engine_bytes(int n, int classes, int owners);
void engine_layout(Engine *engine, char *block, int n, int classes, int owners);
int class_of(const Policy *policy, double size);
void engine_admit(Engine *engine, int j);
void engine_sort(Engine *engine);
int engine_run(Engine *engine, Engine *mirror, const uint8_t *predict, double *predicted);
void engine_decide(Engine *engine);
double engine_play_out(const Engine *engine, Engine *mirror, int target);

#endif
