// Prints the rate of this machine's time stamp counter in kHz.
//
// An emulated guest counts with the same counter. It would measure the rate against an emulated timer, and on a busy
// machine be wrong by a factor: all its time-outs with it. So it is told.
#include <stdint.h>
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>

struct moment {
    int64_t time_ns;
    uint64_t ticks;
};

// Both clocks at one moment: of several tries the one with the least between its two looks at the counter.
static struct moment now(void)
{
    struct moment best = {0, 0};
    uint64_t shortest = UINT64_MAX;
    for (int i = 0; i < 100; i++) {
        struct timespec t;
        uint64_t before = __rdtsc();
        clock_gettime(CLOCK_MONOTONIC, &t);
        uint64_t after = __rdtsc();
        if (after - before < shortest) {
            shortest = after - before;
            best.time_ns = t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
            best.ticks = before + shortest / 2;
        }
    }
    return best;
}

int main(void)
{
    struct timespec pause = {.tv_nsec = 50000000};
    struct moment start = now();
    nanosleep(&pause, NULL);
    struct moment end = now();
    printf("%.0f\n", (double)(end.ticks - start.ticks) * 1e6 / (double)(end.time_ns - start.time_ns));
    return 0;
}
