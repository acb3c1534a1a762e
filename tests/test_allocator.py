"""The allocator's setting is there before torch reads it, and never replaces the user's own."""

import os
import subprocess
import sys

import pytest

SHOW = "import megavlm, os, sys; print('torch' in sys.modules, *map(os.environ.get, ('PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF')))"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "False expandable_segments:True None"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "False max_split_size_mb:64 None"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "False None max_split_size_mb:64"),
    ],
)
def test_expandable_segments_unless_the_user_says_otherwise(given, found):
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    shown = subprocess.run([sys.executable, "-c", SHOW], env=environment | given, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == found
