import subprocess
import sys

import numpy as np
import pytest

from molora_fed.corpus.clusters import compute_shingles, strip_boilerplate


def test_equal_runs_have_equal_hashes_whatever_surrounds_them():
    run = "one two three four five six seven eight"
    inside, alone = compute_shingles([f"Zero, {run.upper()}! nine", run])
    assert alone.shape == (1,)
    assert inside.shape == (3,)
    assert inside[1] == alone[0]
    assert len(set(inside.tolist())) == 3


def test_order_of_words_matters():
    forward, backward = compute_shingles(["a b c d e f g h", "h g f e d c b a"])
    assert forward[0] != backward[0]


@pytest.mark.parametrize("text", ["", "   ", "only seven words are in this text"])
def test_short_text_has_no_shingles(text):
    assert compute_shingles([text])[0].shape == (0,)


def test_text_without_spaces_counts_characters():
    assert compute_shingles(["ファイル名を表示する"])[0].shape == (3,)


def test_hashes_are_the_same_in_another_process():
    text = "the same words in the same order give the same hash everywhere"
    code = (
        "from molora_fed.corpus.clusters import compute_shingles;"
        f"print(compute_shingles([{text!r}])[0].tolist())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert other.strip() == str(compute_shingles([text])[0].tolist())


def test_no_collisions_among_many_runs():
    hashes = compute_shingles([" ".join(str(n) for n in range(50_000))])[0]
    assert np.unique(hashes).size == hashes.size == 49_993


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("# Copyright 2020 X\n# more\nimport os\n", "import os\n"),
        ("#!/usr/bin/env python\n# -*- coding: utf-8 -*-\n\n# Licence: MIT\nx = 1\n", "x = 1\n"),
        ("/* All rights reserved.\n * Y */\nint x;\n", "\nint x;\n"),
        ("// Copyright Z\n\n#include <a>\n", "\n#include <a>\n"),
        ("# What this does\nx = 1\n", "# What this does\nx = 1\n"),
        ("#include <a>\n// Copyright inside\n", "#include <a>\n// Copyright inside\n"),
        ("", ""),
    ],
)
def test_only_leading_licence_comments_are_stripped(text, rest):
    assert strip_boilerplate(text) == rest
