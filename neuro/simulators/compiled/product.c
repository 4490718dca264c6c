/* Exact products of rows of 8-bit messages with 8-bit weights, in int32: by events, or dense by what the processor has.
 *
 * By events: the weights of each source that sent something are added up, so that the work goes with the events. Weights
 * lie as bytes + 128, two to a 16-bit lane; a lane's sum and the sum of its upper bytes give both, exactly for 256 events.
 * Dense: VNNI (four products of bytes to a lane) or AMX (16 x 64 bytes to a tile), where the compiler was told of them.
 */
#include "engine.h"
#include <string.h>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define HAS_VNNI 1
#endif
#if defined(__AMX_INT8__) && defined(__AVX512BW__) && defined(__linux__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef uint16_t lanes __attribute__((vector_size(64), aligned(1), may_alias));
#ifdef __AVX512BW__
enum { GROUPS = 8 }; /* of 64 columns, whose two sums stay in registers */
#else
enum { GROUPS = 2 };
#endif
enum { BATCH = 256, AHEAD = 4 };

/* Events a dense product is worth: it takes them where a row has more than S / DENSE_FROM of them (measured; VNNI on a Zen
 * processor at n = 256 and 1024: both cost the same at 16 to 20 % firing). */
static const int64_t DENSE_FROM[] = {[EVENTS] = 1, [VNNI] = 6, [AMX] = 32};

/* Sources of a row that sent something, in order, and what; `ones`: nothing but 1. The lists hold `width` + 64. */
int64_t find_events(const int8_t *row, int64_t width, i32 *who, i32 *what, int *ones) {
    int64_t n = 0;
#ifdef __AVX512VBMI2__ /* without a branch for each event, which cannot be foreseen */
    static const int8_t places[64] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                      22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
                                      44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    const __m512i place = _mm512_loadu_si512(places);
    __mmask64 others = 0;
    for (int64_t at = 0; at < width; at += 64) {
        const __m512i bytes = _mm512_loadu_si512(row + at);
        const __mmask64 some = _mm512_test_epi8_mask(bytes, bytes);
        const int here = __builtin_popcountll(some);
        others |= _mm512_mask_cmpneq_epi8_mask(some, bytes, _mm512_set1_epi8(1));
        const __m512i from = _mm512_maskz_compress_epi8(some, place), sent = _mm512_maskz_compress_epi8(some, bytes);
        const __m512i first = _mm512_set1_epi32((i32)at);
        int k = 0;
        do { /* the lists have room for 64 more */
            const __m128i i = k == 0 ? _mm512_castsi512_si128(from) : k == 16 ? _mm512_extracti32x4_epi32(from, 1)
                              : k == 32 ? _mm512_extracti32x4_epi32(from, 2) : _mm512_extracti32x4_epi32(from, 3);
            const __m128i x = k == 0 ? _mm512_castsi512_si128(sent) : k == 16 ? _mm512_extracti32x4_epi32(sent, 1)
                              : k == 32 ? _mm512_extracti32x4_epi32(sent, 2) : _mm512_extracti32x4_epi32(sent, 3);
            _mm512_storeu_si512(who + n + k, _mm512_add_epi32(first, _mm512_cvtepi8_epi32(i)));
            _mm512_storeu_si512(what + n + k, _mm512_cvtepi8_epi32(x));
            k += 16;
        } while (k < here);
        n += here;
    }
    *ones = !others;
    return n;
#else
    int one = 1;
    for (int64_t at = 0; at < width; at += 64) {
#ifdef __AVX512BW__
        const __m512i bytes = _mm512_loadu_si512(row + at);
        uint64_t some = _mm512_test_epi8_mask(bytes, bytes);
#else
        uint64_t some = 0;
        for (int i = 0; i < 64; i += 8) {
            uint64_t eight;
            memcpy(&eight, row + at + i, 8);
            if (!eight) continue;
            for (int k = i; k < i + 8; k++) some |= (uint64_t)(row[at + k] != 0) << k;
        }
#endif
        for (; some; some &= some - 1) {
            const int i = __builtin_ctzll(some);
            who[n] = (i32)(at + i), what[n] = row[at + i];
            one &= what[n++] == 1;
        }
    }
    *ones = one;
    return n;
#endif
}

static inline __attribute__((always_inline)) void add_groups(
    const int groups, const uint8_t *rows, int64_t row_bytes, const i32 *who, int64_t n, i32 *out, int64_t columns) {
    for (int64_t first = 0; first == 0 || first < n; first += BATCH) {
        const int64_t count = n - first < BATCH ? n - first : BATCH;
        lanes whole[GROUPS] = {{0}}, upper[GROUPS] = {{0}};
        for (int64_t e = 0; e < count; e++) {
            const lanes *w = (const lanes *)(rows + who[first + e] * row_bytes);
            const lanes *soon = (const lanes *)(rows + who[first + (e + AHEAD < count ? e + AHEAD : e)] * row_bytes);
            for (int g = 0; g < groups; g++) __builtin_prefetch(soon + g);
            for (int g = 0; g < groups; g++) {
                const lanes x = w[g];
                whole[g] += x;
                upper[g] += x >> 8;
            }
        }
        for (int g = 0; g < groups; g++) {
            uint16_t sums[64];
            const lanes lower = whole[g] - (upper[g] << 8);
            memcpy(sums, &lower, 64), memcpy(sums + 32, &upper[g], 64);
            const int64_t held = columns - 64 * g;
            const i32 much = 128 * (i32)count;
            i32 *to = out + 64 * g;
            if (held >= 64 && !first)
                for (int i = 0; i < 64; i++) to[i] = sums[i] - much;
            else
                for (int i = 0; i < held && i < 64; i++) to[i] = (first ? to[i] : 0) + sums[i] - much;
        }
    }
}

/* One row of sums: weights of the sources `who`, times `what` unless those are all 1. */
static void by_events(const Input *in, const i32 *who, const i32 *what, int64_t n, int ones, i32 *out, i32 *one) {
    const int64_t all = in->row_bytes;
    if (ones) {
        for (int64_t c = 0; c < all;) {
            const uint8_t *rows = in->rows + c;
            i32 *to = out + c;
            const int64_t columns = in->targets - c, groups = (all - c) / 64;
            if (groups >= GROUPS)
                add_groups(GROUPS, rows, all, who, n, to, columns), c += 64 * GROUPS;
            else if (groups >= 4)
                add_groups(4, rows, all, who, n, to, columns), c += 256;
            else if (groups >= 2)
                add_groups(2, rows, all, who, n, to, columns), c += 128;
            else
                add_groups(1, rows, all, who, n, to, columns), c += 64;
        }
        return;
    }
    memset(one, 0, all * sizeof(i32));
    i32 total = 0;
    for (int64_t e = 0; e < n; e++) {
        const uint8_t *w = in->rows + who[e] * all;
        const i32 x = what[e];
        for (int64_t i = 0; i < all; i++) one[i] += x * w[i];
        total += x;
    }
    for (int64_t o = 0; o < in->targets; o++) {
        const int64_t i = o & 63;
        out[o] = one[o - i + (i < 32 ? 2 * i : 2 * i - 63)] - 128 * total;
    }
}

static void by_synapses(const Input *in, const i32 *who, const i32 *what, int64_t n, i32 *out) {
    memset(out, 0, in->targets * sizeof(i32));
    for (int64_t e = 0; e < n; e++)
        for (i32 k = in->starts[who[e]]; k < in->starts[who[e] + 1]; k++) out[in->index[k]] += what[e] * in->weight[k];
}

#ifdef HAS_VNNI
enum { VNNI_ROWS = 8 }; /* with two vectors of columns: 16 sums in registers, enough to hide the instruction's latency */

/* As _mm512_dpbusd_epi32, in place: GCC 12 copies the sums of the intrinsic to other registers and to the stack at each turn. */
static inline __attribute__((always_inline)) void add_four(__m512i *sum, __m512i x, __m512i w) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(x), "v"(w));
}

/* VNNI_ROWS rows times 32 columns; a number of four messages comes straight from memory, so that loads bound nothing.
 * The instruction takes unsigned bytes on one side: messages below 0 get 128 more, which `less` takes off afterwards. */
static inline __attribute__((always_inline)) void vnni_tile(const int negative, const int8_t *a, int64_t width, int64_t held,
                                                            const int8_t *b0, const __m512i less[2], const __mmask16 columns[2],
                                                            i32 *out, int64_t row_stride) {
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    const int8_t *b1 = b0 + 16 * width;
    __m512i sum[VNNI_ROWS][2];
    for (int i = 0; i < VNNI_ROWS; i++) sum[i][0] = sum[i][1] = _mm512_setzero_si512();
    for (int64_t q = 0; q < width / 4; q++) {
        const __m512i w0 = _mm512_loadu_si512(b0 + 64 * q), w1 = _mm512_loadu_si512(b1 + 64 * q);
        for (int i = 0; i < VNNI_ROWS; i++) { /* the buffer has ROOM for rows that are not there */
            i32 four;
            memcpy(&four, a + i * width + 4 * q, 4);
            __m512i x = _mm512_set1_epi32(four);
            if (negative) x = _mm512_xor_si512(x, flip);
            add_four(&sum[i][0], x, w0), add_four(&sum[i][1], x, w1);
        }
    }
    for (int i = 0; i < VNNI_ROWS; i++)
        for (int h = 0; h < 2 && i < held; h++) {
            if (negative) sum[i][h] = _mm512_sub_epi32(sum[i][h], less[h]);
            _mm512_mask_storeu_epi32(out + i * row_stride + 16 * h, columns[h], sum[i][h]);
        }
}

static void by_vnni(const int8_t *a, int64_t width, int64_t rows, const int8_t *packed, const i32 *column_sums,
                    int64_t targets, i32 *out, int64_t row_stride, int negative) {
    for (int64_t c = 0; c < targets; c += 32) {
        __m512i less[2];
        __mmask16 columns[2];
        for (int h = 0; h < 2; h++) {
            const int64_t held = targets - c - 16 * h;
            columns[h] = held >= 16 ? 0xffff : held > 0 ? (1 << held) - 1 : 0;
            less[h] = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(columns[h], column_sums + c + 16 * h), 7);
        }
        for (int64_t r = 0; r < rows; r += VNNI_ROWS) {
            const int8_t *from = a + r * width, *weights = packed + c * width;
            i32 *to = out + r * row_stride + c;
            if (negative)
                vnni_tile(1, from, width, rows - r, weights, less, columns, to, row_stride);
            else
                vnni_tile(0, from, width, rows - r, weights, less, columns, to, row_stride);
        }
    }
}
#endif

#ifdef HAS_AMX
static void by_amx(const int8_t *a, int64_t width, int64_t rows, const int8_t *packed, int64_t targets, i32 *out,
                   int64_t row_stride) {
    struct {
        uint8_t palette, start, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    _tile_loadconfig(&shape);
    i32 edge[32 * 32];
    for (int64_t c = 0; c < targets; c += 32)
        for (int64_t r = 0; r < rows; r += 32) {
            const int8_t *a0 = a + r * width, *a1 = a0 + 16 * width, *b0 = packed + c * width, *b1 = b0 + 16 * width;
            const int upper = rows - r <= 16; /* the lower 16 rows are not there */
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t k = 0; k < width; k += 64) {
                _tile_loadd(4, a0 + k, width);
                _tile_loadd(6, b0 + 16 * k, 64);
                _tile_dpbssd(0, 4, 6);
                _tile_loadd(7, b1 + 16 * k, 64);
                _tile_dpbssd(1, 4, 7);
                if (upper) continue;
                _tile_loadd(5, a1 + k, width);
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            }
            const int whole = targets - c >= 32 && rows - r >= 32;
            i32 *to = whole ? out + r * row_stride + c : edge;
            const int64_t bytes = (whole ? row_stride : 32) * 4;
            _tile_stored(0, to, bytes);
            _tile_stored(1, to + 16, bytes);
            if (!upper) {
                _tile_stored(2, to + 4 * bytes, bytes);
                _tile_stored(3, to + 4 * bytes + 16, bytes);
            }
            if (!whole)
                for (int64_t i = 0; i < rows - r && i < 32; i++)
                    memcpy(out + (r + i) * row_stride + c, edge + 32 * i, (targets - c < 32 ? targets - c : 32) * sizeof(i32));
        }
    _tile_release();
}
#endif

/* The quickest dense product of this machine, EVENTS where there is none. */
int best_product(void) {
#ifdef HAS_AMX
    enum { ASK_FOR_A_FEATURE = 0x1023, TILES = 18 }; /* Linux grants the tiles' registers on demand */
    if (!syscall(SYS_arch_prctl, ASK_FOR_A_FEATURE, TILES)) return AMX;
#endif
#ifdef HAS_VNNI
    return VNNI;
#endif
    return EVENTS;
}

void dense_product(int way, const int8_t *a, int64_t width, int64_t rows, const int8_t *packed, const i32 *column_sums,
                   int64_t targets, i32 *out, int64_t row_stride, int negative) {
#ifdef HAS_AMX
    if (way == AMX) by_amx(a, width, rows, packed, targets, out, row_stride);
#endif
#ifdef HAS_VNNI
    if (way == VNNI) by_vnni(a, width, rows, packed, column_sums, targets, out, row_stride, negative);
#endif
}

/* Sums (rows, O) of the messages in scratch->packed; 1 where it was dense, 0 by events. */
int product(const Input *in, int64_t rows, i32 *out, Scratch *scratch, int way) {
    const int8_t *a = scratch->packed;
    const int64_t size = rows * in->width;
    if (in->kind == CONV) return convolve(in, rows, out, scratch, way);
    if (in->kind == DENSE && way != EVENTS) {
        int64_t events = 0;
        for (int64_t i = 0; i < size; i += 64) { /* in bytes, which a loop over 64 of them vectorises */
            uint8_t some = 0;
            for (int j = 0; j < 64; j++) some += a[i + j] != 0;
            events += some;
        }
        const int64_t as_rows = way == AMX ? (rows + 15) / 16 * 16 : (rows + 7) / 8 * 8;
        if (events * DENSE_FROM[way] > as_rows * in->sources) {
            int8_t least = 0;
            for (int64_t i = 0; i < size; i++) least = a[i] < least ? a[i] : least;
            dense_product(way, a, in->width, rows, in->packed, in->column_sums, in->targets, out, in->targets, least < 0);
            return 1;
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        int ones;
        const int64_t n = find_events(a + r * in->width, in->width, scratch->who, scratch->what, &ones);
        if (in->kind == DENSE)
            by_events(in, scratch->who, scratch->what, n, ones, out + r * in->targets, scratch->one);
        else
            by_synapses(in, scratch->who, scratch->what, n, out + r * in->targets);
    }
    return 0;
}
