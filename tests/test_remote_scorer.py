"""A served reward model, against a real HTTP server that answers, dawdles, fails or talks nonsense."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from score_heads import letter_tokenizer, save_qwen2_score_head
from tiny import byte_tokenizer, tiny_config
from transformers import LlamaForSequenceClassification

from gd2po_trl.errors import UsageError
from gd2po_trl.reward_guard import RewardError
from gd2po_trl.reward_models.in_process import RewardModel
from gd2po_trl.reward_models.served import RemoteScorer
from gd2po_trl.rewards import resolve_reward


class Server:
    """Answers each POST with the next of `behaviors`, and with the last one from then on; keeps the requests."""

    def __init__(self):
        self.requests, self.behaviors = [], [classify]
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((self.path, dict(self.headers), body))
                behavior = server.behaviors.pop(0) if len(server.behaviors) > 1 else server.behaviors[0]
                behavior(self, body)

            def do_GET(self):
                server.requests.append((self.path, dict(self.headers), None))
                send(self, {"data": []})

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def bodies(self):
        return [body for _, _, body in self.requests]


def send(handler, payload, status=200):
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def score_of(item):
    """The toy model: the number of characters, or of token ids."""
    return float(len(item))


def classify(handler, body):
    """As vLLM's /classify; backwards, since the index, not the place, says which text is meant."""
    data = [
        {"index": index, "label": "LABEL_0", "probs": [score_of(item)], "num_classes": 1}
        for index, item in enumerate(body["input"])
    ]
    send(handler, {"id": "classify-1", "object": "list", "model": "m", "data": data[::-1], "usage": {}})


def pooling(handler, body):
    data = [{"index": i, "object": "pooling", "data": [score_of(item)]} for i, item in enumerate(body["input"])]
    send(handler, {"id": "pool-1", "object": "list", "model": "m", "data": data, "usage": {}})


def fail(status, message=b"busy"):
    return lambda handler, body: send(handler, message, status)


def always(payload):
    return lambda handler, body: send(handler, payload)


def hang(handler, body):
    time.sleep(3)


def cut_off(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"data": [')


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def scorer(server, route="", **options):
    settings = {"template": "{prompt}|{response}", "timeout": 5.0, "backoff": 0.0}
    return RemoteScorer(server.url + route, **{**settings, **options})


@pytest.mark.parametrize(("route", "behavior"), [("", classify), ("/v1/classify", classify), ("/pooling", pooling)])
def test_scores_come_back_in_order(server, route, behavior):
    server.behaviors = [behavior]
    reward = scorer(server, route, model="rm", batch_size=2, headers={"Authorization": "Bearer x"})
    assert reward(["a", "b", "c"], ["1", "22", "333"]) == [3.0, 4.0, 5.0]
    paths, headers, bodies = zip(*server.requests, strict=True)
    assert set(paths) == {route or "/classify"}
    assert headers[0]["Authorization"] == "Bearer x"
    assert bodies == (
        {"model": "rm", "input": ["a|1", "b|22"], "use_activation": False},
        {"model": "rm", "input": ["c|333"], "use_activation": False},
    )


def test_sign_and_further_fields(server):
    reward = scorer(server, sign=-1, extra_body={"activation": False})
    assert reward(["a"], ["1"]) == [-3.0]
    assert server.bodies == [{"input": ["a|1"], "activation": False}]


def test_token_ids_are_those_of_the_local_model(server, tmp_path):
    folder = save_qwen2_score_head(tmp_path / "model", byte_tokenizer())
    prompts = [[{"role": "user", "content": "Hi."}], [{"role": "user", "content": "How are you? " * 20}]]
    completions = [[{"role": "assistant", "content": "Hello."}], [{"role": "assistant", "content": "Fine."}]]
    reward = scorer(server, tokenizer=str(folder), template="chat", max_length=64)
    rewards = reward(prompts, completions)
    expected = RewardModel(str(folder), max_length=64).encoder(prompts, completions)
    assert server.bodies[0]["input"] == expected
    assert rewards == [float(len(expected[0])), 64.0]


def test_beaver_texts_end_with_the_end_of_sequence_token(server):
    scorer(server, template="beaver")(["Hi."], ["Hello."])
    assert server.bodies[0]["input"] == ["BEGINNING OF CONVERSATION: USER: Hi. ASSISTANT:Hello.</s>"]


def test_no_completions_no_request(server):
    assert scorer(server)([], []) == []
    assert server.requests == []


def test_transient_failures_are_retried(server):
    server.behaviors = [fail(503), fail(429), cut_off, classify]
    assert scorer(server, retries=3)(["a"], ["1"]) == [3.0]
    assert len(server.requests) == 4


def test_backoff_doubles(server, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.behaviors = [fail(500)]
    with pytest.raises(RewardError, match=r"'safety' gave no answer in 4 attempts: status 500: busy.*/classify up\?"):
        scorer(server, name="safety", backoff=0.5)(["a"], ["1"])
    assert pauses == [0.5, 1.0, 2.0]


def test_refused_request_is_not_repeated(server):
    server.behaviors = [fail(400, b'{"error": "model `x` does not exist"}')]
    with pytest.raises(RewardError, match=r"refused the request with status 400: .*model `x` does not exist"):
        scorer(server)(["a"], ["1"])
    assert len(server.requests) == 1


def test_hanging_server_ends_in_an_error(server):
    server.behaviors = [hang]
    with pytest.raises(RewardError, match=r"gave no answer in 1 attempts: no answer within 0\.3 seconds"):
        scorer(server, timeout=0.3, retries=0)(["a"], ["1"])


def test_dead_server_is_named(server):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(
        RewardError, match=r"no answer in 2 attempts: .*refused.*Is http://127\.0\.0\.1:\d+/classify up"
    ):
        scorer(server, retries=1).load()


def item(index=0, **fields):
    return {"index": index, **fields}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>", "is not that of a reward model"),
        (b"\xff\xfe", "is not that of a reward model"),
        (b"[" * 100_000, "is not that of a reward model"),
        ([], "is not that of a reward model"),
        ({"error": "no"}, "KeyError"),
        ({"data": None}, "TypeError"),
        ({"data": [item(probs=[1.0])]}, "1 scores for 2 texts"),
        ({"data": [item(probs=[1.0]), item(probs=[1.0])]}, "indices do not count the texts"),
        ({"data": [item(0, probs=[0.1, 0.9]), item(1, probs=[0.1, 0.9])]}, "2 values per text"),
        ({"data": [item(0, data="AAAA"), item(1, data="AAAA")]}, "'AAAA' is no number"),
        ({"data": [item(0, probs=[10**400]), item(1, probs=[1])]}, "OverflowError"),
        ({"data": [item("0", probs=[1]), item(1, probs=[1])]}, "TypeError"),
    ],
)
def test_nonsense_is_one_error(server, answer, message):
    server.behaviors = [always(answer)]
    with pytest.raises(RewardError, match=message) as caught:
        scorer(server, name="safety")(["a", "b"], ["1", "2"])
    assert "'safety'" in str(caught.value) and len(str(caught.value)) < 1000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["data", "index", "probs"]), inner),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(json_values | st.builds(lambda data: {"data": data}, json_values))
def test_no_answer_breaks_the_scorer(server, answer):
    server.behaviors = [always(answer)]
    try:
        (reward,) = scorer(server, nan="skip")(["a"], ["1"])
        assert reward is None or isinstance(reward, float)
    except RewardError:
        pass


def test_scores_that_are_not_finite(server):
    server.behaviors = [always(b'{"data": [{"index": 0, "probs": [NaN]}, {"index": 1, "probs": [null]}]}')]
    assert scorer(server, nan="skip")(["a", "b"], ["1", "2"]) == [None, None]
    with pytest.raises(RewardError, match=r"gave nan for completion 0 of 2\. Set nan: skip"):
        scorer(server)(["a", "b"], ["1", "2"])


def test_load_asks_once_and_checks_the_direction(server):
    server.behaviors = [pooling]
    scorer(server, "/pooling").load()
    assert len(server.requests) == 1
    # Longer is better here, and in the built-in pairs the helpful answers are the longer ones.
    with pytest.warns(UserWarning, match=r"reward 'help' looks inverted.*/pooling"):
        scorer(server, "/pooling", name="help", sign=-1, higher_is="helpful").load()


def test_environment_proxies_are_not_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    assert scorer(server)(["a"], ["1"]) == [3.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "must look like http://host:port/classify"),
        ({"url": "file:///etc/passwd"}, "must look like http://host:port/classify"),
        ({"template": "chat"}, "template 'chat' needs tokenizer"),
        ({"template": "no place"}, "must be 'chat', 'beaver', or a text"),
        ({"timeout": 0}, "timeout=0 must be positive"),
        ({"retries": -1}, "retries=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"nan": "zero"}, "nan='zero'"),
        ({"sign": 0}, "sign=0"),
        ({"higher_is": "nice"}, "higher_is='nice'"),
        ({"tokenizer": "/nowhere/at/all"}, "tokenizer"),
        ({"headers": {"X": 5}}, "a header is no text"),
        ({"headers": "X"}, "headers is a str"),
        ({"extra_body": [1]}, "extra_body is a list"),
        ({"url": "http://user:secret@127.0.0.1:1"}, "holds a password"),
        ({"timeout": "120"}, "timeout='120'"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"retries": 2.5}, "retries=2.5"),
        ({"backoff": None}, "backoff=None"),
        ({"batch_size": True}, "batch_size=True"),
        ({"extra_body": {"x": object()}}, "no request can be made"),
        ({"url": "http://127.0.0.1:99999999"}, "must look like"),
        ({"url": "http://[/"}, "must look like"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        RemoteScorer(**{"url": "http://127.0.0.1:1", "template": "{prompt}{response}", **options})


def redirect(url, status=302):
    def behavior(handler, body):
        handler.send_response(status)
        handler.send_header("Location", url)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return behavior


def test_a_redirection_to_another_server_is_refused(server):
    other = Server()
    try:
        server.behaviors = [redirect(f"{other.url}/classify")]
        with pytest.raises(RewardError, match=rf"redirects to another server, {other.url}/classify"):
            scorer(server, headers={"Authorization": "Bearer x"})(["a"], ["b"])
        assert (len(server.requests), other.requests) == (1, [])
    finally:
        other.http.shutdown()
        other.http.server_close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("absolute", [True, False])
def test_a_redirection_within_the_server_is_followed_with_the_same_request(server, status, absolute):
    location = f"{server.url}/v2/classify" if absolute else "v2/classify"
    server.behaviors = [redirect(location, status), classify]
    assert scorer(server, headers={"Authorization": "Bearer x"})(["a"], ["b"]) == [3.0]
    first, second = server.requests
    assert (first[0], second[0]) == ("/classify", "/v2/classify")
    assert first[2] == second[2] == {"input": ["a|b"], "use_activation": False}
    assert second[1]["Authorization"] == "Bearer x"


@pytest.mark.parametrize("location", ["/classify", "", "http://127.0.0.1:99999999/", "http://[/"])
def test_redirections_that_lead_nowhere_are_one_error(server, location):
    server.behaviors = [redirect(location, 307)]
    with pytest.raises(RewardError, match="redirects"):
        scorer(server, name="safety")(["a"], ["b"])
    assert len(server.requests) <= 6


def test_the_server_says_when_to_come_back(server, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)

    def wait(seconds):
        def behavior(handler, body):
            handler.send_response(429)
            handler.send_header("Retry-After", seconds)
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        return behavior

    server.behaviors = [wait("7"), wait("86400"), classify]
    assert scorer(server, backoff=0.5)(["a"], ["1"]) == [3.0]
    assert pauses == [7, 120]


@pytest.mark.parametrize("padding", ["end", "other", None])
def test_a_server_that_scores_the_last_token_agrees_with_the_model(server, tmp_path, padding):
    """As vLLM pools; the model itself skips what its config calls padding, also at the end of a conversation."""
    torch.manual_seed(1)
    tokenizer = byte_tokenizer()
    pad_token_id = {"end": tokenizer.eos_token_id, "other": 0, None: None}[padding]
    config = tiny_config(num_labels=1, initializer_range=0.5, pad_token_id=pad_token_id)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def last_token(handler, body):
        with torch.no_grad():
            scores = [model.score(model.model(torch.tensor([ids]))[0])[0, -1].item() for ids in body["input"]]
        send(handler, {"data": [{"index": index, "probs": [score]} for index, score in enumerate(scores)]})

    server.behaviors = [last_token]
    remote = RemoteScorer(server.url, tokenizer=str(tmp_path), timeout=5.0)
    texts = ["Hi.", "How are you?"], ["Hello.", ""]
    assert remote(*texts) == pytest.approx(RewardModel(str(tmp_path), dtype="float32")(*texts), abs=1e-5)


def test_tokenizer_without_chat_template(tmp_path):
    letter_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="without a chat template"):
        RemoteScorer("http://127.0.0.1:1", tokenizer=str(tmp_path))


def test_recipe_builds_a_remote_scorer_under_its_label(server):
    reward = resolve_reward("harmless", {"type": "remote_scorer", "url": server.url, "template": "{prompt}{response}"})
    assert reward.__name__ == "harmless"
    assert reward(prompts=["a"], completions=["bc"], completion_ids=[[1]], extra=["x"]) == [3.0]
