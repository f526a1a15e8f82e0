"""Download and prepare a TFDS data set for training without TensorFlow.

    python -m experiments.prepare name=omniglot data_dir=DIR

Needs `pip install -e '.[prepare]'`, and the network or the original archives in
DIR/downloads/manual/. The result is DIR/omniglot/3.0.0, to be copied wherever it is wanted.
"""

import sys

from omegaconf import OmegaConf

from maml.tasks.images import prepare


def main(arguments: list[str] | None = None) -> None:
    """Prepare what the command line names; one sentence and exit code 1 if that cannot be done."""
    words = sys.argv[1:] if arguments is None else arguments
    defaults = OmegaConf.create({"name": "omniglot", "data_dir": None})
    options = OmegaConf.merge(defaults, OmegaConf.from_cli(words))
    if unknown := [str(word) for word in options if word not in defaults]:
        raise SystemExit(f"{unknown[0]}: no such option; give name=NAME and data_dir=DIR")
    try:
        builder = prepare(options.name, options.data_dir)
    except (ModuleNotFoundError, FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print(f"{options.name} {builder.version} is in {builder.data_dir}")


if __name__ == "__main__":
    main()
