"""Draws the tabletop with anti-aliased shapes, and says exactly how every pixel moves. NumPy only.

A picture is a list of shapes, far to near, in pixel coordinates (u right, v down, the centre of the
first pixel at 0.5, 0.5). The flow between two pictures follows from the same shapes in both.
"""

from typing import NamedTuple

import numpy as np

from jaxvp.envs.tabletop_world import BLOCK_HALF, BLOCK_HEIGHT, LEFT, RIGHT, TRAY_HALF, TRAY_HANDLE

CAMERAS = ("head", "left_wrist", "right_wrist")
HEAD_HALF = 0.42  # m, half of what the head camera sees
TILT = 0.5  # how far up the head camera's picture a metre of height shifts a thing, in metres
BASES = ((-0.6, 0.0, 0.4), (0.6, 0.0, 0.4))  # m, shoulders, outside the picture
ARM_COLOURS = ((52, 54, 64), (225, 225, 232))
FINGER_COLOURS = ((30, 30, 36), (250, 250, 255))
FLOOR = np.array((35, 33, 32), np.float32)


class Shape(NamedTuple):
    """kind and its numbers in pixels: box (left, top, right, bottom), disc, diamond and triangle
    (u, v, radius), capsule (u, v, u, v, radius). Shapes with the same key in two pictures are the
    same thing; a shadow has no key. `soft` is the width in pixels of the edge."""

    key: tuple | None
    kind: str
    numbers: tuple[float, ...]
    colour: tuple[int, int, int]
    alpha: float = 1.0
    soft: float = 1.0


class View(NamedTuple):
    """An orthographic camera above (x, y): `scale` pixels per metre, `size` pixels square."""

    x: float
    y: float
    scale: float
    tilt: float
    size: int

    def project(self, x, y, z):
        half = self.size / 2
        return half + (x - self.x) * self.scale, half - (y + self.tilt * z - self.y) * self.scale


def view(camera, arms, size):
    """The View of `camera`; a wrist camera hangs on its arm and sees more from higher up."""
    if camera == "head":
        return View(0.0, 0.0, size / (2 * HEAD_HALF), TILT, size)
    x, y, z, _ = arms[CAMERAS.index(camera) - 1]
    return View(x, y, size / (2 * (0.12 + 0.2 * z)), 0.0, size)


def draw(background, bodies, positions, arms, camera, size):
    """uint8[size, size, 3], top row first."""
    where = view(camera, arms, size)
    image = paint_background(background, where)
    for shape in shapes(bodies, positions, arms, camera, where):
        region, cover = coverage(shape, size)
        if cover is not None:
            part = image[region]
            part += cover * (np.array(shape.colour, np.float32)[:, None, None] - part)
    return np.ascontiguousarray((image + 0.5).astype(np.uint8).transpose(1, 2, 0))


def flow(bodies, before, after, camera, size):
    """float32[size, size, 2]: where the surface in each pixel of the picture `before` goes, in
    pixels (u right, v down). `before` and `after` are (positions, arms). Shadows do not count."""
    old, new = view(camera, before[1], size), view(camera, after[1], size)
    u, v = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
    zoom = new.scale / old.scale
    half = size / 2
    out = np.stack(
        [
            (u - half) * zoom + half + (old.x - new.x) * new.scale - u,
            (v - half) * zoom + half - (old.y - new.y) * new.scale - v,
        ]
    )
    later = {shape.key: shape.numbers for shape in shapes(bodies, *after, camera, new)}
    earlier = shapes(bodies, *before, camera, old)
    owner = owners(earlier, size)
    for i in np.unique(owner[owner >= 0]):
        mine, shape = owner == i, earlier[i]
        out[:, mine] = motion(shape.kind, shape.numbers, later[shape.key], u[mine], v[mine])
    return out.transpose(1, 2, 0).astype(np.float32)


def owners(shapes, size):
    """int[size, size]: the index of the shape that is on top in each pixel, -1 for the background.
    Shadows own nothing."""
    owner = np.full((1, size, size), -1)
    for i, shape in enumerate(shapes):
        region, cover = coverage(shape, size)
        if cover is not None and shape.key is not None:
            owner[region][:, cover > 0.5] = i
    return owner[0]


def motion(kind, old, new, u, v):
    """The displacement float[2, N] of the points u, v of a shape that goes from `old` to `new`:
    linear between the ends of a capsule and the edges of a box, about the centre of the others."""
    old, new = np.array(old), np.array(new)
    if kind == "capsule":
        # Complex numbers: where along the axis a point is, and how far off it, turn with the axis.
        (a, b), (a_new, b_new) = (n[[0, 2]] + 1j * n[[1, 3]] for n in (old, new))
        point = u + 1j * v
        axis, axis_new = b - a or 1e-9, b_new - a_new or 1e-9
        t = np.clip(((point - a) / axis).real, 0, 1)
        turn = axis_new / abs(axis_new) / (axis / abs(axis)) * new[4] / old[4]
        move = a_new + t * axis_new + (point - a - t * axis) * turn - point
        return np.stack([move.real, move.imag])
    if kind == "box":
        zoom = (new[2:] - new[:2]) / (old[2:] - old[:2])
        return np.stack([new[0] + (u - old[0]) * zoom[0] - u, new[1] + (v - old[1]) * zoom[1] - v])
    zoom = new[2] / old[2]
    return np.stack([new[0] + (u - old[0]) * zoom - u, new[1] + (v - old[1]) * zoom - v])


def coverage(shape, size):
    """(index of the image[3, H, W] region, float32[h, w] how much of each pixel is covered), or
    (None, None) outside the picture."""
    n = shape.numbers
    pad = shape.soft / 2
    if shape.kind == "box":
        left, top, right, bottom = n
    elif shape.kind == "capsule":
        reach = n[4] + pad
        left, right = min(n[0], n[2]) - reach, max(n[0], n[2]) + reach
        top, bottom = min(n[1], n[3]) - reach, max(n[1], n[3]) + reach
    else:
        reach = n[2] + pad
        left, top, right, bottom = n[0] - reach, n[1] - reach, n[0] + reach, n[1] + reach
    u0, u1 = max(int(left), 0), min(int(right) + 1, size)
    v0, v1 = max(int(top), 0), min(int(bottom) + 1, size)
    if u0 >= u1 or v0 >= v1 or right <= 0 or bottom <= max(top, 0):
        return None, None
    region = (slice(None), slice(v0, v1), slice(u0, u1))
    u = np.arange(u0, u1, dtype=np.float32)
    v = np.arange(v0, v1, dtype=np.float32)[:, None]
    if shape.kind == "box":  # exact: the product of the two overlaps
        wide = np.minimum(u + 1, right) - np.maximum(u, left)
        tall = np.minimum(v + 1, bottom) - np.maximum(v, top)
        return region, wide * tall * shape.alpha
    u += 0.5
    v += 0.5
    if shape.kind == "disc":
        distance = np.sqrt((u - n[0]) ** 2 + (v - n[1]) ** 2) - n[2]
    elif shape.kind == "capsule":
        du, dv = n[2] - n[0], n[3] - n[1]
        t = ((u - n[0]) * du + (v - n[1]) * dv) / max(du * du + dv * dv, 1e-9)
        t = np.clip(t, 0, 1, out=t)
        distance = np.sqrt((u - n[0] - t * du) ** 2 + (v - n[1] - t * dv) ** 2) - n[4]
    elif shape.kind == "diamond":
        distance = (np.abs(u - n[0]) + np.abs(v - n[1]) - n[2]) * 0.7071
    else:  # triangle, point up
        side = np.abs(u - n[0]) * 0.866 + (v - n[1]) * -0.5
        distance = np.maximum(side, v - n[1]) - n[2] / 2
    cover = np.clip(0.5 - distance / shape.soft, 0, 1)
    return region, cover * shape.alpha if shape.alpha < 1 else cover


def shapes(bodies, positions, arms, camera, where):
    """Every shape in the picture of `camera` at the View `where`, far to near."""
    lying = [i for i, p in enumerate(positions) if p[2] < 0.005 and bodies[i].kind != "block"]
    others = [i for i in range(len(bodies)) if i not in lying]
    # What is lower is further from the camera, then what is further back on the table.
    others.sort(key=lambda i: (round(positions[i][2], 2), -positions[i][1]))
    out = []
    for i in lying:
        out += _body(bodies[i], positions[i], where)
    if camera == "head":
        out += _shadows([(bodies[i], positions[i]) for i in others], arms, where)
    for i in others:
        out += _body(bodies[i], positions[i], where)
    for arm in (LEFT, RIGHT):
        own = camera == CAMERAS[1 + arm]
        out += _fingers(arm, arms[arm], where) if own else _arm(arm, arms[arm], where)
    return out


def shade(colour, factor):
    """The colour `factor` times as bright."""
    return tuple(min(255, c * factor) for c in colour)


def _box(key, where, x, y, z, half, colour):
    left, top = where.project(x - half[0], y + half[1], z)
    right, bottom = where.project(x + half[0], y - half[1], z)
    return Shape(key, "box", (left, top, right, bottom), colour)


def _front(key, where, x, y, z, half, height, colour):
    """The side of a box that faces the robot: below its top face, of no height without tilt."""
    left, top = where.project(x - half[0], y - half[1], z + height)
    right, bottom = where.project(x + half[0], y - half[1], z)
    return Shape(key, "box", (left, top, right, bottom), colour)


def _body(body, position, where):
    x, y, z = position
    name, colour, s = body.name, body.colour, where.scale

    def disc(part, radius, height, tint):
        return Shape((name, part), "disc", (*where.project(x, y, z + height), radius * s), tint)

    if body.kind == "block":
        half = (BLOCK_HALF, BLOCK_HALF)
        return [
            _front((name, 0), where, x, y, z, half, BLOCK_HEIGHT, shade(colour, 0.6)),
            _box((name, 1), where, x, y, z + BLOCK_HEIGHT, half, colour),
        ]
    if body.kind == "plate":
        return [
            disc(0, body.radius, 0, shade(colour, 0.7)),
            disc(1, body.radius - 0.008, 0.006, colour),
            disc(2, body.radius - 0.035, 0.006, shade(colour, 0.88)),
        ]
    if body.kind == "bowl":
        return [
            disc(0, body.radius - 0.02, 0, shade(colour, 0.5)),
            disc(1, body.radius, 0.03, colour),
            disc(2, body.radius - 0.018, 0.03, shade(colour, 0.6)),
        ]
    if body.kind == "tray":
        inner = (TRAY_HALF[0] - 0.02, TRAY_HALF[1] - 0.02)
        handles = (TRAY_HANDLE + 0.022, 0.045)
        return [
            _box((name, 0), where, x, y, z + 0.02, handles, shade(colour, 0.45)),
            _front((name, 1), where, x, y, z, TRAY_HALF, 0.02, shade(colour, 0.6)),
            _box((name, 2), where, x, y, z + 0.02, TRAY_HALF, colour),
            _box((name, 3), where, x, y, z + 0.02, inner, shade(colour, 1.35)),
        ]
    if body.kind == "cross":
        bar = body.radius / 3
        return [
            _box((name, 0), where, x, y, z, (body.radius, bar), colour),
            _box((name, 1), where, x, y, z, (bar, body.radius), colour),
        ]
    return [Shape((name, 0), body.kind, (*where.project(x, y, z), body.radius * s), colour)]


def _shadows(placed, arms, where):
    """Shadows on the table, straight below raised bodies and, softer from higher up, hands."""
    out = []
    for body, (x, y, z) in placed:
        if z > 0.02:
            half = TRAY_HALF if body.kind == "tray" else (BLOCK_HALF, BLOCK_HALF)
            out.append(_box(None, where, x, y, 0, half, (0, 0, 0))._replace(alpha=0.3))
    for x, y, z, _ in arms:
        disc = (*where.project(x, y, 0), 0.04 * where.scale)
        soft = (0.04 + 0.3 * z) * where.scale
        out.append(Shape(None, "disc", disc, (0, 0, 0), 0.35, soft))
    return out


def _gap(grip):
    return 0.012 + 0.068 * grip  # m from the grasp point to a finger: 0.16 m apart when open


def _arm(arm, state, where):
    """Upper arm, palm and two fingers. The palm is 11 cm above the grasp point."""
    x, y, z, grip = state
    s, gap = where.scale, _gap(grip)
    colour = FINGER_COLOURS[arm]
    shoulder, wrist = where.project(*BASES[arm]), where.project(x, y, z + 0.12)
    ends = [where.project(x + side * gap, y, z + 0.11) for side in (-1, 1)]
    tips = [where.project(x + side * gap, y, z - 0.01) for side in (-1, 1)]
    return [
        Shape(("arm", arm), "capsule", (*shoulder, *wrist, 0.018 * s), ARM_COLOURS[arm]),
        Shape(("palm", arm), "capsule", (*ends[0], *ends[1], 0.011 * s), colour),
        Shape(("finger", arm, 0), "capsule", (*ends[0], *tips[0], 0.011 * s), colour),
        Shape(("finger", arm, 1), "capsule", (*ends[1], *tips[1], 0.011 * s), colour),
    ]


def _fingers(arm, state, where):
    """The fingers as their own wrist camera sees them: at a fixed place, whatever the height."""
    s, half = where.size / 0.28, where.size / 2
    top, bottom = half - 0.015 * s, half + 0.015 * s
    out = []
    for i, u in enumerate((half - _gap(state[3]) * s, half + _gap(state[3]) * s)):
        numbers = (u, top, u, bottom, 0.012 * s)
        out.append(Shape(("finger", arm, i), "capsule", numbers, FINGER_COLOURS[arm]))
    return out


class Background(NamedTuple):
    """A table top: `first` and `second` colours (0..255) mixed by a pattern with cells of `cell`
    metres (plain, gradient, checker or stripes)."""

    pattern: str
    first: tuple[int, int, int]
    second: tuple[int, int, int]
    cell: float = 0.2


BACKGROUNDS = {
    "seen": (
        Background("plain", (196, 178, 150), (196, 178, 150)),
        Background("plain", (150, 160, 170), (150, 160, 170)),
        Background("gradient", (205, 190, 165), (150, 135, 115)),
        Background("gradient", (140, 155, 150), (185, 195, 190)),
        Background("checker", (185, 170, 150), (168, 152, 132), 0.2),
        Background("checker", (165, 170, 178), (148, 153, 162), 0.16),
    ),
    "unseen": (
        Background("plain", (120, 140, 110), (120, 140, 110)),
        Background("gradient", (190, 150, 150), (130, 105, 120)),
        Background("stripes", (180, 185, 150), (145, 150, 120), 0.1),
        Background("checker", (130, 125, 150), (160, 155, 175), 0.1),
    ),
}


def paint_background(background, where):
    """float32[3, size, size] in 0..255. Each pattern is an outer product of two rows: fast."""
    pixels = (np.arange(where.size, dtype=np.float32) + 0.5 - where.size / 2) / where.scale
    x, y = pixels + where.x, where.y - pixels
    width = 1 / where.scale

    def waves(t):  # +1 and -1 by turns, with edges one pixel wide
        phase = np.abs(np.mod(t / background.cell + 0.5, 2) - 1) - 0.5
        return np.clip(phase * 2 * background.cell / width, -1, 1)

    rows, columns, base = {
        "plain": lambda: (0 * y, 0 * x, 0.0),
        "gradient": lambda: (np.clip(y / 0.8 + 0.5, 0, 1), np.ones_like(x), 0.0),
        "checker": lambda: (waves(y) / 2, waves(x), 0.5),
        "stripes": lambda: (np.ones_like(y), waves(x) / 2, 0.5),
    }[background.pattern]()
    mix = base + np.outer(rows, columns)
    first, second = (np.array(c, np.float32)[:, None, None] for c in background[1:3])
    image = first + mix * (second - first)
    edge = 0.41  # the table ends a little outside the workspace
    on = np.outer(
        np.clip((edge - np.abs(y)) / width + 0.5, 0, 1),
        np.clip((edge - np.abs(x)) / width + 0.5, 0, 1),
    )
    return FLOOR[:, None, None] + on * (image - FLOOR[:, None, None])
