"""Training jobs in a real ComfyUI: routes, events, prompts beside them, and kills."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from demo_base.prompts import node
from demo_base.server import ComfyServer
from qwen_edit_lora.lora_core.jobs.job import JobStatus
from qwen_edit_lora.lora_core.jobs.publication import read_job_id
from qwen_edit_lora.lora_core.jobs.store import JobStore

CORE_TESTS = Path(__file__).resolve().parents[2] / "lora_core"
for name, path in (
    ("tiny", CORE_TESTS / "training" / "tiny.py"),
    ("tiny_jobs", CORE_TESTS / "jobs" / "tiny_jobs.py"),
):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

from tiny_jobs import count_steps, kill_workers, list_processes, make_train  # noqa: E402

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts processes in /proc"),
]

JOBS = "/qwen_edit_lora/jobs"
UNKNOWN = "20260131-120000-0123abcd"
MANY = 20000  # steps; a job this long ends only because it is stopped
TIMEOUT = 90.0  # seconds


class Host:
    """Our own ComfyUI, which can be killed, and its store."""

    def __init__(self, base: Path, comfyui: Path, user: Path, material: Path):
        self.base, self.comfyui, self.user, self.material = base, comfyui, user, material
        user.mkdir()
        self.root = user / "__qwen_edit_lora" / "training"
        self.start()
        self.store = JobStore(self.root)

    def start(self) -> None:
        extra = ("--user-directory", str(self.user))
        self.server = ComfyServer.start(self.base, sys.executable, self.comfyui, extra_args=extra)
        self.server.wait_ready()

    def kill(self) -> None:
        self.server.process.kill()
        self.server.process.wait()

    def submit(self, policy: str = "share", **changes: Any) -> str:
        """Submits like the Train node, through the store that the server supervises."""
        settings = {k: changes.pop(k) for k in ("samples", "loras") if k in changes}
        train = make_train(self.material, **changes)
        return self.store.submit(train, origin={"prompts": policy}, **settings)

    def get(self, path: str, **query: str) -> Any:
        return self.server.get(path, **query)

    def post(self, job_id: str, action: str, body: Any = None) -> Any:
        return self.server.post(f"{JOBS}/{job_id}/{action}", body)

    def refuse(self, call: Callable[[], Any]) -> tuple[int, str]:
        with pytest.raises(urllib.error.HTTPError) as refused:
            call()
        return refused.value.code, json.loads(refused.value.read())["error"]

    def wait_for(self, condition: Callable[[], Any], timeout: float = TIMEOUT) -> Any:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if found := condition():
                return found
            time.sleep(0.05)
        jobs = "\n".join(f"{job.id} {job.state}" for job in self.store.list())
        raise AssertionError(f"not within {timeout:.0f} s\n{jobs}\n{self.server.read_log_tail()}")

    def wait_for_steps(self, job_id: str, steps: int = 1) -> None:
        self.wait_for(lambda: count_steps(self.store, job_id) >= steps)


@pytest.fixture(scope="module")
def comfy(base_directory, demo_models, comfyui_path, tmp_path_factory) -> Iterator[Host]:
    from tiny_jobs import make_material

    folder = tmp_path_factory.mktemp("jobs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # tiny products spread over busy cores take minutes
        comfy = Host(base_directory, comfyui_path, folder / "user", make_material(folder))
        yield comfy
    comfy.server.stop()
    kill_workers(comfy.root)
    comfy.store.index.close()


@pytest.fixture(autouse=True)
def no_jobs(comfy: Host) -> Iterator[None]:
    """Each test begins and ends without jobs."""
    yield
    for job in comfy.store.list():
        if job.status in (JobStatus.IN_PROGRESS, JobStatus.PENDING, JobStatus.PAUSED):
            comfy.store.cancel(job.id)
        comfy.store.wait(job.id, timeout_s=TIMEOUT)
        comfy.wait_for(lambda: not list_processes(comfy.root))
        comfy.store.delete(job.id)


class Listener:
    """Collects the job events that a page would get."""

    def __init__(self, url: str):
        self.url, self.events = url, []
        self.ready, self.done = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.listen()))

    async def listen(self) -> None:
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(f"{self.url}/ws?clientId=jobs") as socket:
                self.ready.set()
                while not self.done.is_set():
                    try:
                        message = await socket.receive(timeout=0.1)
                    except asyncio.TimeoutError:
                        continue
                    if message.type is aiohttp.WSMsgType.TEXT:
                        event = json.loads(message.data)
                        if event["type"] == "qwen_edit_lora.job":
                            self.events.append(event["data"])

    def __enter__(self) -> Listener:
        self.thread.start()
        assert self.ready.wait(10)
        return self

    def __exit__(self, *exception: object) -> None:
        self.done.set()
        self.thread.join()


def sampler_graph(seed: int) -> dict[str, Any]:
    """A prompt of core nodes that has work to do and is never cached."""

    return {
        "empty": node("EmptyImage", width=64, height=64, batch_size=1, color=seed),
        "shown": node("PreviewImage", images=["empty", 0]),
    }


def model_graph(seed: int) -> dict[str, Any]:
    """A prompt that loads a MODEL and runs nothing on it."""

    name = "qwen_image_edit_2511_bf16.safetensors"
    loaded = node("UNETLoader", unet_name=name, weight_dtype="default")
    return {**sampler_graph(seed), "unet": loaded, "text": node("PreviewAny", source=["unet", 0])}


def test_a_job_trains_while_prompts_run_and_its_adapter_is_listed_without_a_restart(
    comfy, demo_models
):
    loras = demo_models.root / "loras"
    with Listener(comfy.server.url) as listener:
        assert comfy.get(JOBS)["jobs"] == []
        job_id = comfy.submit(
            "warn", loras=str(loras), steps=200, name="of_a_job", samples={"every": 100, "steps": 2}
        )
        (listed,) = comfy.get(JOBS)["jobs"]
        assert (listed["id"], listed["status"]) == (job_id, "pending")
        comfy.wait_for_steps(job_id)
        comfy.wait_for(lambda: any(e.get("status") == "in_progress" for e in listener.events))
        for seed in range(3):
            comfy.server.run_prompt(sampler_graph(seed))
        assert not [event for event in listener.events if "warning" in event]  # no model of theirs
        for seed in range(2):
            comfy.server.run_prompt(model_graph(seed))
        comfy.wait_for(lambda: comfy.get(f"{JOBS}/{job_id}")["status"] == "completed")
        comfy.wait_for(lambda: any(e.get("status") == "completed" for e in listener.events))
    shown = comfy.get(f"{JOBS}/{job_id}")
    assert (shown["step"], shown["num_steps"]) == (200, 200)
    assert shown["published"] == ["of_a_job.safetensors", "of_a_job_ema.safetensors"]
    assert "of_a_job.safetensors" in comfy.get("/models/loras")
    assert read_job_id(loras / "of_a_job.safetensors") == job_id
    assert shown["metrics"]["step"] == list(range(1, 201))
    assert len(shown["metrics"]["loss"]) == 200
    samples = [f"step_{step:08d}_item_0.safetensors" for step in (0, 100, 200)]
    assert shown["samples"] == samples
    assert shown["files"][-1] == "of_a_job_ema.safetensors"
    assert str(comfy.user) not in json.dumps(shown)

    warnings = [event["warning"] for event in listener.events if "warning" in event]
    assert len(warnings) == 1
    assert warnings[0].startswith("the training of_a_job uses cpu too")
    events = [event for event in listener.events if event.get("id") == job_id]
    statuses = [event["status"] for event in events]
    assert list(dict.fromkeys(statuses)) == ["pending", "in_progress", "completed"]
    steps = [event["step"] for event in events]
    assert steps == sorted(steps)
    assert 3 <= len(steps) < 100  # throttled
    assert str(comfy.user) not in json.dumps(listener.events)
    for path in loras.glob("of_a_job*"):
        path.unlink()

    # the log: from its end, and on from there
    path, log = f"{JOBS}/{job_id}/log", comfy.store.read_log(job_id)
    assert comfy.get(path) == log
    assert log["text"].splitlines()[0].endswith(f"takes job {job_id} on cpu")
    line = log["text"].splitlines(keepends=True)[0]
    first = comfy.get(path, offset="0", limit="10")
    assert (first["text"], first["next_offset"]) == (line, len(line))
    assert comfy.get(path, offset=str(len(line)))["text"] == log["text"][len(line) :]
    assert comfy.get(path, limit="10")["text"] == log["text"][-10:]
    code, sentence = comfy.refuse(lambda: comfy.get(path, offset="-1"))
    assert (code, sentence) == (400, "offset is '-1'; expected a whole number from 0")


def edit_graph(seed: int) -> dict[str, Any]:
    """A whole edit on the demo base: encoded, sampled, decoded."""

    sampling = {"steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    return {
        "unet": node(
            "UNETLoader", unet_name="qwen_image_edit_2511_bf16.safetensors", weight_dtype="default"
        ),
        "clip": node(
            "CLIPLoader",
            clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors",
            type="qwen_image",
            device="default",
        ),
        "vae": node("VAELoader", vae_name="qwen_image_vae.safetensors"),
        "text": node("TextEncodeQwenImageEdit", clip=["clip", 0], prompt="an edit"),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "sampled": node(
            "KSampler",
            model=["unet", 0],
            positive=["text", 0],
            negative=["text", 0],
            latent_image=["latent", 0],
            seed=seed,
            denoise=1.0,
            **sampling,
        ),
        "decoded": node("VAEDecode", samples=["sampled", 0], vae=["vae", 0]),
        "shown": node("PreviewImage", images=["decoded", 0]),
    }


def test_20_edits_run_to_success_while_a_job_trains(comfy):
    job_id = comfy.submit(steps=MANY)
    comfy.wait_for_steps(job_id)
    before = count_steps(comfy.store, job_id)
    prompts = [comfy.server.queue_prompt(edit_graph(seed)) for seed in range(20)]
    pictures = [comfy.server.images(comfy.server.wait_for_prompt(prompt)) for prompt in prompts]
    assert all(len(images) == 1 and images[0].startswith(b"\x89PNG") for images in pictures)
    assert len({images[0] for images in pictures}) == 20  # each sampled, none taken from a cache
    assert comfy.store.get(job_id).status is JobStatus.IN_PROGRESS
    assert count_steps(comfy.store, job_id) > before


def test_pause_resume_cancel_and_delete(comfy):
    job_id = comfy.submit(steps=MANY)
    comfy.wait_for_steps(job_id)
    code, sentence = comfy.refuse(lambda: comfy.post(job_id, "delete"))
    assert (code, sentence) == (409, f"job {job_id} is running; pause or cancel it first")
    code, sentence = comfy.refuse(lambda: comfy.post(job_id, "resume"))
    assert (code, sentence) == (409, f"job {job_id} is running and cannot be resumed")

    assert comfy.post(job_id, "pause")["request"] == "pause"
    paused = comfy.wait_for(
        lambda: (j := comfy.get(f"{JOBS}/{job_id}"))["status"] == "paused" and j
    )
    assert paused["checkpoint_step"] == paused["step"] > 0
    comfy.wait_for(lambda: not list_processes(comfy.root))
    assert comfy.post(job_id, "resume")["status"] == "pending"
    comfy.wait_for_steps(job_id, paused["step"] + 1)
    comfy.post(job_id, "cancel")
    cancelled = comfy.wait_for(
        lambda: (j := comfy.get(f"{JOBS}/{job_id}"))["status"] == "cancelled" and j
    )
    assert len(cancelled["adapters"]) == 2
    comfy.wait_for(lambda: not list_processes(comfy.root))
    assert comfy.post(job_id, "delete") == {"id": job_id, "deleted": True}
    assert comfy.refuse(lambda: comfy.get(f"{JOBS}/{job_id}"))[0] == 404
    assert comfy.get(JOBS)["jobs"] == []


def test_unknown_jobs_and_bad_requests_are_one_sentence_errors(comfy):
    expected = f"there is no job {UNKNOWN}; it may have been deleted"
    for path in (f"{JOBS}/{UNKNOWN}", f"{JOBS}/{UNKNOWN}/log"):
        assert comfy.refuse(lambda path=path: comfy.get(path)) == (404, expected)
    for action in ("pause", "resume", "cancel", "delete"):
        assert comfy.refuse(lambda action=action: comfy.post(UNKNOWN, action)) == (404, expected)
        for bad in ("x", "%2e%2e", "..%2F..%2Fuser", "%00", UNKNOWN.upper()):
            code, sentence = comfy.refuse(lambda action=action, bad=bad: comfy.post(bad, action))
            assert code == 400
            assert "is not a job id; expected one such as" in sentence
    code, sentence = comfy.refuse(lambda: comfy.post(UNKNOWN, "delete", {"with_adapter": "yes"}))
    assert (code, sentence) == (400, "with_adapter is 'yes'; expected true or false")
    assert comfy.refuse(lambda: comfy.post(UNKNOWN, "delete", [1]))[0] == 400

    def post_form() -> None:
        request = urllib.request.Request(f"{comfy.server.url}{JOBS}/{UNKNOWN}/delete", b"a=b")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)

    code, sentence = comfy.refuse(post_form)
    assert code == 400
    assert "application/json" in sentence


class Answer:
    """The response to a raw request, including headers."""

    def __init__(self, comfy: Host, method: str, path: str, body: bytes = b"", **headers: str):
        connection = http.client.HTTPConnection("127.0.0.1", comfy.server.port, timeout=30)
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        with contextlib.suppress(OSError):  # the server need not read a refused body
            connection.send(body)
        response = connection.getresponse()
        self.status, self.text = response.status, response.read().decode()
        connection.close()

    @property
    def sentence(self) -> str:
        return json.loads(self.text)["error"]


JSON = {"Content_Type": "application/json"}


def test_wrong_methods_large_bodies_and_paths_are_refused_and_the_server_lives(comfy):
    job_id = comfy.submit(steps=MANY)
    comfy.store.pause(job_id)
    for action in ("pause", "delete", "clone"):
        # 404: what no route takes, ComfyUI looks for among its page's files
        assert Answer(comfy, "GET", f"{JOBS}/{job_id}/{action}").status in (404, 405)
        assert Answer(comfy, "PUT", f"{JOBS}/{job_id}/{action}").status == 405
    assert Answer(comfy, "POST", f"{JOBS}/{job_id}", b"{}", **JSON).status == 405
    large = json.dumps({"x": "y" * 10_000_000}).encode()
    answer = Answer(comfy, "POST", f"{JOBS}/{job_id}/resume", large, **JSON)
    assert (answer.status, answer.sentence[:25]) == (413, "the body is too large; ex")
    chunked = b"186a0\r\n" + b"x" * 100_000 + b"\r\n0\r\n\r\n"  # without a Content-Length
    answer = Answer(
        *(comfy, "POST", f"{JOBS}/{job_id}/resume", chunked),
        **{**JSON, "Transfer_Encoding": "chunked", "Content_Length": "0"},
    )
    assert answer.status in (400, 413)
    answer = Answer(comfy, "POST", f"{JOBS}/{job_id}/resume", b"[" * 60_000, **JSON)
    assert answer.status == 400
    # a job's settings hold paths; a request's must not reach the disk
    for name in ("model.source", "model", "data.folder", "loras", "output", "samples.vae", "train"):
        body = json.dumps({"changes": {name: "/etc/passwd"}}).encode()
        answer = Answer(comfy, "POST", f"{JOBS}/{job_id}/clone", body, **JSON)
        assert (answer.status, "cannot be changed here" in answer.sentence) == (400, True)
    for name in ("..%2Fconfig.json", "%2Fetc%2Fpasswd", "config.json", "..", "%00", "x" * 3000):
        answer = Answer(comfy, "GET", f"{JOBS}/{job_id}/pictures/{name}")
        assert answer.status in (400, 404)
        assert "root:" not in answer.text
    for adapter in ("../config.json", "/etc/passwd", "nothing.safetensors"):
        body = json.dumps({"adapter": adapter}).encode()
        answer = Answer(comfy, "POST", f"{JOBS}/{job_id}/publish", body, **JSON)
        assert answer.status == 400
    assert len(comfy.store.list()) == 1
    assert comfy.store.get(job_id).status is JobStatus.PAUSED


def test_a_clone_is_a_new_job_with_the_changes_and_shows_no_paths(comfy, demo_models):
    loras = str(demo_models.root / "loras")
    job_id = comfy.submit(steps=MANY, loras=loras)
    comfy.store.pause(job_id)
    changes = {"steps": 7, "lora.rank": 2, "optimizer.learning_rate": 3e-4, "name": "again"}
    made = comfy.post(job_id, "clone", {"changes": changes})
    comfy.store.pause(made["id"])
    shown = comfy.get(f"{JOBS}/{made['id']}")
    assert {name: shown["settings"][name] for name in changes} == changes
    theirs = comfy.get(f"{JOBS}/{job_id}")["settings"]
    same = theirs.keys() - changes.keys()
    assert {n: theirs[n] for n in same} == {n: shown["settings"][n] for n in same}
    assert str(comfy.material) not in json.dumps(shown)
    assert shown["settings"]["data.folder"] == "data"
    code, sentence = comfy.refuse(
        lambda: comfy.post(job_id, "clone", {"changes": {"lora.rank": 0}})
    )
    assert (code, "rank is 0; expected a whole number from 1" in sentence) == (400, True)
    assert comfy.refuse(lambda: comfy.post(job_id, "clone", {"changes": 3}))[0] == 400
    assert len(comfy.store.list()) == 2


def test_a_slow_response_blocks_no_other(comfy):
    job_id = comfy.submit(steps=MANY)
    comfy.store.pause(job_id)
    lock = comfy.store.catalog.find(job_id).lock
    # held and never released: the route waits some seconds for it
    comfy.wait_for(lock.try_acquire)
    answers: list[Any] = []

    def ask() -> None:
        answers.append(comfy.refuse(lambda: comfy.post(job_id, "delete")))

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.3)
    started = time.monotonic()
    comfy.get("/system_stats")
    assert time.monotonic() - started < 2
    assert answers == []
    thread.join()
    lock.release()
    assert answers[0][0] == 409


def list_queue(comfy: Host) -> tuple[list[str], list[str]]:
    """Class of the first node of each prompt: running, waiting."""
    queue = comfy.get("/queue")
    return tuple(
        [next(iter(item[2].values()))["class_type"] for item in queue[f"queue_{state}"]]
        for state in ("running", "pending")
    )


def test_prompts_wait_for_a_job_with_that_policy_until_it_ends_or_the_user_interrupts(comfy):
    job_id = comfy.submit("pause prompts", steps=MANY)
    comfy.wait_for_steps(job_id)
    first = comfy.server.queue_prompt(sampler_graph(60))
    time.sleep(1)
    assert list_queue(comfy) == (["QwenEditLoraHold"], ["EmptyImage"])
    comfy.post(job_id, "pause")  # releases the device, so prompts continue
    comfy.server.wait_for_prompt(first)
    assert comfy.store.get(job_id).status is JobStatus.PAUSED

    comfy.post(job_id, "resume")
    comfy.wait_for(lambda: list_queue(comfy)[0] == ["QwenEditLoraHold"])
    second = comfy.server.queue_prompt(sampler_graph(61))
    comfy.wait_for(lambda: comfy.store.get(job_id).status is JobStatus.IN_PROGRESS)
    comfy.server.post("/interrupt")
    comfy.server.wait_for_prompt(second)
    time.sleep(1.5)
    assert list_queue(comfy) == ([], [])  # no new hold is queued
    assert comfy.store.get(job_id).status is JobStatus.IN_PROGRESS


def test_a_restarted_comfyui_finds_running_and_killed_jobs_again(comfy):
    job_id = comfy.submit("pause prompts", steps=MANY)
    waiting = comfy.submit(steps=3)
    comfy.wait_for_steps(job_id)
    (worker,) = list_processes(comfy.root)
    comfy.kill()
    at = count_steps(comfy.store, job_id)
    comfy.start()
    assert list_processes(comfy.root) == [worker]
    assert count_steps(comfy.store, job_id) > at
    found = comfy.get(f"{JOBS}/{job_id}")
    assert (found["status"], found["restarts"]) == ("in_progress", 0)
    comfy.wait_for(lambda: list_queue(comfy)[0] == ["QwenEditLoraHold"])  # the policy persists

    # both at once
    os.kill(worker, signal.SIGKILL)
    comfy.kill()
    comfy.start()
    comfy.wait_for(lambda: "resumed after step" in comfy.store.read_log(job_id)["text"])
    comfy.wait_for(lambda: comfy.get(f"{JOBS}/{job_id}")["status"] == "in_progress")
    assert "it continues after step" in comfy.get(f"{JOBS}/{job_id}")["notes"][-2]
    comfy.post(job_id, "cancel")
    comfy.wait_for(lambda: comfy.get(f"{JOBS}/{waiting}")["status"] == "completed")
