"""The simulator's own tests need a C++ compiler, and leave Triton's driver as they found it."""

import os
import shutil
from collections.abc import Iterator

import pytest
from support import WHERE

if WHERE == "interpreter" or not shutil.which(os.environ.get("CXX", "g++")):
    collect_ignore_glob = ["test_*.py"]

ARCH = int(os.environ.get("PTXSIM_ARCH", "80"))


@pytest.fixture(autouse=True)
def _simulator(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernels run on the simulator, for the target of the test's parameter ``arch`` or else of $PTXSIM_ARCH."""
    import ptxsim

    ptxsim.install(request.getfixturevalue("arch") if "arch" in request.fixturenames else ARCH)
    with ptxsim.set_options(check_init=True, check_race=True):
        yield
    ptxsim.uninstall()
