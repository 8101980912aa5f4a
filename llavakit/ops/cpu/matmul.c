/* y = x w^T + b for a weight that lies as it is read: for each panel of 64 outputs, input after input.
 *
 * Whatever the number of rows, an output is summed over the inputs in order (pairs of inputs in bfloat16, or what an instruction on tiles
 * makes of 32 of them), in float32, and rounded once: a row's bits depend on nothing but the row. Rows are taken six or sixteen at a time
 * where there are so many, so that a weight is read once for all of them; one row is as fast as memory, many are as fast as the processor
 * multiplies.
 * bfloat16: w [panels][pairs of inputs][64][2], x [m][pairs][2]. float32: w [panels][inputs][64], x [m][inputs].
 * In bfloat16 inputs are filled up to a multiple of what half_inputs returns.
 */
#if defined(__linux__)
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include "kernels.h"
#include "lanes.h"

#if defined(__AVX512F__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
#define MOST_ROWS 6 /* 24 of 32 registers hold sums */
#else
#define MOST_ROWS 2
#endif

#define PANEL 64
#define VECTORS 4
#define DEPTH 128 /* steps between which sums rest in memory: a block of the panel stays in a near cache */
#define CHUNK 192 /* rows of a task */
#define AHEAD 64  /* vectors that are fetched before their turn */
#define SERIAL 65536

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
    float pair; /* a float is broadcast from memory, an integer by way of a port that multiplies */
    memcpy(&pair, x, 4);
    return (lanes)_mm512_dpbf16_ps((__m512)sums, (__m512bh)w, (__m512bh)_mm512_set1_ps(pair));
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

static inline __attribute__((always_inline)) void rows_on_lanes(const uint32_t *x, int64_t stride, const ulanes *w, int64_t steps, lanes *sums, int64_t rows, const int is_half) {
    for (int64_t r = 0; r < rows; r += MOST_ROWS) {
        const uint32_t *own = x + r * stride;
        lanes *to = sums + r * VECTORS;
        switch (rows - r < MOST_ROWS ? rows - r : MOST_ROWS) {
        case 1: tile(own, stride, w, steps, to, 1, is_half); break;
        case 2: tile(own, stride, w, steps, to, 2, is_half); break;
#if MOST_ROWS > 2
        case 3: tile(own, stride, w, steps, to, 3, is_half); break;
        case 4: tile(own, stride, w, steps, to, 4, is_half); break;
        case 5: tile(own, stride, w, steps, to, 5, is_half); break;
        case 6: tile(own, stride, w, steps, to, 6, is_half); break;
#endif
        }
    }
}

/* The same on tiles of 16 rows and 16 outputs, where the processor and the system have them. */
static int has_tiles;

#if defined(__AMX_BF16__) && defined(__linux__)
#define TILE 16
#define SETTLED(what) __asm__ volatile("" : : "r"(what) : "memory") /* compilers do not all know what tile instructions read and write */

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_shapes;

/* Tiles 0 to 3 are sums, 4 holds rows of x, 5 to 7 weights. */
static void shape_tiles(int rows) {
    tile_shapes shapes = {.palette = 1};
    for (int t = 0; t < 8; t++) shapes.row_bytes[t] = 64, shapes.rows[t] = (uint8_t)(t < 5 ? rows : TILE);
    SETTLED(&shapes);
    _tile_loadconfig(&shapes);
}

static void on_tiles(const uint32_t *x, int64_t stride, const ulanes *w, int64_t steps, lanes *sums) {
    const int64_t row = VECTORS * sizeof(lanes);
    SETTLED(sums);
    _tile_loadd(0, sums, row);
    _tile_loadd(1, sums + 1, row);
    _tile_loadd(2, sums + 2, row);
    _tile_loadd(3, sums + 3, row);
    for (int64_t k = 0; k < steps; k += TILE, x += TILE, w += TILE * VECTORS) {
        _tile_loadd(4, x, stride * 4);
        _tile_loadd(5, w, row);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, w + 1, row);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, w + 2, row);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, w + 3, row);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, sums, row);
    _tile_stored(1, sums + 1, row);
    _tile_stored(2, sums + 2, row);
    _tile_stored(3, sums + 3, row);
    SETTLED(sums);
}

static void rows_on_tiles(const uint32_t *x, int64_t stride, const ulanes *w, int64_t steps, lanes *sums, int64_t rows, int *shaped) {
    for (int64_t r = 0; r < rows; r += TILE) {
        const int count = rows - r < TILE ? (int)(rows - r) : TILE;
        if (count != *shaped) shape_tiles(*shaped = count);
        on_tiles(x + r * stride, stride, w, steps, sums + r * VECTORS);
    }
}

static void leave_tiles(void) { _tile_release(); }

/* Ask the system for the tiles, and return to how many inputs rows and weights in bfloat16 must be filled up. */
int half_inputs(void) {
    has_tiles = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
    return has_tiles ? 2 * TILE : 2;
}
#else
static void rows_on_tiles(const uint32_t *x, int64_t stride, const ulanes *w, int64_t steps, lanes *sums, int64_t rows, int *shaped) {
    (void)x, (void)stride, (void)w, (void)steps, (void)sums, (void)rows, (void)shaped;
}

static void leave_tiles(void) {}

int half_inputs(void) { return 2; }
#endif

static inline __attribute__((always_inline)) void finish(const product *p, int64_t row, int64_t output, const lanes *sums, const int is_half) {
    const int64_t count = p->num_outputs - output, at = row * p->num_outputs + output;
    for (int v = 0; v < VECTORS && v * 16 < count; v++) {
        const lanes bias = p->bias ? load_some(p->bias, output + v * 16, count - v * 16, is_half) : all(0);
        store_some(p->y, at + v * 16, sums[v] + bias, count - v * 16, is_half);
    }
}

static inline __attribute__((always_inline)) void multiply(const product *p, const int is_half) {
    const int64_t panels = (p->num_outputs + PANEL - 1) / PANEL, chunks = (p->num_rows + CHUNK - 1) / CHUNK;
    const int team = p->num_rows * p->num_outputs * p->num_steps < SERIAL ? 1 : p->num_threads;
#pragma omp parallel num_threads(team)
    {
        const int on = is_half && has_tiles;
        int shaped = 0;
#pragma omp for collapse(2) schedule(static) nowait
        for (int64_t panel = 0; panel < panels; panel++)
            for (int64_t chunk = 0; chunk < chunks; chunk++) {
                const int64_t first = chunk * CHUNK, rows = p->num_rows - first < CHUNK ? p->num_rows - first : CHUNK;
                lanes sums[CHUNK * VECTORS] __attribute__((aligned(64)));
                memset(sums, 0, sizeof(lanes) * (size_t)(rows * VECTORS));
                for (int64_t k = 0; k < p->num_steps; k += DEPTH) {
                    const int64_t steps = p->num_steps - k < DEPTH ? p->num_steps - k : DEPTH;
                    const ulanes *w = (const ulanes *)p->w + (panel * p->num_steps + k) * VECTORS;
                    const uint32_t *x = (const uint32_t *)p->x + first * p->num_steps + k;
                    if (on)
                        rows_on_tiles(x, p->num_steps, w, steps, sums, rows, &shaped);
                    else
                        rows_on_lanes(x, p->num_steps, w, steps, sums, rows, is_half);
                }
                for (int64_t r = 0; r < rows; r++) finish(p, first + r, panel * PANEL, sums + r * VECTORS, is_half);
            }
        if (shaped) leave_tiles();
    }
}

void matmul(const product *p, int is_half) {
    if (is_half)
        multiply(p, 1);
    else
        multiply(p, 0);
}
