"""Settings that must match on resume: comparison, message, names of older versions."""

from mmdistill.training.compatibility import data_order, diff_settings, format_difference, read_data_order


def test_diff_ignores_keys_of_one_side() -> None:
    stored, own = {"seed": 0, "heads": 2, "only_stored": 1}, {"seed": 0, "heads": 4, "only_own": 1}
    assert diff_settings(stored, own) == {"heads": (2, 4)}
    assert diff_settings(own, own) == {}


def test_message_gives_checkpoint_then_run() -> None:
    assert format_difference({"heads": (2, 4), "std": ((1.0,), (2.0,))}) == "heads 2 / 4, std (1.0,) / (2.0,)"


def test_data_order_of_older_versions_is_read() -> None:
    own = data_order(seed=1, num_clips=72, global_batch=8, accumulate_grad_batches=2)
    stored = {"seed": 1, "clips": 72, "global_batch": 8, "accumulate": 2, "batches": 9, "epoch": 3}
    assert read_data_order(stored) == {**own, "batches_per_epoch": 9, "epoch": 3}
    assert read_data_order(own) == own
    assert diff_settings(read_data_order({**stored, "accumulate": 1}), own) == {"accumulate_grad_batches": (1, 2)}
