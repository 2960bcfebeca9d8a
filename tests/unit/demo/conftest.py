from pathlib import Path

import pytest

from mmdistill.demo.dataset import make_demo
from mmdistill.demo.scene import DemoParameters, RallyPlan, RallyScene, build_scene, plan_rallies

ONE_STROKE_PER_CLASS = DemoParameters(strokes_per_class=(1, 1))


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with one stroke per class and split: 2 x 2 rallies. Tests must not change it."""
    folder = tmp_path_factory.mktemp("demo")
    make_demo(folder, ONE_STROKE_PER_CLASS, workers=1, progress=False)
    return folder


def make_scene(nuisance: float) -> tuple[RallyPlan, DemoParameters, RallyScene]:
    """The first rally of a small dataset."""
    parameters = DemoParameters(nuisance=nuisance, strokes_per_class=(1, 1))
    plan = plan_rallies(parameters)[0]
    return plan, parameters, build_scene(plan, parameters)


@pytest.fixture(scope="session")
def scene() -> tuple[RallyPlan, DemoParameters, RallyScene]:
    """A rally with strong variation of the images."""
    return make_scene(0.6)


@pytest.fixture(scope="session")
def plain_scene() -> tuple[RallyPlan, DemoParameters, RallyScene]:
    """A rally without variation of the images."""
    return make_scene(0.0)
