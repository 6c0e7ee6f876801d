"""Training jobs: a queue of folders, a worker process for each GPU, and a supervisor.

`store.JobStore` is the interface for programs: submit, list, wait, pause, resume, cancel, clone,
delete. `supervisor.Supervisor` starts the workers of a store and notices when one dies.

A job is a folder; whoever changes its state holds the lock file in it, which the system takes back
when a process dies. So a killed process never leaves a job in an inconsistent state:

    config.json       what was asked for (`job.JobSettings`); never changed
    state.json        its progress (`job.JobState`); written by the holder of `lock`
    request.json      what a user wants a running job to do (`job.Request`)
    lock              held by the worker for as long as it lives, by others for a moment
    log.txt           everything the worker printed
    metrics.jsonl, checkpoints/, adapters/, NAME.safetensors     of `lora_core.training`
    samples/          images and latents made during training

A worker is a process in its own session: it goes on when the server that started it ends, and the
next server finds it by the lock that it holds. A job with several devices has a process for each,
coordinated by `team`; only rank 0 is its worker.
"""
