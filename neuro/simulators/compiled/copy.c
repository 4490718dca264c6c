/* Messages and states from one layout to another. */
#include "engine.h"
#include <string.h>

typedef struct {
    int64_t bytes, step, sample; /* of one number, and numbers from step to step, from sample to sample */
} Layout;

enum { STEPS_AT_ONCE = 16, PIECE = 4096 }; /* steps of a sample, so that written rows grow from their front; neurons */

static i32 not_zero(const int8_t *from, int64_t n) {
    i32 some = 0;
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) { /* in bytes, which a loop over 64 of them vectorises */
        uint8_t here = 0;
        for (int k = 0; k < 64; k++) here += from[i + k] != 0;
        some += here;
    }
    for (; i < n; i++) some += from[i] != 0;
    return some;
}

#define MOVE(FROM, TO)                                                                        \
    do {                                                                                      \
        const FROM *restrict f = (const FROM *)from + t * in.step + b * in.sample + i0;       \
        TO *restrict g = (TO *)to + t * out.step + b * out.sample + i0;                       \
        for (int64_t i = 0; i < n; i++) g[i] = (TO)f[i];                                      \
        if (count && sizeof(FROM) == 1)                                                       \
            found += not_zero((const int8_t *)f, n);                                          \
        else if (count)                                                                       \
            for (int64_t i = 0; i < n; i++) found += f[i] != 0;                               \
        if (each_N)                                                                           \
            for (int64_t i = 0; i < n; i++) few[i] += f[i] != 0;                              \
    } while (0)

/* Copy `neurons` neurons of `steps` steps and samples begin..end. Where asked, how many are not 0: of all, and of each neuron. */
int64_t spread(const void *from, Layout in, void *to, Layout out, int64_t steps, int64_t begin, int64_t end, int64_t neurons,
               int count, i32 *each_N) {
    int64_t found = 0;
    const int64_t piece = each_N ? PIECE : neurons; /* whose counts, in bytes, stay in the first-level cache */
    uint8_t few[PIECE];
    for (int64_t i0 = 0; i0 < neurons; i0 += piece) {
        const int64_t n = neurons - i0 < piece ? neurons - i0 : piece;
        int rows = 0;
        if (each_N) memset(few, 0, n);
        for (int64_t first = 0; first < steps; first += STEPS_AT_ONCE)
            for (int64_t b = begin; b < end; b++)
                for (int64_t t = first; t < steps && t < first + STEPS_AT_ONCE; t++) {
                    if (in.bytes == 1 && out.bytes == 1)
                        MOVE(int8_t, int8_t);
                    else if (in.bytes == 1)
                        MOVE(int8_t, i32);
                    else
                        MOVE(i32, i32);
                    if (!each_N || ++rows < UINT8_MAX) continue;
                    for (int64_t i = 0; i < n; i++) each_N[i0 + i] += few[i];
                    memset(few, 0, n), rows = 0;
                }
        if (each_N)
            for (int64_t i = 0; i < n; i++) each_N[i0 + i] += few[i];
    }
    return found;
}
