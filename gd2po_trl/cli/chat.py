"""`gd2po chat`, which is `gd2po generate` turn by turn."""

from ..errors import UsageError
from ..terminal import set_up_logging
from .generate import check, generated_text, load_pipeline, make_parser


CHAT = """
A conversation with a trained policy. An empty line or Ctrl-D ends it.

  gd2po chat --model outputs/my_run --system 'You are a pirate.'
"""


def main(argv: list[str]) -> int:
    """Run `gd2po chat`; the exit status."""
    parser = make_parser("chat", CHAT)
    arguments = parser.parse_args(argv)
    check(arguments)
    set_up_logging()
    generator, options = load_pipeline(arguments)
    if generator.tokenizer.chat_template is None:
        raise UsageError(
            f"The tokenizer of '{arguments.model}' has no chat template, so there is no conversation to have with it; "
            "`gd2po generate` completes its prompts."
        )
    from transformers import TextStreamer

    streamer = TextStreamer(generator.tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    while True:
        try:
            text = input("> ")
        except EOFError:
            text = ""
        if not text.strip():
            return 0
        messages.append({"role": "user", "content": text})
        (output,) = generator(messages, streamer=streamer, return_full_text=False, **options)
        messages.append({"role": "assistant", "content": generated_text(output["generated_text"])})
