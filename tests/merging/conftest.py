"""The golden models as directories."""

from pathlib import Path

import pytest

from tests.merging.golden import make


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    return make(tmp_path, "fp32")
