"""Demonstrations of scripted experts, for suites whose trials follow from their numbers."""

import numpy as np

from jaxvp.evaluation.protocol import Demonstration, Observation, SimEnv


class OfExpert:
    """What suites share whose trials follow from their numbers, and whose environments, which take
    little memory, have an expert."""

    has_expert, heavy = True, False

    def demonstrations(self, task: str, count: int) -> list[Demonstration]:
        """What the scripted expert does in the first `count` trials."""
        return of_expert(self.make(task), count, self.protocol.max_steps)


class ByNumber:
    """What their environments share."""

    def reset_to(self, initial: np.ndarray) -> Observation:
        """Starts the trial with the number `initial`: an episode follows from its seed."""
        return self.reset(int(initial))


def of_expert(env: SimEnv, count: int, max_steps: int) -> list[Demonstration]:
    """What the expert of `env`, which this closes, does in the first `count` trials, until success
    or for `max_steps`. `initial` is the number of the trial."""
    found = []
    for trial in range(count):
        env.reset(trial)
        actions, success = [], False
        while not success and len(actions) < max_steps:
            actions.append(env.expert_action())
            _, success = env.step(actions[-1])
        found.append(Demonstration(f"expert, trial {trial}", np.array(trial), np.stack(actions)))
    env.close()
    return found
