"""HTTP as users send it: the openai client against a real server whose cache is compressed."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import BadRequestError, OpenAI

from .server import (
    API_KEY,
    ARCHIVE_BLOCK,
    HIT_STEP,
    MAX_MODEL_LEN,
    NAME,
    POLICY,
    RAW_BLOCK,
    Server,
)

pytestmark = pytest.mark.e2e

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PLACES = ("Oslo", "Lima", "Cairo", "Delhi", "Quito", "Paris", "Tokyo", "Dublin")
NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Henry")


def story(client: int, repeats: int) -> str:
    """A text of its own for each client, cut off where only one continuation makes sense.

    The model copies what it has read several times with certainty, so that neither the order
    of sums in a batch nor the archive's rounding can tip its choice.
    """
    name, place = NAMES[client % 8], PLACES[(client * 3 + client // 8) % 8]
    sentence = (
        f"{name} lives in {place} and walks to the harbour every morning to look at the ships. "
    )
    return sentence * repeats + f"{name} lives in"


LONG = story(0, 90)


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return server.client()


def complete(client: OpenAI, prompt: str, tokens: int = 16, **options):
    return client.completions.create(
        model=NAME, prompt=prompt, max_tokens=tokens, temperature=0, **options
    )


def chat(client: OpenAI, tokens: int = 16, **options):
    return client.chat.completions.create(
        model=NAME, messages=QUESTION, max_tokens=tokens, temperature=0, **options
    )


def test_a_completion_streams_the_text_it_answers(client: OpenAI):
    prompt = story(1, 4)
    whole = complete(client, prompt)
    chunks = list(complete(client, prompt, stream=True))
    assert len(chunks) > 8
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert PLACES[3] in whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 16


def test_a_chat_answers_sensibly_and_streams_the_same(client: OpenAI):
    whole = chat(client, 32)
    assert "Paris" in whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    options = {"include_usage": True}
    chunks = list(chat(client, 32, stream=True, stream_options=options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_two_samples_of_one_long_prompt_differ(client: OpenAI):
    prompt = "Once upon a time there was a small town by the sea. " * 30 + "Then"
    answer = client.completions.create(
        model=NAME, prompt=prompt, max_tokens=24, temperature=1.5, n=2, seed=7
    )
    assert answer.usage.prompt_tokens > POLICY.compress_after
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text != answer.choices[1].text
    assert answer.usage.completion_tokens <= 48
    assert all(choice.text.strip() for choice in answer.choices)


def test_logprobs_of_a_long_completion_and_of_its_prompt(client: OpenAI):
    answer = complete(client, story(2, 20), tokens=8, logprobs=2, echo=True)
    assert answer.usage.prompt_tokens > POLICY.compress_after
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.token_logprobs) == answer.usage.prompt_tokens + 8
    first, *others = logprobs.token_logprobs
    assert first is None
    assert all(math.isfinite(value) and value <= 0 for value in others)
    for chosen, top in zip(others[-8:], logprobs.top_logprobs[-8:], strict=True):
        assert len(top) == 2
        assert chosen == max(top.values())
    # A text repeated twenty times is no surprise to a model that can read its own archive.
    assert sum(others[-200:]) / 200 > -0.3


def test_logprobs_of_a_chat(client: OpenAI):
    answer = chat(client, 6, logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens == 6
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content
    for token in tokens:
        values = [other.logprob for other in token.top_logprobs]
        assert len(values) == 3
        assert all(math.isfinite(value) and value <= 0 for value in values)
        assert token.logprob == max(values)


def test_a_long_prompt_comes_from_the_prefix_cache_the_second_time(client: OpenAI):
    answers = [complete(client, LONG) for _ in range(2)]
    length = answers[0].usage.prompt_tokens
    assert length > 1500
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in answers]
    assert cached == [0, length - 1 - (length - 1) % HIT_STEP]
    assert cached[1] > POLICY.boundary(length)  # archived tokens and raw ones behind them
    assert PLACES[0] in answers[0].choices[0].text
    assert answers[0].choices[0].text == answers[1].choices[0].text


def test_sixteen_clients_at_once_get_what_each_gets_alone(server: Server):
    repeats = [16 + number // 2 if number % 2 else 3 for number in range(16)]
    prompts = [story(number, count) for number, count in enumerate(repeats)]
    tokens = [4 + number for number in range(16)]

    def ask(number: int):
        with server.client() as client:
            return complete(client, prompts[number], tokens[number])

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(16)))
    assert together[-1].usage.prompt_tokens > POLICY.compress_after
    assert together[0].usage.prompt_tokens < POLICY.compress_after
    assert [answer.usage.completion_tokens for answer in together] == tokens
    alone = [ask(number) for number in range(16)]
    texts = [answer.choices[0].text for answer in together]
    assert texts == [answer.choices[0].text for answer in alone]
    assert [text.split()[0] for text in texts] == [prompt.split()[3] for prompt in prompts]


def test_a_client_that_leaves_gives_its_blocks_back(server: Server, client: OpenAI):
    prompt = story(5, 30)
    before = complete(client, prompt).choices[0].text
    stream = complete(client, prompt, tokens=2000, stream=True, extra_body={"ignore_eos": True})
    for _ in range(5):
        next(stream)
    busy = server.scrape()
    assert busy.value("kvpca_kv_cache_bytes", state="archived") > 0
    assert busy.value("kvpca_kv_cache_bytes", state="raw") > 0
    stream.close()
    idle = server.wait_until_idle(seconds=20)
    generated = [scrape.value("vllm:generation_tokens_total") for scrape in (busy, idle)]
    assert generated[1] - generated[0] < 1000, "the server wrote the answer to its end"
    assert complete(client, prompt).choices[0].text == before


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_a_prompt_that_cannot_fit_is_refused_and_the_server_lives_on(
    server: Server, client: OpenAI, kind: str
):
    text = story(6, 300)
    with pytest.raises(BadRequestError) as refusal:
        if kind == "completion":
            complete(client, text)
        else:
            messages = [{"role": "user", "content": text}]
            client.chat.completions.create(model=NAME, messages=messages, max_tokens=16)
    assert refusal.value.status_code == 400
    assert str(MAX_MODEL_LEN) in refusal.value.message
    assert server.is_healthy()
    assert complete(client, story(6, 2), 4).usage.completion_tokens == 4


def kv_compression(server: Server, key: str | None) -> dict:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{server.url}/kv_compression", headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.parametrize("key", [None, "another key"])
def test_kv_compression_answers_nobody_without_the_servers_key(server: Server, key: str | None):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        kv_compression(server, key)
    assert refusal.value.code == 401


def test_kv_compression_tells_of_a_running_request(server: Server, client: OpenAI):
    with complete(client, story(4, 24), tokens=400, stream=True) as stream:
        next(iter(stream))
        answer = kv_compression(server, API_KEY)
    assert (answer["model_name"], answer["preset"]) == (NAME, "k8v4")
    assert (answer["compress_after"], answer["keep_recent"]) == (256, 128)
    (layers,) = answer["layers"]
    assert layers["compressed"] and layers["count"] == len(layers["names"]) == 30
    layout = answer["layout"]
    blocks = layout["raw_block_tokens"], layout["archive_block_tokens"]
    assert blocks == (RAW_BLOCK, ARCHIVE_BLOCK)
    assert layout["archived_token_bytes"] == 100
    (engine,) = answer["engines"]
    figures, scrape = engine["figures"], server.wait_until_idle()
    assert figures["sequences"]["archived"] == 1
    tokens = figures["kv_cache_tokens"]
    length = int(tokens["raw"] + tokens["archived"])
    assert length > 400 and tokens["archived"] >= POLICY.boundary(length)
    now = kv_compression(server, API_KEY)["engines"][0]["figures"]
    for name in ("archived_tokens", "archive_operations", "archive_written_bytes"):
        assert now[name] == scrape.value(f"kvpca_{name}_total") > 0
    ended = now["request_archived_tokens"]
    assert ended["count"] == scrape.value("kvpca_request_archived_tokens_count")
    assert ended["sum"] == scrape.value("kvpca_request_archived_tokens_sum")
