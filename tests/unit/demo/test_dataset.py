"""The demo dataset: the layout of the real data, and pictures, flow and joints that agree with each other."""

import json
import multiprocessing
import os
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.data.annotations.f3set import load_f3set
from mmdistill.data.readers.flow_file import read_flow
from mmdistill.data.readers.safe_pickle import load_pickle
from mmdistill.demo import dataset as demo
from mmdistill.demo import motion as demo_motion
from mmdistill.demo import render as demo_render
from mmdistill.demo import scene as demo_scene
from mmdistill.demo.strokes import STROKES

TINY = {"strokes_per_class": (1, 1), "strokes_per_rally": 6, "workers": 1, "progress": False}
BUDGET_BYTES = 60e6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of one stroke per class and split: 2 x 2 rallies."""
    folder = tmp_path_factory.mktemp("demo")
    demo.make_demo(folder, **TINY)
    return folder


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def tiny_scene(nuisance: float = 0.6) -> tuple[demo_scene.RallyPlan, demo_scene.DemoParameters, demo_scene.RallyScene]:
    parameters = demo_scene.DemoParameters(nuisance=nuisance, strokes_per_class=(1, 1))
    plan = demo_scene.plan_rallies(parameters)[0]
    return plan, parameters, demo_scene.build_scene(plan, parameters)


def test_layout_is_that_of_the_tennis_data(root: Path) -> None:
    rallies = [rally for split in ("train", "val") for rally in load_f3set(root / f"{split}.json")]
    assert len(rallies) == 4
    for rally in rallies:
        frames = sorted(p.name for p in (root / "vid_frames_224" / rally.video).iterdir())
        assert frames == [f"{k:06d}.jpg" for k in range(rally.num_frames)]
        pairs = sorted(p.name for p in (root / "tennis_flows" / rally.video).iterdir())
        assert pairs == [f"pair_{k:05d}.npy" for k in range(rally.num_frames - 1)]
        assert cv2.imread(str(root / "vid_frames_224" / rally.video / frames[-1])).shape == (64, 68, 3)
        assert read_flow(root / "tennis_flows" / rally.video / pairs[0]).shape == (2, 64, 68)
        skeleton = load_pickle(root / "skeletons" / "f3set-tennis" / f"{rally.video}.pkl")
        assert skeleton["keypoint"].shape == (2, rally.num_frames, 17, 2)
        assert skeleton["keypoint"].dtype == np.float32
        assert skeleton["keypoint_score"].shape == (2, rally.num_frames, 17)
        assert skeleton["total_frames"] == rally.num_frames
        assert tuple(skeleton["img_shape"]) == (64, 68)
    assert not list(root.rglob(".tmp-*"))


def test_unlabelled_rallies_are_the_training_rallies(root: Path) -> None:
    assert (root / "unlabel.json").read_bytes() == (root / "train.json").read_bytes()


def test_records_have_the_keys_of_f3set(root: Path) -> None:
    record = json.loads((root / "val.json").read_text())[0]
    wanted = {"fps", "height", "width", "num_frames", "video", "events"}
    wanted |= {f"{who}_{what}" for who in ("near", "far") for what in ("name", "hand", "set", "game", "point")}
    assert set(record) == wanted
    assert set(record["events"][0]) == {"frame", "label", "outcome"}


def test_labels_have_eight_fields_and_their_class_is_the_stroke() -> None:
    parameters = demo_scene.DemoParameters()
    assert len({stroke.fields for stroke in STROKES}) == len(STROKES) >= 12
    for plan in demo_scene.plan_rallies(parameters):
        for stroke, event in zip(plan.strokes, demo.rally_record(plan, parameters)["events"], strict=True):
            fields = event["label"].split("_")
            assert len(fields) == 8
            assert tuple(fields[2:6]) == STROKES[stroke].fields
            assert fields[0] == "near"
            assert fields[1] in ("deuce", "middle", "ad")
            assert fields[6] in ("-", "approach")
            assert fields[7] == event["outcome"] in ("in", "winner", "forced-err", "unforced-err")


def test_default_plan_is_balanced_and_large_enough() -> None:
    plans = demo_scene.plan_rallies(demo_scene.DemoParameters())
    for split in ("train", "val"):
        counts = Counter(stroke for plan in plans if plan.split == split for stroke in plan.strokes)
        assert set(counts.values()) == {24}
        assert len(counts) == len(STROKES)
    assert sum(len(plan.strokes) for plan in plans) >= 560
    assert all(len(set(plan.strokes)) == len(plan.strokes) for plan in plans)  # a class's strokes: different rallies


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_stroke_has_a_whole_window_with_flow(seed: int) -> None:
    for plan in demo_scene.plan_rallies(demo_scene.DemoParameters(seed=seed)):
        assert min(plan.frames) - 4 >= 0
        assert max(plan.frames) + 3 <= plan.num_frames - 2
        assert all(later - frame >= 8 for frame, later in zip(plan.frames, plan.frames[1:], strict=False))


def test_splits_share_neither_player_nor_court() -> None:
    parameters = demo_scene.DemoParameters()
    seen: dict[str, dict[str, set[object]]] = {}
    for plan in demo_scene.plan_rallies(parameters):
        assert plan.player != plan.opponent
        court = demo_render.random_court(parameters.rng("court", plan.court), parameters.nuisance)
        ids = seen.setdefault(plan.split, {"people": set(), "court": set(), "colours": set(), "names": set()})
        ids["people"] |= {plan.player, plan.opponent}
        ids["court"].add(plan.court)
        ids["colours"].add((court["court"], court["height"]))
        ids["names"].add(demo.rally_record(plan, parameters)["near_name"])
    for key in ("people", "court", "colours", "names"):
        assert seen["train"][key].isdisjoint(seen["val"][key])


def test_default_size_is_within_the_budget(root: Path) -> None:
    made = sum(p.stat().st_size for kind in ("vid_frames_224", "tennis_flows") for p in (root / kind).rglob("*.*"))
    frames = sum(r.num_frames for split in ("train", "val") for r in load_f3set(root / f"{split}.json"))
    default = sum(plan.num_frames for plan in demo_scene.plan_rallies(demo_scene.DemoParameters()))
    skeletons = default * 2 * 17 * 3 * 4
    assert made / frames * default + skeletons + 0.5e6 < BUDGET_BYTES


def test_two_makes_give_the_same_bytes_in_any_process(root: Path, tmp_path: Path) -> None:
    others = set(multiprocessing.active_children())  # a pool that an earlier test has not ended yet
    demo.make_demo(tmp_path, **{**TINY, "workers": 2})
    assert contents(tmp_path) == contents(root)
    assert set(multiprocessing.active_children()) <= others


def test_another_seed_gives_other_rallies() -> None:
    first, second = (demo_scene.plan_rallies(demo_scene.DemoParameters(seed=seed)) for seed in (0, 1))
    assert [plan.strokes for plan in first] != [plan.strokes for plan in second]


def test_finished_dataset_is_left_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and p.name != ".demo.lock"}
    monkeypatch.setattr(demo, "make_rally", lambda *_: pytest.fail("rendered again"))
    demo.make_demo(root, **TINY)
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and p.name != ".demo.lock"}


@pytest.mark.parametrize("lost", ["vid_frames_224/{}/000003.jpg", "tennis_flows/{}", "skeletons/f3set-tennis/{}.pkl"])
def test_only_what_is_missing_is_made_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    path = copy / lost.format("demo_val_000")
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    (copy / "demo.json").rename(copy / "demo.partial.json")  # as if the first make had been interrupted
    made: list[str] = []
    real = demo.make_rally

    def counting(*args: object) -> str:
        made.append(real(*args))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(demo, "make_rally", counting)
    demo.make_demo(copy, **TINY)
    assert made == ["demo_val_000"]
    assert contents(copy) == contents(root)


@pytest.mark.parametrize("half_made", [False, True])
def test_other_parameters_are_refused(root: Path, tmp_path: Path, half_made: bool) -> None:
    name = "demo.partial.json" if half_made else "demo.json"
    shutil.copy(root / "demo.json", tmp_path / name)
    with pytest.raises(demo.DemoError, match=r"nuisance is 0\.3, wanted 0\.1"):
        demo.make_demo(tmp_path, **TINY, nuisance=0.1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nuisance": -1.0}, "nuisance"),
        ({"frame_size": (8, 8)}, "frame_size"),
        ({"strokes_per_class": (0, 5)}, "strokes_per_class"),
        ({"strokes_per_rally": 99}, "strokes_per_rally"),
    ],
)
def test_senseless_parameters_are_refused(tmp_path: Path, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(demo.DemoError, match=message):
        demo.make_demo(tmp_path, **wrong)  # type: ignore[arg-type]


def test_joints_lie_on_the_drawn_figures() -> None:
    plan, parameters, scene = tiny_scene()
    for person in (0, 1):
        hits = []
        for t in range(plan.num_frames):
            mask = demo_scene.figure_mask(scene, t, parameters, person=person)
            x, y = np.rint(scene.keypoints[person, t]).astype(int).T
            inside = (x >= 0) & (x < 68) & (y >= 0) & (y < 64)
            hits.append(mask[y[inside], x[inside]])
        assert np.concatenate(hits).mean() > 0.97


def test_near_player_fills_half_of_the_height_and_is_seen_from_behind() -> None:
    for plan in demo_scene.plan_rallies(demo_scene.DemoParameters())[::9]:
        scene = demo_scene.build_scene(plan, demo_scene.DemoParameters())
        near = scene.keypoints[0]
        height = near[:, 15:, 1].max(1) - near[:, :5, 1].min(1)
        assert 0.42 * 64 < np.median(height) < 0.66 * 64  # eyes to ankles: less than the drawn figure
        assert np.median(near[:, 6, 0] - near[:, 5, 0]) > 0  # right shoulder to the right
        assert np.median(scene.keypoints[1, :, 6, 0] - scene.keypoints[1, :, 5, 0]) < 0  # the far player faces us
        assert scene.keypoints[1, :, :, 1].mean() < near[:, :, 1].mean()


def test_picture_shows_the_figure_where_the_mask_says() -> None:
    plan, parameters, scene = tiny_scene(nuisance=0.0)
    t = plan.frames[0]
    picture = list(demo_scene.render_rally(scene, plan, parameters))[t].astype(float)
    empty = demo_render.Canvas(demo_render.warped_court(scene.court, scene.affine[t]))
    light = demo_render.light_map(scene.look, (64, 68))
    changed = np.abs(picture - demo_render.develop(empty, scene.look, light, np.random.default_rng(0))).sum(-1) > 60
    mask = demo_scene.figure_mask(scene, t, parameters)
    assert changed[mask].mean() > 0.8
    assert changed[:, ~mask.any(0)].mean() < 0.1


def test_flow_pair_k_is_the_motion_from_frame_k_to_the_next(root: Path) -> None:
    """The flow at torso joints is their displacement; the neighbouring pairs fit worse, and so does the other sign."""
    torso = [5, 6, 11, 12]
    found: dict[str, list[np.ndarray]] = {"same": [], "before": [], "after": [], "back": []}
    for rally in load_f3set(root / "train.json"):
        points = load_pickle(root / "skeletons" / "f3set-tennis" / f"{rally.video}.pkl")["keypoint"][0]
        flows = [
            read_flow(root / "tennis_flows" / rally.video / f"pair_{k:05d}.npy") for k in range(rally.num_frames - 1)
        ]
        for k in range(1, rally.num_frames - 2):
            moved = points[k + 1, torso] - points[k, torso]
            clear = (np.linalg.norm(moved, axis=1) > 1.0) & (np.linalg.norm(moved, axis=1) < 4.0)
            x, y = np.rint(points[k, torso]).astype(int).T
            for name, pair, sign in (("same", k, 1), ("before", k - 1, 1), ("after", k + 1, 1), ("back", k, -1)):
                error = np.linalg.norm(sign * flows[pair][:, y, x].T - moved, axis=1)
                found[name].append(error[clear])
    median = {name: float(np.median(np.concatenate(errors))) for name, errors in found.items()}
    assert median["same"] < 1.0
    assert median["same"] < 0.7 * min(median["before"], median["after"], median["back"])


def test_bones_keep_their_length_and_hands_reach_the_contact() -> None:
    body = demo_motion.random_body(np.random.default_rng(0))
    contacts = [6.0, 15.0, 24.0]
    poses = demo_motion.pose_track([2, 7, 11], contacts, 30, body, np.random.default_rng(1))
    walk = demo_motion.walk_track(contacts, 30, 0.3, np.random.default_rng(2))
    joints = demo_motion.solve(poses, *walk, 0.0, body, facing=1).joints
    bones = {(5, 7): body.upper_arm, (8, 10): body.forearm, (11, 13): body.thigh, (14, 16): body.shin}
    for (a, b), length in bones.items():
        measured = np.linalg.norm(joints[:, a] - joints[:, b], axis=-1)
        np.testing.assert_allclose(measured, length * body.height, rtol=1e-6)
    assert joints[24, 10, 2] > joints[24, 0, 2]  # a smash is hit above the head
    assert joints[6, 10, 0] > joints[6, 6, 0]  # a forehand on the right side
    assert joints[15, 10, 0] < joints[15, 6, 0]  # a backhand on the left


def test_camera_agrees_with_a_written_out_pinhole() -> None:
    camera = demo_render.Camera.look((0.0, -10.0, 2.0), (0.0, 0.0, 2.0), 100.0, (65, 65))
    uv, depth = camera.project(np.array([[1.0, 0.0, 3.0], [0.0, 10.0, 2.0]]))
    np.testing.assert_allclose(uv, [[32 + 10, 32 - 10], [32, 32]])
    np.testing.assert_allclose(depth, [10, 20])


def test_without_nuisance_all_courts_look_alike_and_with_it_they_do_not() -> None:
    def colours(nuisance: float) -> set[object]:
        parameters = demo_scene.DemoParameters(nuisance=nuisance)
        return {demo_render.random_court(parameters.rng("court", k), nuisance)["court"] for k in range(6)}

    assert len(colours(0.0)) == 1
    assert len(colours(1.0)) == 6


def test_lines_instead_of_a_bar_without_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    demo.make_demo(tmp_path, strokes_per_class=(1, 1), strokes_per_rally=12, workers=1)
    assert "demo data, rallies 2/2" in capfd.readouterr().err
    assert os.listdir(tmp_path / "vid_frames_224")
