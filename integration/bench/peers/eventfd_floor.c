/* Round trips between a driver and N processes that sleep on eventfds: floor N CALLS prints nanoseconds, one a line. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void answer(int asked, int answered) {
    uint64_t word;
    while (read(asked, &word, 8) == 8) {
        word = 1;
        if (write(answered, &word, 8) != 8) _exit(1);
    }
    _exit(0);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    int n = atoi(argv[1]), calls = atoi(argv[2]), warm_up = calls / 10 + 1, answered = eventfd(0, 0);
    int *asked = calloc(n, sizeof *asked), *children = calloc(n, sizeof *children);
    int64_t *took = calloc(calls, sizeof *took);
    for (int i = 0; i < n; i++) {
        asked[i] = eventfd(0, 0);
        if ((children[i] = fork()) == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            answer(asked[i], answered);
        }
    }
    for (int call = -warm_up; call < calls; call++) {
        uint64_t word = 1, done = 0;
        int64_t began = now();
        for (int i = 0; i < n; i++)
            if (write(asked[i], &word, 8) != 8) return 1;
        while (done < (uint64_t)n) {
            if (read(answered, &word, 8) != 8) return 1;
            done += word;
            word = 1;
        }
        if (call >= 0) took[call] = now() - began;
    }
    for (int i = 0; i < n; i++) kill(children[i], SIGKILL);
    for (int call = 0; call < calls; call++) printf("%lld\n", (long long)took[call]);
    return 0;
}
