"""llama.cpp as a peer: the base model in a given GGUF type, and a process that runs it."""

import json
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

CONTEXT = 1024


class Llama:
    """A model in a llama.cpp process (llama_process.py); it ends with the stack."""

    def __init__(self, python: str, gguf: Path, threads: int, stack: ExitStack) -> None:
        ours = ("OMP_WAIT_POLICY", "PYTHONPATH")  # for our thread pool, not for theirs
        process = subprocess.Popen(
            [python, str(Path(__file__).with_name("llama_process.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={name: value for name, value in os.environ.items() if name not in ours},
        )
        self._process = stack.enter_context(process)
        stack.callback(process.kill)
        self.ask({"gguf": str(gguf), "threads": threads, "context": CONTEXT})

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # there is no answer then
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(
                "the llama.cpp process ended; has the Python of --llama-python llama-cpp-python?"
            )
        return json.loads(answer)


def rewritten(source: Path, target: Path, kind: str) -> Path:
    """The model of a GGUF file with its matrices in another type, such as Q8_0."""
    import gguf
    from gguf import quants

    reader = gguf.GGUFReader(source)
    quantization = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        sub_type = field.types[-1] if is_array else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:  # norms stay floats
            writer.add_tensor(tensor.name, values)
        else:
            rows = quants.quantize(values, quantization)
            writer.add_tensor(tensor.name, rows, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
