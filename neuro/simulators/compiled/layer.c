/* Populations through time: sums of what arrives, in blocks of steps that stay in the cache, and neurons on top of them.
 *
 * Samples do not meet, so a thread takes some of them through all steps. Populations on a loop go step by step; what
 * reaches them from outside of it is summed for a block of steps at once.
 */
#include "engine.h"
#include <stdlib.h>
#include <string.h>

enum { CACHE = 1 << 19, MOST_ROWS = 1024, STEPS_AT_ONCE = 16, SAMPLES_ON_A_LOOP = 32, PATCH_ROWS = 256 + ROOM };

static int64_t most(int64_t x, int64_t y) { return x > y ? x : y; }
static int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
static int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
static int64_t message_bytes(const Input *in) { return in->kind == CONV ? up(in->sources, 64) : in->width; }

/* Messages of steps t.. and samples b.. as rows, zeros behind their end. */
static void gather(const Input *in, int64_t t, int64_t steps, int64_t b, int64_t samples, int8_t *to) {
    const int64_t width = message_bytes(in), sources = in->sources;
    for (int64_t i = 0; i < steps; i++)
        for (int64_t j = 0; j < samples; j++, to += width) {
            const int8_t *from = in->messages + (t + i) * in->stride + (b + j) * sources;
            if (in->binary)
                for (int64_t k = 0; k < sources; k++) to[k] = from[k] != 0;
            else
                memcpy(to, from, sources);
            memset(to + sources, 0, width - sources);
        }
}

/* Add the inputs of one sort, inside the loop or not, to `steps` x `samples` rows of sums. `filled`: there are some already. */
static void arrive(const Member *m, int64_t inside, int filled, int64_t t, int64_t steps, int64_t b, int64_t samples,
                   i32 *sums, i32 *more, Scratch *scratch, int way, int64_t *stat) {
    const int64_t rows = steps * samples, size = rows * m->size;
    for (int64_t i = 0; i < m->count; i++) {
        const Input *in = m->inputs + i;
        if (in->inside != inside) continue;
        i32 *to = filled ? more : sums;
        gather(in, t, steps, b, samples, scratch->packed);
        const int dense = product(in, rows, to, scratch, way);
        stat[dense ? STAT_DENSE : STAT_BY_EVENTS] += rows;
        const i32 right = (i32)in->right, left = (i32)in->left;
        if (m->count > 1) {
            if (filled)
                for (int64_t k = 0; k < size; k++) sums[k] += (more[k] >> right) << left;
            else if (right || left)
                for (int64_t k = 0; k < size; k++) sums[k] = (sums[k] >> right) << left;
        }
        filled = 1;
    }
    if (!filled) memset(sums, 0, size * sizeof(i32));
}

/* Steps of samples begin..end of `batch` through `count` populations. Returns 0, or 1 where there is no memory.
 * stats: STATS numbers for each population, added to. */
int run_members(const Member *members, int64_t count, int64_t steps, int64_t batch, int64_t begin, int64_t end, int way,
                int64_t *stats) {
    int64_t targets = 0, widest = 0, largest = 0, patch = 0, loop = 0, row_bytes = 0;
    for (int64_t i = 0; i < count; i++) {
        targets += members[i].size, largest = most(largest, members[i].size);
        for (int64_t k = 0; k < members[i].count; k++) {
            const Input *in = members[i].inputs + k;
            widest = most(widest, message_bytes(in)), loop |= in->inside, row_bytes = most(row_bytes, in->row_bytes);
            if (in->kind == CONV) patch = most(patch, in->width);
        }
    }
    int64_t rows = most(1, least(MOST_ROWS, CACHE / (4 * targets + widest)));
    int64_t samples = least(end - begin, loop ? least(rows, SAMPLES_ON_A_LOOP) : most(1, rows / STEPS_AT_ONCE));
    const int64_t at_once = least(steps, most(1, rows / samples));
    samples = least(end - begin, most(1, rows / at_once));
    rows = up(at_once * samples, ROOM);

    Scratch scratch = {.rows = rows};
    int failed = 1;
    i32 *sums = malloc(rows * targets * sizeof(i32)), *more = malloc(rows * largest * sizeof(i32));
    int *careful = malloc((samples * targets / 512 + count) * sizeof(int) + 64);
    scratch.packed = calloc(rows, widest + 64);
    scratch.who = malloc((widest + 64) * sizeof(i32)), scratch.what = malloc((widest + 64) * sizeof(i32));
    scratch.one = malloc((row_bytes + 64) * sizeof(i32)), scratch.patches = calloc(PATCH_ROWS, patch + 64);
    if (!sums || !more || !careful || !scratch.packed || !scratch.who || !scratch.what || !scratch.one || !scratch.patches)
        goto out;
    failed = 0;
    for (int64_t b = begin; b < end; b += samples) {
        const int64_t here = least(samples, end - b);
        memset(careful, 0, (samples * targets / 512 + count) * sizeof(int));
        for (int64_t t = 0; t < steps; t += at_once) {
            const int64_t now = least(at_once, steps - t);
            i32 *own = sums;
            for (int64_t i = 0; i < count; own += rows * members[i++].size)
                arrive(members + i, 0, 0, t, now, b, here, own, more, &scratch, way, stats + i * STATS);
            const int64_t stride = loop ? 1 : now;
            for (int64_t at = t; at < t + now; at += stride) {
                int *flags = careful;
                own = sums;
                for (int64_t i = 0; i < count; own += rows * members[i++].size) {
                    const Member *m = members + i;
                    i32 *from = own + (at - t) * here * m->size;
                    if (loop) {
                        int outside = 0;
                        for (int64_t k = 0; k < m->count; k++) outside |= !m->inputs[k].inside;
                        arrive(m, 1, outside || m->count == 0, at, 1, b, here, from, more, &scratch, way, stats + i * STATS);
                    }
                    if (m->sums)
                        for (int64_t k = 0; k < stride; k++)
                            memcpy(m->sums + ((at + k) * batch + b) * m->size, from + k * here * m->size,
                                   here * m->size * sizeof(i32));
                    else
                        lif_block(m, from, here * m->size, at, stride, batch * m->size, b * m->size, here * m->size, flags,
                                  stats + i * STATS);
                    flags += here * m->size / 512 + 1;
                }
            }
        }
    }
out:
    free(sums), free(more), free(careful), free(scratch.packed), free(scratch.who), free(scratch.what), free(scratch.one);
    free(scratch.patches);
    return failed;
}

/* Neurons begin..end of M only, from sums (T, M) that lie whole. */
void run_scan(const Member *m, const i32 *a_TM, int64_t steps, int64_t neurons, int64_t begin, int64_t end, int64_t *stat) {
    int careful;
    for (int64_t b = begin; b < end; b += 512) {
        careful = 0;
        for (int64_t t = 0; t < steps; t += 64)
            lif_block(m, a_TM + t * neurons + b, neurons, t, least(64, steps - t), neurons, b, least(512, end - b), &careful, stat);
    }
}
