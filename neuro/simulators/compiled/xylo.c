/* Xylo's neurons over T steps of M, as long as no register of 16 bits could saturate and no neuron has an alias.
 *
 * The same equations as neuro/simulators/xylo/neurons.py, which is the reference. Where a register could saturate the
 * function says so, and what it wrote counts for nothing.
 */
#include "engine.h"

enum { BLOCK = 512, HIGH = 32767, LOW = -32768 };

typedef struct {
    const i32 *a_TM[2];
    int64_t right[2], left[2], bound[2], currents; /* bound: of what arrives in a step, one source after another */
    i32 *sent_TM, *raw_TM, *kept_TM[3], *state_M[3]; /* the currents, then v_mem at index 2 */
    const i32 *dash_N[2], *dash_mem_N, *vth_N, *bias_N;
    int64_t n, most;
} Xylo;

static inline i32 magnitude(i32 x) { return x < 0 ? -x : x; }

static inline i32 lost(i32 x, i32 dash) {
    const i32 all = x >> dash;
    return all == 0 && x > 0 ? 1 : all;
}

/* Neurons begin..end of M. Returns 1 where a register could have saturated, else 0. */
int run_xylo(const Xylo *s, int64_t steps, int64_t neurons, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b += BLOCK) {
        const int64_t n = b + BLOCK < end ? BLOCK : end - b;
        i32 state[3][BLOCK], dash[2][BLOCK], dash_mem[BLOCK], vth[BLOCK], bias[BLOCK], beyond = 0;
        for (int64_t i = 0; i < n; i++) {
            const int64_t own = (b + i) % s->n;
            for (int64_t k = 0; k < s->currents; k++) state[k][i] = s->state_M[k][b + i], dash[k][i] = s->dash_N[k][own];
            state[2][i] = s->state_M[2][b + i], dash_mem[i] = s->dash_mem_N[own], vth[i] = s->vth_N[own], bias[i] = s->bias_N[own];
        }
        for (int64_t t = 0; t < steps; t++) {
            const int64_t at = t * neurons + b;
            i32 sum[BLOCK] = {0}, *restrict sent = s->sent_TM + at, *restrict raw = s->raw_TM + at;
            for (int64_t k = 0; k < s->currents; k++) {
                const i32 *restrict a = s->a_TM[k] + at;
                const i32 right = (i32)s->right[k], left = (i32)s->left[k], room = (i32)(HIGH - s->bound[k]);
                for (int64_t i = 0; i < n; i++) {
                    beyond |= magnitude(state[k][i]) > room;
                    const i32 current = state[k][i] + ((a[i] >> right) << left);
                    state[k][i] = current - lost(current, dash[k][i]);
                    sum[i] += state[k][i];
                }
            }
            for (int64_t i = 0; i < n; i++) {
                const i32 v = state[2][i], first = (int16_t)-lost(v, dash_mem[i]) + sum[i], second = first + bias[i];
                const i32 third = v + second;
                beyond |= first > HIGH || first < LOW || second > HIGH || second < LOW || third > HIGH || third < LOW;
                const i32 wanted = (i32)((float)(third > 0 ? third : 0) / (float)vth[i]); /* exact: both are below 2^15 */
                const i32 fired = wanted < (i32)s->most ? wanted : (i32)s->most;
                raw[i] = third, sent[i] = fired, state[2][i] = third - fired * vth[i];
            }
            for (int64_t k = 0; k < 3; k++)
                if (s->kept_TM[k])
                    for (int64_t i = 0; i < n; i++) s->kept_TM[k][at + i] = state[k][i];
            if (beyond) return 1;
        }
        for (int64_t k = 0; k < 3; k++)
            if (s->state_M[k])
                for (int64_t i = 0; i < n; i++) s->state_M[k][b + i] = state[k][i];
    }
    return 0;
}
