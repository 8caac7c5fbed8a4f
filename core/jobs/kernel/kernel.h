/* Job allocation and the event loop around it: plain C, no allocation inside an event.
 *
 * allocate.c decides (pure: reads jobs, state and view, writes grants); engine.c moves time and
 * keeps the view ordered; module.c is the door to Python. reference.py says the same in plain
 * Python and the tests hold the two to 1e-9.
 */
#ifndef INTENTD_JOBS_KERNEL_H
#define INTENTD_JOBS_KERNEL_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define NEAR 1e-9 /* GPUs: amounts closer than this are equal, else fractions cause empty passes */

#define PLAY_OUT_GROWTH .02 /* of a play-out's leases, by the time since its beginning */

enum { FIFO, SRSF, THEMIS, AFS, MAXMIN, WFQ };
enum { ACTIVE = 1, STARTED = 2, PREEMPTED = 4, HELD = 8 }; /* HELD: waits for its owner's quota */

typedef struct {
    int kind, classes, integral, artifact;
    const double *threshold, *weight; /* (classes,), thresholds rising, the last one infinite */
    double zeta, delta;
    double lease_s; /* 0: decide at arrivals and ends only */
    double start_s, resize_s, preempt_s, min_runtime_s, checkpoint_s;
} Policy;

typedef struct {
    int n, tables, width, gangs; /* gangs: some job needs more than one GPU to run at all */
    const double *submit, *work, *estimate, *gmin;
    const int32_t *gmax, *table;
    const double *speed, *efficiency; /* (tables, width): at 0..width-1 GPUs; running minimum of
                                         speed / GPUs, efficiency[0] = 1 */
} Jobs;

typedef struct { /* a queue is items[head .. head + len) */
    int head, len;
    int32_t *items;
    double demand; /* sum of the members' gmax */
} Queue;

typedef struct {
    int32_t *busy; /* classes with members, rising */
    int n_busy, active;
    Queue *queue;
} View;

typedef struct {
    double now, capacity;
    double *remaining, *grant, *floor, *contention0, *events0, *size;
    double seen, events;
    uint8_t *flags;
    int true_sizes; /* estimates were applied already: inside a play-out */
} State;

typedef struct { /* scratch of the allocator and its answer */
    int32_t *job;
    double *amount;
    int count;
    double *share, *rank, *work; /* (max(classes, n),) each */
    int32_t *slot;
    uint8_t *done;
    double bar; /* a hint from one decision to the next, without effect on what it says */
} Grants;

static inline double speed_at(const Jobs *jobs, int j, double gpus)
{
    const double *row = jobs->speed + (size_t)jobs->table[j] * jobs->width;
    double top = jobs->gmax[j];
    if (gpus >= top)
        return row[jobs->gmax[j]];
    int low = (int)gpus;
    double part = gpus - low;
    return part == 0.0 ? row[low] : row[low] + part * (row[low + 1] - row[low]);
}

static inline double estimated(const Jobs *jobs, const State *state, int j)
{
    double factor = jobs->estimate[j];
    if (state->true_sizes || factor == 1.0)
        return state->remaining[j];
    double guess = state->remaining[j] * factor;
    return guess > 1e-2 ? guess : 1e-2;
}

static inline int least(const Jobs *jobs, int j) /* whole GPUs a start takes */
{
    int gpus = (int)ceil(jobs->gmin[j] - NEAR);
    return gpus < 1 ? 1 : gpus;
}

static inline double mean_contention(const State *state, int j)
{
    return (state->contention0[j] + state->seen) / (state->events0[j] + state->events);
}

/* Whole GPUs by max-min go to those served least so far. */
static inline int by_service(const Policy *policy, const Jobs *jobs)
{
    return policy->kind == MAXMIN && (policy->integral || jobs->gangs);
}

double order_key(const Policy *policy, const Jobs *jobs, const State *state, int j);
void allocate(const Policy *policy, const Jobs *jobs, const State *state, const View *view,
              Grants *grants);

#endif
