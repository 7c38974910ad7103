"""What is installed: what setup.cfg promises, and what importing a command costs."""

import ast
import configparser
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import setuptools
import toy_bundle

ROOT = Path(__file__).parent.parent
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
TRAINING = {"flax", "optax", "grain", "tensorflow_datasets", "ml_collections", "tensorboardX",
            "cv2", "simplejpeg"}
HEAVY = {"torch", "tensorflow", "matplotlib", "mujoco", "robosuite", "pandas", "moviepy"}


def imported_by(module):
    """Top-level packages that are loaded after `import module` in a new interpreter."""
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, text=True,
                         capture_output=True)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_training_imports_nothing_that_it_does_not_need():
    assert not imported_by("jaxvp.main") & HEAVY


@pytest.mark.parametrize("module", ["jaxvp.evaluate", "jaxvp.imagine", "jaxvp.policy.runner",
                                    "jaxvp.serve"])
def test_what_runs_bundles_imports_no_training_code(module):
    assert not imported_by(module) & (HEAVY | TRAINING)


@pytest.mark.parametrize("command", [
    ["jaxvp.evaluate", "--tasks=0", "--trials=1", "--videos=1", "--workers=1", "--out=out"],
    ["jaxvp.imagine", "--image=head.png", "--text=lift the tray", "--out=video.mp4"],
], ids=lambda command: command[0])
def test_a_bundle_runs_without_the_packages_of_training(tmp_path, command):
    """In processes, and processes of theirs, that cannot import them."""
    toy_bundle.write(tmp_path / "bundle")
    PIL.Image.new("RGB", (32, 32), (90, 60, 30)).save(tmp_path / "head.png")
    (tmp_path / "sitecustomize.py").write_text(  # Every interpreter runs it when it starts.
        "import sys\n\n\nclass Absent:\n    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {TRAINING}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n\n\n"
        "sys.meta_path.insert(0, Absent())\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}

    def python(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, text=True,
                              capture_output=True, env=environment)

    assert "No module named 'flax'" in python("-c", "import flax").stderr
    module, *flags = command
    done = python("-m", module, "--bundle=bundle", *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "video.mp4").exists() or (tmp_path / "out" / "results.json").exists()


def test_the_entry_points_exist():
    scripts = SETUP["options.entry_points"]["console_scripts"].split("\n")
    targets = dict(re.split(r"\s*=\s*", line) for line in scripts if line)
    assert targets.keys() == {
        "jaxvp-train", "jaxvp-export", "jaxvp-evaluate", "jaxvp-serve", "jaxvp-plan"}
    for target in targets.values():
        module, name = target.split(":")  # Not imported: two commands define flags of one name.
        tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in functions, target


def test_every_requirement_is_met_here():
    packaging = pytest.importorskip("packaging.requirements")
    lines = SETUP["options"]["install_requires"].split("\n")
    for line in filter(None, lines):
        requirement = packaging.Requirement(line)
        assert requirement.specifier, f"{line} has no lower bound"
        assert requirement.specifier.contains(importlib.metadata.version(requirement.name)), line


def test_the_packages_that_are_installed():
    include = SETUP["options.packages.find"]["include"].split()
    found = {name.split(".")[0] for name in setuptools.find_namespace_packages(ROOT, (), include)}
    assert found == {"jaxvp", "data_builders", "configs"}


def test_tools_are_set_up_in_one_place():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r"^\[.*\]$", text, re.MULTILINE) == ["[build-system]"]
    assert "--select" in SETUP["tool:ruff"]["options"]


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda p: p.name)
def test_scripts_parse_and_explain_themselves(script):
    assert script.stat().st_mode & 0o111, "not executable"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    lines = script.read_text().splitlines()
    assert lines[1].startswith("# ") and any(line == "set -euo pipefail" for line in lines)


def test_no_module_is_too_long_to_read():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines())
               for path in ROOT.glob("jaxvp/**/*.py")}
    assert not {path: length for path, length in lengths.items() if length > 500}


@pytest.mark.parametrize(("extra", "renderer", "packages"), [
    ("libero", "osmesa", "libosmesa6 libgl1 libglib2.0-0"),
    ("libero", "egl", "libgl1 libglib2.0-0"),
    ("dev,metaworld", "osmesa", "libosmesa6")])
def test_the_installation_names_system_libraries_that_are_missing(tmp_path, extra, renderer,
                                                                  packages):
    commands = {"launch/install.sh": (ROOT / "launch" / "install.sh").read_text(),
                ".venv/bin/python": "", "bin/ldconfig": "#!/bin/sh\n",
                "bin/id": "#!/bin/sh\necho 1000\n"}
    for name, text in commands.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "MUJOCO_GL": renderer,
                   "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run([tmp_path / "launch" / "install.sh", extra], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.endswith(f"run: sudo apt-get install {packages}\n")
    assert len(done.stderr.splitlines()) == 1
