"""Generated annotations of F3Set and MM-CDFSL: the keys, labels, long-tailed classes and repeats of the real files."""

from typing import Any

import numpy as np

TYPES = {"serve": "T", "return": "CC", "stroke": "DL"}  # with a frequent direction of each
DIRECTIONS = ("CC", "DL", "DM", "II", "IO")


def make_f3set_entries(*, matches: int = 6, rallies_per_match: int = 5, seed: int = 0) -> list[dict[str, Any]]:
    """Rallies of F3Set: video MATCH_FIRST_LAST, both players, and events with all eight label fields."""
    rng = np.random.default_rng(seed)
    entries = []
    for match in range(matches):
        name = f"2021090{match}-W-Generated_Open-SF-Player_{2 * match}-Player_{2 * match + 1}"
        for rally in range(rallies_per_match):
            first, num_frames = 1000 * rally + 170, int(rng.integers(120, 350))
            players: dict[str, Any] = {}
            for side, player in (("far", 2 * match), ("near", 2 * match + 1)):
                players |= {f"{side}_name": f"Player {player}", f"{side}_hand": "LH" if player == 3 else "RH"}
                players |= {f"{side}_set": 0, f"{side}_game": rally // 4, f"{side}_point": rally % 4}
            entries.append(
                {
                    "fps": 25.0 + 4 * (match % 2),
                    "height": 720,
                    "width": 1280,
                    "num_frames": num_frames,
                    "video": f"{name}_{first}_{first + num_frames}",
                    **players,
                    "events": _events(num_frames, rng),
                }
            )
    return entries


def _events(num_frames: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    frames = np.arange(30, num_frames - 10, int(rng.integers(18, 40)))
    events = []
    for k, frame in enumerate(frames.tolist()):
        kind = "serve" if k == 0 else "return" if k == 1 else "stroke"
        court = str(rng.choice(["deuce", "ad"] if kind == "serve" else ["deuce", "middle", "ad"]))
        side, technique = ("-", "-") if kind == "serve" else (str(rng.choice(["fh", "bh"])), "gs")
        if kind != "serve" and rng.uniform() < 0.2:
            technique = str(rng.choice(["slice", "volley", "lob", "drop", "smash"]))
        direction = TYPES[kind] if kind == "serve" or rng.uniform() < 0.6 else str(rng.choice(DIRECTIONS))
        approach = "approach" if rng.uniform() < 0.05 else "-"
        outcome = "in" if k + 1 < len(frames) else str(rng.choice(["in", "winner", "forced-err", "unforced-err"]))
        player = ("near", "far")[k % 2]
        label = f"{player}_{court}_{kind}_{side}_{technique}_{direction}_{approach}_{outcome}"
        events.append({"frame": frame, "label": label, "outcome": outcome})
    return events


def make_clips(num_events: int, num_repeats: int, *, num_classes: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    """Clips of MM-CDFSL's lists, in random order; without `num_classes` they have no class.

    Every tenth clip begins at the same frame as another clip, with another class if it has one and in another video if
    not. A repeat has the values of another clip; every second repeat has another end.
    """
    rng = np.random.default_rng(seed)
    clips = []
    for k in range(num_events):
        first = 1 + 30 * (k - k % 10 if k % 10 == 1 else k)
        video = f"{k % 2 if not num_classes else 0:04d}"
        clip = {"video_id": video, "start_frame": first, "end_frame": first + 20, "num_frames": 40 * num_events}
        if num_classes:
            action = k % num_classes if k < num_classes else int(num_classes * rng.uniform() ** 3)
            action = (clips[-1]["action_id"] + 1) % num_classes if k % 10 == 1 else action
            clip |= {"action_id": action, "action_id_internal": action + 100, "action_name": f"action_{action}"}
        clips.append(clip)
    for k, i in enumerate(rng.choice(num_events, num_repeats, replace=False).tolist()):
        clips.append({**clips[i], "end_frame": clips[i]["end_frame"] + k % 2})
    return [clips[i] for i in rng.permutation(len(clips))]
