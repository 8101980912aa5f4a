/* Sixteen floats at a time, whatever the processor's own width; what is the same in all kernels. */
#ifndef LLAVAKIT_LANES_H
#define LLAVAKIT_LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float lanes __attribute__((vector_size(64), aligned(4)));
typedef int32_t ilanes __attribute__((vector_size(64), aligned(4)));
typedef uint32_t ulanes __attribute__((vector_size(64), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2)));

static inline lanes all(float x) { return (lanes){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

static inline lanes choose(ilanes mask, lanes yes, lanes no) { return (lanes)((mask & (ilanes)yes) | (~mask & (ilanes)no)); }

static inline float from_half(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

static inline uint16_t to_half(float x) { /* to the nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline lanes from_halves(halves x) { return (lanes)(__builtin_convertvector(x, ulanes) << 16); }

static inline lanes load(const void *from, size_t index, const int is_half) {
    if (!is_half) return *(const lanes *)((const float *)from + index);
    return from_halves(*(const halves *)((const uint16_t *)from + index));
}

static inline float load_one(const void *from, size_t index, const int is_half) {
    return is_half ? from_half(((const uint16_t *)from)[index]) : ((const float *)from)[index];
}

/* exp(x) for x <= 0 by Cephes' polynomial; relative error below 2e-7, zero below -87. */
static inline lanes exp_lanes(lanes x) {
    ilanes is_tiny = x < all(-87.f);
    x = choose(is_tiny, all(-87.f), x);
    lanes shifted = x * all(1.44269504f) + all(12582912.f), n = shifted - all(12582912.f);
    lanes r = x - n * all(0.693359375f) + n * all(2.12194440e-4f);
    lanes p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * r * r + r + all(1.f);
    ilanes power = (((ilanes)shifted - (ilanes)all(12582912.f)) + 127) << 23;
    return choose(is_tiny, all(0), p * (lanes)power);
}

static inline halves to_halves(lanes x) {
    ulanes bits = (ulanes)x, magnitude = bits & 0x7fffffff, is_nan = (ulanes)(magnitude > 0x7f800000);
    ulanes near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
    return __builtin_convertvector((is_nan & quiet) | (~is_nan & near), halves);
}

static inline void store(void *to, size_t index, lanes x, const int is_half) {
    if (!is_half) {
        *(lanes *)((float *)to + index) = x;
        return;
    }
    *(halves *)((uint16_t *)to + index) = to_halves(x);
}

static inline void store_one(void *to, size_t index, float x, const int is_half) {
    if (is_half)
        ((uint16_t *)to)[index] = to_half(x);
    else
        ((float *)to)[index] = x;
}

/* Up to sixteen elements from index on; what is missing is zero, and is not written. */
static inline lanes load_some(const void *from, size_t index, int64_t count, const int is_half) {
    if (count >= 16) return load(from, index, is_half);
    lanes x = all(0);
    for (int64_t z = 0; z < count; z++) x[z] = load_one(from, index + z, is_half);
    return x;
}

static inline void store_some(void *to, size_t index, lanes x, int64_t count, const int is_half) {
    if (count >= 16) {
        store(to, index, x, is_half);
        return;
    }
    for (int64_t z = 0; z < count; z++) store_one(to, index + z, x[z], is_half);
}

/* What storing x and loading it again makes of it. */
static inline lanes rounded(lanes x, const int is_half) { return is_half ? from_halves(to_halves(x)) : x; }

#endif
