/* The Transformer's forward for rows that each stand somewhere in a text of their own, in fp32.
 *
 * Every number of a row is a sum in an order that depends on the row alone: along the inputs for a product, along the
 * positions for attention. How many rows are computed together, which ones, and in what order, changes no bit of any of
 * them; reading a prompt at once gives the bits of reading it token by token.
 *
 * A row is `line` floats long, the width up to the next multiple of 16, zeros behind the width.
 */
#ifndef SPIKEGATE_DECODER_H
#define SPIKEGATE_DECODER_H
#include <stdint.h>

typedef int64_t i64;
enum { LANES = 16, CHUNK = 48 }; /* floats of a vector; rows that go through a layer together */

typedef struct {
    i64 layers, width, line, heads, head_width, hidden, hidden_line, vocab, vocab_line, squared;
    const float *embed;     /* (vocab, width) */
    const float *cos, *sin; /* (context, head_width / 2) */
    const float *norms;     /* (2 x layers + 1, line): before attention and MLP of each layer, at the end */
    const float *matrices;  /* as `pack` lays them: qkv (3 x line), o, fc1, fc2 of each layer; the head */
    float eps;
} Model;

/* Keys and values of a slot: for each layer keys (heads, head_width, positions), then values (positions, line). */
typedef struct {
    float *kept;
    i64 positions; /* multiple of 16 */
} Cache;

typedef float v16 __attribute__((vector_size(64)));
typedef float v16u __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t v16i __attribute__((vector_size(64)));

static inline i64 up16(i64 n) { return (n + LANES - 1) / LANES * LANES; }
static inline v16 load(const float *from) { return *(const v16u *)from; }
static inline void store(float *to, v16 v) { *(v16u *)to = v; }
static inline v16 all(float x) { return (v16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
static inline v16 pick(v16i where, v16 a, v16 b) { return (v16)((where & (v16i)a) | (~where & (v16i)b)); }
static inline float largest_of(v16 v) {
    float found = v[0];
    for (int i = 1; i < LANES; i++) found = v[i] > found ? v[i] : found;
    return found;
}
static inline float sum_of(v16 v) {
    float s[LANES / 2];
    for (int i = 0; i < 8; i++) s[i] = v[i] + v[i + 8];
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

/* e^x to about 2 ulp, 0 below -87: x = n ln 2 + r, a polynomial of r (coefficients of Cephes' expf, S. L. Moshier). */
static inline v16 exp16(v16 x) {
    const v16i gone = x < all(-87.0f);
    x = pick(gone, all(-87.0f), x);
    x = pick(x > all(88.0f), all(88.0f), x);
    const v16 magic = all(12582912.0f);
    const v16 n = (x * all(1.44269504088896341f) + magic) - magic;
    const v16 r = (x - n * all(0.693359375f)) + n * all(2.12194440e-4f);
    v16 p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * (r * r) + r + all(1.0f);
    const v16i power = (__builtin_convertvector(n, v16i) + 127) << 23;
    return pick(gone, all(0.0f), p * (v16)power);
}

i64 packed_floats(i64 outputs, i64 inputs);
i64 room_floats(const Model *m, i64 positions);
i64 slot_floats(const Model *m, i64 positions);
void forward(const Model *m, Cache cache, i64 rows, const i64 *token, const i64 *place, const i64 *slot, float *room);
void logits_of(const Model *m, i64 rows, const float *x, float *out, float *room);
#endif
