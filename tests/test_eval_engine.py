"""Completions that survive a kill, and the decoding behind them."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer, save_tiny_policy
from transformers import AutoModelForCausalLM, GenerationConfig

from gd2po_trl.errors import UsageError
from gd2po_trl.evaluation.decoding import batches_by_length
from gd2po_trl.evaluation.intervals import wilson_interval
from gd2po_trl.evaluation.predictions import EvalRow, PredictionLog, parse_predictions, read_predictions
from gd2po_trl.evaluation.running import generate_predictions, write_results
from gd2po_trl.evaluation.settings import GenerationSettings, fingerprint_model


def make_rows(count: int) -> list[EvalRow]:
    return [
        EvalRow(f"row/{index}", [{"role": "user", "content": f"{index} " + "ab" * (7 * index % 11)}])
        for index in range(count)
    ]


def settings_for(model: Path, **changes) -> GenerationSettings:
    return GenerationSettings(**{"model": str(model), "max_new_tokens": 6, "batch_size": 2, **changes})


def greedy_ids(model: Path, row: EvalRow, count: int = 6) -> tuple[list[int], list[int]]:
    """Prompt and completion ids by the plainest loop: no cache, no padding, no `generate`."""
    prompt = byte_tokenizer()(f"<|user|>{row.prompt[0]['content']}<|end|><|assistant|>")["input_ids"]
    policy, ids = AutoModelForCausalLM.from_pretrained(model), list(prompt)
    for _ in range(count):
        ids.append(policy(torch.tensor([ids])).logits[0, -1].argmax().item())
    return prompt, ids[len(prompt) :]


class TestBatches:
    @settings(deadline=None)
    @given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 7))
    def test_every_index_once_longest_first(self, lengths, batch_size):
        batches = batches_by_length(lengths, batch_size)
        flat = [index for batch in batches for index in batch]
        assert sorted(flat) == list(range(len(lengths)))
        assert [lengths[index] for index in flat] == sorted(lengths, reverse=True)
        assert all(len(batch) == batch_size for batch in batches[:-1])


class TestPredictionLog:
    identity = {"model": "sha256:a", "max_new_tokens": 8}

    def complete(self, folder: Path, rows: list[EvalRow]) -> None:
        """Fills in what is missing, in an order that is not that of the rows, two rows at a time."""
        with PredictionLog(folder, self.identity, rows) as log:
            todo = [row for row in reversed(rows) if row.id not in log.done]
            for start in range(0, len(todo), 2):
                log.append(
                    [
                        {"id": row.id, "completion": f"é\u2028\n{row.id}", "prompt_sha256": row.prompt_sha256}
                        for row in todo[start : start + 2]
                    ]
                )
            log.finish()

    @settings(deadline=None, max_examples=50)
    @given(cut=st.floats(0, 1), rows=st.integers(1, 9))
    def test_resumes_from_any_byte(self, tmp_path_factory, cut, rows):
        rows = make_rows(rows)
        folder = tmp_path_factory.mktemp("log")
        self.complete(folder, rows)
        file = folder / "predictions.jsonl"
        whole = file.read_bytes()
        assert [json.loads(line)["id"] for line in whole.split(b"\n")[:-1]] == [row.id for row in rows]

        torn = whole[: round(cut * len(whole))]
        file.write_bytes(torn)
        with PredictionLog(folder, self.identity, rows) as log:
            assert len(log.done) == torn.count(b"\n")
        self.complete(folder, rows)
        assert file.read_bytes() == whole

    def test_other_settings_are_named(self, tmp_path):
        self.complete(tmp_path, make_rows(1))
        with pytest.raises(UsageError, match="max_new_tokens was 8 and is now 9"):
            PredictionLog(tmp_path, {**self.identity, "max_new_tokens": 9}, make_rows(1)).__enter__()

    def test_other_prompts_are_refused(self, tmp_path):
        self.complete(tmp_path, make_rows(2))
        other = [EvalRow("row/1", [{"role": "user", "content": "another question"}])]
        with pytest.raises(UsageError, match=r"row/1.*another prompt"):
            PredictionLog(tmp_path, self.identity, other).__enter__()

    def test_rows_beyond_the_request_survive(self, tmp_path):
        rows = make_rows(4)
        self.complete(tmp_path, rows)
        whole = (tmp_path / "predictions.jsonl").read_bytes()
        self.complete(tmp_path, rows[:2])
        assert (tmp_path / "predictions.jsonl").read_bytes() == whole

    def test_second_process_is_refused(self, tmp_path):
        with PredictionLog(tmp_path, self.identity, make_rows(1)):
            with pytest.raises(UsageError, match="Another evaluation"):
                PredictionLog(tmp_path, self.identity, make_rows(1)).__enter__()
        PredictionLog(tmp_path, self.identity, make_rows(1)).__enter__().__exit__()

    def test_predictions_of_unknown_origin_are_refused(self, tmp_path):
        (tmp_path / "predictions.jsonl").write_text('{"id": "row/0", "completion": "x"}\n')
        with pytest.raises(UsageError, match=r"without run\.json"):
            PredictionLog(tmp_path, self.identity, make_rows(1)).__enter__()

    def test_a_write_that_fails_half_way_leaves_whole_lines(self, tmp_path):
        rows = make_rows(3)
        records = [{"id": row.id, "completion": "x" * 400, "prompt_sha256": row.prompt_sha256} for row in rows]
        with PredictionLog(tmp_path, self.identity, rows) as log:
            log.append(records[:1])
            whole = log.path.read_bytes()
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            # The kernel writes up to the limit and reports a short write, as on a full disk.
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 300, hard))
            try:
                with pytest.raises(UsageError, match=r"Cannot write .*predictions\.jsonl: File too large.*are kept"):
                    log.append(records[1:])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            assert (log.path.read_bytes(), list(log.done)) == (whole, ["row/0"])
            log.append(records[1:2])
        with PredictionLog(tmp_path, self.identity, rows) as log:
            assert list(log.done) == ["row/0", "row/1"]

    @pytest.mark.parametrize("content", ["{", "[1]"])
    def test_damaged_run_file_is_named(self, tmp_path, content):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(UsageError, match=r"run\.json is damaged"):
            PredictionLog(tmp_path, self.identity, make_rows(1)).__enter__()

    def test_a_folder_that_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("x")
        for folder in (tmp_path / "file", tmp_path / "file" / "run"):
            with pytest.raises(UsageError, match=r"Cannot write to a folder .*file"):
                PredictionLog(folder, self.identity, make_rows(1)).__enter__()
            with pytest.raises(UsageError, match=r"Cannot write to a folder .*file"):
                write_results(folder, {}, [])

    def test_damage_before_the_last_line_is_an_error(self, tmp_path):
        self.complete(tmp_path, make_rows(3))
        file = tmp_path / "predictions.jsonl"
        lines = file.read_bytes().split(b"\n")
        file.write_bytes(b"\n".join([lines[0], lines[1][:10], *lines[2:]]))
        with pytest.raises(UsageError, match="line 2"):
            PredictionLog(tmp_path, self.identity, make_rows(3)).__enter__()


class TestReadPredictions:
    def test_published_result_file(self):
        published = json.dumps(
            {"row/0": {"raw_output": "a", "tool_calls": []}, "row/1": {"raw_output": "b"}}, indent=4
        )
        for content in (published, json.dumps(json.loads(published))):
            assert parse_predictions(content.encode(), "result.json") == {
                "row/0": {"id": "row/0", "completion": "a"},
                "row/1": {"id": "row/1", "completion": "b"},
            }

    def test_line_separators_inside_a_text(self):
        content = '{"id": "row/0", "completion": "a\u2028b\x85c"}\r\n\r\n{"id": "row/1", "completion": ""}\r\n'
        predictions = parse_predictions(content.encode(), "given.jsonl")
        assert [record["completion"] for record in predictions.values()] == ["a\u2028b\x85c", ""]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"id": "row/0", "completion": "a"}\n{"id": "row/0", "completion": "b"}', "line 2: a second completion"),
            ('{"id": "row/0", "completion": "a"}\n{"id": "row/1"}', "line 2: each line needs"),
            ('{"id": "row/0", "completion": 3}', "line 1: each line needs"),
            ("[" * 100_000, "line 1: not a JSON object"),
            ('{"id": "row/7", "completion": "a"}', "no completion for any row"),
            ("", "no completion for any row"),
        ],
    )
    def test_bad_files_are_named(self, tmp_path, content, message):
        file = tmp_path / "given.jsonl"
        file.write_text(content)
        with pytest.raises(UsageError, match=message):
            read_predictions(file, make_rows(2))

    def test_missing_file(self, tmp_path):
        with pytest.raises(UsageError, match="Cannot read the predictions"):
            read_predictions(tmp_path / "none.jsonl", make_rows(1))


class TestGeneration:
    def test_equals_one_by_one_generation(self, tiny_policy, tmp_path):
        rows = make_rows(7)
        predictions = generate_predictions(rows, settings_for(tiny_policy), tmp_path)
        assert list(predictions) == [row.id for row in rows]

        tokenizer = byte_tokenizer()
        for row in rows:
            prompt, ids = greedy_ids(tiny_policy, row)
            assert tokenizer.eos_token_id not in ids
            assert predictions[row.id]["completion"] == tokenizer.decode(ids, skip_special_tokens=True)
            assert predictions[row.id]["prompt_tokens"] == len(prompt)
            assert predictions[row.id]["completion_tokens"] == 6
        assert [json.loads(line)["id"] for line in open(tmp_path / "predictions.jsonl")] == [row.id for row in rows]

    def test_generation_config_of_the_model(self, tiny_policy, tmp_path):
        """Its stop tokens count; a repetition penalty and sampling do not."""
        rows = make_rows(3)
        _, ids = greedy_ids(tiny_policy, rows[1])
        model = shutil.copytree(tiny_policy, tmp_path / "model")
        GenerationConfig(
            repetition_penalty=0.001, do_sample=True, temperature=5.0, eos_token_id=[1, ids[3]]
        ).save_pretrained(model)
        stopped = generate_predictions(rows, settings_for(model), tmp_path / "stopped")
        first = ids.index(ids[3])
        assert stopped["row/1"]["finish_reason"] == "stop"
        assert stopped["row/1"]["completion_tokens"] == first
        assert stopped["row/1"]["completion"] == byte_tokenizer().decode(ids[:first], skip_special_tokens=True)

    def test_context_window(self, tmp_path):
        model = save_tiny_policy(tmp_path / "model", max_position_embeddings=40)
        rows = [EvalRow("long", [{"role": "user", "content": "x" * 50}])]
        rows += [EvalRow("tight", [{"role": "user", "content": "x" * 33}]), EvalRow("short", make_rows(1)[0].prompt)]
        predictions = generate_predictions(rows, settings_for(model, batch_size=3), tmp_path / "run")
        assert "context window of 40" in predictions["long"]["error"]
        assert predictions["long"]["completion"] == ""
        assert predictions["tight"]["prompt_tokens"] == 36
        assert "error" not in predictions["short"]

    def test_a_smaller_context_window(self, tiny_policy, tmp_path):
        """The published script asks for 4,096 tokens, prompt and completion together."""
        rows = [EvalRow("long", [{"role": "user", "content": "x" * 50}])]
        rows += [EvalRow("tight", [{"role": "user", "content": "x" * 33}])]
        settings = settings_for(tiny_policy, max_model_len=40, max_new_tokens=40)
        predictions = generate_predictions(rows, settings, tmp_path / "run")
        assert "context window of 40" in predictions["long"]["error"]
        assert predictions["tight"]["completion_tokens"] <= 4
        assert json.loads((tmp_path / "run" / "run.json").read_text())["max_model_len"] == 40

    @pytest.mark.parametrize("batch_size", [1, 2, 5])
    def test_room_for_a_completion_is_that_of_its_prompt(self, tmp_path, batch_size):
        """Up to the end of the context window, whatever the length of the prompts beside it."""
        model = save_tiny_policy(tmp_path / "model", max_position_embeddings=40)
        rows = [EvalRow(f"row/{count}", [{"role": "user", "content": "x" * count}]) for count in (1, 20, 33, 10, 30)]
        settings = settings_for(model, batch_size=batch_size, max_new_tokens=25)
        for row, record in zip(rows, generate_predictions(rows, settings, tmp_path / "run").values(), strict=True):
            _, ids = greedy_ids(model, row, min(25, 40 - record["prompt_tokens"]))
            assert byte_tokenizer().eos_token_id not in ids
            assert record["completion_tokens"] == len(ids)
            assert record["completion"] == byte_tokenizer().decode(ids, skip_special_tokens=True)

    def test_a_stop_token_ends_a_completion_in_a_full_context(self, tmp_path):
        model = save_tiny_policy(tmp_path / "model", max_position_embeddings=40)
        rows = [EvalRow(f"row/{count}", [{"role": "user", "content": "x" * count}]) for count in (1, 30)]
        _, ids = greedy_ids(model, rows[0], 20)
        GenerationConfig(eos_token_id=[ids[12]]).save_pretrained(model)
        stopped = generate_predictions(rows, settings_for(model, max_new_tokens=30), tmp_path / "run")["row/1"]
        assert (stopped["finish_reason"], stopped["completion_tokens"]) == ("stop", ids.index(ids[12]))

    def test_variables_of_the_chat_template(self, tiny_policy, tmp_path):
        model = shutil.copytree(tiny_policy, tmp_path / "model")
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = "{{ date_string | default('today') }}" + tokenizer.chat_template
        tokenizer.save_pretrained(model)
        rows, date = make_rows(2), {"date_string": "26 Jul 2024"}
        dated = settings_for(model, chat_template_kwargs=date)
        predictions = generate_predictions(rows, dated, tmp_path / "run")
        plain = generate_predictions(rows, settings_for(model), tmp_path / "plain")
        for row in rows:
            assert predictions[row.id]["prompt_tokens"] == plain[row.id]["prompt_tokens"] + len("26 Jul 2024") - 5
        with pytest.raises(
            UsageError, match=r"chat_template_kwargs was \{'date_string': '26 Jul 2024'\} and is now None"
        ):
            generate_predictions(rows, settings_for(model), tmp_path / "run")
        # The limit counts them as well.
        for limit in (predictions["row/0"]["prompt_tokens"], 30):
            short = settings_for(model, chat_template_kwargs=date, max_prompt_tokens=limit)
            records = generate_predictions(rows, short, tmp_path / str(limit))
            assert max(record["prompt_tokens"] for record in records.values()) <= limit
        assert settings_for(model).identity() == settings_for(model, chat_template_kwargs={}).identity()

    def test_long_prompts_lose_their_oldest_turns(self, tiny_policy, tmp_path):
        turns = [
            {"role": "user", "content": "old " * 20},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "new question"},
        ]
        rows = [EvalRow("whole", turns[2:]), EvalRow("cut", turns)]
        predictions = generate_predictions(rows, settings_for(tiny_policy, max_prompt_tokens=30), tmp_path)
        assert predictions["cut"]["completion"] == predictions["whole"]["completion"]
        assert predictions["cut"]["prompt_tokens"] == predictions["whole"]["prompt_tokens"]

    def test_adapter(self, tiny_policy, tmp_path):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(3)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tiny_policy),
            LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
        )
        model.save_pretrained(tmp_path / "adapter")
        rows = make_rows(3)
        plain = generate_predictions(rows, settings_for(tiny_policy), tmp_path / "plain")
        adapted = generate_predictions(
            rows, settings_for(tiny_policy, adapter=str(tmp_path / "adapter")), tmp_path / "adapted"
        )
        alone = generate_predictions(rows, settings_for(tmp_path / "adapter"), tmp_path / "alone")
        assert alone == adapted != plain

    def test_weights_are_part_of_the_identity(self, tiny_policy, tmp_path):
        rows = make_rows(1)
        model = shutil.copytree(tiny_policy, tmp_path / "model")
        before = fingerprint_model(str(model), "config.json")
        generate_predictions(rows, settings_for(model), tmp_path / "run")
        save_tiny_policy(model, seed=9)
        assert fingerprint_model(str(model), "config.json") != before
        with pytest.raises(UsageError, match=r"other settings: model was 'sha256:"):
            generate_predictions(rows, settings_for(model), tmp_path / "run")

    def test_a_run_in_the_folder_of_its_model_goes_on(self, tiny_policy, tmp_path):
        model = shutil.copytree(tiny_policy, tmp_path / "model")
        before = fingerprint_model(str(model), "config.json")
        first = generate_predictions(make_rows(2), settings_for(model), model)
        write_results(model, {"task": "x"}, [])
        assert fingerprint_model(str(model), "config.json") == before
        assert first.items() <= generate_predictions(make_rows(3), settings_for(model), model).items()
        with pytest.raises(UsageError, match=r"delete run\.json and predictions\.jsonl in it"):
            generate_predictions(make_rows(3), settings_for(model, max_new_tokens=9), model)

    def test_damaged_models_are_named(self, tiny_policy, tmp_path):
        damages = {
            "weights": lambda model: os.truncate(model / "model.safetensors", 5000),
            "no weights": lambda model: (model / "model.safetensors").unlink(),
            "tokenizer": lambda model: os.truncate(model / "tokenizer.json", 500),
            "no tokenizer": lambda model: [file.unlink() for file in model.glob("tokenizer*")],
            "config": lambda model: os.truncate(model / "config.json", 50),
        }
        for name, damage in damages.items():
            model = shutil.copytree(tiny_policy, tmp_path / name)
            damage(model)
            with pytest.raises(UsageError, match=f"Cannot load .*{name}") as error:
                generate_predictions(make_rows(1), settings_for(model), tmp_path / f"run of {name}")
            assert "\n" not in str(error.value)

    @pytest.mark.parametrize("content", ["[1]", "{", '{"base_model_name_or_path": 3}'])
    def test_damaged_adapter_config_is_named(self, tmp_path, content):
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(UsageError, match=r"adapter_config\.json names no base model"):
            settings_for(tmp_path)

    def test_batch_size_may_change_between_runs(self, tiny_policy, tmp_path):
        rows = make_rows(5)
        first = generate_predictions(rows[:2], settings_for(tiny_policy), tmp_path)
        both = generate_predictions(rows, settings_for(tiny_policy, batch_size=5), tmp_path)
        assert {key: both[key] for key in first} == first

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": "no/such/folder"}, "No model 'no/such/folder'"),
            ({"backend": "sglang"}, "backend is 'sglang'"),
            ({"max_new_tokens": 0}, "max_new_tokens is 0"),
            ({"dtype": "int8"}, "dtype is 'int8'"),
            ({"max_model_len": 0}, "max_model_len is 0"),
            ({"max_model_len": 10**6}, "max_model_len is 1000000; the context window"),
            ({"tensor_parallel_size": 2}, "tensor_parallel_size is a setting of vLLM"),
            ({"backend": "vllm", "gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5"),
        ],
    )
    def test_mistakes_are_named(self, tiny_policy, tmp_path, changes, message):
        with pytest.raises(UsageError, match=message):
            generate_predictions(make_rows(1), settings_for(**{"model": tiny_policy, **changes}), tmp_path)
        assert not (tmp_path / "predictions.jsonl").exists()

    def test_rows_with_one_name(self, tiny_policy, tmp_path):
        with pytest.raises(UsageError, match="Two rows are called 'row/0'"):
            generate_predictions([*make_rows(2), *make_rows(1)], settings_for(tiny_policy), tmp_path)


KILLED = """
import os, signal, sys
from gd2po_trl.evaluation import decoding

complete, calls = decoding.TransformersDecoder._complete, []

def complete_twice(self, prompts):
    calls.append(complete(self, prompts))
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return calls[-1]

decoding.TransformersDecoder._complete = complete_twice
from gd2po_trl.cli import main
main(sys.argv[1:])
"""


def test_sigkill_loses_at_most_the_batch_in_flight(tiny_policy, tmp_path):
    """A command killed in its third batch and repeated leaves the same files as one that was never killed."""
    from gd2po_trl.cli import main

    for level, count in ((1, 4), (2, 2), (3, 3)):
        rows = [
            {
                "system": "Tools: f",
                "user": f"level {level}, " + "please " * (5 * index % 7),
                "answer": [{"name": "f", "parameters": {"x": str(index)}}],
            }
            for index in range(count)
        ]
        (tmp_path / f"level-{level}-api_processed.json").write_text(json.dumps(rows))
    command = ["eval", "api-bank", "--model", str(tiny_policy), "--data", str(tmp_path), "--batch-size", "2"]
    command += ["--max-new-tokens", "12", "--output"]

    killed = tmp_path / "killed"
    process = subprocess.run([sys.executable, "-c", KILLED, *command, str(killed)], capture_output=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert (killed / "predictions.jsonl").read_bytes().count(b"\n") == 4
    assert not (killed / "results.json").exists()
    with open(killed / "predictions.jsonl", "ab") as file:
        file.write(b'{"id": "Level1_3", "comple')

    assert main([*command, str(killed)]) == 0
    assert main([*command, str(tmp_path / "whole")]) == 0
    for name in ("predictions.jsonl", "scores.jsonl", "results.json", "run.json"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((killed / "results.json").read_text())["overall"]["rows"] == 9


class TestVLLM:
    def test_absent(self, tiny_policy, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "vllm", None)
        with pytest.raises(UsageError, match=r"pip install .*\[vllm\]"):
            generate_predictions(make_rows(1), settings_for(tiny_policy, backend="vllm"), tmp_path)

    def test_gets_the_same_tokens(self, tiny_policy, tmp_path, monkeypatch):
        """Against a stand-in with the signatures of vLLM 0.33, since vLLM itself needs a GPU."""
        seen = {}

        class SamplingParams:
            def __init__(self, *, temperature, max_tokens, stop_token_ids):
                assert temperature == 0.0
                self.max_tokens, self.stop_token_ids = max_tokens, stop_token_ids

        class LLM:
            def __init__(self, model, *, tokenizer=None, dtype="auto", seed=0, max_model_len=None, **options):
                seen.update(max_model_len=max_model_len, options=options)
                self.model = AutoModelForCausalLM.from_pretrained(model)

            def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
                outputs = []
                for prompt in prompts:
                    ids = torch.tensor([prompt["prompt_token_ids"]])
                    config = GenerationConfig(
                        max_new_tokens=sampling_params.max_tokens,
                        eos_token_id=sampling_params.stop_token_ids,
                        pad_token_id=0,
                        do_sample=False,
                    )
                    new = self.model.generate(ids, generation_config=config)[0, ids.shape[1] :].tolist()
                    outputs.append(types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(new))]))
                return outputs

        stand_in = types.SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams)
        monkeypatch.setitem(sys.modules, "vllm", stand_in)
        rows = make_rows(5)
        ours = generate_predictions(rows, settings_for(tiny_policy), tmp_path / "transformers")
        theirs = generate_predictions(rows, settings_for(tiny_policy, backend="vllm"), tmp_path / "vllm")
        assert theirs == ours
        assert seen["max_model_len"] == max(record["prompt_tokens"] for record in ours.values()) + 6
        assert seen["options"] == {}
        spread = {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.6}
        settings = settings_for(tiny_policy, backend="vllm", max_model_len=30, **spread)
        generate_predictions(rows, settings, tmp_path / "spread")
        assert (seen["max_model_len"], seen["options"]) == (30, spread)


class TestResults:
    def test_files(self, tmp_path):
        path = write_results(tmp_path, {"task": "x"}, [{"id": "row/0", "score": 1}])
        results = json.loads(path.read_text())
        assert results["task"] == "x"
        assert {"python", "torch", "transformers", "trl"} <= results["versions"].keys()
        assert (tmp_path / "scores.jsonl").read_text() == '{"id": "row/0", "score": 1}\n'

    @pytest.mark.parametrize(
        ("successes", "trials", "expected"),
        [(0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (375, 597, (0.5887, 0.6660)), (0, 0, (0.0, 1.0))],
    )
    def test_wilson_interval(self, successes, trials, expected):
        """Reference values from scipy's `binomtest(...).proportion_ci(method="wilson")`."""
        assert wilson_interval(successes, trials) == pytest.approx(expected, abs=5e-5)
