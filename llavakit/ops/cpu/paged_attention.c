/* Attention over a paged cache: one kernel for prefill, chunks, decode and verification.
 *
 * Invariant: what a query row gets depends on that row and its sequence alone, bit for bit. Every score is summed over the head's width in
 * ascending order (lanes are keys), every page is one step of the online softmax, and every output element is summed over the page's keys in
 * ascending order (lanes are the head's width), whatever rows share the tile, the chunk, the batch or the thread.
 *
 * Layout: K page [Kh][W][PAGE] (transposed), V page [Kh][PAGE][W], in float32 or bfloat16; W is the head's width H filled up with zeros to a
 * multiple of 32. Queries and outputs are [T][N][H] in the pages' dtype, sums are float32.
 * T rows  N heads  Kh key-value heads  H head width  B sequences
 */
#include "kernels.h"
#include "lanes.h"

#define PAGE 32
#define MOST_ROWS 6
#define MOST_WIDTH 256
#define SERIAL_WORK 65536 /* products below which a team of threads costs more than it saves */

/* R query rows of one sequence and one key-value head over all pages that any of them sees. */
static inline __attribute__((always_inline)) void tile(const attention *a, const int32_t *table, int head, const size_t *rows,
                                                       const int32_t *positions, const int R, const int is_half) {
    const int H = a->head_dim, W = a->width;
    float q[MOST_ROWS][MOST_WIDTH] __attribute__((aligned(64)));
    float sums[MOST_ROWS][MOST_WIDTH] __attribute__((aligned(64)));
    float most[MOST_ROWS], total[MOST_ROWS];
    int first = positions[0], last = positions[0];
    for (int r = 0; r < R; r++) {
        for (int d = 0; d < H; d++) q[r][d] = load_one(a->q, rows[r] * H + d, is_half);
        for (int d = H; d < W; d++) q[r][d] = 0;
        memset(sums[r], 0, W * sizeof(float));
        most[r] = -INFINITY;
        total[r] = 0;
        if (positions[r] < first) first = positions[r];
        if (positions[r] > last) last = positions[r];
    }
    const int oldest = a->window && first >= a->window ? first - a->window + 1 : 0;
    for (int page = oldest / PAGE; page * PAGE <= last; page++) {
        const size_t at = ((size_t)table[page] * a->num_kv_heads + head) * W * PAGE;
        float scores[MOST_ROWS][PAGE] __attribute__((aligned(64)));
        lanes dots[MOST_ROWS][2];
        for (int r = 0; r < R; r++) dots[r][0] = dots[r][1] = all(0);
        for (int d = 0; d < W; d++) {
            lanes k0 = load(a->keys, at + (size_t)d * PAGE, is_half), k1 = load(a->keys, at + (size_t)d * PAGE + 16, is_half);
            for (int r = 0; r < R; r++) {
                lanes x = all(q[r][d]);
                dots[r][0] += x * k0;
                dots[r][1] += x * k1;
            }
        }
        int bottom = PAGE, top = 0;
        for (int r = 0; r < R; r++) {
            *(lanes *)scores[r] = dots[r][0] * all(a->scale);
            *(lanes *)(scores[r] + 16) = dots[r][1] * all(a->scale);
            int stop = positions[r] - page * PAGE + 1, start = a->window ? stop - a->window : 0;
            if (stop > PAGE) stop = PAGE;
            if (start < 0) start = 0;
            if (start >= stop) { /* this row sees nothing of the page */
                memset(scores[r], 0, sizeof scores[r]);
                continue;
            }
            if (stop > top) top = stop;
            if (start < bottom) bottom = start;
            for (int j = 0; j < start; j++) scores[r][j] = -INFINITY;
            for (int j = stop; j < PAGE; j++) scores[r][j] = -INFINITY;
            lanes s0 = *(lanes *)scores[r], s1 = *(lanes *)(scores[r] + 16), both = choose(s0 > s1, s0, s1);
            float peak = most[r], sum = 0;
            for (int z = 0; z < 16; z++) peak = both[z] > peak ? both[z] : peak;
            s0 = exp_lanes(s0 - all(peak)), s1 = exp_lanes(s1 - all(peak));
            *(lanes *)scores[r] = s0, *(lanes *)(scores[r] + 16) = s1;
            both = s0 + s1;
            for (int z = 0; z < 16; z++) sum += both[z];
            float keep = most[r] == -INFINITY ? 0.f : exp_lanes(all(most[r] - peak))[0];
            total[r] = total[r] * keep + sum;
            most[r] = peak;
            if (keep != 1.f)
                for (int d = 0; d < W; d += 16) *(lanes *)(sums[r] + d) *= all(keep);
        }
        for (int d = 0; d < W; d += 32) {
            lanes part[MOST_ROWS][2];
            for (int r = 0; r < R; r++) {
                part[r][0] = *(lanes *)(sums[r] + d);
                part[r][1] = *(lanes *)(sums[r] + d + 16);
            }
            for (int j = bottom; j < top; j++) {
                lanes v0 = load(a->values, at + (size_t)j * W + d, is_half), v1 = load(a->values, at + (size_t)j * W + d + 16, is_half);
                for (int r = 0; r < R; r++) {
                    lanes x = all(scores[r][j]);
                    part[r][0] += x * v0;
                    part[r][1] += x * v1;
                }
            }
            for (int r = 0; r < R; r++) {
                *(lanes *)(sums[r] + d) = part[r][0];
                *(lanes *)(sums[r] + d + 16) = part[r][1];
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int d = 0; d < H; d++) store_one(a->o, rows[r] * H + d, sums[r][d] / total[r], is_half);
}

static void attend_rows(const attention *a, const int32_t *table, int head, const size_t *rows, const int32_t *positions, int count, int is_half) {
#define CASE(R)                                                 \
    case R:                                                     \
        if (is_half)                                            \
            tile(a, table, head, rows, positions, R, 1);        \
        else                                                    \
            tile(a, table, head, rows, positions, R, 0);        \
        break;
    switch (count) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
    }
#undef CASE
}

/* Put the new keys and values into their slots; copies, so any dtype of their size will do. */
static inline __attribute__((always_inline)) void append_head(const attention *a, int64_t row, int head, const int is_half) {
    const int K = a->num_kv_heads, H = a->head_dim, W = a->width;
    const size_t size = is_half ? 2 : 4, from = ((size_t)row * K + head) * H * size;
    const size_t page = (size_t)(a->slots[row] / PAGE), place = (size_t)(a->slots[row] % PAGE), at = (page * K + head) * W * PAGE;
    const char *k = (const char *)a->k + from;
    char *key = (char *)a->keys + (at + place) * size, *value = (char *)a->values + (at + place * W) * size;
    for (int d = 0; d < H; d++) memcpy(key + d * PAGE * size, k + d * size, size);
    for (int d = H; d < W; d++) memset(key + d * PAGE * size, 0, size);
    memcpy(value, (const char *)a->v + from, H * size);
    memset(value + H * size, 0, (W - H) * size);
}

static void append(const attention *a, int is_half) {
    const int64_t num_rows = a->starts[a->num_sequences];
    const int team = num_rows * a->num_kv_heads * a->width < SERIAL_WORK / 8 ? 1 : a->num_threads;
#pragma omp parallel for collapse(2) schedule(static) num_threads(team)
    for (int head = 0; head < a->num_kv_heads; head++)
        for (int64_t row = 0; row < num_rows; row++) {
            if (is_half)
                append_head(a, row, head, 1);
            else
                append_head(a, row, head, 0);
        }
}

/* Store the new keys and values, then attend all rows. A unit of work is one tile: some rows of one sequence under one key-value head. */
void attend(const attention *a, int is_half) {
    append(a, is_half);
    const int G = a->num_heads / a->num_kv_heads, B = a->num_sequences;
    int64_t num_units = 0, work = 0;
    for (int b = 0; b < B; b++) {
        int num_rows = a->starts[b + 1] - a->starts[b];
        num_units += (int64_t)a->num_kv_heads * ((num_rows * G + MOST_ROWS - 1) / MOST_ROWS);
        if (num_rows) work += (int64_t)num_rows * a->num_heads * a->width * (a->positions[a->starts[b + 1] - 1] + 1);
    }
    const int team = work < SERIAL_WORK ? 1 : a->num_threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
    for (int64_t unit = 0; unit < num_units; unit++) {
        int64_t rest = unit;
        int b = 0, per_head = 0, num_queries = 0;
        for (;; b++) {
            num_queries = (a->starts[b + 1] - a->starts[b]) * G;
            per_head = (num_queries + MOST_ROWS - 1) / MOST_ROWS;
            if (rest < (int64_t)per_head * a->num_kv_heads) break;
            rest -= (int64_t)per_head * a->num_kv_heads;
        }
        const int head = (int)(rest / per_head), begin = (int)(rest % per_head) * MOST_ROWS;
        const int count = num_queries - begin < MOST_ROWS ? num_queries - begin : MOST_ROWS;
        size_t rows[MOST_ROWS];
        int32_t positions[MOST_ROWS];
        for (int r = 0; r < count; r++) {
            const int t = a->starts[b] + (begin + r) / G;
            rows[r] = (size_t)t * a->num_heads + head * G + (begin + r) % G;
            positions[r] = a->positions[t];
        }
        attend_rows(a, a->tables + (size_t)b * a->table_width, head, rows, positions, count, is_half);
    }
}
