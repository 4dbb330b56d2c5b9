"""
The update over what carries something new: which rollouts train, how they are packed, and the attention that goes
with it. `rows`, `layout` and `plan` are pure (tensors and numbers in, tensors and numbers out), `attention` is what a
model calls in every layer, `packing` runs a model over packed rollouts, and `runner` ties them to a trainer.
"""
