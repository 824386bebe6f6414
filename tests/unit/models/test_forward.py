"""The one forward pass: its numbers against a direct computation, and that it leaves no trace."""

import pytest
import torch

from molora_fed.errors import RoutingError, ShapeError
from molora_fed.models.forward import Capture, compute_block_losses, run_blocks
from molora_fed.models.layout import decoder_blocks


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
