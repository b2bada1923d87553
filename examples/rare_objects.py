"""Your own classes from a few pictures: handwritten characters that the network was never shown.

Writes a folder of pictures to learn from, one folder a class, and one of pictures to recognise,
some of which are of no class at all; then adapts the network that comes with the package in
Python. The command line does the same with the folders, and draws examples/rare_objects.png:

    python examples/rare_objects.py --out characters
    fomaml-jax adapt pretrained:omniglot --support characters/support --query characters/query

The characters are those of Omniglot's test split, which is found in --data or $FOMAML_JAX_DATA, or
downloaded. Pictures of your own may have any size and format, with dark strokes or light ones.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import fomaml_jax as fj


def write_pictures(drawings, name, places, folder):
    """Black on white, as on paper."""
    (folder / name).mkdir(parents=True)
    for place in places:
        Image.fromarray(255 - drawings[place, ..., 0]).save(folder / name / f"{place + 1:02}.png")


def write_folders(test, rng, out, *, classes, strangers, shots, queries):
    """So many examples of each class to learn from, and others of it and of strangers to ask."""
    chosen = rng.choice(len(test.names), classes + strangers, replace=False)
    for count, c in enumerate(chosen):
        alphabet, character = test.names[c].split("/character")
        places = rng.permutation(test.images.shape[1])[: shots + queries]
        if count < classes:
            write_pictures(
                test.images[c], f"{alphabet} {character}", places[:shots], out / "support"
            )
        write_pictures(test.images[c], f"{alphabet} {character}", places[shots:], out / "query")


def main():
    """Writes the folders, adapts, and says how good it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of Omniglot's archives")
    parser.add_argument("--out", type=Path, default=Path("characters"), help="(%(default)s)")
    parser.add_argument("--shots", type=int, default=1, help="examples a class (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.out.exists() and any(asked.out.iterdir()):  # classes of two tasks would mix
        parser.error(f"--out: {asked.out} is not empty; remove it, or name another folder")

    test = fj.datasets.omniglot(asked.data, size=105).test
    rng = np.random.default_rng(asked.seed)
    write_folders(test, rng, asked.out, classes=5, strangers=3, shots=asked.shots, queries=3)

    support = fj.datasets.few_pictures(asked.out / "support")
    query = fj.datasets.few_pictures(asked.out / "query")
    classifier = fj.load_classifier("pretrained:omniglot")
    adapt = jax.jit(lambda x, y: fj.adapt_classifier(classifier, (x, y), names=support.names))
    predict = jax.jit(fj.AdaptedClassifier.predict)
    for call in ("with compilation", "again"):
        start = time.perf_counter()
        adapted = adapt(support.images, support.labels)
        found = jax.device_get(predict(adapted, query.images))
        print(f"adapted, and asked about {len(query.images)} pictures: ", end="")
        print(f"{time.perf_counter() - start:.2f} s, {call}")

    truth = np.array(query.names)[query.labels]
    known = np.isin(truth, support.names)
    said = np.array(support.names)[found.probabilities.argmax(1)]
    print(f"right: {np.mean(said == truth, where=known):.2f} of the pictures of the classes")
    print(
        f"taken for none of these: {np.mean(~found.is_known, where=known):.2f} of those, ", end=""
    )
    print(f"{np.mean(~found.is_known, where=~known):.2f} of the others")
    fj.save_adapted(adapted, asked.out / "adapted.npz")


if __name__ == "__main__":
    main()
