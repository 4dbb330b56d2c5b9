"""Finding the newest checkpoint that a killed run left intact."""

import json
import logging
import struct
import zipfile
from pathlib import Path

from .errors import UsageError


logger = logging.getLogger(__name__)

# Of DeepSpeed, and of FSDP with a sharded state dict.
ENGINE_FOLDERS = ("global_step", "pytorch_model_fsdp", "optimizer_")


def checkpoint_to_resume(resume: str | bool | None, output_dir: str | Path) -> str | None:
    """
    The checkpoint that `resume_from_checkpoint` means.

    Args:
        resume (`str`, `bool` or `None`):
            A folder; or `True`, `"true"` or `"latest"` for the newest intact checkpoint in `output_dir`; or `None`,
            `False` or `"false"` for a fresh start.
        output_dir (`str` or `Path`):
            Where the run writes its checkpoints.

    Returns:
        Folder of the checkpoint; `None` for a fresh start, which is also what `"latest"` means before the first
        checkpoint.

    Raises:
        [`UsageError`]: if a folder was named and is no intact checkpoint, or if a fresh start would meet checkpoints:
            by their numbers they would be taken for the new run's, which would delete and resume the wrong ones.
    """
    text = str(resume).lower()
    if text in ("none", "false", ""):
        if any(Path(output_dir).glob("checkpoint-*")):
            raise UsageError(
                f"`output_dir` '{output_dir}' holds checkpoints of another run. Give another `output_dir`, delete "
                "them, or go on from them with `resume_from_checkpoint: latest`."
            )
        return None
    if text not in ("true", "latest"):
        damage = find_damage(Path(str(resume)))
        if damage is not None:
            raise UsageError(f"Cannot resume from '{resume}': {damage}. `resume_from_checkpoint: latest` finds one.")
        return str(resume)
    for checkpoint in sorted(Path(output_dir).glob("checkpoint-*"), key=_step, reverse=True):
        damage = find_damage(checkpoint)
        if damage is None:
            return str(checkpoint)
        logger.warning(f"Skipping checkpoint '{checkpoint}', which was not written to its end: {damage}.")
    logger.warning(f"No intact checkpoint in '{output_dir}'; starting from the beginning.")
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What is missing or truncated in a checkpoint of transformers' `Trainer`, or `None` if it is intact."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    state = checkpoint / "trainer_state.json"
    if not state.is_file():
        return "trainer_state.json is missing"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except ValueError:
        return "trainer_state.json is truncated"
    weights = list(checkpoint.glob("*.safetensors"))
    # Sharded engines keep theirs in folders of their own and check them themselves.
    is_sharded = any(entry.is_dir() and entry.name.startswith(ENGINE_FOLDERS) for entry in checkpoint.iterdir())
    if not weights and not is_sharded:
        return "it holds no weights"
    for file in weights:
        if not _is_whole_safetensors(file):
            return f"{file.name} is truncated"
    for file in checkpoint.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError):
            return f"{file.name} is truncated"
        for shard in sorted(shards):
            if not (checkpoint / shard).is_file():
                return f"{shard} is missing"
    # FSDP with a full state dict writes optimizer.bin, beside the weights as it loads them (pytorch_model_fsdp.bin).
    for names in (("optimizer.pt", "optimizer.bin"), ("scheduler.pt",)):
        if weights and not is_sharded and not any((checkpoint / name).is_file() for name in names):
            return f"{names[0]} is missing"
    for pattern in ("optimizer.pt", "scheduler.pt", "*.bin", "rng_state*.pth"):
        for file in checkpoint.glob(pattern):
            if not zipfile.is_zipfile(file):
                return f"{file.name} is truncated"
    return None


def _is_whole_safetensors(file: Path) -> bool:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            return False
        (header_size,) = struct.unpack("<Q", prefix)
        if 8 + header_size > size:
            return False
        try:
            header = json.loads(stream.read(header_size))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + header_size + max(ends, default=0)


def _step(checkpoint: Path) -> int:
    suffix = checkpoint.name.rpartition("-")[2]
    return int(suffix) if suffix.isdigit() else -1
