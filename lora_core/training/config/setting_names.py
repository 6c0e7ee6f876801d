"""Suggestions for unknown setting names: other trainers' names, then the nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from ...messages import message

#: Other trainers' names -> ours, by their dotted places. Of kohya's sd-scripts and musubi-tuner
#: (options of their command lines and configs), diffusers' training scripts, ai-toolkit's configs
#: and SimpleTuner's.
OTHER_NAMES = {
    **dict.fromkeys(("network_dim", "network_rank", "lora_rank", "lora_dim", "dim"), "lora.rank"),
    **dict.fromkeys(("r", "linear"), "lora.rank"),
    **dict.fromkeys(("network_alpha", "lora_alpha", "linear_alpha"), "lora.alpha"),
    **dict.fromkeys(("network_dropout", "lora_dropout"), "lora.dropout"),
    **dict.fromkeys(("target_modules", "lora_target"), "lora.targets"),
    **dict.fromkeys(("lr", "unet_lr", "transformer_lr"), "optimizer.learning_rate"),
    **dict.fromkeys(("optimizer_type", "optimizer_args"), "optimizer.name"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type"), "optimizer.schedule"),
    **dict.fromkeys(("lr_warmup_steps", "warmup", "num_warmup_steps"), "optimizer.warmup_steps"),
    **dict.fromkeys(("max_norm", "clip_grad_norm"), "optimizer.max_grad_norm"),
    "gradient_accumulation_steps": "optimizer.accumulation",
    "gradient_accumulation": "optimizer.accumulation",
    **dict.fromkeys(("max_train_steps", "train_steps", "num_steps", "iterations"), "steps"),
    **dict.fromkeys(("train_batch_size", "per_device_batch_size"), "data.batch_size"),
    **dict.fromkeys(("caption_dropout_rate", "cfg_dropout"), "data.caption_dropout"),
    **dict.fromkeys(("train_data_dir", "dataset_config", "instance_data_dir"), "data.folder"),
    **dict.fromkeys(("dataset_path", "folder_path"), "data.folder"),
    **dict.fromkeys(("reg_data_dir", "class_data_dir"), "data.prior"),
    "prior_loss_weight": "data.prior_weight",
    "masked_loss": "data.use_masks",
    **dict.fromkeys(("pretrained_model_name_or_path", "name_or_path", "dit"), "model.source"),
    **dict.fromkeys(("model_name_or_path", "model_path"), "model.source"),
    **dict.fromkeys(("mixed_precision", "weight_dtype"), "model.compute_dtype"),
    **dict.fromkeys(("fp8_base", "fp8_scaled", "quantize", "qtype"), "model.storage"),
    **dict.fromkeys(("blocks_to_swap", "layer_offloading"), "model.offload_blocks"),
    **dict.fromkeys(("model_version", "edit_version"), "model.variant"),
    **dict.fromkeys(("vae_path", "pretrained_vae_model_name_or_path"), "model.vae"),
    **dict.fromkeys(("timestep_sampling", "timestep_type"), "objective.sampling"),
    **dict.fromkeys(("discrete_flow_shift", "flow_shift"), "objective.shift"),
    **dict.fromkeys(("weighting_scheme", "loss_weighting"), "objective.weighting"),
    **dict.fromkeys(("output_dir", "training_folder"), "output"),
    **dict.fromkeys(("output_name", "project_name"), "name"),
    **dict.fromkeys(("save_every_n_steps", "save_every"), "saving.adapter_every"),
    "checkpointing_steps": "saving.checkpoint_every",
    **dict.fromkeys(("save_precision", "save_dtype"), "saving.dtype"),
    "checkpoints_total_limit": "saving.keep_checkpoints",
    "max_step_saves_to_keep": "saving.keep_adapters",
    **dict.fromkeys(("use_ema", "ema"), "optimizer.ema_decay"),
}
#: Other trainers' names for what no setting decides -> what does.
ELSEWHERE = {
    **dict.fromkeys(
        ("resolution", "max_resolution", "bucket_reso_steps", "enable_bucket", "target_area"),
        message("the size is chosen where the training set is made, by megapixels of Image Pairs"),
    ),
    **dict.fromkeys(
        ("max_train_epochs", "num_train_epochs", "epochs", "num_epochs"),
        message("the length is given in steps"),
    ),
    **dict.fromkeys(
        ("network_module", "network_type"), message("a LoRA is always trained; no setting names it")
    ),
    **dict.fromkeys(
        ("trigger_word", "instance_prompt"),
        message("captions are part of the training set, see Image Pairs"),
    ),
    **dict.fromkeys(
        ("num_repeats", "repeats"),
        message("every item is shown once an epoch; leave the setting out"),
    ),
}
#: Of difflib's similarity; below, a guess misleads.
CUTOFF = 0.6


def suggest(key: str, fields: Iterable[str], section: str, places: Iterable[str]) -> str:
    """The end of a message on an unknown setting: "; did you mean rank?", or "".

    Args:
        fields: names that this table has.
        section: the table's name, such as "lora"; "" for the one on top.
        places: dotted names of all settings.
    """
    places = list(places)
    name = key.lower().replace("-", "_")
    if name in ELSEWHERE:
        return "; " + ELSEWHERE[name]
    place = OTHER_NAMES.get(name)
    if place is None:
        near = difflib.get_close_matches(name, list(fields), n=1, cutoff=CUTOFF)
        if near:
            return message("; did you mean {near}?", near=near[0])
        place = next((one for one in places if one.rpartition(".")[2] == name), None)
    if place is None:
        return ""
    table, _, last = place.rpartition(".")
    return message("; did you mean {place}?", place=last if table == section else show_place(place))


def show_place(place: str) -> str:
    table, _, name = place.rpartition(".")
    return (
        message("[{table}] {name}", table=table, name=name)
        if table
        else message("{name}, above all tables", name=name)
    )
