"""A task and a policy small enough to watch GD²PO learn on two CPU cores."""
