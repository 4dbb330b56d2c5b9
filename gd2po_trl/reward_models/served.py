"""A reward model that another process or machine serves over HTTP."""

import json
import math
import os
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import requests
import urllib3
from transformers import AutoConfig

from ..errors import RewardError, UsageError
from ..messages import Messages
from ..user_input import is_number
from .conversation import ConversationEncoder, check_integer, render, resolve_template
from .direction import check_direction, resolve_direction
from .in_process import NON_FINITE, finite_or, read_tokenizer
from .loading import padding_token, scores_last_token


_MAX_REDIRECTS = 5
_RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)


class _Retry(urllib3.Retry):
    """Waits before the first further attempt already, and as long as the server asks, but not for ever."""

    def get_backoff_time(self) -> float:
        return min(self.backoff_factor * 2 ** (len(self.history) - 1), self.backoff_max)

    def get_retry_after(self, response: Any) -> float | None:
        asked = super().get_retry_after(response)
        return None if asked is None else min(asked, self.backoff_max)


class RemoteScorer:
    """
    A served reward model as a reward function for TRL.

    Speaks the `/classify` and `/pooling` routes of vLLM (`vllm serve MODEL --runner pooling`; docs.vllm.ai, pooling
    models), whose requests are `{"model", "input": [...]}` and whose answers hold one `{"index", "probs": [score]}` or
    `{"index", "data": [score]}` per text; servers that copy the first route, SGLang among them, work too. The model
    must have one label. vLLM knows sequence classifiers, not score heads: of such a checkpoint, serve a copy with
    `score_head.weight` renamed to `score.weight`, the backbone's `...ForSequenceClassification` as architecture, and
    one label.

    The environment's proxy settings are not used. A redirection within the server is followed with the same request;
    one to another server, which would get the headers and whatever token they hold, is an error.

    Args:
        url (`str`): `http://host:port/classify` or `http://host:port/pooling`; without a path, `/classify` is meant.
        name (`str`, *optional*): Label of the reward in logs and errors. Defaults to the URL's host and port.
        model (`str`, *optional*): The model's name on the server. vLLM takes the one it serves if there is none.
        tokenizer (`str`, *optional*):
            Folder or Hub id of the reward model's tokenizer. With it, token ids are sent, templated and truncated
            exactly as [`RewardModel`] does it; without it, texts, which the server tokenises (old versions of vLLM
            take only these). The config beside it, if there is one, says which padding tokens at the end of a
            conversation a classifier does not score; the server would.
        template (`str`, *optional*, defaults to `"chat"`):
            `"chat"` (needs `tokenizer`), `"beaver"`, or a text with `{prompt}` and `{response}`.
        max_length (`int`, *optional*, defaults to `2048`):
            Longest conversation in tokens; applied where `tokenizer` is given.
        truncation_side (`str`, *optional*, defaults to `"left"`): Which end of a longer conversation is cut off.
        sign (`int`, *optional*, defaults to `1`): 1, or -1 for a model that scores harm.
        higher_is (`str`, *optional*):
            `"helpful"`, `"harmless"` or `"harmful"`: what a higher reward, after the sign, means.
            [`~RemoteScorer.load`] then scores a few built-in pairs, and warns if the reward looks inverted.
        batch_size (`int`, *optional*, defaults to `64`): Texts per request.
        timeout (`float`, *optional*, defaults to `120.0`): Seconds to wait for the answer to one request.
        retries (`int`, *optional*, defaults to `3`):
            Further attempts after a failed connection, a timeout, or status 408, 425, 429, 500, 502, 503 or 504.
        backoff (`float`, *optional*, defaults to `1.0`):
            Seconds before the first further attempt; doubled before each next one, to at most 120. A server's
            `Retry-After` goes first.
        headers (`dict[str, str]`, *optional*): Further request headers.
        extra_body (`dict[str, Any]`, *optional*):
            Further request fields. Defaults to `{"use_activation": False}`, with which vLLM gives the raw score
            instead of its sigmoid.
        nan (`str`, *optional*, defaults to `"error"`):
            What a score that is not finite becomes: `"error"` raises, `"skip"` gives `None`.

    Raises:
        [`UsageError`]: at construction, for an option that cannot work.
        [`RewardError`]: in a call, naming the URL, if there is no usable answer.
    """

    def __init__(
        self,
        url: str,
        name: str | None = None,
        *,
        model: str | None = None,
        tokenizer: str | None = None,
        template: str = "chat",
        max_length: int = 2048,
        truncation_side: str = "left",
        sign: int = 1,
        higher_is: str | None = None,
        batch_size: int = 64,
        timeout: float = 120.0,
        retries: int = 3,
        backoff: float = 1.0,
        headers: dict[str, str] | None = None,
        extra_body: dict[str, Any] | None = None,
        nan: str = "error",
    ):
        try:
            parts = urllib.parse.urlsplit(str(url))
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_url = False
        if not is_url:
            raise UsageError(f"url={url!r} of a remote reward model must look like http://host:port/classify.")
        if "@" in parts.netloc:
            raise UsageError("url of a remote reward model holds a password, which errors would quote; use headers.")
        self.url = parts._replace(path="/classify").geturl() if parts.path in ("", "/") else parts.geturl()
        self.__name__ = name or parts.netloc
        who = f"remote reward model {self.url}"
        for option, value in (("timeout", timeout), ("backoff", backoff)):
            is_finite = is_number(value) and math.isfinite(value)
            if not is_finite or value < 0 or (option == "timeout" and value == 0):
                allowed = "positive" if option == "timeout" else "a number, not negative"
                raise UsageError(f"{who}: {option}={value!r} must be {allowed}.")
        check_integer(f"{who}: retries", retries, 0)
        check_integer(f"{who}: batch_size", batch_size, 1)
        for option, given in (("headers", headers), ("extra_body", extra_body)):
            if not isinstance(given, (Mapping, type(None))):  # not quoted, since headers may hold a token
                raise UsageError(f"{who}: {option} is a {type(given).__name__}; it must be a mapping.")
        if nan not in NON_FINITE:
            raise UsageError(f"nan={nan!r} of {who} must be one of {', '.join(NON_FINITE)}.")
        self.model = model
        self.sign, self.higher_is = resolve_direction(None, sign, higher_is, self.url)
        self.batch_size, self.timeout, self.retries, self.backoff = batch_size, timeout, retries, backoff
        self.headers = {"Content-Type": "application/json", "Accept": "application/json", **(headers or {})}
        self.extra_body = {"use_activation": False} if extra_body is None else dict(extra_body)
        self.nan = nan
        try:
            requests.Request("POST", self.url, self.headers, json=self.extra_body).prepare()
        except requests.exceptions.InvalidHeader:
            # Not quoted, since it may hold a token.
            raise UsageError(f"{who}: a header is no text, or holds a line break or a space in front.") from None
        except (requests.RequestException, ValueError, TypeError) as error:
            raise UsageError(f"{who}: no request can be made with this url and extra_body: {error}") from error
        loaded = read_tokenizer(tokenizer) if tokenizer is not None else None
        if loaded is None and template == "chat":
            raise UsageError(
                f"{who}: template 'chat' needs tokenizer, the folder or Hub id of the "
                "reward model's tokenizer. Or set template to a text with {prompt} and {response}."
            )
        self.template = resolve_template(template, loaded, self.url)
        self.encoder = loaded and ConversationEncoder(
            loaded, self.template, max_length, truncation_side, skipped_end=_skipped_end(tokenizer)
        )
        self._session = requests.Session()
        # No proxies and no .netrc: whether training can reach its reward model must not hang on the environment.
        self._session.trust_env = False
        self._session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE") or True

    def load(self) -> "RemoteScorer":
        """Asks the server once, so that a dead one or an inverted reward is found before training starts."""
        if self.higher_is is not None:
            check_direction(self.__call__, self.higher_is, self.__name__, self.url)
        else:
            self(["Hello."], ["Hello, how can I help you?"])
        return self

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        full_prompt: Sequence[str | Messages] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Args:
            prompts (`Sequence[str | list[dict]]`): Plain or conversational prompts.
            completions (`Sequence[str | list[dict]]`): One per prompt.
            full_prompt (`Sequence[str | list[dict]]`, *optional*): Column with the prompts as they were before
                `long_prompts: truncate_left` shortened them for the policy; read instead of `prompts`.
            **columns: Ignored.

        Returns:
            `list[float | None]`: `sign * score` per completion, in the given order.
        """
        prompts = prompts if full_prompt is None else full_prompt
        if self.encoder is not None:
            inputs = self.encoder(prompts, completions)
        else:
            # The beaver models were trained with this end of the response; other texts hold theirs in the template.
            end = "</s>" if self.template == "beaver" else ""
            pairs = zip(prompts, completions, strict=True)
            inputs = [render(prompt, completion, self.template, end) + end for prompt, completion in pairs]
        scores = []
        for start in range(0, len(inputs), self.batch_size):
            scores += self._ask(inputs[start : start + self.batch_size])
        return finite_or(scores, self.sign, self.nan, f"remote reward model '{self.__name__}' ({self.url})")

    def _ask(self, inputs: list) -> list[float | None]:
        body = json.dumps(
            {**({"model": self.model} if self.model else {}), "input": inputs, **self.extra_body}
        ).encode()
        retry = _Retry(self.retries, backoff_factor=self.backoff, allowed_methods=None)
        while True:
            try:
                response = self._post(body)
                if response.status_code not in _RETRIED_STATUS:
                    return list(self._scores(response, len(inputs)))
                reason, raw = f"status {response.status_code}: {_start_of(response)}", response.raw
            except requests.Timeout:
                reason, raw = f"no answer within {self.timeout:g} seconds", None
            except requests.RequestException as error:
                reason, raw = str(error), None
            try:
                retry = retry.increment("POST", self.url, response=raw)
            except urllib3.exceptions.MaxRetryError as error:
                raise RewardError(
                    f"remote reward model '{self.__name__}' gave no answer in {self.retries + 1} attempts: {reason}. "
                    f"Is {self.url} up? If it is only slow, raise timeout or lower batch_size."
                ) from error
            retry.sleep(raw)

    def _post(self, body: bytes) -> requests.Response:
        """The answer, after redirections, which requests would follow by another method or without the body."""
        url, who = self.url, f"remote reward model '{self.__name__}'"
        for _ in range(_MAX_REDIRECTS + 1):
            try:
                response = self._session.post(
                    url, data=body, headers=self.headers, timeout=self.timeout, allow_redirects=False
                )
                if not response.is_redirect:
                    return response
                target = urllib.parse.urljoin(url, response.headers["Location"])
                is_same = _server(target) == _server(url)
            except requests.RequestException:
                raise
            except ValueError as error:  # of the target, also within requests
                raise RewardError(f"{who}: {url} redirects to what is no URL ({error}).") from error
            if not is_same:
                raise RewardError(
                    f"{who}: {url} redirects to another server, {target}. If you trust it, set url to it."
                )
            url = target
        raise RewardError(f"{who}: {self.url} redirects more than {_MAX_REDIRECTS} times.")

    def _scores(self, response: requests.Response, expected: int) -> Iterator[float]:
        if response.status_code >= 300:
            raise RewardError(
                f"remote reward model '{self.__name__}': {self.url} refused the request with status "
                f"{response.status_code}: {_start_of(response)}"
            )
        try:
            items = json.loads(response.content)["data"]
            if len(items) != expected:
                raise ValueError(f"{len(items)} scores for {expected} texts")
            by_index = sorted(items, key=lambda item: item["index"])
            if [item["index"] for item in by_index] != list(range(expected)):
                raise ValueError("the indices do not count the texts")
            for item in by_index:
                yield _one_number(item["probs"] if "probs" in item else item["data"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise RewardError(
                f"remote reward model '{self.__name__}': the answer of {self.url} is not that of a reward model "
                f"({error!r}): {response.content[:200]!r}"
            ) from error


def _start_of(response: requests.Response) -> str:
    return response.content[:500].decode(errors="replace").strip()


def _server(url: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _skipped_end(model: str | None) -> int | None:
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None  # a folder with a tokenizer alone
    return padding_token(config) if scores_last_token(config) else None


def _one_number(value: Any) -> float:
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"{len(value)} values per text; a reward model has one label")
        return _one_number(value[0])
    if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
        raise ValueError(f"{value!r} is no number")
    return float("nan") if value is None else float(value)
