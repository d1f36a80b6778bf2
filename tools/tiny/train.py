"""Train a bundled model: `PYTHONPATH=.:tools python -m tiny.train llava --minutes 60 --out run`.

Stage 0 trains the tower and the projector with the auxiliary losses alone, then all is trained together. The learning
rate follows the clock, so that the run ends, annealed, after the given minutes. A run is resumed from its folder.
"""

import argparse
import itertools
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F

from foveate.bundled import scenes
from tiny import data, decode, evaluate, losses, models, tokenizer

AUX = {"patch": 0.5, "tie": 0.5, "cls": 1.0, "cls_look": 0.2, "place": 3.0}  # weights of the auxiliary losses


def produce(family: str, seed: int, size: int, settings: dict[str, Any], queue: Any) -> None:
    """Draw batches and put them into the queue. Runs in a separate process. `settings`: fields of the recipe."""
    torch.set_num_threads(1)
    recipe = data.Recipe(family, tokenizer.build(family), **settings)
    for batch in data.batches(recipe, seed, size):
        queue.put(batch)


class Feed:
    """Batches from another process."""

    def __init__(self, family: str, seed: int, size: int, settings: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.queue = context.Queue(maxsize=8)
        arguments = (family, seed, size, settings, self.queue)
        self.process = context.Process(target=produce, args=arguments, daemon=True)
        self.process.start()

    def next(self) -> losses.Batch:
        """Return the next batch as tensors."""
        return {name: torch.from_numpy(array) for name, array in self.queue.get().items()}

    def close(self) -> None:
        """End the process."""
        self.process.terminate()


def rate(progress: float, elapsed: float, peak: float, flat: float) -> float:
    """Return the learning rate: one minute of warm-up, constant until share `flat` of the run, then to 2% of peak."""
    fall = max(0.0, (progress - flat) / (1 - flat))
    return peak * min(1.0, (elapsed + 2) / 60) * (1 - 0.98 * min(1.0, fall))


class Run:
    """A model in training, with all state."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = tokenizer.build(args.family)
        self.model = models.build(args.family, self.tokenizer)
        self.prefix = data.Layout.of(args.family, self.tokenizer).prefix
        self.prefix_turned = data.Layout.of(args.family, self.tokenizer, text_first=True).prefix
        self.heads = losses.Heads(self.model, args.family, self.tokenizer)
        self.state = {"elapsed": 0.0, "seed": args.seed, "step": 0, "pictures": 0}
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.average = models.build(args.family, self.tokenizer)
        if args.decoder_only:
            self.model.requires_grad_(False)
            models.decoder_of(self.model).requires_grad_(True)
            self.model.get_input_embeddings().requires_grad_(False)  # methods compare them with visual tokens
        trained = [p for p in (*self.model.parameters(), *self.heads.parameters()) if p.requires_grad]
        matrices = [p for p in trained if p.ndim >= 2]
        groups = [
            {"params": matrices, "weight_decay": 0.03},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98), fused=True)
        if (self.out / "last.pt").exists():
            self.restore(torch.load(self.out / "last.pt", weights_only=False))
        else:
            if args.start_from:
                shipped = type(self.model).from_pretrained(args.start_from, dtype=torch.float32)
                self.model.load_state_dict(shipped.state_dict())
            if args.decoder_from:
                saved = torch.load(Path(args.decoder_from) / "last.pt", weights_only=False)
                source = models.build("llava", self.tokenizer)
                source.load_state_dict(saved["average"])
                models.copy_decoder(source, self.model)
            self.average.load_state_dict(self.model.state_dict())

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["average"])
        self.heads.load_state_dict(saved["heads"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state = saved["state"]

    def save(self) -> None:
        """Write the checkpoint. Replace the old checkpoint atomically."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "average", "heads", "optimizer")}
        torch.save({**parts, "state": self.state}, self.out / "new.pt")
        (self.out / "new.pt").replace(self.out / "last.pt")

    def log(self, line: str) -> None:
        """Print a line and append the line to the run's log."""
        stamp = f"{self.state['elapsed'] / 60:6.1f} min  step {self.state['step']:5d}  {line}"
        print(stamp, flush=True)
        with (self.out / "train.log").open("a") as file:
            file.write(stamp + "\n")

    def step(self, batch: losses.Batch, joint: bool, aux: float, guide: float, speed: float) -> dict[str, float]:
        """Do one update and return the losses. `aux` and `guide`: weights of the auxiliary losses and the guidance."""
        for group in self.optimizer.param_groups:
            group["lr"] = speed
        with torch.set_grad_enabled(not self.args.decoder_only):
            seen = losses.look(self.model, self.args.family, batch)
        table = self.model.get_input_embeddings().weight
        parts = self.heads(seen, batch, table if joint else table.detach()) if aux > 0 else {}
        report = {name: value.item() for name, value in parts.items()}
        total: Tensor = sum((aux * AUX[name] * value for name, value in parts.items()), torch.zeros(()))
        if joint:
            prefix = self.prefix_turned if "owner" in batch else self.prefix
            logits, targets, guided, early = decode.answer(self.model, self.args.family, batch, seen, prefix, guide > 0)
            answer_loss = self._answer_loss(batch, logits, targets)
            total = total + answer_loss + guide * guided
            if self.args.family == "qwen2_vl" and aux > 0:
                place = self.heads.place(early, batch, table)
                total = total + aux * AUX["place"] * place
                report["place"] = place.item()
            order = "turned" if "owner" in batch else "answer"
            report |= {order: answer_loss.item(), "guide": guided.item()}
        total.backward()
        report["norm"] = nn.utils.clip_grad_norm_([*self.model.parameters(), *self.heads.parameters()], 1.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        fade = min(0.995, 1 - 10 / (10 + self.state["step"]))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - fade)
        return report

    def _answer_loss(self, batch: losses.Batch, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of the answer tokens, with the weight of descriptions."""
        long = batch["kinds"][batch["targets"] != -100] == scenes.KINDS.index("describe")
        scale = torch.where(long, self.args.describe_weight, 1.0)
        each = F.cross_entropy(logits, targets, reduction="none")
        return (each * scale).sum() / scale.sum()

    def _advance(self, size: int, clock: float) -> float:
        """Count a step of `size` images that began at time `clock`. Return the current time."""
        now = time.monotonic()
        self.state["elapsed"] += now - clock
        self.state["seed"] += size
        self.state["step"] += 1
        self.state["pictures"] += size
        return now

    def stage(self, joint: bool, start: float, end: float) -> None:
        """Train until minute `end` of the run. `start`: start of the learning rate's clock."""
        args, size = self.args, self.args.batch if joint else 2 * self.args.batch
        if self.state["elapsed"] >= end * 60:
            return
        settings = {"mix": args.mix, "describe": args.describe, "text_first": args.text_first, "rows": args.rows}
        feed = Feed(args.family, self.state["seed"], size, settings if joint else {"mix": None})
        sums: dict[str, list[float]] = defaultdict(list)
        clock, shown, tested = time.monotonic(), self.state["elapsed"], self.state["elapsed"]
        while self.state["elapsed"] < end * 60:
            batch = feed.next()
            into = self.state["elapsed"] - start * 60
            progress = into / ((end - start) * 60)
            guide = args.guide * max(0.0, 1 - progress / args.guide_until) if joint else 0.0
            aux = max(0.1, 1 - progress) if joint else 1.0
            aux = 0.0 if args.decoder_only else aux
            speed = rate(progress, into, args.rate, args.flat if joint else 0.7)
            for name, value in self.step(batch, joint, aux, guide, speed).items():
                sums[name].append(value)
            clock = self._advance(size, clock)
            if self.state["elapsed"] - shown > 30:
                means = "  ".join(f"{name} {sum(values) / len(values):.3f}" for name, values in sums.items())
                self.log(f"pictures {self.state['pictures']}  lr {speed:.5f}  {means}")
                shown = self.state["elapsed"]
                sums.clear()
            if self.state["elapsed"] - tested > args.test_every * 60:
                self.save()
                if joint:
                    self.test()
                tested, clock = self.state["elapsed"], time.monotonic()
        feed.close()
        self.save()

    def test(self, pictures: int = 120) -> None:
        """Log exact match on held-out images with all visual tokens and with a scattered half, in either order."""
        for share, text_first in itertools.product(("full", "scattered 0.5"), (False, True)):
            table = evaluate.table(self.average, self.args.family, self.tokenizer, pictures, share, text_first)
            order = "text first" if text_first else "image first"
            self.log(f"held-out {share}, {order}: " + "  ".join(f"{k} {value:.1%}" for k, value in table.items()))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=("llava", "qwen2_vl"))
    parser.add_argument("--out", required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--stage0", type=float, default=4, help="minutes of the tower alone, within --minutes")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--flat", type=float, default=0.5, help="share of the joint stage at the peak rate")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--guide", type=float, default=0.3)
    parser.add_argument("--guide-until", type=float, default=0.7)
    parser.add_argument("--mix", choices=sorted(data.QUOTAS), default="binding")
    parser.add_argument("--describe", type=float, default=0.35, help="chance of a description per picture")
    parser.add_argument("--describe-weight", type=float, default=0.35, help="weight of its tokens in the loss")
    text = "share of the batches with the text before the picture"
    parser.add_argument("--text-first", type=float, default=0.5, help=text)
    parser.add_argument("--rows", type=int, default=4, help="questions per picture there")
    parser.add_argument("--decoder-only", action="store_true", help="leave tower, projector and embeddings as they are")
    parser.add_argument("--test-every", type=float, default=4)
    parser.add_argument("--seed", type=int, default=0, help="first scene")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start-from", help="exported model whose weights to go on from; the aux heads start anew")
    parser.add_argument("--decoder-from", help="folder of a LLaVA run whose decoder to start from")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    run = Run(args)
    run.stage(joint=False, start=0, end=args.stage0)
    run.stage(joint=True, start=args.stage0, end=args.minutes)
    run.test(400)


if __name__ == "__main__":
    main()
