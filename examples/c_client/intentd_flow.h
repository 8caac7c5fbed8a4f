/* intentd flows from C: ask this host's agent for a turn before sending.
 *
 * One blocking connection for one thread; the protocol is in docs/wire.md. Everything fails open:
 * if a call returns other than INTENTD_ORDERED, send all the same.
 */
#ifndef INTENTD_FLOW_H
#define INTENTD_FLOW_H

#include <stdint.h>

#define INTENTD_DEFAULT_SOCKET "/run/intentd/agent.sock"

enum intentd_start {
    INTENTD_ORDERED = 0,  /* 1 to 6: reasons of GRANT (docs/wire.md) */
    INTENTD_NO_DOMAIN = 6,
    INTENTD_REFUSED = 100, /* the agent answered ERROR; its text is in intentd_flow.error */
    INTENTD_ABSENT = 101,  /* no agent, or it does not answer */
};

struct intentd_flow {
    uint64_t flow; /* the agent's number, for `intentctl explain` */
    uint32_t request;
    uint16_t class_index;
    uint8_t dscp;
    int marked; /* the passed socket carries the class's mark */
    uint32_t priority;
    uint32_t early_fin_bytes;
    uint64_t started_ns;
    char error[401];
};

/* A connected descriptor, or -1. path NULL: $INTENTD_SOCKET or the default. */
int intentd_connect(const char *path, const char *name);

/* Ask for a turn and wait for it. size: bytes that will be sent. sock: a TCP or UDP socket to mark
 * with the flow's class, or -1. domain: NULL for the agent's choice. timeout_ms: how long the
 * agent may take to answer at all; once queued, the wait is what the agent promises at most. */
enum intentd_start intentd_open(int agent, uint32_t request, int64_t size, const char *domain,
                                int sock, int timeout_ms, struct intentd_flow *flow);

/* Wait (bounded) until the bytes given to sock have left this host's queues. */
void intentd_drain(int sock, const struct intentd_flow *flow, int agent);

/* The flow has left; the turn passes on. */
int intentd_done(int agent, const struct intentd_flow *flow, uint64_t bytes_sent);

#endif
