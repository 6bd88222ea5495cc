"""The selective scan's Triton kernels; triton_scan.py launches them.

Blocking. A program is one warp that walks one direction of one item (or, of a one-dimensional scan, one group) along
BLOCK neighbouring channels. A lane owns one channel, or two, and keeps all N states of it in registers: the recurrence
and the sum over the states need no exchange between lanes, a load of channels-last x is one row of neighbouring
addresses, and B, C and dt of a position are the same for all lanes. A direction is an order of positions (`_places`).
Positions come in tiles of TILE, unrolled: Δ of a tile is computed once from its low-rank factors, reading the weights
once a tile, and all its loads are under way before the first is needed. At the start of every chunk of CHUNK positions
`forward` saves the states for the backward pass.

A position of one channel is a few bytes and N = 16 exponentials, so arithmetic bounds the scan, not memory, and to
compute an exponential twice costs more than to leave some of the GPU idle. The sequence is therefore cut into segments
only where items, directions and channels make too few programs: then `segment_ends` scans every segment from zero,
`carry` passes the states on from segment to segment, and `forward` or `backward` starts each from its true state.

`backward` goes through its chunks in reverse. In each it first scans forward again and leaves the states before every
tile in memory of its own; then, from the last tile to the first, it takes the states one after the other, TILE values
of each in registers: forward once more, and the adjoint recurrence g_t = C_t dy_t + exp(Δ_{t+1} A) g_{t+1} back. Sums
over states are made in registers, sums over positions in memory of its own, and those over channels by one reduction
of the warp. What several programs add to lies side by side until all are done, so that results repeat to the bit.

Sizes: item of the batch; group, a direction or a group that shares B and C; N states, R rank; `projected` holds dt, B
and C of a position and group one after the other. All states have the channels last. A is in units of ln 2: decay is
exp2(Δ A).
"""

# Triton's language, not Python's: the annotations mark compile-time constants.
# mypy: ignore-errors

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _places(tile, group, length, height, width, IMAGE: tl.constexpr, TILE: tl.constexpr):
    """Where in memory a tile's positions lie. Past the end of the sequence it is the last one's place."""
    # Lines one after the other: a column has `height` positions `width` apart. Row-major, the image is one line.
    column = IMAGE and group % 2 == 1
    line = tl.where(column, height, length)
    step = tl.where(column, width, 1)
    along = tile * TILE % line
    start = tile * TILE // line
    places = ()
    for _ in tl.static_range(TILE):
        place = tl.minimum(along * step + start, length - 1)
        # Read backwards, both orders are mirrored in memory.
        place = tl.where(IMAGE and group >= 2, length - 1 - place, place)
        places = places + (place.to(tl.int64),)
        along += 1
        start += tl.where(along == line, 1, 0)
        along = tl.where(along == line, 0, along)
    return places


@triton.jit
def _rows(pointers, places, stride, left, mask, TILE: tl.constexpr):
    """One value a channel at each of a tile's positions, in float32; zero where none is left."""
    rows = ()
    for i in tl.static_range(TILE):
        rows = rows + (tl.load(pointers + places[i] * stride, mask=mask & (i < left), other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _softplus(z):
    """max(z, 0) + log(1 + e) with e = exp(−|z|); of small e the series, because 1 + e has lost its last bits."""
    e = tl.exp(-tl.abs(z))
    series = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e * (1 / 5 - e * (1 / 6 - e * (1 / 7)))))))
    return tl.maximum(z, 0.0) + tl.where(e < 0.1, series, tl.log(1 + e))


@triton.jit
def _softplus_slope(d):
    """The derivative where softplus is d: 1 − exp(−d); of small d the series."""
    series = d * (1 - d * (1 / 2) * (1 - d * (1 / 3) * (1 - d * (1 / 4) * (1 - d * (1 / 5) * (1 - d * (1 / 6))))))
    return tl.where(d < 0.25, series, 1 - tl.exp(-d))


@triton.jit
def _deltas(
    source,
    places,
    left,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,
    STATE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Δ at a tile's positions, read or, of rank R > 0, computed from its low-rank factors.

    Where no position is left Δ is zero, which leaves every state as it is. `source` holds what stays the same from tile
    to tile: pointers to delta, projected and weight, the bias, the stride of delta, the channels and their mask.
    """
    delta, projected, weight, bias, stride, channels, mask = source
    if RANK == 0:
        rows = _rows(delta, places, stride, left, mask, TILE)
        raw = ()
        for i in tl.static_range(TILE):
            raw = raw + (rows[i] + bias,)
    else:
        projected_stride: tl.constexpr = GROUPS * (RANK + 2 * STATE)
        raw = ()
        for _ in tl.static_range(TILE):
            raw = raw + (bias,)
        for r in range(RANK):
            row = tl.load(weight + r * channels, mask=mask, other=0.0)
            added = ()
            for i in tl.static_range(TILE):
                added = added + (raw[i] + tl.load(projected + places[i] * projected_stride + r) * row,)
            raw = added
    deltas = ()
    for i in tl.static_range(TILE):
        value = _softplus(raw[i]) if SOFTPLUS else raw[i]
        deltas = deltas + (tl.where(i < left, value, 0.0),)
    return deltas


@triton.jit
def _advance(h, A, deltas, xs, projections, places, stride, n, STATE: tl.constexpr, TILE: tl.constexpr):
    """The states after a tile, from those before it; `projections` points to B of position 0."""
    for i in tl.static_range(TILE):
        B = tl.load(projections + places[i] * stride + n, mask=n < STATE, other=0.0)
        h = tl.exp2(deltas[i][None, :] * A) * h + (deltas[i] * xs[i])[None, :] * B[:, None]
    return h


@triton.jit
def _program(
    batch,
    length,
    channels,
    GROUPS: tl.constexpr,
    STATE: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    IMAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a program works on, and where that lies.

    Returns:
        item, group, segment.
        c, mask: its channels, and which of them exist.
        n, square, square_mask: the states; offsets of all states of its channels, and which of them exist.
        offset, stride: of its channels at position 0 in x and arrays like it, and from one position to the next.
        out: as `offset`, where each group writes for itself.
    """
    group = tl.program_id(0) % GROUPS
    item = (tl.program_id(0) // GROUPS).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATE_BLOCK)
    mask = c < channels
    # The states in a lane's registers, the channels along the lanes. Were the offsets known to be aligned, wide loads
    # would give a lane several channels and fewer states.
    square = tl.multiple_of(n[:, None] * channels + c[None, :], (1, 1))
    square_mask = (n < STATE)[:, None] & mask[None, :]
    if IMAGE:
        stride = channels
        offset = item * length * channels + c
        out = (group * batch + item) * length * channels + c
    else:
        stride = GROUPS * channels
        offset = item * length * stride + group * channels + c
        out = offset
    return item, group, tl.program_id(2), c, mask, n, square, square_mask, offset, stride, out


@triton.jit
def _state_back(deltas, inputs, dys, a, state, g, grad_A, Bs, Cs, grad_inputs, grad_decays, TILE: tl.constexpr):
    """One of a tile's states, from `state` before it forward once more, and its adjoint g back."""
    kept = ()
    grad_Cs = ()
    for i in tl.static_range(TILE):
        decayed = tl.exp2(deltas[i] * a) * state
        state = decayed + inputs[i] * Bs[i]
        kept = kept + (decayed,)
        grad_Cs = grad_Cs + (tl.sum(dys[i] * state, 0),)
    grad_Bs = ()
    added_inputs = ()
    added_decays = ()
    for i in tl.static_range(TILE - 1, -1, -1):
        g += dys[i] * Cs[i]
        grad_Bs = (tl.sum(g * inputs[i], 0),) + grad_Bs
        added_inputs = (grad_inputs[i] + g * Bs[i],) + added_inputs
        added_decays = (grad_decays[i] + g * kept[i] * a,) + added_decays
        grad_A += g * kept[i] * deltas[i]
        g *= tl.exp2(deltas[i] * a)
    return g, grad_A, added_inputs, added_decays, grad_Bs, grad_Cs


@triton.jit(do_not_specialize=["length", "height", "width", "segments", "segment_tiles"])
def segment_ends(
    values,
    delta,
    projected,
    weight,
    A,
    bias,
    ends,
    totals,
    length,
    height,
    width,
    channels,
    segments,
    segment_tiles,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,
    STATE: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    IMAGE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ADJOINT: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Scan each segment from zero: its last states, and the sum of its Δ; they decay what comes in by exp2(A Σ Δ).

    As ADJOINT the values are dy, the scan runs backwards, and the result is what the segment hands to the one before.
    """
    item, group, segment, c, mask, n, square, square_mask, offset, stride, _ = _program(
        1, length, channels, GROUPS, STATE, STATE_BLOCK, IMAGE, BLOCK
    )
    size: tl.constexpr = RANK + 2 * STATE
    projected += (item * length * GROUPS + group) * size
    decay = tl.load(A + group * STATE * channels + square, mask=square_mask, other=0.0)
    bias_row = tl.load(bias + group * channels + c, mask=mask, other=0.0)
    source = (delta + offset, projected, weight + group * RANK * channels + c, bias_row, stride, channels, mask)

    h = tl.zeros((STATE_BLOCK, BLOCK), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    first = segment * segment_tiles
    last = tl.minimum(first + segment_tiles, tl.cdiv(length, TILE))
    for step in range(last - first):
        tile = last - 1 - step if ADJOINT else first + step
        left = length - tile * TILE
        places = _places(tile, group, length, height, width, IMAGE, TILE)
        rows = _rows(values + offset, places, stride, left, mask, TILE)
        deltas = _deltas(source, places, left, GROUPS, RANK, STATE, SOFTPLUS, TILE)
        if ADJOINT:
            for i in tl.static_range(TILE - 1, -1, -1):
                C = tl.load(projected + places[i] * (GROUPS * size) + RANK + STATE + n, mask=n < STATE, other=0.0)
                h = tl.exp2(deltas[i][None, :] * decay) * (h + rows[i][None, :] * C[:, None])
        else:
            h = _advance(h, decay, deltas, rows, projected + RANK, places, GROUPS * size, n, STATE, TILE)
        for i in tl.static_range(TILE):
            total += deltas[i]
    row = (item * GROUPS + group) * segments + segment
    tl.store(ends + row * STATE * channels + square, h, mask=square_mask)
    tl.store(totals + row * channels + c, total, mask=mask)


@triton.jit(do_not_specialize=["segments"])
def carry(
    ends,
    totals,
    A,
    starts,
    channels,
    segments,
    GROUPS: tl.constexpr,
    STATE: tl.constexpr,
    ADJOINT: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """The states that come into each segment. A lane owns a state; AHEAD segments are read before they are needed."""
    sequence = tl.program_id(0).to(tl.int64)
    own = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    square = STATE * channels
    mask = own < square
    decay = tl.load(A + tl.program_id(0) % GROUPS * square + own, mask=mask, other=0.0)
    h = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, segments, AHEAD):
        read = ()
        for i in tl.static_range(AHEAD):
            segment = segments - 1 - step - i if ADJOINT else step + i
            inside = mask & (step + i < segments)
            row = sequence * segments + segment
            end = tl.load(ends + row * square + own, mask=inside, other=0.0)
            total = tl.load(totals + row * channels + own % channels, mask=inside, other=0.0)
            read = read + ((end, total),)
        for i in tl.static_range(AHEAD):
            segment = segments - 1 - step - i if ADJOINT else step + i
            row = sequence * segments + segment
            tl.store(starts + row * square + own, h, mask=mask & (step + i < segments))
            h = tl.exp2(read[i][1] * decay) * h + read[i][0]


@triton.jit(do_not_specialize=["batch", "length", "height", "width", "segments", "segment_chunks"])
def forward(
    x,
    delta,
    projected,
    weight,
    A,
    D,
    bias,
    starts,
    y,
    states,
    batch,
    length,
    height,
    width,
    channels,
    segments,
    segment_chunks,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,
    STATE: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    IMAGE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """y of each group, of an image (groups, batch, L, channels), and the states before each chunk."""
    item, group, segment, c, mask, n, square, square_mask, offset, stride, out = _program(
        batch, length, channels, GROUPS, STATE, STATE_BLOCK, IMAGE, BLOCK
    )
    size: tl.constexpr = RANK + 2 * STATE
    projected += (item * length * GROUPS + group) * size
    decay = tl.load(A + group * STATE * channels + square, mask=square_mask, other=0.0)
    skip = tl.load(D + group * channels + c, mask=mask, other=0.0)
    bias_row = tl.load(bias + group * channels + c, mask=mask, other=0.0)
    source = (delta + offset, projected, weight + group * RANK * channels + c, bias_row, stride, channels, mask)

    sequence = item * GROUPS + group
    h = tl.load(starts + (sequence * segments + segment) * STATE * channels + square, mask=square_mask, other=0.0)
    chunks = tl.cdiv(length, CHUNK)
    first = segment * segment_chunks
    for chunk in range(first, tl.minimum(first + segment_chunks, chunks)):
        if SAVE:
            tl.store(states + (sequence * chunks + chunk) * STATE * channels + square, h, mask=square_mask)
        for tile in range(chunk * (CHUNK // TILE), tl.cdiv(tl.minimum((chunk + 1) * CHUNK, length), TILE)):
            left = length - tile * TILE
            places = _places(tile, group, length, height, width, IMAGE, TILE)
            xs = _rows(x + offset, places, stride, left, mask, TILE)
            deltas = _deltas(source, places, left, GROUPS, RANK, STATE, SOFTPLUS, TILE)
            ys = ()
            for i in tl.static_range(TILE):
                row = projected + places[i] * (GROUPS * size) + RANK + n
                B = tl.load(row, mask=n < STATE, other=0.0)
                C = tl.load(row + STATE, mask=n < STATE, other=0.0)
                h = tl.exp2(deltas[i][None, :] * decay) * h + (deltas[i] * xs[i])[None, :] * B[:, None]
                ys = ys + (tl.sum(h * C[:, None], 0) + skip * xs[i],)
            for i in tl.static_range(TILE):
                tl.store(y + out + places[i] * stride, ys[i].to(y.dtype.element_ty), mask=mask & (i < left))


@triton.jit(do_not_specialize=["batch", "length", "height", "width", "segments", "segment_chunks"])
def backward(
    grad_y,
    x,
    delta,
    projected,
    weight,
    A,
    D,
    bias,
    states,
    adjoints,
    tile_states,
    grad_x,
    grad_delta,
    grad_projected,
    sums,
    batch,
    length,
    height,
    width,
    channels,
    segments,
    segment_chunks,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,
    STATE: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    IMAGE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gradients of x and of Δ before bias and softplus, of an image as y in `forward`; of the rest parts to be summed.

    grad_projected: (channel blocks, batch, L, groups, 2N), of B and C.
    sums: (batch, groups, segments, N + 2, channels), zero at first: of A's rows, D and bias.
    adjoints: (batch, groups, segments, N, channels), what comes into each segment; is overwritten.
    tile_states: (batch, groups, segments, CHUNK / TILE, N, channels), for the programs' own use.
    """
    item, group, segment, c, mask, n, square, square_mask, offset, stride, out = _program(
        batch, length, channels, GROUPS, STATE, STATE_BLOCK, IMAGE, BLOCK
    )
    size: tl.constexpr = RANK + 2 * STATE
    projected += (item * length * GROUPS + group) * size
    grad_projected += ((tl.program_id(1) * batch + item) * length * GROUPS + group) * (2 * STATE)
    A += group * STATE * channels
    skip = tl.load(D + group * channels + c, mask=mask, other=0.0)
    bias_row = tl.load(bias + group * channels + c, mask=mask, other=0.0)
    source = (delta + offset, projected, weight + group * RANK * channels + c, bias_row, stride, channels, mask)

    sequence = item * GROUPS + group
    row = sequence * segments + segment
    adjoints += row * STATE * channels + c
    sums += row * (STATE + 2) * channels + c
    tile_states += row * (CHUNK // TILE) * STATE * channels
    chunks = tl.cdiv(length, CHUNK)
    first_chunk = segment * segment_chunks
    last_chunk = tl.minimum(first_chunk + segment_chunks, chunks)
    grad_D = tl.zeros((BLOCK,), tl.float32)
    grad_bias = tl.zeros((BLOCK,), tl.float32)
    for chunk_step in range(last_chunk - first_chunk):
        chunk = last_chunk - 1 - chunk_step
        first = chunk * (CHUNK // TILE)
        last = tl.cdiv(tl.minimum((chunk + 1) * CHUNK, length), TILE)

        decay = tl.load(A + square, mask=square_mask, other=0.0)
        h = tl.load(states + (sequence * chunks + chunk) * STATE * channels + square, mask=square_mask, other=0.0)
        for tile in range(first, last):
            tl.store(tile_states + (tile - first) * STATE * channels + square, h, mask=square_mask)
            left = length - tile * TILE
            places = _places(tile, group, length, height, width, IMAGE, TILE)
            xs = _rows(x + offset, places, stride, left, mask, TILE)
            deltas = _deltas(source, places, left, GROUPS, RANK, STATE, SOFTPLUS, TILE)
            h = _advance(h, decay, deltas, xs, projected + RANK, places, GROUPS * size, n, STATE, TILE)
        # Here and after each tile, lanes may read what others wrote.
        tl.debug_barrier()

        for tile_step in range(last - first):
            tile = last - 1 - tile_step
            left = length - tile * TILE
            places = _places(tile, group, length, height, width, IMAGE, TILE)
            deltas = _deltas(source, places, left, GROUPS, RANK, STATE, SOFTPLUS, TILE)
            xs = _rows(x + offset, places, stride, left, mask, TILE)
            dys = _rows(grad_y + offset, places, stride, left, mask, TILE)
            inputs = ()
            grad_inputs = ()
            grad_decays = ()
            for i in tl.static_range(TILE):
                inputs = inputs + (deltas[i] * xs[i],)
                grad_inputs = grad_inputs + (tl.zeros((BLOCK,), tl.float32),)
                grad_decays = grad_decays + (tl.zeros((BLOCK,), tl.float32),)
            for m in range(STATE):
                # Read all, compute, write all: a load may not pass a store that it could depend on.
                a = tl.load(A + m * channels + c, mask=mask, other=0.0)
                state = tl.load(tile_states + ((tile - first) * STATE + m) * channels + c, mask=mask, other=0.0)
                g = tl.load(adjoints + m * channels, mask=mask, other=0.0)
                grad_A = tl.load(sums + m * channels, mask=mask, other=0.0)
                Bs = ()
                Cs = ()
                for i in tl.static_range(TILE):
                    B = tl.load(projected + places[i] * (GROUPS * size) + RANK + m)
                    C = tl.load(projected + places[i] * (GROUPS * size) + RANK + STATE + m)
                    Bs = Bs + (B,)
                    Cs = Cs + (C,)
                g, grad_A, grad_inputs, grad_decays, grad_Bs, grad_Cs = _state_back(
                    deltas, inputs, dys, a, state, g, grad_A, Bs, Cs, grad_inputs, grad_decays, TILE
                )
                tl.store(adjoints + m * channels, g, mask=mask)
                tl.store(sums + m * channels, grad_A, mask=mask)
                for i in tl.static_range(TILE):
                    place = grad_projected + places[i] * (GROUPS * 2 * STATE) + m
                    tl.store(place, grad_Bs[i], mask=i < left)
                    tl.store(place + STATE, grad_Cs[i], mask=i < left)
            xs = _rows(x + offset, places, stride, left, mask, TILE)
            dys = _rows(grad_y + offset, places, stride, left, mask, TILE)
            for i in tl.static_range(TILE):
                inside = mask & (i < left)
                value = grad_inputs[i] * deltas[i] + skip * dys[i]
                tl.store(grad_x + out + places[i] * stride, value.to(grad_x.dtype.element_ty), mask=inside)
                value = grad_inputs[i] * xs[i] + LN_2 * grad_decays[i]
                if SOFTPLUS:
                    value *= _softplus_slope(deltas[i])
                value = tl.where(inside, value, 0.0)
                tl.store(grad_delta + out + places[i] * stride, value.to(grad_delta.dtype.element_ty), mask=inside)
                grad_bias += value
                grad_D += xs[i] * dys[i]
            tl.debug_barrier()
    tl.store(sums + STATE * channels, grad_D, mask=mask)
    tl.store(sums + (STATE + 1) * channels, grad_bias, mask=mask)


@triton.jit(do_not_specialize=["size"])
def merge(parts, total, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the parts (PARTS, size) in float32, always in the same order."""
    own = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        value += tl.load(parts + part * size + own, mask=own < size, other=0.0)
    tl.store(total + own, value.to(total.dtype.element_ty), mask=own < size)
