"""Laws of the repository as a whole: who may import whom, what importing costs, and that what is written exists."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import pytest

import nnssl

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nnssl"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("documentation/**/*.md")])
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]

#: Modules that lie in the package's root folder, such as ``errors``: below all, and free of torch.
FOUNDATION = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
#: The parts of the package from the lowest layer to the highest. A part imports its own layer and those below.
LAYERS = (
    FOUNDATION,
    {"networks", "diffusion", "losses"},
    {"data", "plans", "training"},
    {"trainers", "inference", "evaluation", "dataset_conversion"},
    {"demo", "benchmark", "reproduce", "cli"},
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
#: Parts that answer at once because importing them, with all their modules, loads no torch.
TORCH_FREE = FOUNDATION | {"evaluation", "dataset_conversion", "cli"}
#: (method file, the method file it may import): true variants of one paper's method.
PAPER_VARIANTS: set[tuple[str, str]] = set()
#: Present only in a developer's environment or loaded by other packages; importing nnssl must not need them.
NOT_FOR_RUN_TIME = {"torchvision", "timm", "medpy", "mambapy", "hypothesis", "pytest"}
#: Modules that may import such a package inside a function: a ViT is timm's, which nnU-Net brings.
ON_DEMAND = {("nnssl.networks.visual_encoders", "timm")}
#: Where one command of a shell line ends.
SHELL_OPERATORS = {"|", "||", "&&", "&", ";", ">", ">>", "2>"}


class Import(NamedTuple):
    """One import of a module of the package."""

    importer: str
    imported: str
    place: str


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


@cache
def sources() -> dict[Path, ast.Module]:
    """Parse every module of the package once."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def imported_names(path: Path, node: ast.AST) -> list[str]:
    """Return the dotted names an import statement asks for; ``from a import b`` asks for a.b if that is a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = module_name(path).split(".")
        keep = len(package) - node.level + (path.name == "__init__.py")
        base = ".".join([*package[:keep], *([base] if base else [])])
    names = [f"{base}.{alias.name}" for alias in node.names]
    return [name if is_module(name) else base for name in names]


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def package_imports() -> Iterator[Import]:
    """Yield every import of one nnssl module by another, inside functions too."""
    for path, tree in sources().items():
        for node in ast.walk(tree):
            for name in imported_names(path, node):
                if name.split(".")[0] == "nnssl":
                    yield Import(module_name(path), name, place(path, node))


def part(module: str) -> str | None:
    """Return the part of the package a module belongs to; None for ``nnssl`` itself."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else None


def calls(name: str) -> list[str]:
    """Return the places where something named ``name`` is called."""
    found = []
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and called_name(node) == name:
                found.append(place(path, node))
    return found


def called_name(node: ast.Call) -> str | None:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else None


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


# ---------------------------------------------------------------------------------------------------------- imports


def test_every_part_has_a_layer():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(RANK) - FOUNDATION


def test_imports_run_one_way():
    upward = [
        f"{i.place} imports {i.imported}"
        for i in package_imports()
        if part(i.importer) and part(i.imported) and RANK[part(i.imported)] > RANK[part(i.importer)]
    ]
    assert not upward


def test_no_circle_of_parts():
    edges: dict[str, set[str]] = {name: set() for name in RANK}
    for i in package_imports():
        if part(i.importer) and part(i.imported) and part(i.importer) != part(i.imported):
            edges[part(i.importer)].add(part(i.imported))
    while True:  # take away parts that import no remaining part; what never goes away lies on or behind a circle
        done = [name for name, targets in edges.items() if not targets & set(edges)]
        if not done:
            break
        for name in done:
            del edges[name]
    assert not {name: targets & set(edges) for name, targets in edges.items()}


def method_modules() -> set[str]:
    from nnssl.trainers.registry import TRAINERS

    return {info.module for info in TRAINERS.values()}


def test_methods_do_not_import_each_other():
    methods = method_modules()
    sideways = [
        f"{i.place} imports {i.imported}"
        for i in package_imports()
        if i.importer in methods
        and i.imported in methods - {i.importer}
        and (i.importer, i.imported) not in PAPER_VARIANTS
    ]
    assert not sideways


def test_commands_evaluation_and_conversion_load_no_torch():
    modules = ["nnssl"] + [m for m in map(module_name, sources()) if part(m) in TORCH_FREE]
    code = (
        f"import importlib, sys\nfor name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'torchvision', 'nnunetv2', 'timm', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} loads {heavy}'\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "importing prints"


def test_no_import_of_packages_only_others_need():
    wanted = [
        f"{place(path, node)} imports {name}"
        for path, tree in sources().items()
        if part(module_name(path)) != "benchmark"  # compares with mambapy when that is installed
        for node in ast.walk(tree)
        for name in imported_names(path, node)
        if name.split(".")[0] in NOT_FOR_RUN_TIME
        and not ((module_name(path), name.split(".")[0]) in ON_DEMAND and node not in tree.body)
    ]
    assert not wanted


# --------------------------------------------------------------------------------------------------------- commands


def test_every_command_resolves_and_answers_help_without_torch():
    code = (
        "import contextlib, importlib, io, sys\n"
        f"for name, target in {PROJECT['scripts']!r}.items():\n"
        "    module, function = target.split(':')\n"
        "    main = getattr(importlib.import_module(module), function)\n"
        "    text = io.StringIO()\n"
        "    try:\n"
        "        with contextlib.redirect_stdout(text):\n"
        "            main(['--help'])\n"
        "        raise SystemExit(f'{name} --help went on')\n"
        "    except SystemExit as stop:\n"
        "        assert stop.code in (0, None), f'{name}: {stop.code}'\n"
        "    assert text.getvalue().startswith(f'usage: {name}'), text.getvalue()\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_every_command_is_installed():
    for name in PROJECT["scripts"]:
        command = Path(sys.executable).with_name(name)
        assert command.is_file() or command.with_suffix(".exe").is_file(), f"{name} is not beside {sys.executable}"


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Yield (place, words) of every nnssl command in a fenced block of the documentation."""
    for document in DOCUMENTS:
        blocks = re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```", document.read_text(encoding="utf-8"), re.M | re.S)
        for line in "".join(blocks).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if re.match(r"\s*(\$ )?nnssl_\w+", line) else []
            words = list(takewhile(lambda word: word not in SHELL_OPERATORS, words[words[:1] == ["$"] :]))
            if words:
                yield document.name, words


def test_commands_in_the_documentation_parse(capsys):
    wrong = []
    for where, (name, *arguments) in command_lines():
        target = PROJECT["scripts"].get(name)
        if target is None:
            wrong.append(f"{where}: {name} does not exist")
            continue
        parser = importlib.import_module(target.split(":")[0]).build_parser()
        try:
            parser.parse_args(arguments)
        except SystemExit:
            wrong.append(f"{where}: {shlex.join([name, *arguments])}: {capsys.readouterr().err.splitlines()[-1]}")
    assert not wrong


def test_readme_shows_the_whole_way():
    shown = {words[0] for where, words in command_lines() if where == "README.md"}
    assert shown >= {f"nnssl_{verb}" for verb in ("import", "plan_and_preprocess", "train", "predict", "evaluate")}


# ------------------------------------------------------------------------------------------------------- mechanisms


@pytest.mark.parametrize("name", ["backward", "clip_grad_norm_"])
def test_optimization_happens_in_one_place(name):
    """Only the base trainer steps; networks differentiate by hand, the benchmark times a bare operation."""
    found = [p for p in calls(name) if not p.startswith(("nnssl/networks/", "nnssl/benchmark/"))]
    assert len(found) == 1, found
    assert found[0].startswith("nnssl/trainers/")


def test_files_are_loaded_without_executing_them():
    """torch.load unpickles code before torch 2.6 unless told otherwise, so each call says weights_only=True."""
    loose = []
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            flag = {k.arg: k.value for k in node.keywords}.get("weights_only")
            safe = isinstance(flag, ast.Constant) and flag.value is True
            is_load = ast.unparse(node.func) == "torch.load"
            if (is_load or flag is not None) and not safe:
                loose.append(place(path, node))
    assert not loose


# ------------------------------------------------------------------------------------------------- files of all kinds


def text_files() -> list[Path]:
    """Return the files of the repository, without what tools and runs leave there."""
    folders = ("nnssl", "tests", "documentation", ".github", ".ci")
    found = [p for p in ROOT.iterdir() if p.is_file() and p.name != ".git"]
    found += [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    kinds = {"", ".py", ".md", ".toml", ".yml", ".yaml", ".json", ".cff", ".txt", ".html", ".css", ".csv"}
    return [p for p in found if p.suffix in kinds and "__pycache__" not in p.parts and not p.name.startswith(".cov")]


def test_no_path_of_one_machine():
    machine = re.compile(r"(?<![\w.:/~*-])/(?:wor[k]|roo[t]|hom[e]|User[s]|op[t]|tm[p]|farm)/\w")
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), 1):
            if machine.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found


def refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = [key for key, _ in pairs]
    assert len(keys) == len(set(keys)), f"a key stands twice in {keys}"
    return dict(pairs)


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_package_data_is_strict_json():
    for path in PACKAGE.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        json.loads(text, object_pairs_hook=refuse_duplicates, parse_constant=refuse_constant)


def test_every_file_of_the_package_is_shipped():
    """setuptools takes modules of folders with an __init__.py, and other files only where package-data says so."""
    shipped = {
        path for pattern in PYPROJECT["tool"]["setuptools"]["package-data"]["nnssl"] for path in PACKAGE.glob(pattern)
    }
    shipped |= {path for path in PACKAGE.rglob("*.py") if (path.parent / "__init__.py").is_file()}
    present = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert not {str(path.relative_to(ROOT)) for path in present - shipped}


def test_one_version():
    assert PROJECT["version"] == nnssl.__version__
    assert re.search(rf"^version: {re.escape(nnssl.__version__)}$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert f"## [{nnssl.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- documentation


def test_every_trainer_has_a_page_and_every_page_a_trainer():
    from nnssl.trainers.registry import TRAINERS

    pages = {page.stem: page.read_text(encoding="utf-8") for page in ROOT.glob("documentation/methods/*.md")}
    assert set(pages) == {info.module.rsplit(".", 1)[1] for info in TRAINERS.values()}
    for name, info in TRAINERS.items():
        assert name in pages[info.module.rsplit(".", 1)[1]]


def test_readme_has_every_trainer_with_its_cost():
    from nnssl.trainers.registry import TRAINERS

    rows = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| [`")]
    for name, info in TRAINERS.items():
        row = next((row for row in rows if f"[`{name}`]" in row), "")
        assert row.endswith(f"| {info.step_cost:.2g} | {info.memory_factor:.2g} |"), name
    assert len(rows) == len(TRAINERS)


def test_registry_names_every_trainer_and_class():
    from nnssl.trainers.registry import TRAINERS, trainer_class

    assert list(TRAINERS) == sorted(TRAINERS)
    for name in TRAINERS:
        assert trainer_class(name).__name__ == name
    defined = {
        node.name
        for path, tree in sources().items()
        if part(module_name(path)) == "trainers"
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Trainer") and not node.name.startswith("_")
    }
    assert defined == {*TRAINERS, "SemiSupervisedTrainer"}


def heading_slugs(text: str) -> set[str]:
    """Return the anchors a page offers, as GitHub forms them."""
    headings = re.findall(r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_documents_resolve():
    broken = []
    for document in DOCUMENTS:
        text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", link):
                continue
            file, _, anchor = link.partition("#")
            target = (document.parent / file) if file else document
            known = target.suffix != ".md" or not anchor or anchor in heading_slugs(read_if_file(target))
            if not target.exists() or not known:
                broken.append(f"{document.relative_to(ROOT)}: {link}")
    assert not broken


def read_if_file(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
