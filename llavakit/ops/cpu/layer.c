/* The two halves of a decoder layer around its attention: the other kernels one after another, with what lies between them in one scratch.
 *
 * Bit for bit what separate calls compute; it is their overhead that this saves.
 */
#include "kernels.h"
#include "lanes.h"

typedef struct {
    const void *w, *bias;
    int64_t num_outputs, num_steps;
} weight;

typedef struct {
    weight qkv, out, gate_up, down;
    const void *input_norm, *inner_norm;
    int64_t width, inner, filled; /* inputs of down: inner, filled up with zeros */
    int64_t num_heads, num_kv_heads, head_dim;
    float input_eps, inner_eps;
} layer;

typedef struct {
    const layer *layer;
    const void *x, *cos, *sin, *attended; /* [T][D], [T][H], [T][H], [T][N][H] */
    void *q, *k, *v, *y;                  /* [T][N][H], [T][K][H], [T][K][H], [T][D] */
    void *scratch;                        /* [T][D + (N + 2 K) H] before attention, [T][3 D + 2 I + I filled up] after it */
    int64_t num_rows;
    int32_t num_threads;
} layer_rows;

static void *after(void *start, int64_t elements, int is_half) { return (char *)start + elements * (is_half ? 2 : 4); }

static void multiply(const layer_rows *p, const weight *w, const void *x, void *y, int is_half) {
    const product one = {x, w->w, w->bias, y, p->num_rows, w->num_outputs, w->num_steps, p->num_threads};
    matmul(&one, is_half);
}

static inline __attribute__((always_inline)) void add(const void *x, const void *added, void *y, int64_t count, int num_threads, const int is_half) {
    const int team = count < SERIAL_ELEMENTS ? 1 : num_threads;
#pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t d = 0; d < count; d += 16)
        store_some(y, d, load_some(x, d, count - d, is_half) + load_some(added, d, count - d, is_half), count - d, is_half);
}

/* x to queries, keys and values. */
void before_attention(const layer_rows *p, int is_half) {
    const layer *l = p->layer;
    void *h = p->scratch, *heads = after(h, p->num_rows * l->width, is_half);
    const norm_rows normed = {p->x, 0, l->input_norm, 0, h, p->num_rows, l->width, l->input_eps, p->num_threads};
    norm(&normed, is_half);
    multiply(p, &l->qkv, h, heads, is_half);
    const rotary_rows rotated = {heads, p->cos, p->sin, p->q, p->k, p->v, p->num_rows, l->num_heads, l->num_kv_heads, l->head_dim, p->num_threads};
    rotary(&rotated, is_half);
}

/* x and what was attended to y. */
void after_attention(const layer_rows *p, int is_half) {
    const layer *l = p->layer;
    const int64_t stream = p->num_rows * l->width;
    void *added = p->scratch, *sum = after(added, stream, is_half), *h = after(sum, stream, is_half);
    void *both = after(h, stream, is_half), *gated = after(both, p->num_rows * 2 * l->inner, is_half);
    multiply(p, &l->out, p->attended, added, is_half);
    const norm_rows normed = {p->x, added, l->inner_norm, sum, h, p->num_rows, l->width, l->inner_eps, p->num_threads};
    norm(&normed, is_half);
    multiply(p, &l->gate_up, h, both, is_half);
    const gate_rows halves = {both, after(both, l->inner, is_half), gated, p->num_rows, l->inner, 2 * l->inner, l->filled, p->num_threads};
    gate(&halves, is_half);
    multiply(p, &l->down, gated, added, is_half);
    if (is_half)
        add(sum, added, p->y, stream, p->num_threads, 1);
    else
        add(sum, added, p->y, stream, p->num_threads, 0);
}
