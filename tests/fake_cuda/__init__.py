"""GPUs that are not there: titok's code for GPUs runs on tensors with a shape, a dtype and a device, but no values.

PyTorch's `FakeTensorMode` propagates these through the Python code of models, ops and the decoding loop. A dispatch
mode on top of it records what a GPU would be asked to do, and reports what must not happen: a host that waits for
the GPU, tensors of several devices in one op or one launch, copies between devices, and group norms of maps that are
not channels-last. titok's own ops choose their back end as on a GPU and run its launcher, whose launches are recorded
instead of made.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import pkgutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import titok.kernels
import titok.ops
from titok.ops.core import available
from titok.ops.core.op import Op

ROOT = Path(__file__).parents[2]

# Ops whose result the host has to wait for.
WAITING = {
    "aten::_local_scalar_dense", "aten::bincount", "aten::equal", "aten::is_nonzero", "aten::masked_select",
    "aten::nonzero", "aten::unique_consecutive", "aten::unique_dim", "aten::_unique2",
}  # fmt: skip
# Ops that give a GPU no work, beside views.
FREE = {"device", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided"}


class Recorder(TorchDispatchMode):
    """What the GPUs are asked to do.

    Attributes:
        device_ops: the names of all ops and launches that give a GPU work.
        host_copies: how many copies from the host to a GPU there were.
        findings: what must not happen, with the lines of titok that it comes from.
        backends: the back end of each op of titok that ran, by op.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device_ops: list[str] = []
        self.host_copies = 0
        self.findings: list[str] = []
        self.backends: dict[str, str] = {}
        self._pinned: dict[int, Tensor] = {}  # by their storage
        self._ops = _ops_of_titok()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        if func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite):
            # An op that PyTorch makes of others. It did so before it came here, unless an op of titok called it.
            with self:
                return func._op_dk(composite, *args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.is_cuda for t in given):
            masks = args[1] if name in ("aten::index", "aten::index_put", "aten::index_put_") else ()
            if name in WAITING or any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in masks):
                self._find(f"{name}: the host waits")
        if name == "aten::cudnn_convolution":  # which has no fake implementation
            x, weight, padding, stride, dilation, groups = args[:6]
            func = torch.ops.aten.convolution.default
            args = (x, weight, None, stride, padding, dilation, False, (0, 0), groups)
        try:
            result = self._run(self._ops[name], args) if name in self._ops else func(*args, **kwargs)
        except Exception as error:
            self._find(f"{name} raises {type(error).__name__}: {error}")
            raise
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if any(t.is_cuda for t in (*given, *made)):
            self._look(func, args, kwargs, given, made)
        elif kwargs.get("pin_memory"):
            self._pinned[_storage(made[0])] = made[0]
        return result

    def _look(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]) -> None:
        name = func._schema.name
        short = name.partition("::")[2]
        if short in ("_to_copy", "copy_"):
            source, target = (args[1], args[0]) if short == "copy_" else (args[0], made[0])
            if source.device != target.device:
                self._look_at_copy(source, target, kwargs.get("non_blocking", args[2:3] == (True,)))
        else:
            devices = {t.device for t in given if t.ndim or t.is_cuda}
            if len(devices) > 1:
                self._find(f"{name}: tensors on {sorted(map(str, devices))}")
        is_norm = name in ("titok::group_norm_silu", "aten::native_group_norm")
        if is_norm and not given[0].is_contiguous(memory_format=torch.channels_last):
            self._find(f"{name}: a map {tuple(given[0].shape)} that is not channels-last")
        if name == "aten::convolution":
            self._look_at_convolution(*args[:3])
        memory = {_storage(t) for t in given}
        is_view = not func._schema.is_mutable and made and all(_storage(t) in memory for t in made)
        if short not in FREE and name not in self._ops and not is_view:
            self.device_ops.append(name)

    def _look_at_convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Adds what PyTorch launches around cuDNN's kernel."""
        layout = torch.channels_last
        if x.is_contiguous(memory_format=layout) and not weight.is_contiguous(memory_format=layout):
            self.device_ops.append("the weight of a convolution is laid out again")
        if bias is not None:
            self.device_ops.append("the bias of a convolution is added")

    def _look_at_copy(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        where = f"a copy {tuple(source.shape)} from {source.device} to {target.device}"
        if source.device.type == "cpu" and target.is_cuda:
            self.host_copies += 1
            if not non_blocking or _storage(source) not in self._pinned:
                self._find(f"{where}: the host waits, because it blocks or its source is not pinned")
        elif target.device.type == "cpu" and not (non_blocking and _storage(target) in self._pinned):
            self._find(f"{where}: the host waits, because it blocks or its target is not pinned")
        else:
            self._find(where)

    def _run(self, op: Op, args: Any) -> Any:
        """An op of titok, by the back end that it chooses and that back end's launcher."""
        from titok.kernels._launch import record

        arguments, requested = op._split(args)
        op.check(arguments)
        chosen = op.choose(requested, arguments)
        self.backends[op.name] = chosen.name
        with self, record() as launches:  # what PyTorch does within the op is recorded as well
            outputs = op._outputs(chosen, arguments, keep=True)
        self.device_ops += [launch.kernel.__name__ for launch in launches]
        return op._returned(outputs)

    def look_at_launch(self, kernel: str, arguments: Iterable[Any]) -> None:
        """Reports a launch whose tensors are not all on one GPU."""
        devices = sorted({str(a.device) for a in arguments if isinstance(a, Tensor)})
        if len(devices) != 1 or not devices[0].startswith("cuda"):
            self._find(f"{kernel}: launched with tensors on {devices}")

    def expect_at_most(self, most: int, *, others: int = 0) -> None:
        """Raises `AssertionError` where a GPU was given more work than a ceiling allows.

        Args:
            most: the ceiling, of ops and launches.
            others: ops and launches that count in addition to those recorded.
        """
        count = len(self.device_ops) + others
        assert count <= most, f"{count} ops on the GPU, at most {most} are allowed: {Counter(self.device_ops)}"

    def _find(self, text: str) -> None:
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(f"{ROOT}/titok/")]
        self.findings.append(" <- ".join([text, *(f"{f.filename}:{f.lineno}" for f in reversed(frames[-5:]))]))

    def clear(self) -> None:
        """Forgets all that was recorded."""
        self.device_ops, self.host_copies, self.findings, self.backends = [], 0, [], {}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _ops_of_titok() -> dict[str, Op]:
    """The name in PyTorch's dispatcher -> every op of titok."""
    modules = [importlib.import_module(f"titok.ops.{m.name}") for m in pkgutil.iter_modules(titok.ops.__path__)]
    found = {value.name: value for module in modules for value in vars(module).values() if isinstance(value, Op)}
    return {f"titok::{name}": op for name, op in found.items()}


@contextlib.contextmanager
def fake_gpus(*, nvcc: bool = True, triton: bool = True) -> Iterator[Recorder]:
    """Within, this machine has two GPUs of compute capability 9.0, and every tensor is fake.

    Args:
        nvcc: whether the extension was built with nvcc.
        triton: whether there is Triton. Where it is not installed the test is skipped, because launchers are replaced.
    """
    pytest.importorskip("triton")
    # Triton decides when a kernel is decorated whether it is interpreted: before TRITON_INTERPRET is changed below.
    for module in pkgutil.iter_modules(titok.kernels.__path__):
        importlib.import_module(f"titok.kernels.{module.name}")
    recorder = Recorder()
    current = [torch.device("cuda", 0)]

    @contextlib.contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], torch.device(device)
        try:
            yield
        finally:
            current[0] = before

    def launcher(name: str) -> Callable[..., None]:
        """The extension's function that launches this CUDA kernel."""

        def launch(*arguments: Any) -> None:
            devices = {t.device for t in arguments if isinstance(t, Tensor)}
            if devices != {current[0]}:
                recorder._find(f"launched on {current[0]} with tensors on {sorted(map(str, devices))}")
            recorder.device_ops.append(name)

        return launch

    def fused_linear(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        recorder.look_at_launch(kernel.__name__, arguments)
        recorder.device_ops.append(kernel.__name__)

    def described(kernel: Any, arguments: Any, *others: Any) -> Any:
        recorder.look_at_launch(kernel.__name__, arguments)
        return describe(kernel, arguments, *others)

    def synchronize(device: Any = None) -> None:
        recorder._find("torch.cuda.synchronize: the host waits")

    stub = SimpleNamespace(
        with_cuda=nvcc,
        masked_decode_step_cuda=launcher("masked_decode_stage_kernel"),
        maskgit_decode_step_cuda=launcher("maskgit_decode_kernel"),
    )
    there: dict[str, Any] = {"titok._C": stub}
    if not triton:
        there["triton"] = "triton does not import here"
    load, describe = available._load, titok.kernels._launch.describe

    def conv_format(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
        """As cuDNN has it. A PyTorch without CUDA takes every convolution on a GPU for a contiguous one."""
        given = (t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight))
        return torch.channels_last if any(given) else torch.contiguous_format

    with contextlib.ExitStack() as stack:
        for target, replacement in (
            ("torch.cuda.device_count", lambda: 2),
            ("torch.cuda.get_device_capability", lambda device=None: (9, 0)),
            ("torch.cuda.get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132)),
            ("torch.cuda.device", on_device),
            ("torch.cuda.synchronize", synchronize),
            ("torch.cuda.current_stream", lambda device=None: SimpleNamespace(cuda_stream=0)),
            ("torch.backends.cudnn.is_available", lambda: True),
            ("torch._C._conv_determine_backend_memory_format", conv_format),
            ("titok.inference.fused_linear.is_ordinary_call", lambda tensors: True),  # though they are fake
            ("titok.kernels.linear.launch", fused_linear),
            ("titok.kernels._launch.describe", described),
            ("titok.ops.core.available._load", lambda name: there.get(name) or load(name)),
        ):
            stack.enter_context(mock.patch(target, replacement))
        stack.enter_context(mock.patch.dict("os.environ", {"TRITON_INTERPRET": "0"}))
        stack.callback(available.why_too_old.cache_clear)
        available.why_too_old.cache_clear()
        stack.enter_context(_device_guard())
        stack.enter_context(FakeTensorMode())
        stack.enter_context(recorder)
        yield recorder


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    """Within, PyTorch may switch between GPUs, and does nothing then.

    A PyTorch without CUDA has no device guard for GPUs. The one of the meta device does nothing for any device.
    """
    cuda, meta = 1, 14  # in c10::DeviceType
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before, guards[cuda] = guards[cuda], guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    """`torch.autocast("cuda", torch.bfloat16)`, which a PyTorch without CUDA switches off."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def build(make: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> Any:
    """The model of `make()`, in eval mode, with fake weights on a fake GPU. To be called within `fake_gpus`."""
    unchanged = mock.patch("torch.nn.init.trunc_normal_", lambda tensor, **options: tensor)
    with _disable_current_modes(), torch.device("meta"), unchanged:
        model = make()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                values = torch.empty(parameter.shape, dtype=dtype, device=device)
                module._parameters[name] = nn.Parameter(values, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return model.eval()


@contextlib.contextmanager
def prepared(model: Any) -> Iterator[None]:
    """Within, the layers of a fake model compute from prepared weights. To be called within `fake_gpus`.

    `replace_weights` cannot make a `PreparedParameter` of a fake tensor: what it prepares is kept beside the weights.
    """
    forms: dict[int, Any] = {}

    def replace(weights: Iterable[Tensor], prepare: Callable[[], Any], original: Any = None) -> None:
        forms.update(dict.fromkeys(map(id, weights), prepare()))

    def form_of(weight: Tensor, x: Tensor | None = None) -> Any:
        return forms.get(id(weight))

    patches = {"replace_weights": replace, "prepared_form": form_of, "prepared_with": form_of}
    with contextlib.ExitStack() as stack:
        for module in ("titok.models.layers", "titok.models.vqgan"):
            for name, function in patches.items():
                if hasattr(importlib.import_module(module), name):
                    stack.enter_context(mock.patch(f"{module}.{name}", function))
        model.prepare()
        yield
