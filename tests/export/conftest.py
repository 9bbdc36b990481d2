"""A checkpoint that a test may change."""

from pathlib import Path

import pytest
from support import write_checkpoint


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A tiny checkpoint of its own for each test."""
    return write_checkpoint(tmp_path / "tiny", prompts={"query": "a dog "})
