"""Servers and workers that are killed, for test_killed_jobs.py: `python killed_jobs.py FOLDER N`.

This process imports everything once and forks: servers, which supervise one store, and from them
workers, which run `worker.main` like a worker with its own interpreter. It kills a worker, a
server, or both, N times at random moments, and prints its results as one JSON line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


def import_by_path(name: str, path: Path, **options):
    spec = importlib.util.spec_from_file_location(name, path, **options)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


for name, package in (("qwen_edit_lora", ROOT), ("demo_base", ROOT / "tests" / "demo_base")):
    import_by_path(name, package / "__init__.py", submodule_search_locations=[str(package)])
import_by_path("tiny", HERE.with_name("training") / "tiny.py")
tiny_jobs = import_by_path("tiny_jobs", HERE / "tiny_jobs.py")

import torch  # noqa: E402
from qwen_edit_lora.lora_core.jobs import training_job, worker  # noqa: E402, F401
from qwen_edit_lora.lora_core.jobs.devices import Device  # noqa: E402
from qwen_edit_lora.lora_core.jobs.folder import JobFolder  # noqa: E402
from qwen_edit_lora.lora_core.jobs.identity import is_running  # noqa: E402
from qwen_edit_lora.lora_core.jobs.job import JobStatus, Phase  # noqa: E402
from qwen_edit_lora.lora_core.jobs.store import JobStore  # noqa: E402
from qwen_edit_lora.lora_core.jobs.supervisor import Supervisor  # noqa: E402
from qwen_edit_lora.lora_core.training.model.libraries import import_diffusers_alone  # noqa: E402

import_diffusers_alone()  # before the forks

CPU = Device("cpu", "test-cpu", "")
STEPS = 12
NUM_JOBS = 3
VICTIMS = ("worker", "server", "both")
TIMEOUT = 150.0  # seconds


class Fork:
    """The parts of Popen that `Supervisor` uses."""

    def __init__(self, pid: int):
        self.pid, self.code = pid, None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code


def fork_worker(root: Path, folder: JobFolder, devices: list[Device]) -> Fork:
    (device,) = devices
    child = os.fork()
    if child:
        return Fork(child)
    try:
        os.setsid()
        log = os.open(folder.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os._exit(worker.main([str(root), folder.id, device.key, device.name]))
    finally:
        os._exit(99)


def fork_server(root: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        Supervisor(JobStore(root), [CPU], launch=fork_worker).run()
    finally:
        os._exit(99)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def get_running(store: JobStore) -> list:
    return [job.state.worker for job in store.list() if is_running(job.state.worker)]


def kill_worker(store: JobStore) -> bool:
    for process in get_running(store):
        os.kill(process.pid, signal.SIGKILL)
        return True
    return False


def main(folder: Path, num_kills: int) -> None:
    servers: list[int] = []
    try:
        kill_repeatedly(folder, num_kills, servers)
    finally:
        for server in servers:
            kill(server)
        kill_worker(JobStore(folder / "root"))


def kill_repeatedly(folder: Path, num_kills: int, servers: list[int]) -> None:
    torch.set_num_threads(1)
    moments = random.Random(1)
    material = tiny_jobs.make_material(folder)
    loras = folder / "loras"
    loras.mkdir()
    (loras / "tiny.safetensors").write_bytes(b"of somebody else")
    store = JobStore(folder / "root")
    train = tiny_jobs.make_train(
        material, **{"steps": STEPS, "data.batch_size": 2, "optimizer.accumulation": 2}
    )
    settings = {"loras": str(loras), "max_restarts": 10**6, "samples": {"every": 5, "steps": 2}}
    started = time.monotonic()
    servers.append(fork_server(store.root))
    whole = store.submit(train, **settings)
    assert store.wait(whole, timeout_s=60).status is JobStatus.COMPLETED, store.get(whole)
    duration_s = time.monotonic() - started
    jobs = [store.submit(train, **settings) for _ in range(NUM_JOBS)]
    outcome: dict = {"killed": dict.fromkeys(VICTIMS, 0), "phases": {}, "most_at_once": 0}
    deadline = time.monotonic() + TIMEOUT
    for turn in range(num_kills):
        victim = VICTIMS[turn % len(VICTIMS)]
        end = time.monotonic() + moments.uniform(0.05, duration_s / 2)
        while time.monotonic() < end:
            outcome["most_at_once"] = max(outcome["most_at_once"], len(get_running(store)))
            time.sleep(0.01)
        if all(store.get(job).status.is_finished for job in jobs):
            jobs.append(store.submit(train, **settings))  # something to kill
        if victim != "server":
            while not (running := get_running(store)):
                assert time.monotonic() < deadline, [job.state for job in store.list()]
                time.sleep(0.01)
            phase = next(j.state.phase for j in store.list() if j.state.worker == running[0])
            name = phase.value if isinstance(phase, Phase) else "ended"
            outcome["phases"][name] = outcome["phases"].get(name, 0) + 1
            if not kill_worker(store):
                continue
        if victim != "worker":
            kill(servers.pop())
            servers.append(fork_server(store.root))
        outcome["killed"][victim] += 1
    for job in jobs:
        store.wait(job, timeout_s=max(1.0, deadline - time.monotonic()))
    time.sleep(1.0)
    kill(servers.pop())
    ended = [store.get(job) for job in (whole, *jobs)]
    outcome["statuses"] = [job.status for job in ended]
    outcome["states"] = [str(job.state.failure) for job in ended if job.state.failure]
    outcome["jobs"] = [job.id for job in ended]
    outcome["published"] = [job.state.published for job in ended]
    outcome["running"] = len(get_running(store))
    outcome["starts"] = [store.read_log(job.id)["text"].count("takes job") for job in ended]
    sys.stdout.write(json.dumps(outcome) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
