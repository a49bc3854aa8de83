"""What the built extension `titok._C` needs and exports."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from titok.ops import backends, last_backend, nearest_codebook
from titok.ops.core import available
from titok.ops.core.available import why_no_cpp

ARCHITECTURES = {"sm_80", "sm_90", "sm_100"}


@pytest.fixture(scope="module")
def library() -> str:
    if reason := why_no_cpp():
        pytest.skip(reason)
    import titok._C

    return titok._C.__file__


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_no_symbol_of_pytorch(library: str) -> None:
    """One binary serves every torch release."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    symbols = output("nm", "--dynamic", "--demangle", library)
    assert "PyInit__C" in symbols
    assert re.findall(r"\b(?:c10|at|torch|caffe2)::\S+", symbols) == []


def test_no_library_of_pytorch(library: str) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "--dynamic", library))
    assert any(name.startswith("libgomp") for name in needed)
    assert not [name for name in needed if re.search("torch|c10|cudart", name)]


def test_imports_where_there_is_no_torch(library: str) -> None:
    """An interpreter that cannot import torch loads it, and no object passes for a tensor there."""
    code = f"""
import importlib.util, sys
sys.modules["torch"] = None
spec = importlib.util.spec_from_file_location("titok._C", {library!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.cpu_isa())
try:
    module.nearest_codebook(1, 2, False, 3)
except TypeError as error:
    print(error)
"""
    isa, error = output(sys.executable, "-c", code).splitlines()
    assert isa in ("generic", "avx2", "avx512")
    assert error == "latents: expected a torch.Tensor, got int"


def test_functions_that_mark_a_stale_build(library: str) -> None:
    """All that the extension exports for a CPU."""
    import titok._C

    exported = {name for name in dir(titok._C) if not name.startswith("_") and callable(getattr(titok._C, name))}
    for_gpus = {"masked_decode_step_cuda", "maskgit_decode_step_cuda"}
    assert exported - {"cpu_isa", "multiplies_int8", *for_gpus} == available.EXTENSION_FUNCTIONS


def test_a_build_of_older_source_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one of the functions the automatic choice takes another back end, and errors say what to do."""
    stale = ModuleType("titok._C")
    monkeypatch.setitem(sys.modules, "titok._C", stale)
    available._load.cache_clear()
    try:
        for name in available.EXTENSION_FUNCTIONS - {"nearest_codebook"}:
            setattr(stale, name, None)
        hint = r"it lacks nearest_codebook: rebuild it \(pip install -e \.\)"
        assert re.search(hint, backends()["cpp"])
        with pytest.raises(RuntimeError, match=hint):
            nearest_codebook(torch.zeros(2, 4), torch.ones(3, 4), backend="cpp")
        assert nearest_codebook(torch.zeros(2, 4), torch.ones(3, 4)).tolist() == [0, 0]
        assert last_backend("nearest_codebook") == "plain"
    finally:
        available._load.cache_clear()


def cuobjdump() -> str | None:
    """The tool, of nvcc or of Triton."""
    spec = find_spec("triton")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    bundled = [Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump" for folder in folders]
    return next((path for c in ("cuobjdump", *map(str, bundled)) if (path := shutil.which(c))), None)


def test_no_cuda_kernel_spills(library: str) -> None:
    """On every architecture the registers suffice: no kernel has a stack frame or local memory."""
    import titok._C

    if not titok._C.with_cuda:
        pytest.skip("titok._C was built without nvcc")
    if (tool := cuobjdump()) is None:
        pytest.skip("needs cuobjdump")
    usage = output(tool, "-res-usage", library)
    kernels: dict[str, dict[str, tuple[int, int]]] = {}
    for section in re.split(r"(?=^arch = )", usage, flags=re.MULTILINE)[1:]:
        found = re.findall(r"Function (\S+):\s*REG:\d+ STACK:(\d+) .*?LOCAL:(\d+)", section)
        architecture = section.split()[2]
        kernels.setdefault(architecture, {}).update(
            {name: (int(stack), int(local)) for name, stack, local in found}
        )
    for architecture in ARCHITECTURES:
        for kernel in ("maskgit_decode_kernel", "masked_decode_stage_kernel"):
            assert any(kernel in name for name in kernels.get(architecture, {}))
    spilling = [(a, name) for a, of in kernels.items() for name, used in of.items() if used != (0, 0)]
    assert spilling == []
