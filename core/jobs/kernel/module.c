/* The door to Python: buffers in, buffers out, the interpreter's lock released in between.
 * Stable ABI (3.11), buffer protocol only: no numpy header is needed to build it. */
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>

#include "engine.h"

enum {
    SUBMIT, WORK, ESTIMATE, GMIN, GMAX, TABLE, SPEED, EFFICIENCY, THRESHOLD, WEIGHT,
    IS_ACTIVE, REMAINING, GRANT, STALL, SINCE, CONTENTION, EVENTS, STARTED_BEFORE, FAILURE, PREDICT,
    OUT_FINISH, OUT_START, OUT_FAIR, OUT_PREDICTED, OUT_RESIZES, OUT_PREEMPTIONS, OUT_GRANTS, OUT_SUMMARY,
    OUT_REVIEWS, OWNER, QUOTA, ARRAYS
};
/* length of each: n jobs, t tables x width, c classes, x pairs, s 4, r rows of n, o n or none, q any */
static const char LENGTH[] = "nnnnnnttccnnnnnnnnxnnnnnnnnsroq";
static const char ITEM[] = "8888448888188888818188888888848"; /* bytes an item */
enum {
    KIND, INTEGRAL, ARTIFACT, ZETA, DELTA, LEASE, START_COST, RESIZE_COST, PREEMPT_COST, MIN_RUNTIME,
    CHECKPOINT, CAPACITY, NOW, SEED, TARGET, WIDTH, REVIEW_EVERY, LEASE_GROWTH, NUMBERS
};

static Py_ssize_t review_items(Py_ssize_t n, double every)
{
    return every >= 1 ? n / (Py_ssize_t)every * n : 0;
}

static const char *check(const Jobs *jobs, const Policy *policy, const Py_ssize_t *lengths)
{
    if (policy->kind < FIFO || policy->kind > WFQ || policy->classes < 1)
        return "an unknown policy, or one without classes";
    if (policy->kind == WFQ && policy->zeta > 0 && !(policy->delta > 0))
        return "delta must be > 0";
    if (jobs->width < 2 || lengths[SPEED] % jobs->width)
        return "speed must be (tables, width)";
    for (int j = 0; j < jobs->n; j++) {
        if (jobs->table[j] < 0 || jobs->table[j] >= jobs->tables)
            return "table index out of range";
        if (jobs->gmax[j] < 1 || jobs->gmax[j] >= jobs->width || !(jobs->gmin[j] <= jobs->gmax[j]))
            return "gmax out of its table, or below gmin";
        if (j && jobs->submit[j] < jobs->submit[j - 1])
            return "submit times must not run backwards";
        if (!(jobs->work[j] >= 0) || !(jobs->estimate[j] > 0))
            return "work must be >= 0 and estimate > 0";
    }
    return NULL;
}

static void set_up(Engine *e, char *block, const Policy *policy, const Jobs *jobs, int owners)
{
    int classes = policy->kind == WFQ ? policy->classes : 1, at = 0;
    memset(e, 0, sizeof *e);
    e->policy = *policy;
    e->policy.classes = classes;
    e->jobs = *jobs;
    e->target = -1;
    engine_layout(e, block, jobs->n, classes, owners);
    if (owners) {
        e->owners = owners;
        e->most = jobs->gmax;
        memcpy(e->gmax, jobs->gmax, sizeof(int32_t) * (size_t)jobs->n);
        memset(e->used, 0, sizeof(double) * (size_t)owners);
        e->jobs.gmax = e->gmax;
    }
    memset(e->state.flags, 0, (size_t)jobs->n);
    memset(e->grants.done, 0, (size_t)jobs->n);
    int32_t *items = e->view.queue[0].items, *count = e->grants.slot;
    for (int c = 0; c < classes; c++)
        count[c] = 0;
    for (int j = 0; j < jobs->n; j++) {
        e->klass[j] = classes > 1 ? class_of(policy, jobs->work[j] * jobs->estimate[j]) : 0;
        count[e->klass[j]]++;
        e->state.remaining[j] = e->state.size[j] = jobs->work[j];
        e->state.grant[j] = e->state.floor[j] = 0;
        e->rate[j] = e->stall[j] = e->since[j] = e->saved[j] = e->area0[j] = 0;
        e->submitted[j] = jobs->submit[j];
        e->state.contention0[j] = e->state.events0[j] = 1;
    }
    for (int c = 0; c < classes; c++) {
        e->view.queue[c] = (Queue){0, 0, items + at, 0};
        at += count[c];
    }
}

/* The jobs that are active from the start, in index order; the others arrive. */
static void load(Engine *e, void **a)
{
    const uint8_t *active = a[IS_ACTIVE], *started = a[STARTED_BEFORE];
    e->next = 0;
    e->loading = 1;
    for (int j = 0; j < e->jobs.n && active[j]; j++) {
        e->next = j + 1;
        e->state.remaining[j] = ((double *)a[REMAINING])[j];
        e->stall[j] = ((double *)a[STALL])[j];
        e->since[j] = e->saved[j] = ((double *)a[SINCE])[j];
        e->state.contention0[j] = ((double *)a[CONTENTION])[j];
        e->state.events0[j] = ((double *)a[EVENTS])[j];
        e->state.flags[j] = started[j] ? STARTED | PREEMPTED : 0;
    }
    for (int running = 1; running >= 0; running--) /* quotas hold the waiting for the running */
        for (int j = 0; j < e->next; j++)
            if ((((double *)a[GRANT])[j] > 0) == running)
                engine_admit(e, j);
    engine_sort(e);
    for (int j = 0; j < e->next; j++) {
        double grant = ((double *)a[GRANT])[j];
        if (grant > 0 && !(e->state.flags[j] & HELD)) {
            e->state.grant[j] = grant;
            e->state.flags[j] = ACTIVE | STARTED;
            e->rate[j] = speed_at(&e->jobs, j, grant);
            e->run[e->runs++] = j;
        }
    }
}

static int drive(int mode, const Policy *policy, const Jobs *jobs, void **a, const double *numbers,
                 int failures, int owners)
{
    int classes = policy->kind == WFQ ? policy->classes : 1, wants = 0, result = 0;
    const uint8_t *predict = a[PREDICT];
    for (int j = 0; j < jobs->n; j++)
        wants |= predict[j];
    wants |= numbers[REVIEW_EVERY] >= 1;
    if (owners && wants)
        return -3;
    size_t bytes = engine_bytes(jobs->n, classes, owners);
    char *block = malloc(bytes), *second = wants ? malloc(bytes) : NULL;
    if (!block || (wants && !second)) {
        free(block);
        free(second);
        return -2;
    }
    Engine engine, mirror;
    set_up(&engine, block, policy, jobs, owners);
    if (wants)
        set_up(&mirror, second, policy, jobs, 0);
    engine.owner = owners ? a[OWNER] : NULL;
    engine.quota = a[QUOTA];
    engine.state.capacity = numbers[CAPACITY];
    engine.state.now = numbers[NOW];
    engine.seed = (uint64_t)numbers[SEED];
    engine.target = (int)numbers[TARGET];
    engine.lease_at = numbers[NOW] + numbers[LEASE];
    engine.lease_growth = numbers[LEASE_GROWTH];
    engine.begin = numbers[NOW];
    engine.failure = a[FAILURE];
    engine.failures = failures;
    engine.finish = a[OUT_FINISH];
    engine.start = a[OUT_START];
    engine.fair = a[OUT_FAIR];
    engine.resizes = a[OUT_RESIZES];
    engine.preemptions = a[OUT_PREEMPTIONS];
    engine.review_every = (int)numbers[REVIEW_EVERY];
    engine.reviews = a[OUT_REVIEWS];
    load(&engine, a);
    if (mode == 0 || engine.view.active > 0)
        engine_decide(&engine);
    if (mode == 1)
        result = engine_run(&engine, &mirror, predict, a[OUT_PREDICTED]);
    double *grants = a[OUT_GRANTS], *summary = a[OUT_SUMMARY];
    for (int j = 0; j < jobs->n; j++)
        grants[j] = engine.state.grant[j];
    summary[0] = engine.state.now;
    summary[1] = (double)engine.decisions;
    summary[2] = engine.area;
    summary[3] = engine.view.active;
    free(block);
    free(second);
    return result;
}

static PyObject *run(PyObject *module, PyObject *args)
{
    int mode, result = 0;
    PyObject *numbers_in, *arrays_in;
    Py_buffer numbers_view, views[ARRAYS];
    void *a[ARRAYS];
    Py_ssize_t lengths[ARRAYS];
    int held = 0;
    const char *wrong = NULL;
    (void)module;
    if (!PyArg_ParseTuple(args, "iOO", &mode, &numbers_in, &arrays_in))
        return NULL;
    if (!PyTuple_Check(arrays_in) || PyTuple_Size(arrays_in) != ARRAYS) {
        PyErr_Format(PyExc_ValueError, "arrays: expected a tuple of %d", ARRAYS);
        return NULL;
    }
    if (PyObject_GetBuffer(numbers_in, &numbers_view, PyBUF_SIMPLE))
        return NULL;
    if (numbers_view.len != NUMBERS * (Py_ssize_t)sizeof(double))
        wrong = "numbers: wrong length";
    for (; !wrong && held < ARRAYS; held++) {
        int flags = held >= OUT_FINISH ? PyBUF_WRITABLE : PyBUF_SIMPLE;
        if (PyObject_GetBuffer(PyTuple_GetItem(arrays_in, held), &views[held], flags))
            goto fail;
        a[held] = views[held].buf;
        lengths[held] = views[held].len / (ITEM[held] - '0');
    }
    if (!wrong) {
        const double *x = numbers_view.buf;
        Jobs jobs = {(int)lengths[SUBMIT], 0, (int)x[WIDTH], 0, a[SUBMIT], a[WORK], a[ESTIMATE],
                     a[GMIN], a[GMAX], a[TABLE], a[SPEED], a[EFFICIENCY]};
        Policy policy = {(int)x[KIND], (int)lengths[THRESHOLD], (int)x[INTEGRAL], (int)x[ARTIFACT],
                         a[THRESHOLD], a[WEIGHT], x[ZETA], x[DELTA], x[LEASE], x[START_COST],
                         x[RESIZE_COST], x[PREEMPT_COST], x[MIN_RUNTIME], x[CHECKPOINT]};
        for (int i = 0; i < ARRAYS && !wrong; i++) {
            Py_ssize_t expected = LENGTH[i] == 'n'   ? lengths[SUBMIT]
                                  : LENGTH[i] == 't' ? lengths[SPEED]
                                  : LENGTH[i] == 'c' ? lengths[THRESHOLD]
                                  : LENGTH[i] == 's' ? 4
                                  : LENGTH[i] == 'q' ? lengths[i]
                                  : LENGTH[i] == 'o' ? (lengths[QUOTA] ? lengths[SUBMIT] : 0)
                                  : LENGTH[i] == 'r' ? review_items(lengths[SUBMIT], x[REVIEW_EVERY])
                                                     : lengths[i] / 2 * 2;
            if (lengths[i] != expected || views[i].len % (ITEM[i] - '0'))
                wrong = "arrays: one has the wrong length";
        }
        if (!wrong && jobs.width > 0)
            jobs.tables = (int)(lengths[SPEED] / jobs.width);
        if (!wrong)
            wrong = check(&jobs, &policy, lengths);
        for (int j = 0; !wrong && lengths[QUOTA] && j < jobs.n; j++)
            if (((int32_t *)a[OWNER])[j] >= lengths[QUOTA])
                wrong = "owner without a quota";
        if (!wrong && lengths[QUOTA] && x[REVIEW_EVERY] >= 1)
            wrong = "quotas and reviews do not go together";
        if (!wrong) {
            for (int j = 0; j < jobs.n; j++)
                jobs.gangs |= jobs.gmin[j] > 1;
            Py_BEGIN_ALLOW_THREADS
            result = drive(mode, &policy, &jobs, a, x, (int)(lengths[FAILURE] / 2),
                           (int)lengths[QUOTA]);
            Py_END_ALLOW_THREADS
        }
    }
fail:
    while (held > 0)
        PyBuffer_Release(&views[--held]);
    PyBuffer_Release(&numbers_view);
    if (PyErr_Occurred())
        return NULL;
    if (wrong) {
        PyErr_SetString(PyExc_ValueError, wrong);
        return NULL;
    }
    if (result == -2)
        return PyErr_NoMemory();
    if (result == -3) {
        PyErr_SetString(PyExc_ValueError, "quotas and predictions inside a run do not go together");
        return NULL;
    }
    return PyLong_FromLong(result);
}

static PyMethodDef methods[] = {
    {"run", run, METH_VARARGS,
     "run(mode, numbers, arrays) -> 0, or -1 if jobs wait for ever. mode 0 decides once, 1 plays on."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernel", NULL, 0, methods,
                                        NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModule_Create(&definition); }
