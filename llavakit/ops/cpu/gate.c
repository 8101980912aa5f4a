/* silu(gate) * up, element by element: the same code for every element, so that no element depends on its place.
 *
 * In bfloat16 silu's result is rounded before the product, as where two operations follow one another.
 */
#include "lanes.h"

#define SERIAL_ELEMENTS 32768

static inline __attribute__((always_inline)) lanes gated(lanes gate, lanes up, const int is_half) {
    lanes e = exp_lanes(choose(gate > all(0), -gate, gate)); /* exp(-|gate|) never overflows */
    lanes silu = gate * choose(gate > all(0), all(1), e) / (e + all(1));
    if (is_half) silu = from_halves(to_halves(silu));
    return silu * up;
}

static inline __attribute__((always_inline)) void run(const void *gate, const void *up, void *out, int64_t count, int num_threads, const int is_half) {
    const int team = count < SERIAL_ELEMENTS ? 1 : num_threads;
#pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t block = 0; block < count / 16; block++)
        store(out, block * 16, gated(load(gate, block * 16, is_half), load(up, block * 16, is_half), is_half), is_half);
    const int64_t rest = count % 16, at = count - rest;
    if (rest) {
        lanes g = all(0), u = all(0);
        for (int z = 0; z < rest; z++) g[z] = load_one(gate, at + z, is_half), u[z] = load_one(up, at + z, is_half);
        lanes y = gated(g, u, is_half);
        for (int z = 0; z < rest; z++) store_one(out, at + z, y[z], is_half);
    }
}

void gate(const void *g, const void *up, void *out, int64_t count, int num_threads, int is_half) {
    if (is_half)
        run(g, up, out, count, num_threads, 1);
    else
        run(g, up, out, count, num_threads, 0);
}
