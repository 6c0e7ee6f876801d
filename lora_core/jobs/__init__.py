"""Training jobs: a queue of folders, a worker process for each GPU, and who watches over them.

`store.JobStore` is what a program talks to: submit, list, wait, pause, resume, cancel, clone,
delete. `supervisor.Supervisor` starts the workers of a store and notices when one dies.

A job is a folder; whoever changes its state holds the lock file in it, which the system takes back
when a process dies. So there is no moment at which a killed process leaves a job in two minds:

    config.json       what was asked for (`job.JobSettings`); never changed
    state.json        how far it is (`job.JobState`); written by the holder of `lock`
    request.json      what a user wants a running job to do (`job.Request`)
    lock              held by the worker for as long as it lives, by others for a moment
    log.txt           everything the worker said
    metrics.jsonl, checkpoints/, adapters/, NAME.safetensors     of `lora_core.training`
    samples/          pictures and latents on the way

A worker is a process of its own session: it goes on when the server that started it ends, and the
next server finds it by the lock that it holds. A job with several devices has a process for each,
which `team` holds together; only the first of them is its worker.
"""
