"""Write a trained run as a Hugging Face directory: `python -m tiny.export llava RUN foveate/bundled/tiny-llava`."""

import argparse
from pathlib import Path

import torch

from tiny import card, models, tokenizer


def main() -> None:
    """Command line. Exports the averaged weights of the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=("llava", "qwen2_vl"))
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", type=Path, help="output of tiny.evaluate, for the model card")
    args = parser.parse_args()
    tokens = tokenizer.build(args.family)
    model = models.build(args.family, tokens)
    saved = torch.load(args.run / "last.pt", weights_only=False)
    model.load_state_dict(saved["average"])
    models.save(model, args.family, tokens, args.folder)
    state, count = saved["state"], sum(weight.numel() for weight in model.parameters())
    table = args.table.read_text() if args.table else "Not measured yet."
    (args.folder / "README.md").write_text(card.card(args.family, count, state, table))
    print(f"{args.folder}: step {state['step']}, {state['pictures']} pictures, {state['elapsed'] / 60:.1f} minutes")


if __name__ == "__main__":
    main()
