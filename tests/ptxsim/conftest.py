"""The simulator's own tests need a C++ compiler, and leave Triton's driver as they found it."""

import os
import shutil
from collections.abc import Iterator

import pytest
from support import WHERE

if WHERE == "interpreter" or not shutil.which(os.environ.get("CXX", "g++")):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="module")
def _driver_is_put_back() -> Iterator[None]:
    import ptxsim

    yield
    ptxsim.uninstall()
