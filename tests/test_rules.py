import jax.numpy as jnp
import optax
import pytest

from jaxvp import rules

TREE = {"video": {"kernel": jnp.ones(2), "bias": jnp.ones(1)}, "action": {"kernel": jnp.ones(3)}}


def test_names_follow_the_leaves():
    assert {name: len(leaf) for name, leaf in rules.named_leaves(TREE).items()} == {
        "action/kernel": 3, "video/bias": 1, "video/kernel": 2}
    moments = optax.scale_by_adam().init(TREE)
    assert "mu/video/kernel" in rules.named_leaves(moments)
    assert list(rules.named_leaves([jnp.ones(1)])) == ["0"]


def test_the_first_rule_that_matches_the_whole_name_counts():
    ordered = [("video/bias", 1), ("video/.*", 2), (".*bias|.*kernel", 3)]
    assert rules.match(TREE, ordered, 0, "r") == {
        "action/kernel": 3, "video/bias": 1, "video/kernel": 2}
    assert rules.match(TREE, [("video/.*", None)], 0, "r") == {
        "action/kernel": 0, "video/bias": None, "video/kernel": None}


@pytest.mark.parametrize("regex, message", [
    ("video", "config.r: 'video' matches no parameter.*video/bias.*whole name must match"),
    ("vidoe/.*", "matches no parameter"),
    ("video/(", r"config.r: 'video/\(' is not a regular expression"),
])
def test_a_rule_without_effect_is_an_error(regex, message):
    with pytest.raises(ValueError, match=message):
        rules.match(TREE, [(".*", 1), (regex, 2)], 0, "config.r")
