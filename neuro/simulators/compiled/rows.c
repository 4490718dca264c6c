/* A graded graph without memory, row by row (a row is a token): float in, integer messages through one or two layers of
 * synapses, float out, and everything that the engine would count on the way.
 *
 * Inputs are whole numbers -127..127, so they are products of bytes; what the hidden layer sends is 0..32767. Sums are exact
 * in int32 under the bounds that the caller holds. With AVX-512 VNNI four bytes, or two words, are multiplied and added at
 * once; without it plain loops give the same sums.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#pragma GCC optimize("no-trapping-math")
#if defined(__AVX512VNNI__) && defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define VNNI 1
#endif

typedef int32_t i32;
enum { ROWS = 8, LANES = 16, WIDE = 4 }; /* rows at a time; outputs in a vector; vectors that outputs are padded to */
enum { EVENTS, CLIPPED, INFINITE, SYNOPS, TOP_X, HIDDEN, TOP_HIDDEN, TOP_HIDDEN_V }; /* counts, as in rows.py */
enum { SQUARES = TOP_HIDDEN_V + 1, TOP_SQUARE, SYNOPS_2, OUT, TOP_OUT, TOP_V };

/* first_w: [outputs / 16][sources / 4][16][4] bytes; second_w: [outputs / 16][hidden / 2][16][2] words, outputs padded to 64.
 * first_base: -128 times the sum of each output's weights, since bytes are sent as x + 128; second_base: zeros. */
typedef struct {
    const float *x;
    float *out, *hidden_out;
    const int8_t *constants, *first_w;
    const int16_t *second_w;
    const i32 *first_base, *second_base, *first_fan, *second_fan, *hidden_vth, *out_vth; /* fans: NULL where all are alike */
    const double *units;
    int64_t *stat;
    void *room; /* of ROWS rows: see `rows_room` */
    double offset, rectified;
    int64_t rows, inputs, constant_lines, hidden, outputs;
    float scale, clip;
    i32 input_threshold, first_shift, second_shift, square, square_shift;
} Rows;

static inline i32 magnitude(i32 v) { return v < 0 ? -v : v; }
static inline i32 larger(i32 a, i32 b) { return a > b ? a : b; }
static int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#ifdef VNNI
#define PRODUCT(NAME, TYPE, PER, MULTIPLY)                                                                              \
    static inline __attribute__((always_inline)) void NAME##_block(                                                    \
        const int R, const int V, const TYPE *x, int64_t stride, const void *w, int64_t groups, i32 *acc, int64_t wide) { \
        __m512i sum[8][4];                                                                                             \
        for (int r = 0; r < R; r++)                                                                                    \
            for (int v = 0; v < V; v++) sum[r][v] = _mm512_setzero_si512();                                            \
        for (int64_t k = 0; k < groups; k++) {                                                                         \
            __m512i weight[4];                                                                                         \
            for (int v = 0; v < V; v++) weight[v] = _mm512_loadu_si512((const char *)w + 64 * (v * groups + k));       \
            for (int r = 0; r < R; r++) {                                                                              \
                i32 some;                                                                                              \
                memcpy(&some, x + r * stride + PER * k, 4);                                                            \
                const __m512i sent = _mm512_set1_epi32(some);                                                          \
                for (int v = 0; v < V; v++) sum[r][v] = MULTIPLY(sum[r][v], sent, weight[v]);                          \
            }                                                                                                          \
        }                                                                                                              \
        for (int r = 0; r < R; r++)                                                                                    \
            for (int v = 0; v < V; v++) _mm512_storeu_si512(acc + r * wide + LANES * v, sum[r][v]);                    \
    }                                                                                                                  \
    static void NAME(const TYPE *x, int64_t stride, const void *w, int64_t groups, i32 *acc, int64_t wide, int64_t n) { \
        for (int64_t o = 0; o < wide; o += LANES * WIDE) {                                                             \
            const char *at = (const char *)w + o / LANES * groups * 64;                                                \
            if (n == ROWS)                                                                                             \
                for (int half = 0; half < 2; half++)                                                                   \
                    NAME##_block(8, 2, x, stride, at + 128 * half * groups, groups, acc + o + 32 * half, wide);        \
            else                                                                                                       \
                for (int64_t r = 0; r < n; r++)                                                                        \
                    NAME##_block(1, 4, x + r * stride, stride, at, groups, acc + r * wide + o, wide);                  \
        }                                                                                                              \
    }
#else
#define PRODUCT(NAME, TYPE, PER, MULTIPLY)                                                                              \
    static void NAME(const TYPE *x, int64_t stride, const void *w, int64_t groups, i32 *acc, int64_t wide, int64_t n) { \
        for (int64_t r = 0; r < n; r++)                                                                                \
            for (int64_t o = 0; o < wide; o += LANES) {                                                                \
                i32 sum[LANES] = {0};                                                                                  \
                for (int64_t k = 0; k < groups; k++)                                                                   \
                    for (int j = 0; j < PER; j++) {                                                                    \
                        const i32 sent = x[r * stride + PER * k + j];                                                  \
                        const WEIGHT_##PER *at = (const WEIGHT_##PER *)w + (o / LANES * groups + k) * LANES * PER + j; \
                        for (int i = 0; i < LANES; i++) sum[i] += sent * at[PER * i];                                  \
                    }                                                                                                  \
                memcpy(acc + r * wide + o, sum, sizeof sum);                                                           \
            }                                                                                                          \
    }
#define WEIGHT_4 int8_t
#define WEIGHT_2 int16_t
#endif
PRODUCT(of_bytes, uint8_t, 4, _mm512_dpbusd_epi32)
PRODUCT(of_words, int16_t, 2, _mm512_dpwssd_epi32)

/* Bytes of working memory that `rows_run` needs in `room`. */
int64_t rows_room(const Rows *p) {
    const int64_t sources = padded(p->inputs + p->constant_lines, 4), most = padded(larger(p->hidden, p->outputs), 64);
    const int64_t bytes = padded(sources, 64), words = padded(p->hidden, 64);
    return ROWS * (bytes + 2 * words + 4 * most) + 4 * (bytes + words);
}

/* Of n rows of messages: those other than 0 of each source are added to `each`, where the sources have several fans. */
static int64_t weighted(const i32 *restrict each, const i32 *restrict fan, int64_t n) {
    int64_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (int64_t)each[i] * fan[i];
    return sum;
}

static void top(int64_t *stat, i32 value) { *stat = *stat > value ? *stat : value; }

static void encode(const Rows *p, int64_t first, int64_t n, uint8_t *restrict bytes, int64_t stride, i32 *restrict each) {
    const int64_t inputs = p->inputs;
    const float scale = p->scale, clip = p->clip;
    const i32 least = p->input_threshold;
    i32 events = 0, clipped = 0, infinite = 0, most = 0;
    for (int64_t r = 0; r < n; r++) {
        const float *restrict x = p->x + (first + r) * inputs;
        uint8_t *restrict to = bytes + r * stride;
        for (int64_t i = 0; i < inputs; i++) {
            const float size = fabsf(x[i]);
            infinite += size < INFINITY ? 0 : 1;
            clipped += size > clip ? 1 : 0;
            float q = rintf(x[i] / scale);
            q = q < 127.0f ? q : 127.0f;
            q = q > -127.0f ? q : -127.0f;
            i32 sent = (i32)q;
            const i32 much = magnitude(sent);
            sent = much > least ? sent : 0;
            events += sent != 0;
            most = larger(most, much > least ? much : 0);
            to[i] = (uint8_t)(sent + 128);
        }
        for (int64_t i = 0; i < p->constant_lines; i++) {
            const i32 sent = p->constants[i];
            events += sent != 0;
            most = larger(most, magnitude(sent));
            to[inputs + i] = (uint8_t)(sent + 128);
        }
        for (int64_t i = inputs + p->constant_lines; i < stride; i++) to[i] = 128;
        if (p->first_fan)
            for (int64_t i = 0; i < inputs + p->constant_lines; i++) each[i] += to[i] != 128;
    }
    p->stat[EVENTS] += events, p->stat[CLIPPED] += clipped, p->stat[INFINITE] += infinite;
    top(&p->stat[TOP_X], most);
}

static inline __attribute__((always_inline)) void rectify_by(
    const Rows *p, const int square, const int up, const int by, int64_t first, int64_t n, const i32 *restrict acc,
    int64_t wide, int16_t *restrict words, int64_t stride, i32 *restrict each) {
    const int64_t hidden = p->hidden;
    const i32 *restrict base = p->first_base, *restrict vth = p->hidden_vth;
    const double unit = p->rectified;
    const i32 shift = p->square_shift;
    i32 active = 0, squares = 0, most = 0, most_v = 0, most_square = 0;
    for (int64_t r = 0; r < n; r++) {
        float *restrict shown = p->hidden_out + (first + r) * hidden;
        const i32 *restrict sums = acc + r * wide;
        int16_t *restrict to = words + r * stride;
        for (int64_t i = 0; i < hidden; i++) {
            const i32 sum = sums[i] + base[i], v = up ? (i32)((uint32_t)sum << by) : sum >> by;
            const i32 sent = v > vth[i] ? v : 0, held = sent < 32767 ? sent : 32767; /* beyond it the engine does it all */
            const i32 next = square ? (held * held) >> shift : held;
            most_v = larger(most_v, magnitude(v));
            most = larger(most, sent);
            most_square = larger(most_square, next);
            active += sent != 0;
            squares += next != 0;
            shown[i] = (float)((double)sent * unit);
            to[i] = (int16_t)next;
        }
        for (int64_t i = hidden; i < stride; i++) to[i] = 0;
        if (p->second_fan)
            for (int64_t i = 0; i < hidden; i++) each[i] += to[i] != 0;
    }
    p->stat[HIDDEN] += active, p->stat[SQUARES] += squares;
    top(&p->stat[TOP_HIDDEN], most), top(&p->stat[TOP_HIDDEN_V], most_v), top(&p->stat[TOP_SQUARE], most_square);
}

static void rectify(
    const Rows *p, int64_t first, int64_t n, const i32 *acc, int64_t wide, int16_t *to, int64_t stride, i32 *each) {
    const int up = p->first_shift > 0, by = magnitude(p->first_shift);
    if (up)
        p->square ? rectify_by(p, 1, 1, by, first, n, acc, wide, to, stride, each)
                  : rectify_by(p, 0, 1, by, first, n, acc, wide, to, stride, each);
    else
        p->square ? rectify_by(p, 1, 0, by, first, n, acc, wide, to, stride, each)
                  : rectify_by(p, 0, 0, by, first, n, acc, wide, to, stride, each);
}

static inline __attribute__((always_inline)) void decode_by(
    const Rows *p, const int up, const int by, int64_t first, int64_t n, const i32 *restrict acc, int64_t wide,
    const i32 *restrict base) {
    const int64_t outputs = p->outputs;
    const i32 *restrict vth = p->out_vth;
    const double *restrict units = p->units;
    const double offset = p->offset;
    i32 active = 0, most = 0, most_v = 0;
    for (int64_t r = 0; r < n; r++) {
        float *restrict out = p->out + (first + r) * outputs;
        const i32 *restrict sums = acc + r * wide;
        for (int64_t o = 0; o < outputs; o++) {
            const i32 sum = sums[o] + base[o], v = up ? (i32)((uint32_t)sum << by) : sum >> by, much = magnitude(v);
            const i32 sent = much > vth[o] ? v : 0;
            most_v = larger(most_v, much);
            most = larger(most, magnitude(sent));
            active += sent != 0;
            out[o] = (float)(((double)sent + offset) * units[o]);
        }
    }
    p->stat[OUT] += active;
    top(&p->stat[TOP_OUT], most), top(&p->stat[TOP_V], most_v);
}

static void decode(const Rows *p, int64_t first, int64_t n, const i32 *acc, int64_t wide, const i32 *base, i32 shift) {
    if (shift > 0)
        decode_by(p, 1, shift, first, n, acc, wide, base);
    else
        decode_by(p, 0, -shift, first, n, acc, wide, base);
}

void rows_run(const Rows *p) {
    const int64_t sources = padded(p->inputs + p->constant_lines, 4), bytes = padded(sources, 64);
    const int64_t words = padded(p->hidden, 64), outs = padded(p->outputs, 64);
    uint8_t *sent = p->room;
    int16_t *next = (int16_t *)(sent + ROWS * bytes);
    i32 *acc = (i32 *)(next + ROWS * words), *each_x = acc + ROWS * (words > outs ? words : outs), *each_h = each_x + bytes;
    memset(each_x, 0, 4 * (bytes + words));
    for (int64_t first = 0; first < p->rows; first += ROWS) {
        const int64_t n = p->rows - first < ROWS ? p->rows - first : ROWS;
        encode(p, first, n, sent, bytes, each_x);
        if (!p->hidden) {
            of_bytes(sent, bytes, p->first_w, sources / 4, acc, outs, n);
            decode(p, first, n, acc, outs, p->first_base, p->first_shift);
            continue;
        }
        of_bytes(sent, bytes, p->first_w, sources / 4, acc, words, n);
        rectify(p, first, n, acc, words, next, words, each_h);
        of_words(next, words, p->second_w, padded(p->hidden, 2) / 2, acc, outs, n);
        decode(p, first, n, acc, outs, p->second_base, p->second_shift);
    }
    if (p->first_fan) p->stat[SYNOPS] = weighted(each_x, p->first_fan, p->inputs + p->constant_lines);
    if (p->second_fan) p->stat[SYNOPS_2] = weighted(each_h, p->second_fan, p->hidden);
}
