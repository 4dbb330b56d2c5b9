"""`gd2po generate`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import UsageError, one_line
from ..terminal import set_up_logging
from ..user_input import is_hub_id


GENERATE = """
Completions of a trained policy: of one prompt, or of a file of them.

  gd2po generate --model outputs/my_run --prompt 'What is 2 + 2?'
  gd2po generate --model outputs/my_run --prompts held_out.jsonl --limit 20 --output completions.jsonl

A prompt goes through the chat template, if the model has one; --raw gives it to the model as it is. --model is a
folder or Hub id of a model or of a PEFT adapter. Decoding is greedy unless --temperature is above 0.
"""


def main(argv: list[str]) -> int:
    """Run `gd2po generate`; the exit status."""
    parser = make_parser("generate", GENERATE)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt, - for standard input; repeatable")
    parser.add_argument("--prompts", metavar="FILE", help="data with a `prompt` column: JSONL, JSON, CSV or parquet")
    parser.add_argument("--limit", type=int, metavar="N", help="first N prompts of the file (default: all)")
    parser.add_argument("--raw", action="store_true", help="no chat template: the model continues the text")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="completions per prompt (default: 1)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="(default: 8)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write lines of JSON with prompt and completion here"
    )
    arguments = parser.parse_args(argv)
    check(arguments)
    for name in ("num_samples", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least 1.")
    if arguments.num_samples > 1 and not arguments.temperature:
        raise UsageError("--num-samples above 1 needs a --temperature above 0: greedy completions are all the same.")
    if not arguments.prompt and arguments.prompts is None:
        raise UsageError("which prompts? Give --prompt TEXT or --prompts FILE.")
    if arguments.output is not None and arguments.output.exists():
        raise UsageError(f"--output '{arguments.output}' exists; name another file.")
    set_up_logging()
    prompts: list[Any] = [sys.stdin.read() if text == "-" else text for text in arguments.prompt or []]
    if arguments.prompts is not None:
        from ..datasets import load_dataset_by_name

        prompts += list(load_dataset_by_name("prompts", arguments.prompts, limit=arguments.limit)["prompt"])
    for number, prompt in enumerate(prompts, start=1):
        if isinstance(prompt, str) and not prompt.strip():
            raise UsageError(f"prompt {number} is empty.")
    generator, options = load_pipeline(arguments)
    inputs = [_as_input(generator, prompt, arguments) for prompt in prompts]
    options |= {"num_return_sequences": arguments.num_samples, "batch_size": arguments.batch_size}
    outputs = generator(inputs, return_full_text=False, **options)
    records = [
        {"prompt": prompt, "completion": generated_text(completion["generated_text"])}
        for prompt, completions in zip(prompts, outputs, strict=True)
        for completion in completions
    ]
    if arguments.output is not None:
        try:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            arguments.output.write_text(lines, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UsageError(f"Cannot write {arguments.output}: {error.strerror}.") from error
        print(f"{len(records)} completions are in {arguments.output}.")
    elif len(prompts) == 1 and arguments.prompts is None:
        print("\n\n".join(record["completion"] for record in records))
    else:
        _print(records)
    return 0


def make_parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"gd2po {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a model, or of a PEFT adapter")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="(default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    return parser


def check(arguments: argparse.Namespace) -> None:
    if arguments.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {arguments.max_new_tokens}; it must be at least 1.")
    if not 0 <= arguments.temperature < float("inf"):
        raise UsageError(f"--temperature is {arguments.temperature}; it must be 0 or more.")


def load_pipeline(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """transformers' pipeline for the model, and the arguments of its calls."""
    from transformers import pipeline, set_seed
    from transformers.generation import GenerationConfig

    name = arguments.model
    folder = Path(name)
    if not folder.is_dir() and not is_hub_id(name):
        raise UsageError(f"--model is '{name}', and there is no such folder.")
    if folder.is_dir() and not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise UsageError(
            f"--model is '{name}', a folder without a config.json or adapter_config.json: it holds no model."
        )
    set_seed(arguments.seed)
    try:
        generator = pipeline("text-generation", model=name, dtype=arguments.dtype)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UsageError(f"--model '{name}' cannot be loaded: {one_line(error)[:600]}") from error
    tokenizer = generator.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    own = generator.model.generation_config
    sampling = {"do_sample": True, "temperature": arguments.temperature, "top_k": 0} if arguments.temperature else {}
    # Without the penalties and the sampling of the model's own generation config.
    generator.model.generation_config = GenerationConfig(
        eos_token_id=own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=bool(arguments.temperature),
    )
    return generator, {"max_new_tokens": arguments.max_new_tokens, **sampling}


def _as_input(generator: Any, prompt: Any, arguments: argparse.Namespace) -> Any:
    if not isinstance(prompt, str):
        messages = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    elif arguments.raw or generator.tokenizer.chat_template is None:
        return prompt
    else:
        messages = [{"role": "user", "content": prompt}]
    if generator.tokenizer.chat_template is None:
        raise UsageError(
            f"The prompts are lists of messages, and the tokenizer of '{arguments.model}' has no chat template."
        )
    if arguments.system and messages[0].get("role") != "system":
        messages.insert(0, {"role": "system", "content": arguments.system})
    return messages


def generated_text(generated: Any) -> str:
    return generated if isinstance(generated, str) else generated[-1]["content"]


def _print(records: list[dict[str, Any]]) -> None:
    from ..messages import conversation_text
    from ..progress import print_sample
    from ..terminal import make_console

    console = make_console()
    for index, record in enumerate(records, start=1):
        print_sample(
            f"Prompt {index}", conversation_text(record["prompt"]), {"completion": record["completion"]}, console
        )
