"""No line of the code is for one make of accelerator, outside the one module that knows them."""

import ast
from pathlib import Path

import pytest

from tutelage.models import device

SOURCE = Path(__file__).parents[2] / "src" / "tutelage"
DEVICES = ("cuda", "npu", "mps", "xpu", "hpu")
COLLECTIVES = ("nccl", "hccl", "xccl")
ALLOWED = {
    "models/device.py": "the module that knows them",
    "recipe/tables.py": "the values that `runtime.device` may have",
    "cli/evaluate.py": "the values that `--device` may have",
}


def words_of_one_make(tree: ast.AST) -> list[tuple[int, str]]:
    """(Line, what stands there): names of devices as whole strings, `.cuda`, `.npu`, nccl, hccl."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            # Whole strings, with or without an index; text for people may well say such a word.
            name = node.value.partition(":")[0].lower()
            if name in DEVICES or name in COLLECTIVES:
                found.append((node.lineno, node.value))
        elif isinstance(node, ast.Attribute) and node.attr in (*DEVICES, *COLLECTIVES):
            found.append((node.lineno, f".{node.attr}"))
        elif isinstance(node, ast.Name) and node.id in COLLECTIVES:
            found.append((node.lineno, node.id))
    return found


@pytest.mark.parametrize("line", [
    "model.cuda()", "x.to('cuda')", "torch.device('npu:0')", "torch.cuda.empty_cache()",
    "init(backend='nccl')", "torch.npu.synchronize()", "init(backend='hccl')", "x.npu()",
])  # fmt: skip
def test_a_line_for_one_make_is_found(line: str) -> None:
    assert words_of_one_make(ast.parse(line))


@pytest.mark.parametrize("line", [
    "torch.accelerator.synchronize()", "x.to(device)", "init(backend=None)",
    "raise E('no HCCL here: see docs/ascend.md')",
])  # fmt: skip
def test_a_neutral_line_is_none(line: str) -> None:
    assert not words_of_one_make(ast.parse(line))


def test_no_file_is_for_one_make_of_accelerator() -> None:
    found = {
        f"{path.relative_to(SOURCE).as_posix()}:{line}: {what}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path.relative_to(SOURCE).as_posix() not in ALLOWED
        for line, what in words_of_one_make(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert not found


def test_every_allowed_file_still_needs_it() -> None:
    for name in ALLOWED:
        assert words_of_one_make(ast.parse((SOURCE / name).read_text(encoding="utf-8"))), name


def test_the_package_of_a_device_is_imported_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is a stand-in that only says it was imported; it brings no device."""
    (tmp_path / "stand_in_npu.py").write_text("import sys; sys.stand_in_npu = True")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(device, "DEVICE_MODULES", {"npu": "stand_in_npu"})
    import sys

    monkeypatch.setattr(sys, "stand_in_npu", False, raising=False)
    device.pick_device("cpu")
    assert sys.stand_in_npu is False  # type: ignore[attr-defined]
    with pytest.raises(device.EngineError, match="no device 'npu' on this machine"):
        device.pick_device("npu")
    assert sys.stand_in_npu is True  # type: ignore[attr-defined]
