"""`gd2po merge`."""

import argparse
import json
import tempfile
from pathlib import Path

from ..errors import UsageError, one_line
from ..terminal import set_up_logging
from ..user_input import is_hub_id


DESCRIPTION = """
Merges a trained LoRA adapter into the weights of its base model, so that the result loads anywhere without PEFT:
transformers, vLLM, GGUF converters. The sums are computed in float32 and stored in the base model's own dtype.

  gd2po merge outputs/my_run
  gd2po merge outputs/my_run --output models/my_model --dtype bfloat16
"""


def main(argv: list[str]) -> int:
    """Run `gd2po merge`; the exit status."""
    parser = argparse.ArgumentParser(
        prog="gd2po merge",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("adapter", help="folder or Hub id of the adapter, such as the output_dir of a run with LoRA")
    parser.add_argument("--base", metavar="MODEL", help="the base model (default: the one that the adapter names)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="(default: ADAPTER-merged)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    arguments = parser.parse_args(argv)
    set_up_logging()
    adapter = Path(arguments.adapter)
    output = arguments.output or Path(f"{adapter if adapter.is_dir() else adapter.name}-merged")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"'{output}' exists; name another --output.")
    merge(arguments.adapter, output, base=arguments.base, dtype=arguments.dtype)
    print(f"The merged model is in {output}. Next: gd2po generate --model {output} --prompt '…'")
    return 0


def merge(adapter: str, output: Path, *, base: str | None = None, dtype: str = "auto") -> None:
    """
    Write the model that `adapter` makes of its base, with its tokenizer, to `output`, which appears once complete.

    Args:
        adapter (`str`): Folder or Hub id of a PEFT adapter that can be merged, such as LoRA.
        output (`Path`): Folder for the model.
        base (`str`, *optional*): Folder or Hub id of the base model, by default the one in `adapter_config.json`.
        dtype (`str`, *optional*, defaults to `"auto"`): Of the stored weights; `"auto"` is the base model's own.

    Raises:
        [`UsageError`]: if there is no such adapter or base, or the adapter cannot be merged.
    """
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = Path(adapter)
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        what = "a whole model, with nothing to merge" if (folder / "config.json").is_file() else "no adapter"
        raise UsageError(f"'{adapter}' holds {what}: there is no adapter_config.json in it.")
    if not folder.is_dir() and not is_hub_id(adapter):
        raise UsageError(f"There is no folder '{adapter}'.")
    try:
        base = base or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except (OSError, ValueError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise UsageError(f"'{adapter}' is no adapter that can be read: {one_line(error)}") from error
    if not base:
        raise UsageError(f"The adapter '{adapter}' does not name its base model; give it with --base.")
    if (Path(base) / "adapter_config.json").is_file():
        raise UsageError(
            f"The base of '{adapter}' is '{base}', an adapter itself. Merge that one first, and give the "
            "result as --base."
        )
    try:
        stored = AutoConfig.from_pretrained(base).dtype
        model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise UsageError(
            f"The base model '{base}' of the adapter cannot be loaded; --base names another: {reason}"
        ) from error
    own_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(adapter if own_tokenizer else base)
    try:
        model = PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"'{adapter}' does not fit '{base}': {one_line(error)[:400]}") from error
    if not hasattr(model, "merge_and_unload"):
        raise UsageError(f"Adapters of type {model.peft_config['default'].peft_type} cannot be merged into weights.")
    model = model.merge_and_unload()
    model = model.to(getattr(torch, dtype) if dtype != "auto" else stored or model.dtype)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
            unfinished = Path(temporary) / "model"
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            if output.is_dir():
                output.rmdir()
            unfinished.rename(output)
    except OSError as error:
        raise UsageError(f"Cannot write to '{output}': {error.strerror}.") from error
