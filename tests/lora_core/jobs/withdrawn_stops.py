"""Run by `test_withdrawn_stops` in two processes: a job for each moment when a pause can come.

    torch.distributed.run --nproc-per-node 2 withdrawn_stops.py STORE MATERIAL

Rank 0 sees a pause at the n-th time that it looks, and it is withdrawn just after. Each job has to
end as one that nobody disturbed: the same weights, samples and metrics.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]
for name, path in (
    ("qwen_edit_lora", ROOT / "__init__.py"),
    ("demo_base", ROOT / "tests" / "demo_base" / "__init__.py"),
    ("tiny", FOLDER.with_name("training") / "tiny.py"),
    ("tiny_jobs", FOLDER / "tiny_jobs.py"),
):
    found = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=found)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

from qwen_edit_lora.lora_core.jobs.job_reporter import NullReporter  # noqa: E402
from qwen_edit_lora.lora_core.jobs.store import JobStore  # noqa: E402
from qwen_edit_lora.lora_core.jobs.team import join_process_group  # noqa: E402
from qwen_edit_lora.lora_core.jobs.training_job import run_job  # noqa: E402
from qwen_edit_lora.lora_core.training.model.libraries import (  # noqa: E402
    import_diffusers_alone,
)
from tiny_jobs import Fickle, make_train  # noqa: E402

STEPS = 4
SAMPLES = {"every": 2, "steps": 2}


def main(root: str, material: str) -> None:
    group = join_process_group(on_cpu=True)
    store = JobStore(root)
    outcomes: dict[str, dict] = {}
    at, number = None, 0
    while at is None or at < number:
        train = make_train(Path(material), steps=STEPS)
        settings = {"samples": SAMPLES, "num_devices": 2}
        job_id = group.agree(store.submit(train, **settings) if group.is_main else None)
        folder = store.catalog.find(job_id)
        reporter = Fickle(folder, at) if group.is_main else NullReporter(folder)
        is_done = run_job(
            *(folder.read_settings(), folder, ["cpu", "cpu"], reporter, group.accelerator)
        )
        group.accelerator.wait_for_everyone()
        if group.is_main:
            outcomes[job_id] = {"at": at, "is_done": is_done, "looks": reporter.count}
        number = group.agree(reporter.count if at is None and group.is_main else number)
        at = 0 if at is None else at + 1
    if group.is_main:
        Path(root, "outcomes.json").write_text(json.dumps(outcomes))
    group.accelerator.end_training()


if __name__ == "__main__":
    import_diffusers_alone()
    main(*sys.argv[1:])
