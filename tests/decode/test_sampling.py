"""Answers of tiny random LLMs against transformers' `generate`, and the chance that draws them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from torch_models import QUICK, llm, torch, transformers

from mtllm_jax import sampling, sharding
from mtllm_jax.config import Mesh
from mtllm_jax.hf.llama import load_llama
from mtllm_jax.sampling import Sampler, Sampling, likeliest, next_tokens

GREEDY = Sampling(temperature=0)
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
KINDS = {
    "llama": ("llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}
QUICK_KINDS = ("mistral",)
TOKENS, SLOTS = 20, 16


def prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 50, n).astype(np.int32) for n in rng.integers(1, 12, count)]


def keys(count, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, (count, 2), np.uint32)


def mesh_of(count, fsdp=1):
    return sharding.make_mesh(Mesh(data=-1, fsdp=fsdp), jax.devices()[:count])


def sampler(model, how=GREEDY, *, stops=(), tokens=TOKENS, rows=8, mesh=None):
    return Sampler(
        model,
        stop_ids=stops,
        sampling=how,
        max_new_tokens=tokens,
        num_rows=rows,
        mesh=mesh or mesh_of(1),
    )


def answers(rows):
    return [row[row != sampling.NOTHING].tolist() for row in rows]


def generated(model, prompt, stop=None, **options):
    """What transformers says of one prompt, up to the stop token."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor(prompt[None].astype(np.int64)),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=0,
            **options,
        )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = {}

    def make(kind):
        if kind not in made:
            family, changes = KINDS[kind]
            model, folder = llm(family, **changes), tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder)
            made[kind] = model, load_llama(folder)
        return made[kind]

    return make


@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK_KINDS else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
def test_greedy_is_transformers_generate(pairs, kind, monkeypatch):
    """Through three sizes of the cache, by prompts of other lengths in one batch, with a stop."""
    monkeypatch.setattr(sampling, "_FIRST_ROOM", 6)
    theirs, ours = pairs(kind)
    given, told = prompts(6), []
    stop = generated(theirs, given[0])[1]
    found = answers(sampler(ours, stops=(stop,))(given, keys(6), SLOTS, told.append))
    wanted = [generated(theirs, prompt, stop) for prompt in given]
    assert found == wanted
    assert len(set(map(tuple, wanted))) > 3 and found[0][-1] == stop
    assert told[-1] == sum(map(len, wanted)) and len(told) == 3


@pytest.mark.slow
def test_a_repetition_penalty_is_transformers(pairs):
    theirs, ours = pairs("llama")
    given = prompts(4, seed=1)
    how = Sampling(temperature=0, repetition_penalty=1.7)
    wanted = [generated(theirs, prompt, repetition_penalty=1.7) for prompt in given]
    assert answers(sampler(ours, how)(given, keys(4), SLOTS)) == wanted
    assert wanted != [generated(theirs, prompt) for prompt in given]


def processed(logits_BV, ids_BT, how):
    """Logits as transformers' processors leave them before it draws."""
    from transformers.generation import logits_process as lp

    chain = transformers.LogitsProcessorList()
    if how.repetition_penalty != 1:
        chain.append(lp.RepetitionPenaltyLogitsProcessor(how.repetition_penalty))
    chain.append(lp.TemperatureLogitsWarper(how.temperature))
    if how.top_k:
        chain.append(lp.TopKLogitsWarper(how.top_k))
    if how.top_p < 1:
        chain.append(lp.TopPLogitsWarper(how.top_p))
    return chain(torch.tensor(ids_BT, dtype=torch.long), torch.tensor(logits_BV)).numpy()


@pytest.mark.parametrize(
    "how",
    [
        Sampling(temperature=0.7, repetition_penalty=1.3),
        Sampling(temperature=0.95, top_k=20, top_p=0.7),
        pytest.param(Sampling(temperature=1.5, top_k=7), marks=pytest.mark.slow),
        pytest.param(Sampling(top_p=0.8), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_transformers_would(how):
    """5,000 draws of one row, each with a key of its own: chi-square over the tokens, the rare ones
    as one. By chance a p-value is below 1e-4 once in 10,000 times; the keys are fixed."""
    count, prompt = 5000, np.array([[3, 5, 8]])
    logits_BV = np.random.default_rng(3).normal(size=(1, 40)).astype(np.float32)
    logits_BV[0, prompt] += 2
    p_V = scipy.special.softmax(processed(logits_BV, prompt, how)[0].astype(np.float64))
    is_seen_V = np.isin(np.arange(40), prompt)
    seen_BV = np.broadcast_to(is_seen_V, (count, 40)) if how.repetition_penalty != 1 else None
    drawn_B = jax.jit(next_tokens, static_argnames="sampling", compiler_options=QUICK)(
        np.broadcast_to(logits_BV, (count, 40)),
        seen_BV,
        jax.random.wrap_key_data(jnp.asarray(keys(count))),
        4,
        sampling=how,
    )
    times_V = np.bincount(drawn_B, minlength=40)
    assert times_V[p_V == 0].sum() == 0
    is_often_V = p_V * count > 20
    found = [*times_V[is_often_V], times_V[~is_often_V].sum()]
    wanted = [*p_V[is_often_V] * count, p_V[~is_often_V].sum() * count + 1e-9]
    assert is_often_V.sum() > 3
    assert scipy.stats.chisquare(found, wanted, sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize("share", [1e-6, 0.3, 0.9, 0.999])
def test_the_likeliest_that_hold_a_share(share):
    """Against sorting, in float64: rows of all kinds of slopes."""
    rng = np.random.default_rng(0)
    logits_BC = (rng.normal(size=(50, 300)) * rng.uniform(0.1, 8, (50, 1))).astype(np.float32)
    found_BC = np.asarray(likeliest(jnp.asarray(logits_BC), share))
    for logits_C, found_C in zip(logits_BC, found_BC, strict=True):
        order = np.argsort(-logits_C)
        held = np.cumsum(scipy.special.softmax(logits_C.astype(np.float64))[order])
        fewest = int(np.searchsorted(held, share)) + 1
        # Where float32 cannot tell, one more or less is as right.
        sure = np.abs(held[max(fewest - 2, 0) : fewest] - share).min() > 1e-6
        if sure:
            assert set(np.flatnonzero(found_C)) == set(order[:fewest])


@pytest.fixture(scope="module")
def drawn(pairs):
    """Twelve prompts and what they are answered by chance, eight a batch."""
    how, given = Sampling(top_k=40, top_p=0.95), prompts(12, seed=4)
    _, model = pairs(QUICK_KINDS[0])
    run = sampler(model, how)
    rows = [run(given[i : i + 8], keys(12)[i : i + 8], SLOTS) for i in (0, 8)]
    return model, how, given, np.concatenate(rows)


def test_an_answer_does_not_depend_on_the_rows_beside_it(drawn):
    model, how, given, rows = drawn
    assert len(set(map(tuple, rows.tolist()))) == 12
    run = sampler(model, how)
    order = np.random.default_rng(1).permutation(12)
    for some in (order[:8], order[8:], order[:1]):
        found = run([given[i] for i in some], keys(12)[some], SLOTS)
        np.testing.assert_array_equal(found, rows[some])
    other = run(given[:8], keys(8, seed=9), SLOTS)
    assert np.mean(other != rows[:8]) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("num_rows", "devices", "fsdp"), [(1, 1, 1), (16, 1, 1), (16, 8, 2)])
def test_an_answer_does_not_depend_on_the_size_of_a_batch(drawn, num_rows, devices, fsdp):
    """Nor on devices, or weights cut over them. Sums of another shape may round differently, which
    parts two tokens that are as likely to six digits: none of these."""
    model, how, given, rows = drawn
    run = sampler(model, how, rows=num_rows, mesh=mesh_of(devices, fsdp))
    for begin in range(0, 12, num_rows):
        some = slice(begin, begin + num_rows)
        np.testing.assert_array_equal(run(given[some], keys(12)[some], SLOTS), rows[some])


def test_logits_that_are_no_numbers_end_an_answer():
    logits_BV = jnp.zeros((3, 9)).at[1, 4].set(jnp.nan).at[2, 0].set(jnp.inf)
    for how in (GREEDY, Sampling(top_k=3)):
        found_B = jax.jit(next_tokens, static_argnames="sampling", compiler_options=QUICK)(
            logits_BV, None, jax.random.split(jax.random.key(0), 3), 0, sampling=how
        )
        assert found_B[0] >= 0 and found_B[1:].tolist() == [sampling.NO_NUMBER] * 2


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -1.0, "--temperature is -1.0; it must be 0 or more"),
        ("temperature", float("nan"), "temperature is nan"),
        ("top_k", -1, "top_k is -1; it must be 0 or more"),
        ("top_p", 0.0, "--top_p is 0.0; it must be above 0 and at most 1"),
        ("repetition_penalty", 0.0, "repetition_penalty is 0.0; it must be above 0"),
    ],
)
def test_settings_that_cannot_be(field, value, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**{field: value})
