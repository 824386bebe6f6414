"""The sides of bench/serve.py: whatever continues a batch of texts, timed token by token."""

import copy
import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from molora_kalavai.evidence import ZeroTrainingEvidenceRouter
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.save import save_adapter
from molora_fed.adapters.updates import Adapter
from molora_fed.bank.views import RouterView
from molora_fed.inference.expert_layers import share_weights
from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.inference.fused_cache import FusedCache
from molora_fed.inference.generate import Sampling, decode_tokens, mark_start
from molora_fed.inference.mixing import mix_distributions
from molora_fed.inference.opening import PlainModel
from molora_fed.models.base import Base, load_base
from molora_fed.models.runtime import Placement
from molora_fed.routing.fused import FusedExpert, FusedModel
from molora_fed.testing.models import build_random_adapter
from molora_fed.training.builtin_base import BuiltinBaseConfig

PLAIN = "transformers' generate, the base"
OWN = "ours, the base"
SPECIALIST = "PEFT, one specialist"
ONE_PASS = "PEFT, all adapters added up in one pass"
ROWS = "PEFT, a row an adapter"
IN_TURN = "PEFT, E passes in turn"
MERGED = "E merged models"
DENSE = "ours, dense"
SPARSE = "ours, sparse"
BLENDED = "ours, merged after the prompt"
DRAWN = "ours, dense, a generator a text"
BASES = (PLAIN, OWN)
SIDES = (*BASES, SPECIALIST, ONE_PASS, ROWS, IN_TURN, MERGED, DENSE, SPARSE, BLENDED)
OF_ANY_COUNT = (PLAIN, OWN, SPECIALIST)
"""Sides that are the same whatever E is."""

RANK = 16
TEMPERATURE = 0.8
TOP_P = 0.95
SEED = 42
PREFERENCE = 0.6  # of a text's own expert, so that one that runs alone is never the base
LOGITS_AT_ONCE = 2**29  # numbers; a prompt of more rows than that is not run by PEFT's rows
BUILTIN = BuiltinBaseConfig()


@dataclass(frozen=True)
class Timing:
    """One batch of texts.

    Attributes:
        prefill: Seconds to its first token.
        tokens: Seconds of each token after that.
        text: What was written, (B, N).
    """

    prefill: float
    tokens: tuple[float, ...]
    text: Tensor


class Side(Protocol):
    """Something that continues texts."""

    def run(self, prompt: Tensor, new: int, *, sampled: bool) -> Timing:
        """Continue texts of one length, (B, P), by so many tokens each."""


class Clock(StoppingCriteria):
    """Notes when each token is there; told by `generate`, or by hand."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self.read()
        self.times: list[float] = []

    def read(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def note(self, *_: Any) -> None:
        """A token is there."""
        self.times.append(self.read())

    def __call__(self, input_ids: Any, scores: Any, **others: Any) -> Any:
        """No text ends here, (B,) bool."""
        self.note()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def tell(self, text: Tensor) -> Timing:
        """What was noted of a text (B, N)."""
        steps = tuple(after - before for before, after in itertools.pairwise(self.times))
        return Timing(self.times[0] - self.start, steps, text)


class Generating:
    """A model of transformers and its `generate`; `begin` is called before, untimed."""

    def __init__(
        self, model: Any, begin: Callable[[], Any] = lambda: None, **settings: Any
    ) -> None:
        self.model, self.begin, self.settings = model, begin, settings

    def run(self, prompt: Tensor, new: int, *, sampled: bool) -> Timing:
        """See `Side`."""
        self.begin()
        choice: dict[str, Any] = {"do_sample": sampled}
        if sampled:
            choice.update(temperature=TEMPERATURE, top_p=TOP_P, top_k=0)
        clock = Clock(prompt.device)
        whole = self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
            **choice,
            **self.settings,
        )
        return clock.tell(whole[:, prompt.shape[1] :])


class GatedCache(FusedCache):
    """A cache of our model by which gates choose a text's experts.

    Random experts know nothing of random texts: by evidence most texts would keep the base.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model.fingerprint, model.model.config)

    def weigh(self, evidence: Tensor, starts: Tensor) -> None:
        """Nothing counts."""


class GeneratingSparse(Generating):
    """Our model with one expert a text, chosen after the prompt."""

    def run(self, prompt: Tensor, new: int, *, sampled: bool) -> Timing:
        """See `Side`."""
        self.settings = {"experts_per_text": 1, "past_key_values": GatedCache(self.model)}
        return super().run(prompt, new, sampled=sampled)


class Drawing:
    """Our model by `molora_fed.inference.generate`: a generator of its own for each text."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def run(self, prompt: Tensor, new: int, *, sampled: bool) -> Timing:
        """See `Side`."""
        chosen = {"temperature": TEMPERATURE, "top_p": TOP_P} if sampled else {}
        clock = Clock(prompt.device)

        def progress(done: int, total: int, **fields: float | str) -> None:
            clock.note()

        text, _ = decode_tokens(
            self.model,
            prompt,
            Sampling(max_new_tokens=new, **chosen),
            find_ended=lambda tokens: torch.zeros_like(tokens, dtype=torch.bool),
            progress=progress,
        )
        return clock.tell(text)


Forward = Callable[[Tensor, list[Any]], Sequence[Callable[[], Tensor]]]
"""Tokens (B, t) and the caches; what gives each expert's logits (B, t, V)."""


class Mixing:
    """The plain loop: every expert's full logits, the router's gates, the mixture, the next token.

    It mixes as our model does, with the same router; all experts have keys and values of what was
    read, which published loops of this kind lack.
    """

    def __init__(self, forward: Forward, caches: Callable[[], list[Any]], router: Any) -> None:
        self.forward, self.make_caches, self.router = forward, caches, router

    @torch.no_grad()
    def run(self, prompt: Tensor, new: int, *, sampled: bool) -> Timing:
        """See `Side`."""
        clock = Clock(prompt.device)
        caches, state = self.make_caches(), self.router.init_state(len(prompt))
        piece, starts, last = prompt, mark_start(prompt), None
        written = []
        for _ in range(new):
            found, evidence = [], []
            for index, compute in enumerate(self.forward(piece, caches)):
                logprob = torch.log_softmax(compute().float(), dim=-1)  # (B, t, V)
                before = logprob[:, :1] if last is None else last[index, :, None]
                known = torch.cat([before, logprob[:, :-1]], dim=1)
                evidence.append(known.gather(-1, piece.unsqueeze(-1)).squeeze(-1))
                found.append(logprob[:, -1].clone())
            last = torch.stack(found)
            read = torch.stack(evidence, dim=-1).masked_fill(starts.unsqueeze(-1), 0.0)
            gates, state = self.router.step(RouterView(starts, evidence=read), state)
            mixed = mix_distributions(last.unsqueeze(2), gates[:, -1:], "probability")
            piece = choose(mixed[:, 0], piece, sampled)
            starts = torch.zeros_like(piece, dtype=torch.bool)
            written.append(piece)
            clock.note()
        return clock.tell(torch.cat(written, dim=1))


def choose(logprob: Tensor, tokens: Tensor, sampled: bool) -> Tensor:
    """The next token of every text, (B, 1), of log-probabilities (B, V)."""
    if not sampled:
        return logprob.argmax(-1, keepdim=True)
    warpers = [TemperatureLogitsWarper(TEMPERATURE), TopPLogitsWarper(TOP_P)]
    scores = LogitsProcessorList(warpers)(tokens, logprob)
    return torch.multinomial(torch.softmax(scores, -1), 1)


class PreferringRouter(ZeroTrainingEvidenceRouter):
    """The zero-training router with most of each text's gate at one expert, never the base.

    Text b goes to expert 1 + b mod (E - 1): a batch of all domains, which is the costly case where
    each text keeps its own expert alone.
    """

    def step(self, view: RouterView, state: Any) -> tuple[Tensor, Any]:
        """See `OutputRouter`; gates (B, t, E)."""
        gates, state = super().step(view, state)
        texts = torch.arange(len(gates), device=gates.device)
        own = torch.zeros_like(gates[:, 0])
        own[texts, 1 + texts % (self.num_experts - 1)] = PREFERENCE
        return (1 - PREFERENCE) * gates + own[:, None], state


def open_base(name: str, placement: Placement, folder: Path) -> Base:
    """A base by name: "builtin" has the built-in one's size and random weights."""
    if name != "builtin":
        return load_base(folder, placement)
    torch.manual_seed(SEED)
    config = GPTNeoXConfig(
        vocab_size=BUILTIN.vocab_size,
        hidden_size=BUILTIN.hidden,
        num_hidden_layers=BUILTIN.layers,
        num_attention_heads=BUILTIN.heads,
        intermediate_size=4 * BUILTIN.hidden,
        max_position_embeddings=BUILTIN.block_size,
        initializer_range=0.06,
    )
    model = GPTNeoXForCausalLM(config).eval().requires_grad_(False)
    return Base(
        folder=Path(),
        model=model.to(placement.device, placement.dtype),
        tokenizer=SimpleNamespace(eos_token_id=config.eos_token_id),
        weights="0" * 64,
        tokenizer_fingerprint="0" * 64,
        config="0" * 64,
        files={},
        id=name,
        revision="random",
        training=None,
    )


class Workshop:
    """Makes the sides of one base and one number of experts, each at its first use.

    The base is the first expert; the others are LoRA adapters of rank 16 on all linear layers with
    random numbers, which changes no timing.

    Attributes:
        base: The base.
        num_experts: E, the base among them.
        adapters: The E - 1 others.
    """

    def __init__(self, base: Base, num_experts: int) -> None:
        self.base, self.num_experts = base, num_experts
        outline = base.model
        if outline.device.type != "cpu":  # random numbers are drawn on a processor
            outline = copy.deepcopy(base.model).to("cpu")
        self.adapters: list[Adapter] = [
            build_random_adapter(outline, rank=RANK, seed=seed) for seed in range(1, num_experts)
        ]
        self._router = PreferringRouter(num_experts) if num_experts > 1 else None
        self._made: dict[str, Any] = {}

    def make(self, name: str) -> Side:
        """A side by name."""
        if name not in self._made:
            self._made[name] = self._make(name)
        side: Side = self._made[name]
        return side

    def _make(self, name: str) -> Side:
        names, router = self._names, self._router
        makers: dict[str, Callable[[], Side]] = {
            PLAIN: lambda: Generating(self.base.model),
            OWN: lambda: Generating(self.own),
            SPECIALIST: lambda: Generating(self.peft, lambda: self._activate(names[:1])),
            ONE_PASS: lambda: Generating(self.peft, lambda: self._activate(names)),
            ROWS: lambda: Mixing(self._run_rows, lambda: self._make_caches(1), router),
            IN_TURN: lambda: Mixing(self._run_in_turn, self._make_all_caches, router),
            MERGED: lambda: Mixing(self._run_merged, self._make_all_caches, router),
            DENSE: lambda: Generating(self.fused),
            SPARSE: lambda: GeneratingSparse(self.fused),
            BLENDED: lambda: Generating(self.fused, experts_per_text="merged"),
            DRAWN: lambda: Drawing(self.fused),
        }
        return makers[name]()

    @property
    def _names(self) -> list[str]:
        return [f"expert-{index + 1}" for index in range(self.num_experts - 1)]

    @property
    def own(self) -> Any:
        """Our model of the base alone."""
        return self._keep("own", lambda: build_causal_lm(PlainModel(self.base)))

    @property
    def fused(self) -> Any:
        """Our model of all experts."""
        return self._keep("fused", self._fuse)

    @property
    def peft(self) -> Any:
        """PEFT's model of all adapters, in the base's dtype, of the base's own weights."""
        return self._keep("peft", self._wrap)

    @property
    def merged(self) -> list[Any]:
        """A whole model an expert, the base first."""
        return self._keep(
            "merged", lambda: [self.base.model, *(self._merge(a) for a in self.adapters)]
        )

    def _keep(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def _fuse(self) -> Any:
        experts = (FusedExpert("base", None), *map(FusedExpert, self._names, self.adapters))
        router = self._router
        assert router is not None
        return build_causal_lm(
            FusedModel(self.base, experts, router, router.name, "probability", frozen_depth=0)
        )

    def _wrap(self) -> Any:
        own, wrapped = share_weights(self.base.model), None
        settings = {"autocast_adapter_dtype": False}
        with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5 for an attribute by its old name.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            for name, adapter in zip(self._names, self.adapters, strict=True):
                folder = str(Path(root) / name)
                save_adapter(adapter, self.base.model, Path(folder))
                if wrapped is None:
                    wrapped = PeftModel.from_pretrained(own, folder, adapter_name=name, **settings)
                else:
                    wrapped.load_adapter(folder, adapter_name=name, **settings)
        assert wrapped is not None
        return wrapped.eval()

    def _activate(self, names: list[str]) -> None:
        self.peft.base_model.set_adapter(names, inference_mode=True)

    def _merge(self, adapter: Adapter) -> Any:
        """A whole model with an adapter inside; what it does not change is the base's."""
        with applied(self.base.model, adapter) as model:
            own = share_weights(model)
            for module_name in adapter.updates:
                module = own.get_submodule(module_name)
                for name, parameter in module.named_parameters(recurse=False):
                    changed = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                    setattr(module, name, changed)
        return own

    def _make_caches(self, count: int) -> list[Any]:
        return [DynamicCache(config=self.base.model.config) for _ in range(count)]

    def _make_all_caches(self) -> list[Any]:
        return self._make_caches(self.num_experts)

    def _run_merged(self, piece: Tensor, caches: list[Any]) -> list[Callable[[], Tensor]]:
        return [
            lambda m=m, c=c: m(input_ids=piece, past_key_values=c).logits
            for m, c in zip(self.merged, caches, strict=True)
        ]

    def _run_in_turn(self, piece: Tensor, caches: list[Any]) -> list[Callable[[], Tensor]]:
        def run(index: int) -> Tensor:
            if index:
                self.peft.set_adapter(self._names[index - 1], inference_mode=True)
            with nullcontext() if index else self.peft.disable_adapter():
                return self.peft(input_ids=piece, past_key_values=caches[index]).logits

        return [lambda index=index: run(index) for index in range(self.num_experts)]

    def _run_rows(self, piece: Tensor, caches: list[Any]) -> list[Callable[[], Tensor]]:
        experts = ["__base__", *self._names]
        rows = [name for name in experts for _ in range(len(piece))]
        output = self.peft(
            input_ids=piece.repeat(len(experts), 1), past_key_values=caches[0], adapter_names=rows
        )
        parts = output.logits.chunk(len(experts))
        return [lambda part=part: part for part in parts]

    def allows(self, name: str, texts: int, positions: int) -> bool:
        """Whether a side is run at all: rows of a prompt's full logits may be too many."""
        numbers = self.num_experts * texts * positions * self.base.model.config.vocab_size
        return name != ROWS or numbers <= LOGITS_AT_ONCE
