"""Folders of many tools: PEFT's logits, or a refusal with cause and repair; see adapter_folders."""

import contextlib
import json
import random
import time

import pytest
import torch
from adapter_folders import (
    CASES,
    CONFIG,
    DORA_TOLERANCE,
    TOLERANCE,
    has_only_factors,
    make,
    peft_logits,
    quiet,
    read,
    tiny_base,
)
from safetensors.torch import save_file

from molora_fed.adapters.compatibility import applied, check_adapter_fits
from molora_fed.adapters.convert import convert_adapter
from molora_fed.adapters.files import META_FILE, WEIGHTS_FILE, load_adapter
from molora_fed.adapters.inspection import inspect_folder, report_on_base
from molora_fed.adapters.peft_config import NamePatterns
from molora_fed.errors import AdapterError, ConfigError
from molora_fed.storage.files import hash_file
from molora_fed.testing.models import build_tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

READ = [case for case in CASES if not case.refused]
REFUSED = [case for case in CASES if case.refused]


def name_of(case):
    return f"{case.made_by}: {case.name}"


def hash_folder(folder):
    return {str(p): hash_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_there_are_enough_of_each():
    assert len(READ) >= 45 and len(REFUSED) >= 45
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", READ, ids=name_of)
def test_what_loses_nothing_is_read_as_peft_reads_it(case, tmp_path, tokens):
    with quiet():
        original = case.build(tmp_path / "a") or tmp_path / "a"
    base = tiny_base(case.architecture)
    before = hash_folder(tmp_path / "a")
    expected = peft_logits(case.architecture, original, tokens)
    with torch.no_grad():
        plain = base(tokens).logits
    assert not torch.allclose(expected, plain, atol=1e-2)  # it does something

    if case.needs_base:
        with pytest.raises(AdapterError, match=r"adapter check FOLDER --base BASE"):
            inspect_folder(tmp_path / "a")
    else:
        inspect_folder(tmp_path / "a")
    report, adapter = report_on_base(tmp_path / "a", base, tokenizer=build_tiny_tokenizer())
    assert report.changed == report.modules == len(adapter.updates)
    assert case.note in "; ".join(report.notes)
    with applied(base, adapter), torch.no_grad():
        assert torch.allclose(base(tokens).logits, expected, atol=TOLERANCE)

    convert_adapter(tmp_path / "a", tmp_path / "normal", model=base)
    assert has_only_factors(tmp_path / "normal") and (tmp_path / "normal" / META_FILE).exists()
    found = peft_logits(case.architecture, tmp_path / "normal", tokens)
    assert torch.allclose(found, expected, atol=TOLERANCE)
    again = load_adapter(tmp_path / "normal")
    for module, update in adapter.updates.items():
        assert torch.equal(again.updates[module].a, update.a)
        assert torch.equal(again.updates[module].b, update.b)
        assert again.updates[module].scale == pytest.approx(update.scale, rel=1e-12)
    assert hash_folder(tmp_path / "a") == before


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_what_loses_something_is_refused_with_cause_and_repair(case, tmp_path):
    with quiet():
        case.build(tmp_path / "a")
    with pytest.raises(AdapterError) as caught:
        report_on_base(
            tmp_path / "a",
            tiny_base(case.architecture),
            tokenizer=build_tiny_tokenizer(),
            name="legal-07",
        )
    check_line(str(caught.value), case)
    if case.late:
        inspect_folder(tmp_path / "a")
        return
    with pytest.raises(AdapterError) as caught:
        inspect_folder(tmp_path / "a", name="legal-07")
    if case.needs_base:
        assert "adapter check FOLDER --base BASE" in str(caught.value)
        inspect_folder(tmp_path / "a", has_base=True)
    else:
        check_line(str(caught.value), case)


def check_line(line, case):
    assert "'legal-07'" in line and "\n" not in line
    assert "expected" in line and ", got " in line
    assert case.refused in line
    assert case.repair in line


def test_the_exact_difference_of_dora_is_peft_s(tmp_path, tokens):
    base = tiny_base("llama")
    make(tmp_path / "a", targets="all-linear", use_dora=True)
    expected = peft_logits("llama", tmp_path / "a", tokens)
    convert_adapter(tmp_path / "a", tmp_path / "delta", model=base, kind="delta")
    with applied(base, load_adapter(tmp_path / "delta")), torch.no_grad():
        assert torch.allclose(base(tokens).logits, expected, atol=DORA_TOLERANCE)
    whole = convert_adapter(tmp_path / "a", tmp_path / "whole", model=base, kind="svd", rank=32)
    assert whole.loss_fraction < 1e-5
    assert torch.allclose(
        peft_logits("llama", tmp_path / "whole", tokens), expected, atol=DORA_TOLERANCE
    )
    short = convert_adapter(tmp_path / "a", tmp_path / "short", model=base, kind="svd", rank=4)
    assert 0.01 < short.loss_fraction < 0.5 and short.adapter.max_rank == 4


@pytest.mark.parametrize("shape", [(), (3,), (32, 2)])
def test_magnitudes_of_another_size_are_refused(tmp_path, shape):
    make(tmp_path / "a", use_dora=True)
    tensors = read(tmp_path / "a")
    key = next(key for key in sorted(tensors) if "magnitude" in key)
    save_file({**tensors, key: torch.ones(shape)}, tmp_path / "a" / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=r"magnitude_vector' of shape .* instead of \(32,\)"):
        convert_adapter(tmp_path / "a", tmp_path / "b", model=tiny_base("llama"), kind="delta")


def test_rows_without_dimensions_and_a_tokenizer_without_a_list_are_refused(tmp_path):
    make(tmp_path / "a", trainable_token_indices=[3])
    tensors = read(tmp_path / "a")
    key = next(key for key in tensors if "trainable_tokens" in key)
    save_file({**tensors, key: torch.tensor(1.0)}, tmp_path / "a" / WEIGHTS_FILE)
    (tmp_path / "a" / "tokenizer.json").write_text('{"added_tokens": 5}')
    with pytest.raises(AdapterError, match="rows of tokens token 3"):
        load_adapter(tmp_path / "a", model=tiny_base("llama"))


def test_a_folder_with_a_line_break_in_its_name_is_refused_in_one_line(tmp_path):
    with pytest.raises(AdapterError) as caught:
        inspect_folder(tmp_path / "a\nb")
    assert "\n" not in str(caught.value)


def test_saved_embeddings_are_left_out_on_demand(tmp_path, tokens):
    base = tiny_base("llama")
    case = next(case for case in CASES if case.name == "embeddings trained")
    case.build(tmp_path / "a")
    made = convert_adapter(tmp_path / "a", tmp_path / "b", model=base, drop_saved=True)
    assert len(made.dropped) == 1 and has_only_factors(tmp_path / "b")


def test_conversion_overwrites_nothing(tmp_path):
    make(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="one that holds something"):
        convert_adapter(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ConfigError, match="expected a base to compute kind svd"):
        convert_adapter(tmp_path / "a", tmp_path / "c", kind="svd")
    assert not (tmp_path / "c").exists()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["mine.txt"]


def test_conversion_without_a_base_keeps_the_names(tmp_path, tokens):
    make(tmp_path / "a", targets="all-linear")
    made = convert_adapter(tmp_path / "a", tmp_path / "b")
    assert torch.equal(
        peft_logits("llama", tmp_path / "b", tokens), peft_logits("llama", tmp_path / "a", tokens)
    )
    check_adapter_fits(made.adapter, tiny_base("llama"))


def test_what_a_folder_claims_is_shown_cleaned_and_without_paths(tmp_path):
    make(tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    for given, shown in {
        "meta-llama/Llama-3.2-1B": "meta-llama/Llama-3.2-1B",
        "/home/alice/models/llama": "…/llama",
        "C:\\Users\\alice\\llama": "…/llama",
        "../../etc": "…/etc",
        "x\x1b[31m/y": "…/y",
        None: "",
    }.items():
        config["base_model_name_or_path"] = given
        (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
        assert inspect_folder(tmp_path / "a").claims.base == shown


SLOW = ("(a+)+$", "(a|a)*b", "(.*)*x", r"(\w+\s?)*\1", "(x{1,1000}){1,1000}", "a{,3}", "(")


@pytest.mark.parametrize("key", SLOW)
def test_a_pattern_from_outside_takes_linear_time_or_is_refused(key):
    start = time.monotonic()
    try:
        patterns = NamePatterns({key: 2}, 1, name="legal-07", what="alpha_pattern")
        for _ in range(100):
            assert patterns.find("a" * 4_000 + "!") == 1
    except AdapterError as error:
        assert "Write the modules' names out" in str(error) and "\n" not in str(error)
    assert time.monotonic() - start < 2


def test_patterns_are_bounded():
    many = {f"x{n}|y": 2 for n in range(65)}
    with pytest.raises(AdapterError, match="at most 64 regular expressions"):
        NamePatterns(many, 1, name="legal-07", what="alpha_pattern")
    names = {f"model.layers.{n}.q_proj": n for n in range(1, 5_000)}
    assert NamePatterns(names, 0).find("model.layers.4321.q_proj") == 4321


def test_every_key_of_peft_is_judged():
    from dataclasses import fields

    from peft import LoraConfig

    from molora_fed.adapters import peft_config

    judged = peft_config.DEFAULTS.keys() | peft_config._ANY_VALUE
    assert {f.name for f in fields(LoraConfig)} <= judged
    defaults = LoraConfig().to_dict()
    assert {k: defaults[k] for k in peft_config.DEFAULTS} == peft_config.DEFAULTS


def test_the_first_answer_imports_no_heavy_library(tmp_path):
    import subprocess
    import sys

    make(tmp_path / "a")
    code = (
        "import sys, pathlib; from molora_fed.adapters.inspection import inspect_folder; "
        "inspect_folder(pathlib.Path(sys.argv[1])); "
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_shards_count_together(tmp_path):
    from molora_fed.charter import AdapterRules

    case = next(case for case in CASES if case.name == "shards with an index")
    case.build(tmp_path / "a")
    largest = max(path.stat().st_size for path in (tmp_path / "a").glob("*.safetensors"))
    with pytest.raises(AdapterError, match="in 2 shards"):
        load_adapter(tmp_path / "a", rules=AdapterRules(max_bytes=largest))
    adapter = load_adapter(tmp_path / "a", rules=AdapterRules(max_bytes=10**6))
    shard = next((tmp_path / "a").glob("*00002-of*.safetensors"))
    tensors = {key: tensor + 1 for key, tensor in read_file(shard).items()}
    save_file(tensors, shard)
    assert load_adapter(tmp_path / "a").hash != adapter.hash


def read_file(path):
    from safetensors.torch import load_file

    return {key: tensor.clone() for key, tensor in load_file(path).items()}


def test_a_module_of_zeros_is_not_counted_as_changed(tmp_path):
    make(tmp_path / "a")
    tensors = read(tmp_path / "a")
    key = next(key for key in sorted(tensors) if "lora_A" in key)
    save_file({**tensors, key: tensors[key] * 0}, tmp_path / "a" / WEIGHTS_FILE)
    report, _ = report_on_base(tmp_path / "a", tiny_base("llama"))
    assert (report.changed, report.modules) == (3, 4)


VALUES = (
    None, True, 0, -1, 2**63, 1e308, "", "x", [], [1], [None], [{}], {}, {"a": 1}, {"q_proj": "x"},
    {"(": 1}, {"a" * 500: 3}, [[1]], {"x": [1]}, {"q_proj": True},
)  # fmt: skip
PARTS = (
    "base_model", "model", "layers", "0", "self_attn", "q_proj", "lora_A", "lora_B", "weight",
    "default", "_orig_mod", "module", "lora_magnitude_vector", "lm_head", "modules_to_save", "bias",
    "trainable_tokens_delta", "token_adapter", "score", "base_layer", "lora_embedding_A", "lora_E",
    "embed_tokens", "norm", "9" * 20,
)  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_whatever_config_and_names_say_it_is_read_or_refused_in_one_line(seed, tmp_path):
    draw = random.Random(seed)
    make(tmp_path / "a", modules_to_save=["lm_head"])
    good = json.loads((tmp_path / "a" / CONFIG).read_text())
    tensors = read(tmp_path / "a")
    for _ in range(100):
        config = {**good, **{draw.choice(list(good)): draw.choice(VALUES) for _ in range(2)}}
        changed = dict(tensors)
        for _ in range(draw.randrange(4)):
            key = draw.choice(list(changed))
            segments, tensor = key.split("."), changed.pop(key)
            match draw.randrange(3):
                case 0:
                    segments[draw.randrange(len(segments))] = draw.choice(PARTS)
                case 1:
                    segments.insert(draw.randrange(len(segments) + 1), draw.choice(PARTS))
                case _:
                    shape = [draw.choice([0, 1, 4, 32]) for _ in range(draw.randrange(4))]
                    tensor = torch.zeros(shape)
                    segments = draw.choices(PARTS, k=draw.randrange(1, 7))
            changed[".".join(segments)] = tensor
        (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
        save_file(changed, tmp_path / "a" / WEIGHTS_FILE)
        for look in (inspect_folder, lambda folder: report_on_base(folder, tiny_base("llama"))):
            with contextlib.suppress(AdapterError):
                try:
                    look(tmp_path / "a")
                except AdapterError as error:
                    assert "\n" not in str(error) and len(str(error)) < 4_000
                    raise
