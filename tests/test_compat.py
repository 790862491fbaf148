"""No private name of another library outside of `pte_trl/compat`, and no override that its table does not have.

The rule, for every file of pte_trl/, benchmarks/, experiments/ and recipes/ outside of pte_trl/compat/. Refused are

1. imports of a name that begins with an underscore, or from a module that has one in its path, of any library;
2. imports from, and attributes of, modules of the libraries in `DOCUMENTED` that are not listed there, or of names
   that are not, since their documentation does not describe them;
3. attributes that begin with an underscore, also as text (`getattr(x, "_y")`), unless this project defines the name
   and no class that ours derive from knows it; on `self` it may know it where the table of overrides has it, and
   `super()._y` may be called by the method that overrides it;
4. attributes in `UNDOCUMENTED`.
"""

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from pte_trl.compat.overrides import OVERRIDES, Override
from tests.compat_names import ELSEWHERE

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("pte_trl", "benchmarks", "experiments", "recipes")
FILES = [path.relative_to(ROOT) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
CHECKED = [path for path in FILES if not path.is_relative_to("pte_trl/compat")]
COMPAT = ("engines", "grading", "hub", "peft", "torch", "transformers", "trl")

# Module -> the names that its library documents; None for all of them.
DOCUMENTED: dict[str, set[str] | None] = {
    "accelerate": None,
    "accelerate.logging": None,
    "accelerate.utils": None,
    "datasets": None,
    "datasets.exceptions": None,
    "deepspeed": None,
    "huggingface_hub": None,
    "huggingface_hub.errors": None,
    "huggingface_hub.utils": {"validate_repo_id"},
    "peft": None,
    "peft.tuners.tuners_utils": {"BaseTuner", "BaseTunerLayer"},
    "torch": None,
    "torch.autograd": None,
    "torch.autograd.function": {"once_differentiable"},
    "torch.autograd.graph": None,
    "torch.backends": None,
    "torch.backends.cuda": None,
    "torch.backends.cudnn": None,
    "torch.cuda": None,
    "torch.distributed": None,
    "torch.distributed.fsdp": None,
    "torch.distributed.tensor": None,
    "torch.library": {"custom_op"},
    "torch.linalg": None,
    "torch.nn": None,
    "torch.nn.attention.flex_attention": None,
    "torch.nn.functional": None,
    "torch.nn.init": None,
    "torch.nn.parallel": None,
    "torch.nn.utils": None,
    "torch.nn.utils.rnn": None,
    "torch.optim": None,
    "torch.optim.lr_scheduler": None,
    "torch.profiler": None,
    "torch.random": None,
    "torch.serialization": None,
    "torch.utils": None,
    "torch.utils.checkpoint": None,
    "transformers": None,
    "transformers.integrations.sdpa_attention": {"sdpa_attention_forward"},
    "transformers.masking_utils": {"sdpa_mask"},
    "transformers.utils": {"ModelOutput"},
    "transformers.utils.logging": None,
    "triton": None,
    "triton.language": None,
    "trl": None,
}
LIBRARIES = {module.partition(".")[0] for module in DOCUMENTED}
# Attributes without an underscore that no documentation has.
UNDOCUMENTED = {
    "all_tied_weights_keys",
    "deepspeed_plugin",
    "ds_id",
    "ds_numel",
    "ds_shape",
    "ds_status",
    "ds_tensor",
    "fsdp_plugin",
    "fsdp_plugin_args",
    "hf_deepspeed_config",
    "mixed_precision_policy",
    "partition_gradients",
}
DOCUMENTED_UNDERSCORES = {"_asdict", "_replace", "_fields", "_exit"}  # of named tuples and of os
OF_METACLASSES = {"_abc_impl", "_backward_cls"}  # which abc and torch.autograd put into every class
READERS = ("getattr", "hasattr", "setattr", "delattr")


def is_private(name: str) -> bool:
    return bool(re.match(r"_[a-zA-Z]", name))


@cache
def is_module(name: str) -> bool:
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


# ---- the classes of this project, and what theirs know ---------------------------------------------------------


def is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in FOLDERS


@cache
def our_classes() -> list[type]:
    """Classes of this project that derive from another library's."""
    found = {}
    for path in FILES:
        if path.parts[0] != "recipes":  # scripts, whose classes would be in the package
            try:
                module = importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
            except ModuleNotFoundError as missing:
                if missing.name != "triton":  # a file of kernels has no classes, and torch for CPUs no Triton
                    raise
                continue
            found |= {cls: None for cls in vars(module).values() if inspect.isclass(cls) and is_ours(cls)}
    return [cls for cls in found if bases(cls)]


def bases(cls: type) -> list[type]:
    """Classes of other libraries that a class derives from; of the standard library none."""
    modules = {base: base.__module__.partition(".")[0] for base in cls.__mro__}
    return [base for base, top in modules.items() if top not in (*sys.stdlib_module_names, *FOLDERS)]


@cache
def known_in(module: str) -> set[str]:
    """Names with an underscore that a library's module defines, reads or sets on an object."""
    source = inspect.getsourcefile(sys.modules[module])
    tree = ast.parse(Path(source).read_text() if source else "")  # torch's C++ has none
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return {name for name in names if is_private(name)}


def known_to(cls: type) -> set[str]:
    """Names with an underscore by which the libraries may call or read an object of this class."""
    modules = {base.__module__ for base in bases(cls)}
    modules |= {"peft.peft_model"} if "peft.tuners.tuners_utils" in modules else set()
    return set().union(*map(known_in, modules))


def defined_by(cls: type) -> set[str]:
    """Names with an underscore in a class of ours and in its plain mixins, of their bodies and of `self`."""
    names = set()
    for part in (cls, *(base for base in cls.__bases__ if is_ours(base) and not bases(base))):
        tree = ast.parse(inspect.getsource(part).lstrip() if part.__qualname__ == part.__name__ else "")
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_set_on_self(node)}
        names |= set(vars(part))
    return {name for name in names - OF_METACLASSES if is_private(name)}


def is_set_on_self(node: ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"


# ---- the rule ----------------------------------------------------------------------------------------------------


class Walker(ast.NodeVisitor):
    """Collects what the rule refuses in one file.

    Args:
        own: names with an underscore that this project defines.
        known: for each class of this project, those that the libraries know of which it derives.
        overridden: those of the table.
    """

    def __init__(self, own: set[str], known: dict[str, set[str]], overridden: set[str]):
        self.own, self.known, self.overridden = own, known, overridden
        self.anywhere = set().union(*known.values())
        self.around: list[set[str]] = [set()]  # what is known of the class that we are in
        self.found: list[str] = []
        self.modules: dict[str, str] = {}  # names in the file -> modules of the libraries
        self.functions: list[str] = []  # those that we are in

    def refuse(self, node: ast.AST, what: str) -> None:
        self.found.append(f"line {node.lineno}: {what}")

    def check_module(self, node: ast.AST, module: str, name: str | None = None) -> None:
        if any(map(is_private, [*module.split("."), name or ""])):
            self.refuse(node, f"{module}.{name}")
        elif module.partition(".")[0] in LIBRARIES:
            names = DOCUMENTED.get(module, set())
            if name and is_module(f"{module}.{name}"):
                self.check_module(node, f"{module}.{name}")
            elif names is not None and name not in names:
                self.refuse(node, f"{module}.{name} is not documented")

    def visit_Import(self, node: ast.Import) -> None:
        for each in node.names:
            top = each.name.partition(".")[0]
            if top in LIBRARIES:
                self.check_module(node, each.name)
                self.modules[each.asname or top] = each.name if each.asname else top

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module.partition(".")[0] in (*FOLDERS, *sys.stdlib_module_names):
            return
        for each in node.names:
            self.check_module(node, node.module, each.name)
            if is_module(whole := f"{node.module}.{each.name}"):
                self.modules[each.asname or each.name] = whole

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.around.append(self.known.get(node.name, self.anywhere) if node.bases else set())
        self.generic_visit(node)
        self.around.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.functions.append(node.name)
        self.generic_visit(node)
        self.functions.pop()

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in READERS and isinstance(node.args[1], ast.Constant):
            self.check_name(node, node.args[0], node.args[1].value)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.check_name(node, node.value, node.attr)
        path, _, name = ast.unparse(node).rpartition(".")
        root, _, rest = path.partition(".")
        if root in self.modules and is_module(module := ".".join(filter(None, (self.modules[root], rest)))):
            self.check_module(node, module, name)
        self.generic_visit(node)

    def check_name(self, node: ast.AST, owner: ast.expr, name: str) -> None:
        """Rules 3 and 4, of an attribute `name` of `owner`."""
        shown = f"{ast.unparse(owner)[:60]}.{name}"
        if name in UNDOCUMENTED:
            self.refuse(node, f"{shown} is not documented")
        if not is_private(name) or name in DOCUMENTED_UNDERSCORES:
            return
        if ast.unparse(owner) == "super()":
            allowed = name in (*self.functions, *(self.own - self.around[-1]))
        elif ast.unparse(owner) in ("self", "cls"):
            allowed = name in self.own and name not in self.around[-1] - self.overridden
        else:
            allowed = name in self.own and name not in self.anywhere
        if not allowed:
            self.refuse(node, f"{shown}")


@cache
def walker_arguments() -> tuple[set[str], dict[str, set[str]], set[str]]:
    own = set()
    for path in CHECKED:
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and is_set_on_self(node):
                own.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
    known = {cls.__name__: known_to(cls) for cls in our_classes()}
    overridden = {name for methods in OVERRIDES.values() for name in methods}
    return {name for name in own if is_private(name)}, known, overridden


def refused(source: str) -> list[str]:
    walker = Walker(*walker_arguments())
    walker.visit(ast.parse(source))
    return walker.found


@pytest.mark.parametrize("path", CHECKED, ids=str)
def test_no_private_name_outside_of_compat(path):
    assert refused((ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "from trl.trainer.utils import pad",
        "from transformers.utils import WEIGHTS_NAME",
        "from torch.utils import _pytree",
        "from torch.utils._pytree import tree_leaves",
        "from huggingface_hub import constants",
        "from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy",
        "import datasets\ndatasets.config.HF_HUB_OFFLINE = True",
        "import torch.distributed as dist\ndist.distributed_c10d.is_initialized()",
        "import accelerate.commands.launch",
        "model.config._attn_implementation",
        "getattr(config, '_attn_implementation', None)",
        "trainer._metrics['train']",
        "class A(Trainer):\n    def log(self):\n        return self._metrics",
        "class A(Trainer):\n    def log(self):\n        return super()._load_best_model()",
        "parameter.ds_tensor",
        "hasattr(parameter, 'ds_tensor')",
        "tensor.untyped_storage()._cdata",
    ],
)
def test_the_rule_finds(line):
    assert refused(line)


# ---- names and overrides -----------------------------------------------------------------------------------------


def compat() -> dict[str, ModuleType]:
    return {name: importlib.import_module(f"pte_trl.compat.{name}") for name in COMPAT}


def test_every_private_name_has_a_test():
    tests = [importlib.import_module(f"tests.test_compat_{name}") for name in ("trl", "transformers", "torch")]
    about = {name for module in tests for test in vars(module).values() for name in getattr(test, "about", ())}
    names = {f"{module}.{name}" for module, contents in compat().items() for name in contents.__all__}
    assert names == about | set(ELSEWHERE) and not about & set(ELSEWHERE)


def test_every_private_name_says_why_it_is_needed():
    """A function by its docstring, what is imported by a comment in its line."""
    for module, contents in compat().items():
        text = Path(contents.__file__).read_text()
        for name in contents.__all__:
            value = getattr(contents, name)
            ours = getattr(value, "__module__", None) == contents.__name__
            comment = re.search(rf'^(?!\s*").*\b{name}\b.*  # \w', text, re.MULTILINE)
            why = value.__doc__ if ours else comment
            assert why, f"{module}.{name}"


def test_compat_is_at_the_bottom_and_has_every_file():
    files = {path.stem for path in (ROOT / "pte_trl/compat").glob("*.py")}
    assert files == {"__init__", "overrides", *COMPAT}
    for path in (ROOT / "pte_trl/compat").glob("*.py"):
        assert not re.search(r"^\s*(from|import) (pte_trl|benchmarks|experiments)", path.read_text(), re.MULTILINE)


def test_the_overrides_are_those_of_the_table():
    found = {}
    for cls in our_classes():
        names = defined_by(cls) & known_to(cls)
        for base in bases(cls):
            if is_private(base.__name__) and base.__module__ != "torch.autograd.function":  # private as a whole
                names |= {name for name in vars(cls).keys() & vars(base).keys() if not name.startswith("__")}
        if names:
            found[f"{cls.__module__}:{cls.__qualname__}"] = names
    assert found == {cls: set(methods) for cls, methods in OVERRIDES.items()}


def resolve(name: str) -> type:
    module, _, cls = name.partition(":")
    return getattr(importlib.import_module(module), cls)


ROWS = [(cls, method, row) for cls, methods in OVERRIDES.items() for method, row in methods.items()]


@pytest.mark.parametrize(("cls", "method", "row"), ROWS, ids=[f"{cls.partition(':')[2]}.{m}" for cls, m, _ in ROWS])
def test_a_method_that_is_overridden_has_its_arguments(cls: str, method: str, row: Override):
    theirs, ours = (inspect.signature(getattr(resolve(each), method)).parameters for each in (row.base, cls))
    names = [name for name in theirs if name != "self"]
    assert tuple(names[: len(row.arguments)]) == row.arguments
    # What must be given is taken, by its name or among the rest.
    needed = {name for name in names if theirs[name].default is inspect.Parameter.empty}
    assert needed <= set(ours) or "args" in ours
    assert row.why and row.tests


def test_every_test_that_is_named_is_there():
    for each in {*ELSEWHERE.values(), *(test for _, _, row in ROWS for test in row.tests)}:
        file, _, test = each.partition("::")
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), each
