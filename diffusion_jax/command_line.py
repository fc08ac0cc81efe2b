"""What stands between a shell and the library: modes by name, and errors as one message instead of a traceback."""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion_jax.errors import Interrupted, SamplingDiverged, SavingFailed, TrainingDiverged, UsageError
from diffusion_jax.registry import lookup, unknown

LOGGER = logging.getLogger('diffusion_jax')

Mode = Callable[..., Any]

EXPLORED = 'pretrained:fashion_mnist'
"""What --mode=explore looks into where nothing else is named."""


# Each mode imports what it needs when it runs: --help and a mistyped flag answer at once.
def _train(config: ConfigDict, workdir: str, profile: bool) -> None:
    from diffusion_jax.training.train import train

    train(config, workdir, profile)


def _sample(config: ConfigDict, workdir: str) -> None:
    from diffusion_jax.pipelines.workdir import sample

    sample(config, workdir)


def _evaluate(config: ConfigDict, workdir: str) -> None:
    from diffusion_jax.evaluation import evaluate

    evaluate(config, workdir)


def _export(config: ConfigDict, workdir: str) -> None:
    from diffusion_jax.pipelines.workdir import export

    export(config, workdir)


def _generate(config: ConfigDict, workdir: str, **texts: Any) -> None:
    from diffusion_jax.pipelines.workdir import generate

    generate(config, workdir, **texts)


def _explore(config: ConfigDict, workdir: str, **server: Any) -> None:
    from diffusion_jax.explorer import explore

    explore(config, workdir, **server)


MODES: dict[str, Mode] = {
    'train': _train,
    'sample': _sample,
    'generate': _generate,
    'evaluate': _evaluate,
    'export': _export,
    'explore': _explore,
}


def start(
    mode: str,
    config: ConfigDict,
    workdir: str,
    *,
    profile: bool = False,
    prompts: Sequence[str] = (),
    negative_prompt: str | None = None,
    num: int | None = None,
    port: int | None = None,
    share: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """One mode, in one process or, with what `distributed.initialize` takes, in several."""
    if profile and mode != 'train':
        raise UsageError(f'--profile traces training steps: it goes with --mode=train, not {mode}.')
    texts = {'prompts': prompts, 'negative_prompt': negative_prompt, 'num': num}
    if mode != 'generate' and any(value not in (None, (), []) for value in texts.values()):
        raise UsageError(f'--prompt, --negative_prompt and --num go with --mode=generate, not {mode}.')
    if mode != 'explore' and (port is not None or share):
        raise UsageError(f'--port and --share go with --mode=explore, not {mode}.')
    server = {'share': share} | ({} if port is None else {'port': port})
    from diffusion_jax import distributed

    distributed.initialize(coordinator, num_processes, process_id)
    if not distributed.is_writer():
        LOGGER.setLevel(logging.WARNING)  # one voice
    MODES[mode](config, workdir, **{'train': {'profile': profile}, 'generate': texts, 'explore': server}.get(mode, {}))


def run(main: Callable[[list[str]], None]) -> None:
    """Parses the flags and calls main.

    Exits 1 with one message for what the caller can mend, and 128 + the signal's number when one asked to stop: 130 for
    Ctrl-C, 143 for SIGTERM.
    """
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    LOGGER.addHandler(_AboveTheBar())
    try:
        app.run(main, flags_parser=_parse)
    except (UsageError, TrainingDiverged, SamplingDiverged, SavingFailed) as error:
        print(f'error: {error}', file=sys.stderr)
        _leave(1)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signal_number)  # not 0: what started it should not take it for done
    except Exception:
        traceback.print_exc()
        _leave(1)
    except KeyboardInterrupt:
        print('interrupted: the same command goes on from the newest checkpoint.', file=sys.stderr)
        sys.exit(130)


def _leave(status: int) -> None:
    """Exits; of several processes at once, for the others not to wait for this one."""
    from diffusion_jax import distributed

    if distributed.joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class _AboveTheBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _completed(argv: list[str]) -> list[str]:
    """With a pretrained model's name, to generate or to explore, the config file and a workdir need not be named."""
    source = _value(argv, 'config.init_from') or ''
    if _value(argv, 'mode') == 'explore' and not source and not _value(argv, 'config') and not _value(argv, 'workdir'):
        source = EXPLORED
        argv = [*argv, f'--config.init_from={source}']
    if _value(argv, 'mode') == 'explore' and source and not source.startswith('pretrained:'):
        argv = argv if _value(argv, 'config') else [argv[0], '--config=configs/generate.py', *argv[1:]]
        return argv if _value(argv, 'workdir') else [*argv, '--workdir=runs/explored']
    if _value(argv, 'mode') == 'generate' and source and not _value(argv, 'config'):
        argv = [argv[0], '--config=configs/generate.py', *argv[1:]]
        return argv if _value(argv, 'workdir') else [*argv, '--workdir=runs/generated']
    if not source.startswith('pretrained:') or (_value(argv, 'mode') or 'train') == 'train':
        return argv
    name = source.removeprefix('pretrained:')
    if not _value(argv, 'config') and Path(f'configs/{name}.py').is_file():
        argv = [argv[0], f'--config=configs/{name}.py', *argv[1:]]
    if not _value(argv, 'workdir'):
        argv = [*argv, f'--workdir=runs/pretrained_{name}']
    return argv


def _parse(argv: list[str]) -> list[str]:
    argv = _completed(argv)
    sys.argv = argv  # where ml_collections looks for the keys of the config that are set
    if not any(arg.lstrip('-').split('=')[0] in ('help', 'helpfull', 'helpshort') for arg in argv[1:]):
        _check(argv)
    try:
        rest = flags.FLAGS(argv)
        if not flags.FLAGS['verbosity'].present:
            absl_logging.set_verbosity('error')  # Orbax tells of every file that it touches
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f'{error} (--help shows the flags).') from error


def _value(argv: list[str], flag: str) -> str | None:
    """The value given as --flag=value or --flag value."""
    for arg, following in zip(argv, [*argv[1:], None], strict=True):
        name, equals, value = arg.partition('=')
        if name in (f'--{flag}', f'-{flag}'):
            return value if equals else following
    return None


def _check(argv: list[str]) -> None:
    """The config file, its overridden keys, the mode and the workdir: a `UsageError` with the valid choices."""
    known = sorted(str(path) for path in Path('configs').glob('*.py'))
    file = _value(argv, 'config')
    if not file:
        raise UsageError(f'--config is missing: name a config file. Here are: {", ".join(known) or "none"}.')
    if not Path(file.split(':')[0]).is_file():
        raise unknown('config file', file, known)
    if not _value(argv, 'workdir'):
        raise UsageError('--workdir is missing: name a folder for the run, such as --workdir=runs/digits.')
    lookup('mode', MODES, _value(argv, 'mode') or 'train')
    keys = _keys(file)
    for arg in argv[1:]:
        name = arg.lstrip('-').split('=')[0]
        if name.startswith('config.') and name.removeprefix('config.') not in keys:
            section = name.removeprefix('config.').rpartition('.')[0]
            nearby = {key for key in keys if key.rpartition('.')[0] == section} or keys
            raise unknown(f'key of {file}:', name.removeprefix('config.'), nearby)


def _keys(file: str) -> set[str]:
    """The dotted keys of a config file."""
    from ml_collections.config_flags import config_flags

    from diffusion_jax.config import flatten

    try:
        config = config_flags.ConfigFileFlagParser('config', lock_config=True).parse(file)
        return set(flatten(config.to_dict()))
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UsageError(f'the config file {file} cannot be read: {reason[-1] if reason else error!r}') from error
