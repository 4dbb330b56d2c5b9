"""
Rewards of my_task: one function each.

A reward gets, by name, the lists `prompts` and `completions` and every other column of the data. It returns one number
per completion, higher for better, or None where it cannot judge, and takes `**kwargs` for what it does not use. What
has a default before `**kwargs` can be set in the recipe, under the reward's label in `reward_kwargs`.

A function that scores several things at once returns a mapping per completion, such as {"polite": 1.0, "short": 0.5},
and declares the names: `my_function.reward_names = ["polite", "short"]`. Each is then a reward with its own weight.
"""


def text_of(completion):
    """What the policy wrote: completions are text, or messages where the prompts are messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


def keywords(completions, keywords, **kwargs):
    """Share of the row's keywords that the answer mentions; `keywords` is a column of prompts.jsonl."""
    rewards = []
    for completion, words in zip(completions, keywords, strict=True):
        text = text_of(completion).lower()
        rewards.append(sum(word.lower() in text for word in words) / len(words) if words else None)
    return rewards


def brevity(completions, max_words=40, **kwargs):
    """1 up to `max_words` words, then falling to 0 at twice as many."""
    lengths = [len(text_of(completion).split()) for completion in completions]
    return [min(1.0, max(0.0, 2.0 - length / max_words)) for length in lengths]
