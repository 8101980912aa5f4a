/* Queries, keys and values out of the rows of one product, the first two rotated by their tokens' angles (half-split, as in HF's layout).
 *
 * Element by element, and in bfloat16 rounded where separate operations would round: after each product and after their sum.
 */
#include "kernels.h"
#include "lanes.h"

static inline __attribute__((always_inline)) void rotate_head(const rotary_rows *p, size_t from, size_t angle, void *out, size_t to, const int is_half) {
    const int64_t half = p->head_dim / 2;
    for (int64_t d = 0; d < half; d += 16) {
        const int64_t count = half - d;
        const lanes first = load_some(p->x, from + d, count, is_half), second = load_some(p->x, from + half + d, count, is_half);
        const lanes c0 = load_some(p->cos, angle + d, count, is_half), s0 = load_some(p->sin, angle + d, count, is_half);
        const lanes c1 = load_some(p->cos, angle + half + d, count, is_half), s1 = load_some(p->sin, angle + half + d, count, is_half);
        store_some(out, to + d, rounded(first * c0, is_half) - rounded(second * s0, is_half), count, is_half);
        store_some(out, to + half + d, rounded(second * c1, is_half) + rounded(first * s1, is_half), count, is_half);
    }
}

static inline __attribute__((always_inline)) void rotate_token(const rotary_rows *p, int64_t t, const int is_half) {
    const int64_t N = p->num_heads, K = p->num_kv_heads, H = p->head_dim, size = is_half ? 2 : 4;
    const size_t from = (size_t)(t * (N + 2 * K) * H);
    for (int64_t n = 0; n < N; n++) rotate_head(p, from + n * H, t * H, p->q, (t * N + n) * H, is_half);
    for (int64_t n = 0; n < K; n++) rotate_head(p, from + (N + n) * H, t * H, p->k, (t * K + n) * H, is_half);
    memcpy((char *)p->v + t * K * H * size, (const char *)p->x + (from + (N + K) * H) * size, (size_t)(K * H * size));
}

void rotary(const rotary_rows *p, int is_half) {
    const int team = p->num_tokens * (p->num_heads + p->num_kv_heads) * p->head_dim < SERIAL_ELEMENTS ? 1 : p->num_threads;
#pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t t = 0; t < p->num_tokens; t++) {
        if (is_half)
            rotate_token(p, t, 1);
        else
            rotate_token(p, t, 0);
    }
}
