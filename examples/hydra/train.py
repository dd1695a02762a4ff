"""Train the project of examples/yaml with Hydra; each file in configs/callbacks is a choice.

python examples/hydra/train.py callbacks=gated
python examples/hydra/train.py 'callbacks=[gated,probe]' trainer.max_epochs=2
python examples/hydra/train.py '~callbacks'
"""

import sys
from pathlib import Path

import hydra
import lightning.pytorch as L
from omegaconf import DictConfig

sys.path.append(str(Path(__file__).parents[1] / "yaml"))  # where project.py is; yours may be installed


def train(config: DictConfig) -> L.LightningModule:
    """Make what the configuration describes, train it, and return the module."""
    L.seed_everything(config.seed)
    data: L.LightningDataModule = hydra.utils.instantiate(config.data)
    module: L.LightningModule = hydra.utils.instantiate(config.model)
    callbacks = [hydra.utils.instantiate(callback) for callback in config.callbacks.values()]
    trainer: L.Trainer = hydra.utils.instantiate(config.trainer, callbacks=callbacks)
    trainer.fit(module, data)
    return module


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> None:
    """Train what the command line says."""
    train(config)


if __name__ == "__main__":
    main()
