"""Suites by name: what is registered is there, and is imported when it is made, not before."""

import ast
import dataclasses
import importlib
import inspect
import sys
from pathlib import Path

import pytest

import jaxvp
from jaxvp.config import ConfigError
from jaxvp.errors import UserError
from jaxvp.evaluation import suites


@pytest.mark.parametrize("entry", suites.REGISTRY, ids=lambda entry: entry.module)
def test_what_is_registered_is_there(entry):
    module = importlib.import_module(f"jaxvp.evaluation.suites.{entry.module}")
    suite = getattr(module, entry.suite)
    assert {"name", *entry.flags} <= set(inspect.signature(suite).parameters)
    assert isinstance(suite.has_expert, bool) and isinstance(suite.heavy, bool)
    names = sys.modules[f"jaxvp.envs.{entry.module}"] if entry.module == "libero" else module
    assert tuple(names.SUITES) == entry.names


def test_every_module_is_registered():
    folder = Path(suites.__file__).parent
    assert {path.stem for path in folder.glob("[a-z]*.py")} == {e.module for e in suites.REGISTRY}


def test_nothing_else_knows_a_suite():
    """evaluate.py, and what it shares with all suites, imports none of them and no simulator."""
    root = Path(jaxvp.__file__).parent
    for path in [root / "evaluate.py", *root.glob("evaluation/*.py"), Path(suites.__file__)]:
        tree = ast.parse(path.read_text())
        found = [f"{getattr(node, 'module', None)}.{alias.name}" for node in ast.walk(tree)
                 if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
        assert not [name for name in found if "jaxvp.envs" in name or "suites." in name], path


def test_options_of_the_data_reach_the_suite():
    assert suites.make("tabletop", {}, {"image_size": 16}).protocol.camera_size == (16, 16)
    with pytest.raises(ConfigError, match="protocol.rotation does not exist.*keys: image_size"):
        suites.make("tabletop", {}, {"rotation": "180"})
    with pytest.raises(ConfigError, match="protocol.name does not exist"):
        suites.make("tabletop", {}, {"name": "tabletop"})


def test_flags_are_not_options_of_a_bundle():
    with pytest.raises(ConfigError, match="protocol.libero_demos does not exist"):
        suites.make("libero_goal", {}, {"libero_demos": "somewhere"})


def test_a_simulator_that_is_not_installed(monkeypatch):
    entry = dataclasses.replace(suites.SUITES["tabletop"], names=("maze",), module="maze")
    monkeypatch.setitem(suites.SUITES, "maze", entry)

    def missing(name):
        raise ModuleNotFoundError(f"No module named {absent!r}", name=absent)

    monkeypatch.setattr(suites.importlib, "import_module", missing)
    absent = "labyrinth"
    with pytest.raises(UserError, match=r"--suite=maze needs labyrinth.*pip install 'jaxvp\[maze"):
        suites.make("maze", {}, {})
    absent = "jaxvp.evaluation.suites.maze"  # A bug, and no refusal.
    with pytest.raises(ModuleNotFoundError):
        suites.make("maze", {}, {})
