"""llama.cpp on SmolLM2's own weights: the same numbers in GGUF files of float32 and of int8 blocks."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from transformerfam.weights.smollm2 import find_gguf_file, get_cache_folder

INT8 = GGMLQuantizationType.Q8_0
NOT_COPIED = ("general.architecture", "general.file_type", "general.quantization_version")


def gguf_file(is_int8: bool) -> Path:
    """Return SmolLM2's de-quantised weights as a GGUF file in the cache, written once."""
    source = find_gguf_file()
    target = get_cache_folder() / f"{source.stem}-{'q8_0' if is_int8 else 'f32'}.gguf"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _write(GGUFReader(source), Path(folder) / target.name, is_int8).rename(target)
    return target


def _write(source: GGUFReader, path: Path, is_int8: bool) -> Path:
    writer = GGUFWriter(path, source.fields["general.architecture"].contents())
    for name, field in source.fields.items():
        if name not in NOT_COPIED and not name.startswith("GGUF."):
            element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], element)
    for tensor in source.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if is_int8 and values.ndim == 2:
            writer.add_tensor(tensor.name, quantize(values, INT8), raw_dtype=INT8)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class LlamaCpp:
    """A text that llama.cpp has read, with its full cache.

    Args:
        num_tokens: tokens that it will hold.
        is_int8: weights in int8 blocks instead of float32.
        uses_flash_attention: which of its two attentions it runs.
    """

    def __init__(self, num_tokens: int, is_int8: bool, uses_flash_attention: bool) -> None:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self.model: Any = Llama(
            model_path=str(gguf_file(is_int8)),
            n_ctx=num_tokens,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=uses_flash_attention,
            verbose=False,
        )

    def read(self, ids: Sequence[int]) -> None:
        """Read tokens; single ones are decoded."""
        self.model.eval(ids)
