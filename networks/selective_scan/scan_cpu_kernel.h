/* The scan for one instruction set: VL channels side by side in a vector, NB states of each in registers.
 *
 * Blocking. A task owns a range of channels for a range of items. It walks each direction in chunks of CHUNK positions,
 * and within a chunk through its blocks of VL channels; the order of the positions is a list of indices, so that the four
 * directions need neither copies nor transposes, and the four results are summed where they belong by the task that owns
 * them. For a chunk B and C are gathered once for all blocks. For a block the step Δ is made from its low-rank factors,
 * VL channels at a time, into a buffer that stays in the first-level cache, then the states run through the chunk NB at a
 * time: decay 2^(Δ · A log2 e), one vector each; B and C are broadcast scalars. Between chunks a block keeps its N states.
 *
 * The backward pass walks the chunks in reverse. It scans a chunk again from the saved states, NBB states at a time, keeps
 * decays and states of that chunk, and runs the adjoint recurrence g_t = C_t ∂y_t + a_{t+1} g_{t+1} back through it:
 *   ∂C_t = Σ_channels ∂y_t h_t,  ∂B_t = Σ_channels g_t Δ_t u_t,  ∂(Δu)_t = Σ_states g_t B_t,
 *   ∂Δ_t += Σ_states A q_t,  ∂A = Σ_t Δ_t q_t,  with q_t = g_t a_t h_{t−1}.
 * Sums over channels are kept as vectors over the blocks of a task and folded once a chunk; each task has its own copy
 * of them, which the caller adds up.
 */

#include <stdlib.h>
#include <string.h>

#include "scan_cpu.h"

#define NBB 4 /* states at a time in the backward pass: what one fold of four vectors needs */

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef float vfu __attribute__((vector_size(4 * VL), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

INLINE vf splat(float a) { return (vf){0} + a; }
INLINE vf load(const float *p) { return *(const vfu *)p; }
INLINE void store(float *p, vf a) { *(vfu *)p = a; }
INLINE vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
/* Where b is NaN both give b. */
#if defined(MAX)
INLINE vf max(vf a, vf b) { return (vf)MAX(a, b); }
INLINE vf min(vf a, vf b) { return (vf)MIN(a, b); }
#else
INLINE vf max(vf a, vf b) { return choose(a > b, a, b); }
INLINE vf min(vf a, vf b) { return choose(a < b, a, b); }
#endif

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

/* memcpy for the short rows of x_dbl, without the call. */
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

/* VL vectors of VL elements; log2 VL perfect shuffles make the transpose. */
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

/* to[j][i] = from[i * stride + j] for `columns` j and VL i, of which only `rows` exist. */
static void load_columns(float *to, const float *from, int64_t stride, int64_t rows, int64_t columns)
{
    int64_t j = 0;
    for (; rows == VL && j + VL <= columns; j += VL) {
        vf a[VL];
        for (int i = 0; i < VL; i++)
            a[i] = load(from + i * stride + j);
        transpose(a);
        for (int i = 0; i < VL; i++)
            store(to + (j + i) * VL, a[i]);
    }
    for (; j < columns; j++)
        for (int64_t i = 0; i < VL; i++)
            to[j * VL + i] = i < rows ? from[i * stride + j] : 0.0f;
}

/* The inverse of load_columns; adds to what is there if asked to. */
static void store_columns(float *to, const float *from, int64_t stride, int64_t rows, int64_t columns, int add)
{
    int64_t j = 0;
    for (; rows == VL && j + VL <= columns; j += VL) {
        vf a[VL];
        for (int i = 0; i < VL; i++)
            a[i] = load(from + (j + i) * VL);
        transpose(a);
        for (int i = 0; i < VL; i++)
            store(to + i * stride + j, add ? load(to + i * stride + j) + a[i] : a[i]);
    }
    for (; j < columns; j++)
        for (int64_t i = 0; i < rows; i++)
            to[i * stride + j] = (add ? to[i * stride + j] : 0.0f) + from[j * VL + i];
}

/* Four vectors into one whose every group of four elements holds a partial sum of each. */
INLINE vf fold4(vf a, vf b, vf c, vf d)
{
    vf ab = SHUFFLE(a, b, UNPACK_LOW) + SHUFFLE(a, b, UNPACK_HIGH);
    vf cd = SHUFFLE(c, d, UNPACK_LOW) + SHUFFLE(c, d, UNPACK_HIGH);
    return SHUFFLE(ab, cd, PAIRS_LOW) + SHUFFLE(ab, cd, PAIRS_HIGH);
}

/* 2^x for |x| ≤ 126 and for 128, without a branch; exact at 0 to first order, so that slow decays are as exact as float32 allows.
 * Adding a large number rounds x to the nearest step and leaves the step's number in the low bits. With a table the steps
 * are 1/16 (relative error 1e-8), without it they are 1 (1e-7). */
#if defined(TABLE_EXP2)
#define EXP2_SHIFT (12582912.0f / 16)
#define EXP2_BITS 19
#else
#define EXP2_SHIFT 12582912.0f
#define EXP2_BITS 23
#endif

INLINE vf exp2_(vf x, vf table)
{
    vf rounded = x + EXP2_SHIFT;
    vi exponent = (vi)rounded << EXP2_BITS;
#if defined(TABLE_EXP2)
    vf r = (vf)_mm512_reduce_ps((__m512)x, 4 << 4 | _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf scale = (vf)_mm512_permutexvar_ps((__m512i)rounded, (__m512)table);
    vf p = ((0.0555054f * r + 0.24022651f) * r + 0.69314718f) * r + 1.0f;
    return p * (vf)((vi)scale + exponent);
#else
    (void)table;
    vf r = x - (rounded - EXP2_SHIFT);
    vf p = (((0.00133008577f * r + 0.00967058497f) * r + 0.0555056069f) * r + 0.24022263f) * r;
    p = (p + 0.69314718f) * r + 1.0f;
    return (vf)((vi)p + exponent);
#endif
}

/* Into the range of exp2_: nothing is left of a state below, and 128 gives infinity. */
INLINE vf clamped(vf x) { return min(splat(128.0f), max(splat(-126.0f), x)); }

/* e^x for x ≤ 0 within 1e-7. */
INLINE vf exp_(vf x)
{
    x = max(splat(-87.0f), x);
    vf rounded = x * 1.44269504f + 12582912.0f;
    vf n = rounded - 12582912.0f;
    vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = ((0.00138750517f * r + 0.00837282936f) * r + 0.0416676927f) * r + 0.16666479f;
    p = ((p * r + 0.49999994f) * r + 1.0f) * r + 1.0f;
    return (vf)((vi)p + ((vi)rounded << 23));
}

/* log(1 + e^x) = max(x, 0) + log(1 + e) with e = e^−|x|, the logarithm as e times a minimax polynomial (relative error
 * 3e-8); its derivative too where it is wanted. */
INLINE vf softplus_(vf x, vf *derivative)
{
    vf positive = max(splat(0.0f), x);
    vf e = exp_(x - 2.0f * positive);
    vf p = ((0.0053647948f * e - 0.030065674f) * e + 0.079204343f) * e - 0.13753787f;
    p = ((p * e + 0.19153647f) * e - 0.24857162f) * e + 0.33321321f;
    p = (p * e - 0.49999648f) * e + 1.0f;
    if (derivative) {
        vf r = 1.0f / (e + 1.0f);
        *derivative = choose(x > 0.0f, r, e * r);
    }
    return p * e + positive;
}

/* Memory that the next chunk of a block will touch. The processor cannot foresee the strides of a direction, so each step
 * of a chunk asks for one line of each of two arrays. */
struct lines {
    const int64_t *at;
    int64_t stride;
    const float *a, *b;
};

INLINE void fetch(const struct lines *ahead, int64_t t)
{
    __builtin_prefetch(ahead->a + ahead->at[t] * ahead->stride, 0, 2);
    __builtin_prefetch(ahead->b + ahead->at[t] * ahead->stride, 0, 2);
}

/* One block through a chunk for NB states; y is added to. `clamp` where Δ A may leave exp2_'s range. */
INLINE void scan_states(int clamp, int64_t length, int64_t ld, const float *A, const float *delta, const float *w,
                        const float *B, const float *C, float *states, float *y, const struct lines *ahead, vf table)
{
    vf h[NB];
    for (int n = 0; n < NB; n++)
        h[n] = load(states + n * VL);
    for (int64_t t = 0; t < length; t++) {
        vf d = load(delta + t * VL), wt = load(w + t * VL);
        vf y0 = load(y + t * VL), y1 = splat(0.0f);
        fetch(ahead, t);
#pragma GCC unroll 16
        for (int n = 0; n < NB; n += 2) {
            vf x0 = d * load(A + n * VL), x1 = d * load(A + n * VL + VL);
            if (clamp) {
                x0 = clamped(x0);
                x1 = clamped(x1);
            }
            vf a0 = exp2_(x0, table), a1 = exp2_(x1, table);
            h[n] = a0 * h[n] + wt * B[t * ld + n];
            h[n + 1] = a1 * h[n + 1] + wt * B[t * ld + n + 1];
            y0 += h[n] * C[t * ld + n];
            y1 += h[n + 1] * C[t * ld + n + 1];
        }
        store(y + t * VL, y0 + y1);
    }
    for (int n = 0; n < NB; n++)
        store(states + n * VL, h[n]);
}

/* The same block and chunk backwards for NBB states. `states`: before the chunk; `carry`: a_{t+1} g_{t+1} after it, then
 * before it. Adds to gw = ∂(Δu), gd = ∂Δ / ln 2, grad_A, and to the sums over channels grad_B, grad_C (length, ldg). */
INLINE void scan_states_back(int clamp, int64_t length, int64_t ld, const float *A, const float *delta, const float *w,
                             const float *B, const float *C, const float *states, const float *gy, float *carry,
                             float *grad_A, float *gw, float *gd, float *grad_B, float *grad_C, int64_t ldg, vf table)
{
    vf decays[CHUNK][NBB], h[CHUNK + 1][NBB], g[NBB], gA[NBB], Av[NBB];
    for (int n = 0; n < NBB; n++) {
        h[0][n] = load(states + n * VL);
        g[n] = load(carry + n * VL);
        gA[n] = load(grad_A + n * VL);
        Av[n] = load(A + n * VL);
    }
    for (int64_t t = 0; t < length; t++) {
        vf d = load(delta + t * VL), wt = load(w + t * VL);
#pragma GCC unroll 4
        for (int n = 0; n < NBB; n++) {
            vf x = d * Av[n];
            if (clamp)
                x = clamped(x);
            vf a = exp2_(x, table);
            decays[t][n] = a;
            h[t + 1][n] = a * h[t][n] + wt * B[t * ld + n];
        }
    }
    for (int64_t t = length - 1; t >= 0; t--) {
        vf d = load(delta + t * VL), wt = load(w + t * VL), gyt = load(gy + t * VL);
        vf gwt = load(gw + t * VL), gdt = load(gd + t * VL);
        vf gB[NBB], gC[NBB];
#pragma GCC unroll 4
        for (int n = 0; n < NBB; n++) {
            vf gn = gyt * C[t * ld + n] + g[n];
            gC[n] = gyt * h[t + 1][n];
            gB[n] = gn * wt;
            gwt += gn * B[t * ld + n];
            g[n] = gn * decays[t][n];
            vf q = g[n] * h[t][n];
            gdt += q * Av[n];
            gA[n] += q * d;
        }
        store(gw + t * VL, gwt);
        store(gd + t * VL, gdt);
        store(grad_B + t * ldg, load(grad_B + t * ldg) + fold4(gB[0], gB[1], gB[2], gB[3]));
        store(grad_C + t * ldg, load(grad_C + t * ldg) + fold4(gC[0], gC[1], gC[2], gC[3]));
    }
    for (int n = 0; n < NBB; n++) {
        store(carry + n * VL, g[n]);
        store(grad_A + n * VL, gA[n]);
    }
}

/* out[t] = Σ_r dt[t][r] W[r]: four positions at a time share the loads of W. */
static void low_rank(int64_t length, int64_t rank, const float *dt, const float *W, float *out)
{
    int64_t t = 0;
    for (; t + 4 <= length; t += 4) {
        const float *d = dt + t * rank;
        vf s0 = splat(0.0f), s1 = s0, s2 = s0, s3 = s0;
        for (int64_t r = 0; r < rank; r++) {
            vf w = load(W + r * VL);
            s0 += w * d[r];
            s1 += w * d[rank + r];
            s2 += w * d[2 * rank + r];
            s3 += w * d[3 * rank + r];
        }
        store(out + t * VL, s0);
        store(out + (t + 1) * VL, s1);
        store(out + (t + 2) * VL, s2);
        store(out + (t + 3) * VL, s3);
    }
    for (; t < length; t++) {
        vf s = splat(0.0f);
        for (int64_t r = 0; r < rank; r++)
            s += load(W + r * VL) * dt[t * rank + r];
        store(out + t * VL, s);
    }
}

/* The gradients of low_rank, added: gW[r] += Σ_t g[t] dt[t][r], and gdt[r][t] += Σ_channels g[t] W[r], the latter from
 * the transposed g, so that the sum over channels runs along memory. */
static void low_rank_back(int64_t length, int64_t rank, const float *dt, const float *W, const float *g, float *gW,
                          float *gdt)
{
    for (int64_t r = 0; r < rank; r += 4) {
        int count = rank - r < 4 ? (int)(rank - r) : 4;
        vf s[4];
        for (int i = 0; i < 4; i++)
            s[i] = i < count ? load(gW + (r + i) * VL) : splat(0.0f);
        for (int64_t t = 0; t < length; t++) {
            vf gt = load(g + t * VL);
            const float *d = dt + t * rank + r;
            for (int i = 0; i < count; i++)
                s[i] += gt * d[i];
        }
        for (int i = 0; i < count; i++)
            store(gW + (r + i) * VL, s[i]);
    }
    for (int64_t t = 0; t < length; t += VL) {
        vf a[VL];
        for (int i = 0; i < VL; i++)
            a[i] = t + i < length ? load(g + (t + i) * VL) : splat(0.0f);
        transpose(a);
        for (int64_t r = 0; r < rank; r++) {
            vf s0 = load(gdt + r * CHUNK + t), s1 = splat(0.0f);
            for (int i = 0; i < VL; i += 2) {
                s0 += a[i] * W[r * VL + i];
                s1 += a[i + 1] * W[r * VL + i + 1];
            }
            store(gdt + r * CHUNK + t, s0 + s1);
        }
    }
}

/* What a task works on, and its buffers, which are one piece of memory from `position` on. */
struct task_state {
    const struct scan *s;
    int64_t length, chunks, state, rank, projected;    /* state: N rounded up to NB; projected: R + 2N */
    int64_t first_item, last_item, first_block, blocks;
    int64_t item, direction, group;                    /* group: row of the parameters */
    int64_t start, count;                              /* the chunk: first step, number of steps */
    int64_t channel, lanes;                            /* the block: first channel, number of channels */
    int64_t *position;                                 /* (length + CHUNK), see open_direction */
    const int64_t *at;                                 /* the chunk's part of position */
    struct lines ahead;
    vf table;                                          /* for exp2_ */
    float *A, *A_size;                                 /* (blocks, state, VL), times log2 e; (blocks, VL), largest |A| */
    float *W, *bias, *D;                               /* (blocks, rank, VL); (blocks, VL) twice */
    float *h;                                          /* (blocks, state, VL), states or, backwards, carries */
    float *B, *C, *dt;                                 /* (CHUNK, state) twice; (CHUNK, rank) */
    float *u, *delta, *w, *y, *gy, *gw, *gd;           /* (CHUNK, VL) */
    float *slope;                                      /* (CHUNK, VL), the derivative of softplus */
    float *first;                                      /* (state, VL), the states before the chunk */
    float *grad_A, *grad_W, *grad_bias, *grad_D;       /* like A, W, bias, D */
    float *grad_B, *grad_C, *grad_dt;                  /* (CHUNK, state / NBB, VL) twice; (rank, CHUNK) */
};

static int open_task(struct task_state *k, const struct scan *s, int64_t index)
{
    int64_t group = index / s->segments, segment = index % s->segments;
    int64_t blocks = (s->channels + VL - 1) / VL;
    memset(k, 0, sizeof *k);
    k->s = s;
    k->length = s->height * s->width;
    k->chunks = (k->length + CHUNK - 1) / CHUNK;
    k->state = (s->state + NB - 1) / NB * NB;
    k->rank = s->rank;
    k->projected = s->rank + 2 * s->state;
    k->first_item = s->items * group / s->item_groups;
    k->last_item = s->items * (group + 1) / s->item_groups;
    k->first_block = blocks * segment / s->segments;
    k->blocks = blocks * (segment + 1) / s->segments - k->first_block;
#if defined(TABLE_EXP2)
    /* 2^(i/16), less the bits that the step's number adds to the exponent's low end */
    static const float steps[VL] = {1.0f,       1.0442737f, 1.0905077f, 1.1387886f, 1.1892071f, 1.2418578f,
                                    1.2968396f, 1.3542556f, 1.4142135f, 1.4768262f, 1.5422108f, 1.6104903f,
                                    1.6817929f, 1.7562522f, 1.8340081f, 1.9152066f};
    vi number = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    k->table = (vf)((vi)load(steps) - (number << EXP2_BITS));
#endif
    int64_t wide = k->blocks * k->state * VL, narrow = k->blocks * VL, low = k->blocks * k->rank * VL;
    int64_t tile = CHUNK * VL, folded = tile * k->state / NBB;
    struct {
        float **to;
        int64_t size;
    } parts[] = {
        {&k->A, wide}, {&k->A_size, narrow}, {&k->W, low}, {&k->bias, narrow}, {&k->D, narrow}, {&k->h, wide},
        {&k->B, CHUNK * k->state}, {&k->C, CHUNK * k->state}, {&k->dt, CHUNK * k->rank}, {&k->first, k->state * VL},
        {&k->u, tile}, {&k->delta, tile}, {&k->w, tile}, {&k->y, tile}, {&k->gy, tile}, {&k->gw, tile},
        {&k->gd, tile}, {&k->slope, tile}, {&k->grad_A, wide}, {&k->grad_W, low}, {&k->grad_bias, narrow},
        {&k->grad_D, narrow}, {&k->grad_B, folded}, {&k->grad_C, folded}, {&k->grad_dt, CHUNK * k->rank},
    };
    int count = sizeof parts / sizeof *parts;
    int64_t total = 2 * (k->length + CHUNK) + 16;
    for (int i = 0; i < count; i++)
        total += (parts[i].size + 15) / 16 * 16;
    k->position = calloc(total, sizeof(float));
    if (!k->position)
        return 1;
    float *next = (float *)(((uintptr_t)(k->position + k->length + CHUNK) + 63) / 64 * 64);
    for (int i = 0; i < count; i++) {
        *parts[i].to = next;
        next += (parts[i].size + 15) / 16 * 16;
    }
    return 0;
}

/* The parameters of one direction of one item, for the task's blocks; the states start at zero. `position` gets the
 * position of each step; in the one-dimensional scan, where steps are positions, the lines of a block in a chunk. */
static void open_direction(struct task_state *k, int64_t item, int64_t direction)
{
    const struct scan *s = k->s;
    k->item = item;
    k->direction = direction;
    k->group = item % s->groups + direction;
    memset(k->h, 0, k->blocks * k->state * VL * sizeof(float));
    if (s->directions == 1) {
        for (int64_t t = 0; t < CHUNK; t++)
            k->position[t] = t % VL * k->length + t / VL * 16;
    } else {
        int64_t step = 0, columns = direction & 1;
        for (int64_t i = 0; i < (columns ? s->width : s->height); i++)
            for (int64_t j = 0; j < (columns ? s->height : s->width); j++, step++)
                k->position[direction & 2 ? k->length - 1 - step : step] = columns ? j * s->width + i : step;
    }
    for (int64_t block = 0; block < k->blocks; block++) {
        int64_t channel = (k->first_block + block) * VL, lanes = s->channels - channel;
        int64_t row = k->group * s->channels + channel;
        float *A = k->A + block * k->state * VL;
        lanes = lanes < VL ? lanes : VL;
        load_columns(A, s->A + row * s->state, s->state, lanes, s->state);
        vf size = splat(0.0f);
        for (int64_t n = 0; n < s->state; n++) {
            vf a = load(A + n * VL) * 1.44269504f;
            store(A + n * VL, a);
            size = max(size, max(a, -a));
        }
        store(k->A_size + block * VL, size);
        if (k->rank)
            load_columns(k->W + block * k->rank * VL, s->dt_weight + row * k->rank, k->rank, lanes, k->rank);
        store(k->bias + block * VL, s->bias ? load_some(s->bias + row, lanes) : splat(0.0f));
        vf D = s->D ? load_some(s->D + row, lanes) : splat(0.0f);
        /* The skip of all four directions is added once, with the first. */
        for (int64_t i = 1; s->D && i < s->directions; i++)
            D = direction ? splat(0.0f) : D + load_some(s->D + row + i * s->channels, lanes);
        store(k->D + block * VL, D);
    }
}

/* Positions, B, C and low-rank dt of one chunk; the next one comes `onward` = CHUNK or −CHUNK steps later. */
static void open_chunk(struct task_state *k, int64_t chunk, int64_t onward)
{
    const struct scan *s = k->s;
    k->start = chunk * CHUNK;
    k->count = k->length - k->start < CHUNK ? k->length - k->start : CHUNK;
    k->at = k->position + k->start;
    k->ahead.at = s->directions == 1 ? k->position : k->start + onward < 0 ? k->at : k->at + onward;
    k->ahead.stride = s->directions == 1 ? 1 : s->channels;
    if (s->directions == 1) {
        for (int64_t n = 0; n < s->state; n++) {
            const float *B = s->B + (k->item * s->state + n) * k->length + k->start;
            const float *C = s->C + (k->item * s->state + n) * k->length + k->start;
            for (int64_t t = 0; t < k->count; t++) {
                k->B[t * k->state + n] = B[t];
                k->C[t * k->state + n] = C[t];
            }
        }
        return;
    }
    for (int64_t t = 0; t < k->count; t++) {
        const float *from = s->x_dbl + ((k->item * k->length + k->at[t]) * 4 + k->direction) * k->projected;
        copy(k->dt + t * k->rank, from, k->rank);
        copy(k->B + t * k->state, from + k->rank, s->state);
        copy(k->C + t * k->state, from + k->rank + s->state, s->state);
        const float *next = s->x_dbl + ((k->item * k->length + k->ahead.at[t]) * 4 + k->direction) * k->projected;
        for (int64_t i = 0; i < k->projected; i += 16)
            __builtin_prefetch(next + i, 0, 2);
    }
}

/* u, Δ and Δu of one block in one chunk. Returns whether Δ A may leave the range of exp2_. */
static int open_block(struct task_state *k, int64_t block, int with_slope)
{
    const struct scan *s = k->s;
    k->channel = (k->first_block + block) * VL;
    k->lanes = s->channels - k->channel < VL ? s->channels - k->channel : VL;
    vf bias = load(k->bias + block * VL);
    if (s->directions == 1) {
        int64_t at = (k->item * s->channels + k->channel) * k->length + k->start;
        load_columns(k->u, s->u + at, k->length, k->lanes, k->count);
        load_columns(k->delta, s->delta + at, k->length, k->lanes, k->count);
    } else {
        const float *u = s->u + k->item * k->length * s->channels + k->channel;
        for (int64_t t = 0; t < k->count; t++)
            store(k->u + t * VL, load_some(u + k->at[t] * s->channels, k->lanes));
        low_rank(k->count, k->rank, k->dt, k->W + block * k->rank * VL, k->delta);
    }
    vf size = splat(0.0f);
    for (int64_t t = 0; t < k->count; t++) {
        vf d = load(k->delta + t * VL) + bias, slope = splat(1.0f);
        if (s->softplus)
            d = softplus_(d, with_slope ? &slope : 0);
        if (with_slope)
            store(k->slope + t * VL, slope);
        store(k->delta + t * VL, d);
        store(k->w + t * VL, d * load(k->u + t * VL));
        size = max(size, s->softplus ? d : max(d, -d));
    }
    size *= load(k->A_size + block * VL);
    int inside = 1;
    for (int i = 0; i < VL; i++)
        inside &= size[i] <= 126.0f;
    return !inside;
}

static void forward_block(struct task_state *k, int64_t chunk, int64_t block)
{
    const struct scan *s = k->s;
    int clamp = open_block(k, block, 0);
    int one = s->directions == 1;
    float *A = k->A + block * k->state * VL, *h = k->h + block * k->state * VL;
    int64_t at = k->item * k->length * s->channels + (one ? k->channel * k->length + k->start : k->channel);
    float *y = s->y + at;
    k->ahead.a = s->u + at + (one ? CHUNK : 0);
    k->ahead.b = one ? s->delta + at + CHUNK : y;
    if (s->states) {
        float *to = s->states + k->channel +
                    ((k->item * s->directions + k->direction) * k->chunks + chunk) * s->state * s->padded_channels;
        for (int64_t n = 0; n < s->state; n++)
            store(to + n * s->padded_channels, load(h + n * VL));
    }
    vf D = load(k->D + block * VL);
    for (int64_t t = 0; t < k->count; t++)
        store(k->y + t * VL, k->direction ? load_some(y + k->at[t] * s->channels, k->lanes) : D * load(k->u + t * VL));
    for (int64_t n = 0; n < k->state; n += NB) {
        if (clamp)
            scan_states(1, k->count, k->state, A + n * VL, k->delta, k->w, k->B + n, k->C + n, h + n * VL, k->y,
                        &k->ahead, k->table);
        else
            scan_states(0, k->count, k->state, A + n * VL, k->delta, k->w, k->B + n, k->C + n, h + n * VL, k->y,
                        &k->ahead, k->table);
    }
    if (one)
        store_columns(y, k->y, k->length, k->lanes, k->count, 0);
    else
        for (int64_t t = 0; t < k->count; t++)
            store_some(y + k->at[t] * s->channels, load(k->y + t * VL), k->lanes);
}

int JOIN(forward, ISA)(const struct scan *s, int64_t index)
{
    struct task_state task, *k = &task;
    if (open_task(k, s, index))
        return 1;
    for (int64_t item = k->first_item; item < k->last_item; item++)
        for (int64_t direction = 0; direction < s->directions; direction++) {
            open_direction(k, item, direction);
            for (int64_t chunk = 0; chunk < k->chunks; chunk++) {
                open_chunk(k, chunk, CHUNK);
                for (int64_t block = 0; block < k->blocks; block++)
                    forward_block(k, chunk, block);
            }
        }
    free(k->position);
    return 0;
}

/* What the sums over channels of one chunk came to, into this task's copy of ∂(dt, B, C). */
static void close_chunk(struct task_state *k, int64_t segment)
{
    const struct scan *s = k->s;
    int64_t ldg = k->state / NBB * VL, item = segment * s->items + k->item;
    for (int64_t t = 0; t < k->count; t++) {
        float *to = 0;
        if (s->directions != 1) {
            to = s->grad_x_dbl + ((item * k->length + k->at[t]) * 4 + k->direction) * k->projected;
            for (int64_t r = 0; r < k->rank; r++)
                to[r] = k->grad_dt[r * CHUNK + t];
        }
        for (int64_t n = 0; n < s->state; n++) {
            const float *b = k->grad_B + t * ldg + n / NBB * VL + n % NBB;
            const float *c = k->grad_C + t * ldg + n / NBB * VL + n % NBB;
            float sum_b = 0, sum_c = 0;
            for (int i = 0; i < VL; i += NBB) {
                sum_b += b[i];
                sum_c += c[i];
            }
            if (to) {
                to[k->rank + n] = sum_b;
                to[k->rank + s->state + n] = sum_c;
            } else {
                s->grad_B[(item * s->state + n) * k->length + k->start + t] = sum_b;
                s->grad_C[(item * s->state + n) * k->length + k->start + t] = sum_c;
            }
        }
    }
    memset(k->grad_B, 0, k->count * ldg * sizeof(float));
    memset(k->grad_C, 0, k->count * ldg * sizeof(float));
    memset(k->grad_dt, 0, CHUNK * k->rank * sizeof(float));
}

/* The sums over positions of one direction of one item, added to those of its item group. */
static void close_direction(struct task_state *k, int64_t item_group)
{
    const struct scan *s = k->s;
    int64_t rows = s->directions == 1 ? s->groups : s->directions;
    for (int64_t block = 0; block < k->blocks; block++) {
        int64_t channel = (k->first_block + block) * VL, lanes = s->channels - channel;
        int64_t row = (item_group * rows + k->group) * s->channels + channel;
        lanes = lanes < VL ? lanes : VL;
        store_columns(s->grad_A + row * s->state, k->grad_A + block * k->state * VL, s->state, lanes, s->state, 1);
        if (k->rank)
            store_columns(s->grad_dt_weight + row * k->rank, k->grad_W + block * k->rank * VL, k->rank, lanes, k->rank,
                          1);
        vf bias = load(k->grad_bias + block * VL), D = load(k->grad_D + block * VL);
        store_some(s->grad_bias + row, load_some(s->grad_bias + row, lanes) + bias, lanes);
        store_some(s->grad_D + row, load_some(s->grad_D + row, lanes) + D, lanes);
    }
    memset(k->grad_A, 0, k->blocks * k->state * VL * sizeof(float));
    memset(k->grad_W, 0, k->blocks * k->rank * VL * sizeof(float));
    memset(k->grad_bias, 0, k->blocks * VL * sizeof(float));
    memset(k->grad_D, 0, k->blocks * VL * sizeof(float));
}

static void backward_block(struct task_state *k, int64_t chunk, int64_t block)
{
    const struct scan *s = k->s;
    int clamp = open_block(k, block, 1);
    int one = s->directions == 1;
    int64_t ldg = k->state / NBB * VL;
    int64_t at = k->item * k->length * s->channels + (one ? k->channel * k->length + k->start : k->channel);
    const float *states = s->states + k->channel +
                          ((k->item * s->directions + k->direction) * k->chunks + chunk) * s->state * s->padded_channels;
    for (int64_t n = 0; n < s->state; n++)
        store(k->first + n * VL, load(states + n * s->padded_channels));
    k->ahead.a = s->u + at - (one ? CHUNK : 0);
    k->ahead.b = s->grad_y + at - (one ? CHUNK : 0);
    if (one)
        load_columns(k->gy, s->grad_y + at, k->length, k->lanes, k->count);
    else
        for (int64_t t = 0; t < k->count; t++)
            store(k->gy + t * VL, load_some(s->grad_y + at + k->at[t] * s->channels, k->lanes));
    memset(k->gw, 0, k->count * VL * sizeof(float));
    memset(k->gd, 0, k->count * VL * sizeof(float));
    for (int64_t n = 0; n < k->state; n += NBB) {
        int64_t row = (block * k->state + n) * VL;
        if (clamp)
            scan_states_back(1, k->count, k->state, k->A + row, k->delta, k->w, k->B + n, k->C + n, k->first + n * VL,
                             k->gy, k->h + row, k->grad_A + row, k->gw, k->gd, k->grad_B + n / NBB * VL,
                             k->grad_C + n / NBB * VL, ldg, k->table);
        else
            scan_states_back(0, k->count, k->state, k->A + row, k->delta, k->w, k->B + n, k->C + n, k->first + n * VL,
                             k->gy, k->h + row, k->grad_A + row, k->gw, k->gd, k->grad_B + n / NBB * VL,
                             k->grad_C + n / NBB * VL, ldg, k->table);
    }
    vf D = load(k->D + block * VL), sum_bias = load(k->grad_bias + block * VL), sum_D = load(k->grad_D + block * VL);
    for (int64_t t = 0; t < k->count; t++) {
        vf u = load(k->u + t * VL), gw = load(k->gw + t * VL), gy = load(k->gy + t * VL);
        fetch(&k->ahead, t);
        vf gdelta = (gw * u + load(k->gd + t * VL) * 0.69314718f) * load(k->slope + t * VL);
        vf gu = gw * load(k->delta + t * VL) + D * gy;
        sum_bias += gdelta;
        sum_D += gy * u;
        store(k->gd + t * VL, gdelta);
        if (one)
            store(k->gw + t * VL, gu);
        else {
            float *to = s->grad_u + at + k->at[t] * s->channels;
            store_some(to, k->direction ? load_some(to, k->lanes) + gu : gu, k->lanes);
        }
    }
    store(k->grad_bias + block * VL, sum_bias);
    store(k->grad_D + block * VL, sum_D);
    if (one) {
        store_columns(s->grad_u + at, k->gw, k->length, k->lanes, k->count, 0);
        store_columns(s->grad_delta + at, k->gd, k->length, k->lanes, k->count, 0);
    } else {
        low_rank_back(k->count, k->rank, k->dt, k->W + block * k->rank * VL, k->gd, k->grad_W + block * k->rank * VL,
                      k->grad_dt);
    }
}

int JOIN(backward, ISA)(const struct scan *s, int64_t index)
{
    struct task_state task, *k = &task;
    if (open_task(k, s, index))
        return 1;
    for (int64_t item = k->first_item; item < k->last_item; item++)
        for (int64_t direction = 0; direction < s->directions; direction++) {
            open_direction(k, item, direction);
            for (int64_t chunk = k->chunks - 1; chunk >= 0; chunk--) {
                open_chunk(k, chunk, -CHUNK);
                for (int64_t block = 0; block < k->blocks; block++)
                    backward_block(k, chunk, block);
                close_chunk(k, index % s->segments);
            }
            close_direction(k, index / s->segments);
        }
    free(k->position);
    return 0;
}

