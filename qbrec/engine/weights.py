"""Weights of a module in an artifact."""

from __future__ import annotations

from torch import nn

from qbrec.errors import DataError
from qbrec.storage.artifact import Artifact, ArtifactWriter


def save_weights(writer: ArtifactWriter, name: str, module: nn.Module) -> None:
    """Write a module's state as float32 safetensors."""
    state = module.state_dict()
    writer.save_safetensors(
        name, {key: value.detach().float().cpu().contiguous() for key, value in state.items()}
    )


def load_weights(artifact: Artifact, name: str, module: nn.Module) -> None:
    """Read what `save_weights` wrote into a module of the same shape.

    Raises:
        DataError: The file is damaged, or its tensors are not the module's.
    """
    weights = artifact.load_safetensors(name)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(
            f"the weights do not fit the encoder's description: {error}",
            where=str(artifact.path),
            fix="delete this folder and train the stage again",
        ) from error
