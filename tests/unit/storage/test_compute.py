"""What people ask for: options of a command over settings of a home."""

import pytest

from molora_fed.errors import ComputeError
from molora_fed.storage.compute import Compute, read_compute


def test_options_count_before_the_homes_settings_and_these_before_auto(tmp_path):
    assert read_compute(tmp_path) == Compute(device="auto", dtype="auto")
    (tmp_path / "settings.toml").write_text('[compute]\ndevice = "cuda:1"\ndtype = "bfloat16"\n')
    assert read_compute(tmp_path) == Compute(device="cuda:1", dtype="bfloat16")
    asked = Compute.parse("cpu", None)
    assert read_compute(tmp_path, asked) == Compute(device="cpu", dtype="bfloat16")
    (tmp_path / "settings.toml").write_text("")
    assert read_compute(tmp_path, asked) == asked


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('[compute]\ndevice = "gpu"\n', "device: .* 'gpu'"),
        ('[compute]\ndtype = "float16"\n', "dtype: .* 'float16'"),
        ('[compute]\nthreads = 2\n', "threads"),
        ("[other]\n", "other"),
        ("[compute\n", "TOML"),
        ("compute = 3\n", "valid dictionary"),
        ("#" * 70_000, "more than"),
        ("\udcff", "TOML"),
    ],
)  # fmt: skip
def test_settings_that_say_something_else_are_one_line(tmp_path, text, named):
    (tmp_path / "settings.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ComputeError, match=named) as caught:
        read_compute(tmp_path)
    assert "\n" not in str(caught.value) and "settings.toml" in str(caught.value)


@pytest.mark.parametrize(("device", "dtype"), [("tpu", None), (None, "int8"), ("cuda:9999", None)])
def test_options_that_name_nothing_known_are_one_line(device, dtype):
    with pytest.raises(ComputeError, match="expected device auto, cpu, cuda") as caught:
        Compute.parse(device, dtype)
    assert "\n" not in str(caught.value)
