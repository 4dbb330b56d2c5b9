"""
Train on two processes, over all rows and over those with an advantage, and write how far the results differ.

Usage: `python -m torch.distributed.run --nproc-per-node=2 row_skipping.py POLICY OUTPUT_FOLDER`
"""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from test_row_skipping import NOTHING, SIGNAL, ScriptedTrainer, build, count_rows, largest_difference, train


MANY = [1.0, -0.5, 0.25, 0.0, 2.0, 0.7, -1.0, 0.0]
# Advantages of each generation batch on either process: uneven, none anywhere, and uneven the other way round.
SHARES = [
    [SIGNAL + NOTHING, NOTHING + NOTHING, MANY + MANY, NOTHING + NOTHING],
    [MANY + MANY, NOTHING + NOTHING, NOTHING + SIGNAL, MANY + NOTHING],
]
SETTINGS = [
    {"max_steps": 8, "loss_type": "dapo"},
    {"max_steps": 8, "loss_type": "bnpo", "num_iterations": 2, "gradient_accumulation_steps": 2},
]


def main(policy: Path, folder: Path) -> None:
    rank = PartialState(cpu=True).process_index
    ScriptedTrainer.script = SHARES[rank]
    results = []
    for settings in SETTINGS:
        overrides = {"steps_per_generation": 2, "weight_decay": 0.1, **settings}
        stock = build(
            policy, folder, ScriptedTrainer, skip_zero_advantage_rows=False, packed_update=False, **overrides
        )
        start = {name: parameter.detach().clone() for name, parameter in stock.model.named_parameters()}
        expected = train(stock)
        skipping = build(policy, folder, ScriptedTrainer, **overrides)
        rows = count_rows(skipping)
        trained = train(skipping)
        log = skipping.state.log_history
        results.append(
            {
                "processes": skipping.accelerator.num_processes,
                "moved": largest_difference(start, expected),
                "difference": largest_difference(expected, trained),
                "rows": rows["update"],
                "trained_rows": [entry["gd2po/trained_rows"] for entry in log if "gd2po/trained_rows" in entry],
            }
        )
    (folder / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
