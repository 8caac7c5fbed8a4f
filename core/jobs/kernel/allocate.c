/* Who gets how many GPUs: every policy, over the same view. Pure. */
#include "kernel.h"

/* Position of a job in the policies that order by size; smaller goes first. */
double order_key(const Policy *policy, const Jobs *jobs, const State *state, int j)
{
    if (policy->kind == MAXMIN) /* service attained */
        return state->size[j] - state->remaining[j];
    double left = estimated(jobs, state, j);
    if (policy->kind == SRSF) /* remaining service in GPU seconds at the largest grant */
        return jobs->gmax[j] * left / speed_at(jobs, j, jobs->gmax[j]);
    return left / speed_at(jobs, j, least(jobs, j)); /* AFS: remaining time at its first grant */
}

static void give(Grants *grants, int j, double amount)
{
    grants->job[grants->count] = j;
    grants->amount[grants->count++] = amount;
}

/* Positions by (key, position), the least first: for decisions that take few of many. */
typedef struct {
    double *key;
    int32_t *at;
    int len;
} Heap;

static inline int precedes(double key, int at, double other_key, int other_at)
{
    return key < other_key || (key == other_key && at < other_at);
}

static void sift(Heap *heap, int hole)
{
    double key = heap->key[hole];
    int32_t at = heap->at[hole];
    for (int child = 2 * hole + 1; child < heap->len; child = 2 * hole + 1) {
        if (child + 1 < heap->len &&
            precedes(heap->key[child + 1], heap->at[child + 1], heap->key[child], heap->at[child]))
            child++;
        if (!precedes(heap->key[child], heap->at[child], key, at))
            break;
        heap->key[hole] = heap->key[child];
        heap->at[hole] = heap->at[child];
        hole = child;
    }
    heap->key[hole] = key;
    heap->at[hole] = at;
}

/* In the allocator's scratch: of the positions in slot by their keys in rank. */
static Heap heaped(Grants *grants, int len)
{
    Heap heap = {grants->rank, grants->slot, len};
    for (int i = len / 2 - 1; i >= 0; i--)
        sift(&heap, i);
    return heap;
}

static int popped(Heap *heap)
{
    int first = heap->at[0];
    heap->len--;
    heap->key[0] = heap->key[heap->len];
    heap->at[0] = heap->at[heap->len];
    sift(heap, 0);
    return first;
}

/* In queue order, each up to its largest useful grant: FIFO and SRSF. Returns what is left. */
static double walk(const Jobs *jobs, const Queue *queue, double left, Grants *grants)
{
    for (int i = 0; i < queue->len && left > NEAR; i++) {
        int j = queue->items[queue->head + i];
        double amount = left < jobs->gmax[j] ? left : jobs->gmax[j];
        if (amount < jobs->gmin[j] - NEAR)
            continue; /* cannot start on so few: those behind it may */
        give(grants, j, amount);
        left -= amount;
    }
    return left;
}

/* What gangs left over: raise the granted, then start what still fits, in queue order. */
static void spill(const Jobs *jobs, const View *view, double left, Grants *grants)
{
    if (!jobs->gangs || left <= NEAR)
        return;
    for (int i = 0; i < grants->count && left > NEAR; i++) {
        double more = jobs->gmax[grants->job[i]] - grants->amount[i];
        more = more < left ? more : left;
        if (grants->amount[i] > 0 && more > 0) {
            grants->amount[i] += more;
            left -= more;
        }
    }
    for (int i = 0; i < grants->count; i++)
        grants->done[grants->job[i]] = 1;
    int granted = grants->count;
    for (int b = 0; b < view->n_busy && left > NEAR; b++) {
        const Queue *queue = &view->queue[view->busy[b]];
        for (int i = 0; i < queue->len && left > NEAR; i++) {
            int j = queue->items[queue->head + i];
            double amount = left < jobs->gmax[j] ? left : jobs->gmax[j];
            if (grants->done[j] || amount < jobs->gmin[j] - NEAR)
                continue;
            give(grants, j, amount);
            left -= amount;
        }
    }
    for (int i = 0; i < granted; i++)
        grants->done[grants->job[i]] = 0;
}

/* Largest GPUs with efficiency >= zeta, relative to the job's smallest grant (section 3.3.3). */
static int cap_at(const Jobs *jobs, int j, double zeta)
{
    const double *row = jobs->efficiency + (size_t)jobs->table[j] * jobs->width;
    int low = least(jobs, j), high = jobs->gmax[j];
    double bar = zeta * row[low];
    if (row[high] >= bar)
        return high;
    while (high - low > 1) { /* row falls: row[low] >= bar > row[high] */
        int middle = (low + high) / 2;
        if (row[middle] >= bar)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* One class in arrival order, caps relaxed by delta until its share is used. Returns the rest. */
static double fill_class(const Policy *policy, const Jobs *jobs, const Queue *queue, double share,
                         Grants *grants)
{
    if (share >= queue->demand - NEAR || policy->zeta <= 0)
        return walk(jobs, queue, share, grants);
    int first = grants->count;
    double left = share;
    for (double pass = 0;;) {
        double zeta = policy->zeta - pass * policy->delta, next = -INFINITY;
        grants->count = first;
        left = share;
        for (int i = 0; i < queue->len && left > NEAR; i++) {
            int j = queue->items[queue->head + i], cap = cap_at(jobs, j, zeta);
            double amount = left < cap ? left : cap;
            if (cap < jobs->gmax[j]) {
                const double *row = jobs->efficiency + (size_t)jobs->table[j] * jobs->width;
                double rise = row[cap + 1] / row[least(jobs, j)];
                next = rise > next ? rise : next;
            }
            if (amount < jobs->gmin[j] - NEAR)
                continue;
            give(grants, j, amount);
            left -= amount;
        }
        if (left <= NEAR || next == -INFINITY)
            return left;
        double steps = ceil((zeta - next) / policy->delta - NEAR); /* passes that change nothing */
        pass += steps > 1 ? steps : 1;
    }
}

/* Weighted max-min shares of the busy classes, none above its demand. */
static void share_out(const Policy *policy, const View *view, double capacity, double *share)
{
    double left = capacity;
    for (int b = 0; b < view->n_busy; b++)
        share[b] = -1.0;
    for (int closed = 1; closed;) {
        double total = 0;
        for (int b = 0; b < view->n_busy; b++)
            if (share[b] < 0)
                total += policy->weight[view->busy[b]];
        closed = 0;
        double level = total > 0 ? left / total : 0, spent = 0;
        for (int b = 0; b < view->n_busy; b++) {
            double demand = view->queue[view->busy[b]].demand;
            if (share[b] < 0 && demand <= level * policy->weight[view->busy[b]]) {
                share[b] = demand;
                spent += demand;
                closed = 1;
            }
        }
        left -= spent;
        if (!closed)
            for (int b = 0; b < view->n_busy; b++)
                if (share[b] < 0)
                    share[b] = level * policy->weight[view->busy[b]];
    }
}

static inline int head_of(const View *view, int b) /* oldest job of the b-th busy class */
{
    const Queue *queue = &view->queue[view->busy[b]];
    return queue->items[queue->head];
}

/* Whole GPUs by largest remainder. Every busy class first gets what its oldest job needs to run,
 * oldest head first: without it a small weight rounds to nothing and preemption is unbounded. */
static void round_shares(const Jobs *jobs, const View *view, double capacity, Grants *grants)
{
    double *share = grants->share, *fraction = grants->rank, left = capacity, missing = 0;
    int n = view->n_busy, whole = 1;
    double demand = 0, sum = 0;
    for (int b = 0; b < n; b++) {
        demand += view->queue[view->busy[b]].demand;
        whole &= share[b] == floor(share[b]);
        whole &= share[b] >= least(jobs, head_of(view, b));
    }
    if (whole)
        return;
    left = left < demand ? left : demand;
    for (int b = 0; b < n; b++) {
        grants->slot[b] = b;
        fraction[b] = jobs->submit[head_of(view, b)];
    }
    Heap heap = heaped(grants, n);
    while (heap.len > 0 && left >= 1 - NEAR) {
        int head = head_of(view, popped(&heap)), need = least(jobs, head);
        if (need > left + NEAR)
            continue;
        grants->done[head] = 1;
        left -= need;
    }
    for (int b = 0; b < n; b++) {
        int head = head_of(view, b);
        double given = grants->done[head] ? least(jobs, head) : 0;
        grants->done[head] = 0;
        fraction[b] = share[b] > given ? share[b] - given : 0;
        missing += fraction[b];
        share[b] = given;
    }
    double scale = missing > 0 ? left / missing : 0;
    for (int b = 0; b < n; b++) {
        double part = fraction[b] * scale, base = floor(part + NEAR);
        share[b] += base;
        fraction[b] = part - base;
        sum += base;
    }
    for (double rest = floor(left - sum + .5); rest > 0; rest--) {
        int best = 0;
        for (int b = 1; b < n; b++)
            if (fraction[b] > fraction[best] + NEAR)
                best = b;
        if (fraction[best] <= NEAR)
            break;
        share[best] += 1;
        fraction[best] = 0;
    }
}

static void allocate_wfq(const Policy *policy, const Jobs *jobs, const State *state,
                         const View *view, Grants *grants)
{
    double left = 0, total = 0;
    share_out(policy, view, state->capacity, grants->share);
    if (policy->integral)
        round_shares(jobs, view, state->capacity, grants);
    for (int b = 0; b < view->n_busy; b++) {
        total += grants->share[b];
        left += fill_class(policy, jobs, &view->queue[view->busy[b]], grants->share[b], grants);
    }
    if (policy->integral && state->capacity - total > .5)
        left += state->capacity - total; /* nothing but gangs that did not fit their share */
    spill(jobs, view, left, grants);
}

static void progress_rates(const Jobs *jobs, const State *state, const Grants *grants, int i,
                           double *now, double *then)
{
    int j = grants->job[i];
    double work = estimated(jobs, state, j), gpus = grants->amount[i];
    now[i] = 1 / (work / speed_at(jobs, j, gpus) + 1e-7);
    then[i] = 1 / (work / speed_at(jobs, j, gpus + 1) + 1e-7);
}

/* AFS-L (Hwang et al., NSDI 2021): GPU by GPU to the winner of a tournament. A job without a GPU
 * beats one with, and among those the shorter wins, so that the first GPUs go in key order. */
static void allocate_afs(const Jobs *jobs, const State *state, const View *view, Grants *grants)
{
    const Queue *queue = &view->queue[0];
    double left = state->capacity;
    if (queue->demand <= left) {
        walk(jobs, queue, left, grants);
        return;
    }
    for (int i = 0; i < queue->len && left > NEAR; i++) {
        int j = queue->items[queue->head + i], need = least(jobs, j);
        if (need > left + NEAR)
            continue;
        give(grants, j, need);
        left -= need;
    }
    if (left <= NEAR)
        return;
    int n = grants->count; /* back to arrival order, the order of the tournament */
    for (int i = 1; i < n; i++) {
        int j = grants->job[i], k = i;
        double amount = grants->amount[i];
        for (; k > 0 && grants->job[k - 1] > j; k--) {
            grants->job[k] = grants->job[k - 1];
            grants->amount[k] = grants->amount[k - 1];
        }
        grants->job[k] = j;
        grants->amount[k] = amount;
    }
    double *now = grants->share, *then = grants->rank; /* 1 / time left as it is, with one more */
    for (int i = 0; i < n; i++)
        progress_rates(jobs, state, grants, i, now, then);
    for (; left > NEAR; left -= 1.0) {
        int best = -1;
        for (int i = 0; i < n; i++) {
            if (grants->amount[i] >= jobs->gmax[grants->job[i]])
                continue;
            if (best < 0) {
                best = i;
                continue;
            }
            int shorter = now[i] > now[best]; /* this one has less time left than the champion */
            int low = shorter ? i : best, high = shorter ? best : i;
            int low_wins = (then[low] - now[low]) / now[low] > (then[high] - now[high]) / then[high];
            if (low_wins == shorter)
                best = i;
        }
        if (best < 0)
            break;
        grants->amount[best] += left < 1.0 ? left : 1.0;
        progress_rates(jobs, state, grants, best, now, then);
    }
    spill(jobs, view, left > 0 ? left : 0, grants);
}

/* Themis (Mahajan et al., NSDI 2020) as the chapter runs it: whoever is furthest behind its fair
 * finish time takes what it can use, then the next. */
static inline double inverse(int gpus) /* divisions are most of what Themis takes */
{
    static const double known[] = {INFINITY, 1, 1. / 2, 1. / 3, 1. / 4, 1. / 5, 1. / 6, 1. / 7, 1. / 8};
    return gpus <= 8 ? known[gpus] : 1 / (double)gpus;
}

/* The largest wait + work * one, in lanes the compiler makes vectors of. */
static double largest_ratio(const double *wait, const double *work, double one, int n)
{
    double lane[8], most = -INFINITY;
    int i = 0;
    for (int k = 0; k < 8; k++)
        lane[k] = -INFINITY;
    for (; i + 8 <= n; i += 8)
        for (int k = 0; k < 8; k++) {
            double ratio = wait[i + k] + work[i + k] * one;
            lane[k] = ratio > lane[k] ? ratio : lane[k];
        }
    for (; i < n; i++) {
        double ratio = wait[i] + work[i] * one;
        most = ratio > most ? ratio : most;
    }
    for (int k = 0; k < 8; k++)
        most = lane[k] > most ? lane[k] : most;
    return most;
}

/* Its ratio on some GPUs is (wait + work / GPUs) over the finish time at a fair share. What a job
 * could use only while enough is left changes with that: the others wait in a heap, those are
 * looked at anew after every grant (and the others with them, by less than their ratio). */
static void allocate_themis(const Jobs *jobs, const State *state, const View *view, Grants *grants)
{
    const Queue *queue = &view->queue[0];
    const int32_t *items = queue->items + queue->head;
    double left = state->capacity, *wait = grants->share, *work = grants->work;
    double bar = grants->bar; /* near the least that was served last time: few are above it */
    int widest = 0, narrow = 0, n = queue->len;
    for (int i = 0; i < n; i++) {
        int j = items[i], most = jobs->gmax[j];
        double share = state->capacity * (state->events0[j] + state->events);
        double crowd = state->contention0[j] + state->seen; /* a fair share: share / crowd GPUs */
        double rate = share < most * crowd ? share / (crowd * state->size[j]) : most / state->size[j];
        wait[i] = (state->now - jobs->submit[j]) * rate;
        work[i] = state->remaining[j] * rate;
        double ratio = wait[i] + work[i] * inverse(most);
        widest = most > widest ? most : widest;
        if (most <= left && ratio >= bar) {
            grants->slot[narrow] = i;
            grants->rank[narrow++] = -ratio;
        }
    }
    Heap heap = heaped(grants, narrow);
    grants->bar = INFINITY;
    while (left > NEAR) {
        while (heap.len > 0 && jobs->gmax[items[heap.at[0]]] > left)
            popped(&heap);
        if (heap.len == 0 && bar > -INFINITY) { /* the bar was too high: all that are left */
            for (int i = narrow = 0; i < n; i++) {
                int most = jobs->gmax[items[i]];
                if (most > left || wait[i] == -INFINITY)
                    continue;
                grants->slot[narrow] = i;
                grants->rank[narrow++] = -(wait[i] + work[i] * inverse(most));
            }
            heap = heaped(grants, narrow);
            bar = -INFINITY;
        }
        int best = heap.len > 0 ? heap.at[0] : n;
        double ratio = heap.len > 0 ? -heap.key[0] : -INFINITY, one = 1 / left;
        if (widest > left) {
            double most = largest_ratio(wait, work, one, n);
            if (most >= ratio && most > -INFINITY) {
                int i = 0;
                while (wait[i] + work[i] * one != most)
                    i++;
                best = most > ratio || i < best ? i : best;
                ratio = most;
            }
        }
        if (best == n || ratio == -INFINITY)
            break;
        int j = items[best];
        double amount = left < jobs->gmax[j] ? left : jobs->gmax[j];
        wait[best] = -INFINITY;
        work[best] = 0;
        if (heap.len > 0 && best == heap.at[0]) {
            grants->bar = .98 * ratio;
            popped(&heap);
        }
        if (amount < jobs->gmin[j] - NEAR)
            continue;
        give(grants, j, amount);
        left -= amount;
    }
    spill(jobs, view, left, grants);
}

/* Max-min fair GPUs. Whole GPUs: those served least so far are admitted first, each with what it
 * needs to run, then all admitted rise one GPU at a time. */
static void allocate_maxmin(const Policy *policy, const Jobs *jobs, const State *state,
                            const View *view, Grants *grants)
{
    const Queue *queue = &view->queue[0];
    const int32_t *items = queue->items + queue->head;
    double left = state->capacity;
    if (queue->demand <= left) {
        walk(jobs, queue, left, grants);
        return;
    }
    if (!by_service(policy, jobs)) {
        int open = queue->len;
        for (int i = 0; i < queue->len; i++)
            give(grants, items[i], -1.0);
        for (int closed = 1; closed;) {
            double level = open ? left / open : 0;
            closed = 0;
            for (int i = 0; i < grants->count; i++)
                if (grants->amount[i] < 0 && jobs->gmax[grants->job[i]] <= level) {
                    grants->amount[i] = jobs->gmax[grants->job[i]];
                    left -= grants->amount[i];
                    open--;
                    closed = 1;
                }
            if (!closed)
                for (int i = 0; i < grants->count; i++)
                    if (grants->amount[i] < 0)
                        grants->amount[i] = level;
        }
        return;
    }
    for (int i = 0; i < queue->len && left > NEAR; i++) { /* in order of attained service */
        int j = items[i], need = least(jobs, j);
        if (need > left + NEAR)
            continue;
        give(grants, j, need);
        left -= need;
    }
    for (int risen = 1; risen && left >= 1.0 - NEAR;) {
        double lowest = INFINITY;
        risen = 0;
        for (int i = 0; i < grants->count; i++)
            if (grants->amount[i] < jobs->gmax[grants->job[i]] && grants->amount[i] < lowest)
                lowest = grants->amount[i];
        for (int i = 0; i < grants->count && left >= 1.0 - NEAR; i++)
            if (grants->amount[i] == lowest && lowest < jobs->gmax[grants->job[i]]) {
                grants->amount[i] += 1.0;
                left -= 1.0;
                risen = 1;
            }
    }
}

static double kept_in(const Jobs *jobs, const State *state, int j, int round)
{
    if (round == 2) /* GPUs were lost: even the protected give */
        return 0;
    return state->floor[j] > 0 ? state->floor[j] : round ? 0 : jobs->gmin[j];
}

/* Jobs inside their minimum runtime keep what they need; the youngest others give it up, first
 * what is above their own minimum, then all. floor: (n,), 0 where unprotected. */
static void protect(const Jobs *jobs, const State *state, const View *view, Grants *grants)
{
    double short_of = 0, total = 0;
    int unplaced = 0;
    for (int i = 0; i < grants->count; i++) {
        grants->done[grants->job[i]] = 1;
        total += grants->amount[i];
    }
    int before = grants->count;
    for (int b = 0; b < view->n_busy; b++)
        for (int i = 0; i < view->queue[view->busy[b]].len; i++) {
            int j = view->queue[view->busy[b]].items[view->queue[view->busy[b]].head + i];
            if (state->floor[j] > 0 && !grants->done[j]) {
                give(grants, j, 0.0);
                unplaced = 1;
            }
        }
    for (int i = 0; i < before; i++)
        grants->done[grants->job[i]] = 0;
    for (int i = 0; i < grants->count; i++) {
        double floor_gpus = state->floor[grants->job[i]];
        if (grants->amount[i] < floor_gpus) {
            short_of += floor_gpus - grants->amount[i];
            grants->amount[i] = floor_gpus;
            unplaced = 1;
        }
    }
    if (!unplaced)
        return;
    short_of -= state->capacity - total; /* idle GPUs first */
    for (int round = 0; round < 3 && short_of > NEAR; round++)
        while (short_of > NEAR) {
            int victim = -1;
            for (int i = 0; i < grants->count; i++) {
                int j = grants->job[i];
                double keep = kept_in(jobs, state, j, round);
                if (grants->amount[i] > keep + NEAR && (victim < 0 || j > grants->job[victim]))
                    victim = i;
            }
            if (victim < 0)
                break;
            int j = grants->job[victim];
            double keep = kept_in(jobs, state, j, round);
            double take = grants->amount[victim] - keep;
            if (take > short_of && !(round && grants->amount[victim] - short_of < jobs->gmin[j]))
                take = short_of;
            grants->amount[victim] -= take;
            short_of -= take;
        }
    int kept = 0;
    for (int i = 0; i < grants->count; i++)
        if (grants->amount[i] > NEAR) {
            grants->job[kept] = grants->job[i];
            grants->amount[kept++] = grants->amount[i];
        }
    grants->count = kept;
}

void allocate(const Policy *policy, const Jobs *jobs, const State *state, const View *view,
              Grants *grants)
{
    grants->count = 0;
    if (view->active == 0 || state->capacity <= NEAR)
        return;
    switch (policy->kind) {
    case FIFO:
    case SRSF:
        walk(jobs, &view->queue[0], state->capacity, grants);
        break;
    case THEMIS:
        allocate_themis(jobs, state, view, grants);
        break;
    case AFS:
        allocate_afs(jobs, state, view, grants);
        break;
    case MAXMIN:
        allocate_maxmin(policy, jobs, state, view, grants);
        break;
    default:
        allocate_wfq(policy, jobs, state, view, grants);
    }
    if (policy->min_runtime_s > 0)
        protect(jobs, state, view, grants);
}
