"""Triton kernels of the two-stream scan. `ops.triton.scan` launches and documents them.

Names: i, the positions of the tile, counted from the chunk's start, as rows; j, the same or clean
positions as columns; p, n, the indices of a head's values and of its state; x_l, the stride of x
along l, and so on, with cx, cdt, cB for clean_x, clean_dt, clean_B and h for the states. Names in
capitals are compile-time constants. ROWS, KEYS, P, N and Q are padded to powers of two of at least
16. Offsets into tensors are 64-bit, as in all kernels of this folder: a tensor may have more than
2^31 elements.
"""

import triton
import triton.language as tl

from megatron_twotower.ops.triton.common import INTERPRETED, round_to


@triton.jit
def _matrix(base, rows, row_stride, cols, row_ok, WIDTH: tl.constexpr):
    """Load (rows, cols) of a matrix whose last dimension is contiguous; zeros where masked."""
    ok = row_ok[:, None] & (cols < WIDTH)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * row_stride + cols[None, :], mask=ok, other=0.0)


@triton.jit
def _decays(row, col):
    """exp(row_i - col_j), at most 1. The difference is positive only for pairs that are masked."""
    return tl.exp(tl.minimum(row[:, None] - col[None, :], 0.0))


@triton.jit
def _dot(a, b, acc):
    """Compute acc + a b in float32; acc may be `None`."""
    if INTERPRETED:
        # The interpreter of Triton 3.9 would multiply the bits of bfloat16 as integers.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def _times_state(a, state):
    """Multiply a (i, k) with a float32 state (k, j), in bfloat16 with its high and low part."""
    if a.dtype == tl.float32:
        return _dot(a, state, None)
    high = round_to(state, a.dtype)
    low = round_to(state - high.to(tl.float32), a.dtype)
    return _dot(a, high, _dot(a, low, None))


@triton.jit
def _positions(length, CHUNK: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr):
    """Of this program: batch, chunk, the positions i of the tile in the chunk, and which exist."""
    chunks = tl.cdiv(length, CHUNK)
    pid = tl.program_id(0)
    index = pid // TILES
    row = tl.arange(0, ROWS)
    i = (pid % TILES) * TILE + row
    batch, chunk = index // chunks, index % chunks
    return batch, chunk, i, (row < TILE) & (i < CHUNK) & (chunk * CHUNK + i < length)


@triton.jit
def _head_and_chunk(length, HEADS: tl.constexpr, CHUNK: tl.constexpr):
    """Of this program: batch, head, chunk, the chunk's start, and its offset in (b, m, l')."""
    chunks = tl.cdiv(length, CHUNK)
    index, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    start = chunk.to(tl.int64) * CHUNK
    return (
        (index // HEADS).to(tl.int64),
        (index % HEADS).to(tl.int64),
        chunk,
        start,
        index.to(tl.int64) * chunks * CHUNK + start,
    )


@triton.jit
def _documents(documents, docs_l, i, row_ok, start, DOCUMENTS: tl.constexpr):
    """The document of each row, and the rows that read the state at the chunk's start.

    documents: pointer to the chunk's start.
    """
    if DOCUMENTS:
        docs_i = tl.load(documents + i.to(tl.int64) * docs_l, mask=row_ok, other=-1)
        return docs_i, row_ok & (docs_i == tl.load(documents - tl.minimum(start, 1) * docs_l))
    return i, row_ok


@triton.jit
def _block_pairs(i, row_ok, docs_i, BLOCK: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Mask (i, j): position j is in the block of i, at or before i."""
    pairs = (i[:, None] // BLOCK == i[None, :] // BLOCK) & (i[:, None] >= i[None, :])
    pairs = pairs & row_ok[:, None] & row_ok[None, :]
    if DOCUMENTS:
        pairs = pairs & (docs_i[:, None] == docs_i[None, :])
    return pairs


@triton.jit
def _clean_pairs(i, j, row_ok, docs_i, documents, docs_l, length, BLOCK: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Mask (i, j): the clean position j is before the block of i.

    documents: pointer to the chunk's start. length: positions of the chunk that exist.
    """
    clean_pairs = (j[None, :] < (i // BLOCK * BLOCK)[:, None]) & row_ok[:, None]
    if DOCUMENTS:
        docs_j = tl.load(documents + j.to(tl.int64) * docs_l, mask=j < length, other=-2)
        clean_pairs = clean_pairs & (docs_i[:, None] == docs_j[None, :])
    return clean_pairs


@triton.jit
def _clean_factors(clean_decay, dt, dt_l, j, length):
    """Log decays and time steps of the clean positions j, for one head."""
    return tl.load(clean_decay + j, mask=j < length, other=0.0), tl.load(
        dt + j.to(tl.int64) * dt_l, mask=j < length, other=0.0
    )


@triton.jit
def _add_clean(out, scores, chunk_decay_i, clean_decay, dt, dt_l, x, x_l, j, p, length, HEAD_SIZE: tl.constexpr):
    """Add the term of the clean positions j to out (i, p); scores are zero for masked pairs."""
    clean_decay_j, dt_j = _clean_factors(clean_decay, dt, dt_l, j, length)
    x_j = _matrix(x, j, x_l, p, j < length, HEAD_SIZE)
    weights = scores * _decays(chunk_decay_i, clean_decay_j) * dt_j[None, :]
    return _dot(round_to(weights, x_j.dtype), x_j, out)


@triton.jit
def _add_clean_backward(
    grad_C_i, g_i, B_j, pairs, chunk_decay_i, clean_decay, dt, dt_l, x, x_l, j, p, length, HEAD_SIZE: tl.constexpr
):
    """Add the term of the clean positions j to grad_C_i (i, d) of one head."""
    clean_decay_j, dt_j = _clean_factors(clean_decay, dt, dt_l, j, length)
    x_j = _matrix(x, j, x_l, p, j < length, HEAD_SIZE)
    weights = _dot(g_i, tl.trans(x_j), None) * _decays(chunk_decay_i, clean_decay_j) * dt_j[None, :]
    weights = tl.where(pairs, weights, 0.0)
    return _dot(round_to(weights, B_j.dtype), B_j, grad_C_i)


# --- kernels ---


@triton.jit
def decay_kernel(
    dt,
    A,
    clean_dt,
    clean_A,
    block_decay,
    chunk_decay,
    clean_decay,
    dt_b,
    dt_l,
    dt_m,
    cdt_b,
    cdt_l,
    cdt_m,
    length,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    Q: tl.constexpr,
    STEP: tl.constexpr,
):
    """The three log decays of one chunk of one head. Grid (b m chunks,)."""
    batch, head, _, start, offset = _head_and_chunk(length, HEADS, CHUNK)
    a, clean_a = tl.load(A + head).to(tl.float32), tl.load(clean_A + head).to(tl.float32)
    dt += batch * dt_b + head * dt_m
    clean_dt += batch * cdt_b + head * cdt_m
    i = tl.arange(0, Q)
    block_start = i // BLOCK * BLOCK
    in_block = tl.zeros((Q,), tl.float32)
    before_block = tl.zeros((Q,), tl.float32)
    clean_running = tl.zeros((Q,), tl.float32)
    for step in range(0, CHUNK, STEP):
        j = step + tl.arange(0, STEP)
        ok = (j < CHUNK) & (start + j < length)
        noisy_steps = (tl.load(dt + (start + j) * dt_l, mask=ok, other=0.0) * a)[None, :]
        clean_steps = (tl.load(clean_dt + (start + j) * cdt_l, mask=ok, other=0.0) * clean_a)[None, :]
        up_to = j[None, :] <= i[:, None]
        earlier_block = j[None, :] < block_start[:, None]
        in_block += tl.sum(tl.where(up_to & (earlier_block == 0), noisy_steps, 0.0), 1)
        before_block += tl.sum(tl.where(earlier_block, clean_steps, 0.0), 1)
        clean_running += tl.sum(tl.where(up_to, clean_steps, 0.0), 1)
    tl.store(block_decay + offset + i, in_block, mask=i < CHUNK)
    tl.store(chunk_decay + offset + i, in_block + before_block, mask=i < CHUNK)
    tl.store(clean_decay + offset + i, clean_running, mask=i < CHUNK)


@triton.jit
def decay_backward_kernel(
    dt,
    A,
    grad_dt_direct,
    grad_block_decay,
    grad_chunk_decay,
    grad_dt,
    grad_A,
    dt_b,
    dt_l,
    dt_m,
    length,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    Q: tl.constexpr,
    STEP: tl.constexpr,
):
    """Gradients of dt and A from those of the log decays, for one chunk of one head.

    grad_dt (b, l, m). grad_A (b chunks, m), one partial sum for each chunk. grad_dt_direct: the
    gradient of dt as a factor of x. Grid (b m chunks,).
    """
    batch, head, chunk, start, offset = _head_and_chunk(length, HEADS, CHUNK)
    j = tl.arange(0, Q)
    total = tl.zeros((Q,), tl.float32)
    # dt_j A is a term of the log decays of j and of all later positions of its block.
    for step in range(0, CHUNK, STEP):
        i = step + tl.arange(0, STEP)
        ok = (i < CHUNK) & (start + i < length)
        grad_decay = tl.load(grad_block_decay + offset + i, mask=ok, other=0.0)
        grad_decay += tl.load(grad_chunk_decay + offset + i, mask=ok, other=0.0)
        later = (i[None, :] // BLOCK == j[:, None] // BLOCK) & (i[None, :] >= j[:, None])
        total += tl.sum(tl.where(later, grad_decay[None, :], 0.0), 1)
    ok = (j < CHUNK) & (start + j < length)
    dt_j = tl.load(dt + batch * dt_b + head * dt_m + (start + j) * dt_l, mask=ok, other=0.0)
    direct = tl.load(grad_dt_direct + offset + j, mask=ok, other=0.0)
    gradient = total * tl.load(A + head).to(tl.float32) + direct
    tl.store(grad_dt + (batch * length + start + j) * HEADS + head, gradient, mask=ok)
    tl.store(grad_A + (batch * tl.cdiv(length, CHUNK) + chunk) * HEADS + head, tl.sum(total * dt_j, 0))


@triton.jit
def forward_kernel(
    x,
    dt,
    B,
    C,
    D,
    clean_x,
    clean_dt,
    clean_B,
    states,
    block_decay,
    chunk_decay,
    clean_decay,
    documents,
    y,
    x_b,
    x_l,
    x_m,
    dt_b,
    dt_l,
    dt_m,
    B_b,
    B_l,
    B_g,
    C_b,
    C_l,
    C_g,
    cx_b,
    cx_l,
    cx_m,
    cdt_b,
    cdt_l,
    cdt_m,
    cB_b,
    cB_l,
    cB_g,
    h_b,
    h_c,
    h_m,
    h_p,
    y_b,
    y_l,
    y_m,
    docs_b,
    docs_l,
    length,
    HEADS: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """The output of one tile of positions for all heads of one group. Grid (b chunks TILES, g)."""
    batch, chunk, i, row_ok = _positions(length, CHUNK, TILE, TILES, ROWS)
    group, batch, start = tl.program_id(1).to(tl.int64), batch.to(tl.int64), chunk.to(tl.int64) * CHUNK
    p, n, j = tl.arange(0, P), tl.arange(0, N), tl.arange(0, KEYS)
    later_j = KEYS + j
    chunk_positions = tl.minimum(length - start, CHUNK).to(tl.int32)
    documents += batch * docs_b + start * docs_l
    docs_i, reads_state = _documents(documents, docs_l, i, row_ok, start, DOCUMENTS)
    C_i = _matrix(C + batch * C_b + start * C_l + group * C_g, i, C_l, n, row_ok, STATE)
    B_i = _matrix(B + batch * B_b + start * B_l + group * B_g, i, B_l, n, row_ok, STATE)
    block_pairs = _block_pairs(i, row_ok, docs_i, BLOCK, DOCUMENTS)
    block_scores = tl.where(block_pairs, _dot(C_i, tl.trans(B_i), None), 0.0)
    clean_B += batch * cB_b + start * cB_l + group * cB_g
    if CHUNK > BLOCK:
        pairs = _clean_pairs(i, j, row_ok, docs_i, documents, docs_l, chunk_positions, BLOCK, DOCUMENTS)
        B_j = _matrix(clean_B, j, cB_l, n, j < chunk_positions, STATE)
        clean_scores = tl.where(pairs, _dot(C_i, tl.trans(B_j), None), 0.0)
    if CHUNK > KEYS:
        pairs = _clean_pairs(i, later_j, row_ok, docs_i, documents, docs_l, chunk_positions, BLOCK, DOCUMENTS)
        B_j = _matrix(clean_B, later_j, cB_l, n, later_j < chunk_positions, STATE)
        later_clean_scores = tl.where(pairs, _dot(C_i, tl.trans(B_j), None), 0.0)

    x += batch * x_b + start * x_l
    clean_x += batch * cx_b + start * cx_l
    dt += batch * dt_b + start * dt_l
    clean_dt += batch * cdt_b + start * cdt_l
    y += batch * y_b + start * y_l
    states += batch * h_b + chunk.to(tl.int64) * h_c
    padded_length = tl.cdiv(length, CHUNK) * CHUNK
    for k in range(GROUP_HEADS):
        head = group * GROUP_HEADS + k
        offset = (batch * HEADS + head) * padded_length + start
        block_decay_i = tl.load(block_decay + offset + i, mask=row_ok, other=0.0)
        chunk_decay_i = tl.load(chunk_decay + offset + i, mask=row_ok, other=0.0)
        dt_i = tl.load(dt + head * dt_m + i.to(tl.int64) * dt_l, mask=row_ok, other=0.0)
        x_i = _matrix(x + head * x_m, i, x_l, p, row_ok, HEAD_SIZE)
        h = _matrix(states + head * h_m, p, h_p, n, p < HEAD_SIZE, STATE)
        state_decay = tl.exp(tl.where(reads_state, chunk_decay_i, float("-inf")))
        out = _times_state(C_i, tl.trans(h)) * state_decay[:, None]
        head_dt, head_x = clean_dt + head * cdt_m, clean_x + head * cx_m
        if CHUNK > BLOCK:
            out = _add_clean(
                out,
                clean_scores,
                chunk_decay_i,
                clean_decay + offset,
                head_dt,
                cdt_l,
                head_x,
                cx_l,
                j,
                p,
                chunk_positions,
                HEAD_SIZE,
            )
        if CHUNK > KEYS:
            out = _add_clean(
                out,
                later_clean_scores,
                chunk_decay_i,
                clean_decay + offset,
                head_dt,
                cdt_l,
                head_x,
                cx_l,
                later_j,
                p,
                chunk_positions,
                HEAD_SIZE,
            )
        weights = block_scores * _decays(block_decay_i, block_decay_i) * dt_i[None, :]
        out = _dot(round_to(weights, x_i.dtype), x_i, out)
        out += tl.load(D + head).to(tl.float32) * x_i.to(tl.float32)
        ok = row_ok[:, None] & (p < HEAD_SIZE)[None, :]
        tl.store(
            y + head * y_m + i.to(tl.int64)[:, None] * y_l + p[None, :], round_to(out, y.dtype.element_ty), mask=ok
        )


@triton.jit
def backward_clean_kernel(
    grad,
    C,
    clean_x,
    clean_dt,
    clean_B,
    states,
    chunk_decay,
    clean_decay,
    documents,
    grad_C,
    grad_chunk_decay,
    g_b,
    g_l,
    g_m,
    C_b,
    C_l,
    C_g,
    cx_b,
    cx_l,
    cx_m,
    cdt_b,
    cdt_l,
    cdt_m,
    cB_b,
    cB_l,
    cB_g,
    h_b,
    h_c,
    h_m,
    h_p,
    docs_b,
    docs_l,
    length,
    HEADS: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """The gradient through the clean stream: the state at the chunk's start, the clean positions.

    One tile of positions, all heads of one group. Grid (b chunks TILES, g). Writes this term of the
    gradient of C to grad_C (b, l, g, d), contiguous, and the gradient of chunk_decay (b, m, l').
    """
    batch, chunk, i, row_ok = _positions(length, CHUNK, TILE, TILES, ROWS)
    group, batch, start = tl.program_id(1).to(tl.int64), batch.to(tl.int64), chunk.to(tl.int64) * CHUNK
    p, n, j = tl.arange(0, P), tl.arange(0, N), tl.arange(0, KEYS)
    later_j = KEYS + j
    chunk_positions = tl.minimum(length - start, CHUNK).to(tl.int32)
    documents += batch * docs_b + start * docs_l
    docs_i, reads_state = _documents(documents, docs_l, i, row_ok, start, DOCUMENTS)
    C_i = _matrix(C + batch * C_b + start * C_l + group * C_g, i, C_l, n, row_ok, STATE)
    clean_B += batch * cB_b + start * cB_l + group * cB_g
    if CHUNK > BLOCK:
        clean_pairs = _clean_pairs(i, j, row_ok, docs_i, documents, docs_l, chunk_positions, BLOCK, DOCUMENTS)
        B_j = _matrix(clean_B, j, cB_l, n, j < chunk_positions, STATE)
    if CHUNK > KEYS:
        later_clean_pairs = _clean_pairs(
            i, later_j, row_ok, docs_i, documents, docs_l, chunk_positions, BLOCK, DOCUMENTS
        )
        later_B_j = _matrix(clean_B, later_j, cB_l, n, later_j < chunk_positions, STATE)

    grad += batch * g_b + start * g_l
    clean_x += batch * cx_b + start * cx_l
    clean_dt += batch * cdt_b + start * cdt_l
    states += batch * h_b + chunk.to(tl.int64) * h_c
    padded_length = tl.cdiv(length, CHUNK) * CHUNK
    grad_C_i = tl.zeros((ROWS, N), tl.float32)
    for k in range(GROUP_HEADS):
        head = group * GROUP_HEADS + k
        offset = (batch * HEADS + head) * padded_length + start
        chunk_decay_i = tl.load(chunk_decay + offset + i, mask=row_ok, other=0.0)
        g_i = _matrix(grad + head * g_m, i, g_l, p, row_ok, HEAD_SIZE)
        h = _matrix(states + head * h_m, p, h_p, n, p < HEAD_SIZE, STATE)
        state_decay = tl.exp(tl.where(reads_state, chunk_decay_i, float("-inf")))
        grad_C_head = _times_state(g_i, h) * state_decay[:, None]
        head_dt, head_x = clean_dt + head * cdt_m, clean_x + head * cx_m
        if CHUNK > BLOCK:
            grad_C_head = _add_clean_backward(
                grad_C_head,
                g_i,
                B_j,
                clean_pairs,
                chunk_decay_i,
                clean_decay + offset,
                head_dt,
                cdt_l,
                head_x,
                cx_l,
                j,
                p,
                chunk_positions,
                HEAD_SIZE,
            )
        if CHUNK > KEYS:
            grad_C_head = _add_clean_backward(
                grad_C_head,
                g_i,
                later_B_j,
                later_clean_pairs,
                chunk_decay_i,
                clean_decay + offset,
                head_dt,
                cdt_l,
                head_x,
                cx_l,
                later_j,
                p,
                chunk_positions,
                HEAD_SIZE,
            )
        grad_C_i += grad_C_head
        tl.store(grad_chunk_decay + offset + i, tl.sum(grad_C_head * C_i.to(tl.float32), 1), mask=row_ok)
    offsets = (((batch * length + start + i) * (HEADS // GROUP_HEADS) + group) * STATE)[:, None] + n[None, :]
    ok = row_ok[:, None] & (n < STATE)[None, :]
    tl.store(grad_C + offsets, round_to(grad_C_i, grad_C.dtype.element_ty), mask=ok)


@triton.jit
def backward_block_kernel(
    grad,
    x,
    dt,
    B,
    C,
    D,
    block_decay,
    documents,
    grad_x,
    grad_B,
    grad_C,
    grad_D,
    grad_dt_direct,
    grad_block_decay,
    g_b,
    g_l,
    g_m,
    x_b,
    x_l,
    x_m,
    dt_b,
    dt_l,
    dt_m,
    B_b,
    B_l,
    B_g,
    C_b,
    C_l,
    C_g,
    docs_b,
    docs_l,
    length,
    HEADS: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """The gradient within the blocks of the noisy stream.

    One tile of positions, all heads of one group. Grid (b chunks TILES, g). Runs after
    `backward_clean_kernel` and adds its term to grad_C. Writes grad_x and grad_B; all three are
    contiguous. grad_D (tiles, m): one partial sum for each tile. For `decay_backward_kernel`, both
    (b, m, l'): grad_dt_direct, the gradient of dt as a factor of x, and the gradient of
    block_decay.
    """
    batch, chunk, i, row_ok = _positions(length, CHUNK, TILE, TILES, ROWS)
    group, batch, start = tl.program_id(1).to(tl.int64), batch.to(tl.int64), chunk.to(tl.int64) * CHUNK
    p, n = tl.arange(0, P), tl.arange(0, N)
    docs_i, _ = _documents(documents + batch * docs_b + start * docs_l, docs_l, i, row_ok, start, DOCUMENTS)
    block_pairs = _block_pairs(i, row_ok, docs_i, BLOCK, DOCUMENTS)
    C_i = _matrix(C + batch * C_b + start * C_l + group * C_g, i, C_l, n, row_ok, STATE)
    B_i = _matrix(B + batch * B_b + start * B_l + group * B_g, i, B_l, n, row_ok, STATE)
    # Pairs of a position with itself are computed apart: they do not decay, and in the gradient of
    # the log decays they would cancel only up to rounding.
    diagonal = i[:, None] == i[None, :]
    scores = _dot(C_i, tl.trans(B_i), None)
    diagonal_score = tl.sum(tl.where(diagonal, scores, 0.0), 1)
    scores = tl.where(block_pairs & (diagonal == 0), scores, 0.0)
    grad_scores = tl.zeros((ROWS, ROWS), tl.float32)

    grad += batch * g_b + start * g_l
    x += batch * x_b + start * x_l
    dt += batch * dt_b + start * dt_l
    padded_length = tl.cdiv(length, CHUNK) * CHUNK
    position = batch * length + start + i
    for k in range(GROUP_HEADS):
        head = group * GROUP_HEADS + k
        offset = (batch * HEADS + head) * padded_length + start
        block_decay_i = tl.load(block_decay + offset + i, mask=row_ok, other=0.0)
        dt_i = tl.load(dt + head * dt_m + i.to(tl.int64) * dt_l, mask=row_ok, other=0.0)
        g_i = _matrix(grad + head * g_m, i, g_l, p, row_ok, HEAD_SIZE)
        x_i = _matrix(x + head * x_m, i, x_l, p, row_ok, HEAD_SIZE)
        pairs = _decays(block_decay_i, block_decay_i)
        weights = scores * pairs
        grad_u_i = _dot(tl.trans(round_to(weights, g_i.dtype)), g_i, None)
        products = _dot(g_i, tl.trans(x_i), None)
        grad_scores += products * pairs * dt_i[None, :]
        products *= weights
        column_sums = tl.sum(products, 0)
        tl.store(grad_block_decay + offset + i, tl.sum(products * dt_i[None, :], 1) - column_sums * dt_i, mask=row_ok)
        grad_times_x = tl.sum(g_i.to(tl.float32) * x_i.to(tl.float32), 1)
        tl.store(grad_dt_direct + offset + i, column_sums + diagonal_score * grad_times_x, mask=row_ok)
        tl.store(grad_D + tl.program_id(0).to(tl.int64) * HEADS + head, tl.sum(grad_times_x, 0))
        diagonal_factor = diagonal_score * dt_i + tl.load(D + head).to(tl.float32)
        grad_x_i = grad_u_i * dt_i[:, None] + diagonal_factor[:, None] * g_i.to(tl.float32)
        head_grad_x = grad_x + ((position * HEADS + head) * HEAD_SIZE)[:, None] + p[None, :]
        ok = row_ok[:, None] & (p < HEAD_SIZE)[None, :]
        tl.store(head_grad_x, round_to(grad_x_i, grad_x.dtype.element_ty), mask=ok)

    narrow_grad_scores = round_to(tl.where(block_pairs, grad_scores, 0.0), C_i.dtype)
    grad_B_i = _dot(tl.trans(narrow_grad_scores), C_i, None)
    offsets = ((position * (HEADS // GROUP_HEADS) + group) * STATE)[:, None] + n[None, :]
    ok = row_ok[:, None] & (n < STATE)[None, :]
    tl.store(grad_B + offsets, round_to(grad_B_i, grad_B.dtype.element_ty), mask=ok)
    grad_C_i = _dot(narrow_grad_scores, B_i, tl.load(grad_C + offsets, mask=ok, other=0.0).to(tl.float32))
    tl.store(grad_C + offsets, round_to(grad_C_i, grad_C.dtype.element_ty), mask=ok)
