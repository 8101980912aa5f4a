/* y = x w^T + b for a weight that lies as it is read: for each panel of 64 outputs, input after input.
 *
 * Whatever the number of rows, an output is summed over the inputs in order (pairs of inputs in bfloat16), in float32, and rounded once:
 * a row's bits depend on nothing but the row. Rows are taken six at a time where there are so many, so that a weight is read once for all
 * of them; one row is as fast as memory, many are as fast as the processor multiplies.
 * bfloat16: w [panels][pairs of inputs][64][2], x [m][pairs][2]. float32: w [panels][inputs][64], x [m][inputs].
 */
#include "lanes.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define MOST_ROWS 6 /* 24 of 32 registers hold sums */
#else
#define MOST_ROWS 2
#endif

#define PANEL 64
#define VECTORS 4
#define DEPTH 256 /* steps between which sums rest in memory: a block of the panel stays in the second cache */
#define CHUNK 192 /* rows of a task */
#define AHEAD 64  /* vectors that are fetched before their turn */
#define SERIAL 65536

typedef struct {
    const void *x, *w, *bias;
    void *y;
    int64_t num_rows, num_outputs, num_steps; /* steps are inputs, or pairs of them */
    int32_t num_threads;
} product;

/* sums += one step's products */
static inline __attribute__((always_inline)) lanes add_step(lanes sums, ulanes w, const uint32_t *x, const int is_half) {
    if (!is_half) {
        float value;
        memcpy(&value, x, 4);
#if defined(__AVX512F__)
        return (lanes)_mm512_fmadd_ps((__m512)w, _mm512_set1_ps(value), (__m512)sums);
#else
        return sums + (lanes)w * all(value);
#endif
    }
#if defined(__AVX512BF16__)
    return (lanes)_mm512_dpbf16_ps((__m512)sums, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)*x));
#else
    sums = sums + (lanes)(w << 16) * all(from_half((uint16_t)*x));
    return sums + (lanes)(w & 0xffff0000u) * all(from_half((uint16_t)(*x >> 16)));
#endif
}

static inline __attribute__((always_inline)) void tile(const uint32_t *x, int64_t stride, const ulanes *w, int64_t steps, lanes *sums, const int rows, const int is_half) {
    lanes own[MOST_ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) own[r][v] = sums[r * VECTORS + v];
    for (int64_t k = 0; k < steps; k++) {
        ulanes parts[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            parts[v] = w[VECTORS * k + v];
            if (rows <= 2) __builtin_prefetch(w + VECTORS * k + v + AHEAD);
        }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECTORS; v++) own[r][v] = add_step(own[r][v], parts[v], x + r * stride + k, is_half);
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) sums[r * VECTORS + v] = own[r][v];
}

static inline __attribute__((always_inline)) void finish(const product *p, int64_t row, int64_t output, const lanes *sums, const int is_half) {
    const int64_t count = p->num_outputs - output, at = row * p->num_outputs + output;
    for (int v = 0; v < VECTORS && v * 16 < count; v++) {
        const int64_t known = count - v * 16 < 16 ? count - v * 16 : 16;
        lanes bias = all(0);
        if (p->bias && known == 16) bias = load(p->bias, output + v * 16, is_half);
        for (int64_t z = 0; p->bias && known < 16 && z < known; z++) bias[z] = load_one(p->bias, output + v * 16 + z, is_half);
        const lanes y = sums[v] + bias;
        if (known == 16) {
            store(p->y, at + v * 16, y, is_half);
            continue;
        }
        for (int64_t z = 0; z < known; z++) store_one(p->y, at + v * 16 + z, y[z], is_half);
    }
}

static inline __attribute__((always_inline)) void multiply(const product *p, const int is_half) {
    const int64_t panels = (p->num_outputs + PANEL - 1) / PANEL, chunks = (p->num_rows + CHUNK - 1) / CHUNK;
    const int team = p->num_rows * p->num_outputs * p->num_steps < SERIAL ? 1 : p->num_threads;
#pragma omp parallel for collapse(2) schedule(static) num_threads(team)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const int64_t first = chunk * CHUNK, rows = p->num_rows - first < CHUNK ? p->num_rows - first : CHUNK;
            lanes sums[CHUNK * VECTORS] __attribute__((aligned(64)));
            memset(sums, 0, sizeof(lanes) * (size_t)(rows * VECTORS));
            for (int64_t k = 0; k < p->num_steps; k += DEPTH) {
                const int64_t steps = p->num_steps - k < DEPTH ? p->num_steps - k : DEPTH;
                const ulanes *w = (const ulanes *)p->w + (panel * p->num_steps + k) * VECTORS;
                for (int64_t r = 0; r < rows; r += MOST_ROWS) {
                    const uint32_t *x = (const uint32_t *)p->x + (first + r) * p->num_steps + k;
                    lanes *own = sums + r * VECTORS;
                    switch (rows - r < MOST_ROWS ? rows - r : MOST_ROWS) {
                    case 1: tile(x, p->num_steps, w, steps, own, 1, is_half); break;
                    case 2: tile(x, p->num_steps, w, steps, own, 2, is_half); break;
#if MOST_ROWS > 2
                    case 3: tile(x, p->num_steps, w, steps, own, 3, is_half); break;
                    case 4: tile(x, p->num_steps, w, steps, own, 4, is_half); break;
                    case 5: tile(x, p->num_steps, w, steps, own, 5, is_half); break;
                    case 6: tile(x, p->num_steps, w, steps, own, 6, is_half); break;
#endif
                    }
                }
            }
            for (int64_t r = 0; r < rows; r++) finish(p, first + r, panel * PANEL, sums + r * VECTORS, is_half);
        }
}

void matmul(const product *p, int is_half) {
    if (is_half)
        multiply(p, 1);
    else
        multiply(p, 0);
}
