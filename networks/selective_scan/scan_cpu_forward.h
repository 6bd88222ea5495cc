/* The forward pass: h_t = 2^(Δ_t A) h_{t-1} + Δ_t u_t B_t and y_t = C_t · h_t + D u_t.
 *
 * The states run through a tile NB at a time, which stay in registers: a vector each, lanes are
 * channels; B and C are scalars for all lanes. Between chunks a block keeps its states. Where
 * gradients are wanted, the states before each chunk are saved.
 */
#ifndef SCAN_CPU_FORWARD_H
#define SCAN_CPU_FORWARD_H

#include "scan_cpu_task.h"

/* States first ... first + NB - 1 through a tile; adds their part of y. Two sums, so that an
 * addition need not wait for the one before. */
INLINE void scan_states(int clamp, const struct task *k, struct block *b, int64_t first)
{
    const int64_t count = k->chunk.count, row = k->state;
    const float *B = k->chunk.B + first, *C = k->chunk.C + first;
    const vf *A = b->A + first, *delta = k->tile->delta, *inflow = k->tile->inflow;
    const vf table = k->table;
    const struct ahead ahead = k->ahead;
    vf *y = k->tile->out, h[NB];
    for (int n = 0; n < NB; n++)
        h[n] = b->state[first + n];
    for (int64_t t = 0; t < count; t++) {
        vf d = delta[t], w = inflow[t];
        vf y0 = y[t], y1 = splat(0.0f);
        fetch(ahead, t);
#pragma GCC unroll 16
        for (int n = 0; n < NB; n += 2) {
            vf x0 = d * A[n], x1 = d * A[n + 1];
            if (clamp) {
                x0 = clamped(x0);
                x1 = clamped(x1);
            }
            vf a0 = power_of_2(x0, table), a1 = power_of_2(x1, table);
            h[n] = a0 * h[n] + w * B[t * row + n];
            h[n + 1] = a1 * h[n + 1] + w * B[t * row + n + 1];
            y0 += h[n] * C[t * row + n];
            y1 += h[n + 1] * C[t * row + n + 1];
        }
        y[t] = y0 + y1;
    }
    for (int n = 0; n < NB; n++)
        b->state[first + n] = h[n];
}

static void save_states(const struct task *k, const struct block *b)
{
    float *to = saved_states(k, b);
    for (int64_t n = 0; n < k->scan->state; n++)
        store(to + n * k->scan->padded_channels, b->state[n]);
}

static void forward_block(struct task *k, struct block *b)
{
    const struct scan *s = k->scan;
    struct tile *tile = k->tile;
    int clamp = open_block(k, b);
    look_ahead(k, b, s->u, k->image ? s->y : s->delta);
    if (s->states)
        save_states(k, b);
    /* The first direction starts y, the others add to it. */
    if (k->direction)
        read_tile(k, b, s->y, tile->out);
    else
        for (int64_t t = 0; t < k->chunk.count; t++)
            tile->out[t] = b->D * tile->u[t];
    for (int64_t n = 0; n < k->state; n += NB)
        if (clamp)
            scan_states(1, k, b, n);
        else
            scan_states(0, k, b, n);
    write_tile(k, b, tile->out, s->y, 0);
}

int JOIN(forward, ISA)(const struct scan *s, int64_t index)
{
    struct task task;
    if (open_task(&task, s, index, 0))
        return 1;
    for (int64_t item = task.first_item; item < task.last_item; item++)
        for (int64_t direction = 0; direction < s->directions; direction++) {
            open_direction(&task, item, direction);
            for (int64_t chunk = 0; chunk < task.chunks; chunk++) {
                open_chunk(&task, chunk);
                for (int64_t i = 0; i < task.blocks; i++)
                    forward_block(&task, &task.block[i]);
            }
        }
    free(task.memory);
    return 0;
}

#endif
