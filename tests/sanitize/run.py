"""`make sanitize`: the C++ ops under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

1. ThreadSanitizer: threads.cpp runs every kernel with up to five threads, over openmp.cpp in place of libgomp.
2. AddressSanitizer and UndefinedBehaviorSanitizer: a build of titok._C and of the host build of the CUDA kernels, in a
   folder of its own beside links to the Python sources, under the C++ part of the op tests and under random calls.

Each part runs once for every instruction set that this machine has. CONTRIBUTING.md says what they find and what not.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import setup  # noqa: E402

BUILD = ROOT / "build" / "sanitize"
MIRROR = BUILD / "root"  # the folder that tests run in
COMMON = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
ADDRESS = [*COMMON, "-fsanitize=address,undefined,float-cast-overflow"]
THREAD = [*COMMON, "-fsanitize=thread"]
# Sources that need Python; what they do is checked under AddressSanitizer.
PYTHON_SOURCES = {"module.cpp", "binding.cpp", "python_call.cpp", "python_tensor.cpp", "tensor.cpp"}
CPP_TESTS = [
    "test_cpp_boundary.py", "test_cpp_tensors.py", "test_masked_attention_cpp.py", "test_masked_decode_cuda_host.py",
    "test_maskgit_decode_cuda_host.py", "test_raw_ops.py", "test_unaligned.py",
]  # fmt: skip
# Of these the tests with "cpp" in their name or parameters.
OP_TESTS = [
    "test_add_layer_norm.py", "test_group_norm_silu.py", "test_int8_linear_cpp.py", "test_masked_attention.py",
    "test_maskgit_decode_step.py", "test_masked_decode_split.py", "test_masked_decode_step.py",
    "test_nearest_codebook.py",
]  # fmt: skip


def say(text: str) -> None:
    print(f"sanitize: {text}", flush=True)


def instruction_sets() -> dict[str, str | None]:
    """Those that this machine has, with the value of TITOK_CPU_ISA that chooses each; None chooses the best."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"generic": "generic"}
    info = Path("/proc/cpuinfo").read_text()
    flags = {
        flag.replace("_", "") for line in info.splitlines() if line.startswith("flags") for flag in line.split()
    }
    able: dict[str, str | None] = {}
    for name, options in setup.ISA_FLAGS.items():
        needed = {o.removeprefix("-m") for o in options if o.startswith("-m") and "=" not in o}
        if needed <= flags:
            able[name] = None if name in setup.SOURCES_OF_ISA else name
        else:
            say(f"skipped: {name} code, because this CPU has no {', '.join(sorted(needed - flags))}")
    return able


def runs_of(able: dict[str, str | None]) -> dict[str, str | None]:
    """What to run: of the sets that only some files have code for, the best one, because its run uses all of them."""
    best = [name for name, isa in able.items() if isa is None]
    return {name: isa for name, isa in able.items() if isa is not None or name == best[-1]}


def runtime(compiler: str, *names: str) -> list[str]:
    """The paths of shared libraries of the compiler; ends the program where one is missing."""
    found = []
    for name in names:
        path = subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        if not os.path.isabs(path):
            sys.exit(f"sanitize: {compiler} has no {name}; it comes with GCC's development files (libgcc-N-dev)")
        found.append(path)
    return found


def instrumented(listed: list[setup.Job], flags: list[str], sets: Collection[str]) -> list[setup.Job]:
    """The jobs with these flags, but code that cannot run here as fast as it compiles."""

    def flags_of(job: setup.Job) -> list[str]:
        isa = job.object.name.removesuffix(".o").partition(".")[2]
        return flags if isa in ("", *sets) else ["-O0"]

    return [job._replace(command=[*job.command, *flags_of(job)]) for job in listed]


def build_address(compiler: str, sets: Collection[str]) -> Path:
    """Builds titok._C into the mirror and returns the host build of the CUDA kernels."""
    from cuda_host import host_kernel

    package = MIRROR / "titok"
    package.mkdir(parents=True, exist_ok=True)
    links = {package / path.name: path for path in (ROOT / "titok").iterdir() if not path.name.startswith("_C")}
    links |= {MIRROR / name: ROOT / name for name in ("tests", "csrc", "kernels", "pyproject.toml")}
    links |= {package / "kernels": ROOT / "kernels"}
    for old in [*package.iterdir(), *MIRROR.iterdir()]:
        if old.is_symlink():
            old.unlink()
    for link, path in links.items():
        link.symlink_to(path)
    objects = BUILD / "address"
    listed = instrumented(setup.jobs(objects, [compiler], None), ADDRESS, sets)
    setup.compile_and_link(objects, listed, [compiler, "-shared", "-fopenmp", *ADDRESS], package / "_C.so")
    library = BUILD / "cuda_host.so"
    host_kernel.build(compiler, library, ADDRESS)
    return library


def build_thread(compiler: str, sets: Collection[str]) -> Path:
    """Builds the program of threads.cpp."""
    objects, program = BUILD / "thread", BUILD / "threads"
    listed = [job for job in setup.jobs(objects, [compiler], None) if job.source.name not in PYTHON_SOURCES]
    plain = next(job.command for job in listed if job.source.name == "cpu_isa.cpp")
    for name in ("openmp", "threads"):
        listed.append(setup.Job(ROOT / "tests" / "sanitize" / f"{name}.cpp", objects / f"{name}.o", plain))
    listed = instrumented(listed, THREAD, sets)
    # Linked without libgomp: a function of it that openmp.cpp lacks is then an error.
    setup.compile_and_link(objects, listed, [compiler, "-pthread", *THREAD], program)
    return program


def run(what: str, command: list[str], **environment: str | None) -> bool:
    """Runs a command and says how it ended. An environment variable of None is unset."""
    merged = {**os.environ, **environment}
    begin = time.monotonic()
    status = subprocess.run(command, env={k: v for k, v in merged.items() if v is not None}, cwd=MIRROR).returncode
    say(
        f"{what}: {'passed' if status == 0 else f'FAILED with status {status}'} after {time.monotonic() - begin:.0f} s"
    )
    return status == 0


def run_threads(program: Path, sets: Mapping[str, str | None]) -> bool:
    # Of addresses that Linux randomises in more than 28 bits, this runtime cannot map some. Where the system does not
    # allow turning that off, the program is run as it is.
    fixed = ["setarch", "-R"]
    if shutil.which("setarch") is None or subprocess.run([*fixed, "true"], capture_output=True).returncode:
        fixed = []
    passed = True
    for name, isa in sets.items():
        passed &= run(f"ThreadSanitizer, {name}", [*fixed, str(program)], TITOK_CPU_ISA=isa)
    return passed


def run_tests(name: str, fast: bool, environment: Mapping[str, str | None]) -> bool:
    """The C++ part of the op tests, on one instruction set."""
    # pytest captures Python's streams only, because the sanitizers write below them.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", "-rf"]
    command += ["-m", "not slow"] if fast else []
    tests = [f"tests/ops/{test}" for test in CPP_TESTS]
    passed = run(f"tests of the boundary, {name}", [*command, *tests], **environment)
    tests = [f"tests/ops/{test}" for test in OP_TESTS]
    return run(f"tests of ops, {name}", [*command, "-k", "cpp", *tests], **environment) and passed


def run_calls(name: str, options: Sequence[str], environment: Mapping[str, str | None]) -> bool:
    """Random calls on one instruction set."""
    progress = BUILD / "call"
    progress.unlink(missing_ok=True)
    command = [sys.executable, "-m", "random_calls", *options, "--progress", str(progress)]
    if run(f"random calls, {name}", command, **environment, PYTHONPATH=f"{MIRROR}:{MIRROR / 'tests'}"):
        return True
    say(f"the last call that was made is number {progress.read_text().strip() if progress.exists() else 'none'}")
    return False


def main() -> int:
    parser = argparse.ArgumentParser(prog="sanitize", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--calls", type=int, default=20_000, help="random calls for each instruction set (%(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, help="time for all but compiling; the tests are then the fast ones"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first instruction set's calls; others count on"
    )
    parser.add_argument("--only", choices=("threads", "tests", "calls"), help="run one part")
    options = parser.parse_args()
    # ninja is installed beside Python.
    os.environ.update({"PATH": os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])})
    compiler = setup.host_compiler(setup.find_cxx())
    if shutil.which(compiler) is None:
        sys.exit(f"sanitize: no C++ compiler ({compiler})")
    # libstdc++ is loaded with the sanitizer, which otherwise does not find the function that throws exceptions.
    preloaded = runtime(compiler, "libasan.so", "libubsan.so", "libtsan.so", "libstdc++.so.6")
    begin, sets = time.monotonic(), instruction_sets()
    program = build_thread(compiler, sets) if options.only in (None, "threads") else None
    library = build_address(compiler, sets) if options.only != "threads" else None
    say(f"built in {time.monotonic() - begin:.0f} s")
    deadline, sets = time.monotonic() + (options.seconds or float("inf")), runs_of(sets)

    passed = program is None or run_threads(program, sets)
    if library is None:
        return 0 if passed else 1
    shared: dict[str, str | None] = {
        "LD_PRELOAD": f"{preloaded[0]} {preloaded[3]}",
        # CPython and PyTorch keep memory until the process ends, and there is no way to look for the leaks of one
        # library alone. An allocation that fails returns null, as without the sanitizer.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_WAIT_POLICY": "passive",  # threads that wait do not take the time of those that work
        "TRITON_INTERPRET": "1",
        "TITOK_TEST_CUDA_HOST": str(library),
    }
    for name, isa in sets.items() if options.only != "calls" else ():
        if not options.seconds or name == list(sets)[-1]:
            passed &= run_tests(name, bool(options.seconds), {**shared, "TITOK_CPU_ISA": isa})
    for done, (name, isa) in enumerate(sets.items() if options.only != "tests" else ()):
        calls = ["--calls", str(options.calls), "--seed", str(options.seed + done), "--cuda-host", str(library)]
        if options.seconds:
            seconds = (deadline - time.monotonic()) / (len(sets) - done) - 8  # 8 s to start
            calls += ["--seconds", f"{max(seconds, 15):.0f}"]
        passed &= run_calls(name, calls, {**shared, "TITOK_CPU_ISA": isa})
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
