"""Write a random model of a published shape as a Hugging Face directory.

    python -m bench.random_model llava FOLDER
    python -m bench.random_model qwen2_vl FOLDER --seed 1

An existing model of the same shape and seed is left alone.
"""

import argparse
from pathlib import Path

from bench.random_model.checkpoint import build, n_parameters
from bench.random_model.shape import FAMILIES


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.random_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build(args.family, args.folder, seed=args.seed)
    print(f"{args.folder}: {args.family}, {n_parameters(args.family) / 1e9:.3f} B parameters")


if __name__ == "__main__":
    main()
