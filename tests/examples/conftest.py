"""What the tests of examples share."""

import importlib.util
import sys
from types import ModuleType

import pytest

from tests.conftest import ROOT

HERE = ROOT / "examples/python_functions"


@pytest.fixture(scope="session")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", HERE / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare"] = module
    spec.loader.exec_module(module)
    return module
