"""Train a diffusion model, sample from it, score it, or write it as one file.

  python main.py --config=configs/digits.py --workdir=runs/digits
  python main.py --config=configs/digits.py --workdir=runs/digits --mode=sample --config.sample.labels=3
  python main.py --mode=sample --config.init_from=pretrained:fashion_mnist    (a model that ships: no training)
  python main.py --mode=explore                          (a page that looks into a model, at 127.0.0.1:7860)
  python main.py --mode=generate --prompt='a red heart' --config.init_from=FOLDER    (Stable Diffusion)

Any key of the config can be set on the command line: --config.KEY=VALUE.
"""

from absl import flags
from ml_collections import config_flags

from diffusion_jax import command_line

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'The config file, such as configs/digits.py.', lock_config=True
)
WORKDIR = flags.DEFINE_string('workdir', None, 'The folder of the run: checkpoints, metrics, samples.')
MODE = flags.DEFINE_string('mode', 'train', f'What to do: {", ".join(command_line.MODES)}.')
PROMPT = flags.DEFINE_multi_string('prompt', [], 'What --mode=generate shall show; several times for several images.')
NEGATIVE_PROMPT = flags.DEFINE_string('negative_prompt', None, 'What --mode=generate leads away from.')
NUM = flags.DEFINE_integer('num', None, 'Images of --mode=generate; one of each prompt by default.')
PORT = flags.DEFINE_integer('port', None, 'Of --mode=explore, on 127.0.0.1: 7860 by default; 0: any that is free.')
SHARE = flags.DEFINE_bool('share', False, "Of --mode=explore: a public link, too, through Gradio's servers.")
PROFILE = flags.DEFINE_bool('profile', False, 'Trace training steps 5 to 14 of this start to WORKDIR/profile.')
COORDINATOR = flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, where the environment does not tell.')
NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many processes there are, with --coordinator.')
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which one this is, from 0, with --coordinator.')


def main(argv: list[str]) -> None:
    command_line.start(
        MODE.value,
        CONFIG.value,
        WORKDIR.value,
        profile=PROFILE.value,
        prompts=PROMPT.value,
        negative_prompt=NEGATIVE_PROMPT.value,
        num=NUM.value,
        port=PORT.value,
        share=SHARE.value,
        coordinator=COORDINATOR.value,
        num_processes=NUM_PROCESSES.value,
        process_id=PROCESS_ID.value,
    )


if __name__ == '__main__':
    command_line.run(main)
