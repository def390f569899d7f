"""The build, and where kernels/ and bench/ go. Nothing else; metadata is in pyproject.toml.

FASTKD_BUILD = auto (default)  C++ where a compiler exists, CUDA too where nvcc exists and torch is a CUDA build
               none            Python and Triton only: a py3-none-any wheel
               cpu             C++; a failed build is an error
               cuda            C++ and CUDA regardless of what is visible; a failed build is an error
FASTKD_CUDA_ARCHS = "80;90" (default): the chips to compile for.
FASTKD_SANITIZE = 1             the C++ ops alone, under AddressSanitizer and UndefinedBehaviorSanitizer, in build/asan (make asan)
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
MODE = os.environ.get("FASTKD_BUILD", "auto")
SANITIZE = os.environ.get("FASTKD_SANITIZE") == "1"
CXX = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
NO_COMPILER = "no C++ compiler was found (g++, c++, clang++, or $CXX)"
NVCC = os.environ.get("NVCC") or shutil.which("nvcc")

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # one binary for torch 2.10 and newer
COMMON = ["-O3", "-fPIC", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if SANITIZE else []
if SANITIZE:
    COMMON += [*SANITIZERS, "-O1", "-g1", "-fno-omit-frame-pointer"]
# Units named *_isa.cpp are compiled once per instruction set; the choice is made at run time (csrc/cpu/simd/isa.h).
# No -fassociative-math: it would undo the orders of summation that keep the digits (csrc/cpu/divergence/op_isa.cpp).
# -Wno-psabi: a vector wider than a unit's registers is passed between its own inline functions only.
FAST_LOOPS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
X86_SETS = {
    "plain": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}
IS_MAC = sysconfig.get_platform().startswith("macosx")
IS_X86 = sysconfig.get_platform().endswith(("x86_64", "amd64"))
ISA_SETS = X86_SETS if IS_X86 else {"plain": []}


def torch_root() -> Path:
    """Where torch is: importable, or beside us when the build runs isolated from it."""
    spec = importlib.util.find_spec("torch")
    root = Path(spec.origin).parent if spec else Path(sysconfig.get_paths()["purelib"]) / "torch"
    if not (root / "include").is_dir():
        raise RuntimeError(f"no torch with headers found (looked in {root}); install torch, then fastkd")
    return root


def torch_is_cuda_build() -> bool:
    version = torch_root() / "version.py"
    namespace: dict = {}
    exec(version.read_text(), namespace)
    return namespace.get("cuda") is not None


def extensions() -> list[Extension]:
    if MODE not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"FASTKD_BUILD: expected auto, none, cpu or cuda, got {MODE!r}")
    if MODE == "none":
        return []
    optional = MODE == "auto"
    if CXX is None and not optional:
        raise SystemExit(f"FASTKD_BUILD={MODE}: {NO_COMPILER}")
    ops = Extension("fastkd._cpu", sources("cpu/*/*.cpp"), optional=optional)
    if SANITIZE:
        return [ops]
    found = [
        ops,
        # The NumPy entry has its own copy of the transport solver: this module does not link torch.
        Extension(
            "fastkd._C", sources("python.cpp", "cpu/simd/isa.cpp", "cpu/transport/op_isa.cpp"), optional=optional
        ),
    ]
    try:
        wants_cuda = MODE == "cuda" or (optional and NVCC is not None and torch_is_cuda_build())
    except RuntimeError:
        wants_cuda = False
    if MODE == "cuda" and NVCC is None:
        raise SystemExit("FASTKD_BUILD=cuda: no nvcc found (on PATH or as $NVCC)")
    if wants_cuda:
        found.append(Extension("fastkd._cuda", sources("cuda/*.cu"), optional=optional))
    return found


def sources(*patterns: str) -> list[str]:
    return [str(p.relative_to(ROOT)) for pattern in patterns for p in sorted(CSRC.glob(pattern))]


class Build(build_ext):
    """Compiles object by object, in parallel, only what changed; knows that the two libraries are not Python modules."""

    def finalize_options(self):
        super().finalize_options()
        if SANITIZE:  # beside the library that is used, never in its place
            self.inplace, self.build_lib, self.build_temp = False, "build/asan", "build/asan/temp"

    def get_ext_filename(self, name):
        module = name.split(".")[-1]
        if module in ("_cpu", "_cuda"):
            return os.path.join(*name.split(".")[:-1], f"{module}.so")
        return super().get_ext_filename(name)

    def run(self):
        self.failures: dict[str, str] = {}  # library -> why it could not be built
        super().run()
        in_place = self.inplace or self.editable_mode
        folder = ROOT / "fastkd" if in_place else Path(self.build_lib) / "fastkd"
        for ext in self.extensions:
            note = folder / f"{ext.name.split('.')[-1]}.not_built"
            note.unlink(missing_ok=True)
            if ext.name in self.failures:
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(self.failures[ext.name])  # pip hides what a build prints; backends.py repeats it

    def build_extension(self, ext):
        try:
            self._build(ext)
        except (subprocess.CalledProcessError, RuntimeError, OSError) as error:
            if not ext.optional:
                raise
            why = "the compiler failed" if isinstance(error, subprocess.CalledProcessError) else str(error)
            self.failures[ext.name] = f"{why}, when fastkd was installed"
            print(f"fastkd: {ext.name} could not be built, installing without it: {error}", file=sys.stderr)

    def _build(self, ext):
        if CXX is None:
            raise RuntimeError(NO_COMPILER)
        objects = [unit for source in ext.sources for unit in self._units(ext, Path(source))]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            list(pool.map(self._compile, *zip(*objects, strict=True)))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if not is_newer(target, [obj for _, obj, _ in objects]):
            run([*self._linker(ext), "-o", str(target), *(str(obj) for _, obj, _ in objects), *self._libraries(ext)])

    def _units(self, ext, source: Path):
        """(source, object, command) for each object file that `source` becomes."""
        stem = Path(self.build_temp).resolve() / ext.name.split(".")[-1] / source.relative_to("csrc").with_suffix("")
        sets = "-DFASTKD_X86" if IS_X86 else "-DFASTKD_PORTABLE"
        if source.suffix == ".cu":
            archs = os.environ.get("FASTKD_CUDA_ARCHS", "80;90").replace(",", ";").split(";")
            targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
            targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")  # PTX, for GPUs to come
            flags = ["-O3", "-std=c++17", "-DUSE_CUDA", STABLE_ABI, *includes(), "-Xcompiler=-fPIC,-fvisibility=hidden"]
            yield source, stem.with_suffix(".o"), [NVCC, *flags, *targets, "-c"]
        elif source.stem.endswith("_isa"):
            for name, flags in ISA_SETS.items():
                obj = stem.with_name(f"{stem.name}.{name}.o")
                yield source, obj, [CXX, *COMMON, *FAST_LOOPS, *flags, f"-DFASTKD_ISA={name}", "-Icsrc", "-c"]
        elif ext.name == "fastkd._C":  # pybind11: torch's headers refuse to be mixed with the stable-ABI macro here
            python = ["-isystem", sysconfig.get_paths()["include"]]
            yield source, stem.with_suffix(".o"), [CXX, *COMMON, sets, *includes(), *python, *build_info(), "-c"]
        else:
            yield source, stem.with_suffix(".o"), [CXX, *COMMON, STABLE_ABI, sets, *includes(), "-c"]

    def _compile(self, source: Path, obj: Path, command: list[str]):
        obj.parent.mkdir(parents=True, exist_ok=True)
        if not is_newer(obj, [ROOT / "setup.py", *dependencies(obj)]):
            run([*command, "-MMD", str(source), "-o", str(obj)])

    def _linker(self, ext):
        # nvcc knows where its static runtime lies; static, so that it cannot clash with the one that torch brings.
        if ext.name == "fastkd._cuda":
            return [NVCC, "-shared", "-cudart=static"]
        # macOS's linker wants every symbol, and Python's come from the process.
        return [CXX, "-shared", *(["-undefined", "dynamic_lookup"] if IS_MAC else []), *SANITIZERS]

    def _libraries(self, ext):
        if ext.name == "fastkd._C":
            return []
        folder = f"-L{torch_root() / 'lib'}"
        return [folder, "-ltorch_cpu"] if ext.name == "fastkd._cpu" else [folder, "-Xlinker=--no-as-needed", "-ltorch"]


def includes() -> list[str]:
    torch_include = torch_root() / "include"
    return ["-Icsrc", "-isystem", str(torch_include), "-isystem", str(torch_include / "torch/csrc/api/include")]


def build_info() -> list[str]:
    namespace: dict = {}
    exec((torch_root() / "version.py").read_text(), namespace)
    return [f'-DFASTKD_TORCH_VERSION="{namespace["__version__"]}"', f'-DFASTKD_INSTRUCTION_SETS="{" ".join(ISA_SETS)}"']


def dependencies(obj: Path) -> list[Path]:
    """The source and the headers of ours that `obj` was compiled from, as the compiler listed them beside it (-MMD)."""
    listing = obj.with_suffix(".d")
    if not listing.exists():
        return [listing]  # does not exist either: compile
    return [ROOT / path for path in listing.read_text().partition(": ")[2].replace("\\\n", " ").split()]


def is_newer(target: Path, inputs) -> bool:
    """False as well where the target or an input does not exist."""
    paths = [Path(p) for p in inputs]
    return all(p.exists() for p in (target, *paths)) and all(target.stat().st_mtime >= p.stat().st_mtime for p in paths)


def run(command: list[str]):
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        print(" ".join(command), result.stdout, result.stderr, sep="\n", file=sys.stderr)
        result.check_returncode()


def beside(folder: str) -> list[str]:
    """The packages in kernels/ or bench/, which lie beside fastkd/ here and in it when installed."""
    return [f"fastkd.{folder}", *(f"fastkd.{folder}.{name}" for name in find_packages(folder, exclude=["evidence"]))]


setup(
    packages=[*find_packages(include=["fastkd", "fastkd.*"]), *beside("kernels"), *beside("bench")],
    package_dir={"fastkd.kernels": "kernels", "fastkd.bench": "bench"},
    package_data={"fastkd": ["py.typed", "data/*"]},
    include_package_data=False,
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
)
