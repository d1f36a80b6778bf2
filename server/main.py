"""The command line. Imports nothing slow: `foveate serve` has the engine process running within a quarter second."""

import argparse
import difflib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import foveate
import foveate.bundled
import foveate.engine.prune
import foveate.engine.reduce
from foveate.configs.config import Config
from foveate.configs.describe import render
from foveate.configs.errors import ConfigError
from foveate.configs.load import load, nearest, preset_names
from foveate.engine.find import names

_EXAMPLES = """\
examples:
  foveate serve                                 the bundled tiny LLaVA on http://127.0.0.1:8000
  foveate serve tiny-qwen2-vl --port 0          the other bundled model, on any free port
  foveate serve ./llava-1.5-7b-hf --config gpu  a local Hugging Face directory, with a preset
  foveate serve Qwen/Qwen2-VL-2B-Instruct --set budget.ratio=0.5
                                                a hub name; requests read half of their visual tokens by default
  foveate config --config long-documents        what a preset sets, with every other setting and its meaning
  foveate models                                what is bundled
"""

_SERVE_EXAMPLES = """\
examples:
  foveate serve
  foveate serve tiny-qwen2-vl --host 0.0.0.0 --port 9000
  foveate serve ./my-model --config cpu --set cache.memory_mb=2048 --set scheduler.max_running=32
  FOVEATE__SERVER__API_KEYS=secret foveate serve

The port opens while the model loads: /health/live 200, /health/ready 503 until it is loaded. SIGTERM and Ctrl-C let
open requests finish for server.drain_s seconds; a second one cuts them off. `foveate config` lists every setting.
Settings, later wins: defaults, --config, environment FOVEATE__SECTION__KEY, --set, --host and --port.
"""

_CONFIG_EXAMPLES = """\
examples:
  foveate config                                every setting, its default and its meaning
  foveate config --config cpu --set server.port=9000 > mine.yaml
  foveate serve --config mine.yaml
"""


class _Parser(argparse.ArgumentParser):
    """Errors are one line, as for settings."""

    def error(self, message: str) -> NoReturn:
        # "invalid choice: 'serv' (choose from serve, models)" and "unrecognized arguments: --prot 1"
        words = [w.strip("'\"") for w in message.replace(":", " ").split()]
        own = _names(self)
        close = [m[0] for w in words if w not in own and (m := difflib.get_close_matches(w, own, n=1, cutoff=0.7))]
        hint = f"; did you mean {close[0]}?" if close else f"; see {self.prog} --help"
        self.exit(2, f"foveate: error: {message}{hint}\n")


def _names(parser: argparse.ArgumentParser) -> list[str]:
    """Options and commands of a parser and of its commands."""
    found: list[str] = []
    for action in parser._actions:
        found += action.option_strings
        if isinstance(action.choices, dict):
            found += [name for command, below in action.choices.items() for name in (command, *_names(below))]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status: 0, or 2 after one line on stderr about what is wrong."""
    started = time.monotonic()
    args = _parser().parse_args(argv)
    try:
        if args.command == "serve":
            return _serve(args, started)
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
    _add_settings(serve)

    text = "Print the settings a server would run with, as YAML that --config reads."
    config = commands.add_parser(
        "config", help="print every setting", description=text, epilog=_CONFIG_EXAMPLES, formatter_class=raw,
        allow_abbrev=False,
    )  # fmt: skip
    _add_settings(config)
    text = "List the bundled models."
    commands.add_parser("models", help="list the bundled models", description=text, allow_abbrev=False)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="one setting; may be repeated")
    text = f"a YAML file, or a preset: {', '.join(preset_names())}"
    parser.add_argument("--config", metavar="FILE", help=text)


def _serve(args: argparse.Namespace, started: float) -> int:
    flags = [f"server.{flag}={value}" for flag in ("host", "port") if (value := getattr(args, flag)) is not None]
    config = load(args.config, [*args.set, *flags], os.environ)
    if args.model is not None:
        config = replace(config, model=replace(config.model, path=args.model))
    _check_method(config)
    from foveate.server.find_model import find_model
    from foveate.server.serve import run

    return run(*find_model(config), started)


def _check_method(config: Config) -> None:
    """Names alone; settings of methods are checked once the engine has said what there are."""
    known = [*names(foveate.engine.reduce), *names(foveate.engine.prune)]
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
