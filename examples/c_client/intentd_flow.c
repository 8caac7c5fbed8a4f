/* See intentd_flow.h. Linux, C11, no library but libc. */
#define _GNU_SOURCE
#include "intentd_flow.h"

#include <endian.h>
#include <errno.h>
#include <linux/sockios.h>
#include <poll.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifndef SO_MEMINFO
#define SO_MEMINFO 55
#endif

enum { HELLO = 1, OPEN = 3, GRANT = 4, QUEUED = 5, ANNOUNCE = 6, DONE = 7, CANCEL = 8, ERROR = 11 };
enum { MAGIC = 0x4941, VERSION = 1, MAX_PACKET = 512, NO_CLASS = 0xffff, WANTS_MARK = 1 };
enum { STALL_MS = 250, WAIT_GRACE_MS = 500 };

struct header {
    uint16_t magic;
    uint8_t version;
    uint8_t type;
    uint32_t request;
} __attribute__((packed));

struct open_packet {
    struct header header;
    uint16_t flags;
    uint16_t class_hint;
    uint8_t family;
    uint8_t zero[3];
    int64_t size_bytes;
    uint8_t peer[16];
    char domain[64];
} __attribute__((packed));

struct grant_packet {
    struct header header;
    uint64_t flow;
    uint16_t class_index;
    uint8_t dscp;
    uint8_t reason;
    uint16_t flags;
    uint16_t zero;
    uint32_t priority;
    uint32_t early_fin_bytes;
    uint64_t rate_bps;
} __attribute__((packed));

struct queued_packet {
    struct header header;
    uint64_t flow;
    uint16_t class_index;
    uint16_t zero;
    uint32_t ahead;
    uint32_t max_wait_ms;
} __attribute__((packed));

_Static_assert(sizeof(struct open_packet) == 104, "OPEN");
_Static_assert(sizeof(struct grant_packet) == 40, "GRANT");
_Static_assert(sizeof(struct queued_packet) == 28, "QUEUED");

static struct header header_of(uint8_t type, uint32_t request) {
    return (struct header){htobe16(MAGIC), VERSION, type, htobe32(request)};
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int intentd_connect(const char *path, const char *name) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct {
        struct header header;
        char name[64];
    } __attribute__((packed)) hello = {.header = header_of(HELLO, 0)};

    if (path == NULL)
        path = getenv("INTENTD_SOCKET");
    if (path == NULL)
        path = INTENTD_DEFAULT_SOCKET;
    if (strlen(path) >= sizeof address.sun_path)
        return -1;
    strcpy(address.sun_path, path);
    memcpy(hello.name, name, strnlen(name, sizeof hello.name));
    int agent = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (agent < 0)
        return -1;
    if (connect(agent, (struct sockaddr *)&address, sizeof address) < 0 ||
        send(agent, &hello, sizeof hello, MSG_NOSIGNAL) < 0) {
        close(agent);
        return -1;
    }
    return agent;
}

static int send_open(int agent, const struct open_packet *packet, int sock) {
    struct iovec iov = {.iov_base = (void *)packet, .iov_len = sizeof *packet};
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};

    if (sock >= 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
        struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(rights), &sock, sizeof sock);
    }
    return sendmsg(agent, &message, MSG_NOSIGNAL) < 0 ? -1 : 0;
}

static enum intentd_start granted(const struct grant_packet *packet, struct intentd_flow *flow) {
    flow->flow = be64toh(packet->flow);
    flow->class_index = be16toh(packet->class_index);
    flow->dscp = packet->dscp;
    flow->marked = be16toh(packet->flags) & 1;
    flow->priority = be32toh(packet->priority);
    flow->early_fin_bytes = be32toh(packet->early_fin_bytes);
    flow->started_ns = now_ns();
    return packet->reason;
}

static void refused(const unsigned char *packet, size_t length, struct intentd_flow *flow) {
    size_t start = sizeof(struct header) + 4, size = length > start ? length - start : 0;
    if (size >= sizeof flow->error)
        size = sizeof flow->error - 1;
    memcpy(flow->error, packet + start, size);
    flow->error[size] = 0;
}

enum intentd_start intentd_open(int agent, uint32_t request, int64_t size, const char *domain,
                                int sock, int timeout_ms, struct intentd_flow *flow) {
    struct open_packet packet = {
        .header = header_of(OPEN, request),
        .flags = htobe16(sock >= 0 ? WANTS_MARK : 0),
        .class_hint = htobe16(NO_CLASS),
        .size_bytes = (int64_t)htobe64((uint64_t)size),
    };
    union {
        unsigned char bytes[MAX_PACKET];
        struct header header;
        struct grant_packet grant;
        struct queued_packet queued;
    } reply;

    memset(flow, 0, sizeof *flow);
    flow->request = request;
    if (domain != NULL)
        memcpy(packet.domain, domain, strnlen(domain, sizeof packet.domain));
    if (agent < 0 || send_open(agent, &packet, sock) < 0)
        return INTENTD_ABSENT;
    uint64_t deadline = now_ns() + (uint64_t)timeout_ms * 1000000u;
    for (;;) {
        struct pollfd wait = {.fd = agent, .events = POLLIN};
        int64_t left_ms = ((int64_t)(deadline - now_ns()) + 999999) / 1000000;
        if (left_ms <= 0 || poll(&wait, 1, (int)left_ms) == 0)
            break;
        ssize_t length = recv(agent, reply.bytes, sizeof reply.bytes, MSG_DONTWAIT);
        if (length < 0 && (errno == EAGAIN || errno == EINTR))
            continue;
        if (length < (ssize_t)sizeof reply.header || reply.header.magic != htobe16(MAGIC) ||
            reply.header.version != VERSION)
            break;
        if (reply.header.request != htobe32(request))
            continue; /* WELCOME, or an answer to a request given up earlier */
        if (reply.header.type == GRANT && length == sizeof reply.grant)
            return granted(&reply.grant, flow);
        if (reply.header.type == QUEUED && length == sizeof reply.queued)
            deadline = now_ns() + (be32toh(reply.queued.max_wait_ms) + WAIT_GRACE_MS) * 1000000ull;
        if (reply.header.type == ERROR) {
            refused(reply.bytes, (size_t)length, flow);
            return INTENTD_REFUSED;
        }
    }
    struct header cancel = header_of(CANCEL, request);
    (void)!send(agent, &cancel, sizeof cancel, MSG_NOSIGNAL | MSG_DONTWAIT);
    return INTENTD_ABSENT;
}

/* Not sent yet, and what queueing discipline and device still hold. */
static long pending(int sock) {
    int unsent = 0;
    uint32_t memory[9] = {0};
    socklen_t size = sizeof memory;
    if (ioctl(sock, SIOCOUTQNSD, &unsent) < 0)
        unsent = 0;
    if (getsockopt(sock, SOL_SOCKET, SO_MEMINFO, memory, &size) < 0)
        memory[2] = 0;
    return unsent + (long)memory[2];
}

void intentd_drain(int sock, const struct intentd_flow *flow, int agent) {
    long left, least = -1;
    int announced = flow->early_fin_bytes == 0;
    uint64_t since = now_ns();
    while ((left = pending(sock)) > 0) {
        if (!announced && left <= (long)flow->early_fin_bytes) {
            struct {
                struct header header;
                uint64_t bytes_left;
            } __attribute__((packed)) packet = {header_of(ANNOUNCE, flow->request),
                                                htobe64((uint64_t)left)};
            (void)!send(agent, &packet, sizeof packet, MSG_NOSIGNAL);
            announced = 1;
        }
        if (least < 0 || left < least) {
            least = left;
            since = now_ns();
        } else if (now_ns() - since > STALL_MS * 1000000ull) {
            return;
        }
        struct timespec pause = {.tv_nsec = 50000};
        nanosleep(&pause, NULL);
    }
}

int intentd_done(int agent, const struct intentd_flow *flow, uint64_t bytes_sent) {
    struct {
        struct header header;
        uint64_t bytes_sent, started_ns, ended_ns;
    } __attribute__((packed)) packet = {header_of(DONE, flow->request), htobe64(bytes_sent),
                                        htobe64(flow->started_ns), htobe64(now_ns())};
    return send(agent, &packet, sizeof packet, MSG_NOSIGNAL) == sizeof packet ? 0 : -1;
}
