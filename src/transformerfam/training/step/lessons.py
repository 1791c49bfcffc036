"""What a teacher made of texts, kept on disk: whoever trains on the same sequences reads it in place of the teacher."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from transformerfam.errors import CorruptFileError
from transformerfam.files.tensors import load_tensors, save_tensors
from transformerfam.files.writing import make_folder

KIND, FORMAT_VERSION = "lesson", 1


class LessonStore:
    """A folder of hidden states, one file a sequence, named by all that they depend on.

    They are stored in bfloat16: a token of SmolLM2 takes 1,152 bytes.
    """

    def __init__(self, folder: str | Path, weights: str, dtype: torch.dtype) -> None:
        """Make the folder if need be.

        Args:
            folder: may hold the lessons of many teachers.
            weights: digest of the teacher's.
            dtype: in which it reads.

        Raises:
            TransformerFamError: the folder cannot be made.
        """
        self.folder = Path(folder)
        make_folder(self.folder)
        self.teacher, self.dtype = f"{weights}/{dtype}", dtype

    def take(self, kind: str, ids_BT: torch.Tensor, read: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the hidden states of tokens, `(B, T, D)`; what is not there yet is read and kept.

        Args:
            kind: how they are read.
            ids_BT: token ids.
            read: gives the hidden states of token ids, row by row the same whatever the other rows are.

        Raises:
            TransformerFamError: a file is damaged, or the disk is full.
        """
        paths = [self._path(kind, ids_T) for ids_T in ids_BT]
        missing = [row for row, path in enumerate(paths) if not path.exists()]
        if missing:
            for row, hidden_TD in zip(missing, read(ids_BT[missing]), strict=True):
                metadata = {"kind": KIND, "format_version": FORMAT_VERSION}
                save_tensors(paths[row], {"hidden": hidden_TD.to(torch.bfloat16)}, metadata)
        rows = [load_tensors(path, KIND, FORMAT_VERSION)[0].get("hidden") for path in paths]
        for path, hidden_TD in zip(paths, rows, strict=True):
            if hidden_TD is None or hidden_TD.shape[0] != ids_BT.shape[1]:
                raise CorruptFileError(f"{path} does not hold hidden states of {ids_BT.shape[1]} tokens; delete it")
        return torch.stack([hidden_TD.to(self.dtype) for hidden_TD in rows if hidden_TD is not None])

    def _path(self, kind: str, ids_T: torch.Tensor) -> Path:
        digest = hashlib.sha256(f"{self.teacher}/{kind}/".encode())
        digest.update(ids_T.cpu().to(torch.int64).contiguous().numpy().tobytes())
        return self.folder / f"{digest.hexdigest()[:40]}.safetensors"
