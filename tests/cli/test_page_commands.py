"""The commands of README and pages run as they stand, on a tiny cooperative made ready for them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from molora_cli.main import run
from molora_kalavai.published import load_published_runs
from page_helpers import CHAINED, find_blocks, list_commands, read_page

from molora_fed.bank import Expert, build_held_out_bank
from molora_fed.cascade.config import load_config
from molora_fed.corpus.blocks import Blocks
from molora_fed.storage.compute import read_compute
from molora_fed.testing import build_random_adapter
from molora_fed.types import Split

pytestmark = [
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

STAYING = ("serve", "join", "api", "chat")
"""Commands that stay until somebody ends them: tests of their own start these."""


@pytest.fixture(scope="module")
def kept(setup, tiny_checkpoint, tmp_path_factory):
    """Two members' specialists, `alice` and `bob`, and their fused cooperative; do not write."""
    root = tmp_path_factory.mktemp("kept")
    shutil.copytree(setup.cooperative, root / "coop")
    shutil.copytree(tiny_checkpoint(), root / "small-base")
    for name, domain in (("alice", "abc"), ("bob", "xyz")):
        train = ["train", "--cooperative", root / "coop", "--domain", domain, "--name", name]
        train += ["--data", setup.texts[domain], "--out", root / name, "--threads", "1"]
        assert run([str(word) for word in train]) == 0
    shutil.copytree(root / "coop", root / "empty")
    fuse = ["fuse", "--cooperative", root / "coop", root / "alice", root / "bob"]
    assert run([str(word) for word in fuse]) == 0
    return root


@pytest.fixture
def place(kept, setup, tmp_path, monkeypatch):
    """A folder of the test's own where it works, with the kept things in it, and a home."""
    place = tmp_path / "place"
    shutil.copytree(kept, place)
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    shutil.copytree(setup.texts["abc"], tmp_path / "home" / "contracts")
    (place / "notes.txt").write_text("abc abd dcb " * 200)
    return place


@pytest.fixture
def follow(molora):
    """`follow(block, {"as written": "here"})` runs its commands; what each printed, in order."""

    def follow(block, replaced=(), failing=()):
        said = []
        for line in list_commands(block):
            for old, new in dict(replaced).items():
                line = line.replace(old, str(new))
            first, *words = shlex.split(line)
            if first != "molora" or words[0] == "--plugin":  # which stays in a process
                done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
                assert done.returncode == 0, f"{line}: {done.stderr}"
                said.append(done.stdout)
            elif words[0] not in STAYING:
                assert not CHAINED.search(line)
                words = [re.sub("^~(?=/)", str(Path.home()), word) for word in words]
                ran = molora(*words)
                assert (ran.code != 0) == (line in failing), f"{line}: {ran.err}"
                said.append(ran.out)
        return said

    return follow


def find_sessions(page):
    """Blocks of commands of a page."""
    return find_blocks(read_page(page), "bash", "console")


def test_readme_from_training_to_the_history_of_forecasts(follow, place):
    (block,) = (code for code in find_sessions("README.md") if "molora train" in code)
    shutil.rmtree(place / "coop")
    (place / "empty").rename(place / "coop")
    (place / "bob").rename(place / "other")
    *_, report, _ = follow(block)
    assert "legal" in report
    assert (place / "adapters" / "bob" / "adapter_model.safetensors").is_file()


def test_readme_founding_and_inviting(follow, place, tiny_checkpoint):
    (block,) = (code for code in find_sessions("README.md") if "molora coop invite" in code)
    shutil.rmtree(place / "coop")
    _, *rest = block.splitlines(keepends=True)  # the built-in base: `make demo` makes that
    *_, invitation, _, status, doctor = follow(
        "".join(rest),
        {"EleutherAI/pythia-410m@main": tiny_checkpoint()},
        failing={"molora doctor coop"},  # no server runs, which is what is wrong
    )
    assert invitation.startswith("molora1.") and status and doctor


def test_readme_a_cascade_as_its_page_describes_it(follow, place, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "never sent: nobody asks the endpoint")
    whole, retrieval = find_blocks(read_page("cascades.md"), "toml")
    (place / "cascade.toml").write_text(whole)
    (place / "bob").rename(place / "trained-bob")
    (session,) = find_sessions("cascades.md")
    *_, replayed, reported = follow(session)
    assert " 0 differences" in replayed and "ACAR-U" in reported
    (block,) = (code for code in find_sessions("README.md") if "cascade run" in code)
    (few,) = (line for line in list_commands(session) if "cascade tasks" in line)
    tasks, *rest = list_commands(block)
    shutil.rmtree(place / "run")
    follow("\n".join([few, *rest]))
    assert tasks == few.partition(" --families")[0]
    (solved,) = re.findall(r'examples = "(\S+)"', retrieval)
    (place / solved).write_text('{"id": "s1", "prompt": "1+1=", "answer": "2"}\n')
    text = whole.replace("[cascade]\n", retrieval.partition("[cascade.retrieval]")[0], 1)
    (place / "cascade.toml").write_text(text + retrieval[retrieval.index("[cascade.retrieval]") :])
    found = load_config(place / "cascade.toml").cascade
    assert found.retrieval is not None and found.example == "{prompt}{answer}\n"


@pytest.mark.parametrize(
    "page", ["README.md", "studies.md", "baselines.md", "evolution_studies.md"]
)
def test_plans_of_studies(follow, place, page):
    lines = [
        line
        for code in find_sessions(page)
        for line in list_commands(code)
        if line.startswith("molora study") and ("--plan" in line or "--list" in line)
    ]
    assert lines and all(follow("\n".join(lines)))


def test_settings_of_studies(follow, place):
    (acar,) = find_blocks(read_page("acar_study.md"), "toml")
    (place / "acar.toml").write_text(acar)
    (plan,) = follow("molora study acar --config acar.toml --plan")
    assert "seeds" in plan or "tasks" in plan
    other, _ = find_blocks(read_page("studies.md"), "toml")
    (place / "other.toml").write_text(other)
    assert follow("molora study real-base --config other.toml --plan")


def test_adapters_of_a_budget_and_of_another_program(follow, place, tiny_checkpoint):
    train, launched, own = find_sessions("adapters.md")
    follow("molora coop amend coop --set training.kind=svd")
    follow(train, {"--domain science": "--domain science --data ~/contracts"})
    assert (place / "science" / "adapter" / "adapter_model.safetensors").stat().st_size <= 200_000
    assert "accelerate launch" in launched  # started by tests/unit/training/test_launched.py
    shutil.copytree(place / "alice" / "adapter", place / "my-lora")
    shutil.copytree(Path.home() / "contracts", place / "unseen-texts")
    (place / "my-lora" / "molora_adapter.json").unlink()
    *_, told = follow(own, {"BASE": tiny_checkpoint()})
    assert (place / "law" / "adapter" / "adapter_model.safetensors").is_file() and told


def test_every_form_of_an_export(follow, place):
    written, served = find_sessions("export.md")
    (place / "coop").rename(place / "fused")
    follow(written)
    assert (place / "whole" / "config.json").is_file()
    assert list_commands(served)[1].startswith("llama-server -m base.gguf")
    assert (place / "gguf" / "base.gguf").is_file() and (place / "gguf" / "alice.gguf").is_file()


def test_forecasts_of_every_stage(follow, place, setup):
    first, session = find_sessions("forecasts.md")
    case = load_published_runs()[0].case
    domains = case.losses.domains
    rows = [[case.losses.specialists[s][d] for d in domains] for s in domains]
    run = {"condition": "one", "domains": list(domains), "specialists": rows}
    run["base"] = [case.losses.base[domain] for domain in domains]
    (place / "matrices.json").write_text(json.dumps({"runs": [run]}))
    for name, short in (("alice", "a"), ("bob", "b")):
        (place / name).rename(place / short)
    for short, domain in (("a", "abc"), ("b", "xyz")):
        train = f"molora train --cooperative coop --domain {domain} --data {setup.texts[domain]}"
        follow(f"{train} --steps 1 --threads 1 --name pilot-{short} --out pilot-{short}")
    printed = follow(first)
    assert list(json.loads(printed[0])) == ["runs"]
    assert (place / "history.png").is_file()
    (table,) = follow(session)
    rows = r"^│ ([\w-]+) +│ best specialist"
    assert re.findall(rows, table, re.MULTILINE) == re.findall(rows, session, re.MULTILINE)


def test_a_population_is_evolved(follow, place):
    public, session, private = find_sessions("populations.md")
    follow(
        "molora coop amend coop --set population.start_steps=2 --set population.steps=2"
        " --set population.slots=3 --set population.rank=2 --set population.guard=spending"
    )
    *_, said, measured = follow(public, {"generations=5": "generations=1"})
    assert said and "mine" in measured and (place / "tree.png").is_file()
    assert list_commands(session) == ["molora evolve coop"]
    amend, *rest = list_commands(private)
    assert "population.data=private" in amend and len(rest) == 2


def test_how_a_cooperative_changes(follow, place):
    recommend, grow, shrink, amend, made = find_sessions("protocol.md")
    (told,) = follow(recommend)
    assert told == recommend.partition("\n")[2]
    shutil.rmtree(place / "coop")
    (place / "empty").rename(place / "coop")
    follow("molora coop admit coop alice")
    admitted, _ = follow(grow)
    assert admitted.splitlines()[-2] == grow.splitlines()[1]
    (left,) = follow(shrink, {"law-1": "alice"})
    words = re.compile(r"^(\w+(?: in)?)  ", re.MULTILINE)
    assert words.findall(left) == words.findall(shrink)
    (told,) = follow(amend)
    assert [line.split("  ")[0] for line in told.splitlines()[1:]] == [
        line.split("  ")[0] for line in amend.splitlines()[2:]
    ]
    assert "--checkpoint" in made  # done by tests/cli/test_membership.py


def test_tasks_are_those_of_the_page(follow, place):
    (session,) = find_sessions("tasks.md")
    told, _ = follow(session)
    assert f"{told}$ head" in session
    first = (place / "tasks.jsonl").read_text().splitlines()[0]
    assert session.splitlines()[-1] == first


def test_a_trace_that_was_changed_is_found(follow, place):
    writing, _ = find_blocks(read_page("traces.md"), "python")
    exec(compile(writing, "traces.md", "exec"), {})
    good, bad = find_sessions("traces.md")
    sealed = r"^run demo: \d+ records, \d+ signed for$"
    line = "molora trace verify run.jsonl --key public.pem"
    told, _ = follow(good)
    assert re.search(sealed, told, re.MULTILINE)
    follow(bad, failing={line})


def test_a_plugin_in_one_file(follow, place):
    plugin, _ = find_blocks(read_page("writing_plugins.md"), "python")
    (place / "last_token.py").write_text(plugin)
    (block,) = find_sessions("writing_plugins.md")
    checked, fused = follow(block, {"COOPERATIVE": "coop"})
    assert "last-token" in checked and "last-token" in fused
    shutil.copy("last_token.py", "my_router.py")
    (block,) = find_sessions("testing_plugins.md")
    lines = [line for line in list_commands(block) if "my_router.py" in line]
    assert len(follow("\n".join(lines), {"COOPERATIVE": "coop"})) == 2


def test_deploying(follow, place, tiny_checkpoint):
    (compute,) = find_blocks(read_page("deploy.md"), "toml")
    blocks = find_sessions("deploy.md")
    (place / "coop" / "settings.toml").write_text(compute)
    assert str(read_compute(place / "coop").device) == "cuda:0"
    (place / "coop" / "settings.toml").unlink()
    (invite,) = (code for code in blocks if code.startswith("$ molora coop invite"))
    shutil.rmtree(place / "coop")
    (create,) = (code for code in blocks if code.startswith("$ molora coop create"))
    follow(create, {"coop create coop": f"coop create coop --base {tiny_checkpoint()}"})
    follow(invite, {" > alice.invitation": ""})
    (watch,) = (code for code in blocks if "molora coop members" in code)
    lines = [line for line in list_commands(watch) if "contributor-legal" not in line]
    assert all(follow("\n".join(lines), failing={"molora doctor coop"}))
    units = [code for code in blocks if "systemctl" in code]
    for file in re.findall(r"contrib/deploy/\S+", units[0]):
        assert (Path(__file__).parents[2] / file).is_file()


def test_the_model_in_python(place):
    first, alone, saved = find_blocks(read_page("causal_lm.md"), "python")
    namespace = {}
    for code in (first, alone, saved):
        torch.manual_seed(0)
        exec(compile(code, "causal_lm.md", "exec"), namespace)
    assert namespace["tokens"].shape[0] == 2
    assert (place / "my-model" / "config.json").is_file()


def test_a_merge_in_python(tiny_base, tmp_path):
    (code,) = find_blocks(read_page("merges.md"), "python")
    adapters = [build_random_adapter(tiny_base.model, kind="lora", seed=seed) for seed in (1, 2)]
    tokens = np.random.default_rng(0).integers(0, 256, (3, 12)).astype(np.int32)
    documents = np.arange(3, dtype=np.int32)[:, None].repeat(12, axis=1)
    blocks = [Blocks("noise", Split.HELD_OUT, tokens, documents, documents)]
    experts = [Expert("base", None), Expert("one", adapters[0])]
    bank = build_held_out_bank(tmp_path, tiny_base, experts, blocks)
    namespace = {"adapters": adapters, "held_out_bank": bank}
    exec(compile(code, "merges.md", "exec"), namespace)
    assert namespace["losses"].shape[0] == 3 and namespace["merged"].name == "ties"


def test_a_served_model_is_a_member(place):
    (member,) = find_blocks(read_page("serving.md"), "toml")
    cascade = '[cascade]\nmembers = ["theirs"]\n'
    (place / "c.toml").write_text(cascade + member)
    assert load_config(place / "c.toml").models["theirs"].kind == "endpoint"
