"""Names of the leaves of a tree, and ordered (regex, value) rules on them."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import jax

from jaxvp.errors import UserError


def named_leaves(tree) -> dict[str, Any]:
    """{"/"-joined path: leaf}, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def match(tree, rules: Sequence[tuple[str, Any]], default, what: str) -> dict[str, Any]:
    """{name of a leaf: value of the first rule whose regex matches the whole name}.

    Args:
      tree: names the leaves.
      rules: ordered (regex, value) pairs.
      default: of leaves that no rule matches.
      what: the rules' dotted key, for messages.

    Raises:
      UserError: a regex is invalid, or matches no leaf at all.
    """
    names = list(named_leaves(tree))
    patterns = []
    for regex, _ in rules:
        try:
            patterns.append(re.compile(regex))
        except re.error as error:
            raise UserError(f"{what}: {regex!r} is not a regular expression: {error}.") from error
        if not any(patterns[-1].fullmatch(name) for name in names):
            near = difflib.get_close_matches(regex, names, 3, 0) or names[:3]
            raise UserError(f"{what}: {regex!r} matches no parameter. Names look like "
                            f"{', '.join(near)} (the whole name must match).")
    return {name: next((value for pattern, (_, value) in zip(patterns, rules, strict=True)
                        if pattern.fullmatch(name)), default) for name in names}
