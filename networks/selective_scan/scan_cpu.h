/* What networks/selective_scan/cpu.py hands to the kernel; its ctypes.Structure lists the same
 * fields in the same order.
 *
 * An item is one sequence family that shares nothing with another item: one image (2-D), or one
 * group of one batch element (1-D). Every array is contiguous float32. Absent arrays are NULL.
 */
#ifndef SCAN_CPU_H
#define SCAN_CPU_H

#include <stdint.h>

/* Positions handled at a time. Where gradients are wanted, the forward pass saves the states before
 * each chunk. */
#define CHUNK 64

struct scan {
    int64_t level;       /* 0 baseline, 1 AVX2 and FMA, 2 AVX-512 */
    int64_t item_groups; /* the tasks: items are cut into item_groups, ... */
    int64_t segments;    /* ... channels into segments */
    int64_t directions;  /* 4: two-dimensional, 1: one-dimensional */
    int64_t items;
    int64_t groups; /* item i uses the parameters of group i % groups */
    int64_t channels;
    int64_t height;
    int64_t width; /* the length is height * width; height is 1 in the one-dimensional scan */
    int64_t state;
    int64_t rank;
    int64_t softplus;
    int64_t padded_channels; /* of the saved states */

    const float *u;         /* 2-D: (items, length, channels); 1-D: (items, channels, length) */
    const float *delta;     /* 1-D: (items, channels, length) */
    const float *B;         /* 1-D: (items, state, length) */
    const float *C;         /* 1-D: (items, state, length) */
    const float *x_dbl;     /* 2-D: (items, length, 4, rank + 2 state) */
    const float *dt_weight; /* 2-D: (4, channels, rank) */
    const float *A;         /* (groups or 4, channels, state) */
    const float *D;         /* (groups or 4, channels) */
    const float *bias;      /* (groups or 4, channels) */

    float *y;      /* like u */
    float *states; /* (items, directions, chunks, state, padded_channels) */

    const float *grad_y;
    float *grad_u;
    float *grad_delta;
    float *grad_B;         /* (segments, ...) */
    float *grad_C;         /* (segments, ...) */
    float *grad_x_dbl;     /* (segments, ...) */
    float *grad_dt_weight; /* this and the following: (item_groups, ...), added to */
    float *grad_A;
    float *grad_D;
    float *grad_bias;
};

/* The tasks, once for each instruction set: task `index` of item_groups * segments. 0, or 1 when
 * memory ran out. */
int forward_baseline(const struct scan *s, int64_t index);
int backward_baseline(const struct scan *s, int64_t index);
int forward_avx2(const struct scan *s, int64_t index);
int backward_avx2(const struct scan *s, int64_t index);
int forward_avx512(const struct scan *s, int64_t index);
int backward_avx512(const struct scan *s, int64_t index);

#endif
