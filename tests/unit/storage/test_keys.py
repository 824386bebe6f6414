import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from molora_fed.errors import SignatureError
from molora_fed.storage.keys import (
    build_public_pem,
    key_fingerprint,
    load_key,
    load_or_make_key,
    sign,
    verify,
)


def write_private(path, key):
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    path.chmod(0o600)


def test_made_once_for_the_owner_only(tmp_path):
    path = tmp_path / "deep" / "key.pem"
    first = load_or_make_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert first.curve.name == "secp384r1"
    assert build_public_pem(load_or_make_key(path)) == build_public_pem(first)
    assert [p.name for p in path.parent.iterdir()] == ["key.pem"]


def test_made_by_many_at_once_is_one_key(tmp_path):
    path = tmp_path / "key.pem"
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda _: load_or_make_key(path), range(16)))
    assert len({build_public_pem(key) for key in keys}) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["key.pem"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_key_that_others_can_read_is_refused(tmp_path, mode):
    path = tmp_path / "key.pem"
    load_or_make_key(path)
    path.chmod(mode)
    with pytest.raises(SignatureError, match=rf"mode 600\), got mode {mode:o}. Run `chmod 600"):
        load_or_make_key(path)


def test_other_curves_and_garbage_are_refused(tmp_path):
    path = tmp_path / "key.pem"
    write_private(path, ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(SignatureError, match="expected a P-384 private key, got curve secp256r1"):
        load_key(path)
    for content in (b"", b"nonsense", b"x" * 10_000):
        path.write_bytes(content)
        with pytest.raises(SignatureError, match="unencrypted P-384 private key in PEM form"):
            load_key(path)
    with pytest.raises(SignatureError, match="No such file"):
        load_key(tmp_path / "none.pem")


def test_signature_holds_for_these_bytes_of_this_key_only(contributor_key, coordinator_key):
    public = build_public_pem(contributor_key)
    signature = sign(contributor_key, b"manifest")
    assert signature == sign(contributor_key, b"manifest")
    verify(public, b"manifest", signature)
    flipped = f"{signature[:-1]}{'0' if signature[-1] != '0' else '1'}"
    for pem, data, text in (
        (public, b"manifest!", signature),
        (build_public_pem(coordinator_key), b"manifest", signature),
        (public, b"manifest", flipped),
        (public, b"manifest", ""),
        (public, b"manifest", "not hex"),
        (public, b"manifest", signature[:40]),
    ):
        with pytest.raises(SignatureError, match="got one that does not verify"):
            verify(pem, data, text, what="the manifest")


def test_public_keys(contributor_key, coordinator_key):
    public = build_public_pem(contributor_key)
    assert key_fingerprint(public) == key_fingerprint(public.replace("\n", "\r\n"))
    assert key_fingerprint(public) != key_fingerprint(build_public_pem(coordinator_key))
    other = ec.generate_private_key(ec.SECP521R1())
    with pytest.raises(SignatureError, match="got curve secp521r1"):
        key_fingerprint(build_public_pem(other))
    for text in ("", "nonsense", "x" * 10_000):
        with pytest.raises(SignatureError, match="P-384 public key in PEM form"):
            key_fingerprint(text)
