"""Attention, and the rotary position embedding of Wan."""

import contextlib
import contextvars
import functools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxvp import sharding
from jaxvp.errors import UserError
from jaxvp.models.module import Linear

# `chunked` computes so many scores at a time, of at most so many keys: on two CPU cores a step of
# benchmarks/step.py takes longer with half or twice as many. Below half a chunk `xla` is faster.
SCORES, KEYS = 2 << 20, 2048
BLOCK, LANES = 1024, 128  # Largest block of `splash`, and what a block is a multiple of.

_portable = contextvars.ContextVar("portable", default=False)


@functools.lru_cache(maxsize=32)
def rope_table(t: int, h: int, w: int, head_width: int, theta: float = 10_000.0) -> np.ndarray:
    """Cosines and sines of the 3-D rotary embedding, float32[2, t*h*w, E/2].

    The head width is split between time, height and width as Wan does: `2 * (E // 6)` for
    height and for width, the rest for time. Computed in float64.
    """
    space = 2 * (head_width // 6)
    widths = (head_width - 2 * space, space, space)

    def angles(length, width):
        frequencies = theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
        return np.outer(np.arange(length, dtype=np.float64), frequencies)

    parts = [angles(n, width) for n, width in zip((t, h, w), widths, strict=True)]
    grid = np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij")
    table = np.concatenate([part[i.ravel()] for part, i in zip(parts, grid, strict=True)], axis=-1)
    return np.stack([np.cos(table), np.sin(table)]).astype(np.float32)


def rotate(x: jax.Array, rope: jax.Array) -> jax.Array:
    """Rotates the interleaved (even, odd) pairs of `x[B, N, K, E]` by `rope[2, N, E/2]`.

    float32 inside; the result has the dtype of x.
    """
    cos, sin = rope[:, :, None]
    if platform() == "tpu":
        # A TPU is slow at taking lanes apart. This product only moves numbers (it is exact), and
        # the rotation of a Wan 5B query moves 0.3 GB in place of 1.1 (compiled for v5e).
        quarter_turn = np.kron(np.eye(rope.shape[-1]), [[0, 1], [-1, 0]]).astype(x.dtype)
        turned = jnp.matmul(x, quarter_turn, precision="highest",
                            preferred_element_type=jnp.float32)
        rotated = x * jnp.repeat(cos, 2, axis=-1) + turned * jnp.repeat(sin, 2, axis=-1)
        return rotated.astype(x.dtype)
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention with RMS-normalised queries and keys (Wan: over all heads' widths).

    Attributes:
      implementation: one of IMPLEMENTATIONS, or "auto"; see `attend`.
      context: whether the tokens of `x` lie over the mesh's axis `context` and the heads over
        `tensor`. The tokens of a memory are whole.
    """

    def __init__(self, width: int, heads: int, *, memory_width: int | None = None,
                 implementation: str = "auto", context: bool = False, dtype=jnp.float32,
                 epsilon: float = 1e-6, rngs: nnx.Rngs):
        memory_width = memory_width or width
        self.heads, self.implementation, self.context = heads, implementation, context
        self.to_q = Linear(width, width, dtype=dtype, rngs=rngs)
        self.to_k = Linear(memory_width, width, dtype=dtype, rngs=rngs)
        self.to_v = Linear(memory_width, width, dtype=dtype, rngs=rngs)
        self.to_out = Linear(width, width, dtype=dtype, rngs=rngs)
        # `dtype` is that of the results: they are computed in float32.
        self.norm_q = nnx.RMSNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.norm_k = nnx.RMSNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, memory: jax.Array | None = None,
                 rope: jax.Array | None = None) -> jax.Array:
        """`x[B, N, D]` attends to `memory[B, M, D']` (itself when None); `rope` rotates both."""
        context = "" if not self.context else "qkv" if memory is None else "q"
        memory = x if memory is None else memory
        q, k = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(memory))
        q, k, v = (rearrange(a, "b n (k e) -> b n k e", k=self.heads)
                   for a in (q, k, self.to_v(memory)))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = (checkpoint_name(a, name)
                   for a, name in ((q, "query"), (k, "key"), (v, "value")))
        out = attend(q, k, v, self.implementation, context=context)
        return self.to_out(rearrange(out, "b n k e -> b n (k e)"))


def attend(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str = "auto", *,
           context: str = "") -> jax.Array:
    """softmax(q k^T / sqrt(E)) v without a mask; the softmax is float32.

    On a mesh, every device computes its shard of the batch (axes `data` and `fsdp`), of the heads
    (axis `tensor`) and, where `context` says so, of the tokens: with "qkv", heads are exchanged
    for tokens when they divide (Ulysses, arXiv 2309.14509), else keys and values are gathered;
    with "q" nothing is communicated. A batch that its axes do not divide stays whole, and so do
    the heads of small models, those without `context`.
    The output is named "attention" for remat policies, as is the logsumexp of `chunked` and
    `splash`: saving that name saves their forward pass from being repeated.

    Args:
      q: [B, N, K, E].
      k, v: [B, M, K, E], of the dtype of q.
      implementation: one of IMPLEMENTATIONS; "auto" takes what is fast on the devices of the
        current mesh (of a topology description too), else on the default device.
      context: which of q, k, v have their tokens over the mesh axis `context`: none (""), "q" or
        "qkv".

    Returns:
      [B, N, K, E], of the dtype of q.

    Raises:
      UserError: no such implementation, or not on these devices; `context` is given and the
        mesh's axes do not divide the heads or the tokens.
    """
    if implementation != "auto" and implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention={implementation!r}: choose from "
                        f"{['auto', *IMPLEMENTATIONS]}.")
    batch, over, heads = sharding.present(sharding.BATCH, context and "context", "tensor")
    if not (batch or over or heads):
        return _local(implementation, q, k, v)
    mesh = jax.sharding.get_abstract_mesh().shape
    if context:
        _check_divides("heads", q.shape[2], "tensor", mesh["tensor"])
        _check_divides("tokens", q.shape[1], "context", mesh["context"])
    elif heads and q.shape[2] % mesh[heads]:
        heads = None
    if batch:
        axes = batch if isinstance(batch, tuple) else (batch,)
        if q.shape[0] % math.prod(mesh[axis] for axis in axes):
            batch = None

    def shard(q, k, v):
        if not exchanged:
            return _local(implementation, q, k, v)
        if q.shape[2] % mesh[over] == 0:
            q, k, v = (jax.lax.all_to_all(x, over, 2, 1, tiled=True) for x in (q, k, v))
            out = _local(implementation, q, k, v)
            return jax.lax.all_to_all(out, over, 1, 2, tiled=True)
        k, v = (jax.lax.all_gather(x, over, axis=1, tiled=True) for x in (k, v))
        return _local(implementation, q, k, v)

    exchanged = over and context == "qkv"
    queries = P(batch, over, heads)
    memory = queries if exchanged else P(batch, None, heads)
    # Custom calls (cuDNN, Pallas) do not say over which axes their results vary.
    return jax.shard_map(shard, in_specs=(queries, memory, memory), out_specs=queries,
                         check_vma=False)(q, k, v)


def platform() -> str:
    """"cpu", "gpu" or "tpu": of the current mesh, else of the default device."""
    device = (jax.sharding.get_abstract_mesh().abstract_device
              or jax.config.jax_default_device or jax.default_backend())
    return device if isinstance(device, str) else device.platform


@contextlib.contextmanager
def portable():
    """While tracing: no kernel of one platform, whatever implementation is asked for.

    `jax.export` promises nothing for the custom calls of cuDNN and Pallas.
    """
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def _local(implementation: str, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attend` on one device."""
    if implementation == "auto" or _portable.get() and implementation in ("cudnn", "splash"):
        implementation = _fastest(q, k)
    return IMPLEMENTATIONS[implementation](q, k, v)


def _fastest(q: jax.Array, k: jax.Array) -> str:
    (batch, queries, heads, width), keys = q.shape, k.shape[1]
    where = None if _portable.get() else platform()
    if where == "tpu" and min(queries, keys) >= LANES:
        return "splash"
    if where == "gpu" and q.dtype.itemsize == 2 and width % 8 == 0 and width <= 128:
        return "cudnn"
    return "xla" if batch * heads * queries * keys < SCORES // 2 else "chunked"


def _xla(q, k, v):
    """All the scores at once."""
    q, k, v = (rearrange(x, "b n k e -> b k n e") for x in (q, k, v))
    weights = jax.nn.softmax(_product("bkne,bkme->bknm", q, k) / math.sqrt(q.shape[-1]))
    out = _product("bknm,bkme->bkne", weights.astype(v.dtype), v)
    return checkpoint_name(rearrange(out, "b k n e -> b n k e").astype(q.dtype), "attention")


@jax.custom_vjp
def _chunked(q, k, v):
    """Some of the scores at a time, so that memory is linear in N and in M.

    FlashAttention (arXiv 2205.14135), as loops around matrix products: over groups of heads (of
    the whole batch), chunks of queries, chunks of keys.
    """
    return _chunked_forward(q, k, v)[0]


def _chunked_forward(q, k, v):
    sizes, scale = _chunk_sizes(q, k), 1 / math.sqrt(q.shape[-1])

    def group(chunks):
        queries, *memory = chunks

        def row(q):
            def column(carry, chunk):
                top, total, out = carry
                k, v, padding = chunk
                scores = _scores(q, k, padding)
                new = jnp.maximum(top, scores.max(-1, keepdims=True))
                weights, fade = jnp.exp((scores - new) * scale), jnp.exp((top - new) * scale)
                total = total * fade + weights.sum(-1, keepdims=True)
                out = out * fade + _product("knm,kme->kne", weights.astype(v.dtype), v)
                return (new, total, out), None

            edge = (*q.shape[:-1], 1)
            start = jnp.full(edge, -jnp.inf), jnp.zeros(edge), jnp.zeros(q.shape)
            (top, total, out), _ = jax.lax.scan(column, start, (*memory, padding))
            return (out / total).astype(q.dtype), top * scale + jnp.log(total)

        return jax.lax.map(row, queries)

    padding = _padding(k.shape[1], sizes.keys)
    out, lse = jax.lax.map(group, (
        _split(q, sizes.heads, sizes.queries),
        *(_split(x, sizes.heads, sizes.keys) for x in (k, v))))
    out, lse = (checkpoint_name(_join(x, q), "attention") for x in (out, lse))
    return out, (q, k, v, out, lse)


def _chunked_backward(residuals, g):
    q, k, v, out, lse = residuals
    sizes, scale = _chunk_sizes(q, k), 1 / math.sqrt(q.shape[-1])
    delta = _product("bnke,bnke->bnk", g, out)[..., None]

    def group(chunks):
        *rows, keys, values = chunks

        def row(grads, chunk):
            q, g, delta, lse = chunk

            def column(dq, chunk):
                k, v, padding = chunk
                weights = jnp.exp(_scores(q, k, padding) * scale - lse)
                dscores = weights * (_product("kne,kme->knm", g, v) - delta)
                dscores = dscores.astype(q.dtype)
                # Transposed: XLA's CPU products are slow where the large factor, the scores, is
                # to be transposed.
                dk = _product("kne,knm->kem", q, dscores)
                dv = _product("kne,knm->kem", g, weights.astype(g.dtype))
                return dq + _product("knm,kme->kne", dscores, k), (dk, dv)

            dq, parts = jax.lax.scan(column, jnp.zeros(q.shape), (keys, values, padding))
            return jax.tree.map(jnp.add, grads, parts), (dq * scale).astype(q.dtype)

        start = tuple(jnp.zeros(x.swapaxes(-1, -2).shape) for x in (keys, values))
        (dk, dv), dq = jax.lax.scan(row, start, tuple(rows))
        return dq, *(x.swapaxes(-1, -2).astype(q.dtype) for x in (dk * scale, dv))

    padding = _padding(k.shape[1], sizes.keys)
    grads = jax.lax.map(group, (
        *(_split(x, sizes.heads, sizes.queries) for x in (q, g, delta, lse)),
        *(_split(x, sizes.heads, sizes.keys) for x in (k, v))))
    return tuple(_join(grad, x) for grad, x in zip(grads, (q, k, v), strict=True))


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _cudnn(q, k, v):
    """cuDNN's fused attention: 16-bit floats, E a multiple of 8 up to 128 (256 on Hopper)."""
    if platform() != "gpu":
        raise UserError(f"attention='cudnn' needs a GPU and the devices are of platform "
                        f"{platform()!r}: choose 'auto', 'xla' or 'chunked'.")
    if q.dtype.itemsize != 2:
        raise UserError(f"attention='cudnn' needs bfloat16 or float16 and got {q.dtype}: choose "
                        "dtype bfloat16 or attention 'auto', 'xla' or 'chunked'.")
    out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return checkpoint_name(out, "attention")


def _splash(q, k, v):
    """The Pallas kernel of JAX for TPU; interpreted (slow, for tests) on a CPU.

    Tokens are padded to whole blocks; padding keys are of another segment than all queries.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

    if platform() == "gpu":
        raise UserError("attention='splash' needs a TPU and the devices are of platform 'gpu': "
                        "choose 'auto', 'cudnn', 'xla' or 'chunked'.")
    (queries, heads, width), keys = q.shape[1:], k.shape[1]
    block_q, block_kv = _block(queries), _block(keys)
    q = (q.astype(jnp.float32) / math.sqrt(width)).astype(q.dtype)
    q, k, v = (_pad(rearrange(x, "b n k e -> b k n e"), block)
               for x, block in ((q, block_q), (k, block_kv), (v, block_kv)))
    segments = None
    if k.shape[2] > keys:
        segments = splash_lib.SegmentIds(
            jnp.zeros(q.shape[2], jnp.int32), (jnp.arange(k.shape[2]) >= keys).astype(jnp.int32))
    mask = splash_lib.FullMask((q.shape[2], k.shape[2]))
    kernel = splash_lib.make_splash_mha(
        splash_lib.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1,
        block_sizes=splash_lib.BlockSizes(
            block_q=block_q, block_kv=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv,
            block_q_dq=block_q, block_kv_dq=block_kv),
        residual_checkpoint_name="attention", interpret=platform() == "cpu")
    out = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))(q, k, v)
    return rearrange(out[:, :, :queries], "b k n e -> b n k e")


IMPLEMENTATIONS = {"xla": _xla, "chunked": _chunked, "cudnn": _cudnn, "splash": _splash}


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class _Sizes(typing.NamedTuple):
    heads: int
    queries: int
    keys: int


def _chunk_sizes(q, k) -> _Sizes:
    """Of a chunk of about SCORES scores: the keys that KEYS allows, then queries, then heads."""
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    keys = _part(keys, KEYS)
    queries = _part(queries, max(1, SCORES // keys))
    most = max(1, SCORES // (queries * keys))
    return _Sizes(max(n for n in range(1, most + 1) if batch * heads % n == 0), queries, keys)


def _part(whole: int, largest: int) -> int:
    """The size of as few equal parts as possible, the last one padded."""
    return -(-whole // -(-whole // largest))


def _scores(q, k, padding):
    """float32[K, N, M] of q[K, N, E] and k[K, M, E], not yet divided by sqrt(E)."""
    scores = _product("kne,kme->knm", q, k)
    return scores if padding is None else scores + padding


def _split(x, heads: int, tokens: int):
    """[B, N, K, E] -> chunks [groups of heads, chunks of tokens, heads, tokens, E], the last ones
    padded with zeros."""
    x = _pad(rearrange(x, "b n k e -> b k n e"), tokens)
    x = rearrange(x, "b k (c n) e -> (b k) c n e", n=tokens)
    return rearrange(x, "(g k) c n e -> g c k n e", k=heads)


def _join(x, like):
    """The inverse of `_split` of an array whose B, N and K are those of `like`."""
    batch, tokens, heads, _ = like.shape
    x = rearrange(x, "g c k n e -> (g k) (c n) e")
    return rearrange(x, "(b k) n e -> b n k e", b=batch, k=heads)[:, :tokens]


def _padding(keys: int, size: int):
    """What is added to the scores of chunks of keys: 0, minus infinity for padding; None where no
    key is padding."""
    if keys % size == 0:
        return None
    count = -(-keys // size)
    return jnp.where(jnp.arange(count * size) < keys, 0.0, -jnp.inf).reshape(count, size)


def _block(tokens: int) -> int:
    """The size of as few equal blocks as possible, a multiple of LANES up to BLOCK."""
    count = -(-tokens // BLOCK)
    return -(-tokens // (count * LANES)) * LANES


def _pad(x, block: int):
    """[B, K, N, E] with zeros up to a multiple of `block` tokens."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0)))


def _check_divides(what: str, number: int, axis: str, parts: int):
    if number % parts:
        nearest = min((n for n in range(1, number + 1) if number % n == 0),
                      key=lambda n: abs(math.log(n / parts)))
        raise UserError(f"{number} {what} do not divide by {axis}={parts} of the mesh. Nearest "
                        f"that does: {axis}={nearest}.")
