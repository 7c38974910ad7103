"""The tabletop's physical state: two arms, a few bodies, kinematic grasping. NumPy only.

Metres; x right, y away from the robot, z up; the table is the square |x|, |y| <= 0.4 at z = 0.
"""

from dataclasses import dataclass

import numpy as np

LEFT, RIGHT = 0, 1
MAX_MOVE = 0.05  # m per control step
MAX_GRIP = 0.5  # gripper opening per control step
GRASP_RADIUS = 0.06  # m, in xy and in z: forgiving, so that a policy that sees 32 pixels can grasp
HOLDING = 0.4  # a gripper cannot close further than this around what it holds
SLIP = 0.05  # m by which a hand may miss its place on a body that it shares, or cannot move alone
# Per arm: x, y, z, gripper. Only the strip |x| <= 0.15 is within reach of both.
LOW = np.array([[-0.4, -0.4, 0.0, 0.0], [-0.15, -0.4, 0.0, 0.0]])
HIGH = np.array([[0.15, 0.4, 0.3, 1.0], [0.4, 0.4, 0.3, 1.0]])
HOME = np.array([[-0.26, -0.32, 0.15, 1.0], [0.26, -0.32, 0.15, 1.0]])


@dataclass(frozen=True)
class Body:
    """What never changes about a body. `radius` bounds its footprint; `hold` is how far from its
    centre the centre of another body may be and still rest on it, at height `top`."""

    name: str
    kind: str  # block, plate, bowl, tray, or the shape of a distractor
    colour: tuple[int, int, int]
    radius: float
    hold: float = 0.0
    top: float = 0.0


BLOCK_HALF, BLOCK_HEIGHT = 0.04, 0.08
TRAY_HALF, TRAY_HANDLE = (0.12, 0.08), 0.14  # half sizes in x, y; handles at x = +-0.14
PLATE_RADIUS, BOWL_RADIUS = 0.1, 0.095

_BLOCK_COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 90, 220),
    "yellow": (245, 205, 40),
    "purple": (135, 60, 185),
    "orange": (245, 130, 30),
}
BODIES = {
    name: Body(name, "block", colour, 0.057, hold=0.045, top=BLOCK_HEIGHT)
    for name, colour in _BLOCK_COLOURS.items()
} | {
    "plate": Body("plate", "plate", (245, 175, 195), PLATE_RADIUS, hold=0.09, top=0.01),
    "bowl": Body("bowl", "bowl", (80, 190, 200), BOWL_RADIUS, hold=0.08, top=0.01),
    "tray": Body("tray", "tray", (150, 95, 55), 0.17, hold=0.08, top=0.02),
}


class World:
    """The whole state. `positions` float64[N, 3] are the bodies' centres in xy and undersides in z;
    `arms` float64[2, 4] the grasp points and gripper openings; `held[arm]` the index of the body in
    that hand or None; `support[body]` the index of the body that it rests on or None."""

    def __init__(self, bodies, positions):
        self.bodies = tuple(bodies)
        self.index = {body.name: i for i, body in enumerate(self.bodies)}
        self.positions = np.array(positions, np.float64).reshape(-1, 3)
        self.arms = HOME.copy()
        self.held = [None, None]
        self.offset = np.zeros((2, 3))  # body position minus hand position, set when grasped
        self.support = [None] * len(self.bodies)

    def holders(self, body):
        """The arms that hold `body`: a list of 0 to 2 of LEFT and RIGHT."""
        return [arm for arm in (LEFT, RIGHT) if self.held[arm] == body]

    def grasp_point(self, body, arm):
        """float64[3] where `arm` takes hold: the centre of a block, its own handle of the tray."""
        if self.bodies[body].kind == "tray":
            return self.positions[body] + (TRAY_HANDLE * (1 if arm == RIGHT else -1), 0, 0.03)
        return self.positions[body] + (0, 0, BLOCK_HEIGHT / 2)

    def rests_on(self, body, other):
        """True if `body` is `other` or rests on it, directly or stacked, and nobody holds any."""
        while body is not None and not self.holders(body):
            if body == other:
                return True
            body = self.support[body]
        return False

    def advance(self, target, noise):
        """One control step. target float[2, 4] absolute; noise float[2, 3] metres at full speed,
        less in proportion for a shorter move, so that an arm which stays does not tremble."""
        target = np.clip(target, LOW, HIGH)
        move = target[:, :3] - self.arms[:, :3]
        distance = np.linalg.norm(move, axis=1, keepdims=True)
        speed = np.minimum(1, distance / MAX_MOVE)  # fraction of full speed
        move *= speed * MAX_MOVE / np.maximum(distance, 1e-9)
        before = self.arms[:, 3].copy()
        self.arms[:, :3] = np.clip(self.arms[:, :3] + move + speed * noise, LOW[:, :3], HIGH[:, :3])
        self.arms[:, 3] += np.clip(target[:, 3] - before, -MAX_GRIP, MAX_GRIP)
        self._carry()
        for arm in (LEFT, RIGHT):
            if self.held[arm] is not None and self.arms[arm, 3] > 0.5:
                self._let_go(arm)
            elif self.held[arm] is None and before[arm] >= 0.5 > self.arms[arm, 3]:
                self._grasp(arm)
            if self.held[arm] is not None:
                self.arms[arm, 3] = max(self.arms[arm, 3], HOLDING)

    def _carry(self):
        for body in sorted({body for body in self.held if body is not None}):
            hands = self.holders(body)
            wanted = self.arms[hands, :3] + self.offset[hands]
            place = wanted.mean(0)
            place[2] = max(place[2], 0)
            if self.bodies[body].kind == "tray" and len(hands) == 1:
                place = self.positions[body].copy()  # too heavy for one hand
            self._shift(body, place - self.positions[body])
            for arm, want in zip(hands, wanted, strict=True):
                # A hand pressing its body into the table does not lose it.
                if np.linalg.norm(np.maximum(want, (-9, -9, 0)) - place) > SLIP:
                    self._let_go(arm)

    def _shift(self, body, displacement):
        self.positions[body] += displacement
        for other, below in enumerate(self.support):
            if below == body:
                self._shift(other, displacement)

    def _grasp(self, arm):
        hand = self.arms[arm, :3]
        near = []
        for i, body in enumerate(self.bodies):
            if body.kind in ("block", "tray"):
                gap = self.grasp_point(i, arm) - hand
                if np.hypot(*gap[:2]) <= GRASP_RADIUS and abs(gap[2]) <= GRASP_RADIUS:
                    near.append((np.linalg.norm(gap), i))
        if near:
            body = min(near)[1]
            self.held[arm] = body
            self.offset[arm] = self.positions[body] - hand
            self.support[body] = None

    def _let_go(self, arm):
        body, self.held[arm] = self.held[arm], None
        hands = self.holders(body)
        if hands:  # the other hand keeps it where it is now
            self.offset[hands] = self.positions[body] - self.arms[hands, :3]
        else:
            self._drop(body)

    def _drop(self, body):
        """The body falls on the highest thing below its centre; a tray on the table."""
        height, below = 0.0, None
        for i, other in enumerate(self.bodies):
            if not other.hold or self.rests_on(i, body) or self.bodies[body].kind == "tray":
                continue
            gap = np.abs(self.positions[i, :2] - self.positions[body, :2])
            # Blocks and trays hold what is above their square, plates and bowls above their disc.
            reach = gap.max() if other.kind in ("block", "tray") else np.hypot(*gap)
            top = self.positions[i, 2] + other.top
            if reach <= other.hold and height < top <= self.positions[body, 2] + GRASP_RADIUS:
                height, below = top, i
        self.support[body] = below
        self._shift(body, (0, 0, height - self.positions[body, 2]))
