/* Outputs of many prompts: a slot of the cache for each row, refilled as rows end; a prompt is read once for all of its
 * outputs. What a row draws follows from its own logits and its own random numbers. */
#include "decoder.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { DONE, MORE, NOT_A_NUMBER };

typedef struct {
    float *kept;
    i64 positions, slots; /* slot number `slots` holds the prompt that was read last */
    const i64 *tokens, *starts; /* of prompt p: tokens[starts[p]] to tokens[starts[p + 1] - 1] */
    i64 prompts, n, new_tokens, rows;
    const i64 *order; /* in which prompts are taken */
    const double *uniform; /* (rows, new_tokens) */
    const uint8_t *stop;
    double temperature, top_p;
    i64 *out, *lengths; /* (rows, new_tokens), (rows,) */
    float *values;      /* (3, rows, new_tokens) */
    uint8_t *stopped;
    float *room, *logits, *first; /* room_floats; (CHUNK, vocab_line); (vocab_line) of the prompt that was read */
    double *sums;                 /* (3 x vocab,) */
    i64 *row, *made, *place, *token; /* of each slot */
    i64 next, waiting;            /* next prompt in the order; outputs that wait for a slot of the one that was read */
} Run;

static int likelier(const void *a, const void *b) {
    const double *x = a, *y = b; /* probability, token */
    if (x[0] != y[0]) return x[0] < y[0] ? 1 : -1;
    return x[1] > y[1] ? 1 : -1;
}

/* q of every token as double in `sums`, of those that `top_p` keeps; the others 0. */
static void cut(const Run *run, i64 vocab, double total) {
    double *q = run->sums, *kept = run->sums + vocab;
    const double least = (1 - run->top_p) * total / (double)vocab * (1 - 1e-9); /* all below it together are cut off */
    i64 count = 0;
    for (i64 i = 0; i < vocab; i++)
        if (q[i] >= least) {
            kept[2 * count] = q[i];
            kept[2 * count++ + 1] = (double)i;
        }
    qsort(kept, count, 2 * sizeof(double), likelier);
    memset(q, 0, sizeof(double) * vocab);
    double before = 0;
    for (i64 i = 0; i < count && before < run->top_p * total; i++) {
        q[(i64)kept[2 * i + 1]] = kept[2 * i];
        before += kept[2 * i];
    }
}

/* A token from logits (padded to 16 with anything) and a number in [0, 1); values: log-probability, that of what it was
 * drawn from, entropy. Returns -1 for logits that are NaN or infinite. */
static i64 draw(const Model *m, const Run *run, float *logits, double uniform, float *value) {
    const i64 vocab = m->vocab;
    for (i64 i = vocab; i < m->vocab_line; i++) logits[i] = -INFINITY;
    v16 top = all(-INFINITY);
    v16i strange = {0};
    for (i64 i = 0; i < m->vocab_line; i += LANES) {
        const v16 x = load(logits + i);
        strange |= x != x;
        top = pick(x > top, x, top);
    }
    const float largest = largest_of(top);
    int bad = !isfinite(largest);
    for (int i = 0; i < LANES; i++) bad |= strange[i];
    if (bad) return -1;
    double sum = 0, weighted = 0;
    for (i64 i = 0; i < m->vocab_line; i += LANES) {
        const v16 x = load(logits + i) - all(largest), e = exp16(x);
        sum += sum_of(e);
        weighted += sum_of(e * pick(e > all(0.0f), x, all(0.0f)));
    }
    const double log_sum = log(sum);
    i64 found = 0;
    double drawn = 0;
    if (run->temperature == 0) {
        while (logits[found] != largest) found++;
    } else {
        const v16 colder = all((float)(1 / run->temperature));
        double *q = run->sums, total = 0;
        float e[LANES];
        for (i64 i = 0; i < m->vocab_line; i += LANES) {
            store(e, exp16((load(logits + i) - all(largest)) * colder));
            for (i64 j = 0; j < LANES && i + j < vocab; j++) q[i + j] = e[j];
        }
        if (run->top_p < 1) {
            for (i64 i = 0; i < vocab; i++) total += q[i];
            cut(run, vocab, total);
        }
        total = 0;
        for (i64 i = 0; i < vocab; i++) total += q[i];
        const double wanted = uniform * total;
        double reached = 0;
        i64 last = 0;
        for (found = -1; found < 0 && last < vocab; last++) {
            reached += q[last];
            if (reached > wanted) found = last;
        }
        if (found < 0)
            for (found = vocab - 1; q[found] == 0;) found--;
        drawn = log(q[found] / total);
    }
    value[0] = (float)((double)(logits[found] - largest) - log_sum);
    value[1] = (float)drawn;
    value[2] = (float)(log_sum - weighted / sum);
    return found;
}

/* A token for a slot, noted; the slot is free if the output ends with it. */
static int take(const Model *m, Run *run, i64 slot, float *logits) {
    const i64 row = run->row[slot], at = run->made[slot], rn = run->rows * run->new_tokens;
    float value[3];
    const double uniform = run->temperature == 0 ? 0.5 : run->uniform[row * run->new_tokens + at];
    const i64 token = draw(m, run, logits, uniform, value);
    if (token < 0) return NOT_A_NUMBER;
    run->out[row * run->new_tokens + at] = token;
    for (int i = 0; i < 3; i++) run->values[i * rn + row * run->new_tokens + at] = value[i];
    run->lengths[row] = at + 1;
    run->token[slot] = token;
    run->made[slot] = at + 1;
    run->stopped[row] = run->stop[token];
    if (run->stop[token] || at + 1 == run->new_tokens) run->row[slot] = -1;
    return DONE;
}

static void read_prompt(const Model *m, Run *run, i64 prompt) {
    const Cache cache = {run->kept, run->positions};
    i64 place[CHUNK], slot[CHUNK], rows = 0;
    const i64 start = run->starts[prompt], length = run->starts[prompt + 1] - start;
    for (i64 first = 0; first < length; first += CHUNK) {
        rows = length - first < CHUNK ? length - first : CHUNK;
        for (i64 i = 0; i < rows; i++) place[i] = first + i, slot[i] = run->slots;
        forward(m, cache, rows, run->tokens + start + first, place, slot, run->room);
    }
    float *last = run->room + (rows - 1) * m->line;
    logits_of(m, 1, last, run->first, run->room + CHUNK * m->line);
}

/* The first `length` positions of the slot that holds the prompt. */
static void copy_prompt(const Model *m, Run *run, i64 to, i64 length) {
    const i64 size = slot_floats(m, run->positions), wide = up16(length);
    float *source = run->kept + run->slots * size, *target = run->kept + to * size;
    for (i64 layer = 0; layer < m->layers; layer++) {
        for (i64 i = 0; i < m->width; i++, source += run->positions, target += run->positions)
            memcpy(target, source, sizeof(float) * wide);
        memcpy(target, source, sizeof(float) * length * m->line);
        source += run->positions * m->line, target += run->positions * m->line;
    }
}

/* Goes on with a run for so many steps at most. */
int sample(const Model *m, Run *run, i64 steps) {
    const Cache cache = {run->kept, run->positions};
    float *logits = run->logits;
    for (i64 step = 0; step < steps; step++) {
        i64 prompt = run->next ? run->order[run->next - 1] : 0, live = 0;
        for (i64 slot = 0; slot < run->slots; slot++) {
            while (run->row[slot] < 0 && (run->waiting || run->next < run->prompts)) {
                if (!run->waiting) {
                    prompt = run->order[run->next++];
                    run->waiting = run->n;
                    read_prompt(m, run, prompt);
                }
                const i64 length = run->starts[prompt + 1] - run->starts[prompt];
                run->row[slot] = prompt * run->n + run->n - run->waiting--;
                run->made[slot] = 0;
                run->place[slot] = length;
                if (take(m, run, slot, run->first)) return NOT_A_NUMBER;
                if (run->row[slot] >= 0) copy_prompt(m, run, slot, length);
            }
            live += run->row[slot] >= 0;
        }
        if (!live) return DONE;
        for (i64 slot = 0; slot < run->slots;) {
            i64 token[CHUNK], place[CHUNK], at[CHUNK], rows = 0;
            for (; slot < run->slots && rows < CHUNK; slot++)
                if (run->row[slot] >= 0) {
                    token[rows] = run->token[slot], place[rows] = run->place[slot]++, at[rows] = slot;
                    rows++;
                }
            forward(m, cache, rows, token, place, at, run->room);
            logits_of(m, rows, run->room, logits, run->room + CHUNK * m->line);
            for (i64 i = 0; i < rows; i++)
                if (take(m, run, at[i], logits + i * m->vocab_line)) return NOT_A_NUMBER;
        }
    }
    return MORE;
}
