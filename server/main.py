"""The command line. This module imports nothing slow: `foveate serve` starts the engine process within 0.25 s."""

from foveate.server import interrupt

if interrupt.is_command_line():  # before the slower imports: Ctrl-C may come meanwhile
    interrupt.end_at_once()

import argparse
import difflib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import foveate
import foveate.bundled
import foveate.engine.prune.methods
import foveate.engine.reduce.methods
from foveate.configs.config import Config
from foveate.configs.describe import render
from foveate.configs.errors import ConfigError
from foveate.configs.load import load, nearest, preset_names
from foveate.engine.common import names
from foveate.server.foreign_flags import remedy

_EXAMPLES = """\
examples:
  foveate serve                                 the bundled tiny LLaVA on http://127.0.0.1:8000
  foveate serve tiny-qwen2-vl --port 0          the other bundled model, on any free port
  foveate serve ./llava-1.5-7b-hf --config gpu  a local Hugging Face directory, with a preset
  foveate serve Qwen/Qwen2-VL-2B-Instruct --set budget.ratio=0.5
                                                a hub name; requests read half of their visual tokens by default
  foveate config --config long-documents        what a preset sets, with every other setting and its meaning
  foveate tune ./my-model ./my-pictures         the cheapest budget that keeps 99 % of the answers on your own data
  foveate models                                what is bundled
"""

_SERVE_EXAMPLES = """\
examples:
  foveate serve
  foveate serve tiny-qwen2-vl --host 0.0.0.0 --port 9000
  foveate serve ./my-model --config cpu --set cache.memory_mb=2048 --set scheduler.max_running=32
  foveate serve Qwen/Qwen2-VL-2B-Instruct --served-model-name qwen gpt-4o
  FOVEATE__SERVER__API_KEYS=secret foveate serve

The port opens while the model loads: /health/live 200, /health/ready 503 until it is loaded. SIGTERM and Ctrl-C let
open requests finish for server.drain_s seconds; a second one cuts them off. Exit status: 0 after a signal to a ready
server, 130 or 143 to a starting one, 2 for a wrong setting, 3 if the engine stays down.
`foveate config` lists every setting. Later wins: defaults, --config, environment FOVEATE__SECTION__KEY, --set, the
other flags.
"""

_CONFIG_EXAMPLES = """\
examples:
  foveate config                                every setting, its default and its meaning
  foveate config --config cpu --set server.port=9000 > mine.yaml
  foveate serve --config mine.yaml
"""

_TUNE_TEXT = "Find the fewest visual tokens, by layer and by method, that keep the model's answers; write a preset."
_TUNE_EXAMPLES = """\
examples:
  foveate tune                                  the bundled tiny LLaVA on bundled pictures
  foveate tune ./my-model data.jsonl --agreement 0.98 --limit 400
  foveate tune Qwen/Qwen2-VL-2B-Instruct ./pictures --methods divprune "hiprune;alpha=0.2" --out ./tuned
  foveate serve --config ./tuned/preset.yaml

DATA is a file with one {"image": PATH or data URL, "question": TEXT} a line ("answer" may be added), or a folder of
pictures with a .txt of questions beside each, one a line. Three fifths of the pairs are held out and confirm what
the search on the others found; 0.99 takes at least 299 held-out pairs. Run again with the same arguments it goes on
where it stopped; with another --agreement or other --methods it measures only what is new. docs/tune.md says how to
read the report.
"""


class _Parser(argparse.ArgumentParser):
    """Prints errors as one line, like errors of settings."""

    def error(self, message: str) -> NoReturn:
        # "invalid choice: 'serv' (choose from serve, models)" and "unrecognized arguments: --prot 1"
        words = [w.strip("'\"") for w in message.replace(":", " ").split()]
        if "unrecognized" in words and (instead := remedy(words)):
            self.exit(2, f"foveate: error: {message}; {instead}\n")
        own = _names(self)
        close = [m[0] for w in words if w not in own and (m := difflib.get_close_matches(w, own, n=1, cutoff=0.7))]
        hint = f"; did you mean {close[0]}?" if close else f"; see {self.prog} --help"
        self.exit(2, f"foveate: error: {message}{hint}\n")


def _names(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options and commands of a parser and of its subcommands."""
    found: list[str] = []
    for action in parser._actions:
        found += action.option_strings
        if isinstance(action.choices, dict):
            found += [name for command, below in action.choices.items() for name in (command, *_names(below))]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Return the exit status: 0, or 2 after a one-line error on stderr."""
    started = time.monotonic()
    args = _parser().parse_args(argv)
    try:
        if args.command == "serve":
            return _serve(args, started)
        interrupt.restore()
        if args.command == "tune":
            return _tune(args)
        if args.command == "config":
            sys.stdout.write(render(load(args.config, args.set, os.environ)))
        else:
            _list_models()
    except ConfigError as error:
        print(f"foveate: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    text = "Serve vision-language models over an OpenAI-compatible API; every request carries a budget."
    parser = _Parser(prog="foveate", description=text, epilog=_EXAMPLES, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"foveate {foveate.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    text = "Start the server."
    serve = commands.add_parser(
        "serve", help="start the server", description=text, epilog=_SERVE_EXAMPLES, formatter_class=raw,
        allow_abbrev=False,
    )  # fmt: skip
    serve.add_argument(
        "model", nargs="?", metavar="MODEL",
        help=f"{' or '.join(foveate.bundled.names())} (bundled), a Hugging Face directory, or a hub name",
    )  # fmt: skip
    serve.add_argument("--host", metavar="H", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", metavar="P", help="port to listen on; 0 picks a free one (default: 8000)")
    text = "names of the model, the first in replies (default: the last part of MODEL, then all of MODEL)"
    serve.add_argument("--served-model-name", metavar="NAME", nargs="+", action="extend", help=text)
    text = "keys of clients; other users of this machine see them: prefer the environment (default: no authentication)"
    serve.add_argument("--api-key", metavar="KEY", nargs="+", action="extend", help=text)
    _add_settings(serve)

    text = "Print the settings a server would run with, as YAML that --config reads."
    config = commands.add_parser(
        "config", help="print every setting", description=text, epilog=_CONFIG_EXAMPLES, formatter_class=raw,
        allow_abbrev=False,
    )  # fmt: skip
    _add_settings(config)
    _add_tune(commands.add_parser(
        "tune", help="find the budget that keeps the answers on your own data", description=_TUNE_TEXT,
        epilog=_TUNE_EXAMPLES, formatter_class=raw, allow_abbrev=False,
    ))  # fmt: skip
    text = "List the bundled models."
    commands.add_parser("models", help="list the bundled models", description=text, allow_abbrev=False)
    return parser


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as for serve")
    parser.add_argument("data", nargs="?", metavar="DATA", default="scenes", help="default: the bundled scenes")
    text = "share of answers that must stay the same (default: %(default)s)"
    parser.add_argument("--agreement", metavar="X", type=float, default=0.99, help=text)
    parser.add_argument("--limit", metavar="N", type=int, help="so many pairs, drawn by the seed (default: all)")
    parser.add_argument("--scenes", metavar="N", type=int, default=300, help="bundled pictures (default: %(default)s)")
    text = "tokens of an answer at most (default: %(default)s)"
    parser.add_argument("--max-tokens", metavar="N", type=int, default=64, help=text)
    text = "reducers to compare (default: foveal mmtok tome tome;keep=0.75+foveal)"
    parser.add_argument("--methods", metavar="NAME", nargs="+", default=[], help=text)
    text = "the schedule may change at every so many layers (default: so that about 12 are searched)"
    parser.add_argument("--every", metavar="N", type=int, default=0, help=text)
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of all that is drawn (default: 0)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where results go (default: ./tuned-MODEL)")
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="one setting; may be repeated")
    text = f"a YAML file, or a preset: {', '.join(preset_names())}"
    parser.add_argument("--config", metavar="FILE", help=text)


def _serve(args: argparse.Namespace, started: float) -> int:
    config = _config(args, _flags(args))
    _check_method(config)
    from foveate.server.find_model import find_model
    from foveate.server.serve import run

    return run(*find_model(config), started)


def _flags(args: argparse.Namespace) -> list[str]:
    """Return the flags of `serve` that set one setting each, as `--set` takes them."""
    sets = [f"server.{flag}={value}" for flag in ("host", "port") if (value := getattr(args, flag)) is not None]
    if args.served_model_name is not None:
        first, *others = args.served_model_name
        sets += [f"model.name={first}", f"model.aliases={json.dumps(others)}"]
    if args.api_key is not None:
        sets.append(f"server.api_keys={json.dumps(args.api_key)}")
    return sets


def _config(args: argparse.Namespace, flags: Sequence[str] = ()) -> Config:
    config = load(args.config, [*args.set, *flags], os.environ)
    if args.model is not None:
        config = replace(config, model=replace(config.model, path=args.model))
    return config


def _tune(args: argparse.Namespace) -> int:
    config = _config(args)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # must precede the import of torch; see design.md, section 5
    from foveate.tune.command import Options  # late: the imports take 3 s
    from foveate.tune.command import main as tune

    return tune(
        Options(
            config=config,
            data=args.data,
            agreement=args.agreement,
            limit=args.limit,
            max_tokens=args.max_tokens,
            methods=tuple(args.methods),
            n_scenes=args.scenes,
            every=args.every,
            seed=args.seed,
            out=args.out,
        )
    )


def _check_method(config: Config) -> None:
    """Check only the method's name. Its settings are checked later, once the engine has sent its methods."""
    known = [*names(foveate.engine.reduce.methods), *names(foveate.engine.prune.methods)]
    for stage in config.budget.method.split("+"):
        name = stage.partition(";")[0].strip()
        if name not in known:
            hint = nearest(name, known) or f"; there are {', '.join(known)}"
            raise ConfigError(f"budget.method: {name} is not a method{hint}")


def _list_models() -> None:
    for name in foveate.bundled.names():
        directory = foveate.bundled.path(name)
        assert directory is not None, "named by the package itself"
        kind = json.loads((directory / "config.json").read_text())["model_type"]
        size_mb = (directory / "model.safetensors").stat().st_size / 1e6
        print(f"{name:<16} {kind:<12} {size_mb:5.1f} MB  {directory}")


if __name__ == "__main__":
    sys.exit(main())
