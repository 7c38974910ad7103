"""A suite that worker processes can import: an episode succeeds when its actions sum up to a goal.

Its environments can be made to crash, hang or refuse.
"""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from jaxvp.errors import UserError
from jaxvp.evaluation.protocol import Protocol

PROTOCOL = Protocol(
    name="count", version=1, suite="count", tasks=("a", "b"), trials=3, max_steps=10,
    wait_steps=0, init_states="none", seeds="none", fps=20.0, cameras=("agentview",),
    camera_size=(4, 4), rotation="none", gripper="none", robot="counter", action=("step",),
    state=("count",), action_low=(0.0,), action_high=(1.0,), simulator="none",
)
GOALS = {"a": 3, "b": 6}


class Images(dict):
    """Notes that it is read."""

    def __init__(self, env):
        super().__init__(agentview=np.full((4, 4, 3), int(env.count) % 256, np.uint8))
        self._env, self._count = env, env.count

    def __getitem__(self, camera):
        self._env.suite.read.append(self._count)
        return super().__getitem__(camera)


class Env:
    def __init__(self, suite, task):
        self.suite, self.task, self.goal, self.closed = suite, task, GOALS[task], False

    def reset(self, trial):
        self.trial, self.count = trial, -trial  # So that trials take different numbers of steps.
        return self.observation()

    def reset_to(self, initial):
        self.trial, self.count = 0, int(initial)
        return self.observation()

    def step(self, action):
        assert not self.closed
        self.suite.fault(self.task, self.trial)
        self.count += float(action[0])
        return self.observation(), self.count >= self.goal

    def expert_action(self):
        return np.ones(1, np.float32)

    def observation(self):
        return {"images": Images(self), "state": np.array([self.count], np.float32),
                "instruction": "count", "robot": "counter"}

    def close(self):
        self.closed = True


class Suite:
    """What happens in a step of an episode is a method of this class, by its name.

    Args:
      folder: for what processes tell each other.
      faults: (task, trial) to the name of the method.
      once: whether it happens only in the first try.
    """

    has_expert = True
    heavy = False

    def __init__(self, folder="", faults=None, once=False):
        self.folder, self.faults, self.once = Path(folder), faults or {}, once
        self.protocol, self.made, self.read = PROTOCOL, [], []

    def make(self, task):
        self.made.append(Env(self, task))
        return self.made[-1]

    def instruction(self, task):
        return "count"

    def fault(self, task, trial):
        if name := self.faults.get((task, trial)):
            mark = self.folder / f"{task}{trial}"
            if not (self.once and mark.exists()):
                mark.touch()
                getattr(self, name)()

    def killed(self):
        print("about to die")
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def segfault(self):
        os.kill(os.getpid(), signal.SIGSEGV)

    def stopped(self):
        os.kill(os.getpid(), signal.SIGSTOP)

    def slow(self):
        time.sleep(0.2)

    def hang(self):
        (self.folder / "pid").write_text(str(os.getpid()))
        time.sleep(600)

    def bug(self):
        raise KeyError("the bug")

    def refusal(self):
        raise UserError("The counter is full: empty it.")

    def lost_file(self):
        open(self.folder / "not there")

    def modules(self):
        names = sorted({"jax", "flax", "jaxvp.policy.runner", "pytest"} & set(sys.modules))
        (self.folder / "modules").write_text(" ".join(names) + ".")


class Chunks:
    """Gives `size` actions of 1, and notes what it is told, and what was seen when it acts."""

    cameras = ("agentview",)
    latencies = {"preprocess": (), "act": ()}

    def __init__(self, size, initial=None):
        self.size, self.initial, self.seen, self.told, self.now = size, initial, [], [], {}

    def reset(self, slot, task, trial):
        self.told.append((slot, "reset"))
        return self.initial

    def looks(self, slot, count):
        return [count - 1]

    def observe(self, slot, observation, action):
        self.now[slot] = float(observation["state"][0])
        self.told.append((slot, self.now[slot], None if action is None else float(action[0])))

    def act(self, slots, imagine=()):
        self.seen.append({slot: self.now[slot] for slot in slots})
        return {slot: np.ones((self.size, 1), np.float32) for slot in slots}

    def imagined(self, slot, steps):
        return None


class Stateful:
    """Its actions depend on the trial, on its calls so far, and on every image that it saw."""

    cameras = ("agentview",)
    latencies = {"preprocess": (), "act": ()}

    def __init__(self):
        self.episodes = {}

    def reset(self, slot, task, trial):
        self.episodes[slot] = {"state": float(len(task) + trial), "calls": 0, "shown": None}

    def looks(self, slot, count):
        return [k for k in range(count) if k % 2 == 0 or k == count - 1]

    def observe(self, slot, observation, action):
        episode = self.episodes[slot]
        episode["seen"] = observation["images"]
        if isinstance(observation["images"], dict):
            episode["shown"] = observation["images"]["agentview"]
            episode["state"] = episode["state"] * 1.1 + float(episode["shown"].mean())

    def act(self, slots, imagine=()):
        return {slot: self.one(self.episodes[slot]) for slot in slots}

    def one(self, episode):
        episode["calls"] += 1
        values = np.sin(episode["state"] + np.arange(1 + episode["calls"] % 3)) ** 2
        return values.astype(np.float32)[:, None]

    def imagined(self, slot, steps):
        return None
