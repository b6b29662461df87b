"""The house: a module imports only from floors below its own, and heavy packages only where they are used."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "clkit"
FLOORS = [
    {"checks", "modules"},
    {"store"},
    {"weights", "data", "memory", "metrics"},
    {"models", "symmetry", "alignment", "merging"}
    | {"normalization", "curvature", "tangent", "modulation", "evaluation"},
    {"learners", "consolidation", "checkpoint", "language"},
    {"training", "landscape", "representation"},
    {"experiments", "plotting"},
    {"interact", "cli", "benchmarks"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# imports within a floor: the first may import the second
BESIDE = {("alignment", "symmetry"), ("models", "tangent"), ("checkpoint", "learners"), ("cli", "benchmarks")}
TORCHLESS = {"metrics", "plotting", "interact"}


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """The full dotted names that a file imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: use absolute imports"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


def test_every_module_has_a_floor():
    assert {module_of(p) for p in FILES} <= FLOOR.keys()


def test_imports_go_down_only():
    for path in FILES:
        own = module_of(path)
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "clkit" and parts[1] != own:
                below = FLOOR[parts[1]] < FLOOR[own] or (own, parts[1]) in BESIDE
                assert below, f"{path} imports {name}"


def file_of(name: str) -> Path | None:
    """The file that an import reads: the module, or that of the module or package that a name is taken from."""
    while name.startswith("clkit."):
        place = ROOT / name.replace(".", "/")
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                return file
        name = name.rpartition(".")[0]
    return PACKAGE / "__init__.py" if name == "clkit" else None


def test_no_circles_between_files():
    """Imports within functions and for type checking count; so does a file's import of its own package's front."""
    left = {path: {file_of(name) for name in imports(path)} - {None} for path in [*FILES, PACKAGE / "__init__.py"]}
    while free := [path for path, needed in left.items() if not needed & left.keys()]:
        for path in free:
            del left[path]
    chain = [*left][:1]
    while chain and chain[-1] not in chain[:-1]:
        chain.append(next(needed for needed in left[chain[-1]] if needed in left))
    assert not chain, "a circle: " + " -> ".join(str(path.relative_to(ROOT)) for path in chain)


def test_the_kernel_knows_no_study():
    for path in FILES:
        assert not any(name.split(".")[0] in ("studies", "notebooks") for name in imports(path)), path


def test_metrics_and_plotting_do_not_know_torch():
    for path in FILES:
        if module_of(path) in TORCHLESS:
            assert not any(name.split(".")[0] == "torch" for name in imports(path)), path


def test_importing_clkit_loads_no_heavy_package():
    heavy = {"torchvision", "pandas", "matplotlib", "seaborn", "sklearn", "scipy", "IPython", "ipywidgets", "nbclient"}
    heavy |= {"transformers", "tokenizers", "open_clip", "timm"}
    code = (
        "import sys, torch; before = set(sys.modules); import clkit; "
        f"print(sorted({heavy} & (set(sys.modules) - before)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
