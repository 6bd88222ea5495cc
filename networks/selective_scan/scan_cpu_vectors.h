/* Vectors of VL floats for one instruction set: loads, stores, transposes and the mathematics of
 * the scan.
 *
 * The file that includes this defines VL, NB (states that fit into registers together), ISA (its
 * name) and, where the instruction set has them, MAX, MIN and TABLE_EXP2. GCC's vector extension
 * does the rest: operators work lane by lane.
 */
#ifndef SCAN_CPU_VECTORS_H
#define SCAN_CPU_VECTORS_H

#include <stdint.h>
#include <string.h>

/* may_alias: buffers hold vectors, and are read as floats where one value serves all lanes. */
typedef float vf __attribute__((vector_size(4 * VL), may_alias));
typedef float unaligned_vf __attribute__((vector_size(4 * VL), aligned(4), may_alias));
/* Bits of floats: unsigned, so that sums and shifts may overflow; comparisons give a mask of signed
 * ones. */
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef int32_t mask_vi __attribute__((vector_size(4 * VL)));

#define INLINE static inline __attribute__((always_inline))
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

INLINE vf splat(float a) { return (vf){0} + a; }
INLINE vf load(const float *p) { return *(const unaligned_vf *)p; }
INLINE void store(float *p, vf a) { *(unaligned_vf *)p = a; }
INLINE vf choose(mask_vi mask, vf a, vf b)
{
    return (vf)(((vu)mask & (vu)a) | (~(vu)mask & (vu)b));
}

/* Where b is NaN both give b, so that a NaN is not lost on the way. */
#if defined(MAX)
INLINE vf max(vf a, vf b) { return (vf)MAX(a, b); }
INLINE vf min(vf a, vf b) { return (vf)MIN(a, b); }
#else
INLINE vf max(vf a, vf b) { return choose(a > b, a, b); }
INLINE vf min(vf a, vf b) { return choose(a < b, a, b); }
#endif

/* The last block of channels may have fewer than VL lanes: the rest is read as zero, and not
 * written. */
INLINE vf load_some(const float *p, int64_t lanes)
{
    if (lanes >= VL)
        return load(p);
    float full[VL] = {0};
    memcpy(full, p, lanes * sizeof(float));
    return load(full);
}

INLINE void store_some(float *p, vf a, int64_t lanes)
{
    if (lanes >= VL)
        store(p, a);
    else
        memcpy(p, &a, lanes * sizeof(float));
}

/* memcpy for the short rows of x_dbl. The compiler would make a call of a plain loop, which costs
 * more than the few values are worth: whole vectors first, the last of them overlapping, and
 * `volatile` keeps what is shorter a loop. */
INLINE void copy(float *to, const float *from, int64_t count)
{
    int64_t i = 0;
    for (; i + VL <= count; i += VL)
        store(to + i, load(from + i));
    if (i < count && count >= VL)
        store(to + count - VL, load(from + count - VL));
    else
        for (; i < count; i++)
            ((volatile float *)to)[i] = from[i];
}

/* SHUFFLE picks elements of the two vectors laid end to end. INTERLEAVE takes turns between their
 * halves; UNPACK does so within each group of four elements, and PAIRS two elements at a time: one
 * instruction each. */
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (mask_vi){__VA_ARGS__})
#endif

#if VL == 4
#define INTERLEAVE_LOW 0, 4, 1, 5
#define INTERLEAVE_HIGH 2, 6, 3, 7
#define UNPACK_LOW 0, 4, 1, 5
#define UNPACK_HIGH 2, 6, 3, 7
#define PAIRS_LOW 0, 1, 4, 5
#define PAIRS_HIGH 2, 3, 6, 7
#elif VL == 8
#define INTERLEAVE_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define INTERLEAVE_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define UNPACK_LOW 0, 8, 1, 9, 4, 12, 5, 13
#define UNPACK_HIGH 2, 10, 3, 11, 6, 14, 7, 15
#define PAIRS_LOW 0, 1, 8, 9, 4, 5, 12, 13
#define PAIRS_HIGH 2, 3, 10, 11, 6, 7, 14, 15
#else
#define INTERLEAVE_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define INTERLEAVE_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define UNPACK_LOW 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define UNPACK_HIGH 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define PAIRS_LOW 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define PAIRS_HIGH 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#endif

/* A square of VL vectors. Interleaving row i with row i + VL / 2 rotates the bits of every index by
 * one: after log2 VL rounds rows and columns have changed places. */
INLINE void transpose(vf *a)
{
    vf b[VL];
    for (int size = 1; size < VL; size *= 2) {
        for (int i = 0; i < VL / 2; i++) {
            b[2 * i] = SHUFFLE(a[i], a[i + VL / 2], INTERLEAVE_LOW);
            b[2 * i + 1] = SHUFFLE(a[i], a[i + VL / 2], INTERLEAVE_HIGH);
        }
        for (int i = 0; i < VL; i++)
            a[i] = b[i];
    }
}

/* VL rows, of which only `rows` exist, into columns: to[j][i] = from[i * stride + j], and zero for
 * the others. */
static void load_columns(vf *to, const float *from, int64_t stride, int64_t rows, int64_t columns)
{
    int64_t j = 0;
    for (; rows == VL && j + VL <= columns; j += VL) {
        vf a[VL];
        for (int i = 0; i < VL; i++)
            a[i] = load(from + i * stride + j);
        transpose(a);
        for (int i = 0; i < VL; i++)
            to[j + i] = a[i];
    }
    for (; j < columns; j++)
        for (int64_t i = 0; i < VL; i++)
            to[j][i] = i < rows ? from[i * stride + j] : 0.0f;
}

/* The inverse of load_columns; adds to what is there if asked to. */
static void store_columns(float *to, const vf *from, int64_t stride, int64_t rows, int64_t columns,
                          int add)
{
    int64_t j = 0;
    for (; rows == VL && j + VL <= columns; j += VL) {
        vf a[VL];
        for (int i = 0; i < VL; i++)
            a[i] = from[j + i];
        transpose(a);
        for (int i = 0; i < VL; i++) {
            if (add)
                a[i] += load(to + i * stride + j);
            store(to + i * stride + j, a[i]);
        }
    }
    for (; j < columns; j++)
        for (int64_t i = 0; i < rows; i++)
            to[i * stride + j] = (add ? to[i * stride + j] : 0.0f) + from[j][i];
}

/* Half of four sums over lanes at once: element i of every group of four holds a partial sum of the
 * i-th vector. */
INLINE vf fold4(vf a, vf b, vf c, vf d)
{
    vf ab = SHUFFLE(a, b, UNPACK_LOW) + SHUFFLE(a, b, UNPACK_HIGH);
    vf cd = SHUFFLE(c, d, UNPACK_LOW) + SHUFFLE(c, d, UNPACK_HIGH);
    return SHUFFLE(ab, cd, PAIRS_LOW) + SHUFFLE(ab, cd, PAIRS_HIGH);
}

#define LOG2_E 1.44269504f
#define LN_2 0.69314718f
/* 1.5 * 2^23. A float of this size has no fraction bits: adding it rounds to the nearest integer,
 * and leaves that integer in the low bits of the sum. */
#define ROUND 12582912.0f

/* 2^x for |x| <= 126 and for 128, without a branch. x is rounded to the nearest step; a polynomial
 * gives 2^rest, and the step is added to its exponent. The polynomial is exact at 0 to first order,
 * so that slow decays are as exact as float32 allows. With a table of 2^(i / 16), one register in
 * AVX-512, the steps are 1/16 (relative error 1e-8), without it they are 1 (1e-7). */
#if defined(TABLE_EXP2)
#define EXP2_BITS 19

/* The step's low four bits choose i, but are shifted into the exponent's low end too: less those
 * bits here. */
INLINE vf exp2_table(void)
{
    static const float powers[VL] = {1.0f,       1.0442737f, 1.0905077f, 1.1387886f,
                                     1.1892071f, 1.2418578f, 1.2968396f, 1.3542556f,
                                     1.4142135f, 1.4768262f, 1.5422108f, 1.6104903f,
                                     1.6817929f, 1.7562522f, 1.8340081f, 1.9152066f};
    vu number = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (vf)((vu)load(powers) - (number << EXP2_BITS));
}

INLINE vf power_of_2(vf x, vf table)
{
    vf rounded = x + ROUND / 16;
    vf rest =
        (vf)_mm512_reduce_ps((__m512)x, 4 << 4 | _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf scale = (vf)_mm512_permutexvar_ps((__m512i)rounded, (__m512)table);
    vf p = ((0.0555054f * rest + 0.24022651f) * rest + 0.69314718f) * rest + 1.0f;
    return p * (vf)((vu)scale + ((vu)rounded << EXP2_BITS));
}
#else
INLINE vf exp2_table(void) { return splat(0.0f); }

INLINE vf power_of_2(vf x, vf table)
{
    (void)table;
    vf rounded = x + ROUND;
    vf r = x - (rounded - ROUND);
    vf p = (((0.00133008577f * r + 0.00967058497f) * r + 0.0555056069f) * r + 0.24022263f) * r;
    p = (p + 0.69314718f) * r + 1.0f;
    return (vf)((vu)p + ((vu)rounded << 23));
}
#endif

/* Into the range of power_of_2: nothing is left of a state below, and 128 gives infinity. */
INLINE vf clamped(vf x) { return min(splat(128.0f), max(splat(-126.0f), x)); }

/* e^x for x <= 0 within 1e-7. ln 2 is subtracted in two parts, the first of them exact. */
INLINE vf exponential(vf x)
{
    x = max(splat(-87.0f), x);
    vf rounded = x * LOG2_E + ROUND;
    vf n = rounded - ROUND;
    vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = ((0.00138750517f * r + 0.00837282936f) * r + 0.0416676927f) * r + 0.16666479f;
    p = ((p * r + 0.49999994f) * r + 1.0f) * r + 1.0f;
    return (vf)((vu)p + ((vu)rounded << 23));
}

/* log(1 + e^x) = max(x, 0) + log(1 + e) with e = e^-|x|, the logarithm as e times a minimax
 * polynomial (relative error 3e-8); its derivative too where it is wanted. */
INLINE vf softplus(vf x, vf *derivative)
{
    vf positive = max(splat(0.0f), x);
    vf e = exponential(x - 2.0f * positive);
    vf p = ((0.0053647948f * e - 0.030065674f) * e + 0.079204343f) * e - 0.13753787f;
    p = ((p * e + 0.19153647f) * e - 0.24857162f) * e + 0.33321321f;
    p = (p * e - 0.49999648f) * e + 1.0f;
    if (derivative) {
        vf r = 1.0f / (e + 1.0f);
        *derivative = choose(x > 0.0f, r, e * r);
    }
    return p * e + positive;
}

#endif
