"""
Runs of `test_deepspeed.py`: scripted rollouts on two CPU processes under DeepSpeed ZeRO.

Usage: `python -m torch.distributed.run --nproc-per-node 2 deepspeed_run.py POLICY OUTPUT_FOLDER --stage 3`
"""

import argparse
import os
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("policy")
    parser.add_argument("output", type=Path)
    parser.add_argument("--stage", choices=["2", "3"], required=True)
    arguments = parser.parse_args()
    # As `accelerate launch` sets them; before anything imports accelerate.
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": arguments.stage,
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    }
    from scripted_run import CONFIGURATIONS, REWARDS, ScriptedRollouts, run

    for name, overrides in CONFIGURATIONS.items():
        trainer = run(
            arguments.policy, arguments.output / name, REWARDS, ScriptedRollouts(), use_cpu=False, **overrides
        )
        assert trainer.is_deepspeed_enabled and trainer.accelerator.num_processes == 2
        assert trainer.accelerator.state.deepspeed_plugin.zero_stage == int(arguments.stage)


if __name__ == "__main__":
    main()
