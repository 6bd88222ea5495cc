/* What forward and backward pass share: a task, cut into blocks of channels and chunks of steps.
 *
 * A task owns a range of channels for a range of items. It walks each direction in chunks of CHUNK
 * steps, and within a chunk through its blocks of VL channels. The order of the positions is a list
 * of indices, so that the four directions need neither copies nor transposes; the task that owns a
 * position adds up their four results there. For a chunk B and C are gathered once for all blocks.
 * For a block the step Δ is made from its low-rank factors, VL channels at a time, into a tile that
 * stays in the first-level cache, and the states run through the tile.
 */
#ifndef SCAN_CPU_TASK_H
#define SCAN_CPU_TASK_H

#include <stdlib.h>

#include "scan_cpu.h"
#include "scan_cpu_vectors.h"

#define FOLD 4 /* states at a time in the backward pass: fold4 takes the sums of four */

/* VL neighbouring channels in one direction of one item. `state` holds h between chunks, in the
 * backward pass what the adjoint hands on. The gradients are sums over the direction's steps. */
struct block {
    int64_t channel, lanes; /* the first channel; how many of the VL exist */
    int64_t row;            /* of the first channel in the parameters: A, D, bias, dt_weight */
    vf *A;                  /* (state), times log2 e: decay is 2^(Δ A) */
    vf *dt_weight;          /* (rank) */
    vf *state;              /* (state) */
    vf largest_A;           /* largest |A| of each channel */
    vf bias, D;
    vf *grad_A, *grad_dt_weight, grad_bias, grad_D;
};

/* Up to CHUNK neighbouring steps of one direction of one item. The gradients are sums over the
 * task's channels, those of B and C as fold4 leaves them. */
struct chunk {
    int64_t index, start, count;
    const int64_t *position; /* (count): where in the image the steps lie; 2-D only */
    float *B, *C;            /* (CHUNK, state) */
    float *dt;               /* (CHUNK, rank) */
    vf *grad_B, *grad_C;     /* (CHUNK, state / FOLD) */
    float *grad_dt;          /* (rank, CHUNK) */
};

/* One block in one chunk. */
struct tile {
    vf u[CHUNK], delta[CHUNK];
    vf inflow[CHUNK]; /* Δ u */
    vf out[CHUNK];    /* y, or ∂u */
    vf grad_y[CHUNK];
    vf grad_inflow[CHUNK];
    vf grad_delta[CHUNK];
    vf slope[CHUNK]; /* dΔ / d(Δ before softplus) */
};

/* Memory that the next chunk of a block will touch. The processor cannot foresee the strides of a
 * direction, so each step of a chunk asks for one line of each of two arrays. What lies outside of
 * them is never read: a prefetch of any address is allowed. */
struct ahead {
    const int64_t *offset;
    int64_t stride;
    const float *first, *second;
};

INLINE void fetch(struct ahead ahead, int64_t t)
{
    __builtin_prefetch(ahead.first + ahead.offset[t] * ahead.stride, 0, 2);
    __builtin_prefetch(ahead.second + ahead.offset[t] * ahead.stride, 0, 2);
}

/* A task and where it is. `state` is N rounded up to a multiple of NB: A, B and C of the states
 * added are zero. `projected` is R + 2N, what x_dbl holds for a position and direction. */
struct task {
    const struct scan *scan;
    int image, backward;
    int64_t item_group, segment;
    int64_t first_item, last_item, blocks;
    int64_t length, chunks, state, projected;
    int64_t item, direction;
    int64_t *position; /* (length + CHUNK), see order_steps */
    struct block *block;
    struct chunk chunk;
    struct tile *tile;
    struct ahead ahead;
    vf table; /* of power_of_2 */
    void *memory;
};

/* One piece of memory handed out from its start. While `start` is NULL it only counts. */
struct memory {
    char *start;
    int64_t used;
};

static void *take(struct memory *memory, int64_t bytes)
{
    void *piece = memory->start ? memory->start + memory->used : NULL;
    memory->used += (bytes + 63) / 64 * 64;
    return piece;
}

static void lay_out(struct task *k, struct memory *memory)
{
    int64_t rank = k->scan->rank, vector = sizeof(vf), folded = k->backward ? k->state / FOLD : 0;
    int64_t states = k->blocks * k->state, ranks = k->blocks * rank;
    k->position = take(memory, (k->length + CHUNK) * sizeof(int64_t));
    k->block = take(memory, k->blocks * sizeof(struct block));
    k->chunk.B = take(memory, CHUNK * k->state * sizeof(float));
    k->chunk.C = take(memory, CHUNK * k->state * sizeof(float));
    k->chunk.dt = take(memory, CHUNK * rank * sizeof(float));
    k->tile = take(memory, sizeof(struct tile));
    vf *A = take(memory, states * vector), *dt_weight = take(memory, ranks * vector);
    vf *state = take(memory, states * vector);
    vf *grad_A = take(memory, k->backward ? states * vector : 0);
    vf *grad_dt_weight = take(memory, k->backward ? ranks * vector : 0);
    k->chunk.grad_B = take(memory, CHUNK * folded * vector);
    k->chunk.grad_C = take(memory, CHUNK * folded * vector);
    k->chunk.grad_dt = take(memory, k->backward ? CHUNK * rank * sizeof(float) : 0);
    for (int64_t i = 0; memory->start && i < k->blocks; i++) {
        k->block[i].A = A + i * k->state;
        k->block[i].dt_weight = dt_weight + i * rank;
        k->block[i].state = state + i * k->state;
        k->block[i].grad_A = grad_A + i * k->state;
        k->block[i].grad_dt_weight = grad_dt_weight + i * rank;
    }
}

/* Task `index` of item_groups * segments. Returns 1 when there is no memory for its buffers, which
 * start as zeros. */
static int open_task(struct task *k, const struct scan *s, int64_t index, int backward)
{
    int64_t blocks = (s->channels + VL - 1) / VL;
    memset(k, 0, sizeof *k);
    k->scan = s;
    k->image = s->directions == 4;
    k->backward = backward;
    k->item_group = index / s->segments;
    k->segment = index % s->segments;
    k->first_item = s->items * k->item_group / s->item_groups;
    k->last_item = s->items * (k->item_group + 1) / s->item_groups;
    int64_t first_block = blocks * k->segment / s->segments;
    k->blocks = blocks * (k->segment + 1) / s->segments - first_block;
    k->length = s->height * s->width;
    k->chunks = (k->length + CHUNK - 1) / CHUNK;
    k->state = (s->state + NB - 1) / NB * NB;
    k->projected = s->rank + 2 * s->state;
    k->table = exp2_table();
    struct memory memory = {0};
    lay_out(k, &memory);
    k->memory = calloc(memory.used + 64, 1);
    if (!k->memory)
        return 1;
    memory = (struct memory){(char *)(((uintptr_t)k->memory + 63) / 64 * 64), 0};
    lay_out(k, &memory);
    for (int64_t i = 0; i < k->blocks; i++) {
        int64_t channel = (first_block + i) * VL, left = s->channels - channel;
        k->block[i].channel = channel;
        k->block[i].lanes = left < VL ? left : VL;
    }
    return 0;
}

/* Fills `position`: the position of each step, and CHUNK zeros, which are prefetched past the end.
 * In a sequence steps are positions, and what it lists is what to prefetch of a block in a chunk:
 * the first 64 bytes of each channel, one a step, then the next 64 bytes of each. */
static void order_steps(struct task *k)
{
    const struct scan *s = k->scan;
    if (!k->image) {
        for (int64_t t = 0; t < CHUNK; t++)
            k->position[t] = t % VL * k->length + t / VL * 16;
        return;
    }
    int columns = k->direction & 1, reversed = k->direction & 2;
    int64_t lines = columns ? s->width : s->height, along = columns ? s->height : s->width;
    int64_t step = 0;
    for (int64_t i = 0; i < lines; i++)
        for (int64_t j = 0; j < along; j++, step++)
            k->position[reversed ? k->length - 1 - step : step] = columns ? j * s->width + i : step;
}

/* The skip D. That of all four directions is added once, with the first. */
static vf skip(const struct task *k, const struct block *b)
{
    const struct scan *s = k->scan;
    if (!s->D || k->direction)
        return splat(0.0f);
    vf D = load_some(s->D + b->row, b->lanes);
    for (int64_t i = 1; i < s->directions; i++)
        D += load_some(s->D + b->row + i * s->channels, b->lanes);
    return D;
}

/* The parameters of one direction of one item; the states, or the adjoint, start at zero. */
static void open_direction(struct task *k, int64_t item, int64_t direction)
{
    const struct scan *s = k->scan;
    k->item = item;
    k->direction = direction;
    order_steps(k);
    for (struct block *b = k->block; b < k->block + k->blocks; b++) {
        b->row = (item % s->groups + direction) * s->channels + b->channel;
        load_columns(b->A, s->A + b->row * s->state, s->state, b->lanes, s->state);
        vf largest = splat(0.0f);
        for (int64_t n = 0; n < s->state; n++) {
            b->A[n] *= LOG2_E;
            largest = max(largest, max(b->A[n], -b->A[n]));
        }
        b->largest_A = largest;
        if (s->rank)
            load_columns(b->dt_weight, s->dt_weight + b->row * s->rank, s->rank, b->lanes, s->rank);
        b->bias = s->bias ? load_some(s->bias + b->row, b->lanes) : splat(0.0f);
        b->D = skip(k, b);
        memset(b->state, 0, k->state * sizeof(vf));
    }
}

static void gather_from_sequence(struct task *k)
{
    struct chunk *c = &k->chunk;
    for (int64_t n = 0; n < k->scan->state; n++) {
        int64_t row = (k->item * k->scan->state + n) * k->length + c->start;
        const float *B = k->scan->B + row, *C = k->scan->C + row;
        for (int64_t t = 0; t < c->count; t++) {
            c->B[t * k->state + n] = B[t];
            c->C[t * k->state + n] = C[t];
        }
    }
}

/* Where in x_dbl a position's (dt, B, C) of the task's direction begin. */
static int64_t projected_row(const struct task *k, int64_t item, int64_t position)
{
    return ((item * k->length + position) * 4 + k->direction) * k->projected;
}

static void gather_from_image(struct task *k)
{
    struct chunk *c = &k->chunk;
    int64_t rank = k->scan->rank, state = k->scan->state;
    for (int64_t t = 0; t < c->count; t++) {
        const float *from = k->scan->x_dbl + projected_row(k, k->item, c->position[t]);
        copy(c->dt + t * rank, from, rank);
        copy(c->B + t * k->state, from + rank, state);
        copy(c->C + t * k->state, from + rank + state, state);
        from = k->scan->x_dbl + projected_row(k, k->item, k->ahead.offset[t]);
        for (int64_t i = 0; i < k->projected; i += 16)
            __builtin_prefetch(from + i, 0, 2);
    }
}

/* Positions, B, C and low-rank dt of one chunk. */
static void open_chunk(struct task *k, int64_t index)
{
    struct chunk *c = &k->chunk;
    int64_t left = k->length - index * CHUNK;
    c->index = index;
    c->start = index * CHUNK;
    c->count = left < CHUNK ? left : CHUNK;
    if (k->image) {
        int64_t next = c->start + (k->backward ? -CHUNK : CHUNK);
        c->position = k->position + c->start;
        k->ahead.offset = next < 0 ? c->position : k->position + next;
        k->ahead.stride = k->scan->channels;
        gather_from_image(k);
    } else {
        k->ahead.offset = k->position;
        k->ahead.stride = 1;
        gather_from_sequence(k);
    }
}

/* Where the states of a block before the chunk are saved. */
static float *saved_states(const struct task *k, const struct block *b)
{
    const struct scan *s = k->scan;
    int64_t chunk = (k->item * s->directions + k->direction) * k->chunks + k->chunk.index;
    return s->states + chunk * s->state * s->padded_channels + b->channel;
}

/* Where a block in a chunk begins in an array like u: of images (items, length, channels), of
 * sequences (items, channels, length). */
static int64_t origin(const struct task *k, const struct block *b)
{
    int64_t item = k->item * k->length * k->scan->channels;
    return item + (k->image ? b->channel : b->channel * k->length + k->chunk.start);
}

static void read_tile(const struct task *k, const struct block *b, const float *from, vf *to)
{
    from += origin(k, b);
    if (!k->image) {
        load_columns(to, from, k->length, b->lanes, k->chunk.count);
        return;
    }
    for (int64_t t = 0; t < k->chunk.count; t++)
        to[t] = load_some(from + k->chunk.position[t] * k->scan->channels, b->lanes);
}

/* Adds to what is there if asked to. */
static void write_tile(const struct task *k, const struct block *b, const vf *from, float *to,
                       int add)
{
    to += origin(k, b);
    if (!k->image) {
        store_columns(to, from, k->length, b->lanes, k->chunk.count, add);
        return;
    }
    for (int64_t t = 0; t < k->chunk.count; t++) {
        float *at = to + k->chunk.position[t] * k->scan->channels;
        vf value = from[t];
        if (add)
            value += load_some(at, b->lanes);
        store_some(at, value, b->lanes);
    }
}

static void look_ahead(struct task *k, const struct block *b, const float *first,
                       const float *second)
{
    int64_t next = origin(k, b);
    if (!k->image)
        next += k->backward ? -CHUNK : CHUNK;
    k->ahead.first = first + next;
    k->ahead.second = second + next;
}

/* out[t] = Σ_r dt[t][r] weight[r]: four positions at a time share the loads of the weights. */
static void low_rank(int64_t count, int64_t rank, const float *dt, const vf *weight, vf *out)
{
    int64_t t = 0;
    for (; t + 4 <= count; t += 4) {
        const float *d = dt + t * rank;
        vf s0 = splat(0.0f), s1 = s0, s2 = s0, s3 = s0;
        for (int64_t r = 0; r < rank; r++) {
            vf w = weight[r];
            s0 += w * d[r];
            s1 += w * d[rank + r];
            s2 += w * d[2 * rank + r];
            s3 += w * d[3 * rank + r];
        }
        out[t] = s0;
        out[t + 1] = s1;
        out[t + 2] = s2;
        out[t + 3] = s3;
    }
    for (; t < count; t++) {
        vf s = splat(0.0f);
        for (int64_t r = 0; r < rank; r++)
            s += weight[r] * dt[t * rank + r];
        out[t] = s;
    }
}

/* u, Δ and Δu of one block in one chunk. Returns whether Δ A may leave the range of power_of_2: its
 * arguments are clamped only then, since that is two instructions more for each exponential. */
static int open_block(struct task *k, const struct block *b)
{
    const struct scan *s = k->scan;
    struct tile *tile = k->tile;
    int64_t count = k->chunk.count;
    vf bias = b->bias, largest = splat(0.0f);
    read_tile(k, b, s->u, tile->u);
    if (k->image)
        low_rank(count, s->rank, k->chunk.dt, b->dt_weight, tile->delta);
    else
        read_tile(k, b, s->delta, tile->delta);
    for (int64_t t = 0; t < count; t++) {
        vf d = tile->delta[t] + bias, slope = splat(1.0f);
        if (s->softplus)
            d = softplus(d, k->backward ? &slope : NULL);
        if (k->backward)
            tile->slope[t] = slope;
        tile->delta[t] = d;
        tile->inflow[t] = d * tile->u[t];
        largest = max(largest, s->softplus ? d : max(d, -d));
    }
    largest *= b->largest_A;
    int inside = 1;
    for (int i = 0; i < VL; i++)
        inside &= largest[i] <= 126.0f;
    return !inside;
}

#endif
