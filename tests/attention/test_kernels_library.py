"""Where the kernels are not there, of another version, or asked for by a wrong name: a sentence, and torch instead."""

import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvfold.attention.choose as choose
import kvfold.attention.cpu.calls as calls
import kvfold.native.library as library
from kvfold.attention.cpu.backend import CpuBackend
from kvfold.attention.reference import ReferenceBackend
from kvfold.errors import ConfigError, KernelsUnavailable
from kvfold.kv.format import PageFormat, Row, Scale, Segment
from kvfold.model.packed import LinearCall
from kvfold.model.packed_heads import HeadsCall
from kvfold.native.build import BuildError, build


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded or chosen yet, and nothing that this test loads is kept."""
    monkeypatch.setattr(library, "library", library.library.__wrapped__)
    monkeypatch.setattr(choose, "_best", choose._best.__wrapped__)
    monkeypatch.delenv(choose.VARIABLE, raising=False)


@pytest.mark.usefixtures("fresh")
def test_without_kernels_torch_serves_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    with caplog.at_level(logging.WARNING):
        assert isinstance(choose.choose_backend(), ReferenceBackend)
    assert "not built" in caplog.text
    with pytest.raises(KernelsUnavailable, match="install kvfold again"):
        choose.choose_backend("cpu")


@pytest.mark.usefixtures("fresh")
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "VERSION", 999)
    with pytest.raises(KernelsUnavailable, match="another version"):
        CpuBackend()


@pytest.mark.usefixtures("fresh")
def test_what_is_no_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_kernels.so").write_bytes(b"not a library")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    with pytest.raises(KernelsUnavailable, match="cannot be loaded"):
        CpuBackend()


def test_names_of_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose.choose_backend("reference"), ReferenceBackend)
    portable = choose.choose_backend("cpu:portable")
    assert isinstance(portable, CpuBackend)
    assert portable.name == "portable"
    with pytest.raises(ConfigError, match="backend 'gpu' is unknown"):
        choose.choose_backend("gpu")
    with pytest.raises(KernelsUnavailable, match="no avx1024"):
        choose.choose_backend("cpu:avx1024")
    monkeypatch.setenv(choose.VARIABLE, "cpu:portable")
    chosen = choose.choose_backend()
    assert isinstance(chosen, CpuBackend)
    assert chosen.name == "portable"


def test_without_a_compiler_the_build_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        build(tmp_path / "kernels.so")


def test_a_failed_build_leaves_what_there_was(tmp_path: Path) -> None:
    target = tmp_path / "kernels.so"
    target.write_bytes(b"before")
    with pytest.raises(BuildError, match="no-such-flag"):
        build(target, ["--no-such-flag"])
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]


def test_units_of_odd_sizes_go_to_the_reference() -> None:
    row = Row((Segment(2, 16),), Scale.TOKEN)
    assert not calls.supported(PageFormat(2048, 16, 12, row, row))


def test_structures_have_the_size_that_the_library_expects() -> None:
    structures = (*calls.STRUCTURES, LinearCall, HeadsCall)
    expected = [library.library().kvfold_struct_size(which) for which in range(len(structures))]
    assert [ctypes.sizeof(structure) for structure in structures] == expected


@pytest.mark.slow
def test_kernels_are_clean_under_sanitizers(tmp_path: Path) -> None:
    """The comparison with the reference once more, with addresses and undefined behaviour checked."""
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g"]
    built = build(tmp_path / "_kernels.so", flags)
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("the compiler has no sanitizers")
    script = Path(__file__).with_name("sanitized.py")
    checked = {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **checked}
    done = subprocess.run(
        [sys.executable, str(script), str(built)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "agreed" in done.stdout
