"""
Runs of `test_deepspeed.py` under DeepSpeed on two CPU processes, with the settings that `accelerate launch` hands to
them from `recipes/accelerate_configs/deepspeed_zero2.yaml` or `deepspeed_zero3.yaml` (but for bfloat16).

Usage: `DS_ACCELERATOR=cpu python -m torch.distributed.run --nproc-per-node 2 deepspeed_run.py POLICY OUTPUT --zero 2`
"""

import argparse
import os
import shutil
from pathlib import Path

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from scripted_run import CONFIGURATIONS, REWARDS, ScriptedRollouts, run
from test_accelerate_configs import FILES, parsed

from gd2po_trl.run_log import checkpoint_to_resume


# DeepSpeed finds the CPU by itself; told to use it, accelerate would not start DeepSpeed.
ON_CPU = {"use_cpu": False}


def turn_on(stage: int) -> None:
    name = f"deepspeed_zero{stage}"
    arguments = parsed(name, "--num_processes", "2", "--mixed_precision", "no")
    # `accelerate launch` sets it from the file.
    arguments.deepspeed_fields_from_accelerate_config = ",".join(
        load_config_from_file(str(FILES[name])).deepspeed_config
    )
    _, launched = prepare_deepspeed_cmd_env(arguments)
    os.environ.update({name: value for name, value in launched.items() if name.startswith("ACCELERATE")})
    # ZeRO-3 leaves weights of less than 100,000 values gathered, and those here are all that small.
    finish = DeepSpeedPlugin.__post_init__

    def finish_and_split_all(plugin):
        finish(plugin)
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = finish_and_split_all


def check(trainer, stage: int) -> None:
    assert trainer.is_deepspeed_enabled and trainer.accelerator.num_processes == 2
    assert trainer.model_wrapped.zero_optimization_stage() == stage
    if stage == 3:
        # Between forward passes a process holds its half alone.
        parameters = list(trainer.model.parameters())
        assert all(parameter.numel() == 0 for parameter in parameters)
        held = sum(parameter.ds_tensor.numel() for parameter in parameters)
        assert held < 0.6 * sum(parameter.ds_numel for parameter in parameters)


def main(policy: str, output: Path, stage: int) -> None:
    turn_on(stage)
    for name, overrides in CONFIGURATIONS.items():
        check(run(policy, output / name, REWARDS, ScriptedRollouts(), **ON_CPU, **overrides), stage)

    sampled = {"num_generations": 4, "optim": "adamw_torch", "learning_rate": 1e-2, **ON_CPU}
    sampled |= {"save_strategy": "steps", "save_steps": 2}
    trainer = run(policy, output / "sampled", REWARDS, **sampled)
    check(trainer, stage)
    trainer.save_model(str(output / "saved"))
    if trainer.is_world_process_zero():
        shutil.copytree(output / "sampled" / "checkpoint-2", output / "resumed" / "checkpoint-2")
    trainer.accelerator.wait_for_everyone()
    run(policy, output / "resumed", REWARDS, resume=checkpoint_to_resume("latest", output / "resumed"), **sampled)

    adapter = run(policy, output / "lora", REWARDS, ScriptedRollouts(), lora=True, num_generations=4, **ON_CPU)
    check(adapter, stage)
    adapter.save_model(str(output / "saved_adapter"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("policy")
    parser.add_argument("output", type=Path)
    parser.add_argument("--zero", type=int, choices=(2, 3), required=True)
    arguments = parser.parse_args()
    main(arguments.policy, arguments.output, arguments.zero)
