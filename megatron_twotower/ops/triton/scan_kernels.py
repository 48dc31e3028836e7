"""Triton kernels of the two-stream scan; `scan_triton` launches them and says what they compute.

Names: i rows, positions of the tile in its chunk; j clean positions, or the tile's own as columns;
p, n places of a head's values and of its state; x_l the step from position to position of x in
elements, and so on. Sizes in capitals are compile-time, those of tiles padded to powers of two of
at least 16. Offsets of batch and chunk are 64-bit.
"""

import triton
import triton.language as tl

from megatron_twotower.ops.triton.common import narrow


@triton.jit
def _matrix(base, rows, row_stride, cols, row_ok, WIDTH: tl.constexpr):
    """(rows, cols) of a matrix whose last dimension is contiguous, zeros where masked."""
    ok = row_ok[:, None] & (cols < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * row_stride + cols[None, :], mask=ok, other=0.0)


@triton.jit
def _decayed(row, col):
    """exp(row_i - col_j), or 1 where that is positive, which is only where it is not used."""
    return tl.exp(tl.minimum(row[:, None] - col[None, :], 0.0))


@triton.jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    """acc + a b, summed in float32; acc may be None."""
    if INTERPRETED:
        # Triton 3.9's interpreter would multiply the bits of bfloat16 as integers.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def _times_state(a, state, INTERPRETED: tl.constexpr):
    """a (i, k) times a float32 state (k, j); in bfloat16 as two products, with the state's high and low part."""
    if a.dtype == tl.float32:
        return _dot(a, state, None, INTERPRETED)
    high = narrow(state, a.dtype, INTERPRETED)
    low = narrow(state - high.to(tl.float32), a.dtype, INTERPRETED)
    return _dot(a, high, _dot(a, low, None, INTERPRETED), INTERPRETED)


@triton.jit
def _positions(length, CHUNK: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, R: tl.constexpr):
    """Of this program: batch, chunk, places i of the tile's rows in the chunk, and which rows exist."""
    chunks = tl.cdiv(length, CHUNK)
    pid = tl.program_id(0)
    of_all = pid // TILES
    row = tl.arange(0, R)
    i = (pid % TILES) * TILE + row
    batch, chunk = of_all // chunks, of_all % chunks
    return batch, chunk, i, (row < TILE) & (i < CHUNK) & (chunk * CHUNK + i < length)


@triton.jit
def _head_and_chunk(length, HEADS: tl.constexpr, CHUNK: tl.constexpr):
    """Of this program: batch, head, chunk, the chunk's first position, and its place in (b, m, l')."""
    chunks = tl.cdiv(length, CHUNK)
    of_all, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    first = chunk.to(tl.int64) * CHUNK
    return (of_all // HEADS).to(tl.int64), of_all % HEADS, chunk, first, of_all.to(tl.int64) * chunks * CHUNK + first


@triton.jit
def _documents(documents, docs_l, i, row_ok, first, DOCUMENTS: tl.constexpr):
    """Each row's document, and which rows the state at the chunk's start belongs to. documents: at that start."""
    if DOCUMENTS:
        docs_i = tl.load(documents + i * docs_l, mask=row_ok, other=-1)
        return docs_i, row_ok & (docs_i == tl.load(documents - tl.minimum(first, 1) * docs_l))
    return i, row_ok


@triton.jit
def _own_pairs(i, row_ok, docs_i, BLOCK: tl.constexpr, DOCUMENTS: tl.constexpr):
    """(i, j): j is in i's block, at or before i."""
    own = (i[:, None] // BLOCK == i[None, :] // BLOCK) & (i[:, None] >= i[None, :])
    own = own & row_ok[:, None] & row_ok[None, :]
    if DOCUMENTS:
        own = own & (docs_i[:, None] == docs_i[None, :])
    return own


@triton.jit
def _left_pairs(i, j, row_ok, docs_i, documents, docs_l, length, BLOCK: tl.constexpr, DOCUMENTS: tl.constexpr):
    """(i, j): clean j is before i's block. documents: at the chunk's start; length: positions from there on."""
    left = (j[None, :] < (i // BLOCK * BLOCK)[:, None]) & row_ok[:, None]
    if DOCUMENTS:
        docs_j = tl.load(documents + j * docs_l, mask=j < length, other=-2)
        left = left & (docs_i[:, None] == docs_j[None, :])
    return left


@triton.jit
def _clean_factors(clean, dt, dt_l, j, length):
    """Of one head's clean positions j of a chunk: log decay and time step."""
    return tl.load(clean + j, mask=j < length, other=0.0), tl.load(dt + j * dt_l, mask=j < length, other=0.0)


@triton.jit
def _add_left(
    out, scores, since_i, clean, dt, dt_l, x, x_l, j, p, length, HEAD_SIZE: tl.constexpr, INTERPRETED: tl.constexpr
):
    """out (i, p) and what clean positions j give it; scores are zero where a pair does not count."""
    clean_j, dt_j = _clean_factors(clean, dt, dt_l, j, length)
    x_j = _matrix(x, j, x_l, p, j < length, HEAD_SIZE)
    weights = scores * _decayed(since_i, clean_j) * dt_j[None, :]
    return _dot(narrow(weights, x_j.dtype, INTERPRETED), x_j, out, INTERPRETED)


@triton.jit
def _add_left_backward(
    into_C,
    g_i,
    B_j,
    pairs,
    since_i,
    clean,
    dt,
    dt_l,
    x,
    x_l,
    j,
    p,
    length,
    HEAD_SIZE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """into_C (i, d) of one head and what clean positions j give it."""
    clean_j, dt_j = _clean_factors(clean, dt, dt_l, j, length)
    x_j = _matrix(x, j, x_l, p, j < length, HEAD_SIZE)
    weights = _dot(g_i, tl.trans(x_j), None, INTERPRETED) * _decayed(since_i, clean_j) * dt_j[None, :]
    weights = tl.where(pairs, weights, 0.0)
    return _dot(narrow(weights, B_j.dtype, INTERPRETED), B_j, into_C, INTERPRETED)


# --- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def decay_kernel(
    dt,
    A,
    clean_dt,
    clean_A,
    own,
    since,
    clean,
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
    """One chunk of one head: the three log decays. Grid (b m chunks,)."""
    batch, head, _, first, at = _head_and_chunk(length, HEADS, CHUNK)
    a, clean_a = tl.load(A + head).to(tl.float32), tl.load(clean_A + head).to(tl.float32)
    dt += batch * dt_b + head * dt_m
    clean_dt += batch * cdt_b + head * cdt_m
    i = tl.arange(0, Q)
    begin = i // BLOCK * BLOCK
    in_block, before, running = tl.zeros((Q,), tl.float32), tl.zeros((Q,), tl.float32), tl.zeros((Q,), tl.float32)
    for step in range(0, CHUNK, STEP):
        j = step + tl.arange(0, STEP)
        ok = (j < CHUNK) & (first + j < length)
        noisy = (tl.load(dt + (first + j) * dt_l, mask=ok, other=0.0) * a)[None, :]
        given = (tl.load(clean_dt + (first + j) * cdt_l, mask=ok, other=0.0) * clean_a)[None, :]
        up_to = j[None, :] <= i[:, None]
        left = j[None, :] < begin[:, None]
        in_block += tl.sum(tl.where(up_to & (left == 0), noisy, 0.0), 1)
        before += tl.sum(tl.where(left, given, 0.0), 1)
        running += tl.sum(tl.where(up_to, given, 0.0), 1)
    tl.store(own + at + i, in_block, mask=i < CHUNK)
    tl.store(since + at + i, in_block + before, mask=i < CHUNK)
    tl.store(clean + at + i, running, mask=i < CHUNK)


@triton.jit
def decay_backward_kernel(
    dt,
    A,
    into_dt,
    into_own,
    into_since,
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
    """One chunk of one head: gradients of dt (b, l, m), and each chunk's part of A's (b chunks, m). Grid as above."""
    batch, head, chunk, first, at = _head_and_chunk(length, HEADS, CHUNK)
    j = tl.arange(0, Q)
    total = tl.zeros((Q,), tl.float32)
    # dt A of j is in the log decays of j and of all later positions of its block.
    for step in range(0, CHUNK, STEP):
        i = step + tl.arange(0, STEP)
        ok = (i < CHUNK) & (first + i < length)
        into = tl.load(into_own + at + i, mask=ok, other=0.0) + tl.load(into_since + at + i, mask=ok, other=0.0)
        counts = (i[None, :] // BLOCK == j[:, None] // BLOCK) & (i[None, :] >= j[:, None])
        total += tl.sum(tl.where(counts, into[None, :], 0.0), 1)
    ok = (j < CHUNK) & (first + j < length)
    dt_j = tl.load(dt + batch * dt_b + head * dt_m + (first + j) * dt_l, mask=ok, other=0.0)
    by_u = tl.load(into_dt + at + j, mask=ok, other=0.0)
    gradient = total * tl.load(A + head).to(tl.float32) + by_u
    tl.store(grad_dt + (batch * length + first + j) * HEADS + head, gradient, mask=ok)
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
    own,
    since,
    clean,
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
    SHARE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    R: tl.constexpr,
    KEYS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One tile of positions, all heads of one group. Grid (b chunks TILES, g)."""
    batch, chunk, i, row_ok = _positions(length, CHUNK, TILE, TILES, R)
    group, batch, first = tl.program_id(1), batch.to(tl.int64), chunk.to(tl.int64) * CHUNK
    p, n, j = tl.arange(0, P), tl.arange(0, N), tl.arange(0, KEYS)
    later_j = KEYS + j
    here = tl.minimum(length - first, CHUNK).to(tl.int32)
    documents += batch * docs_b + first * docs_l
    docs_i, entered = _documents(documents, docs_l, i, row_ok, first, DOCUMENTS)
    C_i = _matrix(C + batch * C_b + first * C_l + group * C_g, i, C_l, n, row_ok, STATE)
    B_i = _matrix(B + batch * B_b + first * B_l + group * B_g, i, B_l, n, row_ok, STATE)
    own_pairs = _own_pairs(i, row_ok, docs_i, BLOCK, DOCUMENTS)
    own_scores = tl.where(own_pairs, _dot(C_i, tl.trans(B_i), None, INTERPRETED), 0.0)
    clean_B += batch * cB_b + first * cB_l + group * cB_g
    if CHUNK > BLOCK:
        pairs = _left_pairs(i, j, row_ok, docs_i, documents, docs_l, here, BLOCK, DOCUMENTS)
        B_j = _matrix(clean_B, j, cB_l, n, j < here, STATE)
        scores = tl.where(pairs, _dot(C_i, tl.trans(B_j), None, INTERPRETED), 0.0)
    if CHUNK > KEYS:
        pairs = _left_pairs(i, later_j, row_ok, docs_i, documents, docs_l, here, BLOCK, DOCUMENTS)
        B_j = _matrix(clean_B, later_j, cB_l, n, later_j < here, STATE)
        later_scores = tl.where(pairs, _dot(C_i, tl.trans(B_j), None, INTERPRETED), 0.0)

    x += batch * x_b + first * x_l
    clean_x += batch * cx_b + first * cx_l
    dt += batch * dt_b + first * dt_l
    clean_dt += batch * cdt_b + first * cdt_l
    y += batch * y_b + first * y_l
    states += batch * h_b + chunk.to(tl.int64) * h_c
    padded = tl.cdiv(length, CHUNK) * CHUNK
    for of_group in range(SHARE):
        head = group * SHARE + of_group
        at = (batch * HEADS + head) * padded + first
        own_i = tl.load(own + at + i, mask=row_ok, other=0.0)
        since_i = tl.load(since + at + i, mask=row_ok, other=0.0)
        dt_i = tl.load(dt + head * dt_m + i * dt_l, mask=row_ok, other=0.0)
        x_i = _matrix(x + head * x_m, i, x_l, p, row_ok, HEAD_SIZE)
        h = _matrix(states + head * h_m, p, h_p, n, p < HEAD_SIZE, STATE)
        carried = tl.exp(tl.where(entered, since_i, float("-inf")))
        out = _times_state(C_i, tl.trans(h), INTERPRETED) * carried[:, None]
        to_dt, to_x = clean_dt + head * cdt_m, clean_x + head * cx_m
        if CHUNK > BLOCK:
            out = _add_left(
                out, scores, since_i, clean + at, to_dt, cdt_l, to_x, cx_l, j, p, here, HEAD_SIZE, INTERPRETED
            )
        if CHUNK > KEYS:
            out = _add_left(
                out,
                later_scores,
                since_i,
                clean + at,
                to_dt,
                cdt_l,
                to_x,
                cx_l,
                later_j,
                p,
                here,
                HEAD_SIZE,
                INTERPRETED,
            )
        weights = own_scores * _decayed(own_i, own_i) * dt_i[None, :]
        out = _dot(narrow(weights, x_i.dtype, INTERPRETED), x_i, out, INTERPRETED)
        out += tl.load(D + head).to(tl.float32) * x_i.to(tl.float32)
        ok = row_ok[:, None] & (p < HEAD_SIZE)[None, :]
        tl.store(y + head * y_m + i[:, None] * y_l + p[None, :], narrow(out, y.dtype.element_ty, INTERPRETED), mask=ok)


@triton.jit
def backward_left_kernel(
    grad,
    C,
    clean_x,
    clean_dt,
    clean_B,
    states,
    since,
    clean,
    documents,
    grad_C,
    into_since,
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
    SHARE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    R: tl.constexpr,
    KEYS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """What is left of the block: its part of C's gradient, and with C that of the log decays since (b, m, l').

    One tile of positions, all heads of one group. Grid (b chunks TILES, g). grad_C is contiguous.
    """
    batch, chunk, i, row_ok = _positions(length, CHUNK, TILE, TILES, R)
    group, batch, first = tl.program_id(1), batch.to(tl.int64), chunk.to(tl.int64) * CHUNK
    p, n, j = tl.arange(0, P), tl.arange(0, N), tl.arange(0, KEYS)
    later_j = KEYS + j
    here = tl.minimum(length - first, CHUNK).to(tl.int32)
    documents += batch * docs_b + first * docs_l
    docs_i, entered = _documents(documents, docs_l, i, row_ok, first, DOCUMENTS)
    C_i = _matrix(C + batch * C_b + first * C_l + group * C_g, i, C_l, n, row_ok, STATE)
    clean_B += batch * cB_b + first * cB_l + group * cB_g
    if CHUNK > BLOCK:
        left = _left_pairs(i, j, row_ok, docs_i, documents, docs_l, here, BLOCK, DOCUMENTS)
        B_j = _matrix(clean_B, j, cB_l, n, j < here, STATE)
    if CHUNK > KEYS:
        later_left = _left_pairs(i, later_j, row_ok, docs_i, documents, docs_l, here, BLOCK, DOCUMENTS)
        later_B_j = _matrix(clean_B, later_j, cB_l, n, later_j < here, STATE)

    grad += batch * g_b + first * g_l
    clean_x += batch * cx_b + first * cx_l
    clean_dt += batch * cdt_b + first * cdt_l
    states += batch * h_b + chunk.to(tl.int64) * h_c
    padded = tl.cdiv(length, CHUNK) * CHUNK
    into_C = tl.zeros((R, N), tl.float32)
    for of_group in range(SHARE):
        head = group * SHARE + of_group
        at = (batch * HEADS + head) * padded + first
        since_i = tl.load(since + at + i, mask=row_ok, other=0.0)
        g_i = _matrix(grad + head * g_m, i, g_l, p, row_ok, HEAD_SIZE)
        h = _matrix(states + head * h_m, p, h_p, n, p < HEAD_SIZE, STATE)
        carried = tl.exp(tl.where(entered, since_i, float("-inf")))
        of_head = _times_state(g_i, h, INTERPRETED) * carried[:, None]
        to_dt, to_x = clean_dt + head * cdt_m, clean_x + head * cx_m
        if CHUNK > BLOCK:
            of_head = _add_left_backward(
                of_head,
                g_i,
                B_j,
                left,
                since_i,
                clean + at,
                to_dt,
                cdt_l,
                to_x,
                cx_l,
                j,
                p,
                here,
                HEAD_SIZE,
                INTERPRETED,
            )
        if CHUNK > KEYS:
            of_head = _add_left_backward(
                of_head,
                g_i,
                later_B_j,
                later_left,
                since_i,
                clean + at,
                to_dt,
                cdt_l,
                to_x,
                cx_l,
                later_j,
                p,
                here,
                HEAD_SIZE,
                INTERPRETED,
            )
        into_C += of_head
        tl.store(into_since + at + i, tl.sum(of_head * C_i.to(tl.float32), 1), mask=row_ok)
    to = (((batch * length + first + i) * (HEADS // SHARE) + group) * STATE)[:, None] + n[None, :]
    ok = row_ok[:, None] & (n < STATE)[None, :]
    tl.store(grad_C + to, narrow(into_C, grad_C.dtype.element_ty, INTERPRETED), mask=ok)


@triton.jit
def backward_own_kernel(
    grad,
    x,
    dt,
    B,
    C,
    D,
    own,
    documents,
    grad_x,
    grad_B,
    grad_C,
    grad_D,
    into_dt,
    into_own,
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
    SHARE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    R: tl.constexpr,
    KEYS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The blocks themselves: gradients of x and B, what is missing of C's, each tile's part of D's (tiles, m); and, for
    `decay_backward_kernel`, of dt as a factor of x, and of the log decays own, both (b, m, l').

    One tile of positions, all heads of one group. Grid (b chunks TILES, g). grad_x, grad_B and
    grad_C are contiguous.
    """
    batch, chunk, i, row_ok = _positions(length, CHUNK, TILE, TILES, R)
    group, batch, first = tl.program_id(1), batch.to(tl.int64), chunk.to(tl.int64) * CHUNK
    p, n = tl.arange(0, P), tl.arange(0, N)
    docs_i, _ = _documents(documents + batch * docs_b + first * docs_l, docs_l, i, row_ok, first, DOCUMENTS)
    own_pairs = _own_pairs(i, row_ok, docs_i, BLOCK, DOCUMENTS)
    C_i = _matrix(C + batch * C_b + first * C_l + group * C_g, i, C_l, n, row_ok, STATE)
    B_i = _matrix(B + batch * B_b + first * B_l + group * B_g, i, B_l, n, row_ok, STATE)
    # Pairs of a position with itself apart: they do not decay, and would cancel in the gradient of
    # the log decays only up to rounding.
    itself = i[:, None] == i[None, :]
    scores = _dot(C_i, tl.trans(B_i), None, INTERPRETED)
    self_score = tl.sum(tl.where(itself, scores, 0.0), 1)
    scores = tl.where(own_pairs & (itself == 0), scores, 0.0)
    into_scores = tl.zeros((R, R), tl.float32)

    grad += batch * g_b + first * g_l
    x += batch * x_b + first * x_l
    dt += batch * dt_b + first * dt_l
    padded = tl.cdiv(length, CHUNK) * CHUNK
    position = batch * length + first + i
    for of_group in range(SHARE):
        head = group * SHARE + of_group
        at = (batch * HEADS + head) * padded + first
        own_i = tl.load(own + at + i, mask=row_ok, other=0.0)
        dt_i = tl.load(dt + head * dt_m + i * dt_l, mask=row_ok, other=0.0)
        g_i = _matrix(grad + head * g_m, i, g_l, p, row_ok, HEAD_SIZE)
        x_i = _matrix(x + head * x_m, i, x_l, p, row_ok, HEAD_SIZE)
        pairs = _decayed(own_i, own_i)
        weights = scores * pairs
        into_u = _dot(tl.trans(narrow(weights, g_i.dtype, INTERPRETED)), g_i, None, INTERPRETED)
        of_pairs = _dot(g_i, tl.trans(x_i), None, INTERPRETED)
        into_scores += of_pairs * pairs * dt_i[None, :]
        of_pairs *= weights
        by_u = tl.sum(of_pairs, 0)
        tl.store(into_own + at + i, tl.sum(of_pairs * dt_i[None, :], 1) - by_u * dt_i, mask=row_ok)
        by_self = tl.sum(g_i.to(tl.float32) * x_i.to(tl.float32), 1)
        tl.store(into_dt + at + i, by_u + self_score * by_self, mask=row_ok)
        tl.store(grad_D + tl.program_id(0).to(tl.int64) * HEADS + head, tl.sum(by_self, 0))
        itself_too = self_score * dt_i + tl.load(D + head).to(tl.float32)
        into_x = into_u * dt_i[:, None] + itself_too[:, None] * g_i.to(tl.float32)
        to_x = grad_x + ((position * HEADS + head) * HEAD_SIZE)[:, None] + p[None, :]
        ok = row_ok[:, None] & (p < HEAD_SIZE)[None, :]
        tl.store(to_x, narrow(into_x, grad_x.dtype.element_ty, INTERPRETED), mask=ok)

    into_scores_ = narrow(tl.where(own_pairs, into_scores, 0.0), C_i.dtype, INTERPRETED)
    into_B = _dot(tl.trans(into_scores_), C_i, None, INTERPRETED)
    to = ((position * (HEADS // SHARE) + group) * STATE)[:, None] + n[None, :]
    ok = row_ok[:, None] & (n < STATE)[None, :]
    tl.store(grad_B + to, narrow(into_B, grad_B.dtype.element_ty, INTERPRETED), mask=ok)
    into_C = _dot(into_scores_, B_i, tl.load(grad_C + to, mask=ok, other=0.0).to(tl.float32), INTERPRETED)
    tl.store(grad_C + to, narrow(into_C, grad_C.dtype.element_ty, INTERPRETED), mask=ok)
