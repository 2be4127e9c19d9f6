"""A forward pass over rows gives what transformers gives for one plain sequence after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf.errors import ModelError
from rlhf.forward import hidden_states, last_token_hidden, token_logprobs, token_logprobs_alone, token_values
from rlhf.records import Answer, AnswerGroup, Prompt
from rlhf.rows import MicroBatch, Rows, make_micro_batches, scatter

EOS = 257
TEMPERATURE = 0.7
LENGTHS = [(5, [3, 1, 7]), (1, [1]), (9, [12, 2, 2, 4])]  # prompt, answers
NUM_ANSWERS, LONGEST = 8, 12


def make_groups() -> list[AnswerGroup]:
    draw = torch.Generator().manual_seed(1)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(256, (count,), generator=draw).tolist())

    return [
        AnswerGroup(
            Prompt(str(prompt_len), (), tokens(prompt_len)),
            # The last token is EOS: an answer of one token is EOS alone.
            tuple(Answer((*tokens(count - 1), EOS), (0.0,) * count, "eos", 0, "") for count in answer_lens),
        )
        for prompt_len, answer_lens in LENGTHS
    ]


GROUPS = make_groups()


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture
def plain(tiny_model: Path) -> PreTrainedModel:
    """The same weights, for the independent computation: its attention is transformers' own."""
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")


def naive(of: Callable[[AnswerGroup, Answer, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """[N, T] of what `of` makes from each answer's own forward pass."""
    rows = list[torch.Tensor]()
    for group in GROUPS:
        for answer in group.answers:
            values = of(group, answer, torch.tensor([[*group.prompt.token_ids, *answer.token_ids]]))
            rows.append(torch.nn.functional.pad(values, (0, LONGEST - len(values))))
    return torch.stack(rows)


def naive_logprobs(plain: PreTrainedModel, temperature: float = TEMPERATURE) -> torch.Tensor:
    def of(group: AnswerGroup, answer: Answer, ids: torch.Tensor) -> torch.Tensor:
        logits = plain(ids).logits[0, len(group.prompt.token_ids) - 1 : -1] / temperature
        return torch.stack([torch.log_softmax(row, -1)[t] for row, t in zip(logits, answer.token_ids, strict=True)])

    return naive(of)


def naive_hidden(plain: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return plain(ids, output_hidden_states=True).hidden_states[-1][0]


def over_rows(
    forward: Callable[..., torch.Tensor], rows: Rows, max_tokens: int, backward: bool = False
) -> torch.Tensor:
    """[N, T] of what `forward` gives for each micro-batch."""
    out = torch.zeros(NUM_ANSWERS, LONGEST)
    for batch in make_micro_batches(GROUPS, rows=rows, max_tokens=max_tokens):
        values = forward(batch)
        scatter(values, batch, out)
        if backward:
            weigh(values, batch.answer, batch.step).backward()
    return out


def weigh(values: torch.Tensor, answer: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """A sum with a weight of its own for each token, so that a gradient in a wrong place shows."""
    return (values * torch.cos(answer + 0.3 * step)).sum()


def one_batch() -> MicroBatch:
    """All groups in shared rows."""
    (batch,) = make_micro_batches(GROUPS, rows="shared", max_tokens=1000)
    return batch


def head_of(model: PreTrainedModel) -> torch.nn.Module:
    head = model.get_output_embeddings()
    assert head is not None
    return head


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=0, atol=1e-5 * float(expected[name].abs().max())), name


SPLITS = [("shared", 1000), ("shared", 20), ("shared", 12), ("shared", 1), ("separate", 1000), ("separate", 1)]
CUTS = pytest.mark.parametrize(("rows", "max_tokens"), [*SPLITS, ("auto", 30)])


@CUTS
def test_logprobs_of_rows_are_those_of_separate_sequences(
    model: PreTrainedModel, plain: PreTrainedModel, rows: Rows, max_tokens: int
) -> None:
    with torch.no_grad():
        found = over_rows(lambda batch: token_logprobs(model, batch, TEMPERATURE)[0], rows, max_tokens)
        assert torch.allclose(found, naive_logprobs(plain), atol=2e-5)


@CUTS
@pytest.mark.parametrize("head", ["frozen head", "trained head"])
def test_gradients_of_rows_are_those_of_separate_sequences(
    model: PreTrainedModel, plain: PreTrainedModel, rows: Rows, max_tokens: int, head: str
) -> None:
    head_of(model).requires_grad_(head == "trained head")
    found = over_rows(
        lambda batch: token_logprobs(model, batch, TEMPERATURE, chunk=5)[0], rows, max_tokens, backward=True
    )
    expected = naive_logprobs(plain)
    at = torch.meshgrid(torch.arange(NUM_ANSWERS), torch.arange(LONGEST), indexing="ij")
    weigh(expected, *at).backward()
    assert torch.allclose(found, expected, atol=2e-5)
    assert ("lm_head.weight" in gradients(model)) == (head == "trained head")
    assert_same(gradients(model), gradients(plain))


@CUTS
def test_values_and_their_gradients_are_those_of_separate_sequences(
    model: PreTrainedModel, plain: PreTrainedModel, rows: Rows, max_tokens: int
) -> None:
    head = torch.nn.Linear(128, 1)
    found = over_rows(lambda batch: token_values(model, head, batch), rows, max_tokens, backward=True)
    expected = naive(lambda group, _, ids: head(naive_hidden(plain, ids))[len(group.prompt.token_ids) - 1 : -1, 0])
    at = torch.meshgrid(torch.arange(NUM_ANSWERS), torch.arange(LONGEST), indexing="ij")
    weigh(expected, *at).backward()
    assert torch.allclose(found, expected, atol=2e-5)
    assert_same(gradients(model), gradients(plain))


@CUTS
def test_the_hidden_state_of_the_last_token_is_that_of_the_separate_sequence(
    model: PreTrainedModel, plain: PreTrainedModel, rows: Rows, max_tokens: int
) -> None:
    found = torch.zeros(NUM_ANSWERS, 128)
    with torch.no_grad():
        for batch in make_micro_batches(GROUPS, rows=rows, max_tokens=max_tokens):
            hidden, answers = last_token_hidden(model, batch)
            found[answers] = hidden
        sequences = [[*group.prompt.token_ids, *answer.token_ids] for group in GROUPS for answer in group.answers]
        expected = torch.stack([naive_hidden(plain, torch.tensor([ids]))[-1] for ids in sequences])
    assert torch.allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("head", ["frozen head", "trained head"])
def test_the_chunk_does_not_change_logprobs_entropies_or_gradients(
    model: PreTrainedModel, chunk: int, head: str
) -> None:
    batch = one_batch()
    head_of(model).requires_grad_(head == "trained head")
    results = list[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]()
    for size in (chunk, 16):
        model.zero_grad()
        logprobs, entropies = token_logprobs(model, batch, TEMPERATURE, chunk=size)
        weigh(logprobs, batch.answer, batch.step).backward()
        results.append((logprobs.detach(), entropies, {k: v.clone() for k, v in gradients(model).items()}))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)
    assert_same(results[0][2], results[1][2])


def test_a_pass_without_gradients_gives_the_same_logprobs_and_entropies(model: PreTrainedModel) -> None:
    batch = one_batch()
    head_of(model).requires_grad_(False)
    with_gradients = token_logprobs(model, batch, TEMPERATURE)
    with torch.no_grad():
        without = token_logprobs(model, batch, TEMPERATURE)
    assert all(torch.equal(one, other) for one, other in zip(with_gradients, without, strict=True))


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_logprobs_alone_are_those_with_entropies(model: PreTrainedModel, chunk: int) -> None:
    batch = one_batch()
    with torch.no_grad():
        alone = token_logprobs_alone(model, batch, TEMPERATURE, chunk=chunk)
        assert torch.allclose(alone, token_logprobs(model, batch, TEMPERATURE)[0], atol=5e-6)


def test_the_entropy_is_that_of_the_whole_distribution(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    def of(group: AnswerGroup, _: Answer, ids: torch.Tensor) -> torch.Tensor:
        logits = plain(ids).logits[0, len(group.prompt.token_ids) - 1 : -1] / TEMPERATURE
        return torch.distributions.Categorical(logits=logits).entropy()

    with torch.no_grad():
        found = over_rows(lambda batch: token_logprobs(model, batch, TEMPERATURE)[1], "shared", 1000)
        assert torch.allclose(found, naive(of), atol=2e-5)


def test_logits_are_divided_by_the_temperature(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    with torch.no_grad():
        for temperature in (0.5, 2.0):
            found = over_rows(lambda batch, t=temperature: token_logprobs(model, batch, t)[0], "shared", 1000)
            assert torch.allclose(found, naive_logprobs(plain, temperature), atol=2e-5)


def test_no_tensor_of_all_positions_and_the_whole_vocabulary_is_made(model: PreTrainedModel) -> None:
    batch = one_batch()
    sizes = list[int]()
    head = head_of(model)
    head.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape[0]))
    for trained in (True, False):
        head.requires_grad_(trained)
        token_logprobs(model, batch, 1.0, chunk=6)[0].sum().backward()
    assert len(batch.target_ids) == 32
    assert max(sizes) == 6


def test_gradient_checkpointing_changes_nothing(model: PreTrainedModel) -> None:
    batch = one_batch()
    token_logprobs(model, batch, 1.0)[0].sum().backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    token_logprobs(model, batch, 1.0)[0].sum().backward()
    assert_same(gradients(model), expected)


def test_a_wrapper_with_a_base_model_is_looked_into(model: PreTrainedModel) -> None:
    class Wrapped(torch.nn.Module):
        def get_base_model(self) -> torch.nn.Module:
            return model

    batch = one_batch()
    with torch.no_grad():
        assert torch.equal(hidden_states(Wrapped(), batch), hidden_states(model, batch))


def test_a_model_whose_layers_are_not_attention_is_refused(model: PreTrainedModel) -> None:
    model.config.layer_types = ["linear_attention"]
    with pytest.raises(ModelError, match="linear_attention"):
        hidden_states(model, one_batch())


@pytest.mark.gpu
def test_logprobs_and_gradients_on_a_gpu_are_those_on_a_cpu(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    on_gpu = torch.nn.Module.to(plain, "cuda")
    for batch in make_micro_batches(GROUPS, rows="shared", max_tokens=30):
        found = token_logprobs(on_gpu, batch.to("cuda"), TEMPERATURE)[0]
        expected = token_logprobs(model, batch, TEMPERATURE)[0]
        found.sum().backward()
        expected.sum().backward()
        assert torch.allclose(found.cpu(), expected, atol=1e-3)
    for name, gradient in gradients(on_gpu).items():
        reference = gradients(model)[name]
        assert torch.allclose(gradient.cpu(), reference, rtol=0, atol=1e-3 * float(reference.abs().max())), name
