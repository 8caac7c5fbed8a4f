/* send_file HOST PORT BYTES [COUNT]: send COUNT flows of BYTES bytes over one TCP connection, each in
 * its turn, and print one line of JSON a flow. COUNT flows with BYTES 0 measure the gate alone.
 */
#define _GNU_SOURCE
#include "intentd_flow.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static int dial(const char *host, const char *port) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    int sock = -1;
    if (getaddrinfo(host, port, &hints, &found) != 0)
        return -1;
    for (struct addrinfo *at = found; at != NULL && sock < 0; at = at->ai_next) {
        sock = socket(at->ai_family, at->ai_socktype | SOCK_CLOEXEC, at->ai_protocol);
        if (sock >= 0 && connect(sock, at->ai_addr, at->ai_addrlen) < 0) {
            close(sock);
            sock = -1;
        }
    }
    freeaddrinfo(found);
    return sock;
}

static int send_all(int sock, int64_t size) {
    static char block[65536];
    while (size > 0) {
        ssize_t sent = send(sock, block, size < 65536 ? (size_t)size : sizeof block, MSG_NOSIGNAL);
        if (sent < 0)
            return -1;
        size -= sent;
    }
    return 0;
}

static int option(int sock, int level, int name) {
    int value = -1;
    socklen_t size = sizeof value;
    getsockopt(sock, level, name, &value, &size);
    return value;
}

int main(int argc, char **argv) {
    if (argc < 4 || argc > 5) {
        fprintf(stderr, "usage: %s HOST PORT BYTES [COUNT]\n", argv[0]);
        return 2;
    }
    int64_t size = strtoll(argv[3], NULL, 10);
    long count = argc > 4 ? strtol(argv[4], NULL, 10) : 1;
    int sock = dial(argv[1], argv[2]);
    if (sock < 0) {
        fprintf(stderr, "%s port %s: %s\n", argv[1], argv[2], strerror(errno));
        return 1;
    }
    int agent = intentd_connect(NULL, "send_file");
    int family = option(sock, SOL_SOCKET, SO_DOMAIN);
    for (long i = 1; i <= count; i++) {
        struct intentd_flow flow;
        enum intentd_start start = intentd_open(agent, (uint32_t)i, size, NULL, sock, 5000, &flow);
        if (send_all(sock, size) < 0) {
            perror("send");
            return 1;
        }
        int tos = family == AF_INET6 ? option(sock, IPPROTO_IPV6, IPV6_TCLASS)
                                     : option(sock, IPPROTO_IP, IP_TOS);
        if (start < INTENTD_REFUSED) {
            intentd_drain(sock, &flow, agent);
            intentd_done(agent, &flow, (uint64_t)size);
        }
        printf("{\"flow\": %llu, \"start\": %d, \"class\": %u, \"marked\": %s, \"priority\": %u, "
               "\"so_priority\": %d, \"dscp\": %d}\n",
               (unsigned long long)flow.flow, (int)start, flow.class_index,
               flow.marked ? "true" : "false", flow.priority,
               option(sock, SOL_SOCKET, SO_PRIORITY), tos < 0 ? 0 : tos >> 2);
        if (start == INTENTD_REFUSED)
            fprintf(stderr, "refused: %s\n", flow.error);
    }
    if (agent >= 0)
        close(agent);
    close(sock);
    return 0;
}
