"""Attention, and the rotary position embedding of Wan."""

import contextlib
import contextvars
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxvp import sharding
from jaxvp.models.module import Linear

# A CPU computes 2 MB of scores at once faster, 16 MB in chunks faster (forward and backward).
SCORES = 4 << 20
QUERIES, KEYS = 128, 2048  # Largest chunk of `chunked`.
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
                 rngs: nnx.Rngs):
        memory_width = memory_width or width
        self.heads, self.implementation, self.context = heads, implementation, context
        self.to_q = Linear(width, width, dtype=dtype, rngs=rngs)
        self.to_k = Linear(memory_width, width, dtype=dtype, rngs=rngs)
        self.to_v = Linear(memory_width, width, dtype=dtype, rngs=rngs)
        self.to_out = Linear(width, width, dtype=dtype, rngs=rngs)
        # `dtype` is that of the results: they are computed in float32.
        self.norm_q = nnx.RMSNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.norm_k = nnx.RMSNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)

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
      ValueError: no such implementation, or not on these devices; `context` is given and the
        mesh's axes do not divide the heads or the tokens.
    """
    if implementation != "auto" and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation!r}: choose from "
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
    return "xla" if 4 * batch * heads * queries * keys <= SCORES else "chunked"


def _xla(q, k, v):
    """All the scores at once."""
    scores = _scores(*(rearrange(x, "b n k e -> b k n e") for x in (q, k)))
    weights = jax.nn.softmax(scores).astype(v.dtype)
    out = jnp.einsum("bknm,bmke->bnke", weights, v, preferred_element_type=jnp.float32)
    return checkpoint_name(out.astype(q.dtype), "attention")


@jax.custom_vjp
def _chunked(q, k, v):
    """Scores of a few queries and keys at a time, so that memory is linear in N and in M.

    FlashAttention (arXiv 2205.14135), as loops around matrix products.
    """
    return _chunked_forward(q, k, v)[0]


def _chunked_forward(q, k, v):
    tokens = q.shape[1]

    def row(_, q):
        def column(carry, chunk):
            top, total, out = carry
            k, v, padding = chunk
            scores = _scores(q, k) + padding
            new = jnp.maximum(top, scores.max(-1, keepdims=True))
            weights, fade = jnp.exp(scores - new), jnp.exp(top - new)
            total = total * fade + weights.sum(-1, keepdims=True)
            out = out * fade + _product("bknm,bkme->bkne", weights.astype(v.dtype), v)
            return (new, total, out), None

        edge = (*q.shape[:-1], 1)
        start = jnp.full(edge, -jnp.inf), jnp.zeros(edge), jnp.zeros(q.shape)
        (top, total, out), _ = jax.lax.scan(column, start, memory)
        return None, ((out / total).astype(q.dtype), top + jnp.log(total))

    memory = *(_split(x, KEYS) for x in (k, v)), _padding(k.shape[1])
    _, (out, lse) = jax.lax.scan(row, None, _split(q, QUERIES))
    out, lse = (checkpoint_name(_join(x, tokens), "attention") for x in (out, lse))
    return out, (q, k, v, out, lse)


def _chunked_backward(residuals, g):
    q, k, v, out, lse = residuals
    delta = jnp.einsum("bnke,bnke->bnk", g, out, preferred_element_type=jnp.float32)[..., None]

    def row(grads, chunk):
        q, g, delta, lse = chunk

        def column(dq, chunk):
            k, v, padding = chunk
            weights = jnp.exp(_scores(q, k) + padding - lse)
            dv = _product("bknm,bkne->bkme", weights.astype(g.dtype), g)
            dscores = weights * (_product("bkne,bkme->bknm", g, v) - delta)
            dscores = (dscores / math.sqrt(q.shape[-1])).astype(q.dtype)
            dk = _product("bknm,bkne->bkme", dscores, q)
            return dq + _product("bknm,bkme->bkne", dscores, k), (dk, dv)

        dq, parts = jax.lax.scan(column, jnp.zeros(q.shape), memory)
        return jax.tree.map(jnp.add, grads, parts), dq.astype(q.dtype)

    memory = *(_split(x, KEYS) for x in (k, v)), _padding(k.shape[1])
    start = jnp.zeros(memory[0].shape), jnp.zeros(memory[1].shape)
    (dk, dv), dq = jax.lax.scan(row, start, tuple(_split(x, QUERIES) for x in (q, g, delta, lse)))
    return _join(dq, q.shape[1]), *(_join(x, k.shape[1]).astype(k.dtype) for x in (dk, dv))


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _cudnn(q, k, v):
    """cuDNN's fused attention: 16-bit floats, E a multiple of 8 up to 128 (256 on Hopper)."""
    if platform() != "gpu":
        raise ValueError(f"attention='cudnn' needs a GPU and the devices are of platform "
                         f"{platform()!r}: choose 'auto', 'xla' or 'chunked'.")
    if q.dtype.itemsize != 2:
        raise ValueError(f"attention='cudnn' needs bfloat16 or float16 and got {q.dtype}: choose "
                         "dtype bfloat16 or attention 'auto', 'xla' or 'chunked'.")
    out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return checkpoint_name(out, "attention")


def _splash(q, k, v):
    """The Pallas kernel of JAX for TPU; interpreted (slow, for tests) on a CPU.

    Tokens are padded to whole blocks; padding keys are of another segment than all queries.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

    if platform() == "gpu":
        raise ValueError("attention='splash' needs a TPU and the devices are of platform 'gpu': "
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


def _scores(q, k):
    """float32[B, K, N, M] of q[B, K, N, E] and k[B, K, M, E]."""
    return _product("bkne,bkme->bknm", q, k) / math.sqrt(q.shape[-1])


def _split(x, largest: int):
    """[B, N, K, E] -> equal chunks [n, B, K, N / n, E], the last one padded with zeros."""
    count = -(-x.shape[1] // largest)
    x = _pad(rearrange(x, "b n k e -> b k n e"), -(-x.shape[1] // count))
    return rearrange(x, "b k (c n) e -> c b k n e", c=count)


def _join(x, tokens: int):
    """The inverse of `_split`."""
    return rearrange(x, "c b k n e -> b (c n) k e")[:, :tokens]


def _padding(keys: int):
    """What is added to the scores of chunks of keys: 0, minus infinity for padding."""
    count = -(-keys // KEYS)
    size = -(-keys // count)
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
        raise ValueError(f"{number} {what} do not divide by {axis}={parts} of the mesh. Nearest "
                         f"that does: {axis}={nearest}.")
