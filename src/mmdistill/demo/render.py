"""Images of the demo dataset: a court, a pinhole camera behind the near baseline, two players, DIS flow.

Images are drawn with OpenCV at `SUPERSAMPLE` times the stored size and averaged down. World axes are those of
`demo.motion`, in meters. Pixel coordinates are 0 at the center of the first pixel. Shapes: T frames, H x W px.
"""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np

from mmdistill.demo.motion import UP, Figure

SUPERSAMPLE = 4
_SHIFT = 4  # fractional bits of OpenCV's fixed-point coordinates: polygons are drawn at 1/16 px
COURT_LENGTH, COURT_HALF_WIDTH, SINGLES_HALF_WIDTH = 23.77, 5.485, 4.115
SERVICE_FROM_NET, NET_Y, NET_HEIGHT = 6.40, 11.885, 0.914
WALL_Y = 30.0  # these lengths and positions are in meters
_ANGLES = np.linspace(0, 2 * np.pi, 14, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], -1)

Color = tuple[float, float, float]  # RGB, 0 to 255
Point = tuple[float, float, float]  # meters
Range = tuple[float, float]
Size = tuple[int, int]  # (H, W) of the stored frame in px
_SKINS: tuple[Color, ...] = ((232, 190, 160), (208, 158, 124), (170, 118, 86), (124, 82, 58), (92, 62, 46))
_CLOTHES: tuple[tuple[str, Color, Range, Range, float], ...] = (
    # color without nuisance, saturation, value, distance from the colors of the court (accent: from the shirt)
    ("shirt", (236, 222, 96), (0.0, 0.85), (0.15, 1.0), 120),
    ("shorts", (30, 32, 44), (0.0, 0.6), (0.1, 1.0), 100),
    ("skin", _SKINS[0], (0.0, 0.0), (0.0, 0.0), 90),  # drawn from `_SKINS`
    ("hair", (52, 36, 28), (0.0, 0.6), (0.05, 0.9), 70),
    ("racket", (235, 60, 50), (0.0, 0.9), (0.1, 1.0), 110),
    ("strings", (228, 228, 214), (0.0, 0.3), (0.1, 1.0), 110),
    ("shoes", (240, 240, 240), (0.0, 0.7), (0.3, 1.0), 0),
    ("accent", (40, 40, 60), (0.0, 0.8), (0.1, 1.0), 90),
)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera."""

    position: np.ndarray  # (3,) meters
    axes: np.ndarray  # (3, 3), rows right, down, forward
    focal: float  # focal length in px
    center: tuple[float, float]  # principal point (x, y) in px

    @classmethod
    def look_at(cls, position: Point, target: Point, focal: float, size: Size) -> "Camera":
        """A camera without roll at `position`, with `target` at the center of the image."""
        origin = np.array(position, dtype=np.float64)
        forward = np.array(target) - origin
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, UP)
        right /= np.linalg.norm(right)
        axes = np.stack([right, np.cross(forward, right), forward])
        return cls(origin, axes, focal, ((size[1] - 1) / 2, (size[0] - 1) / 2))

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixel coordinates (..., 2) and depths in meters (...) of world points (..., 3)."""
        local = (points - self.position) @ self.axes.T
        depth = np.maximum(local[..., 2], 0.05)
        return local[..., :2] / depth[..., None] * self.focal + np.array(self.center), depth


@dataclass(frozen=True)
class Outfit:
    """Clothes and racket of one player."""

    colors: dict[str, Color]  # shirt, shorts, skin, hair, shoes, accent, racket, strings
    sleeve: float  # fraction of the upper arm that the shirt covers


@dataclass(frozen=True)
class CourtStyle:
    """Properties that all rallies on one court share."""

    colors: dict[str, Color]  # court, surround, wall, crowd
    angle: float  # direction of the light in radians
    gradient: float  # mean change of the light level over the image
    distance: float  # distance of the camera behind the near player in meters
    height: float  # height of the camera in meters
    offset: float  # sideways position of the camera in meters


@dataclass(frozen=True)
class Appearance:
    """Appearance of one rally: colors, light and image quality."""

    colors: dict[str, Color]  # court, surround, wall, crowd
    light: np.ndarray  # light level (H, W, 3)
    # start of the stadium's shadow in meters from the near baseline, and its opacity (0 none)
    shadow: tuple[float, float]
    blur: float  # standard deviation in px
    noise: float  # standard deviation in gray levels
    jpeg: int  # JPEG quality
    jitter: float  # standard deviation of the camera shake in px
    texture: float  # standard deviation of the texture of the background, relative to its brightness
    drift: float  # amplitude of the movement of the background in px


def _random_color(rng: np.random.Generator, saturation: Range, value: Range) -> Color:
    r, g, b = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(*saturation), rng.uniform(*value))
    return r * 255, g * 255, b * 255


def _blend(default: Color, other: Color, weight: float) -> Color:
    weight = min(max(weight, 0.0), 1.0)
    r, g, b = (d + (o - d) * weight for d, o in zip(default, other, strict=True))
    return r, g, b


def _color_distance(a: Color, b: Color) -> float:
    """Distance between two colors, with a larger weight on brightness, as in human vision."""
    difference = np.array(a) - np.array(b)
    return float(np.hypot(np.linalg.norm(difference), 1.5 * (np.array([0.3, 0.59, 0.11]) @ difference)))


def _contrasting_color(draw: Callable[[], Color], others: list[Color], min_distance: float) -> Color:
    """The first of 40 draws with a distance of at least `min_distance` from all `others`, or the most distant one."""
    drawn: list[tuple[float, Color]] = []
    while len(drawn) < 40 and (not drawn or drawn[-1][0] < min_distance):
        color = draw()
        drawn.append((min(_color_distance(color, other) for other in others), color))
    return max(drawn, key=lambda d: d[0])[1]


def random_court(rng: np.random.Generator, n: float) -> CourtStyle:
    """Draw the properties of a court with the nuisance `n`."""
    spread = min(n, 1.5)
    colors = {
        name: _blend(default, _random_color(rng, saturation, value), n)
        for name, default, saturation, value in (
            ("court", (62.0, 104.0, 158.0), (0.25, 0.65), (0.35, 0.75)),
            ("surround", (78.0, 128.0, 96.0), (0.2, 0.6), (0.3, 0.7)),
            ("wall", (38.0, 66.0, 92.0), (0.2, 0.6), (0.15, 0.45)),
            ("crowd", (110.0, 100.0, 100.0), (0.0, 0.3), (0.25, 0.6)),
        )
    }
    return CourtStyle(
        colors,
        angle=float(rng.uniform(0, 2 * np.pi)),
        gradient=float(0.08 + 0.22 * n * rng.uniform()),
        distance=float(8.6 + 1.6 * spread * rng.uniform(-1, 1)),
        height=float(2.9 + 0.6 * spread * rng.uniform(-1, 1)),
        offset=float(0.5 * spread * rng.uniform(-1, 1)),
    )


def random_appearance(style: CourtStyle, rng: np.random.Generator, n: float, size: Size) -> Appearance:
    """Draw the appearance of one rally with the nuisance `n`: changed colors, light, shake, image quality."""
    warm = 1 + 0.06 * n * rng.uniform(-1, 1)
    colors = {}
    for name, color in style.colors.items():
        r, g, b = np.array(color) * (1 + 0.10 * n * rng.uniform(-1, 1, 3))
        colors[name] = (float(r), float(g), float(b))
    gain = float(1 + 0.22 * min(n, 2) * rng.uniform(-1, 1))
    gradient = style.gradient * float(rng.uniform(0.7, 1.3))
    y, x = np.mgrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j]
    ramp = 1 + gradient * 0.7 * (np.cos(style.angle) * x + np.sin(style.angle) * y)
    return Appearance(
        colors,
        light=(gain * ramp[..., None] * np.array((warm, 1.0, 2 - warm))).astype(np.float32),
        blur=float(0.25 + 0.4 * n * rng.uniform()),
        noise=float(1.2 * n * rng.uniform(0.5, 1)),
        jpeg=round(88 - min(12 * n * float(rng.uniform()), 40)),
        jitter=float(0.35 * n * rng.uniform(0.3, 1)),
        shadow=(float(rng.uniform(-6, 18)), float(0.35 * min(n, 1.5) * rng.uniform() * (rng.uniform() < 0.6))),
        texture=0.2 * n,
        drift=8 * min(n, 1.5),
    )


def random_outfit(appearance: Appearance, rng: np.random.Generator, n: float) -> Outfit:
    """Draw clothes with a contrast to the court, with the nuisance `n`."""
    ground, colors = [appearance.colors["court"], appearance.colors["surround"]], dict[str, Color]()
    for name, default, saturation, value, distance in _CLOTHES:
        draw = partial(_random_color, rng, saturation, value)
        if name == "skin":
            draw = partial(lambda: _SKINS[int(rng.integers(len(_SKINS)))])
        others = [colors["shirt"]] if name == "accent" else ground
        colors[name] = _blend(default, draw() if name == "shoes" else _contrasting_color(draw, others, distance), n)
    return Outfit(colors, sleeve=float(0.55 + 0.45 * min(n, 1) * rng.uniform(-1, 1)))


class Canvas:
    """An image of `SUPERSAMPLE` times the stored size. Drawing uses pixel coordinates of the stored frame."""

    def __init__(self, image: np.ndarray) -> None:
        self.image = image

    @classmethod
    def blank(cls, size: Size) -> "Canvas":
        """A black canvas for a stored frame of `size` (H, W)."""
        return cls(np.zeros((size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE, 3), np.uint8))

    @staticmethod
    def _fixed(points: np.ndarray) -> np.ndarray:
        enlarged = (points + 0.5) * SUPERSAMPLE - 0.5
        return np.rint(np.clip(enlarged, -8000, 8000) * (1 << _SHIFT)).astype(np.int32)

    def fill_polygon(self, points: np.ndarray, color: Color, *, alpha: float = 1.0) -> None:
        """Fill a convex polygon (K, 2)."""
        opaque = self.image if alpha >= 1 else self.image.copy()
        cv2.fillConvexPoly(opaque, self._fixed(points), color, cv2.LINE_8, _SHIFT)
        if alpha < 1:
            cv2.addWeighted(opaque, alpha, self.image, 1 - alpha, 0, dst=self.image)

    def fill_hull(self, centers: np.ndarray, radii: np.ndarray, color: Color) -> None:
        """Fill the convex hull of circles with centers (K, 2) and radii (K,) in px."""
        points = (centers[:, None] + radii[:, None, None] * _CIRCLE).reshape(-1, 2).astype(np.float32)
        self.fill_polygon(cv2.convexHull(points)[:, 0], color)

    def draw_outline(self, points: np.ndarray, color: Color, width: float) -> None:
        """Draw a closed line of `width` px."""
        thickness = max(1, round(width * SUPERSAMPLE))
        cv2.polylines(self.image, [self._fixed(points)], True, color, thickness, cv2.LINE_8, _SHIFT)

    def downsample(self) -> np.ndarray:
        """The image at its stored size (H, W, C)."""
        height, width = self.image.shape[:2]
        return cv2.resize(self.image, (width // SUPERSAMPLE, height // SUPERSAMPLE), interpolation=cv2.INTER_AREA)


def draw_court(camera: Camera, appearance: Appearance, rng: np.random.Generator, size: Size) -> np.ndarray:
    """Draw the empty court at `SUPERSAMPLE` times `size`: crowd, wall, surround, lines, net. uint8 RGB."""
    canvas, colors = Canvas.blank(size), appearance.colors
    height, width = canvas.image.shape[:2]
    # The crowd: coarse and smooth, so that a masked autoencoder can predict it.
    blobs = np.clip(np.array(colors["crowd"]) * (1 + 0.22 * rng.standard_normal((10, 22, 3))), 0, 255)
    blobs = blobs.astype(np.float32)
    canvas.image[:] = cv2.resize(blobs, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 255)

    def fill(corners: list[tuple[float, float, float]], color: Color, alpha: float) -> None:
        canvas.fill_polygon(camera.project(np.array(corners))[0], color, alpha=alpha)

    def fill_ground(x0: float, x1: float, y0: float, y1: float, color: Color, alpha: float = 1.0) -> None:
        fill([(x0, y0, 0), (x1, y0, 0), (x1, y1, 0), (x0, y1, 0)], color, alpha)

    def fill_vertical(x0: float, x1: float, y: float, z0: float, z1: float, color: Color, alpha: float = 1.0) -> None:
        fill([(x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)], color, alpha)

    fill_vertical(-40, 40, WALL_Y, 0, float(rng.uniform(2.2, 3.0)), colors["wall"])
    for x in np.arange(-9, 9, 4.5) + rng.uniform(0, 3):
        fill_vertical(x, x + 1.8, WALL_Y, 0.5, 1.2, _blend(colors["wall"], (235.0, 235.0, 235.0), 0.5))

    near_edge = float(camera.position[1]) + 0.5
    fill_ground(-40, 40, near_edge, WALL_Y, colors["surround"])
    fill_ground(-COURT_HALF_WIDTH, COURT_HALF_WIDTH, 0, COURT_LENGTH, colors["court"])
    white, line = (238.0, 238.0, 232.0), 0.045
    for x in (-COURT_HALF_WIDTH, -SINGLES_HALF_WIDTH, SINGLES_HALF_WIDTH, COURT_HALF_WIDTH):
        fill_ground(x - line, x + line, 0, COURT_LENGTH, white)
    for y in (0.0, NET_Y - SERVICE_FROM_NET, NET_Y + SERVICE_FROM_NET, COURT_LENGTH):
        half_width = COURT_HALF_WIDTH if y in (0.0, COURT_LENGTH) else SINGLES_HALF_WIDTH
        fill_ground(-half_width, half_width, y - 1.6 * line, y + 1.6 * line, white)
    fill_ground(-line, line, NET_Y - SERVICE_FROM_NET, NET_Y + SERVICE_FROM_NET, white)
    fill_ground(-line, line, 0, 0.25, white)
    start, opacity = appearance.shadow
    if opacity > 0:
        fill_ground(-40, 40, max(start, near_edge), max(start + 9, near_edge), (0.0, 0.0, 0.0), opacity)

    half_width, tape = 6.4, NET_HEIGHT - 0.09
    fill_vertical(-half_width, half_width, NET_Y, 0, tape, (30.0, 34.0, 36.0), 0.5)
    fill_vertical(-half_width, half_width, NET_Y, tape, NET_HEIGHT, white)
    fill_vertical(-0.04, 0.04, NET_Y, 0, NET_HEIGHT, white)
    return canvas.image


def _scale_brightness(color: Color, factor: float) -> Color:
    r, g, b = (min(255.0, c * factor) for c in color)
    return r, g, b


class _DepthSortedPainter:
    """Collects the body parts of one player in one frame and draws them from far to near."""

    def __init__(self, canvas: Canvas, camera: Camera, affine: np.ndarray, pixels_per_meter: float) -> None:
        self.canvas, self.camera, self.affine, self.pixels_per_meter = canvas, camera, affine, pixels_per_meter
        self.parts: list[tuple[float, Callable[[], None]]] = []

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixel coordinates and depths of world points, with the camera shake."""
        uv, depth = self.camera.project(points)
        return uv @ self.affine[:, :2].T + self.affine[:, 2], depth

    def add(self, points: list[np.ndarray], radii: list[float], color: Color, depth_bias: float = 0.0) -> None:
        """Add the convex hull of circles at `points` (3,), with radii in meters, for example a limb from a to b.

        `depth_bias` moves it toward the camera by so many meters.
        """
        uv, depth = self.project(np.stack(points))
        scaled = np.array(radii) * self.pixels_per_meter
        self.parts.append((float(depth.mean()) - depth_bias, lambda: self.canvas.fill_hull(uv, scaled, color)))

    def add_racket(self, figure: Figure, t: int, frame: Color, strings: Color) -> None:
        """Add the racket in frame t."""
        grip, along = figure.grip[t], figure.racket[t]
        across = np.cross(along, figure.normal[t])
        uv, depth = self.project(
            grip + along * 0.50 + 0.175 * np.cos(_ANGLES)[:, None] * along + 0.135 * np.sin(_ANGLES)[:, None] * across
        )
        self.add([grip - 0.06 * along, grip + 0.34 * along], [0.028, 0.022], frame)

        def draw_head() -> None:
            self.canvas.fill_polygon(cv2.convexHull(uv.astype(np.float32))[:, 0], strings)
            self.canvas.draw_outline(uv, frame, 0.04 * self.pixels_per_meter)

        self.parts.append((float(depth.mean()), draw_head))

    def paint(self) -> None:
        """Draw the collected parts."""
        for _, draw in sorted(self.parts, key=lambda part: -part[0]):
            draw()


def _add_limbs(painter: _DepthSortedPainter, figure: Figure, outfit: Outfit, t: int) -> None:
    j, colors, s = figure.joints[t], outfit.colors, figure.body.height * figure.body.thickness
    skin, sole = colors["skin"], 0.018 * s * UP
    for shoulder, elbow, wrist in (j[[5, 7, 9]], j[[6, 8, 10]]):
        sleeve = shoulder + outfit.sleeve * (elbow - shoulder)
        painter.add([shoulder, elbow], [0.036 * s, 0.032 * s], skin)
        painter.add([shoulder, sleeve], [0.040 * s, 0.038 * s], colors["shirt"], depth_bias=0.01)
        hand = wrist + 0.2 * (wrist - elbow)
        painter.add([elbow, hand], [0.032 * s, 0.027 * s], _scale_brightness(skin, 0.94))
    for hip, knee, ankle in (j[[11, 13, 15]], j[[12, 14, 16]]):
        hem = hip + 0.55 * (knee - hip)
        painter.add([hip, knee], [0.055 * s, 0.040 * s], _scale_brightness(skin, 0.9))
        painter.add([hip, hem], [0.064 * s, 0.058 * s], colors["shorts"], depth_bias=0.01)
        painter.add([knee, ankle], [0.040 * s, 0.026 * s], _scale_brightness(skin, 0.86))
        toe = ankle + 0.07 * figure.body.height * (figure.chest[t] * 0.6) - sole
        painter.add([ankle - sole, toe], [0.026 * s, 0.024 * s], colors["shoes"], depth_bias=0.02)


def draw_player(canvas: Canvas, camera: Camera, affine: np.ndarray, figure: Figure, outfit: Outfit, t: int) -> None:
    """Draw a player with racket in frame t. `affine` (2, 3) is the camera shake, applied to projected pixels."""
    height, colors, j = figure.body.height, outfit.colors, figure.joints[t]
    s = height * figure.body.thickness
    depth = camera.project(j[[5, 6, 11, 12]].mean(0))[1]
    painter = _DepthSortedPainter(canvas, camera, affine, camera.focal / float(depth))

    ring = figure.ground[t] + 0.2 * height * np.pad(_CIRCLE, ((0, 0), (0, 1)))
    canvas.fill_polygon(painter.project(ring)[0], (0.0, 0.0, 0.0), alpha=0.3)

    # The side of the torso is darker than back and chest, so that a rotation is visible.
    shirt = _scale_brightness(colors["shirt"], 0.74 + 0.26 * abs(float(figure.chest[t, 1])))
    painter.add(list(j[[5, 6, 12, 11]]), [0.046 * s, 0.046 * s, 0.055 * s, 0.055 * s], shirt)
    painter.add(list(j[[11, 12]] + 0.01 * UP), [0.066 * s, 0.066 * s], colors["shorts"], depth_bias=-0.01)
    if abs(float(figure.chest[t] @ camera.axes[2])) > 0.35:
        middle = 0.62 * j[[5, 6]].mean(0) + 0.38 * j[[11, 12]].mean(0)
        across = 0.5 * (j[6] - j[5])
        stripe = [middle - 0.55 * across, middle + 0.55 * across]
        painter.add(stripe, [0.03 * s, 0.03 * s], colors["accent"], depth_bias=0.08)
    _add_limbs(painter, figure, outfit, t)
    painter.add_racket(figure, t, colors["racket"], colors["strings"])
    neck, head = j[[5, 6]].mean(0), figure.head[t]
    painter.add([neck, head], [0.03 * s, 0.03 * s], _scale_brightness(colors["skin"], 0.85))
    painter.add([head, head], [0.064 * height] * 2, colors["hair"], depth_bias=0.02)
    face = head + 0.42 * (j[0] - head)
    painter.add([face, face], [0.054 * height] * 2, colors["skin"], depth_bias=0.02)
    painter.paint()


def random_camera_shake(num_frames: int, jitter: float, size: Size, rng: np.random.Generator) -> np.ndarray:
    """Camera shake: slow shift and zoom about the image center, as affine maps (T, 2, 3)."""
    state, track = np.zeros(3), []
    for _ in range(num_frames):
        state = 0.85 * state + np.sqrt(1 - 0.85**2) * rng.standard_normal(3)
        zoom = 1 + 0.012 * jitter * state[2]
        center = np.array([(size[1] - 1) / 2, (size[0] - 1) / 2])
        shift = center * (1 - zoom) + jitter * state[:2]
        track.append([[zoom, 0, shift[0]], [0, zoom, shift[1]]])
    return np.array(track)


def random_drift(num_frames: int, amplitude: float, rng: np.random.Generator) -> np.ndarray:
    """Movement of the background in px, (T, 2): two sines per axis, with periods of 16 to 40 frames.

    It is that of a camera that follows the near player. `amplitude` is the largest horizontal movement. The vertical
    one is a quarter of it.
    """
    t = np.arange(num_frames)[:, None, None]
    periods, phases = rng.uniform(16, 40, (2, 2)), rng.uniform(0, 2 * np.pi, (2, 2))
    waves: np.ndarray = np.sin(2 * np.pi * t / periods + phases).mean(axis=2)
    movement: np.ndarray = waves * amplitude * np.array([1, 0.25])
    return movement


def add_texture(image: np.ndarray, strength: float, rng: np.random.Generator, size: Size) -> np.ndarray:
    """Multiply a supersampled image by smooth noise of two scales, 2 and 6 px of the stored frame. uint8 RGB."""
    noise = np.zeros(image.shape, np.float32)
    for scale in (2, 6):
        cells = rng.standard_normal((size[0] // scale + 2, size[1] // scale + 2, 3)).astype(np.float32)
        cells = 0.3 * cells + 0.7 * cells.mean(axis=2, keepdims=True) * 3**0.5  # mostly of brightness
        noise += cv2.resize(cells, image.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    textured: np.ndarray = np.clip(image * (1 + strength * noise), 0, 255).astype(np.uint8)
    return textured


def apply_affine(affine: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Apply camera shake (T, 2, 3) to pixel coordinates (T, N, 2)."""
    moved: np.ndarray = np.einsum("tij,tnj->tni", affine[..., :2], pixels) + affine[:, None, :, 2]
    return moved


def warp_court(court: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The supersampled empty court, moved by the camera shake (2, 3)."""
    a = affine[:, :2]
    # pixel u of the stored frame is pixel (u + 0.5) * SUPERSAMPLE - 0.5 of the supersampled one
    offset = SUPERSAMPLE * (affine[:, 2] + 0.5 - a @ [0.5, 0.5]) - 0.5 + a @ [0.5, 0.5]
    matrix = np.concatenate([a, offset[:, None]], 1)
    height, width = court.shape[:2]
    return cv2.warpAffine(court, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def postprocess(canvas: Canvas, appearance: Appearance, rng: np.random.Generator) -> np.ndarray:
    """Downsample the canvas, then apply blur, light and sensor noise. uint8 (H, W, 3) RGB."""
    image = canvas.downsample().astype(np.float32)
    image = cv2.GaussianBlur(image, (0, 0), appearance.blur) * appearance.light
    if appearance.noise > 0:
        image += appearance.noise * rng.standard_normal(image.shape, dtype=np.float32)
    pixels: np.ndarray = np.rint(np.clip(image, 0, 255)).astype(np.uint8)
    return pixels


def compute_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """DIS flow (medium preset) from one RGB image to another, float32 (2, H, W) px.

    It is computed at twice the size, because the finest level of the preset has half the size of its input.
    """
    height, width = first.shape[:2]
    gray = [
        cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (2 * width, 2 * height), interpolation=cv2.INTER_CUBIC)
        for image in (first, second)
    ]
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow = dis.calc(gray[0], gray[1], None)  # type: ignore[call-overload]
    stored: np.ndarray = cv2.resize(flow, (width, height), interpolation=cv2.INTER_AREA).transpose(2, 0, 1) / 2
    return stored
