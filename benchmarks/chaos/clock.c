/* A wall clock that is wrong: what a process started with this preloaded reads as the time of day is
 * off by the seconds that the 8 bytes of $CHAOS_CLOCK say (a native int64), as they are now.
 * Monotonic clocks, sleeps and timeouts are the kernel's: a host whose clock is set has those too.
 *
 * cc -shared -fPIC -O2 -o clock.so clock.c
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int (*real)(clockid_t, struct timespec *);
static const volatile int64_t *offset_s;
static const int64_t none = 0;

__attribute__((constructor)) static void start(void)
{
    const char *path = getenv("CHAOS_CLOCK");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *found = MAP_FAILED;

    real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    if (fd >= 0) {
        found = mmap(NULL, sizeof none, PROT_READ, MAP_SHARED, fd, 0);
        close(fd);
    }
    offset_s = found == MAP_FAILED ? &none : found;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    /* Others may ask before we were started. */
    int done = real ? real(clock, now) : (int)syscall(SYS_clock_gettime, clock, now);

    if (done == 0 && offset_s && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += *offset_s;
    return done;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec precise;

    (void)zone;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *where)
{
    struct timespec precise;

    clock_gettime(CLOCK_REALTIME_COARSE, &precise);
    if (where)
        *where = precise.tv_sec;
    return precise.tv_sec;
}
