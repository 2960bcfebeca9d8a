"""The schema: every key is used by the package and described in the schema's source."""

import ast
import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmdistill.cli.config_reference import field_comments
from mmdistill.config import CLASSIFIER_NAMES, SHORT_KEYS, schema
from mmdistill.config.compose import CONFIGS

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "src" / "mmdistill"
SCHEMA = {c.__name__: c for c in vars(schema).values() if isinstance(c, type) and dataclasses.is_dataclass(c)}
BOTH_PHASES = {"PretrainConfig", "DistillConfig"}
TYPE_NAMES = {"T": BOTH_PHASES, "Config": BOTH_PHASES}  # of config/compose.py and training/run.py


def schema_keys() -> set[str]:
    """``Class.field`` for each field, named by the class that defines it."""
    return {f"{owner(cls, f.name)}.{f.name}" for cls in SCHEMA.values() for f in dataclasses.fields(cls)}


def owner(cls: type[Any], field: str) -> str:
    """Name of the class in the bases of `cls` that defines `field`."""
    return next(c.__name__ for c in reversed(cls.__mro__) if field in getattr(c, "__annotations__", {}))


class KeyReads:
    """Finds which fields of the schema a set of modules reads, by following the annotated types.

    A read is an attribute of an expression whose type is a class of the schema: ``trainer.lr`` counts for
    `TrainerConfig` only if `trainer` is a `TrainerConfig`. The type of an expression is a set of class names; it comes
    from annotations of parameters, fields and results, and from assignments. Validation of a value is no use of it, so
    functions named ``validate...`` do not count.
    """

    def __init__(self, sources: Iterable[str]) -> None:
        self.trees = [ast.parse(source) for source in sources]
        self.reads: set[str] = set()
        self.bases: dict[str, list[str]] = {}
        self.attributes: dict[str, dict[str, set[str]]] = {}
        self.returns: dict[str, set[str]] = {}
        for node in (node for tree in self.trees for node in ast.walk(tree)):
            if isinstance(node, ast.ClassDef):
                self.bases[node.name] = [ast.unparse(base).split("[")[0] for base in node.bases]
                self.attributes.setdefault(node.name, {})
        for node in (node for tree in self.trees for node in ast.walk(tree)):
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        self.attributes[node.name][item.target.id] = self.named(item.annotation)
            elif isinstance(node, ast.FunctionDef) and node.returns is not None:
                self.returns.setdefault(node.name, set()).update(self.named(node.returns))
        for _ in range(3):  # types of attributes that are assigned from others
            for tree in self.trees:
                self.visit(tree, {}, "")

    def named(self, annotation: ast.expr | None) -> set[str]:
        """Classes that an annotation names."""
        words = set(re.findall(r"\w+", ast.unparse(annotation))) if annotation is not None else set()
        return (words & set(self.attributes)).union(*(TYPE_NAMES.get(word, ()) for word in words))

    def attribute(self, cls: str, name: str) -> set[str]:
        """Types of an attribute or property of a class or its bases."""
        for candidate in (cls, *self.bases.get(cls, [])):
            if name in self.attributes.get(candidate, {}):
                return self.attributes[candidate][name]
            if candidate != cls and (found := self.attribute(candidate, name)):
                return found
        return set()

    def type_of(self, node: ast.expr, env: dict[str, set[str]]) -> set[str]:
        """Class names that an expression may have, or that its elements may have."""
        if isinstance(node, ast.Name):
            return env.get(node.id, set())
        if isinstance(node, ast.Attribute):
            return set().union(*(self.attribute(cls, node.attr) for cls in self.type_of(node.value, env)))
        if isinstance(node, ast.Subscript):
            return self.type_of(node.value, env)
        if isinstance(node, ast.IfExp):
            return self.type_of(node.body, env) | self.type_of(node.orelse, env)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("values", "items", "get"):
                return self.type_of(node.func.value, env)
            name = ast.unparse(node.func).rsplit(".", 1)[-1]
            return {name} if name in self.attributes else self.returns.get(name, set())
        return set()

    def visit(self, node: ast.AST, env: dict[str, set[str]], cls: str) -> None:
        """Record the reads below `node`; `env` holds types of names, `cls` is the enclosing class."""
        if isinstance(node, ast.ClassDef):
            cls = node.name
        elif isinstance(node, ast.FunctionDef | ast.Lambda):
            if isinstance(node, ast.FunctionDef) and node.name.lstrip("_").startswith("validate"):
                return
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            env = {**env, **{a.arg: self.named(a.annotation) for a in arguments}, "self": {cls}}
        elif isinstance(node, ast.Assign | ast.For | ast.comprehension | ast.AnnAssign | ast.NamedExpr):
            self.bind(node, env)
        elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            for generator in node.generators:
                self.bind(generator, env)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            for found in self.type_of(node.value, env) & set(SCHEMA):
                if node.attr in {f.name for f in dataclasses.fields(SCHEMA[found])}:
                    self.reads.add(f"{owner(SCHEMA[found], node.attr)}.{node.attr}")
        for child in ast.iter_child_nodes(node):
            self.visit(child, env, cls)

    def bind(self, node: ast.AST, env: dict[str, set[str]]) -> None:
        """Note the types of the names and attributes that an assignment or a loop sets."""
        value = node.iter if isinstance(node, ast.For | ast.comprehension) else node.value  # type: ignore[attr-defined]
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]  # type: ignore[attr-defined]
        pairs = [(target, value) for target in targets]
        while pairs:
            target, source = pairs.pop()
            if isinstance(target, ast.Tuple):
                elements = source.elts if isinstance(source, ast.Tuple) else [source] * len(target.elts)
                pairs += zip(target.elts, elements, strict=False)
            elif isinstance(target, ast.Name) and source is not None:
                env[target.id] = self.type_of(source, env)
            elif isinstance(target, ast.Attribute) and source is not None:
                for cls in self.type_of(target.value, env) & set(self.attributes):
                    self.attributes[cls].setdefault(target.attr, set()).update(self.type_of(source, env))


def test_every_key_is_used() -> None:
    """A key that nothing reads, except its validation, would be silently without effect."""
    reads = KeyReads(path.read_text() for path in (*PACKAGE.rglob("*.py"), *ROOT.glob("*.py"))).reads
    for short, (_, key) in SHORT_KEYS.items():  # read by name in `modality_setting`
        reads |= {f"DataModuleConfig.{short}", f"ModalityConfig.{key}"}
    for path in CONFIGS.glob("*.yaml"):  # run directories are named by keys
        for key in re.findall(r"\$\{(\w+)\}", path.read_text()):
            reads |= {f"{name}.{key}" for name in ("PretrainConfig", "DistillConfig")}
    assert len(SCHEMA) == 10
    assert sorted(schema_keys() - reads) == []


def test_a_key_is_unused_if_only_another_object_has_its_name() -> None:
    source = (PACKAGE / "config" / "schema.py").read_text() + (
        "\ndef use(config: PretrainConfig, other: Clip):\n    trainer = config.trainer\n"
        "    return trainer.lr, other.label, other.compile, [m.std for m in config.data_module.modalities.values()]\n"
        "def validate_seed(config: CommonConfig):\n    return config.seed\n"
    )
    found = KeyReads([source]).reads
    assert found == {"PretrainConfig.trainer", "TrainerConfig.lr", "CommonConfig.data_module",
                     "DataModuleConfig.modalities", "ModalityConfig.std"}  # fmt: skip


def test_every_key_is_described() -> None:
    """docs/config.md is written from these descriptions."""
    described = field_comments((PACKAGE / "config" / "schema.py").read_text())
    sections = {"data_module", "model", "trainer", "extra_keypoints"}
    undescribed = [f"{cls}.{key}" for (cls, key), text in described.items() if not text.strip() and key not in sections]
    assert {f"{cls}.{key}" for cls, key in described} == schema_keys()
    assert undescribed == []


def test_descriptions_list_every_classifier() -> None:
    described = field_comments((PACKAGE / "config" / "schema.py").read_text())["DistillConfig", "classifier"]
    assert [name for name in CLASSIFIER_NAMES if not re.search(rf"\b{name}\b", described)] == []
