"""The list of deliberate faults; ``python tests/mutations.py`` makes them."""

from __future__ import annotations

from pathlib import Path

import mutations
import pytest


def test_the_repository_is_copied_with_and_without_an_editable_install_s_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "clone"
    for name in ("ditfast", "kernels", "benchmarks", "tests"):
        (clone / name).mkdir(parents=True)
        (clone / name / "__init__.py").write_text(name)
    (clone / "pyproject.toml").write_text("")
    monkeypatch.setattr(mutations, "ROOT", clone)
    mutations.copy_repository(tmp_path / "plain")
    for name in ("kernels", "benchmarks"):
        (clone / "ditfast" / name).symlink_to(clone / name, target_is_directory=True)
    mutations.copy_repository(tmp_path / "linked")
    for copy in ("plain", "linked"):
        assert (tmp_path / copy / "ditfast" / "kernels" / "__init__.py").read_text() == "kernels"


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.fault)
def test_each_fault_changes_its_file(mutation: mutations.Mutation) -> None:
    assert mutation.before in (mutations.ROOT / mutation.file).read_text()
    assert mutation.before != mutation.after
