"""The key that was meant by one that a recipe does not have: other versions and other trainers use other names."""

import difflib
from collections.abc import Collection


# Our keys -> short forms, and what other versions and open-r1, verl, Unsloth, LLaMA-Factory and ms-swift call them.
# Where a name stands under two keys, the first that the command has is suggested.
_NAMES_OF_OTHERS = {
    "dtype": "torch_dtype bnb_4bit_compute_dtype",
    "max_prompt_tokens": "max_prompt_length cutoff_len",
    "max_length": "max_prompt_length max_seq_length cutoff_len",
    "max_completion_length": "response_length max_response_length max_new_tokens max_tokens max_length",
    "vllm_max_model_length": "max_seq_length vllm_max_model_len",
    "beta": "kl_coef init_kl_coef kl_loss_coef use_kl_loss use_kl_in_reward kl kl_beta",
    "epsilon": "cliprange epsilon_low clip_ratio clip_ratio_low clip_eps",
    "num_iterations": "num_ppo_epochs ppo_epochs",
    "num_generations": (
        "num_sample_generations n group_size num_rollouts rollouts_per_prompt n_samples_per_prompt "
        "num_return_sequences"
    ),
    "use_liger_kernel": "use_liger_loss use_liger",
    "eval_strategy": "evaluation_strategy",
    "generation_batch_size": "train_batch_size global_batch_size rollout_batch_size",
    "per_device_train_batch_size": (
        "per_gpu_train_batch_size train_batch_size ppo_micro_batch_size ppo_micro_batch_size_per_gpu batch_size "
        "micro_batch_size global_batch_size"
    ),
    "per_device_eval_batch_size": "per_gpu_eval_batch_size val_batch_size eval_batch_size",
    "use_cpu": "no_cuda cpu",
    "train_sampling_strategy": "group_by_length",
    "warmup_steps": "warmup_ratio lr_warmup_steps lr_warmup_steps_ratio warmup",
    "output_dir": "overwrite_output_dir default_local_dir output output_path out_dir out save_dir",
    "dataset_path": "dataset_name train_files dataset_dir data data_path train_file train_data",
    "dataset_split": "dataset_train_split split",
    "eval_dataset_split": "dataset_test_split eval_split",
    "dataset_kwargs": "dataset_config max_samples",
    "reward_funcs": "reward_model_path reward rewards reward_functions reward_names",
    "model_name_or_path": (
        "sft_model_path model_name adapter_name_or_path adapters adapter model model_id model_path base_model"
    ),
    "hub_revision": "hub_model_revision",
    "gradient_accumulation_steps": "ppo_mini_batch_size grad_accum gradient_accumulation accumulate_grad_batches",
    "delta": "clip_ratio_c",
    "eval_on_start": "val_before_train",
    "epsilon_high": "clip_ratio_high",
    "entropy_coef": "entropy_coeff",
    "loss_type": "loss_agg_mode",
    "scale_rewards": "norm_adv_by_std_in_grpo",
    "max_grad_norm": "grad_clip clip_grad gradient_clipping",
    "method": "adv_estimator algorithm",
    "num_train_epochs": "total_epochs epochs num_epochs",
    "max_steps": "total_training_steps steps num_steps",
    "eval_steps": "test_freq eval_every",
    "save_steps": "save_freq save_every",
    "vllm_gpu_memory_utilization": "gpu_memory_utilization",
    "vllm_tensor_parallel_size": "tensor_model_parallel_size tensor_parallel_size",
    "eval_dataset_path": "val_files eval_file eval_data validation_file",
    "long_prompts": "filter_overlong_prompts truncation",
    "truncation_mode": "truncation",
    "run_name": "experiment_name",
    "report_to": "logger tracker",
    "resume_from_checkpoint": "resume_mode resume_from_path resume",
    "gradient_checkpointing": "enable_gradient_checkpointing use_gradient_checkpointing",
    "lora_target_modules": "target_modules lora_target",
    "lora_r": "lora_rank max_lora_rank rank r",
    "lora_alpha": "alpha",
    "use_vllm": "fast_inference vllm",
    "seed": "random_state",
    "use_peft": "full_finetuning finetuning_type train_type tuner_type lora use_lora peft",
    "lora_modules_to_save": "additional_target modules_to_save",
    "dataset_num_proc": "preprocessing_num_workers",
    "dataloader_num_workers": "preprocessing_num_workers",
    "attn_implementation": "flash_attn attn_impl",
    "load_in_4bit": "quantization_bit quant_bits qlora four_bit",
    "bf16": "pure_bf16 precision mixed_precision",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler scheduler",
    "optim": "optimizer",
    "weight_decay": "wd",
    "temperature": "temp",
    "dataset": "train_dataset",
    "reward_weights": "weights",
    "logging_steps": "log_steps",
    "reward_timeout": "timeout",
}
# Another name -> the keys of ours that mean the same.
OTHER_NAMES: dict[str, tuple[str, ...]] = {}
for _key, _names in _NAMES_OF_OTHERS.items():
    for _name in _names.split():
        OTHER_NAMES[_name] = (*OTHER_NAMES.get(_name, ()), _key)

# What to know about the suggested key.
REMARKS = {
    "max_prompt_length": "in tokens of the policy, chat template included; `long_prompts` says what becomes of longer",
    **dict.fromkeys(("warmup_ratio", "lr_warmup_steps_ratio"), "below 1 it is a share of all steps"),
    "overwrite_output_dir": "a run needs one without another run's checkpoints, or `resume_from_checkpoint: latest`",
    "dataset_name": "a Hub id or a file; `dataset` is the name of the loader",
    "dataset_config": "the loader's own options",
    "max_samples": "dataset_kwargs: {limit: 100}",
    "full_finetuning": "false trains all weights",
    **dict.fromkeys(("use_kl_loss", "use_kl_in_reward"), "0 is off"),
    **dict.fromkeys(("finetuning_type", "train_type", "tuner_type"), "true for LoRA, false for all weights"),
    **dict.fromkeys(("quantization_bit", "quant_bits"), "or `load_in_8bit`"),
    **dict.fromkeys(("adapter_name_or_path", "adapters", "adapter"), "the adapter in this folder trains on"),
    "ppo_mini_batch_size": "rollouts per optimizer step are per_device_train_batch_size x GPUs x this",
    "train_batch_size": "in rollouts, not in prompts",
    "max_seq_length": "of a run with vLLM; prompts have `max_prompt_tokens`, completions `max_completion_length`",
    **dict.fromkeys(("adv_estimator", "algorithm"), "grpo, gdpo, gd2po_hard or gd2po_snr"),
    "norm_adv_by_std_in_grpo": "group, batch or none",
}

# Keys of others for things that are not set in a recipe, and where they are set.
ELSEWHERE = {
    **dict.fromkeys(
        ("wandb_project", "project_name"),
        "W&B takes it from the environment variable WANDB_PROJECT, Trackio from `project`.",
    ),
    "wandb_entity": "W&B takes it from the environment variable WANDB_ENTITY.",
    "logging_dir": "TensorBoard takes it from the environment variable TENSORBOARD_LOGGING_DIR.",
    "chat_template": "It is the tokenizer's own; `chat_template_kwargs` are its variables.",
    "template": "The chat template is the tokenizer's own; `chat_template_kwargs` are its variables.",
    **dict.fromkeys(("system_prompt", "system"), "Write it into the prompts, as a message with the role `system`."),
    **dict.fromkeys(("dataset_prompt_column", "prompt_key"), "Rename the column that holds the prompts to `prompt`."),
    **dict.fromkeys(("stage", "rlhf_type"), "`gd2po sft` and `gd2po train` are the stages."),
    **dict.fromkeys(
        ("n_gpus_per_node", "num_processes", "num_gpus"),
        "`accelerate launch --num_processes` says how many GPUs train.",
    ),
    "nnodes": "`accelerate launch --num_machines` says how many machines train.",
    "device": "`use_cpu: true` stays on the CPU; else a run takes the GPU.",
    "device_map": "It is a key of `model_init_kwargs`.",
    "save_safetensors": "The weights are always written so.",
    "stop": "It is a key of `generation_kwargs`.",
    "do_sample": "Completions are always sampled; `temperature` says how.",
    "kl_penalty": "`beta` is the KL coefficient.",
}

# Sections of other projects' nested configuration files. A recipe is flat.
SECTIONS = {
    **dict.fromkeys(
        "actor_rollout_ref actor rollout trainer critic reward_model custom_reward_function".split(), "verl"
    ),
    **dict.fromkeys("policy grpo loss_fn cluster".split(), "NeMo-RL"),
}


def suggestion(name: str, known: Collection[str], command: str) -> str:
    """
    One sentence, with a space before it, about what `name` may have been meant to be.

    Args:
        name (`str`):
            An unknown key or option, without dashes.
        known (collection of `str`):
            The keys that `command` has.
        command (`str`):
            Such as `"gd2po train"`.

    Returns:
        `str`: the key that others call `name`, else the one that is spelled nearly like it, else where all are listed.
    """
    plain = name.strip().lower().replace("-", "_")
    last = plain.rpartition(".")[2]
    for word in dict.fromkeys((plain, last)):
        if word in known:
            return f" Did you mean `{word}`?"
        meant = next((key for key in OTHER_NAMES.get(word, ()) if key in known), None)
        if meant is not None:
            remark = f" ({REMARKS[word]})" if word in REMARKS else ""
            return f" Did you mean `{meant}`?{remark}"
        if word in ELSEWHERE:
            return f" {ELSEWHERE[word]}"
    if plain in SECTIONS:
        return f" It looks like a section of a configuration of {SECTIONS[plain]}; a recipe is flat, without sections."
    close = difflib.get_close_matches(plain, known, n=1, cutoff=0.75)
    return f" Did you mean `{close[0]}`?" if close else f" `{command} --help-all` lists all."
