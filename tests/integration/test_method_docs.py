"""docs/method.md: each command of the ablations composes to a valid config with the values that the page states."""

import re
import shlex
from pathlib import Path

import pytest

from mmdistill.config import DistillConfig, PretrainConfig, loss_weights, removes_no_token
from mmdistill.config.compose import load_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "method.md"
BLOCK = re.search(r"```bash\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def _commands() -> dict[str, list[str]]:
    """By comment: the words of each command, with the values of the shell's variables."""
    assert BLOCK
    variables, found = {}, {}
    for line in BLOCK[1].splitlines():
        text, _, comment = line.partition("#")
        if assignment := re.match(r'(\w)="(.*?)"', text):
            variables[assignment[1]] = assignment[2]
        else:
            words = re.sub(r"\$(\w)", lambda match: variables[match[1]], text)
            found[f"{words.split()[1]} {comment.strip()}"] = shlex.split(words)[1:]
    return found


COMMANDS = _commands()


def _config(comment: str) -> PretrainConfig | DistillConfig:
    """The config of a command; of a sweep that of its first job."""
    verb, *words = COMMANDS[comment]
    overrides = [re.sub(r"=(\[rgb\]|rgb),.*", r"=\1", word) for word in words if word != "-m"]
    if verb == "pretrain":
        return load_config(PretrainConfig, "config_pretrain", overrides)
    more = ["train=false"] if verb == "evaluate" else []
    return load_config(DistillConfig, "config_mmdistill", [*overrides, *more])


@pytest.mark.parametrize(
    ("comment", "terms", "masked"),
    [
        ("the method", (1, 1, 0.05), True),
        ("no target term", (1, 0, 0.05), True),
        ("no cross-entropy", (1, 1, 0), True),
        ("no mask in the pretraining", (1, 1, 0.05), False),
    ],
)
def test_pretrainings_have_the_terms_of_the_table(comment: str, terms: tuple[float, ...], masked: bool) -> None:
    config = _config(f"pretrain {comment}")
    assert isinstance(config, PretrainConfig)
    weights = loss_weights(config)
    assert (weights.source, weights.target, weights.ce) == terms
    assert removes_no_token(config.data_module) != masked
    assert config.source is not None
    assert (config.source.name, config.data_module.name, config.trainer.classifier_dropout) == ("ego4d", "epic", 0.5)


@pytest.mark.parametrize(
    ("comment", "mask_ratio", "n_masks"),
    [
        ("distill the method", 0.75, 2),
        ("distill no mask in the distillation", 0, 2),
        ("distill subsets", 0.75, 2),
        ("evaluate the method: two masked views", 0.75, 2),
        ("evaluate no mask in the evaluation", 0.75, 0),
    ],
)
def test_distillations_and_evaluations_have_the_masks_of_the_table(
    comment: str, mask_ratio: float, n_masks: int
) -> None:
    data = _config(comment).data_module
    assert (data.name, data.mask_ratio, data.n_masks) == ("epic", mask_ratio, n_masks)


def test_each_command_is_checked_and_the_subsets_are_those_of_the_table() -> None:
    assert len(COMMANDS) == 9
    swept = COMMANDS["distill subsets"][-1]
    assert re.findall(r"\[.*?\]", swept) == ["[rgb]", "[rgb,flow]", "[rgb,skeleton]", "[rgb,flow,skeleton]"]
