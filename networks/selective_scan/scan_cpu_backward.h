/* The backward pass walks the chunks in reverse. It scans a chunk again from the saved states, FOLD
 * states at a time, keeps decays a_t = 2^(Δ_t A) and states h_t of that chunk, and runs the adjoint
 * recurrence back through it:
 *
 *   g_t = C_t ∂y_t + a_{t+1} g_{t+1},  q_t = g_t a_t h_{t-1},
 *   ∂C_t = Σ_channels ∂y_t h_t,  ∂B_t = Σ_channels g_t Δ_t u_t,  ∂(Δu)_t = Σ_states g_t B_t,
 *   ∂Δ_t += Σ_states A q_t,  ∂A = Σ_t Δ_t q_t.
 *
 * Sums over channels stay vectors over the blocks of a task and are folded once a chunk. Each task
 * has its own copy of what several tasks add to; the caller adds the copies up.
 */
#ifndef SCAN_CPU_BACKWARD_H
#define SCAN_CPU_BACKWARD_H

#include "scan_cpu_task.h"

/* States first ... first + FOLD - 1 forward through a tile: decays a_t, and h with the state before
 * the chunk first. */
INLINE void scan_again(int clamp, const struct task *k, const struct block *b, int64_t first,
                       vf (*decays)[FOLD], vf (*h)[FOLD])
{
    const int64_t count = k->chunk.count, row = k->state;
    const float *B = k->chunk.B + first;
    const vf *delta = k->tile->delta, *inflow = k->tile->inflow;
    const vf table = k->table;
    vf A[FOLD];
    for (int n = 0; n < FOLD; n++)
        A[n] = b->A[first + n];
    for (int64_t t = 0; t < count; t++) {
        vf d = delta[t], w = inflow[t];
#pragma GCC unroll 4
        for (int n = 0; n < FOLD; n++) {
            vf x = d * A[n];
            if (clamp)
                x = clamped(x);
            vf a = power_of_2(x, table);
            decays[t][n] = a;
            h[t + 1][n] = a * h[t][n] + w * B[t * row + n];
        }
    }
}

/* The same states back. Adds to all their gradients; ∂Δ is still to be multiplied by ln 2, since A
 * is times log2 e. */
INLINE void adjoint(const struct task *k, struct block *b, int64_t first, vf (*decays)[FOLD],
                    vf (*h)[FOLD])
{
    const int64_t count = k->chunk.count, row = k->state, folded_row = k->state / FOLD;
    const float *B = k->chunk.B + first, *C = k->chunk.C + first;
    vf *grad_B = k->chunk.grad_B + first / FOLD, *grad_C = k->chunk.grad_C + first / FOLD;
    struct tile *tile = k->tile;
    vf A[FOLD], g[FOLD], grad_A[FOLD];
    for (int n = 0; n < FOLD; n++) {
        A[n] = b->A[first + n];
        g[n] = b->state[first + n];
        grad_A[n] = b->grad_A[first + n];
    }
    for (int64_t t = count - 1; t >= 0; t--) {
        vf d = tile->delta[t], w = tile->inflow[t], grad_y = tile->grad_y[t];
        vf grad_inflow = tile->grad_inflow[t], grad_delta = tile->grad_delta[t];
        vf gB[FOLD], gC[FOLD];
#pragma GCC unroll 4
        for (int n = 0; n < FOLD; n++) {
            vf gn = grad_y * C[t * row + n] + g[n];
            gC[n] = grad_y * h[t + 1][n];
            gB[n] = gn * w;
            grad_inflow += gn * B[t * row + n];
            g[n] = gn * decays[t][n];
            vf q = g[n] * h[t][n];
            grad_delta += q * A[n];
            grad_A[n] += q * d;
        }
        tile->grad_inflow[t] = grad_inflow;
        tile->grad_delta[t] = grad_delta;
        grad_B[t * folded_row] += fold4(gB[0], gB[1], gB[2], gB[3]);
        grad_C[t * folded_row] += fold4(gC[0], gC[1], gC[2], gC[3]);
    }
    for (int n = 0; n < FOLD; n++) {
        b->state[first + n] = g[n];
        b->grad_A[first + n] = grad_A[n];
    }
}

INLINE void scan_states_back(int clamp, const struct task *k, struct block *b, int64_t first)
{
    const float *saved = saved_states(k, b);
    vf decays[CHUNK][FOLD], h[CHUNK + 1][FOLD];
    for (int64_t n = 0; n < FOLD; n++)
        h[0][n] = first + n < k->scan->state ? load(saved + (first + n) * k->scan->padded_channels)
                                             : splat(0.0f);
    scan_again(clamp, k, b, first, decays, h);
    adjoint(k, b, first, decays, h);
}

/* What is still to do of ∂u, ∂Δ, ∂D and ∂bias when all states are through. */
static void finish_block(struct task *k, struct block *b)
{
    struct tile *tile = k->tile;
    const struct ahead ahead = k->ahead;
    vf D = b->D, grad_bias = b->grad_bias, grad_D = b->grad_D;
    for (int64_t t = 0; t < k->chunk.count; t++) {
        vf u = tile->u[t], grad_inflow = tile->grad_inflow[t], grad_y = tile->grad_y[t];
        fetch(ahead, t);
        vf grad_delta = (grad_inflow * u + tile->grad_delta[t] * LN_2) * tile->slope[t];
        tile->out[t] = grad_inflow * tile->delta[t] + D * grad_y;
        grad_bias += grad_delta;
        grad_D += grad_y * u;
        tile->grad_delta[t] = grad_delta;
    }
    b->grad_bias = grad_bias;
    b->grad_D = grad_D;
}

/* The gradients of low_rank, added. The one of dt is a sum over channels, hence over lanes: it is
 * taken from the transposed ∂Δ, where it runs along memory. */
static void low_rank_back(int64_t count, int64_t rank, const float *dt, const vf *weight,
                          const vf *grad_out, vf *grad_weight, float *grad_dt)
{
    for (int64_t r = 0; r < rank; r += 4) {
        int width = rank - r < 4 ? (int)(rank - r) : 4;
        vf s[4];
        for (int i = 0; i < 4; i++)
            s[i] = i < width ? grad_weight[r + i] : splat(0.0f);
        for (int64_t t = 0; t < count; t++) {
            vf g = grad_out[t];
            const float *d = dt + t * rank + r;
            for (int i = 0; i < width; i++)
                s[i] += g * d[i];
        }
        for (int i = 0; i < width; i++)
            grad_weight[r + i] = s[i];
    }
    for (int64_t t = 0; t < count; t += VL) {
        vf a[VL];
        for (int i = 0; i < VL; i++)
            a[i] = t + i < count ? grad_out[t + i] : splat(0.0f);
        transpose(a);
        for (int64_t r = 0; r < rank; r++) {
            vf s0 = load(grad_dt + r * CHUNK + t), s1 = splat(0.0f);
            for (int i = 0; i < VL; i += 2) {
                s0 += a[i] * weight[r][i];
                s1 += a[i + 1] * weight[r][i + 1];
            }
            store(grad_dt + r * CHUNK + t, s0 + s1);
        }
    }
}

static void backward_block(struct task *k, struct block *b)
{
    const struct scan *s = k->scan;
    struct tile *tile = k->tile;
    int64_t count = k->chunk.count;
    int clamp = open_block(k, b);
    look_ahead(k, b, s->u, s->grad_y);
    read_tile(k, b, s->grad_y, tile->grad_y);
    memset(tile->grad_inflow, 0, count * sizeof(vf));
    memset(tile->grad_delta, 0, count * sizeof(vf));
    for (int64_t n = 0; n < k->state; n += FOLD)
        if (clamp)
            scan_states_back(1, k, b, n);
        else
            scan_states_back(0, k, b, n);
    finish_block(k, b);
    if (k->image)
        low_rank_back(count, s->rank, k->chunk.dt, b->dt_weight, tile->grad_delta,
                      b->grad_dt_weight, k->chunk.grad_dt);
    else
        write_tile(k, b, tile->grad_delta, s->grad_delta, 0);
    /* The first direction starts ∂u, the others add to it. */
    write_tile(k, b, tile->out, s->grad_u, k->direction != 0);
}

/* The end of fold4 for one state: the sum over lanes of one step. */
static float folded(const vf *sums, int64_t n)
{
    const float *partial = (const float *)(sums + n / FOLD) + n % FOLD;
    float sum = 0;
    for (int i = 0; i < VL; i += FOLD)
        sum += partial[i];
    return sum;
}

static void scatter_to_sequence(const struct task *k, int64_t item)
{
    const struct chunk *c = &k->chunk;
    int64_t row = k->state / FOLD;
    for (int64_t n = 0; n < k->scan->state; n++) {
        int64_t to = (item * k->scan->state + n) * k->length + c->start;
        for (int64_t t = 0; t < c->count; t++) {
            k->scan->grad_B[to + t] = folded(c->grad_B + t * row, n);
            k->scan->grad_C[to + t] = folded(c->grad_C + t * row, n);
        }
    }
}

static void scatter_to_image(const struct task *k, int64_t item)
{
    const struct chunk *c = &k->chunk;
    int64_t row = k->state / FOLD, rank = k->scan->rank, state = k->scan->state;
    for (int64_t t = 0; t < c->count; t++) {
        float *to = k->scan->grad_x_dbl + projected_row(k, item, c->position[t]);
        for (int64_t r = 0; r < rank; r++)
            to[r] = c->grad_dt[r * CHUNK + t];
        for (int64_t n = 0; n < state; n++) {
            to[rank + n] = folded(c->grad_B + t * row, n);
            to[rank + state + n] = folded(c->grad_C + t * row, n);
        }
    }
}

/* The sums over channels of one chunk, into this task's copy of ∂B and ∂C, or ∂(dt, B, C). */
static void close_chunk(struct task *k)
{
    struct chunk *c = &k->chunk;
    int64_t vectors = c->count * k->state / FOLD, item = k->segment * k->scan->items + k->item;
    if (k->image)
        scatter_to_image(k, item);
    else
        scatter_to_sequence(k, item);
    memset(c->grad_B, 0, vectors * sizeof(vf));
    memset(c->grad_C, 0, vectors * sizeof(vf));
    memset(c->grad_dt, 0, CHUNK * k->scan->rank * sizeof(float));
}

static void add_some(float *to, vf a, int64_t lanes)
{
    store_some(to, load_some(to, lanes) + a, lanes);
}

/* The sums over steps of one direction of one item, added to those of its item group. */
static void close_direction(struct task *k)
{
    const struct scan *s = k->scan;
    int64_t rows = (k->image ? s->directions : s->groups) * s->channels;
    for (struct block *b = k->block; b < k->block + k->blocks; b++) {
        int64_t row = k->item_group * rows + b->row;
        store_columns(s->grad_A + row * s->state, b->grad_A, s->state, b->lanes, s->state, 1);
        if (s->rank)
            store_columns(s->grad_dt_weight + row * s->rank, b->grad_dt_weight, s->rank, b->lanes,
                          s->rank, 1);
        if (s->bias)
            add_some(s->grad_bias + row, b->grad_bias, b->lanes);
        if (s->D)
            add_some(s->grad_D + row, b->grad_D, b->lanes);
        memset(b->grad_A, 0, k->state * sizeof(vf));
        memset(b->grad_dt_weight, 0, s->rank * sizeof(vf));
        b->grad_bias = b->grad_D = splat(0.0f);
    }
}

int JOIN(backward, ISA)(const struct scan *s, int64_t index)
{
    struct task task;
    if (open_task(&task, s, index, 1))
        return 1;
    for (int64_t item = task.first_item; item < task.last_item; item++)
        for (int64_t direction = 0; direction < s->directions; direction++) {
            open_direction(&task, item, direction);
            for (int64_t chunk = task.chunks - 1; chunk >= 0; chunk--) {
                open_chunk(&task, chunk);
                for (int64_t i = 0; i < task.blocks; i++)
                    backward_block(&task, &task.block[i]);
                close_chunk(&task);
            }
            close_direction(&task);
        }
    free(task.memory);
    return 0;
}

#endif
