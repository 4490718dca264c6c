#include "decoder.h"

#include <math.h>
#include <string.h>

enum { ROWS = 6, PANELS = 4, WIDE = 8, WIDE_ROWS = 3 };
enum { PUT, ADD, RELU, RELU2 };

/* R rows times V panels of 16 outputs: sums along the inputs in their order. A panel's next input is `next` floats on, the
 * next panel `panel` floats. */
static inline __attribute__((always_inline)) void block(
    const int R, const int V, const int how, const float *x, i64 x_line, const float *w, i64 next, i64 panel, i64 inputs,
    float *y, i64 y_line) {
    v16 sum[ROWS][WIDE];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sum[r][v] = all(0.0f);
    for (i64 k = 0; k < inputs; k++) {
        v16 weight[WIDE];
        for (int v = 0; v < V; v++) weight[v] = load(w + v * panel + k * next);
        for (int r = 0; r < R; r++) {
            const v16 one = all(x[r * x_line + k]);
            for (int v = 0; v < V; v++) sum[r][v] += one * weight[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            float *to = y + r * y_line + v * LANES;
            v16 found = sum[r][v];
            if (how == ADD) found += load(to);
            if (how == RELU || how == RELU2) found = pick(found > all(0.0f), found, all(0.0f));
            if (how == RELU2) found *= found;
            store(to, found);
        }
}

#define ONE(HOW, R, V)                                                                       \
    case (HOW) * 100 + (R) * 10 + (V):                                                       \
        block(R, V, HOW, x, x_line, w, LANES, inputs * LANES, inputs, y, y_line);            \
        break;
#define EACH_V(HOW, R) ONE(HOW, R, 1) ONE(HOW, R, 2) ONE(HOW, R, 3) ONE(HOW, R, 4)
#define EACH_R(HOW)                                                                          \
    EACH_V(HOW, 1) EACH_V(HOW, 2) EACH_V(HOW, 3) EACH_V(HOW, 4) EACH_V(HOW, 5) EACH_V(HOW, 6) \
    ONE(HOW, 1, 8) ONE(HOW, 2, 8) ONE(HOW, 3, 8)

/* y (rows, outputs) = x (rows, inputs) times a packed matrix. */
static void product(
    int how, i64 rows, const float *x, i64 x_line, i64 inputs, const float *matrix, i64 outputs, float *y_all, i64 y_line) {
    const i64 panels = up16(outputs) / LANES;
    const i64 most = rows <= WIDE_ROWS ? WIDE : PANELS;
    const float *x_all = x;
    for (i64 first = 0; first < panels;) {
        i64 wide = panels - first;
        wide = wide >= most ? most : wide > PANELS ? PANELS : wide;
        const float *w = matrix + first * inputs * LANES;
        for (i64 row = 0, left = (rows + ROWS - 1) / ROWS, here; row < rows; row += here, left--) {
            here = (rows - row + left - 1) / left; /* blocks of like size: 8 rows are 4 and 4 */
            float *y = y_all + row * y_line + first * LANES;
            x = x_all + row * x_line;
            switch (how * 100 + here * 10 + wide) {
                EACH_R(PUT)
                EACH_R(ADD)
                EACH_R(RELU)
                EACH_R(RELU2)
            }
        }
        first += wide;
    }
}

i64 packed_floats(i64 outputs, i64 inputs) { return up16(outputs) * inputs; }

/* A matrix (outputs, inputs) as panels of 16 outputs: (outputs / 16, inputs, 16), zeros where there is none. */
void pack(const float *from, i64 outputs, i64 inputs, float *to) {
    for (i64 first = 0; first < outputs; first += LANES) {
        const i64 here = outputs - first < LANES ? outputs - first : LANES;
        for (i64 k0 = 0; k0 < inputs; k0 += LANES) {
            const i64 stop = inputs - k0 < LANES ? inputs : k0 + LANES;
            for (i64 i = 0; i < LANES; i++)
                for (i64 k = k0; k < stop; k++) to[k * LANES + i] = i < here ? from[(first + i) * inputs + k] : 0.0f;
        }
        to += inputs * LANES;
    }
}

static void norm(const Model *m, i64 rows, const float *x, const float *gain, float *y) {
    for (i64 row = 0; row < rows; row++, x += m->line, y += m->line) {
        v16 squares = all(0.0f);
        for (i64 i = 0; i < m->line; i += LANES) squares += load(x + i) * load(x + i);
        const v16 scale = all(1.0f / sqrtf(sum_of(squares) / (float)m->width + m->eps));
        for (i64 i = 0; i < m->line; i += LANES) store(y + i, load(x + i) * scale * load(gain + i));
    }
}

/* Each pair of channels (i, i + half) of a head by its position's angle. */
static void rotate(const Model *m, float *x, i64 place) {
    const i64 half = m->head_width / 2;
    const float *cos = m->cos + place * half, *sin = m->sin + place * half;
    for (i64 h = 0; h < m->heads; h++, x += m->head_width)
        for (i64 i = 0; i < half; i++) {
            const float a = x[i], b = x[i + half];
            x[i] = a * cos[i] - b * sin[i];
            x[i + half] = a * sin[i] + b * cos[i];
        }
}

i64 slot_floats(const Model *m, i64 positions) { return m->layers * positions * (m->width + m->line); }

/* Of one head: e^(score - largest) of every position up to `place`; returns their sum. */
static float weights_of(const Model *m, const float *q, const float *keys, i64 positions, i64 place, float *p) {
    const i64 chunks = place / LANES + 1, k = m->head_width;
    i64 c = 0;
    for (; c + 4 <= chunks; c += 4) block(1, 4, PUT, q, 0, keys + c * LANES, positions, LANES, k, p + c * LANES, 0);
    for (; c < chunks; c++) block(1, 1, PUT, q, 0, keys + c * LANES, positions, LANES, k, p + c * LANES, 0);
    const v16i lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const v16i inside = lane <= (int32_t)(place % LANES);
    const float scale = 1.0f / sqrtf((float)k);
    v16 top = all(-INFINITY);
    for (c = 0; c < chunks; c++) {
        v16 score = load(p + c * LANES) * all(scale);
        if (c == chunks - 1) score = pick(inside, score, all(-INFINITY));
        store(p + c * LANES, score);
        top = pick(score > top, score, top);
    }
    const v16 largest = all(largest_of(top));
    v16 sum = all(0.0f);
    for (c = 0; c < chunks; c++) {
        const v16 e = exp16(load(p + c * LANES) - largest);
        store(p + c * LANES, e);
        sum += e;
    }
    return sum_of(sum);
}

/* Up to four vectors of the output: sums along the positions, the even ones and the odd ones apart. `p`: of each vector. */
static inline __attribute__((always_inline)) void seen(
    const int V, const float *const *p, const float *values, i64 line, i64 place, const float *sums, float *out) {
    v16 even[4], odd[4];
    for (int v = 0; v < V; v++) even[v] = odd[v] = all(0.0f);
    i64 s = 0;
    for (; s < place; s += 2, values += 2 * line)
        for (int v = 0; v < V; v++) {
            even[v] += all(p[v][s]) * load(values + v * LANES);
            odd[v] += all(p[v][s + 1]) * load(values + line + v * LANES);
        }
    if (s == place)
        for (int v = 0; v < V; v++) even[v] += all(p[v][s]) * load(values + v * LANES);
    for (int v = 0; v < V; v++) store(out + v * LANES, (even[v] + odd[v]) / all(sums[v]));
}

static void attend(const Model *m, const float *q, const float *keys, const float *values, i64 positions, i64 place, float *out,
                   float *room) {
    float sum[1024]; /* of heads: `heads_fit` */
    for (i64 h = 0; h < m->heads; h++)
        sum[h] = weights_of(m, q + h * m->head_width, keys + h * m->head_width * positions, positions, place,
                            room + h * positions);
    if (m->head_width % LANES == 0) {
        const i64 vectors = m->width / LANES, of_head = m->head_width / LANES;
        for (i64 first = 0; first < vectors; first += 4) {
            const i64 here = vectors - first < 4 ? vectors - first : 4;
            const float *p[4];
            float sums[4];
            for (i64 v = 0; v < here; v++) {
                p[v] = room + (first + v) / of_head * positions;
                sums[v] = sum[(first + v) / of_head];
            }
            const float *from = values + first * LANES;
            float *to = out + first * LANES;
            if (here == 4) seen(4, p, from, m->line, place, sums, to);
            else if (here == 3) seen(3, p, from, m->line, place, sums, to);
            else if (here == 2) seen(2, p, from, m->line, place, sums, to);
            else seen(1, p, from, m->line, place, sums, to);
        }
        return;
    }
    memset(out, 0, sizeof(float) * m->line);
    for (i64 s = 0; s <= place; s++, values += m->line)
        for (i64 h = 0; h < m->heads; h++) {
            const float p = room[h * positions + s];
            for (i64 i = h * m->head_width; i < (h + 1) * m->head_width; i++) out[i] += p * values[i];
        }
    for (i64 h = 0; h < m->heads; h++)
        for (i64 i = h * m->head_width; i < (h + 1) * m->head_width; i++) out[i] /= sum[h];
}

i64 room_floats(const Model *m, i64 positions) {
    return CHUNK * (6 * m->line + m->hidden_line) + m->heads * positions + m->line;
}

/* Rows (CHUNK at most) through all layers; keys and values are written into the cache, and the residual stream lies at the
 * start of `room`, (rows, line). A row sees its slot's positions up to its own; rows of one slot must be in their order. */
void forward(const Model *m, Cache cache, i64 rows, const i64 *token, const i64 *place, const i64 *slot, float *room) {
    const i64 line = m->line, width = m->width, positions = cache.positions;
    float *x = room, *h = x + CHUNK * line, *qkv = h + CHUNK * line, *a = qkv + CHUNK * 3 * line, *f = a + CHUNK * line;
    float *p = f + CHUNK * m->hidden_line;
    const float *matrix = m->matrices, *gain = m->norms;
    const i64 slot_size = slot_floats(m, positions), layer_size = positions * (width + line);
    for (i64 row = 0; row < rows; row++) {
        memset(x + row * line, 0, sizeof(float) * line);
        memcpy(x + row * line, m->embed + token[row] * width, sizeof(float) * width);
    }
    for (i64 layer = 0; layer < m->layers; layer++) {
        norm(m, rows, x, gain, h);
        gain += line;
        product(PUT, rows, h, line, width, matrix, 3 * line, qkv, 3 * line);
        matrix += packed_floats(3 * line, width);
        for (i64 row = 0; row < rows; row++) {
            float *q = qkv + row * 3 * line, *k = q + line, *v = k + line;
            float *keys = cache.kept + slot[row] * slot_size + layer * layer_size, *values = keys + positions * width;
            rotate(m, q, place[row]);
            rotate(m, k, place[row]);
            for (i64 i = 0; i < width; i++) keys[i * positions + place[row]] = k[i];
            memcpy(values + place[row] * line, v, sizeof(float) * line);
        }
        for (i64 row = 0; row < rows; row++) {
            const float *keys = cache.kept + slot[row] * slot_size + layer * layer_size;
            attend(m, qkv + row * 3 * line, keys, keys + positions * width, positions, place[row], a + row * line, p);
        }
        if (width < line)
            for (i64 row = 0; row < rows; row++) memset(a + row * line + width, 0, sizeof(float) * (line - width));
        product(ADD, rows, a, line, width, matrix, width, x, line);
        matrix += packed_floats(width, width);
        norm(m, rows, x, gain, h);
        gain += line;
        product(m->squared ? RELU2 : RELU, rows, h, line, width, matrix, m->hidden, f, m->hidden_line);
        matrix += packed_floats(m->hidden, width);
        product(ADD, rows, f, m->hidden_line, m->hidden, matrix, width, x, line);
        matrix += packed_floats(width, m->hidden);
    }
}

/* Logits (rows, vocab_line) of residual streams (rows, line); `room`: (rows, line). */
void logits_of(const Model *m, i64 rows, const float *x, float *out, float *room) {
    const float *matrix = m->matrices;
    matrix += m->layers * (packed_floats(3 * m->line, m->width) + packed_floats(m->width, m->width));
    matrix += m->layers * (packed_floats(m->hidden, m->width) + packed_floats(m->width, m->hidden));
    norm(m, rows, x, m->norms + 2 * m->layers * m->line, room);
    product(PUT, rows, room, m->line, m->width, matrix, m->vocab, out, m->vocab_line);
}
