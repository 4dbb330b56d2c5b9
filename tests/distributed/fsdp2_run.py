"""
Runs of `test_distributed.py` under FSDP2 on two CPU processes, with the settings that `accelerate launch` hands to
them from `recipes/accelerate_configs/fsdp2.yaml` (but for bfloat16).

Usage: `python -m torch.distributed.run --nproc-per-node 2 fsdp2_run.py POLICY OUTPUT_FOLDER`
"""

import os
import shutil
import sys
from pathlib import Path

from accelerate import DistributedType, PartialState
from accelerate.utils.launch import prepare_multi_gpu_env
from scripted_run import CONFIGURATIONS, REWARDS, ScriptedRollouts, run
from test_accelerate_configs import parsed
from torch.distributed.tensor import DTensor

from gd2po_trl.run_log import checkpoint_to_resume


def turn_on() -> None:
    launched = prepare_multi_gpu_env(parsed("fsdp2", "--mixed_precision", "no"))
    os.environ.update({name: value for name, value in launched.items() if name.startswith(("ACCELERATE", "FSDP"))})
    # accelerate turns FSDP on for accelerators alone, though torch shards over gloo as well.
    start = PartialState.__init__

    def start_as_on_accelerators(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start_as_on_accelerators


def check(trainer) -> None:
    assert trainer.is_fsdp_enabled and trainer.accelerator.is_fsdp2
    parameters = list(trainer.model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    held = sum(parameter.to_local().numel() for parameter in parameters)
    assert held < 0.6 * sum(parameter.numel() for parameter in parameters)


def main(policy: str, output: Path) -> None:
    turn_on()
    for name, overrides in CONFIGURATIONS.items():
        check(run(policy, output / name, REWARDS, ScriptedRollouts(), **overrides))

    sampled = {"num_generations": 4, "optim": "adamw_torch", "learning_rate": 1e-2}
    sampled |= {"save_strategy": "steps", "save_steps": 2}
    trainer = run(policy, output / "sampled", REWARDS, **sampled)
    check(trainer)
    trainer.save_model(str(output / "saved"))
    if trainer.is_world_process_zero():
        shutil.copytree(output / "sampled" / "checkpoint-2", output / "resumed" / "checkpoint-2")
    trainer.accelerator.wait_for_everyone()
    run(policy, output / "resumed", REWARDS, resume=checkpoint_to_resume("latest", output / "resumed"), **sampled)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
