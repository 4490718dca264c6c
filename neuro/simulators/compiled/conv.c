/* Convolutions: by events, each adding its weights to the positions that see it, or dense over patches that are copied out. */
#include "engine.h"
#include <string.h>

enum { PATCHES = 256 }; /* positions whose patches are held at a time */

static void by_events(const Input *in, const i32 *who, const i32 *what, int64_t n, i32 *out) {
    const int64_t channels = in->channels, all = in->groups * channels, sources = in->groups * in->channels_in;
    memset(out, 0, in->targets * sizeof(i32));
    for (int64_t e = 0; e < n; e++) {
        const int64_t place = who[e] / sources, channel = who[e] % sources, group = channel / in->channels_in;
        const int8_t *first = in->weight + (group * in->taps + channel % in->channels_in) * channels;
        const i32 x = what[e];
        for (i32 k = in->hits[place]; k < in->hits[place + 1]; k++) {
            const int8_t *restrict w = first + in->hit[2 * k + 1] * channels;
            i32 *restrict to = out + in->hit[2 * k] * all + group * channels;
            for (int64_t c = 0; c < channels; c++) to[c] += x * w[c];
        }
    }
}

static void copy_patches(const Input *in, const int8_t *row, int64_t group, int64_t first, int64_t count, int8_t *patches) {
    memset(patches, 0, count * in->width);
    row += group * in->channels_in;
    for (int64_t p = 0; p < count; p++)
        for (i32 k = in->runs[first + p]; k < in->runs[first + p + 1]; k++) {
            const i32 *run = in->run + 3 * k;
            memcpy(patches + p * in->width + run[0], row + run[1], run[2]);
        }
}

/* As `product`; the rows of scratch->packed are S rounded up to 64. */
int convolve(const Input *in, int64_t rows, i32 *out, Scratch *scratch, int way) {
    const int64_t wide = (in->sources + 63) / 64 * 64, block = (in->channels + 31) / 32 * 32;
    const int64_t one_dense = in->positions * in->groups * in->width * (block + 32);
    int64_t dense = 0;
    for (int64_t r = 0; r < rows; r++) {
        const int8_t *row = scratch->packed + r * wide;
        i32 *to = out + r * in->targets;
        int ones;
        const int64_t n = find_events(row, wide, scratch->who, scratch->what, &ones);
        const int64_t synapses = n * in->hits[in->places] / in->places * (in->channels + 16);
        if (way == EVENTS || synapses * 64 < one_dense) { /* measured: synapses are so much slower */
            by_events(in, scratch->who, scratch->what, n, to);
            continue;
        }
        dense++;
        int8_t least = 0;
        for (int64_t i = 0; i < wide; i++) least = row[i] < least ? row[i] : least;
        for (int64_t g = 0; g < in->groups; g++)
            for (int64_t p = 0; p < in->positions; p += PATCHES) {
                const int64_t count = in->positions - p < PATCHES ? in->positions - p : PATCHES;
                copy_patches(in, row, g, p, count, scratch->patches);
                dense_product(way, scratch->patches, in->width, count, in->packed + g * block * in->width,
                              in->column_sums + g * in->channels, in->channels,
                              to + (p * in->groups + g) * in->channels, in->groups * in->channels, least < 0);
            }
    }
    return 2 * dense > rows;
}
