/* What the kernels take, as library.py has it too. Rows are bfloat16 where is_half says so, else float32. */
#ifndef LLAVAKIT_KERNELS_H
#define LLAVAKIT_KERNELS_H

#include <stdint.h>

#define SERIAL_ELEMENTS 32768 /* below which a team of threads costs more than it saves where each is touched once */

typedef struct {
    const void *x, *w, *bias;
    void *y;
    int64_t num_rows, num_outputs, num_steps; /* steps are inputs, or pairs of them */
    int32_t num_threads;
} product;

typedef struct {
    const void *x, *added, *weight; /* [T][D], the same or NULL, [D] */
    void *sum, *y;                  /* [T][D] each; sum is x + added, and not written without it */
    int64_t num_rows, width;
    float eps;
    int32_t num_threads;
} norm_rows;

typedef struct {
    const void *x;         /* [T][(N + 2 K) H] */
    const void *cos, *sin; /* [T][H] */
    void *q, *k, *v;       /* [T][N][H], [T][K][H], [T][K][H] */
    int64_t num_tokens, num_heads, num_kv_heads, head_dim;
    int32_t num_threads;
} rotary_rows;

typedef struct {
    const void *gate, *up; /* [rows] at stride, width elements each */
    void *out;             /* [rows] at out_stride, zero beyond width */
    int64_t num_rows, width, stride, out_stride;
    int32_t num_threads;
} gate_rows;

typedef struct {
    const void *q, *k, *v; /* [T][N][H], [T][K][H], [T][K][H] */
    void *o;               /* [T][N][H] */
    void *keys, *values;   /* pages */
    const int64_t *slots;     /* [T], where the new keys and values go: page * PAGE + place */
    const int32_t *positions; /* [T], of each row in its sequence */
    const int32_t *starts;    /* [B + 1], first row of each sequence */
    const int32_t *tables;    /* [B][table_width], pages of each sequence */
    int32_t num_sequences, table_width, num_heads, num_kv_heads, head_dim, width;
    int32_t window; /* positions that a row sees, itself included; 0 sees all before it */
    float scale;
    int32_t num_threads;
} attention;

void matmul(const product *p, int is_half);
void norm(const norm_rows *p, int is_half);
void rotary(const rotary_rows *p, int is_half);
void gate(const gate_rows *p, int is_half);
void attend(const attention *a, int is_half);

#endif
