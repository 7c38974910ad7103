"""Fast-WAM (arXiv 2603.16666): a world-action model that does not imagine when it acts.

Video is a training signal alone. The action head looks at the video transformer's features of the
observed frames, clean, at timestep 0, with nothing after them: a chunk of actions costs one pass
over so few tokens. Stage `joint` trains everything by the video loss and the action loss at once;
each loss has clips of its own, because those of the action loss are cheap. Stage `policy` trains
everything by the action loss alone, the paper's ablation without video. The paper's second
stream of the same depth, which attends to the keys and values of the first frame, becomes Video
Policy's action head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxvp.config import PositiveInt
from jaxvp.data.spec import observe
from jaxvp.methods.base import split_keys
from jaxvp.methods.vpp import VPP


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FastWAM(VPP):
    """The method; see the module's docstring.

    Attributes:
      video_every: in training of `joint`, one clip of so many has the video loss, the others have
        the action loss; 1: every clip has both.
    """

    video_every: PositiveInt = 1

    @property
    def stages(self):
        stages = super().stages
        joint = dataclasses.replace(stages["joint"], future_every=self.video_every)
        policy = dataclasses.replace(stages["joint"], window=stages["action"].window)
        return stages | {"joint": joint, "policy": policy}

    def loss(self, params, clip, keys, stage, train):
        if stage == "policy":
            loss = self.chunk_loss(params, clip, keys, train, reach=True)
            return loss, {"action_loss": loss}, {}
        if stage != "joint" or not train or self.video_every == 1:
            return super().loss(params, clip, keys, stage, train)

        def rows(which, keys):  # Of each run of `video_every`: a device has clips of both kinds.
            return jax.tree.map(lambda x: x.reshape(-1, self.video_every, *x.shape[1:])[:, which]
                                .reshape(-1, *x.shape[1:]), (clip, keys))

        video_keys, action_keys = split_keys(keys, 2)
        metrics = {"video_loss": self.video_loss(params, *rows(slice(1), video_keys), train),
                   "action_loss": self.chunk_loss(
                       params, *rows(slice(1, None), action_keys), train, reach=True)}
        return sum(metrics.values()), metrics, {}

    def features(self, params, clip, keys):
        """[B, N, D] of each tap, of the observed frames of a clip."""
        model = self.video_model
        seen = model.seen(params, observe(clip, self.spec.window))
        return model.denoise(params, seen, seen, jnp.zeros(len(seen)),
                             model.embed(params, clip["text"]), self.taps, velocity=False)[1]

    @property
    def feature_grid(self):
        model = self.video_model
        return model.network.tokens(model.observed, *model.latent_shape[1:3])
