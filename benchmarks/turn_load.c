/* Closed-loop load on a turn sequencer or on an echo: N DEALER clients in one thread.
 *
 * turn_load ENDPOINT MODE CLIENTS IDS SECONDS [SERVER_PUBLIC PUBLIC SECRET]   (keys: 64 hex digits)
 *
 * MODE "turns": Hello, then ticket requests for IDS ids, one outstanding a client, and every 64
 * requests a heartbeat that says nothing is held any more. MODE "echo": the same requests to a
 * server that returns them. Prints one JSON object. The wire format is in docs/wire.md.
 */
#include <endian.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <zmq.h>

enum { MAX_CLIENTS = 1024, BUCKETS = 20000, BUCKET_NS = 1000, HEARTBEAT_EVERY = 64 };
enum { HELLO = 1, REQUEST = 2, HEARTBEAT = 3, GOODBYE = 6, WELCOME = 16, TICKETS = 17, BEAT = 19, VERSION = 1 };

struct client {
    void *socket;
    uint32_t number, sequence;
    uint64_t domain, epoch, last_id;
    int64_t sent_ns;
};

static struct client clients[MAX_CLIENTS];
static uint64_t histogram[BUCKETS + 1];

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void fail(const char *what)
{
    fprintf(stderr, "turn_load: %s: %s\n", what, zmq_strerror(errno));
    exit(1);
}

static uint8_t *put16(uint8_t *p, uint16_t v) { v = htobe16(v); memcpy(p, &v, 2); return p + 2; }
static uint8_t *put32(uint8_t *p, uint32_t v) { v = htobe32(v); memcpy(p, &v, 4); return p + 4; }
static uint8_t *put64(uint8_t *p, uint64_t v) { v = htobe64(v); memcpy(p, &v, 8); return p + 8; }
static uint64_t get64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return be64toh(v); }
static uint32_t get32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return be32toh(v); }

static void send_frame(struct client *c, const uint8_t *frame, size_t size)
{
    if (zmq_send(c->socket, frame, size, 0) < 0)
        fail("send");
}

static void hello(struct client *c, int index)
{
    uint8_t frame[128], *p = frame;
    char name[32];
    int length = snprintf(name, sizeof name, "load-%d", index);
    *p++ = HELLO;
    *p++ = VERSION;
    p = put16(p, 0);
    p = put32(p, ++c->sequence);
    p = put32(p, 0);
    p = put64(p, (uint64_t)now_ns() ^ (uint64_t)index << 48);
    p = put64(p, 0);
    *p++ = 4;
    *p++ = (uint8_t)length;
    memcpy(p, "load", 4);
    memcpy(p + 4, name, (size_t)length);
    send_frame(c, frame, (size_t)(p + 4 + length - frame));

    uint8_t answer[256];
    int size = zmq_recv(c->socket, answer, sizeof answer, 0);
    if (size != 36 || answer[0] != WELCOME) {
        fprintf(stderr, "turn_load: no welcome (%d bytes, type %d)\n", size, answer[0]);
        exit(1);
    }
    c->domain = get64(answer + 20);
    c->epoch = get64(answer + 28);
}

static void request(struct client *c, int index, uint16_t ids, int echo)
{
    uint8_t frame[29], *p = frame;
    if (!echo && c->number % HEARTBEAT_EVERY == HEARTBEAT_EVERY - 1) {
        uint8_t beat[28];
        uint8_t *b = beat;
        *b++ = HEARTBEAT;
        *b++ = VERSION;
        b = put16(b, 0);
        b = put32(b, ++c->sequence);
        b = put32(b, c->number);
        b = put64(b, c->domain);
        put64(b, c->epoch);
        send_frame(c, beat, sizeof beat);
    }
    *p++ = REQUEST;
    *p++ = VERSION;
    *p++ = (uint8_t)(index % 4);
    p = put16(p, ids);
    p = put32(p, ++c->number);
    p = put32(p, c->number - 1);
    p = put64(p, c->domain);
    put64(p, c->epoch);
    c->sent_ns = now_ns();
    send_frame(c, frame, sizeof frame);
}

/* 1: the answer awaited; 0: another message. Exits on anything wrong. */
static int check(struct client *c, const uint8_t *answer, int size, uint16_t ids, int echo)
{
    if (echo) {
        if (size != 29 || get32(answer + 5) != c->number)
            fail("wrong echo");
        return 1;
    }
    if (answer[0] == BEAT)
        return 0;
    if (size != 41 || answer[0] != TICKETS || get32(answer + 5) != c->number ||
        get64(answer + 17) != c->epoch || get64(answer + 25) <= c->last_id) {
        fprintf(stderr, "turn_load: wrong answer: type %d, %d bytes\n", answer[0], size);
        exit(1);
    }
    c->last_id = get64(answer + 25) + ids - 1;
    return 1;
}

static void read_key(const char *hex, uint8_t *key)
{
    if (strlen(hex) != 64) {
        fprintf(stderr, "turn_load: keys have 64 hex digits\n");
        exit(2);
    }
    for (int i = 0; i < 32; i++) {
        unsigned byte;
        if (sscanf(hex + 2 * i, "%2x", &byte) != 1)
            exit(2);
        key[i] = (uint8_t)byte;
    }
}

static double percentile_us(uint64_t total, double share)
{
    uint64_t seen = 0;
    for (int i = 0; i <= BUCKETS; i++) {
        seen += histogram[i];
        if ((double)seen >= share * (double)total)
            return (i + 0.5) * BUCKET_NS / 1e3;
    }
    return BUCKETS * BUCKET_NS / 1e3;
}

int main(int argc, char **argv)
{
    if (argc != 6 && argc != 9) {
        fprintf(stderr, "usage: turn_load ENDPOINT turns|echo CLIENTS IDS SECONDS [KEYS]\n");
        return 2;
    }
    int echo = strcmp(argv[2], "echo") == 0;
    int count = atoi(argv[3]);
    uint16_t ids = (uint16_t)atoi(argv[4]);
    double seconds = atof(argv[5]);
    if (count < 1 || count > MAX_CLIENTS || ids < 1 || seconds <= 0)
        return 2;
    void *context = zmq_ctx_new();
    zmq_ctx_set(context, ZMQ_MAX_SOCKETS, MAX_CLIENTS + 8);
    zmq_pollitem_t items[MAX_CLIENTS];
    for (int i = 0; i < count; i++) {
        struct client *c = &clients[i];
        int zero = 0, timeout = 10000;
        c->socket = zmq_socket(context, ZMQ_DEALER);
        zmq_setsockopt(c->socket, ZMQ_LINGER, &zero, sizeof zero);
        zmq_setsockopt(c->socket, ZMQ_RCVTIMEO, &timeout, sizeof timeout);
        if (argc == 9) {
            uint8_t key[32];
            read_key(argv[6], key);
            zmq_setsockopt(c->socket, ZMQ_CURVE_SERVERKEY, key, 32);
            read_key(argv[7], key);
            zmq_setsockopt(c->socket, ZMQ_CURVE_PUBLICKEY, key, 32);
            read_key(argv[8], key);
            zmq_setsockopt(c->socket, ZMQ_CURVE_SECRETKEY, key, 32);
        }
        if (zmq_connect(c->socket, argv[1]) < 0)
            fail("connect");
        items[i] = (zmq_pollitem_t){c->socket, 0, ZMQ_POLLIN, 0};
        if (!echo)
            hello(c, i);
    }
    for (int i = 0; i < count; i++)
        request(&clients[i], i, ids, echo);
    int64_t start = now_ns(), end = start + (int64_t)(seconds * 1e9), now = start;
    uint64_t done = 0;
    while (now < end) {
        int idle = 1;
        for (int i = 0; i < count; i++) {
            uint8_t answer[256];
            int size = zmq_recv(clients[i].socket, answer, sizeof answer, ZMQ_DONTWAIT);
            if (size < 0)
                continue;
            idle = 0;
            if (!check(&clients[i], answer, size, ids, echo))
                continue;
            now = now_ns();
            int64_t bucket = (now - clients[i].sent_ns) / BUCKET_NS;
            histogram[bucket < BUCKETS ? bucket : BUCKETS]++;
            done++;
            request(&clients[i], i, ids, echo);
        }
        if (idle) {
            if (zmq_poll(items, count, 5000) <= 0)
                fail("no answer within 5 s");
            now = now_ns();
        }
    }
    double took = (double)(now - start) / 1e9;
    printf("{\"requests\": %llu, \"seconds\": %.6f, \"p50_us\": %.1f, \"p90_us\": %.1f, "
           "\"p99_us\": %.1f, \"p999_us\": %.1f}\n",
           (unsigned long long)done, took, percentile_us(done, .5), percentile_us(done, .9),
           percentile_us(done, .99), percentile_us(done, .999));
    for (int i = 0; i < count; i++) {
        int linger = 1000;
        uint8_t bye[18] = {GOODBYE, VERSION};
        put64(put64(bye + 2, clients[i].domain), clients[i].epoch);
        zmq_setsockopt(clients[i].socket, ZMQ_LINGER, &linger, sizeof linger);
        if (!echo)
            send_frame(&clients[i], bye, sizeof bye);
        zmq_close(clients[i].socket);
    }
    zmq_ctx_term(context);
    return 0;
}
