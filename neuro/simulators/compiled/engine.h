/* What the C files share. Letters: T steps, B samples, S sources, O targets, M = samples x neurons, R rows = steps x samples. */
#ifndef SPIKEGATE_ENGINE_H
#define SPIKEGATE_ENGINE_H
#include <stddef.h>
#include <stdint.h>

typedef int32_t i32;
enum { LIMIT = 1 << 23 };
enum { CHIP = 1, TERNARY = 2, REFRACTORY = 4, SOFT = 8, GENERAL = 16, FREE = 32, LATE = 64 };
enum { STAT_WIDE, STAT_WRAPS, STAT_CLIPS, STAT_FIRED, STAT_TOP_U, STAT_TOP_V, STAT_BY_EVENTS, STAT_DENSE, STATS };
enum { DENSE, SPARSE, CONV };          /* kinds of synapses */
enum { EVENTS, VNNI, AMX };            /* ways of a product; EVENTS is there always */
enum { ROOM = 32 };                    /* rows of a product's buffers are rounded up to this */

/* Synapses of one source onto the targets; calls.py has the same fields in the same order. */
typedef struct {
    const int8_t *messages; /* those that arrive at step 0: (B, S), the next step `stride` bytes on */
    int64_t stride, sources, targets;
    int64_t width;          /* S rounded up to 64, or a convolution's taps rounded up to 64 */
    int64_t kind, binary, inside, right, left;
    const uint8_t *rows;    /* dense: (S, row_bytes), weight + 128; 64 columns lie as 0, 32, 1, 33, ... */
    int64_t row_bytes;
    const int8_t *packed;   /* dense, conv: (O / 16, width / 4, 16, 4), O rounded up to 32 */
    const i32 *column_sums; /* (O,) */
    const i32 *starts, *index; /* sparse: synapses of source s are starts[s]..starts[s + 1], their targets and `weight` */
    const int8_t *weight;      /* conv: (groups, taps, channels) */
    /* conv, whose targets are (positions, groups, channels) and whose sources (places, groups, channels_in); of one group: */
    int64_t positions, places, groups, channels, channels_in, taps;
    const i32 *runs;           /* per position runs[p]..runs[p + 1]: what its patch is copied from, */
    const i32 *run;            /* each (offset in the patch, source, bytes) */
    const i32 *hits;           /* per place hits[p]..hits[p + 1]: where its messages go, */
    const i32 *hit;            /* each (position, tap of channel 0) */
} Input;

/* One population of the lif family; without neurons (`sums` set) only what arrives is written. */
typedef struct {
    Input *inputs;
    int64_t count, size, flags;
    i32 numbers[8];         /* keep_u, keep_v, threshold, lower threshold, right shift, left shift, refractory, bound of |bias| */
    int8_t *sent;           /* step 0: (B, O) */
    i32 *sums, *u_TM, *v_TM, *U, *V, *R;
    const i32 *bias, *each_3M;
    const uint8_t *reset_T;
    i32 *fired_M;
} Member;

typedef struct {
    int64_t rows;           /* most rows of one product */
    int8_t *packed;         /* (rows, width) messages */
    i32 *sums;              /* (rows, O) */
    i32 *who, *what;        /* sources with events, their messages */
    i32 *one;               /* one row of sums in the order of `rows` of Input */
    int8_t *patches;        /* conv: (positions, width) */
} Scratch;

int best_product(void);
int product(const Input *in, int64_t rows, i32 *out, Scratch *scratch, int way);
int convolve(const Input *in, int64_t rows, i32 *out, Scratch *scratch, int way);
int64_t find_events(const int8_t *row, int64_t width, i32 *who, i32 *what, int *ones);
void dense_product(int way, const int8_t *a, int64_t width, int64_t rows, const int8_t *packed, const i32 *column_sums,
                   int64_t targets, i32 *out, int64_t row_stride, int negative);
void lif_block(const Member *m, const i32 *a_TM, size_t a_stride, size_t t0, size_t T, size_t M, size_t begin, size_t n,
               int *careful, int64_t *stat);
#endif
