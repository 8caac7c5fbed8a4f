/* Moves time from one decision to the next: ends, leases, protections, failures, arrivals. */
#include "engine.h"

size_t engine_bytes(int n, int classes, int owners)
{
    size_t wide = n > classes ? n : classes, quotas = owners ? (size_t)n * 2 * sizeof(int32_t) : 0;
    return quotas + 2 * sizeof(double) * (size_t)owners + 64 + 13 * sizeof(double) * (size_t)n + 4 * sizeof(double) * wide + 4 * sizeof(int32_t) * (size_t)n +
           sizeof(int32_t) * ((size_t)classes + wide) + sizeof(Queue) * (size_t)classes + 2 * (size_t)n + 512;
}

static char *take(char **block, size_t bytes)
{
    char *start = *block;
    *block += (bytes + 15) / 16 * 16;
    return start;
}

void engine_layout(Engine *e, char *block, int n, int classes, int owners)
{
    size_t wide = n > classes ? n : classes, d = sizeof(double) * (size_t)n;
    e->state.remaining = (double *)take(&block, d);
    e->state.grant = (double *)take(&block, d);
    e->state.floor = (double *)take(&block, d);
    e->state.contention0 = (double *)take(&block, d);
    e->state.events0 = (double *)take(&block, d);
    e->state.size = (double *)take(&block, d);
    e->rate = (double *)take(&block, d);
    e->stall = (double *)take(&block, d);
    e->since = (double *)take(&block, d);
    e->saved = (double *)take(&block, d);
    e->area0 = (double *)take(&block, d);
    e->submitted = (double *)take(&block, d);
    e->grants.amount = (double *)take(&block, sizeof(double) * wide);
    e->grants.share = (double *)take(&block, sizeof(double) * wide);
    e->grants.rank = (double *)take(&block, sizeof(double) * wide);
    e->grants.work = (double *)take(&block, sizeof(double) * wide);
    e->view.queue = (Queue *)take(&block, sizeof(Queue) * (size_t)classes);
    e->klass = (int32_t *)take(&block, sizeof(int32_t) * (size_t)n);
    e->run = (int32_t *)take(&block, sizeof(int32_t) * (size_t)n);
    e->grants.job = (int32_t *)take(&block, sizeof(int32_t) * (size_t)n);
    e->view.queue[0].items = (int32_t *)take(&block, sizeof(int32_t) * (size_t)n);
    e->grants.slot = (int32_t *)take(&block, sizeof(int32_t) * wide);
    e->view.busy = (int32_t *)take(&block, sizeof(int32_t) * (size_t)classes);
    if (owners) {
        e->gmax = (int32_t *)take(&block, sizeof(int32_t) * (size_t)n);
        e->owned = (int32_t *)take(&block, sizeof(int32_t) * (size_t)n);
        e->used = (double *)take(&block, sizeof(double) * (size_t)owners);
        e->left = (double *)take(&block, sizeof(double) * (size_t)owners);
    }
    e->state.flags = (uint8_t *)take(&block, (size_t)n);
    e->grants.done = (uint8_t *)take(&block, (size_t)n);
    e->grants.bar = 0;
}

int class_of(const Policy *policy, double size)
{
    int low = 0, high = policy->classes - 1;
    while (low < high) { /* first class with size <= threshold */
        int middle = (low + high) / 2;
        if (size <= policy->threshold[middle])
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* Is the queue kept in order of keys (and of index, where they are equal)? */
static int keyed(const Engine *e)
{
    int kind = e->policy.kind;
    return kind == SRSF || kind == AFS || by_service(&e->policy, &e->jobs);
}

static inline int precedes(const Engine *e, int j, double key, int other)
{
    double mine = order_key(&e->policy, &e->jobs, &e->state, j);
    return mine < key || (mine == key && j < other);
}

/* Running jobs' keys rose: they are taken out and put back, the least first. What they pass is
 * moved in blocks, and each is looked for from where the one before it went. */
static void restore_raised(Engine *e)
{
    Queue *queue = &e->view.queue[0];
    int32_t *items = queue->items + queue->head, *moved = e->grants.slot;
    double *key = e->grants.rank;
    int n = e->runs, end = 0;
    for (int i = 0; i < n; i++) {
        int j = e->run[i], k = i;
        double mine = order_key(&e->policy, &e->jobs, &e->state, j);
        for (; k > 0 && (key[k - 1] > mine || (key[k - 1] == mine && moved[k - 1] > j)); k--) {
            key[k] = key[k - 1];
            moved[k] = moved[k - 1];
        }
        key[k] = mine;
        moved[k] = j;
        e->grants.done[j] = 1;
    }
    for (int left = n; left > 0; end++)
        left -= e->grants.done[items[end]];
    for (int from = end - 1, to = end - 1; from >= 0; from--)
        if (!e->grants.done[items[from]])
            items[to--] = items[from];
    for (int i = 0, rest = n; i < n; i++) { /* items[i .. rest) is free, the others are behind it */
        int low = rest, high = rest, step = 1;
        while (high < queue->len && precedes(e, items[high], key[i], moved[i])) {
            low = high + 1;
            high += step;
            step *= 2;
        }
        high = high < queue->len ? high : queue->len;
        while (low < high) {
            int middle = (low + high) / 2;
            if (precedes(e, items[middle], key[i], moved[i]))
                low = middle + 1;
            else
                high = middle;
        }
        memmove(items + i + (rest - n), items + rest, sizeof(int32_t) * (size_t)(low - rest));
        items[i + low - n] = moved[i];
        e->grants.done[moved[i]] = 0;
        rest = low;
    }
}

/* Only running jobs' keys moved, and only down: an insertion sort of a nearly sorted queue. */
static void restore_order(Engine *e)
{
    if (e->policy.kind == MAXMIN) {
        restore_raised(e);
        return;
    }
    Queue *queue = &e->view.queue[0];
    int32_t *items = queue->items + queue->head;
    double *key = e->grants.rank;
    int last = e->runs; /* the running are at the front, except behind gangs that do not fit */
    if (e->jobs.gangs || e->policy.min_runtime_s > 0 || e->owner)
        last = queue->len;
    for (int i = 0; i < last && i < queue->len; i++) {
        int j = items[i], k = i;
        double mine = order_key(&e->policy, &e->jobs, &e->state, j);
        for (; k > 0 && key[k - 1] > mine; k--) {
            key[k] = key[k - 1];
            items[k] = items[k - 1];
        }
        key[k] = mine;
        items[k] = j;
    }
}

static void enqueue(Engine *e, int j)
{
    int class = e->klass[j];
    Queue *queue = &e->view.queue[class];
    if (queue->len == 0) {
        int at = e->view.n_busy++;
        for (; at > 0 && e->view.busy[at - 1] > class; at--)
            e->view.busy[at] = e->view.busy[at - 1];
        e->view.busy[at] = class;
    }
    int at = queue->len++;
    int32_t *items = queue->items + queue->head;
    if (keyed(e) && !e->loading) {
        queue->len--;
        restore_order(e);
        queue->len++;
        double key = order_key(&e->policy, &e->jobs, &e->state, j);
        int low = 0, high = at;
        while (low < high) {
            int middle = (low + high) / 2;
            if (precedes(e, items[middle], key, j))
                low = middle + 1;
            else
                high = middle;
        }
        memmove(items + low + 1, items + low, sizeof(int32_t) * (size_t)(at - low));
        at = low;
    } else {
        for (; at > 0 && items[at - 1] > j; at--) /* was held: back to its place in arrival order */
            items[at] = items[at - 1];
    }
    items[at] = j;
    queue->demand += e->jobs.gmax[j];
    e->view.active++;
}

/* The queue in order of its keys, equal ones by index: a merge sort, for load() appends only. */
void engine_sort(Engine *e)
{
    e->loading = 0;
    if (!keyed(e))
        return;
    Queue *queue = &e->view.queue[0];
    int32_t *from = queue->items + queue->head, *to = e->grants.slot, *swap;
    double *key = e->grants.rank;
    int n = queue->len;
    for (int i = 0; i < n; i++)
        key[from[i]] = order_key(&e->policy, &e->jobs, &e->state, from[i]);
    for (int width = 1; width < n; width *= 2) {
        for (int start = 0; start < n; start += 2 * width) {
            int a = start, middle = start + width < n ? start + width : n;
            int b = middle, end = start + 2 * width < n ? start + 2 * width : n;
            for (int i = start; i < end; i++)
                to[i] = b >= end || (a < middle && (key[from[a]] < key[from[b]] || (key[from[a]] == key[from[b]] && from[a] < from[b]))) ? from[a++] : from[b++];
        }
        swap = from, from = to, to = swap;
    }
    if (from != queue->items + queue->head)
        memcpy(queue->items + queue->head, from, sizeof(int32_t) * (size_t)n);
}

static void dequeue(Engine *e, int j)
{
    int class = e->klass[j], at = 0;
    Queue *queue = &e->view.queue[class];
    int32_t *items = queue->items + queue->head;
    while (items[at] != j) /* it was running, so it is near the front */
        at++;
    memmove(items + 1, items, sizeof(int32_t) * (size_t)at);
    queue->head++;
    queue->len--;
    queue->demand -= e->jobs.gmax[j];
    e->view.active--;
    if (queue->len == 0) {
        int b = 0;
        while (e->view.busy[b] != class)
            b++;
        e->view.n_busy--;
        memmove(e->view.busy + b, e->view.busy + b + 1, sizeof(int32_t) * (size_t)(e->view.n_busy - b));
    }
}

static int owner_of(const Engine *e, int j) { return e->owner ? e->owner[j] : -1; }

/* A job becomes active, or is held until its owner's quota has room for its smallest grant. */
void engine_admit(Engine *e, int j)
{
    int o = owner_of(e, j);
    if (o >= 0) {
        int need = least(&e->jobs, j), at = e->n_owned;
        if (e->used[o] + need > e->quota[o] + NEAR) {
            e->state.flags[j] |= HELD;
            e->held++;
            return;
        }
        e->used[o] += need;
        for (; at > 0 && e->owned[at - 1] > j; at--)
            e->owned[at] = e->owned[at - 1];
        e->owned[at] = j;
        e->n_owned++;
    }
    e->state.flags[j] |= ACTIVE;
    enqueue(e, j);
}

/* An ended job makes room in its owner's quota: for the oldest that fit. */
static void make_room(Engine *e, int j)
{
    int o = owner_of(e, j), at = 0;
    if (o < 0)
        return;
    e->used[o] -= least(&e->jobs, j);
    while (e->owned[at] != j)
        at++;
    e->n_owned--;
    memmove(e->owned + at, e->owned + at + 1, sizeof(int32_t) * (size_t)(e->n_owned - at));
    for (int k = 0; k < e->next && e->held > 0; k++)
        if ((e->state.flags[k] & HELD) && e->owner[k] == o) {
            e->state.flags[k] &= ~HELD;
            e->held--;
            engine_admit(e, k);
        }
}

/* Largest grants that keep each owner within its quota: what the smallest ones leave, oldest first. */
static void cap_owners(Engine *e)
{
    for (int o = 0; o < e->owners; o++)
        e->left[o] = e->quota[o] - e->used[o];
    for (int i = 0; i < e->n_owned; i++) {
        int j = e->owned[i], o = e->owner[j], low = least(&e->jobs, j), more = e->most[j] - low;
        if (more > e->left[o] + NEAR)
            more = e->left[o] > 0 ? (int)(e->left[o] + NEAR) : 0;
        e->left[o] -= more;
        e->view.queue[e->klass[j]].demand += low + more - e->gmax[j];
        e->gmax[j] = low + more;
    }
}

static int protected_now(const Engine *e, int j)
{
    return e->policy.min_runtime_s > 0 && e->state.grant[j] > 0 &&
           e->state.now < e->since[j] + e->policy.min_runtime_s;
}

void engine_decide(Engine *e)
{
    State *state = &e->state;
    Grants *grants = &e->grants;
    e->decisions++;
    if (e->owner)
        cap_owners(e);
    if (keyed(e))
        restore_order(e);
    if (e->policy.min_runtime_s > 0)
        for (int i = 0; i < e->runs; i++) {
            int j = e->run[i], need = least(&e->jobs, j);
            double keep = state->grant[j] < need ? state->grant[j] : need;
            state->floor[j] = protected_now(e, j) ? keep : 0;
        }
    allocate(&e->policy, &e->jobs, state, &e->view, grants);
    for (int i = 0; i < grants->count; i++)
        grants->done[grants->job[i]] = 1;
    for (int i = 0; i < e->runs; i++) {
        int j = e->run[i];
        state->floor[j] = 0;
        if (!grants->done[j] && (state->flags[j] & ACTIVE)) {
            state->grant[j] = 0;
            state->flags[j] |= PREEMPTED;
            if (e->preemptions)
                e->preemptions[j]++;
        }
    }
    for (int i = 0; i < grants->count; i++) {
        int j = grants->job[i];
        double amount = grants->amount[i];
        grants->done[j] = 0;
        e->run[i] = j;
        if (amount == state->grant[j])
            continue;
        if (state->grant[j] == 0) {
            e->stall[j] = e->policy.start_s + (state->flags[j] & PREEMPTED ? e->policy.preempt_s : 0);
            e->since[j] = state->now;
            if (e->start && !(state->flags[j] & STARTED))
                e->start[j] = state->now;
            state->flags[j] = (state->flags[j] | STARTED) & ~PREEMPTED;
        } else {
            if (e->policy.resize_s > e->stall[j])
                e->stall[j] = e->policy.resize_s;
            if (e->resizes)
                e->resizes[j]++;
        }
        e->saved[j] = state->now;
        state->grant[j] = amount;
        e->rate[j] = speed_at(&e->jobs, j, amount);
    }
    e->runs = grants->count;
}

static void advance(Engine *e, double to)
{
    State *state = &e->state;
    double passed = to - state->now;
    for (int i = 0; i < e->runs; i++) {
        int j = e->run[i];
        double useful = passed;
        if (e->stall[j] > 0) {
            double wait = e->stall[j] < useful ? e->stall[j] : useful;
            e->stall[j] -= wait;
            useful -= wait;
        }
        state->remaining[j] -= e->rate[j] * useful;
    }
    e->area += e->view.active * passed;
    state->seen += e->view.active;
    state->events += 1;
    state->now = to;
}

static void end_job(Engine *e, int at)
{
    State *state = &e->state;
    int j = e->run[at];
    state->remaining[j] = 0;
    dequeue(e, j);
    state->flags[j] &= ~ACTIVE;
    state->grant[j] = 0;
    memmove(e->run + at, e->run + at + 1, sizeof(int32_t) * (size_t)(e->runs - at - 1));
    e->runs--;
    if (e->finish)
        e->finish[j] = state->now;
    if (e->fair) { /* section 3.2.2: finish time at a fair share of the GPUs */
        double lived = state->now - e->submitted[j], share;
        if (e->policy.artifact) {
            share = state->capacity / mean_contention(state, j);
            e->fair[j] = state->size[j] / (share < e->jobs.gmax[j] ? share : e->jobs.gmax[j]);
        } else {
            double seen = lived > 0 ? (e->area - e->area0[j]) / lived : e->view.active + 1;
            share = state->capacity / (seen < 1 ? 1 : seen);
            e->fair[j] = state->size[j] / speed_at(&e->jobs, j, share);
        }
    }
    make_room(e, j);
}

static double draw(Engine *e) /* in [0, 1): splitmix64 */
{
    uint64_t z = (e->seed += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return (double)((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

/* GPUs vanish (with the progress since the last checkpoint of jobs on them) or come back. */
static void change_capacity(Engine *e, double change)
{
    State *state = &e->state;
    double lost = -change, before = state->capacity;
    state->capacity += change;
    while (lost > NEAR && before > NEAR) { /* the GPUs that fail, one by one, idle ones among them */
        double pick = draw(e) * before;
        int hit = -1;
        for (int i = 0; i < e->runs && hit < 0; i++) {
            pick -= state->grant[e->run[i]];
            if (pick < 0)
                hit = i;
        }
        before -= 1;
        lost -= 1;
        if (hit < 0)
            continue;
        int j = e->run[hit];
        double ran = state->now - e->saved[j] - e->stall[j], step = e->policy.checkpoint_s;
        if (step > 0 && ran > 0)
            ran = fmod(ran, step);
        if (ran > 0)
            state->remaining[j] += e->rate[j] * ran;
        if (state->remaining[j] > e->jobs.work[j])
            state->remaining[j] = e->jobs.work[j];
        lost -= state->grant[j] - 1;
        before -= state->grant[j] - 1;
        state->grant[j] = 0;
        state->flags[j] |= PREEMPTED;
        memmove(e->run + hit, e->run + hit + 1, sizeof(int32_t) * (size_t)(e->runs - hit - 1));
        e->runs--;
        if (e->preemptions)
            e->preemptions[j]++;
        if (keyed(e)) { /* its key rose: back to where it belongs */
            dequeue(e, j);
            Queue *queue = &e->view.queue[0];
            if (queue->head > 0) { /* room for the insertion at the end */
                queue->head--;
                memmove(queue->items + queue->head, queue->items + queue->head + 1,
                        sizeof(int32_t) * (size_t)queue->len);
            }
            enqueue(e, j);
        }
    }
}

/* In a play-out leases grow with the distance from the present: weeks of ten-minute leases take
 * hundreds of milliseconds, and nobody is told an end weeks ahead to the minute. */
static double next_lease(const Engine *e)
{
    double grown = e->lease_growth * (e->state.now - e->begin);
    return e->state.now + (grown > e->policy.lease_s ? grown : e->policy.lease_s);
}

/* Runs until nothing is left, or the target ended. Returns 0, or -1 if jobs wait for ever. */
int engine_run(Engine *e, Engine *mirror, const uint8_t *predict, double *predicted)
{
    State *state = &e->state;
    const Jobs *jobs = &e->jobs;
    while (e->view.active > 0 || e->next < jobs->n) {
        double when = INFINITY;
        int kind = 0, ending = -1;
        for (int i = 0; i < e->runs; i++) {
            int j = e->run[i];
            double end = state->now + e->stall[j] +
                         (state->remaining[j] > 0 ? state->remaining[j] / e->rate[j] : 0);
            if (end < when) {
                when = end;
                ending = i;
                kind = 1;
            }
        }
        if (e->policy.lease_s > 0 && e->view.active > 0 && e->lease_at < when) {
            when = e->lease_at;
            kind = 2;
        }
        if (e->policy.min_runtime_s > 0 && e->view.active > e->runs)
            for (int i = 0; i < e->runs; i++) {
                double over = e->since[e->run[i]] + e->policy.min_runtime_s;
                if (over > state->now && over < when) {
                    when = over;
                    kind = 2;
                }
            }
        if (e->next_failure < e->failures && e->failure[2 * e->next_failure] < when) {
            when = e->failure[2 * e->next_failure];
            kind = 3;
        }
        if (e->next < jobs->n && jobs->submit[e->next] < when) {
            when = jobs->submit[e->next];
            kind = 4;
        }
        if (kind == 0 || (kind == 2 && e->runs == 0 && e->next == jobs->n && e->next_failure == e->failures))
            return -1;
        advance(e, when > state->now ? when : state->now);
        int arrived = -1;
        if (kind == 1) {
            int j = e->run[ending];
            end_job(e, ending);
            if (j == e->target)
                return 0;
        } else if (kind == 3) {
            change_capacity(e, e->failure[2 * e->next_failure++ + 1]);
        } else if (kind == 4) {
            arrived = e->next++;
            state->contention0[arrived] = e->view.active + 1 - state->seen;
            state->events0[arrived] = 1 - state->events;
            e->area0[arrived] = e->area;
            e->submitted[arrived] = state->now;
            engine_admit(e, arrived);
        }
        e->lease_at = next_lease(e);
        engine_decide(e);
        if (arrived >= 0 && predict && predict[arrived])
            predicted[arrived] = engine_play_out(e, mirror, arrived);
        if (arrived >= 0 && e->review_every > 0 && (arrived + 1) % e->review_every == 0) {
            mirror->finish = e->reviews + (size_t)((arrived + 1) / e->review_every - 1) * jobs->n;
            engine_play_out(e, mirror, -1);
            mirror->finish = NULL;
        }
    }
    return e->held > 0 ? -1 : 0;
}

/* When the target would end if nothing else arrived: the same engine on a copy of the state. */
double engine_play_out(const Engine *e, Engine *m, int target)
{
    const State *from = &e->state;
    State *to = &m->state;
    to->now = from->now;
    to->capacity = from->capacity;
    to->seen = from->seen;
    to->events = from->events;
    to->true_sizes = 1;
    m->area = 0;
    m->next = m->jobs.n;
    m->target = target;
    m->failures = 0; /* nobody announces the next failure */
    m->view.n_busy = e->view.n_busy;
    m->view.active = e->view.active;
    memcpy(m->view.busy, e->view.busy, sizeof(int32_t) * (size_t)e->view.n_busy);
    for (int b = 0; b < e->view.n_busy; b++) {
        const Queue *queue = &e->view.queue[e->view.busy[b]];
        Queue *copy = &m->view.queue[e->view.busy[b]];
        copy->head = queue->head;
        copy->len = queue->len;
        copy->demand = queue->demand;
        memcpy(copy->items + queue->head, queue->items + queue->head, sizeof(int32_t) * (size_t)queue->len);
        for (int i = queue->head; i < queue->head + queue->len; i++) {
            int j = queue->items[i];
            to->remaining[j] = estimated(&e->jobs, from, j);
            to->size[j] = e->policy.artifact ? to->remaining[j] : from->size[j];
            to->grant[j] = from->grant[j];
            to->flags[j] = from->flags[j];
            to->floor[j] = 0;
            to->contention0[j] = from->contention0[j];
            to->events0[j] = from->events0[j];
            m->klass[j] = e->klass[j];
            m->rate[j] = e->rate[j];
            m->stall[j] = e->stall[j];
            m->since[j] = e->since[j];
            m->saved[j] = e->saved[j];
        }
    }
    m->runs = e->runs;
    memcpy(m->run, e->run, sizeof(int32_t) * (size_t)e->runs);
    if (by_service(&m->policy, &m->jobs)) /* of sizes as they are estimated: another order */
        engine_sort(m);
    m->lease_at = e->policy.artifact ? INFINITY : e->lease_at;
    m->lease_growth = e->policy.artifact ? 0 : PLAY_OUT_GROWTH;
    m->begin = from->now;
    return engine_run(m, NULL, NULL, NULL) == 0 ? to->now : INFINITY;
}
