"""Convert skeletons of other programs to one file per video, and write annotation files.

    mmdistill convert-skeletons ntu60_2d.pkl --output data/ntu
    mmdistill convert-skeletons openpose_json/ --output data/mine --image-size 720 1280

SOURCE is a dataset file of mmaction2 or PYSKL, or a folder of OpenPose JSON files. The output folder contains
skeletons/f3set-tennis/VIDEO.pkl, annotations.json with all videos, and one annotation file per split of the dataset.
"""

from collections.abc import Sequence
from pathlib import Path

from mmdistill.cli.parser import make_parser, report_errors
from mmdistill.data.annotations.base import format_rally_counts


@report_errors("convert-skeletons")
def main(argv: Sequence[str] | None = None) -> int:
    """Write the files. Returns the exit status."""
    parser = make_parser("convert-skeletons", __doc__)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="dataset file, or folder of OpenPose JSON files")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new files")
    parser.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="size in px of OpenPose images (default: none)",
    )
    options = parser.parse_args(argv)
    from mmdistill.prepare.outputs import SKELETON_DIR  # imports OpenCV and PyAV, which --help must not
    from mmdistill.prepare.skeleton_files import convert_skeletons

    size = options.image_size
    written = convert_skeletons(options.source, options.output, None if size is None else (size[0], size[1]))
    for path, rallies in written.items():
        print(f"{path}: {format_rally_counts(rallies)}")
    print(f"skeletons: {options.output / SKELETON_DIR}")
    return 0
