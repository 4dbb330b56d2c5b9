"""
One reward function with four named parts, for the tool calls of the quickstart. In a clone of this repository:

    gd2po quickstart --prepare-only
    gd2po train examples/named_parts
"""

from gd2po_trl.tasks.tool_calling.rewards import Correctness, Format, Length


score_call, score_structure, score_thoughts = Correctness(), Format(), Length(max_words=12)


def tool_call(prompts, completions, answer, **kwargs):
    """Names to lists. A list with one mapping of names to numbers per completion would do as well."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return {
        "correct": score_call(prompts, completions, answer, **kwargs),
        "structure": score_structure(prompts, completions, answer, **kwargs),
        "thinking": score_thoughts(prompts, completions, **kwargs),
        "brief": [max(0.0, 1 - len(text.split()) / 40) for text in texts],
    }


tool_call.reward_names = ["correct", "structure", "thinking", "brief"]
