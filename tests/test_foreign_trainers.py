"""Packages that rewrite TRL's trainer, as Unsloth does: ours builds on what they leave, and lets their loss alone."""

import importlib
import sys

import pytest
import torch
import trl
from tiny import letters_dataset, low_bytes, spread_bytes, tiny_settings
from trl import GRPOTrainer


@pytest.fixture
def rewritten(monkeypatch):
    """`GD2POTrainer` on a trainer like Unsloth's: `*args` in its signature, a loss of its own, fewer return values."""

    class Rewritten(GRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

        def _get_per_token_logps_and_entropies(
            self,
            model,
            input_ids,
            attention_mask,
            logits_to_keep,
            batch_size=None,
            compute_entropy=False,
            lazily=False,
        ):
            if lazily:
                return None, None
            return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, logits_to_keep)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            length = inputs["completion_ids"].size(1)
            assert self._get_per_token_logps_and_entropies(model, ids, mask, length, None, False, True) == (None, None)
            logps = self._get_per_token_logps_and_entropies(model, ids, mask, length)[0]
            self.rows_seen.append(len(logps))
            return -(logps * inputs["advantages"].unsqueeze(1) * inputs["completion_mask"]).mean()

    monkeypatch.setattr(trl, "GRPOTrainer", Rewritten)
    loaded = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("gd2po_trl")}
    yield importlib.import_module("gd2po_trl")
    for name in [name for name in sys.modules if name.startswith("gd2po_trl")]:
        del sys.modules[name]
    sys.modules.update(loaded)


def test_another_loss_sees_every_rollout(rewritten, tiny_policy, tmp_path, caplog):
    args = rewritten.GD2POConfig(**tiny_settings(tmp_path))
    trainer = rewritten.GD2POTrainer(str(tiny_policy), [low_bytes, spread_bytes], args, letters_dataset())
    trainer.rows_seen = []
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert type(trainer).__mro__[2].__name__ == "Rewritten"
    assert trainer.rows_seen == [8, 8]
    assert caplog.text.count("another package has replaced TRL's loss") == 2
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
    # The advantages are ours all the same.
    assert all("gd2po/conflict_ratio" in entry for entry in trainer.state.log_history[:-1])
