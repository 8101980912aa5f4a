"""The law of the house: layers, one loop over layers, choke points, sizes. Read from the syntax trees, so lazy imports count too.

Each rule is a function from source to complaints; the second half of the file shows each one a culprit.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llavakit"
LAYERS = {
    "errors": 0, "types": 1, "geometry": 1, "config": 1, "logs": 1,
    "ops": 2, "storage": 2, "world": 2, "report": 2,
    "model": 3, "processing": 3,
    "checkpoint": 4,
    "engine": 5,
    "pretrained": 6,
    "server": 7, "training": 7, "datagen": 7, "evals": 7, "quantization": 7,
    "reproduce": 8,
    "cli": 9,
}  # fmt: skip
NO_TORCH = {"errors", "types", "geometry", "config", "logs"}
HEAVY = {"torch", "numpy", "PIL", "transformers", "safetensors", "sentencepiece", "tokenizers"}
ORACLES = {"transformers", "peft", "openai", "bitsandbytes"}
OPTIONAL = {
    "datasets": {"training/rows.py"},
    "gguf": {"storage/gguf_file.py"},
    "ray": {"server/cluster.py", "server/cluster_bulk.py", "server/ray_router.py"},
    "spacy": {"training/prepare/concepts.py"},
    "llguidance": {"engine/constraint.py"},
    "wandb": {"training/trackers.py"},
}
LOADED_BY_THEIR_LIBRARY = {"server/ray_router.py"}
ESCAPES = {"importlib", "__import__", "pickle", "dill", "marshal", "eval", "exec", "compile", "import_module"}
HARMLESS = {"importlib.metadata.version", "pickle.UnpicklingError"}
CLOSED = {"storage/plain_pickle.py": {"pickle.Unpickler"}}  # it refuses every name, so nothing can be called
BAD_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "manager"}
CHOKE_POINTS = {"Image.open": {"processing/decode.py"}, "torch.load": {"storage/pickle_tensors.py"}, "logging.basicConfig": set()}
MAX_FILE, MAX_FUNCTION = 500, 80

Module = tuple[str, ast.Module]


@cache
def modules() -> tuple[Module, ...]:
    return tuple((path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text("utf-8"))) for path in sorted(PACKAGE.rglob("*.py")))


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def part(dotted: str) -> str | None:
    names = dotted.split(".")
    return names[1] if names[0] == "llavakit" and len(names) > 1 else None


def own_part(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def layer_complaints(name: str, tree: ast.Module) -> list[str]:
    own = own_part(name)
    if own == "__init__":
        return []
    found = {imported for dotted in imports(tree) if (imported := part(dotted)) is not None and imported != own and imported in LAYERS}
    return [
        f"{name} (layer {LAYERS[own]}) imports {imported} (layer {LAYERS[imported]})"
        for imported in found
        if LAYERS[imported] >= LAYERS[own]
    ]


def weight_complaints(name: str, tree: ast.Module) -> list[str]:
    if own_part(name) not in NO_TORCH and not name.endswith("/config.py"):
        return []
    return [f"{name} imports {dotted}" for dotted in imports(tree) if dotted.split(".")[0] in HEAVY]


def oracle_complaints(name: str, tree: ast.Module) -> list[str]:
    return [f"{name} imports {dotted}" for dotted in imports(tree) if dotted.split(".")[0] in ORACLES]


def optional_complaints(name: str, tree: ast.Module) -> list[str]:
    """Find imports of extras outside the one place that says how to install them, or at the top, where they would not be optional."""
    at_top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    top = {dotted.split(".")[0] for dotted in imports(at_top)}
    found = {dotted.split(".")[0] for dotted in imports(tree)} & OPTIONAL.keys()
    return [
        f"{name} imports {extra}"
        for extra in found
        if name not in OPTIONAL[extra] or (extra in top and name not in LOADED_BY_THEIR_LIBRARY)
    ]


def escape_complaints(name: str, tree: ast.Module) -> list[str]:
    harmless = HARMLESS | CLOSED.get(name, set())
    found = [dotted for dotted in imports(tree) if dotted.split(".")[0] in ESCAPES and dotted not in harmless]
    found += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in ESCAPES]
    return [f"{name} uses {what}" for what in found]


def except_complaints(name: str, tree: ast.Module) -> list[str]:
    edges = {"cli/exits.py", "engine/engine.py", "engine/service.py", "server/app.py"}
    complaints = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = [] if node.type is None else [kind.id for kind in ast.walk(node.type) if isinstance(kind, ast.Name)]
            if (node.type is None or {"Exception", "BaseException"} & set(kinds)) and name not in edges:
                complaints.append(f"{name}:{node.lineno} catches everything")
    return complaints


def choke_point_complaints(name: str, tree: ast.Module) -> list[str]:
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return [f"{name} calls {call}" for call, allowed in CHOKE_POINTS.items() if call in calls and name not in allowed]


def print_complaints(name: str, tree: ast.Module) -> list[str]:
    writes = ("print", "sys.stdout.write", "sys.stderr.write")
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [] if name.startswith("cli/") else [f"{name} calls {call}" for call in calls if call in writes]


def environment_complaints(name: str, tree: ast.Module) -> list[str]:
    reads = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [] if name.startswith("cli/") else [f"{name} reads {read}" for read in reads if read in ("os.environ", "os.getenv")]


def size_complaints(name: str, tree: ast.Module) -> list[str]:
    complaints = []
    for node in ast.walk(tree):
        end = getattr(node, "end_lineno", 0) or 0
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and end - node.lineno >= MAX_FUNCTION:
            complaints.append(f"{name}: {node.name} has {end - node.lineno + 1} lines")
    last = max((getattr(node, "end_lineno", 0) or 0 for node in tree.body), default=0)
    return complaints + ([f"{name} has {last} lines"] if last > MAX_FILE else [])


def name_complaints(name: str, tree: ast.Module) -> list[str]:
    del tree
    return [f"{name} is named {stem}" for stem in name.removesuffix(".py").split("/") if stem in BAD_NAMES]


def document_complaints(name: str, tree: ast.Module) -> list[str]:
    complaints = [] if ast.get_docstring(tree) else [f"{name} says nothing about itself"]
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")]
    for node in public:
        if not ast.get_docstring(node):
            complaints.append(f"{name}: {node.name} has no docstring")
        for child in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(child, ast.FunctionDef) and not child.name.startswith("_") and not ast.get_docstring(child):
                is_overload = any(ast.unparse(decorator) == "overload" for decorator in child.decorator_list)
                if not (node.name.startswith("_") or is_overload):
                    complaints.append(f"{name}: {node.name}.{child.name} has no docstring")
    return complaints


def init_complaints(name: str, tree: ast.Module) -> list[str]:
    if not name.endswith("/__init__.py"):
        return []
    return [f"{name} does more than describe its package"] if len(tree.body) > 1 else []


RULES = (
    layer_complaints,
    weight_complaints,
    oracle_complaints,
    optional_complaints,
    escape_complaints,
    except_complaints,
    choke_point_complaints,
    print_complaints,
    environment_complaints,
    size_complaints,
    name_complaints,
    document_complaints,
    init_complaints,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: object) -> None:
    assert callable(rule)
    assert [complaint for name, tree in modules() for complaint in rule(name, tree)] == []


def decoder_loops() -> list[str]:
    """Find loops over decoder layers: `for ... in self.layers` (or range over them) in model/, engine/, pretrained/."""
    found = []
    for name, tree in modules():
        if own_part(name) in ("model", "engine", "pretrained", "training", "quantization"):
            loops = [node.iter for node in ast.walk(tree) if isinstance(node, ast.For | ast.comprehension)]
            found += [
                f"{name}: {ast.unparse(loop)}" for loop in loops if "layers" in ast.unparse(loop) and "encoder" not in ast.unparse(loop)
            ]
    return [entry for entry in found if "range(" not in entry]


def test_one_loop_over_decoder_layers() -> None:
    assert decoder_loops() == ["model/decoder.py: self.layers"]


def test_no_import_cycles() -> None:
    names = {f"llavakit.{name.removesuffix('.py').replace('/', '.')}" for name, _ in modules()}
    graph = {}
    for name, tree in modules():
        module = f"llavakit.{name.removesuffix('.py').replace('/', '.')}"
        if module != "llavakit.__init__":
            graph[module] = {found for dotted in imports(tree) for found in (dotted, dotted.rpartition(".")[0]) if found in names}
    assert find_cycle(graph) == []


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    state: dict[str, int] = {}

    def visit(node: str, path: list[str]) -> list[str]:
        if state.get(node) == 1:
            return [*path[path.index(node) :], node]
        if state.get(node) == 2:
            return []
        state[node] = 1
        for following in graph.get(node, set()):
            if cycle := visit(following, [*path, node]):
                return cycle
        state[node] = 2
        return []

    return next((cycle for node in graph if (cycle := visit(node, []))), [])


CULPRITS = (
    (layer_complaints, "model/x.py", "def f():\n    from llavakit.engine.llm import LLM"),
    (layer_complaints, "training/x.py", "if TYPE_CHECKING:\n    import llavakit.evals.task"),
    (layer_complaints, "model/x.py", "from llavakit.processing import chat"),
    (weight_complaints, "training/config.py", "import torch"),
    (weight_complaints, "types.py", "from numpy import array"),
    (oracle_complaints, "engine/x.py", "from transformers import AutoModel"),
    (optional_complaints, "checkpoint/x.py", "def f():\n    import gguf"),
    (optional_complaints, "storage/gguf_file.py", "import gguf"),
    (escape_complaints, "model/x.py", "import importlib\nimportlib.import_module('llavakit.engine')"),
    (escape_complaints, "model/x.py", "__import__('llavakit.engine')"),
    (escape_complaints, "storage/x.py", "import pickle"),
    (except_complaints, "storage/x.py", "try:\n    f()\nexcept Exception:\n    pass"),
    (except_complaints, "storage/x.py", "try:\n    f()\nexcept (ValueError, Exception):\n    pass"),
    (choke_point_complaints, "engine/x.py", "Image.open(path)"),
    (choke_point_complaints, "checkpoint/x.py", "torch.load(path)"),
    (print_complaints, "engine/x.py", "print(1)"),
    (environment_complaints, "engine/x.py", "import os\nos.environ['A']"),
    (size_complaints, "engine/x.py", "def f():\n" + "    x = 1\n" * 80),
    (size_complaints, "engine/x.py", "x = 1\n" * 501),
    (name_complaints, "engine/utils.py", ""),
    (document_complaints, "engine/x.py", '"""Text."""\ndef f():\n    return 1'),
    (init_complaints, "engine/__init__.py", '"""Text."""\nimport os'),
)


@pytest.mark.parametrize(("rule", "name", "source"), CULPRITS)
def test_each_rule_can_fail(rule: object, name: str, source: str) -> None:
    assert callable(rule)
    assert rule(name, ast.parse(source))


def test_a_cycle_is_found() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
