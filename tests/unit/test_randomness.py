"""One home of seeded randomness, and draws that never change."""

import ast
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdistill.randomness import derive_seed, integer_rng, seed_everything, seed_step, seed_torch, seeded_rng, text_rng

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "mmdistill"
HOME = PACKAGE / "randomness.py"
TORCH_FUNCTIONS = {
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli"),
    *("multinomial", "poisson", "seed", "manual_seed", "initial_seed", "set_rng_state", "Generator"),
}


def forbidden_names(source: str) -> list[str]:
    """Names in a source text that create, seed or read a random generator."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] == "random" or a.name == "numpy.random"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "") in ("random", "numpy.random", "torch.random"):
            found.append(str(node.module))
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"torch.{a.name}" for a in node.names if a.name in TORCH_FUNCTIONS]
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            module, _, attribute = name.rpartition(".")
            is_numpy = module in ("np.random", "numpy.random") and attribute != "Generator"
            is_torch = module in ("torch", "torch.cuda", "torch.random") and (
                attribute in TORCH_FUNCTIONS or attribute == "manual_seed_all"
            )
            if is_numpy or is_torch or (attribute == "seed_everything" and module != "randomness"):
                found.append(name)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hash":
            found.append(f"{node.func.id}()")
    return found


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import random", "random"),
        ("from random import choice", "random"),
        ("from numpy.random import default_rng", "numpy.random"),
        ("np.random.default_rng(0)", "np.random.default_rng"),
        ("np.random.permutation(3)", "np.random.permutation"),
        ("torch.manual_seed(0)", "torch.manual_seed"),
        ("torch.cuda.manual_seed_all(0)", "torch.cuda.manual_seed_all"),
        ("torch.Generator()", "torch.Generator"),
        ("torch.randn(3)", "torch.randn"),
        ("from torch import randn", "torch.randn"),
        ("pl.seed_everything(0)", "pl.seed_everything"),
        ("hash(key)", "hash()"),
    ],
)
def test_scan_finds_violations(source: str, name: str) -> None:
    assert forbidden_names(source) == [name]


@pytest.mark.parametrize("source", ["rng: np.random.Generator", "rng.permutation(3)", "torch.random.fork_rng()"])
def test_scan_allows_the_use_of_given_generators(source: str) -> None:
    assert forbidden_names(source) == []


def test_no_other_module_creates_or_seeds_a_generator() -> None:
    found = {
        str(path.relative_to(PACKAGE)): names
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != HOME and (names := forbidden_names(path.read_text()))
    }
    assert found == {}


def test_draws_never_change() -> None:
    """A change would change resumed runs, the demo dataset and published results."""
    assert derive_seed(0, "order") == 233006335307339503008584620640932865471
    assert seeded_rng(0, 1, "clip", "mask").permutation(8).tolist() == [5, 2, 0, 7, 1, 6, 3, 4]
    assert integer_rng(0, 3, 1).integers(1000, size=4).tolist() == [918, 32, 536, 805]
    assert text_rng("view mask/0/0/").integers(1000, size=4).tolist() == [389, 373, 795, 873]


def test_integer_rng_of_one_integer_is_numpys_default_rng() -> None:
    assert integer_rng(7).random() == np.random.default_rng(7).random()
    assert integer_rng(7, 3).random() == np.random.default_rng([7, 3]).random() != integer_rng(7).random()


def test_keys_of_other_types_give_other_seeds() -> None:
    assert len({derive_seed(1, 2), derive_seed(12), derive_seed("1", 2), derive_seed(1, 2, "")}) == 4


def test_global_generators_are_seeded() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        seed_everything(5)
        first = draw()
        seed_everything(5)
        assert draw() == first
        seed_everything(2**32 + 5)  # NumPy takes 32 bits
        assert draw()[1] == first[1]
        seed_torch(5)
        assert float(torch.rand(())) == first[2]
        seed_step(0, 1, 2, 0)
        step = float(torch.rand(()))
        seed_step(0, 1, 2, 1)
        assert float(torch.rand(())) != step
        seed_step(0, 1, 2, 0)
        assert float(torch.rand(())) == step
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
