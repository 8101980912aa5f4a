/* Root mean square norm of rows, with what a layer adds to them first.
 *
 * A row is summed the same way whatever its company: sixteen sums of every sixteenth element, then those in order. In bfloat16 whatever
 * separate operations would round is rounded here too: the sum of two rows, the normed row, and its product with the weight.
 */
#include "kernels.h"
#include "lanes.h"

static inline __attribute__((always_inline)) void norm_row(const norm_rows *p, int64_t row, const int is_half) {
    const int64_t at = row * p->width, width = p->width;
    const void *x = p->added ? p->sum : p->x;
    lanes squares = all(0);
    for (int64_t d = 0; d < width; d += 16) {
        lanes value = load_some(p->x, at + d, width - d, is_half);
        if (p->added) {
            value = rounded(value + load_some(p->added, at + d, width - d, is_half), is_half);
            store_some(p->sum, at + d, value, width - d, is_half);
        }
        squares += value * value;
    }
    float total = 0;
    for (int z = 0; z < 16; z++) total += squares[z];
    const float scale = 1.f / sqrtf(total / (float)width + p->eps);
    for (int64_t d = 0; d < width; d += 16) {
        const lanes normed = rounded(load_some(x, at + d, width - d, is_half) * all(scale), is_half);
        store_some(p->y, at + d, normed * load_some(p->weight, d, width - d, is_half), width - d, is_half);
    }
}

void norm(const norm_rows *p, int is_half) {
    const int team = p->num_rows * p->width < SERIAL_ELEMENTS ? 1 : p->num_threads;
#pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t row = 0; row < p->num_rows; row++) {
        if (is_half)
            norm_row(p, row, 1);
        else
            norm_row(p, row, 0);
    }
}
