"""The one forward pass: its numbers against a direct computation, and that it leaves no trace."""

import pytest
import torch
from torch.nn import functional

from molora_fed.errors import RoutingError, ShapeError
from molora_fed.models import forward
from molora_fed.models.forward import Resume, compute_block_losses, run_blocks
from molora_fed.models.layout import decoder_blocks
from molora_fed.models.states import Capture, can_resume


def collect(model, tokens, batch, capture=None):
    steps = list(run_blocks(model, tokens, batch=batch, capture=capture))
    assert [step.start for step in steps] == list(range(0, len(tokens), batch))
    return steps


def test_losses_are_cross_entropy_of_the_next_token(model, tokens):
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    ).view(2, -1)
    found = compute_block_losses(model, tokens.int().numpy(), batch=1)
    assert found.shape == (2, 23)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_hidden_states_are_what_the_head_and_the_first_trained_block_read(model, tokens):
    capture = Capture(hidden=True, prefix_depth=1)
    (step,) = collect(model, tokens, 2, capture)
    seen = {}
    _, blocks = decoder_blocks(model)
    handles = [
        module.register_forward_pre_hook(
            lambda _m, args, kwargs, name=name: seen.__setitem__(
                name, args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        for name, module in (("hidden", model.get_output_embeddings()), ("prefix", blocks[1]))
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    assert torch.equal(step.hidden, seen["hidden"])
    assert torch.equal(step.prefix, seen["prefix"])
    assert step.logprob[:, 0].abs().max() == 0


def test_mode_gradients_and_hooks_are_as_before(tiny_model, tokens):
    model = tiny_model()
    model.train()
    dropout = next(m for m in model.modules() if isinstance(m, torch.nn.Dropout))
    dropout.eval()
    before = [m.training for m in model.modules()]
    next(run_blocks(model, tokens, batch=1, capture=Capture(hidden=True, prefix_depth=0)))
    assert [m.training for m in model.modules()] == before
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_progress_counts_blocks(tiny_model, tokens):
    seen = []
    compute_block_losses(
        tiny_model(), tokens, batch=1, progress=lambda done, total, **_: seen.append((done, total))
    )
    assert seen == [(1, 2), (2, 2)]


def test_no_blocks_give_no_losses(tiny_model):
    assert compute_block_losses(tiny_model(), torch.zeros((0, 9), dtype=torch.int32)).shape == (
        0,
        8,
    )


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (torch.tensor([[0, 257]]), "0 to 256, got 0 to 257"),
        (torch.tensor([[-1, 2]]), "got -1 to 2"),
        (torch.tensor([[3]]), r"T >= 2, got \(1, 1\)"),
        (torch.tensor([3, 4]), r"got \(2,\)"),
    ],
)
def test_wrong_tokens_are_refused(tiny_model, tokens, reason):
    with pytest.raises(ShapeError, match=reason):
        compute_block_losses(tiny_model(), tokens)


def test_prefix_beyond_the_model_is_refused(tiny_model, tokens):
    with pytest.raises(RoutingError, match="below its 2 blocks, got 2"):
        collect(tiny_model(), tokens, 2, Capture(prefix_depth=2))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_pass_that_begins_after_the_frozen_blocks_gives_the_same_bits(model, depth):
    tokens = torch.randint(0, 60, (5, 12), generator=torch.Generator().manual_seed(3))
    depth = min(depth, model.config.get_text_config().num_hidden_layers - 1)
    capture = Capture(hidden=True, prefix_depth=depth)
    whole = list(run_blocks(model, tokens, batch=2, capture=capture))
    prefix = torch.cat([step.prefix for step in whole])
    assert can_resume(model, depth)
    resume = Resume(depth, lambda start, stop: prefix[start:stop])
    for one, other in zip(
        whole,
        run_blocks(model, tokens, batch=2, capture=Capture(hidden=True), resume=resume),
        strict=True,
    ):
        assert torch.equal(one.logprob, other.logprob) and torch.equal(one.hidden, other.hidden)
    assert torch.equal(
        torch.cat([step.logprob for step in run_blocks(model, tokens, batch=2)]),
        torch.cat([step.logprob for step in whole]),
    )


def test_where_later_blocks_use_more_of_earlier_ones_all_run(tiny_model):
    model, kept = tiny_model("llama"), []
    first, last = model.model.layers[0], model.model.layers[-1]
    first.self_attn.register_forward_hook(lambda module, inputs, found: kept.append(found[0]))
    last.register_forward_hook(lambda module, inputs, found: found + kept.pop())
    assert not can_resume(model, 1) and not can_resume(model, 0)
    assert all("forward" not in vars(block) for block in model.model.layers)


def test_logits_of_all_blocks_never_exist_together(tiny_model, monkeypatch):
    model = tiny_model("llama")
    tokens = torch.randint(0, 60, (6, 12), generator=torch.Generator().manual_seed(3))
    whole = compute_block_losses(model, tokens, batch=6)
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 1)
    sizes = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, found: sizes.append(found.shape[0])
    )
    parts = compute_block_losses(model, tokens, batch=6)
    hook.remove()
    assert max(sizes) == 1
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


def test_shorter_logits_give_the_losses_of_the_same_numbers_in_float32(tiny_model):
    """Of a large loss, too: no probability is lost to a range."""
    tokens = torch.randint(0, 60, (3, 40), generator=torch.Generator().manual_seed(3))
    model = tiny_model("llama").bfloat16()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2_000)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    found = compute_block_losses(model, tokens).flatten()
    expected = functional.cross_entropy(logits.double(), tokens[:, 1:].flatten(), reduction="none")
    assert logits.dtype is torch.bfloat16 and float(expected.max()) > 100
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)
