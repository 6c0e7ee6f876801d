"""Everything this extension asks of ComfyUI. Only this package imports comfy.* and folder_paths.

Written against ComfyUI 0.30. Other modules of `nodes` use it as a whole: `from . import host`.
"""

from __future__ import annotations

from .device import (
    COMPUTE_BYTES,
    COMPUTE_DEVICES,
    choose_compute_device,
    get_device_name,
    release_models,
)
from .encoding import (
    get_stock_encoder,
    list_weights,
    scale_area,
)
from .events import connect_events, send_event
from .files import (
    choose_output_path,
    find_diffusion_model,
    find_lora,
    find_lora_files,
    find_produced_image,
    find_training_base,
    find_vaes,
    get_cache_folder,
    get_jobs_folder,
    get_loras_folder,
    is_within_directory,
    list_dataset_roots,
    list_diffusion_models,
    list_loras,
    list_training_bases,
    map_gguf_files,
    name_below_output,
)
from .folding import adding_to_folded
from .graphs import (
    Link,
    RunningNode,
    block_output,
    build_graph,
    connect_queue,
    find_queued_readers,
    find_running_node,
    find_weight_readers,
    find_wired_outputs,
    get_links,
    has_model,
)
from .language import get_language, translate, use_page_language
from .merging import (
    MergedWeights,
    add_merge,
    build_patch,
)
from .models import (
    ModelPatcher,
    Placement,
    add_wrapper,
    describe_model,
    describe_storage,
    find_merge_reason,
    get_modules,
    get_options,
    get_placement,
    has_weight,
    measure_weight,
)
from .places import Place
from .progress import (
    build_progress,
    is_interrupted,
    raise_if_interrupted,
    run_interruptible,
    run_with_progress,
)
from .sampling import (
    add_block_recorder,
    decode_latents,
    list_samplers,
    list_schedulers,
    predict,
)
from .startup import get_cors_origin, get_listen_addresses
from .weights import (
    PackedWeights,
    prioritize,
    wrap_in_patcher,
)
