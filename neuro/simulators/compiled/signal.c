/* Neurons that add up, send differences, or turn, and Xylo's, over T steps of M.
 *
 * The same equations as class `Other` in neurons.py as long as nothing leaves 24 bits, and as xylo/neurons.py as long as
 * nothing could leave 16; those are the reference. Where something does, the functions say so, and what they wrote counts
 * for nothing.
 */
#include "engine.h"
#include <fenv.h>

enum { BLOCK = 512, HIGH = 32767, LOW = -32768 };

static inline i32 magnitude(i32 x) { return x < 0 ? -x : x; }
static inline i32 larger(i32 x, i32 y) { return x > y ? x : y; }
static inline i32 decay(i32 x, float keep) { return (i32)((float)x * keep); }

/* Sums as they arrive, to be shifted by `left` - `right`, and what comes of them; null where nobody asks. */
typedef struct {
    const i32 *a_TM;
    int64_t right, left;
    i32 *sent_TM, *v_TM, *sigma_TM, *act_TM, *residue_TM, *error_TM;
    i32 *sigma_M, *act_M, *residue_M, *error_M; /* states, changed; sigma_M null: the sums themselves are encoded */
    const i32 *bias_N;
    int64_t n, exponent, state_exp, threshold, relu, cum_error, corrected, encode;
} Signal;

/* Neurons begin..end of M. Returns 1 where a value left 24 bits, else 0. */
int run_signal(const Signal *s, int64_t steps, int64_t neurons, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b += BLOCK) {
        const int64_t n = b + BLOCK < end ? BLOCK : end - b;
        i32 top = 0, sigma[BLOCK] = {0}, act[BLOCK] = {0}, residue[BLOCK] = {0}, error[BLOCK] = {0}, bias[BLOCK] = {0};
        for (int64_t i = 0; i < n; i++) {
            if (s->sigma_M) sigma[i] = s->sigma_M[b + i], top |= sigma[i] >= LIMIT || sigma[i] <= -LIMIT ? LIMIT : 0;
            if (s->encode) act[i] = s->act_M[b + i], residue[i] = s->residue_M[b + i], error[i] = s->error_M[b + i];
            if (s->bias_N) bias[i] = s->bias_N[(b + i) % s->n];
        }
        const i32 right = (i32)s->right, left = (i32)s->left, cum = s->cum_error ? -1 : 0, corrected = s->corrected ? -1 : 0;
        const i32 exponent = (i32)s->exponent, state_exp = (i32)s->state_exp, lowest = s->relu ? 0 : INT32_MIN;
        const i32 threshold = (i32)s->threshold, shift_in = s->sigma_M ? 0 : exponent;
        for (int64_t t = 0; t < steps; t++) {
            const int64_t at = t * neurons + b;
            const i32 *restrict a = s->a_TM + at;
            i32 *restrict sent = s->sent_TM + at, *restrict v = s->v_TM + at;
            if (!s->encode) {
                for (int64_t i = 0; i < n; i++) {
                    top = larger(top, magnitude((a[i] >> right) << left));
                    sigma[i] += (a[i] >> right) << left;
                    top = larger(top, magnitude(sigma[i]));
                    sent[i] = v[i] = sigma[i];
                }
                continue;
            }
            for (int64_t i = 0; i < n; i++) {
                const i32 sum = (a[i] >> right) << left;
                top = larger(top, magnitude(sum) >> (23 - shift_in) ? LIMIT : 0); /* before a shift could hide it */
                i32 value = sum << shift_in;
                if (s->sigma_M) {
                    sigma[i] += value;
                    top = larger(top, magnitude(sigma[i]));
                    value = sigma[i] + bias[i];
                    top = larger(top, magnitude(value));
                    value = larger(value, lowest);
                }
                const i32 change = value - act[i] + residue[i], added = error[i] + change;
                const i32 held = cum ? added : change;
                const i32 out = magnitude(held) >= threshold ? change : 0, message = out >> state_exp;
                error[i] = cum ? (out == 0 ? added : 0) : error[i];
                act[i] = corrected ? act[i] + (message << state_exp) : value;
                residue[i] = corrected ? residue[i] : change - out;
                sent[i] = message, v[i] = value;
            }
            i32 *kept[] = {s->sigma_TM, s->act_TM, s->residue_TM, s->error_TM}, *now[] = {sigma, act, residue, error};
            for (int k = 0; k < 4; k++)
                if (kept[k])
                    for (int64_t i = 0; i < n; i++) kept[k][at + i] = now[k][i];
        }
        if (top >= LIMIT) return 1;
        for (int64_t i = 0; i < n; i++) {
            if (s->sigma_M) s->sigma_M[b + i] = sigma[i];
            if (s->encode) s->act_M[b + i] = act[i], s->residue_M[b + i] = residue[i], s->error_M[b + i] = error[i];
        }
    }
    return 0;
}

typedef struct {
    const i32 *real_in_TM, *imag_in_TM;
    int64_t real_right, real_left, imag_right, imag_left;
    i32 *sent_TM, *real_TM, *imag_TM, *real_M, *imag_M;
    const i32 *sin_M, *cos_M;
    int64_t exponent, threshold, izhikevich;
} Resonator;

/* As run_signal. */
int run_resonator(const Resonator *s, int64_t steps, int64_t neurons, int64_t begin, int64_t end) {
    const int before = fegetround();
    int beyond = 0;
    fesetround(FE_TOWARDZERO); /* see lif.c */
    for (int64_t b = begin; b < end && !beyond; b += BLOCK) {
        const int64_t n = b + BLOCK < end ? BLOCK : end - b;
        float sin[BLOCK], cos[BLOCK];
        i32 real[BLOCK], imag[BLOCK], top = 0;
        for (int64_t i = 0; i < n; i++) {
            sin[i] = (float)s->sin_M[b + i] / 4096, cos[i] = (float)s->cos_M[b + i] / 4096;
            real[i] = s->real_M[b + i], imag[i] = s->imag_M[b + i];
        }
        const i32 rr = (i32)s->real_right, rl = (i32)s->real_left, ir = (i32)s->imag_right, il = (i32)s->imag_left;
        const i32 exponent = (i32)s->exponent, threshold = (i32)s->threshold, restart = s->izhikevich ? -1 : 0;
        for (int64_t t = 0; t < steps; t++) {
            const int64_t at = t * neurons + b;
            const i32 *restrict x = s->real_in_TM + at, *restrict y = s->imag_in_TM + at;
            i32 *restrict sent = s->sent_TM + at, *restrict kept_real = s->real_TM + at, *restrict kept_imag = s->imag_TM + at;
            for (int64_t i = 0; i < n; i++) {
                const i32 into_real = (x[i] >> rr) << rl, into_imag = (y[i] >> ir) << il;
                top = larger(top, (magnitude(into_real) | magnitude(into_imag)) >> (23 - exponent) ? LIMIT : 0);
                const i32 r = decay(real[i], cos[i]) - decay(imag[i], sin[i]) + (into_real << exponent);
                const i32 m = decay(real[i], sin[i]) + decay(imag[i], cos[i]) + (into_imag << exponent);
                top = larger(top, larger(magnitude(r), magnitude(m)));
                const i32 fire = restart ? m >= threshold : (r >= threshold) & (m >= 0) & (imag[i] < 0);
                real[i] = restart && fire ? 0 : r;
                imag[i] = restart && fire ? threshold - 1 : m;
                sent[i] = fire, kept_real[i] = real[i], kept_imag[i] = imag[i];
            }
        }
        beyond = top >= LIMIT;
        for (int64_t i = 0; i < n && !beyond; i++) s->real_M[b + i] = real[i], s->imag_M[b + i] = imag[i];
    }
    fesetround(before);
    return beyond;
}

typedef struct {
    const i32 *a_TM[2];
    int64_t right[2], left[2], bound[2], currents; /* bound: of what arrives in a step, one source after another */
    i32 *sent_TM, *raw_TM, *kept_TM[3], *state_M[3]; /* the currents, then v_mem at index 2 */
    const i32 *dash_N[2], *dash_mem_N, *vth_N, *bias_N;
    int64_t n, most;
} Xylo;

static inline i32 lost(i32 x, i32 dash) {
    const i32 all = x >> dash;
    return all == 0 && x > 0 ? 1 : all;
}

/* Neurons begin..end of M. Returns 1 where a register could have saturated, else 0. Not for neurons with an alias. */
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
