/* The lif family over T steps, M = samples x neurons, in int32 with wrapping arithmetic (-fwrapv).
 *
 * The same equations as `plain` in scan.py, which is the reference. A decay, |x| keep / 4096 rounded toward zero, is one
 * product in float32 that rounds toward zero: |x| <= 2^23 and keep / 4096 are exact in it, and a number cut to 24 bits and
 * then to an integer is the same integer. Blocks of neurons stay in the first-level cache while time runs.
 *
 * A block runs without the counts of what leaves a register first, and keeps the largest values. If one of them shows that
 * something may have left, the block's states are set back and it runs again with all counts, as its later steps then do.
 */
#include "engine.h"
#include <fenv.h>
#include <string.h>

enum { BLOCK = 512 };

static inline i32 magnitude(i32 x) { return x < 0 ? -x : x; }
static inline i32 larger(i32 x, i32 y) { return x > y ? x : y; }
static inline i32 decay(i32 x, float keep) { return (i32)((float)x * keep); }

/* The same for any x: split at 12 bits, no product leaves 32. */
static inline i32 wide_decay(i32 x, i32 keep) {
    i32 m = magnitude(x), d = (m >> 12) * keep + (((m & 4095) * keep) >> 12);
    return x < 0 ? -d : d;
}

typedef struct {
    i32 wide, wraps, clips, fired, top_a, top_u, top_v;
} Found;

/* One step of n <= BLOCK neurons. `all`: with wraps, clips and their counts. Sums come shifted where `all` is 0. */
static inline __attribute__((always_inline)) void step(
    const int flags, const int all, const int shifts, const Member *restrict m, const i32 *restrict a, int8_t *restrict s,
    i32 *restrict u_, i32 *restrict v_, i32 *restrict r_, const i32 *restrict bias, const float *restrict keeps_u,
    const float *restrict keeps_v, const i32 *restrict highs, const i32 live, const size_t n, Found *restrict found) {
    const i32 low = m->numbers[3], right = m->numbers[4], left = m->numbers[5], rest = m->numbers[6], one_high = m->numbers[2];
    const float one_u = keeps_u[0], one_v = keeps_v[0];
    i32 wide = 0, wraps = 0, clips = 0, fired = 0, top_a = found->top_a, top_u = found->top_u, top_v = found->top_v;
    for (size_t i = 0; i < n; i++) {
        const float keep_u = flags & GENERAL ? keeps_u[i] : one_u, keep_v = flags & GENERAL ? keeps_v[i] : one_v;
        const i32 high = flags & GENERAL ? highs[i] : one_high;
        i32 sum = shifts ? (a[i] >> right) << left : a[i];
        if (all) {
            wide += sum > 32767 || sum < -32768;
            if (flags & CHIP) sum = (int16_t)sum;
        } else
            top_a = larger(top_a, magnitude(sum));
        const i32 before = u_[i] & live; /* Lava wraps it once, not modulo: after a very large sum it is beyond 24 bits */
        i32 u = all && !(flags & CHIP) ? wide_decay(before, (i32)(4096 * keep_u)) : decay(before, keep_u);
        u += (i32)((uint32_t)sum << 6);
        top_u = larger(top_u, magnitude(u));
        if (all) {
            i32 over, under;
            if (flags & CHIP) {
                over = u >= LIMIT, under = u < -LIMIT;
                u = ((u + LIMIT) & (2 * LIMIT - 1)) - LIMIT;
            } else {
                over = u > LIMIT, under = u <= -LIMIT;
                u += (under - over) * (2 * LIMIT);
            }
            wraps += over | under;
        }
        i32 drive = u + bias[i];
        if (all && flags & CHIP) drive = ((drive + LIMIT) & (2 * LIMIT - 1)) - LIMIT;
        i32 v = decay(v_[i] & live, keep_v) + drive;
        if (flags & REFRACTORY) v = r_[i] > 0 ? 0 : v;
        if (flags & LATE) v = r_[i] & live ? (flags & SOFT ? v - high : 0) : v;
        top_v = larger(top_v, magnitude(v));
        if (all) {
            clips += v >= LIMIT || v <= -LIMIT;
            v = v > LIMIT - 1 ? LIMIT - 1 : v < 1 - LIMIT ? 1 - LIMIT : v;
        }
        i32 fire = v > high;
        if (flags & TERNARY) fire -= v < low;
        if (flags & LATE)
            r_[i] = fire;
        else if (!(flags & FREE))
            v = fire ? (flags & SOFT ? v - high : 0) : v;
        if (flags & REFRACTORY) r_[i] = larger((fire ? rest : r_[i]) - 1, 0);
        fired += fire != 0;
        u_[i] = u;
        v_[i] = v;
        s[i] = (int8_t)fire;
    }
    found->wide += wide, found->wraps += wraps, found->clips += clips, found->fired += fired;
    found->top_a = top_a, found->top_u = top_u, found->top_v = top_v;
}

/* Steps t0..t0+T of neurons b..b+n, n <= BLOCK; a: their sums at t0, the next step `a_stride` on. */
static inline __attribute__((always_inline)) Found steps(
    const int flags, const int all, const int shifts, const Member *m, const i32 *a, size_t a_stride, size_t t0, size_t T,
    size_t M, size_t b, size_t n, const float *keeps_u, const float *keeps_v) {
    Found found = {0};
    const i32 *highs = flags & GENERAL ? m->each_3M + 2 * M + b : 0;
    for (size_t t = 0; t < T; t++) {
        const size_t at = (t0 + t) * M + b;
        const i32 live = m->reset_T && m->reset_T[t0 + t] ? 0 : -1;
        step(flags, all, shifts, m, a + t * a_stride, m->sent + at, m->U + b, m->V + b, m->R + b, m->bias + b, keeps_u, keeps_v,
             highs, live, n, &found);
        if (m->u_TM) memcpy(m->u_TM + at, m->U + b, n * sizeof(i32)), memcpy(m->v_TM + at, m->V + b, n * sizeof(i32));
    }
    return found;
}

static inline __attribute__((always_inline)) void block(
    const int flags, const Member *m, const i32 *a_TM, size_t a_stride, size_t t0, size_t T, size_t M, size_t begin, size_t N,
    int *careful, int64_t *stat) {
    float keeps_u[BLOCK], keeps_v[BLOCK];
    i32 u[BLOCK], v[BLOCK], r[BLOCK];
    keeps_u[0] = (float)m->numbers[0] / 4096, keeps_v[0] = (float)m->numbers[1] / 4096;
    const int shifts = m->numbers[4] || m->numbers[5];
    for (size_t o = 0; o < N; o += BLOCK) {
        const size_t n = o + BLOCK < N ? BLOCK : N - o, b = begin + o;
        if (flags & GENERAL)
            for (size_t i = 0; i < n; i++)
                keeps_u[i] = (float)m->each_3M[b + i] / 4096, keeps_v[i] = (float)m->each_3M[M + b + i] / 4096;
        Found found;
        int *wary = careful + o / BLOCK, all = *wary;
        if (!all) {
            for (size_t i = 0; i < n; i++) all |= magnitude(u[i] = m->U[b + i]) > LIMIT;
            memcpy(v, m->V + b, n * sizeof(i32)), memcpy(r, m->R + b, n * sizeof(i32));
        }
        if (!all) {
            found = shifts ? steps(flags, 0, 1, m, a_TM + o, a_stride, t0, T, M, b, n, keeps_u, keeps_v)
                           : steps(flags, 0, 0, m, a_TM + o, a_stride, t0, T, M, b, n, keeps_u, keeps_v);
            all = found.top_a > 32767 || found.top_u + m->numbers[7] >= LIMIT || found.top_v >= LIMIT;
            *wary = all;
            if (all)
                memcpy(m->U + b, u, n * sizeof(i32)), memcpy(m->V + b, v, n * sizeof(i32)), memcpy(m->R + b, r, n * sizeof(i32));
        }
        if (all) found = steps(flags, 1, 1, m, a_TM + o, a_stride, t0, T, M, b, n, keeps_u, keeps_v);
        stat[STAT_WIDE] += found.wide, stat[STAT_WRAPS] += found.wraps, stat[STAT_CLIPS] += found.clips;
        stat[STAT_FIRED] += found.fired;
        if (found.top_u > stat[STAT_TOP_U]) stat[STAT_TOP_U] = found.top_u;
        if (found.top_v > stat[STAT_TOP_V]) stat[STAT_TOP_V] = found.top_v;
        if (m->fired_M)
            for (size_t t = t0; t < t0 + T; t++)
                for (size_t i = 0; i < n; i++) m->fired_M[b + i] += m->sent[t * M + b + i] != 0;
    }
}

#define CASE(f) case f: block(f, m, a_TM, a_stride, t0, T, M, begin, n, careful, stat); break;

/* Steps t0..t0+T of neurons begin..begin+n of M, from sums whose first is neuron `begin` at t0, the next step `a_stride` on.
 * careful: one flag for each BLOCK of n. */
void lif_block(const Member *m, const i32 *a_TM, size_t a_stride, size_t t0, size_t T, size_t M, size_t begin, size_t n,
               int *careful, int64_t *stat) {
    const int before = fegetround();
    fesetround(FE_TOWARDZERO);
    switch (m->flags) {
        CASE(0)
        CASE(TERNARY)
        CASE(CHIP)
        CASE(CHIP | TERNARY)
        CASE(CHIP | REFRACTORY) /* Lava has no refractory period */
        CASE(SOFT)
        CASE(CHIP | SOFT)
        CASE(GENERAL)
        CASE(GENERAL | LATE)
        CASE(GENERAL | SOFT)
        CASE(GENERAL | SOFT | LATE)
        CASE(GENERAL | FREE)
        CASE(CHIP | GENERAL)
        CASE(CHIP | GENERAL | LATE)
        CASE(CHIP | GENERAL | SOFT)
        CASE(CHIP | GENERAL | SOFT | LATE)
        CASE(CHIP | GENERAL | FREE)
    }
    fesetround(before);
}
