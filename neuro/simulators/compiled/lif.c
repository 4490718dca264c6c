/* One population of the lif family over T steps, M = samples x neurons, in int32 with wrapping arithmetic (-fwrapv).
 *
 * The same equations as `plain` in scan.py, which is the reference. |x| keep >> 12 is split at 12 bits so that every
 * product fits 32 bits. Blocks of neurons stay in the first-level cache while time runs.
 */
#include <stdint.h>
#include <stddef.h>
#include <string.h>

typedef int32_t i32;
enum { LIMIT = 1 << 23, BLOCK = 512 };
enum { CHIP = 1, TERNARY = 2, REFRACTORY = 4, SOFT = 8, GENERAL = 16, FREE = 32, LATE = 64 };

static inline i32 magnitude(i32 x) { return x < 0 ? -x : x; }
static inline i32 larger(i32 x, i32 y) { return x > y ? x : y; }

static inline i32 decay(i32 x, i32 keep) {
    i32 m = magnitude(x), d = (m >> 12) * keep + (((m & 4095) * keep) >> 12);
    return x < 0 ? -d : d;
}

/* p: keep_u, keep_v, threshold, lower threshold, right shift, left shift, refractory steps
 * each_3M, with GENERAL: keep_u, keep_v, threshold of each neuron instead. With LATE, R is whether it fired a step before. */
static inline __attribute__((always_inline)) void run(
    const int flags, const i32 *restrict a_TM, int8_t *restrict s_TM, i32 *restrict u_TM, i32 *restrict v_TM,
    i32 *restrict U, i32 *restrict V, i32 *restrict R, const i32 *restrict bias, const uint8_t *restrict reset_T,
    const i32 *p, const i32 *restrict each_3M, int64_t *restrict stat, i32 *restrict fired_M, size_t T, size_t M,
    size_t begin, size_t end) {
    const i32 low = p[3], right = p[4], left = p[5], rest = p[6];
    for (size_t b = begin; b < end; b += BLOCK) {
        const size_t n = b + BLOCK < end ? BLOCK : end - b;
        i32 wide[BLOCK] = {0}, wraps[BLOCK] = {0}, clips[BLOCK] = {0}, fired[BLOCK] = {0}, top_u[BLOCK] = {0}, top_v[BLOCK] = {0};
        i32 *restrict u_ = U + b, *restrict v_ = V + b, *restrict r_ = R + b;
        const i32 *restrict bias_ = bias + b;
        const i32 *restrict keeps_u = each_3M + b, *restrict keeps_v = each_3M + M + b, *restrict highs = each_3M + 2 * M + b;
        for (size_t t = 0; t < T; t++) {
            const i32 *restrict a = a_TM + t * M + b;
            int8_t *restrict s = s_TM + t * M + b;
            const i32 live = reset_T && reset_T[t] ? 0 : -1;
            for (size_t i = 0; i < n; i++) {
                const i32 keep_u = flags & GENERAL ? keeps_u[i] : p[0], keep_v = flags & GENERAL ? keeps_v[i] : p[1];
                const i32 high = flags & GENERAL ? highs[i] : p[2];
                i32 sum = (a[i] >> right) << left;
                wide[i] += sum > 32767 || sum < -32768;
                if (flags & CHIP) sum = (int16_t)sum;
                i32 u = decay(u_[i] & live, keep_u) + (i32)((uint32_t)sum << 6);
                top_u[i] = larger(top_u[i], magnitude(u));
                i32 over, under;
                if (flags & CHIP) {
                    over = u >= LIMIT, under = u < -LIMIT;
                    u = ((u + LIMIT) & (2 * LIMIT - 1)) - LIMIT;
                } else {
                    over = u > LIMIT, under = u <= -LIMIT;
                    u += (under - over) * (2 * LIMIT);
                }
                wraps[i] += over | under;
                i32 drive = u + bias_[i];
                if (flags & CHIP) drive = ((drive + LIMIT) & (2 * LIMIT - 1)) - LIMIT;
                i32 v = decay(v_[i] & live, keep_v) + drive;
                if (flags & REFRACTORY) v = r_[i] > 0 ? 0 : v;
                if (flags & LATE) v = r_[i] & live ? (flags & SOFT ? v - high : 0) : v;
                top_v[i] = larger(top_v[i], magnitude(v));
                clips[i] += v >= LIMIT || v <= -LIMIT;
                v = v > LIMIT - 1 ? LIMIT - 1 : v < 1 - LIMIT ? 1 - LIMIT : v;
                i32 fire = v > high;
                if (flags & TERNARY) fire -= v < low;
                if (flags & LATE)
                    r_[i] = fire;
                else if (!(flags & FREE))
                    v = fire ? (flags & SOFT ? v - high : 0) : v;
                if (flags & REFRACTORY) r_[i] = larger((fire ? rest : r_[i]) - 1, 0);
                fired[i] += fire != 0;
                u_[i] = u;
                v_[i] = v;
                s[i] = (int8_t)fire;
            }
            if (u_TM) memcpy(u_TM + t * M + b, u_, n * sizeof(i32)), memcpy(v_TM + t * M + b, v_, n * sizeof(i32));
        }
        for (size_t i = 0; i < n; i++) {
            stat[0] += wide[i], stat[1] += wraps[i], stat[2] += clips[i], stat[3] += fired[i];
            if (top_u[i] > stat[4]) stat[4] = top_u[i];
            if (top_v[i] > stat[5]) stat[5] = top_v[i];
        }
        if (fired_M)
            for (size_t i = 0; i < n; i++) fired_M[b + i] += fired[i];
    }
}

#define CASE(f) case f: run(f, a, s, u, v, U, V, R, bias, reset, p, each, stat, fired_M, T, M, begin, end); break;

void lif_scan(int flags, const i32 *a, int8_t *s, i32 *u, i32 *v, i32 *U, i32 *V, i32 *R, const i32 *bias,
              const uint8_t *reset, const i32 *p, const i32 *each, int64_t *stat, i32 *fired_M, size_t T, size_t M,
              size_t begin, size_t end) {
    switch (flags) {
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
}
