"""What was meant by a key that a recipe does not have: the names that other versions and other trainers use."""

import difflib
from collections.abc import Collection


# Another name -> keys of ours that mean the same, of which the first that the command has is suggested.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    # TRL's and transformers' own past versions, and open-r1
    "torch_dtype": ("dtype",),
    "max_prompt_length": ("max_prompt_tokens", "max_length"),
    "response_length": ("max_completion_length",),
    "max_seq_length": ("max_length", "vllm_max_model_length"),
    "vllm_max_model_len": ("vllm_max_model_length",),
    "kl_coef": ("beta",),
    "init_kl_coef": ("beta",),
    "cliprange": ("epsilon",),
    "epsilon_low": ("epsilon",),
    "num_ppo_epochs": ("num_iterations",),
    "ppo_epochs": ("num_iterations",),
    "num_sample_generations": ("num_generations",),
    "use_liger_loss": ("use_liger_kernel",),
    "use_liger": ("use_liger_kernel",),
    "evaluation_strategy": ("eval_strategy",),
    "per_gpu_train_batch_size": ("per_device_train_batch_size",),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size",),
    "no_cuda": ("use_cpu",),
    "group_by_length": ("train_sampling_strategy",),
    "warmup_ratio": ("warmup_steps",),
    "overwrite_output_dir": ("output_dir", "resume_from_checkpoint"),
    "dataset_name": ("dataset_path",),
    "dataset_train_split": ("dataset_split",),
    "dataset_test_split": ("eval_dataset_split",),
    "dataset_config": ("dataset_kwargs",),
    "eval_split": ("eval_dataset_split",),
    "reward_model_path": ("reward_funcs",),
    "sft_model_path": ("model_name_or_path",),
    "hub_model_revision": ("hub_revision",),
    "bnb_4bit_compute_dtype": ("dtype",),
    # verl
    "n": ("num_generations",),
    "train_batch_size": ("generation_batch_size", "per_device_train_batch_size"),
    "ppo_mini_batch_size": ("gradient_accumulation_steps",),
    "ppo_micro_batch_size": ("per_device_train_batch_size",),
    "ppo_micro_batch_size_per_gpu": ("per_device_train_batch_size",),
    "kl_loss_coef": ("beta",),
    "use_kl_loss": ("beta",),
    "use_kl_in_reward": ("beta",),
    "clip_ratio": ("epsilon",),
    "clip_ratio_c": ("delta",),
    "val_before_train": ("eval_on_start",),
    "val_batch_size": ("per_device_eval_batch_size",),
    "clip_ratio_low": ("epsilon",),
    "clip_ratio_high": ("epsilon_high",),
    "max_response_length": ("max_completion_length",),
    "entropy_coeff": ("entropy_coef",),
    "loss_agg_mode": ("loss_type",),
    "norm_adv_by_std_in_grpo": ("scale_rewards",),
    "grad_clip": ("max_grad_norm",),
    "clip_grad": ("max_grad_norm",),
    "adv_estimator": ("method",),
    "algorithm": ("method",),
    "total_epochs": ("num_train_epochs",),
    "total_training_steps": ("max_steps",),
    "test_freq": ("eval_steps",),
    "save_freq": ("save_steps",),
    "lr_warmup_steps": ("warmup_steps",),
    "lr_warmup_steps_ratio": ("warmup_steps",),
    "gpu_memory_utilization": ("vllm_gpu_memory_utilization",),
    "tensor_model_parallel_size": ("vllm_tensor_parallel_size",),
    "tensor_parallel_size": ("vllm_tensor_parallel_size",),
    "train_files": ("dataset_path",),
    "val_files": ("eval_dataset_path",),
    "filter_overlong_prompts": ("long_prompts",),
    "truncation": ("long_prompts", "truncation_mode"),
    "default_local_dir": ("output_dir",),
    "experiment_name": ("run_name",),
    "logger": ("report_to",),
    "resume_mode": ("resume_from_checkpoint",),
    "resume_from_path": ("resume_from_checkpoint",),
    "enable_gradient_checkpointing": ("gradient_checkpointing",),
    "target_modules": ("lora_target_modules",),
    # Unsloth
    "model_name": ("model_name_or_path",),
    "lora_rank": ("lora_r",),
    "max_lora_rank": ("lora_r",),
    "rank": ("lora_r",),
    "r": ("lora_r",),
    "alpha": ("lora_alpha",),
    "fast_inference": ("use_vllm",),
    "use_gradient_checkpointing": ("gradient_checkpointing",),
    "random_state": ("seed",),
    "full_finetuning": ("use_peft",),
    "max_new_tokens": ("max_completion_length",),
    "max_tokens": ("max_completion_length",),
    # LLaMA-Factory and ms-swift
    "finetuning_type": ("use_peft",),
    "train_type": ("use_peft",),
    "tuner_type": ("use_peft",),
    "lora_target": ("lora_target_modules",),
    "additional_target": ("lora_modules_to_save",),
    "modules_to_save": ("lora_modules_to_save",),
    "cutoff_len": ("max_length", "max_prompt_tokens"),
    "max_length": ("max_completion_length",),
    "max_samples": ("dataset_kwargs",),
    "dataset_dir": ("dataset_path",),
    "preprocessing_num_workers": ("dataset_num_proc", "dataloader_num_workers"),
    "flash_attn": ("attn_implementation",),
    "attn_impl": ("attn_implementation",),
    "quantization_bit": ("load_in_4bit",),
    "quant_bits": ("load_in_4bit",),
    "adapter_name_or_path": ("model_name_or_path",),
    "adapters": ("model_name_or_path",),
    "adapter": ("model_name_or_path",),
    "pure_bf16": ("bf16",),
    # In short
    "lr": ("learning_rate",),
    "lr_scheduler": ("lr_scheduler_type",),
    "scheduler": ("lr_scheduler_type",),
    "optimizer": ("optim",),
    "epochs": ("num_train_epochs",),
    "num_epochs": ("num_train_epochs",),
    "steps": ("max_steps",),
    "num_steps": ("max_steps",),
    "batch_size": ("per_device_train_batch_size",),
    "micro_batch_size": ("per_device_train_batch_size",),
    "global_batch_size": ("generation_batch_size", "per_device_train_batch_size"),
    "rollout_batch_size": ("generation_batch_size",),
    "eval_batch_size": ("per_device_eval_batch_size",),
    "grad_accum": ("gradient_accumulation_steps",),
    "gradient_accumulation": ("gradient_accumulation_steps",),
    "accumulate_grad_batches": ("gradient_accumulation_steps",),
    "gradient_clipping": ("max_grad_norm",),
    "warmup": ("warmup_steps",),
    "wd": ("weight_decay",),
    "group_size": ("num_generations",),
    "num_rollouts": ("num_generations",),
    "rollouts_per_prompt": ("num_generations",),
    "n_samples_per_prompt": ("num_generations",),
    "num_return_sequences": ("num_generations",),
    "temp": ("temperature",),
    "kl": ("beta",),
    "kl_beta": ("beta",),
    "clip_eps": ("epsilon",),
    "model": ("model_name_or_path",),
    "model_id": ("model_name_or_path",),
    "model_path": ("model_name_or_path",),
    "base_model": ("model_name_or_path",),
    "data": ("dataset_path",),
    "data_path": ("dataset_path",),
    "train_file": ("dataset_path",),
    "train_data": ("dataset_path",),
    "train_dataset": ("dataset",),
    "eval_file": ("eval_dataset_path",),
    "eval_data": ("eval_dataset_path",),
    "validation_file": ("eval_dataset_path",),
    "split": ("dataset_split",),
    "reward": ("reward_funcs",),
    "rewards": ("reward_funcs",),
    "reward_functions": ("reward_funcs",),
    "reward_names": ("reward_funcs",),
    "weights": ("reward_weights",),
    "lora": ("use_peft",),
    "use_lora": ("use_peft",),
    "peft": ("use_peft",),
    "qlora": ("load_in_4bit",),
    "four_bit": ("load_in_4bit",),
    "cpu": ("use_cpu",),
    "precision": ("bf16",),
    "mixed_precision": ("bf16",),
    "vllm": ("use_vllm",),
    "output": ("output_dir",),
    "output_path": ("output_dir",),
    "out_dir": ("output_dir",),
    "out": ("output_dir",),
    "save_dir": ("output_dir",),
    "resume": ("resume_from_checkpoint",),
    "log_steps": ("logging_steps",),
    "eval_every": ("eval_steps",),
    "save_every": ("save_steps",),
    "timeout": ("reward_timeout",),
    "tracker": ("report_to",),
}

# What a name alone does not say.
REMARKS = {
    "max_prompt_length": "in tokens of the policy, chat template included; `long_prompts` says what becomes of longer",
    "warmup_ratio": "below 1 it is a share of all steps",
    "lr_warmup_steps_ratio": "below 1 it is a share of all steps",
    "overwrite_output_dir": "a run needs one without another run's checkpoints, or `resume_from_checkpoint: latest`",
    "dataset_name": "a Hub id or a file; `dataset` is the name of the loader",
    "dataset_config": "the loader's own options",
    "max_samples": "dataset_kwargs: {limit: 100}",
    "use_kl_loss": "0 is off",
    "use_kl_in_reward": "0 is off",
    "full_finetuning": "false trains all weights",
    "finetuning_type": "true for LoRA, false for all weights",
    "train_type": "true for LoRA, false for all weights",
    "tuner_type": "true for LoRA, false for all weights",
    "quantization_bit": "or `load_in_8bit`",
    "quant_bits": "or `load_in_8bit`",
    "adapter_name_or_path": "the folder of an adapter trains on from the adapter",
    "adapters": "the folder of an adapter trains on from the adapter",
    "adapter": "the folder of an adapter trains on from the adapter",
    "ppo_mini_batch_size": "rollouts per optimizer step are per_device_train_batch_size x GPUs x this",
    "train_batch_size": "in rollouts, not in prompts",
    "max_seq_length": "of a run with vLLM; prompts have `max_prompt_tokens`, completions `max_completion_length`",
    "adv_estimator": "grpo, gdpo, gd2po_hard or gd2po_snr",
    "algorithm": "grpo, gdpo, gd2po_hard or gd2po_snr",
    "norm_adv_by_std_in_grpo": "group, batch or none",
}

# Where what others have a key for is said here.
ELSEWHERE = {
    "wandb_project": "W&B takes it from the environment variable WANDB_PROJECT, Trackio from `project`.",
    "project_name": "W&B takes it from the environment variable WANDB_PROJECT, Trackio from `project`.",
    "wandb_entity": "W&B takes it from the environment variable WANDB_ENTITY.",
    "logging_dir": "TensorBoard takes it from the environment variable TENSORBOARD_LOGGING_DIR.",
    "chat_template": "It is the tokenizer's own; `chat_template_kwargs` are its variables.",
    "template": "The chat template is the tokenizer's own; `chat_template_kwargs` are its variables.",
    "system_prompt": "Write it into the prompts, as a message with the role `system`.",
    "dataset_prompt_column": "Rename the column that holds the prompts to `prompt`.",
    "prompt_key": "Rename the column that holds the prompts to `prompt`.",
    "stage": "`gd2po sft` and `gd2po train` are the stages.",
    "rlhf_type": "`gd2po sft` and `gd2po train` are the stages.",
    "n_gpus_per_node": "`accelerate launch --num_processes` says how many GPUs train.",
    "nnodes": "`accelerate launch --num_machines` says how many machines train.",
    "num_processes": "`accelerate launch --num_processes` says how many GPUs train.",
    "num_gpus": "`accelerate launch --num_processes` says how many GPUs train.",
    "device": "`use_cpu: true` stays on the CPU; else a run takes the GPU.",
    "device_map": "It is a key of `model_init_kwargs`.",
    "system": "Write it into the prompts, as a message with the role `system`.",
    "save_safetensors": "The weights are always written so.",
    "stop": "It is a key of `generation_kwargs`.",
    "do_sample": "Completions are always sampled; `temperature` says how.",
    "kl_penalty": "`beta` is the KL coefficient.",
}

# Sections of nested configuration files, each with whose it is. A recipe is flat.
SECTIONS = {
    "actor_rollout_ref": "verl",
    "actor": "verl",
    "rollout": "verl",
    "trainer": "verl",
    "critic": "verl",
    "reward_model": "verl",
    "custom_reward_function": "verl",
    "policy": "NeMo-RL",
    "grpo": "NeMo-RL",
    "loss_fn": "NeMo-RL",
    "cluster": "NeMo-RL",
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
