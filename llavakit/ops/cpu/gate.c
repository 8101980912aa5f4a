/* silu(gate) * up, element by element: the same code for every element, so that no element depends on its place.
 *
 * Gate and up are rows of one stride each: two tensors, or the halves of the rows of one.
 * In bfloat16 silu's result is rounded before the product, as where two operations follow one another.
 */
#include "kernels.h"
#include "lanes.h"

static inline __attribute__((always_inline)) lanes gated(lanes gate, lanes up, const int is_half) {
    lanes e = exp_lanes(choose(gate > all(0), -gate, gate)); /* exp(-|gate|) never overflows */
    return rounded(gate * choose(gate > all(0), all(1), e) / (e + all(1)), is_half) * up;
}

static inline __attribute__((always_inline)) void run(const gate_rows *p, const int is_half) {
    const int64_t blocks = (p->width + 15) / 16;
    const int team = p->num_rows * p->width < SERIAL_ELEMENTS ? 1 : p->num_threads;
#pragma omp parallel for schedule(static) num_threads(team) collapse(2)
    for (int64_t row = 0; row < p->num_rows; row++)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t from = row * p->stride + block * 16, rest = p->width - block * 16;
            const lanes y = gated(load_some(p->gate, from, rest, is_half), load_some(p->up, from, rest, is_half), is_half);
            store_some(p->out, row * p->out_stride + block * 16, y, rest, is_half);
            for (int64_t d = p->width; block == blocks - 1 && d < p->out_stride; d++) store_one(p->out, row * p->out_stride + d, 0, is_half);
        }
}

void gate(const gate_rows *p, int is_half) {
    if (is_half)
        run(p, 1);
    else
        run(p, 0);
}
