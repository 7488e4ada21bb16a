"""The API through the official `openai` client, against a real server around a scripted engine."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from server import read_default_sampling
from tests.fake_engine import (
    CHAT,
    EOS_ID,
    HI,
    PLAIN,
    FakeEngine,
    LiveServer,
    error_of,
    say,
    serving,
)

HI_PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_chat(client: OpenAI, engine: FakeEngine) -> None:
    reply = client.chat.completions.create(model="tiny", messages=HI)
    (choice,) = reply.choices
    assert choice.message.content == "Paris."
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert reply.object == "chat.completion"
    assert reply.model == "tiny"
    assert reply.system_fingerprint.endswith("-predicted-01234567")
    extra = {"sparsity": {"mode": "dense"}}
    reply = client.chat.completions.create(model="tiny", messages=HI, extra_body=extra)
    assert reply.system_fingerprint.endswith("-dense-01234567")
    assert reply.usage.sparsity["mode"] == engine.requests[1].mode == "dense"
    prompt_ids = engine.requests[0].prompt_ids
    assert reply.usage.prompt_tokens == len(prompt_ids)
    assert reply.usage.completion_tokens == len("Paris.") + 1  # the end token was generated too
    assert reply.usage.total_tokens == len(prompt_ids) + 7
    assert reply._request_id.startswith("req_")


def test_the_prompt_is_the_chat_template(
    client: OpenAI, engine: FakeEngine, tokenizer: Any
) -> None:
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    messages = [{"role": "developer", "content": parts}, *HI]
    client.chat.completions.create(model="tiny", messages=messages)
    text = tokenizer.decode(engine.requests[0].prompt_ids)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n" + HI_PROMPT


def test_an_assistant_message_can_be_continued(
    client: OpenAI, engine: FakeEngine, tokenizer: Any
) -> None:
    client.chat.completions.create(
        model="tiny",
        messages=[*HI, {"role": "assistant", "content": "The capital"}],
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )
    assert tokenizer.decode(engine.requests[0].prompt_ids) == HI_PROMPT + "The capital"


def test_chat_stream(client: OpenAI) -> None:
    stream = client.chat.completions.create(model="tiny", messages=HI, stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Paris."
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert len({chunk.created for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_with_usage(client: OpenAI, live: LiveServer) -> None:
    body = {
        "model": "tiny",
        "messages": HI,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    *chunks, last = client.chat.completions.create(**body)
    assert last.choices == []
    assert last.usage.completion_tokens == 7
    assert last.usage.prompt_tokens == len(HI_PROMPT.encode()) - 3 * len("<|im_start|>") + 5
    raw = live.http.post(CHAT, json=body)
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.headers["cache-control"] == "no-cache"
    assert raw.text.count('"usage":null') == len(chunks)
    assert raw.text.endswith("data: [DONE]\n\n")


def test_several_answers(client: OpenAI, engine: FakeEngine) -> None:
    def script(request: Any) -> list[int]:
        return [*f"answer {request.sampling.seed}".encode(), EOS_ID]

    engine.script = script
    body = {"model": "tiny", "messages": HI, "n": 3, "seed": 7}
    reply = client.chat.completions.create(**body)
    assert [c.message.content for c in reply.choices] == ["answer 7", "answer 8", "answer 9"]
    assert [c.index for c in reply.choices] == [0, 1, 2]
    assert reply.usage.prompt_tokens == len(engine.requests[0].prompt_ids)
    assert reply.usage.completion_tokens == 3 * 9
    texts = dict.fromkeys(range(3), "")
    for chunk in client.chat.completions.create(**body, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(texts.values()) == ["answer 7", "answer 8", "answer 9"]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(client: OpenAI, engine: FakeEngine, stream: bool) -> None:
    engine.script = say("one two three four")
    reply = client.chat.completions.create(
        model="tiny", messages=HI, stop=["zzz", " three"], stream=stream
    )
    if stream:
        chunks = list(reply)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        text, reason = "".join(pieces), chunks[-1].choices[0].finish_reason
        assert not any("three".startswith(piece.strip()) for piece in pieces[9:] if piece.strip())
    else:
        text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert (text, reason) == ("one two", "stop")
    assert engine.aborted == [engine.requests[0].id]
    assert engine.num_jobs == 0


def test_a_stop_can_be_included_and_waits_for_min_tokens(
    client: OpenAI, engine: FakeEngine
) -> None:
    engine.script = say("a-b-c")
    extra = {"include_stop_str_in_output": True, "min_tokens": 3}
    reply = client.chat.completions.create(model="tiny", messages=HI, stop="-", extra_body=extra)
    assert reply.choices[0].message.content == "a-b-"


def test_a_length_limit(client: OpenAI, engine: FakeEngine) -> None:
    reply = client.chat.completions.create(model="tiny", messages=HI, max_completion_tokens=3)
    assert reply.choices[0].message.content == "Par"
    assert reply.choices[0].finish_reason == "length"
    extra = {"ignore_eos": True, "max_tokens": 9}
    reply = client.chat.completions.create(model="tiny", messages=HI, extra_body=extra)
    assert reply.choices[0].message.content == "Paris.Pa"  # the end token shows no text
    assert reply.usage.completion_tokens == 9


def test_characters_are_never_split(client: OpenAI, engine: FakeEngine) -> None:
    engine.script = say("Zürich 🙂 東京")
    chunks = client.chat.completions.create(model="tiny", messages=HI, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == "Zürich 🙂 東京"
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: OpenAI, engine: FakeEngine, stream: bool) -> None:
    engine.script = say("né stop")
    reply = client.chat.completions.create(
        model="tiny", messages=HI, logprobs=True, top_logprobs=2, stop=" stop", stream=stream
    )
    choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
    content = [token for c in choices if c.logprobs for token in c.logprobs.content]
    assert bytes(byte for token in content for byte in token.bytes).decode() == "né"
    assert [token.token for token in content] == ["n", "\ufffd", "\ufffd"]
    assert all(token.logprob == -0.25 and len(token.top_logprobs) == 2 for token in content)
    assert content[0].top_logprobs[1].token == "o"
    assert engine.requests[0].sampling.num_logprobs == 2


@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, {"messages": HI}), (PLAIN, {"prompt": "a"}), ("/v1/responses", {"input": "hi"})],
)
def test_the_cache_salt_reaches_the_engine(
    live: LiveServer, engine: FakeEngine, path: str, body: Any
) -> None:
    for fields in ({"cache_salt": "s3cret"}, {}, {"cache_salt": None}):
        assert live.http.post(path, json={**body, **fields}).status_code == 200
    assert [request.cache_salt for request in engine.requests] == ["s3cret", "", ""]
    for bad in ("", 5):
        reply = live.http.post(path, json={**body, "cache_salt": bad})
        assert (reply.status_code, error_of(reply)["param"]) == (400, "cache_salt")


def test_every_sampling_field_reaches_the_engine(client: OpenAI, engine: FakeEngine) -> None:
    client.chat.completions.create(
        model="tiny", messages=HI, temperature=0.5, top_p=0.9, seed=-3, max_tokens=50,
        presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={"65": -100}, logprobs=True,
        extra_body={
            "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "stop_token_ids": [10],
            "min_tokens": 2, "ignore_eos": True,
        },
    )  # fmt: skip
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 40)
    assert (sampling.min_p, sampling.seed, sampling.max_tokens) == (0.05, -3, 50)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.1, {65: -100})
    assert (sampling.stop_token_ids, sampling.min_tokens) == ((10,), 2)
    assert sampling.ignore_eos
    assert sampling.num_logprobs == 0


def test_defaults_without_a_word_from_the_model(client: OpenAI, engine: FakeEngine) -> None:
    client.chat.completions.create(model="tiny", messages=HI, extra_body={"top_k": -1})
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert sampling.max_tokens is None  # the room that is left
    assert sampling.num_logprobs is None


def test_the_model_folder_sets_defaults(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_k": 50, "top_p": null, "eos_token_id": 2}'
    )
    defaults = read_default_sampling(tmp_path)
    assert defaults == {"temperature": 0.6, "top_k": 50}
    with serving(FakeEngine(), tokenizer, default_sampling=defaults) as live:
        for extra in ({}, {"temperature": 0}):
            live.http.post(CHAT, json={"messages": HI, **extra})
        first, second = (request.sampling for request in live.engine.requests)
        assert (first.temperature, first.top_k, first.top_p) == (0.6, 50, 1.0)
        assert (second.temperature, second.top_k) == (0.0, 50)


@pytest.mark.parametrize("prompt", ["ab", [97, 98], ["ab", "c"], [[97, 98], [99]]])
def test_the_four_shapes_of_a_prompt(client: OpenAI, engine: FakeEngine, prompt: Any) -> None:
    reply = client.completions.create(model="tiny", prompt=prompt)
    many = isinstance(prompt[0], list) or prompt == ["ab", "c"]
    assert [r.prompt_ids for r in engine.requests] == [(97, 98), (99,)][: 1 + many]
    assert [c.text for c in reply.choices] == ["Paris."] * (1 + many)
    assert reply.usage.prompt_tokens == (3 if many else 2)
    assert engine.requests[0].sampling.max_tokens == 16


def test_completion_stream(loose: OpenAI) -> None:
    chunks = list(
        loose.completions.create(
            model="tiny", prompt=["a", "b"], n=2, stream=True, echo=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == ["aParis.", "aParis.", "bParis.", "bParis."]
    assert chunks[-1].usage.completion_tokens == 4 * 7
    assert chunks[-1].usage.prompt_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(loose: OpenAI, stream: bool) -> None:
    """What evaluation harnesses read: log probabilities of prompt and answer, with offsets."""
    reply = loose.completions.create(
        model="tiny", prompt="né", echo=True, logprobs=1, max_tokens=2, stream=stream
    )
    choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
    text = "".join(choice.text for choice in choices)
    parts = [choice.logprobs for choice in choices if choice.logprobs]
    tokens = [token for part in parts for token in part.tokens]
    values = [value for part in parts for value in part.token_logprobs]
    offsets = [offset for part in parts for offset in part.text_offset]
    top = [entry for part in parts for entry in part.top_logprobs]
    assert text == "néPa"
    assert tokens == ["n", "\ufffd", "\ufffd", "P", "a"]
    assert values == [None, -0.25, -0.25, -0.25, -0.25]
    assert offsets == [0, 1, 1, 2, 3]
    assert top[0] is None
    assert top[3] == {"P": -0.25}


@pytest.mark.parametrize("stream", [True, False])
def test_the_end_token_is_one_of_a_plain_completions_tokens(
    loose: OpenAI, engine: FakeEngine, stream: bool
) -> None:
    """lm-eval sums all log probabilities but the last, whichever token it is."""
    engine.script = say("")
    reply: Any = loose.completions.create(
        model="tiny", prompt="ab", echo=True, logprobs=1, max_tokens=1, stream=stream
    )
    (last,) = reply if stream else [reply]
    (choice,) = last.choices
    assert (choice.text, choice.finish_reason) == ("ab", "stop")
    assert choice.logprobs.tokens == ["a", "b", "<|im_end|>"]
    assert choice.logprobs.token_logprobs == [None, -0.25, -0.25]
    assert choice.logprobs.text_offset == [0, 1, 2]


def test_only_the_prompts_logprobs(loose: OpenAI, engine: FakeEngine) -> None:
    reply = loose.completions.create(model="tiny", prompt="ab", echo=True, logprobs=0, max_tokens=0)
    (choice,) = reply.choices
    assert (choice.text, choice.finish_reason) == ("ab", "length")
    assert choice.logprobs.token_logprobs == [None, -0.25]
    assert reply.usage.completion_tokens == 0


def test_many_at_once_get_their_own_answers(tokenizer: Any) -> None:
    """Each of 16 clients hears its own number back, streamed or not, twice in a row."""

    def script(request: Any) -> list[int]:
        return [*str(request.sampling.seed).encode() * 8, EOS_ID]

    def ask(number: int) -> list[str]:
        body = {"messages": HI, "seed": number, "stream": number % 2 == 0}
        texts = []
        for _ in range(2):
            reply = live.http.post(CHAT, json=body)
            lines = reply.text.split("\n\n") if body["stream"] else [reply.text]
            parts = [json.loads(x.removeprefix("data: ")) for x in lines if x[-1:] == "}"]
            choices = [part["choices"][0] for part in parts]
            pieces = [c.get("delta", c.get("message")).get("content", "") for c in choices]
            texts.append("".join(pieces))
        return texts

    with serving(FakeEngine(script), tokenizer) as live, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(100, 116)))
    assert answers == [[str(number) * 8] * 2 for number in range(100, 116)]


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert client.models.retrieve("tiny").max_model_len == 512
    assert model.sparsity["recall"] == 0.964
    assert model.sparsity["mode"] == "predicted"
    assert (model.root, model.parent, model.permission) == ("tiny", None, [])


def test_any_model_name_can_be_accepted(tokenizer: Any) -> None:
    with serving(FakeEngine(), tokenizer, accept_any_model=True) as live:
        body = {"model": "gpt-4o", "messages": HI}
        reply = live.http.post(CHAT, json=body)
        assert reply.json()["model"] == "tiny"


def test_tokens(live: LiveServer) -> None:
    http = live.http
    reply = http.post("/tokenize", json={"prompt": "né"}).json()
    assert reply == {"count": 3, "max_model_len": 512, "tokens": [110, 195, 169]}
    text = http.post("/detokenize", json={"tokens": reply["tokens"]}).json()
    assert text == {"prompt": "né"}
    chat = http.post("/tokenize", json={"messages": HI}).json()
    text = http.post("/detokenize", json={"tokens": chat["tokens"]}).json()
    assert text == {"prompt": HI_PROMPT}


def test_server_info(live: LiveServer) -> None:
    info = live.http.get("/server_info").json()
    assert (info["mode"], info["model"]["name"], info["threads"]) == ("predicted", "tiny", 2)
    assert (info["limits"]["max_model_len"], info["limits"]["max_n"]) == (512, 16)


def test_tokenizer_info(live: LiveServer, tokenizer: Any) -> None:
    """All that lm-eval asks for to put chats together by itself."""
    info = live.http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert (info["pad_token"], info["unk_token"]) == ("<|pad|>", None)
    assert info["model_max_length"] == 512
    assert info["chat_template"] == tokenizer.chat_template
    eos = {"prompt": info["eos_token"], "add_special_tokens": False}
    assert live.http.post("/tokenize", json=eos).json()["tokens"] == [EOS_ID]


def test_silence_is_filled_with_pings(tokenizer: Any) -> None:
    with serving(FakeEngine(), tokenizer, ping_seconds=0.02) as live:
        live.engine.gate.clear()
        body = {"messages": HI, "stream": True}
        with live.http.stream("POST", CHAT, json=body) as reply:
            lines = reply.iter_lines()
            assert '"role":"assistant"' in next(lines)
            seen = [next(lines) for _ in range(5)]
            assert ": ping" in seen
            live.engine.gate.set()
            rest = list(lines)
        assert "data: [DONE]" in rest


def test_metrics(tokenizer: Any) -> None:
    with serving(FakeEngine(), tokenizer) as live:
        live.http.post(CHAT, json={"messages": HI})
        live.http.post(CHAT, json={"messages": HI, "max_tokens": 2})
        reply = live.http.get("/metrics")
        assert reply.headers["content-type"].startswith("text/plain")
        model = 'model_name="tiny"'
        for line in (
            f'hotneuron_request_success_total{{finished_reason="stop",{model}}} 1.0',
            f'hotneuron_request_success_total{{finished_reason="length",{model}}} 1.0',
            f'hotneuron_request_success_total{{finished_reason="abort",{model}}} 0.0',
            f"hotneuron_generation_tokens_total{{{model}}} 9.0",
            f"hotneuron_num_requests_running{{{model}}} 0.0",
            f"hotneuron_num_requests_waiting{{{model}}} 0.0",
            f"hotneuron_time_to_first_token_seconds_count{{{model}}} 2.0",
            f"hotneuron_inter_token_latency_seconds_count{{{model}}} 7.0",
            f"hotneuron_e2e_request_latency_seconds_count{{{model}}} 2.0",
            f'hotneuron_ffn_recall{{layer="2",{model}}} 0.964',
            f"hotneuron_sparse_speedup_ratio{{{model}}} 1.6",
        ):
            assert line in reply.text.splitlines()
