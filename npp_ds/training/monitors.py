"""What a run sends to TensorBoard, Weights & Biases and CSV files, through DeepSpeed's monitors (0.19.8)."""

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from npp_ds.config.schedule import Stage
from npp_ds.config.schema import RunConfig

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


class Monitors:
    """The monitors that a config asks for, on the first rank; after an error they get no more.

    `monitor` is the engine's `MonitorMaster`, None without monitors. The config is sent at once.
    """

    def __init__(self, config: RunConfig, monitor: Any, step: int):
        self._monitor = monitor
        self._send(lambda: self._begin(config, step))

    def _begin(self, config: RunConfig, step: int) -> None:
        if writer := self._tensorboard:
            writer.add_text("config", "".join(f"    {line}\n" for line in config.to_yaml().splitlines()), step)
        if self._monitor.wandb_monitor:
            import wandb

            wandb.config.update(config.model_dump(mode="json"), allow_val_change=True)

    def curves(self, step: int, values: Mapping[str, float]) -> None:
        """Send a point of each named curve."""
        self._send(lambda: self._monitor.write_events([(name, value, step) for name, value in values.items()]))

    def stage(self, stage: Stage) -> None:
        """Mark the begin of a stage."""
        shape = {name: getattr(stage, name) for name in ("patch_side", "batch_size", "peak_learning_rate", "end_step")}
        text = f"stage {stage.index}: " + ", ".join(f"{name} {value}" for name, value in shape.items())
        self._send(lambda: self._tensorboard and self._tensorboard.add_text("stage", text, stage.start_step))
        self.curves(stage.start_step, {"stage/index": stage.index, **{f"stage/{k}": v for k, v in shape.items()}})

    def picture(self, name: str, step: int, image: "Image") -> None:
        """Send a picture to those that show pictures."""
        self._send(lambda: self._show(name, step, np.asarray(image)))

    def _show(self, name: str, step: int, image: np.ndarray) -> None:
        if writer := self._tensorboard:
            writer.add_image(name, image, step, dataformats="HWC")
            writer.flush()
        if self._monitor.wandb_monitor:
            import wandb

            self._monitor.wandb_monitor.log({name: wandb.Image(image)}, step=step)

    @property
    def _tensorboard(self) -> Any:
        return self._monitor.tb_monitor and self._monitor.tb_monitor.summary_writer

    def _send(self, action: Callable[[], object]) -> None:
        if self._monitor:
            try:
                action()
            except Exception as error:  # whatever a monitor's library raises is no reason to lose a run
                self._monitor = None
                logger.warning(f"logging.monitors: given up after {error!r}")
