"""Pictures of the demo dataset: a court, a pinhole camera behind the near baseline, two players, DIS flow.

Drawn with OpenCV at `SUPERSAMPLE` times the stored size and reduced by area. World axes and metres as in
`demo_motion`. Pixel coordinates count from 0 at the centre of the first pixel. ``T`` frames, ``H`` x ``W`` px.
"""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from mmdistill.demo.motion import Figure

SUPERSAMPLE = 4
_SHIFT = 4  # OpenCV's fixed-point bits: polygons are drawn at 1/16 px
COURT_LENGTH, COURT_HALF_WIDTH, SINGLES_HALF_WIDTH = 23.77, 5.485, 4.115
SERVICE_FROM_NET, NET_Y, NET_HEIGHT = 6.40, 11.885, 0.914
WALL_Y = 30.0

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Camera:
    """A pinhole camera.

    Attributes:
        position: (3,) metres; axes: (3, 3) rows right, down, forward; focal: px; centre: (x, y) px.
    """

    position: np.ndarray
    axes: np.ndarray
    focal: float
    centre: tuple[float, float]

    @classmethod
    def look(
        cls,
        position: tuple[float, float, float],
        target: tuple[float, float, float],
        focal: float,
        size: tuple[int, int],
    ) -> "Camera":
        """A level camera at `position` with `target` in the middle of a picture of `size` (H, W)."""
        at = np.array(position, dtype=np.float64)
        forward = np.array(target) - at
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        down = np.cross(forward, right)
        return cls(at, np.stack([right, down, forward]), focal, ((size[1] - 1) / 2, (size[0] - 1) / 2))

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (..., 2) and depth in metres (...) of world points (..., 3)."""
        local = (points - self.position) @ self.axes.T
        depth = np.maximum(local[..., 2], 0.05)
        return local[..., :2] / depth[..., None] * self.focal + np.array(self.centre), depth


@dataclass(frozen=True)
class Outfit:
    """Colours of one player, RGB 0 to 255."""

    shirt: Colour
    shorts: Colour
    skin: Colour
    hair: Colour
    shoes: Colour
    accent: Colour
    racket: Colour
    strings: Colour
    sleeve: float  # share of the upper arm that the shirt covers


@dataclass(frozen=True)
class Look:
    """Colours and light of one court, and the weather of the picture.

    Attributes:
        court, surround, wall, crowd, net: colours.
        gain, gradient: light level, and its change over the picture along `angle` (radians).
        blur, noise: standard deviations in px and in grey levels; jpeg: quality.
        jitter: standard deviation of the camera's shake in px.
        shade: where the shadow of the stadium begins (metres from the near baseline) and how dark it is (0 none).
    """

    court: Colour
    surround: Colour
    wall: Colour
    crowd: Colour
    net: Colour
    gain: float
    gradient: float
    angle: float
    tint: Colour
    blur: float
    noise: float
    jpeg: int
    jitter: float
    shade: tuple[float, float]


def _hsv(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> Colour:
    r, g, b = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(*saturation), rng.uniform(*value))
    return r * 255, g * 255, b * 255


def _mix(default: Colour, other: Colour, share: float) -> Colour:
    share = min(max(share, 0.0), 1.0)
    r, g, b = (d + (o - d) * share for d, o in zip(default, other, strict=True))
    return r, g, b


def _distance(a: Colour, b: Colour) -> float:
    """Distance of two colours; brightness counts double, as it does for the eye."""
    x, y = np.array(a), np.array(b)
    luma = np.array([0.3, 0.59, 0.11])
    return float(np.hypot(np.linalg.norm(x - y), 1.5 * (luma @ (x - y))))


def _contrasting(draw: Callable[[], Colour], others: list[Colour], least: float) -> Colour:
    """The first of 40 draws at least `least` away from all `others`, else the farthest of them."""
    best, best_distance = (0.0, 0.0, 0.0), -1.0
    for _ in range(40):
        colour = draw()
        distance = min(_distance(colour, other) for other in others)
        if distance > best_distance:
            best, best_distance = colour, distance
        if distance >= least:
            break
    return best


def random_court(rng: np.random.Generator, nuisance: float) -> dict[str, Colour | float]:
    """What belongs to a place rather than to one rally: colours, light direction, camera."""
    n = nuisance
    court = _mix((62.0, 104.0, 158.0), _hsv(rng, (0.25, 0.65), (0.35, 0.75)), n)
    surround = _mix((78.0, 128.0, 96.0), _hsv(rng, (0.2, 0.6), (0.3, 0.7)), n)
    wall = _mix((38.0, 66.0, 92.0), _hsv(rng, (0.2, 0.6), (0.15, 0.45)), n)
    crowd = _mix((110.0, 100.0, 100.0), _hsv(rng, (0.0, 0.3), (0.25, 0.6)), n)
    spread = min(n, 1.5)
    return {
        "court": court,
        "surround": surround,
        "wall": wall,
        "crowd": crowd,
        "angle": float(rng.uniform(0, 2 * np.pi)),
        "gradient": float(0.08 + 0.22 * n * rng.uniform()),
        "distance": float(8.6 + 1.6 * spread * rng.uniform(-1, 1)),
        "height": float(2.9 + 0.6 * spread * rng.uniform(-1, 1)),
        "aim": float(0.5 * spread * rng.uniform(-1, 1)),
    }


def random_look(court: dict[str, Colour | float], rng: np.random.Generator, nuisance: float) -> Look:
    """The court on one day: its colours a little changed, light, shake, blur, noise and JPEG quality."""
    n = nuisance

    def today(name: str) -> Colour:
        r, g, b = court[name]  # type: ignore[misc]
        change = 1 + 0.10 * n * rng.uniform(-1, 1, 3)
        return float(r * change[0]), float(g * change[1]), float(b * change[2])

    warm = 1 + 0.06 * n * rng.uniform(-1, 1)
    return Look(
        court=today("court"),
        surround=today("surround"),
        wall=today("wall"),
        crowd=today("crowd"),
        net=(30.0, 34.0, 36.0),
        gain=float(1 + 0.22 * min(n, 2) * rng.uniform(-1, 1)),
        gradient=float(court["gradient"]) * float(rng.uniform(0.7, 1.3)),  # type: ignore[arg-type]
        angle=float(court["angle"]),  # type: ignore[arg-type]
        tint=(warm, 1.0, 2 - warm),
        blur=float(0.25 + 0.4 * n * rng.uniform()),
        noise=float(1.2 * n * rng.uniform(0.5, 1)),
        jpeg=round(88 - min(12 * n * float(rng.uniform()), 40)),
        jitter=float(0.35 * n * rng.uniform(0.3, 1)),
        shade=(float(rng.uniform(-6, 18)), float(0.35 * min(n, 1.5) * rng.uniform() * (rng.uniform() < 0.6))),
    )


_SKINS: tuple[Colour, ...] = ((232, 190, 160), (208, 158, 124), (170, 118, 86), (124, 82, 58), (92, 62, 46))


def random_outfit(look: Look, rng: np.random.Generator, nuisance: float) -> Outfit:
    """Clothes that can be told from the court they are seen against."""
    n, ground = nuisance, [look.court, look.surround]
    shirt = _mix((236, 222, 96), _contrasting(lambda: _hsv(rng, (0.0, 0.85), (0.15, 1.0)), ground, 120), n)
    shorts = _mix((30, 32, 44), _contrasting(lambda: _hsv(rng, (0.0, 0.6), (0.1, 1.0)), ground, 100), n)
    skin = _mix(_SKINS[0], _contrasting(lambda: _SKINS[int(rng.integers(len(_SKINS)))], ground, 90), n)
    hair = _mix((52, 36, 28), _contrasting(lambda: _hsv(rng, (0.0, 0.6), (0.05, 0.9)), ground, 70), n)
    racket = _mix((235, 60, 50), _contrasting(lambda: _hsv(rng, (0.0, 0.9), (0.1, 1.0)), ground, 110), n)
    strings = _mix((228, 228, 214), _contrasting(lambda: _hsv(rng, (0.0, 0.3), (0.1, 1.0)), ground, 110), n)
    return Outfit(
        shirt=shirt,
        shorts=shorts,
        skin=skin,
        hair=hair,
        shoes=_mix((240, 240, 240), _hsv(rng, (0.0, 0.7), (0.3, 1.0)), n),
        accent=_mix((40, 40, 60), _contrasting(lambda: _hsv(rng, (0.0, 0.8), (0.1, 1.0)), [shirt], 90), n),
        racket=racket,
        strings=strings,
        sleeve=float(0.55 + 0.45 * min(n, 1) * rng.uniform(-1, 1)),
    )


class Canvas:
    """An enlarged picture that is drawn on in pixel coordinates of the stored frame."""

    def __init__(self, image: np.ndarray) -> None:
        self.image = image

    @classmethod
    def blank(cls, size: tuple[int, int], channels: int = 3) -> "Canvas":
        return cls(np.zeros((size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE, channels), np.uint8))

    @staticmethod
    def _fixed(points: np.ndarray) -> np.ndarray:
        enlarged = (points + 0.5) * SUPERSAMPLE - 0.5
        return np.rint(np.clip(enlarged, -8000, 8000) * (1 << _SHIFT)).astype(np.int32)

    def polygon(self, points: np.ndarray, colour: Colour, *, alpha: float = 1.0) -> None:
        """Fill a convex polygon (K, 2)."""
        fixed = self._fixed(points)
        if alpha >= 1:
            cv2.fillConvexPoly(self.image, fixed, colour, cv2.LINE_8, _SHIFT)
            return
        low, high = fixed.min(0) >> _SHIFT, (fixed.max(0) >> _SHIFT) + 2
        height, width = self.image.shape[:2]
        x0, x1 = np.clip([low[0], high[0]], 0, width)
        y0, y1 = np.clip([low[1], high[1]], 0, height)
        if x0 >= x1 or y0 >= y1:
            return
        part = self.image[y0:y1, x0:x1]
        over = part.copy()
        cv2.fillConvexPoly(over, fixed - (np.array([x0, y0]) << _SHIFT).astype(np.int32), colour, cv2.LINE_8, _SHIFT)
        cv2.addWeighted(over, alpha, part, 1 - alpha, 0, dst=part)

    def hull(self, centres: np.ndarray, radii: np.ndarray, colour: Colour) -> None:
        """Fill the convex hull of circles: centres (K, 2), radii (K,) px."""
        points = (centres[:, None] + radii[:, None, None] * _CIRCLE).reshape(-1, 2).astype(np.float32)
        self.polygon(cv2.convexHull(points)[:, 0], colour)

    def outline(self, points: np.ndarray, colour: Colour, width: float) -> None:
        """Draw a closed line `width` px wide."""
        thickness = max(1, round(width * SUPERSAMPLE))
        cv2.polylines(self.image, [self._fixed(points)], True, colour, thickness, cv2.LINE_8, _SHIFT)

    def reduced(self) -> np.ndarray:
        """The picture in its stored size (H, W, C)."""
        height, width = self.image.shape[:2]
        return cv2.resize(self.image, (width // SUPERSAMPLE, height // SUPERSAMPLE), interpolation=cv2.INTER_AREA)


_ANGLES = np.linspace(0, 2 * np.pi, 14, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], -1)


def draw_court(camera: Camera, look: Look, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """The empty court: crowd, wall, surround, lines, net. uint8 (H, W, 3) times `SUPERSAMPLE`, RGB."""
    canvas = Canvas.blank(size)
    height, width = canvas.image.shape[:2]
    # The crowd: coarse blobs, smooth enough that a masked autoencoder can guess them.
    blobs = np.clip(np.array(look.crowd) * (1 + 0.22 * rng.standard_normal((10, 22, 3))), 0, 255).astype(np.float32)
    canvas.image[:] = cv2.resize(blobs, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 255)

    def world(*points: tuple[float, float, float]) -> np.ndarray:
        return camera.project(np.array(points))[0]

    def flat(x0: float, x1: float, y0: float, y1: float, colour: Colour, alpha: float = 1.0) -> None:
        canvas.polygon(world((x0, y0, 0), (x1, y0, 0), (x1, y1, 0), (x0, y1, 0)), colour, alpha=alpha)

    def upright(x0: float, x1: float, y: float, z0: float, z1: float, colour: Colour, alpha: float = 1.0) -> None:
        canvas.polygon(world((x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)), colour, alpha=alpha)

    upright(-40, 40, WALL_Y, 0, float(rng.uniform(2.2, 3.0)), look.wall)
    for x in np.arange(-9, 9, 4.5) + rng.uniform(0, 3):
        upright(x, x + 1.8, WALL_Y, 0.5, 1.2, _mix(look.wall, (235.0, 235.0, 235.0), 0.5))

    front = float(camera.position[1]) + 0.5
    flat(-40, 40, front, WALL_Y, look.surround)
    flat(-COURT_HALF_WIDTH, COURT_HALF_WIDTH, 0, COURT_LENGTH, look.court)
    white, line = (238.0, 238.0, 232.0), 0.045
    for x in (-COURT_HALF_WIDTH, -SINGLES_HALF_WIDTH, SINGLES_HALF_WIDTH, COURT_HALF_WIDTH):
        flat(x - line, x + line, 0, COURT_LENGTH, white)
    for y in (0.0, NET_Y - SERVICE_FROM_NET, NET_Y + SERVICE_FROM_NET, COURT_LENGTH):
        reach = COURT_HALF_WIDTH if y in (0.0, COURT_LENGTH) else SINGLES_HALF_WIDTH
        flat(-reach, reach, y - 1.6 * line, y + 1.6 * line, white)
    flat(-line, line, NET_Y - SERVICE_FROM_NET, NET_Y + SERVICE_FROM_NET, white)
    flat(-line, line, 0, 0.25, white)
    begin, dark = look.shade
    if dark > 0:
        flat(-40, 40, max(begin, front), max(begin + 9, front), (0.0, 0.0, 0.0), dark)

    reach, tape = 6.4, NET_HEIGHT - 0.09
    upright(-reach, reach, NET_Y, 0, tape, look.net, 0.5)
    upright(-reach, reach, NET_Y, tape, NET_HEIGHT, white)
    upright(-0.04, 0.04, NET_Y, 0, NET_HEIGHT, white)
    return canvas.image


@dataclass(frozen=True)
class Drawn:
    """One figure ready to be drawn: its body, world track and outfit."""

    figure: Figure
    outfit: Outfit
    height: float  # metres
    build: float


def _shade(colour: Colour, factor: float) -> Colour:
    r, g, b = (min(255.0, c * factor) for c in colour)
    return r, g, b


class _Painter:
    """Collects the parts of one figure in one frame and draws them from far to near."""

    def __init__(self, canvas: Canvas, camera: Camera, affine: np.ndarray, metre: float) -> None:
        self.canvas, self.camera, self.affine, self.metre = canvas, camera, affine, metre
        self.parts: list[tuple[float, Callable[[], None]]] = []

    def pixels(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        uv, depth = self.camera.project(points)
        return uv @ self.affine[:, :2].T + self.affine[:, 2], depth

    def bone(self, a: np.ndarray, b: np.ndarray, ra: float, rb: float, colour: Colour, nearer: float = 0.0) -> None:
        """A limb from a to b with radii in metres. `nearer` metres bring it forward in the order."""
        uv, depth = self.pixels(np.stack([a, b]))
        radii = np.array([ra, rb]) * self.metre
        self.parts.append((float(depth.mean()) - nearer, lambda: self.canvas.hull(uv, radii, colour)))

    def hull(self, points: np.ndarray, radii: list[float], colour: Colour, nearer: float = 0.0) -> None:
        uv, depth = self.pixels(points)
        scaled = np.array(radii) * self.metre
        self.parts.append((float(depth.mean()) - nearer, lambda: self.canvas.hull(uv, scaled, colour)))

    def paint(self) -> None:
        for _, draw in sorted(self.parts, key=lambda part: -part[0]):
            draw()


def _racket(p: _Painter, figure: Figure, t: int, outfit: Outfit) -> None:
    grip, along = figure.grip[t], figure.racket[t]
    across = np.cross(along, figure.normal[t])
    ring = grip + along * 0.50 + 0.175 * np.cos(_ANGLES)[:, None] * along + 0.135 * np.sin(_ANGLES)[:, None] * across
    uv, depth = p.pixels(ring)
    p.bone(grip - 0.06 * along, grip + 0.34 * along, 0.028, 0.022, outfit.racket)

    def head() -> None:
        p.canvas.polygon(cv2.convexHull(uv.astype(np.float32))[:, 0], outfit.strings)
        p.canvas.outline(uv, outfit.racket, 0.04 * p.metre)

    p.parts.append((float(depth.mean()), head))


def _limbs(p: _Painter, drawn: Drawn, t: int) -> None:
    j, o, s = drawn.figure.joints[t], drawn.outfit, drawn.height * drawn.build
    for shoulder, elbow, wrist in ((5, 7, 9), (6, 8, 10)):
        sleeve = j[shoulder] + o.sleeve * (j[elbow] - j[shoulder])
        p.bone(j[shoulder], j[elbow], 0.036 * s, 0.032 * s, o.skin)
        p.bone(j[shoulder], sleeve, 0.040 * s, 0.038 * s, o.shirt, nearer=0.01)
        hand = j[wrist] + 0.2 * (j[wrist] - j[elbow])
        p.bone(j[elbow], hand, 0.032 * s, 0.027 * s, _shade(o.skin, 0.94))
    for hip, knee, ankle in ((11, 13, 15), (12, 14, 16)):
        hem = j[hip] + 0.55 * (j[knee] - j[hip])
        p.bone(j[hip], j[knee], 0.055 * s, 0.040 * s, _shade(o.skin, 0.9))
        p.bone(j[hip], hem, 0.064 * s, 0.058 * s, o.shorts, nearer=0.01)
        p.bone(j[knee], j[ankle], 0.040 * s, 0.026 * s, _shade(o.skin, 0.86))
        toe = j[ankle] + 0.07 * drawn.height * (drawn.figure.chest[t] * 0.6) - np.array([0, 0, 0.018 * s])
        p.bone(j[ankle] - np.array([0, 0, 0.018 * s]), toe, 0.026 * s, 0.024 * s, o.shoes, nearer=0.02)


def draw_figure(canvas: Canvas, camera: Camera, affine: np.ndarray, drawn: Drawn, t: int) -> None:
    """Draw a player with racket at frame t.

    Args:
        affine: (2, 3) the camera's shake, applied to projected pixels.
    """
    figure, o, s = drawn.figure, drawn.outfit, drawn.height * drawn.build
    j = figure.joints[t]
    depth = camera.project(j[[5, 6, 11, 12]].mean(0))[1]
    p = _Painter(canvas, camera, affine, camera.focal / float(depth))

    ring = figure.ground[t] + 0.2 * drawn.height * np.concatenate([_CIRCLE, np.zeros((len(_CIRCLE), 1))], -1)
    canvas.polygon(p.pixels(ring)[0], (0.0, 0.0, 0.0), alpha=0.3)

    # The side of the torso is darker than back and chest, so that a turn shows.
    shade = 0.74 + 0.26 * abs(float(figure.chest[t, 1]))
    p.hull(j[[5, 6, 12, 11]], [0.046 * s, 0.046 * s, 0.055 * s, 0.055 * s], _shade(o.shirt, shade))
    p.hull(j[[11, 12]] + np.array([0, 0, 0.01]), [0.066 * s, 0.066 * s], o.shorts, nearer=-0.01)
    towards = float(figure.chest[t] @ camera.axes[2])
    if abs(towards) > 0.35:
        middle = 0.62 * j[[5, 6]].mean(0) + 0.38 * j[[11, 12]].mean(0)
        across = 0.5 * (j[6] - j[5])
        stripe = np.stack([middle - 0.55 * across, middle + 0.55 * across])
        p.hull(stripe, [0.03 * s, 0.03 * s], o.accent, nearer=0.08)
    _limbs(p, drawn, t)
    _racket(p, figure, t, o)
    neck = j[[5, 6]].mean(0)
    p.bone(neck, figure.head[t], 0.03 * s, 0.03 * s, _shade(o.skin, 0.85))
    p.bone(figure.head[t], figure.head[t], 0.064 * drawn.height, 0.064 * drawn.height, o.hair, nearer=0.02)
    face = figure.head[t] + 0.42 * (j[0] - figure.head[t])
    p.bone(face, face, 0.054 * drawn.height, 0.054 * drawn.height, o.skin, nearer=0.02)
    p.paint()


def shake(num_frames: int, jitter: float, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """The camera's shake: slow shift and zoom about the middle of the picture, affine (T, 2, 3)."""
    state, track = np.zeros(3), []
    for _ in range(num_frames):
        state = 0.85 * state + np.sqrt(1 - 0.85**2) * rng.standard_normal(3)
        zoom = 1 + 0.012 * jitter * state[2]
        centre = np.array([(size[1] - 1) / 2, (size[0] - 1) / 2])
        shift = centre * (1 - zoom) + jitter * state[:2]
        track.append([[zoom, 0, shift[0]], [0, zoom, shift[1]]])
    return np.array(track)


def apply_affine(affine: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Shake (T, 2, 3) applied to pixels (T, ..., 2)."""
    spread = (slice(None),) + (None,) * (pixels.ndim - 2)
    return np.einsum("t...ij,t...j->t...i", affine[spread][..., :2], pixels) + affine[spread][..., 2]


def warped_court(court: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The enlarged empty court as the shaken camera sees it."""
    a = affine[:, :2]
    # pixel u of the stored frame is (u + 0.5) * s - 0.5 of the enlarged one
    offset = SUPERSAMPLE * (affine[:, 2] + 0.5 - a @ [0.5, 0.5]) - 0.5 + a @ [0.5, 0.5]
    matrix = np.concatenate([a, offset[:, None]], 1)
    height, width = court.shape[:2]
    return cv2.warpAffine(court, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def light_map(look: Look, size: tuple[int, int]) -> np.ndarray:
    """Factor on every pixel and colour, float32 (H, W, 3)."""
    y, x = np.mgrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j]
    ramp = 1 + look.gradient * 0.7 * (np.cos(look.angle) * x + np.sin(look.angle) * y)
    return (look.gain * ramp[..., None] * np.array(look.tint)).astype(np.float32)


def develop(canvas: Canvas, look: Look, light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The stored picture: reduced, blurred, lit, with sensor noise. uint8 (H, W, 3) RGB."""
    picture = canvas.reduced().astype(np.float32)
    picture = cv2.GaussianBlur(picture, (0, 0), look.blur) * light
    if look.noise > 0:
        picture += look.noise * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.rint(np.clip(picture, 0, 255)).astype(np.uint8)


def dense_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """DIS flow (medium preset) between two RGB pictures, float32 (2, H, W) px.

    Computed at twice the size: the finest level of the preset is half of what it is given.
    """
    height, width = first.shape[:2]
    grey = [
        cv2.resize(cv2.cvtColor(p, cv2.COLOR_RGB2GRAY), (2 * width, 2 * height), interpolation=cv2.INTER_CUBIC)
        for p in (first, second)
    ]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(grey[0], grey[1], None)
    return cv2.resize(flow, (width, height), interpolation=cv2.INTER_AREA).transpose(2, 0, 1) / 2
