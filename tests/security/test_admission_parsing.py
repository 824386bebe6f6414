"""What is read at the door: one form of a signature, bounded JSON, files that are what they say."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from door_helpers import Door, make_blocks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.save import save_adapter
from molora_fed.contributions.manifest import load_contribution, parse_manifest
from molora_fed.corpus.blocks import load_blocks
from molora_fed.corpus.documents import read_documents
from molora_fed.errors import CorpusError, MoloraError, RoutingError, SignatureError
from molora_fed.routing.bundle import find_fused, has_fused, load_manifest
from molora_fed.storage.keys import build_public_pem, sign, verify
from molora_fed.storage.untrusted import clean
from molora_fed.testing import build_random_adapter
from molora_fed.types import Split

FUZZ = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DEEP = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
DIGITS = b'{"a":' + b"9" * 100_000 + b"}"


@pytest.fixture(scope="module")
def door(tmp_path_factory, tiny_checkpoint):
    made = Door(tmp_path_factory.mktemp("door"), tiny_checkpoint())
    yield made
    made.ledger.close()


@pytest.fixture(scope="module")
def good(door):
    """The folder of a good contribution; do not write to it."""
    return door.contribute()


@pytest.mark.parametrize("data", [DEEP, DIGITS, b"\xff", b"[]", b"1", b'{"a":1e400}', b""])
def test_a_manifest_that_is_no_manifest_is_refused_in_one_line(tmp_path, data):
    for name, load, error in (
        ("manifest.json", load_contribution, MoloraError),
        ("fused.json", load_manifest, RoutingError),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(error) as caught:
            load(tmp_path)
        assert len(str(caught.value)) < 2_000 and str(caught.value).isprintable()


@pytest.mark.parametrize("part", ["x" * 300, "a\0b", "d/" * 3_000])
def test_paths_that_no_file_can_have_are_refused_in_one_line(tmp_path, part):
    for load in (load_contribution, load_manifest):
        with pytest.raises(MoloraError) as caught:
            load(tmp_path / part)
        assert "\n" not in str(caught.value)
    assert not has_fused(tmp_path / part)
    assert find_fused(tmp_path / part) == tmp_path / part


def test_a_signature_has_one_form(contributor_key):
    public, data = build_public_pem(contributor_key), b"manifest"
    good = sign(contributor_key, data)
    verify(public, data, good)
    r, s = decode_dss_signature(bytes.fromhex(good))
    longer = bytearray(encode_dss_signature(r, s))
    longer[1] += 1
    longer[3] += 1
    longer[4:4] = b"\0"  # a leading zero that DER does not allow
    others = [
        good.upper(),
        f" {good}",
        f"{good} ",
        f"{good}\n",
        " ".join(good[i : i + 2] for i in range(0, len(good), 2)),
        bytes(longer).hex(),
        good + "00",
        "",
        "zz",
        "0" * 10_000,
    ]
    for other in others:
        with pytest.raises(SignatureError, match="does not verify"):
            verify(public, data, other)


def test_a_signature_file_may_end_with_one_newline_only(door):
    folder = door.contribute("legal-2")
    text = (folder / "signature").read_text()
    load_contribution(folder)
    for changed in (text.upper(), f"{text}\n", f" {text}", text.replace("\n", "\r\n")):
        (folder / "signature").write_text(changed)
        with pytest.raises(SignatureError):
            load_contribution(folder)


def write_parquet(path, values, **options):
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path, **options)
    return path


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_small_parquet_file_does_not_become_gigabytes(tmp_path, dictionary):
    """Two million rows of one text; a page that packs to nothing."""
    values = (
        pyarrow.DictionaryArray.from_arrays(
            pyarrow.array([0] * 2_000_000, pyarrow.int32()), pyarrow.array(["x" * 1_000])
        )
        if dictionary
        else pyarrow.array(["x" * 50_000_000])
    )
    path = write_parquet(
        tmp_path / "a.parquet", values, compression="zstd", use_dictionary=dictionary
    )
    assert path.stat().st_size < 300_000
    seen = 0
    with pytest.raises(CorpusError, match=r"more than .* characters of text"):
        for document in read_documents([path]):
            seen += len(document.text)
    assert seen <= 2**22 + 200 * path.stat().st_size


def test_an_honest_parquet_file_is_read(tmp_path):
    texts = [f"text {n} " * 50 for n in range(3_000)]
    path = write_parquet(tmp_path / "a.parquet", texts, compression="zstd")
    assert [d.text for d in read_documents([path])] == texts


def mutate(data, draw):
    """Some bytes of a file changed, cut out or put in."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(changed)))
        what = draw(st.sampled_from(["set", "cut", "put"]))
        if what == "set" and place < len(changed):
            changed[place] = draw(st.integers(0, 255))
        elif what == "cut":
            del changed[place : place + draw(st.integers(1, 64))]
        else:
            changed[place:place] = draw(st.binary(min_size=1, max_size=16))
    return bytes(changed)


def assert_shown(error):
    """One line that a terminal may show, of bounded length."""
    assert str(error) == clean(error, 2_500)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@FUZZ
@given(data=st.data())
def test_any_manifest_is_read_or_refused_in_one_line(good, data):
    whole = json.loads((good / "manifest.json").read_bytes())
    key = data.draw(st.sampled_from([*whole, "new"]))
    if data.draw(st.booleans()):
        text = json.dumps({**whole, key: data.draw(JSON)}).encode()
    else:
        text = mutate(json.dumps(whole).encode(), data.draw)
    try:
        manifest = parse_manifest(text)
    except MoloraError as error:
        assert_shown(error)
    else:
        assert parse_manifest(manifest.canonical).contribution_id == manifest.contribution_id


@FUZZ
@given(data=st.data())
def test_any_samples_are_read_or_refused_in_one_line(tmp_path, data):
    blocks = make_blocks(Split.ADMISSION, 2)
    path = tmp_path / "admission.safetensors"
    path.write_bytes(mutate(blocks.to_bytes(), data.draw))
    try:
        found = load_blocks(path, max_bytes=10_000)
    except CorpusError as error:
        assert_shown(error)
    else:
        assert found.tokens.dtype == "int32" and found.tokens.shape == found.clusters.shape


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, door):
    """Folders of good adapters, one a format."""
    from molora_fed.adapters.contract import LinearOptions

    root = tmp_path_factory.mktemp("adapters")
    for name, kind, options in (
        ("lora", "lora", None),
        ("delta", "delta", None),
        ("int4", "svd", LinearOptions(precision="int4", group=16)),
    ):
        adapter = build_random_adapter(door.base.model, kind=kind, rank=2)
        save_adapter(adapter, door.base.model, root / name, options=options)
    return root


@FUZZ
@given(data=st.data())
def test_any_adapter_is_read_or_refused_in_one_line(tmp_path, adapters, door, data):
    source = adapters / data.draw(st.sampled_from(["lora", "delta", "int4"]))
    spoiled = data.draw(st.sampled_from(sorted(path.name for path in source.iterdir())))
    for path in source.iterdir():
        content = path.read_bytes()
        if path.name == spoiled:
            size = int.from_bytes(content[:8], "little") + 8
            if path.suffix == ".safetensors":  # the header, where all the meaning is
                content = mutate(content[:size], data.draw) + content[size:]
            elif data.draw(st.booleans()):
                value = json.loads(content)
                key = data.draw(st.sampled_from([*value, "new"]))
                content = json.dumps({**value, key: data.draw(JSON)}).encode()
            else:
                content = mutate(content, data.draw)
        (tmp_path / path.name).write_bytes(content)
    rules = door.charter.identity.adapters
    try:
        adapter = load_adapter(
            tmp_path, rules=rules, model=door.base.model, plugins=door.plugins, name="legal-1"
        )
    except MoloraError as error:
        assert_shown(error)
    else:
        assert adapter.max_rank <= rules.max_rank


@pytest.mark.parametrize("data", [DEEP, DIGITS, b"[1]", b"NaN", b"{", b"x" * 600_000])
def test_the_record_beside_an_adapter_from_elsewhere_is_read_within_bounds(tmp_path, data):
    from molora_fed.cooperative.measured_adapter import _read_record

    (tmp_path / "record.json").write_bytes(data)
    with pytest.raises(MoloraError, match="Delete the file and try again"):
        _read_record(tmp_path)
    (tmp_path / "record.json").unlink()
    assert "source" in _read_record(tmp_path)
