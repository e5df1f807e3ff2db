"""Reading through transformers, against whole passes of the same tiny model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_kvpca.errors import OptionsError
from vllm_kvpca.lab import hidden_facts, teacher_forced, through_transformers
from vllm_kvpca.lab.measurements import needle, quality_transformers
from vllm_kvpca.pages.boundary import Policy

CHUNK = 16
SETTINGS = {"dtype": "float32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def windows():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 320, (7, 200), generator=generator).tolist()


def settings_of(model, windows, *presets):
    return [
        teacher_forced.settings_for(model, windows, CHUNK, x, (0, 0), **SETTINGS) for x in presets
    ]


@torch.no_grad()
def whole(model, windows):
    network = LlamaForCausalLM.from_pretrained(model).eval()
    return network(torch.tensor(windows)).logits.log_softmax(-1)


def test_stock_is_the_model_in_one_pass_and_raw_is_stock(model, windows):
    [results] = quality_transformers.measure(
        settings_of(model, windows, "raw"), windows, CHUNK, seed=0
    )
    logprobs = whole(model, windows)[:, :-1]
    following = torch.tensor(windows)[:, 1:, None]
    expected = torch.exp(-logprobs.gather(-1, following).mean()).item()
    # Chunks sum in another order than one pass: float32 rounding.
    assert results["perplexity_stock"] == pytest.approx(expected, rel=1e-4)
    assert results["predicted_tokens"] == 7 * 199
    assert results["perplexity_change"] == pytest.approx(0, abs=1e-6)
    assert results["kl_mean_nats"] == pytest.approx(0, abs=1e-6)
    assert results["top1_agreement"] == 1
    assert results["archived_share_of_attended_keys"] > 0.4


def test_fewer_bits_lose_more_and_the_bound_is_below_the_full_divergence(model, windows):
    eight, four = quality_transformers.measure(
        settings_of(model, windows, "k8v8", "k8v4"), windows, CHUNK, seed=0
    )
    for results in (eight, four):
        assert 0 < results["kl_lower_bound_mean_nats"] < results["kl_mean_nats"]
        low, high = results["perplexity_change_ci95"]
        assert low <= results["perplexity_change"] <= high
    assert eight["kl_mean_nats"] < four["kl_mean_nats"] / 3


def test_answers_are_those_of_one_pass(model, windows):
    questions = [
        hidden_facts.Question(0.0, (1, 9), (150, 153)),
        hidden_facts.Question(1.0, (90, 98), (180, 184)),
    ]
    prompts = [
        hidden_facts.Prompt(windows[0][:190], questions),
        hidden_facts.Prompt(windows[1], questions),
    ]
    settings = settings_of(model, windows, "raw")
    readings = list(needle.read_through_transformers(settings, prompts, CHUNK))
    assert [facts["boundary_step_tokens"] > 0 for _, facts in readings] == [False, True]
    for i, prompt in enumerate(prompts):
        logprobs = whole(model, [prompt.tokens])[0, :-1]
        target = torch.tensor(prompt.tokens[1:])
        for stock_or_raw, _ in readings:
            for j, (first, end) in enumerate(q.answer for q in questions):
                span = slice(first - 1, end - 1)
                own = logprobs[span].gather(-1, target[span, None])
                likeliest = logprobs[span].argmax(-1) == target[span]
                assert stock_or_raw[i].logprob[j] == pytest.approx(own.mean().item(), abs=1e-3)
                assert stock_or_raw[i].right[j] == pytest.approx(likeliest.float().mean().item())


def test_the_cache_archives_what_the_policy_says(model, windows):
    settings = teacher_forced.settings_for(model, windows, CHUNK, "k8v4", (96, 64), **SETTINGS)
    network = through_transformers.load(model, "float32")
    policy = through_transformers.policy_of(settings)
    assert isinstance(policy, Policy) and policy.align % 8 == 0
    caches = []

    def make(config):
        caches.append(through_transformers.cache_maker(settings)(config))
        return caches[-1]

    for _, positions, _ in through_transformers.read(network, [make], windows[:2], CHUNK):
        archived = caches[-1].get_memory_stats()["archived_tokens"]
        assert archived == policy.boundary(positions.stop)
    assert archived > 0


def test_an_unknown_dtype_is_refused(model):
    with pytest.raises(OptionsError, match="--dtype int3"):
        through_transformers.load(model, "int3")
