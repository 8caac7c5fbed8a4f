/* gate_client SOCKET FLOWS PAUSE_MS: open and finish FLOWS flows one after the other, a pause before
 * each; prints when it began and ended (CLOCK_MONOTONIC) and each open -> grant time, in nanoseconds.
 * Built by gate.py.
 */
#define _GNU_SOURCE
#include "intentd_flow.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: %s SOCKET FLOWS PAUSE_MS\n", argv[0]);
        return 2;
    }
    long count = strtol(argv[2], NULL, 10);
    long pause_ms = strtol(argv[3], NULL, 10);
    struct timespec pause = {pause_ms / 1000, pause_ms % 1000 * 1000000};
    uint64_t *took = calloc((size_t)count, sizeof *took);
    int agent = intentd_connect(argv[1], "gate_client");
    if (agent < 0 || took == NULL) {
        perror(argv[1]);
        return 1;
    }
    uint64_t began = now_ns();
    for (long i = 0; i < count; i++) {
        struct intentd_flow flow;
        if (pause_ms > 0)
            nanosleep(&pause, NULL);
        uint64_t asked = now_ns();
        enum intentd_start start = intentd_open(agent, (uint32_t)i + 1, 100, NULL, -1, 5000, &flow);
        took[i] = now_ns() - asked;
        if (start != INTENTD_ORDERED) {
            fprintf(stderr, "flow %ld starts degraded: %d %s\n", i, (int)start, flow.error);
            return 1;
        }
        intentd_done(agent, &flow, 100);
    }
    printf("%llu %llu\n", (unsigned long long)began, (unsigned long long)now_ns());
    for (long i = 0; i < count; i++)
        printf("%llu\n", (unsigned long long)took[i]);
    close(agent);
    return 0;
}
