"""One op, written once: `Op` registers it with PyTorch and runs its back ends.

A call takes one of four ways:

1. Compiled, traced, exported, vmapped, meta and fake tensors, subclasses and modes go through PyTorch's dispatcher to
   the op registered as `torch.ops.titok.<name>`. Its kernel and its fake implementation are made from the op's parts.
2. Where forward-mode differentiation or a transform of `torch.func` differentiates an op that has a gradient, plain
   PyTorch computes it, which PyTorch can differentiate in every way.
3. An eager call on the CPU that wants no gradient is offered to the C++ kernel as it is. The kernel checks what it gets
   and refuses what it cannot take. This way costs the least, and most calls take it.
4. Any other eager call has its arguments checked and a back end chosen. Where a gradient is wanted, an
   `autograd.Function` runs the kernels of both directions, or plain PyTorch is differentiated by PyTorch itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from titok import profiling
from titok.checks import check_tensor
from titok.ops.core.available import interpreting, why_no_cpp
from titok.ops.core.flop_counter import register_flop_formula
from titok.ops.core.kinds import SCHEMA_TYPES, check_kind, is_of_kind
from titok.ops.core.mode import (
    DEFAULT,
    are_plain,
    current_mode,
    is_transformed_and_differentiated,
    note_backend,
)
from titok.ops.core.parts import Composite, Gradient, Kernel, Outputs, aligned, without_autocast

_LIBRARY = torch.library.Library("titok", "DEF")


class Op:
    """An op with its back ends.

    Args:
        name: the op is registered as `torch.ops.titok.<name>`.
        arguments: a NamedTuple of the arguments, with the types of `SCHEMA_TYPES`, from which the schema is made.
            Every op has `backend` behind them. The functions below are called with one such tuple.
        num_results: how many tensors the op returns.
        check: looks at tensors, and at values whose types are right; raises `TypeError` or `ValueError`.
        results: allocates what the op returns. None stands for a result that these arguments do not ask for; the
            registered op returns an empty tensor in its place.
        backends: fastest first; the last is a `Composite` called "plain".
        kept: allocates further outputs, which only the backward pass reads.
        num_kept: how many these are.
        gradient: None where the op has none.
        plain_gradient: whether differentiating plain PyTorch is the fastest way to a gradient for these arguments. They
            come unchecked: it raises for wrong ones, or returns False.
        flops: what `torch.utils.flop_counter` counts for these arguments, by its rules: 2 for each multiply-add of a
            matrix product, nothing for element-wise work and sums.
    """

    name: str
    arguments: Any
    gradient: Gradient | None

    def __init__(
        self,
        name: str,
        arguments: Any,
        num_results: int,
        *,
        check: Callable[[Any], None],
        results: Callable[[Any], Outputs],
        backends: Sequence[Kernel | Composite],
        kept: Callable[[Any], Outputs] | None = None,
        num_kept: int = 0,
        gradient: Gradient | None = None,
        plain_gradient: Callable[[Any], bool] = lambda arguments: False,
        flops: Callable[[Any], int | torch.SymInt] = lambda arguments: 0,
    ) -> None:
        self.name, self.arguments = name, arguments
        types = [SCHEMA_TYPES[kind] for kind in get_type_hints(arguments).values()]
        self._tensor_at = [i for i, kind in enumerate(types) if kind.startswith("Tensor")]
        self._kinds = list(enumerate(zip(arguments._fields, types, strict=True)))
        self._check, self._results, self._kept = check, results, kept
        self.backends: dict[str, Kernel | Composite] = {backend.name: backend for backend in backends}
        self.gradient, self._plain_gradient, self._flops = gradient, plain_gradient, flops
        self._plain: Any = backends[-1]
        self._direct = next((b for b in backends if isinstance(b, Kernel) and b.checks_itself), None)
        self._num_results = num_results
        defaults = {field: f"={value}" for field, value in arguments._field_defaults.items()}
        declared = ", ".join(
            f"{kind} {field}{defaults.get(field, '')}"
            for kind, field in zip(types, arguments._fields, strict=True)
        )
        outputs = ["Tensor"] * (num_results + num_kept)
        returned = "Tensor" if len(outputs) == 1 else f"({', '.join(outputs)})"
        self._register(f"{name}({declared}, str? backend=None) -> {returned}")

    # --- calls

    def __call__(self, *arguments: Any, out: Outputs | None = None, backend: str | None = None) -> Outputs:
        """The results.

        Args:
            arguments: in order.
            out: one tensor or None for each result; the tensors take their results and are returned.
            backend: the name of one; None or "auto" for the fastest that can run.
        """
        if torch.compiler.is_compiling():
            return self._dispatched(arguments, out, backend)
        if profiling.is_enabled():
            with profiling.annotate(self.name):
                return self._run(self.arguments(*arguments), out, backend)
        return self._run(self.arguments(*arguments), out, backend)

    def _run(self, arguments: Any, out: Outputs | None, backend: str | None) -> Outputs:
        if backend is not None:
            check_kind("backend", "str?", backend)
        tensors = [t for i in self._tensor_at if (t := arguments[i]) is not None]
        if not tensors:
            self.check(arguments)
        if self.gradient is not None and is_transformed_and_differentiated(tensors):
            self.check(arguments)
            return self._into(out, self._compute(self._plain, arguments))
        if not are_plain(tensors):
            return self._dispatched(arguments, out, backend)
        mode = current_mode()
        wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        # The registered form of an op without a gradient tells whoever differentiates its results that it has none.
        if mode.dispatched or (wants_gradient and self.gradient is None):
            return self._dispatched(arguments, out, backend)
        if wants_gradient and (backend is None or backend == "auto") and self._plain_gradient(arguments):
            return self._into(out, self._compute(self._plain, arguments))
        if backend is None and mode is DEFAULT and self._can_offer(tensors[0]):
            if wants_gradient:
                return self._into(out, self._differentiable(arguments, backend, None))
            if (outputs := self._offer(arguments, out)) is not None:
                return outputs
        self.check(arguments)
        for t in tensors:
            if not (t.is_cpu or t.is_cuda) or t.is_neg() or t._is_zerotensor():
                return self._dispatched(arguments, out, backend)
        chosen = self.choose(backend, arguments)
        if not wants_gradient:
            return self._into(out, self._outputs(chosen, arguments, keep=False))
        self._check_backward(backend)
        if isinstance(chosen, Composite) and chosen.differentiable:
            return self._into(out, self._compute(chosen, arguments))
        return self._into(out, self._differentiable(arguments, backend, chosen))

    def _differentiable(self, arguments: Any, backend: str | None, chosen: Kernel | Composite | None) -> Outputs:
        tensors = [arguments[i] for i in self._tensor_at]
        return _Differentiable.apply(self, arguments, backend, chosen, *tensors)

    def _can_offer(self, first: Tensor) -> bool:
        return self._direct is not None and first.is_cpu and first.numel() > 0 and why_no_cpp() is None

    def _offer(self, arguments: Any, out: Outputs | None = None, *, keep: bool = False) -> Outputs | None:
        """The outputs of the kernel that checks its arguments itself; None where it refuses them."""
        assert self._direct is not None
        try:
            outputs = self._results(arguments)
            if out is not None:
                outputs = tuple(r if o is None else o for o, r in zip(out, outputs, strict=True))
            if keep and self._kept is not None:
                outputs = (*outputs, *self._kept(arguments))
            self._direct.launch(arguments, *outputs)
        except Exception:  # the checks of the longer way name what is wrong, or another back end runs
            return None
        note_backend(self.name, self._direct.name)
        if out is not None:
            torch.autograd.graph.increment_version([t for t in out if t is not None])
        return outputs

    def _outputs(self, chosen: Kernel | Composite, arguments: Any, *, keep: bool) -> Outputs:
        """The results, and with `keep` what the backward pass reads behind them."""
        if isinstance(chosen, Composite):
            return self._compute(chosen, arguments)
        note_backend(self.name, chosen.name)
        results = self._results(arguments)
        kept = self._kept(arguments) if keep and self._kept is not None else ()
        asked = [t for t in (*results, *kept) if t is not None]
        if asked[0].numel() == 0:
            for tensor in asked[1:]:
                tensor.zero_()  # sums and means over nothing
        else:
            chosen.launch(aligned(chosen.prepare(arguments)), *results, *kept)
        return (*results, *kept)

    def _forward(self, arguments: Any, backend: str | None, chosen: Kernel | Composite | None = None) -> Outputs:
        """All outputs for arguments that nobody has checked where `chosen` is None."""
        if chosen is None:
            may_offer = backend is None and not current_mode().plain
            if may_offer and self._can_offer(self._first_tensor(arguments)):
                outputs = self._offer(arguments, keep=True)
                if outputs is not None:
                    return outputs
            self.check(arguments)
            chosen = self.choose(backend, arguments)
        return self._outputs(chosen, arguments, keep=True)

    def _compute(self, chosen: Composite, arguments: Any) -> Outputs:
        note_backend(self.name, chosen.name)
        with without_autocast(self._first_tensor(arguments)):
            return chosen.compute(arguments)

    def _first_tensor(self, arguments: Any) -> Tensor:
        return next(t for i in self._tensor_at if (t := arguments[i]) is not None)

    def _dispatched(self, arguments: Any, out: Outputs | None, backend: str | None) -> Outputs:
        if not torch.compiler.is_compiling():
            self._check_kinds(arguments)
        outputs = self.overload(*arguments, backend)
        return self._into(out, outputs if isinstance(outputs, tuple) else (outputs,))

    def _into(self, out: Outputs | None, outputs: Outputs) -> Outputs:
        """The results without what is kept, copied into `out` where one is given."""
        results = outputs[: self._num_results]
        if out is None:
            return results
        if not isinstance(out, tuple | list) or len(out) != len(results):
            raise TypeError(f"out: expected a pair of tensors, got {type(out).__name__}")
        names_one = sum(target is not None for target in out) == 1
        for i, (target, result) in enumerate(zip(out, results, strict=True)):
            if result is None or target is None:
                continue
            name = "out" if names_one else f"out[{i}]"
            check_tensor(name, target, shape=result.shape, dtypes=(result.dtype,), device=result.device)
            target.copy_(result)
        return tuple(result if target is None else target for target, result in zip(out, results, strict=True))

    # --- checks and the choice of a back end

    def check(self, arguments: Any) -> None:
        """Raises `TypeError` or `ValueError` for arguments that are wrong."""
        for i, (name, kind) in self._kinds:
            if i not in self._tensor_at:
                check_kind(name, kind, arguments[i])
        self._check(arguments)

    def _check_kinds(self, arguments: Any) -> None:
        """Raises `TypeError` for values of types that the schema does not take. PyTorch's own error says less."""
        for i, (name, kind) in self._kinds:
            if not is_of_kind(kind, arguments[i]):
                self.check(arguments)  # it has the public function's name for a tensor
                check_kind(name, kind, arguments[i])

    def choose(self, requested: str | None, arguments: Any) -> Kernel | Composite:
        """The back end that is to run.

        Args:
            requested: a name, which is used or raises with the cause; None or "auto" for the first that can run, but
                never Triton's interpreter, which is there for tests.

        Raises:
            ValueError: `requested` is no back end of this op.
            RuntimeError: `requested` cannot run here, with the cause.
        """
        if requested is None or requested == "auto":
            if current_mode().plain:
                return self._plain
            for backend in self.backends.values():
                if backend.why_not(arguments) is None and (backend.name != "triton" or not interpreting()):
                    return backend
            raise AssertionError("the last back end can always run")
        if requested not in self.backends:
            names = sorted(self.backends)
            raise ValueError(f"backend: expected 'auto' or one of {names} for {self.name}, got {requested!r}")
        chosen = self.backends[requested]
        if (reason := chosen.why_not(arguments)) is not None:
            raise RuntimeError(f"{self.name}: backend {requested!r} cannot run: {reason}")
        return chosen

    def _check_backward(self, requested: str | None) -> None:
        """Raises `RuntimeError` where a back end that was chosen by name has no backward pass."""
        if self.gradient is None or requested in (None, "auto") or requested in self.gradient.op.backends:
            return
        able = sorted(self.gradient.op.backends)
        raise RuntimeError(
            f"{self.name}: backend {requested!r} cannot run: it has no backward pass, which {able} have; "
            "call it without gradients, or choose another back end"
        )

    # --- registration

    def _register(self, schema: str) -> None:
        name = self.name
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, self._kernel, "CPU")
        _LIBRARY.impl(name, self._kernel, "CUDA")
        torch.library.register_fake(f"titok::{name}", self._fake, lib=_LIBRARY)
        torch.library.register_vmap(f"titok::{name}", self._vmap, lib=_LIBRARY)
        torch.library.register_autograd(
            f"titok::{name}",
            self._registered_gradients if self.gradient is not None else self._no_gradient,
            setup_context=self._setup_context,
            lib=_LIBRARY,
        )
        self.overload: Any = getattr(torch.ops.titok, name).default
        register_flop_formula(self.overload.overloadpacket, self._count_flops)

    def _kernel(self, *given: Any) -> Any:
        """What the dispatcher calls with real tensors, also for those who call `torch.ops.titok.<name>` themselves."""
        return self._returned(self._forward(*self._split(given)))

    def _fake(self, *given: Any) -> Any:
        arguments, _ = self._split(given)
        self.check(arguments)
        return self._returned(
            (*self._results(arguments), *(self._kept(arguments) if self._kept is not None else ()))
        )

    def _count_flops(self, *given: Any, out_val: Any = None) -> int | torch.SymInt:
        return self._flops(self._split(given)[0])

    def _split(self, given: tuple[Any, ...]) -> tuple[Any, str | None]:
        """Arguments and `backend`. The dispatcher leaves out arguments behind the last that is not its default."""
        count = len(self.arguments._fields)
        return self.arguments(*given[:count]), given[count] if len(given) > count else None

    @staticmethod
    def _returned(outputs: Outputs) -> Any:
        """As the schema declares it: no tuple of one, and an empty tensor for what was not asked for."""
        if len(outputs) == 1:
            return outputs[0]
        asked = next(t for t in outputs if t is not None)
        return tuple(asked.new_empty(0) if t is None else t for t in outputs)

    def _vmap(self, info: Any, in_dims: tuple[int | None, ...], *given: Any) -> Any:
        """One call for each sample of the mapped dimension, stacked in front."""
        samples = []
        for i in range(info.batch_size):
            sample = (x if d is None else x.select(d, i) for x, d in zip(given, in_dims, strict=True))
            samples.append(self.overload(*sample))
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        return tuple(map(torch.stack, zip(*samples, strict=True))), (0,) * len(samples[0])

    # --- autograd, for `autograd.Function` and for the dispatcher alike

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self._save(ctx, *self._split(inputs), output if isinstance(output, tuple) else (output,))

    def _save(self, ctx: Any, arguments: Any, backend: str | None, outputs: Outputs) -> None:
        without_tensors = list(arguments)
        for i in self._tensor_at:
            without_tensors[i] = None if arguments[i] is None else ...
        ctx.arguments, ctx.backend = self.arguments._make(without_tensors), backend
        ctx.set_materialize_grads(False)
        if self.gradient is None:
            return
        ctx.mark_non_differentiable(*outputs[self._num_results :])
        ctx.save_for_backward(*self.gradient.save(arguments, outputs))

    def _gradients(self, ctx: Any, needs: Sequence[bool], grads: Outputs) -> list[Tensor | None]:
        """The gradient of every tensor argument, None for those that have or need none."""
        assert self.gradient is not None
        grads = grads[: self._num_results]
        if all(grad is None for grad in grads):
            return [None] * len(needs)
        self._check_backward(ctx.backend)
        arguments = self.gradient.arguments(grads, ctx.saved_tensors, ctx.arguments, needs)
        returned = () if arguments is None else self.gradient.op(*arguments, backend=ctx.backend)
        found = self.gradient.gradients(grads, returned)  # autograd converts them to the dtypes of the arguments
        return [grad if need else None for grad, need in zip(found, needs, strict=True)]

    def _registered_gradients(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of every input of the registered op."""
        inputs: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        positions = [i for i in self._tensor_at if i < len(inputs)]
        needs = [ctx.needs_input_grad[i] for i in positions] + [False] * (len(self._tensor_at) - len(positions))
        for i, grad in zip(positions, self._gradients(ctx, needs, grads), strict=False):
            inputs[i] = grad
        return tuple(inputs)

    def _no_gradient(self, ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(f"titok::{self.name} is not differentiable: its gradient was asked for")


class _Differentiable(torch.autograd.Function):
    """An eager call that wants a gradient: the kernels of both directions, without the dispatcher's cost."""

    @staticmethod
    def forward(
        ctx: Any, op: Op, arguments: Any, backend: str | None, chosen: Kernel | Composite | None, *tensors: Any
    ) -> Outputs:
        """`tensors` are those among the arguments, by which autograd knows them."""
        ctx.op = op
        outputs = op._forward(arguments, backend, chosen)
        op._save(ctx, arguments, backend, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *ctx.op._gradients(ctx, ctx.needs_input_grad[4:], grads)


def register_composite(schema: str, function: Callable[..., Any]) -> None:
    """Registers a function that is made of PyTorch's ops and of ours as `torch.ops.titok.<name>`.

    PyTorch looks inside such an op: what it is made of is differentiated, compiled and vmapped.
    """
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(schema.partition("(")[0], function, "CompositeImplicitAutograd")
